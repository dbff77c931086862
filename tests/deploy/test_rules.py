"""deploy/prometheus: Prometheus takes it, alerts fire when they should and are quiet when not, runbooks are there."""

from __future__ import annotations

import re

import pytest
import yaml

from gateway.core_routes import add_core_routes
from gateway.dialects import DIALECTS, PLAIN_DIALECT
from gateway.health import Health
from gateway.routes import Router
from gateway.settings import CatalogueSettings, ServerSettings, UpstreamPolicy
from tests.deploy.known import VALUES, known
from tests.deploy.prometheus import promtool
from tests.deploy.promql import faults, result
from tests.integration.process import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
FOLDER = DEPLOY / "prometheus"
README = DEPLOY / "README.md"


def rules(file):
    return [rule for group in yaml.safe_load((FOLDER / file).read_text())["groups"] for rule in group["rules"]]


def with_recorded():
    """What exists once the recording rules run."""
    found = known()
    for rule in rules("recording.yml"):
        found[rule["record"]] = result(rule["expr"], found)
    return found


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}


def test_prometheus_takes_the_configuration(tmp_path):
    """The file as it is, with its rules; a token beside it is all that is missing."""
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    without = promtool("check", "config", tmp_path / "prometheus.yml")
    assert without.returncode != 0
    assert "xenios_metrics_token" in without.stderr
    (tmp_path / "xenios_metrics_token").write_text("secret")
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    assert f"{len(ALERTS)} rules found" in checked.stdout
    assert f"{len(rules('recording.yml'))} rules found" in checked.stdout


def test_what_is_commented_out_is_sound_too(tmp_path):
    """Several gateways behind one name, and an Alertmanager: without the `#` Prometheus takes both."""
    text = (FOLDER / "prometheus.yml").read_text()
    text = re.sub(r"^    static_configs:\n.*\n", "", text, flags=re.MULTILINE)
    text, count = re.subn(
        r"^( *)# (alerting:|  alertmanagers:|    - static_configs:|        - targets: \[al|dns_sd_configs:|  - names:|    type:|    port:)",
        r"\1\2",
        text,
        flags=re.MULTILINE,
    )
    assert count == 8
    (tmp_path / "prometheus.yml").write_text(text)
    checked = promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    [job] = yaml.safe_load(text)["scrape_configs"]
    assert job["dns_sd_configs"] == [{"names": ["xenios"], "type": "A", "port": 8080}]


def test_alerts_fire_when_they_should_and_not_otherwise():
    """Each alert by a scenario of its own, a whole day's noise by none."""
    tested = promtool("test", "rules", FOLDER / "alerts_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    expected = re.findall(r'ALERTS\{alertname="(\w+)", alertstate="firing"', (FOLDER / "alerts_test.yml").read_text())
    assert set(expected) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name):
    """Who it is for, what is wrong, what to do first, and a line in the runbook; every label that it names is there."""
    rule = ALERTS[name]
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert "First: " in rule["annotations"]["description"]
    assert rule["annotations"]["runbook"] == f"deploy/README.md#{name.lower()}"
    texts = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", texts)) <= result(rule["expr"], with_recorded())


def test_each_alert_is_in_the_runbook():
    """deploy/README.md has a heading for each, with its severity, and none for what is no alert."""
    told = dict(re.findall(r"^#### (Xenios\w+)\n\n(critical|warning): ", README.read_text(), re.MULTILINE))
    assert told == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}


def test_the_runbook_names_settings_that_exist():
    """Nobody looks at night for a setting that has another name."""
    text = README.read_text() + (FOLDER / "alerts.yml").read_text()
    sections = {"server": ServerSettings, "upstream": UpstreamPolicy, "catalogue": CatalogueSettings}
    named = re.findall(r"(?<![\w.])(server|upstream|catalogue)\.([a-z_]+)", text)
    assert len(named) >= 4
    assert [(section, name) for section, name in named if name not in sections[section].model_fields] == []


@pytest.mark.parametrize(
    "rule", [*rules("recording.yml"), *ALERTS.values()], ids=lambda rule: rule.get("alert") or rule["record"]
)
def test_a_rule_asks_for_what_exists(rule):
    """Every metric, label and value of a label in it is one that the gateway tells."""
    assert faults(rule["expr"], with_recorded(), VALUES) == []


def test_requests_for_models_are_told_from_others():
    """The pattern that leaves out health checks and lists leaves out each endpoint that no model answers, and no other."""
    texts = [(FOLDER / "recording.yml").read_text(), (DEPLOY / "grafana/make.py").read_text()]
    [pattern] = {found for text in texts for found in re.findall(r'endpoint!~"([^"]+)"', text)}
    router = Router(DIALECTS, PLAIN_DIALECT)
    add_core_routes(router, Health(lambda: False))
    endpoints = {route.endpoint for route in router._routes} | {"unmatched", "/metrics", "/admin/reload"}
    assert {e for e in endpoints if not re.fullmatch(pattern, e)} == set(DIALECTS)


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("xenios_request_total > 0", "no metric xenios_request_total"),
        ("xenios_request_duration_seconds > 0", "no metric xenios_request_duration_seconds"),
        ('rate(xenios_requests_total{modell="a"}[5m])', "xenios_requests_total has no label modell"),
        ('xenios_requests_total{outcome=~"ok|eror"}', "outcome is never eror"),
        ("sum by (job, store) (rate(xenios_requests_total[5m]))", "xenios_requests_total has no label store"),
        ("max(xenios_workers) / on (worker) sum by (job) (up)", "xenios_workers has no label worker"),
        ("sum(up) by (job)", "write `sum by (…) (…)`"),
    ],
)
def test_what_does_not_exist_is_found(expression, fault):
    """The check itself can fail."""
    assert fault in faults(expression, with_recorded(), VALUES)
