"""What a job cost is told to the ledger, whoever dies before the ledger has it."""

import asyncio

import pytest

from gateway import StoreUnavailable
from gateway.kit.upstream import MODEL, Error, Json, ScriptedUpstream, chat_completion
from gateway_plugins.jobs import tidying
from tests.jobs.gateways import gateway, jobs, rows, spawn, taken, work
from tests.jobs.test_batches_api import create, line

PAID = 1000  # micro-USD
BUDGET = {"use": "budgets", "config": {"budgets": [{"name": "all", "by": [], "usd": 1, "per": "total"}]}}


async def away(_):
    raise StoreUnavailable


async def money(ledger):
    """(spent, reserved) of the budget."""
    await ledger.flush()
    [key] = [k async for k in ledger._store.client.scan_iter("{xenios}:ledger:budgets:*")]
    return (await ledger.budgets([key.decode().removeprefix("{xenios}:ledger:")]))[0]


@pytest.mark.promise("P4.killed")
async def test_a_settlement_is_kept_until_the_ledger_has_it(url, monkeypatch):
    """Redis is away when a job ends, and its worker is killed before it is back: the settlement is still with the
    result, and another worker makes it good: spent is the sum of the rows, and nothing stays reserved.
    """
    monkeypatch.setattr(tidying, "UNSETTLED_SECONDS", -1.0)
    upstream = ScriptedUpstream(default=Json(chat_completion(cost=PAID / 1e6)))
    async with gateway(url, BUDGET, upstream=upstream) as gw:
        ledger = gw.snapshot.services.ledger
        job_id = await taken(gw, max_tokens=50)
        await ledger.flush()
        with monkeypatch.context() as outage:
            outage.setattr(ledger, "_settle", away)
            assert await work(gw, job_id) is None
            for _ in range(2):  # looking after it during the outage changes nothing
                job = await jobs(gw).store.get(job_id)
                assert (job.status, bool(job.settlement)) == ("succeeded", True)
                with pytest.raises(StoreUnavailable):
                    await jobs(gw).tidy()
            ledger._pending.clear()  # as with its process
        spent, reserved = await money(ledger)
        assert (spent, reserved > 0) == (0, True)
        await jobs(gw).tidy()
        assert await money(ledger) == (PAID, 0)
        assert (await jobs(gw).store.get(job_id)).settlement is None
        assert sum(row["cost_micro_usd"] or 0 for row in await rows(gw, 1)) == PAID


async def test_a_batchs_line_that_is_tried_again_is_settled_too(url, monkeypatch):
    """A worker is killed right after a line's failed try was committed, before the ledger had it: the next worker makes
    good what that try cost. Spent is the sum of the rows, and nothing stays reserved.
    """
    upstream = ScriptedUpstream(Error(500), default=Json(chat_completion(cost=PAID / 1e6)))
    async with gateway(url, BUDGET, upstream=upstream, batches={"backoff": "1h"}) as gw:
        ledger, part = gw.snapshot.services.ledger, gw.plugin("jobs").parts[-1]
        batch = await create(gw, line("a", model=MODEL, max_tokens=50))
        await part.handlers["batch"](batch["id"])
        with monkeypatch.context() as outage:
            outage.setattr(ledger, "_settle", away)
            task = spawn(part.handlers["chunk"](f"{batch['id']}-0"))
            await rows(gw, 1)
            task.cancel()
            await asyncio.wait([task])
            ledger._pending.clear()  # as with its process
        spent, reserved = await money(ledger)
        assert (spent, reserved > 0) == (0, True)
        await part.handlers["chunk"](f"{batch['id']}-0")
        assert await money(ledger) == (PAID, 0)
        assert sum(row["cost_micro_usd"] or 0 for row in await rows(gw, 2)) == PAID
        await part.handlers["batch"](f"{batch['id']}-finish")
        assert await gw.snapshot.services.database.fetch("SELECT * FROM jobs_owed") == []
