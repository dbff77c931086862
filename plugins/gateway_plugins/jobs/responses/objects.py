"""The response object of OpenAI's Responses API in each of its states, as their SDKs' types demand it.

Each is made of the one before: what the client asked for is echoed from the start, an answer is laid over it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JsonObject = dict[str, Any]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

# Those after which nothing more comes.
ENDED = frozenset({"completed", "incomplete", "failed", "cancelled"})

_NUMBER = (int, float)
MOST_ECHOED = 8192  # bytes of one value: each look at a job reads them
# What is echoed of a request, of which types, and what stands there if the client said nothing, nonsense, or too much.
_ECHOED: tuple[tuple[str, tuple[type, ...], Any], ...] = (
    ("frequency_penalty", _NUMBER, 0.0),
    ("instructions", (str, list), None),
    ("max_output_tokens", (int,), None),
    ("max_tool_calls", (int,), None),
    ("metadata", (dict,), {}),
    ("model", (str,), ""),
    ("parallel_tool_calls", (bool,), True),
    ("presence_penalty", _NUMBER, 0.0),
    ("prompt_cache_key", (str,), None),
    ("reasoning", (dict,), {"effort": None, "summary": None}),
    ("safety_identifier", (str,), None),
    ("service_tier", (str,), "auto"),
    ("temperature", _NUMBER, 1.0),
    ("text", (dict,), {"format": {"type": "text"}}),
    ("tool_choice", (str, dict), "auto"),
    ("tools", (list,), []),
    ("top_logprobs", (int,), 0),
    ("top_p", _NUMBER, 1.0),
    ("truncation", (str,), "disabled"),
    ("user", (str,), None),
)
# Ours, whatever an upstream says: to it the call was a stateless one.
_OURS = ("id", "object", "created_at", "background", "store", "previous_response_id", "metadata")


def queued(body: Mapping[str, Any], response_id: str, created_at: int) -> JsonObject:
    """What a client is told that has just asked for it. `created_at` in seconds."""
    echoed = {name: _echo(body.get(name), types, default) for name, types, default in _ECHOED}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "queued",
        "background": True,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        **echoed,
        "output": [],
        "previous_response_id": body.get("previous_response_id"),
        "store": True,
        "usage": None,
    }


def in_progress(response: JsonObject) -> JsonObject:
    return {**response, "status": "in_progress"}


def answered(response: JsonObject, answer: Mapping[str, Any], now: int) -> JsonObject:
    """The end as the upstream tells it, completed or incomplete, under our id. What it leaves open stays as it was."""
    said = {name: value for name, value in answer.items() if value is not None and name not in _OURS}
    whole = {**response, "status": "completed", **said}
    if whole["status"] not in ENDED:
        whole["status"] = "completed"
    if not isinstance(whole["output"], list):
        whole["output"] = []
    whole["usage"] = _usage(whole["usage"])
    whole["completed_at"] = said.get("completed_at", now) if whole["status"] == "completed" else None
    return whole


def failed(response: JsonObject, code: str, message: str, output: Sequence[JsonObject] = ()) -> JsonObject:
    """`code` is one of the gateway's."""
    error = {"code": error_code(code), "message": message, "type": code, "param": None}
    return {**response, "status": "failed", "error": error, "output": list(output)}


def cancelled(response: JsonObject, output: Sequence[JsonObject] = ()) -> JsonObject:
    """`output`: what there was of the answer; its unfinished items say `incomplete`."""
    return {**response, "status": "cancelled", "output": list(output)}


# The API's codes are a closed list; the gateway's own stands in `type`.
_CODES = {
    "rate_limit_exceeded": "rate_limit_exceeded",
    "invalid_request": "invalid_prompt",
    "context_length_exceeded": "invalid_prompt",
    "content_policy_violation": "invalid_prompt",
}


def error_code(code: str) -> str:
    """The API's code for one of ours."""
    return _CODES.get(code, "server_error")


def _echo(value: Any, types: tuple[type, ...], default: Any) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return default
    return value if len(msgspec.json.encode(value)) <= MOST_ECHOED else default


def _usage(usage: Any) -> JsonObject | None:
    """With the details that the SDKs' types demand; None is unknown."""
    if not isinstance(usage, dict):
        return None
    given, written = usage.get("input_tokens"), usage.get("output_tokens")
    if not isinstance(given, int) or not isinstance(written, int):
        return None
    before, after = usage.get("input_tokens_details"), usage.get("output_tokens_details")
    return {
        **usage,
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            **(_known(before) if isinstance(before, dict) else {}),
        },
        "output_tokens_details": {"reasoning_tokens": 0, **(_known(after) if isinstance(after, dict) else {})},
        "total_tokens": usage.get("total_tokens") or given + written,
    }


def _known(details: Mapping[str, Any]) -> JsonObject:
    return {name: value for name, value in details.items() if value is not None}
