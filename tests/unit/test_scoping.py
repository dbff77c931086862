import pytest
from plugin_objects import exchange

from gateway.exchange import Decision, Principal
from gateway.scoping import compile_when, faults
from gateway.settings import When

BOT = Principal("app-1", team="blue", roles=frozenset({"bot", "free"}))
STAGES = {
    0: ["request_received"],
    1: ["authenticate"],
    2: ["prepare_request", "choose_targets"],
    3: ["check_request", "lookup_response", "around_upstream", "attempt_started", "attempt_finished", "open_tap",
        "transform_response", "response_started", "render_error", "request_finished", "explain"],
}  # fmt: skip
KNOWN_AT = {"endpoint": 0, "phase": 0, "roles": 2, "teams": 2, "keys": 2, "models": 2, "stream": 2, "tasks": 3}


def when(**fields):
    return When.model_validate(fields)


def one(name):
    return when(**{name: True if name == "stream" else ["live"] if name == "phase" else ["x"]})


def matches(condition, **changes):
    made = exchange({"model": "openai/gpt-5", "messages": []}, principal=BOT)
    made.decision = Decision("openai/gpt-5", (), task="chat")
    for name, value in changes.items():
        setattr(made, name, value)
    return compile_when(when(**condition))(made)


@pytest.mark.parametrize("name, known", KNOWN_AT.items())
def test_a_field_that_is_not_known_yet_is_a_mistake(name, known):
    """A plugin that runs before its `when:` can be judged is refused at start-up, and told which hook it is."""
    for stage, hooks in STAGES.items():
        for hook in hooks:
            found = faults(one(name), [hook, "register_routes", "usage_corrected"])
            assert found == ([f"`{name}` is not known yet when this plugin's {hook} runs."] if stage < known else [])


def test_all_mistakes_are_told():
    """Each field and each hook that is too early is named; start-up hooks have no request to be scoped by."""
    found = faults(when(tasks=["x"], roles=["y"]), ["request_received", "authenticate", "register_upstreams"])
    assert sorted(found) == [
        "`roles` is not known yet when this plugin's authenticate, request_received runs.",
        "`tasks` is not known yet when this plugin's authenticate, request_received runs.",
    ]
    assert faults(None, ["request_received"]) == []
    unscoped = ["register_routes", "register_commands", "register_upstreams", "restore_principal", "usage_corrected"]
    assert faults(one("tasks"), unscoped) == []


def test_nothing_said_is_nothing_to_test():
    """A plugin without conditions costs nothing."""
    assert compile_when(None) is None
    assert compile_when(When()) is None


@pytest.mark.parametrize(
    "condition, expected",
    [
        ({"endpoint": ["chat/*"]}, True),
        ({"endpoint": ["images/*", "chat/completions"]}, True),
        ({"endpoint": ["chat"]}, False),
        ({"phase": ["live", "run"]}, True),
        ({"phase": ["run"]}, False),
        ({"roles": ["admin", "b*"]}, True),
        ({"roles": ["admin"]}, False),
        ({"teams": ["bl?e"]}, True),
        ({"teams": ["red"]}, False),
        ({"keys": ["app-*"]}, True),
        ({"keys": ["app"]}, False),
        ({"models": ["openai/*"]}, True),
        ({"models": ["OpenAI/*"]}, False),
        ({"stream": False}, True),
        ({"stream": True}, False),
        ({"tasks": ["chat"]}, True),
        ({"tasks": ["summary"]}, False),
        ({"roles": ["bot"], "teams": ["blue"], "stream": False}, True),
        ({"roles": ["bot"], "teams": ["red"], "stream": False}, False),
    ],
)
def test_every_condition_must_match(condition, expected):
    """A plugin is there for the requests that fit all its conditions."""
    assert matches(condition) is expected


@pytest.mark.parametrize("name", ["roles", "teams", "keys"])
def test_who_is_unknown_matches_no_condition_about_who(name):
    """A request refused before it was known who asks is out of scope, even for a `*`."""
    assert matches({name: ["*"]})
    assert not matches({name: ["*"]}, principal=None)


def test_what_is_unknown_is_empty():
    """No model, team or task is matched by `*` alone, as text that is empty."""
    assert not matches({"tasks": ["*"]}, decision=None)
    assert matches({"models": ["*"]}, body={})
    assert not matches({"models": ["?*"]}, body={})
    assert not matches({"teams": ["?*"]}, principal=Principal("x"))
    assert not matches({"tasks": ["?*"]}, decision=Decision("m", ()))
    assert matches({"models": ["7"]}, body={"model": 7})
