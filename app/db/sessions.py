"""What each session of the service is set to, whatever the server, the database or the role is set to.

Invariant: a statement means the same, and is as durable, on every server: what a transaction needs is said here, once
for pools, migrations, maintenance and the library. It is said after a connection is opened, since a pooler refuses
settings in the first packet; so `pg_settings.reset_val` stays what the administrator has set, for health to name.
Read-only stays read-only: whoever sets `default_transaction_read_only` wants that nothing is written.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, TypeAlias

import asyncpg

from app.errors import DatabaseMisconfigured, StartupRefused

Connection: TypeAlias = "asyncpg.Connection[Any]"

#: The driver itself asks for UTF8 as the encoding of the client.
SETTINGS: Final = {
    # Retries, locks and upserts are made for it; a stricter level fails writes that meet.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "TimeZone": "UTC",
    # What is hashed, compared or shown as text is written one way.
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "client_min_messages": "warning",
    # Tables of the migrations, and temporary ones.
    "default_table_access_method": "heap",
    # The service has deadlines of its own; those of others end what these allow.
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "60000",
    # A generic plan over a hypertable would lock every chunk.
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
    # A symbol lies scattered over the pages of its day; at the default of 4 the planner rather reads the whole range
    # by time and filters: 9 ms instead of 1 ms for 600 quotes of one symbol of 50.
    "random_page_cost": "1.1",
}
#: Settings of later releases, by the first that has them.
LATER: Final = {17: {"transaction_timeout": "0"}}
# Names are qualified but for TimescaleDB's functions, which are looked for where the extension is, behind whatever an
# administrator has on the path: what he has put before `pg_catalog` he has put there on purpose. To look up a name
# there takes USAGE, without which none of them would be found. Less memory than the server's default does not hold a
# look at `pg_settings`, which `temp_file_limit` could then refuse. What flushes to the local disk is left as it is:
# `remote_apply` promises more than `on`.
_OF_THE_SERVER: Final = """
set_config('work_mem', CASE WHEN pg_size_bytes(current_setting('work_mem')) < pg_size_bytes('4MB') THEN '4MB'
                       ELSE current_setting('work_mem') END, false),
set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                                 ELSE current_setting('synchronous_commit') END, false),
set_config('search_path', concat_ws(', ', nullif((SELECT reset_val FROM pg_settings WHERE name = 'search_path'), ''),
                                    extension), false), to_regclass(extension || '.any')
FROM (SELECT (SELECT quote_ident(nspname) FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
              WHERE extname = 'timescaledb')) AS found (extension)
"""
_UNUSABLE: Final = """
SELECT pg_catalog.quote_ident(nspname), pg_catalog.quote_ident(current_user)
FROM pg_catalog.pg_extension JOIN pg_catalog.pg_namespace ON pg_namespace.oid = extnamespace
WHERE extname = 'timescaledb' AND NOT pg_catalog.has_schema_privilege(pg_namespace.oid, 'USAGE')
"""
#: Longest run of a statement of whoever does not say.
_STATEMENT: Final = timedelta(minutes=1)
#: Looks at whether a pooler gives sessions to others: while others use it, three of four may miss.
_LOOKS: Final = 40
#: Longest wait for a second session: a pooler that keeps sessions apart may have none to spare.
_SECOND: Final = 1.0
UTF8: Final = "UTF8"


async def prepare(connection: Connection, timeout: float, statement_timeout: timedelta | None = None) -> None:
    """Set a session, in one round trip; the driver's exceptions come as they are.

    Raises:
        DatabaseMisconfigured: the role may not use the schema in which TimescaleDB is.
    """
    major = connection.get_server_version().major
    wanted = SETTINGS | {"statement_timeout": f"{(statement_timeout or _STATEMENT).total_seconds() * 1000:.0f}"}
    for first, settings in LATER.items():
        wanted |= settings if major >= first else {}
    calls = "".join(f"set_config('{name}', '{value}', false), " for name, value in wanted.items())
    try:
        await connection.execute(f"SET search_path = pg_catalog; SELECT {calls}{_OF_THE_SERVER}", timeout=timeout)
    except asyncpg.InsufficientPrivilegeError:
        if (unusable := await connection.fetchrow(_UNUSABLE, timeout=timeout)) is None:
            raise
        schema, role = unusable
        raise DatabaseMisconfigured(
            f"The role lacks USAGE on the schema {schema}, which TimescaleDB is in:"
            f" GRANT USAGE ON SCHEMA {schema} TO {role};"
        ) from None


def encoding_fault(connection: Connection) -> str | None:
    """Why texts cannot be stored in the database of a connection; None if they can."""
    found: str = connection.get_settings().server_encoding
    if found == UTF8:
        return None
    return (
        f"The encoding of the database is {found}, and {UTF8} is needed: CREATE DATABASE … ENCODING '{UTF8}' TEMPLATE"
        " template0."
    )


def require_encoding(connection: Connection) -> None:
    """Refuse a database that cannot store every text.

    Raises:
        StartupRefused: its encoding is not UTF8.
    """
    if fault := encoding_fault(connection):
        raise StartupRefused(fault)


async def require_own(connection: Connection, another: Callable[[], Awaitable[Connection]]) -> None:
    """Refuse a pooler that gives a connection another session after each transaction, and its session to others.

    Settings, temporary tables and locks are of a session. Without a pooler it costs a round trip.

    Raises:
        DatabaseMisconfigured: there is one.
    """
    ours = {await connection.fetchval(_SESSION)}
    if ours == {connection.get_server_pid()}:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(_SECOND):
            other = await another()
            try:
                for _ in range(_LOOKS):
                    theirs = await other.fetchval(_SESSION)
                    ours.add(await connection.fetchval(_SESSION))
                    if len(ours) > 1 or theirs in ours:
                        raise DatabaseMisconfigured(_SHARED)
            except (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError):
                raise DatabaseMisconfigured(_SHARED) from None  # what one session had prepared was not in the next
            finally:
                other.terminate()


_SESSION: Final = "SELECT pg_catalog.pg_backend_pid()"
_SHARED: Final = (
    "The database URL leads to a pooler that gives each transaction another session, as PgBouncer with pool_mode ="
    " transaction or statement; pool_mode = session is needed, or the address of the server itself."
)
