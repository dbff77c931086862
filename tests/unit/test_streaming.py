"""How a stream is cut into events, judged and passed on. The response is a list of chunks; the rest is the real thing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import DIALECTS
from gateway.errors import Cause, UpstreamError
from gateway.kit.upstream import (
    COMMENT,
    chat_error,
    chat_events,
    encode_step,
    event,
    message_events,
    response_events,
    response_failed,
)
from gateway.streaming import PREAMBLE_LIMIT, ByteStream, EventStream, Splitter, split_events

LIMIT = 1 << 20
ENDS = [b"\n", b"\r\n", b"\r"]

lines = st.lists(
    st.sampled_from([b"data: {}", b"data:x", b": note", b"event: e", "data: \u00e9\u2028".encode()]),
    min_size=1,
    max_size=3,
)
events = st.builds(lambda end, found: [end.join([*e, b"", b""]) for e in found], st.sampled_from(ENDS), st.lists(lines, min_size=1, max_size=5))  # fmt: skip


def cut(draw, data):
    """`data` in pieces, cut anywhere."""
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.data(), events)
def test_any_split_gives_the_same_events(data, whole):
    """However the network cuts a stream, in whichever line endings, the same events leave, each whole."""
    splitter = Splitter(LIMIT)
    blocks = [splitter.feed(piece) for piece in cut(data.draw, b"".join(whole))]
    found = [e for block in blocks for e in split_events(block)]
    if splitter.carry:
        # a CR at the very end may be half of a CRLF: it waits
        assert whole[-1].endswith(b"\r\n\r\n") is False
    assert b"".join([*found, splitter.carry]) == b"".join(whole)
    assert found == whole


@given(st.data(), st.binary(max_size=60) | st.text("\r\n:ad", max_size=60).map(str.encode))
def test_no_byte_is_lost_or_added(data, raw):
    """Whatever an upstream sends, what is passed on and what waits are exactly its bytes, in their order."""
    splitter = Splitter(LIMIT)
    out = b"".join(splitter.feed(piece) for piece in cut(data.draw, raw))
    assert out + splitter.carry == raw


def test_half_an_event_waits():
    """A client never gets half an event."""
    splitter = Splitter(LIMIT)
    assert splitter.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert splitter.carry == b"data: 2"
    assert splitter.feed(b"\n") == b""
    assert splitter.feed(b"\n") == b"data: 2\n\n"
    assert splitter.carry == b""


def test_what_is_whole_leaves_at_once():
    """No event waits for the next one: all that are whole leave with the piece that completed them."""
    assert Splitter(LIMIT).feed(b"\n\ndata: 1") == b"\n\n"
    for end in ENDS:
        splitter = Splitter(LIMIT)
        whole = b"data: 1" + end * 2 + b"data: 2" + end * 2
        assert splitter.feed(whole + b"data: 3") == whole
        assert splitter.feed(end) == b""
    splitter = Splitter(LIMIT)
    assert splitter.feed(b"data: 1\r\n\r\ndata: 2\r\n\r") == b"data: 1\r\n\r\n"
    assert splitter.feed(b"\n") == b"data: 2\r\n\r\n"


@pytest.mark.parametrize("size, fits", [(10, True), (11, False)])
@pytest.mark.parametrize("before", [b"", b"data: 1\n\n"])
def test_an_endless_event_is_cut_off(size, fits, before):
    """An upstream that never ends an event can't fill the memory."""
    splitter = Splitter(10)
    data = before + b"x" * size
    if fits:
        assert splitter.feed(data) == before
        return
    with pytest.raises(UpstreamError, match="larger than 10 bytes") as caught:
        splitter.feed(data)
    assert caught.value.cause is Cause.BAD_REPLY


class Response:
    """Chunks, then the body's complete end, its loss, or silence, for which nobody may wait."""

    def __init__(self, *chunks, lost=False, silent=False):
        self._chunks, self._lost, self._silent = list(chunks), lost, silent

    async def chunk(self):
        if self._chunks:
            return self._chunks.pop(0)
        assert not self._silent
        if self._lost:
            raise UpstreamError(Cause.TRUNCATED, "lost")
        return b""


def stream(endpoint, *chunks, forward_usage=True, max_event=LIMIT, secret="", **end):
    grammar = DIALECTS[endpoint].grammar
    return EventStream(
        Response(*chunks, **end), grammar, forward_usage=forward_usage, max_event=max_event, secret=secret
    )


async def blocks(found):
    out = []
    await found.first_content()
    while (block := await found.next_block()) is not None:
        out.append(block)
    assert await found.next_block() is None
    return out


async def relayed(found):
    return b"".join(await blocks(found))


async def failure(found):
    """What went out before the error, and the error, which is told again to whoever asks again."""
    out = b""
    await found.first_content()
    with pytest.raises(UpstreamError) as caught:
        while (block := await found.next_block()) is not None:
            out += block
    return out, caught.value


def chat(**kwargs):
    return [encode_step(s) for s in chat_events(**kwargs)]


def data(*found):
    return [encode_step(f) for f in found]


@given(st.data(), st.booleans(), st.sampled_from(["chat/completions", "messages", "responses"]))
async def test_every_event_arrives_as_it_came(drawn, forward_usage, endpoint):
    """The client gets the upstream's events byte for byte, however they were cut, without its comments."""
    build = {"chat/completions": chat_events, "messages": message_events, "responses": response_events}[endpoint]
    steps = [encode_step(s) for s in build()]
    found = stream(endpoint, *filter(None, cut(drawn.draw, b"".join(steps))), forward_usage=forward_usage)
    expected = [s for s in steps if s != encode_step(COMMENT)]
    if endpoint == "chat/completions" and not forward_usage:
        expected = [s for s in expected if b'"choices":[]' not in s]
    assert await relayed(found) == b"".join(expected)
    assert found.finished
    assert found.usage_is_final
    assert DIALECTS[endpoint].usage(found.usage).output_tokens == 5


async def test_usage_is_metered_whether_or_not_it_is_passed_on():
    """A client that didn't ask for the usage chunk doesn't get it; it is counted all the same."""
    for forward in (True, False):
        found = stream("chat/completions", *chat(), forward_usage=forward)
        assert (b'"choices":[],' in await relayed(found)) is forward
        assert found.usage["completion_tokens"] == 5


async def test_comments_inside_an_event_are_dropped():
    """Comments vanish wherever they stand; the event around them doesn't."""
    raw = b': a\ndata: {"choices":[{"delta":{"content":"x"}}]}\n: b\n\n'
    rest = b': c\r\n\r\ndata: {"choices":[{"delta":{"content":"y"}}]}\r\n: d\r\n\r\n:e\r\r'
    found = stream("chat/completions", raw, rest, *chat(comments=False)[-3:])
    out = await relayed(found)
    assert out.startswith(
        b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: {"choices":[{"delta":{"content":"y"}}]}\r\n\r\ndata:'
    )
    assert found.events == 2 + 2  # [DONE] is an end, not an event that was passed on
    odd = b'data: {"choices":[]}\r: f\r\r'
    found = stream("chat/completions", raw, odd, *chat(comments=False)[-3:])
    assert b": f" not in await relayed(found)


async def test_the_preamble_waits_for_the_first_content():
    """Nothing goes out before the first content: until then another model can still answer."""
    steps = chat()
    found = stream("chat/completions", *steps)
    await found.first_content()
    assert await found.next_block() == b"".join(steps[1:3])  # the role and the first word, not the comment
    assert (found.events, found.last) == (2, steps[2])
    assert await found.next_block() == steps[3]
    assert (found.events, found.last) == (3, steps[3])


async def test_what_comes_with_the_first_content_is_kept():
    """Events that arrive in one piece with the first content follow it in order."""
    steps = b"".join(chat(comments=False))
    found = stream("chat/completions", encode_step(COMMENT) + steps)
    await found.first_content()
    assert found.events == 0
    assert await found.next_block() == steps
    assert await found.next_block() is None


@pytest.mark.parametrize(
    "chunks, cause, words",
    [
        ([], Cause.TRUNCATED, "^The upstream ended the stream before any content.$"),
        (chat()[:2], Cause.TRUNCATED, "before any content"),
        ([*chat()[:2], *data("[DONE]")], Cause.TRUNCATED, "^The upstream ended the stream before any content.$"),
        ([*chat()[:2], b"data: {half\n\n"], Cause.BAD_REPLY, "^The upstream sent an event that is not JSON.$"),
        ([*chat()[:2], b"data: []\n\n"], Cause.BAD_REPLY, "not JSON"),
        ([*chat()[:2], *data(chat_error(429, "Slow down"))], Cause.RATE_LIMIT, "Slow [*]{3}"),
        ([b"data: " + b" " * PREAMBLE_LIMIT + b"{}\n\n"], Cause.BAD_REPLY, "No content within"),
        ([b"data: " + b" " * (PREAMBLE_LIMIT // 2) + b"{}\n\n"] * 2, Cause.BAD_REPLY, "No content within"),
        ([b"x" * 2000], Cause.BAD_REPLY, "larger than 1000"),
    ],
    ids=["empty", "role only", "done", "half", "array", "error", "long preamble", "much preamble", "long event"],
)
async def test_a_stream_that_fails_before_content_is_an_error(chunks, cause, words):
    """A stream without content is a failure that another model can make good."""
    limit = 1000 if words.startswith("larger") else LIMIT
    ends = "before any content" in words and b"[DONE]" not in b"".join(chunks)
    silent = not ends  # what is wrong in the stream itself is told at once
    with pytest.raises(UpstreamError, match=words) as caught:
        await stream("chat/completions", *chunks, max_event=limit, silent=silent, secret="down").first_content()
    assert caught.value.cause is cause
    assert "down" not in caught.value.message


async def test_a_preamble_up_to_its_limit_is_fine():
    """A long preamble that ends in time is passed on."""
    one = b"data: {}\n\n"
    whole = b"data: " + b" " * (PREAMBLE_LIMIT - len(one)) + b"{}\n\n"
    assert (await relayed(stream("chat/completions", whole, *chat(comments=False, preamble=False)))).startswith(whole)
    found = stream("chat/completions", one * (PREAMBLE_LIMIT // len(one)), *chat(comments=False, preamble=False))
    assert (await relayed(found)).endswith(b"[DONE]\n\n")
    content = b'data: {"choices":[{"delta":{"content":"' + b"x" * PREAMBLE_LIMIT + b'"}}]}\n\n'
    found = stream("chat/completions", content, *chat(comments=False))
    assert (await relayed(found)).startswith(content)


async def test_an_answer_that_ends_at_once_is_an_answer():
    """A finish reason without a word before it is an empty answer, not a failure."""
    steps = chat(comments=False, preamble=False, text="")[-3:]
    assert await relayed(stream("chat/completions", b"".join(steps))) == b"".join(steps)


@pytest.mark.parametrize("lost", [False, True], ids=["ended", "lost"])
@pytest.mark.parametrize("kept", [3, 5, 6], ids=["in the text", "after the finish reason", "before [DONE]"])
async def test_a_truncated_chat_never_ends_cleanly(lost, kept):
    """A stream without its finish reason and [DONE] is told as truncated, never passed off as whole."""
    sent = chat()[:kept]
    found = stream("chat/completions", *sent, lost=lost)
    out, error = await failure(found)
    assert error.cause is Cause.TRUNCATED
    assert error.message == ("lost" if lost else "The upstream ended the stream without finishing the answer.")
    assert out == b"".join(sent[1:])  # all but the comment
    assert not found.finished


async def test_done_without_a_finish_reason_is_a_truncation():
    """[DONE] alone doesn't make an answer whole."""
    found = stream("chat/completions", *chat(finish=None), silent=True)
    out, error = await failure(found)
    assert (error.cause, b"[DONE]" in out) == (Cause.TRUNCATED, False)
    assert error.message == "The upstream ended the stream without finishing the answer."


@pytest.mark.parametrize("lost", [False, True], ids=["ended", "lost"])
async def test_a_finished_response_needs_no_done(lost):
    """/responses ends with its last event: a connection that breaks after it takes nothing from the answer."""
    steps = [encode_step(s) for s in response_events(comments=False)]
    found = stream("responses", *steps, lost=lost)
    flushed = []
    found.flush = lambda: flushed.append(1) or b"held"
    assert await relayed(found) == b"".join(steps) + b"held"
    assert flushed == [1]
    out, error = await failure(stream("responses", *steps[:-1], lost=lost))
    assert (out, error.cause) == (b"".join(steps[:-1]), Cause.TRUNCATED)
    assert (error.message == "lost") is lost


@pytest.mark.parametrize(
    "endpoint, before, error",
    [
        ("chat/completions", chat(comments=False)[:4], encode_step(chat_error(502, "It broke of sk-secret"))),
        ("responses", [encode_step(s) for s in response_events(comments=False)][:6], response_failed(6, "server_error", "It broke of sk-secret")),
        ("messages", [encode_step(s) for s in message_events(comments=False)][:5], event("error", {"type": "error", "error": {"type": "api_error", "message": "It broke of sk-secret"}})),
    ],
    ids=["chat", "responses", "messages"],
)  # fmt: skip
async def test_an_error_in_the_stream_comes_after_what_stands_before_it(endpoint, before, error):
    """What was said before an error reaches the client; the error is then ours to tell, once, without secrets."""
    for chunks in (
        [*before, error],
        [b"".join([*before, error])],
        [before[0], b"".join([*before[1:], error, *before])],
    ):
        found = stream(endpoint, *chunks, secret="sk-secret")
        if chunks[0].endswith(error):
            found = stream(endpoint, before[0], b"".join(before[1:]) + error, secret="sk-secret")
        out, caught = await failure(found)
        assert out == b"".join(before)
        assert (caught.cause, caught.message) == (Cause.SERVER_ERROR, "It broke of ***")
        with pytest.raises(UpstreamError):
            await found.next_block()


async def test_nothing_follows_the_end():
    """What an upstream sends after [DONE] stays there."""
    late = chat(comments=False)[1]
    for chunks in ([*chat(), late], [*chat()[:-1], chat()[-1] + late]):
        assert (await relayed(stream("chat/completions", *chunks))).endswith(b"data: [DONE]\n\n")


async def test_each_event_passes_the_tap_and_the_flush_comes_before_the_end():
    """A plugin sees whole events, may drop or add some, and says its last word before [DONE]."""
    seen = []
    steps = chat(comments=False)
    found = stream("chat/completions", *[b"".join(steps[i : i + 2]) for i in range(0, len(steps), 2)])
    found.tap = lambda e: seen.append(bytes(e)) or ([] if len(seen) == 1 else [e, b"extra\n\n"])
    found.flush = lambda: b"last word\n\n"
    out = await relayed(found)
    assert seen == steps[:-1]
    assert out == b"extra\n\n".join([*steps[1:-1], b""]) + b"last word\n\n" + steps[-1]
    assert found.events == len(seen)
    assert found.last == steps[-2]


async def test_the_flush_is_not_called_for_a_truncated_stream():
    """A stream that broke off ends with its error, without a clean last word."""
    found = stream("chat/completions", *chat()[:3])
    found.flush = lambda: pytest.fail("flushed")
    await failure(found)


async def test_anthropics_usage_comes_in_two_parts():
    """Counts of message_start are kept, those of message_delta win; the first alone is not final."""
    steps = [encode_step(s) for s in message_events(comments=False)]
    found = stream("messages", *steps)
    assert not found.usage_is_final
    await found.first_content()
    assert found.usage["output_tokens"] == 0
    assert not found.usage_is_final
    while await found.next_block() is not None:
        pass
    assert (found.usage["input_tokens"], found.usage["output_tokens"]) == (10, 5)
    assert found.usage_is_final


async def test_a_later_null_doesnt_undo_a_count():
    """A count that an upstream repeats as null stays known."""
    one = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":3,"cost":0.1}}\n\n'
    two = b'data: {"choices":[],"usage":{"prompt_tokens":null,"completion_tokens":4}}\n\n'
    found = stream("chat/completions", one, *chat(comments=False, usage=False)[-2:-1], two, b"data: [DONE]\n\n")
    await relayed(found)
    assert found.usage == {"prompt_tokens": 3, "cost": 0.1, "completion_tokens": 4}


async def test_events_are_counted_in_any_line_ending():
    """Blocks that pass unparsed count each of their events."""
    one = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    for end in ENDS:
        found = stream("chat/completions", one, one.replace(b"\n", end) * 3)
        await found.first_content()
        await found.next_block()
        await found.next_block()
        assert found.events == 4


async def test_bytes_pass_as_they_come():
    """Speech passes byte for byte; an empty body is no answer."""
    found = ByteStream(Response(b"ab", b"c"))
    await found.first_content()
    assert [await found.next_block() for _ in range(3)] == [b"ab", b"c", None]
    assert (found.usage, found.last) == (None, b"")
    assert (found.answered, found.finish()) == (False, b"")
    with pytest.raises(UpstreamError, match=r"^The upstream sent an empty body\.$") as caught:
        await ByteStream(Response()).first_content()
    assert caught.value.cause is Cause.BAD_REPLY


async def test_a_stream_that_was_not_read_has_said_nothing():
    """Who asks before the first event learns that nothing is known, and no default hides what an upstream says."""
    found = EventStream(
        Response(b'data: {"choices":[{"delta":{"content":"XXXX"}}]}\n\n', *chat(comments=False)),
        DIALECTS["chat/completions"].grammar,
        forward_usage=True,
        max_event=LIMIT,
    )
    assert (found.usage, found.last, found.events) == (None, b"", 0)
    assert (found.finished, found.answered, found.usage_is_final) == (False, False, False)
    assert b"XXXX" in await relayed(found)


@pytest.mark.parametrize("endpoint, steps, model", [
    ("chat/completions", [{"model": "a/b", "choices": [{"delta": {"content": "x"}}]}], "a/b"),
    ("chat/completions", [{"choices": []}, {"model": "a/b", "choices": [{"delta": {"content": "x"}}]}], "a/b"),
    ("chat/completions", [{"model": 7, "choices": [{"delta": {"content": "x"}}]}], None),
    ("chat/completions", [{"choices": [{"delta": {"content": "x"}}]}], None),
    ("responses", [{"type": "response.created", "response": {"model": "a/b"}},
                   {"type": "response.output_text.delta"}], "a/b"),
    ("messages", [{"type": "message_start", "message": {"model": "a/b"}}, {"type": "content_block_delta"}], "a/b"),
])  # fmt: skip
async def test_the_model_that_answers_is_read_from_the_first_events(endpoint, steps, model):
    """Which of several models answers is known before the first byte goes out, wherever the dialect says it."""
    comment = [b"event: ping\n\n"] if endpoint == "messages" else []
    found = stream(endpoint, *comment, *data(*steps))
    await found.first_content()
    assert found.model() == model


@pytest.mark.parametrize("leak", [
    b'data: {"choices":[{"delta":{"content":"sk-secret"}}]}\n\n',
    b'sk-secret: field\ndata: {"choices":[]}\n\n',
])  # fmt: skip
@pytest.mark.parametrize("tapped", [False, True])
async def test_our_own_key_is_not_passed_on(leak, tapped):
    """An upstream that repeats the key that it was sent is cut off there: no client reads the operator's key."""
    before = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    for chunks in ((before, leak), (before, before + leak + before), (before + leak,)):
        found = stream("chat/completions", *chunks, *chat(comments=False), secret="sk-secret")
        found.tap = (lambda e: [e]) if tapped else None
        out, error = await failure(found)
        assert out == before * (2 if chunks[-1].startswith(before) and len(chunks) == 2 else 1)
        assert (error.cause, error.message) == (
            Cause.BAD_REPLY,
            "The upstream's stream held what must not be passed on.",
        )


@pytest.mark.parametrize("secret", ["", "sk-secret"])
async def test_plain_events_pass_unread(secret):
    """After the first content a block of plain events leaves as the very bytes that came: it is not taken apart."""
    first, block = chat(comments=False)[1], b"".join(chat(comments=False)[2:4])
    found = stream("chat/completions", first, block, secret=secret)
    await found.first_content()
    assert await found.next_block() == first
    assert await found.next_block() is block


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n", b"data:[DONE] "])
async def test_a_done_without_its_blank_line_is_an_end(end):
    """An upstream that closes right after [DONE] did say that it was done: the client gets a whole event."""
    steps = chat(comments=False)
    found = stream("chat/completions", *steps[:-1], end)
    assert await relayed(found) == b"".join(steps[:-1]) + end.rstrip(b"\r\n") + b"\n\n"
    assert found.finished
    _, error = await failure(stream("chat/completions", *steps[:-1], b"data: [DON"))
    assert error.cause is Cause.TRUNCATED
