"""OpenAI's SDKs, unmodified, with background responses of a real `xenios serve` and its worker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.process import BIN, REPOSITORY, Served, plain_environment
from tests.clients.test_openai_node import install, run

README = REPOSITORY / "plugins" / "gateway_plugins" / "jobs" / "README.md"


@pytest.fixture(scope="module")
def seen(script: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What every scenario of the Python script saw."""
    return script("background.py")


@pytest.fixture(scope="module")
def node(gateway: Served) -> dict[str, Any]:
    """What every scenario of the Node script saw."""
    install()
    return json.loads(run(str(BIN / "node"), "background.mjs", gateway.url, gateway.key))


def test_one_is_created_and_polled(seen: dict[str, Any]) -> None:
    """As OpenAI's guide does it: queued at once, completed later, with its metadata, text and usage; by either prefix."""
    for scenario in ("created", "api_v1"):
        assert seen[scenario]["taken"] == ["queued", True, "", True]
        assert seen[scenario]["done"] == ["completed", True, {"order": "7"}, True]
        assert "Hello" in seen[scenario]["text"]


def test_one_is_streamed_dropped_and_resumed(seen: dict[str, Any]) -> None:
    """Who dropped the stream goes on exactly behind the last event that he had, as often as he likes, also after the end."""
    streamed = seen["streamed"]
    assert streamed["types"] == ["response.created", "response.queued", "response.in_progress"]
    assert streamed["dropped_while"] == "in_progress"
    assert streamed["numbers"] == list(range(len(streamed["numbers"])))
    assert streamed["end"] == ["response.completed", True]
    assert streamed["whole"][1]
    assert (streamed["again"], streamed["helper"], streamed["behind_the_end"]) == (True, True, [])


def test_one_is_cancelled_while_it_speaks(seen: dict[str, Any]) -> None:
    """Cancelling stops it, twice is once, the stream ends, and what it had said is kept."""
    cancelled = seen["cancelled"]
    assert cancelled["cancel"] == ["cancelled", "cancelled"]
    assert cancelled["last_event"] == "response.cancelled"
    assert cancelled["kept"] == ["cancelled", True, ["incomplete"]]


def test_one_is_deleted(seen: dict[str, Any]) -> None:
    """What was deleted is not there any more."""
    assert seen["deleted"]["then"] == ["NotFoundError", "not_found"]


def test_a_conversation_goes_on(seen: dict[str, Any]) -> None:
    """`previous_response_id` is filled in from what is kept here, in the background and at once; items come in pages."""
    continued = seen["continued"]
    assert continued["second"] == ["completed", True]
    assert continued["items"] == [["user", "input_text"], ["assistant", "output_text"], ["user", "input_text"]]
    assert (continued["newest_first"], continued["at_once"]) == ("Two", "completed")


def test_mistakes_are_told_as_the_api_does(seen: dict[str, Any]) -> None:
    """Unknown ids are 404, what can't be is 400, a model that refuses makes a failed response."""
    refused = seen["refused"]
    assert refused["unknown"] == ["NotFoundError", "not_found"]
    assert refused["not_streamed"] == ["BadRequestError", "invalid_request"]
    assert refused["not_stored"] == ["BadRequestError", "invalid_request"]
    assert refused["no_such_previous"] == ["BadRequestError", "previous_response_not_found"]
    assert refused["failed"] == ["failed", "invalid_prompt"]


def test_twenty_at_once_each_get_their_own(seen: dict[str, Any]) -> None:
    """Nobody's events reach another's stream."""
    assert seen["at_once"]["each_its_own"] == [f'"text {n}"' for n in range(20)]


def test_node_creates_polls_streams_resumes_cancels_and_deletes(node: dict[str, Any]) -> None:
    """The npm package sees the same."""
    assert node["polled"] == {"taken": "queued", "status": "completed", "text": True}
    assert node["resumed"]["numbers"] == list(range(len(node["resumed"]["numbers"])))
    assert (node["resumed"]["last"], node["resumed"]["whole"]) == ("response.completed", True)
    assert node["cancelled"] == ["cancelled", "cancelled"]
    assert node["items"] == ["user"]
    assert node["deleted"] == {"name": "NotFoundError", "status": 404}


def test_the_readmes_example_runs_as_pasted(gateway: Served) -> None:
    """What the page of jobs shows is polled to its end, dropped, and picked up to the last event."""
    section = README.read_text().partition("## Background responses")[2]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    env = {**plain_environment(), "OPENAI_BASE_URL": gateway.base_url, "OPENAI_API_KEY": gateway.key}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90, check=False
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("completed "), done.stderr
    assert lines[-1].endswith(" response.completed")
    numbers = [int(line.split()[0]) for line in lines if line.endswith((".delta", ".done", ".completed"))]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
