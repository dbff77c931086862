"""OpenRouter's own SDK, whose models are stricter than OpenAI's: its server URL is the gateway's /api/v1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openrouter import OpenRouter, errors
from openrouter.utils import RetryConfig

from tests.clients.process import Served

MODEL = "anthropic/claude-haiku-4.5"
HELLO: Any = [{"role": "user", "content": "Hello"}]


def connected(gateway: Served, key: str) -> OpenRouter:
    # retries: errors are looked at, not waited out
    no_retries: Any = RetryConfig("none", None, False)
    return OpenRouter(api_key=key, server_url=f"{gateway.url}/api/v1", retry_config=no_retries, timeout_ms=20_000)


@pytest.fixture
def client(gateway: Served) -> Iterator[OpenRouter]:
    with connected(gateway, gateway.key) as made:
        yield made


def test_a_chat_is_answered_whole(client: OpenRouter) -> None:
    """A chat satisfies the SDK's validation and names the model that served."""
    reply: Any = client.chat.send(model=MODEL, messages=HELLO)
    assert "Hello" in reply.choices[0].message.content
    assert reply.model == MODEL
    assert reply.usage.total_tokens > 0


def test_a_chat_is_streamed(client: OpenRouter) -> None:
    """Each chunk satisfies the SDK's validation; the pieces make up the whole answer."""
    whole: Any = client.chat.send(model=MODEL, messages=HELLO)
    with client.chat.send(model=MODEL, messages=HELLO, stream=True) as stream:
        chunks: list[Any] = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_models_are_listed(client: OpenRouter) -> None:
    """The list and one model of it satisfy the SDK's stricter shape, and pages follow each other."""
    every: Any = client.models.list()
    ids = [model.id for model in every.result.data]
    assert {MODEL, "task/chat"} <= set(ids)
    assert len(ids) == len(set(ids))
    first: Any = client.models.list(limit=5)
    paged = [model.id for model in first.result.data]
    assert len(paged) == 5
    following = first.next()
    assert following.result.data[0].id not in paged


def test_texts_are_embedded(client: OpenRouter) -> None:
    """Embeddings come back as floats."""
    reply: Any = client.embeddings.generate(model="openai/text-embedding-3-small", input=["one", "two"], dimensions=8)
    assert [len(item.embedding) for item in reply.data] == [8, 8]


def test_documents_are_ranked(client: OpenRouter) -> None:
    """Rerank puts the document first that shares the query's words."""
    documents = ["Paris is in France.", "Oslo is the capital of Norway."]
    reply: Any = client.rerank.rerank(
        model="cohere/rerank-v3.5", query="capital of Norway", documents=documents, top_n=1
    )
    assert [(r.index, r.document.text) for r in reply.results] == [(1, documents[1])]


def test_responses_are_answered(client: OpenRouter) -> None:
    """The Responses API by OpenRouter's SDK, whole and streamed."""
    whole: Any = client.responses.send(model=MODEL, input="Hello")
    with client.responses.send(model=MODEL, input="Hello", stream=True) as stream:
        kinds = [event.type for event in stream]
    assert whole.status == "completed"
    assert kinds[-1] == "response.completed"


def test_an_image_is_made(client: OpenRouter) -> None:
    """Its path for images, /images, is served too."""
    reply: Any = client.images.generate(model="openai/gpt-image-1", prompt="A red square")
    assert reply.data[0].b64_json


def test_a_wrong_key_is_refused(gateway: Served) -> None:
    """OpenRouter's SDK raises for a 401, with our message."""
    with connected(gateway, "sk-somebody-else") as client, pytest.raises(errors.OpenRouterError) as caught:
        client.chat.send(model=MODEL, messages=HELLO)
    assert caught.value.status_code == 401


def test_a_rate_limit_is_told(client: OpenRouter) -> None:
    """And for a 429."""
    with pytest.raises(errors.OpenRouterError) as caught:
        client.chat.send(model="xenios/sim-fail-429-n4", messages=HELLO)
    assert caught.value.status_code == 429
