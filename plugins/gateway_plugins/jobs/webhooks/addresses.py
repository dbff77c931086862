"""Where messages may go. Whoever may name a URL could else have the gateway call what only it can reach."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

from yarl import URL

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

LONGEST = 2000

# IANA's registries of special addresses, multicast and reserved ones, and what clouds answer on beside them.
_FORBIDDEN = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
        "168.63.129.16/32",  # Azure's own services, on an address like any other
    )
)  # fmt: skip
# Of IPv6 only what is given out to networks: so no IPv4 address within an IPv6 one (mapped, compatible, NAT64), nothing
# local, no multicast. Of that not what has a meaning of its own: Teredo and its like, 6to4, documentation.
_GIVEN_OUT = IPv6Network("2000::/3")
_NOT_GIVEN_OUT = tuple(IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))


def is_public(address: Address) -> bool:
    """Anybody on the internet may be meant by it."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _FORBIDDEN)
    return address in _GIVEN_OUT and not any(address in network for network in _NOT_GIVEN_OUT)


@dataclass(frozen=True)
class Rules:
    """Which URLs may be called, and which addresses behind them."""

    allow_http: bool = False
    ports: frozenset[int] | None = frozenset({80, 443, 8080, 8443})  # None: any
    allow: tuple[Network, ...] = ()

    def admits(self, text: str) -> bool:
        """This address may be connected to. It is asked of the very address, after names were resolved."""
        try:
            address = ip_address(text)
        except ValueError:
            return False
        return is_public(address) or any(address in network for network in self.allow)

    def check(self, text: str) -> URL:
        """The URL, if it could be called. Raises ValueError that says why it never can; holds nothing of the URL."""
        if len(text) > LONGEST:
            raise ValueError(f"is longer than {LONGEST} characters")
        if not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
            raise ValueError("holds characters that a URL can't have; encode them")
        try:
            url = URL(text)
            host, port = url.raw_host, url.port
        except ValueError:
            raise ValueError("is not a URL") from None
        schemes = ("https", "http") if self.allow_http else ("https",)
        if url.scheme not in schemes or not host or not port:
            raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)} and name a host")
        if url.raw_user is not None or url.raw_password is not None:
            raise ValueError("must hold no user and no password")
        if self.ports is not None and port not in self.ports:
            raise ValueError(f"must use one of the ports {', '.join(str(p) for p in sorted(self.ports))}")
        self._check_host(host)
        return url.with_fragment(None)

    def _check_host(self, host: str) -> None:
        if _is_address(host):
            if not self.admits(host):
                raise ValueError("names an address that may not be called")
            return
        labels = host.rstrip(".").split(".")
        # 2130706433, 0x7f.1 and 127.1 are addresses to some
        if labels[-1].isdigit() or labels[-1].startswith("0x"):
            raise ValueError("names a host that is no name and no address")
        if not self.allow and (len(labels) == 1 or labels[-1] == "localhost"):
            raise ValueError("names a host of the gateway's own network")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
