"""Who asks, where proxies stand in front: what they say in `X-Forwarded-For`, as far as they are trusted."""

from __future__ import annotations

import functools
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

Peer: TypeAlias = "tuple[Any, ...] | str | None"  # as sockets name it: text where it is a Unix socket's

UNIX = "unix"
HOPS = 16  # more are not looked at
_LONGEST = 64  # characters: an IPv6 in full, with zone and port


class TrustedProxies:
    """Those of `server.trusted_proxies`: networks, and `unix` for whoever connects to the Unix socket."""

    def __init__(self, named: Sequence[str]) -> None:
        self._unix = UNIX in named
        self._networks = tuple(ip_network(name) for name in named if name != UNIX)

    def client(self, peer: Peer, told: Sequence[str]) -> str | None:
        """The nearest address that is no trusted proxy's; `told`: each `X-Forwarded-For`, as they came.

        Each proxy adds on the right whom it saw. What stands left of an address that is not trusted is that one's word.
        """
        nearest = str(peer[0]) if isinstance(peer, tuple) else peer
        if not (self._trusts(nearest) if isinstance(peer, tuple) else self._unix):
            return nearest
        for said in reversed(",".join(told).rsplit(",", HOPS)[-HOPS:]):
            address = _address(said)
            if address is None:
                break
            nearest = str(address)
            if not self._trusts(nearest):
                break
        return nearest

    def _trusts(self, text: str | None) -> bool:
        address = _address(text or "")
        return address is not None and any(address in network for network in self._networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """With or without a port, as proxies differ; None: it is none."""
    text = text.strip()
    return _parsed(text) if len(text) <= _LONGEST else None


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
