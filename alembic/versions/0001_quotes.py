"""The raw quotes and the table of each symbol's newest quote."""

from alembic import context, op

from app.db.capability import Level

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

QUOTE_COLUMNS = """
    price     numeric(20,8) NOT NULL,
    bid       numeric(20,8),
    ask       numeric(20,8),
    bid_size  bigint,
    ask_size  bigint,
    volume    bigint,
    source    text
"""


def upgrade() -> None:
    attributes = context.config.attributes
    op.execute("CREATE SCHEMA quotes")
    # Symbols compare as bytes: keyset paging, the sort in the write path and the columnstore agree on one order.
    op.execute(f"""
        CREATE TABLE quotes.real_time (
            symbol    text COLLATE "C" NOT NULL,
            timestamp timestamptz NOT NULL,
            {QUOTE_COLUMNS},
            PRIMARY KEY (symbol, timestamp)
        )""")
    if attributes["capability"].level >= Level.APACHE:
        seconds = int(attributes["settings"].chunk_interval.total_seconds())
        op.execute(f"""
            SELECT create_hypertable('quotes.real_time', by_range('timestamp', interval '{seconds} seconds'),
                                     create_default_indexes => false)""")
    op.execute("CREATE INDEX idx_timestamp_desc ON quotes.real_time (timestamp DESC)")
    # One row a symbol, updated with every flush: room in the page keeps the updates off the index.
    op.execute(f"""
        CREATE TABLE quotes.latest (
            symbol          text COLLATE "C" PRIMARY KEY,
            first_timestamp timestamptz NOT NULL,
            timestamp       timestamptz NOT NULL,
            {QUOTE_COLUMNS}
        ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02)""")


def downgrade() -> None:
    op.execute("DROP TABLE quotes.latest")
    op.execute("DROP TABLE quotes.real_time")
    op.execute("DROP SCHEMA quotes")
