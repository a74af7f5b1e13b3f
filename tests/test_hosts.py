"""Several servers that take writes, real ones: which is written to, who is told, and what is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from app.db.embedded import _Cluster
from app.db.engine import Database
from app.db.hosts import Control, Server, choose, name_of
from app.db.migrate import migrate
from app.errors import DatabaseUnavailable
from app.main import create_app
from app.settings import Settings
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
        ((None, None, None), None, "None of the database hosts"),
        ((standby(1), standby(2), None), None, "None of the database hosts"),
        ((primary(1, 1), primary(2, 2), primary(3, 2)), None, "db2 and db3 take writes, both on timeline 2"),
        ((primary(1, 1), primary(2, 2, OTHER), None), None, "db1 and db2 take writes and are not copies"),
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


async def reached(*servers: _Cluster) -> Path:
    """The socket of the server that a new process writes to.

    Raises:
        DatabaseUnavailable: it is told to write to none.
    """
    database = Database(url(*servers), settings(*servers))
    async with database.dedicated(10) as connection:
        directory: str = await connection.fetchval("SHOW unix_socket_directories")
    return Path(directory)


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
                return (await database_check(http))["status"] == "degraded"

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
    return (await database_check(http))["status"] == "unhealthy"
