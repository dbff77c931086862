"""A multipart form with one file, read as it arrives: no more of it is in memory than what came last."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import multipart

from gateway import BadRequest, TooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FIELD_BYTES = 16 << 10  # of all fields but the file
PARTS = 32
LONGEST_NAME = 255
OVERHEAD = 1 << 20  # what a form may be larger than its file


class Form:
    """`begin`, then `content` to its end, then `end`; `fields` grow meanwhile. Each raises BadRequest, TooLarge."""

    def __init__(self, pieces: AsyncIterator[bytes], content_type: str, most: int) -> None:
        """`most`: bytes of the file."""
        kind, _, parameters = content_type.partition(";")
        boundary = re.search(r'boundary="?([^";,\s]{1,200})"?', parameters)
        if kind.strip().lower() != "multipart/form-data" or boundary is None:
            raise BadRequest("Send the file as multipart/form-data with a boundary.", status=415)
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.size = 0
        self._most = most
        self._room = FIELD_BYTES
        self._pieces = pieces
        # not strict: that refuses the line break that most clients send behind the end, if it comes by itself
        self._parser = multipart.PushMultipartParser(boundary[1], max_segment_count=PARTS)
        self._events = self._read()

    async def begin(self) -> None:
        """The fields before the file."""
        if not await self._until_file():
            raise BadRequest("The form has no file.", param="file", code="missing_required_parameter")

    async def content(self) -> AsyncIterator[bytes]:
        """The file."""
        async for event in self._events:
            if not isinstance(event, bytes | bytearray):
                return
            self.size += len(event)
            if self.size > self._most:
                raise TooLarge(f"The file is larger than {self._most:,} bytes.", param="file", code="file_too_large")
            yield bytes(event)

    async def end(self) -> None:
        """The fields behind the file."""
        if await self._until_file():
            raise BadRequest("The form has more than one file.", param="file")

    async def _until_file(self) -> bool:
        name, value = "", b""
        async for event in self._events:
            if isinstance(event, bytes | bytearray):
                self._room -= len(event)
                if self._room < 0:
                    raise TooLarge("The form's fields are too large.")
                value += event
            elif event is None:
                self._add(name, value)
            else:
                name, value = event.name or "", b""
                if name == "file":
                    self.filename = _named(event.filename)
                    return True
        return False

    def _add(self, name: str, value: bytes) -> None:
        if name in self.fields:
            raise BadRequest(f"The field {name[:100]!r} stands twice in the form.", param=name[:100])
        try:
            self.fields[name] = value.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"The field {name[:100]!r} is not UTF-8.", param=name[:100]) from None

    async def _read(self) -> AsyncIterator[multipart.MultipartSegment | bytearray | bytes | None]:
        parser = self._parser
        try:
            async for piece in self._pieces:
                for event in parser.parse(piece):
                    yield event
            parser.close()
        except multipart.ParserLimitReached as error:
            raise TooLarge(f"The form has too many or too large parts: {error}.") from None
        except (multipart.MultipartError, UnicodeError, ValueError) as error:
            raise BadRequest(f"The form is broken: {str(error)[:200]}.") from None


def _named(given: str | None) -> str:
    """What the client calls its file: shown again, and never a path of ours."""
    name = given or "file"
    if len(name) > LONGEST_NAME:
        raise BadRequest(f"The file's name is longer than {LONGEST_NAME} characters.", param="file")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
