"""The real `xenios` as a process, for the time of a context, and plain HTTP to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.integration import warm

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "config"
XENIOS = (str(Path(sys.executable).parent / "xenios"),)
MODULE = (sys.executable, "-m", "gateway")
_FOREIGN = ("XENIOS_", "OPENROUTER_", "OPENAI_", "ANTHROPIC_", "LOCAL_LLM")


def environment(env: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's, without anything that a configuration would read, and `env`; None there takes a variable out."""
    own = {
        k: v
        for k, v in os.environ.items()
        if k.startswith("XENIOS_TEST_") or not (k.startswith(_FOREIGN) or k.lower().endswith("_proxy"))
    }
    return {k: v for k, v in {**own, **(env or {})}.items() if v is not None}


@contextlib.contextmanager
def command(folder: Path, *args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on until TERM ends it, as it does at the end of the block: with exit code 0."""
    process = subprocess.Popen(
        [*XENIOS, *map(str, args)], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=20)
        assert process.returncode == 0, text
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def xenios(
    *args: str | Path,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    stdin: str = "",
    command: tuple[str, ...] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. `command`: what is started for it; else it is a fork of a gateway that is imported."""
    if command is None and warm.AVAILABLE:
        return warm.run([*XENIOS, *map(str, args)], cwd, environment(env), stdin, 60)
    return subprocess.run(
        [*(command or XENIOS), *map(str, args)],
        cwd=cwd,
        env=environment(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """`banner`: what it greeted with, on standard error; `key`: the bootstrap key, if there is one.

    `said`: the lines on standard error after the banner, so far.
    """

    url: str
    key: str | None
    banner: str
    folder: Path
    pid: int = 0
    said: list[str] = field(default_factory=list)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = "own",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """`path` goes out as it is. Without a body none is sent; `key`: another than the bootstrap key, or None."""
        token = self.key if key == "own" else key
        sent = {"Authorization": f"Bearer {token}"} if token else {}
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", **sent, **(headers or {})})
            reply = connection.getresponse()
            names = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(reply.status, names, reply.read())
        finally:
            connection.close()

    def chat(self, model: str, *, key: str | None = "own", headers: Mapping[str, str] | None = None) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        return self.request("POST", "/v1/chat/completions", body, key=key, headers=headers)


@contextlib.contextmanager
def serving(
    folder: Path,
    *args: str | Path,
    env: Mapping[str, str | None] | None = None,
    command: tuple[str, ...] = XENIOS,
    port: str | None = "0",
    pass_fds: Sequence[int] = (),
) -> Iterator[Running]:
    """`xenios serve ARGS` in `folder`, on a free port; at the end TERM, and it must exit with 0.

    Whatever happens, it does not outlive the context.
    """
    placed = ["--port", port] if port is not None else []
    with (folder / "access.log").open("ab") as out:
        process = subprocess.Popen(
            [*command, "serve", *map(str, args), *placed],
            cwd=folder,
            env=environment(env),
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
    assert process.stderr is not None
    try:
        banner = _banner(process)
        rest: list[str] = []
        # its pipe must not fill up
        reader = threading.Thread(target=rest.extend, args=(process.stderr,), daemon=True)
        reader.start()
        url = re.search(r"https?://\S+", banner)
        assert url is not None, banner
        kept = next((p for p in folder.rglob("bootstrap_key")), None)
        yield Running(url[0], kept.read_text().strip() if kept else None, banner, folder, process.pid, rest)
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
        reader.join()
        assert code == 0, "".join(rest)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


@contextlib.asynccontextmanager
async def serving_beside(folder: Path, *args: str | Path, **kwargs: Any) -> AsyncIterator[Running]:
    """The same, beside a server of the test's own event loop, which must not stand still meanwhile."""
    stack = contextlib.ExitStack()
    running = await asyncio.to_thread(stack.enter_context, serving(folder, *args, **kwargs))
    try:
        yield running
    finally:
        await asyncio.to_thread(stack.close)


def _banner(process: subprocess.Popen[str]) -> str:
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if line.startswith("for chunk in stream"):
            process.stderr.readline()  # an empty line ends it
            return "".join(lines)
    raise AssertionError(f"xenios serve ended with {process.wait()}:\n{''.join(lines)}")
