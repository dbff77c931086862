"""The connections to one upstream: kept while idle, counted, handed out in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

from gateway.errors import Cause, UpstreamError
from gateway.transport.connection import Connection

if TYPE_CHECKING:
    from gateway.transport.dial import Dialer

IDLE_SECONDS = 50.0  # common load balancers close after 60
CLOSING_SECONDS = 1.0


class Pool:
    """Hands out connections that nobody uses."""

    __slots__ = ("_all", "_closed", "_dialer", "_empty", "_idle", "_limit", "_slots", "_timer", "_turns", "max_reply")

    def __init__(self, dialer: Dialer, limit: int, max_reply: int) -> None:
        """`limit`: most connections, 0 = any number."""
        self.max_reply = max_reply
        self._dialer = dialer
        self._limit = limit
        self._slots = 0  # connections, those being opened, and those promised to whose turn it is
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []  # the last used is used next: those that are not needed expire
        self._turns: deque[asyncio.Future[Connection | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._empty: asyncio.Future[None] | None = None

    def take(self) -> Connection | None:
        """One that is kept, if it is still good."""
        while self._idle:
            connection = self._idle.pop()
            connection.idle = False
            if connection.usable and asyncio.get_running_loop().time() < connection.expires:
                return connection
            connection.drop()
        return None

    async def open(self, *, fresh: bool = False) -> Connection:
        """A new one, or, where there may be no more, the first that is given back. `fresh`: a new one in any case.

        Raises UpstreamError.
        """
        first = fresh
        while True:
            if self._closed:
                raise UpstreamError(Cause.CONNECTION, "The connection to the upstream was closed.")
            if not self._limit or self._slots < self._limit:
                self._slots += 1
                break
            if fresh and self._idle:
                self._discard(self._idle[0])
            given = await self._turn(first=first)
            if given is None:
                break
            if fresh:
                given.drop()
            elif given.usable:
                return given
            first = True
        try:
            connection = await self._dialer.dial(lambda: Connection(self))
        except BaseException:
            self._vacate()
            raise
        self._admit(connection)
        return connection

    def proven(self, connection: Connection) -> None:
        """Its first reply is complete."""
        self._dialer.remember(connection)

    def release(self, connection: Connection) -> None:
        """Its reply is complete and it can be asked again."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        seconds = IDLE_SECONDS if connection.patience is None else min(IDLE_SECONDS, connection.patience - 1)
        if self._closed or seconds <= 0:
            connection.drop()
            return
        loop = asyncio.get_running_loop()
        connection.expires = loop.time() + seconds
        connection.idle = True
        self._idle.append(connection)
        if self._timer is None:
            self._timer = loop.call_later(seconds, self._sweep)

    def lost(self, connection: Connection) -> None:
        """It is closed."""
        if connection.idle:
            connection.idle = False
            self._idle.remove(connection)
        if connection not in self._all:
            return  # before it was ever used: whoever opens it counts it
        self._all.remove(connection)
        self._vacate()
        if self._empty is not None and not self._all and not self._empty.done():
            self._empty.set_result(None)

    async def close(self) -> None:
        """Close them all, those in use too."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._idle.clear()
        for connection in list(self._all):
            connection.idle = False
            connection.close()
        if self._all:
            self._empty = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await self._empty

    async def _turn(self, *, first: bool) -> Connection | None:
        """Wait for a connection, or for the right to open one (None)."""
        turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        if first:
            self._turns.appendleft(turn)
        else:
            self._turns.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                given = turn.result()
                if given is None:
                    self._vacate()
                elif given.usable:
                    self.release(given)
            else:
                with contextlib.suppress(ValueError):
                    self._turns.remove(turn)
            raise

    def _admit(self, connection: Connection) -> None:
        """It is new."""
        if connection.usable:
            self._all.add(connection)
        else:
            self._vacate()
        if self._closed:
            connection.drop()

    def _vacate(self) -> None:
        """A slot is free: whose turn it is gets it."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._slots -= 1

    def _discard(self, connection: Connection) -> None:
        self._idle.remove(connection)
        connection.idle = False
        connection.drop()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in [c for c in self._idle if c.expires <= now]:
            self._discard(connection)
        self._timer = None
        if self._idle:
            self._timer = loop.call_at(max(now + 0.5, min(c.expires for c in self._idle)), self._sweep)
