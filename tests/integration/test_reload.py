"""Reload of the real process: by SIGHUP, by `POST /admin/reload`, by a changed file; one worker and several."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys

import aiohttp
import pytest

from tests.integration.process import XENIOS, environment, serving, serving_beside
from tests.integration.test_workers import alive, eventually, workers

SWAP = pytest.mark.promise("P11.swap")
BAD = pytest.mark.promise("P11.bad_file")
HASH = pytest.mark.promise("P11.hash")

CONFIG = """\
server:
  data_dir: ./data
  workers: {workers}
  drain_timeout: 10s
  reload_timeout: 2s
log: {{format: json}}
upstream: {{connect_timeout: {patience}}}
upstreams:
  openrouter: {{without_key: simulate}}
services: {{redis: {redis}}}
plugins:
  - use: api_keys
  - use: rate_limit
    config: {{limits: [{{name: all, by: [], requests: {limit}, per: 1h}}]}}
"""
MODEL = "anthropic/claude-haiku-4.5"
PLUGIN = """
import asyncio, contextlib, os, pathlib

FOLDER = pathlib.Path(__file__).parent


class Plugin:
    reads_settings = ()

    def __init__(self, config, services): ...

    @contextlib.asynccontextmanager
    async def lifespan(self):
        {body}
        yield
"""


def write(folder, workers=1, limit=100_000, patience="60s", more=""):
    """The configuration, replaced as a whole."""
    redis = "memory" if workers == 1 else "embedded"
    side = folder / "x.yaml.new"
    side.write_text(CONFIG.format(workers=workers, limit=limit, patience=patience, redis=redis) + more)
    return side.rename(folder / "x.yaml")


def plugin(folder, name, body):
    (folder / f"{name}.py").write_text(PLUGIN.format(body=body))
    return f"  - use: ./{name}.py:Plugin\n"


def reload(running):
    return running.request("POST", "/admin/reload")


def about(running):
    """What `GET /admin/config` says of each worker that answers: number → answer."""
    found = {}
    for number in range(400):  # each on a connection of its own; a busy machine hands many in a row to one worker
        answer = running.request("GET", "/admin/config").data
        found[answer["worker"]] = answer
        if number >= 24 and len(found) >= len(workers(running.pid)):
            break
    return found


def hashes(running):
    """Of each worker, and of whichever is asked whether it is ready."""
    ready = {running.request("GET", "/health/ready").data["config"] for _ in range(8)}
    return {number: answer["config"] for number, answer in about(running).items()}, ready


def lines(running, event):
    logged = [json.loads(line) for line in list(running.said) if line.startswith("{")]
    return [line for line in logged if line["event"] == event]


def attempts(running):
    return len(lines(running, "config_reloaded")) + len(lines(running, "config_reload_failed"))


def hang_up(running):
    os.kill(running.pid, signal.SIGHUP)


# --- a thousand requests -------------------------------------------------------------------------------------------


class Load:
    """Requests that go on, half of them streams; what was wrong with any."""

    def __init__(self, running, total):
        self.running = running
        self.total = total
        self.allowed = self.begun = self.done = 0
        self.faults = []
        self.changed = asyncio.Condition()

    async def run(self, at_once):
        connector = aiohttp.TCPConnector(limit=at_once)
        headers = {"Authorization": f"Bearer {self.running.key}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            await asyncio.gather(*(self.worker(session) for _ in range(at_once)))

    async def worker(self, session):
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self.begun < self.allowed or self.begun == self.total)
            if self.begun == self.total:
                return
            self.begun += 1
            try:
                fault = await (self.stream(session) if self.begun % 2 else self.whole(session))
            except (aiohttp.ClientError, OSError) as error:
                fault = repr(error)
            self.faults += [fault] if fault else []
            self.done += 1
            async with self.changed:
                self.changed.notify_all()

    def post(self, session, model, **fields):
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **fields}
        return session.post(self.running.url + "/v1/chat/completions", json=body)

    async def whole(self, session):
        async with self.post(session, "xenios/sim-t20") as reply:
            body = await reply.json()
            return (
                None if reply.status == 200 and body["choices"][0]["finish_reason"] == "stop" else (reply.status, body)
            )

    async def stream(self, session):
        async with self.post(session, "xenios/sim-t20-n20-d15", stream=True) as reply:
            text = await reply.read()
            sound = reply.status == 200 and text.endswith(b"data: [DONE]\n\n") and text.count(b'"content":') >= 20
            return None if sound and b'"error"' not in text else (reply.status, text[-300:])

    async def up_to(self, count):
        """So many are let go; those that were let go before are over."""
        async with self.changed:
            before, self.allowed = self.allowed, count
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.done >= before and self.begun > before)


@SWAP
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.full), 2])
async def test_a_thousand_requests_while_the_configuration_changes_fifty_times(tmp_path, count):
    """1,000 requests, whole and streamed, during 50 reloads, 5 of them broken: none fails, no stream is dropped."""
    write(tmp_path, workers=count)
    async with serving_beside(tmp_path, "--config", tmp_path / "x.yaml") as running:
        load = Load(running, 1000)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run(20))
            for number in range(1, 51):
                await load.up_to(number * 20)
                broken = number % 10 == 0
                # another plugin, another upstream policy: instances and connections are replaced
                write(tmp_path, workers=count, limit="none" if broken else 100_000 + number, patience=f"{60 + number}s")
                if number % 5:
                    answer = await asyncio.to_thread(reload, running)
                    assert answer.status == 200, answer.body
                else:
                    hang_up(running)
                    await asyncio.to_thread(eventually, lambda number=number: attempts(running) == number)
        assert (load.done, load.faults) == (1000, [])
        told = await asyncio.to_thread(about, running)
        assert set(told) == set(range(1, count + 1))
        assert {(a["reloads"]["done"], a["reloads"]["refused"]) for a in told.values()} == {(45, 5)}
        assert len({a["config"] for a in told.values()}) == 1
    assert lines(running, "task_failed") == lines(running, "plugin_close_failed") == []


# --- a bad file ------------------------------------------------------------------------------------------------------


MISTAKES = [
    ("  - use: rate_limit", "  - use: [rate_limit", "    config: {limits", "not valid YAML"),
    ("requests:", "request:", "    config: {limits", "unknown key"),
    (
        "connect_timeout: 60s",
        "connect_timeout: '${NOT_THERE}'",
        "upstream:",
        "the environment variable NOT_THERE is not set",
    ),
    ("use: api_keys", "use: api_kees", "  - use: api_", "no plugin named 'api_kees' is installed"),
]


@BAD
@pytest.mark.parametrize("count", [1, 2])
def test_a_bad_file_leaves_the_old_one_serving(tmp_path, count):
    """Bad YAML, an unknown key, a missing variable, a plugin that isn't there: refused with file, line and reason, in the
    answer and in the log; the old configuration serves on."""
    file = write(tmp_path, workers=count)
    good = file.read_text()
    with serving(tmp_path, "--config", file) as running:
        before = hashes(running)
        for number, (old, new, stands, reason) in enumerate(MISTAKES, 1):
            bad = good.replace(old, new)
            file.write_text(bad)
            line = next(n for n, text in enumerate(bad.splitlines(), 1) if text.startswith(stands))
            answer = reload(running)
            assert answer.status == 409
            error = answer.data["error"]
            assert (error["code"], error["type"], error["param"]) == ("config_invalid", "invalid_request_error", None)
            problem = next(p for p in error["problems"] if reason in p["message"])
            assert (problem["file"], problem["line"]) == (str(file), line)
            assert f"{file}:{line}:" in error["message"]
            hang_up(running)
            eventually(lambda number=number: len(lines(running, "config_reload_failed")) == 2 * number)
            logged = lines(running, "config_reload_failed")[-1]
            assert logged["config"] == next(iter(before[1]))
            assert any(text.startswith(f"{file}:{line}:") and reason in text for text in logged["problems"])
            last = about(running)[1]["last_reload"]
            assert (last["status"], last["code"]) == ("refused", "config_invalid")
            assert problem in last["problems"]
            assert running.chat(MODEL).status == 200
        assert hashes(running) == before


def test_what_takes_effect_at_a_start_only_is_named(tmp_path):
    """Each such field with its line, and that a restart is needed; nothing else of the file is taken up meanwhile."""
    file = write(tmp_path)
    with serving(tmp_path, "--config", file) as running:
        changed = file.read_text().replace("./data", "./elsewhere").replace("100000", "5")
        changed = changed.replace("workers: 1", "workers: 3\n  host: 0.0.0.0\n  allow_anonymous: true")
        file.write_text(changed.replace("redis: memory", "redis: embedded") + "  # the end\n")
        error = reload(running).data["error"]
        assert error["code"] == "restart_needed"
        fields = {p["path"]: (p["line"], p["hint"]) for p in error["problems"]}
        assert set(fields) == {"server.data_dir", "server.workers", "server.host", "services.redis"}
        assert fields["server.data_dir"] == (2, "restart Xenios, or set it back")
        assert [running.chat(MODEL).status for _ in range(7)] == [200] * 7


def test_what_the_command_line_says_is_no_change(tmp_path):
    """A port given by `--port` stands above the file at each reload too."""
    with serving(tmp_path, "--config", write(tmp_path)) as running:  # serving gives --port 0
        assert reload(running).status == 200


# --- all workers or none ---------------------------------------------------------------------------------------------

TAKES_A_LOCK = """
        try:
            os.mkdir(FOLDER / "lock")
        except FileExistsError:
            raise RuntimeError("another has it, postgres://user:hunter2hunter2@host/db") from None
        try:
            yield
        finally:
            os.rmdir(FOLDER / "lock")
            (FOLDER / "closed").touch()
        return
"""


@SWAP
def test_one_worker_that_can_not_prepare_is_enough(tmp_path):
    """A plugin that opens in one of two workers only: none swaps, the plugin is named, what was open is closed."""
    file = write(tmp_path, workers=2)
    with serving(tmp_path, "--config", file) as running:
        before = hashes(running)
        write(tmp_path, workers=2, limit=5, more=plugin(tmp_path, "lonely", TAKES_A_LOCK.strip()))
        error = reload(running).data["error"]
        assert error["code"] == "reload_failed"
        [problem] = error["problems"]
        assert (problem["path"], problem["line"]) == ("plugins[2]", 15)
        assert "plugin lonely: lifespan failed: RuntimeError: another has it" in problem["message"]
        assert "hunter2" not in json.dumps(error) + "".join(running.said)
        assert hashes(running) == before
        assert [running.chat(MODEL).status for _ in range(10)] == [200] * 10
        eventually((tmp_path / "closed").exists)
        assert not (tmp_path / "lock").exists()


def test_a_plugin_that_hangs_is_named(tmp_path):
    """A lifespan that never opens: after `server.reload_timeout` nothing has changed, and the plugin is named."""
    file = write(tmp_path, workers=2)
    with serving(tmp_path, "--config", file) as running:
        before = hashes(running)
        write(tmp_path, workers=2, more=plugin(tmp_path, "endless", "await asyncio.Event().wait()"))
        [problem] = reload(running).data["error"]["problems"]
        assert problem["path"] == "plugins[2]"
        assert "plugin endless" in problem["message"]
        assert "not open after 2 s" in problem["message"]
        assert hashes(running) == before
        write(tmp_path, workers=2, limit=7)
        assert reload(running).status == 200


@HASH
def test_each_worker_reports_the_same(tmp_path):
    """The hash of each worker is the same, after each reload another one; also of a worker that was killed meanwhile."""
    write(tmp_path, workers=3)
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        seen = []
        for limit in (None, 200, 300):
            if limit:
                write(tmp_path, workers=3, limit=limit)
                answer = reload(running)
                assert answer.data["config"] not in seen
            by_worker, ready = hashes(running)
            assert sorted(by_worker) == [1, 2, 3]
            assert {*by_worker.values()} == ready
            seen += ready
        assert [line["config"] for line in lines(running, "config_reloaded")] == seen[1:]
        assert len(set(seen)) == 3
        for pid in workers(running.pid):
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: len(workers(running.pid)) == 3 and pid not in workers(running.pid))
        eventually(lambda: len(about(running)) == 3)
        assert hashes(running) == (dict.fromkeys([1, 2, 3], seen[-1]), {seen[-1]})
        told = about(running)
        assert {a["last_reload"]["config"] for a in told.values()} == {seen[-1]}
        assert {a["reloads"]["done"] for a in told.values()} == {2}


def test_a_worker_that_dies_while_it_prepares(tmp_path):
    """kill -9 in the middle of a reload: none swaps, its replacement begins with the old configuration; the next reload works."""
    write(tmp_path, workers=2)
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        before = hashes(running)
        victim = workers(running.pid)[0]
        body = f"if os.getpid() == {victim}: os.kill({victim}, 9)"
        write(tmp_path, workers=2, more=plugin(tmp_path, "deadly", body))
        [problem] = reload_anyhow(running)["problems"]
        assert "ended while it prepared" in problem["message"]
        eventually(lambda: len(workers(running.pid)) == 2 and not alive(victim))
        eventually(lambda: len(about(running)) == 2)
        assert hashes(running) == before
        assert reload(running).status == 200
        assert hashes(running) != before


def reload_anyhow(running):
    """Asked of the parent; a worker that is asked may be the one that dies."""
    hang_up(running)
    eventually(lambda: lines(running, "config_reload_failed"))
    return next(a["last_reload"] for a in about(running).values() if a["last_reload"])


# --- who may ask, and what is shown ----------------------------------------------------------------------------------

CANARIES = ["canary-upstream-key", "canary-header", "canary-password", "canary-of-a-plugin", "canary-in-a-file"]


def test_the_configuration_is_shown_without_secrets(tmp_path):
    """`/admin/config`: effective settings, defaults too; every secret masked, wherever it came from."""
    (tmp_path / "secret").write_text(CANARIES[4])
    more = (
        "  - use: jwt_auth\n    config:\n      issuers: [{issuer: https://login.example.com, audience: x, secret: "
        f"{CANARIES[3]}-{CANARIES[3]}}}]\n"
    )
    file = write(tmp_path, more=more)
    text = file.read_text().replace(
        "openrouter: {without_key: simulate}",
        "openrouter: {without_key: simulate}\n"
        f"  a: {{kind: openai, base_url: 'http://127.0.0.1:9', api_key: '${{KEY}}', headers: {{x-y: {CANARIES[1]}}}}}\n"
        "  b: {kind: openai, base_url: 'http://127.0.0.1:9', api_key: '${file:secret}'}",
    )
    text = text.replace("redis: memory", f"redis: memory, database: 'postgresql://u:{CANARIES[2]}@127.0.0.1:9/x'")
    file.write_text(text)
    with serving(tmp_path, "--config", file, env={"KEY": CANARIES[0]}) as running:
        answer = running.request("GET", "/admin/config")
        assert answer.status == 200
        for canary in CANARIES:
            assert canary not in answer.body.decode()
        data = answer.data
        assert data["file"] == str(file)
        assert data["config"] == running.request("GET", "/health/ready").data["config"]
        assert data["reloads"] == {"done": 0, "refused": 0}
        assert data["last_reload"] is None
        assert data["settings"]["server"]["request_timeout"] == "10m"
        assert data["settings"]["plugins"][1]["config"]["limits"][0]["requests"] == 100_000
        assert data["settings"]["upstreams"]["a"]["headers"] == {"x-y": "**********"}
        file.write_text(file.read_text().replace("requests:", f"request: {CANARIES[0]}, requests:") + "  - use: nope\n")
        refused = reload(running)
        assert refused.status == 409
        for canary in CANARIES:
            assert canary not in refused.body.decode() + "".join(running.said)


def test_only_administrators_may(tmp_path):
    """Without a key 401, with a plain one 403; nothing is reloaded."""
    more = ""
    file = write(tmp_path, more=more)
    key = "sk-plain-key-of-somebody-0123456789"
    file.write_text(
        file.read_text().replace("use: api_keys", "use: api_keys\n    config: {keys: [{id: plain, env: PLAIN}]}")
    )
    with serving(tmp_path, "--config", file, env={"PLAIN": key}) as running:
        for method, path in (("POST", "/admin/reload"), ("GET", "/admin/config")):
            assert running.request(method, path, key=None).status == 401
            assert running.request(method, path, key=key).status == 403
        assert running.request("GET", "/admin/config").data["reloads"]["done"] == 0


# --- how it can be asked for -----------------------------------------------------------------------------------------


def test_a_worker_that_is_started_again_has_what_the_others_have(tmp_path):
    """A plugin's file that was edited meanwhile, even badly, waits for a reload: all workers run one configuration."""
    write(tmp_path, workers=2, more=plugin(tmp_path, "mine", "pass"))
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        _, before = hashes(running)
        for body in ("pass  # changed", "syntax error("):
            plugin(tmp_path, "mine", body)
            victim = workers(running.pid)[0]
            os.kill(victim, signal.SIGKILL)
            eventually(lambda pid=victim: not alive(pid))
            eventually(lambda: len(about(running)) == 2)
            each, ready = hashes(running)
            assert set(each.values()) == ready == before
        plugin(tmp_path, "mine", "pass  # changed")
        assert reload(running).status == 200
        assert hashes(running)[1].isdisjoint(before)


def test_a_worker_that_can_not_start_again_says_why(tmp_path):
    """A plugin that fails when its worker is started again is named in a line, not in a traceback."""
    body = "if (FOLDER / 'no').exists(): raise RuntimeError('it said no')"
    write(tmp_path, workers=2, more=plugin(tmp_path, "mine", body))
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        (tmp_path / "no").touch()
        os.kill(workers(running.pid)[0], signal.SIGKILL)
        eventually(lambda: any("xenios: plugin mine: lifespan failed" in line for line in list(running.said)))
        eventually(lambda: 2 in {line["code"] for line in lines(running, "worker_ended")})
        (tmp_path / "no").unlink()
        eventually(lambda: len(about(running)) == 2)
        assert not [line for line in running.said if "Traceback" in line]


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.full), 2])
def test_changed_files_are_taken_up(tmp_path, count):
    """`server.watch_config`: the file, a file that it names, and a plugin's file; each change once."""
    (tmp_path / "limit").write_text("100000\n")
    more = plugin(tmp_path, "mine", "pass")
    write(tmp_path, workers=count, limit="'${file:limit}'", more=more)
    watched = (tmp_path / "x.yaml").read_text().replace("server:", "server:\n  watch_config: true")
    (tmp_path / "x.yaml").write_text(watched)
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        seen = [running.request("GET", "/health/ready").data["config"]]

        def another():
            now = {line["config"] for line in lines(running, "config_reloaded")} - set(seen)
            seen.extend(now)
            return now

        (tmp_path / "limit").write_text("5\n")
        eventually(another)
        assert 429 in {running.chat(MODEL).status for _ in range(7)}
        plugin(tmp_path, "mine", "pass  # changed")
        eventually(another)
        (tmp_path / "x.yaml").write_text(watched.replace("60s", "61s"))
        eventually(another)
        (tmp_path / "limit").write_text("none\n")
        eventually(lambda: lines(running, "config_reload_failed"))
        (tmp_path / "limit").write_text("6\n")
        eventually(another)
        assert len(lines(running, "config_reload_failed")) == 1
        assert len(lines(running, "config_reloaded")) == 4


def test_a_signal_to_a_worker_is_passed_on(tmp_path):
    """SIGHUP that hits a worker instead of the parent reloads all of them."""
    write(tmp_path, workers=2)
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        os.kill(workers(running.pid)[0], signal.SIGHUP)
        eventually(lambda: lines(running, "config_reloaded"))
        assert {a["reloads"]["done"] for a in about(running).values()} == {1}


def test_an_embedded_valkey_and_the_counts_stay(tmp_path):
    """Over reloads limits go on counting where they were."""
    write(tmp_path, workers=2, limit=6)
    with serving(tmp_path, "--config", tmp_path / "x.yaml") as running:
        assert [running.chat(MODEL).status for _ in range(4)] == [200] * 4
        write(tmp_path, workers=2, limit=6, patience="61s")
        assert reload(running).status == 200
        assert [running.chat(MODEL).status for _ in range(4)] == [200, 200, 429, 429]


def test_a_closed_terminal_ends_it(tmp_path):
    """SIGHUP because the terminal was closed means the end, as it did before there was a reload."""
    write(tmp_path)
    ours, theirs = pty.openpty()

    # the new session's first terminal becomes its own, as `ioctl` says
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", take, *XENIOS, "serve", "--config", "x.yaml", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    try:
        os.close(theirs)
        said = b""
        while b"for chunk in stream" not in said:
            said += os.read(ours, 4096)
        os.kill(process.pid, signal.SIGHUP)
        while b"config_reloaded" not in said:
            said += os.read(ours, 4096)
        assert process.poll() is None
        os.close(ours)
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
