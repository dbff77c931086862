"""Which trace a request belongs to, by W3C Trace Context; whatever is wrong in what a client sends is ignored."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import msgspec

from gateway.kit import scrub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway import Exchange

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e])")
_LONGEST_STATE = 512
_MOST_MEMBERS = 32
_SAMPLED = 1
_LOW_HALF = (1 << 64) - 1

_bits = random.getrandbits  # not secret; no system call per request


class Trace(msgspec.Struct):
    """A request's place in its trace. `state` is the tracestate as it came; `parent_id` 0: the trace begins here.

    `attempts`: the span ids that upstreams were told, in the order of the attempts.
    """

    trace_id: int
    span_id: int
    parent_id: int = 0
    sampled: bool = False
    state: str = ""
    remote: bool = False
    attempts: list[int] = []

    def child_of(self) -> Trace:
        """A request that is made within this one."""
        return Trace(self.trace_id, new_span_id(), self.span_id, self.sampled, self.state)

    def traceparent(self, span_id: int) -> str:
        return f"00-{self.trace_id:032x}-{span_id:016x}-{self.sampled:02x}"


def new_span_id() -> int:
    return _bits(64) or 1


def new_trace(ratio: float, trace_id: int | None = None) -> Trace:
    """One that begins here. So many of all ids are sampled, by their lower half, as OpenTelemetry's samplers do."""
    trace_id = trace_id or _bits(128) or 1
    return Trace(trace_id, new_span_id(), sampled=trace_id & _LOW_HALF < ratio * (1 << 64))


def trace_of(exchange: Exchange) -> Trace | None:
    """The one that the client began, sampled if its flag says so; None if it says nothing that is sound."""
    request = exchange.request
    sent = request.header("traceparent")
    if sent is None or len(request.getall("traceparent")) > 1:
        return None
    trace = parsed(sent)
    if trace is not None:
        trace.state = _state(request.getall("tracestate"))
    return trace


def parsed(traceparent: str) -> Trace | None:
    """A place within it; None if it is not sound."""
    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    trace = Trace(int(trace_id, 16), new_span_id(), int(parent_id, 16), remote=True)
    if not trace.trace_id or not trace.parent_id:
        return None
    trace.sampled = bool(int(flags, 16) & _SAMPLED)
    return trace


def _state(values: Sequence[str]) -> str:
    """All of it or nothing; it goes into spans and to upstreams as it came."""
    state = ",".join(values)
    if not state or len(state) > _LONGEST_STATE or state != scrub(state):
        return ""
    found = [member.strip(" \t") for member in state.split(",")]
    sound = [_MEMBER.fullmatch(member) for member in found if member]
    keys = {member[1] for member in sound if member is not None}
    return state if len(keys) == len(sound) <= _MOST_MEMBERS else ""
