"""The interface to an upstream: bytes, headers and typed failures. Transports implement it (`transport/`)."""

from __future__ import annotations

import asyncio
import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from gateway.errors import Cause, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Callable

    from multidict import CIMultiDictProxy

    from gateway.exchange import AttemptRecord
    from gateway.settings import Upstream as UpstreamSettings
    from gateway.streaming import ReplyStream


class UpstreamResponse(Protocol):
    """One reply whose head has arrived. Whoever got it must `close` it."""

    status: int
    headers: CIMultiDictProxy[str]

    async def chunk(self) -> bytes:
        """The next bytes of the body, whatever has arrived together; b"" at its complete end.

        Raises UpstreamError: TRUNCATED if the connection ends before the body does, BAD_REPLY if it is broken.
        """

    async def read(self, limit: int, heard: Callable[[bytes], None] | None = None) -> bytes:
        """The whole body; `heard` is called with each piece that had to be waited for.

        Raises as `chunk`, and UpstreamError(BAD_REPLY) if it is longer than `limit` bytes.
        """

    def push(self, receive: Callable[[bytes], None], ended: Callable[[UpstreamError | None], None]) -> bool:
        """From now on the body goes to `receive`, within the loop's callback that read it; no `chunk` any more.

        What arrived together is one piece; what had arrived before is handed over before `push` returns. Then `ended`
        is called once, with None at the body's complete end, else with what `chunk` would raise; neither is called
        after `close`. False, with no effect, if this transport can't: go on with `chunk`.
        """

    def pause(self) -> None:
        """Read no more of a body that is pushed, until `resume`."""

    def resume(self) -> None: ...

    @property
    def complete(self) -> bool:
        """The whole body has been received."""

    def close(self) -> None:
        """Give the connection back if the reply is complete, else drop it. May be called twice."""


class Transport(Protocol):
    """Sends requests to one upstream over connections that it keeps."""

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> UpstreamResponse:
        """Raises UpstreamError: CONNECTION, TLS, TIMEOUT (connecting) or BAD_REPLY."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class UpstreamClient:
    """One named upstream, ready to be called."""

    name: str
    settings: UpstreamSettings
    transport: Transport
    simulated: bool = False
    kind: str = field(init=False)
    # (dialect endpoint) → the headers that every request of it carries
    headers: Mapping[str, str] = field(default_factory=dict)
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.settings.kind)


class UpstreamReply(msgspec.Struct, eq=False):
    """What `call_next` returns: a whole body, or a stream that stands at its first content event."""

    status: int
    headers: CIMultiDictProxy[str]
    record: AttemptRecord
    body: bytes = b""
    stream: ReplyStream | None = None


async def read_chunks(response: UpstreamResponse, limit: int, heard: Callable[[bytes], None] | None = None) -> bytes:
    """The whole body by its chunks, for transports that have no shorter way."""
    parts: list[bytes] = []
    size = 0
    while chunk := await response.chunk():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        if heard is not None:
            heard(chunk)
        parts.append(chunk)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def too_large(limit: int) -> UpstreamError:
    return UpstreamError(Cause.BAD_REPLY, f"The upstream's reply is larger than {limit} bytes.")


# --- failures that the upstream reports itself ----------------------------------------------------------------------

# OpenRouter's stable `metadata.error_type`, and its availability codes (documentation: errors and debugging).
_BY_TYPE = {
    "context_length_exceeded": Cause.CONTEXT_LENGTH,
    "authentication": Cause.AUTH,
    "authentication_error": Cause.AUTH,
    "payment_required": Cause.PAYMENT,
    "billing_error": Cause.PAYMENT,
    "insufficient_quota": Cause.PAYMENT,
    "rate_limit_exceeded": Cause.RATE_LIMIT,
    "rate_limit_error": Cause.RATE_LIMIT,
    "capacity_exhausted": Cause.RATE_LIMIT,
    "provider_overloaded": Cause.SERVER_ERROR,
    "overloaded_error": Cause.SERVER_ERROR,
    "provider_unavailable": Cause.SERVER_ERROR,
    "temporarily_unavailable": Cause.SERVER_ERROR,
    "server": Cause.SERVER_ERROR,
    "server_error": Cause.SERVER_ERROR,
    "api_error": Cause.SERVER_ERROR,
    "timeout": Cause.SERVER_ERROR,
    "timeout_error": Cause.SERVER_ERROR,
    "content_policy_violation": Cause.CONTENT_POLICY,
    "refusal": Cause.CONTENT_POLICY,
    "not_found": Cause.MODEL_NOT_FOUND,
    "not_found_error": Cause.MODEL_NOT_FOUND,
    "model_not_found": Cause.MODEL_NOT_FOUND,
    "no_endpoints": Cause.MODEL_NOT_FOUND,
    "model_deprecated": Cause.MODEL_NOT_FOUND,
    "model_unavailable_upstream": Cause.MODEL_NOT_FOUND,
    "free_variant_ended": Cause.MODEL_NOT_FOUND,
}
_BY_STATUS = {
    401: Cause.AUTH,
    402: Cause.PAYMENT,
    403: Cause.CONTENT_POLICY,
    404: Cause.MODEL_NOT_FOUND,
    408: Cause.SERVER_ERROR,
    429: Cause.RATE_LIMIT,
}
_YEAR = 365 * 86400.0  # longer, nobody need be told
_CONTEXT = re.compile(r"context.{0,20}(length|window)|maximum context|prompt is too long", re.IGNORECASE)
_NO_SUCH_MODEL = re.compile(r"not a valid model id", re.IGNORECASE)
_DEFAULT_STATUS = {
    Cause.AUTH: 401,
    Cause.PAYMENT: 402,
    Cause.CONTENT_POLICY: 403,
    Cause.MODEL_NOT_FOUND: 404,
    Cause.RATE_LIMIT: 429,
    Cause.CONTEXT_LENGTH: 400,
}


def error_from(
    error: Mapping[str, Any],
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    secret: str = "",
) -> UpstreamError:
    """One typed failure from an error object in any upstream's shape.

    `status` is the HTTP status where it was an error, None where the error came inside a 200 or a stream.
    """
    metadata = error.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    availability = error.get("availability")
    availability = availability if isinstance(availability, Mapping) else {}
    code = error.get("code")
    seen = status or _as_status(code) or _as_status(error.get("http_status"))
    words = (
        metadata.get("error_type"), error.get("error_type"), availability.get("code"), error.get("type"), code,
    )  # fmt: skip
    message = str(error.get("message") or "The upstream failed.")
    cause = next((_BY_TYPE[w] for w in words if isinstance(w, str) and w in _BY_TYPE), None)
    if seen == 403 and not (metadata.get("reasons") or cause):
        cause = Cause.INVALID_REQUEST  # a guardrail or a permission of ours, not moderation
    if seen == 400 and cause is None and _CONTEXT.search(message):
        cause = Cause.CONTEXT_LENGTH
    if seen == 400 and cause is None and _NO_SUCH_MODEL.search(message):
        cause = Cause.MODEL_NOT_FOUND  # OpenRouter says it with 400 and in words alone
    if cause is None and seen is not None:
        cause = _BY_STATUS.get(seen) or (Cause.SERVER_ERROR if seen >= 500 else Cause.INVALID_REQUEST)
    cause = cause or Cause.SERVER_ERROR
    told = headers or {}
    wait = retry_after(told.get("Retry-After-Ms"), per_second=1000)
    if wait is None:
        wait = retry_after(told.get("Retry-After") or availability.get("retry_after") or metadata.get("retry_after"))
    if cause is Cause.AUTH:
        message = "The upstream refused the gateway's own key. The operator has to look at its api_key."
    elif cause is Cause.PAYMENT:
        message = f"The gateway's account at the upstream can't pay for this: {message}"
    param = error.get("param")
    param = param[:200] if isinstance(param, str) else None
    if secret:
        message = message.replace(secret, "***")
        param = param and param.replace(secret, "***")
    return UpstreamError(
        cause,
        message,
        upstream_status=seen or _DEFAULT_STATUS.get(cause),
        retry_after=wait,
        param=param,
    )


def error_from_body(status: int, body: bytes, headers: Mapping[str, str], secret: str = "") -> UpstreamError:
    """The typed failure of an HTTP reply with an error status."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        data = None
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        text = data.get("message") or data.get("detail") if isinstance(data, dict) else None
        error = {"message": text if isinstance(text, str) else f"The upstream answered with HTTP {status}."}
    return error_from(error, status=status, headers=headers, secret=secret)


def retry_after(value: Any, *, now: float | None = None, per_second: int = 1) -> float | None:
    """Seconds to wait, a year at most, from a number of them (or parts) or an HTTP date.

    None if absent, negative or not readable.
    """
    if value is None:
        return None
    try:
        seconds = float(value) / per_second
    except OverflowError:
        seconds = _YEAR if value > 0 else -1.0
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(str(value)).timestamp() - (now or time.time())
        except (TypeError, ValueError, OverflowError):
            return None
    return min(seconds, _YEAR) if seconds >= 0 else None


def _as_status(code: Any) -> int | None:
    if isinstance(code, str) and code.isdigit():
        code = int(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code <= 599 else None


async def fetch_models(upstream: UpstreamClient, limit: int) -> bytes:
    """GET <base>/models. Raises UpstreamError or TimeoutError."""
    async with asyncio.timeout(30):
        # OpenRouter lists text models only unless asked for all
        path = "/models?output_modalities=all" if upstream.kind == "openrouter" else "/models"
        response = await upstream.transport.send("GET", path, dict(upstream.headers), None)
        try:
            body = await response.read(limit)
        finally:
            response.close()
    if response.status != 200:
        raise UpstreamError(Cause.BAD_REPLY, f"GET /models was answered with HTTP {response.status}.")
    return body
