"""Requests that two servers could read as a different number of requests, each with a second one that is to be smuggled.

The second one says so of itself (`SMUGGLED`), and that it comes from `6.6.6.6`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.faults.raw import CHAT, head, request

if TYPE_CHECKING:
    from gateway.kit.testing import Gateway

SMUGGLED = "X-Smuggled"
BODY = json.dumps(CHAT).encode()
SIZE = f"Content-Length: {len(BODY)}"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
TE = "Transfer-Encoding: chunked"

LENGTHS = ("+5", "5,5", "5, 6", "0x5", "-1", "5 5", "", " ", "1e1", "5_0", "\xb2", "9" * 30)
CODINGS = (
    "xchunked", "chunked, identity", "identity", "chunked, chunked", "\x0bchunked", "chunked;a=b", '"chunked"',
    "chunked\x0c", "gzip", "gzip, chunked", "chunked, gzip", "",
)  # fmt: skip
# Those that one reader takes for chunked and another doesn't: beside a length, they are the classic forms CL.TE and TE.CL.
VEILED = (
    TE, "Transfer-Encoding:chunked", "Transfer-Encoding:\tchunked", "Transfer-Encoding: chunked ", "tRANSFER-eNCODING: CHUNKED",
    "Transfer-Encoding : chunked", "Transfer-Encoding\t: chunked", "Transfer-Encoding: xchunked", "Transfer-Encoding: chunk",
    "Transfer-Encoding: x\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    "Transfer-Encoding:\r\n chunked", "Transfer-Encoding: \x0bchunked", "Transfer-Encoding: chunked\x00",
    "Transfer-Encoding: \xffchunked", "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: 'chunked'", "Transfer-Encoding\x00: chunked", "\x00Transfer-Encoding: chunked",
    " Transfer-Encoding: chunked", "X-A: b\r\n Transfer-Encoding: chunked", "X-A: b\nTransfer-Encoding: chunked",
    "X-A: b\rTransfer-Encoding: chunked", "X-A\nTransfer-Encoding: chunked", "X-A: b\r\n\r Transfer-Encoding: chunked",
)  # fmt: skip


class Forms:
    """`host`: what they call the server."""

    def __init__(self, gw: Gateway, host: str = "gateway") -> None:
        self._gw = gw
        self._host = host
        self.second = request(
            gw, {**CHAT, "model": "smuggled"}, f"{SMUGGLED}: yes", "X-Forwarded-For: 6.6.6.6", host=host
        )

    def _head(self, *lines: str, **how: str) -> bytes:
        return head(self._gw, *lines, host=self._host, **how)

    def _whole(self, **how: str) -> bytes:
        return request(self._gw, host=self._host, **how)

    def refused(self) -> dict[str, bytes]:
        """Those whose end is in doubt: nothing of them may be served."""
        made, second = self._head, self.second
        return {
            **{f"length-{value!r}": made(f"Content-Length: {value}") + BODY + second for value in LENGTHS},
            **{f"coding-{value!r}": made(f"Transfer-Encoding: {value}") + CHUNKED + second for value in CODINGS},
            **{f"CL.TE-{line!r}": self._length_ends_it(line) for line in VEILED},
            **{f"TE.CL-{line!r}": self._coding_ends_it(line) for line in VEILED},
            "length+coding": made(SIZE, TE) + CHUNKED + second,
            "coding+length": made(TE, "Content-Length: 0") + CHUNKED + second,
            "lengths-differ": made(SIZE, "Content-Length: 6") + BODY + second,
            "lengths-agree": made(SIZE, SIZE) + BODY + second,
            "length-of-all": made(SIZE, f"Content-Length: {len(BODY + second)}") + BODY + second,
            "codings": made(TE, "Transfer-Encoding: identity") + CHUNKED + second,
            "coding-space-colon": made("Transfer-Encoding : chunked") + CHUNKED + second,
            "length-space-colon": made(f"Content-Length : {len(BODY)}") + BODY + second,
            "space-before-name": made(" Transfer-Encoding: chunked") + CHUNKED + second,
            "coding-1.0": made(TE, version="1.0") + CHUNKED + second,
            "coding-1.0-kept": made(TE, "Connection: keep-alive", version="1.0") + CHUNKED + second,
            "obs-fold": made("X-A: 1\r\n 2", SIZE) + BODY + second,
            "obs-fold-coding": made("Transfer-Encoding:\r\n chunked") + CHUNKED + second,
            "obs-fold-length": made(f"Content-Length:\r\n {len(BODY)}") + BODY + second,
            "bare-lf": self._whole().replace(b"\r\n", b"\n") + second,
            "bare-lf-in-head": made(f"X-A: 1\n{SIZE}") + BODY + second,
            "bare-lf-ends-head": made(SIZE).replace(b"\r\n\r\n", b"\n\n") + BODY + second,
            "bare-cr": made(f"X-A: a\r{SIZE}") + BODY + second,
            "cr-cr-lf": made(SIZE).replace(b"\r\n\r\n", b"\r\n\r\r\n") + BODY + second,
            "nul": made("X-A: a\x00b", SIZE) + BODY + second,
            "nul-in-name": made("X-A\x00: b", SIZE) + BODY + second,
            "no-colon": made("X-A", SIZE) + BODY + second,
            "empty-name": made(": x", SIZE) + BODY + second,
            "chunk-lf": made(TE) + b"%x\n%b\n0\n\n" % (len(BODY), BODY) + second,
            "chunk-lf-size": made(TE) + b"%x\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + second,
            "chunk-no-crlf": made(TE) + b"%x\r\n%b0\r\n\r\n" % (len(BODY), BODY) + second,
            "chunk-size-sign": made(TE) + b"+" + CHUNKED + second,
            "chunk-size-0x": made(TE) + b"0x" + CHUNKED + second,
            "chunk-size-space": made(TE) + b" " + CHUNKED + second,
            "chunk-size-junk": made(TE) + b"zz\r\n" + second,
            "chunk-size-empty": made(TE) + b"\r\n" + second,
            "chunk-size-huge": made(TE) + b"f" * 17 + b"\r\n" + second,
            "chunk-extension-lf": made(TE) + b"%x;a\n\r\n" % len(BODY) + CHUNKED + second,
            "chunk-extension-cr": made(TE) + b"%x;a\rb\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + second,
            "chunk-extension-nul": made(TE) + b"%x;a=\x00\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + second,
            "trailer-bare-lf": made(TE) + CHUNKED[:-2] + b"X-A: b\n\r\n" + second,
            "version": self._whole(version="1.2") + second,
            "version-2": self._whole(version="2.0") + second,
            "version-lower": self._whole().replace(b"HTTP/1.1", b"http/1.1") + second,
            "version-none": b"POST /v1/chat/completions\r\n" + second,
            "version-two": self._whole().replace(b"HTTP/1.1", b"HTTP/1.1 HTTP/1.1") + second,
            "line-tabs": self._whole().replace(b" HTTP", b"\tHTTP").replace(b"POST ", b"POST\t") + second,
            "line-nul": self._whole(path="/v1/chat/completions\x00") + second,
            "line-cr": self._whole().replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\r\n") + second,
            "line-space": self._whole(path="/v1/chat/completions X-A: /v1") + second,
            "preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + second,
            "no-host": b"POST /v1/chat/completions HTTP/1.1\r\n\r\n" + second,
            "two-hosts": made("Host: b", SIZE) + BODY + second,
        }

    def hidden(self) -> dict[str, bytes]:
        """Those whose end is certain: the second stands within the body, where only who reads them wrongly sees it."""
        made, second = self._head, self.second
        size = f"Content-Length: {len(second)}"
        inside = b"%x\r\n%b\r\n0\r\n\r\n" % (len(second), second)
        long = f"Content-Length: 000{len(second)}"
        return {
            "body": made(size) + second,
            "body-chunked": made(TE) + inside,
            "length-zeros": made(long) + second,
            "chunk-zeros": made(TE) + b"000" + inside,
            "chunk-extension": made(TE) + b'%x;a="b"\r\n%b\r\n0;c\r\n\r\n' % (len(second), second),
            "underscores": made("Transfer_Encoding: chunked", "Content_Length: 0", size) + second,
            "get": made(size, method="GET", path="/v1/models") + second,
            "get-chunked": made(TE, method="GET", path="/v1/models") + inside,
            "head": made(size, method="HEAD", path="/health") + second,
            "options": made(size, method="OPTIONS") + second,
            "delete-unknown": made(size, method="DELETE", path="/nowhere") + second,
            "expect": made("Expect: 100-continue", size) + second,
            "expect-get": made("Expect: 100-continue", size, method="GET", path="/v1/models") + second,
            "expect-odd": made("Expect: y 100-continue", size) + second,
            "expect-twice": made("Expect: 100-continue", "Expect: 100-continue", size) + second,
            "upgrade-h2c": made(
                "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA", size
            )
            + second,
            "upgrade-websocket": made(
                "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", size,
            )
            + second,
            "upgrade-get": made("Connection: Upgrade", "Upgrade: websocket", size, method="GET", path="/v1/models") + second,
            "connection-length": made("Connection: Content-Length", size) + second,
            "connection-coding": made("Connection: Transfer-Encoding", TE) + inside,
            "absolute": made(size, path=f"http://{self._host}/v1/chat/completions") + second,
            "absolute-elsewhere": made(size, path="http://elsewhere/v1/chat/completions") + second,
            "fragment": made(size, path="/v1/chat/completions#/../x") + second,
            "1.0": made(size, version="1.0") + second,
            "1.0-kept": made(size, "Connection: keep-alive", version="1.0") + second,
            "line-ends-before": b"\r\n\r\n" + made(size) + second,
            "gzip-length": made("Content-Encoding: gzip", size) + second,
        }  # fmt: skip

    def _length_ends_it(self, line: str) -> bytes:
        """By its length all of it is one request; by its coding a second one follows."""
        body = CHUNKED + self.second
        return self._head(f"Content-Length: {len(body)}", line) + body

    def _coding_ends_it(self, line: str) -> bytes:
        """By its coding all of it is one request; by its length, which ends behind the first chunk's, a second follows."""
        size = b"%x\r\n" % len(self.second)
        return self._head(f"Content-Length: {len(size)}", line) + size + self.second + b"\r\n0\r\n\r\n"
