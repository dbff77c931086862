"""Who reloads: reading, refusing, remembering; when files count as changed; all workers or none."""

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

import gateway.reload
from gateway.errors import StartError
from gateway.plugins import PluginStartError
from gateway.problems import ConfigError, Problem
from gateway.processes import Group, _Child, _Parent
from gateway.reload import Reload, Reloader, ReloadError, read, restart_needed
from gateway.settings import load_text

TEXT = "upstreams: {openrouter: {api_key: sk-or-canary}}\n"


def loaded(more="", env=None, file="x.yaml", base=None):
    return load_text(TEXT + more, file, env=env or {}, base=base)


class Force:
    """What is put in force, and with which hash; `fails` is raised once."""

    def __init__(self):
        self.given = []
        self.hash = "first"
        self.fails = None
        self.gate = None

    async def put(self, new):
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        self.given.append(new)
        self.hash = f"hash {len(self.given)}"


def reloader(read, now=None):
    force, told = Force(), []
    made = Reloader(now or loaded(), read, force.put, lambda: force.hash, lambda: told.append(made.last))
    return made, force, told


@pytest.fixture
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


# --- one reload --------------------------------------------------------------------------------------------------


async def test_what_was_done_is_remembered_and_told(logs):
    """The new hash, a count, a line in the log."""
    new = loaded("server: {max_body: 1MiB}")
    made, force, told = reloader(lambda: new)
    result = await made.reload()
    assert (result.config, result.code, result.problems) == ("hash 1", None, ())
    assert force.given == [new]
    assert (made.done, made.refused, made.last, made.loaded) == (1, 0, result, new)
    assert told == [result]
    said = [(line["event"], line["config"]) for line in logs if line["event"].startswith("config_")]
    assert said == [("config_reloaded", "hash 1")]
    assert Reload.from_json(json.loads(json.dumps(result.to_json()))) == result


MISTAKE = Problem("x.yaml", 3, 5, "server.port", "is required")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError([MISTAKE]), "config_invalid", "x.yaml:3:5: server.port: is required"),
        (ReloadError("reload_failed", (MISTAKE,)), "reload_failed", "x.yaml:3:5: server.port: is required"),
        (StartError("No door."), "reload_failed", "x.yaml: No door."),
        (
            PluginStartError("second", "lifespan", OSError("gone")),
            "reload_failed",
            "x.yaml:2:25: plugins[1]: plugin second: lifespan failed: OSError: gone",
        ),
        (PluginStartError("who", "lifespan", OSError("gone")), "reload_failed", "x.yaml: plugin who: lifespan failed"),
        (ZeroDivisionError("secret"), "reload_failed", "x.yaml: It broke: ZeroDivisionError. The log says more."),
    ],
    ids=["file", "elsewhere", "start", "plugin", "unknown plugin", "anything"],
)
async def test_what_failed_is_said_and_nothing_has_changed(error, code, said, logs):
    """The place, the reason, the hash that is still in force."""
    before = loaded()
    made, force, _ = reloader(lambda: loaded("plugins: [{use: first}, {use: second}]"), before)
    force.fails = error
    result = await made.reload()
    assert (result.config, result.code) == ("first", code)
    assert str(result.problems[0]).startswith(said)
    assert (made.done, made.refused, made.loaded) == (0, 1, before)
    [line] = [line for line in logs if line["event"] == "config_reload_failed"]
    assert (line["config"], line["code"], line["problems"]) == ("first", code, [str(p) for p in result.problems])
    assert (await made.reload()).code is None


async def test_what_a_library_quotes_is_not_passed_on(logs):
    """Neither what an expression gave nor a password in an address, in the answer as in the log."""
    env = {"DSN": "redis://u:canary-one@h", "TOKEN": "canary-two"}
    new = loaded("plugins: [{use: p, config: {a: '${DSN}', b: '${TOKEN}'}}]", env)
    made, force, _ = reloader(lambda: new)
    text = "can't open redis://u:canary-one@h or x://me:canary-three@h with canary-two and Bearer canary-four-canary"
    force.fails = PluginStartError("p", "lifespan", OSError(text))
    result = await made.reload()
    assert "canary" not in json.dumps(result.to_json()) + json.dumps(logs)


async def test_one_after_another():
    """Two that are asked for at once are done in turn, each with what the file says then."""
    texts = iter(["server: {max_body: 1MiB}", "server: {max_body: 2MiB}"])
    made, force, _ = reloader(lambda: loaded(next(texts)))
    force.gate = asyncio.Event()
    both = asyncio.gather(made.reload(), made.reload())
    await asyncio.sleep(0)
    force.gate.set()
    assert [result.config for result in await both] == ["hash 1", "hash 2"]
    assert [new.settings.server.max_body for new in force.given] == [2**20, 2 * 2**20]


async def test_who_asked_may_leave():
    """A reload goes on when the client that asked for it goes away."""
    made, force, told = reloader(loaded)
    force.gate = asyncio.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await made.reload()
    force.gate.set()
    async with asyncio.timeout(5):
        while not told:
            await asyncio.sleep(0.005)
    assert made.done == 1


async def test_none_is_begun_at_the_end():
    """Once the gateway stops, a reload is refused, and one that runs is given up."""
    made, force, _ = reloader(loaded)
    force.gate = asyncio.Event()
    async with made.listening():
        made.ask()
        await asyncio.sleep(0.05)
    assert made.last is None
    result = await made.reload()
    assert (result.code, result.problems[0].message) == ("reload_failed", "The gateway is stopping.")
    assert force.given == []


# --- what needs a restart ------------------------------------------------------------------------------------------


def test_fields_that_take_effect_at_a_start():
    """Each is named with its line, those within a section too; others are no reason."""
    now = loaded("server: {port: 1}\nservices: {database: {url: sqlite, max_connections: 5}}\n").settings
    new = loaded(
        "server:\n  port: 2\n  pepper: sixteen characters\n  max_body: 5\n  drain_timeout: 1s\n"
        "services:\n  redis: embedded\n  database: {url: sqlite, max_connections: 6, migrate_on_start: true}\n"
    )
    found = {problem.path: problem.line for problem in restart_needed(now, new)}
    assert found == {
        "server.port": 3,
        "server.pepper": 4,
        "services.redis": 8,
        "services.database.max_connections": 9,
        "services.database.migrate_on_start": 9,
    }
    assert all("sixteen" not in str(problem) for problem in restart_needed(now, new))
    assert restart_needed(new.settings, new) == []


async def test_a_change_that_needs_a_restart_is_refused():
    """Nothing of such a file is put in force."""
    made, force, _ = reloader(lambda: loaded("server: {port: 4711, max_body: 5}"))
    result = await made.reload()
    assert (result.code, [p.path for p in result.problems], force.given) == ("restart_needed", ["server.port"], [])


def test_all_mistakes_of_file_and_plugins_are_told(tmp_path):
    """As `xenios check` does; what the command line said stands above the file."""
    path = tmp_path / "x.yaml"
    path.write_text(TEXT + "server: {prot: 1}\nplugins: [{use: rate_limit, config: {limts: []}}, {use: nope}]\n")
    with pytest.raises(ConfigError) as caught:
        read(path, {})
    assert [problem.line for problem in caught.value.problems] == [2, 3, 3]
    path.write_text(TEXT)
    assert read(path, {"port": 4711}).settings.server.port == 4711


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gateway.reload, "POLL_SECONDS", 0.02)


def later(path, text, seconds):
    path.write_text(text)
    os.utime(path, (1e9 + seconds, 1e9 + seconds))


async def done(made, count):
    async with asyncio.timeout(5):
        while made.done + made.refused < count:
            await asyncio.sleep(0.005)


async def test_changed_files_count_once(tmp_path, quick):
    """Each file that the configuration consists of; a failed reload is not tried again before the next change."""
    path, named = tmp_path / "x.yaml", tmp_path / "named"
    text = "server: {watch_config: true}\nplugins: [{use: p, config: {a: '${file:named}'}}]"
    named.write_text("one")
    path.write_text(text)

    def again():
        return loaded(path.read_text(), file=str(path), base=tmp_path)

    made, force, _ = reloader(again, again())
    async with made.listening():
        later(named, "two", 1)
        await done(made, 1)
        later(path, text, 2)
        await done(made, 2)
        force.fails = StartError("no")
        later(path, text, 3)
        await done(made, 3)
        await asyncio.sleep(0.1)
        assert (made.done, made.refused) == (2, 1)
        named.unlink()
        await done(made, 4)
        later(named, "three", 4)
        await done(made, 5)
        later(path, text.replace("true", "false"), 5)
        await done(made, 6)
        later(named, "four", 6)
        await asyncio.sleep(0.1)
        assert (made.done, made.refused) == (4, 2)
        later(path, text, 7)
        made.ask()
        await done(made, 7)
        later(named, "five", 8)
        await done(made, 8)
    assert [new.settings.plugins[0].config["a"] for new in force.given] == [
        "two",
        "two",
        "three",
        "three",
        "four",
        "five",
    ]


async def test_what_was_refused_is_watched_until_it_is_mended(tmp_path, quick):
    """A file that only the refused configuration names, missing, faulty or a plugin's: its change is a new try."""
    path, secret, plugin = tmp_path / "x.yaml", tmp_path / "secret", tmp_path / "mine.py"
    text = f"{TEXT}server: {{watch_config: true}}\nupstream: {{first_event_timeout: 61s}}\n"
    path.write_text(text)
    made, _, _ = reloader(lambda: read(path, {}), read(path, {}))
    async with made.listening():
        later(path, text.replace("61s", "'${file:secret}'"), 1)
        await done(made, 1)
        await asyncio.sleep(0.1)
        later(secret, "soon", 2)
        await done(made, 2)
        later(secret, "62s", 3)
        await done(made, 3)
        assert (made.done, made.refused) == (1, 2)
        later(path, text + "plugins: [{use: mine.py:Mine}]", 4)
        await done(made, 4)
        later(plugin, "class Other: pass", 5)
        await done(made, 5)
        later(plugin, "class Mine: pass", 6)
        await done(made, 6)
        later(path, text, 7)
        await done(made, 7)
        later(secret, "63s", 8)
        await asyncio.sleep(0.1)
    assert (made.done, made.refused) == (3, 4), made.last


async def test_a_file_that_is_being_written_is_waited_for(tmp_path, quick):
    """While a file changes from one look to the next nothing is read."""
    path = tmp_path / "x.yaml"
    text = "server: {watch_config: true}\n"
    path.write_text(text)
    made, _, _ = reloader(lambda: loaded(text, file=str(path)), loaded(text, file=str(path)))
    looks = []
    for number in range(5):
        later(path, text, number)
        looks.append(made._changed())
    assert looks == [False] * 5
    assert made._changed()


# --- all workers or none -------------------------------------------------------------------------------------------


class Stub(_Child):
    """A worker that answers as it is told: a hash, problems, "dead" or None (never)."""

    def __init__(self, number, says, log):
        super().__init__(number, SimpleNamespace(returncode=None, stdin=None))
        self.ready.set_result(SimpleNamespace(config="first"))
        self.says, self.log = says, log

    def send(self, **message):
        kind = next(name for name in message if name not in {"answer", "number", "result"})
        self.log.append((self.number, kind))
        answer = self._answers.get(message.get("answer", ""))
        if kind == "prepare" and self.says == "dead":
            self.process.returncode = -9
            answer.set_result(None)
        elif kind == "prepare" and isinstance(self.says, list):
            answer.set_result({"config": None, "code": "reload_failed", "problems": self.says})
        elif kind == "prepare" and self.says is not None:
            answer.set_result({"config": self.says, "code": None, "problems": []})
        elif kind == "commit":
            answer.set_result({"config": self.says})


def group(*says):
    log = []
    made = Group(loaded("server: {reload_timeout: 50ms}"), Path(), None, loaded)
    made.config = "first"
    made._workers = {number: Stub(number, said, log) for number, said in enumerate(says, 1)}
    return made, log


def problem(text):
    return {"file": "x.yaml", "line": 1, "column": 1, "path": "plugins[0]", "message": text, "hint": None}


async def test_all_prepare_before_any_swaps():
    """The parent notes the new configuration before it tells the first to swap."""
    made, log = group("new", "new", "new")
    new = loaded("server: {max_body: 5}")
    await made.put_in_force(new)
    assert log == [(n, "prepare") for n in (1, 2, 3)] + [(n, "commit") for n in (1, 2, 3)]
    assert (made.config, made._loaded) == ("new", new)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (["new", [problem("it is broken")], "new"], ["it is broken"]),
        (
            [[problem("it is broken")], [problem("it is broken"), problem("and that")], "new"],
            ["it is broken", "and that"],
        ),
        (["new", "dead", "new"], ["Worker 2 ended while it prepared the new configuration."]),
        (["new", "new", None], ["Worker 3 did not answer within 0.1 s."]),
        (["new", "other", "new"], ["The workers read different files: one was changed meanwhile."]),
    ],
    ids=["problem", "problems", "dead", "silent", "different"],
)
async def test_if_one_can_not_none_does(says, why, monkeypatch):
    """All are told to forget it; what several say is said once; whoever starts now begins with the old configuration."""
    monkeypatch.setattr("gateway.processes.GRACE", 0.05)
    made, log = group(*says)
    before = made._loaded
    with pytest.raises(ReloadError) as caught:
        await made.put_in_force(loaded("server: {max_body: 5}"))
    assert [p.message for p in caught.value.problems] == why
    assert [kind for _, kind in log] == ["prepare"] * 3 + ["abort"] * 3
    assert (made.config, made._loaded) == ("first", before)


async def test_one_that_is_started_meanwhile_is_waited_for():
    """It began with the old configuration, and must swap with the others."""
    made, log = group("new", "new")
    late = made._workers[2]
    ready, late.ready = late.ready, asyncio.get_running_loop().create_future()
    going = asyncio.ensure_future(made.put_in_force(loaded()))  # noqa: TID251 - awaited below
    await asyncio.sleep(0.01)
    assert log == []
    late.ready.set_result(ready.result())
    await going
    assert log.count((2, "commit")) == 1


async def test_nobody_serves():
    """With all workers gone a reload can't be tried, and says so; one that never comes up is named."""
    made, _ = group("new")
    made._workers[1].process.returncode = 1
    with pytest.raises(ReloadError, match="No worker serves now"):
        await made.put_in_force(loaded())
    made, _ = group("new", "new")
    made._workers[2].ready = asyncio.get_running_loop().create_future()
    made._loaded = loaded("server: {reload_timeout: 1ms}")
    gateway_grace = "gateway.processes.GRACE"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway_grace, 0.01)
        with pytest.raises(ReloadError, match="Worker 2 is still being started"):
            await made.put_in_force(loaded())


class StubWorker:
    """A worker's own side: notes what it is told to do."""

    number = 2

    def __init__(self):
        self.log = []
        self.gate = asyncio.Event()
        self.fails = None

    async def prepare(self, new):
        self.log.append("prepare")
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        if self.fails:
            raise self.fails
        return SimpleNamespace(hash="new")

    def commit(self):
        self.log.append("commit")
        return SimpleNamespace(hash="new")

    async def abort(self):
        self.log.append("abort")


def parent_of(worker):
    """The worker's channel, and what it says there."""
    reading, writing = os.pipe()
    order = {"pipe": writing, "redis": None, "told": {}, "reloads": {"done": 4, "refused": 1, "last": None}}
    made = _Parent(worker, order)

    async def said():
        return json.loads(await asyncio.to_thread(lambda: os.read(reading, 65536)))

    return made, said


CONFIG = {"text": TEXT, "file": "x.yaml", "base": ".", "files": {}}


async def test_a_worker_prepares_and_swaps_when_told():
    """It answers under the name that it was asked with."""
    worker = StubWorker()
    parent, said = parent_of(worker)
    worker.gate.set()
    parent._do({"prepare": CONFIG, "answer": "prepared 1"})
    assert await said() == {"answers": "prepared 1", "config": "new", "code": None, "problems": []}
    parent._do({"commit": True, "answer": "committed 1"})
    assert await said() == {"answers": "committed 1", "config": "new"}
    assert worker.log == ["prepare", "commit"]
    await parent.close()


async def test_a_worker_that_can_not_says_why():
    """A mistake in the text and a plugin that fails alike, each with its place."""
    worker = StubWorker()
    parent, said = parent_of(worker)
    parent._do({"prepare": {**CONFIG, "text": "server: {prot: 1}\n" + TEXT}, "answer": "prepared 1"})
    refused = await said()
    assert (refused["code"], refused["problems"][0]["path"]) == ("config_invalid", "server.prot")
    worker.fails = PluginStartError("p", "lifespan", OSError("gone"))
    worker.gate.set()
    parent._do({"prepare": {**CONFIG, "text": TEXT + "plugins: [{use: p}]"}, "answer": "prepared 2"})
    refused = await said()
    assert (refused["code"], refused["problems"][0]["path"]) == ("reload_failed", "plugins[0]")
    await parent.close()
    parent._do({"prepare": CONFIG, "answer": "prepared 3"})
    assert (await said())["problems"][0]["message"] == "Worker 2 is stopping."


async def test_an_abort_ends_a_preparation_that_hangs():
    """What hangs is cancelled, and what was prepared is closed."""
    worker = StubWorker()
    parent, _ = parent_of(worker)
    parent._do({"prepare": CONFIG, "answer": "prepared 1"})
    async with asyncio.timeout(5):
        while worker.log != ["prepare"]:
            await asyncio.sleep(0.005)
        parent._do({"abort": True})
        while len(worker.log) < 3:
            await asyncio.sleep(0.005)
    assert sorted(worker.log[1:]) == ["abort", "cancelled"]
    await parent.close()


async def test_a_worker_asks_its_parent():
    """It gets the result that answers its own question; the count and the last result it hears of anyhow."""
    parent, said = parent_of(StubWorker())
    assert (parent.done, parent.refused, parent.last) == (4, 1, None)
    result = Reload("2026-01-01", "new", "config_invalid", (MISTAKE,))
    going = asyncio.ensure_future(parent.reload())  # noqa: TID251 - awaited below
    await asyncio.sleep(0)
    assert await said() == {"reload": 1}
    state = {"done": 4, "refused": 2, "last": result.to_json()}
    parent._do({"reloads": {**state, "refused": 7}})
    assert not going.done()
    parent._do({"reloads": state, "number": 1, "result": result.to_json()})
    assert await going == result
    assert (parent.done, parent.refused, parent.last) == (4, 2, result)


async def test_a_file_that_is_named_no_more_is_no_change(tmp_path):
    """A reload that drops a file is not followed by another one."""
    (tmp_path / "limit").write_text("1MiB")
    main = str(tmp_path / "x.yaml")
    before = loaded("server: {max_body: '${file:limit}'}", file=main, base=tmp_path)
    made, _, _ = reloader(lambda: loaded(file=main, base=tmp_path), before)
    await made.reload()
    made._changed()
    assert not made._changed()
