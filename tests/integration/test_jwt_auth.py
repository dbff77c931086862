"""JWTs of real issuers: servers with real keys, the real gateway, and everything a forger tries."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time

import jwt
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from pydantic import ValidationError

from gateway import Principal, PrincipalGone
from gateway.kit import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from gateway.kit.upstream import MODEL
from gateway.tasks import Tasks
from gateway_plugins import jwt_auth
from tests.contract.jobs import Keeper, Taker, taken
from tests.integration.process import xenios
from tests.scraped import scraped

SECRET = "a shared secret of more than thirty-two characters"
RSA, OTHER_RSA = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
ALGORITHMS = {
    "RS256": jwt.algorithms.RSAAlgorithm,
    "ES256": jwt.algorithms.ECAlgorithm,
    "EdDSA": jwt.algorithms.OKPAlgorithm,
}


def public(key, kid, algorithm, **more):
    return {**ALGORITHMS[algorithm].to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", **more}


class Issuer:
    """An OpenID Connect issuer on loopback."""

    def __init__(self):
        self.keys = [public(RSA, "r1", "RS256"), public(EC, "e1", "ES256"), public(ED, "d1", "EdDSA")]
        self.status = 200
        self.asked = 0
        self.answer = None
        self.url = ""

    async def configuration(self, _):
        return web.json_response({"issuer": self.url, "jwks_uri": self.url + "/keys"})

    async def jwks(self, _):
        self.asked += 1
        if self.answer is not None:
            return web.Response(text=self.answer, content_type="application/json")
        return web.json_response({"keys": self.keys}, status=self.status)

    def token(self, key=RSA, algorithm="RS256", kid="r1", headers=None, **claims):
        now = int(time.time())
        body = {"iss": self.url, "aud": "gateway", "sub": "ann", "exp": now + 600, "iat": now, **claims}
        body = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(body, key, algorithm=algorithm, headers={"kid": kid, **(headers or {})})


@pytest.fixture
async def issuer():
    made = Issuer()
    app = web.Application()
    app.router.add_get("/.well-known/openid-configuration", made.configuration)
    app.router.add_get("/auth/v1/.well-known/jwks.json", made.jwks)
    app.router.add_get("/keys", made.jwks)
    async with TestServer(app) as server:
        made.url = str(server.make_url("")).rstrip("/")
        yield made


def gateway(*issuers, plugins=()):
    return Gateway.test(plugins=[{"use": "jwt_auth", "config": {"issuers": list(issuers)}}, *plugins])


def entry(issuer, **more):
    return {"name": "test", "issuer": issuer.url, "audience": "gateway", **more}


async def ask(gw, token, path="/v1/chat/completions", **fields):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return await gw.post(path, body, headers={"Authorization": f"Bearer {token}"})


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(RSA, "RS256", "r1"), (EC, "ES256", "e1"), (ED, "EdDSA", "d1")])
async def test_a_token_of_the_issuer_is_a_caller(issuer, key, algorithm, kid):
    """Signed with any of the issuer's keys, a token names its caller by the claims that the settings say."""
    claims = {"tenant": "https://x.y/org", "team": "app.team", "roles": "groups", "limits": "limits"}
    async with gateway(entry(issuer, claims=claims)) as gw:
        token = issuer.token(
            key,
            algorithm,
            kid,
            groups=["a", "b"],
            app={"team": "blue"},
            limits={"requests": 9},
            **{"https://x.y/org": "acme"},
        )
        assert (await ask(gw, token)).status == 200
        [exchange] = await gw.finished()
        who = exchange.principal
        assert (who.id, who.kind, who.tenant, who.team) == ("ann", "jwt.test", "test/acme", "blue")
        assert (who.roles, who.limits, who.admin) == ({"a", "b"}, {"requests": 9}, False)


async def test_the_openai_sdk_brings_a_token_as_its_key(issuer):
    """A developer gives the token as `api_key`, and a refusal is the SDK's AuthenticationError."""
    async with gateway(entry(issuer)) as gw:
        async with openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key=issuer.token(), max_retries=0) as client:
            reply = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
            assert reply.choices[0].message.content
        late = issuer.token(exp=int(time.time()) - 100)
        async with openai.AsyncOpenAI(base_url=gw.url + "/v1", api_key=late, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="has expired"):
                await client.models.list()


def raw(header, claims, signature=b""):
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(key, header, claims, algorithm=None):
    """Signed with RS256 whatever the parts are, as the issuer itself might by mistake."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, claims)]
    text = ".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts)
    signature = key.sign(text.encode(), padding.PKCS1v15(), algorithm or hashes.SHA256())
    return text + "." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


def raw_token(issuer, **claims):
    """What PyJWT would refuse to make."""
    now = int(time.time())
    body = {"iss": issuer.url, "aud": "gateway", "sub": "ann", "exp": now + 600, **claims}
    return signed(RSA, {"alg": "RS256", "kid": "r1"}, body)


TIMES = [
    True,
    "tomorrow",
    "99999999999",
    [],
    {},
    1e300,
    10**400,
    -(10**400),
    -1,
    float("inf"),
    float("nan"),
    253402300800,
]


def forged(issuer):
    now = int(time.time())
    claims = {"iss": issuer.url, "aud": "gateway", "sub": "ann", "exp": now + 600}
    twice = json.dumps({**claims, "sub": "root"})[:-1] + ',"sub":"ann"}'
    twice_deep = json.dumps(claims)[:-1] + ',"app_metadata":{"tenant":"a","tenant":"b"}}'

    def hs256(key, **header):
        signed = raw({"alg": "HS256", "typ": "JWT", **header}, claims).rpartition(".")[0]
        return (
            signed
            + "."
            + base64.urlsafe_b64encode(hmac.digest(key, signed.encode(), hashlib.sha256)).rstrip(b"=").decode()
        )

    good = issuer.token()
    head, body, signature = good.split(".")
    other = base64.urlsafe_b64encode(json.dumps({**claims, "sub": "root"}).encode()).rstrip(b"=").decode()
    return {
        "alg none": raw({"alg": "none"}, claims),
        "alg None": raw({"alg": "None", "kid": "r1"}, claims, b"x"),
        "the public key as HS256 secret": hs256(pem(RSA), kid="r1"),
        "the JWK as HS256 secret": hs256(json.dumps(issuer.keys[0]).encode(), kid="r1"),
        "an empty HS256 secret": hs256(b""),
        "other claims": f"{head}.{other}.{signature}",
        "no signature": f"{head}.{body}.",
        "another's key": issuer.token(OTHER_RSA),
        "another's key by jwk": issuer.token(OTHER_RSA, headers={"jwk": public(OTHER_RSA, "r1", "RS256")}),
        "another's key by jku": issuer.token(OTHER_RSA, headers={"jku": issuer.url + "/keys"}),
        "another's key by x5u": issuer.token(OTHER_RSA, headers={"x5u": "https://example.com/cert"}),
        "crit": issuer.token(headers={"crit": ["b64"], "b64": True}),
        "kid that is no text": issuer.token(kid="r1", headers={"kid": "../../etc/passwd"}),
        "an EC key's kid": issuer.token(kid="e1"),
        "expired": issuer.token(exp=now - 31),
        "not yet": issuer.token(nbf=now + 60),
        "no exp": issuer.token(exp=None),
        "no sub": issuer.token(sub=None),
        "no aud": issuer.token(aud=None),
        "another audience": issuer.token(aud="others"),
        "sub with a NUL": issuer.token(sub="\u0000"),
        "sub as number": raw_token(issuer, sub=5),
        "sub empty": issuer.token(sub=""),
        "iss as a list": raw_token(issuer, iss=[issuer.url]),
        "iss nearly": issuer.token(iss=issuer.url + "/"),
        **{
            f"{name} {value!r:.20}": raw_token(issuer, **{name: value})
            for name in ("exp", "nbf", "iat")
            for value in TIMES
        },
        "no exp but null": raw_token(issuer, exp=None),
        "a name twice in the payload": signed(RSA, {"alg": "RS256", "kid": "r1"}, twice),
        "a name twice in the header": signed(RSA, '{"alg":"none","alg":"RS256","kid":"r1"}', claims),
        "a name twice, deep": signed(RSA, {"alg": "RS256", "kid": "r1"}, twice_deep),
        "b64 false": signed(RSA, {"alg": "RS256", "kid": "r1", "b64": False}, claims),
        "alg as a list": raw({"alg": ["RS256"], "kid": "r1"}, claims, b"x"),
        "RS384 with an RS256 key": signed(RSA, {"alg": "RS384", "kid": "r1"}, claims, hashes.SHA384()),
        "PS256 that isn't accepted": raw({"alg": "PS256", "kid": "r1"}, claims, b"x"),
        "five parts": good + ".x.y",
        "blanks": good.replace(".", " .", 1),
        "twice": good + "." + good,
        "huge": good + "A" * 20_000,
        "no JSON": "a.b.c",
        "deep": raw({"alg": "RS256"}, claims).split(".")[0]
        + "."
        + base64.urlsafe_b64encode(b"[" * 8000).decode()
        + ".x",
    }


@pytest.mark.parametrize("name", sorted(forged(Issuer())))
async def test_a_forged_token_is_refused(issuer, name):
    """What was not made by the issuer, for us, for now, is 401, in the client's dialect, and reaches no upstream."""
    async with gateway(entry(issuer)) as gw:
        token = forged(issuer)[name]
        reply = await ask(gw, token)
        assert (reply.status, reply.data["error"]["type"]) == (401, "invalid_request_error")
        reply = await ask(gw, token, "/v1/messages", max_tokens=5)
        assert (reply.status, reply.data["error"]["type"]) == (401, "authentication_error")
        assert not gw.upstream.seen


async def test_clocks_may_be_a_little_wrong(issuer):
    """Within the leeway a token that has just ended, or begins soon, is accepted."""
    now = int(time.time())
    async with gateway(entry(issuer, leeway="30s")) as gw:
        assert (await ask(gw, issuer.token(exp=now - 15))).status == 200
        assert (await ask(gw, issuer.token(nbf=now + 15))).status == 200


async def test_a_new_key_is_fetched_once(issuer):
    """A token with a key that isn't known yet: one fetch, at once, whatever the number of requests; then it is known."""
    async with gateway(entry(issuer, jwks_url=issuer.url + "/keys")) as gw:
        assert (await ask(gw, issuer.token())).status == 200
        issuer.keys = [public(OTHER_RSA, "r2", "RS256")]
        asked = issuer.asked
        replies = await asyncio.gather(*(ask(gw, issuer.token(OTHER_RSA, kid="r2", jti=str(i))) for i in range(20)))
        assert {r.status for r in replies} == {200}
        assert issuer.asked == asked + 1
        assert (await ask(gw, issuer.token(jti="old"))).status == 401  # its key is gone


async def test_invented_keys_bring_no_storm_of_fetches(issuer):
    """Hundreds of tokens with invented key ids: one fetch within the cooldown, and 401."""
    async with gateway(entry(issuer)) as gw:
        assert (await ask(gw, issuer.token())).status == 200
        asked = issuer.asked
        replies = await asyncio.gather(*(ask(gw, issuer.token(OTHER_RSA, kid=f"k{i}")) for i in range(200)))
        assert {r.status for r in replies} == {401}
        again = await asyncio.gather(*(ask(gw, issuer.token(OTHER_RSA, kid=f"more{i}")) for i in range(50)))
        assert {r.status for r in again} == {401}
        assert issuer.asked == asked + 1


async def test_known_keys_go_on_while_the_issuer_is_away(issuer, monkeypatch):
    """The issuer answers 500: what is known is accepted, what isn't is 401, and keys never fetched are 503, not 401."""
    async with gateway(entry(issuer)) as gw:
        assert (await ask(gw, issuer.token())).status == 200
        issuer.status = 500
        monkeypatch.setattr(jwt_auth, "COOLDOWN_SECONDS", 0.0)
        assert (await ask(gw, issuer.token(jti="again"))).status == 200
        assert (await ask(gw, issuer.token(OTHER_RSA, kid="new"))).status == 401
    async with gateway(entry(issuer)) as gw:
        refused = await ask(gw, issuer.token())
        assert (refused.status, refused.data["error"]["code"]) == (503, "issuer_unavailable")
        issuer.status = 200
        assert (await ask(gw, issuer.token())).status == 200


async def test_failed_fetches_of_keys_are_counted(issuer):
    """`/metrics` says whose keys can't be fetched; an issuer with a secret has none."""
    shared = {"issuer": "https://shared.example", "audience": "gateway", "secret": SECRET}
    issuer.status = 500
    async with gateway(entry(issuer), shared, plugins=["api_keys", "metrics"]) as gw:
        assert (await ask(gw, issuer.token())).status == 503
        assert (await scraped(gw, "xenios_jwks_errors_total")) == {("test",): issuer.asked}
        assert issuer.asked >= 1


async def test_a_shared_secret(issuer):
    """HS256 with the secret is accepted, with another or by a public key it isn't; both kinds side by side work."""
    shared = {"issuer": issuer.url, "audience": "gateway", "secret": SECRET}
    async with gateway(shared, entry(issuer)) as gw:
        assert (await ask(gw, issuer.token(SECRET, "HS256"))).status == 200
        assert (await ask(gw, issuer.token())).status == 200
        assert (await ask(gw, issuer.token(SECRET + "!", "HS256"))).status == 401
        assert (await ask(gw, forged(issuer)["the public key as HS256 secret"])).status == 401


async def test_supabase(issuer):
    """A project's signed-in users are callers by their app_metadata; its anon, service and anonymous tokens are not."""
    project = issuer.url
    issuer.url += "/auth/v1"

    def token(**claims):
        return issuer.token(EC, "ES256", "e1", **{"aud": "authenticated", "role": "authenticated", **claims})

    async with gateway({"supabase": project, "admin_roles": ["ops"]}) as gw:
        meta = {"tenant": "acme", "roles": ["ops"], "limits": {"requests": 5}}
        assert (await ask(gw, token(app_metadata=meta, user_metadata={"tenant": "victim"}))).status == 200
        [exchange] = await gw.finished()
        assert (exchange.principal.tenant, exchange.principal.admin) == ("127.0.0.1/acme", True)
        assert (await ask(gw, token(user_metadata={"tenant": "victim", "roles": ["ops"]}))).status == 200
        plain = (await gw.finished(2))[1].principal
        assert (plain.tenant, plain.admin) == ("127.0.0.1:ann", False)
        assert (await ask(gw, token(role="anon", aud="anon", sub=None))).status == 401
        assert (await ask(gw, token(role="service_role"))).status == 401
        assert (await ask(gw, token(is_anonymous=True))).status == 401
        assert (await ask(gw, token(is_anonymous="true"))).status == 401
        assert (await ask(gw, token(role=None))).status == 401
        legacy = jwt.encode(
            {"iss": "supabase", "role": "service_role", "exp": time.time() + 99}, SECRET, algorithm="HS256"
        )
        assert (await ask(gw, legacy)).status == 401


async def test_scopes_of_a_token(issuer):
    """Models by claim, else by the issuer's setting; an empty list allows none."""
    where = entry(issuer, models=["openai/*"], claims={"models": "allowed"})
    async with gateway(where) as gw:
        assert (await ask(gw, issuer.token(), model="openai/gpt-5-mini")).status == 200
        assert (await ask(gw, issuer.token())).status == 404
        assert (await ask(gw, issuer.token(allowed=["anthropic/*"]))).status == 200
        assert (await ask(gw, issuer.token(allowed=[]))).status == 404
        assert (await ask(gw, issuer.token(allowed=7))).status == 401


@pytest.mark.parametrize("keys_first", [True, False])
async def test_keys_and_tokens_side_by_side(issuer, keys_first):
    """`api_keys` and `jwt_auth` leave each other's credentials alone, in either order."""
    key = new_key()
    plugins = [
        {"use": "api_keys", "config": {"keys": [{"id": "k", "hash": hash_key(key, PEPPER)}]}},
        {"use": "jwt_auth", "config": {"issuers": [entry(issuer)]}},
    ]
    async with Gateway.test(plugins=plugins if keys_first else plugins[::-1]) as gw:
        assert (await ask(gw, key)).status == 200
        assert (await ask(gw, issuer.token())).status == 200
        assert (await ask(gw, issuer.token(iss="https://elsewhere.example"))).status == 401
        assert (await ask(gw, new_key())).status == 401


async def test_tokens_are_nowhere_to_be_found(issuer, capfd):
    """A token, good or refused, appears in no log line, reply or request to the upstream."""
    async with gateway(entry(issuer), plugins=["access_log"]) as gw:
        tokens = [issuer.token(), issuer.token(exp=1), forged(issuer)["another's key"], issuer.token(kid="nobody")]
        for token in tokens:
            reply = await ask(gw, token)
            assert token.split(".")[2] not in str(reply.headers) + reply.body.decode()
        await gw.finished(len(tokens))
        seen = "".join(str(dict(s.headers)) + str(s.json) for s in gw.upstream.seen)
    out = "".join(capfd.readouterr()) + seen
    assert "request" in out
    for token in tokens:
        for part in token.split(".")[1:]:
            assert part not in out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"audience": ()}, "needs audience"),
        ({"algorithms": ["HS256"]}, "HS256 needs a secret"),
        ({"secret": SECRET, "algorithms": ["HS256", "RS256"]}, "never mixed"),
        ({"secret": SECRET, "jwks_url": "https://x.y/keys"}, "either a secret or public keys"),
        ({"secret": "short"}, "32 bytes at least"),
        ({"secret": "s" * 63, "algorithms": ["HS256", "HS512"]}, "64 bytes at least"),
        ({"secret": "-----BEGIN PUBLIC KEY-----" + "A" * 99}, "a public key goes behind jwks_url"),
        ({"secret": '{"kty": "RSA", "n": "' + "A" * 99}, "a public key goes behind jwks_url"),
        ({"audience": ["gateway", ""]}, "needs audience"),
        ({"admin_roles": ["ops"]}, "admin_roles needs claims.roles"),
        ({"shared_tenants": True}, "shared_tenants needs claims.tenant"),
        ({"require": {"user_metadata.paid": True}}, "users change user_metadata themselves"),
        ({"issuer": "http://login.example.com"}, "must be https"),
        ({"jwks_url": "http://169.254.169.254/keys"}, "must be https"),
        ({"algorithms": ["none"]}, "Input should be"),
        ({"claims": {"tenant": "user_metadata.tenant"}}, "users change user_metadata themselves"),
    ],
)
def test_settings_that_would_let_forgers_in_are_mistakes(changes, what):
    """Mixed kinds of keys, secrets that are too short, keys over plain HTTP: refused, and the secret isn't printed."""
    with pytest.raises(ValidationError, match=what) as caught:
        jwt_auth.Config(issuers=[{"issuer": "https://x.y", "audience": "gateway", **changes}])
    assert SECRET not in str(caught.value)


def test_two_issuers_on_one_host_need_names():
    """Two realms of one login would share the ids and tenants of their users: a mistake, until each has a name."""
    realms = [{"issuer": f"https://login.example.com/{realm}", "audience": "x"} for realm in "ab"]
    with pytest.raises(ValidationError, match="give each a `name`"):
        jwt_auth.Config(issuers=realms)
    assert jwt_auth.Config(issuers=[{**realm, "name": f"n{i}"} for i, realm in enumerate(realms)])
    same = {"issuer": "https://login.example.com/a", "audience": "x"}
    assert jwt_auth.Config(issuers=[same, {**same, "secret": "s" * 32}])  # one login, two kinds of keys


def test_a_supabase_of_ones_own_keeps_its_guards():
    """With an issuer of its own the preset still refuses anon and service keys."""
    entry = jwt_auth.Issuer(supabase="https://db.example.com", issuer="https://auth.example.com", secret="s" * 32)
    assert (entry.issuer, entry.audience) == ("https://auth.example.com", "authenticated")
    assert entry.require == {"role": "authenticated"}
    assert entry.claims.tenant == "app_metadata.tenant"


async def test_a_mistake_in_the_settings_is_told_by_check(tmp_path):
    """`xenios check` says where and what, without the secret."""
    config = tmp_path / "x.yaml"
    config.write_text(
        "upstreams: {openrouter: {without_key: simulate}}\n"
        "plugins:\n  - use: jwt_auth\n    config:\n      issuers:\n"
        f"        - {{issuer: 'https://a.b', audience: x, secret: '{SECRET}', algorithms: [RS256]}}\n"
        "        - {issuer: 'http://a.b', audience: x}\n"
        "        - {issuer: 'https://c.d'}\n"
    )
    done = await asyncio.to_thread(xenios, "check", "--config", config, cwd=tmp_path)
    assert done.returncode != 0
    for line, what in ((6, "never mixed with public keys"), (7, "must be https://"), (8, "needs audience")):
        assert f"x.yaml:{line}" in done.stderr
        assert what in done.stderr
    assert SECRET not in done.stdout + done.stderr


async def test_tenants_of_a_token_are_its_issuers_own(issuer):
    """No token of one issuer becomes a tenant of another, of a key, or of another caller, whatever it claims."""
    key = new_key()
    shared = {"issuer": issuer.url, "audience": "gateway", "secret": SECRET}
    claims = {"claims": {"tenant": "org"}}
    plugins = [
        {"use": "api_keys", "config": {"keys": [{"id": "acme", "hash": hash_key(key, PEPPER)}]}},
        {"use": "jwt_auth", "config": {"issuers": [entry(issuer, **claims), {**shared, **claims, "name": "other"}]}},
    ]
    async with Gateway.test(plugins=plugins) as gw:
        tokens = [
            key,
            *(issuer.token(org=org) for org in ("acme", "ann", "other/acme", ":ann", "/ann")),
            issuer.token(),
            *(issuer.token(SECRET, "HS256", org=org) for org in ("acme", "ann", None)),
        ]
        for number, token in enumerate(tokens, 1):
            assert (await ask(gw, token)).status == 200
            await gw.finished(number)
        tenants = [exchange.principal.tenant for exchange in await gw.finished(len(tokens))]
        assert len(set(tenants)) == len(tokens), tenants
        assert all(tenant.startswith(("test/", "test:", "other/", "other:")) for tenant in tenants[1:])


async def test_tenants_are_shared_where_the_operator_says_so(issuer):
    """`shared_tenants`: a token's tenant is that of keys of the same name; without the claim it is still its own."""
    where = entry(issuer, claims={"tenant": "org"}, shared_tenants=True)
    async with gateway(where) as gw:
        for number, token in enumerate([issuer.token(org="acme"), issuer.token()], 1):
            await ask(gw, token)
            await gw.finished(number)
        assert [e.principal.tenant for e in await gw.finished(2)] == ["acme", "test:ann"]


@pytest.mark.parametrize("limits", [
    {"requests": -1}, {"requests": 0}, {"requests": "many"}, {"requests": [5]}, {"tokens": 1.5}, {"usd": -5},
    {"usd": "1e400"}, {"per": 0}, {"per": "soon"}, {"usd_per": "moment"}, [5], 5, "5", True,
])  # fmt: skip
async def test_limits_that_make_no_sense_are_no_licence(issuer, limits):
    """A token whose limits can't be understood is 401 and told which: not a caller without limits."""
    rate = {"use": "rate_limit", "config": {}}
    async with gateway(entry(issuer, claims={"limits": "app.limits"}), plugins=[rate]) as gw:
        reply = await ask(gw, issuer.token(app={"limits": limits}))
        assert (reply.status, reply.data["error"]["code"]) == (401, "invalid_token")
        assert "app.limits" in reply.data["error"]["message"]
        good = {"requests": 1, "per": "1h", "unheard": [1]}
        asked = [(await ask(gw, issuer.token(app={"limits": good}))).status for _ in range(2)]
        assert asked == [200, 429]
        assert (await ask(gw, issuer.token(sub="bob", app={"limits": None}))).status == 200


@pytest.mark.parametrize("claims", [{"level": True}, {"level": "1"}, {"level": 1.0}, {"level": [1]}, {"level": 2}, {}])
async def test_what_is_required_is_required_to_the_letter(issuer, claims):
    """1 is neither true nor "1", and a claim that isn't there isn't what was asked for."""
    async with gateway(entry(issuer, require={"level": 1})) as gw:
        assert (await ask(gw, issuer.token(**claims))).status == 401
        assert (await ask(gw, issuer.token(level=1))).status == 200


async def test_only_admin_roles_make_administrators(issuer):
    """No other claim does: not `admin`, not `role`, not a role of another issuer's list."""
    shared = {"issuer": issuer.url, "audience": "gateway", "secret": SECRET, "name": "other"}
    both = [
        entry(issuer, claims={"roles": "groups"}, admin_roles=["ops"]),
        {**shared, "claims": {"roles": "groups"}},
    ]
    async with gateway(*both) as gw:
        tokens = [
            issuer.token(groups=["ops"]),
            issuer.token(groups="dev ops"),
            issuer.token(groups=["opsx", "OPS"]),
            issuer.token(admin=True, is_admin=True, role="ops", roles=["ops"], scope="admin"),
            issuer.token(SECRET, "HS256", groups=["ops"]),
            issuer.token(groups={"ops": True}),
            issuer.token(groups=["r"] * 201),
        ]
        statuses = [(await ask(gw, token)).status for token in tokens]
        assert statuses == [200] * 5 + [401] * 2
        assert [e.principal.admin for e in (await gw.finished(7)) if e.principal] == [True, True, False, False, False]


async def test_a_token_is_believed_no_longer_than_it_lasts(issuer):
    """A verified token isn't verified again for a moment, but once it has ended it is refused all the same."""
    async with gateway(entry(issuer, leeway=0)) as gw:
        ends = int(time.time()) + 2
        token = issuer.token(exp=ends)
        while (reply := await ask(gw, token)).status == 200:
            assert time.time() < ends + 1
        assert time.time() >= ends
        assert (reply.status, reply.data["error"]["code"]) == (401, "expired_token")


async def test_keys_go_on_whatever_the_issuer_answers(issuer):
    """No list, no JSON, nesting without end, a redirect: what is known goes on, and the issuer is asked again."""
    async with gateway(entry(issuer)) as gw:
        assert (await ask(gw, issuer.token())).status == 200
        keys = gw.plugin("jwt_auth")._sources[0].keys
        for odd in ("[]", "{}", '{"keys": 5}', '{"keys": {"a": 1}}', "<html>", "[" * 100_000, '{"keys": ["x", null]}x'):
            issuer.answer = odd
            assert await keys._fetch() is False
            assert (await ask(gw, issuer.token(jti=odd[:9]))).status == 200
        issuer.answer = None
        assert await keys._fetch() is True


async def test_a_slow_issuer_holds_up_nobody_else(issuer):
    """While the keys are being fetched, other callers are answered."""
    held = asyncio.Event()
    answer = issuer.jwks

    async def slow(request):
        await held.wait()
        return await answer(request)

    app = web.Application()
    app.router.add_get("/keys", slow)
    with contextlib.suppress(asyncio.CancelledError):
        async with (
            TestServer(app) as server,
            gateway(entry(issuer, jwks_url=str(server.make_url("/keys"))), plugins=["api_keys"]) as gw,
        ):
            waiting = Tasks().spawn(ask(gw, issuer.token()), "waits for the keys")
            assert (await gw.chat()).status == 200
            held.set()
            assert (await waiting).status == 200


# --- jobs ------------------------------------------------------------------------------------------------------------


async def test_a_job_goes_on_with_what_the_token_said(issuer):
    """Tenant, roles and limits as they were verified, though the token has ended by then."""
    async with gateway(entry(issuer, claims={"tenant": "org"}), plugins=[Taker]) as gw:
        taker = await taken(gw, plugin="Taker", headers={"Authorization": f"Bearer {issuer.token(org='acme')}"})
        exchange = await taker.services.run(taker.late(), Keeper())
        accepted, _ = await gw.finished(2)
        assert exchange.principal == accepted.principal
        assert (exchange.principal.reference, exchange.principal.tenant) == ("jwt.test:ann", "test/acme")


async def test_a_job_of_an_issuer_that_was_removed_is_nobodys(issuer):
    """Taken off the list: its callers' jobs fail, as their next requests would."""
    other = {"name": "other", "issuer": "https://login.example.com", "audience": "gateway", "secret": SECRET}
    renamed = {**other, "name": "test"}
    async with gateway(entry(issuer), other, plugins=[Taker]) as gw:
        taker = await taken(gw, plugin="Taker", headers={"Authorization": f"Bearer {issuer.token()}"})
        late = taker.late()
        for left in (other, renamed):
            await gw.reload(plugins=[{"use": "jwt_auth", "config": {"issuers": [left]}}, Taker])
            with pytest.raises(PrincipalGone):
                await taker.services.run(late, Keeper())


async def test_what_is_kept_is_believed_of_this_plugins_callers_alone(issuer):
    """Neither a key's principal, nor one under another's name, nor a name without a token is restored."""
    async with gateway(entry(issuer)) as gw:
        restore = gw.plugin("jwt_auth").restore_principal
        ann = Principal("ann", kind="jwt.test", claims={"iss": issuer.url})
        assert await restore(ann.reference, ann) is ann
        assert await restore("jwt.test:bob", ann) is None
        assert await restore(ann.reference, None) is None
        for stranger in (
            Principal("ann", kind="key", claims={"iss": issuer.url}),
            Principal("ann", kind="jwt.test", claims={"iss": "https://evil.example"}),
            Principal("ann", kind="jwt.test"),
        ):
            assert await restore(stranger.reference, stranger) is None
