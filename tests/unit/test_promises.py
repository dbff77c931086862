import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.promises import check, report
from tests.promises.clauses import HERE, ROOT, BreakDoesNotApply, apply, load, paths

PROMISES = load()
BREAKS = sorted((HERE / "breaks").glob("*.patch"))


def test_all_promises_are_split_into_clauses():
    """P1 to P17 are there, and each clause says in words what it promises."""
    assert [p.name for p in PROMISES.promises] == [f"P{n}" for n in range(1, 18)]
    assert all(c.text.endswith(".") for c in PROMISES.clauses.values())


def test_every_break_belongs_to_the_clause_that_it_is_named_after():
    """No patch lies about unused, and none is missing."""
    named = {path: clause.name for clause in PROMISES.clauses.values() for path in clause.breaks}
    assert sorted(named) == BREAKS
    assert all(path.stem.partition("-")[0] == clause for path, clause in named.items())


def test_every_due_clause_has_a_break():
    """A clause that is due can be checked."""
    assert [c.name for c in PROMISES.clauses.values() if PROMISES.due(c) and not c.breaks] == []


@pytest.mark.parametrize("patch", BREAKS, ids=lambda path: path.stem)
def test_every_break_applies_to_the_code_as_it_is(patch, tmp_path):
    """Who changes the code that a break breaks writes the break anew."""
    for path in paths(patch):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for path in apply(patch, tmp_path):
        changed = (tmp_path / path).read_text()
        assert changed != (ROOT / path).read_text()
        if path.endswith(".py"):  # a document's table can be broken too
            compile(changed, path, "exec")


@pytest.mark.parametrize(
    ("patch", "complaint"),
    [
        ("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-gone\n+new\n", "fits in 0 places"),
        ("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-twice\n+new\n", "fits in 2 places"),
        ("--- a/y.py\n+++ b/y.py\n@@ -1 +1 @@\n-twice\n+new\n", "there is no y.py"),
        ("twice -> new\n", "not a unified diff"),
    ],
)
def test_a_break_that_does_not_fit_says_which(patch, complaint, tmp_path):
    """A break that no longer applies is an error with its name, never a clause that seems proven."""
    (tmp_path / "x.py").write_text("twice\nonce\ntwice\n")
    (tmp_path / "P1.x.patch").write_text(patch)
    with pytest.raises(BreakDoesNotApply, match=f"P1.x.patch.*{complaint}"):
        apply(tmp_path / "P1.x.patch", tmp_path)


def test_a_break_is_applied_wherever_its_code_went(tmp_path):
    """Lines that moved don't matter."""
    (tmp_path / "x.py").write_text("new head\n\na\n\nb\nc\n")
    (tmp_path / "P1.x.patch").write_text("--- a/x.py\n+++ b/x.py\n@@ -1,3 +1,3 @@\n a\n \n-b\n+broken\n")
    assert apply(tmp_path / "P1.x.patch", tmp_path) == ["x.py"]
    assert (tmp_path / "x.py").read_text() == "new head\n\na\n\nbroken\nc\n"


def test_the_report_refuses_unknown_clauses_and_misses_due_ones():
    """A typo in a marker, or a due clause without test, fails the report."""
    proofs = {name: Counter(["t.py::t"]) for name, c in PROMISES.clauses.items() if PROMISES.due(c)}
    assert report.faults(PROMISES, proofs) == []
    assert "Unknown clause 'P1.byte', marked on t.py::t." in report.faults(
        PROMISES, {**proofs, "P1.byte": Counter(["t.py::t"])}
    )
    del proofs["P1.bytes"]
    assert report.faults(PROMISES, proofs) == ["P1.bytes is due (issue 2) and no test carries it."]


def test_a_promise_is_proven_only_when_all_its_clauses_are():
    """Until then it is partial, and the table says what is missing and who owes it."""
    promise = next(p for p in PROMISES.promises if p.name == "P3")
    assert report.state(promise, {}) == "owed"
    assert report.state(promise, {"P3.client": Counter("t")}) == "partial"
    assert report.state(promise, {"P3.client": Counter("t"), "P3.row": Counter("t")}) == "proven"
    line = report.table(PROMISES, {"P3.client": Counter("t")}).splitlines()[3]
    assert line.split() == ["P3", "truncation", "partial", "client", "row", "(3)"]


def results(**outcomes):
    return check.Result({f"t.py::{name}": outcome for name, outcome in outcomes.items()})


@pytest.mark.parametrize(
    ("result", "faults"),
    [
        (results(a="failed", b="failed"), []),
        (results(a="failed", b="passed"), ["t.py::b passes under every break"]),
        (results(a="passed", b="passed"), ["x.patch: no test fails", "t.py::a passes", "t.py::b passes"]),
        (results(a="error", b="failed"), ["t.py::a passes under every break"]),
        (
            results(a="error", b="error"),
            ["x.patch: no test fails, but a fixture of t.py::a does", "t.py::a", "t.py::b"],
        ),
        ("x.patch: the broken code can't be imported", ["x.patch: the broken", "t.py::a", "t.py::b"]),
    ],
)
def test_only_a_test_that_fails_by_itself_proves_a_clause(result, faults):
    """A broken fixture or import proves nothing, nor does a marked test that the break leaves alone."""
    clause = PROMISES.clauses["P1.bytes"]
    baseline = results(a="passed", b="passed")
    baseline.clauses = {test: [clause.name] for test in baseline.outcomes}
    found = check.judge(clause, baseline, {HERE / "x.patch": result})
    assert len(found) == len(faults)
    assert all(text.startswith(start) for text, start in zip(found, faults, strict=True))


def test_a_test_that_fails_anyway_proves_nothing():
    """What fails on the code as it is can't notice a break."""
    clause = PROMISES.clauses["P1.bytes"]
    baseline = results(a="failed")
    baseline.clauses = {"t.py::a": [clause.name]}
    assert check.judge(clause, baseline, {HERE / "x.patch": results(a="failed")}) == [
        "t.py::a fails on the code as it is",
        "x.patch: no test fails",
    ]


def test_tests_of_a_copy_run_against_the_copy_and_not_the_installed_gateway(tmp_path):
    """Tests, and processes that they start, import the broken code, though the real one is installed."""
    for name in ("gateway", "plugins/gateway_plugins", "tests/promises"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import subprocess, sys, pathlib, pytest\n"
        "HERE = str(pathlib.Path(__file__).parent.parent)\n"
        "PROGRAM = 'import gateway.pipeline, gateway_plugins.fallback as f; print(gateway.__file__, f.__file__)'\n"
        "@pytest.mark.promise('P1.bytes')\n"
        "def test_it():\n"
        "    out = subprocess.run([sys.executable, '-c', PROGRAM], cwd='/', capture_output=True, text=True).stdout\n"
        "    assert [path.startswith(HERE) for path in out.split()] == [True, True]\n"
        "@pytest.mark.promise('P3.client')\n"
        "def test_another(): raise AssertionError\n"
    )
    found = check.run_tests(tmp_path, ["P1.bytes"], ["tests/test_it.py"])
    assert found.outcomes == {"tests/test_it.py::test_it": "passed"}
    with pytest.raises(check.Trouble, match="not against the copy"):
        check._demand_within(tmp_path, [str(ROOT / "gateway")])


def test_markers_name_known_clauses():
    """Every marker in the tree names a clause that exists; a cheap look at the text, `make promises` collects them."""
    files = (path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    names = {name for path in files for name in re.findall(r'promise\("([^"]+)"', path.read_text())}
    assert sorted(names - set(PROMISES.clauses)) == []
