"""Bars of a minute, an hour and a day, and the daily summary.

Continuous aggregates, each on the one below, where the server has them; views of the same columns elsewhere.
`turnover` is the sum of price x volume, from which the volume-weighted average price is turnover / volume.
"""

from alembic import context, op

from app.db.capability import Level

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

LEVELS = (("ohlc_1m", "1 minute", "real_time"), ("ohlc_1h", "1 hour", "ohlc_1m"), ("ohlc_1d", "1 day", "ohlc_1h"))

FROM_QUOTES = """
    first(price, timestamp) AS open, max(price) AS high, min(price) AS low, last(price, timestamp) AS close,
    sum(volume) AS volume, sum(price * volume) AS turnover, count(*) AS count"""
FROM_BARS = """
    first(open, timestamp) AS open, max(high) AS high, min(low) AS low, last(close, timestamp) AS close,
    sum(volume) AS volume, sum(turnover) AS turnover, sum(count) AS count"""


def upgrade() -> None:
    community = context.config.attributes["capability"].level >= Level.COMMUNITY
    for name, width, source in LEVELS:
        if community:
            columns = FROM_QUOTES if source == "real_time" else FROM_BARS
            # Real-time: buckets past the watermark are computed from what lies below, so no quote is invisible.
            op.execute(f"""
                CREATE MATERIALIZED VIEW quotes.{name}
                WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
                SELECT symbol, time_bucket(interval '{width}', timestamp) AS timestamp, {columns}
                FROM quotes.{source}
                GROUP BY symbol, time_bucket(interval '{width}', timestamp)
                WITH NO DATA""")
        else:
            # One ordered array gives both ends; with the key's order it needs no sort of its own.
            op.execute(f"""
                CREATE VIEW quotes.{name} AS
                SELECT symbol, timestamp, prices[1] AS open, high, low, prices[cardinality(prices)] AS close,
                       volume, turnover, count
                FROM (SELECT symbol,
                             date_bin(interval '{width}', timestamp, timestamptz '2000-01-03 00:00Z') AS timestamp,
                             array_agg(price ORDER BY timestamp) AS prices, max(price) AS high, min(price) AS low,
                             sum(volume) AS volume, sum(price * volume) AS turnover, count(*) AS count
                      FROM quotes.real_time
                      GROUP BY symbol,
                               date_bin(interval '{width}', timestamp, timestamptz '2000-01-03 00:00Z')) bars""")
    op.execute("""
        CREATE VIEW quotes.daily_summary AS
        SELECT symbol, timestamp, open, high, low, close, volume, round(turnover / nullif(volume, 0), 8) AS vwap, count,
               high - low AS range, close - open AS change, round(100 * (close - open) / open, 4) AS change_percent
        FROM quotes.ohlc_1d""")


def downgrade() -> None:
    community = context.config.attributes["capability"].level >= Level.COMMUNITY
    op.execute("DROP VIEW quotes.daily_summary")
    for name, _, _ in reversed(LEVELS):
        op.execute(f"DROP {'MATERIALIZED ' if community else ''}VIEW quotes.{name}")
