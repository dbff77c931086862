"""A dry run: what would become of a request, and why. Nothing is counted, held, stored or sent.

The exchange goes to its decision by the same functions as a real one. Then each plugin says what it would do (hook
`explain`), and the limits that they name are looked at together, as they would be admitted together. So the first of
these refuses: what refuses a real request on its way to the decision, a plugin, a limit.

Asked for by `POST /admin/explain`, by an administrator's `X-Xenios-Explain: 1`, which replaces the answer of a real
request, and by `xenios explain`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from gateway import dispatch
from gateway.access import check_route
from gateway.decision import decide, prepare
from gateway.dialects import DIALECTS
from gateway.errors import BadRequest, Forbidden, GatewayError, NotFound
from gateway.exchange import Exchange, Reply, RequestView, new_id
from gateway.incoming import CHOOSING_FIELDS
from gateway.kit.subjects import choices, input_bound, media, output_cap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.catalogue import Model
    from gateway.exchange import Finding, JsonObject, Principal, Target
    from gateway.routes import Router
    from gateway.snapshot import Snapshot

HEADER = "X-Xenios-Explain"
IMAGE_TOKENS = 5000  # the most input tokens that one image takes
_OFF = (None, "", "0")
_NOT_OF_A_REQUEST = frozenset(
    {"register_routes", "register_commands", "register_upstreams", "restore_principal", "usage_corrected"}
)
# Hooks that may refuse or answer, and that a dry run doesn't call.
_UNSEEN = ("request_received", "check_request", "lookup_response", "around_upstream")
# What the price list does not bound: the upstream's choice of another model, provider, service tier or search.
_CHOOSING = frozenset(name for names in CHOOSING_FIELDS.values() for name in names)


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /admin/explain`."""

    body: dict[str, Any]
    endpoint: str = "chat/completions"
    headers: dict[str, str] = {}
    principal: str | None = msgspec.field(default=None, name="as")


def add_route(router: Router) -> None:
    router.add(
        "POST",
        "/admin/explain",
        _answer,
        access="admin",
        summary="What would become of a request, and why; nothing is sent. `body`, `endpoint`, `headers`, `as`.",
    )


async def _answer(exchange: Exchange) -> Reply:
    try:
        asked = msgspec.convert(exchange.body, Asked)
    except msgspec.ValidationError as error:
        raise BadRequest(f"This can't be explained: {str(error)[:200]}.") from None
    principal = exchange.principal
    if asked.principal is not None:
        principal = await restored(exchange.snapshot, asked.principal)
    return Reply(200, data=await dry_run(exchange.snapshot, asked, principal))


def is_asked(exchange: Exchange) -> bool:
    """By its header, instead of an answer. Raises BadRequest, or Forbidden: never is a model asked instead."""
    if exchange.request.header(HEADER) in _OFF:
        return False
    if not exchange.route.proxied:
        raise BadRequest("Only what is asked of models can be explained.", param=HEADER)
    if exchange.principal is None or not exchange.principal.admin:
        raise Forbidden(f"{HEADER} needs an admin key.", param=HEADER)
    exchange.record = None  # it is no use that anybody accounts for
    return True


async def restored(snapshot: Snapshot, reference: str) -> Principal:
    """The principal of a reference such as `key:ada`, or of a key's id. Raises NotFound."""
    if ":" not in reference:
        reference = f"key:{reference}"
    principal = await dispatch.restore_principal(snapshot.hooks.restore_principal, reference)
    if principal is None:
        raise NotFound(
            f"Nobody here knows {reference[:200]!r}. Keys can be named, by their id; whoever shows a token can't: what "
            "he may do stands in it.",
            code="principal_gone",
            param="as",
        )
    return principal


async def dry_run(snapshot: Snapshot, asked: Asked, principal: Principal | None) -> JsonObject:
    """Explain a request that nobody sent. Raises BadRequest if there is no such endpoint."""
    if asked.endpoint not in DIALECTS:
        raise BadRequest(f"There is no endpoint {asked.endpoint[:100]!r}: {', '.join(DIALECTS)}.", param="endpoint")
    route, _ = snapshot.routes.match("POST", f"/v1/{asked.endpoint}")
    headers = CIMultiDictProxy(CIMultiDict(asked.headers))
    exchange = Exchange(new_id(), RequestView("POST", route.path, headers), snapshot, route)
    exchange.principal = principal
    exchange.body, exchange.raw_body = asked.body, msgspec.json.encode(asked.body)
    exchange.stream = exchange.dialect.wants_stream(exchange.body)
    return await explanation(exchange)


async def explanation(exchange: Exchange) -> JsonObject:
    """Of an exchange whose principal and body are known. The exchange is used up: it must not be sent afterwards."""
    refused: JsonObject | None = None
    found: list[tuple[str, Finding]] = []
    sound = False
    try:
        check_route(exchange)
        await prepare(exchange)
        sound = True
        await decide(exchange)
    except GatewayError as error:
        refused = _error(error, exchange.error_by)
        exchange.error_by = None  # the dry run itself did not fail
    if sound:
        found = await dispatch.run_explain(exchange, exchange.snapshot.hooks.explain)
    if refused is None:
        refused = next((_error(f.refuses, plugin) for plugin, f in found if f.refuses is not None), None)
    targets = _targets(exchange, found)
    decision, most = exchange.decision, [target["worst_case_usd"] for target in targets]
    return {
        "endpoint": exchange.endpoint,
        "principal": _principal(exchange.principal),
        "stream": exchange.stream,
        "asked": exchange.asked_model,
        "task": decision.task if decision else None,
        "alias": decision.alias if decision else None,
        "rule": decision.rule if decision else None,
        "reasons": decision.reasons if decision else (),
        "refused": refused,
        "targets": targets,
        "worst_case_usd": max(most) if most and None not in most else None,
        "findings": [_finding(plugin, f) for plugin, f in found if f.target is None],
        **_plugins(exchange),
    }


# --- what the answer says --------------------------------------------------------------------------------------------


def _error(error: GatewayError, by: str | None) -> JsonObject:
    return {
        "status": error.status_code,
        "code": error.error_code,
        "message": error.message,
        "by": by or "core",
        "retry_after": error.retry_after,
    }


def _principal(principal: Principal | None) -> JsonObject | None:
    """Not its claims, which may be anything."""
    if principal is None:
        return None
    return {
        "id": principal.id,
        "kind": principal.kind,
        "tenant": principal.tenant,
        "team": principal.team,
        "roles": sorted(principal.roles),
        "admin": principal.admin,
    }


def _finding(plugin: str, finding: Finding) -> JsonObject:
    refuses = _error(finding.refuses, plugin) if finding.refuses is not None else None
    return {"plugin": plugin, "text": finding.text, "refuses": refuses, "data": finding.data}


def _targets(exchange: Exchange, found: Sequence[tuple[str, Finding]]) -> list[JsonObject]:
    """In the order in which they would be tried; those that would not be, last."""
    decided = exchange.decision.targets if exchange.decision else ()
    order = next((f.order for _, f in reversed(found) if f.order is not None), decided)
    tried = [(target, True) for target in order] + [(target, False) for target in decided if target not in order]
    return [
        {
            **_target(exchange, target),
            "tried": is_tried,
            "findings": [_finding(plugin, f) for plugin, f in found if f.target == target],
        }
        for target, is_tried in tried
    ]


def _target(exchange: Exchange, target: Target) -> JsonObject:
    model = exchange.snapshot.services.catalogue.model(target.upstream, target.model)
    most = _most(exchange, target, model) if model is not None else None
    return {
        "upstream": target.upstream,
        "model": target.model,
        "price": {name: _per_million(model, name) for name in ("input", "output")} if model is not None else None,
        "context_length": model.context_length if model is not None else None,
        "worst_case_usd": None if most is None else most / 1e12,
        "set": target.overrides,
        "strip": target.strip,
    }


def _per_million(model: Model, name: str) -> float | None:
    """USD per million tokens."""
    pico: int | None = getattr(model.price, name)
    return None if pico is None else pico / 1e6


def _most(exchange: Exchange, target: Target, model: Model) -> int | None:
    """What one attempt can cost by list price, in pico-USD: all the input that the body can be, all the output that it
    allows. None if something in it may cost more than its tokens, or nothing bounds them.
    """
    body = {name: value for name, value in {**exchange.body, **target.overrides}.items() if name not in target.strip}
    caps = exchange.dialect.output_caps
    if not caps or model.id != target.model or any(body.get(n) is not None for n in _CHOOSING) or _runs_tools(body):
        return None
    found = media(exchange)
    entry = input_bound(exchange, model.context_length, IMAGE_TOKENS, found)
    if entry is None or found.files or found.others:
        return None
    entry += len(msgspec.json.encode(target.overrides)) if target.overrides else 0
    output = output_cap(body, caps) or model.max_output or model.context_length
    given, written = model.price.dearest(entry)
    if output is None or given is None or written is None:
        return None
    extra = (model.price.request or 0) + (model.price.image or 0) * found.images
    return entry * given + output * choices(body) * written + extra


def _runs_tools(body: Mapping[str, Any]) -> bool:
    """Any beside the client's own functions, which run there."""
    tools = body.get("tools") or ()
    return not isinstance(tools, list | tuple) or any(
        not isinstance(tool, dict) or tool.get("type", "function") not in {None, "function", "custom"} for tool in tools
    )


def _plugins(exchange: Exchange) -> JsonObject:
    """Who is called, in call order; who is not, as its `when:` doesn't match; who can't say what it would do."""
    hooks = exchange.snapshot.hooks
    chains = {f.name: getattr(hooks, f.name) for f in fields(hooks) if f.name not in _NOT_OF_A_REQUEST}
    called = {
        hook: [impl.plugin for impl in impls if impl.applies(exchange)] for hook, impls in chains.items() if impls
    }
    every = [instance.id for instance in exchange.snapshot.instances]
    out = {impl.plugin for impls in chains.values() for impl in impls if not impl.applies(exchange)}
    says = called.get("explain", [])
    may = {plugin for hook in _UNSEEN for plugin in called.get(hook, ()) if plugin not in says}
    return {
        "plugins": {hook: plugins for hook, plugins in called.items() if plugins},
        "left_out": [plugin for plugin in every if plugin in out],
        "silent": [plugin for plugin in every if plugin in may],
    }
