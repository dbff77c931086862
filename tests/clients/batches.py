"""What the `openai` client sees of files and batches, as JSON. Arguments: URL, key."""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import openai

ENDPOINT = "/v1/chat/completions"


def line(custom_id: str, **changed: Any) -> bytes:
    body = {"model": "test/model", "messages": [{"role": "user", "content": custom_id}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **changed}).encode()


def ended(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    deadline = time.monotonic() + 60
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in {"completed", "failed", "expired", "cancelled"}:
            return batch
        if time.monotonic() > deadline:
            raise TimeoutError(batch.status)
        time.sleep(0.1)  # noqa: TID251 - a client of its own


def results(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    return [json.loads(found) for found in client.files.content(file_id or "").text.splitlines()]


def files(client: openai.OpenAI) -> dict[str, Any]:
    content = b"\n".join(line(f"line {n}") for n in range(3))
    made = client.files.create(
        file=("in.jsonl", io.BytesIO(content)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    more = [client.files.create(file=("more.jsonl", content), purpose="batch").id for _ in range(4)]
    listed = [file.id for file in client.files.list(limit=2, purpose="batch")]
    shown = client.files.retrieve(made.id)
    same = client.files.content(made.id).read() == content
    deleted = client.files.delete(more[0])
    try:
        client.files.retrieve(more[0])
        gone = ""
    except openai.NotFoundError as error:
        gone = type(error).__name__
    return {
        "shown": [shown.filename, shown.bytes == len(content), shown.purpose, shown.status],
        "expires": (shown.expires_at or 0) - shown.created_at,
        "same": same,
        "listed": listed == [*more[::-1], made.id],
        "deleted": deleted.deleted,
        "gone": gone,
    }


def batches(client: openai.OpenAI) -> dict[str, Any]:
    content = b"\n".join([*(line(f"line {n}") for n in range(20)), line("refused")])
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"run": "one"}
    )
    done = ended(client, made.id)
    good, bad = results(client, done.output_file_id), results(client, done.error_file_id)
    wrong = client.files.create(file=("in.jsonl", b"{\n" + line("a")), purpose="batch")
    failed = ended(client, client.batches.create(input_file_id=wrong.id, endpoint=ENDPOINT, completion_window="24h").id)
    return {
        "made": [made.status, made.metadata],
        "done": [done.status, done.request_counts and done.request_counts.to_dict()],
        "answers": sorted(found["custom_id"] for found in good),
        "parsed": openai.types.chat.ChatCompletion.model_validate(good[0]["response"]["body"]).choices[0].finish_reason,
        "errors": [(found["custom_id"], found["response"]["status_code"]) for found in bad],
        "tokens": done.usage.total_tokens if done.usage else None,
        "failed": [failed.status, [(e.line, e.code) for e in (failed.errors and failed.errors.data) or []]],
        "listed": [batch.id for batch in client.batches.list(limit=1)] == [failed.id, made.id],
    }


def main(url: str, key: str) -> dict[str, Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client:
        return {"files": files(client), "batches": batches(client)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
