"""Who asks: where an answer goes, and what the asker still has to say. `server.py` makes both of a connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from multidict import CIMultiDict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class ClientGone(Exception):
    """The client left, or stopped reading."""


class Client(Protocol):
    """Where the answer goes. Each method raises ClientGone once the client left."""

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        """A whole reply; `progress` is called whenever the client has to be waited for anew."""

    async def start(self, status: int, headers: CIMultiDict[str]) -> None:
        """The head of a streamed reply."""

    async def write(self, data: bytes) -> None:
        """Some of its body; waits while the client is slow."""

    async def end(self) -> None:
        """Its proper end."""

    def abort(self) -> None:
        """Close the connection uncleanly."""


class DirectClient(ABC):
    """A client that can be written to without waiting, too: within the callback that read what is to be written."""

    __slots__ = ()

    @abstractmethod
    def open(self, status: int, headers: CIMultiDict[str]) -> None:
        """The head of a streamed reply, which goes out with what is put next."""

    @abstractmethod
    def put(self, data: bytes) -> bool:
        """Some of its body. False: the client is slow, and is not to be given more. Raises ClientGone."""

    @abstractmethod
    def when_room(self, call: Callable[[], None] | None) -> None:
        """Whom to call when a slow client has taken what waited for it."""


class Collected:
    """One that keeps what it is sent."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: CIMultiDict[str] = CIMultiDict()
        self._parts: list[bytes] = []

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    async def send(self, status: int, headers: CIMultiDict[str], body: bytes, progress: Callable[[], None]) -> None:
        del progress
        self.status, self.headers, self._parts = status, headers, [body]

    async def start(self, status: int, headers: CIMultiDict[str]) -> None:
        self.status, self.headers = status, headers

    async def write(self, data: bytes) -> None:
        self._parts.append(data)

    async def end(self) -> None: ...

    def abort(self) -> None:
        self.status = 502


class Inbound(Protocol):
    """What the client still has to say."""

    content_type: str

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises TooLarge, RequestTimeout, BadRequest or ClientGone."""

    def pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes. Raises as `read`, also in the middle."""
