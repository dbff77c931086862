from types import SimpleNamespace

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from plugin_objects import exchange

from gateway.dialects import COMMON_HEADERS, DIALECTS
from gateway.errors import PluginError
from gateway.exchange import Form, FormFile, Limits, RequestView, Target
from gateway.incoming import parse_form
from gateway.outgoing import attempt_for, bad_body, target_body, write_form

MESSAGES = [{"role": "user", "content": "Hi"}]
OPENROUTER_ONLY = {
    "models": ["b"], "fallbacks": ["c"], "route": "fallback", "provider": {"sort": "price"}, "plugins": [],
    "usage": {"include": True}, "transforms": [], "session_id": "s", "trace": {},
}  # fmt: skip


def upstream(kind="openrouter", provider=None, **headers):
    return SimpleNamespace(kind=kind, settings=SimpleNamespace(provider=provider or {}), headers=headers)


def body_for(body, target=None, endpoint="chat/completions", **server):
    made = exchange(dict(body), endpoint=endpoint)
    before = msgspec.json.encode(made.body)
    out = target_body(made, target or Target("a", "u"), upstream(**server))
    assert msgspec.json.encode(made.body) == before
    return out


def test_the_body_is_the_clients_but_for_the_model():
    """Fields that nobody knows pass as they are; the target's model replaces the asked one."""
    body = {"model": "alias", "messages": MESSAGES, "unknown_field": {"x": [1, None]}, "temperature": 0.1}
    assert body_for(body) == {**body, "model": "a"}
    assert body_for({**body, **OPENROUTER_ONLY}) == {**body, **OPENROUTER_ONLY, "model": "a"}


def test_a_target_sets_and_strips_fields():
    """What the operator sets for a target wins over the client, what it strips is gone, and no other target is touched."""
    target = Target("a", "u", overrides={"temperature": 0, "model": "b"}, strip=("top_p", "absent"))
    out = body_for({"model": "x", "messages": MESSAGES, "temperature": 1, "top_p": 0.5}, target)
    assert out == {"model": "b", "messages": MESSAGES, "temperature": 0}


def test_what_a_dialect_forces_wins():
    """/responses is never stored upstream, whatever the client says."""
    assert body_for({"model": "x", "store": True}, endpoint="responses")["store"] is False
    assert "store" not in body_for({"model": "x", "messages": MESSAGES})


def test_another_server_gets_no_field_of_openrouters():
    """A compatible server is spared fields that it would answer with `unknown parameter`."""
    body = {"model": "x", "messages": MESSAGES, "user": "u"}
    assert body_for({**body, **OPENROUTER_ONLY}, kind="openai") == {**body, "model": "a"}


def test_a_targets_own_limits_win():
    """What a target says of its time holds, the settings' limits for the rest."""
    made = exchange({"model": "x", "messages": MESSAGES})
    limits = Limits(10, 20, 30)
    made.snapshot = snapshot(upstream(), limits, {"chat/completions": ()})
    assert attempt_for(made, Target("a", "u")).limits == limits
    assert attempt_for(made, Target("a", "u", limits=Limits(first_event=1))).limits == Limits(1, 20, 30)
    assert attempt_for(made, Target("a", "u", limits=Limits(stall=2, total=3))).limits == Limits(10, 2, 3)


@pytest.mark.parametrize("asked", [None, {}, {"include_usage": False, "other": 1}, "nonsense"])
def test_another_server_is_asked_for_usage(asked):
    """A compatible server tells what a stream cost only if asked: it is always asked."""
    body = {
        "model": "x",
        "messages": MESSAGES,
        "stream": True,
        **({"stream_options": asked} if asked is not None else {}),
    }
    kept = {k: v for k, v in (asked if isinstance(asked, dict) else {}).items() if k != "include_usage"}
    assert body_for(body, kind="openai")["stream_options"] == {**kept, "include_usage": True}
    assert body_for(body).get("stream_options") == asked
    assert "stream_options" not in body_for({"model": "x", "messages": MESSAGES}, kind="openai")
    assert "stream_options" not in body_for({"model": "x", "stream": True}, kind="openai", endpoint="responses")


def test_the_operators_provider_wins():
    """What the operator set in `provider` holds; the rest is the client's to say."""
    own = {"data_collection": "deny"}
    body = {"model": "x", "messages": MESSAGES, "provider": {"data_collection": "allow", "sort": "price"}}
    assert body_for(body, provider=own)["provider"] == {"data_collection": "deny", "sort": "price"}
    for odd in (None, "nonsense", []):
        assert body_for({**body, "provider": odd}, provider=own)["provider"] == own
    assert body_for({"model": "x", "messages": MESSAGES}, provider=own)["provider"] == own
    assert "provider" not in body_for(body, provider=own, kind="openai")


@pytest.mark.parametrize("server, target, client, sent", [
    # what is said of the target, then of its upstream, then the client's
    ({"sort": "latency", "zdr": True}, {"sort": "throughput"}, {"sort": "price", "only": ["x"]},
     {"sort": "throughput", "zdr": True, "only": ["x"]}),
    (None, {"sort": "throughput"}, {"sort": "price", "only": ["x"]}, {"sort": "throughput", "only": ["x"]}),
    (None, {"sort": "throughput"}, None, {"sort": "throughput"}),
    ({"zdr": True}, {}, {"only": ["x"]}, {"zdr": True, "only": ["x"]}),
])  # fmt: skip
def test_providers_are_preferred_by_who_knows_best(server, target, client, sent):
    """Preference by preference: the target's, its upstream's, then the client's own."""
    body = {"model": "x", "messages": MESSAGES, **({"provider": client} if client else {})}
    assert body_for(body, Target("a", "u", overrides={"provider": target}), provider=server)["provider"] == sent


def test_a_stripped_provider_is_not_the_clients_to_say():
    """A target that strips `provider` takes the client's away; what the operator set still holds."""
    body = {"model": "x", "messages": MESSAGES, "provider": {"sort": "price"}}
    target = Target("a", "u", strip=("provider",))
    assert "provider" not in body_for(body, target)
    assert body_for(body, target, provider={"zdr": True})["provider"] == {"zdr": True}


def test_what_a_plugin_made_unsendable_is_the_plugins_failure():
    """A body that can't be written is told to the operator with who may have edited it; the client learns nothing of it."""
    made = exchange()
    made.body["bad"] = object()
    made.snapshot = snapshot(upstream(), Limits(), {"chat/completions": ()})
    made.snapshot.hooks = SimpleNamespace(
        prepare_request=[SimpleNamespace(plugin="first"), SimpleNamespace(plugin="second")]
    )
    with structlog.testing.capture_logs() as lines, pytest.raises(PluginError):
        attempt_for(made, Target("m", "u"))
    [line] = lines
    assert made.error_by == "first.prepare_request, second.prepare_request"
    assert line.pop("found") == "what is no JSON: Encoding objects of type object is unsupported"
    assert line == {
        "event": "plugin_left_bad_body",
        "log_level": "error",
        "plugins": ["first", "second"],
        "request_id": made.request_id,
    }


def test_who_is_known_to_have_failed_stays_so():
    """The plugin that is known to have spoiled a body is not hidden by all those that might have; logs stay short."""
    made = exchange()
    made.snapshot.hooks = SimpleNamespace(prepare_request=[SimpleNamespace(plugin="other")])
    made.error_by = "known.prepare_request"
    with structlog.testing.capture_logs() as lines:
        bad_body(made, "x" * 5000)
    assert made.error_by == "known.prepare_request"
    assert lines[0]["found"] == "x" * 200


def snapshot(server, limits, forwarded, *, send_request_id=False):
    return SimpleNamespace(
        upstreams={"u": server},
        derived=SimpleNamespace(limits=limits, forwarded=forwarded),
        settings=SimpleNamespace(upstream=SimpleNamespace(send_request_id=send_request_id)),
    )


def attempt(
    body, headers=(), *, endpoint="chat/completions", form=None, raw=b"", target=None, send_request_id=False, **server
):
    made = exchange(dict(body), endpoint=endpoint)
    made.form, made.raw_body = form, raw
    made.request = RequestView("POST", "/", CIMultiDictProxy(CIMultiDict(headers)))
    target = target or Target(body.get("model", "a"), "u")
    forwarded = {endpoint: (*COMMON_HEADERS, *DIALECTS[endpoint].headers)}
    made.snapshot = snapshot(upstream(**server), Limits(1, 2), forwarded, send_request_id=send_request_id)
    return attempt_for(made, target)


def test_only_listed_headers_pass():
    """Headers go by an allow-list: nothing that carried a credential, a cookie or a client's address."""
    sent = {
        "X-Title": "App", "OpenAI-Beta": "v2", "anthropic-version": "1", "Authorization": "Bearer secret",
        "Cookie": "a=b", "X-Forwarded-For": "192.0.2.1", "X-OpenRouter-Cache": "true", "X-Session-Id": "bad\udcff",
    }  # fmt: skip
    made = attempt({"model": "m", "messages": MESSAGES}, sent.items(), Authorization="Bearer own")
    assert dict(made.headers) == {"Authorization": "Bearer own", "x-title": "App", "openai-beta": "v2"}
    assert msgspec.json.decode(made.body) == {"model": "m", "messages": MESSAGES}
    assert (made.target.model, made.limits) == ("m", Limits(1, 2))


def test_the_request_s_id_goes_up():
    """The upstream gets the id under which the request is logged here, if the settings say so."""
    body = {"model": "m", "messages": MESSAGES}
    assert attempt(body, send_request_id=True).headers["X-Request-Id"].startswith("req_")
    assert "X-Request-Id" not in attempt(body).headers


def test_a_stream_is_asked_for_as_one():
    """The upstream is told that events are wanted, where the client wants them."""
    body = {"model": "m", "messages": MESSAGES}
    assert attempt({**body, "stream": True}).headers["Accept"] == "text/event-stream"
    assert "Accept" not in attempt(body).headers


text = st.text(st.characters(codec="utf-8", exclude_characters='\0"\r\n\\'), max_size=12)
names = st.text("abcdefgh_-é ", min_size=1, max_size=8).filter(lambda n: n == n.strip())


@given(
    st.dictionaries(names, text | st.lists(text, min_size=1, max_size=3), max_size=4),
    st.lists(st.tuples(names, names, st.sampled_from(["audio/wav", "text/plain"]), st.binary(max_size=40)), max_size=3),
)
def test_a_form_written_anew_is_read_the_same(body, files):
    """A form that a plugin changed arrives whole: each field, list item and file."""
    given_files = [FormFile(*f) for f in files]
    raw, kind = write_form(body, Form([], given_files))
    main, _, parameters = kind.partition(";")
    found = parse_form(raw, parameters)
    assert main == "multipart/form-data"
    assert found.fields == [
        (n, v) for n, value in body.items() for v in (value if isinstance(value, list) else [value])
    ]
    assert found.files == given_files


def test_a_boundary_cant_be_guessed():
    """Nobody can write a part of a form into the content of a file."""
    kinds = {write_form({}, Form([], []))[1] for _ in range(20)}
    assert len(kinds) == 20
    assert all(len(kind.partition("boundary=")[2]) >= 32 for kind in kinds)


def test_a_name_cant_break_out_of_its_header():
    """Quotes and line ends in names are written as browsers write them."""
    raw, _ = write_form({'a"\r\nX: y': "v"}, Form([], [FormFile("f", 'n"\r\n.wav', "t/x\r\nX: y", b"z")]))
    assert b'name="a%22%0D%0AX: y"\r\n' in raw
    assert b'name="f"; filename="n%22%0D%0A.wav"\r\nContent-Type: t/x%0D%0AX: y\r\n\r\nz\r\n' in raw


def test_an_unchanged_form_leaves_as_it_came():
    """A form that nobody changed leaves byte for byte; a change to a field is written."""
    form = Form([("model", "m"), ("language", "de")], [FormFile("file", "a.wav", "audio/wav", b"RIFF")])
    body, kind = {"model": "m", "language": "de"}, "multipart/form-data; boundary=theirs"
    kwargs = {"endpoint": "audio/transcriptions", "form": form, "raw": b"as it came"}
    same = attempt(body, {"Content-Type": kind}.items(), **kwargs)
    assert (same.body, same.headers["Content-Type"]) == (b"as it came", kind)
    assert attempt(body, **kwargs).headers["Content-Type"] == ""
    for changed in (
        attempt(body, target=Target("n", "u"), **kwargs),
        attempt({**body, "language": "en"}, **kwargs),
    ):
        found = parse_form(changed.body, changed.headers["Content-Type"])
        assert found.files == form.files
        assert found.fields != form.fields
        assert len(found.fields) == 2
