"""A form is read as it arrives, whatever pieces it comes in, and what is wrong with it is said."""

import pytest

from gateway import BadRequest, TooLarge
from gateway_plugins.jobs.upload import Form

TYPE = "multipart/form-data; boundary=xyz"


def part(name, content, filename=None, newline=b"\r\n"):
    named = f'; filename="{filename}"' if filename is not None else ""
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"{named}'.encode()
    return head + newline * 2 + content + newline


def form(*parts, size=10**6, every=None, content_type=TYPE, end=b"--xyz--\r\n"):
    body = b"".join(parts) + end

    async def pieces():
        step = every or len(body)
        for at in range(0, len(body), step):
            yield body[at : at + step]

    return Form(pieces(), content_type, size)


async def read(found):
    await found.begin()
    content = b"".join([piece async for piece in found.content()])
    await found.end()
    return content


@pytest.mark.parametrize("every", [1, 2, 3, 7, 1000])
async def test_a_file_comes_out_as_it_was_whatever_pieces_it_comes_in(every):
    """Bytes that look like the boundary, or half of it, are the file's."""
    content = b'{"a": 1}\r\n--xy\r\n\r--xyzz\n\0\xff\r\n--x'
    found = form(part("purpose", b"batch"), part("file", content, "a.jsonl"), part("late", b"field"), every=every)
    assert await read(found) == content
    assert (found.fields, found.filename, found.size) == (
        {"purpose": "batch", "late": "field"},
        "a.jsonl",
        len(content),
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "../../etc/passwd"),
        ("C:\\\\dir\\\\a.jsonl", "a.jsonl"),  # as the oldest browsers write it
        ("a\0b\x1b[31m.jsonl", "a\ufffdb\ufffd[31m.jsonl"),
        ("", "file"),
        ("\N{SNOWMAN}.jsonl", "\N{SNOWMAN}.jsonl"),
    ],
)
async def test_what_a_client_calls_its_file_is_shown_and_steers_nothing(given, shown):
    found = form(part("file", b"x", given))
    await read(found)
    assert found.filename == shown


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda: form(part("purpose", b"batch")), BadRequest, "no file"),
        (lambda: form(part("file", b"x", "a"), part("file", b"y", "b")), BadRequest, "more than one file"),
        (lambda: form(part("a", b"1"), part("a", b"2"), part("file", b"x", "a")), BadRequest, "twice"),
        (lambda: form(part("a", b"\xff"), part("file", b"x", "a")), BadRequest, "not UTF-8"),
        (lambda: form(part("a", b"x" * 20_000), part("file", b"x", "a")), TooLarge, "fields"),
        (lambda: form(*[part(f"a{i}", b"") for i in range(40)], part("file", b"x", "a")), TooLarge, "too many"),
        (lambda: form(part("file", b"x", "a" * 300)), BadRequest, "longer than 255"),
        (lambda: form(part("file", b"x", "a" * 2**20)), TooLarge, "too large parts"),
        (lambda: form(part("file", b"x" * 11, "a"), size=10, every=4), TooLarge, "larger than 10 bytes"),
        (lambda: form(part("file", b"x", "a"), end=b""), BadRequest, "broken"),
        (lambda: form(part("file", b"x", "a", newline=b"\n")), BadRequest, "broken"),
        (lambda: form(part("file", b"x", "a"), content_type="application/json"), BadRequest, "multipart"),
        (lambda: form(part("file", b"x", "a"), content_type="multipart/form-data"), BadRequest, "boundary"),
        (lambda: form(b"hello", end=b""), BadRequest, "broken"),
    ],
)
async def test_what_is_wrong_with_a_form_is_said(made, error, said):
    with pytest.raises(error, match=said):
        await read(made())
