"""An OTLP receiver on a real socket: decodes what it is sent by OpenTelemetry's own protobuf classes."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

KINDS = {trace_pb2.Span.SPAN_KIND_SERVER: "server", trace_pb2.Span.SPAN_KIND_CLIENT: "client",
         trace_pb2.Span.SPAN_KIND_INTERNAL: "internal", trace_pb2.Span.SPAN_KIND_CONSUMER: "consumer"}  # fmt: skip
STATUS = {trace_pb2.Status.STATUS_CODE_UNSET: "unset", trace_pb2.Status.STATUS_CODE_ERROR: "error"}


@dataclass
class Received:
    """One span as it came. Times in seconds since 1970."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    started: float
    ended: float
    attributes: dict[str, Any]
    events: list[tuple[str, float, dict[str, Any]]]
    status: str
    state: str
    flags: int
    resource: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def decoded(data: bytes) -> list[Received]:
    """The spans of one request; raises what protobuf raises, also for a field that nobody knows."""
    message = ExportTraceServiceRequest.FromString(data)
    assert message.SerializeToString(deterministic=True), "empty"
    found = []
    for of_resource in message.resource_spans:
        resource = _plain(of_resource.resource.attributes)
        for scope in of_resource.scope_spans:
            assert scope.scope.name == "xenios"
            for span in scope.spans:
                events = [(e.name, e.time_unix_nano / 1e9, _plain(e.attributes)) for e in span.events]
                found.append(
                    Received(
                        span.name, KINDS[span.kind], span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                        span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9, _plain(span.attributes),
                        events, STATUS[span.status.code], span.trace_state, span.flags, resource,
                    )
                )  # fmt: skip
    return found


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [_value(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@dataclass
class Collector:
    """`status` and `reply`: what it answers; `hang`: it takes what it is sent, and never answers."""

    status: int = 200
    reply: bytes = b""
    hang: bool = False
    spans: list[Received] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _runner: web.ServerRunner | None = None

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._answer), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    async def received(self, count: int, seconds: float = 10.0) -> list[Received]:
        """The first so many spans, in the order in which they began."""
        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(lambda: len(self.spans) >= count)
        return sorted(self.spans, key=lambda span: (span.started, span.kind != "server"))

    async def asked(self, count: int, seconds: float = 10.0) -> None:
        """Until it was asked so often."""
        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(lambda: len(self.bodies) >= count)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and not body.startswith(b"\n"):
            body = zlib.decompress(body, 31)
        async with self._news:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            if self.status == 200 and not self.hang:
                assert request.path == "/v1/traces"
                assert request.content_type == "application/x-protobuf"
                self.spans += decoded(body)
            self._news.notify_all()
        if self.hang:
            await asyncio.Event().wait()
        return web.Response(status=self.status, body=self.reply)
