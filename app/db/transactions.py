"""Transactions that change the store, each within its time, and what is known of its end.

Invariant: a COMMIT that was sent is never cancelled. PostgreSQL takes a cancel, while a commit waits for a synchronous
standby, for leave to say that it is done; so the connection is dropped instead and the outcome called unknown. The
server goes on with what was dropped: how many such commits may be left behind is bounded.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Final, Literal, TypeVar

import asyncpg

from app import metrics
from app.db.engine import Connection, Database
from app.db.failures import connection_lost, full
from app.errors import (
    CommitsWaiting,
    DatabaseMisconfigured,
    DatabaseRefused,
    DatabaseUnavailable,
    OutcomeUnknown,
    QueryTimeout,
    QuotesError,
    QuotesLocked,
    WriteTimeout,
)
from app.logs import Logger

T = TypeVar("T")

log = Logger(__name__)

_ATTEMPTS: Final = 3
#: The server ends a statement that runs over its time by itself; one that says nothing for this much longer hangs.
_GRACE: Final = 0.5
#: The part of its time that a transaction may wait for a lock.
_LOCKED: Final = 0.8
#: A file of a temporary relation is named `t`, the number of its session, `_` and its own.
_TEMPORARY: Final = re.compile(r"/t\d+_\d+")
#: Longest wait for the server to roll back, or to say which of its processes are there.
_SHORT: Final = 2.0
#: Commits that may be left behind; each is a server process that nobody can use until its standby is back.
_LEFT: Final = 4
_LOOK_EVERY: Final = 1.0
#: A commit that takes longer waits for a standby, or for a server that does not answer.
_USUAL: Final = 1.0
#: TimescaleDB refuses a transaction that decompresses more than 100,000 rows, which a hundred late quotes of different
#: hours can do. Time bounds a transaction here. Other servers take it for a setting of nobody.
_UNBOUNDED: Final = "timescaledb.max_tuples_decompressed_per_dml_transaction = 0"
#: What a transaction falls victim to that may be done again: a deadlock, or another one that was committed first.
_IN_THE_WAY: Final = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
_THERE: Final = "SELECT pid FROM pg_stat_activity WHERE pid = ANY($1::int[])"


class _Again(Exception):
    """Nothing was done, and it may be tried again; `told` is what to say if it may not."""

    def __init__(self, told: str) -> None:
        super().__init__(told)
        self.told = told


class Transactions:
    """Runs transactions on the pool of a `Database`; a COMMIT may take `commit_timeout`."""

    def __init__(self, database: Database, commit_timeout: timedelta) -> None:
        self._database = database
        self._commit_timeout = commit_timeout.total_seconds()
        self._left: set[int] = set()  # server processes whose commit was left behind
        self._committing: dict[asyncio.Future[str], float] = {}  # since when
        self._looked = 0.0

    async def run(
        self,
        work: Callable[[Connection], Awaitable[T]],
        *,
        within: float,
        lock_timeout: float,
        end: Literal["COMMIT", "ROLLBACK"] = "COMMIT",
    ) -> T:
        """Do `work` in a transaction that has a savepoint `fresh`; again if it fell victim to a deadlock.

        It has `within` seconds until its COMMIT begins, and waits `lock_timeout` seconds for a lock.

        Raises:
            WriteTimeout: it took longer; nothing was done.
            QuotesLocked: somebody held a lock for longer; nothing was done.
            CommitsWaiting: too many commits were left behind, or one that waits holds a lock; nothing was done.
            DatabaseUnavailable: nothing was done; as `DatabaseRefused` or `DatabaseDamaged` it would not be later.
            OutcomeUnknown: the COMMIT took longer than `commit_timeout`, or the connection broke meanwhile.
        """
        try:
            result = await self._run(work, time.monotonic() + within, lock_timeout, end)
        except DatabaseUnavailable as error:
            if _of_the_store(error):
                self._database.refusal = (time.monotonic(), error.detail)
            raise
        if end == "COMMIT":
            self._database.refusal = None
        return result

    async def _run(
        self, work: Callable[[Connection], Awaitable[T]], deadline: float, lock_timeout: float, end: str
    ) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            if self._left:
                await self._bound()
            try:
                return await self._attempt(work, deadline, lock_timeout, end)
            except _Again as again:
                if attempt == _ATTEMPTS:
                    raise DatabaseUnavailable(again.told) from again.__cause__
            except QuotesLocked as error:
                if not self._commit_waits():
                    raise
                raise CommitsWaiting(
                    "A commit waits for a standby, or for a server that does not answer, and may hold the lock on these"
                    " quotes. Nothing of this request was stored."
                ) from error
            except QueryTimeout as error:
                raise WriteTimeout from error
            except DatabaseRefused as error:
                if isinstance(cause := error.__cause__, asyncpg.PostgresError):
                    # What it says may hold values of the client's.
                    state, constraint = cause.sqlstate, cause.constraint_name
                    log.error("a write was refused", sqlstate=state, constraint=constraint)  # noqa: TRY400
                raise
        raise AssertionError("unreachable")

    async def _attempt(
        self, work: Callable[[Connection], Awaitable[T]], deadline: float, lock_timeout: float, end: str
    ) -> T:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            async with asyncio.timeout(left + _GRACE) as limit, self._database.acquire() as connection:
                left = max(deadline - time.monotonic(), 0.001)
                # A lock that is waited for until the time is up would be told as work that takes long.
                lock_timeout = min(lock_timeout, _LOCKED * left)
                try:
                    await self._begin(connection, left, lock_timeout)
                    result = await work(connection)
                except asyncio.CancelledError:
                    # The server may not answer, so nothing is asked of it; it rolls back when it finds out.
                    connection.terminate()
                    raise
                except BaseException as error:
                    if _is_temporary(error):
                        connection.terminate()  # and with it the table
                        raise _Again("A temporary table was left in pieces by what cancelled its last use.") from error
                    await self._roll_back(connection)
                    if isinstance(error, _IN_THE_WAY):
                        raise _Again("Other writes were in the way each time.") from error
                    raise
                if end == "COMMIT":
                    limit.reschedule(None)
                    await self._commit(connection)
                else:
                    await connection.execute(end)
                return result
        except TimeoutError as error:
            raise DatabaseUnavailable("The database does not answer.") from error

    async def _begin(self, connection: Connection, seconds: float, lock_timeout: float) -> None:
        try:
            # One message: four round trips less a flush.
            await connection.execute(
                f"BEGIN; SET LOCAL statement_timeout = {1000 * seconds:.0f};"
                f" SET LOCAL lock_timeout = {1000 * lock_timeout:.0f}; SET LOCAL {_UNBOUNDED}; SAVEPOINT fresh"
            )
        except Exception as error:
            if not connection_lost(error):
                raise
            # It was closed while nobody used it, as by a restart; the next one is new.
            connection.terminate()
            raise _Again("The database ends each connection.") from error

    async def _roll_back(self, connection: Connection) -> None:
        if connection.is_closed():
            return
        try:
            async with asyncio.timeout(_SHORT):
                await connection.execute("ROLLBACK")
        except TimeoutError:
            connection.terminate()

    async def _commit(self, connection: Connection) -> None:
        process = connection.get_server_pid()
        commit = asyncio.ensure_future(connection.execute("COMMIT"))
        self._committing[commit] = time.monotonic()
        # Whoever cancels learns the outcome instead, known or not.
        with suppress(asyncio.CancelledError):
            await asyncio.wait({commit}, timeout=self._commit_timeout)
        del self._committing[commit]
        if not commit.done():
            self._left.add(process)
            commit.add_done_callback(_forget)
            connection.terminate()
            metrics.COMMITS_LEFT.inc()
            log.warning("a commit was left behind", server_process=process)
            raise OutcomeUnknown("The database did not confirm the commit in time; sending the same again is harmless.")
        try:
            commit.result()
        except Exception as error:
            if connection_lost(error):
                raise OutcomeUnknown(
                    "The connection broke while committing; sending the same again is harmless."
                ) from error
            if isinstance(error, _IN_THE_WAY):
                raise _Again("Other writes were in the way each time.") from error
            raise

    def _commit_waits(self) -> bool:
        """Whether a commit of this process takes longer than any does by itself."""
        oldest = min(self._committing.values(), default=math.inf)
        return bool(self._left) or time.monotonic() - oldest > _USUAL

    async def _bound(self) -> None:
        """Refuse to begin while too many of the commits that were left behind are still on the server."""
        now = time.monotonic()
        if now - self._looked > _LOOK_EVERY:
            self._looked = now
            try:
                async with asyncio.timeout(_SHORT), self._database.dedicated(_SHORT) as connection:
                    self._left = {row[0] for row in await connection.fetch(_THERE, list(self._left))}
            except (QuotesError, TimeoutError):
                pass  # what cannot be seen is still there
        if len(self._left) >= _LEFT:
            raise CommitsWaiting(
                f"{len(self._left)} commits wait for a standby, or for a server that does not answer."
                " Nothing of this request was stored."
            )


def _of_the_store(error: DatabaseUnavailable) -> bool:
    """Whether the server refused a write for a reason that the next one meets too: a full volume, a privilege."""
    cause = error.__cause__
    return (
        isinstance(cause, asyncpg.PostgresError)
        and not connection_lost(cause)
        and not full(cause)
        and (type(error) is DatabaseUnavailable or isinstance(error, DatabaseMisconfigured))
    )


def _forget(commit: "asyncio.Future[str]") -> None:
    """Look at how a commit ended that nobody waits for, which would be logged otherwise."""
    if not commit.cancelled():
        commit.exception()


def _is_temporary(error: BaseException) -> bool:
    """Whether the server reports damage of its own in a session's temporary table, which goes with the session.

    Seen on 18.6: a statement cancelled from outside while it fills the stage leaves less of a file than is counted on.
    """
    damaged = isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith("XX")
    return damaged and _TEMPORARY.search(str(error)) is not None
