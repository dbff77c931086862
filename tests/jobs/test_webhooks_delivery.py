import openai
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from gateway.kit.testing import Gateway
from tests.jobs.receivers import LOCAL, Hooked, receiver


def hooked(**config):
    return Gateway.test(plugins=["api_keys", (Hooked, {**LOCAL, **config})])


async def own_secret(gw):
    return (await gw.get("/v1/webhook_secret")).data["signing_secret"]


async def test_a_jobs_own_webhook_is_verified_by_both_libraries():
    """Who gave a job a webhook verifies its message with openai's SDK or with standardwebhooks."""
    async with receiver() as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        [sent] = await plugin.send(target=them.url, thing="job_7")
        assert await plugin.work() == []
        secret = await own_secret(gw)
        [message] = them.seen
    event = Webhook(secret).verify(message.body, message.headers)
    assert event == message.event
    assert (event["object"], event["type"], event["data"]) == ("event", "job.succeeded", {"id": "job_7"})
    assert message.headers["webhook-id"] == sent
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    assert client.webhooks.unwrap(message.body, message.headers).id == event["id"]
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(message.body + b" ", message.headers)
