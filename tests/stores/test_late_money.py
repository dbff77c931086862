"""Late work and money: what a job counts for, when; and who pays if its worker dies. On a real Valkey."""

import asyncio
import time

import pytest

from gateway import LateRequest, Principal, Reply, hookimpl
from gateway.kit import Rule
from gateway.kit.ledger_redis import LEASE_SECONDS, RedisLedger
from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL, Hang, Json, ScriptedUpstream, Slow, chat_completion
from gateway.stores.redis import RedisStore
from gateway.tasks import Tasks
from gateway_plugins.rate_limit import Limit
from tests.stores.prices import PRICES
from tests.stores.servers import emptied

ADA = Principal("ada", tenant="acme", admin=True, limits={"requests": 2, "per": 3600})
PAID = 70  # micro-USD
PATIENT = 10.0


class Jobs:
    """Takes what is to be accepted, and keeps it."""

    reads_settings = ()
    takes_jobs = True

    def __init__(self, config, services):
        self.services = services
        self.kept = []

    @hookimpl
    async def authenticate(self, exchange):
        return ADA

    @hookimpl
    async def restore_principal(self, reference, kept):
        return kept

    @hookimpl
    async def prepare_request(self, exchange):
        if exchange.request.header("prefer"):
            exchange.phase = "accept"

    @hookimpl
    async def lookup_response(self, exchange):
        if exchange.phase != "accept":
            return None
        self.kept.append(LateRequest.of(exchange))
        return Reply(202, data={})


class Silent:
    """A client that wants nothing."""

    async def send(self, status, headers, body, progress):
        self.status = status

    async def start(self, status, headers): ...

    async def write(self, data): ...

    async def end(self): ...

    def abort(self): ...


@pytest.fixture
async def services(server, tmp_path):
    return {
        "redis": await emptied(server),
        "database": {"url": f"sqlite:///{tmp_path}/usage.db", "migrate_on_start": True},
    }


def gateway(services, *, usd="0.01", upstream=None, limits=(), budgets=True):
    budget = {"budgets": [{"name": "all", "by": ["tenant"], "usd": usd, "per": "total"}]}
    plugins = [Jobs, {"use": "rate_limit", "config": {"limits": list(limits)}}]
    plugins += [{"use": "budgets", "config": budget}] if budgets else []
    return Gateway.test(
        plugins=[*plugins, "usage"],
        upstream=upstream or ScriptedUpstream(default=Json(chat_completion(cost=PAID / 1e6))),
        settings={"services": services, "catalogue": {"overrides": PRICES}},
    )


async def take(gw):
    body = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
    return await gw.post("/v1/chat/completions", body, headers={"Prefer": "respond-async"})


async def asked(upstream):
    async with asyncio.timeout(PATIENT):
        while not upstream.seen:
            await asyncio.sleep(0.01)


async def money(gw):
    ledger = gw.snapshot.services.ledger
    await ledger.flush()
    [sums] = await ledger.budgets(["budgets:all:total:acme"])
    return sums


async def rows(gw, count):
    database = gw.snapshot.services.database
    async with asyncio.timeout(PATIENT):
        while True:
            async with database.transaction() as statements:
                found = await statements.fetch("SELECT * FROM usage_requests ORDER BY at, id")
            if len(found) >= count:
                return found
            await asyncio.sleep(0.02)


async def reaped(services):
    """What another worker does with those that have not been heard of for as long as a lease lasts."""
    store = RedisStore(services["redis"])
    try:
        assert await RedisLedger(store, lambda: time.time() + LEASE_SECONDS + 1).reap() >= 1
    finally:
        await store.close()


async def test_a_job_reserves_nothing_until_it_runs(services):
    """Taken: nothing is reserved. Run: what it may cost, then what it did cost, in the row of the run."""
    upstream = ScriptedUpstream(Slow(Json(chat_completion(cost=PAID / 1e6)), 0.3))
    async with gateway(services, upstream=upstream) as gw:
        assert (await take(gw)).status == 202
        assert await money(gw) == (0, 0)
        jobs, tasks = gw.plugin("Jobs"), Tasks()
        running = tasks.spawn(jobs.services.run(jobs.kept[0], Silent(), operation_id="run-1"), "run")
        await asked(upstream)
        spent, reserved = await money(gw)
        assert (spent, reserved > 0) == (0, True)
        await running
        assert await money(gw) == (PAID, 0)
        found = {row["id"]: row for row in await rows(gw, 1)}
        assert found["run-1"]["cost_micro_usd"] == PAID
        assert sum(row["cost_micro_usd"] or 0 for row in found.values()) == PAID


async def test_a_job_is_not_taken_once_all_is_spent(services):
    """429 `insufficient_quota`, as for any request; while some is left, however little, it is taken."""
    async with gateway(services) as gw:
        ledger = gw.snapshot.services.ledger
        rule = Rule("budgets:all:total:acme", "budget", 10**9, None, amount=1)
        ledger.settle("before", [(rule, 9_999)], admitted=False)
        await ledger.flush()
        assert (await take(gw)).status == 202
        ledger.settle("more", [(rule, 1)], admitted=False)
        await ledger.flush()
        refused = await take(gw)
        assert (refused.status, refused.data["error"]["code"]) == (429, "insufficient_quota")
        assert "0.01 of 0.01 USD are spent, and nothing is left" in refused.data["error"]["message"]
        assert refused.headers["x-should-retry"] == "false"


async def test_a_job_counts_as_a_request_when_it_is_taken_and_for_the_rest_while_it_runs(services):
    """Two requests an hour of the key's own: two jobs are taken, a third is not, and both run. One place for all is
    taken by the one that runs.
    """
    upstream = ScriptedUpstream(Slow(Json(chat_completion()), 0.3), default=Json(chat_completion()))
    one = {"name": "one", "by": [], "concurrent": 1, "tokens": 100_000}
    async with gateway(services, upstream=upstream, limits=[one]) as gw:
        assert [(await take(gw)).status for _ in range(3)] == [202, 202, 429]
        jobs, tasks = gw.plugin("Jobs"), Tasks()
        first = Silent()
        running = tasks.spawn(jobs.services.run(jobs.kept[0], first), "run")
        await asked(upstream)
        second = Silent()
        await jobs.services.run(jobs.kept[1], second)
        assert second.status == 429
        await running
        assert first.status == 200
        await jobs.services.run(jobs.kept[1], second)
        assert second.status == 200


@pytest.mark.parametrize("payer", ["operator", "tenant"])
async def test_who_pays_for_a_call_whose_worker_died(services, payer):
    """The operator: the tenant's budget has its money back, and the row is the operator's. The tenant: as reserved. In
    both cases nothing stays reserved; and a worker that was only slow puts right what was booked for it.
    """
    upstream = ScriptedUpstream(Slow(Json(chat_completion(cost=PAID / 1e6)), 1.0))
    async with gateway(services, upstream=upstream) as gw:
        await take(gw)
        jobs, tasks = gw.plugin("Jobs"), Tasks()
        run = jobs.services.run(jobs.kept[0], Silent(), operation_id="try-1", charge_abandoned=payer)
        running = tasks.spawn(run, "run")
        await asked(upstream)
        _, reserved = await money(gw)
        assert reserved > 0
        await reaped(services)
        assert await money(gw) == ((0, 0) if payer == "operator" else (reserved, 0))
        [row] = [row for row in await rows(gw, 1) if row["id"] == "try-1"]
        told = {name: row[name] for name in ("outcome", "tenant", "principal", "cost_micro_usd", "cost_source")}
        who = ("operator", "operator") if payer == "operator" else ("acme", ADA.reference)
        assert told == dict(zip(told, ("abandoned", *who, reserved, "reserved"), strict=True))
        exchange = await running
        jobs.services.settle_late(exchange.settlement)  # by another worker too: nothing changes
        assert await money(gw) == (PAID, 0)
        async with asyncio.timeout(PATIENT):
            while row["outcome"] == "abandoned":
                [row] = [row for row in await rows(gw, 1) if row["id"] == "try-1"]
                await asyncio.sleep(0.02)
        assert (row["tenant"], row["cost_micro_usd"]) == ("acme", PAID)


async def test_a_call_without_any_limit_leaves_a_row_too_and_nobody_knows_its_cost(services):
    """What a dead worker had under way is known, budgets or not; unknown is not 0."""
    async with gateway(services, budgets=False, upstream=ScriptedUpstream(Hang())) as gw:
        await take(gw)
        jobs, tasks = gw.plugin("Jobs"), Tasks()
        running = tasks.spawn(jobs.services.run(jobs.kept[0], Silent(), operation_id="try-1"), "run")
        await asked(gw.upstream)
        await reaped(services)
        [row] = [row for row in await rows(gw, 1) if row["id"] == "try-1"]
        assert (row["outcome"], row["tenant"], row["cost_micro_usd"]) == ("abandoned", "operator", None)
        running.cancel()
        await asyncio.wait([running])


async def test_what_was_committed_by_a_worker_that_died_is_settled_by_another(services):
    """Between the commit and the settlement: the settlement that is kept with the result makes it good, once."""
    async with gateway(services) as gw:
        await take(gw)
        jobs = gw.plugin("Jobs")
        kept = []

        async def commit(exchange, row):
            kept.append((exchange.settlement, row))

        ledger, lost = gw.snapshot.services.ledger, []
        settle = type(ledger).settle
        try:
            type(ledger).settle = lambda self, *args, **kwargs: lost.append(args)  # it dies just then
            await jobs.services.run(jobs.kept[0], Silent(), operation_id="try-1", commit=commit)
        finally:
            type(ledger).settle = settle
        [(settlement, row)] = kept
        assert row
        assert lost
        await reaped(services)
        assert await money(gw) == (0, 0)
        for _ in range(2):
            jobs.services.settle_late(settlement)
            assert await money(gw) == (PAID, 0)


@pytest.mark.parametrize(
    ("phase", "limit", "wrong"),
    [
        ("run", {"requests": 5}, "requests don't count in phase run"),
        ("accept", {"tokens": 5}, "tokens don't count in phase accept"),
        (["accept", "run"], {"requests": 5, "tokens": 5}, None),
        (["live", "run"], {"requests": 5}, None),
    ],
)
def test_a_limit_that_would_never_count_is_a_mistake(phase, limit, wrong):
    """It would stand there and limit nothing."""
    made = {"name": "x", "when": {"phase": phase}, **limit}
    if wrong is None:
        Limit.model_validate(made)
    else:
        with pytest.raises(ValueError, match=wrong):
            Limit.model_validate(made)


async def test_an_explanation_says_what_a_job_counts_for_when_it_is_taken(services):
    """Its requests, not its tokens; of budgets, that they reserve later."""
    all_units = {"name": "all", "by": [], "requests": 5, "tokens": 100_000, "concurrent": 3}
    async with gateway(services, limits=[all_units]) as gw:
        body = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
        headers = {"Prefer": "respond-async", "X-Xenios-Explain": "1"}
        said = str((await gw.post("/v1/chat/completions", body, headers=headers)).data)
        assert "reserves what it may cost when the job runs" in said
        assert "all: 5 requests" in said
        assert "all: 100,000 tokens" not in said
        assert "3 at the same time" not in said
