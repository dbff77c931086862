"""What a collector receives: traces of requests that went well, were retried, fell back, were cut off or refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from gateway import BadRequest, RateLimited, Reply, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import COST, Error, Json, Pause, ScriptedUpstream, Stream, chat_completion, chat_events
from gateway_plugins.tracing import export
from tests.contract.jobs import Jobs, Keeper, taken
from tests.integration.collector import Collector
from tests.integration.process import serving_beside

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID, PARENT_ID = PARENT.split("-")[1:3]
UPSTREAM_NAME = "openrouter"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(export, "DELAY", 0.01)


@pytest.fixture
def said():
    """What the plugin logs."""
    with structlog.testing.capture_logs() as lines:
        yield lines


def traced(collector: Collector, **config: Any) -> dict[str, Any]:
    return {"use": "tracing", "config": {"endpoint": collector.endpoint, **config}}


@contextlib.asynccontextmanager
async def tracing(
    *answers: Any, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ("routing",), **config: Any
) -> AsyncIterator[tuple[Gateway, Collector]]:
    async with Collector() as collector, Gateway.test(
        plugins=[traced(collector, **config), *before, "api_keys", *after], upstream=ScriptedUpstream(*answers)
    ) as gw:  # fmt: skip
        yield gw, collector


# --- one trace -----------------------------------------------------------------------------------------------------


def check_retried_and_streamed(server, first, second, third):
    """A request whose first model was refused twice and whose second one streamed."""
    assert [server.kind, first.kind, second.kind, third.kind] == ["server", "client", "client", "client"]
    assert {span.trace_id for span in (server, first, second, third)} == {TRACE_ID}
    assert server.parent_id == PARENT_ID
    assert {first.parent_id, second.parent_id, third.parent_id} == {server.span_id}
    assert server.name == "POST /v1/chat/completions"
    assert [first.name, second.name, third.name] == ["chat a/one", "chat b/two", "chat b/two"]
    assert [server.status, first.status, second.status, third.status] == ["unset", "error", "error", "unset"]

    about = server.attributes
    assert about["http.request.method"] == "POST"
    assert about["http.route"] == "/v1/chat/completions"
    assert about["http.response.status_code"] == 200
    assert about["url.scheme"] == "http"
    assert about["network.protocol.version"] == "1.1"
    assert about["xenios.outcome"] == "ok"
    assert about["xenios.attempts"] == 3
    assert about["xenios.model_asked"] == "smart"
    assert about["xenios.model_served"] == "b/two"
    assert about["xenios.tries"] == [
        "openrouter/a/one model_not_found", "openrouter/b/two server_error", "openrouter/b/two ok",
    ]  # fmt: skip
    assert about["xenios.cost_usd"] == pytest.approx(COST)
    assert about["xenios.cost_source"] == "upstream"
    assert "error.type" not in about

    assert first.attributes["error.type"] == "model_not_found"
    assert first.attributes["http.response.status_code"] == 404
    assert second.attributes["error.type"] == "server_error"
    assert second.attributes["xenios.attempt"] == 2
    won = third.attributes
    assert won["gen_ai.operation.name"] == "chat"
    assert won["gen_ai.provider.name"] == "openrouter"
    assert won["gen_ai.request.model"] == "b/two"
    assert won["gen_ai.request.stream"] is True
    assert won["gen_ai.request.temperature"] == 0.5
    assert won["gen_ai.request.max_tokens"] == 99
    assert won["gen_ai.response.model"] == "b/two"
    assert won["gen_ai.usage.input_tokens"] == 10
    assert won["gen_ai.usage.output_tokens"] == 5
    assert won["xenios.cost_usd"] == pytest.approx(COST)
    assert won["server.address"] == "127.0.0.1"

    # as long to the first token as the upstream waited, as long again to the last one; a busy machine adds to both
    assert 0.29 <= won["gen_ai.response.time_to_first_chunk"] <= third.seconds - 0.29
    [(event, moment, _)] = third.events
    assert event == "xenios.first_token"
    assert moment - third.started == pytest.approx(won["gen_ai.response.time_to_first_chunk"], abs=0.001)
    assert server.started <= first.started <= first.ended <= second.started <= second.ended <= third.started
    assert third.ended <= server.ended
    assert server.seconds >= sum(span.seconds for span in (first, second, third))
    assert abs(time.time() - server.ended) < 30


def script(upstream: ScriptedUpstream) -> None:
    events = chat_events("Hello there", model="b/two")
    middle = len(events) // 2
    upstream.on("a/one", Error(404))
    upstream.on("b/two", Error(503), Stream(Pause(0.3), *events[:middle], Pause(0.3), *events[middle:]))


ASKED = {
    "model": "smart", "stream": True, "temperature": 0.5, "max_tokens": 99,
    "messages": [{"role": "user", "content": "prompt-canary"}],
}  # fmt: skip
ROUTING = {"use": "routing", "config": {"aliases": {"smart": ["a/one", "b/two"]}}}
FALLBACK = {"use": "fallback", "config": {"backoff": "1ms"}}


@pytest.mark.promise("P8.span")
async def test_a_request_that_was_retried_fell_back_and_streamed():
    """The trace tells all of it: each try, why it failed, when the first token came and when the last."""
    async with tracing(after=(ROUTING, FALLBACK)) as (gw, collector):
        script(gw.upstream)
        reply = await gw.post("/v1/chat/completions", ASKED, headers={"traceparent": PARENT})
        assert reply.status == 200
        check_retried_and_streamed(*await collector.received(4))
        assert "prompt-canary" not in repr(collector.spans)
        assert "Hello" not in repr(collector.spans)
        assert all("traceparent" not in seen.headers for seen in gw.upstream.seen)


async def test_the_real_process_sends_traces(tmp_path: Path):
    """`xenios serve` with two workers: the same trace, one id of it in span, reply and log line; each worker says who
    it is."""
    async with Collector() as collector, ScriptedUpstream() as upstream:
        script(upstream)
        (tmp_path / "xenios.yaml").write_text(
            json.dumps(
                {
                    "server": {"data_dir": "data", "drain_delay": 0, "workers": 2},
                    "upstreams": {"openrouter": {"base_url": upstream.url, "api_key": "sk-or-v1-test"}},
                    "catalogue": {"refresh": 0},
                    "services": {"redis": "embedded"},
                    "plugins": [{"use": "access_log"},
                                traced(collector, headers={"x-token": "secret-canary"}, service_name="edge",
                                       resource={"deployment.environment.name": "test"}),
                                {"use": "api_keys"}, ROUTING, FALLBACK],
                }
            )
        )  # fmt: skip
        async with serving_beside(tmp_path, "-c", "xenios.yaml") as running:
            headers = {"traceparent": PARENT, "x-request-id": "mine-1"}
            reply = await asyncio.to_thread(running.request, "POST", "/v1/chat/completions", ASKED, headers=headers)
            assert reply.status == 200
        spans = await collector.received(4)
        check_retried_and_streamed(*spans)
        assert spans[0].attributes["xenios.request_id"] == reply.headers["x-request-id"] == "mine-1"
        assert collector.headers[0]["x-token"] == "secret-canary"
        resource = spans[0].resource
        assert resource["service.name"] == "edge"
        assert resource["deployment.environment.name"] == "test"
        assert resource["service.instance.id"]
        lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
        [line] = [line for line in lines if line["request_id"] == "mine-1"]
        assert line["trace_id"] == TRACE_ID


# --- what does not go well -----------------------------------------------------------------------------------------


async def test_a_client_that_leaves_is_nobodys_failure():
    """The attempt ends when the client left, with what was used until then; no span is an error."""
    events = chat_events("Hello there", finish=None, done=False, pieces=1)
    async with tracing(Stream(*events, end="hang")) as (gw, collector):
        async with gw.session.post(
            f"{gw.url}/v1/chat/completions", json={**ASKED, "model": "m/one"}, headers=gw.headers
        ) as reply:
            await reply.content.readuntil(b"Hello")
            reply.close()
        server, client = await collector.received(2)
        assert server.attributes["xenios.outcome"] == "client_disconnect"
        assert client.attributes["error.type"] == "client_disconnect"
        assert client.attributes["xenios.usage_source"] == "estimate"
        assert [server.status, client.status] == ["unset", "unset"]


async def test_a_stream_that_is_cut_is_an_error():
    """Though its status was 200: the outcome tells, and the attempt names the cause."""
    events = chat_events("Hello there", finish=None, done=False)
    async with tracing(Stream(*events, end="cut")) as (gw, collector):
        await gw.post("/v1/chat/completions", {**ASKED, "model": "m/one"})
        server, client = await collector.received(2)
        assert server.attributes["http.response.status_code"] == 200
        assert server.attributes["xenios.outcome"] == "upstream_truncated"
        assert server.attributes["error.type"] == "upstream_truncated"
        assert client.attributes["error.type"] == "truncated"
        assert [server.status, client.status] == ["error", "error"]


class Refuses:
    """Refuses by the model's name."""

    def __init__(self, config: Any, services: Any) -> None: ...

    @hookimpl
    async def check_request(self, exchange: Any) -> None:
        if exchange.asked_model == "m/limited":
            raise RateLimited("Enough.")
        if exchange.asked_model == "m/broken":
            raise RuntimeError("broken")


async def test_refusals_are_no_errors_of_the_server():
    """401, 429 and 404 leave the status unset, as HTTP's conventions want; what breaks in a plugin does not."""
    async with tracing(after=("routing", Refuses)) as (gw, collector):
        await gw.post("/v1/chat/completions", ASKED, headers={"Authorization": "Bearer wrong"})
        await gw.chat(model="m/limited")
        await gw.get("/v1/nowhere?key=secret-canary")
        await gw.chat(model="m/broken")
        unknown, limited, nowhere, broken = await collector.received(4)
        assert [s.attributes["http.response.status_code"] for s in (unknown, limited, nowhere, broken)] == [
            401,
            429,
            404,
            503,
        ]
        assert [s.status for s in (unknown, limited, nowhere, broken)] == ["unset", "unset", "unset", "error"]
        assert limited.attributes["xenios.error_by"] == "Refuses.check_request"
        assert limited.attributes["xenios.error_code"] == "rate_limit_exceeded"
        assert "error.type" not in limited.attributes
        assert nowhere.name == "GET"
        assert "http.route" not in nowhere.attributes
        assert broken.attributes["error.type"] == "plugin_error"
        assert "secret-canary" not in repr(collector.spans)


class Outside:
    """Stands before tracing, and refuses."""

    def __init__(self, config: Any, services: Any) -> None: ...

    @hookimpl
    async def request_received(self, exchange: Any) -> None:
        raise BadRequest("No.")


async def test_a_refusal_before_tracing_is_traced_too():
    """Whoever stands outermost may refuse: the request still has its span, in the client's trace."""
    async with Collector() as collector, Gateway.test(plugins=[Outside, traced(collector)]) as gw:
        await gw.post("/v1/chat/completions", ASKED, headers={"traceparent": PARENT})
        [server] = await collector.received(1)
        assert server.trace_id == TRACE_ID
        assert server.attributes["xenios.outcome"] == "refused"


async def test_a_skipped_target_is_an_event():
    """A model whose circuit is open is named in the server span of the requests that passed it over."""
    breaker = {"requests": 1, "failures": 0.1, "open_for": "1h"}
    fallback = {"use": "fallback", "config": {"backoff": "1ms", "breaker": breaker}}
    async with tracing(after=(ROUTING, fallback)) as (gw, collector):
        gw.upstream.on("a/one", Error(500))
        await gw.chat(model="smart")
        await gw.chat(model="smart")
        spans = await collector.received(5)
        [second] = [span for span in spans if span.kind == "server" and span.attributes["xenios.attempts"] == 1]
        assert [(name, about) for name, _, about in second.events] == [
            ("xenios.circuit_open", {"gen_ai.request.model": "a/one", "xenios.upstream": "openrouter"})
        ]
        assert second.attributes["xenios.tries"][0] == "openrouter/a/one circuit_open"


# --- sampling and propagation ----------------------------------------------------------------------------------------


async def test_hooks_are_spans_where_that_is_asked_for():
    """`plugin_spans: true`: each plugin's hook that ran is a span within the request's, in its place in time."""
    async with tracing(plugin_spans=True, after=("routing", "fallback")) as (gw, collector):
        assert (await gw.chat()).status == 200
        server, *inner = await collector.received(8)
        hooks = {span.name: span for span in inner if span.kind == "internal"}
        assert {"api_keys.authenticate", "routing.choose_targets", "fallback.around_upstream"} <= set(hooks)
        authenticate, choose = hooks["api_keys.authenticate"], hooks["routing.choose_targets"]
        assert authenticate.attributes == {"xenios.plugin": "api_keys", "xenios.hook": "authenticate"}
        assert {span.parent_id for span in hooks.values()} == {server.span_id}
        assert server.started <= authenticate.started <= authenticate.ended <= choose.started <= server.ended


async def test_the_callers_flag_decides():
    """01 is traced, 00 is not, whatever the share; without a parent the share decides."""
    async with tracing(sample_ratio=0.0) as (gw, collector):
        await gw.chat()
        await gw.post("/v1/chat/completions", {**ASKED, "model": "m/one"}, headers={"traceparent": PARENT[:-1] + "0"})
        await gw.post("/v1/chat/completions", {**ASKED, "model": "m/one"}, headers={"traceparent": PARENT})
        exchanges = await gw.finished(3)
        server, _client = await collector.received(2)
        assert server.attributes["xenios.id"] == exchanges[2].id
        assert [exchange.trace_id for exchange in exchanges] == [None, TRACE_ID, TRACE_ID]
    assert len(collector.spans) == 2


async def test_a_gateway_may_not_listen_to_clients():
    """`parent_based: false`: clients neither join traces nor choose what is traced."""
    async with tracing(parent_based=False) as (gw, collector):
        await gw.post("/v1/chat/completions", {**ASKED, "model": "m/one"}, headers={"traceparent": PARENT[:-1] + "0"})
        server, _client = await collector.received(2)
        assert server.trace_id != TRACE_ID
        assert server.parent_id == ""


async def test_upstreams_are_told_of_a_trace_only_where_it_is_asked_for():
    """`propagate: true`: each attempt says its own span's id, whatever layer made it, and passes tracestate on."""
    sent = {"traceparent": PARENT, "tracestate": "vendor=1,other=a b"}
    async with tracing(after=(ROUTING, FALLBACK), propagate=True) as (gw, collector):
        script(gw.upstream)
        await gw.post("/v1/chat/completions", ASKED, headers=sent)
        _server, *attempts = await collector.received(4)
        told = [seen.headers["traceparent"] for seen in gw.upstream.seen]
        assert told == [f"00-{TRACE_ID}-{span.span_id}-01" for span in attempts]
        assert {seen.headers["tracestate"] for seen in gw.upstream.seen} == {"vendor=1,other=a b"}
        assert {span.state for span in collector.spans} == {"vendor=1,other=a b"}


async def test_what_is_not_traced_is_propagated_as_such():
    """An unsampled request tells its upstream so: it doesn't begin to trace there."""
    async with tracing(sample_ratio=0.0, propagate=True) as (gw, _collector):
        await gw.chat()
        [exchange] = await gw.finished()
        assert gw.upstream.seen[0].headers["traceparent"].startswith(f"00-{exchange.trace_id}-")
        assert gw.upstream.seen[0].headers["traceparent"].endswith("-00")


class Asks:
    """A route that asks a model."""

    def __init__(self, config: Any, services: Any) -> None:
        self.services = services

    @hookimpl
    def register_routes(self, router: Any) -> None:
        router.add("POST", "/v1/asks", self.answer)

    async def answer(self, exchange: Any) -> Reply:
        body = {"model": "m/one", "messages": [{"role": "user", "content": "x"}]}
        return await self.services.submit(exchange, "chat/completions", body)


async def test_a_plugins_own_call_is_within_its_requests_trace():
    """`services.submit` from a plugin's route: route, inner request and attempt are one tree."""
    async with tracing(after=("routing", Asks)) as (gw, collector):
        await gw.post("/v1/asks", {})
        outer, inner, attempt = await collector.received(3)
        assert [outer.name, inner.name, attempt.name] == ["POST /v1/asks", "POST /v1/chat/completions", "chat m/one"]
        assert inner.parent_id == outer.span_id
        assert attempt.parent_id == inner.span_id
        assert {span.trace_id for span in (outer, inner, attempt)} == {outer.trace_id}


@pytest.mark.parametrize("config", [{}, {"parent_based": False}])
async def test_a_job_goes_on_with_the_trace_in_which_it_was_taken(config):
    """One trace from the client's call to the attempt of a run that came later, also where clients are not believed."""
    async with Collector() as collector, Gateway.test(plugins=[traced(collector, **config), Jobs]) as gw:
        jobs = await taken(gw)
        exchange = await jobs.services.run(jobs.late(), Keeper())
        accepted, run, attempt = await collector.received(3)
        assert [accepted.kind, run.kind, attempt.kind] == ["server", "consumer", "client"]
        assert [accepted.attributes["xenios.phase"], run.attributes["xenios.phase"]] == ["accept", "run"]
        assert run.parent_id == accepted.span_id
        assert attempt.parent_id == run.span_id
        assert {accepted.trace_id, run.trace_id, attempt.trace_id} == {exchange.trace_id}
        assert run.attributes["xenios.id"] == exchange.id


async def test_what_was_not_traced_when_it_was_taken_is_not_traced_later():
    """The caller's flag said no: the job's does too."""
    async with Collector() as collector, Gateway.test(plugins=[traced(collector), Jobs]) as gw:
        jobs = await taken(gw, headers={"traceparent": PARENT[:-1] + "0"})
        exchange = await jobs.services.run(jobs.late(), Keeper())
        assert exchange.trace_id == TRACE_ID
        await gw.finished(2)
        await gw.chat()
        spans = await collector.received(2)
        assert {span.trace_id for span in spans}.isdisjoint({TRACE_ID})


async def test_a_job_is_not_sampled_anew():
    """A request that chance left out stays left out when it runs, even where all others are traced by then."""
    async with Collector() as collector:
        async with Gateway.test(plugins=[traced(collector, sample_ratio=0.0), Jobs]) as gw:
            late = (await taken(gw)).late()
        async with Gateway.test(plugins=[traced(collector), Jobs]) as gw:
            await gw.plugin("Jobs").services.run(late, Keeper())
            await gw.finished(1)
            await gw.chat()
            spans = await collector.received(2)
            assert {span.attributes.get("xenios.phase") for span in spans} == {None}


async def test_two_tracers_tell_of_one_trace():
    """Listed twice (two collectors): each has the whole trace, under the same id."""
    async with Collector() as one, Collector() as two, Gateway.test(
        plugins=[{**traced(one), "id": "a"}, {**traced(two), "id": "b"}, "api_keys"]
    ) as gw:  # fmt: skip
        await gw.chat()
        first, second = await one.received(2), await two.received(2)
        assert first[0].trace_id == second[0].trace_id


# --- content -------------------------------------------------------------------------------------------------------

SECRETS = ["sk-xenios-abcdefghijklmnop", "Bearer abcdefghijklmnop", "card 4111111111111111"]


@pytest.mark.parametrize("stream", [False, True])
async def test_content_is_captured_only_where_it_is_asked_for_and_redacted(stream):
    """`capture_content: true`: prompt, instructions, tools and answer, without keys and what `redact` names."""
    said = f"Well, {' '.join(SECRETS)}."
    answer = Stream(*chat_events(said, pieces=20)) if stream else Json(chat_completion(said))
    async with tracing(answer, capture_content=True, redact=[r"\b\d{16}\b"]) as (gw, collector):
        await gw.post(
            "/v1/chat/completions",
            {
                "model": "m/one",
                "stream": stream,
                "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Hi {SECRETS}"}],
                "tools": [{"type": "function", "function": {"name": "look_up"}}],
            },
        )
        server, client = await collector.received(2)
        shown = client.attributes
        assert "Be kind." in shown["gen_ai.input.messages"]
        assert "Hi " in shown["gen_ai.input.messages"]
        assert "look_up" in shown["gen_ai.tool.definitions"]
        [output] = json.loads(shown["gen_ai.output.messages"])
        assert output["parts"] == [{"type": "text", "content": "Well, sk-xenios-*** Bearer *** card ***."}]
        assert output["finish_reason"] == "stop"
        assert "abcdefghijklmnop" not in repr(collector.spans)
        assert "4111" not in repr(collector.spans)
        assert "Hi " not in repr(server)


async def test_content_is_cut_short():
    """A megabyte of prompt is at most `max_content` characters in a span."""
    async with tracing(capture_content=True, max_content="1KiB") as (gw, collector):
        await gw.chat("word " * 200_000)
        _server, client = await collector.received(2)
        assert len(client.attributes["gen_ai.input.messages"]) < 1200


# --- plugins' hooks --------------------------------------------------------------------------------------------------


# --- collectors that fail --------------------------------------------------------------------------------------------


def dropped(gw: Gateway) -> float:
    counter = gw.snapshot.services.metrics.counter("xenios_dropped_total", "", ("buffer",))
    return counter.of("spans").value


@pytest.mark.parametrize("status", [400, 500])
async def test_a_collector_that_refuses_costs_a_count(status, said):
    """Requests go on; what was lost is counted, and said once."""
    async with tracing() as (gw, collector):
        collector.status = status
        for _ in range(3):
            assert (await gw.chat()).status == 200
            await gw.finished()
        await collector.asked(1)
        async with asyncio.timeout(5):
            while dropped(gw) < 6:
                await asyncio.sleep(0.01)
    assert [line["event"] for line in said if line["event"].startswith("traces")] == ["traces_not_exported"]
    assert next(line for line in said if line["event"] == "traces_not_exported")["error"] == f"HTTP {status}"


async def test_a_collector_that_is_down_costs_a_count_and_is_found_again(monkeypatch, said):
    """Nobody listens: requests are as quick as ever. When somebody does, what waited is sent."""
    monkeypatch.setattr(export, "TRIES", 1)
    collector = Collector()
    async with collector:
        pass
    async with Gateway.test(plugins=[traced(collector), "api_keys"]) as gw:
        assert (await gw.chat()).status == 200
        async with asyncio.timeout(5):
            while dropped(gw) < 2:
                await asyncio.sleep(0.01)
        async with collector:
            assert (await gw.chat()).status == 200
            assert len(await collector.received(2)) == 2
            async with asyncio.timeout(5):  # it has yet to read that they were taken
                while (told := [line["event"] for line in said if line["event"].startswith("traces")])[1:] == []:
                    await asyncio.sleep(0.01)
            assert told == ["traces_not_exported", "traces_exported_again"]


async def test_a_collector_that_hangs_holds_up_nothing(monkeypatch, said):
    """Neither a request, nor more memory than the buffer, nor the end of the process for more than two seconds."""
    monkeypatch.setattr(export, "MOST_WAITING", 10_000)
    async with Collector(hang=True) as collector:
        async with Gateway.test(plugins=[traced(collector), "api_keys"]) as gw:
            await gw.chat()
            await collector.asked(1)
            begun = time.monotonic()
            for _ in range(30):
                assert (await gw.chat()).status == 200
            assert time.monotonic() - begun < 3
            assert gw.plugin("tracing")._exporter._bytes < 12_000
            assert dropped(gw) > 0
            begun = time.monotonic()
        assert time.monotonic() - begun < 4
    assert [line["event"] for line in said if line["event"].startswith("traces")][-1] == "traces_incomplete"


async def test_the_console_has_one_line_a_span(capfd):
    """`exporter: console`: JSON lines on standard error; standard output belongs to the access log."""
    async with Gateway.test(plugins=[{"use": "tracing", "config": {"exporter": "console"}}, "api_keys"]) as gw:
        await gw.chat()
        await gw.finished()
    out, err = capfd.readouterr()
    spans = [json.loads(line) for line in err.splitlines() if '"trace_id"' in line]
    assert {span["name"] for span in spans} == {"POST /v1/chat/completions", "chat test/model"}
    assert '"trace_id"' not in out


async def test_a_reload_sends_the_rest():
    """Another configuration: the old instance's last spans reach its collector, the new one's go to the other."""
    async with Collector() as old, Collector() as new, Gateway.test(plugins=[traced(old), "api_keys"]) as gw:
        await gw.chat()
        await gw.reload(plugins=[traced(new), "api_keys"])
        await gw.chat()
        assert len(await old.received(2)) == 2
        assert len(await new.received(2)) == 2


async def test_what_a_collector_refuses_in_part_is_counted(said):
    """It answers 200 and says how many it dropped, and why: they are missing in the traces, so they are told."""
    refused = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=1, error_message="too long")
    )
    async with tracing() as (gw, collector):
        collector.reply = refused.SerializeToString()
        await gw.chat()
        await collector.received(2)
        exporter = gw.plugin("tracing")._exporter
    assert exporter.dropped.value == 1
    assert [line["error"] for line in said if line["event"] == "traces_not_exported"] == ["1 spans were refused"]


async def test_any_success_is_one(said):
    """Some backends answer 202 or 204."""
    async with tracing() as (gw, collector):
        collector.status = 202
        await gw.chat()
        await collector.asked(1)
        exporter = gw.plugin("tracing")._exporter
    assert exporter.dropped.value == 0
    assert not [line for line in said if line["event"] == "traces_not_exported"]
