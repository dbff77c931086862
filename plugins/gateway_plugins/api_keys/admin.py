"""/admin/keys and /admin/audit: keys in the database, for administrators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from gateway import BadRequest, Conflict, Reply
from gateway.kit import limit_of, query_of
from gateway_plugins.api_keys import store

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from gateway import Exchange, Router, Services

M = TypeVar("M", bound=BaseModel)
MOST = 500


class Admin:
    """The routes."""

    def __init__(self, services: Services, taken: AbstractSet[str]) -> None:
        """`taken`: ids of the keys in the YAML."""
        self._services = services
        self._taken = taken

    def register(self, router: Router) -> None:
        for method, path, handler, summary in (
            ("POST", "/admin/keys", self.create, "Make a key. Its secret is in this answer and nowhere else."),
            ("GET", "/admin/keys", self.list, "Keys, by id. Query: limit, after, tenant, team."),
            ("GET", "/admin/keys/{id}", self.show, "One key."),
            ("PATCH", "/admin/keys/{id}", self.change, "Change what is given."),
            ("POST", "/admin/keys/{id}/rotate", self.rotate, "A new secret; `overlap`: how long the old one works on."),
            ("POST", "/admin/keys/{id}/revoke", self.revoke, "Refuse the key from now on."),
            ("GET", "/admin/audit", self.audit, "Who changed keys, newest first. Query: limit, key_id."),
        ):
            # to revoke needs no body, not even an empty one
            body: Literal["none"] | None = "none" if path.endswith("/revoke") else None
            router.add(method, path, handler, access="admin", body=body, summary=summary)

    async def create(self, exchange: Exchange) -> Reply:
        wanted = parsed(store.NewKey, exchange.body)
        if wanted.id in self._taken:
            raise Conflict(f"The configuration has a key {wanted.id!r} already.", param="id")
        key, secret = await store.create(self._services.database, self._services.pepper, wanted, _actor(exchange))
        return Reply(201, data={**key, "key": secret}, headers={"Cache-Control": "no-store"})

    async def list(self, exchange: Exchange) -> Reply:
        found = await store.page(self._services.database, **_paged(exchange, "after", "tenant", "team"))
        return Reply(200, data=found)

    async def show(self, exchange: Exchange) -> Reply:
        return Reply(200, data=await store.show(self._services.database, _id(exchange)))

    async def change(self, exchange: Exchange) -> Reply:
        wanted = parsed(store.ChangedKey, exchange.body)
        key = await store.change(self._services.database, _id(exchange), exchange.body, wanted, _actor(exchange))
        return Reply(200, data=key)

    async def rotate(self, exchange: Exchange) -> Reply:
        overlap = parsed(store.Rotation, exchange.body).overlap
        services = self._services
        key, secret = await store.rotate(services.database, services.pepper, _id(exchange), overlap, _actor(exchange))
        return Reply(200, data={**key, "key": secret}, headers={"Cache-Control": "no-store"})

    async def revoke(self, exchange: Exchange) -> Reply:
        return Reply(200, data=await store.revoke(self._services.database, _id(exchange), _actor(exchange)))

    async def audit(self, exchange: Exchange) -> Reply:
        return Reply(200, data=await store.audit(self._services.database, **_paged(exchange, "key_id")))


def parsed(model: type[M], body: dict[str, Any]) -> M:
    """Raises BadRequest that names the field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(step) for step in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        raise BadRequest(
            f"There is no field {field[:100]!r} here." if unknown else f"{field}: {store.words(first['msg'])}",
            param=field[:100],
        ) from None


def _id(exchange: Exchange) -> str:
    return exchange.request.path_params["id"]


def _actor(exchange: Exchange) -> str:
    return exchange.principal.reference if exchange.principal else "nobody"


def _paged(exchange: Exchange, *known: str) -> dict[str, Any]:
    query = query_of(exchange, ("limit", *known))
    return {**query, "limit": limit_of(query, default=50, most=MOST)}
