"""Jobs with much to carry, by the real process: an upload as the request, and results of 20 MB."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import httpx
import pytest
import yaml

from gateway.kit.upstream import Json, Pause, ScriptedUpstream, Stream, chat_completion, chat_events, transcription
from tests.integration.process import CONFIG, serving_beside, xenios
from tests.jobs.asking import CHAT
from tests.jobs.gateways import without_ids
from tests.jobs.processes import configured, memory, sdk, workers
from tests.stores.servers import valkey_server

AUDIO, RESULT = 15_000_000, 20_000_000  # bytes
SPOKEN = "What was said in the recording."


def shipped(folder, upstream):
    """The configuration that `make run` uses, but for the upstream."""
    settings = yaml.safe_load((CONFIG / "xenios.yaml").read_text())
    settings["server"]["data_dir"] = "data"
    settings["upstreams"] = {"openrouter": {"base_url": upstream.url, "api_key": "sk-or-v1-test"}}
    settings["catalogue"] = {"refresh": 0}
    path = folder / "xenios.yaml"
    path.write_text(json.dumps(settings))
    return path


async def ended(gateway, job_id, seconds=60):
    async with asyncio.timeout(seconds):
        while True:
            job = (await asyncio.to_thread(gateway.request, "GET", f"/v1/jobs/{job_id}")).data
            if job["finished_at"] is not None:
                return job
            await asyncio.sleep(0.1)


@pytest.mark.full
async def test_a_recording_is_transcribed_as_a_job(tmp_path):
    """15 MB of audio with `Prefer: respond-async`, by OpenAI's SDK and by a plain HTTP client, to the configuration as
    shipped: the queue is `transcription`, the upstream got each byte, the result is the transcript, and `xenios jobs`
    shows both.
    """
    audio = random.Random(7).randbytes(AUDIO)
    upstream = ScriptedUpstream(default=Json(transcription(SPOKEN)))
    async with upstream:
        config = shipped(tmp_path, upstream)
        async with serving_beside(tmp_path, "--config", config) as gateway:
            prefer = {"Prefer": "respond-async"}
            file = ("speech.wav", audio, "audio/wav")
            async with sdk(gateway) as client:
                by_sdk = await client.audio.transcriptions.with_raw_response.create(
                    model="task/transcription", file=file, extra_headers=prefer
                )
            async with httpx.AsyncClient(timeout=60) as client:
                plain = await client.post(
                    f"{gateway.url}/v1/audio/transcriptions",
                    data={"model": "openai/whisper-1"},
                    files={"file": file},
                    headers={**prefer, "Authorization": f"Bearer {gateway.key}"},
                )
            assert (by_sdk.status_code, plain.status_code) == (202, 202)
            taken = [reply.headers["x-xenios-job"] for reply in (by_sdk, plain)]
            for job_id in taken:
                job = await ended(gateway, job_id)
                assert (job["status"], job["queue"], job["attempts"]) == ("succeeded", "transcription", 1), job
                result = await asyncio.to_thread(gateway.request, "GET", f"/v1/jobs/{job_id}/result")
                assert (result.status, result.data["text"]) == (200, SPOKEN)

            def jobs(*args):
                done = xenios("jobs", *args, "--config", config, cwd=tmp_path)
                assert done.returncode == 0, done.stderr
                return done.stdout

            listed = json.loads(await asyncio.to_thread(jobs, "list", "--queue", "transcription", "--json"))
            assert {job["id"] for job in listed} == set(taken)
            assert SPOKEN in await asyncio.to_thread(jobs, "show", taken[0], "--result")
        assert [audio in seen.body for seen in upstream.seen] == [True, True]


@pytest.mark.full
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_result_of_20_megabytes(tmp_path, stream):
    """It is stored and fetched byte for byte; its events are read live, cut in the middle and resumed behind the last
    number that came; and neither worker nor gateway takes more than a few times its size for it.
    """
    if stream:
        pieces = chat_events("x" * RESULT, pieces=2000)
        steps = [step for i, piece in enumerate(pieces) for step in ((Pause(0.01), piece) if i % 20 == 0 else (piece,))]
        answer = Stream(*steps)
    else:
        answer = Json(chat_completion("x" * RESULT))
    async with ScriptedUpstream(Json(chat_completion("Hi")), default=answer) as upstream:
        with valkey_server() as valkey:
            config = configured(tmp_path, upstream.url, valkey.url)
            async with serving_beside(tmp_path, "--config", config) as gateway:
                with workers(config) as start:
                    worker = start()
                    headers = {"Authorization": f"Bearer {gateway.key}", "Prefer": "respond-async"}
                    async with aiohttp.ClientSession(gateway.url, headers=headers) as client:

                        async def take(**more):
                            async with client.post("/v1/chat/completions", json={**CHAT, **more}) as reply:
                                assert reply.status == 202
                                return reply.headers["x-xenios-job"]

                        await ended(gateway, await take())  # both are warm
                        before = [memory(pid)[0] for pid in (gateway.pid, worker.process.pid)]
                        job_id = await take(stream=stream)
                        told = b""
                        if stream:
                            async with client.get(f"/v1/jobs/{job_id}/stream") as reply:
                                while len(told) < RESULT // 3:
                                    told += await reply.content.readany()
                            told = told[: told.rindex(b"\n\n") + 2]
                            last = without_ids(told)[0][-1]
                            async with client.get(f"/v1/jobs/{job_id}/stream?after={last}") as reply:
                                told += await reply.read()
                        job = await ended(gateway, job_id)
                        async with client.get(f"/v1/jobs/{job_id}/result") as reply:
                            result = await reply.read()
                        async with client.get(f"/v1/jobs/{job_id}/stream?after=2") as reply:
                            afterwards = await reply.read()
                    after = [memory(pid) for pid in (gateway.pid, worker.process.pid)]
    assert job["status"] == "succeeded"
    if stream:
        numbers, events = without_ids(told)
        assert numbers == list(range(1, len(numbers) + 1))
        assert events == result
        assert result.count(b"x") >= RESULT
        assert without_ids(afterwards)[0] == numbers[2:]
    else:
        assert json.loads(result)["choices"][0]["message"]["content"] == "x" * RESULT
        assert b"event: job.succeeded" in afterwards
        assert len(afterwards) < 10_000  # it says where the result is
    most = [(peak - base) / RESULT for base, (_, peak) in zip(before, after, strict=True)]
    print(f"peak in results: gateway {most[0]:.1f}, worker {most[1]:.1f}; now {[now >> 20 for now, _ in after]} MiB")
    assert max(most) < 8
