"""A late run's result, its usage row and its sums: in memory with SQLite, and on a real Valkey with a real PostgreSQL."""

import asyncio
import json

import pytest

from gateway import StoreUnavailable
from gateway.exchange import Correction, Cost, Outcome, Source, Usage
from gateway.kit.testing import Gateway
from gateway.kit.upstream import MODEL, Json, ScriptedUpstream, Stream, chat_completion, chat_events
from gateway.tasks import Tasks
from gateway_plugins.usage.rows import correction_row
from tests.contract.jobs import Jobs, Keeper, taken
from tests.stores.prices import PRICES
from tests.stores.servers import emptied

COST = 70  # micro-USD
BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": "1", "per": "total"}]}}
PATIENT = 10.0


@pytest.fixture(params=["memory, sqlite", "redis, postgresql"])
async def services(request, tmp_path):
    if request.param == "memory, sqlite":
        return {"redis": "memory", "database": {"url": f"sqlite:///{tmp_path}/late.db", "migrate_on_start": True}}
    url = await request.getfixturevalue("postgres").new()
    return {
        "redis": await emptied(request.getfixturevalue("server")),
        "database": {"url": url, "migrate_on_start": True},
    }


def gateway(services, *answers):
    upstream = ScriptedUpstream(*answers, default=Json(chat_completion(cost=COST / 1e6)))
    settings = {"services": services, "catalogue": {"overrides": {"test/model": PRICES[MODEL]}}}
    return Gateway.test(plugins=[Jobs, BUDGET, "usage"], upstream=upstream, settings=settings)


class Commit:
    """Stores the row, and reads in the same transaction what is there then."""

    def __init__(self, gw):
        self.services = gw.snapshot.services
        self.row = b""
        self.seen = []
        self.settlement = None

    async def __call__(self, exchange, row):
        self.row, self.settlement = row, json.dumps(exchange.settlement)
        async with self.services.database.transaction() as statements:
            await self.services.rows.write(statements, row)
            self.seen = await statements.fetch("SELECT * FROM usage_requests WHERE id = $1", exchange.id)


async def rows(gw, op):
    """What is stored of an operation, once all rows that were under way have come."""
    plugin = gw.plugin("usage")
    await gw.snapshot.services.ledger.flush()
    while await plugin._move():
        pass
    return await gw.snapshot.services.database.fetch("SELECT * FROM usage_requests WHERE id = $1", op)


async def spent(gw):
    await gw.snapshot.services.ledger.flush()
    [sums] = await gw.snapshot.services.ledger.budgets(["budgets:all:total:"])
    return sums


async def test_the_row_is_committed_with_the_result_and_the_sums_add_up(services):
    """The row is there before the commit ends, once; the budget is charged what it says, and holds nothing."""
    async with gateway(services) as gw:
        jobs, commit = await taken(gw, user="ann"), Commit(gw)
        exchange = await jobs.services.run(jobs.late(), Keeper(), operation_id="job_1/1", commit=commit)
        [row] = commit.seen
        assert (row["id"], row["request_id"], row["outcome"], row["end_user"]) == ("job_1/1", "mine-1", "ok", "ann")
        assert row["cost_micro_usd"] == exchange.cost.micro_usd == COST
        assert len(await rows(gw, "job_1/1")) == 1
        assert await spent(gw) == (COST, 0)


async def test_a_row_that_could_not_be_committed_comes_with_the_sums(services):
    """The database was away: what the call cost is neither lost nor charged without a row."""
    async with gateway(services) as gw:
        jobs = await taken(gw)

        async def commit(exchange, row):
            raise StoreUnavailable

        with pytest.raises(StoreUnavailable):
            await jobs.services.run(jobs.late(), Keeper(), operation_id="job_1/1", commit=commit)
        [row] = await rows(gw, "job_1/1")
        assert row["cost_micro_usd"] == COST
        assert await spent(gw) == (COST, 0)


async def test_a_run_that_was_cancelled_has_its_row_and_its_cost(services):
    """What came until then was paid for."""
    stream = Stream(*chat_events(finish=None, done=False, usage=False), end="hang")
    async with gateway(services, stream) as gw:
        jobs, commit, answer, tasks = await taken(gw, stream=True, max_tokens=9), Commit(gw), Keeper(), Tasks()
        run = jobs.services.run(jobs.late(), answer, operation_id="job_1/1", commit=commit)
        running = tasks.spawn(run, "run")
        await asyncio.wait_for(answer.began.wait(), PATIENT)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        [row] = commit.seen
        assert row["outcome"] == Outcome.CLIENT_DISCONNECT
        assert row["cost_micro_usd"] > 0
        assert await spent(gw) == (row["cost_micro_usd"], 0)


async def test_a_row_is_stored_once_however_often_it_is_written(services):
    """By the job's transaction, by its repetition, and by the ledger; a correction too."""
    async with gateway(services) as gw:
        jobs, commit = await taken(gw), Commit(gw)
        failing = Stream(*chat_events(finish=None, done=False, usage=False, id="gen-7"), end="cut")
        gw.upstream.script(failing)
        exchange = await jobs.services.run(jobs.late(), Keeper(), operation_id="job_1/1", commit=commit)
        ledger, database = gw.snapshot.services.ledger, gw.snapshot.services.database
        truth = Usage(10, 5, source=Source.UPSTREAM), Cost(2 * COST * 10**6, Source.UPSTREAM)
        correction = correction_row(Correction(f"{exchange.id}/1", exchange.id, *truth))
        for _ in range(2):
            async with database.transaction() as statements:
                await jobs.services.rows.write(statements, commit.row)
                await jobs.services.rows.write(statements, correction)
        ledger.settle(exchange.id, (), commit.row)
        ledger.settle(f"{exchange.id}/1", (), correction)
        [row] = await rows(gw, "job_1/1")
        assert (row["cost_micro_usd"], row["cost_source"], row["output_tokens"]) == (2 * COST, "upstream", 5)


async def test_what_is_written_is_gone_if_the_transaction_is(services):
    """Both or neither."""
    async with gateway(services) as gw:
        jobs, commit = await taken(gw), Commit(gw)
        await jobs.services.run(jobs.late(), Keeper(), operation_id="job_1/1", commit=commit)
        database = gw.snapshot.services.database
        await database.execute("DELETE FROM usage_requests")
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as statements:
                await jobs.services.rows.write(statements, commit.row)
                raise ZeroDivisionError
        assert await rows(gw, "job_1/1") == []


async def test_a_worker_that_dies_after_its_commit_is_made_good_by_another(services, monkeypatch):
    """What it held is settled by whoever finds the settlement with the result, and twice is once."""
    async with gateway(services) as gw:
        jobs, commit = await taken(gw), Commit(gw)
        ledger = gw.snapshot.services.ledger
        with monkeypatch.context() as dead:
            dead.setattr(ledger, "settle", lambda *_, **__: None)
            await jobs.services.run(jobs.late(), Keeper(), operation_id="job_1/1", commit=commit)
        cost, reserved = await spent(gw)
        assert (cost, reserved > 0) == (0, True)
        for _ in range(2):
            jobs.services.settle_late(json.loads(commit.settlement))
            assert await spent(gw) == (COST, 0)
        [row] = await rows(gw, "job_1/1")
        assert row["outcome"] == "ok"


async def test_without_a_plugin_that_keeps_rows_a_commit_has_none():
    """The plugin usage is left out: `rows.write` writes nothing, and needs no table."""
    async with Gateway.test(plugins=[Jobs]) as gw:
        jobs = await taken(gw)
        seen = []

        async def commit(exchange, row):
            seen.append(row)
            await jobs.services.rows.write(None, b"a row of another day")

        await jobs.services.run(jobs.late(), Keeper(), commit=commit)
        assert seen == [b""]


async def test_after_a_reload_the_new_instance_writes_the_rows(services):
    """The old one's end takes nothing away."""
    async with gateway(services) as gw:
        jobs = await taken(gw)
        kept = jobs.late()
        changed = {"use": "usage", "config": {"keep": "10d"}}
        settings = {"services": services, "catalogue": {"overrides": {"test/model": PRICES[MODEL]}}}
        await gw.reload(plugins=[Jobs, BUDGET, changed], settings=settings)
        commit = Commit(gw)
        await gw.plugin("Jobs").services.run(kept, Keeper(), operation_id="job_1/1", commit=commit)
        assert len(commit.seen) == 1
