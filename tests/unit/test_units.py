import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from gateway.units import Duration, Size, format_duration, format_size, parse_duration, parse_size


class Limits(BaseModel):
    wait: Duration = 30.0
    room: Size = 1024


@pytest.mark.parametrize(
    "written, seconds",
    [
        ("250ms", 0.25),
        ("30s", 30.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("2d", 172_800.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("1d2h3m4s5ms", 93_784.005),
        ("12", 12.0),
        (0, 0.0),
        (7, 7.0),
        (0.5, 0.5),
    ],
)
def test_duration(written, seconds):
    """A duration is a number of seconds or is written with units, largest first."""
    assert seconds == parse_duration(written)
    assert seconds == Limits(wait=written).wait
    jsonschema.validate({"wait": written}, Limits.model_json_schema())


@pytest.mark.parametrize(
    "written",
    ["", "30 sec", "30S", "s", "-5s", "1:30", "30m1h", "1h1h", "5x", "٣s", "1h 30m", "inf", "9" * 400 + "s"],
)
def test_not_a_duration(written):
    """What is not a duration is refused with the ways to write one."""
    with pytest.raises(ValueError) as caught:
        parse_duration(written)
    assert f"{written!r} is not a duration; write 30s, 5m, 1h30m" == str(caught.value)


@pytest.mark.parametrize("value", [True, False, None, [], {}, -1, -0.1, float("nan"), float("inf"), 10**400])
def test_values_that_are_no_durations(value):
    """Booleans, negative and endless numbers are no durations."""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(value)


@pytest.mark.parametrize(
    "written, size",
    [
        ("20MiB", 20 * 2**20),
        ("64KiB", 65_536),
        ("1GB", 10**9),
        ("500kB", 500_000),
        ("500KB", 500_000),
        ("1.5GiB", 3 * 2**29),
        ("7B", 7),
        ("12", 12),
        (0, 0),
        (4096, 4096),
        (1e6, 1_000_000),
    ],
)
def test_size(written, size):
    """A size is a number of bytes or is written with a decimal or binary unit."""
    assert size == parse_size(written)
    assert size == Limits(room=written).room
    jsonschema.validate({"room": written}, Limits.model_json_schema())


@pytest.mark.parametrize("written", ["", "20M", "20 MiB", "MiB", "-1kB", "0.3B", "1.0001kB", "2Mbit", "9" * 30])
def test_not_a_size(written):
    """What is not a size, or could mean two sizes, is refused with the ways to write one."""
    with pytest.raises(ValueError) as caught:
        parse_size(written)
    assert f"{written!r} is not a size; write 20MiB, 64KiB, 1GB" == str(caught.value)


@pytest.mark.parametrize("value", [True, None, [], -1, 1.5, float("nan"), float("inf"), 2**63])
def test_values_that_are_no_sizes(value):
    """Booleans, negative, broken and endless numbers are no sizes."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(value)


@given(st.integers(min_value=0, max_value=10**12))
def test_durations_are_printed_as_they_are_read(milliseconds):
    """A printed duration reads back as the same duration."""
    seconds = milliseconds / 1000
    assert seconds == pytest.approx(parse_duration(format_duration(seconds)), abs=1e-6)


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_sizes_are_printed_as_they_are_read(size):
    """A printed size reads back as the same size."""
    assert size == parse_size(format_size(size))


def test_spelling():
    """Printed durations and sizes look as people write them."""
    assert [format_duration(value) for value in (0, 5400, 75, 125, 0.25)] == [
        "0s",
        "1h30m",
        "75s",
        "2m5s",
        "250ms",
    ]
    assert [format_size(value) for value in (0, 20 * 2**20, 10**9, 1500)] == ["0B", "20MiB", "1GB", "1500B"]


def test_models_speak_units():
    """In a pydantic model bad units are ordinary errors and JSON carries the units."""
    with pytest.raises(ValidationError) as caught:
        Limits(wait="soon", room="much")
    assert [error["loc"] for error in caught.value.errors()] == [("wait",), ("room",)]
    assert json.loads(Limits().model_dump_json()) == {"wait": "30s", "room": "1KiB"}
    assert Limits().model_dump() == {"wait": 30.0, "room": 1024}
