"""Prometheus on the running service: every series that rules and panels ask for, and alerts whose fault is real."""

import asyncio
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import yaml

from app.db.capability import Level
from app.db.engine import Database
from app.db.migrate import migrate
from app.repository.maintenance import MaintenanceRepository
from app.repository.quotes import QuoteRepository
from app.settings import Settings
from grafana.build import PROMETHEUS, ROOT, dashboards
from tests.conftest import Lane, Serve, Service, random_symbol, refresh
from tests.prometheus import (
    PROGRAMS,
    Prometheus,
    metrics_in,
    postgres_exporter,
    program,
    prometheus,
    rules,
    wait_until,
    write_targets,
)
from tests.test_replicas import Pair, connected, crash, replication

pytestmark = pytest.mark.timeout(400)


def panel_queries() -> set[str]:
    """Every PromQL query of a panel, with the variables at their defaults."""
    return {
        target["expr"].replace("$job", ".+").replace("$instance", ".+").replace("$__rate_interval", "4s")
        for document in dashboards().values()
        for panel in document["panels"]
        for target in panel.get("targets", [])
        if target["datasource"] == PROMETHEUS
    }


QUERIES = panel_queries()
ASKED_FOR = set().union(*(metrics_in(text) for text in [*QUERIES, *(rule["expr"] for rule in rules())]))
# These come from another database than the one whose faults are made here.
OF_TIMESCALEDB = {name for name in ASKED_FOR if "timescaledb" in name}


@dataclass
class Load:
    """A writer and a reader, a few requests a second each, until the end of the block."""

    url: str
    symbols: list[str] = field(default_factory=lambda: [random_symbol() for _ in range(3)])
    writing: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        self.writing.set()
        threads = [threading.Thread(target=self._loop, args=(step,)) for step in (self._write, self._read)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _loop(self, step: Callable[[httpx.Client, int], None]) -> None:
        with httpx.Client(base_url=self.url, timeout=10) as http:
            turn = 0
            while not self._stop.wait(0.06):
                turn += 1
                try:
                    step(http, turn)
                except httpx.TransportError:
                    continue  # the service is stopped for a while

    def _write(self, http: httpx.Client, turn: int) -> None:
        if self.writing.is_set():
            now = datetime.now(UTC).isoformat()
            quotes = [
                {"symbol": symbol, "timestamp": now, "price": 1 + turn % 9, "volume": 1} for symbol in self.symbols
            ]
            http.post("/v1/quotes", json=quotes)
        if turn % 10 == 0:
            http.post("/v1/quotes", json=[{"symbol": "lower case", "timestamp": "never", "price": -1}])

    def _read(self, http: httpx.Client, turn: int) -> None:
        symbol = random.choice(self.symbols)
        start = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
        consistency = ("strong", "eventual")[turn % 2]
        path = ("/v1/quotes", "/v1/quotes/latest", "/v1/ohlc", "/v1/quotes/count")[turn % 4]
        parameters = {"symbols": symbol, "consistency": consistency}
        if path != "/v1/quotes/latest":
            parameters["start"] = start
        if path == "/v1/ohlc":
            parameters["interval"] = "1m"
        http.get(path, params=parameters)


@dataclass(frozen=True)
class Scene:
    """A service on a primary with a standby, under load, watched by Prometheus and Alertmanager."""

    pair: Pair
    service: Service
    prometheus: Prometheus
    load: Load


@pytest.fixture(scope="module")
def scene(serve: Serve, shared_dir: Path) -> Iterator[Scene]:
    for name in PROGRAMS:
        program(name)  # before anything is built
    directory = shared_dir / random_symbol()
    with replication(directory / "db") as pair:
        dsn = f"user=postgres_exporter host={pair.primary.socket} dbname=quotes sslmode=disable"
        asyncio.run(prepare(pair))
        with (
            serve(
                directory / "service",
                QUOTES_DATABASE_URL=pair_url(pair),
                QUOTES_READ_DATABASE_URL=f"postgresql://quotes@/quotes?host={pair.standby.socket}",
                QUOTES_REQUIRE_TIMESCALEDB="none",
                QUOTES_MONITOR_INTERVAL="1 s",
                QUOTES_STORAGE_CAPACITY=str(10**12),
            ) as service,
            postgres_exporter(directory / "exporter", dsn) as exporter,
            prometheus(directory / "prometheus", address(service), exporter=exporter, alerting=True) as server,
        ):
            yield Scene(pair, service, server, Load(service.url))


def address(service: Service) -> str:
    return service.url.removeprefix("http://")


def pair_url(pair: Pair) -> str:
    return f"postgresql://quotes@/quotes?host={pair.primary.socket}"


def make_roles(pair: Pair) -> None:
    environment = {
        "PATH": f"{pair.primary.server.bin}:/usr/bin:/bin",
        "PGHOST": str(pair.primary.socket),
        "POSTGRES_USER": "quotes",
        "POSTGRES_DB": "quotes",
        "GRAFANA_DATABASE_PASSWORD": "it's one",
        "EXPORTER_PASSWORD": "another",
    }
    subprocess.run(["/bin/sh", ROOT / "docker" / "monitoring.sh"], env=environment, check=True)


async def prepare(pair: Pair) -> None:
    """A store whose newest quote is an hour old, and a replication slot that nobody reads."""
    make_roles(pair)  # before there is a schema, as when a container initialises its data
    await migrate(pair_url(pair), pair.settings)
    async with connected(pair.primary) as connection:
        await connection.execute("SELECT pg_create_physical_replication_slot('nobody', true)")
        await connection.execute("INSERT INTO quotes.backups DEFAULT VALUES")
    async with QuoteRepository.open(pair_url(pair)) as quotes:
        old = datetime.now(UTC) - timedelta(hours=1)
        await quotes.bulk_insert([{"symbol": random_symbol(), "timestamp": old, "price": Decimal(1)}])


@pytest.fixture(scope="module")
def watched(scene: Scene) -> Iterator[Scene]:
    """The scene under load; until then the newest quote was an hour old."""
    scene.prometheus.wait_firing({"QuotesStale"})
    with scene.load.running():
        yield scene


def test_the_target_is_up_and_every_metric_has_data(watched: Scene) -> None:
    assert [series["value"][1] for series in watched.prometheus.query('up{job="quotes"}')] == ["1"]
    assert len(ASKED_FOR) > 60
    for name in sorted(ASKED_FOR - OF_TIMESCALEDB):
        watched.prometheus.wait_series(name)


def test_every_panel_has_series(watched: Scene) -> None:
    assert len(QUERIES) > 50
    for query in QUERIES:
        if not metrics_in(query) & OF_TIMESCALEDB:
            watched.prometheus.wait_series(query)


def test_nothing_fires_when_nothing_is_wrong(watched: Scene) -> None:
    watched.prometheus.wait_quiet({"QuotesStale"})
    # How fast this machine is, is not the question here.
    assert {name for name in watched.prometheus.firing() if "Latency" not in name} == set()


@pytest.mark.long
def test_central_prometheuses_that_federate_and_that_are_written_to(watched: Scene, shared_dir: Path) -> None:
    federate = central("federate")
    federate["scrape_configs"][0] |= {
        "scrape_interval": "1s",
        "static_configs": [{"targets": [watched.prometheus.url.removeprefix("http://")]}],
    }
    (write,) = central("remote-write")["remote_write"]
    del write["basic_auth"]
    with (
        prometheus(shared_dir / random_symbol(), **federate) as federated,
        prometheus(shared_dir / random_symbol()) as written_to,
    ):
        write |= {"url": f"{written_to.url}/api/v1/write"}
        with prometheus(shared_dir / random_symbol(), address(watched.service), remote_write=[write]):
            federated.wait_series(
                'operation:quotes_http_request_duration_seconds:p99{job="quotes",cluster="opa-quotes"}'
            )
            assert not federated.query("quotes_http_requests_total"), "raw series stay where they are"
            written_to.wait_series('quotes_http_requests_total{job="quotes",cluster="opa-quotes"}')
            assert not written_to.query("quotes_http_request_duration_seconds_bucket")


def central(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "prometheus" / "central" / f"{name}.yml").read_text())
    return document


def test_queries_of_runbooks_are_understood(watched: Scene) -> None:
    queries = re.findall(r"```promql\n(.*?)```", (ROOT / "docs" / "runbooks.md").read_text(), re.DOTALL)
    assert len(queries) >= len({rule["alert"] for rule in rules() if "alert" in rule})
    for query in queries:
        watched.prometheus.query(query)


def test_slow_reads_while_ingest_and_a_replica_are_stopped(watched: Scene) -> None:
    alerts = {
        "QuotesLatencyP95High", "QuotesLatencyP99High", "QuotesLatencyBudgetBurn 1h",
        "QuotesIngestStalled", "QuotesReplicaLagging",
    }  # fmt: skip
    watched.load.writing.clear()
    crash(watched.pair.standby)
    try:
        with locks(watched.pair):
            watched.prometheus.wait_firing(alerts)
    finally:
        watched.pair.standby.start()
        watched.load.writing.set()
    watched.prometheus.wait_quiet(alerts)


@contextmanager
def locks(pair: Pair) -> Iterator[None]:
    """Someone who locks the quotes for 300 ms, again and again."""
    stop = threading.Event()

    async def hold() -> None:
        async with connected(pair.primary) as connection:
            while not stop.is_set():
                async with connection.transaction():
                    await connection.execute("LOCK TABLE quotes.real_time, quotes.latest IN ACCESS EXCLUSIVE MODE")
                    await asyncio.sleep(0.3)
                await asyncio.sleep(0.02)

    holder = threading.Thread(target=lambda: asyncio.run(hold()))
    holder.start()
    try:
        yield
    finally:
        stop.set()
        holder.join()


@pytest.mark.long
def test_errors_of_a_table_that_is_missing(watched: Scene) -> None:
    alerts = {"QuotesHypertableUnhealthy", "QuotesErrorsHigh", "QuotesErrorBudgetBurn 1h"}
    asyncio.run(execute(watched.pair, "ALTER TABLE quotes.real_time RENAME TO elsewhere"))
    try:
        watched.prometheus.wait_firing(alerts)
    finally:
        asyncio.run(execute(watched.pair, "ALTER TABLE quotes.elsewhere RENAME TO real_time"))
    watched.prometheus.wait_quiet(alerts)


async def execute(pair: Pair, statement: str) -> None:
    async with connected(pair.primary) as connection:
        await connection.execute(statement)


def test_the_database_stops_and_its_symptoms_are_not_told(watched: Scene) -> None:
    server = watched.prometheus
    alerts = {"QuotesDatabaseUnhealthy", "QuotesErrorsHigh", "QuotesPostgresExporterDown"}
    crash(watched.pair.primary)
    try:
        server.wait_firing(alerts)
        wait_until(lambda: server.notified() == {"QuotesDatabaseUnhealthy"}, 20, server.notified)
    finally:
        watched.pair.primary.start()
    server.wait_quiet(alerts)


@pytest.mark.long
def test_the_service_hangs_and_then_is_not_looked_for(watched: Scene) -> None:
    server = watched.prometheus
    watched.service.process.send_signal(signal.SIGSTOP)
    try:
        server.wait_firing({"QuotesServiceDown"})
        wait_until(lambda: server.notified() == {"QuotesServiceDown"}, 20, server.notified)
        write_targets(server.targets)
        server.wait_firing({"QuotesTargetAbsent"})
    finally:
        write_targets(server.targets, address(watched.service))
        watched.service.process.send_signal(signal.SIGCONT)
    server.wait_quiet({"QuotesServiceDown", "QuotesTargetAbsent"})


def market_queries(symbol: str, start: datetime, end: datetime) -> Iterator[tuple[str, str]]:
    """The interval and the SQL of every panel that asks the database itself, with Grafana's macros expanded."""
    for interval in ("1m", "1h", "1d"):
        for panel in dashboards()["market.json"]["panels"]:
            for target in panel.get("targets", []):
                query = target["rawSql"]
                for macro, value in (
                    ("$__timeFilter(timestamp)", f"timestamp BETWEEN '{start.isoformat()}' AND '{end.isoformat()}'"),
                    ("$__timeFrom()", f"'{start.isoformat()}'"),
                    ("$__timeTo()", f"'{end.isoformat()}'"),
                    ("${symbol:sqlstring}", f"'{symbol}'"),
                    ("$interval", interval),
                ):
                    query = query.replace(macro, value)
                assert "$" not in query
                yield interval, query


async def test_panels_that_ask_the_database_show_its_bars(database: Database, quotes: QuoteRepository) -> None:
    symbol, start = random_symbol(), datetime(2026, 11, 2, 14, 30, tzinfo=UTC)
    prices = [Decimal(price) for price in (3, 5, 1, 2)]
    rows: list[dict[str, Any]] = [
        {"symbol": symbol, "timestamp": start + timedelta(seconds=i), "price": price, "volume": 2}
        for i, price in enumerate(prices)
    ]
    many, minutes = random_symbol(), [start + timedelta(minutes=i) for i in range(4)]
    rows += [{"symbol": many, "timestamp": minute, "price": 1} for minute in minutes]
    await quotes.bulk_insert(rows)
    async with database.dedicated() as connection:
        if database.capability.level >= Level.COMMUNITY:
            # These panels read the rollups, which show late quotes after the next refresh.
            for rollup in ("ohlc_1m", "ohlc_1h", "ohlc_1d"):
                await refresh(connection, rollup, start - timedelta(days=2), start + timedelta(days=2))
        seen = 0
        for _, query in market_queries(symbol, start - timedelta(days=1), start + timedelta(days=1)):
            (row,) = await connection.fetch(query)
            expected = {
                "open": 3, "high": 5, "low": 1, "close": 2, "volume": 8, "vwap": 2.75, "count": 4, "trades": 4,
            }  # fmt: skip
            shown = {name: row[name] for name in expected if name in row}
            assert shown
            assert shown == {name: expected[name] for name in shown}
            seen += 1
        assert seen == 12
        bounded = [query for _, query in market_queries(many, start, minutes[-1]) if "ohlc_1m" in query]
        for query in bounded:
            newest = await connection.fetch(query.replace("LIMIT 20000", "LIMIT 2"))
            assert [row["time"] for row in newest] == minutes[-2:], "a chart ends where the data end"
        assert len(bounded) == 3
        (variable,) = [v for v in dashboards()["market.json"]["templating"]["list"] if v["name"] == "symbol"]
        assert symbol in {row[0] for row in await connection.fetch(variable["query"])}


async def test_grafana_reads_and_does_nothing_else(scene: Scene) -> None:
    now = datetime.now(UTC)
    socket = scene.pair.primary.socket
    grafana = await asyncpg.connect(f"postgresql://grafana@/quotes?host={socket}")
    exporter = await asyncpg.connect(f"postgresql://postgres_exporter@/quotes?host={socket}")
    try:
        for _, query in market_queries("NONE", now - timedelta(days=1), now):
            assert await grafana.fetch(query) == []
        await grafana.execute("SET default_transaction_read_only = off")
        for statement in ("DELETE FROM quotes.latest", "CREATE TABLE quotes.mine ()", "CREATE TABLE public.mine ()"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await grafana.execute(statement)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await exporter.fetch("SELECT * FROM quotes.latest")
    finally:
        await grafana.close()
        await exporter.close()


async def test_figures_of_timescaledb(
    lane: Lane, settings: Settings, database: Database, quotes: QuoteRepository, serve: Serve, shared_dir: Path
) -> None:
    """The queries that only a community TimescaleDB answers, on each lane that is one."""
    if database.capability.level < Level.COMMUNITY:
        pytest.skip(f"the level of this lane is {database.capability.level}")
    old = datetime.now(UTC) - timedelta(days=200)
    row = {"symbol": random_symbol(), "timestamp": old, "price": Decimal(1)}
    await quotes.bulk_insert([row])
    async with MaintenanceRepository.open(database, settings) as maintenance:
        chunks = await maintenance.chunks()
        await maintenance.compress(next(chunk for chunk in chunks if chunk.start <= old < chunk.end))
    async with database.dedicated() as connection:
        has_run = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM timescaledb_information.job_stats"
            " WHERE job_id >= 1000 AND last_successful_finish > '-infinity')"
        )
    # The WebAssembly server has neither a scheduler nor a connection to spare for the monitor.
    one_session = lane.name == "timescaledb"
    unknown = set() if has_run else {name for name in OF_TIMESCALEDB if "job_last" in name}
    directory = shared_dir / random_symbol()
    with (
        serve(
            directory / "service",
            QUOTES_DATABASE_URL=lane.url,
            QUOTES_REQUIRE_TIMESCALEDB="community",
            QUOTES_RETENTION="none",
            QUOTES_POOL_SIZE="0" if one_session else "5",
            QUOTES_MONITOR_INTERVAL="0" if one_session else "1 s",
        ) as service,
        prometheus(directory / "prometheus", address(service)) as server,
    ):
        async with httpx.AsyncClient(timeout=30) as http:
            assert (await http.get(f"{service.url}/v1/storage")).status_code == 200
        for query in [*sorted(OF_TIMESCALEDB), *QUERIES]:
            if (asked := metrics_in(query)) & OF_TIMESCALEDB and not asked & unknown:
                await asyncio.to_thread(server.wait_series, query)
