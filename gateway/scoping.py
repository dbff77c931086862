"""`when:`: the requests for which a plugin, a limit or a routing rule is there. Compiled once at start-up."""

from __future__ import annotations

import fnmatch
import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

from gateway.incoming import asked_models
from gateway.kit.subjects import brings, input_estimate
from gateway.kit.text import clean
from gateway.settings import When, found_in

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from gateway.exchange import Exchange, Principal
    from gateway.settings import TimeWindow, TokenRange

# When a field is known, and when a hook runs first: 0 head, 1 authentication, 2 principal and body, 3 decision.
_KNOWN_AT = {
    "endpoint": 0,
    "headers": 0,
    "time": 0,
    "roles": 2,
    "teams": 2,
    "tenants": 2,
    "keys": 2,
    "claims": 2,
    "models": 2,
    "stream": 2,
    "input_tokens": 2,
    "tools": 2,
    "images": 2,
    "audio": 2,
    "json_schema": 2,
    "tasks": 3,
    "phase": 3,
}
_RUNS_AT = {"request_received": 0, "authenticate": 1, "prepare_request": 2, "choose_targets": 2}
_UNSCOPED = frozenset(
    {"register_routes", "register_commands", "register_upstreams", "restore_principal", "usage_corrected"}
)
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Condition(NamedTuple):
    """One field of a `when:`. `found` says of a request that does not match what it is instead, and what was wanted.

    `reads` is all that the test looks at: requests of which it gives the same are answered alike. Conditions of equal
    `field` and `of` (which header, which claim) read the same.
    """

    field: str
    test: Callable[[Exchange], bool]
    found: Callable[[Exchange], str]
    reads: Callable[[Exchange], Hashable]
    of: str = ""


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


def headers_in(settings: Any) -> Iterator[str]:
    """Names of the request headers that a `when:` within these settings reads."""
    for when in found_in(settings, When):
        yield from when.headers or ()


def compile_when(when: When | None) -> Callable[[Exchange], bool] | None:
    """A predicate; None if there is nothing to test. A field that an early refusal left unknown does not match."""
    tests = [condition.test for condition in conditions(when)]
    if not tests:
        return None
    return tests[0] if len(tests) == 1 else lambda ex: all(test(ex) for test in tests)


def _of_models(globs: Sequence[str]) -> Condition:
    """Any of those that the request names: each of them may answer it."""
    matches, wanted = matcher(globs), ", ".join(globs)

    def read(exchange: Exchange) -> tuple[str, ...]:
        return tuple(asked_models(exchange.body)) or ("",)

    def found(exchange: Exchange) -> str:
        return f"the model is {' or '.join(map(clean, read(exchange))) or 'none'} ({wanted})"

    return Condition("models", lambda ex: any(map(matches, read(ex))), found, read)


def _decided_task(exchange: Exchange) -> str | None:
    return exchange.decision.task if exchange.decision is not None else None


def conditions(
    when: When | None,
    *,
    model: Callable[[Exchange], str] | None = None,
    task: Callable[[Exchange], str | None] = _decided_task,
) -> tuple[Condition, ...]:
    """All of them must hold. Those that cost least come first. `model`, `task`: where those two are read; else `models`
    holds if it does for any model that the request names.
    """
    if when is None:
        return ()
    made: list[Condition] = []

    def text(field: str, what: str, globs: Sequence[str] | None, read: Callable[[Exchange], str | None]) -> None:
        if not globs:
            return
        matches, wanted = matcher(globs), ", ".join(globs)

        def test(exchange: Exchange) -> bool:
            value = read(exchange)
            return value is not None and matches(value)

        made.append(Condition(field, test, lambda ex: f"{what} is {clean(read(ex) or '') or 'none'} ({wanted})", read))

    def flag(field: str, wanted: bool | None, read: Callable[[Exchange], bool], yes: str, no: str) -> None:
        if wanted is not None:
            made.append(Condition(field, lambda ex: read(ex) is wanted, lambda ex: yes if read(ex) else no, read))

    text("endpoint", "the endpoint", when.endpoint, lambda ex: ex.endpoint)
    text("phase", "the phase", when.phase, lambda ex: ex.phase)
    flag("stream", when.stream, lambda ex: ex.stream, "it is a stream", "it is no stream")
    if model is not None:
        text("models", "the model", when.models, model)
    elif when.models:
        made.append(_of_models(when.models))
    text("tasks", "the task", when.tasks, task)
    if when.keys:
        made.append(_of_caller("keys", "the caller", when.keys, lambda p: (p.id,)))
    if when.teams:
        made.append(_of_caller("teams", "the caller's team", when.teams, lambda p: (p.team or "",)))
    if when.tenants:
        made.append(_of_caller("tenants", "the caller's tenant", when.tenants, lambda p: (p.tenant,)))
    if when.roles:
        made.append(_of_caller("roles", "the caller's role", when.roles, lambda p: p.roles))
    for name, header in (when.headers or {}).items():
        made.append(_header(name, header))
    for path, globs in (when.claims or {}).items():
        made.append(_of_caller("claims", f"the claim {path}", globs, _reads_claim(path), path))
    if when.time:
        made.append(_time(when.time))
    flag("tools", when.tools, lambda ex: brings(ex, "tools"), "it has tools", "it has no tools")
    flag("json_schema", when.json_schema, lambda ex: brings(ex, "json_schema"), "a JSON schema", "no JSON schema")
    flag("images", when.images, lambda ex: brings(ex, "images"), "it has images", "it has no images")
    flag("audio", when.audio, lambda ex: brings(ex, "audio"), "it has audio", "it has no audio")
    if when.input_tokens:
        made.append(_size(when.input_tokens))
    return tuple(made)


def matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    """Does a text match one of the globs? Case counts."""
    if not any(sign in glob for glob in globs for sign in "*?["):
        return frozenset(globs).__contains__
    pattern = re.compile("|".join(fnmatch.translate(glob) for glob in globs))
    return lambda text: pattern.match(text) is not None


def _of_caller(
    field: str,
    what: str,
    globs: Sequence[str],
    read: Callable[[Principal], tuple[str, ...] | frozenset[str]],
    of: str = "",
) -> Condition:
    matches, wanted = matcher(globs), ", ".join(globs)

    def test(exchange: Exchange) -> bool:
        principal = exchange.principal
        return principal is not None and any(map(matches, read(principal)))

    def found(exchange: Exchange) -> str:
        principal = exchange.principal
        is_ = ", ".join(sorted(map(clean, read(principal)))) if principal is not None else ""
        return f"{what} is {is_ or 'none'} ({wanted})"

    return Condition(field, test, found, lambda ex: read(ex.principal) if ex.principal is not None else None, of)


def _reads_claim(path: str) -> Callable[[Principal], tuple[str, ...]]:
    return lambda principal: _claim(principal.claims, path)


def _claim(claims: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """The texts of a claim, `a.b` within others; a list has several, another object none."""
    value: Any = claims.get(path)
    if value is None and "." in path:
        value = claims
        for step in path.split("."):
            value = value.get(step) if isinstance(value, dict) else None
    items = value if isinstance(value, list | tuple) else (value,)
    return tuple(str(i).lower() if isinstance(i, bool) else str(i) for i in items if isinstance(i, str | int | float))


def _header(name: str, wanted: bool | Sequence[str]) -> Condition:
    if isinstance(wanted, bool):
        return Condition(
            "headers",
            lambda ex: (ex.request.header(name) is not None) is wanted,
            lambda _: f"the header {name} is {'absent' if wanted else 'there'}",
            lambda ex: ex.request.header(name) is not None,
            f"{name}?",
        )
    matches, globs = matcher(wanted), ", ".join(wanted)

    def test(exchange: Exchange) -> bool:
        value = exchange.request.header(name)
        return value is not None and matches(value)

    def found(exchange: Exchange) -> str:
        return f"the header {name} is {clean(exchange.request.header(name) or 'absent')} ({globs})"

    return Condition("headers", test, found, lambda ex: ex.request.header(name), name)


def _size(wanted: TokenRange) -> Condition:
    least, most = wanted.min or 0, wanted.max

    def test(exchange: Exchange) -> bool:
        tokens = input_estimate(exchange)
        return least <= tokens and (most is None or tokens <= most)

    span = " and ".join(f"{n} {v}" for n, v in (("min", wanted.min), ("max", most)) if v is not None)
    found = f"it has about {{}} input tokens ({span})".format
    return Condition("input_tokens", test, lambda ex: found(input_estimate(ex)), input_estimate)


def _time(windows: Sequence[TimeWindow]) -> Condition:
    """By the moment at which the request began, so that all who ask get one answer."""
    made = [
        (ZoneInfo(w.zone), frozenset(map(_DAYS.index, w.days)), _minutes(w.begin), _minutes(w.end)) for w in windows
    ]

    def test(exchange: Exchange) -> bool:
        return any(
            _within(datetime.fromtimestamp(exchange.started_at, zone), days, begin, end)
            for zone, days, begin, end in made
        )

    def found(exchange: Exchange) -> str:
        now = datetime.fromtimestamp(exchange.started_at, made[0][0])
        return f"the time is {_DAYS[now.weekday()]} {now:%H:%M} ({' or '.join(map(_spelled, windows))})"

    return Condition("time", test, found, lambda ex: ex.started_at // 60)  # windows begin and end with a minute


def _within(now: datetime, days: frozenset[int], begin: int, end: int) -> bool:
    minute = now.hour * 60 + now.minute
    if begin < end:
        return begin <= minute < end and now.weekday() in days
    # over midnight: the morning belongs to the day before
    if minute >= begin:
        return now.weekday() in days
    return minute < end and (now - timedelta(days=1)).weekday() in days


def _minutes(clock: str) -> int:
    hours, _, minutes = clock.partition(":")
    return int(hours) * 60 + int(minutes)


def _spelled(window: TimeWindow) -> str:
    days = "" if len(window.days) == len(_DAYS) else f"{', '.join(window.days)} "
    return f"{days}{window.begin} to {window.end} {window.zone}"
