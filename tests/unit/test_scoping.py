from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_objects import exchange

from gateway.exchange import Decision, Form, FormFile, Principal
from gateway.kit.subjects import input_estimate
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
    "endpoint": 0, "headers": 0, "time": 0, "roles": 2, "teams": 2, "tenants": 2, "keys": 2, "claims": 2,
    "models": 2, "stream": 2, "input_tokens": 2, "tools": 2, "images": 2, "audio": 2, "json_schema": 2, "tasks": 3,
    "phase": 3,
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


def a_request(principal=BOT, **body):
    made = exchange({"model": "openai/gpt-5", "messages": [], **body}, principal=principal)
    made.decision = Decision("openai/gpt-5", (), task="chat")
    made.started_at = datetime(2026, 11, 26, 14, 5, tzinfo=BERLIN).timestamp()
    return made


@pytest.mark.parametrize(
    "condition, words",
    [
        ({"endpoint": ["images/*", "audio/*"]}, "the endpoint is chat/completions (images/*, audio/*)"),
        ({"phase": "run"}, "the phase is live (run)"),
        ({"models": "gpt-*"}, "the model is openai/gpt-5 (gpt-*)"),
        ({"tasks": "label"}, "the task is chat (label)"),
        ({"stream": True}, "it is no stream"),
        ({"keys": "other"}, "the caller is app-1 (other)"),
        ({"teams": ["red", "green"]}, "the caller's team is blue (red, green)"),
        ({"tenants": "other"}, "the caller's tenant is acme (other)"),
        ({"roles": "admin"}, "the caller's role is bot, free (admin)"),
        ({"claims": {"plan": "free"}}, "the claim plan is pro (free)"),
        ({"claims": {"nope": "x"}}, "the claim nope is none (x)"),
        ({"headers": {"x-tier": ["gold", "silver"]}}, "the header x-tier is absent (gold, silver)"),
        ({"headers": {"x-tier": True}}, "the header x-tier is absent"),
        ({"input_tokens": {"min": 1000}}, "it has about 10 input tokens (min 1000)"),
        ({"input_tokens": {"min": 1, "max": 2}}, "it has about 10 input tokens (min 1 and max 2)"),
        ({"tools": True}, "it has no tools"),
        ({"json_schema": True}, "no JSON schema"),
        ({"images": True}, "it has no images"),
        ({"audio": True}, "it has no audio"),
        ({"time": {"days": ["mon", "tue"], "to": "06:00", "zone": "Europe/Berlin"}},
         "the time is thu 14:05 (mon, tue 00:00 to 06:00 Europe/Berlin)"),
        ({"time": [{"to": "06:00"}, {"from": "22:00"}]},
         "the time is thu 13:05 (00:00 to 06:00 UTC or 22:00 to 24:00 UTC)"),
    ],
)  # fmt: skip
def test_why_not_is_said_in_words(condition, words):
    """Each condition says under its field's name what a request is instead, and what was wanted."""
    made = a_request()
    [one] = conditions(when(**condition))
    assert not one.test(made)
    assert (one.field, one.found(made)) == (*condition, words)


@pytest.mark.parametrize("field, words", [
    ("stream", "it is a stream"),
    ("tools", "it has tools"),
    ("json_schema", "a JSON schema"),
    ("images", "it has images"),
    ("audio", "it has audio"),
])  # fmt: skip
def test_what_a_request_must_not_bring_is_said_too(field, words):
    """A rule for requests without images says of one with images that it has some."""
    sound = {"type": "input_audio", "input_audio": {}}
    made = a_request(**said(IMAGE, sound, tools=[{"type": "function"}], response_format=SCHEMA, stream=True))
    [one] = conditions(when(**{field: False}))
    assert not one.test(made)
    assert (one.field, one.found(made)) == (field, words)


@pytest.mark.parametrize("field, words", [
    ("keys", "the caller is none (?*)"),
    ("teams", "the caller's team is none (?*)"),
    ("tenants", "the caller's tenant is none (?*)"),
    ("roles", "the caller's role is none (?*)"),
    ("tasks", "the task is none (?*)"),
    ("models", "the model is none (?*)"),
])  # fmt: skip
def test_what_is_not_there_is_said_to_be_none(field, words):
    """Of a request of nobody, without a model, nothing is invented."""
    made = exchange({}, principal=None)
    [one] = conditions(when(**{field: "?*"}))
    assert not one.test(made)
    assert (one.field, one.found(made)) == (field, words)


def test_a_header_that_is_there_is_said_to_be():
    """Who wants a header to be absent is told that it is there; a value that fits no glob is shown."""
    made = exchange(headers={"x-tier": "bronze"})
    for wanted, words in ((False, "the header x-tier is there"), ("gold", "the header x-tier is bronze (gold)")):
        [one] = conditions(when(headers={"x-tier": wanted}))
        assert not one.test(made)
        assert (one.field, one.found(made)) == ("headers", words)


def test_every_model_that_is_asked_for_is_said():
    """Of a request that names several models all are shown."""
    [one] = conditions(when(models=["gpt-*", "o1"]))
    made = a_request(models=["b/y"])
    assert not one.test(made)
    assert one.found(made) == "the model is openai/gpt-5 or b/y (gpt-*, o1)"


def test_the_model_may_be_read_elsewhere():
    """Where one target is judged, not the request, `models` and `tasks` are about what that place says."""
    made = a_request()
    model, task = conditions(
        when(models=["gpt-*"], tasks="label"), model=lambda _: "vendor/other", task=lambda _: "summary"
    )
    assert (model.field, model.test(made), model.found(made)) == ("models", False, "the model is vendor/other (gpt-*)")
    assert (task.field, task.test(made), task.found(made)) == ("tasks", False, "the task is summary (label)")
    [fits] = conditions(when(models=["gpt-*"]), model=lambda _: "gpt-5")
    assert fits.test(made)


def test_conditions_about_different_things_read_different_things():
    """Rules remember by field and by which header or claim: no answer about one is taken for another's."""
    found = conditions(
        when(keys="a", models="a", time={"days": "mon"}, headers={"x-a": "1", "x-b": True}, claims={"plan": "p", "a.b": "q"})
    )  # fmt: skip
    assert sorted((one.field, one.of) for one in found) == [
        ("claims", "a.b"), ("claims", "plan"), ("headers", "x-a"), ("headers", "x-b?"),
        ("keys", ""), ("models", ""), ("time", ""),
    ]  # fmt: skip


def test_a_minute_reads_as_one():
    """What a rule of time remembers holds for the minute, and not for the next."""
    [one] = conditions(when(time={"days": "thu"}))
    made, read = a_request(), []
    began = made.started_at
    for minute in range(90):
        seconds = set()
        for second in (0, 30.5, 59.9):
            made.started_at = began + minute * 60 + second
            seconds.add(one.reads(made))
        read.append(*seconds)
    assert len(set(read)) == 90


def test_a_window_from_an_hour_to_the_same_is_a_day():
    """`from` 09:00 `to` 09:00 lasts until the next morning."""
    made = exchange()
    for moment, expected in (
        ("2026-11-26 08:59", False), ("2026-11-26 09:00", True), ("2026-11-27 08:59", True), ("2026-11-27 09:00", False),
    ):  # fmt: skip
        made.started_at = datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()
        assert compile_when(when(time={"days": "thu", "from": "09:00", "to": "09:00"}))(made) is expected, moment


def test_a_claim_s_case_counts():
    """Texts are compared as they are; only true and false are written in small letters."""
    caller = Principal("x", claims={"plan": "Pro", "beta": True})
    assert matches({"claims": {"plan": "Pro"}}, principal=caller)
    assert not matches({"claims": {"plan": "pro"}}, principal=caller)
    assert matches({"claims": {"beta": "true"}}, principal=caller)


def test_ends_of_an_estimate_belong_to_it():
    """`min` and `max` hold for the very size that they name."""
    made = exchange({"model": "m", "messages": "x" * 400})
    size = input_estimate(made)
    for least, most, expected in ((size, size, True), (size + 1, None, False), (None, size - 1, False)):
        given = {name: value for name, value in (("min", least), ("max", most)) if value is not None}
        assert compile_when(when(input_tokens=given))(made) is expected


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
