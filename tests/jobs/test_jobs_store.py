"""Rows of jobs from one state into the next, on SQLite and PostgreSQL."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest

from gateway import StatementError
from gateway.settings import load_text
from gateway.stores import open_database
from gateway_plugins.jobs import Plugin, api
from gateway_plugins.jobs import store as jobs
from gateway_plugins.jobs.store import End, Job, Lost, Result, Store, TooManyWaiting
from tests.stores.postgres import postgres_server

HOUR = 3600.0
KEYLESS = {"upstreams": {"openrouter": {"without_key": "simulate"}}}


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL for the tests of this file."""
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request, tmp_path):
    """Of a new database."""
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    if request.param == "postgresql":
        url = await request.getfixturevalue("postgres").new()
    services = {"services": {"database": {"url": url, "migrate_on_start": True}}, **KEYLESS}
    settings = load_text(json.dumps(services), file="<test>", env={}, base=tmp_path).settings
    async with open_database(settings, None, [Plugin.schema], needed=True) as database:
        yield Store(SimpleNamespace(database=database))


def job(tenant="app", **fields):
    known = {
        "id": jobs.new_id(), "kind": "job", "tenant": tenant, "principal": "key:app", "endpoint": "chat/completions",
        "queue": "default", "priority": "normal", "status": "queued", "stream": 0, "created_at": api.now(),
        "attempts": 0, "max_attempts": 3,
    }  # fmt: skip
    return Job(**{**known, **fields})


async def added(store, most_waiting=100, **fields):
    made = job(**fields)
    await store.add(made, b'{"request": 1}', most_waiting=most_waiting)
    return made


async def begun(store, **fields):
    made = await added(store, **fields)
    return await store.begin(made, f"{made.id}-1")


async def end(store, known, how, ttl=HOUR):
    async with store._database.transaction() as statements:
        return await store.end(statements, known, how, ttl=ttl)


OK = Result(200, {"content-type": "application/json"}, b'{"id": 1}')


async def test_a_job_is_what_it_was_made(store):
    """What is stored of a job is read as it was written; its request beside it; of another tenant it is not there."""
    made = await added(store, task="summary", metadata='{"a": "b"}', webhook="https://x.y", run_after=5)
    assert await store.get(made.id) == await store.get(made.id, "app") == made
    assert await store.get(made.id, "another") is None
    assert await Store(store._services, "response").get(made.id) is None
    assert await store.request(made.id) == b'{"request": 1}'
    assert await store.result(made.id) is None


async def test_a_run_ends_once(store):
    """A run's end stores result, cost and the time after which it may be forgotten; a second end of it changes nothing."""
    running = await begun(store)
    assert (running.status, running.attempts, running.operation) == ("running", 1, f"{running.id}-1")
    ended = await end(store, running, End(status="succeeded", result=OK, micro_usd=7, settlement="[1]"))
    assert (ended.status, ended.cost_micro_usd, ended.settlement) == ("succeeded", 7, "[1]")
    assert ended.expires_at == ended.finished_at + HOUR * 1000
    assert await store.result(running.id) == OK
    with pytest.raises(Lost):
        await end(store, running, End(status="failed", code="late"))
    with pytest.raises(Lost):
        await store.begin(ended, "another")
    assert await store.get(running.id) == ended


async def test_who_was_given_up_can_not_end_the_run_of_another(store):
    """Of two that run the same job the later one has it: what the earlier one got is not stored."""
    first = await begun(store)
    second = await store.begin(first, f"{first.id}-2")
    with pytest.raises(Lost):
        await end(store, first, End(status="succeeded", result=OK))
    assert (await end(store, second, End(status="failed", code="x"))).status == "failed"


async def test_only_one_begins(store):
    """Two that take the same job at the same time: one of them gets it."""
    made = await added(store)

    async def take(name):
        with contextlib.suppress(Lost):
            return await store.begin(made, name)

    taken = await asyncio.gather(take("a"), take("b"))
    assert sorted(found is None for found in taken) == [False, True]


async def test_a_retry_waits_and_adds_up(store):
    """A run that is to be repeated is due later, keeps what it cost, and counts as an attempt unless it is not to."""
    first = await begun(store)
    again = await end(store, first, End(status="queued", after=60, micro_usd=5, code="upstream_error"))
    assert (again.status, again.max_attempts, again.error_code, again.finished_at) == (
        "queued",
        3,
        "upstream_error",
        None,
    )
    assert 59_000 < again.run_after - api.now() <= 60_000
    second = await store.begin(again, "2")
    uncounted = await end(store, second, End(status="queued", counts=False))
    assert (uncounted.attempts, uncounted.max_attempts, uncounted.cost_micro_usd) == (2, 4, 5)
    third = await store.begin(uncounted, "3")
    assert (await end(store, third, End(status="succeeded", result=OK, micro_usd=6))).cost_micro_usd == 11


async def test_an_idempotency_key_is_a_tenants(store):
    """The same key twice is a conflict within a tenant, and none for another."""
    made = await added(store, idempotency_key="once")
    with pytest.raises(StatementError) as refused:
        await added(store, idempotency_key="once")
    assert refused.value.conflict
    await added(store, tenant="another", idempotency_key="once")
    assert await store.by_key("app", "once") == made


async def test_a_tenant_may_not_fill_the_queue(store):
    """So many jobs of a tenant may wait; those that run, and another tenant's, don't count."""
    await begun(store)
    await added(store, most_waiting=2)
    await added(store, most_waiting=2)
    with pytest.raises(TooManyWaiting):
        await added(store, most_waiting=2)
    await added(store, tenant="another", most_waiting=2)


async def test_a_list_goes_page_by_page(store):
    """Newest first, each job on one page, filtered, within a tenant or over all."""
    made = [await added(store, created_at=1000 + n // 2, queue="q" if n % 2 else "default") for n in range(7)]
    await added(store, tenant="another", created_at=5)
    seen, after, more = [], None, True
    while more:
        page, more = await store.listed("app", {}, 3, after)
        seen += page
        after = page[-1].id
    assert seen == sorted(made, key=lambda j: (j.created_at, j.id), reverse=True)
    assert len((await store.listed(None, {}, 100))[0]) == 8
    assert {j.queue for j in (await store.listed("app", {"queue": "q", "status": "queued"}, 100))[0]} == {"q"}
    with pytest.raises(KeyError):
        await store.listed("app", {}, 3, "job_unknown")


async def test_what_waits_is_closed_only_as_it_was_read(store):
    """A job that a worker takes at the same time is not closed as waiting."""
    made = await added(store)
    taken = await store.begin(made, "1")
    async with store._database.transaction() as statements:
        assert await store.close(statements, made, End(status="cancelled"), ttl=HOUR) is None
        closed = await store.close(statements, taken, End(status="cancelled"), ttl=HOUR)
    assert (closed.status, closed.operation) == ("cancelled", "1")  # whose cost may not be settled yet


async def test_what_failed_can_be_tried_again(store):
    """A failed job waits again with new attempts and without its error; one that succeeded does not."""
    failed = await end(store, await begun(store), End(status="failed", code="x", result=OK))
    assert await store.retry(failed.id, attempts=3, run_within=60)
    again = await store.get(failed.id)
    assert (again.status, again.max_attempts, again.error_code, again.expires_at) == ("queued", 4, None, None)
    assert await store.result(failed.id) is None
    done = await end(store, await begun(store), End(status="succeeded", result=OK))
    assert not await store.retry(done.id, attempts=3, run_within=60)


async def test_what_is_over_is_forgotten_in_time(store):
    """A job goes when its time is over, not before, and not before the ledger has what it cost."""
    kept = await end(store, await begun(store), End(status="succeeded", result=OK))
    gone = await end(store, await begun(store), End(status="succeeded", result=OK), ttl=-1)
    owed = await end(store, await begun(store), End(status="succeeded", settlement="[1]"), ttl=-1)
    assert await store.prune() == 1
    assert await store.get(gone.id) is None
    assert await store.get(kept.id)
    await store.settled(owed.id, owed.operation)
    assert await store.prune() == 1


async def test_a_running_job_is_not_deleted(store):
    """Only what does not run can be deleted."""
    running = await begun(store)
    assert not await store.delete(running.id)
    await end(store, running, End(status="failed"))
    assert await store.delete(running.id)


async def test_what_needs_looking_after_is_found(store):
    """Due and not running; running, and nobody says so; ended, and not settled; cancelled, and still running."""
    due = await added(store, created_at=api.now() - 60_000)
    await added(store, run_after=api.now() + 60_000)
    running = await begun(store)
    owed = await end(store, await begun(store), End(status="succeeded", settlement="[1]"))
    assert await store.waiting(older=30) == [due]
    assert await store.forsaken(older=30) == []
    assert await store.forsaken(older=-1) == [running]
    assert await store.unsettled(older=-1) == [owed]
    assert await store.stopping(older=-1) == []
    await store.ask_cancel(running.id)
    await store.ask_cancel(due.id)
    assert {found.id for found in await store.stopping(older=-1)} == {running.id, due.id}


async def test_who_runs_says_so(store):
    """A sign of life counts for the run that gives it, and for no other."""
    running = await begun(store)
    await store._database.execute("UPDATE jobs_jobs SET seen_at = 1")
    await store.seen({running.id: "another run"})
    assert (await store.get(running.id)).seen_at == 1
    await store.seen({running.id: running.operation})
    assert (await store.get(running.id)).seen_at > 1
