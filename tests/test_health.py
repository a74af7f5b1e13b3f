"""The verdicts of the three checks, for every state that a store can be in."""

import asyncio
import contextlib
import dataclasses
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client import REGISTRY

from app.db.capability import Capability
from app.db.embedded import embedded_postgres
from app.db.engine import Database
from app.db.hosts import Writable
from app.db.migrate import head, migrate
from app.errors import DatabaseUnavailable, QueryTimeout
from app.health import Health, Report
from app.main import create_app
from app.repository.system import ClockDifference, Observation, SystemRepository
from app.settings import Settings
from tests.conftest import Lane, running

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


@pytest.mark.parametrize(
    ("shown", "required", "statuses", "overall"),
    [
        (GOOD, "community", ("healthy", "healthy", "healthy"), "healthy"),
        (change(capability=APACHE), "community", ("healthy", "unhealthy", "healthy"), "unhealthy"),
        (change(capability=APACHE), "apache", ("healthy", "skipped", "healthy"), "healthy"),
        (change(capability=PLAIN, chunks=None), "apache", ("healthy", "unhealthy", "healthy"), "unhealthy"),
        (change(capability=PLAIN, chunks=None), "none", ("healthy", "skipped", "healthy"), "healthy"),
        (change(chunks=None), "community", ("healthy", "healthy", "degraded"), "degraded"),
        (change(revision="r1"), "community", ("healthy", "healthy", "degraded"), "degraded"),
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
        await connection.execute("DROP SCHEMA quotes CASCADE; DROP TABLE alembic_version")
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
        assert (await client.get("/health")).json()["overall_status"] == "healthy"
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
    assert report.status == ("unhealthy" if behind else "healthy")


async def test_several_servers_that_take_writes_are_named() -> None:
    two = (Writable("db1:5432", 1), Writable("db2:5432", 2))
    report = await verdict(change(writable=two, host="db2:5432"))
    assert report.status == "degraded"
    assert report.checks[0].detail == (
        "2 servers take writes: db1:5432 (timeline 1), db2:5432 (timeline 2). This service writes to db2:5432;"
        " stop the others."
    )
    assert (await verdict(change(writable=two[1:], host="db2:5432"))).status == "healthy"
