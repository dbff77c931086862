"""The most that a request may cost with one target, for `max_usd`: an estimate of its input and its output limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.kit import choices, input_estimate, output_cap

if TYPE_CHECKING:
    from gateway import Exchange, Services, Target

# Variants that cost what their model costs; `:free` costs nothing, others may cost more.
_SAME_PRICE = frozenset({"floor", "exacto", "thinking", "extended"})


def worst_case(exchange: Exchange, target: Target, services: Services) -> int | None:
    """Pico-USD; None where no price is known."""
    model = services.catalogue.model(target.upstream, target.model)
    if model is None:
        return None
    if model.id != target.model and services.settings.upstreams[target.upstream].kind == "openrouter":
        variants = set(target.model.split(":")[1:]) - set(model.id.split(":")[1:])
        if "free" in variants:
            return 0
        if variants - _SAME_PRICE:
            return None
    body = target.applied_to(exchange.body)
    tokens = input_estimate(exchange)
    entry, each = model.price.dearest(tokens)
    if entry is None:
        return None
    most = entry * tokens + (model.price.request or 0)
    if exchange.dialect.grammar is None:  # embeddings, rerank: no output is billed
        return most
    longest = output_cap(body, exchange.dialect.output_caps) or model.max_output or model.context_length
    if each is None or (longest is None and each):
        return None
    return most + each * (longest or 0) * choices(body)
