"""Jobs as clients see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from gateway_plugins.jobs.store import Job, Result

MOST_SHOWN = 1 << 20  # bytes of a result that its last event carries


def job(known: Job, position: int | None = None) -> dict[str, Any]:
    """The job object. Times in seconds since 1970; durations in seconds."""
    link = f"/v1/jobs/{known.id}"
    return {
        "id": known.id,
        "object": "job",
        "status": known.status,
        "endpoint": known.endpoint,
        "model": known.model,
        "task": known.task,
        "queue": known.queue,
        "priority": known.priority,
        "stream": bool(known.stream),
        "created_at": _seconds(known.created_at),
        "run_after": _seconds(known.run_after),
        "run_before": _seconds(known.run_before),
        "started_at": _seconds(known.started_at),
        "finished_at": _seconds(known.finished_at),
        "expires_at": _seconds(known.expires_at),
        "cancel_requested_at": _seconds(known.cancel_asked),
        "attempts": known.attempts,
        "max_attempts": known.max_attempts,
        "position": position,  # how many wait before it; null: it does not wait, or nobody knows
        "timings": {
            "waited": _between(known.created_at, known.started_at),
            "ran": _between(known.started_at, known.finished_at),
        },
        "error": None if known.error_code is None else {"code": known.error_code, "message": known.error_message},
        "result_status": known.result_status,
        "cost_usd": None if known.cost_micro_usd is None else known.cost_micro_usd / 1e6,
        "request_id": known.request_id,
        "metadata": msgspec.json.decode(known.metadata or "{}"),
        "webhook": known.webhook,
        "links": {
            "self": link,
            "result": f"{link}/result",
            "stream": f"{link}/stream",
            "cancel": f"{link}/cancel",
        },
    }


def event(kind: str, known: Job, result: Result | None = None) -> bytes:
    """What /stream tells of a job whose answer is no stream: `job.queued`, `job.running`, and how it ended."""
    data: dict[str, Any] = {"type": kind, "job": job(known)}
    if result is not None and result.content_type.startswith("application/json") and len(result.body) <= MOST_SHOWN:
        data["result"] = msgspec.Raw(result.body.replace(b"\n", b" ").replace(b"\r", b" "))
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))


def error_event(known: Job) -> bytes:
    """The last event of a stream that did not end well, where the stream itself does not say so."""
    code, message = known.error_code or f"job_{known.status}", known.error_message or f"The job was {known.status}."
    error = {"message": message, "type": "server_error", "code": code, "param": None}
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode({"type": "error", "error": error})


def _seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000


def _between(start: int | None, end: int | None) -> float | None:
    return None if start is None or end is None else max(0, end - start) / 1000
