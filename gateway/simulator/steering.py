"""What the words of a simulated model's name ask for. Their table stands in the package's docstring."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NUMBERED = frozenset({"fail", "flaky", "slowpre", "retry"})
PLAIN = frozenset(
    {
        "ctx", "reset", "close", "hang", "badjson", "html", "err200", "redirect", "gzipbomb",
        "finerr", "cutmid", "rstmid", "stallmid", "errmid", "errpre", "nodone", "nofinish", "nousage",
        "empty", "negusage", "absusage", "split", "cr", "bigline", "afterdone",
    }
)  # fmt: skip
BEFORE_HEADERS = frozenset({"fail", "flaky", "ctx", "reset", "close", "hang", "redirect"})
FAILS_OVER = BEFORE_HEADERS | {"badjson", "html", "err200", "gzipbomb"}
_TUNING = re.compile(r"([tndb])(\d+)")


@dataclass(frozen=True, slots=True)
class Steering:
    """Times are seconds. `words` maps each fault word to its argument, `""` for a word that takes none."""

    before: float
    gap: float
    chunks: int | None = None
    chunk_bytes: int | None = None
    words: tuple[tuple[str, str], ...] = ()

    def __contains__(self, word: str) -> bool:
        return any(word == known for known, _ in self.words)

    def argument(self, word: str) -> str:
        return next((argument for known, argument in self.words if known == word), "")

    def number(self, word: str, default: int) -> int:
        argument = self.argument(word)
        return int(argument) if argument.isdecimal() else default

    def first(self, among: frozenset[str]) -> str:
        return next((word for word, _ in self.words if word in among), "")


def is_simulated(model: str) -> bool:
    return model.rsplit("/", 1)[-1].startswith("sim")


def steering_of(model: str, *, latency: float, chunk_delay: float) -> Steering:
    """Unknown words are names: `sim-alice` answers as `sim` does."""
    if not is_simulated(model):
        return Steering(latency, chunk_delay)
    tuning: dict[str, int] = {}
    words: list[tuple[str, str]] = []
    parts = iter(model.rsplit("/", 1)[-1].split(":", 1)[0].split("-")[1:])
    for part in parts:
        match = _TUNING.fullmatch(part)
        if match:
            tuning[match[1]] = int(match[2])
        elif part in NUMBERED:
            words.append((part, next(parts, "")))
        elif part in PLAIN:
            words.append((part, ""))
    return Steering(
        before=tuning["t"] / 1000 if "t" in tuning else latency,
        gap=tuning["d"] / 1000 if "d" in tuning else chunk_delay,
        chunks=tuning.get("n"),
        chunk_bytes=tuning.get("b"),
        words=tuple(words),
    )


def retry_after(steering: Steering, *, default: str, http_date: Callable[[], str]) -> str | None:
    """The value of Retry-After, None for none: seconds, a date a minute ahead, absurd or negative."""
    argument = steering.argument("retry")
    special = {"": default, "none": None, "huge": "99999999999", "negative": "-30"}
    if argument == "date":
        return http_date()
    return special.get(argument, argument)
