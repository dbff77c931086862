"""Webhooks: who is told, and what was said."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def _texts(*names: str, nullable: bool = True) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=nullable) for name in names]


def _numbers(*names: str, nullable: bool = True) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable) for name in names]


def upgrade() -> None:
    op.create_table(
        "jobs_webhook_endpoints",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("tenant", "name", "url", "event_types"),
        *_numbers("version", "created_at", "updated_at", nullable=False),
        *_numbers("old_until", "disabled_at"),
    )
    op.create_index("ix_jobs_webhook_endpoints_tenant", "jobs_webhook_endpoints", ["tenant", "created_at"])
    op.create_table(
        "jobs_webhook_deliveries",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("tenant", "event_type", "body", "status", nullable=False),
        *_texts("endpoint", "url"),
        *_numbers("created_at", "attempts", "next_at", nullable=False),
        *_numbers("finished_at", "expires_at", "last_status"),
        *_texts("last_error"),
    )
    op.create_index("ix_jobs_webhook_deliveries_status", "jobs_webhook_deliveries", ["status", "next_at"])
    op.create_index("ix_jobs_webhook_deliveries_created", "jobs_webhook_deliveries", ["created_at"])
    op.create_index("ix_jobs_webhook_deliveries_expires", "jobs_webhook_deliveries", ["expires_at"])


def downgrade() -> None:
    op.drop_table("jobs_webhook_deliveries")
    op.drop_table("jobs_webhook_endpoints")
