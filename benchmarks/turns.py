"""One turn of ingest: quotes of a stretch of time that holds none yet, sent one way, metered and checked.

Invariant: requests are encoded before the clock starts, and after a turn as many quotes are stored as were sent.
"""

import asyncio
import gc
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import asyncpg

from app.db.engine import Connection
from app.quote.fields import NAMES
from benchmarks.client import Sent, post, send_all, send_on_schedule
from benchmarks.rivals import Door
from benchmarks.side_by_side import BenchmarkError, Spread
from benchmarks.target import Target, copy_file, cpu_seconds, memory_bytes
from benchmarks.ticks import FORMATS, Ticks

#: Microseconds between quotes of a busy hour.
BUSY: Final = 10_000.0
WHO: Final = ("server", "PostgreSQL", "client")
PSQL: Final = r"psql \copy"

Data = Literal["fresh", "duplicate", "out of order"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of ingest."""

    rows: int
    seconds: float
    latencies_ms: list[float]
    #: By whom; None where the system does not tell.
    cpu_seconds: dict[str, float | None]
    #: Resident bytes of the process that took the requests, afterwards and at its peak so far.
    rss: int | None
    peak_rss: int | None
    #: How often requests had to be repeated because the server said that it was overloaded.
    refused: int = 0

    @property
    def rate(self) -> float:
        """Quotes a second."""
        return self.rows / self.seconds


@dataclass(frozen=True, slots=True)
class Prepared:
    """The requests of a turn, and the stretch of time that their quotes fill."""

    requests: list[bytes]
    rows: int
    start: datetime
    end: datetime


class Turns:
    """Turns one after another, each later in time."""

    def __init__(self, target: Target, admin: Connection, start: datetime, ticks: Ticks) -> None:
        self._target = target
        self._admin = admin
        self._next = start
        self._ticks = ticks

    def prepare(self, door: Door, form: str, batch: int, rows: int, *, shuffle: bool = False) -> Prepared:
        """Requests of the next quotes."""
        start, end = self._stretch(rows)
        bodies = self._ticks.bodies(form, start, range(rows), BUSY, batch, shuffle=shuffle)
        return Prepared([post(door.path, body, FORMATS[form]) for body in bodies], rows, start, end)

    async def send(self, door: Door, form: str, batch: int, clients: int, rows: int, data: Data = "fresh") -> Turn:
        """A turn over HTTP."""
        prepared = self.prepare(door, form, batch, rows, shuffle=data == "out of order")
        if data == "duplicate":
            await self.run(door, prepared, clients)
        return await self.run(door, prepared, clients, duplicate=data == "duplicate")

    async def run(self, door: Door, prepared: Prepared, clients: int, *, duplicate: bool = False) -> Turn:
        """A turn of requests that are encoded already.

        Raises:
            BenchmarkError: other quotes were acknowledged or stored than were sent.
        """
        await self.settle()
        with self.metered(door.process) as used:
            sent = await send_all(door.port, prepared.requests, clients)
        await self.check(door, prepared, sent, duplicate=duplicate)
        return turn_of(sent, prepared.rows, used, door.process)

    async def on_schedule(self, door: Door, form: str, batch: int, rows: int, rate: float, connections: int) -> Turn:
        """A turn whose batches come when they are due, at `rate` quotes a second."""
        prepared = self.prepare(door, form, batch, rows)
        await self.settle()
        with self.metered(door.process) as used:
            sent = await send_on_schedule(door.port, prepared.requests, rate / batch, connections)
        await self.check(door, prepared, sent)
        return turn_of(sent, rows, used, door.process)

    async def copy(self, rows: int, streams: int = 1) -> Turn:
        r"""A turn of `psql \copy`, in so many streams at once."""
        start, end = self._stretch(rows)
        files = [self._target.scratch / f"quotes-{stream}.csv" for stream in range(streams)]
        share = -(-rows // streams)
        for number, file in enumerate(files):
            part = range(number * share, min((number + 1) * share, rows))
            file.write_bytes(next(self._ticks.bodies("CSV", start, part, BUSY, share)))
        await self.settle()
        with self.metered(None) as used:
            began = time.perf_counter()
            await asyncio.gather(*(copy_file(self._target, file, "quotes.real_time", NAMES) for file in files))
            seconds = time.perf_counter() - began
        statement = "SELECT count(*) FROM quotes.real_time WHERE timestamp >= $1 AND timestamp < $2"
        _equal(rows, await self._admin.fetchval(statement, start, end), "stored")
        return Turn(rows, seconds, [1000 * seconds], used, None, None)

    async def check(self, door: Door, prepared: Prepared, sent: Sent, *, duplicate: bool = False) -> None:
        """See that all was acknowledged for what it was, and is stored."""
        if door.stored is None:
            return
        if sent.answers[0]:  # InfluxDB has nothing to say
            acknowledged(sent, prepared.rows, "unchanged" if duplicate else "inserted")
        _equal(prepared.rows, await door.stored(prepared.start, prepared.end), "stored")

    async def settle(self) -> None:
        """Leave no work of one turn to the next; without the right to a checkpoint, do without."""
        with suppress(asyncpg.InsufficientPrivilegeError):
            await self._admin.execute("CHECKPOINT")
        gc.collect()

    @contextmanager
    def metered(self, process: int | None) -> Iterator[dict[str, float | None]]:
        """Fill in what the server, PostgreSQL and this process consume meanwhile."""
        used: dict[str, float | None] = {}
        before = self._cpu(process)
        gc.disable()
        try:
            yield used
        finally:
            gc.enable()
            for who, now, then in zip(WHO, self._cpu(process), before, strict=True):
                used[who] = None if now is None or then is None else now - then

    def _cpu(self, process: int | None) -> tuple[float | None, ...]:
        return cpu_seconds(process), cpu_seconds(self._target.postmaster), _own_cpu()

    def _stretch(self, rows: int) -> tuple[datetime, datetime]:
        start = self._next
        self._next += timedelta(microseconds=rows * BUSY)
        if self._next > datetime.now(UTC):
            raise BenchmarkError("So many quotes reach into the future; take fewer rows or rounds.")
        return start, self._next


def turn_of(sent: Sent, rows: int, used: dict[str, float | None], process: int) -> Turn:
    """The turn that requests made."""
    rss, peak = memory_bytes(process) or (None, None)
    return Turn(rows, sent.seconds, [1000 * s for s in sent.latencies], used, rss, peak, sent.refused)


def acknowledged(sent: Sent, rows: int, what: str = "inserted") -> None:
    """See that all quotes were acknowledged as inserted, or as unchanged.

    Raises:
        BenchmarkError: they were not.
    """
    _equal(rows, sum(json.loads(answer)[what] for answer in sent.answers), what)


def cost(turns: Sequence[Turn], who: str) -> str:
    """Microseconds of processor time a quote, as the median of the turns."""
    used = [(turn.cpu_seconds[who], turn.rows) for turn in turns]
    values = [1e6 * seconds / rows for seconds, rows in used if seconds is not None]
    return f"{Spread.of(values).median:.1f}" if values else ""


def cores(turns: Sequence[Turn], who: str) -> str:
    """Processors kept busy, as the median of the turns."""
    values = [used / turn.seconds for turn in turns if (used := turn.cpu_seconds[who]) is not None]
    return f"{Spread.of(values).median:.2f}" if values else ""


def mebibytes(size: int | None) -> str:
    """A size in MiB, as far as it is known."""
    return "" if size is None else f"{size / 2**20:,.0f}"


def _equal(sent: int, found: int, what: str) -> None:
    if sent != found:
        raise BenchmarkError(f"{sent} quotes were sent and {found} {what}.")


def _own_cpu() -> float:
    """Processor time of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
