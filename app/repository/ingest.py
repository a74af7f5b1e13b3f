"""Every statement that changes quotes, and the transactions they run in.

Invariant: what `write` returned a receipt for is committed, and `quotes.latest` agrees with `quotes.real_time` in
every snapshot, because both change in one transaction: a write brings it up to the rows that it wrote and so holds, a
deletion to what it left. A row that a write leaves as it is may change or go before its commit, and counts for nothing
there. Rows are written and locked by key, so that concurrent writers queue up instead of deadlocking.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final, Literal, TypeVar

import asyncpg
import pyarrow as pa
from pgpq import ArrowToPostgresBinaryEncoder

from app.clock import nanoseconds, parts, rfc3339
from app.db.capability import Level
from app.db.engine import Connection, Database
from app.db.facts import FACTS, Facts
from app.db.transactions import Transactions
from app.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidRequest,
    QuotesError,
    Rejection,
    SettingsChanged,
)
from app.quote.batch import Batch, Ends, ends, joined, widest
from app.quote.fields import COLUMNS, KEY, NANOS, VALUES
from app.quote.terms import OnConflict, OnError, Receipt, check_choice
from app.repository.receipts import IdempotencyKey, Receipts
from app.settings import Settings

_Result = TypeVar("_Result")

#: A quote at the edge when it was checked may lie behind it when it is written.
_SETTLING: Final = timedelta(minutes=10)
#: Times that a deletion is tried from under which chunks are dropped.
_TRIES: Final = 3
#: Wait for a lock of whoever does not say, in seconds.
_LOCK_TIMEOUT: Final = 5.0
#: Symbols whose newest quote is written in one statement; to make its arguments takes 10 us each, in which the event
#: loop stands.
_HELD_AT_ONCE: Final = 1000
#: Quotes whose symbols are found on the event loop, in 1.3 us each.
_FEW: Final = 10_000
_COLUMNS: Final = ", ".join(COLUMNS.names)
_KEY: Final = ", ".join(KEY)
_PLACE: Final = f"timestamp, {NANOS}"

#: Rows on their way to be merged, with the place of their request in the flush and their own in the request. It is
#: made once a session; a pooler may hand on a session of another version, so that its name changes with its columns.
_STAGE_NAME: Final = f"staged_{zlib.crc32(','.join(COLUMNS.names).encode()):08x}"
_STAGE: Final = f"""
SET LOCAL client_min_messages = warning;
CREATE TEMPORARY TABLE IF NOT EXISTS {_STAGE_NAME} (
    LIKE quotes.real_time, position int NOT NULL, request int NOT NULL) ON COMMIT DELETE ROWS;
CREATE INDEX IF NOT EXISTS {_STAGE_NAME}_request ON pg_temp.{_STAGE_NAME} (request)
"""
_STAGED: Final = pa.schema([*COLUMNS, ("position", pa.int32()), ("request", pa.int32())])
_FROM_STAGE: Final = f"""
INSERT INTO quotes.real_time AS stored ({_COLUMNS})
SELECT {_COLUMNS} FROM pg_temp.{_STAGE_NAME} WHERE request = $1
ON CONFLICT ({_KEY}) DO
"""


#: Nanoseconds since 1970.
_INSTANT: Final = f"(extract(epoch FROM timestamp) * 1000000000 + {NANOS})::bigint"


def _upsert(new: Callable[[str], str]) -> str:
    """Of each symbol rows added and changed, and their ends; a stored row takes the `new` value of each column."""
    return f"""
WITH written AS (
    {_FROM_STAGE} UPDATE SET {", ".join(f"{c} = {new(c)}" for c in VALUES)}
    WHERE ({", ".join(f"stored.{c}" for c in VALUES)}) IS DISTINCT FROM ({", ".join(new(c) for c in VALUES)})
    RETURNING symbol, {_INSTANT} AS instant, xmax = 0 AS inserted)
SELECT symbol, min(instant), max(instant), count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted)
FROM written GROUP BY symbol
"""


_UPSERT: Final[Mapping[OnConflict, str]] = MappingProxyType(
    {
        "update": _upsert(lambda column: f"excluded.{column}"),
        "merge": _upsert(lambda column: f"coalesce(excluded.{column}, stored.{column})"),
    }
)


# Rows that would change nothing are taken out before the upsert, which would first decompress what they are in: 220
# such rows of 220 symbols take 5 ms instead of 325, and leave the columnstore as it is. Read by time and symbol and
# joined in one go, as row by row each would decompress a thousand to be compared with one.
def _equal(new: Callable[[str], str]) -> str:
    return f"""
DELETE FROM pg_temp.{_STAGE_NAME} new USING quotes.real_time stored
WHERE new.request = $1 AND stored.symbol = ANY($2::text[]) AND stored.timestamp >= $3 AND stored.timestamp < $4
      AND {" AND ".join(f"stored.{c} = new.{c}" for c in KEY)}
      AND ({", ".join(f"stored.{c}" for c in VALUES)}) IS NOT DISTINCT FROM ({", ".join(new(c) for c in VALUES)})
"""


_EQUAL: Final[Mapping[OnConflict, str]] = MappingProxyType(
    {
        "update": _equal(lambda column: f"new.{column}"),
        "merge": _equal(lambda column: f"coalesce(new.{column}, stored.{column})"),
    }
)
#: Of each symbol the ends of the rows added, and the positions of those whose key is stored already.
_ADD: Final = f"""
WITH written AS ({_FROM_STAGE} NOTHING RETURNING {_KEY}, {_INSTANT} AS instant)
SELECT symbol, min(instant), max(instant), coalesce(array_agg(position) FILTER (WHERE instant IS NULL), '{{}}')
FROM pg_temp.{_STAGE_NAME} LEFT JOIN written USING ({_KEY}) WHERE request = $1 GROUP BY symbol
"""
_DELETE: Final = f"""
DELETE FROM quotes.real_time
WHERE symbol = $1 AND timestamp >= $2 AND timestamp <= $4 AND ({_PLACE}) >= ($2, $3) AND ({_PLACE}) < ($4, $5)
"""
_HELD: Final = f"""
SELECT first_timestamp, first_{NANOS}, timestamp, {NANOS} FROM quotes.latest WHERE symbol = $1 FOR UPDATE
"""

_MOVE: Final = f"""
UPDATE quotes.latest SET first_timestamp = $2, first_{NANOS} = $3,
    ({_PLACE}, {", ".join(VALUES)}) = (row.timestamp, row.{NANOS}, {", ".join(f"row.{c}" for c in VALUES)})
FROM quotes.real_time row
WHERE latest.symbol = $1 AND row.symbol = $1 AND row.timestamp = $4 AND row.{NANOS} = $5
"""


def _outermost(order: Literal["ASC", "DESC"]) -> str:
    return f"""
SELECT {_PLACE} FROM quotes.real_time
WHERE symbol = $1 AND timestamp >= $2 AND timestamp <= $4 AND ({_PLACE}) >= ($2, $3) AND ({_PLACE}) < ($4, $5)
ORDER BY timestamp {order}, {NANOS} {order} LIMIT 1
"""


_OLDEST: Final = _outermost("ASC")
_NEWEST: Final = _outermost("DESC")

# The stored row is read back rather than passed again: right under every conflict rule, as nobody else changes what
# this transaction wrote; and in symbol order, so that writers who touch the same symbols queue up instead of
# deadlocking.
_NEWER: Final = f"(excluded.timestamp, excluded.{NANOS}) >= (held.timestamp, held.{NANOS})"
_OLDER: Final = f"(excluded.first_timestamp, excluded.first_{NANOS}) < (held.first_timestamp, held.first_{NANOS})"


def _taken(columns: Iterable[str], where: str) -> str:
    return ", ".join(f"{c} = CASE WHEN {where} THEN excluded.{c} ELSE held.{c} END" for c in columns)


_LATEST: Final = f"""
INSERT INTO quotes.latest AS held (symbol, first_timestamp, first_{NANOS}, {_PLACE}, {", ".join(VALUES)})
SELECT row.symbol, ends.first, ends.first_nanos, row.timestamp, row.{NANOS}, {", ".join(f"row.{c}" for c in VALUES)}
FROM unnest($1::text[], $2::timestamptz[], $3::smallint[], $4::timestamptz[], $5::smallint[])
     AS ends (symbol, first, first_nanos, last, last_nanos)
JOIN quotes.real_time row
     ON row.symbol = ends.symbol AND row.timestamp = ends.last AND row.{NANOS} = ends.last_nanos
WHERE row.timestamp >= $6 AND row.timestamp <= $7
ORDER BY row.symbol
ON CONFLICT (symbol) DO UPDATE
SET {_taken(("first_timestamp", f"first_{NANOS}"), _OLDER)},
    {_taken(("timestamp", NANOS, *VALUES), _NEWER)}
WHERE {_NEWER} OR {_OLDER}
"""


@dataclass(slots=True)
class Write:
    """One request to write: a batch, and what to do with keys that are stored already.

    With an `idempotency` key it is stored once, however often it is sent; a `dry_run` is stored not at all.

    Raises:
        InvalidRequest: `on_conflict` or `on_error` is no word that is taken.
    """

    batch: Batch
    on_conflict: OnConflict = "update"
    on_error: OnError = "abort"
    idempotency: IdempotencyKey | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_choice(self.on_conflict, OnConflict, "on_conflict")
        check_choice(self.on_error, OnError, "on_error")


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a transaction is tried: its time and its wait for a lock in seconds.

    `late` quotes may lie in the columnstore, of which no more is touched than has to be.
    """

    within: float
    lock_timeout: float = _LOCK_TIMEOUT
    late: bool = True


class Ingest:
    """Writes over the pool of a `Database`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._transactions = Transactions(database, settings.commit_timeout)
        #: Whether the last transaction met keys that were stored already, of late quotes and of others.
        self._repeats = {True: False, False: False}
        self._whole = Attempt(settings.write_timeout.total_seconds())
        self._receipts = Receipts(settings.idempotency_expiry)

    async def write(self, writes: Sequence[Write], attempt: Attempt | None = None) -> list[Receipt | QuotesError]:
        """Store several requests in one transaction; the result of each, in order.

        A request that cannot be stored gets its error and harms no other one. The result of a key whose receipt
        is kept is `Replayed`. A dry run is stored, counted and rolled back, each by itself and before the others are
        stored.

        Raises:
            WriteTimeout, QuotesLocked, CommitsWaiting, DatabaseUnavailable: nothing of any request was stored.
            OutcomeUnknown: nobody knows whether they were stored, all or none.
        """
        attempt = attempt or self._whole
        # All before the others: where one raises, nothing was stored, as is said of all.
        tried = {place: await self._rehearse(write, attempt) for place, write in enumerate(writes) if write.dry_run}
        if tried:
            others = [write for write in writes if not write.dry_run]
            stored = iter(await self.write(others, attempt) if others else [])
            return [tried[place] if place in tried else next(stored) for place in range(len(writes))]

        async def store(connection: Connection) -> list[Receipt | QuotesError]:
            keys = [write.idempotency for write in writes]
            if not any(keys):
                return await self._store(connection, writes, late=attempt.late)
            answers = await self._receipts.claim(connection, keys)
            fresh = [i for i in range(len(writes)) if i not in answers]
            # What was locked after a savepoint is unlocked with it, so `_copy` goes back to one from after the claim.
            await connection.execute("SAVEPOINT fresh")
            stored = await self._store(connection, [writes[i] for i in fresh], late=attempt.late)
            answers.update(zip(fresh, stored, strict=True))
            kept = [(key, receipt) for i in fresh if (key := keys[i]) and isinstance(receipt := answers[i], Receipt)]
            await self._receipts.keep(connection, kept)
            return [answers[i] for i in range(len(writes))]

        return await self._transactions.run(store, within=attempt.within, lock_timeout=attempt.lock_timeout)

    async def _rehearse(self, write: Write, attempt: Attempt) -> Receipt | QuotesError:
        (result,), _ = await self._transactions.run(
            lambda connection: self._try(connection, [write], late=attempt.late),
            within=attempt.within, lock_timeout=attempt.lock_timeout, end="ROLLBACK",
        )  # fmt: skip
        return result

    async def replay(self, key: IdempotencyKey) -> Receipt | None:
        """The receipt that is kept under the key, or None if the key is free; changes nothing.

        Raises:
            IdempotencyKeyInUse: the request with the key is being written.
            IdempotencyKeyReused: the key belongs to another request.
            DatabaseUnavailable: no connection, or it broke.
        """
        answers = await self._run(lambda connection: self._receipts.claim(connection, [key]), end="ROLLBACK")
        answer = answers.get(0)
        if isinstance(answer, QuotesError):
            raise answer
        return answer

    async def _run(
        self, work: Callable[[Connection], Awaitable[_Result]], end: Literal["COMMIT", "ROLLBACK"] = "COMMIT"
    ) -> _Result:
        whole = self._whole
        return await self._transactions.run(work, within=whole.within, lock_timeout=whole.lock_timeout, end=end)

    async def _hold_facts(self, connection: Connection, writes: Sequence[Write]) -> None:
        """See that late quotes are still taken, by the settings of the store, and let nobody change those meanwhile.

        Raises:
            SettingsChanged: they are not; sent again, they are refused row by row.
            SchemaMismatch: the store has no settings.
        """
        facts = self._database.facts = Facts.of(await connection.fetchrow(f"{FACTS} FOR SHARE"))
        oldest = facts.oldest(datetime.now(UTC) - _SETTLING)
        found = [moment for write in writes if (moment := write.batch.oldest) is not None]
        if oldest is not None and found and min(found) < oldest:
            raise SettingsChanged
        await connection.execute("SAVEPOINT fresh")  # what is locked after a savepoint is unlocked with it

    async def _store(
        self, connection: Connection, writes: Sequence[Write], *, late: bool
    ) -> list[Receipt | QuotesError]:
        if not writes:
            return []
        results, written = await self._try(connection, writes, late=late)
        if written is None:
            batches = [write.batch for write in writes]
            many = sum(map(len, batches)) > _FEW
            written = await asyncio.to_thread(ends, batches) if many else ends(batches)
        await self._update_latest(connection, written)
        return results

    async def _try(
        self, connection: Connection, writes: Sequence[Write], *, late: bool
    ) -> tuple[list[Receipt | QuotesError], dict[str, Ends] | None]:
        """Write the rows, and the ends of those written, None if all were; `quotes.latest` does not know them yet."""
        if late:
            await self._hold_facts(connection, writes)
        if not self._repeats[late] and await self._copy(connection, joined([write.batch for write in writes])):
            return [write.batch.receipt(inserted=len(write.batch)) for write in writes], None
        return await self._merge(connection, writes, late=late)

    async def _copy(self, connection: Connection, rows: pa.RecordBatch) -> bool:
        """All rows at once, for the usual case that all are new; False if some key is stored or repeated."""
        try:
            await connection.copy_to_table(
                "real_time", schema_name="quotes", columns=COLUMNS.names, format="binary", source=_encode(rows)
            )
        except asyncpg.UniqueViolationError:
            await connection.execute("ROLLBACK TO SAVEPOINT fresh")
            return False
        return True

    async def _merge(
        self, connection: Connection, writes: Sequence[Write], *, late: bool
    ) -> tuple[list[Receipt | QuotesError], dict[str, Ends]]:
        """All requests against what is stored, one after the other; and the ends of the rows written."""
        await connection.execute(_STAGE)
        staged = [
            write.batch.columns.rename_columns(_STAGED.names[:-1]).append_column(
                "request", pa.repeat(pa.scalar(place, pa.int32()), len(write.batch))
            )
            for place, write in enumerate(writes)
        ]
        await connection.copy_to_table(
            _STAGE_NAME, schema_name="pg_temp", columns=_STAGED.names, format="binary",
            source=_encode(pa.concat_batches(staged)),
        )  # fmt: skip
        with_care = late and self._database.capability.level >= Level.COMMUNITY
        results: list[Receipt | QuotesError] = []
        written: list[tuple[str, int, int]] = []
        for place, write in enumerate(writes):
            if with_care and (statement := _EQUAL.get(write.on_conflict)) is not None:
                await self._leave_equal(connection, statement, write.batch, place)
            result, of_request = await self._merge_one(connection, write, place)
            results.append(result)
            written += of_request
        # Who sends a batch again sends the next one again too, and a COPY that fails is work for nothing.
        self._repeats[late] = any(
            not isinstance(r, Receipt) or r.inserted < len(w.batch) for r, w in zip(results, writes, strict=True)
        )
        return results, widest(written)

    async def _leave_equal(self, connection: Connection, statement: str, batch: Batch, place: int) -> None:
        """Take the rows of a request off the stage that are stored as they are."""
        # The stage has no statistics; without any the planner would look up row by row.
        await connection.execute("SET LOCAL enable_nestloop = off")
        symbols = [symbol for symbol, _, _ in batch.ends()]
        for start, end in batch.days():
            await connection.execute(statement, place, symbols, start, end)
        await connection.execute("SET LOCAL enable_nestloop = on")

    async def _merge_one(
        self, connection: Connection, write: Write, place: int
    ) -> tuple[Receipt | QuotesError, list[tuple[str, int, int]]]:
        batch = write.batch
        if (statement := _UPSERT.get(write.on_conflict)) is not None:
            rows = await connection.fetch(statement, place)
            inserted, updated = sum(row[3] for row in rows), sum(row[4] for row in rows)
            receipt = batch.receipt(inserted=inserted, updated=updated, unchanged=len(batch) - inserted - updated)
            return receipt, [row[:3] for row in rows]
        if write.on_conflict == "error":
            await connection.execute("SAVEPOINT request")
        rows = await connection.fetch(_ADD, place)
        written = [row[:3] for row in rows if row[1] is not None]
        kept = sorted(position for row in rows for position in row[3])
        inserted = len(batch) - len(kept)
        if write.on_conflict == "ignore" or not kept:
            return batch.receipt(inserted=inserted, unchanged=len(kept)), written
        rejections = [
            Rejection(i, f"{batch.pointer}/{i}/timestamp", "already-stored", "A quote with this key is stored already.")
            for i in kept
        ]
        if write.on_error == "skip":
            return batch.receipt(inserted=inserted, conflicts=rejections), written
        await connection.execute("ROLLBACK TO SAVEPOINT request")
        return Conflict(rejections, batch.received), []

    async def delete(self, symbol: str, start: int, stop: int) -> int:
        """Delete a symbol's quotes in [`start`, `stop`), nanoseconds since 1970; how many they were.

        Raises:
            InvalidRequest: retention has dropped all of the range, and only bars are left of it, which stay.
            WriteTimeout: it ran over `write_timeout`; nothing was deleted.
            QuotesLocked: somebody holds a lock on a chunk; nothing was deleted.
            DatabaseUnavailable: nothing was deleted; as `SchemaMismatch` the store has no settings.
            OutcomeUnknown: nobody knows whether they were deleted, all or none.
        """

        async def delete(connection: Connection) -> int:
            done: str = await connection.execute(_DELETE, symbol, *parts(start), *parts(stop))
            deleted = int(done.removeprefix("DELETE "))
            # Asked when the chunks of the range are locked, or gone: another process may have changed retention, and
            # what it drops it notes in the same transaction.
            facts = self._database.facts = Facts.of(await connection.fetchrow(FACTS))
            dropped = facts.dropped_before
            if not deleted and dropped is not None and stop <= nanoseconds(dropped):
                raise InvalidRequest(
                    f"Retention has dropped the quotes before {rfc3339(dropped)}; what is left of them are bars, which"
                    " stay.",
                    parameter="end",
                )
            await self._mend_latest(connection, symbol, start, stop)
            return deleted

        for _ in range(_TRIES - 1):
            try:
                return await self._run(delete)
            except DatabaseUnavailable as error:
                # A chunk that retention dropped between the plan of the statement and its locks.
                if not isinstance(error.__cause__, asyncpg.UndefinedTableError):
                    raise
        return await self._run(delete)

    async def _mend_latest(self, connection: Connection, symbol: str, start: int, stop: int) -> None:
        """Bring a symbol's row of `quotes.latest` in line after a part of its quotes was deleted."""
        # Writers lock the row after their quotes, as this does: neither waits for the other in a circle. Who had it
        # before has committed, perhaps quotes of the range that the DELETE did not see; who comes after mends it again.
        held = await connection.fetchrow(_HELD, symbol)
        if held is None:
            return
        first, last = nanoseconds(held[0]) + held[1], nanoseconds(held[2]) + held[3]
        first_gone, last_gone = start <= first < stop, start <= last < stop
        if not (first_gone or last_gone):
            return
        left = await self._ends_of(connection, symbol, max(start, first), min(stop, last + 1))
        newest: int | None = last
        if last_gone:
            newest = left[1] if left else await self._newest_before(connection, symbol, start, first)
        if first_gone and newest is not None:
            first = left[0] if left else await self._oldest_from(connection, symbol, stop, newest)
        if newest is None:
            await connection.execute("DELETE FROM quotes.latest WHERE symbol = $1", symbol)
            return
        # In its place: who waits for a row that is deleted and added again finds none, and would mend nothing.
        await connection.execute(_MOVE, symbol, *parts(first), *parts(newest))

    async def _ends_of(self, connection: Connection, symbol: str, start: int, stop: int) -> Ends | None:
        """The instants of a symbol's oldest and newest quote in [`start`, `stop`)."""
        oldest = await self._instant(connection, _OLDEST, symbol, start, stop)
        if oldest is None:  # found at the price of a look at each row just deleted, which is enough once
            return None
        newest = await self._instant(connection, _NEWEST, symbol, start, stop)
        return None if newest is None else (oldest, newest)

    async def _instant(self, connection: Connection, statement: str, symbol: str, start: int, stop: int) -> int | None:
        """The instant of the outermost quote that a statement finds in [`start`, `stop`)."""
        row = await connection.fetchrow(statement, symbol, *parts(start), *parts(stop))
        return None if row is None else nanoseconds(row[0]) + int(row[1])

    # Both search away from the deleted range in steps that double, so that a symbol quoted daily costs the locks of a
    # few chunks and not of two years.

    async def _newest_before(self, connection: Connection, symbol: str, end: int, first: int) -> int | None:
        """The instant of a symbol's newest quote in [`first`, `end`)."""
        step = self._database.facts.chunk_interval // timedelta(microseconds=1) * 1000
        while end > first:
            start = max(end - step, first)
            if (found := await self._instant(connection, _NEWEST, symbol, start, end)) is not None:
                return found
            end, step = start, 2 * step
        return None

    async def _oldest_from(self, connection: Connection, symbol: str, start: int, last: int) -> int:
        """The instant of a symbol's oldest quote from `start` on, whose newest is at `last`."""
        step = self._database.facts.chunk_interval // timedelta(microseconds=1) * 1000
        while start < last:
            end = min(start + step, last)
            if (found := await self._instant(connection, _OLDEST, symbol, start, end)) is not None:
                return found
            start, step = end, 2 * step
        return last

    async def _update_latest(self, connection: Connection, found: Mapping[str, Ends]) -> None:
        """Bring `quotes.latest` up to rows that were just written, of which these are the ends."""
        every = sorted(found)
        for start in range(0, len(every), _HELD_AT_ONCE):
            symbols = every[start : start + _HELD_AT_ONCE]
            first_moments, first_nanos = zip(*(parts(found[symbol][0]) for symbol in symbols), strict=True)
            moments, nanos = zip(*(parts(found[symbol][1]) for symbol in symbols), strict=True)
            await connection.execute(
                _LATEST, symbols, first_moments, first_nanos, moments, nanos, min(moments), max(moments)
            )


async def _encode(rows: pa.RecordBatch) -> AsyncIterator[bytes]:
    """PostgreSQL's binary COPY format of the rows."""
    encoder = ArrowToPostgresBinaryEncoder(rows.schema)
    yield encoder.write_header()
    yield encoder.write_batch(rows)
    yield encoder.finish()
