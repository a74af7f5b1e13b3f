"""What metrics and logs cost: a request, a scrape, and the looks at a store of 730 chunks and 10,000 symbols.

The chunks older than thirty days are in the columnstore, as the policy leaves them. A look is charged with all that it
makes the service compute and with the whole life of the PostgreSQL process that serves its connection; a scrape is
timed by a client on a connection that is kept, from services of one worker and of several that have answered requests
of every kind. A request is an empty route called without a server, with and without what is noted of it, in turns.
"""

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, redirect_stderr
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer
from fastapi import Response
from starlette.types import ASGIApp, Message

from app import logs
from app.db.engine import Connection, Database
from app.db.migrate import migrate
from app.health import Health
from app.main import create_app
from app.monitor import Monitor
from app.repository.quotes import QuoteRepository
from app.repository.storage import StorageRepository
from app.repository.system import SystemRepository
from app.settings import Settings
from benchmarks.client import HttpConnection, get, post
from benchmarks.target import SERVICE, cpu_seconds, fresh_database, serving

DAY: Final = timedelta(days=1)
COMPRESS: Final = """
SELECT compress_chunk(format('%I.%I', chunk_schema, chunk_name)::regclass) FROM timescaledb_information.chunks
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time' AND range_end = $1
"""
READS: Final = (
    "/v1/quotes?symbols=S0", "/v1/quotes/latest?symbols=S0", "/v1/quotes/count?symbols=S0&estimate=true",
    "/v1/quotes/intraday?symbol=S0", "/v1/ohlc?symbols=S0&interval=1h", "/v1/symbols", "/v1/storage",
    "/v1/summary/daily?symbols=S0",
)  # fmt: skip


def _computed(pid: int) -> float:
    """Seconds of processor time of a process since it was forked, finer than the ticks of other files."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


class Charged(Database):
    """Adds up what the server's processes behind the connections outside of the pool have computed."""

    server = 0.0

    @asynccontextmanager
    async def dedicated(  # noqa: D102  as of any database
        self, timeout: float = 5, statement_timeout: timedelta | None = None, within: float | None = None
    ) -> AsyncIterator[Connection]:
        async with super().dedicated(timeout, statement_timeout, within) as connection:
            yield connection
            self.server += _computed(connection.get_server_pid())


async def _filled(database: Database, settings: Settings, days: int, symbols: int) -> None:
    quotes = QuoteRepository(database, settings)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    rows = -(-symbols // 73)
    for part in range(0, days, 73):
        await quotes.bulk_insert(
            [
                {
                    "symbol": f"S{(day * rows + row) % symbols}",
                    "timestamp": today - day * DAY - DAY / 2 + timedelta(seconds=row),
                    "price": 100 + row, "volume": 1,
                }
                for day in range(part, min(part + 73, days))
                for row in range(rows)
            ]
        )  # fmt: skip
    async with database.dedicated(statement_timeout=timedelta(minutes=5)) as connection:
        for day in range(30, days):
            await connection.execute(COMPRESS, today - day * DAY)
        await connection.execute("VACUUM ANALYZE quotes.real_time")
        await connection.execute("VACUUM ANALYZE quotes.latest")


def _row(what: str, values: list[float], form: Callable[[float], str]) -> None:
    print(f"| {what} | {form(statistics.median(values))} | {form(min(values))} | {form(max(values))} |", flush=True)


async def _looks(database: Charged, settings: Settings, looks: int) -> None:
    interval = settings.monitor_interval.total_seconds()
    wall, own, server = [], [], []
    for turn in range(looks + 1):
        health = Health(SystemRepository(database), settings, "")
        monitor = Monitor(StorageRepository(database), settings, health.report)
        before = time.perf_counter(), time.process_time(), database.server
        await health.report()
        look = await monitor.storage()
        if turn:
            wall.append(1000 * (time.perf_counter() - before[0]))
            own.append(1000 * (time.process_time() - before[1]))
            server.append(1000 * (database.server - before[2]))
    print(f"{len(look.chunks)} chunks, {look.count('columnstore')} in the columnstore; {looks} looks\n")
    print("| a look and the checks | median | min | max |\n| --- | ---: | ---: | ---: |")
    _row("time, ms", wall, lambda value: f"{value:.0f}")
    _row("CPU of the service, ms", own, lambda value: f"{value:.1f}")
    _row("CPU of PostgreSQL, ms", server, lambda value: f"{value:.1f}")
    share = [(a + b) / 1000 / interval for a, b in zip(own, server, strict=True)]
    _row(f"share of a core, one look in {interval:.0f} s", share, lambda value: f"{100 * value:.2f} %")


async def _scrapes(url: str, workers: int, scrapes: int) -> None:
    environment = {"QUOTES_DATABASE_URL": url, "QUOTES_REQUIRE_TIMESCALEDB": "none"}
    with tempfile.TemporaryDirectory() as scratch:
        async with serving((*SERVICE, "--workers", str(workers)), Path(scratch, "log"), environment) as (port, pid):
            await asyncio.sleep(3)  # the first look

            def measure() -> tuple[list[float], float, int, int]:
                body = f'[{{"symbol":"S0","timestamp":"{datetime.now(UTC).isoformat()}","price":1}}]'.encode()
                for _ in range(10):
                    with HttpConnection(port) as connection:  # new, so that each worker gets some
                        connection.send(post("/v1/quotes", body))
                        for path in READS:
                            connection.send(get(path))
                times = []
                with HttpConnection(port) as connection:
                    for turn in range(scrapes + 10):
                        before = time.perf_counter()
                        text = connection.send(get("/metrics"))
                        if turn < 10:
                            charged = cpu_seconds(pid)
                        else:
                            times.append(1000 * (time.perf_counter() - before))
                        time.sleep(0.01)
                cost = 1000 * ((cpu_seconds(pid) or math.nan) - (charged or math.nan)) / scrapes
                return times, cost, len(text), sum(not line.startswith(b"#") for line in text.splitlines())

            times, cost, size, series = await asyncio.to_thread(measure)
            print(
                f"| {workers} | {series} | {size / 1024:.0f} | {statistics.median(times):.1f} | {min(times):.1f} |"
                f" {max(times):.1f} | {statistics.quantiles(times, n=100)[98]:.1f} | {cost:.1f} |",
                flush=True,
            )


def _empty_route(settings: Settings, *, noted: bool) -> ASGIApp:
    app = create_app(settings)
    if not noted:
        app.user_middleware.clear()

    @app.post("/empty")
    async def empty() -> Response:
        return Response(b"{}", media_type="application/json")

    return app


async def _requests(settings: Settings, calls: int) -> None:
    """Microseconds of a request by the process's own clock, which a busy machine does not move."""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # noqa: ASYNC230  not waited for
        logs.configure(settings)
        apps = {noted: _empty_route(settings, noted=noted) for noted in (False, True)}
        times: dict[bool, list[float]] = {noted: [] for noted in apps}
        for turn in range(12):
            for noted, app in apps.items():
                before = time.process_time()
                for _ in range(calls):
                    scope = {
                        "type": "http", "method": "POST", "path": "/empty", "query_string": b"", "root_path": "",
                        "headers": [(b"host", b"bench")], "scheme": "http", "server": ("bench", 80),
                    }  # fmt: skip
                    await app(scope, receive, send)
                if turn:
                    times[noted].append(1e6 * (time.process_time() - before) / calls)
    logs.configure(settings.model_copy(update={"log_level": "WARNING"}))
    print("| request, us of CPU | median | min | max |\n| --- | ---: | ---: | ---: |")
    _row("an empty route", times[False], lambda value: f"{value:.0f}")
    _row("named, counted and logged as JSON", times[True], lambda value: f"{value:.0f}")
    added = [b - a for a, b in zip(times[False], times[True], strict=True)]
    _row("which adds", added, lambda value: f"{value:.0f}")


async def _run(url: str, days: int, symbols: int, looks: int, scrapes: int) -> None:
    settings = Settings(
        _env_file=None, retention=None, require_timescaledb="none", write_timeout="120 seconds", log_format="json"
    )
    await _requests(settings, 2000)
    async with fresh_database(url) as database_url:
        await migrate(database_url, settings)
        database = Charged(database_url, settings)
        await database.connect()
        try:
            began = time.monotonic()
            await _filled(database, settings, days, symbols)
            print(f"filled in {time.monotonic() - began:.0f} s; load {os.getloadavg()[0]:.1f}", flush=True)
            await _looks(database, settings, looks)
        finally:
            await database.close()
        print(f"\n{scrapes} scrapes; load {os.getloadavg()[0]:.1f}\n")
        print("| workers | series | KiB | median ms | min | max | p99 | CPU ms |")
        print("| ---: " * 8 + "|")
        for workers in (1, 2, 4):
            await _scrapes(database_url, workers, scrapes)


def main(
    database_url: Annotated[str, typer.Option(help="Server on this machine; a database is created there and dropped.")],
    days: Annotated[int, typer.Option(help="Chunks.")] = 730,
    symbols: Annotated[int, typer.Option(help="Symbols.")] = 10_000,
    looks: Annotated[int, typer.Option(help="Looks counted.")] = 30,
    scrapes: Annotated[int, typer.Option(help="Scrapes counted.")] = 300,
) -> None:
    """Print tables for docs/benchmarks.md."""
    asyncio.run(_run(database_url, days, symbols, looks, scrapes))


if __name__ == "__main__":
    typer.run(main)
