"""Statements about the store itself: what the health checks look at.

Invariant: nothing here reads quotes, so nothing here grows with them.
"""

from dataclasses import dataclass
from typing import Final

from app.db.capability import DETECT, Capability
from app.db.engine import Database

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
_REVISION: Final = "SELECT version_num FROM alembic_version"


@dataclass(frozen=True, slots=True)
class Observation:
    """What the server and its schema look like now.

    `chunks` is None where `quotes.real_time` is no hypertable; `revision` is None where nothing was migrated.
    """

    capability: Capability
    table_exists: bool
    primary_key: list[str] | None
    chunks: int | None
    revision: str | None


class SystemRepository:
    """Looks at the store over a connection of its own, so that a busy pool never looks like a dead database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def observe(self, timeout: float) -> Observation:
        """Look at the server and the schema.

        Raises:
            DatabaseUnavailable: no connection within `timeout` seconds.
            QueryTimeout: the server took too long to answer.
        """
        async with self._database.dedicated(timeout) as connection:
            capability = Capability.of(await connection.fetchrow(DETECT) or ())
            exists, key = await connection.fetchrow(_TABLE) or (False, None)
            chunks = await connection.fetchval(_HYPERTABLE) if exists and capability.timescaledb else None
            migrated = await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL")
            revision = await connection.fetchval(_REVISION) if migrated else None
        return Observation(capability, exists, key, chunks, revision)
