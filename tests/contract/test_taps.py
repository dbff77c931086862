"""What a tap sees of a stream, what it may change, and when it hears of the end."""

import json

import pytest
import structlog

from gateway import hookimpl
from gateway.exchange import Outcome
from gateway.kit.testing import Gateway
from gateway.kit.upstream import ScriptedUpstream, Split, Stream, chat_events, encode_step
from tests.contract.recorder import Hits, Recorder

DONE = b"data: [DONE]\n\n"


class Plugin:
    """Opens what `make` of a subclass returns, and keeps it."""

    def __init__(self, config, services):
        self.taps = []

    def make(self):
        return Tap()

    @hookimpl
    def open_tap(self, exchange):
        tap = self.make()
        self.taps.append(tap)
        return tap


class Tap:
    """Notes what it sees and passes it on."""

    def __init__(self):
        self.seen = []
        self.ends = []

    def event(self, event):
        self.seen.append(event)
        return event

    def end(self, outcome):
        self.ends.append(outcome)
        return ()


def tapping(tap, *, name="Tapping", **attributes):
    """A plugin class whose taps are instances of `tap`."""
    return type(name, (Plugin,), {"make": lambda _: tap(), **attributes})


def rewriting(tap, *, name="Tapping", **attributes):
    return tapping(tap, name=name, rewrites=True, **attributes)


def chat_stream(text="Hello there", **changes):
    """The events of one chat stream, without comments."""
    return [encode_step(step) for step in chat_events(text, comments=False, usage=False, **changes)]


def content(body):
    """The text that a client reads out of a chat stream."""
    chunks = [json.loads(e[6:]) for e in body.split(b"\n\n") if e.startswith(b"data: {")]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk.get("choices", ()))


def chunk(text):
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


def gateway(*plugins, stream, **how):
    return Gateway.test(plugins=plugins, upstream=ScriptedUpstream(Stream(*stream, **how)))


def tap_of(gw, name="Tapping"):
    [tap] = gw.plugin(name).taps
    return tap


@pytest.mark.parametrize("every", [1, 7, 100])
async def test_a_tap_sees_whole_events_however_they_are_cut(every):
    """Wherever the network cuts, a tap gets each event once and whole; the terminator is not shown."""
    events = chat_stream("Grüße, 世界 🌍")
    async with gateway(tapping(Tap), stream=[Split(b"".join(events), every=every, gap=0)]) as gw:
        reply = await gw.chat(stream=True)
        assert tap_of(gw).seen == events[:-1]
        assert events[-1] == DONE
        assert reply.body == b"".join(events)


async def test_events_that_nobody_changes_leave_as_they_came():
    """Bytes are not written anew: odd spacing, CRLF and unknown fields reach the client as the upstream sent them."""
    events = [
        b'data:{"choices":[{"delta":{"content":"a"},"odd":  1}]}\n\n',
        b'event: message\r\nid: 7\r\ndata: {"choices":[ {"delta":{"content":"b"}} ]}\r\n\r\n',
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
        DONE,
    ]
    for plugin in (tapping(Tap), rewriting(Tap)):
        async with gateway(plugin, stream=events) as gw:
            assert (await gw.chat(stream=True)).body == b"".join(events)
            assert tap_of(gw).seen == events[:-1]


@pytest.mark.promise("P1.bytes")
async def test_what_a_tap_returns_counts_only_if_it_says_that_it_rewrites():
    """A plugin that only watches can't change a stream by mistake, whatever it returns."""

    class Careless(Tap):
        def event(self, event):
            self.seen.append(event)

        def end(self, outcome):
            self.ends.append(outcome)
            return [chunk("more")]

    events = chat_stream()
    async with gateway(tapping(Careless), stream=events) as gw:
        assert (await gw.chat(stream=True)).body == b"".join(events)
        assert tap_of(gw).seen == events[:-1]


async def test_a_rewriting_tap_replaces_drops_and_multiplies():
    """A tap that rewrites may return another event, none, or several."""

    class Rewriter(Tap):
        def event(self, event):
            match content(event):
                case "replace":
                    return chunk("replaced ")
                case "drop":
                    return None
                case "empty":
                    return []
                case "several":
                    return [chunk("one "), event, chunk(" three")]
            return event

    words = ["replace", "drop", "empty", "several"]
    stream = [*(chunk(word) for word in words), *chat_stream("")[-2:]]
    async with gateway(rewriting(Rewriter), stream=stream) as gw:
        reply = await gw.chat(stream=True)
        assert content(reply.body) == "replaced one several three"
        assert reply.events[-1] == DONE


async def test_taps_see_what_the_taps_before_them_made():
    """Taps work in the order of the list, each on what the one before it returned, last words included."""

    class Upper(Tap):
        def event(self, event):
            return chunk(content(event).upper()) if content(event) else event

        def end(self, outcome):
            return [chunk("!")]

    first, second = rewriting(Upper, name="First"), tapping(Tap, name="Second")
    async with gateway(first, second, stream=chat_stream("hello")) as gw:
        reply = await gw.chat(stream=True)
        assert content(reply.body) == "HELLO!"
        assert content(b"".join(tap_of(gw, "Second").seen)) == "HELLO!"
        assert len(tap_of(gw, "Second").ends) == 1


async def test_held_text_is_flushed_before_the_terminator():
    """A tap that holds everything back gives it out at the end, and clients see it before `[DONE]`."""

    class Holder(Tap):
        def event(self, event):
            self.seen.append(event)

        def end(self, outcome):
            self.ends.append(outcome)
            return self.seen

    events = chat_stream("Hello there")
    async with gateway(rewriting(Holder), stream=events) as gw:
        reply = await gw.chat(stream=True)
        assert reply.body == b"".join(events)
        assert reply.events[-1] == DONE
        assert tap_of(gw).ends == [Outcome.OK]


async def test_a_tap_hears_of_a_clean_end_once():
    """`end` is called exactly once, with the outcome."""
    async with gateway(tapping(Tap), stream=chat_stream()) as gw:
        await gw.chat(stream=True)
        await gw.finished()
        assert tap_of(gw).ends == [Outcome.OK]


@pytest.mark.parametrize("end", ["cut", "reset", "clean"])
async def test_a_tap_hears_of_a_truncation_once_and_its_last_words_are_dropped(end):
    """After a truncation the client gets the error event and never held-back text, as if the answer were whole."""

    class Talker(Tap):
        def end(self, outcome):
            super().end(outcome)
            return [chunk("and they lived happily ever after")]

    stream = chat_stream(finish=None, done=False)
    async with gateway(rewriting(Talker), stream=stream, end=end) as gw:
        reply = await gw.chat(stream=True)
        assert b"happily" not in reply.body
        assert b'"error"' in reply.events[-1]
        [exchange] = await gw.finished()
        assert tap_of(gw).ends == [exchange.outcome] == [Outcome.UPSTREAM_TRUNCATED]


async def test_a_tap_hears_of_a_disconnect_once():
    """A client that leaves ends the tap too, so that what it holds can be let go."""
    async with gateway(tapping(Tap), stream=chat_stream(finish=None, done=False), end="hang") as gw:
        body = {"model": "m", "messages": [], "stream": True}
        async with gw.session.post(gw.url + "/v1/chat/completions", json=body) as reply:
            assert await reply.content.readany()
            reply.close()
        await gw.finished()
        assert tap_of(gw).ends == [Outcome.CLIENT_DISCONNECT]


async def test_a_tap_hears_of_a_recorded_stream_as_of_a_live_one():
    """A stream out of a cache passes the taps too: a guard can't be got around by asking twice."""
    async with Gateway.test(plugins=[tapping(Tap), Hits]) as gw:
        reply = await gw.chat(stream=True)
        assert tap_of(gw).ends == [Outcome.OK]
        assert content(b"".join(tap_of(gw).seen)) == content(reply.body) != ""


class Failing(Tap):
    """Breaks at the second event."""

    def event(self, event):
        super().event(event)
        if len(self.seen) == 2:
            raise ValueError("It broke.")
        return event


class FailingEnd(Tap):
    def end(self, outcome):
        super().end(outcome)
        raise ValueError("It broke.")


@pytest.mark.parametrize("on_error", [None, "ignore"])
@pytest.mark.parametrize("tap", [Failing, FailingEnd])
async def test_a_failing_tap_is_removed_and_the_stream_goes_on(tap, on_error):
    """A broken watcher costs the client nothing: it is logged once and not asked again."""
    events = chat_stream("one two three four")
    entry = {"use": tapping(tap), **({"on_error": on_error} if on_error else {})}
    with structlog.testing.capture_logs() as logs:
        async with gateway(entry, tapping(Tap, name="Other"), stream=events) as gw:
            assert (await gw.chat(stream=True)).body == b"".join(events)
            [exchange] = await gw.finished()
            assert exchange.outcome is Outcome.OK
            assert len(tap_of(gw).seen) == (2 if tap is Failing else len(events) - 1)
            assert tap_of(gw, "Other").seen == events[:-1]
            assert tap_of(gw, "Other").ends == [Outcome.OK]
    assert [(e["plugin"], e["hook"]) for e in logs if e["event"] == "plugin_failed"] == [("Tapping", "open_tap")]


@pytest.mark.parametrize("declared", ["yaml", "class"])
@pytest.mark.parametrize("tap", [Failing, FailingEnd])
async def test_a_failing_guard_ends_the_stream_with_an_error(tap, declared):
    """Where a tap guards (`on_error: fail`), the stream ends with the error event and without `[DONE]`."""
    guard = tapping(tap, **({"on_error": "fail"} if declared == "class" else {}))
    entry = {"use": guard, **({"on_error": "fail"} if declared == "yaml" else {})}
    events = chat_stream("one two three four")
    async with gateway(tapping(Tap, name="Before"), entry, tapping(Tap, name="After"), stream=events) as gw:
        reply = await gw.chat(stream=True)
        assert reply.status == 200
        assert json.loads(reply.events[-1][6:])["error"]["code"] == "plugin_error"
        assert b"[DONE]" not in reply.body
        [exchange] = await gw.finished()
        assert exchange.outcome is Outcome.PLUGIN_ERROR
        assert exchange.error_by == "Tapping.open_tap"
        assert len(tap_of(gw, "Before").ends) == len(tap_of(gw, "After").ends) == 1


async def test_a_tap_that_fails_on_another_s_last_words_is_not_asked_again():
    """Once removed is removed, also while the stream is being flushed."""

    class Last(Tap):
        def end(self, outcome):
            return [chunk("last words")]

    class FailsOnLast(Tap):
        def event(self, event):
            if b"last words" in event:
                raise ValueError("It broke.")
            return super().event(event)

    first, second = rewriting(Last, name="First"), tapping(FailsOnLast)
    async with gateway(first, second, stream=chat_stream("Hello")) as gw:
        assert content((await gw.chat(stream=True)).body) == "Hellolast words"
        await gw.finished()
        assert tap_of(gw).ends == []


async def test_a_plugin_that_is_not_interested_has_no_tap():
    """`open_tap` may return None, for one stream or for all."""

    class Uninterested:
        def __init__(self, config, services): ...

        @hookimpl
        def open_tap(self, exchange):
            return None

    events = chat_stream()
    async with gateway(Uninterested, stream=events) as gw:
        assert (await gw.chat(stream=True)).body == b"".join(events)


async def test_whole_replies_and_errors_have_no_taps():
    """Taps are for streams; a whole reply is changed in `transform_response`."""
    async with Gateway.test(plugins=[tapping(Tap), Recorder]) as gw:
        await gw.chat()
        await gw.chat(stream=True, model="")
        await gw.finished(2)
        assert gw.plugin("Tapping").taps == []
