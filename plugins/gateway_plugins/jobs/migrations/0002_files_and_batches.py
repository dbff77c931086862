"""Files and batches."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _texts(*names: str, nullable: bool = True) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=nullable) for name in names]


def _numbers(*names: str, nullable: bool = True) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable) for name in names]


def upgrade() -> None:
    op.create_table(
        "jobs_files",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("tenant", "principal", "purpose", "filename", "state", nullable=False),
        *_numbers("bytes", "created_at", nullable=False),
        *_numbers("expires_at"),
    )
    op.create_index("ix_jobs_files_tenant_created", "jobs_files", ["tenant", "created_at"])
    op.create_index("ix_jobs_files_expires", "jobs_files", ["expires_at"])
    op.create_table(
        "jobs_batches",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("tenant", "principal", "endpoint", "input_file_id", "status", "completion_window", nullable=False),
        sa.Column("late", sa.LargeBinary(), nullable=False),
        *_texts("metadata", "model", "errors", "output_file_id", "error_file_id", "ending"),
        *_numbers("total", "completed", "failed", nullable=False),
        *_numbers("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", nullable=False),
        *_numbers("created_at", "expires_at", nullable=False),
        *_numbers("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
        *_numbers("cancelling_at", "cancelled_at", "ended_at", "output_seconds"),
        *_numbers("has_lines", nullable=False),
    )
    op.create_index("ix_jobs_batches_tenant_created", "jobs_batches", ["tenant", "created_at"])
    op.create_index("ix_jobs_batches_ended", "jobs_batches", ["ended_at"])
    op.create_index("ix_jobs_batches_input", "jobs_batches", ["input_file_id"])
    op.create_table(
        "jobs_chunks",
        sa.Column("batch", sa.Text(), primary_key=True),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        *_numbers("first", "lines", "start", "length", nullable=False),
        *_texts("custom_ids", "state", nullable=False),
    )
    op.create_table(
        "jobs_lines",
        sa.Column("batch", sa.Text(), primary_key=True),
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        *_numbers("ok", nullable=False),
        *_texts("custom_id", nullable=False),
        *_numbers("status"),
        sa.Column("body", sa.LargeBinary()),
        *_texts("error_code", "error_message", "settlement"),
    )


def downgrade() -> None:
    for table in ("jobs_lines", "jobs_chunks", "jobs_batches", "jobs_files"):
        op.drop_table(table)
