import jsonschema
import pytest
from plugin_objects import exchange, services, settings
from pydantic import ValidationError

from gateway import BadRequest, Principal, Scopes, Target
from gateway.settings import load_text
from gateway_plugins import routing

TWO = settings(
    upstreams={
        "openrouter": {"api_key": "sk-or-canary"},
        "local": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "api_key": "none"},
    },
    catalogue={"overrides": {"llama": {"upstream": "local"}}},
)


def plugin(settings=TWO, **config):
    return routing.Plugin(routing.Config.model_validate(config), services(settings=settings))


def ask(model, task=None, principal=None, **body):
    headers = {"x-xenios-task": task} if task is not None else None
    return exchange({"model": model, **body}, headers=headers, principal=principal)


async def models(plugin, model, task=None, **body):
    decision = await plugin.choose_targets(ask(model, task, **body))
    return decision and [target.model for target in decision.targets]


async def test_an_alias_is_its_models_in_order():
    """A client that asks for an alias gets its models in fallback order; the decision keeps what was asked."""
    routes = plugin(
        aliases={"smart": ["a/one", {"model": "b/two", "set": {"x": 1}, "strip": ["top_k"]}], "fast": "c/three"}
    )
    decision = await routes.choose_targets(ask("smart"))
    assert decision.targets == (Target("a/one", "openrouter"), Target("b/two", "openrouter", {"x": 1}, ("top_k",)))
    assert (decision.asked, decision.alias, decision.task, decision.rule) == ("smart", "smart", None, None)
    assert await models(routes, "fast") == ["c/three"]


async def test_what_nothing_matches_is_left_to_the_core():
    """Any model of the upstream can be asked for by its own name: routing has no opinion about it."""
    routes = plugin(aliases={"smart": "a/one"}, rules=[{"name": "r", "match": "gpt-*", "use": "b/two"}])
    for model in ("openai/gpt-5", "Smart", "smart ", "agpt-4", "gpt", "a/one"):
        assert await models(routes, model) is None
    assert await models(plugin(), "openai/gpt-5") is None


async def test_a_model_may_keep_its_name_and_get_fallbacks():
    """An alias with a model's own name gives that model fallbacks."""
    assert await models(plugin(aliases={"openai/gpt-4o": ["openai/gpt-4o", "openai/gpt-4.1"]}), "openai/gpt-4o") == [
        "openai/gpt-4o",
        "openai/gpt-4.1",
    ]


async def test_the_first_rule_that_matches_decides():
    """Rules are globs, tried in the order of the list, whatever is exact and whatever is not."""
    routes = plugin(
        rules=[
            {"name": "four", "match": ["gpt-4*", "o[13]*"], "use": "a/one"},
            {"name": "exact", "match": "gpt-4o", "use": "b/two"},
            {"name": "dots", "match": "claude-?.5", "use": "c/three"},
            {"name": "any", "match": "gpt-*", "use": "d/four"},
        ]
    )
    found = {
        m: (await models(routes, m) or [None])[0] for m in ("gpt-4o", "o3-mini", "claude-3.5", "claude-3x5", "gpt-5")
    }
    assert found == {
        "gpt-4o": "a/one", "o3-mini": "a/one", "claude-3.5": "c/three", "claude-3x5": None, "gpt-5": "d/four",
    }  # fmt: skip
    decision = await routes.choose_targets(ask("gpt-4o"))
    assert (decision.asked, decision.alias, decision.rule) == ("gpt-4o", "gpt-4o", "four")


async def test_endless_names_fill_no_memory():
    """What rules said of a name is remembered for a bounded number of names, and stays right."""
    routes = plugin(rules=[{"name": "r", "match": "gpt-*", "use": "a/one"}])
    for number in range(3000):
        assert await models(routes, f"gpt-{number}") == ["a/one"]
        assert await models(routes, f"other-{number}") is None
    assert await models(routes, "gpt-" + "x" * 5000) == ["a/one"]
    assert len(routes._table._kept) <= 1000
    assert await models(routes, "gpt-1") == await models(routes, "gpt-1") == ["a/one"]


async def test_a_rule_may_keep_the_asked_name():
    """`use: {upstream: local}` sends matching models to another upstream by the names that were asked for."""
    routes = plugin(rules=[{"name": "local", "match": "qwen*", "use": [{"upstream": "local"}, "a/one"]}])
    decision = await routes.choose_targets(ask("qwen3"))
    assert decision.targets == (Target("qwen3", "local"), Target("a/one", "openrouter"))
    assert (await routes.choose_targets(ask("qwen2"))).targets[0] == Target("qwen2", "local")


async def test_rules_come_before_aliases_and_tasks():
    """A rule makes exceptions from what a name stands for otherwise."""
    rules = [{"name": "long", "when": {"input_tokens": {"min": 1000}}, "use": "b/two"}]
    routes = plugin(aliases={"smart": "a/one"}, tasks=TASKS, rules=rules)
    long = {"messages": [{"role": "user", "content": "x" * 9000}]}
    assert await models(routes, "smart") == ["a/one"]
    assert await models(routes, "smart", **long) == ["b/two"]
    assert await models(routes, "task/label", **long) == ["b/two"]
    assert await models(routes, "any/other", **long) == ["b/two"]


async def test_the_catalogue_says_where_a_model_is_served():
    """A model that the catalogue's overrides place at an upstream is asked for there."""
    routes = plugin(aliases={"private": "llama", "away": {"model": "llama", "upstream": "openrouter"}})
    assert (await routes.choose_targets(ask("private"))).targets == (Target("llama", "local"),)
    assert (await routes.choose_targets(ask("away"))).targets == (Target("llama", "openrouter"),)


TASKS = {
    "chat": {"use": ["a/one", "b/two"], "defaults": {"temperature": 0.3, "top_p": 0.9}},
    "label": {"use": "c/three"},
}


async def test_a_task_is_named_by_header_or_model():
    """`X-Xenios-Task: chat` and model="task/chat" are the same; the header wins over any model."""
    routes = plugin(tasks=TASKS, aliases={"smart": "d/four"})
    assert await models(routes, "task/chat") == ["a/one", "b/two"]
    assert await models(routes, "whatever", "chat") == ["a/one", "b/two"]
    assert await models(routes, "smart", "label") == ["c/three"]
    assert await models(routes, "task/label", "chat") == ["a/one", "b/two"]
    assert await models(routes, "smart", "") == ["d/four"]
    decision = await routes.choose_targets(ask("smart", "chat"))
    assert (decision.asked, decision.task, decision.alias) == ("smart", "chat", None)


async def test_a_tasks_defaults_fill_what_the_client_left_out():
    """A task's defaults are set only where the client sent nothing, and below what a target sets."""
    routes = plugin(tasks=TASKS)
    unsaid = await routes.choose_targets(ask("task/chat"))
    assert [t.overrides for t in unsaid.targets] == [{"temperature": 0.3, "top_p": 0.9}] * 2
    said = await routes.choose_targets(ask("task/chat", temperature=1, top_p=None))
    assert [t.overrides for t in said.targets] == [{}] * 2
    task = {"use": {"model": "a/one", "set": {"top_p": 1}}, "defaults": {"temperature": 0.3, "top_p": 0.9}}
    forced = await plugin(tasks={"t": task}).choose_targets(ask("task/t", temperature=1))
    assert forced.targets[0].overrides == {"top_p": 1}


@pytest.mark.parametrize("model, header, param", [("task/tchat", None, "model"), ("smart", "tchat", "X-Xenios-Task")])
async def test_an_unknown_task_is_told_with_those_there_are(model, header, param):
    """A misspelt task is a 400 that names the tasks, never a request to some default model."""
    with pytest.raises(BadRequest, match=r"no task 'tchat'\. Known: chat, label\.") as caught:
        await models(plugin(tasks=TASKS), model, header)
    assert (caught.value.param, caught.value.error_code) == (param, "unknown_task")


async def test_an_unknown_task_tells_a_scoped_key_only_its_own():
    """A key that may use one task does not learn of the others by a typo."""
    scoped = Principal("bot", scopes=Scopes(tasks=("label",)))
    with pytest.raises(BadRequest, match=r"Known: label\."):
        await plugin(tasks=TASKS).choose_targets(ask("task/x", principal=scoped))
    with pytest.raises(BadRequest, match="None is known"):
        await plugin().choose_targets(ask("task/x" + "y" * 9999))


async def test_a_list_of_models_counts_by_its_first():
    """OpenRouter's `models` without `model`: the first decides the route, as it does upstream."""
    routes = plugin(aliases={"smart": "a/one"})
    decision = await routes.choose_targets(exchange({"models": ["smart", "other"]}))
    assert decision.alias == "smart"


async def test_deciding_changes_nothing():
    """Dry runs ask for decisions too: the body is left alone."""
    asked = ask("task/chat")
    before = dict(asked.body)
    await plugin(tasks=TASKS).choose_targets(asked)
    assert asked.body == before


async def test_explain_says_what_would_be_asked():
    routes = plugin(tasks=TASKS, rules=[{"name": "r", "match": "gpt-*", "use": "llama"}])
    assert await routes.explain(ask("task/chat")) == [
        "rule r: no, the model is task/chat (gpt-*)", "task chat", "1. a/one at openrouter", "2. b/two at openrouter",
    ]  # fmt: skip
    assert await routes.explain(ask("gpt-9")) == ["rule r: matches", "rule r", "1. llama at local"]
    assert await routes.explain(ask("other")) == [
        "rule r: no, the model is other (gpt-*)", "nothing matches: the asked model, where the settings place it",
    ]  # fmt: skip
    assert (await routes.explain(ask("task/x")))[0].startswith("refuses: There is no task 'x'")


def test_names_are_listed():
    """GET /v1/models shows the names that clients may ask for."""
    assert plugin(tasks=TASKS, aliases={"smart": "a/one"}).listed_models == ("smart", "task/chat", "task/label")


@pytest.mark.parametrize(
    "config, words",
    [
        ({"aliases": {"a": []}}, "at least 1 item"),
        ({"aliases": {"a": ""}}, "at least 1 character"),
        ({"aliases": {"a": {"set": {"x": 1}}}}, "alias 'a': a target has no model"),
        ({"aliases": {"a": "b", "b": "c/d"}}, "alias 'a': 'b' is an alias itself"),
        ({"aliases": {"a": "task/x"}, "tasks": {"x": {"use": "m"}}}, "alias 'a': 'task/x' is a task"),
        ({"aliases": {"task/a": "m"}}, "'task/a' looks like a task"),
        ({"aliases": {"a b": "m"}}, "pattern"),
        ({"tasks": {"a": {"use": "b"}}, "aliases": {"b": "c/d"}}, "task 'a': 'b' is an alias itself"),
        ({"tasks": {"a/b": {"use": "m"}}}, "pattern"),
        ({"tasks": {"a": {"use": "m", "defaults": {"stream": True}}}}, "can't set stream"),
        ({"aliases": {"a": {"model": "m", "set": {"model": "n"}}}}, "can't set model"),
        ({"aliases": {"a": {"modle": "m"}}}, "modle"),
        ({"rules": [{"name": "r", "match": [], "use": "m"}]}, "at least 1 item"),
        ({"rules": [{"name": "r", "match": "*", "use": "m"}] * 2}, "two rules are called 'r'"),
    ],
)
def test_mistakes_are_named(config, words):
    """A route that can't work is a start-up error, not a request's failure."""
    with pytest.raises(ValidationError) as caught:
        routing.Config.model_validate(config)
    assert words in str(caught.value)


def test_an_upstream_that_is_not_there_ends_the_start():
    """A target at an upstream that the YAML doesn't have is refused at start-up, with the names there are."""
    with pytest.raises(ValueError, match=r"alias 'a': there is no upstream 'lokal' \(known: openrouter, local\)"):
        plugin(aliases={"a": {"model": "m", "upstream": "lokal"}})


def test_mistakes_stand_at_their_line():
    """`xenios check` points into the YAML, also where one model stands for a list."""
    text = "upstreams: {openrouter: {api_key: x}}\nplugins:\n- use: routing\n  config:\n    aliases:\n      smart: [a, 5]\n"
    source = load_text(text, env={}).source
    _, found = source.validate(routing.Config, ("plugins", 0, "config"))
    assert [(p.line, p.path) for p in found] == [(6, "plugins[0].config.aliases.smart[1]")]


@pytest.mark.parametrize(
    "config, fine",
    [
        ({"aliases": {"a": "m", "b": ["m", {"model": "n", "strip": ["x"]}], "c": {"model": "m"}}}, True),
        ({"rules": [{"name": "r", "match": "x*", "use": {"upstream": "local"}}]}, True),
        ({"tasks": {"t": {"use": ["m"], "defaults": {"x": 1}}}}, True),
        ({"aliases": {"a": {"modle": "m"}}}, False),
        ({"aliases": {"a": 5}}, False),
        ({"rules": [{"name": "r", "match": 5, "use": "m"}]}, False),
    ],
)
def test_the_schema_for_editors_knows_the_short_forms(config, fine):
    """An editor accepts what the gateway accepts: a model alone, a list, a target."""
    errors = list(jsonschema.Draft202012Validator(routing.Config.model_json_schema()).iter_errors(config))
    assert (not errors) is fine
