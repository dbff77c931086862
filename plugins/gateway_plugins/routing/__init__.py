"""Routing: which models answer a request, in which order.

1. The **task**, if one is asked for: the header `X-Xenios-Task: chat`, or the model name `task/chat`. The header wins
   over whatever stands in `model` (which must be there nevertheless, since OpenAI's clients can't leave it out).
2. The **rules**, in order: the first whose `when` and `match` hold says which models answer. A task is matched by
   `when: {tasks: chat}` or as `task/chat`; what it says of parameters and limits holds whichever rule is met.
3. No rule: the task's own models, or those of the **alias** that has exactly this name.

Nothing matches: the model that was asked for, at the upstream that `catalogue.overrides` names for it, else at the
default one. `use` names one model or several in fallback order (the `fallback` plugin walks through them), `split`
shares requests out among several such lists:

    smart: anthropic/claude-opus-4.6
    fast: [anthropic/claude-haiku-4.5, {model: openai/gpt-5-mini, strip: [temperature]}]
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

from gateway import GatewayError, hookimpl
from gateway_plugins.routing.checks import concerns, expiries
from gateway_plugins.routing.settings import HEADER, PREFIX, Config
from gateway_plugins.routing.table import Table, fraction

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from datetime import date

    from gateway import Decision, Exchange, Services

__all__ = ["Config", "Plugin"]


def drawn(exchange: Exchange) -> float:
    """0 ≤ x < 1 by the exchange's id: the same for all who ask about one request."""
    return fraction(exchange.id)


class Plugin:
    """Maps tasks, rules and aliases to targets."""

    Config: TypeAlias = Config
    concerns = staticmethod(concerns)
    reads_headers = (HEADER,)

    def __init__(self, config: Config, services: Services) -> None:
        faults = config.faults({name: upstream.kind for name, upstream in services.settings.upstreams.items()})
        if faults:
            raise ValueError("; ".join(faults))
        self._config = config
        self._services = services
        self._warnings: tuple[tuple[int, date] | None, tuple[str, ...]] = (None, ())
        self._expiry: tuple[int | None, dict[tuple[str, ...], float]] = (None, {})
        self._table = Table(config, services)
        # Where a split that is not sticky lets a request fall; tests put their own in its place.
        self.draw: Callable[[Exchange], float] = drawn
        # What GET /v1/models lists beside the upstreams' models.
        self.listed_models: tuple[str, ...] = (*config.aliases, *(PREFIX + name for name in config.tasks))
        # Those that have a label of their own in metrics.
        self.named_models = frozenset(
            f"{self._table.upstream_of(place.entry)}/{place.entry.model}"
            for place in config.entries()
            if place.entry.model
        )

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        gauge = self._services.metrics.gauge(
            "xenios_model_expiry_timestamp_seconds",
            "When a model that rules, tasks or aliases name will be gone, as its upstream lists it, in Unix time; of "
            "several upstreams the first. Absent without such a day.",
            ("model",),
            merge="min",
        )
        no_longer_shown = gauge.read_from(self._expiries)
        try:
            yield
        finally:
            no_longer_shown()

    def _expiries(self) -> dict[tuple[str, ...], float]:
        """For metrics: worked out when the catalogue has changed."""
        catalogue = self._services.catalogue
        if self._expiry[0] != catalogue.revision:
            self._expiry = (catalogue.revision, expiries(self.named_models, catalogue))
        return self._expiry[1]

    def warnings(self) -> Sequence[str]:
        """For readiness: worked out when the catalogue or the day has changed, not for each probe."""
        today = datetime.now(UTC).date()
        as_of = (self._services.catalogue.revision, today)
        if self._warnings[0] != as_of:
            found = concerns(self._config, self._services.settings, self._services.catalogue, today)
            self._warnings = (as_of, tuple(dict.fromkeys(concern.message for concern in found)))
        return self._warnings[1]

    @hookimpl
    async def choose_targets(self, exchange: Exchange) -> Decision | None:
        return self._table.decide(exchange, self.draw)

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[str] | None:
        lines: list[str] = []
        try:
            lines += self._table.tried(exchange)
            decision = self._table.decide(exchange, self.draw)
        except GatewayError as error:
            return [*lines, f"refuses: {error.message}"]
        if decision is None:
            return [*lines, "nothing matches: the asked model, where the settings place it"]
        lines += decision.reasons
        for number, target in enumerate(decision.targets, 1):
            others = f", else there {', '.join(target.overrides['models'])}" if "models" in target.overrides else ""
            lines.append(f"{number}. {target.model} at {target.upstream}{others}")
        return lines
