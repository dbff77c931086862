from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.process import Served, plain_environment, served


# One for all files: a model that answers 429 is left alone as it asked, so each test that wants one names its own (`-n1`).
@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`xenios serve` with the configuration that is shipped, as a newcomer has it: its simulation answers."""
    with served(tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture(scope="session")
def script(gateway: Served) -> Callable[[str], dict[str, Any]]:
    """Runs a script beside the tests as its own process with base URL and key; what it prints is JSON."""

    def run(name: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(Path(__file__).with_name(name)), gateway.url, gateway.key],
            env=plain_environment(),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
