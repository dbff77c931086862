"""API keys: who may call, with which key, until when and for what.

A key comes as `Authorization: Bearer …` or `x-api-key: …`; if both are sent, the first counts. The configuration holds
each key's hash (`xenios keys hash --new` makes a key and prints both), or names the environment variable that holds the
key. The bootstrap key of a new installation is accepted too, as an administrator's, until `bootstrap: false`.

With `database: true` there are keys in the database beside them: made, changed and revoked by `xenios keys …` and
/admin/keys while the gateway runs, on all workers within two seconds.

A key that isn't known is refused if it looks like ours, else left to the plugins after this one (another kind of
token may be theirs).
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gateway import Principal, Scopes, Unauthenticated, hookimpl
from gateway.kit import OwnLimits, Schema, hash_key, is_hash, is_well_formed
from gateway_plugins.api_keys.fields import Expiry, Globs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway import Exchange, Router, Services
    from gateway_plugins.api_keys.store import KeyStore

PREFIX = "sk-xenios-"
BOOTSTRAP = "bootstrap"
_SHORTEST = 20  # of keys that were made elsewhere; ours have 59 characters


class KeyEntry(BaseModel):
    """One key, and what its owner may do."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: str = Field(
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9_.@-]+$",
        description="Name of the key in logs, usage and limits; unique, never secret.",
    )
    hash: str | None = Field(
        None, description="What `xenios keys hash` prints for the key: `hmac-sha256:` and 64 hex digits."
    )
    env: str | None = Field(
        None, min_length=1, description="Name of the environment variable that holds the key. Instead of `hash`."
    )
    name: str | None = Field(None, description="For people: whose key this is. Default none.")
    tenant: str | None = Field(
        None, min_length=1, description="Whose data the key may see: caches, jobs, usage. Default: the key's id."
    )
    team: str | None = Field(None, description="The team that the key's use is counted for. Default none.")
    roles: Globs = Field((), description="Roles, for `when:` of other plugins. Default none.")
    admin: bool = Field(False, description="May use the admin routes. Default false.")
    expires: Expiry | None = Field(
        None, description="ISO date (good until its end, UTC) or time after which the key is refused. Default never."
    )
    models: Globs | None = Field(
        None,
        description="Models that may be asked for by name, as globs such as `anthropic/*`. With one of models, "
        "aliases and tasks given, nothing beside them may be used. Default all.",
    )
    aliases: Globs | None = Field(
        None, description="Aliases that may be used, as globs; one grants the models behind it. Default all."
    )
    tasks: Globs | None = Field(
        None, description="Tasks that may be used, as globs; one grants the models behind it. Default all."
    )
    endpoints: Globs | None = Field(
        None, description="Endpoints that may be used, as globs such as `chat/*` or `embeddings`. Default all."
    )
    limits: OwnLimits = Field(
        OwnLimits(), description="Limits of this key alone, which rate_limit and budgets hold. Default none."
    )

    @field_validator("hash")
    @classmethod
    def _check_hash(cls, value: str | None) -> str | None:
        if value is not None and not is_hash(value):
            # Not quoted: somebody may have put the key itself here.
            raise ValueError("is not a key's hash; `xenios keys hash` makes one")
        return value

    @field_validator("env")
    @classmethod
    def _check_env(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            key = _from_environment(value)
        except (OSError, ValueError):
            raise ValueError(f"the file that {value}_FILE names can't be read") from None
        if not key:
            raise ValueError(f"the environment variable {value} is not set")
        if key.startswith(PREFIX) and not is_well_formed(key):
            raise ValueError(f"the key in {value} has a typo: its checksum is wrong")
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"the key in {value} must be {_SHORTEST} or more printable ASCII characters, no blanks")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> KeyEntry:
        if (self.hash is None) is (self.env is None):
            raise ValueError("needs either hash or env")
        return self


class Config(BaseModel):
    """Which keys are accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: tuple[KeyEntry, ...] = Field((), description="The keys that are accepted. Default none but the bootstrap's.")
    bootstrap: bool = Field(
        True,
        description="Accept the bootstrap key (an administrator's, made in server.data_dir at the first start). "
        "Default true; turn it off once there are keys of your own.",
    )
    database: bool = Field(
        False,
        description="Keys in services.database too: `xenios keys create`, /admin/keys. Default false.",
    )
    on_store_error: Literal["allow", "deny"] = Field(
        "allow",
        description="While the database is away: accept keys that were in use before (nobody can revoke them then), or "
        "answer all of its keys with 503. Default allow.",
    )

    @model_validator(mode="after")
    def _tell_apart(self) -> Config:
        if not self.keys and not self.bootstrap and not self.database:
            raise ValueError("accepts nobody: list keys, or say database: true or bootstrap: true")
        ids = [entry.id for entry in self.keys]
        if BOOTSTRAP in ids:
            raise ValueError(f"the id {BOOTSTRAP!r} is the bootstrap key's")
        for what, values in (
            ("id", ids),
            ("hash", [entry.hash for entry in self.keys]),
            ("key", [entry.env and _from_environment(entry.env) for entry in self.keys]),
        ):
            seen: dict[str, KeyEntry] = {}
            for entry, value in zip(self.keys, values, strict=True):
                if value is not None and seen.setdefault(value, entry) is not entry:
                    raise ValueError(f"two entries have the same {what}: {seen[value].id!r} and {entry.id!r}")
        return self


@dataclass(frozen=True, slots=True)
class _Key:
    hash: str
    principal: Principal
    expires: float  # seconds since the epoch


class Plugin:
    """Tells who is calling by the API key."""

    Config: TypeAlias = Config
    reads_settings = ()  # keys that are known stay known over a reload
    schema = Schema("api_keys", Path(__file__).parent)
    commands = "`xenios keys create`, `list`, `show`, `rotate` and `revoke` come with api_keys and `database: true`."

    @staticmethod
    def owns_tables(config: Config) -> bool:
        return config.database

    def __init__(self, config: Config, services: Services) -> None:
        self.on_store_error = config.on_store_error
        self._services = services
        self._store: KeyStore | None = None
        if config.database:
            from gateway_plugins.api_keys.store import KeyStore  # noqa: PLC0415 - most configurations do without

            self._store = KeyStore(services.database, config.on_store_error, services.log)
            self.ping = services.database.ping
        self._pepper = services.pepper
        keys = [_key(entry, services.pepper) for entry in config.keys]
        if config.bootstrap and services.bootstrap_key_hash is not None:
            principal = Principal(id=BOOTSTRAP, tenant="default", admin=True)
            keys.append(_Key(services.bootstrap_key_hash, principal, float("inf")))
        self._by_hash: dict[str, _Key] = {}
        for key in keys:
            # Config sees two equal hashes, and two equal keys; here are one's hash and the other's key.
            if self._by_hash.setdefault(key.hash, key) is not key:
                other = self._by_hash[key.hash].principal.id
                raise ValueError(f"{key.principal.id!r} and {other!r} are the same key")
        self._by_reference = {key.principal.reference: key for key in keys}
        # Those that were shown before, by a digest that is this process's own: it costs a third of what is stored.
        self._shown: dict[bytes, _Key] = {}
        self._salt = secrets.token_bytes(32)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        if self._store is None:
            yield
            return
        async with self._store.lifespan():
            yield

    @hookimpl
    def register_routes(self, router: Router) -> None:
        if self._store is not None:
            from gateway_plugins.api_keys.admin import Admin  # noqa: PLC0415 - as above

            Admin(self._services, {key.principal.id for key in self._by_hash.values()}).register(router)

    @hookimpl
    def register_commands(self, cli: Any) -> None:
        if self.config.database:  # type: ignore[attr-defined]  # the command line's stand-in for a plugin has it
            from gateway_plugins.api_keys.commands import add_commands  # noqa: PLC0415 - as above

            add_commands(self, cli)

    @hookimpl
    async def authenticate(self, exchange: Exchange) -> Principal | None:
        token = exchange.credentials.token if exchange.credentials else None
        if not token:
            return None
        key = self._find(token) if token.isascii() else None
        if key is not None:
            if key.expires <= time.time():
                raise Unauthenticated("This API key has expired.", code="expired_api_key")
            return key.principal
        if not token.startswith(PREFIX):
            return None
        if not is_well_formed(token):
            raise Unauthenticated("This API key has a typo: it is cut short or a character is wrong.")
        if self._store is not None:
            known = await self._store.find(hash_key(token, self._pepper))
            if known is not None:
                principal = known.check()
                self._store.note_use(known)
                return principal
        raise Unauthenticated("This API key is not known here.")

    @hookimpl
    async def restore_principal(self, reference: str, kept: Principal | None) -> Principal | None:
        del kept  # a key may have been revoked since
        key = self._by_reference.get(reference)
        if key is not None:
            return key.principal if key.expires > time.time() else None
        if self._store is None or not reference.startswith("key:"):
            return None
        known = await self._store.by_id(reference.removeprefix("key:"))
        return None if known is None or known.revoked or known.expires <= time.time() else known.principal

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[str] | None:
        key = self._by_reference.get(exchange.principal.reference) if exchange.principal else None
        if key is None:
            return None
        who, until = key.principal, ""
        if key.expires != float("inf"):
            until = f", expires {datetime.fromtimestamp(key.expires, UTC):%Y-%m-%d %H:%M} UTC"
        team = f", team {who.team}" if who.team else ""
        return [f"key {who.id}: tenant {who.tenant}{team}{', admin' if who.admin else ''}{until}"]

    def _find(self, token: str) -> _Key | None:
        shown = blake2b(token.encode(), digest_size=32, key=self._salt).digest()
        key = self._shown.get(shown)
        if key is None:
            key = self._by_hash.get(hash_key(token, self._pepper))
            if key is not None:
                self._shown[shown] = key  # as many as there are keys
        return key


def _from_environment(name: str) -> str:
    """Raises OSError: as `${NAME}`, it may stand in a file that `NAME_FILE` names."""
    file = os.environ.get(f"{name}_FILE")
    return (os.environ.get(name) or (Path(file).read_text() if file else "")).strip()


def _key(entry: KeyEntry, pepper: str) -> _Key:
    digest = entry.hash or hash_key(_from_environment(entry.env or ""), pepper)
    principal = Principal(
        id=entry.id,
        tenant=entry.tenant or entry.id,
        team=entry.team,
        roles=frozenset(entry.roles),
        scopes=Scopes(entry.models, entry.aliases, entry.tasks, entry.endpoints),
        limits=entry.limits.model_dump(exclude_unset=True),
        claims={"name": entry.name} if entry.name else {},
        admin=entry.admin,
    )
    return _Key(digest, principal, entry.expires.timestamp() if entry.expires else float("inf"))
