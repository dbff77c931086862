"""What is sent to an upstream: the body as edited for one target, and the few headers that may pass.

Bodies are always encoded anew: two parsers can't disagree about a duplicate key that is not there any more.
"""

from __future__ import annotations

import functools
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from multidict import istr

from gateway.errors import PluginError
from gateway.exchange import Attempt, Limits
from gateway.incoming import json_form_value
from gateway.logs import get_logger

if TYPE_CHECKING:
    from gateway.exchange import Exchange, Form, JsonObject, Target
    from gateway.upstream import UpstreamClient

# Fields of OpenRouter's own that other servers answer with "unknown parameter".
_OPENROUTER_ONLY = (
    "models",
    "fallbacks",
    "route",
    "provider",
    "plugins",
    "usage",
    "transforms",
    "session_id",
    "trace",
)
_REQUEST_ID = istr("X-Request-Id")
_encode = msgspec.json.encode
log = get_logger("gateway.outgoing")


def attempt_for(exchange: Exchange, target: Target) -> Attempt:
    """Body, headers and time limits of one attempt at `target`."""
    upstream = exchange.snapshot.upstreams[target.upstream]
    body = target_body(exchange, target, upstream)
    headers = _headers(exchange, upstream)
    if exchange.form is not None:
        content, headers["Content-Type"] = _form_body(exchange, exchange.form, body)
    else:
        try:
            content = _encode(body)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise bad_body(exchange, f"what is no JSON: {error}") from error
    limits = exchange.snapshot.derived.limits
    if target.limits is not None:
        limits = _over(target.limits, limits)
    return Attempt(target, content, headers, limits)


_over = functools.lru_cache(maxsize=1024)(Limits.over)


def bad_body(exchange: Exchange, what: str) -> PluginError:
    """A plugin's edit made the request one that can't be sent; the log names who may edit."""
    plugins = [impl.plugin for impl in exchange.snapshot.hooks.prepare_request]
    exchange.error_by = exchange.error_by or ", ".join(f"{plugin}.prepare_request" for plugin in plugins)
    log.error("plugin_left_bad_body", plugins=plugins, found=what[:200], request_id=exchange.request_id)
    return PluginError()


def target_body(exchange: Exchange, target: Target, upstream: UpstreamClient) -> JsonObject:
    """The body for one target; the exchange's own is left alone."""
    dialect = exchange.dialect
    body: JsonObject = {**exchange.body, "model": target.model, **dialect.forced, **target.overrides}
    for name in target.strip:
        body.pop(name, None)
    chosen = target.overrides.get("provider")
    if upstream.kind == "openai":
        for name in _OPENROUTER_ONLY:
            body.pop(name, None)
        if dialect.usage_on_request and dialect.wants_stream(body):
            options = body.get("stream_options")
            body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    elif upstream.settings.provider or chosen:
        # preference by preference: what the operator says of this target, then of its upstream, then the client's
        asked = None if "provider" in target.strip else exchange.body.get("provider")
        asked = asked if isinstance(asked, dict) else {}
        body["provider"] = {**asked, **(upstream.settings.provider or {}), **(chosen or {})}
    return body


def _headers(exchange: Exchange, upstream: UpstreamClient) -> dict[str, str]:
    headers = dict(upstream.headers)
    sent = exchange.request.pick(exchange.snapshot.derived.forwarded[exchange.dialect.endpoint])
    if sent:
        headers.update({name: value for name, value in sent.items() if value.isascii() or _sendable(value)})
    if exchange.snapshot.settings.upstream.send_request_id:
        headers[_REQUEST_ID] = exchange.request_id
    if exchange.stream:
        headers["Accept"] = "text/event-stream"
    return headers


def _sendable(value: str) -> bool:
    """False for bytes that were not UTF-8: they can't be written again."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _form_body(exchange: Exchange, form: Form, body: JsonObject) -> tuple[bytes, str]:
    """The form's bytes as they came if nothing changed, else written anew."""
    if body == exchange.body and body == dict(form.fields):
        return exchange.raw_body, exchange.request.header("content-type") or ""
    return write_form(body, form)


def write_form(body: JsonObject, form: Form) -> tuple[bytes, str]:
    """multipart/form-data of the fields in `body` and the files of `form`; (bytes, content type)."""
    boundary = secrets.token_hex(16)
    out: list[bytes] = []
    for name, value in body.items():
        for item in value if isinstance(value, list) else [value]:
            out += [_part(boundary, f'name="{_quote(name)}"', None, json_form_value(item).encode())]
    for file in form.files:
        disposition = f'name="{_quote(file.name)}"; filename="{_quote(file.filename)}"'
        out.append(_part(boundary, disposition, file.content_type, file.content))
    out.append(f"--{boundary}--\r\n".encode())
    return b"".join(out), f"multipart/form-data; boundary={boundary}"


def _part(boundary: str, disposition: str, content_type: str | None, content: bytes) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n"
    if content_type:
        head += f"Content-Type: {_quote(content_type)}\r\n"
    return head.encode() + b"\r\n" + content + b"\r\n"


def _quote(text: Any) -> str:
    return str(text).replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
