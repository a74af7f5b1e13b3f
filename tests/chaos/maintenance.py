"""Live quotes beside late ones, locks on old chunks, policies and `maintain`: what arrives now does not notice.

Phases take turns in one run, so that a slow minute of the machine is in all of them. One is a control: late quotes
beside as many backends as maintenance has, which compute and touch no table; what live quotes lose there they lose to
the processor, not to the store. The lanes share symbols, so that rows of `quotes.latest` are shared too. Needs a
community server: CHAOS_PG_BIN, or a database of its own on the server of TEST_DATABASE_URL.
"""

import asyncio
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

import asyncpg
import httpx

from tests.chaos.recording import Ledger, Writer, Writers, days_ago, milliseconds, random_symbol
from tests.chaos.reporting import Report, Skipped, percentile, spread
from tests.chaos.stops import locked
from tests.chaos.verifying import verify
from tests.chaos.victims import PROGRAMS, QUIET, Postgres, Service, ended
from tests.conftest import EXTERNAL_URL, fresh_database

Phase = Literal["alone", "late", "locked", "computing", "maintained"]
PHASES: Final[tuple[Phase, ...]] = ("alone", "late", "locked", "computing", "maintained")
#: Phases in which live quotes are compared with those beside others that compute, not with those alone.
_COMPARED: Final[dict[Phase, Phase]] = {"maintained": "computing"}
_LIVE: Final = 2
_LATE: Final = 2
_DAY: Final = 86_400_000
_MINUTE: Final = 60_000
#: Days of history, in the columnstore, that late quotes go to.
_DAYS: Final = range(10, 30)
#: A day that retention takes; what is written there is for `maintain drop` alone.
_EXPIRED: Final = 100
_RETENTION: Final = "90 days"
_ROOT: Final = Path(__file__).parents[2]
_JOBS: Final = "SELECT job_id FROM timescaledb_information.jobs WHERE job_id >= 1000 ORDER BY job_id"
_CHUNKS: Final = """
SELECT format('%I.%I', chunk_schema, chunk_name) FROM timescaledb_information.chunks
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time'
  AND range_start < now() - interval '10 days' AND range_start > now() - interval '30 days'
ORDER BY range_start
"""


@asynccontextmanager
async def _community(directory: Path) -> AsyncIterator[str]:
    if PROGRAMS:
        postgres = Postgres.create(directory / "database")
        with ended(postgres):
            await asyncio.to_thread(postgres.start)
            yield postgres.url
    elif EXTERNAL_URL:
        async with fresh_database(EXTERNAL_URL) as url:
            yield url
    else:
        raise Skipped("no community server: neither CHAOS_PG_BIN nor TEST_DATABASE_URL is set")


def _now(span: int) -> Callable[[], int]:
    last = 0

    def moment() -> int:
        nonlocal last
        last = max(last + span, milliseconds())
        return last

    return moment


def _old(choice: random.Random, first: int) -> Callable[[], int]:
    """Moments of old days, each with another millisecond of the minute than those before."""
    count = first

    def moment() -> int:
        nonlocal count
        count += 1
        return days_ago(choice.choice(_DAYS)) + count

    return moment


def _history(ledger: Ledger, url: str, symbols: list[str]) -> Iterator[Writer]:
    """A quote a minute for all the days."""
    for symbol in symbols:
        yield Writer(
            ledger, [url], step=_MINUTE, rows=(1440, 1440), symbol=symbol, first=1_000_000, most=len(_DAYS),
            patience=1.0, times=map(days_ago, _DAYS).__next__,
        )  # fmt: skip


async def _finish(task: asyncio.Task[None]) -> None:
    await task


@dataclass
class Beside:
    """What happens beside the live quotes.

    Attributes:
        database_url: the store.
        url: the service.
        symbols: those of the live quotes; late ones have the same.
        done: how often each verb and policy has run, and how often it failed.
    """

    database_url: str
    url: str
    symbols: list[str]
    choice: random.Random
    late: Ledger = field(default_factory=Ledger)
    done: Counter[str] = field(default_factory=Counter)
    _sent: int = 0

    @asynccontextmanager
    async def happening(self, phase: Phase, turn: int) -> AsyncIterator[None]:
        """Do what belongs to a phase, until it is over."""
        async with AsyncExitStack() as stack:
            if phase != "alone":
                await stack.enter_async_context(Writers([*self._writers()]))
            if phase == "locked":
                mode = ("ACCESS EXCLUSIVE", "EXCLUSIVE")[turn % 2]
                statement = f"LOCK TABLE {self.choice.choice(await self._fetch(_CHUNKS))} IN {mode} MODE"
                await stack.enter_async_context(locked(self.database_url, statement))
            stop = asyncio.Event()
            for work in {"maintained": (self._verbs, self._policies), "computing": (self._compute,) * 2}.get(phase, ()):
                stack.push_async_callback(_finish, asyncio.create_task(work(stop)))
            stack.callback(stop.set)
            yield

    def _writers(self) -> Iterator[Writer]:
        for number in range(_LATE):
            self._sent += 1
            yield Writer(
                self.late, [self.url], step=_MINUTE, rows=(100, 400), pace=0.2, patience=0.3,
                symbol=self.symbols[number % len(self.symbols)], first=2_000_000 + 10_000 * self._sent,
                times=_old(self.choice, 1000 * self._sent), seed=self.choice.randrange(10**6),
            )  # fmt: skip

    async def maintain(self, *arguments: str) -> None:
        """Run a verb as an operator would; the least of priorities keeps the start of Python out of the figures."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QUOTES_")}
        environment |= {"QUOTES_DATABASE_URL": self.database_url, "QUOTES_RETENTION": _RETENTION}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "import os; os.nice(19); from app.cli import main; main()", "maintain", *arguments,
            cwd=_ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, said = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        self.done[f"{arguments[0]}{' failed: ' + said.decode()[-200:] if process.returncode else ''}"] += 1

    async def _verbs(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            day = datetime.now(UTC).date() - timedelta(days=self.choice.choice(_DAYS))
            between = ("--start", day.isoformat(), "--end", (day + timedelta(days=2)).isoformat())
            await self._expire()
            for verb in (
                ("decompress", *between),
                ("reorder", *between),
                ("compress", *between),
                ("refresh",),
                ("drop",),
            ):
                if not stop.is_set():
                    await self.maintain(*verb)

    async def _expire(self) -> None:
        """Something for `drop`: a day that retention takes."""
        body = [{"symbol": "EXPIRED", "timestamp": days_ago(_EXPIRED) + i * _MINUTE, "price": 1} for i in range(1000)]
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as http:
            answer = await http.post("/v1/quotes?precision=ms", json=body)
        self.done[f"expired quotes {answer.status_code}"] += 1

    async def _policies(self, stop: asyncio.Event) -> None:
        connection = await asyncpg.connect(self.database_url)
        try:
            jobs: list[int] = [row[0] for row in await connection.fetch(_JOBS)]
            while not stop.is_set():
                for job in jobs:
                    try:
                        await connection.execute(f"CALL run_job({job})")
                        self.done["policies"] += 1
                    except asyncpg.PostgresError as error:
                        self.done[f"policies failed: {type(error).__name__}"] += 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.5)
        finally:
            await connection.close()

    async def _compute(self, stop: asyncio.Event) -> None:
        connection = await asyncpg.connect(self.database_url)
        try:
            while not stop.is_set():
                await connection.execute("SELECT sum(n) FROM generate_series(1, 500000) n")
        finally:
            await connection.close()

    async def _fetch(self, statement: str) -> list[Any]:
        connection = await asyncpg.connect(self.database_url)
        try:
            return [row[0] for row in await connection.fetch(statement)]
        finally:
            await connection.close()


async def maintained(directory: Path, *, rounds: int, seconds: float, hold: float, seed: int) -> Report:
    """Measure live quotes in each phase, `rounds` times; a lock is held for `hold` seconds, else it is `seconds`."""
    report = Report("live beside late, locks, maintenance")
    live = Ledger()
    p99: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(_community(directory))
        service = Service(directory / "service", QUIET | {"QUOTES_DATABASE_URL": url, "QUOTES_RETENTION": "none"})
        stack.enter_context(ended(service))
        service.start()
        await asyncio.to_thread(service.wait_ready)
        beside = Beside(url, service.url, [random_symbol() for _ in range(_LIVE)], random.Random(seed))
        async with Writers([*_history(beside.late, service.url, beside.symbols)]) as history:
            await history.ended()
        start, end = (datetime.now(UTC).date() - timedelta(days=days) for days in (_DAYS.stop, _DAYS.start - 1))
        await beside.maintain("compress", "--start", start.isoformat(), "--end", end.isoformat())
        senders = [
            Writer(live, [service.url], step=1, rows=(1, 20), pace=0.05, symbol=symbol, times=_now(20))
            for symbol in beside.symbols
        ]
        async with Writers(senders):
            for turn in range(rounds):
                for phase in PHASES:
                    async with beside.happening(phase, turn):
                        before = len(live.seconds)
                        await asyncio.sleep(hold if phase == "locked" else seconds)
                        p99[phase].append(percentile(live.seconds[before:], 0.99))
        everything = Ledger([*live.requests, *beside.late.requests], wrong=[*live.wrong, *beside.late.wrong])
        verdict = await verify(everything, url, service.url, interval="1h")
    report.broken += verdict.broken
    refused = live.answers.total() - live.answers["200"]
    report.require(refused == 0, f"{refused} live requests were refused: {dict(live.answers)}")
    for phase, values in p99.items():
        other = _COMPARED.get(phase, "alone")
        ratio = statistics.median(values) / statistics.median(p99[other])
        if phase != "computing":
            report.require(ratio <= 2, f"{phase}: the p99 of live quotes is {ratio:.1f} times that of {other}")
    report.figures = {
        **{f"live p99 ms {phase}, min / median / max": spread([1000 * v for v in p99[phase]]) for phase in PHASES},
        "live": dict(live.answers.most_common()),
        "late": dict(beside.late.answers.most_common()),
        "maintenance": dict(beside.done.most_common()),
        "rows": verdict.rows,
        "lost": verdict.lost,
        "seed": seed,
    }
    return report
