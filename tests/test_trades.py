"""Trades of a crowded tape: many in one millisecond, late ones, corrections. Nothing is lost, and bars are exact.

`TEST_TRADES=1000000 python -m pytest tests/test_trades.py` (`make trades`) does it at full size. Invariant: the oracle
is polars, on the trades in the order in which they were sent.
"""

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final

import polars as pl
import pyarrow as pa
import pytest

from app.db.capability import Level
from app.db.engine import Database
from app.errors import QuotesError
from app.quote.batch import Batch
from app.quote.terms import OnConflict, Receipt, Terms
from app.repository.ingest import Write
from app.repository.maintenance import ROLLUPS
from app.repository.quotes import QuoteRepository
from tests.conftest import patiently, random_symbol, refresh

TRADES: Final = int(os.environ.get("TEST_TRADES", "20000"))
SEED: Final = int(os.environ.get("TEST_SEED", "17"))
START: Final = datetime(2025, 3, 4, 22, tzinfo=UTC)
SPAN: Final = timedelta(hours=28)  # two midnights
SYMBOLS: Final = 4
TIES: Final = 0.3
BODY: Final = 10_000
WIDTHS: Final = {"1m": "1m", "1h": "1h", "1d": "1d", "5m": "5m"}
TICK: Final = Decimal("0.01")
LOT: Final = Decimal("0.0001")


@dataclass
class Tape:
    """Trades in the order of arrival; prices in ticks and volumes in lots, so that the oracle has whole numbers."""

    symbol: list[str]
    millisecond: list[int]
    price: list[int]
    volume: list[int]

    def body(self, start: int, stop: int) -> pa.Table:
        """A part of the tape as a request has it."""
        return pa.table(
            {
                "symbol": self.symbol[start:stop],
                "timestamp": pa.array(self.millisecond[start:stop], pa.timestamp("ms", "UTC")),
                "price": [price * TICK for price in self.price[start:stop]],
                "volume": [volume * LOT for volume in self.volume[start:stop]],
            }
        )

    def part(self, rows: Iterable[int]) -> "Tape":
        """Some of its trades."""
        chosen = list(rows)
        columns = (self.symbol, self.millisecond, self.price, self.volume)
        return Tape(*([column[i] for i in chosen] for column in columns))  # type: ignore[arg-type]

    def cuts(self) -> list[int]:
        """Ends of bodies, none of which parts the trades of one millisecond: the service numbers within a body."""
        found: list[int] = []
        for i in range(1, len(self.symbol)):
            if i - (found[-1] if found else 0) >= BODY and self.millisecond[i] != self.millisecond[i - 1]:
                found.append(i)
        return [*found, len(self.symbol)]

    def bars(self, every: str) -> pl.DataFrame:
        """The bars of the tape."""
        frame = pl.DataFrame(
            {"symbol": self.symbol, "at": self.millisecond, "price": self.price, "volume": self.volume}
        ).with_columns(pl.from_epoch("at", time_unit="ms").dt.cast_time_unit("us").dt.replace_time_zone("UTC"))
        return (
            frame.sort("at", maintain_order=True)
            .with_columns(at=pl.col("at").dt.truncate(every), turnover=pl.col("price") * pl.col("volume"))
            .group_by("symbol", "at", maintain_order=True)
            .agg(
                open=pl.col("price").first(),
                high=pl.col("price").max(),
                low=pl.col("price").min(),
                close=pl.col("price").last(),
                volume=pl.col("volume").sum(),
                count=pl.len(),
            )
            .sort("symbol", "at")
        )


def tape(seed: int, trades: int, symbols: Sequence[str]) -> Tape:
    """A random walk of trades, `TIES` of which share the millisecond of the one before of their symbol."""
    chance = random.Random(seed)
    first = int(START.timestamp() * 1000)
    step = SPAN / timedelta(milliseconds=1) / (trades * (1 - TIES))
    found = Tape([], [], [], [])
    at, price = float(first), dict.fromkeys(symbols, 10_000)
    while len(found.symbol) < trades:
        at += max(1.0, chance.expovariate(1 / step))
        symbol = chance.choice(symbols)
        burst = 1
        while chance.random() < TIES:
            burst += 1
        for _ in range(burst):
            price[symbol] = max(1, price[symbol] + chance.randint(-9, 9))
            found.symbol.append(symbol)
            found.millisecond.append(int(at))
            found.price.append(price[symbol])
            found.volume.append(chance.randint(1, 50_000))
    return found


async def send(quotes: QuoteRepository, given: Tape, on_conflict: OnConflict = "update") -> list[Receipt]:
    """Send a tape body by body."""
    receipts: list[Receipt] = []
    start = 0
    for stop in given.cuts():
        batch = Batch.from_table(given.body(start, stop), Terms(quotes.limits(), ties="number"))
        assert batch is not None
        (result,) = await quotes.write([Write(batch, on_conflict)])
        assert not isinstance(result, QuotesError)
        receipts.append(result)
        start = stop
    return receipts


async def check(quotes: QuoteRepository, expected: Tape, symbols: Sequence[str]) -> None:
    """All is there, and each bar is that of polars."""
    assert await quotes.count_quotes(symbols) == len(expected.symbol)
    end = START + SPAN + timedelta(days=2)
    for interval, every in WIDTHS.items():
        wanted = expected.bars(every)
        found = await quotes.get_bars(symbols, interval, START - timedelta(days=1), end, limit=1_000_000)
        shown = pl.DataFrame(
            {
                "symbol": [bar.symbol for bar in found],
                "at": pl.Series([bar.timestamp.astimezone(UTC) for bar in found], dtype=pl.Datetime("us", "UTC")),
                **{
                    name: [int(getattr(bar, name) / TICK) for bar in found] for name in ("open", "high", "low", "close")
                },
                "volume": [int((bar.volume or Decimal(0)) / LOT) for bar in found],
                "count": [bar.count for bar in found],
            }
        )
        assert shown.equals(wanted.with_columns(pl.col("count").cast(pl.Int64))), interval


@pytest.mark.timeout(3600)
async def test_a_crowded_tape_is_kept_whole(quotes: QuoteRepository, database: Database) -> None:
    symbols = sorted(random_symbol() for _ in range(SYMBOLS))
    trades = tape(SEED, TRADES, symbols)
    total = len(trades.symbol)

    receipts = await send(quotes, trades)
    tied = total - len(set(zip(trades.symbol, trades.millisecond, strict=True)))
    assert tied > total * TIES / 2
    assert sum(r.inserted for r in receipts) == total
    assert sum(r.numbered for r in receipts) == tied
    assert sum(r.superseded + r.updated + r.unchanged + len(r.rejected) for r in receipts) == 0
    await check(quotes, trades, symbols)

    again = await send(quotes, trades)
    assert sum(r.unchanged for r in again) == total

    # A correction of every fifth body changes prices in place.
    start = 0
    for place, stop in enumerate(trades.cuts()):
        if place % 5 == 0:
            trades.price[start:stop] = [price + 1 for price in trades.price[start:stop]]
            part = trades.part(range(start, stop))
            assert sum(r.updated for r in await send(quotes, part)) == stop - start
        start = stop
    await check(quotes, trades, symbols)

    if database.capability.level >= Level.COMMUNITY:
        await compress_and_refresh(database)
        await check(quotes, trades, symbols)

    late = tape(SEED + 1, TRADES // 20, symbols)
    known = set(zip(trades.symbol, trades.millisecond, strict=True))
    fresh = [i for i, key in enumerate(zip(late.symbol, late.millisecond, strict=True)) if key not in known]
    late = late.part(fresh)
    assert sum(r.inserted for r in await send(quotes, late)) == len(late.symbol)
    trades = Tape(
        trades.symbol + late.symbol, trades.millisecond + late.millisecond, trades.price + late.price,
        trades.volume + late.volume,
    )  # fmt: skip
    await check(quotes, trades, symbols)

    if database.capability.level >= Level.COMMUNITY:
        await compress_and_refresh(database)
        await check(quotes, trades, symbols)
        assert sum(r.unchanged for r in await send(quotes, late)) == len(late.symbol)


async def compress_and_refresh(database: Database) -> None:
    """Move the chunks of the tape to the columnstore, and bring the rollups up to date."""
    start, end = START - timedelta(days=2), START + SPAN + timedelta(days=2)
    async with database.dedicated(statement_timeout=timedelta(minutes=10)) as connection:
        chunks = await connection.fetch(
            "SELECT format('%I.%I', chunk_schema, chunk_name) FROM timescaledb_information.chunks"
            " WHERE hypertable_name = 'real_time' AND range_end > $1 AND range_start < $2",
            start,
            end,
        )
        for (chunk,) in chunks:
            await patiently(connection, f"CALL convert_to_columnstore('{chunk}', recompress => true)")
        for rollup, _ in ROLLUPS:
            await refresh(connection, rollup, start, end)
