"""Transports: what implements `upstream.Transport`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    from gateway.upstream import Transport


class Options(TypedDict):
    """What every transport takes, as `HttpTransport` says."""

    connect_timeout: float
    max_connections: NotRequired[int]
    max_reply: int
    ca_file: NotRequired[Path | None]


def open_transport(
    kind: Literal["httptools", "aiohttp"], base_url: str, *, proxy: str | None = None, **options: Unpack[Options]
) -> Transport:
    """The transport of this kind; nothing is connected yet. Raises OSError if `ca_file` can't be used.

    Each is loaded where it is used: aiohttp's client is not needed beside the other.
    """
    if kind == "aiohttp":
        from gateway.transport.aiohttp_client import AiohttpTransport  # noqa: PLC0415

        return AiohttpTransport(base_url, **options)
    from gateway.transport.http import HttpTransport  # noqa: PLC0415

    return HttpTransport(base_url, proxy=proxy, **options)
