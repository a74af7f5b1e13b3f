"""Runs the migrations: one at a time across all instances, each in its own transaction, within timeouts.

Invariant: whoever waits for the advisory lock finds the work done by whoever held it, so many instances may
start together. A statement that cannot get its lock within seconds fails rather than queue up traffic. The revision is
in the store's own schema, since a database may be shared with another application that alembic migrates.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.db import embedded, failures, needs, sessions
from app.db.capability import (
    DETECT,
    HALF_RESTORED,
    IS_UNRELEASED,
    REQUIRED,
    STRANGERS,
    UNRELEASED_STORE,
    Capability,
    Level,
    strangers_fault,
)
from app.db.facts import Facts, shown
from app.db.hosts import find_primary, hosts_of
from app.db.migrate import known, newer_schema
from app.errors import StartupError, StartupRefused
from app.settings import Settings, fault_of

#: Longest wait for a statement in seconds, above what the server ends by itself: a server may also say nothing.
COMMAND_TIMEOUT = 180
LOCK_KEY = 0x6F70_6171  # "opaq": any number, the same for every instance

# Revisions until r6 were kept in `alembic_version` of the first schema on the path, most often `public`.
OURS_ELSEWHERE = "SELECT to_regclass('quotes.real_time') IS NOT NULL AND to_regclass('quotes.alembic_version') IS NULL"
VERSION_TABLES = """
SELECT format('%I.%I', nspname, relname) AS name, quote_ident(pg_get_userbyid(relowner)) AS owner,
       pg_has_role(relowner, 'USAGE') AS owned,
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(pg_class.oid, 'SELECT') AS readable
FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
WHERE relname = 'alembic_version' AND relkind = 'r'
      AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'version_num')
ORDER BY nspname <> 'public', nspname
"""
HAS_REVISION = """
SELECT EXISTS (
    SELECT FROM pg_attribute WHERE attrelid = to_regclass('quotes.alembic_version') AND attname = 'version_num')
"""
TABLES = """
SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace('quotes')
AND relname IN ('real_time', 'latest', 'ohlc_1m', 'receipts', 'settings', 'backups')
"""
#: Which of these there are, by revision.
TABLES_AT = {
    "r1": {"real_time", "latest"},
    "r2": {"real_time", "latest", "ohlc_1m"},
    "r3": {"real_time", "latest", "ohlc_1m"},
    "r4": {"real_time", "latest", "ohlc_1m", "receipts"},
    "r5": {"real_time", "latest", "ohlc_1m", "receipts", "settings"},
    "r6": {"real_time", "latest", "ohlc_1m", "receipts", "settings", "backups"},
}
# No name in the schema can be looked up then.
BLIND = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'quotes' AND NOT has_schema_privilege(oid, 'USAGE'))"
# The extension's functions are called by the migrations, and by jobs as the owner.
RIGHTS = """
SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
       (SELECT quote_ident(pg_get_userbyid(nspowner)) FROM pg_namespace WHERE nspname = 'quotes') AS owner,
       (SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'quotes') AS owns,
       (SELECT rolcanlogin FROM pg_roles WHERE rolname = current_user) AS logs_in,
       ARRAY(
           SELECT format('GRANT CREATE ON DATABASE %I TO %I;', current_database(), current_user)
           WHERE to_regnamespace('quotes') IS NULL AND NOT has_database_privilege(current_database(), 'CREATE')
           UNION ALL
           SELECT format('GRANT USAGE, CREATE ON SCHEMA quotes TO %I;', current_user) FROM pg_namespace
           WHERE nspname = 'quotes' AND NOT (has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE'))
           UNION ALL
           SELECT format('GRANT USAGE ON SCHEMA %I TO %I;', nspname, current_user)
           FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
           WHERE extname = 'timescaledb' AND NOT has_schema_privilege(n.oid, 'USAGE')
           UNION ALL
           SELECT format('GRANT CREATE ON TABLESPACE %I TO %I;', spcname, current_user) FROM pg_tablespace
           WHERE spcname = current_setting('default_tablespace') AND NOT has_tablespace_privilege(oid, 'CREATE')
                 AND oid <> (SELECT dattablespace FROM pg_database WHERE datname = current_database())
           UNION ALL
           SELECT format('GRANT TEMPORARY ON DATABASE %I TO %I;', current_database(), current_user)
           WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')) AS grants
"""


def _settings() -> Settings:
    settings: Settings = context.config.attributes.get("settings") or Settings()
    return settings


def _url() -> str:
    url: str | None = context.config.attributes.get("url")
    if url is None:
        configured = _settings().database_url
        if configured is None:
            raise SystemExit("Set QUOTES_DATABASE_URL, or run `opa-quotes migrate` for the embedded database.")
        url = configured.get_secret_value()
    return url


def _ensure_timescaledb(connection: Connection) -> None:
    """Create the extension where the server has it loaded and nobody has created it yet."""
    # The loader's setting tells that it is loaded, to any role; without it the statement would end the session.
    ready = connection.execute(
        text(
            "SELECT current_setting('timescaledb.max_background_workers', true) IS NOT NULL"
            " AND EXISTS (SELECT FROM pg_available_extensions"
            " WHERE name = 'timescaledb' AND installed_version IS NULL)"
            " AND to_regnamespace('public') IS NOT NULL"
        )
    ).scalar_one()
    if ready:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS timescaledb SCHEMA public"))
        connection.execute(text("SET search_path = public"))
        connection.commit()


def _adopt(connection: Connection) -> None:
    """Take the revision into our schema where it is in another: ours by what it says and by our tables.

    Another application's table of the same name stays as it is.
    """
    if not connection.execute(text(OURS_ELSEWHERE)).scalar_one():
        return
    found, near = {name for (name,) in connection.execute(text(TABLES))}, ""
    for table in connection.execute(text(VERSION_TABLES)).all():
        if not table.readable:
            near = near or f"{table.name} may have it: migrate as {table.owner}, whose table it is."
            continue
        rows = connection.execute(text(f"SELECT version_num FROM {table.name}")).scalars().all()
        if len(rows) == 1 and TABLES_AT.get(rows[0]) == found:
            if table.owned:
                connection.execute(text(f"ALTER TABLE {table.name} SET SCHEMA quotes"))
                connection.commit()
                return
            near = f"it is in {table.name}: migrate as {table.owner}, whose table it is."
            break
        if len(rows) == 1 and rows[0] in TABLES_AT:
            near = (
                f"{table.name} is at {rows[0]}, whose tables they are not; if it is the store's, mend the tables first,"
                " which `opa-quotes health` of that version names."
            )
    connection.commit()
    if near and not _half_restored(connection):
        raise StartupRefused(
            f"Nothing was migrated. The tables of the store have no revision in their schema, and {near}"
        )


def _revision(connection: Connection) -> str | None:
    """The revision of the schema; None where nothing was migrated."""
    if not connection.execute(text(HAS_REVISION)).scalar_one():
        return None
    return connection.execute(text("SELECT version_num FROM quotes.alembic_version")).scalars().first()


def _refuse_unreleased(connection: Connection) -> None:
    if connection.execute(text(IS_UNRELEASED)).scalar_one():
        raise StartupRefused(UNRELEASED_STORE)


def _refuse_strangers(connection: Connection) -> None:
    """Nothing is half made where another application's tables would stand in the way of ours."""
    found = connection.execute(text(STRANGERS)).scalars().all()
    if found and not _half_restored(connection):
        raise StartupRefused(f"Nothing was migrated. {strangers_fault(found)}")


def _half_restored(connection: Connection) -> bool:
    """A restore takes its comment away at its end."""
    comment: str | None = connection.execute(
        text("SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()")
    ).scalar_one()
    return comment == HALF_RESTORED


def _refuse_half_restored(connection: Connection, settings: Settings, revision: str | None) -> None:
    """A restore gives the store its revision last."""
    found = connection.execute(text("SELECT to_regclass('quotes.real_time') IS NOT NULL")).scalar_one()
    if _half_restored(connection) or (found and revision is None):
        which, remedy = "this database", "Drop it"
        if settings.embedded:
            which, remedy = "this data directory", f"Remove {settings.data_dir or embedded.default_data_dir()}"
        raise StartupError(f"A restore into {which} did not finish. {remedy} and restore again; nothing was migrated.")


def _refuse_newer(revision: str | None) -> None:
    """A revision that this version does not know is of a newer one, whatever is asked for."""
    if revision is not None and revision not in known():
        raise StartupRefused(newer_schema(revision, context.script.get_current_head() or ""))


def _refuse_contradiction(settings: Settings, revision: str | None) -> None:
    """A new store takes its settings from the environment, and where that is silent from what is built in."""
    first = Facts.first(settings)
    fault = fault_of(first.retention, first.chunk_interval, first.compress_after)
    if fault and revision is None:
        raise StartupRefused(
            f"A new store cannot have these settings: {fault}. QUOTES_RETENTION is {shown(first.retention)},"
            f" QUOTES_CHUNK_INTERVAL {shown(first.chunk_interval)}, QUOTES_COMPRESS_AFTER"
            f" {shown(first.compress_after)}, as set or built in; nothing was migrated."
        )


def _require_rights(connection: Connection, revision: str | None = None, *, jobs: bool = False) -> None:
    """Name the statements that give this role what it lacks to migrate, and to own background jobs."""
    row = connection.execute(text(RIGHTS)).one()
    if jobs and not row.logs_in:
        raise StartupRefused(
            f"The role {row.role} needs LOGIN for background jobs: ALTER ROLE {row.role} LOGIN. Nothing was migrated."
        )
    if revision is not None and not row.owns:
        raise StartupRefused(
            f"The role {row.role} does not own the schema quotes, and the store is at revision {revision}: migrate as"
            f" {row.owner}, or make the role a member of it: GRANT {row.owner} TO {row.role};"
        )
    if row.grants:
        raise StartupRefused(
            f"The role {row.role} may not migrate the database {row.database}. An administrator gives it what it lacks,"
            f" in that database: {' '.join(row.grants)}"
        )


def _end_at_base(connection: Connection) -> None:
    """Leave nothing behind: the revision, and the schema if this role could make it again."""
    if _revision(connection) is None:
        connection.execute(text("DROP TABLE IF EXISTS quotes.alembic_version"))
        if connection.execute(text("SELECT has_database_privilege(current_database(), 'CREATE')")).scalar_one():
            connection.execute(text("DROP SCHEMA IF EXISTS quotes"))
    connection.commit()


def _run(connection: Connection) -> None:
    # Session settings, so that they hold for each migration's transaction.
    connection.execute(text("SET lock_timeout = '120s'"))
    connection.execute(text("SET statement_timeout = '130s'"))
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK_KEY})
    connection.execute(text("SET lock_timeout = '4s'"))
    connection.execute(text("SET statement_timeout = '60s'"))
    connection.commit()
    try:
        if connection.execute(text(BLIND)).scalar_one() or _revision(connection) is None:
            _refuse_strangers(connection)
        _ensure_timescaledb(connection)
        capability = Capability.of(connection.execute(text(DETECT)).one())
        connection.commit()
        settings = _settings()
        if capability.level < REQUIRED[settings.required_level]:
            raise StartupRefused(
                f"The server's capability level is {capability.level}, {settings.required_level} is required. Nothing"
                " was migrated. Create the extension timescaledb, or set QUOTES_REQUIRE_TIMESCALEDB."
            )
        if connection.execute(text(BLIND)).scalar_one():
            _require_rights(connection)
        restoring = connection.execute(
            text("SELECT current_setting(:name, true)"), {"name": needs.RESTORING}
        ).scalar_one()
        if fault := needs.unfit(needs.Server({needs.RESTORING: restoring or "off"})):
            raise StartupError(fault)
        _refuse_unreleased(connection)
        _adopt(connection)
        revision = _revision(connection)
        _refuse_half_restored(connection, settings, revision)
        _refuse_newer(revision)
        _refuse_contradiction(settings, revision)
        if revision != context.script.get_current_head():  # at which nothing is needed
            _require_rights(connection, revision, jobs=capability.level >= Level.COMMUNITY)
        connection.commit()
        context.config.attributes.update(capability=capability, settings=settings)
        # Where the schema is there already the statement would ask for a right that is not needed.
        if connection.execute(text("SELECT to_regnamespace('quotes') IS NULL")).scalar_one():
            connection.execute(text("CREATE SCHEMA quotes"))
        connection.commit()
        context.configure(connection=connection, transaction_per_migration=True, version_table_schema="quotes")
        with context.begin_transaction():
            context.run_migrations()
        _end_at_base(connection)
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY})
        connection.commit()


async def _open() -> failures.Connection:
    return (await find_primary(hosts_of(_url()), timeout=10, command_timeout=COMMAND_TIMEOUT)).connection


async def _main() -> None:
    async def connect() -> object:
        connection = await _open()
        try:
            sessions.require_encoding(connection)
            await sessions.require_own(connection, _open)
        except BaseException:
            connection.terminate()
            raise
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=pool.NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_run)
    finally:
        await engine.dispose()


asyncio.run(_main())
