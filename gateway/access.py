"""Who may use what: the access rule of the matched route, and the principal's scopes. For every principal alike."""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, Any

from gateway import dispatch
from gateway.errors import Forbidden, ModelNotFound, PrincipalGone, Unauthenticated
from gateway.exchange import ANONYMOUS
from gateway.incoming import asked_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.exchange import Decision, Exchange, Principal, Scopes
    from gateway.snapshot import Snapshot

# OpenRouter's plugins that ask no model of their own choice; `fusion` and the routers do.
_PLAIN_PLUGINS = frozenset({"web", "file-parser", "response-healing", "context-compression", "moderation"})
# Tools that do neither: a client's own, and those that search or run something. `image_generation`, an advisor and
# whatever comes next ask a model. A type may end in a date or `_preview`.
_PLAIN_TOOLS = re.compile(
    r"(function|custom|mcp|computer(_use)?|bash|shell|local_shell|apply_patch|text_editor|memory|tool_search(_tool_\w+)?"
    r"|code_execution|code_interpreter|file_search|(openrouter:)?(web_search|web_fetch|datetime))(_\d{8}|_preview\w*)?"
)


async def restore_principal(snapshot: Snapshot, reference: str, kept: Principal | None) -> Principal:
    """Who asked then, as he may call now. Raises PrincipalGone; StoreUnavailable or PluginError: later, perhaps."""
    impls, server = snapshot.hooks.restore_principal, snapshot.settings.server
    principal = await dispatch.restore_principal(impls, reference, kept)
    if principal is None and reference == ANONYMOUS.reference and not snapshot.hooks.authenticate:
        principal = ANONYMOUS if server.allow_anonymous or snapshot.loopback else None
    if principal is None:
        raise PrincipalGone
    return principal


def check_bearer(exchange: Exchange) -> None:
    """The route's own token, where it has one. Raises Unauthenticated."""
    wanted, shown = exchange.route.bearer, exchange.credentials
    if wanted is not None and not hmac.compare_digest(wanted.encode(), ((shown and shown.bearer) or "").encode()):
        raise Unauthenticated("This needs a token of its own. Send it as `Authorization: Bearer <token>`.")


def check_route(exchange: Exchange) -> None:
    """The route's access rule and the principal's endpoints. Raises Forbidden."""
    route, principal = exchange.route, exchange.principal
    if route.access in {"public", "bearer"}:
        return
    if principal is None:
        raise Forbidden
    if route.access == "admin" and not principal.admin:
        raise Forbidden("This needs an admin key.")
    if principal.scopes.endpoints is None or not route.proxied:
        return
    if not principal.scopes.allows("endpoints", route.endpoint):
        raise Forbidden(f"This key may not use {route.endpoint}.")


def check_models(exchange: Exchange, decision: Decision) -> None:
    """The principal's scopes against what was asked and decided. Raises ModelNotFound, as for a model that isn't there.

    A granted alias or task grants its targets. A raw model name must be granted itself, and so must each entry of
    `models[]` and `fallbacks[]`, and a preset: OpenRouter would answer from any of them. Plugins and tools that ask a
    model of their own choice are Forbidden.
    """
    scopes = exchange.principal.scopes if exchange.principal else None
    if scopes is None or not _restricted(scopes):
        return
    if not _grants_decision(scopes, decision):
        raise _not_granted(decision.task or decision.alias or decision.asked)
    body = exchange.body
    for model in asked_models(body)[1:] if body.get("model") else asked_models(body):
        if not _grants_model(scopes, model):
            raise _not_granted(model)
    for field in ("plugins", "tools", "deferred_tools"):
        if body.get(field):
            _check_helpers(scopes, field, body[field])


def _check_helpers(scopes: Scopes, field: str, helpers: Any) -> None:
    """Plugins and tools of the upstream: none may bring in a model that isn't granted."""
    for helper in helpers if isinstance(helpers, list) else [helpers]:
        if not isinstance(helper, dict):
            raise Forbidden(f"This key is for certain models: `{field}` must be a list of objects.", param=field)
        kind = str(helper.get("id") if field == "plugins" else helper.get("type", "function"))
        if field != "plugins" and kind in {"None", "function", "custom"}:
            continue  # the client's own: what stands in its parameters is between it and the model
        if not (kind in _PLAIN_PLUGINS if field == "plugins" else _PLAIN_TOOLS.fullmatch(kind)):
            raise Forbidden(f"This key is for certain models, and {kind[:100]!r} may ask another.", param=field)
        for model in _named_models(helper):
            if not _grants_model(scopes, model):
                raise _not_granted(model)


def _named_models(value: Any, under: str = "") -> Iterator[str]:
    """Every text below a key such as `model`, `models`, `allowed_models`."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _named_models(below, name if isinstance(below, str | list) else "")
    elif isinstance(value, list):
        for below in value:
            yield from _named_models(below, under)
    elif isinstance(value, str) and "model" in under:
        yield value


def may_see(scopes: Scopes, name: str) -> bool:
    """Does a listing of models show this name to the principal?"""
    return not _restricted(scopes) or _grants_model(scopes, name) or _listed(scopes.aliases, scopes, "aliases", name)


def _restricted(scopes: Scopes) -> bool:
    """One list given means: nothing beside what the lists name."""
    return scopes.models is not None or scopes.aliases is not None or scopes.tasks is not None


def _grants_model(scopes: Scopes, model: str) -> bool:
    if scopes.models is None:
        return False
    base, preset, slug = model.partition("@preset/")
    # `author/model@preset/name`: the preset may name any model, so that `author/*` doesn't grant it
    if preset and not scopes.allows("models", preset + slug):
        return False
    return not base or scopes.allows("models", base)


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
    """An upstream may answer from what stands in a target's own `models` as well."""
    return all(
        _grants_model(scopes, model)
        for target in decision.targets
        for model in (target.model, *target.overrides.get("models", ()))
    )


def _not_granted(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model {name[:200]!r} does not exist or this key has no access to it.",
        param="model",
        should_retry=False,
    )
