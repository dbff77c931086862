"""Containers without an engine: a root file system of its own, read-only, one user without rights, PID 1, one network.

bubblewrap sets them up; it is Debian's, fetched and not installed. Needs root, as an engine does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.process import environment
from tests.tools import program

# What it takes to become the user; the user has none of it.
_SETUP = [flag for name in ("SETUID", "SETGID", "SETPCAP") for flag in ("--cap-add", f"CAP_{name}")]


@dataclass(frozen=True)
class Mount:
    source: Path
    target: str
    read_only: bool = True

    def flags(self) -> list[str]:
        above = [str(folder) for folder in reversed(Path(self.target).parents)][1:]
        made = [part for folder in above for part in ("--perms", "0755", "--dir", folder)]
        return [*made, "--ro-bind" if self.read_only else "--bind", str(self.source), self.target]


@dataclass(frozen=True)
class Root:
    """What a container sees as `/`: an image's files, or an empty folder into which the machine's programs are mounted."""

    folder: Path
    mounts: tuple[Mount, ...] = ()

    @classmethod
    def of_this_machine(cls, folder: Path, *mounts: Mount) -> Root:
        for name in ("bin", "sbin", "lib", "lib64"):
            (folder / name).symlink_to(f"usr/{name}")
        (folder / "etc").mkdir()
        (folder / "etc/passwd").write_text("".join(f"user{n}:x:{n}:{n}::/:/bin/sh\n" for n in (70, 999, 65534)))
        return cls(folder, (Mount(Path("/usr"), "/usr"), *mounts))


@dataclass(frozen=True)
class Spec:
    command: Sequence[str]
    environment: Mapping[str, str]
    user: str
    """Numbers: `uid:gid`."""
    directory: str = "/"
    mounts: Sequence[Mount] = ()
    tmpfs: Sequence[str] = ()


class Container:
    """A started one. `pid`: of its PID 1, as this machine numbers it."""

    def __init__(self, process: subprocess.Popen[bytes], pid: int, spec: Spec, output: Path) -> None:
        self._process = process
        self._spec = spec
        self._output = output
        self.pid = pid

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command in it, as `docker exec` runs it."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--ipc", "--net"]
        return subprocess.run(
            [*inside, *_as_user(self._spec), *command],
            env=_environment(self._spec), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def stop(self, seconds: float = 30) -> int:
        """TERM, and its exit code; killed if that takes longer."""
        if self.running:
            self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        finally:
            self._process.kill()
            self._process.wait()


@dataclass
class Network:
    """Loopback and nothing else; all names that `hosts` has lead there. What it started ends with it."""

    folder: Path
    _holder: int
    _bwrap: tuple[Path, Mapping[str, str]]
    _started: list[Container] = field(default_factory=list)

    def start(self, name: str, root: Root, spec: Spec) -> Container:
        output = self.folder / f"{name}.log"
        tool, env = self._bwrap
        mounts = [*root.mounts, Mount(self.folder / "hosts", "/etc/hosts"), *spec.mounts]
        reader, writer = os.pipe()
        with output.open("ab") as out:
            process = subprocess.Popen(
                [
                    "nsenter", f"--net=/proc/{self._holder}/ns/net", tool, "--bind", root.folder, "/", *_each("--perms", "1777", "--tmpfs", of=spec.tmpfs),
                    *(flag for mount in mounts for flag in mount.flags()), "--dev", "/dev", "--proc", "/proc",
                    "--remount-ro", "/", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent",
                    "--info-fd", str(writer), "--cap-drop", "ALL", *_SETUP, "--", *_as_user(spec), *spec.command,
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[writer], env=_environment(spec) | dict(env),
            )  # fmt: skip
        os.close(writer)
        with open(reader) as told:  # noqa: PTH123 - a file descriptor
            said = told.read()
        if not said:
            raise RuntimeError(f"{name} did not start: {output.read_text()}")
        self._started.append(Container(process, json.loads(said)["child-pid"], spec, output))
        return self._started[-1]

    def client(self, folder: Path | None = None) -> list[str]:
        """Before a command of this machine that is to reach the network, by its names, and nothing else."""
        namespaces = [f"--{kind}=/proc/{self._holder}/ns/{file}" for kind, file in (("net", "net"), ("mount", "mnt"))]
        return ["nsenter", *namespaces, "env", "--chdir", str(folder or "/")]

    def run(
        self, command: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Such a command to its end."""
        return subprocess.run(
            [*self.client(folder), *command],
            env=env or environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def close(self) -> None:
        for container in reversed(self._started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                container.stop(10)


@contextlib.contextmanager
def network(folder: Path, *names: str) -> Iterator[Network]:
    """For the time of the context; logs of its containers lie in `folder`."""
    if os.getuid() != 0:
        raise RuntimeError("Containers need root: run `make test-deploy` as root.")
    (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *names)))
    bwrap = program("bwrap", "usr/bin", "bubblewrap")
    reader, writer = os.pipe()
    holder = subprocess.Popen(
        [bwrap[0], "--dev-bind", "/", "/", "--ro-bind", folder / "hosts", "/etc/hosts", "--unshare-net", "--die-with-parent", "--info-fd", str(writer), "sleep", "inf"],
        pass_fds=[writer], env={**os.environ, **bwrap[1]},
    )  # fmt: skip
    os.close(writer)
    with open(reader) as told:  # noqa: PTH123 - a file descriptor
        there = Network(folder, json.loads(told.read())["child-pid"], bwrap)
    try:
        yield there
    finally:
        there.close()
        os.kill(there._holder, signal.SIGKILL)
        holder.wait()


def _each(*flags: str, of: Sequence[str]) -> list[str]:
    return [part for one in of for part in (*flags, one)]


def _as_user(spec: Spec) -> list[str]:
    uid, _, gid = spec.user.partition(":")
    return [
        "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
        "--no-new-privs", "--", "env", "--chdir", spec.directory,
    ]  # fmt: skip


def _environment(spec: Spec) -> dict[str, str]:
    """An engine tells a user without an entry that `/` is its home."""
    return {"PATH": "/usr/bin:/bin", "HOME": "/", **spec.environment}
