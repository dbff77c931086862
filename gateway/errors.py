"""Every error that a client can be told, as one small tree.

A class's docstring is its default message. Each error knows its HTTP status, OpenAI `type` and `code`; how it is
written is the dialect's business (`dialects.py`). Messages never hold a secret, nor text that the client sent
beyond what helps it (cut to `MESSAGE_LIMIT`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

MESSAGE_LIMIT = 2000


class Cause(StrEnum):
    """Why an attempt at an upstream failed; what `fallback` decides on."""

    CONNECTION = "connection"  # refused, DNS, reset before the reply's head
    TLS = "tls"
    TIMEOUT = "timeout"  # connect, first content event, stall
    TRUNCATED = "truncated"  # ended without the dialect's clean end
    BAD_REPLY = "bad_reply"  # a 200 that is not what the dialect promises; a redirect
    RATE_LIMIT = "rate_limit"
    SERVER_ERROR = "server_error"
    AUTH = "auth"  # the upstream refused OUR key
    PAYMENT = "payment"  # our account is out of credit
    CONTENT_POLICY = "content_policy"
    CONTEXT_LENGTH = "context_length"
    MODEL_NOT_FOUND = "model_not_found"
    INVALID_REQUEST = "invalid_request"
    INVALID_OUTPUT = "invalid_output"  # a whole answer that is not the JSON which the request asked for
    CIRCUIT_OPEN = "circuit_open"  # ours: not tried, it failed too often just now
    CLIENT_DISCONNECT = "client_disconnect"  # ours: the client left, so the attempt was given up
    ABANDONED = "abandoned"  # ours: deadline, shutdown or a plugin gave it up


class StartError(Exception):
    """The configuration can't be served; the message says what to change."""


class StatementError(Exception):
    """The database or Redis is there and refused a statement: it or a value is wrong. Holds no value."""

    def __init__(self, message: str, *, conflict: bool = False) -> None:
        """`conflict`: a constraint, such as a key that exists already."""
        super().__init__(message)
        self.conflict = conflict


class GatewayError(Exception):
    """The gateway could not answer this request."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        status: int | None = None,
        type: str | None = None,  # noqa: A002 - the field's name on the wire
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`retry_after` in seconds; `should_retry` becomes `x-should-retry`, which SDKs obey."""
        self.message = (message or (self.__doc__ or "").partition("\n")[0])[:MESSAGE_LIMIT]
        super().__init__(self.message)
        self.status_code = status or self.status
        self.error_type = type or self.type
        self.error_code = code or self.code
        self.param = param
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.headers = headers or {}


class Refused(GatewayError):
    """The gateway's policy refuses this request."""

    status = 403
    type = "invalid_request_error"
    code = "refused"


class BadRequest(Refused):
    """The request is not valid."""

    status = 400
    code = "invalid_request"


class Unauthenticated(Refused):
    """Incorrect or missing API key. Send it as `Authorization: Bearer <key>`."""

    status = 401
    code = "invalid_api_key"


class Forbidden(Refused):
    """This key may not do that."""

    code = "insufficient_permissions"


class NotFound(Refused):
    """There is nothing here."""

    status = 404
    code = "not_found"


class PrincipalGone(NotFound):
    """Who asked for this is no longer known here: the key was revoked or has expired, or its issuer was removed."""

    code = "principal_gone"


class ModelNotFound(NotFound):
    """The model does not exist, or this key has no access to it."""

    code = "model_not_found"


class Conflict(Refused):
    """There is something already that stands in the way."""

    status = 409
    code = "conflict"


class MethodNotAllowed(Refused):
    """This path does not take that method."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(Refused):
    """The request did not arrive in time."""

    status = 408
    code = "request_timeout"


class TooLarge(Refused):
    """The request is larger than this gateway takes."""

    status = 413
    code = "request_too_large"


class UnsupportedMedia(Refused):
    """This endpoint does not take that content type."""

    status = 415
    code = "unsupported_media_type"


class RateLimited(Refused):
    """Too many requests."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class Unavailable(GatewayError):
    """A part that this request needs is not available."""

    status = 503
    code = "unavailable"


class StoreUnavailable(Unavailable):
    """The gateway can't reach the store that it needs for this request. Try again soon."""

    code = "store_unavailable"


class PluginError(GatewayError):
    """A part of the gateway failed on this request; its log names the plugin."""

    status = 503
    code = "plugin_error"


class DeadlineExceeded(GatewayError):
    """The request took longer than this gateway allows."""

    status = 504
    code = "deadline_exceeded"
    type = "server_error"


class ShuttingDown(GatewayError):
    """The gateway is shutting down."""

    status = 503
    code = "shutting_down"


class UpstreamError(GatewayError):
    """The upstream failed."""

    status = 502
    code = "upstream_error"

    def __init__(
        self,
        cause: Cause,
        message: str | None = None,
        *,
        upstream_status: int | None = None,
        retry_after: float | None = None,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the field's name on the wire
    ) -> None:
        """`upstream_status`: the upstream's own HTTP status, or the code in its error body, where it had one."""
        status, error_type, error_code = _AS_SEEN_BY_CLIENT[cause]
        if cause in _KEEPS_STATUS and upstream_status is not None and 400 <= upstream_status <= 599:
            status = upstream_status
        super().__init__(
            message or f"The upstream failed: {cause}.",
            status=status,
            type=type or error_type,
            code=code or error_code,
            param=param,
            retry_after=retry_after,
        )
        self.cause = cause
        self.upstream_status = upstream_status


# What the client is told. An upstream's 401 is about OUR key: passed on as it is, it would send the developer to
# look for a mistake in theirs.
_AS_SEEN_BY_CLIENT: dict[Cause, tuple[int, str, str]] = {
    Cause.CONNECTION: (502, "server_error", "upstream_unreachable"),
    Cause.TLS: (502, "server_error", "upstream_unreachable"),
    Cause.TIMEOUT: (504, "server_error", "upstream_timeout"),
    Cause.TRUNCATED: (502, "server_error", "upstream_truncated"),
    Cause.BAD_REPLY: (502, "server_error", "upstream_bad_reply"),
    Cause.RATE_LIMIT: (429, "requests", "rate_limit_exceeded"),
    Cause.SERVER_ERROR: (502, "server_error", "upstream_error"),
    Cause.AUTH: (502, "server_error", "upstream_auth"),
    Cause.PAYMENT: (402, "insufficient_quota", "upstream_payment_required"),
    Cause.CONTENT_POLICY: (403, "invalid_request_error", "content_policy_violation"),
    Cause.CONTEXT_LENGTH: (400, "invalid_request_error", "context_length_exceeded"),
    Cause.MODEL_NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    Cause.INVALID_REQUEST: (400, "invalid_request_error", "invalid_request"),
    Cause.INVALID_OUTPUT: (502, "server_error", "invalid_output"),
    Cause.CIRCUIT_OPEN: (503, "server_error", "unavailable"),
    Cause.CLIENT_DISCONNECT: (499, "server_error", "client_disconnect"),
    Cause.ABANDONED: (504, "server_error", "upstream_timeout"),
}
_KEEPS_STATUS = frozenset(
    {
        Cause.SERVER_ERROR,
        Cause.INVALID_REQUEST,
        Cause.CONTENT_POLICY,
        Cause.CONTEXT_LENGTH,
    }
)
