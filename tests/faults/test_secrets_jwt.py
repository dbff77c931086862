"""Tokens through every error path of the real process: in no log, reply, row, or request to the upstream."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.kit.upstream import Json, ScriptedUpstream, Stream, chat_completion, chat_events
from tests.faults.process import config, started, stored_rows
from tests.faults.raw import CHAT, request
from tests.faults.test_secrets import ANSWER, HOOKS, LEAK, PROMPT, Visit, leaking
from tests.stores.postgres import postgres_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.process import Process

SECRET = "issuer-secret-canary-0f4e77b1c2d3"
EMAIL = "email-canary-2c7b9a@example.com"
OWN, AWAY = "https://own.example.com", "http://127.0.0.1:9"
CALLER = "ann-who-may-be-named"
_KEY = ec.generate_private_key(ec.SECP256R1())


def token(secret: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
    now = int(time.time())
    body = {"iss": OWN, "aud": "xenios", "sub": CALLER, "exp": now + 600, "email": EMAIL, "level": 1, **claims}
    return jwt.encode({n: v for n, v in body.items() if v is not None}, secret, algorithm=algorithm, headers=headers)


def unsigned(good: str) -> str:
    header = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    return f"{header}.{good.split('.')[1]}."


def refused_tokens() -> list[str]:
    """Whatever a token is refused for."""
    good = token()
    now = int(time.time())
    head, body, _ = good.split(".")
    cut = hmac.digest(SECRET.encode(), f"{head}.{body}".encode(), hashlib.sha256)[:-1]
    return [
        token(exp=now - 100, jti="1"),
        token(exp="soon", jti="2"),
        token(nbf=now + 500, jti="3"),
        token(aud="others", jti="4"),
        token(sub=None, jti="5"),
        token(SECRET + "!", jti="6"),
        token(app={"limits": {"requests": -1}}, jti="7"),
        token(app={"tenant": ["x"]}, jti="8"),
        token(app={"tenant": "x\u0000y"}, jti="9"),
        token(level=2, jti="10"),
        token(headers={"crit": ["exp"]}, jti="11"),
        token(_KEY, "ES256", {"kid": "nobody"}, jti="12"),
        token(iss="https://nobody.example.com", jti="13"),
        token(pad="x" * 20_000, jti="14"),
        unsigned(good),
        f"{head}.{body}.{base64.urlsafe_b64encode(cut).rstrip(b'=').decode()}",
        good + "." + body,
    ]


def canaries(tokens: list[str]) -> Iterator[str]:
    """What no one may read: payloads and signatures, whole and in part, and what they hold beside the caller's id."""
    yield from (SECRET, SECRET[:20], EMAIL)
    for made in tokens:
        for part in made.split(".")[1:]:
            if len(part) > 24:
                yield from (part[:60], part[-40:])


class TokenVisit(Visit):
    """A visit with a token in the key's place, of an administrator."""

    async def administered(self, strange: list[str]) -> None:
        """Rows that name the caller; and bodies and queries that are refused, with a token where it does not belong."""
        made = {"name": "made", "team": "x"}
        assert await self.ask(request(None, made, path="/admin/keys", key=self.key)) == 201
        for body in (
            {"id": self.key},
            {"team": f"\u0000{self.key}"},
            {"limits": {"requests": self.key}},
        ):
            assert await self.ask(request(None, body, path="/admin/keys", key=self.key)) == 400
        for bad in strange:
            assert await self.ask(request(None, made, path="/admin/keys", key=bad)) in {401, 503}


async def visited(process: Process, upstream: ScriptedUpstream, good: str, strange: list[str]) -> bytes:
    visit = TokenVisit(process, upstream, good)
    known = [made for made in strange if len(made) < 9000]  # the head of a request holds no more
    away = [made for made in known if b'"nobody"' in base64.urlsafe_b64decode(made.split(".")[0] + "==")]
    wrong = tuple(made for made in known if made not in away)
    await visit.refused(wrong)
    for made in away:  # its issuer is away, and no keys are known
        assert await visit.ask(request(None, CHAT, key=made)) == 503
    await visit.administered(known)
    await visit.failed()
    fine = Stream(*chat_events(ANSWER, pieces=1))
    upstream.on("m/fine", lambda seen: fine if seen.stream else Json(chat_completion(ANSWER)))
    await visit.leaked((good, *wrong[:3], *away))
    return visit.replies


@pytest.mark.promise("P12.jwt")
@pytest.mark.parametrize("database", [pytest.param("sqlite", marks=pytest.mark.full), "postgresql"])
async def test_no_token_anywhere(tmp_path: Path, database: str) -> None:
    """A token, good, wrong or of an issuer that is away, sent through every error path: no log, reply or row holds it."""
    (tmp_path / "leak.py").write_text(LEAK)
    good, strange = token(app={"roles": ["ops"]}), refused_tokens()
    shared = {"issuer": OWN, "audience": "xenios", "secret": SECRET, "name": "own", "admin_roles": ["ops"]}
    claims = {name: f"app.{name}" for name in ("tenant", "roles", "limits")}
    issuers = [
        {**shared, "claims": claims, "require": {"level": 1}},
        {"issuer": OWN, "audience": "xenios", "name": "own", "algorithms": ["ES256"], "jwks_url": AWAY + "/keys"},
    ]
    with postgres_server() as server:
        url = await server.new() if database == "postgresql" else "sqlite"
        async with ScriptedUpstream() as upstream:
            file = config(
                tmp_path,
                upstream,
                server={"drain_timeout": 0.5, "body_timeout": 1},
                upstream={"first_event_timeout": 0.2, "stall_timeout": 0.2},
                services={"redis": "embedded", "database": {"url": url, "migrate_on_start": True}},
                log={"level": "debug", "format": "json"},
                plugins=leaking(api_keys={"database": True}, jwt_auth={"issuers": issuers}),
            )
            async with started(file) as process:
                replies = await visited(process, upstream, good, strange)
                process.signal()
                assert await process.exit_code() == 0
            requests = b"".join(f"{s.path} {s.headers.raw}".encode() + s.body for s in upstream.seen)
        stored = await stored_rows(url, tmp_path / "data")
    logged = bytes(process.out + process.err).decode()
    assert logged.count("plugin_failed") >= len(HOOKS)
    assert "jwks_not_fetched" in logged
    assert PROMPT in requests.decode("latin-1")
    # it was looked at what there is to be seen
    assert CALLER in logged
    assert f"jwt.own:{CALLER}" in stored
    for where, text in (("log", logged), ("replies", replies.decode("latin-1")), ("rows", stored),
                        ("requests", requests.decode("latin-1"))):  # fmt: skip
        for canary in canaries([good, *strange]):
            at = text.find(canary)
            assert at < 0, (where, text[max(0, at - 300) : at + 100])
    assert json.loads(base64.urlsafe_b64decode(good.split(".")[1] + "=="))["email"] == EMAIL
