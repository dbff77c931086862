import pytest
from plugin_objects import kept
from pydantic import ValidationError

from gateway.forwarded import HOPS, TrustedProxies
from gateway.kit.testing import Gateway
from gateway.settings import ServerSettings

PROXY, SECOND, OTHER = ("10.0.0.5", 41000), "10.0.0.6", ("192.0.2.1", 41000)
FULL = "fe80:1111:2222:3333:4444:5555:6666:7777"
TRUSTED = TrustedProxies(["10.0.0.0/24", "2001:db8::/32"])


@pytest.mark.parametrize(
    ("told", "client"),
    [
        ([], "10.0.0.5"),
        ([""], "10.0.0.5"),
        (["203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6", "203.0.113.9"], "203.0.113.9"),
        ([f"6.6.6.6,203.0.113.9 ,{SECOND}"], "203.0.113.9"),
        (["6.6.6.6, 10.0.0.7", f" {SECOND}"], "6.6.6.6"),
        ([SECOND], SECOND),
        (["6.6.6.6, unknown"], "10.0.0.5"),
        ([f"6.6.6.6, <script>, {SECOND}"], SECOND),
        (["6.6.6.6,"], "10.0.0.5"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["2001:db9::1"], "2001:db9::1"),
        (["6.6.6.6, [2001:db9::1]:4711"], "2001:db9::1"),
        (["6.6.6.6, 2001:db9::1, [2001:db8::7]"], "2001:db9::1"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        ([f"[{FULL}%enp199s0f1np1v7]:65535"], f"{FULL}%enp199s0f1np1v7"),
        ([f"{FULL}%{'x' * 25}"], "10.0.0.5"),
        (["6.6.6.6, 203.0.113.9, ::ffff:10.0.0.9"], "203.0.113.9"),
    ],
)
def test_the_right_most_that_is_no_proxys(told, client):
    """A client may write into `X-Forwarded-For` what it likes: what counts stands right of it."""
    assert TRUSTED.client(PROXY, told) == client


@pytest.mark.parametrize("peer", [OTHER, ("2001:db9::9", 1, 0, 0), "", None])
def test_who_is_no_proxy_says_nothing(peer):
    """Anybody else who connects is the client, and so is who connects to the Unix socket."""
    connected = peer[0] if isinstance(peer, tuple) else peer
    assert TRUSTED.client(peer, ["203.0.113.9"]) == connected


def test_a_unix_socket_when_told_so():
    """`unix`: who may open the socket is believed, and nobody else for it."""
    trusted = TrustedProxies(["unix"])
    assert trusted.client("", ["6.6.6.6, 203.0.113.9"]) == "203.0.113.9"
    assert trusted.client("", []) == ""
    assert trusted.client(PROXY, ["203.0.113.9"]) == "10.0.0.5"


def test_a_chain_without_end_is_not_followed():
    """Thousands of addresses that look like our own cost no time: the last ones are looked at."""
    endless = ",".join(["6.6.6.6", *[SECOND] * 3000])
    assert TRUSTED.client(PROXY, [endless]) == SECOND
    assert TRUSTED.client(PROXY, [",".join(["6.6.6.6", *[SECOND] * (HOPS - 1)])]) == "6.6.6.6"


def test_what_is_too_long_for_an_address_is_not_kept():
    """Long texts in place of addresses cost no memory, however many clients send."""
    with kept() as held:
        for n in range(200):
            assert TRUSTED.client(PROXY, [f"{n:030000}, {SECOND}"]) == SECOND
    assert held[0] < 500_000


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("proxy.internal", "is no address and no network"),
        ("10.0.0.5/8", "is no address and no network"),
        ("", "is no address and no network"),
        ("0.0.0.0/0", "is everybody"),
        ("::/0", "is everybody"),
    ],
)
def test_a_list_that_would_trust_everybody_is_a_mistake(named, said):
    """A name, a network that is none, and one that holds every client are refused at the start."""
    with pytest.raises(ValidationError, match=said):
        ServerSettings(trusted_proxies=[named])


async def test_the_address_that_plugins_see():
    """Unset, nobody is believed; after a reload the proxy is, and a spoofed header is worth nothing either way."""
    spoofed = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9"}
    async with Gateway.test() as gw:
        await gw.post("/v1/chat/completions", {"model": "m", "messages": []}, headers=spoofed)
        await gw.reload(settings={"server": {"trusted_proxies": ["127.0.0.0/8"]}})
        await gw.post("/v1/chat/completions", {"model": "m", "messages": []}, headers=spoofed)
        await gw.post("/v1/chat/completions", {"model": "m", "messages": []})
        seen = [done.request.remote for done in await gw.finished(3)]
    assert seen == ["127.0.0.1", "203.0.113.9", "127.0.0.1"]
