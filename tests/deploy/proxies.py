"""The real nginx, Caddy and HAProxy with the files of deploy/proxies, in which only addresses and certificates differ.

They are the machine's, else Debian's packages, unpacked and not installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.integration.process import REPOSITORY
from tests.stores.certificates import certificate_for
from tests.tools import free_port, program

if TYPE_CHECKING:
    from collections.abc import Sequence

SHIPPED = REPOSITORY / "deploy" / "proxies"
NAMES = ("nginx", "caddy", "haproxy")


@dataclass(frozen=True)
class Proxy:
    """One that listens at `port` with TLS. `context` trusts its certificate."""

    port: int
    context: ssl.SSLContext
    log: Path


@dataclass(frozen=True)
class Command:
    """How it checks its file, how it is run, and with what environment."""

    check: Sequence[str | Path]
    run: Sequence[str | Path]
    env: Mapping[str, str]

    def checked(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.check, env=dict(self.env), capture_output=True, text=True, timeout=60, check=False)


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def _nginx(folder: Path, gateway: str, port: int, certificate: Path) -> Command:
    """Within a main file as distributions have it, which compresses whatever it may."""
    ours = replaced(
        (SHIPPED / "nginx.conf").read_text(),
        ("127.0.0.1:8080", gateway),
        (":443 ", f":{port} "),
        (" 443 ", f" {port} "),
        ("/etc/ssl/xenios/fullchain.pem", str(certificate)),
        ("/etc/ssl/xenios/privkey.pem", str(certificate)),
    )
    (folder / "xenios.conf").write_text(ours)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = (
        f"{'user root;' if os.getuid() == 0 else ''} daemon off; worker_processes 2; pid {folder}/nginx.pid;\n"
        f"error_log stderr info; events {{ worker_connections 1024; }}\n"
        f"http {{ {temporary} access_log off; gzip on; gzip_types *; gzip_min_length 1;\n"
        f"include {folder}/xenios.conf; }}\n"
    )
    (folder / "nginx.conf").write_text(main)
    nginx, env = program("nginx", "usr/sbin", "nginx", "libpcre2-8-0")
    start = [nginx, "-e", "stderr", "-p", folder, "-c", folder / "nginx.conf"]
    return Command([*start, "-t"], start, env)


def _caddy(folder: Path, gateway: str, port: int, certificate: Path) -> Command:
    """Imported as it is; outside of it, that it neither asks for certificates nor listens where others do."""
    del certificate  # its own
    (folder / "Caddyfile").write_text(
        "{\nadmin off\nauto_https disable_redirects\nskip_install_trust\n}\nimport " + str(SHIPPED / "Caddyfile") + "\n"
    )
    caddy, env = program("caddy", "usr/bin", "caddy")
    env = {
        **env,
        "HOME": str(folder),
        "XENIOS_DOMAIN": f"https://localhost:{port}",
        "XENIOS_ADDRESS": gateway,
        "PATH": "/usr/bin",
    }
    how = ["--config", folder / "Caddyfile", "--adapter", "caddyfile"]
    return Command([caddy, "validate", *how], [caddy, "run", *how], env)


def _haproxy(folder: Path, gateway: str, port: int, certificate: Path) -> Command:
    """Behind a `global` section as distributions have it."""
    ours = replaced(
        (SHIPPED / "haproxy.cfg").read_text(),
        ("127.0.0.1:8080", gateway.replace("unix/", "unix@")),
        ("bind :443 ", f"bind 127.0.0.1:{port} "),
        ("/etc/ssl/xenios/both.pem", str(certificate)),
    )
    (folder / "haproxy.cfg").write_text(ours)
    (folder / "global.cfg").write_text("global\n    log stdout format raw local0\n    maxconn 2000\n")
    haproxy, env = program(
        "haproxy", "usr/sbin", "haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1", "libpcre2-8-0"
    )
    start = [haproxy, "-f", folder / "global.cfg", "-f", folder / "haproxy.cfg"]
    return Command([*start, "-c"], [*start, "-db"], env)


_KINDS = {"nginx": _nginx, "caddy": _caddy, "haproxy": _haproxy}


def command(name: str, folder: Path, gateway: str, port: int, certificate: Path) -> Command:
    """`gateway`: its address, as the shipped file names one."""
    return _KINDS[name](folder, gateway, port, certificate)


@contextlib.asynccontextmanager
async def proxied(name: str, folder: Path, gateway_port: int) -> AsyncIterator[Proxy]:
    """It runs before a gateway of this machine for the time of the context."""
    port = free_port()
    both, authority = certificate_for("localhost", folder)
    made = await asyncio.to_thread(command, name, folder, f"127.0.0.1:{gateway_port}", port, both)
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(*map(str, made.run), stdout=out, stderr=out, env=dict(made.env))
    try:
        async with asyncio.timeout(20):
            if name == "caddy":
                authority = folder / ".local/share/caddy/pki/authorities/local/root.crt"
            while not await _listens(port, authority):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        yield Proxy(port, ssl.create_default_context(cafile=str(authority)), log)
    finally:
        if process.returncode is None:
            process.terminate()  # at once: no graceful end of any of them
        await process.wait()


async def _listens(port: int, authority: Path) -> bool:
    """Caddy makes its certificate while it listens already."""
    try:
        context = ssl.create_default_context(cafile=str(authority))
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    except OSError:
        return False
    writer.close()
    return True
