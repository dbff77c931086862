"""/v1/webhook_endpoints as OpenAI's SDKs know it, and a tenant's own signing secret."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gateway import BadRequest, Forbidden, Reply
from gateway.kit import limit_of, query_of
from gateway_plugins.jobs import api
from gateway_plugins.jobs.settings import EVENTS
from gateway_plugins.jobs.webhooks import messages, signing, store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway import Exchange, Router
    from gateway.kit import Row
    from gateway_plugins.jobs.webhooks.part import Webhooks

M = TypeVar("M", bound=BaseModel)
_NO_STORE = {"Cache-Control": "no-store"}
_Strict = ConfigDict(extra="forbid", strict=True)
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Changes(BaseModel):
    model_config = _Strict

    name: Name = ""
    url: str = ""
    event_types: list[str] = Field([], min_length=1, max_length=100)

    @field_validator("event_types")
    @classmethod
    def _check_events(cls, value: list[str]) -> list[str]:
        for event in value:
            if event not in EVENTS:
                raise ValueError(f"there is no event {event[:100]!r} here; there are {', '.join(EVENTS)}")
        return sorted(set(value))


class _New(_Changes):
    name: Name
    url: str
    event_types: list[str] = Field(min_length=1, max_length=100)


class _Rotation(BaseModel):
    model_config = _Strict

    keep_old_secret_active_for_24_hours: bool = True


class _Test(BaseModel):
    model_config = _Strict

    event_type: str

    @field_validator("event_type")
    @classmethod
    def _check_event(cls, value: str) -> str:
        if value not in EVENTS:
            raise ValueError(f"there is no event {value[:100]!r} here")
        return value


class Routes:
    """The routes."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks
        self._database = webhooks.services.database

    def register(self, router: Router) -> None:
        for method, path, handler, summary in (
            (
                "POST",
                "/v1/webhook_endpoints",
                self.create,
                "Be told of events. The signing secret is shown here alone.",
            ),
            ("GET", "/v1/webhook_endpoints", self.list, "Your webhook endpoints. Query: limit, after; admins: tenant."),
            ("GET", "/v1/webhook_endpoints/{id}", self.show, "One webhook endpoint."),
            ("POST", "/v1/webhook_endpoints/{id}", self.change, "Change what is given, and call it again if disabled."),
            ("DELETE", "/v1/webhook_endpoints/{id}", self.delete, "Tell it nothing any more."),
            (
                "POST",
                "/v1/webhook_endpoints/{id}/rotate_secret",
                self.rotate,
                "A new signing secret, shown here alone.",
            ),
            ("POST", "/v1/webhook_endpoints/{id}/test", self.test, "Send an example now, and tell what came back."),
            ("GET", "/v1/webhook_event_types", self.events, "Of what webhooks tell."),
            ("GET", "/v1/webhook_secret", self.secret, "What messages to jobs' own webhooks are signed with."),
            ("POST", "/v1/webhook_secret/rotate", self.rotate_own, "Another secret for jobs' own webhooks."),
        ):
            router.add(method, path, handler, summary=summary)

    async def create(self, exchange: Exchange) -> Reply:
        wanted = parsed(_New, exchange.body)
        self._webhooks.check(wanted.url, "url")
        row = await store.create_endpoint(
            self._database, api.tenant_of(exchange), wanted.name, wanted.url, wanted.event_types
        )
        return Reply(200, data=self._with_secret(row), headers=_NO_STORE)

    async def list(self, exchange: Exchange) -> Reply:
        query = query_of(exchange, ("limit", "after", "tenant"))
        tenant: str | None = api.tenant_of(exchange)
        if "tenant" in query:
            if not api.is_admin(exchange):
                raise Forbidden("Only administrators see other tenants' webhook endpoints.", param="tenant")
            tenant = query["tenant"]
        limit = limit_of(query, default=20, most=100)
        rows, more = await store.endpoints(self._database, tenant, limit=limit, after=query.get("after"))
        return Reply(200, data=api.listed([self._shown(row) for row in rows], more=more))

    async def show(self, exchange: Exchange) -> Reply:
        return Reply(200, data=self._shown(await store.endpoint(self._database, _id(exchange), _whose(exchange))))

    async def change(self, exchange: Exchange) -> Reply:
        wanted = parsed(_Changes, exchange.body)
        changes = wanted.model_dump(exclude_unset=True)
        if "url" in changes:
            self._webhooks.check(wanted.url, "url")
        row = await store.change_endpoint(self._database, _id(exchange), _whose(exchange), changes)
        return Reply(200, data=self._shown(row))

    async def delete(self, exchange: Exchange) -> Reply:
        await store.delete_endpoint(self._database, _id(exchange), _whose(exchange))
        return Reply(200, data={"id": _id(exchange), "object": "webhook_endpoint.deleted", "deleted": True})

    async def rotate(self, exchange: Exchange) -> Reply:
        keep = self._keep(exchange)
        row = await store.rotate(self._database, _id(exchange), _whose(exchange), keep)
        return Reply(200, data=self._with_secret(row), headers=_NO_STORE)

    async def test(self, exchange: Exchange) -> Reply:
        event_type = parsed(_Test, exchange.body).event_type
        row = await store.endpoint(self._database, _id(exchange), _whose(exchange))
        webhooks = self._webhooks
        status = await messages.example(webhooks.client, webhooks.directory, self._database, row["id"], event_type)
        return Reply(
            200,
            data={
                "object": "webhook_endpoint.test",
                "webhook_endpoint_id": row["id"],
                "event_type": event_type,
                "status_code": status,
                "success": True,
            },
        )

    async def events(self, exchange: Exchange) -> Reply:
        query_of(exchange, ())
        return Reply(200, data={"object": "list", "data": [*EVENTS]})

    async def secret(self, exchange: Exchange) -> Reply:
        directory = self._webhooks.directory
        return self._tenants(*await directory.tenants(self._database, api.tenant_of(exchange)))

    async def rotate_own(self, exchange: Exchange) -> Reply:
        owner = f"tenant:{api.tenant_of(exchange)}"
        return self._tenants(owner, await store.rotate_own(self._database, owner, self._keep(exchange)))

    def _keep(self, exchange: Exchange) -> float:
        """Seconds for which the old secret is kept."""
        kept = parsed(_Rotation, exchange.body).keep_old_secret_active_for_24_hours
        return self._webhooks.config.rotation if kept else 0.0

    def _tenants(self, owner: str, row: Row | None) -> Reply:
        secret = self._webhooks.directory.secrets(owner, row)[0]
        old = row["old_until"] if row and row["old_until"] and row["old_until"] > api.now() else None
        data = {
            "object": "webhook_secret",
            "signing_secret": secret,
            "signing_secret_hint": signing.hint(secret),
            "old_secret_until": old and old // 1000,
        }
        return Reply(200, data=data, headers=_NO_STORE)

    def _shown(self, row: Row) -> dict[str, Any]:
        return shown(row, self._webhooks.directory.secrets(row["id"], row)[0])

    def _with_secret(self, row: Row) -> dict[str, Any]:
        return {**self._shown(row), "signing_secret": self._webhooks.directory.secrets(row["id"], row)[0]}


def shown(row: Row, secret: str) -> dict[str, Any]:
    """As OpenAI's SDKs read it, and `disabled_at`."""
    return {
        "id": row["id"],
        "object": "webhook_endpoint",
        "name": row["name"],
        "url": row["url"],
        "event_types": json.loads(row["event_types"]),
        "signing_secret_hint": signing.hint(secret),
        "created_at": row["created_at"] // 1000,
        "updated_at": row["updated_at"] // 1000,
        "disabled_at": row["disabled_at"] and row["disabled_at"] // 1000,
        "tenant": row["tenant"],
    }


def parsed(model: type[M], body: Mapping[str, Any]) -> M:
    """Raises BadRequest that names the field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(step) for step in first["loc"])[:100]
        message = first["msg"].removeprefix("Value error, ")
        unknown = first["type"] == "extra_forbidden"
        raise BadRequest(
            f"There is no field {field!r} here." if unknown else f"{field}: {message}.", param=field
        ) from None


def _id(exchange: Exchange) -> str:
    return exchange.request.path_params["id"]


def _whose(exchange: Exchange) -> str | None:
    """None: administrators see all."""
    return None if api.is_admin(exchange) else api.tenant_of(exchange)
