"""What only a community TimescaleDB does: policies, refresh, the columnstore; on every lane that is one."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest

from app.clock import Interval, nanoseconds, rfc3339_nano
from app.db.capability import Level
from app.db.engine import Connection, Database
from app.errors import DatabaseRefused
from app.main import create_app
from app.repository.bars import BarPrice, BarSpec
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Range
from tests.conftest import Lane, patiently, random_symbol, running

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
ROLLUPS = ("ohlc_1m", "ohlc_1h", "ohlc_1d")


@pytest.fixture(autouse=True)
def _community_only(database: Database) -> None:
    if database.capability.level < Level.COMMUNITY:
        pytest.skip(f"the level of this lane is {database.capability.level}")


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with database.dedicated(statement_timeout=timedelta(minutes=2)) as opened:
        yield opened


async def jobs(connection: Connection) -> dict[tuple[str, str], dict[str, Any]]:
    """Jobs of the schema by procedure and by the relation that users know."""
    rows = await connection.fetch(
        "SELECT j.job_id, j.proc_name::text, coalesce(c.view_name, j.hypertable_name)::text AS relation,"
        " j.schedule_interval, j.config::text"
        " FROM timescaledb_information.jobs j LEFT JOIN timescaledb_information.continuous_aggregates c"
        " ON c.materialization_hypertable_name = j.hypertable_name WHERE j.job_id >= 1000"
    )
    return {(row["proc_name"], row["relation"]): dict(row) for row in rows}


async def run_refresh_jobs(database: Database) -> None:
    """Run the refresh policies in order, as the scheduler would."""
    async with database.dedicated(statement_timeout=timedelta(minutes=2)) as opened:
        found = await jobs(opened)
        for rollup in ROLLUPS:
            job = found["policy_refresh_continuous_aggregate", rollup]["job_id"]
            await patiently(opened, f"CALL run_job({job})")


async def test_all_three_checks_are_healthy(lane: Lane) -> None:
    async with running(create_app(lane.make_settings(require_timescaledb="community"))) as client:
        answer = await client.get("/health")
    assert answer.status_code == 200
    body = answer.json()
    assert body["overall_status"] == lane.soundest
    assert body["level"] == "community"
    assert {name: check["status"] for name, check in body["checks"].items()} == {
        "database": "healthy", "timescaledb": lane.soundest, "hypertable": "healthy",
    }  # fmt: skip
    assert body["checks"]["timescaledb"]["version"].startswith("2.")


async def test_the_catalog_lists_what_was_promised(connection: Connection) -> None:
    hypertables = await connection.fetch(
        "SELECT hypertable_name::text, compression_enabled FROM timescaledb_information.hypertables"
        " WHERE hypertable_schema = 'quotes'"
    )
    assert [tuple(row) for row in hypertables] == [("real_time", True)]
    dimension = await connection.fetchval(
        "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'real_time'"
    )
    assert dimension == timedelta(days=1)
    aggregates = await connection.fetch(
        "SELECT view_name::text, materialized_only FROM timescaledb_information.continuous_aggregates ORDER BY 1"
    )
    assert [tuple(row) for row in aggregates] == [("ohlc_1d", False), ("ohlc_1h", False), ("ohlc_1m", False)]
    columnstore = await connection.fetchrow(
        "SELECT segmentby::text, orderby::text FROM timescaledb_information.hypertable_columnstore_settings"
        " WHERE hypertable = 'quotes.real_time'::regclass"
    )
    assert columnstore is not None
    assert columnstore["segmentby"] == "symbol"
    assert columnstore["orderby"].replace('"', "") == "timestamp DESC,nanos DESC"
    found = await jobs(connection)
    assert {("policy_compression", "real_time"), *(("policy_refresh_continuous_aggregate", r) for r in ROLLUPS)} <= set(
        found
    )


async def test_policies_follow_the_settings(lane: Lane, empty_url: str) -> None:
    from app.db.migrate import migrate  # noqa: PLC0415  one test of its own database

    settings = lane.make_settings(retention="2 years", compress_after="30 days")
    await migrate(empty_url, settings)
    database = Database(empty_url, settings)
    async with database.dedicated() as opened:
        found = await jobs(opened)
        assert await opened.fetchval("SELECT retention FROM quotes.settings") == timedelta(days=730)
    assert not any(procedure == "policy_retention" for procedure, _ in found), "it would ask nobody"
    assert '"compress_after": "720:00:00"' in found["policy_compression", "real_time"]["config"]
    for rollup in ROLLUPS:
        config = found["policy_refresh_continuous_aggregate", rollup]["config"]
        assert '"start_offset": "17496:00:00"' in config, "retention less one chunk: never over dropped quotes"


async def bars_of(quotes: QuoteRepository, symbol: str, interval: str, price: BarPrice) -> list[tuple[Any, ...]]:
    found = await quotes.get_bars(
        symbol, interval, NOW - timedelta(days=40), NOW + timedelta(days=1), price=price, limit=100_000
    )
    return [(b.timestamp, b.open, b.high, b.low, b.close, b.volume, b.vwap, b.count) for b in found]


async def from_raw(connection: Connection, symbol: str, seconds: int, price: BarPrice) -> list[tuple[Any, ...]]:
    value = {"last": "price", "mid": "(bid + ask) / 2"}[price]
    rows = await connection.fetch(
        "SELECT date_bin($2, timestamp, timestamptz '2000-01-03 00:00Z') AS at,"
        f" (array_agg({value} ORDER BY timestamp, nanos))[1], max({value}), min({value}),"
        f" (array_agg({value} ORDER BY timestamp DESC, nanos DESC))[1], sum(volume),"
        f" round(sum({value} * volume) / nullif(sum(volume), 0), 16), count(*)"
        f" FROM quotes.real_time WHERE symbol = $1 AND {value} IS NOT NULL GROUP BY at ORDER BY at",
        symbol,
        timedelta(seconds=seconds),
    )
    return [tuple(row) for row in rows]


PRICES: tuple[BarPrice, ...] = ("last", "mid")


async def check_bars(database: Database, quotes: QuoteRepository, symbol: str) -> None:
    """Compare the bars served with those of the raw rows, one connection at a time."""
    for interval, seconds in (("1m", 60), ("5m", 300), ("1h", 3600), ("1d", 86400), ("1w", 604800)):
        for price in PRICES:
            found = await bars_of(quotes, symbol, interval, price)
            async with database.dedicated() as opened:
                assert found == await from_raw(opened, symbol, seconds, price), (interval, price)


def tick(symbol: str, at: datetime, price: int, volume: int | None = 1, nanos: int = 0) -> dict[str, Any]:
    return {
        "symbol": symbol, "timestamp": rfc3339_nano(nanoseconds(at) + nanos), "price": Decimal(price) / 8,
        "volume": volume,
    }  # fmt: skip


def offer(symbol: str, at: datetime, bid: int | None, ask: int | None, nanos: int = 0) -> dict[str, Any]:
    """A quote of which nothing was traded, and whose volume is none of the trades'."""
    sides = {side: None if value is None else Decimal(value) / 8 for side, value in (("bid", bid), ("ask", ask))}
    return {**tick(symbol, at, 1, 1000, nanos), "price": None, **sides}


@pytest.fixture
async def ticks(quotes: QuoteRepository) -> str:
    """Two weeks of a symbol up to this hour: every seven minutes a trade, around it quotes with one side or both."""
    symbol = random_symbol()
    start = NOW - timedelta(days=14)
    rows = []
    for i in range(14 * 24 * 60 // 7):
        at, price = start + timedelta(minutes=7 * i), 800 + (i * 37) % 101
        rows.append(offer(symbol, at, price - 60, price + 70 if i % 3 else None))
        if i % 4:
            rows.append(tick(symbol, at, price, i % 5, 1))
        if i % 5:
            rows.append(tick(symbol, at, price + 1, i % 5, 2))
        rows.append(offer(symbol, at, price - 50 if i % 2 else None, price + 40, 3))
    await quotes.bulk_insert(rows)
    return symbol


async def test_bars_equal_raw_before_and_after_the_refresh_jobs(
    lane: Lane, database: Database, quotes: QuoteRepository, ticks: str
) -> None:
    # Before any refresh all bars are computed in real time, on a database whose scheduler does not interfere.
    if lane.name == "timescaledb":
        await check_bars(database, quotes, ticks)
    await run_refresh_jobs(database)
    async with database.dedicated() as opened:
        materialized = await opened.fetchval(
            "SELECT count(*) FROM quotes.ohlc_1d WHERE symbol = $1 AND timestamp < $2", ticks, NOW - timedelta(days=2)
        )
    assert materialized >= 12
    await check_bars(database, quotes, ticks)


async def test_a_late_row_appears_in_the_bars_after_refresh(
    database: Database, quotes: QuoteRepository, ticks: str
) -> None:
    await run_refresh_jobs(database)
    late = NOW - timedelta(days=10, minutes=1, seconds=1)
    await quotes.bulk_insert([tick(ticks, late, 99_999, 1000), offer(ticks, late, 79_999, 80_001, 1)])
    await run_refresh_jobs(database)
    day = late.replace(hour=0, minute=0, second=0)
    for price, high in zip(PRICES, (99_999, 80_000), strict=True):
        bars = await quotes.get_bars(ticks, "1d", day, day + timedelta(days=1), price=price)
        assert bars[0].high == Decimal(high) / 8
    await check_bars(database, quotes, ticks)


async def test_bars_of_quotes_alone_come_from_the_rollups(database: Database, quotes: QuoteRepository) -> None:
    """Of currencies nothing is known but what is bid and asked."""
    symbol = random_symbol()
    start = (NOW - timedelta(days=6)).replace(hour=0)
    await quotes.bulk_insert(
        [
            offer(symbol, start + timedelta(seconds=97 * i), 900 + i % 13, 910 + i % 7, nanos)
            for i in range(3000) for nanos in (0, 1 + i % 900)
        ]
    )  # fmt: skip
    await run_refresh_jobs(database)
    async with database.dedicated() as opened:
        rows = await opened.fetch(
            "SELECT count, open, mid_count FROM quotes.ohlc_1d WHERE symbol = $1 ORDER BY timestamp", symbol
        )
        assert len(rows) == 4
        assert {(row["count"], row["open"]) for row in rows} == {(0, None)}
        assert sum(row["mid_count"] for row in rows) == 6000
        summaries = "SELECT count(*) FROM quotes.daily_summary WHERE symbol = $1"
        assert await opened.fetchval(summaries, symbol) == 0, "a day without trades has no line"
    await check_bars(database, quotes, symbol)
    assert await bars_of(quotes, symbol, "1d", "last") == []
    wanted = Range([symbol], nanoseconds(start), nanoseconds(start + timedelta(days=7)))
    for spec, reasons in ((BarSpec(Interval(1, "d")), [(symbol, "no-trades")]), (BarSpec(Interval(1, "d"), "mid"), [])):
        page, missing = await quotes.bars_page(wanted, spec)
        assert (bool(page.rows), missing) == (not reasons, reasons)


async def compress(database: Database, at: datetime) -> None:
    """Move the chunk of a moment to the columnstore."""
    async with database.dedicated(statement_timeout=timedelta(minutes=2)) as opened:
        for chunk in await opened.fetch(
            "SELECT format('%I.%I', chunk_schema, chunk_name) AS name FROM timescaledb_information.chunks"
            " WHERE hypertable_name = 'real_time' AND range_start <= $1 AND range_end > $1",
            at,
        ):
            await patiently(opened, f"CALL convert_to_columnstore('{chunk['name']}', recompress => true)")


async def test_writes_into_compressed_chunks(database: Database, quotes: QuoteRepository) -> None:
    symbol = random_symbol()
    start = (NOW - timedelta(days=45)).replace(hour=0)
    rows = [tick(symbol, start + timedelta(minutes=i), i + 1) for i in range(1000)]
    await quotes.bulk_insert(rows)
    await compress(database, start)
    receipt = await quotes.bulk_insert(
        [rows[0], {**rows[1], "price": 77}, tick(symbol, start + timedelta(seconds=30), 5), rows[999]]
    )
    assert (receipt.inserted, receipt.updated, receipt.unchanged) == (1, 1, 2)
    found = await quotes.get_quotes(symbol, start, start + timedelta(days=1), limit=5000)
    assert len(found) == 1001
    assert found[2].price == 77
    fresh = await quotes.bulk_insert([tick(symbol, start + timedelta(seconds=20), 5)])
    assert fresh.inserted == 1
    # A nanosecond is part of the key there too.
    close = [tick(symbol, start, 9, 1, nanos) for nanos in (0, 1, 999)]
    receipt = await quotes.bulk_insert(close, on_conflict="ignore")
    assert (receipt.inserted, receipt.unchanged) == (2, 1)
    assert await quotes.delete_quotes(symbol, nanoseconds(start) + 1, nanoseconds(start) + 999) == 1
    (first, second, _) = await quotes.get_quotes(symbol, start, start + timedelta(seconds=21))
    assert (first.nanos, second.nanos) == (0, 999)
    with pytest.raises(DatabaseRefused):
        async with database.acquire() as opened:
            await opened.execute(
                "INSERT INTO quotes.real_time (symbol, timestamp, price) VALUES ($1, $2, 'NaN')",
                symbol,
                start + timedelta(seconds=40),
            )


@pytest.mark.parametrize("first", ["bid", "ask"])
async def test_sides_are_merged_in_a_compressed_chunk(database: Database, quotes: QuoteRepository, first: str) -> None:
    symbol = random_symbol()
    start = (NOW - timedelta(days=46)).replace(hour=0)
    moments = [start + timedelta(minutes=i) for i in range(100)]
    bids = [offer(symbol, at, i + 1, None, i) for i, at in enumerate(moments)]
    asks = [offer(symbol, at, None, i + 9, i) for i, at in enumerate(moments)]
    before, then = (bids, asks) if first == "bid" else (asks, bids)
    assert (await quotes.bulk_insert(before, on_conflict="merge")).inserted == 100
    await compress(database, start)
    receipt = await quotes.bulk_insert(then, on_conflict="merge")
    assert (receipt.inserted, receipt.updated) == (0, 100)
    await compress(database, start)
    again = await quotes.bulk_insert([*before, *then], on_conflict="merge")
    assert (again.unchanged, again.superseded, again.updated) == (100, 100, 0)
    found = await quotes.get_quotes(symbol, start, start + timedelta(days=1))
    assert [(row.nanos, row.price, row.bid, row.ask) for row in found] == [
        (i, None, Decimal(i + 1) / 8, Decimal(i + 9) / 8) for i in range(100)
    ]
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert newest.to_dict() == found[-1].to_dict()
    mids = await quotes.get_bars(symbol, "1h", start, start + timedelta(days=1), price="mid")
    assert [(bar.open, bar.close, bar.count) for bar in mids] == [
        (Decimal(5) / 8, Decimal(64) / 8, 60), (Decimal(65) / 8, Decimal(104) / 8, 40),
    ]  # fmt: skip


async def test_the_columnstore_keeps_no_bloom_filter(database: Database, quotes: QuoteRepository, symbol: str) -> None:
    start = (NOW - timedelta(days=47)).replace(hour=0)
    await quotes.bulk_insert([tick(symbol, start + timedelta(seconds=i), i + 1, None, i) for i in range(999)])
    await compress(database, start)
    async with database.dedicated() as opened:
        known = await opened.fetchval(
            "SELECT count(*) FROM pg_attribute WHERE attname = 'index'"
            " AND attrelid = '_timescaledb_catalog.compression_settings'::regclass"
        )
        if not known:
            pytest.skip("this version keeps no sparse indexes")
        chunks = await opened.fetch(
            "SELECT compress_relid::regclass::text AS name, index::text FROM _timescaledb_catalog.compression_settings"
            " WHERE compress_relid IS NOT NULL AND orderby = '{timestamp,nanos}'"
        )
        assert chunks
        for name, index in chunks:
            assert "bloom" not in index
            columns = await opened.fetch(
                "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0", name
            )
            names = [row[0] for row in columns]
            assert "nanos" in names
            assert not any("bloom" in column for column in names), names


async def test_metrics_name_the_level(client: httpx.AsyncClient) -> None:
    await client.get("/health")
    text = (await client.get("/metrics")).text
    assert 'quotes_build_info{level="community"' in text
    assert 'quotes_health_check_up{check="timescaledb"} 1.0' in text
