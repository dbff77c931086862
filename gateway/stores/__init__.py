"""What several workers share: Redis now, a database later.

`services.redis: memory` needs none of it, and imports none of it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from gateway.settings import Settings
    from gateway.stores.redis import RedisStore


@contextlib.asynccontextmanager
async def open_redis(settings: Settings, data_dir: Path | None) -> AsyncIterator[RedisStore | None]:
    """The Redis that the settings name; None for `memory`. Connects at the first call, not here.

    Raises EmbeddedError if a Valkey of our own doesn't start.
    """
    url = settings.services.redis.get_secret_value()
    if url == "memory":
        yield None
        return
    from gateway.stores.redis import RedisStore  # noqa: PLC0415 - takes a tenth of a second, which `memory` need not pay

    async with contextlib.AsyncExitStack() as stack:
        if url == "embedded":
            from gateway.stores.embedded import EmbeddedError, valkey  # noqa: PLC0415 - as above

            if data_dir is None:
                raise EmbeddedError("services.redis: embedded needs server.data_dir.")
            url = await stack.enter_async_context(valkey(data_dir / "valkey"))
        store = RedisStore(url)
        stack.push_async_callback(store.close)
        yield store


@contextlib.asynccontextmanager
async def embedded_redis(settings: Settings, data_dir: Path) -> AsyncIterator[str | None]:
    """For a parent of several workers: the URL of the Valkey that they share; None where there is none to start."""
    if settings.services.redis.get_secret_value() != "embedded":
        yield None
        return
    from gateway.stores.embedded import valkey  # noqa: PLC0415 - as above

    async with valkey(data_dir / "valkey") as url:
        yield url
