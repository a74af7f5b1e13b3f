"""The store's repository: every statement that reads quotes and bars, and the way to those that write.

Invariant: a read never takes more locks than the chunks of its time range, because every statement carries that
range as constants.

As a library, without HTTP:

    async with QuoteRepository.open("postgresql://localhost/quotes") as quotes:
        await quotes.bulk_insert([{"symbol": "AAPL", "timestamp": now, "price": Decimal("189.98")}])
        newest = await quotes.get_latest_quote("AAPL")
        day = await quotes.get_intraday_quotes("AAPL", date(2026, 11, 20), tz="America/New_York")
        bars = await quotes.get_bars(["AAPL"], "5m", start, end)

Every method raises `QuotesError`s only. Beside those that it lists, each raises `InvalidRequest` in a process or an
event loop that is not the one the repository was opened in.
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from operator import itemgetter
from typing import Any, Final, Self

from pydantic import ValidationError

from app.clock import Instant, Interval, nanoseconds
from app.days import MIDNIGHT, day_bounds
from app.db.capability import Level
from app.db.engine import Connection, Database, T, Work
from app.db.models import RealTimeQuote
from app.db.replicas import database_of
from app.errors import InvalidRequest, QuotesError, SchemaMismatch
from app.quote.fields import COLUMNS, NANOS, VALUES
from app.quote.given import Quotes, batch_of
from app.quote.rules import normal_symbol
from app.quote.terms import Consistency, Limits, OnConflict, OnError, Prices, Receipt, Terms, Ties, check_choice
from app.repository import bars
from app.repository.arguments import checked
from app.repository.bar_pages import BarReader
from app.repository.bars import Bar, BarPrice, BarSpec, Fill, Reason
from app.repository.ingest import Attempt, Ingest, Write
from app.repository.ranges import (
    ENDS,
    Arguments,
    Page,
    Position,
    Range,
    Sort,
    Span,
    checked_limit,
    checked_range,
    normal_symbols,
    page,
    page_of,
    per_symbol,
    row_texts,
    symbol_of,
    within,
)
from app.repository.receipts import IdempotencyKey
from app.repository.row_json import BAR, QUOTE, SUMMARY, SYMBOL_SPAN, VWAP
from app.settings import Settings, faults

_COLUMNS: Final = ", ".join(COLUMNS.names)
#: Quotes that an estimate still counts: in 5 ms.
EXACT: Final = 20_000
#: Before and after whatever is stored.
_FIRST: Final = -(10**21)
_LAST: Final = 10**21
#: Nanoseconds of the window that the newest quotes are looked for in first.
_FIRST_WINDOW: Final = 86_400 * 10**9


@dataclass(frozen=True, slots=True)
class SymbolSpan:
    """A stored symbol with the instants of its oldest and newest quote: a microsecond, and the nanoseconds after."""

    symbol: str
    first: datetime
    first_nanos: int
    last: datetime
    last_nanos: int


class QuoteRepository:
    """Reads and writes quotes over the pools of a `Database`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._consistency: Consistency = "eventual"
        self._ingest = Ingest(database, settings)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, settings: Settings | None = None) -> AsyncIterator[Self]:
        """A repository on the migrated database at `url`, with pools of its own, for this process and event loop.

        Raises:
            DatabaseUnavailable: the server cannot be reached, or not by this URL.
            SchemaMismatch: the schema is one that this version does not know.
            StartupError: the store is one of before the first release.
            InvalidRequest: `url` is no text, or a variable `QUOTES_…` of the environment, which stands in for
                `settings`, is no setting.
        """
        if not isinstance(url, str):
            raise InvalidRequest("url is a text, as in postgresql://user:password@host/name.", parameter="url")
        if settings is None:
            try:
                settings = Settings()
            except ValidationError as error:
                told = "; ".join(faults(error))
                raise InvalidRequest(f"The settings of the environment, or of .env, are wrong: {told}.") from None
            except UnicodeDecodeError:
                raise InvalidRequest("The settings of .env are not UTF-8.") from None
        database = database_of(url, settings)
        try:
            await database.connect()
            await _require_known(database)
            yield cls(database, settings)
        finally:
            await database.close()

    def at(self, consistency: Consistency) -> Self:
        """The same repository, whose reads see every committed write if `strong`, or else may come from a replica.

        Raises:
            InvalidRequest: `consistency` is no such word.
        """
        check_choice(consistency, Consistency, "consistency")
        if consistency == self._consistency:
            return self
        view = copy.copy(self)
        view._consistency = consistency  # noqa: SLF001  a copy of this very object
        return view

    # --- writing ---

    async def bulk_insert(
        self,
        quotes: Quotes,
        *,
        on_conflict: OnConflict = "update",
        on_error: OnError = "abort",
        ties: Ties = "replace",
        prices: Prices | None = None,
    ) -> Receipt:
        """Check and store quotes of any kind that `batch_of` takes on these `Terms`; committed when this returns.

        Quotes are rows with the fields of a quote, from whatever can be iterated, or a table: of pandas, polars, Arrow.
        A `timestamp` is RFC 3339, or an aware datetime; the nanoseconds of a pandas Timestamp count, and so do those of
        `nanos`, as `RealTimeQuote.to_dict()` has them. `prices` is that of the settings unless it is given.

        Raises:
            InvalidQuotes: a row breaks a rule and `on_error` is `abort`.
            Conflict: a key is stored, `on_conflict` is `error` and `on_error` is `abort`.
            InvalidRequest: these are no quotes, a column is none of a quote, too many distinct days, or a word that is
                not taken.
            BodyTooLarge: too many rows.
            WriteTimeout: it ran over `write_timeout`; nothing was stored.
            QuotesLocked: somebody holds a lock on a chunk or a key; nothing was stored.
            SettingsChanged: the store keeps fewer quotes than a moment ago; nothing was stored.
            DatabaseUnavailable: nothing was stored.
            OutcomeUnknown: nobody knows whether they were stored, all or none.
        """
        prices = self._settings.prices if prices is None else prices
        batch = batch_of(quotes, Terms(self.limits(), on_error, on_conflict, None, ties, prices))
        (result,) = await self.write([Write(batch, on_conflict, on_error)])
        if isinstance(result, QuotesError):
            raise result
        return result

    def limits(self) -> Limits:
        """What one batch may carry now, by the settings and those of the store."""
        now = datetime.now(UTC)
        return Limits.at(
            now,
            oldest=self._database.facts.oldest(now),
            max_rows=self._settings.max_batch_rows,
            max_days=self._settings.max_batch_days,
            max_bytes=self._settings.max_body_bytes,
        )

    @checked
    async def write(self, writes: Sequence[Write], attempt: Attempt | None = None) -> list[Receipt | QuotesError]:
        """Store several requests in one transaction, as `Ingest.write`."""
        return await self._ingest.write(writes, attempt)

    @checked
    async def replay(self, key: IdempotencyKey) -> Receipt | None:
        """The receipt that is kept under a key, as `Ingest.replay`."""
        return await self._ingest.replay(key)

    async def delete_quotes(self, symbol: str, start: Instant, end: Instant) -> int:
        """Delete a symbol's quotes with `start <= timestamp < end`, exact to the nanosecond; how many they were.

        Range, count, bars and latest agree on it from the commit on. Bars of quotes that retention has dropped
        before are no longer made of quotes, and stay.

        Raises:
            InvalidRequest: the symbol cannot exist, a time is naive or none, the range is reversed, or retention has
                dropped all of it, so that only bars are left.
            WriteTimeout: it ran over `write_timeout`; nothing was deleted.
            QuotesLocked: somebody holds a lock on a chunk; nothing was deleted.
            DatabaseUnavailable: nothing was deleted.
            OutcomeUnknown: nobody knows whether they were deleted, all or none.
        """
        wanted = checked_range(normal_symbol(symbol), start, end, 1, "asc")
        return await self._ingest.delete(wanted.symbols[0], wanted.start, wanted.end)

    # --- reading: objects ---

    async def get_quotes(
        self,
        symbols: str | Iterable[str],
        start: Instant,
        end: Instant,
        *,
        limit: int = 1000,
        sort: Sort = "asc",
    ) -> list[RealTimeQuote]:
        """Up to `limit` quotes with `start <= timestamp < end`, by symbol, then by time.

        Bounds are aware datetimes, or nanoseconds since 1970, and exact to the nanosecond.

        Raises:
            InvalidRequest: a symbol cannot exist, a time is naive or none, the range is reversed, the limit no number
                of rows, or `sort` no such word.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        wanted = checked_range(symbols, start, end, limit, sort)
        return (await self._quotes_of(wanted))[: wanted.limit]

    async def iter_quotes(
        self,
        symbols: str | Iterable[str],
        start: Instant,
        end: Instant,
        *,
        limit: int = 10_000,
        sort: Sort = "asc",
    ) -> AsyncIterator[RealTimeQuote]:
        """All quotes with `start <= timestamp < end`, by symbol, then by time, read in pages of `limit`.

        Each page is a statement of its own; between them no connection is held. Errors as in `get_quotes`, at the step
        that meets them.
        """
        wanted = checked_range(symbols, start, end, limit, sort)
        while True:
            rows = await self._quotes_of(wanted)
            for row in rows[: wanted.limit]:
                yield row
            if len(rows) <= wanted.limit:
                return
            last = rows[wanted.limit - 1]
            after = Position(last.symbol, nanoseconds(last.timestamp) + last.nanos, 0)
            wanted = replace(wanted, after=after)

    async def _quotes_of(self, wanted: Range) -> list[RealTimeQuote]:
        """The quotes of a page, and one more if more follow."""
        argument = Arguments()
        rows = await self._fetch(f"SELECT {_COLUMNS} FROM ({_quotes(wanted, argument)}) quotes", argument)
        return [RealTimeQuote.of(row) for row in rows]

    async def get_latest_quote(self, symbol: str) -> RealTimeQuote | None:
        """The newest quote of a symbol, None if it has none.

        Raises:
            InvalidRequest: the symbol cannot exist.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        argument = Arguments([normal_symbol(symbol)])
        rows = await self._fetch(f"SELECT {_COLUMNS} FROM quotes.latest WHERE symbol = $1", argument)
        return RealTimeQuote.of(rows[0]) if rows else None

    async def get_intraday_quotes(
        self, symbol: str, day: date, *, tz: str = "UTC", day_start: str = MIDNIGHT, limit: int = 1_000_000
    ) -> list[RealTimeQuote]:
        """The quotes of one day of the time zone, by time; 23 or 25 hours when its clocks change, none if they skip it.

        Raises:
            InvalidRequest: the symbol cannot exist, the zone is unknown, `day_start` is no time of day, `day` is no
                date of the calendar, or the limit no number of rows.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        start, end = day_bounds(day, tz, day_start)
        if start == end:
            normal_symbol(symbol), checked_limit(limit)
            return []
        return await self.get_quotes(normal_symbol(symbol), start, end, limit=limit)

    async def get_symbols(self) -> list[SymbolSpan]:
        """All stored symbols in byte order, at a cost independent of how many quotes they have.

        Raises:
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        rows = await self._fetch(
            "SELECT symbol, first_timestamp, first_nanos, timestamp, nanos FROM quotes.latest ORDER BY symbol",
            Arguments(),
        )
        return [SymbolSpan(*row) for row in rows]

    @checked
    async def count_quotes(
        self,
        symbols: str | Iterable[str] | None = None,
        start: Instant | None = None,
        end: Instant | None = None,
        *,
        estimate: bool = False,
    ) -> int:
        """How many quotes are stored: counted, or with `estimate` the planner's guess for more than `EXACT`.

        Raises:
            InvalidRequest: a symbol cannot exist, a time is naive or none, the range is reversed, or `estimate` is
                neither true nor false.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        argument = Arguments()
        conditions = ["true"]
        if symbols is not None:
            conditions.append(f"symbol = ANY({argument(normal_symbols(symbols))}::text[])")
        if start is not None or end is not None:
            wanted = checked_range((), _FIRST if start is None else start, _LAST if end is None else end, 1, "asc")
            conditions.append(within(wanted.start, wanted.end, argument))
        where = " AND ".join(conditions)
        if estimate:
            few = f"SELECT FROM quotes.real_time WHERE {where} LIMIT {EXACT + 1}"
            rows = await self._fetch(f"SELECT count(*) FROM ({few}) AS few", argument)
            if rows[0][0] <= EXACT:
                return int(rows[0][0])
            plan = await self._fetch(f"EXPLAIN (FORMAT JSON) SELECT FROM quotes.real_time WHERE {where}", argument)
            return max(int(plan[0][0][0]["Plan"]["Plan Rows"]), EXACT + 1)
        rows = await self._fetch(f"SELECT count(*) FROM quotes.real_time WHERE {where}", argument)
        return int(rows[0][0])

    async def get_bars(
        self,
        symbols: str | Iterable[str],
        interval: str | Interval,
        start: Instant,
        end: Instant,
        *,
        price: BarPrice = "last",
        tz: str = "UTC",
        day_start: str = MIDNIGHT,
        fill: Fill = "none",
        limit: int = 1000,
        sort: Sort = "asc",
    ) -> list[Bar]:
        """Up to `limit` bars that start in [`start`, `end`), by symbol, then by time.

        `price`, `tz`, `day_start` and `fill` are those of `BarSpec`; `vwap` is sum(price x volume) / sum(volume), None
        without volume.

        Raises:
            InvalidRequest: a symbol, the interval, the zone or a word has no meaning, a time is naive or none, the
                range is reversed, or the limit no number of rows.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        spec = BarSpec(_interval(interval), price, tz, fill, day_start)
        wanted = checked_range(symbols, start, end, limit, sort)
        return (await self._bars_of(wanted, spec))[: wanted.limit]

    async def iter_bars(
        self,
        symbols: str | Iterable[str],
        interval: str | Interval,
        start: Instant,
        end: Instant,
        *,
        price: BarPrice = "last",
        tz: str = "UTC",
        day_start: str = MIDNIGHT,
        fill: Fill = "none",
        limit: int = 10_000,
        sort: Sort = "asc",
    ) -> AsyncIterator[Bar]:
        """All bars that start in [`start`, `end`), by symbol, then by time, read in pages of `limit`.

        The rest is as in `get_bars`, and the pages as in `iter_quotes`.
        """
        spec = BarSpec(_interval(interval), price, tz, fill, day_start)
        wanted = checked_range(symbols, start, end, limit, sort)
        while True:
            rows = await self._bars_of(wanted, spec)
            for row in rows[: wanted.limit]:
                yield row
            if len(rows) <= wanted.limit:
                return
            last = rows[wanted.limit - 1]
            wanted = replace(wanted, after=Position(last.symbol, nanoseconds(last.timestamp), 0))

    async def _bars_of(self, wanted: Range, spec: BarSpec) -> list[Bar]:
        """The bars of a page, and one more if more follow."""

        async def work(connection: Connection) -> list[Any]:
            async def fetch(statement: str, argument: Arguments) -> list[Any]:
                return await connection.fetch(
                    "SELECT symbol, timestamp, open, high, low, close, volume,"
                    f" {VWAP}, count, final FROM ({statement}) bars",
                    *argument.values,
                )

            return await BarReader(connection, self._sources(), wanted, spec).read(fetch, itemgetter(0))

        return [Bar(*row) for row in await self._read(work)]

    # --- reading: pages of JSON text ---

    @checked
    async def quotes_page(self, wanted: Range) -> Page:
        """A page of quotes; errors as in `get_quotes`."""
        argument = Arguments()
        statement = _quotes(wanted, argument)
        return await self._read(lambda connection: page(connection, statement, QUOTE, wanted, argument))

    @checked
    async def newest_quotes(self, wanted: Range) -> Page:
        """The newest `limit_per_symbol` quotes of each symbol in a range, newest first; errors as in `get_quotes`.

        Windows reach back from the newest quotes, each four times as long as the one after it, so that a read locks
        the chunks of as many rows as it gives, wherever they lie in a range that may have no start.
        """
        most = wanted.limit if wanted.limit_per_symbol is None else wanted.limit_per_symbol

        async def work(connection: Connection) -> Page:
            ends = await connection.fetch(ENDS, list(wanted.symbols))
            starts = {symbol: max(wanted.start, nanoseconds(first)) for symbol, first, _ in ends}
            stops = {symbol: min(wanted.end, nanoseconds(last) + 1000) for symbol, _, last in ends}
            found: dict[str, list[str]] = {symbol: [] for symbol in sorted(starts)}
            width = _FIRST_WINDOW
            while left := [s for s in found if len(found[s]) < most and starts[s] < stops[s]]:
                high = max(stops[symbol] for symbol in left)
                low = max(high - width, min(starts[symbol] for symbol in left))
                inside = [symbol for symbol in left if stops[symbol] > low]
                argument = Arguments()
                window = Range(inside, low, high, most * len(inside), "desc", most)
                statement = _quotes(window, argument)
                for row in await row_texts(connection, statement, QUOTE, argument):
                    if len(found[symbol_of(row)]) < most:
                        found[symbol_of(row)].append(row)
                for symbol in inside:
                    stops[symbol] = low
                width *= 4
            return Page([row for rows in found.values() for row in rows], None)

        return await self._read(work)

    @checked
    async def bars_page(self, wanted: Range, spec: BarSpec) -> tuple[Page, list[tuple[str, Reason]]]:
        """A page of bars, and why it has none of the symbols that it might have had; errors as in `get_bars`."""
        return await self._bars_page(wanted, spec, BAR)

    @checked
    async def summary_page(self, wanted: Range, price: BarPrice) -> tuple[Page, list[tuple[str, Reason]]]:
        """A page of daily summaries in UTC days, as `bars_page`."""
        return await self._bars_page(wanted, BarSpec(Interval(1, "d"), price), SUMMARY)

    async def _bars_page(self, wanted: Range, spec: BarSpec, row: str) -> tuple[Page, list[tuple[str, Reason]]]:
        async def work(connection: Connection) -> tuple[Page, list[tuple[str, Reason]]]:
            async def fetch(statement: str, argument: Arguments) -> list[str]:
                return await row_texts(connection, statement, row, argument)

            sources = self._sources()
            found = page_of(await BarReader(connection, sources, wanted, spec).read(fetch, symbol_of), wanted)
            return found, await bars.reasons(connection, sources, found.without_rows(wanted), wanted, spec)

        return await self._read(work)

    def complete_from(self, wanted: Range, spec: BarSpec) -> datetime | None:
        """Where the bars of a range begin to be whole, as `bars.complete_from`."""
        return bars.complete_from(self._sources(), wanted, spec)

    async def latest_rows(self, symbols: Sequence[str] | None) -> tuple[str, list[str]]:
        """The newest quotes as joined JSON text, and the named symbols that have none.

        Raises:
            InvalidRequest: a symbol cannot exist.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        argument = Arguments()
        symbols = None if symbols is None else normal_symbols(symbols)
        where = "" if symbols is None else f"WHERE symbol = ANY({argument(symbols)}::text[])"
        rows = await self._fetch(
            f"SELECT coalesce(string_agg({QUOTE}, ','), ''), coalesce(array_agg(symbol), '{{}}')"
            f" FROM (SELECT {_COLUMNS} FROM quotes.latest {where} ORDER BY symbol) held",
            argument,
        )
        found = set(rows[0][1])
        return rows[0][0], [symbol for symbol in symbols or () if symbol not in found]

    async def symbols_page(self, limit: int, after: str | None) -> tuple[str, str | None]:
        """Symbols with first and last time as joined JSON text, from `after` on; the last symbol if more follow.

        Raises:
            InvalidRequest: the limit is no number of rows, or `after` cannot be a symbol.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        rows = await self._fetch(
            f"SELECT coalesce(string_agg({SYMBOL_SPAN}, ',') FILTER (WHERE n <= $2), ''),"
            " max(symbol) FILTER (WHERE n = $2), count(*)"
            " FROM (SELECT symbol, first_timestamp, first_nanos, timestamp, nanos,"
            " row_number() OVER (ORDER BY symbol) AS n"
            " FROM quotes.latest WHERE $1::text IS NULL OR symbol > $1 ORDER BY symbol LIMIT $2 + 1) held",
            Arguments([None if after is None else normal_symbol(after), checked_limit(limit)]),
        )
        text, last, count = rows[0]
        return text, last if count > limit else None

    def _sources(self) -> bars.Sources:
        level = self._database.capability.level
        return bars.Sources(
            level >= Level.COMMUNITY, self._database.facts.dropped_before, chunks=level > Level.POSTGRESQL
        )

    async def _fetch(self, statement: str, argument: Arguments) -> list[Any]:
        return await self._read(lambda connection: connection.fetch(statement, *argument.values))

    async def _read(self, work: Work[T]) -> T:
        return await self._database.read(work, self._consistency)


def _interval(given: str | Interval) -> Interval:
    return Interval.parse(given) if isinstance(given, str) else given


async def _require_known(database: Database) -> None:
    """See that this version knows the schema, as far as the role may read which it is."""
    from app.db.migrate import head, known, newer_schema  # noqa: PLC0415  Alembic, which nothing else here needs

    async def work(connection: Connection) -> Any:
        if await connection.fetchval("SELECT has_table_privilege(to_regclass('quotes.alembic_version'), 'SELECT')"):
            return await connection.fetchval("SELECT version_num FROM quotes.alembic_version")
        return None

    revision = await database.read(work)
    if revision is not None and revision not in await asyncio.to_thread(known):
        raise SchemaMismatch(newer_schema(revision, head()))


def _quotes(wanted: Range, argument: Arguments) -> str:
    """The statement for a range of quotes."""

    def inner(span: Span | None) -> str:
        if span is None:
            # Together with the symbol the bounds of a span use the key, alone they choose batches of the columnstore.
            condition = f"""
                symbol = span.symbol AND {within(wanted.start, wanted.end, argument)}
                AND timestamp >= span.start AND timestamp <= span.stop
                AND (symbol, timestamp, {NANOS}) >= (span.symbol, span.start, span.start_nanos)
                AND (symbol, timestamp, {NANOS}) < (span.symbol, span.stop, span.stop_nanos)"""
        else:
            condition = f"symbol = {argument(span.symbol)} AND {within(span.start, span.stop, argument)}"
        return f"SELECT {', '.join(COLUMNS.names[1:])} FROM quotes.real_time WHERE {condition}"

    return per_symbol(wanted, inner, ", ".join(VALUES), argument)
