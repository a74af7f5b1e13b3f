"""Statements about the store itself: what the health checks look at.

Invariant: nothing here reads quotes, so nothing here grows with them; and nothing here waits for a lock on them.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

import asyncpg

from app.db import needs
from app.db.capability import DETECT, STRANGERS, Capability, Level
from app.db.engine import Connection, Database
from app.db.facts import FACTS, Facts
from app.db.hosts import Writable
from app.db.sessions import encoding_fault
from app.errors import SchemaMismatch
from app.quote.fields import COLUMNS, KEY, NANOS, VALUES
from app.repository.rollups import ROLLUPS

_ALL: Final = "SELECT,INSERT,UPDATE,DELETE"
#: The relations that the service works with, and the privileges that its role has to have on each. FOR SHARE, by which
#: late quotes hold the settings, needs UPDATE. There are no sequences.
NEEDED: Final = MappingProxyType(
    {
        "real_time": _ALL,
        "latest": _ALL,
        "receipts": _ALL,
        "settings": "SELECT,UPDATE",
        "backups": "SELECT",
        **{name: "SELECT" for name, _ in ROLLUPS},
        "daily_summary": "SELECT",
    }
)
# From the catalog, which any role may read: a name would have to be looked up with USAGE on its schema.
_STATE: Final = """
WITH schema AS (SELECT oid FROM pg_namespace WHERE nspname = 'quotes'),
found AS (
    SELECT needed.name, needed.privileges,
           (SELECT oid FROM pg_class WHERE relnamespace = (SELECT oid FROM schema) AND relname = needed.name) AS oid
    FROM unnest($1::text[], $2::text[]) AS needed (name, privileges)),
revision AS (
    SELECT oid FROM pg_class WHERE relnamespace = (SELECT oid FROM schema) AND relname = 'alembic_version'
    AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'version_num'))
SELECT pg_is_in_recovery() AS standby, current_setting('transaction_read_only')::boolean AS read_only,
       (SELECT oid FROM found WHERE name = 'real_time') AS quotes,
       (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i
        CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE i.indrelid = (SELECT oid FROM found WHERE name = 'real_time') AND i.indisprimary) AS key,
       ARRAY(SELECT 'quotes.' || name FROM found WHERE oid IS NULL
             UNION ALL
             SELECT 'quotes.' || name FROM unnest($3::text[]) AS name WHERE NOT EXISTS (
                 SELECT FROM pg_proc WHERE pronamespace = (SELECT oid FROM schema) AND proname = name)) AS missing,
       ARRAY(SELECT privilege || ' on quotes.' || name
             FROM found CROSS JOIN LATERAL unnest(string_to_array(privileges, ',')) AS privilege
             WHERE oid IS NOT NULL AND NOT has_table_privilege(oid, privilege)
             UNION ALL
             SELECT 'USAGE on the schema quotes' FROM schema WHERE NOT has_schema_privilege(oid, 'USAGE')
             UNION ALL
             SELECT 'EXECUTE on quotes.' || proname FROM pg_proc
             WHERE pronamespace = (SELECT oid FROM schema) AND proname = ANY($3::text[])
                   AND NOT has_function_privilege(oid, 'EXECUTE')
             UNION ALL
             SELECT 'SELECT on quotes.alembic_version' FROM revision WHERE NOT has_table_privilege(oid, 'SELECT')
             UNION ALL
             SELECT 'TEMPORARY on the database'
             WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')) AS lacking,
       EXISTS (SELECT FROM revision) AS migrated,
       ARRAY(SELECT 'quotes.' || name FROM (SELECT oid, name FROM found
                                            UNION ALL SELECT oid, 'alembic_version' FROM revision) AS needed
             WHERE row_security_active(oid)) AS hidden
"""


def _plan(table: str, columns: Sequence[str], key: Sequence[str]) -> str:
    values = ", ".join("NULL" for _ in columns)
    changed = columns[-1]
    return (
        f"EXPLAIN INSERT INTO quotes.{table} ({', '.join(columns)}) VALUES ({values})"
        f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changed} = excluded.{changed}"
    )


#: What a write needs of columns, keys and libraries, planned and not done: no row is left to be vacuumed.
_PLANS: Final = "; ".join(
    (
        _plan("real_time", COLUMNS.names, KEY),
        _plan("latest", ["symbol", "first_timestamp", f"first_{NANOS}", "timestamp", NANOS, *VALUES], ["symbol"]),
        _plan("receipts", ["key", "fingerprint", "receipt"], ["key"]),
    )
)
# A temporary file of 280 kB has to find room on the volume of the quotes: a row finds some in a page that is there,
# also where no new one can be had. It is gone with the statement.
_ROOM: Final = """
BEGIN; SET LOCAL work_mem = '64kB'; SET LOCAL temp_tablespaces = '';
SELECT count(*) FROM generate_series(1, 20000); COMMIT
"""
# Clients cannot give a key with such a character.
_WRITE: Final = """
INSERT INTO quotes.receipts (key, fingerprint, receipt) VALUES ('health \u00b7', '', '{}')
ON CONFLICT (key) DO UPDATE SET created = now()
"""
# The limits of role and database do not bind a superuser, and what is reserved is for one, or for a role of ours.
_CONNECTIONS: Final = """
SELECT connections, name FROM pg_roles, pg_database, LATERAL (VALUES
    (current_setting('max_connections')::int
     - CASE WHEN rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
                                      + coalesce(current_setting('reserved_connections', true)::int, 0) END,
     'max_connections of the server', 1),
    (CASE WHEN NOT rolsuper THEN nullif(rolconnlimit, -1) END, 'the CONNECTION LIMIT of the role', 2),
    (CASE WHEN NOT rolsuper THEN nullif(datconnlimit, -1) END, 'the CONNECTION LIMIT of the database', 3)
) AS of (connections, name, place)
WHERE rolname = session_user AND datname = current_database() ORDER BY connections, place LIMIT 1
"""
_HYPERTABLE: Final = """
SELECT num_chunks FROM timescaledb_information.hypertables
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time'
"""
# A logical restore makes new identifiers, a recovery to a point in time and a failover a new timeline.
_STORE: Final = """
SELECT left(encode(sha256(convert_to(concat_ws('.', $1::text, left(pg_walfile_name(pg_current_wal_lsn()), 8),
           (SELECT oid FROM pg_database WHERE datname = current_database()), $2::oid), 'UTF8')), 'hex'), 16)
WHERE NOT pg_is_in_recovery()
"""
#: Privileges without which the revision cannot be read.
_NO_SCHEMA: Final = "USAGE on the schema quotes"
_NO_REVISION: Final = "SELECT on quotes.alembic_version"
# As the administrator has them: what this session has set for itself is in `setting`.
_SETTINGS: Final = "SELECT name, reset_val FROM pg_settings WHERE name = ANY($1::text[])"
#: What a statement over all quotes locks.
_RELATIONS: Final = """
SELECT (SELECT count(*) FROM pg_inherits WHERE inhparent = $1)
     + (SELECT count(*) FROM pg_inherits JOIN pg_index ON indrelid = inhrelid WHERE inhparent = $1)
"""
#: A chunk of the columnstore has another table with an index.
_COMPRESSED: Final = """
SELECT 2 * count(*) FROM _timescaledb_catalog.chunk JOIN _timescaledb_catalog.hypertable h ON h.id = hypertable_id
WHERE h.schema_name = 'quotes' AND h.table_name = 'real_time' AND chunk.status & 1 = 1
"""
_NAMES: Final = """
SELECT quote_ident(pg_get_userbyid(relowner)), quote_ident(current_database()) FROM pg_class WHERE oid = $1
"""
_REVISION: Final = "SELECT version_num FROM quotes.alembic_version"
_CLOCK: Final = "SELECT clock_timestamp()"
#: Commits of this role that have waited for a standby for a second, and how long the oldest has.
_WAITING: Final = """
SELECT count(*) FILTER (WHERE clock_timestamp() - query_start > interval '1 s'),
       coalesce(max(clock_timestamp() - query_start), interval '0') FROM pg_stat_activity
WHERE wait_event = 'SyncRep' AND datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class ClockDifference:
    """How many seconds this process's clock is ahead of the database's, give or take `within`."""

    seconds: float
    within: float

    @property
    def certain(self) -> float:
        """The least difference that there is, without its sign."""
        return max(0.0, abs(self.seconds) - self.within)


@dataclass(frozen=True, slots=True)
class Observation:
    """What the server and its schema look like now.

    `chunks` is None where `quotes.real_time` is no hypertable; `revision` is None where nothing was migrated.
    `missing` are relations and functions that the service needs, `lacking` privileges that its role has not, and
    `flaw` is why the server cannot plan a write. `full` says that a file of some hundred kB found no room, `refusal`
    why the last write was refused, of late.
    `writable` has the servers that take writes where several were looked at, `host` the one that is written to.
    `waiting` is the longest wait of a commit for a standby, `commits_waiting` how many have waited for a second.
    `damaged` is how long ago the server reported an error of its own; `connections` is how many this role may
    have by the `limit` that is the least; `hidden` are tables whose row security applies to it. `server` has the
    settings of the server that matter, `encoding` why not every text can be stored; `strangers` are what is in the
    place of a store, `facts` the settings of the store. `store` is another text wherever quotes that were acknowledged
    may not be there; None without a table, or on a standby.
    """

    capability: Capability
    table_exists: bool
    primary_key: list[str] | None
    chunks: int | None
    revision: str | None
    clock: ClockDifference | None = None
    host: str = ""
    writable: tuple[Writable, ...] = ()
    waiting: timedelta = timedelta(0)
    damaged: timedelta | None = None
    store: str | None = None
    facts: Facts | None = None
    standby: bool = False
    read_only: bool = False
    missing: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    flaw: str | None = None
    full: bool = False
    refusal: str | None = None
    connections: int | None = None
    commits_waiting: int = 0
    server: needs.Server = field(default_factory=needs.Server)
    encoding: str | None = None
    hidden: tuple[str, ...] = ()
    limit: str = ""
    strangers: tuple[str, ...] = ()


class SystemRepository:
    """Looks at the store over a connection of its own, so that a busy pool never looks like a dead database."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._clock = clock

    async def observe(self, timeout: float) -> Observation:
        """Look at the server and the schema, each statement for `timeout` seconds.

        Raises:
            DatabaseUnavailable: no connection within `timeout` seconds.
            QueryTimeout: the server took too long to answer.
        """
        database = self._database
        async with database.probed(timeout) as connection:
            await database.require_own(connection)
            if server := await database.identify(connection):
                database.notice(server)
            clock = await self._difference(connection)
            capability = Capability.of(await connection.fetchrow(DETECT) or ())
            community = capability.level >= Level.COMMUNITY
            names = [list(NEEDED), list(NEEDED.values()), ["nanoseconds"] if community else []]
            (state,) = await connection.fetch(_STATE, *names)
            quotes, missing, lacking = state["quotes"], tuple(state["missing"]), tuple(state["lacking"])
            chunks = await connection.fetchval(_HYPERTABLE) if quotes and capability.timescaledb else None
            readable = state["migrated"] and not {_NO_SCHEMA, _NO_REVISION} & {*lacking}
            revision = await connection.fetchval(_REVISION) if readable else None
            strangers = tuple(row[0] for row in await connection.fetch(STRANGERS)) if quotes is None else ()
            commits, waiting = await connection.fetchrow(_WAITING) or (0, timedelta(0))
            server_settings = await _needs(connection, capability, quotes)
            connections, limit = await connection.fetchrow(_CONNECTIONS) or (None, "")
            identifier = None if server is None else server.control.system
            store = await connection.fetchval(_STORE, str(identifier), quotes) if quotes else None
            flaw = None
            if not missing and not lacking:
                flaw = await _flaw(connection)
                try:
                    database.facts = Facts.of(await connection.fetchrow(FACTS))
                except SchemaMismatch:
                    flaw = flaw or "quotes.settings has no row"
                except asyncpg.UndefinedColumnError as error:
                    flaw = flaw or f"quotes.settings: {_said(error)}"
            # A standby has no say in whether there is room.
            writes = not (missing or lacking or flaw or state["read_only"])
            full = await _is_full(connection) if writes else False
            if writes and not full and database.refusal is not None:
                await self._write(connection)
        since = time.monotonic() - database.damaged
        return Observation(
            capability,
            quotes is not None,
            state["key"],
            chunks,
            revision,
            clock,
            database.host,
            database.writable,
            waiting,
            timedelta(seconds=since) if math.isfinite(since) else None,
            store,
            database.facts,
            state["standby"],
            state["read_only"],
            missing,
            lacking,
            flaw,
            full,
            None if database.refusal is None else database.refusal[1],
            connections,
            commits,
            server_settings,
            encoding_fault(connection),
            tuple(state["hidden"]),
            limit,
            strangers,
        )

    async def _write(self, connection: Connection) -> None:
        """After a write was refused, see whether one is taken; the next one of a client may be long in coming."""
        with suppress(asyncpg.PostgresError):
            await connection.execute(_WRITE)
            self._database.refusal = None

    async def _difference(self, connection: Connection) -> ClockDifference:
        """Compare the clocks: the server looked at its own at some moment between question and answer."""
        asked = self._clock()
        there: datetime = await connection.fetchval(_CLOCK)
        answered = self._clock()
        within = (answered - asked) / 2
        return ClockDifference((asked + within - there).total_seconds(), abs(within.total_seconds()))


async def _needs(connection: Connection, capability: Capability, quotes: int | None) -> needs.Server:
    settings = {row[0]: row[1] for row in await connection.fetch(_SETTINGS, list(needs.NAMES))}
    if quotes is None:
        return needs.Server(settings)
    relations = await connection.fetchval(_RELATIONS, quotes)
    if capability.timescaledb is not None:
        relations += await connection.fetchval(_COMPRESSED)
    owner, database = await connection.fetchrow(_NAMES, quotes) or ("", "")
    return needs.Server(settings, relations, capability.postgresql_major, owner, database)


async def _flaw(connection: Connection) -> str | None:
    """Why the server cannot plan what a write does, in its own words, which are of the schema; None if it can."""
    try:
        await connection.execute(_PLANS)
    except (asyncpg.SyntaxOrAccessError, asyncpg.FeatureNotSupportedError, asyncpg.DataError) as error:
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


async def _is_full(connection: Connection) -> bool:
    """Whether a file of some hundred kB has no room on the volume; the session is of no use for more then."""
    try:
        await connection.execute(_ROOM)
    except asyncpg.DiskFullError:
        return True
    except asyncpg.PostgresError:
        # As where the size of such files is limited: it says nothing of the room.
        await connection.execute("ROLLBACK")
    return False
