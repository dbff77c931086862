"""Where the gateway listens: an address, a Unix socket, or sockets that systemd opened before it; and its certificate.

Sockets are opened once, by the process that is started, and given to whoever accepts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.errors import StartError

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from gateway.settings import ServerSettings, Tls

BACKLOG = 4096
_FIRST_FD = 3  # sd_listen_fds(3): those that are handed over begin here


def open_sockets(server: ServerSettings) -> list[socket.socket]:
    """Listening sockets as the settings say. Raises OSError."""
    if server.unix_socket is not None:
        return [_unix(server.unix_socket, int(server.unix_socket_mode, 8))]
    return _tcp(server.host, server.port)


def port_of(sockets: Sequence[socket.socket]) -> int:
    """0 for a Unix socket."""
    address = sockets[0].getsockname()
    return int(address[1]) if isinstance(address, tuple) else 0


def close(sockets: Sequence[socket.socket], server: ServerSettings) -> None:
    """A Unix socket's file goes too, unless another process listens there."""
    for listening in sockets:
        listening.close()
    path = server.unix_socket
    if path is not None and not _answers(path):
        with contextlib.suppress(OSError):
            path.unlink()


def from_systemd(env: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """Those of a socket unit, which listen already; what tells of them is taken out of `env`. Raises StartError."""
    pid, count = env.pop("LISTEN_PID", ""), env.pop("LISTEN_FDS", "0")
    env.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []  # they were meant for a process that started this one
    out: list[socket.socket] = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        made = socket.socket(fileno=fd)
        if made.type != socket.SOCK_STREAM or not made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise StartError(f"systemd handed over a socket that takes no connections ({made}): set Accept=no.")
        made.setblocking(False)
        out.append(made)
    return out


def told_of(sockets: Sequence[socket.socket]) -> dict[str, Any]:
    """What these make of the settings' host, port and unix_socket: who can reach the gateway is told from them."""
    tcp = [s.getsockname() for s in sockets if s.family != socket.AF_UNIX]
    if not tcp:
        return {"unix_socket": Path(sockets[0].getsockname())}
    outside = [address for address in tcp if not address[0].startswith(("127.", "::1"))]
    host, port = (outside or tcp)[0][:2]
    return {"host": host, "port": port, "unix_socket": None}


def _tcp(host: str, port: int) -> list[socket.socket]:
    """On all addresses of `host`, with one port."""
    out: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            made = socket.socket(family, socket.SOCK_STREAM)
            out.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound = out[0].getsockname()[1] if len(out) > 1 else address[1]
            made.bind((address[0], bound, *address[2:]))
            made.listen(BACKLOG)
            made.setblocking(False)
    except OSError:
        for made in out:
            made.close()
        raise
    return out


def _unix(path: Path, mode: int) -> socket.socket:
    """A file that a gateway left behind is replaced; one of a gateway that runs is not."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode) or _answers(path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(str(path))
        path.chmod(mode)  # nobody can connect before it listens
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno not in {errno.ECONNREFUSED, errno.ENOENT}
    return True


# --- TLS -------------------------------------------------------------------------------------------------------------


class Certificates:
    """The TLS of all listening sockets. A connection that comes after `put_in_force` is shown the new certificate."""

    def __init__(self, current: ssl.SSLContext) -> None:
        self._current = current
        self.context = _context()
        self.context.sni_callback = self._choose  # is called for clients that name no host, too

    def put_in_force(self, current: ssl.SSLContext) -> None:
        self._current = current

    def _choose(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self._current


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Raises StartError that says which file, and why."""
    context = _context()
    for name, file in (("cert_file", tls.cert_file), ("key_file", tls.key_file)):
        try:
            file.read_bytes()
        except OSError as error:
            raise StartError(f"server.tls.{name}: {file} can't be read: {error.strerror}.") from error
    try:
        # a password would be asked for on the terminal
        context.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")
    except ssl.SSLError as error:
        reason = (error.reason or "no PEM").replace("_", " ").lower()
        raise StartError(
            f"server.tls: {tls.cert_file} and {tls.key_file} are no certificate with its key, unencrypted: {reason}."
        ) from error
    return context


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    return context
