"""The real `xenios serve`, as a process of its own, for the time of a context."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.process import environment

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "config" / "xenios.yaml"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Served:
    """A running gateway. `banner`: the lines that it greeted with; `log`: its standard output."""

    url: str
    key: str
    banner: tuple[str, ...]
    log: Path

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


@contextlib.contextmanager
def served(folder: Path, config: Path = SHIPPED, within: float = 20.0) -> Iterator[Served]:
    """Start it in `folder` on a free port without an upstream key; at the end TERM, and it must exit with 0.

    `within`: seconds that it may take to stop. Whatever happens, it does not outlive the context.
    """
    log = folder / "stdout.log"
    command = [str(BIN / "xenios"), "serve", "--config", str(config), "--port", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=out, stderr=subprocess.PIPE, text=True
        )
    try:
        banner = _banner(process)
        rest: list[str] = []
        # its pipe must not fill up
        reader = threading.Thread(target=rest.extend, args=(process.stderr,), daemon=True)
        reader.start()
        url = re.search(r"http://\S+", banner[0])
        assert url is not None, banner
        key = (folder / ".xenios" / "bootstrap_key").read_text().strip()
        yield Served(url[0], key, tuple(banner), log)
        process.send_signal(signal.SIGTERM)
        code = process.wait(within)
        reader.join()
        # warnings may stand there: that the loop was held up, on a busy machine
        failures = [line for line in rest if "Traceback" in line or '"level":"error"' in line]
        assert (code, failures) == (0, []), "".join(rest)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def plain_environment() -> dict[str, str]:
    """For clients: nothing of the gateway's, nothing that would make an SDK ask elsewhere, no coverage tracing.

    CPython 3.11's tracing breaks anyio's sockets ("invalid state"), so async clients run untraced.
    """
    return {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}


def _banner(process: subprocess.Popen[str]) -> list[str]:
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if line.startswith("for chunk in stream"):
            # one empty line ends it
            process.stderr.readline()
            return lines
    raise AssertionError(f"xenios serve ended with {process.wait()}:\n" + "\n".join(lines))
