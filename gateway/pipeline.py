"""One request, top to bottom. READ SECOND (after `hookspecs.py`).

Every endpoint, streamed and whole, live and as a job, passes here; there is no other way to an upstream. Nothing here
knows an HTTP server: `server.py` adapts one to `Client` and `Inbound`.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import msgspec
from multidict import CIMultiDict, istr

from gateway import dispatch, explain, logs, outgoing, timing, watch
from gateway.access import check_bearer, check_route
from gateway.client import ClientGone, DirectClient
from gateway.decision import decide, prepare
from gateway.dialects import PLAIN_EVENTS, read_cost, read_usage
from gateway.errors import (
    Cause,
    DeadlineExceeded,
    GatewayError,
    PluginError,
    Refused,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
    UpstreamError,
)
from gateway.exchange import (
    ANONYMOUS,
    AttemptRecord,
    Cost,
    Outcome,
    Principal,
    Reply,
    Source,
    Usage,
)
from gateway.incoming import may_choose, parse_body
from gateway.kit import ledger
from gateway.relay import AFTERWARDS, Relay
from gateway.streaming import ByteStream, EventStream
from gateway.taps import TapChain
from gateway.upstream import UpstreamReply, error_from, error_from_body
from gateway.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from gateway.client import Client, Inbound
    from gateway.exchange import Attempt, Exchange
    from gateway.finisher import Finisher
    from gateway.routes import Handler
    from gateway.streaming import ReplyStream
    from gateway.tasks import Tasks
    from gateway.upstream import UpstreamClient, UpstreamResponse

log = logs.get_logger("gateway.pipeline")

_REQUEST_ID, _ATTEMPTS, _MODEL = istr("x-request-id"), istr("x-xenios-attempts"), istr("x-xenios-model")
_RULE, _SERVER_TIMING = istr("x-xenios-rule"), istr("Server-Timing")
_CONTENT_TYPE, _GENERATION_ID, _CONNECTION = istr("Content-Type"), istr("X-Generation-Id"), istr("Connection")

EVENT_STREAM = "text/event-stream"
_UNSURE = frozenset({Source.ESTIMATE, Source.UNKNOWN})
# Those that are worth telling; what else an upstream writes there may be anything.
_MEDIA_TYPE = re.compile(r"(text/(html|plain|xml)|application/(xml|octet-stream|problem\+json|x-ndjson))")
ERROR_BODY_LIMIT = 1 << 20
PIECE = 256 * 1024  # of what a plugin sends: a client must have taken it within the write timeout
CLOSE_SECONDS = 1.0  # that a plugin's stream has for its own end
_OURS = frozenset({watch.DEADLINE, watch.STALL, watch.TOTAL, watch.SHUTDOWN})
_MOST_TRIES = 10  # in the reply's header
_LATE = {
    watch.FIRST_EVENT: "The upstream's answer took too long to begin.",
    watch.STALL: "The upstream stopped sending in the middle of its answer.",
    watch.TOTAL: "The upstream took too long to complete its answer.",
}
# Not the client's business, or wrong once the body went through us.
_DROPPED = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "set-cookie", "set-cookie2", "server", "date", "via", "alt-svc",
        "content-length", "content-encoding", "x-request-id", "request-id", "x-should-retry", "retry-after",
        "retry-after-ms", "strict-transport-security", "nel", "report-to", "x-powered-by",
        "server-timing",
    }
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_DROPPED_PREFIXES = ("cf-", "x-xenios-", "x-ratelimit-", "access-control-")


class Run:
    """One exchange on its way through the hooks."""

    def __init__(
        self,
        exchange: Exchange,
        client: Client,
        inbound: Inbound,
        *,
        tasks: Tasks,
        finisher: Finisher,
        correct: Corrector | None = None,
        seconds: float | None = None,
    ) -> None:
        """`seconds`: for all of it, instead of `server.request_timeout`."""
        self.exchange = exchange
        self.client = client
        self.inbound = inbound
        self.tasks = tasks
        self.finisher = finisher
        self.correct = correct
        self.hooks = exchange.snapshot.hooks
        if seconds is None:
            seconds = exchange.snapshot.settings.server.request_timeout
        self.watch = Watch(seconds, exchange)
        exchange.deadline = exchange.started + seconds
        self._response: UpstreamResponse | None = None
        self._record: AttemptRecord | None = None
        self._stream: ReplyStream | None = None
        self._taps: TapChain | None = None
        self._grammar = exchange.dialect.grammar  # of the events that the client gets; None: it gets none
        self._last = b""  # chunk of a plugin's stream
        self._starting: asyncio.Task[None] | None = None
        self._beating = False
        # (phase, from when) where `Server-Timing` is on
        self._phases: list[tuple[str, float]] | None = None
        self._over = False  # nothing may be written any more: the connection may serve the next request

    # --- top to bottom -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Answer the client; see to it that `request_finished` runs, whatever happens. Raises only CancelledError."""
        exchange = self.exchange
        if exchange.snapshot.settings.server.server_timing != "off":
            exchange.timings, self._phases = [], []
        elif timing.is_sampled():
            exchange.timings = []
        before = logs.handling.get()
        logs.handling.set(self.watch)
        try:
            try:
                await self._answer()
                exchange.outcome = Outcome.ACCEPTED if exchange.phase == "accept" else Outcome.OK
            except asyncio.CancelledError:
                await self._interrupted()
            except GatewayError as error:
                await self._fail(error)
            except ClientGone:
                exchange.outcome = Outcome.CLIENT_DISCONNECT
            except Exception:
                log.exception("request_failed", request_id=exchange.request_id, endpoint=exchange.endpoint)
                await self._fail(GatewayError())
        except ClientGone:
            exchange.outcome = exchange.outcome or Outcome.CLIENT_DISCONNECT
        except asyncio.CancelledError:
            exchange.outcome = exchange.outcome or Outcome.CLIENT_DISCONNECT
            raise
        finally:
            self._finish()
            self.watch.exchange = None
            logs.handling.set(before)

    async def _answer(self) -> None:
        exchange, hooks, route = self.exchange, self.hooks, self.exchange.route
        if hooks.request_received:
            await dispatch.run_all(exchange, hooks.request_received)
        await self._authenticate()
        check_route(exchange)
        explained = explain.is_asked(exchange)
        if route.body != "none":
            await self._read_body()
        if route.handler is not None:
            exchange.reply = await self._handle(route.handler)
            await self._send(exchange.reply, (route.plugin, f"{route.method} {route.path}"))
            return
        if explained:
            exchange.reply = Reply(200, data=await explain.explanation(exchange))
            await self._send_whole(exchange.reply)
            return
        self._enter("prepare")
        await prepare(exchange)
        self._enter("route")
        await decide(exchange)
        if exchange.decision is not None and exchange.decision.timeout is not None:
            self._bring_nearer(exchange.started + exchange.decision.timeout)
        self._enter("check")
        if hooks.check_request:
            await dispatch.run_all(exchange, hooks.check_request, ignorable=True)
        if exchange.late is not None:
            exchange.hold(ledger.UNDER_WAY)
        if exchange.held:
            books, held = exchange.snapshot.services.ledger, exchange.held
            if not ledger.admit_at_once(books, exchange, held):
                await ledger.admit(books, exchange, held)
        if hooks.lookup_response:
            hit: Reply | None = await dispatch.run_first(exchange, hooks.lookup_response, ignorable=True, returns=Reply)
            if hit is not None:
                await self._answer_hit(hit)
                return
        if exchange.phase == "accept":
            raise Unavailable("Nobody here takes this request as a job.", code="no_job_taken")
        self._enter("upstream")
        reply = await self._through_the_onion()
        self._enter("answer")
        if reply.stream is not None:
            await self._relay(reply.stream, _client_headers(reply.headers))
            return
        exchange.reply = answer = Reply(reply.status, reply.body, _client_headers(reply.headers))
        self._end_attempt()
        if hooks.transform_response:
            answer = await self._transformed(answer)
        await self._send_whole(answer)

    async def _handle(self, handler: Handler) -> Reply:
        """A route's own handler: what fails, or takes too long, is named as a hook would be."""
        exchange, route = self.exchange, self.exchange.route
        self._enter("handle")
        impl = dispatch.Impl(route.plugin, f"{route.method} {route.path}", handler)
        impl.failures = exchange.snapshot.plugin_counts.failures.of(*impl.where)
        call = handler if exchange.timings is None else timing.timed(exchange.timings, impl)
        exchange.running = impl.where
        try:
            reply: object = await call(exchange)
            if not isinstance(reply, Reply):
                raise TypeError(f"returned {type(reply).__name__} where Reply is due")
        except (GatewayError, ClientGone):
            exchange.running = None
            raise
        except dispatch.FAILURES as error:
            if dispatch.is_cancelled(error):
                raise
            impl.failed(error, exchange)
            exchange.error_by = repr(impl)
            exchange.running = None
            raise GatewayError from error
        exchange.running = None
        return reply

    async def _authenticate(self) -> None:
        self._enter("authenticate")
        exchange, impls = self.exchange, self.hooks.authenticate
        if exchange.principal is not None:
            return  # restored: a job, or a plugin's route that submits
        if exchange.route.access in {"public", "bearer"}:
            check_bearer(exchange)
            exchange.credentials = None
            return
        if impls:
            exchange.principal = await dispatch.run_first(exchange, impls, returns=Principal)
        elif exchange.snapshot.settings.server.allow_anonymous or exchange.snapshot.loopback:
            exchange.principal = ANONYMOUS
        exchange.credentials = None
        if exchange.principal is None:
            raise Unauthenticated

    async def _read_body(self) -> None:
        self._enter("body")
        exchange = self.exchange
        limit = exchange.route.max_body or exchange.snapshot.settings.server.max_body
        if exchange.route.body == "stream":
            exchange.offer_upload(self._uploaded(limit))
            return
        exchange.raw_body = await self.inbound.read(limit)
        parse_body(exchange, self.inbound.content_type)

    async def _uploaded(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes. The request's time begins anew with each piece; the client's own limit is elsewhere."""
        exchange = self.exchange
        seconds = exchange.snapshot.settings.server.request_timeout
        pieces = self.inbound.pieces(limit)
        while True:
            handler, exchange.running = exchange.running, None  # it is the client that is waited for
            try:
                piece = await anext(pieces, b"")
            finally:
                exchange.running = handler
            self.watch.extend(seconds)
            exchange.deadline = time.monotonic() + seconds
            if not piece:
                return
            yield piece

    def _enter(self, phase: str) -> None:
        if self._phases is not None:
            self._phases.append((phase, time.monotonic()))

    def _bring_nearer(self, deadline: float) -> None:
        exchange = self.exchange
        if deadline < exchange.deadline:
            exchange.deadline = deadline
            self.watch.shorten(deadline - time.monotonic())

    # --- attempts ----------------------------------------------------------------------------------------------------

    async def _through_the_onion(self) -> UpstreamReply:
        """`around_upstream`, outermost first; innermost the call itself."""
        exchange = self.exchange
        call_next: Callable[[Attempt], Awaitable[UpstreamReply]] = self._call_upstream
        for impl in reversed(self.hooks.around_upstream):
            if impl.when is None or impl.applies(exchange):
                call_next = _layer(exchange, impl, call_next)
        if exchange.stream:
            self._beat(exchange.snapshot.settings.server.stream_commit_after)
        if exchange.decision is None or not exchange.decision.targets:
            raise PluginError("The decision names no target.")
        return await call_next(outgoing.attempt_for(exchange, exchange.decision.targets[0]))

    async def _call_upstream(self, attempt: Attempt) -> UpstreamReply:
        """One attempt, to the whole reply or to a stream's first content. Raises UpstreamError."""
        exchange = self.exchange
        if exchange.attempts:
            self._give_up_attempt(Cause.ABANDONED)
            if exchange.admission is not None:
                await ledger.admit_again(exchange.snapshot.services.ledger, exchange, exchange.admission)
        upstream = exchange.snapshot.upstreams[attempt.target.upstream]
        record = AttemptRecord(attempt, len(exchange.attempts) + 1, time.monotonic())
        exchange.attempts.append(record)
        self._record = record
        if self.hooks.attempt_started:
            dispatch.run_sync(exchange, self.hooks.attempt_started, record)
        # While the upstream is waited for no plugin runs; afterwards the layer that called does again.
        layer, exchange.running = exchange.running, None
        self.watch.wait(watch.FIRST_EVENT, attempt.limits.first_event)
        if attempt.limits.total is not None:
            self.watch.attempt(attempt.limits.total)
        try:
            reply = await self._first_content(record, upstream)
        except UpstreamError as error:
            self._fail_attempt(error)
            exchange.running = layer
            raise
        except asyncio.CancelledError:
            reason = self.watch.take(*watch.ATTEMPT)
            if reason is None:
                raise
            exchange.running = layer
            late = UpstreamError(Cause.TIMEOUT, _LATE[reason])
            self._fail_attempt(late)
            raise late from None
        finally:
            self.watch.rest()
        exchange.running = layer
        if attempt.limits.total is not None and reply.stream is None:
            self.watch.attempt(None)  # it is complete, whatever a layer does with it
        record.first_content = time.monotonic()
        if exchange.first_content is None:
            exchange.first_content = record.first_content
        return reply

    async def _first_content(self, record: AttemptRecord, upstream: UpstreamClient) -> UpstreamReply:
        dialect, secret = self.exchange.dialect, upstream.secret
        attempt = record.attempt  # `attempt_started` may have added headers
        path = dialect.paths[upstream.kind]
        response = await upstream.transport.send("POST", path, attempt.headers, attempt.body)
        self._response = response
        record.status = response.status
        record.generation_id = response.headers.get(_GENERATION_ID)
        if response.status >= 400:
            body = await response.read(ERROR_BODY_LIMIT)
            raise error_from_body(response.status, body, response.headers, secret)
        if response.status != 200:
            raise UpstreamError(Cause.BAD_REPLY, f"The upstream answered with HTTP {response.status}.")
        reply = UpstreamReply(200, response.headers, record)
        kind = response.headers.get(_CONTENT_TYPE, "").partition(";")[0].strip().lower()
        if dialect.reply == "binary" and kind not in {"application/json", "text/html"}:
            reply.stream = ByteStream(response)
            await reply.stream.first_content()
        elif kind == EVENT_STREAM and dialect.grammar is not None and self.exchange.stream:
            reply.stream = self._event_stream(response, secret)
            await reply.stream.first_content()
            if may_choose(self.exchange.body, attempt.target):
                self._note_model(record, reply.stream.model())
        elif (
            self.exchange.stream
            and dialect.grammar is not None
            and not dialect.grammar.whole_is_fine
            and kind != "application/json"
        ):
            shown = kind if _MEDIA_TYPE.fullmatch(kind) else "no content type"
            raise UpstreamError(Cause.BAD_REPLY, f"The upstream answered a stream with {shown}.")
        else:
            body = await response.read(self.exchange.snapshot.settings.upstream.max_reply, self._heard)
            is_text = kind.startswith("text/") and kind != "text/html" and self._wants_text()
            reply.body = body if is_text else self._whole_body(body.lstrip(), record, secret)
            if secret and secret.encode() in body:
                raise UpstreamError(Cause.BAD_REPLY, "The upstream's reply held what must not be passed on.")
        return reply

    def _wants_text(self) -> bool:
        formats = self.exchange.dialect.text_formats
        return bool(formats) and self.exchange.body.get("response_format") in formats

    def _event_stream(self, response: UpstreamResponse, secret: str) -> EventStream:
        exchange = self.exchange
        if exchange.dialect.grammar is None:  # pragma: no cover - asked before
            raise TypeError(exchange.endpoint)
        return EventStream(
            response,
            exchange.dialect.grammar,
            forward_usage=not exchange.dialect.usage_on_request or exchange.dialect.wants_usage(exchange.body),
            max_event=exchange.snapshot.settings.upstream.max_event,
            secret=secret,
        )

    def _whole_body(self, body: bytes, record: AttemptRecord, secret: str) -> bytes:
        """What is read of a whole reply is read. Raises UpstreamError if it is none, or tells of a failure."""
        try:
            head = _read_head(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise UpstreamError(Cause.BAD_REPLY, "The upstream's reply is not valid JSON.") from None
        data = {
            "error": head.error,
            "choices": head.choices,
            "status": head.status,
            "error_type": head.error_type,
        }
        error = self.exchange.dialect.reply_error(data)
        usage = head.usage if isinstance(head.usage, dict) else None
        if may_choose(self.exchange.body, record.attempt.target):
            self._note_model(record, head.model)
        self._meter(record, usage)
        if error is not None:
            raise error_from(error, secret=secret)
        grammar = self.exchange.dialect.grammar
        if self.exchange.stream and grammar is not None and not grammar.whole_is_fine:
            raise UpstreamError(Cause.BAD_REPLY, "The upstream answered a stream with a whole body.")
        return body

    def _note_model(self, record: AttemptRecord, model: Any) -> None:
        """Which of several the upstream took, by the catalogue's name."""
        if isinstance(model, str) and model:
            known = self.exchange.snapshot.services.catalogue.model(record.target.upstream, model)
            record.answered_by = known.id if known is not None else model

    def _heard(self, piece: bytes) -> None:
        """Some of a whole reply came. Blanks before it only say that it isn't there yet; then it may only pause."""
        if self._record is not None and (self.watch.waiting_for == watch.STALL or not piece.isspace()):
            self.watch.wait(watch.STALL, self._record.attempt.limits.stall)

    def _meter(self, record: AttemptRecord, raw: Mapping[str, Any] | None) -> None:
        """Usage and cost of an attempt, each with its source."""
        record.usage = usage = read_usage(raw, cached_apart=self.exchange.dialect.anthropic)
        cost = read_cost(raw)
        if cost is not None:
            record.cost = Cost(cost, Source.UPSTREAM)
        elif usage.source is not Source.UNKNOWN:
            target, catalogue = record.attempt.target, self.exchange.snapshot.services.catalogue
            record.cost = catalogue.cost(target.upstream, record.answered_by or target.model, usage)

    def _fail_attempt(self, error: UpstreamError) -> None:
        if self._record is not None:
            self._record.message = error.message
            self._record.retry_after = error.retry_after
        self._end_attempt(error.cause)

    def _give_up_attempt(self, cause: Cause) -> None:
        if self._record is not None and self._record.finished is None:
            self._end_attempt(cause)

    def _end_attempt(self, cause: Cause | None = None) -> None:
        """The attempt's last byte, failure or cancellation: its connection is closed, its hooks run. Once."""
        record, response = self._record, self._response
        self._response = None
        if response is not None:
            response.close()
        if record is None or record.finished is not None:
            return
        record.finished = time.monotonic()
        record.cause = cause = record.cause or cause  # a layer may have found an answer wanting
        if record.attempt.limits.total is not None:
            self.watch.attempt(None)
        stream = self._stream
        if stream is not None and record.first_content is not None:
            self._meter(record, stream.usage)
        if cause is not None and record.first_content is not None:
            partial = isinstance(stream, EventStream) and not stream.usage_is_final
            if partial or record.usage.source is Source.UNKNOWN:
                self._estimate(record, stream)
        if cause is not None and record.status == 200 and record.cost.source in _UNSURE:
            self._correct_later(record)
        if self.hooks.attempt_finished:
            dispatch.run_sync(self.exchange, self.hooks.attempt_finished, record)

    def _estimate(self, record: AttemptRecord, stream: ReplyStream | None) -> None:
        """A stream cut before its last usage came: what was told and seen, until the upstream tells the truth."""
        told = record.usage
        if told.input_tokens is None:
            characters = self.exchange.dialect.input_characters(self.exchange.body)
            told = Usage(input_tokens=characters // 4 + 1)
        seen = max(told.output_tokens or 0, getattr(stream, "events", 0))
        record.usage = msgspec.structs.replace(told, output_tokens=seen, source=Source.ESTIMATE)
        catalogue = self.exchange.snapshot.services.catalogue
        cost = catalogue.cost(record.target.upstream, record.served.model, record.usage)
        record.cost = Cost(cost.pico_usd, Source.ESTIMATE) if cost.pico_usd is not None else cost

    def _correct_later(self, record: AttemptRecord) -> None:
        """An answer was under way: what it really cost, the upstream may be able to tell."""
        if self.correct is not None and record.generation_id:
            self.correct(self.exchange, record)

    # --- the answer --------------------------------------------------------------------------------------------------

    async def _answer_hit(self, hit: Reply) -> None:
        exchange = self.exchange
        if hit.chunks is not None:
            exchange.reply = hit
            plugins = ", ".join(impl.plugin for impl in self.hooks.lookup_response)
            await self._send_chunks(hit, hit.chunks, (plugins, "lookup_response"))
            return
        grammar = exchange.dialect.grammar
        if exchange.stream and grammar is not None and hit.headers.get("Content-Type", "").startswith(EVENT_STREAM):
            stream = EventStream(_Recorded(hit.body), grammar, forward_usage=True, max_event=len(hit.body) + 1)
            await stream.first_content()
            hit.headers.pop("Content-Length", None)
            await self._relay(stream, hit.headers)
            return
        exchange.reply = hit
        if self.hooks.transform_response and exchange.phase != "accept":  # then it is no model's answer
            hit = await self._transformed(hit)
        await self._send_whole(hit)

    async def _transformed(self, reply: Reply) -> Reply:
        await dispatch.run_all(self.exchange, self.hooks.transform_response)
        return self.exchange.reply or reply

    async def _send_whole(self, reply: Reply) -> None:
        exchange = self.exchange
        body = reply.body
        if self._starting is not None or exchange.client_started:
            await self._send_late(body)
            return
        headers = self._head(reply.status, reply.headers)
        exchange.client_started = True
        await self.client.send(reply.status, headers, body, self._on_progress)

    def _on_progress(self) -> None:
        """A client that has to be waited for gets its time anew with each piece that it takes."""
        self.watch.wait(watch.WRITE, self._patience)

    async def _send(self, reply: Reply, by: tuple[str, str]) -> None:
        """What a plugin answers by itself."""
        if reply.chunks is None:
            await self._send_whole(reply)
        else:
            await self._send_chunks(reply, reply.chunks, by)

    async def _send_chunks(self, reply: Reply, chunks: AsyncIterator[bytes], by: tuple[str, str]) -> None:
        """A body that a plugin makes while it is sent, however long that takes; closed at the end, whatever it was.

        Raises GatewayError or ClientGone.
        """
        exchange, server = self.exchange, self.exchange.snapshot.settings.server
        impl = dispatch.Impl(*by, self._send_chunks)
        impl.failures = exchange.snapshot.plugin_counts.failures.of(*by)
        self.watch.extend()
        exchange.deadline = float("inf")
        self._grammar = None
        if reply.headers.get(_CONTENT_TYPE, "").startswith(EVENT_STREAM):
            self._grammar = exchange.dialect.grammar or PLAIN_EVENTS
            self._beat(server.keepalive_interval)
        try:
            left = _length(reply)
            await self._start_stream(reply.status, reply.headers)
            if exchange.request.method != "HEAD":
                await self._write_chunks(chunks, left)
        except (GatewayError, ClientGone):
            raise
        except dispatch.FAILURES as error:
            if dispatch.is_cancelled(error):
                raise
            impl.failed(error, exchange)
            exchange.error_by = repr(impl)
            raise GatewayError from error
        finally:
            await _close(chunks, impl, exchange)
        await self._end_stream()

    async def _write_chunks(self, chunks: AsyncIterator[bytes], left: int | None) -> None:
        """`left`: how many bytes there must be."""
        patience = self._patience
        wait, write, touch, rest = self.watch.wait, self.client.write, self.watch.touch, self.watch.rest
        async for chunk in chunks:
            if not isinstance(chunk, bytes):
                raise TypeError(f"a chunk is bytes, not {type(chunk).__name__}")
            if left is not None:
                left -= len(chunk)
                if left < 0:
                    raise ValueError("more bytes than the Content-Length says")
            for start in range(0, len(chunk), PIECE):
                wait(watch.WRITE, patience)
                await write(chunk[start : start + PIECE])
            touch()
            rest()
            self._last = chunk
        if left:
            raise ValueError(f"{left} bytes less than the Content-Length says")

    async def _send_late(self, body: bytes) -> None:
        """A whole body for a client whose stream has been committed already: as one event."""
        if self._starting is not None:
            await self._starting
        await self.client.write(b"data: " + body.replace(b"\n", b" ") + b"\n\n")
        await self._end_stream()

    async def _relay(self, stream: ReplyStream, headers: Mapping[str, str]) -> None:
        """A stream from its first content to its clean end. Raises UpstreamError, PluginError or ClientGone."""
        exchange = self.exchange
        server = exchange.snapshot.settings.server
        limits = self._record.attempt.limits if self._record is not None else None
        stall = limits.stall if limits else None
        self._stream = stream
        if isinstance(stream, EventStream):
            self._taps = TapChain.open(exchange, self.hooks.open_tap, stream)
            self._beat(server.keepalive_interval)
        direct = self.client if isinstance(self.client, DirectClient) else None
        await self._start_stream(200, headers, direct)
        if direct is None or not await Relay(stream, direct, self.watch, stall=stall, patience=self._patience).run():
            await self._pull(stream, stall)
        await self._end_relay()

    async def _pull(self, stream: ReplyStream, stall: float | None) -> None:
        """The same chunk by chunk, for upstreams and clients that have to be waited for."""
        wait, client, next_block, touch = self.watch.wait, self.client, stream.next_block, self.watch.touch
        patience = self._patience
        while True:
            wait(watch.STALL, AFTERWARDS if stream.answered else stall)
            block = await next_block()
            if block is None:
                break
            if block:
                wait(watch.WRITE, patience)
                await client.write(block)
                touch()

    async def _end_relay(self) -> None:
        self._end_attempt()
        if self._taps is not None:
            self._taps.close(Outcome.OK)
        self.watch.rest()
        await self._end_stream()

    async def _start_stream(self, status: int, headers: Mapping[str, str], direct: DirectClient | None = None) -> None:
        """The streamed reply's head, once: now, or already after `stream_commit_after`. `direct`: with its begin."""
        if self._starting is not None:
            await self._starting
            return
        out = self._head(status, headers)
        self.exchange.client_started = self.exchange.streamed = True
        if direct is None:
            await self.client.start(status, out)
        else:
            direct.open(status, out)

    async def _end_stream(self) -> None:
        self._over = True
        await self.client.end()

    def _beat(self, first: float) -> None:
        if self.exchange.phase == "run":
            return  # nobody listens whose connection would be cut
        self.watch.beat(first, self.exchange.snapshot.settings.server.keepalive_interval, self._on_silence)

    def _on_silence(self) -> None:
        """Nothing was sent for a while: commit the stream, or break the silence (proxies cut silent connections)."""
        if self._starting is None and not self.exchange.client_started:
            self._starting = self.tasks.spawn(self._commit(), "commit")
        elif not self._beating and self.watch.waiting_for != watch.WRITE:
            self._beating = True
            self.tasks.spawn(self._keep_alive(), "keep-alive")

    async def _commit(self) -> None:
        """Headers and a comment go out before an upstream answered. Fallbacks stay possible, only silently."""
        logs.handling.set(self.watch)  # this task came of the wheel, which belongs to no request
        out = self._head(200, {"Content-Type": EVENT_STREAM}, answered=False)
        self.exchange.client_started = self.exchange.streamed = True
        try:
            await self.client.start(200, out)
        except ClientGone:
            return  # the handler is cancelled by then
        await self._keep_alive()

    async def _keep_alive(self) -> None:
        grammar = self._grammar
        try:
            if grammar is not None and not self._over:
                await self.client.write(grammar.keep_alive)
        except ClientGone:
            pass
        finally:
            self._beating = False

    def _head(self, status: int, headers: Mapping[str, str], *, answered: bool = True) -> CIMultiDict[str]:
        """The reply's headers; `response_started` has seen them. Runs once."""
        exchange = self.exchange
        exchange.status = status
        out = exchange.reply_headers
        if out:
            out.extend({name: value for name, value in headers.items() if name not in out})
        else:
            out = exchange.reply_headers = headers if isinstance(headers, CIMultiDict) else CIMultiDict(headers)
        out[_REQUEST_ID] = exchange.request_id
        if exchange.dialect.anthropic:
            out["request-id"] = exchange.request_id
        if exchange.route.proxied:
            self._say(out, answered=answered)
        if self.hooks.response_started:
            dispatch.run_sync(exchange, self.hooks.response_started)
            out = exchange.reply_headers
        if self._phases is not None and self._may_time():
            out[_SERVER_TIMING] = timing.header(exchange, self._phases)
        if not _sound(out):
            _drop_unsound(exchange, out)
        return out

    def _may_time(self) -> bool:
        """The caller may know how long things took."""
        who = self.exchange.principal
        return self.exchange.snapshot.settings.server.server_timing == "everyone" or (who is not None and who.admin)

    def _say(self, out: CIMultiDict[str], *, answered: bool) -> None:
        """Which model served, once that is known, and how many attempts it took."""
        exchange = self.exchange
        out[_ATTEMPTS] = str(len(exchange.attempts))
        # A rule that refuses makes no decision: its error's headers name it.
        rule = out.get(_RULE) if exchange.decision is None else exchange.decision.rule
        if rule:
            out[_RULE] = _header_text(rule)
        if exchange.attempts and answered:
            # The model that answered, or on an error the one that was tried last.
            served = exchange.served if exchange.error is None else None
            last = served or exchange.attempts[-1].served
            out[_MODEL] = _header_text(last.model)
            if exchange.snapshot.upstreams[last.upstream].simulated:
                out["x-xenios-simulated"] = "1"
        who = exchange.principal
        if (who is not None and who.admin) or exchange.snapshot.settings.server.debug_headers:
            out["x-xenios-tries"] = _tries(exchange)

    # --- when it does not go well -------------------------------------------------------------------------------

    async def _interrupted(self) -> None:
        """The task was cancelled: by a limit of ours, or because the client left."""
        reason = self.watch.take()
        stream = self._stream
        if reason in _OURS and stream is not None and stream.answered:
            # the client has it all: an error after the answer would belie that
            self.watch.wait(watch.WRITE, self._patience)
            if last := stream.finish():
                await self.client.write(last)
            await self._end_relay()
            self.exchange.outcome = Outcome.OK
            return
        match reason:
            case watch.DEADLINE:
                record = self._record
                if self.exchange.running is None and record is not None and record.first_content is None:
                    # The first had all the time there was, and didn't begin; a later one only what others had left.
                    self._give_up_attempt(Cause.TIMEOUT if record.number == 1 else Cause.ABANDONED)
                await self._fail(self._deadline_error())
            case watch.FIRST_EVENT | watch.STALL | watch.TOTAL as reason:
                await self._fail(UpstreamError(Cause.TIMEOUT, _LATE[reason]))
            case watch.SHUTDOWN:
                await self._fail(ShuttingDown())
            case watch.WRITE:
                self.exchange.outcome = Outcome.CLIENT_DISCONNECT
                self._give_up_attempt(Cause.CLIENT_DISCONNECT)
                self.client.abort()
            case _:
                self.exchange.outcome = Outcome.CLIENT_DISCONNECT
                raise asyncio.CancelledError

    def _deadline_error(self) -> DeadlineExceeded:
        if self.exchange.running is not None:
            plugin, hook = self.exchange.running
            self.exchange.error_by = f"{plugin}.{hook}"
            log.error("deadline_in_plugin", plugin=plugin, hook=hook, request_id=self.exchange.request_id)
        return DeadlineExceeded()

    async def _fail(self, error: GatewayError) -> None:
        """Tell the client in its dialect: as a reply, as the stream's error event, or by cutting a binary body."""
        exchange = self.exchange
        exchange.error = error
        exchange.outcome = _outcome(error)
        self.watch.rest()
        if isinstance(error, UpstreamError):
            self._fail_attempt(error)
        self._give_up_attempt(Cause.ABANDONED)
        if self._starting is not None:
            await self._starting
        if not exchange.client_started:
            await self._send_error(error)
            return
        if self._taps is not None:
            self._taps.close(exchange.outcome)
        grammar = self._grammar
        if grammar is None or not exchange.streamed:
            self.client.abort()
            return
        last = self._stream.last if self._stream is not None else _last_event(self._last)
        self.watch.wait(watch.WRITE, self._patience)
        await self.client.write(grammar.error(error, last, exchange.request_id))
        await self._end_stream()

    async def _send_error(self, error: GatewayError) -> None:
        exchange = self.exchange
        reply = dispatch.first_sync(exchange, self.hooks.render_error, error, returns=Reply)
        if reply is None:
            body = exchange.dialect.error_body(error, exchange.request_id)
            reply = Reply(error.status_code, body, {"Content-Type": "application/json"})
        reply.headers.update(error.headers)
        if error.retry_after is not None:
            reply.headers["retry-after"] = str(max(1, round(error.retry_after)))
            reply.headers["retry-after-ms"] = str(round(error.retry_after * 1000))
        should_retry = error.should_retry
        if should_retry is None and isinstance(error, UpstreamError) and len(exchange.attempts) > 1:
            should_retry = False  # ours are exhausted: an SDK's own retries would triple the load
        if should_retry is not None:
            reply.headers["x-should-retry"] = "true" if should_retry else "false"
        headers = self._head(reply.status, reply.headers)
        exchange.client_started = True
        await self.client.send(reply.status, headers, reply.body, self._on_progress)

    @property
    def _patience(self) -> float | None:
        """Seconds that a client has to take a piece. Whoever keeps a job's answer has limits of his own."""
        return None if self.exchange.late is not None else self.exchange.snapshot.settings.server.write_timeout

    def _finish(self) -> None:
        """Nothing of the exchange is left open; `request_finished` runs in a task that the drain awaits."""
        exchange = self.exchange
        self.watch.close()
        if self._record is not None and self._record.finished is None:
            gone = exchange.outcome is Outcome.CLIENT_DISCONNECT
            self._end_attempt(Cause.CLIENT_DISCONNECT if gone else Cause.ABANDONED)
        if self._response is not None:
            self._response.close()
        if self._taps is not None:
            self._taps.close(exchange.outcome or Outcome.ERROR)
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
        exchange.credentials = None
        exchange.offer_upload(None)
        exchange.finished = time.monotonic()
        _sum_up(exchange)
        if exchange.late is None and (exchange.admission is not None or exchange.record is not None):
            ledger.settle(exchange.snapshot.services.ledger, exchange)
        if self.hooks.request_finished or exchange.timings is not None:
            self.finisher.put(exchange, self.hooks.request_finished)


class Corrector(Protocol):
    """Takes note that the true usage of an attempt is to be asked for."""

    def __call__(self, exchange: Exchange, record: AttemptRecord) -> None: ...


class _Head(msgspec.Struct):
    """What is read of a whole reply; the rest is checked as JSON and passes as bytes."""

    model: Any = None
    usage: Any = None
    error: Any = None
    choices: Any = None
    status: Any = None
    error_type: Any = None


_read_head = msgspec.json.Decoder(_Head).decode


class _Recorded:
    """A recorded stream (a cache hit) as if an upstream sent it."""

    status = 200
    complete = True

    def __init__(self, body: bytes) -> None:
        self.headers: Any = {}
        self._body = body

    async def chunk(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def read(self, limit: int, heard: Callable[[bytes], None] | None = None) -> bytes:
        del limit, heard
        return await self.chunk()

    def push(self, receive: Callable[[bytes], None], ended: Callable[[UpstreamError | None], None]) -> bool:
        del receive, ended
        return False  # it is one chunk

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None:
        self._body = b""


def _layer(
    exchange: Exchange, impl: dispatch.Impl, call_next: Callable[[Attempt], Awaitable[UpstreamReply]]
) -> Callable[[Attempt], Awaitable[UpstreamReply]]:
    call = impl.call if exchange.timings is None else timing.timed_around(exchange.timings, impl)

    async def layer(attempt: Attempt) -> UpstreamReply:
        outer, exchange.running = exchange.running, impl.where
        try:
            reply: object = await call(exchange, attempt, call_next)
            if not isinstance(reply, UpstreamReply):
                raise TypeError(f"returned {type(reply).__name__} where UpstreamReply is due")
        except ClientGone:
            raise
        except GatewayError as error:
            if not isinstance(error, UpstreamError):
                exchange.error_by = exchange.error_by or repr(impl)
            exchange.running = outer
            raise
        except dispatch.FAILURES as error:
            if dispatch.is_cancelled(error):
                raise
            impl.failed(error, exchange)
            exchange.error_by = repr(impl)
            exchange.running = outer
            raise PluginError from error
        exchange.running = outer
        return reply

    return layer


def _length(reply: Reply) -> int | None:
    """What a plugin says of its body's length. Raises ValueError."""
    said = reply.headers.get("Content-Length")
    return None if said is None else int(said)


async def _close(chunks: AsyncIterator[bytes], impl: dispatch.Impl, exchange: Exchange) -> None:
    close = getattr(chunks, "aclose", None)
    if close is None:
        return
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await close()
    except dispatch.FAILURES as error:
        if dispatch.is_cancelled(error):
            raise
        impl.failed(error, exchange)


def _last_event(chunk: bytes) -> bytes:
    return chunk[chunk.rfind(b"\n\n", 0, -2) + 1 :]


def _sound(headers: CIMultiDict[str]) -> bool:
    """Each can be written as a header: a plugin may have put anything there."""
    try:
        values = "".join(headers.values())
        if values.isascii() and values.isprintable():
            return _sound_names(tuple(headers))  # nearly always
        values = "\n".join(headers.values())
        values.encode()
    except (TypeError, UnicodeEncodeError):
        return False
    clean = values.count("\n") < max(1, len(headers)) and _CONTROL.search(values) is None
    return clean and _sound_names(tuple(headers))


@functools.lru_cache(maxsize=512)
def _sound_names(names: tuple[str, ...]) -> bool:
    return "" not in names and _NAMES.fullmatch("".join(names)) is not None


def _drop_unsound(exchange: Exchange, headers: CIMultiDict[str]) -> None:
    hooks = exchange.snapshot.hooks
    impls = (*hooks.lookup_response, *hooks.transform_response, *hooks.render_error, *hooks.response_started)
    for name, value in list(headers.items()):
        if not _sound(CIMultiDict({name: value})):
            headers.popall(name, None)
            log.error(
                "bad_reply_header",
                header=name[:100],
                value_type=type(value).__name__,
                plugins=sorted({impl.plugin for impl in impls}),
                request_id=exchange.request_id,
            )


@functools.lru_cache(maxsize=1024)
def _header_text(text: str) -> str:
    """A name that a client may have invented, as a header can carry it: no control character, not a megabyte of it."""
    return text if len(text) <= 200 and text.isascii() and text.isprintable() else quote(text[:200], safe="/:@ ")


def _tries(exchange: Exchange) -> str:
    """Each target that was passed over or tried, why it failed, and milliseconds (of a stream: until now)."""
    now = time.monotonic()
    said = [f"{_header_text(target.name)};{Cause.CIRCUIT_OPEN}" for target in exchange.skipped]
    for record in exchange.attempts:
        seconds = (record.finished or now) - record.started
        became = record.cause or ("pending" if record.first_content is None else "ok")
        said.append(f"{_header_text(record.target.name)};{became};{seconds * 1000:.0f}ms")
    return ", ".join(said[:_MOST_TRIES]) + (", ..." if len(said) > _MOST_TRIES else "")


def _client_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Of an upstream's reply headers those that a client may see."""
    passed = CIMultiDict([item for item in headers.items() if _passes(item[0])])
    if _CONNECTION in headers:
        for name in headers[_CONNECTION].split(","):
            passed.popall(name.strip(), None)
    return passed


@functools.lru_cache(maxsize=512)
def _passes(name: str) -> bool:
    low = name.lower()
    return low not in _DROPPED and not low.startswith(_DROPPED_PREFIXES)


def _outcome(error: GatewayError) -> Outcome:
    match error:
        case UpstreamError(cause=Cause.TRUNCATED):
            return Outcome.UPSTREAM_TRUNCATED
        case UpstreamError(cause=Cause.TIMEOUT):
            return Outcome.TIMEOUT
        case UpstreamError():
            return Outcome.UPSTREAM_ERROR
        case DeadlineExceeded():
            return Outcome.TIMEOUT
        case ShuttingDown():
            return Outcome.SHUTDOWN
        case Refused():
            return Outcome.REFUSED
        case PluginError():
            return Outcome.PLUGIN_ERROR
        case _:
            return Outcome.ERROR


def _sum_up(exchange: Exchange) -> None:
    """Usage and cost over the attempts; one that failed before any content cost nothing and tells nothing."""
    counted = [a for a in exchange.attempts if a.first_content is not None or a.usage.source is not Source.UNKNOWN]
    if counted:
        exchange.usage, exchange.cost = counted[0].usage, counted[0].cost
        for record in counted[1:]:
            exchange.usage += record.usage
            exchange.cost += record.cost
