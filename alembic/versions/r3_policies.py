"""Background policies, on servers that have them: refresh, columnstore, retention.

A refresh window ends close to now and starts as far back as raw quotes are sure to be complete: the retention
horizon plus one chunk, never at NULL, so that no refresh ever rebuilds a bar from quotes that were dropped. A
window that wide costs nothing by itself, because a refresh visits only the ranges that changed since the last
one; and it lets every late quote that the service accepts reach the bars without a queue of its own.
"""

from datetime import timedelta

from alembic import context, op

from app.db.capability import Level

revision = "r3"
down_revision = "r2"
branch_labels = None
depends_on = None

#: rollup, distance of the window's end from now, time between refreshes, buckets of one transaction
REFRESH = (
    ("ohlc_1m", "1 minute", "1 minute", 10 * 1440),
    ("ohlc_1h", "1 hour", "5 minutes", 100 * 24),
    ("ohlc_1d", "1 day", "15 minutes", 1000),
)
#: The first release that adds a bloom filter over the columns of a key.
COMPOSITE_BLOOM = (2, 26)
#: Back to the first day that can be stored.
UNLIMITED = timedelta(days=130_000)


def _interval(span: timedelta) -> str:
    return f"interval '{int(span.total_seconds())} seconds'"


def upgrade() -> None:
    attributes = context.config.attributes
    if attributes["capability"].level < Level.COMMUNITY:
        return
    settings = attributes["settings"]
    retention = settings.effective_retention
    start = UNLIMITED if retention is None else retention - settings.chunk_interval
    for name, end, every, buckets in REFRESH:
        op.execute(f"""
            SELECT add_continuous_aggregate_policy('quotes.{name}', start_offset => {_interval(start)},
                       end_offset => interval '{end}', schedule_interval => interval '{every}',
                       buckets_per_batch => {buckets})""")
    # By itself TimescaleDB would keep a bloom filter over timestamp and nanos: a tenth of all bytes, for 5 us less for
    # each new row that is merged into a compressed chunk. To name another index is the way to have none; an empty list
    # would end the server at the next upsert (2.29.2).
    release = tuple(map(int, attributes["capability"].timescaledb.split(".")[:2]))
    sparse = """, timescaledb.sparse_index = 'minmax("timestamp")'""" if release >= COMPOSITE_BLOOM else ""
    op.execute(f"""
        ALTER TABLE quotes.real_time
        SET (timescaledb.enable_columnstore, timescaledb.segmentby = 'symbol',
             timescaledb.orderby = 'timestamp DESC, nanos DESC'{sparse})""")
    op.execute(f"CALL add_columnstore_policy('quotes.real_time', after => {_interval(settings.compress_after)})")
    if retention is not None:
        op.execute(f"SELECT add_retention_policy('quotes.real_time', drop_after => {_interval(retention)})")


def downgrade() -> None:
    if context.config.attributes["capability"].level < Level.COMMUNITY:
        return
    op.execute("SELECT remove_retention_policy('quotes.real_time', if_exists => true)")
    op.execute("CALL remove_columnstore_policy('quotes.real_time', if_exists => true)")
    for name, *_ in REFRESH:
        op.execute(f"SELECT remove_continuous_aggregate_policy('quotes.{name}', if_exists => true)")
