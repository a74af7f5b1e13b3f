"""Three workers under load: some are killed, so is their parent, all are replaced, and the database stops for a while.

Whoever supervises the service is played here: a parent that is killed is started again until it serves. Nobody else
lifts a hand.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

import httpx

from tests.chaos.recording import Ledger, Writers, fleet, until
from tests.chaos.reporting import Report, spread
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, Postgres, Service, ended, signal_to

Event = Literal["worker killed", "parent killed", "reload", "database stopped"]
#: What happens in one round.
_ROUND: Final[tuple[Event, ...]] = (
    "worker killed", "parent killed", "reload", "worker killed", "parent killed", "database stopped",
)  # fmt: skip
#: In these the service is ready at every look.
_READY: Final = ("worker killed", "reload")
_WORKERS: Final = 3
_WRITERS: Final = 6
#: Seconds between two looks, in which the database is away, and after which nothing comes back.
_EVERY: Final = 0.1
_AWAY: Final = 3.0
_PATIENCE: Final = 60.0
#: Longest way back, in seconds.
_BACK: Final = 5.0


class _Looks:
    """Asks for readiness again and again, over a new connection each time, and counts the answers by what happens."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.event: Event | None = None
        self.ready: list[float] = []
        self.answers: Counter[tuple[Event, str]] = Counter()

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            task.cancel()

    def gap(self, since: float) -> float:
        """Longest time between two answers that it is ready, in seconds."""
        moments = [since, *(moment for moment in self.ready if moment > since)]
        return max(later - earlier for earlier, later in pairwise(moments))

    async def _look(self) -> None:
        while True:
            event = self.event
            async with httpx.AsyncClient(timeout=10, trust_env=False) as http:
                try:
                    answer = str((await http.get(f"{self.url}/health/ready")).status_code)
                except httpx.TransportError:
                    answer = "none"
            if answer == "200":
                self.ready.append(time.monotonic())
            if event is not None and event == self.event:
                self.answers[event, answer] += 1
            await asyncio.sleep(_EVERY)


def _serve_again(service: Service) -> None:
    """What a supervisor does: start it until it stays."""
    service.start()
    deadline = time.monotonic() + _PATIENCE
    while not service.serving_pids() and time.monotonic() < deadline:
        if service.process is not None and service.process.poll() is not None:
            service.start()
        time.sleep(0.02)


def _happen(event: Event, service: Service, postgres: Postgres, choice: random.Random) -> float:
    """Let it happen; the moment from which on the way back is measured."""
    match event:
        case "worker killed":
            signal_to([choice.choice(service.busy_worker_pids() or service.worker_pids())], signal.SIGKILL)
        case "reload":
            signal_to([service.pid], signal.SIGHUP)
        case "parent killed":
            began = time.monotonic()
            signal_to([service.pid], signal.SIGKILL)
            assert service.process is not None
            service.process.wait()
            _serve_again(service)
            return began
        case "database stopped":
            postgres.cluster.run("pg_ctl", "stop", "--mode=fast", "--wait")
            time.sleep(_AWAY)
            postgres.start()
    return time.monotonic()


async def workers(directory: Path, *, rounds: int, seed: int) -> Report:
    """Go through the events again and again, under writers."""
    report = Report(f"{_WORKERS} workers, {_WRITERS} writers")
    choice = random.Random(seed)
    ledger = Ledger()
    recoveries: dict[Event, list[float]] = {event: [] for event in _ROUND}
    with ExitStack() as stack:
        postgres = Postgres.create(directory / "database")
        stack.enter_context(ended(postgres))
        await asyncio.to_thread(postgres.start)
        service = Service(directory / "service", postgres.environment | QUIET, _WORKERS)
        stack.enter_context(ended(service))
        service.start()
        await asyncio.to_thread(service.wait_ready)
        looks = _Looks(service.url)
        async with Writers([*fleet(ledger, [service.url], _WRITERS, reconnects=True)]), looks.looking():
            for event in _ROUND * rounds:
                before = set(service.worker_pids())
                await asyncio.sleep(choice.uniform(0.1, 1))
                looks.event = event
                since = await asyncio.to_thread(_happen, event, service, postgres, choice)
                recovery = await ledger.recovery(since, _PATIENCE)
                replaced = before if event == "reload" else set()
                whole = await until(partial(_is_whole, service, replaced), _PATIENCE)
                if recovery is None or not whole:
                    report.broken += [f"{event}: not back within {_PATIENCE:g} s", service.tail(3)]
                    break
                looks.event = None
                # Those that lose their parent answer for a second more: what counts is the time without any.
                if event == "parent killed":
                    await asyncio.sleep(5 * _EVERY)
                    recovery = looks.gap(since)
                recoveries[event].append(recovery)
        verdict = await verify(ledger, postgres.url, service.url)
    report.broken += verdict.broken
    for event, took in recoveries.items():
        report.require(max(took, default=0) < _BACK, f"{event}: back after {max(took, default=0):.1f} s")
    # A worker that is killed takes the looks that it answers with it.
    bad = {key: count for key, count in looks.answers.items() if key[0] in _READY and key[1] not in {"200", "none"}}
    report.require(not bad, f"not ready, though the database was there: {bad}")
    report.figures = {
        "rows": verdict.rows,
        "requests": verdict.requests,
        "lost": verdict.lost,
        "torn": verdict.torn,
        **{f"recovery s, {event}, min / median / max": spread(took) for event, took in recoveries.items()},
        "looks": {f"{event}: {answer}": count for (event, answer), count in sorted(looks.answers.items())},
        "seed": seed,
        "answers": dict(ledger.answers.most_common()),
    }
    return report


def _is_whole(service: Service, replaced: set[int]) -> bool:
    """Whether all workers serve, and those that were to be replaced no more."""
    serving = set(service.serving_pids())
    return len(serving) == _WORKERS and not serving & replaced
