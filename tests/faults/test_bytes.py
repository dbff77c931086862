"""P1: the bytes of each upstream event reach the client unchanged, but for DESIGN §5."""

import asyncio
import json

import pytest

from gateway.kit.testing import Gateway
from gateway.kit.upstream import SPEECH, Body, ScriptedUpstream, Split, Stream
from tests.faults.endpoints import ask

pytestmark = pytest.mark.promise("P1.bytes")

TOOL_CALL = (
    b'data: {"id":"gen-1","zeta":{"new":[1.50,1e2]},"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,'
    b'"id":"toolu_01/\xc3\xa9","type":"function","function":{"name":"get.weather","arguments":"{\\"a\\":1}"}}]},'
    b'"finish_reason":null}]}\n\n'
)
GOLDEN = {
    "chat/completions": (
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        + TOOL_CALL
        + b'data:{ "choices" : [ {"delta":{"content":"h\xc3\xa9llo \xf0\x9f\x91\x8b"} , "x":null } ],"choices2":1  }\n\n'
        + b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls","native_finish_reason":"tool_use"}]}\n\n'
        + b"data: [DONE]\n\n"
    ),
    "completions": (
        b'data: {"choices":[{"text":"h\xc3\xa9","surprise":true}]}\n\n'
        b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n'
        b"data: [DONE]\n\n"
    ),
    "responses": (
        b'event: response.created\ndata: {"type":"response.created","sequence_number":0}\n\n'
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"\xe2\x82\xac","n":1}\n\n'
        b'id: 7\nevent: response.completed\ndata: {"type":"response.completed","response":{"status":"completed"}}\n\n'
    ),
    "messages": (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","model":"x"}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"text":"\xc3\xa9"}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    ),
    "images/generations": (
        b'event: image_generation.partial_image\ndata: {"type":"image_generation.partial_image","b64_json":"aa"}\n\n'
        b'event: image_generation.completed\ndata: {"type":"image_generation.completed","b64_json":"bb"}\n\n'
    ),
    "audio/transcriptions": (
        b'data: {"type":"transcript.text.delta","delta":"\xc3\xa9"}\n\n'
        b'data: {"type":"transcript.text.done","text":"\xc3\xa9"}\n\n'
    ),
}
LINE_ENDS = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}


def as_written(data: bytes, line_end: str) -> bytes:
    return data.replace(b"\n", LINE_ENDS[line_end])


async def at_each_split(data: bytes, endpoint: str, positions) -> dict[int, bytes]:
    """What the client got for a stream that the upstream sent in two packets, for each cut."""
    async with (
        ScriptedUpstream(default=lambda seen: Stream(Split(data, at=(int(seen.headers["x-session-id"]),)))) as upstream,
        Gateway.test(upstream=upstream) as gw,
    ):
        limit = asyncio.Semaphore(16)

        async def one(position: int) -> bytes:
            async with limit:
                reply = await ask(gw, endpoint, stream=True, headers={"x-session-id": str(position)})
            assert (reply.status, reply.cut) == (200, False)
            return reply.body

        bodies = await asyncio.gather(*map(one, positions))
    return dict(zip(positions, bodies, strict=True))


@pytest.mark.parametrize("endpoint", GOLDEN)
@pytest.mark.parametrize("line_end", LINE_ENDS)
async def test_events_are_unchanged_wherever_a_packet_ends(endpoint, line_end):
    """Cut at any byte, within UTF-8 and within a line's end too, an answer reaches the client byte by byte as sent."""
    data = as_written(GOLDEN[endpoint], line_end)
    got = await at_each_split(data, endpoint, range(1, len(data)))
    assert {at: body for at, body in got.items() if body != data} == {}


@pytest.mark.parametrize("endpoint", GOLDEN)
@pytest.mark.parametrize("line_end", LINE_ENDS)
@pytest.mark.parametrize("every", [1, 7, 10**6], ids=["bytewise", "by seven", "one packet"])
async def test_events_are_unchanged_in_many_packets_and_in_one(endpoint, line_end, every):
    """One byte a packet, or all events in one packet: the client gets the same bytes."""
    data = as_written(GOLDEN[endpoint], line_end)
    answer = Stream(Split(data, every=every, gap=0))
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, endpoint, stream=True)
        assert reply.body == data


@pytest.mark.parametrize("line_end", LINE_ENDS)
async def test_comments_alone_are_taken_out_wherever_a_packet_ends(line_end):
    """OpenRouter's comments fail strict clients: they go, alone or within an event, and nothing else goes with them."""
    first, *rest = GOLDEN["completions"].split(b"\n\n")[:-1]
    commented = (
        b": OPENROUTER PROCESSING\n\n"
        + first
        + b"\n\n: OPENROUTER PROCESSING\n\n:\n\n"
        + b":x\n"
        + rest[0].replace(b"data:", b"event: e\n: within\ndata:")
        + b"\n\n: late\n\n"
        + rest[1]
        + b"\n\n"
    )
    wanted = first + b"\n\n" + rest[0].replace(b"data:", b"event: e\ndata:") + b"\n\n" + rest[1] + b"\n\n"
    data = as_written(commented, line_end)
    got = await at_each_split(data, "completions", range(1, len(data)))
    wanted = as_written(wanted, line_end)
    assert {at: body for at, body in got.items() if body != wanted} == {}


async def test_a_multi_line_data_event_is_one_event():
    """An event whose JSON is spread over several `data:` lines is understood and passes as it is."""
    data = (
        b'data: {"choices":\ndata: [{"delta":{"content":"a"}}]}\n\n'
        b'data: {"choices":[\ndata:   {"delta":{},\ndata:    "finish_reason": "stop"\ndata:   }]\ndata: }\n\n'
        b"data: [DONE]\n\n"
    )
    async with Gateway.test(upstream=ScriptedUpstream(Stream(data))) as gw:
        reply = await gw.chat(stream=True)
        assert reply.body == data
        [exchange] = await gw.finished()
        assert exchange.outcome == "ok"


async def test_an_event_without_data_passes():
    """Fields that nobody knows, ids, retry times and events without data are the client's business."""
    data = b"retry: 3000\n\nid: 1\nfoo\n\n" + GOLDEN["chat/completions"]
    async with Gateway.test(upstream=ScriptedUpstream(Stream(data))) as gw:
        assert (await gw.chat(stream=True)).body == data


async def test_a_malformed_event_in_the_middle_passes():
    """After the first content nobody parses plain events: one that isn't JSON goes out as it came."""
    begin, end = GOLDEN["completions"].split(b"\n\n", 1)
    data = begin + b"\n\ndata: {half\n\n" + end
    async with Gateway.test(upstream=ScriptedUpstream(Stream(data))) as gw:
        assert (await ask(gw, "completions", stream=True)).body == data


WHOLE = (
    b'{ "id":"x",\r\n "choices":[{"message":{"content":"h\\u00e9 \xc3\xa9","tool_calls":[{"id":"a/b","function":'
    b'{"name":"f","arguments":"{}"}}]},"finish_reason":"stop","unknown":1.10}], "object" : null ,"usage":{"prompt_tokens":3}} \n'
)


@pytest.mark.parametrize(
    "endpoint",
    ["chat/completions", "completions", "responses", "messages", "embeddings", "rerank", "images/generations",
     "audio/transcriptions"],
)  # fmt: skip
async def test_a_whole_reply_is_unchanged(endpoint):
    """Spacing, escapes, number formats and unknown fields of a whole reply reach the client as they were."""
    async with Gateway.test(upstream=ScriptedUpstream(Body(WHOLE, "application/json"))) as gw:
        reply = await ask(gw, endpoint)
        assert (reply.status, reply.body) == (200, WHOLE)


async def test_blanks_before_a_whole_reply_are_dropped():
    """OpenRouter keeps slow whole replies alive with blanks: they go, the JSON stays as it is."""
    async with Gateway.test(
        upstream=ScriptedUpstream(Stream(b" ", b"\n\n ", WHOLE, content_type="application/json"))
    ) as gw:
        assert (await gw.chat()).body == WHOLE


@pytest.mark.parametrize("every", [1, 100, None])
async def test_sound_is_unchanged(every):
    """Speech is bytes: whatever stands in it, event marks included."""
    sound = SPEECH + b"\n\n: no comment\n\ndata: [DONE]\n\n\r\r"
    answer = Stream(Split(sound, every=every, gap=0), content_type="audio/mpeg")
    async with Gateway.test(upstream=ScriptedUpstream(answer)) as gw:
        reply = await ask(gw, "audio/speech")
        assert (reply.status, reply.headers["Content-Type"], reply.body) == (200, "audio/mpeg", sound)


async def test_a_big_event_is_unchanged():
    """An event of 2 MB (a picture) passes whole."""
    picture = b'data: {"type":"image_generation.completed","b64_json":"' + b"A" * 2_000_000 + b'"}\n\n'
    async with Gateway.test(upstream=ScriptedUpstream(Stream(picture))) as gw:
        assert (await ask(gw, "images/generations", stream=True)).body == picture


async def test_the_request_reaches_the_upstream_with_its_unknown_fields():
    """Fields that the gateway doesn't know pass to the upstream."""
    async with Gateway.test() as gw:
        await gw.chat(zeta={"deep": [1, None, 1.5]}, metadata={"a": "\x00é"})
        sent = json.loads(gw.upstream.seen[0].body)
    assert (sent["zeta"], sent["metadata"]) == ({"deep": [1, None, 1.5]}, {"a": "\x00é"})
