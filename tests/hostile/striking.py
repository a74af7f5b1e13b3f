"""An attack, carried out by a process of its own beside a control, and the verdict on it.

Invariant: the attacker makes all that it sends before the control, and runs at low priority, so that what is measured
is the service's work and not its own. A service that ends, or stands still for too long, is started again by the
supervisor that is played here, and that breaks a promise.
"""

import asyncio
import multiprocessing
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from app.db import embedded
from tests.chaos.reporting import Report
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, NotReady, Service, ended
from tests.hostile.watching import Sample, Watcher, watching
from tests.hostile.wire import Attackers, Exchange, Outcome

MB: Final = 1_000_000
#: Milliseconds that liveness may take, and bytes that the service may grow by.
LIVE: Final = 100.0
GROWTH: Final = 200 * MB
#: Another client may take so many times what it takes without attack; what is below is noise of the machine.
SLOWER: Final = 2.0
_NOISE: Final = 20.0
#: Seconds of the control, at full size.
_CONTROL: Final = 10.0
#: Seconds in which memory has to come back, and what may stay in its allocators.
_SETTLE: Final = 15.0
_KEPT: Final = 100 * MB
#: Seconds after which a service that does not answer is killed.
_STANDSTILL: Final = 20.0


async def in_turn(url: str, exchanges: Sequence[Exchange], at_once: int, seconds: float, keep: Path | None) -> Outcome:
    """Carry out exchanges, `at_once` of them, again and again for so many seconds."""
    return await Attackers(url, at_once, keep).run(exchanges, seconds)


@dataclass(frozen=True, slots=True)
class Attack:
    """What clients do, and how many of them at once.

    Attributes:
        makes: the exchanges, from a source of chance and the scale.
        at_once: how many are under way at once.
        crowds: whether it stands for many clients, beside whom another one may be slower or refused.
        seconds: how long it lasts at least, at full size.
        carries: what carries them out.
    """

    name: str
    makes: Callable[[random.Random, float], Sequence[Exchange]]
    at_once: int = 2
    crowds: bool = False
    seconds: float = 10.0
    carries: Callable[[str, Sequence[Exchange], int, float, Path | None], Coroutine[None, None, Outcome]] = in_turn


_made: Sequence[Exchange] = ()


def _begin() -> None:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def _make(attack: Attack, seed: int, scale: float) -> None:
    global _made  # noqa: PLW0603  what is made stays in its process
    _made = attack.makes(random.Random(f"{seed} {attack.name}"), scale)


def _strike(attack: Attack, url: str, seconds: float, keep: Path | None) -> Outcome:
    return asyncio.run(attack.carries(url, _made, attack.at_once, seconds, keep))


@contextmanager
def _attacking() -> Iterator[ProcessPoolExecutor]:
    """The process that attacks; it is not waited for where a run is broken off."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin) as attacker:
        try:
            yield attacker
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@dataclass
class Supervisor:
    """Starts a service again that has ended or stands still, and notes it."""

    service: Service
    watcher: Watcher
    ends: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._stop.wait(0.2):
            process = self.service.process
            assert process is not None
            if process.poll() is None:
                with suppress(httpx.TransportError):
                    httpx.get(f"{self.service.url}/health/live", timeout=_STANDSTILL / 2, trust_env=False)
                    answered = time.monotonic()
                if time.monotonic() - answered < _STANDSTILL:
                    continue
                self.ends.append(f"the service stood still for {_STANDSTILL:g} s and was killed")
                self.service.kill()
            else:
                self.ends.append(f"the service ended with {process.returncode}")
            self.service.start()
            try:
                self.service.wait_ready()
            except NotReady as error:
                self.ends.append(str(error))
            self.watcher.follow(self.service.pid)
            answered = time.monotonic()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Watch meanwhile."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


async def strike(
    directory: Path,
    attacks: Sequence[Attack],
    *,
    name: str = "",
    scale: float,
    seed: int,
    timed: bool = True,
    keep: Path | None = None,
) -> Report:
    """Carry out attacks on one service, one after another; `timed` says whether what took long breaks a promise."""
    report = Report(name or ", ".join(attack.name for attack in attacks))
    with ExitStack() as stack:
        service = Service(directory / "service", QUIET)
        stack.enter_context(ended(service))
        service.start()
        attacker = stack.enter_context(_attacking())
        await asyncio.to_thread(service.wait_ready)
        await _warm(service.url)
        watcher = stack.enter_context(watching(service.url, service.pid))
        supervisor = Supervisor(service, watcher)
        stack.enter_context(supervisor.active())
        for attack in attacks:
            figures = await _beside(attack, attacker, supervisor, report, scale, seed, timed=timed, keep=keep)
            report.figures |= figures if len(attacks) == 1 else {f"{attack.name}, {k}": v for k, v in figures.items()}
        await asyncio.to_thread(service.wait_ready)
        ledger = await asyncio.to_thread(watcher.stop)
        verdict = await verify(ledger, embedded.url(service.directory / "data"), service.url)
        report.broken += verdict.broken
        report.require(verdict.rows > 0, "the other client stored nothing: this proves nothing")
        report.figures |= {"acknowledged": verdict.rows, "lost": verdict.lost, "seed": seed}
    return report


async def _warm(url: str) -> None:
    """Let the service have what it takes on at first need, and a little to answer with."""
    rows = [f'{{"symbol":"HOSTILE","timestamp":"2026-11-02T10:00:00.{i:06d}Z","price":1}}' for i in range(10_000)]
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        for content_type, body in (
            ("application/json", f"[{','.join(rows)}]"),
            ("text/csv", "symbol,timestamp,price\n"),
        ):
            answer = await http.post("/v1/quotes", content=body, headers={"content-type": content_type})
            assert answer.status_code in {200, 422, 400}, answer.text


async def _beside(
    attack: Attack,
    attacker: ProcessPoolExecutor,
    supervisor: Supervisor,
    report: Report,
    scale: float,
    seed: int,
    *,
    timed: bool,
    keep: Path | None,
) -> dict[str, object]:
    """One attack, its control before it; its figures. What broke goes into the report."""
    loop = asyncio.get_running_loop()
    watcher, ends = supervisor.watcher, len(supervisor.ends)
    await loop.run_in_executor(attacker, _make, attack, seed, scale)
    logged = supervisor.service.log.stat().st_size
    await asyncio.to_thread(watcher.take)
    await asyncio.sleep(max(1, _CONTROL * min(scale, 1)) if timed else 0.6)
    control = await asyncio.to_thread(watcher.take)
    began = time.monotonic()
    lasting = attack.seconds * min(scale, 1) if timed else 0
    outcome = await loop.run_in_executor(attacker, _strike, attack, supervisor.service.url, lasting, keep)
    seconds = time.monotonic() - began
    during = await asyncio.to_thread(watcher.take)
    before = min(control.memory, default=0)
    after, settled = await _settle(watcher, before + _KEPT) if timed else (before, during)
    peak = max(during.memory + settled.memory, default=before)

    def require(kept: bool, otherwise: str) -> None:
        report.require(kept, f"{attack.name}: {otherwise}")

    with supervisor.service.log.open("rb") as log:
        log.seek(logged)
        traces = log.read().count(b"Traceback")
    require(not traces, f"{traces} errors that nothing foresaw are in the log")
    for end in supervisor.ends[ends:]:
        require(False, f"{end}; connections lost last: {'; '.join(outcome.lost[-4:])}")
    for sentence in outcome.wrong:
        require(False, sentence)
    require(outcome.wrong_total <= len(outcome.wrong), f"… {outcome.wrong_total} such answers")
    if timed:
        judge_live(report, control, during, attack.name)
        if not attack.crowds:
            judge_other(report, control, during, attack.name)
    require(peak - before < GROWTH, f"memory grew by {(peak - before) // MB} MB, {GROWTH // MB} are right")
    require(after - before < _KEPT, f"memory stays {(after - before) // MB} MB larger")
    return {
        "requests": outcome.answers.total(),
        "answers": dict(outcome.answers.most_common(12)),
        "wrong": outcome.wrong_total,
        "errors logged": traces,
        "ends": len(supervisor.ends) - ends,
        "live p99 ms": compared(control.live, during.live),
        "other p99 ms": compared(control.other, during.other),
        "other refused": during.refused,
        "memory MB": f"{before // MB} → {peak // MB} → {after // MB}",
        "seconds": round(seconds, 1),
        **outcome.figures,
    }


def compared(control: Sequence[float], during: Sequence[float]) -> str:
    """A 99th percentile without and with attack, and the greatest, in milliseconds."""
    return f"{Sample.p99(control):.1f} → {Sample.p99(during):.1f}, max {1000 * max(during, default=0):.0f}"


def judge_live(report: Report, control: Sample, during: Sample, name: str) -> None:
    """Liveness answers in time, unless it does not on this machine without attack either."""
    took, most = Sample.p99(during.live), max(LIVE, SLOWER * Sample.p99(control.live))
    report.require(took < most, f"{name}: p99 of liveness is {took:.0f} ms, below {most:.0f} is right")


def judge_other(report: Report, control: Sample, during: Sample, name: str) -> None:
    """Another client is neither refused nor much slower than without attack."""
    took, most = Sample.p99(during.other), SLOWER * max(Sample.p99(control.other), _NOISE)
    report.require(took <= most, f"{name}: p99 of another client is {took:.0f} ms, up to {most:.0f} is right")
    answers = ", ".join(f"{answer} {count}" for answer, count in during.answers.most_common(4))
    report.require(not during.refused, f"{name}: another client was refused: {answers}")


async def _settle(watcher: Watcher, enough: int) -> tuple[int, Sample]:
    """Wait for memory to come back; what is left, and all that was seen meanwhile."""
    seen = Sample()
    deadline = time.monotonic() + _SETTLE
    while True:
        await asyncio.sleep(0.5)
        sample = await asyncio.to_thread(watcher.take)
        seen.memory += sample.memory
        if sample.memory and (sample.memory[-1] < enough or time.monotonic() > deadline):
            return sample.memory[-1], seen
