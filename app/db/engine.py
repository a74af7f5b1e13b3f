"""Connection pools, of sessions that are set as `app.db.sessions` says.

Invariant: but for `Database.open`, a connection leaves this module only inside a context manager that gives it back,
and driver exceptions leave it only as `errors.*`. A session stops a statement that runs over its time.

A URL may name several hosts: the pool then holds connections to the one to write to (`app.db.hosts`), and moves when
that is another. All hosts are looked at when the first connection is opened, and when none is open that would have
closed if the server had stopped; else a new connection goes straight to the host that is known.
"""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from sqlalchemy import event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app import metrics
from app.db import failures, hosts, sessions
from app.db.capability import DETECT, IS_UNRELEASED, UNRELEASED_STORE, Capability
from app.db.facts import FACTS, Facts
from app.db.failures import connect, connection_lost, full, translated
from app.db.turns import Turns
from app.errors import DatabaseDamaged, DatabaseUnavailable, InvalidRequest, QueryTimeout, StartupRefused
from app.logs import Logger
from app.quote.terms import Consistency
from app.settings import Settings

log = Logger(__name__)

Connection: TypeAlias = failures.Connection
T = TypeVar("T")
#: A read: it may run a second time, on another connection, so it has no effect but its result.
Work: TypeAlias = Callable[[Connection], Awaitable[T]]
#: The server ends a read that runs over its time by itself; one that says nothing for this much longer hangs.
_SILENCE: Final = 0.5
#: Seconds that opening a connection has at least: a handful of round trips over a network, and a server's fork.
_OPENING: Final = 1.0
#: Seconds until a pool without a connection asks a full server for one again.
_FULL: Final = 0.1
#: The pool itself says first that all of its connections are busy.
_AFTER_POOL: Final = 0.1
#: Renewals of a pool closer together than this are one: a server may stay read-only for longer than a request.
_RENEW_INTERVAL: Final = 1.0


class _Pooled(asyncpg.Connection):
    """A connection that says goodbye and does not wait to hear it.

    A server that has just come to stand still would hold up the answer of whoever gives an overflowing connection back.
    """

    async def close(self, *, timeout: float | None = None) -> None:
        del timeout
        self.terminate()


async def detect(connection: Connection) -> Capability:
    """What the server can do, if it stores every text, and the store on it is none of before the first release.

    Raises:
        StartupRefused: it does not, or it is.
    """
    sessions.require_encoding(connection)
    if await connection.fetchval(IS_UNRELEASED):
        raise StartupRefused(UNRELEASED_STORE)
    return Capability.of(await connection.fetchrow(DETECT) or ())


async def read_facts(connection: Connection, default: Facts) -> Facts:
    """The settings of the store; the default where its schema does not have them yet."""
    try:
        row = await connection.fetchrow(FACTS)
    except asyncpg.UndefinedTableError:
        row = None
    return default if row is None else Facts.of(row)


class Database:
    """The pools of one database.

    Attributes:
        capability: what the server can do, known after `connect()`.
        facts: the settings of the store, as of `connect()` or the last look at it.
        damaged: when the server last reported an error of its own, in `time.monotonic()`.
        refusal: when it refused a write for what no request is at fault for, and why; None since one was committed.
        writable: the servers that took writes when the hosts were last looked at, of several hosts.
    """

    capability: Capability
    facts: Facts
    damaged: float = -math.inf
    refusal: tuple[float, str] | None = None
    writable: tuple[hosts.Writable, ...] = ()

    def __init__(self, url: str, settings: Settings, role: metrics.Role = "primary") -> None:
        self._hosts = hosts.hosts_of(url)
        self._names = [hosts.name_of(host) for host in self._hosts]
        self._host = 0  # the one to write to, as far as is known
        self._server: hosts.Server | None = None  # what was there
        self._doubted = -math.inf
        self._choosing = asyncio.Lock()
        self._failed: tuple[float, Exception] | None = None
        self._settings = settings
        #: The process and the event loop of the connections.
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._closed = False
        self.facts = Facts.first(settings)
        #: When each open connection was opened, and to which host.
        self._opened: WeakKeyDictionary[Connection, tuple[float, int]] = WeakKeyDictionary()
        self._renewed = -math.inf
        #: Longest wait for a pooled connection, its opening included.
        self._patience = max(settings.pool_timeout.total_seconds(), _OPENING)
        # Reads that hang, as behind a lock on an old chunk, must not take the connections of the writes.
        kept = 2 * settings.writer_flushes if role == "primary" else 0
        most = settings.pool_size + settings.pool_overflow
        self._turns = Turns(most, kept) if settings.pool_size else None
        #: Reads that may run at once.
        self.readable = max(most - kept, 1)
        self._own = False  # whether sessions are known to be nobody else's
        #: What the last probe left open, for one that the server has no connection to spare for.
        self._probe: Connection | None = None
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
        opening = partial(self.open, self._patience, kind=_Pooled)
        self.engine: AsyncEngine = create_async_engine("postgresql+asyncpg://", async_creator=opening, **pool)
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

    def _stay(self) -> None:
        """See that this is the process and the event loop of the connections, and that these are not closed.

        Two processes on one socket read each other's answers, and a connection waits in the loop that opened it.

        Raises:
            InvalidRequest: it is another, or they are.
        """
        process, loop = os.getpid(), asyncio.get_running_loop()
        if self._closed:
            raise InvalidRequest("The store was closed; what is opened is used within its `async with`.")
        if self._home is None:
            self._home = (process, loop)
        elif self._home[0] != process:
            raise InvalidRequest("The store was opened in another process; open it in each process, after the fork.")
        elif self._home[1] is not loop:
            raise InvalidRequest("The store was opened in another event loop; open it in each, and close it there.")

    def renew(self) -> None:
        """Let no connection that is open now be used again; what runs on them goes on."""
        self._renewed = time.monotonic()

    def terminate(self, *, others: bool = False) -> None:
        """Break every open connection, or those to other hosts than the one that takes writes now."""
        for connection, (_, host) in list(self._opened.items()):
            if not (others and host == self._host):
                connection.terminate()

    async def open(
        self,
        timeout: float = 10,
        statement_timeout: timedelta | None = None,
        kind: type[Connection] = asyncpg.Connection,
    ) -> Connection:
        """A new connection outside the pool, for whoever closes it; the driver's exceptions come as they are.

        Raises:
            DatabaseUnavailable: of several hosts none takes writes, or which is the newest that does cannot be told.
        """
        began = time.monotonic()
        async with asyncio.timeout(timeout):
            options = self._options(statement_timeout) | {"connection_class": kind}
            place, connection = await self._open(timeout, options)
        # Of a move while it was being opened it is as stale as those that were open.
        self._opened[connection] = (began, place)
        return connection

    async def open_host(self, place: int, timeout: float) -> Connection:
        """A connection to one of the hosts, whatever it is; for looking at it."""
        options = self._options(timedelta(seconds=timeout))
        return await connect(self._hosts[place], timeout=timeout, **options)

    def _options(self, statement_timeout: timedelta | None) -> dict[str, Any]:
        return {
            # Where each operation has a connection of its own, a statement is not prepared for the next.
            "statement_cache_size": 0 if self._settings.pool_size == 0 else 100,
            "server_settings": {"application_name": "opa-quotes"},
            "statement_timeout": statement_timeout or self._settings.statement_timeout,
        }

    async def _open(self, timeout: float, options: dict[str, Any]) -> tuple[int, Connection]:
        if len(self._hosts) == 1:
            return 0, await connect(self._hosts[0], timeout=timeout, **options)
        began = time.monotonic()
        if self._vouched():
            try:
                return await self._open_known(timeout, options)
            except hosts.UNREACHABLE as error:
                if not connection_lost(error):
                    raise  # by the server that is known, as when it has no connection to spare
                self.doubt()
        async with self._choosing:
            # Of those that wait here together one looks, for all.
            if self._failed is not None and self._failed[0] > began:
                raise self._failed[1]
            if not self._vouched():
                return await self._open_newest(timeout, options)
        return await self._open_known(timeout, options)

    async def _open_known(self, timeout: float, options: dict[str, Any]) -> tuple[int, Connection]:
        place, patience = self._host, min(hosts.HOST_TIMEOUT, timeout / 3)
        read_write = SessionAttribute.read_write
        url = self._hosts[place]
        return place, await connect(url, timeout=patience, target_session_attrs=read_write, **options)

    async def _open_newest(self, timeout: float, options: dict[str, Any]) -> tuple[int, Connection]:
        began = time.monotonic()
        try:
            found = await hosts.find_primary(self._hosts, timeout, self._server, **options)
        except Exception as error:
            self._failed = (time.monotonic(), error)
            if isinstance(error, DatabaseUnavailable):
                metrics.DB_ERRORS.labels("connection").inc()
            raise
        self._opened[found.connection] = (began, found.place)  # before another one asks who vouches
        if found.place != self._host:
            # A commit to a server that hangs holds up the writes behind it for as long as it is waited for.
            self._host = found.place
            self.terminate(others=True)
        self._server = found.seen[found.place]
        self.tell_writable(self._names, found.seen)
        return found.place, found.connection

    def _vouched(self) -> bool:
        """Whether the server that was chosen is still the one at its host: a connection to it has not closed."""
        return any(
            host == self._host and opened > self._doubted and not connection.is_closed()
            for connection, (opened, host) in list(self._opened.items())
        )

    def doubt(self) -> None:
        """Let the next new connection look at all hosts: one that does not answer closes no connection."""
        self._doubted = time.monotonic()

    def tell_writable(self, names: Sequence[str], seen: Sequence[hosts.Server | None]) -> None:
        """Note and show which servers take writes."""
        found = hosts.writable(names, seen)
        if len(found) > 1 and found != self.writable:
            log.error("more than one server takes writes", servers=[str(one) for one in found])
        self.writable = found
        metrics.WRITABLE_SERVERS.set(len(found))

    def notice(self, server: hosts.Server, place: int | None = None) -> bool:
        """Move to the server at a host, and tell so, if it has a newer timeline than the one that was written to.

        Without a place it is the server behind the host that is written to.

        An address that moves leads new connections to the new server and leaves the old ones with the old.
        """
        last = self._server
        if last is None or not server.writable or server.control.system != last.control.system:
            return False
        if server.timeline <= last.timeline:
            return False
        self._host, self._server = self._host if place is None else place, server
        log.warning("moving to a newer primary", host=self.host, timeline=server.timeline)
        self.renew()
        self.terminate(others=True)
        return True

    @property
    def host(self) -> str:
        """The host that is written to."""
        return self._names[self._host]

    async def connect(self) -> None:
        """Reach the server and detect its capability level.

        Raises:
            DatabaseUnavailable: it cannot be reached, or by way of a pooler that shares sessions.
            StartupRefused: the store is one of before the first release, or its encoding is not UTF8.
        """
        async with self.acquire() as connection:
            try:
                await self.timed(connection, self._learn, self.deadline())
            except QueryTimeout as error:
                raise DatabaseUnavailable("The database does not answer.") from error

    async def _learn(self, connection: Connection) -> None:
        await self.require_own(connection)
        self.capability = await detect(connection)
        self.facts = await read_facts(connection, self.facts)
        if self._server is None:
            self._server = await self.identify(connection)

    async def require_own(self, connection: Connection) -> None:
        """Refuse a pooler that gives a connection another session after each transaction.

        Raises:
            DatabaseMisconfigured: there is one.
        """
        if not self._own:
            await sessions.require_own(connection, self.open)
            self._own = True

    async def identify(self, connection: Connection) -> hosts.Server | None:
        """What the server says of itself; None if it is one that does not."""
        with suppress(asyncpg.PostgresError):
            return await hosts.look(connection)
        return None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translated():
                yield
        except DatabaseDamaged:
            self.damaged = time.monotonic()
            raise

    @asynccontextmanager
    async def acquire(self, within: float = math.inf, *, read: bool = False) -> AsyncIterator[Connection]:
        """A pooled connection, opened if none is there; it is waited for `pool_timeout`, or `within` so many seconds.

        Reads leave some for writes.

        Raises:
            DatabaseUnavailable: no connection in that time, or it broke.
            QueryTimeout: a statement ran over its time.
        """
        self._stay()
        with self._translated():
            asked = time.perf_counter()
            async with AsyncExitStack() as stack:
                pooled = await self._check_out(stack, within, read)
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
                    # A cancelled or failed exchange may leave the protocol in the middle of a message; and where it was
                    # cancelled for taking too long, the server may not answer a request to cancel either.
                    if isinstance(error, asyncio.CancelledError):
                        driver.terminate()
                    if read_only or connection_lost(error) or driver.is_closed() or driver.is_in_transaction():
                        await pooled.invalidate()
                    raise
                finally:
                    self._in_use.dec()

    async def _check_out(self, stack: AsyncExitStack, within: float, read: bool) -> AsyncConnection:
        """Whoever the server refuses a connection waits for one of those that are open."""
        until = time.monotonic() + min(self._settings.pool_timeout.total_seconds(), within)
        async with asyncio.timeout(min(self._patience + _AFTER_POOL, within)):
            while True:
                async with AsyncExitStack() as held:
                    if self._turns is not None:
                        await self._turns.take(until - time.monotonic(), read=read)
                        held.callback(self._turns.give, read=read)
                    try:
                        pooled = await held.enter_async_context(self.engine.connect())
                    except Exception as error:
                        if self._turns is None or not full(error) or until - time.monotonic() < _FULL:
                            raise
                        alone = not self._turns.lessen()
                    else:
                        stack.push_async_exit(held.pop_all())
                        return pooled
                if alone:
                    await asyncio.sleep(_FULL)  # others have them all

    async def read(self, work: Work[T], consistency: Consistency = "eventual") -> T:
        """What `work` reads; without replicas, `consistency` makes no difference.

        Raises:
            DatabaseUnavailable: no connection, or it broke twice.
            QueryTimeout: a statement ran over its time.
        """
        del consistency
        return await self._read_primary(work, self.deadline())

    def deadline(self) -> float:
        """When a read that begins now has to be answered, whatever it waits for, in `time.monotonic()`."""
        return time.monotonic() + self._patience + self._settings.statement_timeout.total_seconds() + _SILENCE

    async def _read_primary(self, work: Work[T], deadline: float) -> T:
        metrics.READS.labels("primary").inc()
        began = False
        try:
            async with self.acquire(deadline - time.monotonic(), read=True) as connection:
                began = True
                return await self.timed(connection, work, deadline)
        except DatabaseUnavailable as error:
            # A pooled connection may have died with its server since it was last used; the next one is new.
            if not began or error.__cause__ is None or not connection_lost(error.__cause__):
                raise
        async with self.acquire(deadline - time.monotonic(), read=True) as connection:
            return await self.timed(connection, work, deadline)

    async def timed(self, connection: Connection, work: Work[T], deadline: float) -> T:
        """What `work` reads within `statement_timeout`, in all of its statements, and before the deadline of the read.

        A server may also say nothing.

        Raises:
            QueryTimeout: it took longer.
        """
        try:
            silent = time.monotonic() + self._settings.statement_timeout.total_seconds() + _SILENCE
            async with asyncio.timeout(min(silent, deadline) - time.monotonic()):
                return await work(connection)
        except TimeoutError:
            # To cancel would be to ask a server that may not answer.
            connection.terminate()
            raise QueryTimeout(
                "The database did not answer in time; ask for a shorter range or fewer symbols."
            ) from None

    @asynccontextmanager
    async def dedicated(
        self, timeout: float = 5, statement_timeout: timedelta | None = None, within: float | None = None
    ) -> AsyncIterator[Connection]:
        """A connection outside the pool, for probes and long maintenance, `within` so many seconds if there is a limit.

        These count from here, the opening included.

        Raises:
            DatabaseUnavailable: no connection within `timeout` seconds, or it broke.
            QueryTimeout: a statement ran over its time, or all of it did.
        """
        began = time.monotonic()
        with self._translated():
            driver = await self.open(timeout if within is None else min(timeout, within), statement_timeout)
            try:
                left = None if within is None else max(within - (time.monotonic() - began), 0)
                async with asyncio.timeout(left) as limit:
                    yield driver
            except TimeoutError:
                if limit.expired():
                    driver.terminate()
                    raise QueryTimeout("The database did not answer in time.") from None
                raise
            finally:
                await driver.close(timeout=2)

    @asynccontextmanager
    async def probed(self, timeout: float) -> AsyncIterator[Connection]:
        """A connection for a look at the server, each statement for `timeout` seconds.

        It is a new one, so that it leads where new ones lead. Where the server has none to spare it is that of the look
        before, which a pool keeps, or else one of the pool's: a full server is as well as they are.

        Raises:
            DatabaseUnavailable: no connection within `timeout` seconds, or it broke.
            QueryTimeout: a statement ran over its time.
        """
        with self._translated():
            try:
                driver = await self.open(timeout, timedelta(seconds=timeout))
            except asyncpg.TooManyConnectionsError:
                if self._turns is None:
                    raise
                kept, self._probe = self._probe, None
                pooled = any(isinstance(one, _Pooled) and not one.is_closed() for one in list(self._opened))
                if kept is None or kept.is_closed() or not pooled:
                    async with self.acquire(timeout) as driver:
                        yield driver
                        if driver.is_in_transaction():
                            driver.terminate()
                    return
                driver = kept
            try:
                yield driver
            except BaseException:
                driver.terminate()
                raise
            closed: Connection | None = driver
            if self._turns is not None and not driver.is_in_transaction():
                closed, self._probe = self._probe, driver
            if closed is not None:
                await closed.close(timeout=2)

    async def close(self) -> None:
        """Close every pooled connection; not those of another process, which go on being used there."""
        if self._home is None or self._home == (os.getpid(), asyncio.get_running_loop()):
            self._closed = True
            if self._turns is not None:
                self._turns.close()
            if self._probe is not None:
                self._probe.terminate()
            await self.engine.dispose()
