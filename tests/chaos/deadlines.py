"""Deadlines: whatever the database does, every request has its answer in the time that the settings promise.

Three ways not to answer: the database is frozen, somebody holds a lock on the quotes, and commits wait for a standby
that does not exist. Beside writers every kind of read is asked for, and what supervisors ask.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import httpx

from tests.chaos.recording import UNAVAILABLE, Ledger, Writers, code_of, fleet
from tests.chaos.reporting import Report
from tests.chaos.stops import locked
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, Postgres, Service, ended, thaw

Fault = Literal["frozen", "locked", "unconfirmed"]
FAULTS: Final[tuple[Fault, ...]] = ("frozen", "locked", "unconfirmed")
TOKEN: Final = "chaos-deadlines"  # noqa: S105  of a service that lives for a test
#: Seconds, small so that faults may be short.
POOL, STATEMENT, WRITE, COMMIT = 1.0, 1.0, 2.0, 1.0
ENVIRONMENT: Final = {
    "QUOTES_POOL_TIMEOUT": f"{POOL} s",
    "QUOTES_STATEMENT_TIMEOUT": f"{STATEMENT} s",
    "QUOTES_WRITE_TIMEOUT": f"{WRITE} s",
    "QUOTES_COMMIT_TIMEOUT": f"{COMMIT} s",
    "QUOTES_ADMIN_TOKEN": TOKEN,
}
#: A write waits for its transaction half as long as that may take, and then for its commit.
WRITING: Final = 1.5 * WRITE + COMMIT
READING: Final = POOL + STATEMENT
#: For this machine, of which the database and the clients have a part too.
SLACK: Final = 1.0
_WRITERS: Final = 6


@dataclass(frozen=True, slots=True)
class Question:
    """A request that is no post of quotes, and the seconds in which it promises an answer."""

    name: str
    path: str
    deadline: float
    method: str = "GET"


def questions(symbol: str) -> list[Question]:
    """Every kind of read, and what supervisors ask."""
    today = datetime.now(UTC).date().isoformat()
    return [
        Question("range", f"/v1/quotes?symbols={symbol}&start={today}", READING),
        Question("latest", f"/v1/quotes/latest?symbols={symbol}", READING),
        Question("count", f"/v1/quotes/count?symbols={symbol}", READING),
        Question("bars", f"/v1/ohlc?symbols={symbol}&interval=1h&start={today}", READING),
        Question("symbols", "/v1/symbols?limit=1", READING),
        Question("delete", "/v1/quotes?symbol=NOBODY&start=2020-01-01&end=2020-01-02", WRITING, "DELETE"),
        Question("health", "/health", 4.0),
        Question("ready", "/health/ready", 4.0),
        Question("live", "/health/live", 0.0),
        Question("metrics", "/metrics", 0.0),
    ]


@asynccontextmanager
async def _fault(fault: Fault, postgres: Postgres) -> AsyncIterator[None]:
    if fault == "frozen":
        frozen = postgres.freeze()
        try:
            yield
        finally:
            thaw(frozen)
    elif fault == "locked":
        async with locked(postgres.url, "LOCK TABLE quotes.real_time, quotes.latest IN ACCESS EXCLUSIVE MODE"):
            yield
    else:
        reload = "SELECT pg_reload_conf()"
        await postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'", reload)
        try:
            yield
        finally:
            await postgres.execute("ALTER SYSTEM RESET synchronous_standby_names", reload)


async def deadlines(directory: Path, fault: Fault, *, seconds: float) -> Report:
    """Ask everything again and again while the database is at fault for so many `seconds`."""
    report = Report(f"deadlines: {fault}")
    ledger = Ledger()
    with ExitStack() as stack:
        postgres = Postgres.create(directory / "database")
        stack.enter_context(ended(postgres))
        await asyncio.to_thread(postgres.start)
        service = Service(directory / "service", postgres.environment | QUIET | ENVIRONMENT)
        stack.enter_context(ended(service))
        service.start()
        await asyncio.to_thread(service.wait_ready)
        writers = [*fleet(ledger, [service.url], _WRITERS, rows=(1, 50), patience=0.3, pace=0.02)]
        async with Writers(writers):
            await asyncio.sleep(1)
            ledger.seconds.clear()
            async with asking(service.url, questions(writers[0].symbol), report) as slowest:
                async with _fault(fault, postgres):
                    await asyncio.sleep(seconds)
                over = time.monotonic()
                recovery = await ledger.recovery(over, 30)
        verdict = await verify(ledger, postgres.url, service.url)
    report.broken += verdict.broken
    slowest["write"] = max(ledger.seconds)
    report.require(
        slowest["write"] <= WRITING + SLACK, f"a write took {slowest['write']:.1f} s, {WRITING:g} s are promised"
    )
    report.require(recovery is not None and recovery < 5, f"writes came back after {recovery or 30:.1f} s")
    report.figures = {
        "promised s": f"write {WRITING:g}, read {READING:g}, health 4, live and metrics at once",
        "slowest answer s": {name: round(took, 2) for name, took in sorted(slowest.items())},
        "writes back after s": None if recovery is None else round(recovery, 2),
        "rows": verdict.rows,
        "lost": verdict.lost,
        "unknown": f"{verdict.unknown}, {verdict.unknown_stored} of them stored",
        "answers": dict(ledger.answers.most_common()),
    }
    return report


@asynccontextmanager
async def asking(url: str, asked: Sequence[Question], report: Report) -> AsyncIterator[dict[str, float]]:
    """Ask a service each question again and again meanwhile; the slowest answer to each, in seconds."""
    slowest: dict[str, float] = {}
    stop = asyncio.Event()
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, headers=headers) as http:
        tasks = [asyncio.create_task(_ask(http, question, slowest, report, stop)) for question in asked]
        yield slowest
        stop.set()
        await asyncio.gather(*tasks)


async def _ask(
    http: httpx.AsyncClient, question: Question, slowest: dict[str, float], report: Report, stop: asyncio.Event
) -> None:
    """Ask again and again, and note the slowest answer and the first that breaks the contract."""
    said = False
    while not stop.is_set():
        began = time.monotonic()
        try:
            answer = await http.request(question.method, question.path)
            wrong = _wrong(question, answer)
        except httpx.TransportError as error:
            wrong = f"{question.name}: {type(error).__name__}"
        took = time.monotonic() - began
        slowest[question.name] = max(took, slowest.get(question.name, 0))
        if took > question.deadline + SLACK:
            wrong = f"{question.name} took {took:.1f} s, {question.deadline:g} s are promised"
        if wrong and not said:
            report.broken.append(wrong)
            said = True
        await asyncio.sleep(0.1)


def _wrong(question: Question, answer: httpx.Response) -> str:
    fine = answer.is_success or (
        answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        and (code_of(answer) in UNAVAILABLE or question.path.startswith("/health"))
    )
    return "" if fine else f"{question.name}: {answer.status_code} {answer.text[:200]}"
