"""The units of deploy/systemd, as systemd judges them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.process import REPOSITORY, XENIOS
from tests.tools import program

UNITS = REPOSITORY / "deploy" / "systemd"
SERVICES = ("xenios@.service", "xenios-worker@.service")


def analyze(*args: str | Path) -> subprocess.CompletedProcess[str]:
    tool, env = program(
        "systemd-analyze", "usr/bin", "systemd", "libsystemd-shared", "libkmod2", "libip4tc2", "libseccomp2"
    )
    return subprocess.run(
        [tool, *args], capture_output=True, text=True, timeout=60, check=False, env={"PATH": "/usr/bin", **env}
    )


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say of any of them, but that nobody has installed the program here."""
    files = sorted(UNITS.glob("xenios*"))
    assert {file.name for file in files} > set(SERVICES)
    for file in files:
        (tmp_path / file.name).write_text(file.read_text().replace("/opt/xenios/%i/bin/xenios", XENIOS[0]))
    done = analyze("verify", "--man=no", *sorted(tmp_path.iterdir()))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_they_may_do_little(name: str) -> None:
    """Whoever broke into a gateway or worker could do little with it: `systemd-analyze security` says 2.0 or less."""
    done = analyze("security", "--offline=true", "--threshold=20", UNITS / name)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert (done.returncode, float(found[1]) <= 2.0) == (0, True), done.stdout
