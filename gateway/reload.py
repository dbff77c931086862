"""Another configuration while the gateway serves: read, checked, prepared, swapped. Or refused, and nothing is changed.

Asked for by SIGHUP, `POST /admin/reload`, or a change of the files. Here is what one process and the parent of several
workers do alike; what differs is `put_in_force`: `Worker.prepare` and `commit`, or the same in all workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

from gateway.errors import StartError
from gateway.logs import get_logger, scrub
from gateway.plugins import PluginStartError, file_of, read_entries
from gateway.problems import ConfigError, Problem
from gateway.settings import Loaded, examine, examine_source, without_passwords
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    from gateway.notices import Notices
    from gateway.plugins import Blueprint
    from gateway.settings import Examined, Settings
    from gateway.yaml_source import Source

log = get_logger("gateway.reload")

Code = Literal["config_invalid", "restart_needed", "reload_failed"]

POLL_SECONDS = 0.5  # how often files are looked at; a change counts once two looks in a row see the same
# Sockets are bound, secrets are made, stores are opened once.
AT_START = {
    "server": frozenset(
        {"host", "port", "unix_socket", "unix_socket_mode", "tls", "workers", "data_dir", "pepper", "bootstrap_key"}
    ),
    "services": None,  # all of it
}


@dataclass(frozen=True, slots=True)
class Reload:
    """What became of one. `config`: the hash in force afterwards; `code`: None if it was done."""

    at: str
    config: str
    code: Code | None = None
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": [asdict(problem) for problem in self.problems]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reload:
        return cls(**{**data, "problems": tuple(Problem(**problem) for problem in data["problems"])})


class Reloading(Protocol):
    """Who reloads, as workers know it."""

    done: int
    refused: int
    last: Reload | None

    async def reload(self) -> Reload: ...


class ReloadError(Exception):
    """It can't be done, for reasons that are told."""

    def __init__(self, code: Code, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.code = code
        self.problems = problems


class Reloader:
    """One reload after another, whoever asks; remembers what became of them."""

    def __init__(
        self,
        loaded: Loaded,
        read: Callable[[], Loaded],
        put_in_force: Callable[[Loaded], Awaitable[None]],
        config: Callable[[], str],
        tell: Callable[[], None] = lambda: None,
        *,
        notices: Notices | None = None,
    ) -> None:
        """`put_in_force`: if it raises, nothing has changed. `config`: the hash in force. `tell`: after each reload."""
        self._notices = notices
        self.loaded = loaded
        self._config = config
        self.done = self.refused = 0
        self.last: Reload | None = None
        self._read = read
        self._put_in_force = put_in_force
        self._tell = tell
        self._lock = asyncio.Lock()
        self._tasks = Tasks()
        self._wake = asyncio.Event()
        self._asked = False
        self._stopping = False
        self._files = files_of(loaded.source, loaded.settings)
        self._seen = _stamps(self._files)
        self._glimpsed = self._seen

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Reload when asked, and when files change if `server.watch_config` says so, while the context lasts."""
        self._tasks.spawn(self._listen(), "reload: listen")
        try:
            yield
        finally:
            self._stopping = True
            await self._tasks.drain(0)

    def ask(self) -> None:
        """Soon; for signals."""
        self._asked = True
        self._wake.set()

    async def reload(self) -> Reload:
        """Now. Once begun it goes on, whatever becomes of the caller."""
        return await asyncio.shield(self._tasks.spawn(self._reload(), "reload"))

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS if self.loaded.settings.server.watch_config else None):
                    await self._wake.wait()
            self._wake.clear()
            asked, self._asked = self._asked, False
            if asked or (self.loaded.settings.server.watch_config and self._changed()):
                await self._reload()

    def _changed(self) -> bool:
        """Files differ from those that were read last, and nobody is writing them just now."""
        now = _stamps(self._files)
        quiet, self._glimpsed = now == self._glimpsed, now
        return quiet and now != self._seen

    async def _reload(self) -> Reload:
        async with self._lock:
            if self._notices is not None:
                self._notices.reloading()
            self._seen = _stamps(self._files)  # before reading: what is written meanwhile is newer
            loaded: Loaded | None = None
            try:
                if self._stopping:
                    raise ReloadError("reload_failed", (_problem("The gateway is stopping."),))  # noqa: TRY301 - as others
                loaded = await asyncio.to_thread(self._read)
                needed = restart_needed(self.loaded.settings, loaded)
                if needed:
                    raise ReloadError("restart_needed", tuple(needed))  # noqa: TRY301 - as others
                await self._put_in_force(loaded)
            except Exception as error:  # noqa: BLE001 - whatever it is, the old configuration serves on
                self.refused += 1
                self.last = Reload(_now(), self._config(), *told(error, loaded))
                # What it was refused for may be mended in a file that only it names.
                refused = files_of(loaded.source, loaded.settings) if loaded else getattr(error, "files", frozenset())
                self._files = files_of(self.loaded.source, self.loaded.settings) | refused
            else:
                self.loaded = loaded
                self._files = files_of(loaded.source, loaded.settings)
                self.done += 1
                self.last = Reload(_now(), self._config())
            self._seen = {file: self._seen.get(file, stamp) for file, stamp in _stamps(self._files).items()}
            self._wake.set()  # it may watch the files from now on, or other ones
            _say(self.last)
            self._tell()
            if self._notices is not None:
                refused = f"; a reload was refused at {self.last.at}" if self.last.code else ""
                self._notices.ready(f"configuration {self.last.config}{refused}")
            return self.last


def _say(result: Reload) -> None:
    if result.code is None:
        log.info("config_reloaded", config=result.config)
    else:
        problems = [str(problem) for problem in result.problems]
        log.error("config_reload_failed", config=result.config, code=result.code, problems=problems)


def restart_needed(now: Settings, new: Loaded) -> list[Problem]:
    """The fields that are set otherwise and take effect at a start only."""
    return [
        new.source.problem(path, "takes effect at a start only", "restart Xenios, or set it back")
        for section, fields in AT_START.items()
        for path in _differing(getattr(now, section), getattr(new.settings, section), (section,))
        if fields is None or ".".join(path[1:]) in fields
    ]


def _differing(one: BaseModel, other: BaseModel, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name in type(one).model_fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, BaseModel) and isinstance(b, BaseModel):
            yield from _differing(a, b, (*path, name))
        elif a != b:
            yield (*path, name)


def told(error: Exception, loaded: Loaded | None) -> tuple[Code, tuple[Problem, ...]]:
    """Why a reload failed, for people, without secrets."""
    match error:
        case ReloadError():
            return error.code, error.problems
        case ConfigError():
            return "config_invalid", error.problems
        case PluginStartError():
            _log_traceback(error, loaded)
            return "reload_failed", (_of_plugin(error, loaded),)
        case StartError():
            return "reload_failed", (_problem(str(error), loaded),)
        case _:
            _log_traceback(error, loaded)
            return "reload_failed", (_problem(f"It broke: {type(error).__name__}. The log says more.", loaded),)


def _of_plugin(error: PluginStartError, loaded: Loaded | None) -> Problem:
    entries = loaded.settings.plugins if loaded else ()
    index = next((index for index, entry in enumerate(entries) if entry.id == error.plugin), None)
    if loaded is None or index is None:
        return _problem(str(error), loaded)
    return loaded.source.problem(("plugins", index), _clean(str(error), loaded))


def _problem(message: str, loaded: Loaded | None = None) -> Problem:
    file = loaded.source.file if loaded else "reload"
    return Problem(file, None, None, "", _clean(message, loaded))


def _log_traceback(error: Exception, loaded: Loaded | None) -> None:
    """As text: the log's own way knows the secrets that are in force, not those that were to come."""
    log.error("reload_traceback", traceback=_clean("".join(traceback.format_exception(error)), loaded))


def _clean(text: str, loaded: Loaded | None) -> str:
    """A library's words may quote what it was given."""
    given = [text for texts in loaded.source.expanded.values() for text in texts if len(text) >= 8] if loaded else []
    return scrub(without_passwords(text), *sorted(given, key=len, reverse=True))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path, changes: Mapping[str, Any]) -> Loaded:
    """The file once more, under what the command line said of `server`. Raises ConfigError with every mistake."""
    examined = examine(path)
    _, problems = _plugins_of(examined)
    if problems or examined.settings is None:
        raise ConfigError(problems, files_of(examined.source, examined.settings))
    return changed(Loaded(examined.settings, examined.source), changes)


def changed(loaded: Loaded, changes: Mapping[str, Any]) -> Loaded:
    """With other values in `server`."""
    server = loaded.settings.server.model_copy(update=dict(changes))
    return replace(loaded, settings=loaded.settings.model_copy(update={"server": server}))


def examine_all(given: Path | Source) -> tuple[list[Blueprint], list[Problem], Loaded | None]:
    """Everything that is wrong with the file, or what was read of it, and its plugins, in line order."""
    try:
        examined = examine(given) if isinstance(given, Path) else examine_source(given)
    except ConfigError as error:
        return [], list(error.problems), None
    blueprints, problems = _plugins_of(examined)
    loaded = Loaded(examined.settings, examined.source) if examined.settings else None
    return blueprints, problems, loaded


def _plugins_of(examined: Examined) -> tuple[list[Blueprint], list[Problem]]:
    """Its plugins, and every problem, theirs too."""
    services = examined.settings.services if examined.settings else None
    blueprints, found = read_entries(examined.plugins(), examined.source, services=services)
    return blueprints, sorted([*examined.problems, *found], key=lambda p: (p.line or 0, p.column or 0))


def files_of(source: Source, settings: Settings | None) -> frozenset[Path]:
    """The files that the configuration consists of; without `settings` those that are known."""
    files = {Path(source.file), *source.named, *map(Path, source.files)}
    if settings is not None:
        tls = settings.server.tls
        files |= {tls.cert_file, tls.key_file} if tls else set()
        files |= {upstream.ca_file for upstream in settings.upstreams.values() if upstream.ca_file}
        files |= {file for entry in settings.plugins if (file := file_of(entry.use, source.base))}
    return frozenset(files)


def _stamps(files: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """What tells that a file was changed."""
    return {file: _stamp(file) for file in files}


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        about = file.stat()
    except OSError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns
