"""Connection pools, with the session settings that every statement of the service relies on.

Invariant: a connection leaves this module only inside a context manager that gives it back, and driver
exceptions leave it only as `errors.*`. Sessions run in UTC, plan with the actual parameters (a generic plan
over a hypertable would lock every chunk) and stop a statement that runs over its time.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, TypeAlias, cast

import asyncpg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app.db.capability import DETECT, Capability
from app.errors import DatabaseUnavailable, QueryTimeout, QuotesError
from app.settings import Settings

Connection: TypeAlias = "asyncpg.Connection[Any]"
#: SQLSTATE classes that say "not now" rather than "never": connection, resources, operator intervention, system.
_UNAVAILABLE = ("08", "53", "57", "58", "F0", "XX")
_CANNOT_SERVE = {
    "25006": "The database is read-only.",
    "28P01": "The database refused the credentials.",
    "28000": "The database refused the credentials.",
    "3D000": "The database does not exist.",
    "42P01": "The schema is missing: run `opa-quotes migrate`.",
    "3F000": "The schema is missing: run `opa-quotes migrate`.",
    "42501": "The database role lacks a privilege that the service needs.",
}


def translate(error: BaseException) -> QuotesError | None:
    """The error of this project that a driver's exception stands for; None for what is not the database's."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return translate(error.orig.__cause__ or error.orig)
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        if state == "57014":
            return QueryTimeout("The statement ran over its time; ask for a shorter range or fewer symbols.")
        if state in _CANNOT_SERVE:
            return DatabaseUnavailable(_CANNOT_SERVE[state])
        if state.startswith(_UNAVAILABLE):
            return DatabaseUnavailable("The database cannot serve the request now.")
        return None
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("All database connections are busy.")
    if isinstance(error, (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError)):
        return DatabaseUnavailable("The database cannot be reached.")
    return None


@contextmanager
def translated() -> Iterator[None]:
    """Raise a driver's exceptions as errors of this project, and let all others through."""
    try:
        yield
    except QuotesError:
        raise
    except Exception as error:
        ours = translate(error)
        if ours is None:
            raise
        raise ours from error


def connection_lost(error: BaseException) -> bool:
    """Whether the exception says that the connection, not the statement, failed."""
    return isinstance(error, (OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError)) or (
        isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(("57P",))
    )


def _refuse_closed(connection: Any, *_: object) -> None:
    """Renew the pool when a server that went away has closed a pooled connection: known without a round trip."""
    if connection.driver_connection.is_closed():
        raise InvalidatePoolError


class Database:
    """The pools of one database.

    Attributes:
        capability: what the server can do, known after `connect()`.
    """

    capability: Capability

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings
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
        self.engine: AsyncEngine = create_async_engine("postgresql+asyncpg://", async_creator=self._open, **pool)
        event.listen(self.engine.sync_engine, "checkout", _refuse_closed)

    async def _open(self, timeout: float = 10, statement_timeout: timedelta | None = None) -> Connection:
        milliseconds = int((statement_timeout or self._settings.statement_timeout).total_seconds() * 1000)
        return await asyncpg.connect(
            self._url,
            timeout=timeout,
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

    async def connect(self) -> None:
        """Reach the server and detect its capability level.

        Raises:
            DatabaseUnavailable: it cannot be reached.
        """
        async with self.acquire() as connection:
            self.capability = Capability.of(await connection.fetchrow(DETECT) or ())

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """A pooled connection.

        Raises:
            DatabaseUnavailable: no connection, or it broke.
            QueryTimeout: a statement ran over its time.
        """
        with translated():
            async with self.engine.connect() as pooled:
                raw = await pooled.get_raw_connection()
                driver = cast("Connection", raw.driver_connection)
                try:
                    yield driver
                except BaseException:
                    # A cancelled or failed exchange may leave the protocol in the middle of a message.
                    if driver.is_closed() or driver.is_in_transaction():
                        await pooled.invalidate()
                    raise

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
            driver = await self._open(timeout, statement_timeout)
            try:
                yield driver
            finally:
                await driver.close(timeout=2)

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.engine.dispose()
