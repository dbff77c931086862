"""JWTs: who may call, by the tokens of OpenID Connect issuers, Supabase, or whoever shares a secret with the gateway.

A token comes as a key does: `Authorization: Bearer …`. One whose issuer (`iss`) isn't listed here is left to the
plugins after this one. The algorithms of each issuer are fixed in the configuration, never taken from the token, and
nothing else in a token's header (`jku`, `jwk`, `x5u`) says which key to trust.

Public keys (JWKS) are fetched in the background and again when a token names one that isn't known; while the issuer
doesn't answer, those known go on. Without any, requests get 503, not 401. A key that its issuer takes back is believed
for five minutes at most (`REFRESH_SECONDS`, `BELIEVED_SECONDS`), a token until it ends: issuers make them short.

An issuer's callers are its own: their ids, and their tenants unless `shared_tenants` says otherwise, can't be those of
another issuer or of a key. What a claim says and can't be understood is 401, never "no limit". A job, which goes
on without the token, goes on with what the token said when it was taken, as long as its issuer is listed here; nobody
can be named without one.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import json
import time
from base64 import urlsafe_b64decode
from collections import OrderedDict
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import aiohttp
import jwt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from gateway import Duration, Principal, Scopes, Tasks, Unauthenticated, Unavailable, hookimpl
from gateway.kit import OwnLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway import Cell, Exchange, Services

Algorithm = Literal[
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
LONGEST_TOKEN = 16_384
LONGEST_LIST = 200  # roles, globs
LATEST = 253_402_300_800  # the year 10,000
LONGEST_JWKS = 512 * 1024
REFRESH_SECONDS = 240.0
COOLDOWN_SECONDS = 30.0  # between fetches because of keys that nobody knows
FETCH_SECONDS = 5.0
BELIEVED_SECONDS = 60.0  # a verified token isn't verified again for so long
CACHE_SIZE = 10_000
_SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}  # RFC 7518, 3.2: as long as the hash
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}


def _safe_url(value: str) -> str:
    parts = urlsplit(value)
    local = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    if not parts.hostname or parts.scheme not in {"https", "http"} or parts.username or parts.query or parts.fragment:
        raise ValueError("is no address of an issuer, such as https://login.example.com")
    if parts.scheme == "http" and not local:
        raise ValueError("must be https://: whoever can change what comes over http:// can make tokens")
    return value


Url = Annotated[str, AfterValidator(_safe_url)]


class Claims(BaseModel):
    """Where in a token the caller's properties stand: names, with dots for what lies deeper (`app_metadata.tenant`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field("sub", description="Who it is: nothing that users can change, such as an email. Default sub.")
    tenant: str | None = Field(
        None, description="Whose data it may see, among the issuer's (`shared_tenants`). Default: its own alone."
    )
    team: str | None = Field(
        None,
        description="The team that its use is counted for; teams of keys of the same name are the same. Default none.",
    )
    roles: str | None = Field(None, description="Its roles: a list, or text with blanks between them. Default none.")
    limits: str | None = Field(
        None, description="Limits of its own: an object of requests, tokens, per, usd … as of keys. Default none."
    )
    models: str | None = Field(
        None, description="Globs of the models it may use, instead of the issuer's `models`. Default: these."
    )
    endpoints: str | None = Field(
        None, description="Globs of endpoints, instead of the issuer's `endpoints`. Default: these."
    )


class Issuer(BaseModel):
    """Whose tokens are accepted, and how they are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="Name in logs, limits and tenants; no other issuer's. Default: the issuer's host.",
    )
    issuer: Url | None = Field(
        None, description="What `iss` of its tokens is, to the letter. Required but for Supabase."
    )
    supabase: Url | None = Field(
        None,
        description="Address of a Supabase project, such as https://abc.supabase.co: fills in issuer, audience, "
        "jwks_url and claims. Its signed-in users are accepted, its anon and service keys are not; tenant, team, roles "
        "and limits come from app_metadata.",
    )
    audience: str | tuple[str, ...] = Field(
        (), description="What `aud` must be, one of several. Required; of Supabase `authenticated`."
    )
    algorithms: tuple[Algorithm, ...] = Field(
        (), description="What its tokens may be signed with. Default: HS256 with a secret, else RS256, ES256 and EdDSA."
    )
    secret: SecretStr | None = Field(
        None,
        description="The secret that HS256 tokens are signed with: 32 bytes or more (HS384: 48, HS512: 64). With it "
        "no public keys are asked for.",
    )
    jwks_url: Url | None = Field(
        None, description="Where its public keys are. Default: as its /.well-known/openid-configuration says."
    )
    leeway: Duration = Field(30.0, ge=0, le=300, description="How wrong clocks may be. Default 30s.")
    stale_for: Duration = Field(
        3600.0, ge=0, le=7 * 86400, description="How long known keys go on while the issuer is away. Default 1h."
    )
    claims: Claims = Field(Claims(), description="Where the caller's properties stand.")
    require: dict[str, str | bool | int] = Field(
        default_factory=dict, description="Claims that must have these values. Default none."
    )
    shared_tenants: bool = Field(
        False,
        description="`claims.tenant` names tenants of keys and other issuers too; false: they are the issuer's own, "
        "`<name>/<tenant>`. Default false.",
    )
    admin_roles: tuple[str, ...] = Field(
        (), description="Roles (of `claims.roles`) that may use the admin routes. Default none."
    )
    models: tuple[str, ...] | None = Field(
        None, description="Globs of the models that its callers may use. Default all."
    )
    endpoints: tuple[str, ...] | None = Field(None, description="Globs of endpoints that they may use. Default all.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        """`supabase: URL` fills in what such a project's tokens need."""
        if not isinstance(value, dict) or not isinstance(value.get("supabase"), str):
            return value
        issuer = value["supabase"].rstrip("/") + "/auth/v1"
        claims = {name: f"app_metadata.{name}" for name in ("tenant", "team", "roles", "limits")}
        preset: dict[str, Any] = {"issuer": issuer, "audience": "authenticated"}
        if value.get("secret") is None:
            preset["jwks_url"] = issuer + "/.well-known/jwks.json"
        given = value.get("claims")
        return {
            **preset,
            **value,
            "claims": {**claims, **given} if isinstance(given, dict) else claims,
            "require": {"role": "authenticated", **(value.get("require") or {})},
        }

    @model_validator(mode="after")
    def _sound(self) -> Issuer:
        if self.issuer is None:
            raise ValueError("needs issuer, or supabase")
        if not self.audience or not all(self.audience):
            raise ValueError("needs audience: without it tokens that were made for others would be accepted")
        if self.secret is not None and self.jwks_url is not None:
            raise ValueError("has either a secret or public keys (jwks_url); list the issuer twice for both")
        shared = [name for name in self.algorithms if name.startswith("HS")]
        if self.secret is None and shared:
            raise ValueError(f"{shared[0]} needs a secret")
        if self.secret is not None and len(shared) < len(self.algorithms):
            raise ValueError("a secret goes with HS256, HS384 or HS512 alone: never mixed with public keys")
        if self.secret is not None:
            _check_secret(self.secret.get_secret_value(), self.accepted)
        if self.admin_roles and self.claims.roles is None:
            raise ValueError("admin_roles needs claims.roles: where the roles stand")
        if self.shared_tenants and self.claims.tenant is None:
            raise ValueError("shared_tenants needs claims.tenant: where the tenant stands")
        for name, path in [
            *((f"claims.{name}", path) for name, path in self.claims),
            *(("require", p) for p in self.require),
        ]:
            if path is not None and path.split(".")[0] == "user_metadata":
                raise ValueError(f"{name}: users change user_metadata themselves; use app_metadata")
        return self

    @property
    def called(self) -> str:
        return self.name or str(urlsplit(self.issuer or "").hostname)

    @property
    def accepted(self) -> tuple[str, ...]:
        return self.algorithms or (("HS256",) if self.secret is not None else ("RS256", "ES256", "EdDSA"))


class Config(BaseModel):
    """The issuers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuers: tuple[Issuer, ...] = Field(min_length=1, description="Whose tokens are accepted.")

    @model_validator(mode="after")
    def _tell_apart(self) -> Config:
        seen: set[tuple[str | None, str]] = set()
        names: dict[str, str | None] = {}
        for entry in self.issuers:
            # Else `ann` of the one were `ann` of the other.
            if names.setdefault(entry.called, entry.issuer) != entry.issuer:
                raise ValueError(
                    f"{names[entry.called]} and {entry.issuer} are both called {entry.called}: give each a `name`"
                )
            for algorithm in entry.accepted:
                if (entry.issuer, algorithm) in seen:
                    raise ValueError(f"{entry.issuer} is listed twice with {algorithm}")
                seen.add((entry.issuer, algorithm))
        return self


def _check_secret(secret: str, algorithms: Sequence[str]) -> None:
    if secret.lstrip().startswith(("-----BEGIN", "{", "ssh-")):
        raise ValueError("secret is a key, which others may know; a public key goes behind jwks_url")
    least = max(_SECRET_BYTES[name] for name in algorithms)
    if len(secret.encode()) < least:
        raise ValueError(f"secret must have {least} bytes at least")


class IssuerUnavailable(Unavailable):
    """The keys that this token must be checked with can't be fetched now. Try again soon."""

    code = "issuer_unavailable"


class _Keys:
    """An issuer's public keys."""

    def __init__(self, entry: Issuer, log: Any, errors: Cell) -> None:
        self._entry = entry
        self._log = log
        self._errors = errors
        self._keys: list[dict[str, Any]] = []
        self._fetched: float | None = None  # when they last came
        self._asked = -1e9  # when they were last fetched because of a token
        self._flight: asyncio.Task[bool] | None = None
        self._tasks = Tasks()
        self._session: aiohttp.ClientSession | None = None
        self._ready: dict[tuple[str, str], jwt.PyJWK] = {}
        self.fetches = 0

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            self._session = session
            refreshing = self._tasks.spawn(self._refresh(), "jwt_auth: keys")
            try:
                yield
            finally:
                refreshing.cancel()
                await self._tasks.drain(0)

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK:
        """Raises Unauthenticated, IssuerUnavailable."""
        key, answered = self._find(kid, algorithm), True
        if key is None and self._flight is not None:  # it may bring the key, and costs nothing
            answered = await asyncio.shield(self._flight)
            key = self._find(kid, algorithm)
        if key is None and answered and time.monotonic() - self._asked > COOLDOWN_SECONDS:
            self._asked = time.monotonic()
            await self._fetch()
            key = self._find(kid, algorithm)
        elif key is None and self._flight is not None:
            await asyncio.shield(self._flight)
            key = self._find(kid, algorithm)
        if key is not None:
            return key
        if self._fetched is None or self._is_stale():
            raise IssuerUnavailable
        raise Unauthenticated("The token is signed with a key that its issuer doesn't have.", code="invalid_token")

    def _is_stale(self) -> bool:
        return self._fetched is None or time.monotonic() - self._fetched > REFRESH_SECONDS + self._entry.stale_for

    def _find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        if self._is_stale():
            return None
        fitting = [key for key in self._keys if _fits(key, algorithm) and (kid is None or key.get("kid") == kid)]
        if len(fitting) != 1:  # none, or no telling which
            return None
        key = fitting[0]
        name = (str(key.get("kid")), algorithm)
        ready = self._ready.get(name)
        if ready is None:
            try:
                ready = self._ready[name] = jwt.PyJWK(key, algorithm=algorithm)
            except jwt.PyJWTError as error:
                self._log.warning(
                    "jwks_key_unusable", issuer=self._entry.issuer, kid=name[0], error=type(error).__name__
                )
                return None
        return ready

    async def _refresh(self) -> None:
        while True:
            well = await self._fetch()
            await asyncio.sleep(REFRESH_SECONDS if well else COOLDOWN_SECONDS / 3)

    async def _fetch(self) -> bool:
        """Whoever asks meanwhile waits for the same answer."""
        if self._flight is None:
            self._flight = self._tasks.spawn(self._fetch_once(), "jwt_auth: fetch")
            self._flight.add_done_callback(self._landed)
        return await asyncio.shield(self._flight)

    def _landed(self, _: asyncio.Task[bool]) -> None:
        self._flight = None

    async def _fetch_once(self) -> bool:
        self.fetches += 1
        try:
            url = self._entry.jwks_url or await self._discover()
            found = (await self._get(url)).get("keys")
            if not isinstance(found, list):
                raise ValueError("no list of keys")  # noqa: TRY301, TRY004 - told as other bad answers are
        except Exception as error:  # noqa: BLE001 - whatever the issuer sent, old keys go on and it is asked again
            self._errors.value += 1
            self._log.warning(
                "jwks_not_fetched", issuer=self._entry.issuer, error=f"{type(error).__name__}: {error}"[:300]
            )
            return False
        self._keys = [key for key in found if isinstance(key, dict)]
        self._ready = {}
        self._fetched = time.monotonic()
        return True

    async def _discover(self) -> str:
        """Raises ValueError if the document isn't this issuer's."""
        issuer = self._entry.issuer or ""
        document = await self._get(issuer.rstrip("/") + "/.well-known/openid-configuration")
        if document.get("issuer") != issuer:
            raise ValueError(f"its openid-configuration is of {str(document.get('issuer'))[:100]!r}")
        return _safe_url(str(document.get("jwks_uri")))

    async def _get(self, url: str) -> dict[str, Any]:
        if self._session is None:
            raise ValueError("not open")
        async with self._session.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as reply:
            if reply.status != 200:
                raise ValueError(f"HTTP {reply.status} from {url}")
            body = await reply.content.read(LONGEST_JWKS + 1)
            while len(body) <= LONGEST_JWKS and (more := await reply.content.read(LONGEST_JWKS)):
                body += more
        if len(body) > LONGEST_JWKS:
            raise ValueError(f"more than {LONGEST_JWKS} bytes from {url}")
        document = json.loads(body)
        if not isinstance(document, dict):
            raise ValueError(f"no JSON object from {url}")  # noqa: TRY004 - told as other bad answers are
        return document


def _fits(key: dict[str, Any], algorithm: str) -> bool:
    """The key's own type decides what it may be used for, not a token."""
    if key.get("use", "sig") != "sig" or key.get("alg", algorithm) != algorithm:
        return False
    if algorithm[:2] in {"RS", "PS"}:
        return key.get("kty") == "RSA"
    if algorithm in _CURVES:
        return key.get("kty") == "EC" and key.get("crv") == _CURVES[algorithm]
    return key.get("kty") == "OKP" and key.get("crv") in {"Ed25519", "Ed448"}


class _Source:
    """An issuer, and what its tokens are checked with."""

    def __init__(self, entry: Issuer, services: Services) -> None:
        errors = services.metrics.counter(
            "xenios_jwks_errors_total",
            "Fetches of an issuer's public keys that failed; those known go on for a while.",
            ("issuer",),
        )
        self.entry = entry
        self.name = entry.called
        self.kind = f"jwt.{self.name}"
        self.keys = _Keys(entry, services.log, errors.of(self.name)) if entry.secret is None else None
        self._secret = entry.secret.get_secret_value().encode() if entry.secret else b""

    async def verify(self, token: str, header: dict[str, Any], said: dict[str, Any]) -> tuple[Principal, float]:
        """The caller, and when the token ends. Raises Unauthenticated, IssuerUnavailable.

        `said`: its claims, which nobody has checked yet.
        """
        entry = self.entry
        for name in ("exp", "nbf", "iat"):
            _check_time(said, name)
        algorithm = str(header["alg"])
        kid = header.get("kid")
        key: Any = (
            self._secret
            if self.keys is None
            else await self.keys.find(kid if isinstance(kid, str) else None, algorithm)
        )
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=[entry.audience] if isinstance(entry.audience, str) else list(entry.audience),
                issuer=entry.issuer,
                leeway=entry.leeway,
                options={"require": ["exp", "sub", "aud", "iss"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("The token has expired.", code="expired_token") from None
        except jwt.ImmatureSignatureError:
            raise Unauthenticated("The token is not valid yet.", code="invalid_token") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("The token was made for another audience.", code="invalid_token") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"The token has no `{error.claim}`.", code="invalid_token") from None
        except jwt.PyJWTError:
            raise Unauthenticated("The token's signature or form is wrong.", code="invalid_token") from None
        for name, wanted in entry.require.items():
            given = _at(claims, name)
            if type(given) is not type(wanted) or given != wanted:  # 1 is not true
                raise Unauthenticated(f"The token's `{name}` is not what is accepted here.", code="invalid_token")
        if entry.supabase is not None and claims.get("is_anonymous") not in (None, False):
            raise Unauthenticated("Anonymous users are not accepted here.", code="invalid_token")
        return self._principal(claims), float(claims["exp"])

    def _principal(self, claims: dict[str, Any]) -> Principal:
        entry, where = self.entry, self.entry.claims
        caller = _text(claims, where.id)
        if caller is None:
            raise Unauthenticated(f"The token has no `{where.id}`.", code="invalid_token")
        roles = frozenset(_list(claims, where.roles) or ())
        models, endpoints = _list(claims, where.models), _list(claims, where.endpoints)
        return Principal(
            id=caller,
            kind=self.kind,
            tenant=self._tenant(claims, caller),
            team=_text(claims, where.team) if where.team else None,
            roles=roles,
            scopes=Scopes(
                models=entry.models if models is None else models,
                endpoints=entry.endpoints if endpoints is None else endpoints,
            ),
            limits=_limits(claims, where.limits),
            claims={"iss": entry.issuer},
            admin=not roles.isdisjoint(entry.admin_roles),
        )

    def _tenant(self, claims: dict[str, Any], caller: str) -> str:
        """`name/tenant`, or `name:caller` for one without: no claim can make the one the other's."""
        where = self.entry.claims.tenant
        named = _text(claims, where) if where else None
        if named is None:
            return f"{self.name}:{caller}"
        return named if self.entry.shared_tenants else f"{self.name}/{named}"


class Plugin:
    """Tells who is calling by a JSON Web Token."""

    Config: TypeAlias = Config
    reads_settings = ()  # the issuers' keys stay known over a reload

    def __init__(self, config: Config, services: Services) -> None:
        self._sources = [_Source(entry, services) for entry in config.issuers]
        self._issuers = frozenset(entry.issuer for entry in config.issuers)
        # by SHA-256 of the token: until when it is believed, the caller
        self._verified: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for source in self._sources:
                if source.keys is not None:
                    await stack.enter_async_context(source.keys.lifespan())
            yield

    @hookimpl
    async def authenticate(self, exchange: Exchange) -> Principal | None:
        token = exchange.credentials.token if exchange.credentials else None
        if not token or token.count(".") != 2 or len(token) > LONGEST_TOKEN or not token.isascii():
            return None
        digest = hashlib.sha256(token.encode()).digest()
        now = time.time()
        known = self._verified.get(digest)
        if known is not None and known[0] > now:
            return known[1]
        source, header, claims = self._source(token)
        if source is None:
            return None
        principal, ends = await source.verify(token, header, claims)
        self._verified[digest] = min(ends + source.entry.leeway, now + BELIEVED_SECONDS), principal
        if len(self._verified) > CACHE_SIZE:
            self._verified.popitem(last=False)
        return principal

    @hookimpl
    async def restore_principal(self, reference: str, kept: Principal | None) -> Principal | None:
        if kept is None or kept.reference != reference:
            return None
        issuer = kept.claims.get("iss")
        ours = any(kept.kind == source.kind and issuer == source.entry.issuer for source in self._sources)
        return kept if ours else None

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[str] | None:
        who = exchange.principal
        if who is None or not who.kind.startswith("jwt."):
            return None
        team = f", team {who.team}" if who.team else ""
        return [f"token of {who.kind[4:]}: {who.id}, tenant {who.tenant}{team}{', admin' if who.admin else ''}"]

    def _source(self, token: str) -> tuple[_Source | None, dict[str, Any], dict[str, Any]]:
        """Who must have made it, by what it says itself: nothing of this is believed. Raises Unauthenticated."""
        head, body, _ = token.split(".")
        header, claims = _decoded(head), _decoded(body)
        if header is None or claims is None:
            return None, {}, {}
        issuer = claims.get("iss")
        if not isinstance(issuer, str) or issuer not in self._issuers:
            return None, {}, {}
        if "crit" in header:
            raise Unauthenticated("The token asks for an extension that isn't known here.", code="invalid_token")
        algorithm = header.get("alg")
        for source in self._sources:
            if source.entry.issuer == issuer and algorithm in source.entry.accepted:
                return source, header, claims
        raise Unauthenticated("The token is signed in a way that isn't accepted here.", code="invalid_token")


def _decoded(part: str) -> dict[str, Any] | None:
    """None if it is no JSON object, or one that two readers may read differently."""
    try:
        value = json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)), object_pairs_hook=_told_once)
    except (binascii.Error, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _told_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _check_time(claims: dict[str, Any], name: str) -> None:
    """A number of seconds in a year of four digits, if it is there. Raises Unauthenticated."""
    value = claims.get(name)
    if value is None and name not in claims:
        return
    if type(value) not in (int, float) or not 0 <= value < LATEST:  # type: ignore[operator]  # a number: just asked
        raise Unauthenticated(f"The token's `{name}` is no time.", code="invalid_token")


def _at(claims: dict[str, Any], path: str) -> Any:
    """A claim by its whole name (issuers like URLs as names), else step by step."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for step in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value


def _text(claims: dict[str, Any], path: str) -> str | None:
    value = _at(claims, path)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Unauthenticated(f"The token's `{path}` is no short text.", code="invalid_token")
    return value


def _list(claims: dict[str, Any], path: str | None) -> tuple[str, ...] | None:
    value = _at(claims, path) if path else None
    if value is None:
        return None
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > LONGEST_LIST or not all(isinstance(item, str) for item in items):
        raise Unauthenticated(f"The token's `{path}` is no list of texts.", code="invalid_token")
    return tuple(items)


def _limits(claims: dict[str, Any], path: str | None) -> dict[str, Any]:
    """Raises Unauthenticated where a limit makes no sense: without it the caller would have none."""
    value = _at(claims, path) if path else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unauthenticated(f"The token's `{path}` is no object.", code="invalid_token")
    try:
        OwnLimits.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, found["loc"]))
        raise Unauthenticated(f"The token's `{path}.{name}`: {found['msg']}.", code="invalid_token") from None
    return value
