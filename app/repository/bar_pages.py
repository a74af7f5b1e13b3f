"""The bars of a page: which of them are read at once, and the statements that read them.

Invariant: a page costs what its bars cost, however long its range is, and a statement gets few edges. Pages joined are
the whole.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from operator import attrgetter
from typing import Final, TypeVar

from app.clock import microseconds
from app.days import EARLIEST, moment
from app.db.engine import Connection
from app.quote.fields import NANOS
from app.quote.terms import AHEAD
from app.repository import rollups
from app.repository.bars import BAR_COLUMNS, ROLLED_UP, VALUES, BarSpec, Fill, Sources
from app.repository.ranges import ENDS, ORDER, Arguments, Range, spans

_T = TypeVar("_T")
#: Edges that one statement takes, unless they lie one width apart; to make and to send 10,000 takes 15 ms.
_MOST_EDGES: Final = 10_000
#: By how much longer a further stretch of a page is at most, and each further one that is looked through for a quote.
_MOST_LONGER: Final = 64
_LONGER: Final = 8
_FIRST_LOOK: Final = 86_400
#: Bars that are read one by one.
_MOST_LOOKED_UP: Final = 1000


@dataclass(frozen=True, slots=True)
class _Part:
    """The bars of a symbol from one edge to another, both in seconds since 1970, and the close before them."""

    symbol: str
    low: int
    high: int
    before: Decimal | None = None


class BarReader:
    """Reads the bars of a range, all of one kind, on one connection.

    A range of more bars than are wanted is read a stretch at a time, from the end where the page begins, and where
    there is nothing, from the next quote on.
    """

    def __init__(self, connection: Connection, sources: Sources, wanted: Range, spec: BarSpec) -> None:
        self._connection = connection
        self._sources = sources
        self._wanted = wanted
        self._spec = spec
        self._newest = wanted.sort == "desc"
        #: Of each symbol the seconds of its first and its last quote, or what stands in for them.
        self._ends: dict[str, tuple[int, int]] = {}

    async def read(
        self, fetch: Callable[[str, Arguments], Awaitable[list[_T]]], symbol_of: Callable[[_T], str]
    ) -> list[_T]:
        """The rows that `fetch` makes of statements for bars; more than the limit, if more follow."""
        wanted, edge = self._wanted, cache(self._spec.edge)
        left = {span.symbol: _Part(span.symbol, edge(span.start), edge(span.stop)) for span in spans(wanted)}
        left = {symbol: part for symbol, part in left.items() if part.low < part.high}
        found: dict[str, list[_T]] = {symbol: [] for symbol in left}
        count = wanted.limit_per_symbol or wanted.limit + 1
        if self._spec.filled or not self._are_whole(left.values(), count):
            left = await self._clipped(left)
        if self._spec.filled:
            left = await self._begun(left)
        while self._is_open(found, left):
            windows, edges = self._windows(left.values(), count)
            if self._spec.fill == "previous":
                windows = await self._priced(windows, left)
            argument = Arguments()
            rows = await fetch(await self._statement(windows, edges, argument), argument)
            self._take(rows, windows, found, left, symbol_of)
            if not self._spec.filled and self._is_open(found, left):
                await self._skip([left[window.symbol] for window in windows if window.symbol in left], left)
            if rows:  # as many as seem to be needed, by how many of those that were read there were
                count *= min(2 + count * len(windows) // len(rows), _MOST_LONGER)
        return [row for symbol in found for row in found[symbol]]

    def _is_open(self, found: Mapping[str, list[_T]], left: Mapping[str, _Part]) -> bool:
        """Whether a row may be missing before the page is full."""
        given = 0
        for symbol, rows in found.items():
            given += len(rows)
            if given > self._wanted.limit:
                return False
            if symbol in left:
                return True
        return False

    def _windows(self, parts: Iterable[_Part], count: int) -> tuple[list[_Part], Sequence[int] | None]:
        """Of each part as many bars as are read at once, and their edges, None if they lie one width apart."""
        grid, given = self._spec.grid, list(parts)
        is_even = not self._spec.filled and grid.even(min(p.low for p in given), max(p.high for p in given)) is not None
        count = count if is_even else min(count, _MOST_EDGES)
        cut: dict[tuple[int, int], Sequence[int]] = {}
        made = 0
        windows: list[_Part] = []
        for part in given:
            bounds = part.low, part.high
            if bounds not in cut:
                if made > _MOST_EDGES and not is_even:
                    break
                cut[bounds] = grid.window(*bounds, count, newest=self._newest)
                made += len(cut[bounds])
            windows.append(replace(part, low=cut[bounds][0], high=cut[bounds][-1]))
        return windows, None if is_even else sorted({edge for edges in cut.values() for edge in edges})

    def _are_whole(self, parts: Iterable[_Part], count: int) -> bool:
        """Whether all that is wanted is read at once."""
        given = list(parts)
        return not given or self._windows(given, count)[0] == given

    def _take(
        self,
        rows: Sequence[_T],
        windows: Sequence[_Part],
        found: dict[str, list[_T]],
        left: dict[str, _Part],
        symbol_of: Callable[[_T], str],
    ) -> None:
        """Sort in what was read, and leave what was not; where a statement had too many rows, these fill the page."""
        by_symbol: dict[str, list[_T]] = {}
        for row in rows:
            by_symbol.setdefault(symbol_of(row), []).append(row)
        most = self._wanted.limit_per_symbol
        for window in windows:
            symbol = window.symbol
            found[symbol] = [*found[symbol], *by_symbol.get(symbol, ())][:most]
            rest = replace(left[symbol], before=None)
            rest = replace(rest, high=window.low) if self._newest else replace(rest, low=window.high)
            left[symbol] = rest
            if rest.low >= rest.high or len(found[symbol]) == most:
                del left[symbol]

    async def _skip(self, parts: Sequence[_Part], left: dict[str, _Part]) -> None:
        """Go on where the next quote is, if there is one."""
        nearest = await self._nearest(parts, newest=self._newest)
        for part in parts:
            if part.symbol not in nearest:
                del left[part.symbol]
                continue
            at, _ = nearest[part.symbol]
            if self._newest:
                left[part.symbol] = replace(part, high=min(part.high, self._spec.grid.ceil(at + 1)))
            else:
                left[part.symbol] = replace(part, low=max(part.low, self._spec.grid.floor(at)))

    async def _clipped(self, left: Mapping[str, _Part]) -> dict[str, _Part]:
        """The parts without what lies before the first and after the last quote; with gaps to fill, after now."""
        grid, floor = self._spec.grid, self._sources.floor
        now = _seconds(datetime.now(UTC) + AHEAD)
        rows = await self._connection.fetch(ENDS, list(left))
        ends = {symbol: (_seconds(first), _seconds(last)) for symbol, first, last in rows}
        if floor is not None:  # bars outlive their quotes
            ends = {symbol: (EARLIEST, max(ends.get(symbol, (0, EARLIEST))[1], _seconds(floor))) for symbol in left}
        self._ends = ends
        if self._spec.filled:
            clipped = [replace(left[s], high=min(left[s].high, grid.ceil(max(now, ends[s][1]) + 1))) for s in ends]
        else:
            clipped = [
                replace(left[s], low=max(left[s].low, grid.floor(first)), high=min(left[s].high, grid.ceil(last + 1)))
                for s, (first, last) in ends.items()
            ]
        return {part.symbol: part for part in sorted(clipped, key=attrgetter("symbol")) if part.low < part.high}

    async def _begun(self, left: Mapping[str, _Part]) -> dict[str, _Part]:
        """The parts from their first bar on, or from their beginning, where a bar before it is to be gone on with."""
        bottom = EARLIEST if self._spec.fill == "previous" else self._spec.edge(self._wanted.start)
        before = await self._nearest(
            [replace(p, low=min(bottom, p.low), high=p.low) for p in left.values()], newest=True
        )
        after = await self._nearest([part for part in left.values() if part.symbol not in before], newest=False)
        begun = {}
        for symbol, part in left.items():
            if symbol in before:
                begun[symbol] = replace(part, before=before[symbol][1])
            elif symbol in after:
                begun[symbol] = replace(part, low=max(part.low, self._spec.grid.floor(after[symbol][0])))
        return begun

    async def _priced(self, windows: Sequence[_Part], left: Mapping[str, _Part]) -> list[_Part]:
        """The windows with the close before each."""
        unknown = [window for window in windows if window.before is None or window.low != left[window.symbol].low]
        found = await self._nearest([replace(window, low=EARLIEST, high=window.low) for window in unknown], newest=True)
        closes = {window.symbol: found.get(window.symbol, (0, None))[1] for window in unknown}
        return [replace(window, before=closes.get(window.symbol, window.before)) for window in windows]

    async def _nearest(self, parts: Sequence[_Part], *, newest: bool) -> dict[str, tuple[int, Decimal]]:
        """Of each part the second of its first or last quote with the price, and that price.

        What is looked through grows from a day on, so that a look locks few chunks beside those that it needs.
        """
        left: dict[str, tuple[int, int]] = {}
        for part in parts:
            first, last = self._ends[part.symbol]
            left[part.symbol] = max(part.low, first), min(part.high, last + 1)
        found: dict[str, tuple[int, Decimal]] = {}
        look = _FIRST_LOOK
        while left := {s: (low, high) for s, (low, high) in left.items() if low < high and s not in found}:
            spans = {s: (max(low, high - look), high) if newest else (low, min(high, low + look))
                     for s, (low, high) in left.items()}  # fmt: skip
            argument = Arguments()
            rows = await self._connection.fetch(self._look(spans, argument, newest=newest), *argument.values)
            found |= {symbol: (_seconds(timestamp), close) for symbol, timestamp, close in rows}
            left = {s: (left[s][0], low) if newest else (high, left[s][1]) for s, (low, high) in spans.items()}
            look *= _LONGER
        return found

    def _look(self, spans: Mapping[str, tuple[int, int]], argument: Arguments, *, newest: bool) -> str:
        """The statement for the first or the last quote with the price in each span."""
        order = "DESC" if newest else "ASC"
        value, floor = VALUES[self._spec.price], self._sources.floor
        low, high = min(low for low, _ in spans.values()), max(high for _, high in spans.values())
        given = ", ".join(
            f"{argument(values)}::{kind}[]"
            for values, kind in (
                (list(spans), "text"),
                ([moment(low) for low, _ in spans.values()], "timestamptz"),
                ([moment(high) for _, high in spans.values()], "timestamptz"),
            )
        )

        def look(relation: str, columns: str, close: str, low: datetime, high: datetime) -> str:
            return f"""
                (SELECT timestamp, {columns}, {close} AS close FROM quotes.{relation}
                 WHERE symbol = span.symbol AND timestamp >= {argument(low)}::timestamptz
                   AND timestamp < {argument(high)}::timestamptz
                   AND timestamp >= span.low AND timestamp < span.high AND {close} IS NOT NULL
                 ORDER BY timestamp {order}, {NANOS} {order} LIMIT 1)"""

        looks = [look(rollups.RAW, NANOS, value, moment(low), moment(high))]
        if (
            floor is not None
            and moment(low) < floor
            and self._spec.interval.source != rollups.RAW
            and self._sources.have(self._spec.price)
        ):
            close = f"{ROLLED_UP[self._spec.price]}close"
            looks.append(look("ohlc_1m", f"0::smallint AS {NANOS}", close, moment(low), min(moment(high), floor)))
        return f"""
            SELECT span.symbol, quote.timestamp, quote.close FROM unnest({given}) AS span (symbol, low, high)
            CROSS JOIN LATERAL (SELECT timestamp, close FROM ({" UNION ALL ".join(looks)}) looks
                                ORDER BY timestamp {order}, {NANOS} {order} LIMIT 1) quote"""

    async def _statement(self, windows: Sequence[_Part], edges: Sequence[int] | None, argument: Arguments) -> str:
        """The statement for the bars of windows, from the coarsest rollups that give them exactly."""
        low, high = min(window.low for window in windows), max(window.high for window in windows)
        even = None if edges is not None else self._spec.grid.even(low, high)
        looked_up = self._looked_up(windows, high - low)
        if looked_up:
            edges, even = edges or self._spec.grid.edges(low, high), None
        if even is not None:
            source, bounds = rollups.coarsest(math.gcd(*even)), ""
            width = f"{argument(timedelta(seconds=even[0]))}::interval"
            slot = f"date_bin({width}, timestamp, {argument(moment(even[1]))}::timestamptz)"
            bucket = f"slot AS bucket, slot + {width} AS bucket_end"
        else:
            source = rollups.coarsest(math.gcd(*(edges or ())))
            bounds = f"({argument([moment(edge) for edge in edges or ()])}::timestamptz[])"
            slot = f"width_bucket(timestamp, {bounds})"
            bucket = f"{bounds}[slot] AS bucket, {bounds}[slot + 1] AS bucket_end"
        stretches = await self._stretches(source, moment(low), moment(high))
        most = argument(self._wanted.limit_per_symbol or self._wanted.limit + 1)
        order = ORDER[self._wanted.sort]

        def bars(conditions: Mapping[rollups.Stretch, str], low: str = "", high: str = "", before: str = "") -> str:
            if looked_up:
                (condition,) = conditions.values()
                inside = f"bucket >= {low} AND bucket < {high}" if low else "true"
                found = _of_each(VALUES[self._spec.price], bounds, inside, condition)
            else:
                found = grouped(conditions)
            if self._spec.filled:
                found = _filled(found, bounds, low, high, before, self._spec.fill)
            return f"""
                SELECT bucket AS timestamp, {BAR_COLUMNS}, bucket_end <= now() AS final FROM ({found}) bars
                ORDER BY bucket {order} LIMIT {most}"""

        def grouped(conditions: Mapping[rollups.Stretch, str]) -> str:
            parts = " UNION ALL ".join(self._part(part, condition) for part, condition in conditions.items())
            # One ordered array gives both ends of a bar; the key's order makes its sort a no-op. Rows of a rollup
            # without the price are passed over here: a condition on them would be planned into the query of each
            # rollup, 0.5 ms.
            return f"""
                SELECT {bucket}, opens[1] AS open, high, low, closes[cardinality(closes)] AS close,
                       volume, turnover, count
                FROM (SELECT {slot} AS slot,
                             array_agg(open ORDER BY timestamp, {NANOS}) FILTER (WHERE open IS NOT NULL) AS opens,
                             max(high) AS high, min(low) AS low,
                             array_agg(close ORDER BY timestamp, {NANOS}) FILTER (WHERE close IS NOT NULL) AS closes,
                             sum(volume) AS volume, sum(turnover) AS turnover, sum(count)::bigint AS count
                      FROM ({parts}) source GROUP BY slot HAVING sum(count) > 0) grouped"""

        if len(windows) == 1:
            # One symbol is in order as it comes, and its values are constants to the planner.
            (window,) = windows
            symbol = f"{argument(window.symbol)}::text"
            inside = f"symbol = {symbol} AND timestamp >= {{}}::timestamptz AND timestamp < {{}}::timestamptz"
            only = {part: inside.format(argument(part.start), argument(part.end)) for part in stretches}
            given: tuple[str, str, str] | tuple[()] = ()
            if self._spec.filled:
                first, last = (f"{argument(moment(edge))}::timestamptz" for edge in (window.low, window.high))
                previous = self._spec.fill == "previous"
                given = first, last, f"{argument(window.before)}::numeric" if previous else ""
            return f"SELECT {symbol} AS symbol, row.* FROM ({bars(only, *given)}) row"
        # Beside the constant bounds of a stretch, bounds on the time alone would be counted twice by the planner, which
        # then takes the stretch for a few rows; so those of the span are compared together with the symbol.
        inside = (
            "symbol = span.symbol AND timestamp >= {}::timestamptz AND timestamp < {}::timestamptz"
            " AND (symbol, timestamp) >= (span.symbol, span.low) AND (symbol, timestamp) < (span.symbol, span.high)"
        )
        each = {part: inside.format(argument(part.start), argument(part.end)) for part in stretches}
        spans = ", ".join(
            f"{argument(values)}::{kind}[]"
            for values, kind in (
                ([window.symbol for window in windows], "text"),
                ([moment(window.low) for window in windows], "timestamptz"),
                ([moment(window.high) for window in windows], "timestamptz"),
                ([window.before for window in windows], "numeric"),
            )
        )
        return f"""
            SELECT span.symbol, row.*
            FROM (SELECT * FROM unnest({spans}) AS given (symbol, low, high, before) ORDER BY symbol COLLATE "C") span
            CROSS JOIN LATERAL ({bars(each, "span.low", "span.high", "span.before")}) row
            ORDER BY span.symbol COLLATE "C", row.timestamp {order}
            LIMIT {argument(self._wanted.limit + 1)}"""

    def _looked_up(self, windows: Sequence[_Part], whole: int) -> bool:
        """Whether each bar is read from the quotes by itself: in their order, so that nothing is sorted.

        A month of one quote a second takes half as long so, and a bar without quotes 3 us. Where there are chunks, each
        look would visit all that are in the range.
        """
        if self._sources.chunks:
            return False
        longest = max(whole, sum(window.high - window.low for window in windows))
        return timedelta(seconds=longest) <= _MOST_LOOKED_UP * self._spec.interval.width

    def _part(self, part: rollups.Stretch, condition: str) -> str:
        """What bars are made of, of one stretch."""
        if part.source != rollups.RAW:
            prefix = ROLLED_UP[self._spec.price]
            columns = ", ".join(f"{prefix}{name} AS {name}" for name in BAR_COLUMNS.split(", "))
            return f"SELECT timestamp, 0 AS {NANOS}, {columns} FROM quotes.{part.source} WHERE {condition}"
        value = VALUES[self._spec.price]
        return f"""
            SELECT timestamp, {NANOS}, {value} AS open, {value} AS high, {value} AS low, {value} AS close, volume,
                   {value} * volume AS turnover, 1 AS count
            FROM quotes.real_time WHERE {condition} AND {value} IS NOT NULL"""

    async def _stretches(self, source: str, low: datetime, high: datetime) -> list[rollups.Stretch]:
        """What to read where. Without rollups the views of their names would compute all bars of a symbol."""
        if source == rollups.RAW or not self._sources.have(self._spec.price):
            return [rollups.Stretch(rollups.RAW, low, high)]
        return await rollups.stretches(self._connection, source, low, high, self._sources.floor)


def _seconds(at: datetime) -> int:
    """The second that a moment lies in."""
    return microseconds(at) // 10**6


def _of_each(value: str, bounds: str, inside: str, condition: str) -> str:
    """The bar between each two neighbouring edges that lie inside, read from the quotes that meet a condition."""
    quotes = f"""FROM quotes.real_time WHERE {condition} AND timestamp >= bucket AND timestamp < bucket_end
                 AND {value} IS NOT NULL"""
    return f"""
        SELECT bucket, bucket_end,
               (SELECT {value} {quotes} ORDER BY timestamp, {NANOS} LIMIT 1) AS open, high, low,
               (SELECT {value} {quotes} ORDER BY timestamp DESC, {NANOS} DESC LIMIT 1) AS close,
               volume, turnover, count
        FROM (SELECT bucket, bucket_end, bar.*
              FROM (SELECT * FROM unnest({bounds}, {bounds}[2:]) AS slot (bucket, bucket_end) WHERE {inside}) slots
              CROSS JOIN LATERAL (SELECT max({value}) AS high, min({value}) AS low, sum(volume) AS volume,
                                         sum({value} * volume) AS turnover, count(*) AS count {quotes}) bar
              WHERE count > 0 OFFSET 0) bars"""


def _filled(bars: str, bounds: str, low: str, high: str, before: str, fill: Fill) -> str:
    """The bars with one for each two neighbouring edges up to now; those that lie ahead of now stay."""
    price = "NULL::numeric"
    if fill == "previous":
        price = f"coalesce(first_value(close) OVER (PARTITION BY run ORDER BY bucket), {before})"
    return f"""
        SELECT bucket, bucket_end, coalesce(open, {price}) AS open, coalesce(high, {price}) AS high,
               coalesce(low, {price}) AS low, coalesce(close, {price}) AS close, volume, turnover,
               coalesce(count, 0) AS count
        FROM (SELECT bucket, slots.bucket_end, open, high, low, close, volume, turnover, count,
                     count(close) OVER (ORDER BY bucket) AS run
              FROM (SELECT * FROM unnest({bounds}, {bounds}[2:]) AS slot (bucket, bucket_end)
                    WHERE bucket >= {low} AND bucket < {high}) slots
              LEFT JOIN ({bars}) bars USING (bucket)
              WHERE count IS NOT NULL OR bucket < now()) runs"""
