import contextlib
import json
import re
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_objects import exchange, kept, settings

from gateway.errors import BadRequest, TooLarge, UnsupportedMedia
from gateway.exchange import Form, FormFile, Target
from gateway.incoming import (
    CHOOSING_FIELDS,
    LONGEST_MODEL,
    MOST_MODELS,
    MULTIPART_PARTS,
    NEVER,
    VARIANTS,
    admit_body,
    asked_models,
    check_refused,
    closed_fields,
    json_form_value,
    may_choose,
    parse_body,
    parse_form,
    parse_object,
)

ALL = [*CHOOSING_FIELDS, "auto_routers"]
TRANSCRIPTS = "audio/transcriptions"


def form(*parts, boundary="b"):
    """A multipart body: (name, value) or (name, filename, type, bytes)."""
    out = b""
    for part in parts:
        name, value = part[0], part[-1]
        extra = f'; filename="{part[1]}"' if len(part) == 4 else ""
        kind = f"Content-Type: {part[2]}\r\n" if len(part) == 4 and part[2] else ""
        out += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n{kind}\r\n'.encode()
        out += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return out + f"--{boundary}--\r\n".encode()


def admitted(body, client_may=ALL, endpoint="chat/completions"):
    made = exchange(body, endpoint=endpoint)
    known = settings(upstream={"client_may": list(client_may)})
    made.snapshot = SimpleNamespace(settings=known, derived=SimpleNamespace(closed_fields=closed_fields(client_may)))
    admit_body(made)
    check_refused(made)
    return made


def refusal(call, *args, error=BadRequest, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return caught.value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), json_values), st.booleans())
def test_every_json_object_is_read(body, ascii_only):
    """Whatever valid JSON object a client sends is read as it was meant."""
    assert parse_object(json.dumps(body, ensure_ascii=ascii_only).encode()) == body


@given(st.binary(max_size=40) | st.text('{}[]",:0ntf\\u ', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(raw):
    """No body makes the gateway fail: it is an object or a 400."""
    with contextlib.suppress(BadRequest):
        assert isinstance(parse_object(raw), dict)


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "^The request has no body; a JSON object is due.$"),
        (b" \r\n\t", "has no body"),
        (b"[1]", "^The body must be a JSON object.$"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (
            b'{"a": "\\ud800"}',
            "^The body is not valid JSON: a string ends too early, or holds half of a surrogate pair.$",
        ),
        (b'{"a": "x}', ": a string ends too early"),
        (b'{"a": [1', "^The body is not valid JSON: Input data was truncated.$"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON: not UTF-8 at byte 7"),
        (b'{"a": 1,}', r"^The body is not valid JSON: JSON is malformed: .*byte 8"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": ' * 5000, "^The JSON body is nested too deeply.$"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused(raw, words):
    """A client is told what is wrong with its body, without its content."""
    error = refusal(parse_object, raw)
    assert re.search(words, error.message), error.message
    assert " - at " not in error.message


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "", "Application/JSON ", "application/vnd.api+json"])  # fmt: skip
def test_json_is_known_by_its_type(kind):
    """JSON's content type may have parameters, be in capitals, or be missing."""
    made = exchange({})
    made.raw_body = b'{"model": "m", "stream": true}'
    parse_body(made, kind)
    assert (made.body, made.stream, made.form) == ({"model": "m", "stream": True}, True, None)


@pytest.mark.parametrize("endpoint, kind, due", [
    ("chat/completions", "text/plain", "Send Content-Type: application/json"),
    ("chat/completions", "multipart/form-data; boundary=b", "Send Content-Type: application/json"),
    (TRANSCRIPTS, "audio/wav", "Send Content-Type: multipart/form-data or application/json"),
])  # fmt: skip
def test_another_type_is_refused(endpoint, kind, due):
    """A body that is not what the endpoint takes is told which it takes."""
    made = exchange({}, endpoint=endpoint)
    made.raw_body = form(("model", "m"))
    error = refusal(parse_body, made, kind, error=UnsupportedMedia)
    assert error.message.startswith(due)
    assert (error.status_code, repr(kind.partition(";")[0]) in error.message) == (415, True)


def test_a_form_becomes_a_body():
    """Form fields are body fields; lists collect; files stay beside."""
    raw = form(("model", "m"), ("include[]", "a"), ("include[]", "b"), ("stream", "true"), ("file", "a.wav", "audio/wav", b"\0RIFF\r\n"), ("other", "b.bin", "", b""))  # fmt: skip
    made = exchange({}, endpoint=TRANSCRIPTS)
    made.raw_body = raw
    parse_body(made, 'multipart/form-data; boundary="b"')
    assert made.body == {"model": "m", "include[]": ["a", "b"], "stream": "true"}
    assert made.stream
    assert made.form.files == [
        FormFile("file", "a.wav", "audio/wav", b"\0RIFF\r\n"),
        FormFile("other", "b.bin", "application/octet-stream", b""),
    ]
    assert made.form.fields[0] == ("model", "m")


@pytest.mark.parametrize("boundary", ["b", "a-b_c.1", "x" * 70])
def test_a_boundary_is_found_quoted_or_not(boundary):
    """Clients write the boundary in either way, before or after other parameters."""
    raw = form(("model", "m"), boundary=boundary)
    for parameters in (f" boundary={boundary}", f'boundary="{boundary}"', f"charset=utf-8; boundary={boundary}; a=b"):
        assert parse_form(raw, parameters) == Form([("model", "m")], [])


@pytest.mark.parametrize("parts, words, param", [
    ([("model", "a"), ("model", "b")], "'model' stands twice", "model"),
    ([("model[]", "a")], "'model' can't be a list", "model"),
    ([("model[x]", "a")], "'model' can't be a list", "model"),
    ([("model[x][]", "a")], "'model' can't be a list", "model"),
    ([("api_key[]", "a")], "'api_key' can't be a list", "api_key"),
    ([("provider[order]", "a")], "'provider' can't be a list", "provider"),
    ([("model", "f", "text/plain", b"a")], "'model' can't be a file", "model"),
    ([("models[]", "f", "text/plain", b"a")], "'models[]' can't be a file", "models[]"),
    ([("x", "a"), ("x", "f", "text/plain", b"a")], "'x' can't be a file", "x"),
])  # fmt: skip
def test_a_form_that_two_readers_could_read_differently_is_refused(parts, words, param):
    """Which of two fields an upstream would take is anybody's guess: a scope must not hang on it."""
    made = exchange({}, endpoint=TRANSCRIPTS)
    made.raw_body = form(*parts)
    error = refusal(parse_body, made, "multipart/form-data; boundary=b")
    assert words in error.message
    assert error.param == param


def test_a_large_file_stays_whole():
    """What the body's own limit lets through is not cut by another."""
    content = b"\0" * (6 << 20)
    [file] = parse_form(form(("file", "a.wav", "audio/wav", content)), "boundary=b").files
    assert file.content == content


def test_a_broken_form_is_refused():
    """A form without boundary, end or header, or with too many parts, is the client's mistake."""
    raw = form(("model", "m"))
    assert refusal(parse_form, raw, "").message == "Content-Type: multipart/form-data has no boundary."
    for broken, words in (
        (raw[:-8], "broken: Unexpected end of multipart stream"),
        (b"", "broken: Unexpected end of multipart stream"),
        (b"x" + raw, "broken: Unexpected byte in front of first boundary"),
        (raw.replace(b"\r\n", b"\n"), "broken: Invalid line break"),
        (form(("model", b"\xff\xfe")), "broken: 'utf-8' codec can't decode"),
    ):
        assert words in refusal(parse_form, broken, "boundary=b").message
    many = [(f"f{n}", "v") for n in range(MULTIPART_PARTS)]
    assert len(parse_form(form(*many), "boundary=b").fields) == MULTIPART_PARTS
    error = refusal(parse_form, form(*many, ("more", "v")), "boundary=b", error=TooLarge)
    assert (error.status_code, "too many or too large parts" in error.message) == (413, True)


def test_a_name_comes_back_cut_short():
    """A client that sends half a page as a name is told which it was by its first hundred characters."""
    long = "z" * 500
    for parts in ([(long, "a"), (long, "b")], [(long, "a"), (long, "f", "text/plain", b"a")]):
        made = exchange({}, endpoint=TRANSCRIPTS)
        made.raw_body = form(*parts)
        error = refusal(parse_body, made, "multipart/form-data; boundary=b")
        assert (error.param, error.message.count("z")) == ("z" * 100, 100)
    made = exchange({})
    assert refusal(parse_body, made, "text/" + long, error=UnsupportedMedia).message.count("z") == 95


def test_the_type_of_a_file_is_kept_or_unknown():
    """A file without a type is bytes of an unknown kind to the upstream."""
    for kind, sent in (("audio/wav", "audio/wav"), ("", "application/octet-stream")):
        [file] = parse_form(form(("file", "a.bin", kind, b"x")), "boundary=b").files
        assert file.content_type == sent


def test_fields_that_send_a_key_elsewhere_never_pass():
    """`api_base`, `base_url` and `api_key` are taken out whoever may do what, and the reply says so."""
    made = admitted({"model": "m", "messages": [1], "api_key": "x", "base_url": "y", "api_base": "z", "other": 1})
    assert made.body == {"model": "m", "messages": [1], "other": 1}
    assert made.reply_headers["x-xenios-removed"] == "api_base, api_key, base_url"


@pytest.mark.parametrize("permission", CHOOSING_FIELDS)
def test_a_choosing_field_passes_only_where_it_is_allowed(permission):
    """A client chooses models and prices only by the fields that `client_may` lists."""
    others = [p for p in ALL if p != permission]
    for name in CHOOSING_FIELDS[permission]:
        body = {"model": "m", "messages": [1], name: ["v"]}
        kept = admitted(dict(body), [permission, "auto_routers", "presets"])
        assert kept.body == body
        assert "x-xenios-removed" not in kept.reply_headers
        assert name not in admitted(dict(body), others).body
    assert closed_fields(others) == {*NEVER, *CHOOSING_FIELDS[permission]}
    assert closed_fields(ALL) == set(NEVER)


@pytest.mark.parametrize("endpoint, body, param, code", [
    ("chat/completions", {"messages": [1]}, "model", "missing_required_parameter"),
    ("chat/completions", {"model": "", "messages": [1]}, "model", "missing_required_parameter"),
    ("chat/completions", {"model": None, "messages": [1]}, "model", "missing_required_parameter"),
    ("chat/completions", {"model": "m"}, "messages", "missing_required_parameter"),
    ("chat/completions", {"models": ["m"]}, "messages", "missing_required_parameter"),
    ("embeddings", {"model": "m", "input": ""}, "input", "missing_required_parameter"),
    ("chat/completions", {"model": 7, "messages": [1]}, "model", "invalid_type"),
    ("chat/completions", {"model": ["m"], "messages": [1]}, "model", "invalid_type"),
    ("chat/completions", {"model": "m", "messages": [1], "models": "m"}, "models", "invalid_request"),
    ("chat/completions", {"model": "m", "messages": [1], "models": ["m", 1]}, "models", "invalid_request"),
    ("chat/completions", {"model": "m", "messages": [1], "models": ["m", ""]}, "models", "invalid_request"),
    ("chat/completions", {"model": "m", "messages": [1], "fallbacks": "m"}, "fallbacks", "invalid_request"),
    ("chat/completions", {"model": "m", "messages": [1], "fallbacks": [7]}, "fallbacks", "invalid_request"),
    ("chat/completions", {"model": "m", "messages": [1], "fallbacks": [{"model": ["n"]}]}, "fallbacks", "invalid_request"),
    ("responses", {"model": "m", "background": True}, "background", "unsupported_parameter"),
    ("responses", {"model": "m", "conversation": {"id": "conv_1"}}, "conversation", "unsupported_parameter"),
])  # fmt: skip
def test_what_is_missing_or_wrong_is_named(endpoint, body, param, code):
    """A field that is missing or of the wrong type is named in the error."""
    error = refusal(admitted, body, endpoint=endpoint)
    assert (error.param, error.error_code, error.status_code) == (param, code, 400)
    assert f"`{param}`" in error.message or error.message.startswith("Background")


@pytest.mark.parametrize("field", [*NEVER, "models", "provider", "plugins", "speed", "preset", "tools"])
def test_a_fallback_names_a_model_and_nothing_that_chooses_another(field):
    """What is looked at in a body can't hide in one of its fallbacks."""
    body = {"model": "m", "messages": [1], "fallbacks": [{"model": "n", field: "x"}]}
    assert f"`{field}`" in refusal(admitted, body).message
    assert admitted({**body, "fallbacks": ["n", {"model": "n", "temperature": 1}]})


@pytest.mark.parametrize("body, message", [
    ({"models": "m"}, "`models` must be a list of model names."),
    ({"model": 7}, "`model` must be a string."),
    ({"fallbacks": "m"}, "`fallbacks` must be a list."),
    ({"fallbacks": [{}]}, "`fallbacks` must be a list of objects with a `model`."),
    ({"fallbacks": ["n", {"model": "n", "tools": []}]}, "A fallback can't have `tools`."),
    ({"model": "a/b:online"}, "`:online` is not allowed on this gateway."),
    ({"model": "@preset/mine"}, "Presets are not allowed on this gateway."),
    ({"model": "openrouter/auto"}, "Automatic routers are not allowed on this gateway."),
])  # fmt: skip
def test_a_refusal_is_a_sentence(body, message):
    """Whoever reads the error knows what to change."""
    error = refusal(admitted, {"model": "m", "messages": [1], **body}, ["models", "fallbacks"])
    assert (error.message, error.param) == (message, *body)


def test_a_request_names_so_many_models_and_no_more():
    """Each model that is named is looked at several times: there is an end to them, and to their length."""
    body = {"model": "m", "messages": [1]}
    fits = {**body, "models": ["n"] * (MOST_MODELS - 1)}
    assert admitted(dict(fits)).body == fits
    error = refusal(admitted, {**body, "models": ["n"] * MOST_MODELS})
    assert (error.message, error.param) == (f"A request may name {MOST_MODELS} models at most.", "models")
    longest = {**body, "model": "m" * LONGEST_MODEL}
    assert admitted(dict(longest)).body == longest
    error = refusal(admitted, {**body, "fallbacks": ["m" * (LONGEST_MODEL + 1)]})
    assert (error.message, error.param) == (f"A model's name has {LONGEST_MODEL} characters at most.", "model")


@pytest.mark.parametrize("body, target, chooses", [
    ({"model": "a"}, Target("vendor/a", "u"), False),
    ({"model": "a", "temperature": 1}, Target("vendor/a", "u", overrides={"temperature": 0}), False),
    # the client's own lists
    ({"model": "a", "models": ["b"]}, Target("vendor/a", "u"), True),
    ({"model": "a", "fallbacks": ["b"]}, Target("vendor/a", "u"), True),
    ({"model": "a", "preset": "p"}, Target("vendor/a", "u"), True),
    ({"model": "a", "models": ["b"]}, Target("vendor/a", "u", strip=("models", "fallbacks", "preset")), False),
    # what the operator's target says
    ({"model": "a"}, Target("vendor/a", "u", overrides={"models": ["b"]}), True),
    ({"model": "a"}, Target("vendor/a@preset/p", "u"), True),
    ({"model": "a"}, Target("@preset/p", "u"), True),
    ({"model": "a"}, Target("~vendor/a-latest", "u"), True),
    ({"model": "a"}, Target("openrouter/auto", "u"), True),
    ({"model": "a"}, Target("vendor/openrouter/~a", "u"), False),
])  # fmt: skip
def test_who_may_answer_with_another_model_is_known(body, target, chooses):
    """An answer's model is checked, and priced, as another only where the upstream was free to choose it."""
    assert may_choose(body, target) is chooses


@pytest.mark.parametrize("given, became", [
    ({"models": ["a"]}, {"model": "a"}),
    ({"model": "", "models": ["a", "b"]}, {"model": "a", "models": ["b"]}),
    ({"model": None, "models": ["a", "b", "c"]}, {"model": "a", "models": ["b", "c"]}),
    ({"model": "a", "models": ["b"]}, {"model": "a", "models": ["b"]}),
])  # fmt: skip
def test_the_first_of_several_models_is_the_model(given, became):
    """`models` without `model`: the first is asked for like any model, and may be an alias; it goes out once."""
    assert admitted({"messages": [1], **given}).body == {"messages": [1], **became}


@pytest.mark.parametrize("body", [
    {"model": "m", "messages": [1], "fallbacks": None, "models": None},
    {"model": "m", "messages": []},
    {"model": "m", "messages": [1], "fallbacks": [{"model": "n"}]},
])  # fmt: skip
def test_what_is_there_is_enough(body):
    """Several models instead of one, an explicit null, an empty list: what an upstream may judge, it judges."""
    assert admitted(dict(body)).body == body
    assert admitted({"model": "m", "input": "x", "background": False}, endpoint="responses").body["background"] is False


PRESETS = ["@preset/mine", "openai/gpt-5@preset/mine"]
AUTO = ["openrouter/auto", "openrouter/bodybuilder", "openrouter/pareto", "vendor/auto"]
PLAIN = ["openai/gpt-5", "openrouter/automatic", "auto", "vendor/auto-1", "openrouter/other", "preset/mine"]


@pytest.mark.parametrize("where", ["model", "models", "fallbacks"])
@pytest.mark.parametrize("model, needed", [*((m, "presets") for m in PRESETS), *((m, "auto_routers") for m in AUTO), *((m, None) for m in PLAIN)])  # fmt: skip
def test_presets_and_auto_routers_need_a_permission(model, needed, where):
    """A preset or an auto-router lets somebody else choose model and price, wherever it is named."""
    body = {"model": "m", "messages": [1], where: model if where == "model" else [model]}
    assert admitted(dict(body)).body == body
    assert needed is None or admitted(dict(body), ["models", "fallbacks", needed])
    without = [p for p in ALL if p != needed]
    if needed is None:
        admitted(dict(body), ["models", "fallbacks"])
        return
    error = refusal(admitted, dict(body), without)
    assert (error.error_code, error.param, "not allowed" in error.message) == ("model_not_allowed", "model", True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", ["model", "models", "fallbacks"])
def test_a_variant_of_a_model_needs_what_it_stands_for(variant, where):
    """`:online` is a plugin by another name, `:nitro` a dearer provider and tier: each needs the field's permission."""
    for model in (f"a/b:{variant}", f"a/b:{variant.upper()}", f"a/b:{variant}:free", f"a/b:free:{variant}"):
        body = {"model": "m", "messages": [1], where: model if where == "model" else [model]}
        assert admitted(dict(body)).body == body
        for missing in VARIANTS[variant]:
            error = refusal(admitted, dict(body), [p for p in ALL if p != missing])
            assert (error.error_code, error.param) == ("model_not_allowed", "model")
    assert admitted({"model": "a/b:free", "messages": [1]}, [])


@pytest.mark.parametrize("body, models", [
    ({}, []),
    ({"model": "a"}, ["a"]),
    ({"model": "a", "models": ["b", "", "c"]}, ["a", "b", "c"]),
    ({"models": ["b"]}, ["b"]),
    ({"model": "a", "fallbacks": [{"model": "b"}, "c", {}, None]}, ["a", "b", "c"]),
    ({"model": "a", "fallbacks": {"model": "b"}}, ["a"]),
    ({"model": "a", "models": ["b"], "fallbacks": ["c"]}, ["a", "b", "c"]),
    ({"model": "a", "preset": "p", "models": ["b"]}, ["a", "@preset/p", "b"]),
])  # fmt: skip
def test_every_model_that_is_named_is_found(body, models):
    """Scopes and prices see each model that OpenRouter might take."""
    assert asked_models(body) == models


def test_a_value_of_a_plugin_becomes_a_forms_text():
    """A form holds text: what a plugin sets otherwise is written as JSON."""
    assert json_form_value("text") == "text"
    assert msgspec.json.decode(json_form_value({"a": [1, True]})) == {"a": [1, True]}
    assert json_form_value(False) == "false"


def test_long_content_types_are_not_kept():
    """Whatever clients write behind a media type, such as the boundary that each form has anew, costs no memory."""
    made = exchange()
    with kept() as held:
        for n in range(200):
            parse_body(made, f"application/json; x={n:030000}")
    assert held[0] < 500_000
