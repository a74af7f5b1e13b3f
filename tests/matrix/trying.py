"""Runs cases: a database is set up, migrated, written and read, and compared with one on which nothing is set."""

import asyncio
import random
import string
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx

from app.db.migrate import migrate
from app.errors import QuotesError
from app.main import create_app
from app.settings import Settings
from tests.chaos.reporting import Report
from tests.conftest import running
from tests.matrix.cases import Case
from tests.pooler import pgbouncer

_TOKEN: Final = {"authorization": "Bearer matrix"}
_DAY: Final = {"symbols": "A,B/C", "start": "2026-11-16", "end": "2026-11-17"}
_ROWS: Final = [
    {"symbol": symbol, "timestamp": f"2026-11-16T12:0{minute}:00.000000{minute:03d}Z", "price": f"{minute + 1}.10",
     "volume": "0.000000000001", "source": "€ '\\"}
    for symbol in ("A", "B/C") for minute in range(5)
]  # fmt: skip
#: What is read; each answer has to be that of a database on which nothing is set.
_READS: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    ("/v1/quotes", _DAY),
    ("/v1/quotes", _DAY | {"limit": "3", "sort": "desc"}),
    ("/v1/quotes/latest", {}),
    ("/v1/quotes/count", _DAY),
    ("/v1/ohlc", _DAY | {"interval": "1m"}),
    ("/v1/ohlc", _DAY | {"interval": "1d", "tz": "America/New_York"}),
    ("/v1/summary/daily", _DAY),
    ("/v1/symbols", {}),
)
_WRITERS: Final = 6


@dataclass(slots=True)
class Outcome:
    """How the service met a case: what it answered, or the sentence that refused it."""

    answers: list[Any] = field(default_factory=list)
    refusal: str = ""
    health: dict[str, Any] = field(default_factory=dict)
    #: Answers that nothing excuses.
    wrong: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        """All that health says."""
        return " ".join(check["detail"] for check in self.health["checks"].values())

    @property
    def status(self) -> str:
        """The worst of the checks of the database and the schema: the age of the server's software is no case."""
        found = [self.health["checks"][name]["status"] for name in ("database", "hypertable")]
        return next((status for status in ("unhealthy", "degraded") if status in found), "healthy")


async def serve(settings: Settings) -> Outcome:
    """Migrate, write, read, delete and look, as a service does."""
    assert settings.database_url is not None
    outcome = Outcome()
    try:
        await migrate(settings.database_url.get_secret_value(), settings)
        async with running(create_app(settings)) as client:
            await _use(client, outcome)
    except QuotesError as error:
        outcome.refusal = error.detail
    return outcome


async def _use(client: httpx.AsyncClient, outcome: Outcome) -> None:
    async def send(method: str, path: str, **arguments: Any) -> httpx.Response:
        answer = await client.request(method, path, **arguments)
        if not answer.is_success:
            outcome.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer

    first = await send("POST", "/v1/quotes", json=_ROWS, headers={"idempotency-key": "one"})
    again = await send("POST", "/v1/quotes", json=_ROWS, headers={"idempotency-key": "one"})
    outcome.answers += [first.json(), again.json()]
    # Writers that meet: a stricter isolation would fail some of them.
    await asyncio.gather(
        *(
            send("POST", f"/v1/quotes?on_conflict={mode}", json=[row | {"price": "7.5"} for row in _ROWS])
            for mode in ("update", "merge", "ignore")
            for _ in range(_WRITERS // 3)
        )
    )
    outcome.answers += [(await send("GET", path, params=params)).json() for path, params in _READS]
    outcome.health = (await client.get("/health")).json()
    await send("GET", "/health/ready")
    await send("GET", "/v1/storage")
    deleted = {"symbol": "A", "start": "2026-11-16T12:01:00Z", "end": "2026-11-17"}
    outcome.answers.append((await send("DELETE", "/v1/quotes", params=deleted, headers=_TOKEN)).json())
    outcome.answers.append((await send("GET", "/v1/quotes/latest")).json())


def settings_of(url: str, **other: Any) -> Settings:
    """Settings of a service on a database, whatever the environment says."""
    given: dict[str, Any] = {"database_url": url, "require_timescaledb": "none", "retention": None}
    given |= {"log_format": "console", "log_level": "ERROR", "admin_token": "matrix"}
    return Settings(_env_file=None, **given, **other)


class Server:
    """A server on which this may create databases and roles, and the answers of one on which nothing is set."""

    def __init__(self, url: str, *, own: bool) -> None:
        self.url = url
        #: Whether its settings may be changed.
        self.own = own
        self.timescaledb = False
        self.major = 0
        self._plain: list[Any] | None = None

    async def look(self) -> None:
        """Find out what it is."""
        connection = await asyncpg.connect(self.url)
        self.major = connection.get_server_version().major
        self.timescaledb = await connection.fetchval(
            "SELECT current_setting('timescaledb.max_background_workers', true) IS NOT NULL"
        )
        await connection.close()

    def skips(self, case: Case) -> str:
        """Why a case cannot be tried here; empty if it can."""
        if case.server and not self.own:
            return "the settings of this server are not ours to change"
        if case.timescaledb is not None and case.timescaledb != self.timescaledb:
            return "it is about servers with TimescaleDB" if case.timescaledb else "it is about servers without it"
        if any(setting.startswith("transaction_timeout") for setting in case.settings) and self.major < 17:
            return "it is about PostgreSQL 17"
        return ""

    async def plain(self) -> list[Any]:
        """The answers of a database on which nothing is set."""
        if self._plain is None:
            async with self.prepared(Case("nothing")) as (url, _):
                self._plain = (await serve(settings_of(url))).answers
        return self._plain

    @asynccontextmanager
    async def prepared(self, case: Case) -> AsyncIterator[tuple[str, dict[str, str]]]:
        """The URL of a database that is set up, and the names in it; it is dropped afterwards."""
        suffix = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=10))
        names = {"database": f"matrix_{suffix}", "role": f"matrix_role_{suffix}"}
        parts = urlsplit(self.url)
        inside = urlunsplit(parts._replace(path=f"/{names['database']}"))
        async with AsyncExitStack() as stack:
            admin = await asyncpg.connect(self.url)
            stack.push_async_callback(admin.close)
            await admin.execute(f"CREATE DATABASE {names['database']} {case.options}")
            stack.push_async_callback(admin.execute, f"DROP DATABASE {names['database']} WITH (FORCE)")
            url = inside
            if case.role:
                await admin.execute(f"CREATE ROLE {names['role']} LOGIN")
                stack.push_async_callback(admin.execute, f"DROP ROLE {names['role']}")
                url = urlunsplit(urlsplit(inside)._replace(netloc=f"{names['role']}@{parts.netloc.rpartition('@')[2]}"))
            extension = ["CREATE EXTENSION IF NOT EXISTS timescaledb"] if case.role and self.timescaledb else []
            connection = await asyncpg.connect(inside)
            for statement in [*extension, *case.before]:
                await connection.execute(statement.format(**names))
            await connection.close()
            for setting in case.settings:
                await admin.execute(f"ALTER DATABASE {names['database']} SET {setting}")
            for setting in case.server:
                stack.push_async_callback(_reload, admin, f"RESET {setting.split()[0]}", setting.split()[0])
                await _reload(admin, f"SET {setting}", setting.split()[0])
            try:
                yield url, names
            finally:
                if case.role:
                    await _disown(inside, names["role"])

    async def run(self, case: Case, report: Report) -> None:
        """Try a case, and note what came of it."""
        if reason := self.skips(case):
            report.figures[case.name] = f"skipped: {reason}"
            return
        plain = await self.plain()
        async with self.prepared(case) as (url, names):
            outcome = await serve(settings_of(url))
            await self.judge(case, outcome, plain, names, report)

    async def judge(
        self, case: Case, outcome: Outcome, plain: list[Any], names: dict[str, str], report: Report
    ) -> None:
        """Note what came of a case."""
        for wrong in outcome.wrong:
            report.require(False, f"{case.name}: {wrong}")
        if outcome.refusal or case.refused:
            report.figures[case.name] = f"refused: {outcome.refusal}"
            for words in case.refused:
                report.require(words.format(**names) in outcome.refusal, f"{case.name}: {outcome.refusal!r}")
            report.require(bool(case.refused), f"{case.name}: it is refused: {outcome.refusal}")
            return
        report.figures[case.name] = f"served, {outcome.status}: {outcome.health['checks']['database']['detail']}"
        for here, there in zip(outcome.answers, plain, strict=True):
            report.require(_alike(here) == _alike(there), f"{case.name}: {here} is not {there}")
        harmed = bool(case.jobs) and self.timescaledb
        wanted = "degraded" if harmed else case.status
        report.require(outcome.status == wanted, f"{case.name}: it is {outcome.status}: {outcome.told}")
        for words in case.told + (case.jobs if harmed else ()):
            report.require(words in outcome.told, f"{case.name}: health does not say {words!r}: {outcome.told}")


def _alike(answer: Any) -> Any:
    """An answer without how long it took."""
    return (
        {name: value for name, value in answer.items() if name != "elapsed_ms"} if isinstance(answer, dict) else answer
    )


async def _reload(admin: "asyncpg.Connection[Any]", change: str, name: str) -> None:
    """Change a setting of the server; it has it when this session, which it tells last, has it."""
    before = await admin.fetchval(f"SHOW {name}")
    await admin.execute(f"ALTER SYSTEM {change}")
    await admin.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(10):
        while await admin.fetchval(f"SHOW {name}") == before:  # noqa: ASYNC110  what is waited for happens in a database
            await asyncio.sleep(0.01)


async def _disown(url: str, role: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(f"DROP OWNED BY {role} CASCADE")
    await connection.close()


async def pooled(server: Server, directory: Path, mode: str) -> Report:
    """The service by way of PgBouncer, with a pool of its own and with a connection for each operation."""
    await server.look()
    report = Report(f"PgBouncer, pool_mode = {mode}")
    plain = await server.plain()
    for size in (10, 0):
        case = Case(
            f"QUOTES_POOL_SIZE = {size}",
            refused=() if mode == "session" else (mode, "pool_mode = session is needed"),
        )
        async with server.prepared(case) as (url, names):
            with pgbouncer(directory / f"pgbouncer-{mode}-{size}", url, mode) as through:
                outcome = await serve(settings_of(through, pool_size=size))
            await server.judge(case, outcome, plain, names, report)
    return report


async def run(server: Server, cases: Sequence[Case], name: str) -> Report:
    """Try cases one after another."""
    await server.look()
    report = Report(name)
    for case in cases:
        try:
            await server.run(case, report)
        except Exception as error:  # a case that cannot be set up is no reason not to try the others
            report.require(False, f"{case.name}: {type(error).__name__}: {error}")
    return report
