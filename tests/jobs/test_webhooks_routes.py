"""/v1/webhook_endpoints by openai's SDK, and by hand."""

import openai
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from gateway.kit.testing import Gateway
from tests.jobs.receivers import LOCAL, Hooked, receiver

ONE, OTHER, ADMIN = ("sk-test-" + name * 8 for name in ("one", "other", "admin"))
NEW = {"name": "mine", "url": "https://example.com/hook", "event_types": ["job.succeeded"]}


@pytest.fixture
async def gw(monkeypatch):
    for name, key in (("ONE", ONE), ("OTHER", OTHER), ("ADMIN", ADMIN)):
        monkeypatch.setenv(f"TEST_KEY_{name}", key)
    keys = [
        {"id": "one", "env": "TEST_KEY_ONE", "tenant": "first"},
        {"id": "two", "env": "TEST_KEY_OTHER", "tenant": "second"},
        {"id": "root", "env": "TEST_KEY_ADMIN", "tenant": "ops", "admin": True},
    ]
    plugins = [{"use": "api_keys", "config": {"keys": keys}}, (Hooked, LOCAL)]
    async with Gateway.test(plugins=plugins) as running:
        yield running


def as_(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


async def test_openais_sdk_manages_endpoints(gw):
    """create, retrieve, update, list, rotate_secret, test and delete of the unmodified SDK."""
    async with receiver() as them, openai.AsyncOpenAI(api_key=ONE, base_url=f"{gw.url}/v1", max_retries=0) as client:
        hooks = client.webhooks
        made = await hooks.create(name="mine", url=them.url, event_types=["batch.completed", "response.failed"])
        assert made.id.startswith("we_")
        assert made.signing_secret.startswith("whsec_")
        assert made.signing_secret_hint.endswith(made.signing_secret[-3:])
        found = await hooks.retrieve(made.id)
        assert (found.name, found.url, found.event_types) == ("mine", them.url, ["batch.completed", "response.failed"])
        assert not hasattr(found, "signing_secret")
        changed = await hooks.update(made.id, name="ours", event_types=["batch.failed"])
        assert (changed.name, changed.url, changed.event_types) == ("ours", them.url, ["batch.failed"])
        more = [await hooks.create(name=str(n), url=them.url, event_types=["batch.failed"]) for n in range(4)]
        listed = [endpoint.id async for endpoint in hooks.list(limit=2)]
        assert sorted(listed) == sorted([made.id, *(endpoint.id for endpoint in more)])
        result = await hooks.test(made.id, event_type="batch.completed")
        assert (result.status_code, result.webhook_endpoint_id) == (204, made.id)
        [message] = them.seen
        assert hooks.unwrap(message.body, message.headers, secret=made.signing_secret).type == "batch.completed"
        rotated = await hooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        await hooks.test(made.id, event_type="batch.completed")
        for secret in (made.signing_secret, rotated.signing_secret):
            assert hooks.unwrap(them.seen[-1].body, them.seen[-1].headers, secret=secret)
        assert (await hooks.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await hooks.retrieve(made.id)
        assert "batch.completed" in (await hooks.event_types.list()).data


async def test_a_rotation_may_end_the_old_secret_at_once(gw):
    """Somebody knows the old one: nothing is signed by it any more."""
    async with receiver() as them:
        made = (await gw.post("/v1/webhook_endpoints", {**NEW, "url": them.url}, **as_(ONE))).data
        path = f"/v1/webhook_endpoints/{made['id']}"
        body = {"keep_old_secret_active_for_24_hours": False}
        new = (await gw.post(f"{path}/rotate_secret", body, **as_(ONE))).data
        await gw.post(f"{path}/test", {"event_type": "job.failed"}, **as_(ONE))
    [message] = them.seen
    Webhook(new["signing_secret"]).verify(message.body, message.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(made["signing_secret"]).verify(message.body, message.headers)


async def test_a_tenants_own_secret_is_for_its_jobs_webhooks(gw):
    """Each tenant has its own; it can be asked for again, and rotated, and then both sign until the old one's end."""
    async with receiver() as them:
        first = await gw.get("/v1/webhook_secret", **as_(ONE))
        assert first.headers["Cache-Control"] == "no-store"
        assert (await gw.get("/v1/webhook_secret", **as_(ONE))).data == first.data
        assert (await gw.get("/v1/webhook_secret", **as_(OTHER))).data["signing_secret"] != first.data["signing_secret"]
        secrets = [first.data["signing_secret"]]
        for _ in range(2):
            rotated = await gw.post("/v1/webhook_secret/rotate", {}, **as_(ONE))
            assert rotated.data["old_secret_until"] is not None
            secrets.append(rotated.data["signing_secret"])
        plugin = gw.plugin("Hooked")
        await plugin.send(tenant="first", target=them.url)
        await plugin.work()
        await plugin.database.execute("UPDATE jobs_webhook_endpoints SET old_until = 1")
        await plugin.send(tenant="first", target=them.url)
        await plugin.work()
    assert len(set(secrets)) == 3
    while_both, after = them.seen
    assert verified(while_both, secrets) == [False, True, True]
    assert verified(after, secrets) == [False, False, True]


def verified(message, secrets):
    out = []
    for secret in secrets:
        try:
            Webhook(secret).verify(message.body, message.headers)
        except WebhookVerificationError:
            out.append(False)
        else:
            out.append(True)
    return out


async def test_no_secret_is_in_the_database(gw):
    """Whoever reads the tables can sign nothing."""
    made = (await gw.post("/v1/webhook_endpoints", NEW, **as_(ONE))).data
    await gw.post("/v1/webhook_secret/rotate", {}, **as_(ONE))
    rows = await gw.plugin("Hooked").database.fetch("SELECT * FROM jobs_webhook_endpoints")
    assert len(rows) == 2
    assert made["signing_secret"].removeprefix("whsec_") not in str(rows)


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("GET", "", None),
        ("POST", "", {"name": "theirs"}),
        ("DELETE", "", None),
        ("POST", "/rotate_secret", {}),
        ("POST", "/test", {"event_type": "job.failed"}),
    ],
)
@pytest.mark.promise("P14.webhooks")
async def test_others_endpoints_are_not_there(gw, method, path, body):
    """Another tenant gets the 404 of an id that never was; an administrator gets through."""
    async with receiver() as them:
        made = (await gw.post("/v1/webhook_endpoints", {**NEW, "url": them.url}, **as_(ONE))).data
        path = f"/v1/webhook_endpoints/{made['id']}{path}"
        theirs = await gw.request(method, path, json=body, **as_(OTHER))
        never = await gw.request(method, path.replace(made["id"], "we_0"), json=body, **as_(OTHER))
        assert theirs.status == never.status == 404
        assert theirs.data["error"]["message"].replace(made["id"], "we_0") == never.data["error"]["message"]
        assert (await gw.get("/v1/webhook_endpoints", **as_(OTHER))).data["data"] == []
        assert (await gw.request(method, path, json=body, **as_(ADMIN))).status == 200


async def test_administrators_see_a_tenants_endpoints(gw):
    """`?tenant=`; for others it is refused."""
    await gw.post("/v1/webhook_endpoints", NEW, **as_(ONE))
    path = "/v1/webhook_endpoints?tenant=first"
    assert len((await gw.get(path, **as_(ADMIN))).data["data"]) == 1
    assert (await gw.get("/v1/webhook_endpoints", **as_(ADMIN))).data["data"] == []
    assert (await gw.get(path, **as_(OTHER))).status == 403


@pytest.mark.parametrize(
    "change, field",
    [
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://user:pass@example.com/"}, "url"),
        ({"url": 7}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["nothing.ever"]}, "event_types"),
        ({"event_types": "job.succeeded"}, "event_types"),
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"tenant": "second"}, "tenant"),
        ({"version": 7}, "version"),
    ],
)
async def test_what_could_never_work_is_refused_at_once(gw, change, field):
    """400 names the field, at creation and at a change; nothing is taken that isn't offered."""
    made = (await gw.post("/v1/webhook_endpoints", NEW, **as_(ONE))).data
    for path, body in (("", {**NEW, **change}), (f"/{made['id']}", change)):
        reply = await gw.post(f"/v1/webhook_endpoints{path}", body, **as_(ONE))
        assert reply.status == 400
        assert reply.data["error"]["param"].startswith(field)
        assert "pass@" not in reply.data["error"]["message"]


async def test_endpoints_are_not_without_end(gw):
    """Fifty for a tenant: each event makes a message for each."""
    for _ in range(50):
        assert (await gw.post("/v1/webhook_endpoints", NEW, **as_(ONE))).status == 200
    refused = await gw.post("/v1/webhook_endpoints", NEW, **as_(ONE))
    assert refused.status == 400
    assert "50" in refused.data["error"]["message"]
    assert (await gw.post("/v1/webhook_endpoints", NEW, **as_(OTHER))).status == 200


async def test_a_test_tells_what_came_back(gw):
    """The receiver's status, whatever it is; 502 if it gives none, and of an address inside no more than that."""
    async with receiver(418) as them:
        made = (await gw.post("/v1/webhook_endpoints", {**NEW, "url": them.url}, **as_(ONE))).data
        path = f"/v1/webhook_endpoints/{made['id']}/test"
        assert (await gw.post(path, {"event_type": "job.failed"}, **as_(ONE))).data["status_code"] == 418
    silent = await gw.post(path, {"event_type": "job.failed"}, **as_(ONE))
    assert (silent.status, silent.data["error"]["code"]) == (502, "webhook_unreachable")
