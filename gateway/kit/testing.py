"""The real gateway in a test: real pipeline, real sockets, a scripted upstream.

async with Gateway.test(plugins=["api_keys", MyPlugin, (Other, {"limit": 3})], upstream=upstream) as gw:
reply = await gw.post("/v1/chat/completions", {"model": "m", "messages": [...]})
assert reply.status == 200
[exchange] = await gw.finished()
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from gateway.hookspecs import hookimpl
from gateway.kit.keys import new_key
from gateway.kit.upstream import ScriptedUpstream
from gateway.plugins import read_plugins
from gateway.settings import load_text
from gateway.supervisor import Identity
from gateway.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from gateway.exchange import Exchange
    from gateway.plugins import Blueprint
    from gateway.settings import Loaded
    from gateway.snapshot import Snapshot

PEPPER = "a pepper for tests only"


@dataclass(frozen=True)
class TestReply:
    """A reply as the client saw it. `cut`: the connection ended before the body was complete."""

    __test__ = False

    status: int
    headers: Mapping[str, str]
    body: bytes
    cut: bool = False

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[bytes]:
        """The events of a stream, each with its blank line."""
        return [e + b"\n\n" for e in self.body.split(b"\n\n")[:-1]]


class _Recorder:
    """Stands first, so that its `request_finished` runs last."""

    reads_settings = ()

    def __init__(self, config: Any, services: Any) -> None:
        del config, services
        self.exchanges: list[Exchange] = []
        self.changed = asyncio.Condition()

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        async with self.changed:
            self.exchanges.append(exchange)
            self.changed.notify_all()


@dataclass
class Gateway:
    """A gateway that serves on a loopback port until the context ends."""

    worker: Worker
    upstream: ScriptedUpstream
    key: str
    session: aiohttp.ClientSession
    _recorder: _Recorder
    _read: Callable[..., tuple[Loaded, list[Blueprint]]]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.worker.port}"

    @property
    def snapshot(self) -> Snapshot:
        return self.worker.snapshot

    def plugin(self, plugin_id: str) -> Any:
        """The plugin instance with this id."""
        return next(i.plugin for i in self.snapshot.instances if i.id == plugin_id)

    @classmethod
    @contextlib.asynccontextmanager
    async def test(
        cls,
        *,
        plugins: Sequence[str | type | tuple[type, dict[str, Any]] | dict[str, Any]] = (),
        upstream: ScriptedUpstream | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Gateway]:
        """Start a gateway in front of `upstream` (default: one that answers everything well).

        `plugins`: names of installed plugins, classes, (class, config), or entries as in the YAML (a `use` that is a
        class is allowed). `settings`: sections as in the YAML, merged over what the test needs.
        """
        async with contextlib.AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenios-test-")))
            if upstream is None:
                upstream = ScriptedUpstream()
            if not upstream.running:
                await stack.enter_async_context(upstream)
            read = functools.partial(_read, folder, upstream)
            loaded, blueprints = read(plugins, settings)
            key = new_key()
            worker = Worker(loaded, Identity(PEPPER, key), folder, blueprints)
            await stack.enter_async_context(worker.running())
            recorder = next(i.plugin for i in worker.snapshot.instances if i.id == _Recorder.__name__)
            headers = {"Authorization": f"Bearer {key}"}
            session = await stack.enter_async_context(aiohttp.ClientSession())
            yield cls(worker, upstream, key, session, recorder, read, headers)

    async def reload(
        self,
        *,
        plugins: Sequence[str | type | tuple[type, dict[str, Any]] | dict[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Serve with another configuration, given as in `test`. Raises what a mistake in it or a plugin raises."""
        loaded, blueprints = self._read(plugins, settings)
        await self.worker.prepare(loaded, blueprints)
        self.worker.commit()

    async def post(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, **kwargs: Any
    ) -> TestReply:
        """POST `body` as JSON with the bootstrap key; `headers` are added, those with the value "" left out."""
        return await self.request("POST", path, json=body, headers=headers, **kwargs)

    async def get(self, path: str, *, headers: Mapping[str, str] | None = None) -> TestReply:
        return await self.request("GET", path, headers=headers)

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **kwargs: Any
    ) -> TestReply:
        merged = {k: v for k, v in {**self.headers, **(headers or {})}.items() if v}
        async with self.session.request(method, self.url + path, headers=merged, **kwargs) as reply:
            parts: list[bytes] = []
            try:
                async for part in reply.content.iter_any():
                    parts.append(part)  # noqa: PERF401 - what came before a cut counts
            except aiohttp.ClientPayloadError:
                return TestReply(reply.status, reply.headers, b"".join(parts), cut=True)
            return TestReply(reply.status, reply.headers, b"".join(parts))

    async def chat(
        self, text: str = "Hello", *, model: str = "test/model", stream: bool = False, **fields: Any
    ) -> TestReply:
        """One chat completion."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return await self.post("/v1/chat/completions", {**body, "stream": True} if stream else body)

    async def finished(self, count: int = 1, *, seconds: float = 5.0) -> list[Exchange]:
        """The first `count` exchanges whose `request_finished` has run in all plugins. Raises TimeoutError."""
        recorder = self._recorder
        async with asyncio.timeout(seconds), recorder.changed:
            await recorder.changed.wait_for(lambda: len(recorder.exchanges) >= count)
        return recorder.exchanges[:count]


def _read(
    folder: Path, upstream: ScriptedUpstream, plugins: Sequence[Any], settings: Mapping[str, Any] | None
) -> tuple[Loaded, list[Blueprint]]:
    entries, classes = _entries([_Recorder, *plugins])
    text = json.dumps({**_settings(folder, upstream, settings or {}), "plugins": entries})
    loaded = load_text(text, file="<test>", env={}, base=Path.cwd())
    return loaded, read_plugins(loaded.settings, loaded.source, classes)


def _settings(folder: Path, upstream: ScriptedUpstream, given: Mapping[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": 0, "data_dir": str(folder), "drain_timeout": 1},
        "upstreams": {"openrouter": {"base_url": upstream.url, "api_key": "sk-or-v1-test"}},
        "catalogue": {"refresh": 0},
        "services": {"database": {"migrate_on_start": True}},
    }
    return _merged(base, given)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in over.items():
        old = out.get(name)
        out[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _entries(plugins: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, type[Any]]]:
    """Entries as in the YAML, and the classes that their `use` names stand for."""
    out: list[dict[str, Any]] = []
    classes: dict[str, type[Any]] = {}
    for plugin in plugins:
        entry = {"use": plugin} if isinstance(plugin, str | type) else plugin
        if isinstance(plugin, tuple):
            entry = {"use": plugin[0], "config": plugin[1]}
        use = entry["use"]
        if isinstance(use, type):
            classes[use.__name__] = use
            entry = {**entry, "use": use.__name__}
        out.append(entry)
    return out, classes
