"""Statements about the store itself: what the health checks look at.

Invariant: nothing here reads quotes, so nothing here grows with them.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from app.db import hosts
from app.db.capability import DETECT, Capability
from app.db.engine import Connection, Database, read_facts
from app.db.facts import Facts
from app.db.hosts import Writable

_TABLE: Final = """
SELECT to_regclass('quotes.real_time') IS NOT NULL,
       (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i
        CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE i.indrelid = to_regclass('quotes.real_time') AND i.indisprimary)
"""
_HYPERTABLE: Final = """
SELECT num_chunks FROM timescaledb_information.hypertables
WHERE hypertable_schema = 'quotes' AND hypertable_name = 'real_time'
"""
# A logical restore makes new identifiers, a recovery to a point in time and a failover a new timeline.
_STORE: Final = """
SELECT left(encode(sha256(convert_to(concat_ws('.', $1::text, left(pg_walfile_name(pg_current_wal_lsn()), 8),
           (SELECT oid FROM pg_database WHERE datname = current_database()),
           to_regclass('quotes.real_time')::oid), 'UTF8')), 'hex'), 16)
WHERE NOT pg_is_in_recovery()
"""
_REVISION: Final = "SELECT version_num FROM alembic_version"
_CLOCK: Final = "SELECT clock_timestamp()"
#: How long the oldest commit of this role waits for a standby.
_WAITING: Final = """
SELECT coalesce(max(clock_timestamp() - query_start), interval '0') FROM pg_stat_activity
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
    `writable` has the servers that take writes where several were looked at, `host` the one that is written to.
    `waiting` is the longest wait of a commit for a standby, `damaged` how long ago the server reported an error of its
    own; `facts` are the settings of the store. `store` is another text wherever quotes that were acknowledged may not
    be there; None without a table, or on a standby.
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


class SystemRepository:
    """Looks at the store over a connection of its own, so that a busy pool never looks like a dead database."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._clock = clock

    async def observe(self, timeout: float) -> Observation:
        """Look at the server and the schema.

        Raises:
            DatabaseUnavailable: no connection within `timeout` seconds.
            QueryTimeout: the server took too long to answer.
        """
        async with self._database.dedicated(timeout) as connection:
            if server := await self._database.identify(connection):
                self._database.notice(server)
            clock = await self._difference(connection)
            capability = Capability.of(await connection.fetchrow(DETECT) or ())
            exists, key = await connection.fetchrow(_TABLE) or (False, None)
            chunks = await connection.fetchval(_HYPERTABLE) if exists and capability.timescaledb else None
            migrated = await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL")
            revision = await connection.fetchval(_REVISION) if migrated else None
            waiting = await connection.fetchval(_WAITING)
            identifier = (await hosts.control(connection)).system
            store = await connection.fetchval(_STORE, str(identifier)) if exists else None
            self._database.facts = await read_facts(connection, self._database.facts)
        since = time.monotonic() - self._database.damaged
        damaged = timedelta(seconds=since) if math.isfinite(since) else None
        host, writable = self._database.host, self._database.writable
        return Observation(
            capability,
            exists,
            key,
            chunks,
            revision,
            clock,
            host,
            writable,
            waiting,
            damaged,
            store,
            self._database.facts,
        )

    async def _difference(self, connection: Connection) -> ClockDifference:
        """Compare the clocks: the server looked at its own at some moment between question and answer."""
        asked = self._clock()
        there: datetime = await connection.fetchval(_CLOCK)
        answered = self._clock()
        within = (answered - asked) / 2
        return ClockDifference((asked + within - there).total_seconds(), abs(within.total_seconds()))
