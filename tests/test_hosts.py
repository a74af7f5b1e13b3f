"""Several servers that take writes, real ones: which is written to, who is told, and what is lost."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.db.embedded import _Cluster
from app.db.engine import Connection, Database
from app.db.hosts import Control, Server, choose, name_of
from app.db.migrate import migrate
from app.errors import DatabaseUnavailable
from app.main import create_app
from app.metrics import REGISTRY
from app.repository.system import SystemRepository
from app.settings import Settings
from tests.chaos.victims import signal_to
from tests.conftest import random_symbol, running
from tests.test_replicas import Client, _writes, connected, crash, primary_of_its_own, standby_of, within

NAMES = ("db1", "db2", "db3")
STARTED = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
ONE, OTHER = Control(1), Control(2)


def primary(number: int, timeline: int, of: Control = ONE) -> Server:
    return Server(STARTED[number - 1], False, True, timeline, 100, of)


def standby(number: int, reached: int = 1, of: Control = ONE) -> Server:
    return Server(STARTED[number - 1], True, False, 0, 100, replace(of, reached=reached))


@pytest.mark.parametrize(
    ("seen", "last", "expected"),
    [
        ((primary(1, 1), standby(2), standby(3)), None, 0),
        ((standby(1), primary(2, 2), None), None, 1),
        ((primary(1, 1), primary(2, 2), None), None, 1),
        ((primary(1, 3), primary(2, 2), None), None, 0),
        # One server under two names.
        ((None, primary(2, 2), primary(2, 2)), None, 1),
        # A server that is made read-only is fenced.
        ((replace(primary(1, 2), writable=False), primary(2, 1), None), None, 1),
        ((replace(primary(1, 2, Control(1, 2)), writable=False), primary(2, 1), None), None, 1),
        ((None, None, None), None, "None of the database hosts"),
        ((standby(1), standby(2), None), None, "None of the database hosts"),
        ((primary(1, 1), primary(2, 2), primary(3, 2)), None, "db2 and db3 take writes, both on timeline 2"),
        ((primary(1, 1), primary(2, 2, OTHER), None), None, "db1 and db2 take writes and are not copies"),
        # Two servers may have been started at once.
        ((primary(1, 1), primary(1, 1, OTHER), None), None, "db1 and db2 take writes and are not copies"),
        # A process knows its own database, and what it has written.
        ((primary(1, 1), primary(2, 2, OTHER), None), primary(1, 1), 0),
        ((None, primary(2, 2, OTHER), None), primary(1, 1), "db2 takes writes, but its system identifier"),
        ((primary(1, 1), None, None), primary(2, 2), "db1 takes writes on timeline 1, and this process has written"),
        ((primary(1, 1), None, None), primary(1, 1), 0),
        # So do the standbys of the primary that is away, but not those of another database.
        ((primary(1, 1), None, standby(3, 2)), None, "the standby db3 follows timeline 2"),
        ((primary(1, 1), None, standby(3, 2, OTHER)), None, 0),
    ],
)
def test_the_server_to_write_to(seen: tuple[Server | None, ...], last: Server | None, expected: int | str) -> None:
    if isinstance(expected, int):
        assert choose(NAMES, seen, last) == expected
    else:
        with pytest.raises(DatabaseUnavailable, match=expected):
            choose(NAMES, seen, last)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql://u:secret@db1:5432/quotes?password=secret", "db1:5432"),
        ("postgresql://u:secret@[::1]:5432/quotes", "[::1]:5432"),
        ("postgresql://u:secret@/quotes?host=/run/a&port=5433", "/run/a:5433"),
        ("postgresql:///quotes", "localhost"),
    ],
)
def test_a_host_is_named_without_who_logs_in(url: str, name: str) -> None:
    assert name_of(url) == name


def url(*servers: _Cluster) -> str:
    return f"postgresql://quotes:secret@/quotes?host={','.join(str(server.socket) for server in servers)}"


def settings(*servers: _Cluster, **changes: Any) -> Settings:
    values = {
        "database_url": url(*servers), "require_timescaledb": "none", "retention": None, "log_format": "console",
        "max_replica_lag": "3 s",
    }  # fmt: skip
    return Settings(_env_file=None, **values | changes)


async def socket_of(connection: Connection) -> Path:
    """Of the server at the other end; a name in the list of directories may be quoted."""
    listed: str = await connection.fetchval("SHOW unix_socket_directories")
    return Path(listed.strip('"'))


async def reached(*servers: _Cluster) -> Path:
    """The socket of the server that a new process writes to.

    Raises:
        DatabaseUnavailable: it is told to write to none.
    """
    database = Database(url(*servers), settings(*servers))
    async with database.dedicated(10) as connection:
        return await socket_of(connection)


@contextmanager
def three(directory: Path, *config: str) -> Iterator[tuple[_Cluster, _Cluster, _Cluster]]:
    """A primary and two standbys of it, migrated."""
    with (
        primary_of_its_own(directory / "one") as one,
        standby_of(one, directory / "two", *config) as two,
        standby_of(one, directory / "three", *config) as third,
    ):
        yield one, two, third


def promote(server: _Cluster) -> None:
    server.run("pg_ctl", "promote", "--wait")


async def database_check(http: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get("/health")).json()["checks"]["database"]
    return found


def writable_servers() -> float:
    return REGISTRY.get_sample_value("quotes_writable_servers") or 0


async def stored(server: _Cluster, symbol: str) -> set[float]:
    """Every price of a symbol on one server."""
    async with connected(server) as connection:
        rows = await connection.fetch("SELECT price FROM quotes.real_time WHERE symbol = $1", symbol)
    return {float(row[0]) for row in rows}


async def test_two_servers_take_writes(shared_dir: Path) -> None:
    with three(shared_dir / random_symbol()) as (one, two, third):
        every = settings(one, two, third, read_database_url=url(one, two))
        async with running(create_app(every)) as http:
            client = Client(http)
            assert await client.write(1) == 200
            assert writable_servers() == 1

            # Promoted without a fence: a process that runs moves, one that starts finds it in any order of the URL.
            promote(two)

            async def told() -> bool:
                return str((await database_check(http))["status"]) == "degraded"

            took = await within(5, told)
            print(f"moved to the promoted server after {took:.1f} s")  # noqa: T201  a measurement
            check = await database_check(http)
            assert f"2 servers take writes: {one.socket} (timeline 1), {two.socket} (timeline 2)" in check["detail"]
            assert f"writes to {two.socket}" in check["detail"]
            assert "secret" not in str(check)
            assert writable_servers() == 2
            for price in range(2, 12):
                assert await client.write(price) == 200
                # Also a read that may come from any server never comes from the old one.
                assert await client.price() == price
            assert await stored(two, client.symbol) == {11}
            assert await stored(one, client.symbol) == {1}
            assert await reached(one, two, third) == await reached(two, one) == two.socket

            # The old primary restarts, as a machine that comes back does.
            crash(one)
            await within(5, lambda: _only(1))
            one.start()
            await within(5, lambda: _only(2))
            assert await client.write(12) == 200
            assert await stored(two, client.symbol) == {12}
            assert await reached(one, two, third) == two.socket

            # The promoted one dies too: who has written there does not go back, but to it when it is up again.
            crash(two)
            refused = await http.post(
                "/v1/quotes", json=[{"symbol": client.symbol, "timestamp": "2026-11-16T12:00:00Z", "price": 13}]
            )
            assert refused.status_code == 503
            await within(5, lambda: _unhealthy(http))
            assert "this process has written on timeline 2" in (await database_check(http))["detail"]
            assert await client.write(13) == 503
            two.start()
            await within(10, lambda: _writes(client, 13))
            assert await stored(one, client.symbol) == {1}

            # Two promoted standbys are on the same timeline: who runs goes on and tells, who starts refuses.
            promote(third)
            await within(5, lambda: _only(3))
            assert await client.write(14) == 200
            assert await stored(two, client.symbol) == {14}
            for servers in ((one, two, third), (third, two)):
                with pytest.raises(DatabaseUnavailable, match="both on timeline 2"):
                    await reached(*servers)
                with pytest.raises(DatabaseUnavailable, match="both on timeline 2"):
                    await migrate(url(*servers), every)
            crash(third)
            assert await reached(one, two, third) == two.socket


async def _only(count: int) -> bool:
    return writable_servers() == count


async def _unhealthy(http: httpx.AsyncClient) -> bool:
    return str((await database_check(http))["status"]) == "unhealthy"


async def test_one_server_under_two_names_and_another_database(shared_dir: Path) -> None:
    directory = shared_dir / random_symbol()
    with primary_of_its_own(directory / "one") as one, primary_of_its_own(directory / "other") as other:
        alias = replace(one, socket=directory / "alias")
        alias.socket.symlink_to(one.socket)
        both = settings(one, alias)
        async with running(create_app(both)) as http:
            assert (await database_check(http))["status"] == "healthy"
            assert writable_servers() == 1
        with pytest.raises(DatabaseUnavailable, match="not copies of one database"):
            await reached(one, other)
        with pytest.raises(DatabaseUnavailable, match="not copies of one database"):
            async with running(create_app(settings(one, other))):
                pass  # pragma: no cover  it does not start

        # One that comes up later is told of, and not written to.
        crash(other)
        async with running(create_app(settings(one, other))) as http:
            client = Client(http)
            other.start()
            await within(5, lambda: _only(2))
            assert await client.write(1) == 200
            crash(one)
            assert await client.write(2) == 503
            await within(5, lambda: _unhealthy(http))
            assert "its system identifier is not that" in (await database_check(http))["detail"]
            one.start()
            await within(10, lambda: _writes(client, 2))


class Address:
    """An address that leads to one server or to another, as a virtual IP or a balancer does."""

    def __init__(self, target: _Cluster) -> None:
        self.target = target

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(self.target.socket / ".s.PGSQL.5432")
        try:
            await asyncio.gather(self._pipe(reader, there[1]), self._pipe(there[0], writer))
        finally:
            there[1].close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def listening(serve: Any) -> AsyncIterator[int]:
    """The port of a server whose connections end with the block."""
    tasks: set[asyncio.Task[None]] = set()

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(kept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_address_that_moves(shared_dir: Path) -> None:
    """Old connections stay with the old server, which takes their writes: the next health check ends that."""
    directory = shared_dir / random_symbol()
    with primary_of_its_own(directory / "one") as one, standby_of(one, directory / "two") as two:
        address = Address(one)
        async with listening(address.serve) as port:
            database = Database(f"postgresql://quotes@127.0.0.1:{port}/quotes", settings(one))
            await database.connect()
            system = SystemRepository(database)

            async def written_to() -> Path:
                async with database.acquire() as connection:
                    return await socket_of(connection)

            address.target = two
            promote(two)
            assert await written_to() == one.socket
            await system.observe(5)
            assert await written_to() == two.socket
            await database.close()


async def test_whoever_finds_the_new_primary_breaks_what_waits_for_the_old_one(shared_dir: Path) -> None:
    directory = shared_dir / random_symbol()
    with primary_of_its_own(directory / "one") as one, standby_of(one, directory / "two") as two:
        database = Database(url(one, two), settings(one, two))
        await database.connect()
        async with database.acquire() as old:
            promote(two)
            database.doubt()
            async with database.acquire() as new:
                assert await socket_of(new) == two.socket
            assert old.is_closed()
        await database.close()


@pytest.mark.long
async def test_a_host_that_does_not_answer_holds_up_no_connection(shared_dir: Path) -> None:
    held = 0

    async def hole(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        nonlocal held
        held += 1
        while await reader.read(65536):
            pass

    with primary_of_its_own(shared_dir / random_symbol()) as one:
        async with listening(hole) as port, AsyncExitStack() as stack:
            hosts = f"postgresql://quotes@/quotes?host=127.0.0.1,{one.socket}&port={port},5432"
            database = Database(hosts, settings(one))
            await database.connect()
            assert held == 1
            for _ in range(10):
                await stack.enter_async_context(database.acquire())
            assert held == 1, "only the first connection looked at all hosts"
            # When the server restarts, all are looked at again, once for all connections that are opened then.
            await stack.aclose()
            crash(one)
            one.start()

            async def noticed() -> bool:
                return not database._vouched()

            await within(5, noticed)

            async def use() -> int:
                async with database.acquire() as connection:
                    await asyncio.sleep(0.2)
                    return int(await connection.fetchval("SELECT 1"))

            assert await asyncio.gather(*(use() for _ in range(5))) == [1] * 5
            assert held == 2
            await database.close()


class Feed:
    """A client that sends quotes one after the other, each until it is acknowledged."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.symbol = random_symbol()
        self.acknowledged: list[tuple[float, int]] = []
        self.stopped = False

    async def run(self) -> None:
        number = 0
        while not self.stopped:
            number += 1
            moment = datetime(2026, 11, 16, 12, tzinfo=UTC) + timedelta(microseconds=number)
            quote = {"symbol": self.symbol, "timestamp": moment.isoformat(), "price": number}
            await within(30, partial(self._send, quote))
            self.acknowledged.append((time.monotonic(), number))

    async def _send(self, quote: dict[str, Any]) -> bool:
        return (await self.http.post("/v1/quotes", json=[quote])).status_code == 200

    def since(self, moment: float) -> int:
        return sum(at > moment for at, _ in self.acknowledged)

    async def wait(self, count: int) -> None:
        """Until that many more were acknowledged."""
        now = time.monotonic()

        async def done() -> bool:
            return self.since(now) >= count

        await within(20, done)


def processes(server: _Cluster, pids: list[int]) -> list[int]:
    return [int((server.data / "postmaster.pid").read_text().split()[0]), *pids]


@pytest.mark.parametrize(
    "synchronous",
    [pytest.param(False, id="asynchronous", marks=pytest.mark.long), pytest.param(True, id="synchronous")],
)
async def test_what_was_acknowledged_outlives_its_primary(shared_dir: Path, synchronous: bool) -> None:
    """The primary hangs, a standby is gone, the other is promoted, and the old primary wakes up and takes writes."""
    with three(shared_dir / random_symbol()) as (one, two, third):
        async with connected(one) as admin:
            if synchronous:
                await admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (two, three)'")
            # Else the log that pg_rewind reads may be gone.
            await admin.execute("ALTER SYSTEM SET wal_keep_size = '1GB'")
            await admin.execute("SELECT pg_reload_conf()")
        async with running(create_app(settings(one, two, third))) as http:
            feeds = [Feed(http) for _ in range(4)]
            tasks = [asyncio.create_task(feed.run()) for feed in feeds]
            await asyncio.gather(*(feed.wait(50) for feed in feeds))
            crash(third)
            await asyncio.gather(*(feed.wait(50) for feed in feeds))
            async with connected(one) as admin:
                rows = await admin.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            frozen = processes(one, [row[0] for row in rows])
            signal_to(frozen, signal.SIGSTOP)
            hung = time.monotonic()
            await asyncio.sleep(2)
            promoting = time.monotonic()
            await asyncio.to_thread(promote, two)
            await asyncio.gather(*(feed.wait(50) for feed in feeds))
            first = min(at for feed in feeds for at, _ in feed.acknowledged if at > promoting)
            signal_to(frozen, signal.SIGCONT)
            # Two take writes: a new process goes where the others are.
            assert await reached(one, two, third) == two.socket
            await asyncio.gather(*(feed.wait(50) for feed in feeds))
            await within(5, lambda: _only(2))

            # It comes back as a standby of its successor, as the documentation says.
            await asyncio.to_thread(one.run, "pg_ctl", "stop", "--mode=fast", "--wait")
            source = f"host={two.socket} user=quotes dbname=quotes"
            await asyncio.to_thread(one.run, "pg_rewind", f"--source-server={source}", "--write-recovery-conf")
            await asyncio.to_thread(one.start)
            await within(5, lambda: _only(1))
            await asyncio.gather(*(feed.wait(50) for feed in feeds))
            for feed in feeds:
                feed.stopped = True
            await asyncio.gather(*tasks)

            sent = {feed.symbol: {number for _, number in feed.acknowledged} for feed in feeds}
            lost = {symbol: numbers - await stored(two, symbol) for symbol, numbers in sent.items()}
            total = sum(map(len, sent.values()))
            missing = sum(map(len, lost.values()))
            print(  # noqa: T201  a measurement
                f"{total} acknowledged, {missing} lost; writes back {first - promoting:.1f} s after the promotion,"
                f" {first - hung:.1f} s after the primary hung"
            )
            # Each client waits for its answer, so that asynchronous replication can lose one of each at most.
            assert missing <= (0 if synchronous else len(feeds))

            async def replayed() -> bool:
                return all([await stored(one, symbol) >= sent[symbol] - lost[symbol] for symbol in sent])

            await within(10, replayed)
