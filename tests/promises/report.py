"""`make promises`: which promises are proven, by which tests, and what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.promises.clauses import ROOT, Promise, Promises, load


def main() -> int:
    promises = load()
    proofs = collect()
    print(table(promises, proofs))
    print()
    for name in promises.clauses:
        for function, cases in proofs.get(name, {}).items():
            print(f"{name:22} {function}" + (f" ({cases} cases)" if cases > 1 else ""))
    wrong = faults(promises, proofs)
    print("\n" + "\n".join(wrong) if wrong else f"\nAll clauses due by issue {promises.current} have their tests.")
    return 1 if wrong else 0


def collect(root: Path = ROOT) -> dict[str, Counter[str]]:
    """Clause → test function → number of its cases, of every test in the tree. Exits if one can't be collected."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "collected.json"
        command = ["-m", "pytest", "--collect-only", "-qq", "-p", "tests.promises.recorder", "--promises-out", str(out)]
        run = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, check=False)
        # 5: no test is marked
        if run.returncode not in {0, 5} or not out.exists():
            sys.exit(f"The tests can't be collected:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
        tests = json.loads(out.read_text())["tests"]
    proofs: dict[str, Counter[str]] = {}
    for nodeid, test in tests.items():
        for clause in test["clauses"]:
            proofs.setdefault(clause, Counter())[function_of(nodeid)] += 1
    return proofs


def function_of(nodeid: str) -> str:
    """The test without its parameters."""
    path, _, name = nodeid.partition("::")
    return f"{path}::{name.partition('[')[0]}"


def state(promise: Promise, proofs: dict[str, Counter[str]]) -> str:
    """A promise is proven only when all its clauses are."""
    proven = sum(clause.name in proofs for clause in promise.clauses)
    return "proven" if proven == len(promise.clauses) else "partial" if proven else "owed"


def table(promises: Promises, proofs: dict[str, Counter[str]]) -> str:
    rows = [("promise", "state", "clauses with a test", "missing (issue that owes it)")]
    for promise in promises.promises:
        have = [c.name.partition(".")[2] for c in promise.clauses if c.name in proofs]
        missing = [f"{c.name.partition('.')[2]} ({c.issue})" for c in promise.clauses if c.name not in proofs]
        label = f"{promise.name} {promise.title}"
        rows.append((label, state(promise, proofs), ", ".join(have), ", ".join(missing)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def faults(promises: Promises, proofs: dict[str, Counter[str]]) -> list[str]:
    """What makes the report fail."""
    clauses = promises.clauses
    out = [f"Unknown clause {n!r}, marked on {', '.join(f)}." for n, f in proofs.items() if n not in clauses]
    for clause in clauses.values():
        if clause.name not in proofs and promises.due(clause):
            out.append(f"{clause.name} is due (issue {clause.issue}) and no test carries it.")
        if not clause.breaks and (promises.due(clause) or clause.name in proofs):
            out.append(f"{clause.name} names no break: nobody knows whether its test would notice.")
    return out


if __name__ == "__main__":
    sys.exit(main())
