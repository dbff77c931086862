"""Canaries through every error path of the real process: keys, pepper and prompts turn up nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from gateway.kit.keys import new_key
from gateway.kit.upstream import (
    BadGzip,
    Body,
    Close,
    Cut,
    Error,
    Gzip,
    Hang,
    Json,
    Raw,
    Redirect,
    Reset,
    ScriptedUpstream,
    Stream,
    chat_completion,
    chat_events,
    message_error,
    message_events,
    response_events,
    response_failed,
)
from gateway.plugins import installed
from tests.faults.process import UPSTREAM_KEY, config, started, stored_rows
from tests.faults.raw import CHAT, connect, exchange, head, request
from tests.integration.collector import Collector
from tests.stores.postgres import postgres_server

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.kit.upstream import Answer
    from tests.faults.process import Process

PEPPER = "pepper-canary-81c2aa"
DATABASE_PASSWORD = "database-canary-6be1d4"
PROMPT = "prompt-canary-5a9e77"
ANSWER = "answer-canary-c3f02b"
FOREIGN = "foreign.token-canary-19ab44"
TOKEN = "collector-canary-2f90ab"
TYPO = "sk-xenios-typo-canary-77de01"
DIALECTS = {
    "/v1/chat/completions": {"model": "m/one", "messages": [{"role": "user", "content": PROMPT}]},
    "/v1/responses": {"model": "m/one", "input": PROMPT},
    "/v1/messages": {"model": "m/one", "max_tokens": 9, "messages": [{"role": "user", "content": PROMPT}]},
}

# Fails in the hook that `X-Leak` names, with whatever it can lay its hands on in message, cause, notes and locals.
LEAK = """
from gateway import hookimpl

def leak(exchange, hook):
    if exchange.request.header("x-leak") != hook:
        return
    # A plugin that keeps a token past `authenticate` gives away what no scanner knows by sight: not our case.
    held = exchange.credentials.token if exchange.credentials else TOKENS.get(exchange.id, "")
    if not held.startswith(("sk-", "eyJ")) and hook != "authenticate":
        return
    try:
        raise KeyError(held)
    except KeyError as cause:
        error = RuntimeError(f"{hook} failed with {held} for {exchange.snapshot.upstreams['openrouter'].secret}")
        error.add_note(f"header: Authorization: Bearer {held}")
        raise error from cause

TOKENS = {}

class Tap:
    def __init__(self, exchange):
        self.exchange = exchange
    def event(self, event):
        leak(self.exchange, "tap")
        return event
    def end(self, outcome):
        return ()

class Plugin:
    def __init__(self, config, services): ...
    @hookimpl
    async def authenticate(self, exchange):
        TOKENS[exchange.id] = exchange.credentials.token
        leak(exchange, "authenticate")
    @hookimpl
    async def prepare_request(self, exchange):
        leak(exchange, "prepare_request")
    @hookimpl
    async def check_request(self, exchange):
        leak(exchange, "check_request")
    @hookimpl
    async def around_upstream(self, exchange, attempt, call_next):
        leak(exchange, "around_upstream")
        return await call_next(attempt)
    @hookimpl
    def attempt_finished(self, exchange, attempt):
        leak(exchange, "attempt_finished")
    @hookimpl
    def open_tap(self, exchange):
        leak(exchange, "open_tap")
        return Tap(exchange)
    @hookimpl
    async def transform_response(self, exchange):
        leak(exchange, "transform_response")
    @hookimpl
    def response_started(self, exchange):
        leak(exchange, "response_started")
    @hookimpl
    async def request_finished(self, exchange):
        leak(exchange, "request_finished")
"""
HOOKS = re.findall(r'leak\((?:self\.)?exchange, "(\w+)"\)', LEAK)


def upstream_faults() -> list[Answer]:
    """Every way in which an upstream fails, echoing its key where it can, as OpenAI's 401 does."""
    said = f"Incorrect API key provided: {UPSTREAM_KEY}. You sent Authorization: Bearer {UPSTREAM_KEY}"
    begun = chat_events(ANSWER, finish=None, done=False, pieces=1)
    return [
        *(Error(status, message=said) for status in (400, 401, 402, 403, 404, 408, 413, 429, 500, 502, 503, 529)),
        Error(403, message=said, metadata={"reasons": [said], "flagged_input": PROMPT}),
        Error(400, {"error": said}),
        Error(400, {"detail": said}),
        Error(500, f"<html>{said}</html>"),
        Error(500, {"error": {"message": said, "code": said, "type": said, "param": said}}),
        Json({"error": {"message": said, "code": 500}}),
        Json({"error": {"message": said, "code": 429, "metadata": {"raw": said}}}),
        Body(f"<html>{said}</html>".encode(), "text/html"),
        Body(f'{{"half": "{UPSTREAM_KEY}'.encode(), "application/json"),
        Body(said.encode(), f"text/{UPSTREAM_KEY}"),
        Json(chat_completion(ANSWER), headers={"Content-Encoding": UPSTREAM_KEY}),
        BadGzip(),
        Gzip(Json({"error": {"message": said}})),
        Redirect(f"http://127.0.0.1:9/{UPSTREAM_KEY}"),
        Reset(),
        Close(),
        Cut(Json(chat_completion(ANSWER)), 20),
        Raw(f"HTTP/1.1 200 {UPSTREAM_KEY}\r\nBad Header {UPSTREAM_KEY}\r\n\r\n".encode()),
        Raw(f"{UPSTREAM_KEY}\r\n\r\n".encode()),
        Stream(*begun, end="cut"),
        Stream(*begun, end="reset"),
        Stream(*begun, end="clean"),
        Stream(*begun, {"error": {"message": said, "code": 500}, "choices": []}),
        Stream(*begun, f"not json {UPSTREAM_KEY}", end="cut"),
        Stream({"error": {"message": said, "code": 401}}),
        Stream(f"not json {UPSTREAM_KEY}"),
        Stream(*response_events(ANSWER, finish=None), response_failed(9, message=said)),
        Stream(*message_events(ANSWER, finish=None, done=False), message_error(529, said)),
        Stream(*begun, end="hang"),
        Hang(),
    ]


def leaking(**configs: Any) -> list[dict[str, Any]]:
    """All installed plugins; the leaking one stands before those that look at keys, and sees each, known or not."""
    first = ("access_log", "api_keys", "jwt_auth")
    names = (*first, *sorted(set(installed()) - set(first)))
    entries = [{"use": name, "config": configs.get(name, {})} for name in names]
    return [{"use": "./leak.py:Plugin", "id": "leak"}, *entries]


class Visit:
    """Requests of one run, and what came back."""

    def __init__(self, process: Process, upstream: ScriptedUpstream, key: str) -> None:
        self.process, self.upstream, self.key = process, upstream, key
        self.replies = b""
        self._some = asyncio.Semaphore(8)

    async def ask(self, data: bytes, **how: Any) -> int:
        async with connect(self.process.port) as raw:
            await raw.send(data)
            reply = await raw.reply(seconds=15, **how)
        self.replies += reply.head + reply.body
        return reply.status

    async def cut(self, data: bytes) -> None:
        """Where the connection may end badly."""
        data = data.replace(b"\r\nHost: gateway\r\n", b"\r\nHost: gateway\r\nConnection: close\r\n", 1)
        async with self._some, connect(self.process.port) as raw:
            await raw.send(data)
            self.replies += await raw.rest_within(8)

    async def refused(self, strange: tuple[str, ...]) -> None:
        """What never reaches an upstream."""
        for path, body in DIALECTS.items():
            for key in strange:
                assert await self.ask(request(None, body, path=path, key=key)) == 401
                assert await self.ask(request(None, body, f"x-api-key: {key}", path=path)) == 401
            assert await self.ask(request(None, body, path=path)) == 401
            for raw in (b'{"model": "' + PROMPT.encode(), b"\xff" + PROMPT.encode(), b"[]", b'{"messages": []}',
                        json.dumps({"model": {"a": PROMPT}, "messages": PROMPT, "input": PROMPT}).encode()):  # fmt: skip
                assert await self.ask(request(None, raw, path=path, key=self.key)) == 400
            long = head(None, "Content-Length: 999999999", path=path, key=self.key)
            assert await self.ask(long) == 413
            odd = request(None, body, f"Content-Type: text/{PROMPT}", path=path, key=self.key, json_type=False)
            assert await self.ask(odd) == 415
            assert await self.ask(head(None, method="GET", path=f"{path}?key={self.key}", key=self.key)) == 405
            assert (
                await self.ask(request(None, body, f"Authorization: Bearer {self.key}", path=path, key=self.key)) == 400
            )
            assert await self.ask(request(None, b"x", "Content-Encoding: gzip", path=path, key=self.key)) == 400
        assert await self.ask(request(None, path=f"/v1/nowhere?key={self.key}&q={PROMPT}", key=self.key)) == 404
        for line in (f"Authorization: Bearer {self.key}\x00", f"Authorization Bearer {self.key}", f"x-api-key: {self.key}\x01",
                     f"{self.key}", f"X-A: 1\r\n {self.key}", f"Transfer-Encoding: {self.key}"):  # fmt: skip
            await self.cut(request(None, None, line))
        await self.cut(f"{self.key} / HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await self.cut(head(None, "Content-Length: 1000", key=self.key) + PROMPT.encode())

    async def failed(self) -> None:
        """What fails at the upstream, in each dialect, streamed and whole."""
        asked = []
        for path, body in DIALECTS.items():
            for stream in (False, True):
                for number, fault in enumerate(upstream_faults()):
                    model = f"m/{len(asked)}-{number}"
                    self.upstream.on(model, fault)
                    fields = {**body, "model": model, "stream": stream, "user": PROMPT}
                    asked.append(self.cut(request(None, fields, path=path, key=self.key)))
        await asyncio.gather(*asked)

    async def leaked(self, keys: tuple[str, ...]) -> None:
        """What fails in a plugin."""
        body = {**DIALECTS["/v1/chat/completions"], "model": "m/fine"}
        await asyncio.gather(
            *(
                self.cut(request(None, {**body, "stream": stream}, f"X-Leak: {hook}", key=key))
                for hook in HOOKS
                for stream in (False, True)
                for key in keys
            )
        )


async def all_stored(url: str, folder: Path, at_least: int) -> str:
    """What the database holds once the rows of so many requests are in it."""
    async with asyncio.timeout(10):
        while (found := await stored_rows(url, folder)).count('"outcome"') < at_least:
            await asyncio.sleep(0.1)
    return found


@pytest.mark.promise("P12.log")
@pytest.mark.promise("P12.reply")
@pytest.mark.promise("P12.db")
@pytest.mark.promise("P12.metrics")
@pytest.mark.promise("P12.traces")
@pytest.mark.promise("P12.upstream")
@pytest.mark.parametrize("form", ["json", pytest.param("pretty", marks=pytest.mark.full)])
async def test_no_secret_anywhere(tmp_path: Path, form: str) -> None:
    """Keys, pepper, the database's password and prompts, sent through every error path, the database's end among them:
    none in a log, a trace, a reply, a row, a metric or, but its own key, upstream.
    """
    (tmp_path / "leak.py").write_text(LEAK)
    key, unknown = new_key(), new_key()
    collector = Collector()
    async with collector:
        pass  # its port is known
    plugins = leaking(
        tracing={"endpoint": collector.endpoint, "headers": {"x-token": TOKEN}, "plugin_spans": True},
        api_keys={"keys": [{"id": "app", "env": "CLIENT_KEY"}], "bootstrap": False, "database": True},
        jwt_auth={"issuers": [{"issuer": "https://login.example.com", "audience": "x", "secret": "s" * 32}]},
        # each request asks the upstream once, so that rows can be counted
        fallback={"retries": {}, "breaker": False},
        metrics={"public": True},
    )
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(postgres_server(own=True))
        # it trusts whoever comes from here, and so takes any password
        url = (await server.new()).replace("xenios@", f"xenios:{DATABASE_PASSWORD}@")
        upstream = await stack.enter_async_context(ScriptedUpstream())
        await stack.enter_async_context(collector)
        file = config(
            tmp_path,
            upstream,
            server={"pepper": PEPPER, "bootstrap_key": False, "drain_timeout": 0.5, "body_timeout": 1},
            upstream={"first_event_timeout": 0.2, "stall_timeout": 0.2},
            services={"redis": "embedded", "database": {"url": url, "migrate_on_start": True}},
            log={"level": "debug", "format": form},
            plugins=plugins,
        )
        async with started(file, {"CLIENT_KEY": key}) as process:
            visit = Visit(process, upstream, key)
            strange = (unknown, TYPO, FOREIGN)
            await visit.refused(strange)
            if form == "json":
                await visit.failed()
            fine = Stream(*chat_events(ANSWER, pieces=1))
            upstream.on("m/fine", lambda seen: fine if seen.stream else Json(chat_completion(ANSWER)))
            await visit.leaked((key, *strange))
            more = (f"x-api-key: {unknown}", f"Cookie: session={FOREIGN}", f"X-Goog-Api-Key: {TYPO}")
            assert (await exchange(process.port, request(None, CHAT, *more, key=key))).status == 200
            counted = (await exchange(process.port, head(None, method="GET", path="/metrics"))).body.decode()
            stored = await all_stored(url, tmp_path / "data", at_least=len(upstream.seen))
            server.kill()
            # a key of the database's, which nobody can look up now
            assert (await exchange(process.port, request(None, CHAT, key=new_key()))).status == 503
            async with connect(process.port) as raw:
                upstream.on("m/one", Stream(*chat_events(ANSWER, finish=None, done=False), end="hang"))
                await raw.send(request(None, {**DIALECTS["/v1/chat/completions"], "stream": True}, key=key))
                await raw.reader.readuntil(b"data: ")
                process.signal()
                visit.replies += await raw.rest(seconds=10)
            assert await process.exit_code() == 0
        await asyncio.sleep(0)
        requests = b"".join(
            f"{s.method} {s.path}?{s.query} {[h for h in s.headers.raw if h[0].lower() != 'authorization']}".encode()
            + s.body
            for s in upstream.seen
        )
        assert {s.headers["authorization"] for s in upstream.seen} == {f"Bearer {UPSTREAM_KEY}"}
    logged = bytes(process.out + process.err).decode()
    assert logged.count("plugin_failed") >= len(HOOKS)
    assert b"event" in process.out  # the access log has spoken
    assert "database_away" in logged
    traces = repr(collector.spans)
    outcomes = {span.attributes.get("xenios.outcome") for span in collector.spans}
    assert outcomes >= {"ok", "refused", "plugin_error", *(["upstream_error", "timeout"] if form == "json" else [])}
    assert "xenios_errors_total{" in counted
    assert "key:app" in stored
    keys = (key, unknown, TYPO, FOREIGN, UPSTREAM_KEY, PEPPER, DATABASE_PASSWORD, TOKEN)
    for name, text, canaries in (
        ("log", logged, (*keys, PROMPT, ANSWER)),
        ("traces", traces, (*keys, PROMPT, ANSWER)),
        ("replies", visit.replies.decode("latin-1"), keys),
        ("requests", requests.decode("latin-1"), keys),
        ("rows", stored, (*keys, ANSWER)),
        ("metrics", counted, (*keys, PROMPT, ANSWER)),
    ):
        for canary in canaries:
            for form_of_it in (canary, canary[:24], canary[-16:]):
                at = text.find(form_of_it)
                assert at < 0, (name, canary, text[max(0, at - 300) : at + 200])
