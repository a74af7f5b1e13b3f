"""Work on the store that policies do, or that an operator asks for: columnstore, refresh, retention, order, settings.

Invariant: bars outlive their quotes. A refresh never reaches below the retention horizon plus one chunk, so it
never rebuilds a bar from quotes that were dropped; what is dropped is materialised first. Every step is a
transaction of its own, small enough to wait for, and done again after an interruption finds the rest.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Self

import asyncpg

from app.db.capability import Capability, Level
from app.db.engine import Connection, Database, detect
from app.errors import DatabaseUnavailable
from app.repository import storage
from app.repository.storage import Chunk
from app.settings import Settings

ROLLUPS: Final = (("ohlc_1m", timedelta(minutes=1)), ("ohlc_1h", timedelta(hours=1)), ("ohlc_1d", timedelta(days=1)))
UNLIMITED: Final = timedelta(days=130_000)  # back to the first day that can be stored
_STATEMENT: Final = timedelta(hours=6)  # one chunk, or one refresh of years
_LOCK_MS: Final = 2_000  # everything on the chunk queues behind a lock that is waited for
_TRIES: Final = 5
_DELETE_ROWS: Final = 20_000
_FIX_SYMBOLS: Final = 200
_EPOCH: Final = datetime(2000, 1, 3, tzinfo=UTC)

_OLDEST: Final = "SELECT min(first_timestamp) FROM quotes.latest"
_BEHIND: Final = """
WITH rollup AS (SELECT mat_hypertable_id AS id, raw_hypertable_id AS source FROM _timescaledb_catalog.continuous_agg
                WHERE user_view_schema = 'quotes'),
     entry AS (SELECT lowest_modified_value AS low, greatest_modified_value AS high
               FROM _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log
               WHERE hypertable_id IN (SELECT source FROM rollup)
               UNION ALL
               SELECT lowest_modified_value, greatest_modified_value
               FROM _timescaledb_catalog.continuous_aggs_materialization_invalidation_log
               WHERE materialization_id IN (SELECT id FROM rollup))
SELECT EXISTS (SELECT FROM entry WHERE high >= _timescaledb_functions.to_unix_microseconds($1)
                                   AND low < _timescaledb_functions.to_unix_microseconds($2))
"""
_REMNANT: Final = """
SELECT kept.last > stored.last OR kept.mid > stored.mid
FROM (SELECT coalesce(sum(count), 0) AS last, coalesce(sum(mid_count), 0) AS mid
      FROM quotes.ohlc_1m WHERE timestamp >= $1 AND timestamp < $2) kept
CROSS JOIN (SELECT count(price) AS last, count(bid + ask) AS mid
            FROM quotes.real_time WHERE timestamp >= $1 AND timestamp < $2) stored
"""
_DELETE: Final = """
WITH old AS (SELECT timestamp, nanos FROM quotes.real_time
             WHERE symbol = $1 AND timestamp < $2 ORDER BY timestamp, nanos LIMIT $3)
DELETE FROM quotes.real_time stored USING old
WHERE stored.symbol = $1 AND stored.timestamp = old.timestamp AND stored.nanos = old.nanos
"""
_WITH_OLDER: Final = "SELECT symbol FROM quotes.latest WHERE first_timestamp < $1 ORDER BY symbol"
# Locked in symbol order as the writers do. Who holds the lock may have seen what this snapshot does not, so the
# statement that looks at the quotes is one of its own, with a snapshot taken after the locks.
_LOCK_LATEST: Final = """
SELECT symbol FROM quotes.latest WHERE first_timestamp < $1 AND symbol > $2 ORDER BY symbol LIMIT $3 FOR UPDATE
"""
_FIRST: Final = """
UPDATE quotes.latest held SET first_timestamp = oldest.timestamp, first_nanos = oldest.nanos
FROM unnest($1::text[]) AS given (symbol)
CROSS JOIN LATERAL (SELECT timestamp, nanos FROM quotes.real_time stored
                    WHERE stored.symbol = given.symbol COLLATE "C" AND stored.timestamp >= $2 AND stored.timestamp < $3
                    ORDER BY stored.timestamp, stored.nanos LIMIT 1) oldest
WHERE held.symbol = given.symbol
RETURNING held.symbol
"""
_FORGET: Final = "DELETE FROM quotes.latest WHERE symbol = ANY($1::text[]) AND timestamp < $2"
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
JOIN (VALUES ('policy_compression', 'compress_after'), ('policy_retention', 'drop_after'),
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
    """A setting of the database that differs from the service's; None: there is no such policy."""

    what: str
    before: timedelta | None
    after: timedelta | None


class MaintenanceRepository:
    """One connection for a piece of maintenance, and the server's level, which decides what can be done."""

    def __init__(self, connection: Connection, capability: Capability, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self.capability = capability

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database, settings: Settings) -> AsyncIterator[Self]:
        """On a connection of its own, whose statements may run for hours but wait for no lock.

        Raises:
            DatabaseUnavailable: it cannot be reached.
            StartupError: the store is one of before the first release.
        """
        async with database.dedicated(statement_timeout=_STATEMENT) as connection:
            await connection.execute(f"SET lock_timeout = {_LOCK_MS}; SET application_name = 'opa-quotes maintain'")
            yield cls(connection, await detect(connection), settings)

    # --- what there is to do ---

    async def chunks(self) -> list[Chunk]:
        """The chunks of the raw quotes by time."""
        return await storage.chunks(self._connection, self.capability.level)

    def cutoff(self, now: datetime) -> datetime | None:
        """Quotes before this are past their retention: a whole number of chunks; None where all are kept."""
        retention = self._settings.effective_retention
        if retention is None:
            return None
        return (now - retention) - ((now - retention) - _EPOCH) % self._settings.chunk_interval

    def floor(self, now: datetime) -> datetime | None:
        """Below this, quotes may have been dropped and no bar may be rebuilt."""
        retention = self._settings.effective_retention
        return None if retention is None else now - retention + self._settings.chunk_interval

    async def due(self, now: datetime) -> list[Chunk]:
        """Chunks old enough for the columnstore."""
        return [chunk for chunk in await self.chunks() if chunk.end <= now - self._settings.compress_after]

    async def expired(self, now: datetime) -> list[Chunk]:
        """Chunks that are past their retention as a whole."""
        cutoff = self.cutoff(now)
        return [] if cutoff is None else [chunk for chunk in await self.chunks() if chunk.end <= cutoff]

    async def below_floor(self, now: datetime) -> list[Chunk]:
        """Chunks that a refresh does not reach, or not as a whole: those that retention is about to take."""
        floor = self.floor(now)
        return [] if floor is None else [chunk for chunk in await self.chunks() if chunk.start < floor]

    async def expired_rows(self, now: datetime) -> int:
        """Quotes of a plain table that are past their retention."""
        count: int = await self._connection.fetchval(
            "SELECT count(*) FROM quotes.real_time WHERE timestamp < $1", self.cutoff(now)
        )
        return count

    # --- columnstore ---

    async def compress(self, chunk: Chunk) -> None:
        """Move a chunk to the columnstore, or the late rows of one that is there."""
        await self._patiently(f"CALL convert_to_columnstore({_literal(chunk.name)}, recompress => true)")

    async def decompress(self, chunk: Chunk) -> None:
        """Move a chunk back to rows; the policy compresses it again at its next run, if it is old enough."""
        await self._patiently(f"CALL convert_to_rowstore({_literal(chunk.name)})")

    async def reorder(self, chunk: Chunk) -> None:
        """Rewrite a chunk of rows in the order of the key, while it can be read."""
        await self._patiently(f"SELECT reorder_chunk({_literal(chunk.name)}, 'quotes.real_time_pkey')")

    # --- bars ---

    async def refresh_windows(
        self, now: datetime, start: datetime | None, end: datetime | None
    ) -> list[tuple[str, Window]]:
        """What to refresh, finest first, for a range that is widened to whole bars and cut at the floor."""
        first = start or await self._connection.fetchval(_OLDEST)
        if first is None:
            return []
        last = min(end or now, now)
        floor = self.floor(now)
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

    async def refresh(self, rollup: str, window: Window, *, force: bool = False) -> None:
        """Bring a rollup up to date within a window: what changed, or with `force` all of it."""
        await self._patiently(
            f"CALL refresh_continuous_aggregate('quotes.{rollup}', {_literal(window.start.isoformat())}::timestamptz,"
            f" {_literal(window.end.isoformat())}::timestamptz, force => {str(force).lower()})"
        )

    # --- retention ---

    async def settle(self, chunk: Chunk) -> bool:
        """Complete the bars of a chunk that lies below the floor, before it is dropped; whether there was a need.

        If the bars count more quotes than the chunk holds, the chunk is a remnant of one that was dropped, from
        which no bar may be rebuilt.
        """
        if self.capability.level < Level.COMMUNITY or not await self._connection.fetchval(
            _BEHIND, chunk.start, chunk.end
        ):
            return False
        if await self._connection.fetchval(_REMNANT, chunk.start, chunk.end):
            return False
        for name, width in ROLLUPS:
            # The coarser ones are built on the one below, which is complete on both sides of the chunk.
            low = chunk.start - (chunk.start - _EPOCH) % width
            await self.refresh(name, Window(low, chunk.end + (_EPOCH - chunk.end) % width))
        return True

    async def drop(self, chunk: Chunk) -> None:
        """Drop a chunk that is past its retention, and is settled; its bars stay."""
        end = _literal(chunk.end.isoformat())
        await self._patiently(f"SELECT drop_chunks('quotes.real_time', older_than => {end}::timestamptz)")

    async def delete(self, now: datetime) -> AsyncIterator[int]:
        """Delete quotes that are past their retention from a plain table, by the key; how many at each step."""
        cutoff = self.cutoff(now)
        for (symbol,) in await self._connection.fetch(_WITH_OLDER, cutoff):
            deleted = _DELETE_ROWS
            while deleted == _DELETE_ROWS:
                status = await self._connection.execute(_DELETE, symbol, cutoff, _DELETE_ROWS)
                deleted = int(status.split()[-1])
                yield deleted

    async def fix_first(self, now: datetime) -> tuple[int, int]:
        """Bring `quotes.latest` in line with what was dropped: symbols whose first quote changed, symbols gone."""
        cutoff = self.cutoff(now)
        if cutoff is None:
            return 0, 0
        chunks = await self.chunks()
        horizon = min([cutoff, *(chunk.start for chunk in chunks[:1])]) if chunks else cutoff
        moved = gone = 0
        last = ""
        while True:
            async with self._connection.transaction():
                symbols = [row[0] for row in await self._connection.fetch(_LOCK_LATEST, horizon, last, _FIX_SYMBOLS)]
                if not symbols:
                    return moved, gone
                last = symbols[-1]
                left = set(symbols)
                start, width = horizon, 8 * self._settings.chunk_interval
                while left and start <= now:
                    rows = await self._connection.fetch(_FIRST, sorted(left), start, start + width)
                    moved += len(rows)
                    left -= {row[0] for row in rows}
                    start, width = start + width, 2 * width
                status = await self._connection.execute(_FORGET, sorted(left), horizon)
                gone += int(status.split()[-1])

    # --- settings ---

    async def differences(self) -> list[Change]:
        """Where the database departs from the settings, as far as the level has such things."""
        if self.capability.level < Level.APACHE:
            return []
        settings = self._settings
        found = []
        interval = await self._connection.fetchval(_CHUNK_INTERVAL)
        if interval != settings.chunk_interval:
            found.append(Change("chunk interval", interval, settings.chunk_interval))
        if self.capability.level >= Level.COMMUNITY:
            present = {row["relation"] + row["key"]: row["value"] for row in await self._connection.fetch(_POLICIES)}
            for what, key, wanted in self._policies():
                if present.get(key) != wanted:
                    found.append(Change(what, present.get(key), wanted))
        return found

    def _policies(self) -> Sequence[tuple[str, str, timedelta | None]]:
        settings = self._settings
        retention = settings.effective_retention
        start = UNLIMITED if retention is None else retention - settings.chunk_interval
        return [
            ("columnstore after", "real_timecompress_after", settings.compress_after),
            ("retention", "real_timedrop_after", retention),
            *((f"refresh of {name} from", f"{name}start_offset", start) for name, _ in ROLLUPS),
        ]

    async def apply(self) -> None:
        """Bring chunk interval and policies in line with the settings, at once or not at all."""
        changes = {change.what: change for change in await self.differences()}
        async with self._connection.transaction():
            # The narrower of refresh and retention first would be unsafe in between; one transaction has no between.
            policies = {
                row["relation"] + row["key"]: row for row in await self._connection.fetch(_POLICIES)
            } if self.capability.level >= Level.COMMUNITY else {}  # fmt: skip
            if "chunk interval" in changes:
                interval = _interval(self._settings.chunk_interval)
                await self._connection.execute(f"SELECT set_chunk_time_interval('quotes.real_time', {interval})")
            for what, key, wanted in self._policies():
                if what not in changes:
                    continue
                policy = policies.get(key)
                if wanted is None:
                    await self._connection.execute("SELECT remove_retention_policy('quotes.real_time')")
                elif policy is not None:
                    merged = _literal(json.dumps({policy["key"]: f"{int(wanted.total_seconds())} seconds"}))
                    await self._connection.execute(f"""
                        SELECT alter_job(job_id, config => config || {merged}::jsonb)
                        FROM timescaledb_information.jobs WHERE job_id = {policy["job_id"]}""")
                else:
                    await self._connection.execute(_ADD[key].format(span=_interval(wanted)))

    async def _patiently(self, statement: str) -> None:
        """Run a statement that takes a strong lock, giving way to who is in line each time it does not get it.

        Raises:
            DatabaseUnavailable: something held on to the chunk all the time.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                await self._connection.execute(statement)
            except asyncpg.LockNotAvailableError as error:
                if attempt == _TRIES:
                    raise DatabaseUnavailable(
                        "The chunk is in use all the time; run the same command later."
                    ) from error
                await asyncio.sleep(attempt)
            else:
                return


_ADD: Final = {
    "real_timecompress_after": "CALL add_columnstore_policy('quotes.real_time', after => {span})",
    "real_timedrop_after": "SELECT add_retention_policy('quotes.real_time', drop_after => {span})",
    **{
        f"{name}start_offset": f"SELECT add_continuous_aggregate_policy('quotes.{name}', start_offset => {{span}},"
        f" end_offset => interval '{end}', schedule_interval => interval '{every}', buckets_per_batch => {buckets})"
        for name, end, every, buckets in (
            ("ohlc_1m", "1 minute", "1 minute", 14_400),
            ("ohlc_1h", "1 hour", "5 minutes", 2_400),
            ("ohlc_1d", "1 day", "15 minutes", 1_000),
        )
    },
}


def _interval(span: timedelta) -> str:
    return f"interval '{int(span.total_seconds())} seconds'"


def _literal(text: str) -> str:
    """A string constant: procedures that commit take no bound parameters in a message of their own."""
    return "'" + text.replace("'", "''") + "'"
