"""Is a whole answer the JSON that its request asked for?

Looked at are chat completions and responses: text where a JSON object or a JSON schema was asked for, and arguments of
tool calls. Of a schema the plain part is checked: `type`, `required`, `properties`, `items`, `enum`, `const`. What else
it says (references, alternatives, patterns) is taken as kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gateway import Exchange, Target

    Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_DEEPEST = 50


_OBJECT: Mapping[str, Any] = {"type": "object"}


def is_invalid(exchange: Exchange, target: Target, body: bytes) -> bool:
    """`body`: the upstream's whole reply to what was sent for this target."""
    pieces = _PIECES.get(exchange.endpoint)
    if pieces is None:
        return False
    asked = target.applied_to(exchange.body)
    wanted, tools = _format(asked), asked.get("tools")
    if wanted is None and not tools:
        return False
    try:
        reply = msgspec.json.decode(body)
        return any(_is_wrong(text, schema) for text, schema in pieces(reply, wanted, _arguments(tools)))
    except (msgspec.DecodeError, UnicodeError, RecursionError, LookupError, TypeError, AttributeError):
        return True


def _format(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that the text must keep to, {} for any JSON; None where plain text is fine."""
    text = body.get("text")
    asked = body.get("response_format") or (text.get("format") if isinstance(text, dict) else None)
    if not isinstance(asked, dict) or asked.get("type") not in {"json_object", "json_schema"}:
        return None
    if asked["type"] == "json_object":
        return _OBJECT
    # chat completions hold it one level deeper
    inner = asked.get("json_schema")
    schema = (inner if isinstance(inner, dict) else asked).get("schema")
    return schema if isinstance(schema, dict) else {}


def _arguments(tools: Any) -> dict[str, Schema]:
    """The schema of each function's arguments, as far as one can be read; they are always an object."""
    found: dict[str, Schema] = {}
    for tool in tools if isinstance(tools, list) else ():
        # chat completions hold it one level deeper
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            schema = function.get("parameters")
            found[name] = {**schema, **_OBJECT} if isinstance(schema, dict) else _OBJECT
    return found


def _of_chat(reply: Any, wanted: Schema | None, tools: Mapping[str, Schema]) -> Iterator[tuple[str, Schema]]:
    for choice in reply["choices"]:
        message = choice["message"]
        calls = message.get("tool_calls") or ()
        for call in calls:
            if "function" in call:
                function = call["function"]
                yield function["arguments"] or "{}", tools.get(function.get("name"), _OBJECT)
        if wanted is not None and not calls and not message.get("refusal"):
            yield message.get("content") or "", wanted


def _of_responses(reply: Any, wanted: Schema | None, tools: Mapping[str, Schema]) -> Iterator[tuple[str, Schema]]:
    for item in reply["output"]:
        if item["type"] == "function_call":
            yield item["arguments"] or "{}", tools.get(item.get("name"), _OBJECT)
        elif item["type"] == "message" and wanted is not None:
            yield from ((part["text"], wanted) for part in item["content"] if part["type"] == "output_text")


_PIECES = {"chat/completions": _of_chat, "responses": _of_responses}


def _is_wrong(text: str, schema: Mapping[str, Any]) -> bool:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return True
    return not fits(value, schema)


def fits(value: Any, schema: Any, depth: int = 0) -> bool:
    """By the plain part of the schema."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return True
    types, allowed = schema.get("type"), schema.get("enum")
    if types is not None and not any(_is(value, name) for name in (types if isinstance(types, list) else [types])):
        return False
    if (isinstance(allowed, list) and value not in allowed) or ("const" in schema and value != schema["const"]):
        return False
    if isinstance(value, dict):
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(required, list) and not all(name in value for name in required if isinstance(name, str)):
            return False
        return not isinstance(properties, dict) or all(
            fits(item, properties.get(name), depth + 1) for name, item in value.items()
        )
    return not isinstance(value, list) or all(fits(item, schema.get("items"), depth + 1) for item in value)


def _is(value: Any, name: object) -> bool:
    known = _TYPES.get(name) if isinstance(name, str) else None
    if known is None:
        return True
    if isinstance(value, bool):
        return name == "boolean"
    # 2.0 is an integer in JSON Schema
    return isinstance(value, known) or (name == "integer" and isinstance(value, float) and value % 1 == 0)
