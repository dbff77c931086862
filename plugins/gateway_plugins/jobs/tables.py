"""What the tables of this plugin are. Times are milliseconds since 1970, UTC; money is micro-USD; NULL is unknown."""

from sqlalchemy import BigInteger, Column, Index, LargeBinary, MetaData, Table, Text, UniqueConstraint

metadata = MetaData()


def _texts(*names: str, nullable: bool = True) -> list[Column[str]]:
    return [Column(name, Text, nullable=nullable) for name in names]


def _numbers(*names: str, nullable: bool = True) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=nullable) for name in names]


# Single jobs and background responses.
jobs = Table(
    "jobs_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    *_texts("kind", "tenant", "principal", "endpoint", "queue", "priority", "status", nullable=False),
    *_texts("task", "model"),
    *_numbers("stream", nullable=False),
    Column("request", LargeBinary, nullable=False),  # a LateRequest, JSON
    *_texts("metadata", "webhook", "idempotency_key", "fingerprint"),
    *_numbers("created_at", "attempts", "max_attempts", nullable=False),
    Column("losses", BigInteger, nullable=False, server_default="0"),  # runs whose worker was lost
    *_numbers("run_after", "run_before", "started_at", "finished_at", "expires_at"),
    *_numbers("seen_at"),  # when the process that runs it last said that it does
    *_texts("operation", "request_id"),  # operation: the run under way, or the last one; its usage row
    *_numbers("result_status"),
    *_texts("result_headers"),
    Column("result", LargeBinary),
    *_texts("error_code", "error_message"),
    *_numbers("cost_micro_usd", "cancel_asked"),
    *_texts("settlement"),  # until the ledger has it
    UniqueConstraint("tenant", "idempotency_key"),
    Index("ix_jobs_jobs_tenant_created", "tenant", "created_at"),
    Index("ix_jobs_jobs_tenant_status", "tenant", "status"),
    Index("ix_jobs_jobs_status", "status", "run_after"),
    Index("ix_jobs_jobs_expires", "expires_at"),
)

# Who is told of what has ended, and of whoever has a signing secret, which one it is: endpoints that were registered;
# those of the configuration from when they were found gone; tenants (`tenant:…`) from their first rotation.
webhook_endpoints = Table(
    "jobs_webhook_endpoints",
    metadata,
    Column("id", Text, primary_key=True),
    *_texts("tenant", "name", "url", "event_types"),  # event_types: JSON
    *_numbers("version", "created_at", "updated_at", nullable=False),
    *_numbers("old_until", "disabled_at"),
    Index("ix_jobs_webhook_endpoints_tenant", "tenant", "created_at"),
)

# Messages, one for each receiver.
webhook_deliveries = Table(
    "jobs_webhook_deliveries",
    metadata,
    Column("id", Text, primary_key=True),
    *_texts("tenant", "event_type", "body", "status", nullable=False),  # waiting, delivered, dead
    *_texts("endpoint", "url"),  # one of both: an endpoint, or a job's own webhook
    *_numbers("created_at", "attempts", "next_at", nullable=False),
    *_numbers("finished_at", "expires_at", "last_status"),
    *_texts("last_error"),
    Index("ix_jobs_webhook_deliveries_status", "status", "next_at"),
    Index("ix_jobs_webhook_deliveries_created", "created_at"),
    Index("ix_jobs_webhook_deliveries_expires", "expires_at"),
)

# Uploaded files and batches' results; the storage has their bytes.
files = Table(
    "jobs_files",
    metadata,
    Column("id", Text, primary_key=True),
    *_texts("tenant", "principal", "purpose", "filename", nullable=False),
    *_texts("state", nullable=False),  # uploading, stored, deleted: hidden, until its bytes are gone
    *_numbers("bytes", "created_at", nullable=False),
    *_numbers("expires_at"),
    Index("ix_jobs_files_tenant_created", "tenant", "created_at"),
    Index("ix_jobs_files_expires", "expires_at"),
)

batches = Table(
    "jobs_batches",
    metadata,
    Column("id", Text, primary_key=True),
    *_texts("tenant", "principal", "endpoint", "input_file_id", "status", "completion_window", nullable=False),
    Column("late", LargeBinary, nullable=False),  # a LateRequest without body: whose lines they are
    *_texts("metadata", "model", "errors", "output_file_id", "error_file_id"),
    *_texts("ending"),  # completed, cancelled, expired: from then on no line's result is taken any more
    *_numbers("total", "completed", "failed", nullable=False),
    *_numbers("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", nullable=False),
    *_numbers("created_at", "expires_at", nullable=False),
    *_numbers("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
    *_numbers("cancelling_at", "cancelled_at", "ended_at"),
    *_numbers("output_seconds"),  # how long the results are to be kept
    *_numbers("has_lines", nullable=False),
    Index("ix_jobs_batches_tenant_created", "tenant", "created_at"),
    Index("ix_jobs_batches_ended", "ended_at"),
    Index("ix_jobs_batches_input", "input_file_id"),
)

# Some hundred lines of a batch, which a worker takes together.
chunks = Table(
    "jobs_chunks",
    metadata,
    Column("batch", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    *_numbers("first", "lines", nullable=False),  # of the batch's requests, counted from 0
    *_numbers("start", "length", nullable=False),  # bytes of the file
    *_texts("custom_ids", "state", nullable=False),  # waiting, queued, running, done
)

# The result of one line: that there is one says that it never runs again.
lines = Table(
    "jobs_lines",
    metadata,
    Column("batch", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    *_numbers("ok", nullable=False),
    *_texts("custom_id", nullable=False),
    *_numbers("status"),
    Column("body", LargeBinary),  # JSON
    *_texts("error_code", "error_message"),
    *_texts("settlement"),  # for the ledger, if the worker died before it had it
)

# What tries of lines cost that came to nothing, for the ledger, if the worker died before it had it.
owed = Table(
    "jobs_owed",
    metadata,
    Column("operation", Text, primary_key=True),
    Column("batch", Text, nullable=False),
    *_numbers("line", nullable=False),
    *_texts("settlement", nullable=False),
    Index("ix_jobs_owed_batch_line", "batch", "line"),
)
