"""Every acknowledged quote is in the bars at once, while refreshes move the log of changes along below it.

Writers store late quotes around the moving front of what the rollups hold, each of a symbol of its own, and ask for
bars right after each receipt; refreshes of all rollups run without a pause. Invariant: no answer misses a quote
that was acknowledged before it was asked for, and in the end the bars equal the quotes.

REFRESH_ROUNDS sets how many quotes each writer stores.
"""

import asyncio
import os
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from typing import Final

import pytest

from app.clock import nanoseconds
from app.db.capability import Level
from app.db.engine import Database
from app.db.migrate import migrate
from app.repository.quotes import QuoteRepository
from tests.conftest import Lane, about, random_symbol, refresh
from tests.test_differential import DAY, PRICES, ROLLUPS, Model, sent, stored_row, tuples

ROUNDS: Final = int(os.environ.get("REFRESH_ROUNDS", "15"))
WRITERS: Final = 4
DAYS: Final = 20
WIDTHS: Final = (("1m", timedelta(minutes=1)), ("1h", timedelta(hours=1)), ("1d", DAY))


class Front:
    """How far the refreshes have come: from the first day to the last as the writers do their rounds."""

    def __init__(self) -> None:
        self.start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - (DAYS + 2) * DAY
        self.rounds = 0
        self.refreshes = 0
        self.done = asyncio.Event()

    @property
    def at(self) -> datetime:
        return self.start + DAY + (DAYS - 2) * DAY * self.rounds / (WRITERS * ROUNDS)


async def keep_refreshing(database: Database, front: Front, name: str, width: timedelta) -> None:
    async with database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
        while not front.done.is_set():
            start, end = front.start - DAY, front.at + 2 * width
            await refresh(connection, name, start, end)
            front.refreshes += 1


async def write(quotes: QuoteRepository, front: Front, rng: random.Random) -> tuple[str, Model]:
    symbol, model = random_symbol(), Model()

    async def store(at: datetime) -> None:
        """A trade, a quote a nanosecond before or after it, or both."""
        price, instant = Decimal(rng.randint(1, 9999)) / 8, nanoseconds(at)
        rows = [
            stored_row(symbol, instant, price=price, volume=rng.randint(1, 9)),
            stored_row(symbol, instant + rng.choice((-1, 1)), bid=price, ask=price + 2),
        ]  # fmt: skip
        rows = rng.choice((rows, rows[:1], rows[1:]))
        await quotes.bulk_insert([sent(row) for row in rows])
        model.write(rows, "update")

    await store(front.start + DAYS * DAY)
    for _ in range(ROUNDS):
        distance = rng.choice((timedelta(seconds=30), timedelta(minutes=3), timedelta(hours=2), DAY, 5 * DAY))
        at = max(front.start, front.at + (2 * rng.random() - 1.3) * distance)
        await store(at)
        for interval, width in WIDTHS:
            low = at - (at - datetime(2000, 1, 3, tzinfo=UTC)) % width
            for price in PRICES:
                bars = await quotes.get_bars(symbol, interval, low, low + width, price=price)
                expected = [bar for bar in model.bars(width, price) if bar[1] == low]
                assert tuples(bars) == expected, f"bars of {interval}, {price}, at {low} after the receipt of {at}"
        front.rounds += 1
    return symbol, model


@pytest.mark.concurrent
@pytest.mark.timeout(240 + 2 * ROUNDS)
async def test_what_is_acknowledged_is_in_the_bars_during_refreshes(lane: Lane, empty_url: str) -> None:
    settings = lane.make_settings(statement_timeout="60 seconds")
    await migrate(empty_url, settings)
    database = Database(empty_url, settings)
    await database.connect()
    try:
        if database.capability.level < Level.COMMUNITY:
            pytest.skip(f"the level of this lane is {database.capability.level}")
        seed = random.SystemRandom().randrange(10**9)
        front, quotes = Front(), QuoteRepository(database, settings)
        refreshes = [asyncio.create_task(keep_refreshing(database, front, *rollup)) for rollup in ROLLUPS]
        try:
            written = await asyncio.gather(*(write(quotes, front, random.Random(seed + i)) for i in range(WRITERS)))
        finally:
            front.done.set()
            await asyncio.gather(*refreshes)
        assert front.refreshes >= len(ROLLUPS)
        for symbol, model in written:
            for (interval, width), price in product(WIDTHS, PRICES):
                whole = (front.start - DAY, front.start + 30 * DAY)
                bars = await quotes.get_bars(symbol, interval, *whole, price=price, limit=10**5)
                assert tuples(bars) == model.bars(width, price), f"bars of {interval} in the end, seed {seed}"
    finally:
        await database.close()
    about[lane.name] += f"; {WRITERS * ROUNDS} quotes stored during {front.refreshes} refreshes, seed {seed}: 0 missing"
