"""The real process: `xenios serve -c FILE`, started, signalled and read to its last byte."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from tests.integration.process import environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gateway.kit.upstream import ScriptedUpstream

XENIOS = Path(sys.executable).with_name("xenios")
UPSTREAM_KEY = "sk-or-v1-upstream-canary-0b7d5f"


def config(folder: Path, scripted: ScriptedUpstream | None = None, /, **sections: Any) -> Path:
    """A configuration file (JSON is YAML) in `folder` for a process on a free port."""
    base: dict[str, Any] = {
        "server": {"host": "127.0.0.1", "port": 0, "data_dir": str(folder / "data"), "drain_delay": 0},
        "upstreams": {"openrouter": {"base_url": scripted.url if scripted else "http://127.0.0.1:9/v1",
                                     "api_key": UPSTREAM_KEY}},
        "catalogue": {"refresh": 0},
        "plugins": [{"use": "api_keys"}],
    }  # fmt: skip
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    file = folder / "xenios.yaml"
    file.write_text(json.dumps(base, indent=1))
    return file


@dataclass
class Process:
    """A started gateway. `out` and `err` grow while it runs."""

    process: asyncio.subprocess.Process
    folder: Path
    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    port: int = 0
    _readers: list[asyncio.Task[None]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        return (self.folder / "data" / "bootstrap_key").read_text().strip()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def exit_code(self, seconds: float = 10.0) -> int:
        """Waits for the end of the process and of its output."""
        async with asyncio.timeout(seconds):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
            return code

    async def said(self, pattern: bytes, seconds: float = 10.0) -> re.Match[bytes]:
        """Waits until standard error holds the pattern."""
        async with asyncio.timeout(seconds):
            while (found := re.search(pattern, bytes(self.err))) is None:
                if all(r.done() for r in self._readers):
                    raise AssertionError(f"never said {pattern!r}: {bytes(self.err).decode()}")
                self._news.clear()
                await self._news.wait()
        return found

    async def _read(self, stream: asyncio.StreamReader, into: bytearray) -> None:
        while piece := await stream.read(1 << 16):
            into += piece
            self._news.set()
        self._news.set()


@asynccontextmanager
async def started(file: Path, env: Mapping[str, str] | None = None, *, ready: bool = True) -> AsyncIterator[Process]:
    """Run it; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        XENIOS, "serve", "-c", str(file), cwd=file.parent, env=environment(env),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    gateway = Process(process, file.parent)
    loop = asyncio.get_running_loop()
    gateway._readers = [
        loop.create_task(gateway._read(process.stdout, gateway.out)),
        loop.create_task(gateway._read(process.stderr, gateway.err)),
    ]
    try:
        if ready:
            gateway.port = int((await gateway.said(rb" at http://127\.0\.0\.1:(\d+)\n"))[1])
        yield gateway
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await asyncio.gather(*gateway._readers)


async def stored_rows(url: str, folder: Path) -> str:
    """All that a database holds; of SQLite the bytes of whatever lies in the data directory."""
    if url.startswith("sqlite"):
        return "".join(p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file() and p.name != "s")
    connection = await asyncpg.connect(url)
    try:
        names = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        found = [await connection.fetch(f'SELECT to_json(t)::text FROM "{n["tablename"]}" t') for n in names]
        return "".join(row[0] for table in found for row in table)
    finally:
        await connection.close()
