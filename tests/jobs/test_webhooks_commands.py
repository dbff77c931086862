"""`xenios webhooks`."""

import asyncio
import json

import pytest
import typer
from standardwebhooks import Webhook
from typer.testing import CliRunner

from gateway.cli import _Unstarted
from gateway.plugins import read_plugins
from gateway.settings import load
from gateway_plugins.jobs import api
from gateway_plugins.jobs.webhooks import commands, store
from tests.integration.process import xenios
from tests.jobs.receivers import receiver

SECRET = "whsec_c2VjcmV0IG9mIHRoZSBjb25maWd1cmF0aW9uIQ=="
CONFIG = """
server: {data_dir: %(folder)s/data}
upstreams: {openrouter: {without_key: simulate}}
services: {redis: embedded, database: {url: sqlite, migrate_on_start: true}}
plugins:
  - use: jobs
    config:
      webhooks:
        allow_http: true
        allow_addresses: [127.0.0.0/8]
        ports: any
        endpoints: [{url: "%(url)s?token=canary", secret: %(secret)s, events: ["batch.*"]}]
"""


class Tool:
    """The commands, on a new SQLite, and the database that they see."""

    def __init__(self, folder, url):
        self.config = folder / "x.yaml"
        self.config.write_text(CONFIG % {"folder": folder, "url": url, "secret": SECRET})
        loaded = load(self.config)
        [blueprint] = read_plugins(loaded.settings, loaded.source)
        self.plugin = _Unstarted(blueprint, loaded, self.config)
        self.cli = typer.Typer()
        self.cli.command("other")(lambda: None)
        commands.add_commands(self.plugin, self.cli)

    async def run(self, *words):
        """As in a process of its own: the commands run a loop themselves."""
        return await asyncio.to_thread(CliRunner().invoke, self.cli, ["webhooks", *words])

    async def json(self, *words):
        done = await self.run(*words, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    async def use(self, call):
        return await asyncio.to_thread(self.plugin.with_database, call)


@pytest.fixture
async def them():
    async with receiver() as running:
        yield running


@pytest.fixture
async def tool(tmp_path, them):
    return Tool(tmp_path, them.url)


async def dead(database):
    """A message that was given up, and its id."""
    async with database.transaction() as statements:
        [key] = await store.add(statements, "acme", "job.failed", '{"id":"evt_1"}', [("we_gone", None)])
    row = await store.delivery(database, key)
    await store.record(database, row, status="dead", wait=0, keep=60, last_status=500, error="status")
    return key


async def test_messages_are_listed_and_sent_again(tool):
    """`list` by state, tenant and endpoint; `show` with the text; `resend` makes a dead one wait again, from the start."""
    key = await tool.use(dead)
    [listed] = await tool.json("list", "--status", "dead", "--tenant", "acme", "--endpoint", "we_gone")
    assert (listed["id"], listed["last_status"], listed["attempts"]) == (key, 500, 1)
    assert "body" not in listed
    assert key in (await tool.run("list")).stdout
    assert await tool.json("list", "--tenant", "else") == []
    assert json.loads((await tool.run("show", key)).stdout)["body"] == {"id": "evt_1"}
    [again] = await tool.json("resend", key)
    assert (again["status"], again["attempts"], again["finished_at"]) == ("waiting", 0, None)
    other = await tool.use(dead)
    assert [row["id"] for row in await tool.json("resend", "--dead-of", "we_gone")] == [other]


async def test_secrets_are_rotated(tool):
    """A new secret is printed, for an endpoint or a tenant; the configuration's are changed there."""
    made = await tool.use(
        lambda database: store.create_endpoint(database, "acme", "n", "https://example.com/", ["job.failed"])
    )
    secrets = [(await tool.json("rotate", made["id"]))["signing_secret"] for _ in range(2)]
    secrets.append((await tool.run("rotate", "--tenant", "acme", "--at-once")).stdout.strip())
    assert len(set(secrets)) == 3
    assert all(Webhook(secret) for secret in secrets)
    row = await tool.use(lambda database: store.own(database, "tenant:acme"))
    assert row["old_until"] <= api.now()
    [configured] = [one for one in await tool.json("endpoints") if one["name"] == "of the configuration"]
    refused = await tool.run("rotate", configured["id"])
    assert (refused.exit_code, "old_secret" in refused.stderr) == (2, True)


async def test_an_endpoint_is_tested(tool, them):
    """`test` sends an example now and says what came back; its end says whether it was taken."""
    [configured] = await tool.json("endpoints")
    good = await tool.json("test", configured["id"], "--event", "batch.failed")
    assert good["status_code"] == 204
    [message] = them.seen
    assert Webhook(SECRET).verify(message.body, message.headers)["type"] == "batch.failed"
    them.script = [500]
    assert (await tool.run("test", configured["id"])).exit_code == 1


async def test_a_url_may_be_a_secret(tool):
    """Of the configuration's endpoints the host alone is shown."""
    done = await tool.run("endpoints")
    assert "http://127.0.0.1:" in done.stdout
    assert "canary" not in done.stdout
    assert SECRET not in done.stdout


@pytest.mark.parametrize(
    "words, code",
    [
        (["show", "msg_0"], 1),
        (["show", "we_0"], 1),
        (["resend"], 2),
        (["resend", "msg_0"], 1),
        (["rotate"], 2),
        (["rotate", "we_0"], 1),
        (["test", "we_0"], 1),
        (["test", "we_0", "--event", "x"], 2),
        (["list", "--status", "x"], 2),
    ],
)
async def test_what_is_not_there_is_said(tool, words, code):
    """One line says what is wrong; the exit code says whose mistake it is."""
    done = await tool.run(*words)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith("xenios: ")


def test_the_command_is_there(tmp_path):
    """`xenios webhooks list --json` in a process of its own."""
    config = tmp_path / "x.yaml"
    config.write_text(CONFIG % {"folder": tmp_path, "url": "http://127.0.0.1:1/", "secret": SECRET})
    done = xenios("webhooks", "list", "--json", "--config", config, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
