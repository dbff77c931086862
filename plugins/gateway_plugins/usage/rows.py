"""What is kept of one request, on its way through the ledger: written by the worker that served it, or left behind by
one that died, and read by the worker that stores it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import Cause, Cost, Outcome, Source, Usage
from gateway.kit import clean, cleaned, end_user

if TYPE_CHECKING:
    from gateway import AttemptRecord, Correction, Exchange, Target

OPERATOR = "operator"  # tenant and principal of what nobody else pays for
ABANDONED = "abandoned"  # outcome of a request whose worker died: nobody knows more


# Fields are written by their place: a new one goes to the end of `Try`, `Request` or `Corrected`, with a default, so
# that gateways of two versions can share a Redis.
class Used(msgspec.Struct, array_like=True):
    """What is counted, of an attempt or of all: None is unknown."""

    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    reasoning_tokens: int | None
    cost_micro_usd: int | None


TOKENS = Used.__struct_fields__[:-1]


class Try(Used, array_like=True):
    """One attempt at an upstream."""

    number: int
    model: str
    upstream: str
    cause: str | None
    status: int | None
    ms: int | None
    usage_source: str
    cost_source: str
    generation_id: str | None


class Request(Used, array_like=True, tag="r"):
    """One request. Times in milliseconds; None is unknown."""

    id: str
    request_id: str
    at: int
    tenant: str
    principal: str
    team: str | None
    end_user: str | None
    endpoint: str
    stream: bool
    task: str | None
    rule: str | None
    model_asked: str | None
    model_served: str | None
    upstream: str | None
    attempts: int | None
    tries: list[Try] | None
    usage_source: str
    cost_source: str
    status: int | None
    outcome: str
    error_code: str | None
    duration_ms: int | None
    first_content_ms: int | None
    upstream_ms: int | None


class Corrected(Used, array_like=True, tag="c"):
    """What an attempt really used and cost, learnt later."""

    id: str
    number: int
    at: int


encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[Request | Corrected] = msgspec.json.Decoder(Request | Corrected)


def decode(payload: bytes) -> Request | Corrected:
    """Raises msgspec.DecodeError."""
    return _decoder.decode(payload)


def request_row(exchange: Exchange) -> bytes:
    """The row as it is known now. Empty for a caller whom nobody knows, who must not be able to fill a table; and for a
    request that became a job, whose run has one.
    """
    principal = exchange.principal
    if principal is None or exchange.outcome is Outcome.ACCEPTED:
        return b""
    started, tries, usage, cost = exchange.started, exchange.attempts, exchange.usage, exchange.cost
    decision, served, finished = exchange.decision, exchange.served, exchange.finished
    over = exchange.outcome is not None
    # of late work whose worker died, unless it is the tenant who pays for that
    lost = not over and exchange.late is not None and exchange.charge_abandoned == "operator"
    user = end_user(exchange.body)
    error = exchange.error
    return encode(
        Request(
            id=exchange.id,
            request_id=exchange.id if exchange.request_id == exchange.id else cleaned(exchange.request_id),
            at=int(exchange.started_at * 1000),
            tenant=OPERATOR if lost else clean(principal.tenant),
            principal=OPERATOR if lost else clean(principal.reference),
            team=clean(principal.team) if principal.team and not lost else None,
            end_user=cleaned(user) if user and not lost else None,
            endpoint=exchange.endpoint,
            stream=exchange.stream,
            task=clean(decision.task) if decision is not None and decision.task else None,
            rule=clean(decision.rule) if decision is not None and decision.rule else None,
            model_asked=clean(exchange.asked_model) or None,
            model_served=clean(served.model) if served is not None else None,
            upstream=served.upstream if served is not None else None,
            attempts=len(tries) if over else None,
            tries=_tries(exchange),
            **_used(usage, cost),
            usage_source=usage.source,
            cost_source=cost.source,
            status=exchange.status,
            outcome=(exchange.outcome or Outcome.ERROR) if over else ABANDONED,
            error_code=clean(error.error_code) if error is not None else None,
            duration_ms=_ms(started, finished),
            first_content_ms=_ms(started, exchange.first_content),
            upstream_ms=round(sum(t.duration or 0.0 for t in tries) * 1000) if tries else None,
        )
    )


def abandoned(row: Request, micro_usd: int) -> Request:
    """The row that a dead worker left at admission: it cost what was reserved. Nothing was: nobody knows."""
    row.outcome, row.attempts = ABANDONED, None
    if micro_usd:
        row.cost_micro_usd, row.cost_source = micro_usd, Source.RESERVED
    return row


def correction_row(correction: Correction) -> bytes:
    return encode(
        Corrected(
            id=correction.exchange_id,
            number=int(correction.operation_id.rpartition("/")[2]),
            at=int(time.time() * 1000),
            **_used(correction.usage, correction.cost),
        )
    )


def _used(usage: Usage, cost: Cost) -> dict[str, int | None]:
    return {**{name: getattr(usage, name) for name in TOKENS}, "cost_micro_usd": cost.micro_usd}


def _tries(exchange: Exchange) -> list[Try] | None:
    """Told where the row itself does not say all: an attempt failed, or a target was passed over."""
    tries, skipped = exchange.attempts, exchange.skipped
    if not skipped and len(tries) < 2 and not (tries and tries[0].cause is not None):
        return None
    return [*map(_skipped, skipped), *map(_try, tries)]


def _skipped(target: Target) -> Try:
    return Try(
        number=0,
        model=clean(target.model),
        upstream=target.upstream,
        cause=Cause.CIRCUIT_OPEN,
        status=None,
        ms=None,
        **_used(Usage(), Cost(0)),
        usage_source=Source.UNKNOWN,
        cost_source=Source.UNKNOWN,
        generation_id=None,
    )


def _try(record: AttemptRecord) -> Try:
    return Try(
        number=record.number,
        model=clean(record.target.model),
        upstream=record.target.upstream,
        cause=record.cause,
        status=record.status,
        ms=_ms(record.started, record.finished),
        **_used(record.usage, record.cost),
        usage_source=record.usage.source,
        cost_source=record.cost.source,
        generation_id=cleaned(record.generation_id) if record.generation_id else None,
    )


def _ms(start: float, end: float | None) -> int | None:
    return None if end is None else round((end - start) * 1000)


def corrected(row: dict[str, Any], tries: list[dict[str, Any]], truth: Corrected) -> dict[str, Any] | None:
    """The columns of a stored row that change, by what one attempt really used; None if it was told before.

    The sum moves by the same amount as the budgets that the request was charged to.
    """
    mine = next((t for t in tries if t["number"] == truth.number), None)
    if mine is None or mine.get("corrected"):
        return None
    out: dict[str, Any] = {}
    for name in Used.__struct_fields__:
        true = getattr(truth, name)
        if true is not None:
            before = mine[name] or 0
            out[name] = (row[name] or 0) + true - before
            mine[name] = true
    mine["corrected"] = True
    if any(getattr(truth, name) is not None for name in TOKENS):
        mine["usage_source"] = Source.UPSTREAM.value
    if truth.cost_micro_usd is not None:
        mine["cost_source"] = Source.UPSTREAM.value
    for name in ("usage_source", "cost_source"):
        known = [Source(t[name]) for t in tries if t[name] != Source.UNKNOWN]
        if known:
            out[name] = Source.weakest(known).value
    return {**out, "tries": tries, "corrected_at": truth.at}
