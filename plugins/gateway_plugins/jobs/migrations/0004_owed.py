"""What tries of a batch's lines cost that came to nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "jobs_owed",
        sa.Column("operation", sa.Text(), primary_key=True),
        sa.Column("batch", sa.Text(), nullable=False),
        sa.Column("line", sa.BigInteger(), nullable=False),
        sa.Column("settlement", sa.Text(), nullable=False),
    )
    op.create_index("ix_jobs_owed_batch_line", "jobs_owed", ["batch", "line"])


def downgrade() -> None:
    op.drop_table("jobs_owed")
