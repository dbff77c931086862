"""Messages that are sent, sent again, given up, kept and forgotten."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import openai
import pytest
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from gateway.kit.testing import Gateway
from gateway_plugins.jobs.webhooks import store
from tests.jobs.receivers import LOCAL, Hooked, raw_receiver, receiver

SECRET, OLD_SECRET = (
    "whsec_" + text for text in ("c2VjcmV0IG9mIHRoZSBjb25maWd1cmF0aW9uIQ==", "dGhlIHNlY3JldCBiZWZvcmUgdGhhdCBvbmUhIQ==")
)


def hooked(**config):
    return Gateway.test(plugins=["api_keys", (Hooked, {**LOCAL, **config})])


async def own_secret(gw):
    return (await gw.get("/v1/webhook_secret")).data["signing_secret"]


async def outcomes(plugin):
    families = {family.name: family for family in await plugin.part.services.metrics.read()}
    return {series.labels[0]: series.value for series in families["xenios_webhook_deliveries_total"].series}


def answers(head, body=b""):
    """A script's step that answers by these headers."""

    async def answer(_request):
        return web.Response(status=head.pop("status"), headers=head, body=body)

    return answer


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
    assert abs(event["created_at"] - time.time()) < 60
    assert message.headers["webhook-id"] == sent
    assert message.headers["Content-Type"] == "application/json"
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    assert client.webhooks.unwrap(message.body, message.headers).id == event["id"]
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(message.body + b" ", message.headers)


async def test_an_endpoint_of_the_configuration_hears_what_it_asked_for():
    """It gets the events that its globs name, of its tenant, signed by both of its secrets."""
    async with receiver() as them, receiver() as others:
        endpoints = [
            {"url": them.url, "events": ["batch.*"], "secret": SECRET, "old_secret": OLD_SECRET, "tenant": "default"},
            {"url": others.url, "secret": SECRET},
        ]
        async with hooked(endpoints=endpoints) as gw:
            plugin = gw.plugin("Hooked")
            await plugin.send("job.succeeded")
            await plugin.send("batch.completed", thing="batch_1")
            await plugin.send("batch.completed", tenant="else")
            await plugin.work()
    [message] = them.seen
    assert message.event["data"] == {"id": "batch_1"}
    for secret in (SECRET, OLD_SECRET):
        assert Webhook(secret).verify(message.body, message.headers)["type"] == "batch.completed"
        assert openai.OpenAI(api_key="none", webhook_secret=secret).webhooks.unwrap(message.body, message.headers)
    assert [m.event["type"] for m in others.seen] == ["job.succeeded", "batch.completed", "batch.completed"]


async def test_one_event_has_one_id_at_all_of_its_receivers():
    """Who hears of something twice can tell by the event's id; each message has an id of its own."""
    async with receiver() as them, receiver() as others:
        endpoints = [{"url": url, "secret": SECRET} for url in (them.url, others.url)]
        async with hooked(endpoints=endpoints) as gw:
            await gw.plugin("Hooked").send()
            await gw.plugin("Hooked").work()
    [one], [other] = them.seen, others.seen
    assert one.body == other.body
    assert one.headers["webhook-id"] != other.headers["webhook-id"]


async def test_a_message_is_sent_again_until_it_is_taken():
    """After each failure it waits as the schedule says, up to a tenth longer; same id, same body, signed anew."""
    async with receiver(500, 302, 404) as them, hooked(retries=["5s", "5m", "30m", "2h"]) as gw:
        plugin = gw.plugin("Hooked")
        [sent] = await plugin.send(target=them.url)
        waits = []
        for _ in range(3):
            waits += await plugin.work()
            await plugin.make_due()
        assert await plugin.work() == []
        row = await plugin.row(sent)
        secret = await own_secret(gw)
        assert await outcomes(plugin) == {"failed": 3, "delivered": 1}
    assert all(base <= wait <= base * 1.1 for wait, base in zip(waits, (5, 300, 1800), strict=True))
    assert len(them.seen) == 4
    assert {(m.headers["webhook-id"], m.body) for m in them.seen} == {(sent, them.seen[0].body)}
    for message in them.seen:
        Webhook(secret).verify(message.body, message.headers)
    assert (row["status"], row["attempts"], row["last_status"], row["last_error"]) == ("delivered", 4, 204, None)


async def test_a_message_that_is_not_due_is_left_alone():
    """A queue that remembers a message too early sends nothing before its time."""
    async with receiver(500) as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        [sent] = await plugin.send(target=them.url)
        await plugin.work()
        plugin.queue.ids.append(sent)
        [wait] = await plugin.work()
        assert len(them.seen) == 1
    assert 3 < wait < 6


async def test_after_the_last_try_it_is_given_up():
    """A receiver that never takes it ends as a dead message, which is listed and can be sent again."""
    async with receiver(*[503] * 3) as them, hooked(retries=[0, 0]) as gw:
        plugin = gw.plugin("Hooked")
        [sent] = await plugin.send(target=them.url)
        for _ in range(4):
            await plugin.work()
            await plugin.make_due()
        row = await plugin.row(sent)
        assert await outcomes(plugin) == {"failed": 2, "dead": 1}
    assert len(them.seen) == 3
    assert (row["status"], row["attempts"], row["last_status"], row["last_error"]) == ("dead", 3, 503, "status")


@pytest.mark.parametrize(
    "value, least, most",
    [
        ("120", 120, 120),
        ("1", 5, 5.5),  # no earlier than the schedule
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True), 590, 601),
        ("99999999999", 86400, 86400),  # it can't hold a message for ever
        ("soon", 5, 5.5),
        ("-3", 5, 5.5),
        ("nan", 5, 5.5),
        ("inf", 5, 5.5),
    ],
)
async def test_a_receiver_says_when_it_wants_to_be_asked_again(value, least, most):
    """Retry-After in seconds or as a date is respected, within a day; nonsense is passed over."""
    value = value() if callable(value) else value
    async with receiver(answers({"status": 429, "Retry-After": value})) as them, hooked() as gw:
        await gw.plugin("Hooked").send(target=them.url)
        [wait] = await gw.plugin("Hooked").work()
    assert least <= wait <= most


async def test_an_endpoint_that_is_gone_is_asked_no_more():
    """410 disables an endpoint: what waits for it dies, new events leave it out; a test that works enables it again."""
    async with contextlib.AsyncExitStack() as stack:
        them, configured = [await stack.enter_async_context(receiver(410)) for _ in range(2)]
        async with hooked(endpoints=[{"url": configured.url, "secret": SECRET}]) as gw:
            plugin = gw.plugin("Hooked")
            made = (
                await gw.post("/v1/webhook_endpoints", {"name": "n", "url": them.url, "event_types": ["job.succeeded"]})
            ).data
            first = await plugin.send()
            second = await plugin.send()
            await plugin.work()
            await plugin.send()
            await plugin.work()
            assert (len(them.seen), len(configured.seen)) == (1, 1)
            rows = [await plugin.row(key) for key in first + second]
            assert [(row["status"], row["last_error"]) for row in rows] == [("dead", "status")] * 2 + [
                ("dead", "no_endpoint")
            ] * 2
            path = f"/v1/webhook_endpoints/{made['id']}"
            assert (await gw.get(path)).data["disabled_at"] is not None
            tested = await gw.post(f"{path}/test", {"event_type": "job.succeeded"})
            assert tested.data["status_code"] == 204
            assert (await gw.get(path)).data["disabled_at"] is None
            await plugin.send()
            await plugin.work()
    assert len(them.seen) == 3


async def test_a_jobs_own_webhook_that_is_gone_is_given_up():
    """410 ends a message at once, whoever it was for."""
    async with receiver(410) as them, hooked() as gw:
        [sent] = await gw.plugin("Hooked").send(target=them.url)
        assert await gw.plugin("Hooked").work() == []
        assert (await gw.plugin("Hooked").row(sent))["status"] == "dead"


async def test_what_an_endpoint_was_to_be_told_goes_with_it():
    """A message to an endpoint that was deleted is sent to nobody."""
    async with receiver() as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        made = (
            await gw.post("/v1/webhook_endpoints", {"name": "n", "url": them.url, "event_types": ["job.succeeded"]})
        ).data
        [sent] = await plugin.send()
        await gw.request("DELETE", f"/v1/webhook_endpoints/{made['id']}")
        await plugin.work()
        assert (await plugin.row(sent))["last_error"] == "no_endpoint"
    assert them.seen == []


async def test_both_or_neither_are_kept():
    """What is rolled back with its job was never said."""
    async with receiver() as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        with pytest.raises(RuntimeError):
            async with plugin.database.transaction() as statements:
                await plugin.part.send(statements, "default", "job.failed", {"id": "job_1"}, target=them.url)
                raise RuntimeError
        await plugin.part.wake()
        await plugin.work()
    assert them.seen == []


async def test_a_message_that_redis_forgot_is_sent_all_the_same():
    """What nobody enqueued, since Redis was away or came back empty, is found in the database."""
    async with receiver() as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        plugin.queue.away = True
        assert await plugin.send(target=them.url) == []
        plugin.queue.away = False
        await plugin.database.execute("UPDATE jobs_webhook_deliveries SET next_at = next_at - 6000")
        await plugin.part.tidy()
        await plugin.work()
        await plugin.part.tidy()
        assert plugin.queue.ids == []
    assert len(them.seen) == 1


async def test_a_message_that_waits_for_its_next_try_is_sent_at_once_when_somebody_says_so():
    """`xenios webhooks resend` of one that would be tried tomorrow, as the queue knows: it goes now."""
    async with receiver(500) as them, hooked(retries=["1d"]) as gw:
        plugin = gw.plugin("Hooked")
        [sent] = await plugin.send(target=them.url)
        [wait] = await plugin.work()
        plugin.queue.later.add(sent)
        await store.resend(plugin.database, sent)
        await plugin.database.execute("UPDATE jobs_webhook_deliveries SET next_at = next_at - 6000")
        await plugin.part.tidy()
        await plugin.work()
        row = await plugin.row(sent)
    assert wait >= 86400
    assert (len(them.seen), row["status"]) == (2, "delivered")


async def test_thousands_that_were_forgotten_are_all_found():
    """One tidying looks at all that is due, not only at the first page."""
    async with hooked() as gw:
        plugin = gw.plugin("Hooked")
        async with plugin.database.transaction() as statements:
            for _ in range(1201):
                await plugin.part.send(statements, "default", "job.failed", {"id": "job_1"}, target="http://127.0.0.1/")
        await plugin.make_due()
        assert len(plugin.queue.ids) == 1201
        families = {family.name: family for family in await plugin.part.services.metrics.read()}
        assert families["xenios_webhook_waiting"].series[0].value == 1201


async def test_old_messages_are_forgotten():
    """Delivered and dead ones are kept as long as the settings say; waiting ones until they are one or the other."""
    async with receiver(204, 500) as them, hooked(keep="60s") as gw:
        plugin = gw.plugin("Hooked")
        [taken] = await plugin.send(target=them.url)
        [waiting] = await plugin.send(target=them.url)
        await plugin.work()
        await plugin.part.tidy()
        assert (await plugin.row(taken))["status"] == "delivered"
        await plugin.database.execute("UPDATE jobs_webhook_deliveries SET expires_at = expires_at - 61000")
        await plugin.part.tidy()
        assert await plugin.row(taken) is None
        assert (await plugin.row(waiting))["status"] == "waiting"


async def test_one_round_forgets_all_messages_that_are_too_old():
    """However many ended since the last one: they don't become more and more."""
    async with hooked() as gw:
        plugin = gw.plugin("Hooked")
        async with plugin.database.transaction() as statements:
            await store.add(statements, "default", "job.failed", "{}", [(None, "http://127.0.0.1/")] * 12_001)
        await plugin.database.execute("UPDATE jobs_webhook_deliveries SET status = 'delivered', expires_at = 1")
        await plugin.part.tidy()
        assert await plugin.database.fetch("SELECT id FROM jobs_webhook_deliveries") == []


async def test_a_receiver_that_never_answers_costs_its_time_and_no_more():
    """One that takes the connection and says nothing, and one that says it byte by byte, fail after the time-out."""

    async def hang(reader, writer):
        await reader.read()

    async def drip(reader, writer):
        while not reader.at_eof():
            writer.write(b"H")
            await asyncio.sleep(0.02)

    for serve in (hang, drip):
        async with raw_receiver(serve) as port, hooked(timeout="300ms") as gw:
            [sent] = await gw.plugin("Hooked").send(target=f"http://127.0.0.1:{port}/")
            began = time.monotonic()
            assert len(await gw.plugin("Hooked").work()) == 1
            assert time.monotonic() - began < 3
            row = await gw.plugin("Hooked").row(sent)
        assert row["last_error"] in {"timeout", "bad_reply"}


async def test_a_reply_without_end_is_a_reply():
    """The status counts as soon as it is there; of the rest some kilobytes are read, for a second at most."""
    written = asyncio.Event()

    async def flood(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            written.set()

    async with raw_receiver(flood) as port, hooked() as gw:
        [sent] = await gw.plugin("Hooked").send(target=f"http://127.0.0.1:{port}/")
        assert await gw.plugin("Hooked").work() == []
        assert (await gw.plugin("Hooked").row(sent))["status"] == "delivered"
        async with asyncio.timeout(5):
            await written.wait()


async def test_a_receiver_that_hangs_keeps_no_other_waiting():
    """Of one host a process calls twenty at once; the others go back into the queue, uncounted."""
    release = asyncio.Event()

    async def wait(_request):
        await release.wait()
        return web.Response()

    async with receiver(*[wait] * 20) as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        ids = [key for _ in range(21) for key in await plugin.send(target=them.url)]
        under_way = [plugin.part.services.spawn(plugin.part._try(key), "test") for key in ids[:20]]
        async with asyncio.timeout(5):
            while len(them.seen) < 20:
                await asyncio.sleep(0)
        wait = await plugin.part._try(ids[20])
        assert 1 <= wait <= 2
        assert (await plugin.row(ids[20]))["attempts"] == 0
        release.set()
        await asyncio.gather(*under_way)
        assert await plugin.part._try(ids[20]) is None
        assert plugin.part._busy == {}


async def test_a_tenants_name_servers_that_hang_keep_no_other_tenant_waiting():
    """Messages to a hundred names that are never found are one tenant's: another's is sent meanwhile."""
    release = threading.Event()

    def lookup(host, *args, **kwargs):
        if host.endswith(".test"):
            release.wait(20)
            raise socket.gaierror
        return socket.getaddrinfo(host, *args, **kwargs)

    async with receiver() as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        plugin.part.client._lookup = lookup
        spawn = plugin.part.services.spawn
        try:
            stuck = [await plugin.send(target=f"http://n{i}.test/", tenant="bad") for i in range(100)]
            stuck = [spawn(plugin.part._try(key), "test") for [key] in stuck]
            [sent] = await plugin.send(target=them.url.replace("127.0.0.1", "localhost"), tenant="good")
            async with asyncio.timeout(5):
                assert await plugin.part._try(sent) is None
        finally:
            release.set()
        waits = await asyncio.gather(*stuck)
    assert len(them.seen) == 1
    assert sum(wait <= 2 for wait in waits) == 50  # uncounted; the others were tried


async def test_a_database_that_is_away_puts_the_work_back():
    """A message whose row can't be read or written is tried again, not lost."""
    async with receiver() as them, hooked() as gw:
        plugin = gw.plugin("Hooked")
        await plugin.send(target=them.url)
        await plugin.database.close()
        assert await plugin.work() == [5.0]


async def test_switched_off_nobody_is_called():
    """`enabled: false`: no routes, no messages, and a job that asks for a webhook is refused."""
    async with hooked(enabled=False) as gw:
        plugin = gw.plugin("Hooked")
        assert await plugin.send(target="http://127.0.0.1/") == []
        assert (await gw.get("/v1/webhook_endpoints")).status == 404
        with pytest.raises(Exception, match="calls no webhooks"):
            plugin.part.check("https://example.com/")


@pytest.mark.promise("P12.webhooks")
async def test_no_secret_and_no_payload_gets_into_logs(capfd):
    """A URL's path and query, a message's body, a reply and the secrets are in no log line, whatever goes wrong."""
    body = b"what the receiver says: canary-reply"
    async with receiver(answers({"status": 500}, body), answers({"status": 410}, body)) as them:
        url = them.url + "/canary-path?token=canary-query"
        async with hooked(endpoints=[{"url": url, "secret": SECRET}], retries=[0]) as gw:
            plugin = gw.plugin("Hooked")
            own = await own_secret(gw)
            await plugin.send(thing="canary-thing")
            for _ in range(2):
                await plugin.work()
                await plugin.make_due()
            await plugin.send(target="http://10.1.2.3/canary-path")
            await plugin.work()
            await gw.post("/v1/webhook_endpoints", {"name": "n", "url": url, "event_types": ["canary-event"]})
    said = capfd.readouterr()
    logged = said.err + said.out
    assert "webhook_failed" in logged
    assert "webhook_endpoint_gone" in logged
    assert "webhook_dead" in logged
    assert "canary-" not in logged
    assert SECRET not in logged
    assert own not in logged
    assert json.dumps(SECRET)[8:30] not in logged


@pytest.mark.promise("P14.webhooks")
async def test_what_another_tenant_registered_hears_nothing():
    """Events go to their own tenant's endpoints alone."""
    async with receiver() as them, hooked() as gw:
        made = {"name": "n", "url": them.url, "event_types": ["job.succeeded"]}
        assert (await gw.post("/v1/webhook_endpoints", made)).status == 200
        await gw.plugin("Hooked").send(tenant="somebody else")
        await gw.plugin("Hooked").work()
    assert them.seen == []
