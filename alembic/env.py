"""Runs the migrations: one at a time across all instances, each in its own transaction, within timeouts.

Invariant: whoever waits for the advisory lock finds the work done by whoever held it, so many instances may
start together. A statement that cannot get its lock within seconds fails rather than queue up traffic.
"""

import asyncio

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.db import embedded
from app.db.capability import DETECT, HALF_RESTORED, REQUIRED, UNRELEASED, UNRELEASED_STORE, Capability
from app.db.facts import Facts, shown
from app.db.hosts import find_primary, hosts_of
from app.db.migrate import known, newer_schema
from app.errors import StartupError
from app.settings import Settings, fault_of

#: Longest wait for a statement in seconds, above what the server ends by itself: a server may also say nothing.
COMMAND_TIMEOUT = 180
LOCK_KEY = 0x6F70_6171  # "opaq": any number, the same for every instance


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
        )
    ).scalar_one()
    if ready:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS timescaledb"))
        connection.commit()


def _revision(connection: Connection) -> str | None:
    """The revision of the schema; None where nothing was migrated."""
    if not connection.execute(text("SELECT to_regclass('alembic_version') IS NOT NULL")).scalar_one():
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalars().first()


def _refuse_unreleased(revision: str | None) -> None:
    if revision in UNRELEASED:
        raise StartupError(UNRELEASED_STORE)


def _refuse_half_restored(connection: Connection, settings: Settings, revision: str | None) -> None:
    """A restore takes its comment away at its end, and gives the store its revision just before."""
    comment = connection.execute(
        text("SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()")
    ).scalar_one()
    found = connection.execute(text("SELECT to_regclass('quotes.real_time') IS NOT NULL")).scalar_one()
    if comment == HALF_RESTORED or (found and revision is None):
        which, remedy = "this database", "Drop it"
        if settings.embedded:
            which, remedy = "this data directory", f"Remove {settings.data_dir or embedded.default_data_dir()}"
        raise StartupError(f"A restore into {which} did not finish. {remedy} and restore again; nothing was migrated.")


def _refuse_newer(revision: str | None) -> None:
    """A revision that this version does not know is of a newer one, whatever is asked for."""
    if revision is not None and revision not in known():
        raise StartupError(newer_schema(revision, context.script.get_current_head() or ""))


def _refuse_contradiction(settings: Settings, revision: str | None) -> None:
    """A new store takes its settings from the environment, and where that is silent from what is built in."""
    first = Facts.first(settings)
    fault = fault_of(first.retention, first.chunk_interval, first.compress_after)
    if fault and revision is None:
        raise StartupError(
            f"A new store cannot have these settings: {fault}. QUOTES_RETENTION is {shown(first.retention)},"
            f" QUOTES_CHUNK_INTERVAL {shown(first.chunk_interval)}, QUOTES_COMPRESS_AFTER"
            f" {shown(first.compress_after)}, as set or built in; nothing was migrated."
        )


def _run(connection: Connection) -> None:
    # Session settings, so that they hold for each migration's transaction.
    for setting in ("lock_timeout = '4s'", "statement_timeout = '60s'", "timezone = 'UTC'"):
        connection.execute(text(f"SET {setting}"))
    connection.commit()
    connection.execute(text("SET lock_timeout = '120s'"))
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK_KEY})
    connection.execute(text("SET lock_timeout = '4s'"))
    connection.commit()
    try:
        _ensure_timescaledb(connection)
        capability = Capability.of(connection.execute(text(DETECT)).one())
        connection.commit()
        settings = _settings()
        if capability.level < REQUIRED[settings.required_level]:
            raise StartupError(
                f"The server's capability level is {capability.level}, {settings.required_level} is required. Nothing"
                " was migrated. Create the extension timescaledb, or set QUOTES_REQUIRE_TIMESCALEDB."
            )
        revision = _revision(connection)
        _refuse_unreleased(revision)
        _refuse_half_restored(connection, settings, revision)
        _refuse_newer(revision)
        _refuse_contradiction(settings, revision)
        connection.commit()
        context.config.attributes.update(capability=capability, settings=settings)
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY})
        connection.commit()


async def _main() -> None:
    async def connect() -> object:
        return (await find_primary(hosts_of(_url()), timeout=10, command_timeout=COMMAND_TIMEOUT)).connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=pool.NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_run)
    finally:
        await engine.dispose()


asyncio.run(_main())
