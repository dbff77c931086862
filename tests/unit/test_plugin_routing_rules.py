"""Routing's rule language: splits, limits, provider preferences, presets, tasks, and that explain tells the truth."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_objects import exchange, kept, services, settings
from pydantic import ValidationError

from gateway import BadRequest, Cause, Forbidden, GatewayError, Limits, Principal, Target
from gateway.catalogue import Catalogue
from gateway.settings import load_text
from gateway_plugins import routing
from gateway_plugins.routing import native

SETTINGS = settings(
    upstreams={
        "openrouter": {"api_key": "sk-or-canary"},
        "local": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "api_key": "none"},
    },
    catalogue={
        "overrides": {
            "cheap/one": {"input": 1, "output": 2, "context_length": 100_000, "max_output": 4000},
            "dear/two": {"input": 10, "output": 50, "context_length": 100_000, "max_output": 4000},
        }
    },
)


async def never(_):
    raise OSError


def plugin(**config):
    kinds = {name: upstream.kind for name, upstream in SETTINGS.upstreams.items()}
    catalogue = Catalogue(kinds, SETTINGS.catalogue, None, never)
    catalogue.load()
    given_ = replace(services(settings=SETTINGS), catalogue=catalogue)
    return routing.Plugin(routing.Config.model_validate(config), given_)


def ask(model="m", task=None, principal=None, endpoint="chat/completions", headers=None, **body):
    headers = {**(headers or {}), **({"x-xenios-task": task} if task else {})}
    return exchange({"model": model, **body}, headers=headers, principal=principal, endpoint=endpoint)


async def models(plugin, *args, **kwargs):
    decision = await plugin.choose_targets(ask(*args, **kwargs))
    return decision and [target.model for target in decision.targets]


# --- which rule -------------------------------------------------------------------------------------------------------


async def test_each_condition_counts_however_often_a_name_is_asked_for():
    """What is remembered of a name never answers for another caller, time, size, header or endpoint."""
    routes = plugin(
        rules=[
            {"name": "team", "match": "m", "when": {"teams": "blue"}, "use": "team/x"},
            {"name": "head", "match": "m", "when": {"headers": {"x-tier": "gold"}}, "use": "head/x"},
            {"name": "long", "match": "m", "when": {"input_tokens": {"min": 500}}, "use": "long/x"},
            {"name": "stream", "match": "m", "when": {"stream": True}, "use": "stream/x"},
            {"name": "embed", "match": "m", "when": {"endpoint": "embeddings"}, "use": "embed/x"},
            {"name": "rest", "match": "m", "use": "rest/x"},
        ]
    )
    blue, red = Principal("a", team="blue"), Principal("a", team="red")
    for _ in range(2):
        assert await models(routes, "m", principal=blue) == ["team/x"]
        assert await models(routes, "m", principal=red) == ["rest/x"]
        assert await models(routes, "m", headers={"x-tier": "gold"}) == ["head/x"]
        assert await models(routes, "m", messages="x" * 2100) == ["long/x"]
        assert await models(routes, "m", stream=True) == ["stream/x"]
        assert await models(routes, "m", endpoint="embeddings") == ["embed/x"]
        assert await models(routes, "m") == ["rest/x"]
        assert await models(routes, "other") is None


@pytest.mark.parametrize("listed", [{"models": ["a/one", "dear/two"]}, {"fallbacks": [{"model": "dear/two"}]}])
async def test_a_refused_model_is_refused_further_on_too(listed):
    """A rule that refuses a model can't be passed by naming it as the next one."""
    routes = plugin(rules=[{"name": "no", "match": "dear/*", "refuse": "Ask finance first."}])
    with pytest.raises(Forbidden) as caught:
        await models(routes, "gone/x", **listed)
    assert caught.value.error_code == "refused_by_rule"


async def test_a_rule_may_refuse():
    """Where a rule says so its message is the answer, and no model is asked."""
    routes = plugin(rules=[{"name": "no", "match": "dear/*", "refuse": "Ask finance first."}])
    with pytest.raises(Forbidden, match=r"Ask finance first\.") as caught:
        await models(routes, "dear/two")
    assert (caught.value.status_code, caught.value.error_code) == (403, "refused_by_rule")
    assert (await routes.explain(ask("dear/two"))) == ["rule no: matches", "refuses: Ask finance first."]


async def test_a_rule_may_offload():
    """A rule makes jobs of its requests: of the models that it names, or whatever would have answered without it."""
    routes = plugin(
        rules=[
            {"name": "long", "when": {"input_tokens": {"min": 500}}, "use": "long/x", "offload": True},
            {"name": "nightly", "when": {"tasks": "report"}, "offload": True},
        ],
        tasks={"report": {"use": ["a/one", "b/two"]}},
    )
    for request, found in (
        (ask("m", messages="x" * 2100), ("long", ["long/x"])),
        (ask(task="report"), ("nightly", ["a/one", "b/two"])),
    ):
        decision = await routes.choose_targets(request)
        assert (decision.rule, [target.model for target in decision.targets]) == found
        assert decision.offload
        assert "it becomes a job" in await routes.explain(request)
    decision = await plugin(rules=[{"name": "all", "use": "a/one"}]).choose_targets(ask("m"))
    assert not decision.offload


async def test_a_rule_changes_how_what_was_asked_for_is_asked():
    """A target without a model keeps the models of the alias or task, in order, and adds to each."""
    routes = plugin(
        aliases={"smart": ["a/one", {"model": "b/two", "set": {"seed": 1, "top_k": 2}, "provider": {"zdr": True}}]},
        rules=[
            {
                "name": "eu",
                "when": {"teams": "eu"},
                "use": {"set": {"seed": 9}, "strip": ["x"], "provider": {"only": ["eu"]}},
            }
        ],
    )
    eu = Principal("a", team="eu")
    decision = await routes.choose_targets(ask("smart", principal=eu))
    assert decision.targets == (
        Target("a/one", "openrouter", {"seed": 9, "provider": {"only": ["eu"]}}, ("x",)),
        Target("b/two", "openrouter", {"seed": 9, "top_k": 2, "provider": {"zdr": True, "only": ["eu"]}}, ("x",)),
    )
    assert (decision.rule, decision.alias) == ("eu", "smart")
    raw = await routes.choose_targets(ask("c/three", principal=eu))
    assert raw.targets[0].model == "c/three"
    assert raw.alias is None  # the model must be granted itself


# --- splits -----------------------------------------------------------------------------------------------------------

SPLIT = [{"weight": 90, "use": "a/one"}, {"weight": 10, "use": ["b/two", "c/three"]}]


def split(**more):
    return plugin(rules=[{"name": "canary", "match": "m", "split": SPLIT, **more}])


@pytest.mark.parametrize("drawn, side", [(0.0, "a/one"), (0.899, "a/one"), (0.9, "b/two"), (0.999, "b/two")])
async def test_a_split_is_by_weight(drawn, side):
    """Where a draw falls, in proportion to the weights, decides the side; its fallbacks are its own."""
    routes = split()
    routes.draw = lambda _: drawn
    assert (await models(routes))[0] == side
    assert (await models(routes)) == (["a/one"] if side == "a/one" else ["b/two", "c/three"])


async def test_other_sides_follow_if_told():
    """With `others_follow` the other side is a fallback of the chosen one."""
    routes = split(others_follow=True)
    routes.draw = lambda _: 0.95
    assert await models(routes) == ["b/two", "c/three", "a/one"]
    routes.draw = lambda _: 0.1
    assert await models(routes) == ["a/one", "b/two", "c/three"]


async def test_shares_come_out_as_the_weights_say():
    """Of many requests about a tenth goes to the side with a tenth of the weight; of one request all who ask hear one side."""
    routes = split()
    count = Counter()
    for _ in range(3000):
        one = ask()
        side = (await routes.choose_targets(one)).targets[0].model
        assert (await routes.choose_targets(one)).targets[0].model == side
        count[side] += 1
    assert 200 < count["b/two"] < 400


@pytest.mark.parametrize(
    "sticky, one, other",
    [
        ("user", {"user": "ann"}, {"user": "bob"}),
        ("user", {"metadata": {"user_id": "ann"}}, {"metadata": {"user_id": "bob"}}),
        ("session", {"session_id": "s1"}, {"session_id": "s2"}),
        ("session", {"headers": {"x-session-id": "s1"}}, {"headers": {"x-session-id": "s2"}}),
        ("key", {"principal": Principal("k1")}, {"principal": Principal("k2")}),
    ],
)
async def test_who_is_sticky_stays_on_every_worker(sticky, one, other):
    """The same user, session or key gets the same side, whatever is drawn and whichever worker is asked."""
    rules = [
        {
            "name": "half",
            "match": "m",
            "sticky": sticky,
            "split": [{"weight": 1, "use": "a"}, {"weight": 1, "use": "b"}],
        }
    ]
    workers = [plugin(rules=rules), plugin(rules=rules)]
    seen = []
    for who in (one, other):
        found = set()
        for number in range(20):
            worker = workers[number % 2]
            worker.draw = lambda _, n=number: n % 2 / 2
            found.add((await models(worker, **who))[0])
        assert len(found) == 1
        seen += found
    nobody = {(await models(workers[0]))[0] for workers[0].draw in (lambda _: 0, lambda _: 0.9)}
    assert nobody == {"a", "b"}


async def test_users_of_different_tenants_are_different_users():
    """Two tenants' user "1" are not bound together, and sides come out even over many users."""
    routes = plugin(
        rules=[
            {
                "name": "half",
                "match": "m",
                "sticky": "user",
                "split": [{"weight": 1, "use": "a"}, {"weight": 1, "use": "b"}],
            }
        ]
    )
    sides = [
        (await models(routes, user="1", principal=Principal("k", tenant=f"t{number}")))[0] for number in range(400)
    ]
    assert 140 < Counter(sides)["a"] < 260


@given(st.lists(st.integers(1, 100), min_size=2, max_size=5), st.floats(0, 1, exclude_max=True))
def test_every_draw_falls_on_a_side(weights, drawn):
    """Whatever the weights, a draw decides one side, and a larger weight of the first never sends anybody away from it."""
    from gateway_plugins.routing.table import Entry, Route

    sides = [(w, (Entry(Target(str(n), "openrouter")),)) for n, w in enumerate(weights)]
    one = Route("r", sides)
    side = one.side(ask(), lambda _: drawn)
    low = sum(weights[:side]) / sum(weights)
    assert low - 1e-9 <= drawn < low + weights[side] / sum(weights) + 1e-9
    more = Route("r", [(weights[0] * 2, sides[0][1]), *sides[1:]])
    if side == 0:
        assert more.side(ask(), lambda _: drawn) == 0


async def test_a_split_under_a_rule_that_keeps_models_is_still_a_split():
    """A rule that only adds to what would answer leaves a task's split as it is."""
    routes = plugin(
        tasks={"t": {"split": [{"weight": 1, "use": "a"}, {"weight": 1, "use": "b"}]}},
        rules=[{"name": "seed", "use": {"set": {"seed": 1}}}],
    )
    for drawn, side in ((0.1, "a"), (0.9, "b"), (0.1, "a")):
        routes.draw = lambda _, d=drawn: d
        decision = await routes.choose_targets(ask("task/t"))
        assert [(t.model, t.overrides) for t in decision.targets] == [(side, {"seed": 1})]


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_time_limits_are_the_nearest_ones():
    """A target's limit before its rule's, a rule's before its task's; what nobody says is left to the settings."""
    routes = plugin(
        tasks={"t": {"timeouts": {"first_event": 9, "stall": 8, "total": 7}, "timeout": "1m", "fallback_on": [], "use": "x"}},
        rules=[
            {
                "name": "r", "when": {"teams": "a"}, "timeouts": {"first_event": "5s", "stall": 4}, "timeout": "30s",
                "fallback_on": ["content_policy", "timeout"],
                "use": [{"model": "a/one", "timeouts": {"first_event": "250ms"}}, "b/two"],
            }
        ],
    )  # fmt: skip
    met = await routes.choose_targets(ask("task/t", principal=Principal("k", team="a")))
    assert [t.limits for t in met.targets] == [Limits(0.25, 4, 7), Limits(5, 4, 7)]
    assert (met.timeout, met.fallback_on) == (30, {Cause.CONTENT_POLICY, Cause.TIMEOUT})
    own = await routes.choose_targets(ask("task/t"))
    assert [t.limits for t in own.targets] == [Limits(9, 8, 7)]
    assert (own.timeout, own.fallback_on) == (60, frozenset())
    plain = await routes.choose_targets(ask("m", principal=Principal("k", team="a")))
    assert plain.targets[1].limits == Limits(5, 4, None)
    assert await routes.choose_targets(ask("m")) is None


async def test_a_rule_that_keeps_models_keeps_their_limits():
    """What a named rule says of time and fallback holds also where another rule only changes how it is asked."""
    routes = plugin(
        rules=[
            {"name": "seed", "when": {"teams": "a"}, "use": {"set": {"seed": 1}}},
            {
                "name": "best",
                "match": "best",
                "use": "x",
                "timeout": "20s",
                "timeouts": {"stall": 3},
                "fallback_on": ["tls"],
            },
        ],
        tasks={"t": {"rule": "best", "timeout": "1m"}},
    )
    decision = await routes.choose_targets(ask("task/t", principal=Principal("k", team="a")))
    assert (decision.rule, decision.timeout, decision.fallback_on) == ("seed", 20, {Cause.TLS})
    assert decision.targets == (Target("x", "openrouter", {"seed": 1}, limits=Limits(stall=3)),)


@pytest.mark.parametrize(
    "body, left",
    [
        ({"max_tokens": 100}, ["cheap/one", "dear/two"]),
        ({"max_tokens": 1000}, ["cheap/one"]),
        ({"max_tokens": 100, "n": 10}, ["cheap/one"]),
        ({}, ["cheap/one"]),
        ({"max_tokens": 4000, "n": 3}, None),
        ({"max_tokens": 100, "messages": "x" * 90_000}, None),
    ],
)
async def test_targets_that_may_cost_too_much_are_left_out(body, left):
    """Under `max_usd` a target stands back where its input and output limit may cost more; none left: 400, and says why."""
    routes = plugin(rules=[{"name": "r", "match": "m", "max_usd": 0.02, "use": ["cheap/one", "dear/two", "no/price"]}])
    if left is not None:
        assert await models(routes, **body) == left
        return
    with pytest.raises(BadRequest, match=r"cheap/one left out: up to \$0\.0\d+, allowed are \$0\.02") as caught:
        await models(routes, **body)
    assert caught.value.error_code == "cost_ceiling"


async def test_a_ceiling_is_the_nearest_one_and_counts_what_is_set():
    """A target's own `max_usd` wins, a task's holds for what a rule chooses, and limits that a target sets are counted."""
    routes = plugin(
        tasks={"t": {"max_usd": 0.001, "use": ["dear/two", "cheap/one"], "defaults": {"max_tokens": 100}}},
        rules=[
            {"name": "r", "match": "m", "max_usd": 0.001,
             "use": [{"model": "dear/two", "max_usd": 1}, {"model": "cheap/one", "set": {"max_tokens": 3000}}]},
            {"name": "other", "match": "task/t", "when": {"teams": "a"}, "use": ["cheap/one", "dear/two"]},
        ],
    )  # fmt: skip
    assert await models(routes, max_tokens=10) == ["dear/two"]
    assert await models(routes, "task/t") == ["cheap/one"]
    assert await models(routes, "task/t", principal=Principal("k", team="a")) == ["cheap/one"]


@pytest.mark.parametrize("name, kept", [("dear/two:free", True), ("cheap/one:floor", True), ("cheap/one:nitro", False)])
async def test_variants_cost_what_is_known_of_them(name, kept):
    """`:free` is free, `:floor` costs the list price, and what may cost more has no known price."""
    routes = plugin(rules=[{"name": "r", "match": "m", "use": [{"model": name, "max_usd": 0.01}, "z"]}])
    assert await models(routes, max_tokens=10) == ([name, "z"] if kept else ["z"])


# --- targets ----------------------------------------------------------------------------------------------------------


async def test_presets_and_variants_are_models():
    """OpenRouter's presets and variants stand where a model does."""
    names = ["@preset/house", "a/one@preset/house", "a/one:nitro", "~anthropic/claude-opus-latest"]
    routes = plugin(aliases={"x": names})
    assert await models(routes, "x") == names


PROVIDER = {
    "order": ["anthropic", "vertex/us-east5"], "only": ["a"], "ignore": ["b"], "allow_fallbacks": False,
    "require_parameters": True, "data_collection": "deny", "zdr": True, "enforce_distillable_text": True,
    "quantizations": ["fp8"], "sort": {"by": "price", "partition": "none"}, "max_price": {"prompt": 1, "completion": 2.5},
    "preferred_min_throughput": 50, "preferred_max_latency": {"p90": 2}, "options": {"a": {"x": 1}},
}  # fmt: skip


async def test_provider_preferences_are_sent_as_openrouter_writes_them():
    """All that OpenRouter knows can be said, and nothing is added."""
    routes = plugin(
        aliases={"x": {"model": "a", "provider": PROVIDER}, "y": {"model": "a", "provider": {"sort": "price"}}}
    )
    [target] = (await routes.choose_targets(ask("x"))).targets
    assert target.overrides == {"provider": PROVIDER}
    [target] = (await routes.choose_targets(ask("y"))).targets
    assert target.overrides == {"provider": {"sort": "price"}}


# --- tasks ------------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}


async def test_a_task_asks_for_its_form_of_answer():
    """A task's JSON schema is demanded in each endpoint's own way, unless the client asked for a form itself."""
    routes = plugin(tasks={"label.v1": {"use": "a", "response_format": {"schema": SCHEMA}, "defaults": {"seed": 1}}})

    async def sent(**kwargs):
        return (await routes.choose_targets(ask("task/label.v1", **kwargs))).targets[0].overrides

    form = {"type": "json_schema", "json_schema": {"name": "label_v1", "strict": True, "schema": SCHEMA}}
    assert await sent() == {"seed": 1, "response_format": form}
    assert await sent(response_format={"type": "text"}) == {"seed": 1}
    responses = await sent(endpoint="responses", text={"verbosity": "low"})
    assert responses["text"] == {
        "verbosity": "low", "format": {"type": "json_schema", "name": "label_v1", "strict": True, "schema": SCHEMA},
    }  # fmt: skip
    assert await sent(endpoint="responses", text={"format": {"type": "text"}}) == {"seed": 1}
    assert (await sent(endpoint="messages"))["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert await sent(endpoint="embeddings") == {"seed": 1}


async def test_a_task_may_name_a_rule():
    """Several tasks share a rule's models and limits; what a task says of parameters is its own."""
    routes = plugin(
        rules=[{"name": "best", "match": "best", "use": ["a", "b"], "timeout": "20s"}],
        tasks={"chat": {"rule": "best", "defaults": {"temperature": 0}}, "other": {"rule": "best"}},
    )
    decision = await routes.choose_targets(ask("task/chat"))
    assert (decision.task, decision.rule, decision.timeout) == ("chat", "best", 20)
    assert [(t.model, t.overrides) for t in decision.targets] == [("a", {"temperature": 0}), ("b", {"temperature": 0})]
    assert (await routes.choose_targets(ask("task/other"))).targets[0].overrides == {}


async def test_a_task_without_models_is_its_rules_business():
    """A task that only rules serve is refused, and never sent anywhere, where none takes it."""
    routes = plugin(
        tasks={"t": {}},
        rules=[
            {"name": "blue", "when": {"tasks": "t", "teams": "blue"}, "use": "a"},
            {"name": "keep", "when": {"teams": "red"}, "use": {"set": {"seed": 1}}},
        ],
    )
    assert await models(routes, "task/t", principal=Principal("k", team="blue")) == ["a"]
    for who in (None, Principal("k", team="red")):
        with pytest.raises(BadRequest) as caught:
            await models(routes, "task/t", principal=who)
        assert caught.value.error_code == "no_route"


# --- the client's own lists -------------------------------------------------------------------------------------------


async def test_what_the_client_lists_becomes_targets():
    """`models` and `fallbacks` of a request follow what was asked for first, each once, aliases as their models."""
    routes = plugin(aliases={"smart": ["a", "b"]})
    lists = {"models": ["b", "c", "smart"], "fallbacks": [{"model": "d", "max_tokens": 5, "stream": True}, "c"]}
    decision = await routes.choose_targets(ask("smart", **lists))
    assert [(t.model, t.overrides) for t in decision.targets] == [
        ("a", {}),
        ("b", {}),
        ("c", {}),
        ("d", {"max_tokens": 5}),
    ]
    assert all({"models", "fallbacks", "route"} <= set(t.strip) for t in decision.targets)
    raw = await routes.choose_targets(ask("x", models=["y"]))
    assert ([t.model for t in raw.targets], raw.alias, raw.asked) == (["x", "y"], None, "x")
    assert await routes.choose_targets(ask("x")) is None
    first = await routes.choose_targets(exchange({"models": ["x", "y"]}))
    assert [t.model for t in first.targets] == ["x", "y"]


async def test_a_rules_ceiling_holds_for_what_the_client_lists():
    """A client can't bring in a model that costs more than its rule allows."""
    routes = plugin(rules=[{"name": "r", "match": "m", "max_usd": 0.002, "use": "cheap/one"}])
    assert await models(routes, models=["dear/two"], max_tokens=100) == ["cheap/one"]


async def test_openrouter_may_own_the_fallback():
    """Targets in a row at one OpenRouter with equal parameters are one attempt; others stay their own."""
    routes = plugin(
        native_fallback="openrouter",
        aliases={
            "x": ["a", "b", {"model": "l", "upstream": "local"}, {"model": "l2", "upstream": "local"}, "c", "d",
                  {"model": "e", "set": {"seed": 1}}, {"model": "f", "set": {"seed": 1}}],
            "one": "a",
        },
    )  # fmt: skip
    decision = await routes.choose_targets(ask("x"))
    assert [(t.model, t.overrides) for t in decision.targets] == [
        ("a", {"models": ["b"]}), ("l", {}), ("l2", {}), ("c", {"models": ["d"]}), ("e", {"seed": 1, "models": ["f"]}),
    ]  # fmt: skip
    [target] = (await routes.choose_targets(ask("one", models=["b"], fallbacks=["c"]))).targets
    assert (target.model, target.overrides) == ("a", {"models": ["b", "c"]})
    assert "models" not in target.strip
    assert "fallbacks" in target.strip


@pytest.mark.parametrize(
    "config",
    [
        {"rules": [{"name": "r", "match": "m", "use": ["a", "b"], "fallback_on": []}]},
        {"rules": [{"name": "r", "match": "m", "use": ["a", "b"], "fallback_on": ["timeout"]}]},
        {"rules": [{"name": "r", "match": "task/t", "use": ["a", "b"]}], "tasks": {"t": {"fallback_on": []}}},
        {"rules": [{"name": "r", "use": {"set": {"seed": 1}}}], "tasks": {"t": {"use": ["a", "b"], "fallback_on": []}}},
    ],
)
async def test_openrouter_owns_no_fallback_whose_causes_are_said(config):
    """Where a rule or task says after which causes another model may answer, none is sent along that may answer anyway."""
    routes = plugin(native_fallback="openrouter", **config)
    for listed in ({}, {"models": ["c"]}):
        decision = await routes.choose_targets(ask("task/t" if "tasks" in config else "m", **listed))
        assert [t.model for t in decision.targets] == ["a", "b", *listed.get("models", ())]
        assert not any("models" in t.overrides for t in decision.targets)
        assert not listed or all("models" in t.strip for t in decision.targets)


async def test_a_list_of_models_becomes_one_attempt_in_one_step(monkeypatch):
    """However many models a client lists, each is looked at once: a long list holds nobody else up."""
    made = []
    monkeypatch.setattr(native, "replace", lambda *args, **kwargs: made.append(args) or replace(*args, **kwargs))
    targets = [Target(f"a/{n}", "openrouter") for n in range(100)]
    [target] = native.grouped(targets, lambda name: name == "openrouter")
    assert [target.model, *target.overrides["models"]] == [t.model for t in targets]
    assert len(made) == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, words",
    [
        ({"rules": [{"name": "r", "match": "*"}]}, "needs one of `use`, `split` and `refuse`"),
        ({"rules": [{"name": "r", "use": "a", "refuse": "no"}]}, "needs one of `use`, `split` and `refuse`"),
        ({"rules": [{"name": "r", "use": "a", "match": "x", "when": {"models": "y"}}]}, "`match` is short for"),
        ({"rules": [{"name": "r", "split": [{"weight": 1, "use": "a"}]}]}, "at least 2 items"),
        ({"rules": [{"name": "r", "split": [{"weight": 0, "use": "a"}, {"weight": 1, "use": "a"}]}]}, "greater than 0"),
        ({"rules": [{"name": "r", "use": "a", "sticky": "user"}]}, "`sticky` and `others_follow` are for a `split`"),
        (
            {"rules": [{"name": "r", "use": "a", "fallback_on": ["invalid_request"]}]},
            "nothing that another model could mend",
        ),
        (
            {"rules": [{"name": "r", "use": "a", "fallback_on": "circuit_open"}]},
            "nothing that another model could mend",
        ),
        ({"rules": [{"name": "r", "use": "a", "fallback_on": ["overload"]}]}, "fallback_on"),
        ({"rules": [{"name": "r", "use": {"strip": ["top_p", "messages"]}}]}, "can't strip messages"),
        ({"aliases": {"a": {"model": "a", "strip": ["stream"]}}}, "can't strip stream"),
        ({"aliases": {"a": {"model": "a", "strip": ["model"]}}}, "can't strip model"),
        (
            {"rules": [{"name": "r", "split": [{"weight": 1e308, "use": "a"}, {"weight": 1e308, "use": "b"}]}]},
            "less than or equal to 1000000",
        ),
        ({"rules": [{"name": "r", "use": "a", "max_usd": 0}]}, "greater than 0"),
        (
            {"rules": [{"name": "r", "use": {"model": "a", "set": {"provider": {}}}}]},
            "write it as a target's own `provider`",
        ),
        ({"rules": [{"name": "r", "use": {"model": "a", "provider": {"oder": []}}}]}, "oder"),
        ({"rules": [{"name": "r", "use": {"model": "a", "provider": {"sort": "cheap"}}}]}, "sort"),
        ({"rules": [{"name": "r", "when": {"mdels": "x"}, "use": "a"}]}, "mdels"),
        ({"tasks": {"t": {"rule": "r"}}}, "task 't': there is no rule 'r'"),
        ({"tasks": {"t": {"rule": "r", "use": "a"}}}, "has `rule` beside `use` or `split`"),
        ({"tasks": {"t": {"rule": "r"}}, "rules": [{"name": "r", "refuse": "no"}]}, "names no models, it refuses"),
        (
            {"tasks": {"t": {"rule": "r"}}, "rules": [{"name": "r", "use": {"upstream": "openrouter"}}]},
            "a target without a model",
        ),
        (
            {"tasks": {"t": {"split": [{"weight": 1, "use": "a"}, {"weight": 1, "use": {"set": {}}}]}}},
            "a target has no model",
        ),
        ({"native_fallback": "both"}, "native_fallback"),
        ({"rules": [{"name": "r", "refuse": "No.", "offload": True}]}, "has `offload` beside `refuse`"),
    ],
)
def test_mistakes_are_named(config, words):
    """What can't work is a mistake at start-up, in words that say what to write instead."""
    with pytest.raises(ValidationError) as caught:
        routing.Config.model_validate(config)
    assert words in str(caught.value)


BAD = """\
upstreams: {openrouter: {api_key: x}, local: {kind: openai, base_url: http://127.0.0.1:1/v1, without_key: allow}}
plugins:
  - use: routing
    config:
      rules:
        - {name: a, match: x, when: {models: y}, use: m}
        - {name: b, when: {tme: {days: mon}}, use: m}
        - name: c
          split:
            - {weight: 90, use: m}
            - {weight: -1, use: {model: m, provider: {zdr: perhaps}}}
        - {name: d, use: {model: m, upstream: lokal}, timeout: soon}
      tasks:
        t: {use: m, response_format: {strict: true}}
"""


def test_mistakes_stand_at_their_line():
    """All mistakes of all rules are told at once, each with its place in the file."""
    source = load_text(BAD, env={}).source
    _, found = source.validate(routing.Config, ("plugins", 0, "config"))
    rule = "plugins[0].config.rules"
    assert [(p.line, p.path) for p in found] == [
        (6, f"{rule}[0]"), (7, f"{rule}[1].when.tme"), (11, f"{rule}[2].split[1].weight"),
        (11, f"{rule}[2].split[1].use.provider.zdr"), (12, f"{rule}[3].use.upstream"), (12, f"{rule}[3].timeout"),
        (14, "plugins[0].config.tasks.t.response_format.schema"),
    ]  # fmt: skip


def test_a_mistake_in_a_target_that_stands_alone_is_told_with_the_keys_there_are():
    """One target in place of a list is read like an entry of the list."""
    text = "upstreams: {openrouter: {api_key: x}}\nplugins:\n- use: routing\n  config: {rules: [{name: r, use: {strp: [x]}}, {name: s, use: {a: b}}]}\n"
    _, [near, far] = load_text(text, env={}).source.validate(routing.Config, ("plugins", 0, "config"))
    assert near.hint == "did you mean 'strip'?"
    assert far.hint == "known: model, upstream, set, strip, provider, timeouts, max_usd"


def test_provider_preferences_need_an_openrouter():
    """A server of one's own has no providers to prefer: said at start-up."""
    with pytest.raises(ValueError, match=r"alias 'a': only an upstream of kind openrouter has provider preferences"):
        plugin(aliases={"a": {"model": "m", "upstream": "local", "provider": {"zdr": True}}})


# --- explain ----------------------------------------------------------------------------------------------------------

WHENS = st.sampled_from(
    [
        {}, {"teams": "blue"}, {"stream": True}, {"tasks": "*"}, {"tasks": "chat"}, {"models": ["gpt-*", "smart"]},
        {"headers": {"x-tier": "gold"}}, {"input_tokens": {"min": 100}}, {"tools": True}, {"images": True},
        {"endpoint": "responses"}, {"claims": {"plan": "pro"}}, {"roles": "bot", "stream": False},
        {"time": {"from": "08:00", "to": "20:00"}},
    ]
)  # fmt: skip
USES = st.sampled_from(
    [
        {"use": "a/one"}, {"use": ["b/two", "c/three"]}, {"use": {"set": {"seed": 1}}}, {"refuse": "no"},
        {"split": SPLIT}, {"split": SPLIT, "sticky": "user", "others_follow": True},
        {"use": ["cheap/one", "dear/two"], "max_usd": 0.02},
    ]
)  # fmt: skip
REQUESTS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["smart", "gpt-4", "x/y", "task/chat", "task/label", "task/none"]),
        "principal": st.sampled_from(
            [None, Principal("k", team="blue"), Principal("k", roles=frozenset({"bot"}), claims={"plan": "pro"})]
        ),
        "endpoint": st.sampled_from(["chat/completions", "responses"]),
        "headers": st.sampled_from([{}, {"x-tier": "gold"}]),
    },
    optional={
        "stream": st.booleans(),
        "tools": st.just([{"type": "function"}]),
        "messages": st.sampled_from(["x" * 1000, [{"content": [{"type": "image_url"}]}]]),
        "user": st.sampled_from(["ann", "bob"]),
        "max_tokens": st.sampled_from([1, 100_000]),
        "models": st.just(["z/z"]),
    },
)


@given(st.lists(st.tuples(WHENS, USES), max_size=6), st.lists(REQUESTS, min_size=1, max_size=4), st.integers(0, 86_400))
async def test_what_is_explained_is_what_happens(rules, requests, clock):
    """For any rules and requests: the rule that explain says matches, the targets and the refusal are those of the decision."""
    named = [{"name": f"r{n}", "when": when, **use} for n, (when, use) in enumerate(rules)]
    routes = plugin(
        rules=named,
        aliases={"smart": ["a/one", "b/two"]},
        tasks={"chat": {"use": ["a/one"], "defaults": {"temperature": 1}}, "label": {}},
    )
    for fields in requests * 2:
        asked = ask(**fields)
        asked.started_at = float(clock)
        lines = await routes.explain(asked)
        first = next((n for n, line in enumerate(lines) if line.endswith(": matches")), None)
        matched = None if first is None else lines[first].removeprefix("rule ").removesuffix(": matches")
        assert all(": no, " in line for line in lines[: first or 0])
        try:
            decision, refusal = await routes.choose_targets(asked), None
        except GatewayError as error:
            decision, refusal = None, error.message
        if refusal is not None:
            assert lines[-1] == f"refuses: {refusal}"
        elif decision is None:
            assert matched is None
            assert lines[-1].startswith("nothing matches")
        else:
            told = [line.split()[1] for line in lines if line.split(".")[0].isdigit()]
            assert told == [target.model for target in decision.targets]
            assert decision.rule == matched


async def test_a_hundred_rules_are_asked_once():
    """Rules are compiled, not interpreted: a request like one before it asks none of them again."""
    routes = plugin(rules=[{"name": f"r{n}", "when": {"teams": f"t{n}"}, "use": "a"} for n in range(100)])
    counted = Counter()

    def counting(condition):
        def test(exchange):
            counted["asked"] += 1
            return condition.test(exchange)

        return condition._replace(test=test)

    routes._table.rules = [
        rule._replace(conditions=tuple(map(counting, rule.conditions))) for rule in routes._table.rules
    ]
    for _ in range(50):
        assert await models(routes, "m", principal=Principal("k", team="t99")) == ["a"]
    assert counted["asked"] == 100


async def test_long_headers_that_rules_read_are_not_kept():
    """However long the headers that clients send, and however many: a rule that reads them costs no memory."""
    routes = plugin(rules=[{"name": "app", "when": {"headers": {"x-client": "app-*"}}, "use": "app/x"}])
    assert await models(routes, "m", headers={"x-client": "app-" + "x" * 30_000}) == ["app/x"]
    with kept() as held:
        for n in range(200):
            assert await models(routes, "m", headers={"x-client": f"{n:30000}"}) is None
    assert held[0] < 500_000
