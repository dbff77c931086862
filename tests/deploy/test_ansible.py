"""deploy/ansible: a real Debian with its own systemd, provisioned from nothing by the playbook that is shipped."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.deploy import machine
from tests.integration.process import REPOSITORY
from tests.tools import CACHE

ANSIBLE = REPOSITORY / "deploy" / "ansible"
TOOLS = CACHE / "ansible"

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def tools():
    """Ansible and its friends in an environment of their own: they are as large as all that the gateway needs."""
    locked = REPOSITORY / "requirements" / "deploy.txt"
    stamp = TOOLS / ".done"
    if not stamp.exists() or stamp.read_text() != locked.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", TOOLS], check=True)
        install = ["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", locked]
        subprocess.run([TOOLS / "bin" / "python", "-m", "pip", *install], check=True)
        stamp.write_text(locked.read_text())
    return TOOLS / "bin"


def run(tools, *command, **env):
    """In deploy/ansible; what it printed, if it went well."""
    path = f"{tools}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NO_COLOR": "1", "ANSIBLE_FORCE_COLOR": "0", **env}
    done = subprocess.run(
        [tools / command[0], *command[1:]], cwd=ANSIBLE, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-10_000:]
    return done.stdout


def test_it_is_written_as_ansible_wants_it(tools):
    """ansible-lint has nothing to say by its strictest profile, and the example inventory is one."""
    run(tools, "ansible-lint", "--offline", "--profile", "production")
    run(tools, "ansible-playbook", "--syntax-check", "--inventory", "inventory.example.yml", "site.yml")


def test_a_machine_is_provisioned_upgraded_kept_from_a_bad_release_and_restored(tools):
    """From bare to answering over TLS; a second run changes nothing; under traffic a new release takes over and one that is
    not well does not, without one failed request; after a loss of all data the backup has keys and usage again."""
    with tempfile.TemporaryDirectory(prefix="xenios-test-vps-") as place:
        folder = Path(place)
        tree = folder / "machine"
        machine.fresh(tree)
        env = {"XENIOS_MACHINE": str(tree), "XENIOS_TEST_WHEEL": str(machine.wheel(folder))}
        try:
            run(tools, "molecule", "test", "--destroy", "always", **env)
        finally:
            subprocess.run([ANSIBLE / "molecule" / "machine", "down", tree], check=False)
