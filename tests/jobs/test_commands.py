"""`xenios worker` and `xenios queues`, as processes beside a gateway."""

import json
import os
import re
import signal
import socket

import pytest

from gateway_plugins.jobs.queue import QueueState
from gateway_plugins.jobs.worker_commands import _table
from tests.integration.process import command, serving, xenios
from tests.integration.test_workers import children, eventually

CONFIG = """
server: {{data_dir: ./data, drain_timeout: 10s}}
log: {{format: json}}
upstreams: {{openrouter: {{without_key: simulate}}}}
services: {{redis: embedded, database: {{migrate_on_start: true}}}}
plugins:
  - {{use: metrics, config: {{public: true}}}}
  - use: api_keys
  - use: routing
  - use: jobs
    config: {{worker: {{embedded: {embedded}, lease: 5s, grace: 2s}}, queues: {{audio: {{concurrency: 2}}}}}}
"""


def config(folder, *, embedded="false"):
    path = folder / "x.yaml"
    path.write_text(CONFIG.format(embedded=embedded))
    return path


def queues(folder):
    shown = xenios("--config", folder / "x.yaml", "queues", "--json", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    return {state["name"]: state for state in json.loads(shown.stdout)}


def later(running, model="anthropic/claude-haiku-4.5"):
    """The path of a job."""
    answer = running.chat(model, headers={"Prefer": "respond-async"})
    assert answer.status == 202, answer.body
    return answer.headers["location"]


def status(running, path):
    return running.request("GET", path).data["status"]


def metric(running, name):
    """Of each series its value."""
    text = running.request("GET", "/metrics", key=None).body.decode()
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(\S*) ([0-9.e+]+)$", text, re.MULTILINE)}


def test_serve_runs_a_worker_beside_itself(tmp_path):
    """With `worker.embedded` nothing else need be started: a job is done, and the gateway's metrics tell of queue,
    worker and job.
    """
    path = config(tmp_path, embedded="true")
    with serving(tmp_path, "--config", path) as running:
        job = later(running)
        eventually(lambda: status(running, job) == "succeeded", 30)
        eventually(lambda: metric(running, "xenios_job_workers").get('{queue="default"}') == 1, 20)
        assert metric(running, "xenios_jobs_waiting")['{priority="normal",queue="default"}'] == 0
        assert metric(running, "xenios_jobs_running")['{queue="audio"}'] == 0
        eventually(
            lambda: metric(running, "xenios_jobs_seconds_count").get('{outcome="succeeded",queue="default"}') == 1, 10
        )


@pytest.mark.full
def test_jobs_wait_for_a_worker_and_queues_shows_them(tmp_path):
    """Without a worker a job waits, and `xenios queues` shows it; `--burst` does what waits, and ends; a queue that is not
    there is an error that names those that are.
    """
    path = config(tmp_path)
    with serving(tmp_path, "--config", path) as running:
        job = later(running)
        assert queues(tmp_path)["default"]["waiting"] == 1
        wrong = xenios("--config", path, "worker", "--queues", "vidoe", cwd=tmp_path)
        assert wrong.returncode == 1
        assert "No such queue: vidoe. There are default, audio" in wrong.stderr
        assert xenios("--config", path, "worker", "--burst", cwd=tmp_path).returncode == 0
        assert status(running, job) == "succeeded"


def test_the_table_of_queues():
    """What stands in a column stands below its name, and nothing in `oldest` where nothing waits."""
    states = [QueueState("default", 1200, 3, 0, 12, 75.4, 2), QueueState("audio")]
    assert _table(states).splitlines() == [
        "queue    waiting  running  scheduled  failed  oldest  workers",
        "default     1200        3          0      12     75s        2",
        "audio          0        0          0       0                0",
    ]


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.full)])
def test_systemd_is_told_of_a_worker(tmp_path, monkeypatch, processes):
    """`Type=notify` for `xenios worker` too: ready once it runs jobs, alive, stopping when it is asked to end."""
    path = config(tmp_path)
    with serving(tmp_path, "--config", path), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000000")
        with command(tmp_path, "--config", path, "worker", "--processes", processes):
            said = told.recv(4096).decode().splitlines()
            assert said[0] == "READY=1"
            assert said[1].startswith("STATUS=configuration " if processes == "1" else "STATUS=2 processes")
            assert told.recv(4096) == b"WATCHDOG=1"
        assert told.recv(4096) == b"STOPPING=1"
        told.setblocking(False)
        with pytest.raises(BlockingIOError):  # the processes of one say nothing themselves
            told.recv(4096)


@pytest.mark.full
def test_of_several_processes_one_that_is_killed_is_replaced(tmp_path):
    """`--processes 2` keeps two that run jobs: one that is killed is started again, and all end with their parent."""
    path = config(tmp_path)
    with (
        serving(tmp_path, "--config", path) as running,
        command(tmp_path, "--config", path, "worker", "--processes", "2") as parent,
    ):
        eventually(lambda: queues(tmp_path)["default"]["workers"] == 2, 60)
        first = sorted(children(parent.pid))
        os.kill(first[0], signal.SIGKILL)
        eventually(lambda: len(children(parent.pid)) == 2 and sorted(children(parent.pid)) != first, 30)
        job = later(running)
        eventually(lambda: status(running, job) == "succeeded", 30)
