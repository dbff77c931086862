"""The real process: how it ends, and how it refuses to begin."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from gateway.kit.upstream import (
    Hang,
    ScriptedUpstream,
    Stream,
    Until,
    chat_events,
    completion_events,
    message_events,
    response_events,
)
from tests.faults.process import Process, config, started
from tests.faults.raw import CHAT, connect, exchange, head, request

if TYPE_CHECKING:
    from pathlib import Path

DIALECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "/v1/chat/completions": (CHAT, chat_events),
    "/v1/completions": ({"model": "test/model", "prompt": "Hello"}, completion_events),
    "/v1/responses": ({"model": "test/model", "input": "Hello"}, response_events),
    "/v1/messages": ({**CHAT, "max_tokens": 10}, message_events),
}


async def refused(process: Process) -> None:
    """Waits until the port takes no connection any more."""
    async with asyncio.timeout(5):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", process.port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # nobody had accepted it when the port was closed
                continue
            writer.close()
            await asyncio.sleep(0.02)


async def test_streams_end_in_peace(tmp_path):
    """TERM: not ready at once, still accepting for `drain_delay`, then closed; what runs ends well; exit code 0."""
    gate, late = asyncio.Event(), asyncio.Event()
    steps = chat_events("Hello", pieces=1)
    waits = [Stream(*steps[:3], Until(e), *steps[3:]) for e in (gate, late)]
    async with ScriptedUpstream(*waits) as upstream:
        file = config(tmp_path, upstream, server={"drain_delay": 1.0, "drain_timeout": 10})
        async with started(file) as process, connect(process.port) as raw, connect(process.port) as idle:
            ask = request(None, {**CHAT, "stream": True}, key=process.key)
            await idle.send(head(None, method="GET", path="/health/ready"))
            assert (await idle.reply()).status == 200
            await raw.send(ask)
            await raw.reader.readuntil(b"data: ")

            begun = time.monotonic()
            process.signal()
            ready = 200
            while ready == 200:
                ready = (await exchange(process.port, head(None, method="GET", path="/health/ready"))).status
            assert ready == 503
            assert (await exchange(process.port, head(None, method="GET", path="/health"))).status == 200
            async with connect(process.port) as second:
                await second.send(ask)
                await second.reader.readuntil(b"data: ")
                assert time.monotonic() - begun < 1.0

                await refused(process)
                assert time.monotonic() - begun >= 0.9
                assert await idle.ended(seconds=2)
                assert process.process.returncode is None
                gate.set()
                assert (await raw.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
                late.set()
                assert (await second.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert await process.exit_code() == 0
    assert b"Traceback" not in process.err


async def test_streams_that_outlast_the_drain_are_told(tmp_path):
    """After `drain_timeout` each stream gets its dialect's error event, a whole call 503, and the process ends with 0."""
    answers = [Stream(*events("Hello", pieces=1)[:-1][:6], end="hang") for _, events in DIALECTS.values()]
    async with ScriptedUpstream(*answers, Hang(), Hang()) as upstream:
        file = config(tmp_path, upstream, server={"drain_timeout": 0.5})
        async with started(file) as process:
            got: dict[str, bytes] = {}

            async def stream(path: str) -> None:
                async with connect(process.port) as raw:
                    await raw.send(request(None, {**DIALECTS[path][0], "stream": True}, path=path, key=process.key))
                    got[path] = await raw.rest(seconds=10)

            async def whole() -> Any:
                async with connect(process.port) as raw:
                    await raw.send(request(None, key=process.key))
                    return await raw.reply(seconds=10)

            async with asyncio.TaskGroup() as group:
                for number, path in enumerate(DIALECTS, 1):
                    group.create_task(stream(path))
                    await upstream.wait_seen(number, 15)
                calls = [group.create_task(whole()) for _ in range(2)]
                await upstream.wait_seen(6, 15)
                process.signal()
            assert await process.exit_code() == 0
            for path, data in got.items():
                assert data.endswith(b"\r\n0\r\n\r\n"), path
                assert b"[DONE]" not in data
                assert b"message_stop" not in data
                assert b"shutting down" in data
            for path in ("/v1/chat/completions", "/v1/completions"):
                last = got[path].rpartition(b"data: ")[2].partition(b"\n")[0]
                assert json.loads(last)["error"]["code"] == "shutting_down"
            for path in ("/v1/responses", "/v1/messages"):
                assert b"event: error\ndata: " in got[path]
            for call in calls:
                reply = call.result()
                assert (reply.status, reply.data["error"]["code"]) == (503, "shutting_down")
    assert b"drain_cut_requests" in process.err
    assert b"Traceback" not in process.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(tmp_path, number):
    """Who asks twice does not wait for the streams."""
    async with ScriptedUpstream(Hang()) as upstream:
        file = config(tmp_path, upstream, server={"drain_timeout": 60})
        async with started(file) as process, connect(process.port) as raw:
            await raw.send(request(None, key=process.key))
            await upstream.wait_seen(1, 15)
            process.signal(number)
            await refused(process)
            begun = time.monotonic()
            process.signal(number)
            assert await process.exit_code() == 1
            assert time.monotonic() - begun < 1


PLUGIN = """
import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from gateway import hookimpl

class Plugin:
    def __init__(self, config, services):
        self.log = Path("order.txt").open("a", buffering=1)
    @asynccontextmanager
    async def lifespan(self):
        yield
        self.log.write("closed\\n")
        self.log.close()
    @hookimpl
    async def request_finished(self, exchange):
        await asyncio.sleep(0.5)
        self.log.write("finished\\n")
"""


async def test_request_finished_is_awaited(tmp_path):
    """What plugins still write about a request is written before they are closed and the process ends."""
    (tmp_path / "slow.py").write_text(PLUGIN)
    async with ScriptedUpstream() as upstream:
        file = config(tmp_path, upstream, plugins=[{"use": "./slow.py:Plugin"}, {"use": "api_keys"}])
        async with started(file) as process:
            for _ in range(3):
                assert (await exchange(process.port, request(None, key=process.key))).status == 200
            process.signal()
            assert await process.exit_code() == 0
    assert (tmp_path / "order.txt").read_text().split() == ["finished"] * 3 + ["closed"]


async def test_an_idle_process_ends_at_once(tmp_path):
    """With nothing to wait for, and connections that say nothing, TERM ends it in no time."""
    async with started(config(tmp_path)) as process, connect(process.port) as idle:
        await idle.send(head(None, method="GET", path="/health"))
        assert (await idle.reply()).status == 200
        async with connect(process.port) as silent:
            begun = time.monotonic()
            process.signal()
            assert await idle.ended()
            assert await silent.ended()
            assert await process.exit_code() == 0
            assert time.monotonic() - begun < 2


# --- it does not start ------------------------------------------------------------------------------------------


async def failure(file: Path) -> tuple[int, str]:
    async with started(file, ready=False) as process:
        code = await process.exit_code(20)
    return code, process.err.decode()


async def test_a_port_in_use_is_said(tmp_path):
    """Exit code 1 and one line that names the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = await failure(config(tmp_path, server={"port": port}))
    assert code == 1
    assert f"127.0.0.1:{port}" in text
    assert "in use" in text.lower()
    assert "Traceback" not in text


async def test_a_data_directory_in_use_is_said(tmp_path):
    """Two processes never share one; the second says which and what to set. The first goes on."""
    file = config(tmp_path)
    async with started(file) as process:
        code, text = await failure(file)
        assert code == 1
        assert str(tmp_path / "data") in text
        assert "XENIOS_DATA_DIR" in text
        assert "Traceback" not in text
        assert (await exchange(process.port, head(None, method="GET", path="/health"))).status == 200


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("server:\n  port: 99999\n", ":2:"),
        ("server:\n  prot: 1\n", "prot"),
        ("plugins:\n  - use: nobody\n", "nobody"),
        ("server: [\n", "xenios.yaml"),
        ("upstreams:\n  openrouter:\n    api_key: ${NO_SUCH_VARIABLE}\n", "NO_SUCH_VARIABLE"),
    ],
    ids=["value", "unknown", "plugin", "syntax", "variable"],
)
async def test_a_bad_configuration_is_exit_code_2(tmp_path, text, says):
    """Every mistake is named with its place; nothing is started, no directory made."""
    file = tmp_path / "xenios.yaml"
    file.write_text(text)
    code, err = await failure(file)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / ".xenios").exists()


async def test_an_open_door_is_exit_code_2(tmp_path):
    """Nobody serves the world without a key by mistake."""
    code, err = await failure(config(tmp_path, server={"host": "0.0.0.0"}, plugins=[]))
    assert code == 2
    assert "allow_anonymous" in err


async def test_no_upstream_key_is_exit_code_2(tmp_path):
    """A missing upstream key is said at the start, not at the first request."""
    code, err = await failure(config(tmp_path, upstreams={"openrouter": {}}))
    assert code == 2
    assert "api_key" in err
