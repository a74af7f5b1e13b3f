"""Group commit: many requests, few transactions, one receipt each.

Requests wait in a queue bounded by rows and bytes, and whatever has gathered there when a transaction begins shares
it. A few requests wait for the transaction in flight to end; many, or those that have waited for long, get one beside
it. Late quotes go another lane than those of now, with transactions of their own: a lock on an old chunk, or work in
the columnstore, is never waited for by what arrives now.

Invariant: every accepted request gets exactly one result within its time, a receipt that says it is committed or an
error, also when its client has gone, the database fails or the service stops. Requests that are refused together are
tried one by one, so that none is refused for what another one holds.
"""

import asyncio
import contextvars
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Final, Self

from opentelemetry.trace import SpanContext, Tracer

from app import metrics, traces
from app.errors import (
    DatabaseMisconfigured,
    DatabaseUnavailable,
    IdempotencyKeyInUse,
    OutcomeUnknown,
    Overloaded,
    QuotesError,
    ServiceStopping,
)
from app.logs import Logger
from app.quote.terms import Receipt
from app.repository.ingest import Attempt, Write
from app.settings import Settings

log = Logger(__name__)

Flush = Callable[[Sequence[Write], Attempt], Awaitable[list[Receipt | QuotesError]]]
_LONGEST_RETRY: Final = 30.0
#: Fewer quotes than this are not worth a transaction beside one in flight. Of 8 clients that post a thousand each, half
#: then waits while the other half is written: 219,000 quotes/s, where 2,000 gave 180,000 and 8,000 145,000.
_WORTH_ROWS: Final = 4_000
#: Nor are fewer requests: 64 clients that post single quotes get 4,700 receipts a second; 4,200 if they all waited.
_WORTH_REQUESTS: Final = 24
#: ... but they do not wait for one that hangs.
_PATIENCE: Final = 0.05
#: A request with a quote older than this is late.
_LATE: Final = timedelta(hours=1)
#: Late quotes that share a transaction. Each may be in another thousand of the columnstore that has to be decompressed,
#: at 1.7 us a row: 17 s at worst.
_LATE_ROWS: Final = 10_000
#: Waits for a lock, in seconds. What live quotes wait for is their own chunk, and all of them would be refused; late
#: ones keep others waiting; who is tried again has waited.
_LOCK_LIVE: Final = 5.0
_LOCK_LATE: Final = 1.0
_LOCK_AGAIN: Final = 0.1


@dataclass(slots=True)
class _Pending:
    write: Write
    rows: int
    nbytes: int
    context: SpanContext
    result: "asyncio.Future[Receipt]"
    since: float = field(default_factory=time.perf_counter)


class _Lane:
    """Requests that may share transactions, `flushes` of them at once with `flush_rows` quotes each.

    They wait for up to `rows` quotes and `nbytes` bytes.
    """

    def __init__(self, *, late: bool, flushes: int, flush_rows: int, rows: int, nbytes: int) -> None:
        self.late = late
        self.most_flushes = flushes
        self.flush_rows = flush_rows
        self.most_rows = rows
        self.most_bytes = nbytes
        self.queue: deque[_Pending] = deque()
        self.rows = 0  # waiting or being written
        self.bytes = 0
        self.waiting_rows = 0
        self.rows_per_second = 0.0
        self.due: asyncio.Handle | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self.flushes: set[asyncio.Task[None]] = set()

    @property
    def lock_timeout(self) -> float:
        """Longest wait of a shared transaction for a lock in seconds."""
        return _LOCK_LATE if self.late else _LOCK_LIVE

    @property
    def free(self) -> bool:
        """Whether another transaction may begin."""
        return len(self.flushes) < self.most_flushes

    @property
    def worth(self) -> bool:
        """Whether what waits is worth a transaction beside one in flight."""
        return self.waiting_rows >= _WORTH_ROWS or len(self.queue) >= _WORTH_REQUESTS

    def gather(self) -> list[_Pending]:
        """Take the requests of the next transaction."""
        gathered = [self.queue.popleft()]
        rows = gathered[0].rows
        while (
            self.queue
            and not (gathered[0].write.dry_run or self.queue[0].write.dry_run)
            and rows + self.queue[0].rows <= self.flush_rows
        ):
            gathered.append(self.queue.popleft())
            rows += gathered[-1].rows
        self.waiting_rows -= rows
        return gathered

    def retry_after(self) -> float:
        """When the queue will have drained, at the rate of late."""
        if not self.rows_per_second:
            return 1.0
        return min(max(self.rows / self.rows_per_second, 1.0), _LONGEST_RETRY)

    def note(self, rows: int, seconds: float) -> None:
        """Take a transaction into the rate."""
        rate = rows / seconds
        self.rows_per_second = 0.8 * self.rows_per_second + 0.2 * rate if self.rows_per_second else rate

    def quiet(self) -> None:
        """Begin nothing by itself any more."""
        for handle in (self.due, self.expiry):
            if handle is not None:
                handle.cancel()


class Writer:
    """The lanes, the transactions in flight and the results.

    Use as an async context manager: leaving it drains the lanes, for `drain_timeout` at most since `stop_accepting`.
    """

    def __init__(self, flush: Flush, settings: Settings, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._flush = flush
        self._settings = settings
        self._within = settings.write_timeout.total_seconds()
        rows, nbytes = settings.writer_queue_rows, settings.writer_queue_bytes
        flushes, flush_rows = settings.writer_flushes, settings.writer_flush_rows
        self._live = _Lane(late=False, flushes=flushes, flush_rows=flush_rows, rows=rows, nbytes=nbytes)
        # Half of the room: late quotes that are blocked leave the other half to those of now.
        self._late = _Lane(
            late=True, flushes=flushes, flush_rows=min(_LATE_ROWS, flush_rows), rows=rows // 2, nbytes=nbytes // 2
        )
        self._rows = 0  # waiting or being written
        self._bytes = 0  # these, and bodies that are being read
        self._keys: set[str] = set()  # idempotency keys that wait or are being written
        #: Until when bodies may arrive, on the loop's clock.
        self.bodies_until = math.inf
        self._stopping = False
        self._closed = False
        self._ending: list[asyncio.TimerHandle] = []
        metrics.WRITER_QUEUE_LIMIT.set(settings.writer_queue_rows)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_accepting()
        self._closed = True
        for lane in self._lanes:
            self._begin(lane)
        while flushes := self._live.flushes | self._late.flushes:
            await asyncio.wait(flushes, return_when=asyncio.FIRST_COMPLETED)
        for handle in self._ending:
            handle.cancel()
        for lane in self._lanes:
            lane.quiet()

    @property
    def _lanes(self) -> tuple[_Lane, _Lane]:
        return self._live, self._late

    @property
    def accepting(self) -> bool:
        """Whether new requests should come here."""
        return not self._stopping

    def stop_accepting(self) -> None:
        """Begin to stop: requests are taken for half of `drain_timeout`, and all have their answer at its end."""
        if self._stopping:
            return
        self._stopping = True
        loop = asyncio.get_running_loop()
        now, drain = loop.time(), self._settings.drain_timeout.total_seconds()
        self.bodies_until = now + drain / 2
        self._ending = [loop.call_at(now + drain / 2, self._close), loop.call_at(now + drain, self._give_up)]

    def _close(self) -> None:
        """Take no more requests."""
        self._closed = True

    def _give_up(self) -> None:
        """Answer whatever has not been written."""
        waiting = [pending for lane in self._lanes for pending in lane.queue]
        if waiting or self._rows:
            log.error("quotes not drained in time", requests=len(waiting), rows=self._rows)
        for lane in self._lanes:
            lane.waiting_rows = 0
            while lane.queue:
                stopped = ServiceStopping("The service stopped before these quotes were stored.")
                self._settle(lane, lane.queue.popleft(), stopped)
            for task in lane.flushes:
                task.cancel()

    async def submit(self, write: Write) -> Receipt:
        """Queue a request and wait until it is committed.

        Raises:
            Overloaded: the queue is full, or did not move; nothing was stored.
            IdempotencyKeyInUse: a request with its key waits or is being written.
            ServiceStopping: the service is draining; nothing was stored.
            QuotesError: why these quotes were not stored, as `QuoteRepository.write` says.
        """
        if self._closed:
            raise ServiceStopping("The service is stopping and takes no more quotes.")
        key = None if write.idempotency is None else write.idempotency.key
        if key in self._keys:
            raise IdempotencyKeyInUse
        rows, nbytes = len(write.batch), write.batch.nbytes
        oldest = write.batch.oldest
        lane = self._late if oldest is not None and oldest < datetime.now(UTC) - _LATE else self._live
        # A request larger than the whole queue is taken when the queue is empty, or it would never be.
        full = self._rows and self._rows + rows > self._settings.writer_queue_rows
        if full or (lane.rows and (lane.rows + rows > lane.most_rows or lane.bytes + nbytes > lane.most_bytes)):
            raise self._overloaded(lane)
        self.take(nbytes)
        loop = asyncio.get_running_loop()
        pending = _Pending(write, rows, nbytes, traces.request_context(), loop.create_future())
        lane.queue.append(pending)
        lane.waiting_rows += rows
        lane.bytes += nbytes
        if key is not None:
            self._keys.add(key)
        self._account(lane, rows)
        if lane.expiry is None:
            lane.expiry = loop.call_later(self._within / 2, self._expire, lane)
        if lane.free and (lane.due is None or lane.worth):
            # One turn of the loop: requests that became ready together share the transaction, of none of which its
            # context is.
            lane.due = loop.call_soon(self._begin, lane, context=contextvars.Context())
        try:
            return await pending.result
        except asyncio.CancelledError:  # the client has gone
            self._drop(lane, pending)
            raise

    def take(self, nbytes: int, *, alone: int = 0) -> None:
        """Take room for bytes that wait, in a body or in a batch; `alone` of those that do are of the same request.

        Raises:
            Overloaded: there is none.
        """
        if self._bytes > alone and self._bytes + nbytes > self._settings.writer_queue_bytes:
            raise self._overloaded(self._live)
        self._bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """Give back room that was taken."""
        self._bytes -= nbytes

    def retry_after(self) -> float:
        """When to come back, in seconds."""
        return self._live.retry_after()

    def _overloaded(self, lane: _Lane) -> Overloaded:
        which = "late quotes" if lane.late else "quotes"
        waiting = lane.rows if lane.late else self._rows
        return Overloaded(
            f"{waiting} {which} are waiting to be written; try again later.", retry_after=lane.retry_after()
        )

    def _account(self, lane: _Lane, rows: int) -> None:
        lane.rows += rows
        self._rows += rows
        metrics.WRITER_QUEUE_ROWS.set(self._rows)

    def _settle(self, lane: _Lane, pending: _Pending, result: Receipt | BaseException) -> None:
        self._bytes -= pending.nbytes
        lane.bytes -= pending.nbytes
        self._account(lane, -pending.rows)
        if pending.write.idempotency is not None:
            self._keys.discard(pending.write.idempotency.key)
        if pending.result.done():  # the client has gone
            return
        if isinstance(result, BaseException):
            pending.result.set_exception(result)
        else:
            pending.result.set_result(result)

    def _drop(self, lane: _Lane, pending: _Pending) -> None:
        """Take a request out of its lane, if nothing has been done for it yet."""
        try:
            lane.queue.remove(pending)
        except ValueError:
            return
        lane.waiting_rows -= pending.rows
        self._settle(lane, pending, asyncio.CancelledError())

    def _expire(self, lane: _Lane) -> None:
        """Refuse what has waited for half of `write_timeout`, and look again when the next one will have."""
        lane.expiry = None
        while lane.queue:
            left = lane.queue[0].since + self._within / 2 - time.perf_counter()
            if left > 0:
                lane.expiry = asyncio.get_running_loop().call_later(left, self._expire, lane)
                return
            pending = lane.queue.popleft()
            lane.waiting_rows -= pending.rows
            self._settle(lane, pending, self._overloaded(lane))

    def _begin(self, lane: _Lane) -> None:
        """Begin transactions while requests wait that are worth one."""
        if lane.due is not None:
            lane.due.cancel()
            lane.due = None
        while lane.queue and lane.free:
            if lane.flushes and not lane.worth and not self._stopping:
                patience = lane.queue[0].since + _PATIENCE - time.perf_counter()
                if patience > 0:
                    lane.due = asyncio.get_running_loop().call_later(patience, self._begin, lane)
                    return
            task = asyncio.create_task(self._commit(lane, lane.gather()), name="flush")
            lane.flushes.add(task)
            task.add_done_callback(partial(self._ended, lane))

    def _ended(self, lane: _Lane, task: "asyncio.Task[None]") -> None:
        lane.flushes.discard(task)
        self._begin(lane)

    async def _commit(self, lane: _Lane, gathered: Sequence[_Pending]) -> None:
        """Write requests in one transaction, and if that is refused one by one; give each its result."""
        began = time.perf_counter()
        for pending in gathered:
            metrics.WRITER_WAIT_SECONDS.observe(began - pending.since)
        waiting = deque(gathered)
        try:
            shared = len(gathered) > 1
            within = self._within / 2 if shared else self._within
            refused = await self._write(lane, gathered, Attempt(within, lane.lock_timeout, lane.late))
            if refused is None:
                waiting.clear()
            # Nobody knows whether these are stored, and only their own receipts would be right.
            elif not shared or isinstance(refused, OutcomeUnknown):
                self._refuse(lane, waiting, refused)
            else:
                log.warning("flush refused, going on one by one", requests=len(gathered), error=type(refused).__name__)
                # What is large, and may take all the time, comes last.
                waiting = deque(sorted(gathered, key=lambda pending: pending.rows))
                await self._one_by_one(lane, waiting, began + self._within, refused)
        except asyncio.CancelledError:
            self._refuse(lane, waiting, ServiceStopping("The service stopped before these quotes were stored."))
            raise

    async def _one_by_one(self, lane: _Lane, waiting: deque[_Pending], until: float, refused: BaseException) -> None:
        """Write requests that were refused together, each by itself, until an error says that none can be written."""
        while waiting and (left := until - time.perf_counter()) > 0:
            failure = await self._write(lane, [waiting[0]], Attempt(left, _LOCK_AGAIN, lane.late))
            pending = waiting.popleft()
            if failure is not None:
                self._settle(lane, pending, failure)
            if (task := asyncio.current_task()) and task.cancelling():
                raise asyncio.CancelledError
            if type(failure) is DatabaseUnavailable or isinstance(failure, DatabaseMisconfigured):
                refused = failure
                break
        self._refuse(lane, waiting, refused)

    def _refuse(self, lane: _Lane, waiting: deque[_Pending], error: BaseException) -> None:
        while waiting:
            self._settle(lane, waiting.popleft(), error)

    async def _write(self, lane: _Lane, gathered: Sequence[_Pending], attempt: Attempt) -> BaseException | None:
        """Try to write requests in one transaction; what refused them, or None if each has its result."""
        began = time.perf_counter()
        rows = sum(pending.rows for pending in gathered)
        try:
            with traces.flush(self._tracer, [pending.context for pending in gathered], rows):
                results = await self._flush([pending.write for pending in gathered], attempt)
        except QuotesError as error:
            return error
        except Exception as error:
            log.exception("flush failed")
            return error
        elapsed = time.perf_counter() - began
        metrics.WRITER_FLUSH_ROWS.observe(rows)
        metrics.WRITER_FLUSH_SECONDS.observe(elapsed)
        lane.note(rows, elapsed)
        for pending, result in zip(gathered, results, strict=True):
            self._settle(lane, pending, result)
        return None
