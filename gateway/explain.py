"""A dry run: what would become of a request, and why. Nothing is counted, held, stored or sent.

The exchange goes to its decision by the same functions as a real one. Then each plugin says what it would do (hook
`explain`), and the limits that they hold are looked at together, as they would be admitted together. What refuses is
what would come first: something on the way to the decision, a plugin's `check_request`, a limit, a plugin after that.

Asked for by `POST /admin/explain`, by an administrator's `X-Xenios-Explain: 1`, which replaces the answer of a real
request, and by `xenios explain`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from gateway import dispatch
from gateway.access import check_route, restore_principal
from gateway.decision import decide, prepare
from gateway.dialects import DIALECTS
from gateway.errors import BadRequest, Forbidden, GatewayError, PrincipalGone, StoreUnavailable
from gateway.exchange import Exchange, Reply, RequestView, new_id
from gateway.incoming import CHOOSING_FIELDS
from gateway.kit.ledger import ENDLESS, refusing
from gateway.kit.subjects import choices, input_bound, media, output_cap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.catalogue import Model
    from gateway.exchange import Finding, JsonObject, Principal, Target
    from gateway.limits import Rule, State
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
    exchange.explained = True
    return True


async def restored(snapshot: Snapshot, reference: str) -> Principal:
    """The principal of a reference such as `key:ada`, or of a key's id. Raises PrincipalGone."""
    if ":" not in reference:
        reference = f"key:{reference}"
    try:
        return await restore_principal(snapshot, reference, None)
    except PrincipalGone:
        raise PrincipalGone(
            f"Nobody here is {reference[:200]!r}, or the key was revoked or has expired. Keys can be named, by their "
            "id; whoever shows a token can't: what he may do stands in it.",
            param="as",
        ) from None


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
    decision = exchange.decision
    targets = [(target, _target(exchange, target)) for target in decision.targets] if decision else []
    if sound:
        found = await dispatch.run_explain(exchange, exchange.snapshot.hooks.explain)
    plugins = _plugins(exchange)
    limits, full, granted = await _limits(exchange, [(plugin, f.rule) for plugin, f in found if f.rule is not None])
    refusals = [(plugin, _error(f.refuses, plugin)) for plugin, f in found if f.refuses is not None]
    gates = plugins["plugins"].get("check_request", ())  # limits are admitted after them, before whoever comes later
    early = next((error for plugin, error in refusals if plugin in gates), None)
    late = next((error for plugin, error in refusals if plugin not in gates), None)
    most = [target["worst_case_usd"] for _, target in targets]
    worst = max(most) if most and None not in most else None
    return {
        "endpoint": exchange.endpoint,
        "principal": _principal(exchange.principal),
        "phase": exchange.phase,
        "stream": exchange.stream,
        "asked": exchange.asked_model,
        "task": decision.task if decision else None,
        "alias": decision.alias if decision else None,
        "rule": decision.rule if decision else None,
        "reasons": decision.reasons if decision else (),
        "refused": refused or early or full or late,
        "targets": _in_order(targets, found, onion="around_upstream" in plugins["plugins"]),
        "worst_case_usd": worst if worst is None or granted is None else min(worst, granted / 1e6),
        "limits": limits,
        "findings": [_finding(plugin, f) for plugin, f in found if f.target is None and f.rule is None],
        **plugins,
    }


async def _limits(
    exchange: Exchange, held: Sequence[tuple[str, Rule]]
) -> tuple[list[JsonObject], JsonObject | None, int | None]:
    """(each limit with what would be left of it, what the request would be refused with if one has no room, the
    micro-USD that budgets would grant it where that is less than it asks for).
    """
    if not held:
        return [], None, None
    rules = [rule for _, rule in held]
    try:
        verdict = await exchange.snapshot.services.ledger.peek(rules)
    except StoreUnavailable as error:
        denying = next((plugin for plugin, rule in held if rule.on_store_error == "deny"), None)
        return [_limit(*one) for one in held], _error(error, denying) if denying else None, None
    limits = [_limit(*one, state) for one, state in zip(held, verdict, strict=True)]
    if verdict.allowed:
        less = [s.granted for r, s in zip(rules, verdict, strict=True) if r.least is not None and s.granted < r.amount]
        return limits, None, min(less, default=None)
    rule, state = refusing(rules, verdict)
    plugin = next(plugin for plugin, own in held if own is rule)
    return limits, _error(rule.refuse(rule, state), plugin), None


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


def _limit(plugin: str, rule: Rule, state: State | None = None) -> JsonObject:
    """`left`: after this request, or as it is now if that has no room; None if nobody can tell."""
    out: JsonObject = {"plugin": plugin, "limit": rule.name or rule.key, "key": rule.key, "kind": rule.kind}
    left = state.remaining if state is not None and rule.limit < ENDLESS else None
    if rule.kind == "budget":
        reserved = state.reserved if state is not None else None
        takes = min(rule.amount, state.granted or rule.amount) if state is not None else rule.amount
        out |= {"takes_usd": _usd(takes), "left_usd": _usd(left), "reserved_usd": _usd(reserved)}
    else:
        out |= {"takes": rule.amount, "left": left}
    if rule.kind == "rate":
        out["full_in"] = state.reset if state is not None else None
    no_room = _error(rule.refuse(rule, state), plugin) if state is not None and not state.allowed else None
    return {**out, "refuses": no_room}


def _usd(micro: int | None) -> float | None:
    return None if micro is None else micro / 1e6


def _in_order(
    targets: Sequence[tuple[Target, JsonObject]], found: Sequence[tuple[str, Finding]], *, onion: bool
) -> list[JsonObject]:
    """In the order in which they would be tried; those that would not be, last. Without an `onion` the first is all."""
    decided = [target for target, _ in targets]
    order = next((f.order for _, f in reversed(found) if f.order is not None), decided if onion else decided[:1])
    about = [
        (target, {**said, "findings": [_finding(plugin, f) for plugin, f in found if f.target == target]})
        for target, said in targets
    ]
    tried = [{**next(said for target, said in about if target == wanted), "tried": True} for wanted in order]
    return tried + [{**said, "tried": False} for target, said in about if target not in order]


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
    body = target.applied_to(exchange.body)
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
