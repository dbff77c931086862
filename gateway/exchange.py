"""What one request carries through the gateway: the Exchange and the values in it."""

from __future__ import annotations

import itertools
import secrets
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.limits import Held, RuleSet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from gateway.dialects import Dialect
    from gateway.errors import Cause, GatewayError
    from gateway.forwarded import Peer, TrustedProxies
    from gateway.late import LateRequest
    from gateway.limits import Admission, Rule
    from gateway.routes import Route
    from gateway.snapshot import Snapshot

T = TypeVar("T")
JsonObject = dict[str, Any]
# `live`: answered at once. `accept`: taken as a job, by whoever answers `lookup_response`. `run`: that job, at work.
Phase = Literal["live", "accept", "run"]
Abandoned = Literal["tenant", "operator"]  # who pays for a run whose worker died
Timing = tuple[str, str, float, float]  # plugin, hook, and from when to when it ran, as `time.monotonic()` counts

# Whatever can carry a credential: plugins don't see it in `request.headers`, upstreams never get it.
SECRET_HEADERS = frozenset(
    {
        "authorization",
        "proxy-authorization",
        "x-api-key",
        "api-key",
        "cookie",
        "x-goog-api-key",
        "openai-api-key",
    }
)


class Source(StrEnum):
    """Where a count or a price came from, the surest first."""

    UPSTREAM = "upstream"
    CATALOGUE = "catalogue"
    ESTIMATE = "estimate"
    RESERVED = "reserved"  # unknown, so what a budget had reserved was charged
    UNKNOWN = "unknown"

    @classmethod
    def weakest(cls, sources: Iterable[Source]) -> Source:
        """A sum is as sure as the least sure of what it is made of."""
        return max(sources, key=list(cls).index)


class Outcome(StrEnum):
    """How an exchange ended; one of these stands in its log line and its usage row."""

    OK = "ok"
    ACCEPTED = "accepted"  # as a job: the run of it has an outcome, a log line and a row of its own
    REFUSED = "refused"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_TRUNCATED = "upstream_truncated"
    CLIENT_DISCONNECT = "client_disconnect"
    TIMEOUT = "timeout"
    PLUGIN_ERROR = "plugin_error"
    SHUTDOWN = "shutdown"
    ERROR = "error"


# msgspec's structs where one is made for each request: a frozen dataclass takes eight times as long to make.
class Usage(msgspec.Struct, frozen=True):
    """Tokens of one attempt, or the sum over an exchange. None is unknown, never 0."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    source: Source = Source.UNKNOWN

    def __add__(self, other: Usage) -> Usage:
        """Unknown and known make known (what is known was used), with the weaker source."""
        return Usage(
            _plus(self.input_tokens, other.input_tokens),
            _plus(self.output_tokens, other.output_tokens),
            _plus(self.cache_read_tokens, other.cache_read_tokens),
            _plus(self.cache_write_tokens, other.cache_write_tokens),
            _plus(self.reasoning_tokens, other.reasoning_tokens),
            Source.weakest((self.source, other.source)),
        )


class Cost(msgspec.Struct, frozen=True):
    """Money in integer pico-USD (1 USD = 10**12), so that single tokens of cheap models add up exactly."""

    pico_usd: int | None = None
    source: Source = Source.UNKNOWN

    @property
    def usd(self) -> float | None:
        return None if self.pico_usd is None else self.pico_usd / 1e12

    @property
    def micro_usd(self) -> int | None:
        """As budgets and usage rows count, rounded up."""
        return None if self.pico_usd is None else -(-self.pico_usd // 10**6)

    def __add__(self, other: Cost) -> Cost:
        return Cost(_plus(self.pico_usd, other.pico_usd), Source.weakest((self.source, other.source)))


UNKNOWN_USAGE = Usage()
UNKNOWN_COST = Cost()


def _plus(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b


@dataclass(frozen=True, slots=True)
class Scopes:
    """What a principal may use. None = everything; globs (`anthropic/*`) in every list."""

    models: tuple[str, ...] | None = None
    aliases: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None

    def allows(self, kind: Literal["models", "aliases", "tasks", "endpoints"], name: str) -> bool:
        globs = cast("tuple[str, ...] | None", getattr(self, kind))
        return globs is None or any(fnmatchcase(name, glob) for glob in globs)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Principal:
    """Who is calling. `reference` is what a job keeps to restore the principal: an id, never a secret."""

    id: str
    kind: str = "key"
    tenant: str = ""
    team: str | None = None
    roles: frozenset[str] = frozenset()
    scopes: Scopes = Scopes()
    limits: Mapping[str, Any] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)
    admin: bool = False

    @property
    def reference(self) -> str:
        return f"{self.kind}:{self.id}"


ANONYMOUS = Principal(id="anonymous", kind="anonymous", tenant="anonymous")


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of one attempt in seconds, None = no limit of its own (the exchange's deadline still holds)."""

    first_event: float | None = None
    stall: float | None = None
    total: float | None = None  # to the last byte

    def over(self, others: Limits) -> Limits:
        """These, and those of `others` where these say nothing."""
        return Limits(
            others.first_event if self.first_event is None else self.first_event,
            others.stall if self.stall is None else self.stall,
            others.total if self.total is None else self.total,
        )


@dataclass(frozen=True, slots=True)
class Target:
    """One model at one upstream. `overrides` are set in the body, `strip` are removed from it.

    `limits`: what differs from the limits that the settings give every attempt; None there = as the settings say.
    """

    model: str
    upstream: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    strip: tuple[str, ...] = ()
    limits: Limits | None = None

    @property
    def name(self) -> str:
        """As people and dashboards know it: `openrouter/anthropic/claude-opus-4.6`."""
        return f"{self.upstream}/{self.model}"

    def applied_to(self, body: JsonObject) -> JsonObject:
        """The body with what is set and without what is stripped for this target; the given one is left alone."""
        return {name: value for name, value in {**body, **self.overrides}.items() if name not in self.strip}


@dataclass(frozen=True, slots=True)
class Decision:
    """Which models may answer, in order, and why.

    `alias` names what the client asked for when that was not a model itself: a scope that grants it grants its targets.
    `offload`: it is to become a job, if some plugin takes jobs.
    `fallback_on`: the causes after which the next target is tried, None = as the fallback plugin is set up.
    `timeout`: seconds for the whole request, None = `server.request_timeout`, which is also its upper end.
    """

    asked: str
    targets: tuple[Target, ...]
    task: str | None = None
    alias: str | None = None
    rule: str | None = None
    offload: bool = False
    reasons: tuple[str, ...] = ()
    fallback_on: frozenset[Cause] | None = None
    timeout: float | None = None


class Attempt(msgspec.Struct, frozen=True):
    """What is to be sent to one target. Immutable: a layer that changes it makes another by `replace`."""

    target: Target
    body: bytes
    headers: Mapping[str, str]
    limits: Limits

    def replace(self, **changes: Any) -> Attempt:
        return msgspec.structs.replace(self, **changes)


class AttemptRecord(msgspec.Struct, eq=False):
    """What became of one attempt. Times are `time.monotonic()` seconds."""

    attempt: Attempt
    number: int
    started: float
    first_content: float | None = None
    finished: float | None = None
    status: int | None = None
    cause: Cause | None = None
    message: str | None = None
    retry_after: float | None = None  # seconds, as the upstream asked for
    generation_id: str | None = None
    usage: Usage = UNKNOWN_USAGE
    cost: Cost = UNKNOWN_COST
    answered_by: str | None = None  # the model that the upstream says it was, where the choice was the upstream's

    @property
    def target(self) -> Target:
        return self.attempt.target

    @property
    def served(self) -> Target:
        """The target, as the model that answered for it."""
        return self.target if self.answered_by is None else replace(self.target, model=self.answered_by)

    @property
    def duration(self) -> float | None:
        """Seconds until the last byte, the failure or the cancellation."""
        return None if self.finished is None else self.finished - self.started


class Event(bytes):
    """One whole SSE event with its blank line, as it came from the upstream. Parsed only when asked."""

    @cached_property
    def payload(self) -> bytes:
        """The `data:` lines joined by newlines, b"" if there are none."""
        if self.startswith(b"data: ") and self.find(b"\n") == len(self) - 2 and self.find(b"\r") < 0:
            return self[6:-2]  # one line, as most events are
        lines = self.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))

    @cached_property
    def data(self) -> Any:
        """The payload as JSON; None if it is not JSON (`[DONE]`, a comment)."""
        try:
            return msgspec.json.decode(self.payload)
        except (msgspec.DecodeError, RecursionError):
            return None

    @property
    def is_comment(self) -> bool:
        return self.startswith(b":")


class Reply:
    """A reply to the client. Bytes that nobody changed leave as they came."""

    __slots__ = ("_body", "_data", "_dirty", "chunks", "headers", "status")

    def __init__(
        self,
        status: int,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        data: Any = None,
        chunks: AsyncIterator[bytes] | None = None,
    ) -> None:
        """Give `body` (bytes), `data` (JSON, encoded when it is sent), or `chunks`. Raises ValueError or TypeError.

        `chunks`: a body that is made while it is sent, for as long as that takes: `server.request_timeout` ends with
        the head. It is asked for more when the client has taken what there was, and closed (`aclose`) at the end, also
        when the client left. With a `Content-Length` among the headers it must have just that many bytes. A content
        type of `text/event-stream` makes it a stream of server-sent events, each chunk one or more whole ones: the
        core breaks long silences by keep-alives, and what fails, or the gateway's end, is told as the dialect's error
        event. No tap and no `transform_response` sees chunks.
        """
        if not 200 <= status <= 599:
            raise ValueError(f"{status!r} is no status of a reply")
        if body is not None and not isinstance(body, bytes):
            raise TypeError(f"a body is bytes, not {type(body).__name__}")
        if chunks is not None and not (body is None and data is None and hasattr(chunks, "__anext__")):
            raise TypeError("`chunks` is an asynchronous iterator, and stands alone")
        self.status = status
        self.headers: CIMultiDict[str] = headers if isinstance(headers, CIMultiDict) else CIMultiDict(headers or ())
        self.chunks = chunks
        self._body = body
        self._data = data
        self._dirty = body is None
        if body is None:
            kind = "application/json" if chunks is None else "application/octet-stream"
            self.headers.setdefault("Content-Type", kind)

    @property
    def body(self) -> bytes:
        if self._dirty:
            self._body = b"" if self._data is None else msgspec.json.encode(self._data)
            self._dirty = False
        return self._body or b""

    @body.setter
    def body(self, value: bytes) -> None:
        if not isinstance(value, bytes):
            raise TypeError(f"a body is bytes, not {type(value).__name__}")
        self._body, self._data, self._dirty = value, None, False

    @property
    def data(self) -> Any:
        """The body as JSON. To change it, assign: a change inside the returned object is not sent by itself."""
        if self._data is None and self._body:
            self._data = msgspec.json.decode(self._body)
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._data, self._dirty = value, True


class Credentials(msgspec.Struct, frozen=True):
    """What the client showed, each as sent. Only `authenticate` sees it; the core forgets it afterwards."""

    bearer: str | None = None
    api_key: str | None = None

    def __repr__(self) -> str:
        return "Credentials(***)"

    @property
    def token(self) -> str | None:
        """The key, from whichever header it came."""
        return self.bearer or self.api_key


class RequestView:
    """The client's request as plugins see it: without any header that carries a credential."""

    __slots__ = (
        "_all_headers",
        "_headers",
        "_peer",
        "_proxies",
        "http_version",
        "method",
        "path",
        "path_params",
        "query_string",
    )

    def __init__(
        self,
        method: str,
        path: str,
        headers: CIMultiDictProxy[str],
        *,
        query_string: str = "",
        remote: Peer = None,
        http_version: tuple[int, int] = (1, 1),
        proxies: TrustedProxies | None = None,
    ) -> None:
        self.method = method
        self.path = path
        self.query_string = query_string
        self._peer = remote
        self._proxies = proxies
        self.http_version = http_version
        self.path_params: dict[str, str] = {}
        self._all_headers = headers
        self._headers: CIMultiDict[str] | None = None

    @property
    def remote(self) -> str | None:
        """The client's address: of whoever connected, or what those of `server.trusted_proxies` say of their client."""
        if self._proxies is not None:
            told = self._all_headers.getall("x-forwarded-for", ())
            self._peer, self._proxies = self._proxies.client(self._peer, told), None
        return str(self._peer[0]) if isinstance(self._peer, tuple) else self._peer

    def header(self, name: str) -> str | None:
        """One header, None if absent or secret."""
        return None if name.lower() in SECRET_HEADERS else self._all_headers.get(name)

    def getall(self, name: str) -> Sequence[str]:
        """Each value of a header that may be sent more than once; none if it is absent or secret."""
        return () if name.lower() in SECRET_HEADERS else self._all_headers.getall(name, ())

    def pick(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the named headers that were sent and are not secret."""
        get = self._all_headers.get
        return {n: v for n in names if (v := get(n)) is not None and n.lower() not in SECRET_HEADERS}

    @property
    def headers(self) -> CIMultiDict[str]:
        if self._headers is None:
            self._headers = CIMultiDict((k, v) for k, v in self._all_headers.items() if k.lower() not in SECRET_HEADERS)
        return self._headers

    @property
    def query(self) -> dict[str, str]:
        from urllib.parse import parse_qsl  # noqa: PLC0415 - never on the proxied path

        return dict(parse_qsl(self.query_string, keep_blank_values=True))


class ContextKey(Generic[T]):
    """A plugin's private, typed slot in each exchange.

    Make one per plugin *instance* (in `__init__`): keys are told apart by identity, so a plugin that the YAML lists
    twice keeps two states.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_prefix = secrets.token_hex(6)
_numbers = itertools.count()


def new_id() -> str:
    """An exchange's id: unique over all processes, not secret. No system call per request."""
    return f"req_{_prefix}{next(_numbers):08x}"


class Exchange(msgspec.Struct, eq=False, weakref=True):
    """One request and everything that becomes of it. Every hook gets it."""

    # Ours and unique: what is billed hangs on it. `request_id` is what the client may have chosen.
    id: str
    request: RequestView
    snapshot: Snapshot
    route: Route
    phase: Phase = "live"
    request_id: str = ""
    dialect: Dialect = None  # type: ignore[assignment]  # the route's, whatever is given
    # The exchange whose handler makes this model call by `services.submit`.
    parent: Exchange | None = None
    # Of the trace that this request belongs to, 32 hex digits; set by a tracing plugin in `request_received` where
    # somebody else may know the trace. The access log's line has it.
    trace_id: str | None = None
    # This request's own place in its trace, as W3C's header says it: set by a tracing plugin in `request_received`,
    # kept with a job. In phase `run` it is there before any hook: the place of the request that was accepted.
    traceparent: str | None = None
    # In phase `run`: what was kept, who pays if this worker dies, and, once it is over, what is to be settled
    # (`services.settle_late`).
    late: LateRequest | None = None
    charge_abandoned: Abandoned = "tenant"
    settlement: list[Any] | None = None
    credentials: Credentials | None = None
    principal: Principal | None = None
    raw_body: bytes = b""
    # The parsed JSON body; for multipart its plain fields, the files stay in `form`.
    body: JsonObject = {}
    form: Form | None = None
    decision: Decision | None = None
    attempts: list[AttemptRecord] = []
    # Targets that were passed over since their circuit is open.
    skipped: list[Target] = []
    reply: Reply | None = None
    # Headers that the reply will carry, whatever it is.
    reply_headers: CIMultiDict[str] = msgspec.field(default_factory=CIMultiDict)
    # The client asked for a stream; known once the body is.
    stream: bool = False
    streamed: bool = False
    client_started: bool = False
    status: int | None = None
    outcome: Outcome | None = None
    error: GatewayError | None = None
    error_by: str | None = None
    # Answered by an explanation of what would become of it.
    explained: bool = False
    # What the request counts for, named by plugins in `check_request`; what came of it, once all were asked.
    held: list[Held] | None = None
    admission: Admission | None = None
    # What is to be stored of this request, asked for at its end with what the ledger settles (both or neither),
    # and at admission for the case that its worker dies. One plugin may set it in `request_received`.
    record: Callable[[Exchange], bytes] | None = None
    usage: Usage = UNKNOWN_USAGE
    cost: Cost = UNKNOWN_COST
    started: float = msgspec.field(default_factory=time.monotonic)
    started_at: float = msgspec.field(default_factory=time.time)
    # When the answer must be complete, as `started` counts; a decision may bring it nearer.
    deadline: float = float("inf")
    first_content: float | None = None
    finished: float | None = None
    # (plugin id, hook) that is running: what a deadline that fires will name.
    running: tuple[str, str] | None = None
    # When each plugin's hooks ran, where this request is measured; None: it is not. A plugin that wants to know
    # sets a list in `request_received` if there is none. A layer of `around_upstream` has a piece for each stretch
    # outside of `call_next`, a tap one for the whole stream, as long as all its calls together.
    timings: list[Timing] | None = None
    scope_memo: dict[int, bool] = {}
    _upload: AsyncIterator[bytes] | None = None
    _context: dict[ContextKey[Any], Any] = {}

    def __post_init__(self) -> None:
        self.request_id = self.request_id or self.id
        self.dialect = self.route.dialect

    def __repr__(self) -> str:
        return f"<Exchange {self.id}>"  # all that it holds would be prompts and secrets

    def get(self, key: ContextKey[T], default: T | None = None) -> T | None:
        found: T | None = self._context.get(key, default)
        return found

    def set(self, key: ContextKey[T], value: T) -> T:
        self._context[key] = value
        return value

    def hold(self, *rules: Rule) -> None:
        """In `check_request`: limits that this request counts for. All plugins' are admitted together, or none is."""
        self.hold_set(RuleSet(rules))

    def hold_set(self, rules: RuleSet, amount: int = 0, least: int | None = None) -> None:
        """The same with rules that were made once for many requests: faster.

        `amount`, and of budgets `least`: what this request takes of those that are `varies`.
        """
        if self.held is None:
            self.held = []
        self.held.append(Held(rules, amount, least))

    def upload(self) -> AsyncIterator[bytes]:
        """The body piece by piece, in a handler whose route says `body="stream"`; once.

        Raises TooLarge beyond the route's `max_body`, RequestTimeout, BadRequest, or ClientGone, also in the middle.
        """
        pieces, self._upload = self._upload, None
        if pieces is None:
            raise RuntimeError("The body was read already, or its route does not say `stream`.")
        return pieces

    def offer_upload(self, pieces: AsyncIterator[bytes] | None) -> None:
        """The core's: what `upload` will give."""
        self._upload = pieces

    def attempt(self, target: Target) -> Attempt:
        """What would be sent to this target, with the body as it stands."""
        return self.snapshot.attempt_for(self, target)

    @property
    def endpoint(self) -> str:
        """`chat/completions`, `messages`, … for proxied routes; the path template for others."""
        return self.route.endpoint

    @property
    def asked_model(self) -> str:
        if self.decision:
            return self.decision.asked
        model = self.body.get("model")
        return model if isinstance(model, str) else ""  # whatever else stands there is logged by nobody

    @property
    def served(self) -> Target | None:
        """The target whose reply the client got or is getting; None if none answered."""
        for record in reversed(self.attempts):
            if record.first_content is not None:
                return record.attempt.target if record.answered_by is None else record.served
        return None


class Finding(msgspec.Struct, frozen=True, eq=False):
    """One thing that a plugin says in a dry run (hook `explain`). `text` is for people and holds no secret.

    `refuses`: it would refuse the request by this error.
    `rule`: it would hold this limit; made by the core of each that it names by `exchange.hold`, as in `check_request`.
    `target`: it is about this one of the decision's targets, and is shown beside it.
    `order`: the targets in the order in which it would try them, if not as decided; what it leaves out, it skips.
    `data`: the same for programs, as JSON.
    """

    text: str
    refuses: GatewayError | None = None
    rule: Rule | None = None
    target: Target | None = None
    order: Sequence[Target] | None = None
    data: Any = None


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file of a multipart request."""

    name: str
    filename: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart request: repeated fields keep their order."""

    fields: Sequence[tuple[str, str]]
    files: Sequence[FormFile]


@dataclass(frozen=True, slots=True)
class Correction:
    """The true usage and cost of an attempt, learnt later. At most once per operation id."""

    operation_id: str
    exchange_id: str
    usage: Usage
    cost: Cost
