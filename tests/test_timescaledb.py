"""What only a community TimescaleDB does: policies, refresh, the columnstore; on every lane that is one."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest

from app.db.capability import Level
from app.db.engine import Connection, Database
from app.main import create_app
from app.repository.quotes import QuoteRepository
from tests.conftest import Lane, random_symbol, running

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
            await opened.execute(f"CALL run_job({found['policy_refresh_continuous_aggregate', rollup]['job_id']})")


async def test_all_three_checks_are_healthy(lane: Lane) -> None:
    async with running(create_app(lane.make_settings(require_timescaledb="community"))) as client:
        answer = await client.get("/health")
    assert answer.status_code == 200
    body = answer.json()
    assert body["overall_status"] == "healthy"
    assert body["level"] == "community"
    assert {name: check["status"] for name, check in body["checks"].items()} == {
        "database": "healthy", "timescaledb": "healthy", "hypertable": "healthy",
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
    assert "timestamp" in columnstore["orderby"]
    assert "DESC" in columnstore["orderby"]
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
    assert '"drop_after": "17520:00:00"' in found["policy_retention", "real_time"]["config"]
    assert '"compress_after": "720:00:00"' in found["policy_compression", "real_time"]["config"]
    for rollup in ROLLUPS:
        config = found["policy_refresh_continuous_aggregate", rollup]["config"]
        assert '"start_offset": "17496:00:00"' in config, "retention less one chunk: never over dropped quotes"


async def bars_of(quotes: QuoteRepository, symbol: str, interval: str) -> list[tuple[Any, ...]]:
    found = await quotes.get_bars(symbol, interval, NOW - timedelta(days=40), NOW + timedelta(days=1), limit=100_000)
    return [(b.timestamp, b.open, b.high, b.low, b.close, b.volume, b.vwap, b.count) for b in found]


async def from_raw(connection: Connection, symbol: str, seconds: int) -> list[tuple[Any, ...]]:
    rows = await connection.fetch(
        "SELECT date_bin($2, timestamp, timestamptz '2000-01-03 00:00Z') AS at,"
        " (array_agg(price ORDER BY timestamp))[1], max(price), min(price),"
        " (array_agg(price ORDER BY timestamp DESC))[1], sum(volume),"
        " round(sum(price * volume) / nullif(sum(volume), 0), 8), count(*)"
        " FROM quotes.real_time WHERE symbol = $1 GROUP BY at ORDER BY at",
        symbol,
        timedelta(seconds=seconds),
    )
    return [tuple(row) for row in rows]


async def check_bars(database: Database, quotes: QuoteRepository, symbol: str) -> None:
    """Compare the bars served with those of the raw rows, one connection at a time."""
    for interval, seconds in (("1m", 60), ("5m", 300), ("1h", 3600), ("1d", 86400), ("1w", 604800)):
        found = await bars_of(quotes, symbol, interval)
        async with database.dedicated() as opened:
            assert found == await from_raw(opened, symbol, seconds), interval


def tick(symbol: str, at: datetime, price: int, volume: int | None = 1) -> dict[str, Any]:
    return {"symbol": symbol, "timestamp": at, "price": Decimal(price) / 8, "volume": volume}


@pytest.fixture
async def ticks(quotes: QuoteRepository) -> str:
    """Two weeks of a symbol, a tick every seven minutes, up to this hour."""
    symbol = random_symbol()
    start = NOW - timedelta(days=14)
    rows = [
        tick(symbol, start + timedelta(minutes=7 * i), 800 + (i * 37) % 101, i % 5) for i in range(14 * 24 * 60 // 7)
    ]
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
    await quotes.bulk_insert([tick(ticks, late, 99_999, 1000)])
    await run_refresh_jobs(database)
    day = late.replace(hour=0, minute=0, second=0)
    bars = await quotes.get_bars(ticks, "1d", day, day + timedelta(days=1))
    assert bars[0].high == Decimal(99_999) / 8
    await check_bars(database, quotes, ticks)


async def test_writes_into_compressed_chunks(database: Database, quotes: QuoteRepository) -> None:
    symbol = random_symbol()
    start = (NOW - timedelta(days=45)).replace(hour=0)
    rows = [tick(symbol, start + timedelta(minutes=i), i + 1) for i in range(1000)]
    await quotes.bulk_insert(rows)
    async with database.dedicated(statement_timeout=timedelta(minutes=2)) as opened:
        for chunk in await opened.fetch(
            "SELECT format('%I.%I', chunk_schema, chunk_name) AS name FROM timescaledb_information.chunks"
            " WHERE hypertable_name = 'real_time' AND range_start <= $1 AND range_end > $1 AND NOT is_compressed",
            start,
        ):
            await opened.execute(f"CALL convert_to_columnstore('{chunk['name']}')")
    receipt = await quotes.bulk_insert(
        [rows[0], {**rows[1], "price": 77}, tick(symbol, start + timedelta(seconds=30), 5), rows[999]]
    )
    assert (receipt.inserted, receipt.updated, receipt.unchanged) == (1, 1, 2)
    found = await quotes.get_quotes(symbol, start, start + timedelta(days=1), limit=5000)
    assert len(found) == 1001
    assert found[2].price == 77
    fresh = await quotes.bulk_insert([tick(symbol, start + timedelta(seconds=20), 5)])
    assert fresh.inserted == 1


async def test_metrics_name_the_level(client: httpx.AsyncClient) -> None:
    await client.get("/health")
    text = (await client.get("/metrics")).text
    assert 'quotes_build_info{level="community"' in text
    assert 'quotes_health_check_up{check="timescaledb"} 1.0' in text
