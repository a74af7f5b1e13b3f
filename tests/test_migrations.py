"""The schema: up, down, up again leaves nothing behind; many instances at once; model and tables agree."""

import asyncio
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import ValidationError
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.schema import CreateTable

from app.db.capability import Capability, Level
from app.db.engine import Database
from app.db.migrate import downgrade, head, migrate
from app.db.models import RealTimeQuote
from app.errors import DatabaseRefused, DatabaseUnavailable, StartupError
from app.health import Health
from app.quote.fields import COLUMNS, PRICES, SIZES
from app.repository.quotes import QuoteRepository
from app.repository.system import SystemRepository
from app.settings import Settings
from tests.conftest import Lane, random_symbol, run

CATALOG = """
SELECT 'relation', n.nspname || '.' || c.relname, c.relkind::text FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname IN ('quotes', 'public')
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
UNION ALL SELECT 'schema', nspname, '' FROM pg_namespace WHERE nspname = 'quotes'
UNION ALL SELECT 'function', p.oid::regprocedure::text, '' FROM pg_proc p
JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'quotes' ORDER BY 1, 2
"""
TIMESCALE = """
SELECT 'hypertable', table_name::text, '' FROM _timescaledb_catalog.hypertable
UNION ALL SELECT 'job', application_name::text, '' FROM timescaledb_information.jobs WHERE job_id >= 1000
UNION ALL SELECT 'aggregate', view_name::text, '' FROM timescaledb_information.continuous_aggregates
UNION ALL SELECT 'columnstore', hypertable::text, '' FROM timescaledb_information.hypertable_columnstore_settings
ORDER BY 1, 2
"""


REVISION = "SELECT version_num FROM quotes.alembic_version"


async def ask(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def catalog(url: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(CATALOG)
        if await connection.fetchval("SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'"):
            rows += await connection.fetch(TIMESCALE)
    finally:
        await connection.close()
    return [tuple(row) for row in rows]


async def test_up_down_up_leaves_nothing_behind(lane: Lane, empty_url: str) -> None:
    settings = lane.make_settings()
    before = await catalog(empty_url)
    await migrate(empty_url, settings)
    first = await catalog(empty_url)
    assert {"quotes.real_time", "quotes.latest", "quotes.receipts", "quotes.ohlc_1m", "quotes.daily_summary"} <= {
        row[1] for row in first
    }
    await migrate(empty_url, settings)
    assert await catalog(empty_url) == first, "a second upgrade changes nothing"
    await downgrade(empty_url, settings)
    assert [row for row in await catalog(empty_url) if row not in before] == []
    await migrate(empty_url, settings)
    assert _shape(await catalog(empty_url)) == _shape(first)


def _shape(rows: list[tuple[Any, ...]]) -> set[tuple[str, ...]]:
    """A catalog without the numbers that TimescaleDB counts up."""
    return {tuple("".join(c for c in str(part) if not c.isdigit()) for part in row) for row in rows}


async def test_revision_by_revision(lane: Lane, empty_url: str) -> None:
    settings = lane.make_settings()
    for revision in ("r1", "r2", "r3", "r4", "r5", "r6", "r7"):
        await migrate(empty_url, settings, revision)
    for revision in ("r6", "r5", "r4", "r3", "r2", "r1", "base"):
        await downgrade(empty_url, settings, revision)
    with pytest.raises(StartupError, match="nowhere"):
        await migrate(empty_url, settings, "nowhere")


@pytest.mark.parametrize("revision", ["0001", "0004"])
async def test_a_store_of_before_the_first_release_is_refused(lane: Lane, empty_url: str, revision: str) -> None:
    connection = await asyncpg.connect(empty_url)
    await connection.execute(
        f"CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY); INSERT INTO alembic_version"
        f" VALUES ('{revision}'); CREATE SCHEMA quotes; CREATE TABLE quotes.real_time (symbol text)"
    )
    await connection.close()
    before = await catalog(empty_url)
    for step in (migrate, downgrade):
        with pytest.raises(StartupError) as caught:
            await step(empty_url, lane.make_settings())
        sentence = str(caught.value)
        assert sentence.startswith("This store was made before the first release")
        assert (sentence.count("."), sentence[-1]) == (1, ".")
    with pytest.raises(StartupError):
        async with QuoteRepository.open(empty_url, lane.make_settings()):
            pass
    environment = {**os.environ, "QUOTES_DATABASE_URL": empty_url, "QUOTES_REQUIRE_TIMESCALEDB": "none"}
    environment["QUOTES_MIGRATE_ON_START"] = "false"
    for arguments in (["migrate"], ["migrate", "base", "--down"], ["serve", "--port", "0"], ["maintain", "apply"]):
        ended = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", *arguments, env=environment, stderr=subprocess.PIPE
        )
        _, output = await ended.communicate()
        told = " ".join(output.decode().split())  # a narrow terminal breaks the line
        assert ended.returncode != 0, arguments
        assert sentence in told, arguments
        assert "Traceback" not in told, arguments
    assert await catalog(empty_url) == before
    connection = await asyncpg.connect(empty_url)
    assert await connection.fetchval("SELECT version_num FROM alembic_version") == revision
    await connection.close()


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (("CREATE TABLE quotes.settings (name text)",), "table quotes.settings of"),
        (("CREATE TABLE quotes.orders (id serial)", "CREATE TYPE quotes.side AS ENUM ('buy')"),
         "table quotes.orders of [^,]+, type quotes.side of"),
        (("CREATE VIEW quotes.daily_summary AS SELECT 1",), "view quotes.daily_summary of"),
        (("CREATE FUNCTION quotes.nanoseconds() RETURNS int LANGUAGE sql AS 'SELECT 1'",), "quotes.nanoseconds"),
        (("CREATE TABLE quotes.alembic_version (number int)",), "table quotes.alembic_version of"),
        (("CREATE TABLE quotes.alembic_version (version_num text)",
          "INSERT INTO quotes.alembic_version VALUES ('c0ffee')"), "revision c0ffee"),
    ],
)  # fmt: skip
async def test_a_schema_of_another_application_is_left_alone(
    lane: Lane, empty_url: str, made: tuple[str, ...], named: str
) -> None:
    await run(empty_url, "CREATE SCHEMA quotes", *made)
    before = await catalog(empty_url)
    for step in (migrate, downgrade):
        with pytest.raises(StartupError, match=named) as told:
            await step(empty_url, lane.make_settings())
        assert "a database of its own" in told.value.detail
    if lane.name == "external" and "revision" not in named:
        assert await ask(empty_url, "SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'") == 0
    assert await catalog(empty_url) == before
    report = await Health(
        SystemRepository(Database(empty_url, lane.make_settings())), lane.make_settings(), head()
    ).report()
    assert report.checks[2].detail in told.value.detail


@pytest.mark.parametrize("theirs", ["0004", "r7"])
async def test_the_revision_of_another_application_is_not_ours(lane: Lane, empty_url: str, theirs: str) -> None:
    """Whatever it is called, and whether a store of ours is there or not."""
    table = "public.alembic_version"
    await run(empty_url, f"CREATE TABLE {table} (version_num text)", f"INSERT INTO {table} VALUES ('{theirs}')")
    settings = lane.make_settings()
    await migrate(empty_url, settings)
    await migrate(empty_url, settings)
    assert await ask(empty_url, REVISION) == head()
    await downgrade(empty_url, settings)
    assert await ask(empty_url, "SELECT version_num FROM public.alembic_version") == theirs
    assert [row[1] for row in await catalog(empty_url) if row[0] != "function"] == ["public.alembic_version"]


async def test_a_revision_that_was_kept_elsewhere_moves_to_our_schema(lane: Lane, empty_url: str) -> None:
    """Until r6 it was where the path led first; by its side may be the table of another application."""
    settings = lane.make_settings()
    await migrate(empty_url, settings, "r6")
    await run(
        empty_url,
        "ALTER TABLE quotes.alembic_version SET SCHEMA public; CREATE SCHEMA another",
        "CREATE TABLE another.alembic_version (version_num text); INSERT INTO another.alembic_version VALUES ('r4')",
        "CREATE SCHEMA broken; CREATE TABLE broken.alembic_version (number int)",
    )
    await migrate(empty_url, settings)
    assert await ask(empty_url, REVISION) == head()
    assert await ask(empty_url, "SELECT to_regclass('public.alembic_version')") is None
    assert await ask(empty_url, "SELECT version_num FROM another.alembic_version") == "r4"
    await run(empty_url, "DROP TABLE another.alembic_version, broken.alembic_version")


async def test_tables_that_do_not_fit_a_revision_give_it_to_nobody(lane: Lane, empty_url: str) -> None:
    """Nor is the store called half restored, which is to be dropped."""
    await migrate(empty_url, lane.make_settings())
    await run(empty_url, "DROP TABLE quotes.backups", "ALTER TABLE quotes.alembic_version SET SCHEMA public",
              "UPDATE public.alembic_version SET version_num = 'r6'")  # fmt: skip
    with pytest.raises(StartupError, match=r"public\.alembic_version is at r6, whose tables they are not"):
        await migrate(empty_url, lane.make_settings())
    assert await ask(empty_url, "SELECT version_num FROM public.alembic_version") == "r6"


@pytest.mark.concurrent
async def test_a_role_that_owns_its_schema_only_can_migrate_and_serve(lane: Lane, empty_url: str) -> None:
    """And one that owns nothing is told the statements that it needs."""
    role, database = f"only_{random_symbol().lower()}", urlsplit(empty_url).path[1:]
    parts = urlsplit(empty_url)
    url = urlunsplit(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}"))
    settings = lane.make_settings(database_url=url)
    # The extension is there beforehand, where there is one.
    await migrate(empty_url, lane.make_settings())
    await downgrade(empty_url, lane.make_settings())
    await run(empty_url, f"CREATE ROLE {role} LOGIN")
    owner = await ask(empty_url, "SELECT current_user::text")
    try:
        with pytest.raises(StartupError) as told:
            await migrate(url, settings)
        assert f"GRANT CREATE ON DATABASE {database} TO {role};" in told.value.detail
        await run(empty_url, "CREATE SCHEMA quotes", f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC")
        with pytest.raises(StartupError) as told:
            await migrate(url, settings)
        grants = re.findall(r"GRANT [^;]+;", told.value.detail)
        assert len(grants) == 2, told.value.detail
        await run(empty_url, *grants)
        await migrate(url, settings, "r6")
        await run(empty_url, "ALTER TABLE quotes.alembic_version SET SCHEMA public")
        await run(empty_url, f"ALTER TABLE public.alembic_version OWNER TO {owner}")
        for may, told_of in (("REVOKE SELECT {} FROM", "public.alembic_version may have it"),
                             ("GRANT SELECT {} TO", "it is in public.alembic_version")):  # fmt: skip
            await run(empty_url, f"{may.format('ON public.alembic_version')} {role}")
            with pytest.raises(StartupError, match=f"{told_of}: migrate as {owner}"):
                await migrate(url, settings)
        await run(empty_url, f"ALTER TABLE public.alembic_version OWNER TO {role}")
        with pytest.raises(StartupError, match=f"does not own the schema quotes.* GRANT \\w+ TO {role};"):
            await migrate(url, settings)
        await run(empty_url, f"ALTER SCHEMA quotes OWNER TO {role}")
        await migrate(url, settings)
        async with QuoteRepository.open(url, settings) as quotes:
            stored = await quotes.bulk_insert([{"symbol": "A", "timestamp": datetime.now(UTC), "price": 1}])
            assert stored.inserted == 1
        await downgrade(url, settings)
        assert await ask(empty_url, "SELECT count(*) FROM pg_class WHERE relnamespace = 'quotes'::regnamespace") == 0
    finally:
        await run(empty_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_what_refuses_a_migration_is_told_in_the_words_of_the_server(lane: Lane, empty_url: str) -> None:
    await run(empty_url, "CREATE FUNCTION public.forbid() RETURNS event_trigger LANGUAGE plpgsql AS"
              " $$ BEGIN RAISE 'no tables on a Friday'; END $$",
              "CREATE EVENT TRIGGER forbid ON ddl_command_end WHEN TAG IN ('CREATE VIEW', 'CREATE INDEX')"
              " EXECUTE FUNCTION public.forbid()")  # fmt: skip
    try:
        with pytest.raises(
            DatabaseRefused, match=r"no tables on a Friday \(PL/pgSQL function \S*forbid\(\) line 1 at RAISE\)\.$"
        ):
            await migrate(empty_url, lane.make_settings())
    finally:
        await run(empty_url, "DROP EVENT TRIGGER forbid", "DROP FUNCTION public.forbid")
    await migrate(empty_url, lane.make_settings())


@pytest.mark.concurrent
async def test_a_tablespace_that_is_not_the_roles_is_told_before_anything_is_made(lane: Lane, empty_url: str) -> None:
    role = f"spaced_{random_symbol().lower()}"
    parts = urlsplit(empty_url)
    url = urlunsplit(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}"))
    await run(empty_url, "SET allow_in_place_tablespaces = on", f"CREATE TABLESPACE {role} LOCATION ''",
              f"CREATE ROLE {role} LOGIN", f"ALTER ROLE {role} SET default_tablespace = {role}",
              f"CREATE SCHEMA quotes AUTHORIZATION {role}")  # fmt: skip
    await run(empty_url, "DO $$ BEGIN IF current_setting('timescaledb.max_background_workers', true) IS NOT NULL THEN"
              " CREATE EXTENSION IF NOT EXISTS timescaledb; END IF; END $$")  # fmt: skip
    try:
        before = await catalog(empty_url)
        with pytest.raises(StartupError, match=f"GRANT CREATE ON TABLESPACE {role} TO {role};$"):
            await migrate(url, lane.make_settings())
        assert await catalog(empty_url) == before
    finally:
        await run(empty_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}", f"DROP TABLESPACE {role}")


@pytest.mark.concurrent
async def test_a_database_that_cannot_store_every_text_is_refused(lane: Lane, empty_url: str) -> None:
    name = f"latin_{random_symbol().lower()}"
    url = urlunsplit(urlsplit(empty_url)._replace(path=f"/{name}"))
    await run(empty_url, f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        settings = lane.make_settings(database_url=url)
        for attempt in (migrate(url, settings), Database(url, settings).connect()):
            with pytest.raises(StartupError, match="encoding of the database is LATIN1, and UTF8 is needed"):
                await attempt
        assert await catalog(url) == []
    finally:
        await run(empty_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.concurrent
async def test_instances_may_start_together(lane: Lane, empty_url: str) -> None:
    environment = {**os.environ, "QUOTES_DATABASE_URL": empty_url, "QUOTES_REQUIRE_TIMESCALEDB": "none"}
    instances = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "migrate", env=environment, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    await asyncio.gather(*(migrate(empty_url, lane.make_settings()) for _ in range(2)))
    for instance in instances:
        _, errors = await instance.communicate()
        assert instance.returncode == 0, errors.decode()
    connection = await asyncpg.connect(empty_url)
    assert await connection.fetchval("SELECT version_num FROM quotes.alembic_version") == head()
    await connection.close()


async def test_a_required_level_is_never_silently_reduced(lane: Lane, database: Database, empty_url: str) -> None:
    level = database.capability.level
    if level == Level.COMMUNITY:
        await migrate(empty_url, lane.make_settings(require_timescaledb="community"))
        return
    with pytest.raises(StartupError, match=f"{level}, community is required"):
        await migrate(empty_url, lane.make_settings(require_timescaledb="community"))
    assert await catalog(empty_url) == []


async def test_first_settings_are_those_that_are_told_and_a_new_store_needs_them_to_agree(
    lane: Lane, empty_url: str
) -> None:
    """What a process is told may agree with the store, and not with what is built in for a new one."""
    told = {"retention": None, "database_url": empty_url, "compress_after": timedelta(days=3 * 365)}
    await migrate(empty_url, lane.make_settings(**told))
    values = {name: value for name, value in told.items() if name != "retention"}
    silent = Settings(_env_file=None, require_timescaledb="none", **values)  # type: ignore[arg-type]
    await migrate(empty_url, silent)
    await downgrade(empty_url, silent)
    with pytest.raises(StartupError, match=r"shorter than retention\. QUOTES_RETENTION is 730 days, .* 1095 days, as"):
        await migrate(empty_url, silent)
    assert await catalog(empty_url) == []
    with pytest.raises(ValidationError, match="compress_after must be shorter than retention"):
        Settings(_env_file=None, retention=timedelta(days=90), compress_after=timedelta(days=90))
    with pytest.raises(ValidationError, match="at least four days"):
        Settings(_env_file=None, retention=timedelta(days=3))


async def test_the_model_has_the_columns_of_the_table(database: Database) -> None:
    async with database.acquire() as connection:
        rows = await connection.fetch(
            "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, c.collname::text"
            " FROM pg_attribute a LEFT JOIN pg_collation c ON c.oid = a.attcollation"
            " WHERE a.attrelid = 'quotes.real_time'::regclass AND a.attnum > 0 AND NOT a.attisdropped"
            " ORDER BY a.attnum"
        )
        indexes = await connection.fetch(
            "SELECT indexdef FROM pg_indexes WHERE schemaname = 'quotes' AND tablename = 'real_time' ORDER BY 1"
        )
    ddl = str(CreateTable(RealTimeQuote.metadata.tables["quotes.real_time"]).compile(dialect=PGDialect()))  # type: ignore[no-untyped-call]
    names = {"timestamp with time zone": "TIMESTAMP WITH TIME ZONE", "text": "TEXT", "smallint": "SMALLINT",
             "numeric(28,12)": "NUMERIC(28, 12)"}  # fmt: skip
    assert [row[0] for row in rows] == COLUMNS.names
    for name, kind, not_null, collation in rows:
        line = next(part.strip() for part in ddl.splitlines() if part.strip().startswith(f"{name} "))
        assert names[kind] in line
        assert ("NOT NULL" in line) == not_null
        assert ('COLLATE "C"' in line) == (collation == "C")
    assert "PRIMARY KEY (symbol, timestamp, nanos)" in ddl
    definitions = [row[0] for row in indexes]
    assert any('idx_timestamp ON quotes.real_time USING brin ("timestamp")' in text for text in definitions)
    assert len(definitions) == 2


SOUND: dict[str, Any] = {"symbol": "A", "timestamp": datetime(2026, 1, 1, tzinfo=UTC), "nanos": 0, "price": Decimal(1)}


@pytest.mark.parametrize(
    "bad",
    [
        *({name: Decimal("NaN")} for name in (*PRICES, *SIZES)),
        {"nanos": 1000},
        {"nanos": -1},
        {"price": None},
        {"price": None, "bid_size": Decimal(1), "volume": Decimal(1), "source": "feed"},
        {"symbol": ""},
        {"symbol": "A" * 65},
        {"source": "x" * 1021},
    ],
    ids=str,
)
async def test_what_no_quote_can_be_is_refused_by_the_table(database: Database, bad: dict[str, Any]) -> None:
    with pytest.raises(DatabaseRefused) as refused:
        await _insert_and_undo(database, SOUND | bad)
    cause = refused.value.__cause__
    assert isinstance(cause, asyncpg.CheckViolationError)
    assert cause.constraint_name == "real_time_row"


async def test_the_ends_of_what_a_quote_can_be_are_taken_by_the_table(database: Database) -> None:
    for sound in (
        {"nanos": 999, "symbol": "A" * 64, "source": "\U0001f600" * 255},
        {"price": None, "bid": Decimal(1)},
        {"price": None, "ask": Decimal(-1)},
        {"price": Decimal(10**16) - Decimal("1e-12"), "timestamp": datetime(1677, 9, 22, tzinfo=UTC)},
    ):
        await _insert_and_undo(database, SOUND | sound)
    for price in ("Infinity", "1e16"):
        with pytest.raises(DatabaseRefused) as refused:
            await _insert_and_undo(database, SOUND | {"price": Decimal(price)})
        assert isinstance(refused.value.__cause__, asyncpg.NumericValueOutOfRangeError)


async def _insert_and_undo(database: Database, row: dict[str, Any]) -> None:
    places = ", ".join(f"${place}" for place in range(1, len(row) + 1))
    async with database.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(
                f"INSERT INTO quotes.real_time ({', '.join(row)}) VALUES ({places})", *row.values()
            )
        finally:
            await transaction.rollback()


async def test_whatever_users_read_says_what_it_is(database: Database) -> None:
    async with database.acquire() as connection:
        silent = await connection.fetch(
            "SELECT c.relname::text, a.attname::text FROM pg_class c"
            " LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
            " WHERE c.relnamespace = 'quotes'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p')"
            " AND (obj_description(c.oid, 'pg_class') IS NULL OR col_description(c.oid, a.attnum) IS NULL)"
            " UNION ALL SELECT proname::text, NULL FROM pg_proc"
            " WHERE pronamespace = 'quotes'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL"
        )
    assert [tuple(row) for row in silent] == []


async def test_the_lane_is_at_its_level(lane: Lane, database: Database) -> None:
    if lane.name == "external":
        assert database.capability.level in Level
    else:
        expected = {"postgresql": Level.POSTGRESQL, "timescaledb": Level.COMMUNITY}
        assert database.capability.level == expected[lane.name]
    assert database.capability.level.lacks == "" or database.capability.level < Level.COMMUNITY


async def test_an_unreachable_server_is_told(lane: Lane) -> None:
    with pytest.raises(DatabaseUnavailable):
        await migrate("postgresql://nobody@127.0.0.1:1/none", lane.make_settings())


def test_capability_levels() -> None:
    assert Capability.of(("18.6", None, None)).level == Level.POSTGRESQL
    assert Capability.of(("18.6", "2.29.2", "apache")).level == Level.APACHE
    assert Capability.of(("18.6", "2.29.2", "timescale")).level == Level.COMMUNITY
    assert str(Level.APACHE) == "apache"


def test_a_fetched_row_is_a_quote_before_any_other_was_made() -> None:
    """In an interpreter of its own: the first use of the model completes its mapping only by the constructor."""
    script = (
        "from app.db.models import RealTimeQuote\n"
        "from app.quote.fields import COLUMNS\n"
        "row = dict.fromkeys(COLUMNS.names)\n"
        "quote = RealTimeQuote.of(row)\n"
        "assert quote.symbol is None and quote.to_dict() == row\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
