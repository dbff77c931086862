"""The routes that the gateway has without any plugin: proxied endpoints, models, token counts, health, OpenAPI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway import explain
from gateway.access import may_see
from gateway.dialects import DIALECTS
from gateway.errors import BadRequest, ModelNotFound
from gateway.exchange import Reply, Scopes
from gateway.openapi import document

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.health import Health
    from gateway.routes import Router

PREFIXES = ("/v1", "/api/v1")


def add_core_routes(router: Router, health: Health) -> None:
    for prefix in PREFIXES:
        for endpoint in DIALECTS:
            router.add("POST", f"{prefix}/{endpoint}", None, dialect=endpoint, endpoint=endpoint)
        # OpenRouter's own SDK says /images
        router.add("POST", f"{prefix}/images", None, dialect="images/generations", endpoint="images/generations")
        router.add("GET", f"{prefix}/models", list_models, endpoint="models", summary="The models this key may use.")
        router.add("GET", prefix + "/models/{id:.+}", get_model, endpoint="models", summary="One model.")
        router.add(
            "POST",
            f"{prefix}/messages/count_tokens",
            count_tokens,
            endpoint="messages/count_tokens",
            dialect="messages",
            summary="An estimate of the tokens of a Messages request.",
        )
    explain.add_route(router)
    for path in ("/health", "/health/live"):
        router.add("GET", path, health.live, access="public", summary="200 while the process runs.")
    router.add("GET", "/health/ready", health.ready, access="public", summary="Should traffic come here?")
    router.add("GET", "/openapi.json", openapi, access="public", summary="This document.")


async def list_models(exchange: Exchange) -> Reply:
    """OpenAI's and OpenRouter's shape in one; `offset` and `limit` as OpenRouter's SDK pages."""
    snapshot = exchange.snapshot
    scopes = exchange.principal.scopes if exchange.principal else Scopes()
    names = [name for name in snapshot.names() if _may_see_name(scopes, name)]
    query = exchange.request.query
    listing = snapshot.services.catalogue.listing(
        lambda model: may_see(scopes, model),
        names,
        offset=_whole(query, "offset", 0) or 0,
        limit=_whole(query, "limit", None),
    )
    return Reply(200, data=listing)


async def get_model(exchange: Exchange) -> Reply:
    """One model. Its id may hold slashes, encoded or not."""
    wanted = exchange.request.path_params["id"]
    snapshot = exchange.snapshot
    scopes = exchange.principal.scopes if exchange.principal else Scopes()
    names = [name for name in snapshot.names() if _may_see_name(scopes, name)]
    item = snapshot.services.catalogue.item(wanted, names) if wanted in names or may_see(scopes, wanted) else None
    if item is None:
        raise ModelNotFound(
            f"The model {wanted[:200]!r} does not exist or this key has no access to it.", param="model"
        )
    return Reply(200, data=item)


async def count_tokens(exchange: Exchange) -> Reply:
    """Anthropic's count_tokens by our estimate (OpenRouter has none): 4 characters a token, 1,600 an image."""
    if not isinstance(exchange.body.get("messages"), list):
        raise BadRequest("The field `messages` is missing.", param="messages")
    characters = exchange.dialect.input_characters(exchange.body)
    exchange.reply_headers["x-xenios-estimate"] = "1"
    return Reply(200, data={"input_tokens": characters // 4 + 1 + 1600 * _images(exchange.body["messages"])})


async def openapi(exchange: Exchange) -> Reply:
    return Reply(200, data=document(exchange.snapshot.routes.routes))


def _images(messages: list[Any]) -> int:
    return sum(
        isinstance(part, dict) and part.get("type") == "image"
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _may_see_name(scopes: Scopes, name: str) -> bool:
    if name.startswith("task/") and scopes.tasks is not None:
        return scopes.allows("tasks", name.removeprefix("task/"))
    return may_see(scopes, name)


def _whole(query: dict[str, str], name: str, default: int | None) -> int | None:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"`{name}` must be a whole number.", param=name)
    return int(text)
