"""Routes for administrators that need no plugin: the configuration in force, and a reload of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.errors import Conflict
from gateway.exchange import Reply
from gateway.settings import masked

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.exchange import Exchange
    from gateway.reload import Reload, Reloading
    from gateway.routes import Router


def add_admin_routes(router: Router, reloading: Callable[[], Reloading | None], worker: int) -> None:
    """`reloading`: who reloads; None where there is no file to read again. `worker`: the number of this one."""

    async def reload(_: Exchange) -> Reply:
        who = reloading()
        if who is None:
            raise Conflict("This gateway was given its configuration by a program: there is no file to read again.")
        result = await who.reload()
        return Reply(200, data=_told(result)) if result.code is None else _refusal(result)

    async def config(exchange: Exchange) -> Reply:
        snapshot, who = exchange.snapshot, reloading()
        body = {
            "config": snapshot.hash,
            "worker": worker,
            "file": snapshot.source.file,
            "loaded_at": snapshot.since,
            "reloads": {"done": who.done, "refused": who.refused} if who else None,
            "last_reload": _told(who.last) if who and who.last else None,
            "settings": masked(snapshot.settings, snapshot.source, [i.blueprint.config for i in snapshot.instances]),
        }
        return Reply(200, data=body)

    router.add(
        "POST", "/admin/reload", reload, access="admin", body="none", summary="Read the configuration again, and swap."
    )
    router.add("GET", "/admin/config", config, access="admin", summary="The configuration in force, secrets masked.")


def _told(result: Reload) -> dict[str, Any]:
    body = result.to_json()
    return {"status": "refused" if result.code else "ok", **body}


def _refusal(result: Reload) -> Reply:
    """In OpenAI's shape, and each problem by itself."""
    told = result.to_json()["problems"]
    message = "The old configuration serves on. " + "\n".join(map(str, result.problems))
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": result.code, "problems": told}
    return Reply(409, data={"error": error})
