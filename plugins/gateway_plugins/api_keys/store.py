"""Keys in the database: how they are looked up for requests, and how they are changed."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from gateway import (
    BadRequest,
    Conflict,
    Duration,
    NotFound,
    Principal,
    Scopes,
    StoreUnavailable,
    Tasks,
    Unauthenticated,
)
from gateway.kit import OwnLimits, hash_key, new_key
from gateway_plugins.api_keys.fields import Expiry, Globs, Plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway.kit import Database, Statements

FRESH_SECONDS = 1.5  # a key that was looked at longer ago is looked at again before it is believed
REFRESH_SECONDS = 1.0  # keys in use are looked at again that often, together
STALE_SECONDS = 3600.0  # while the database is away, nobody can revoke a key either
USED_SECONDS = 60.0  # how often `last_used_at` is written
CACHE_SIZE = 20_000
UNKNOWN_SIZE = 10_000
BATCH = 500
WAITING = 5_000

_COLUMNS = (
    "id, hash, hint, tenant, team, owner, grants, created_at, created_by, expires_at, revoked_at, old_hash, old_until, "
    "last_used_at"
)


class NewKey(BaseModel):
    """What may be said of a key. Unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None = Field(None, min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.@-]+$")
    name: Plain | None = None
    tenant: Plain | None = None
    team: Plain | None = None
    owner: Plain | None = None
    tags: tuple[Plain, ...] = Field((), max_length=50)
    roles: Globs = ()
    admin: bool = Field(False, strict=True)  # "yes" makes nobody an administrator
    models: Globs | None = None
    aliases: Globs | None = None
    tasks: Globs | None = None
    endpoints: Globs | None = None
    limits: OwnLimits = OwnLimits()
    expires: Expiry | None = None


class ChangedKey(NewKey):
    """What of a key may change: all but its id."""

    id: None = None


class Rotation(BaseModel):
    """How long the old key goes on working."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overlap: Duration = Field(0.0, ge=0, le=90 * 86400)


@dataclass(frozen=True, slots=True)
class Known:
    """A key that exists."""

    principal: Principal
    expires: float  # seconds since 1970
    revoked: bool

    def check(self) -> Principal:
        if self.revoked:
            raise Unauthenticated("This API key was revoked.", code="revoked_api_key")
        if self.expires <= time.time():
            raise Unauthenticated("This API key has expired.", code="expired_api_key")
        return self.principal


@dataclass(slots=True)
class _Seen:
    known: Known | None
    checked: float  # when the question was asked, not answered: a revocation meanwhile must not be missed
    used: bool = False


@dataclass
class KeyStore:
    """Answers from memory what it asked the database for within `FRESH_SECONDS`.

    Whatever clients send, the database sees one question at a time from each worker, about up to `BATCH` keys.
    """

    database: Database
    on_store_error: str = "allow"
    log: Any = None
    _known: OrderedDict[str, _Seen] = field(default_factory=OrderedDict)
    _unknown: OrderedDict[str, _Seen] = field(default_factory=OrderedDict)
    _waiting: dict[str, asyncio.Future[Known | None]] = field(default_factory=dict)
    _used: dict[str, int] = field(default_factory=dict)  # id → milliseconds
    _tasks: Tasks = field(default_factory=Tasks)
    _asking: bool = False

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        refreshing = self._tasks.spawn(self._refresh(), "api_keys: refresh")
        try:
            yield
        finally:
            refreshing.cancel()
            await self._tasks.drain(0)
            await self._write_used()

    async def find(self, digest: str) -> Known | None:
        """The key with this hash, None if there is none. Raises StoreUnavailable."""
        seen = self._known.get(digest) or self._unknown.get(digest)
        if seen is not None and time.monotonic() - seen.checked < FRESH_SECONDS:
            seen.used = True
            return seen.known
        waiting = self._waiting.get(digest)
        if waiting is None:
            if len(self._waiting) >= WAITING:
                raise StoreUnavailable
            waiting = self._waiting[digest] = asyncio.get_running_loop().create_future()
            if not self._asking:
                self._asking = True
                self._tasks.spawn(self._ask(), "api_keys: look up")
        # shielded: others wait for it too
        return await asyncio.shield(waiting)

    def note_use(self, known: Known) -> None:
        self._used[known.principal.id] = int(time.time() * 1000)

    async def by_id(self, key_id: str) -> Known | None:
        row = await self.database.fetch_one(f"SELECT {_COLUMNS} FROM api_keys_keys WHERE id = $1", key_id)  # noqa: S608
        return None if row is None else _known(row, row["hash"])

    async def _ask(self) -> None:
        """Until nobody waits."""
        late: set[str] = set()
        try:
            while self._waiting:
                digests = list(self._waiting)[:BATCH]
                try:
                    await self._load(digests)
                except StoreUnavailable as error:
                    for digest in digests:
                        self._answer_without(digest, error)
                except Exception:
                    self.log.exception("api_keys_look_up_failed")
                    for digest in digests:
                        self._answer_without(digest, StoreUnavailable())
                else:
                    for digest in digests:
                        self._answer(digest, late)
        finally:
            self._asking = False

    def _answer(self, digest: str, late: set[str]) -> None:
        """A yes that took longer than it may be believed is asked for once more: there may have been a revocation."""
        seen = self._known.get(digest)
        known = seen.known if seen is not None else None
        if seen is None or known is None or known.revoked or time.monotonic() - seen.checked < FRESH_SECONDS:
            waiting = self._waiting.pop(digest)
            if not waiting.done():
                waiting.set_result(known)
        elif digest in late:
            self._answer_without(digest, StoreUnavailable())
        else:
            late.add(digest)

    def _answer_without(self, digest: str, error: StoreUnavailable) -> None:
        """The database is away: what was known is believed on, if the settings allow it."""
        waiting = self._waiting.pop(digest)
        seen = self._known.get(digest)
        if waiting.done():
            return
        if seen is not None and self.on_store_error == "allow" and time.monotonic() - seen.checked < STALE_SECONDS:
            waiting.set_result(seen.known)
        else:
            waiting.set_exception(error)

    async def _load(self, digests: Sequence[str]) -> None:
        """What the database says of these is known from now on, as of the time of the question."""
        asked = time.monotonic()
        places = ", ".join(f"${i}" for i in range(1, len(digests) + 1))
        rows = await self.database.fetch(
            f"SELECT {_COLUMNS} FROM api_keys_keys WHERE hash IN ({places}) OR old_hash IN ({places})",  # noqa: S608
            *digests,
        )
        found = {}
        for row in rows:
            for digest in (row["hash"], row["old_hash"]):
                if digest is not None and (known := self._read(row, digest)) is not None:
                    found[digest] = known
        for digest in digests:
            newer = self._known.get(digest) or self._unknown.get(digest)
            if newer is not None and newer.checked > asked:
                continue  # two questions overtook each other: the later one knows of a revocation between them
            if digest in found:
                self._unknown.pop(digest, None)
                self._known[digest] = _Seen(found[digest], asked)
                self._known.move_to_end(digest)
            else:
                self._known.pop(digest, None)
                self._unknown[digest] = _Seen(None, asked)
        while len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        while len(self._unknown) > UNKNOWN_SIZE:
            self._unknown.popitem(last=False)

    def _read(self, row: dict[str, Any], digest: str) -> Known | None:
        """A row that can't be understood is no key, and keeps nobody else out."""
        try:
            return _known(row, digest)
        except (ValueError, KeyError, TypeError):
            self.log.exception("api_key_not_understood", key_id=row["id"])
            return None

    async def _refresh(self) -> None:
        """Keys in use never wait for the database, and one that was revoked is known to be within two seconds."""
        written = time.monotonic()
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            used = [digest for digest, seen in self._known.items() if seen.used]
            try:
                for start in range(0, len(used), BATCH):
                    await self._load(used[start : start + BATCH])
                if time.monotonic() - written > USED_SECONDS:
                    written = time.monotonic()
                    await self._write_used()
            except StoreUnavailable:
                continue
            except Exception:
                self.log.exception("api_keys_refresh_failed")

    async def _write_used(self) -> None:
        used, self._used = self._used, {}
        if used:
            try:
                await self.database.execute_many(
                    "UPDATE api_keys_keys SET last_used_at = $1 WHERE id = $2", [(at, key) for key, at in used.items()]
                )
            except StoreUnavailable:
                self._used = {**used, **self._used}


# --- changes ---------------------------------------------------------------------------------------------------------


async def create(database: Database, pepper: str, wanted: NewKey, actor: str) -> tuple[dict[str, Any], str]:
    """(the key as people see it, its secret). Raises BadRequest, Conflict, StoreUnavailable."""
    if wanted.expires is not None and wanted.expires.timestamp() <= time.time():
        raise BadRequest("expires: is in the past", param="expires")
    key_id = wanted.id or "key_" + secrets.token_hex(8)
    secret = new_key()
    row = {
        "id": key_id,
        "hash": hash_key(secret, pepper),
        "hint": _hint(secret),
        "tenant": wanted.tenant or key_id,
        "team": wanted.team,
        "owner": wanted.owner,
        "grants": _grants(wanted),
        "created_at": _now(),
        "created_by": actor,
        "expires_at": int(wanted.expires.timestamp() * 1000) if wanted.expires else None,
        "revoked_at": None,
        "old_hash": None,
        "old_until": None,
        "last_used_at": None,
    }
    async with database.transaction() as statements:
        if await statements.fetch_one("SELECT id FROM api_keys_keys WHERE id = $1", key_id):
            raise Conflict(f"There is a key {key_id!r} already.", param="id")
        places = ", ".join(f"${i}" for i in range(1, len(row) + 1))
        await statements.execute(
            f"INSERT INTO api_keys_keys ({', '.join(row)}) VALUES ({places})",  # noqa: S608 - our own names
            *row.values(),
        )
        await _record(statements, actor, "create", key_id, _shown(row))
    return _shown(row), secret


async def page(
    database: Database, *, limit: int, after: str | None = None, tenant: str | None = None, team: str | None = None
) -> dict[str, Any]:
    """Keys by id, `limit` of them."""
    conditions, values = ["id > $1"], [after or ""]
    for name, value in (("tenant", tenant), ("team", team)):
        if value is not None:
            values.append(value)
            conditions.append(f"{name} = ${len(values)}")
    rows = await database.fetch(
        f"SELECT {_COLUMNS} FROM api_keys_keys WHERE {' AND '.join(conditions)} ORDER BY id LIMIT {limit + 1}",  # noqa: S608
        *values,
    )
    shown = [_shown(row) for row in rows[:limit]]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(rows) > limit,
        "last_id": shown[-1]["id"] if shown else None,
    }


async def show(database: Database, key_id: str) -> dict[str, Any]:
    """Raises NotFound, StoreUnavailable."""
    return _shown(await _row(database, key_id))


async def change(
    database: Database, key_id: str, changes: dict[str, Any], wanted: ChangedKey, actor: str
) -> dict[str, Any]:
    """Set the fields named in `changes` to what `wanted` says. Raises NotFound, StoreUnavailable."""
    async with database.transaction() as statements:
        row = await _locked(database, statements, key_id)
        grants = json.loads(row["grants"])
        now = json.loads(_grants(wanted))
        grants.update({name: now[name] for name in changes if name in now})
        row["grants"] = json.dumps(grants)
        for name in ("tenant", "team", "owner"):
            if name in changes:
                row[name] = getattr(wanted, name) or (key_id if name == "tenant" else None)
        if "expires" in changes:
            row["expires_at"] = int(wanted.expires.timestamp() * 1000) if wanted.expires else None
        await statements.execute(
            "UPDATE api_keys_keys SET grants = $1, tenant = $2, team = $3, owner = $4, expires_at = $5 WHERE id = $6",
            row["grants"], row["tenant"], row["team"], row["owner"], row["expires_at"], key_id,
        )  # fmt: skip
        await _record(statements, actor, "change", key_id, {name: _shown(row).get(name) for name in changes})
    return _shown(row)


async def rotate(
    database: Database, pepper: str, key_id: str, overlap: float, actor: str
) -> tuple[dict[str, Any], str]:
    """A new secret; the old one works for `overlap` seconds more. Raises NotFound, BadRequest, StoreUnavailable."""
    secret = new_key()
    async with database.transaction() as statements:
        row = await _locked(database, statements, key_id)
        if row["revoked_at"] is not None:
            raise BadRequest(f"The key {key_id!r} was revoked; create another.")
        until = _now() + int(overlap * 1000)
        old = (row["hash"], until) if overlap > 0 else (None, None)
        row |= {"hash": hash_key(secret, pepper), "hint": _hint(secret), "old_hash": old[0], "old_until": old[1]}
        await statements.execute(
            "UPDATE api_keys_keys SET hash = $1, hint = $2, old_hash = $3, old_until = $4 WHERE id = $5",
            row["hash"], row["hint"], row["old_hash"], row["old_until"], key_id,
        )  # fmt: skip
        await _record(statements, actor, "rotate", key_id, {"overlap_seconds": overlap})
    return _shown(row), secret


async def revoke(database: Database, key_id: str, actor: str) -> dict[str, Any]:
    """For good, the secret before a rotation too. Raises NotFound, StoreUnavailable."""
    async with database.transaction() as statements:
        row = await _locked(database, statements, key_id)
        if row["revoked_at"] is None:
            row["revoked_at"] = _now()
            await statements.execute(
                "UPDATE api_keys_keys SET revoked_at = $1 WHERE id = $2", row["revoked_at"], key_id
            )
            await _record(statements, actor, "revoke", key_id, {})
    return _shown(row)


async def audit(database: Database, *, limit: int, key_id: str | None = None) -> dict[str, Any]:
    """The newest changes first."""
    where, values = ("WHERE key_id = $1", [key_id]) if key_id else ("", [])
    rows = await database.fetch(
        f"SELECT id, at, actor, action, key_id, detail FROM api_keys_audit {where} ORDER BY at DESC, id LIMIT {limit}",  # noqa: S608
        *values,
    )
    return {
        "object": "list",
        "data": [{**row, "at": _iso(row["at"]), "detail": json.loads(row["detail"])} for row in rows],
    }


async def _locked(database: Database, statements: Statements, key_id: str) -> dict[str, Any]:
    """Nobody changes it meanwhile: what one administrator takes away, another's change doesn't bring back."""
    return await _row(statements, key_id, " FOR UPDATE" if database.dialect == "postgresql" else "")


async def _row(statements: Database | Statements, key_id: str, lock: str = "") -> dict[str, Any]:
    row = await statements.fetch_one(f"SELECT {_COLUMNS} FROM api_keys_keys WHERE id = $1{lock}", key_id)  # noqa: S608
    if row is None:
        raise NotFound(f"There is no key {key_id[:100]!r}.")
    return row


async def _record(statements: Statements, actor: str, action: str, key_id: str, detail: dict[str, Any]) -> None:
    await statements.execute(
        "INSERT INTO api_keys_audit (id, at, actor, action, key_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        secrets.token_hex(16), _now(), actor, action, key_id, json.dumps(detail),
    )  # fmt: skip


def _grants(wanted: NewKey) -> str:
    names = ("name", "tags", "roles", "admin", "models", "aliases", "tasks", "endpoints")
    grants = {name: getattr(wanted, name) for name in names}
    return json.dumps({**grants, "limits": wanted.limits.model_dump(mode="json", exclude_unset=True)})


def _known(row: dict[str, Any], digest: str) -> Known:
    grants = json.loads(row["grants"])
    ends = [row["expires_at"], row["old_until"] if digest == row["old_hash"] else None]
    scopes = Scopes(
        *(None if grants[n] is None else tuple(grants[n]) for n in ("models", "aliases", "tasks", "endpoints"))
    )
    claims = {name: value for name, value in (("name", grants["name"]), ("owner", row["owner"])) if value}
    principal = Principal(
        id=row["id"],
        tenant=row["tenant"],
        team=row["team"],
        roles=frozenset(grants["roles"]),
        scopes=scopes,
        limits=grants["limits"],
        claims={**claims, "tags": grants["tags"]} if grants["tags"] else claims,
        admin=grants["admin"],
    )
    return Known(
        principal,
        min((end / 1000 for end in ends if end is not None), default=float("inf")),
        row["revoked_at"] is not None,
    )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """As people see it: no hash."""
    state = "revoked" if row["revoked_at"] is not None else "active"
    if state == "active" and row["expires_at"] is not None and row["expires_at"] <= _now():
        state = "expired"
    return {
        "id": row["id"],
        "object": "api_key",
        "hint": row["hint"],
        "state": state,
        "tenant": row["tenant"],
        "team": row["team"],
        "owner": row["owner"],
        **json.loads(row["grants"]),
        "created_at": _iso(row["created_at"]),
        "created_by": row["created_by"],
        "expires": _iso(row["expires_at"]),
        "revoked_at": _iso(row["revoked_at"]),
        "old_key_until": _iso(row["old_until"]),
        "last_used_at": _iso(row["last_used_at"]),
    }


def words(message: str) -> str:
    """What pydantic says, for people."""
    return message.removeprefix("Value error, ").replace("dictionary or instance of OwnLimits", "object")


def _hint(secret: str) -> str:
    return secret[:14] + "…"


def _now() -> int:
    return int(time.time() * 1000)


def _iso(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds // 1000))
