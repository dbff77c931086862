"""A gateway without its server, in which a plugin's command works: `xenios worker` for one.

`self.headless(run)` in a command of `register_commands` opens what a worker that serves has (plugins, upstreams,
stores, metrics) and awaits `run(plugin, stop)`: the plugin is the command's own, started; `stop` is set when it is to
end. TERM and INT ask for that, a second one ends the process at once. A reload (SIGHUP) puts another configuration in
force under it; only if that makes another plugin of it, `run` is asked to stop, and called once more with the new one.

It shares the data directory with a gateway of the same host, without its lock. One that `xenios serve` keeps beside
itself (`companions.py`), or one of several, has its configuration from its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from gateway import logs
from gateway.errors import StartError
from gateway.metric_files import number_beside
from gateway.notices import Notices
from gateway.plugins import PluginStartError
from gateway.processes import lines, loaded_of
from gateway.reload import Reloader
from gateway.stores.embedded import url_of_running
from gateway.supervisor import DataDirError, identity_beside, make_data_dir
from gateway.tasks import Tasks
from gateway.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from gateway.plugins import Instance
    from gateway.settings import Loaded
    from gateway.snapshot import Snapshot

log = logs.get_logger("gateway.headless")

Run: TypeAlias = "Callable[[Any, asyncio.Event], Coroutine[Any, Any, None]]"

LOOK_SECONDS = 2.0  # how often one looks whether the gateway's Valkey is still the same


class _Lost(Exception):
    """It can't go on; whoever keeps it running starts it anew."""


def main(loaded: Loaded, plugin: str, run: Run, read: Callable[[], Loaded], *, ordered: bool) -> int:
    """The exit code. `plugin`: whose command; `read`: the configuration once more; `ordered`: by a parent, on standard
    input.
    """
    from gateway.cli import run_loop  # noqa: PLC0415 - it imports this

    logs.setup(loaded.settings.log)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        if loaded.settings.services.redis.get_secret_value() == "memory":
            raise StartError(  # noqa: TRY301 - as others
                "services.redis is memory, which only the gateway's own process sees: set it to embedded, or to an "
                "address such as redis://host:6379/0, that processes beside it share."
            )
        folder = make_data_dir(loaded.settings)
        with number_beside(folder / "metrics") as number:
            logs.bind_contextvars(worker=number)
            worker = Worker(loaded, identity_beside(folder, loaded.settings), folder, number=number, serves=False)
            run_loop(_Headless(worker, loaded, plugin, run).work(read, ordered=ordered))
    except (StartError, PluginStartError, DataDirError) as error:
        sys.stderr.write(f"xenios: {logs.scrub(str(error))}\n")
        return 2 if isinstance(error, StartError) else 1
    except (_Lost, OSError) as error:
        sys.stderr.write(f"xenios: {error}\n")
        return 1
    return 0


class _Headless:
    """One command's process."""

    def __init__(self, worker: Worker, loaded: Loaded, plugin: str, run: Run) -> None:
        self._worker = worker
        self._loaded = loaded
        self._plugin = plugin
        self._run = run
        self._reloaded = asyncio.Event()
        self._told: Loaded | None = None  # the parent's latest
        self._lost = ""
        self._tasks = Tasks()

    async def work(self, read: Callable[[], Loaded], *, ordered: bool) -> None:
        """Raises `_Lost`, and as `Worker.running`."""
        from gateway.cli import on_hangup, stop_signals  # noqa: PLC0415 - as above

        worker, stop, notices = self._worker, stop_signals(), Notices()
        reloader = Reloader(
            self._loaded,
            (lambda: self._told or self._loaded) if ordered else read,
            worker.put_in_force,
            lambda: worker.snapshot.hash,
            self._reloaded.set,
            notices=notices,
        )
        worker.reloader = reloader
        if ordered:
            self._tasks.spawn(self._listen(reloader, stop), "listen to the parent")
        try:
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(worker.running())
                if not ordered:
                    on_hangup(reloader.ask, stop.set)
                    await stack.enter_async_context(reloader.listening())
                self._tasks.spawn(self._look(stop), "look for the gateway's Valkey")
                self._tasks.spawn(self._tell(stop, notices), "tell systemd")
                await self._until(stop)
        finally:
            await self._tasks.drain(0)
        if self._lost:
            raise _Lost(self._lost)

    async def _until(self, stop: asyncio.Event) -> None:
        """Run with the plugin that is in force, until `stop`, or until it returns by itself."""
        stopped = self._tasks.spawn(stop.wait(), "stop")
        going = True
        while going and not stop.is_set():
            with self._used() as use:
                instance = use()
                if instance is None:
                    log.warning("headless_without_plugin", plugin=self._plugin)  # its entry is gone
                    return
                ending = asyncio.Event()
                running = self._tasks.spawn(self._run(instance.plugin, ending), f"{self._plugin}: its command")
                going = await self._another(use, instance, running, stopped)
                ending.set()
                await asyncio.wait([running])
                if running.cancelled() or running.exception() is not None:  # the log says what
                    self._lost = f"the command of the plugin {self._plugin} failed"
                    return

    async def _another(
        self,
        use: Callable[[], Instance | None],
        instance: Instance,
        running: asyncio.Task[None],
        stopped: asyncio.Task[Any],
    ) -> bool:
        """Wait. True: a reload made another plugin of it; False: it has ended, or is to end."""
        while True:
            self._reloaded.clear()
            reloaded = self._tasks.spawn(self._reloaded.wait(), "reloaded")
            await asyncio.wait([running, stopped, reloaded], return_when=asyncio.FIRST_COMPLETED)
            reloaded.cancel()
            if running.done() or stopped.done():
                return False
            if self._worker.snapshot.instance(self._plugin) is not instance:
                return True
            use()

    @contextlib.contextmanager
    def _used(self) -> Iterator[Callable[[], Instance | None]]:
        """What it gives takes the configuration in force for used, and gives up the one before."""
        held: list[Snapshot] = []

        def use() -> Instance | None:
            snapshot = self._worker.snapshot
            snapshot.users.enter()
            held.append(snapshot)
            for before in held[:-1]:
                before.users.leave()
            del held[:-1]
            return snapshot.instance(self._plugin)

        try:
            yield use
        finally:
            for snapshot in held:
                snapshot.users.leave()

    async def _listen(self, reloader: Reloader, stop: asyncio.Event) -> None:
        """Do what the parent says, until it ends."""
        try:
            async for message in lines(sys.stdin):
                self._told = await asyncio.to_thread(loaded_of, message["config"])
                result = await reloader.reload()
                if result.code is not None:  # the gateway has it in force all the same
                    self._lost = "the gateway's new configuration can't be put in force here"
                    return
        finally:
            stop.set()

    async def _tell(self, stop: asyncio.Event, notices: Notices) -> None:
        await notices.until(stop, f"configuration {self._worker.snapshot.hash}")
        notices.stopping()  # how long that takes is the command's affair

    async def _look(self, stop: asyncio.Event) -> None:
        """A gateway that is started anew has its Valkey elsewhere."""
        store = self._worker.snapshot.services.redis
        if store is None or self._loaded.settings.services.redis.get_secret_value() != "embedded":
            return
        place: Path = self._loaded.settings.server.data_dir / "valkey"
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if url_of_running(place) != store.url:
                break
        self._lost = "the gateway whose Valkey this process used has ended"
        stop.set()
