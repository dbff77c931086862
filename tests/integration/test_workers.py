"""`server.workers`: several real processes behind one port."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from tests.integration.process import MODULE, XENIOS, environment, serving, xenios

CONFIG = """
server: {{data_dir: ./data, workers: {workers}, drain_timeout: 10s}}
log: {{format: json}}
upstreams: {{openrouter: {{without_key: simulate}}}}
services: {{redis: embedded}}
plugins:
  - use: api_keys
  - use: rate_limit
    config: {{limits: [{{name: all, by: [], requests: {limit}, per: 1h}}]}}
"""
MODEL = "anthropic/claude-haiku-4.5"


def config(folder, workers=2, limit=100_000):
    path = folder / "x.yaml"
    path.write_text(CONFIG.format(workers=workers, limit=limit))
    return path


def children(parent):
    """pid → command line of all that this process started, and what these did."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            stat = (entry / "stat").read_text()
            if entry.name.isdigit() and int(stat.rpartition(")")[2].split()[1]) == parent:
                command = (entry / "cmdline").read_text().replace("\0", " ")
                found[int(entry.name)] = command
                found |= children(int(entry.name))
    return found


def workers(parent):
    return [pid for pid, command in children(parent).items() if "gateway.processes" in command]


def open_files(pid):
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def xenios_pid(folder):
    """Of the `xenios serve` whose data directory is there."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                command = (entry / "cmdline").read_text().split("\0")
                if "serve" in command:
                    return int(entry.name)
    raise AssertionError("no xenios serve runs there")


def alive(pid):
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def eventually(what, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.05)  # noqa: TID251 - other processes are looked at, which tell nobody
    raise AssertionError("it did not come about")


def fresh_chats(running, count):
    """Each over a connection of its own, eight at a time."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [a.status for a in pool.map(lambda _: running.chat(MODEL), range(count))]


def test_workers_share_a_port_a_key_and_their_limits(tmp_path):
    """Three workers answer on one port with one key, and together admit exactly what the limit says."""
    with serving(tmp_path, "--config", config(tmp_path, workers=3, limit=40)) as running:
        statuses = fresh_chats(running, 90)
        assert sorted(statuses) == [200] * 40 + [429] * 50
        parent = xenios_pid(tmp_path)
        assert len(workers(parent)) == 3
        assert sum("valkey-server" in command for command in children(parent).values()) == 1


def test_a_worker_that_can_not_be_started_is_tried_again(tmp_path):
    """A host that has no memory or no process left for a moment costs no worker for good: the place is filled later."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    env = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = (str(python), *MODULE[1:])
    with serving(tmp_path, "--config", config(tmp_path), env=env, command=command) as running:
        parent = xenios_pid(tmp_path)
        before, files = workers(parent), open_files(parent)
        python.rename(aside := python.with_name("aside"))
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: sum("worker_not_started" in line for line in running.said) >= 2, 20)
        assert set(fresh_chats(running, 10)) == {200}
        aside.rename(python)
        eventually(lambda: len(workers(parent)) == 2, 20)
        assert set(fresh_chats(running, 10)) == {200}
        eventually(lambda: open_files(parent) == files)


def test_a_worker_that_is_killed_is_replaced_while_others_serve(tmp_path):
    """kill -9 of one worker: every new connection is answered meanwhile, another takes its place, Valkey lives on."""
    with serving(tmp_path, "--config", config(tmp_path)) as running:
        parent = xenios_pid(tmp_path)
        [valkey] = [pid for pid, command in children(parent).items() if "valkey-server" in command]
        before = workers(parent)
        os.kill(before[0], signal.SIGKILL)
        assert set(fresh_chats(running, 40)) == {200}
        eventually(lambda: len(workers(parent)) == 2 and before[0] not in workers(parent))
        assert alive(valkey)
        assert set(fresh_chats(running, 20)) == {200}


def kill_valkey(parent):
    """kill -9, once the operating system has all that was counted; while a slow disk syncs, that takes a moment."""
    [(pid, command)] = [(pid, c) for pid, c in children(parent).items() if "valkey-server" in c]
    with redis.Redis(unix_socket_path=command.split("unixsocket:")[1].split()[0]) as valkey:
        eventually(lambda: valkey.info("persistence")["aof_buffer_length"] == 0)
        os.kill(pid, signal.SIGKILL)
    return pid


def test_an_embedded_valkey_that_is_killed_is_replaced(tmp_path):
    """kill -9 of the Valkey: it is started again with what it counted, and limits hold on."""
    with serving(tmp_path, "--config", config(tmp_path, limit=10)) as running:
        assert fresh_chats(running, 4) == [200] * 4
        parent = xenios_pid(tmp_path)

        def valkeys():
            return [pid for pid, command in children(parent).items() if "valkey-server" in command]

        first = kill_valkey(parent)
        eventually(lambda: valkeys() and valkeys() != [first])
        eventually(lambda: running.request("GET", "/health/ready").data["status"] == "ok")
        served = fresh_chats(running, 20).count(200)
        assert 5 <= served <= 6


def test_what_was_spent_outlives_a_killed_valkey(tmp_path):
    """A budget that is used up stays so when its Valkey is killed with -9 and started again."""
    file = config(tmp_path)
    budget = "{name: all, by: [], usd: 0.002, per: total}"
    file.write_text(file.read_text() + f"  - use: budgets\n    config: {{budgets: [{budget}]}}\n")
    body = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
    with serving(tmp_path, "--config", file) as running:

        def status():
            return running.request("POST", "/v1/chat/completions", body).status

        assert status() == 200
        eventually(lambda: status() == 429)
        first = kill_valkey(xenios_pid(tmp_path))
        eventually(lambda: status() == 503 or not alive(first))
        # of all workers, and each connection is taken by any of them
        eventually(lambda: {running.request("GET", "/health/ready").data["status"] for _ in range(20)} == {"ok"})
        assert {status() for _ in range(20)} == {429}


def open_stream(running):
    """A stream that goes on for seconds; its first event was read."""
    connection = http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=30)
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "word " * 300}]}
    headers = {"Authorization": f"Bearer {running.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    reply = connection.getresponse()
    assert reply.status == 200
    first = reply.readline()
    return connection, reply, first


def test_running_streams_end_well_when_the_gateway_stops(tmp_path):
    """TERM: streams on all workers go on to their clean end, new connections are refused, the exit code is 0."""
    with serving(tmp_path, "--config", config(tmp_path, workers=3)) as running:
        streams = [open_stream(running) for _ in range(12)]
        parent = xenios_pid(tmp_path)
        os.kill(parent, signal.SIGTERM)
        eventually(lambda: refused(running))
        for connection, reply, _ in streams:
            assert reply.read().endswith(b"data: [DONE]\n\n")
            connection.close()
        eventually(lambda: not alive(parent))


def refused(running):
    host, port = urlsplit(running.url).netloc.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # nobody had accepted it when the port was closed
        return False
    return False


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    """kill -9 of the parent: within seconds no worker and no Valkey is left."""
    command = [*XENIOS, "serve", "--config", config(tmp_path), "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stderr:
            if line.startswith("for chunk in stream"):
                break
        all_of_it = children(process.pid)
        assert len(all_of_it) == 3
        process.kill()
        process.wait()
        eventually(lambda: not any(alive(pid) for pid in all_of_it))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CONFIG.replace("embedded", "memory"), "several workers need services.redis to be embedded or an address"),
        (CONFIG.replace("requests: {limit}", "requests: -1"), "greater than or equal to 1"),
    ],
)
def test_what_can_not_be_served_is_said_once(tmp_path, text, said):
    """A configuration that would count apart, or is wrong, ends the start with one message and exit code 2."""
    path = tmp_path / "x.yaml"
    path.write_text(text.format(workers=4, limit=10))
    done = xenios("serve", "--config", path, "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count(said) == 1, done.stderr


def test_the_command_line_may_say_how_many(tmp_path):
    """`--workers 2` stands above the file; with `memory` it is refused."""
    one = config(tmp_path, workers=1)
    with serving(tmp_path, "--config", one, "--workers", "2") as running:
        assert len(workers(xenios_pid(tmp_path))) == 2
        assert running.chat(MODEL).status == 200
    one.write_text(one.read_text().replace("embedded", "memory"))
    done = xenios("serve", "--config", one, "--workers", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "several workers" in done.stderr
