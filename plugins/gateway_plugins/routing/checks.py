"""What is wrong, or soon will be, with rules that are sound in themselves: models that are gone or retire, rules that
can never match, tasks that nothing serves. Only what is certain is told.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

from gateway import Concern, When
from gateway_plugins.routing.settings import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from gateway_plugins.routing.settings import Config, Rule

_WILD = "*?["


def concerns(config: Config, settings: Any, catalogue: Any, today: date) -> list[Concern]:
    """All of them; `path` is within the plugin's `config`."""
    return [
        *_of_models(config, settings, catalogue, today),
        *_of_fallbacks(config),
        *_of_shadows(config),
        *_of_tasks(config),
    ]


def expiries(models: Iterable[str], catalogue: Any) -> dict[tuple[str, ...], float]:
    """(model,) → when it will be gone, in Unix time; of `models` (`upstream/model`) those that have such a day."""
    found: dict[tuple[str, ...], float] = {}
    for name in models:
        upstream, _, model = name.partition("/")
        listed = catalogue.model(upstream, model.partition("@preset/")[0])
        try:
            day = date.fromisoformat((listed.expiration_date or "")[:10]) if listed is not None else None
        except ValueError:
            continue
        if day is not None:
            gone = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
            found[model,] = min(gone, found.get((model,), gone))
    return found


# --- models -----------------------------------------------------------------------------------------------------------


def _of_models(config: Config, settings: Any, catalogue: Any, today: date) -> Iterator[Concern]:
    overrides, default = settings.catalogue.overrides, settings.upstream.default
    gone: dict[str, list[bool]] = {}
    for place in config.entries():
        entry = place.entry
        if entry.model is None:
            continue
        served_by = overrides[entry.model].upstream if entry.model in overrides else None
        found = catalogue.concerns(entry.upstream or served_by or default, entry.model, today)
        gone.setdefault(place.name, []).append(any(concern.severity == "error" for concern in found))
        for concern in found:
            yield concern._replace(path=place.path, message=f"{concern.message} ({place.name})")
    for name, unknown in gone.items():
        if len(unknown) > 1 and all(unknown):
            path = next(place.path[:2] for place in config.entries() if place.name == name)
            yield Concern(path, f"{name}: none of its models is known, so that no fallback is left", "error")


def _of_fallbacks(config: Config) -> Iterator[Concern]:
    for kind, key, way in _ways(config):
        alone = len(way.sides) == 1 and len(way.sides[0].use) == 1 and way.sides[0].use[0].model is not None
        if way.fallback_on and alone:
            yield Concern(
                (*key, "fallback_on"), f"{kind}: it has `fallback_on` and one target: there is no other to fall back to"
            )


def _ways(config: Config) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    for index, rule in enumerate(config.rules):
        yield f"rule {rule.name!r}", ("rules", index), rule
    for name, task in config.tasks.items():
        yield f"task {name!r}", ("tasks", name), task


# --- tasks without rules ----------------------------------------------------------------------------------------------


def _of_tasks(config: Config) -> Iterator[Concern]:
    for name, task in config.tasks.items():
        if task.rule is not None or task.sides:
            continue
        asked = When(models=(PREFIX + name,), tasks=(name,))
        takers = [rule for rule in config.rules if _may_take(rule, asked) and not _keeps_name(rule)]
        path = ("tasks", name)
        if not takers:
            yield Concern(path, f"task {name!r}: it names no models, and no rule takes it", "error")
        elif not any(_covers(rule.conditions, asked) for rule in takers):
            names = ", ".join(rule.name for rule in takers)
            yield Concern(
                path, f"task {name!r}: only rules with further conditions take it ({names}); else it is 400 `no_route`"
            )


def _may_take(rule: Rule, asked: When) -> bool:
    """Its conditions about names hold; others may."""
    when = rule.conditions
    only = When(models=when.models, tasks=when.tasks) if when is not None else None
    return _covers(only, asked)


def _keeps_name(rule: Rule) -> bool:
    return any(entry.model is None for side in rule.sides for entry in side.use)


# --- rules that can never match ---------------------------------------------------------------------------------------


def _of_shadows(config: Config) -> Iterator[Concern]:
    named = {task.rule for task in config.tasks.values()}
    for index, rule in enumerate(config.rules):
        earlier = _first_wider(config.rules[:index], rule.conditions)
        if earlier is not None:
            use = ": it answers for tasks that name it alone" if rule.name in named else ""
            yield Concern(
                ("rules", index), f"rule {rule.name!r} can never match: rule {earlier.name!r} before it takes all{use}"
            )
    replacing = [rule for rule in config.rules if not _keeps_name(rule)]
    for name in config.aliases:
        earlier = _first_wider(replacing, When(models=(name,))) if not _is_wild(name) else None
        if earlier is not None:
            yield Concern(
                ("aliases", name), f"alias {name!r} never answers: rule {earlier.name!r} takes all such requests"
            )
    for name, task in config.tasks.items():
        earlier = _first_wider(replacing, When(models=(PREFIX + name,), tasks=(name,)))
        if earlier is not None and (task.sides or task.rule):
            yield Concern(
                ("tasks", name), f"task {name!r} has models of its own, but rule {earlier.name!r} takes all of it"
            )


def _first_wider(rules: Sequence[Rule], when: When | None) -> Rule | None:
    return next((rule for rule in rules if _covers(rule.conditions, when)), None)


def _covers(wide: When | None, narrow: When | None) -> bool:
    """Whatever meets `narrow` meets `wide`, for certain: each condition of the one is implied by one of the other."""
    wide, narrow = wide or When(), narrow or When()
    return all(_implied(name, getattr(wide, name), getattr(narrow, name)) for name in When.model_fields)


def _implied(name: str, wide: Any, narrow: Any) -> bool:
    if wide is None or (name in {"models", "endpoint"} and "*" in wide):  # each request has these two
        return True
    if narrow is None:
        return False
    match name:
        case "claims":
            return all(path in narrow and _within(wide[path], narrow[path]) for path in wide)
        case "headers":
            return all(header in narrow and _header_implied(wide[header], narrow[header]) for header in wide)
        case "input_tokens":
            return (wide.min or 0) <= (narrow.min or 0) and (
                wide.max is None or (narrow.max is not None and narrow.max <= wide.max)
            )
        case "time" | "phase":
            return set(narrow) <= set(wide)
        case "stream" | "tools" | "images" | "audio" | "json_schema":
            return bool(wide == narrow)
    return _within(wide, narrow)


def _header_implied(wide: Any, narrow: Any) -> bool:
    if wide is False or narrow is False:
        return wide is narrow
    return wide is True or (narrow is not True and _within(wide, narrow))


def _within(wide: Sequence[str], narrow: Sequence[str]) -> bool:
    """Each glob of `narrow` is within one of `wide`: it is the same, or begins as a `prefix*` does."""
    return all(any(_glob_within(glob, other) for other in wide) for glob in narrow)


def _glob_within(narrow: str, wide: str) -> bool:
    if narrow == wide:
        return True
    prefix = wide.removesuffix("*")
    if prefix + "*" != wide or _is_wild(prefix):
        return False
    begin = next((index for index, sign in enumerate(narrow) if sign in _WILD), len(narrow))
    return narrow[:begin].startswith(prefix)


def _is_wild(text: str) -> bool:
    return any(sign in text for sign in _WILD)
