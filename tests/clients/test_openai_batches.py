"""Files and batches by the `openai` package as it is, against a real gateway and a real worker."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from gateway.kit.upstream import Error, ScriptedUpstream, answer_by_path
from tests.clients.process import plain_environment
from tests.integration.process import serving_beside
from tests.jobs.processes import configured, workers
from tests.stores.servers import emptied, valkey_server


def answer(seen):
    return Error(400) if b"refused" in seen.body else answer_by_path(seen)


async def test_files_and_batches_end_to_end(tmp_path):
    """Uploaded, listed, downloaded, deleted; created, polled, its files read; one with mistakes, its lines named."""
    with valkey_server() as server:
        url = await emptied(server)
        async with ScriptedUpstream(default=answer) as upstream:
            config = configured(tmp_path, upstream.url, url, batches={"chunk_lines": 8})
            async with serving_beside(tmp_path, "--config", config) as gateway:
                with workers(config) as start:
                    worker = start()
                    done = await asyncio.to_thread(
                        subprocess.run,
                        [
                            sys.executable,
                            "-W",
                            "error",
                            Path(__file__).with_name("batches.py"),
                            gateway.url,
                            gateway.key,
                        ],
                        env=plain_environment(),
                        capture_output=True,
                        text=True,
                        timeout=90,
                        check=False,
                    )
                    stopped = await asyncio.to_thread(worker.stop)
    assert done.returncode == 0, done.stderr + worker.log.read_text()
    seen = json.loads(done.stdout)
    assert seen["files"] == {
        "shown": ["in.jsonl", True, "batch", "processed"],
        "expires": 3600,
        "same": True,
        "listed": True,
        "deleted": True,
        "gone": "NotFoundError",
    }
    assert seen["batches"] == {
        "made": ["validating", {"run": "one"}],
        "done": ["completed", {"total": 21, "completed": 20, "failed": 1}],
        "answers": sorted(f"line {n}" for n in range(20)),
        "parsed": "stop",
        "errors": [["refused", 400]],
        "tokens": 300,
        "failed": ["failed", [[1, "invalid_json_line"]]],
        "listed": True,
    }
    assert stopped == 0
