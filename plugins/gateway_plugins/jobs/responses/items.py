"""The items of a request's `input`: as they are listed, and as a later response continues them."""

from __future__ import annotations

from hashlib import blake2s
from typing import TYPE_CHECKING, Any

from gateway import BadRequest
from gateway_plugins.jobs import api

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway_plugins.jobs.responses.objects import JsonObject

# How ids of items begin, as people know them from OpenAI's.
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "cto",
    "web_search_call": "ws",
    "file_search_call": "fs",
    "image_generation_call": "ig",
    "mcp_call": "mcp",
}
_HAVE_STATUS = frozenset({"message", "function_call", "function_call_output"})


def listed(given: Any, response_id: str) -> list[JsonObject]:
    """Each item of an `input` with its type, an id that never changes, and content as a list."""
    items = _as_list(given) if isinstance(given, str | list) else []
    return [_listed(item, response_id, place) for place, item in enumerate(items) if isinstance(item, dict)]


def _listed(item: JsonObject, response_id: str, place: int) -> JsonObject:
    kind = item.get("type") or "message"
    out = {**item, "type": kind}
    if not out.get("id"):
        tail = blake2s(f"{response_id}:{place}".encode(), digest_size=16).hexdigest()
        out["id"] = f"{_PREFIXES.get(kind, 'item')}_{tail}"
    if kind in _HAVE_STATUS:
        out.setdefault("status", "completed")
    if kind == "message":
        out["content"] = _content(item.get("content"), item.get("role"))
    return out


def _content(content: Any, role: Any) -> list[Any]:
    if not isinstance(content, str):
        return content if isinstance(content, list) else []
    if role == "assistant":
        return [{"type": "output_text", "text": content, "annotations": [], "logprobs": []}]
    return [{"type": "input_text", "text": content}]


def page(items: Sequence[JsonObject], *, limit: int, order: str, after: str | None) -> JsonObject:
    """One page, in OpenAI's envelope. Raises BadRequest if there is no item `after`."""
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        place = next((n for n, item in enumerate(ordered) if item["id"] == after), None)
        if place is None:
            raise BadRequest("`after` names no item of this response.", param="after")
        ordered = ordered[place + 1 :]
    return api.listed(ordered[:limit], more=len(ordered) > limit)


def continued(before: Any, output: Iterable[JsonObject], given: Any) -> list[Any]:
    """The `input` of a response that follows another one: all that was said, then what is said now.

    Reasoning is left out unless it carries its own content, encrypted: upstreams that keep nothing would look it up.
    """
    said = [item for item in output if item.get("type") != "reasoning" or item.get("encrypted_content")]
    return [*_as_list(before), *said, *_as_list(given)]


def _as_list(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise BadRequest("`input` must be a text or a list of items.", param="input")
    return given
