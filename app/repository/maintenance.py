"""Work on the store that policies do, or that an operator asks for: columnstore, refresh, retention, order, settings.

Invariant: bars outlive their quotes. A refresh never reaches below what retention has dropped, so it never rebuilds a
bar from quotes that are gone; what is dropped is materialised first. Every step is a
transaction of its own, small enough to wait for, and done again after an interruption finds the rest.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Self

import asyncpg

from app.db.capability import Capability, Level
from app.db.engine import Connection, Database, detect, read_facts
from app.db.facts import Facts
from app.errors import DatabaseRefused, DatabaseUnavailable, QuotesLocked
from app.repository import storage
from app.repository.storage import Chunk
from app.settings import DAY as _DAY
from app.settings import Settings

ROLLUPS: Final = (("ohlc_1m", timedelta(minutes=1)), ("ohlc_1h", timedelta(hours=1)), ("ohlc_1d", timedelta(days=1)))
UNLIMITED: Final = timedelta(days=130_000)  # back to the first day that can be stored
_STATEMENT: Final = timedelta(hours=6)  # one chunk, or one refresh of years
_LOCK_MS: Final = 2_000  # everything on the chunk queues behind a lock that is waited for
_TRIES: Final = 5
#: Whole buckets of one refresh, as many as a policy takes at once.
_BATCH: Final = {"ohlc_1m": 14_400, "ohlc_1h": 2_400, "ohlc_1d": 1_000}
#: A stretch without a chunk that is not worth parts of its own.
_GAP: Final = timedelta(days=366)
#: For how long jobs are put off at a time; they run again by themselves if this process dies.
_PUT_OFF: Final = timedelta(minutes=10)
#: Longest wait for a job that runs already.
_RUNNING_LIMIT: Final = timedelta(minutes=10)
#: What fails beside a refresh, and beside a drop, by hand.
_REFRESHES: Final = "policy_refresh_continuous_aggregate"
_RETENTIONS: Final = "apply_retention"
_OURS: Final = """
FROM timescaledb_information.jobs job
LEFT JOIN timescaledb_information.continuous_aggregates view
       ON view.materialization_hypertable_schema = job.hypertable_schema
      AND view.materialization_hypertable_name = job.hypertable_name
WHERE job.proc_name = $1 AND 'quotes' IN (job.hypertable_schema, view.view_schema, job.proc_schema) AND job.scheduled
"""
_POSTPONE: Final = f"SELECT job_id, alter_job(job_id, next_start => now() + $2) {_OURS}"
_RELEASE: Final = f"SELECT alter_job(job_id, next_start => now()) {_OURS} AND job_id = ANY($2::int[])"
_RUNNING: Final = """
SELECT EXISTS (SELECT FROM timescaledb_information.job_stats WHERE job_id = ANY($1::int[]) AND job_status = 'Running')
"""
_DELETE_ROWS: Final = 20_000
_EPOCH: Final = datetime(2000, 1, 3, tzinfo=UTC)
_RETENTION: Final = "retention"
_INTERVAL: Final = "chunk interval"
_COMPRESS: Final = "compress after"
_UPDATE: Final = "UPDATE quotes.settings SET retention = $1, chunk_interval = $2, compress_after = $3"
#: Quotes in a chunk, by what the columnstore noted and the planner knows of the rows.
_ESTIMATE: Final = """
SELECT (greatest(reltuples, 0) + coalesce((
    SELECT numrows_pre_compression FROM _timescaledb_catalog.compression_chunk_size
    WHERE chunk_id = _timescaledb_functions.chunk_id_from_relid(pg_class.oid)), 0))::bigint
FROM pg_class WHERE oid = $1::text::regclass
"""

_OLDEST: Final = "SELECT min(first_timestamp) FROM quotes.latest"
#: Server processes that use a table.
_USERS: Final = """
SELECT coalesce(array_agg(DISTINCT pid), '{}') FROM pg_locks
WHERE locktype = 'relation' AND relation = $1::text::regclass AND granted AND pid <> pg_backend_pid()
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_BEHIND: Final = "SELECT quotes.bars_behind($1, $2)"
_DELETE: Final = """
WITH old AS (SELECT timestamp, nanos FROM quotes.real_time
             WHERE symbol = $1 AND timestamp < $2 ORDER BY timestamp, nanos LIMIT $3)
DELETE FROM quotes.real_time stored USING old
WHERE stored.symbol = $1 AND stored.timestamp = old.timestamp AND stored.nanos = old.nanos
"""
_WITH_OLDER: Final = "SELECT symbol FROM quotes.latest WHERE first_timestamp < $1 ORDER BY symbol"
_CHUNK_INTERVAL: Final = """
SELECT time_interval FROM timescaledb_information.dimensions
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time'
"""
_POLICIES: Final = """
SELECT job.job_id, job.proc_name::text AS procedure, coalesce(view.view_name, job.hypertable_name)::text AS relation,
       (job.config ->> key)::interval AS value, key
FROM timescaledb_information.jobs job
LEFT JOIN timescaledb_information.continuous_aggregates view
       ON view.materialization_hypertable_schema = job.hypertable_schema
      AND view.materialization_hypertable_name = job.hypertable_name
JOIN (VALUES ('policy_compression', 'compress_after'),
             ('policy_refresh_continuous_aggregate', 'start_offset')) AS keys (procedure, key)
     ON keys.procedure = job.proc_name
WHERE job.hypertable_schema = 'quotes' OR view.view_schema = 'quotes'
"""


@dataclass(frozen=True, slots=True)
class Window:
    """A range of time, `end` exclusive."""

    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class Change:
    """What of the store differs from what is wanted; None: all quotes are kept, or there is no such policy."""

    what: str
    before: timedelta | None
    after: timedelta | None


@dataclass(frozen=True, slots=True)
class Loss:
    """What a retention takes at its next run: chunks, or on a plain table quotes; `rows` is the server's estimate."""

    chunks: list[Chunk]
    rows: int
    before: datetime


class MaintenanceRepository:
    """One connection for a piece of maintenance, and the server's level, which decides what can be done."""

    def __init__(self, connection: Connection, capability: Capability, facts: Facts) -> None:
        self._connection = connection
        self.capability = capability
        self.facts = facts

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database, settings: Settings) -> AsyncIterator[Self]:
        """On a connection of its own, whose statements may run for hours but wait for no lock.

        Raises:
            DatabaseUnavailable: it cannot be reached.
            DatabaseRefused: what was done in the block takes a privilege, or the owner.
            StartupError: the store is one of before the first release.
        """
        async with database.dedicated(statement_timeout=_STATEMENT) as connection:
            await connection.execute(f"SET lock_timeout = {_LOCK_MS}; SET application_name = 'opa-quotes maintain'")
            capability = await detect(connection)
            try:
                yield cls(connection, capability, await read_facts(connection, Facts.first(settings)))
            except asyncpg.InsufficientPrivilegeError as error:
                # The server names the table, and whether it wants a privilege or the owner.
                raise DatabaseRefused(f"The role of the URL may not do this: {str(error).splitlines()[0]}.") from error

    # --- what there is to do ---

    async def chunks(self) -> list[Chunk]:
        """The chunks of the raw quotes by time."""
        return await storage.chunks(self._connection, self.capability.level)

    async def due(self, now: datetime) -> list[Chunk]:
        """Chunks old enough for the columnstore."""
        return [chunk for chunk in await self.chunks() if chunk.end <= now - self.facts.compress_after]

    async def expired(self, now: datetime) -> list[Chunk]:
        """Chunks that are past their retention as a whole."""
        cutoff = self.facts.cutoff(now)
        return [] if cutoff is None else [chunk for chunk in await self.chunks() if chunk.end <= cutoff]

    async def loss(self, wanted: Facts, now: datetime) -> Loss | None:
        """What other settings would take that those of now do not; None if nothing."""
        cutoff = wanted.cutoff(now)
        if cutoff is None:
            return None
        if self.capability.level < Level.APACHE:
            rows = await self._expired_rows(cutoff)
            return Loss([], rows, cutoff) if rows else None
        chunks = [chunk for chunk in await self.chunks() if chunk.end <= cutoff]
        rows = sum([await self._rows(chunk) for chunk in chunks])
        return Loss(chunks, rows, cutoff) if chunks else None

    async def _rows(self, chunk: Chunk) -> int:
        try:
            if chunk.state == "rowstore" and chunk.rows is None and chunk.locked_by is None:  # nobody has looked yet
                counted: int = await self._connection.fetchval(f"SELECT count(*) FROM {chunk.name}")
                return counted
            estimated: int = await self._connection.fetchval(_ESTIMATE, chunk.name)
        except asyncpg.UndefinedTableError:
            return 0  # dropped since it was listed
        return estimated

    async def expired_rows(self, now: datetime) -> int:
        """Quotes of a plain table that are past their retention."""
        cutoff = self.facts.cutoff(now)
        return 0 if cutoff is None else await self._expired_rows(cutoff)

    async def _expired_rows(self, cutoff: datetime) -> int:
        count: int = await self._connection.fetchval(
            "SELECT count(*) FROM quotes.real_time WHERE timestamp < $1", cutoff
        )
        return count

    async def users(self, chunk: Chunk) -> list[int]:
        """The server processes that use a chunk now, which whoever rewrites it has to wait for."""
        found: list[int] = await self._connection.fetchval(_USERS, chunk.name)
        return found

    # --- columnstore ---

    # Each says whether the chunk was there: retention may have dropped it since it was listed.

    async def compress(self, chunk: Chunk) -> bool:
        """Move a chunk to the columnstore, or the late rows of one that is there."""
        with suppress(asyncpg.DuplicateObjectError):  # the policy was there first
            return await self._rewrite(f"CALL convert_to_columnstore({_literal(chunk.name)}, recompress => true)")
        return True

    async def decompress(self, chunk: Chunk) -> bool:
        """Move a chunk back to rows; the policy compresses it again at its next run, if it is old enough."""
        return await self._rewrite(f"CALL convert_to_rowstore({_literal(chunk.name)})")

    async def reorder(self, chunk: Chunk) -> bool:
        """Rewrite a chunk of rows in the order of the key, while it can be read."""
        return await self._rewrite(f"SELECT reorder_chunk({_literal(chunk.name)}, 'quotes.real_time_pkey')")

    async def _rewrite(self, statement: str) -> bool:
        try:
            await self._patiently(statement)
        except asyncpg.UndefinedTableError:
            return False
        return True

    # --- bars ---

    async def refresh_windows(
        self, now: datetime, start: datetime | None, end: datetime | None
    ) -> list[tuple[str, Window]]:
        """What to refresh, finest first, for a range that is widened to whole bars and cut to what is stored."""
        chunks = await self.chunks()
        first = start or await self._connection.fetchval(_OLDEST)
        if first is None or not chunks:
            return []
        first = max(first, chunks[0].start)
        last = min(end or now, now)
        floor = self.facts.dropped_before
        found = []
        for name, width in ROLLUPS:
            low, high = first - (first - _EPOCH) % width, last + (_EPOCH - last) % width
            if high > now:  # past it views compute what is new, before it they show what was refreshed
                high -= width
            # Only whole buckets inside of the window are rebuilt, so the floor itself need not be aligned.
            low = low if floor is None else max(low, floor)
            if high - low >= width:
                found.append((name, Window(low, high)))
        return found

    async def refresh(
        self, rollup: str, window: Window, *, force: bool = False, told: Callable[[Window], None] = lambda _: None
    ) -> None:
        """Bring a rollup up to date within a window: what changed, or with `force` all of it.

        In batches, of which each is `told` before it begins. A policy that begins beside a refresh fails, so those of
        the rollups are put off meanwhile, and one that runs is waited for.

        Raises:
            DatabaseUnavailable: something else refreshes it all the time.
        """
        jobs = await self._put_off(_REFRESHES)
        try:
            for batch in await self.batches(rollup, window):
                told(batch)
                await self._put_off(_REFRESHES)
                start, end = (_literal(moment.isoformat()) for moment in (batch.start, batch.end))
                await self._patiently(
                    f"CALL refresh_continuous_aggregate({_literal(f'quotes.{rollup}')}, {start}::timestamptz,"
                    f" {end}::timestamptz, force => {str(bool(force)).lower()})"
                )
        finally:
            await self._release(_REFRESHES, jobs)

    async def batches(self, rollup: str, window: Window) -> list[Window]:
        """A window of whole buckets in parts that a refresh is done with soon, oldest first.

        A year and more in which nothing is stored is one part: between two chunks there may be centuries.
        """
        bucket = dict(ROLLUPS)[rollup]
        chunks = await self.chunks()
        found = []
        start = window.start
        while start < window.end:
            end = start - (start - _EPOCH) % bucket + bucket * _BATCH[rollup]
            following = next((chunk.start for chunk in chunks if chunk.end > end), window.end)
            if following - end > _GAP:
                end = following - (following - _EPOCH) % bucket
            end = min(end, window.end)
            found.append(Window(start, end))
            start = end
        return found

    async def _put_off(self, procedure: str) -> list[int]:
        """Let jobs that do the same begin later, once none runs; their numbers, none where this role may not."""
        try:
            rows = await self._connection.fetch(_POSTPONE, procedure, _PUT_OFF)
        except asyncpg.InsufficientPrivilegeError:
            return []
        jobs = [row[0] for row in rows]
        deadline = datetime.now(UTC) + _RUNNING_LIMIT
        waited = False
        while await self._connection.fetchval(_RUNNING, jobs):
            if datetime.now(UTC) > deadline:
                raise DatabaseUnavailable("A policy does the same all the time; run the same command later.")
            waited = True
            await asyncio.sleep(1)
        # Its end has set when a job that ran begins next.
        return await self._put_off(procedure) if waited else jobs

    async def _release(self, procedure: str, jobs: Sequence[int]) -> None:
        if jobs and not self._connection.is_closed():
            await self._connection.fetch(_RELEASE, procedure, jobs)

    # --- retention ---

    async def behind(self, chunk: Chunk) -> bool:
        """Whether bars of a chunk's quotes lack something, which is completed before it is dropped."""
        dropped = self.facts.dropped_before
        if self.capability.level < Level.COMMUNITY or (dropped is not None and chunk.start < dropped):
            return False
        behind: bool = await self._connection.fetchval(_BEHIND, chunk.start, chunk.end)
        return behind

    async def drop(self) -> None:
        """Drop the chunks that are past their retention, once their bars are complete, as the job does.

        The first time of each symbol is set to its oldest stored quote; symbols without any are forgotten. The job is
        put off meanwhile; whoever else drops the same chunks is let go first.

        Raises:
            DatabaseUnavailable: a chunk was in use all the time.
            DatabaseRefused: bars of a chunk could not be completed, so that it stays.
        """
        jobs = await self._put_off(_RETENTIONS) if self.capability.level >= Level.COMMUNITY else []
        try:
            await self._patiently("CALL quotes.apply_retention(NULL, NULL)", again=asyncpg.UndefinedTableError)
        finally:
            await self._release(_RETENTIONS, jobs)

    async def mend_first(self, now: datetime) -> None:
        """As `drop` ends, where quotes of a plain table were deleted."""
        if (cutoff := self.facts.cutoff(now)) is not None:
            await self._patiently(f"CALL quotes.mend_first({_literal(cutoff.isoformat())})")

    async def delete(self, now: datetime) -> AsyncIterator[int]:
        """Delete quotes that are past their retention from a plain table, by the key; how many at each step."""
        cutoff = self.facts.cutoff(now)
        for (symbol,) in await self._connection.fetch(_WITH_OLDER, cutoff):
            deleted = _DELETE_ROWS
            while deleted == _DELETE_ROWS:
                status = await self._connection.execute(_DELETE, symbol, cutoff, _DELETE_ROWS)
                deleted = int(status.split()[-1])
                yield deleted

    # --- settings ---

    async def differences(self, wanted: Facts, now: datetime) -> list[Change]:
        """Where the store departs from what is wanted, as far as the level has such things."""
        found = []
        if self.facts.retention != wanted.retention:
            found.append(Change(_RETENTION, self.facts.retention, wanted.retention))
        interval, compress = self.facts.chunk_interval, self.facts.compress_after
        if self.capability.level >= Level.APACHE:
            interval = await self._connection.fetchval(_CHUNK_INTERVAL)
        if interval != wanted.chunk_interval or self.facts.chunk_interval != wanted.chunk_interval:
            found.append(Change(_INTERVAL, interval, wanted.chunk_interval))
        if compress != wanted.compress_after:
            found.append(Change(_COMPRESS, compress, wanted.compress_after))
        if self.capability.level >= Level.COMMUNITY:
            present = {row["relation"] + row["key"]: row["value"] for row in await self._connection.fetch(_POLICIES)}
            for what, key, span in self._policies(wanted, now):
                if present.get(key) != span:
                    found.append(Change(what, present.get(key), span))
        return found

    def _policies(self, wanted: Facts, now: datetime) -> Sequence[tuple[str, str, timedelta]]:
        # A refresh over quotes that were dropped would take their bars. Where a retention was raised after it had
        # dropped, its window begins there and not at the new edge.
        start = UNLIMITED if wanted.retention is None else wanted.retention - wanted.chunk_interval
        if self.facts.dropped_before is not None:
            start = min(start, (now - self.facts.dropped_before) // _DAY * _DAY)
        return [
            ("policy columnstore", "real_timecompress_after", wanted.compress_after),
            *((f"policy refresh of {name} from", f"{name}start_offset", start) for name, _ in ROLLUPS),
        ]

    async def apply(self, wanted: Facts, now: datetime) -> None:
        """Make the settings of the store those wanted, and chunk interval and policies with them, at once or not."""
        changes = {change.what for change in await self.differences(wanted, now)}
        async with self._connection.transaction():
            await self._connection.execute(_UPDATE, wanted.retention, wanted.chunk_interval, wanted.compress_after)
            if _INTERVAL in changes and self.capability.level >= Level.APACHE:
                interval = _interval(wanted.chunk_interval)
                await self._connection.execute(f"SELECT set_chunk_time_interval('quotes.real_time', {interval})")
            if self.capability.level < Level.COMMUNITY:
                return
            policies = {row["relation"] + row["key"]: row for row in await self._connection.fetch(_POLICIES)}
            for what, key, span in self._policies(wanted, now):
                if what not in changes:
                    continue
                if (policy := policies.get(key)) is not None:
                    merged = _literal(json.dumps({policy["key"]: f"{int(span.total_seconds())} seconds"}))
                    await self._connection.execute(f"""
                        SELECT alter_job(job_id, config => config || {merged}::jsonb)
                        FROM timescaledb_information.jobs WHERE job_id = {policy["job_id"]}""")
                else:
                    await self._connection.execute(_ADD[key].format(span=_interval(span)))

    async def _patiently(
        self, statement: str, *, again: type[asyncpg.PostgresError] = asyncpg.LockNotAvailableError
    ) -> None:
        """Run a statement that takes a strong lock, giving way to who is in line each time it does not get it.

        Raises:
            QuotesLocked: something held on to the chunk all the time, or failed it `again` and again.
            DatabaseRefused: bars cannot be completed, so that nothing more is dropped.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                await self._connection.execute(statement)
            except (asyncpg.LockNotAvailableError, again) as error:
                if attempt == _TRIES:
                    raise QuotesLocked(
                        "What this works on is in use all the time; run the same command later."
                    ) from error
                await asyncio.sleep(attempt)
            except asyncpg.RaiseError as error:
                raise DatabaseRefused(f"Nothing more was dropped: {error}.") from error
            else:
                return


_ADD: Final = {
    "real_timecompress_after": "CALL add_columnstore_policy('quotes.real_time', after => {span})",
    **{
        f"{name}start_offset": f"SELECT add_continuous_aggregate_policy('quotes.{name}', start_offset => {{span}},"
        f" end_offset => interval '{end}', schedule_interval => interval '{every}', buckets_per_batch => {buckets})"
        for name, end, every, buckets in (
            ("ohlc_1m", "1 minute", "1 minute", _BATCH["ohlc_1m"]),
            ("ohlc_1h", "1 hour", "5 minutes", _BATCH["ohlc_1h"]),
            ("ohlc_1d", "1 day", "15 minutes", _BATCH["ohlc_1d"]),
        )
    },
}


def _interval(span: timedelta) -> str:
    return f"interval '{int(span.total_seconds())} seconds'"


def _literal(text: str) -> str:
    """A string constant: procedures that commit take no bound parameters in a message of their own."""
    return "'" + text.replace("'", "''") + "'"
