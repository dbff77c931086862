"""What routing finds wrong beside the catalogue, and what it never says wrongly."""

import json
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from plugin_objects import exchange, settings

from gateway import Metrics, Principal, When, conditions
from gateway.catalogue import Catalogue
from gateway_plugins.routing.checks import _covers, _glob_within, concerns, expiries
from gateway_plugins.routing.settings import Config

TODAY = date(2026, 11, 26)


def item(name, prompt="0.000003", context=200_000, **fields):
    return {
        "id": name, "canonical_slug": name, "name": name, "created": 1, "context_length": context,
        "pricing": {"prompt": prompt, "completion": "0.00001"}, "top_provider": {"max_completion_tokens": 1000}, **fields,
    }  # fmt: skip


LISTED = [
    item("a/one"), item("b/two"), item("a/old", expiration_date="2026-12-01"), item("a/today", expiration_date="2026-11-26"),
    item("a/past", expiration_date="2026-11-20T00:00:00Z"), item("xenios/sim"),
]  # fmt: skip


async def listed(*items, overrides=None, **kinds):
    """A catalogue that has just been told these models."""

    async def fetch(_):
        return json.dumps({"data": list(items)}).encode()

    made = settings(catalogue={"overrides": overrides or {}})
    catalogue = Catalogue({"openrouter": "openrouter", **kinds}, made.catalogue, None, fetch)
    catalogue.load()
    await catalogue.refresh("openrouter", store=False)
    return made, catalogue


async def found(config, *items, overrides=None):
    made, catalogue = await listed(*(items or LISTED), overrides=overrides)
    return concerns(Config.model_validate(config), made, catalogue, TODAY)


def texts(concerns):
    return [concern.message for concern in concerns]


# --- models -----------------------------------------------------------------------------------------------------------


async def test_a_model_that_is_not_listed_is_an_error():
    """A target that no longer exists is named with its place; variants, presets and simulated models are not."""
    names = ["a/one", "a/none", "a/one:nitro", "a/one:free", "@preset/x", "a/one@preset/x", "xenios/sim-fail-503"]
    [one] = await found({"aliases": {"x": names}})
    assert one == (("aliases", "x", 1), "a/none: openrouter lists no such model (alias 'x')", "error")
    [typo] = await found({"aliases": {"x": ["a/one:nitor"]}})
    assert (typo.message, typo.severity) == ("a/one:nitor: `:nitor` is no known variant (alias 'x')", "warning")


async def test_nothing_is_said_about_lists_that_nobody_fetched():
    """The bundled list is short: a model that it lacks may well exist."""
    made = settings()
    catalogue = Catalogue({"openrouter": "openrouter", "local": "openai"}, made.catalogue, None, None)
    catalogue.load()
    config = Config.model_validate({"aliases": {"x": ["some/new-model", {"model": "llama", "upstream": "local"}]}})
    assert concerns(config, made, catalogue, TODAY) == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("a/old", "a/old: retires on 2026-12-01, in 5 days (rule 'r')"),
        ("a/today", "a/today: retires on 2026-11-26, today (rule 'r')"),
        ("a/past", "a/past: was to retire on 2026-11-20, 6 days ago (rule 'r')"),
    ],
)
async def test_a_model_that_retires_is_told_with_its_day(name, words):
    """Days are counted to the date that the upstream gives."""
    config = {"rules": [{"name": "r", "split": [{"weight": 1, "use": "a/one"}, {"weight": 1, "use": ["b/two", name]}]}]}
    [one] = await found(config)
    assert one == (("rules", 0, "split", 1, "use", 1), words, "warning")


async def test_changed_prices_and_contexts_are_told():
    """What the list said at the start and what it says now are compared, where both know."""
    made, catalogue = await listed(item("anthropic/claude-haiku-4.5", prompt="0.000002", context=123))
    config = Config.model_validate({"aliases": {"x": "anthropic/claude-haiku-4.5"}})
    told = texts(concerns(config, made, catalogue, TODAY))
    head = "anthropic/claude-haiku-4.5: "
    assert f"{head}input $1 per million became $2 per million since the start's list (alias 'x')" in told
    assert f"{head}context 200000 became 123 since the start's list (alias 'x')" in told


async def test_an_override_that_differs_is_told():
    """`catalogue.overrides` beside what the upstream says of the same model; what it does not say is no difference."""
    overrides = {"a/one": {"input": 1, "context_length": 200_000}, "own/model": {"input": 7}}
    _, catalogue = await listed(*LISTED, overrides=overrides)
    [one] = catalogue.override_concerns()
    assert one.path == ("a/one",)
    assert one.message == "a/one: openrouter says otherwise: input $1 per million became $3 per million"


# --- fallbacks and tasks ----------------------------------------------------------------------------------------------


async def test_a_fallback_without_candidates_is_told():
    """One target and `fallback_on`, or several that are all gone."""
    config = {
        "rules": [{"name": "alone", "match": "x", "use": "a/one", "fallback_on": ["timeout"]}],
        "tasks": {
            "gone": {"use": ["a/none", "b/none"]},
            "fine": {"use": ["a/one", "b/two"], "fallback_on": ["timeout"]},
        },
    }
    told = await found(config)
    [alone] = [c for c in told if c.path == ("rules", 0, "fallback_on")]
    assert alone.severity == "warning"
    [gone] = [c for c in told if c.path == ("tasks", "gone")]
    assert (gone.severity, gone.message) == (
        "error",
        "task 'gone': none of its models is known, so that no fallback is left",
    )
    assert not any("fine" in text for text in texts(told))


@pytest.mark.parametrize(
    "rules, severity",
    [
        ([], "error"),
        ([{"name": "r", "when": {"tasks": "other"}, "use": "a/one"}], "error"),
        ([{"name": "r", "use": {"set": {"seed": 1}}}], "error"),
        ([{"name": "r", "when": {"tasks": "t", "teams": "blue"}, "use": "a/one"}], "warning"),
        ([{"name": "r", "when": {"tasks": "t"}, "use": "a/one"}], None),
        ([{"name": "r", "match": "task/*", "use": "a/one"}], None),
        ([{"name": "r", "use": "a/one"}], None),
    ],
)
async def test_a_task_without_rule_is_told(rules, severity):
    """A task that names no models needs a rule that takes it, whatever else a request is."""
    told = [c for c in await found({"tasks": {"t": {}}, "rules": rules}) if c.path == ("tasks", "t")]
    assert [c.severity for c in told] == ([severity] if severity else [])


# --- rules that never match -------------------------------------------------------------------------------------------


def rules(*whens):
    return {"rules": [{"name": f"r{n}", "when": when, "use": "a/one"} for n, when in enumerate(whens)]}


@pytest.mark.parametrize(
    "wide, narrow",
    [
        ({}, {"models": "x"}),
        ({"models": "*"}, {"teams": "blue"}),
        ({"models": "gpt-*"}, {"models": ["gpt-4*", "gpt-5"]}),
        ({"teams": ["a", "b"]}, {"teams": "a", "stream": True}),
        ({"input_tokens": {"min": 10}}, {"input_tokens": {"min": 20, "max": 30}}),
        ({"headers": {"x-a": True}}, {"headers": {"x-a": "1", "x-b": False}}),
        ({"claims": {"plan": ["free", "pro"]}}, {"claims": {"plan": "pro", "x": "y"}}),
        ({"time": [{"days": "mon"}, {"days": "tue"}]}, {"time": {"days": "tue"}}),
        ({"tools": True}, {"tools": True, "images": False}),
    ],
)
async def test_a_shadowed_rule_is_told(wide, narrow):
    """A rule behind one with the same or wider conditions is named with the one before it."""
    [one] = [c for c in await found(rules(wide, narrow)) if c.path == ("rules", 1)]
    assert one.message == "rule 'r1' can never match: rule 'r0' before it takes all"
    assert not [c for c in await found(rules({"teams": "else"}, narrow)) if c.path == ("rules", 1)]


async def test_shadowed_names_are_told():
    """An alias or task that a rule always takes is named; a rule that keeps what was asked for takes nothing."""
    names = {"aliases": {"smart": "a/one"}, "tasks": {"t": {"use": "a/one"}}}
    told = await found({**names, "rules": [{"name": "all", "match": "*", "use": "b/two"}]})
    assert [c.path for c in told] == [("aliases", "smart"), ("tasks", "t")]
    assert await found({**names, "rules": [{"name": "all", "use": {"set": {"seed": 1}}}]}) == []
    assert await found({**names, "rules": [{"name": "all", "match": "gpt-*", "use": "b/two"}]}) == []


SOME_GLOBS = ["a", "ab", "abc", "a*", "ab*", "*", "?b", "a?", "*c", "a[bc]", "b", "a*c", "[a]*", "a**"]


def test_a_glob_is_within_another_only_where_that_is_certain():
    """For each pair of globs and each text: what the narrower one matches, the wider one does."""
    words = ["".join(letters) for length in range(4) for letters in product("abc", repeat=length)]
    pairs = [pair for pair in product(SOME_GLOBS, repeat=2) if _glob_within(*pair)]
    assert {("ab*", "a*"), ("abc", "ab*"), ("?b", "*"), ("a", "a")} <= set(pairs)
    for narrow, wide in pairs:
        for word in words:
            assert fnmatchcase(word, wide) or not fnmatchcase(word, narrow), (narrow, wide, word)


GLOBS = st.lists(st.sampled_from(SOME_GLOBS), min_size=1, max_size=2)
FIELDS = {
    "models": GLOBS, "teams": GLOBS, "roles": GLOBS, "stream": st.booleans(), "tools": st.booleans(),
    "headers": st.dictionaries(st.sampled_from(["x-a", "x-b"]), GLOBS | st.booleans(), min_size=1),
    "claims": st.dictionaries(st.sampled_from(["p", "q"]), GLOBS, min_size=1),
    "input_tokens": st.sampled_from([{"min": 10}, {"max": 40}, {"min": 10, "max": 40}, {"min": 30, "max": 35}]),
    "time": st.sampled_from([{"days": "mon"}, [{"days": "mon"}, {"days": "thu"}], {"from": "10:00", "to": "12:00"}]),
}  # fmt: skip
# of one field mostly: two that are random in all would hardly ever cover one another
WHENS = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.tuples(*[st.fixed_dictionaries({name: FIELDS[name]})] * 2)
)
WORDS = st.sampled_from(["a", "b", "ab", "abc", "ac", "bc", ""])


@examples(max_examples=400)
@given(
    WHENS, WORDS, WORDS, st.sets(WORDS), st.booleans(), st.booleans(),
    st.dictionaries(st.sampled_from(["x-a", "x-b"]), WORDS), st.dictionaries(st.sampled_from(["p", "q"]), WORDS | st.lists(WORDS)),
    st.integers(0, 200), st.integers(0, 6 * 24),
)  # fmt: skip
def test_a_rule_is_called_shadowed_only_where_that_is_certain(
    whens, model, team, roles, stream, tools, headers, claims, length, hour
):
    """Whatever meets the narrower conditions meets the wider ones, for any request."""
    wide, narrow = map(When.model_validate, whens)
    if not _covers(wide, narrow):
        return
    body = {"model": model, "stream": stream, "messages": "x" * length, **({"tools": [1]} if tools else {})}
    asked = exchange(body, headers=headers, principal=Principal("k", team=team, roles=frozenset(roles), claims=claims))
    asked.started_at = (datetime(2026, 11, 23, tzinfo=UTC) + timedelta(hours=hour)).timestamp()
    if all(condition.test(asked) for condition in conditions(narrow)):
        assert all(condition.test(asked) for condition in conditions(wide))


# --- readiness --------------------------------------------------------------------------------------------------------


async def test_warnings_are_worked_out_once_for_each_catalogue(monkeypatch):
    """A probe costs nothing: only another list, or another day, is looked at anew."""
    from gateway_plugins import routing

    made, catalogue = await listed(*LISTED)
    plugin = routing.Plugin(
        Config.model_validate({"aliases": {"x": "a/none"}}), SimpleNamespace(settings=made, catalogue=catalogue)
    )
    calls = []
    real = routing.concerns
    monkeypatch.setattr(routing, "concerns", lambda *args: calls.append(1) or real(*args))
    for _ in range(5):
        assert plugin.warnings() == ("a/none: openrouter lists no such model (alias 'x')",)
    assert len(calls) == 1
    await catalogue.refresh("openrouter", store=False)
    assert len(plugin.warnings()) == 1
    assert len(calls) == 2


# --- metrics ----------------------------------------------------------------------------------------------------------


async def test_metrics_tell_when_models_will_be_gone(monkeypatch):
    """Of the models that the configuration names, each with such a day, as Unix time; looked up when the list is new."""
    from gateway_plugins import routing

    made, catalogue = await listed(*LISTED, item("a/odd", expiration_date="soon"))
    metrics = Metrics()
    config = Config.model_validate(
        {
            "aliases": {"x": ["a/one", "a/old", "a/odd", "a/none"]},
            "rules": [{"name": "r", "match": "y", "use": "a/past"}],
        }
    )
    plugin = routing.Plugin(config, SimpleNamespace(settings=made, catalogue=catalogue, metrics=metrics))
    calls = []
    real = routing.expiries
    monkeypatch.setattr(routing, "expiries", lambda *args: calls.append(1) or real(*args))

    async def told():
        return {series.labels[0]: series.value for family in await metrics.read() for series in family.series}

    def day(number, month=12):
        return datetime(2026, month, number, tzinfo=UTC).timestamp()

    async with plugin.lifespan():
        for _ in range(3):
            assert await told() == {"a/old": day(1), "a/past": day(20, 11)}
        assert len(calls) == 1
        LISTED[0]["expiration_date"] = "2026-12-24"
        try:
            await catalogue.refresh("openrouter", store=False)
        finally:
            del LISTED[0]["expiration_date"]
        assert await told() == {"a/old": day(1), "a/past": day(20, 11), "a/one": day(24)}
        assert len(calls) == 2
    assert await told() == {}


async def test_of_two_upstreams_the_first_day_counts():
    """A model that is gone at one of its upstreams is told, whatever the other says."""
    days = {"a": "2026-12-09", "b": "2026-12-02", "c": None}
    catalogue = SimpleNamespace(model=lambda up, _: SimpleNamespace(expiration_date=days[up]) if up in days else None)
    found = expiries({"a/v/m", "b/v/m", "c/v/m", "d/v/m"}, catalogue)
    assert found == {("v/m",): datetime(2026, 12, 2, tzinfo=UTC).timestamp()}
