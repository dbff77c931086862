"""One reply: what of it has arrived waits here, or goes on to whoever wants it pushed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from multidict import CIMultiDict, CIMultiDictProxy

from gateway.errors import UpstreamError
from gateway.transport.inflate import Inflater, inflater
from gateway.upstream import read_chunks, too_large

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.transport.connection import Connection

WAITING = 1 << 17  # so many bytes of a reply wait for their reader; then the socket is not read
_NONE: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())


class Reply:
    """`UpstreamResponse` of the lean transport; its connection fills it."""

    __slots__ = (
        "_ended", "_inflate", "_limit", "_receive", "_waiter", "complete", "connection", "error", "headers", "parts",
        "size", "stale", "status",
    )  # fmt: skip

    def __init__(self, connection: Connection, inflate_limit: int) -> None:
        # Until the body has ended; then the connection may be another reply's.
        self.connection: Connection | None = connection
        self.status = 0  # until the head has arrived
        self.headers = _NONE
        self.parts: list[bytes] = []
        self.size = 0
        self.complete = False
        self.error: UpstreamError | None = None
        self.stale = False  # the kept connection had ended before it was asked
        self._limit = inflate_limit
        self._inflate: Inflater | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._receive: Callable[[bytes], None] | None = None
        self._ended: Callable[[UpstreamError | None], None] | None = None

    # --- for the connection --------------------------------------------------------------------------------------

    def begin(self, status: int, headers: CIMultiDict[str], encoding: str | None) -> None:
        """The head has arrived. Raises UpstreamError if its body can't be understood."""
        self.headers = CIMultiDictProxy(headers)
        if encoding is not None:
            self._inflate = inflater(encoding, self._limit)
        self.status = status

    def fail(self, error: UpstreamError) -> None:
        self.connection = None
        self.error = error

    def finish(self) -> None:
        self.connection = None
        self.complete = True

    def arrived(self, piece: bytes = b"") -> None:
        """Some of the body has, its end, or what came instead: whoever waits goes on."""
        if self._receive is not None:
            if piece:
                self._receive(piece)
            if self.connection is None:
                self._tell_end()
            return
        if piece:
            self.parts.append(piece)
            self.size += len(piece)
            if self.size > WAITING:
                self.pause()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def more(self) -> asyncio.Future[None]:
        """What is to be waited for: that something arrives, the head, more of the body, or what stands in its way."""
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        return waiter

    # --- for the gateway -----------------------------------------------------------------------------------------

    async def chunk(self) -> bytes:
        while True:
            data = self._take()
            if data and self._inflate is not None:
                data = self._inflate.feed(data)
            if data:
                return data
            if self.error is not None:
                raise self.error
            if self.complete:
                if self._inflate is not None and (error := self._inflate.cut_off()) is not None:
                    raise error
                return b""
            await self.more()

    async def read(self, limit: int, heard: Callable[[bytes], None] | None = None) -> bytes:
        if self.complete and self._inflate is None:
            data = self._take()
            if len(data) <= limit:
                return data
            raise too_large(limit)
        return await read_chunks(self, limit, heard)

    def push(self, receive: Callable[[bytes], None], ended: Callable[[UpstreamError | None], None]) -> bool:
        self._receive = receive if self._inflate is None else self._inflated(self._inflate, receive)
        self._ended = ended
        self.resume()
        self.arrived(self._take())
        return True

    def pause(self) -> None:
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None:
            self.connection.resume()

    def close(self) -> None:
        self._receive = self._ended = None
        self.parts.clear()
        if self.connection is not None:
            self.connection.drop()

    # --- within --------------------------------------------------------------------------------------------------

    def _take(self) -> bytes:
        """All that has arrived, as one piece."""
        parts = self.parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self.size = 0
        if self.connection is not None and self._receive is None:
            self.connection.resume()
        return data

    def _inflated(self, inflater: Inflater, receive: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """The same of a compressed body."""

        def inflate(piece: bytes) -> None:
            try:
                data = inflater.feed(piece)
            except UpstreamError as broken:
                self.error = broken
                if self.connection is not None:
                    self.connection.drop()
                return
            if data:
                receive(data)

        return inflate

    def _tell_end(self) -> None:
        error, ended = self.error, self._ended
        if error is None and self._inflate is not None:
            error = self._inflate.cut_off()
        self._receive = self._ended = None
        if ended is not None:
            ended(error)
