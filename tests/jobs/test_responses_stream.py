"""What clients are told of a background response, event by event, checked by OpenAI's own SDK."""

from __future__ import annotations

from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from gateway import Event
from gateway.kit.upstream import event as sse
from gateway.kit.upstream import response_events
from gateway_plugins.jobs.responses import objects
from gateway_plugins.jobs.responses.stream import Transcript, encode

NOW = 1_700_000_009
SEEN = TypeAdapter(ResponseStreamEvent)


def transcript() -> Transcript:
    return Transcript(objects.queued({"model": "m", "input": "Hello"}, "resp_1", 1_700_000_000))


def upstream(*args: Any, **kwargs: Any) -> list[Event]:
    return [Event(step) for step in response_events(*args, comments=False, **kwargs) if isinstance(step, bytes)]


def told(events: list[dict[str, Any]]) -> list[Any]:
    """As the SDK parses them, strictly."""
    return [SEEN.validate_json(Event(encode(event)).payload) for event in events]


def whole(script: Transcript, events: list[Event]) -> list[dict[str, Any]]:
    """As a worker makes it: what is passed on, and the end if the upstream told one."""
    out = [script.pass_on(event) for event in events]
    end = [] if script.answer is None else [script.complete(script.answer, NOW)]
    return [*(event for event in out if event is not None), *end]


def test_a_stream_is_numbered_through_under_one_id() -> None:
    """From `created` to `completed`: one sequence from 0, one id, each event of the SDK's types."""
    script = transcript()
    events = told([*script.begin(), *script.start(), *whole(script, upstream("Hello there", id="gen-1"))])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.queued", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip
    assert [event.response.status for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert {event.response.id for event in events if hasattr(event, "response")} == {"resp_1"}
    assert (events[-1].type, events[-1].response.output_text) == ("response.completed", "Hello there")


def test_the_sdks_helper_puts_the_answer_together() -> None:
    """`client.responses.stream()` accepts the order of events and ends with the whole answer."""
    script = transcript()
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in told([*script.begin(), *script.start(), *whole(script, upstream("Hello there"))]):
        state.handle_event(event)
    assert state._completed_response.output_text == "Hello there"


def test_an_answer_cut_by_its_limit_ends_incomplete() -> None:
    """`response.incomplete` is an end of its own, and the object says so too."""
    script = transcript()
    events = told([*script.begin(), *script.start(), *whole(script, upstream("Hel", finish="incomplete"))])
    assert (events[-1].type, events[-1].response.incomplete_details.reason) == (
        "response.incomplete", "max_output_tokens",
    )  # fmt: skip
    assert script.response["completed_at"] is None


def test_a_failure_in_the_middle_ends_the_stream_as_failed() -> None:
    """The gateway's error event becomes `response.failed`, with the code and what there was of the answer."""
    script = transcript()
    error = Event(sse("error", {"type": "error", "code": "upstream_truncated", "message": "Lost."}))
    events = [*script.begin(), *script.start(), *whole(script, [*upstream("Hello there")[:6], error])]
    last = told([*events, script.fail("upstream_truncated", "Lost.")])[-1]
    assert (last.type, last.response.error.type, last.response.error.message) == (
        "response.failed", "upstream_truncated", "Lost.",
    )  # fmt: skip
    assert last.sequence_number == len(events)
    assert [(item.status, item.content[0].text) for item in last.response.output] == [("incomplete", "Hello th")]


def test_a_cancelled_response_keeps_what_it_had_said() -> None:
    """Its last event and object say `cancelled`; the text so far is there, as an unfinished item."""
    script = transcript()
    script.begin(), script.start(), whole(script, upstream("Hello there")[:5])
    last = script.cancel()
    assert (last["type"], last["response"]["status"]) == ("response.cancelled", "cancelled")
    [item] = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hell")


CALL: list[dict[str, Any]] = [
    {"type": "response.output_item.added", "output_index": 0, "item": {"type": "reasoning", "id": "rs_1", "summary": []}},
    {"type": "response.reasoning_summary_part.added", "item_id": "rs_1", "output_index": 0, "summary_index": 0,
     "part": {"type": "summary_text", "text": ""}},
    {"type": "response.reasoning_summary_text.delta", "item_id": "rs_1", "output_index": 0, "summary_index": 0, "delta": "Hm"},
    {"type": "response.reasoning_summary_text.delta", "item_id": "rs_1", "output_index": 0, "summary_index": 0, "delta": "m."},
    {"type": "response.output_item.added", "output_index": 1,
     "item": {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "", "status": "in_progress"}},
    {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 1, "delta": '{"a'},
    {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 1, "delta": '":1}'},
]  # fmt: skip


def test_reasoning_and_calls_are_kept_as_far_as_they_came() -> None:
    """Not only text: what a model thought and which call it was writing is there, too."""
    script = transcript()
    script.begin(), script.start()
    told(whole(script, [Event(sse(data["type"], {**data, "sequence_number": 0})) for data in CALL]))
    reasoning, call = script.output
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hmm."}]
    assert (call["arguments"], call["status"]) == ('{"a":1}', "incomplete")


def test_another_worker_goes_on_where_the_first_was_killed() -> None:
    """Numbers go on, the half answer is closed, the new one stands behind it; the SDK's helper takes only that one."""
    first = transcript()
    before = [*first.begin(), *first.start(), *whole(first, upstream("Half an answer")[:6])]
    second = transcript()
    for event in before:
        second.told(event)
    after = [*second.start(), *whole(second, upstream("The whole answer"))]
    events = told([*before, *after])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [(e.type, e.item.status) for e in events if e.type == "response.output_item.done"] == [
        ("response.output_item.done", "incomplete"), ("response.output_item.done", "completed"),
    ]  # fmt: skip
    by_place: dict[int, str] = {}
    for event in events:
        if event.type == "response.output_text.delta":
            by_place[event.output_index] = by_place.get(event.output_index, "") + event.delta
    assert by_place[1] == "The whole answer"
    assert events[-1].response.output_text == "The whole answer"


@pytest.mark.parametrize("event", [b": comment\n\n", b"data: [DONE]\n\n", b"data: 3\n\n", b"data: {}\n\n"])
def test_what_is_no_event_of_the_api_is_not_passed_on(event: bytes) -> None:
    """Comments, terminators and what is not JSON take no number."""
    script = transcript()
    assert script.pass_on(Event(event)) is None
    assert script.number == 0


def test_an_unknown_event_passes_with_a_number() -> None:
    """What the API adds tomorrow reaches clients today."""
    script = transcript()
    event = script.pass_on(
        Event(sse("response.new.thing", {"type": "response.new.thing", "x": 1, "response_id": "gen"}))
    )
    assert event == {"type": "response.new.thing", "x": 1, "response_id": "resp_1", "sequence_number": 0}
