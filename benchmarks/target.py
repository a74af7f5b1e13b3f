"""The service under measurement: its database, its process, what both consume, and the cheapest way to talk to it.

Invariant: whatever was started is stopped and whatever was created is removed, also when a run fails or is
interrupted.
"""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import asyncpg
import httptools
import httpx

from app.db.capability import DETECT, Capability
from app.db.embedded import embedded_postgres, find_server
from benchmarks.side_by_side import BenchmarkError

_ROOT: Final = Path(__file__).parents[1]
_START_TIMEOUT: Final = 120.0
_STOP_TIMEOUT: Final = 60.0
_ANSWER_TIMEOUT: Final = 120.0
_HOST: Final = "127.0.0.1"
_SECRET: Final = ("URL", "KEY", "TOKEN", "PASSWORD", "SECRET")


@dataclass(frozen=True, slots=True)
class Target:
    """A running service and the database below it."""

    database_url: str
    port: int
    service: int
    #: Process of the PostgreSQL server, where it runs on this machine.
    postmaster: int | None
    #: The psql program, and the part of its command line and its environment that say where to connect.
    psql: tuple[Path, list[str], dict[str, str]]
    scratch: Path
    about: dict[str, str]


@asynccontextmanager
async def running_target(database_url: str | None, psql: Path | None) -> AsyncIterator[Target]:
    """Start the service on a private server, or in a fresh database of the given one.

    Raises:
        BenchmarkError: psql is missing, or the service does not start.
    """
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(_shared_directory())
        program = psql or _find_psql(private=database_url is None)
        environment = {"QUOTES_REQUIRE_TIMESCALEDB": "none"}
        if database_url is None:
            url = await stack.enter_async_context(embedded_postgres(scratch / "data"))
            environment["QUOTES_RETENTION"] = "none"
        else:
            url = await stack.enter_async_context(fresh_database(database_url))
        environment["QUOTES_DATABASE_URL"] = url
        port, pid = await stack.enter_async_context(service(scratch / "service.log", environment))
        about, postmaster = await _describe(url, "private" if database_url is None else "given")
        about["service settings"] = ", ".join(_settings()) or "defaults"
        about["psql"] = (await _output(program, "--version")).removeprefix("psql (PostgreSQL) ")
        yield Target(url, port, pid, postmaster, (program, *_psql_target(url)), scratch, about)


@contextmanager
def _shared_directory() -> Iterator[Path]:
    """A directory that PostgreSQL's user may enter."""
    path = Path(tempfile.mkdtemp(prefix="opa-quotes-bench-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _find_psql(*, private: bool) -> Path:
    beside = find_server(Path("/nonexistent")).bin / "psql"
    on_path = shutil.which("psql")
    found = [path for path in (beside, Path(on_path) if on_path else None) if path is not None and path.exists()]
    if not found:
        raise BenchmarkError("There is no psql, neither beside the server nor on PATH; name one with --psql.")
    return found[0] if private else found[-1]


@asynccontextmanager
async def fresh_database(url: str) -> AsyncIterator[str]:
    """An empty database beside the one of `url`, dropped afterwards."""
    name = f"bench_{os.getpid()}_{time.time_ns()}"
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@asynccontextmanager
async def service(log: Path, environment: dict[str, str], *arguments: str) -> AsyncIterator[tuple[int, int]]:
    """The service in a process of its own; port and process."""
    port = _free_port()
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app", "serve", "--host", _HOST, "--port", str(port), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            cwd=_ROOT,
            env={**_outer_environment(), **environment},
            start_new_session=True,  # an interrupt from the terminal reaches it through us, in order
        )
    try:
        await _ready(process, port)
        yield port, process.pid
    except Exception as error:
        if process.returncode is None:
            raise
        raise BenchmarkError(f"The service ended with {process.returncode}.\n{_tail(log)}") from error
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _ready(process: asyncio.subprocess.Process, port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    async with httpx.AsyncClient(base_url=f"http://{_HOST}:{port}", timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise BenchmarkError("The service does not start.")
            try:
                if (await client.get("/health")).is_success:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise BenchmarkError("The service is not ready in time.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _outer_environment() -> dict[str, str]:
    """The environment without databases that the service must not touch."""
    return {k: v for k, v in os.environ.items() if not (k.startswith("QUOTES_") and k.endswith("DATABASE_URL"))}


def _settings() -> list[str]:
    """Settings from outside that the service runs with, without secrets."""
    return [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("QUOTES_") and not name.endswith(_SECRET)
    ]


async def _describe(url: str, kind: str) -> tuple[dict[str, str], int | None]:
    connection = await asyncpg.connect(url)
    try:
        found = Capability.of(tuple(await connection.fetchrow(DETECT) or ()))
        names = ("shared_buffers", "max_wal_size", "fsync", "synchronous_commit")
        values = [f"{name} {await connection.fetchval('SELECT current_setting($1)', name)}" for name in names]
        backend = await connection.fetchval("SELECT pg_backend_pid()")
        # Of a server elsewhere the process number means nothing here.
        postmaster = _parent(backend) if _is_postgres(backend) else None
    finally:
        await connection.close()
    timescaledb = f", TimescaleDB {found.timescaledb}" if found.timescaledb else ""
    about = {
        "database": f"PostgreSQL {found.postgresql}{timescaledb} (level {found.level}), a {kind} server",
        "database settings": ", ".join(values),
    }
    return about, postmaster


# --- what processes consume ---


def _stat(pid: int | str) -> list[str]:
    """Fields of /proc/<pid>/stat from the third on; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _is_postgres(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("postgres")
    except OSError:
        return False


def cpu_seconds(root: int | None) -> float | None:
    """Processor time of a process and its children, ended ones included; None where it cannot be read."""
    if root is None or not Path("/proc/self/stat").exists():
        return None
    stats = {int(path.name): _stat(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
    family = {root}
    while grown := {pid for pid, fields in stats.items() if fields and int(fields[1]) in family} - family:
        family |= grown
    # utime, stime, and those of children that were waited for.
    ticks = sum(int(value) for pid in family for value in stats.get(pid, [])[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int) -> tuple[int, int] | None:
    """Resident memory of a process, now and at its peak; None where it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines if "kB" in line)
    }
    return sizes.get("VmRSS", 0), sizes.get("VmHWM", 0)


# --- talking to it ---


def _psql_target(url: str) -> tuple[list[str], dict[str, str]]:
    """The URL without its password, which goes into the environment: command lines are public."""
    parts = urlsplit(url)
    if parts.password is None:
        return ["-d", url], {}
    name, _, address = parts.netloc.rpartition("@")
    plain = parts._replace(netloc=f"{name.partition(':')[0]}@{address}").geturl()
    return ["-d", plain], {"PGPASSWORD": parts.password}


async def copy_file(target: Target, file: Path, table: str, columns: Sequence[str]) -> None:
    r"""Run `psql \copy` on a CSV file.

    Raises:
        BenchmarkError: it failed.
    """
    program, where, environment = target.psql
    statement = f"\\copy {table} ({', '.join(columns)}) from '{file}' with (format csv)"
    await _output(program, "-X", "-q", "-v", "ON_ERROR_STOP=1", *where, "-c", statement, **environment)


async def _output(program: Path, *arguments: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    try:
        output, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    text = output.decode(errors="replace").strip()
    if process.returncode:
        raise BenchmarkError(f"{program.name} failed ({process.returncode}): {text}")
    return text


class HttpConnection:
    """A keep-alive connection on a blocking socket: whole requests in, whole bodies out, and next to no work."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Self:
        self._socket = socket.create_connection((_HOST, self._port), timeout=_ANSWER_TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, request: bytes) -> bytes:
        """The body of the answer to a request.

        Raises:
            BenchmarkError: the answer is no success.
        """
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        self._socket.sendall(request)
        while not answer.complete:
            data = self._socket.recv(1 << 18)
            if not data:
                raise BenchmarkError("The service closed the connection before it answered.")
            parser.feed_data(data)
        body = b"".join(answer.parts)
        if parser.get_status_code() != 200:
            raise BenchmarkError(f"The service answered {parser.get_status_code()}: {body[:500].decode()}")
        return body


class _Answer:
    """What the parser of an answer calls."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


def get(path: str) -> bytes:
    """The request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: {_HOST}\r\nAccept: application/json\r\n\r\n".encode()


def post(path: str, body: bytes) -> bytes:
    """The request that sends a JSON body to a path."""
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\nHost: {_HOST}\r\n{kind}\r\n\r\n".encode() + body


def send_all(port: int, requests: Sequence[bytes], clients: int) -> tuple[float, list[float], list[bytes]]:
    """Send all requests over some connections, each its next one when the last was answered.

    Returns the seconds from the first request to the last answer, those of each request, and the answers.
    """
    waiting = deque(requests)
    ready = Barrier(clients + 1)

    def client(connection: HttpConnection) -> list[tuple[float, bytes]]:
        answers: list[tuple[float, bytes]] = []
        ready.wait()
        while True:
            try:
                request = waiting.popleft()
            except IndexError:
                return answers
            began = time.perf_counter()
            body = connection.send(request)
            answers.append((time.perf_counter() - began, body))

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        connections = [stack.enter_context(HttpConnection(port)) for _ in range(clients)]
        running = [pool.submit(client, connection) for connection in connections]
        ready.wait()
        began = time.perf_counter()
        done = [answer for future in running for answer in future.result()]
        elapsed = time.perf_counter() - began
    return elapsed, [seconds for seconds, _ in done], [body for _, body in done]
