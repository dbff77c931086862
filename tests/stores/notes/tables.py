from sqlalchemy import BigInteger, Column, MetaData, Table, Text

metadata = MetaData()
kept = Table(
    "notes_kept",
    metadata,
    Column("id", Text, primary_key=True),
    Column("text", Text, nullable=False),
    Column("at", BigInteger, nullable=True, index=True),
)
