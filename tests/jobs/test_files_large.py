"""A file as large as OpenAI allows goes through gateway and worker in small pieces."""

import asyncio
import json

import pytest

from tests.integration.process import serving_beside
from tests.jobs.processes import configured, memory, sdk, workers
from tests.stores.servers import emptied, valkey_server

LINES, LONG = 50_000, 4_000
MEMORY = 80 << 20  # what the file, twice its size and more, may add to a process


def line(n):
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * LONG}]}
    return json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body})


@pytest.mark.full
@pytest.mark.timeout(300)
async def test_200_megabytes_are_never_in_memory(tmp_path):
    """Uploaded, checked to the last of 50,000 lines, downloaded: neither process grows by more than a few pieces."""
    path = tmp_path / "in.jsonl"
    with path.open("w") as out:
        for n in range(LINES - 1):
            out.write(line(n) + "\n")
        out.write("{")
    assert path.stat().st_size > 200_000_000
    with valkey_server() as server:
        config = configured(tmp_path, "http://127.0.0.1:9/v1", await emptied(server))
        async with serving_beside(tmp_path, "--config", config) as gateway:
            with workers(config) as start:
                worker = start()
                async with sdk(gateway) as client:
                    await client.models.list()
                    before, _ = memory(gateway.pid)
                    with path.open("rb") as content:
                        file = await client.files.create(file=content, purpose="batch")
                    batch = await client.batches.create(
                        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
                    )
                    while batch.status == "validating":
                        await asyncio.sleep(0.2)
                        batch = await client.batches.retrieve(batch.id)
                    size = 0
                    async with client.files.with_streaming_response.content(file.id) as back:
                        async for piece in back.iter_bytes():
                            size += len(piece)
                    _, most = memory(gateway.pid)
                    worker_now, worker_most = memory(worker.process.pid)
    print(f"gateway {(most - before) >> 20} MiB more; worker {worker_now >> 20} MiB, {worker_most >> 20} at most")
    assert size == path.stat().st_size == file.bytes
    assert batch.status == "failed"
    assert [(e.line, e.code) for e in batch.errors.data] == [(LINES, "invalid_json_line")]
    assert most - before < MEMORY
    assert worker_most < 2 * MEMORY + (60 << 20)
