"""`xenios check --live`: a sound configuration beside what its upstreams list now."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gateway.catalogue import Catalogue
from gateway.problems import Concern, in_line_order
from gateway.simulator import Simulator
from gateway.transport import open_transport
from gateway.upstream import UpstreamClient, fetch_models

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from gateway.plugins import Blueprint
    from gateway.problems import Problem, Steps
    from gateway.settings import Loaded, Settings, Upstream


async def live(loaded: Loaded, blueprints: Sequence[Blueprint], cache_dir: Path | None) -> tuple[list[Problem], int]:
    """All that is found, in line order, and how many of it are errors. Nothing is written.

    Plugins say what they find by `concerns(config, settings, catalogue, today)` of their class.
    """
    settings, today = loaded.settings, datetime.now(UTC).date()
    found: list[tuple[Steps, Concern]] = []
    async with _catalogue(settings, cache_dir) as catalogue:
        for name in settings.upstreams:
            try:
                await catalogue.refresh(name, store=False)
            except Exception as error:  # noqa: BLE001 - whatever it is: there is no list to compare with
                text = f"its list of models can't be had: {type(error).__name__}: {error}"
                found.append((("upstreams", name), Concern((), text, "error")))
        found += [(("catalogue", "overrides"), concern) for concern in catalogue.override_concerns()]
        for blueprint in blueprints:
            ask = getattr(blueprint.cls, "concerns", None)
            if ask is not None:
                told = ask(blueprint.config, settings, catalogue, today)
                found += [(("plugins", blueprint.index, "config"), concern) for concern in told]
    problems = [loaded.source.problem((*base, *c.path), f"{c.severity}: {c.message}") for base, c in found]
    return in_line_order(problems), sum(concern.severity == "error" for _, concern in found)


@contextlib.asynccontextmanager
async def _catalogue(settings: Settings, cache_dir: Path | None) -> AsyncIterator[Catalogue]:
    """With what is known already, and able to fetch."""
    clients: dict[str, UpstreamClient] = {}

    async def fetch(name: str) -> bytes:
        return await fetch_models(clients[name], settings.upstream.max_reply)

    kinds = {name: upstream.kind for name, upstream in settings.upstreams.items()}
    catalogue = Catalogue(kinds, settings.catalogue, cache_dir, fetch, default=settings.upstream.default)
    catalogue.load()
    async with contextlib.AsyncExitStack() as stack:
        for name, upstream in settings.upstreams.items():
            url = upstream.base_url
            if upstream.api_key is None and upstream.without_key == "simulate":
                url = (await stack.enter_async_context(Simulator(remembered=0))).url
            clients[name] = client = _client(name, upstream, url, settings)
            stack.push_async_callback(client.transport.close)
        yield catalogue


def _client(name: str, upstream: Upstream, url: str, settings: Settings) -> UpstreamClient:
    policy = settings.upstream
    transport = open_transport(
        upstream.transport,
        url,
        connect_timeout=policy.connect_timeout,
        max_connections=0,
        max_reply=policy.max_reply,
        ca_file=upstream.ca_file,
        proxy=upstream.proxy.get_secret_value() if upstream.proxy and url == upstream.base_url else None,
    )
    key = upstream.api_key.get_secret_value() if upstream.api_key else "simulated"
    headers = {
        **upstream.headers,
        "Authorization": f"Bearer {key}",
        "Accept-Encoding": "identity",
        "User-Agent": "xenios",
    }
    if upstream.api_key is None and upstream.without_key == "allow":
        del headers["Authorization"]
    return UpstreamClient(name, upstream, transport, headers=headers, secret=key)
