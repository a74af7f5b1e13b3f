"""The three lanes, and what the tests ask of them.

Every test that asks for `lane`, or for something built on it, runs once on each database that this machine has:
the PostgreSQL wheel, a community TimescaleDB in WebAssembly, and the server of TEST_DATABASE_URL. Invariant:
tests share a database and isolate themselves by random symbols; only tests of the schema get a fresh one.
"""

import asyncio
import logging
import os
import random
import re
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import structlog
from fastapi import FastAPI
from hypothesis import settings as hypothesis_settings

from app.db.capability import TIMESCALEDB, release
from app.db.embedded import embedded_postgres
from app.db.engine import Connection, Database
from app.db.migrate import migrate
from app.main import create_app
from app.repository.quotes import QuoteRepository
from app.settings import Settings
from tests.pglite_lane import LaneUnavailable, timescaledb_server

# How long an example takes is up to the machine and whatever else it does.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")

LANES = ("postgresql", "timescaledb", "external")
EXTERNAL_URL = os.environ.get("TEST_DATABASE_URL", "")
ran: Counter[str] = Counter()
about: dict[str, str] = {"external": "TEST_DATABASE_URL is not set"}


@dataclass(frozen=True, slots=True)
class Lane:
    """One database under test."""

    name: str
    url: str
    version: str
    settings: dict[str, Any] = field(default_factory=dict)

    def make_settings(self, **overrides: Any) -> Settings:
        """Settings of a service on this lane, whatever the environment says."""
        values = {
            "database_url": self.url,
            "require_timescaledb": "none",
            "retention": None,
            "log_format": "console",
            **self.settings,
            **overrides,
        }
        return Settings(_env_file=None, **values)

    @property
    def soundest(self) -> str:
        """The best that health says of this lane, whose TimescaleDB may be older than the one that is wanted."""
        found = re.search(r"TimescaleDB ([0-9.]+)", self.version)
        return "degraded" if found and release(found[1]) < TIMESCALEDB else "healthy"


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("QUOTES_"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Iterator[Path]:
    """A directory that PostgreSQL's user may enter, where pytest's own is closed to others."""
    path = Path(tempfile.mkdtemp(prefix="opa-quotes-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_left(shared_dir: Path) -> Iterator[None]:
    """Remove what a test has put there, at once: hundreds of data directories are 10 GB, and minutes to remove."""
    before = set(shared_dir.iterdir())  # of fixtures that others share
    yield
    for path in set(shared_dir.iterdir()) - before:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="session", params=[name for name in LANES if name != "external" or EXTERNAL_URL])
async def lane(request: pytest.FixtureRequest, shared_dir: Path) -> AsyncIterator[Lane]:
    """Each database that this machine has, migrated."""
    name: str = request.param
    if name == "external":
        async with fresh_database(EXTERNAL_URL) as url:
            yield await _ready(Lane(name, url, await _version(url)))
    elif name == "postgresql":
        async with embedded_postgres(shared_dir / "lane") as url:
            yield await _ready(Lane(name, url, await _version(url)))
    else:
        with wasm_server(shared_dir) as url:
            # One session serves all clients in turn, so each operation brings and ends its own connection.
            yield await _ready(Lane(name, url, await _version(url), {"pool_size": 0, "monitor_interval": timedelta(0)}))


@contextmanager
def wasm_server(shared_dir: Path) -> Iterator[str]:
    """A community TimescaleDB in WebAssembly; skips where it cannot run, fails there on CI."""
    try:
        with timescaledb_server(shared_dir / "pglite.log") as server:
            yield server.url
    except LaneUnavailable as error:
        about["timescaledb"] = error.reason
        if os.environ.get("CI"):
            pytest.fail(f"lane timescaledb: {error.reason}")
        pytest.skip(f"lane timescaledb: {error.reason}")


async def _ready(lane: Lane) -> Lane:
    about[lane.name] = lane.version
    await migrate(lane.url, lane.make_settings())
    return lane


async def _version(url: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        # The extension exists after the first migration; what the server offers is what counts here.
        row = await connection.fetchrow(
            "SELECT current_setting('server_version'),"
            " (SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb'),"
            " EXISTS (SELECT FROM pg_settings WHERE name = 'timescaledb.license')"
        )
    finally:
        await connection.close()
    assert row is not None
    return f"PostgreSQL {row[0]}" + (f", TimescaleDB {row[1]}" if row[1] and row[2] else "")


@asynccontextmanager
async def fresh_database(url: str) -> AsyncIterator[str]:
    """An empty database beside the one of `url`, dropped afterwards."""
    name = "test_" + "".join(random.choices(string.ascii_lowercase, k=12))
    admin = await asyncpg.connect(url)
    await admin.execute(f"CREATE DATABASE {name}")
    base, _, query = url.partition("?")
    try:
        yield base.rpartition("/")[0] + f"/{name}" + (f"?{query}" if query else "")
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


@pytest.fixture
async def empty_url(lane: Lane, shared_dir: Path) -> AsyncIterator[str]:
    """A database without a schema, of the lane's kind."""
    if lane.name == "timescaledb":
        with wasm_server(shared_dir) as url:
            yield url
    else:
        async with fresh_database(lane.url) as url:
            yield url


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the long tests to a run of their own, and those out that a lane cannot run, before it is started."""
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("TEST_LONG"):
            item.add_marker(pytest.mark.skip(reason="long: `make test-long` runs it"))
        elif item.get_closest_marker("concurrent") and _lane_of(item) == "timescaledb":
            item.add_marker(pytest.mark.skip(reason="one session serves all clients in turn, without timers"))


def _lane_of(item: pytest.Item) -> str | None:
    spec = getattr(item, "callspec", None)
    return None if spec is None else spec.params.get("lane")


@pytest.fixture(scope="session")
def settings(lane: Lane) -> Settings:
    """Settings of a service on the lane."""
    return lane.make_settings()


@pytest.fixture(scope="session")
async def database(lane: Lane, settings: Settings) -> AsyncIterator[Database]:
    """Pools on the lane."""
    pools = Database(lane.url, settings)
    await pools.connect()
    yield pools
    await pools.close()


@pytest.fixture(scope="session")
def quotes(database: Database, settings: Settings) -> QuoteRepository:
    """The repository on the lane."""
    return QuoteRepository(database, settings)


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose lifespan runs, without a socket between them."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield client


@pytest.fixture(scope="session")
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service on the lane."""
    async with running(create_app(settings)) as connected:
        yield connected


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Undo afterwards that a test configures logging."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def symbol() -> str:
    """A symbol that no other test has."""
    return random_symbol()


def random_symbol() -> str:
    """A symbol that nothing else in the database has."""
    return "T" + "".join(random.SystemRandom().choices(string.ascii_uppercase + string.digits, k=14))


@dataclass
class Service:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_ready(self, timeout: float = 60) -> None:
        """Return when `/health` answers 200."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"the service is not ready:\n{self.log.read_text()}")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Serve = Callable[..., AbstractContextManager[Service]]


@pytest.fixture(scope="session")
def serve(shared_dir: Path) -> Serve:
    """Start `python -m app serve` on a data directory, or on a given database."""

    @contextmanager
    def start(data_dir: Path, *arguments: str, ready: bool = True, **environment: str) -> Iterator[Service]:
        port = free_port()
        log = Path(tempfile.mkstemp(dir=shared_dir, suffix=".log")[1])
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve", "--port", str(port), "--data-dir", str(data_dir), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        service = Service(process, f"http://127.0.0.1:{port}", log)
        try:
            if ready:
                service.wait_ready()
            yield service
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    return start


@pytest.fixture(scope="session")
def service_url(serve: Serve, shared_dir: Path) -> Iterator[str]:
    """A running service on the embedded default, over a real socket."""
    with serve(shared_dir / "service") as service:
        yield service.url


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and not report.skipped and (name := _lane_of(item)) in LANES:
        ran[name] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what ran here to the process that writes the summary, where the tests are spread over several."""
    if output := getattr(session.config, "workeroutput", None):
        output["lanes"] = (dict(ran), about)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what ran in one of several processes."""
    if found := getattr(node, "workeroutput", {}).get("lanes"):
        ran.update(found[0])
        about.update(found[1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the lanes that ran."""
    terminalreporter.section("lanes")
    for name in LANES:
        state = f"ran {ran[name]} tests" if ran[name] else "did not run"
        terminalreporter.write_line(f"{name:12} {state}: {about.get(name, 'not asked for')}")


async def refresh(connection: Connection, rollup: str, start: datetime, end: datetime, *, options: str = "{}") -> None:
    """Refresh a rollup, when the policy that may be at it has done."""
    await patiently(
        connection,
        f"CALL refresh_continuous_aggregate('quotes.{rollup}', '{start}', '{end}', options => '{options}')",
    )


async def until_true(connection: Connection, query: str) -> None:
    """Return when a query answers with true."""
    async with asyncio.timeout(30):
        while not await connection.fetchval(query):  # noqa: ASYNC110  what is waited for happens in a database
            await asyncio.sleep(0.01)


async def run(url: str, *statements: str) -> None:
    """Run statements in a session of their own, each in a transaction of its own."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def patiently(connection: Connection, statement: str) -> None:
    """Run a statement, again while a policy on a server with timers is at what it needs."""
    async with asyncio.timeout(60):
        while True:
            try:
                await connection.execute(statement)
            except asyncpg.LockNotAvailableError:
                await asyncio.sleep(0.05)
            else:
                return
