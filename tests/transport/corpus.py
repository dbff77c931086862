"""Replies as bytes, and what each means: one list for every transport.

An entry says what a client must make of the bytes: a whole reply, or the cause that it fails with. What aiohttp's client
makes of some of them instead stands in `AIOHTTP` at the end, with the reason; ours accepts nothing that aiohttp's refuses
unless it stands there too.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from gateway.errors import Cause

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LIMIT = 1 << 20  # the transports' `max_reply` here: bytes that a compressed reply may become
End: TypeAlias = Literal["open", "eof", "reset"]


@dataclass(frozen=True)
class Whole:
    """A complete reply; of its headers those that matter."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def agrees(self, other: object) -> bool:
        """`other` has all that this one asks for."""
        return (
            isinstance(other, Whole)
            and (self.status, self.body) == (other.status, other.body)
            and all(other.headers.get(name) == value for name, value in self.headers.items())
        )


WAITS = "waits"  # the reply is not complete, and nothing says that it won't be
Meaning: TypeAlias = Whole | Cause | Literal["waits"]


@dataclass(frozen=True)
class Entry:
    name: str
    raw: bytes
    means: Meaning
    end: End = "open"  # what the server does after it
    kept: bool | None = False  # the connection serves the next request; None: it may

    def __str__(self) -> str:
        return self.name


def reply(*lines: str | bytes, body: bytes = b"", status: str = "HTTP/1.1 200 OK", line_end: bytes = b"\r\n") -> bytes:
    head = [line.encode("latin-1") if isinstance(line, str) else line for line in (status, *lines)]
    return line_end.join([*head, b"", b""]) + body


def chunks(*parts: bytes, trailer: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n" + trailer + b"\r\n"


def chunked(raw: bytes, *lines: str, **how: str) -> bytes:
    """A reply whose body in chunks is written as given."""
    return reply("Transfer-Encoding: chunked", *lines, body=raw, **how)  # type: ignore[arg-type]


def sized(body: bytes, *lines: str | bytes, status: str = "HTTP/1.1 200 OK") -> bytes:
    return reply(f"Content-Length: {len(body)}", *lines, body=body, status=status)


HELLO = Whole(body=b"hello")
EMPTY = Whole()
BAD, CUT, LOST = Cause.BAD_REPLY, Cause.TRUNCATED, Cause.CONNECTION
CHUNKED = "Transfer-Encoding: chunked"
TEXT = b"to be or not to be, that is the question: " * 40


def ok(name: str, raw: bytes, means: Whole = HELLO, **how: object) -> Entry:
    """A complete reply on a connection that goes on."""
    return Entry(name, raw, means, **{"kept": True, **how})  # type: ignore[arg-type]


def last(name: str, raw: bytes, means: Whole = HELLO, **how: object) -> Entry:
    """A complete reply, the last of its connection."""
    return Entry(name, raw, means, **how)  # type: ignore[arg-type]


def bad(name: str, raw: bytes, **how: object) -> Entry:
    return Entry(name, raw, BAD, **how)  # type: ignore[arg-type]


def cut(name: str, raw: bytes, end: End = "eof", **how: object) -> Entry:
    return Entry(name, raw, CUT, end, **how)  # type: ignore[arg-type]


def _deflate(data: bytes, wbits: int) -> bytes:
    coder = zlib.compressobj(wbits=wbits)
    return coder.compress(data) + coder.flush()


GZIP, ZLIB = gzip.compress(TEXT, mtime=0), zlib.compress(TEXT)
BOMB = gzip.compress(bytes(4 * LIMIT), mtime=0)

LENGTHS = [
    ok("content-length", sized(b"hello")),
    ok("content-length 0", sized(b""), EMPTY),
    ok(
        "its value is kept", sized(b"hello", "X-Request-Id: a b"), Whole(body=b"hello", headers={"X-Request-Id": "a b"})
    ),
    ok("leading zeros", reply("Content-Length: 0000005", body=b"hello")),
    ok("blanks around", reply("Content-Length: \t 5 \t", body=b"hello")),
    ok("any case", reply("cOnTeNt-LeNgTh: 5", body=b"hello")),
    ok("large", sized(b"x" * 300_000), Whole(body=b"x" * 300_000)),
    bad("negative", reply("Content-Length: -5", body=b"hello")),
    bad("signed", reply("Content-Length: +5", body=b"hello")),
    bad("hex", reply("Content-Length: 0x5", body=b"hello")),
    bad("no digits", reply("Content-Length: five", body=b"hello")),
    bad("empty", reply("Content-Length:", body=b"hello")),
    bad("with a blank within", reply("Content-Length: 5 5", body=b"hello" * 11)),
    bad("a list of equal ones", reply("Content-Length: 5, 5", body=b"hello")),
    bad("a list of different ones", reply("Content-Length: 5, 6", body=b"hello!")),
    bad("two equal ones", reply("Content-Length: 5", "Content-Length: 5", body=b"hello")),
    bad("two different ones", reply("Content-Length: 5", "Content-Length: 6", body=b"hello!")),
    bad("2**64 + 5", reply(f"Content-Length: {2**64 + 5}", body=b"hello")),
    bad("a thousand digits", reply(f"Content-Length: {'9' * 1000}", body=b"hello")),
    Entry("2**63", reply(f"Content-Length: {2**63}", body=b"hello"), CUT, "eof"),
    bad("a blank before the colon", reply("Content-Length : 5", body=b"hello")),
    cut("cut at once", reply("Content-Length: 5")),
    cut("cut within", reply("Content-Length: 5", body=b"hell")),
    cut("reset within", reply("Content-Length: 5", body=b"hell"), "reset"),
    Entry("nothing more comes", reply("Content-Length: 5", body=b"hell"), WAITS),
]

CHUNKS = [
    ok("chunked", chunked(chunks(b"hel", b"lo"))),
    ok("no chunk", chunked(chunks()), EMPTY),
    ok("coding in any case", reply("Transfer-Encoding: CHUNKED", body=chunks(b"hello"))),
    ok("upper case hex", chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), Whole(body=b"0123456789")),
    ok("zeros before", chunked(b"0000000000000005\r\nhello\r\n000\r\n\r\n")),
    ok("an extension", chunked(b'5;a=b;c="d"\r\nhello\r\n0;e\r\n\r\n')),
    ok("an extension of 4 KB", chunked(b"5;" + b"a" * 4096 + b"\r\nhello\r\n0\r\n\r\n")),
    bad("extensions without end", chunked(b"5;" + b"a" * 400_000), end="open"),
    bad("a line feed in an extension", chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n")),
    ok("trailers", chunked(chunks(b"hello", trailer=b"X-Sum: 1\r\nX-More: 2\r\n"))),
    bad("a length among trailers", chunked(chunks(b"hello", trailer=b"Content-Length: 99\r\n"))),
    ok(
        "trailers are not headers",
        chunked(chunks(b"hello", trailer=b"X-A: evil\r\n"), "X-A: good"),
        Whole(body=b"hello", headers={"X-A": "good"}),
    ),
    bad("a trailer without end", chunked(b"5\r\nhello\r\n0\r\nX: " + b"a" * 400_000)),
    bad("trailers without end", chunked(b"5\r\nhello\r\n0\r\n" + b"X: a\r\n" * 70_000)),
    bad("a broken trailer", chunked(chunks(b"hello", trailer=b"X\x00: 1\r\n"))),
    bad("no size", chunked(b"\r\nhello\r\n0\r\n\r\n")),
    bad("no hex", chunked(b"5g\r\nhello\r\n0\r\n\r\n")),
    bad("0x", chunked(b"0x5\r\nhello\r\n0\r\n\r\n")),
    bad("negative size", chunked(b"-5\r\nhello\r\n0\r\n\r\n")),
    bad("signed size", chunked(b"+5\r\nhello\r\n0\r\n\r\n")),
    bad("a size of 17 digits", chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n")),
    Entry("the largest size", chunked(b"ffffffffffffffff\r\nhello"), CUT, "eof"),
    bad("a blank before the size", chunked(b" 5\r\nhello\r\n0\r\n\r\n")),
    bad("a blank behind the size", chunked(b"5 \r\nhello\r\n0\r\n\r\n")),
    bad("more than the size", chunked(b"4\r\nhello\r\n0\r\n\r\n")),
    bad("less than the size", chunked(b"6\r\nhello\r\n0\r\n\r\n")),
    bad("bare line feeds", chunked(b"5\nhello\n0\n\n")),
    bad("a bare carriage return", chunked(b"5\rhello\r\n0\r\n\r\n")),
    bad("no line end behind a chunk", chunked(b"5\r\nhello0\r\n\r\n")),
    cut("cut before the first size", chunked(b"")),
    cut("cut in a size", chunked(b"5")),
    cut("cut in a chunk", chunked(b"5\r\nhel")),
    cut("cut behind a chunk", chunked(b"5\r\nhello\r\n")),
    cut("cut at the last chunk", chunked(b"5\r\nhello\r\n0\r\n")),
    cut("cut in a trailer", chunked(b"5\r\nhello\r\n0\r\nX: ")),
    cut("chunks, then reset", chunked(b"5\r\nhello\r\n"), "reset"),
    last("chunked and close", chunked(chunks(b"hello"), "Connection: close")),
]

CODINGS = [
    bad("length and chunks", reply("Content-Length: 5", CHUNKED, body=chunks(b"hello"))),
    bad("chunks and length", reply(CHUNKED, "Content-Length: 5", body=chunks(b"hello"))),
    bad("chunked, chunked", reply("Transfer-Encoding: chunked, chunked", body=chunks(b"hello"))),
    bad("chunked twice", reply(CHUNKED, CHUNKED, body=chunks(b"hello"))),
    bad("gzip, chunked", reply("Transfer-Encoding: gzip, chunked", body=chunks(gzip.compress(b"hello", mtime=0)))),
    bad("chunked, gzip", reply("Transfer-Encoding: chunked, gzip", body=chunks(b"hello")), end="eof"),
    bad("identity", reply("Transfer-Encoding: identity", body=b"hello"), end="eof"),
    bad("chunked, identity", reply("Transfer-Encoding: chunked, identity", body=chunks(b"hello")), end="eof"),
    bad("identity, chunked", reply("Transfer-Encoding: identity, chunked", body=chunks(b"hello"))),
    bad("unknown coding", reply("Transfer-Encoding: xchunked", body=chunks(b"hello")), end="eof"),
    bad("chunked with a parameter", reply("Transfer-Encoding: chunked;q=1", body=chunks(b"hello")), end="eof"),
    bad("coding in quotes", reply('Transfer-Encoding: "chunked"', body=chunks(b"hello")), end="eof"),
    bad("an empty coding", reply("Transfer-Encoding:", body=chunks(b"hello")), end="eof"),
    bad("a vertical tab before chunked", reply("Transfer-Encoding: \x0bchunked", body=chunks(b"hello")), end="eof"),
    bad("a blank before the colon of a coding", reply("Transfer-Encoding : chunked", body=chunks(b"hello")), end="eof"),
    bad("unknown coding and length", reply("Transfer-Encoding: x", "Content-Length: 5", body=b"hello"), end="eof"),
    bad("chunks in HTTP/1.0", chunked(chunks(b"hello"), status="HTTP/1.0 200 OK")),
]

ENDS = [
    last("to the end of the connection", reply(body=b"hello"), end="eof"),
    last("nothing, to the end of the connection", reply(), EMPTY, end="eof"),
    cut("to the end, but reset", reply(body=b"hello"), "reset"),
    Entry("to an end that does not come", reply(body=b"hello"), WAITS),
    last("close", sized(b"hello", "Connection: close")),
    last("CLOSE among others", sized(b"hello", "Connection: foo, CLOSE")),
    ok("keep-alive", sized(b"hello", "Connection: keep-alive")),
    last("keep-alive and close", sized(b"hello", "Connection: keep-alive", "Connection: close")),
    last("HTTP/1.0", sized(b"hello", status="HTTP/1.0 200 OK")),
    ok("HTTP/1.0 kept alive", sized(b"hello", "Connection: keep-alive", status="HTTP/1.0 200 OK")),
    last("HTTP/1.0 to the end", reply(body=b"hello", status="HTTP/1.0 200 OK"), end="eof"),
    last(
        "HTTP/1.0 kept alive, to the end",
        reply("Connection: keep-alive", body=b"hello", status="HTTP/1.0 200 OK"),
        end="eof",
    ),
    last("close, to the end", reply("Connection: close", body=b"hello"), end="eof"),
]

NO_BODY = [
    ok("204", reply(status="HTTP/1.1 204 No Content"), Whole(204)),
    ok("304", reply(status="HTTP/1.1 304 Not Modified"), Whole(304)),
    ok("304 with a length", reply("Content-Length: 5", status="HTTP/1.1 304 Not Modified"), Whole(304)),
    ok("204 with a length", reply("Content-Length: 5", status="HTTP/1.1 204 No Content"), Whole(204)),
    last("204 with a body", reply("Content-Length: 5", body=b"hello", status="HTTP/1.1 204 No Content"), Whole(204)),
    last("304 with a body", reply("Content-Length: 5", body=b"hello", status="HTTP/1.1 304 Not Modified"), Whole(304)),
    last("204 with chunks", chunked(chunks(b"hello"), status="HTTP/1.1 204 No Content"), Whole(204)),
    last("205 with a body", sized(b"hello", status="HTTP/1.1 205 Reset Content"), Whole(205, b"hello"), kept=True),
]

CONTINUE = reply(status="HTTP/1.1 100 Continue")
INTERIM = [
    ok("100 before", CONTINUE + sized(b"hello")),
    ok("102 before", reply(status="HTTP/1.1 102 Processing") + sized(b"hello")),
    ok("103 before", reply("Link: </a>; rel=preload", status="HTTP/1.1 103 Early Hints") + sized(b"hello")),
    ok("199 before", reply(status="HTTP/1.1 199 X") + sized(b"hello")),
    ok("three before", CONTINUE * 3 + sized(b"hello")),
    ok(
        "its headers are not the reply's",
        reply("X-A: interim", status="HTTP/1.1 103 X") + sized(b"hello", "X-A: last"),
        Whole(body=b"hello", headers={"X-A": "last"}),
    ),
    bad("100 with length 0", reply("Content-Length: 0", status="HTTP/1.1 100 Continue") + sized(b"hello")),
    bad("102 with a body", sized(b"evil!", status="HTTP/1.1 102 X") + sized(b"hello")),
    bad("150 with a body", sized(b"evil!", status="HTTP/1.1 150 X") + sized(b"hello")),
    bad("150 with chunks", chunked(chunks(b"evil!"), status="HTTP/1.1 150 X") + sized(b"hello")),
    bad("100 with a body", sized(b"evil!", status="HTTP/1.1 100 Continue") + sized(b"hello")),
    bad("without end", CONTINUE * 20_000),
    bad("101", reply("Upgrade: websocket", "Connection: Upgrade", status="HTTP/1.1 101 Switching") + b"\x81\x05hello"),
    bad("101 without upgrade", reply(status="HTTP/1.1 101 Switching") + sized(b"hello")),
    Entry("100, then the end", CONTINUE, LOST, "eof"),
    Entry("100, then reset", CONTINUE, LOST, "reset"),
    Entry("100, then nothing", CONTINUE, WAITS),
    bad("100 in HTTP/1.0", reply(status="HTTP/1.0 100 Continue") + sized(b"hello")),
    ok("upgrade offered, not taken", sized(b"hello", "Upgrade: h2c", "Connection: Upgrade")),
]

STATUS = {  # status line → what a reply with 5 bytes of body is; nobody reads what stands behind the number
    "HTTP/1.1 200 OK": HELLO,
    "HTTP/1.1 200 ": HELLO,
    "HTTP/1.1 200": HELLO,
    "HTTP/1.1 200 Very well, thank you": HELLO,
    "HTTP/1.1 200 \xe4\xf6\xfc\xff": HELLO,
    "HTTP/1.1 404 Not Found": Whole(404, b"hello"),
    "HTTP/1.1 299 X": Whole(299, b"hello"),
    "HTTP/1.1 599 X": Whole(599, b"hello"),
    "HTTP/1.1 600 X": Whole(600, b"hello"),
    "HTTP/1.1 999 X": Whole(999, b"hello"),
    "HTTP/1.1 099 X": BAD,
    "HTTP/1.1 000 X": BAD,
    "HTTP/1.1 20 OK": BAD,
    "HTTP/1.1 2000 OK": BAD,
    "HTTP/1.1 -200 OK": BAD,
    "HTTP/1.1 2x0 OK": BAD,
    "HTTP/1.1  200 OK": BAD,
    "HTTP/1.1\t200 OK": BAD,
    "HTTP/1.1 200OK": BAD,
    "HTTP/1.1 200\tOK": BAD,
    "HTTP/1.1 ": BAD,
    "HTTP/1.1": BAD,
    " HTTP/1.1 200 OK": BAD,
    "http/1.1 200 OK": BAD,
    "HTTP/2 200": BAD,
    "HTTP/2.0 200 OK": BAD,
    "HTTP/0.9 200 OK": BAD,
    "HTTP/1.2 200 OK": BAD,
    "HTTP/1.10 200 OK": BAD,
    "HTTP/11 200 OK": BAD,
    "HTTP/1.1.1 200 OK": BAD,
    "HTTP 200 OK": BAD,
    "RTSP/1.0 200 OK": BAD,
    "ICE/1.0 200 OK": BAD,
    "ICY 200 OK": BAD,
    "200 OK": BAD,
    "GET / HTTP/1.1": BAD,
    "HTTP/1.1 200 O\0K": HELLO,
    "HTTP/1.1 200 O\x01K": HELLO,
    "HTTP/1.1 200 O\x7fK": HELLO,
    "HTTP/1.1 200 O\rK": BAD,
    "HTTP/1.1 200 " + "x" * 20_000: HELLO,
}
LINES = [
    Entry(line[:40], sized(b"hello", status=line), means, kept=isinstance(means, Whole))
    for line, means in STATUS.items()
]
LINES += [
    bad("an empty line before", b"\r\n" + sized(b"hello")),
    bad("a line feed before", b"\n" + sized(b"hello")),
    bad("a byte order mark before", b"\xef\xbb\xbf" + sized(b"hello")),
    last("RTSP behind 100", CONTINUE + sized(b"hello", status="RTSP/1.0 200 OK")),
    ok("an empty line behind 100", CONTINUE + b"\r\n" + sized(b"hello")),
    bad("SSH", b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    bad("a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46"),
    bad("HTTP/2 settings", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x00\x04\x00\x01\x00\x00"),
    bad("a body alone", b"<html>hello</html>\r\n\r\n"),
    bad("NULs", bytes(400)),
    Entry("nothing", b"", LOST, "eof"),
    Entry("a reset", b"", LOST, "reset"),
    Entry("half a status line", b"HTTP/1.1 20", LOST, "eof"),
    Entry("half a header", b"HTTP/1.1 200 OK\r\nContent-Len", LOST, "eof"),
    Entry("a head without its end", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", LOST, "eof"),
    Entry("half a head, then reset", b"HTTP/1.1 200 OK\r\nContent-Len", LOST, "reset"),
    Entry("half a head, then nothing", b"HTTP/1.1 200 OK\r\nContent-Len", WAITS),
]

HEADERS = [
    ok(
        "no blank behind the colon",
        reply("Content-Length:5", "X-A:b", body=b"hello"),
        Whole(body=b"hello", headers={"X-A": "b"}),
    ),
    ok("an empty value", sized(b"hello", "X-A:"), Whole(body=b"hello", headers={"X-A": ""})),
    ok("UTF-8 in a value", sized(b"hello", "X-A: é".encode()), Whole(body=b"hello", headers={"X-A": "é"})),
    ok(
        "bytes in a value that are no UTF-8",
        sized(b"hello", b"X-A: \xff\xfe"),
        Whole(body=b"hello", headers={"X-A": "\udcff\udcfe"}),
    ),
    ok("a tab in a value", sized(b"hello", "X-A: b\tc"), Whole(body=b"hello", headers={"X-A": "b\tc"})),
    ok("a line of 15 KB", sized(b"hello", "X-A: " + "b" * 15_000), Whole(body=b"hello", headers={"X-A": "b" * 15_000})),
    bad("a line of 20 KB", sized(b"hello", "X-A: " + "b" * 20_000)),
    bad("a name of 20 KB", sized(b"hello", "X" * 20_000 + ": b")),
    bad("a line without end", b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 400_000),
    bad("a name without end", b"HTTP/1.1 200 OK\r\n" + b"X" * 400_000),
    ok("100 fields", sized(b"hello", *[f"X-{n}: {n}" for n in range(100)])),
    bad("1,000 fields", sized(b"hello", *[f"X-{n}: {n}" for n in range(1000)])),
    bad("fields without end", b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 70_000),
    bad("100 KB of fields", sized(b"hello", *[f"X-{n}: {'b' * 1000}" for n in range(100)])),
    bad("a folded line", sized(b"hello", "X-A: b", " c")),
    bad("a line folded by a tab", sized(b"hello", "X-A: b", "\tc")),
    bad("the first line folded", sized(b"hello", status="HTTP/1.1 200 OK\r\n X-A: b")),
    bad("a folded length", reply("Content-Length:", " 5", body=b"hello")),
    bad("a folded coding", reply("Transfer-Encoding:", " chunked", body=chunks(b"hello"))),
    bad("bare line feeds for line ends", reply("Content-Length: 5", body=b"hello", line_end=b"\n")),
    bad("one bare line feed", sized(b"hello", "X-A: b\nX-B: c")),
    bad("a bare line feed behind the head", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\nhello"),
    bad("a bare carriage return", sized(b"hello", "X-A: b\rX-B: c")),
    bad("carriage returns for line ends", reply("Content-Length: 5", body=b"hello", line_end=b"\r")),
    bad("two carriage returns", sized(b"hello", "X-A: b\r")),
    bad("a NUL in a value", sized(b"hello", "X-A: b\0c")),
    bad("an escape in a value", sized(b"hello", "X-A: b\x1bc")),
    bad("a DEL in a value", sized(b"hello", "X-A: b\x7fc")),
    bad("a NUL in a name", sized(b"hello", "X\0A: b")),
    bad("a blank in a name", sized(b"hello", "X A: b")),
    bad("a name in another alphabet", sized(b"hello", "X-Ä: b")),
    bad("a name with brackets", sized(b"hello", "X(A): b")),
    bad("a name with a bracket at the end", sized(b"hello", "X[]: b")),
    bad("no name", sized(b"hello", ": b")),
    bad("no colon", sized(b"hello", "X-A")),
    ok("the same field twice", sized(b"hello", "X-A: b", "X-A: c"), Whole(body=b"hello", headers={"X-A": "b"})),
]


def zipped(
    name: str, body: bytes, means: Meaning, *, coding: str = "gzip", kept: bool | None = True, **how: object
) -> Entry:
    """`kept` None: the framing is right, but what is in it may be dropped before its end."""
    return Entry(name, sized(body, f"Content-Encoding: {coding}"), means, kept=kept, **how)  # type: ignore[arg-type]


PLAIN = Whole(body=TEXT)
COMPRESSED = [
    zipped("gzip", GZIP, PLAIN),
    zipped("GZIP", GZIP, PLAIN, coding="GZIP"),
    zipped("deflate", ZLIB, PLAIN, coding="deflate"),
    zipped("identity as encoding", TEXT, PLAIN, coding="identity"),
    ok("gzip in chunks", chunked(chunks(GZIP[:20], GZIP[20:]), "Content-Encoding: gzip"), PLAIN),
    last("gzip to the end of the connection", reply("Content-Encoding: gzip", body=GZIP), PLAIN, end="eof"),
    zipped("gzip of nothing", gzip.compress(b"", mtime=0), EMPTY),
    zipped("no byte of gzip", b"", EMPTY),
    zipped("raw deflate", _deflate(TEXT, -15), BAD, coding="deflate", kept=None),
    zipped("no gzip at all", TEXT, BAD, kept=None),
    zipped("a wrong checksum", GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:], BAD, kept=None),
    zipped("a wrong length", GZIP[:-4] + b"\0\0\0\0", BAD, kept=None),
    zipped("gzip cut off", GZIP[:-9], CUT),
    zipped("gzip without its last byte", GZIP[:-1], CUT),
    zipped("gzip cut in its head", GZIP[:5], CUT),
    zipped("deflate cut off", ZLIB[:-2], CUT, coding="deflate"),
    zipped("a bomb", BOMB, BAD, kept=None),
    zipped("a bomb as deflate", zlib.compress(bytes(4 * LIMIT)), BAD, coding="deflate", kept=None),
    zipped("garbage behind gzip", GZIP + b"garbage", PLAIN),
    zipped("gzip behind gzip", GZIP + GZIP, PLAIN),
    zipped("gzip in gzip", gzip.compress(GZIP, mtime=0), Whole(body=GZIP)),
    zipped("gzip, gzip", gzip.compress(GZIP, mtime=0), BAD, coding="gzip, gzip", kept=False),
    zipped("br", b"\x0b\x02\x80hello\x03", BAD, coding="br", kept=False),
    zipped("zstd", b"\x28\xb5\x2f\xfd", BAD, coding="zstd", kept=False),
    zipped("an unknown encoding", TEXT, BAD, coding="rot13", kept=False),
    cut(
        "gzip, and the connection cut", reply("Content-Encoding: gzip", f"Content-Length: {len(GZIP)}", body=GZIP[:-9])
    ),
]

BEHIND = [
    last("bytes behind the reply", sized(b"hello") + b"more"),
    last("one byte behind the reply", sized(b"hello") + b"x"),
    last("a NUL behind the reply", sized(b"hello") + b"\0"),
    last("bytes behind chunks", chunked(chunks(b"hello")) + b"more"),
    last("two replies", sized(b"hello") + sized(b"evil!")),
    last("two replies in chunks", chunked(chunks(b"hello")) + chunked(chunks(b"evil!"))),
    last("a reply behind 204", reply(status="HTTP/1.1 204 No Content") + sized(b"evil!"), Whole(204)),
    last("100 behind the reply", sized(b"hello") + CONTINUE),
    last("a thousand replies", sized(b"hello") + sized(b"evil!") * 1000),
    last("a reply behind a close", sized(b"hello", "Connection: close") + sized(b"evil!")),
    last("a reply that ends its connection", sized(b"hello"), end="eof"),
    last("a reply, then reset", sized(b"hello"), end="reset"),
]

GROUPS = {
    "length": LENGTHS,
    "chunks": CHUNKS,
    "coding": CODINGS,
    "end": ENDS,
    "no body": NO_BODY,
    "interim": INTERIM,
    "line": LINES,
    "header": HEADERS,
    "compressed": COMPRESSED,
    "behind": BEHIND,
}
CORPUS: dict[str, Entry] = {f"{group}: {entry}": entry for group, entries in GROUPS.items() for entry in entries}


# --- where aiohttp's client differs ------------------------------------------------------------------------------------


SOME = b"some"


@dataclass(frozen=True)
class Difference:
    why: str
    entries: frozenset[str]
    means: frozenset[Meaning | bytes]  # any of these; bytes: a whole reply with this body, `SOME` any

    def allows(self, meaning: Meaning) -> bool:
        if isinstance(meaning, Whole):
            return meaning.body in self.means or SOME in self.means
        return meaning in self.means


def _differs(why: str, means: Sequence[Meaning | bytes], entries: str) -> Difference:
    return Difference(why, frozenset(e.strip() for e in entries.strip().splitlines()), frozenset(means))


AIOHTTP = [
    _differs("Its parser is set to accept what broken servers send, and two parsers may read in two ways.", [b"hello"], """
        length: a blank before the colon
        chunks: a blank behind the size
        coding: a blank before the colon of a coding
        coding: chunks in HTTP/1.0
        line: HTTP/2.0 200 OK
        line: HTTP/0.9 200 OK
        line: RTSP/1.0 200 OK
        line: ICE/1.0 200 OK
        line: HTTP/1.1 099 X
        line: HTTP/1.1 000 X
        line: an empty line before
        line: a line feed before
        header: a folded line
        header: a line folded by a tab
        header: the first line folded
        header: a folded length
        header: a folded coding
        header: bare line feeds for line ends
        header: one bare line feed
        header: a bare line feed behind the head
        header: an escape in a value
        header: a DEL in a value
    """),
    _differs("It takes codings that it can't undo for none, and a second `chunked` for the first.", [SOME], """
        coding: chunked, chunked
        coding: chunked twice
        coding: gzip, chunked
        coding: chunked, gzip
        coding: identity
        coding: chunked, identity
        coding: identity, chunked
        coding: unknown coding
        coding: chunked with a parameter
        coding: coding in quotes
        coding: an empty coding
        coding: a vertical tab before chunked
    """),
    _differs("It counts a line end as the chunk's.", [b"hello\r"], """
        chunks: less than the size
    """),
    _differs("It drops the body of an interim reply; there is none to be dropped (RFC 9110 §15.2).", [b"hello"], """
        interim: 100 with length 0
        interim: 150 with a body
        interim: 150 with chunks
    """),
    _differs("A change of protocol that nobody asked for is its reply.", [b""], """
        interim: 101
        interim: 101 without upgrade
    """),
    _differs("It bounds each line but not their sum, and no extension.", [b"hello", WAITS, BAD], """
        header: 100 KB of fields
        chunks: extensions without end
        interim: without end
    """),
    _differs("What comes with a reply breaks it there; here it was complete, and only its connection is closed.", [BAD, SOME], """
        no body: 204 with a body
        no body: 304 with a body
        no body: 204 with chunks
        behind: bytes behind the reply
        behind: one byte behind the reply
        behind: a NUL behind the reply
        behind: bytes behind chunks
        behind: a reply behind a close
    """),
    _differs("A reset is an end to it.", [b"hello", CUT], """
        end: to the end, but reset
    """),
    _differs("It bounds the reason phrase, which here is not even kept.", [BAD], f"""
        line: {("HTTP/1.1 200 " + "x" * 40)[:40]}
    """),
    # aiohttp 3.14 forgets the body's reader when its parser fails behind the head: the gateway's stall timeout ends it.
    _differs("A broken chunk that arrives after the head closes the connection and tells nobody.", [BAD, WAITS], """
        chunks: a line feed in an extension
        chunks: a trailer without end
        chunks: trailers without end
        chunks: a length among trailers
        chunks: a broken trailer
        chunks: no size
        chunks: no hex
        chunks: 0x
        chunks: negative size
        chunks: signed size
        chunks: a size of 17 digits
        chunks: a blank before the size
        chunks: more than the size
        chunks: bare line feeds
        chunks: a bare carriage return
        chunks: no line end behind a chunk
    """),
]  # fmt: skip


def fits(entry: Entry, name: str, kind: str, meaning: Meaning) -> bool:
    """Whether a transport of this kind may make `meaning` of it."""
    if kind == "aiohttp":
        for difference in AIOHTTP:
            if name in difference.entries:
                return difference.allows(meaning)
    return entry.means.agrees(meaning) if isinstance(entry.means, Whole) else meaning == entry.means
