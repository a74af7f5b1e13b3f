"""A primary and its standby, both real: what is read where, how old it may be, and what failing over costs."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.db.embedded import _Cluster
from app.db.engine import Connection, Database
from app.db.hosts import Control, Server, hosts_of
from app.db.replicas import ReplicatedDatabase
from app.errors import DatabaseUnavailable
from app.main import create_app
from app.metrics import REGISTRY
from app.settings import Settings
from tests.chaos.victims import signal_to
from tests.conftest import random_symbol, running

LAG = 3.0
NOON = "2026-11-16T12:00:00Z"
WHERE = "SELECT pg_is_in_recovery()"


@dataclass(frozen=True, slots=True)
class Pair:
    """A primary with a streaming standby; the standby gives way to replay at once."""

    primary: _Cluster
    standby: _Cluster

    @property
    def settings(self) -> Settings:
        """Settings of a service that writes to whichever is the primary, and reads from either."""
        both = f"postgresql://quotes@/quotes?host={self.primary.socket},{self.standby.socket}"
        return Settings(
            _env_file=None,
            database_url=both,
            read_database_url=f"postgresql://quotes@/quotes?host={self.standby.socket}",
            max_replica_lag=f"{LAG} s",
            require_timescaledb="none",
            retention=None,
            log_format="console",
        )


@contextmanager
def primary_of_its_own(directory: Path) -> Iterator[_Cluster]:
    """A server that is killed at the end, with its standbys' promises broken."""
    directory.mkdir(parents=True)
    cluster = _Cluster.prepare(directory)
    cluster.start()
    try:
        yield cluster
    finally:
        if cluster.postmaster.pid is not None:
            crash(cluster)


@contextmanager
def standby_of(primary: _Cluster, directory: Path, *config: str) -> Iterator[_Cluster]:
    """A standby taken from a primary by `pg_basebackup`, which gives way to replay at once."""
    directory.mkdir(parents=True)
    standby = replace(primary, data=directory / "pgdata", socket=directory / "run")
    for path in (standby.data, standby.socket):
        standby.give(path)
    source = ("-d", f"host={primary.socket} user=quotes application_name={directory.name}")
    standby.run("pg_basebackup", "-R", "--checkpoint=fast", "--no-sync", *source)
    with (standby.data / "postgresql.conf").open("a") as file:
        file.writelines(f"{line}\n" for line in ("max_standby_streaming_delay = 0", *config))
    try:
        standby.start()
        yield standby
    finally:
        if standby.postmaster.pid is not None:
            crash(standby)


@contextmanager
def replication(directory: Path) -> Iterator[Pair]:
    """A primary and a standby."""
    with primary_of_its_own(directory / "p") as primary, standby_of(primary, directory / "s") as standby:
        yield Pair(primary, standby)


@pytest.fixture(scope="module")
def pair(shared_dir: Path) -> Iterator[Pair]:
    """One pair for all tests here; the last of them promotes the standby."""
    with replication(shared_dir / random_symbol()) as built:
        yield built


def crash(cluster: _Cluster) -> None:
    """Stop a server without a word to its clients."""
    cluster.postmaster.stop(immediately=True)


async def within(seconds: float, reached: Callable[[], Awaitable[bool]]) -> float:
    """How long it took until `reached`."""
    began = time.monotonic()
    while not await reached():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


@asynccontextmanager
async def connected(cluster: _Cluster) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(f"postgresql://quotes@/quotes?host={cluster.socket}")
    try:
        yield connection
    finally:
        await connection.close()


class Client:
    """One symbol through the API."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.symbol = random_symbol()

    async def write(self, price: int) -> int:
        """The status of storing a price."""
        quote = {"symbol": self.symbol, "timestamp": NOON, "price": price}
        return (await self.http.post("/v1/quotes", json=[quote])).status_code

    async def price(self, consistency: str = "eventual") -> float | None:
        """The newest price, None if there is none."""
        found = await self.http.get("/v1/quotes/latest", params={"symbols": self.symbol, "consistency": consistency})
        assert found.status_code == 200, found.text
        quotes = found.json()["quotes"]
        return quotes[0]["price"] if quotes else None


def reads(role: str) -> float:
    """How many reads went to a role so far."""
    return REGISTRY.get_sample_value("quotes_reads_total", {"role": role}) or 0


async def in_standby(database: ReplicatedDatabase) -> bool:
    """Whether an ordinary read now runs on a standby."""
    return bool(await database.read(lambda connection: connection.fetchval(WHERE)))


async def _is(client: Client, price: float) -> bool:
    try:
        return await client.price() == price
    except AssertionError:
        return False


async def _writes(client: Client, price: int) -> bool:
    return await client.write(price) == 200


async def _healthy(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health")).status_code == 200


@asynccontextmanager
async def replicated(pair: Pair, **changes: Any) -> AsyncIterator[ReplicatedDatabase]:
    settings = pair.settings.model_copy(update=changes)
    assert settings.database_url is not None
    assert settings.read_database_url is not None
    database = ReplicatedDatabase(
        settings.database_url.get_secret_value(), settings.read_database_url.get_secret_value(), settings
    )
    try:
        await database.connect()
        yield database
    finally:
        await database.close()


async def test_a_read_that_fails_on_the_standby_runs_on_the_primary(pair: Pair) -> None:
    began = asyncio.Event()

    async def work(connection: Connection) -> bool:
        standby: bool = await connection.fetchval(WHERE)
        began.set()
        if standby:
            await connection.fetchval("SELECT count(pg_sleep(4)) FROM public.held")
        return standby

    async with connected(pair.primary) as primary:
        await primary.execute("CREATE TABLE held AS SELECT 1 AS n")
    async with replicated(pair) as database, connected(pair.standby) as standby, connected(pair.primary) as primary:
        await within(5, lambda: standby.fetchval("SELECT to_regclass('held') IS NOT NULL"))
        await within(5, lambda: in_standby(database))

        async def interrupted(how: Callable[[], Awaitable[Any]]) -> bool:
            await within(5, lambda: in_standby(database))
            began.clear()
            read = asyncio.create_task(database.read(work))
            await began.wait()
            await within(
                2,
                lambda: standby.fetchval(
                    "SELECT count(*) > 0 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%held%'"
                    " AND pid <> pg_backend_pid()"
                ),
            )
            started = time.monotonic()
            await how()
            ran_on_standby = await read
            assert time.monotonic() - started < 3
            return not ran_on_standby

        other = "FROM pg_stat_activity WHERE query LIKE '%held%' AND pid <> pg_backend_pid()"
        assert await interrupted(lambda: standby.execute(f"SELECT pg_cancel_backend(pid) {other}"))
        assert await interrupted(lambda: standby.execute(f"SELECT pg_terminate_backend(pid) {other}"))
        # A real conflict: what the standby has to replay takes a lock that the read is in the way of.
        assert await interrupted(lambda: primary.execute("LOCK held IN ACCESS EXCLUSIVE MODE; DROP TABLE held"))

        # A table that the standby does not have yet.
        await standby.execute("SELECT pg_wal_replay_pause()")
        await primary.execute("CREATE TABLE fresh AS SELECT 1 AS n")
        assert await database.read(lambda connection: connection.fetchval("SELECT n FROM public.fresh")) == 1
        # A write by mistake is refused there, and done where it can be.
        await database.read(lambda connection: connection.execute("UPDATE public.fresh SET n = 2"))
        assert await primary.fetchval("SELECT n FROM fresh") == 2
        await standby.execute("SELECT pg_wal_replay_resume()")

    # Without the standby, reads go on, and they come back to it.
    async with replicated(pair) as database:
        await within(5, lambda: in_standby(database))
        crash(pair.standby)
        for _ in range(50):
            assert not await in_standby(database)
        pair.standby.start()
        await within(10, lambda: in_standby(database))


@pytest.mark.long
async def test_a_standby_that_lost_its_primary_grows_old(pair: Pair) -> None:
    async with replicated(pair) as database:
        await within(5, lambda: in_standby(database))
        async with connected(pair.standby) as standby, connected(pair.primary) as primary:
            source = await standby.fetchval("SHOW primary_conninfo")
            await standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
            await standby.execute("SELECT pg_reload_conf()")
            await within(5, lambda: standby.fetchval("SELECT count(*) = 0 FROM pg_stat_wal_receiver"))
            # Everything received is replayed, and nothing happens on the primary: no answer is old.
            await asyncio.sleep(LAG + 1)
            assert await in_standby(database)
            await primary.execute("CREATE TABLE unseen (n int)")
            await within(LAG + 1.5, lambda: _not(in_standby(database)))
            quoted = await standby.fetchval("SELECT quote_literal($1::text)", source)
            await standby.execute(f"ALTER SYSTEM SET primary_conninfo = {quoted}")
            await standby.execute("SELECT pg_reload_conf()")
        await within(10, lambda: in_standby(database))


async def _not(answer: Awaitable[bool]) -> bool:
    return not await answer


async def test_a_pool_on_a_server_that_became_read_only_is_renewed(pair: Pair) -> None:
    async with replicated(pair) as database, connected(pair.primary) as primary:
        async with database.acquire() as connection:
            pid = connection.get_server_pid()
            await connection.execute("SET default_transaction_read_only = on")
        with pytest.raises(Exception, match="read-only"):
            async with database.acquire() as connection:
                await connection.execute("CREATE TABLE public.refused (n int)")
        async with database.acquire() as connection:
            assert connection.get_server_pid() != pid
            await connection.execute("CREATE TABLE public.taken (n int)")
        gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1"
        await within(5, lambda: primary.fetchval(gone, pid))


async def test_lag_consistency_and_failover(pair: Pair) -> None:
    async with running(create_app(pair.settings)) as http:
        client = Client(http)
        routes = [
            "/v1/quotes?symbols={0}&start=2026-11-16",
            "/v1/quotes/latest?symbols={0}",
            "/v1/quotes/intraday?symbol={0}&date=2026-11-16",
            "/v1/quotes/count?symbols={0}",
            "/v1/ohlc?symbols={0}&interval=1h&start=2026-11-16",
            "/v1/summary/daily?symbols={0}&start=2026-11-16",
            "/v1/symbols?limit=1",
        ]
        assert await client.write(1) == 200
        await within(5, lambda: _is(client, 1))

        # Every read runs on the standby, and none with `strong`.
        for consistency, role, other in (("eventual", "replica", "primary"), ("strong", "primary", "replica")):
            before = reads(role), reads(other)
            for route in routes:
                answer = await http.get(f"{route.format(client.symbol)}&consistency={consistency}")
                assert answer.status_code == 200, answer.text
            assert (reads(role), reads(other)) == (before[0] + len(routes), before[1])
        refused = await http.get("/v1/quotes/latest", params={"consistency": "perhaps"})
        assert refused.status_code == 400

        # A standby that does not replay answers with what it has, up to the limit and not beyond it.
        async with connected(pair.standby) as standby:
            await standby.execute("SELECT pg_wal_replay_pause()")
            await within(5, lambda: standby.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"))
            written = time.monotonic()
            assert await client.write(2) == 200
            assert await client.price("strong") == 2
            assert await client.price() == 1
            older = 0.0
            while await client.price() == 1:
                older = time.monotonic() - written
                await asyncio.sleep(0.02)
            assert LAG - 1.5 < older <= LAG + 0.1, older
            assert await client.price() == 2
            await standby.execute("SELECT pg_wal_replay_resume()")
        before_resume = reads("replica")

        async def back() -> bool:
            await client.price()
            return reads("replica") > before_resume

        await within(5, back)

        # An idle primary is no lag.
        await asyncio.sleep(LAG + 1)
        before_idle = reads("replica")
        assert await client.price() == 2
        assert reads("replica") == before_idle + 1

        # The primary dies, the standby is promoted: the service goes on, as it is.
        crash(pair.primary)
        assert await client.price() == 2
        died = time.monotonic()
        assert (await http.get("/health")).status_code == 503
        pair.standby.run("pg_ctl", "promote", "--wait")
        await within(10, lambda: _writes(client, 3))
        writes_back = time.monotonic() - died
        await within(10, lambda: _is(client, 3))
        assert await client.price("strong") == 3
        back_after = time.monotonic() - died
        assert back_after < 10
        await within(5, lambda: _healthy(http))
        print(f"writes back after {writes_back:.1f} s, reads after {back_after:.1f} s")  # noqa: T201  a measurement

        # The standby is the primary now, and no replica of a former one.
        before_failover = reads("replica")

        async def in_rotation() -> bool:
            await client.price()
            return reads("replica") > before_failover

        await within(5, in_rotation)


async def test_failover_from_a_primary_that_hangs(shared_dir: Path) -> None:
    with replication(shared_dir / random_symbol()) as pair:
        postmaster = int((pair.primary.data / "postmaster.pid").read_text().split()[0])
        async with running(create_app(pair.settings)) as http:
            client = Client(http)
            assert await client.write(1) == 200
            async with connected(pair.primary) as primary:
                rows = await primary.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            frozen = [postmaster, *(row[0] for row in rows)]
            signal_to(frozen, signal.SIGSTOP)
            try:
                hung = time.monotonic()
                waiting = asyncio.create_task(client.write(2))
                pair.standby.run("pg_ctl", "promote", "--wait")
                await within(10, lambda: _writes(client, 3))
                assert time.monotonic() - hung < 10
                # Refused, or if it shared a transaction with a later one, tried again with it: they were under way at
                # once, and either may come last.
                last = 3 if await waiting == 503 else await client.price("strong")
                assert last in {2, 3}
                assert await client.price("strong") == last
                await within(5, lambda: _is(client, last))
            finally:
                signal_to(frozen, signal.SIGCONT)


async def test_a_read_that_needs_a_new_connection_to_a_server_that_hangs(shared_dir: Path) -> None:
    with primary_of_its_own(shared_dir / random_symbol()) as primary:
        settings = Settings(_env_file=None, pool_timeout="1 s", statement_timeout="1 s", require_timescaledb="none")
        postmaster = int((primary.data / "postmaster.pid").read_text().split()[0])
        for hosts in (f"{primary.socket}", f"{primary.socket},{primary.socket}"):
            database = Database(f"postgresql://quotes@/quotes?host={hosts}", settings)
            await database.connect()
            async with database.acquire():
                os.kill(postmaster, signal.SIGSTOP)
                try:
                    began = time.monotonic()
                    with pytest.raises(DatabaseUnavailable):
                        await database.read(lambda connection: connection.fetchval("SELECT 1"))
                    # 1 + 1 + 0.5, and as much again for a machine that is busy.
                    assert time.monotonic() - began < 5
                finally:
                    os.kill(postmaster, signal.SIGCONT)
            assert await database.read(lambda connection: connection.fetchval("SELECT 1")) == 1
            await database.close()


def test_a_standby_of_another_history_stays_out(pair: Pair) -> None:
    settings = pair.settings
    database = ReplicatedDatabase("postgresql:///a", "postgresql:///b", settings)
    (replica,) = database._replicas
    primary, standby = (
        Server(datetime(2026, 1, day, tzinfo=UTC), kind, not kind, 1, 100) for kind, day in ((False, 1), (True, 2))
    )

    def judged(position: int, written: int) -> bool:
        database._log.samples.append((time.monotonic(), written))
        database._judge(replica, replace(standby, position=position), replace(primary, position=written))
        return database._recent() == [replica]

    assert judged(100, 100)
    assert not judged(101, 100)
    assert not judged(101, 200)
    replica.seen = standby = replace(standby, started=datetime(2026, 1, 3, tzinfo=UTC))
    assert judged(200, 200)

    # A standby of another database, which has replayed less.
    replica.seen = standby = replace(standby, started=datetime(2026, 1, 4, tzinfo=UTC), control=Control(2))
    assert not judged(100, 200)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://u:p@a:1,b:2/db?x=1", ["postgresql://u:p@a:1/db?x=1", "postgresql://u:p@b:2/db?x=1"]),
        ("postgresql://u@/db?host=/a,/b", ["postgresql://u@/db?host=%2Fa", "postgresql://u@/db?host=%2Fb"]),
        ("postgresql://a,b/db?port=1,2", ["postgresql://a/db?port=1", "postgresql://b/db?port=2"]),
        ("postgresql://u@[::1]:5432/db", ["postgresql://u@[::1]:5432/db"]),
        ("postgresql:///db", ["postgresql:///db"]),
    ],
)
def test_hosts_of_a_url(url: str, hosts: list[str]) -> None:
    assert hosts_of(url) == hosts
