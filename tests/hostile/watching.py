"""What is measured beside an attack, by a process of its own: liveness, another client, memory.

Probes leave at fixed times, whatever became of those before: a service that stands still for a second fails twenty-five
of them, not one. Each kind of client has an address of its own.
Invariant: what the other client was told is noted as in tests/chaos, so that the store can be compared with it.
"""

import asyncio
import multiprocessing
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.chaos.recording import UNKNOWN, Ledger, Request, milliseconds, random_symbol
from tests.chaos.reporting import percentile
from tests.hostile.wire import Answer, connect, read_answer, request

#: Seconds between two probes, two posts of the other client, and two looks at memory.
_LIVE: Final = 0.04
_POST: Final = 0.08
_MEMORY: Final = 0.25
#: Seconds after which a probe or a post counts as one without an answer.
_PATIENCE: Final = 20.0
_ROWS: Final = 10
_SOURCES: Final = {"live": "127.0.0.3", "other": "127.0.0.2"}


@dataclass(slots=True)
class Sample:
    """What was measured since the last one; seconds, and bytes.

    Attributes:
        live: how long each probe of liveness took.
        other: how long each answer to the other client took.
        answers: what the other client was answered.
        memory: bytes of the service and all that it started, one look after another.
    """

    live: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)

    @property
    def refused(self) -> int:
        """Posts of the other client that were not taken."""
        return sum(count for answer, count in self.answers.items() if answer != "200")

    @staticmethod
    def p99(values: Sequence[float]) -> float:
        """The 99th percentile in milliseconds; 0 of none."""
        return percentile(values, 0.99) * 1000 if values else 0.0


def memory(pid: int) -> int:
    """Bytes of a process and all below it, without files and without PostgreSQL's buffers.

    What processes have had in common since a fork counts once, as a machine has it once.
    """
    below: dict[int, list[int]] = defaultdict(list)
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            below[int(status.read_text().rpartition(")")[2].split()[1])].append(int(status.parent.name))
    total = 0
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        waiting += below[process]
        with suppress(OSError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:"))
    return total * 1024


@dataclass
class _Watch:
    """The loop of that process."""

    url: str
    pid: int
    sample: Sample = field(default_factory=Sample)
    ledger: Ledger = field(default_factory=Ledger)
    symbol: str = field(default_factory=lambda: random_symbol("H"))
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    number: int = 0

    async def run(self, pipe: Connection) -> None:
        """Until told to stop; a number is the service's new process, a text asks for the sample."""
        start = milliseconds(timedelta(minutes=50)) // 60_000 * 60_000
        clocks = [
            asyncio.create_task(self._every(_LIVE, self._live)),
            asyncio.create_task(self._every(_POST, lambda: self._post(start))),
            asyncio.create_task(self._every(_MEMORY, self._look)),
        ]
        while True:
            if not pipe.poll():
                await asyncio.sleep(0.01)
                continue
            try:
                message = pipe.recv()
            except EOFError:  # who asked has been killed
                return
            if isinstance(message, int):
                self.pid = message
            elif message == "sample":
                pipe.send(self.sample)
                self.sample = Sample()
            else:
                break
        for clock in clocks:
            clock.cancel()
        await asyncio.gather(*clocks, *self.tasks, return_exceptions=True)
        pipe.send(self.ledger)
        for _, writer in self.idle:
            writer.close()

    async def _every(self, seconds: float, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        due = time.monotonic()
        while True:
            due = max(due + seconds, time.monotonic())  # what this process itself has missed is not made up for
            await asyncio.sleep(due - time.monotonic())
            task = asyncio.create_task(act())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _live(self) -> None:
        began = time.monotonic()
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                reader, writer = await connect(self.url, _SOURCES["live"])
                try:
                    writer.write(request("GET", "/health/live"))
                    await read_answer(reader)
                finally:
                    writer.close()
        self.sample.live.append(time.monotonic() - began)

    async def _look(self) -> None:
        if held := memory(self.pid):  # else it has ended
            self.sample.memory.append(held)

    async def _post(self, start: int) -> None:
        self.number += 1
        sent = Request(self.symbol, self.number, start + (self.number - 1) * _ROWS, 1, _ROWS, keyed=False)
        self.ledger.requests.append(sent)
        sent.attempts, sent.state = 1, "unknown"
        began = time.monotonic()
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await self._exchange(sent.body())
        except TimeoutError:
            self._note("no answer")
            return
        except ConnectionRefusedError:
            sent.state = "refused"
            self._note("not connected")
            return
        except (OSError, asyncio.IncompleteReadError):
            self._note("lost")
            return
        if answer is None:
            self._note("closed")
            return
        took = time.monotonic() - began
        self.sample.other.append(took)
        if answer.status == 200:
            receipt = msgspec.json.decode(answer.body)
            sent.state, sent.inserted, sent.answered = "stored", receipt["inserted"], time.monotonic()
            if receipt["inserted"] != _ROWS:
                self.ledger.complain(f"a receipt of {_ROWS} new quotes says {answer.body.decode()[:200]}")
            self._note("200")
            return
        if answer.fine and answer.code != UNKNOWN:
            sent.state = "refused"
        if not answer.fine:
            self.ledger.complain(f"the other client got {answer.status} {answer.code}")
        self._note(f"{answer.status} {answer.code}")

    def _note(self, answer: str) -> None:
        self.sample.answers[answer] += 1

    async def _exchange(self, body: bytes) -> Answer | None:
        while self.idle:
            reader, writer = self.idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                break
            writer.close()
        else:
            reader, writer = await connect(self.url, _SOURCES["other"])
        try:
            writer.write(
                request(
                    "POST", "/v1/quotes?precision=ms", body, headers={"Content-Type": "application/json"}, close=False
                )
            )
            answer = await read_answer(reader)
        except BaseException:
            writer.close()
            raise
        if answer is None or answer.headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((reader, writer))
        return answer


def _watch(pipe: Connection, url: str, pid: int) -> None:
    with suppress(PermissionError):  # who may not is measured with a little more noise
        os.nice(-5)
    asyncio.run(_Watch(url, pid).run(pipe))


@dataclass
class Watcher:
    """The process that measures, seen from here."""

    pipe: Connection

    def follow(self, pid: int) -> None:
        """Measure the memory of another process from here on: the service was started again."""
        self.pipe.send(pid)

    def take(self) -> Sample:
        """What was measured since the last call."""
        self.pipe.send("sample")
        sample = self.pipe.recv()
        assert isinstance(sample, Sample)
        return sample

    def stop(self) -> Ledger:
        """End it when what is under way has its answer; what the other client was told."""
        self.pipe.send(None)
        ledger = self.pipe.recv()
        assert isinstance(ledger, Ledger)
        return ledger


@contextmanager
def watching(url: str, pid: int) -> Iterator[Watcher]:
    """Measure a service from a process of its own; it ends with the context."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_watch, args=(there, url, pid))
    process.start()
    there.close()
    try:
        yield Watcher(here)
    finally:
        process.join(1)
        if process.is_alive():
            process.terminate()
            process.join()
        process.close()
        here.close()
