"""Writes dashboards/*.json, which are committed: `make dashboards`. A panel is one line here and fifty there.

In an expression `{i}`, `{ie}`, `{iem}`, `{im}` stand for the filters by the dashboard's variables (instance, endpoint,
model); `{im, kind="input"}` adds to them. `$rate` is Grafana's `$__rate_interval`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "dashboards"
SCHEMA_VERSION = 42  # Grafana 12 and 13; it migrates from any older one by itself
WIDTH = 24  # columns of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODELS_ONLY = 'endpoint!~"/.*|models|messages/count_tokens|unmatched"'

GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "text"
_FILTERS = {"i": 'instance=~"$instance"', "e": 'endpoint=~"$endpoint"', "m": 'model=~"$model"'}


def promql(text: str) -> str:
    """One line, with the filters written out."""
    text = " ".join(text.split()).replace("$rate", "$__rate_interval")
    return re.sub(r"\{(i?e?m?)(?=[,}])", lambda m: "{" + ", ".join(_FILTERS[c] for c in m[1]), text)


@dataclass(frozen=True)
class Panel:
    """`queries`: PromQL to legend. `unit`: Grafana's id of a unit. `steps`: (from, colour) of thresholds, ascending."""

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    steps: tuple[tuple[float, str], ...] = ()
    names: dict[float, tuple[str, str]] = field(default_factory=dict)  # value: (what it is called, colour)
    text: str = ""  # a stat that shows this label instead of the value
    columns: dict[str, str] = field(default_factory=dict)  # of a table: label or "Value #A" to heading
    units: dict[str, str] = field(default_factory=dict)  # of a table: heading to unit
    decimals: int | None = None
    most: float | None = None


def quantiles(metric: str, filters: str, by: str = "") -> dict[str, str]:
    """p50, p95 and p99; with `by` the p95 of each."""
    if by:
        rate = f"sum by (le, {by}) (rate({metric}_bucket{filters}[$rate]))"
        return {f"histogram_quantile(0.95, {rate})": " ".join(f"{{{{{name}}}}}" for name in by.split(", "))}
    rate = f"sum by (le) (rate({metric}_bucket{filters}[$rate]))"
    return {f"histogram_quantile({q / 100}, {rate})": f"p{q}" for q in (50, 95, 99)}


def stat(title: str, about: str, query: str, unit: str = "short", **more: Any) -> Panel:
    return Panel(title, about, {query: more.pop("legend", "")}, unit, "stat", more.pop("width", 4), 4, **more)


TRAFFIC: dict[str, list[Panel]] = {
    "Now": [
        stat("Requests", "Requests for models each second.",
             f"sum(rate(xenios_requests_total{{iem, {MODELS_ONLY}}}[$rate]))", "reqps"),
        stat("Failed", "Share of requests that failed by the gateway's or the upstream's fault, fallbacks included. "
             "What is wrong with a request itself and what limits refuse is not in it.",
             f"""(sum(rate(xenios_requests_total{{iem, {MODELS_ONLY},
                 outcome=~"upstream_error|upstream_truncated|timeout|plugin_error|error",
                 status=~"200|429|5.."}}[$rate])) or vector(0))
                 / sum(rate(xenios_requests_total{{iem, {MODELS_ONLY}}}[$rate]))""",
             "percentunit", steps=((0, GREEN), (0.02, YELLOW), (0.1, RED))),
        stat("First token, p95", "Of twenty streams one waits longer than this for its first content.",
             "histogram_quantile(0.95, sum by (le) (rate(xenios_time_to_first_token_seconds_bucket{iem}[$rate])))",
             "s", steps=((0, GREEN), (5.12, YELLOW), (10.24, RED))),
        stat("Tokens", "Input and output tokens each second.",
             'sum(rate(xenios_tokens_total{im, kind=~"input|output"}[$rate]))', "short"),
        stat("Cost", "What all requests of the time range cost.",
             "sum(increase(xenios_cost_usd_total{im}[$__range]))", "currencyUSD", decimals=2),
        stat("In flight", "Requests that are being answered now, at all endpoints.",
             "sum(xenios_requests_in_flight{i})", "short"),
    ],
    "Requests": [
        Panel("Requests by outcome", "How they ended. refused: a rule, limit or budget said no; client_disconnect: the "
              "client left before the end.",
              {"sum by (outcome) (rate(xenios_requests_total{iem}[$rate]))": "{{outcome}}"}, "reqps", stacked=True),
        Panel("Requests by model", "The model that was asked last for each request; other: neither the configuration "
              "nor the catalogue knows it.",
              {f"sum by (model) (rate(xenios_requests_total{{iem, {MODELS_ONLY}}}[$rate]))": "{{model}}"},
              "reqps", stacked=True),
        Panel("Requests by endpoint", "Other routes have their path.",
              {"sum by (endpoint) (rate(xenios_requests_total{iem}[$rate]))": "{{endpoint}}"}, "reqps", stacked=True),
        Panel("Requests by status", "As clients saw it. A stream that broke off has 200.",
              {"sum by (status) (rate(xenios_requests_total{iem}[$rate]))": "{{status}}"}, "reqps", stacked=True),
        Panel("Streams", "Share of requests for models that asked for a stream.",
              {f"""sum(rate(xenios_requests_total{{iem, {MODELS_ONLY}, stream="true"}}[$rate]))
                   / sum(rate(xenios_requests_total{{iem, {MODELS_ONLY}}}[$rate]))""": "streams"},
              "percentunit", most=1),
        Panel("Tasks and rules", "What clients asked for, and what decided. Requests in the time range.",
              {f"sum by (task, rule) (increase(xenios_requests_total{{iem, {MODELS_ONLY}}}[$__range]))": ""},
              "short", "table", columns={"task": "Task", "rule": "Rule", "Value": "Requests"}, decimals=0),
    ],
    "Time": [
        Panel("Duration", "Of requests that were answered: from their head to the last byte of the reply.",
              quantiles("xenios_request_duration_seconds", f'{{iem, {MODELS_ONLY}, outcome="ok"}}'), "s"),
        Panel("First token by model, p95", "From the request's head to the first content that a client can show. The "
              "alert XeniosFirstTokenSlow looks at 10.24 s.",
              quantiles("xenios_time_to_first_token_seconds", "{iem}", "model"), "s",
              steps=((0, GREEN), (10.24, RED))),
        Panel("Time per output token by model, p95", "After the first. 0.02 s is 50 tokens a second.",
              quantiles("xenios_time_per_output_token_seconds", "{iem}", "model"), "s"),
        Panel("Duration by model, p95", "Of requests that were answered, streams and whole replies.",
              quantiles("xenios_request_duration_seconds", f'{{iem, {MODELS_ONLY}, outcome="ok"}}', "model"), "s"),
        Panel("Gateway overhead", "A request's time less what upstreams took: plugins, stores, parsing, waiting for "
              "the processor.",
              quantiles("xenios_gateway_overhead_seconds", f"{{ie, {MODELS_ONLY}}}"), "s"),
        Panel("How long requests take", "Each column is a moment, each field a range of durations, the brighter the "
              "more requests.",
              {f"""sum by (le) (increase(xenios_request_duration_seconds_bucket{{iem, {MODELS_ONLY}}}[$rate]))""":
               "{{le}}"}, "s", "heatmap"),
    ],
    "Upstream": [
        Panel("Attempts by cause", "Each try of a target; ok, or why it failed.",
              {"sum by (cause) (rate(xenios_attempts_total{iem}[$rate]))": "{{cause}}"}, "reqps", stacked=True),
        Panel("Failed attempts by model", "Which target fails, whatever became of the request.",
              {'sum by (upstream, model) (rate(xenios_attempts_total{iem, cause!="ok"}[$rate]))':
               "{{upstream}} {{model}}"}, "reqps"),
        Panel("Duration of attempts, p95", "Of those that were answered, to the upstream's last byte.",
              quantiles("xenios_attempt_duration_seconds", '{iem, cause="ok"}', "upstream, model"), "s"),
        Panel("Fallbacks", "From which model to which, and why.",
              {"sum by (model, to, cause) (rate(xenios_fallbacks_total{im}[$rate]))":
               "{{model}} → {{to}}: {{cause}}"}, "reqps", stacked=True),
        Panel("Retries", "The same target again.",
              {"sum by (model, cause) (rate(xenios_retries_total{im}[$rate]))": "{{model}}: {{cause}}"},
              "reqps", stacked=True),
        Panel("Passed over", "Targets that were not tried because their circuit was open or they rested.",
              {"sum by (model) (rate(xenios_circuit_skips_total{im}[$rate]))": "{{model}}"}, "reqps", stacked=True),
    ],
    "Tokens and cost": [
        Panel("Cost per hour by model", "At the present rate.",
              {"sum by (model) (rate(xenios_cost_usd_total{im}[$rate])) * 3600": "{{model}}"},
              "currencyUSD", stacked=True),
        Panel("Where costs are known from", "upstream: it said so. catalogue: from its tokens and our prices. "
              "estimate: from what we could see. Per hour.",
              {"sum by (source) (rate(xenios_cost_usd_total{im}[$rate])) * 3600": "{{source}}"},
              "currencyUSD", stacked=True),
        Panel("Tokens by kind", "Tokens each second. cache_read and cache_write are parts of input, reasoning of "
              "output.",
              {"sum by (kind) (rate(xenios_tokens_total{im}[$rate]))": "{{kind}}"}, "short"),
        Panel("Tokens per request, p95", "How large requests and answers are; what limits by tokens should allow.",
              quantiles("xenios_request_tokens", "{iem}", "model, kind"), "short"),
        Panel("Input read from caches", "Share of input tokens that the model's provider had cached; they cost less.",
              {"""sum by (model) (rate(xenios_tokens_total{im, kind="cache_read"}[$rate]))
                  / sum by (model) (rate(xenios_tokens_total{im, kind="input"}[$rate]))""": "{{model}}"},
              "percentunit", most=1),
        Panel("Usage unknown", "Answers whose tokens nobody told: they are missing in costs, and budgets charge what "
              "was reserved.",
              {"sum by (model) (rate(xenios_usage_unknown_total{im}[$rate]))": "{{model}}"}, "reqps"),
        Panel("Models", "Sums over the time range.",
              {f"sum by (model) (increase(xenios_requests_total{{iem, {MODELS_ONLY}}}[$__range]))": "",
               'sum by (model) (increase(xenios_tokens_total{im, kind="input"}[$__range]))': "",
               'sum by (model) (increase(xenios_tokens_total{im, kind="output"}[$__range]))': "",
               "sum by (model) (increase(xenios_cost_usd_total{im}[$__range]))": ""},
              "short", "table", decimals=0, width=16,
              columns={"model": "Model", "Value #A": "Requests", "Value #B": "Input tokens",
                       "Value #C": "Output tokens", "Value #D": "Cost"}, units={"Cost": "currencyUSD"}),
    ],
}  # fmt: skip

HEALTH: dict[str, list[Panel]] = {
    "Now": [
        stat("Alerts", "Alerts of Xenios that fire; the table below names them.",
             'count(ALERTS{alertname=~"Xenios.*", alertstate="firing"}) or vector(0)',
             steps=((0, GREEN), (1, RED))),
        stat("Gateways", "That answer Prometheus.", 'sum(up{job="xenios", instance=~"$instance"})',
             steps=((0, RED), (1, GREEN))),
        stat("Workers", "Processes that serve.", "sum(xenios_workers{i})", steps=((0, RED), (1, GREEN))),
        stat("Own errors", "Share of requests that fail by the gateway's fault; XeniosGatewayErrors looks at 2 %.",
             "max(xenios:gateway_errors:ratio_rate5m)", "percentunit", steps=((0, GREEN), (0.02, RED))),
        stat("Upstream errors", "Share of requests that fail upstream, fallbacks included; XeniosUpstreamErrors looks "
             "at 10 %.",
             "max(xenios:upstream_errors:ratio_rate5m)", "percentunit", steps=((0, GREEN), (0.02, YELLOW), (0.1, RED))),
        stat("Answers", "Simulated: an upstream has no key, and answers are invented.",
             "max(xenios_simulated{i})", names={0: ("real", GREEN), 1: ("simulated", RED)}),
        Panel("Alerts that fire", "deploy/README.md says what to do about each.",
              {'ALERTS{alertname=~"Xenios.*", alertstate="firing"}': ""}, "short", "table", width=12,
              columns={"alertname": "Alert", "instance": "Instance", "model": "Model", "store": "Store",
                       "plugin": "Plugin", "budget": "Budget", "limit": "Limit", "queue": "Queue",
                       "severity": "Severity"}),
        Panel("Configuration", "Which version and which configuration (`config` of /health/ready) each gateway runs, "
              "and since when.",
              {"max by (instance, version, python) (xenios_build_info{i})": "",
               "max by (instance, hash) (xenios_config_info{i})": "",
               "max by (instance) (xenios_config_loaded_timestamp_seconds{i}) * 1000": ""},
              "short", "table", width=12, columns={"instance": "Instance", "version": "Version", "python": "Python",
              "hash": "Configuration", "Value #C": "Since"}, units={"Since": "dateTimeFromNow"}),
    ],
    "Errors and refusals": [
        Panel("Errors by code", "As clients are told.",
              {"sum by (code) (rate(xenios_errors_total{ie}[$rate]))": "{{code}}"}, "reqps", stacked=True),
        Panel("Errors by place", "The plugin and hook that failed, the upstream, or the gateway itself.",
              {"sum by (by) (rate(xenios_errors_total{ie}[$rate]))": "{{by}}"}, "reqps", stacked=True),
        Panel("Refusals", "Requests that a plugin said no to.",
              {"sum by (plugin, code) (rate(xenios_refusals_total{i}[$rate]))": "{{plugin}}: {{code}}"},
              "reqps", stacked=True),
    ],
    "Circuits": [
        Panel("Breakers", "Of each upstream's models. Resting: it said itself when to come back (429). Open: it failed "
              "too often and is passed over. Half-open: single attempts try whether it is back.",
              {"max by (upstream, model) (xenios_breaker_state{im})": "{{upstream}} {{model}}"}, "short",
              "state-timeline", width=16,
              names={0: ("closed", GREEN), 1: ("resting", BLUE), 2: ("half-open", YELLOW), 3: ("open", RED)}),
        Panel("Changes of breakers", "How often they opened, were probed, closed.",
              {"sum by (model, change) (increase(xenios_breaker_changes_total{im}[$rate]))": "{{model}} {{change}}"},
              "short", stacked=True),
    ],
    "Limits and budgets": [
        Panel("Refused by limits", "By limit and what ran out.",
              {"sum by (limit, kind) (rate(xenios_limit_refusals_total{i}[$rate]))": "{{limit}}: {{kind}}"},
              "reqps", stacked=True),
        Panel("Budgets", "How full each is for the fullest key, tenant, … that asked in the last five minutes. "
              "XeniosBudgetNearCap looks at 90 %.",
              {"max by (budget) (xenios_budget_used_ratio{i})": "{{budget}}"}, "percentunit", "bargauge",
              steps=((0, GREEN), (0.8, YELLOW), (0.9, RED)), most=1),
        Panel("Refused by budgets", "What they might cost is more than what is left.",
              {"sum by (budget) (rate(xenios_budget_refusals_total{i}[$rate]))": "{{budget}}"}, "reqps", stacked=True),
    ],
    "Stores": [
        Panel("Stores", "Away: the breaker is open, each plugin goes on by its on_store_error.",
              {"min by (instance, store) (xenios_store_up{i})": "{{instance}} {{store}}"}, "short",
              "state-timeline", names={0: ("away", RED), 1: ("there", GREEN)}),
        Panel("Store latency", "p95 of what one call takes. Redis is given up after 0.25 s.",
              quantiles("xenios_store_seconds", "{i}", "store"), "s", steps=((0, GREEN), (0.16, RED))),
        Panel("Store errors", "Calls that failed.",
              {"sum by (store) (rate(xenios_store_errors_total{i}[$rate]))": "{{store}}"}, "ops"),
        Panel("Usage rows waiting", "That are not in the database yet. More than a few hundred for minutes: it is "
              "away, full or slow.",
              {"sum by (instance) (xenios_usage_rows_waiting{i})": "{{instance}}"}, "short"),
        Panel("Dropped", "What full buffers lost. It should be nothing.",
              {"sum by (buffer) (increase(xenios_dropped_total{i}[$rate]))": "{{buffer}}"}, "short", stacked=True),
    ],
    "Jobs": [
        Panel("Jobs that wait", "By queue. It grows for long: more arrive than workers do; add workers.",
              {"sum by (queue) (max by (queue, priority) (xenios_jobs_waiting{i}))": "{{queue}}"},
              "short", stacked=True),
        Panel("Oldest job that waits", "How long the first of each queue has waited. XeniosJobsStuck looks at 15 "
              "minutes, but for lines of batches, which may wait for hours.",
              {"max by (queue) (xenios_jobs_oldest_seconds{i})": "{{queue}}"}, "s", steps=((0, GREEN), (900, RED))),
        Panel("Jobs that run, and workers", "Of each queue. One process runs many jobs at once.",
              {"max by (queue) (xenios_jobs_running{i})": "{{queue}}: jobs",
               "max by (queue) (xenios_job_workers{i})": "{{queue}}: workers"}, "short"),
        Panel("Jobs by outcome", "Tries that ended.",
              {"sum by (outcome) (rate(xenios_jobs_seconds_count{i}[$rate]))": "{{outcome}}"}, "ops", stacked=True),
        Panel("Duration of jobs, p95", "Of one try, from its start to its end.",
              quantiles("xenios_jobs_seconds", "{i}", "queue"), "s"),
        Panel("Jobs that fail", "Put back to be tried again; or dead: failed after the last try, until somebody says "
              "`xenios jobs retry`.",
              {"sum(increase(xenios_jobs_retries_total{i}[$rate]))": "retries",
               "sum(increase(xenios_jobs_dead_total{i}[$rate]))": "dead"}, "short"),
        Panel("Batches", "That have not ended.", {"max by (status) (xenios_batches{i})": "{{status}}"}, "short",
              stacked=True),
        Panel("Lines of batches", "That got their result each second.",
              {"sum by (outcome) (rate(xenios_batch_lines_total{i}[$rate]))": "{{outcome}}"}, "ops", stacked=True),
        Panel("Webhooks by outcome", "Tries to deliver one. failed: tried again later; dead: given up. "
              "XeniosWebhooksFailing looks at a half.",
              {"sum by (outcome) (rate(xenios_webhook_deliveries_total{i}[$rate]))": "{{outcome}}"}, "ops",
              stacked=True),
        Panel("Webhook receivers", "How long they take to answer.", quantiles("xenios_webhook_seconds", "{i}"), "s"),
        Panel("Webhooks that wait", "For their first try, or the next one.",
              {"max(xenios_webhook_waiting{i})": "waiting"}, "short"),
    ],
    "Plugins": [
        Panel("Time in plugins", "p95 by plugin and hook, without what upstreams took; measured in some requests.",
              quantiles("xenios_plugin_seconds", "{i}", "plugin, hook"), "s"),
        Panel("Slow plugins", "Calls that took longer than a second; each is counted.",
              {"sum by (plugin, hook) (increase(xenios_plugin_slow_total{i}[$rate]))": "{{plugin}}.{{hook}}"},
              "short", stacked=True),
        Panel("Plugins that fail", "Exceptions that are no refusals. The log has the traceback.",
              {"sum by (plugin, hook) (increase(xenios_plugin_failures_total{i}[$rate]))": "{{plugin}}.{{hook}}"},
              "short", stacked=True),
    ],
    "Processes": [
        Panel("Memory", "That each worker holds.",
              {"xenios_worker_resident_memory_bytes{i}": "{{instance}} {{worker}}"}, "bytes"),
        Panel("CPU", "Cores that each worker uses. One worker can use one.",
              {"sum by (instance, worker) (rate(xenios_worker_cpu_seconds_total{i}[$rate]))":
               "{{instance}} {{worker}}"}, "short", steps=((0, GREEN), (0.9, RED))),
        Panel("Event loop lag", "The longest that a worker's loop stood still in the last seconds; all its streams "
              "stand still meanwhile.",
              {"xenios_event_loop_lag_seconds{i}": "{{instance}} {{worker}}"}, "s", steps=((0, GREEN), (0.2, RED))),
        Panel("Open files", "Files and sockets of each worker.",
              {"xenios_worker_open_fds{i}": "{{instance}} {{worker}}"}, "short"),
        Panel("Workers started", "How often within the last hour each began anew.",
              {"changes(xenios_worker_started_timestamp_seconds{i}[1h])": "{{instance}} {{worker}}"}, "short"),
        Panel("Reloads", "Of the configuration: done, or refused (the one before goes on).",
              {"sum by (instance, result) (increase(xenios_reloads_total{i}[$rate]))": "{{instance}} {{result}}"},
              "short", stacked=True),
    ],
    "Models": [
        Panel("Models that retire", "Of those that the configuration names.",
              {"min by (model) (xenios_model_expiry_timestamp_seconds{im}) * 1000": ""}, "dateTimeAsIso", "table",
              width=16, columns={"model": "Model", "Value": "Retires"}),
        stat("Age of the catalogue", "Since prices and models were fetched.",
             "max(time() - xenios_catalogue_updated_timestamp_seconds{i})", "s", width=8,
             steps=((0, GREEN), (86400, YELLOW), (259200, RED))),
    ],
}  # fmt: skip


def thresholds(panel: Panel) -> dict[str, Any]:
    steps = panel.steps or ((0, GREEN),)
    return {
        "mode": "absolute",
        "steps": [{"color": colour, "value": None if n == 0 else value} for n, (value, colour) in enumerate(steps)],
    }


def defaults(panel: Panel) -> dict[str, Any]:
    """How values look."""
    found: dict[str, Any] = {"unit": panel.unit, "thresholds": thresholds(panel), "min": 0}
    if panel.decimals is not None:
        found["decimals"] = panel.decimals
    if panel.most is not None:
        found["max"] = panel.most
    if panel.names:
        options = {f"{value:g}": {"text": text, "color": colour} for value, (text, colour) in panel.names.items()}
        found["mappings"] = [{"type": "value", "options": options}]
    if panel.kind in {"stat", "bargauge"} or panel.names:
        found["color"] = {"mode": "thresholds"}
    else:
        found["color"] = {"mode": "palette-classic-by-name"}  # a model keeps its colour from panel to panel
    if panel.kind == "timeseries":
        found["custom"] = {
            "drawStyle": "line", "fillOpacity": 30 if panel.stacked else 8, "lineWidth": 1, "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
        }  # fmt: skip
    return found


LEGEND = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["mean", "max", "lastNotNull"]}
TOOLTIP = {"mode": "multi", "sort": "desc"}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": LEGEND, "tooltip": TOOLTIP},
    "stat": {
        "colorMode": "value", "graphMode": "area", "textMode": "auto", "justifyMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "bargauge": {
        "orientation": "horizontal", "displayMode": "gradient", "showUnfilled": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
    "state-timeline": {
        "showValue": "auto", "mergeValues": True, "rowHeight": 0.8, "tooltip": TOOLTIP,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
    },
    "heatmap": {
        "calculate": False, "color": {"mode": "scheme", "scheme": "Spectral", "steps": 64, "exponent": 0.5},
        "yAxis": {"unit": "s"}, "cellGap": 1, "legend": {"show": True},
        "tooltip": {"mode": "single", "showColorScale": True},
    },
}  # fmt: skip


def targets(panel: Panel) -> list[dict[str, Any]]:
    shape = {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series")
    made = []
    for name, (query, legend) in zip("ABCDEFG", panel.queries.items(), strict=False):
        once = panel.kind == "table" or (panel.kind == "stat" and "$__range" in query)
        made.append({
            "refId": name, "datasource": DATASOURCE, "expr": promql(query), "legendFormat": legend or "__auto",
            "instant": once, "range": not once, "format": shape,
        })  # fmt: skip
    return made


def table(panel: Panel) -> dict[str, Any]:
    """Columns as wanted, each under its heading, the largest value first."""
    last = list(panel.columns.values())[-1]
    changed: list[dict[str, Any]] = [{"id": "merge", "options": {}}] if len(panel.queries) > 1 else []
    changed += [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(panel.columns)}}},
        {"id": "organize", "options": {
            "indexByName": {name: n for n, name in enumerate(panel.columns)}, "renameByName": panel.columns,
        }},
    ]  # fmt: skip
    overrides = [
        {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
        for heading, unit in panel.units.items()
    ]
    return {
        "transformations": changed,
        "options": {**OPTIONS["table"], "sortBy": [{"displayName": last, "desc": True}]},
        "fieldConfig": {"defaults": defaults(panel), "overrides": overrides},
    }


def panels(rows: dict[str, list[Panel]]) -> list[dict[str, Any]]:
    """Rows from top to bottom, in each its panels from left to right."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, content in rows.items():
        made.append({
            "id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        })  # fmt: skip
        x, y, tallest = 0, y + 1, 0
        for panel in content:
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            made.append({
                "id": len(made) + 1, "type": panel.kind, "title": panel.title, "description": panel.about,
                "datasource": DATASOURCE, "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
                "targets": targets(panel),
                "fieldConfig": {"defaults": defaults(panel), "overrides": []},
                "options": OPTIONS[panel.kind],
                **(table(panel) if panel.kind == "table" else {}),
            })  # fmt: skip
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return made


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "type": "query", "datasource": DATASOURCE,
        "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True,
        "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "options": [], "hide": 0,
    }  # fmt: skip


def dashboard(uid: str, title: str, about: str, rows: dict[str, list[Panel]]) -> dict[str, Any]:
    return {
        "uid": uid, "title": title, "description": about, "tags": ["xenios"], "schemaVersion": SCHEMA_VERSION,
        "editable": False, "graphTooltip": 1, "refresh": "30s", "timezone": "browser",
        "time": {"from": "now-6h", "to": "now"},
        "links": [{
            "type": "dashboards", "tags": ["xenios"], "title": "Xenios", "asDropdown": False, "includeVars": True,
            "keepTime": True, "targetBlank": False, "icon": "dashboard", "tooltip": "", "url": "",
        }],
        "annotations": {"list": [{
            "name": "Configuration changed", "enable": True, "hide": False, "iconColor": BLUE, "datasource": DATASOURCE,
            "expr": promql("changes(xenios_config_loaded_timestamp_seconds{i}[$rate]) > 0"),
            "titleFormat": "Configuration changed", "textFormat": "{{instance}}", "step": "60s",
        }]},
        "templating": {"list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "regex": "",
             "refresh": 1, "multi": False, "includeAll": False, "current": {}, "options": [], "hide": 0},
            variable("instance", "Gateway", "label_values(xenios_build_info, instance)"),
            variable("endpoint", "Endpoint", "label_values(xenios_requests_total, endpoint)"),
            variable("model", "Model", "label_values(xenios_requests_total, model)"),
        ]},
        "panels": panels(rows),
    }  # fmt: skip


DASHBOARDS = {
    "traffic.json": dashboard(
        "xenios-traffic", "Xenios: traffic and cost",
        "Who is asked for what, how long it takes, what it costs.", TRAFFIC,
    ),
    "health.json": dashboard(
        "xenios-health", "Xenios: health and limits",
        "What is wrong, where, and what limits refuse.", HEALTH,
    ),
}  # fmt: skip


def text(name: str) -> str:
    return json.dumps(DASHBOARDS[name], indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in DASHBOARDS:
        (HERE / file).write_text(text(file))
