"""What the `openai` client, plain and async, sees of background responses, as JSON. Arguments: URL, key."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

MODEL = "anthropic/claude-haiku-4.5"
SLOW = "xenios/sim-n60-d20"
ENDLESS = "xenios/sim-n2000-d20"
PENDING = {"queued", "in_progress"}


def polled(client: OpenAI, response: Any) -> Any:
    """As OpenAI's guide does it."""
    end = time.monotonic() + 30
    while response.status in PENDING and time.monotonic() < end:
        time.sleep(0.05)  # noqa: TID251 - a client's wait
        response = client.responses.retrieve(response.id)
    return response


def created(client: OpenAI) -> dict[str, Any]:
    taken = client.responses.create(model=MODEL, input="Hello", background=True, metadata={"order": "7"})
    done = polled(client, taken)
    return {
        "taken": [taken.status, taken.background, taken.output_text, taken._request_id is not None],
        "done": [done.status, done.id == taken.id, done.metadata, done.usage.total_tokens > 0 if done.usage else None],
        "text": done.output_text,
    }


def streamed(client: OpenAI) -> dict[str, Any]:
    """Dropped in the middle, resumed, and once more after the end."""
    first: list[Any] = []
    with client.responses.create(model=SLOW, input="Hello", background=True, stream=True) as stream:
        for event in stream:
            first.append(event)
            if event.type == "response.output_text.delta" and len(first) > 10:
                break
    response_id, last = first[0].response.id, first[-1].sequence_number
    running = client.responses.retrieve(response_id).status
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
    again = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
    text = "".join(event.delta for event in [*first, *rest] if event.type == "response.output_text.delta")
    with client.responses.stream(response_id=response_id, starting_after=last) as helper:
        helped = helper.get_final_response()
    return {
        "types": [event.type for event in first[:3]],
        "dropped_while": running,
        "numbers": [event.sequence_number for event in [*first, *rest]],
        "end": [rest[-1].type, rest[-1].response.id == response_id],
        "whole": [
            len(text),
            text == rest[-1].response.output_text == client.responses.retrieve(response_id).output_text,
        ],
        "again": again == rest,
        "helper": helped.output_text == text,
        "behind_the_end": list(
            client.responses.retrieve(response_id, stream=True, starting_after=rest[-1].sequence_number)
        ),
    }


def cancelled(client: OpenAI) -> dict[str, Any]:
    events: list[Any] = []
    stopped: list[Any] = []
    for event in client.responses.create(model=ENDLESS, input="Hello", background=True, stream=True):
        events.append(event)
        if event.type == "response.output_text.delta" and not stopped:
            stopped += [client.responses.cancel(events[0].response.id) for _ in range(2)]
    kept = client.responses.retrieve(events[0].response.id)
    return {
        "cancel": [response.status for response in stopped],
        "last_event": events[-1].type,
        "kept": [kept.status, bool(kept.output_text), [item.status for item in kept.output]],
    }


def deleted(client: OpenAI) -> dict[str, Any]:
    done = polled(client, client.responses.create(model=MODEL, input="Hello", background=True))
    client.responses.delete(done.id)
    return {"then": raised(lambda: client.responses.retrieve(done.id))}


def continued(client: OpenAI) -> dict[str, Any]:
    """A conversation of two answers, and its items in pages."""
    first = polled(client, client.responses.create(model=MODEL, input="One", background=True))
    second = polled(
        client,
        client.responses.create(model=MODEL, input="Two", background=True, previous_response_id=first.id),
    )
    now = client.responses.create(model=MODEL, input="Three", previous_response_id=second.id)
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    return {
        "second": [second.status, second.previous_response_id == first.id],
        "items": [[item.role, item.content[0].type] for item in items],
        "newest_first": client.responses.input_items.list(second.id).data[0].content[0].text,
        "at_once": now.status,
    }


def refused(client: OpenAI) -> dict[str, Any]:
    responses = client.responses
    whole = polled(client, responses.create(model=MODEL, input="Hello", background=True))
    failed = polled(client, responses.create(model="xenios/sim-fail-400", input="Hello", background=True))
    return {
        "unknown": raised(lambda: responses.retrieve("resp_" + "0" * 32)),
        "not_streamed": raised(lambda: responses.retrieve(whole.id, stream=True)),
        "not_stored": raised(lambda: responses.create(model=MODEL, input="x", background=True, store=False)),
        "no_such_previous": raised(
            lambda: responses.create(model=MODEL, input="x", background=True, previous_response_id="resp_" + "0" * 32)
        ),
        "failed": [failed.status, failed.error.code if failed.error else None],
    }


def raised(call: Any) -> list[Any]:
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code]
    return []


async def at_once(url: str, key: str) -> dict[str, Any]:
    """Twenty by the async client, each followed to its end."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:

        async def one(n: int) -> str:
            stream = await client.responses.create(model=MODEL, input=f"text {n}", background=True, stream=True)
            events = [event async for event in stream]
            return f'"text {n}"' if f'"text {n}"' in events[-1].response.output_text else events[-1].type

        return {"each_its_own": await asyncio.gather(*(one(n) for n in range(20)))}


def main(url: str, key: str) -> dict[str, Any]:
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        scenarios = (created, streamed, cancelled, deleted, continued, refused)
        seen = {scenario.__name__: scenario(client) for scenario in scenarios}
    with OpenAI(base_url=f"{url}/api/v1", api_key=key, max_retries=0, timeout=60) as client:
        seen["api_v1"] = created(client)
    return {**seen, "at_once": asyncio.run(at_once(url, key))}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3])))
