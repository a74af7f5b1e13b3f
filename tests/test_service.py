"""The service as a process: restarts, draining, several workers, the command line. Who kills it: test_chaos.py."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import asyncpg
import httpx
import pytest

from app import __version__
from app.db import embedded
from tests.conftest import Serve, Service, free_port, random_symbol, until_true

START = datetime(2026, 11, 1, tzinfo=UTC)


def batch(symbol: str, first: int, count: int) -> dict[str, Any]:
    times = ((START + timedelta(milliseconds=first + i)).isoformat() for i in range(count))
    return {"quotes": [{"symbol": symbol, "timestamp": at, "price": 1 + first % 7} for at in times]}


def count(url: str, symbol: str) -> int:
    return int(httpx.get(f"{url}/v1/quotes/count", params={"symbols": symbol}, timeout=30).json()["count"])


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments], check=False, capture_output=True, text=True,
        env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def test_quotes_are_there_after_a_restart(serve: Serve, shared_dir: Path, symbol: str) -> None:
    data = shared_dir / "restart"
    with serve(data) as service:
        assert httpx.post(f"{service.url}/v1/quotes", json=batch(symbol, 0, 10)).json()["inserted"] == 10
    began = time.monotonic()
    with serve(data) as service:
        assert time.monotonic() - began < 30
        latest = httpx.get(f"{service.url}/v1/quotes/latest", params={"symbols": symbol}).json()
        assert latest["quotes"][0]["timestamp"] == "2026-11-01T00:00:00.009000000Z"
        bars = httpx.get(f"{service.url}/v1/ohlc", params={"symbols": symbol, "interval": "1d", "start": "2026-11-01"})
        assert bars.json()["bars"][0]["count"] == 10
        assert count(service.url, symbol) == 10
        second = command("serve", "--port", "0", "--data-dir", str(data))
        assert second.returncode == 3
        assert "in use by another service" in second.stderr
        assert "Traceback" not in second.stderr


async def hammer(service: Service, kill: Callable[[], None], after: float) -> tuple[dict[str, int], int]:
    """Post from four clients until the service dies; acknowledged rows by symbol, and requests in doubt."""
    acknowledged: dict[str, int] = {}
    in_doubt = 0

    async def client(symbol: str) -> None:
        nonlocal in_doubt
        async with httpx.AsyncClient(timeout=20) as http:
            for first in range(0, 10**9, 500):
                try:
                    answer = await http.post(f"{service.url}/v1/quotes", json=batch(symbol, first, 500))
                except httpx.ConnectError:
                    return
                except httpx.TransportError:
                    in_doubt += 1
                    return
                if answer.status_code != 200:
                    in_doubt += 1
                    return
                acknowledged[symbol] = first + answer.json()["inserted"]
                if answer.headers.get("connection") == "close":
                    return  # it leaves, as it is told

    clients = [asyncio.create_task(client(random_symbol())) for _ in range(4)]
    await asyncio.sleep(after)
    kill()
    await asyncio.gather(*clients)
    return acknowledged, in_doubt


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell what memory a process holds"
)
async def test_more_than_can_be_written_is_refused_and_memory_stays_bounded(serve: Serve, shared_dir: Path) -> None:
    """Forty clients, each with bodies of 3 MB, against a queue of 8 MB."""
    limits = {"QUOTES_WRITER_QUEUE_BYTES": "8000000", "QUOTES_WRITER_QUEUE_ROWS": "60000"}
    answers: list[int] = []
    symbols = [random_symbol() for _ in range(40)]
    stored = dict.fromkeys(symbols, 0)
    with serve(shared_dir / "overload", **limits) as service:

        async def client(http: httpx.AsyncClient, symbol: str) -> None:
            for turn in range(2):
                body = json.dumps(batch(symbol, 40_000 * turn, 40_000))
                answer = await http.post(f"{service.url}/v1/quotes", content=body)
                answers.append(answer.status_code)
                if answer.status_code == 200:
                    stored[symbol] += answer.json()["inserted"]
                else:
                    problem = answer.json()
                    assert (answer.status_code, problem["code"]) == (503, "overloaded")
                    assert 1 <= int(answer.headers["Retry-After"]) <= 30

        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http:
            await client(http, symbols[0])
            before = resident(service.process.pid)
            await asyncio.gather(*(client(http, symbol) for symbol in symbols))
            assert resident(service.process.pid) - before < 100_000_000
            assert {200, 503} == set(answers)
            after = await http.post(f"{service.url}/v1/quotes", json=batch(random_symbol(), 0, 10))
            assert after.json()["inserted"] == 10
        for symbol, rows in stored.items():
            assert count(service.url, symbol) == rows


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGHUP])
async def test_stopping_answers_what_was_accepted(serve: Serve, shared_dir: Path, ended: signal.Signals) -> None:
    """Every request that reached the service, on connections that are kept; the next one finds nobody listening."""
    data = shared_dir / "stopping"
    with serve(data) as service:
        acknowledged, in_doubt = await hammer(service, lambda: service.process.send_signal(ended), 1.0)
        assert in_doubt == 0
        assert service.process.wait(30) == 0
    with serve(data) as service:
        for symbol, rows in acknowledged.items():
            assert rows <= count(service.url, symbol) <= rows + 500


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_what_waits_when_the_service_stops_has_an_answer(serve: Serve, shared_dir: Path, workers: str) -> None:
    """A write behind a lock, and a body that does not come: a problem each, in time, never half an answer.

    systemd is told when the service serves, and when it stops.
    """
    data = shared_dir / "waiting"
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.settimeout(10)
    told.bind(str(shared_dir / f"notify{workers}"))
    with (
        told,
        serve(data, "--workers", workers, QUOTES_DRAIN_TIMEOUT="1 s", NOTIFY_SOCKET=told.getsockname()) as service,
    ):
        assert told.recv(99) == b"READY=1"
        holder = await asyncpg.connect(embedded.url(data))
        await holder.execute("BEGIN; LOCK TABLE quotes.real_time IN EXCLUSIVE MODE")
        symbol = random_symbol()
        async with httpx.AsyncClient(timeout=30) as http:
            now = datetime.now(UTC).isoformat()
            quotes = [{"symbol": symbol, "timestamp": now, "price": 1}]
            writing = asyncio.create_task(http.post(f"{service.url}/v1/quotes", json=quotes))

            # Half a body; the answer is there to be read by whoever looks.
            reader, sender = await asyncio.open_connection("127.0.0.1", httpx.URL(service.url).port)
            sender.write(b"POST /v1/quotes HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n[")
            await asyncio.sleep(0.5)
            service.process.terminate()
            async with asyncio.timeout(30):
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            answer = await writing
        sender.close()
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"application/problem+json" in head
        assert json.loads(body)["code"] == "service-stopping"
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.status_code, answer.json()["code"]) == (503, "service-stopping")
        await holder.close()
        assert service.process.wait(30) == 0
        assert told.recv(99) == b"STOPPING=1"
        assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_who_comes_while_the_service_drains_is_turned_away_at_once(
    serve: Serve, shared_dir: Path, symbol: str, workers: str
) -> None:
    data = shared_dir / "draining"
    with serve(data, "--workers", workers, QUOTES_DRAIN_TIMEOUT="60 s") as service:
        holder = await asyncpg.connect(embedded.url(data))
        await holder.execute("BEGIN; LOCK TABLE quotes.latest IN EXCLUSIVE MODE")
        async with httpx.AsyncClient(timeout=60) as http:
            now = datetime.now(UTC).isoformat()
            quotes = [{"symbol": symbol, "timestamp": now, "price": 1}]
            writing = asyncio.create_task(http.post(f"{service.url}/v1/quotes", json=quotes))
            await until_true(holder, "SELECT count(*) FROM pg_locks WHERE NOT granted")
            service.process.terminate()
            port = httpx.URL(service.url).port
            refused = False
            while not (refused or writing.done()):
                try:
                    _, sender = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionRefusedError:
                    refused = True
                else:
                    sender.close()
                    await asyncio.sleep(0.05)
            await holder.close()
            assert refused, "there was a socket as long as the writes waited"
            assert (await writing).status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_that_cannot_start_says_so_to_its_supervisor(serve: Serve, shared_dir: Path, workers: str) -> None:
    nobody = f"postgresql://postgres@127.0.0.1:{free_port()}/quotes"
    with serve(shared_dir / "none", "--workers", workers, ready=False, QUOTES_DATABASE_URL=nobody) as service:
        assert service.process.wait(60) == 3
        assert "cannot start" in service.log.read_text()


def test_no_more_workers_than_a_machine_has_room_for(shared_dir: Path) -> None:
    found = command("serve", "--workers", "100000000", "--data-dir", str(shared_dir / "not-begun"))
    assert found.returncode == 2
    assert "--workers" in found.stderr
    assert not (shared_dir / "not-begun").exists()


def test_a_port_that_is_taken_is_told_before_anything_is_begun(shared_dir: Path) -> None:
    data = shared_dir / "not-begun"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = command("serve", "--port", port, "--data-dir", str(data))
    assert found.returncode == 3
    assert f"--port {port}" in found.stderr
    assert "Traceback" not in found.stderr
    assert not data.exists()


def test_workers_end_with_their_parent_and_the_next_one_goes_on(serve: Serve, shared_dir: Path, symbol: str) -> None:
    data = shared_dir / "orphans"
    with serve(data, "--workers", "2") as service:
        assert httpx.post(f"{service.url}/v1/quotes", json=batch(symbol, 0, 3)).status_code == 200
        service.process.kill()
        service.process.wait()
        until = time.monotonic() + 30
        while _answers(service.url):
            assert time.monotonic() < until
            time.sleep(0.1)
    with serve(data, "--workers", "2") as service:
        assert count(service.url, symbol) == 3


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live").status_code == 200
    except httpx.TransportError:
        return False


def test_several_workers_share_one_embedded_database(serve: Serve, shared_dir: Path, symbol: str) -> None:
    with serve(shared_dir / "workers", "--workers", "2") as service:
        for i in range(20):
            answer = httpx.post(f"{service.url}/v1/quotes", json=batch(symbol, i, 1))
            assert answer.status_code == 200, answer.text
        assert count(service.url, symbol) == 20
        time.sleep(0.2)
        series = [
            line for line in httpx.get(f"{service.url}/metrics").text.splitlines()
            if line.startswith('quotes_ingest_rows_total{result="inserted"}')
        ]  # fmt: skip
        assert series == ['quotes_ingest_rows_total{result="inserted"} 20.0'], "counted across processes"


def test_health_on_the_command_line(serve: Serve, shared_dir: Path) -> None:
    data = shared_dir / "health"
    missing = command("health", "--data-dir", str(data))
    assert missing.returncode == 1
    report = json.loads(missing.stdout)
    assert report["overall_status"] == "unhealthy"
    assert {name: check["status"] for name, check in report["checks"].items()} == {
        "database": "unhealthy", "timescaledb": "skipped", "hypertable": "skipped",
    }  # fmt: skip
    with serve(data, ready=False):
        found = command("health", "--data-dir", str(data), "--wait", "60", "--retry", "60")
        assert found.returncode == 0, found.stderr
        report = json.loads(found.stdout)
    assert report["overall_status"] == "healthy"
    assert report["level"] == "postgresql"
    assert report["checks"]["timescaledb"]["status"] == "skipped"
    assert report["checks"]["database"]["latency_ms"] > 0


@pytest.mark.long
def test_a_result_is_reported_to_a_supervisor(serve: Serve, shared_dir: Path) -> None:
    received: list[dict[str, Any]] = []

    class Supervisor(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(json.loads(body))
            self.send_response(500 if len(received) == 1 else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Supervisor) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        with serve(shared_dir / "reported"):
            told = command("health", "--data-dir", str(shared_dir / "reported"), "--report", url)
        server.shutdown()
        thread.join()
    assert told.returncode == 0, told.stderr
    assert [report["overall_status"] for report in received] == ["healthy", "healthy"], "a failed report is retried"
    unheard = command("health", "--data-dir", str(shared_dir / "reported"), "--report", url)
    assert unheard.returncode == 1, "what it is about weighs more than who heard of it"
    assert "could not be reported: no answer" in unheard.stderr


@pytest.mark.long
def test_a_report_that_nobody_takes_has_its_own_exit_status(service_url: str, shared_dir: Path) -> None:
    asked: list[str] = []

    class Supervisor(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(404 if self.path == "/unknown" else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Supervisor) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        told = {
            path: command(
                "health", "--data-dir", str(shared_dir / "service"), "--report",
                f"http://u:hunter2@127.0.0.1:{server.server_port}{path}",
            )
            for path in ("/busy", "/unknown")
        }  # fmt: skip
        server.shutdown()
        thread.join()
    assert asked == ["/busy"] * 4 + ["/unknown"], "a refusal for good is not asked for again"
    for path, status in (("/busy", 503), ("/unknown", 404)):
        assert told[path].returncode == 3
        assert f"could not be reported: the supervisor answered {status}." in told[path].stderr
        assert "hunter2" not in told[path].stdout + told[path].stderr
        assert json.loads(told[path].stdout)["overall_status"] == "healthy"
    nowhere = command("health", "--data-dir", str(shared_dir / "service"), "--report", "supervisor:/x")
    assert (nowhere.returncode, "Traceback" in nowhere.stderr) == (3, False)


def test_migrating_on_the_command_line(shared_dir: Path) -> None:
    data = str(shared_dir / "migrated")
    assert "The schema is at r7" in command("migrate", "--data-dir", data).stderr
    assert "The schema is at base" in command("migrate", "base", "--down", "--data-dir", data).stderr
    unknown = command("migrate", "9999", "--data-dir", data)
    assert unknown.returncode == 1
    assert "error: Migration failed" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_mistakes_are_one_sentence(shared_dir: Path) -> None:
    away = command("migrate", QUOTES_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert (away.returncode, away.stderr) == (1, "error: The database cannot be reached.\n")
    wrong = command("health", QUOTES_DATABASE_URL="mysql://localhost/x")
    assert wrong.returncode == 1
    assert "QUOTES_DATABASE_URL: Value error, must be a plain postgresql:// URL" in wrong.stdout
    wrong = command("migrate", QUOTES_DATABASE_URL="mysql://localhost/x")
    assert wrong.returncode == 2
    assert "QUOTES_DATABASE_URL: Value error, must be a plain postgresql:// URL" in wrong.stderr
    serving = command("serve", "--port", "0", QUOTES_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert serving.returncode == 3
    assert "cannot be reached" in serving.stderr
    assert "Traceback" not in serving.stderr


def test_version_and_settings() -> None:
    assert command("--version").stdout.strip() == __version__
    listed = json.loads(command("settings", "--json").stdout)
    assert {"variable", "default", "meaning"} == set(listed[0])
    assert "QUOTES_DATABASE_URL" in command("settings").stdout
    assert "serve" in command().stdout + command("--help").stdout


def test_a_file_is_loaded_and_the_exit_status_tells_of_bad_rows(service_url: str, tmp_path: Path, symbol: str) -> None:
    file = tmp_path / "ticks.csv"
    file.write_text("timestamp,price\n2026-11-16T00:00:00Z,1.5\n2026-11-16T00:00:01Z,2.5\n")
    arguments = ("load", str(file), "--url", service_url, "--symbol", symbol, "--json")
    good = command(*arguments)
    assert good.returncode == 0, good.stderr
    json.loads(good.stdout)
    assert count(service_url, symbol) == 2
    file.write_text("timestamp,price\n2026-11-16T00:00:02Z,-1\n2026-11-16T00:00:03Z,4\n")
    assert command(*arguments).returncode == 1
    assert count(service_url, symbol) == 3


def test_the_demo_feeds_a_service(service_url: str) -> None:
    told = command("demo", "--url", service_url, "--days", "0", "--duration", "2", "--rate", "20", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["live"] > 0
