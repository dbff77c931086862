"""The text dialects on the wire: reading a request, whole answers, event streams, errors.

Shapes: OpenRouter's SDK 1.3.84 (`components/`), the OpenAI and Anthropic streaming references.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.simulator.answers import Answer, Ask, Tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

JSON = dict[str, Any]
ANY_OBJECT: JSON = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
DONE = b"data: [DONE]\n\n"
_NATIVE = {"stop": "stop", "length": "max_tokens", "tool_calls": "tool_use", "error": "error"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERROR_TYPES = {
    400: "invalid_request", 401: "authentication", 402: "payment_required", 403: "permission_denied",
    404: "not_found", 412: "precondition_failed", 413: "payload_too_large", 422: "unprocessable",
    429: "rate_limit_exceeded", 500: "server", 502: "provider_unavailable", 503: "provider_overloaded",
    504: "timeout", 524: "timeout", 529: "provider_overloaded",
}  # fmt: skip
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as OpenRouter words it; `status` is the HTTP status and `error.code`."""

    status: int
    message: str
    metadata: JSON = field(default_factory=dict)

    @property
    def error_type(self) -> str:
        return str(self.metadata.get("error_type") or ERROR_TYPES.get(self.status, "unmapped"))

    def error(self) -> JSON:
        metadata = {"error_type": self.error_type, **self.metadata}
        return {"code": self.status, "message": self.message, "metadata": metadata}


LOST = Failure(502, "Provider disconnected", {"provider_name": "Simulated", "provider_code": "upstream_error"})


@dataclass(frozen=True, slots=True)
class Reply:
    """All that a dialect needs to write one answer."""

    id: str
    created: int
    model: str
    ask: Ask
    answer: Answer
    blank_finish: bool = False

    @property
    def finish(self) -> str | None:
        if self.blank_finish:
            return None
        return "error" if self.answer.failed else self.answer.finish


@dataclass(frozen=True, slots=True)
class Frames:
    """One streamed answer, cut where faults can strike. `error(n)`: a failure after n content frames."""

    preamble: list[bytes]
    content: list[bytes]
    finish: list[bytes]
    usage: list[bytes]
    done: list[bytes]
    error: Callable[[int], list[bytes]]


def half(count: int) -> int:
    """How many of `count` content frames a stream sends that fails in its middle."""
    return max(1, count // 2) if count else 0


def data(value: Any) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(value)


def event(value: JSON) -> bytes:
    return b"event: %b\n%b" % (str(value["type"]).encode(), data(value))


def plain_error(failure: Failure) -> JSON:
    return {"error": failure.error(), "user_id": "user_simulated"}


def responses_error(failure: Failure) -> JSON:
    return {**plain_error(failure), "error_type": failure.error_type}


def messages_error(failure: Failure) -> JSON:
    kind = _ANTHROPIC_TYPES.get(failure.status, "api_error")
    error = {"type": kind, "message": failure.message, "error_type": failure.error_type, **failure.metadata}
    return {"type": "error", "error": error, "request_id": None}


# reading


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of any dialect."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(text_of(part) for part in content)
    if isinstance(content, dict):
        return text_of(content.get("text") or content.get("content") or "")
    return ""


def _limit(body: JSON, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := body.get(name), int) and value > 0), None)


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    return tuple(item for item in values if isinstance(item, str)) if isinstance(values, list) else ()


def _dicts(value: Any) -> list[JSON]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _size(*parts: Any) -> int:
    return sum(len(part) if isinstance(part, str) else len(msgspec.json.encode(part)) for part in parts if part)


def _choice(value: Any) -> str:
    """Of any dialect: "auto", "any", {"function": {"name": …}}, {"type": "tool", "name": …}."""
    if isinstance(value, dict):
        inner = value.get("function")
        named = inner.get("name") if isinstance(inner, dict) else value.get("name")
        value = named or value.get("type")
    if not isinstance(value, str):
        return "auto"
    return "required" if value == "any" else value


def _tools(value: Any, schema: str) -> tuple[Tool, ...]:
    found = []
    for item in _dicts(value):
        inner = item["function"] if isinstance(item.get("function"), dict) else item
        if isinstance(inner.get("name"), str) and (schema in inner or item.get("type") in {"function", "custom", None}):
            found.append(Tool(inner["name"], inner.get(schema) or {"type": "object"}))
    return tuple(found)


def _format(value: Any) -> JSON | None:
    """The schema to satisfy, from `response_format`, `text.format` or `output_config.format`."""
    if not isinstance(value, dict):
        return None
    if value.get("type") == "json_schema":
        inner = value["json_schema"] if isinstance(value.get("json_schema"), dict) else value
        schema = inner.get("schema")
        return schema if isinstance(schema, dict) else ANY_OBJECT
    return ANY_OBJECT if value.get("type") == "json_object" else None


def _reasons(body: JSON) -> bool:
    wanted = body.get("reasoning")
    effort = wanted.get("effort") if isinstance(wanted, dict) else body.get("reasoning_effort")
    if isinstance(wanted, dict) and (wanted.get("exclude") or wanted.get("enabled") is False):
        return False
    return effort != "none" and (isinstance(wanted, dict) or effort is not None)


def _last_user(messages: list[JSON]) -> str:
    return next((text_of(item.get("content")) for item in reversed(messages) if item.get("role") == "user"), "")


def read_chat(body: JSON) -> Ask:
    messages = _dicts(body.get("messages"))
    choices = body.get("n")
    return Ask(
        body,
        _last_user(messages),
        sum(_size(text_of(item.get("content")), item.get("tool_calls")) for item in messages)
        + _size(body.get("tools")),
        after_tool=bool(messages) and messages[-1].get("role") == "tool",
        tools=_tools(body.get("tools"), "parameters"),
        tool_choice=_choice(body.get("tool_choice")),
        output=_format(body.get("response_format")),
        max_tokens=_limit(body, "max_completion_tokens", "max_tokens"),
        choices=choices if isinstance(choices, int) and 0 < choices <= 128 else 1,
        reasoning=_reasons(body),
        stop=_stops(body.get("stop")),
    )


def read_completion(body: JSON) -> Ask:
    prompt = body.get("prompt")
    text = prompt if isinstance(prompt, str) else text_of(prompt)
    choices = body.get("n")
    return Ask(
        body,
        text,
        _size(prompt),
        max_tokens=_limit(body, "max_tokens"),
        choices=choices if isinstance(choices, int) and 0 < choices <= 128 else 1,
        stop=_stops(body.get("stop")),
    )


def read_responses(body: JSON) -> Ask:
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else _dicts(given)
    text = body.get("text")
    return Ask(
        body,
        _last_user(items),
        sum(_size(text_of(item.get("content")), item.get("arguments"), item.get("output")) for item in items)
        + _size(body.get("instructions"), body.get("tools")),
        after_tool=bool(items) and str(items[-1].get("type")).endswith("_output"),
        tools=_tools(body.get("tools"), "parameters"),
        tool_choice=_choice(body.get("tool_choice")),
        output=_format(text.get("format")) if isinstance(text, dict) else None,
        max_tokens=_limit(body, "max_output_tokens"),
        reasoning=_reasons(body),
    )


def read_messages(body: JSON) -> Ask:
    messages = _dicts(body.get("messages"))
    last = messages[-1].get("content") if messages else None
    thinking = body.get("thinking")
    config = body.get("output_config")
    chosen = config.get("format") if isinstance(config, dict) else body.get("output_format")
    return Ask(
        body,
        _last_user(messages),
        sum(_size(text_of(item.get("content"))) for item in messages)
        + _size(text_of(body.get("system")), body.get("tools")),
        after_tool=any(part.get("type") == "tool_result" for part in _dicts(last)),
        tools=_tools(body.get("tools"), "input_schema"),
        tool_choice=_choice(body.get("tool_choice")),
        output=_format(chosen),
        max_tokens=_limit(body, "max_tokens"),
        reasoning=isinstance(thinking, dict) and thinking.get("type") in {"enabled", "adaptive"},
        stop=_stops(body.get("stop_sequences")),
    )


# usage


def chat_usage(answer: Answer) -> JSON:
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "cost": usage.cost,
        "is_byok": False,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "audio_tokens": 0,
            "video_tokens": 0,
        },
        "cost_details": {
            "upstream_inference_cost": None,
            "upstream_inference_prompt_cost": usage.prompt_cost,
            "upstream_inference_completions_cost": usage.completion_cost,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": 0,
            "image_tokens": 0,
        },
    }


def _responses_usage(answer: Answer) -> JSON | None:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.total,
        "cost": usage.cost,
        "is_byok": False,
        "cost_details": {
            "upstream_inference_cost": None,
            "upstream_inference_input_cost": usage.prompt_cost,
            "upstream_inference_output_cost": usage.completion_cost,
        },
    } if answer.reports_usage else None  # fmt: skip


def _messages_usage(answer: Answer) -> JSON:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt,
        "output_tokens": usage.completion,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "service_tier": "standard",
        "cost": usage.cost,
        "is_byok": False,
    }


# chat and completions


def _native(reply: Reply) -> str | None:
    return _NATIVE.get(reply.finish or "")


def _text_or_half(reply: Reply) -> str:
    pieces = reply.answer.pieces
    return "".join(pieces[: half(len(pieces))]) if reply.answer.failed else reply.answer.text


def _call_id(reply: Reply) -> str:
    return "call_" + reply.id[-12:].replace("-", "")


def _reasoning_detail(text: str) -> JSON:
    return {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}


def chat_whole(reply: Reply) -> JSON:
    answer = reply.answer
    message: JSON = {"role": "assistant", "content": _text_or_half(reply), "refusal": None, "reasoning": None}
    if answer.reasoning:
        message["reasoning"] = "".join(answer.reasoning)
        message["reasoning_details"] = [_reasoning_detail("".join(answer.reasoning))]
    if answer.call:
        tool, arguments = answer.call
        call = {
            "index": 0,
            "id": _call_id(reply),
            "type": "function",
            "function": {"name": tool.name, "arguments": arguments},
        }
        message |= {"content": None, "tool_calls": [call]}
    choice: JSON = {
        "logprobs": None,
        "finish_reason": reply.finish,
        "native_finish_reason": _native(reply),
        "message": message,
    }
    if answer.failed:
        choice["error"] = LOST.error()
    return _chat_envelope(reply, "chat.completion", [{"index": n, **choice} for n in range(reply.ask.choices)])


def _chat_envelope(reply: Reply, kind: str, choices: list[JSON]) -> JSON:
    whole = {
        "id": reply.id,
        "provider": "Simulated",
        "model": reply.model,
        "object": kind,
        "created": reply.created,
        "system_fingerprint": None,
        "choices": choices,
    }
    return whole | {"usage": chat_usage(reply.answer)} if reply.answer.reports_usage else whole


def completion_whole(reply: Reply) -> JSON:
    choice: JSON = {
        "text": _text_or_half(reply),
        "logprobs": None,
        "finish_reason": reply.finish,
        "native_finish_reason": _native(reply),
    }
    if reply.answer.failed:
        choice["error"] = LOST.error()
    return _chat_envelope(reply, "text_completion", [{"index": n, **choice} for n in range(reply.ask.choices)])


def _chunk(reply: Reply, kind: str, choices: list[JSON], **more: Any) -> bytes:
    return data({
        "id": reply.id,
        "provider": "Simulated",
        "model": reply.model,
        "object": kind,
        "created": reply.created,
        "choices": choices,
        **more,
    })  # fmt: skip


def _delta(reply: Reply, delta: JSON, index: int = 0, finish: str | None = None) -> bytes:
    native = _NATIVE.get(finish or "")
    choice = {
        "index": index,
        "delta": delta,
        "finish_reason": finish,
        "native_finish_reason": native,
        "logprobs": None,
    }
    return _chunk(reply, "chat.completion.chunk", [choice])


def _call_deltas(reply: Reply, tool: Tool, arguments: str) -> Iterator[bytes]:
    head: JSON = {
        "index": 0,
        "id": _call_id(reply),
        "type": "function",
        "function": {"name": tool.name, "arguments": ""},
    }
    yield _delta(reply, {"role": "assistant", "content": None, "tool_calls": [head]})
    for part in _thirds(arguments):
        yield _delta(reply, {"tool_calls": [{"index": 0, "function": {"arguments": part}}]})


def _thirds(text: str) -> list[str]:
    size = max(1, -(-len(text) // 3))
    return [text[at : at + size] for at in range(0, len(text), size)]


def _chat_content(reply: Reply) -> Iterator[bytes]:
    for part in reply.answer.reasoning:
        yield _delta(
            reply,
            {
                "role": "assistant",
                "content": "",
                "reasoning": part,
                "reasoning_details": [_reasoning_detail(part)],
            },
        )
    if reply.answer.call:
        yield from _call_deltas(reply, *reply.answer.call)
    for part in reply.answer.pieces:
        for index in range(reply.ask.choices):
            yield _delta(reply, {"role": "assistant", "content": part}, index)


def chat_frames(reply: Reply) -> Frames:
    kind = "chat.completion.chunk"
    choices = range(reply.ask.choices)
    usage_choices = {"usage": chat_usage(reply.answer)}
    failed = {"index": 0, "delta": {"content": ""}, "finish_reason": "error", "native_finish_reason": "error"}
    return Frames(
        preamble=[_delta(reply, {"role": "assistant", "content": ""}, index) for index in choices],
        content=list(_chat_content(reply)),
        finish=[]
        if reply.blank_finish
        else [_delta(reply, {"role": "assistant", "content": ""}, index, reply.finish) for index in choices],
        usage=[_chunk(reply, kind, [], **usage_choices)] if reply.answer.reports_usage else [],
        done=[DONE],
        error=lambda _: [_chunk(reply, kind, [failed], error=LOST.error())],
    )


def completion_frames(reply: Reply) -> Frames:
    def chunk(text: str, index: int = 0, finish: str | None = None) -> bytes:
        choice = {
            "index": index,
            "text": text,
            "finish_reason": finish,
            "native_finish_reason": finish,
            "logprobs": None,
        }
        return _chunk(reply, "text_completion", [choice])

    choices = range(reply.ask.choices)
    failed = {"index": 0, "text": "", "finish_reason": "error"}
    return Frames(
        preamble=[chunk("")],
        content=[chunk(part, index) for part in reply.answer.pieces for index in choices],
        finish=[] if reply.blank_finish else [chunk("", index, reply.finish) for index in choices],
        usage=[_chunk(reply, "text_completion", [], usage=chat_usage(reply.answer))]
        if reply.answer.reports_usage
        else [],
        done=[DONE],
        error=lambda _: [_chunk(reply, "text_completion", [failed], error=LOST.error())],
    )


# responses


def _responses_envelope(reply: Reply, status: str, output: list[JSON], **more: Any) -> JSON:
    body = reply.ask.body
    echoed = {name: body.get(name) for name in ("instructions", "max_output_tokens", "temperature", "top_p")}
    return {
        "id": reply.id,
        "object": "response",
        "created_at": reply.created,
        "completed_at": reply.created if status == "completed" else None,
        "model": reply.model,
        "status": status,
        "output": output,
        "error": None,
        "incomplete_details": None,
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": bool(body.get("parallel_tool_calls", True)),
        "presence_penalty": None,
        "frequency_penalty": None,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "text": body.get("text") or {"format": {"type": "text"}},
        "reasoning": body.get("reasoning"),
        "background": False,
        "store": False,
        "previous_response_id": None,
        "service_tier": "default",
        "truncation": "disabled",
        "usage": None,
        **echoed,
        **more,
    }


def _items(reply: Reply) -> list[JSON]:
    """The finished output items."""
    answer, tail = reply.answer, reply.id[-12:].replace("-", "")
    items: list[JSON] = []
    if answer.reasoning:
        summary = [{"type": "summary_text", "text": "".join(answer.reasoning)}]
        items.append({"type": "reasoning", "id": f"rs_{tail}", "summary": summary, "status": "completed"})
    if answer.call:
        tool, arguments = answer.call
        call = {"type": "function_call", "id": f"fc_{tail}", "call_id": _call_id(reply), "name": tool.name}
        items.append({**call, "arguments": arguments, "status": "completed"})
    else:
        status = "incomplete" if answer.finish == "length" or answer.failed else "completed"
        part = {"type": "output_text", "text": _text_or_half(reply), "annotations": [], "logprobs": []}
        message = {
            "type": "message",
            "id": f"msg_{tail}",
            "role": "assistant",
            "status": status,
            "content": [part],
        }
        items.append(message)
    return items


def _terminal(reply: Reply) -> tuple[str, JSON]:
    """The status of the finished response and the fields that go with it."""
    if reply.answer.failed:
        return "failed", {
            "error": {"code": "server_error", "message": LOST.message},
            "error_type": LOST.error_type,
        }
    if reply.answer.finish == "length":
        return "incomplete", {"incomplete_details": {"reason": "max_output_tokens"}}
    return ("in_progress", {}) if reply.blank_finish else ("completed", {})


def responses_whole(reply: Reply) -> JSON:
    status, more = _terminal(reply)
    return _responses_envelope(reply, status, _items(reply), **more, usage=_responses_usage(reply.answer))


def _item_events(reply: Reply, item: JSON, index: int) -> tuple[list[JSON], list[JSON], list[JSON]]:
    """Events that open, fill and close one output item."""
    at: JSON = {"output_index": index, "item_id": item["id"]}
    parts: Sequence[str]
    part: JSON
    if item["type"] == "reasoning":
        at = {**at, "summary_index": 0}
        kind, parts, empty = (
            "response.reasoning_summary_text",
            reply.answer.reasoning,
            {**item, "summary": []},
        )
        part = {**item["summary"][0], "text": ""}
        opened = [{"type": "response.reasoning_summary_part.added", **at, "part": part}]
        text = item["summary"][0]["text"]
        closed = [
            {"type": f"{kind}.done", **at, "text": text},
            {"type": "response.reasoning_summary_part.done", **at, "part": item["summary"][0]},
        ]
    elif item["type"] == "function_call":
        kind, parts, empty = (
            "response.function_call_arguments",
            _thirds(item["arguments"]),
            {**item, "arguments": ""},
        )
        opened = []
        closed = [{"type": f"{kind}.done", **at, "arguments": item["arguments"], "name": item["name"]}]
    else:
        at = {**at, "content_index": 0}
        kind, parts, empty = "response.output_text", reply.answer.pieces, {**item, "content": []}
        part = {**item["content"][0], "text": ""}
        opened = [{"type": "response.content_part.added", **at, "part": part}]
        closed = [
            {"type": f"{kind}.done", **at, "text": item["content"][0]["text"], "logprobs": []},
            {"type": "response.content_part.done", **at, "part": item["content"][0]},
        ]
    more: JSON = {"logprobs": []} if kind == "response.output_text" else {}
    added = {
        "type": "response.output_item.added",
        "output_index": index,
        "item": {**empty, "status": "in_progress"},
    }
    filled = [{"type": f"{kind}.delta", **at, "delta": part, **more} for part in parts]
    return (
        [added, *opened],
        filled,
        [*closed, {"type": "response.output_item.done", "output_index": index, "item": item}],
    )


def responses_frames(reply: Reply) -> Frames:
    started = _responses_envelope(reply, "in_progress", [])
    preamble: list[JSON] = [{"type": f"response.{name}", "response": started} for name in ("created", "in_progress")]
    content: list[JSON] = []
    closing: list[JSON] = []
    for index, item in enumerate(_items(reply)):
        opened, filled, closed = _item_events(reply, item, index)
        if index:
            content += [*closing, *opened, *filled]
        else:
            preamble += opened
            content += filled
        closing = closed
    status, more = _terminal(reply)
    response = _responses_envelope(reply, status, _items(reply), **more, usage=_responses_usage(reply.answer))
    terminal: JSON = {"type": f"response.{status}", "response": response}

    def numbered(events: list[JSON], first: int) -> list[bytes]:
        return [event({**item, "sequence_number": first + n}) for n, item in enumerate(events)]

    def error(sent: int) -> list[bytes]:
        failure = {"code": "server_error", "message": LOST.message}
        failed = _responses_envelope(reply, "failed", [], error=failure, error_type=LOST.error_type)
        return numbered([{"type": "response.failed", "response": failed}], len(preamble) + sent)

    if reply.answer.failed:
        closing = []
    at = len(preamble) + (half(len(content)) if reply.answer.failed else len(content))
    return Frames(
        preamble=numbered(preamble, 0),
        content=numbered(content, len(preamble)),
        finish=numbered(closing, at),
        usage=[],
        done=[DONE] if reply.blank_finish else [*numbered([terminal], at + len(closing)), DONE],
        error=error,
    )


# messages


def _stop_reason(reply: Reply) -> str | None:
    return _STOP_REASONS.get(reply.finish or "")


def _message(reply: Reply, content: list[JSON], stop_reason: str | None, usage: JSON) -> JSON:
    return {
        "id": reply.id,
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "provider": "Simulated",
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _blocks(reply: Reply) -> list[tuple[JSON, JSON, list[JSON]]]:
    """Each content block: whole, empty as a stream opens it, and the deltas that fill it."""
    answer = reply.answer
    blocks: list[tuple[JSON, JSON, list[JSON]]] = []
    if answer.reasoning:
        whole = {"type": "thinking", "thinking": "".join(answer.reasoning), "signature": "c2ltdWxhdGVk"}
        deltas: list[JSON] = [{"type": "thinking_delta", "thinking": part} for part in answer.reasoning]
        deltas.append({"type": "signature_delta", "signature": whole["signature"]})
        blocks.append((whole, {"type": "thinking", "thinking": "", "signature": ""}, deltas))
    if answer.call:
        tool, arguments = answer.call
        head = {"type": "tool_use", "id": "toolu_" + _call_id(reply)[5:], "name": tool.name}
        deltas = [{"type": "input_json_delta", "partial_json": part} for part in _thirds(arguments)]
        blocks.append(({**head, "input": msgspec.json.decode(arguments)}, {**head, "input": {}}, deltas))
    elif answer.pieces:
        deltas = [{"type": "text_delta", "text": part} for part in answer.pieces]
        blocks.append(({"type": "text", "text": _text_or_half(reply)}, {"type": "text", "text": ""}, deltas))
    return blocks


def messages_whole(reply: Reply) -> JSON:
    content = [whole for whole, _, _ in _blocks(reply)]
    message = _message(reply, content, _stop_reason(reply), _messages_usage(reply.answer))
    if not reply.answer.reports_usage:
        del message["usage"]
    return message


def messages_frames(reply: Reply) -> Frames:
    start_usage = {**_messages_usage(reply.answer), "output_tokens": 1}
    if not reply.answer.reports_usage:
        start_usage |= {"input_tokens": 0, "output_tokens": 0}
    del start_usage["cost"]
    preamble = [event({"type": "message_start", "message": _message(reply, [], None, start_usage)})]
    content: list[bytes] = []
    closing: list[bytes] = []
    for index, (_, empty, deltas) in enumerate(_blocks(reply)):
        opening = event({"type": "content_block_start", "index": index, "content_block": empty})
        if index:
            content += [*closing, opening]
        else:
            preamble += [opening, event({"type": "ping"})]
        content += [event({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas]
        closing = [event({"type": "content_block_stop", "index": index})]
    ending: JSON = {
        "type": "message_delta",
        "delta": {"stop_reason": _stop_reason(reply), "stop_sequence": None},
    }
    if reply.answer.reports_usage:
        ending["usage"] = _messages_usage(reply.answer)
    return Frames(
        preamble=preamble,
        content=content,
        finish=[*closing] if reply.blank_finish else [*closing, event(ending)],
        usage=[],
        done=[event({"type": "message_stop"})],
        error=lambda _: [event(messages_error(LOST))],
    )
