"""Notes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table(
        "notes_kept", sa.Column("id", sa.Text(), primary_key=True), sa.Column("text", sa.Text(), nullable=False)
    )


def downgrade():
    op.drop_table("notes_kept")
