"""Processes beside the gateway: a plugin's command that runs without a server, and those that `serve` keeps running."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.process import XENIOS, command, environment, serving, xenios
from tests.integration.test_workers import MODEL, alive, children, eventually

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


def counted(running, name="xenios_beside_total"):
    text = running.request("GET", "/metrics", key=None).body.decode()
    found = re.search(rf"^{name} ([0-9.]+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def test_a_command_works_beside_a_gateway_with_its_stores_and_its_key(tmp_path):
    """Without the lock of the data directory, with the pepper and the embedded Valkey of the gateway that has it."""
    path = config(tmp_path)
    with serving(tmp_path, "--config", path), command(tmp_path, "--config", path, "beside"):
        pid = works(tmp_path)
        assert (tmp_path / "diary").read_text() == f"works first {pid} False redis\n"
    assert said(tmp_path, "ends") == [("first", pid)]


@pytest.mark.full
def test_what_it_counts_is_in_the_gateways_metrics_and_stays_when_it_is_killed(tmp_path):
    """Two of them at once, one killed and another in its place: the sum goes up by each, never down."""
    path = config(tmp_path)
    with serving(tmp_path, "--config", path) as running:
        with command(tmp_path, "--config", path, "beside"):
            works(tmp_path)
            with contextlib.suppress(AssertionError), command(tmp_path, "--config", path, "beside"):
                second = works(tmp_path, 2)
                eventually(lambda: counted(running) == 2)
                os.kill(second, signal.SIGKILL)
            assert counted(running) == 2
            with command(tmp_path, "--config", path, "beside"):
                works(tmp_path, 3)
                eventually(lambda: counted(running) == 3)
        assert counted(running) == 3


@pytest.mark.full
def test_a_gateway_that_starts_anew_counts_from_zero_also_what_goes_on_beside_it(tmp_path):
    """Prometheus takes a counter that begins above zero for so many new events."""
    path = config(tmp_path, redis="unix:///nowhere")
    with serving(tmp_path, "--config", path):
        pass
    with command(tmp_path, "--config", path, "beside"):
        works(tmp_path)
        eventually((tmp_path / "data" / "metrics" / "1001").exists)
        with serving(tmp_path, "--config", path) as running:
            assert counted(running) == 0
            with command(tmp_path, "--config", path, "beside"):
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
    with command(tmp_path, "--config", path, "beside"):
        works(tmp_path)
    assert not (tmp_path / "data" / "pepper").exists()


def test_sighup_gives_it_the_new_configuration(tmp_path):
    """One that changes its plugin: the old one is asked to end, and the new one works on in the same process."""
    path = config(tmp_path, redis="unix:///nowhere")
    with serving(tmp_path, "--config", path):
        pass
    with command(tmp_path, "--config", path, "beside") as process:
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
    with command(tmp_path, "--config", path, "beside", "--processes", "2") as parent:
        first, second = works(tmp_path), works(tmp_path, 2)
        assert first != second
        assert set(children(parent.pid)) == {first, second}
        os.kill(first, signal.SIGKILL)
        third = works(tmp_path, 3)
    eventually(lambda: not alive(second) and not alive(third))
    assert {pid for _, pid in said(tmp_path, "ends")} == {second, third}


# --- companions -------------------------------------------------------------------------------------------------------


def companions(pid):
    return {child for child, command in children(pid).items() if "gateway.companions" in command}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_companion_is_kept_running_beside_the_gateway_and_ends_with_it(tmp_path, workers):
    """One, however many workers serve, with the configuration of the gateway; TERM to the gateway ends both in order."""
    path = config(tmp_path, embedded="true", workers=workers)
    with serving(tmp_path, "--config", path) as running:
        pid = works(tmp_path)
        assert companions(running.pid) == {pid}
        assert running.chat(MODEL).status == 200
        eventually(lambda: counted(running) == 1)
    assert said(tmp_path, "works") == said(tmp_path, "ends") == [("first", pid)]
    assert not alive(pid)


def test_a_companion_that_is_killed_is_started_again(tmp_path):
    """The gateway serves on, and says that it ended."""
    with serving(tmp_path, "--config", config(tmp_path, embedded="true")) as running:
        first = works(tmp_path)
        os.kill(first, signal.SIGKILL)
        second = works(tmp_path, 2)
        assert companions(running.pid) == {second}
        [ended] = [line for line in running.said if "companion_ended" in line]
        assert json.loads(ended) | {"plugin": "beside", "pid": first, "code": -9} == json.loads(ended)


def test_a_companion_ends_with_a_gateway_that_is_killed(tmp_path):
    """kill -9 of the gateway leaves nothing behind: it ends in order, as by TERM."""
    with (
        contextlib.suppress(AssertionError),
        serving(tmp_path, "--config", config(tmp_path, embedded="true")) as running,
    ):
        pid = works(tmp_path)
        os.kill(running.pid, signal.SIGKILL)
    eventually(lambda: not alive(pid))
    assert said(tmp_path, "ends") == [("first", pid)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_companion_gets_what_is_in_force_after_a_reload(tmp_path, workers):
    """A change of its plugin, in the same process; none where another one's was changed or the file is wrong; another
    command is another process; none wanted any more ends it.
    """

    def reload(**changes):
        config(tmp_path, workers=workers, **changes)
        return running.request("POST", "/admin/reload").status

    with serving(tmp_path, "--config", config(tmp_path, embedded="true", workers=workers)) as running:
        first = works(tmp_path)
        assert reload(embedded="true", word="second") == 200
        assert works(tmp_path, 2) == first
        assert reload(embedded="nonsense", word="wrong") == 409
        os.kill(first, signal.SIGHUP)  # is none of its business: the file is wrong by now
        os.kill(first, signal.SIGKILL)
        second = works(tmp_path, 3)  # with the text in force, not with the file
        assert reload(embedded="true", word="third", arguments="--processes, '2'") == 200
        works(tmp_path, 5)
        assert {word for word, _ in said(tmp_path, "works")[3:]} == {"third"}
        eventually(lambda: not alive(second))
        assert len(companions(running.pid)) == 3  # one that keeps two
        assert reload(embedded="false") == 200
        eventually(lambda: companions(running.pid) == set())
    assert [word for word, _ in said(tmp_path, "works")] == ["first", "second", "second", "third", "third"]
    assert [word for word, _ in said(tmp_path, "ends")] == ["first", "second", "third", "third"]


def test_a_companion_keeps_no_configuration_of_before(tmp_path):
    """However many reloads there were: each would stay in memory, a hundred kilobytes and more, until it ends."""
    with serving(tmp_path, "--config", config(tmp_path, embedded="true")) as running:
        for n in range(1, 9):
            works(tmp_path, n)
            config(tmp_path, embedded="true", word=f"w{n}")
            assert running.request("POST", "/admin/reload").status == 200
        works(tmp_path, 9)
        eventually(lambda: len((tmp_path / "configurations").read_text().split()) == 9)
    held = [int(number) for number in (tmp_path / "configurations").read_text().split()]
    assert held[8] <= held[2]


@pytest.mark.full
def test_a_companion_that_can_not_start_does_not_hold_up_the_gateway(tmp_path):
    """It is tried again, after longer and longer waits; requests are answered meanwhile."""
    path = config(tmp_path, embedded="true", arguments="--fail")
    with serving(tmp_path, "--config", path) as running:
        eventually(lambda: sum("companion_ended" in line for line in running.said) >= 2, 20)
        assert running.chat(MODEL).status == 200
        waits = [json.loads(line)["again_in_seconds"] for line in running.said if "companion_ended" in line]
        assert waits == sorted(waits)
        assert any("as asked" in line for line in running.said)


@pytest.mark.full
def test_ctrl_c_ends_both(tmp_path):
    """INT goes to the gateway alone, which ends its companion in order."""
    process = subprocess.Popen(
        [*XENIOS, "serve", "--config", str(config(tmp_path, embedded="true")), "--port", "0"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        pid = works(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert said(tmp_path, "ends") == [("first", pid)]
