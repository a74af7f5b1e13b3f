"""Statements of backup and restore: a snapshot, what a store holds, the record, and what makes a restored store whole.

Invariant: a snapshot is taken after the locks that keep its quotes in place, because the columnstore truncates chunks,
which no snapshot survives. A restored store has its revision last: without it the service takes it for no store.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Self
from urllib.parse import unquote, urlsplit

import asyncpg
import msgspec

from app.db import hosts
from app.db.capability import DETECT, Capability, Level
from app.db.engine import Connection, Database
from app.db.failures import translate
from app.errors import BackupError, QuotesError
from app.settings import Settings

_STATEMENT: Final = timedelta(days=7)  # a pass over all quotes of a large store
_LOCK_MS: Final = 60_000
_CONNECT: Final = 10.0
#: Jobs that wait for a backup are put off by this much, and again before it is over; a killed backup costs no more.
_PUT_OFF: Final = timedelta(minutes=10)
_RUNNING_LIMIT: Final = timedelta(minutes=10)
_OWNERS_AT_ONCE: Final = 100

_SESSION: Final = "SET idle_in_transaction_session_timeout = 0; SET application_name = 'opa-quotes backup'"
# By way of the rollups' views also what they are made of. ACCESS SHARE is what any read takes.
_LOCK: Final = """
LOCK TABLE quotes.real_time, quotes.latest, quotes.ohlc_1m, quotes.ohlc_1h, quotes.ohlc_1d IN ACCESS SHARE MODE
"""
# Both take a chunk away from under whoever reads it: they would wait for the end of the dump, and all reads of the
# chunk behind them.
_BLOCKING: Final = """
(proc_name = 'policy_compression' AND job.hypertable_schema = 'quotes'
 OR proc_name = 'apply_retention' AND job.proc_schema = 'quotes')
"""
_RUNNING: Final = f"""
SELECT EXISTS (SELECT FROM timescaledb_information.jobs job JOIN timescaledb_information.job_stats USING (job_id)
               WHERE {_BLOCKING} AND job_status = 'Running')
"""
_POSTPONE: Final = f"""
SELECT alter_job(job_id, next_start => now() + $1) FROM timescaledb_information.jobs job
WHERE {_BLOCKING} AND scheduled AND coalesce(next_start, now()) < now() + $1
"""
# The record of backups grows by the very backup that is compared, and the revision comes last.
_TABLES: Final = """
SELECT format('%I.%I', 'quotes', relname) FROM pg_class
WHERE relnamespace = 'quotes'::regnamespace AND relkind IN ('r', 'p') AND relname NOT IN ('backups', 'alembic_version')
ORDER BY 1
"""
_CONTENT: Final = "SELECT count(*), coalesce(sum(hashtextextended(r::text, 0)::numeric), 0)::text FROM {} r"
_JOBS: Final = """
SELECT concat_ws(' | ', proc_name, coalesce(view.view_name, job.hypertable_name), schedule_interval,
                 CASE WHEN scheduled THEN 'scheduled' ELSE 'not scheduled' END,
                 config - 'hypertable_id' - 'mat_hypertable_id')
FROM timescaledb_information.jobs job
LEFT JOIN timescaledb_information.continuous_aggregates view
       ON view.materialization_hypertable_schema = job.hypertable_schema
      AND view.materialization_hypertable_name = job.hypertable_name
WHERE job_id >= 1000 ORDER BY 1
"""
# Why a dump of the schema alone would not be a store: it lacks the revision, or TimescaleDB's catalog, which is dumped
# as one, names what the dump lacks.
_OLD: Final = """
SELECT 'the revision of a store until r6 is in the schema public' WHERE to_regclass('quotes.alembic_version') IS NULL
"""
_SHARED: Final = """
SELECT format('TimescaleDB''s catalog, which cannot be dumped in part, has %I.%I of another application', schema, name)
FROM (SELECT schema_name, table_name FROM _timescaledb_catalog.hypertable
      WHERE schema_name NOT IN ('quotes', '_timescaledb_internal')
      UNION ALL SELECT user_view_schema, user_view_name FROM _timescaledb_catalog.continuous_agg
      WHERE user_view_schema <> 'quotes'
      UNION ALL SELECT proc_schema, proc_name FROM _timescaledb_catalog.bgw_job
      WHERE id >= 1000 AND proc_schema NOT IN ('quotes', '_timescaledb_functions', '_timescaledb_internal')
     ) AS foreign_one (schema, name) ORDER BY 1 LIMIT 1
"""
_UNREADABLE: Final = """
SELECT quote_ident(current_user), format('%I.%I', nspname, relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind IN ('r', 'p', 'm', 'S') AND nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                  AND d.deptype = 'e')
  AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
ORDER BY 2 LIMIT 1
"""
_RECORD: Final = "INSERT INTO quotes.backups (bytes, verified) VALUES ($1, $2)"

_ROLE: Final = """
SELECT current_user::text, rolsuper FROM pg_roles WHERE rolname = current_user
"""
_MAY_CREATE: Final = """
SELECT quote_ident(rolname), rolsuper OR rolcreatedb, rolsuper FROM pg_roles WHERE rolname = current_user
"""
_KNOWN_ROLE: Final = """
SELECT rolcanlogin AS logs_in, pg_has_role(current_user, oid, 'MEMBER') AS ours FROM pg_roles WHERE rolname = $1
"""
# What is not of an extension, nor of the server.
_FOREIGN: Final = """
SELECT format('%I.%I', nspname, relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND nspname NOT LIKE 'pg\\_temp%'
  AND relkind IN ('r', 'p', 'v', 'm', 'f')
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                  AND d.deptype = 'e')
ORDER BY nspname <> 'quotes', 1 LIMIT 1
"""
_COMMENT: Final = """
SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()
"""
_VERSIONS: Final = """
SELECT (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS installed,
       current_setting('timescaledb.max_background_workers', true) IS NOT NULL AS loaded,
       ARRAY(SELECT version FROM pg_available_extension_versions WHERE name = 'timescaledb' ORDER BY 1) AS available
"""
_NOT_OWNED: Final = """
SELECT format('ALTER %s %I.%I OWNER TO %I', CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW'
              WHEN 'S' THEN 'SEQUENCE' WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END, nspname, relname, $1::text)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  AND relowner <> (SELECT oid FROM pg_roles WHERE rolname = $1)
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                  AND (d.deptype = 'e' OR relkind = 'S' AND d.deptype IN ('a', 'i')))
UNION ALL
SELECT format('ALTER ROUTINE %s OWNER TO %I', oid::regprocedure, $1::text) FROM pg_proc
WHERE pronamespace = 'quotes'::regnamespace AND proowner <> (SELECT oid FROM pg_roles WHERE rolname = $1)
UNION ALL
SELECT format('ALTER SCHEMA quotes OWNER TO %I', $1::text)
"""
# The statements of docs/deployment.md, under "Roles".
_LATER_TABLES: Final = """
ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA quotes GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role}
"""
_GRANTS: Final = (
    "GRANT USAGE ON SCHEMA quotes TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA quotes TO {role}",
    _LATER_TABLES,
)
# The dump of a store has no privileges on a schema that others share.
_USED: Final = """
SELECT format('GRANT USAGE ON SCHEMA %I TO ', nspname) FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
WHERE extname = 'timescaledb'
"""
# A job runs as its owner, who must own what it works on and be able to log in.
_LAME_JOBS: Final = """
SELECT string_agg(job.id::text, ', ' ORDER BY job.id) FROM _timescaledb_catalog.bgw_job job
JOIN _timescaledb_catalog.hypertable ON hypertable.id = job.hypertable_id
JOIN pg_class c ON c.oid = format('%I.%I', schema_name, table_name)::regclass
JOIN pg_roles role ON role.oid = job.owner
WHERE job.id >= 1000 AND (c.relowner <> job.owner OR NOT role.rolcanlogin)
"""

Counted = tuple[int, str]


@contextmanager
def told() -> Iterator[None]:
    """Raise what the driver raises as errors of this project; what a server refused is told in its own words."""
    try:
        yield
    except QuotesError:
        raise
    except Exception as error:
        if isinstance(error, asyncpg.PostgresError) and not isinstance(error, asyncpg.PostgresConnectionError):
            raise BackupError(f"The database refused: {str(error).splitlines()[0].rstrip('.')}.") from error
        ours = translate(error)
        if ours is None:
            raise
        raise ours from error


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds: of each table and rollup the rows, and a hash of them that knows no order."""

    revision: str | None
    level: str
    tables: dict[str, Counted]
    bars: dict[str, Counted]
    jobs: list[str]

    def without_bars(self) -> Self:
        """The same, for a comparison that is not about rollups."""
        return msgspec.structs.replace(self, bars={})

    def differences(self, other: Self) -> list[str]:
        """In what another store departs from this one, in sentences; none if they hold the same."""
        found = [
            f"{what}: {ours} here, {theirs} there."
            for what, ours, theirs in (
                ("revision", self.revision, other.revision), ("level", self.level, other.level),
            ) if ours != theirs
        ]  # fmt: skip
        here, there = self.tables | self.bars, other.tables | other.bars
        for name in sorted(here.keys() | there.keys()):
            ours, theirs = here.get(name), there.get(name)
            if ours is None or theirs is None:
                found.append(f"{name}: only {'there' if ours is None else 'here'}.")
            elif ours[0] != theirs[0]:
                found.append(f"{name}: {ours[0]} rows here, {theirs[0]} there.")
            elif ours != theirs:
                found.append(f"{name}: as many rows, with other values.")
        if self.jobs != other.jobs:
            found.append(f"jobs: {len(self.jobs)} here, {len(other.jobs)} there, or with another configuration.")
        return found


async def writing_host(url: str) -> str:
    """The URL of the one host, of those that `url` names, that takes writes.

    Raises:
        DatabaseUnavailable: none can be reached.
    """
    urls = hosts.hosts_of(url)
    with told():
        found = await hosts.find_primary(urls, _CONNECT)
        await found.connection.close(timeout=2)
    return urls[found.place]


@asynccontextmanager
async def session(url: str, settings: Settings) -> AsyncIterator[Connection]:
    """A connection whose statements may take days.

    Raises:
        DatabaseUnavailable: it cannot be reached, or broke.
        BackupError: the server refused a statement.
    """
    with told():
        connection = await Database(url, settings).open(_CONNECT, _STATEMENT)
        try:
            await connection.execute(_SESSION)
            yield connection
            await connection.close(timeout=2)
        finally:
            # After an error there may be a statement that was given up, for which `close` would wait.
            connection.terminate()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One instant of a store, for as long as its block lasts: for a dump by its `id`, and for statements.

    A store is in `schemas`; with none of them the dump has to be of the whole database, for the reason `whole`.
    """

    id: str
    major: int
    size: int
    schemas: Sequence[str]
    timescaledb: bool
    whole: str
    connection: Connection

    async def content(self) -> Content:
        """What the store held at that instant."""
        return await content(self.connection)


@asynccontextmanager
async def snapshot(url: str, settings: Settings) -> AsyncIterator[Snapshot]:
    """Freeze what is seen of the store, and keep its chunks in place.

    Raises:
        DatabaseUnavailable: it cannot be reached, or the connection broke.
        BackupError: there is no store, a table stayed locked for a minute, or what is to be dumped cannot be read.
    """
    async with session(url, settings) as connection:
        if await connection.fetchval("SELECT to_regclass('quotes.real_time') IS NULL"):
            raise BackupError("There are no quotes in this database: quotes.real_time does not exist.")
        await connection.execute(f"SET lock_timeout = {_LOCK_MS}")
        major = connection.get_server_version().major
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(_LOCK)
            name = await connection.fetchval("SELECT pg_export_snapshot()")
            size = await connection.fetchval("SELECT pg_database_size(current_database())")
            timescaledb = Capability.of(await connection.fetchrow(DETECT) or ()).timescaledb is not None
            whole = await _whole(connection, timescaledb=timescaledb)
            schemas = () if whole else ("quotes", "_timescaledb_internal") if timescaledb else ("quotes",)
            yield Snapshot(name, major, size, schemas, timescaledb, whole, connection)


async def _whole(connection: Connection, *, timescaledb: bool) -> str:
    """Why the whole database has to be dumped; empty where the store's schemas make a dump that can be restored."""
    found: str = await connection.fetchval(_OLD) or (await connection.fetchval(_SHARED) if timescaledb else None) or ""
    if found and (unreadable := await connection.fetchrow(_UNREADABLE)) is not None:
        role, relation = unreadable
        raise BackupError(
            f"The whole database has to be dumped, because {found}, and {role} lacks SELECT on {relation}:"
            f" GRANT pg_read_all_data TO {role}, or use another role."
        )
    return found


class HeldJobs:
    """Policies that would take chunks away from under a dump, put off while it lasts.

    `refusal` says why they could not be; the backup is as good, but reads may have to wait for it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.refusal: str | None = None

    async def start(self) -> None:
        """Put the jobs off, and wait for one that runs, for ten minutes at most."""
        await self._postpone()
        deadline = datetime.now(UTC) + _RUNNING_LIMIT
        while await self._connection.fetchval(_RUNNING):
            if datetime.now(UTC) > deadline:
                self.refusal = "a job of the columnstore or of retention has been running for ten minutes"
                return
            await asyncio.sleep(1)

    async def keep(self) -> None:
        """Put them off again and again, until cancelled."""
        while self.refusal is None:
            await asyncio.sleep(_PUT_OFF.total_seconds() / 3)
            await self._postpone()

    async def _postpone(self) -> None:
        try:
            await self._connection.fetch(_POSTPONE, _PUT_OFF)
        except asyncpg.PostgresError as error:
            self.refusal = str(error).splitlines()[0]


@asynccontextmanager
async def jobs_held(url: str, settings: Settings) -> AsyncIterator[str | None]:
    """Put off, until the end of the block, the policies that would wait for a dump and let reads wait for them.

    Yields why that cannot be done, None where it is or where there are no policies.
    """
    async with session(url, settings) as connection:
        capability = Capability.of(await connection.fetchrow(DETECT) or ())
        if capability.level < Level.COMMUNITY:
            yield None
            return
        held = HeldJobs(connection)
        await held.start()
        task = asyncio.create_task(held.keep())
        try:
            yield held.refusal
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def content(connection: Connection) -> Content:
    """What the store holds: a pass over all of it."""
    capability = Capability.of(await connection.fetchrow(DETECT) or ())
    community = capability.level >= Level.COMMUNITY
    # Without continuous aggregates bars are views on quotes that were hashed: one that is on all the others will do.
    rollups = ("quotes.ohlc_1m", "quotes.ohlc_1h", "quotes.ohlc_1d") if community else ("quotes.ohlc_1d",)
    migrated = await connection.fetchval("SELECT to_regclass('quotes.alembic_version') IS NOT NULL")
    return Content(
        revision=await connection.fetchval("SELECT version_num FROM quotes.alembic_version") if migrated else None,
        level=str(capability.level),
        tables={name: await _counted(connection, name) for (name,) in await connection.fetch(_TABLES)},
        bars={name: await _counted(connection, name) for name in rollups},
        jobs=[row[0] for row in await connection.fetch(_JOBS)] if community else [],
    )


async def _counted(connection: Connection, name: str) -> Counted:
    rows, digest = await connection.fetchrow(_CONTENT.format(name)) or (0, "0")
    return rows, digest


async def record(url: str, settings: Settings, size: int, *, verified: bool) -> str | None:
    """Note in the store that a backup of `size` bytes succeeded; why that could not be, None if it was."""
    try:
        async with session(url, settings) as connection:
            await connection.execute(_RECORD, size, verified)
    except QuotesError as error:
        return error.detail
    return None


# --- restore ---


@dataclass(frozen=True, slots=True)
class Job:
    """The jobs of a dump as COPY writes them: the table's columns, and a list of values for each."""

    schema: str
    columns: list[str]
    rows: list[list[str]]

    def owned_by(self, role: str) -> bytes:
        """The rows, with every job given to a role, whose name is quoted where it has to be."""
        place = self.columns.index("owner")
        name = role.replace("\\", "\\\\")
        lines = ["\t".join([*row[:place], name, *row[place + 1 :]]) for row in self.rows]
        return "".join(f"{line}\n" for line in lines).encode()


@dataclass(frozen=True, slots=True)
class Role:
    """The role of a connection."""

    name: str
    superuser: bool


def database_of(url: str) -> str:
    """The name of a URL's database."""
    return unquote(urlsplit(url).path.removeprefix("/"))


def beside(url: str, database: str) -> str:
    """The URL of another database of the same server."""
    parts = urlsplit(url)
    start = url.index(parts.path, url.index("//") + 2 + len(parts.netloc)) if parts.path else len(url)
    return f"{url[:start]}/{database}{url[start + len(parts.path) :]}"


async def exists(url: str, settings: Settings) -> bool:
    """Whether a URL's database exists; the server is asked by way of the database `postgres`."""
    async with session(beside(url, "postgres"), settings) as connection:
        found: bool = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", database_of(url)
        )
    return found


async def create(url: str, settings: Settings, *, owner: str | None = None, comment: str | None = None) -> None:
    """Create a URL's database.

    Raises:
        BackupError: the role may not, or there is one.
    """
    async with session(beside(url, "postgres"), settings) as connection:
        name, role = await _quoted(connection, database_of(url), owner or "")
        await _require_createdb(connection, name)
        await connection.execute(f"CREATE DATABASE {name}" + (f" OWNER {role}" if owner else ""))
        if comment is not None:
            await connection.execute(f"COMMENT ON DATABASE {name} IS {await _literal(connection, comment)}")


async def _require_createdb(connection: Connection, name: str) -> None:
    us, may, _ = await connection.fetchrow(_MAY_CREATE) or ("", False, False)
    if not may:
        raise BackupError(f"{us} may not create the database {name}: ALTER ROLE {us} CREATEDB, or use another role.")


async def require_scratch(url: str, settings: Settings, scratch: str) -> None:
    """Refuse a role that could not restore a dump of a store into the database of the URL `scratch`.

    Raises:
        BackupError: it may not create one, or restore TimescaleDB's catalog.
    """
    async with session(url, settings) as connection:
        capability = Capability.of(await connection.fetchrow(DETECT) or ())
        us, _, superuser = await connection.fetchrow(_MAY_CREATE) or ("", False, False)
        (name,) = await _quoted(connection, database_of(scratch))
        if capability.timescaledb is not None and not superuser:
            raise BackupError(
                f"--verify creates the database {name} and restores TimescaleDB's catalog into it, which takes a"
                f" superuser, and {us} is none: dump without --verify, or use another role."
            )
        await _require_createdb(connection, name)


async def drop_scratch(url: str, settings: Settings, comment: str) -> None:
    """Drop a URL's database if there is one and it has the comment; whoever uses it is not disturbed.

    Raises:
        BackupError: it is in use, or is another's.
    """
    async with session(beside(url, "postgres"), settings) as connection:
        found = await connection.fetchrow(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", database_of(url)
        )
        if found is None:
            return
        (name,) = await _quoted(connection, database_of(url))
        if found[0] != comment:
            raise BackupError(f"The database {name} is in the way, and is none that a backup made: drop or rename it.")
        await connection.execute(f"DROP DATABASE {name}")


async def _quoted(connection: Connection, *names: str) -> list[str]:
    """Names as SQL writes them, in quotes where they need them."""
    rows = await connection.fetch("SELECT quote_ident(name) FROM unnest($1::text[]) WITH ORDINALITY AS g (name, n)"
                                  " ORDER BY n", list(names))  # fmt: skip
    return [row[0] for row in rows]


async def _literal(connection: Connection, text: str) -> str:
    quoted: str = await connection.fetchval("SELECT quote_literal($1::text)", text)
    return quoted


class RestoreRepository:
    """The database that is restored into, over one connection, and the steps that make it a store."""

    def __init__(self, connection: Connection, role: Role) -> None:
        self._connection = connection
        self.role = role
        self.major = connection.get_server_version().major

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, settings: Settings) -> AsyncIterator[Self]:
        """On a connection of its own.

        Raises:
            DatabaseUnavailable: it cannot be reached, or broke.
            BackupError: the server refused a statement.
        """
        async with session(url, settings) as connection:
            name, superuser = await connection.fetchrow(_ROLE) or ("", False)
            yield cls(connection, Role(name, superuser))

    async def require_empty(self) -> None:
        """Refuse a database that has anything in it."""
        comment = await self._connection.fetchval(_COMMENT)
        found = await self._connection.fetchval(_FOREIGN)
        if found is not None:
            half = f" ({comment})" if comment and comment.startswith("opa-quotes:") else ""
            raise BackupError(
                f"The database is not empty: it has {found}{half}. A restore goes into a new one, which --create makes."
            )

    async def require_roles(self, owner: str, grants: Sequence[str], *, jobs: bool) -> None:
        """Refuse roles that do not exist, or an owner that objects cannot be given to."""
        for name in [owner, *grants]:
            known = await self._connection.fetchrow(_KNOWN_ROLE, name)
            if known is None:
                raise BackupError(f"There is no role {name} on this server: CREATE ROLE first.")
            if name == owner and not known["ours"]:
                raise BackupError(f"{self.role.name} is no member of {owner} and cannot give it the store.")
            if name == owner and jobs and not known["logs_in"]:
                raise BackupError(
                    f"{owner} cannot log in, which background jobs do as their owner: ALTER ROLE … LOGIN."
                )

    async def require_timescaledb(self, version: str, schema: str, *, policies: bool) -> None:
        """Refuse a server that cannot restore a dump of TimescaleDB of that version; else create the extension.

        It has to be in the schema, quoted where it has to be, that the dump has it in: what was dumped names it.
        """
        installed, loaded, available = await self._connection.fetchrow(_VERSIONS) or (None, False, [])
        if not loaded:
            raise BackupError(f"The dump has TimescaleDB {version}, and this server has not loaded TimescaleDB.")
        if (installed or version) != version or version not in available:
            there = installed or ", ".join(available) or "none"
            raise BackupError(
                f"The dump has TimescaleDB {version}, and this server {there}: restore with the same version, and"
                " upgrade afterwards."
            )
        if not self.role.superuser:
            raise BackupError(
                f"A store with TimescaleDB is restored by a superuser, which {self.role.name} is not: its catalog and"
                " timescaledb_pre_restore() take one. The restored store then belongs to --owner."
            )
        if installed is None:
            await self._connection.execute(
                f"CREATE SCHEMA IF NOT EXISTS {schema}; SET search_path = {schema};"
                f" CREATE EXTENSION timescaledb SCHEMA {schema} VERSION '{version}'"
            )
        if policies and await self._connection.fetchval("SHOW timescaledb.license") != "timescale":
            raise BackupError(
                "The dump is of the community edition of TimescaleDB, and this server has the Apache one."
            )

    async def say(self, comment: str | None) -> None:
        """Write on the database what state it is in; None: nothing is to be said."""
        (name,) = await _quoted(self._connection, await self._connection.fetchval("SELECT current_database()"))
        text = "NULL" if comment is None else await _literal(self._connection, comment)
        await self._connection.execute(f"COMMENT ON DATABASE {name} IS {text}")

    async def pre_restore(self) -> None:
        """Stop TimescaleDB's workers and hooks in this database, also for sessions to come."""
        await self._connection.execute("SELECT timescaledb_pre_restore()")

    async def post_restore(self) -> None:
        """End what `pre_restore` began; jobs run from here on."""
        await self._connection.execute("SELECT timescaledb_post_restore()")

    async def leave_restoring(self) -> None:
        """End restoring mode for sessions to come, without starting a job."""
        (name,) = await _quoted(self._connection, await self._connection.fetchval("SELECT current_database()"))
        await self._connection.execute(f"ALTER DATABASE {name} RESET timescaledb.restoring")

    async def give(self, owner: str) -> None:
        """Make a role the owner of everything that was restored, without the hooks of TimescaleDB."""
        statements = [row[0] for row in await self._connection.fetch(_NOT_OWNED, owner)]
        for start in range(0, len(statements), _OWNERS_AT_ONCE):
            await self._connection.execute(";\n".join(statements[start : start + _OWNERS_AT_ONCE]))

    async def known(self, roles: set[str]) -> set[str]:
        """Those of the roles, given as SQL writes them, that exist here."""
        rows = await self._connection.fetch(
            "SELECT quote_ident(rolname) FROM pg_roles WHERE quote_ident(rolname) = ANY($1::text[])", sorted(roles)
        )
        return {row[0] for row in rows}

    async def quoted(self, role: str) -> str:
        """A role's name as SQL writes it."""
        return (await _quoted(self._connection, role))[0]

    async def execute(self, statements: Sequence[str]) -> None:
        """Run statements of the dump."""
        for statement in statements:
            await self._connection.execute(statement)

    async def grant(self, role: str, owner: str) -> None:
        """Give a role what it needs to serve."""
        name, of = await _quoted(self._connection, role, owner)
        await self.execute([statement.format(role=name, owner=of) for statement in _GRANTS])

    async def let_use_timescaledb(self, roles: Sequence[str]) -> None:
        """Give roles, as SQL writes them, what a session needs to call TimescaleDB's functions."""
        grant = await self._connection.fetchval(_USED)
        await self.execute([grant + role for role in roles])

    async def add_jobs(self, jobs: Job, owner: str) -> None:
        """Add the background jobs of the dump, as an owner's."""
        await self._connection.copy_to_table(
            "bgw_job",
            schema_name=jobs.schema,
            columns=jobs.columns,
            source=io.BytesIO(jobs.owned_by(await self.quoted(owner))),
            format="text",
        )

    async def analyze(self) -> None:
        """Collect the statistics that plans need."""
        await self._connection.execute("ANALYZE")

    async def require_working_jobs(self) -> None:
        """Refuse jobs that could not do their work as their owner."""
        lame = await self._connection.fetchval(_LAME_JOBS)
        if lame:
            raise BackupError(f"The jobs {lame} do not belong to the owner of what they work on.")

    async def content(self, *, restoring: bool) -> Content:
        """What the restored store holds; the database stays in restoring mode, so that no job runs meanwhile."""
        if not restoring:
            return await content(self._connection)
        await self._connection.execute("SET timescaledb.restoring = off")
        found = await content(self._connection)
        await self._connection.execute("SET timescaledb.restoring = on")
        return found
