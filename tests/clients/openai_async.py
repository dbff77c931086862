"""What the async `openai` client sees of a gateway, as JSON. Arguments: URL, key."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
from openai import AsyncOpenAI
from pydantic import BaseModel

MODEL = "anthropic/claude-haiku-4.5"


class Trip(BaseModel):
    title: str
    days: int


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


async def main(url: str, key: str) -> dict[str, Any]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20) as client:
        return await scenarios(client)


async def scenarios(client: AsyncOpenAI) -> dict[str, Any]:
    chat = client.chat.completions

    async def echoed(text: str) -> str:
        reply = await chat.create(model=MODEL, messages=said(text))
        return text if f'"{text}"' in (reply.choices[0].message.content or "") else ""

    whole = await chat.create(model=MODEL, messages=said("Hello"))
    pieces = [
        chunk.choices[0].delta.content or ""
        async for chunk in await chat.create(model=MODEL, messages=said("Hello"), stream=True)
    ]
    parsed = await chat.parse(model=MODEL, messages=said("Hello"), response_format=Trip)
    events = [event.type async for event in await client.responses.create(model=MODEL, input="Hello", stream=True)]
    async with await chat.create(model="xenios/sim-n500-d20", messages=said("Hello"), stream=True) as left:
        async for _ in left:
            break
    return {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(pieces),
        "at_once": await asyncio.gather(*(echoed(f"text {n}") for n in range(20))),
        "parsed": type(parsed.choices[0].message.parsed).__name__,
        "responses": events[-1],
        "after_leaving": await echoed("again"),
        "errors": await errors(client),
        "broken_stream": await broken_stream(client),
    }


async def errors(client: AsyncOpenAI) -> dict[str, str | None]:
    told: dict[str, str | None] = {}
    cases = (
        (client.with_options(api_key="sk-wrong"), MODEL),
        (client, "nobody/nothing"),
        (client, "xenios/sim-fail-429-n3"),
    )
    for asked, model in cases:
        try:
            await asked.chat.completions.create(model=model, messages=said("Hello"))
        except openai.APIStatusError as error:
            told[type(error).__name__] = error.code
    return told


async def broken_stream(client: AsyncOpenAI) -> str:
    try:
        async for _ in await client.chat.completions.create(
            model="xenios/sim-n10-d1-cutmid", messages=said("Hello"), stream=True
        ):
            pass
    except openai.APIError as error:
        return type(error).__name__
    return "ended"


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
