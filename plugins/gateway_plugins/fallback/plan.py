"""Which target a request tries next, and how long it waits before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway import Attempt, Cause, Target, UpstreamError


@dataclass(frozen=True, slots=True)
class Policy:
    """Of all requests."""

    attempts: int  # at most, the first included
    retries: Mapping[Cause, int]  # further tries of a target after this cause
    backoff: float  # seconds
    max_wait: float
    dice: Callable[[], float]  # from 0 to 1


@dataclass(slots=True)
class Entry:
    """One target in a request's list. `attempt`: what a layer outside made for it, if one did."""

    target: Target
    attempt: Attempt | None = None
    tries: int = 0
    ready_at: float | None = None  # when it may be tried again; None: not at all


class Step(NamedTuple):
    entry: Entry
    wait: float = 0.0


@dataclass(slots=True)
class Plan:
    """Another target is tried at once; only when none is left, one that failed is tried again, after a wait.

    A wait grows from failure to failure and is drawn at random up to its length (full jitter), or is what the upstream
    asked for and a little more. It takes half of the time that is left at most: the other half is for the attempt.
    """

    policy: Policy
    entries: Sequence[Entry]
    closed_for: Callable[[Target, float], float]  # seconds until a target's circuit lets an attempt begin
    skip: Callable[[Target], None]  # told once of each target that is passed over
    tried: int = 0
    _skipped: set[int] = field(default_factory=set)

    def failed(self, entry: Entry, error: UpstreamError | None, cause: Cause, now: float) -> None:
        """`error`: None if there was an answer, but no good one."""
        self.tried += 1
        entry.tries += 1
        entry.ready_at = None
        if entry.tries > self.policy.retries.get(cause, 0):
            return
        asked = error.retry_after if error is not None else None
        if asked is None:
            longest = min(self.policy.max_wait, self.policy.backoff * 2 ** min(entry.tries - 1, 30))
            entry.ready_at = now + longest * self.policy.dice()
        elif asked <= self.policy.max_wait:
            entry.ready_at = now + asked * (1 + 0.1 * self.policy.dice())

    def next(self, now: float, deadline: float) -> Step | None:
        """None: nothing is left to try."""
        if self.tried >= self.policy.attempts:
            return None
        for index, entry in enumerate(self.entries):
            if entry.tries:
                continue
            if self.closed_for(entry.target, now) <= 0:
                return Step(entry)
            if index not in self._skipped:
                self._skipped.add(index)
                self.skip(entry.target)
        again = [
            Step(entry, max(0.0, entry.ready_at - now, self.closed_for(entry.target, now)))
            for entry in self.entries
            if entry.ready_at is not None
        ]
        soonest = min(again, key=lambda step: step.wait, default=None)
        if soonest is None or soonest.wait > min(1.1 * self.policy.max_wait, (deadline - now) / 2):
            return None
        return soonest
