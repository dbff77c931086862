"""From a parsed body to a decision that the caller may have: what a request and a dry run of it go through alike."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from gateway import dispatch, outgoing
from gateway.access import check_models
from gateway.errors import PluginError
from gateway.exchange import Decision, Target
from gateway.incoming import admit_body, asked_models, check_refused

if TYPE_CHECKING:
    from gateway.exchange import Exchange


NO_JOBS = "No plugin takes jobs: `offload` is ignored, and the request is answered at once."


async def prepare(exchange: Exchange) -> None:
    """The body as it will be decided on. Raises what refuses it."""
    admit_body(exchange)
    hooks = exchange.snapshot.hooks
    if hooks.prepare_request:
        await dispatch.run_all(exchange, hooks.prepare_request)
        _check_prepared(exchange)
        exchange.stream = exchange.dialect.wants_stream(exchange.body)
    check_refused(exchange)


def _check_prepared(exchange: Exchange) -> None:
    """What `prepare_request` left is a request still; else it is the plugins' failure, not the client's."""
    body: object = exchange.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"]:
        return
    what = "no model" if isinstance(body, dict) else f"{type(body).__name__} instead of an object"
    raise outgoing.bad_body(exchange, what)


async def decide(exchange: Exchange) -> None:
    """Fill `exchange.decision`, and see whether the caller may have it. Raises what refuses it."""
    snapshot = exchange.snapshot
    decision: Decision | None = await dispatch.run_first(exchange, snapshot.hooks.choose_targets, returns=Decision)
    if decision is None:
        asked = exchange.body.get("model") or asked_models(exchange.body)[0]
        decision = _undecided(asked, snapshot.derived.served_by.get(asked, snapshot.settings.upstream.default))
    for target in decision.targets:
        if target.upstream not in snapshot.upstreams:
            raise PluginError(f"The decision names the upstream {target.upstream!r}, which does not exist.")
    if decision.offload:
        decision = _offloaded(exchange, decision)
    exchange.decision = decision
    check_models(exchange, decision)


def _offloaded(exchange: Exchange, decision: Decision) -> Decision:
    """A job from here on, unless it is one at work, or nobody takes any."""
    if exchange.phase != "live":
        return decision
    if not exchange.snapshot.derived.takes_jobs:
        return replace(decision, offload=False, reasons=(*decision.reasons, NO_JOBS))
    exchange.phase = "accept"
    return decision


@functools.lru_cache(maxsize=1024)
def _undecided(asked: str, upstream: str) -> Decision:
    """What nobody decided otherwise: the asked model where it is served."""
    return Decision(asked, (Target(asked, upstream),))
