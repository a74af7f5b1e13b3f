"""What administrators set for a server, a database or a role, and how the service has to meet each.

Invariant: a case is served with the answers of a database on which nothing is set, or refused by a sentence with the
words of `refused`; what is served though something harms is named by health, with the words of `told`.
"""

from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["healthy", "degraded", "unhealthy"]


@dataclass(frozen=True, slots=True)
class Case:
    """One way in which a database is set up; `{database}` and `{role}` stand for names."""

    name: str
    #: Settings of the database.
    settings: tuple[str, ...] = ()
    #: What `CREATE DATABASE` has behind the name.
    options: str = ""
    #: Statements of an administrator: in the database before it is migrated, and when all is over.
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    #: Settings of the whole server, which it reads while it runs.
    server: tuple[str, ...] = ()
    #: Whether the service has a role that owns nothing but what `before` gives it.
    role: bool = False
    #: Whether there has to be TimescaleDB, or must not be.
    timescaledb: bool | None = None
    #: Words of the sentence that refuses it; none where it is served.
    refused: tuple[str, ...] = ()
    status: Status = "healthy"
    #: Words of health.
    told: tuple[str, ...] = ()
    #: Words of health on a server with background jobs, which the setting harms: it is degraded there.
    jobs: tuple[str, ...] = ()


def _overridden(name: str, value: str, shown: str, *, needed: str = "") -> Case:
    """A setting that sessions have otherwise; jobs have it as it is, and may need another value."""
    jobs = (f"{name} is {shown}, and {needed} is needed for background jobs: ALTER ROLE",) if needed else ()
    return Case(f"{name} = {value}", (f"{name} = {value}",), told=(f"{name} is {shown}", "instead"), jobs=jobs)


def _unseen(name: str, value: str) -> Case:
    return Case(f"{name} = {value}", (f"{name} = {value}",))


_FOREIGN: Final = (
    "CREATE TABLE public.alembic_version (version_num text)",
    "INSERT INTO public.alembic_version VALUES ('{version}')",
)
#: Everything that sessions set for themselves, at once.
HOSTILE: Final = (
    "default_transaction_isolation = serializable", "default_transaction_deferrable = on", "synchronous_commit = off",
    "search_path = nowhere", "TimeZone = 'Pacific/Chatham'", "DateStyle = 'SQL, DMY'", "IntervalStyle = sql_standard",
    "bytea_output = escape", "extra_float_digits = -15", "standard_conforming_strings = off",
    "quote_all_identifiers = on", "array_nulls = off", "transform_null_equals = on", "client_encoding = LATIN1",
    "client_min_messages = debug1", "statement_timeout = 20", "lock_timeout = 2000", "idle_session_timeout = 500",
    "idle_in_transaction_session_timeout = 1", "enable_seqscan = off", "work_mem = '64kB'", "jit_above_cost = 0",
    "plan_cache_mode = force_generic_plan", "max_parallel_workers_per_gather = 0", "default_statistics_target = 1",
)  # fmt: skip
CASES: Final = (
    Case("nothing set"),
    Case("all that sessions set", HOSTILE, told=("default_transaction_isolation is serializable", "instead"),
         jobs=("default_transaction_isolation is serializable, and 'read committed' is needed",)),
    _overridden("default_transaction_isolation", "serializable", "serializable", needed="'read committed'"),
    _overridden("default_transaction_isolation", "'repeatable read'", "repeatable read", needed="'read committed'"),
    _unseen("default_transaction_deferrable", "on"),
    _overridden("synchronous_commit", "off", "off"),
    _unseen("synchronous_commit", "remote_apply"),
    _unseen("search_path", "nowhere"),
    _unseen("search_path", "''"),
    _unseen("TimeZone", "'Pacific/Chatham'"),
    _unseen("DateStyle", "'SQL, DMY'"),
    _unseen("IntervalStyle", "sql_standard"),
    _unseen("bytea_output", "escape"),
    _unseen("extra_float_digits", "-15"),
    _unseen("standard_conforming_strings", "off"),
    _unseen("quote_all_identifiers", "on"),
    _unseen("array_nulls", "off"),
    _unseen("transform_null_equals", "on"),
    _unseen("client_encoding", "LATIN1"),
    _unseen("client_min_messages", "debug1"),
    _overridden("statement_timeout", "20", "20 ms"),
    _overridden("idle_in_transaction_session_timeout", "1", "1 ms"),
    _overridden("idle_session_timeout", "500", "500 ms"),
    _overridden("lock_timeout", "1", "1 ms", needed="0"),
    _overridden("transaction_timeout", "50", "50 ms", needed="0"),
    Case("default_transaction_read_only = on", ("default_transaction_read_only = on",),
         refused=("default_transaction_read_only", "off is needed")),
    Case("timescaledb.restoring = on", ("timescaledb.restoring = on",), timescaledb=True,
         before=("CREATE EXTENSION IF NOT EXISTS timescaledb",),
         refused=("timescaledb.restoring is on", "off is needed")),
    Case("LATIN1", options="ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
         refused=("encoding of the database is LATIN1", "UTF8 is needed")),
    Case("SQL_ASCII", options="ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0",
         refused=("encoding of the database is SQL_ASCII", "UTF8 is needed")),
    Case("another application's revision 0004", before=tuple(line.format(version="0004") for line in _FOREIGN)),
    Case("another application's revision r7", before=tuple(line.format(version="r7") for line in _FOREIGN)),
    Case("TimescaleDB in another schema", timescaledb=True,
         before=('CREATE SCHEMA "of others"', 'CREATE EXTENSION timescaledb SCHEMA "of others"')),
    Case("no schema public", before=("CREATE SCHEMA ext", "CREATE EXTENSION timescaledb SCHEMA ext",
                                     "DROP SCHEMA public"), timescaledb=True),
    Case("no schema public, no extension", before=("DROP SCHEMA public",), timescaledb=False),
    Case("a role that owns its schema only", role=True, before=("CREATE SCHEMA quotes AUTHORIZATION {role}",)),
    Case("a role with CREATE on the database", role=True, before=("GRANT CREATE ON DATABASE {database} TO {role}",)),
    Case("a role without CREATE", role=True, refused=("GRANT CREATE ON DATABASE {database} TO {role};",)),
    Case("a role without TEMPORARY", role=True, before=("CREATE SCHEMA quotes AUTHORIZATION {role}",
                                                        "REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC"),
         refused=("GRANT TEMPORARY ON DATABASE {database} TO {role};",)),
    Case("a role without USAGE on the schema of TimescaleDB", role=True, timescaledb=True,
         before=("CREATE SCHEMA quotes AUTHORIZATION {role}", "REVOKE ALL ON SCHEMA public FROM PUBLIC"),
         refused=("GRANT USAGE ON SCHEMA public TO {role};",)),
    Case("a role without USAGE on public, no extension", role=True, timescaledb=False,
         before=("CREATE SCHEMA quotes AUTHORIZATION {role}", "REVOKE ALL ON SCHEMA public FROM PUBLIC")),
    Case("no temporary files, of a role", ("temp_file_limit = 0", "work_mem = '64kB'"), role=True,
         before=("CREATE SCHEMA quotes AUTHORIZATION {role}",)),
    Case("an owner that cannot log in", role=True, timescaledb=True,
         before=("CREATE SCHEMA quotes AUTHORIZATION pg_monitor", "GRANT pg_monitor TO {role}",
                 "ALTER ROLE {role} SET role = pg_monitor"),
         refused=("The role pg_monitor needs LOGIN for background jobs: ALTER ROLE pg_monitor LOGIN",)),
    Case("a schema quotes of others", before=("CREATE SCHEMA quotes", "CREATE TABLE quotes.orders (id int)"),
         refused=("table quotes.orders of", "a database of its own")),
    Case("fsync = off", server=("fsync = off",), status="degraded", told=("fsync is off, and on is needed",)),
    Case("full_page_writes = off", server=("full_page_writes = off",), status="degraded",
         told=("full_page_writes is off, and on is needed",)),
    Case("autovacuum = off", server=("autovacuum = off",), status="degraded",
         told=("autovacuum is off, and on is needed",)),
    Case("track_counts = off", ("track_counts = off",), status="degraded",
         told=("track_counts is off, and on is needed",)),
)  # fmt: skip
