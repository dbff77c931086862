"""Metrics for Prometheus: what was asked, how it went, how long it took, what it cost; beside what other plugins count.

Requests only add to plain numbers; text is made when somebody asks for it, over all workers. Label values come from the
configuration and the catalogue: an invented model is `other`. All names stand in `README.md` beside this file.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from gateway import Reply, hookimpl
from gateway_plugins.metrics.port import Port
from gateway_plugins.metrics.recorder import Recorder
from gateway_plugins.metrics.shown import OPENMETRICS, PLAIN, Format, Newest, accepted, shown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway import Exchange, Router, Services


def _path(value: str) -> str:
    if not re.fullmatch(r"/[\w./~-]*", value, re.ASCII):
        raise ValueError("write it as a path, such as /metrics")
    return value


class Config(BaseModel):
    """Where the metrics are shown, and to whom."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, AfterValidator(_path)] = Field("/metrics", description="Path. Default /metrics.")
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="A port of its own, with no key asked for unless there is a `token`. Default: the gateway's port, "
        "where administrators, or whoever has the `token`, may read it.",
    )
    host: str = Field("127.0.0.1", description="Address of that port. Default 127.0.0.1: this machine only.")
    token: SecretStr | None = Field(
        None, description="Token that Prometheus sends as `Authorization: Bearer`. Default none."
    )
    public: bool = Field(
        default=False,
        description="On the gateway's port without a key. Default false; names of models, rules and tasks are seen.",
    )
    genai: bool = Field(
        default=True,
        description="Show the metrics of OpenTelemetry's GenAI conventions too (gen_ai_…), from the same numbers. "
        "Default true.",
    )


class Plugin:
    """Counts requests, and shows all metrics to Prometheus."""

    Config: TypeAlias = Config
    reads_settings = ("upstreams",)

    def __init__(self, config: Config, services: Services) -> None:
        if sum(entry.use == "metrics" for entry in services.settings.plugins) > 1:
            raise ValueError("List `metrics` once: two would count each request twice.")
        self._config = config
        self._metrics = services.metrics
        self._serves = services.serves
        # An empty variable is no token.
        self._token = (config.token.get_secret_value() if config.token else "") or None
        self._recorder = Recorder(services.metrics)
        self._kinds = {name: upstream.kind for name, upstream in services.settings.upstreams.items()}
        self._texts = {kind: Newest(partial(self._make, kind)) for kind in (PLAIN, OPENMETRICS)}

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        if self._config.port is None or not self._serves:
            yield  # what a process beside the gateway counts, the gateway tells
            return
        port = Port(self._config.host, self._config.port, self._config.path, self._token, self._shown)
        async with port.open():
            yield

    @hookimpl
    def register_routes(self, router: Router) -> None:
        if self._config.port is None:
            router.add(
                "GET",
                self._config.path,
                self._reply,
                access="bearer" if self._token else "public" if self._config.public else "admin",
                bearer=self._token,
                summary="Metrics for Prometheus.",
                produces="text/plain",
            )

    @hookimpl
    async def request_finished(self, exchange: Exchange) -> None:
        self._recorder.record(exchange)

    async def _reply(self, exchange: Exchange) -> Reply:
        text, content_type = await self._shown(exchange.request.header("Accept") or "")
        return Reply(200, text, {"Content-Type": content_type, "Cache-Control": "no-store"})

    async def _shown(self, accept: str) -> tuple[bytes, str]:
        kind = accepted(accept)
        return await self._texts[kind].get(), kind.content_type

    async def _make(self, kind: Format) -> bytes:
        """In a thread: thousands of series take some tens of milliseconds."""
        families = await self._metrics.read()
        return await asyncio.to_thread(shown, families, kind.encode, self._kinds if self._config.genai else None)
