"""The npm `openai` package on a real Node, which comes from a wheel: no machine needs Node for these tests."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.process import BIN, Served, plain_environment

FOLDER = Path(__file__).with_name("node")
LOCK = FOLDER / "package-lock.json"
INSTALLED = FOLDER / "node_modules"


def run(*command: str) -> str:
    environment = plain_environment()
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    # A network with a certificate authority of its own has told pip about it; Node wants to be told apart.
    for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if name in os.environ:
            environment.setdefault("NODE_EXTRA_CA_CERTS", os.environ[name])
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install() -> None:
    """`npm ci`, once per lock file; test runs side by side wait for each other."""
    stamp = INSTALLED / ".installed-from"
    with LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != LOCK.read_text():
            run(str(BIN / "npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund")
            stamp.write_text(LOCK.read_text())


@pytest.fixture(scope="module")
def seen(gateway: Served) -> dict[str, Any]:
    """What every scenario of the script saw."""
    install()
    return json.loads(run(str(BIN / "node"), "scenarios.mjs", gateway.url, gateway.key))


def test_the_lock_file_names_no_registry() -> None:
    """The packages come from whichever registry the machine is set up for, checked by their hashes."""
    packages = json.loads(LOCK.read_text())["packages"]
    installed = {name: entry for name, entry in packages.items() if name}
    assert installed
    assert all("resolved" not in entry and entry["integrity"] for entry in installed.values())


def test_a_chat_is_answered_whole(seen: dict[str, Any]) -> None:
    """Text, usage, and the request id where the SDK looks for it."""
    whole = seen["whole"]
    assert "Hello" in whole["text"]
    assert whole["tokens"] > 0
    assert whole["requestId"] == whole["header"]
    assert whole["served"] == "anthropic/claude-haiku-4.5"


def test_a_chat_is_streamed(seen: dict[str, Any]) -> None:
    """The pieces make up the whole; the usage chunk comes only if it was asked for."""
    assert seen["stream"] == {"text": seen["whole"]["text"], "everyChunkHasAChoice": True}
    assert seen["usage"]["choices"] == 0
    assert seen["usage"]["tokens"] > 0


def test_a_tool_is_called(seen: dict[str, Any]) -> None:
    """Whole, and put together from a stream by the SDK's helper."""
    assert seen["tool"] == seen["streamedTool"] == ["city", "days"]


def test_texts_are_embedded(seen: dict[str, Any]) -> None:
    """The SDK's default encoding (base64) and floats are the same numbers."""
    assert seen["embeddings"] == {"lengths": [8, 8], "same": True}


def test_models_are_listed_and_retrieved(seen: dict[str, Any]) -> None:
    """Also one whose id holds a slash, which the SDK percent-encodes."""
    models = seen["models"]
    assert {"anthropic/claude-haiku-4.5", "task/chat"} <= set(models["ids"])
    assert (models["one"], models["object"]) == ("anthropic/claude-haiku-4.5", "model")


def test_the_responses_api(seen: dict[str, Any]) -> None:
    """Whole and streamed to its clean end."""
    responses = seen["responses"]
    assert responses["streamed"] == responses["whole"] != ""
    assert (responses["first"], responses["last"]) == ("response.created", "response.completed")


def test_images_and_audio(seen: dict[str, Any]) -> None:
    """A PNG, a spoken text, and its transcription by upload."""
    assert seen["image"] == "PNG"
    assert seen["audio"]["head"] == "RIFF"
    assert "hello.wav" in seen["audio"]["text"]


def test_errors_are_the_sdks_own(seen: dict[str, Any]) -> None:
    """Each failure is the class, status and code that code written for OpenAI expects."""
    told = {name: (error["name"], error["status"], error["code"]) for name, error in seen["errors"].items()}
    assert told == {
        "wrongKey": ("AuthenticationError", 401, "invalid_api_key"),
        "unknownModel": ("NotFoundError", 404, "model_not_found"),
        "rateLimit": ("RateLimitError", 429, "rate_limit_exceeded"),
        "upstreamDown": ("InternalServerError", 502, "upstream_unreachable"),
        "brokenAnswer": ("InternalServerError", 502, "upstream_error"),
        "midStream": ("APIError", None, "upstream_error"),
        "cutStream": ("APIError", None, "upstream_truncated"),
    }


def test_leaving_a_stream_harms_nobody(seen: dict[str, Any]) -> None:
    """After a client left in the middle of a stream the next request is answered."""
    assert seen["leaving"] == "stop"
