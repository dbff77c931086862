"""The image, built as the README says, but by Debian's buildah, which needs no engine: fetched, not installed.

Its base is made by debootstrap, since registries can't be relied on; certificates that this machine trusts, it trusts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy import debian
from tests.deploy.containers import Root
from tests.deploy.test_rules import DEPLOY
from tests.tools import program

_LOCAL_AUTHORITIES = Path("/usr/local/share/ca-certificates")
_LIBRARIES = ("libgpgme11", "libassuan0", "libsubid4", "libdevmapper1.02.1")


@dataclass(frozen=True)
class Image:
    """`config`: user, environment, entry point … as an engine reads them; `size`: bytes, the base's among them."""

    folder: Path
    config: dict[str, Any]
    size: int
    base_size: int

    @property
    def root(self) -> Root:
        return Root(self.folder)

    @property
    def environment(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.config["Env"])

    def command(self, arguments: Sequence[str] = ()) -> list[str]:
        return [*self.config["Entrypoint"], *(arguments or self.config["Cmd"])]

    @property
    def health(self) -> list[str]:
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return command


@contextlib.contextmanager
def built(context: Path) -> Iterator[Image]:
    """From the folder `context`, for the time of the context: gigabytes of layers."""
    with tempfile.TemporaryDirectory(prefix="xenios-image-") as place:
        builder = _Builder(Path(place))
        builder.base()
        build = ("--isolation", "chroot", "--format", "docker", "--build-arg", "BASE=localhost/base")
        builder("bud", *build, "--file", context / "deploy/docker/Dockerfile", "--tag", "localhost/xenios", context)
        container = builder("from", "--pull-never", "localhost/xenios").strip()
        folder = Path(builder("mount", container).strip())
        told = json.loads(builder("inspect", "--type", "image", "localhost/xenios"))
        sizes = {one["names"][0]: one["size"] for one in json.loads(builder("images", "--json")) if one.get("names")}
        yield Image(folder, told["Docker"]["config"], *(
            _bytes(sizes[f"localhost/{name}:latest"]) for name in ("xenios", "base")
        ))  # fmt: skip


class _Builder:
    """buildah with a place of its own, in which nothing lasts."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._tool = _buildah()
        (place / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def __call__(self, command: str, *args: str | Path) -> str:
        policy = ("--signature-policy", self._place / "policy.json") if command in {"bud", "from"} else ()
        own = ("--root", self._place / "store", "--runroot", self._place / "run", "--storage-driver", "vfs")
        done = subprocess.run(
            [self._tool, *own, command, *policy, *args],
            env={**os.environ, "TMPDIR": str(self._place)}, capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"buildah {command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def base(self) -> None:
        file = self._place / "base.Dockerfile"
        file.write_text("FROM scratch\nCOPY . /\n")
        self("bud", "--file", file, "--tag", "localhost/base", _debian())


def _buildah() -> Path:
    tool, env = program("buildah", "usr/bin", "buildah", *_LIBRARIES)
    if not env:
        return tool
    # It starts itself anew without LD_LIBRARY_PATH, so it must know by itself where its libraries are.
    knowing = tool.with_name("buildah-with-libraries")
    if not knowing.exists():
        patchelf, patchelf_env = program("patchelf", "usr/bin", "patchelf")
        side = tool.with_name(f"buildah-{os.getpid()}")
        shutil.copy(tool, side)
        rpath = ["--set-rpath", env["LD_LIBRARY_PATH"], side]
        subprocess.run([patchelf, *rpath], check=True, env={**os.environ, **patchelf_env})
        side.rename(knowing)
    return knowing


def _debian() -> Path:
    """The release that the Dockerfile names, as small as the image of that name: no manuals, no translations."""
    [release] = re.findall(r"^ARG BASE=debian:(\w+)-slim$", (DEPLOY / "docker/Dockerfile").read_text(), re.MULTILINE)
    return debian.tree(f"debian-{release}", release, _slim)


def _slim(tree: Path) -> None:
    unwanted = ("doc", "man", "locale", "info")
    rules = "".join(f"path-exclude=/usr/share/{name}/*\n" for name in unwanted)
    (tree / "etc/dpkg/dpkg.cfg.d/slim").write_text(rules)
    for gone in (*(f"usr/share/{name}" for name in unwanted), "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(tree / gone)
        (tree / gone).mkdir()
    if _LOCAL_AUTHORITIES.is_dir():
        shutil.copytree(_LOCAL_AUTHORITIES, tree / "usr/local/share/ca-certificates", dirs_exist_ok=True)


def _bytes(text: str) -> int:
    number, unit = text.split()
    return int(float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()])
