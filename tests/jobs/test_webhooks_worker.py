"""Webhooks of real jobs, sent by a real worker."""

import asyncio

import pytest
from openai import OpenAI
from standardwebhooks import Webhook

from gateway.kit.upstream import ScriptedUpstream
from tests.integration.process import serving_beside
from tests.jobs.processes import configured, workers
from tests.jobs.receivers import LOCAL, receiver
from tests.stores.servers import emptied, valkey_server

CHAT = {
    "endpoint": "chat/completions",
    "body": {"model": "test/model", "messages": [{"role": "user", "content": "Hi"}]},
}


@pytest.mark.full
async def test_a_jobs_end_is_told_by_a_worker(tmp_path):
    """A job with a webhook and a registered endpoint: its end is told to both, and again to one that failed at first;
    both signatures verify. A webhook that could never be called is refused with the job.
    """
    with valkey_server() as server:
        url = await emptied(server)
        async with ScriptedUpstream() as upstream, receiver(503) as own, receiver() as registered:
            config = configured(tmp_path, upstream.url, url, webhooks={**LOCAL, "retries": ["100ms"]})
            async with serving_beside(tmp_path, "--config", config) as gateway:

                async def ask(method, path, body=None):
                    return await asyncio.to_thread(gateway.request, method, path, body)

                made = (
                    await ask(
                        "POST",
                        "/v1/webhook_endpoints",
                        {"name": "n", "url": registered.url, "event_types": ["job.succeeded"]},
                    )
                ).data
                secret = (await ask("GET", "/v1/webhook_secret")).data["signing_secret"]
                refused = await ask("POST", "/v1/jobs", {**CHAT, "webhook": "https://169.254.169.254/latest"})
                assert (refused.status, refused.data["error"]["param"]) == (400, "webhook")
                with workers(config) as start:
                    worker = start()
                    job = await ask("POST", "/v1/jobs", {**CHAT, "webhook": own.url, "metadata": {"for": "test"}})
                    assert job.status == 202, job.data
                    try:
                        async with asyncio.timeout(40):
                            while len(own.seen) < 2 or not registered.seen:
                                await asyncio.sleep(0.05)
                    except TimeoutError:
                        raise AssertionError(worker.log.read_text()[-3000:]) from None
                ended = await ask("GET", f"/v1/jobs/{job.data['id']}")
                assert ended.data["status"] == "succeeded"
    first, again = own.seen
    assert (first.headers["webhook-id"], first.body) == (again.headers["webhook-id"], again.body)
    [told] = registered.seen
    assert told.event == again.event
    data = Webhook(secret).verify(again.body, again.headers)["data"]
    assert (data["id"], data["status"], data["metadata"]) == (job.data["id"], "succeeded", {"for": "test"})
    client = OpenAI(api_key="none", webhook_secret=made["signing_secret"])
    assert client.webhooks.unwrap(told.body, told.headers).type == "job.succeeded"
