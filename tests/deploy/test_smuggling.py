"""Requests that are to be smuggled past nginx, Caddy and HAProxy, with the files of deploy/proxies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway import hookimpl
from gateway.kit.testing import Gateway
from tests.deploy.proxies import NAMES, proxied
from tests.faults.raw import CHAT, connect, request
from tests.faults.smuggling import SMUGGLED, Forms

CLIENT = "127.0.0.9"
AT_ONCE = 16


class Arrivals:
    """Notes of each request that reaches the pipeline who it comes from, as the proxy said, and whether it is a second."""

    reads_settings = ()

    def __init__(self, config: Any, services: Any) -> None:
        del config, services
        self.seen: list[tuple[list[str], bool]] = []

    @hookimpl
    async def request_received(self, exchange: Any) -> None:
        asked = exchange.request
        self.seen.append((list(asked.getall("x-forwarded-for")), asked.header(SMUGGLED) is not None))


@pytest.mark.parametrize("name", NAMES)
async def test_no_second_request_behind_a_proxy(name: str, tmp_path: Path) -> None:
    """Whatever a client writes, the gateway serves nothing that the proxy did not take for a request of its own, and
    nobody gets another's answer.
    """
    settings = {"server": {"header_timeout": 2, "body_timeout": 2}}
    async with (
        Gateway.test(plugins=["api_keys", Arrivals], settings=settings) as gw,
        proxied(name, tmp_path, gw.worker.port) as proxy,
    ):
        arrivals = gw.plugin("Arrivals").seen
        forms = Forms(gw, "localhost")
        room = asyncio.Semaphore(AT_ONCE)

        async def play(data: bytes) -> None:
            async with room, connect(proxy.port, tls=proxy.context, source=CLIENT) as raw:
                await raw.send(data)
                await raw.rest_within(0.2)

        async def honest(count: int) -> None:
            """Each gets the answer to what it asked, on connections that the others left behind."""
            for number in range(count):
                async with connect(proxy.port, tls=proxy.context, source=CLIENT) as raw:
                    for model in (f"honest/{number}", f"honest/{number}-again"):
                        await raw.send(request(gw, {**CHAT, "model": model}, host="localhost"))
                        reply = await raw.reply()
                        assert (reply.status, reply.headers["x-xenios-model"]) == (200, model)

        await honest(2)
        await asyncio.gather(*map(play, forms.hidden().values()))
        await honest(5)
        assert not any(second for _, second in arrivals)

        # Proxies mend some of these, and take what stands behind them for a request, which it then is. Then it says what
        # the proxy says of its client; a smuggled one would say what it says of itself.
        await asyncio.gather(*map(play, forms.refused().values()))
        await honest(10)
        assert any(second for _, second in arrivals)
        assert {tuple(told) for told, _ in arrivals} == {(CLIENT,)}
