"""Two gateways that are not there: what they would tell Prometheus, with every metric, and two values of each label."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.deploy.known import VALUES, metrics

_CHOICES = {
    **{label: sorted(values) for label, values in VALUES.items()},
    "endpoint": ["chat/completions", "/health/ready"],
    "status": ["200", "503"],
    "cause": ["ok", "auth"],
    "task": [""],
}


def exposition(age: float) -> str:
    """As text, by a gateway that counts something of each each second."""
    lines = []
    for name, (kind, labels) in metrics().items():
        lines.append(f"# TYPE {name} {kind}")
        choices = [_CHOICES.get(label, ["a", "b"]) for label in labels]
        for row in itertools.product(*choices):
            told = [f'{label}="{value}"' for label, value in zip(labels, row, strict=True)]
            if kind == "histogram":
                bounds = ((0.01, 0.5), (0.16, 0.9), ("+Inf", 1.0))
                lines += [_line(f"{name}_bucket", [*told, f'le="{le}"'], int(age * 100 * part)) for le, part in bounds]
                lines += [_line(f"{name}_sum", told, age), _line(f"{name}_count", told, int(age * 100))]
            elif name.endswith("_timestamp_seconds"):
                lines.append(_line(name, told, int(time.time())))
            else:
                lines.append(_line(name, told, age if kind == "counter" else 1))
    return "\n".join(lines) + "\n"


def _line(name: str, labels: list[str], value: float) -> str:
    return f"{name}{{{','.join(labels)}}} {value}"


@contextlib.contextmanager
def exporters(count: int) -> Iterator[list[str]]:
    """Their addresses."""
    began = time.time() - 1000
    metrics()  # here, once, and not in a thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(exposition(time.time() - began).encode())

        def log_message(self, *_: object) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield [f"127.0.0.1:{server.server_port}" for server in servers]
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
