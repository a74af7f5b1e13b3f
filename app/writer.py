"""Group commit: many requests, few transactions, one receipt each.

Requests wait in a queue bounded by rows and bytes until one of a fixed number of flushers is free; whatever has
gathered by then shares its transaction. Invariant: every accepted request gets exactly one result, a receipt
that says it is committed or an error, also when its client has gone, the database fails or the service stops.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import structlog
from opentelemetry.trace import SpanContext, Tracer

from app import metrics, traces
from app.errors import Overloaded, QuotesError, ServiceStopping
from app.model import Receipt
from app.repository.quotes import Write
from app.settings import Settings

log = structlog.get_logger(__name__)

Flush = Callable[[Sequence[Write]], Awaitable[list[Receipt | QuotesError]]]
_LONGEST_RETRY: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Pending:
    write: Write
    rows: int
    nbytes: int
    context: SpanContext
    result: "asyncio.Future[Receipt]"
    since: float = field(default_factory=time.perf_counter)


class Writer:
    """The queue, its flushers and the results.

    Use as an async context manager: leaving it drains the queue, for `drain_timeout` at most.
    """

    def __init__(self, flush: Flush, settings: Settings, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._flush = flush
        self._settings = settings
        self._queue: deque[_Pending] = deque()
        self._rows = 0  # waiting or being written
        self._bytes = 0
        self._rows_per_second = 0.0
        self._arrived = asyncio.Event()
        self._stopping = False
        self._flushers: list[asyncio.Task[None]] = []
        metrics.WRITER_QUEUE_LIMIT.set(settings.writer_queue_rows)

    async def __aenter__(self) -> Self:
        self._flushers = [
            asyncio.create_task(self._run(), name=f"flusher-{i}") for i in range(self._settings.writer_flushes)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_accepting()
        _, late = await asyncio.wait(self._flushers, timeout=self._settings.drain_timeout.total_seconds())
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if self._queue:
            log.error("quotes not drained in time", requests=len(self._queue), rows=self._rows)
        while self._queue:
            self._settle(self._queue.popleft(), ServiceStopping("The service stopped before these quotes were stored."))

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken."""
        return not self._stopping

    def stop_accepting(self) -> None:
        """Refuse new requests; those accepted are still written."""
        self._stopping = True
        self._arrived.set()

    async def submit(self, write: Write) -> Receipt:
        """Queue a request and wait until it is committed.

        Raises:
            Overloaded: the queue is full; nothing was stored.
            ServiceStopping: the service is draining; nothing was stored.
            QuotesError: why these quotes were not stored, as `QuoteRepository.write` says.
        """
        if self._stopping:
            raise ServiceStopping("The service is stopping and takes no more quotes.")
        rows, nbytes = len(write.batch), write.batch.nbytes
        settings = self._settings
        # A request larger than the whole queue is taken when the queue is empty, or it would never be.
        if self._rows and (
            self._rows + rows > settings.writer_queue_rows or self._bytes + nbytes > settings.writer_queue_bytes
        ):
            raise Overloaded(
                f"{self._rows} quotes are waiting to be written; try again later.", retry_after=self._retry_after()
            )
        pending = _Pending(write, rows, nbytes, traces.request_context(), asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._account(rows, nbytes)
        self._arrived.set()
        return await pending.result

    def _retry_after(self) -> float:
        """When the queue will have drained, at the rate of late."""
        if not self._rows_per_second:
            return 1.0
        return min(max(self._rows / self._rows_per_second, 1.0), _LONGEST_RETRY)

    def _account(self, rows: int, nbytes: int) -> None:
        self._rows += rows
        self._bytes += nbytes
        metrics.WRITER_QUEUE_ROWS.set(self._rows)

    def _settle(self, pending: _Pending, result: Receipt | BaseException) -> None:
        self._account(-pending.rows, -pending.nbytes)
        if pending.result.done():  # the client has gone
            return
        if isinstance(result, BaseException):
            pending.result.set_exception(result)
        else:
            pending.result.set_result(result)

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._stopping:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                # One turn of the loop: requests that became ready together share the transaction.
                await asyncio.sleep(0)
                continue
            await self._commit(self._gather())

    def _gather(self) -> list[_Pending]:
        gathered = [self._queue.popleft()]
        rows = gathered[0].rows
        while self._queue and rows + self._queue[0].rows <= self._settings.writer_flush_rows:
            gathered.append(self._queue.popleft())
            rows += gathered[-1].rows
        return gathered

    async def _commit(self, gathered: list[_Pending]) -> None:
        began = time.perf_counter()
        rows = sum(pending.rows for pending in gathered)
        for pending in gathered:
            metrics.WRITER_WAIT_SECONDS.observe(began - pending.since)
        results: Sequence[Receipt | BaseException]
        try:
            with traces.flush(self._tracer, [pending.context for pending in gathered], rows):
                results = await self._flush([pending.write for pending in gathered])
        except asyncio.CancelledError:
            stopped = ServiceStopping("The service stopped while these quotes were being stored.")
            for pending in gathered:
                self._settle(pending, stopped)
            raise
        except QuotesError as error:
            results = [error] * len(gathered)
        except Exception as error:
            if len(gathered) > 1:
                # Some request is poison: alone, it harms nobody else.
                log.warning("flush failed, going on one by one", requests=len(gathered), error=type(error).__name__)
                for pending in gathered:
                    await self._commit([pending])
                return
            log.exception("flush failed")
            results = [error]
        elapsed = time.perf_counter() - began
        metrics.WRITER_FLUSH_ROWS.observe(rows)
        metrics.WRITER_FLUSH_SECONDS.observe(elapsed)
        self._rows_per_second = (
            0.8 * self._rows_per_second + 0.2 * rows / elapsed if self._rows_per_second else (rows / elapsed)
        )
        for pending, result in zip(gathered, results, strict=True):
            self._settle(pending, result)
