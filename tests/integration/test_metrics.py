"""`/metrics`: who may read it, what it says, and that several workers tell one truth."""

import asyncio
import concurrent.futures
import contextlib
import os
import re
import signal
import socket
from collections import Counter

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed

from gateway import Refused, Tasks, hookimpl
from gateway.kit.testing import Gateway
from gateway.kit.upstream import Error, Hang, Json, Pause, ScriptedUpstream, Stream, chat_completion, chat_events
from gateway.plugins import PluginStartError
from gateway_plugins.metrics import Config
from tests.integration import metrics_table
from tests.integration.metrics_table import README
from tests.integration.process import serving
from tests.integration.test_workers import eventually, workers
from tests.tools import free_port

CONFIG = """
server: {{data_dir: ./data, workers: {workers}, drain_timeout: 10s}}
upstreams: {{openrouter: {{without_key: simulate}}}}
services: {{redis: embedded}}
plugins:
  - {{use: metrics, config: {{public: true}}}}
  - use: api_keys
  - {{use: routing, config: {{aliases: {{fast: [anthropic/claude-haiku-4.5]}}}}}}
  - use: fallback
"""


def config(folder, count):
    path = folder / "x.yaml"
    path.write_text(CONFIG.format(workers=count))
    return path


def samples(text):
    """{(name, labels): value} of all series."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def total(found, name, **labels):
    """The sum over the series of `name` that have these labels."""
    return sum(v for (n, of), v in found.items() if n == name and labels.items() <= dict(of).items())


def scrape(running):
    reply = running.request("GET", "/metrics", key=None)
    assert reply.status == 200
    return samples(reply.body.decode())


def counts(found):
    """What may only grow: counters, and the buckets of histograms."""
    return {k: v for k, v in found.items() if k[0].endswith(("_total", "_bucket", "_count"))}


def not_gone_down(before, after):
    for series, value in counts(before).items():
        assert after.get(series, -1) >= value, series


# --- one gateway -----------------------------------------------------------------------------------------------------


async def text_of(gw, **kwargs):
    reply = await gw.get("/metrics", **kwargs)
    assert reply.status == 200
    return reply.body.decode()


PLUGINS = ["metrics", "api_keys"]


async def told(gw):
    return samples(await text_of(gw))


async def test_a_request_is_told_in_full():
    """Model, rule, attempts and why they failed, tokens, cost and times: of one that was retried and fell back."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": 0.25}
    upstream = ScriptedUpstream()
    upstream.on("a/one", Error(429))
    upstream.on("b/two", Json(chat_completion("Hi", usage=usage)))
    routing = {"rules": [{"name": "mine", "match": ["smart"], "use": ["a/one", "b/two"]}]}
    async with Gateway.test(plugins=[*PLUGINS, ("routing", routing), "fallback"], upstream=upstream) as gw:
        assert (await gw.chat(model="smart")).status == 200
        await gw.finished()
        found = await told(gw)
        of = {"endpoint": "chat/completions", "model": "b/two"}
        asked = {**of, "rule": "mine", "outcome": "ok", "status": "200", "stream": "false", "task": ""}
        assert total(found, "xenios_requests_total", **asked) == 1
        assert total(found, "xenios_request_duration_seconds_count", **of, outcome="ok") == 1
        assert total(found, "xenios_attempts_total", model="a/one", cause="rate_limit") == 1
        assert total(found, "xenios_attempts_total", model="b/two", cause="ok") == 1
        assert total(found, "xenios_fallbacks_total", model="a/one", to="b/two", cause="rate_limit") == 1
        assert total(found, "xenios_tokens_total", model="b/two", kind="input") == 10
        assert total(found, "xenios_tokens_total", model="b/two", kind="output") == 5
        assert total(found, "xenios_cost_usd_total", model="b/two", source="upstream") == pytest.approx(0.25)
        assert total(found, "xenios_gateway_overhead_seconds_count", endpoint="chat/completions") == 1
        assert not [name for name, _ in found if name.startswith("xenios_time_to_first_token")]
        assert total(found, "gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 10
        assert total(found, "gen_ai_client_operation_duration_seconds_count", error_type="rate_limit") == 1


async def test_the_times_of_a_stream():
    """Time to the first token counts from the request's arrival; time per token is of what came after it."""
    events = chat_events("one two three four five", comments=False)
    upstream = ScriptedUpstream(Stream(Pause(0.05), *events[:2], Pause(0.1), *events[2:]))
    async with Gateway.test(plugins=PLUGINS, upstream=upstream) as gw:
        assert (await gw.chat(model="openai/gpt-5-mini", stream=True)).status == 200
        [exchange] = await gw.finished()
        found = await told(gw)
        of = {"endpoint": "chat/completions", "model": "openai/gpt-5-mini"}
        first = exchange.first_content - exchange.started
        assert first >= 0.05
        assert total(found, "xenios_time_to_first_token_seconds_sum", **of) == pytest.approx(first)
        pace = (exchange.finished - exchange.first_content) / (exchange.usage.output_tokens - 1)
        assert total(found, "xenios_time_per_output_token_seconds_sum", **of) == pytest.approx(pace)
        assert total(found, "xenios_request_duration_seconds_count", **of, stream="true") == 1


class Refuses:
    """Refuses whoever says please."""

    def __init__(self, config, services): ...

    @hookimpl
    async def check_request(self, exchange):
        if exchange.body["messages"][0]["content"] == "please":
            raise Refused("No.", code="too_polite")


async def test_why_requests_failed():
    """Refusals name the plugin and its code; an upstream's errors their cause, whatever it calls them itself."""
    broken = Error(418, {"error": {"code": "invented-by-upstream", "message": "no", "type": "x-y-z"}})
    upstream = ScriptedUpstream(broken)
    async with Gateway.test(plugins=[*PLUGINS, Refuses], upstream=upstream) as gw:
        await gw.chat("please")
        await gw.chat("Hello")
        await gw.get("/v1/chat/completions", headers={"Authorization": "Bearer nonsense"})
        await gw.post("/v1/chat/completions", {}, headers={"Authorization": "Bearer nonsense"})
        await gw.get("/no/such/path")
        await gw.finished(5)
        text = await text_of(gw)
        found = samples(text)
        assert total(found, "xenios_refusals_total", plugin="Refuses", code="too_polite") == 1
        assert total(found, "xenios_errors_total", by="Refuses.check_request", code="too_polite") == 1
        assert total(found, "xenios_errors_total", by="upstream", code="invalid_request") == 1
        assert total(found, "xenios_errors_total", code="invalid_api_key") == 1
        assert total(found, "xenios_requests_total", endpoint="unmatched") == 2
        assert "invented-by-upstream" not in text


async def test_which_limit_refused():
    """The plugin that set it, though the gateway judges the limits of all together."""
    limits = {"limits": [{"name": "one", "requests": 1, "per": "1h"}]}
    async with Gateway.test(plugins=[*PLUGINS, ("rate_limit", limits)]) as gw:
        assert [(await gw.chat()).status for _ in range(3)] == [200, 429, 429]
        await gw.finished(3)
        found = await told(gw)
        assert total(found, "xenios_refusals_total", plugin="rate_limit", code="rate_limit_exceeded") == 2
        assert total(found, "xenios_errors_total", by="rate_limit.check_request") == 2


async def test_what_is_under_way_and_what_was_not_told():
    """Requests in flight are a gauge; a client that left and an answer without usage are counted as such."""
    upstream = ScriptedUpstream(Json({**chat_completion("Hi"), "usage": None}))
    upstream.on("slow/model", Hang())
    tasks = Tasks()
    async with Gateway.test(plugins=PLUGINS, upstream=upstream) as gw:
        await gw.chat(model="openai/gpt-5-mini")
        sent = tasks.spawn(gw.chat(model="slow/model"), "a slow one")
        await gw.upstream.wait_seen(2)
        found = await told(gw)
        assert total(found, "xenios_requests_in_flight") == 2  # it, and the one that asks
        assert total(found, "xenios_usage_unknown_total", model="openai/gpt-5-mini") == 1
        sent.cancel()
        await gw.finished(3)
        found = await told(gw)
        assert total(found, "xenios_requests_in_flight") == 1
        assert total(found, "xenios_requests_total", outcome="client_disconnect", status="none") == 1


async def test_what_is_only_explained_is_no_request_for_a_model():
    """A dry run is counted as one: it would make models look quick, and requests cheap."""
    async with Gateway.test(plugins=PLUGINS) as gw:
        body = {"model": "test/model", "messages": [{"role": "user", "content": "Hello"}]}
        reply = await gw.post("/v1/chat/completions", body, headers={"X-Xenios-Explain": "1"})
        assert reply.status == 200
        await gw.finished()
        found = await told(gw)
        assert total(found, "xenios_requests_total", endpoint="/admin/explain", model="", outcome="ok") == 1
        assert total(found, "xenios_requests_total", endpoint="chat/completions") == 0
        assert not [name for name, _ in found if name.startswith("gen_ai_")]


async def test_a_reload_keeps_what_was_counted():
    """Other settings of the plugin itself, and everything counted so far is there."""
    async with Gateway.test(plugins=PLUGINS) as gw:
        await gw.chat()
        await gw.finished()
        await gw.reload(plugins=[("metrics", {"genai": False}), "api_keys"])
        await gw.chat()
        await gw.finished(2)
        text = await text_of(gw)
        assert total(samples(text), "xenios_requests_total", endpoint="chat/completions") == 2
        assert "gen_ai" not in text


async def test_a_scraper_gets_the_format_that_it_asks_for():
    """Prometheus asks for OpenMetrics; whoever asks for nothing gets the plain text."""
    async with Gateway.test(plugins=PLUGINS) as gw:
        await gw.chat()
        await gw.finished()
        reply = await gw.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
        names = {family.name for family in openmetrics(reply.body.decode())}
        assert {"xenios_requests", "xenios_request_duration_seconds", "xenios_build_info"} <= names
        for accept in ("", "*/*", "application/json", "text/plain; version=0.0.4", "\xff;;=", ";" * 4000):
            plain = await gw.get("/metrics", headers={"Accept": accept})
            assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        for version in ("abc", "²", "9" * 100, "1.0.0; escaping=nonsense", ""):
            odd = await gw.get("/metrics", headers={"Accept": f"application/openmetrics-text; version={version}"})
            assert odd.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert plain.headers["Cache-Control"] == "no-store"


async def test_scrapes_at_the_same_time_are_one():
    """However many ask at once, the text is made for the first and once more for all others."""
    made = []
    async with Gateway.test(plugins=PLUGINS) as gw:
        gw.worker.metrics.before_export(lambda: made.append(1))
        replies = await asyncio.gather(*(gw.get("/metrics") for _ in range(30)))
        assert {reply.status for reply in replies} == {200}
        assert len(made) <= 5


async def test_all_metrics_are_in_the_table():
    """The table in the plugin's README is what a gateway with all built-in plugins tells (`make schema` writes it)."""
    found = await metrics_table.families()
    assert metrics_table.written(README.read_text(), metrics_table.table(found)) == README.read_text()
    assert all(family.help.endswith(".") for family in found)
    assert all(re.fullmatch(r"xenios_[a-z_]+", family.name) for family in found)
    assert all(family.name.endswith("_total") == (family.kind == "counter") for family in found)


# --- who may read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "stranger", "scraper", "admin"),
    [
        ({}, 401, 401, 200),
        ({"token": ""}, 401, 401, 200),
        ({"token": "scrape-me-please"}, 401, 200, 401),
        ({"token": "scrape-me-please", "public": True}, 401, 200, 401),
        ({"public": True}, 200, 200, 200),
    ],
)
async def test_who_may_read_them(config, stranger, scraper, admin):
    """Administrators, or whoever has the token, or everybody if the configuration says so."""
    async with Gateway.test(plugins=[("metrics", config), "api_keys"]) as gw:
        for token, status in (("", stranger), ("Bearer scrape-me-please", scraper), (f"Bearer {gw.key}", admin)):
            assert (await gw.get("/metrics", headers={"Authorization": token})).status == status
        for wrong in ("Bearer scrape-me-pleas", "Bearer scrape-me-please ", "bearer scrape-me-pleasee", "Basic eDp5"):
            if config.get("token"):
                expected = 200 if wrong.strip() == "Bearer scrape-me-please" else 401
                assert (await gw.get("/metrics", headers={"Authorization": wrong})).status == expected


async def test_a_port_of_its_own():
    """Then the gateway's port has no metrics, and theirs nothing else; with a token it is asked for."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    plugins = [("metrics", {"port": port, "path": "/m", "token": "scrape-me-please"}), "api_keys"]
    async with Gateway.test(plugins=plugins) as gw, aiohttp.ClientSession() as session:
        assert (await gw.get("/m")).status == 404
        token = {"Authorization": "Bearer scrape-me-please"}
        async with session.get(f"{url}/m", headers=token) as reply:
            assert reply.status == 200
            assert total(samples(await reply.text()), "xenios_build_info") == 1
        for method, path, headers, status in (
            ("GET", "/m", {}, 401),
            ("GET", "/m", {"Authorization": f"Bearer {gw.key}"}, 401),
            ("GET", "/metrics", token, 404),
            ("POST", "/m", token, 405),
            ("POST", "/v1/chat/completions", token, 404),
        ):
            async with session.request(method, url + path, headers=headers) as reply:
                assert reply.status == status


async def test_a_reload_changes_a_port_of_its_own_at_once():
    """Another token or path counts for all who ask from then on, though a request that began before is not yet over;
    a reload that is refused changes neither."""
    port = free_port()

    def metrics(**more):
        return [("metrics", {"port": port, **more}), "api_keys"]

    async def asked(path, token, times=8):
        """Over new connections: the kernel chooses who of those that listen takes one."""
        found = set()
        for _ in range(times):
            async with aiohttp.ClientSession() as session:
                headers = {"Authorization": f"Bearer {token}"}
                async with session.get(f"http://127.0.0.1:{port}{path}", headers=headers) as reply:
                    found.add(reply.status)
        return found

    tasks = Tasks()
    async with Gateway.test(plugins=metrics(token="the-first-token"), upstream=ScriptedUpstream(Hang())) as gw:
        slow = tasks.spawn(gw.chat(), "a slow one")
        await gw.upstream.wait_seen(1)
        await gw.reload(plugins=metrics(token="another-token", path="/m"))
        assert await asked("/m", "another-token") == {200}
        assert await asked("/m", "the-first-token") == {401}
        assert await asked("/metrics", "the-first-token") == {404}

        class Breaks:
            """Fails after the port was opened anew."""

            def __init__(self, config, services): ...

            @contextlib.asynccontextmanager
            async def lifespan(self):
                raise RuntimeError("no")
                yield

        with pytest.raises(PluginStartError, match="Breaks"):
            await gw.reload(plugins=[*metrics(token="a-third-token"), Breaks])
        assert await asked("/m", "another-token") == {200}
        slow.cancel()
        await gw.finished(1)
        assert await asked("/m", "another-token") == {200}


async def test_a_port_that_is_taken_is_named_at_the_start():
    """The start fails, and says which plugin."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PluginStartError, match="metrics"):
            async with Gateway.test(plugins=[("metrics", {"port": taken.getsockname()[1]})]):
                pass


async def test_listed_twice_it_would_count_twice():
    """The start fails, and says so."""
    plugins = [("metrics", {}), {"use": "metrics", "id": "second", "config": {"path": "/m"}}]
    with pytest.raises(PluginStartError, match="List `metrics` once"):
        async with Gateway.test(plugins=plugins):
            pass


@pytest.mark.parametrize("path", ["metrics", "", "/m?x=1", "/m#x", "/a b", "/{x}", "/é"])
def test_a_path_that_nobody_can_ask_for_is_refused(path):
    """It is a mistake in the configuration."""
    with pytest.raises(ValueError, match="write it as a path, such as /metrics"):
        Config(path=path)


# --- invented names --------------------------------------------------------------------------------------------------


@pytest.mark.promise("P16.series")
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.full)])
async def test_invented_names_are_one_series(count, monkeypatch):
    """However many models, users, tasks, paths, methods and ids clients invent: nothing but `other` is added."""
    monkeypatch.setattr(
        "gateway.timing.is_sampled", lambda: True
    )  # else a hook's series comes when it is measured first
    upstream = ScriptedUpstream()
    async with Gateway.test(plugins=[*PLUGINS, "routing", "fallback"], upstream=upstream) as gw:

        async def send(number):
            fields = {"user": f"user-{number}", "metadata": {"x": f"{number}"}, "stream": number % 2 == 0}
            body = {"model": f"invented/model-{number}", "messages": [{"role": "user", "content": "Hi"}], **fields}
            headers = {"X-Request-Id": f"id-{number}", "User-Agent": f"agent-{number}"}
            await gw.post("/v1/chat/completions", body, headers=headers)
            await gw.get(f"/invented/{number}")
            await gw.get(f"/v1/models/invented-{number}")
            if number < 300:
                await gw.chat(model=f"task/invented-{number}")

        for number in range(2):
            await send(number)
        await told(gw)
        await gw.finished(9)
        before = set(await told(gw))
        for first in range(2, count, 50):
            await asyncio.gather(*map(send, range(first, min(first + 50, count))))
        found = await told(gw)
        assert {series for series in found if "invented" in str(series)} == set()
        grown = set(found) - before
        assert not grown, sorted(grown)[:5]
        assert total(found, "xenios_requests_total", endpoint="chat/completions", model="other") >= count - 1


# --- several workers -------------------------------------------------------------------------------------------------


def sent(running, numbers):
    """Chats, streams and refusals over connections of their own; (status, stream) of each."""
    out = Counter()
    for number in numbers:
        stream = number % 3 == 0
        body = {"model": "fast", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        reply = running.request("POST", "/v1/chat/completions", body, key="own" if number % 5 else "wrong")
        out[reply.status, stream and reply.status == 200] += 1
    return out


@pytest.mark.promise("P16.rising")
@pytest.mark.promise("P16.totals")
def test_four_workers_tell_one_truth(tmp_path):
    """Fifty scrapes under load, whichever worker answers: no counter goes down, and in the end all that was sent is
    told, once."""
    with (
        serving(tmp_path, "--config", config(tmp_path, 4)) as running,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        lots = [pool.submit(sent, running, range(first, 400, 4)) for first in range(4)]
        seen = scrape(running)
        for _ in range(50):
            now = scrape(running)
            not_gone_down(seen, now)
            seen = now
        did = sum((lot.result() for lot in lots), Counter())
        assert sum(did.values()) == 400

        def all_told():
            nonlocal seen
            now = scrape(running)
            not_gone_down(seen, now)
            seen = now
            return total(now, "xenios_requests_total", endpoint="chat/completions") >= 400

        eventually(all_told)
        of = {"endpoint": "chat/completions"}
        for (status, stream), number in did.items():
            labels = {**of, "status": str(status), "stream": "true" if stream else "false"}
            assert total(seen, "xenios_requests_total", **labels) == number
        served = did[200, True] + did[200, False]
        assert total(seen, "xenios_attempts_total", cause="ok") == served
        assert total(seen, "xenios_request_duration_seconds_count", **of) == 400
        assert total(seen, "xenios_request_duration_seconds_bucket", **of, le="+Inf") == 400
        assert total(seen, "xenios_refusals_total", plugin="gateway", code="invalid_api_key") == 400 - served
        assert total(seen, "xenios_workers") == 4
        assert len({dict(of)["worker"] for name, of in seen if name == "xenios_worker_open_fds"}) == 4


@pytest.mark.full
def test_a_killed_workers_counts_stay(tmp_path):
    """kill -9: what was told is still told, by those that are left and by the one that takes its place."""
    with serving(tmp_path, "--config", config(tmp_path, 2)) as running:
        sent(running, range(1, 41))
        eventually(lambda: total(scrape(running), "xenios_requests_total", endpoint="chat/completions") == 40)
        before = scrape(running)
        old = set(workers(running.pid))
        os.kill(next(iter(old)), signal.SIGKILL)
        for _ in range(20):
            now = scrape(running)
            not_gone_down(before, now)
            before = now
        eventually(lambda: len(set(workers(running.pid)) - old) == 1 and total(scrape(running), "xenios_workers") == 2)
        sent(running, range(1, 41))
        eventually(lambda: total(scrape(running), "xenios_requests_total", endpoint="chat/completions") == 80)
