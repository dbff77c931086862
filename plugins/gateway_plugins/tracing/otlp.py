"""A span, and its bytes in OTLP's protobuf encoding (opentelemetry-proto, trace/v1, stable).

By hand, since it is a handful of fields: the encoder of OpenTelemetry's SDK takes 100 µs a span, which is more than all
other plugins together take for a request. This takes a tenth, as most attributes are the same as in other spans: those
are encoded once, as `Shared`.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Attributes: TypeAlias = dict[str, Any]  # of str, bool, int, float or lists of them

INTERNAL, SERVER, CLIENT, CONSUMER = 1, 2, 3, 5  # SpanKind
_KINDS = {INTERNAL: "internal", SERVER: "server", CLIENT: "client", CONSUMER: "consumer"}
_SAMPLED, _HAS_IS_REMOTE, _IS_REMOTE = 0x01, 0x100, 0x200  # SpanFlags
_ERROR = b"\x7a\x02\x18\x02"  # status: code: STATUS_CODE_ERROR
_SHORT = 100
_SPAN_ATTRIBUTE, _EVENT_ATTRIBUTE, _RESOURCE_ATTRIBUTE = b"\x4a", b"\x1a", b"\x0a"

_fixed64 = struct.Struct("<Q").pack
_fixed32 = struct.Struct("<I").pack
_double = struct.Struct("<d").pack


class Event(msgspec.Struct):
    """Something at one moment (nanoseconds since 1970)."""

    name: str
    at: int
    attributes: Attributes


class Shared:
    """Attributes that many spans have in common. Nobody changes them."""

    __slots__ = ("attributes", "encoded")

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.encoded = b"".join([_attribute(_SPAN_ATTRIBUTE, key, value) for key, value in attributes.items()])


class Span(msgspec.Struct):
    """One finished span. Times are nanoseconds since 1970; `parent_id` 0: the trace begins here."""

    name: str
    kind: int
    trace_id: int
    span_id: int
    parent_id: int
    started: int
    ended: int
    attributes: Attributes
    shared: tuple[Shared, ...] = ()  # no name that is in `attributes` too
    failed: bool = False
    events: list[Event] = []
    state: str = ""
    remote: bool = False  # the parent is another process's


def encoded(span: Span) -> bytes:
    """The message Span."""
    parts = [b"\x0a\x10", span.trace_id.to_bytes(16, "big"), b"\x12\x08", span.span_id.to_bytes(8, "big")]
    if span.state:
        parts.append(_text(b"\x1a", span.state))
    if span.parent_id:
        parts += (b"\x22\x08", span.parent_id.to_bytes(8, "big"))
    parts += (
        _kept_text(b"\x2a", span.name), b"\x30", _varint(span.kind),
        b"\x39", _fixed64(span.started), b"\x41", _fixed64(span.ended),
    )  # fmt: skip
    parts += [shared.encoded for shared in span.shared]
    parts += _attributes(_SPAN_ATTRIBUTE, span.attributes)
    for event in span.events:
        attributes = _attributes(_EVENT_ATTRIBUTE, event.attributes)
        inner = [b"\x09", _fixed64(event.at), _text(b"\x12", event.name), *attributes]
        parts.append(_field(b"\x5a", b"".join(inner)))
    if span.failed:
        parts.append(_ERROR)
    parts += (b"\x85\x01", _fixed32(_SAMPLED | _HAS_IS_REMOTE | (_IS_REMOTE if span.remote else 0)))
    return b"".join(parts)


def request(resource: Mapping[str, Any], version: str, spans: Iterable[bytes]) -> bytes:
    """The message ExportTraceServiceRequest of encoded spans."""
    scope = _text(b"\x0a", "xenios") + _text(b"\x12", version)
    of_scope = _field(b"\x0a", scope) + b"".join([_field(b"\x12", span) for span in spans])
    of_resource = _field(b"\x0a", b"".join(_attributes(_RESOURCE_ATTRIBUTE, resource)))
    return _field(b"\x0a", of_resource + _field(b"\x12", of_scope))


def refused(reply: bytes) -> int:
    """How many spans a collector took and dropped: ExportTraceServiceResponse.partial_success.rejected_spans."""
    try:
        partial = _first(reply, 1)
        count = _first(partial, 1) if isinstance(partial, bytes) else None
    except IndexError:  # it ends within a field, or is something else
        return 0
    return count if isinstance(count, int) and count < 1 << 63 else 0


def all_attributes(span: Span) -> Attributes:
    """The shared ones and its own."""
    found = dict(span.attributes)
    for shared in span.shared:
        found |= shared.attributes
    return found


def readable(span: Span) -> dict[str, Any]:
    """For people."""
    return {
        "name": span.name,
        "trace_id": f"{span.trace_id:032x}",
        "span_id": f"{span.span_id:016x}",
        "parent_id": f"{span.parent_id:016x}" if span.parent_id else None,
        "kind": _KINDS[span.kind],
        "started": span.started / 1e9,
        "seconds": (span.ended - span.started) / 1e9,
        "failed": span.failed,
        "attributes": all_attributes(span),
        "events": [{"name": e.name, "at": e.at / 1e9, "attributes": e.attributes} for e in span.events],
    }


# --- protobuf's wire format ----------------------------------------------------------------------------------------


def _attributes(tag: bytes, attributes: Mapping[str, Any]) -> list[bytes]:
    """As `_attribute`, by shorter ways for what requests have of their own."""
    out: list[bytes] = []
    for key, value in attributes.items():
        kind = type(value)
        if kind is str and len(value) <= _SHORT:
            out.append(_short_text(tag, key, value))
        elif kind is float:
            out.append(_float_head(tag, key) + _double(value))
        elif kind is int:
            out.append(_kept_count(tag, key, value))
        else:
            out.append(_attribute(tag, key, value))
    return out


def _short_text(tag: bytes, key: str, text: str) -> bytes:
    raw = text.encode(errors="replace")
    size = len(raw)
    if size > 0x7D:
        return _attribute(tag, key, text)
    head = _key(key)
    return tag + _varint(len(head) + 4 + size) + head + bytes((0x12, size + 2, 0x0A, size)) + raw


def _attribute(tag: bytes, key: str, value: Any) -> bytes:
    return _field(tag, _key(key) + _field(b"\x12", _value(value)))


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return _text(b"\x0a", value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    if isinstance(value, float):
        return b"\x21" + _double(value)
    return _field(b"\x2a", b"".join([_field(b"\x0a", _value(item)) for item in value]))


def _text(tag: bytes, text: str) -> bytes:
    return _field(tag, text.encode(errors="replace"))


def _field(tag: bytes, payload: bytes) -> bytes:
    return tag + _varint(len(payload)) + payload


def _first(message: bytes, wanted: int) -> bytes | int | None:
    """The first field of this number, of those that are varints or have a length."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, at = _read_varint(message, at)
        value: bytes | int = number
        if tag & 7 == 2:
            value, at = message[at : at + number], at + number
        elif tag & 7:
            return None
        if tag >> 3 == wanted:
            return value
    return None


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while message[at] >= 0x80:
        number |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return number | message[at] << shift, at + 1


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@functools.lru_cache(maxsize=256)
def _key(key: str) -> bytes:
    return _text(b"\x0a", key)


@functools.lru_cache(maxsize=256)
def _float_head(tag: bytes, key: str) -> bytes:
    """An attribute but for its eight bytes."""
    return _attribute(tag, key, 0.0)[:-8]


_kept_count = functools.lru_cache(maxsize=2048)(_attribute)
_kept_text = functools.lru_cache(maxsize=1024)(_text)
