"""Circuit breakers: a target that fails too often is left alone for a while, then tried again by one request at a time.

A breaker is *closed* while all is well, *open* once too large a share of the last seconds' attempts failed. When
`open_for` is over it is *half-open*: one attempt is let through as a probe, one more after each further `open_for`, and
the first that is good closes it. A target that says itself when to come back (429 with Retry-After) *rests* until then.
Times are seconds of one clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BreakerState = Literal["closed", "open", "half_open", "resting"]
Change = Literal["opened", "probed", "probe_failed", "closed", "rests"]

MOST = 1000  # targets that are watched: clients can invent names
_SLICES = 10  # of the window: how finely it rolls


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long."""

    window: float = 30.0  # seconds that are looked at
    failures: float = 0.5  # share of failed attempts in it that opens
    requests: int = 10  # attempts in it before it may open
    open_for: float = 15.0  # seconds to the first probe, and from one to the next


class Breaker:
    """One target's."""

    __slots__ = (
        "_changed",
        "_failed",
        "_passed",
        "_policy",
        "_slice",
        "cause",
        "first_probe_at",
        "name",
        "next_probe",
        "opened",
        "opened_at",
        "probed_at",
        "resting_until",
    )

    def __init__(self, name: str, policy: BreakerPolicy, changed: Callable[[Breaker, Change], None]) -> None:
        """`changed` is called after each change that others should hear of."""
        self.name = name
        self._policy = policy
        self._changed = changed
        self._passed = [0] * _SLICES
        self._failed = [0] * _SLICES
        self._slice = 0
        self.opened = 0  # times so far
        self.opened_at: float | None = None  # None: closed
        self.next_probe = 0.0
        self.probed_at: float | None = None  # when the probe that is under way was let through
        # Since it opened. Every attempt that began later is a probe too, however long its answer takes.
        self.first_probe_at: float | None = None
        self.resting_until = 0.0
        self.cause: str | None = None  # of the last failure

    def state(self, now: float) -> BreakerState:
        if self.opened_at is not None:
            return "half_open" if self.probed_at is not None or now >= self.next_probe else "open"
        return "resting" if now < self.resting_until else "closed"

    def wait(self, now: float) -> float:
        """Seconds until an attempt may begin; 0: now."""
        due = self.resting_until if self.opened_at is None else max(self.next_probe, self.resting_until)
        return max(0.0, due - now)

    def allow(self, now: float) -> bool:
        """May an attempt begin now? Where that is the probe that was due, it counts as taken."""
        if self.opened_at is None:
            return now >= self.resting_until
        if self.wait(now) > 0:
            return False
        self.probed_at = now
        if self.first_probe_at is None:
            self.first_probe_at = now
        self.next_probe = now + self._policy.open_for
        self._changed(self, "probed")
        return True

    # --- what became of attempts; `began` tells a probe from those that were under way when it opened -----------------

    def succeeded(self, now: float, began: float) -> None:
        if self.opened_at is None:
            self._roll(now)
            self._passed[self._slice % _SLICES] += 1
        elif self._was_probe(began):
            self.close()
            self._changed(self, "closed")

    def failed(self, now: float, began: float, cause: str) -> None:
        """In a way that the target is to blame for."""
        self.cause = cause
        if self.opened_at is None:
            passed, failed = self.counts(now)
            self._failed[self._slice % _SLICES] += 1
            failed += 1
            if passed + failed >= self._policy.requests and failed >= self._policy.failures * (passed + failed):
                self.opened += 1
                self.open(now, now + self._policy.open_for)
                self._changed(self, "opened")
        elif self._was_probe(began):
            self.probed_at = None
            self.next_probe = now + self._policy.open_for
            self._changed(self, "probe_failed")

    def told_nothing(self, now: float, began: float) -> None:
        """It ended without a word on the target: if it was the probe, another may go at once."""
        if self.opened_at is not None and self._was_probe(began):
            self.probed_at = None
            self.next_probe = now

    def rest(self, until: float, cause: str) -> None:
        self.cause = cause
        if until > self.resting_until:
            self.resting_until = until
            self._changed(self, "rests")

    def open(self, at: float, next_probe: float) -> None:
        self.opened_at, self.next_probe = at, next_probe
        self.probed_at = self.first_probe_at = None

    def close(self) -> None:
        """What was counted before it opened is forgotten."""
        self.opened_at = self.probed_at = self.first_probe_at = None
        self._passed, self._failed = [0] * _SLICES, [0] * _SLICES

    def counts(self, now: float) -> tuple[int, int]:
        """(good, failed) attempts of the window."""
        self._roll(now)
        return sum(self._passed), sum(self._failed)

    def _was_probe(self, began: float) -> bool:
        return self.first_probe_at is not None and began >= self.first_probe_at

    def _roll(self, now: float) -> None:
        """Empty the slices that have passed since the last look."""
        current = int(now * _SLICES / self._policy.window)
        if current > self._slice:
            for passed in range(max(self._slice, current - _SLICES) + 1, current + 1):
                self._passed[passed % _SLICES] = self._failed[passed % _SLICES] = 0
            self._slice = current


class Breakers:
    """The breakers of all targets that were tried, by name; `MOST` at most."""

    def __init__(self, policy: BreakerPolicy, changed: Callable[[Breaker, Change], None] = lambda *_: None) -> None:
        self.policy = policy
        self._changed = changed
        self._all: dict[str, Breaker] = {}
        self.find: Callable[[str], Breaker | None] = self._all.get
        self._full_until = 0.0

    def of(self, name: str, now: float) -> Breaker | None:
        """Made when it is needed; None while there are too many already."""
        found = self._all.get(name)
        if found is None and (len(self._all) < MOST or self._forget(now)):
            found = self._all[name] = Breaker(name, self.policy, self._changed)
        return found

    def __iter__(self) -> Iterator[Breaker]:
        return iter(tuple(self._all.values()))

    def _forget(self, now: float) -> bool:
        """Those that have nothing to tell: closed, and no failure in the window. A look at all, now and then."""
        if now < self._full_until:
            return False
        for name in [b.name for b in self if b.state(now) == "closed" and b.counts(now)[1] == 0]:
            del self._all[name]
        full = len(self._all) >= MOST
        if full:
            self._full_until = now + self.policy.window / _SLICES
        return not full
