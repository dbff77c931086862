"""Programs that tests need and no wheel brings: the machine's own, else Debian's package, unpacked and not installed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

DISK = Path(os.environ.setdefault("XENIOS_TEST_DISK", tempfile.gettempdir()))  # for what is large, or is kept
CACHE = DISK / f"xenios-test-tools-{os.getuid()}"
MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes


def keep_files_in_memory() -> None:
    """Where there is plenty of it. A disk that stands still for 200 ms makes every store look as if it were away."""
    try:
        about = os.statvfs(MEMORY)
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return  # no Linux
    available = int(told["MemAvailable"].split()[0]) * 1024
    room = min(about.f_bavail * about.f_frsize, available)
    if room >= ROOM and not about.f_flag & os.ST_NOEXEC and os.access(MEMORY, os.W_OK | os.X_OK):
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


def free_port() -> int:
    """For a server that can't say which it took. Not of those that outgoing connections get, of which other tests make
    hundreds meanwhile: from 32768 on, on macOS from 49152.
    """
    chance = secrets.SystemRandom()  # hypothesis seeds the other, alike in both processes
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port := chance.randrange(20_000, 32_000)))
            return port


def program(name: str, folder: str, *packages: str) -> tuple[Path, dict[str, str]]:
    """The program and what its environment must hold; `folder`: where the first of Debian's packages has it."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found:
        return Path(found), {}
    root = _unpacked(name, packages)
    libraries = ":".join(sorted({str(file.parent) for file in root.rglob("*.so*")}))
    return root / folder / name, {"LD_LIBRARY_PATH": libraries} if libraries else {}


def _unpacked(name: str, packages: tuple[str, ...]) -> Path:
    target = CACHE / packages[0]
    if target.exists():
        return target
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"No {name} for the tests: install it so that it is on the PATH.")
    CACHE.mkdir(exist_ok=True)
    CACHE.chmod(0o755)
    side = Path(tempfile.mkdtemp(dir=CACHE))
    side.chmod(0o755)
    fetched = _fetch(packages, side)
    if fetched.returncode:  # no lists of packages yet
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
        fetched = _fetch(packages, side)
    if fetched.returncode:
        raise RuntimeError(f"{name} is not here, and: {fetched.stderr.decode()[-500:]} Install it.")
    for package in side.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, side], check=True)
        package.unlink()
    try:
        side.rename(target)
    except OSError:  # another was first
        shutil.rmtree(side)
    return target


def _fetch(packages: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, check=False)
