"""Everything about an exchange that must not take too long, without a timer for each exchange.

The exchange says what it waits for and how long that may take: two attribute writes. One wheel per event loop
looks at all exchanges every `TICK` and cancels the task of one over its limit. It also sees which plugins' hooks have
been running for long.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from gateway.timing import SlowCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.exchange import Exchange

DEADLINE = "deadline"
FIRST_EVENT = "first_event"
STALL = "stall"
TOTAL = "total"
WRITE = "write"
SHUTDOWN = "shutdown"
ATTEMPT = (FIRST_EVENT, STALL, TOTAL)  # what ends one attempt, not the exchange

TICK = 0.1  # seconds: how late a limit may be noticed
_FAR = float("inf")


class Watch:
    """Deadline, time limits, commit time and keep-alives of one exchange. Times are the loop's."""

    __slots__ = (
        "_deadline",
        "_due",
        "_interval",
        "_loop",
        "_next_beat",
        "_on_beat",
        "_since",
        "_stall",
        "_task",
        "_total",
        "_what",
        "_wheel",
        "exchange",
        "expired",
        "flowing",
        "seen",
    )

    def __init__(self, seconds: float = _FAR, exchange: Exchange | None = None) -> None:
        """`seconds` until the deadline of all. Belongs to the running task; `close` it."""
        self.exchange = exchange  # whose hooks run in this task
        self.seen: tuple[str, str] | None = None  # the hook that ran in it when the wheel came by
        self._loop = loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        if task is None:  # pragma: no cover - a coroutine always runs in one
            raise RuntimeError("A Watch needs a running task.")
        self._task = task
        self._deadline = loop.time() + seconds
        self._due = self._total = self._next_beat = self._stall = _FAR
        # One more piece of a stream went to the client: stall and silence begin anew when the wheel comes by.
        self.flowing = False
        self._what: str | None = None
        self.expired: str | None = None
        self._on_beat: Callable[[], None] | None = None
        self._interval = 0.0
        self._wheel = _latest.wheel if _latest.loop is loop else _new_wheel(loop)
        self._wheel.add(self)

    def wait(self, what: str, seconds: float | None) -> None:
        """From now on the exchange waits for `what`, at most `seconds`."""
        self._what = what
        self._due = _FAR if seconds is None else self._loop.time() + seconds
        self.flowing = False

    def attempt(self, seconds: float | None) -> None:
        """From now on an attempt has so long for all of it; None: no limit of its own."""
        self._total = _FAR if seconds is None else self._loop.time() + seconds

    def shorten(self, seconds: float) -> None:
        """The deadline of all is so far away at most."""
        self._deadline = min(self._deadline, self._loop.time() + seconds)

    def extend(self, seconds: float = _FAR) -> None:
        """The deadline of all is so far away from now; without `seconds` there is none any more."""
        self._deadline = self._loop.time() + seconds

    def rest(self) -> None:
        """It waits for nothing that has a limit of its own."""
        self._due = _FAR
        self._what = None
        self.flowing = False

    def beat(self, first: float, interval: float, call: Callable[[], None]) -> None:
        """Call after `first` seconds of silence and then after each `interval`; `touch` restarts the silence."""
        self._on_beat, self._interval = call, interval
        self._next_beat = self._loop.time() + first

    def flows(self, seconds: float | None, *, sent: bool) -> None:
        """A stream's next piece may take so long; `sent`: one went to the client just now."""
        self._what = STALL
        self._stall = _FAR if seconds is None else seconds
        self._flow(self._loop.time(), sent=sent)

    def _flow(self, now: float, *, sent: bool) -> None:
        self.flowing = False
        self._due = now + self._stall
        if sent:
            self._next_beat = now + self._interval

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

    def take(self, *only: str) -> str | None:
        """In `except CancelledError`: the reason if the cancellation was ours alone, else None (the client left).

        With `only`, other reasons are left for the caller outside.
        """
        if self.expired is None or (only and self.expired not in only):
            return None
        reason, self.expired = self.expired, None
        return reason if self._task.uncancel() == 0 else None

    def close(self) -> None:
        self._wheel.remove(self)
        self._on_beat = None

    def look(self, running: tuple[str, str] | None, now: float, slow: SlowCalls) -> None:
        """This hook runs: since when, as far as one can see from turn to turn."""
        if running is not self.seen:
            self.seen, self._since = running, now
        elif running is not None and self.exchange is not None and slow.seen(self.exchange, running, self._since, now):
            self._since = _FAR  # said once

    def runs(self, task: asyncio.Task[Any] | None) -> tuple[str, str] | None:
        """The hook that this task is in, if it is the one that is watched."""
        return self.exchange.running if self._task is task and self.exchange is not None else None

    def is_due(self, now: float) -> bool:
        if self.flowing:
            self._flow(now, sent=True)
        return now >= self._due or now >= self._next_beat or now >= self._total or now >= self._deadline

    def fire(self, now: float) -> None:
        if now >= self._deadline:
            self._deadline = _FAR
            self.expire(DEADLINE)
        elif now >= self._due:
            self._due = _FAR
            self.expire(self._what or DEADLINE)
        elif now >= self._total and self._what != WRITE:  # a client that reads slowly is no fault of the upstream's
            self._total = _FAR
            self.expire(TOTAL)
        if now >= self._next_beat and self._on_beat is not None:
            self._next_beat = now + self._interval
            self._on_beat()


class _Wheel:
    """Turns while there is somebody to watch."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: set[Watch] = set()
        self._turning = False
        self._slow = SlowCalls()

    def add(self, watch: Watch) -> None:
        self._watches.add(watch)
        if not self._turning:
            self._turning = True
            self._loop.call_later(TICK, self._turn)

    def remove(self, watch: Watch) -> None:
        self._watches.discard(watch)

    def running(self) -> tuple[str, str] | None:
        """The hook whose code holds the loop at this moment. Asked from another thread, of a loop that stands still."""
        task = asyncio.current_task(self._loop)
        return next((where for watch in list(self._watches) if (where := watch.runs(task)) is not None), None)

    def _turn(self) -> None:
        now = self._loop.time()
        for watch in self._watches:
            running = None if watch.exchange is None else watch.exchange.running
            if running is not watch.seen or running is not None:  # thousands are streams, in which no hook runs
                watch.look(running, now, self._slow)
        for watch in [w for w in self._watches if w.is_due(now)]:
            watch.fire(now)
        self._turning = bool(self._watches)
        if self._turning:
            self._loop.call_later(TICK, self._turn)


def running(loop: asyncio.AbstractEventLoop) -> tuple[str, str] | None:
    """(plugin, hook) of an async hook that holds the loop up. May be asked from another thread."""
    wheel = _wheels.get(loop)
    return wheel.running() if wheel is not None else None


_wheels: WeakKeyDictionary[asyncio.AbstractEventLoop, _Wheel] = WeakKeyDictionary()


class _Latest:
    """The wheel that was asked for last: a process has one loop, and a weak dictionary costs as much as a watch."""

    loop: asyncio.AbstractEventLoop | None = None
    wheel: _Wheel


_latest = _Latest()


def _new_wheel(loop: asyncio.AbstractEventLoop) -> _Wheel:
    wheel = _wheels.get(loop)
    if wheel is None:
        wheel = _wheels[loop] = _Wheel(loop)
    _latest.loop, _latest.wheel = loop, wheel
    return wheel
