"""One loop with an upstream that writes what the corpus says, and a client of each kind in front of it."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

from tests.transport.client import Loop, ask, by_read, connected
from tests.transport.corpus import WAITS, Meaning, Whole, sized
from tests.transport.server import Peer, Server, serving, turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.upstream import Transport

Way = "Callable[[UpstreamResponse], Coroutine[Any, Any, bytes]]"


class Stage:
    """`play` one reply after the other; each time the next request must get its own answer."""

    def __init__(self, kind: str, make: Callable[..., Transport]) -> None:
        self._loop = Loop(kind)
        self._make = make
        self._stack = AsyncExitStack()
        self._plays: dict[str, tuple[Sequence[bytes], str, asyncio.Event]] = {}
        self._numbers = itertools.count()
        self.server: Server

    def __enter__(self) -> Self:
        self._loop.__enter__()
        self.server = self._loop.run(self._stack.enter_async_context(serving(self._serve)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.run(self._stack.aclose())
        self._loop.__exit__(*exc)

    def play(self, pieces: Sequence[bytes], end: str = "open", way: Way = by_read) -> tuple[Meaning, bool]:
        """What a client makes of these bytes, and whether it used the connection again.

        After it the client's next request must get its own answer, and its transport must hold no connection once it is
        closed. Raises AssertionError, TimeoutError.
        """
        return self._loop.run(self._play(pieces, end, way))

    async def _play(self, pieces: Sequence[bytes], end: str, way: Way) -> tuple[Meaning, bool]:
        number = next(self._numbers)
        self._plays[path := f"/play/{number}"] = pieces, end, asyncio.Event()
        self.server.peers.clear()
        async with connected(self.server.url, self._make) as made:
            meaning = await self._first(made, path, way)
            own = await ask(made, f"/own/{number}")
            assert own == Whole(200, f"/own/{number}".encode(), own.headers if isinstance(own, Whole) else {}), own
            assert self.server.open <= 1, "the connection was neither closed nor used again"
        await self.server.all_closed()
        asked = [request.path for request in self.server.requests]
        assert asked.count(f"/own/{number}") == 1
        assert asked.count(path) == 1
        return meaning, len(self.server.peers) == 1

    async def _first(self, made: Transport, path: str, way: Way) -> Meaning:
        """What comes of it; `waits` if all was written and read, and it wants more."""
        task = asyncio.ensure_future(ask(made, path, way))  # noqa: TID251
        try:
            await self._plays[path][2].wait()
            for _ in range(200):
                await turns(1)  # what stands behind the reply is there before the next request
                if task.done():
                    break
            if task.done() or self._plays[path][1] != "open":
                return await task
            return WAITS
        finally:
            task.cancel()
            await asyncio.wait({task})
            await turns()

    async def _serve(self, peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            play = self._plays.get(request.path)
            if play is None:
                await peer.write(sized(request.path.encode()))
                continue
            pieces, end, written = play
            try:
                await peer.write(*pieces)
                if end == "eof":
                    peer.eof()
                elif end == "reset":
                    await turns()
                    peer.reset()
                await turns()
            finally:
                written.set()
