"""Models, prices and limits of each upstream: what `/v1/models` answers and what an attempt cost.

A list comes from the upstream (refreshed in the background), else from the copy that an earlier run left on
disk, else from the dated snapshot in this package. The operator's overrides are laid over whichever it is.

Not priced, since usage does not count them: images, audio, web searches and 1-hour cache writes (charged as
5-minute ones), and prices by time of day. OpenRouter reports the exact cost itself; the catalogue's is for
replies without it, and for reservations.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import os
import random
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import msgspec

from gateway.exchange import UNKNOWN_COST, Cost, Source, Usage
from gateway.logs import get_logger
from gateway.problems import Concern
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence

    from gateway.settings import CatalogueSettings, ModelOverride

log = get_logger("gateway.catalogue")

Origin = Literal["bundled", "cache", "upstream", "override"]

# More than this is a mistake of units, such as USD per million tokens: better unknown than a wrong bill.
_MOST_PER_TOKEN: Final = Decimal(1)
_MOST_PER_PIECE: Final = Decimal(1000)
_LONGEST_ID: Final = 256
_FIRST_RETRY: Final = 5.0
_START_SPREAD: Final = 2.0  # seconds over which the workers of one host spread their first fetch


class BadModelsList(ValueError):
    """The upstream's reply is not a list of models."""


@dataclass(frozen=True, slots=True)
class Tier:
    """Prices of a request with strictly more than `min_input_tokens` input tokens."""

    min_input_tokens: int
    price: Price


@dataclass(frozen=True, slots=True)
class Price:
    """Integer pico-USD per token (`request`: per request, `image`: per image, `audio`: per input token of audio).

    None is unknown or, but for `input` and `output`, not priced apart. `tiers` ascend; each holds all prices.
    """

    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None
    request: int | None = None
    image: int | None = None
    audio: int | None = None
    tiers: tuple[Tier, ...] = ()

    def at(self, input_tokens: int) -> Price:
        """The prices in force for a request of this size."""
        price = self
        for tier in self.tiers:
            if input_tokens > tier.min_input_tokens:
                price = tier.price
        return price

    def dearest(self, input_tokens: int) -> tuple[int | None, int | None]:
        """The most that an input and an output token may cost in a request of at most this size; None is unknown."""
        dear = [_dearest(self), *(_dearest(tier.price) for tier in self.tiers if input_tokens > tier.min_input_tokens)]
        if len(dear) == 1:
            return dear[0]
        entries, outputs = zip(*dear, strict=True)
        return (None if None in entries else max(entries)), (None if None in outputs else max(outputs))

    def charge(self, usage: Usage) -> int | None:
        """Pico-USD of one request that was answered; None if a price or count that matters is unknown.

        Input tokens include cached ones, output tokens reasoning; both cost the plain price where they have
        none of their own. What is free costs nothing however much was used: embeddings report no output.
        """
        given, written = usage.input_tokens, usage.output_tokens
        if given is None and (self.tiers or (written is None and self.request)):
            return None
        price = self.at(given or 0) if self.tiers else self
        read, write = usage.cache_read_tokens or 0, usage.cache_write_tokens or 0
        thought = min(usage.reasoning_tokens or 0, written or 0)
        parts = (
            (None if given is None else max(0, given - read - write), price.input),
            (read, price.input if price.cache_read is None else price.cache_read),
            (write, price.input if price.cache_write is None else price.cache_write),
            (None if written is None else written - thought, price.output),
            (thought, price.output if price.reasoning is None else price.reasoning),
        )
        total = price.request or 0
        for tokens, rate in parts:
            if tokens == 0 or rate == 0:
                continue
            if tokens is None or rate is None:
                return None
            total += tokens * rate
        return total


def _dearest(price: Price) -> tuple[int | None, int | None]:
    return (
        None if price.input is None else max(price.input, price.cache_write or 0),
        None if price.output is None else max(price.output, price.reasoning or 0),
    )


@dataclass(frozen=True, slots=True)
class Model:
    """One model of one upstream. `raw` is the upstream's item, limits are tokens, `created` Unix seconds."""

    id: str
    upstream: str
    name: str
    created: int
    context_length: int | None
    max_output: int | None
    price: Price
    expiration_date: str | None
    origin: Origin
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Models:
    """Everything known of one upstream's models; replaced as a whole."""

    origin: Origin | None = None
    as_of: str | None = None
    kind: str = ""
    listed: Mapping[str, Model] = field(default_factory=dict)  # id → model as the list has it, without overrides
    listed_by: Origin | None = None
    by_name: Mapping[str, Model] = field(default_factory=dict)  # id, canonical slug or `~…-latest` → model
    items: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # id → item of /v1/models


class Catalogue:
    """What each upstream serves. Look-ups are dict look-ups; reading, fetching and parsing happen aside."""

    def __init__(
        self,
        kinds: Mapping[str, str],
        settings: CatalogueSettings,
        cache_dir: Path | None,
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        default: str | None = None,
    ) -> None:
        """`kinds`: upstream → `openrouter` or `openai`. `fetch(upstream)`: body of its model list, or raises.

        `default` (else the first) is the upstream of overrides that name none; its models are listed first.
        """
        self._cache_dir = cache_dir
        self._fetch = fetch
        self._errors: dict[str, str] = {}
        self._tasks = Tasks()
        self._fresh: list[asyncio.Task[None]] = []
        self._configure(kinds, settings, default)
        self._models: dict[str, _Models] = dict.fromkeys(self._kinds, _Models())
        self._before: dict[str, _Models] = {}  # what was known at the start
        self.revision = 0  # another one after each change: for whoever keeps what it found here

    def _configure(self, kinds: Mapping[str, str], settings: CatalogueSettings, default: str | None) -> None:
        first = default if default in kinds else next(iter(kinds), None)
        self._kinds = dict(sorted(kinds.items(), key=lambda kind: kind[0] != first))
        self._settings = settings
        self._overrides: dict[str, dict[str, ModelOverride]] = {name: {} for name in self._kinds}
        for model_id, override in settings.overrides.items():
            self._overrides.setdefault(override.upstream or first or "", {})[model_id] = override

    # --- coming and going -------------------------------------------------------------------------

    def load(self) -> None:
        """Read the copy that an earlier run left, else the bundled snapshot. Blocks for milliseconds."""
        for upstream in self._kinds:
            self._models[upstream] = self._load(upstream)
        self._before = dict(self._models)
        self.revision += 1

    def _load(self, upstream: str) -> _Models:
        return (
            self._cached(upstream)
            or (self._bundled(upstream) if self._kinds[upstream] == "openrouter" else None)
            or self._compile(upstream, {}, None, None)
        )

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Load, then keep fresh in the background. An upstream that can't be reached delays nothing."""
        await asyncio.to_thread(self.load)
        self._stay_fresh()
        try:
            yield
        finally:
            await self._tasks.drain(0)

    def _stay_fresh(self) -> None:
        for task in self._fresh:
            task.cancel()
        wanted = self._kinds if self._settings.refresh > 0 else ()
        self._fresh = [self._tasks.spawn(self._keep_fresh(name), f"catalogue:{name}") for name in wanted]

    def follow(
        self, kinds: Mapping[str, str], settings: CatalogueSettings, *, default: str | None = None
    ) -> Callable[[], None]:
        """Work out what other settings make of the lists. Blocks for milliseconds; what it returns puts it in force.

        Prices of an upstream that is no longer there stay known until `forget_others`: requests that go on with it are
        billed.
        """
        other = Catalogue(kinds, settings, self._cache_dir, self._fetch, default=default)
        before = dict(self._models)
        models = {name: other._again(name, before.get(name)) for name in kinds}
        at_the_start = {name: other._again(name, known) for name, known in self._before.items() if name in kinds}

        def put_in_force() -> None:
            self._configure(kinds, settings, default)
            fetched = [name for name in kinds if name in before and self._models[name] is not before[name]]
            newer = {name: self._again(name, self._models[name]) for name in fetched}
            self._models = {**self._models, **models, **newer}
            self._before = at_the_start
            self.revision += 1
            self._stay_fresh()

        return put_in_force

    def forget_others(self, used: Collection[str]) -> None:
        """The lists of upstreams that neither these settings nor `used` name. On disk they stay: they may come back."""
        known = {*self._kinds, *used}
        self._models = {name: models for name, models in self._models.items() if name in known}
        self._errors = {name: error for name, error in self._errors.items() if name in known}

    def _again(self, upstream: str, known: _Models | None) -> _Models:
        """The list that is known already, under these overrides."""
        if known is None or known.kind != self._kinds[upstream]:
            return self._load(upstream)
        return self._compile(upstream, known.listed, known.listed_by, known.as_of)

    async def _keep_fresh(self, upstream: str) -> None:
        every = self._settings.refresh
        await asyncio.sleep(random.uniform(0, min(_START_SPREAD, every / 10)))  # noqa: S311 - spreads load
        failures = 0
        while True:
            try:
                count = await self.refresh(upstream)
            except Exception as error:  # noqa: BLE001 - whatever it was, old data beats none
                failures += 1
                if failures == 1:  # one line per outage
                    log.warning("catalogue_refresh_failed", upstream=upstream, error=_brief(error))
            else:
                failures = 0
                log.debug("catalogue_refreshed", upstream=upstream, models=count)
            wait = min(every, _FIRST_RETRY * 2 ** min(failures - 1, 16)) if failures else every
            await asyncio.sleep(wait * random.uniform(0.9, 1))  # noqa: S311 - spreads load

    async def refresh(self, upstream: str, *, store: bool = True) -> int:
        """Fetch one upstream's list and return how many models it holds. On any failure the old one stays.

        `store`: on disk, for the next start.

        Raises BadModelsList for a reply that is not a list of models or is empty, and what `fetch` raises.
        """
        as_of = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            body = await self._fetch(upstream)
            data, models = await asyncio.to_thread(self._parse, upstream, body, as_of)
        except Exception as error:
            self._errors[upstream] = _brief(error)
            raise
        self._models[upstream] = models
        self.revision += 1
        self._errors.pop(upstream, None)
        if store:
            await asyncio.to_thread(self._store, upstream, as_of, data)
        return len(data)

    # --- questions --------------------------------------------------------------------------------

    def model(self, upstream: str, model_id: str) -> Model | None:
        """By id, canonical slug or `~author/family-latest`; a variant not listed itself is its base."""
        models = self._models.get(upstream)
        if models is None:
            return None
        by_name = models.by_name
        found = by_name.get(model_id)
        if found is None and ":" in model_id and models.kind == "openrouter":
            found = by_name.get(model_id.rpartition(":")[0]) or by_name.get(model_id.partition(":")[0])
        return found

    def cost(self, upstream: str, model_id: str, usage: Usage) -> Cost:
        """What one answered request costs by list price; an estimate where the count of tokens is one."""
        model = self.model(upstream, model_id)
        if model is None:
            return UNKNOWN_COST
        # A `:free` that is not listed resolved to its base, whose price is not what it costs.
        free = model.id != model_id and _is_free(model_id) and not _is_free(model.id)
        pico_usd = 0 if free else model.price.charge(usage)
        if pico_usd is None:
            return UNKNOWN_COST
        return Cost(pico_usd, Source.ESTIMATE if usage.source is Source.ESTIMATE else Source.CATALOGUE)

    def listing(
        self,
        allows: Callable[[str], bool],
        aliases: Collection[str] = (),
        *,
        offset: int = 0,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Body of GET /v1/models for OpenAI's and OpenRouter's SDKs. `aliases`: those the caller may use.

        OpenRouter's SDK pages by `offset` and `limit` until a page is short: were they ignored, it would
        never end. Don't change the items: they are shared.
        """
        found = {alias: alias_item(alias) for alias in aliases}
        for upstream in self._kinds:
            for model_id, item in self._models[upstream].items.items():
                if model_id not in found and allows(model_id):
                    found[model_id] = item
        start = max(0, offset)
        end = len(found) if limit is None else start + max(1, limit)
        more = f"/api/v1/models?offset={end}&limit={end - start}" if end < len(found) else None
        return {
            "object": "list",
            "data": list(found.values())[start:end],
            "total_count": len(found),
            "links": {"next": more},
        }

    def item(self, model_id: str, aliases: Collection[str] = ()) -> dict[str, Any] | None:
        """Body of GET /v1/models/{id}, None if nobody serves it. Scopes are checked by who calls this."""
        if model_id in aliases:
            return alias_item(model_id)
        for upstream in self._kinds:
            model = self.model(upstream, model_id)
            if model is not None:
                return self._models[upstream].items[model.id]
        return None

    def concerns(self, upstream: str, name: str, today: date) -> list[Concern]:
        """What stands against asking for this model: unknown, retiring, or another price or limit than at the start."""
        name = name.partition("@preset/")[0]  # a preset is kept at OpenRouter: nobody lists it
        models = self._models.get(upstream)
        if models is None or not name:
            return []
        found = self.model(upstream, name)
        if found is None:
            # the bundled list is short, and simulated models are named as one likes
            simulated = _SIMULATED in models.by_name and name.rpartition("/")[2].startswith("sim")
            told = models.origin in ("upstream", "cache") and not simulated
            return [Concern((), f"{name}: {upstream} lists no such model", "error")] if told else []
        out = [Concern((), f"{name}: {text}") for text in (_retirement(found, today),) if text]
        variants = name.split(":")[1:] if found.id != name and self._kinds[upstream] == "openrouter" else ()
        out += [
            Concern((), f"{name}: `:{variant}` is no known variant") for variant in variants if variant not in _VARIANTS
        ]
        before = self._before.get(upstream)
        was = before.by_name.get(found.id) if before is not None and models.origin == "upstream" else None
        if was is not None and was.origin != "override":
            out += [Concern((), f"{name}: {text} since the start's list") for text in _changes(was, found)]
        return out

    def override_concerns(self) -> list[Concern]:
        """Where `catalogue.overrides` and what an upstream lists differ; paths begin with the model's id."""
        out: list[Concern] = []
        for upstream, overrides in self._overrides.items():
            models = self._models.get(upstream)
            if models is None or models.origin not in ("upstream", "cache"):
                continue
            for model_id in overrides:
                model = models.by_name[model_id]
                listed = _read_model(model.raw, upstream, self._kinds[upstream], "upstream")
                out += [
                    Concern((model_id,), f"{model_id}: {upstream} says otherwise: {text}")
                    for text in (_changes(model, listed) if listed is not None else ())
                ]
        return out

    def status(self) -> dict[str, dict[str, Any]]:
        """Per upstream: kind, origin (None: nothing known), as_of (ISO 8601), count of models, last error."""
        return {
            upstream: {
                "kind": self._kinds[upstream],
                "origin": models.origin,
                "as_of": models.as_of,
                "models": len(models.items),
                "error": self._errors.get(upstream),
            }
            for upstream, models in ((name, self._models[name]) for name in self._kinds)
        }

    # --- files ------------------------------------------------------------------------------------

    def _bundled(self, upstream: str) -> _Models:
        text = importlib.resources.files("gateway").joinpath("data/openrouter-models.json").read_bytes()
        snapshot = msgspec.json.decode(text)
        listed = _read_models(snapshot["data"], upstream, "openrouter", "bundled")
        return self._compile(upstream, listed, "bundled", snapshot["as_of"])

    def _cache_file(self, upstream: str) -> Path | None:
        return self._cache_dir and self._cache_dir / f"models-{quote(upstream, safe='')}.json"

    def _cached(self, upstream: str) -> _Models | None:
        path = self._cache_file(upstream)
        if path is None or not path.exists():
            return None
        kind = self._kinds[upstream]
        try:
            copy = _mapping(msgspec.json.decode(path.read_bytes()))
            if copy.get("kind") != kind:
                raise BadModelsList(f"not a copy of a list of kind {kind}")
            listed = _read_models(copy.get("data"), upstream, kind, "cache")
        except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
            log.warning("catalogue_cache_ignored", upstream=upstream, path=str(path), error=_brief(error))
            return None
        return self._compile(upstream, listed, "cache", _text(copy.get("as_of")))

    def _store(self, upstream: str, as_of: str, data: Sequence[Any]) -> None:
        """Replaced as a whole: other workers share the file. Losing it only makes an offline start poorer."""
        path = self._cache_file(upstream)
        if path is None:
            return
        body = msgspec.json.encode({"kind": self._kinds[upstream], "as_of": as_of, "data": data})
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(body)
                Path(name).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            log.warning("catalogue_cache_not_written", upstream=upstream, path=str(path), error=_brief(error))

    # --- putting together -------------------------------------------------------------------------

    def _parse(self, upstream: str, body: bytes, as_of: str) -> tuple[Sequence[Any], _Models]:
        try:
            reply = msgspec.json.decode(body)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadModelsList(f"not JSON: {error}") from error
        data = reply if isinstance(reply, list) else _mapping(reply).get("data")
        listed = _read_models(data, upstream, self._kinds[upstream], "upstream")
        # Only what was understood is kept on disk.
        return [model.raw for model in listed.values()], self._compile(upstream, listed, "upstream", as_of)

    def _compile(self, upstream: str, listed: Mapping[str, Model], origin: Origin | None, as_of: str | None) -> _Models:
        kind = self._kinds[upstream]
        ids = _ids(listed)
        models = dict(listed)
        for model_id, override in self._overrides[upstream].items():
            base = ids.get(model_id) or (ids.get(model_id.partition(":")[0]) if kind == "openrouter" else None)
            models[model_id] = _overridden(model_id, upstream, listed[base] if base else None, override)
        by_name = {name: models[model_id] for name, model_id in ids.items()} | {
            model_id: models[model_id] for model_id in self._overrides[upstream]
        }
        items = {model_id: _item(model, kind) for model_id, model in models.items()}
        known_by = origin if listed else "override" if models else None
        return _Models(known_by, as_of, kind, listed, origin, by_name, items)


# --- reading an upstream's list -------------------------------------------------------------------


def _read_models(data: Any, upstream: str, kind: str, origin: Origin) -> dict[str, Model]:
    if not isinstance(data, list):
        raise BadModelsList("no list of models in `data`")
    models: dict[str, Model] = {}
    for raw in data:
        model = _read_model(raw, upstream, kind, origin)
        if model is not None:
            models.setdefault(model.id, model)
    if not models:
        raise BadModelsList("an empty list of models")
    if len(models) * 2 < len(data):
        raise BadModelsList(f"only {len(models)} of {len(data)} entries are models")
    return models


def _read_model(raw: Any, upstream: str, kind: str, origin: Origin) -> Model | None:
    if not isinstance(raw, dict):
        return None
    model_id = raw.get("id")
    if not isinstance(model_id, str) or not 0 < len(model_id) <= _LONGEST_ID or not model_id.isprintable():
        return None
    return Model(
        id=model_id,
        upstream=upstream,
        name=_text(raw.get("name")) or model_id,
        created=_count(raw.get("created")) or 0,
        # vLLM names it max_model_len.
        context_length=_count(raw.get("context_length")) or _count(raw.get("max_model_len")),
        max_output=_count(_mapping(raw.get("top_provider")).get("max_completion_tokens")),
        # Other servers' `pricing` is in units of their own.
        price=_read_price(_mapping(raw.get("pricing"))) if kind == "openrouter" else Price(),
        expiration_date=_text(raw.get("expiration_date")),
        origin=origin,
        raw=raw,
    )


# Fields of OpenRouter's `pricing`; `discount` is left alone, so that what we charge is never too little.
_PRICED: Final = {
    "prompt": "input",
    "completion": "output",
    "input_cache_read": "cache_read",
    "input_cache_write": "cache_write",
    "internal_reasoning": "reasoning",
    "request": "request",
    "image": "image",
    "audio": "audio",
}


def _read_price(pricing: Mapping[str, Any]) -> Price:
    """Conditional prices: all entries that apply are laid over the base, the later over the earlier."""
    base = _rates(pricing)
    conditional: list[tuple[int, dict[str, Any]]] = []
    entries = pricing.get("overrides")
    for entry in entries if isinstance(entries, list) else ():
        least = _applies_above(entry)
        if least is not None:
            conditional.append((least, _rates(entry)))
    tiers = []
    for least in sorted({least for least, _ in conditional}):
        rates = dict(base)
        for other, changed in conditional:
            if other <= least:
                rates |= changed
        tiers.append(Tier(least, replace(Price(), **rates)))
    return replace(Price(), tiers=tuple(tiers), **base)


def _applies_above(entry: Any) -> int | None:
    """Input tokens above which the entry applies; None under conditions that we don't price (time of day).

    Prices are strings, so whatever else is not a string is a condition.
    """
    if not isinstance(entry, dict):
        return None
    if any(key != "min_prompt_tokens" and not isinstance(value, str) for key, value in entry.items()):
        return None
    return _count(entry.get("min_prompt_tokens", 0))


def _rates(pricing: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Price: pico-USD, None where the upstream says that it is unknown."""
    rates: dict[str, int | None] = {}
    for key, name in _PRICED.items():
        if key not in pricing:
            continue
        rate = _pico(pricing[key], _MOST_PER_PIECE if name in ("request", "image") else _MOST_PER_TOKEN)
        # OpenRouter writes "0" where these have no price of their own, not where they are given away.
        rates[name] = None if rate == 0 and name in ("cache_write", "reasoning") else rate
    return rates


def _pico(value: Any, most: Decimal) -> int | None:
    """Pico-USD of a price in USD; None if negative (OpenRouter's "-1": it depends), absurd or no number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(text := str(value)) > 40:
        return None
    try:
        usd = Decimal(text)
        if not usd.is_finite() or not 0 <= usd <= most:
            return None
        return int(usd.scaleb(12).to_integral_value(ROUND_HALF_EVEN))
    except ArithmeticError:
        return None


def _ids(listed: Mapping[str, Model]) -> dict[str, str]:
    """Every name a model answers to → the id of that model."""
    ids = {model_id: model_id for model_id in listed}
    for model in listed.values():
        slug, _, variant = model.id.partition(":")
        canonical = _text(model.raw.get("canonical_slug"))
        if canonical and not slug.startswith("~"):
            # `x:free` shares its canonical slug with `x`: it must not lend it its price.
            name = f"{canonical}:{variant}" if variant and ":" not in canonical else canonical
            ids.setdefault(name, model.id)
    for model in listed.values():
        target = ids.get(_text(_mapping(model.raw.get("alias_target")).get("slug")) or "")
        if target is not None:
            ids[model.id] = target
    return ids


def _overridden(model_id: str, upstream: str, model: Model | None, override: ModelOverride) -> Model:
    given = {
        "input": override.input,
        "output": override.output,
        "cache_read": override.cache_read,
        "cache_write": override.cache_write,
    }
    # From USD per million tokens; settings allow six decimal places, so this is exact.
    rates: dict[str, Any] = {name: int(usd.scaleb(6)) for name, usd in given.items() if usd is not None}
    price = model.price if model else Price()
    if "output" in rates:
        rates["reasoning"] = rates["output"]
    tiers = tuple(Tier(tier.min_input_tokens, replace(tier.price, **rates)) for tier in price.tiers)
    return Model(
        id=model_id,
        upstream=upstream,
        name=model.name if model else model_id,
        created=model.created if model else 0,
        context_length=_first(override.context_length, model.context_length if model else None),
        max_output=_first(override.max_output, model.max_output if model else None),
        price=replace(price, **rates, tiers=tiers),
        expiration_date=model.expiration_date if model else None,
        origin="override",
        raw=model.raw if model else {},
    )


# --- writing items of /v1/models ------------------------------------------------------------------


def alias_item(alias: str) -> dict[str, Any]:
    """An alias of this gateway as an item of /v1/models. Its price is that of whichever model answers."""
    return {**_blank(alias, alias), "object": "model", "created": 0, "owned_by": "xenios"}


def _blank(model_id: str, name: str) -> dict[str, Any]:
    """What OpenRouter's SDK demands of an item (components.Model), with nothing claimed."""
    return {
        "id": model_id,
        "canonical_slug": model_id,
        "name": name,
        "context_length": None,
        "architecture": {"modality": None, "input_modalities": [], "output_modalities": []},
        "pricing": {"prompt": "-1", "completion": "-1"},
        "top_provider": {"is_moderated": False, "context_length": None, "max_completion_tokens": None},
        "per_request_limits": None,
        "supported_parameters": [],
        "default_parameters": None,
        "supported_voices": None,
        "links": {"details": f"/api/v1/models/{quote(model_id)}/endpoints"},
    }


def _item(model: Model, kind: str) -> dict[str, Any]:
    blank = _blank(model.id, model.name)
    item: dict[str, Any] = {**model.raw, **blank}
    if kind == "openrouter":  # another server's fields of these names may mean anything
        item |= {
            name: _filled(model.raw[name], default)
            for name, default in blank.items()
            if name in model.raw and name not in ("id", "name")
        }
    if model.origin == "override":
        item["pricing"] = _priced(item["pricing"], model.price)
    item["context_length"] = model.context_length
    item["top_provider"] = {**item["top_provider"], "max_completion_tokens": model.max_output}
    author, slash, _ = model.id.removeprefix("~").partition("/")
    item["object"] = "model"
    item["created"] = model.created
    item["owned_by"] = _text(model.raw.get("owned_by")) or (author if slash else model.upstream)
    if model.expiration_date:
        item["shutdown_date"] = model.expiration_date  # OpenAI's name for it
    return item


def _filled(value: Any, default: Any) -> Any:
    """The upstream's value, with what it lacks of the default."""
    if isinstance(default, dict):
        return {**default, **_mapping(value)}
    return default if value is None else value


def _priced(pricing: Mapping[str, Any], price: Price) -> dict[str, Any]:
    """An item's `pricing` with the operator's prices in it."""
    told = {key: value for key, value in pricing.items() if key != "overrides"} | _written(price)
    if price.tiers:
        told["overrides"] = [
            {"min_prompt_tokens": tier.min_input_tokens, **_written(tier.price)} for tier in price.tiers
        ]
    return told


def _written(price: Price) -> dict[str, str]:
    """The prices as OpenRouter writes them: strings, USD per token."""
    rates = {key: getattr(price, name) for key, name in _PRICED.items()}
    return {key: format(Decimal(rate).scaleb(-12).normalize(), "f") for key, rate in rates.items() if rate is not None}


# --- what changes ---------------------------------------------------------------------------------

_SIMULATED: Final = "xenios/sim"
_VARIANTS: Final = frozenset({"free", "nitro", "floor", "exacto", "thinking", "extended", "online", "beta"})


def _retirement(model: Model, today: date) -> str | None:
    try:
        day = date.fromisoformat((model.expiration_date or "")[:10])
    except ValueError:
        return None
    left = (day - today).days
    when = f"in {left} days" if left > 0 else "today" if left == 0 else f"{-left} days ago"
    return f"{'retires' if left >= 0 else 'was to retire'} on {day}, {when}"


def _changes(was: Model, now: Model) -> list[str]:
    """Prices and limits that both know and that differ, in words."""
    pairs = [
        ("input", _per_million(was.price.input), _per_million(now.price.input)),
        ("output", _per_million(was.price.output), _per_million(now.price.output)),
        ("context", was.context_length, now.context_length),
        ("output limit", was.max_output, now.max_output),
    ]
    return [f"{what} {old} became {new}" for what, old, new in pairs if None not in (old, new) and old != new]


def _per_million(pico: int | None) -> str | None:
    return None if pico is None else f"${pico / 1e6:g} per million"


# --- odds and ends --------------------------------------------------------------------------------


def _is_free(model_id: str) -> bool:
    return "free" in model_id.split(":")[1:]


def _first(preferred: int | None, other: int | None) -> int | None:
    return other if preferred is None else preferred


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    """A whole number from 0 up to what fits 53 bits; JSON may write it 200000.0."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
    return int(value) if whole and value == int(value) else None


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
