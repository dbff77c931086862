"""A stream from the upstream's socket to the client's: within the callback that read it, with no task in between."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway import logs, watch

if TYPE_CHECKING:
    from gateway.client import DirectClient
    from gateway.errors import UpstreamError
    from gateway.streaming import ReplyStream
    from gateway.watch import Watch

AFTERWARDS = 1.0  # seconds that an upstream has to end its body after the whole answer


class Relay:
    """The task of the exchange sleeps meanwhile, until the stream has ended, failed, or is to be given up."""

    __slots__ = ("_client", "_ending", "_error", "_feed", "_over", "_patience", "_slow", "_stall", "_stream", "_watch")

    def __init__(
        self,
        stream: ReplyStream,
        client: DirectClient,
        guard: Watch,
        *,
        stall: float | None,
        patience: float | None,
    ) -> None:
        """Seconds: how long the upstream may pause, and how long the client may leave what waits for it."""
        self._stream = stream
        self._feed = self._tapped if stream.tapped else stream.feed
        self._client = client
        self._watch = guard
        self._stall = stall
        self._patience = patience
        self._over = asyncio.get_running_loop().create_future()
        self._error: BaseException | None = None
        self._slow = False  # the client; the upstream is not read
        self._ending = False

    async def run(self) -> bool:
        """To the clean end. False if this upstream pushes nothing. Raises GatewayError or ClientGone."""
        self._client.when_room(self._room)
        try:
            if not self._client.put(self._stream.held()):
                self._wait()
            if self._stream.finished or self._stream.failed is not None:
                self._end(self._stream.failed)
            elif not self._pushed():
                return False
            await self._over
        finally:
            self._client.when_room(None)
        if self._error is not None:
            raise self._error
        return True

    def _pushed(self) -> bool:
        if not self._slow:
            self._watch.flows(AFTERWARDS if self._stream.answered else self._stall, sent=True)
        return self._stream.response.push(self._receive, self._ended)

    def _receive(self, chunk: bytes) -> None:
        stream = self._stream
        if self._over.done() or self._ending:
            return
        try:
            block = self._feed(chunk)
            if block and not self._client.put(block):
                self._wait()
        except Exception as error:  # noqa: BLE001 - raised in the exchange's task: this is the upstream's callback
            self._end(error)
            return
        if stream.finished or stream.failed is not None:
            self._end(stream.failed)
        elif not self._slow:
            if block and not stream.answered:
                self._watch.flowing = True
            else:
                self._watch.flows(AFTERWARDS if stream.answered else self._stall, sent=bool(block))

    def _tapped(self, chunk: bytes) -> bytes:
        """What taps log belongs to this request: the callback to none, or to another that had the connection before."""
        before = logs.handling.get()
        logs.handling.set(self._watch)
        try:
            return self._stream.feed(chunk)
        finally:
            logs.handling.set(before)

    def _ended(self, error: UpstreamError | None) -> None:
        if self._over.done() or self._ending:
            return
        try:
            block = self._stream.end(error)
            if block and not self._client.put(block):
                self._wait()
        except Exception as wrong:  # noqa: BLE001 - as above
            self._end(wrong)
        else:
            self._end(self._stream.failed)

    def _wait(self) -> None:
        if not self._slow:
            self._slow = True
            self._stream.response.pause()
            self._watch.wait(watch.WRITE, self._patience)

    def _room(self) -> None:
        """The client has taken what waited."""
        if not self._slow or self._over.done():
            return
        self._slow = False
        if self._ending:
            self._over.set_result(None)
            return
        self._watch.flows(AFTERWARDS if self._stream.answered else self._stall, sent=True)
        self._stream.response.resume()

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        if error is None and self._slow:
            self._ending = True  # when there is room
        elif not self._over.done():
            self._over.set_result(None)
