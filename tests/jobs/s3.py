"""An S3-compatible server: moto, which needs other versions than we lock, in an environment of its own."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.tools import CACHE, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("moto[s3]==5.2.5", "flask", "flask-cors")  # its extra `server` is for all of AWS
BUCKET = "files"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Its address; it has a bucket `files` and believes every key."""
    port = free_port()
    process = subprocess.Popen(
        [_installed() / "bin/moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _installed() -> Path:
    """Once per version; test runs side by side wait for each other."""
    CACHE.mkdir(exist_ok=True)
    folder = CACHE / "moto"
    stamp = folder / ".installed"
    with (CACHE / "moto.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != " ".join(PACKAGES):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=60)
            pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
            done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-1000:]
            stamp.write_text(" ".join(PACKAGES))
    return folder


def _make_bucket(port: int, process: subprocess.Popen[bytes]) -> None:
    """As soon as it listens."""
    deadline = time.monotonic() + 30
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"moto_server ended with {process.wait(0.05)}") from None
        finally:
            connection.close()
