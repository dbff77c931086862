"""One upstream's stream on its way to the client: split, classify, tap, relay, end.

An event that nobody changes leaves as the bytes it came in. After the first content a block of plain events costs a few
searches for fixed bytes; only events that the grammar calls notable, or that a tap asked for, are looked at one by one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from gateway.errors import Cause, UpstreamError
from gateway.exchange import Event
from gateway.upstream import error_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gateway.dialects import Grammar, Mark
    from gateway.upstream import UpstreamResponse

PREAMBLE_LIMIT = 64 * 1024
_COLON = ord(":")  # a line that begins with one is a comment
_LF = ord("\n")
# A line may end in LF, CRLF or CR (WHATWG HTML, server-sent events); an event ends with an empty line.
_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
_EVENT_END = re.compile(_LINE_END + _LINE_END)
_DONE = re.compile(rb"data:\s*\[DONE\]\s*")
_COMMENT_LINE = re.compile(rb"(?<![^\r\n]):[^\r\n]*" + _LINE_END)  # `^` knows no CR


class ReplyStream(Protocol):
    """A committed reply: blocks of bytes for the client until None."""

    usage: dict[str, Any] | None
    last: bytes
    response: UpstreamResponse
    finished: bool  # its clean end was there
    failed: UpstreamError | None  # what came instead, to be told once what stood before it is out

    answered: bool  # the client has the whole answer, though the upstream has not ended its body yet

    @property
    def tapped(self) -> bool: ...
    async def first_content(self) -> None: ...
    def held(self) -> bytes:
        """What came up to the first content, and with it."""

    def feed(self, chunk: bytes) -> bytes:
        """What the client gets of some more of the body. Raises GatewayError."""

    def end(self, error: UpstreamError | None = None) -> bytes:
        """The same of the body's end, or of what came instead. Raises that, or TRUNCATED, if it is no clean end."""

    def finish(self) -> bytes:
        """The answer was whole, whatever the upstream does after it."""

    async def next_block(self) -> bytes | None: ...


class Splitter:
    """Cuts a byte stream into blocks of whole events; what is not whole yet waits, up to `limit` bytes."""

    __slots__ = ("_limit", "carry")

    def __init__(self, limit: int) -> None:
        self.carry = b""  # what came after the last whole event
        self._limit = limit

    def feed(self, data: bytes) -> bytes:
        """The whole events so far, as one block (b"" if there is none)."""
        if self.carry:
            data = self.carry + data
            self.carry = b""
        if data.endswith(b"\n\n"):
            return data
        end = data.rfind(b"\n\n") + 2 if b"\r" not in data else _last_end(data)
        if end < 2:
            self._hold(data)
            return b""
        self._hold(data[end:])
        return data[:end]

    def _hold(self, data: bytes) -> None:
        if len(data) > self._limit:
            raise UpstreamError(
                Cause.BAD_REPLY, f"One event of the upstream's stream is larger than {self._limit} bytes."
            )
        self.carry = data


def _last_end(data: bytes) -> int:
    end = 0
    if data.endswith(b"\r\n\r"):
        data = data[:-1]  # half of a CRLF: its other half belongs to the same event
    for found in _EVENT_END.finditer(data):
        end = found.end()
    return end


def split_events(block: bytes) -> Iterator[Event]:
    """The events of a block of whole events, each with the blank line that ends it."""
    start = 0
    for found in _EVENT_END.finditer(block):
        yield Event(block[start : found.end()])
        start = found.end()


def _has_comment(block: bytes) -> bool:
    return block[0] == _COLON or block.count(b"\n:") > 0 or block.count(b"\r:") > 0


class EventStream:
    """A stream of server-sent events in one dialect's grammar."""

    def __init__(
        self,
        response: UpstreamResponse,
        grammar: Grammar,
        *,
        forward_usage: bool,
        max_event: int,
        secret: str = "",
    ) -> None:
        self.usage: dict[str, Any] | None = None
        self.last = b""
        self.events = 0  # passed on so far
        self.finished = False
        self.answered = False
        self.failed: UpstreamError | None = None
        self.response = response
        # Set by the pipeline: what each event passes through, and what is flushed before a clean end.
        self.tap: Callable[[Event], Iterable[bytes]] | None = None
        self.flush: Callable[[], bytes] | None = None
        self._grammar = grammar
        self._notable = grammar.notable
        self._forward_usage = forward_usage
        self._splitter = Splitter(max_event)
        self._secret = secret
        self._key = secret.encode()
        self._held: list[Event] = []
        self._finish_seen = False

    @property
    def tapped(self) -> bool:
        return self.tap is not None

    def finish(self) -> bytes:
        """Whatever an upstream does after its whole answer must not belie that: what is left for a clean end."""
        self.finished = True
        return self.flush() if self.flush is not None else b""

    @property
    def usage_is_final(self) -> bool:
        """The usage told so far is the whole answer's: Anthropic's stream begins with a count that goes on."""
        return self.usage is not None and self._finish_seen

    async def first_content(self) -> None:
        """Read to the first content event; it and the preamble wait for `next_block`. Raises UpstreamError."""
        size = 0
        while True:
            chunk = await self.response.chunk()
            if not chunk:
                raise UpstreamError(Cause.TRUNCATED, "The upstream ended the stream before any content.")
            content = False
            for event in split_events(self._splitter.feed(chunk)):
                if content:
                    self._held.append(event)
                    continue
                mark = self._grammar.mark(event)
                if mark.malformed:
                    raise UpstreamError(Cause.BAD_REPLY, "The upstream sent an event that is not JSON.")
                if mark.error is not None:
                    raise error_from(mark.error, secret=self._secret)
                if mark.done and not mark.finish and not self._finish_seen:
                    raise UpstreamError(Cause.TRUNCATED, "The upstream ended the stream before any content.")
                self._note_usage(mark)
                self._held.append(event)
                size += len(event)
                content = mark.content
                if size > PREAMBLE_LIMIT and not content:
                    raise UpstreamError(Cause.BAD_REPLY, f"No content within {PREAMBLE_LIMIT} bytes of the stream.")
            if content:
                return

    def model(self) -> str | None:
        """The model that the held events name."""
        for event in self._held:
            data = event.data if isinstance(event.data, dict) else {}
            for place in (data, data.get("response"), data.get("message")):
                if isinstance(place, dict) and isinstance(place.get("model"), str):
                    return str(place["model"])
        return None

    async def next_block(self) -> bytes | None:
        """Bytes for the client (b"" if all of it was dropped), None after the clean end.

        Raises UpstreamError: TRUNCATED if there was no clean end, or what the upstream reported in the stream.
        """
        if self.failed is not None:
            raise self.failed
        if self.finished:
            return None
        if self._held:
            return self.held()
        try:
            chunk = await self.response.chunk()
        except UpstreamError as error:
            return self.end(error)
        return self.feed(chunk) if chunk else self.end()

    def held(self) -> bytes:
        held, self._held = self._held, []
        return self._pass(held)

    def feed(self, chunk: bytes) -> bytes:
        splitter = self._splitter
        if (  # one event of one line, as most chunks are: that is seen at once
            chunk.find(b"\n") == len(chunk) - 2
            and chunk[-1] == _LF
            and chunk[0] != _COLON
            and chunk.find(b"\r") < 0
            and not splitter.carry
        ):
            block, events = chunk, 1
        else:
            block = splitter.feed(chunk)
            if not block:
                return b""
            events = 0 if _has_comment(block) else block.count(b"\n\n") or len(_EVENT_END.findall(block))
        if events and self.tap is None and not self._notable(block) and not (self._key and block.count(self._key)):
            self.last = block
            self.events += events
            return block
        return self._pass(split_events(block))

    def _pass(self, events: Iterable[Event]) -> bytes:
        """Each event classified and tapped; what stands before an error still goes out, the error comes next."""
        out: list[bytes] = []
        for event in events:
            if _has_comment(event):
                event = Event(_COMMENT_LINE.sub(b"", event))  # noqa: PLW2901 - the same event without its comments
                if not event.strip():
                    continue
            if self._notable(event):
                mark = self._grammar.mark(event)
                if mark.error is not None:
                    self.failed = error_from(mark.error, secret=self._secret)
                    break
                self._note_usage(mark)
                if mark.finish:
                    self._finish_seen = True
                    self.answered = not self._grammar.needs_done
                if mark.done:
                    self._end(event, out)
                    break
                if mark.usage_only and not self._forward_usage:
                    continue
            if self._key and event.find(self._key) >= 0:  # an upstream that repeats our own key is not passed on
                self.failed = UpstreamError(Cause.BAD_REPLY, "The upstream's stream held what must not be passed on.")
                break
            self.last = event
            self.events += 1
            if self.tap is None:
                out.append(event)
            else:
                out.extend(self.tap(event))
        return b"".join(out)

    def _end(self, event: Event, out: list[bytes]) -> None:
        if not self._finish_seen:
            self.failed = UpstreamError(Cause.TRUNCATED, "The upstream ended the stream without finishing the answer.")
            return
        self.finished = True
        if self.flush is not None:
            out.append(self.flush())
        out.append(event)

    def end(self, error: UpstreamError | None = None) -> bytes:
        """The body is complete: clean if the grammar says so. With an error only the whole answer is."""
        if self.answered:
            return self.finish()
        if error is not None:
            raise error
        rest = self._splitter.carry.rstrip(b"\r\n")
        if self._finish_seen and _DONE.fullmatch(rest):  # it did say so, but for the blank line
            return self._pass([Event(rest + b"\n\n")])
        raise UpstreamError(Cause.TRUNCATED, "The upstream ended the stream without finishing the answer.")

    def _note_usage(self, mark: Mark) -> None:
        if mark.usage is not None:
            # Anthropic spreads it over two events: the later one wins where both speak.
            self.usage = {**(self.usage or {}), **_known(mark.usage)}


def _known(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in usage.items() if v is not None}


class ByteStream:
    """A binary reply (speech): the first byte is its first content, the complete body its clean end."""

    tapped = False
    answered = False  # its end is the answer's
    failed: UpstreamError | None = None

    def __init__(self, response: UpstreamResponse) -> None:
        self.usage: dict[str, Any] | None = None
        self.last = b""
        self.finished = False
        self.response = response
        self._held = b""

    def finish(self) -> bytes:
        return b""

    async def first_content(self) -> None:
        self._held = await self.response.chunk()
        if not self._held:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream sent an empty body.")

    def held(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def feed(self, chunk: bytes) -> bytes:
        return chunk

    def end(self, error: UpstreamError | None = None) -> bytes:
        if error is not None:
            raise error
        self.finished = True
        return b""

    async def next_block(self) -> bytes | None:
        return self.held() or await self.response.chunk() or None
