"""Whose limit a request falls under, and how much it may take: what rate limits and budgets both ask."""

from __future__ import annotations

import functools
import math
import weakref
from decimal import Decimal
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gateway.errors import Forbidden
from gateway.exchange import ContextKey
from gateway.logs import get_logger
from gateway.settings import When
from gateway.units import Duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.exchange import Exchange, Principal

log = get_logger("gateway.limits")

Period = Literal["hour", "day", "week", "month", "total"]
Subject = Literal["key", "tenant", "team", "role", "user", "model", "endpoint"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


# A setting: one name or several.
By: TypeAlias = Annotated[
    tuple[Subject, ...], BeforeValidator(_one_or_many, json_schema_input_type=Subject | tuple[Subject, ...])
]


class NamedLimit(BaseModel):
    """What the settings of each limit have, whatever it limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        min_length=1, max_length=50, pattern=r"^[A-Za-z0-9_.-]+$", description="Name in errors and logs; unique."
    )
    by: By = Field(
        ("key",),
        description="What is counted by itself: key (the caller), tenant, team, role, user (the body's `user`, which "
        "clients choose), model (the first target), endpoint; several: each combination; []: all together. Callers "
        "without a team, or without roles, share one count.",
    )
    when: When | None = Field(None, description="The requests that it holds for, as a plugin's `when:`. Default all.")


def check_limits(limits: Sequence[NamedLimit], what: str, *, own_limits: bool) -> None:
    """For a plugin's `Config`. Raises ValueError if two have one name, or if nothing is limited."""
    names = [limit.name for limit in limits]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several {what} are named {', '.join(twice)}")
    if not names and not own_limits:
        raise ValueError(f"limits nothing: list {what}, or say own_limits: true")


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


def output_cap(body: dict[str, Any], names: Sequence[str]) -> int | None:
    """The most output tokens that the request allows itself, per choice; None if it sets no limit.

    `names`: the fields that set it in this dialect (`exchange.dialect.output_caps`); an upstream ignores others.
    """
    most = None
    for name in names:
        cap = body.get(name)
        if isinstance(cap, int) and not isinstance(cap, bool) and cap > 0 and (most is None or cap > most):
            most = cap
    return most


def choices(body: dict[str, Any]) -> int:
    """How many answers may be written, and billed: `n` or `best_of` for each of several prompts."""
    n, best_of = body.get("n"), body.get("best_of")
    asked = 1 if n is None and best_of is None else max(_whole(n), _whole(best_of))
    prompts = body.get("prompt")
    if isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int):
        asked *= len(prompts)  # a list of numbers is one prompt, in tokens
    return asked


def _whole(value: Any) -> int:
    """At least 1. Upstreams may read `5.0` and `"5"` as 5, so these count."""
    if isinstance(value, str | float):
        try:
            value = math.ceil(float(value))
        except (ValueError, OverflowError):
            return 1
    return max(1, value) if isinstance(value, int) else 1


_ESTIMATE: ContextKey[int] = ContextKey("input estimate")


def input_estimate(exchange: Exchange) -> int:
    """Input tokens by the body's length: a rough guess, not a bound."""
    raw = exchange.raw_body
    edited = exchange.snapshot.hooks.prepare_request  # plugins may have edited what was sent, and may do so again
    if len(raw) < 2000 and not edited:
        return len(raw) // 4 + 1  # not worth a walk through the body
    known = exchange.get(_ESTIMATE)
    if known is None or edited:
        known = exchange.set(_ESTIMATE, exchange.dialect.input_characters(exchange.body) // 4 + 1)
    return known


Part = Literal["tools", "images", "audio", "json_schema"]
_KINDS: ContextKey[frozenset[str]] = ContextKey("kinds of parts")
_AUDIO = frozenset({"input_audio", "audio", "audio_url"})


def brings(exchange: Exchange, part: Part) -> bool:
    """Does the request have such a thing: tools, images or audio for the model, a JSON schema for its answer?"""
    body = exchange.body
    if part == "tools":
        return bool(body.get("tools") or body.get("functions"))
    if part == "json_schema":
        form = exchange.dialect.answer_form(body)
        return isinstance(form, dict) and form.get("type") == "json_schema"
    if part == "audio" and exchange.form is not None and exchange.form.files:
        return True
    return not _kinds(exchange).isdisjoint(_IMAGES if part == "images" else _AUDIO)


def _kinds(exchange: Exchange) -> frozenset[str]:
    """Every `type` in the body. Looked for once, unless plugins may still edit it."""
    known = exchange.get(_KINDS)
    if known is not None and not exchange.snapshot.hooks.prepare_request:
        return known
    found: set[str] = set()
    if may_mention(exchange, b'"type"'):
        _find_kinds(exchange.body, found, 0)
    return exchange.set(_KINDS, frozenset(found))


def _find_kinds(value: Any, found: set[str], depth: int) -> None:
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str):
            found.add(kind)
    below = value.values() if isinstance(value, dict) else value
    if depth < 32:
        for part in below:
            if isinstance(part, dict | list):
                _find_kinds(part, found, depth + 1)


class Media(NamedTuple):
    """What a request holds beside text. `inline`: bytes of the images that stand in the body itself."""

    images: int = 0
    inline: int = 0
    files: int = 0
    others: int = 0  # audio, video, and what the upstream remembers of earlier requests


NO_MEDIA = Media()
_IMAGES = frozenset({"image", "image_url", "input_image"})
_FILES = frozenset({"file", "input_file", "document", "container_upload"})
_OTHERS = frozenset(
    {"input_audio", "audio", "audio_url", "video", "video_url", "input_video", "item_reference", "compaction"}
)
_REMEMBERED = ("previous_response_id", "conversation")
_TOOL_TOKENS = 1000  # what a model's template says about tools, beside the tools themselves


def may_mention(exchange: Exchange, *names: bytes) -> bool:
    """May one of these stand in the body? False is certain, and found without a walk through it."""
    raw = exchange.raw_body
    # a name may be written with escapes, and plugins may have edited what was sent
    if b"\\u" in raw or exchange.snapshot.hooks.prepare_request:
        return True
    return any(name in raw for name in names)


def media(exchange: Exchange) -> Media:
    """Images, files and the like in the body."""
    body = exchange.body
    others = any(body.get(name) for name in _REMEMBERED) or isinstance(body.get("prompt"), dict)
    if not others and not may_mention(exchange, b'"type"'):
        return NO_MEDIA
    found = [0, 0, 0, int(others)]
    _find_media(body, found, 0)
    return Media(*found)


def input_bound(exchange: Exchange, context_length: int | None, image_tokens: int, found: Media) -> int | None:
    """The most input tokens that the request can have; None if nothing bounds them.

    A token is a byte at least, and a context's length is an end. Images count `image_tokens` each, other media as much
    as the context holds. `found`: its `media`.
    """
    if found.files or found.others:
        return context_length
    body, size = exchange.body, len(exchange.raw_body)
    if exchange.snapshot.hooks.prepare_request:
        size = max(size, len(msgspec.json.encode(body)))  # plugins may have edited it
    bound = size - found.inline + found.images * image_tokens
    if body.get("tools") or body.get("functions"):
        bound += _TOOL_TOKENS
    return bound if context_length is None else min(bound, context_length)


def _find_media(value: Any, found: list[int], depth: int) -> None:
    if depth > 32:
        found[3] += 1  # nobody looks deeper: as much as the context holds
        return
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str):
            if kind in _IMAGES:
                found[0] += 1
                found[1] += _inline(value)
                return
            if kind in _FILES:
                found[2] += 1
                return
            if kind in _OTHERS:
                found[3] += 1
                return
        below: Any = value.values()
    elif isinstance(value, list):
        below = value
    else:
        return
    for part in below:
        if isinstance(part, dict | list):
            _find_media(part, found, depth + 1)


def _inline(image: dict[str, Any]) -> int:
    """Bytes of an image's base64, in any of the APIs' places; what stands beside it is text for all we know."""
    place = image.get("image_url", image.get("source"))
    url = place.get("url") if isinstance(place, dict) else place
    text = url if isinstance(url, str) and url.startswith("data:") else None
    if text is None and isinstance(place, dict):
        text = place.get("data")
    return len(text) if isinstance(text, str) and text.isascii() else 0


OF_CALLERS: frozenset[Subject] = frozenset({"key", "tenant", "team", "role"})
T = TypeVar("T")


class PerCaller(Generic[T]):
    """What a plugin works out once for each caller, whose principal is one object from request to request.

    It goes with the principal: with each token that is renewed there comes another.
    """

    __slots__ = ("_known", "_make", "_most")

    def __init__(self, make: Callable[[Exchange], T], most: int = 4096) -> None:
        """`make` is to ask for nothing but the principal, and not to keep it; what it raises is not remembered."""
        self._make = make
        self._most = most
        self._known: dict[int, tuple[Callable[[], Principal | None], T]] = {}

    def of(self, exchange: Exchange) -> T:
        principal = exchange.principal
        known = self._known.get(id(principal))
        if known is not None and known[0]() is principal:
            return known[1]
        made = self._make(exchange)
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[id(principal)] = (self._weakly(principal), made)
        return made

    def _weakly(self, principal: Principal | None) -> Callable[[], Principal | None]:
        if principal is None:
            return _nobody
        known, key = self._known, id(principal)
        return weakref.ref(principal, lambda _: known.pop(key, None))

    def clear(self) -> None:
        self._known.clear()


def _nobody() -> None: ...


_EVERYBODY = [""]
_KEY = ("key",)


def subjects(by: Sequence[Subject], exchange: Exchange) -> list[str]:
    """Whose bucket: one text per combination; a caller with several roles has several."""
    if not by:
        return _EVERYBODY
    principal = exchange.principal
    if by == _KEY:  # what most limits are by
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
            return sorted(principal.roles) or ("",) if principal else ("",)  # nobody goes without
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


def _quoted(value: str) -> str:
    """Two subjects never make the same key, however long a client makes its name; of that no more is kept than this."""
    if len(value) > 200:
        import hashlib  # noqa: PLC0415 - rare

        return "#" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    return _kept_quoted(value)


@functools.lru_cache(maxsize=4096)
def _kept_quoted(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode().replace("\\", "\\\\").replace("|", "\\p")


def own_limits(exchange: Exchange) -> OwnLimits | None:
    """The caller's own; None if it has none. Raises Forbidden if it has some that can't be understood."""
    principal = exchange.principal
    if principal is None or not principal.limits:
        return None
    known = OwnLimits.model_fields
    return _own(tuple(sorted((n, _plain(v)) for n, v in principal.limits.items() if n in known and v is not None)))


def _plain(value: Any) -> str | float | Decimal:
    return value if isinstance(value, str | int | float | Decimal) else "neither a number nor a text"


@functools.lru_cache(maxsize=4096)
def _own(limits: tuple[tuple[str, Any], ...]) -> OwnLimits:
    try:
        return OwnLimits.model_validate(dict(limits))
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)[0]
        problem = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
        log.warning("limits_not_understood", problem=problem)
        raise Forbidden(f"The limits that this caller brings along can't be understood ({problem}).") from None
