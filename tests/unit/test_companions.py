"""Processes beside a gateway, kept by its parent: real ones, which do nothing."""

import asyncio
import gc
import weakref

import pytest
from structlog.testing import capture_logs

from gateway import companions
from gateway.settings import load_text

PLUGIN = """
class Plugin:
    companion = staticmethod(lambda config: ["works"])

    def __init__(self, config, services): ...
"""


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """What is started instead of Python: it reads until its input ends, or until TERM."""
    script = tmp_path / "idle"
    script.write_text("#!/bin/sh\nexec cat > /dev/null\n")
    script.chmod(0o755)
    (tmp_path / "mine.py").write_text(PLUGIN)
    monkeypatch.setattr(companions.sys, "executable", str(script))
    return script


async def until(what):
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.005)


def configured(folder, plugins):
    text = f"{{upstreams: {{openrouter: {{api_key: x}}}}, plugins: {plugins}}}"
    return load_text(text, "x.yaml", env={}, base=folder, files={})


async def test_one_that_can_not_be_started_is_tried_again(idle, tmp_path, monkeypatch):
    """A host that has no memory or no process left for a moment does not cost the gateway its jobs for ever."""
    monkeypatch.setattr("gateway.processes.WAITS", (0.01,))
    idle.rename(aside := idle.with_name("aside"))
    kept = companions.Companions()
    with capture_logs() as logs:
        kept.follow(configured(tmp_path, "[{use: ./mine.py:Plugin}]"))
        await until(lambda: sum(line["event"] == "companion_not_started" for line in logs) >= 2)
    [one] = kept._kept.values()
    aside.rename(idle)
    await until(lambda: one._process is not None and one._process.returncode is None)
    kept.stop()
    await kept.ended()


@pytest.mark.usefixtures("idle")
async def test_one_that_was_switched_off_is_forgotten(tmp_path):
    """A gateway whose configuration switches companions on and off for months keeps nothing of those that have ended."""
    kept = companions.Companions()
    kept.follow(configured(tmp_path, "[{use: ./mine.py:Plugin}]"))
    await until(lambda: kept._kept)
    [one] = map(weakref.ref, kept._kept.values())
    kept.follow(configured(tmp_path, "[]"))
    await until(lambda: not kept._kept)
    await until(lambda: gc.collect() >= 0 and one() is None)
    await kept.ended()
