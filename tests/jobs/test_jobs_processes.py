"""Jobs with real processes: `xenios serve` with the worker beside it, killed and asked from the command line."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from gateway.kit.upstream import MODEL, Hang, Json, ScriptedUpstream, Stream, chat_completion, chat_events
from tests.integration.process import serving_beside, xenios

CONFIG = """
server: {{data_dir: data}}
services: {{redis: embedded, database: {{url: sqlite, migrate_on_start: true}}}}
upstreams: {{openrouter: {{base_url: "{upstream}", api_key: sk-or-v1-test}}}}
catalogue: {{refresh: 0}}
plugins:
  - use: api_keys
  - use: budgets
    config: {{budgets: [{{name: all, usd: 100, per: month}}], unknown_price: allow}}
  - use: usage
  - use: jobs
    config: {{worker: {{embedded: true, lease: 5s}}}}
"""
CHAT = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def config(tmp_path):
    def write(upstream):
        path = tmp_path / "xenios.yaml"
        path.write_text(CONFIG.format(upstream=upstream.url))
        return path

    return write


async def ask(running, method, path, body=None, headers=None):
    return await asyncio.to_thread(running.request, method, path, body, headers=headers)


async def until(running, job_id, *statuses, seconds=40):
    """The job, once it is in one of these states."""
    async with asyncio.timeout(seconds):
        while True:
            job = (await ask(running, "GET", f"/v1/jobs/{job_id}")).data
            if job["status"] in statuses:
                return job
            await asyncio.sleep(0.1)


def worker_of(pid):
    """The worker process beside this gateway, or whoever runs jobs for it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"gateway.companions" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.full
async def test_a_job_whose_worker_was_killed_runs_again(config, tmp_path):
    """kill -9 in the middle: what had its result stays as it is; what was under way runs again, once, and the call that
    was cut off stands in the rows as abandoned.
    """
    upstream = ScriptedUpstream(Json(chat_completion("One")), Hang(), Json(chat_completion("Two")))
    async with upstream, serving_beside(tmp_path, "--config", config(upstream)) as running:
        done = (await ask(running, "POST", "/v1/chat/completions", CHAT, ASYNC)).data["id"]
        await until(running, done, "succeeded")
        job_id = (await ask(running, "POST", "/v1/chat/completions", CHAT, ASYNC)).data["id"]
        await until(running, job_id, "running")
        await upstream.wait_seen(2)
        [worker] = worker_of(running.pid)
        os.kill(worker, signal.SIGKILL)
        job = await until(running, job_id, "succeeded", seconds=80)
        assert job["attempts"] == 2
        result = (await ask(running, "GET", f"/v1/jobs/{job_id}/result")).data
        assert result["choices"][0]["message"]["content"] == "Two"
        assert (await ask(running, "GET", f"/v1/jobs/{done}")).data["attempts"] == 1
        assert len(upstream.seen) == 3
        end, outcomes = time.monotonic() + 25, {}
        while len(outcomes) < 3 and time.monotonic() < end:  # its lease ends first
            await asyncio.sleep(0.2)
            rows = (await ask(running, "GET", "/admin/usage?limit=50")).data["data"]
            # those of the requests that were taken as jobs are others
            outcomes = {row["id"]: row["outcome"] for row in rows if row["id"].startswith("job_")}
        assert outcomes == {f"{done}-1": "ok", f"{job_id}-1": "abandoned", f"{job_id}-2": "ok"}


async def test_a_running_job_is_stopped_within_a_second(config, tmp_path):
    """A cancelled job's call is closed at the upstream within a second, and what was seen of it is in its row."""
    said = chat_events("Hello there, how are you?", pieces=6)
    upstream = ScriptedUpstream(Stream(*said[:4], end="hang"))
    async with upstream, serving_beside(tmp_path, "--config", config(upstream)) as running:
        reply = await ask(running, "POST", "/v1/chat/completions", {**CHAT, "stream": True}, ASYNC)
        job_id = reply.data["id"]
        await until(running, job_id, "running")
        seen = await upstream.wait_seen(1)
        begun = time.monotonic()
        cancelled = (await ask(running, "POST", f"/v1/jobs/{job_id}/cancel")).data
        await asyncio.wait_for(seen.closed.wait(), 5)
        assert seen.closed_at - begun < 1
        assert cancelled["status"] == "cancelled" or (await until(running, job_id, "cancelled", seconds=5))
        stream = await ask(running, "GET", f"/v1/jobs/{job_id}/stream")
        assert b"job_cancelled" in stream.body
        rows = (await ask(running, "GET", "/admin/usage")).data["data"]  # stored with the job's end
        assert [row["outcome"] for row in rows if row["id"] == f"{job_id}-1"] == ["client_disconnect"]


@pytest.mark.full
async def test_the_command_line_sees_to_jobs(config, tmp_path):
    """`xenios jobs`: listed, shown, retried and removed beside a running gateway, whose worker takes it up."""
    refused = Json({"error": {"message": "No such thing", "code": 400}}, status=400)
    async with ScriptedUpstream(refused, Json(chat_completion("Now"))) as upstream:
        path = config(upstream)
        async with serving_beside(tmp_path, "--config", path) as running:

            async def jobs(*args):
                done = await asyncio.to_thread(xenios, "jobs", *args, "--config", path, cwd=tmp_path)
                return done.returncode, done.stdout, done.stderr

            job_id = (await ask(running, "POST", "/v1/chat/completions", CHAT, ASYNC)).data["id"]
            await until(running, job_id, "failed")
            code, listed, _ = await jobs("list", "--status", "failed", "--json")
            assert (code, [job["id"] for job in json.loads(listed)]) == (0, [job_id])
            assert job_id in (await jobs("list"))[1]
            assert json.loads((await jobs("show", job_id))[1])["error"]["code"] == "invalid_request"
            code, said, _ = await jobs("retry", "--all-failed")
            assert (code, job_id in said) == (0, True)
            await until(running, job_id, "succeeded")
            assert b"Now" in (await jobs("show", job_id, "--result"))[1].encode()
            assert (await jobs("retry", job_id))[0] == 1
            assert (await jobs("rm", job_id))[0] == 0
            assert (await ask(running, "GET", f"/v1/jobs/{job_id}")).status == 404
            assert (await jobs("show", job_id))[0] == 1
