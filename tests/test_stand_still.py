"""A database that stands still, or whose packets are lost: every answer comes in its time, and all is well afterwards.

The servers are stopped by SIGSTOP, all of their processes, or lie behind a proxy that swallows what it gets.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest

from app.db.embedded import _Cluster
from app.db.engine import Connection, Database
from app.db.migrate import migrate
from app.db.replicas import ReplicatedDatabase
from app.errors import DatabaseUnavailable, QueryTimeout
from app.main import create_app
from app.repository import storage
from app.repository.storage import StorageRepository
from app.settings import Settings
from tests.chaos.victims import signal_to
from tests.conftest import random_symbol, running
from tests.proxy import Proxy, proxy
from tests.test_replicas import primary_of_its_own, standby_of, within

#: Seconds, small so that a fault may be short; and what the machine may add, on which other tests run too.
POOL, STATEMENT, WRITE, COMMIT = 1.0, 1.0, 2.0, 1.0
SLACK: Final = 1.0
READING: Final = POOL + STATEMENT + 0.5
WRITING: Final = 1.5 * WRITE + COMMIT
TOKEN: Final = "still"  # noqa: S105  of a service that lives for a test
DAY: Final = "2026-11-16"


def url_of(cluster: _Cluster) -> str:
    return f"postgresql://quotes@/quotes?host={cluster.socket}"


def settings_of(url: str, **others: Any) -> Settings:
    values = {
        "pool_timeout": f"{POOL} s", "statement_timeout": f"{STATEMENT} s", "write_timeout": f"{WRITE} s",
        "commit_timeout": f"{COMMIT} s", "require_timescaledb": "none", "retention": None, "monitor_interval": "0",
        "log_format": "console", "admin_token": TOKEN,
    }  # fmt: skip
    return Settings(_env_file=None, database_url=url, **(values | others))


def processes(cluster: _Cluster) -> list[int]:
    """The postmaster and all that it started."""
    postmaster = int((cluster.data / "postmaster.pid").read_text().split()[0])
    found = [postmaster]
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue
            if int(status.rpartition(")")[2].split()[1]) == postmaster:
                found.append(int(entry.name))
    return found


@contextmanager
def halted(cluster: _Cluster) -> Iterator[None]:
    """A server of which no process runs."""
    stopped = processes(cluster)
    signal_to(stopped, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_to(stopped, signal.SIGCONT)


@contextmanager
def swallowed(way: Proxy) -> Iterator[None]:
    """A network that loses everything; what was open then is half-open."""
    way.swallows = True
    try:
        yield
    finally:
        way.swallows = False


@dataclass(frozen=True, slots=True)
class Still:
    """A server, and a way to it that can be closed without a word."""

    cluster: _Cluster
    way: Proxy

    def fault(self, what: str) -> Any:
        """The context in which it stands still."""
        return halted(self.cluster) if what == "halted" else swallowed(self.way)


@pytest.fixture(scope="module")
async def still(shared_dir: Path) -> AsyncIterator[Still]:
    """A migrated server that no other test uses."""
    with primary_of_its_own(shared_dir / random_symbol()) as cluster:
        await migrate(url_of(cluster), settings_of(url_of(cluster)))
        async with proxy(url_of(cluster)) as way:
            yield Still(cluster, way)


def quote(symbol: str, second: int = 0) -> list[dict[str, Any]]:
    return [{"symbol": symbol, "timestamp": f"{DAY}T00:00:{second:02}Z", "price": 1}]


def questions(http: httpx.AsyncClient, symbol: str) -> list[tuple[str, float, Any]]:
    """Every kind of request, and the seconds within which it is answered."""
    reads = [
        f"/v1/quotes?symbols={symbol}&start={DAY}", f"/v1/quotes/latest?symbols={symbol}",
        f"/v1/quotes/count?symbols={symbol}", f"/v1/ohlc?symbols={symbol}&interval=1h&start={DAY}",
        f"/v1/summary/daily?symbols={symbol}&start={DAY}", "/v1/symbols",
        f"/v1/quotes/latest?symbols={symbol}&consistency=strong",
    ]  # fmt: skip
    key = {"idempotency-key": random_symbol()}
    admin = {"authorization": f"Bearer {TOKEN}"}
    deleted = f"/v1/quotes?symbol={symbol}&start=2020-01-01&end=2020-01-02"
    return [
        *((path, READING, http.get(path)) for path in reads),
        ("write", WRITING, http.post("/v1/quotes", json=quote(symbol))),
        ("write with a key", WRITING, http.post("/v1/quotes", json=quote(symbol, 1), headers=key)),
        ("dry run", WRITING, http.post("/v1/quotes?dry_run=true", json=quote(symbol, 2))),
        ("delete", WRITING, http.delete(deleted, headers=admin)),
        ("/health", 3.5 - SLACK, http.get("/health")),
        ("/health/ready", 3.5 - SLACK, http.get("/health/ready")),
        ("/health/live", 0, http.get("/health/live")),
    ]


async def ask(http: httpx.AsyncClient, symbol: str) -> dict[str, tuple[int, float]]:
    """Status and seconds of each answer, all asked at once."""
    promised: dict[str, float] = {}

    async def one(name: str, answer: Any) -> tuple[str, tuple[int, float]]:
        began = time.monotonic()
        response = await answer
        took = time.monotonic() - began
        assert took < promised[name] + SLACK, f"{name} took {took:.1f} s, {promised[name]:g} s are promised"
        return name, (response.status_code, took)

    asked = questions(http, symbol)
    promised = {name: seconds for name, seconds, _ in asked}
    return dict(await asyncio.gather(*(one(name, answer) for name, _, answer in asked)))


@pytest.mark.parametrize("pool_size", [10, 0])
@pytest.mark.parametrize("what", ["halted", "swallowed"])
async def test_each_answer_comes_in_its_time(still: Still, what: str, pool_size: int) -> None:
    """Also to who asks again and again; nothing is a 500, and the first to ask afterwards is served."""
    symbol = random_symbol()
    async with running(create_app(settings_of(still.way.url, pool_size=pool_size))) as http:
        assert {status for status, _ in (await ask(http, symbol)).values()} == {200}
        with still.fault(what):
            await asyncio.sleep(1.1)  # a look of health is shared for a second
            for _ in range(2):
                found = await ask(http, symbol)
                assert {status for name, (status, _) in found.items() if "live" not in name} == {503}, found
        if what == "swallowed":
            still.way.end()  # or the server would wait for half-open ones, which hold locks, until it looks

        async def back() -> bool:
            return {status for status, _ in (await ask(http, symbol)).values()} == {200}

        await within(10, back)


@pytest.mark.parametrize("pool_size", [10, 0])
async def test_an_answer_that_was_read_is_not_held_up_by_giving_the_connection_back(
    still: Still, pool_size: int
) -> None:
    """Where the server comes to stand still in between; of an overflowing pool most connections are closed then."""
    settings = settings_of(still.way.url, pool_size=pool_size, pool_overflow=0 if pool_size else 10)
    database = Database(still.way.url, settings)
    await database.connect()

    async def read(connection: Connection) -> int:
        found = int(await connection.fetchval("SELECT 1"))
        still.way.swallows = True
        return found

    try:
        began = time.monotonic()
        assert await database.read(read) == 1
        assert time.monotonic() - began < SLACK
    finally:
        still.way.swallows = False
        still.way.end()
        await database.close()


async def test_a_start_does_not_wait_for_a_server_that_says_nothing(still: Still) -> None:
    with swallowed(still.way):
        database = Database(still.way.url, settings_of(still.way.url))
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await database.connect()
        assert time.monotonic() - began < READING + SLACK
        await database.close()


async def test_a_look_at_the_store_ends(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server comes to stand still in the middle of it."""
    looks = storage.chunks

    async def stop(connection: Connection, level: Any) -> Any:
        still.way.swallows = True
        return await looks(connection, level)

    monkeypatch.setattr(storage, "chunks", stop)
    database = Database(still.way.url, settings_of(still.way.url))
    try:
        began = time.monotonic()
        with pytest.raises(QueryTimeout):
            await StorageRepository(database).look(timedelta(seconds=0.5))
        assert time.monotonic() - began < 2 + SLACK
    finally:
        still.way.swallows = False
        still.way.end()
        await database.close()


async def test_a_connection_that_was_cancelled_is_not_used_again(still: Still) -> None:
    """A cancelled exchange is in the middle of a message, and a server that hangs ends none."""
    database = Database(still.way.url, settings_of(still.way.url, pool_size=1, pool_overflow=0))
    await database.connect()

    async def hang() -> None:
        async with database.acquire() as connection:
            await connection.execute("SELECT pg_sleep(60)")

    task = asyncio.create_task(hang())
    await asyncio.sleep(0.2)
    with swallowed(still.way):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    began = time.monotonic()
    assert await database.read(lambda connection: connection.fetchval("SELECT 1")) == 1
    assert time.monotonic() - began < SLACK
    still.way.end()
    await database.close()


@dataclass(frozen=True, slots=True)
class Replicas:
    """A primary with two standbys, each behind a way of its own."""

    database: ReplicatedDatabase
    ways: list[Proxy]
    standbys: list[_Cluster]

    def standing_still(self, place: int, what: str) -> Any:
        """The context in which a standby stands still."""
        return halted(self.standbys[place]) if what == "halted" else swallowed(self.ways[place])


@asynccontextmanager
async def replicas(directory: Path, **others: Any) -> AsyncIterator[Replicas]:
    """A primary with two standbys in rotation."""
    with ExitStack() as stack:
        primary = stack.enter_context(primary_of_its_own(directory / "p"))
        standbys = [stack.enter_context(standby_of(primary, directory / name)) for name in ("a", "b")]
        async with AsyncExitStack() as open_:
            ways = [await open_.enter_async_context(proxy(url_of(standby))) for standby in standbys]
            hosts = ",".join(urlsplit(way.url).netloc.rpartition("@")[2] for way in ways)
            settings = settings_of(url_of(primary), **others)
            database = ReplicatedDatabase(url_of(primary), f"postgresql://quotes@{hosts}/quotes", settings)
            await database.connect()
            open_.push_async_callback(database.close)

            async def both() -> bool:
                return len(database._recent()) == 2

            await within(20, both)
            yield Replicas(database, ways, standbys)


@pytest.mark.long
async def test_a_replica_that_stands_still_is_passed_over(shared_dir: Path) -> None:
    """By reads that are under way too: the next replica answers them, not the primary, and long before the time of a
    statement is over; a statement that takes long on a replica that answers is waited for."""
    where = "SELECT pg_is_in_recovery()"
    directory = shared_dir / random_symbol()
    async with replicas(directory, statement_timeout="8 s", pool_timeout="8 s", max_replica_lag="1 min") as built:
        slow = "SELECT pg_is_in_recovery() FROM pg_sleep(2.5)"
        assert await built.database.read(lambda connection: connection.fetchval(slow)) is True
        for place, what in enumerate(("halted", "swallowed")):
            with built.standing_still(place, what):
                began = time.monotonic()
                reads = [built.database.read(lambda connection: connection.fetchval(where)) for _ in range(8)]
                assert await asyncio.gather(*reads) == [True] * 8, what
                assert time.monotonic() - began < 3 + SLACK, what
                assert len(built.database._recent()) == 1, "the other one is in rotation all the time"
            built.ways[place].end()

            async def both() -> bool:
                return len(built.database._recent()) == 2

            await within(20, both)
        with built.standing_still(0, "swallowed"), built.standing_still(1, "halted"):
            assert await built.database.read(lambda connection: connection.fetchval(where)) is False, "the primary"
