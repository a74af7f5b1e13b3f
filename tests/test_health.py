"""The verdicts of the three checks, for every state that a store can be in."""

import asyncio
import dataclasses
import time
from typing import Any

import pytest

from app.db.capability import Capability
from app.db.engine import Database
from app.errors import DatabaseUnavailable, QueryTimeout
from app.health import Health, Report
from app.main import create_app
from app.repository.system import Observation, SystemRepository
from app.settings import Settings
from tests.conftest import Lane, running

COMMUNITY = Capability.of(("18.6", "2.29.2", "timescale"))
APACHE = Capability.of(("18.6", "2.29.2", "apache"))
PLAIN = Capability.of(("18.6", None, None))
GOOD = Observation(COMMUNITY, True, ["symbol", "timestamp", "nanos"], 7, "r4")


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
    return await Health(Looking(shown), settings, "r4").report()


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
        (change(revision=None), "community", ("healthy", "healthy", "degraded"), "degraded"),
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


async def test_many_probes_share_one_look() -> None:
    looking = Looking(GOOD)
    health = Health(looking, Settings(_env_file=None), "r4")
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
    report = await Health(SystemRepository(nowhere), settings, "r4").report()
    assert report.status == "unhealthy"
    assert time.monotonic() - began < 10
    assert "postgresql://" not in str(report.to_dict())
