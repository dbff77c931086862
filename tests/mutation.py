"""`make mutation`: mutmut changes the core's logic place by place; a unit test must fail for each change.

Runs in a copy, `mutants/`. Which files are changed and which tests run: `[tool.mutmut]` in pyproject.toml.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "mutants"
COPIED = (
    "gateway",
    "plugins/gateway_plugins",
    "config",
    "tests/conftest.py",
    "tests/unit",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
MUTMUT = Path(sys.executable).with_name("mutmut")
# Measured: 90. Messages cut differently, limits off by one and what runs at import (mutmut can't see it fail) make the
# rest.
LEAST = 87.0


def copy() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    for name in COPIED:
        source, target = ROOT / name, COPY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def mutmut(*args: str) -> str:
    done = subprocess.run([MUTMUT, *args], cwd=COPY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mutmut {' '.join(args)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    copy()
    mutmut("run", "--max-children", "2")
    mutmut("export-cicd-stats")
    stats = json.loads((COPY / "mutants" / "mutmut-cicd-stats.json").read_text())
    killed = stats["killed"] + stats["timeout"]
    for line in sorted(mutmut("results").splitlines()):
        print(line.strip())
    score = 100 * killed / stats["total"]
    print(f"{killed} of {stats['total']} changes were noticed: {score:.1f} % (at least {LEAST:g} %)")
    if score < LEAST:
        sys.exit(1)


if __name__ == "__main__":
    main()
