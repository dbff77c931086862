"""Where webhooks may go, and where they never do."""

import socket
import ssl
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gateway_plugins.jobs.webhooks.addresses import Rules, is_public
from gateway_plugins.jobs.webhooks.client import Client
from tests.jobs.receivers import raw_receiver, receiver
from tests.stores.certificates import certificate_for

INTERNET = Rules()
HERE = Rules(allow_http=True, ports=None, allow=(ip_network("127.0.0.1/32"),))
PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1",
    "2001::1", "2001:db8::1", "2002:a00:1::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1",
    "ff02::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.63.255.255", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"]


@pytest.mark.parametrize("text", PRIVATE)
def test_what_is_not_the_internet_is_never_called(text):
    """Private, local, shared, multicast, reserved and clouds' own addresses, and IPv4 ones in IPv6's clothes."""
    assert not is_public(ip_address(text))
    host = f"[{text}]" if ":" in text else text
    with pytest.raises(ValueError, match="may not be called"):
        INTERNET.check(f"https://{host}/")


@pytest.mark.parametrize("text", PUBLIC)
def test_the_internet_may_be_called(text):
    """Addresses that were given out to networks."""
    assert is_public(ip_address(text))


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
@example(IPv4Address("224.0.0.1"))  # multicast: global to Python
@example(IPv6Address("ff0e::1"))
def test_nothing_is_public_that_python_knows_to_be_special(address):
    """Whatever the standard library calls private, local, reserved or multicast is refused."""
    assume(is_public(address))
    assert address.is_global
    assert not any((address.is_multicast, address.is_reserved, address.is_loopback, address.is_link_local))


@given(st.ip_addresses(v=4))
def test_no_ipv4_address_hides_in_an_ipv6_one(address):
    """Mapped, compatible, NAT64, 6to4: none is called, whatever it stands for."""
    number = int(address)
    for hidden in (number, 0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80):
        assert not is_public(IPv6Address(hidden))


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_what_an_operator_allows_is_called(address, length):
    """A network that the configuration names, and nothing beside it, is called."""
    network = ip_network((address, length), strict=False)
    rules = Rules(allow=(network,))
    assert rules.admits(str(address))
    outside = IPv4Address(int(network.network_address) ^ (1 << 31)) if length else None
    assert outside is None or rules.admits(str(outside)) == is_public(outside)


@pytest.mark.parametrize(
    "url",
    [
        "", "https://", "https:///path", "ftp://example.com/", "http://example.com/", "file:///etc/passwd", "example.com",
        "//example.com/", "javascript:alert(1)", "https://user@example.com/", "https://user:password@example.com/",
        "https://example.com:22/", "https://example.com:6379/", "https://example.com:0/",
        "https://example.com:99999/", "https://localhost/", "https://a.localhost/", "https://redis/", "https://redis./",
        "https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://127.1/", "https://0177.0.0.1/",
        "https://017700000001/", "https://127.0.0.1./", "https://[::1", "https://[::1%25lo]/", "https://exa mple.com/",
        "https://example.com\\@10.0.0.1/", "https://example.com/\r\nX: y", "https://example.com/\0", "https://ex\u00e4mple.com/",
        "https://\uff11\uff12\uff17.0.0.1/", "https://example.com/" + "a" * 2000, "https://[::ffff:7f00:1]/",
    ],
)  # fmt: skip
def test_urls_that_never_could_be_called_are_refused_at_once(url):
    """Other schemes, users and passwords, odd ports, addresses in odd writing, names of the gateway's own network."""
    with pytest.raises(ValueError) as refused:
        INTERNET.check(url)
    assert len(url) < 10 or url not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["https://example.com", "https://example.com:8443/a/b?c=d", "https://1.1.1.1/", "https://xn--exmple-cua.com/", "https://hooks.example.com./"],
)  # fmt: skip
def test_urls_as_people_have_them_are_taken(url):
    """Names and public addresses, by https."""
    INTERNET.check(url)


@given(st.text())
@example("https://[v1.a]/")
def test_whatever_is_said_is_a_url_or_refused(text):
    """No text, with a scheme or without, leads to another error."""
    for url in (text, f"https://{text}", f"https://{text}/"):
        try:
            found = INTERNET.check(url)
        except ValueError:
            continue
        assert found.scheme == "https"
        assert found.raw_user is None


# --- the client ------------------------------------------------------------------------------------------------------


class Names:
    """A name server that gives another answer each time."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, host, port, **_):
        self.asked += 1
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if addresses is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port) if ":" not in a else (a, port, 0, 0))
            for a in addresses
        ]  # fmt: skip


async def post(url, *, rules=HERE, timeout=5.0, **options):
    client = Client(rules, timeout=timeout, **options)
    try:
        return await client.post(url, {"X-Test": "1"}, b"{}")
    finally:
        await client.close()


async def test_a_name_that_leads_inside_is_not_called():
    """A public-looking name with a private address: nobody is connected to."""
    names = Names(["127.0.0.1"])
    async with receiver() as them:
        port = them.url.split(":")[2].split("/")[0]
        answer = await post(f"http://hooks.example.com:{port}/", rules=Rules(True, None), lookup=names)
    assert (answer.status, answer.failure) == (None, "not_allowed")
    assert them.seen == []
    assert names.asked == 1


async def test_a_name_that_changes_after_the_check_leads_nowhere():
    """DNS rebinding: public when asked first, private at the next: the address that is checked is the one connected to."""
    async with receiver() as them:
        port = them.url.split(":")[2].split("/")[0]
        names = Names(["192.0.2.1", "::1"], ["127.0.0.1"])
        rules = Rules(True, None, (ip_network("192.0.2.1/32"),))  # an address where nobody answers
        client = Client(rules, timeout=0.3, lookup=names)
        answers = [await client.post(f"http://hooks.example.com:{port}/", {}, b"") for _ in range(2)]
        await client.close()
    assert answers[0].failure in {"timeout", "connection", "not_allowed"}
    assert answers[1].failure == "not_allowed"
    assert them.seen == []
    assert names.asked == 2  # once for each try, never between the check and the connection


async def test_of_several_addresses_only_those_allowed_are_tried():
    """A name with a private and an allowed address reaches the allowed one."""
    async with receiver() as them:
        port = them.url.split(":")[2].split("/")[0]
        answer = await post(f"http://hooks.example.com:{port}/", lookup=Names(["127.0.0.2", "127.0.0.1"]))
    assert answer.status == 204
    assert len(them.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status):
    """A receiver that sends us on, inside or outside, has failed."""
    from aiohttp import web

    async with receiver() as inside:

        async def elsewhere(_request):
            return web.Response(status=status, headers={"Location": inside.url})

        async with receiver(elsewhere) as them:
            answer = await post(them.url)
    assert (answer.status, answer.failure) == (status, "status")
    assert inside.seen == []


async def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    """A proxy would connect for us, to whatever it likes."""
    async with receiver() as proxy, receiver() as them:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
            monkeypatch.setenv(name.upper(), proxy.url)
        answer = await post(them.url)
    assert answer.status == 204
    assert proxy.seen == []


async def test_certificates_are_verified(tmp_path):
    """An unknown authority is refused; one in `ca_file` is trusted, for its own names alone."""
    both, authority = certificate_for("hooks.example.com", tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(both)
    async with receiver(tls=context) as them:
        port = them.url.split(":")[2].split("/")[0]
        names = Names(["127.0.0.1"])
        unknown = await post(f"https://hooks.example.com:{port}/", lookup=names)
        known = await post(f"https://hooks.example.com:{port}/", lookup=names, ca_file=authority)
        other = await post(f"https://other.example.com:{port}/", lookup=names, ca_file=authority)
    assert (unknown.status, unknown.failure) == (None, "tls")
    assert (known.status, known.failure) == (204, None)
    assert (other.status, other.failure) == (None, "tls")


@pytest.mark.parametrize(
    "reply, failure",
    [
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "bad_reply"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "bad_reply"),
        (b"", "connection"),
    ],
)
async def test_what_is_not_http_is_no_reply(reply, failure):
    """Whatever a port says: one word of ours tells of it."""

    async def serve(reader, writer):
        await reader.read(100)
        writer.write(reply)
        await writer.drain()

    async with raw_receiver(serve) as port:
        answer = await post(f"http://127.0.0.1:{port}/")
    assert (answer.status, answer.failure) == (None, failure)


async def test_a_name_that_is_unknown_is_told():
    """No such name."""
    assert (await post("http://nobody.example.com/", lookup=Names(None))).failure == "dns"


async def test_nobody_listens():
    """A port that is closed."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert (await post(f"http://127.0.0.1:{closed.getsockname()[1]}/")).failure == "connection"


async def test_a_reply_that_no_one_can_unpack_is_a_reply():
    """Whatever stands in it, only the status counts."""

    async def serve(reader, writer):
        await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\nno gzip!!")

    async with raw_receiver(serve) as port:
        assert (await post(f"http://127.0.0.1:{port}/")).failure is None
