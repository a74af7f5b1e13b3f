"""Ranges of rows by symbol and instant: what is asked for, one page at a time, and the statement around it.

Invariant: a statement carries its range as constants, so that it locks the chunks of that range only, and pages
joined are the whole, because a page begins at the nanosecond after the key where the last one ended.
"""

import bisect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from operator import index
from types import MappingProxyType
from typing import Any, Final, Literal

from app.clock import Instant, floor, nanoseconds, parse, rfc3339
from app.db.engine import Connection
from app.errors import InvalidRequest
from app.quote.fields import NANOS
from app.quote.rules import normal_symbol
from app.quote.terms import check_choice

Sort = Literal["asc", "desc"]
#: In a statement stands the word from here, never the one that was given.
#: Of named symbols the times of their first and last quotes.
ENDS: Final = "SELECT symbol, first_timestamp, timestamp FROM quotes.latest WHERE symbol = ANY($1::text[])"
ORDER: Final[Mapping[str, str]] = MappingProxyType({"asc": "ASC", "desc": "DESC"})
#: One more, as is asked for to see whether there are more, still fits into an integer of SQL.
_MOST_ROWS: Final = 2**31 - 2


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the key of its last row, and under `limit_per_symbol` how many of its symbol were given."""

    symbol: str
    instant: int
    given: int


@dataclass(frozen=True, slots=True)
class Range:
    """A range of quotes or bars, [`start`, `end`) in nanoseconds since 1970; rows by symbol, then by time.

    Raises:
        InvalidRequest: `sort` is no such word, a limit no number of rows, or an end of the range no whole number.
    """

    symbols: Sequence[str]
    start: int
    end: int
    limit: int = 1000
    sort: Sort = "asc"
    limit_per_symbol: int | None = None
    after: Position | None = None

    def __post_init__(self) -> None:
        check_choice(self.sort, Sort, "sort")
        checked_limit(self.limit)
        for name in ("start", "end"):
            if type(getattr(self, name)) is not int:
                raise InvalidRequest(f"{name} is a whole number of nanoseconds since 1970.", parameter=name)
        given = self.symbols
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
            raise InvalidRequest("symbols is a sequence of texts.", parameter="symbols")
        if self.limit_per_symbol is not None:
            checked_limit(self.limit_per_symbol, "limit_per_symbol")


@dataclass(frozen=True, slots=True)
class Page:
    """Rows as the texts of JSON objects, and the position of the last one if more follow."""

    rows: list[str]
    next: Position | None

    def reversed_in_time(self) -> "Page":
        """The rows of each symbol the other way round."""
        by_symbol = groupby(self.rows, symbol_of)
        return Page([row for _, rows in by_symbol for row in reversed(list(rows))], self.next)

    def without_rows(self, wanted: Range) -> list[str]:
        """The symbols that this page and those before it are done with, and of which this page might have had rows."""
        after = wanted.after.symbol if wanted.after is not None else ""
        given = [symbol for symbol in sorted(set(wanted.symbols)) if symbol > after]
        if self.next is not None:
            given = [symbol for symbol in given if symbol <= self.next.symbol]
        found = []
        for symbol in given:
            place = bisect.bisect_left(self.rows, symbol, key=symbol_of)
            if place == len(self.rows) or symbol_of(self.rows[place]) != symbol:
                found.append(symbol)
        return found


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a range that is still wanted of one symbol, and how many rows at most."""

    symbol: str
    start: int
    stop: int
    rows: int


@dataclass(slots=True)
class Arguments:
    """Collects the arguments of a statement and hands out their placeholders."""

    values: list[Any] = field(default_factory=list)

    def __call__(self, value: object) -> str:
        """The placeholder of a further argument."""
        self.values.append(value)
        return f"${len(self.values)}"


_OPENING = '{"symbol":"'


def symbol_of(row: str) -> str:
    """The symbol of a row as the text of a JSON object, which begins with it."""
    return row[len(_OPENING) : row.index('"', len(_OPENING))]


async def page(connection: Connection, relation: str, row: str, wanted: Range, argument: Arguments) -> Page:
    """A page of a relation of rows, each as the text of a JSON object."""
    return page_of(await row_texts(connection, relation, row, argument), wanted)


async def row_texts(connection: Connection, relation: str, row: str, argument: Arguments) -> list[str]:
    """The rows of a relation, each as the text of a JSON object."""
    # The position is read from the last row's own text: a window function for it doubled the query's time.
    rows: list[str] = await connection.fetchval(
        f"SELECT coalesce(array_agg({row}), '{{}}') FROM ({relation}) found", *argument.values
    )
    return rows


def page_of(rows: list[str], wanted: Range) -> Page:
    """A page of rows, of which there is one more than the limit if more follow."""
    if len(rows) <= wanted.limit:
        return Page(rows, None)
    del rows[wanted.limit :]
    last = json.loads(rows[-1])
    symbol = last["symbol"]
    of_symbol = 0
    if wanted.limit_per_symbol is not None:
        opening = f'{_OPENING}{symbol}",'
        of_symbol = sum(text.startswith(opening) for text in rows)
        if wanted.after is not None and wanted.after.symbol == symbol:
            of_symbol += wanted.after.given
    return Page(rows, Position(symbol, parse(last["timestamp"]), of_symbol))


def per_symbol(wanted: Range, inner: Callable[[Span | None], str], columns: str, argument: Arguments) -> str:
    """Run `inner` for each symbol on its part of the range and stop after one row more than the limit.

    Rows come in the order of their microsecond and the nanoseconds after it.
    """
    wanted_spans = spans(wanted)
    most = argument(wanted.limit + 1)
    order = ("timestamp", NANOS)
    direction = ORDER[wanted.sort]
    by = ", ".join(f"{column} {direction}" for column in order)
    if len(wanted_spans) == 1:
        # One symbol is in order as it comes, and its values are constants to the planner.
        (span,) = wanted_spans
        return f"""
            SELECT {argument(span.symbol)}::text AS symbol, row.*
            FROM (SELECT {", ".join(order)}, {columns} FROM ({inner(span)}) part
                  ORDER BY {by} LIMIT {argument(span.rows)}) row
            LIMIT {most}"""
    bounds = ", ".join(
        f"{argument(values)}::{kind}[]"
        for values, kind in (
            ([span.symbol for span in wanted_spans], "text"),
            ([floor(span.start) for span in wanted_spans], "timestamptz"),
            ([span.start % 1000 for span in wanted_spans], "smallint"),
            ([floor(span.stop) for span in wanted_spans], "timestamptz"),
            ([span.stop % 1000 for span in wanted_spans], "smallint"),
            ([span.rows for span in wanted_spans], "int"),
        )
    )
    return f"""
        SELECT span.symbol, {", ".join(f"row.{column}" for column in order)}, {columns}
        FROM (SELECT * FROM unnest({bounds}) AS given (symbol, start, start_nanos, stop, stop_nanos, rows)
              ORDER BY symbol COLLATE "C") span
        CROSS JOIN LATERAL (SELECT * FROM ({inner(None)}) part ORDER BY {by} LIMIT span.rows) row
        ORDER BY span.symbol COLLATE "C", {", ".join(f"row.{column} {direction}" for column in order)}
        LIMIT {most}"""


def within(start: int, stop: int, argument: Arguments) -> str:
    """The condition that a quote lies in [`start`, `stop`), both nanoseconds since 1970.

    A bound between two microseconds is one on the microsecond, for the choice of chunks, and one on the pair.
    """
    first, last = argument(floor(start)), argument(floor(stop))
    condition = f"timestamp >= {first}::timestamptz"
    if start % 1000:
        condition += f" AND (timestamp, {NANOS}) >= ({first}::timestamptz, {argument(start % 1000)}::smallint)"
    if not stop % 1000:
        return f"{condition} AND timestamp < {last}::timestamptz"
    return (
        f"{condition} AND timestamp <= {last}::timestamptz"
        f" AND (timestamp, {NANOS}) < ({last}::timestamptz, {argument(stop % 1000)}::smallint)"
    )


def spans(wanted: Range) -> list[Span]:
    """What is still wanted of each symbol, by symbol: all of it, or what lies after the last page's position.

    Past symbols are gone; the current one goes on a nanosecond, the resolution of an instant, after its last row.
    """
    most = wanted.limit + 1
    rows = min(wanted.limit_per_symbol or most, most)
    after = wanted.after
    if after is None:
        return [Span(symbol, wanted.start, wanted.end, rows) for symbol in sorted(set(wanted.symbols))]
    left = rows if wanted.limit_per_symbol is None else min(wanted.limit_per_symbol - after.given, most)
    if wanted.sort == "asc":
        current = Span(after.symbol, after.instant + 1, wanted.end, left)
    else:
        current = Span(after.symbol, wanted.start, after.instant, left)
    later = sorted({symbol for symbol in wanted.symbols if symbol > after.symbol})
    return [current, *(Span(symbol, wanted.start, wanted.end, rows) for symbol in later)]


def checked_range(symbols: str | Iterable[str], start: Instant, end: Instant, limit: int, sort: Sort) -> Range:
    """A range whose parts have a meaning.

    Raises:
        InvalidRequest: a symbol cannot exist, a time is naive or none, the range is reversed, the limit is no number
            of rows, or `sort` no such word.
    """
    first, last = checked_instant(start, "start"), checked_instant(end, "end")
    if first >= last:
        raise InvalidRequest(
            f"The range is empty: {rfc3339(floor(first))} is not before {rfc3339(floor(last))}.", parameter="start"
        )
    return Range(normal_symbols(symbols), first, last, checked_limit(limit), sort)


def checked_instant(moment: Instant, parameter: str) -> int:
    """Nanoseconds since 1970 of a time that a caller gave, also one of numpy's whole numbers.

    Raises:
        InvalidRequest: it is naive, or none.
    """
    if not isinstance(moment, (datetime, bool)):
        with suppress(TypeError):
            return index(moment)
    try:
        return nanoseconds("" if isinstance(moment, bool) else moment)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise InvalidRequest(f"{parameter}: {error.detail}", parameter=parameter) from None


def checked_limit(limit: int, parameter: str = "limit") -> int:
    """A number of rows.

    Raises:
        InvalidRequest: it is none, below 1, or more than a statement counts.
    """
    with suppress(TypeError):
        if not isinstance(limit, bool) and 1 <= (rows := index(limit)) <= _MOST_ROWS:
            return rows
    raise InvalidRequest(f"{parameter} is a whole number from 1 to {_MOST_ROWS:,}.", parameter=parameter)


def normal_symbols(symbols: str | Iterable[str]) -> list[str]:
    """The stored form of one symbol or several.

    Raises:
        InvalidRequest: one cannot be the name of a stored symbol, or these are no symbols.
    """
    given: Any = symbols  # whatever a caller's own callers gave
    if not isinstance(given, Iterable):
        raise InvalidRequest("symbols is a symbol, or several of them.", parameter="symbols")
    return [normal_symbol(symbol) for symbol in ([given] if isinstance(given, str) else given)]
