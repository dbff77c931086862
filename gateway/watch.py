"""One timer per exchange for everything that must not take too long.

The exchange says what it waits for and how long that may take; that costs two attribute writes, no timer. The one timer
looks at what is due, cancels the exchange's task if something is, and sets itself to the next moment that matters.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE = "deadline"
FIRST_EVENT = "first_event"
STALL = "stall"
WRITE = "write"
SHUTDOWN = "shutdown"

_FAR = float("inf")


class Watch:
    """Deadline, time limits, commit time and keep-alives of one exchange. Times are the loop's."""

    __slots__ = (
        "_armed",
        "_closed",
        "_deadline",
        "_due",
        "_handle",
        "_interval",
        "_loop",
        "_next_beat",
        "_on_beat",
        "_task",
        "_what",
        "expired",
    )

    def __init__(self, seconds: float, soonest: float | None = None) -> None:
        """`seconds` until the exchange's deadline; no limit shorter than `soonest` is to be expected.

        Belongs to the running task.
        """
        self._loop = loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        if task is None:  # pragma: no cover - a coroutine always runs in one
            raise RuntimeError("A Watch needs a running task.")
        self._task = task
        now = loop.time()
        self._deadline = now + seconds
        self._due = _FAR
        self._closed = False
        self._what: str | None = None
        self.expired: str | None = None
        self._on_beat: Callable[[], None] | None = None
        self._interval = 0.0
        self._next_beat = _FAR
        # Armed a little early: the limits that come later are then due after it, and need no timer of their own.
        self._armed = self._deadline if soonest is None else now + min(seconds, soonest)
        self._handle: asyncio.TimerHandle | None = loop.call_at(self._armed, self._fire)

    def wait(self, what: str, seconds: float | None) -> None:
        """From now on the exchange waits for `what`, at most `seconds`."""
        self._what = what
        if seconds is None:
            self._due = _FAR
            return
        self._due = self._loop.time() + seconds
        if self._due < self._armed:
            self._arm(self._due)

    def rest(self) -> None:
        """It waits for nothing that has a limit of its own."""
        self._due = _FAR
        self._what = None

    def beat(self, first: float, interval: float, call: Callable[[], None]) -> None:
        """Call after `first` seconds of silence and then after each `interval`; `touch` restarts the silence."""
        self._on_beat, self._interval = call, interval
        self._next_beat = self._loop.time() + first
        if self._next_beat < self._armed:
            self._arm(self._next_beat)

    def touch(self) -> None:
        """Something was sent: the silence starts anew."""
        self._next_beat = self._loop.time() + self._interval

    @property
    def waiting_for(self) -> str | None:
        return self._what

    def expire(self, reason: str) -> None:
        """End the exchange for this reason: its task is cancelled, `take` then tells why."""
        if self.expired is None:
            self.expired = reason
            self._task.cancel()

    def take(self, only: str | None = None) -> str | None:
        """In `except CancelledError`: the reason if the cancellation was ours alone, else None (the client left).

        With `only`, another reason is left for the caller outside.
        """
        if self.expired is None or (only is not None and self.expired != only):
            return None
        reason, self.expired = self.expired, None
        return reason if self._task.uncancel() == 0 else None

    def close(self) -> None:
        self._closed = True
        self._on_beat = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self, when: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._armed = when
        if when < _FAR and not self._closed:
            self._handle = self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        now = self._loop.time()
        if now >= self._deadline:
            self._deadline = _FAR
            self.expire(DEADLINE)
        elif now >= self._due:
            what, self._due = self._what, _FAR
            self.expire(what or DEADLINE)
        if now >= self._next_beat and self._on_beat is not None:
            self._next_beat = now + self._interval
            self._on_beat()
        self._arm(min(self._deadline, self._due, self._next_beat))
