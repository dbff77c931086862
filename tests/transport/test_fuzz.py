"""Bytes that nobody thought of: no crash, no hang, no connection left, and the next request gets its own answer.

(`Stage.play` asks for these each time.) `make test` tries the same examples each time, `make test-full` more and new ones.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.errors import Cause
from tests.transport.client import TRANSPORTS, WAYS
from tests.transport.corpus import CORPUS, WAITS, Whole
from tests.transport.server import split
from tests.transport.stage import Stage

MANY = 1500 if settings.get_current_profile_name() == "new" else 100
pytestmark = pytest.mark.timeout(600)
SEEDS = sorted((entry.raw for entry in CORPUS.values() if len(entry.raw) < 1000), key=len)
WORDS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"5", b"f", b"-", b"\xff", b"\r\n\r\n", b"0\r\n\r\n",
    b"5\r\nevil!\r\n", b"Content-Length: 3\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Upgrade: x\r\n",
    b"Content-Encoding: gzip\r\n", b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 X\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nevil!",
]  # fmt: skip


@st.composite
def replies(draw):
    """A reply of the corpus, changed in a few places; sometimes anything."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.binary(max_size=300))
    raw = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        to = draw(st.integers(at, min(len(raw), at + 24)))
        new = draw(
            st.one_of(
                st.sampled_from(WORDS),
                st.binary(max_size=3),
                st.just(b""),
                st.just(raw[at:to] * 2),
                st.sampled_from(SEEDS),
            )
        )
        raw = raw[:at] + new + raw[to:]
    if draw(st.integers(0, 3)) == 0:
        raw += draw(st.sampled_from([*WORDS, *SEEDS]))
    return raw


CUTS = st.lists(st.integers(0, 400), max_size=5)
ENDS = st.sampled_from(["open", "eof", "reset"])


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def lean(request):
    with Stage(request.param, TRANSPORTS["httptools"]) as stage:
        yield stage


@pytest.fixture(scope="module")
def theirs():
    with Stage("uvloop", TRANSPORTS["aiohttp"]) as stage:
        yield stage


@settings(max_examples=MANY)
@given(raw=replies(), cuts=CUTS, end=ENDS, way=st.sampled_from(sorted(WAYS)))
@example(raw=b"\r\n\x15", cuts=[1, 2], end="reset", way="chunk")  # refused, closed and only then reset
def test_whatever_comes_the_next_request_gets_its_own_answer(lean, raw, cuts, end, way):
    """A reply or a cause comes of any bytes, in any pieces."""
    meaning, _ = lean.play(split(raw, cuts), end, WAYS[way])
    assert isinstance(meaning, Whole) or meaning in {Cause.BAD_REPLY, Cause.TRUNCATED, Cause.CONNECTION, WAITS}
    assert not isinstance(meaning, Whole) or 200 <= meaning.status <= 999


@settings(max_examples=MANY)
@given(raw=replies(), cuts=CUTS, end=st.sampled_from(["open", "eof"]), way=st.sampled_from(sorted(WAYS)))
def test_pieces_change_nothing(lean, raw, cuts, end, way):
    """In whatever pieces and in whatever way a reply is taken: it means the same."""
    at_once, _ = lean.play([raw], end)
    in_pieces, _ = lean.play(split(raw, cuts), end, WAYS[way])
    assert in_pieces == at_once


@pytest.mark.parametrize("lean", ["uvloop"], indirect=True)
@settings(max_examples=MANY)
@given(raw=replies(), end=st.sampled_from(["open", "eof"]))
def test_what_is_accepted_means_the_same_to_aiohttp(lean, theirs, raw, end):
    """A whole reply is one to aiohttp's client too, with the same status, header and body.

    It may refuse a reply for what stands behind it: ours is complete there, and its connection closed.
    """
    ours, kept = lean.play([raw], end)
    if isinstance(ours, Whole):
        other, _ = theirs.play([raw], end)
        assert ours == other or (other == Cause.BAD_REPLY and not kept)
