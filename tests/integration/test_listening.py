"""Where `xenios serve` listens: a Unix socket, TLS, sockets of systemd; and what it tells of itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.listening import from_systemd, open_sockets
from gateway.settings import ServerSettings
from tests.integration.process import XENIOS, Running, environment, serving, xenios
from tests.stores.certificates import certificate_for

SMALL = "upstreams: {openrouter: {without_key: simulate}}\nplugins:\n  - use: api_keys\n"
BODY = json.dumps({"model": "anthropic/claude-haiku-4.5", "messages": [{"role": "user", "content": "Hello"}]})


def configured(folder: Path, server: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(f"server: {{{server}}}\n{SMALL}")
    return path


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


def chat(connection: http.client.HTTPConnection, key: str | None, **more: str) -> int:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **more}
    connection.request("POST", "/v1/chat/completions", BODY, headers)
    reply = connection.getresponse()
    reply.read()
    return reply.status


def chat_once(connection: http.client.HTTPConnection, key: str | None, **more: str) -> int:
    with contextlib.closing(connection):
        return chat(connection, key, **more)


# --- a Unix socket ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_unix_socket_instead_of_a_port(tmp_path: Path, workers: str) -> None:
    """A proxy on the same machine reaches it by a file, which only those may open whom its mode names; it goes with it."""
    more = ", workers: 2" if workers == "2" else ""
    config = configured(tmp_path, f"unix_socket: xenios.sock, unix_socket_mode: '0600'{more}")
    if more:
        config.write_text(config.read_text() + "services: {redis: embedded}\n")
    path = tmp_path / "xenios.sock"
    with serving(tmp_path, "--config", config, port=None) as running:
        assert str(path) in running.banner
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert chat_once(UnixConnection(path), running.key) == 200
        assert chat_once(UnixConnection(path), "sk-wrong") == 401
        access = (tmp_path / "access.log").read_text()
        assert '"remote"' not in access or '"remote":null' in access
    assert not path.exists()


def test_a_proxy_on_a_unix_socket_says_who_asks(tmp_path: Path) -> None:
    """With `trusted_proxies: [unix]` the log's address is what whoever may open the socket says."""
    config = configured(tmp_path, "unix_socket: xenios.sock, trusted_proxies: [unix]")
    config.write_text(f"{config.read_text()}  - use: access_log\n")
    with serving(tmp_path, "--config", config, port=None) as running:
        told = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9"}
        assert chat_once(UnixConnection(tmp_path / "xenios.sock"), running.key, **told) == 200
    assert '"remote":"203.0.113.9"' in (tmp_path / "access.log").read_text()


def test_the_curl_line_of_a_unix_socket_works(tmp_path: Path) -> None:
    """What the banner prints works as pasted."""
    config = configured(tmp_path, "unix_socket: xenios.sock")
    with serving(tmp_path, "--config", config, port=None) as running:
        line = next(line for line in running.banner.splitlines() if line.startswith("curl "))
        done = subprocess.run(line + " -s", shell=True, capture_output=True, text=True, timeout=20, check=True)
        assert json.loads(done.stdout)["choices"]


def test_a_socket_file_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    """After `kill -9` it starts again; beside one that runs it does not, and says so; another file is not touched."""
    config = configured(tmp_path, "unix_socket: xenios.sock")
    path = tmp_path / "xenios.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(tmp_path, "--config", config, port=None) as running:
        assert chat_once(UnixConnection(path), running.key) == 200
        other = tmp_path / "other"
        other.mkdir()
        done = xenios("serve", "--config", config, cwd=other, command=XENIOS)
        assert (done.returncode, done.stderr) == (1, f"xenios: can't listen on {path}: Address already in use\n")
        assert chat_once(UnixConnection(path), running.key) == 200
    path.write_text("precious")
    done = xenios("serve", "--config", config, cwd=tmp_path, command=XENIOS)
    assert done.returncode == 1
    assert path.read_text() == "precious"


# --- TLS -------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    return certificate_for(name, folder)


def shown(running: Running) -> str:
    """The name in the certificate that a new connection is shown."""
    port = int(running.url.rpartition(":")[2])
    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=20)
    from cryptography import x509

    return str(x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string())


def trusting(running: Running, authority: Path) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(authority))
    return http.client.HTTPSConnection("localhost", int(running.url.rpartition(":")[2]), timeout=20, context=context)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_https_with_a_certificate_that_is_renewed(tmp_path: Path, workers: str) -> None:
    """Clients speak HTTPS to it; after a reload new connections see the new certificate, and those that are open go on.

    A certificate that is none is refused, and the one that is in force stays.
    """
    both, authority = certificate(tmp_path / "one", "localhost")
    config = configured(tmp_path, f"tls: {{cert_file: both.pem, key_file: both.pem}}, workers: {workers}")
    if workers == "2":
        config.write_text(config.read_text() + "services: {redis: embedded}\n")
    mine = tmp_path / "both.pem"
    mine.write_bytes(both.read_bytes())
    with serving(tmp_path, "--config", config) as running, contextlib.ExitStack() as stack:
        assert running.url.startswith("https://")
        kept = stack.enter_context(contextlib.closing(trusting(running, authority)))
        assert chat(kept, running.key) == 200
        assert shown(running) == "CN=localhost"

        mine.write_bytes(certificate(tmp_path / "two", "renewed.example")[0].read_bytes())
        reload(kept, running, 200)
        assert shown(running) == "CN=renewed.example"
        assert chat(kept, running.key) == 200

        mine.write_text("no certificate")
        problem = reload(kept, running, 409)
        assert "server.tls" in problem
        assert shown(running) == "CN=renewed.example"


def reload(connection: http.client.HTTPConnection, running: Running, status: int) -> str:
    connection.request("POST", "/admin/reload", headers={"Authorization": f"Bearer {running.key}"})
    reply = connection.getresponse()
    text = reply.read().decode()
    assert reply.status == status, text
    return text


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "can't be read: No such file"), ("rubbish", "no certificate with its key")],
)
def test_a_certificate_that_is_none(tmp_path: Path, content: str | None, said: str) -> None:
    """It does not start, and says which file it is and why; exit code 2."""
    config = configured(tmp_path, "tls: {cert_file: c.pem, key_file: c.pem}")
    if content is not None:
        (tmp_path / "c.pem").write_text(content)
    done = xenios("serve", "--config", config, cwd=tmp_path, command=XENIOS)
    assert done.returncode == 2
    assert "c.pem" in done.stderr
    assert said in done.stderr


def test_plain_http_to_a_tls_port_is_closed_quietly(tmp_path: Path) -> None:
    """Nobody gets an answer without TLS, and a scanner does not fill the log."""
    both, authority = certificate(tmp_path, "localhost")
    config = configured(tmp_path, f"tls: {{cert_file: {both}, key_file: {both}}}")
    with serving(tmp_path, "--config", config) as running:
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), 20) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/" not in plain.recv(4096)
        assert chat_once(trusting(running, authority), running.key) == 200
    assert "Traceback" not in "".join(running.said) + (tmp_path / "access.log").read_text()


# --- sockets of systemd ----------------------------------------------------------------------------------------------


def handed(listening: socket.socket) -> tuple[str, ...]:
    """A command that is started as systemd starts one of a socket unit."""
    start = (
        f"import os, sys; os.dup2({listening.fileno()}, 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return (sys.executable, "-c", start, *XENIOS)


@contextlib.contextmanager
def instance(folder: Path, config: Path, listening: socket.socket) -> Iterator[Running]:
    folder.mkdir(exist_ok=True)
    os.set_inheritable(listening.fileno(), True)
    with serving(
        folder, "--config", config, port=None, command=handed(listening), pass_fds=(listening.fileno(),)
    ) as it:
        yield it


@pytest.mark.parametrize("workers", [1, 2])
def test_an_upgrade_refuses_no_connection(tmp_path: Path, workers: int) -> None:
    """Two instances on one socket of systemd: the new one starts beside the old, which then drains. All are answered,
    those too who keep their connection for the next request.
    """
    config = tmp_path / "own.yaml"
    config.write_text(
        f"server: {{workers: {workers}, allow_anonymous: true, drain_delay: 1s}}\n"
        "services: {redis: embedded}\nupstreams: {openrouter: {without_key: simulate}}\n"
    )
    statuses: list[int] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        port = listening.getsockname()[1]

        def go_on(keep: bool) -> None:
            kept = http.client.HTTPConnection("127.0.0.1", port, timeout=20)  # connects anew when it was told to close
            while not over.is_set():
                statuses.append(chat(kept, None))
                if not keep:
                    kept.close()
            kept.close()

        with contextlib.ExitStack() as old:
            old.enter_context(instance(tmp_path / "old", config, listening))
            asking = [threading.Thread(target=go_on, args=(keep,)) for keep in (True, False) * 2]
            for thread in asking:
                thread.start()
            with instance(tmp_path / "new", config, listening) as new:
                assert new.url == f"http://127.0.0.1:{port}"
                old.close()
                after = len(statuses)
                while len(statuses) < after + 50:
                    assert any(thread.is_alive() for thread in asking)
                over.set()
                for thread in asking:
                    thread.join(20)
    assert set(statuses) == {200}


def test_who_can_reach_it_is_told_from_the_socket(tmp_path: Path) -> None:
    """A socket of systemd that the world can reach is not served without keys because the file says 127.0.0.1."""
    config = tmp_path / "own.yaml"
    config.write_text("server: {host: 127.0.0.1}\nupstreams: {openrouter: {without_key: simulate}}\n")
    with socket.create_server(("0.0.0.0", 0)) as listening:
        os.set_inheritable(listening.fileno(), True)
        done = subprocess.run(
            [*handed(listening), "serve", "--config", str(config)],
            cwd=tmp_path,
            env=environment(None),
            pass_fds=(listening.fileno(),),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert "0.0.0.0 can be reached from outside" in done.stderr


def test_sockets_for_another_process_are_not_taken() -> None:
    """A process that was started by one of a socket unit leaves its sockets alone."""
    env = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
    assert from_systemd(env) == []
    assert env == {}


def test_a_name_with_two_addresses_has_one_port() -> None:
    """`localhost` with port 0 listens on the same free port by IPv4 and IPv6, where both are there."""
    sockets = open_sockets(ServerSettings(host="localhost", port=0))
    try:
        assert len({s.getsockname()[1] for s in sockets}) == 1
    finally:
        for listening in sockets:
            listening.close()


# --- what systemd is told --------------------------------------------------------------------------------------------


def test_systemd_is_told(tmp_path: Path) -> None:
    """`Type=notify`: ready once it serves, reloading and ready again, alive while its loop turns, stopping with the time
    that its drain may take.
    """
    config = configured(tmp_path, "drain_timeout: 100s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(20)

        def next_one() -> list[str]:
            while (lines := told.recv(4096).decode().splitlines()) == ["WATCHDOG=1"]:
                seen.add("alive")
            return lines

        seen: set[str] = set()
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        with serving(tmp_path, "--config", config, env=env) as running:
            ready = next_one()
            assert ready[0] == "READY=1"
            assert ready[1].startswith("STATUS=configuration ")
            os.kill(running.pid, signal.SIGHUP)
            assert next_one()[0] == "RELOADING=1"
            assert next_one() == ready
            config.write_text("rubbish: true")
            os.kill(running.pid, signal.SIGHUP)
            assert next_one()[0] == "RELOADING=1"
            assert "; a reload was refused at 20" in next_one()[1]
        assert next_one() == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=130000000"]
    assert seen == {"alive"}
