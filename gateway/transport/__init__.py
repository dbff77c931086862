"""Transports: what implements `upstream.Transport`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.upstream import Transport


def open_transport(
    kind: Literal["httptools", "aiohttp"],
    base_url: str,
    *,
    connect_timeout: float,
    max_connections: int = 0,
    max_reply: int,
    ca_file: Path | None = None,
    proxy: str | None = None,
) -> Transport:
    """The transport of this kind; nothing is connected yet. Raises OSError if `ca_file` can't be used.

    Each is loaded where it is used: aiohttp's client is not needed beside the other.
    """
    if kind == "aiohttp":
        from gateway.transport.aiohttp_client import AiohttpTransport  # noqa: PLC0415

        return AiohttpTransport(
            base_url,
            connect_timeout=connect_timeout,
            max_connections=max_connections,
            max_reply=max_reply,
            ca_file=ca_file,
        )
    from gateway.transport.http import HttpTransport  # noqa: PLC0415

    return HttpTransport(
        base_url,
        connect_timeout=connect_timeout,
        max_connections=max_connections,
        max_reply=max_reply,
        ca_file=ca_file,
        proxy=proxy,
    )
