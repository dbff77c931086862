"""What an expression asks for, as far as needed to see that it exists: metrics, labels, values of labels.

No parser: promtool says whether PromQL is sound. It holds for expressions that write `sum by (…) (…)`, never
`sum(…) by (…)`, and no `without`; others are a fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

Known = dict[str, frozenset[str]]

_METRIC = re.compile(r"(?<![\w:$])(xenios[\w:]*|up|ALERTS)(?![\w:(])\s*(\{[^}]*\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_AGGREGATION = re.compile(r"(?<![\w:])(sum|min|max|avg|count|topk|quantile)(?![\w:])\s*(?:by\s*\(([^)]*)\))?\s*(?=\()")
_PAIRED = re.compile(r"\b(?:on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_VARIABLE = re.compile(r"\$[\w{]")


def faults(expression: str, known: Known, values: Mapping[str, set[str]]) -> list[str]:
    """What it asks for that does not exist; empty: all is there."""
    found = []
    if re.search(r"\)\s*by\b|\bwithout\b", expression):
        found.append("write `sum by (…) (…)`")
    for name, matchers in metrics(expression):
        if name not in known:
            found.append(f"no metric {name}")
            continue
        for label, operator, value in matchers:
            if label not in known[name]:
                found.append(f"{name} has no label {label}")
            if label in values and not _VARIABLE.search(value):
                wanted = value.split("|") if "~" in operator else [value]
                found += [f"{label} is never {one}" for one in wanted if one not in values[label]]
    for wanted, names in _grouped(expression):
        found += [
            f"{name} has no label {label}" for name in names for label in wanted if label not in known.get(name, ())
        ]
    return found


def metrics(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """(name, its matchers)."""
    for match in _METRIC.finditer(_without_groups(expression)):
        yield match[1], _MATCHER.findall(match[2] or "")


def result(expression: str, known: Known) -> frozenset[str]:
    """The labels of what comes out: those of the outermost aggregation, else of the first metric."""
    aggregation, metric = _AGGREGATION.search(expression), _METRIC.search(expression)
    if aggregation and (metric is None or aggregation.start() < metric.start()):
        return frozenset(_labels(aggregation[2] or "")) - {"le"}
    return known[metric[1]] if metric else frozenset()


def _labels(text: str) -> list[str]:
    return [label for label in re.split(r"[\s,]+", text) if label]


def _without_groups(expression: str) -> str:
    """`by (up)` names no metric."""
    return re.sub(r"\b(?:by|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expression)


def _grouped(expression: str) -> Iterator[tuple[list[str], list[str]]]:
    """(labels, the metrics that must have them) of each aggregation and each `on`."""
    for match in _AGGREGATION.finditer(expression):
        body = _body(expression, match.end())
        yield _labels(match[2] or ""), [name for name, _ in metrics(body)]
    for match in _PAIRED.finditer(expression):
        yield _labels(match[1]), [name for name, _ in metrics(expression)]


def _body(expression: str, start: int) -> str:
    """What stands in the parentheses that open at `start`."""
    depth = 0
    for n in range(start, len(expression)):
        depth += {"(": 1, ")": -1}.get(expression[n], 0)
        if depth == 0:
            return expression[start + 1 : n]
    raise ValueError(f"parentheses of {expression!r}")
