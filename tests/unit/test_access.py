import pytest
from plugin_objects import exchange

from gateway.access import check_bearer, check_models, check_route, may_see
from gateway.errors import Forbidden, ModelNotFound, Unauthenticated
from gateway.exchange import Credentials, Decision, Principal, Scopes, Target
from gateway.routes import Route

OPUS, SONNET, GPT = "anthropic/opus", "anthropic/sonnet", "openai/gpt"


def asking(access="principal", *, proxied=True, principal=None, token=None, **body):
    made = exchange({"model": GPT, **body}, principal=principal)

    async def handler(_):
        raise AssertionError

    old = made.route
    made.route = Route("POST", old.path, old.endpoint, old.dialect, None if proxied else handler, access, bearer=token)
    return made


def who(admin=False, **scopes):
    return Principal("p", admin=admin, scopes=Scopes(**{k: tuple(v) for k, v in scopes.items()}))


def decided(asked=GPT, *models, task=None, alias=None):
    return Decision(asked, tuple(Target(m, "openrouter") for m in models or (asked,)), task=task, alias=alias)


@pytest.mark.parametrize(
    "access, principal, words",
    [
        ("public", None, None),
        ("public", who(endpoints=["embeddings"]), None),
        ("bearer", None, None),
        ("principal", None, "may not do that"),
        ("principal", who(), None),
        ("principal", who(endpoints=["embeddings"]), "may not use chat/completions"),
        ("principal", who(endpoints=["embeddings", "chat/*"]), None),
        ("principal", who(endpoints=[]), "may not use chat/completions"),
        ("admin", None, "may not do that"),
        ("admin", who(), "^This needs an admin key.$"),
        ("admin", who(admin=True), None),
        ("admin", who(admin=True, endpoints=["embeddings"]), "may not use"),
    ],
)
def test_a_route_is_for_whom_its_rule_names(access, principal, words):
    """Nobody gets past a route's access rule, nor past the endpoints of the key."""
    asked = asking(access, principal=principal)
    if words is None:
        check_route(asked)
        return
    with pytest.raises(Forbidden, match=words) as caught:
        check_route(asked)
    assert caught.value.status_code == 403


def test_scopes_of_endpoints_are_for_what_is_proxied():
    """A key for embeddings alone can still list models."""
    check_route(asking(proxied=False, principal=who(endpoints=["embeddings"])))


@pytest.mark.parametrize("token, shown, enters", [
    (None, Credentials(None, None), True),
    (None, None, True),
    ("secret-é", Credentials("secret-é", None), True),
    ("secret", Credentials("secret-", None), False),
    ("secret", Credentials("", None), False),
    ("secret", Credentials(None, "secret"), False),
    ("secret", None, False),
])  # fmt: skip
def test_a_route_with_a_token_is_for_who_shows_it(token, shown, enters):
    """A program such as Prometheus enters by its token alone, as a bearer; other routes ask for none."""
    asked = asking("bearer", token=token)
    asked.credentials = shown
    if enters:
        check_bearer(asked)
        return
    with pytest.raises(Unauthenticated) as caught:
        check_bearer(asked)
    words = "This needs a token of its own. Send it as `Authorization: Bearer <token>`."
    assert (caught.value.status_code, caught.value.message) == (401, words)


def allowed(scopes, decision, **body):
    try:
        check_models(asking(principal=who(**scopes), **body), decision)
    except ModelNotFound as error:
        return (error.status_code, error.param, error.should_retry) != (404, "model", False)
    return True


@pytest.mark.parametrize(
    "scopes, decision, expected",
    [
        ({}, decided(), True),
        ({"models": [GPT]}, decided(), True),
        ({"models": ["openai/*"]}, decided(), True),
        ({"models": ["anthropic/*"]}, decided(), False),
        ({"models": []}, decided(), False),
        # one list given: nothing beside what the lists name
        ({"aliases": ["fast"]}, decided(), False),
        ({"tasks": ["chat"]}, decided(), False),
        ({"endpoints": ["*"]}, decided(), True),
        # an alias grants its targets
        ({"aliases": ["fast"]}, decided("fast", OPUS, SONNET, alias="fast"), True),
        ({"aliases": ["f*"]}, decided("fast", OPUS, alias="fast"), True),
        ({"aliases": ["slow"]}, decided("fast", OPUS, alias="fast"), False),
        ({"models": ["fast"]}, decided("fast", OPUS, alias="fast"), True),
        ({"models": ["anthropic/*"]}, decided("fast", OPUS, SONNET, alias="fast"), True),
        ({"models": [OPUS]}, decided("fast", OPUS, SONNET, alias="fast"), False),
        ({"tasks": ["fast"]}, decided("fast", OPUS, alias="fast"), False),
        # so does a task
        ({"tasks": ["chat"]}, decided(GPT, OPUS, task="chat"), True),
        ({"tasks": ["chat"]}, decided(GPT, OPUS, task="summary"), False),
        ({"models": [OPUS]}, decided(GPT, OPUS, task="chat"), True),
        ({"models": [GPT]}, decided(GPT, OPUS, task="chat"), False),
        ({"aliases": ["chat"]}, decided(GPT, OPUS, task="chat"), False),
        ({"tasks": ["chat"]}, decided("fast", OPUS, task="summary", alias="chat"), False),
        # a raw model must be granted itself, wherever a rule sends it
        ({"models": [OPUS]}, decided(GPT, OPUS), False),
        ({"models": [GPT]}, decided(GPT, OPUS), True),
    ],
)
def test_scopes_say_what_may_be_asked(scopes, decision, expected):
    """A key gets the models, aliases and tasks that it was granted, and no other."""
    assert allowed(scopes, decision) is expected


@pytest.mark.parametrize("body", [{"models": [GPT, OPUS]}, {"fallbacks": [{"model": OPUS}]}, {"fallbacks": [OPUS]}])
def test_each_model_that_openrouter_might_take_must_be_granted(body):
    """`models[]` and `fallbacks[]` are no way around a scope."""
    assert not allowed({"models": [GPT]}, decided(), **body)
    assert allowed({"models": [GPT, OPUS]}, decided(), **body)
    assert not allowed({"aliases": ["fast"]}, decided("fast", GPT, alias="fast"), **body)
    assert allowed({}, decided(), **body)


def test_a_target_s_own_models_must_be_granted_too():
    """An alias whose target lets the upstream choose of several models grants itself; its models grant it only together."""
    choice = Decision("fast", (Target(GPT, "openrouter", overrides={"models": [GPT, OPUS]}),), alias="fast")
    assert not allowed({"models": [GPT]}, choice)
    assert allowed({"models": [GPT, OPUS]}, choice)
    assert allowed({"aliases": ["fast"]}, choice)


def test_without_model_each_of_models_must_be_granted():
    """The first of `models` is no less asked for when `model` is missing."""
    made = asking(principal=who(models=[OPUS]))
    made.body = {"models": [GPT, OPUS]}
    with pytest.raises(ModelNotFound, match=GPT):
        check_models(made, decided(OPUS))


@pytest.mark.parametrize("field, helpers, words", [
    ("plugins", "fusion", "This key is for certain models: `plugins` must be a list of objects."),
    ("tools", [{"type": "function"}, "x"], "This key is for certain models: `tools` must be a list of objects."),
    ("plugins", [{"id": "fusion"}], "This key is for certain models, and 'fusion' may ask another."),
    ("plugins", [{"id": "function"}], "This key is for certain models, and 'function' may ask another."),
    ("plugins", [{"id": "custom"}], "This key is for certain models, and 'custom' may ask another."),
    ("plugins", [{}], "This key is for certain models, and 'None' may ask another."),
    ("tools", [{"type": "z" * 101}], f"This key is for certain models, and '{'z' * 100}' may ask another."),
    ("deferred_tools", {"type": "image_generation"},
     "This key is for certain models, and 'image_generation' may ask another."),
    # a client's function before it hides nothing
    ("tools", [{"type": "function"}, {"type": "advisor"}],
     "This key is for certain models, and 'advisor' may ask another."),
])  # fmt: skip
def test_what_may_ask_another_model_is_named(field, helpers, words):
    """Whoever holds a key for certain models is told which plugin or tool it can't use, and where it stands."""
    with pytest.raises(Forbidden) as caught:
        check_models(asking(principal=who(models=[GPT]), **{field: helpers}), decided())
    assert (caught.value.message, caught.value.param) == (words, field)


@pytest.mark.parametrize("body, expected", [
    ({"preset": "mine"}, False),
    ({"plugins": [{"id": "web", "max_results": 3}, {"id": "response-healing"}]}, True),
    ({"plugins": [{"id": "fusion"}]}, False),
    ({"plugins": [{"id": "auto-router", "allowed_models": ["openai/*"]}]}, False),
    ({"plugins": [{"id": "web", "model": OPUS}]}, False),
    ({"plugins": [{"id": "web", "model": GPT}]}, True),
    ({"plugins": "fusion"}, False),
    ({"plugins": {"id": "fusion"}}, False),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"model": OPUS}}}]}, True),
    ({"tools": [{"name": "f", "input_schema": {}}, {"type": "custom", "model": OPUS}]}, True),
    # Anthropic's function has no type, or none that says anything
    ({"tools": [{"name": "f", "input_schema": {"model": OPUS}}]}, True),
    ({"tools": [{"name": "f", "type": None, "input_schema": {"model": OPUS}}]}, True),
    ({"tools": {"type": "function"}}, True),
    # what stands below `model` names models, but not what stands below an object there
    ({"tools": [{"type": "mcp", "model": {"name": OPUS, "labels": ["x"]}}]}, True),
    ({"tools": [{"type": "mcp", "models": [[OPUS]]}]}, False),
    ({"tools": [{"type": "web_search_20260209"}, {"type": "openrouter:web_search"}, {"type": "mcp"}]}, True),
    ({"tools": [{"type": "web_search_preview_2025_03_11"}, {"type": "bash_20250124"}]}, True),
    ({"tools": [{"type": "image_generation"}]}, False),
    ({"tools": [{"type": "image_generation", "model": GPT}]}, False),
    ({"tools": [{"type": "advisor_20260301", "model": OPUS}]}, False),
    ({"tools": [{"type": "openrouter:advisor"}]}, False),
    ({"tools": [{"type": ["function"]}]}, False),
    ({"tools": ["image_generation"]}, False),
    ({"deferred_tools": [{"type": "web_search", "filter": {"models": [GPT, OPUS]}}]}, False),
])  # fmt: skip
def test_what_runs_at_the_upstream_can_not_bring_in_another_model(body, expected):
    """Plugins and tools that ask a model of their own choice are no way around a scope; a client's functions are its own."""

    def may(**scopes):
        try:
            check_models(asking(principal=who(**scopes), **body), decided())
        except (Forbidden, ModelNotFound):
            return False
        return True

    assert may(models=[GPT]) is expected
    assert may()


@pytest.mark.parametrize("scope, expected", [
    (["openai/*"], False),
    (["openai/*", "@preset/mine"], True),
    (["@preset/*"], False),
    (["*"], True),
])  # fmt: skip
def test_a_preset_must_be_granted_by_its_own_name(scope, expected):
    """A preset may name any model: the glob of the model before it doesn't grant it."""
    assert allowed({"models": scope}, decided("openai/gpt@preset/mine")) is expected


def test_who_has_no_principal_has_no_scopes():
    """Without an authenticate plugin everything may be asked."""
    check_models(asking(principal=None), decided())


@pytest.mark.parametrize(
    "decision, named",
    [
        (decided("m" * 500), "m" * 200),
        (decided("fast", OPUS, alias="quick"), "quick"),
        (decided("fast", OPUS, alias="quick", task="chat"), "chat"),
    ],
)
def test_the_refusal_names_what_was_asked_for(decision, named):
    """The refusal says the same as for a model that does not exist, in the client's own word."""
    with pytest.raises(ModelNotFound, match=f"The model '{named}' does not exist or this key has no access"):
        check_models(asking(principal=who(models=[])), decision)


@pytest.mark.parametrize(
    "scopes, seen",
    [
        ({}, [OPUS, GPT, "fast"]),
        ({"models": ["openai/*"]}, [GPT]),
        ({"models": ["openai/*"], "aliases": ["fast"]}, [GPT, "fast"]),
        ({"aliases": ["f*"]}, ["fast"]),
        ({"tasks": ["*"]}, []),
    ],
)
def test_a_listing_shows_what_may_be_asked(scopes, seen):
    """A model list holds nothing that the key can't use."""
    assert [m for m in (OPUS, GPT, "fast") if may_see(who(**scopes).scopes, m)] == seen
