"""A million keys that nobody made, each well-formed: what they cost is bounded, and others notice nothing."""

import asyncio
import os

import pytest

from gateway.kit import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import MODEL
from tests.full.load import resident

FIRST, ALL, AT_ONCE = 100_000, 1_000_000, 4_000  # the store takes 5,000 at once

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


async def chat(gw, key):
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    return (await gw.post("/v1/chat/completions", body, headers=headers)).status


async def test_a_million_invented_keys(tmp_path):
    """Each is refused; memory stays flat, the database is asked one question at a time, about 500 keys each, and a key
    that exists is accepted throughout.
    """
    plugin = {"use": "api_keys", "config": {"database": True}}
    database = {"url": f"sqlite:///{tmp_path}/keys.sqlite", "migrate_on_start": True}
    async with Gateway.test(plugins=[plugin], settings={"services": {"database": database}}) as gw:
        good = (await gw.post("/admin/keys", {})).data["key"]
        store = gw.plugin("api_keys")._store
        questions = under_way = most = 0
        load = store._load

        async def counted(digests):
            nonlocal questions, under_way, most
            questions, under_way = questions + 1, under_way + 1
            most = max(most, under_way)
            try:
                await load(digests)
            finally:
                under_way -= 1

        store._load = counted
        early = 0
        for done in range(AT_ONCE, ALL + 1, AT_ONCE):
            found = await asyncio.gather(*(store.find(hash_key(new_key(), PEPPER)) for _ in range(AT_ONCE)))
            assert set(found) == {None}
            assert [await chat(gw, key) for key in (good, new_key())] == [200, 401]
            if done == FIRST:
                early = resident(os.getpid())
        late = resident(os.getpid())
        assert late < early * 1.1, (early, late)
        assert most <= 2  # invented keys one at a time, beside what refreshes the keys in use
        assert questions < 2 * ALL / 500
        assert len(store._known) + len(store._unknown) + len(store._waiting) <= 10_001
        assert await chat(gw, good) == 200
