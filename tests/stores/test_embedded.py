"""The Valkey that a gateway starts for itself."""

import asyncio
import os
import signal

import redis.asyncio

from gateway.stores import embedded


async def test_one_that_can_not_be_started_is_tried_again(tmp_path, monkeypatch):
    """A host that has no memory or no process left for a moment does not cost the gateway its limits for ever."""
    tried = asyncio.Event()

    def nowhere():
        tried.set()
        return tmp_path / "nowhere"

    async with embedded.valkey(tmp_path) as url:
        async with redis.asyncio.from_url(url) as client:
            pid = (await client.info())["process_id"]
        with monkeypatch.context() as patched:
            patched.setattr(embedded, "binary", nowhere)
            os.kill(pid, signal.SIGKILL)
            await tried.wait()
        async with asyncio.timeout(10):
            while not await embedded.answers(url):
                await asyncio.sleep(0.05)
