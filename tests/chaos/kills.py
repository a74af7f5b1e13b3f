"""kill -9 at random moments under load: of the service, of one of its workers, of the database.

Who would start a process again in production is played here: a service or a native server that is killed starts at
once. A worker is started by its supervisor, an embedded server by its service. Nobody else lifts a hand.
"""

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from app.db import embedded
from app.errors import StartupError
from tests.chaos.recording import Ledger, Writers, fleet, until
from tests.chaos.reporting import Report, spread
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, Postgres, Service, ended, signal_to, wait_gone

Victim = Literal["service", "worker", "embedded", "database", "worker and database"]
VICTIMS: Final[tuple[Victim, ...]] = ("service", "worker", "embedded", "database", "worker and database")
WRITERS: Final = 4
WORKERS: Final = 3  # of a service whose workers are killed
#: Seconds without a hand after which a victim counts as one that does not come back.
_PATIENCE: Final = 60.0
#: Seconds between two looks of the supervisor that is played here.
_SUPERVISION: Final = 0.5
#: Seconds without a database in which a new worker starts.
_AWAY: Final = 3.0
#: Seconds of load between a recovery and the next kill.
_PAUSE: Final = (0.1, 1.0)


@dataclass
class Target:
    """A running service, and how to kill what it consists of."""

    service: Service
    postgres: Postgres | None
    workers: int

    @property
    def database_url(self) -> str:
        """The database below the service."""
        return self.postgres.url if self.postgres else embedded.url(self.service.directory / "data")

    def kill(self, victim: Victim, choice: random.Random) -> None:
        """End a victim, and start it again where that is not its parent's part.

        Raises:
            NotReady: it does not end.
        """
        match victim:
            case "service":
                self.service.kill()
                self.service.start()
            case "worker":
                self._kill_worker(choice)
            case "embedded":
                postmaster = self.service.postmaster()
                assert postmaster is not None, "the embedded server runs"
                signal_to([postmaster], signal.SIGKILL)
                wait_gone([postmaster])
            case "database":
                assert self.postgres is not None
                self.postgres.kill()
                self.postgres.start()
            case "worker and database":
                assert self.postgres is not None
                self.postgres.kill()
                self._kill_worker(choice)
                time.sleep(_AWAY)
                self.postgres.start()

    def _kill_worker(self, choice: random.Random) -> None:
        # One that has clients, if any has: another one would not be missed.
        pids = self.service.busy_worker_pids() or self.service.worker_pids()
        signal_to([choice.choice(pids)], signal.SIGKILL)

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Start a native server again whenever it has ended, as often as it takes."""
        postgres = self.postgres
        if postgres is None:
            yield
            return
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_SUPERVISION):
                if not postgres.processes():
                    with suppress(StartupError):
                        postgres.start(timeout=0)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def by_hand(self) -> None:
        """What an operator would do, so that the store can be looked at."""
        if self.postgres is not None:
            self.postgres.end()
            self.postgres.start()
        self.service.end()
        self.service.start()
        self.service.wait_ready()


def _with_workers(victims: Sequence[Victim]) -> bool:
    return any("worker" in victim for victim in victims)


def started(
    stack: ExitStack, victims: Sequence[Victim], directory: Path, *, workers: int = WORKERS, logs: Path | None = None
) -> Target:
    """A service with the victims in it, ready; it ends with the stack, and logs elsewhere than in `directory` if told.

    Its database is its own, unless a native server is among the victims.
    """
    postgres = None
    workers = workers if _with_workers(victims) else 1
    environment = dict(QUIET)
    if any("database" in victim for victim in victims):
        postgres = Postgres.create(directory / "database")
        stack.enter_context(ended(postgres))
        postgres.start()
        environment |= postgres.environment
    service = Service(directory / "service", environment, workers, logs)
    stack.enter_context(ended(service))
    service.start()
    service.wait_ready()
    return Target(service, postgres, workers)


async def kills(
    victims: Sequence[Victim], directory: Path, *, times: int, rows: int, seed: int, workers: int = WORKERS
) -> Report:
    """Kill the victims in turn, `times` each, under writers; none of the `rows` or more acknowledged may be missing."""
    report = Report(f"kill -9: {', '.join(victims)}")
    choice = random.Random(seed)
    ledger = Ledger()
    recoveries: dict[Victim, list[float]] = {victim: [] for victim in victims}
    with ExitStack() as stack:
        target = await asyncio.to_thread(started, stack, victims, directory, workers=workers)
        senders = fleet(ledger, [target.service.url], WRITERS, reconnects=_with_workers(victims))
        began = time.monotonic()
        async with Writers([*senders]) as writers:
            for victim in [*victims] * times:
                await asyncio.sleep(choice.uniform(*_PAUSE))
                killed = time.monotonic()
                await asyncio.to_thread(target.kill, victim, choice)
                recovery = await ledger.recovery(killed, _PATIENCE)
                if recovery is None:
                    report.broken.append(f"{victim}: no acknowledgement within {_PATIENCE:g} s of the kill")
                    report.broken.append(target.service.tail(1))
                    break
                recoveries[victim].append(recovery)
                if _with_workers(victims):
                    # Another worker answers at once; the next kill waits until all of them do.
                    await _replaced(target, report)
                if report.broken:
                    break
            if not report.broken:
                await until(lambda: ledger.rows >= rows or not writers.running)
        seconds = time.monotonic() - began
        if report.broken:
            await asyncio.to_thread(target.by_hand)
        verdict = await verify(ledger, target.database_url, target.service.url)
    report.broken += verdict.broken
    cut = sum(count for answer, count in ledger.answers.items() if answer not in {"200", "not connected"})
    report.require(cut > 0, "no kill came while a request was under way: this proves nothing")
    report.figures = {
        "rows": verdict.rows,
        "requests": verdict.requests,
        "kills": sum(map(len, recoveries.values())),
        "lost": verdict.lost,
        "torn": verdict.torn,
        "unknown": f"{verdict.unknown}, {verdict.unknown_stored} of them stored",
        **{f"recovery s, {victim}, min / median / max": spread(took) for victim, took in recoveries.items()},
        "seconds": round(seconds),
        "seed": seed,
        "answers": dict(ledger.answers.most_common()),
    }
    return report


async def _replaced(target: Target, report: Report) -> None:
    replaced = await until(lambda: len(target.service.serving_pids()) >= target.workers, _PATIENCE)
    serving = len(target.service.serving_pids())
    report.require(replaced, f"{serving} of {target.workers} workers serve {_PATIENCE:g} s after a kill")


async def control(directory: Path, *, times: int = 5, seed: int) -> Report:
    """With a database that acknowledges before it writes, rows must be missed, or `kills` would prove nothing."""
    report = Report("control: synchronous_commit=off in each write")
    choice = random.Random(seed)
    answers: Counter[str] = Counter()
    verdict = None
    killed = 0
    with ExitStack() as stack:
        # Nothing is written for as long as that, unless the buffer of the log is full.
        postgres = Postgres.create(directory / "database", wal_writer_delay="10s", wal_writer_flush_after="1GB")
        stack.enter_context(ended(postgres))
        await asyncio.to_thread(postgres.start)
        environment = postgres.environment | QUIET
        service = Service(directory / "service", environment)
        stack.enter_context(ended(service))
        await asyncio.to_thread(service.start)
        await asyncio.to_thread(service.wait_ready)
        # Sessions of the service take no such setting from the server.
        await postgres.execute(
            "CREATE FUNCTION public.hasten() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM set_config('synchronous_commit', 'off', true); RETURN NULL; END $$",
            "CREATE TRIGGER hasten BEFORE INSERT ON quotes.latest EXECUTE FUNCTION public.hasten()",
            "CHECKPOINT",  # the schema is to survive
        )
        while killed < times and not (verdict and verdict.lost):
            # A ledger for each kill: what was lost is not sent again.
            ledger = Ledger()
            async with Writers([*fleet(ledger, [service.url], WRITERS, patience=0.0)]) as writers:
                await asyncio.sleep(0.5)
                await postgres.execute("CHECKPOINT")  # what came before is safe, or a store without rows would do too
                await asyncio.sleep(choice.uniform(0.3, 1))
                await asyncio.to_thread(postgres.kill)
                killed += 1
                await writers.stop()
            await asyncio.to_thread(postgres.start)
            verdict = await verify(ledger, postgres.url, None)
            answers += ledger.answers
    assert verdict is not None
    report.require(verdict.lost < verdict.rows, "what was written before the kill is gone too")
    report.require(verdict.lost > 0, f"{killed} kills lost nothing: the harness sees no loss, or none happens")
    report.figures = {
        "rows": verdict.rows,
        "kills": killed,
        "lost": verdict.lost,
        "torn": verdict.torn,
        "answers": dict(answers.most_common()),
    }
    return report
