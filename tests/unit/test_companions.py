"""Processes beside a gateway, kept by its parent: real ones, which do nothing."""

import asyncio
import gc
import weakref

import pytest

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


async def until(what):
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("idle")
async def test_one_that_was_switched_off_is_forgotten(tmp_path):
    """A gateway whose configuration switches companions on and off for months keeps nothing of those that have ended."""

    def configured(plugins):
        text = f"{{upstreams: {{openrouter: {{api_key: x}}}}, plugins: {plugins}}}"
        return load_text(text, "x.yaml", env={}, base=tmp_path, files={})

    kept = companions.Companions()
    kept.follow(configured("[{use: ./mine.py:Plugin}]"))
    await until(lambda: kept._kept)
    [one] = map(weakref.ref, kept._kept.values())
    kept.follow(configured("[]"))
    await until(lambda: not kept._kept)
    await until(lambda: gc.collect() >= 0 and one() is None)
    await kept.ended()
