"""Does a read cost more when the history is longer? The same reads beside a million and beside twenty million rows.

Two databases on one server hold the same fifty symbols at the same density; one goes back weeks, the other more than
a year. Reads of random symbols at random places take turns between them, so that a noisy machine meets both alike.
Both are vacuumed, and their rollups refreshed as the policies would leave them.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer

from app.clock import Interval, nanoseconds
from app.db.capability import Level
from app.db.engine import Database
from app.db.migrate import migrate
from app.repository.bars import BarSpec
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Page, Range
from app.settings import Settings
from benchmarks.target import fresh_database

SYMBOLS: Final = [f"SYM{i:02}" for i in range(50)]
STEP: Final = timedelta(seconds=90)
SEED: Final = 20_261_122
SLICE: Final = 30
FILL: Final = """
INSERT INTO quotes.real_time (symbol, timestamp, price, bid, ask, bid_size, ask_size, volume, source)
SELECT 'SYM' || lpad(s::text, 2, '0'), at, 100 + n % 977 / 8.0, 100, 101, 5, 5, n % 13, 'bench'
FROM generate_series($1::timestamptz, $2::timestamptz - interval '90 seconds', interval '90 seconds')
     WITH ORDINALITY AS t (at, n), generate_series(0, 49) AS s
"""
Read = Callable[[QuoteRepository, str, datetime], Awaitable[Page]]


async def _range(quotes: QuoteRepository, symbol: str, at: datetime) -> Page:
    return await quotes.quotes_page(Range([symbol], nanoseconds(at), nanoseconds(at + 600 * STEP), limit=600))


async def _bars(quotes: QuoteRepository, symbol: str, at: datetime) -> Page:
    wanted = Range([symbol], nanoseconds(at), nanoseconds(at + timedelta(days=5)))
    found, _ = await quotes.bars_page(wanted, BarSpec(Interval(1, "h")))
    return found


READS: Final[dict[str, Read]] = {"range of 600": _range, "bars of 5 days by 1h": _bars}


async def _filled(url: str, settings: Settings, rows: int, end: datetime) -> tuple[Database, datetime]:
    await migrate(url, settings)
    database = Database(url, settings)
    await database.connect()
    start = end - STEP * (rows // len(SYMBOLS))
    async with database.dedicated(statement_timeout=timedelta(minutes=30)) as connection:
        at = start
        while at < end:
            until = min(at + timedelta(days=SLICE), end)
            await connection.execute(FILL, at, until)
            at = until
        if database.capability.level >= Level.COMMUNITY:
            for rollup in ("ohlc_1m", "ohlc_1h", "ohlc_1d"):
                await connection.execute(
                    f"CALL refresh_continuous_aggregate('quotes.{rollup}', '{start - timedelta(days=2)}', '{end}',"
                    """ options => '{"buckets_per_batch": 43200}')"""
                )
        await connection.execute("VACUUM ANALYZE quotes.real_time")
    return database, start


async def measure(url: str, sizes: list[int], rounds: int, calls: int) -> None:
    settings = Settings(_env_file=None, retention=None, require_timescaledb="none")
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    rng = random.Random(SEED)
    async with AsyncExitStack() as stack:
        stores = []
        for rows in sizes:
            database, start = await _filled(await stack.enter_async_context(fresh_database(url)), settings, rows, end)
            stack.push_async_callback(database.close)
            stores.append((rows, QuoteRepository(database, settings), (end - start).days))
            print(f"filled {rows:,} rows of {(end - start).days} days", flush=True)
        for name, read in READS.items():
            p50: dict[int, list[float]] = {rows: [] for rows in sizes}
            for turn in range(rounds + 1):
                times: dict[int, list[float]] = {rows: [] for rows in sizes}
                for call in range(calls):
                    for rows, quotes, days in stores[:: 1 if call % 2 else -1]:
                        at = end - timedelta(days=rng.randint(6, days - 1), seconds=rng.randrange(3600))
                        symbol = rng.choice(SYMBOLS)
                        before = time.perf_counter()
                        found = await read(quotes, symbol, at)
                        times[rows].append(1000 * (time.perf_counter() - before))
                        assert len(found.rows) >= 100
                if turn:  # the first one fills caches
                    for rows in sizes:
                        p50[rows].append(statistics.median(times[rows]))
            base = p50[sizes[0]]
            for rows in sizes:
                ratios = [value / first for value, first in zip(p50[rows], base, strict=True)]
                print(
                    f"| {name} | {rows:,} | {statistics.median(p50[rows]):.2f} |"
                    f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
                    flush=True,
                )


def main(
    database_url: Annotated[str, typer.Option(help="Server to measure; databases are created there and dropped.")],
    rows: Annotated[list[int] | None, typer.Option(help="Rows of each store.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds counted.")] = 5,
    calls: Annotated[int, typer.Option(help="Calls of each read a round and store.")] = 200,
) -> None:
    """Print a row of a Markdown table for each read and store: rows, p50 in ms, times the first store's."""
    asyncio.run(measure(database_url, rows or [1_000_000, 20_000_000], rounds, calls))


if __name__ == "__main__":
    typer.run(main)
