"""What the connected server can do, detected once, from the server itself.

Invariant: a level is what was observed, never what was hoped for; only migrations, maintenance and the
choice between rollups and raw quotes branch on it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Self


class Level(IntEnum):
    """Capability levels, each with all that the ones below have."""

    POSTGRESQL = 0
    APACHE = 1
    COMMUNITY = 2

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def lacks(self) -> str:
        """What an operator does without at this level."""
        return _LACKS[self]


_LACKS: Final = {
    Level.COMMUNITY: "",
    Level.APACHE: "no columnstore, no continuous aggregates, no background policies: "
    "bars are computed from raw quotes, and `maintain` does the retention",
    Level.POSTGRESQL: "no hypertable, no columnstore, no continuous aggregates, no background policies: "
    "bars are computed from raw quotes, and `maintain` does the retention",
}

#: The levels by their names in the setting `require_timescaledb`.
REQUIRED: Final = {"community": Level.COMMUNITY, "apache": Level.APACHE, "none": Level.POSTGRESQL}
#: The releases of PostgreSQL, from the oldest to the newest, that the tests run on.
POSTGRESQL: Final = (16, 18)
#: The oldest TimescaleDB that is wanted: 2.29.1 mended a vulnerability, and 2.29.2 is what is tested in full.
TIMESCALEDB: Final = (2, 29, 2)
#: The oldest on which the schema and every statement are tested; older ones are not known to work.
OLDEST_TIMESCALEDB: Final = (2, 23, 0)
#: Whether the store is one from before the row was decided, which nothing can turn into one of today.
IS_UNRELEASED: Final = """
SELECT EXISTS (
    SELECT FROM pg_class WHERE relnamespace = to_regnamespace('quotes') AND relname = 'real_time'
    AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'nanos'))
"""
UNRELEASED_STORE: Final = (
    "This store was made before the first release, with rows that cannot be converted in place; read its quotes with"
    " the version that made it, and load them into an empty database with this one, as the page on upgrades says."
)
#: What is in our schema where there is no store, and not of an extension: another application's; a text for each. A
#: revision without tables is left by a first migration that did not get through.
STRANGERS: Final = """
WITH found AS (
    SELECT CASE relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
                        WHEN 'c' THEN 'type' ELSE 'table' END AS kind,
           relname AS name, relowner AS owner, relnamespace AS schema, oid, tableoid
    FROM pg_class WHERE relkind NOT IN ('i', 'I', 't')
    AND NOT (relname = 'alembic_version' AND EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'version_num'))
    UNION ALL SELECT 'function', proname, proowner, pronamespace, oid, tableoid FROM pg_proc
    UNION ALL
    SELECT 'type', typname, typowner, typnamespace, oid, tableoid FROM pg_type WHERE typtype IN ('d', 'e', 'r'))
SELECT format('%s quotes.%I of %I', kind, name, pg_get_userbyid(owner)) FROM found
WHERE schema = to_regnamespace('quotes')
      AND NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = schema AND relname = 'real_time')
      AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = found.tableoid AND objid = found.oid AND (
          deptype = 'e' OR (kind IN ('sequence', 'function') AND deptype IN ('a', 'i'))))
ORDER BY 1
"""
_NAMED: Final = 5


def strangers_fault(found: Sequence[str]) -> str:
    """What there is to say of what `STRANGERS` finds."""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f"The schema quotes of this database has what is not the store's, {', '.join(found[:_NAMED])}{more}: give the"
        " store a database of its own."
    )


#: Comment on a database whose restore has begun and not ended, whatever it has got to.
HALF_RESTORED: Final = "opa-quotes: a restore into this database did not finish; drop it"
#: One row: server version, TimescaleDB version or NULL, TimescaleDB licence or NULL.
DETECT: Final = """
SELECT current_setting('server_version') AS postgresql,
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS timescaledb,
       current_setting('timescaledb.license', true) AS license
"""


@dataclass(frozen=True, slots=True)
class Capability:
    """The level of a server, with the versions that it was read from."""

    level: Level
    postgresql: str
    timescaledb: str | None
    license: str | None

    @property
    def postgresql_major(self) -> int:
        """The release of the server."""
        return release(self.postgresql)[0]

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Read the row that `DETECT` returns."""
        postgresql, timescaledb, license_ = row[0], row[1], row[2]
        if timescaledb is None:
            return cls(Level.POSTGRESQL, postgresql, None, None)
        level = Level.COMMUNITY if license_ == "timescale" else Level.APACHE
        return cls(level, postgresql, timescaledb, license_)


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: of `2.23.0-dev` 2, 23 and 0."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)


def named(numbers: Sequence[int]) -> str:
    """A version as it is written."""
    return ".".join(map(str, numbers))
