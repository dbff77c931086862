"""What the tables of this plugin are. Times are milliseconds since 1970, UTC; money is micro-USD; NULL is unknown."""

from sqlalchemy import BigInteger, Column, Index, MetaData, Table, Text

metadata = MetaData()
_TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "reasoning_tokens")

requests = Table(
    "usage_requests",
    metadata,
    Column("id", Text, primary_key=True),  # ours, unique over all gateways
    Column("request_id", Text, nullable=False, index=True),  # what the client may have chosen
    Column("at", BigInteger, nullable=False, index=True),
    Column("tenant", Text, nullable=False),
    Column("principal", Text, nullable=False),
    Column("team", Text),
    Column("end_user", Text),
    Column("endpoint", Text, nullable=False),
    Column("stream", BigInteger, nullable=False),
    Column("task", Text),
    Column("rule", Text),
    Column("model_asked", Text),
    Column("model_served", Text),
    Column("upstream", Text),
    Column("attempts", BigInteger),
    Column("tries", Text),  # JSON, where an attempt failed
    *(Column(name, BigInteger) for name in _TOKENS),
    Column("usage_source", Text, nullable=False),
    Column("cost_micro_usd", BigInteger),
    Column("cost_source", Text, nullable=False),
    Column("status", BigInteger),
    Column("outcome", Text, nullable=False),
    Column("error_code", Text),
    Column("duration_ms", BigInteger),
    Column("first_content_ms", BigInteger),
    Column("upstream_ms", BigInteger),
    Column("corrected_at", BigInteger),
    Index("ix_usage_requests_tenant_at", "tenant", "at"),
)

# Of requests older than `keep`: what remains of them. An empty text stands for NULL.
days = Table(
    "usage_days",
    metadata,
    Column("day", BigInteger, primary_key=True, autoincrement=False),  # days since 1970, UTC
    Column("tenant", Text, primary_key=True),
    Column("principal", Text, primary_key=True),
    Column("team", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("task", Text, primary_key=True),
    Column("endpoint", Text, primary_key=True),
    Column("outcome", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("attempts", BigInteger, nullable=False),
    *(Column(name, BigInteger) for name in _TOKENS),
    Column("cost_micro_usd", BigInteger),
    Column("cost_unknown", BigInteger, nullable=False),  # requests that were answered at an unknown cost
)
