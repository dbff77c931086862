"""Runs `request_finished` off the client's path, in a few tasks that stay: a task for each request would cost more."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from gateway.dispatch import run_finished
from gateway.logs import handling
from gateway.watch import Watch

if TYPE_CHECKING:
    from gateway.dispatch import Impls
    from gateway.exchange import Exchange
    from gateway.tasks import Tasks

KEPT = 16  # tasks that wait for more to do


class Finisher:
    """What is put goes to a waiting task once per turn of the loop; a hook that takes long holds no other up."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._queue: deque[tuple[Exchange, Impls]] = deque()
        self._waiting: list[asyncio.Future[None]] = []
        self._called = False
        self._draining = False

    def put(self, exchange: Exchange, impls: Impls) -> None:
        exchange.snapshot.users.enter()
        self._queue.append((exchange, impls))
        if not self._called:
            self._call()

    def drain(self) -> None:
        """Tasks that wait end now, the others after what they have begun: `Tasks.drain` awaits them."""
        self._draining = True
        while self._waiting:
            self._waiting.pop().set_result(None)

    def _call(self) -> None:
        self._called = True
        asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._called = False
        if not self._queue:
            return
        if self._waiting:
            self._waiting.pop().set_result(None)
        else:
            self._tasks.spawn(self._work(), "request_finished")

    async def _work(self) -> None:
        loop, queue, watch = asyncio.get_running_loop(), self._queue, Watch()
        handling.set(watch)
        try:
            while True:
                while queue:
                    if len(queue) > 1 and not self._called:
                        self._call()  # should this one wait, another task goes on with the rest
                    exchange, impls = queue.popleft()
                    watch.exchange = exchange
                    try:
                        await run_finished(exchange, impls, watch)
                    finally:
                        watch.exchange = None
                        exchange.snapshot.users.leave()
                    del exchange, impls  # not kept until the next one comes
                if self._draining or len(self._waiting) >= KEPT:
                    return
                turn = loop.create_future()
                self._waiting.append(turn)
                watch.rest()
                await turn
        finally:
            watch.close()
