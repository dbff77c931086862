"""The client's body: read as its dialect says, strictly; what may never pass is taken out."""

from __future__ import annotations

import functools
import io
import json
import re
from typing import TYPE_CHECKING, Any

import msgspec
import multipart

from gateway.errors import BadRequest, TooLarge, UnsupportedMedia
from gateway.exchange import Form, FormFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.exchange import Exchange, JsonObject, Target

MULTIPART_PARTS = 256
_MISSING: tuple[Any, ...] = (None, "")
# Fields by which other gateways were made to send their key elsewhere.
NEVER = ("api_base", "base_url", "api_key")
# `upstream.client_may` → the body fields that it stands for.
CHOOSING_FIELDS = {
    "models": ("models",),
    "fallbacks": ("fallbacks",),
    "route": ("route",),
    "provider": ("provider",),
    "plugins": ("plugins", "web_search_options"),
    "service_tier": ("service_tier", "speed", "inference_geo"),  # the last two are Anthropic's, and cost more
    "presets": ("preset",),
}
# What a variant of a model's name (`author/model:online`) stands for: fields that must be allowed as well.
VARIANTS = {
    "online": ("plugins",),
    "nitro": ("provider", "service_tier"),
    "floor": ("provider",),
    "exacto": ("provider",),
}
_CHOOSING = frozenset(name for names in CHOOSING_FIELDS.values() for name in names)


def closed_fields(client_may: Sequence[str]) -> frozenset[str]:
    """The body fields that are taken out, whoever sends them."""
    chosen = {n for permission, names in CHOOSING_FIELDS.items() if permission not in client_may for n in names}
    return frozenset(NEVER) | chosen


# What is said to a model, beside parameters.
_SAID = (
    "messages", "prompt", "suffix", "input", "instructions", "system", "query", "documents", "tools", "deferred_tools",
)  # fmt: skip
LONGEST_MODEL = 500  # characters of a model's name
MOST_MODELS = 32  # that one request may name
# Form fields that are one plain value: read here and upstream alike.
_PLAIN = frozenset({"model", *NEVER, *_CHOOSING})
_AUTO = re.compile(r"(openrouter/(auto|bodybuilder|pareto)\b|.*/auto$)")


def parse_body(exchange: Exchange, content_type: str) -> None:
    """Fill `exchange.body`, `form` and `stream` from `raw_body`. Raises BadRequest, UnsupportedMedia, TooLarge."""
    kind, parameters = _media_type(content_type)
    if kind == "application/json" or not kind or kind.endswith("+json"):
        exchange.body = parse_object(exchange.raw_body)
    elif kind == "multipart/form-data" and exchange.dialect.request == "multipart":
        exchange.form = parse_form(exchange.raw_body, parameters)
        exchange.body = _fields(exchange.form)
    else:
        forms = "multipart/form-data or " if exchange.dialect.request == "multipart" else ""
        raise UnsupportedMedia(f"Send Content-Type: {forms}application/json; this request says {kind[:100]!r}.")
    exchange.stream = exchange.dialect.wants_stream(exchange.body)


def _media_type(content_type: str) -> tuple[str, str]:
    """The type itself, and its parameters."""
    kind, _, parameters = content_type.partition(";")
    return kind.strip().lower(), parameters


def parse_object(raw: bytes) -> JsonObject:
    """A JSON object, strictly: no NaN, no number out of range, no lone surrogate, no BOM, no endless nesting."""
    if not raw.strip():
        raise BadRequest("The request has no body; a JSON object is due.")
    try:
        data = msgspec.json.decode(raw)
    except RecursionError:
        raise BadRequest("The JSON body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The body is not valid JSON: {_reason(error, raw)}.") from None
    if not isinstance(data, dict):
        raise BadRequest("The body must be a JSON object.")
    return data


def _reason(error: Exception, raw: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        try:  # the decoder counts from the beginning of the text that it was at
            raw.decode()
        except UnicodeDecodeError as found:
            return f"not UTF-8 at byte {found.start}"
    if "truncated" in str(error) and raw.rstrip().endswith(b"}"):
        return "a string ends too early, or holds half of a surrogate pair"
    return str(error).partition(" - at ")[0][:200]


def parse_form(raw: bytes, parameters: str) -> Form:
    found = re.search(r'boundary="?([^";,\s]{1,200})"?', parameters)
    if found is None:
        raise BadRequest("Content-Type: multipart/form-data has no boundary.")
    try:
        parts = multipart.MultipartParser(
            io.BytesIO(raw),
            found[1],
            content_length=len(raw),
            part_limit=MULTIPART_PARTS,
            memory_limit=len(raw) + 1,
            spool_limit=len(raw) + 1,
            disk_limit=0,
            strict=True,
        )
        fields: list[tuple[str, str]] = []
        files: list[FormFile] = []
        for part in parts:
            if part.filename:
                files.append(
                    FormFile(part.name, part.filename, part.content_type or "application/octet-stream", part.raw)
                )
            else:
                fields.append((part.name, part.value))
    except multipart.ParserLimitReached as error:
        raise TooLarge(f"The multipart body has too many or too large parts: {error}.") from None
    except (multipart.MultipartError, UnicodeError, ValueError) as error:
        raise BadRequest(f"The multipart body is broken: {str(error)[:200]}.") from None
    return Form(fields, files)


def _fields(form: Form) -> JsonObject:
    """The form's fields as a body. What stands twice is refused: which of two the upstream would take is anybody's
    guess, and a scope must not hang on it.
    """
    body: JsonObject = {}
    for name, value in form.fields:
        plain = name.partition("[")[0]
        if name in body and not name.endswith("[]"):
            raise BadRequest(f"The field {name[:100]!r} stands twice in the form.", param=name[:100])
        if plain != name and plain in _PLAIN:
            raise BadRequest(f"The field {plain!r} can't be a list in a form.", param=plain)
        if name.endswith("[]"):
            body.setdefault(name, []).append(value)
        else:
            body[name] = value
    for file in form.files:
        if file.name in body or file.name.partition("[")[0] in _PLAIN:
            raise BadRequest(f"The field {file.name[:100]!r} can't be a file.", param=file.name[:100])
    return body


def admit_body(exchange: Exchange) -> None:
    """What must be there is there; what the client may not choose is taken out and named in a reply header.

    Raises BadRequest.
    """
    body, snapshot = exchange.body, exchange.snapshot
    closed, may = snapshot.derived.closed_fields, snapshot.settings.upstream.client_may
    if not closed.isdisjoint(body):
        _take_out(exchange, closed)
    names_others = not _CHOOSES_MODEL.isdisjoint(body)
    models = _listed_models(body) if names_others else None
    for name in exchange.dialect.required:
        # OpenRouter's clients may name several models instead of one
        if body.get(name) in _MISSING and not (name == "model" and models):
            raise BadRequest(f"The field `{name}` is missing.", param=name, code="missing_required_parameter")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest("`model` must be a string.", param="model", code="invalid_type")
    if models and not model:
        # As OpenRouter reads it. The first is `model` from here on, and may be an alias like any other.
        body["model"], *others = models
        if others:
            body["models"] = others
        else:
            del body["models"]
    every = asked_models(body) if names_others else [model] if model else ()
    if len(every) > MOST_MODELS:
        raise BadRequest(f"A request may name {MOST_MODELS} models at most.", param="models")
    for asked in every:
        if len(asked) > LONGEST_MODEL:
            raise BadRequest(f"A model's name has {LONGEST_MODEL} characters at most.", param="model")
        _check_special(asked, may)


def _take_out(exchange: Exchange, names: frozenset[str]) -> None:
    body = exchange.body
    closed = sorted(body.keys() & names)
    for name in closed:
        del body[name]
    exchange.reply_headers["x-xenios-removed"] = ", ".join(closed)


def _listed_models(body: JsonObject) -> list[str] | None:
    """OpenRouter's `models`. Raises BadRequest if it, or `fallbacks`, is not what it should be."""
    models = body.get("models")
    if models is not None and not _is_list_of_strings(models):
        raise BadRequest("`models` must be a list of model names.", param="models")
    if body.get("fallbacks") is not None:
        _check_fallbacks(body["fallbacks"])
    return models


def check_refused(exchange: Exchange) -> None:
    """What no upstream can do, and no plugin has taken out in `prepare_request` to do it. Raises BadRequest."""
    for name, why in exchange.dialect.refused.items():
        if exchange.body.get(name):
            raise BadRequest(why, param=name, code="unsupported_parameter")


def _check_fallbacks(fallbacks: Any) -> None:
    """Each names one model. What else stands there must not choose another, or a price, past whoever looks at it."""
    if not isinstance(fallbacks, list):
        raise BadRequest("`fallbacks` must be a list.", param="fallbacks")
    for fallback in fallbacks:
        if isinstance(fallback, str):
            continue
        if not isinstance(fallback, dict) or not isinstance(fallback.get("model"), str):
            raise BadRequest("`fallbacks` must be a list of objects with a `model`.", param="fallbacks")
        # parameters alone: what is said to a model is judged by its size, and by plugins, where it stands
        wrong = sorted(fallback.keys() & {*_CHOOSING, *NEVER, *_SAID})
        if wrong:
            raise BadRequest(f"A fallback can't have `{wrong[0]}`.", param="fallbacks")


def asked_models(body: JsonObject) -> list[str]:
    """Every model that the body names: `model`, OpenRouter's own fallbacks, and a preset, which stands for a model."""
    model, preset = body.get("model"), body.get("preset")
    asked = [str(model)] if model else []
    if preset:
        asked.append(f"@preset/{preset}")
    return asked + further_models(body)


def further_models(body: JsonObject) -> list[str]:
    """What the upstream may answer from instead of `model`: the entries of `models` and `fallbacks`."""
    models, fallbacks = body.get("models"), body.get("fallbacks")
    if not models and not fallbacks:
        return []
    listed = [f.get("model") if isinstance(f, dict) else f for f in fallbacks] if isinstance(fallbacks, list) else []
    return [str(m) for m in (*(models or ()), *listed) if m]


def may_choose(body: JsonObject, target: Target) -> bool:
    """May the upstream answer with another model than the target's: one of a list, a preset's, the latest?"""
    model = target.model
    if "models" in target.overrides or "@preset/" in model or model.startswith(("~", "openrouter/")):
        return True
    return not body.keys().isdisjoint(_CHOOSES_MODEL) and "models" not in target.strip


_CHOOSES_MODEL = frozenset({"models", "fallbacks", "preset"})


@functools.lru_cache(maxsize=1024)
def _check_special(model: str, may: tuple[str, ...]) -> None:
    """A preset or an auto-router lets its owner choose model and price; a variant is another way to write a field."""
    if ":" in model:
        for variant in model.lower().split(":")[1:]:
            if any(field not in may for field in VARIANTS.get(variant, ())):
                raise BadRequest(
                    f"`:{variant}` is not allowed on this gateway.", param="model", code="model_not_allowed"
                )
    if "@preset/" not in model and "auto" not in model and "openrouter/" not in model:
        return
    if "@preset/" in model and "presets" not in may:
        raise BadRequest("Presets are not allowed on this gateway.", param="model", code="model_not_allowed")
    if "auto_routers" not in may and _AUTO.match(model):
        raise BadRequest("Automatic routers are not allowed on this gateway.", param="model", code="model_not_allowed")


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def json_form_value(value: Any) -> str:
    """A form field's text for a value that a plugin set."""
    return value if isinstance(value, str) else json.dumps(value)
