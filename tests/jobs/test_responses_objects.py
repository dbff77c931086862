"""The response object and the items of its input, checked by the types of OpenAI's own SDK."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import Response, ResponseItemList
from pydantic import TypeAdapter

from gateway import BadRequest
from gateway.kit.upstream import response_object
from gateway_plugins.jobs.responses import items, objects

ASKED = {
    "model": "openai/gpt-5-mini",
    "input": "Hello",
    "background": True,
    "instructions": "Be short.",
    "metadata": {"order": "7"},
    "tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": True}],
    "tool_choice": "required",
    "temperature": 0.2,
    "max_output_tokens": 100,
}


def queued(**fields: Any) -> dict[str, Any]:
    return objects.queued({**ASKED, **fields}, "resp_1", 1_700_000_000)


def parsed(response: dict[str, Any]) -> Response:
    return TypeAdapter(Response).validate_python(response)


STATES = {
    "queued": queued(),
    "in_progress": objects.in_progress(queued()),
    "completed": objects.answered(queued(), response_object("Hi"), 1_700_000_009),
    "incomplete": objects.answered(queued(), response_object("Hi", status="incomplete"), 1_700_000_009),
    "failed": objects.failed(queued(), "upstream_truncated", "It broke off."),
    "cancelled": objects.cancelled(queued()),
}


@pytest.mark.parametrize("status", STATES)
def test_in_each_state_it_has_what_the_sdk_demands(status: str) -> None:
    """Whatever became of it, OpenAI's SDK finds each field of its own type, our id, and what the client had asked for."""
    response = parsed(STATES[status])
    assert (response.status, response.id, response.created_at) == (status, "resp_1", 1_700_000_000)
    assert (response.background, response.metadata, response.instructions) == (True, {"order": "7"}, "Be short.")
    assert STATES[status]["store"] is True


def test_an_answer_keeps_what_the_upstream_said_and_nothing_of_its_own_identity() -> None:
    """Output, usage and model are the upstream's; that it was a stateless call there is nobody's business."""
    answer = response_object("Hi", "openai/gpt-5-mini-2026", id="gen-1", previous_response_id="gen-0")
    response = objects.answered(queued(), answer, 1_700_000_009)
    assert parsed(response).output_text == "Hi"
    assert (response["model"], response["usage"]["cost"]) == ("openai/gpt-5-mini-2026", answer["usage"]["cost"])
    assert (response["id"], response["previous_response_id"], response["background"]) == ("resp_1", None, True)
    assert parsed(response).usage.input_tokens_details.cache_write_tokens == 0


def test_an_answer_that_lacks_half_of_its_fields_is_whole_for_the_sdk() -> None:
    """A compatible server that leaves out what it does not know can't break a typed client."""
    answer = {"id": "x", "model": "m", "output": None, "tools": None, "usage": {"input_tokens": 3, "output_tokens": 4}}
    response = parsed(objects.answered(queued(), answer, 1_700_000_009))
    assert (response.status, response.output, response.completed_at) == ("completed", [], 1_700_000_009)
    assert response.usage is not None
    assert (response.usage.total_tokens, len(response.tools)) == (7, 1)


def test_nonsense_in_a_request_is_not_echoed() -> None:
    """The worker's answer will say what is wrong with it; until then the object can be read."""
    nonsense = {
        "tools": "none",
        "temperature": "hot",
        "parallel_tool_calls": 3,
        "text": [],
        "metadata": 1,
        "top_p": True,
    }
    response = parsed(queued(**nonsense))
    assert (response.tools, response.temperature, response.parallel_tool_calls) == ([], 1.0, True)


def test_what_is_long_is_echoed_by_the_answer_alone() -> None:
    """Instructions of a megabyte are not read again with each look at a response that waits."""
    waiting = queued(instructions="x" * 1_000_000)
    assert waiting["instructions"] is None
    answer = response_object("Hi", instructions="x" * 1_000_000)
    assert len(objects.answered(waiting, answer, 1_700_000_009)["instructions"]) == 1_000_000


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("rate_limit_exceeded", "rate_limit_exceeded"),
        ("context_length_exceeded", "invalid_prompt"),
        ("upstream_timeout", "server_error"),
        ("principal_gone", "server_error"),
    ],
)
def test_a_failure_has_a_code_of_the_api_and_the_gateways_beside_it(ours: str, theirs: str) -> None:
    """`error.code` is one that typed clients know; `error.type` says which of the gateway's it was."""
    error = parsed(objects.failed(queued(), ours, "No.")).error
    assert error is not None
    assert (error.code, error.type, error.message) == (theirs, ours, "No.")


LONG = [
    {"role": "developer", "content": "Be short."},
    {
        "role": "user",
        "content": [{"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}],
    },
    {"role": "assistant", "content": "Yes?"},
    {"type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "3"},
    {"id": "msg_own", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]},
]


def test_a_text_is_one_item_of_the_input() -> None:
    """Who sent a text finds it as a user's message."""
    [item] = items.listed("Hello", "resp_1")
    assert (item["role"], item["content"]) == ("user", [{"type": "input_text", "text": "Hello"}])


def test_every_item_of_the_input_is_one_of_the_sdks() -> None:
    """Messages, files, calls and their outputs: each has its type, and an id that it keeps."""
    listed = items.listed(LONG, "resp_1")
    page = items.page(listed, limit=20, order="asc", after=None)
    read = TypeAdapter(ResponseItemList).validate_python(page)
    assert [item.type for item in read.data] == [
        "message", "message", "message", "function_call", "function_call_output", "message",
    ]  # fmt: skip
    assert read.data[-1].id == "msg_own"
    assert listed == items.listed(LONG, "resp_1")
    assert len({item["id"] for item in listed} | {item["id"] for item in items.listed(LONG, "resp_2")}) == 11


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_items_join_without_gap(order: str) -> None:
    """Page by page, in either order, each item comes once."""
    listed = items.listed(LONG, "resp_1")
    seen: list[str] = []
    after = None
    for _ in range(10):
        page = items.page(listed, limit=4, order=order, after=after)
        seen += [item["id"] for item in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    ids = [item["id"] for item in listed]
    assert seen == (ids if order == "asc" else ids[::-1])


def test_a_page_behind_an_unknown_item_is_refused() -> None:
    """A cursor that names nothing is a mistake, not an empty page."""
    with pytest.raises(BadRequest, match="after"):
        items.page(items.listed("Hello", "resp_1"), limit=20, order="asc", after="msg_other")


def test_a_conversation_goes_on_with_all_that_was_said() -> None:
    """Question, answer, next question; of reasoning only what carries its own content."""
    output = [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant"},
    ]
    whole = items.continued("One?", output, "Two?")
    assert [item.get("role") for item in whole] == ["user", "assistant", "user"]
    kept = items.continued([], [{**output[0], "encrypted_content": "x"}], [])
    assert [item["type"] for item in kept] == ["reasoning"]
    with pytest.raises(BadRequest, match="input"):
        items.continued("One?", [], 3)
