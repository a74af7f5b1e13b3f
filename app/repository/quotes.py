"""The store's repository: every statement that reads quotes and bars, and the way to those that write.

Invariant: a read never takes more locks than the chunks of its time range, because every statement carries that
range as constants.

As a library, without HTTP:

    async with QuoteRepository.open("postgresql://localhost/quotes") as quotes:
        await quotes.bulk_insert([{"symbol": "AAPL", "timestamp": now, "price": Decimal("189.98")}])
        newest = await quotes.get_latest_quote("AAPL")
        day = await quotes.get_intraday_quotes("AAPL", date(2026, 11, 20), tz="America/New_York")
        bars = await quotes.get_bars(["AAPL"], "5m", start, end)
"""

import copy
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final, Self

from app.batch import Batch
from app.db.capability import Level
from app.db.engine import Connection, Database, T, Work
from app.db.models import RealTimeQuote
from app.db.replicas import database_of
from app.errors import QuotesError
from app.model import (
    SCHEMA,
    Consistency,
    Interval,
    Limits,
    OnConflict,
    OnError,
    Receipt,
    Terms,
    normal_symbol,
)
from app.repository import bars
from app.repository.bars import Bar, BarPrice, BarSpec
from app.repository.ingest import Ingest, Write
from app.repository.ranges import (
    Arguments,
    Page,
    Range,
    Sort,
    Span,
    aware,
    checked_range,
    day_bounds,
    normal_symbols,
    of_span,
    page,
    per_symbol,
    spans,
)
from app.repository.receipts import IdempotencyKey
from app.repository.row_json import BAR, QUOTE, SUMMARY, SYMBOL_SPAN
from app.settings import Settings

_VALUES: Final = tuple(name for name in SCHEMA.names if name not in {"symbol", "timestamp"})
_COLUMNS: Final = ", ".join(SCHEMA.names)

# --- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SymbolSpan:
    """A stored symbol with the times of its oldest and newest quote."""

    symbol: str
    first: datetime
    last: datetime


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
        """A repository on the migrated database at `url`, with pools of its own.

        Raises:
            DatabaseUnavailable: the server cannot be reached.
        """
        settings = settings or Settings()
        database = database_of(url, settings)
        try:
            await database.connect()
            yield cls(database, settings)
        finally:
            await database.close()

    def at(self, consistency: Consistency) -> Self:
        """The same repository, whose reads see every committed write if `strong`, or else may come from a replica."""
        if consistency == self._consistency:
            return self
        view = copy.copy(self)
        view._consistency = consistency  # noqa: SLF001  a copy of this very object
        return view

    # --- writing ---

    async def bulk_insert(
        self,
        quotes: Sequence[Mapping[str, Any]],
        *,
        on_conflict: OnConflict = "update",
        on_error: OnError = "abort",
    ) -> Receipt:
        """Check and store quotes (mappings with the fields of `Quote`); committed when this returns.

        Raises:
            InvalidQuotes: a row breaks a rule and `on_error` is `abort`.
            Conflict: a key is stored, `on_conflict` is `error` and `on_error` is `abort`.
            InvalidRequest: no rows, or too many distinct days.
            BodyTooLarge: too many rows.
            DatabaseUnavailable: nothing was stored.
            OutcomeUnknown: the connection broke while committing.
        """
        batch = Batch.from_rows(quotes, Terms(self.limits(), on_error, on_conflict))
        (result,) = await self.write([Write(batch, on_conflict, on_error)])
        if isinstance(result, QuotesError):
            raise result
        return result

    def limits(self) -> Limits:
        """What one batch may carry now, by the settings."""
        return Limits.at(
            datetime.now(UTC),
            retention=self._settings.effective_retention,
            chunk=self._settings.chunk_interval,
            max_rows=self._settings.max_batch_rows,
            max_days=self._settings.max_batch_days,
            max_bytes=self._settings.max_body_bytes,
        )

    async def write(self, writes: Sequence[Write]) -> list[Receipt | QuotesError]:
        """Store several requests in one transaction, as `Ingest.write`."""
        return await self._ingest.write(writes)

    async def replay(self, key: IdempotencyKey) -> Receipt | None:
        """The receipt that is kept under a key, as `Ingest.replay`."""
        return await self._ingest.replay(key)

    async def delete_quotes(self, symbol: str, start: datetime, end: datetime) -> int:
        """Delete a symbol's quotes with `start <= timestamp < end` (aware); how many they were.

        Range, count, bars and latest agree on it from the commit on. Bars of quotes that retention has dropped
        before are no longer made of quotes, and stay.

        Raises:
            InvalidRequest: the symbol cannot exist, a time is naive, or the range is reversed.
            QueryTimeout: it ran over `write_timeout`; nothing was deleted.
            DatabaseUnavailable: nothing was deleted.
            OutcomeUnknown: the connection broke while committing.
        """
        name, (wanted, *_) = normal_symbol(symbol), spans(checked_range(symbol, start, end, 1, "asc"))
        return await self._ingest.delete(name, wanted.start, wanted.stop)

    # --- reading: objects ---

    async def get_quotes(
        self,
        symbols: str | Sequence[str],
        start: datetime,
        end: datetime,
        *,
        limit: int = 1000,
        sort: Sort = "asc",
    ) -> list[RealTimeQuote]:
        """Up to `limit` quotes with `start <= timestamp < end` (aware), by symbol, then by time.

        Raises:
            InvalidRequest: a symbol cannot exist, a time is naive, or the range is reversed.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        wanted = checked_range(symbols, start, end, limit, sort)
        argument = Arguments()
        rows = await self._fetch(f"SELECT {_COLUMNS} FROM ({_quotes(wanted, argument)}) quotes", argument)
        return [RealTimeQuote.of(row) for row in rows[:limit]]

    async def get_latest_quote(self, symbol: str) -> RealTimeQuote | None:
        """The newest quote of a symbol, None if it has none.

        Raises:
            InvalidRequest: the symbol cannot exist.
            DatabaseUnavailable: the database cannot be reached.
        """
        argument = Arguments([normal_symbol(symbol)])
        rows = await self._fetch(f"SELECT {_COLUMNS} FROM quotes.latest WHERE symbol = $1", argument)
        return RealTimeQuote.of(rows[0]) if rows else None

    async def get_intraday_quotes(
        self, symbol: str, day: date, *, tz: str = "UTC", limit: int = 1_000_000
    ) -> list[RealTimeQuote]:
        """The quotes of one calendar day of the time zone, by time; 23 or 25 hours when its clocks change.

        Raises:
            InvalidRequest: the symbol cannot exist, or the zone is unknown.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        start, end = day_bounds(day, tz)
        return await self.get_quotes(symbol, start, end, limit=limit)

    async def get_symbols(self) -> list[SymbolSpan]:
        """All stored symbols in byte order, at a cost independent of how many quotes they have.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
        """
        rows = await self._fetch(
            "SELECT symbol, first_timestamp, timestamp FROM quotes.latest ORDER BY symbol", Arguments()
        )
        return [SymbolSpan(*row) for row in rows]

    async def count_quotes(
        self,
        symbols: str | Sequence[str] | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        *,
        estimate: bool = False,
    ) -> int:
        """How many quotes are stored: counted, or with `estimate` the planner's guess at no cost.

        Raises:
            InvalidRequest: a symbol cannot exist, or a time is naive.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        argument = Arguments()
        conditions = ["true"]
        if symbols is not None:
            conditions.append(f"symbol = ANY({argument(normal_symbols(symbols))}::text[])")
        for bound, operator in ((start, ">="), (end, "<")):
            if bound is not None:
                conditions.append(f"timestamp {operator} {argument(aware(bound))}::timestamptz")
        where = " AND ".join(conditions)
        if estimate:
            plan = await self._fetch(f"EXPLAIN (FORMAT JSON) SELECT FROM quotes.real_time WHERE {where}", argument)
            return int(plan[0][0][0]["Plan"]["Plan Rows"])
        rows = await self._fetch(f"SELECT count(*) FROM quotes.real_time WHERE {where}", argument)
        return int(rows[0][0])

    async def get_bars(
        self,
        symbols: str | Sequence[str],
        interval: str | Interval,
        start: datetime,
        end: datetime,
        *,
        price: BarPrice = "last",
        tz: str = "UTC",
        limit: int = 1000,
        sort: Sort = "asc",
    ) -> list[Bar]:
        """Up to `limit` bars that start in [`start`, `end`), by symbol, then by time.

        `price` and `tz` are those of `BarSpec`; `vwap` is sum(price x volume) / sum(volume), None without volume.

        Raises:
            InvalidRequest: a symbol or the interval has no meaning, a time is naive, or the range is reversed.
            QueryTimeout: the statement ran over its time.
            DatabaseUnavailable: the database cannot be reached.
        """
        spec = BarSpec(Interval.parse(interval) if isinstance(interval, str) else interval, price, tz)
        wanted = checked_range(symbols, start, end, limit, sort)

        async def work(connection: Connection) -> list[Any]:
            argument = Arguments()
            statement = await bars.statement(connection, self._sources(), wanted, spec, argument)
            return await connection.fetch(
                "SELECT symbol, timestamp, open, high, low, close, volume,"
                f" round(turnover / nullif(volume, 0), 8), count, final FROM ({statement}) bars",
                *argument.values,
            )

        return [Bar(*row) for row in (await self._read(work))[:limit]]

    # --- reading: pages of JSON text ---

    async def quotes_page(self, wanted: Range) -> Page:
        """A page of quotes; errors as in `get_quotes`."""
        argument = Arguments()
        statement = _quotes(wanted, argument)
        return await self._read(lambda connection: page(connection, statement, QUOTE, wanted, argument))

    async def bars_page(self, wanted: Range, spec: BarSpec) -> Page:
        """A page of bars; errors as in `get_bars`."""
        return await self._bars_page(wanted, spec, BAR)

    async def summary_page(self, wanted: Range) -> Page:
        """A page of daily summaries in UTC days; errors as in `get_bars`."""
        return await self._bars_page(wanted, BarSpec(Interval(1, "d")), SUMMARY)

    async def _bars_page(self, wanted: Range, spec: BarSpec, row: str) -> Page:
        async def work(connection: Connection) -> Page:
            argument = Arguments()
            statement = await bars.statement(connection, self._sources(), wanted, spec, argument)
            return await page(connection, statement, row, wanted, argument)

        return await self._read(work)

    async def latest_rows(self, symbols: Sequence[str] | None) -> tuple[str, list[str]]:
        """The newest quotes as joined JSON text, and the named symbols that have none.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
        """
        argument = Arguments()
        where = "" if symbols is None else f"WHERE symbol = ANY({argument(list(symbols))}::text[])"
        rows = await self._fetch(
            f"SELECT coalesce(string_agg({QUOTE}, ','), ''), coalesce(array_agg(symbol), '{{}}')"
            f" FROM (SELECT {_COLUMNS} FROM quotes.latest {where} ORDER BY symbol) held",
            argument,
        )
        found = set(rows[0][1])
        return rows[0][0], [symbol for symbol in symbols or () if symbol not in found]

    async def symbols_page(self, limit: int, after: str | None) -> tuple[str, str | None]:
        """Symbols with first and last time as joined JSON text; the last symbol if more follow.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
        """
        rows = await self._fetch(
            f"SELECT coalesce(string_agg({SYMBOL_SPAN}, ',') FILTER (WHERE n <= $2), ''),"
            " max(symbol) FILTER (WHERE n = $2), count(*)"
            " FROM (SELECT symbol, first_timestamp, timestamp, row_number() OVER (ORDER BY symbol) AS n"
            " FROM quotes.latest WHERE $1::text IS NULL OR symbol > $1 ORDER BY symbol LIMIT $2 + 1) held",
            Arguments([after, limit]),
        )
        text, last, count = rows[0]
        return text, last if count > limit else None

    def _sources(self) -> bars.Sources:
        retention = self._settings.effective_retention
        floor = None if retention is None else datetime.now(UTC) - retention + self._settings.chunk_interval
        return bars.Sources(self._database.capability.level >= Level.COMMUNITY, floor)

    async def _fetch(self, statement: str, argument: Arguments) -> list[Any]:
        return await self._read(lambda connection: connection.fetch(statement, *argument.values))

    async def _read(self, work: Work[T]) -> T:
        return await self._database.read(work, self._consistency)


def _quotes(wanted: Range, argument: Arguments) -> str:
    """The statement for a range of quotes."""

    def inner(span: Span | None) -> str:
        start, stop = (wanted.start, wanted.end) if span is None else (span.start, span.stop)
        return f"""
            SELECT {", ".join(SCHEMA.names[1:])} FROM quotes.real_time
            WHERE {of_span(span, argument)} AND timestamp >= {argument(start)} AND timestamp < {argument(stop)}"""

    return per_symbol(wanted, inner, ", ".join(_VALUES), argument)
