"""Group commit: many requests, few transactions, one receipt each.

Requests wait in a queue bounded by rows and bytes, and whatever has gathered there when a transaction begins shares
it. A few requests wait for the transaction in flight to end; many, or those that have waited for long, get one beside
it. Invariant: every accepted request gets exactly one result, a receipt that says it is committed or an error, also
when its client has gone, the database fails or the service stops.
"""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import structlog
from opentelemetry.trace import SpanContext, Tracer

from app import metrics, traces
from app.errors import IdempotencyKeyInUse, Overloaded, QuotesError, ServiceStopping
from app.quote.terms import Receipt
from app.repository.ingest import Write
from app.settings import Settings

log = structlog.get_logger(__name__)

Flush = Callable[[Sequence[Write]], Awaitable[list[Receipt | QuotesError]]]
_LONGEST_RETRY: Final = 30.0
#: Fewer quotes than this are not worth a transaction beside one in flight. Of 8 clients that post a thousand each, half
#: then waits while the other half is written: 219,000 quotes/s, where 2,000 gave 180,000 and 8,000 145,000.
_WORTH_ROWS: Final = 4_000
#: Nor are fewer requests: 64 clients that post single quotes get 4,700 receipts a second; 4,200 if they all waited.
_WORTH_REQUESTS: Final = 24
#: ... but they do not wait for one that hangs.
_PATIENCE: Final = 0.05


@dataclass(slots=True)
class _Pending:
    write: Write
    rows: int
    nbytes: int
    context: SpanContext
    result: "asyncio.Future[Receipt]"
    since: float = field(default_factory=time.perf_counter)


class Room:
    """Bytes of a body that is being read; they count as waiting until it is given back."""

    __slots__ = ("_bytes", "_writer")

    def __init__(self, writer: "Writer") -> None:
        self._writer = writer
        self._bytes = 0

    def grow(self, nbytes: int) -> None:
        """Take room for more bytes.

        Raises:
            Overloaded: there is none.
        """
        self._writer._take(nbytes, alone=self._bytes)  # noqa: SLF001  the other half of this class
        self._bytes += nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer._bytes -= self._bytes  # noqa: SLF001


class Writer:
    """The queue, the transactions in flight and the results.

    Use as an async context manager: leaving it drains the queue, for `drain_timeout` at most.
    """

    def __init__(self, flush: Flush, settings: Settings, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._flush = flush
        self._settings = settings
        self._queue: deque[_Pending] = deque()
        self._rows = 0  # waiting or being written
        self._bytes = 0  # these, and bodies that are being read
        self._waiting_rows = 0
        self._keys: set[str] = set()  # idempotency keys that wait or are being written
        self._rows_per_second = 0.0
        self._due: asyncio.Handle | None = None
        self._stopping = False
        self._flushes: set[asyncio.Task[None]] = set()
        metrics.WRITER_QUEUE_LIMIT.set(settings.writer_queue_rows)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_accepting()
        try:
            async with asyncio.timeout(self._settings.drain_timeout.total_seconds()):
                while self._queue or self._flushes:
                    self._begin()
                    await asyncio.wait(self._flushes, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            log.error("quotes not drained in time", requests=len(self._queue), rows=self._rows)  # noqa: TRY400  expected
        if self._due is not None:
            self._due.cancel()
        while self._queue:
            self._settle(self._queue.popleft(), ServiceStopping("The service stopped before these quotes were stored."))
        for task in self._flushes:
            task.cancel()
        await asyncio.gather(*self._flushes, return_exceptions=True)

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken."""
        return not self._stopping

    def stop_accepting(self) -> None:
        """Refuse new requests; those accepted are still written."""
        self._stopping = True

    async def submit(self, write: Write) -> Receipt:
        """Queue a request and wait until it is committed.

        Raises:
            Overloaded: the queue is full; nothing was stored.
            IdempotencyKeyInUse: a request with its key waits or is being written.
            ServiceStopping: the service is draining; nothing was stored.
            QuotesError: why these quotes were not stored, as `QuoteRepository.write` says.
        """
        if self._stopping:
            raise ServiceStopping("The service is stopping and takes no more quotes.")
        key = None if write.idempotency is None else write.idempotency.key
        if key in self._keys:
            raise IdempotencyKeyInUse
        rows, nbytes = len(write.batch), write.batch.nbytes
        settings = self._settings
        # A request larger than the whole queue is taken when the queue is empty, or it would never be.
        if self._rows and self._rows + rows > settings.writer_queue_rows:
            raise self._overloaded()
        self._take(nbytes)
        pending = _Pending(write, rows, nbytes, traces.request_context(), asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._waiting_rows += rows
        if key is not None:
            self._keys.add(key)
        self._account(rows)
        if len(self._flushes) < settings.writer_flushes and (self._due is None or self._worth()):
            # One turn of the loop: requests that became ready together share the transaction, of none of which its
            # context is.
            self._due = asyncio.get_running_loop().call_soon(self._begin, context=contextvars.Context())
        return await pending.result

    def room(self) -> Room:
        """Room for a body, to be taken as it arrives."""
        return Room(self)

    def _take(self, nbytes: int, *, alone: int = 0) -> None:
        """Count bytes as waiting; `alone` of those that do already are of the same request."""
        if self._bytes > alone and self._bytes + nbytes > self._settings.writer_queue_bytes:
            raise self._overloaded()
        self._bytes += nbytes

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{self._rows} quotes are waiting to be written; try again later.", retry_after=self._retry_after()
        )

    def _retry_after(self) -> float:
        """When the queue will have drained, at the rate of late."""
        if not self._rows_per_second:
            return 1.0
        return min(max(self._rows / self._rows_per_second, 1.0), _LONGEST_RETRY)

    def _account(self, rows: int) -> None:
        self._rows += rows
        metrics.WRITER_QUEUE_ROWS.set(self._rows)

    def _settle(self, pending: _Pending, result: Receipt | BaseException) -> None:
        self._bytes -= pending.nbytes
        self._account(-pending.rows)
        if pending.write.idempotency is not None:
            self._keys.discard(pending.write.idempotency.key)
        if pending.result.done():  # the client has gone
            return
        if isinstance(result, BaseException):
            pending.result.set_exception(result)
        else:
            pending.result.set_result(result)

    def _worth(self) -> bool:
        return self._waiting_rows >= _WORTH_ROWS or len(self._queue) >= _WORTH_REQUESTS

    def _begin(self) -> None:
        """Begin transactions while requests wait that are worth one."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        while self._queue and len(self._flushes) < self._settings.writer_flushes:
            if self._flushes and not self._worth():
                patience = self._queue[0].since + _PATIENCE - time.perf_counter()
                if patience > 0:
                    self._due = asyncio.get_running_loop().call_later(patience, self._begin)
                    return
            task = asyncio.create_task(self._commit(self._gather()), name="flush")
            self._flushes.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._flushes.discard(task)
        self._begin()

    def _gather(self) -> list[_Pending]:
        gathered = [self._queue.popleft()]
        rows = gathered[0].rows
        while (
            self._queue
            and not (gathered[0].write.dry_run or self._queue[0].write.dry_run)
            and rows + self._queue[0].rows <= self._settings.writer_flush_rows
        ):
            gathered.append(self._queue.popleft())
            rows += gathered[-1].rows
        self._waiting_rows -= rows
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
