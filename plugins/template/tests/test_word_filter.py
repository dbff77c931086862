"""The plugin in the real gateway, in front of a scripted upstream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError
from xenios_word_filter import Config, Plugin

from gateway.kit.testing import Gateway

if TYPE_CHECKING:
    from pathlib import Path

WORDS = {"words": ["tulip", "c++"]}


@pytest.mark.parametrize("text", ["Where do I get a TULIP?", "c++, please", "tulip"])
async def test_a_word_is_refused(text: str) -> None:
    """The client is told so, the model is never asked, and the header says why."""
    async with Gateway.test(plugins=[(Plugin, WORDS)]) as gw:
        reply = await gw.chat(text)
        assert (reply.status, reply.data["error"]["code"]) == (403, "word_refused")
        assert reply.headers["x-word-filter"] == "refused"
        assert gw.upstream.seen == []
        assert gw.plugin("Plugin").refused == 1


async def test_it_explains_itself() -> None:
    """An administrator who asks is told what the client would get, and nothing is counted."""
    async with Gateway.test(plugins=["api_keys", (Plugin, WORDS)]) as gw:
        asked = {"body": {"model": "m", "messages": [{"role": "user", "content": "A tulip"}]}}
        refused = (await gw.post("/admin/explain", asked)).data["refused"]
        assert (refused["status"], refused["code"], refused["by"]) == (403, "word_refused", "Plugin")
        assert gw.plugin("Plugin").refused == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_others_pass(stream: bool) -> None:
    """Words within other words are none, streamed and not."""
    async with Gateway.test(plugins=[(Plugin, WORDS)]) as gw:
        reply = await gw.chat("Where do I get tulips?", stream=stream)
        assert (reply.status, reply.headers["x-word-filter"]) == (200, "passed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a tulip"}]}]}),
        ("messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "a tulip"}]}),
        ("responses", {"input": "a tulip"}),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a tulip"}]}]}),
    ],
)
async def test_every_way_to_ask(path: str, body: dict[str, object]) -> None:
    """Chat, Anthropic's messages and OpenAI's responses are all read."""
    async with Gateway.test(plugins=[(Plugin, WORDS)]) as gw:
        reply = await gw.post(f"/v1/{path}", {"model": "test/model", **body})
        assert (reply.status, reply.headers["x-word-filter"]) == (403, "refused")


async def test_only_the_last_message_counts() -> None:
    """What was said before, or by the model, is not held against the user."""
    async with Gateway.test(plugins=[(Plugin, WORDS)]) as gw:
        turns = [("user", "a tulip"), ("assistant", "a tulip"), ("user", "a rose")]
        messages = [{"role": role, "content": text} for role, text in turns]
        reply = await gw.post("/v1/chat/completions", {"model": "test/model", "messages": messages})
        assert reply.status == 200


async def test_requests_without_messages_pass() -> None:
    """Other endpoints are left alone."""
    async with Gateway.test(plugins=[(Plugin, WORDS)]) as gw:
        assert (await gw.post("/v1/embeddings", {"model": "test/model", "input": ["a rose"]})).status == 200
        assert "x-word-filter" not in (await gw.get("/v1/models")).headers


async def test_words_of_a_file(tmp_path: Path) -> None:
    """The file's words are refused beside the configured ones."""
    file = tmp_path / "words.txt"
    file.write_text("rose\n\n  oak \n", encoding="utf-8")
    async with Gateway.test(plugins=[(Plugin, {**WORDS, "words_file": str(file)})]) as gw:
        assert [(await gw.chat(text)).status for text in ("tulip", "rose", "oak", "elm")] == [403, 403, 403, 200]


def test_no_words_is_a_mistake() -> None:
    """A filter that filters nothing is refused at the start."""
    with pytest.raises(ValidationError, match="refuses nothing"):
        Config()
