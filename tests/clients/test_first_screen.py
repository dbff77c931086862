"""What `make run` prints works as it is pasted."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys

import httpx

from tests.clients.process import Served, plain_environment


def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **kwargs,
    )


def paste(line: str) -> tuple[int, str]:
    """(status, body) of a curl line. A machine without curl sends what the line says by httpx."""
    if shutil.which("curl"):
        done = run(["bash", "-c", f"{line} --silent --show-error --write-out '\\n%{{http_code}}'"])
        assert done.returncode == 0, done.stderr
        body, status = done.stdout.rsplit("\n", 1)
        return int(status), body
    _, url, *rest = shlex.split(line)
    options = list(zip(rest[::2], rest[1::2], strict=True))
    headers = dict(value.split(": ", 1) for option, value in options if option == "-H")
    [data] = [value for option, value in options if option == "-d"]
    reply = httpx.post(url, content=data, headers=headers, timeout=20)
    return reply.status_code, reply.text


def test_the_curl_line_works_as_pasted(gateway: Served) -> None:
    """The first line that a newcomer pastes is answered with 200 by the simulation."""
    [line] = [line for line in gateway.banner if line.startswith("curl ")]
    status, body = paste(line)
    assert status == 200
    assert "simulated answer" in json.loads(body)["choices"][0]["message"]["content"]


def test_the_python_lines_work_as_pasted(gateway: Served) -> None:
    """The three lines of Python after it stream text, without a traceback at the end."""
    start = next(n for n, line in enumerate(gateway.banner) if line.startswith("Or in Python"))
    lines = gateway.banner[start + 1 :]
    assert len(lines) == 3
    done = run([sys.executable, "-W", "error", "-"], input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "simulated answer" in done.stdout
    assert done.stderr == ""


def test_nobody_can_miss_that_answers_are_simulated(gateway: Served) -> None:
    """Without an upstream key the banner says so in a box, and so does each reply."""
    box = [line for line in gateway.banner if line.startswith("#")]
    assert any("SIMULATED" in line for line in box)
    assert len({len(line) for line in box}) == 1
    assert gateway.key in "".join(gateway.banner)
    reply = httpx.post(
        f"{gateway.base_url}/chat/completions",
        json={"model": "fast", "messages": [{"role": "user", "content": "Hello"}]},
        headers={"Authorization": f"Bearer {gateway.key}"},
        timeout=20,
    )
    assert (reply.status_code, reply.headers["x-xenios-simulated"]) == (200, "1")
