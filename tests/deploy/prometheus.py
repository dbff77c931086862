"""A real Prometheus and its promtool: on the PATH, else Debian's package, fetched and unpacked, not installed."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.tools import free_port, program


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    tool, env = program("promtool", "usr/bin", "prometheus")
    return subprocess.run(
        [tool, *args], capture_output=True, text=True, timeout=100, check=False, env={"PATH": "/usr/bin", **env}
    )


class Prometheus:
    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str) -> Any:
        """What its API tells at `/api/v1/PATH`."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/{path}")
            reply = connection.getresponse()
            data = json.loads(reply.read())
            assert data["status"] == "success", data
            return data["data"]
        finally:
            connection.close()

    def ask(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Labels to value, now."""
        found = self.get(f"query?query={quote(expression)}")["result"]
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in found}

    def until(self, path: str, good: Callable[[Any], Any], seconds: float = 30.0) -> Any:
        """What `good` finds in what the API tells, once it finds something."""
        end = time.monotonic() + seconds
        while True:
            told = self.get(path)
            if found := good(told):
                return found
            assert time.monotonic() < end, json.dumps(told, indent=1)[:4000]
            time.sleep(0.05)  # noqa: TID251 - it asks another process


@contextlib.contextmanager
def prometheus(config: Path) -> Iterator[Prometheus]:
    """It runs with this configuration for the time of the context."""
    server, env = program("prometheus", "usr/bin", "prometheus")
    port = free_port()
    with (config.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                server, "--config.file", config, "--storage.tsdb.path", config.parent / "data",
                "--web.listen-address", f"127.0.0.1:{port}", "--log.level", "warn",
            ],
            stdout=log, stderr=log, env={"PATH": "/usr/bin", **env},
        )  # fmt: skip
    try:
        running = Prometheus(port)
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError, ValueError):
                running.get("status/runtimeinfo")
                break
            said = (config.parent / "prometheus.log").read_text()
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Prometheus did not start: {said[-2000:]}")
            time.sleep(0.05)  # noqa: TID251 - it asks another process
        yield running
    finally:
        process.kill()
        process.wait()
