"""The repository on a real database: what is written is what is read, whatever the order and the overlap."""

import asyncio
import json
import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.batch import Batch
from app.db.engine import Database
from app.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidQuotes,
    InvalidRequest,
    OutcomeUnknown,
    QueryTimeout,
    QuotesError,
)
from app.model import Interval, OnConflict, Receipt, Terms
from app.repository.bars import BarPrice, BarSpec
from app.repository.ingest import Write
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Position, Range, Sort, day_bounds
from tests.conftest import Lane, random_symbol

T0 = datetime(2026, 11, 16, tzinfo=UTC)  # a Monday
Key = tuple[str, datetime]


def quote(symbol: str, at: datetime | int, price: Any = 1, **fields: Any) -> dict[str, Any]:
    when = T0 + timedelta(seconds=at) if isinstance(at, int) else at
    return {"symbol": symbol, "timestamp": when, "price": price, **fields}


async def stored(quotes: QuoteRepository, *symbols: str) -> dict[Key, dict[str, Any]]:
    rows = await quotes.get_quotes(symbols, T0 - timedelta(days=800), T0 + timedelta(days=6), limit=1_000_000)
    return {(row.symbol, row.timestamp): row.to_dict() for row in rows}


async def test_every_column_comes_back(quotes: QuoteRepository, symbol: str) -> None:
    given_ = quote(
        symbol, 0, Decimal("0.00000001"), bid=Decimal("123456789012.12345678"), ask=2, bid_size=0,
        ask_size=2**63 - 1, volume=7, source='qu"ote\\ é',
    )  # fmt: skip
    receipt = await quotes.bulk_insert([given_])
    assert receipt == Receipt(1, 1, 0, 0, 0, 0, 1, [])
    assert list((await stored(quotes, symbol)).values()) == [given_]
    newest = await quotes.get_latest_quote(symbol.lower())
    assert newest is not None
    assert newest.to_dict() == given_
    assert repr(newest) == f"RealTimeQuote({symbol!r}, 2026-11-16T00:00:00+00:00, 1E-8)"


async def test_conflict_rules(quotes: QuoteRepository, symbol: str) -> None:
    first, second = quote(symbol, 0, 1), quote(symbol, 1, 1)
    assert (await quotes.bulk_insert([first, second])).inserted == 2
    again = [quote(symbol, 0, 2), second, quote(symbol, 2, 1)]
    with pytest.raises(Conflict) as caught:
        await quotes.bulk_insert(again, on_conflict="error")
    assert [(r.index, r.pointer, r.code) for r in caught.value.rejections] == [
        (0, "/0/timestamp", "already-stored"),
        (1, "/1/timestamp", "already-stored"),
    ]
    assert len(await stored(quotes, symbol)) == 2, "nothing of a refused batch is stored"

    skipped = await quotes.bulk_insert(again, on_conflict="error", on_error="skip")
    assert (skipped.inserted, [r.index for r in skipped.rejected]) == (1, [0, 1])
    ignored = await quotes.bulk_insert([*again, quote(symbol, 3)], on_conflict="ignore")
    assert (ignored.inserted, ignored.unchanged, ignored.updated) == (1, 3, 0)
    updated = await quotes.bulk_insert([*again, quote(symbol, 4)])
    assert (updated.inserted, updated.updated, updated.unchanged) == (1, 1, 2)
    assert (await stored(quotes, symbol))[symbol, T0]["price"] == 2


async def test_a_refused_row_refuses_the_batch(quotes: QuoteRepository, symbol: str) -> None:
    with pytest.raises(InvalidQuotes):
        await quotes.bulk_insert([quote(symbol, 0), quote(symbol, 1, -1)])
    assert await stored(quotes, symbol) == {}
    receipt = await quotes.bulk_insert([quote(symbol, 0), quote(symbol, 1, -1)], on_error="skip")
    assert (receipt.inserted, len(receipt.rejected)) == (1, 1)


async def test_a_flush_of_many_requests_gives_each_its_own_receipt(quotes: QuoteRepository, symbol: str) -> None:
    await quotes.bulk_insert([quote(symbol, 0), quote(symbol, 1)])

    def write(rows: list[dict[str, Any]], on_conflict: OnConflict = "update") -> Write:
        return Write(Batch.from_rows(rows, Terms(on_conflict=on_conflict)), on_conflict)

    results = await quotes.write(
        [
            write([quote(symbol, 0, 5), quote(symbol, 10)]),
            write([quote(symbol, 1), quote(symbol, 11)], "error"),
            write([quote(symbol, 0, 6), quote(symbol, 10)], "ignore"),
            write([quote(symbol, 12)]),
        ]
    )
    assert isinstance(results[1], Conflict)
    receipts = [(r.inserted, r.updated, r.unchanged) for r in results if isinstance(r, Receipt)]
    assert receipts == [(1, 1, 0), (0, 0, 2), (1, 0, 0)]
    assert {at.second for _, at in await stored(quotes, symbol)} == {0, 1, 10, 12}


async def test_latest_follows_late_corrected_and_ignored_quotes(quotes: QuoteRepository, symbol: str) -> None:
    async def newest() -> tuple[int, int]:
        row = await quotes.get_latest_quote(symbol)
        assert row is not None
        return row.timestamp.second, int(row.price)

    assert await quotes.get_latest_quote(symbol) is None
    await quotes.bulk_insert([quote(symbol, 5, 1)])
    await quotes.bulk_insert([quote(symbol, 3, 2)])
    assert await newest() == (5, 1)
    await quotes.bulk_insert([quote(symbol, 5, 3), quote(symbol, 4, 9)])
    assert await newest() == (5, 3)
    await quotes.bulk_insert([quote(symbol, 5, 4)], on_conflict="ignore")
    assert await newest() == (5, 3)
    await quotes.bulk_insert([quote(symbol, 6, 7), quote(symbol, 5, 8)])
    assert await newest() == (6, 7)
    (span,) = [s for s in await quotes.get_symbols() if s.symbol == symbol]
    assert (span.first, span.last) == (T0 + timedelta(seconds=3), T0 + timedelta(seconds=6))


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    batches=st.lists(
        st.tuples(
            st.sampled_from(["update", "ignore"]),
            st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=20),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_sequence_of_batches_equals_a_dict(
    lane: Any, batches: list[tuple[OnConflict, list[tuple[int, int, int]]]]
) -> None:
    async def check() -> None:
        database = Database(lane.url, lane.make_settings())
        await database.connect()
        try:
            await _against_a_dict(QuoteRepository(database, lane.make_settings()), batches)
        finally:
            await database.close()

    # hypothesis calls a plain function: its examples run on an event loop of their own, in a thread.
    _in_thread(check())


async def _against_a_dict(
    quotes: QuoteRepository, batches: list[tuple[OnConflict, list[tuple[int, int, int]]]]
) -> None:
    symbols = [random_symbol() for _ in range(3)]
    model: dict[Key, int] = {}
    for on_conflict, rows in batches:
        before = dict(model)
        for s, at, price in rows:
            key = (symbols[s], T0 + timedelta(seconds=at))
            if on_conflict == "update" or key not in model:
                model[key] = price
        receipt = await quotes.bulk_insert([quote(symbols[s], at, p) for s, at, p in rows], on_conflict=on_conflict)
        assert receipt.inserted == len(model) - len(before)
        assert receipt.updated == sum(model[key] != price for key, price in before.items())
        keys = {(symbols[s], T0 + timedelta(seconds=at)) for s, at, _ in rows}
        assert receipt.superseded == len(rows) - len(keys)
        assert receipt.received == receipt.inserted + receipt.updated + receipt.unchanged + receipt.superseded
    assert {key: row["price"] for key, row in (await stored(quotes, *symbols)).items()} == model
    for symbol in {s for s, _ in model}:
        newest = await quotes.get_latest_quote(symbol)
        assert newest is not None
        last = max(at for s, at in model if s == symbol)
        assert newest.timestamp == last
        assert newest.price == model[symbol, last]


def _in_thread(coroutine: Any) -> None:
    import threading  # noqa: PLC0415

    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(coroutine)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


@pytest.mark.concurrent
async def test_concurrent_overlapping_batches_lose_nothing(quotes: QuoteRepository) -> None:
    symbols = [random_symbol() for _ in range(4)]
    rng = random.Random(7)
    batches = [
        [quote(rng.choice(symbols), rng.randrange(400), rng.randrange(1, 9)) for _ in range(100)] for _ in range(40)
    ]
    receipts = await asyncio.gather(*(quotes.bulk_insert(batch) for batch in batches))
    found = await stored(quotes, *symbols)
    assert found.keys() == {(q["symbol"], q["timestamp"]) for batch in batches for q in batch}
    assert sum(r.inserted for r in receipts) == len(found)
    for symbol in symbols:
        newest = await quotes.get_latest_quote(symbol)
        assert newest is not None
        last = max(at for s, at in found if s == symbol)
        assert newest.to_dict() == found[symbol, last]


# --- reading ---


@pytest.fixture(scope="module")
async def market(quotes: QuoteRepository) -> dict[Key, dict[str, Any]]:
    """Ticks of three symbols over ten days, with gaps, by key."""
    rng = random.Random(11)
    rows: dict[Key, dict[str, Any]] = {}
    for symbol in sorted(random_symbol() for _ in range(3)):
        for _ in range(700):
            at = T0 - timedelta(days=7) + timedelta(microseconds=rng.randrange(10 * 86_400_000_000))
            rows[symbol, at] = quote(
                symbol, at, Decimal(rng.randrange(1, 10**6)).scaleb(-2),
                bid=Decimal(rng.randrange(1, 10**6)).scaleb(-3) if rng.random() < 0.8 else None,
                ask=Decimal(rng.randrange(1, 10**6)).scaleb(-3) if rng.random() < 0.8 else None,
                volume=rng.randrange(100) if rng.random() < 0.8 else None,
            )  # fmt: skip
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    await quotes.bulk_insert(shuffled)
    return rows


WHOLE = (T0 - timedelta(days=30), T0 + timedelta(days=30))


@pytest.mark.parametrize("sort", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 7, 700, 699, 5000])
async def test_pages_joined_equal_the_whole(
    quotes: QuoteRepository, market: dict[Key, dict[str, Any]], sort: Sort, limit: int
) -> None:
    symbols = sorted({s for s, _ in market})
    start = T0 - timedelta(days=1) if limit == 1 else WHOLE[0]
    end = start + timedelta(hours=12) if limit == 1 else WHOLE[1]
    expected = sorted((key for key in market if start <= key[1] < end), key=lambda k: k[1], reverse=sort == "desc")
    expected.sort(key=lambda k: k[0])
    wanted = Range(symbols, start, end, limit, sort)
    assert await _all_keys(quotes, wanted) == expected


@pytest.mark.parametrize(("limit", "per_symbol"), [(4, 10), (10, 4), (5, 5), (1000, 1)])
@pytest.mark.parametrize("sort", ["asc", "desc"])
async def test_limit_per_symbol_holds_across_pages(
    quotes: QuoteRepository, market: dict[Key, dict[str, Any]], limit: int, per_symbol: int, sort: Sort
) -> None:
    expected: list[Key] = []
    for symbol in sorted({s for s, _ in market}):
        of_symbol = sorted((key for key in market if key[0] == symbol), reverse=sort == "desc")
        expected += of_symbol[:per_symbol]
    wanted = Range([s for s, _ in market], *WHOLE, limit, sort, per_symbol)
    assert await _all_keys(quotes, wanted) == expected


async def _all_keys(quotes: QuoteRepository, wanted: Range) -> list[Key]:
    keys: list[Key] = []
    after: Position | None = None
    while True:
        page = await quotes.quotes_page(
            Range(wanted.symbols, wanted.start, wanted.end, wanted.limit, wanted.sort, wanted.limit_per_symbol, after)
        )
        rows = pl.read_json(f"[{page.rows}]".encode()).to_dicts() if page.rows else []
        assert len(rows) == page.count <= wanted.limit
        keys += [(row["symbol"], datetime.fromisoformat(row["timestamp"])) for row in rows]
        if page.next is None:
            return keys
        assert page.count == wanted.limit
        after = page.next


async def test_range_bounds_and_limits(quotes: QuoteRepository, symbol: str) -> None:
    await quotes.bulk_insert([quote(symbol, i) for i in range(5)])
    found = await quotes.get_quotes(symbol, T0 + timedelta(seconds=1), T0 + timedelta(seconds=3))
    assert [row.timestamp.second for row in found] == [1, 2]
    found = await quotes.get_quotes([symbol], T0, T0 + timedelta(seconds=5), limit=2, sort="desc")
    assert [row.timestamp.second for row in found] == [4, 3]
    for bad in (
        quotes.get_quotes(symbol, T0, T0),
        quotes.get_quotes(symbol, T0 + timedelta(1), T0),
        quotes.get_quotes(symbol, T0.replace(tzinfo=None), T0 + timedelta(1)),
        quotes.get_quotes("no such symbol", T0, T0 + timedelta(1)),
        quotes.get_quotes(symbol, T0, T0 + timedelta(1), limit=0),
    ):
        with pytest.raises(InvalidRequest):
            await bad


async def test_counts(quotes: QuoteRepository, market: dict[Key, dict[str, Any]]) -> None:
    symbols = sorted({s for s, _ in market})
    assert await quotes.count_quotes(symbols) == len(market)
    assert await quotes.count_quotes(symbols[0], T0) == sum(s == symbols[0] and at >= T0 for s, at in market)
    assert await quotes.count_quotes(symbols[:2], T0, T0 + timedelta(1)) == sum(
        s in symbols[:2] and T0 <= at < T0 + timedelta(1) for s, at in market
    )
    assert await quotes.count_quotes() >= len(market)
    assert await quotes.count_quotes(symbols, estimate=True) >= 0


async def test_a_day_of_a_time_zone(quotes: QuoteRepository, symbol: str) -> None:
    # New York's clocks went back on 2026-11-01: the day has 25 hours.
    start, end = day_bounds(date(2026, 11, 1), "America/New_York")
    assert end - start == timedelta(hours=25)
    tick = timedelta(microseconds=1)
    await quotes.bulk_insert([quote(symbol, at) for at in (start - tick, start, end - tick, end)])
    found = await quotes.get_intraday_quotes(symbol, date(2026, 11, 1), tz="America/New_York")
    assert [row.timestamp for row in found] == [start, end - tick]
    for bad in ("Mars/Olympus", "", "../etc/passwd", "America"):
        with pytest.raises(InvalidRequest):
            await quotes.get_intraday_quotes(symbol, date(2026, 11, 1), tz=bad)
    with pytest.raises(InvalidRequest):
        day_bounds(date.max, "UTC")


# --- bars ---


def resample(rows: Sequence[dict[str, Any]], every: str, value: pl.Expr) -> list[dict[str, Any]]:
    """The bars that polars makes of raw quotes; windows of n days or weeks start from Monday 2000-01-03."""
    frame = pl.DataFrame(
        rows,
        schema={
            "symbol": pl.String, "timestamp": pl.Datetime("us", "UTC"), "price": pl.Decimal(38, 8),
            "bid": pl.Decimal(38, 8), "ask": pl.Decimal(38, 8), "volume": pl.Int64,
        },
    )  # fmt: skip
    frame = frame.with_columns(value=value).drop_nulls("value").sort("timestamp")
    if not every.endswith("mo"):
        frame = frame.with_columns(pl.col("timestamp") - (T_ORIGIN - EPOCH))
    grouped = frame.group_by_dynamic("timestamp", every=every, group_by="symbol", start_by="window").agg(
        open=pl.col("value").first(),
        high=pl.col("value").max(),
        low=pl.col("value").min(),
        close=pl.col("value").last(),
        volume=pl.col("volume").sum(),
        volumes=pl.col("volume").count(),
        turnover=pl.struct("value", "volume"),
        count=pl.len(),
    )
    bars = []
    for row in grouped.sort("symbol", "timestamp").iter_rows(named=True):
        traded = [(t["value"], t["volume"]) for t in row.pop("turnover") if t["volume"] is not None]
        volume = sum(v for _, v in traded)
        row["vwap"] = round(sum(p * v for p, v in traded) / volume, 8) if volume else None
        row["volume"] = row["volume"] if row.pop("volumes") else None
        if not every.endswith("mo"):
            row["timestamp"] += T_ORIGIN - EPOCH
        bars.append(row)
    return bars


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
T_ORIGIN = datetime(2000, 1, 3, tzinfo=UTC)
POLARS_UNITS = {"s": "s", "m": "m", "h": "h", "d": "d", "w": "d", "M": "mo"}


def polars_every(interval: str) -> str:
    parsed = Interval.parse(interval)
    return f"{parsed.count * (7 if parsed.unit == 'w' else 1)}{POLARS_UNITS[parsed.unit]}"


@pytest.mark.parametrize("interval", ["1s", "45s", "1m", "5m", "7m", "90m", "1h", "4h", "1d", "3d", "1w", "1M", "5M"])
async def test_bars_equal_a_resample(quotes: QuoteRepository, market: dict[Key, dict[str, Any]], interval: str) -> None:
    await _check_bars(quotes, market, interval, "last", pl.col("price"))


@pytest.mark.parametrize(
    ("price", "value"),
    [("bid", pl.col("bid")), ("ask", pl.col("ask")), ("mid", (pl.col("bid") + pl.col("ask")) * Decimal("0.5"))],
)
async def test_bars_of_other_prices(
    quotes: QuoteRepository, market: dict[Key, dict[str, Any]], price: BarPrice, value: pl.Expr
) -> None:
    await _check_bars(quotes, market, "1h", price, value)


@pytest.mark.parametrize("tz", ["America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"])
@pytest.mark.parametrize("interval", ["1d", "1w", "1M", "2d"])
async def test_days_of_a_time_zone(quotes: QuoteRepository, symbol: str, tz: str, interval: str) -> None:
    """Across the changes of the clocks: New York's in November, Lord Howe's half an hour in October."""
    rng = random.Random(5)
    start = datetime(2026, 9, 20, tzinfo=UTC)
    rows = [
        quote(symbol, start + timedelta(minutes=rng.randrange(60 * 24 * 60)), rng.randrange(1, 999), volume=1)
        for _ in range(1500)
    ]
    await quotes.bulk_insert(rows)
    unique = {row["timestamp"]: row for row in rows}
    every = {"1d": "1d", "1w": "1w", "1M": "1mo", "2d": "2d"}[interval]
    frame = (
        pl.DataFrame([(at, int(row["price"])) for at, row in unique.items()], schema=["at", "price"], orient="row")
        .with_columns(pl.col("at").cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(tz))
        .sort("at")
    )
    if every == "2d":  # polars counts from 1970-01-01, the store from 2000-01-03: an odd number of days apart
        local = frame["at"].dt.date()
        origin = date(2000, 1, 3)
        first = [day - timedelta(days=(day - origin).days % 2) for day in local]
        frame = frame.with_columns(bucket=pl.Series(first))
    else:
        frame = frame.with_columns(bucket=pl.col("at").dt.truncate(every).dt.date())
    wanted = frame.group_by("bucket").agg(
        open=pl.col("price").first(), high=pl.col("price").max(), low=pl.col("price").min(),
        close=pl.col("price").last(), count=pl.len(),
    ).sort("bucket")  # fmt: skip
    bars = await quotes.get_bars(
        symbol, interval, start - timedelta(days=60), start + timedelta(days=90), tz=tz, limit=1000
    )
    found = [
        (bar.timestamp.astimezone(ZoneInfo(tz)), int(bar.open), int(bar.high), int(bar.low), int(bar.close), bar.count)
        for bar in bars
    ]
    assert all(at.time() == time() for at, *_ in found), "bars begin at local midnight"
    assert [(at.date(), *rest) for at, *rest in found] == wanted.rows()


async def test_hours_of_a_time_zone_are_counted_from_midnight(quotes: QuoteRepository, symbol: str) -> None:
    # Kolkata is five and a half hours ahead; New York had 25 hours on 2026-11-01.
    for tz, day, hours in (("Asia/Kolkata", date(2026, 11, 2), 24), ("America/New_York", date(2026, 11, 1), 25)):
        start, end = day_bounds(day, tz)
        await quotes.bulk_insert([quote(symbol, start + timedelta(minutes=10 * i)) for i in range(6 * hours)])
        bars = await quotes.get_bars(symbol, "1h", start, end, tz=tz)
        assert [bar.timestamp for bar in bars] == [start + timedelta(hours=i) for i in range(hours)]
        assert {bar.count for bar in bars} == {6}
    for bad in ("7h", "5h", "7m"):
        with pytest.raises(InvalidRequest):
            await quotes.get_bars(symbol, bad, start, end, tz="Asia/Kolkata")


async def _check_bars(
    quotes: QuoteRepository, market: dict[Key, dict[str, Any]], interval: str, price: BarPrice, value: pl.Expr
) -> None:
    symbols = sorted({s for s, _ in market})
    expected = resample(list(market.values()), polars_every(interval), value)
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    bars = await quotes.get_bars(symbols, interval, start, end, price=price, limit=100_000)
    found = [
        {name: getattr(bar, name) for name in ("symbol", "timestamp", "open", "high", "low", "close", "volume",
                                               "count", "vwap")}
        for bar in bars
    ]  # fmt: skip
    for got, want in zip(found, expected, strict=True):
        # polars and PostgreSQL divide to different digits beyond the eighth.
        if got["vwap"] is not None and want["vwap"] is not None:
            assert abs(got["vwap"] - want["vwap"]) <= Decimal("1e-8")
            want["vwap"] = got["vwap"]
        assert got == want


@pytest.mark.parametrize("limit", [1000, 3])
@pytest.mark.parametrize(
    ("interval", "tz", "step"),
    [
        ("1h", "UTC", timedelta(hours=1)),
        ("90m", "UTC", timedelta(minutes=90)),
        ("6h", "America/New_York", timedelta(hours=6)),
        ("1d", "America/New_York", None),
        ("1M", "UTC", None),
    ],
)
async def test_gaps_are_filled_on_every_page(
    quotes: QuoteRepository, interval: str, tz: str, step: timedelta | None, limit: int
) -> None:
    symbols = sorted((random_symbol(), random_symbol()))
    start, end = datetime(2026, 10, 25, tzinfo=UTC), datetime(2026, 11, 5, tzinfo=UTC)  # New York changes its clocks
    if interval == "1M":
        start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 11, 5, tzinfo=UTC)
    rng = random.Random(3)
    for symbol in symbols:
        await quotes.bulk_insert(
            [quote(symbol, start + rng.random() * (end - start) * 0.9, i + 1, volume=1) for i in range(9)]
        )
    plain = json.loads(f"[{(await quotes.bars_page(Range(symbols, start, end, 10_000), _spec(interval, tz))).rows}]")
    for fill in ("null", "previous"):
        rows: list[dict[str, Any]] = []
        after: Position | None = None
        while True:
            page = await quotes.bars_page(
                Range(symbols, start, end, limit, "asc", None, after), _spec(interval, tz, fill)
            )
            rows += json.loads(f"[{page.rows}]")
            after = page.next
            if after is None:
                break
        assert [row for row in rows if row["count"]] == plain, "bars with quotes are left as they are"
        for symbol in symbols:
            own = [row for row in rows if row["symbol"] == symbol]
            times = [datetime.fromisoformat(row["timestamp"]) for row in own]
            assert own[0]["count"] > 0
            assert times[-1] + (step or timedelta(days=31)) >= end
            if step is not None and tz == "UTC":
                assert all(b - a == step for a, b in pairwise(times))
            elif interval == "1d":
                days = [at.astimezone(ZoneInfo(tz)).date() for at in times]
                assert days == [days[0] + timedelta(days=i) for i in range(len(days))]
            _check_filled(own, fill)


def _check_filled(rows: list[dict[str, Any]], fill: str) -> None:
    times = [row["timestamp"] for row in rows]
    assert times == sorted(set(times))
    for previous, row in pairwise(rows):
        if not row["count"]:
            wanted = previous["close"] if fill == "previous" else None
            assert {row[name] for name in ("open", "high", "low", "close")} == {wanted}
            assert row["volume"] is None
            assert row["vwap"] is None


def _spec(interval: str, tz: str, fill: Any = "none") -> BarSpec:
    return BarSpec(Interval.parse(interval), "last", tz, fill)


async def test_too_many_gaps_are_not_filled(quotes: QuoteRepository, symbol: str) -> None:
    wanted = Range([symbol], T0 - timedelta(days=2), T0)
    with pytest.raises(InvalidRequest, match="filled"):
        await quotes.bars_page(wanted, _spec("1s", "UTC", "null"))


async def test_a_bar_starts_in_the_range_and_is_whole(quotes: QuoteRepository, symbol: str) -> None:
    await quotes.bulk_insert([quote(symbol, 60 * i, i + 1) for i in range(180)])
    bars = await quotes.get_bars(symbol, "1h", T0 + timedelta(minutes=1), T0 + timedelta(hours=2, minutes=1))
    assert [(bar.timestamp - T0, int(bar.open), int(bar.close), bar.count) for bar in bars] == [
        (timedelta(hours=1), 61, 120, 60),
        (timedelta(hours=2), 121, 180, 60),
    ]


async def test_several_short_queries_equal_one_long(quotes: QuoteRepository, market: dict[Key, dict[str, Any]]) -> None:
    symbols = sorted({s for s, _ in market})
    whole = Range(symbols, *WHOLE, limit=10_000)
    hourly = BarSpec(Interval(1, "h"))
    page = await quotes.bars_page(whole, hourly)
    joined: list[str] = []
    after: Position | None = None
    while True:
        part = await quotes.bars_page(Range(symbols, *WHOLE, 37, "asc", None, after), hourly)
        joined.append(part.rows)
        after = part.next
        if after is None:
            break
    assert ",".join(joined) == page.rows


async def test_final_says_that_the_end_has_passed(quotes: QuoteRepository, symbol: str) -> None:
    now = datetime.now(UTC)
    await quotes.bulk_insert([quote(symbol, now - timedelta(days=40)), quote(symbol, now)])
    for interval in ("1h", "1M"):
        old, current = await quotes.get_bars(symbol, interval, now - timedelta(days=100), now + timedelta(days=1))
        assert old.final
        assert not current.final


async def test_write_reports_a_dead_database(quotes: QuoteRepository, lane: Any) -> None:
    settings = lane.make_settings(pool_timeout="1 s")
    nowhere = Database("postgresql://nobody@127.0.0.1:1/none", settings)
    repository = QuoteRepository(nowhere, settings)
    with pytest.raises(QuotesError) as caught:
        await repository.write([Write(Batch.from_rows([quote("A", 0)]))])
    assert caught.value.code == "database-unavailable"
    await nowhere.close()


async def test_a_deadlock_is_tried_again(quotes: QuoteRepository, symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update_latest = quotes._ingest._update_latest
    failures = 2

    async def unlucky(connection: Any, stored_: Any) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            await connection.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$")
        await update_latest(connection, stored_)

    monkeypatch.setattr(quotes._ingest, "_update_latest", unlucky)
    assert (await quotes.bulk_insert([quote(symbol, 0)])).inserted == 1
    assert len(await stored(quotes, symbol)) == 1
    failures = 3
    with pytest.raises(asyncpg.DeadlockDetectedError):
        await quotes.bulk_insert([quote(symbol, 1)])
    assert len(await stored(quotes, symbol)) == 1


@pytest.mark.concurrent
async def test_a_connection_that_breaks_while_committing_is_told(
    lane: Lane, quotes: QuoteRepository, symbol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_latest = quotes._ingest._update_latest

    async def cut(connection: Any, stored_: Any) -> None:
        await update_latest(connection, stored_)
        await _terminate(lane, connection)

    monkeypatch.setattr(quotes._ingest, "_update_latest", cut)
    with pytest.raises(OutcomeUnknown):
        await quotes.bulk_insert([quote(symbol, 0)])
    monkeypatch.undo()
    assert (await quotes.bulk_insert([quote(symbol, 0)])).inserted == 1, "the pool has recovered"


@pytest.mark.concurrent
async def test_reads_and_writes_recover_after_all_connections_broke(
    lane: Lane, quotes: QuoteRepository, database: Database, symbol: str
) -> None:
    await asyncio.gather(*(quotes.get_latest_quote(symbol) for _ in range(8)))
    killer = await asyncpg.connect(lane.url)
    await killer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'opa-quotes' AND datname = current_database()"
    )
    await killer.close()
    results = await asyncio.gather(*(quotes.get_latest_quote(symbol) for _ in range(8)), return_exceptions=True)
    assert all(result is None or isinstance(result, DatabaseUnavailable) for result in results)
    for _ in range(5):
        assert await quotes.get_latest_quote(symbol) is None
    assert (await quotes.bulk_insert([quote(symbol, 0)])).inserted == 1


async def test_a_connection_whose_protocol_broke_is_not_used_again(database: Database) -> None:
    """A server that goes away at the wrong moment leaves the driver between two states, with the socket open."""
    used = []

    async def work(connection: Any) -> int:
        used.append(connection)
        if len(used) == 1:
            raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
        return int(await connection.fetchval("SELECT 1"))

    assert await database.read(work) == 1
    assert used[0] is not used[1]
    assert used[0].is_closed()


async def _terminate(lane: Lane, connection: Any) -> None:
    pid = connection.get_server_pid()
    killer = await asyncpg.connect(lane.url)
    await killer.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
    await killer.close()


@pytest.mark.concurrent
async def test_a_read_over_its_time_is_told(lane: Lane, symbol: str) -> None:
    settings = lane.make_settings(statement_timeout="20 ms")
    database = Database(lane.url, settings)
    locker = await asyncpg.connect(lane.url)
    try:
        async with locker.transaction():
            await locker.execute("LOCK TABLE quotes.latest IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(QueryTimeout):
                await QuoteRepository(database, settings).get_latest_quote(symbol)
    finally:
        await locker.close()
        await database.close()


@pytest.mark.concurrent
async def test_a_full_pool_is_told(lane: Lane, symbol: str) -> None:
    settings = lane.make_settings(pool_size=1, pool_overflow=0, pool_timeout="50 ms")
    database = Database(lane.url, settings)
    async with database.acquire():
        with pytest.raises(DatabaseUnavailable, match="busy"):
            await QuoteRepository(database, settings).get_latest_quote(symbol)
    await database.close()


# --- deleting ---


async def test_a_deletion_agrees_everywhere_at_once(quotes: QuoteRepository, symbol: str) -> None:
    other = random_symbol()
    days = 12
    rows = [quote(s, T0 - timedelta(hours=6 * i), i + 1) for i in range(4 * days) for s in (symbol, other)]
    await quotes.bulk_insert(rows)
    model = {row["timestamp"]: row["price"] for row in rows if row["symbol"] == symbol}

    async def check() -> None:
        whole = (T0 - timedelta(days=40), T0 + timedelta(days=2))
        found = await quotes.get_quotes(symbol, *whole)
        assert {row.timestamp: row.price for row in found} == model
        assert await quotes.count_quotes(symbol) == len(model)
        newest = await quotes.get_latest_quote(symbol)
        spans = [span for span in await quotes.get_symbols() if span.symbol == symbol]
        if model:
            assert newest is not None
            assert (newest.timestamp, int(newest.price)) == (max(model), model[max(model)])
            assert [(span.first, span.last) for span in spans] == [(min(model), max(model))]
        else:
            assert newest is None
            assert spans == []
        for interval in ("1h", "1d"):
            bars = await quotes.get_bars(symbol, interval, *whole)
            assert sum(bar.count for bar in bars) == len(model)
        assert await quotes.count_quotes(other) == 4 * days, "no other symbol is touched"

    async def delete(start: datetime, end: datetime) -> None:
        gone = [at for at in model if start <= at < end]
        for at in gone:
            del model[at]
        assert await quotes.delete_quotes(symbol, start, end) == len(gone)
        await check()

    tick = timedelta(microseconds=1)
    await delete(T0 - timedelta(days=5), T0 - timedelta(days=4))  # in the middle
    await delete(T0, T0 + tick)  # the newest
    await delete(min(model), min(model) + tick)  # the oldest
    await delete(T0 - timedelta(days=3), T0 + timedelta(days=1))  # the newest days
    await delete(T0 - timedelta(days=30), T0 - timedelta(days=9))  # the oldest days
    await delete(T0 - timedelta(days=20), T0 - timedelta(days=15))  # nothing
    await delete(T0 - timedelta(days=40), T0 + timedelta(days=1))  # all
    assert await quotes.delete_quotes(random_symbol(), T0, T0 + timedelta(days=1)) == 0
    assert (await quotes.bulk_insert([quote(symbol, 0)])).inserted == 1
    model[T0] = 1
    await check()


@pytest.mark.concurrent
async def test_deleting_while_writing_never_leaves_latest_behind(quotes: QuoteRepository, symbol: str) -> None:
    async def write() -> None:
        for i in range(60):
            await quotes.bulk_insert([quote(symbol, i, i + 1), quote(symbol, i + 100, i + 1)])

    async def delete() -> None:
        for i in range(30):
            await quotes.delete_quotes(symbol, T0 + timedelta(seconds=i), T0 + timedelta(seconds=i + 80))

    await asyncio.gather(write(), write(), delete())
    found = await stored(quotes, symbol)
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert newest.to_dict() == found[max(found)]
    (span,) = [span for span in await quotes.get_symbols() if span.symbol == symbol]
    assert span.first <= min(found)[1]
