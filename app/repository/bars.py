"""OHLC bars: what a bar is made of, and the statement that makes the bars of a range.

Invariant: bars are exact. They are read from rollups only where those are up to date, and equal intervals always give
equal bars, whatever the range asked for.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final, Literal

from app.db.engine import Connection
from app.errors import InvalidRequest
from app.model import Interval
from app.repository import rollups
from app.repository.ranges import Arguments, Range, Span, of_span, per_symbol, zone

BarPrice = Literal["last", "bid", "ask", "mid"]
Fill = Literal["none", "null", "previous"]

_DAY_SECONDS: Final = 86_400
_MOST_FILLED: Final = 100_000
_LONG_DAY: Final = timedelta(hours=3)  # more than any day is longer than 24 hours
_LATEST_END: Final = datetime(9900, 1, 1, tzinfo=UTC)  # leaves room in the calendar for the longest interval
BAR_COLUMNS: Final = "open, high, low, close, volume, turnover, count"


@dataclass(frozen=True, slots=True)
class BarSpec:
    """What bars to make: their interval, of which price, and in which IANA time zone days begin.

    In a zone, bars of days and more begin at local midnight and are as long as the days are: 23 or 25 hours when
    the clocks change. Shorter ones are counted in elapsed time from local midnight, so they must divide a day.

    With `fill` the gaps between a symbol's first bar of the range and the range's end, or now, get a bar whose
    count is 0: of nulls, or of the close before it.

    Raises:
        InvalidRequest: the zone is unknown, or the interval cannot be counted from its midnights.
    """

    interval: Interval
    price: BarPrice = "last"
    tz: str = "UTC"
    fill: Fill = "none"

    def __post_init__(self) -> None:
        zone(self.tz)
        seconds = self.interval.seconds
        if not self.in_utc and not self.of_days and _DAY_SECONDS % seconds:
            raise InvalidRequest("In a time zone, an interval below a day must divide a day.", parameter="tz")

    @property
    def in_utc(self) -> bool:
        """Whether days begin at midnight in UTC, as those of the rollups do."""
        return self.tz == "UTC"

    @property
    def of_days(self) -> bool:
        """Whether the bars are days, weeks or months."""
        return self.interval.seconds % _DAY_SECONDS == 0

    def source(self, start: datetime, end: datetime) -> str:
        """The coarsest rollup that the bars of a range can be made of."""
        source = self.interval.source
        if self.in_utc or source == rollups.RAW:
            return source
        # Weekly looks: an offset lasts longer than that, and only its value counts.
        local = zone(self.tz)
        moments = [start + timedelta(weeks=week) for week in range((end - start).days // 7 + 1)]
        offsets = [
            int((moment.astimezone(local).utcoffset() or timedelta()).total_seconds()) for moment in [*moments, end]
        ]
        if all(offset % 3600 == 0 for offset in offsets):
            return "ohlc_1h" if source == "ohlc_1d" else source
        return "ohlc_1m" if all(offset % 60 == 0 for offset in offsets) else rollups.RAW


@dataclass(frozen=True, slots=True)
class Bar:
    """One OHLC bar. `timestamp` is its start in UTC; `final` says that its end has passed."""

    symbol: str
    timestamp: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal | None
    vwap: Decimal | None
    count: int
    final: bool


@dataclass(frozen=True, slots=True)
class Sources:
    """What bars can be made of: of rollups, where there are any, and above `floor` of quotes."""

    rollups: bool
    floor: datetime | None


async def statement(connection: Connection, sources: Sources, wanted: Range, spec: BarSpec, argument: Arguments) -> str:
    """The statement for bars, read from the coarsest rollups that give them exactly.

    Raises:
        InvalidRequest: more bars would be filled than are at once.
    """
    value = {"last": "price", "bid": "bid", "ask": "ask", "mid": "round((bid + ask) / 2, 8)"}[spec.price]
    raw = (
        f"timestamp, {value} AS open, {value} AS high, {value} AS low, {value} AS close, volume,"
        f" {value} * volume AS turnover, 1 AS count"
    )
    found = await _stretches(connection, sources, wanted, spec)
    bucket, bucket_end = _buckets(spec, argument)
    filled = spec.fill != "none"
    if filled and (wanted.end - wanted.start) / spec.interval.width > _MOST_FILLED:
        raise InvalidRequest(f"At most {_MOST_FILLED} bars of a symbol are filled at once.", parameter="fill")

    def inner(span: Span | None) -> str:
        parts = []
        beyond = "" if span or filled else f" + {argument(spec.interval.width + _LONG_DAY)}::interval"
        for part in found:
            # A filled bar may take its price from before the page, so each page looks at the whole range.
            start = part.start if span is None or filled else max(part.start, span.start)
            if start >= part.end:
                continue
            is_raw = part.source == rollups.RAW
            symbol = "symbol = span.symbol" if span is None and filled else of_span(span, argument, beyond)
            parts.append(f"""
                SELECT {raw if is_raw else f"timestamp, {BAR_COLUMNS}"} FROM quotes.{part.source}
                WHERE {symbol} AND timestamp >= {argument(start)}::timestamptz
                  AND timestamp < {argument(part.end)}::timestamptz
                  {f"AND {value} IS NOT NULL" if is_raw else ""}""")
        # One ordered array gives both ends of a bar; the key's order makes its sort a no-op.
        bars = f"""
            SELECT bucket, opens[1] AS open, high, low, closes[cardinality(closes)] AS close,
                   volume, turnover, count
            FROM (SELECT {bucket} AS bucket,
                         array_agg(open ORDER BY timestamp) AS opens, max(high) AS high, min(low) AS low,
                         array_agg(close ORDER BY timestamp) AS closes, sum(volume) AS volume,
                         sum(turnover) AS turnover, sum(count)::bigint AS count
                  FROM ({" UNION ALL ".join(parts)}) source
                  GROUP BY bucket) grouped"""
        if filled:
            bars = _filled(bars, spec, wanted, argument)
        low, high = ("span.start", "span.stop") if span is None else (argument(span.start), argument(span.stop))
        return f"""
            SELECT bucket AS timestamp, {BAR_COLUMNS}, {bucket_end} <= now() AS final FROM ({bars}) bars
            WHERE bucket >= {low}::timestamptz AND bucket < {high}::timestamptz"""

    return per_symbol(wanted, inner, f"{BAR_COLUMNS}, final", argument)


async def _stretches(connection: Connection, sources: Sources, wanted: Range, spec: BarSpec) -> list[rollups.Stretch]:
    """What to read where. Without rollups the views of their names would compute all bars of a symbol."""
    end = min(wanted.end, _LATEST_END) + spec.interval.width + _LONG_DAY
    source = spec.source(wanted.start, end)
    if not sources.rollups or spec.price != "last" or source == rollups.RAW:
        return [rollups.Stretch(rollups.RAW, wanted.start, end)]
    return await rollups.stretches(connection, source, wanted.start, end, sources.floor)


def _buckets(spec: BarSpec, argument: Arguments) -> tuple[str, str]:
    """The start of the bar that a row's `timestamp` falls in, and the end of the bar that starts at `bucket`."""
    months = spec.interval.months
    if not months:
        width = f"{argument(timedelta(seconds=spec.interval.seconds))}::interval"
        if spec.in_utc:
            return f"date_bin({width}, timestamp, timestamptz '2000-01-03 00:00Z')", f"bucket + {width}"
    tz = f"{argument(spec.tz)}::text"
    local = f"(timestamp AT TIME ZONE {tz})"
    if not months:
        if not spec.of_days:
            return f"date_bin({width}, timestamp, date_trunc('day', timestamp, {tz}))", f"bucket + {width}"
        start = f"date_bin({width}, {local}, timestamp '2000-01-03')"
        return f"{start} AT TIME ZONE {tz}", f"(bucket AT TIME ZONE {tz} + {width}) AT TIME ZONE {tz}"
    ordinal = f"12 * (extract(year FROM {local}) - 2000) + extract(month FROM {local}) - 1"
    # `months` is a whole number of ours, so it may stand in the text.
    start = f"timestamp '2000-01-01' + make_interval(months => (floor(({ordinal}) / {months}) * {months})::int)"
    end = f"bucket AT TIME ZONE {tz} + make_interval(months => {months})"
    return f"({start}) AT TIME ZONE {tz}", f"({end}) AT TIME ZONE {tz}"


def _filled(bars: str, spec: BarSpec, wanted: Range, argument: Arguments) -> str:
    """The bars of a symbol with the gaps after its first one in the range filled."""
    start, end = f"{argument(wanted.start)}::timestamptz", f"least({argument(wanted.end)}::timestamptz, now())"
    in_utc = spec.in_utc and not spec.interval.months
    tz = "" if in_utc else f"{argument(spec.tz)}::text"
    width = argument(timedelta(seconds=spec.interval.seconds) if not spec.interval.months else timedelta(0))
    step = f"({width}::interval + make_interval(months => {spec.interval.months}))"
    tick = "interval '1 microsecond'"
    if in_utc:
        series = f"generate_series(first, {end} - {tick}, {step}) AS bucket"
    elif spec.of_days:
        local = f"generate_series(first AT TIME ZONE {tz}, ({end} - {tick}) AT TIME ZONE {tz}, {step}) AS local"
        series = f"{local} CROSS JOIN LATERAL (SELECT local AT TIME ZONE {tz} AS bucket) moment"
    else:
        days = f"generate_series(date_trunc('day', first AT TIME ZONE {tz}), {end} AT TIME ZONE {tz}, interval '1 day')"
        series = (
            f"{days} AS day CROSS JOIN LATERAL generate_series(day AT TIME ZONE {tz},"
            f" (day + interval '1 day') AT TIME ZONE {tz} - {tick}, {step}) AS bucket"
        )
    prices = "NULL::numeric"
    if spec.fill == "previous":
        prices = "first_value(close) OVER (PARTITION BY run ORDER BY bucket)"
    return f"""
        SELECT bucket, coalesce(open, {prices}) AS open, coalesce(high, {prices}) AS high,
               coalesce(low, {prices}) AS low, coalesce(close, {prices}) AS close, volume, turnover,
               coalesce(count, 0) AS count
        FROM (WITH bars AS ({bars})
              SELECT bucket, open, high, low, close, volume, turnover, count,
                     count(close) OVER (ORDER BY bucket) AS run
              FROM (SELECT min(bucket) AS first FROM bars WHERE bucket >= {start}) begin
              CROSS JOIN LATERAL (SELECT bucket FROM {series} WHERE bucket >= first AND bucket < {end}) slots
              LEFT JOIN bars USING (bucket)) runs"""
