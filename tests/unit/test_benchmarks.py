"""What the benchmark says of its figures; the figures themselves are no test's business."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.benchmarks import bench, figures, report
from tests.benchmarks.report import Column
from tests.benchmarks.sections import BARS, SECTIONS, Measure, Section

REQUEST = Measure("request", 3, 1.0, (1, 1.0))
COLUMN = Column("×yard", "request.cpu_ratio", ",.2f", compared=True)
SECTION = Section("core", "Core", ("yardstick", "xenios", "no-log"), (REQUEST,), (COLUMN,), beside="xenios")
MACHINE = {"cpu": "x", "cores": 2, "python": "3.11.7", "optimised_python": False, "aiohttp": "3", "uvloop": "0"}


def target(slug, *cpu_us):
    samples = [us and {"cpu_s": us / 1e6, "store_s": 0, "requests": 1, "errors": {}} for us in cpu_us]
    return SimpleNamespace(slug=slug, label=slug, samples={"request": samples}, idle={}, failed="")


def row(value, spread=0.0):
    return {"key": "xenios", "label": "xenios", "figures": {COLUMN.key: {"value": value, "spread": spread}}}


def test_ratios_and_costs_are_taken_round_by_round():
    """A slow round slows both, and one that failed counts for neither."""
    targets = [target("yardstick", 100, 200, 400), target("xenios", 150, 300, 600), target("no-log", 140, None, 520)]
    rows = figures.rows_of(SECTION, [REQUEST], {one.slug: one for one in targets})
    _, xenios, without = (one["figures"] for one in rows)
    assert xenios["request.cpu"]["value"] == pytest.approx(300)
    assert xenios["request.cpu_ratio"] == pytest.approx({"value": 1.5, "spread": 0})
    assert without["request.cost"] == pytest.approx({"value": 45, "spread": 35})


@pytest.mark.parametrize(
    ("recorded", "now", "said"),
    [
        (row(1.0), row(1.2), "SLOWER xenios: request.cpu ×yard 1.00 -> 1.20 (noise 0.05)"),
        (row(1.0), row(0.8), "better xenios: request.cpu ×yard 1.00 -> 0.80 (noise 0.05)"),
        (row(1.0), row(1.04), "nothing differs"),
        (row(1.0), row(1.2, spread=0.3), "nothing differs"),
        (row(1.0, spread=0.3), row(1.2), "nothing differs"),
    ],
)
def test_what_got_slower_is_said_beyond_the_noise_alone(recorded, now, said):
    """Who made the gateway slower is told; whose rounds lay apart is not."""
    document = {"date": "2026-11-26", "commit": "abc", "machine": MACHINE, "rows": [recorded]}
    lines = list(report.comparison(SECTION, document, [now], MACHINE))
    assert said in lines[-1]


def test_the_recorded_tables_are_those_of_the_record():
    """Nobody reads a table that `recorded.json` does not hold."""
    text = bench.README.read_text()
    recorded = report.recorded_text(SECTIONS.values(), json.loads(bench.RECORDED.read_text()))
    assert report.between_marks(text, recorded) == text


def test_every_bar_is_a_figure_that_is_measured():
    """A bar that nothing is held against would be met for good."""
    for name, key, _ in BARS:
        section = SECTIONS[name]
        commands = [" ".join(("xenios", *command)) for command in section.commands]
        assert key in commands or key.split()[0] in section.targets
