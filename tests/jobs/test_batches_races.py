"""Batches on a bad day: workers that wake up late, storages that were away, tenants that take more than their share."""

import asyncio

import pytest

from gateway import StoreUnavailable
from gateway_plugins.jobs.batches.checks import Checked
from gateway_plugins.jobs.parts import Again
from gateway_plugins.jobs.settings import Batches
from tests.jobs.gateways import spawn
from tests.jobs.test_batches_api import CHAT, batches, create, ended, inline, line, lines_of
from tests.jobs.test_files_api import upload


async def finishing(gw):
    """A batch whose lines have run, and the work that is to finish it."""
    queue = inline(gw)
    queue.held = []
    batch = await create(gw, *(line(f"id-{i}") for i in range(15)))
    await queue.handlers["batch"](batch["id"])
    for number in (0, 1):
        await queue.handlers["chunk"](f"{batch['id']}-{number}")
    return batch, f"{batch['id']}-finish"


async def test_a_worker_that_wakes_up_late_does_not_spoil_the_results():
    """One that stood still while it wrote them goes on after another has ended the batch: they stay whole."""
    async with batches() as gw:
        batch, work = await finishing(gw)
        storage, queue = gw.plugin("Inline").part("Files").storage, inline(gw)
        put, asleep, wakes = storage.put, asyncio.Event(), asyncio.Event()

        async def slow(key, pieces):
            if not asleep.is_set():
                asleep.set()
                await wakes.wait()
            await put(key, pieces)

        storage.put = slow
        late = spawn(queue.handlers["batch"](work))
        await asleep.wait()
        await queue.handlers["batch"](work)
        done = await ended(gw, batch)
        before = await lines_of(gw, done["output_file_id"])
        wakes.set()
        await late
        after = await lines_of(gw, done["output_file_id"])
        again = await ended(gw, batch)
    assert len(before) == 15
    assert after == before
    assert again == done


async def test_results_that_were_tidied_before_the_end_are_written_again():
    """The storage was away for so long that what a first try had left was too old: the batch keeps what it promises."""
    async with batches() as gw:
        batch, work = await finishing(gw)
        files, queue = gw.plugin("Inline").part("Files"), inline(gw)
        put, tries = files.storage.put, []

        async def broken(key, pieces):
            tries.append(key)
            if len(tries) == 1:
                raise StoreUnavailable
            await put(key, pieces)
            if len(tries) == 2:
                await files.tidy()

        files.storage.put = broken
        with pytest.raises(Again):
            await queue.handlers["batch"](work)
        await gw.snapshot.services.database.execute("UPDATE jobs_files SET expires_at = 1 WHERE bytes = 0")
        await queue.handlers["batch"](work)
        done = await ended(gw, batch)
        results = await lines_of(gw, done["output_file_id"])
    assert sorted(found["custom_id"] for found in results) == sorted(f"id-{i}" for i in range(15))


async def test_results_that_vanish_before_the_end_keep_the_batch_open():
    """A batch says where its results are only if they are there."""
    async with batches() as gw:
        batch, work = await finishing(gw)
        files, queue = gw.plugin("Inline").part("Files"), inline(gw)
        put, written = files.storage.put, []

        async def forgotten(key, pieces):
            await put(key, pieces)
            written.append(key)
            if len(written) == 1:
                await files.forget(key)

        files.storage.put = forgotten
        with pytest.raises(Again):
            await queue.handlers["batch"](work)
        await queue.handlers["batch"](work)
        done = await ended(gw, batch)
        results = await lines_of(gw, done["output_file_id"])
    assert len(results) == 15


async def test_deleted_files_that_batches_read_keep_no_other_from_being_tidied(monkeypatch):
    """However many there are of them."""
    monkeypatch.setattr("gateway_plugins.jobs.files.TIDIED_AT_ONCE", 2)
    async with batches() as gw:
        inline(gw).held = []
        for _ in range(3):
            batch = await create(gw, line("a"))
            await gw.request("DELETE", f"/v1/files/{batch['input_file_id']}")
        old = (await upload(gw)).data["id"]
        files = gw.plugin("Inline").part("Files")
        database = gw.snapshot.services.database
        await database.execute("UPDATE jobs_files SET expires_at = 2 WHERE id = $1", old)
        await database.execute("UPDATE jobs_files SET expires_at = 1 WHERE id <> $1", old)
        await files.tidy()
        left = await database.fetch("SELECT id FROM jobs_files WHERE id = $1", old)
    assert left == []


async def test_a_large_file_is_checked_while_others_have_their_turn():
    """Tens of thousands of lines do not hold up what else the worker does."""

    async def piece():
        yield b"\n".join(line(f"id-{i}").encode() for i in range(20_000))

    checked = Checked(CHAT, Batches(), lambda _: True)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = spawn(others())
    await checked.read(piece(), 1 << 20)
    beside.cancel()
    assert (checked.errors, len(checked.chunks)) == ([], 40)
    assert turns >= 10
