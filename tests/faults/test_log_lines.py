"""Hostile requests at the real process: each leaves one intact JSON line in the access log, and in the log of failures."""

import json

from gateway.kit.upstream import ScriptedUpstream
from tests.faults.process import config, started
from tests.faults.raw import connect, request

# Says and fails with whatever the client sent, in every way in which a plugin, its libraries and threads can.
LOUD = """
import asyncio, logging, threading, warnings
from gateway import hookimpl

class Plugin:
    def __init__(self, config, services):
        self.log, self.services = services.log, services
    @hookimpl
    async def check_request(self, exchange):
        text = exchange.asked_model + (exchange.request.header("x-odd") or "") + str(exchange.body)
        self.log.info(text, text=text, body=exchange.body)
        logging.getLogger("some.library").error("it was %s", text)
        thread = threading.Thread(target=self.fail, args=(text,))
        thread.start()
        thread.join()
        self.services.spawn(self.background(text), "background")
        await asyncio.sleep(0)
    async def background(self, text):
        self.log.warning("in the background")
        raise LookupError(text)
    def fail(self, text):
        raise ValueError(text)
    @hookimpl
    def response_started(self, exchange):
        raise RuntimeError(exchange.asked_model + str(exchange.body))
    @hookimpl
    async def request_finished(self, exchange):
        self.log.info("finished")
"""
LONG = "prompt " * 1_500_000
REQUESTS = {
    "ten-megabytes": ({"model": "m", "messages": [{"role": "user", "content": LONG}]}, ()),
    "bytes-in-a-header": ({"model": "m", "messages": []}, (b"X-Odd: \xff\xfe\x9b2J", b"User-Agent: \xff")),
    "newline-in-a-name": ({"model": 'm\n{"level": "error"}\r\n\x1b[2J\u2028\x85', "messages": []}, ()),
    "surrogates": ({"model": "m", "messages": [], "user": "\ud800"}, ()),
    "a-long-name": ({"model": "x" * 400, "messages": []}, ()),
}
EVENTS = ["some.library", "plugin_failed", "thread_failed", "in the background", "task_failed", "finished"]


async def test_whatever_is_sent_is_one_line(tmp_path):
    """10 MB of a prompt, bytes that are no text, a newline in a model's name: one intact JSON line in the access log,
    and one for each thing that a plugin, a library or a thread said or failed with, with the request's id.
    """
    (tmp_path / "loud.py").write_text(LOUD)
    async with ScriptedUpstream() as upstream:
        plugins = [{"use": "access_log"}, {"use": "api_keys"}, {"use": "./loud.py:Plugin", "id": "loud"}]
        file = config(tmp_path, upstream, log={"format": "json", "level": "info"}, plugins=plugins)
        async with started(file) as process:
            begun = len(process.err)
            for name, (body, lines) in REQUESTS.items():
                async with connect(process.port) as raw:
                    data = json.dumps(body).encode()
                    await raw.send(request(None, data, *lines, f"X-Request-Id: {name}", key=process.key))
                    reply = await raw.reply(seconds=20)
                assert reply.status == (400 if name == "surrogates" else 200), name
            process.signal()
            assert await process.exit_code() == 0
    accesses = [json.loads(line) for line in process.out.decode().split("\n") if line]
    assert [line["request_id"] for line in accesses] == list(REQUESTS)
    text = process.err[begun:].decode()
    assert text.replace("\n", "").isprintable()
    assert text.splitlines() == text.split("\n")[:-1]
    said = [json.loads(line) for line in text.splitlines()]
    assert max(map(len, text.splitlines())) < 100_000
    for name in REQUESTS:
        of_it = [line for line in said if line.get("request_id") == name]
        seen = [line.get("logger") or line["event"] for line in of_it]
        if name != "surrogates":  # refused before the hook
            assert len(of_it) == len(EVENTS)  # and what the plugin said, with the text as its event
            assert {event for event in EVENTS if event != "thread_failed"} < set(seen), name
    assert sum(line["event"] == "thread_failed" for line in said) == len(REQUESTS) - 1
