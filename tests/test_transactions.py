"""The time of a transaction, the end of a commit, and what each refusal of the database is called.

Invariant: what is said not to be stored is not, what is acknowledged is, and each answer comes within its time.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from app.db import transactions
from app.db.capability import Level
from app.db.embedded import embedded_postgres
from app.db.engine import Connection, Database
from app.db.migrate import head, migrate
from app.db.transactions import Transactions
from app.errors import (
    CommitsWaiting,
    DatabaseDamaged,
    DatabaseRefused,
    DatabaseUnavailable,
    OutcomeUnknown,
    QueryTimeout,
    QuotesError,
    QuotesLocked,
    SchemaMismatch,
    WriteTimeout,
)
from app.health import Health
from app.main import create_app
from app.quote.batch import Batch
from app.quote.terms import OnConflict
from app.repository.ingest import Attempt, Write
from app.repository.quotes import QuoteRepository
from app.repository.system import SystemRepository
from tests.conftest import Lane, patiently, random_symbol, running
from tests.test_metrics import here

NOW: Final = datetime.now(UTC).replace(microsecond=0)
#: Of whatever is bounded: the machine may be busy.
SOON: Final = 10.0


def rows(symbol: str, count: int = 3, start: datetime = NOW, price: int = 1) -> list[dict[str, Any]]:
    return [{"symbol": symbol, "timestamp": start + timedelta(seconds=i), "price": price} for i in range(count)]


@asynccontextmanager
async def repository(lane: Lane, url: str, **settings: Any) -> AsyncIterator[tuple[QuoteRepository, Database]]:
    given = lane.make_settings(**settings)
    database = Database(url, given)
    await database.connect()
    try:
        yield QuoteRepository(database, given), database
    finally:
        await database.close()


@pytest.fixture(scope="module")
async def alone(shared_dir: Path) -> AsyncIterator[str]:
    """A server that no other test uses, since its settings change."""
    async with embedded_postgres(shared_dir / "alone") as url:
        lane = Lane("postgresql", url, "")
        await migrate(url, lane.make_settings())
        yield url


@asynccontextmanager
async def without_its_standby(url: str) -> AsyncIterator[Connection]:
    """A server that waits for a standby which is not there."""
    admin = await asyncpg.connect(url)
    await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    await admin.execute("SELECT pg_reload_conf()")
    try:
        await until(lambda: admin.fetchval("SELECT current_setting('synchronous_standby_names') = 'nobody'"))
        yield admin
    finally:
        await admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()


async def test_a_commit_that_is_not_confirmed_has_an_unknown_outcome(alone: str) -> None:
    """Nothing cancels it: PostgreSQL would then call it done, on a disk that may be lost with its quotes."""
    lane = Lane("postgresql", alone, "")
    symbols = [random_symbol() for _ in range(6)]
    async with repository(lane, alone, commit_timeout="300 ms") as (quotes, database):
        async with without_its_standby(alone) as admin:
            outcomes: list[type[Exception]] = []
            for symbol in symbols:
                asked = time.monotonic()
                with pytest.raises(QuotesError) as caught:
                    await quotes.bulk_insert(rows(symbol))
                outcomes.append(type(caught.value))
                assert time.monotonic() - asked < SOON
            assert outcomes == [OutcomeUnknown] * 4 + [CommitsWaiting] * 2
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            assert await admin.fetchval(waiting) == 4, "neither cancelled nor more than these"
            health = Health(SystemRepository(database), lane.make_settings(), head())

            async def told() -> bool:
                database_check = (await health.report()).checks[0]
                assert database_check.status == "healthy" or "for a standby" in database_check.detail
                return database_check.status == "unhealthy" and here("quotes_commits_waiting") == 4

            await until(told)

        async def written() -> bool:
            with suppress(CommitsWaiting):
                return (await quotes.bulk_insert(rows(symbols[0]))).unchanged == 3
            return False

        await until(written)
        assert [await quotes.count_quotes(symbol) for symbol in symbols] == [3, 3, 3, 3, 0, 0]


async def test_a_commit_that_waits_is_named_where_it_may_hold_the_lock(
    alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads of maintenance instead looks for it in vain."""
    monkeypatch.setattr(transactions, "_USUAL", 0)
    lane = Lane("postgresql", alone, "")
    symbol = random_symbol()
    async with repository(lane, alone, commit_timeout="60 s") as (quotes, _):
        async with without_its_standby(alone) as admin:
            first = asyncio.create_task(quotes.bulk_insert(rows(symbol)))
            await until(
                lambda: admin.fetchval("SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            )
            with pytest.raises(CommitsWaiting, match="may hold the lock on these quotes"):
                await quotes.write([Write(Batch.from_rows(rows(symbol)))], Attempt(within=60, lock_timeout=0.1))
        assert (await first).inserted == 3
        locker = await asyncpg.connect(alone)
        await locker.execute("BEGIN; LOCK TABLE quotes.real_time")
        with pytest.raises(QuotesLocked):
            await quotes.write([Write(Batch.from_rows(rows(symbol)))], Attempt(within=60, lock_timeout=0.1))
        await locker.close()


async def test_whoever_cancels_a_commit_learns_that_its_outcome_is_unknown(alone: str) -> None:
    lane = Lane("postgresql", alone, "")
    symbol = random_symbol()
    async with repository(lane, alone) as (quotes, _):
        async with without_its_standby(alone) as admin:
            writing = asyncio.create_task(quotes.bulk_insert(rows(symbol)))
            waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            await until(lambda: admin.fetchval(waiting))
            writing.cancel()
            with pytest.raises(OutcomeUnknown):
                await writing
            assert await admin.fetchval(waiting), "the commit was not cancelled"

        async def stored() -> bool:
            return await quotes.count_quotes(symbol) == 3

        await until(stored)


async def test_a_connection_that_breaks_in_a_commit_leaves_its_outcome_unknown(alone: str) -> None:
    """The quotes are there, and whoever was told that nothing was stored would have been told wrong."""
    lane = Lane("postgresql", alone, "")
    symbol = random_symbol()
    async with repository(lane, alone, commit_timeout="1 hour") as (quotes, _):
        async with without_its_standby(alone) as admin:
            writing = asyncio.create_task(quotes.bulk_insert(rows(symbol)))
            waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            await until(lambda: admin.fetchval(waiting))
            await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            with pytest.raises(OutcomeUnknown, match="broke"):
                await writing
        assert await quotes.count_quotes(symbol) == 3


async def test_a_commit_has_time_of_its_own(alone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the work ends while the COMMIT waits for a standby."""
    lane = Lane("postgresql", alone, "")
    limits: list[asyncio.Timeout] = []
    timeout = asyncio.timeout

    def noted(delay: float | None) -> asyncio.Timeout:
        limit = timeout(delay)
        if delay is not None and delay > 3600:
            limits.append(limit)
        return limit

    async with repository(lane, alone, commit_timeout="1 hour") as (_, database):
        transactions = Transactions(database, timedelta(hours=1))
        async with without_its_standby(alone) as admin:
            monkeypatch.setattr(asyncio, "timeout", noted)
            insert = "INSERT INTO quotes.receipts (key, fingerprint, receipt) VALUES ($1, '', '{}')"
            key = random_symbol()
            committing = asyncio.create_task(
                transactions.run(lambda connection: connection.execute(insert, key), within=7200, lock_timeout=1)
            )
            await until(
                lambda: admin.fetchval("SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            )
            (limit,) = limits
            if limit.when() is not None:
                limit.reschedule(0)
            await asyncio.sleep(0.01)
            assert not committing.done()
        assert await committing == "INSERT 0 1"


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await true():  # noqa: ASYNC110  a state of the server, which tells nobody
            await asyncio.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="the system has no SIGSTOP")
async def test_a_server_that_does_not_answer_is_given_up_in_time(alone: str) -> None:
    lane = Lane("postgresql", alone, "")
    symbol = random_symbol()
    stopped: list[int] = []
    async with repository(lane, alone, write_timeout="5 s") as (quotes, database):
        transactions = Transactions(database, timedelta(seconds=5))

        async def stop_and_ask(connection: Connection) -> None:
            stopped.append(connection.get_server_pid())
            os.kill(stopped[0], signal.SIGSTOP)
            await connection.execute("SELECT 1")

        asked = time.monotonic()
        try:
            with pytest.raises(DatabaseUnavailable):
                await transactions.run(stop_and_ask, within=0.3, lock_timeout=1)
            assert time.monotonic() - asked < SOON
            assert (await quotes.bulk_insert(rows(symbol))).inserted == 3, "on another connection"
        finally:
            os.kill(stopped[0], signal.SIGCONT)


async def test_a_read_of_a_server_that_does_not_answer_is_given_up_in_time(alone: str) -> None:
    lane = Lane("postgresql", alone, "")
    stopped: list[int] = []
    async with repository(lane, alone, statement_timeout="300 ms", pool_size=1, pool_overflow=0) as (quotes, database):

        async def stop_and_ask(connection: Connection) -> None:
            stopped.append(connection.get_server_pid())
            os.kill(stopped[0], signal.SIGSTOP)
            await connection.fetchval("SELECT 1")

        asked = time.monotonic()
        try:
            with pytest.raises(QueryTimeout):
                await database.read(stop_and_ask)
            assert time.monotonic() - asked < SOON
            assert await quotes.get_latest_quote(random_symbol()) is None, "on another connection"
        finally:
            os.kill(stopped[0], signal.SIGCONT)


@pytest.mark.concurrent
async def test_a_write_runs_no_longer_than_it_may(lane: Lane, database: Database) -> None:
    transactions = Transactions(database, timedelta(seconds=5))
    asked = time.monotonic()
    with pytest.raises(WriteTimeout):
        await transactions.run(lambda connection: connection.execute("SELECT pg_sleep(60)"), within=0.2, lock_timeout=1)
    assert time.monotonic() - asked < SOON
    assert await transactions.run(lambda connection: connection.fetchval("SELECT 1"), within=5, lock_timeout=1) == 1


async def test_a_damaged_temporary_table_goes_with_its_session(alone: str) -> None:
    """As PostgreSQL leaves one whose last use was cancelled; the store itself is whole."""
    lane = Lane("postgresql", alone, "")
    sessions = []

    async def work(connection: Connection) -> None:
        sessions.append(connection.get_server_pid())
        if len(sessions) == 1:
            await connection.execute(
                """DO $$ BEGIN RAISE EXCEPTION 'could not read blocks 1..1 in file "base/16385/t5_19442"'
                   USING ERRCODE = 'XX001'; END $$"""
            )

    async with repository(lane, alone) as (_, database):
        await Transactions(database, timedelta(hours=1)).run(work, within=60, lock_timeout=1)
    assert len(set(sessions)) == 2


async def test_a_store_without_settings_takes_no_late_quotes(lane: Lane, empty_url: str, symbol: str) -> None:
    await migrate(empty_url, lane.make_settings())
    late = rows(symbol, start=NOW - timedelta(days=3))
    async with repository(lane, empty_url) as (quotes, database):
        assert (await quotes.bulk_insert(late)).inserted == 3
        async with database.acquire() as connection:
            await connection.execute("DELETE FROM quotes.settings")
        with pytest.raises(SchemaMismatch):
            await quotes.bulk_insert(late)
        with pytest.raises(SchemaMismatch):
            await quotes.delete_quotes(symbol, NOW - timedelta(days=4), NOW)
        report = await Health(SystemRepository(database), lane.make_settings(), head()).report()
    assert report.status == "unhealthy"
    assert "quotes.settings has no row" in report.checks[2].detail


@pytest.mark.parametrize("state", ["40P01", "40001"])
@pytest.mark.parametrize("victim", [2, 3])
@pytest.mark.parametrize("when", ["in a statement", "in the commit"])
async def test_a_victim_of_other_writes_is_tried_again(alone: str, state: str, victim: int, when: str) -> None:
    """Twice, each time in a transaction of its own."""
    lane = Lane("postgresql", alone, "")
    key, insert = random_symbol(), "INSERT INTO quotes.receipts (key, fingerprint, receipt) VALUES ($1, '', '{}')"
    tries = 0

    async def work(connection: Connection) -> int:
        nonlocal tries
        tries += 1
        await connection.execute(insert, key)
        fail = f"BEGIN RAISE EXCEPTION 'a victim' USING ERRCODE = '{state}'; END"
        if tries <= victim and when == "in a statement":
            await connection.execute(f"DO $$ {fail} $$")
        elif tries <= victim:
            await connection.execute(
                "CREATE TEMPORARY TABLE deferred (n int) ON COMMIT DROP;"
                f" CREATE FUNCTION pg_temp.fail() RETURNS trigger LANGUAGE plpgsql AS $$ {fail} $$;"
                " CREATE CONSTRAINT TRIGGER late AFTER INSERT ON pg_temp.deferred DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION pg_temp.fail(); INSERT INTO pg_temp.deferred VALUES (1)"
            )
        return tries

    async with repository(lane, alone) as (_, database):
        attempts = Transactions(database, timedelta(hours=1)).run(work, within=3600, lock_timeout=1)
        if victim == 2:
            assert await attempts == 3
        else:
            with pytest.raises(DatabaseUnavailable, match="in the way"):
                await attempts
        async with database.acquire() as connection:
            stored = await connection.fetchval("SELECT count(*) FROM quotes.receipts WHERE key = $1", key)
        assert (tries, stored) == (3, 1 if victim == 2 else 0)


@pytest.mark.concurrent
async def test_a_lock_is_not_waited_for_long(lane: Lane, quotes: QuoteRepository, database: Database) -> None:
    symbol = random_symbol()
    old = NOW - timedelta(days=400)
    await quotes.bulk_insert(rows(symbol, start=old))
    async with database.dedicated() as holder, holder.transaction():
        relation = "quotes.real_time"
        if database.capability.level >= Level.APACHE:
            relation = await holder.fetchval(
                "SELECT tableoid::regclass::text FROM quotes.real_time WHERE symbol = $1 AND timestamp = $2",
                symbol,
                old,
            )
        await holder.execute(f"LOCK TABLE {relation} IN EXCLUSIVE MODE")
        transactions = Transactions(database, timedelta(seconds=5))
        asked = time.monotonic()
        insert = f"INSERT INTO {relation} (symbol, timestamp, price) VALUES ($1, $2, 1)"
        with pytest.raises(QuotesLocked):
            await transactions.run(
                lambda connection: connection.execute(insert, symbol, old + timedelta(hours=1)),
                within=60, lock_timeout=0.1,
            )  # fmt: skip
        assert time.monotonic() - asked < SOON
        if database.capability.level >= Level.APACHE:
            assert (await quotes.bulk_insert(rows(symbol))).inserted == 3, "another chunk"


@pytest.mark.concurrent
async def test_a_lock_on_an_old_chunk_stops_its_own_quotes_only(lane: Lane, database: Database) -> None:
    """Late quotes wait and are refused, live ones and those of other days are not, through the whole service."""
    if database.capability.level < Level.APACHE:
        pytest.skip(f"the level of this lane is {database.capability.level}: no chunks")
    day = NOW - timedelta(days=500)
    symbols = [random_symbol() for _ in range(12)]

    def one(symbol: str, at: datetime) -> list[dict[str, Any]]:
        return [{"symbol": symbol, "timestamp": at.isoformat(), "price": 1}]

    async with running(create_app(lane.make_settings(write_timeout="20 s"))) as client:
        for at in (day, day + timedelta(days=1)):
            assert (await client.post("/v1/quotes", json=one(symbols[0], at))).status_code == 200
        async with database.dedicated() as holder, holder.transaction():
            chunk = await holder.fetchval(
                "SELECT tableoid::regclass::text FROM quotes.real_time WHERE symbol = $1 AND timestamp = $2",
                symbols[0], day,
            )  # fmt: skip
            await holder.execute(f"LOCK TABLE {chunk} IN EXCLUSIVE MODE")
            blocked = [
                asyncio.create_task(client.post("/v1/quotes", json=one(s, day + timedelta(seconds=1))))
                for s in symbols[:4]
            ]
            beside = [
                asyncio.create_task(client.post("/v1/quotes", json=one(s, day + timedelta(days=1))))
                for s in symbols[4:]
            ]
            for i in range(20):
                live = await client.post("/v1/quotes", json=one(symbols[0], NOW + timedelta(milliseconds=i)))
                assert live.status_code == 200
            assert not any(task.done() for task in blocked), "live quotes were not waited for"
            answers = await asyncio.gather(*blocked)
            assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "quotes-locked")}
            assert {answer.headers["retry-after"] for answer in answers} == {"5"}
            assert {answer.status_code for answer in await asyncio.gather(*beside)} == {200}
        again = await client.post("/v1/quotes", json=one(symbols[0], day + timedelta(seconds=1)))
        assert again.json()["inserted"] == 1


@pytest.mark.concurrent
async def test_reads_that_hang_leave_connections_to_the_writes(lane: Lane, symbol: str) -> None:
    async with repository(lane, lane.url, pool_size=6, pool_overflow=0, pool_timeout="200 ms") as (quotes, database):
        reads = [
            asyncio.create_task(database.read(lambda connection: connection.execute("SELECT pg_sleep(60)")))
            for _ in range(20)
        ]
        await asyncio.sleep(0.1)
        assert (await quotes.bulk_insert(rows(symbol))).inserted == 3
        busy = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), SOON)
        assert {type(error) for error in busy} == {DatabaseUnavailable, QueryTimeout}


@pytest.mark.parametrize(
    ("state", "expected", "retried"),
    [
        ("XX000", DatabaseDamaged, False),
        ("XX001", DatabaseDamaged, False),
        ("XX002", DatabaseDamaged, False),
        ("53100", DatabaseUnavailable, True),
        ("53400", DatabaseRefused, False),
        ("0A000", DatabaseRefused, False),
        ("23514", DatabaseRefused, False),
        ("22003", DatabaseRefused, False),
        ("40P01", DatabaseUnavailable, True),
        ("40001", DatabaseUnavailable, True),
    ],
)
async def test_what_the_database_refuses_is_called_by_its_kind(
    alone: str, state: str, expected: type[QuotesError], retried: bool
) -> None:
    """Never an internal error; and what would not be stored later either is not put off until later."""
    lane = Lane("postgresql", alone, "")
    symbol = random_symbol()
    admin = await asyncpg.connect(alone)
    await admin.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION 'a value of a client' USING ERRCODE = '{state}'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON quotes.real_time FOR EACH ROW
        WHEN (new.symbol = '{symbol}') EXECUTE FUNCTION refuse()""")
    try:
        async with repository(lane, alone) as (quotes, database):
            with pytest.raises(expected) as caught:
                await quotes.bulk_insert(rows(symbol))
            assert type(caught.value) is expected
            assert caught.value.status == 503
            assert (caught.value.retry_after is not None) == retried
            assert "client" not in caught.value.detail
            report = await Health(SystemRepository(database), lane.make_settings(), head()).report()
            assert (report.status == "unhealthy") == state.startswith("XX")
            assert ("an error of its own" in report.checks[0].detail) == state.startswith("XX")
            assert (await quotes.bulk_insert(rows(random_symbol()))).inserted == 3
    finally:
        await admin.execute("DROP FUNCTION refuse CASCADE")
        await admin.close()


@pytest.mark.parametrize("on_conflict", ["update", "merge", "ignore"])
async def test_equal_quotes_leave_the_columnstore_alone(
    lane: Lane, quotes: QuoteRepository, database: Database, on_conflict: OnConflict
) -> None:
    """However many symbols and days they are of; and what differs is still written, in the order of the requests."""
    if database.capability.level < Level.COMMUNITY:
        pytest.skip(f"the level of this lane is {database.capability.level}: no columnstore")
    day = NOW.replace(hour=0, minute=0, second=0) - timedelta(days=700)
    symbols = sorted(random_symbol() for _ in range(120))
    days = (day, day + timedelta(days=1), day + timedelta(days=9))
    stored = [
        {**row, "bid": 3 if i % 2 else None}
        for symbol in symbols
        for start in days
        for i, row in enumerate(rows(symbol, 4, start))
    ]
    await quotes.bulk_insert(stored)
    async with database.dedicated(statement_timeout=timedelta(minutes=1)) as connection:
        chunks = await connection.fetch(
            "SELECT DISTINCT tableoid::regclass::text FROM quotes.real_time"
            " WHERE symbol = ANY($1::text[]) AND timestamp >= $2 AND timestamp < $3",
            symbols, day, day + timedelta(days=10),
        )  # fmt: skip
        assert len(chunks) == 3
        for (name,) in chunks:
            with suppress(asyncpg.DuplicateObjectError):  # the policy of a server with timers was there first
                await patiently(connection, f"CALL convert_to_columnstore('{name}', recompress => true)")

    async def decompressed() -> int:
        async with database.dedicated() as connection:
            rowstore = "SELECT count(*) FROM ONLY {} WHERE symbol = ANY($1::text[])"
            return sum([await connection.fetchval(rowstore.format(name), symbols) for (name,) in chunks])

    assert await decompressed() == 0
    sent = [row for row in stored if row["timestamp"] in days]
    if on_conflict == "merge":
        sent = [{**row, "bid": None} for row in sent]
    receipt = await quotes.bulk_insert(sent, on_conflict=on_conflict)
    assert (receipt.unchanged, receipt.inserted, receipt.updated) == (360, 0, 0)
    assert await decompressed() == 0
    # One that differs among them, and one that is new.
    changed = [{**sent[0], "price": 2}, *sent[1:], *rows(symbols[0], 1, day + timedelta(hours=1))]
    receipt = await quotes.bulk_insert(changed, on_conflict=on_conflict)
    updated = 0 if on_conflict == "ignore" else 1
    assert (receipt.inserted, receipt.updated, receipt.unchanged) == (1, updated, 360 - updated)
    found = await quotes.get_quotes(symbols[0], day, day + timedelta(seconds=1))
    assert [quote.price for quote in found] == [2 if updated else 1]
