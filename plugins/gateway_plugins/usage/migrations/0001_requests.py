"""A row per request, and what remains of old ones."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "reasoning_tokens")


def _texts(*names: str, nullable: bool = True) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=nullable) for name in names]


def _numbers(*names: str, nullable: bool = True) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable) for name in names]


def upgrade() -> None:
    op.create_table(
        "usage_requests",
        sa.Column("id", sa.Text(), primary_key=True),
        *_texts("request_id", nullable=False),
        *_numbers("at", nullable=False),
        *_texts("tenant", "principal", nullable=False),
        *_texts("team", "end_user"),
        *_texts("endpoint", nullable=False),
        *_numbers("stream", nullable=False),
        *_texts("task", "rule", "model_asked", "model_served", "upstream"),
        *_numbers("attempts"),
        *_texts("tries"),
        *_numbers(*_TOKENS),
        *_texts("usage_source", nullable=False),
        *_numbers("cost_micro_usd"),
        *_texts("cost_source", nullable=False),
        *_numbers("status"),
        *_texts("outcome", nullable=False),
        *_texts("error_code"),
        *_numbers("duration_ms", "first_content_ms", "upstream_ms", "corrected_at"),
    )
    op.create_index("ix_usage_requests_request_id", "usage_requests", ["request_id"])
    op.create_index("ix_usage_requests_at", "usage_requests", ["at"])
    op.create_index("ix_usage_requests_tenant_at", "usage_requests", ["tenant", "at"])
    op.create_table(
        "usage_days",
        sa.Column("day", sa.BigInteger(), primary_key=True, autoincrement=False),
        *(
            sa.Column(name, sa.Text(), primary_key=True)
            for name in ("tenant", "principal", "team", "model", "task", "endpoint", "outcome")
        ),
        *_numbers("requests", "attempts", nullable=False),
        *_numbers(*_TOKENS, "cost_micro_usd"),
        *_numbers("cost_unknown", nullable=False),
    )


def downgrade() -> None:
    op.drop_table("usage_days")
    op.drop_table("usage_requests")
