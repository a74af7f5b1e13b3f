"""SIGTERM: restarts under load with another instance beside, and a stop while a write waits for a lock."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import asyncpg

from tests.chaos.recording import Ledger, Writers, fleet
from tests.chaos.reporting import Report, percentile, spread
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, Postgres, Service, ended

_WRITERS: Final = 4
_PAUSE: Final = 0.5
#: What the service allows itself beyond the drain, and a second for this machine.
_GRACE: Final = 5.0 + 1.0
_LOCKED: Final = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name <> 'chaos'"


@asynccontextmanager
async def locked(url: str, statement: str) -> AsyncIterator[asyncpg.Connection]:
    """A session that holds a lock, and a transaction open."""
    connection = await asyncpg.connect(url, server_settings={"application_name": "chaos"})
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(statement)
        yield connection
        await transaction.rollback()
    finally:
        connection.terminate()


async def rolling(directory: Path, *, times: int, workers: int = 1) -> Report:
    """Restart one of two instances again and again; its clients go to the other one meanwhile."""
    report = Report(f"rolling restarts, {workers} worker{'s' if workers > 1 else ''}")
    ledger = Ledger()
    stops: list[float] = []
    with ExitStack() as stack:
        postgres = Postgres.create(directory / "database")
        stack.enter_context(ended(postgres))
        await asyncio.to_thread(postgres.start)
        services = [Service(directory / name, postgres.environment | QUIET, workers) for name in ("a", "b")]
        for service in services:
            stack.enter_context(ended(service))
            service.start()
            await asyncio.to_thread(service.wait_ready)
        async with Writers([*fleet(ledger, [service.url for service in services], _WRITERS, rows=(1, 300))]):
            for turn in range(times):
                await asyncio.sleep(_PAUSE)
                service = services[turn % 2]
                stops.append(await asyncio.to_thread(service.stop))
                service.start()
                await asyncio.to_thread(service.wait_ready)
            await asyncio.sleep(_PAUSE)
        verdict = await verify(ledger, postgres.url, services[0].url)
    lost = ledger.answers["connection lost"]
    report.broken += verdict.broken
    report.require(lost == 0, f"{lost} connections were lost under a request")
    report.require(max(ledger.seconds) < 10, f"an answer took {max(ledger.seconds):.1f} s")
    report.figures = {
        "rows": verdict.rows,
        "requests": verdict.requests,
        "restarts": times,
        "resets": lost,
        "lost": verdict.lost,
        "stop s, min / median / max": spread(stops),
        "answer s, p50 / p99 / max": " / ".join(f"{percentile(ledger.seconds, p):.3f}" for p in (0.5, 0.99, 1)),
        "answers": dict(ledger.answers.most_common()),
    }
    return report


async def stop_under_lock(directory: Path, *, workers: int = 1, drain: float = 3.0) -> Report:
    """Stop a service while its writes wait for a lock that nobody gives back."""
    report = Report(f"SIGTERM under waiting writes, {workers} worker{'s' if workers > 1 else ''}")
    ledger = Ledger()
    with ExitStack() as stack:
        postgres = Postgres.create(directory / "database")
        stack.enter_context(ended(postgres))
        await asyncio.to_thread(postgres.start)
        environment = postgres.environment | QUIET | {"QUOTES_DRAIN_TIMEOUT": f"{drain} s"}
        service = Service(directory / "service", environment, workers)
        stack.enter_context(ended(service))
        service.start()
        await asyncio.to_thread(service.wait_ready)
        writers = Writers([*fleet(ledger, [service.url], _WRITERS, rows=(1, 300), patience=0.0)])
        async with locked(postgres.url, "LOCK TABLE quotes.real_time IN EXCLUSIVE MODE") as holder, writers:
            async with asyncio.timeout(10):
                while await holder.fetchval(_LOCKED) == 0:  # noqa: ASYNC110  the database tells nobody
                    await asyncio.sleep(0.02)
            asked = time.monotonic()
            stopping = asyncio.create_task(asyncio.to_thread(service.stop))
            await asyncio.wait_for(writers.stop(), drain + 60)
            answered = time.monotonic() - asked
            await stopping
            took = time.monotonic() - asked
        verdict = await verify(ledger, postgres.url, None)
    report.broken += verdict.broken
    lost = ledger.answers["connection lost"]
    report.require(lost == 0, f"{lost} connections were lost under a request")
    report.require(answered <= drain + _GRACE, f"the last answer came after {answered:.1f} s")
    report.require(took <= drain + _GRACE, f"the service ended after {took:.1f} s")
    report.figures = {
        "drain s": drain,
        "last answer s": round(answered, 2),
        "ended after s": round(took, 2),
        "answers": dict(ledger.answers.most_common()),
    }
    return report
