"""An input file before anything of it runs: read once, piece by piece, and every mistake named with its line."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from gateway_plugins.jobs.batches.store import Chunk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway_plugins.jobs.settings import Batches as Settings

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MOST_ERRORS = 100
MOST_INPUTS = 50_000  # of all embeddings of a batch, as OpenAI has it
LONGEST_ID = 256
BREATH_BYTES = 128 << 10  # after which others have their turn: a piece of the storage has thousands of lines
CHUNK_BYTES = 4 << 20  # a chunk is read whole: more than one line only up to here
_Mistake = tuple[str, str, str | None]  # code, message, param
_BOM = b"\xef\xbb\xbf"


class Line(msgspec.Struct):
    """As it is run; what stands beside these is nobody's business."""

    custom_id: str
    body: msgspec.Raw


line_of = msgspec.json.Decoder(Line).decode


class Lines:
    """The lines of a file with where they lie: number (from 1), first byte, number of bytes, and the line itself.

    The line is None if it is longer than `longest` bytes, which are read past. Blank lines are left out.
    """

    def __init__(self, pieces: AsyncIterator[bytes], longest: int) -> None:
        self._pieces = pieces
        self._longest = longest
        self._number, self._start, self._size = 1, 0, 0
        self._parts: list[bytes] = []

    async def __aiter__(self) -> AsyncIterator[tuple[int, int, int, bytes | None]]:
        async for piece in self._pieces:
            *whole, rest = piece.split(b"\n")
            for part in whole:
                self._grow(part)
                if (line := self._line()) != b"":
                    yield self._number, self._start, self._size, line
                self._number, self._start, self._size = self._number + 1, self._start + self._size + 1, 0
                self._parts.clear()
            self._grow(rest)
        if (line := self._line()) != b"":
            yield self._number, self._start, self._size, line

    def _grow(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._longest:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _line(self) -> bytes | None:
        return None if self._size > self._longest else clean(b"".join(self._parts), first=self._number == 1)


def clean(line: bytes, *, first: bool) -> bytes:
    """Without what editors put around a line."""
    return (line.removeprefix(_BOM) if first else line).strip()


class Checked:
    """What was found: `chunks` to run if there are no `errors`."""

    def __init__(self, endpoint: str, settings: Settings, may_use: Callable[[str], bool]) -> None:
        self.errors: list[dict[str, Any]] = []
        self.chunks: list[Chunk] = []
        self.model: str | None = None  # if it is one for all
        self._endpoint = endpoint
        self._settings = settings
        self._may_use = may_use
        self._models: dict[str, bool] = {}
        self._ids: set[str] = set()
        self._count = 0
        self._inputs = 0
        self._start = self._end = self._first = 0
        self._waiting: list[str] = []

    async def read(self, pieces: AsyncIterator[bytes], longest: int) -> None:
        """All of it, unless there are more mistakes than anybody reads."""
        looked_at = 0
        async for number, start, size, line in Lines(pieces, longest):
            if (looked_at := looked_at + size) > BREATH_BYTES:
                looked_at = 0
                await asyncio.sleep(0)
            self._count += 1
            if self._count > self._settings.max_lines:
                self._wrong("too_many_requests", f"A batch has {self._settings.max_lines} lines at most.", number)
                return
            if line is None:
                self._wrong("line_too_long", f"This line is longer than {longest:,} bytes.", number)
            elif (custom_id := self._check(line, number)) is not None:
                self._add(custom_id, start, size)
            if len(self.errors) >= MOST_ERRORS:
                return
        self._cut()
        if not self._count:
            self._wrong("empty_file", "The file has no requests.", None)
        if self._inputs > MOST_INPUTS:
            self._wrong("too_many_inputs", f"All lines together may have {MOST_INPUTS:,} inputs at most.", None)
        if len(self._models) == 1:
            self.model = next(iter(self._models))

    def _check(self, line: bytes, number: int) -> str | None:
        """Its custom_id, if there is nothing wrong with it."""
        try:
            request = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._wrong("invalid_json_line", "This line is not valid JSON.", number)
            return None
        wrong = _mistake(request, self._endpoint)
        if wrong is None:
            wrong = self._against_others(request)
        if wrong is None:
            return str(request["custom_id"])
        self._wrong(wrong[0], wrong[1], number, wrong[2])
        return None

    def _against_others(self, request: dict[str, Any]) -> _Mistake | None:
        custom_id, body = request["custom_id"], request["body"]
        if custom_id in self._ids:
            return "duplicate_custom_id", f"The custom_id {custom_id[:100]!r} stands in another line too.", "custom_id"
        self._ids.add(custom_id)
        model = body["model"]
        if model not in self._models:
            self._models[model] = self._may_use(model)
        if not self._models[model]:
            message = f"The model {model[:100]!r} does not exist or this key has no access to it."
            return "model_not_found", message, "body.model"
        if self._endpoint.endswith("/embeddings"):
            inputs = body.get("input")
            self._inputs += len(inputs) if isinstance(inputs, list) else 1
        return None

    def _add(self, custom_id: str, start: int, size: int) -> None:
        full = len(self._waiting) >= self._settings.chunk_lines
        if self._waiting and (full or start + size - self._start > CHUNK_BYTES):
            self._cut()
        if not self._waiting:
            self._start = start
        self._waiting.append(custom_id)
        self._end = start + size

    def _cut(self) -> None:
        if self._waiting:
            length = self._end - self._start
            self.chunks.append(Chunk(len(self.chunks), self._first, self._start, length, self._waiting))
            self._first += len(self._waiting)
            self._waiting = []

    def _wrong(self, code: str, message: str, line: int | None, param: str | None = None) -> None:
        self.errors.append({"code": code, "message": message, "param": param, "line": line})


def _mistake(request: Any, endpoint: str) -> _Mistake | None:
    """What is wrong with this line by itself."""
    if not isinstance(request, dict):
        return "invalid_request", "A line must be a JSON object.", None
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_ID or "\0" in custom_id:
        return "missing_required_parameter", f"`custom_id` must be 1 to {LONGEST_ID} characters.", "custom_id"
    if request.get("method") != "POST":
        return "invalid_method", "`method` must be POST.", "method"
    if request.get("url") != endpoint:
        return "invalid_url", f"`url` must be the batch's endpoint, {endpoint}.", "url"
    if not isinstance(body, dict):
        return "missing_required_parameter", "`body` must be a JSON object.", "body"
    if not isinstance(body.get("model"), str) or not body["model"]:
        return "missing_required_parameter", "`body.model` must name a model.", "body.model"
    for name in ("stream", "background"):
        if body.get(name):
            return "unsupported_parameter", f"`{name}` can't be used within a batch.", f"body.{name}"
    return None
