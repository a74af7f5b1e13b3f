"""The short half of `make matrix`, and what health makes of the settings of a server."""

import asyncio
import shutil
import string
import subprocess
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from app.db import needs
from app.db.capability import Level
from app.db.embedded import embedded_postgres
from app.db.engine import Connection, Database
from app.db.failures import translate
from app.errors import DatabaseMisconfigured, DatabaseUnavailable
from app.repository.quotes import QuoteRepository
from app.repository.system import SystemRepository
from app.settings import Settings
from tests.chaos.reporting import Report
from tests.conftest import EXTERNAL_URL, Lane
from tests.matrix.cases import CASES, Case
from tests.matrix.trying import Server, pooled, run, serve, settings_of
from tests.pooler import has_ipv6, pgbouncer, program


def named(*names: str) -> Sequence[Case]:
    found = [case for case in CASES if case.name in names]
    assert len(found) == len(names)
    return found


async def test_what_others_set_is_served_right_or_refused_by_a_sentence(shared_dir: Path) -> None:
    cases = named(
        "all that sessions set", "LATIN1", "default_transaction_read_only = on", "another application's revision r7",
        "a role that owns its schema only", "a role without CREATE", "fsync = off", "no temporary files, of a role",
    )  # fmt: skip
    async with embedded_postgres(shared_dir / "matrix") as url:
        report = await run(Server(url, own=True), cases, "short")
    assert not report.broken, report
    assert not [name for name, outcome in report.figures.items() if outcome.startswith("skipped")]


@pytest.mark.skipif(not EXTERNAL_URL, reason="TEST_DATABASE_URL is not set")
async def test_a_server_with_timescaledb_too() -> None:
    cases = named("all that sessions set", "TimescaleDB in another schema", "timescaledb.restoring = on",
                  "a role that owns its schema only", "a role without USAGE on the schema of TimescaleDB",
                  "an owner that cannot log in")  # fmt: skip
    report = await run(Server(EXTERNAL_URL, own=False), cases, "short")
    assert not report.broken, report


async def test_pgbouncer_has_to_keep_sessions_apart(shared_dir: Path) -> None:
    program()
    directory = shared_dir / "pooled"
    directory.mkdir()
    async with embedded_postgres(shared_dir / "matrix") as url:
        server = Server(url, own=True)
        for mode in ("session", "transaction", "statement"):
            report = await pooled(server, directory, mode)
            assert not report.broken, report


def certified(directory: Path) -> tuple[Path, Path]:
    """A certificate of the loopback's addresses, and its key; skips where there is nothing to make one."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    certificate, key = directory / "server.crt", directory / "server.key"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=managed",
         "-addext", "subjectAltName=IP:127.0.0.1,IP:::1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    key.chmod(0o644)  # read by another user, and of nothing
    return certificate, key


async def test_manners_of_a_managed_server(shared_dir: Path) -> None:
    """No superuser, TLS with a certificate that is checked, a password of all that is special, IPv6, several hosts."""
    program()
    directory = shared_dir / "managed"
    directory.mkdir(mode=0o755)
    certificate, key = certified(directory)
    tls = {"client_tls_sslmode": "require", "client_tls_key_file": str(key), "client_tls_cert_file": str(certificate)}
    password = string.punctuation + " é€"
    case = Case("managed", role=True, before=("CREATE SCHEMA quotes AUTHORIZATION {role}",))
    async with embedded_postgres(shared_dir / "matrix") as url, AsyncExitStack() as stack:
        server = Server(url, own=True)
        inside, names = await stack.enter_async_context(server.prepared(case))
        through = stack.enter_context(
            pgbouncer(directory / "pooler", inside, "session", password=password, options=tls)
        )
        auth, _, rest = through.rpartition("@")
        port = rest.partition("/")[0].rpartition(":")[2]
        hosts = [f"127.0.0.1:{port}"] + ([f"[::1]:{port}"] if has_ipv6() else [])
        checked = f"/{names['database']}?sslmode=verify-full&sslrootcert={certificate}"
        report = Report("managed")
        outcome = await serve(settings_of(f"{auth}@{','.join(hosts)}{checked}"))
        await server.judge(case, outcome, await server.plain(), names, report)
        assert not report.broken, report
        for host in hosts:
            database = Database(f"{auth}@{host}{checked}", Settings(_env_file=None))
            await database.connect()
            await database.close()
        wrong = auth.rpartition(":")[0] + ":" + quote(password[:-1], safe="")
        for refused in (f"{wrong}@{hosts[0]}{checked}", f"{auth}@{hosts[0]}/{names['database']}?sslmode=disable"):
            with pytest.raises(DatabaseUnavailable):
                await Database(refused, Settings(_env_file=None)).connect()


async def test_a_pooler_that_others_use_is_found_out_too(shared_dir: Path) -> None:
    """Then a session that is given back is seldom the next that is taken."""
    async with embedded_postgres(shared_dir / "matrix") as url, AsyncExitStack() as stack:
        through = stack.enter_context(pgbouncer(shared_dir / "crowded", url, "transaction", size=8))
        others = [await asyncpg.connect(through, statement_cache_size=0) for _ in range(6)]

        async def use(connection: Connection) -> None:
            while True:
                await connection.execute("SELECT pg_sleep(0.002)")

        tasks = [asyncio.create_task(use(connection)) for connection in others]
        try:
            database = Database(through, Settings(_env_file=None, pool_size=1))
            with pytest.raises(DatabaseMisconfigured, match="pool_mode = session is needed"):
                await database.connect()
            await database.close()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for connection in others:
                connection.terminate()


@pytest.mark.concurrent  # the WebAssembly server shows no locks
async def test_relations_are_those_that_a_statement_over_all_quotes_locks(
    lane: Lane, database: Database, quotes: QuoteRepository, symbol: str
) -> None:
    days = [datetime.now(UTC) - timedelta(days=day) for day in range(7)]  # before any job compresses them
    await quotes.bulk_insert([{"symbol": symbol, "timestamp": day, "price": 1} for day in days])
    seen = await SystemRepository(database).observe(5)
    async with database.acquire() as connection, connection.transaction():
        await connection.fetchval("SELECT count(*) FROM quotes.real_time WHERE symbol <> 'none'")
        held = await connection.fetchval(
            "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = relation WHERE pid = pg_backend_pid()"
            " AND relnamespace = to_regnamespace('_timescaledb_internal')"
        )
    if seen.capability.level < Level.APACHE:
        assert (held, seen.server.relations) == (0, 0)
    else:
        assert held >= 2 * len(days)
        assert held <= seen.server.relations <= held + seen.server.relations // 3


def server(each: int, relations: int, major: int = 17, **settings: str) -> needs.Server:
    given = {"max_locks_per_transaction": str(each), "max_connections": "100", "max_prepared_transactions": "0"}
    return needs.Server(given | settings, relations, major, "quotes_owner", "quotes")


SETTINGS = Settings(_env_file=None)


@pytest.mark.parametrize(
    ("each", "relations", "processes", "major", "enough"),
    [
        (64, 3 * 360, 1, 17, 192),
        (64, 3 * 100, 1, 17, None),
        (192, 3 * 360, 1, 17, None),
        (512, 5 * 730, 1, 17, 576),
        (512, 5 * 730, 1, 18, None),
        (512, 5 * 730, 4, 18, 1088),
        (64, 0, 64, 17, None),
    ],
)
def test_locks_are_compared_with_what_chunks_and_connections_may_need(
    each: int, relations: int, processes: int, major: int, enough: int | None
) -> None:
    told = needs.harmful(server(each, relations, major), SETTINGS, processes, jobs=False)
    if enough is None:
        assert told == []
        return
    (sentence,) = told
    assert sentence.startswith(f"max_locks_per_transaction is {each}, and {enough} or more is needed for ")
    assert needs.harmful(server(enough, relations, major), SETTINGS, processes, jobs=False) == []


def test_timeouts_and_isolation_harm_jobs_and_nothing_else() -> None:
    short = server(64, 0, transaction_timeout="5000", lock_timeout="100", statement_timeout="5000")
    told = needs.harmful(short, SETTINGS, 1, jobs=True)
    assert [sentence.split()[0] for sentence in told] == ["transaction_timeout", "lock_timeout"]
    assert told[0].endswith("ALTER ROLE quotes_owner IN DATABASE quotes SET transaction_timeout = 0.")
    assert needs.harmful(short, SETTINGS, 1, jobs=False) == []
    (isolated,) = needs.harmful(server(64, 0, default_transaction_isolation="serializable"), SETTINGS, 1, jobs=True)
    assert isolated.endswith("SET default_transaction_isolation = 'read committed'.")
    assert "statement_timeout is 5000 ms" in needs.overridden(short, SETTINGS)
    long = server(64, 0, statement_timeout="60000", idle_in_transaction_session_timeout="60000")
    assert needs.overridden(long, SETTINGS) == ""


def test_no_room_for_a_lock_is_told_from_no_memory() -> None:
    error = asyncpg.OutOfMemoryError("out of shared memory")
    plain = translate(error)
    error.hint = 'You might need to increase "max_locks_per_transaction".'
    locks = translate(error)
    assert plain is not None
    assert locks is not None
    assert "max_locks_per_transaction" in locks.detail
    assert "max_locks_per_transaction" not in plain.detail
    assert (locks.status, locks.retry_after) == (503, 1.0)
