"""OpenAPI 3.1 of the routes in force. Bodies that are passed on are described as far as the gateway checks them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gateway._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.routes import Route

_ERRORS = {
    "400": "The request is not valid.",
    "401": "Incorrect or missing API key.",
    "403": "This key may not do that.",
    "404": "Not found.",
    "408": "The request did not arrive in time.",
    "409": "Something stands in the way.",
    "413": "The request is too large.",
    "415": "Unsupported content type.",
    "429": "Too many requests.",
    "502": "The upstream failed.",
    "503": "A part of the gateway, or the upstream, is not available.",
    "504": "It took too long.",
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r"\{(\w+)(?::[^{}]+)?\}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Xenios", "version": __version__, "description": "A self-hosted LLM gateway."},
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {"OpenAIError": _openai_error(), "AnthropicError": _anthropic_error()},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    error = {"$ref": f"#/components/schemas/{'AnthropicError' if route.dialect.anthropic else 'OpenAIError'}"}
    responses: dict[str, Any] = {"200": _success(route)}
    if route.handler is not None and route.method == "POST":
        responses["201"] = {**responses["200"], "description": "It was made."}
    codes = _ERRORS if route.access != "public" else ("400", "404", "503")
    for code in codes:
        schema = {} if route.path == "/health/ready" else error
        responses[code] = {"description": _ERRORS[code], "content": {"application/json": {"schema": schema}}}
    out: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', route.path.strip('/').lower())}",
        "summary": route.summary or f"Passed on to the upstream: {route.endpoint}.",
        "responses": responses,
    }
    if route.access != "public":
        out["security"] = [{"bearer": []}]
    names = re.findall(r"\{(\w+)(?::[^{}]+)?\}", route.path)
    if names:
        out["parameters"] = [
            {"name": n, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for n in names
        ]
    if route.body == "json":
        out["requestBody"] = {"required": True, "content": _content(route)}
    return out


def _content(route: Route) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "additionalProperties": True}
    if route.proxied:
        schema["properties"] = {"model": {"type": "string", "minLength": 1}}
        schema["required"] = list(route.dialect.required)
    elif route.dialect.endpoint:
        schema["required"] = [name for name in route.dialect.required if name != "model"]
    content = {"application/json": {"schema": schema}}
    if route.dialect.request == "multipart":
        form = {"type": "object", "required": ["model", "file"], "properties": {
            "model": {"type": "string", "minLength": 1}, "file": {"type": "string", "format": "binary"}}}  # fmt: skip
        content["multipart/form-data"] = {"schema": form}
    return content


def _success(route: Route) -> dict[str, Any]:
    kind = route.dialect.reply_content_type if route.proxied else route.produces
    content: dict[str, Any] = {kind: {"schema": {}}}
    if route.proxied and route.dialect.grammar is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if route.dialect.reply == "binary":
        content = {"*/*": {"schema": {}}}
    return {"description": "The answer.", "content": content}


def _openai_error() -> dict[str, Any]:
    text = {"type": "string"}
    maybe = {"type": ["string", "null"]}
    inner = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": text, "type": text, "param": maybe, "code": maybe},
    }
    return {"type": "object", "required": ["error"], "properties": {"error": inner}}


def _anthropic_error() -> dict[str, Any]:
    inner = {
        "type": "object",
        "required": ["type", "message"],
        "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
    }
    return {
        "type": "object",
        "required": ["type", "error"],
        "properties": {"type": {"const": "error"}, "error": inner, "request_id": {"type": "string"}},
    }
