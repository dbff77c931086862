"""A real Prometheus beside a real gateway: it scrapes, its rules run, and an outage makes their alert fire."""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

import pytest
import yaml

from tests.deploy.exporter import exporters
from tests.deploy.known import metrics
from tests.deploy.prometheus import prometheus
from tests.deploy.test_dashboards import FILES, expressions, readable
from tests.deploy.test_rules import ALERTS, FOLDER
from tests.integration.process import serving
from tests.stores.servers import valkey_server

TOKEN = "scrape-me-0123456789abcdef"


def gateway_file(folder, redis):
    """A gateway that counts in this Redis, and whose limit refuses while it is away."""
    limit = {"name": "all", "by": [], "requests": 10**6}
    config = {
        "server": {"host": "127.0.0.1", "data_dir": str(folder / "data"), "drain_delay": 0},
        "upstreams": {"openrouter": {"without_key": "simulate"}},
        "catalogue": {"refresh": 0},
        "services": {"redis": redis.url, "database": {"url": "sqlite", "migrate_on_start": True}},
        "plugins": [
            {"use": "metrics", "config": {"token": TOKEN}},
            {"use": "api_keys"},
            {"use": "routing"},
            {"use": "budgets"},
            {"use": "rate_limit", "config": {"limits": [limit], "on_store_error": "deny"}},
            {"use": "usage"},
            {"use": "jobs"},
            {"use": "fallback"},
        ],
    }
    (folder / "xenios.yaml").write_text(json.dumps(config))
    return folder / "xenios.yaml"


def quickened(folder, *addresses):
    """deploy/prometheus as it is, but that it scrapes these, four times a second, waits nowhere and looks back 10 s."""
    folder.mkdir()
    for file in FOLDER.glob("*.yml"):
        text = re.sub(r"^( *)for: \w+", r"\1for: 1s", file.read_text(), flags=re.MULTILINE)
        text = text.replace("[5m]", "[10s]")
        text = re.sub(r"_interval: \w+", "_interval: 250ms", text).replace("[xenios:8080]", json.dumps(addresses))
        (folder / file.name).write_text(text)
    (folder / "xenios_metrics_token").write_text(TOKEN)
    assert yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"] == [
        {"targets": list(addresses)}
    ]
    return folder / "prometheus.yml"


def healthy(answer):
    targets = answer["activeTargets"]
    return targets if {t["health"] for t in targets} == {"up"} else None


def run(answer):
    """Every rule, once each has run."""
    rules = [rule for group in answer["groups"] for rule in group["rules"]]
    return rules if all(rule["health"] == "ok" for rule in rules) else None


@pytest.mark.full
def test_an_outage_is_seen_in_a_real_prometheus(tmp_path):
    """Redis freezes: the alerts of the store and of the errors fire, and end when it is back."""
    of_it = {"XeniosGatewayErrors", "XeniosStoreDown"}
    with valkey_server() as valkey, serving(tmp_path, "--config", gateway_file(tmp_path, valkey)) as gateway:
        address = urlsplit(gateway.url).netloc
        assert gateway.request("GET", "/metrics", key=None).status == 401
        with prometheus(quickened(tmp_path / "prometheus", address)) as watching:
            [target] = watching.until("targets", healthy)
            assert target["labels"] == {"instance": address, "job": "xenios"}
            assert {rule["name"] for rule in watching.until("rules", run)} >= set(ALERTS)

            def counted(result):
                assert gateway.chat("openai/gpt-5-mini").status == 200
                return value(result) >= 5

            watching.until("query?query=sum(xenios_requests_total)", counted)
            assert not of_it & firing(watching.get("alerts"))
            valkey.freeze()
            try:

                def seen(alerts):
                    gateway.chat("openai/gpt-5-mini")  # for two seconds within what its worker had leased
                    return of_it <= firing(alerts) and alerts["alerts"]

                alerts = watching.until("alerts", seen)
                assert gateway.chat("openai/gpt-5-mini").status == 503
            finally:
                valkey.thaw()
            said = {alert["labels"]["alertname"]: alert["annotations"]["summary"] for alert in alerts}
            assert re.fullmatch(r"Xenios fails [\d.]+% of requests by its own fault", said["XeniosGatewayErrors"])
            assert said["XeniosStoreDown"] == f"Xenios at {address} can't reach its redis"

            def over(alerts):
                gateway.chat("openai/gpt-5-mini")
                return not of_it & firing(alerts)

            watching.until("alerts", over)
            assert gateway.chat("openai/gpt-5-mini").status == 200


@pytest.mark.full
def test_every_panel_shows_something(tmp_path):
    """With two gateways that tell everything, no rule and no panel fails, and none is empty."""
    with exporters(2) as addresses, prometheus(quickened(tmp_path / "prometheus", *addresses)) as watching:
        watching.until("targets", healthy)
        watching.until("rules", run)
        watching.until("alerts", firing)
        watching.until("query?query=count_over_time(up[1m])", lambda answer: value(answer) > 8)
        asked = [each for file in FILES for each in expressions(file)]
        assert len(asked) > 50
        for title, expression, legend in asked:
            series = watching.ask(readable(expression, __rate_interval="5s", __range="5s"))
            assert series, title
            named = set(re.findall(r"\{\{(\w+)\}\}", legend))
            assert all(named <= {label for label, _ in labels} for labels in series), title


def firing(alerts):
    return {alert["labels"]["alertname"] for alert in alerts["alerts"] if alert["state"] == "firing"}


def value(answer):
    return float(answer["result"][0]["value"][1]) if answer["result"] else 0.0


@pytest.mark.full
def test_the_list_is_what_a_running_gateway_tells(tmp_path):
    """What rules and dashboards were checked against is what a real gateway shows, under that name and kind."""
    with valkey_server() as valkey, serving(tmp_path, "--config", gateway_file(tmp_path, valkey)) as gateway:
        shown = gateway.request("GET", "/metrics", key=None, headers={"Authorization": f"Bearer {TOKEN}"})
        assert shown.status == 200
        kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", shown.body.decode(), re.MULTILINE))
    assert {name: kinds.get(name) for name in metrics()} == {name: kind for name, (kind, _) in metrics().items()}
