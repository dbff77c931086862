"""Prompts and answers as span attributes, where the configuration asks for them: redacted, and cut short.

In the form of the semantic conventions for generative AI: messages with parts. What a field holds is told by its shape,
whatever endpoint it came from; images, sound and files are not kept. Messages and parts are made as they are shown:
of a million, only the few that there is room for.
"""

from __future__ import annotations

import re
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.kit import scrub

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gateway import Event, Exchange, Outcome

Json = Any

_SYSTEM = ("system", "instructions")
_TOOLS = "tools"
_FILES = frozenset({"data", "file_data", "b64_json", "image_url", "embedding"})
_DEEPEST = 32
_NOTHING = "[]"
# A secret that the end of a cut text may be the beginning of is shorter; JWTs are the longest.
_AHEAD = 4096
_EVENT_PER_CHARACTER = 16  # an event of 200 bytes brings some ten characters


class Listener:
    """A tap that remembers a stream's events, as many as may be needed; they are read when the request is over."""

    __slots__ = ("_room", "events")

    def __init__(self, characters: int) -> None:
        self.events: list[Event] = []
        self._room = characters * _EVENT_PER_CHARACTER

    def event(self, event: Event) -> Event:
        if self._room > 0:
            self._room -= len(event)
            self.events.append(event)
        return event

    def end(self, outcome: Outcome) -> Sequence[Event]:
        del outcome
        return ()


class Content:
    """What may be shown of content."""

    def __init__(self, longest: int, patterns: Iterable[str]) -> None:
        self._longest = longest
        self._patterns = [re.compile(pattern) for pattern in patterns]

    def attributes(self, exchange: Exchange, heard: Listener | None) -> dict[str, Any]:
        """Of one request and its answer."""
        body = exchange.body
        names = [name for name in exchange.dialect.text_fields if name in body]
        found = {
            "gen_ai.system_instructions": (part for name in names if name in _SYSTEM for part in _parts(body[name])),
            "gen_ai.input.messages": (
                message for name in names if name not in (*_SYSTEM, _TOOLS) for message in _messages(body[name])
            ),
            "gen_ai.tool.definitions": body.get(_TOOLS),
            "gen_ai.output.messages": _answer(exchange, heard),
        }
        texts = {name: self.shown(value) for name, value in found.items() if value}
        shown: dict[str, Any] = {name: text for name, text in texts.items() if text != _NOTHING}
        stop = exchange.body.get("stop", exchange.body.get("stop_sequences"))
        if stop:
            shown["gen_ai.request.stop_sequences"] = self.shown(stop)
        return shown

    def shown(self, value: Json) -> str:
        """As JSON, redacted, of at most so many characters of text."""
        room = [self._longest]
        try:
            return msgspec.json.encode(self._redacted(value, room, 0)).decode()
        except (UnicodeEncodeError, TypeError, ValueError):
            return '"***"'

    def _redacted(self, value: Json, room: list[int], depth: int) -> Json:
        if isinstance(value, str):
            return self._text(value, room)
        if isinstance(value, dict) and depth < _DEEPEST:
            shown: dict[str, Any] = {}
            for key, item in value.items():
                if room[0] <= 0:
                    break
                room[0] -= 1  # nothing is for nothing: not even the empty
                is_file = key in _FILES and isinstance(item, str | list)
                name = self._text(str(key), room)
                shown[name] = f"[{len(item)}]" if is_file else self._redacted(item, room, depth + 1)
            return shown
        if isinstance(value, list | GeneratorType) and depth < _DEEPEST:
            items: list[Any] = []
            for item in value:
                if room[0] <= 0:
                    items.append("…")
                    break
                room[0] -= 1
                items.append(self._redacted(item, room, depth + 1))
            return items
        room[0] -= 8
        return value if value is None or isinstance(value, bool | int | float) else "…"

    def _text(self, text: str, room: list[int]) -> str:
        if text.startswith("data:"):
            return f"[{len(text)}]"
        left = max(0, room[0])
        piece = text[: left + _AHEAD]
        shown = scrub(piece)
        for pattern in self._patterns:
            shown = pattern.sub("***", shown)
        if len(piece) < len(text):
            shown = shown[: max(0, len(shown) - _AHEAD)]
        if len(shown) > left or len(piece) < len(text):
            shown = shown[:left] + "…"
        room[0] -= len(shown)
        return shown


# --- by their shape ------------------------------------------------------------------------------------------------


def _messages(value: Json) -> Iterator[Json]:
    """Chat messages, items of a response's input, or texts."""
    for item in value if isinstance(value, list) else (value,):
        is_message = isinstance(item, dict) and "role" in item
        yield _message(item) if is_message else {"role": "user", "parts": _parts(item)}


def _message(item: dict[str, Any]) -> Json:
    return {"role": item["role"], "parts": _parts_of_message(item)}


def _parts_of_message(item: dict[str, Any]) -> Iterator[Json]:
    reasoning = item.get("reasoning") or item.get("reasoning_content")
    if isinstance(reasoning, str):
        yield {"type": "reasoning", "content": reasoning}
    if item.get("role") == "tool":
        yield {"type": "tool_call_response", "id": item.get("tool_call_id"), "response": item.get("content")}
    else:
        yield from _parts(item.get("content"))
    calls = item.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield {"type": "tool_call", "id": call.get("id"), **function}


def _parts(content: Json) -> Iterator[Json]:
    if content is not None:
        yield from map(_part, content if isinstance(content, list) else (content,))


def _part(item: Json) -> Json:
    if not isinstance(item, dict):
        return {"type": "text", "content": item}
    text = item.get("text")
    return {"type": "text", "content": text} if isinstance(text, str) else item


def _answer(exchange: Exchange, heard: Listener | None) -> Iterable[Json]:
    if heard is not None:
        return _streamed([event.data for event in heard.events])
    reply = exchange.reply
    if reply is None or not reply.headers.get("Content-Type", "").startswith("application/json"):
        return []
    try:
        return _whole(reply.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


def _whole(data: Json) -> Iterable[Json]:
    """Of chat, completions, messages, responses and transcriptions; vectors, rankings and pictures are no messages."""
    if not isinstance(data, dict):
        return []
    choices, output = data.get("choices"), data.get("output")
    if isinstance(choices, list):
        return (_choice(choice) for choice in choices if isinstance(choice, dict))
    if isinstance(output, list):
        return (_item(item) for item in output if isinstance(item, dict))
    if data.get("role") == "assistant":
        return [_message(data) | {"finish_reason": data.get("stop_reason")}]
    return [{"role": "assistant", "parts": _parts(data["text"])}] if isinstance(data.get("text"), str) else []


def _choice(choice: dict[str, Any]) -> Json:
    message = choice.get("message")
    said = _message(
        {"role": "assistant", **(message if isinstance(message, dict) else {"content": choice.get("text")})}
    )
    return {**said, "finish_reason": choice.get("finish_reason")}


def _item(item: dict[str, Any]) -> Json:
    """Of a response's output: a message, or a call of a tool, reasoning and whatever else there is, as it stands."""
    if item.get("type") == "message":
        return {"role": item.get("role", "assistant"), "parts": _parts(item.get("content"))}
    return {"role": "assistant", "parts": [item]}


def _streamed(events: Sequence[Json]) -> Iterable[Json]:
    """The same, of the events that were heard. A cut stream has what came of it."""
    texts: dict[Any, list[str]] = {}
    finish: dict[Any, Any] = {}
    for data in events:
        if not isinstance(data, dict):
            continue
        response = data.get("response")
        if isinstance(response, dict) and response.get("output"):
            return _whole(response)
        choices = data.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                place = choice.get("index", 0)
                texts.setdefault(str(place), []).extend(_pieces(choice.get("delta", choice)))
                finish[str(place)] = choice.get("finish_reason") or finish.get(str(place))
        delta = data.get("delta")
        if delta is not None:
            texts.setdefault("0", []).extend(_pieces(delta))
    return [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": "".join(pieces)}],
            **({"finish_reason": finish[place]} if finish.get(place) else {}),
        }
        for place, pieces in texts.items()
        if pieces
    ]


def _pieces(delta: Json) -> list[str]:
    """The text of one delta, and what it adds to a call of a tool."""
    if isinstance(delta, str):
        return [delta]
    if not isinstance(delta, dict):
        return []
    texts = [delta[name] for name in ("content", "text", "partial_json") if isinstance(delta.get(name), str)]
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            texts += [function[name] for name in ("name", "arguments") if isinstance(function.get(name), str)]
    return texts
