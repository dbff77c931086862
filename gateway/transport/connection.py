"""One socket to an upstream: writes a request, parses its reply, says whether it may be used again.

llhttp parses, in its strict mode: bare line feeds, folded or repeated lengths, lengths beside chunks and whatever else
two parsers might read in two ways is no reply. What it leaves to us is checked here: sizes, versions, codings.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import TYPE_CHECKING

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from multidict import CIMultiDict, istr

from gateway.errors import Cause, UpstreamError
from gateway.transport.reply import Reply

if TYPE_CHECKING:
    from gateway.transport.pool import Pool

LARGE = 1 << 20  # larger bodies are written piece by piece, at the upstream's pace
PIECE = 1 << 16
JOINED = 1 << 14  # smaller bodies are cheaper copied behind their head than written beside it
LONGEST_LINE = 16384  # a header line of an upstream may be long (rate-limit policies, tracing)
LONGEST_HEAD = 1 << 16  # all of them together; and what a chunked body may hold besides its data
MOST_FIELDS = 128
# A kept connection that ends within so many seconds of the request, before any byte: it was being closed meanwhile.
CROSSING = 1.0
_H = ord("H")  # llhttp knows protocols that begin otherwise
_LENGTH, _CODING, _ENCODING = istr("Content-Length"), istr("Transfer-Encoding"), istr("Content-Encoding")
_KEEP_ALIVE = istr("Keep-Alive")
_TIMEOUT = re.compile(r"timeout=(\d{1,5})\b", re.IGNORECASE)
_names: dict[bytes, istr] = {}  # upstreams send the same few again and again


class Connection(asyncio.Protocol):
    """Serves one request at a time."""

    __slots__ = (
        "_barren", "_body", "_chunked", "_done", "_fields", "_head", "_heard", "_interim", "_keep", "_loop", "_parser",
        "_parts", "_paused", "_pool", "_reply", "_sent", "_transport", "_writable", "expires", "idle", "on_body",
        "patience", "sending", "tls", "uses",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []  # of a body, as the parser finds them in what is read at once
        self.on_body = self._parts.append  # the parser's callback: no function of ours for each chunk
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._reply: Reply | None = None
        self._writable = True
        self._paused = False
        self.sending = False  # a large body, still: what of it is left
        self._body = memoryview(b"")
        self.uses = 0
        self.tls: ssl.SSLObject | None = None
        # The pool's: whether it waits there, until when, and how long its upstream keeps it.
        self.idle = False
        self.expires = 0.0
        self.patience: int | None = None
        self._anew()

    def _anew(self) -> None:
        self._fields: list[tuple[istr, str]] = []
        self._head = 0  # bytes of header lines
        self._barren = 0  # bytes since the body's last
        self._heard = self._interim = self._done = self._chunked = self._keep = False
        self._sent = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # --- the request ---------------------------------------------------------------------------------------------

    def ask(self, head: bytes, body: bytes | None) -> Reply:
        """Write a request; a large body as the upstream takes it."""
        reply = Reply(self, self._pool.max_reply)
        transport = self._transport
        if transport is None:
            reply.stale = self.uses > 0
            reply.fail(_unreachable())
            return reply
        self._anew()
        self._reply = reply
        self._sent = self._loop.time()
        self.uses += 1
        if not body:
            transport.write(head)
        elif len(body) <= JOINED:
            transport.write(head + body)
        elif len(body) <= LARGE:
            transport.writelines((head, body))
        else:
            transport.write(head)
            self._body, self.sending = memoryview(body), True
            self._pump()
        return reply

    def _pump(self) -> None:
        """Write more of a large body, as much as there is room for."""
        while self.sending and self._writable and self._transport is not None:
            if self._reply is None or self._reply.status >= 400:
                return  # nobody wants it; half a request stands in the connection, so it can't be used again
            piece, self._body = self._body[:PIECE], self._body[PIECE:]
            self.sending = len(self._body) > 0
            self._transport.write(piece)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._pump()

    # --- the socket ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a socket's
        self.tls = transport.get_extra_info("ssl_object")

    def data_received(self, data: bytes) -> None:
        reply, parser = self._reply, self._parser
        if reply is None or parser is None:
            self.drop()  # nobody asked
            return
        broken: Exception | None = None
        try:
            parser.feed_data(data if self._heard else self._first(data))
        except (HttpParserError, HttpParserUpgrade) as error:
            self._keep, broken = False, error
        parts = self._parts
        piece = b"" if not parts else parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._done:
            self._finish(reply)
        elif broken is not None:
            self._refuse(reply, broken)
        elif piece:
            self._barren = 0
        else:
            self._barren += len(data)
            if self._barren > LONGEST_HEAD:
                self._refuse(reply)
            elif not reply.status:
                return
        reply.arrived(piece)

    def _first(self, data: bytes) -> bytes:
        self._heard = True
        if data[0] != _H:
            raise HttpParserError
        return data

    def eof_received(self) -> None:
        self._end(ConnectionAbortedError() if self._cut() else None)

    def connection_lost(self, exc: Exception | None) -> None:
        # uvloop tells of an end below TLS by this alone
        self._end(exc or (ConnectionAbortedError() if self.tls is not None else None))
        self._transport = self._parser = None
        self._body = memoryview(b"")
        self._pool.lost(self)

    def pause(self) -> None:
        """Read no more: whoever takes the reply is slower than the upstream."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def drop(self) -> None:
        """Close it at once, whatever is under way."""
        if self._reply is not None:
            self._reply.connection = None
            self._reply = None
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """The same, and whoever waits for a reply is told."""
        self._end(ConnectionAbortedError())
        self.drop()

    def _finish(self, reply: Reply) -> None:
        self._reply = None
        reply.finish()
        if self._paused:
            self.resume()
        if self.uses == 1:
            self._pool.proven(self)
        if self._keep and not self.sending:
            self._pool.release(self)
        else:
            self.drop()

    def _refuse(self, reply: Reply, error: Exception | None = None) -> None:
        told = error.__context__ if error is not None else None
        if not isinstance(told, UpstreamError):
            told = _not_http()
        reply.fail(told)
        self.drop()

    def _end(self, error: Exception | None) -> None:
        """Nothing more will come."""
        reply = self._reply
        if reply is None:
            return
        self._reply = None
        if not reply.status:
            reply.stale = self.uses > 1 and not self._heard and self._loop.time() - self._sent < CROSSING
            reply.fail(_unreachable())
        elif self._until_the_end(reply) and error is None:
            reply.finish()
        else:
            reply.fail(UpstreamError(Cause.TRUNCATED, "The connection to the upstream was lost during its reply."))
        reply.arrived()

    def _cut(self) -> bool:
        """TLS says when a connection ends (RFC 9112 §9.8); anybody may cut the one below."""
        tls = self.tls
        if tls is None or self._reply is None:
            return False
        try:
            return bool(tls.read(1))
        except ssl.SSLError:
            return True

    def _until_the_end(self, reply: Reply) -> bool:
        return not self._chunked and _LENGTH not in reply.headers

    # --- the parser ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._done:
            raise _not_http()  # what came behind the reply is nobody's

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name) + len(value)
        self._head += size
        if size > LONGEST_LINE or self._head > LONGEST_HEAD or len(self._fields) >= MOST_FIELDS:
            raise UpstreamError(Cause.BAD_REPLY, "The header of the upstream's reply is too large.")
        known = _names.get(name)
        if known is None:
            known = istr(name.decode("latin-1"))
            if len(_names) < 512:
                _names[name] = known
        self._fields.append((known, value.strip(b" \t").decode("utf-8", "surrogateescape")))

    def on_headers_complete(self) -> None:
        reply, parser = self._reply, self._parser
        if reply is None or parser is None:
            raise _not_http()
        status = parser.get_status_code()
        fields, self._fields = self._fields, []  # from now on: trailers, which nobody reads
        if 100 <= status < 200 and status != 101:
            interim = CIMultiDict(fields)
            if _LENGTH in interim or _CODING in interim:
                raise _not_http()  # it has no body
            self._interim = True
            return
        headers = CIMultiDict(fields)
        coding = headers.getall(_CODING, None)
        version = parser.get_http_version()
        if coding is not None:
            self._chunked = True
            if version != "1.1" or [c.lower() for c in coding] != ["chunked"]:
                raise _not_http()
        if status < 200 or version not in ("1.1", "1.0"):
            raise _not_http()
        self._keep = parser.should_keep_alive()
        if (kept := headers.get(_KEEP_ALIVE)) is not None and (found := _TIMEOUT.search(kept)):
            self.patience = int(found[1])
        reply.begin(status, headers, headers.get(_ENCODING))

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self._done = True


def _not_http() -> UpstreamError:
    return UpstreamError(Cause.BAD_REPLY, "The upstream's reply is not valid HTTP.")


def _unreachable() -> UpstreamError:
    return UpstreamError(Cause.CONNECTION, "The upstream can't be reached.")
