"""What stands beside the service: InfluxDB, the application of an afternoon, and a route that does nothing.

Invariant: all run on this machine, take requests from the same client, and tell how many quotes they hold.
"""

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import httpx

from app.db.engine import Connection
from benchmarks.client import HOST
from benchmarks.target import Target, free_port, running, serving

Stored = Callable[[datetime, datetime], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Door:
    """Where quotes go in, and how many are behind it in a range of time."""

    name: str
    port: int
    process: int
    path: str
    stored: Stored | None


def of_service(target: Target, admin: Connection) -> Door:
    """The service itself."""
    return Door("service", target.port, target.service, "/v1/quotes", partial(_count, admin, "quotes.real_time"))


@asynccontextmanager
async def afternoon(target: Target, admin: Connection) -> AsyncIterator[Door]:
    """The application of an afternoon, on the same database."""
    environment = {"QUOTES_DATABASE_URL": target.database_url}
    command = ("benchmarks.serve", "benchmarks.afternoon:create")
    async with serving(command, target.scratch / "afternoon.log", environment) as (port, process):
        yield Door("afternoon", port, process, "/quotes", partial(_count, admin, "afternoon.quotes"))


@asynccontextmanager
async def empty_post(target: Target) -> AsyncIterator[Door]:
    """The service with a route that does nothing, in a process of its own."""
    environment = {
        "QUOTES_DATABASE_URL": target.database_url,
        "QUOTES_REQUIRE_TIMESCALEDB": "none",
        "QUOTES_MIGRATE_ON_START": "false",
        "QUOTES_MONITOR_INTERVAL": "0",
    }
    command = ("benchmarks.serve", "benchmarks.empty_post:create")
    async with serving(command, target.scratch / "empty.log", environment) as (port, process):
        yield Door("empty", port, process, "/empty", None)


async def _count(admin: Connection, table: str, start: datetime, end: datetime) -> int:
    statement = f"SELECT count(*) FROM {table} WHERE timestamp >= $1 AND timestamp < $2"
    return int(await admin.fetchval(statement, start, end))


@asynccontextmanager
async def influxdb(target: Target) -> AsyncIterator[Door | None]:
    """InfluxDB 1 with its defaults, on directories and ports of its own; None where it is not installed."""
    program = shutil.which("influxd")
    if program is None:
        yield None
        return
    port = free_port()
    home = target.scratch / "influxdb"
    home.mkdir()
    config = home / "influxdb.conf"
    config.write_text(f"""
reporting-disabled = true
bind-address = "{HOST}:{free_port()}"
[meta]
  dir = "{home / "meta"}"
[data]
  dir = "{home / "data"}"
  wal-dir = "{home / "wal"}"
  query-log-enabled = false
[monitor]
  store-enabled = false
[http]
  bind-address = "{HOST}:{port}"
  log-enabled = false
[logging]
  level = "warn"
""")
    async with (
        running([Path(program), "-config", config], home / "influxd.log", {}, port, "/ping") as process,
        httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=60, trust_env=False) as client,
    ):
        (await client.post("/query", data={"q": "CREATE DATABASE bench"})).raise_for_status()

        async def stored(start: datetime, end: datetime) -> int:
            between = f"time >= '{start:%Y-%m-%dT%H:%M:%S.%fZ}' AND time < '{end:%Y-%m-%dT%H:%M:%S.%fZ}'"
            query = urlencode({"db": "bench", "q": f"SELECT count(price) FROM quotes WHERE {between}"})
            (result,) = json.loads((await client.get(f"/query?{query}")).text)["results"]
            return int(result["series"][0]["values"][0][1]) if "series" in result else 0

        yield Door("InfluxDB", port, process, "/write?db=bench&precision=u", stored)
