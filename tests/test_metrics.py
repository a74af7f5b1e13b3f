"""What is counted: by one process and by several, also when one of them dies; how late quotes were; the pools."""

import asyncio
import dataclasses
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import hypothesis
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app import metrics
from app.db.capability import Capability
from app.db.engine import Database
from app.errors import DatabaseRefused, DatabaseUnavailable, QuotesError
from app.main import create_app
from app.metrics import REGISTRY
from app.monitor import Monitor
from app.repository.storage import Job, Storage, StorageRepository
from app.settings import Settings
from tests.conftest import Lane, Serve, Service, running

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(url: str) -> Series:
    return parsed(httpx.get(f"{url}/metrics", timeout=30).text)


def value(series: Series, name: str, **labels: str) -> float:
    return series.get((name, frozenset(labels.items())), math.nan)


def here(name: str, **labels: str) -> float:
    return value(parsed(generate_latest(REGISTRY).decode()), name, **labels)


def counters(series: Series) -> Series:
    return {key: figure for key, figure in series.items() if key[0].endswith(("_total", "_bucket", "_count", "_sum"))}


def workers_of(service: Service) -> list[int]:
    """Processes of the service that answer requests, by what they log when they start."""
    started = re.findall(r"Started server process \D*(\d+)", service.log.read_text())
    return [int(pid) for pid in started if Path(f"/proc/{pid}").exists()]


def kill_one(service: Service, turn: int) -> set[int]:
    """Kill one of two workers and wait until its successor answers; the workers there were."""
    living = workers_of(service)
    assert len(living) == 2
    started = service.log.read_text().count("Application startup complete")
    os.kill(living[turn % 2], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while service.log.read_text().count("Application startup complete") == started:
        assert time.monotonic() < deadline, service.log.read_text()
        time.sleep(0.1)
    return set(living)


def test_workers_count_together_and_no_counter_goes_back_when_one_dies(
    serve: Serve, shared_dir: Path, symbol: str
) -> None:
    labels = {"handler": "/v1/quotes", "method": "POST", "code": "200"}
    made = 0
    seen: set[int] = set()

    def post(url: str, count: int) -> None:
        nonlocal made
        for _ in range(count):
            # A new connection each, so that either worker may get it.
            rows = [{"symbol": symbol, "timestamp": "2026-11-20T00:00:00Z", "price": 1}]
            assert httpx.post(f"{url}/v1/quotes", json=rows, timeout=30).status_code == 200
            made += 1

    environment = {"QUOTES_LOG_FORMAT": "json", "QUOTES_MONITOR_INTERVAL": "1 s", "TMPDIR": str(shared_dir)}
    with serve(shared_dir / "counted", "--workers", "2", **environment) as service:
        before: Series = {}
        for round_ in range(4):
            post(service.url, 25)
            time.sleep(0.2)  # a request is counted after its answer was sent
            for _ in range(6):
                series = scraped(service.url)
                assert value(series, "quotes_http_requests_total", **labels) == made
                assert value(series, "quotes_ingest_batch_rows_count") == made
                route = {"handler": "/v1/quotes", "method": "POST"}
                assert value(series, "quotes_http_request_duration_seconds_count", **route) == made
                assert value(series, "quotes_ingest_rows_total", result="inserted") == 1
                assert value(series, "quotes_http_requests_in_progress") == 0
                assert value(series, "quotes_db_pool_max_connections", role="primary") == 60
                assert value(series, "quotes_monitor_up") == 1
                back = [key for key, figure in counters(before).items() if not series.get(key, -1) >= figure]
                assert not back, "a counter went back"
                before = series
            if round_ == 3:
                break
            seen |= kill_one(service, round_)
        (directory,) = shared_dir.glob("opa-quotes-metrics-*")
        files = sorted(file.name for file in directory.iterdir())
        assert len(seen) == 4, "both had been replaced"
        assert {re.sub(r".*(worker\d+).*", r"\1", name) for name in files} == {
            "worker0",
            "worker1",
            "leader.lock",
            "started",
            "count",
        }
        assert len(files) == 2 * 6 + 3, files
        # Each worker there was at first is dead, and so is the one that looked at the store.
        rows = [{"symbol": symbol, "timestamp": "2026-11-21T00:00:00Z", "price": 1}]
        assert httpx.post(f"{service.url}/v1/quotes", json=rows, timeout=30).status_code == 200
        made += 1
        deadline = time.monotonic() + 30
        while value(scraped(service.url), "quotes_latest_quote_timestamp_seconds") != 1_795_219_200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # A worker that is retired takes its gauges along.
        service.process.send_signal(signal.SIGTTOU)
        deadline = time.monotonic() + 30
        while value(scraped(service.url), "quotes_db_pool_max_connections", role="primary") != 30:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert value(scraped(service.url), "quotes_http_requests_total", **labels) == made
    assert not list(shared_dir.glob("opa-quotes-metrics-*")), "nothing stays behind"


@pytest.mark.parametrize("in_columns", [True, False])
def test_lag_and_late_rows_are_those_of_a_plain_loop(*, in_columns: bool) -> None:
    arrived = 1_763_812_800.0

    @hypothesis.settings(deadline=None)
    @given(st.lists(st.integers(-90 * 86400 * 10**6, 60 * 10**6), max_size=40))
    def holds(ages: list[int]) -> None:
        micros = [int(arrived * 1e6) + age for age in ages]
        batch = pa.array(micros, pa.timestamp("us", "UTC"))
        lag, late = here("quotes_ingest_event_lag_seconds_sum"), here("quotes_ingest_late_rows_total")
        metrics.observe_arrival(batch if in_columns else batch.to_pylist(), arrived)
        expected = max(0.0, arrived - max(micros, default=math.inf) / 1e6)
        assert here("quotes_ingest_event_lag_seconds_sum") - lag == pytest.approx(expected, abs=1e-3)
        assert here("quotes_ingest_late_rows_total") - late == sum(age < -3600 * 10**6 for age in ages)

    holds()


async def test_a_request_is_counted_by_what_it_asked_and_brought(lane: Lane, symbol: str) -> None:
    app = create_app(lane.make_settings())
    async with running(app) as client:
        before = parsed((await client.get("/metrics")).text)
        now = datetime.now(UTC)
        body = [
            {"symbol": symbol, "timestamp": (now - timedelta(hours=hours)).isoformat(), "price": 1}
            for hours in (0, 2, 3)
        ]
        sent = await client.post("/v1/quotes", json=body)
        assert sent.status_code == 200
        await client.post("/v1/quotes", json=body)
        await client.get(f"/v1/{symbol}")
        await client.request("PURGE", "/v1/quotes")
        await client.get("/health/live")
        nothing = await client.post("/v1/quotes", params={"on_error": "skip"}, json=[{**body[0], "price": -1}])
        assert (nothing.status_code, len(nothing.json()["rejected"])) == (200, 1)
        after = parsed((await client.get("/metrics")).text)

    def grown(name: str, **labels: str) -> float:
        found = value(before, name, **labels)
        return value(after, name, **labels) - (0 if math.isnan(found) else found)

    requests = "quotes_http_requests_total"
    assert grown(requests, handler="/v1/quotes", method="POST", code="200") == 3
    assert grown(requests, handler="none", method="GET", code="404") == 1
    assert grown(requests, handler="/v1/quotes", method="other", code="405") == 1
    assert grown("quotes_http_request_body_bytes_count") == 3
    received = sum(int(answer.request.headers["content-length"]) for answer in (sent, sent, nothing))
    assert grown("quotes_http_request_body_bytes_sum") == received
    assert grown("quotes_ingest_event_lag_seconds_count") == 2
    assert 0 <= grown("quotes_ingest_event_lag_seconds_sum") < 60
    assert grown("quotes_ingest_late_rows_total") == 4
    assert grown("quotes_db_pool_wait_seconds_count", role="primary") > 0
    assert value(after, "quotes_http_requests_in_progress") == 0
    assert value(after, "quotes_writer_queue_limit_rows") == 500_000
    values = {figure for key in after for name, figure in key[1]}
    assert symbol not in values
    assert not any("/v1/" + symbol in figure or "health" in figure for figure in values)


async def test_requests_in_progress_are_seen() -> None:
    app = create_app(Settings(_env_file=None))
    entered, go = asyncio.Event(), asyncio.Event()

    @app.get("/slow")
    async def slow() -> None:
        entered.set()
        await go.wait()

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        before = here("quotes_http_requests_in_progress")
        asking = asyncio.create_task(client.get("/slow"))
        await entered.wait()
        assert here("quotes_http_requests_in_progress") == before + 1
        go.set()
        await asking
        assert here("quotes_http_requests_in_progress") == before


@pytest.mark.concurrent
async def test_pools_show_what_is_used_and_what_failed(lane: Lane) -> None:
    database = Database(lane.url, lane.make_settings(pool_size=2, pool_overflow=0, pool_timeout="100 ms"))
    in_use = here("quotes_db_pool_checked_out_connections", role="primary")
    waited = here("quotes_db_pool_wait_seconds_count", role="primary")

    def errors(kind: str) -> float:
        found = here("quotes_db_errors_total", sqlstate_class=kind)
        return 0 if math.isnan(found) else found

    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(database.acquire())
        assert here("quotes_db_pool_checked_out_connections", role="primary") == in_use + 2
        pool = errors("pool")
        with pytest.raises(DatabaseUnavailable):
            async with database.acquire():
                pass
        assert errors("pool") == pool + 1
    assert here("quotes_db_pool_wait_seconds_count", role="primary") == waited + 2

    before = errors("22"), errors("57"), errors("connection")
    with pytest.raises(DatabaseRefused):
        async with database.acquire() as connection:
            await connection.execute("SELECT 1 / 0")
    with pytest.raises(QuotesError):
        async with database.acquire() as connection:
            await connection.execute("SET statement_timeout = 10; SELECT pg_sleep(5)")
    with pytest.raises(DatabaseUnavailable):
        async with database.acquire() as connection:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert (errors("22"), errors("57"), errors("connection")) == tuple(count + 1 for count in before)
    assert here("quotes_db_pool_checked_out_connections", role="primary") == in_use
    await database.close()


@pytest.fixture
def _unknown_room() -> Iterator[None]:
    free = metrics.STORAGE_FREE._is_set
    metrics.STORAGE_FREE._is_set = False
    yield
    metrics.STORAGE_FREE._is_set = free


async def _nothing() -> None:
    pass


@pytest.mark.usefixtures("_unknown_room")
async def test_a_look_shows_room_and_freshness(lane: Lane, symbol: str) -> None:
    settings = lane.make_settings()
    async with running(create_app(settings)) as client:
        await client.post("/v1/quotes", json=[{"symbol": symbol, "timestamp": "2026-11-20T00:00:00Z", "price": 1}])
    database = Database(lane.url, settings)
    await database.connect()
    look = await Monitor(StorageRepository(database), settings, _nothing).storage()
    assert look.newest is not None
    assert look.size > sum(relation.bytes for relation in look.relations)
    assert here("quotes_latest_quote_timestamp_seconds") == look.newest.timestamp() >= 1_795_132_800
    assert here("quotes_storage_size_bytes") == look.size
    assert math.isnan(here("quotes_storage_free_bytes")), "nothing is known of the server's volume"
    capacity = look.size + 10**12
    await Monitor(StorageRepository(database), lane.make_settings(storage_capacity=capacity), _nothing).storage()
    assert 0 <= 10**12 - here("quotes_storage_free_bytes") < 10**9
    await database.close()


async def test_a_job_that_was_removed_is_not_overdue_for_ever(lane: Lane) -> None:
    settings = lane.make_settings()
    database = Database(lane.url, settings)
    monitor = Monitor(StorageRepository(database), settings, _nothing)
    hour = timedelta(hours=1)
    now = datetime.now(UTC)
    job = Job("gone", 1, True, hour, now, now, "Success", 1, 0, now)
    look = Storage(Capability.of(("18.6", None, None)), 0, None, [], [], [], [job], None)
    monitor._show(look)
    assert here("timescaledb_job_schedule_interval_seconds", job_name="gone") == 3600
    monitor._show(dataclasses.replace(look, jobs=[]))
    assert math.isnan(here("timescaledb_job_schedule_interval_seconds", job_name="gone"))
    await database.close()


def test_room_on_the_volume_of_the_embedded_server(serve: Serve, shared_dir: Path) -> None:
    for workers in ("1", "2"):
        with serve(shared_dir / "room", "--workers", workers) as service:
            deadline = time.monotonic() + 30
            while math.isnan(value(scraped(service.url), "quotes_storage_free_bytes")):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            volume = os.statvfs(shared_dir)
            free = value(scraped(service.url), "quotes_storage_free_bytes")
            assert free == pytest.approx(volume.f_bavail * volume.f_frsize, rel=0.2)
