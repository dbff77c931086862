from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_objects import exchange

from gateway.exchange import Decision, Form, FormFile, Principal
from gateway.scoping import compile_when, conditions, faults, matcher
from gateway.settings import When, load_text

BOT = Principal(
    "app-1",
    tenant="acme",
    team="blue",
    roles=frozenset({"bot", "free"}),
    claims={"plan": "pro", "beta": True, "level": 3, "groups": ["a", "b"], "app": {"tier": "gold"}, "x.y": "dotted"},
)
STAGES = {
    0: ["request_received"],
    1: ["authenticate"],
    2: ["prepare_request", "choose_targets"],
    3: ["check_request", "lookup_response", "around_upstream", "attempt_started", "attempt_finished", "open_tap",
        "transform_response", "response_started", "render_error", "request_finished", "explain"],
}  # fmt: skip
KNOWN_AT = {
    "endpoint": 0, "phase": 0, "headers": 0, "time": 0, "roles": 2, "teams": 2, "tenants": 2, "keys": 2, "claims": 2,
    "models": 2, "stream": 2, "input_tokens": 2, "tools": 2, "images": 2, "audio": 2, "json_schema": 2, "tasks": 3,
}  # fmt: skip
VALUES = {
    **dict.fromkeys(("stream", "tools", "images", "audio", "json_schema"), True),
    "phase": ["live"], "claims": {"a": "b"}, "headers": {"x-a": True}, "input_tokens": {"min": 1}, "time": {"days": "mon"},
}  # fmt: skip


def when(**fields):
    return When.model_validate(fields)


def one(name):
    return when(**{name: VALUES.get(name, ["x"])})


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


def test_every_field_is_tried():
    """A new condition can't be forgotten here."""
    assert KNOWN_AT.keys() == When.model_fields.keys()


@pytest.mark.parametrize(
    "condition, expected",
    [
        ({"tenants": "ac*"}, True),
        ({"tenants": ["other"]}, False),
        ({"claims": {"plan": "pro"}}, True),
        ({"claims": {"plan": ["free", "p*"]}}, True),
        ({"claims": {"plan": "free"}}, False),
        ({"claims": {"beta": True, "level": 3}}, True),
        ({"claims": {"beta": False}}, False),
        ({"claims": {"groups": "b"}}, True),
        ({"claims": {"groups": "c"}}, False),
        ({"claims": {"app.tier": "gold"}}, True),
        ({"claims": {"app.tier": "silver"}}, False),
        ({"claims": {"app": "*"}}, False),
        ({"claims": {"x.y": "dotted"}}, True),
        ({"claims": {"missing": "*"}}, False),
        ({"claims": {"plan.deeper": "*"}}, False),
    ],
)
def test_claims_and_tenants_are_the_callers(condition, expected):
    """A claim is found by name or by its path within others; a list matches by any entry, nothing by what is not there."""
    assert matches(condition) is expected
    assert not matches(condition, principal=None)


@pytest.mark.parametrize(
    "condition, sent, expected",
    [
        ({"x-tier": "gold*"}, {"X-Tier": "golden"}, True),
        ({"X-Tier": ["silver", "gold"]}, {"x-tier": "bronze"}, False),
        ({"x-tier": "*"}, {}, False),
        ({"x-tier": True}, {"x-tier": ""}, True),
        ({"x-tier": True}, {}, False),
        ({"x-tier": False}, {}, True),
        ({"x-tier": False, "x-app": "a"}, {"x-app": "a"}, True),
        ({"x-tier": False, "x-app": "a"}, {"x-app": "a", "x-tier": "b"}, False),
    ],
)
def test_headers_are_matched_by_glob_or_by_being_there(condition, sent, expected):
    """Header names count in any case, each given one must match."""
    made = exchange(headers=sent)
    assert compile_when(when(headers=condition))(made) is expected


TEXT = {"type": "text", "text": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}


def said(*parts, **fields):
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}], **fields}


@pytest.mark.parametrize(
    "endpoint, body, holds",
    [
        ("chat/completions", said(TEXT), set()),
        ("chat/completions", said(TEXT, IMAGE), {"images"}),
        ("responses", {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image"}]}]}, {"images"}),
        ("messages", said({"type": "image", "source": {"type": "url"}}), {"images"}),
        ("messages", said({"type": "tool_result", "content": [{"type": "image"}]}), {"images"}),
        ("chat/completions", said({"type": "input_audio", "input_audio": {}}), {"audio"}),
        ("chat/completions", said(tools=[{"type": "function"}]), {"tools"}),
        ("chat/completions", said(functions=[{"name": "f"}]), {"tools"}),
        ("chat/completions", said(tools=[]), set()),
        ("chat/completions", said(response_format=SCHEMA), {"json_schema"}),
        ("chat/completions", said(response_format={"type": "json_object"}), set()),
        ("responses", {"model": "m", "input": "x", "text": {"format": {"type": "json_schema"}}}, {"json_schema"}),
        ("messages", said(output_config={"format": {"type": "json_schema"}}), {"json_schema"}),
        ("embeddings", {"model": "m", "input": "x", "response_format": SCHEMA}, set()),
        ("chat/completions", said(TEXT, IMAGE, response_format=SCHEMA, tools=[1]), {"images", "tools", "json_schema"}),
        ("chat/completions", {"model": "m", "messages": "type"}, set()),
    ],
)
def test_what_a_request_brings_is_seen_in_every_dialect(endpoint, body, holds):
    """Images, audio, tools and JSON schemas are found wherever the endpoint has them."""
    for name in ("tools", "images", "audio", "json_schema"):
        for wanted in (True, False):
            made = exchange(body, endpoint=endpoint)
            assert compile_when(when(**{name: wanted}))(made) is ((name in holds) is wanted), name


def test_a_file_to_transcribe_is_audio():
    """The endpoint for recordings sends its audio as a file of a form."""
    made = exchange({"model": "m"}, endpoint="audio/transcriptions")
    assert not compile_when(when(audio=True))(made)
    made.form = Form([], [FormFile("file", "a.wav", "audio/wav", b"")])
    assert compile_when(when(audio=True))(made)


def test_what_a_plugin_edits_is_looked_at_anew():
    """A plugin that adds an image or text in `prepare_request` is not overlooked for what was seen before."""
    made = exchange(said(TEXT))
    image, long = compile_when(when(images=True)), compile_when(when(input_tokens={"min": 100}))
    assert not image(made)
    assert not long(made)
    made.snapshot.hooks = SimpleNamespace(prepare_request=("some",))
    made.body["messages"][0]["content"] += [IMAGE, {"type": "text", "text": "x" * 1000}]
    assert image(made)
    assert long(made)


@pytest.mark.parametrize(
    "wanted, sizes",
    [
        ({"min": 1000}, (False, False, True)),
        ({"max": 1000}, (True, True, False)),
        ({"min": 10, "max": 1000}, (False, True, False)),
    ],
)
def test_estimated_input_has_ends(wanted, sizes):
    """`min` and `max` are about a quarter of the characters."""
    condition = compile_when(when(input_tokens=wanted))
    found = []
    for words in ("", "x" * 2000, "x" * 9000):
        made = exchange({"messages": words})
        found.append(condition(made))
    assert tuple(found) == sizes


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    "window, moment, expected",
    [
        ({"from": "09:00", "to": "17:00"}, "2026-11-26 09:00", True),
        ({"from": "09:00", "to": "17:00"}, "2026-11-26 17:00", False),
        ({"from": "9:00", "to": "17:00"}, "2026-11-26 08:59", False),
        ({"from": "22:00", "to": "06:00"}, "2026-11-26 23:59", True),
        ({"from": "22:00", "to": "06:00"}, "2026-11-27 05:59", True),
        ({"from": "22:00", "to": "06:00"}, "2026-11-27 06:00", False),
        ({"days": "thu"}, "2026-11-26 00:00", True),
        ({"days": ["mon", "fri"]}, "2026-11-26 12:00", False),
        ({"days": "thu", "from": "22:00", "to": "06:00"}, "2026-11-27 05:00", True),
        ({"days": "fri", "from": "22:00", "to": "06:00"}, "2026-11-27 05:00", False),
        ({"days": "thu", "from": "22:00", "to": "06:00"}, "2026-11-26 05:00", False),
        ({"from": "22:00"}, "2026-11-26 23:30", True),
        ([{"days": "mon"}, {"days": "thu"}], "2026-11-26 12:00", True),
        # the night in which clocks go back: both half past two are within
        ({"from": "02:00", "to": "03:00"}, "2026-10-25 02:30", True),
    ],
)
def test_a_window_of_time_is_in_its_zone(window, moment, expected):
    """A window over midnight belongs to the day it began; the clock is that of its zone, when the request began."""
    windows = [{**w, "zone": "Europe/Berlin"} for w in (window if isinstance(window, list) else [window])]
    made = exchange()
    made.started_at = datetime.fromisoformat(moment).replace(tzinfo=BERLIN).timestamp()
    assert compile_when(when(time=windows))(made) is expected


@given(
    start=st.integers(0, 366 * 1440).map(lambda minutes: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)),
    begin=st.integers(0, 1439),
    length=st.integers(1, 1439),
    days=st.sets(st.sampled_from(["mon", "tue", "wed", "thu", "fri", "sat", "sun"]), min_size=1),
)
def test_a_window_is_open_as_long_as_it_says(start, begin, length, days):
    """For any window: open exactly from its beginning on one of its days, for its length."""
    end = (begin + length) % 1440
    clock = {"from": f"{begin // 60:02}:{begin % 60:02}", "to": f"{end // 60:02}:{end % 60:02}" if end else "24:00"}
    made = exchange()
    made.started_at = start.timestamp()
    openings = [
        start.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=d, minutes=begin) for d in (-1, 0)
    ]
    is_open = any(o <= start < o + timedelta(minutes=length) and f"{o:%a}".lower() in days for o in openings)
    assert compile_when(when(time={**clock, "days": sorted(days)}))(made) is is_open


@given(st.lists(st.text("ab*?[]!-.", min_size=1, max_size=5), min_size=1, max_size=4), st.text("ab.*[", max_size=5))
def test_globs_compiled_together_are_as_each_alone(globs, text):
    """Many globs in one pattern say what the standard library says of each."""
    assert matcher(globs)(text) is any(fnmatchcase(text, glob) for glob in globs)


@pytest.mark.parametrize(
    "condition, words",
    [
        ({"models": "gpt-*"}, "the model is openai/gpt-5 (gpt-*)"),
        ({"tasks": "label"}, "the task is chat (label)"),
        ({"stream": True}, "it is no stream"),
        ({"teams": ["red", "green"]}, "the caller's team is blue (red, green)"),
        ({"roles": "admin"}, "the caller's role is bot, free (admin)"),
        ({"claims": {"plan": "free"}}, "the claim plan is pro (free)"),
        ({"claims": {"nope": "x"}}, "the claim nope is none (x)"),
        ({"headers": {"x-tier": "gold"}}, "the header x-tier is absent (gold)"),
        ({"headers": {"x-tier": True}}, "the header x-tier is absent"),
        ({"input_tokens": {"min": 1000}}, "it has about 10 input tokens (min 1000)"),
        ({"tools": True}, "it has no tools"),
        ({"time": {"days": "mon", "to": "06:00", "zone": "Europe/Berlin"}},
         "the time is thu 14:05 (mon 00:00 to 06:00 Europe/Berlin)"),
    ],
)  # fmt: skip
def test_why_not_is_said_in_words(condition, words):
    """Each condition says what a request is instead, and what was wanted."""
    made = exchange({"model": "openai/gpt-5", "messages": []}, principal=BOT)
    made.decision = Decision("openai/gpt-5", (), task="chat")
    made.started_at = datetime(2026, 11, 26, 14, 5, tzinfo=BERLIN).timestamp()
    [one] = conditions(when(**condition))
    assert not one.test(made)
    assert one.found(made) == words


ALL = when(
    endpoint="chat/*", models="gpt-*", stream=True, keys="a", teams=["blue", "r*"], tenants="t", roles="bot",
    claims={"plan": "pro", "app.tier": ["gold", "x*"]}, headers={"x-a": "1*", "x-b": True}, tools=True, images=True,
    json_schema=False, time={"from": "08:00", "to": "20:00", "days": ["mon", "tue", "thu"]}, input_tokens={"min": 30},
)  # fmt: skip
SOME = st.builds(
    lambda endpoint, headers, principal, body, started: (endpoint, headers, principal, body, started),
    st.sampled_from(["chat/completions", "responses"]),
    st.fixed_dictionaries({}, optional={"x-a": st.sampled_from(["1", "2"]), "x-b": st.just("")}),
    st.none()
    | st.builds(
        lambda **fields: Principal("a", **fields),
        tenant=st.sampled_from(["t", "u"]),
        team=st.sampled_from([None, "blue", "red"]),
        roles=st.frozensets(st.sampled_from(["bot", "human"])),
        claims=st.sampled_from([{}, {"plan": "pro"}, {"plan": ["pro", "x"], "app": {"tier": "gold"}}]),
    ),
    st.fixed_dictionaries(
        {"model": st.sampled_from(["gpt-4", "other"])},
        optional={
            "stream": st.booleans(),
            "tools": st.just([1]),
            "messages": st.sampled_from([[IMAGE], ["x" * 300]]),
            "response_format": st.just(SCHEMA),
        },
    ),
    st.integers(0, 7 * 1440).map(lambda minute: minute * 60.0),
)


@given(SOME, SOME)
def test_requests_that_read_alike_are_answered_alike(one, other):
    """What a condition says that it reads is all that its answer hangs on: rules remember by it."""
    made = []
    for endpoint, headers, principal, body, started in (one, other):
        asked = exchange(body, endpoint=endpoint, headers=headers, principal=principal)
        asked.started_at = started
        made.append(asked)
    for condition in conditions(ALL):
        first, second = made
        hash(condition.reads(first))
        if condition.reads(first) == condition.reads(second):
            assert condition.test(first) == condition.test(second), condition.field


@pytest.mark.parametrize(
    "yaml, place, words",
    [
        ('{time: {from: "25:00"}}', "when.time.from", "must match pattern"),
        ("{time: {zone: Europe/Berlni}}", "when.time.zone", "there is no time zone 'Europe/Berlni'"),
        ("{time: {days: [monday]}}", "when.time.days[0]", "'mon'"),
        ("{time: [{until: x}]}", "when.time[0].until", "unknown key"),
        ("{headers: {Authorization: x}}", "when.headers.Authorization", "is hidden from rules"),
        ("{input_tokens: {min: 5, max: 4}}", "when.input_tokens", "min is larger than max"),
        ("{input_tokens: {}}", "when.input_tokens", "names neither min nor max"),
        ("{claims: {a: []}}", "when.claims.a", "must not be empty"),
        ("{images: maybe}", "when.images", "must be true or false"),
    ],
)
def test_mistakes_stand_at_their_line(yaml, place, words):
    """A condition that can't be is told at start-up, with its place in the file."""
    text = f"upstreams: {{openrouter: {{api_key: x}}}}\nplugins:\n- use: a\n  when: {yaml}\n"
    with pytest.raises(Exception) as caught:
        load_text(text, env={})
    [problem] = caught.value.problems
    assert (problem.line, problem.path) == (4, f"plugins[0].{place}")
    assert words in problem.message


@pytest.mark.parametrize("name", ["roles", "teams", "keys"])
def test_who_is_unknown_matches_no_condition_about_who(name):
    """A request refused before it was known who asks is out of scope, even for a `*`."""
    assert matches({name: ["*"]})
    assert not matches({name: ["*"]}, principal=None)


def test_what_is_unknown_is_empty():
    """No model and no team are matched by `*` alone, as text that is empty; `tasks: "*"` is for those that have one."""
    assert not matches({"tasks": ["*"]}, decision=None)
    assert not matches({"tasks": ["*"]}, decision=Decision("m", ()))
    assert matches({"models": ["*"]}, body={})
    assert not matches({"models": ["?*"]}, body={})
    assert not matches({"teams": ["?*"]}, principal=Principal("x"))
    assert not matches({"tasks": ["?*"]}, decision=Decision("m", ()))
    assert matches({"models": ["7"]}, body={"model": 7})
