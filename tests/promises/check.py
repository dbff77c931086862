"""`make promises-check`: break each clause in a copy of the tree and see its tests fail there.

Every test that carries a clause must fail under one of the clause's breaks, and every break must make one fail: in the
test itself, not in a fixture or an import.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.promises.clauses import ROOT, BreakDoesNotApply, Clause, apply, load
from tests.promises.report import function_of

# pytest's exit codes
PASSED, FAILED, NO_TESTS = 0, 1, 5
RUN_SECONDS = 900
# Would make the runs in the copy measure or do something else.
_NOT_INHERITED = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "PYTEST_ADDOPTS", "PYTHONPATH")


class Trouble(Exception):
    """Nothing could be shown, in either direction."""


@dataclass
class Result:
    """How the tests of one run ended. Outcome: passed, failed (the test itself), error (a fixture)."""

    outcomes: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    clauses: dict[str, list[str]] = field(default_factory=dict)

    def having(self, outcome: str) -> list[str]:
        return [test for test, found in self.outcomes.items() if found == outcome]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make promises-check ARGS=…", description=__doc__)
    parser.add_argument("clause", nargs="*", help="only these (P1.bytes, or P1 for all of its clauses)")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="breaks tried at once")
    parser.add_argument("-v", "--verbose", action="store_true", help="show each failure")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="xenios-promises-") as folder:
        clean = Path(folder) / "clean"
        copy_tree(ROOT, clean)
        try:
            clauses = _choose(options.clause)
            print(f"{len(clauses)} clauses; first their tests on the code as it is …", flush=True)
            baseline = _baseline(clean, clauses)
        except Trouble as trouble:
            print(trouble)
            return 1
        with ThreadPoolExecutor(options.jobs) as pool:
            tries = {
                (clause.name, patch): pool.submit(_try, clause, patch, clean, baseline)
                for clause in clauses
                for patch in clause.breaks
            }
            bad = 0
            for clause in clauses:
                results = {patch: tries[clause.name, patch].result() for patch in clause.breaks}
                faults = judge(clause, baseline, results)
                bad += bool(faults)
                _say(clause, baseline, results, faults, verbose=options.verbose)
    print(f"\n{len(clauses) - bad} of {len(clauses)} clauses proven.")
    return 1 if bad else 0


def judge(clause: Clause, baseline: Result, results: dict[Path, Result | str]) -> list[str]:
    """Why the clause isn't proven; nothing if it is. A result that is a text is a run that showed nothing."""
    tests = [test for test, clauses in baseline.clauses.items() if clause.name in clauses]
    if not tests:
        return ["no test carries it"]
    if not clause.breaks:
        return ["it names no break"]
    faults = [f"{test} fails on the code as it is" for test in tests if baseline.outcomes[test] != "passed"]
    noticed: set[str] = set()
    for patch, result in results.items():
        if isinstance(result, str):
            faults.append(result)
            continue
        # a test that fails anyway notices nothing
        failed = [test for test in result.having("failed") if baseline.outcomes.get(test) == "passed"]
        noticed |= {function_of(test) for test in failed}
        if not failed:
            errors = result.having("error")
            faults.append(f"{patch.name}: no test fails" + (f", but a fixture of {errors[0]} does" if errors else ""))
    unmoved = sorted({function_of(test) for test in tests if baseline.outcomes[test] == "passed"} - noticed)
    return faults + [f"{function} passes under every break" for function in unmoved]


def copy_tree(source: Path, target: Path) -> None:
    """What git knows or would know: no environment, no caches."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def run_tests(tree: Path, clauses: list[str], files: list[str]) -> Result:
    """The tests of these clauses with the gateway of `tree`, whichever is installed. Raises Trouble."""
    out = tree / ".promises.json"
    command = [sys.executable, "-m", "pytest", "-qq", "-p", "tests.promises.recorder", "-p", "no:cacheprovider"]
    command += [f"--promises-out={out}", *(f"--promises-clause={name}" for name in clauses), *files]
    try:
        run = subprocess.run(
            command, cwd=tree, env=_environment(tree), capture_output=True, text=True, check=False, timeout=RUN_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Trouble(f"the tests did not end within {RUN_SECONDS} s") from None
    if run.returncode not in {PASSED, FAILED, NO_TESTS} or not out.exists():
        raise Trouble(f"pytest could not run (exit {run.returncode}):\n{(run.stdout + run.stderr)[-2000:]}")
    found = json.loads(out.read_text())
    _demand_within(tree, found["sources"])
    result = Result()
    for test, record in found["tests"].items():
        phases = record["phases"]
        result.clauses[test] = record["clauses"]
        result.why[test] = record["why"]
        if phases.get("call") == "failed":
            result.outcomes[test] = "failed"
        else:
            result.outcomes[test] = "passed" if set(phases.values()) == {"passed"} else "error"
    return result


def _environment(tree: Path) -> dict[str, str]:
    """`PYTHONPATH` stands before the editable install, for the tests and for every process that they start."""
    inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "plugins")])}


def _demand_within(tree: Path, sources: list[str]) -> None:
    strange = [source for source in sources if not Path(source).resolve().is_relative_to(tree.resolve())]
    if strange:
        raise Trouble(f"the tests ran against {strange}, not against the copy")


def _choose(wanted: list[str]) -> list[Clause]:
    """What was asked for, of a whole promise what has a break or is due. Raises Trouble for a name that isn't there."""
    promises = load()
    checkable = [c for c in promises.clauses.values() if c.breaks or promises.due(c)]
    if not wanted:
        return checkable
    chosen: list[Clause] = []
    for name in wanted:
        found = [c for c in checkable if c.name.startswith(f"{name}.")]
        found += [promises.clauses[name]] if name in promises.clauses else []
        if not found:
            raise Trouble(f"There is no clause {name!r} to check.")
        chosen += found
    return chosen


def _baseline(clean: Path, clauses: list[Clause]) -> Result:
    return run_tests(clean, [c.name for c in clauses], [])


def _try(clause: Clause, patch: Path, clean: Path, baseline: Result) -> Result | str:
    """The clause's tests in a copy that breaks it; a text if that shows nothing."""
    files = sorted({t.partition("::")[0] for t, clauses in baseline.clauses.items() if clause.name in clauses})
    if not files:
        return f"{patch.name}: not tried"
    tree = clean.parent / f"{clause.name}-{patch.stem}"
    shutil.copytree(clean, tree, ignore=shutil.ignore_patterns("__pycache__", ".promises.json"))
    try:
        apply(patch, tree)
        _demand_alive(tree)
        return run_tests(tree, [clause.name], files)
    except BreakDoesNotApply as error:
        return str(error)
    except Trouble as trouble:
        return f"{patch.name}: {trouble}"
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _demand_alive(tree: Path) -> None:
    """A break that crashes the gateway would fail any test, and prove none."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.promises.smoke"],
        cwd=tree, env=_environment(tree), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if run.returncode:
        raise Trouble(f"breaks more than its clause: {run.stderr.strip().rpartition(chr(10))[2]}")


def _say(
    clause: Clause, baseline: Result, results: dict[Path, Result | str], faults: list[str], *, verbose: bool
) -> None:
    print(f"\n{clause.name}: {'NOT PROVEN' if faults else 'ok'}")
    for fault in faults:
        print(f"  {fault}")
    for patch, result in results.items():
        if isinstance(result, str):
            continue
        failed = result.having("failed")
        print(f"  {patch.name}: {len(failed)} of {len(result.outcomes)} tests fail")
        for test in failed if verbose else ():
            print(f"    {test}: {result.why[test]}")
    if verbose:
        for test in baseline.having("failed") + baseline.having("error"):
            if clause.name in baseline.clauses[test]:
                print(f"    unbroken {test}: {baseline.why[test]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
