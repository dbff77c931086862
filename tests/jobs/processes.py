"""A gateway and its workers as processes, with one upstream for all of them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai

from tests.integration.process import XENIOS, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.process import Running


def sdk(gateway: Running) -> openai.AsyncOpenAI:
    """OpenAI's client for it, which is told of each failure."""
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)


def configured(
    folder: Path, upstream: str, redis: str, *, plugins: tuple[Any, ...] = (), database: str = "sqlite", **jobs: Any
) -> Path:
    """A configuration in `folder` with keys, usage and jobs."""
    config = folder / "xenios.yaml"
    settings = {
        "server": {"host": "127.0.0.1", "port": 0, "data_dir": str(folder / "data")},
        "services": {"redis": redis, "database": {"url": database, "migrate_on_start": True}},
        "upstreams": {"openrouter": {"base_url": upstream, "api_key": "sk-or-v1-test"}},
        "catalogue": {"refresh": 0},
        "plugins": [
            {"use": "api_keys", "config": {"database": True}},
            *plugins,
            {"use": "usage"},
            {"use": "jobs", "config": jobs},
        ],
    }
    config.write_text(json.dumps(settings))
    return config


@dataclass
class WorkerProcess:
    """`xenios worker`."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """As nobody can prepare for."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextlib.contextmanager
def workers(config: Path) -> Iterator[Any]:
    """Gives what starts one; none outlives the context."""
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        log = config.parent / f"worker-{len(started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*XENIOS, "worker", "--config", str(config)],
                cwd=config.parent,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        started.append(WorkerProcess(process, log))
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            if worker.process.poll() is None:
                worker.kill()


def memory(pid: int) -> tuple[int, int]:
    """(now, most so far) of a process in bytes."""
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return int(found["VmRSS"]) << 10, int(found["VmHWM"]) << 10
