"""What the tables of this plugin are. Times are milliseconds since 1970, UTC."""

from sqlalchemy import BigInteger, Column, MetaData, Table, Text

metadata = MetaData()

keys = Table(
    "api_keys_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("hash", Text, nullable=False, unique=True),
    Column("hint", Text, nullable=False),  # how the key begins, for people
    Column("tenant", Text, nullable=False, index=True),
    Column("team", Text),
    Column("owner", Text),
    Column("grants", Text, nullable=False),  # JSON: name, tags, roles, admin, models, aliases, tasks, endpoints, limits
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("old_hash", Text, unique=True),  # of the key before the last rotation, good until `old_until`
    Column("old_until", BigInteger),
    Column("last_used_at", BigInteger),
)

audit = Table(
    "api_keys_audit",
    metadata,
    Column("id", Text, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("key_id", Text, nullable=False, index=True),
    Column("detail", Text, nullable=False),  # JSON, never a secret
)
