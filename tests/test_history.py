"""Two years of daily chunks: each read locks what its range needs, however many chunks there are beside it.

Invariant: the statements are the repository's own, run in a transaction whose locks are counted before it ends.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest

from app.clock import Interval, nanoseconds
from app.db.capability import Level
from app.db.engine import Connection, Database, T, Work
from app.db.migrate import migrate
from app.quote.terms import Consistency
from app.repository.bars import BarSpec
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Range
from app.settings import Settings
from tests.conftest import Lane, about, random_symbol, refresh

DAY: Final = timedelta(days=1)
CLIENTS: Final = 8
#: Locks that a statement may hold, however long the history; a refused one fails for all clients alike.
MOST: Final = {
    "latest": 10, "range of a day": 20, "range of a nanosecond": 20, "count of a day": 20, "bars of a day": 60,
    "bars of a week": 80, "bars of mids": 60, "newest bar": 60, "gaps": 80, "what has no bars": 80,
}  # fmt: skip


class _Within(Database):
    """Reads on one connection, in the transaction that it is in."""

    def __init__(self, connection: Connection, database: Database) -> None:
        self._connection = connection
        self.capability, self.facts = database.capability, database.facts

    async def read(self, work: Work[T], consistency: Consistency = "eventual") -> T:
        del consistency
        return await work(self._connection)


async def locks(database: Database, settings: Settings, read: Callable[[QuoteRepository], Awaitable[Any]]) -> int:
    """Locks held when the read is done, less those of a transaction that only counts its own."""
    held = []
    async with database.dedicated(statement_timeout=timedelta(minutes=1)) as connection:
        # Once beforehand: what is read to fill the caches of a fresh session is locked only then.
        await read(QuoteRepository(_Within(connection, database), settings))
        for first in (_nothing, read):
            async with connection.transaction():
                await first(QuoteRepository(_Within(connection, database), settings))
                held.append(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()"))
    return int(held[1] - held[0])


async def _nothing(_: QuoteRepository) -> None:
    pass


@pytest.mark.concurrent  # also because the WebAssembly server, one process, shows no locks
@pytest.mark.timeout(600)
async def test_locks_do_not_grow_with_the_history(lane: Lane, empty_url: str, record_property: Any) -> None:
    days = 730
    settings = lane.make_settings(statement_timeout="60 seconds", write_timeout="120 seconds")
    await migrate(empty_url, settings)
    database = Database(empty_url, settings)
    await database.connect()
    try:
        if database.capability.level < Level.APACHE:
            pytest.skip("a plain table has one lock for all its history")
        quotes, symbol = QuoteRepository(database, settings), random_symbol()
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        for part in range(0, days, 73):
            await quotes.bulk_insert(
                [
                    {
                        "symbol": symbol,
                        "timestamp": today - (part + i) * DAY - DAY / 2,
                        "price": i + 1,
                        "volume": 1,
                        "bid": i + 1,
                        "ask": i + 3,
                    }
                    for i in range(min(73, days - part))
                ]
            )
        async with database.dedicated(statement_timeout=timedelta(minutes=5)) as connection:
            if database.capability.level >= Level.COMMUNITY:
                # The newer half is in the rollups, and a late change keeps one stretch of it on the quotes.
                for rollup in ("ohlc_1m", "ohlc_1h", "ohlc_1d"):
                    start, end = today - days // 2 * DAY, today
                    # In one transaction; by default it would be one for every ten buckets.
                    await refresh(connection, rollup, start, end, options='{"buckets_per_batch": 0}')
            chunks = await connection.fetchval(
                "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'real_time'"
            )
        assert chunks == days
        at = today - days // 4 * DAY
        await quotes.bulk_insert([{"symbol": symbol, "timestamp": at - timedelta(hours=3), "price": 7}])

        reads: dict[str, Callable[[QuoteRepository], Awaitable[Any]]] = {
            "latest": lambda q: q.get_latest_quote(symbol),
            "range of a day": lambda q: q.get_quotes(symbol, at - DAY, at),
            "range of a nanosecond": lambda q: q.get_quotes(
                [symbol, "NOBODY"], nanoseconds(at - DAY / 2), nanoseconds(at - DAY / 2) + 1
            ),
            "count of a day": lambda q: q.count_quotes(symbol, nanoseconds(at - DAY) + 1, nanoseconds(at) + 1),
            "bars of a day": lambda q: q.get_bars(symbol, "5m", at - DAY, at),
            "bars of a week": lambda q: q.get_bars(symbol, "1h", at - 7 * DAY, at),
            "bars of mids": lambda q: q.get_bars(symbol, "5m", at - DAY, at, price="mid"),
            "newest bar": lambda q: q.get_bars(symbol, "1h", at - 365 * DAY, at, limit=1, sort="desc"),
            "gaps": lambda q: q.get_bars(symbol, "1h", at - DAY, at, fill="previous", tz="America/New_York"),
            "what has no bars": lambda q: q.bars_page(
                Range(["NOBODY", symbol], nanoseconds(at - DAY), nanoseconds(at - DAY / 2)), BarSpec(Interval(1, "h"))
            ),
        }
        held = {name: await locks(database, settings, read) for name, read in reads.items()}
        held["count of all"] = await locks(database, settings, lambda q: q.count_quotes(symbol))
        record_property("locks", held)
        about[lane.name] += f"; locks over {chunks} chunks: " + ", ".join(f"{k} {v}" for k, v in held.items())
        for name, most in MOST.items():
            assert held[name] <= most, held
        assert held["count of all"] > days, "an unbounded count locks every chunk, as the documents say"

        async def client() -> None:
            for _ in range(5):
                for read in reads.values():
                    assert await read(quotes)
                assert await quotes.count_quotes(symbol) == days + 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    finally:
        await database.close()
