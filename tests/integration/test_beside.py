"""Processes beside the gateway: a plugin's command that runs without a server, and those that `serve` keeps running."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from tests.integration.process import XENIOS, environment, serving, xenios
from tests.integration.test_workers import alive, children, eventually

PLUGIN = Path(__file__).with_name("beside.py")
CONFIG = """
server: {{data_dir: ./data, workers: {workers}, drain_timeout: 10s}}
log: {{format: json}}
upstreams: {{openrouter: {{without_key: simulate}}}}
services: {{redis: {redis}}}
plugins:
  - {{use: metrics, config: {{public: true}}}}
  - use: api_keys
  - {{use: ./beside.py:Plugin, config: {{embedded: {embedded}, word: {word}, arguments: [{arguments}]}}}}
"""


def config(folder, *, embedded="false", workers=1, redis="embedded", word="first", arguments=""):
    shutil.copy(PLUGIN, folder / "beside.py")
    path = folder / "x.yaml"
    made = CONFIG.format(embedded=embedded, workers=workers, redis=redis, word=word, arguments=arguments)
    side = folder / "x.new"
    side.write_text(made)
    side.replace(path)
    return path


def said(folder, what):
    """(word, pid) of each time that the command wrote this down."""
    with contextlib.suppress(FileNotFoundError):
        lines = (line.split() for line in (folder / "diary").read_text().splitlines())
        return [(word, int(pid)) for did, word, pid, *_ in lines if did == what]
    return []


def works(folder, count=1):
    """The pid of the command that began to work as this one."""
    eventually(lambda: len(said(folder, "works")) >= count, 20)
    return said(folder, "works")[count - 1][1]


@contextlib.contextmanager
def beside(folder, path, *arguments):
    """`xenios beside`, which is ended by TERM, and says so by exit code 0."""
    process = subprocess.Popen(
        [*XENIOS, "--config", str(path), "beside", *arguments],
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=20)
        assert process.returncode == 0, text
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def counted(running, name="xenios_beside_total"):
    text = running.request("GET", "/metrics", key=None).body.decode()
    found = re.search(rf"^{name} ([0-9.]+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def test_a_command_works_beside_a_gateway_with_its_stores_and_its_key(tmp_path):
    """Without the lock of the data directory, with the pepper and the embedded Valkey of the gateway that has it."""
    path = config(tmp_path)
    with serving(tmp_path, "--config", path), beside(tmp_path, path):
        pid = works(tmp_path)
        assert (tmp_path / "diary").read_text() == f"works first {pid} False redis\n"
    assert said(tmp_path, "ends") == [("first", pid)]


def test_what_it_counts_is_in_the_gateways_metrics_and_stays_when_it_is_killed(tmp_path):
    """Two of them at once, one killed and another in its place: the sum goes up by each, never down."""
    path = config(tmp_path)
    with serving(tmp_path, "--config", path) as running:
        with beside(tmp_path, path):
            works(tmp_path)
            with contextlib.suppress(AssertionError), beside(tmp_path, path):
                second = works(tmp_path, 2)
                eventually(lambda: counted(running) == 2)
                os.kill(second, signal.SIGKILL)
            assert counted(running) == 2
            with beside(tmp_path, path):
                works(tmp_path, 3)
                eventually(lambda: counted(running) == 3)
        assert counted(running) == 3


def test_a_gateway_that_starts_anew_counts_from_zero_also_what_goes_on_beside_it(tmp_path):
    """Prometheus takes a counter that begins above zero for so many new events."""
    path = config(tmp_path, redis="unix:///nowhere")
    with serving(tmp_path, "--config", path):
        pass
    with beside(tmp_path, path):
        works(tmp_path)
        eventually((tmp_path / "data" / "metrics" / "1001").exists)
        with serving(tmp_path, "--config", path) as running:
            assert counted(running) == 0
            with beside(tmp_path, path):
                works(tmp_path, 2)
                eventually(lambda: counted(running) == 1)


def test_it_says_what_is_missing(tmp_path):
    """No gateway has run there, none runs now, or limits are counted where no other process sees them."""
    path = config(tmp_path)
    first = xenios("--config", path, "beside", cwd=tmp_path)
    assert first.returncode == 1
    assert "no gateway has run there yet" in first.stderr
    assert not (tmp_path / "data" / "pepper").exists()
    with serving(tmp_path, "--config", path):
        pass
    second = xenios("--config", path, "beside", cwd=tmp_path)
    assert second.returncode == 2
    assert "No gateway runs with the data directory" in second.stderr
    third = xenios("--config", config(tmp_path, redis="memory"), "beside", cwd=tmp_path)
    assert third.returncode == 2
    assert "services.redis is memory" in third.stderr


def test_a_host_without_a_gateway_needs_the_pepper_alone(tmp_path):
    """A pepper and a Redis that are configured are enough: no data directory of a gateway."""
    path = config(tmp_path, redis="unix:///nowhere")
    path.write_text(path.read_text().replace("{data_dir", "{pepper: sixteen-or-more-characters, data_dir"))
    with beside(tmp_path, path):
        works(tmp_path)
    assert not (tmp_path / "data" / "pepper").exists()


def test_sighup_gives_it_the_new_configuration(tmp_path):
    """One that changes its plugin: the old one is asked to end, and the new one works on in the same process."""
    path = config(tmp_path, redis="unix:///nowhere")
    with serving(tmp_path, "--config", path):
        pass
    with beside(tmp_path, path) as process:
        pid = works(tmp_path)
        config(tmp_path, redis="unix:///nowhere", word="second")
        process.send_signal(signal.SIGHUP)
        assert works(tmp_path, 2) == pid
        assert said(tmp_path, "works")[1][0] == "second"
        assert said(tmp_path, "ends") == [("first", pid)]


def test_several_processes_of_a_command_are_kept_running(tmp_path):
    """`processes=2`: two work, one that is killed is replaced, and all end with their parent."""
    path = config(tmp_path, redis="unix:///nowhere")
    with serving(tmp_path, "--config", path):
        pass
    with beside(tmp_path, path, "--processes", "2") as parent:
        first, second = works(tmp_path), works(tmp_path, 2)
        assert first != second
        assert set(children(parent.pid)) == {first, second}
        os.kill(first, signal.SIGKILL)
        third = works(tmp_path, 3)
    eventually(lambda: not alive(second) and not alive(third))
    assert {pid for _, pid in said(tmp_path, "ends")} == {second, third}
