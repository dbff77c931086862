"""What is sent, and one try to send it."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from gateway import GatewayError
from gateway_plugins.jobs.webhooks import signing, store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.kit import Database
    from gateway_plugins.jobs.webhooks.client import Answer, Client
    from gateway_plugins.jobs.webhooks.directory import Directory, Receiver


class Unreachable(GatewayError):
    """The webhook endpoint gave no answer."""

    status = 502
    code = "webhook_unreachable"


def event(event_type: str, data: Mapping[str, Any]) -> str:
    """What is sent: thin, so that whoever is told asks for the rest with a key."""
    return json.dumps(
        {
            "id": "evt_" + secrets.token_hex(12),
            "object": "event",
            "created_at": int(time.time()),
            "type": event_type,
            "data": dict(data),
        },
        separators=(",", ":"),
    )


async def post(client: Client, receiver: Receiver, message: str, body: str) -> Answer:
    """Once, signed anew."""
    headers = signing.headers(message, body, receiver.secrets, time.time())
    return await client.post(receiver.url, {**headers, "Content-Type": "application/json"}, body.encode())


async def example(client: Client, directory: Directory, database: Database, endpoint_id: str, event_type: str) -> int:
    """The status that an example got. If it was taken, an endpoint that was disabled works again.

    Raises NotFound, Unreachable, StoreUnavailable.
    """
    receiver = await directory.endpoint(database, endpoint_id, disabled=True)
    body = event(event_type, {"id": f"{event_type.partition('.')[0]}_{'0' * 24}"})
    answer = await post(client, receiver, "msg_" + secrets.token_hex(12), body)
    if answer.status is None:
        raise Unreachable(f"The webhook endpoint gave no answer: {answer.failure}.")
    if answer.failure is None:
        await store.set_disabled(database, endpoint_id, disabled=False)
    return answer.status
