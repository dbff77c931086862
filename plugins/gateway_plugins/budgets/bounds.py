"""The most that a request may cost, by the catalogue's prices and what its body asks for."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import Refused
from gateway.kit import NO_MEDIA, Media, choices, input_bound, may_mention, media, output_cap
from gateway_plugins.budgets.settings import Assume

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gateway import Exchange, Services
    from gateway_plugins.budgets.settings import Config

_KEPT = 10_000  # models whose prices are kept at hand
_LONG_CACHE = 2  # Anthropic's price of what it keeps for an hour, in times of plain input
_SEARCHED = 100  # documents that one price per request of rerank is for; a longer one counts as several
_SEARCHED_TOKENS = 500
# Fields that make no request cost more than its bytes and its output limit; `_extra` has those that do.
_SIMPLE = frozenset(
    {
        "frequency_penalty", "input", "instructions", "logit_bias", "max_completion_tokens", "max_output_tokens",
        "max_tokens", "messages", "metadata", "model", "presence_penalty", "response_format", "seed", "stop",
        "stop_sequences", "stream", "stream_options", "system", "temperature", "top_k", "top_p", "user",
    }
)  # fmt: skip
# Variants of a model's name that cost what the model costs; `exacto` and what a client says in `provider` at the price
# that is asked for by `max_price`.
_SAME_PRICE = frozenset({"floor", "thinking", "exacto"})


class Bound(msgspec.Struct, frozen=True):
    """The most that a request may cost, in pico-USD. `clamps`: (fixed part, per output token, the most output tokens
    that it can give) of each target.
    """

    most: int
    least: int  # with the fewest output tokens that are worth it
    clamps: tuple[tuple[int, int, int], ...] = ()
    ceiling: tuple[int, int] | None = None  # list prices of input and output that the client's `provider` must keep to

    def tokens(self, money: int) -> int:
        """The output that each target can give for so much, in pico-USD: an upstream refuses a limit above its own."""
        return min(min(longest, (money - entry) // each if each else longest) for entry, each, longest in self.clamps)


FREE = Bound(0, 0)


class Pricing:
    """What requests may cost, in this gateway."""

    def __init__(self, config: Config, services: Services) -> None:
        self._config = config
        self._services = services
        self._plain: dict[tuple[str, str, str], _Plain] = {}

    def bound(self, exchange: Exchange) -> Bound:
        """Raises Refused if it has none, and the settings want one."""
        return self._simple(exchange) or self._full(exchange)

    def _simple(self, exchange: Exchange) -> Bound | None:
        """As `_bound`, for one model and a body of text that has nothing special: most requests. None for others."""
        body, decision = exchange.body, exchange.decision
        if (
            decision is None
            or len(decision.targets) != 1
            or not body.keys() <= _SIMPLE
            or self._config.cost_per_request
        ):
            return None
        target = decision.targets[0]
        if target.overrides or target.strip or exchange.snapshot.hooks.prepare_request:
            return None
        if not _is_text(body) and may_mention(exchange, b'"type"', b'"ttl"'):
            return None
        name = (target.upstream, target.model, exchange.endpoint)
        plain = self._plain.get(name)
        model = self._services.catalogue.model(target.upstream, target.model)
        if plain is None or plain.model is not model:
            if len(self._plain) >= _KEPT:
                self._plain.clear()
            plain = self._plain[name] = self._made_plain(exchange, target.upstream, target.model, model)
        size = len(exchange.raw_body)
        if size > plain.most_input:
            return None
        cap = 0
        for field in plain.caps:
            value = body.get(field)
            if value is None:
                continue
            if type(value) is not int or value <= 0:
                return None
            cap = max(cap, value)
        entry = plain.entry * size + plain.request
        if cap:
            most = entry + cap * plain.each
            return Bound(most, most)
        if self._config.no_max_tokens != "clamp":
            return None
        least = min(self._config.least_tokens, plain.longest)
        clamps = ((entry, plain.each, plain.longest),)
        return Bound(entry + plain.longest * plain.each, entry + least * plain.each, clamps)

    def _made_plain(self, exchange: Exchange, upstream: str, model_id: str, model: Any) -> _Plain:
        """What `_target_bound` would find of the model, where that is the same for all simple requests."""
        nothing = _Plain(model)
        if model is None or model.id != model_id or exchange.dialect.grammar is None:
            return nothing
        asked = _Asked(upstream, model_id, {}, (), self._services.settings.upstreams[upstream].kind == "openrouter", 0)
        longest = model.max_output or model.context_length
        try:
            self._prices(exchange, asked, model, NO_MEDIA)
        except _Unbounded:
            return nothing
        entry, each = model.price.dearest(0)
        if entry is None or each is None or longest is None:
            return nothing
        ends = [tier.min_input_tokens for tier in model.price.tiers]
        ends += [model.context_length] if model.context_length is not None else []
        return _Plain(
            model,
            entry,
            each,
            model.price.request or 0,
            min(ends, default=10**9),
            longest,
            exchange.dialect.output_caps,
        )

    def _full(self, exchange: Exchange) -> Bound:
        """Raises Refused if it has none, and the settings want one."""
        fixed = self._config.cost_per_request.get(exchange.endpoint)
        if fixed is not None:
            most = int(fixed * 10**12) * choices(exchange.body)
            return Bound(most, most)
        found = media(exchange)
        try:
            bounds = [self._target_bound(exchange, target, found) for target in self._targets(exchange)]
        except _Unbounded as why:
            if self._config.unknown_price == "allow":
                return FREE
            raise Refused(
                f"This request's cost has no known limit ({why}), which its budget needs. Use another model or leave "
                "that out, or ask the operator for a price (`catalogue.overrides`) or `unknown_price: allow`.",
                code="unknown_price",
            ) from None
        ceilings = [bound.ceiling for bound in bounds if bound.ceiling is not None]
        return Bound(
            max(bound.most for bound in bounds),
            max(bound.least for bound in bounds),
            tuple(clamp for bound in bounds for clamp in bound.clamps),
            (max(c[0] for c in ceilings), max(c[1] for c in ceilings)) if ceilings else None,
        )

    def _targets(self, exchange: Exchange) -> Iterator[_Asked]:
        """All that may answer: ours, and those that an OpenRouter may take by `models` or `fallbacks` in the body."""
        for target in exchange.decision.targets if exchange.decision else ():
            body = exchange.body
            if target.overrides or target.strip:
                body = target.applied_to(body)
            openrouter = self._services.settings.upstreams[target.upstream].kind == "openrouter"
            added = len(msgspec.json.encode(target.overrides)) if target.overrides else 0
            caps = exchange.dialect.output_caps
            own = tuple(name for name in caps if name in target.overrides)
            yield _Asked(target.upstream, target.model, body, target.strip, openrouter, added, own)
            for named in (*(body.get("models") or ()), *(body.get("fallbacks") or ())) if openrouter else ():
                fields = named if isinstance(named, dict) else {"model": named}
                theirs = (*own, *(name for name in caps if name in fields))
                model = str(fields["model"])
                yield _Asked(target.upstream, model, {**body, **fields}, target.strip, openrouter, added, theirs)

    def _target_bound(self, exchange: Exchange, asked: _Asked, found: Media) -> Bound:
        """Raises _Unbounded."""
        body = asked.body
        extra = _extra(body)
        if extra is not None:
            raise _Unbounded(extra)
        model = self._services.catalogue.model(asked.upstream, asked.model)
        if model is None:
            raise _Unbounded("a model has no known price")
        if asked.openrouter and (variants := _unlisted_variants(asked.model, model.id)):
            if variants == ["free"]:
                return FREE
            wrong = [name for name in variants if name not in _SAME_PRICE]
            if wrong:
                raise _Unbounded(f"`:{wrong[0][:50]}` may cost extra")
        entry, each = self._prices(exchange, asked, model, found)
        ceiling = None
        if asked.openrouter and (asked.model != model.id or body.get("provider") is not None):
            ceiling = (model.price.input or 0, model.price.output or 0)
        if exchange.dialect.grammar is None:
            return Bound(entry, entry, ceiling=ceiling)
        each *= choices(body)
        prediction = body.get("prediction")
        if prediction is not None:  # what it got wrong is billed as output, beside the limit
            entry += len(msgspec.json.encode(prediction)) * each
        cap, thought = output_cap(body, exchange.dialect.output_caps), _thinking(body)
        field = self.cap_field(exchange)
        if asked.caps and (field not in asked.caps or output_cap(body, (field,)) is None):
            cap = None  # no limit of its own holds, nor would one that we set for another model
        if cap is not None:
            # a thinking budget is part of the limit, but for upstreams that raise the limit to fit it
            most = entry + (cap if thought < cap else cap + thought) * each
            return Bound(most, most, ceiling=ceiling)
        if isinstance(self._config.no_max_tokens, Assume):
            most = entry + self._config.no_max_tokens.assume * each
            return Bound(most, most, ceiling=ceiling)
        longest = model.max_output or model.context_length
        if longest is None:
            raise _Unbounded("a model has no known limit of output; set one in the request")
        if thought or asked.caps or field in asked.strip:  # a limit that we set would not hold
            most = entry + (longest + thought) * each
            return Bound(most, most, ceiling=ceiling)
        least = min(self._config.least_tokens, longest)
        return Bound(entry + longest * each, entry + least * each, ((entry, each, longest),), ceiling)

    def _prices(self, exchange: Exchange, asked: _Asked, model: Any, found: Media) -> tuple[int, int]:
        """(all input, one output token), at the dearest. Raises _Unbounded."""
        endpoint, price = exchange.endpoint, model.price
        modalities = model.raw.get("architecture")
        takes, gives = (
            (modalities.get(name) if isinstance(modalities, dict) and asked.openrouter else None)
            for name in ("input_modalities", "output_modalities")
        )
        tokens = input_bound(exchange, model.context_length, self._config.image_tokens, found)
        if tokens is None:
            raise _Unbounded("nothing says how much a file, audio or video of a model without context length may be")
        if found.files and isinstance(takes, list) and "file" not in takes:
            raise _Unbounded("reading files for a model that can't costs extra")
        tokens += asked.added
        entry, each = price.dearest(tokens)
        if entry is None:
            raise _Unbounded("a model has no known price")
        if found.others:
            entry = max(entry, price.audio or 0)
        if _kept_for_long(exchange, asked.body):
            entry *= _LONG_CACHE
        requests = 1
        if endpoint == "rerank":
            documents = asked.body.get("documents")
            count = len(documents) if isinstance(documents, list) else 1
            requests = -(-(count + len(exchange.raw_body) // _SEARCHED_TOKENS) // _SEARCHED)
        entry = entry * tokens + (price.request or 0) * requests + (price.image or 0) * found.images
        if exchange.dialect.grammar is None and endpoint != "audio/speech":  # embeddings, rerank: no output is billed
            return entry, 0
        if each is None or endpoint in {"images/generations", "audio/transcriptions"}:
            raise _Unbounded("a model has no known price of output")
        if endpoint == "audio/speech" and each:
            raise _Unbounded("nothing limits the speech that a text becomes")
        if exchange.dialect.grammar is not None and isinstance(gives, list) and set(gives) - {"text"}:
            raise _Unbounded("a model answers with more than text")
        return entry, each

    def cap_field(self, exchange: Exchange) -> str:
        """What sets the output limit in this dialect, for the upstream that is asked first."""
        names = exchange.dialect.output_caps
        decision = exchange.decision
        if len(names) > 1 and decision is not None:
            upstream = self._services.settings.upstreams[decision.targets[0].upstream]
            return names[0] if upstream.kind == "openai" else names[-1]
        return names[0]


class _Plain(msgspec.Struct, frozen=True):
    """A model's prices for simple requests of up to `most_input` bytes; -1: none is simple."""

    model: Any
    entry: int = 0
    each: int = 0
    request: int = 0
    most_input: int = -1
    longest: int = 0
    caps: Sequence[str] = ()


class _Unbounded(Exception):
    """Why the price list is no bound, in words."""


class _Asked(msgspec.Struct, frozen=True):
    """One model that may answer, and the body that it would be asked with."""

    upstream: str
    model: str
    body: dict[str, Any]
    strip: Sequence[str]
    openrouter: bool
    added: int  # bytes that the target's own fields add to the body
    caps: Sequence[str] = ()  # fields of the output's limit that are its own, whatever the request says


# Fields that make a request cost more than its tokens: searches, tools and models that run at the upstream.
_EXTRAS = ("plugins", "web_search_options", "preset", "mcp_servers", "container")
_PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    "service_tier": (None, "auto", "default", "flex", "standard_only", "standard"),
    "speed": (None, "standard"),
    "inference_geo": (None, "global", "not_available"),
    "modalities": (None, ["text"], []),
}


def _extra(body: dict[str, Any]) -> str | None:
    """What costs more than tokens, in words; None if nothing does."""
    for name in _EXTRAS:
        if body.get(name) not in (None, []):  # an empty object is how a search is asked for without more
            return f"`{name}` may cost extra"
    for name, plain in _PLAIN_VALUES.items():
        if name in body and body[name] not in plain:
            return f"this `{name}` costs extra"
    for name in ("tools", "deferred_tools"):
        tools = body.get(name)
        for tool in tools if isinstance(tools, list) else [tools] if tools else ():
            kind = tool.get("type") if isinstance(tool, dict) else str(tool)
            # a function of the client's own, which runs there; in Anthropic's dialect it has no type
            if kind not in (None, "function", "custom"):
                return f"the tool {str(kind)[:50]!r} costs extra"
    provider = body.get("provider")
    if isinstance(provider, dict) and provider.get("options"):
        return "`provider.options` may cost extra"
    if body.get("context_management") and b"compact" in msgspec.json.encode(body["context_management"]):
        return "compaction costs extra"
    return None


def _unlisted_variants(asked: str, listed: str) -> list[str]:
    """`:nitro` … of a name that the price list has without it, or with another."""
    variants = asked.split(":")[1:]
    return variants if variants != listed.split(":")[1:] else []


def _is_text(body: dict[str, Any]) -> bool:
    """Are its messages nothing but text? What is not so simple may be so all the same."""
    for name, value in body.items():
        if name == "messages" and type(value) is list:
            for message in value:
                if type(message) is not dict or len(message) != 2 or "role" not in message:
                    return False
                if type(message.get("content")) is not str:
                    return False
        elif type(value) is dict or type(value) is list:
            return False
    return True


def _thinking(body: dict[str, Any]) -> int:
    """Tokens that the model may think, where the request says how many."""
    given = [
        part.get(name)
        for field, name in (("reasoning", "max_tokens"), ("thinking", "budget_tokens"))
        if isinstance(part := body.get(field), dict)
    ]
    return max((int(n) for n in given if isinstance(n, int | float) and 0 < n < 10**9), default=0)


def _kept_for_long(exchange: Exchange, body: dict[str, Any]) -> bool:
    """`cache_control: {ttl: 1h}` anywhere."""
    if body is exchange.body and not may_mention(exchange, b'"ttl"'):
        return False
    return _has_ttl(body)


def _has_ttl(value: Any) -> bool:
    if isinstance(value, dict):
        ttl = value.get("ttl")
        return (isinstance(ttl, str) and ttl != "5m") or any(_has_ttl(v) for v in value.values())
    return isinstance(value, list) and any(_has_ttl(v) for v in value)


def keep_to(ceiling: tuple[int, int], body: dict[str, Any]) -> None:
    """Whichever provider the client prefers, it may cost the list price at most."""
    asked = body.get("provider")
    provider = dict(asked) if isinstance(asked, dict) else {}
    theirs = provider.get("max_price")
    limits = dict(theirs) if isinstance(theirs, dict) else {}
    for name, pico in zip(("prompt", "completion"), ceiling, strict=True):
        ours = float(Decimal(pico).scaleb(-6))  # pico-USD a token are micro-USD a million: USD a million
        try:
            limits[name] = min(ours, float(limits[name]))
        except (KeyError, TypeError, ValueError):
            limits[name] = ours
    body["provider"] = {**provider, "max_price": limits}
