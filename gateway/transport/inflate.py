"""Replies that an upstream compressed though it was asked not to."""

from __future__ import annotations

import zlib

from gateway.errors import Cause, UpstreamError


class Inflater:
    """gzip or zlib, piece by piece; a bomb ends at `limit` bytes."""

    __slots__ = ("_begun", "_left", "_zlib")

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._zlib = zlib.decompressobj(wbits=47)  # either of the two, as the data itself says
        self._begun = False

    def feed(self, data: bytes) -> bytes:
        """What `data` adds, b"" too. Raises UpstreamError(BAD_REPLY)."""
        self._begun = True
        try:
            out = self._zlib.decompress(data, self._left)
        except zlib.error as error:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream's compressed reply is broken.") from error
        self._left -= len(out)
        if self._zlib.unconsumed_tail or self._left <= 0:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream's compressed reply is too large.")
        return out

    def cut_off(self) -> UpstreamError | None:
        """What is wrong with a body that ends here."""
        if self._begun and not self._zlib.eof:
            return UpstreamError(Cause.TRUNCATED, "The upstream's compressed reply was cut off.")
        return None


def inflater(encoding: str | None, limit: int) -> Inflater | None:
    """For a Content-Encoding; None if there is nothing to do. Raises UpstreamError(BAD_REPLY) for any other."""
    match (encoding or "identity").strip().lower():
        case "identity":
            return None
        case "gzip" | "deflate":
            return Inflater(limit)
        case _:
            raise UpstreamError(
                Cause.BAD_REPLY, "The upstream compressed its reply in a way that it was not asked for."
            )
