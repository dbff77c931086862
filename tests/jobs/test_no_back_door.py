"""No back door by the plugins' routes: what they bring to a model passes what a live request passes, then and later."""

import asyncio
import json

import pytest

from gateway import Forbidden, hookimpl
from gateway.dialects import DIALECTS
from gateway.kit.testing import Gateway
from gateway.kit.upstream import ScriptedUpstream
from gateway_plugins.jobs import Plugin
from tests.contract.recorder import CALLER, Recorder, trace
from tests.contract.requests import BODIES, request
from tests.contract.sequences import CHECKED
from tests.contract.test_routes import EVERYTHING, STORES
from tests.jobs.gateways import ASYNC
from tests.jobs.inline import Inline
from tests.jobs.test_batches_api import create, ended, line, lines_of

ROUTES = pytest.mark.promise("P5.plugin_routes")
# What asks a model later; each has its part in the tests below.
ASKING = {("POST", "/v1/jobs"), ("POST", "/v1/batches")}
# What changes something and asks none. Whoever adds a route says here, or above, which it is.
QUIET = {
    *(("POST", f"{prefix}/messages/count_tokens") for prefix in ("/v1", "/api/v1")),
    *(("POST", path) for path in ("/admin/explain", "/admin/reload")),
    *(("POST", f"{prefix}/responses/{{id}}/cancel") for prefix in ("/v1", "/api/v1")),
    *(("DELETE", f"{prefix}/responses/{{id}}") for prefix in ("/v1", "/api/v1")),
    *(("POST", f"{prefix}/responses/{name}") for prefix in ("/v1", "/api/v1") for name in ("compact", "input_tokens")),
    *(("POST", f"/v1/{what}/{{id}}/cancel") for what in ("jobs", "batches")),
    *(("DELETE", f"/v1/{what}/{{id}}") for what in ("jobs", "files", "webhook_endpoints")),
    ("POST", "/v1/files"),
    *(("POST", f"/v1/webhook_endpoints{rest}") for rest in ("", "/{id}", "/{id}/rotate_secret", "/{id}/test")),
    ("POST", "/v1/webhook_secret/rotate"),
}
RESTORED = [hook for hook in CHECKED if hook != "authenticate"]
AS_JSON = [endpoint for endpoint in DIALECTS if endpoint != "audio/transcriptions"]
BATCHED = ("chat/completions", "completions", "responses", "embeddings")


class Gate:
    """Refuses requests in the phases that are `shut`, as the last check; what ran late is in `runs`."""

    def __init__(self, config, services):
        self.shut = ()
        self.runs = []

    @hookimpl
    async def check_request(self, exchange):
        if exchange.phase == "run":
            self.runs.append(exchange)
        if exchange.phase in self.shut:
            raise Forbidden("Closed.")


class Taking(Inline):
    """Takes jobs as well."""

    prepare_request = Plugin.prepare_request
    lookup_response = Plugin.lookup_response


def gateway(url, *plugins, upstream=None):
    settings = {"services": {"redis": url}}
    config = {"batches": {"backoff": "1ms"}}
    return Gateway.test(plugins=[*plugins, "usage", (Taking, config), Gate], upstream=upstream, settings=settings)


async def ask_for_jobs(gw, headers=None, model="test/model", *, follow=True):
    """Each way to make one job: the replies. `follow`: also a background response whose stream ends with it."""
    for endpoint in DIALECTS:
        for prefix in ("/v1", "/api/v1"):
            given = request(endpoint, model=model)
            own = {**given.pop("headers", {}), **ASYNC, **(headers or {})}
            yield await gw.request("POST", f"{prefix}/{endpoint}", **given, headers=own)
    for endpoint in AS_JSON:
        body = {"endpoint": endpoint, "body": {"model": model, **BODIES[endpoint]}}
        yield await gw.post("/v1/jobs", body, headers=headers)
    for stream in (False, True) if follow else (False,):
        body = {"model": model, "background": True, "stream": stream, **BODIES["responses"]}
        yield await gw.post("/v1/responses", body, headers=headers)


WAYS = 2 * len(DIALECTS) + len(AS_JSON) + 2


async def count(gw, table):
    [row] = await gw.snapshot.services.database.fetch(f"SELECT count(*) AS n FROM {table}")
    return row["n"]


async def test_every_route_that_writes_is_known_to_ask_a_model_or_none():
    """With all plugins: a route that is neither proxied nor named above would be a door that nobody watches."""
    async with Gateway.test(plugins=EVERYTHING, settings=STORES) as gw:
        writing = {(r.method, r.path) for r in gw.snapshot.routes.routes if not r.proxied and r.method != "GET"}
        assert writing == ASKING | QUIET


@ROUTES
async def test_nothing_becomes_a_job_that_would_be_refused_now(url):
    """By the header, by /v1/jobs, in the background: the last check refuses, after all others saw it, and nothing is kept."""
    async with ScriptedUpstream() as upstream, gateway(url, Recorder, upstream=upstream) as gw:
        gw.plugin("Gate").shut = ("accept",)
        replies = [reply async for reply in ask_for_jobs(gw)]
        assert [reply.status for reply in replies] == [403] * WAYS
        exchanges = await gw.finished(WAYS + len(AS_JSON))  # the calls of /v1/jobs too
        asked = [exchange for exchange in exchanges if exchange.endpoint in DIALECTS]
        assert len(asked) == WAYS
        for exchange in asked:
            wanted = CHECKED if exchange.parent is None else RESTORED
            assert trace(exchange)[: len(wanted)] == wanted, exchange.endpoint
            assert exchange.phase == "accept"
        assert await count(gw, "jobs_jobs") == 0
        assert upstream.seen == []


@ROUTES
async def test_what_was_taken_is_refused_where_it_would_be_now(url):
    """The door is shut between taking and running: jobs, responses and each line of a batch pass all checks once more."""
    async with ScriptedUpstream() as upstream, gateway(url, Recorder, upstream=upstream) as gw:
        queue = gw.plugin("Taking").inline
        queue.held = []
        taken = [reply async for reply in ask_for_jobs(gw, follow=False)]
        assert {reply.status for reply in taken} == {200, 202}
        batches = [
            await create(gw, line("a", url=f"/v1/{endpoint}", **BODIES[endpoint]), endpoint=f"/v1/{endpoint}")
            for endpoint in BATCHED
        ]
        gw.plugin("Gate").shut = ("run",)
        await queue.go()
        for batch in batches:
            [failed] = await lines_of(gw, (await ended(gw, batch))["error_file_id"])
            assert failed["response"]["status_code"] == 403
        async with asyncio.timeout(10):
            while queue.running:
                await asyncio.sleep(0.02)
        jobs = await gw.snapshot.services.database.fetch("SELECT status, error_code FROM jobs_jobs")
        assert {(job["status"], job["error_code"]) for job in jobs} == {("failed", "insufficient_permissions")}
        assert len(jobs) == WAYS - 1
        runs = gw.plugin("Gate").runs
        assert len(runs) == WAYS - 1 + len(BATCHED)
        for run in runs:
            assert trace(run)[: len(RESTORED)] == RESTORED, run.endpoint
            assert run.principal is CALLER
        assert upstream.seen == []


@ROUTES
async def test_late_work_keeps_to_its_callers_scopes(url):
    """A key for some models and endpoints: the others are refused it as a job, in the background and in a batch."""
    keys = {"use": "api_keys", "config": {"database": True}}
    async with ScriptedUpstream() as upstream, gateway(url, keys, upstream=upstream) as gw:
        scopes = {"models": ["test/*"], "endpoints": ["chat/completions"]}
        made = (await gw.post("/admin/keys", {"id": "narrow", "tenant": "narrow", **scopes})).data
        own = {"Authorization": f"Bearer {made['key']}"}
        statuses = [reply.status async for reply in ask_for_jobs(gw, own, model="else/model")]
        assert set(statuses) <= {403, 404}
        body = {"model": "test/model", **BODIES["embeddings"]}
        assert (await gw.post("/v1/jobs", {"endpoint": "embeddings", "body": body}, headers=own)).status == 403
        batch = await create(gw, line("ok"), line("no", model="else/model"), headers=own)
        found = await ended(gw, batch, own)
        [refused] = await lines_of(gw, found["error_file_id"], own)
        assert (refused["custom_id"], refused["response"]["status_code"]) == ("no", 404)
        assert [json.loads(seen.body)["model"] for seen in upstream.seen] == ["test/model"]


@ROUTES
async def test_nobody_lists_another_tenants_things_by_naming_it():
    """`tenant` is an administrator's word: any other caller's is refused at each list that knows it."""
    keys = {"use": "api_keys", "config": {"database": True}}
    plugins = [keys if entry["use"] == "api_keys" else entry for entry in EVERYTHING]
    async with Gateway.test(plugins=plugins, settings=STORES) as gw:
        made = (await gw.post("/admin/keys", {"id": "plain", "tenant": "plain"})).data
        own = {"Authorization": f"Bearer {made['key']}"}
        for path in ("jobs", "files", "batches", "webhook_endpoints", "usage"):
            for whose in ("default", "*"):
                asked = f"/v1/{path}?tenant={whose}"
                assert (await gw.get(asked, headers=own)).status in {400, 403}, asked
            assert (await gw.get(f"/v1/{path}", headers=own)).status == 200
