"""OHLC bars: what a bar is made of, and the statement that makes the bars of a range.

Invariant: bars are exact. They are read from rollups only where those are up to date, and equal intervals always give
equal bars, whatever the range asked for. A bar is made of the quotes that have its price, so bars of `last` know
nothing of quotes without a trade.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Final, Literal

from app.clock import FIRST, LAST, Interval, ceil
from app.db.engine import Connection
from app.errors import InvalidRequest
from app.quote.terms import check_choice
from app.repository import rollups
from app.repository.ranges import Arguments, Range, Span, per_symbol, zone

BarPrice = Literal["last", "bid", "ask", "mid"]
Fill = Literal["none", "null", "previous"]

_DAY_SECONDS: Final = 86_400
_MOST_FILLED: Final = 100_000
_LONG_DAY: Final = timedelta(hours=3)  # more than any day is longer than 24 hours
_WEEK: Final = timedelta(weeks=1)
_IN_HOURS, _IN_MINUTES, _IN_SECONDS = range(3)
_LATEST_END: Final = datetime(9900, 1, 1, tzinfo=UTC)  # leaves room in the calendar for the longest interval
BAR_COLUMNS: Final = "open, high, low, close, volume, turnover, count"
#: What bars of each price are made of, of a quote; where it is null the quote is none of theirs.
VALUES: Final[Mapping[BarPrice, str]] = MappingProxyType(
    {"last": "price", "bid": "bid", "ask": "ask", "mid": "(bid + ask) * 0.5"}
)
#: The prices of which rollups hold bars, with what the names of their columns begin with.
ROLLED_UP: Final[Mapping[BarPrice, str]] = MappingProxyType({"last": "", "mid": "mid_"})


@dataclass(frozen=True, slots=True)
class BarSpec:
    """What bars to make: their interval, of which price, and in which IANA time zone days begin.

    In a zone, bars of days and more begin at local midnight and are as long as the days are: 23 or 25 hours when
    the clocks change. Shorter ones are counted in elapsed time from local midnight, so they must divide a day.

    With `fill` the gaps between a symbol's first bar of the range and the range's end, or now, get a bar whose
    count is 0: of nulls, or of the close before it.

    Raises:
        InvalidRequest: the zone is unknown, the interval is none or cannot be counted from its midnights, or one of the
            words is none that is taken.
    """

    interval: Interval
    price: BarPrice = "last"
    tz: str = "UTC"
    fill: Fill = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.interval, Interval):
            raise InvalidRequest("An interval is a text such as 15m, 1h or 3M, or an Interval.", parameter="interval")
        check_choice(self.price, BarPrice, "price")
        check_choice(self.fill, Fill, "fill")
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
        first, last = ((max(bound, FIRST) - FIRST) // _WEEK for bound in (start, end))
        offsets = _offsets(self.tz)[first : last + 2]
        if _IN_SECONDS in offsets:
            return rollups.RAW
        if _IN_MINUTES in offsets:
            return "ohlc_1m"
        return "ohlc_1h" if source == "ohlc_1d" else source


@lru_cache(maxsize=64)
def _offsets(tz: str) -> bytes:
    """Whether a zone's offset is of whole hours, minutes or seconds, in each week of which something can be stored.

    An offset lasts longer than a week. These are 30,000 looks, which take 10 ms.
    """
    moment = FIRST.astimezone(zone(tz))
    found = bytearray()
    kind, before = _IN_HOURS, timedelta(0)
    for _ in range((LAST - FIRST) // _WEEK + 1):
        offset = moment.utcoffset() or before
        if offset is not before:
            kind = _IN_SECONDS if offset.seconds % 60 else _IN_MINUTES if offset.seconds % 3600 else _IN_HOURS
            before = offset
        found.append(kind)
        moment += _WEEK
    return bytes(found)


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


Reason = Literal["unknown", "no-trades", "no-quotes", "nothing-in-range"]


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
    value = VALUES[spec.price]
    of_quotes = (
        f"timestamp, nanos, {value} AS open, {value} AS high, {value} AS low, {value} AS close, volume,"
        f" {value} * volume AS turnover, 1 AS count"
    )
    prefix = ROLLED_UP.get(spec.price, "")
    of_bars = "timestamp, 0 AS nanos, " + ", ".join(f"{prefix}{name} AS {name}" for name in BAR_COLUMNS.split(", "))
    first, end = ceil(wanted.start), ceil(wanted.end)
    filled = spec.fill != "none"
    if filled and (end - first) / spec.interval.width > _MOST_FILLED:
        raise InvalidRequest(f"At most {_MOST_FILLED} bars of a symbol are filled at once.", parameter="fill")
    found = await _stretches(connection, sources, first, end, spec)
    bucket, bucket_end = _buckets(spec, argument)

    def inner(span: Span | None) -> str:
        parts = []
        beyond = ""
        for part in found:
            # A filled bar may take its price from before the page, so each page looks at the whole range.
            start = part.start if span is None or filled else max(part.start, ceil(span.start))
            if start >= part.end:
                continue
            is_raw = part.source == rollups.RAW
            if span is not None:
                symbol = f"symbol = {argument(span.symbol)}"
            elif filled:
                symbol = "symbol = span.symbol"
            else:
                beyond = beyond or f" + {argument(spec.interval.width + _LONG_DAY)}::interval"
                symbol = f"{_OF_SPAN}{beyond})"
            parts.append(f"""
                SELECT {of_quotes if is_raw else of_bars} FROM quotes.{part.source}
                WHERE {symbol} AND timestamp >= {argument(start)}::timestamptz
                  AND timestamp < {argument(part.end)}::timestamptz
                  {f"AND {value} IS NOT NULL" if is_raw else ""}""")
        if not parts:  # the range begins where the calendar has no room for a bar
            parts.append(f"SELECT {of_quotes} FROM quotes.real_time WHERE false")
        # One ordered array gives both ends of a bar; the key's order makes its sort a no-op. Rows of a rollup without
        # the price are passed over here: a condition on them would be planned into the query of each rollup, 0.5 ms.
        bars = f"""
            SELECT bucket, opens[1] AS open, high, low, closes[cardinality(closes)] AS close,
                   volume, turnover, count
            FROM (SELECT {bucket} AS bucket,
                         array_agg(open ORDER BY timestamp, nanos) FILTER (WHERE open IS NOT NULL) AS opens,
                         max(high) AS high, min(low) AS low,
                         array_agg(close ORDER BY timestamp, nanos) FILTER (WHERE close IS NOT NULL) AS closes,
                         sum(volume) AS volume,
                         sum(turnover) AS turnover, sum(count)::bigint AS count
                  FROM ({" UNION ALL ".join(parts)}) source
                  GROUP BY bucket HAVING sum(count) > 0) grouped"""
        if filled:
            bars = _filled(bars, spec, first, end, argument)
        low, high = "span.start", "span.stop"
        if span is not None:
            low, high = argument(ceil(span.start)), argument(ceil(span.stop))
        return f"""
            SELECT bucket AS timestamp, {BAR_COLUMNS}, {bucket_end} <= now() AS final FROM ({bars}) bars
            WHERE bucket >= {low}::timestamptz AND bucket < {high}::timestamptz"""

    return per_symbol(wanted, inner, f"{BAR_COLUMNS}, final", argument, of_bars=True)


_OF_SPAN: Final = (
    # Beside the constant bounds of the range, bounds on the time alone would be counted twice by the planner, which
    # then takes the range for a few rows; so those of the span are compared together with the symbol.
    "symbol = span.symbol AND (symbol, timestamp) >= (span.symbol, span.start)"
    " AND (symbol, timestamp) < (span.symbol, span.stop"
)
_REASONS: Final = """
SELECT given.symbol, EXISTS (SELECT FROM quotes.latest held WHERE held.symbol = given.symbol),
       EXISTS (SELECT FROM quotes.real_time stored WHERE stored.symbol = given.symbol COLLATE "C"
               AND stored.timestamp >= $2 AND stored.timestamp < $3){}
FROM unnest($1::text[]) AS given (symbol)
"""
#: A minute of which there were quotes has a row, whatever they were.
_DROPPED: Final = """
    OR EXISTS (SELECT FROM quotes.ohlc_1m kept WHERE kept.symbol = given.symbol COLLATE "C"
               AND kept.timestamp >= $2 AND kept.timestamp < $4)
"""


async def reasons(
    connection: Connection, sources: Sources, symbols: Sequence[str], wanted: Range, spec: BarSpec
) -> list[tuple[str, Reason]]:
    """Why there are no bars of these symbols that start in the range."""
    if not symbols:
        return []
    # The bars that start in the range are of the quotes from the first start in it to the first one after it.
    argument = Arguments()
    bounds = argument([min(max(ceil(bound), FIRST), LAST) for bound in (wanted.start, wanted.end)])
    bucket, bucket_end = _buckets(spec, argument)
    rows = await connection.fetch(
        f"""
        SELECT CASE WHEN bucket < timestamp THEN {bucket_end} ELSE bucket END
        FROM (SELECT n, timestamp, {bucket} AS bucket
              FROM unnest({bounds}::timestamptz[]) WITH ORDINALITY AS given (timestamp, n)) bounds
        ORDER BY n""",
        *argument.values,
    )
    first, end = (row[0] for row in rows)
    statement, values = _REASONS.format(""), [list(symbols), first, end]
    if sources.rollups and sources.floor is not None and first < sources.floor:
        statement, values = _REASONS.format(_DROPPED), [*values, min(end, sources.floor)]
    found = await connection.fetch(statement, *values)
    without: Reason = "no-trades" if spec.price == "last" else "no-quotes"
    return [
        (symbol, without if present else "nothing-in-range" if known else "unknown") for symbol, known, present in found
    ]


async def _stretches(
    connection: Connection, sources: Sources, start: datetime, end: datetime, spec: BarSpec
) -> list[rollups.Stretch]:
    """What to read where. Without rollups the views of their names would compute all bars of a symbol."""
    end = min(end, _LATEST_END) + spec.interval.width + _LONG_DAY
    source = spec.source(start, end)
    if not sources.rollups or spec.price not in ROLLED_UP or source == rollups.RAW:
        return [rollups.Stretch(rollups.RAW, start, end)]
    return await rollups.stretches(connection, source, start, end, sources.floor)


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
    count = f"{argument(months)}::int"
    start = f"timestamp '2000-01-01' + make_interval(months => (floor(({ordinal}) / {count}) * {count})::int)"
    end = f"bucket AT TIME ZONE {tz} + make_interval(months => {count})"
    return f"({start}) AT TIME ZONE {tz}", f"({end}) AT TIME ZONE {tz}"


def _filled(bars: str, spec: BarSpec, begin: datetime, stop: datetime, argument: Arguments) -> str:
    """The bars of a symbol with the gaps after its first one in the range filled."""
    start, end = f"{argument(begin)}::timestamptz", f"least({argument(stop)}::timestamptz, now())"
    in_utc = spec.in_utc and not spec.interval.months
    tz = "" if in_utc else f"{argument(spec.tz)}::text"
    width = argument(timedelta(seconds=spec.interval.seconds) if not spec.interval.months else timedelta(0))
    step = f"({width}::interval + make_interval(months => {argument(spec.interval.months)}::int))"
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
