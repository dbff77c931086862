"""deploy/docker/README.md from nothing to the first answer: each command typed as shown, on the services of compose.yaml."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.deploy import composed
from tests.deploy.containers import Mount, Spec, network
from tests.deploy.test_rules import DEPLOY
from tests.integration.process import REPOSITORY

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

README = (DEPLOY / "docker/README.md").read_text()


def commands(heading):
    """The lines of a section that are to be typed."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]


class Typist:
    """A shell in which `docker` is us: the image is there, and services start without an engine."""

    def __init__(self, copy, image, net, folder):
        self.variables = {"PATH": os.environ["PATH"]}
        self.said: list[str] = []
        self._copy, self._image, self._net, self._folder = copy, image, net, folder
        self.composed = None

    def type(self, line):
        words = shlex.split(line)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            value = re.search(r"sk-xenios-\w+", self.said[-1])[0] if value == "sk-xenios-..." else value
            self.variables[name] = value
        elif words[:2] == ["docker", "build"]:
            assert words[2:] == ["--file", "deploy/docker/Dockerfile", "--tag", "xenios", "."]  # as `image` was
        elif words[:3] == ["docker", "compose", "up"]:
            self._up()
        elif words[:3] == ["docker", "compose", "exec"]:
            done = self.composed.running[words[3]].run(words[4:])
            assert done.returncode == 0, f"{line}: {done.stderr}"
            self.said.append(done.stdout)
        else:
            done = self._net.run(["sh", "-c", line], self._copy, self.variables)
            assert done.returncode == 0, f"{line}: {done.stdout} {done.stderr}"
            self.said.append(done.stdout)

    def _up(self):
        model = composed.model(self._copy / self.variables["COMPOSE_FILE"], **self.variables)
        xenios = model["configs"]["xenios"]  # its OpenRouter is a simulation
        text = Path(xenios["file"]).read_text()
        xenios["file"] = str(self._folder / "xenios.yaml")
        moved = text.replace("  openrouter:\n", "  openrouter:\n    base_url: http://simulator:9999/api/v1\n", 1)
        (self._folder / "xenios.yaml").write_text(moved)
        assert set(model["services"]) == {"migrate", "gateway", "worker", "valkey", "postgres", "prometheus", "grafana"}
        self.composed = composed.Composed(model, self._net, self._image, self._folder)
        self.composed.up(*(name for name in model["services"] if name != "grafana"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A clone, as far as these commands need it."""
    place = tmp_path_factory.mktemp("clone")
    shutil.copytree(DEPLOY, place / "deploy", ignore=shutil.ignore_patterns("secrets"))
    shutil.copytree(REPOSITORY / "config", place / "config")
    return place


@pytest.fixture(scope="module")
def typist(copy, image, tmp_path_factory):
    """After the commands of the first section."""
    folder = tmp_path_factory.mktemp("composed")
    with network(folder, "simulator", *composed.names(composed.model(copy / "deploy/compose.yaml"))) as net:
        spec = Spec(image.command(["simulate", "--host", "0.0.0.0"]), image.environment, "10001:10001", tmpfs=["/tmp"])
        net.start("simulator", image.root, spec)
        typist = Typist(copy, image, net, folder)
        for line in commands("From nothing to the first answer"):
            typist.type(line)
        yield typist


def ask(typist, path, *, key=None, body=None, headers=()):
    """Status and JSON."""
    sent = [f"Authorization: Bearer {key}", "Content-Type: application/json", *headers]
    data = ["--data", json.dumps(body)] if body is not None else []
    curl = ["curl", "--silent", "--show-error", "--write-out", "\n%{http_code}", *data, f"http://{path}"]
    said = typist._net.run([*curl, *(part for header in sent for part in ("--header", header))])
    assert said.returncode == 0, said.stderr
    text, _, status = said.stdout.rpartition("\n")
    return int(status), json.loads(text)


def until(question, seconds=30.0):
    end = time.monotonic() + seconds
    while not (found := question()):
        assert time.monotonic() < end
        time.sleep(0.1)  # noqa: TID251 - it asks another process
    return found


def test_the_first_answer_comes(typist):
    """By a client with the key that was made as shown, and the key's use is in the database."""
    answer, usage = typist.said[-2:]
    assert json.loads(answer)["choices"][0]["message"]["content"]
    until(lambda: "my-app" in typist.composed.running["gateway"].run(["xenios", "usage", "--by", "key"]).stdout)
    assert "key" in usage


def test_the_worker_does_what_is_sent_for_later(typist):
    """A job that the gateway took is run by the service `worker`, over Valkey and PostgreSQL."""
    key = typist.variables["XENIOS_KEY"]
    body = {"model": "smart", "messages": [{"role": "user", "content": "Hello"}]}
    status, job = ask(typist, "gateway:8080/v1/chat/completions", key=key, body=body, headers=["Prefer: respond-async"])
    assert status == 202, job

    def result():
        status, told = ask(typist, f"gateway:8080/v1/jobs/{job['id']}/result", key=key)
        return told if status == 200 and "choices" in told else None

    assert until(result)["choices"][0]["message"]["content"]
    assert until(lambda: job["id"] in typist.composed.running["worker"].output)  # lines are some milliseconds late


def test_openais_client_streams(typist):
    """The SDK itself, unchanged."""
    code = (
        "import openai; client = openai.OpenAI(base_url='http://gateway:8080/v1', api_key='"
        + typist.variables["XENIOS_KEY"]
        + "')\n"
        "message = [{'role': 'user', 'content': 'Hello'}]\n"
        "stream = client.chat.completions.create(model='smart', messages=message, stream=True)\n"
        "print(''.join(chunk.choices[0].delta.content or '' for chunk in stream if chunk.choices))"
    )
    said = typist._net.run([sys.executable, "-c", code])
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_prometheus_scrapes_it(typist):
    """With the token that both have as a secret."""
    typist.composed.healthy("prometheus")

    def up():
        _, told = ask(typist, "prometheus:9090/api/v1/query?query=up")
        return [one["metric"]["instance"] for one in told["data"]["result"] if one["value"][1] == "1"]

    assert until(up, 40) == ["xenios:8080"]


def test_secrets_are_in_no_environment_and_no_argument(typist, copy):
    """Of any process of any service, as `ps` and `/proc` show them to others."""
    secrets = [file.read_text() for file in (copy / "deploy/secrets").iterdir()]
    for name, container in typist.composed.running.items():
        if container.running:
            shown = container.run(["sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ"]).stdout
            assert shown, name
            assert not [secret for secret in secrets if secret in shown], name


def test_a_changed_configuration_is_checked_first(typist, copy, image):
    """`check` says no before anything is restarted, in the gateway's container, with its secrets."""
    [check] = [line for line in commands("Change the configuration") if line.endswith(" check")]
    assert check == "docker compose run --rm --no-deps gateway check"
    done = typist.composed.running["gateway"].run(["xenios", "check"])
    assert done.returncode == 0, done.stderr
    bad = "echo 'plugins: [{use: nobody}]' > /tmp/bad.yaml && xenios check --config /tmp/bad.yaml"
    done = typist.composed.running["gateway"].run(["sh", "-c", bad])
    assert (done.returncode, "nobody" in done.stderr + done.stdout) == (2, True)


def test_all_end_by_themselves(typist):
    """Within their grace period, after TERM; what is running has ended and nothing was killed."""
    codes = typist.composed.down()
    assert codes == dict.fromkeys(codes, 0)
    assert {"gateway", "worker", "valkey", "postgres", "prometheus"} == set(codes)


def test_the_files_to_work_with(copy, image, tmp_path):
    """compose.dev.yaml: the sources that are mounted run, a saved configuration is in force without a restart."""
    model = composed.model(DEPLOY / "compose.dev.yaml")
    dev = tmp_path / "dev"
    shutil.copytree(DEPLOY / "compose/dev", dev)
    with network(tmp_path, *model["services"]) as net:
        running = {}
        for name, service in model["services"].items():
            mounts = [
                Mount(
                    dev if v["target"] == "/etc/xenios" else v["source"],
                    v["target"],
                    read_only=v.get("read_only", False),
                )
                for v in service.get("volumes", ())
                if v["type"] == "bind"
            ]
            data = tmp_path / f"{name}.data"
            data.mkdir()
            os.chown(data, 10001, 10001)
            mounts.insert(0, Mount(data, "/var/lib/xenios", read_only=False))
            spec = Spec(
                image.command(service["command"]), image.environment, "10001:10001", "/var/lib/xenios", mounts, ["/tmp"]
            )
            running[name] = net.start(name, image.root, spec)
        until(lambda: running["gateway"].run(image.health).returncode == 0)
        key = re.search(r"sk-xenios-\w+", running["gateway"].output)[0]
        ask_for = (
            "curl --silent --fail http://gateway:8080/v1/chat/completions --header 'Content-Type: application/json' "
            f"--header 'Authorization: Bearer {key}' --data "
        )
        body = json.dumps({"model": "mine", "messages": [{"role": "user", "content": "Hello"}]})
        assert net.run(["sh", "-c", f"{ask_for} '{body}'"]).returncode != 0
        file = dev / "xenios.yaml"
        file.write_text(
            file.read_text().replace(
                "aliases:\n", "aliases:\n        mine: xenios/sim-fail-503\n".replace("fail-503", "n3")
            )
        )
        until(lambda: net.run(["sh", "-c", f"{ask_for} '{body}'"]).returncode == 0)
        assert "config_reloaded" in running["gateway"].output
        assert (
            "/opt/xenios" in running["gateway"].run(["python3", "-c", "import gateway; print(gateway.__file__)"]).stdout
        )
