"""Durations and sizes as people write them in YAML: `30s`, `1h30m`, `20MiB`."""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

DURATION_EXAMPLES: Final = "30s, 5m, 1h30m"
SIZE_EXAMPLES: Final = "20MiB, 64KiB, 1GB"

_NUMBER: Final = r"[0-9]+(?:\.[0-9]+)?"
_SECONDS: Final = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_BYTES: Final = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_MAX_SIZE: Final = 2**63 - 1
_DURATION_PATTERN: Final = "".join(f"(?:({_NUMBER}){unit})?" for unit in _SECONDS)
_DURATION: Final = re.compile(_DURATION_PATTERN)
_SIZE: Final = re.compile(rf"({_NUMBER})(|{'|'.join(_BYTES)})", re.IGNORECASE)


def parse_duration(value: object) -> float:
    """Seconds of `250ms`, `30s`, `5m`, `1h30m`, `2d` or of a plain number of seconds.

    Raises ValueError for anything else: negative, not finite, other units, true and false.
    """
    seconds = _seconds(value)
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{value!r} is not a duration; write {DURATION_EXAMPLES}")
    return seconds


def _seconds(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return None
    if not isinstance(value, str) or not value:
        return None
    if re.fullmatch(_NUMBER, value):
        return float(value)
    match = _DURATION.fullmatch(value)
    if match is None:
        return None
    # Milliseconds are divided, not multiplied by 0.001, so that 300ms is 0.3 exactly.
    parts = [
        float(text) / 1000 if unit == "ms" else float(text) * factor
        for text, (unit, factor) in zip(match.groups(), _SECONDS.items(), strict=True)
        if text is not None
    ]
    return math.fsum(parts)


def format_duration(seconds: float) -> str:
    """`1h30m`, `75s`, `250ms`: what `parse_duration` reads back as the same number of milliseconds."""
    rest = round(seconds * 1000)
    if rest < 120_000 and rest % 1000 == 0:
        return f"{rest // 1000}s"
    parts: list[str] = []
    for unit, milliseconds in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, milliseconds)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size(value: object) -> int:
    """Bytes of `20MiB`, `64KiB`, `1GB`, `500kB` or of a whole number of bytes.

    Raises ValueError for anything else: negative, a fraction of a byte, `20M` (which could mean either).
    """
    size = _bytes(value)
    if size is None or not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"{value!r} is not a size; write {SIZE_EXAMPLES}")
    return size


def _bytes(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    size = Decimal(match[1]) * _BYTES[match[2].lower() or "b"]
    return int(size) if size <= _MAX_SIZE and size == size.to_integral_value() else None


def format_size(size: int) -> str:
    """The largest unit that divides the size evenly, binary units first: `20MiB`, `1500B`."""
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"):
        count, rest = divmod(size, _BYTES[unit.lower()])
        if count and not rest:
            return f"{count}{unit}"
    return f"{size}B"


def _validator(kind: str, parse: Callable[[object], Any]) -> BeforeValidator:
    def validate(value: object) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            # The kind lets settings.py word the problem itself: it knows which values are secret.
            raise PydanticCustomError("unit", "{problem}", {"kind": kind, "problem": str(error)}) from None

    return BeforeValidator(validate)


DURATION_SCHEMA: Final[dict[str, Any]] = {
    "$comment": "duration",
    "anyOf": [
        {"type": "string", "pattern": f"^(?=.)(?:{_DURATION_PATTERN}|{_NUMBER})$"},
        {"type": "number", "minimum": 0},
    ],
    "examples": ["250ms", "30s", "5m", "1h30m", "2d", 30],
}
SIZE_SCHEMA: Final[dict[str, Any]] = {
    "$comment": "size",
    "anyOf": [
        {"type": "string", "pattern": rf"^{_NUMBER}(?:[kKmMgGtT]?[bB]|[kKmMgGtT][iI][bB])?$"},
        {"type": "integer", "minimum": 0},
    ],
    "examples": ["20MiB", "64KiB", "1GB", "500kB", 1048576],
}

Duration = Annotated[
    float,
    _validator("duration", parse_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    WithJsonSchema(DURATION_SCHEMA),
]
"""Seconds, as a float. In YAML: `250ms`, `30s`, `5m`, `1h30m`, `2d` or a number of seconds."""

Size = Annotated[
    int,
    _validator("size", parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    WithJsonSchema(SIZE_SCHEMA),
]
"""Bytes, as an int. In YAML: `20MiB`, `64KiB`, `1GB`, `500kB` or a number of bytes."""
