"""Single jobs and background responses."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _texts(*names: str, nullable: bool = True) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=nullable) for name in names]


def _numbers(*names: str, nullable: bool = True) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable) for name in names]


def upgrade() -> None:
    op.create_table(
        "jobs_jobs",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("kind", "tenant", "principal", "endpoint", "queue", "priority", "status", nullable=False),
        *_texts("task", "model"),
        *_numbers("stream", nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        *_texts("metadata", "webhook", "idempotency_key", "fingerprint"),
        *_numbers("created_at", "attempts", "max_attempts", nullable=False),
        *_numbers("run_after", "run_before", "started_at", "finished_at", "expires_at"),
        *_numbers("seen_at"),
        *_texts("operation", "request_id"),
        *_numbers("result_status"),
        *_texts("result_headers"),
        sa.Column("result", sa.LargeBinary()),
        *_texts("error_code", "error_message"),
        *_numbers("cost_micro_usd", "cancel_asked"),
        *_texts("settlement"),
        sa.UniqueConstraint("tenant", "idempotency_key"),
    )
    op.create_index("ix_jobs_jobs_tenant_created", "jobs_jobs", ["tenant", "created_at"])
    op.create_index("ix_jobs_jobs_tenant_status", "jobs_jobs", ["tenant", "status"])
    op.create_index("ix_jobs_jobs_status", "jobs_jobs", ["status", "run_after"])
    op.create_index("ix_jobs_jobs_expires", "jobs_jobs", ["expires_at"])


def downgrade() -> None:
    op.drop_table("jobs_jobs")
