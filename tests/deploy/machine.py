"""A Debian as a provider hands it out, with what an installation fetches already there: it boots without a network."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deploy import debian
from tests.integration.process import REPOSITORY

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
    return debian.tree(f"machine-{RELEASE}", RELEASE, _fetched, f"--include={','.join(BARE)}")


def _fetched(tree: Path) -> None:
    debian.run(["chroot", tree, "apt-get", "update"])
    debian.run(["chroot", tree, "apt-get", "install", "--yes", "--download-only", "--no-install-recommends", *FETCHED])
    (tree / "etc" / "machine-id").write_text("")  # a first boot makes it
