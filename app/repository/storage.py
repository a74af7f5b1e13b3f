"""What the store occupies and how far its background work has come: tables, chunks, rollups, jobs.

Invariant: nothing here reads quotes. Everything comes from catalogs and file sizes, so a look costs the same
whatever the chunks hold: 70 ms on a native server with 730 chunks, 700 of them in the columnstore.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import asyncpg

from app.db.capability import DETECT, Capability, Level
from app.db.engine import Connection, Database

#: Looks at chunks, of which one may be dropped during each.
_LOOKS: Final = 5
ChunkState = Literal["rowstore", "columnstore", "partial"]
#: `partial` is a chunk of the columnstore that holds late rows until it is compressed again.
STATES: Final[tuple[ChunkState, ...]] = ("rowstore", "columnstore", "partial")

# Who keeps all others from a table or one of its indexes, or is the next to: reads of its size wait for either.
_HOLDERS: Final = """
SELECT coalesce(indrelid, relation) AS relation, (array_agg(pid ORDER BY granted DESC, pid))[1] AS pid
FROM pg_locks LEFT JOIN pg_index ON indexrelid = relation
WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock' AND pid <> pg_backend_pid()
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
GROUP BY 1
"""
#: Bytes of a table and of its indexes as the server last counted them, without a lock.
_COUNTED: Final = """
SELECT coalesce(sum(relpages), 0)::bigint * current_setting('block_size')::bigint AS bytes,
       coalesce(sum(relpages) FILTER (WHERE relkind = 'i'), 0)::bigint * current_setting('block_size')::bigint
       AS index_bytes
FROM pg_class WHERE oid {0} OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid {0})
"""
#: Those of a table by its files, or as counted where somebody holds it.
_MEASURED: Final = f"""
SELECT pg_total_relation_size({{0}}) AS bytes, pg_indexes_size({{0}}) AS index_bytes WHERE held.pid IS NULL
UNION ALL SELECT * FROM ({_COUNTED.format("= held.relation")}) counted WHERE held.pid IS NOT NULL
"""
# Files are looked at only where rows are written; what the columnstore wrote, it wrote down. To look at the files of
# 730 chunks took four fifths of the time.
_CHUNKS: Final = f"""
WITH held AS MATERIALIZED ({_HOLDERS})
SELECT name::text, range_start, range_end, status, (SELECT reltuples::bigint FROM pg_class WHERE oid = name) AS rows,
       coalesce(bytes, 0) AS bytes, coalesce(index_bytes, 0) AS index_bytes, pid
FROM timescaledb_information.chunks
CROSS JOIN LATERAL (SELECT format('%I.%I', chunk_schema, chunk_name)::regclass) AS relation (name)
CROSS JOIN LATERAL (SELECT CASE WHEN is_compressed THEN _timescaledb_functions.chunk_status(name) ELSE 0 END)
                   AS state (status)
LEFT JOIN held ON held.relation = name
LEFT JOIN LATERAL ({_MEASURED.format("name")}) measured ON status <> 1
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time'
ORDER BY range_start
"""
_SAVINGS: Final = """
SELECT format('%I.%I', chunk_schema, chunk_name) AS name, before_compression_total_bytes,
       after_compression_total_bytes, after_compression_index_bytes
FROM chunk_columnstore_stats('quotes.real_time') WHERE compression_status = 'Compressed'
"""
_COMPRESSED_ROWS: Final = """
SELECT coalesce(sum(size.numrows_pre_compression), 0)::bigint
FROM _timescaledb_catalog.compression_chunk_size size
JOIN _timescaledb_catalog.chunk ON chunk.id = size.chunk_id
JOIN _timescaledb_catalog.hypertable ON hypertable.id = chunk.hypertable_id
WHERE hypertable.schema_name = 'quotes' AND hypertable.table_name = 'real_time'
"""
_TABLE: Final = f"""
WITH held AS MATERIALIZED ({_HOLDERS})
SELECT bytes, index_bytes, reltuples::bigint AS rows
FROM pg_class LEFT JOIN held ON relation = oid CROSS JOIN LATERAL ({_MEASURED.format("oid")}) measured
WHERE oid = to_regclass($1)
"""
# What has been materialised, in microseconds since 1970; the watermark lies before the calendar if nothing was.
_ROLLUPS: Final = f"""
WITH held AS MATERIALIZED ({_HOLDERS})
SELECT user_view_name::text AS name, CASE WHEN mark < -62135596800000000 THEN NULL
           ELSE _timescaledb_functions.to_timestamp(mark) END AS watermark,
       size.bytes, size.index_bytes,
       (SELECT count(*) FROM _timescaledb_catalog.continuous_aggs_materialization_invalidation_log entry
        WHERE entry.materialization_id = mat_hypertable_id AND entry.greatest_modified_value < mark) AS stale_ranges
FROM _timescaledb_catalog.continuous_agg
JOIN _timescaledb_catalog.hypertable ON hypertable.id = mat_hypertable_id
CROSS JOIN LATERAL _timescaledb_functions.cagg_watermark(mat_hypertable_id) mark
CROSS JOIN LATERAL (
    SELECT array_agg(format('%I.%I', chunk_schema, chunk_name)::regclass::oid) FROM timescaledb_information.chunks
    WHERE hypertable_schema = schema_name AND hypertable_name = table_name) AS of_rollup (chunks)
CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM held WHERE relation = ANY (chunks))) AS state (is_held)
CROSS JOIN LATERAL (
    SELECT total_bytes, index_bytes
    FROM hypertable_detailed_size(format('%I.%I', user_view_schema, user_view_name)::regclass) WHERE NOT is_held
    UNION ALL SELECT * FROM ({_COUNTED.format("= ANY (chunks)")}) counted WHERE is_held) AS size (bytes, index_bytes)
WHERE user_view_schema = 'quotes'
ORDER BY mat_hypertable_id
"""
_SIZE: Final = "SELECT pg_database_size(current_database())"
_BACKUP: Final = "SELECT extract(epoch FROM max(finished))::float8 FROM quotes.backups"
_ENDS: Final = "SELECT min(first_timestamp), max(timestamp) FROM quotes.latest"
# A refresh job names its view, or in older versions the hypertable behind it.
_JOBS: Final = """
SELECT CASE proc_name WHEN 'policy_compression' THEN 'columnstore' WHEN 'apply_retention' THEN 'retention'
           WHEN 'policy_refresh_continuous_aggregate'
           THEN 'refresh ' || coalesce(view.view_name, job.hypertable_name) ELSE proc_name END AS name,
       job.job_id, job.scheduled, job.schedule_interval, stats.last_run_started_at, stats.last_successful_finish,
       stats.last_run_status, stats.total_runs, stats.total_failures, coalesce(stats.next_start, job.next_start)
       AS next_start
FROM timescaledb_information.jobs job
LEFT JOIN timescaledb_information.job_stats stats USING (job_id)
LEFT JOIN timescaledb_information.continuous_aggregates view
       ON view.materialization_hypertable_schema = job.hypertable_schema
      AND view.materialization_hypertable_name = job.hypertable_name
WHERE 'quotes' IN (job.hypertable_schema, view.view_schema, job.proc_schema)
ORDER BY job.job_id
"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of the raw quotes, `end` exclusive; `before` and `after` are bytes around its last compression.

    `rows` is the server's estimate of what is in the rowstore. `locked_by` is the server process that keeps all others
    from the chunk; its bytes are then those that the server last counted.
    """

    name: str
    start: datetime
    end: datetime
    state: ChunkState
    bytes: int
    index_bytes: int
    rows: int | None
    before: int | None
    after: int | None
    locked_by: int | None = None


@dataclass(frozen=True, slots=True)
class Relation:
    """A table with its indexes; `rows` is the server's estimate, None where it has none yet."""

    name: str
    kind: Literal["hypertable", "table", "continuous aggregate"]
    bytes: int
    index_bytes: int
    rows: int | None


@dataclass(frozen=True, slots=True)
class Rollup:
    """How far a rollup is materialised, and how far the newest quote lies past that.

    `stale_ranges` are ranges below the watermark that got late quotes and wait for a refresh.
    """

    name: str
    watermark: datetime | None
    lag: timedelta
    stale_ranges: int


@dataclass(frozen=True, slots=True)
class Job:
    """A background job with its last run."""

    name: str
    id: int
    scheduled: bool
    every: timedelta
    last_started: datetime | None
    last_success: datetime | None
    last_status: str | None
    runs: int
    failures: int
    next_start: datetime | None


@dataclass(frozen=True, slots=True)
class Storage:
    """One look at the store: `size` is of the whole database in bytes, `newest` the newest timestamp stored.

    `backup` is when the newest backup on record was whole, in seconds since 1970: infinite where another tool watches
    its own, None if there is none.
    """

    capability: Capability
    size: int
    newest: datetime | None
    relations: list[Relation]
    chunks: list[Chunk]
    rollups: list[Rollup]
    jobs: list[Job]
    backup: float | None

    def count(self, state: ChunkState) -> int:
        """Chunks in a state."""
        return sum(chunk.state == state for chunk in self.chunks)

    @property
    def before(self) -> int:
        """Bytes of the compressed chunks before they were."""
        return sum(chunk.before or 0 for chunk in self.chunks)

    @property
    def after(self) -> int:
        """Bytes of the compressed chunks right after."""
        return sum(chunk.after or 0 for chunk in self.chunks)

    @property
    def ratio(self) -> float | None:
        """How many times smaller the columnstore made them."""
        return round(self.before / self.after, 2) if self.after else None


class StorageRepository:
    """Looks at the store over a connection of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def look(self, timeout: timedelta = timedelta(seconds=5)) -> Storage:
        """Everything, in one look.

        Raises:
            DatabaseUnavailable: no connection, or the schema is missing.
            QueryTimeout: a statement took longer than `timeout`, or all of them twice as long.
        """
        within = 2 * timeout.total_seconds()
        async with self._database.dedicated(statement_timeout=timeout, within=within) as connection:
            # Sizes are read under a lock on each chunk; rather no figures than a queue behind a drop.
            await connection.execute("SET lock_timeout = '500ms'")
            capability = Capability.of(await connection.fetchrow(DETECT) or ())
            community = capability.level >= Level.COMMUNITY
            found = await chunks(connection, capability.level)
            if capability.level >= Level.APACHE:
                compressed = await connection.fetchval(_COMPRESSED_ROWS) if community else 0
                relations = [_hypertable("quotes.real_time", found, compressed)]
            else:
                relations = [await _table(connection, "quotes.real_time")]
            relations += [await _table(connection, name) for name in ("quotes.latest", "quotes.receipts")]
            size = await connection.fetchval(_SIZE)
            first, last = await connection.fetchrow(_ENDS) or (None, None)
            recorded = await connection.fetchval("SELECT to_regclass('quotes.backups') IS NOT NULL")
            backup = await connection.fetchval(_BACKUP) if recorded else None
            rollups = []
            if community:
                for row in await connection.fetch(_ROLLUPS):
                    relations.append(
                        Relation(
                            f"quotes.{row['name']}", "continuous aggregate", row["bytes"], row["index_bytes"], None
                        )
                    )
                    rollups.append(
                        Rollup(row["name"], row["watermark"], _lag(row["watermark"], first, last), row["stale_ranges"])
                    )
            jobs = [_job(row) for row in await connection.fetch(_JOBS)] if community else []
        return Storage(capability, size, last, relations, found, rollups, jobs, backup)


async def chunks(connection: Connection, level: Level) -> list[Chunk]:
    """The chunks of the raw quotes by time; none where they are a plain table."""
    if level < Level.APACHE:
        return []
    # One that retention drops meanwhile is still listed, and has no size any more.
    for _ in range(_LOOKS - 1):
        with suppress(asyncpg.UndefinedTableError):
            return await _chunks(connection, level)
    return await _chunks(connection, level)


async def _chunks(connection: Connection, level: Level) -> list[Chunk]:
    savings = {row[0]: row for row in await connection.fetch(_SAVINGS)} if level >= Level.COMMUNITY else {}
    found = []
    for name, start, end, status, rows, size, index_size, holder in await connection.fetch(_CHUNKS):
        _, before, after, after_index = savings.get(name, (name, None, None, None))
        found.append(
            Chunk(
                name, start, end, _state(status), size + (after or 0), index_size + (after_index or 0),
                rows if rows >= 0 else None, before, after, holder,
            )
        )  # fmt: skip
    return found


def _state(status: int) -> ChunkState:
    """Bit 1 of a chunk's status: compressed; 2: compressed out of order; 8: some rows are in the rowstore."""
    return "rowstore" if not status & 1 else "partial" if status & 10 else "columnstore"


def _hypertable(name: str, found: list[Chunk], compressed: int) -> Relation:
    rows = [chunk.rows for chunk in found if chunk.state == "rowstore"]
    known = compressed + sum(count for count in rows if count is not None)
    return Relation(
        name,
        "hypertable",
        sum(chunk.bytes for chunk in found),
        sum(chunk.index_bytes for chunk in found),
        known if known or None not in rows else None,
    )


async def _table(connection: Connection, name: str) -> Relation:
    row = await connection.fetchrow(_TABLE, name) or (0, 0, -1)
    return Relation(name, "table", row[0], row[1], row[2] if row[2] >= 0 else None)


def _lag(watermark: datetime | None, first: datetime | None, last: datetime | None) -> timedelta:
    """A rollup that was never refreshed lags by all that is stored."""
    start = watermark or first
    return timedelta(0) if start is None or last is None else max(timedelta(0), last - start)


def _job(row: Any) -> Job:
    return Job(
        row["name"], row["job_id"], row["scheduled"], row["schedule_interval"],
        _moment(row["last_run_started_at"]), _moment(row["last_successful_finish"]), row["last_run_status"],
        row["total_runs"] or 0, row["total_failures"] or 0, _moment(row["next_start"]),
    )  # fmt: skip


def _moment(value: datetime | None) -> datetime | None:
    """A time of the catalog, where infinity stands for never; the driver reads that as the ends of its calendar."""
    return None if value is None or value.year in {1, 9999} else value
