"""Ingest for a long time: the rate while the server refreshes and compresses, and the memory over millions of quotes.

Invariant: in the end as many quotes are stored as were acknowledged, and every figure of a stretch of time says which
work of the server fell into it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg
import numpy as np

from app.db.engine import Connection
from benchmarks.client import Sent, post, send_all
from benchmarks.report import Report, Steps
from benchmarks.side_by_side import BenchmarkError, Sheet, Spread, figure, quantile, verdict
from benchmarks.target import Target, memory_bytes, running_target
from benchmarks.ticks import FORMATS, Ticks
from benchmarks.turns import BUSY, acknowledged, mebibytes

BATCH: Final = 10_000
WINDOW: Final = 10.0
MINUTE: Final = 60.0
#: Chunks short enough that several are compressed within the run, by a job that comes twice a day by itself.
SETTINGS: Final = {"QUOTES_CHUNK_INTERVAL": "1 min", "QUOTES_COMPRESS_AFTER": "2 min"}
COMPRESSION_INTERVAL: Final = timedelta(seconds=30)
#: Of the sustained rate to the burst rate, and of the memory's growth in MB.
RATE_FLOOR: Final = 0.7
RATE_AIM: Final = 0.9
GROWTH_FLOOR: Final = 100.0
GROWTH_AIM: Final = 30.0
MILLION: Final = 1_000_000
MEMORY_AGE: Final = timedelta(days=25)
_SCHEDULER_TIMEOUT: Final = 60.0
GOAL_COLUMNS: Final = ("", "measured", "floor", "aim", "verdict")

# Those of the database itself have numbers below 1000.
_JOBS: Final = """
SELECT j.job_id, j.proc_name || ' ' || coalesce(a.view_name, j.hypertable_name) AS name, j.schedule_interval,
       coalesce(s.total_runs, 0) AS total_runs, coalesce(s.total_failures, 0) AS total_failures, s.last_run_duration
FROM timescaledb_information.jobs j
JOIN timescaledb_information.job_stats s USING (job_id)
LEFT JOIN timescaledb_information.continuous_aggregates a
       ON a.materialization_hypertable_name = j.hypertable_name
WHERE j.job_id >= 1000 ORDER BY job_id"""
_SCHEDULER: Final = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'TimescaleDB Background Worker Scheduler'"""
_PAUSE: Final = "SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs WHERE job_id >= 1000"
_RESUME: Final = """
SELECT alter_job(job_id, scheduled => true, next_start => now(),
                 schedule_interval => CASE proc_name WHEN 'policy_compression' THEN $1 ELSE schedule_interval END)
FROM timescaledb_information.jobs WHERE job_id >= 1000"""
_STATE: Final = """
SELECT pg_database_size(current_database()),
       (SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'real_time' AND is_compressed),
       (SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'real_time')"""


@asynccontextmanager
async def _store(
    database_url: str | None, psql: Path | None, settings: dict[str, str] | None = None
) -> AsyncIterator[tuple[Target, Connection]]:
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(running_target(database_url, psql, settings))
        admin = await asyncpg.connect(target.database_url)
        stack.push_async_callback(admin.close)
        yield target, admin


async def _scheduler(admin: Connection) -> None:
    """Wait for the process that starts the jobs of this database: a server has only so many of them."""
    deadline = time.perf_counter() + _SCHEDULER_TIMEOUT
    while not await admin.fetchval(_SCHEDULER):
        if time.perf_counter() > deadline:
            workers = await admin.fetchval("SHOW timescaledb.max_background_workers")
            raise BenchmarkError(
                "No scheduler of jobs starts in this database. Its server has too many databases for"
                f" timescaledb.max_background_workers = {workers}."
            )
        await asyncio.sleep(1)


class Live:
    """An endless stream of quotes, each stamped with the time since the batch before."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._ticks = Ticks()
        self._sent = 0
        self._last = _now()

    def requests(self, going: Callable[[], bool]) -> Iterator[bytes]:
        """Requests of 10,000 quotes, as long as they are wanted."""
        rows = np.arange(BATCH)
        while going():
            now = max(_now(), self._last + BATCH)  # no two quotes at once
            at = self._last + rows * (now - self._last) // BATCH
            yield post("/v1/quotes", self._ticks.body(self._form, self._sent + rows, at), FORMATS[self._form])
            self._sent += BATCH
            self._last = now


def _now() -> int:
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class State:
    """The store at a moment, in seconds since the run began."""

    seconds: float
    database_bytes: int
    compressed_chunks: int
    chunks: int
    rss: int | None


@dataclass(slots=True)
class Watch:
    """Looks at the store every ten seconds, and ends the run when it grows too large."""

    target: Target
    admin: Connection
    most_bytes: int
    steps: Steps
    states: list[State] = field(default_factory=list)
    full: bool = False

    async def run(self, began: float) -> None:
        """Look until cancelled."""
        while True:
            size, compressed, chunks = await self.admin.fetchrow(_STATE) or (0, 0, 0)
            memory = memory_bytes(self.target.service)
            seconds = time.perf_counter() - began
            self.states.append(State(seconds, size, compressed, chunks, memory[0] if memory else None))
            self.full = self.full or size > self.most_bytes
            self.steps.show(f"{seconds:.0f} s, {size / 2**30:.1f} GiB, {compressed} of {chunks} chunks compressed")
            await asyncio.sleep(WINDOW)


async def measure_sustained(
    database_url: str, psql: Path | None, form: str, minutes: float, clients: int, max_gib: float, steps: Steps
) -> Report:
    """The rate with policies at work, to that of half a minute before with none.

    Raises:
        BenchmarkError: the server has no policies.
    """
    async with _store(database_url, psql, SETTINGS) as (target, admin):
        if await admin.fetchval("SELECT to_regclass('timescaledb_information.jobs')") is None:
            raise BenchmarkError("There are no policies without TimescaleDB; name a server with --database-url.")
        await _scheduler(admin)
        live = Live(form)
        steps.expect(2)
        await admin.execute(_PAUSE)
        steps.announce("burst, jobs paused")
        until = time.perf_counter() + 4 * WINDOW
        burst = await send_all(target.port, live.requests(lambda: time.perf_counter() < until), clients)
        before = await admin.fetch(_JOBS)
        await admin.execute(_RESUME, COMPRESSION_INTERVAL)
        steps.announce("sustained")
        watch = Watch(target, admin, int(max_gib * 2**30), steps)
        began = time.perf_counter()
        watching = asyncio.create_task(watch.run(began))
        until = began + MINUTE * minutes
        try:
            sent = await send_all(
                target.port, live.requests(lambda: time.perf_counter() < until and not watch.full), clients
            )
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        after = await admin.fetch(_JOBS)
        rows = BATCH * (len(burst.answers) + len(sent.answers))
        for part in (burst, sent):
            acknowledged(part, BATCH * len(part.answers))
        if (stored := await admin.fetchval("SELECT count(*) FROM quotes.real_time")) != rows:
            raise BenchmarkError(f"{rows} quotes were acknowledged and {stored} are stored.")
    # The first window warms up.
    bursts, rates = windows(burst)[1:], windows(sent)
    kept = BATCH * len(sent.answers) / sent.seconds / Spread.of(bursts).median
    jobs = [
        [
            new["name"],
            f"{new['schedule_interval'].total_seconds():.0f}",
            str(new["total_runs"] - old["total_runs"]),
            str(new["total_failures"] - old["total_failures"]),
            "" if new["last_run_duration"] is None else figure(new["last_run_duration"].total_seconds()),
        ]
        for old, new in zip(before, after, strict=True)
    ]
    notes = [f"{rows:,} quotes in all; as many are stored."]
    notes += [f"Ended early: the database grew beyond {max_gib:g} GiB."] if watch.full else []
    return Report(
        target.about,
        [
            Sheet(
                f"Sustained: {form} by {BATCH:,}, {clients} clients, {sent.seconds / MINUTE:.1f} minutes",
                GOAL_COLUMNS,
                [
                    ["burst, jobs paused, quotes/s", _rates(bursts), "", "", ""],
                    ["sustained, quotes/s", _rates(rates), "", "", ""],
                    [
                        "sustained / burst",
                        figure(kept),
                        f"{RATE_FLOOR:g}",
                        f"{RATE_AIM:g}",
                        verdict(kept, RATE_FLOOR, RATE_AIM),
                    ],
                ],
                [
                    f"Rates: median of stretches of {WINDOW:.0f} s (lowest to highest); the ratio has the mean on top.",
                    *notes,
                ],
            ),
            minutes_sheet(sent, rates, watch.states),
            Sheet(
                "Sustained: jobs meanwhile",
                ["", "every s", "runs", "failures", "last run s"],
                jobs,
                [", ".join(f"{name}={value}" for name, value in SETTINGS.items())],
            ),
        ],
        {
            "burst_rates": bursts,
            "rates": rates,
            "ratio": kept,
            "states": [asdict(state) for state in watch.states],
            "jobs": jobs,
            "latencies_ms": [1000 * seconds for seconds in sent.latencies],
        },
    )


def windows(sent: Sent) -> list[float]:
    """Quotes a second, of each full stretch of ten seconds."""
    counts = [0] * (int(sent.seconds / WINDOW) + 1)
    for ended in sent.ended:
        counts[int(ended / WINDOW)] += BATCH
    return [count / WINDOW for count in counts[:-1]]


def _rates(rates: list[float]) -> str:
    spread = Spread.of(rates)
    return f"{spread.median:,.0f} ({spread.low:,.0f} to {spread.high:,.0f})"


def minutes_sheet(sent: Sent, rates: list[float], states: list[State]) -> Sheet:
    rows = []
    each = round(MINUTE / WINDOW)
    for first in range(0, len(rates), each):
        start, end = first * WINDOW, (first + each) * WINDOW
        state = [state for state in states if state.seconds < end][-1]
        waits = [1000 * wait for wait, at in zip(sent.latencies, sent.ended, strict=True) if start <= at < end]
        rows.append(
            [
                f"{min(end, len(rates) * WINDOW) / MINUTE:.1f} min",
                _rates(rates[first : first + each]),
                *(figure(quantile(waits, share)) for share in (0.5, 0.99)),
                mebibytes(state.rss),
                f"{state.database_bytes / 2**30:.1f}",
                f"{state.compressed_chunks} of {state.chunks}",
            ]
        )
    columns = ["until", "quotes/s", "p50 ms", "p99 ms", "service RSS MiB", "database GiB", "chunks compressed"]
    return Sheet("Sustained: by the minute", columns, rows)


async def measure_memory(
    database_url: str | None, psql: Path | None, form: str, millions: int, clients: int, steps: Steps
) -> Report:
    """The service's resident memory after each million quotes."""
    found: list[int] = []
    steps.expect(millions)
    ticks = Ticks()
    async with _store(database_url, psql) as (target, admin):
        start = datetime.now(UTC).replace(microsecond=0) - MEMORY_AGE
        rows = millions * MILLION
        bodies = ticks.bodies(form, start, range(rows), BUSY, BATCH)

        def look() -> None:
            memory = memory_bytes(target.service)
            if memory is None:
                raise BenchmarkError("This system does not tell what memory a process has.")
            found.append(memory[0])

        def requests() -> Iterator[bytes]:
            for number, body in enumerate(bodies):
                if number and not number * BATCH % MILLION:
                    look()
                    steps.announce(f"{number * BATCH // MILLION} million quotes, {mebibytes(found[-1])} MiB")
                yield post("/v1/quotes", body, FORMATS[form])

        sent = await send_all(target.port, requests(), clients)
        look()
        acknowledged(sent, rows)
        if (stored := await admin.fetchval("SELECT count(*) FROM quotes.real_time")) != rows:
            raise BenchmarkError(f"{rows} quotes were sent and {stored} are stored.")
        memory = memory_bytes(target.service)
    growth = (found[-1] - found[0]) / 1e6
    shown = sorted({1, *(round(millions * part / 10) for part in range(1, 11))} - {0})
    return Report(
        target.about,
        [
            Sheet(
                f"Memory: {form} by {BATCH:,}, {clients} clients, {millions} million quotes",
                GOAL_COLUMNS,
                [
                    [
                        "growth of the service's RSS after the first million, MB",
                        figure(growth),
                        f"{GROWTH_FLOOR:.0f}",
                        f"{GROWTH_AIM:.0f}",
                        verdict(-growth, -GROWTH_FLOOR, -GROWTH_AIM),
                    ]
                ],
                [f"{rows / sent.seconds:,.0f} quotes/s; as many are stored as were sent."],
            ),
            Sheet(
                "Memory: by millions of quotes",
                ["million quotes", *map(str, shown), "peak"],
                [["RSS MiB", *(mebibytes(found[number - 1]) for number in shown), mebibytes(memory and memory[1])]],
            ),
        ],
        {"form": form, "rss_after_each_million": found, "growth_mb": growth, "peak": memory and memory[1]},
    )
