"""The simulated OpenRouter's HTTP side: routes, keys, generations, streams, and what strikes them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import gzip
import hashlib
import os
import socket
import struct
import time
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, NoReturn, Self

import msgspec
from aiohttp import web

from gateway.simulator import media, shapes
from gateway.simulator.answers import AUTO, Answer, Ask, Usage, bill, compose, load_models
from gateway.simulator.shapes import JSON, Failure, Frames, Reply
from gateway.simulator.steering import (
    BEFORE_HEADERS,
    FAILS_OVER,
    Steering,
    retry_after,
    steering_of,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

_BODY = web.RequestKey("body", object)
COMMENT = b": OPENROUTER PROCESSING\n\n"
_REMEMBERED = 1000
_MAX_BODY = 64 * 1024 * 1024
_COMMENT_EVERY = 0.25
_BOMB = 100 * 1024 * 1024
_MID_STREAM = frozenset({"finerr", "cutmid", "rstmid", "stallmid", "errmid"})
_OWN_LOSS = frozenset({"cutmid", "rstmid"})
_LOSES_CONNECTION = frozenset({"cutmid", "rstmid", "stallmid"})
_MESSAGES = {
    402: "Insufficient credits. Add more using https://openrouter.ai/settings/credits",
    403: "Your chosen model requires moderation and your input was flagged",
    404: "No endpoints found for this model.",
    408: "Your request timed out.",
    429: "Rate limit exceeded: requests per minute",
    500: "Internal Server Error",
    502: "Provider returned error",
    503: "No instances available",
    529: "Provider overloaded",
}


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A request as it arrived. `body`: parsed JSON, a form's fields, or None."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    raw: bytes


@dataclass(slots=True)
class Generation:
    """What `/generation?id=` knows. `sent` of `planned` content frames reached the client's socket."""

    id: str
    model: str
    kind: str
    streamed: bool
    usage: Usage
    priced_as: JSON
    finish: str | None = None
    cancelled: bool = False
    sent: int = 0
    planned: int = 0
    began: float = field(default_factory=time.time)
    ended: float | None = None

    def billed(self) -> Usage:
        """A cancelled stream is billed for what was sent."""
        if not self.cancelled or not self.streamed:
            return self.usage
        completion = self.usage.completion * self.sent // max(self.planned, 1)
        return bill(self.priced_as, replace(self.usage, completion=completion))

    def row(self) -> JSON:
        usage = self.billed()
        took = (self.ended or time.time()) - self.began
        return {
            "id": self.id,
            "model": self.model,
            "provider_name": "Simulated",
            "api_type": self.kind,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "total_cost": usage.cost,
            "usage": usage.cost,
            "upstream_inference_cost": None,
            "cache_discount": None,
            "is_byok": False,
            "streamed": self.streamed,
            "cancelled": self.cancelled,
            "finish_reason": self.finish,
            "native_finish_reason": self.finish,
            "tokens_prompt": usage.prompt,
            "tokens_completion": usage.completion,
            "native_tokens_prompt": usage.prompt,
            "native_tokens_completion": usage.completion,
            "native_tokens_reasoning": usage.reasoning,
            "native_tokens_cached": 0,
            "latency": int(took * 1000),
            "generation_time": int(took * 1000),
            "moderation_latency": None,
            "data_region": "global",
            "origin": "",
            **dict.fromkeys(_NULL_IN_ROW),
        }


_NULL_IN_ROW = (
    "app_id", "external_user", "http_referer", "native_tokens_completion_images", "num_fetches",
    "num_input_audio_prompt", "num_media_completion", "num_media_prompt", "num_search_results", "preset_id",
    "provider_responses", "router", "service_tier", "upstream_id", "user_agent", "web_search_engine",
    "workspace_id",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Endpoint:
    kind: str
    read: Callable[[JSON], Ask]
    whole: Callable[[Reply], JSON | tuple[bytes, str]]
    compose: Callable[[Ask, JSON, Steering], Answer] = compose
    frames: Callable[[Reply], Frames] | None = None
    error: Callable[[Failure], JSON] = shapes.plain_error


ENDPOINTS = {
    "chat/completions": Endpoint("completions", shapes.read_chat, shapes.chat_whole, frames=shapes.chat_frames),
    "completions": Endpoint(
        "completions", shapes.read_completion, shapes.completion_whole, frames=shapes.completion_frames
    ),
    "responses": Endpoint(
        "completions",
        shapes.read_responses,
        shapes.responses_whole,
        frames=shapes.responses_frames,
        error=shapes.responses_error,
    ),
    "messages": Endpoint(
        "completions",
        shapes.read_messages,
        shapes.messages_whole,
        frames=shapes.messages_frames,
        error=shapes.messages_error,
    ),
    "embeddings": Endpoint("embeddings", media.read_embeddings, media.embeddings_whole, media.compose_input_only),
    "rerank": Endpoint("rerank", media.read_rerank, media.rerank_whole, media.compose_rerank),
    "images": Endpoint("image", media.read_images, media.images_whole, media.compose_images, media.images_frames),
    "images/generations": Endpoint(
        "image", media.read_images, media.images_whole, media.compose_images, media.images_frames
    ),
    "audio/speech": Endpoint("tts", media.read_speech, media.speech_whole, media.compose_speech),
    "audio/transcriptions": Endpoint(
        "stt", media.read_transcription, media.transcription_whole, media.compose_transcription
    ),
}


class Simulator:
    """Times are seconds; `api_key`: any other key gets OpenRouter's 401. Also an async context manager.

    `remembered`: how many requests it keeps for tests to look at, bodies and all.
    """

    def __init__(
        self,
        *,
        latency: float = 0.02,
        chunk_delay: float = 0.005,
        api_key: str | None = None,
        remembered: int = _REMEMBERED,
    ) -> None:
        self.requests: collections.deque[SeenRequest] = collections.deque(maxlen=remembered)
        self.generations: collections.OrderedDict[str, Generation] = collections.OrderedDict()
        self.running = 0
        self.url = ""
        self._latency = latency
        self._chunk_delay = chunk_delay
        self._api_key = api_key
        self._models = load_models()
        self._flaky: collections.Counter[str] = collections.Counter()
        self._made = 0
        self._runner: web.AppRunner | None = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        # handler_cancellation: a client that leaves ends its generation at once, as at OpenRouter
        self._runner = web.AppRunner(self.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._runner.addresses[0][1]}/api/v1"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def until(self, condition: Callable[[], bool], within: float = 5.0) -> None:
        """Waits until `condition` holds; it is asked again whenever a request arrives, moves on or ends."""
        async with asyncio.timeout(within):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[self._admit])
        for prefix in ("/api/v1", "/v1"):
            for path, endpoint in ENDPOINTS.items():
                app.router.add_post(f"{prefix}/{path}", self._handler(endpoint))
            for path, handler in self._readers().items():
                app.router.add_get(f"{prefix}/{path}", handler)
        app.router.add_route("*", "/redirected", self._redirected)
        return app

    def _readers(self) -> dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        return {
            "models": self._list_models,
            "models/user": self._list_models,
            "models/count": self._count_models,
            "models/{author}/{slug}": self._one_model,
            "model/{author}/{slug}": self._one_model,
            "models/{author}/{slug}/endpoints": self._model_endpoints,
            "key": self._key,
            "credits": self._credits,
            "generation": self._generation,
        }

    @web.middleware
    async def _admit(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        raw = await request.read()
        body = _parsed(request.headers.get("Content-Type", ""), raw)
        request[_BODY] = body
        self.requests.append(SeenRequest(request.method, request.path, request.headers, body, raw))
        self._change()
        if self._api_key is not None and _key_of(request) != self._api_key:
            dialect = ENDPOINTS.get(request.path.split("/v1/", 1)[-1])
            return _failed(Failure(401, "User not found."), dialect.error if dialect else shapes.plain_error)
        return await handler(request)

    def _change(self) -> None:
        self._changed.set()

    # reading

    async def _list_models(self, request: web.Request) -> web.Response:
        offset, limit = (_number(request.query.get(name)) for name in ("offset", "limit"))
        data, start = self._models.data, offset or 0
        page = data[start : start + limit if limit is not None else None]
        following = start + len(page)
        link = f"/api/v1/models?offset={following}&limit={limit}" if following < len(data) and page else None
        return _json({"data": page, "total_count": len(data), "links": {"next": link}})

    async def _count_models(self, _: web.Request) -> web.Response:
        return _json({"data": {"count": len(self._models.data)}})

    async def _one_model(self, request: web.Request) -> web.Response:
        model = self._models.find(f"{request.match_info['author']}/{request.match_info['slug']}")
        return _json({"data": model}) if model else _failed(Failure(404, "Model not found"))

    async def _model_endpoints(self, request: web.Request) -> web.Response:
        model = self._models.find(f"{request.match_info['author']}/{request.match_info['slug']}")
        if model is None:
            return _failed(Failure(404, "Model not found"))
        endpoint = {
            "name": f"Simulated | {model['id']}",
            "provider_name": "Simulated",
            "context_length": model["context_length"],
            "pricing": model["pricing"],
            "supported_parameters": model["supported_parameters"],
            **model["top_provider"],
        }
        shown = {name: model[name] for name in ("id", "name", "created", "architecture")}
        return _json({"data": {**shown, "endpoints": [endpoint]}})

    def _spent(self) -> float:
        return round(sum(generation.billed().cost for generation in self.generations.values()), 12)

    async def _key(self, _: web.Request) -> web.Response:
        spent = self._spent()
        used = dict.fromkeys(("usage", "usage_daily", "usage_weekly", "usage_monthly"), spent)
        byok = dict.fromkeys(("byok_usage", "byok_usage_daily", "byok_usage_weekly", "byok_usage_monthly"), 0)
        limits = {"limit": None, "limit_remaining": None, "limit_reset": None, "is_free_tier": False}
        return _json({"data": {"label": "sk-or-v1-sim...ulated", **limits, **used, **byok}})

    async def _credits(self, _: web.Request) -> web.Response:
        return _json({"data": {"total_credits": 1000, "total_usage": self._spent()}})

    async def _generation(self, request: web.Request) -> web.Response:
        generation = self.generations.get(request.query.get("id", ""))
        if generation is None:
            return _failed(Failure(404, "Generation not found"))
        return _json({"data": generation.row()})

    async def _redirected(self, _: web.Request) -> web.Response:
        return web.Response(text="followed")

    # answering

    def _handler(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.running += 1
            try:
                return await self._answer(request, endpoint)
            finally:
                self.running -= 1
                self._change()

        return handle

    async def _answer(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        body = request[_BODY]
        if not isinstance(body, dict):
            return _failed(Failure(400, "Invalid JSON in request body"), endpoint.error)
        if endpoint.error is shapes.responses_error and (body.get("store") or body.get("previous_response_id")):
            message = "The Responses API is stateless: `store` and `previous_response_id` are not supported"
            return _failed(Failure(400, message), endpoint.error)
        asked, model, steering = self._choose(body)
        if model is None:
            failure = Failure(400, f"{asked} is not a valid model ID", {"error_type": "invalid_request"})
            return _failed(failure, endpoint.error)
        await asyncio.sleep(steering.before)
        early = await self._before_headers(request, asked, steering, endpoint)
        if early is not None:
            return early
        ask = endpoint.read(body)
        answer = endpoint.compose(ask, model, steering)
        generation = self._remember(model, endpoint, ask, answer)
        reply = Reply(generation.id, int(generation.began), model["id"], ask, answer, "nofinish" in steering)
        generation.finish = reply.finish
        try:
            if endpoint.frames is not None and ask.streams:
                return await self._stream(request, endpoint.frames(reply), steering, generation)
            return await self._whole(request, endpoint.whole(reply), steering, generation)
        except (asyncio.CancelledError, ConnectionError):
            # a connection that the fault itself closed is no client that left
            generation.cancelled = not steering.first(_OWN_LOSS)
            raise
        finally:
            generation.ended = time.time()

    def _choose(self, body: JSON) -> tuple[str, JSON | None, Steering]:
        """The first of `model`, `models[]`, `fallbacks[]` that doesn't fail before it answers."""
        asked = [body.get("model") or AUTO, *_listed(body.get("models"))]
        asked += [item.get("model") for item in _listed(body.get("fallbacks")) if isinstance(item, dict)]
        names = list(dict.fromkeys(name for name in asked if isinstance(name, str)))
        tried = []
        for name in names or [AUTO]:
            found = self._models.find(name)
            steering = steering_of(name, latency=self._latency, chunk_delay=self._chunk_delay)
            if "flaky" in steering and not self._flakes(name, steering.number("flaky", 50)):
                steering = replace(steering, words=tuple(word for word in steering.words if word[0] != "flaky"))
            if found is not None and not steering.first(FAILS_OVER):
                return name, found, steering
            tried.append((name, found, steering))
        return tried[0]

    def _flakes(self, model: str, percent: int) -> bool:
        """Spread evenly: `flaky-25` fails each fourth request."""
        if len(self._flaky) > _REMEMBERED:  # names are as many as clients like
            self._flaky.clear()
        self._flaky[model] += 1
        count = self._flaky[model]
        return count * percent // 100 > (count - 1) * percent // 100

    def _remember(self, model: JSON, endpoint: Endpoint, ask: Ask, answer: Answer) -> Generation:
        self._made += 1
        seed = hashlib.blake2s(f"{id(self)}-{self._made}".encode(), digest_size=10).hexdigest()
        name = f"gen-{int(time.time())}-{seed}"
        streamed = ask.streams and endpoint.frames is not None
        generation = Generation(name, model["id"], endpoint.kind, streamed, answer.usage, model)
        self.generations[name] = generation
        if len(self.generations) > _REMEMBERED:
            self.generations.popitem(last=False)
        return generation

    # faults before the headers

    async def _before_headers(
        self, request: web.Request, model: str, steering: Steering, endpoint: Endpoint
    ) -> web.StreamResponse | None:
        word = steering.first(BEFORE_HEADERS)
        if word == "reset":
            await _reset(request)
        elif word == "close":
            await _close(request)
        elif word == "hang":
            await asyncio.Event().wait()
        elif word == "redirect":
            return web.Response(status=307, headers={"Location": "/redirected"})
        elif word in {"fail", "flaky", "ctx"}:
            return _fault(word, model, steering, endpoint)
        return _unreadable(steering, endpoint)

    # whole answers

    async def _whole(
        self,
        request: web.Request,
        answer: JSON | tuple[bytes, str],
        steering: Steering,
        generation: Generation,
    ) -> web.StreamResponse:
        body, kind = answer if isinstance(answer, tuple) else (msgspec.json.encode(answer), "application/json")
        headers = {"X-Generation-Id": generation.id}
        word = steering.first(_LOSES_CONNECTION)
        binary = isinstance(answer, tuple)
        if not word and not binary:
            return web.Response(body=body, content_type=kind, headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Type": kind})
        if not binary:
            response.content_length = len(body)
        await response.prepare(request)
        size = steering.chunk_bytes or 4096
        for at in range(0, len(body) // 2 if word else len(body), size):
            await response.write(body[at : at + size] if not word else body[at : min(at + size, len(body) // 2)])
            await asyncio.sleep(steering.gap if binary else 0)
        if word:
            await self._lose(request, word)
        await response.write_eof()
        return response

    async def _lose(self, request: web.Request, word: str) -> NoReturn:
        if word == "cutmid":
            await _close(request)
        if word == "rstmid":
            await asyncio.sleep(0.02)  # what was sent must be read: a reset may discard it
            await _reset(request)
        await asyncio.Event().wait()
        raise AssertionError

    # streams

    async def _stream(
        self, request: web.Request, frames: Frames, steering: Steering, generation: Generation
    ) -> web.StreamResponse:
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache",
            "X-Generation-Id": generation.id,
        }
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        out = _Wire(response, steering)
        for frame in (COMMENT, COMMENT, *frames.preamble):
            await out.send(frame)
        await _slow_preamble(out, steering)
        if "errpre" in steering:
            await out.send_all(frames.error(0))
            return response
        sent = await self._content(out, frames, steering, generation)
        word = steering.first(_LOSES_CONNECTION)
        if word:
            await self._lose(request, word)
        if "errmid" in steering:
            await out.send_all(frames.error(sent))
            return response
        await out.send_all([*frames.finish, *frames.usage])
        if "nodone" not in steering:
            await out.send_all(frames.done)
        if "afterdone" in steering:
            await out.send_all([*frames.content[:1], *frames.usage])
        return response

    async def _content(self, out: _Wire, frames: Frames, steering: Steering, generation: Generation) -> int:
        count = len(frames.content)
        generation.planned = count
        planned = shapes.half(count) if steering.first(_MID_STREAM) else count
        for index, frame in enumerate(frames.content[:planned]):
            if index and steering.gap:
                await asyncio.sleep(steering.gap)
            await out.send(frame)
            generation.sent = index + 1
            self._change()
        return planned


class _Wire:
    """Writes frames, each on its own, mangled as the words `split` and `cr` ask."""

    def __init__(self, response: web.StreamResponse, steering: Steering) -> None:
        self._response = response
        self._split = "split" in steering
        self._cr = "cr" in steering

    async def send(self, frame: bytes) -> None:
        if self._cr:
            frame = frame.replace(b"\n", b"\r")
        if not self._split:
            await self._response.write(frame)
            return
        at = next((n for n, byte in enumerate(frame) if 0x80 <= byte < 0xC0), len(frame) // 2)
        await self._response.write(frame[:at])
        await asyncio.sleep(0.002)  # else the kernel joins both halves
        await self._response.write(frame[at:])

    async def send_all(self, frames: list[bytes]) -> None:
        for frame in frames:
            await self.send(frame)


async def _slow_preamble(out: _Wire, steering: Steering) -> None:
    left = steering.number("slowpre", 0) / 1000
    while left > 0:
        await asyncio.sleep(min(left, _COMMENT_EVERY))
        left -= _COMMENT_EVERY
        await out.send(COMMENT)


def _fault(word: str, model: str, steering: Steering, endpoint: Endpoint) -> web.Response:
    if word == "ctx":
        message = "This endpoint's maximum context length is 8192 tokens. However, you requested about 9000 tokens."
        return _failed(Failure(400, message, {"error_type": "context_length_exceeded"}), endpoint.error)
    status = steering.number("fail", 503) if word == "fail" else 503
    metadata: JSON = {"provider_name": "Simulated"}
    if status == 403:
        flagged = {"reasons": ["violence"], "flagged_input": "a simulated flagged input", "model_slug": model}
        metadata |= flagged | {"error_type": "content_policy_violation"}
    failure = Failure(status, _MESSAGES.get(status, f"Simulated failure {status}"), metadata)
    response = _failed(failure, endpoint.error)
    wait = retry_after(
        steering,
        default="1" if status == 429 else "",
        http_date=lambda: formatdate(time.time() + 60, usegmt=True),
    )
    if wait:
        response.headers["Retry-After"] = wait
    if status == 429:
        reset = str(int((time.time() + 60) * 1000))
        response.headers.update({"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset})
    return response


def _unreadable(steering: Steering, endpoint: Endpoint) -> web.Response | None:
    """Replies with 200 that no client can use."""
    if "badjson" in steering:
        return web.Response(body=b'{"id":"gen-broken","choices":[{"message":{"cont', content_type="application/json")
    if "html" in steering:
        return web.Response(text="<!DOCTYPE html><title>502</title><h1>Bad gateway</h1>", content_type="text/html")
    if "err200" in steering:
        failure = Failure(502, "Provider returned error", {"provider_name": "Simulated"})
        return _json(endpoint.error(failure))
    if "gzipbomb" in steering:
        return web.Response(body=_bomb(), content_type="application/json", headers={"Content-Encoding": "gzip"})
    return None


@functools.cache
def _bomb() -> bytes:
    """100 MB of spaces in 100 kB."""
    return gzip.compress(b" " * _BOMB, 6)


def _json(value: JSON, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _failed(failure: Failure, shape: Callable[[Failure], JSON] = shapes.plain_error) -> web.Response:
    return _json(shape(failure), failure.status)


def _parsed(content_type: str, raw: bytes) -> Any:
    if content_type.lower().startswith("multipart/"):
        return media.parse_multipart(content_type, raw)
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        return msgspec.json.decode(raw)
    return None


def _key_of(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


async def _close(request: web.Request) -> NoReturn:
    if request.transport is not None:
        request.transport.close()
    await asyncio.Event().wait()  # ends by cancellation when the loop notices that the connection is gone
    raise AssertionError


async def _reset(request: web.Request) -> NoReturn:
    transport = request.transport
    if transport is not None:
        # on a duplicate: uvloop's socket can't set options, and the option belongs to the connection
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    await asyncio.Event().wait()
    raise AssertionError
