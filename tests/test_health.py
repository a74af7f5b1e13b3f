"""The verdicts of the three checks, for every state that a store can be in."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from app.cli import _report as reported
from app.db.capability import Capability
from app.db.embedded import embedded_postgres
from app.db.engine import Database
from app.db.hosts import Writable
from app.db.migrate import downgrade, head, migrate
from app.errors import DatabaseMisconfigured, DatabaseUnavailable, QueryTimeout, StartupError
from app.health import Health, Report
from app.main import create_app
from app.metrics import REGISTRY
from app.repository.quotes import QuoteRepository
from app.repository.storage import StorageRepository
from app.repository.system import ClockDifference, Observation, SystemRepository
from app.settings import Settings
from tests.conftest import Lane, free_port, random_symbol, run, running
from tests.proxy import proxy
from tests.test_embedded import small_volume
from tests.test_service import command

COMMUNITY = Capability.of(("18.6", "2.29.2", "timescale"))
APACHE = Capability.of(("18.6", "2.29.2", "apache"))
PLAIN = Capability.of(("18.6", None, None))
GOOD = Observation(COMMUNITY, True, ["symbol", "timestamp", "nanos"], 7, head())


class Looking(SystemRepository):
    """A repository that sees what the test shows it."""

    def __init__(self, shown: Observation | Exception) -> None:
        self.shown = shown
        self.looks = 0

    async def observe(self, timeout: float) -> Observation:  # noqa: ARG002  as in the interface
        self.looks += 1
        if isinstance(self.shown, Exception):
            raise self.shown
        return self.shown


async def verdict(shown: Observation | Exception, required: str = "community") -> Report:
    settings = Settings(_env_file=None, require_timescaledb=required)
    return await Health(Looking(shown), settings, head()).report()


def change(**fields: Any) -> Observation:
    return dataclasses.replace(GOOD, **fields)


def server(timescaledb: str, postgresql: str = "18.6") -> Capability:
    return Capability.of((postgresql, timescaledb, "timescale"))


@pytest.mark.parametrize(
    ("shown", "required", "statuses", "overall"),
    [
        (GOOD, "community", ("healthy", "healthy", "healthy"), "healthy"),
        (change(capability=APACHE), "community", ("healthy", "unhealthy", "healthy"), "unhealthy"),
        (change(capability=APACHE), "apache", ("healthy", "skipped", "healthy"), "healthy"),
        (change(capability=PLAIN, chunks=None), "apache", ("healthy", "unhealthy", "healthy"), "unhealthy"),
        (change(capability=PLAIN, chunks=None), "none", ("healthy", "skipped", "healthy"), "healthy"),
        (change(chunks=None), "community", ("healthy", "healthy", "degraded"), "degraded"),
        (change(revision="r1"), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(revision="r999"), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(missing=("quotes.latest",)), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(flaw="no column"), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(lacking=("INSERT on quotes.latest",)), "none", ("unhealthy", "healthy", "healthy"), "unhealthy"),
        (change(standby=True, read_only=True), "none", ("unhealthy", "healthy", "healthy"), "unhealthy"),
        (change(read_only=True), "none", ("unhealthy", "healthy", "healthy"), "unhealthy"),
        (change(full=True), "none", ("unhealthy", "healthy", "healthy"), "unhealthy"),
        (change(refusal="It is full."), "none", ("unhealthy", "healthy", "healthy"), "unhealthy"),
        (change(capability=server("2.29.1")), "community", ("healthy", "degraded", "healthy"), "degraded"),
        (change(capability=server("2.23.0-dev")), "community", ("healthy", "degraded", "healthy"), "degraded"),
        (change(capability=server("2.22.1")), "community", ("healthy", "unhealthy", "healthy"), "unhealthy"),
        (change(capability=server("2.9.3")), "none", ("healthy", "unhealthy", "healthy"), "unhealthy"),
        (change(capability=server("2.30.0")), "community", ("healthy", "healthy", "healthy"), "healthy"),
        (change(capability=server("2.29.2", "15.20")), "none", ("unhealthy", "healthy", "healthy"), "unhealthy"),
        (change(capability=server("2.29.2", "16.4 (x)")), "none", ("healthy", "healthy", "healthy"), "healthy"),
        (change(capability=server("2.29.2", "19beta1")), "none", ("degraded", "healthy", "healthy"), "degraded"),
        (change(revision=None), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(table_exists=False), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(primary_key=["symbol"]), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (change(primary_key=None), "community", ("healthy", "healthy", "unhealthy"), "unhealthy"),
        (DatabaseUnavailable("away"), "none", ("unhealthy", "skipped", "skipped"), "unhealthy"),
        (QueryTimeout("slow"), "none", ("unhealthy", "skipped", "skipped"), "unhealthy"),
        (TimeoutError(), "none", ("unhealthy", "skipped", "skipped"), "unhealthy"),
    ],
)
async def test_verdicts(
    shown: Observation | Exception, required: str, statuses: tuple[str, str, str], overall: str
) -> None:
    report = await verdict(shown, required)
    assert tuple(check.status for check in report.checks) == statuses
    assert report.status == overall
    assert report.to_dict()["overall_status"] == overall
    assert all(check.detail for check in report.checks)


async def test_a_store_is_told_from_others(empty_url: str, lane: Lane) -> None:
    settings = lane.make_settings(database_url=empty_url)

    async def store() -> str | None:
        async with contextlib.AsyncExitStack() as stack:
            database = Database(empty_url, settings)
            await database.connect()
            stack.push_async_callback(database.close)
            report = await Health(SystemRepository(database), settings, head()).report()
            assert report.to_dict()["store"] == report.store
            return report.store

    assert await store() is None, "nothing is stored without a table"
    await migrate(empty_url, settings)
    first = await store()
    assert first == await store()
    assert re.fullmatch("[0-9a-f]{16}", first or "")
    connection = await asyncpg.connect(empty_url)
    try:
        await connection.execute("DROP SCHEMA quotes CASCADE")
    finally:
        await connection.close()
    await migrate(empty_url, settings)
    assert await store() not in {first, None}, "a table that was made again has lost its quotes"


async def test_a_store_that_was_promoted_is_another(shared_dir: Path) -> None:
    """As after a failover or a recovery to a point in time, quotes that were acknowledged may not be there."""
    data_dir = shared_dir / "promoted"

    async def store(url: str) -> str | None:
        settings = Settings(_env_file=None, database_url=url, require_timescaledb="none")
        database = Database(url, settings)
        try:
            return (await Health(SystemRepository(database), settings, head()).report()).store
        finally:
            await database.close()

    async with embedded_postgres(data_dir) as url:
        await migrate(url, Settings(_env_file=None, database_url=url, require_timescaledb="none"))
        first = await store(url)
    async with embedded_postgres(data_dir) as url:
        assert await store(url) == first is not None
    (data_dir / "pgdata" / "standby.signal").touch()
    async with embedded_postgres(data_dir) as url:
        assert await store(url) is None
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT pg_promote()")
        await connection.close()
        assert await store(url) not in {first, None}


async def test_many_probes_share_one_look() -> None:
    looking = Looking(GOOD)
    health = Health(looking, Settings(_env_file=None), head())
    for _ in range(5):
        await health.report()
    assert looking.looks == 1


async def test_a_slow_database_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 1.5))
    monkeypatch.setattr("app.health.time.perf_counter", lambda: next(clock))
    report = await verdict(GOOD)
    assert (report.status, report.checks[0].latency_ms) == ("degraded", 1500.0)


async def test_probes_of_a_running_service(lane: Lane) -> None:
    async with running(create_app(lane.make_settings())) as client:
        assert (await client.get("/health")).json()["overall_status"] == lane.soundest
        assert (await client.get("/health/live")).json() == {"status": "alive"}
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


async def test_a_stopping_service_is_not_ready(lane: Lane, symbol: str) -> None:
    app = create_app(lane.make_settings())
    async with running(app) as client:
        app.state.services.writer.stop_accepting()
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
        assert ready.headers["connection"] == "close", "the client leaves before the server does"
        quote = {"symbol": symbol, "timestamp": "2026-11-16T00:00:00Z", "price": 1}
        taken = await client.post("/v1/quotes", json=[quote])
        assert (taken.status_code, taken.headers["connection"]) == (200, "close")


async def test_a_service_that_has_stopped_takes_nothing(lane: Lane, symbol: str) -> None:
    app = create_app(lane.make_settings(drain_timeout="10 ms"))
    async with running(app) as client:
        app.state.services.writer.stop_accepting()
        await asyncio.sleep(0.1)
        quote = {"symbol": symbol, "timestamp": "2026-11-16T00:00:00Z", "price": 1}
        refused = await client.post("/v1/quotes", json=[quote])
        assert (refused.status_code, refused.json()["code"]) == (503, "service-stopping")
        assert refused.headers["retry-after"] == "1"


async def test_health_of_a_database_that_went_away(lane: Lane) -> None:
    settings = lane.make_settings()
    nowhere = Database("postgresql://nobody@127.0.0.1:1/none", settings)
    began = time.monotonic()
    report = await Health(SystemRepository(nowhere), settings, head()).report()
    assert report.status == "unhealthy"
    assert time.monotonic() - began < 10
    assert "postgresql://" not in str(report.to_dict())


@pytest.mark.parametrize(
    ("seconds", "within", "status", "words"),
    [
        (0.2, 0.001, "healthy", ("Answers.",)),
        (-5.0, 0.001, "healthy", ("Answers.",)),
        (5.1, 0.01, "degraded", ("5.1 s ahead of",)),
        (-7.0, 0.01, "degraded", ("7.0 s behind",)),
        # A slow answer says little of the clocks.
        (5.5, 0.6, "healthy", ("Answers.",)),
        (-60.0, 0.0, "degraded", ("60.0 s behind",)),
        (-120.0, 0.01, "unhealthy", ("120.0 s behind", "quotes of now are refused")),
        (90_000.0, 0.01, "unhealthy", ("90000.0 s ahead of", "quotes of the future are stored")),
    ],
)
async def test_clocks_that_differ(seconds: float, within: float, status: str, words: tuple[str, ...]) -> None:
    report = await verdict(change(clock=ClockDifference(seconds, within)))
    check = report.checks[0]
    assert check.status == report.status == status
    assert all(word in check.detail for word in words)
    assert check.to_dict()["clock_difference_ms"] == 1000 * seconds
    assert REGISTRY.get_sample_value("quotes_clock_difference_seconds") == seconds
    assert "clock_difference_ms" not in report.checks[1].to_dict()


@pytest.mark.parametrize("behind", [0, 120, -90_000])
async def test_the_difference_of_clocks_is_measured(lane: Lane, database: Database, behind: int) -> None:
    """By a clock of this process that is wrong."""
    wrong = SystemRepository(database, lambda: datetime.now(UTC) - timedelta(seconds=behind))
    report = await Health(wrong, lane.make_settings(), head()).report()
    measured = report.to_dict()["checks"]["database"]["clock_difference_ms"] / 1000
    assert measured == pytest.approx(-behind, abs=1)
    assert report.status == ("unhealthy" if behind else lane.soundest)


@pytest.mark.parametrize(
    ("count", "words"),
    [(1, "1 process of this service may open 34 connections, and max_connections"), (2, "2 processes")],
)
async def test_a_limit_of_connections_is_named(monkeypatch: pytest.MonkeyPatch, count: int, words: str) -> None:
    monkeypatch.setattr("app.health.workers.number", lambda: count)
    detail = (await verdict(change(connections=30, limit="max_connections of the server"))).checks[0].detail
    assert detail.startswith(words)
    assert "of the server allows 30: lower" in detail


async def test_several_servers_that_take_writes_are_named() -> None:
    two = (Writable("db1:5432", 1), Writable("db2:5432", 2))
    report = await verdict(change(writable=two, host="db2:5432"))
    assert report.status == "degraded"
    assert report.checks[0].detail == (
        "2 servers take writes: db1:5432 (timeline 1), db2:5432 (timeline 2). This service writes to db2:5432;"
        " stop the others."
    )
    assert (await verdict(change(writable=two[1:], host="db2:5432"))).status == "healthy"


async def seen_by(url: str, lane: Lane, **settings: Any) -> Report:
    """What health says of a database."""
    given = lane.make_settings(database_url=url, **settings)
    database = Database(url, given)
    try:
        return await Health(SystemRepository(database), given, head()).report()
    finally:
        await database.close()


async def test_versions_are_named_as_found_and_as_wanted(lane: Lane, database: Database) -> None:
    report = await Health(SystemRepository(database), lane.make_settings(), head()).report()
    checks = report.to_dict()["checks"]
    assert (checks["database"]["version"], checks["database"]["wanted"]) == (
        database.capability.postgresql, "16 to 18",
    )  # fmt: skip
    assert (checks["hypertable"]["version"], checks["hypertable"]["wanted"]) == (head(), head())
    assert checks["timescaledb"]["version"] == database.capability.timescaledb
    strict = await Health(SystemRepository(database), lane.make_settings(require_timescaledb="apache"), head()).report()
    assert strict.checks[1].wanted == "2.29.2 or newer"


async def test_a_schema_of_another_version_is_not_ready(lane: Lane, empty_url: str) -> None:
    settings = lane.make_settings(database_url=empty_url)
    await migrate(empty_url, settings, "r4")
    older = await seen_by(empty_url, lane)
    assert (older.status, older.checks[2].version, older.checks[2].wanted) == ("unhealthy", "r4", head())
    assert "at revision r4" in older.checks[2].detail
    assert f"needs {head()}" in older.checks[2].detail
    await migrate(empty_url, settings)
    assert (await seen_by(empty_url, lane)).status == lane.soundest
    await run(empty_url, "UPDATE quotes.alembic_version SET version_num = 'r999'")
    newer = await seen_by(empty_url, lane)
    assert (newer.status, newer.checks[2].version) == ("unhealthy", "r999")
    for step in (migrate, downgrade):
        with pytest.raises(
            StartupError, match=f"revision r999, which this version .* does not know; it needs {head()}"
        ):
            await step(empty_url, settings)


async def test_what_is_missing_of_the_schema_is_named(lane: Lane, empty_url: str) -> None:
    """Whatever the revision says; as after an operator's mistake."""
    await migrate(empty_url, lane.make_settings(database_url=empty_url))
    assert (await seen_by(empty_url, lane)).status == lane.soundest
    await run(empty_url, "ALTER TABLE quotes.latest RENAME COLUMN source TO origin")
    renamed = await seen_by(empty_url, lane)
    assert (renamed.status, renamed.checks[2].status) == ("unhealthy", "unhealthy")
    assert 'column "source"' in renamed.checks[2].detail
    await run(empty_url, "ALTER TABLE quotes.latest RENAME COLUMN origin TO source")
    await run(empty_url, "ALTER TABLE quotes.settings RENAME COLUMN chunk_interval TO chunks")
    renamed = await seen_by(empty_url, lane)
    assert (renamed.status, renamed.checks[2].status) == ("unhealthy", "unhealthy")
    assert "chunk_interval" in renamed.checks[2].detail
    for name in ("quotes.daily_summary", "quotes.receipts", "quotes.backups", "quotes.latest", "quotes.settings"):
        await run(empty_url, f"DROP {'VIEW' if 'summary' in name else 'TABLE'} {name}")
        gone = await seen_by(empty_url, lane)
        assert (gone.status, gone.checks[2].status) == ("unhealthy", "unhealthy"), name
        assert name in gone.checks[2].detail
    await run(empty_url, "DROP SCHEMA quotes CASCADE")
    assert "quotes.real_time is missing" in (await seen_by(empty_url, lane)).checks[2].detail


GRANTS = (
    "GRANT USAGE ON SCHEMA quotes TO {}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA quotes TO {}",
)


@pytest.mark.concurrent
async def test_a_role_that_lacks_a_privilege_is_not_ready_and_told_which(lane: Lane, empty_url: str) -> None:
    """The grants of the page on deployment suffice, and each of them is needed."""
    await migrate(empty_url, lane.make_settings(database_url=empty_url))
    role = f"app_{random_symbol().lower()}"
    name = urlsplit(empty_url).path[1:]
    await run(empty_url, f"CREATE ROLE {role} LOGIN", *(grant.format(role) for grant in GRANTS))
    parts = urlsplit(empty_url)
    url = urlunsplit(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}"))
    try:
        ready = await seen_by(url, lane)
        assert ready.status == lane.soundest, ready.to_dict()
        given = lane.make_settings(database_url=url, migrate_on_start=False)
        async with QuoteRepository.open(url, given) as quotes:
            stored = await quotes.bulk_insert([{"symbol": "A", "timestamp": datetime.now(UTC), "price": 1}])
            assert stored.inserted == 1
        for what, lacks in (
            ("INSERT ON quotes.real_time", "INSERT on quotes.real_time"),
            ("UPDATE ON quotes.latest", "UPDATE on quotes.latest"),
            ("SELECT ON quotes.ohlc_1h", "SELECT on quotes.ohlc_1h"),
            ("SELECT ON quotes.daily_summary", "SELECT on quotes.daily_summary"),
            ("UPDATE ON quotes.settings", "UPDATE on quotes.settings"),
            ("DELETE ON quotes.receipts", "DELETE on quotes.receipts"),
            ("USAGE ON SCHEMA quotes", "USAGE on the schema quotes"),
            ("SELECT ON quotes.alembic_version", "SELECT on quotes.alembic_version"),
        ):
            await run(empty_url, f"REVOKE {what} FROM {role}")
            less = await seen_by(url, lane)
            assert less.status == "unhealthy", what
            assert f"lacks {lacks}" in less.checks[0].detail, what
            await run(empty_url, f"GRANT {what} TO {role}")
        await run(empty_url, f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
        assert "lacks TEMPORARY" in (await seen_by(url, lane)).checks[0].detail
        await run(empty_url, f"GRANT TEMPORARY ON DATABASE {name} TO {role}")
        assert (await seen_by(url, lane)).status == lane.soundest
        for table in ("latest", "receipts", "settings", "alembic_version"):
            await run(empty_url, f"ALTER TABLE quotes.{table} ENABLE ROW LEVEL SECURITY")
            hidden = await seen_by(url, lane)
            told = f"Row security of quotes.{table} applies to this role"
            assert (hidden.status, told in hidden.checks[0].detail) == ("unhealthy", True)
            await run(empty_url, f"ALTER TABLE quotes.{table} DISABLE ROW LEVEL SECURITY")
        if ready.level != "postgresql":
            await run(empty_url, "REVOKE USAGE ON SCHEMA public FROM PUBLIC")
            grant = f"GRANT USAGE ON SCHEMA public TO {role};"
            assert (await seen_by(url, lane)).checks[0].detail.endswith(grant)
            with pytest.raises(DatabaseMisconfigured, match=re.escape(grant)):
                await StorageRepository(Database(url, given)).look()
            await run(empty_url, grant)
            assert (await seen_by(url, lane)).status == lane.soundest
        await run(empty_url, f"ALTER ROLE {role} SET default_transaction_read_only = on")
        blocked = await seen_by(url, lane)
        assert (blocked.status, "read-only" in blocked.checks[0].detail) == ("unhealthy", True)
    finally:
        await run(empty_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_standby_in_the_place_of_the_primary_is_not_ready(shared_dir: Path) -> None:
    data_dir = shared_dir / "instead"
    lane = Lane("postgresql", "", "")
    async with embedded_postgres(data_dir) as url:
        await migrate(url, lane.make_settings(database_url=url))
    (data_dir / "pgdata" / "standby.signal").touch()
    async with embedded_postgres(data_dir) as url:
        report = await seen_by(url, lane)
        assert report.status == "unhealthy"
        assert "is a standby" in report.checks[0].detail
        told = await asyncio.to_thread(command, "health", "--json", QUOTES_DATABASE_URL=url)
        assert (told.returncode, json.loads(told.stdout)["overall_status"]) == (1, "unhealthy")


async def test_a_full_volume_is_not_ready_until_there_is_room(shared_dir: Path) -> None:
    """Also to whoever has not written anything yet."""
    volume = shared_dir / f"full-{random_symbol()}"
    with small_volume(volume, "size=900m,mode=0755"):
        async with embedded_postgres(volume / "data") as url:
            lane = Lane("postgresql", url, "")
            await migrate(url, lane.make_settings(database_url=url))
            assert (await seen_by(url, lane)).status == "healthy"
            ballast = volume / "ballast"
            free = shutil.disk_usage(volume).free
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free)
            try:
                full = await seen_by(url, lane)
                assert (full.status, full.checks[0].status) == ("unhealthy", "unhealthy")
                assert "volume is full" in full.checks[0].detail
            finally:
                ballast.unlink()
            assert (await seen_by(url, lane)).status == "healthy"


async def test_a_write_that_the_store_refused_counts_until_one_is_taken(shared_dir: Path) -> None:
    """By its own words; a probe that writes tells when it is over, though no client sends anything."""
    async with embedded_postgres(shared_dir / "refusing") as url:
        lane = Lane("postgresql", url, "")
        settings = lane.make_settings(database_url=url)
        await migrate(url, settings)
        database = Database(url, settings)
        await database.connect()
        quotes = QuoteRepository(database, settings)

        async def look() -> Report:
            return await Health(SystemRepository(database), settings, head()).report()

        refuse = """
            CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'disk_full'; END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON quotes.{} FOR EACH ROW EXECUTE FUNCTION public.refuse()"""
        quote = [{"symbol": "A", "timestamp": datetime.now(UTC), "price": 1}]
        try:
            await run(url, refuse.format("receipts"), refuse.format("real_time").split(";", 2)[2])
            assert (await look()).status == "healthy"
            with pytest.raises(DatabaseUnavailable, match="full"):
                await quotes.bulk_insert(quote)
            for _ in range(2):
                refused = await look()
                assert refused.status == "unhealthy"
                assert "refused the last write: The volume of the database is full" in refused.checks[0].detail
            await run(url, "DROP TRIGGER refuse ON quotes.receipts")
            assert (await look()).status == "healthy", "a probe could write"
            with pytest.raises(DatabaseUnavailable):
                await quotes.bulk_insert(quote)
            await run(url, "DROP TRIGGER refuse ON quotes.real_time")
            assert (await quotes.bulk_insert(quote)).inserted == 1
            assert database.refusal is None
        finally:
            await database.close()


async def test_an_answer_leaves_in_time_though_nothing_comes_from_the_database(lane: Lane) -> None:
    """For each of those who ask while a look is under way, too."""
    async with proxy(lane.url) as way:
        settings = lane.make_settings(database_url=way.url)
        database = Database(way.url, settings)
        health = Health(SystemRepository(database), settings, head())
        assert (await health.report()).status == lane.soundest
        way.swallows = True
        await asyncio.sleep(1.1)  # a look is shared for a second

        async def ask(after: float) -> tuple[float, str]:
            await asyncio.sleep(after)
            began = time.monotonic()
            report = await health.report()
            return time.monotonic() - began, report.status

        answers = await asyncio.gather(*(ask(after) for after in (0, 0.1, 1, 1.9, 2.5)))
        assert {status for _, status in answers} == {"unhealthy"}
        assert max(took for took, _ in answers) < 3.5
        way.swallows = False
        way.end()
        async with asyncio.timeout(10):
            while (await health.report()).status == "unhealthy":  # noqa: ASYNC110  a state of the server
                await asyncio.sleep(0.1)
        await database.close()


class Stuck(SystemRepository):
    """A repository whose connection does not let itself be closed."""

    def __init__(self) -> None: ...

    async def observe(self, timeout: float) -> Observation:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(timeout)
        raise AssertionError


async def test_a_look_that_does_not_end_is_left() -> None:
    settings = Settings(_env_file=None)
    began = time.monotonic()
    report = await Health(Stuck(), settings, head()).report()
    assert time.monotonic() - began < 3.5
    assert (report.status, report.checks[0].detail) == ("unhealthy", "The database does not answer.")


async def test_a_report_is_tried_for_four_seconds_at_most() -> None:
    """Whatever the supervisor does: not listen, listen and say nothing, or speak without end."""
    asked = 0

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        with contextlib.suppress(OSError):
            while True:
                writer.write(b"H")
                await writer.drain()
                await asyncio.sleep(0.1)

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        for url in (f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{free_port()}/"):
            began = time.monotonic()
            assert "no answer" in (await reported(url, b"{}") or "")
            assert time.monotonic() - began < 4.5
        listening.close()
    assert asked
