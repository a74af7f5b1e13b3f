"""What is called a mistake of configuration and what an outage, and that neither tells a piece of a password."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest
from pydantic import ValidationError

from app.db.embedded import embedded_postgres
from app.db.failures import translate
from app.db.migrate import migrate
from app.errors import (
    DatabaseMisconfigured,
    DatabaseRefused,
    DatabaseUnavailable,
    QuotesError,
    SchemaMismatch,
)
from app.main import create_app
from app.repository.quotes import QuoteRepository
from app.settings import Settings
from tests.conftest import Lane, free_port, random_symbol, running
from tests.proxy import Proxy, proxy
from tests.test_service import command

#: Passwords, or what becomes of them when they are not encoded, begin with this.
SECRET = "hunter"  # noqa: S105  of nobody


@pytest.fixture(scope="module")
async def served(shared_dir: Path) -> AsyncIterator[str]:
    """A server of which tests change who may log in."""
    async with embedded_postgres(shared_dir / "failures") as url:
        await migrate(url, Settings(_env_file=None, database_url=url, require_timescaledb="none"))
        yield url


@pytest.fixture
async def behind(served: str) -> AsyncIterator[Proxy]:
    """The same, over TCP and without TLS."""
    async with proxy(served) as one:
        yield one


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:hunter2@localhost/x",
        "u:hunter2@localhost/x",
        "hunter2",
        "postgresql://u:hunter@2@localhost/x",
        "postgresql://u:hunter2@localhost:99999/x",
        "postgresql://u:hunter2@localhost/x?port=99999",
        "postgresql://u:hunter/2@localhost/x",
        "postgresql://u:hunter?2@localhost/x",
        "postgresql://u:hunter#2@localhost/x",
        "postgresql://u:hunter[2@localhost/x",
        "postgresql://u:[hunter]2@localhost/x",
        "postgresql://u:hunter%2@localhost/x",
        "postgresql://u:hunter2%zz@localhost/x",
        "postgresql://u:hunter2@localhost:hunter/x",
        "postgresql://u:hunter2@local host/x",
        "postgresql://u:hunter2@a,,b/x",
        "postgresql://u:hunter2@localhost/x?hunter",
        "postgresql://u@localhost/x?port=hunter",
        "postgresql://u@localhost/x?sslmode=hunter",
        "postgresql://u:hunter\u2100@localhost/x",
        "postgresql://u:hunter2@h1,h2/x?port=1,2,3",
    ],
)
async def test_a_url_that_leads_nowhere_is_refused_without_a_piece_of_it(url: str) -> None:
    settings = Settings(_env_file=None)
    with pytest.raises(DatabaseMisconfigured) as caught:
        async with QuoteRepository.open(url, settings):
            pass
    assert SECRET not in caught.value.detail
    assert "URL" in caught.value.detail
    assert caught.value.retry_after is None
    if "port=1,2,3" not in url:
        with pytest.raises(ValidationError) as refused:
            Settings(_env_file=None, database_url=url)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///quotes",
        "postgresql://localhost",
        "postgres://u:a%40b@localhost:5432/x",
        "postgresql://u@[::1]:5432/x",
        "postgresql://u:p:q@db-1.example.org,db_2:6432/x?sslmode=verify-full&sslrootcert=/a%20b",
        "postgresql://u@%2Frun%2Fpostgresql/x",
        "postgresql://quotes@/quotes?host=/run/a,/run/b&port=5432&password=un%40used",
        "postgresql://u@münchen.example/x",
    ],
)
def test_a_url_of_any_lawful_form_is_taken(url: str) -> None:
    assert Settings(_env_file=None, database_url=url).database_url is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("?sslmode=require", "no TLS"),
        ("?sslmode=verify-full&sslrootcert=/nowhere/ca.pem", "certificates"),
        ("?nonsense=hunter", "parameter `nonsense`"),
        ("?work_mem=hunter", "parameter `work_mem`"),
        ("?password=un&hunter=2", "a parameter"),
        ("nowhere", "no database"),
    ],
)
async def test_a_mistake_in_the_url_is_no_outage(behind: Proxy, change: str, words: str) -> None:
    with pytest.raises(DatabaseMisconfigured, match=words) as caught:
        async with QuoteRepository.open(behind.url + change, Settings(_env_file=None)):
            pass
    assert "QUOTES_DATABASE_URL" in caught.value.detail
    assert SECRET not in caught.value.detail


async def test_a_login_that_is_refused_is_no_outage(served: str, shared_dir: Path) -> None:
    admin = await asyncpg.connect(served)
    rules = shared_dir / "failures" / "pgdata" / "pg_hba.conf"
    before = rules.read_text()
    await admin.execute("CREATE ROLE careful LOGIN PASSWORD 'right'; CREATE ROLE shut NOLOGIN")
    try:
        rules.write_text(f"local all careful scram-sha-256\n{before}")
        await admin.execute("SELECT pg_reload_conf()")
        base, query = served.replace("quotes@", "{}@").split("?")
        without = "&".join(part for part in query.split("&") if not part.startswith("password="))
        for user, words in (("careful:hunter2", "password"), ("shut", "without LOGIN"), ("nobody", "no role")):
            url = f"{base.format(user)}?{without}"
            async with asyncio.timeout(10):
                while True:  # until the rules are read again
                    with pytest.raises(QuotesError) as caught:
                        async with QuoteRepository.open(url, Settings(_env_file=None)):
                            pass
                    if isinstance(caught.value, DatabaseMisconfigured):
                        break
                    await asyncio.sleep(0.05)
            assert words in caught.value.detail
            assert SECRET not in caught.value.detail
            told = await asyncio.to_thread(command, "migrate", QUOTES_DATABASE_URL=url)
            assert (told.returncode, told.stdout) == (1, "")
            assert told.stderr == f"error: {caught.value.detail}\n"
            serving = await asyncio.to_thread(command, "serve", "--port", str(free_port()), QUOTES_DATABASE_URL=url)
            assert serving.returncode == 2
            assert "QUOTES_DATABASE_URL" in serving.stderr
            assert "Traceback" not in serving.stderr
            assert SECRET not in serving.stderr
    finally:
        rules.write_text(before)
        await admin.execute("SELECT pg_reload_conf()")
        await admin.execute("DROP ROLE careful; DROP ROLE shut")
        await admin.close()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_start_that_no_other_one_mends_has_a_status_of_its_own(served: str, workers: str) -> None:
    """By which a supervisor does not try again: the schema is another application's."""
    admin = await asyncpg.connect(served)
    await admin.execute("CREATE DATABASE theirs")
    url = served.replace("/quotes?", "/theirs?")
    try:
        theirs = await asyncpg.connect(url)
        await theirs.execute("CREATE SCHEMA quotes; CREATE TABLE quotes.orders (id int)")
        await theirs.close()
        arguments = ("serve", "--port", str(free_port()), "--workers", workers)
        ended = await asyncio.to_thread(
            command, *arguments, QUOTES_DATABASE_URL=url, QUOTES_REQUIRE_TIMESCALEDB="none", QUOTES_MIGRATE_ON_START="1"
        )
        assert ended.returncode == 2, ended.stderr
        assert "table quotes.orders of" in ended.stderr
    finally:
        await admin.execute("DROP DATABASE theirs WITH (FORCE)")
        await admin.close()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("DATABASE closed ALLOW_CONNECTIONS false", "takes no connections"),
        ("DATABASE closed CONNECTION LIMIT 0", "^The database takes no more connections: its CONNECTION LIMIT"),
        ("ROLE guest CONNECTION LIMIT 0", "^The role takes no more connections: its CONNECTION LIMIT"),
        ("ROLE guest NOLOGIN", "without LOGIN"),
        ("", "lacks CONNECT"),
    ],
)
async def test_a_door_that_is_shut_is_told_by_its_name(served: str, setting: str, words: str) -> None:
    admin = await asyncpg.connect(served)
    await admin.execute("CREATE DATABASE closed")
    await admin.execute("REVOKE CONNECT ON DATABASE closed FROM PUBLIC; CREATE ROLE guest LOGIN")
    try:
        if setting:
            await admin.execute(f"GRANT CONNECT ON DATABASE closed TO guest; ALTER {setting}")
        url = served.replace("quotes@/quotes", "guest@/closed")
        with pytest.raises(DatabaseUnavailable, match=words):
            await migrate(url, Settings(_env_file=None, database_url=url))
    finally:
        await admin.execute("DROP DATABASE closed")
        await admin.execute("DROP ROLE guest")
        await admin.close()


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("28000", DatabaseRefused),
        ("42501", DatabaseMisconfigured),
        ("42P01", SchemaMismatch),
        ("42703", SchemaMismatch),
        ("42883", SchemaMismatch),
        ("3F000", SchemaMismatch),
        ("42601", DatabaseRefused),
        ("22012", DatabaseRefused),
        ("P0001", DatabaseRefused),
        ("40001", DatabaseUnavailable),
        ("53300", DatabaseUnavailable),
        ("57P01", DatabaseUnavailable),
    ],
)
def test_each_state_has_its_kind(state: str, kind: type[QuotesError]) -> None:
    error = asyncpg.PostgresError.new({"C": state, "M": "words of the server"})
    ours = translate(error)
    assert type(ours) is kind
    assert ours.status == 503
    assert (ours.retry_after is None) == issubclass(kind, (DatabaseMisconfigured, DatabaseRefused))
    assert "words" not in ours.detail


async def test_objects_that_are_dropped_under_a_service_are_never_an_internal_error(served: str) -> None:
    """On a database of its own; what is gone is said by its name, and all else goes on."""
    admin = await asyncpg.connect(served)
    await admin.execute("CREATE DATABASE dropped")
    url = served.replace("/quotes?", "/dropped?")
    lane = Lane("postgresql", url, "")
    await migrate(url, lane.make_settings())
    symbol = random_symbol()
    quote = {"symbol": symbol, "timestamp": "2026-11-16T00:00:00Z", "price": 1}
    reads = (
        f"/v1/quotes?symbols={symbol}&start=2026-11-16",
        f"/v1/quotes/latest?symbols={symbol}",
        f"/v1/quotes/count?symbols={symbol}",
        f"/v1/ohlc?symbols={symbol}&interval=1h&start=2026-11-16",
        f"/v1/summary/daily?symbols={symbol}&start=2026-11-16",
        "/v1/symbols",
        "/v1/storage",
    )
    other = await asyncpg.connect(url)
    async with running(create_app(lane.make_settings(monitor_interval="0"))) as http:

        async def answers() -> dict[int, set[str]]:
            found: dict[int, set[str]] = {}
            for answer in [await http.post("/v1/quotes", json=[quote]), *[await http.get(path) for path in reads]]:
                found.setdefault(answer.status_code, set()).add(answer.json().get("code", ""))
            return found

        try:
            assert await answers() == {200: {""}}
            for statement in (
                "ALTER TABLE quotes.latest RENAME COLUMN source TO origin",
                "ALTER TABLE quotes.latest RENAME COLUMN origin TO source",
                "DROP TABLE quotes.latest",
                "DROP TABLE quotes.real_time CASCADE",
                "DROP SCHEMA quotes CASCADE",
            ):
                await other.execute(statement)
                found = await answers()
                assert found.keys() <= {200, 503}, (statement, found)
                assert found.get(503, set()) <= {"schema-mismatch"}, (statement, found)
                assert (503 in found) == ("TO source" not in statement), statement
        finally:
            await other.close()
            await admin.execute("DROP DATABASE dropped WITH (FORCE)")
            await admin.close()


async def test_connections_that_the_server_ends_are_an_outage_that_passes(served: str) -> None:
    lane = Lane("postgresql", served, "")
    admin = await asyncpg.connect(served)
    symbol = random_symbol()
    everyone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'opa-quotes'"
    async with running(create_app(lane.make_settings(monitor_interval="0"))) as http:
        for round_ in range(5):
            await admin.execute(everyone)
            quote = {"symbol": symbol, "timestamp": f"2026-11-16T00:00:0{round_}Z", "price": 1}
            written = await http.post("/v1/quotes", json=[quote])
            assert written.status_code == 200, written.text
            await admin.execute(everyone)
            read = await http.get(f"/v1/quotes/count?symbols={symbol}")
            assert read.status_code == 200, read.text
            assert json.loads(read.text)["count"] == round_ + 1
    with suppress(asyncpg.InterfaceError):
        await admin.close()


async def test_health_answers_in_json_whatever_is_wrong(served: str) -> None:
    del served
    for url in ("mysql://u:hunter2@localhost/x", "postgresql://u:hunter@2@h/x", "postgresql://u@127.0.0.1:1/x"):
        told = await asyncio.to_thread(command, "health", "--json", QUOTES_DATABASE_URL=url)
        assert told.returncode == 1
        report = json.loads(told.stdout)
        assert report["overall_status"] == "unhealthy"
        assert report["checks"]["database"]["status"] == "unhealthy"
        assert SECRET not in told.stdout + told.stderr
