"""Everything that differs between endpoints, as data. Nothing else in the code may ask which endpoint it is.

A dialect says where model, stream flag, input text and output cap stand in the request; where usage stands in the
reply; what the first content, the clean end and an error look like in its stream; and how errors are written.
Facts: OpenAI's and Anthropic's API references, OpenRouter's documentation and SDK.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gateway.exchange import Source, Usage

if TYPE_CHECKING:
    from gateway.errors import GatewayError
    from gateway.exchange import Event, JsonObject

encode = msgspec.json.encode

UpstreamKind = Literal["openrouter", "openai"]


@dataclass(frozen=True, slots=True)
class Mark:
    """What one parsed event (or whole reply) means."""

    content: bool = False  # the first of these commits the stream: text, reasoning, tool call, refusal, audio, finish
    finish: bool = False
    done: bool = False
    malformed: bool = False
    usage: Mapping[str, Any] | None = None
    usage_only: bool = False  # nothing but usage: forwarded only if the client asked
    error: Mapping[str, Any] | None = None


PLAIN = Mark()
DONE = Mark(done=True)
MALFORMED = Mark(malformed=True)


@dataclass(frozen=True, slots=True)
class Grammar:
    """How one endpoint streams.

    `notable`: after the first content an event of which this is not true is plain content; it passes unparsed.
    `needs_done`: a clean end is `finish` and then `done`; otherwise `finish` and then the end of the body.
    """

    notable: Callable[[bytes], bool]
    mark: Callable[[Event], Mark]
    error: Callable[[GatewayError, bytes, str], bytes]
    needs_done: bool
    whole_is_fine: bool = False  # a model that can't stream may answer whole
    keep_alive: bytes = b": keep-alive\n\n"


def _error_of(data: Any) -> Mapping[str, Any] | None:
    """The error that stands in a body or an event, in any of the shapes in which upstreams put it, else None."""
    if not isinstance(data, dict):
        return None
    error = data.get("error")
    if error:
        return error if isinstance(error, dict) else {"message": str(error)}
    choices = data.get("choices")
    if isinstance(choices, list):
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            inner = choice.get("error")
            if inner:
                return inner if isinstance(inner, dict) else {"message": str(inner)}
            if choice.get("finish_reason") == "error":
                return {"message": "The model's provider ended the answer with an error."}
    return None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One endpoint's language."""

    endpoint: str
    operation: str  # gen_ai.operation.name
    paths: Mapping[str, str]  # by kind of upstream
    grammar: Grammar | None = None
    request: Literal["json", "multipart"] = "json"
    reply: Literal["json", "binary"] = "json"
    required: tuple[str, ...] = ("model",)
    text_fields: tuple[str, ...] = ()
    output_caps: tuple[str, ...] = ()
    anthropic: bool = False  # Anthropic's error envelope and names of usage
    headers: tuple[str, ...] = ()  # request headers let through beside COMMON_HEADERS
    forced: Mapping[str, Any] = field(default_factory=dict)  # body fields that are always set
    refused: Mapping[str, str] = field(default_factory=dict)  # body fields that only a plugin can do → what to tell
    usage_on_request: bool = False  # has `stream_options.include_usage`
    text_formats: frozenset[str] = frozenset()  # of `response_format`: the reply is plain text then
    schema_at: tuple[str, ...] = ()  # where the form of the answer stands
    reply_error: Callable[[Any], Mapping[str, Any] | None] = _error_of

    @property
    def reply_content_type(self) -> str:
        return "application/json" if self.reply == "json" else "application/octet-stream"

    def wants_stream(self, body: JsonObject) -> bool:
        return self.grammar is not None and body.get("stream") in (True, "true")

    def wants_usage(self, body: JsonObject) -> bool:
        """The client asked for the usage chunk, in OpenAI's or OpenRouter's way."""
        options, usage = body.get("stream_options"), body.get("usage")
        return bool(
            (isinstance(options, dict) and options.get("include_usage"))
            or (isinstance(usage, dict) and usage.get("include"))
        )

    def output_cap(self, body: JsonObject) -> int | None:
        """Tokens the client allows at most, None if it didn't say."""
        values = (body.get(name) for name in self.output_caps)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)

    def input_characters(self, body: JsonObject) -> int:
        """Characters of text that the model will read; inline files don't count."""
        return sum(_characters(body.get(name)) for name in self.text_fields)

    def answer_form(self, body: JsonObject) -> Any:
        """What the client said about the form of the answer (`{"type": "json_schema", …}`); None if nothing."""
        value: Any = body if self.schema_at else None
        for step in self.schema_at:
            value = value.get(step) if isinstance(value, dict) else None
        return value

    def with_schema(self, body: JsonObject, name: str, schema: Mapping[str, Any], *, strict: bool) -> JsonObject:
        """The body fields that demand an answer by this JSON schema; none where the endpoint knows no such thing."""
        if not self.schema_at:
            return {}
        form: JsonObject = {"type": "json_schema"}
        if self.anthropic:
            form["schema"] = schema
        elif len(self.schema_at) == 1:
            form["json_schema"] = {"name": name, "strict": strict, "schema": schema}
        else:
            form |= {"name": name, "strict": strict, "schema": schema}
        field, *inner = self.schema_at
        beside = body.get(field)
        return {field: {**(beside if isinstance(beside, dict) else {}), inner[0]: form} if inner else form}

    def usage(self, raw: Mapping[str, Any] | None) -> Usage:
        return read_usage(raw, cached_apart=self.anthropic)

    def error_body(self, error: GatewayError, request_id: str) -> bytes:
        return encode(anthropic_error(error, request_id) if self.anthropic else openai_error(error))


# --- errors as each API writes them -----------------------------------------------------------------------------

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def openai_error(error: GatewayError) -> JsonObject:
    """`{"error": {message, type, param, code}}`: all four keys are required by OpenAI's schema."""
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.error_code,
        }
    }


def anthropic_error(error: GatewayError, request_id: str) -> JsonObject:
    default = "invalid_request_error" if error.status_code < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status_code, default)
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def _data_error(error: GatewayError, _last: bytes, _request_id: str) -> bytes:
    # Without `choices`: clients that read them would take the error for an empty delta.
    return b"data: " + encode(openai_error(error)) + b"\n\n"


def _responses_error(error: GatewayError, last: bytes, _request_id: str) -> bytes:
    found = re.search(rb'"sequence_number"\s*:\s*(\d+)', last)
    body = {
        "type": "error",
        "code": error.error_code,
        "message": error.message,
        "param": error.param,
        "sequence_number": int(found[1]) + 1 if found else 0,
    }
    return b"event: error\ndata: " + encode(body) + b"\n\n"


def _anthropic_stream_error(error: GatewayError, _last: bytes, request_id: str) -> bytes:
    return b"event: error\ndata: " + encode(anthropic_error(error, request_id)) + b"\n\n"


def _typed_error(error: GatewayError, _last: bytes, _request_id: str) -> bytes:
    return b"event: error\ndata: " + encode({"type": "error", **openai_error(error)}) + b"\n\n"


# --- usage --------------------------------------------------------------------------------------------------------

_NO_DETAILS: dict[str, Any] = {}
_ABSURD = 10**9  # tokens; no model reads or writes as much in one call


def read_usage(raw: Mapping[str, Any] | None, *, cached_apart: bool = False) -> Usage:
    """Tokens in any of the APIs' spellings. Missing, negative or absurd counts are unknown, never 0.

    `cached_apart`: Anthropic counts cached tokens beside `input_tokens`; ours include them as OpenAI's do.
    """
    if not isinstance(raw, dict):
        return Usage()
    get = raw.get
    details_in = get("prompt_tokens_details") or get("input_tokens_details")
    details_out = get("completion_tokens_details") or get("output_tokens_details")
    detail_in = (details_in if isinstance(details_in, dict) else _NO_DETAILS).get
    read = _count(get("cache_read_input_tokens", detail_in("cached_tokens")))
    write = _count(get("cache_creation_input_tokens", detail_in("cache_write_tokens")))
    given = _count(get("prompt_tokens", get("input_tokens")))
    written = _count(get("completion_tokens", get("output_tokens")))
    if given is None and written is None:
        given = _count(get("total_tokens"))
    if cached_apart and given is not None:
        given += (read or 0) + (write or 0)
    source = Source.UNKNOWN if given is None and written is None else Source.UPSTREAM
    reasoning = _count(details_out.get("reasoning_tokens")) if isinstance(details_out, dict) else None
    return Usage(given, written, read, write, reasoning, source)


def read_cost(raw: Mapping[str, Any] | None) -> int | None:
    """`usage.cost` (USD) in pico-USD; None if absent, negative or absurd."""
    cost = raw.get("cost") if isinstance(raw, dict) else None
    if type(cost) not in (int, float) or not 0 <= cost < 1e6:  # type: ignore[operator]  # a number: just asked
        return None
    return round(cost * 10**12)  # type: ignore[operator]  # as above


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _ABSURD else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _characters(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return 0 if value.startswith("data:") else len(value)
    if depth > 32:
        return 0
    if isinstance(value, list):
        return sum(_characters(v, depth + 1) for v in value)
    if isinstance(value, dict):
        # base64 under `data` / `file_data` is a file, not text
        return sum(_characters(v, depth + 1) for k, v in value.items() if k not in {"data", "file_data", "b64_json"})
    return 0


# --- how streams are read ------------------------------------------------------------------------------------------

_DELTA_CONTENT = frozenset(
    ("content", "reasoning", "reasoning_content", "reasoning_details", "tool_calls", "function_call", "refusal",
     "audio", "images")
)  # fmt: skip


def _responses_reply_error(data: Any) -> Mapping[str, Any] | None:
    if isinstance(data, dict) and data.get("status") == "failed":
        return {
            "message": "The upstream failed.",
            "error_type": data.get("error_type"),
            **_mapping(data.get("error")),
        }
    return _error_of(data)


def _mark_choices(event: Event, has_content: Callable[[Mapping[str, Any]], bool]) -> Mark:
    payload = event.payload
    if payload.startswith(b"[DONE]"):  # SDKs look for no more
        return DONE
    if not payload:
        return PLAIN
    data = event.data
    if not isinstance(data, dict):
        return MALFORMED
    content = finish = choices = False
    for choice in data.get("choices") or ():
        if isinstance(choice, dict):
            choices = True
            finish = finish or bool(choice.get("finish_reason"))
            content = content or finish or has_content(choice)
    usage = data.get("usage")
    return Mark(
        content=content,
        finish=finish,
        usage=usage if isinstance(usage, dict) else None,
        usage_only=bool(usage) and not choices,
        error=_error_of(data),
    )


def _chat_content(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    for name, said in delta.items():  # noqa: SIM110 - as above
        if said and name in _DELTA_CONTENT:
            return True
    return False


def _mark_chat(event: Event) -> Mark:
    return _mark_choices(event, _chat_content)


def _mark_completions(event: Event) -> Mark:
    return _mark_choices(event, lambda choice: bool(choice.get("text")))


def _mark_typed(content: re.Pattern[str], finish: frozenset[str]) -> Callable[[Event], Mark]:
    """Streams whose every event names its type: Responses, images, transcriptions."""

    def mark(event: Event) -> Mark:
        payload = event.payload
        if payload.startswith(b"[DONE]"):  # SDKs look for no more
            return DONE
        if not payload:
            return PLAIN
        data = event.data
        if not isinstance(data, dict):
            return MALFORMED
        kind = str(data.get("type") or "")
        response = _mapping(data.get("response"))
        if kind in {"error", "response.failed"} or data.get("error"):
            nested = data.get("error") or response.get("error") or data
            error = dict(nested) if isinstance(nested, Mapping) else {"message": str(nested)}
            error.setdefault("error_type", data.get("error_type"))
            return Mark(error=error)
        usage = response.get("usage") or data.get("usage")
        done = kind in finish
        return Mark(
            content=done or content.fullmatch(kind) is not None,
            finish=done,
            usage=usage if isinstance(usage, dict) else None,
        )

    return mark


def _mark_messages(event: Event) -> Mark:
    if not event.payload:
        return PLAIN
    data = event.data
    if event.payload.startswith(b"[DONE]"):
        return PLAIN  # not Anthropic's; some compatible servers add it
    if not isinstance(data, dict):
        return MALFORMED
    kind = data.get("type")
    if kind == "error" or data.get("error"):
        return Mark(error=_mapping(data.get("error")) or {"message": "The upstream failed."})
    delta = _mapping(data.get("delta"))
    finish = kind == "message_delta" and bool(delta.get("stop_reason"))
    usage = data.get("usage") or _mapping(data.get("message")).get("usage")
    return Mark(
        content=kind == "content_block_delta" or finish,
        finish=finish,
        done=kind == "message_stop",
        usage=usage if isinstance(usage, dict) else None,
    )


def _any_of(*words: bytes) -> Callable[[bytes], bool]:
    """Whether one of them stands there. To count fixed bytes takes a tenth of a pattern's time, and half of `in`'s."""

    def found(block: bytes) -> bool:
        count = block.count
        for word in words:  # noqa: SIM110 - per chunk: a generator costs as much as all the searches
            if count(word):
                return True
        return False

    return found


_CHOICES_NOTABLE = re.compile(rb'"finish_reason"\s*:\s*"|"error"|"usage"\s*:\s*\{|\[DONE\]')


def _notable_choices(block: bytes) -> bool:
    """What the pattern finds, which is asked only where fixed bytes don't rule it out."""
    count = block.count
    return (
        count(b'"finish_reason"') != count(b'"finish_reason":null')
        or count(b'"error"') > 0
        or count(b'"usage"') > 0
        or count(b"[DONE]") > 0
    ) and _CHOICES_NOTABLE.search(block) is not None


_CHAT = Grammar(_notable_choices, _mark_chat, _data_error, needs_done=True)
_COMPLETIONS = Grammar(_notable_choices, _mark_completions, _data_error, needs_done=True)
_RESPONSES = Grammar(
    _any_of(b'"response.completed"', b'"response.incomplete"', b'"response.failed"', b'"error"', b"[DONE]"),
    _mark_typed(re.compile(r"response\..+\.delta"), frozenset({"response.completed", "response.incomplete"})),
    _responses_error,
    needs_done=False,
)
_MESSAGES = Grammar(
    _any_of(b'"stop_reason"', b'"message_stop"', b'"error"', b'"usage"'),
    _mark_messages,
    _anthropic_stream_error,
    needs_done=True,
    keep_alive=b'event: ping\ndata: {"type": "ping"}\n\n',
)
# Of no model: what a plugin streams from a route of its own.
PLAIN_EVENTS = Grammar(_any_of(), lambda _: PLAIN, _typed_error, needs_done=False)
_IMAGES = Grammar(
    _any_of(b'"image_generation.completed"', b'"error"', b"[DONE]"),
    _mark_typed(re.compile(r"image_generation\..+"), frozenset({"image_generation.completed"})),
    _typed_error,
    needs_done=False,
    whole_is_fine=True,
)
_TRANSCRIPTS = Grammar(
    _any_of(b'"transcript.text.done"', b'"error"', b"[DONE]"),
    _mark_typed(re.compile(r"transcript\.text\..+"), frozenset({"transcript.text.done"})),
    _typed_error,
    needs_done=False,
    whole_is_fine=True,
)

# --- the nine proxied endpoints -------------------------------------------------------------------------------------

COMMON_HEADERS = (
    "http-referer", "x-openrouter-title", "x-title", "x-openrouter-categories", "x-openrouter-metadata", "x-session-id",
)  # fmt: skip


def _paths(openrouter: str, openai: str | None = None) -> Mapping[str, str]:
    return {"openrouter": openrouter, "openai": openai or openrouter}


DIALECTS: dict[str, Dialect] = {
    d.endpoint: d
    for d in (
        Dialect(
            endpoint="chat/completions",
            operation="chat",
            paths=_paths("/chat/completions"),
            grammar=_CHAT,
            required=("model", "messages"),
            text_fields=("messages", "tools"),
            output_caps=("max_completion_tokens", "max_tokens"),
            headers=("openai-beta",),
            usage_on_request=True,
            schema_at=("response_format",),
        ),
        Dialect(
            endpoint="completions",
            operation="text_completion",
            paths=_paths("/completions"),
            grammar=_COMPLETIONS,
            required=("model", "prompt"),
            text_fields=("prompt", "suffix"),
            output_caps=("max_tokens",),
            headers=("openai-beta",),
            usage_on_request=True,
        ),
        Dialect(
            endpoint="embeddings",
            operation="embeddings",
            paths=_paths("/embeddings"),
            required=("model", "input"),
            text_fields=("input",),
        ),
        Dialect(
            endpoint="responses",
            operation="chat",
            paths=_paths("/responses"),
            grammar=_RESPONSES,
            text_fields=("input", "instructions", "tools"),
            output_caps=("max_output_tokens",),
            headers=("openai-beta",),
            forced={"store": False},  # OpenRouter keeps nothing and answers 400 to true
            refused={
                "background": "Background responses are not available on this gateway.",
                "conversation": "No `conversation` is kept here. Go on by `previous_response_id` from a background "
                "response, or send all that was said in `input`.",
            },
            schema_at=("text", "format"),
            reply_error=_responses_reply_error,
        ),
        Dialect(
            endpoint="messages",
            operation="chat",
            paths=_paths("/messages"),
            grammar=_MESSAGES,
            required=("model", "messages"),
            text_fields=("messages", "system", "tools"),
            output_caps=("max_tokens",),
            headers=("anthropic-version", "anthropic-beta"),
            anthropic=True,
            schema_at=("output_config", "format"),
        ),
        Dialect(
            endpoint="rerank",
            operation="rerank",
            paths=_paths("/rerank"),
            required=("model", "query", "documents"),
            text_fields=("query", "documents"),
        ),
        Dialect(
            endpoint="images/generations",
            operation="image_generation",
            paths=_paths("/images", "/images/generations"),
            grammar=_IMAGES,
            required=("model", "prompt"),
            text_fields=("prompt",),
        ),
        Dialect(
            endpoint="audio/speech",
            operation="text_to_speech",
            paths=_paths("/audio/speech"),
            reply="binary",
            required=("model", "input"),
            text_fields=("input", "instructions"),
        ),
        Dialect(
            endpoint="audio/transcriptions",
            operation="speech_to_text",
            paths=_paths("/audio/transcriptions"),
            grammar=_TRANSCRIPTS,
            request="multipart",
            text_fields=("prompt",),
            text_formats=frozenset({"text", "srt", "vtt"}),
        ),
    )
}

# What routes of the gateway's own speak.
PLAIN_DIALECT = Dialect(endpoint="", operation="", paths={}, required=())
