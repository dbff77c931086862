"""deploy/grafana: dashboards that Grafana loads, and that ask for nothing that isn't there."""

from __future__ import annotations

import json
import re
import runpy

import pytest
import yaml

from tests.deploy.known import VALUES, metrics
from tests.deploy.prometheus import promtool
from tests.deploy.promql import faults, result
from tests.deploy.promql import metrics as named
from tests.deploy.test_rules import DEPLOY, with_recorded

FOLDER = DEPLOY / "grafana"
FILES = sorted((FOLDER / "dashboards").glob("*.json"))
KINDS = {"timeseries", "stat", "table", "bargauge", "state-timeline", "heatmap"}
# Grafana's ids; what it does not know it writes behind the number.
UNITS = {
    "short", "s", "bytes", "reqps", "ops", "percentunit", "currencyUSD", "dateTimeAsIso", "dateTimeFromNow",
}  # fmt: skip
VARIABLES = {"datasource", "instance", "endpoint", "model"}


def loaded(file):
    return json.loads(file.read_text())


def readable(expression, **values):
    """As Grafana asks Prometheus: with values for its variables; everything is chosen."""
    own = {"__rate_interval": "1m", "__range": "1h", **dict.fromkeys(VARIABLES, ".*"), **values}
    return re.sub(r"\$(\w+)", lambda match: own[match[1]], expression)


def panels(file):
    return [panel for panel in loaded(file)["panels"] if panel["type"] != "row"]


def expressions(file):
    """(panel's title, expression, legend), the annotations' too."""
    found = [(p["title"], t["expr"], t["legendFormat"]) for p in panels(file) for t in p["targets"]]
    noted = loaded(file)["annotations"]["list"]
    return [*found, *((note["name"], note["expr"], note["textFormat"]) for note in noted)]


each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_the_files_are_what_make_py_makes():
    """Nobody edits the JSON by hand, and nobody forgets `make dashboards`."""
    made = runpy.run_path(str(FOLDER / "make.py"))
    assert {file.name: file.read_text() for file in FILES} == {name: made["text"](name) for name in made["DASHBOARDS"]}


def test_there_are_two():
    """With the names and the stable ids that links and provisioning rely on."""
    assert {(d["uid"], d["title"]) for d in map(loaded, FILES)} == {
        ("xenios-traffic", "Xenios: traffic and cost"),
        ("xenios-health", "Xenios: health and limits"),
    }


@each
def test_a_dashboard_is_sound(file):
    """Ids are unique, panels don't overlap, each says what it shows in which unit, and asks the chosen Prometheus."""
    board = loaded(file)
    assert board["schemaVersion"] >= 41
    assert {v["name"] for v in board["templating"]["list"]} == VARIABLES
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
    titles = [panel["title"] for panel in panels(file)]
    assert len(titles) == len(set(titles))
    for panel in panels(file):
        assert panel["type"] in KINDS
        assert panel["description"].endswith("."), panel["title"]
        config = panel["fieldConfig"]
        set_apart = [p["value"] for o in config["overrides"] for p in o["properties"] if p["id"] == "unit"]
        assert {config["defaults"]["unit"], *set_apart} <= UNITS, panel["title"]
        assert panel["targets"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@each
def test_an_expression_asks_for_what_exists(file):
    """Metrics, labels, values, variables; legends name labels that come out."""
    there = with_recorded()
    for title, expression, legend in expressions(file):
        assert faults(expression, there, VALUES) == [], title
        kept = result(expression, there) | ({"le"} if "by (le)" in expression else set())
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept, title
    for panel in panels(file):
        if panel["type"] == "table":
            [shown] = [t["options"]["renameByName"] for t in panel["transformations"] if t["id"] == "organize"]
            labels = {label for label in shown if not label.startswith("Value")}
            assert labels <= set().union(*(result(t["expr"], there) for t in panel["targets"])), panel["title"]


@each
def test_prometheus_can_read_every_expression(file, tmp_path):
    """promtool takes them as rules."""
    asked = [
        {"record": f"checked:number_{n}", "expr": readable(expression)}
        for n, (_, expression, _) in enumerate(expressions(file))
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "checked", "rules": asked}]}))
    checked = promtool("check", "rules", tmp_path / "rules.yml")
    assert checked.returncode == 0, checked.stderr
    assert f"{len(asked)} rules found" in checked.stdout


def test_every_metric_is_on_a_dashboard():
    """An operator finds whatever the gateway counts (but its twins under GenAI's names)."""
    asked = {name for file in FILES for _, expression, _ in expressions(file) for name, _ in named(expression)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} | asked
    assert {name for name in metrics() if name.startswith("xenios_")} - shown == set()


def test_provisioning_names_what_is_there():
    """The data source's interval is the one that Prometheus scrapes with, on which `$__rate_interval` depends."""
    source = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["type"], source["jsonData"]["timeInterval"]) == ("prometheus", scrape)
    provider = yaml.safe_load((FOLDER / "provisioning/dashboards/xenios.yaml").read_text())["providers"][0]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
