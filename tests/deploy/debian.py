"""Debian's own files as debootstrap lays them out, each kind once in the tests' cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.tools import CACHE, program


def tree(name: str, release: str, finish: Callable[[Path], None], *options: str) -> Path:
    """A minimal `release` in the folder `name` of the cache; `finish` is what is done to it when it is made."""
    target = CACHE / name
    if target.exists():
        return target
    debootstrap, _ = program("debootstrap", "usr/sbin", "debootstrap")
    scripts = debootstrap.parents[1] / "share" / "debootstrap"
    CACHE.mkdir(exist_ok=True)
    side = Path(tempfile.mkdtemp(dir=CACHE))
    side.chmod(0o755)
    run([debootstrap, "--variant=minbase", *options, release, side], {"DEBOOTSTRAP_DIR": str(scripts)})
    finish(side)
    try:
        side.rename(target)
    except OSError:  # another was first
        shutil.rmtree(side)
    return target


def run(command: list[str | Path], env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr)[-3000:]}")
