"""Keys in the database: made, used, changed, rotated and revoked while gateways run, on SQLite and PostgreSQL."""

import asyncio
import json
import time

import pytest

from gateway.kit import new_key
from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL
from tests.integration.process import xenios
from tests.stores.postgres import postgres_server


def gateway(url, *more, **config):
    plugin = {"use": "api_keys", "config": {"database": True, **config}}
    database = {"url": url, "migrate_on_start": True}
    return Gateway.test(plugins=[plugin, *more], settings={"services": {"database": database}})


async def create(gw, **fields):
    """(what the answer says of the key, headers that show its secret)."""
    reply = await gw.post("/admin/keys", fields)
    assert reply.status == 201, reply.body
    assert reply.headers["cache-control"] == "no-store"
    return reply.data, bearer(reply.data["key"])


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


async def chat(gw, headers, model=MODEL):
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    return await gw.post("/v1/chat/completions", body, headers=headers)


async def until(ask, status, seconds=2.0):
    """The answer with this status, which must come in time; how long it took."""
    begun = time.monotonic()
    while True:
        reply = await ask()
        if reply.status == status:
            return reply, time.monotonic() - begun
        assert time.monotonic() - begun < seconds, reply.status


async def test_a_key_works_as_it_was_made(url):
    """Made over REST it works at once, within its scope, and is shown without its secret or hash ever after."""
    async with gateway(url) as gw:
        made, headers = await create(
            gw,
            id="app",
            name="An app",
            team="research",
            owner="ann@x.y",
            tags=["eu"],
            roles=["intern"],
            models=["anthropic/*"],
        )
        assert made["key"].startswith(made["hint"].rstrip("…"))
        assert (await chat(gw, headers)).status == 200
        assert (await chat(gw, headers, model="openai/gpt-5-mini")).status == 404
        exchanges = await gw.finished(3)
        who = exchanges[1].principal
        assert (who.id, who.tenant, who.team, who.roles) == ("app", "app", "research", {"intern"})
        shown = (await gw.get("/admin/keys/app")).data
        assert shown == {k: v for k, v in made.items() if k != "key"}
        assert (await gw.get("/admin/keys/nobody")).status == 404


async def test_a_key_may_be_of_no_other_use(url):
    """Who is no administrator can't see, make or change keys; an administrator's key from the database can."""
    async with gateway(url) as gw:
        _, plain = await create(gw)
        _, admin = await create(gw, admin=True)
        for method, path in (("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/audit")):
            body = {"json": {}} if method == "POST" else {}
            assert (await gw.request(method, path, headers=plain, **body)).status == 403
        assert (
            (await gw.post("/admin/keys", {"id": "by-admin"}, headers=admin)).data["created_by"].startswith("key:key_")
        )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "x y"}, "id"),
        ({"hash": "hmac-sha256:00"}, "hash"),
        ({"revoked_at": None}, "revoked_at"),
        ({"created_by": "me"}, "created_by"),
        ({"created_at": 0}, "created_at"),
        ({"key": new_key()}, "key"),
        ({"hint": "x"}, "hint"),
        ({"old_hash": "hmac-sha256:00"}, "old_hash"),
        ({"old_until": 9e15}, "old_until"),
        ({"last_used_at": None}, "last_used_at"),
        ({"state": "active"}, "state"),
        ({"object": "api_key"}, "object"),
        ({"claims": {}}, "claims"),
        ({"scopes": {"models": ["*"]}}, "scopes"),
        ({"admin": "yes"}, "admin"),
        ({"__class__": "x"}, "__class__"),
        ({"team": "a\u0000b"}, "team"),
        ({"expires": "soon"}, "expires"),
        ({"limits": {"requests": -1}}, "limits.requests"),
        ({"models": [""]}, "models.0"),
    ],
)
async def test_what_can_not_be_said_of_a_key_is_refused(body, param, tmp_path):
    """Fields that aren't the caller's to set, and values that make no sense, are 400 with the field's name."""
    async with gateway(f"sqlite:///{tmp_path}/x") as gw:
        reply = await gw.post("/admin/keys", body)
        assert (reply.status, reply.data["error"]["param"]) == (400, param)
        await create(gw, id="there")
        if "id" not in body:
            changed = await gw.request("PATCH", "/admin/keys/there", json=body)
            assert (changed.status, changed.data["error"]["param"]) == (400, param)
        assert (await gw.post("/admin/keys", {"id": "there"})).status == 409


async def test_a_key_is_not_made_to_be_of_no_use(tmp_path):
    """One that had expired before it was made is refused; in an emergency a key is revoked without any body."""
    async with gateway(f"sqlite:///{tmp_path}/x") as gw:
        reply = await gw.post("/admin/keys", {"expires": "2020-01-01"})
        assert (reply.status, reply.data["error"]["message"]) == (400, "expires: is in the past")
        await create(gw, id="lost")
        revoked = await gw.request("POST", "/admin/keys/lost/revoke")
        assert (revoked.status, revoked.data["state"]) == (200, "revoked")


async def test_nobody_makes_himself_an_administrator(url):
    """A key that is none can change neither itself nor another, by whatever route; and an id never changes."""
    async with gateway(url) as gw:
        _, plain = await create(gw, id="plain", models=["anthropic/*"])
        for method, path, body in (
            ("PATCH", "/admin/keys/plain", {"admin": True}),
            ("PATCH", "/admin/keys/plain", {"models": None}),
            ("POST", "/admin/keys", {"admin": True}),
            ("POST", "/admin/keys/plain/rotate", {}),
            ("POST", "/admin/keys/plain/revoke", {}),
        ):
            assert (await gw.request(method, path, headers=plain, json=body)).status == 403
        renamed = await gw.request("PATCH", "/admin/keys/plain", json={"id": "bootstrap"})
        assert (renamed.status, renamed.data["error"]["param"]) == (400, "id")
        shown = (await gw.get("/admin/keys/plain")).data
        assert (shown["admin"], shown["models"], shown["state"]) == (False, ["anthropic/*"], "active")


async def test_changes_at_the_same_time_all_hold(url):
    """What one administrator takes away, the change of another doesn't bring back."""
    changes = [
        {"admin": False}, {"name": "n"}, {"tags": ["t"]}, {"roles": ["r"]}, {"models": ["m"]}, {"aliases": ["a"]},
        {"tasks": ["k"]}, {"endpoints": ["chat/*"]}, {"limits": {"requests": 5}}, {"team": "x"}, {"owner": "o"},
    ]  # fmt: skip
    async with gateway(url) as gw:
        await create(gw, id="app", admin=True)
        asked = (gw.request("PATCH", "/admin/keys/app", json=change) for change in changes)
        assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
        shown = (await gw.get("/admin/keys/app")).data
        for change in changes:
            assert shown | change == shown


async def test_a_row_that_makes_no_sense_keeps_nobody_else_out(url):
    """A key whose row was broken is refused; keys asked for together with it work."""
    async with gateway(url) as gw:
        _, broken = await create(gw, id="broken")
        _, sound = await create(gw, id="sound")
        database = gw.snapshot.services.database
        await database.execute("UPDATE api_keys_keys SET grants = $1 WHERE id = $2", "{", "broken")
        replies = await asyncio.gather(*(chat(gw, headers) for headers in (broken, sound) for _ in range(3)))
        assert [reply.status for reply in replies] == [401] * 3 + [200] * 3


async def test_a_revoked_key_is_refused_by_every_gateway_within_two_seconds(url):
    """Revoked at one gateway, in use at another: refused there within two seconds, and it stays so."""
    async with gateway(url) as one, gateway(url, bootstrap=False) as other:
        _, headers = await create(one, id="app")
        for gw in (one, other):
            assert (await chat(gw, headers)).status == 200
        assert (await one.post("/admin/keys/app/revoke", {})).data["state"] == "revoked"
        refused, _ = await until(lambda: chat(other, headers), 401)
        assert refused.data["error"]["code"] == "revoked_api_key"
        await until(lambda: chat(one, headers), 401)
        for _ in range(20):
            assert (await chat(other, headers)).status == 401
            assert (await chat(one, headers)).status == 401


async def test_a_rotated_keys_old_secret_works_as_long_as_was_said(url):
    """With an overlap both secrets work; without one, or once it is over, the old is refused."""
    async with gateway(url) as gw:
        _, first = await create(gw, id="app")
        assert (await chat(gw, first)).status == 200
        rotated = await gw.post("/admin/keys/app/rotate", {"overlap": "1h"})
        second = bearer(rotated.data["key"])
        assert rotated.data["old_key_until"] is not None
        await until(lambda: chat(gw, second), 200)
        assert (await chat(gw, first)).status == 200
        third = bearer((await gw.post("/admin/keys/app/rotate", {})).data["key"])
        await until(lambda: chat(gw, second), 401)
        await until(lambda: chat(gw, first), 401)
        await until(lambda: chat(gw, third), 200)


async def test_changes_and_ends_hold(url):
    """What PATCH sets holds within two seconds; what it doesn't name stays; an expired key is refused as such."""
    async with gateway(url) as gw:
        _, headers = await create(gw, id="app", team="a", models=["anthropic/*"])
        changed = await gw.request("PATCH", "/admin/keys/app", json={"models": ["openai/*"]})
        assert (changed.data["models"], changed.data["team"]) == (["openai/*"], "a")
        await until(lambda: chat(gw, headers), 404)
        await gw.request("PATCH", "/admin/keys/app", json={"expires": "2020-01-01"})
        refused, _ = await until(lambda: chat(gw, headers), 401)
        assert refused.data["error"]["code"] == "expired_api_key"


async def test_keys_come_by_the_page(url):
    """A list goes on after the last id, by tenant and team too; every change is in the audit with who made it."""
    async with gateway(url) as gw:
        for i in range(5):
            await create(gw, id=f"k{i}", tenant="odd" if i % 2 else "even")
        first = (await gw.get("/admin/keys?limit=3")).data
        assert ([k["id"] for k in first["data"]], first["has_more"]) == (["k0", "k1", "k2"], True)
        rest = (await gw.get(f"/admin/keys?limit=3&after={first['last_id']}")).data
        assert ([k["id"] for k in rest["data"]], rest["has_more"]) == (["k3", "k4"], False)
        odd = (await gw.get("/admin/keys?tenant=odd")).data["data"]
        assert [k["id"] for k in odd] == ["k1", "k3"]
        assert (await gw.get("/admin/keys?limit=0")).status == 400
        assert (await gw.get("/admin/keys?color=red")).status == 400
        await gw.post("/admin/keys/k0/revoke", {})
        newest = (await gw.get("/admin/audit?key_id=k0")).data["data"]
        assert [(row["action"], row["actor"]) for row in newest] == [
            ("revoke", "key:bootstrap"),
            ("create", "key:bootstrap"),
        ]


async def test_a_keys_own_limits_hold(url):
    """Limits and budget that a key brings along hold beside those of the configuration."""
    rate, money = {"use": "rate_limit", "config": {}}, {"use": "budgets", "config": {"unknown_price": "allow"}}
    async with gateway(url, rate, money) as gw:
        _, slow = await create(gw, limits={"requests": 2, "per": "1h"})
        _, poor = await create(gw, limits={"usd": "0.000001"})
        _, free = await create(gw)
        assert [(await chat(gw, slow)).status for _ in range(4)] == [200, 200, 429, 429]
        assert (await chat(gw, poor)).data["error"]["code"] == "insufficient_quota"
        assert [(await chat(gw, free)).status for _ in range(4)] == [200] * 4


async def test_invented_keys_leave_memory_and_database_alone(url):
    """Thousands of well-formed keys that nobody made: each 401, the cache stays bounded, few questions are asked."""
    async with gateway(url) as gw:
        store = gw.plugin("api_keys")._store
        asked = 0
        load = store._load

        async def counted(digests):
            nonlocal asked
            asked += 1
            await load(digests)

        store._load = counted
        found = await asyncio.gather(*(store.find(f"hmac-sha256:{i:064x}") for i in range(5000)))
        assert set(found) == {None}
        assert asked < 50
        for start in range(0, 12_000, 2000):
            await asyncio.gather(*(store.find(f"hmac-sha256:{start + i + 10_000:064x}") for i in range(2000)))
        assert len(store._unknown) <= 10_000
        assert (await chat(gw, bearer(new_key()))).status == 401


@pytest.mark.parametrize(("policy", "status"), [("allow", 200), ("deny", 503)])
async def test_while_the_database_is_away(policy, status):
    """Frozen: keys in use go on or are 503 by the policy, unknown ones are 503 and never 401; back without a restart."""
    with postgres_server(own=True) as server:
        async with gateway(await server.new(), on_store_error=policy) as gw:
            _, headers = await create(gw, id="app")
            assert (await chat(gw, headers)).status == 200
            server.freeze()
            try:
                await until(lambda: chat(gw, bearer(new_key())), 503, 10)
                assert gw.snapshot.services.database.is_open
                # what was asked before the freeze may still be believed for a moment
                reply, _ = await until(lambda: chat(gw, headers), status, 10)
                again = [(await chat(gw, headers)).status for _ in range(5)]
                assert again == [status] * 5
                if status == 503:
                    assert reply.data["error"]["code"] == "store_unavailable"
                assert (await gw.get("/v1/models")).status == 200  # the bootstrap key needs no database
            finally:
                server.thaw()
            await until(lambda: chat(gw, bearer(new_key())), 401, 10)
            assert (await chat(gw, headers)).status == 200


def test_the_command_line_does_the_same(tmp_path):
    """`xenios keys create`, `list`, `show`, `rotate`, `revoke` on a new SQLite."""
    config = tmp_path / "x.yaml"
    config.write_text(
        "server: {data_dir: ./data}\nupstreams: {openrouter: {without_key: simulate}}\n"
        "services: {database: {url: sqlite, migrate_on_start: true}}\n"
        "plugins: [{use: api_keys, config: {database: true}}]\n"
    )

    def run(*words):
        done = xenios("keys", *words, "--config", config, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = json.loads(
        run("create", "--id", "app", "--team", "x", "--model", "anthropic/*", "--limits", '{"usd": 5}', "--json")
    )
    assert (made["id"], made["models"], made["limits"]) == ("app", ["anthropic/*"], {"usd": "5"})
    assert "app" in run("list")
    assert json.loads(run("show", "app"))["team"] == "x"
    assert "shown once" in run("rotate", "app", "--overlap", "1d")
    assert "revoked" in run("revoke", "app")
    wrong = xenios("keys", "show", "nobody", "--config", config, cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (1, "xenios: There is no key 'nobody'.\n")
    assert "hash:" in run("hash", "--new")


def test_keys_in_the_database_need_their_tables(tmp_path):
    """Without `xenios db upgrade` the start ends with the command to run, and goes on after it."""
    config = tmp_path / "x.yaml"
    config.write_text(
        "server: {data_dir: ./data}\nupstreams: {openrouter: {without_key: simulate}}\n"
        "plugins: [{use: api_keys, config: {database: true}}]\n"
    )
    refused = xenios("serve", "--config", config, "--port", "0", cwd=tmp_path)
    assert refused.returncode == 2
    assert "xenios db upgrade" in refused.stderr
    assert xenios("db", "upgrade", "--config", config, cwd=tmp_path).returncode == 0
    assert xenios("keys", "create", "--config", config, cwd=tmp_path).returncode == 0
