"""The raw quotes and the table of each symbol's newest quote.

The row is decided here, once: neither the type of a column in the columnstore nor what a rollup's `first` and `last`
go by can be changed in place.
"""

from alembic import context, op

from app.db.capability import Level

revision = "r1"
down_revision = None
branch_labels = None
depends_on = None

KEY_COLUMNS = """
    timestamp timestamptz NOT NULL,
    nanos     smallint NOT NULL DEFAULT 0
"""
VALUE_COLUMNS = """
    price     numeric(28,12),
    bid       numeric(28,12),
    ask       numeric(28,12),
    bid_size  numeric(28,12),
    ask_size  numeric(28,12),
    volume    numeric(28,12),
    source    text
"""
# What is cheap to refuse, in one expression, 0.15 us a row of the 2.6 that COPY takes; a null passes. Symbols are
# ASCII, so that their bytes, which are known at once, are their characters; 1020 is 255 of the longest.
CHECKS = """
    CONSTRAINT real_time_row CHECK (
        nanos BETWEEN 0 AND 999 AND octet_length(symbol) BETWEEN 1 AND 64 AND octet_length(source) <= 1020
        AND (price IS NOT NULL OR bid IS NOT NULL OR ask IS NOT NULL)
        AND price <> 'NaN' AND bid <> 'NaN' AND ask <> 'NaN'
        AND bid_size <> 'NaN' AND ask_size <> 'NaN' AND volume <> 'NaN')
"""
COMMENTS = {
    "TABLE quotes.real_time": "Quotes as feeds sent them, a row a symbol and nanosecond; written by the service only",
    "TABLE quotes.latest": "The newest quote of each symbol, kept in the transaction that writes its quotes",
    "COLUMN quotes.latest.first_timestamp": "Microsecond of the oldest stored quote",
    "COLUMN quotes.latest.first_nanos": "Nanoseconds after first_timestamp, 0 to 999",
} | {
    f"COLUMN quotes.{table}.{column}": meaning
    for table in ("real_time", "latest")
    for column, meaning in {
        "symbol": "Upper case, 1 to 64 characters",
        "timestamp": "Microsecond of the quote",
        "nanos": "Nanoseconds after timestamp, 0 to 999",
        "price": "Price of a trade; null where nothing was traded, never a mid",
        "bid": "Best bid; null where nobody bids",
        "ask": "Best ask; null where nobody offers",
        "bid_size": "Size at the best bid",
        "ask_size": "Size at the best ask",
        "volume": "Size of the trade",
        "source": "Where the quote came from; no part of the key",
    }.items()
}


def upgrade() -> None:
    attributes = context.config.attributes
    # Symbols compare as bytes: keyset paging, the sort in the write path and the columnstore agree on one order.
    op.execute(f"""
        CREATE TABLE quotes.real_time (
            symbol    text COLLATE "C" NOT NULL,
            {KEY_COLUMNS},
            {VALUE_COLUMNS},
            PRIMARY KEY (symbol, timestamp, nanos),
            {CHECKS}
        )""")
    if attributes["capability"].level >= Level.APACHE:
        seconds = int(attributes["settings"].chunk_interval.total_seconds())
        op.execute(f"""
            SELECT create_hypertable('quotes.real_time', by_range('timestamp', interval '{seconds} seconds'),
                                     create_default_indexes => false)""")
    # For reads by time alone: refreshes, counts. It knows the range of each 4 MB, which costs COPY nothing, where a
    # B-tree took a quarter of its time. Pages are entered as they fill, not when vacuum comes.
    op.execute("""
        CREATE INDEX idx_timestamp ON quotes.real_time USING brin (timestamp)
        WITH (pages_per_range = 512, autosummarize = on)""")
    # Its rows are read back from the quotes, so that it needs no checks of its own: they took 22 us a flush.
    # One row a symbol, updated with every flush: room in the page keeps the updates off the index.
    op.execute(f"""
        CREATE TABLE quotes.latest (
            symbol          text COLLATE "C" PRIMARY KEY,
            first_timestamp timestamptz NOT NULL,
            first_nanos     smallint NOT NULL DEFAULT 0,
            {KEY_COLUMNS},
            {VALUE_COLUMNS}
        ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02)""")
    for what, meaning in COMMENTS.items():
        op.execute(f"COMMENT ON {what} IS '{meaning}'")


def downgrade() -> None:
    op.execute("DROP TABLE quotes.latest")
    op.execute("DROP TABLE quotes.real_time")
