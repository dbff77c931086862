"""What the async `anthropic` client sees of a gateway, as JSON. Arguments: URL, key."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import anthropic
from anthropic import AsyncAnthropic

MODEL = "anthropic/claude-haiku-4.5"


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


async def main(url: str, key: str) -> dict[str, Any]:
    async with AsyncAnthropic(base_url=url, api_key=key, max_retries=0, timeout=20) as client:

        async def answer(text: str) -> str:
            message = await client.messages.create(model=MODEL, max_tokens=200, messages=said(text))
            return "".join(block.text for block in message.content if block.type == "text")

        async with client.messages.stream(model=MODEL, max_tokens=200, messages=said("Hello")) as stream:
            streamed = "".join([text async for text in stream.text_stream])
        at_once = await asyncio.gather(*(answer(f"text {n}") for n in range(10)))
        return {
            "whole": await answer("Hello"),
            "streamed": streamed,
            "at_once": [f'"text {n}"' in text for n, text in enumerate(at_once)],
            "broken_stream": await breaks(client),
        }


async def breaks(client: AsyncAnthropic) -> bool:
    try:
        async with client.messages.stream(
            model="xenios/sim-n10-d1-cutmid", max_tokens=500, messages=said("Hello")
        ) as stream:
            await stream.get_final_message()
    except anthropic.APIError:
        return True
    return False


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
