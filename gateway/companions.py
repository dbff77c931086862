"""Processes that are kept running beside a gateway: commands of plugins, such as `xenios worker`.

    xenios serve ── python -m gateway.begin gateway.companions   one for each plugin of the configuration that wants one

A plugin's class says which: `companion = staticmethod(config → arguments of an xenios command, or None)`. The command
begins once the gateway is ready, ends with it, however that ended (its standard input does), and is started again when
it ends by itself. It gets the configuration in force as text, and each later one (`headless.py`): what it works with is
what the gateway works with, whatever stands in the file by then.

A command that wants several processes of itself keeps them in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.logs import get_logger
from gateway.plugins import read_plugins
from gateway.processes import Waits, begun, lines, loaded_of, text_of
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.settings import Loaded

log = get_logger("gateway.companions")


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is told first. `alone`: it is one of several, and starts no others."""

    config: dict[str, Any]
    plugin: str
    arguments: list[str]
    alone: bool = False

    def loaded(self) -> Loaded:
        return loaded_of(self.config)


class Kept:
    """One process, started again whenever it ends, until it is to end."""

    def __init__(self, loaded: Loaded, plugin: str, arguments: Sequence[str], *, alone: bool = False) -> None:
        self.plugin = plugin
        self.arguments = list(arguments)
        self._loaded = loaded
        self._alone = alone
        self._process: asyncio.subprocess.Process | None = None
        self._ending = asyncio.Event()
        self._tasks = Tasks()
        self._kept = self._tasks.spawn(self._keep(), f"companion {plugin}")

    def follow(self, loaded: Loaded) -> None:
        """Another configuration is in force."""
        self._loaded = loaded
        self._send({"config": text_of(loaded)})

    def end(self) -> None:
        """In its own time."""
        self._ending.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def ended(self) -> None:
        await asyncio.wait([self._kept])

    async def _keep(self) -> None:
        waits = Waits()
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                process = await self._start()
            except OSError as error:  # no memory or no process is left: there may be again
                wait = waits.after(0.0)
                log.error(  # noqa: TRY400 - it says it all
                    "companion_not_started", plugin=self.plugin, error=str(error), again_in_seconds=wait
                )
            else:
                if self._ending.is_set():
                    self._signal(signal.SIGTERM)
                code = await process.wait()
                if self._ending.is_set():
                    return
                wait = waits.after(time.monotonic() - began)
                log.error("companion_ended", plugin=self.plugin, pid=process.pid, code=code, again_in_seconds=wait)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._ending.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        process = self._process = await begun("gateway.companions")
        self._send(
            {
                "config": text_of(self._loaded),
                "plugin": self.plugin,
                "arguments": self.arguments,
                "alone": self._alone,
            }
        )
        return process

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it has ended
                self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class Companions:
    """Those of one gateway."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}  # by plugin
        self._leaving: set[Kept] = set()
        self._loaded: Loaded | None = None
        self._stopping = False
        self._following = asyncio.Lock()
        self._tasks = Tasks()

    def follow(self, loaded: Loaded) -> None:
        """Keep running what this configuration, which is in force, wants; does nothing if it is known already."""
        if not self._stopping and self._loaded is not loaded:
            self._loaded = loaded
            self._tasks.spawn(self._follow(loaded), "companions")

    async def _follow(self, loaded: Loaded) -> None:
        async with self._following:
            wanted = await asyncio.to_thread(_wanted, loaded)  # requests are answered meanwhile
            if not self._stopping:
                self._keep(loaded, wanted)

    def _keep(self, loaded: Loaded, wanted: Mapping[str, list[str]]) -> None:
        for plugin, kept in list(self._kept.items()):
            if wanted.get(plugin) == kept.arguments:
                kept.follow(loaded)
            else:
                kept.end()
                self._leaving.add(self._kept.pop(plugin))
                self._tasks.spawn(self._forget(kept), "a companion that ends")
        for plugin, arguments in wanted.items():
            if plugin not in self._kept:
                self._kept[plugin] = Kept(loaded, plugin, arguments)

    async def _forget(self, kept: Kept) -> None:
        await kept.ended()
        self._leaving.discard(kept)

    def stop(self) -> None:
        """All of them begin to end."""
        self._stopping = True
        for kept in self._kept.values():
            kept.end()

    def kill(self) -> None:
        """At once; for the second signal."""
        for kept in (*self._kept.values(), *self._leaving):
            kept.kill()

    async def ended(self) -> None:
        """They have."""
        self.stop()
        for kept in (*self._leaving, *self._kept.values()):
            await kept.ended()
        await self._tasks.drain(0)


def _wanted(loaded: Loaded) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for blueprint in read_plugins(loaded.settings, loaded.source):
        wants: Callable[[Any], Sequence[str] | None] | None = getattr(blueprint.cls, "companion", None)
        arguments = wants(blueprint.config) if wants is not None else None
        if arguments:
            found[blueprint.id] = list(arguments)
    return found


async def keep_several(
    loaded: Loaded, plugin: str, arguments: Sequence[str], processes: int, read: Callable[[], Loaded], *, ordered: bool
) -> None:
    """A command's several processes, until TERM or INT; `read` and `ordered` as for `headless.main`."""
    from gateway.cli import on_hangup, stop_signals  # noqa: PLC0415 - it imports this
    from gateway.notices import Notices  # noqa: PLC0415 - as below
    from gateway.reload import Reloader  # noqa: PLC0415 - a gateway's parent does without

    notices = Notices()
    kept = [Kept(loaded, plugin, arguments, alone=True) for _ in range(processes)]

    async def follow(new: Loaded) -> None:
        for one in kept:
            one.follow(new)

    async def listen() -> None:
        try:
            async for message in lines(sys.stdin):
                await follow(await asyncio.to_thread(loaded_of, message["config"]))
        finally:
            stop.set()

    def kill() -> None:
        for one in kept:
            one.kill()

    stop = stop_signals(kill)
    reloader = Reloader(loaded, read, follow, lambda: "")
    tasks = Tasks()
    async with contextlib.AsyncExitStack() as stack:
        if ordered:
            tasks.spawn(listen(), "listen to the parent")
        else:
            on_hangup(reloader.ask, stop.set)
            await stack.enter_async_context(reloader.listening())
        await notices.until(stop, f"{processes} processes")
        notices.stopping()
        for one in kept:
            one.end()
        for one in kept:
            await one.ended()
    await tasks.drain(0)


def main() -> None:
    """A kept process: told on standard input what to do."""
    # not through a buffer: what comes after this line is read by the event loop
    order = Order(**json.loads(io.FileIO(0, closefd=False).readline()))
    from gateway.cli import main_as_told  # noqa: PLC0415 - it imports this

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # its configuration comes from its parent
    main_as_told(order)
