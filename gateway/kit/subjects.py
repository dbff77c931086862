"""Whose limit a request falls under, and how much it may take: what rate limits and budgets both ask."""

from __future__ import annotations

import functools
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import structlog
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gateway.units import Duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.exchange import Exchange, Principal

log = structlog.get_logger("gateway.limits")

Period = Literal["hour", "day", "week", "month", "total"]
Subject = Literal["key", "tenant", "team", "role", "user", "model", "endpoint"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


# A setting: one name or several.
By: TypeAlias = Annotated[
    tuple[Subject, ...], BeforeValidator(_one_or_many, json_schema_input_type=Subject | tuple[Subject, ...])
]


class OwnLimits(BaseModel):
    """What one caller may use, whoever else may: of a key, or of a token's claims. What plugins know besides passes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    requests: int | None = Field(None, ge=1, le=10**9, description="Requests per `per`. Default no limit.")
    tokens: int | None = Field(None, ge=1, le=10**12, description="Tokens per `per`. Default no limit.")
    concurrent: int | None = Field(None, ge=1, le=10**6, description="Requests at the same time. Default no limit.")
    per: Duration = Field(60.0, gt=0, le=31 * 86400, description="The time that these are for. Default 1m.")
    usd: Decimal | None = Field(
        None, gt=0, le=10**8, decimal_places=6, description="Spending in USD per `usd_per`. Default no limit."
    )
    usd_per: Period = Field("month", description="When spending starts anew. Default month.")


_OUTPUT_CAPS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def output_cap(body: dict[str, Any]) -> int | None:
    """The most output tokens that the request allows itself, per choice; None if it sets no limit."""
    caps = [c for name in _OUTPUT_CAPS if isinstance(c := body.get(name), int) and not isinstance(c, bool) and c > 0]
    return max(caps, default=None)


def choices(body: dict[str, Any]) -> int:
    """How many answers are asked for."""
    asked = body.get("n")
    return asked if isinstance(asked, int) and 1 <= asked <= 128 else 1


def input_estimate(exchange: Exchange) -> int:
    """Input tokens by the body's length: a rough guess, not a bound."""
    raw = exchange.raw_body
    if len(raw) < 2000 and not exchange.snapshot.hooks.prepare_request:
        return len(raw) // 4 + 1  # not worth a walk through the body
    return exchange.dialect.input_characters(exchange.body) // 4 + 1


_IMAGES = frozenset({"image", "image_url", "input_image"})
_OTHER_MEDIA = frozenset({"file", "input_file", "document", "input_audio", "audio", "video_url", "input_video"})


def input_bound(exchange: Exchange, context_length: int | None, image_tokens: int) -> int:
    """The most input tokens that the request can have: a token is a byte at least, and a context's length is an end.

    Images count `image_tokens` each; other media as much as the context holds.
    """
    raw, edited = exchange.raw_body, bool(exchange.snapshot.hooks.prepare_request)
    images, others = _media(exchange.body, 0) if edited or b'"type"' in raw else (0, 0)
    if others:
        return len(raw) if context_length is None else context_length
    if images or edited:
        # four bytes a character, and what the model's template adds
        bound = max(4 * exchange.dialect.input_characters(exchange.body) + 2000, 0 if images else len(raw))
        bound += images * image_tokens
    else:
        bound = len(raw)
    return bound if context_length is None else min(bound, context_length)


def _media(value: Any, depth: int) -> tuple[int, int]:
    """(images, other media) among the parts of messages."""
    if depth > 16:
        return 0, 1
    images = others = 0
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str):
            if kind in _IMAGES:
                return 1, 0
            if kind in _OTHER_MEDIA:
                return 0, 1
        below: Any = value.values()
    elif isinstance(value, list):
        below = value
    else:
        return 0, 0
    for part in below:
        if isinstance(part, dict | list):
            found = _media(part, depth + 1)
            images += found[0]
            others += found[1]
    return images, others


_EVERYBODY = [""]


def subjects(by: Sequence[Subject], exchange: Exchange) -> list[str]:
    """Whose bucket: one text per combination; a caller with several roles has several."""
    if not by:
        return _EVERYBODY
    principal = exchange.principal
    if len(by) == 1 and by[0] == "key":  # what most limits are by
        return [_quoted(principal.reference)] if principal is not None else [""]
    parts = [_values(name, exchange, principal) for name in by]
    return ["|".join(_quoted(value) for value in values) for values in product(*parts)]


def _values(name: Subject, exchange: Exchange, principal: Principal | None) -> Sequence[str]:
    match name:
        case "key":
            return (principal.reference if principal else "",)
        case "tenant":
            return (principal.tenant if principal else "",)
        case "team":
            return ((principal.team or "") if principal else "",)
        case "role":
            return sorted(principal.roles) if principal else ()
        case "user":
            return (f"{principal.tenant if principal else ''}/{end_user(exchange.body)}",)
        case "model":
            return (exchange.decision.targets[0].model if exchange.decision else "",)
        case "endpoint":
            return (exchange.endpoint,)


def end_user(body: dict[str, Any]) -> str:
    """The end user that the client names: OpenAI's `user`, its successor, or Anthropic's `metadata.user_id`."""
    metadata = body.get("metadata")
    named = body.get("user") or body.get("safety_identifier")
    if named is None and isinstance(metadata, dict):
        named = metadata.get("user_id")
    return named if isinstance(named, str) else ""


@functools.lru_cache(maxsize=4096)
def _quoted(value: str) -> str:
    """Two subjects never make the same key, however long a client makes its name."""
    if len(value) > 200:
        import hashlib  # noqa: PLC0415 - rare

        value = "#" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    return value.encode("utf-8", "backslashreplace").decode().replace("\\", "\\\\").replace("|", "\\p")


def own_limits(exchange: Exchange) -> OwnLimits | None:
    """The caller's own; None if it has none, or if what it has can't be understood."""
    principal = exchange.principal
    if principal is None or not principal.limits:
        return None
    return _own(tuple(sorted((name, value) for name, value in principal.limits.items() if isinstance(value, _PLAIN))))


_PLAIN = (str, int, float, Decimal)


@functools.lru_cache(maxsize=4096)
def _own(limits: tuple[tuple[str, Any], ...]) -> OwnLimits | None:
    try:
        return OwnLimits.model_validate(dict(limits))
    except ValidationError as error:
        problem = str(error.errors(include_input=False, include_url=False)[0]["msg"])
        log.warning("limits_not_understood", problem=problem)
        return None
