"""A Debian as a provider hands it out, with what an installation fetches already there: it boots without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tools import CACHE, program

REPOSITORY = Path(__file__).resolve().parents[2]
MIRROR = os.environ.get("XENIOS_TEST_DEBIAN", "http://deb.debian.org/debian")
RELEASE, PYTHON = "bookworm", "3.11"
BARE = ("systemd", "systemd-sysv", "dbus", "python3", "python3-apt", "ca-certificates")
FETCHED = ("python3-venv", "curl", "openssl", "nftables", "postgresql", "postgresql-client", "redis-server", "caddy")


def fresh(folder: Path) -> None:
    """Make the tree in `folder`: as bare as it comes, its packages and wheels only fetched."""
    subprocess.run(["cp", "--archive", _bare(), folder], check=True)
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", wheels]
    locked = (REPOSITORY / "requirements" / "run.txt").read_text()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(re.sub(r" ; .* \\$", r" \\", locked, flags=re.MULTILINE))  # its Python is another than this one
        file.flush()
        options = [
            "--no-deps",
            "--python-version",
            PYTHON,
            "--only-binary",
            ":all:",
            "--require-hashes",
            "-r",
            file.name,
        ]
        subprocess.run([*command, *options], check=True)


def wheel(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    subprocess.run([*command, REPOSITORY], check=True)
    return next(folder.glob("xenios-*.whl"))


def _bare() -> Path:
    target = CACHE / f"machine-{RELEASE}"
    if target.exists():
        return target
    debootstrap, _ = program("debootstrap", "usr/sbin", "debootstrap")
    scripts = debootstrap.parents[1] / "share" / "debootstrap"
    CACHE.mkdir(exist_ok=True)
    side = Path(tempfile.mkdtemp(dir=CACHE))
    side.chmod(0o755)
    env = {**os.environ, "DEBOOTSTRAP_DIR": str(scripts)}
    _quiet([debootstrap, "--variant=minbase", f"--include={','.join(BARE)}", RELEASE, side, MIRROR], env)
    _quiet(["chroot", side, "apt-get", "update"])
    _quiet(["chroot", side, "apt-get", "install", "--yes", "--download-only", "--no-install-recommends", *FETCHED])
    (side / "etc" / "machine-id").write_text("")  # a first boot makes it
    try:
        side.rename(target)
    except OSError:  # another was first
        shutil.rmtree(side)
    return target


def _quiet(command: list[object], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr)[-2000:]}")
