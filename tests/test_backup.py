"""The commands of docs/backup.md and docs/upgrades.md: what was dumped is what is restored, jobs included.

Invariant: a restored database has the count, the order-free hash, the bars, the jobs and the policies of its source.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from app.clock import Nanoseconds, nanoseconds
from app.db.capability import Level
from app.db.embedded import embedded_postgres, find_server
from app.db.engine import Database
from app.db.migrate import migrate
from app.repository.bars import BarPrice
from app.repository.quotes import QuoteRepository
from tests.conftest import Lane, fresh_database, random_symbol, refresh

START: Final = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=40)
END: Final = START + timedelta(days=50)
PRICES: Final[tuple[BarPrice, ...]] = ("last", "mid")
CONTENT: Final = """
SELECT count(*), coalesce(sum(hashtextextended(r::text, 0)::numeric), 0) FROM quotes.{} r
"""
COMMENTS: Final = """
SELECT c.relname::text, d.objsubid, d.description FROM pg_description d
JOIN pg_class c ON d.classoid = 'pg_class'::regclass AND d.objoid = c.oid
WHERE c.relnamespace = 'quotes'::regnamespace ORDER BY 1, 2
"""
JOBS: Final = """
SELECT proc_name::text, schedule_interval, scheduled, (config - 'hypertable_id' - 'mat_hypertable_id')::text AS config
FROM timescaledb_information.jobs WHERE job_id >= 1000 ORDER BY 1, 4
"""


async def run(program: str, *arguments: str) -> str:
    """A program of the wheel, whose version is that of the embedded server."""
    path = find_server(Path("/nonexistent")).bin / program
    process = await asyncio.create_subprocess_exec(
        str(path),
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PGCONNECT_TIMEOUT": "10"},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode() + errors.decode()


async def require_programs(url: str) -> None:
    """Skip where the wheel's programs are older than the server, which they then refuse to dump."""
    connection = await asyncpg.connect(url)
    version = connection.get_server_version()
    await connection.close()
    ours = find_server(Path("/nonexistent")).major
    if version.major != ours:
        pytest.skip(f"the server is PostgreSQL {version.major}, the client programs are of {ours}")


@asynccontextmanager
async def connected(lane: Lane, url: str) -> AsyncIterator[Database]:
    database = Database(url, lane.make_settings(statement_timeout="60 seconds"))
    await database.connect()
    try:
        yield database
    finally:
        await database.close()


async def filled(lane: Lane, url: str) -> list[str]:
    """Migrate, store quotes of forty days, and bring rollups and columnstore half way."""
    await migrate(url, lane.make_settings())
    symbols = sorted(random_symbol() for _ in range(3))
    async with connected(lane, url) as database:
        quotes = QuoteRepository(database, lane.make_settings())
        await quotes.bulk_insert(
            [
                {"symbol": symbol, "timestamp": Nanoseconds(nanoseconds(START) + i * (3607 * 10**9 + 1)),
                 "price": Decimal(i + 8) / 8 if i % 4 else None, "bid": Decimal(i + 1) / 10**12,
                 "ask": None if i % 3 else i + 1, "volume": i % 11, "source": 'a,"b"\\' if i % 5 else None}
                for symbol in symbols for i in range(900)
            ]
        )  # fmt: skip
        if database.capability.level >= Level.COMMUNITY:
            async with database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
                until = START + timedelta(days=20)
                for rollup in ("ohlc_1m", "ohlc_1h", "ohlc_1d"):
                    await refresh(connection, rollup, START, until, options='{"buckets_per_batch": 0}')
                chunks = await connection.fetch(
                    "SELECT format('%I.%I', chunk_schema, chunk_name) FROM timescaledb_information.chunks"
                    " WHERE hypertable_name = 'real_time' ORDER BY range_start LIMIT 10"
                )
                for chunk in chunks:
                    with suppress(asyncpg.DuplicateObjectError):  # the policy came first
                        await connection.execute(f"CALL convert_to_columnstore('{chunk[0]}')")
        # A late quote, so that a rollup is stale when the dump is made.
        await quotes.bulk_insert([{"symbol": symbols[0], "timestamp": START + timedelta(minutes=3), "price": 999}])
    return symbols


async def content(lane: Lane, url: str, symbols: list[str]) -> dict[str, Any]:
    """Counts and order-free hashes, bars, comments, and the jobs with their configuration."""
    async with connected(lane, url) as database:
        found: dict[str, Any] = {}
        async with database.dedicated(statement_timeout=timedelta(minutes=1)) as connection:
            for table in ("real_time", "latest"):
                found[table] = tuple(await connection.fetchrow(CONTENT.format(table)) or ())
            found["comments"] = [tuple(row) for row in await connection.fetch(COMMENTS)]
            found["revision"] = await connection.fetchval("SELECT version_num FROM alembic_version")
            if database.capability.level >= Level.COMMUNITY:
                found["jobs"] = [tuple(row) for row in await connection.fetch(JOBS)]
                found["materialized"] = await connection.fetchval(
                    "SELECT count(*) FROM quotes.ohlc_1h WHERE timestamp < $1", START + timedelta(days=20)
                )
        quotes = QuoteRepository(database, lane.make_settings())
        for interval in ("1m", "1h", "1d"):
            for price in PRICES:
                bars = await quotes.get_bars(symbols, interval, START, END, price=price, limit=100_000)
                found[f"{interval} {price}"] = bars
                assert bars
    return found


async def level_of(url: str) -> Level:
    connection = await asyncpg.connect(url)
    ready = await connection.fetchval("SELECT current_setting('timescaledb.license', true)")
    await connection.close()
    return {None: Level.POSTGRESQL, "apache": Level.APACHE}.get(ready, Level.COMMUNITY)


@pytest.mark.concurrent
async def test_backup_and_restore(lane: Lane, empty_url: str, shared_dir: Path) -> None:
    await require_programs(empty_url)
    symbols = await filled(lane, empty_url)
    before = await content(lane, empty_url, symbols)
    assert before["real_time"][0] == 2701
    dump = shared_dir / f"{symbols[0]}.dump"
    await run("pg_dump", "--format=custom", f"--file={dump}", empty_url)
    async with fresh_database(lane.url) as url:
        timescaledb = await level_of(lane.url) >= Level.APACHE
        if timescaledb:
            await run("psql", "-v", "ON_ERROR_STOP=1", "-c", "CREATE EXTENSION IF NOT EXISTS timescaledb", url)
            await run("psql", "-v", "ON_ERROR_STOP=1", "-c", "SELECT timescaledb_pre_restore()", url)
        await run("pg_restore", "--no-owner", "--exit-on-error", f"--dbname={url}", str(dump))
        if timescaledb:
            await run("psql", "-v", "ON_ERROR_STOP=1", "-c", "SELECT timescaledb_post_restore()", url)
        await run("psql", "-v", "ON_ERROR_STOP=1", "-c", "ANALYZE", url)
        assert await content(lane, url, symbols) == before
        # The restored database goes on: it is migrated, takes quotes, and has bars of them.
        await migrate(url, lane.make_settings())
        async with connected(lane, url) as database:
            quotes = QuoteRepository(database, lane.make_settings())
            late = START + timedelta(days=2, minutes=1, seconds=1)
            await quotes.bulk_insert([{"symbol": symbols[0], "timestamp": late, "price": 5000}])
            day = late.replace(hour=0, minute=0, second=0)
            (bar,) = await quotes.get_bars(symbols[0], "1d", day, day + timedelta(days=1))
            assert bar.high == 5000


@pytest.mark.concurrent
async def test_from_plain_postgresql_to_this_level(lane: Lane, empty_url: str, shared_dir: Path) -> None:
    """As docs/upgrades.md says: data only, into a database that this version has migrated."""
    await require_programs(empty_url)
    async with embedded_postgres(shared_dir / "gains") as plain:
        symbols = await filled(lane, plain)
        before = await content(lane, plain, symbols)
        file = shared_dir / f"{symbols[0]}.sql"
        await run(
            "pg_dump", "--data-only", "--table=quotes.real_time", "--table=quotes.latest", f"--file={file}", plain
        )  # fmt: skip
    await migrate(empty_url, lane.make_settings())
    await run("psql", "-v", "ON_ERROR_STOP=1", "--single-transaction", "--quiet", "-f", str(file), empty_url)
    after = await content(lane, empty_url, symbols)
    assert {key: after[key] for key in before} == before
