import asyncio
import json
import os
import re
import threading
import tracemalloc

import pytest
import structlog
from plugin_objects import exchange, services, settings
from pydantic import ValidationError

from gateway import (
    Attempt,
    AttemptRecord,
    Cause,
    Cost,
    Decision,
    Limits,
    Outcome,
    Principal,
    Source,
    Target,
    Unauthenticated,
    Usage,
)
from gateway.kit import clean, new_key
from gateway.kit.testing import Gateway
from gateway_plugins import access_log
from tests.scraped import closed, scraped

CANARY = "canary-7f3a"


def finished(**fields):
    made = exchange(
        {"model": "smart", "stream": True, "messages": [{"role": "user", "content": CANARY}]}, bearer=CANARY
    )
    made.outcome, made.status = Outcome.OK, 200
    made.started_at = 1_800_000_000.0
    made.finished = made.started + 1.25
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def attempt(exchange, model, cause=None, start=0.0, end=1.0, first=None):
    start, end = exchange.started + start, exchange.started + end
    record = AttemptRecord(Attempt(Target(model, "openrouter"), b"", {}, Limits()), 1, start, finished=end, cause=cause)
    record.first_content = None if first is None else exchange.started + first
    exchange.attempts.append(record)


async def lines(path, *exchanges, **options):
    plugin = access_log.Plugin(access_log.Config(path=path), services(**options))
    async with plugin.lifespan():
        for made in exchanges:
            await plugin.request_finished(made)
    return [json.loads(line) for line in path.read_bytes().splitlines()]


async def lost(given):
    """How many lines were lost, as metrics tell."""
    [family] = [family for family in await given.metrics.read() if family.name == "xenios_dropped_total"]
    return {series.labels: series.value for series in family.series}["access_log",]


async def test_a_line_says_of_a_job_which_half_it_is(tmp_path):
    """Accepted, or run; what is answered at once says nothing of it."""
    live, accept, run = await lines(tmp_path / "log", *[finished(phase=phase) for phase in ("live", "accept", "run")])
    assert "phase" not in live
    assert (accept["phase"], run["phase"]) == ("accept", "run")


@pytest.mark.promise("P8.log")
async def test_a_line_says_all_about_one_request(tmp_path):
    """One line answers: who, what, which model, how much, how long, at what cost. Never the prompt or the key."""
    made = finished(
        principal=Principal("app", tenant="acme", team="blue"),
        decision=Decision("smart", (), alias="smart", task="chat", rule="r"),
        usage=Usage(10, 5, 3, 2, 1, Source.UPSTREAM),
        cost=Cost(123_400_000, Source.CATALOGUE),
    )
    attempt(made, "a/one", start=0.01, end=1.2, first=0.5)
    made.first_content = made.started + 0.5
    (line,) = await lines(tmp_path / "log", made)
    assert line == {
        "ts": "2027-01-15T08:00:01.250Z", "level": "info", "event": "request", "request_id": made.id, "id": made.id,
        "method": "POST", "endpoint": "chat/completions", "path": "/v1/chat/completions", "status": 200,
        "outcome": "ok", "error_code": None, "error_by": None, "model_asked": "smart", "model_served": "a/one",
        "upstream": "openrouter", "rule": "r", "task": "chat", "attempts": 1, "stream": True,
        "input_tokens": 10, "output_tokens": 5, "cache_read_tokens": 3, "reasoning_tokens": 1,
        "usage_source": "upstream", "cost_usd": 0.0001234, "cost_source": "catalogue", "duration_ms": 1250.0,
        "first_content_ms": 500.0, "upstream_ms": 1190.0, "principal": "app", "tenant": "acme", "team": "blue",
        "remote": "192.0.2.7",
    }  # fmt: skip
    assert CANARY not in (tmp_path / "log").read_text()


async def test_a_traced_request_names_its_trace(tmp_path):
    """From a line to the trace, by its id; where there is none, nothing is said of it."""
    traced, other = await lines(tmp_path / "log", finished(trace_id="4bf92f3577b34da6a3ce929d0e0e4736"), finished())
    assert traced["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert "trace_id" not in other


@pytest.mark.promise("P8.log")
async def test_failed_attempts_are_listed(tmp_path):
    """After a fallback the line names each model that was tried, and why it failed."""
    made = finished()
    attempt(made, "a/one", Cause.TIMEOUT, end=0.25)
    attempt(made, "b/two", start=0.25, end=1.0, first=0.5)
    (line,) = await lines(tmp_path / "log", made)
    assert (line["attempts"], line["model_served"]) == (2, "b/two")
    assert line["tries"] == [
        {"model": "a/one", "upstream": "openrouter", "cause": "timeout", "ms": 250.0},
        {"model": "b/two", "upstream": "openrouter", "cause": None, "ms": 750.0},
    ]


@pytest.mark.promise("P8.log")
async def test_targets_that_were_passed_over_are_listed(tmp_path):
    """Where a model was not tried since its circuit is open, the line says so, though the first attempt was good."""
    made = finished()
    made.skipped.append(Target("a/one", "openrouter"))
    attempt(made, "b/two", end=1.0, first=0.5)
    (line,) = await lines(tmp_path / "log", made)
    assert line["attempts"] == 1
    assert line["tries"] == [
        {"model": "a/one", "upstream": "openrouter", "cause": "circuit_open", "ms": None},
        {"model": "b/two", "upstream": "openrouter", "cause": None, "ms": 1000.0},
    ]


async def test_a_refused_request_has_its_line(tmp_path):
    """Nobody's request is logged too: what is unknown is null, and the refusal's code and plugin are named."""
    made = exchange({})
    made.outcome, made.status, made.error, made.error_by = (
        Outcome.REFUSED,
        401,
        Unauthenticated(),
        "api_keys.authenticate",
    )
    made.finished = made.started
    (line,) = await lines(tmp_path / "log", made)
    assert (line["level"], line["outcome"], line["status"]) == ("warning", "refused", 401)
    assert (line["error_code"], line["error_by"]) == ("invalid_api_key", "api_keys.authenticate")
    assert [
        line[k] for k in ("principal", "model_asked", "model_served", "input_tokens", "cost_usd", "upstream_ms")
    ] == [None] * 6
    assert line["usage_source"] == "unknown"


HOSTILE = [
    "a\nb",
    'x"}\n{"event":"forged"}',
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "\x9b31m",
    "\udcff\ud800",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_text_stays_in_its_field(text, tmp_path):
    """Line breaks, terminal escapes, broken Unicode and endless names make no second line and steer no terminal."""
    made = finished(request_id=text, principal=Principal(text, tenant=text, team=text))
    made.body = {"model": text}
    made.request.method = text
    attempt(made, text, Cause.TIMEOUT)
    path = tmp_path / "log"
    (line,) = await lines(path, made)
    assert line["event"] == "request"
    assert path.read_bytes().count(b"\n") == 1
    assert all(c.isprintable() for c in path.read_text().rstrip("\n"))
    assert path.stat().st_size < 12_000


async def test_a_key_where_a_name_is_due_is_not_logged(tmp_path):
    """Some paste theirs into the wrong field; wherever the name is cut, not even half of it stands in the line."""
    key = new_key()
    for before in ("", "x " * 80, "x " * 98):
        made = finished(request_id=before + key, principal=Principal(before + key))
        made.body = {"model": before + key}
        (line,) = await lines(tmp_path / "log", made)
        (tmp_path / "log").unlink()
        assert key[10:20] not in repr(line)
        assert line["model_asked"].startswith(before or "sk-xenios-***")


def test_of_a_huge_name_no_more_is_kept_than_is_shown():
    """A client who sends them again and again fills no memory."""
    tracemalloc.start()
    try:
        for number in range(20):
            assert len(clean(f"{number}" + "x" * 1_000_000)) == 200
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1_000_000


async def test_letters_of_any_language_are_kept(tmp_path):
    (line,) = await lines(tmp_path / "log", finished(principal=Principal("Zoë-数据", tenant="naïve")))
    assert (line["principal"], line["tenant"]) == ("Zoë-数据", "naïve")


@pytest.mark.parametrize(
    "level, kept",
    [
        ("info", ["ok", "client_disconnect", "refused", "upstream_error", "plugin_error"]),
        ("warning", ["refused", "upstream_error", "plugin_error"]),
        ("error", ["plugin_error"]),
    ],
)
async def test_log_level_holds_for_the_access_log(level, kept, tmp_path):
    """`log.level: warning` leaves the lines of requests that went well out."""
    outcomes = (Outcome.OK, Outcome.CLIENT_DISCONNECT, Outcome.REFUSED, Outcome.UPSTREAM_ERROR, Outcome.PLUGIN_ERROR)
    found = await lines(
        tmp_path / "log", *(finished(outcome=o) for o in outcomes), settings=settings(log={"level": level})
    )
    assert [line["outcome"] for line in found] == kept


async def test_a_file_is_appended_to(tmp_path):
    """A restart keeps what the log has."""
    path = tmp_path / "log"
    path.write_bytes(b'{"event":"old"}\n')
    assert [line["event"] for line in await lines(path, finished())] == ["old", "request"]


def test_a_directory_that_is_not_there_is_a_mistake(tmp_path):
    with pytest.raises(ValidationError, match="there is no directory"):
        access_log.Config(path=tmp_path / "absent" / "log")


@pytest.fixture
def pipe(monkeypatch):
    """(read end, write end) of what the plugin takes for standard output."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", 0) as reader, os.fdopen(write, "wb", 0) as writer:
        monkeypatch.setattr(access_log, "STDOUT", write)
        yield reader, writer


async def test_lines_come_soon_without_an_end(pipe):
    """A line is on standard output a moment after its request, not only when the gateway ends."""
    plugin = access_log.Plugin(access_log.Config(), services())
    loop = asyncio.get_running_loop()
    async with plugin.lifespan():
        await plugin.request_finished(finished())
        line = await loop.run_in_executor(None, pipe[0].read, 65536)
        assert json.loads(line)["event"] == "request"


async def test_a_closed_standard_output_breaks_nothing(pipe):
    """When the reader of standard output is gone requests go on; standard error says so once."""
    pipe[0].close()
    with structlog.testing.capture_logs() as logs:
        plugin = access_log.Plugin(access_log.Config(), given := services(log=structlog.get_logger()))
        async with plugin.lifespan():
            for _ in range(3):
                await plugin.request_finished(finished())
    assert await lost(given) == 3
    (entry,) = logs
    assert (entry["event"], entry["lines_lost"]) == ("access_log_incomplete", 3)
    assert "Broken pipe" in entry["error"]


async def test_no_standard_output_at_all_breaks_nothing(monkeypatch):
    monkeypatch.setattr(access_log, "STDOUT", 10**6)
    with structlog.testing.capture_logs() as logs:
        plugin = access_log.Plugin(access_log.Config(), services(log=structlog.get_logger()))
        async with plugin.lifespan():
            await plugin.request_finished(finished())
    assert logs[0]["lines_lost"] == 1


async def test_a_reader_who_stops_reading_holds_up_nothing(pipe, monkeypatch):
    """A stalled reader of standard output stops neither requests nor the end; lines beyond the bound are counted."""
    monkeypatch.setattr(access_log, "WAITING_LINES", 500)
    monkeypatch.setattr(access_log, "CLOSE_SECONDS", 0.1)
    plugin = access_log.Plugin(access_log.Config(), given := services(log=structlog.get_logger()))
    with structlog.testing.capture_logs() as logs:
        async with plugin.lifespan():
            for _ in range(1000):
                await plugin.request_finished(finished())
            assert await lost(given) == 500
    # and those that nobody had read when it gave up, with the line that tells of the others
    assert await lost(given) == 500 + logs[0]["lines_lost"]
    assert logs[0]["event"] == "access_log_incomplete"
    pipe[1].close()
    received, done = [], threading.Event()

    def read():
        while data := pipe[0].read(65536):
            received.append(data)
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)  # the writer thread goes on, and ends with the pipe
    found = [json.loads(line) for line in b"".join(received).splitlines()]
    assert [line["event"] for line in found] == ["request"] * 500 + ["lines_dropped"]
    assert found[-1]["count"] == 500


def test_lines_are_written_in_whole_pieces():
    """Workers that share a pipe don't mix their lines: each write holds whole lines and fits a pipe at once."""
    lines = [b"x" * n + b"\n" for n in (900, 900, 900, 900, 900, 5000, 10)]
    pieces = access_log._pieces(lines)
    assert b"".join(piece for piece, _ in pieces) == b"".join(lines)
    assert [count for _, count in pieces] == [4, 1, 1, 1]
    assert access_log._pieces([]) == []


async def test_the_clock_rolls_over(tmp_path):
    """Times are ISO 8601 in UTC with milliseconds, whatever the fraction of the second."""
    made = [finished(started_at=1_800_000_000.0 + offset) for offset in (0.7496, 0.74999, 0.0)]
    found = [line["ts"] for line in await lines(tmp_path / "log", *made)]
    assert found == ["2027-01-15T08:00:02.000Z", "2027-01-15T08:00:02.000Z", "2027-01-15T08:00:01.250Z"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ts) for ts in found)


async def test_a_failing_output_is_told_while_it_fails(pipe):
    """A full disk or a closed pipe is reported at once on standard error, not only when the gateway ends."""
    pipe[0].close()
    with structlog.testing.capture_logs() as logs:
        plugin = access_log.Plugin(access_log.Config(), given := services(log=structlog.get_logger()))
        async with plugin.lifespan(), asyncio.timeout(10):
            while not logs:
                await plugin.request_finished(finished())
                await asyncio.sleep(access_log.DELAY)
            assert await lost(given) >= 1  # while it fails, too
    assert await lost(given) == logs[-1]["lines_lost"]
    assert [entry["event"] for entry in logs] == ["access_log_not_written", "access_log_incomplete"]


async def test_lines_that_are_lost_are_in_metrics(pipe, monkeypatch):
    """Whoever watches `/metrics` sees that the log is incomplete, also over a reload."""
    pipe[0].close()
    monkeypatch.setattr("gateway.logs.setup", lambda settings: None)  # this process is the tests' own
    plugins = ["api_keys", "access_log", "metrics"]
    async with Gateway.test(plugins=plugins) as gw:
        assert (await scraped(gw, "xenios_dropped_total"))["access_log",] == 0
        for _ in range(3):
            await gw.chat()
        old = gw.snapshot
        await gw.reload(plugins=plugins, settings={"log": {"level": "warning"}})  # another instance
        await closed(gw, old)
        assert (await scraped(gw, "xenios_dropped_total"))["access_log",] == 4  # and the first look at /metrics
