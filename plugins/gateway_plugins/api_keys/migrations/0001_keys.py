"""Keys and who changed them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "api_keys_keys",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("hash", sa.Text(), nullable=False, unique=True),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("team", sa.Text()),
        sa.Column("owner", sa.Text()),
        sa.Column("grants", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("old_hash", sa.Text(), unique=True),
        sa.Column("old_until", sa.BigInteger()),
        sa.Column("last_used_at", sa.BigInteger()),
    )
    op.create_index("ix_api_keys_keys_tenant", "api_keys_keys", ["tenant"])
    op.create_table(
        "api_keys_audit",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
    )
    op.create_index("ix_api_keys_audit_at", "api_keys_audit", ["at"])
    op.create_index("ix_api_keys_audit_key_id", "api_keys_audit", ["key_id"])


def downgrade() -> None:
    op.drop_table("api_keys_audit")
    op.drop_table("api_keys_keys")
