"""Batches whose files lie in S3, while a worker is killed and S3 is away."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import openai
import pytest

from gateway.kit.upstream import MODEL, Json, ScriptedUpstream, chat_completion
from tests.integration.process import serving_beside
from tests.jobs.processes import configured, sdk, workers
from tests.jobs.s3 import s3_server, way_to
from tests.stores.servers import valkey_server

LINES = 200
ENDPOINT = "/v1/chat/completions"
AWAY_SECONDS = 4


def line(n: int) -> bytes:
    body = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": f"Line {n}"}]}
    return json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": ENDPOINT, "body": body}).encode()


@pytest.mark.full
@pytest.mark.timeout(400)
async def test_a_batch_in_s3_outlives_its_worker_and_an_outage(tmp_path):
    """200 lines with input and output in S3. The worker is killed with calls under way, and S3 is away for some seconds,
    first when the next worker wants the file and then when the output is due: who uploads or downloads meanwhile is told
    `storage_unavailable`, and in the end each line has one result.
    """
    upstream = ScriptedUpstream(default=Json(chat_completion("Hi"), delay=1))
    with s3_server() as s3, valkey_server() as valkey:
        async with upstream, way_to(s3) as way:
            files = {"storage": "s3://files/x", "endpoint": way.url, "access_key_id": "id", "secret_access_key": "key"}
            config = configured(
                tmp_path, upstream.url, valkey.url,
                files=files, batches={"lanes": 10, "chunks": 2, "chunk_lines": 50}, worker={"lease": "5s"},
            )  # fmt: skip
            async with serving_beside(tmp_path, "--config", config) as gateway:
                with workers(config) as start:
                    worker = start()
                    async with sdk(gateway) as client:
                        content = b"\n".join(map(line, range(LINES)))
                        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
                        batch = await client.batches.create(
                            input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
                        )

                        async def done(count: int, status: str = "") -> openai.types.Batch:
                            async with asyncio.timeout(90):
                                while True:
                                    found = await client.batches.retrieve(batch.id)
                                    assert found.status not in {"failed", "expired"}, found
                                    if found.request_counts.completed >= count and status in {"", found.status}:
                                        return found
                                    await asyncio.sleep(0.1)

                        async def away() -> None:
                            await way.close()
                            for call in (
                                lambda: client.files.content(file.id),
                                lambda: client.files.create(file=("in.jsonl", content), purpose="batch"),
                            ):
                                with pytest.raises(openai.InternalServerError) as told:
                                    await call()
                                assert (told.value.status_code, told.value.code) == (503, "storage_unavailable")
                            await asyncio.sleep(AWAY_SECONDS)

                        await done(40)
                        await asyncio.to_thread(worker.kill)
                        start()
                        await away()
                        await way.open()
                        await done(LINES - 15)
                        await away()
                        assert (await done(LINES)).output_file_id is None
                        await way.open()
                        batch = await done(LINES, "completed")
                        out = [
                            json.loads(x) for x in (await client.files.content(batch.output_file_id)).text.splitlines()
                        ]
                rows = []
                async with asyncio.timeout(40):  # what was cut off is known once its lease has ended
                    while len(rows) < len(upstream.seen):
                        await asyncio.sleep(0.5)
                        answer = await asyncio.to_thread(gateway.request, "GET", "/admin/usage?limit=1000")
                        rows = answer.data["data"]
    outcomes = Counter(row["outcome"] for row in rows)
    assert sorted(found["custom_id"] for found in out) == sorted(f"id-{n}" for n in range(LINES))
    assert batch.request_counts.to_dict() == {"total": LINES, "completed": LINES, "failed": 0}
    assert batch.error_file_id is None
    assert outcomes["ok"] == LINES
    assert 1 <= outcomes["abandoned"] == len(upstream.seen) - LINES
