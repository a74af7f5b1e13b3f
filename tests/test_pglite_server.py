"""The WebAssembly lane's server behaves like a PostgreSQL that serves one client at a time."""

import asyncio
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from tests.pglite_lane import LaneUnavailable, PGliteServer, timescaledb_server

STARTUP = struct.pack("!ii", 41, 3 << 16) + b"user\0postgres\0database\0postgres\0\0"
TERMINATE = b"X" + struct.pack("!i", 4)


def serve(log: Path) -> Iterator[PGliteServer]:
    try:
        with timescaledb_server(log) as server:
            yield server
    except LaneUnavailable as unavailable:
        if os.environ.get("CI"):
            raise
        pytest.skip(unavailable.reason)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PGliteServer]:
    yield from serve(tmp_path_factory.mktemp("pglite") / "server.log")


@asynccontextmanager
async def connected(server: PGliteServer, **settings: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that a failing test does not leave open: everyone else would wait for it."""
    connection = await asyncpg.connect(server.url, server_settings=settings, timeout=5)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


def query(sql: str) -> bytes:
    return b"Q" + struct.pack("!i", len(sql) + 5) + sql.encode() + b"\0"


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


async def test_community_timescaledb(server: PGliteServer) -> None:
    async with connected(server) as connection:
        extension = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")
        assert extension == server.timescaledb
        assert await connection.fetchval("SHOW timescaledb.license") == "timescale"
        assert await connection.fetchval("SELECT current_database()") == "postgres"
        assert connection.get_settings().TimeZone == "UTC"


async def test_close_is_prompt(server: PGliteServer) -> None:
    for _ in range(3):
        connection = await asyncpg.connect(server.url, timeout=5)
        await asyncio.wait_for(connection.close(), 2)


async def test_second_client_waits_for_the_first(server: PGliteServer) -> None:
    async with connected(server) as first:
        second = asyncio.create_task(asyncpg.connect(server.url))
        await asyncio.sleep(0.2)
        assert await first.fetchval("SELECT 1") == 1
        assert not second.done()
    connection = await asyncio.wait_for(second, 5)
    assert await connection.fetchval("SELECT 2") == 2
    await connection.close()


async def test_error_in_a_transaction(server: PGliteServer) -> None:
    async with connected(server) as connection:
        with pytest.raises(asyncpg.DivisionByZeroError):  # noqa: PT012 - the transaction is what is tested
            async with connection.transaction():
                await connection.execute("CREATE TABLE gone (a int)")
                with pytest.raises(asyncpg.UndefinedTableError):
                    async with connection.transaction():
                        await connection.fetch("SELECT * FROM missing WHERE a = $1", 1)
                await connection.fetchval("SELECT 1 / $1::int", 0)
        assert await connection.fetchval("SELECT to_regclass('gone')") is None


async def test_sessions_are_clean(server: PGliteServer) -> None:
    """The first client leaves everything open, and drops the line rather than saying goodbye."""
    first = await asyncpg.connect(server.url, server_settings={"application_name": "first"})
    await first.execute("SET timezone = 'Asia/Tokyo'; CREATE TEMP TABLE kept (a int)")
    await first.execute("SELECT pg_advisory_lock(1); BEGIN; CREATE TABLE uncommitted (a int)")
    assert await first.fetchval("SHOW application_name") == "first"
    first.terminate()
    async with connected(server) as second:
        for table in ("kept", "uncommitted"):
            assert await second.fetchval("SELECT to_regclass($1)", table) is None
        assert await second.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
        statements = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SHOW application_name'"
        assert await second.fetchval(statements) == 0
        assert await second.fetchval("SHOW application_name") == ""
        assert await second.fetchval("SHOW timezone") == "UTC"


async def test_reset_keeps_the_clients_own_settings(server: PGliteServer) -> None:
    async with connected(server, search_path="pg_catalog, public") as connection:
        await connection.execute("SET search_path = public; SET timezone = 'Asia/Tokyo'")
        await connection.reset()
        assert await connection.fetchval("SHOW search_path") == "pg_catalog, public"
        assert await connection.fetchval("SHOW timezone") == "UTC"


async def test_copy_in_the_extended_protocol_is_refused(server: PGliteServer) -> None:
    async with connected(server) as connection:
        await connection.execute("CREATE TEMP TABLE t (a int)")
        with pytest.raises(asyncpg.FeatureNotSupportedError) as refused:
            await connection.fetch("/* any case */ Copy t TO STDOUT")
        assert refused.value.sqlstate == "0A000"
        with pytest.raises(asyncpg.QueryCanceledError):
            await connection.execute("SELECT 1; COPY t FROM STDIN")
        assert await connection.fetchval("SELECT count(*) FROM t") == 0


async def test_copy_is_served(server: PGliteServer) -> None:
    async with connected(server) as connection:
        await connection.execute("CREATE TEMP TABLE t (a int PRIMARY KEY)")
        records = [(n,) for n in range(100_000)]
        async with connection.transaction():
            await connection.copy_records_to_table("t", records=records)
            with pytest.raises(asyncpg.UniqueViolationError):
                async with connection.transaction():
                    await connection.copy_records_to_table("t", records=records[:1])
        assert await connection.fetchval("SELECT count(*) FROM t") == len(records)
        received = bytearray()

        async def receive(data: bytes) -> None:
            received.extend(data)

        await connection.copy_from_query("SELECT a FROM t WHERE a < 2 ORDER BY a", output=receive)
        assert received == b"0\n1\n"


def test_messages_in_any_segments(server: PGliteServer) -> None:
    whole = STARTUP + query("SELECT 'one'") + query("SELECT 1/0") + query("SELECT 'two'") + TERMINATE
    for size in (1, 7, len(whole)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(whole), size):
                client.sendall(whole[start : start + size])
            reply = read_to_end(client)
        assert reply.index(b"one") < reply.index(b"C22012") < reply.index(b"two")


def test_refuses_what_it_does_not_know(server: PGliteServer) -> None:
    nowhere = STARTUP.replace(b"database\0postgres", b"database\0nowhere1")
    unknown_message = STARTUP + b"!" + struct.pack("!i", 4)
    bad_length = STARTUP + b"Q" + struct.pack("!i", -1)
    for sent, code in ((nowhere, b"C3D000"), (unknown_message, b"C08P01"), (bad_length, b"C08P01")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(sent)
            assert code in read_to_end(client)


def test_dies_with_the_process_that_started_it(server: PGliteServer, tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib\n"
        "from tests.pglite_lane import timescaledb_server\n"
        "with timescaledb_server(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.port, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "server.log")]
    root = Path(__file__).parent.parent
    started = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    port = int(started.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    pytest.fail("the server outlived its starter")
