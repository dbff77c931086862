"""Who may use what: the access rule of the matched route, and the principal's scopes. For every principal alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.errors import Forbidden, ModelNotFound
from gateway.incoming import asked_models

if TYPE_CHECKING:
    from gateway.exchange import Decision, Exchange, Scopes


def check_route(exchange: Exchange) -> None:
    """The route's access rule and the principal's endpoints. Raises Forbidden."""
    route, principal = exchange.route, exchange.principal
    if route.access == "public":
        return
    if principal is None:
        raise Forbidden
    if route.access == "admin" and not principal.admin:
        raise Forbidden("This needs an admin key.")
    if route.proxied and not principal.scopes.allows("endpoints", route.endpoint):
        raise Forbidden(f"This key may not use {route.endpoint}.")


def check_models(exchange: Exchange, decision: Decision) -> None:
    """The principal's scopes against what was asked and decided. Raises ModelNotFound, as for a model that isn't there.

    A granted alias or task grants its targets. A raw model name must be granted itself, and so must each entry of
    `models[]` and `fallbacks[]`: OpenRouter would answer from any of them.
    """
    scopes = exchange.principal.scopes if exchange.principal else None
    if scopes is None or not _restricted(scopes):
        return
    if not _grants_decision(scopes, decision):
        raise _not_granted(decision.task or decision.alias or decision.asked)
    for model in asked_models(exchange.body)[1:]:
        if not _grants_model(scopes, model):
            raise _not_granted(model)


def may_see(scopes: Scopes, name: str) -> bool:
    """Does a listing of models show this name to the principal?"""
    return not _restricted(scopes) or _grants_model(scopes, name) or _listed(scopes.aliases, scopes, "aliases", name)


def _restricted(scopes: Scopes) -> bool:
    """One list given means: nothing beside what the lists name."""
    return scopes.models is not None or scopes.aliases is not None or scopes.tasks is not None


def _grants_model(scopes: Scopes, model: str) -> bool:
    return scopes.models is not None and scopes.allows("models", model)


def _listed(globs: tuple[str, ...] | None, scopes: Scopes, kind: str, name: str) -> bool:
    return globs is not None and scopes.allows(kind, name)  # type: ignore[arg-type]  # kind is one of the four


def _grants_decision(scopes: Scopes, decision: Decision) -> bool:
    if decision.task is not None:
        return _listed(scopes.tasks, scopes, "tasks", decision.task) or _grants_targets(scopes, decision)
    if decision.alias is not None:
        by_name = _listed(scopes.aliases, scopes, "aliases", decision.alias) or _grants_model(scopes, decision.alias)
        return by_name or _grants_targets(scopes, decision)
    return _grants_model(scopes, decision.asked)


def _grants_targets(scopes: Scopes, decision: Decision) -> bool:
    return all(_grants_model(scopes, target.model) for target in decision.targets)


def _not_granted(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model {name[:200]!r} does not exist or this key has no access to it.",
        param="model",
        should_retry=False,
    )
