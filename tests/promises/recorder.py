"""A pytest plugin: which tests prove which clause, how each ended, and which gateway they ran against, as JSON.

`-p tests.promises.recorder --promises-out FILE [--promises-clause P1.bytes …]` (the latter runs only those tests).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("promises")
    group.addoption("--promises-out", type=Path)
    group.addoption("--promises-clause", action="append", default=[])


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--promises-out"):
        config.pluginmanager.register(Recorder(config), "promises-recorder")


class Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self._out: Path = config.getoption("--promises-out")
        self._wanted = set(config.getoption("--promises-clause"))
        self._tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left = [], []
        for item in items:
            clauses = sorted({str(name) for mark in item.iter_markers("promise") for name in mark.args})
            if clauses and (not self._wanted or self._wanted & set(clauses)):
                self._tests[item.nodeid] = {"clauses": clauses, "phases": {}, "why": ""}
                kept.append(item)
            else:
                left.append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._tests[report.nodeid]
        test["phases"][report.when] = report.outcome
        if report.failed and not test["why"]:
            crash = getattr(report.longrepr, "reprcrash", None)
            test["why"] = (crash.message if crash else str(report.longrepr)).partition("\n")[0][:200]

    def pytest_sessionfinish(self) -> None:
        import gateway
        import gateway_plugins

        sources = [str(Path(str(m.__file__)).parent) for m in (gateway, gateway_plugins)]
        self._out.write_text(json.dumps({"sources": sources, "tests": self._tests}))
