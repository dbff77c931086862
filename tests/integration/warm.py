"""`xenios` commands by the hundred: one process imports the gateway, and each command is a fork of it.

A command is a process of its own as ever, with its folder, variables, standard streams and exit code. What it is spared
is importing, most of what a command costs.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.metadata
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
# Coverage measures processes that begin with an interpreter; on macOS a fork that doesn't is not safe.
AVAILABLE = sys.platform == "linux" and not any(name.startswith("COVERAGE_") for name in os.environ)


def run(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str], stdin: str, seconds: int
) -> subprocess.CompletedProcess[str]:
    """`gateway.cli.main` in a process of its own, to its end; it has `seconds`."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_server())
            asked = json.dumps({"argv": argv, "cwd": str(cwd), "env": env, "seconds": seconds})
            socket.send_fds(connection, [b"!"], [f.fileno() for f in (given, out, err)])
            connection.sendall(asked.encode())
            connection.shutdown(socket.SHUT_WR)
            code = int(connection.makefile().read())
        done = subprocess.CompletedProcess(list(argv), code, _text(out), _text(err))
    if code == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(done.args, seconds, done.stdout, done.stderr)
    return done


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


@cache
def _server() -> str:
    """Its address. It is started once, and ends with this process, however that ends."""
    address = f"\0xenios-warm-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.integration.warm import serve; serve({listener.fileno()})"],
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
        )

    def end() -> None:
        process.communicate()

    atexit.register(end)
    return address


def _warm_up() -> None:
    import gateway

    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for point in importlib.metadata.entry_points(group="xenios.plugins"):
        if point.value.startswith("gateway_plugins."):
            point.load()


def serve(fd: int) -> None:
    """Commands on this socket, until standard input ends. A fork waits for each, and is waited for by nobody."""
    _warm_up()
    listener = socket.socket(fileno=fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listener in (ready := select.select([listener, 0], [], [])[0]) and 0 not in ready:
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _, fds, _, _ = socket.recv_fds(connection, 1, 3)
            asked = json.loads(connection.makefile().read())
            if not (pid := os.fork()):
                connection.close()
                return _become(fds, **asked)
            _, status = os.waitpid(pid, 0)
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        connection.close()
    return None


def _become(fds: list[int], argv: list[str], cwd: str, env: dict[str, str], seconds: int) -> None:
    """The command; what it raises ends this process as it would end any."""
    from gateway.cli import main

    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    signal.alarm(seconds)
    main()
