"""`when:` of a plugin entry: the requests for which the plugin is there. Compiled once, evaluated once per exchange."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.exchange import Exchange
    from gateway.settings import When

# When a field is known, and when a hook runs first: 0 head, 1 authentication, 2 principal and body, 3 decision.
_KNOWN_AT = {
    "endpoint": 0,
    "phase": 0,
    "roles": 2,
    "teams": 2,
    "keys": 2,
    "models": 2,
    "stream": 2,
    "tasks": 3,
}
_RUNS_AT = {"request_received": 0, "authenticate": 1, "prepare_request": 2, "choose_targets": 2}
_UNSCOPED = frozenset(
    {"register_routes", "register_commands", "register_upstreams", "restore_principal", "usage_corrected"}
)


def faults(when: When | None, hooks: Sequence[str]) -> list[str]:
    """Why this `when` can't work with these hooks, in words for the operator."""
    if when is None:
        return []
    out = []
    for name in when.model_fields_set:
        known = _KNOWN_AT.get(name, 3)
        early = [h for h in hooks if h not in _UNSCOPED and _RUNS_AT.get(h, 3) < known]
        if early:
            out.append(f"`{name}` is not known yet when this plugin's {', '.join(sorted(early))} runs.")
    return out


def compile_when(when: When | None) -> Callable[[Exchange], bool] | None:
    """A predicate; None if there is nothing to test. A field that an early refusal left unknown does not match."""
    if when is None:
        return None
    tests: list[Callable[[Exchange], bool]] = []
    if endpoint := when.endpoint:
        tests.append(lambda ex: _any(ex.endpoint, endpoint))
    if phase := when.phase:
        tests.append(lambda ex: ex.phase in phase)
    if roles := when.roles:
        tests.append(lambda ex: ex.principal is not None and any(_any(r, roles) for r in ex.principal.roles))
    if teams := when.teams:
        tests.append(lambda ex: ex.principal is not None and _any(ex.principal.team or "", teams))
    if keys := when.keys:
        tests.append(lambda ex: ex.principal is not None and _any(ex.principal.id, keys))
    if models := when.models:
        tests.append(lambda ex: _any(str(ex.body.get("model") or ""), models))
    if when.stream is not None:
        tests.append(lambda ex: ex.stream is when.stream)
    if tasks := when.tasks:
        tests.append(lambda ex: ex.decision is not None and _any(ex.decision.task or "", tasks))
    if not tests:
        return None
    return lambda ex: all(test(ex) for test in tests)


def _any(value: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(value, glob) for glob in globs)
