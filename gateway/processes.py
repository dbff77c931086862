"""Several workers: a parent that holds the socket and what they share, and starts again what dies.

    xenios serve ── parent: listening sockets, locked data_dir, embedded Valkey
                     ├─ python -m gateway.begin gateway.processes   worker 1: gateway/worker.py
                     └─ python -m gateway.begin gateway.processes   worker 2 …

A worker is a fresh interpreter: no thread, lock or event loop of the parent's is copied half-way. It gets the
configuration's text and the sockets from the parent, says on a pipe when it accepts, and stops when its standard input
ends, which it does with the parent, however that ended. All accept from the same sockets: a connection that waits for
a worker that died is taken by another.

They talk in lines of JSON. The first to a worker is its order, then:

    prepare  →  ← prepared      a configuration; its hash, or why it can't be served
    commit   →  ← committed     swap; when it has
    abort    →                  forget what was prepared
    reloads  →                  what became of the reloads so far
             ←  reload          a client asks this worker for one; the next `reloads` that names the number answers it

A reload is in force once the parent has noted it: when all workers have prepared it, before it tells them to swap. One
that dies in between is started with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from gateway import logs
from gateway.errors import StartError
from gateway.listening import close, open_sockets, port_of
from gateway.metric_files import start_anew
from gateway.plugins import PluginStartError
from gateway.problems import ConfigError, Problem
from gateway.reload import Reload, Reloader, ReloadError, told
from gateway.settings import load_text
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from gateway.notices import Notices
    from gateway.reload import Reloading
    from gateway.settings import Loaded, Settings
    from gateway.worker import Worker

log = logs.get_logger("gateway.processes")

QUICK = 5.0  # a worker that lived shorter makes the next wait
WAITS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
LONGEST_LINE = 64 * 2**20  # a configuration, and the files that it names
GRACE = 5.0  # for a worker to say itself that it, or a plugin, took too long
SWAP_SECONDS = 10.0  # for workers to say that they have swapped; one that is late has yet to read that it must


@dataclass(frozen=True)
class Ready:
    """What a worker says once it accepts."""

    simulated: bool
    has_chat_task: bool
    config: str


class Waits:
    """How long to wait before a process that ended is started again."""

    def __init__(self) -> None:
        self._quick = 0

    def after(self, lived: float) -> float:
        self._quick = self._quick + 1 if lived < QUICK else 0
        return WAITS[min(self._quick, len(WAITS) - 1)]


async def begun(module: str, pass_fds: Sequence[int] = ()) -> asyncio.subprocess.Process:
    """A process of ours, told on standard input what to do. Raises OSError."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway.begin",
        module,
        stdin=asyncio.subprocess.PIPE,
        pass_fds=pass_fds,
        start_new_session=True,  # Ctrl-C is for the parent, which passes it on once
    )


class _Child:
    """A worker, as the parent sees it."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number = number
        self.process = process
        self.ready: asyncio.Future[Ready | None] = asyncio.get_running_loop().create_future()  # None: it ended before
        self.started = time.monotonic()
        self._answers: dict[str, asyncio.Future[dict[str, Any] | None]] = {}

    @property
    def serves(self) -> bool:
        return self.process.returncode is None and self.ready.done() and self.ready.result() is not None

    def send(self, **message: Any) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it has ended
                self.process.stdin.write(json.dumps(message).encode() + b"\n")

    async def ask(self, name: str, seconds: float, **message: Any) -> dict[str, Any] | None:
        """What it answers under this name; None if it ends before. Raises TimeoutError."""
        answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._answers[name] = answer
        self.send(answer=name, **message)
        try:
            async with asyncio.timeout(seconds):
                return await answer
        finally:
            del self._answers[name]

    async def listen(self, pipe: int, asked: Callable[[_Child, int], None]) -> None:
        """Until it ends. `asked`: with the number of its request for a reload."""
        try:
            async for message in lines(os.fdopen(pipe, "rb", buffering=0)):
                answer = self._answers.get(message.get("answers", ""))
                if "ready" in message:
                    self.ready.set_result(Ready(**message["ready"]))
                elif "reload" in message:
                    asked(self, message["reload"])
                elif answer is not None and not answer.done():
                    answer.set_result(message)
        finally:
            waiting: list[asyncio.Future[Any]] = [self.ready, *self._answers.values()]
            for future in waiting:
                if not future.done():
                    future.set_result(None)


class Group:
    """The workers of one gateway."""

    def __init__(
        self,
        loaded: Loaded,
        folder: Path,
        redis_url: str | None,
        read: Callable[[], Loaded],
        follow: Callable[[Loaded], None] = lambda _: None,
        *,
        sockets: Sequence[socket.socket] = (),
        notices: Notices | None = None,
    ) -> None:
        """`redis_url`: of the embedded Valkey, where there is one; `read`: the configuration once more; `follow`: after
        each reload, with the one in force; `sockets`: that listen already, instead of what the settings say.
        """
        self._loaded = loaded
        self._folder = folder
        self._redis_url = redis_url
        self._sockets = list(sockets)
        self._workers: dict[int, _Child] = {}
        self._tasks = Tasks()
        self._stopping = asyncio.Event()
        self._changing = asyncio.Lock()  # nobody is started while a reload goes on
        self._rounds = 0
        self.reloader = Reloader(loaded, read, self.put_in_force, lambda: self.config, self.tell, notices=notices)
        self.config = ""  # the hash in force
        self._follow = follow
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ready]:
        """All workers accept while the context lasts; then they drain. Raises StartError, OSError."""
        settings = self._loaded.settings
        self._sockets = self._sockets or open_sockets(settings.server)
        self.port = port_of(self._sockets)
        start_anew(self._folder / "metrics")
        try:
            first = [await self._start(number) for number in range(1, settings.server.workers + 1)]
            said = [await worker.ready for worker in first]
            failed = [w for w, ready in zip(first, said, strict=True) if ready is None]
            if failed or said[0] is None:
                # it has said on standard error why
                raise StartError(f"worker {failed[0].number} did not start.")
            self.config = said[0].config
            keepers = [self._tasks.spawn(self._keep(worker), f"keeper {worker.number}") for worker in first]
            try:
                yield said[0]
            finally:
                self._stopping.set()
                self._close_sockets()
                self._signal(signal.SIGTERM)
                await asyncio.gather(*keepers)
        finally:
            self._close_sockets()
            await self._end()

    def kill(self) -> None:
        """At once; for the second signal."""
        self._signal(signal.SIGKILL)

    # --- another configuration -----------------------------------------------------------------------------------

    async def put_in_force(self, loaded: Loaded) -> None:
        """All workers prepare it, then all swap; or none. Raises ReloadError."""
        seconds = self._loaded.settings.server.reload_timeout + GRACE
        async with self._changing:
            workers = await self._all_that_serve(seconds)
            self._rounds += 1
            message = {"prepare": text_of(loaded)}
            asked = [_prepared(worker, f"prepared {self._rounds}", seconds, message) for worker in workers]
            try:
                answers = await asyncio.gather(*asked)
                config = _agreed(answers)
            except BaseException:
                for worker in workers:
                    worker.send(abort=True)
                raise
            if loaded.settings.log != self._loaded.settings.log:
                logs.setup(loaded.settings.log)
            self._loaded, self.config = loaded, config
            swaps = asyncio.gather(*(_swapped(worker, f"committed {self._rounds}") for worker in workers))
        late = [number for number in await swaps if number is not None]
        if late:
            log.warning("reload_late", workers=late)

    def tell(self) -> None:
        """All what became of the reloads so far."""
        for worker in self._workers.values():
            worker.send(reloads=_state(self.reloader))
        self._follow(self._loaded)

    async def _all_that_serve(self, seconds: float) -> list[_Child]:
        """Those that are being started begin with the configuration that is in force now: they must have."""
        workers = list(self._workers.values())
        starting = [worker.ready for worker in workers if not worker.ready.done()]
        if starting:
            await asyncio.wait(starting, timeout=seconds)
        slow = [worker.number for worker in workers if not worker.ready.done()]
        serving = [worker for worker in workers if worker.serves]
        if slow or not serving:
            who = f"Worker {slow[0]} is still being started." if slow else "No worker serves now."
            raise ReloadError("reload_failed", (_problem(who),))
        return serving

    def _asked(self, worker: _Child, number: int) -> None:
        self._tasks.spawn(self._reload_for(worker, number), "reload for a worker")

    async def _reload_for(self, worker: _Child, number: int) -> None:
        result = await self.reloader.reload()
        worker.send(reloads=_state(self.reloader), number=number, result=result.to_json())

    # --- processes -----------------------------------------------------------------------------------------------

    async def _start(self, number: int) -> _Child:
        read, write = os.pipe()
        fds = [s.fileno() for s in self._sockets]
        try:
            process = await begun("gateway.processes", pass_fds=[*fds, write])
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        worker = self._workers[number] = _Child(number, process)
        self._tasks.spawn(worker.listen(read, self._asked), f"listen to worker {number}")
        server = self._loaded.settings.server
        worker.send(
            number=number,
            config=text_of(self._loaded),
            told={"host": server.host, "port": self.port, "workers": server.workers},
            data_dir=str(self._folder),
            sockets=fds,
            pipe=write,
            redis=self._redis_url,
            reloads=_state(self.reloader),
        )
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        return worker

    async def _keep(self, worker: _Child) -> None:
        """Start it again whenever it ends, until the group stops."""
        waits = Waits()
        while True:
            code = await worker.process.wait()
            if self._stopping.is_set():
                return
            wait = waits.after(time.monotonic() - worker.started)
            log.error("worker_ended", worker=worker.number, pid=worker.process.pid, code=code, again_in_seconds=wait)
            another = None
            while another is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._stopping.wait()
                        return
                async with self._changing:
                    if self._stopping.is_set():
                        return
                    try:
                        another = await self._start(worker.number)
                    except OSError as error:  # no memory or no process is left: there may be again
                        wait = waits.after(0.0)
                        log.error(  # noqa: TRY400 - it says it all
                            "worker_not_started", worker=worker.number, error=str(error), again_in_seconds=wait
                        )
            worker = another

    def _signal(self, number: int) -> None:
        for worker in self._workers.values():
            if worker.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def _close_sockets(self) -> None:
        close(self._sockets, self._loaded.settings.server)

    async def _end(self) -> None:
        self._signal(signal.SIGTERM)
        for worker in self._workers.values():
            await worker.process.wait()
        await self._tasks.drain(1)


async def _prepared(worker: _Child, name: str, seconds: float, message: dict[str, Any]) -> dict[str, Any]:
    """What the worker says, or what is to be said of it."""
    try:
        answer = await worker.ask(name, seconds, **message)
    except TimeoutError:
        return _refusal(f"Worker {worker.number} did not answer within {seconds:g} s.")
    return answer or _refusal(f"Worker {worker.number} ended while it prepared the new configuration.")


async def _swapped(worker: _Child, name: str) -> int | None:
    """Its number if it has not said so in time. One that has ended is started with the new configuration."""
    try:
        await worker.ask(name, SWAP_SECONDS, commit=True)
    except TimeoutError:
        return worker.number
    return None


def _agreed(answers: Sequence[dict[str, Any]]) -> str:
    """The hash that all have prepared. Raises ReloadError; what several workers say is said once."""
    refused = [answer for answer in answers if answer["code"]]
    if refused:
        problems = {Problem(**problem): None for answer in refused for problem in answer["problems"]}
        raise ReloadError(refused[0]["code"], tuple(problems))
    hashes = {answer["config"] for answer in answers}
    if len(hashes) > 1:
        raise ReloadError("reload_failed", (_problem("The workers read different files: one was changed meanwhile."),))
    return str(hashes.pop())


def _refusal(message: str) -> dict[str, Any]:
    return {"config": None, "code": "reload_failed", "problems": [asdict(_problem(message))]}


def _problem(message: str) -> Problem:
    return Problem("reload", None, None, "", message)


def _state(who: Reloading) -> dict[str, Any]:
    return {"done": who.done, "refused": who.refused, "last": who.last.to_json() if who.last else None}


def text_of(loaded: Loaded) -> dict[str, Any]:
    """All that makes the configuration: read once, for all processes."""
    source = loaded.source
    return {"text": source.text, "file": source.file, "base": str(source.base), "files": source.files}


def loaded_of(config: Mapping[str, Any]) -> Loaded:
    """What `text_of` made. Raises ConfigError."""
    return load_text(config["text"], config["file"], base=Path(config["base"]), files=config["files"])


async def lines(pipe: Any) -> AsyncIterator[dict[str, Any]]:
    """Each line's object, until the other side ends."""
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        while (line := await reader.readline()).endswith(b"\n"):
            yield json.loads(line)
    finally:
        transport.close()


# --- in the worker ---------------------------------------------------------------------------------------------------


def main() -> int:
    """A worker: told on standard input what to do."""
    # not through a buffer: what comes after this line is read by the event loop
    order: dict[str, Any] = json.loads(io.FileIO(0, closefd=False).readline())
    from gateway.cli import run_loop  # noqa: PLC0415 - only a worker needs it

    try:
        loaded = _as_told(order["config"], order)
        logs.setup(loaded.settings.log)
        logs.bind_contextvars(worker=order["number"])
        run_loop(_work(loaded, order))
    except (ConfigError, PluginStartError, StartError) as error:
        sys.stderr.write(f"xenios: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"xenios: worker {order['number']}: {error}\n")
        return 1
    return 0


def _as_told(config: dict[str, Any], order: dict[str, Any]) -> Loaded:
    """The settings as the parent has them, which the command line may have changed."""
    loaded = loaded_of(config)
    server = loaded.settings.server.model_copy(update=order["told"])
    services = loaded.settings.services
    if order["redis"]:
        services = services.model_copy(update={"redis": SecretStr(order["redis"])})
    settings: Settings = loaded.settings.model_copy(update={"server": server, "services": services})
    return replace(loaded, settings=settings)


async def _work(loaded: Loaded, order: dict[str, Any]) -> None:
    from gateway.cli import stop_signals  # noqa: PLC0415 - only a worker needs it
    from gateway.supervisor import identity  # noqa: PLC0415 - as above
    from gateway.worker import Worker  # noqa: PLC0415 - as above

    folder = Path(order["data_dir"])
    stop = stop_signals()
    sockets = [socket.socket(fileno=fd) for fd in order["sockets"]]
    worker = Worker(
        loaded, identity(folder, loaded.settings), folder, sockets=sockets, alone=False, number=order["number"]
    )
    worker.reloader = parent = _Parent(worker, order)
    tasks = Tasks()
    tasks.spawn(parent.listen(stop), "listen to the parent")
    try:
        async with worker.running():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, parent.ask)
            about = Ready(worker.simulated, "task/chat" in worker.snapshot.names(), worker.snapshot.hash)
            parent.say(ready=asdict(about))
            await stop.wait()
            await parent.close()
    finally:
        await tasks.drain(0)


class _Parent:
    """The parent, as a worker sees it."""

    def __init__(self, worker: Worker, order: dict[str, Any]) -> None:
        self._worker = worker
        self._order = order
        self._tasks = Tasks()
        self._preparing: asyncio.Task[None] | None = None
        self._asked: dict[int, asyncio.Future[Reload]] = {}
        self._numbers = 0
        self._closed = False
        self.done = self.refused = 0
        self.last: Reload | None = None
        self._note(order["reloads"])

    async def reload(self) -> Reload:
        """Ask for one, of all workers."""
        self._numbers += 1
        number = self._numbers
        answer: asyncio.Future[Reload] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self.say(reload=number)
        try:
            return await answer
        finally:
            del self._asked[number]

    def ask(self) -> None:
        """For a signal that was meant for the parent."""
        self.say(reload=0)

    def say(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and so does this process
            os.write(self._order["pipe"], json.dumps(message).encode() + b"\n")

    async def listen(self, stop: asyncio.Event) -> None:
        """Do what it says, until it ends."""
        try:
            async for message in lines(sys.stdin):
                self._do(message)
        finally:
            stop.set()

    async def close(self) -> None:
        """Nothing more is prepared."""
        self._closed = True
        await self._tasks.drain(0)

    def _do(self, message: dict[str, Any]) -> None:
        match message:
            case {"prepare": _, "answer": name} if self._closed:
                self.say(answers=name, **_refusal(f"Worker {self._worker.number} is stopping."))
            case {"prepare": config, "answer": name}:
                self._preparing = self._tasks.spawn(self._prepare(config, name), "prepare")
            case {"commit": _, "answer": name}:
                self.say(answers=name, config=self._worker.commit().hash)
            case {"abort": _}:
                if self._preparing is not None:
                    self._preparing.cancel()
                self._tasks.spawn(self._worker.abort(), "abort")
            case {"reloads": state}:
                self._note(state)
                answer = self._asked.get(message.get("number", 0))
                if answer is not None and not answer.done():
                    answer.set_result(Reload.from_json(message["result"]))

    async def _prepare(self, config: dict[str, Any], name: str) -> None:
        loaded: Loaded | None = None
        try:
            loaded = await asyncio.to_thread(_as_told, config, self._order)
            snapshot = await self._worker.prepare(loaded)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent is told
            code, problems = told(error, loaded)
            self.say(answers=name, config=None, code=code, problems=[asdict(problem) for problem in problems])
        else:
            self.say(answers=name, config=snapshot.hash, code=None, problems=[])

    def _note(self, state: dict[str, Any]) -> None:
        self.done, self.refused = state["done"], state["refused"]
        self.last = Reload.from_json(state["last"]) if state["last"] else None
