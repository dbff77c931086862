"""Does it grow? A line through what a process held at rest after each round, and how sure that line is.

The line is Theil's and Sen's: the median of the slopes between all pairs of rounds. A few odd rounds don't move it, and
Kendall's rank statistic says between which slopes it lies, whatever the noise looks like.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from statistics import median

PROMISED, WARM, ALLOWED = 1_000_000, 50_000, 0.10
SURE = 3.29  # standard deviations: once in a thousand a line lies outside by chance
LEAST = 6  # rounds that say something
# What one request leaves behind is more than this; what bounded memories still take in is less. Bytes, or how many.
LEFT = {"objects": 0.5, "blocks": 5.0, "tasks": 0.02, "files": 0.02, "memory": 4096.0}


@dataclass(frozen=True)
class Growth:
    """Of one measure: what it was after the warm-up, and by what share of that it grows up to a million requests.

    `low` and `high`: between these with 99.9 %; `seen`: by what it did grow.
    """

    level: float
    seen: float
    share: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > ALLOWED:
            return "grows"
        return "flat" if self.high <= ALLOWED else "unsure"


def left_behind(measure: str, points: list[tuple[int, float]]) -> float | None:
    """How much of it each request leaves behind, if it surely does."""
    line, low, _ = slopes(points)
    return line if low > LEFT[measure] else None


def growth(points: list[tuple[int, float]]) -> Growth:
    """`points`: (requests so far, how much it held), from the end of the warm-up on.

    Whoever has had the million is judged by what it held, not by the line.
    """
    if not points:
        return Growth(math.nan, 0.0, 0.0, -math.inf, math.inf)
    few = max(1, min(5, len(points) // 3))
    early, late = (median(y for _, y in some) for some in (points[:few], points[-few:]))
    seen = (late - early) / early
    if points[-1][0] >= PROMISED:
        return Growth(early, seen, seen, seen, seen)
    scale = (PROMISED - WARM) / early
    return Growth(early, seen, *(slope * scale for slope in slopes(points)))


def slopes(points: list[tuple[int, float]]) -> tuple[float, float, float]:
    """(the line's slope, the least, the most that it may be)."""
    found = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2))
    n, pairs = len(points), len(found)
    away = SURE * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    if n < LEAST or away >= pairs:
        return (median(found) if found else 0.0), -math.inf, math.inf
    return median(found), found[int((pairs - away) / 2)], found[min(pairs - 1, math.ceil((pairs + away) / 2))]
