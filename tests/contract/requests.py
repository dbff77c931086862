"""One sound request, and what an upstream streams for it, for each proxied endpoint."""

from __future__ import annotations

import json

import aiohttp

from gateway.kit.upstream import (
    SPEECH,
    Stream,
    chat_events,
    completion_events,
    encode_step,
    event,
    message_events,
    response_events,
)

MESSAGES = [{"role": "user", "content": "Hello"}]
BODIES = {
    "chat/completions": {"messages": MESSAGES},
    "completions": {"prompt": "Hello"},
    "embeddings": {"input": "Hello"},
    "responses": {"input": "Hello"},
    "messages": {"messages": MESSAGES, "max_tokens": 16},
    "rerank": {"query": "Hello", "documents": ["a", "b"]},
    "images/generations": {"prompt": "Hello"},
    "audio/speech": {"input": "Hello", "voice": "alloy"},
    "audio/transcriptions": {},
}

_PARTIAL_IMAGE = event("image_generation.partial_image", {"type": "image_generation.partial_image", "b64_json": "aa"})
_IMAGE = event("image_generation.completed", {"type": "image_generation.completed", "b64_json": "aa"})
_DELTA = event("transcript.text.delta", {"type": "transcript.text.delta", "delta": "Hello"})
_TEXT = event("transcript.text.done", {"type": "transcript.text.done", "text": "Hello"})

# What a stream holds: (up to its content and somewhat further, the whole of it)
STREAMS = {
    "chat/completions": (chat_events(finish=None, done=False, usage=False), chat_events()),
    "completions": (completion_events(finish=None, done=False, usage=False), completion_events()),
    "responses": (response_events(finish=None), response_events()),
    "messages": (message_events(finish=None, done=False), message_events()),
    "images/generations": ([_PARTIAL_IMAGE], [_PARTIAL_IMAGE, _IMAGE]),
    "audio/transcriptions": ([_DELTA], [_DELTA, _TEXT]),
}


def streamed(endpoint: str) -> Stream:
    """The upstream's answer to a streaming request, from beginning to end."""
    return Stream(*STREAMS[endpoint][1])


def stopping(endpoint: str, end: str) -> Stream:
    """An answer that shows content and then hangs, or is cut."""
    if endpoint == "audio/speech":
        return Stream(SPEECH[:512], content_type="audio/mpeg", end=end)
    return Stream(*STREAMS[endpoint][0], end=end)


def recorded(endpoint: str) -> bytes:
    """The bytes of the whole stream, as a cache would keep them."""
    return b"".join(encode_step(step) for step in STREAMS[endpoint][1])


def request(endpoint: str, *, stream: bool = False, model: str = "test/model") -> dict:
    """Keyword arguments of `Gateway.request` or of an aiohttp session."""
    body = {"model": model, **BODIES[endpoint], **({"stream": True} if stream else {})}
    if endpoint != "audio/transcriptions":
        return {"data": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    form = aiohttp.FormData()
    for name, value in body.items():
        form.add_field(name, "true" if value is True else value)
    form.add_field("file", b"RIFF", filename="speech.wav", content_type="audio/wav")
    return {"data": form}
