"""Which metrics and labels exist, and what values those labels may have that deploy/ asks for by name."""

from __future__ import annotations

import asyncio
import functools

from gateway import Outcome
from gateway.errors import Cause
from gateway.kit.testing import Gateway
from tests.deploy.promql import Known

SCRAPED = frozenset({"job", "instance"})  # Prometheus's own


def metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name to kind and labels."""
    return {name: (kind, tuple(labels.split())) for name, kind, labels in _NOT_YET} | told()


@functools.cache
def told() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each instrument of a gateway that runs all plugins which count, whether it counted something or not."""
    return asyncio.run(_told())


async def _told() -> dict[str, tuple[str, tuple[str, ...]]]:
    plugins = ["metrics", "routing", "rate_limit", "budgets", "usage", "fallback"]
    async with Gateway.test(plugins=plugins) as gateway:
        return {family.name: (family.kind, family.labels) for family in await gateway.worker.metrics.read()}


def known() -> Known:
    """Each series that may be asked for, with its labels."""
    found: dict[str, frozenset[str]] = {
        "up": SCRAPED,
        "ALERTS": SCRAPED
        | {"alertname", "alertstate", "severity", "model", "store", "plugin", "budget", "limit", "hook", "buffer"},
    }
    for name, (kind, labels) in metrics().items():
        own = SCRAPED | set(labels)
        if kind == "histogram":
            found |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
        else:
            found[name] = own
    return found


VALUES = {
    "outcome": set(Outcome),
    "cause": {"ok", *Cause},
    "kind": {"input", "output", "cache_read", "cache_write", "reasoning", "requests", "tokens", "concurrent"},
    "stream": {"true", "false"},
    "result": {"done", "refused"},
}

# What commits to come will count.
_NOT_YET = [
    ("xenios_requests_total", "counter", "endpoint model task rule outcome status stream"),
    ("xenios_requests_in_flight", "gauge", ""),
    ("xenios_request_duration_seconds", "histogram", "endpoint model stream"),
    ("xenios_time_to_first_token_seconds", "histogram", "endpoint model"),
    ("xenios_time_per_output_token_seconds", "histogram", "endpoint model"),
    ("xenios_gateway_overhead_seconds", "histogram", "endpoint"),
    ("xenios_errors_total", "counter", "endpoint code by"),
    ("xenios_refusals_total", "counter", "plugin code"),
    ("xenios_tokens_total", "counter", "model kind"),
    ("xenios_cost_usd_total", "counter", "model source"),
    ("xenios_usage_unknown_total", "counter", "model"),
    ("xenios_attempts_total", "counter", "upstream model cause"),
    ("xenios_attempt_duration_seconds", "histogram", "upstream model"),
    ("xenios_fallbacks_total", "counter", "model to cause"),
    ("xenios_retries_total", "counter", "model cause"),
    ("xenios_circuit_skips_total", "counter", "model"),
    ("xenios_breaker_state", "gauge", "upstream model"),
    ("xenios_breaker_changes_total", "counter", "upstream model change"),
    ("xenios_limit_refusals_total", "counter", "limit kind"),
    ("xenios_budget_refusals_total", "counter", "budget"),
    ("xenios_budget_used_ratio", "gauge", "budget"),
    ("xenios_store_seconds", "histogram", "store"),
    ("xenios_store_errors_total", "counter", "store"),
    ("xenios_store_up", "gauge", "store"),
    ("xenios_plugin_seconds", "histogram", "plugin hook"),
    ("xenios_plugin_slow_total", "counter", "plugin hook"),
    ("xenios_plugin_failures_total", "counter", "plugin hook"),
    ("xenios_dropped_total", "counter", "buffer"),
    ("xenios_usage_rows_waiting", "gauge", ""),
    ("xenios_build_info", "gauge", "version python"),
    ("xenios_config_info", "gauge", "hash"),
    ("xenios_config_loaded_timestamp_seconds", "gauge", ""),
    ("xenios_reloads_total", "counter", "result"),
    ("xenios_workers", "gauge", ""),
    ("xenios_worker_started_timestamp_seconds", "gauge", "worker"),
    ("xenios_worker_resident_memory_bytes", "gauge", "worker"),
    ("xenios_worker_cpu_seconds_total", "counter", "worker"),
    ("xenios_worker_open_fds", "gauge", "worker"),
    ("xenios_event_loop_lag_seconds", "gauge", "worker"),
    ("xenios_catalogue_updated_timestamp_seconds", "gauge", ""),
    ("xenios_model_expiry_timestamp_seconds", "gauge", "model"),
    ("xenios_simulated", "gauge", ""),
]
