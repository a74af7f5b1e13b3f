"""The repository on a real database: what is written is what is read, whatever the order and the overlap."""

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import combinations, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.clock import FIRST, Interval, nanoseconds, parse, rfc3339_nano
from app.days import day_bounds
from app.db.capability import Level
from app.db.engine import Database
from app.db.migrate import migrate
from app.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidQuotes,
    InvalidRequest,
    OutcomeUnknown,
    QueryTimeout,
    QuotesError,
)
from app.quote.batch import Batch
from app.quote.terms import OnConflict, Receipt, Terms
from app.repository import ingest
from app.repository.bars import Bar, BarPrice, BarSpec, Fill
from app.repository.ingest import Attempt, Write
from app.repository.maintenance import MaintenanceRepository
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Position, Range, Sort
from app.settings import Settings
from tests.conftest import Lane, random_symbol, until_true

T0 = datetime(2026, 11, 16, tzinfo=UTC)  # a Monday
N0 = nanoseconds(T0)
#: Symbol, and nanoseconds since 1970.
Key = tuple[str, int]
#: Price and bid.
Sides = tuple[int | None, int | None]
#: The place of a symbol, nanoseconds after `T0`, and the sides.
Given = tuple[int, int, Sides]


def quote(symbol: str, at: datetime | int, price: Any = 1, **fields: Any) -> dict[str, Any]:
    """A quote of a moment, or so many seconds after `T0`."""
    when = T0 + timedelta(seconds=at) if isinstance(at, int) else at
    return {"symbol": symbol, "timestamp": when, "price": price, **fields}


def nano(symbol: str, after: int, price: Any = 1, **fields: Any) -> dict[str, Any]:
    """A quote so many nanoseconds after `T0`."""
    return {"symbol": symbol, "timestamp": rfc3339_nano(N0 + after), "price": price, **fields}


async def stored(quotes: QuoteRepository, *symbols: str) -> dict[Key, dict[str, Any]]:
    rows = await quotes.get_quotes(symbols, T0 - timedelta(days=800), T0 + timedelta(days=6), limit=1_000_000)
    return {(row.symbol, row.time_ns): row.to_dict() for row in rows}


async def test_every_column_comes_back(quotes: QuoteRepository, symbol: str) -> None:
    given_ = nano(
        symbol, 123_456_789, Decimal("0.000000000001"), bid=Decimal("1234567890123456.123456789012"), ask=2, bid_size=0,
        ask_size=Decimal("9999999999999999.999999999999"), volume=Decimal("0.5"), source='qu"ote\\ é',
    )  # fmt: skip
    receipt = await quotes.bulk_insert([given_])
    assert receipt == Receipt(1, 1, crossed=1)
    wanted = {**given_, "timestamp": T0 + timedelta(microseconds=123_456), "nanos": 789}
    assert list((await stored(quotes, symbol)).values()) == [wanted]
    newest = await quotes.get_latest_quote(symbol.lower())
    assert newest is not None
    assert newest.to_dict() == wanted
    assert newest.time_ns == N0 + 123_456_789
    assert repr(newest) == f"RealTimeQuote({symbol!r}, 2026-11-16T00:00:00.123456+00:00 + 789 ns)"


async def test_a_quote_has_any_side_and_no_price_where_nothing_was_traded(quotes: QuoteRepository, symbol: str) -> None:
    sides: list[dict[str, Any]] = [{"price": 1}, {"bid": 2}, {"ask": 3}, {"bid": 4, "ask": 6}]
    await quotes.bulk_insert([{**quote(symbol, i, None), **given_} for i, given_ in enumerate(sides)])
    found = await stored(quotes, symbol)
    assert [(row["price"], row["bid"], row["ask"]) for row in found.values()] == [
        (1, None, None), (None, 2, None), (None, None, 3), (None, 4, 6),
    ]  # fmt: skip
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert (newest.price, newest.bid, newest.ask) == (None, 4, 6), "a mid is nobody's price"
    with pytest.raises(InvalidQuotes) as caught:
        await quotes.bulk_insert([quote(symbol, 9, None, bid_size=1, volume=1)])
    assert [r.code for r in caught.value.rejections] == ["price-missing"]


async def test_nothing_is_stored_of_an_empty_batch(quotes: QuoteRepository, symbol: str) -> None:
    assert await quotes.bulk_insert([]) == Receipt(0, 0)
    writes = [Write(Batch.from_rows([])), Write(Batch.from_rows([quote(symbol, 0)])), Write(Batch.from_rows([]))]
    for inserted in (1, 0):  # all rows are new, or some are stored
        results = await quotes.write(writes)
        assert [(r.received, r.inserted) for r in results if isinstance(r, Receipt)] == [(0, 0), (1, inserted), (0, 0)]
    assert await quotes.delete_quotes(symbol, T0, T0 + timedelta(seconds=1)) == 1


async def test_numbers_of_equal_instants_are_kept_in_their_order(quotes: QuoteRepository, symbol: str) -> None:
    rows = [nano(symbol, 999, 1), nano(symbol, 999, 2), nano(symbol, 1000, 3), nano(symbol, 5000, 4)]
    receipt = await quotes.bulk_insert(rows, ties="number")
    assert receipt == Receipt(4, 4, numbered=2)
    assert {at - N0: row["price"] for (_, at), row in (await stored(quotes, symbol)).items()} == {
        999: 1, 1000: 2, 1001: 3, 5000: 4,
    }  # fmt: skip
    assert (await quotes.bulk_insert(rows, ties="number")).unchanged == 4, "the same again is the same"
    assert (await quotes.bulk_insert(rows[:2])).superseded == 1


async def test_signed_prices(quotes: QuoteRepository, symbol: str) -> None:
    rows = [
        quote(symbol, i, price, volume=volume)
        for i, (price, volume) in enumerate([("-37.63", 10), (0, 5), ("10.01", 5), ("-1", 20)])
    ]
    with pytest.raises(InvalidQuotes):
        await quotes.bulk_insert(rows)
    assert (await quotes.bulk_insert(rows, prices="signed")).zeros == 0
    (bar,) = await quotes.get_bars(symbol, "1d", T0, T0 + timedelta(days=1))
    ends = (Decimal("-37.63"), Decimal("10.01"), Decimal("-37.63"), -1)
    assert figures(bar) == (*ends, 40, Decimal("-8.65625"), 4)
    page, missing = await quotes.summary_page(Range([symbol], N0, N0 + 86_400 * 10**9), "last")
    (line,) = map(json.loads, page.rows)
    assert (line["change"], line["change_percent"], line["range"], missing) == (36.63, None, 47.64, [])
    zeros = await quotes.bulk_insert([quote(symbol, 0, 0, bid=1), quote(symbol, 1, 0, ask=1)])
    assert (zeros.zeros, zeros.updated) == (2, 2)
    assert [row["price"] for row in (await stored(quotes, symbol)).values()][:2] == [None, None]


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
    assert (await stored(quotes, symbol))[symbol, N0]["price"] == 2


@pytest.mark.parametrize("first", ["bid", "ask"])
async def test_merging_keeps_what_is_not_given(quotes: QuoteRepository, symbol: str, first: str) -> None:
    sides = {"bid": {"bid": 10, "bid_size": 1}, "ask": {"ask": 12, "ask_size": 2}}
    then = "ask" if first == "bid" else "bid"

    async def merge(*rows: dict[str, Any]) -> tuple[int, int, int, int]:
        given_ = [{**nano(symbol, 7, None), **row} for row in rows]
        receipt = await quotes.bulk_insert(given_, on_conflict="merge")
        return receipt.inserted, receipt.updated, receipt.unchanged, receipt.superseded

    assert await merge(sides[first]) == (1, 0, 0, 0)
    assert await merge(sides[then]) == (0, 1, 0, 0)
    assert await merge(sides[then]) == (0, 0, 1, 0)
    assert await merge({"price": 11}, {"bid": 9, "volume": 3}) == (0, 1, 0, 1)
    wanted = {
        "symbol": symbol, "timestamp": T0, "nanos": 7, "price": 11, "bid": 9, "ask": 12, "bid_size": 1, "ask_size": 2,
        "volume": 3, "source": None,
    }  # fmt: skip
    assert await stored(quotes, symbol) == {(symbol, N0 + 7): wanted}
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert newest.to_dict() == wanted
    assert (await quotes.bulk_insert([nano(symbol, 7, None, ask=13)])).updated == 1
    assert [(row["bid"], row["ask"]) for row in (await stored(quotes, symbol)).values()] == [(None, 13)], "an update"


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
    assert {(at - N0) // 10**9 for _, at in await stored(quotes, symbol)} == {0, 1, 10, 12}


async def test_a_refused_row_of_a_tie_is_mended_in_its_body(quotes: QuoteRepository, symbol: str) -> None:
    """Sent again as it was, a body gets the numbers of before, whatever was refused of it."""

    async def send(*prices: Any) -> tuple[int, int, int]:
        rows = [quote(symbol, 0, price) for price in prices]
        receipt = await quotes.bulk_insert(rows, on_error="skip", ties="number")
        found = sorted((await stored(quotes, symbol)).items())
        assert [(at - N0, row["price"]) for (_, at), row in found] == list(enumerate(p for p in prices if p != "none"))
        return receipt.inserted, receipt.updated, receipt.unchanged

    assert await send(1, "none", 3) == (2, 0, 0)
    assert await send(1, "none", 3) == (0, 0, 2)
    assert await send(1, 2, 3) == (1, 1, 1)
    assert await send(1, 2, 3) == (0, 0, 3)


async def test_latest_of_many_symbols_is_written_part_by_part(
    quotes: QuoteRepository, symbol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_HELD_AT_ONCE", 2)
    monkeypatch.setattr(ingest, "_FEW", 4)
    names = [f"{symbol}{i}" for i in range(5)]
    await quotes.bulk_insert([quote(name, T0 + timedelta(minutes=minute)) for name in names for minute in range(2)])
    for name in names:
        newest = await quotes.get_latest_quote(name)
        assert newest is not None
        assert newest.timestamp == T0 + timedelta(minutes=1)
    spans = {span.symbol: span for span in await quotes.get_symbols()}
    assert all(spans[name].first == T0 for name in names)


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
    for after, price in ((6 * 10**9 + 2, 1), (6 * 10**9 + 1, 2), (3 * 10**9 - 1, 3), (3 * 10**9, 4)):
        await quotes.bulk_insert([nano(symbol, after, price)])
    assert await newest() == (6, 1)
    (span,) = [s for s in await quotes.get_symbols() if s.symbol == symbol]
    assert (span.first, span.first_nanos) == (T0 + timedelta(seconds=3, microseconds=-1), 999)
    assert (span.last, span.last_nanos) == (T0 + timedelta(seconds=6), 2)


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    batches=st.lists(
        st.tuples(
            st.sampled_from(["update", "ignore", "merge"]),
            st.lists(
                st.tuples(
                    st.integers(0, 2),
                    st.sampled_from([0, 1, 2, 998, 999, 1000, 1001, 10**9 - 1, 10**9]),
                    st.sampled_from([(1, None), (2, None), (None, 1), (None, 2), (3, 3)]),
                ),
                min_size=1,
                max_size=20,
            ),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_sequence_of_batches_equals_a_dict(lane: Any, batches: list[tuple[OnConflict, list[Given]]]) -> None:
    async def check() -> None:
        database = Database(lane.url, lane.make_settings())
        await database.connect()
        try:
            await _against_a_dict(QuoteRepository(database, lane.make_settings()), batches)
        finally:
            await database.close()

    # hypothesis calls a plain function: its examples run on an event loop of their own, in a thread.
    _in_thread(check())


async def _against_a_dict(quotes: QuoteRepository, batches: list[tuple[OnConflict, list[Given]]]) -> None:
    symbols = [random_symbol() for _ in range(3)]
    model: dict[Key, Sides] = {}
    for on_conflict, rows in batches:
        before = dict(model)
        for s, after, sides in rows:
            key = (symbols[s], N0 + after)
            held = model.get(key)
            if on_conflict == "update" or held is None:
                model[key] = sides
            elif on_conflict == "merge":
                model[key] = (
                    held[0] if sides[0] is None else sides[0],
                    held[1] if sides[1] is None else sides[1],
                )
        given_ = [nano(symbols[s], after, price, bid=bid) for s, after, (price, bid) in rows]
        receipt = await quotes.bulk_insert(given_, on_conflict=on_conflict)
        assert receipt.inserted == len(model) - len(before)
        assert receipt.updated == sum(model[key] != sides for key, sides in before.items())
        keys = {(symbols[s], after) for s, after, _ in rows}
        assert receipt.superseded == len(rows) - len(keys)
        assert receipt.received == receipt.inserted + receipt.updated + receipt.unchanged + receipt.superseded
    found = await stored(quotes, *symbols)
    assert {key: (row["price"], row["bid"]) for key, row in found.items()} == model
    spans = {span.symbol: span for span in await quotes.get_symbols()}
    for symbol in {s for s, _ in model}:
        newest = await quotes.get_latest_quote(symbol)
        assert newest is not None
        instants = sorted(at for s, at in model if s == symbol)
        assert newest.to_dict() == found[symbol, instants[-1]]
        span = spans[symbol]
        assert nanoseconds(span.first) + span.first_nanos == instants[0]
        assert nanoseconds(span.last) + span.last_nanos == instants[-1]


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
        [nano(rng.choice(symbols), rng.randrange(400), rng.randrange(1, 9)) for _ in range(100)] for _ in range(40)
    ]
    receipts = await asyncio.gather(*(quotes.bulk_insert(batch) for batch in batches))
    found = await stored(quotes, *symbols)
    assert found.keys() == {(q["symbol"], parse(q["timestamp"])) for batch in batches for q in batch}
    assert sum(r.inserted for r in receipts) == len(found)
    for symbol in symbols:
        newest = await quotes.get_latest_quote(symbol)
        assert newest is not None
        last = max(at for s, at in found if s == symbol)
        assert newest.to_dict() == found[symbol, last]


# --- reading ---


@pytest.fixture(scope="module")
async def market(quotes: QuoteRepository) -> dict[Key, dict[str, Any]]:
    """Trades and quotes of three symbols over ten days, with gaps, many a nanosecond apart, by key."""
    rng = random.Random(11)
    rows: dict[Key, dict[str, Any]] = {}
    for symbol in sorted(random_symbol() for _ in range(3)):
        at = 0
        for i in range(700):
            if i % 3 == 2:
                at += rng.choice((1, 1, 2, 999))
            else:
                at = N0 - 7 * DAY + rng.randrange(10 * DAY)

            def maybe(value: Decimal, chance: float = 0.8) -> Decimal | None:
                return value if rng.random() < chance else None

            row = {
                "symbol": symbol,
                "timestamp": at,
                "price": maybe(Decimal(rng.randrange(1, 10**6)).scaleb(-2), 0.7),
                "bid": maybe(Decimal(rng.randrange(1, 10**6)).scaleb(-3)),
                "ask": maybe(Decimal(rng.randrange(1, 10**6)).scaleb(-3)),
                "volume": maybe(Decimal(rng.randrange(1000)).scaleb(-1)),
            }
            if any(row[side] is not None for side in ("price", "bid", "ask")):
                rows[symbol, at] = row
    shuffled = [{**row, "timestamp": rfc3339_nano(row["timestamp"])} for row in rows.values()]
    rng.shuffle(shuffled)
    await quotes.bulk_insert(shuffled)
    return rows


#: In nanoseconds.
DAY = 86_400 * 10**9
WHOLE = (N0 - 30 * DAY, N0 + 30 * DAY)


@pytest.mark.parametrize("sort", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 7, 700, 699, 5000])
async def test_pages_joined_equal_the_whole(
    quotes: QuoteRepository, market: dict[Key, dict[str, Any]], sort: Sort, limit: int
) -> None:
    symbols = sorted({s for s, _ in market})
    start = N0 - DAY if limit == 1 else WHOLE[0]
    end = start + DAY // 2 if limit == 1 else WHOLE[1]
    expected = sorted((key for key in market if start <= key[1] < end), key=lambda k: k[1], reverse=sort == "desc")
    assert any(a + 1 == b for (_, a), (_, b) in pairwise(sorted(expected))), "some are a nanosecond apart"
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
        rows = [json.loads(row) for row in page.rows]
        assert len(rows) <= wanted.limit
        found = [(row["symbol"], parse(row["timestamp"])) for row in rows]
        assert not found or found[0] not in keys, "a page begins behind the last one"
        keys += found
        if page.next is None:
            return keys
        assert len(rows) == wanted.limit
        after = page.next


#: Around the ends of two microseconds.
CLOSE = (0, 1, 2, 499, 500, 998, 999, 1000, 1001, 1500, 1999, 2000)


@pytest.mark.parametrize("sort", ["asc", "desc"])
async def test_bounds_are_exact_to_a_nanosecond(quotes: QuoteRepository, sort: Sort) -> None:
    symbols = sorted(random_symbol() for _ in range(3))
    instants = {symbols[0]: CLOSE, symbols[1]: CLOSE[::2], symbols[2]: CLOSE[1::3]}
    await quotes.bulk_insert([nano(symbol, after, after + 1) for symbol in symbols for after in instants[symbol]])
    bounds = sorted({-1, *CLOSE, 3, 997, 1002, 2001})
    for low, high in combinations(bounds, 2):
        inside = {
            symbol: sorted((after for after in instants[symbol] if low <= after < high), reverse=sort == "desc")
            for symbol in symbols
        }
        for asked in (symbols[:1], symbols):
            expected = [(symbol, after) for symbol in asked for after in inside[symbol]]
            found = await quotes.get_quotes(asked, N0 + low, N0 + high, sort=sort)
            assert [(row.symbol, row.time_ns - N0) for row in found] == expected, (low, high)
            assert await quotes.count_quotes(asked, N0 + low, N0 + high) == len(expected), (low, high)
    moment = T0 + timedelta(microseconds=1)
    after = await quotes.get_quotes(symbols[0], moment, moment + timedelta(microseconds=1))
    assert [row.time_ns - N0 for row in after] == [1000, 1001, 1500, 1999], "a moment is its first nanosecond"


@pytest.mark.parametrize("per_symbol", [None, 1, 5])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@pytest.mark.parametrize("sort", ["asc", "desc"])
async def test_pages_end_between_two_nanoseconds(
    quotes: QuoteRepository, sort: Sort, limit: int, per_symbol: int | None
) -> None:
    symbols = sorted(random_symbol() for _ in range(2))
    await quotes.bulk_insert([nano(symbol, after) for symbol in symbols for after in CLOSE])
    low, high = 1, 1999
    inside = sorted((after for after in CLOSE if low <= after < high), reverse=sort == "desc")[:per_symbol]
    wanted = Range(symbols, N0 + low, N0 + high, limit, sort, per_symbol)
    assert await _all_keys(quotes, wanted) == [(symbol, N0 + after) for symbol in symbols for after in inside]


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
        quotes.get_quotes("no;such symbol", T0, T0 + timedelta(1)),
        quotes.get_quotes(symbol, N0, N0),
        quotes.count_quotes(symbol, T0.replace(tzinfo=None)),
        quotes.get_quotes(symbol, T0, T0 + timedelta(1), limit=0),
    ):
        with pytest.raises(InvalidRequest):
            await bad


@pytest.mark.parametrize("sort", ["asc", "desc"])
async def test_all_pages_of_quotes_and_bars(quotes: QuoteRepository, sort: Sort) -> None:
    symbols = [random_symbol(), random_symbol()]
    await quotes.bulk_insert([quote(symbol, i) for symbol in symbols for i in (0, 1, 2, 5, 6)])
    end = T0 + timedelta(seconds=7)
    whole = [row.to_dict() for row in await quotes.get_quotes(symbols, T0, end, sort=sort)]
    bars = await quotes.get_bars(symbols, "1s", T0, end, fill="previous", sort=sort)
    assert (len(whole), len(bars)) == (10, 14)
    for limit in (1, 3, 7, 10, 14, 100):
        found = quotes.iter_quotes(symbols, T0, end, limit=limit, sort=sort)
        assert [row.to_dict() async for row in found] == whole
        paged = quotes.iter_bars(symbols, "1s", T0, end, fill="previous", limit=limit, sort=sort)
        assert [row async for row in paged] == bars


async def test_counts(quotes: QuoteRepository, market: dict[Key, dict[str, Any]]) -> None:
    symbols = sorted({s for s, _ in market})
    assert await quotes.count_quotes(symbols) == len(market)
    assert await quotes.count_quotes(symbols[0], T0) == sum(s == symbols[0] and at >= N0 for s, at in market)
    assert await quotes.count_quotes(symbols[:2], T0, T0 + timedelta(1)) == sum(
        s in symbols[:2] and N0 <= at < N0 + DAY for s, at in market
    )
    at = sorted(at for s, at in market if s == symbols[0])[100]
    assert await quotes.count_quotes(symbols[0], end=at) == 100
    assert await quotes.count_quotes(symbols[0], end=at + 1) == 101
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


def figures(bar: Bar) -> tuple[Any, ...]:
    return bar.open, bar.high, bar.low, bar.close, bar.volume, bar.vwap, bar.count


def resample(rows: Sequence[dict[str, Any]], every: str, value: pl.Expr) -> list[dict[str, Any]]:
    """The bars that polars makes of raw quotes, whose times are in nanoseconds since 1970.

    Windows of n days or weeks start from Monday 2000-01-03.
    """
    frame = pl.DataFrame(
        rows,
        schema={
            "symbol": pl.String, "timestamp": pl.Datetime("ns", "UTC"), "price": pl.Decimal(38, 12),
            "bid": pl.Decimal(38, 12), "ask": pl.Decimal(38, 12), "volume": pl.Decimal(38, 12),
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
        row["vwap"] = sum(p * v for p, v in traded) / volume if volume else None
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


@pytest.mark.parametrize("interval", ["1s", "1m", "7m", "1h", "1d", "1M"])
@pytest.mark.parametrize(
    ("price", "value"),
    [("bid", pl.col("bid")), ("ask", pl.col("ask")), ("mid", (pl.col("bid") + pl.col("ask")) * Decimal("0.5"))],
)
async def test_bars_of_other_prices(
    quotes: QuoteRepository, market: dict[Key, dict[str, Any]], interval: str, price: BarPrice, value: pl.Expr
) -> None:
    await _check_bars(quotes, market, interval, price, value)


async def test_bars_of_trades_know_nothing_of_quotes(quotes: QuoteRepository, symbol: str) -> None:
    """The first and the last of a bar are quotes, and so are its highest and its lowest, with volumes of their own."""
    trades = [nano(symbol, 10 * i + 5, price, volume=2) for i, price in enumerate((50, 70, 40, 60))]
    sides = [nano(symbol, 10 * i, None, bid=1, ask=999, volume=100) for i in range(5)]
    await quotes.bulk_insert(trades + sides)
    whole = (T0, T0 + timedelta(days=1))
    for interval in ("1s", "1m", "1h", "1d"):
        (bar,) = await quotes.get_bars(symbol, interval, *whole)
        assert figures(bar) == (50, 70, 40, 60, 8, 55, 4)
        (mid,) = await quotes.get_bars(symbol, interval, *whole, price="mid")
        assert figures(mid) == (500, 500, 500, 500, 500, 500, 5)
    one_sided = [nano(symbol, 60 * 10**9 + i, None, bid=7) for i in range(3)]
    await quotes.bulk_insert(one_sided)
    assert len(await quotes.get_bars(symbol, "1m", *whole)) == 1
    assert len(await quotes.get_bars(symbol, "1m", *whole, price="mid")) == 1
    assert [bar.count for bar in await quotes.get_bars(symbol, "1m", *whole, price="bid")] == [5, 3]


async def test_the_nanosecond_decides_which_is_the_first_and_the_last(quotes: QuoteRepository, symbol: str) -> None:
    rows = [nano(symbol, after, 10_000 - after, bid=after + 1, ask=after + 3) for after in CLOSE]
    random.Random(2).shuffle(rows)
    await quotes.bulk_insert(rows)
    for interval in ("1s", "1m", "1d"):
        (bar,) = await quotes.get_bars(symbol, interval, T0, T0 + timedelta(days=1))
        assert figures(bar) == (10_000, 10_000, 8000, 8000, None, None, len(CLOSE))
        (bar,) = await quotes.get_bars(symbol, interval, T0, T0 + timedelta(days=1), price="mid")
        assert figures(bar) == (2, 2002, 2, 2002, None, None, len(CLOSE))
    assert await quotes.get_bars(symbol, "1m", N0 + 1, N0 + 10) == [], "no bar starts in there"
    assert len(await quotes.get_bars(symbol, "1m", N0, N0 + 1)) == 1
    assert len(await quotes.get_bars([symbol, random_symbol()], "1m", N0, N0 + 1)) == 1


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
        (bar.timestamp.astimezone(ZoneInfo(tz)), bar.open, bar.high, bar.low, bar.close, bar.count) for bar in bars
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
        if got["vwap"] is not None and want["vwap"] is not None:
            assert abs(got["vwap"] - want["vwap"]) <= Decimal("5.1e-17")
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
    first, last = nanoseconds(start), nanoseconds(end)
    whole, _ = await quotes.bars_page(Range(symbols, first, last, 10_000), _spec(interval, tz))
    plain = [json.loads(row) for row in whole.rows]
    fills: tuple[Fill, ...] = ("null", "previous")
    for fill in fills:
        rows: list[dict[str, Any]] = []
        after: Position | None = None
        while True:
            page, missing = await quotes.bars_page(
                Range(symbols, first, last, limit, "asc", None, after), _spec(interval, tz, fill)
            )
            assert missing == []
            rows += [json.loads(row) for row in page.rows]
            after = page.next
            if after is None:
                break
        assert [row for row in rows if row["count"]] == plain, "bars with quotes are left as they are"
        for symbol in symbols:
            own = [row for row in rows if row["symbol"] == symbol]
            times = [datetime.fromisoformat(row["timestamp"]) for row in own]
            if fill == "null":
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


def _spec(interval: str, tz: str, fill: Fill = "none") -> BarSpec:
    return BarSpec(Interval.parse(interval), "last", tz, fill)


@pytest.mark.parametrize("sort", ["asc", "desc"])
async def test_any_number_of_gaps_is_filled_page_by_page(quotes: QuoteRepository, symbol: str, sort: Sort) -> None:
    """Ten years of seconds: a page makes as many bars as it has."""
    await quotes.bulk_insert([quote(symbol, 10, 7), quote(symbol, 20_015, 8)])
    first, last = N0 - 5 * 365 * DAY, N0 + 5 * 365 * DAY
    spec = BarSpec(Interval(1, "s"), fill="previous")
    page, _ = await quotes.bars_page(Range([symbol], first, N0 + 20_020 * 10**9, 10_000, sort), spec)
    assert page.next is not None
    rest, _ = await quotes.bars_page(Range([symbol], first, N0 + 20_020 * 10**9, 10_000, sort, None, page.next), spec)
    assert rest.next is not None
    end, _ = await quotes.bars_page(Range([symbol], first, last, 10_000, "desc"), spec)
    assert len(end.rows) == 10_000, "up to now"
    found = [json.loads(row) for row in page.rows + rest.rows]
    expected = [7] * 20_000 if sort == "asc" else [*[8] * 5, *[7] * 19_995]
    assert [row["close"] for row in found] == expected
    times = [parse(row["timestamp"]) for row in found]
    step = 10**9 if sort == "asc" else -(10**9)
    assert times[0] == (N0 + 10 * 10**9 if sort == "asc" else N0 + 20_019 * 10**9)
    assert all(b - a == step for a, b in pairwise(times))
    bars = await quotes.get_bars(symbol, "1s", N0 + 20 * 10**9, last, fill="previous", limit=25_000, sort=sort)
    assert [bar.close for bar in bars if bar.timestamp < T0 + timedelta(seconds=20_015)] == [7] * 19_995 * (
        sort == "asc"
    )
    assert [bar.close for bar in bars if bar.timestamp >= T0 + timedelta(seconds=20_015)] == [8] * (
        5_005 if sort == "asc" else 25_000
    )


@pytest.mark.parametrize("sort", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 5, 20])
async def test_pages_of_symbols_with_and_without_gaps(quotes: QuoteRepository, sort: Sort, limit: int) -> None:
    """What was read of a later symbol while an earlier one has more of its range left is neither lost nor twice."""
    symbols = sorted(random_symbol() for _ in range(5))
    minutes = ([0, 999], range(900, 930), [500], range(0, 1000, 90), [0, 1, 2, 998, 999])
    await quotes.bulk_insert(
        [quote(symbol, 60 * at) for symbol, given in zip(symbols, minutes, strict=True) for at in given]
    )
    wanted = Range(symbols, N0, N0 + 1000 * 60 * 10**9, limit, sort)
    expected = [
        (s, 60 * at)
        for s, given in zip(symbols, minutes, strict=True)
        for at in (given if sort == "asc" else given[::-1])
    ]
    found: list[tuple[str, int]] = []
    while True:
        page, missing = await quotes.bars_page(wanted, BarSpec(Interval(1, "m")))
        assert missing == []
        rows = [json.loads(text) for text in page.rows]
        found += [(row["symbol"], (parse(row["timestamp"]) - N0) // 10**9) for row in rows]
        if page.next is None:
            break
        assert len(rows) == limit
        wanted = replace(wanted, after=page.next)
    assert found == expected


async def test_a_bar_starts_in_the_range_and_is_whole(quotes: QuoteRepository, symbol: str) -> None:
    await quotes.bulk_insert([quote(symbol, 60 * i, i + 1) for i in range(180)])
    bars = await quotes.get_bars(symbol, "1h", T0 + timedelta(minutes=1), T0 + timedelta(hours=2, minutes=1))
    assert [(bar.timestamp - T0, bar.open, bar.close, bar.count) for bar in bars] == [
        (timedelta(hours=1), Decimal(61), Decimal(120), 60),
        (timedelta(hours=2), Decimal(121), Decimal(180), 60),
    ]


async def test_several_short_queries_equal_one_long(quotes: QuoteRepository, market: dict[Key, dict[str, Any]]) -> None:
    symbols = sorted({s for s, _ in market})
    whole = Range(symbols, *WHOLE, limit=10_000)
    hourly = BarSpec(Interval(1, "h"))
    page, _ = await quotes.bars_page(whole, hourly)
    assert len(page.rows) > 3 * 37
    joined: list[str] = []
    after: Position | None = None
    while True:
        part, _ = await quotes.bars_page(Range(symbols, *WHOLE, 37, "asc", None, after), hourly)
        joined += part.rows
        after = part.next
        if after is None:
            break
    assert joined == page.rows


# --- long ago ---

LONG_AGO = (
    "1677-09-22T00:00:00.000000000Z", "1677-09-22T00:00:00.000000001Z", "1833-05-17T12:34:56.123456789Z",
    "1929-10-29T15:29:59.999999999Z", "1929-10-29T15:30:00.000000001Z", "1969-12-31T23:59:59.999999999Z",
    "1970-01-01T00:00:00.000000000Z",
)  # fmt: skip


async def test_a_quote_may_be_centuries_old(lane: Lane, empty_url: str) -> None:
    """In a database of its own: its chunks would be in the way of what others refresh."""
    settings = lane.make_settings()
    await migrate(empty_url, settings)
    database = Database(empty_url, settings)
    await database.connect()
    quotes = QuoteRepository(database, settings)
    instants = [parse(text) for text in LONG_AGO]
    try:
        rows = [
            {"symbol": symbol, "timestamp": text, "price": i + 1, "bid": i + 1, "ask": i + 3, "volume": 2}
            for i, text in enumerate(LONG_AGO) for symbol in ("A", "B")
        ]  # fmt: skip
        assert (await quotes.bulk_insert(rows)).inserted == len(rows)
        assert (await quotes.bulk_insert(rows)).unchanged == len(rows)
        await _check_long_ago(quotes, instants)
        if database.capability.level >= Level.COMMUNITY:
            async with MaintenanceRepository.open(database, settings) as repository:
                for chunk in await repository.chunks():
                    await repository.compress(chunk)
                for rollup, window in await repository.refresh_windows(T0, None, None):
                    await repository.refresh(rollup, window)
            await _check_long_ago(quotes, instants)
        for symbol in ("A", "B"):
            assert await quotes.delete_quotes(symbol, instants[0], instants[0] + 1) == 1
            assert await quotes.delete_quotes(symbol, instants[-1], T0) == 1
        (span, _) = await quotes.get_symbols()
        assert nanoseconds(span.first) + span.first_nanos == instants[1]
        assert nanoseconds(span.last) + span.last_nanos == instants[-2]
        assert datetime(1677, 9, 22, tzinfo=UTC) == FIRST
        with pytest.raises(InvalidQuotes):
            await quotes.bulk_insert([{"symbol": "A", "timestamp": "1677-09-21T23:59:59.999999999Z", "price": 1}])
    finally:
        await database.close()


def _long_ago_bar(prices: list[int]) -> tuple[Any, ...]:
    first, last, count = prices[0], prices[-1], len(prices)
    return first, last, first, last, 2 * count, Decimal(sum(prices)) / count, count


async def _check_long_ago(quotes: QuoteRepository, instants: list[int]) -> None:
    for symbols in (["A"], ["A", "B"]):
        found = await quotes.get_quotes(symbols, FIRST, T0)
        assert [(row.symbol, row.time_ns) for row in found] == [(s, at) for s in symbols for at in instants]
        for place, at in enumerate(instants):
            low = await quotes.get_quotes(symbols, instants[0], at + 1, sort="desc", limit=1)
            assert low[0].time_ns == at
            assert await quotes.count_quotes(symbols, at) == len(symbols) * (len(instants) - place)
        wanted = Range(symbols, instants[0], instants[-1] + 1, 2)
        assert await _all_keys(quotes, wanted) == [(s, at) for s in symbols for at in instants]
    newest = await quotes.get_latest_quote("A")
    assert newest is not None
    assert newest.time_ns == instants[-1]
    days = {"1677-09-22": [1, 2], "1833-05-17": [3], "1929-10-29": [4, 5], "1969-12-31": [6], "1970-01-01": [7]}
    prices: dict[BarPrice, int] = {"last": 0, "mid": 1}
    for interval, digits in (("1d", 10), ("1M", 7)):
        for price, more in prices.items():
            bars = await quotes.get_bars("A", interval, datetime(1677, 9, 1, tzinfo=UTC), T0, price=price)
            assert [(str(bar.timestamp)[:digits], *figures(bar)) for bar in bars] == [
                (day[:digits], *_long_ago_bar([number + more for number in numbers])) for day, numbers in days.items()
            ]
    local = await quotes.get_bars("A", "1d", FIRST, T0, tz="America/New_York")
    assert sum(bar.count for bar in local) == 5, "New York's day of 1677-09-22 began before the first that is asked for"


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
    with pytest.raises(DatabaseUnavailable):
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


async def test_a_deletion_is_exact_to_a_nanosecond(quotes: QuoteRepository, symbol: str) -> None:
    other = random_symbol()
    await quotes.bulk_insert([nano(s, after, after + 1, volume=1) for s in (symbol, other) for after in CLOSE])
    left = list(CLOSE)
    for low, high in (
        (1, 2), (501, 998), (998, 999), (2000, 2001), (1501, 2000), (0, 1), (-5, 2), (1000, 1000 + 1), (500, 1500),
        (1500, 1501), (0, 5000),
    ):  # fmt: skip
        gone = [after for after in left if low <= after < high]
        left = [after for after in left if after not in gone]
        assert await quotes.delete_quotes(symbol, N0 + low, N0 + high) == len(gone), (low, high)
        found = await stored(quotes, symbol)
        assert [at - N0 for _, at in found] == left
        assert await quotes.count_quotes(symbol) == len(left)
        newest = await quotes.get_latest_quote(symbol)
        spans = [span for span in await quotes.get_symbols() if span.symbol == symbol]
        bars = await quotes.get_bars(symbol, "1d", T0, T0 + timedelta(days=1))
        if left:
            assert newest is not None
            assert newest.to_dict() == found[symbol, N0 + left[-1]]
            ends = (T0 + timedelta(microseconds=left[0] // 1000), left[0] % 1000, newest.timestamp, newest.nanos)
            assert [(s.first, s.first_nanos, s.last, s.last_nanos) for s in spans] == [ends]
            first, last = left[0] + 1, left[-1] + 1
            vwap = (Decimal(sum(left)) / len(left) + 1).quantize(Decimal("1e-16"))
            assert [figures(bar) for bar in bars] == [(first, last, first, last, len(left), vwap, len(left))]
        else:
            assert (newest, spans, bars) == (None, [], [])
    assert left == []
    assert await quotes.count_quotes(other) == len(CLOSE), "no other symbol is touched"
    for low, high in ((N0, N0), (N0 + 1, N0)):
        with pytest.raises(InvalidRequest):
            await quotes.delete_quotes(symbol, low, high)


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
    assert nanoseconds(span.first) + span.first_nanos == min(found)[1]


@pytest.mark.concurrent
@pytest.mark.parametrize("outside", [None, -1000, 1000], ids=["all", "older left", "newer left"])
async def test_what_is_written_while_a_delete_runs_is_in_latest(
    lane: Lane, quotes: QuoteRepository, symbol: str, outside: int | None
) -> None:
    """The DELETE has begun, and waits for a row, when another quote of its range is stored."""
    await quotes.bulk_insert([quote(symbol, i, 1) for i in (range(10) if outside is None else (*range(10), outside))])
    between = [quote(symbol, T0 + timedelta(seconds=at), 2) for at in (5.5, 6.5)]
    holder = await asyncpg.connect(lane.url)
    try:
        await holder.execute("BEGIN")
        await holder.execute("SELECT FROM quotes.real_time WHERE symbol = $1 AND timestamp = $2 FOR UPDATE", symbol, T0)
        deleting = asyncio.create_task(quotes.delete_quotes(symbol, T0, T0 + timedelta(seconds=100)))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
        await until_true(holder, waits)
        assert (await quotes.bulk_insert(between)).inserted == 2
        await holder.execute("COMMIT")
        assert await deleting == 10
    finally:
        await holder.close()
    found = sorted(await stored(quotes, symbol))
    assert len(found) == (2 if outside is None else 3)
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert newest.time_ns == found[-1][1]
    (span,) = [span for span in await quotes.get_symbols() if span.symbol == symbol]
    assert nanoseconds(span.first) + span.first_nanos == found[0][1]


@pytest.mark.concurrent
async def test_two_deletes_at_once_leave_latest_right(lane: Lane, quotes: QuoteRepository, symbol: str) -> None:
    """Each takes one end; both wait for the symbol's row of `latest`, and the second finds what the first left."""
    await quotes.bulk_insert([quote(symbol, i, i + 1) for i in range(10)])
    locker = await asyncpg.connect(lane.url)
    # The first waits for the transaction, the second for its turn to wait.
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE NOT granted"
        " AND (transactionid = pg_current_xact_id()::xid OR relation = 'quotes.latest'::regclass)"
    )
    try:
        await locker.execute("BEGIN")
        await locker.execute("SELECT FROM quotes.latest WHERE symbol = $1 FOR UPDATE", symbol)
        ranges = [(T0 + timedelta(seconds=at), T0 + timedelta(seconds=at + 3)) for at in (0, 7)]
        deleting = [asyncio.create_task(quotes.delete_quotes(symbol, *ends)) for ends in ranges]
        async with asyncio.timeout(30):
            while await locker.fetchval(waiting) < 2:  # noqa: ASYNC110  what is waited for happens in a database
                await asyncio.sleep(0.01)
        await locker.execute("COMMIT")
        assert await asyncio.gather(*deleting) == [3, 3]
    finally:
        await locker.close()
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert (newest.timestamp, newest.price) == (T0 + timedelta(seconds=6), 7)
    (span,) = [span for span in await quotes.get_symbols() if span.symbol == symbol]
    assert span.first == T0 + timedelta(seconds=3)


class Pause:
    """Holds a method up until it is told to go on."""

    def __init__(self, owner: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        original = getattr(owner, method)

        async def held_up(*args: Any) -> Any:
            self.reached.set()
            await self.go.wait()
            return await original(*args)

        monkeypatch.setattr(owner, method, held_up)


#: What happens to stored quotes, of seconds after `T0`, beside a write that leaves them as they are.
BESIDE: dict[str, Callable[[QuoteRepository, str], Coroutine[Any, Any, object]]] = {
    "first deleted": lambda q, s: q.delete_quotes(s, T0, T0 + timedelta(seconds=2)),
    "last deleted": lambda q, s: q.delete_quotes(s, T0 + timedelta(seconds=5), T0 + timedelta(seconds=9)),
    "all deleted": lambda q, s: q.delete_quotes(s, T0, T0 + timedelta(seconds=9)),
    "last corrected": lambda q, s: q.bulk_insert([quote(s, 5, 9)]),
}


@pytest.mark.concurrent
@pytest.mark.parametrize("on_conflict", ["update", "ignore", "error"])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waits"])
async def test_latest_is_right_whatever_happens_to_quotes_that_a_write_left_as_they_are(
    lane: Lane, database: Database, settings: Settings, quotes: QuoteRepository, symbol: str,
    waits: bool, beside: str, on_conflict: OnConflict, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They change between the merge and the write of `latest`, which finds that committed, or waits for the commit."""
    await quotes.bulk_insert([quote(symbol, at, at) for at in (1, 2, 5)])
    writer, other = (QuoteRepository(database, settings) for _ in range(2))
    merged = Pause(writer._ingest, "_update_latest", monkeypatch)
    changed = Pause(other._ingest._transactions, "_commit", monkeypatch)
    watcher = await asyncpg.connect(lane.url)

    async def stands(task: asyncio.Task[Any], event: asyncio.Event) -> None:
        """Return when a task has ended, has come so far, or waits for another transaction."""
        waiting = (
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE NOT granted AND datname = current_database() AND locktype = 'transactionid'"
        )
        async with asyncio.timeout(30):
            while not (task.done() or event.is_set() or await watcher.fetchval(waiting)):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    try:
        batch = [quote(symbol, at, at) for at in (1, 3, 5)]
        writing = asyncio.create_task(writer.bulk_insert(batch, on_conflict=on_conflict, on_error="skip"))
        await merged.reached.wait()
        changing = asyncio.create_task(BESIDE[beside](other, symbol))
        await stands(changing, changed.reached)
        if not waits:
            changed.go.set()
            await stands(changing, asyncio.Event())
        merged.go.set()
        await stands(writing, asyncio.Event())
        changed.go.set()
        receipt, _ = await asyncio.gather(writing, changing)
    finally:
        await watcher.close()
    assert (receipt.inserted, receipt.updated) == (1, 0)
    found = sorted((await stored(quotes, symbol)).items())
    newest = await quotes.get_latest_quote(symbol)
    assert (newest and newest.to_dict()) == (found[-1][1] if found else None)
    spans = [nanoseconds(span.first) + span.first_nanos for span in await quotes.get_symbols() if span.symbol == symbol]
    assert spans == [key[1] for key, _ in found[:1]]


@pytest.mark.concurrent
@pytest.mark.parametrize("merged", [False, True], ids=["copied", "merged"])
async def test_nobody_changes_the_store_s_settings_while_a_late_quote_is_written(
    lane: Lane, database: Database, settings: Settings, symbol: str, merged: bool
) -> None:
    """Else a shorter retention could drop what is acknowledged. A COPY that fails must not end the lock."""
    own = QuoteRepository(database, settings)  # it has met no stored key yet, and begins with a COPY
    if merged:
        await own.bulk_insert([quote(symbol, 1, 9)])
    write = Write(Batch.from_rows([quote(symbol, 1), quote(symbol, 2)]))
    locker, changer = [await asyncpg.connect(lane.url) for _ in range(2)]
    ungranted = "SELECT count(*) FROM pg_locks WHERE NOT granted AND "
    try:
        await locker.execute("BEGIN; LOCK TABLE quotes.latest IN ACCESS EXCLUSIVE MODE")
        writing = asyncio.create_task(own.write([write], Attempt(within=60, lock_timeout=60, late=True)))
        async with asyncio.timeout(30):
            while not await locker.fetchval(f"{ungranted} relation = 'quotes.latest'::regclass"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await changer.execute("BEGIN")
        changing = asyncio.create_task(changer.execute("UPDATE quotes.settings SET retention = retention"))
        async with asyncio.timeout(30):
            waits = f"{ungranted} pid = $1"
            while not (changing.done() or await locker.fetchval(waits, changer.get_server_pid())):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not changing.done()
        await locker.execute("COMMIT")
        (receipt,) = await writing
        assert isinstance(receipt, Receipt)
        assert (receipt.inserted, receipt.updated) == ((1, 1) if merged else (2, 0))
        assert await changing == "UPDATE 1"
        await changer.execute("ROLLBACK")
    finally:
        await locker.close()
        await changer.close()


async def test_what_is_read_can_be_written_again(quotes: QuoteRepository, symbol: str) -> None:
    start = nanoseconds(datetime(2026, 11, 20, 10, tzinfo=UTC))
    rows = [
        {"symbol": symbol, "timestamp": rfc3339_nano(start + i), "bid": Decimal(f"1.{i}"), "volume": Decimal("0.5")}
        for i in (1, 2, 1_000, 999_999_999)
    ]
    assert (await quotes.bulk_insert(rows)).inserted == 4
    found = await quotes.get_quotes(symbol, start, start + 10**9)
    assert [quote.time_ns - start for quote in found] == [1, 2, 1_000, 999_999_999]
    assert (await quotes.bulk_insert([quote.to_dict() for quote in found])).unchanged == 4
    with pytest.raises(InvalidQuotes) as caught:
        await quotes.bulk_insert([found[0].to_dict() | {"nanos": 1000}])
    assert caught.value.rejections[0].code == "timestamp-invalid"
