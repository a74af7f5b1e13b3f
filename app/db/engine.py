"""Connection pools, with the session settings that every statement of the service relies on.

Invariant: but for `Database.open`, a connection leaves this module only inside a context manager that gives it back,
and driver exceptions leave it only as `errors.*`. Sessions run in UTC, plan with the actual parameters (a generic plan
over a hypertable would lock every chunk) and stop a statement that runs over its time.

A URL may name several hosts: the pool then holds connections to the one that takes writes, and moves when another
one does.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, TypeAlias, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from weakref import WeakKeyDictionary

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app import metrics
from app.db.capability import DETECT, UNRELEASED, UNRELEASED_STORE, Capability
from app.errors import (
    DatabaseDamaged,
    DatabaseRefused,
    DatabaseUnavailable,
    QueryTimeout,
    QuotesError,
    QuotesLocked,
    StartupError,
)
from app.quote.terms import Consistency
from app.settings import Settings

Connection: TypeAlias = "asyncpg.Connection[Any]"
T = TypeVar("T")
#: A read: it may run a second time, on another connection, so it has no effect but its result.
Work: TypeAlias = Callable[[Connection], Awaitable[T]]
#: Longest wait for one of several hosts; one that swallows packets must not use up the time of the others.
_HOST_TIMEOUT: Final = 3.0
#: Renewals of a pool closer together than this are one: a server may stay read-only for longer than a request.
_RENEW_INTERVAL: Final = 1.0
#: What the driver raises when it cannot speak to a server, or not any longer.
_DRIVER_FAILED: Final = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
#: SQLSTATE classes that say "not now" rather than "never": connection, resources, operator intervention, system.
_UNAVAILABLE = ("08", "53", "57", "58", "F0")
#: What a state, or else a class of states, says.
_MEANING: Final[Mapping[str, tuple[type[QuotesError], str]]] = {
    "57014": (QueryTimeout, "The statement ran over its time; ask for a shorter range or fewer symbols."),
    "55P03": (QuotesLocked, "Maintenance or another write holds a lock on these quotes for longer than is waited."),
    "53400": (DatabaseRefused, "A limit in the database's configuration refuses this."),
    "XX": (DatabaseDamaged, "The database reports an error of its own; an operator has to look at its log."),
    "25006": (DatabaseUnavailable, "The database is read-only."),
    "28P01": (DatabaseUnavailable, "The database refused the credentials."),
    "28000": (DatabaseUnavailable, "The database refused the credentials."),
    "3D000": (DatabaseUnavailable, "The database does not exist."),
    "42P01": (DatabaseUnavailable, "The schema is missing: run `opa-quotes migrate`."),
    "3F000": (DatabaseUnavailable, "The schema is missing: run `opa-quotes migrate`."),
    "42501": (DatabaseUnavailable, "The database role lacks a privilege that the service needs."),
} | dict.fromkeys(_UNAVAILABLE, (DatabaseUnavailable, "The database cannot serve the request now."))


def translate(error: BaseException) -> QuotesError | None:
    """The error of this project that a driver's exception stands for; None for what is not the database's."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return translate(error.orig.__cause__ or error.orig)
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        kind, detail = _MEANING.get(state) or _MEANING.get(state[:2]) or (None, "")
        return None if kind is None else kind(detail)
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("All database connections are busy.")
    if isinstance(error, (*_DRIVER_FAILED, TimeoutError)):
        return DatabaseUnavailable("The database cannot be reached.")
    return None


def _count(error: BaseException) -> None:
    """Count an error of the database; whatever else passes through is not one."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        _count(error.orig.__cause__ or error.orig)
    elif isinstance(error, PoolTimeout):
        metrics.DB_ERRORS.labels("pool").inc()
    elif isinstance(error, asyncpg.PostgresError) and error.sqlstate is not None and not connection_lost(error):
        # Forty classes at most, of the server's own.
        metrics.DB_ERRORS.labels(error.sqlstate[:2]).inc()
    elif translate(error) is not None:
        metrics.DB_ERRORS.labels("connection").inc()


@contextmanager
def translated() -> Iterator[None]:
    """Raise a driver's exceptions as errors of this project, and let all others through."""
    try:
        yield
    except QuotesError:
        raise
    except Exception as error:
        _count(error)
        ours = translate(error)
        if ours is None:
            raise
        raise ours from error


def connection_lost(error: BaseException) -> bool:
    """Whether the exception says that the connection, not the statement, failed.

    The driver's own client errors are among them: a server that goes away leaves the protocol between two states.
    """
    return isinstance(error, (*_DRIVER_FAILED, asyncpg.PostgresConnectionError)) or (
        isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(("57P",))
    )


def hosts_of(url: str) -> list[str]:
    """A URL for each host that the URL names, in its order."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    auth, at, listed = parts.netloc.rpartition("@")
    hosts = (listed or query.get("host", "")).split(",")
    ports = query.get("port", "").split(",")
    if len(hosts) == 1:
        return [url]
    if len(ports) not in {1, len(hosts)}:
        raise ValueError("A URL has one port, or as many as hosts.")
    urls = []
    for host, port in zip(hosts, ports * (len(hosts) // len(ports)), strict=True):
        own = query | ({"port": port} if port else {}) | ({} if listed else {"host": host})
        netloc = f"{auth}{at}{host}" if listed else parts.netloc
        urls.append(urlunsplit(parts._replace(netloc=netloc, query=urlencode(own))))
    return urls


async def connect_first(urls: list[str], timeout: float, **options: Any) -> tuple[int, Connection]:
    """A connection to the first of the hosts that can be reached, and its index; of several, that takes writes.

    The driver's own list of hosts shares one timeout, which a host that does not answer would use up.
    """
    if len(urls) == 1:
        return 0, await asyncpg.connect(urls[0], timeout=timeout, **options)
    options["timeout"] = min(_HOST_TIMEOUT, timeout / len(urls))
    options["target_session_attrs"] = SessionAttribute.read_write
    failures: list[Exception] = []
    for index, url in enumerate(urls):
        try:
            return index, await asyncpg.connect(url, **options)
        except (*_DRIVER_FAILED, asyncpg.PostgresError) as error:
            failures.append(error)
    raise failures[0]


async def detect(connection: Connection) -> Capability:
    """What the server can do, if the store on it is none of before the first release.

    Raises:
        StartupError: it is.
    """
    if await connection.fetchval("SELECT to_regclass('alembic_version') IS NOT NULL"):
        # A role that reads quotes need not be able to read this; the store is then as good as its tables.
        with suppress(asyncpg.InsufficientPrivilegeError):
            if await connection.fetchval("SELECT version_num FROM alembic_version") in UNRELEASED:
                raise StartupError(UNRELEASED_STORE)
    return Capability.of(await connection.fetchrow(DETECT) or ())


class Database:
    """The pools of one database.

    Attributes:
        capability: what the server can do, known after `connect()`.
    """

    capability: Capability

    def __init__(self, url: str, settings: Settings, role: metrics.Role = "primary") -> None:
        self._hosts = hosts_of(url)
        self._host = 0  # the one that took writes last
        self._settings = settings
        #: When each open connection was opened, and to which host.
        self._opened: WeakKeyDictionary[Connection, tuple[float, int]] = WeakKeyDictionary()
        self._renewed = -math.inf
        # Reads that hang, as behind a lock on an old chunk, must not take the connections of the writes.
        most = settings.pool_size + settings.pool_overflow - (2 * settings.writer_flushes if role == "primary" else 0)
        self._reads = asyncio.Semaphore(max(most, 1)) if settings.pool_size else None
        self._in_use = metrics.POOL_IN_USE.labels(role)
        self._wait = metrics.POOL_WAIT_SECONDS.labels(role)
        if settings.pool_size:
            metrics.POOL_MAX.labels(role).inc(settings.pool_size + settings.pool_overflow)
        pool: dict[str, Any] = (
            {"poolclass": NullPool}
            if settings.pool_size == 0
            else {
                "pool_size": settings.pool_size,
                "max_overflow": settings.pool_overflow,
                "pool_timeout": settings.pool_timeout.total_seconds(),
                "pool_recycle": 3600,
            }
        )
        self.engine: AsyncEngine = create_async_engine("postgresql+asyncpg://", async_creator=self.open, **pool)
        event.listen(self.engine.sync_engine, "checkout", self._refuse_stale)

    def _refuse_stale(self, connection: Any, *_: object) -> None:
        """Renew the pool when a server that went away has closed a pooled connection: known without a round trip.

        So too when the connection is older than the last renewal. Disposing of the pool instead would lose sight of
        the connections that are in use.
        """
        driver = connection.driver_connection
        opened, _host = self._opened.get(driver, (math.inf, 0))
        if driver.is_closed() or opened <= self._renewed:
            raise InvalidatePoolError

    def renew(self) -> None:
        """Let no connection that is open now be used again; what runs on them goes on."""
        self._renewed = time.monotonic()

    def terminate(self, *, others: bool = False) -> None:
        """Break every open connection, or those to other hosts than the one that takes writes now."""
        for connection, (_, host) in list(self._opened.items()):
            if not (others and host == self._host):
                connection.terminate()

    async def open(self, timeout: float = 10, statement_timeout: timedelta | None = None) -> Connection:
        """A new connection outside the pool, for whoever closes it; the driver's exceptions come as they are."""
        milliseconds = int((statement_timeout or self._settings.statement_timeout).total_seconds() * 1000)
        order = [*range(self._host, len(self._hosts)), *range(self._host)]
        found, connection = await connect_first(
            [self._hosts[i] for i in order],
            timeout,
            # A pooler that hands each transaction to another server process cannot keep prepared statements.
            statement_cache_size=0 if self._settings.pool_size == 0 else 100,
            server_settings={
                "application_name": "opa-quotes",
                "TimeZone": "UTC",
                "plan_cache_mode": "force_custom_plan",
                "jit": "off",
                # A symbol lies scattered over the pages of its day; at the default of 4 the planner rather reads
                # the whole range by time and filters: 9 ms instead of 1 ms for 600 quotes of one symbol of 50.
                "random_page_cost": "1.1",
                "statement_timeout": str(milliseconds),
                "idle_in_transaction_session_timeout": "60000",
            },
        )
        self._host = order[found]
        self._opened[connection] = (time.monotonic(), self._host)
        return connection

    async def connect(self) -> None:
        """Reach the server and detect its capability level.

        Raises:
            DatabaseUnavailable: it cannot be reached.
            StartupError: the store is one of before the first release.
        """
        async with self.acquire() as connection:
            self.capability = await detect(connection)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """A pooled connection.

        Raises:
            DatabaseUnavailable: no connection, or it broke.
            QueryTimeout: a statement ran over its time.
        """
        with translated():
            asked = time.perf_counter()
            async with self.engine.connect() as pooled:
                self._wait.observe(time.perf_counter() - asked)
                raw = await pooled.get_raw_connection()
                driver = cast("Connection", raw.driver_connection)
                self._in_use.inc()
                try:
                    yield driver
                except BaseException as error:
                    read_only = isinstance(error, asyncpg.ReadOnlySQLTransactionError)
                    if read_only and time.monotonic() - self._renewed > _RENEW_INTERVAL:
                        # The server has become a standby. All connections lead there, and all of them work.
                        self.renew()
                    # A cancelled or failed exchange may leave the protocol in the middle of a message.
                    if read_only or connection_lost(error) or driver.is_closed() or driver.is_in_transaction():
                        await pooled.invalidate()
                    raise
                finally:
                    self._in_use.dec()

    async def read(self, work: Work[T], consistency: Consistency = "eventual") -> T:
        """What `work` reads; without replicas, `consistency` makes no difference.

        Raises:
            DatabaseUnavailable: no connection, or it broke twice.
            QueryTimeout: a statement ran over its time.
        """
        del consistency
        return await self._read_primary(work)

    async def _read_primary(self, work: Work[T]) -> T:
        if self._reads is None:
            return await self._read_here(work)
        try:
            async with asyncio.timeout(self._settings.pool_timeout.total_seconds()):
                await self._reads.acquire()
        except TimeoutError:
            metrics.DB_ERRORS.labels("pool").inc()
            raise DatabaseUnavailable("All database connections for reads are busy.") from None
        try:
            return await self._read_here(work)
        finally:
            self._reads.release()

    async def _read_here(self, work: Work[T]) -> T:
        metrics.READS.labels("primary").inc()
        began = False
        try:
            async with self.acquire() as connection:
                began = True
                return await work(connection)
        except DatabaseUnavailable as error:
            # A pooled connection may have died with its server since it was last used; the next one is new.
            if not began or error.__cause__ is None or not connection_lost(error.__cause__):
                raise
        async with self.acquire() as connection:
            return await work(connection)

    @asynccontextmanager
    async def dedicated(
        self, timeout: float = 5, statement_timeout: timedelta | None = None
    ) -> AsyncIterator[Connection]:
        """A connection outside the pool, for probes and long maintenance.

        Raises:
            DatabaseUnavailable: no connection within `timeout` seconds, or it broke.
            QueryTimeout: a statement ran over its time.
        """
        with translated():
            driver = await self.open(timeout, statement_timeout)
            try:
                yield driver
            finally:
                await driver.close(timeout=2)

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.engine.dispose()
