"""deploy/compose.yaml, compose.dev.yaml and the Dockerfile, as their own tools read them; no engine is needed."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.prometheus import promtool
from tests.deploy.test_rules import DEPLOY
from tests.integration.process import REPOSITORY, environment, xenios

TOOLS = Path(sys.executable).parent
OWN = {"migrate", "gateway", "worker"}


def run(tool, *args, **variables):
    done = subprocess.run(
        [TOOLS / tool, *args],
        env=environment({"HOME": "/nowhere", **variables}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def compose(file, *args, **variables):
    return run("docker-compose", "--file", DEPLOY / file, "--profile", "*", "config", *args, **variables)


@pytest.fixture(scope="module")
def services():
    return json.loads(compose("compose.yaml", "--format", "json"))["services"]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """What compose/secrets.sh makes, beside a copy of it."""
    folder = tmp_path_factory.mktemp("deploy")
    (folder / "compose").mkdir()
    script = folder / "compose/secrets.sh"
    script.write_bytes((DEPLOY / "compose/secrets.sh").read_bytes())
    subprocess.run(["sh", script], env={"PATH": "/usr/bin:/bin", "OPENROUTER_API_KEY": "sk-or-test"}, check=True)
    return folder / "secrets"


def test_the_dockerfile_is_clean():
    """hadolint finds nothing."""
    subprocess.run([TOOLS / "hadolint", DEPLOY / "docker/Dockerfile"], check=True)


@pytest.mark.parametrize("file", ["compose.yaml", "compose.dev.yaml"])
def test_compose_takes_the_file_and_all_that_it_mounts_is_there(file):
    """Nobody is left with an empty folder in the place of a file."""
    compose(file, "--quiet")
    model = json.loads(compose(file, "--format", "json"))
    mounted = [Path(c["file"]) for c in model.get("configs", {}).values()]
    for service in model["services"].values():
        mounted += [Path(v["source"]) for v in service.get("volumes", ()) if v["type"] == "bind"]
        mounted += [Path(watch["path"]) for watch in service.get("develop", {}).get("watch", ())]
        if "build" in service:
            mounted.append(Path(service["build"]["context"]) / service["build"]["dockerfile"])
    assert [path for path in mounted if not path.exists()] == []


def test_no_service_may_do_more_than_it_must(services):
    """Read-only, without capabilities, within limits, of one version, open to this machine alone."""
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"]["max-size"], name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ())), name
        if name != "migrate":
            limits = service["deploy"]["resources"]["limits"]
            assert limits["cpus"], name
            assert limits["memory"], name
        if name not in OWN:
            assert service["image"].partition(":")[2] not in {"", "latest"}, name


def test_a_service_tells_whether_it_is_well(services):
    """The image of the gateway says how itself; nobody can ask those two that have no shell, or listen nowhere."""
    without = {
        name for name, s in services.items() if s.get("healthcheck", {}).get("disable") or "healthcheck" not in s
    }
    assert without == {"gateway", "migrate", "worker", "collector"}
    assert "HEALTHCHECK" in (DEPLOY / "docker/Dockerfile").read_text()


def test_stores_are_reached_by_the_gateway_alone(services):
    """They have a network of their own that leads nowhere."""
    on = {name: set(service["networks"]) for name, service in services.items()}
    assert on["valkey"] == on["postgres"] == {"stores"}
    assert {name for name, networks in on.items() if "stores" in networks} == {"valkey", "postgres", *OWN}
    assert json.loads(compose("compose.yaml", "--format", "json"))["networks"]["stores"]["internal"]


def test_each_secret_is_made_once_and_is_a_file(services, secrets):
    """All that services ask for is there, no other user of the machine gets at it, and a second run changes nothing."""
    wanted = {one["source"] for service in services.values() for one in service.get("secrets", ())}
    assert {file.name for file in secrets.iterdir()} == wanted
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o444}
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    subprocess.run(["sh", secrets.parent / "compose/secrets.sh"], env={"PATH": "/usr/bin:/bin"}, check=True)
    assert {file.name: file.read_text() for file in secrets.iterdir()} == before
    assert len(set(before.values())) == len(before)
    told = json.dumps(services)
    assert not [name for name, value in before.items() if value in told]


def test_without_a_key_of_openrouter_no_secrets_are_made(tmp_path):
    """It says what is missing."""
    (tmp_path / "compose").mkdir()
    script = tmp_path / "compose/secrets.sh"
    script.write_bytes((DEPLOY / "compose/secrets.sh").read_bytes())
    done = subprocess.run(["sh", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "OPENROUTER_API_KEY" in done.stderr


def test_the_configuration_is_complete_with_these_secrets(services, secrets, tmp_path):
    """`xenios check` misses nothing in what the gateway is given, the one to work with too."""
    variables = {
        name: value.replace("/run/secrets", str(secrets)) for name, value in services["gateway"]["environment"].items()
    }
    checked = xenios("check", "--config", REPOSITORY / "config/production.yaml", cwd=tmp_path, env=variables)
    assert checked.returncode == 0, checked.stderr
    dev = xenios("check", "--config", DEPLOY / "compose/dev/xenios.yaml", cwd=tmp_path, env={"XENIOS_DATA_DIR": "data"})
    assert dev.returncode == 0, dev.stderr


def test_prometheus_finds_the_gateway_and_its_files(services, tmp_path):
    """promtool takes the configuration with all that compose mounts beside it; the gateway answers to the name in it."""
    model = json.loads(compose("compose.yaml", "--format", "json"))
    for one in services["prometheus"]["configs"]:
        source = Path(model["configs"][one["source"]]["file"])
        (tmp_path / Path(one["target"]).name).write_bytes(source.read_bytes())
    for one in services["prometheus"]["secrets"]:
        (tmp_path / Path(one["target"]).name).write_text("token")
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    aliases = services["gateway"]["networks"]["outer"]["aliases"]
    assert f"[{aliases[0]}:8080]" in (tmp_path / "prometheus.yml").read_text()


def test_the_port_is_this_machines_to_choose():
    """`XENIOS_PORT` is where it is reached, by this machine alone; the containers know nothing of it."""
    [port] = json.loads(compose("compose.yaml", "--format", "json", XENIOS_PORT="18080"))["services"]["gateway"][
        "ports"
    ]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "18080", 8080)


def test_the_readme_types_options_that_compose_has():
    """As far as it can be asked without an engine."""
    for line in (DEPLOY / "docker/README.md").read_text().splitlines():
        if line.startswith("docker compose "):
            words = shlex.split(line)
            command = next(word for word in words if word in {"up", "run", "exec", "restart"})
            helped = run("docker-compose", command, "--help")
            typed = [word for word in words[words.index(command) :] if word.startswith("--")]
            assert command == "exec" or [option for option in typed if option not in helped] == []


def test_both_readmes_begin_with_the_same_commands():
    """What `make test-deploy` types from the one is what the other says, too."""
    told = [
        re.search(r"```sh\n(docker build .*?)```", file.read_text(), re.DOTALL)[1].splitlines()
        for file in (REPOSITORY / "README.md", DEPLOY / "docker/README.md")
    ]
    assert told[0][: len(told[1])] == told[1]
    assert set(told[0]) <= set((DEPLOY / "docker/README.md").read_text().splitlines())
