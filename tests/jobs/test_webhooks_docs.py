"""What the README says of webhooks."""

import asyncio
import os
import re
import sys
from pathlib import Path

import aiohttp
import pytest

import gateway_plugins.jobs
from gateway.kit.testing import Gateway
from tests.jobs.receivers import LOCAL, Hooked
from tests.tools import free_port

README = (Path(gateway_plugins.jobs.__file__).parent / "README.md").read_text().partition("## Webhooks")[2]
RECEIVERS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", RECEIVERS, ids=["openai", "standardwebhooks"])
async def test_a_receiver_as_pasted_verifies_messages(code, tmp_path):
    """The README's receivers take what we signed, and nothing else."""
    port = free_port()
    (tmp_path / "receiver.py").write_text(code.replace("port=9000", f"port={port}, host='127.0.0.1'"))
    url = f"http://127.0.0.1:{port}/hook"
    async with Gateway.test(plugins=["api_keys", (Hooked, LOCAL)]) as gw:
        secret = (await gw.get("/v1/webhook_secret")).data["signing_secret"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "receiver.py", cwd=tmp_path, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "WEBHOOK_SECRET": secret, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            async with asyncio.timeout(30):
                while b"Running on" not in await process.stdout.readline():
                    pass
            async with aiohttp.ClientSession() as session, session.post(url, data=b"{}") as reply:
                assert reply.status == 400
            plugin = gw.plugin("Hooked")
            sent = [*await plugin.send("batch.completed", target=url, thing="batch_7")]
            sent += await plugin.send("job.failed", target=url, thing="job_7")
            assert await plugin.work() == []
            assert [(await plugin.row(key))["last_status"] for key in sent] == [204, 204]
            async with asyncio.timeout(10):
                said = [line for line in [await process.stdout.readline() for _ in range(3)] if b"_7" in line]
        finally:
            process.kill()
            await process.wait()
            process._transport.close()
    assert said == [b"batch.completed batch_7\n", b"job.failed job_7\n"]


def test_the_defaults_are_those_of_the_settings():
    """Times and ports in the text are what holds without a setting."""
    from gateway import format_duration
    from gateway_plugins.jobs.settings import EVENTS, Webhooks

    config, text = Webhooks(), " ".join(README.split())
    for name in ("timeout", "rotation", "keep"):
        assert f"`{name}` ({format_duration(getattr(config, name)).replace('1d', '24h')})" in text
    assert ", ".join(str(port) for port in config.ports[:-1]) + f" and {config.ports[-1]} (`ports`)" in text
    waits = [format_duration(wait).replace("1d", "24h") for wait in config.retries]
    assert ", ".join(waits[:-1]) + f" and {waits[-1]} (`retries`)" in text
    assert all(f"`{event}`" in text for event in EVENTS)
