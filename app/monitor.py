"""Figures of the store as metrics: a table of gauges, each with what it takes from one look at the store.

Invariant: what fails here is logged and fails nothing else. One look at a time, on a connection of its own that
waits for no lock for long; `/v1/storage` and the gauges show the same look.
"""

import asyncio
import math
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from prometheus_client import Gauge

from app import metrics, workers
from app.db import embedded
from app.errors import QuotesError
from app.logs import Logger
from app.repository.storage import STATES, Storage, StorageRepository
from app.settings import Settings

log = Logger(__name__)

#: A look is shared by all who ask within this time.
FRESH: Final = timedelta(seconds=10)

Values = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Probe:
    """A gauge, and its values by label in one look at the store."""

    gauge: Gauge
    values: Callable[[Storage], Values]


#: Plain tables, by what they hold; the quotes are one where there is no hypertable.
_TABLES: Final = {"quotes.real_time": "rowstore", "quotes.latest": "latest", "quotes.receipts": "receipts"}


def _bytes(storage: Storage) -> Values:
    parts: dict[str, int] = {
        state: sum(chunk.bytes for chunk in storage.chunks if chunk.state == state) for state in STATES
    }
    for relation in storage.relations:
        if relation.kind == "table":
            state = _TABLES[relation.name]
            parts[state] = parts.get(state, 0) + relation.bytes
    parts["rollups"] = sum(r.bytes for r in storage.relations if r.kind == "continuous aggregate")
    return [((state,), value) for state, value in parts.items()]


PROBES: Final = (
    Probe(metrics.STORAGE_SIZE, lambda look: [((), look.size)]),
    Probe(metrics.BACKUP, lambda look: [] if look.backup is None else [((), look.backup)]),
    Probe(metrics.LATEST_QUOTE, lambda look: [] if look.newest is None else [((), look.newest.timestamp())]),
    Probe(metrics.STORAGE_BYTES, _bytes),
    Probe(metrics.CHUNKS, lambda look: [((state,), look.count(state)) for state in STATES]),
    Probe(metrics.COMPRESSION_BEFORE, lambda look: [((), look.before)]),
    Probe(metrics.COMPRESSION_AFTER, lambda look: [((), look.after)]),
    Probe(metrics.WATERMARK_LAG, lambda look: [((r.name,), r.lag.total_seconds()) for r in look.rollups]),
    Probe(
        metrics.WATERMARK,
        lambda look: [((r.name,), r.watermark.timestamp()) for r in look.rollups if r.watermark is not None],
    ),
    Probe(metrics.STALE_RANGES, lambda look: [((r.name,), r.stale_ranges) for r in look.rollups]),
    Probe(
        metrics.JOB_SUCCESS,
        lambda look: [((j.name,), j.last_status == "Success") for j in look.jobs if j.last_status is not None],
    ),
    Probe(
        metrics.JOB_FINISHED,
        lambda look: [((j.name,), j.last_success.timestamp()) for j in look.jobs if j.last_success is not None],
    ),
    Probe(metrics.JOB_INTERVAL, lambda look: [((j.name,), j.every.total_seconds()) for j in look.jobs]),
)


class Monitor:
    """Looks at the store now and then, and when asked; `check` runs each time too, so that its figures are fresh."""

    def __init__(
        self, repository: StorageRepository, settings: Settings, check: Callable[[], Awaitable[object]]
    ) -> None:
        self._repository = repository
        self._check = check
        self._interval = settings.monitor_interval.total_seconds()
        self._capacity = settings.storage_capacity
        self._volume = embedded.volume(settings)
        self._shown: set[tuple[Gauge, tuple[str, ...]]] = set()
        self._looking: asyncio.Task[Storage] | None = None
        self._last: tuple[float, Storage] | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._interval:
            self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._task, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def storage(self) -> Storage:
        """A look that is at most ten seconds old.

        Raises:
            DatabaseUnavailable: the database cannot be reached, or a chunk is locked.
            QueryTimeout: the look took too long.
        """
        if self._last is not None and time.monotonic() - self._last[0] <= FRESH.total_seconds():
            return self._last[1]
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        # Whoever comes while one looks waits for that: a second look at what stands still would take as long again.
        return await asyncio.shield(self._looking)

    async def _look(self) -> Storage:
        now = time.monotonic()
        storage = await self._repository.look()
        self._show(storage)
        self._last = (now, storage)
        return storage

    def _looked(self, looking: "asyncio.Task[Storage]") -> None:
        self._looking = None
        if not looking.cancelled():
            looking.exception()  # whoever asked may have gone

    def _show(self, storage: Storage) -> None:
        values = {(probe.gauge, labels): value for probe in PROBES for labels, value in probe.values(storage)}
        if self._capacity is not None:
            values[metrics.STORAGE_FREE, ()] = max(0, self._capacity - storage.size)
        elif self._volume is not None:
            values[metrics.STORAGE_FREE, ()] = shutil.disk_usage(self._volume).free
        # A job that was removed does not look overdue for ever: no comparison holds for what is not a number.
        for gone in self._shown - values.keys():
            values[gone] = math.nan
        for (gauge, labels), value in values.items():
            (gauge.labels(*labels) if labels else gauge).set(value)
        self._shown = set(values)

    async def _run(self) -> None:
        failed = False
        while True:
            try:
                if workers.leads():
                    await self._check()
                    await self.storage()
                    metrics.MONITOR_UP.set(1)
                failed = False
            except Exception as error:
                metrics.MONITOR_UP.set(0)
                if not failed:
                    reason = error.detail if isinstance(error, QuotesError) else repr(error)
                    log.warning("no figures of the store", reason=reason)
                failed = True
            # Several processes started together do not look together.
            await asyncio.sleep(self._interval * random.uniform(0.9, 1.1))  # noqa: S311  jitter, not a secret
