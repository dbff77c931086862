import gc
import weakref
from decimal import Decimal

import pytest
from plugin_objects import exchange, kept

from gateway.errors import Forbidden
from gateway.exchange import Principal
from gateway.kit import PerCaller, choices, output_cap, own_limits, subjects


def own(limits):
    return own_limits(exchange(principal=Principal("p", limits=limits)))


@pytest.mark.parametrize("limits", [{}, {"requests": None}, {"spaceships": [1, 2]}])
def test_without_limits_of_its_own_a_caller_has_none(limits):
    """Nothing given, or only what other plugins know, limits nothing here."""
    assert (own(limits) or own({"requests": None})) == own({"requests": None})
    assert own_limits(exchange(principal=None)) is None


def test_limits_are_read_from_texts_and_numbers():
    """As a token's claims or a key's settings write them."""
    found = own({"requests": "5", "usd": 0.25, "per": "1h", "spaceships": {}})
    assert (found.requests, found.usd, found.per) == (5, Decimal("0.25"), 3600)


@pytest.mark.parametrize("value", [-1, 0, "many", 1.5, [5], {"max": 5}, float("nan"), float("inf"), 10**30])
@pytest.mark.parametrize("name", ["requests", "tokens", "concurrent", "usd", "per"])
def test_limits_that_can_not_be_understood_are_no_licence(name, value):
    """A caller whose limit makes no sense is refused, and told which; it is not let through without one."""
    if name in {"usd", "per"} and value == 1.5:
        return
    with pytest.raises(Forbidden, match=name):
        own({name: value})


@pytest.mark.parametrize("body, count", [
    ({}, 1), ({"n": 3}, 3), ({"n": 1000}, 1000), ({"n": 2.0}, 2), ({"n": 2.5}, 3), ({"n": "4"}, 4), ({"n": True}, 1),
    ({"n": 0}, 1), ({"n": -5}, 1), ({"n": None}, 1), ({"n": []}, 1), ({"n": "x"}, 1), ({"n": "inf"}, 1),
    ({"best_of": 6}, 6), ({"n": 2, "best_of": 6}, 6), ({"n": 7, "best_of": 6}, 7),
    ({"prompt": "x"}, 1), ({"prompt": ["x"]}, 1), ({"prompt": ["x", "y"], "n": 3}, 6), ({"prompt": [1, 2, 3]}, 1),
    ({"prompt": [[1], [2]]}, 2), ({"prompt": []}, 1),
])  # fmt: skip
def test_every_answer_that_may_be_billed_counts(body, count):
    """`n`, the candidates of `best_of`, and each of several prompts."""
    assert choices(body) == count


@pytest.mark.parametrize("body, cap", [
    ({}, None), ({"a": 5}, 5), ({"a": 5, "b": 7}, 7), ({"c": 5}, None), ({"a": 0, "b": -1}, None),
    ({"a": True}, None), ({"a": "5"}, None), ({"a": 5.0}, None), ({"a": 10**20}, 10**20),
])  # fmt: skip
def test_the_largest_limit_that_the_dialect_knows_counts(body, cap):
    """Of several limits the upstream may take any; a field of another dialect it ignores."""
    assert output_cap(body, ("a", "b")) == cap


def test_a_client_can_not_fill_the_memory_with_names():
    """Of an end user whose name is long no more is kept than what tells it from others; requests may be megabytes."""
    with kept() as held:
        made = {subjects(["user"], exchange(body={"user": f"{n}" * 100_000}))[0] for n in range(10, 60)}
    assert len(made) == 50
    assert held[0] < 500_000


def test_what_is_worked_out_for_a_caller_goes_with_it():
    """Each token that is renewed is another principal: of those of before nothing is kept."""

    class Made: ...

    for_each = PerCaller(lambda _: Made())
    principals = [Principal(f"p{n}") for n in range(5)]
    made = [weakref.ref(for_each.of(exchange(principal=principal))) for principal in principals]
    nobody = for_each.of(exchange(principal=None))
    assert [for_each.of(exchange(principal=principal)) for principal in principals] == [one() for one in made]
    assert for_each.of(exchange(principal=None)) is nobody
    principals.clear()
    gc.collect()
    assert [one() for one in made] == [None] * 5
