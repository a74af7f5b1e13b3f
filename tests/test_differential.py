"""Hypertable, columnstore and rollups give the answers of a dictionary, whatever is done to them, in any order.

Seeded sequences of ingest, late rows, corrections, merges, deletes, refresh, compression, decompression and retention
run on each lane, over trades and quotes of one side or both that lie nanoseconds apart. Invariant: after every
operation range, latest, count and bars of trades and mids, of any days, filled or not, page by page, equal the model,
the rollups being as stale as the sequence left them. Plain PostgreSQL runs the operations that it has.

DIFFERENTIAL_SEQUENCES sets how many sequences run (300 for a full run); DIFFERENTIAL_SEED repeats a run, and
DIFFERENTIAL_FIRST begins later in it, so that one sequence can be repeated, or a run be shared out.
"""

import json
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any, Final

import pytest

from app.clock import Interval, floor, nanoseconds, rfc3339_nano
from app.db.capability import Level
from app.db.engine import Connection, Database, read_facts
from app.db.migrate import migrate
from app.quote.fields import COLUMNS, VALUES
from app.repository.bars import Bar, BarPrice, BarSpec, Fill
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Range, Sort
from tests import oracle
from tests.conftest import Lane, about, patiently, random_symbol

SEQUENCES: Final = int(os.environ.get("DIFFERENTIAL_SEQUENCES", "5"))
SEED: Final = int(os.environ.get("DIFFERENTIAL_SEED") or random.SystemRandom().randrange(10**9))
FIRST: Final = int(os.environ.get("DIFFERENTIAL_FIRST", "0"))
DAY: Final = timedelta(days=1)
SPAN: Final = 60 * DAY
#: Interval and width; 7 minutes divide no hour, so that their bars cut through all coarser ones.
INTERVALS: Final = (
    ("1m", timedelta(minutes=1)),
    ("7m", timedelta(minutes=7)),
    ("1h", timedelta(hours=1)),
    ("1d", DAY),
    ("1w", 7 * DAY),
)
ROLLUPS: Final = (("ohlc_1m", timedelta(minutes=1)), ("ohlc_1h", timedelta(hours=1)), ("ohlc_1d", DAY))
ORIGIN: Final = datetime(2000, 1, 3, tzinfo=UTC)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: New York changes its clocks in March and November, Lord Howe by half an hour in April and October.
ZONES: Final = (
    "UTC",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Africa/Casablanca",
    "Europe/Berlin",
)
FILLS: Final[tuple[Fill, ...]] = ("none", "none", "null", "previous")
PRICES: Final[tuple[BarPrice, ...]] = ("last", "mid")

#: Symbol, and nanoseconds since 1970.
Key = tuple[str, int]
#: A quote as it is stored, by column.
Row = dict[str, Any]


def stored_row(symbol: str, instant: int, **values: Any) -> Row:
    """A quote as it is stored, null where nothing is given."""
    given = {"symbol": symbol, "timestamp": floor(instant), "nanos": instant % 1000, **values}
    return {name: given.get(name) for name in COLUMNS.names}


def key_of(row: Row) -> Key:
    return row["symbol"], nanoseconds(row["timestamp"]) + row["nanos"]


def sent(row: Row) -> Row:
    """A quote as a client sends it."""
    return {**{name: row[name] for name in ("symbol", *VALUES)}, "timestamp": rfc3339_nano(key_of(row)[1])}


def midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


class Model:
    """What a store without chunks, columnstore and rollups would answer."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}
        self.newest: dict[str, Row] = {}
        #: Quotes before it were dropped by retention; their bars stay.
        self.kept_from = EPOCH
        #: Symbols of which quotes were deleted behind the service's back, whose newest quote is not promised.
        self.unknown: set[str] = set()

    def write(self, rows: list[Row], on_conflict: str) -> None:
        for row in rows:
            key = key_of(row)
            stored = self.rows.get(key)
            if stored is None or on_conflict == "update":
                stored = row
            elif on_conflict == "merge":
                stored = {name: stored[name] if value is None else value for name, value in row.items()}
            self.rows[key] = stored
            held = self.newest.get(row["symbol"])
            if held is None or key >= key_of(held):
                self.newest[row["symbol"]] = stored

    def delete(self, symbol: str, start: int, end: int) -> None:
        for key in [key for key in self.rows if key[0] == symbol and start <= key[1] < end]:
            del self.rows[key]
        if symbol in self.newest and start <= key_of(self.newest[symbol])[1] < end:
            left = [row for row in self.raw() if row["symbol"] == symbol]
            del self.newest[symbol]
            if left:
                self.newest[symbol] = left[-1]

    def raw(self) -> list[Row]:
        kept_from = nanoseconds(self.kept_from)
        return [self.rows[key] for key in sorted(self.rows) if key[1] >= kept_from]

    def bars(self, width: timedelta, price: BarPrice = "last") -> list[tuple[Any, ...]]:
        grouped: dict[tuple[str, datetime], list[tuple[Decimal, Decimal | None]]] = {}
        for key in sorted(self.rows):
            row = self.rows[key]
            value = _value(row, price)
            if value is not None:
                bucket = row["timestamp"] - (row["timestamp"] - ORIGIN) % width
                grouped.setdefault((row["symbol"], bucket), []).append((value, row["volume"]))
        return [(*place, *_bar(values)) for place, values in grouped.items()]

    def bars_between(self, starts: list[datetime], edges: list[datetime], symbol: str, spec: BarSpec) -> list[Any]:
        """A symbol's bars with these starts, gaps filled as asked for."""
        values = [
            (row["timestamp"], (value, row["volume"]))
            for key, row in sorted(self.rows.items())
            if key[0] == symbol and (value := _value(row, spec.price)) is not None
        ]
        close = None
        if spec.fill == "previous" and starts:
            close = next((value for at, (value, _) in reversed(values) if at < starts[0]), None)
        begun, bars = close is not None, []
        for slot in oracle.slots(edges, values):
            if slot.start not in starts:
                continue
            if slot.values:
                bars.append((symbol, slot.start, *_bar(list(slot.values))))
                begun, close = True, slot.values[-1][0] if spec.fill == "previous" else None
            elif begun and spec.fill != "none":
                bars.append((symbol, slot.start, *[close] * 4, None, None, 0))
        return bars


def _of_json(text: str) -> tuple[Any, ...]:
    row = json.loads(text, parse_float=Decimal, parse_int=Decimal)
    names = ("open", "high", "low", "close", "volume", "vwap", "count")
    return (row["symbol"], datetime.fromisoformat(row["timestamp"]), *(row[name] for name in names))


def _value(row: Row, price: BarPrice) -> Decimal | None:
    if price == "last":
        return row["price"]  # type: ignore[no-any-return]
    return None if row["bid"] is None or row["ask"] is None else (row["bid"] + row["ask"]) / 2


def _bar(values: list[tuple[Decimal, Decimal | None]]) -> tuple[Any, ...]:
    prices = [price for price, _ in values]
    traded = [(price, volume) for price, volume in values if volume is not None]
    volume = sum(volume for _, volume in traded) if traded else None
    vwap = None
    if volume:
        with localcontext(prec=60):
            turnover = sum((price * size for price, size in traded), Decimal(0))
            vwap = (turnover / volume).quantize(Decimal("1e-16"), ROUND_HALF_UP)
    return (prices[0], max(prices), min(prices), prices[-1], volume, vwap, len(values))


def tuples(bars: list[Bar]) -> list[tuple[Any, ...]]:
    return [(b.symbol, b.timestamp, b.open, b.high, b.low, b.close, b.volume, b.vwap, b.count) for b in bars]


class Sequence:
    """One sequence of operations on the store and on the model."""

    def __init__(self, lane: Lane, database: Database, rng: random.Random) -> None:
        self.lane = lane
        self.database = database
        self.rng = rng
        self.model = Model()
        self.community = database.capability.level >= Level.COMMUNITY
        self.symbols = sorted(random_symbol() for _ in range(rng.randint(2, 4)))
        self.now = datetime.now(UTC)
        # A few days of the span, so that quotes meet in chunks and buckets.
        self.days = sorted(rng.sample(range(61), rng.randint(4, 12)))
        self.quotes = QuoteRepository(database, lane.make_settings())
        self.log: list[str] = []

    @property
    def floor(self) -> datetime:
        """Where a refresh may begin."""
        return self.database.facts.dropped_before or EPOCH

    @property
    def oldest(self) -> int:
        """Before it ingest takes nothing."""
        oldest = self.database.facts.oldest(datetime.now(UTC) + timedelta(minutes=5))
        return nanoseconds(oldest or EPOCH)

    async def keep(self, retention: timedelta | None, *reset: str) -> None:
        """Another retention. Time is not made to pass; it shrinks instead, which moves its edge the same way."""
        async with self.database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
            await connection.execute("UPDATE quotes.settings SET retention = $1", retention)
            for statement in reset:
                await patiently(connection, statement)
            self.database.facts = await read_facts(connection, self.database.facts)

    def moment(self) -> int:
        """An instant that ingest takes, on the seconds or off them, in nanoseconds since 1970."""
        rng = self.rng
        while True:
            day = midnight(self.now - rng.choice(self.days) * DAY)
            at = day + timedelta(hours=rng.choice((0, 1, 12, 23)), minutes=rng.choice((0, 1, 6, 7, 30, 59)))
            at += timedelta(seconds=rng.choice((0, 0, 1, 30, 59)), microseconds=rng.choice((0, 0, 1, 999_999)))
            instant = nanoseconds(at) + rng.choice((0, 0, 1, 2, 999))
            if max(nanoseconds(self.now - SPAN), self.oldest) <= instant <= nanoseconds(self.now):
                return instant

    def row(self, symbol: str, at: int) -> Row:
        rng = self.rng
        price, bid, ask = (rng.choice((None, Decimal(rng.randint(1, 10_000)) / 8)) for _ in range(3))
        return stored_row(
            symbol, at, price=Decimal(7) if price is bid is ask is None else price, bid=bid, ask=ask,
            bid_size=rng.choice((None, 0, 5)), volume=rng.choice((None, 0, 1, Decimal("0.125"), 100)),
            source=rng.choice((None, "a")),
        )  # fmt: skip

    async def sql(self, statement: str, *arguments: Any) -> list[Any]:
        async with self.database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
            return list(await connection.fetch(statement, *arguments))

    async def call(self, statement: str) -> None:
        async with self.database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
            await patiently(connection, statement)

    # --- operations: each says what it did ---

    async def write(self, rows: list[Row], on_conflict: Any = "update") -> str:
        unique = {key_of(row): row for row in rows}
        given = list(unique.values())
        receipt = await self.quotes.bulk_insert([sent(row) for row in given], on_conflict=on_conflict)
        expected = sum(key not in self.model.rows for key in unique)
        assert receipt.inserted == expected, (receipt, expected)
        self.model.write(given, on_conflict)
        return f"wrote {len(given)} by {on_conflict}"

    async def in_order(self) -> str:
        moments = sorted(self.moment() for _ in range(self.rng.randint(5, 40)))
        return await self.write([self.row(self.rng.choice(self.symbols), at) for at in moments])

    async def late(self) -> str:
        symbol, at = self.rng.choice(self.symbols), self.moment()
        rule = self.rng.choice(("update", "merge", "ignore"))
        return f"late {symbol} {rfc3339_nano(at)}: " + await self.write([self.row(symbol, at)], rule)

    async def corrections(self) -> str:
        known = [row for row in self.model.raw() if key_of(row)[1] >= self.oldest]
        if not known:
            return "nothing to correct"
        rows = self.rng.sample(known, min(len(known), self.rng.randint(1, 10)))
        changed = [self.row(*key_of(row)) if self.rng.random() < 0.7 else row for row in rows]
        fresh = [self.row(self.rng.choice(self.symbols), self.moment()) for _ in range(self.rng.randint(0, 3))]
        return "corrections: " + await self.write(changed + fresh, self.rng.choice(("update", "merge", "ignore")))

    async def delete(self) -> str:
        symbol = self.rng.choice(self.symbols)
        start = self.moment() + self.rng.choice((0, 0, 1))
        end = start + self.rng.choice((1, 2, 1000, 7 * 60 * 10**9, 86_400 * 10**9, 20 * 86_400 * 10**9))
        what = f"deleted {symbol} from {rfc3339_nano(start)} to {rfc3339_nano(end)}"
        expected = sum(key_of(row)[0] == symbol and start <= key_of(row)[1] < end for row in self.model.raw())
        self.model.delete(symbol, start, end)
        if self.rng.random() < 0.8:
            assert await self.quotes.delete_quotes(symbol, start, end) == expected, what
            return what
        await self.sql(
            "DELETE FROM quotes.real_time WHERE symbol = $1"
            " AND (timestamp, nanos) >= ($2, $3) AND (timestamp, nanos) < ($4, $5)",
            symbol, floor(start), start % 1000, floor(end), end % 1000,
        )  # fmt: skip
        self.model.unknown.add(symbol)
        return what + " by SQL"

    async def chunks(self, *, compressed: bool) -> list[str]:
        rows = await self.sql(
            "SELECT format('%I.%I', chunk_schema, chunk_name) FROM timescaledb_information.chunks"
            " WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time' AND is_compressed = $1"
            " ORDER BY range_start",
            compressed,
        )
        names = [row[0] for row in rows]
        return self.rng.sample(names, min(len(names), self.rng.randint(1, 6)))

    async def compress(self) -> str:
        found = await self.chunks(compressed=False)
        for chunk in found:
            await self.call(f"CALL convert_to_columnstore('{chunk}')")
        return f"compressed {len(found)} chunks"

    async def decompress(self) -> str:
        found = await self.chunks(compressed=True)
        for chunk in found:
            await self.call(f"CALL convert_to_rowstore('{chunk}')")
        return f"decompressed {len(found)} chunks"

    async def refresh(self) -> str:
        start = self.now - SPAN - DAY + self.rng.random() * SPAN
        end = start + self.rng.random() * self.rng.choice((timedelta(hours=3), 3 * DAY, SPAN))
        chosen = self.rng.sample(ROLLUPS, self.rng.randint(1, 3))
        return "; ".join([await self.refresh_window(*rollup, start, end) for rollup in chosen])

    async def refresh_window(self, name: str, width: timedelta, start: datetime, end: datetime) -> str:
        start = max(start, self.floor)
        if end - start < 2 * width:
            return "refresh of less than a bucket"
        # By default a transaction takes 10 buckets, of which two months of minutes have 8,640 times as many.
        buckets = self.rng.choice((0, 1440, 5000))
        await self.call(
            f"CALL refresh_continuous_aggregate('quotes.{name}', '{start}', '{end}',"
            f""" options => '{{"buckets_per_batch": {buckets}}}')"""
        )
        return f"refreshed {name} from {start} to {end} by {buckets}"

    async def policies(self) -> str:
        """The refresh policies, in their order."""
        for name, width in ROLLUPS:
            await self.refresh_window(name, width, self.floor, self.now - width)
        return f"refreshed all from {self.floor}"

    async def retention_passes(self) -> str:
        """What is older than retention is dropped, whatever the policies have refreshed; later it may grow again."""
        retention = self.database.facts.retention
        assert retention is not None
        if self.rng.random() < 0.3:
            await self.keep(retention + self.rng.randint(1, 9) * DAY)
            return f"retention is {self.database.facts.retention} again"
        if retention <= 40 * DAY:
            return "retention is over"
        await self.keep(retention - self.rng.randint(1, 9) * DAY, "CALL quotes.apply_retention(NULL, NULL)")
        model, dropped = self.model, self.database.facts.dropped_before
        if dropped is not None:
            model.kept_from = max(model.kept_from, dropped)
            for symbol in [s for s, row in model.newest.items() if row["timestamp"] < dropped]:
                del model.newest[symbol]
        return f"dropped what is before {dropped}"

    def operations(self) -> list[tuple[Callable[[], Awaitable[str]], int]]:
        common: list[tuple[Callable[[], Awaitable[str]], int]] = [
            (self.in_order, 3), (self.late, 4), (self.corrections, 4), (self.delete, 2),
        ]  # fmt: skip
        if not self.community:
            return common
        return [
            *common,
            (self.compress, 2), (self.decompress, 1), (self.refresh, 5), (self.policies, 2), (self.retention_passes, 1),
        ]  # fmt: skip

    # --- comparison ---

    async def compare(self) -> None:
        model, quotes = self.model, self.quotes
        start, end = self.now - 90 * DAY, self.now + DAY
        found = await quotes.get_quotes(self.symbols, start, end, limit=100_000)
        assert [row.to_dict() for row in found] == model.raw(), "range"
        assert await quotes.count_quotes(self.symbols) == len(model.raw()), "count"
        for symbol in self.symbols:
            if symbol not in model.unknown:
                latest = await quotes.get_latest_quote(symbol)
                assert (latest and latest.to_dict()) == model.newest.get(symbol), f"latest of {symbol}"
        for price in PRICES:
            for interval, width in INTERVALS:
                bars = await quotes.get_bars(self.symbols, interval, start, end, price=price, limit=100_000)
                assert tuples(bars) == model.bars(width, price), f"bars of {interval}, {price}"
        await self.compare_a_range(start)
        for _ in range(3):
            await self.compare_pages_of_bars()

    async def compare_a_range(self, start: datetime) -> None:
        """A range that begins and ends anywhere: the quotes in it, and the bars that start in it, whole."""
        model, quotes = self.model, self.quotes
        first, last = sorted((self.moment(), self.moment() + self.rng.choice((1, 2, 1000, 10**12))))
        if first < last:
            inside = [row for row in model.raw() if first <= key_of(row)[1] < last]
            ranged = await quotes.get_quotes(self.symbols, first, last, limit=100_000)
            assert [row.to_dict() for row in ranged] == inside, f"range from {first} to {last}"
            assert await quotes.count_quotes(self.symbols, first, last) == len(inside)
        interval, width = self.rng.choice(INTERVALS)
        price = self.rng.choice(PRICES)
        low = start + self.rng.random() * SPAN
        high = low + width + self.rng.random() * 40 * DAY
        bars = await quotes.get_bars(self.symbols, interval, low, high, price=price, limit=100_000)
        expected = [bar for bar in model.bars(width, price) if low <= bar[1] < high]
        assert tuples(bars) == expected, f"bars of {interval}, {price}, from {low} to {high}"

    async def compare_pages_of_bars(self) -> None:
        """Bars of any kind that begin in any range, page by page in either order, or the last ones."""
        rng = self.rng
        interval = rng.choice(("1m", "15m", "1h", "4h", "12h", "1d", "2d", "1w", "1M"))
        tz, day_start = rng.choice(ZONES), rng.choice(("00:00", "00:00", "17:00", "09:30"))
        spec = BarSpec(Interval.parse(interval), rng.choice(PRICES), tz, rng.choice(FILLS), day_start)
        low = self.now - SPAN + rng.random() * (SPAN - DAY)
        high = min(low + rng.randint(1, 60) * spec.interval.width, self.now)
        last = rng.choice((None, None, rng.randint(1, 5)))
        sort: Sort = "desc" if last else rng.choice(("asc", "desc"))
        edges = oracle.edges(interval, tz, day_start, low, high + spec.interval.width + 2 * DAY)
        expected = []
        for symbol in self.symbols:
            bars = self.model.bars_between([edge for edge in edges[:-1] if edge < high], edges, symbol, spec)
            bars = bars[-last:] if last else bars
            expected += bars[::-1] if sort == "desc" else bars
        limit = last * len(self.symbols) if last else rng.choice((1, 2, 7, 1000))
        wanted = Range(self.symbols, nanoseconds(low), nanoseconds(high), limit, sort, last)
        found: list[tuple[Any, ...]] = []
        while True:
            page, _ = await self.quotes.bars_page(wanted, spec)
            found += [_of_json(row) for row in page.rows]
            if page.next is None:
                break
            assert len(page.rows) == limit
            wanted = replace(wanted, after=page.next)
        assert found == expected, f"{spec}, {sort} by {limit}, last {last}, from {low} to {high}"

    async def run(self) -> None:
        if self.community:
            forget = "UPDATE quotes.settings SET dropped_before = NULL"
            await self.keep(75 * DAY, forget, "TRUNCATE quotes.real_time, quotes.latest")
            for name, _ in ROLLUPS:
                await self.call(f"TRUNCATE quotes.{name}")
        operations, weights = zip(*self.operations(), strict=True)
        self.log.append(await self.in_order())
        if self.community and self.rng.random() < 0.8:
            # Past a rollup's watermark nothing can be stale: most sequences begin with rollups that are filled.
            self.log.append(await self.policies())
        await self.compare()
        for _ in range(self.rng.randint(5, 15)):
            (operation,) = self.rng.choices(operations, weights)
            self.log.append(f"{operation.__name__}: {await operation()}")
            await self.compare()


async def without_scheduler(connection: Connection) -> None:
    """Policies run when a sequence says so."""
    for row in await connection.fetch("SELECT job_id FROM timescaledb_information.jobs WHERE job_id >= 1000"):
        await connection.execute("SELECT alter_job($1, scheduled => false)", row[0])


@pytest.mark.timeout(240 + 20 * SEQUENCES)
async def test_sequences_answer_as_the_model(lane: Lane, empty_url: str, record_property: Any) -> None:
    await migrate(empty_url, lane.make_settings())
    database = Database(empty_url, lane.make_settings(statement_timeout="60 seconds"))
    await database.connect()
    operations = 0
    try:
        if database.capability.level >= Level.COMMUNITY:
            async with database.dedicated() as connection:
                await without_scheduler(connection)
        for number in range(FIRST, FIRST + SEQUENCES):
            sequence = Sequence(lane, database, random.Random(f"{SEED}/{number}"))
            try:
                await sequence.run()
            except Exception as error:
                steps = "\n  ".join(sequence.log)
                raise AssertionError(
                    f"seed {SEED}, sequence {number}: {type(error).__name__} after\n  {steps}\n{error}"
                ) from error
            operations += len(sequence.log)
    finally:
        await database.close()
    result = f"{SEQUENCES} sequences from {FIRST} of {operations} operations, seed {SEED}: 0 differences"
    record_property("differential", result)
    about[lane.name] += f"; {result}"
