"""Who is told, where, and signed with what."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from gateway import NotFound
from gateway_plugins.jobs import api
from gateway_plugins.jobs.webhooks import signing, store

if TYPE_CHECKING:
    from gateway.kit import Database, Row, Statements
    from gateway_plugins.jobs import settings


class Receiver(NamedTuple):
    """Where a message goes now, and what it is signed with."""

    url: str
    secrets: list[str]


class Directory:
    """Who is told, and by which secrets: of the configuration, registered, or a tenant for its jobs' own webhooks."""

    def __init__(self, config: settings.Webhooks, pepper: str) -> None:
        self._pepper = pepper
        self.configured = {configured_id(entry): entry for entry in config.endpoints}

    async def listening(self, statements: Statements, tenant: str, event_type: str) -> list[str]:
        """Ids of endpoints that want to know."""
        rows = await store.listening(statements, tenant)
        disabled = {row["id"] for row in rows if row["disabled_at"] is not None}
        return [
            *(
                key
                for key, entry in self.configured.items()
                if key not in disabled
                and entry.tenant in {None, tenant}
                and any(fnmatchcase(event_type, glob) for glob in entry.events)
            ),
            *(
                row["id"]
                for row in rows
                if row["id"] not in disabled and row["url"] and event_type in json.loads(row["event_types"])
            ),
        ]

    async def receiver(self, database: Database, row: Row) -> Receiver | None:
        """Of a message. None: there is no such endpoint any more, or it is disabled."""
        if row["endpoint"] is None:
            return Receiver(row["url"], self.secrets(*await self.tenants(database, row["tenant"])))
        try:
            return await self.endpoint(database, row["endpoint"])
        except NotFound:
            return None

    async def endpoint(self, database: Database, endpoint_id: str, *, disabled: bool = False) -> Receiver:
        """Raises NotFound, also of one that is disabled, unless `disabled`."""
        found = await store.own(database, endpoint_id)
        if found is None or disabled or found["disabled_at"] is None:
            if (entry := self.configured.get(endpoint_id)) is not None:
                given = [entry.secret, *([entry.old_secret] if entry.old_secret else [])]
                return Receiver(entry.url, [secret.get_secret_value() for secret in given])
            if found is not None and found["url"]:
                return Receiver(found["url"], self.secrets(endpoint_id, found))
        raise NotFound(f"There is no webhook endpoint {endpoint_id[:100]!r}, or it is disabled.")

    async def tenants(self, database: Database, tenant: str) -> tuple[str, Row | None]:
        """For `secrets`: what signs the messages to jobs' own webhooks."""
        owner = f"tenant:{tenant}"
        return owner, await store.own(database, owner)

    def secrets(self, owner: str, row: Row | None) -> list[str]:
        """The one in force, then the one before while it still is."""
        version = row["version"] if row else 1
        old = row is not None and version > 1 and (row["old_until"] or 0) > api.now()
        return [signing.secret(self._pepper, owner, v) for v in ([version, version - 1] if old else [version])]


def configured_id(entry: settings.WebhookEndpoint) -> str:
    """The same as long as URL and tenant are."""
    return "we_" + sha256(f"{entry.tenant or ''}\0{entry.url}".encode()).hexdigest()[:16]
