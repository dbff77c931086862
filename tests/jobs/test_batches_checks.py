"""An input file is read once, in any pieces, and each of its mistakes is named with its line."""

import json

import pytest

from gateway_plugins.jobs.batches.checks import MOST_ERRORS, Checked, Lines, clean
from gateway_plugins.jobs.settings import Batches

CHAT = "/v1/chat/completions"


def request(custom_id="a", **changed):
    body = {"model": "test/model", "messages": [{"role": "user", "content": "Hello"}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changed}


def line(custom_id="a", **changed):
    return json.dumps(request(custom_id, **changed)).encode()


async def pieces(data, every):
    for at in range(0, len(data), every):
        yield data[at : at + every]


async def checked(data, *, every=1000, longest=10**6, endpoint=CHAT, may_use=lambda model: True, **settings):
    found = Checked(endpoint, Batches(**settings), may_use)
    await found.read(pieces(data, every), longest)
    return found


def errors(found):
    return [(error["line"], error["code"], error["param"]) for error in found.errors]


@pytest.mark.parametrize("every", [1, 2, 5, 64, 10_000])
async def test_chunks_hold_every_line_once_whatever_editors_did_to_the_file(every):
    """A BOM, CRLF, blank lines, spaces, and no line break at the end: each line is found again in its chunk's bytes."""
    data = b"\xef\xbb\xbf" + line("a") + b"\r\n\r\n  " + line("b") + b"  \n\n" + line("c") + b"\r\n" + line("d")
    found = await checked(data, every=every, chunk_lines=2)
    assert found.errors == []
    assert [(c.number, c.first, c.custom_ids) for c in found.chunks] == [(0, 0, ["a", "b"]), (1, 2, ["c", "d"])]
    for chunk in found.chunks:
        part = data[chunk.start : chunk.start + chunk.length]
        again = [x for p in part.split(b"\n") if (x := clean(p, first=chunk.start == 0))]
        assert [json.loads(x)["custom_id"] for x in again] == chunk.custom_ids
    assert found.model == "test/model"


@pytest.mark.parametrize("every", [1, 7, 10_000])
async def test_a_line_that_is_too_long_is_named_and_read_past(every):
    data = line("a") + b"\n" + b"x" * 5000 + b"\n" + line("b") + b"\n" + b"y" * 5000
    found = await checked(data, every=every, longest=1000)
    assert errors(found) == [(2, "line_too_long", None), (4, "line_too_long", None)]


async def test_long_lines_are_never_kept_whole():
    """What is longer than a line may be is dropped while it comes."""
    lines = Lines(pieces(b"x" * 100_000, 100), 1000)
    async for _ in lines:
        assert lines._parts == []
        return
    raise AssertionError


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (b'{"a": NaN}', "invalid_json_line", None),
        (b"[]", "invalid_request", None),
        (line(7), "missing_required_parameter", "custom_id"),
        (line(""), "missing_required_parameter", "custom_id"),
        (line("x" * 257), "missing_required_parameter", "custom_id"),
        (line("a\0"), "missing_required_parameter", "custom_id"),
        (line("good"), "duplicate_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/embeddings"), "invalid_url", "url"),
        (line(body="hello"), "missing_required_parameter", "body"),
        (line(body={}), "missing_required_parameter", "body.model"),
        (line(body={"model": "m", "stream": True}), "unsupported_parameter", "body.stream"),
        (line(body={"model": "m", "background": True}), "unsupported_parameter", "body.background"),
        (line(body={"model": "not/mine"}), "model_not_found", "body.model"),
    ],
)
async def test_a_mistake_is_named_with_its_line(bad, code, param):
    found = await checked(line("good") + b"\n\n" + bad + b"\n", may_use=lambda model: model != "not/mine")
    assert errors(found) == [(3, code, param)]


@pytest.mark.parametrize("data", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
async def test_a_file_without_requests_is_named_empty(data):
    assert errors(await checked(data)) == [(None, "empty_file", None)]


async def test_only_so_many_mistakes_are_told():
    found = await checked(b"{\n" * 5000)
    assert len(found.errors) == MOST_ERRORS


async def test_more_lines_than_a_batch_may_have_are_refused():
    data = b"\n".join(line(f"l{i}") for i in range(11))
    assert errors(await checked(data, max_lines=10)) == [(11, "too_many_requests", None)]


async def test_large_lines_make_small_chunks():
    """What a worker reads at once is bounded in bytes too."""
    big = {"model": "m", "messages": "x" * 3_000_000}
    data = b"\n".join(line(f"l{i}", body=big) for i in range(3))
    found = await checked(data, longest=10**7, every=100_000)
    assert [chunk.custom_ids for chunk in found.chunks] == [["l0"], ["l1"], ["l2"]]


async def test_inputs_of_all_embeddings_are_counted():
    made = [request(f"l{i}", url="/v1/embeddings", body={"model": "m", "input": ["x"] * 30_000}) for i in range(2)]
    data = b"\n".join(json.dumps(one).encode() for one in made)
    assert errors(await checked(data, endpoint="/v1/embeddings")) == [(None, "too_many_inputs", None)]
