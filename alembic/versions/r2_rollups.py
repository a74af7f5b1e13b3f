"""Bars of a minute, an hour and a day, and the daily summary.

Continuous aggregates, each on the one below, where the server has them; views of the same columns elsewhere. Each has
bars of the last price, made of the quotes that have one, and bars of the mid, made of those with both sides.
`turnover` is the sum of price x volume, from which the volume-weighted average price is turnover / volume.
"""

from alembic import context, op

from app.db.capability import Level

revision = "r2"
down_revision = "r1"
branch_labels = None
depends_on = None

LEVELS = (("ohlc_1m", "1 minute", "real_time"), ("ohlc_1h", "1 hour", "ohlc_1m"), ("ohlc_1d", "1 day", "ohlc_1h"))
#: What bars are made of, what the names of their columns begin with, and which quotes have it.
BARS = (("price", "", "price IS NOT NULL"), ("(bid + ask) * 0.5", "mid_", "bid IS NOT NULL AND ask IS NOT NULL"))
PRICES = {"open": "First", "high": "Highest", "low": "Lowest", "close": "Last"}
COMMENTS = {
    "symbol": "As in quotes.real_time",
    "timestamp": "Start of the bar",
    **{name: f"{which} price of a trade; null where there was none" for name, which in PRICES.items()},
    "volume": "Sum of volumes of the trades",
    "turnover": "Sum of price x volume of the trades",
    "count": "Trades in the bar",
    **{f"mid_{name}": f"{which} mid, (bid + ask) / 2, of the quotes with both sides" for name, which in PRICES.items()},
    "mid_volume": "Sum of volumes of the quotes with both sides",
    "mid_turnover": "Sum of mid x volume of the quotes with both sides",
    "mid_count": "Quotes with both sides in the bar",
}
SUMMARY_COMMENTS = {
    "symbol": "As in quotes.real_time",
    "timestamp": "Midnight in UTC that the day begins with",
    **{name: f"{which} price of a trade" for name, which in PRICES.items()},
    "volume": "Sum of volumes of the trades; null where none has one",
    "vwap": "Sum of price x volume / sum of volume; null without volume",
    "count": "Trades of the day",
    "range": "high - low",
    "change": "close - open",
    "change_percent": "100 x change / open, four decimals; null where the open is 0 or below",
}

# Nanoseconds since 1970. Immutable, unlike extract() of a timestamptz, and put into the plan rather than called.
NANOSECONDS = """
CREATE FUNCTION quotes.nanoseconds(moment timestamptz, nanos smallint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT _timescaledb_functions.to_unix_microseconds($1) * 1000 + $2 $$
"""


def _of_quotes(value: str, prefix: str, given: str) -> str:
    when, at = f"FILTER (WHERE {given})", "quotes.nanoseconds(timestamp, nanos)"
    return f"""
        first({value}, {at}) {when} AS {prefix}open, max({value}) AS {prefix}high, min({value}) AS {prefix}low,
        last({value}, {at}) {when} AS {prefix}close, sum(volume) {when} AS {prefix}volume,
        sum({value} * volume) AS {prefix}turnover, count(*) {when} AS {prefix}count"""


def _of_bars(prefix: str) -> str:
    when = f"FILTER (WHERE {prefix}count > 0)"
    return f"""
        first({prefix}open, timestamp) {when} AS {prefix}open, max({prefix}high) AS {prefix}high,
        min({prefix}low) AS {prefix}low, last({prefix}close, timestamp) {when} AS {prefix}close,
        sum({prefix}volume) AS {prefix}volume, sum({prefix}turnover) AS {prefix}turnover,
        sum({prefix}count) AS {prefix}count"""


def _in_arrays(value: str, prefix: str, given: str) -> str:
    """One ordered array gives both ends; with the key's order it needs no sort of its own."""
    when = f"FILTER (WHERE {given})"
    return f"""
        array_agg({value} ORDER BY timestamp, nanos) {when} AS {prefix}prices, max({value}) AS {prefix}high,
        min({value}) AS {prefix}low, sum(volume) {when} AS {prefix}volume, sum({value} * volume) AS {prefix}turnover,
        count(*) {when} AS {prefix}count"""


def _ends(prefix: str) -> str:
    return f"""
        {prefix}prices[1] AS {prefix}open, {prefix}high, {prefix}low,
        {prefix}prices[cardinality({prefix}prices)] AS {prefix}close, {prefix}volume, {prefix}turnover, {prefix}count"""


def upgrade() -> None:
    community = context.config.attributes["capability"].level >= Level.COMMUNITY
    if community:
        op.execute(NANOSECONDS)
        op.execute("COMMENT ON FUNCTION quotes.nanoseconds IS 'Nanoseconds since 1970 of a quote'")
    for name, width, source in LEVELS:
        if community:
            columns = [_of_quotes(*bars) if source == "real_time" else _of_bars(bars[1]) for bars in BARS]
            # Real-time: buckets past the watermark are computed from what lies below, so no quote is invisible.
            op.execute(f"""
                CREATE MATERIALIZED VIEW quotes.{name}
                WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
                SELECT symbol, time_bucket(interval '{width}', timestamp) AS timestamp, {", ".join(columns)}
                FROM quotes.{source}
                GROUP BY symbol, time_bucket(interval '{width}', timestamp)
                WITH NO DATA""")
        else:
            bucket = f"date_bin(interval '{width}', timestamp, timestamptz '2000-01-03 00:00Z')"
            op.execute(f"""
                CREATE VIEW quotes.{name} AS
                SELECT symbol, timestamp, {", ".join(_ends(prefix) for _, prefix, _ in BARS)}
                FROM (SELECT symbol, {bucket} AS timestamp, {", ".join(_in_arrays(*bars) for bars in BARS)}
                      FROM quotes.real_time GROUP BY symbol, {bucket}) bars""")
        op.execute(f"COMMENT ON VIEW quotes.{name} IS 'Bars of {width}, of trades and of mids'")
        for column, meaning in COMMENTS.items():
            op.execute(f"COMMENT ON COLUMN quotes.{name}.{column} IS '{meaning}'")
    op.execute("""
        CREATE VIEW quotes.daily_summary AS
        SELECT symbol, timestamp, open, high, low, close, volume,
               round(turnover / nullif(volume, 0), 16) AS vwap, count, high - low AS range, close - open AS change,
               CASE WHEN open > 0 THEN round(100 * (close - open) / open, 4) END AS change_percent
        FROM quotes.ohlc_1d WHERE count > 0""")
    op.execute("COMMENT ON VIEW quotes.daily_summary IS 'One line for a symbol and UTC day with trades'")
    for column, meaning in SUMMARY_COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN quotes.daily_summary.{column} IS '{meaning}'")


def downgrade() -> None:
    community = context.config.attributes["capability"].level >= Level.COMMUNITY
    op.execute("DROP VIEW quotes.daily_summary")
    for name, _, _ in reversed(LEVELS):
        op.execute(f"DROP {'MATERIALIZED ' if community else ''}VIEW quotes.{name}")
    if community:
        op.execute("DROP FUNCTION quotes.nanoseconds")
