"""The oldest RQ that `pyproject.toml` admits: installed beside the tests' own, which is the newest that there is."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tools import CACHE

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_queue.py", "test_worker.py", "test_outages.py", "test_killed.py")


def oldest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        *(name for extra in project.get("optional-dependencies", {}).values() for name in extra),
    ]
    return next(found[1] for name in named if (found := re.match(r"rq>=([0-9.]+),", name)))


def installed(version):
    """Where it is; fetched once."""
    folder = CACHE / f"rq-{version}"
    if not (folder / "rq").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"rq=={version}"]
        subprocess.run(command, check=True)
    return folder


@pytest.mark.full
@pytest.mark.timeout(900)
def test_all_of_it_holds_on_the_oldest_rq():
    """What the queue and the worker promise, outages and kills too, holds on the oldest RQ that may be installed."""
    place = str(installed(oldest()))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([place, str(ROOT), str(ROOT / "plugins")])}
    told = [sys.executable, "-c", "import rq; print(rq.__file__)"]
    assert subprocess.run(told, env=env, capture_output=True, text=True, check=True).stdout.startswith(place)
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    ended = subprocess.run(tests, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
