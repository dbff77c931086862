"""The corpus on both transports: the same meaning or a refusal, however a reply is cut, and never a byte of it in the
next request's answer. (`Stage.play` asks for that each time.)
"""

from __future__ import annotations

import pytest

from tests.transport.client import TRANSPORTS, WAYS
from tests.transport.corpus import AIOHTTP, CORPUS, GROUPS, fits
from tests.transport.server import split
from tests.transport.stage import Stage

GROUP = pytest.mark.parametrize("group", GROUPS)
LONGEST_SPLIT = 2000  # bytes of a reply that is cut everywhere


@pytest.fixture(scope="module", params=["httptools-uvloop", "httptools-asyncio", "aiohttp-uvloop"])
def stage(request):
    kind, loop = request.param.split("-")
    with Stage(loop, TRANSPORTS[kind]) as stage:
        stage.kind = kind
        yield stage


@pytest.fixture(scope="module")
def lean():
    with Stage("uvloop", TRANSPORTS["httptools"]) as stage:
        stage.kind = "httptools"
        yield stage


def judge(stage, group, cuts, *ways):
    """Plays the entries of a group, each cut as `cuts(raw)` says, in each way; all that differ are told together."""
    wrong = []
    for name, entry in CORPUS.items():
        if not name.startswith(f"{group}: "):
            continue
        for pieces in cuts(name, entry.raw):
            for way in ways:
                meaning, kept = stage.play(pieces, entry.end, WAYS[way])
                right = entry.kept if stage.kind == "httptools" and entry.kept is not None else kept
                if not fits(entry, name, stage.kind, meaning) or kept != right:
                    wrong.append((name, way, [len(piece) for piece in pieces][:3], meaning, kept))
    assert wrong == []


def whole(name, raw):
    return [[raw]]


def bytewise(name, raw):
    return [split(raw, range(len(raw)))] if len(raw) < LONGEST_SPLIT else []


def everywhere(name, raw):
    return [[raw[:at], raw[at:]] for at in range(1, len(raw))] if len(raw) < LONGEST_SPLIT else []


@GROUP
def test_as_one_piece(stage, group):
    """A reply that arrives at once means what the corpus says."""
    judge(stage, group, whole, "read")


@GROUP
def test_by_chunks_and_pushed(lean, group):
    """A body means the same whether it is read, taken as it comes or pushed."""
    judge(lean, group, whole, "chunk", "push")


@GROUP
def test_byte_by_byte(lean, group):
    """A reply whose bytes arrive one by one means the same."""
    judge(lean, group, bytewise, "push")


@pytest.mark.full
@GROUP
def test_byte_by_byte_everywhere(stage, group):
    """So it does on every loop and transport."""
    judge(stage, group, bytewise, "read", "chunk")


@pytest.mark.full
@pytest.mark.timeout(600)
@GROUP
def test_at_every_split(lean, group):
    """A reply cut in two anywhere means the same."""
    judge(lean, group, everywhere, "push")


def test_each_difference_is_one():
    """What is said of aiohttp's client is said of entries that there are, once each."""
    named = [name for difference in AIOHTTP for name in difference.entries]
    assert set(named) <= set(CORPUS)
    assert len(named) == len(set(named))
