"""Is an answer the JSON that was asked for?"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from plugin_objects import exchange

from gateway import Target
from gateway.kit.upstream import chat_completion, response_object, tool_call
from gateway_plugins.fallback import outputs
from gateway_plugins.fallback.outputs import fits

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"]}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
    "required": ["name", "age"],
}  # fmt: skip
IN_CHAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}
IN_RESPONSES = {"text": {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}}
OBJECT = {"response_format": {"type": "json_object"}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "get_weather"}}]}
GOOD = '{"name": "Ann", "age": 3, "tags": ["a"]}'


def is_invalid(asked, body, **target):
    return outputs.is_invalid(asked, Target("m", "openrouter", **target), body)


def chat(text, **asked):
    return is_invalid(exchange({"model": "m", **asked}), json.dumps(chat_completion(text)).encode())


@pytest.mark.parametrize(
    ("text", "invalid"),
    [
        (GOOD, False), ('{"name": "Ann", "age": null}', False), ('{"name": "Ann", "age": 3.0, "more": 1}', False),
        ("Sure! " + GOOD, True), ("```json\n" + GOOD + "\n```", True), (GOOD[:-1], True), ("", True), ("[]", True),
        ('{"name": "Ann"}', True), ('{"name": 1, "age": 3}', True), ('{"name": "Ann", "age": 3.5}', True),
        ('{"name": "Ann", "age": true}', True), ('{"name": "Ann", "age": 3, "tags": ["c"]}', True),
    ],
)  # fmt: skip
def test_text_must_keep_to_its_schema(text, invalid):
    """In chat completions and in responses alike: JSON alone, of the type that was asked for, with what is required."""
    assert chat(text, **IN_CHAT) is invalid
    asked = exchange({"model": "m", "input": "x", **IN_RESPONSES}, endpoint="responses")
    assert is_invalid(asked, json.dumps(response_object(text)).encode()) is invalid


def test_a_json_object_is_any_object():
    """`json_object` wants an object, whatever stands in it."""
    assert [chat(text, **OBJECT) for text in ("{}", '{"a": [1]}', "[]", "1", "{")] == [False, False, True, True, True]


def test_plain_text_may_be_anything():
    """Who asked for no JSON gets whatever the model says; an endpoint that knows no format is left alone."""
    assert not chat("Sure!")
    assert not chat("Sure!", response_format={"type": "text"})
    assert not is_invalid(exchange({"model": "m", **OBJECT}, endpoint="messages"), b"Sure!")


@pytest.mark.parametrize(
    ("arguments", "invalid"),
    [('{"city": "Rome"}', False), ("", False), ('{"city": ', True), ("Rome", True), ("5", True), ("[]", True)],
)
def test_arguments_of_tool_calls_must_be_json(arguments, invalid):
    """A tool call that no client can parse is no good answer; one without arguments is."""
    call = tool_call()
    call["function"]["arguments"] = arguments
    reply = chat_completion(None)
    reply["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert is_invalid(exchange({"model": "m", **TOOLS, **IN_CHAT}), json.dumps(reply).encode()) is invalid
    asked = exchange({"model": "m", "input": "x", **TOOLS}, endpoint="responses")
    reply = response_object("x")
    reply["output"].append({"type": "function_call", "name": "get_weather", "arguments": arguments, "call_id": "c"})
    assert is_invalid(asked, json.dumps(reply).encode()) is invalid


@pytest.mark.parametrize(
    ("arguments", "invalid"),
    [(GOOD, False), ('{"name": "Ann"}', True), ("", True), ('{"name": 1, "age": 3}', True), ("5", True)],
)
def test_arguments_of_tool_calls_must_keep_to_the_tools_schema(arguments, invalid):
    """A call without what its tool requires is no good answer, in chat completions and in responses alike."""
    function = {"name": "greet", "parameters": SCHEMA}
    reply = chat_completion(None)
    call = {"id": "c", "type": "function", "function": {"name": "greet", "arguments": arguments}}
    reply["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    asked = exchange({"model": "m", "tools": [{"type": "function", "function": function}]})
    assert is_invalid(asked, json.dumps(reply).encode()) is invalid
    asked = exchange({"model": "m", "input": "x", "tools": [{"type": "function", **function}]}, endpoint="responses")
    reply = response_object("x")
    reply["output"].append({"type": "function_call", "name": "greet", "arguments": arguments, "call_id": "c"})
    assert is_invalid(asked, json.dumps(reply).encode()) is invalid


@pytest.mark.parametrize("tools", [1, [1], [{"function": 1}], [{"name": [1]}], [{"name": "x", "parameters": 1}]])
def test_tools_of_no_known_shape_break_nothing(tools):
    """What a client calls tools never breaks the check."""
    assert not is_invalid(exchange({"model": "m", "tools": tools}), json.dumps(chat_completion("Hi")).encode())


def test_what_a_target_adds_or_takes_out_counts():
    """A task's own format holds as a client's does; a format that was not sent upstream is not asked of the answer."""
    reply = json.dumps(chat_completion("Sure!")).encode()
    assert is_invalid(exchange({"model": "m"}), reply, overrides=IN_CHAT)
    assert not is_invalid(exchange({"model": "m", **IN_CHAT}), reply, strip=("response_format",))


def test_a_refusal_is_an_answer():
    """A model that declines in the field for it has not failed at JSON."""
    reply = chat_completion(None)
    reply["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I can't."}
    assert not is_invalid(exchange({"model": "m", **IN_CHAT}), json.dumps(reply).encode())


@pytest.mark.parametrize(
    "body", [b"{}", b'{"choices": 1}', b'{"choices": [{"message": null}]}', b"{", b"\xff", b"[" * 9999]
)
def test_a_reply_of_no_known_shape_is_invalid(body):
    """Whatever the upstream sends: no exception."""
    assert is_invalid(exchange({"model": "m", **IN_CHAT}), body)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
types = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])
schemas = st.recursive(
    st.fixed_dictionaries({}, optional={"type": types | st.lists(types, min_size=1, max_size=2, unique=True)}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": types,
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "items": inner,
        },
    ),
    max_leaves=6,
)


@given(json_values, schemas)
def test_the_plain_part_of_a_schema_is_checked_as_the_standard_says(value, schema):
    """For types, properties, required names and items the verdict is a full validator's."""
    assert fits(value, schema) is Draft202012Validator(schema).is_valid(value)


@given(json_values, json_values)
def test_a_schema_may_be_anything(value, schema):
    """What a client calls a schema never breaks the check."""
    fits(value, {"type": schema, "properties": schema, "items": schema, "required": schema, "enum": schema})
