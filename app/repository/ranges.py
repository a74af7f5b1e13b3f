"""Ranges of rows by symbol and time: what is asked for, one page at a time, and the statement around it.

Invariant: a statement carries its range as constants, so that it locks the chunks of that range only, and pages
joined are the whole, because a page begins right after the key where the last one ended.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.db.engine import Connection
from app.errors import InvalidRequest
from app.model import TICK, normal_symbol, rfc3339

Sort = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the key of its last row, and under `limit_per_symbol` how many of its symbol were given."""

    symbol: str
    timestamp: datetime
    given: int


@dataclass(frozen=True, slots=True)
class Range:
    """A range of quotes or bars: `start` inclusive, `end` exclusive, both aware; rows by symbol, then by time."""

    symbols: Sequence[str]
    start: datetime
    end: datetime
    limit: int = 1000
    sort: Sort = "asc"
    limit_per_symbol: int | None = None
    after: Position | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Rows as the text of JSON objects joined by commas, and the position of the last one if more follow."""

    rows: str
    count: int
    next: Position | None


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a range that is still wanted of one symbol, and how many rows at most."""

    symbol: str
    start: datetime
    stop: datetime
    rows: int


@dataclass(slots=True)
class Arguments:
    """Collects the arguments of a statement and hands out their placeholders."""

    values: list[Any] = field(default_factory=list)

    def __call__(self, value: object) -> str:
        """The placeholder of a further argument."""
        self.values.append(value)
        return f"${len(self.values)}"


async def page(connection: Connection, relation: str, row: str, wanted: Range, argument: Arguments) -> Page:
    """A page of a relation of rows, each as the text of a JSON object."""
    # The position is read from the last row's own text: a window function for it doubled the query's time.
    rows: list[str] = await connection.fetchval(
        f"SELECT coalesce(array_agg({row}), '{{}}') FROM ({relation}) found", *argument.values
    )
    if len(rows) <= wanted.limit:
        return Page(",".join(rows), len(rows), None)
    del rows[wanted.limit :]
    last = json.loads(rows[-1])
    symbol, timestamp = last["symbol"], datetime.fromisoformat(last["timestamp"])
    of_symbol = 0
    if wanted.limit_per_symbol is not None:
        opening = f'{{"symbol":"{symbol}",'
        of_symbol = sum(text.startswith(opening) for text in rows)
        if wanted.after is not None and wanted.after.symbol == symbol:
            of_symbol += wanted.after.given
    return Page(",".join(rows), len(rows), Position(symbol, timestamp, of_symbol))


def per_symbol(wanted: Range, inner: Callable[[Span | None], str], columns: str, argument: Arguments) -> str:
    """Run `inner` for each symbol on its part of the range and stop after one row more than the limit."""
    wanted_spans = spans(wanted)
    most = argument(wanted.limit + 1)
    if len(wanted_spans) == 1:
        # One symbol is in order as it comes, and its values are constants to the planner.
        (span,) = wanted_spans
        return f"""
            SELECT {argument(span.symbol)}::text AS symbol, row.*
            FROM (SELECT timestamp, {columns} FROM ({inner(span)}) part
                  ORDER BY timestamp {wanted.sort} LIMIT {argument(span.rows)}) row
            LIMIT {most}"""
    symbols = argument([span.symbol for span in wanted_spans])
    starts, stops = argument([span.start for span in wanted_spans]), argument([span.stop for span in wanted_spans])
    return f"""
        SELECT span.symbol, row.timestamp, {columns}
        FROM (SELECT * FROM unnest({symbols}::text[], {starts}::timestamptz[], {stops}::timestamptz[],
                                   {argument([span.rows for span in wanted_spans])}::int[])
                            AS given (symbol, start, stop, rows)
              ORDER BY symbol COLLATE "C") span
        CROSS JOIN LATERAL (SELECT * FROM ({inner(None)}) part ORDER BY timestamp {wanted.sort} LIMIT span.rows) row
        ORDER BY span.symbol COLLATE "C", row.timestamp {wanted.sort}
        LIMIT {most}"""


def of_span(span: Span | None, argument: Arguments, beyond: str = "") -> str:
    """The condition that a row is of the span, or without one of the row `span` of the statement.

    The bounds of a row of spans are compared together with the symbol. Beside the constant bounds of the range,
    bounds on the time alone would be counted twice by the planner, which then takes the range for a few rows.
    """
    if span is not None:
        return f"symbol = {argument(span.symbol)}"
    return (
        "symbol = span.symbol AND (symbol, timestamp) >= (span.symbol, span.start)"
        f" AND (symbol, timestamp) < (span.symbol, span.stop{beyond})"
    )


def spans(wanted: Range) -> list[Span]:
    """What is still wanted of each symbol, by symbol: all of it, or what lies after the last page's position.

    Past symbols are gone; the current one goes on a microsecond, the resolution of a timestamp, after its last row.
    """
    most = wanted.limit + 1
    rows = min(wanted.limit_per_symbol or most, most)
    after = wanted.after
    if after is None:
        return [Span(symbol, wanted.start, wanted.end, rows) for symbol in sorted(set(wanted.symbols))]
    left = rows if wanted.limit_per_symbol is None else min(wanted.limit_per_symbol - after.given, most)
    if wanted.sort == "asc":
        current = Span(after.symbol, after.timestamp + TICK, wanted.end, left)
    else:
        current = Span(after.symbol, wanted.start, after.timestamp, left)
    later = sorted({symbol for symbol in wanted.symbols if symbol > after.symbol})
    return [current, *(Span(symbol, wanted.start, wanted.end, rows) for symbol in later)]


def checked_range(symbols: str | Sequence[str], start: datetime, end: datetime, limit: int, sort: Sort) -> Range:
    """A range whose parts have a meaning.

    Raises:
        InvalidRequest: a symbol cannot exist, a time is naive, the range is reversed, or the limit is below 1.
    """
    if limit < 1:
        raise InvalidRequest("A limit is at least 1.", parameter="limit")
    if aware(start) >= aware(end):
        raise InvalidRequest(f"The range is empty: {rfc3339(start)} is not before {rfc3339(end)}.", parameter="start")
    return Range(normal_symbols(symbols), start, end, limit, sort)


def normal_symbols(symbols: str | Sequence[str]) -> list[str]:
    """The stored form of one symbol or several.

    Raises:
        InvalidRequest: one cannot be the name of a stored symbol.
    """
    return [normal_symbol(symbol) for symbol in ([symbols] if isinstance(symbols, str) else symbols)]


def aware(moment: datetime) -> datetime:
    """The moment, if it carries an offset.

    Raises:
        InvalidRequest: it is naive.
    """
    if moment.tzinfo is None:
        raise InvalidRequest("A time carries an offset; a naive one has no place on the time line.")
    return moment


def zone(name: str) -> ZoneInfo:
    """A time zone by its IANA name.

    Raises:
        InvalidRequest: there is none of that name.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidRequest("A time zone is an IANA name, as in America/New_York.", parameter="tz") from error


def day_bounds(day: date, tz: str) -> tuple[datetime, datetime]:
    """First instant of a calendar day of the zone, and of the next one, in UTC.

    Raises:
        InvalidRequest: the zone is unknown, or the day is the last one there is.
    """
    local = zone(tz)
    try:
        following = day + timedelta(days=1)
        bounds = (datetime.combine(day, time(), local), datetime.combine(following, time(), local))
        return bounds[0].astimezone(UTC), bounds[1].astimezone(UTC)
    except OverflowError as error:
        raise InvalidRequest("The day lies outside of the calendar.", parameter="date") from error
