"""When they were kept."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.add_column("notes_kept", sa.Column("at", sa.BigInteger(), nullable=True))
    op.create_index("ix_notes_kept_at", "notes_kept", ["at"])


def downgrade():
    op.drop_index("ix_notes_kept_at", "notes_kept")
    op.drop_column("notes_kept", "at")
