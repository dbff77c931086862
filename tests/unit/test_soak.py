"""The judge of `make soak`: what it calls flat, and what it sees through noise."""

import random

import pytest

from tests.soak.judge import growth, left_behind

MIB = 2**20


def line(per_request, *, rounds=40, each=2000, noise=0.2 * MIB, level=120 * MIB):
    """What a process held that grows so much with each request, unsteadily; every ninth round is far off."""
    chance = random.Random(17)
    return [
        (n * each, level + per_request * n * each + chance.gauss(0, noise) + (n % 9 == 4) * noise * 20)
        for n in range(25, 25 + rounds)
    ]


@pytest.mark.parametrize(
    ("per_request", "rounds", "verdict"),
    [
        (0, 40, "flat"),
        (-1, 40, "flat"),
        (40, 40, "grows"),  # a dictionary's entry
        (15, 450, "grows"),  # more than a tenth
        (10, 450, "flat"),  # less than it
        (0, 3, "unsure"),
        (0, 8, "unsure"),
    ],
)
def test_memory_is_judged_by_the_line_through_it(per_request, rounds, verdict):
    """Flat, growing, or too short to tell, whatever single rounds look like."""
    assert growth(line(per_request, rounds=rounds)).verdict == verdict
    assert growth([]).verdict == "unsure"


@pytest.mark.parametrize(("share", "verdict"), [(0.09, "flat"), (0.11, "grows")])
def test_after_a_million_it_is_what_was_held(share, verdict):
    """Then nothing is reckoned."""
    points = [(n, 100 * MIB * (1 + share * (n > 900_000))) for n in range(50_000, 1_000_001, 10_000)]
    assert growth(points).verdict == verdict


def test_what_each_request_leaves_is_told():
    """One object a request is seen within 2,400 requests, and a file with every tenth; a filling cache is neither."""
    few = {"rounds": 12, "each": 200, "level": 5000}
    assert left_behind("objects", line(1, noise=100, **few)) == pytest.approx(1, abs=0.3)
    assert left_behind("files", line(0.1, noise=4, **few)) == pytest.approx(0.1, abs=0.03)
    assert left_behind("objects", line(0.25, noise=100, **few)) is None
    assert left_behind("files", line(0, noise=4, **few)) is None
