"""One small valid request per proxied endpoint, and what the plugins of these tests need."""

from __future__ import annotations

import aiohttp

from gateway import Decision, Target, hookimpl
from gateway.kit.testing import Gateway, TestReply

BODIES = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "completions": {"prompt": "Hello"},
    "embeddings": {"input": "Hello"},
    "responses": {"input": "Hello"},
    "messages": {"max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]},
    "rerank": {"query": "Hello", "documents": ["a", "b"]},
    "images/generations": {"prompt": "A cat"},
    "audio/speech": {"input": "Hello", "voice": "alloy"},
    "audio/transcriptions": {},
}


async def ask(gw: Gateway, endpoint: str, *, stream: bool = False, headers=None, **fields) -> TestReply:
    body = {"model": "test/model", **BODIES[endpoint], **({"stream": True} if stream else {}), **fields}
    if endpoint == "audio/transcriptions":
        form = aiohttp.FormData({k: "true" if v is True else v for k, v in body.items()})
        form.add_field("file", b"RIFF", filename="a.wav", content_type="audio/wav")
        return await gw.request("POST", "/v1/audio/transcriptions", data=form, headers=headers)
    return await gw.post(f"/v1/{endpoint}", body, headers=headers)


class Two:
    """Decides for the asked model first and `healthy/model` next."""

    def __init__(self, config, services):
        del config, services

    @hookimpl
    async def choose_targets(self, exchange):
        asked = exchange.body.get("model") or exchange.body["models"][0]
        return Decision(asked, (Target(asked, "openrouter"), Target("healthy/model", "openrouter")))
