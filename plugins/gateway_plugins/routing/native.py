"""OpenRouter's own fallback (`models`, `fallbacks`) and ours: one of the two tries the next model, never both.

Whoever it is: what a client lists is in its scope (`gateway.access`), and every model that may answer is a target or
stands in a target's `models`, where budgets price it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gateway_plugins.routing.settings import FIXED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gateway import Exchange, Target

LISTS = ("models", "fallbacks")
_CONSUMED = (*LISTS, "route")


def listed(exchange: Exchange) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, fields of its own) of each further model that the client names, in order."""
    body, dialect = exchange.body, exchange.dialect
    models = list(body.get("models") or ())
    if not body.get("model"):
        models = models[1:]  # the first is what was asked for
    for name in models:
        yield name, {}
    kept_back = FIXED | dialect.forced.keys() | dialect.refused.keys()
    for entry in body.get("fallbacks") or ():
        if isinstance(entry, dict):
            yield entry["model"], {n: v for n, v in entry.items() if n not in kept_back}
        else:
            yield entry, {}


def consumed(target: Target) -> Target:
    """The client's lists have become targets: they go upstream no more."""
    return replace(target, strip=(*target.strip, *_CONSUMED))


def grouped(targets: Sequence[Target], is_openrouter: Callable[[str], bool]) -> list[Target]:
    """Targets in a row at one OpenRouter with equal parameters as one, which lists the others in `models`."""
    out: list[Target] = []
    for (upstream, *_), alike in groupby(targets, key=lambda t: (t.upstream, t.overrides, t.strip, t.limits)):
        first, *others = alike
        if others and is_openrouter(upstream):
            out.append(replace(first, overrides={**first.overrides, "models": [other.model for other in others]}))
        else:
            out += [first, *others]
    return out
