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
