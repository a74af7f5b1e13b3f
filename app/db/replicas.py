"""Reads from standbys that have replayed what the primary wrote, up to a stated age.

Invariant: an answer from a replica holds everything that was acknowledged `max_replica_lag` before the read; what
cannot be shown to hold it comes from the primary. The age is taken from positions in the log on one clock, this
process's own: at a known moment the primary had written up to here, and the replica has replayed as far. So neither an
idle primary nor clocks that differ look like lag, and a standby that has lost its primary grows old by itself.

A read that fails on a replica for any reason of the server's runs again on the next one, and at last on the primary;
so does one that hears nothing while the replica answers nobody. Overload is no such reason: the replica's load would
then slow the ingest that it was to be kept away from.
"""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import asyncpg

from app import metrics
from app.db.engine import Connection, Database, T, Work
from app.db.failures import PoolBusy, connection_lost
from app.db.hosts import UNREACHABLE, Control, Server, choose, control, hosts_of, look, name_of
from app.errors import DatabaseMisconfigured, DatabaseUnavailable, QueryTimeout
from app.logs import Logger
from app.quote.terms import Consistency
from app.settings import Settings

log = Logger(__name__)

_INTERVAL: Final = 1.0
_TIMEOUT: Final = 3.0
#: Seconds after which a read asks whether its replica answers at all, and for the answer. It is also the time of a look
#: at a replica, so that one that stands still does not make what is known of the others old.
_PATIENCE: Final = 1.0
#: Looks in vain after which what still runs on a server is given up: its packets may be lost without a word.
_MISSES: Final = 2
_NEVER: Final = -math.inf


def database_of(url: str, settings: Settings) -> Database:
    """The database at `url`, with the replicas of the settings, if any."""
    read_url = settings.read_database_url
    if read_url is None and len(hosts_of(url)) == 1:
        return Database(url, settings)
    return ReplicatedDatabase(url, None if read_url is None else read_url.get_secret_value(), settings)


class _Probe:
    """A look at a server over one connection outside of the pool, which is kept."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], timeout: float = _TIMEOUT) -> None:
        self._connect = connect
        self._timeout = timeout
        self._connection: Connection | None = None
        self._control: Control | None = None

    async def look(self) -> Server | None:
        """What the server says now; None if it does not answer in time."""
        try:
            if self._connection is None:
                self._connection, self._control = await self._connect(), None
            async with asyncio.timeout(self._timeout):
                if self._control is None:
                    self._control = await control(self._connection)
                return await look(self._connection, self._control)
        except (*UNREACHABLE, DatabaseUnavailable):
            self.close()
            return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


@dataclass(slots=True)
class _Replica:
    """One standby: `caught_up` is a moment of which it is known to hold everything acknowledged before."""

    name: str
    host: str
    database: Database
    probe: _Probe
    caught_up: float = _NEVER
    seen: Server | None = None
    diverged: datetime | None = None
    misses: int = 0
    in_rotation: bool = False
    asked: asyncio.Task[bool] | None = None


@dataclass(slots=True)
class _Log:
    """How far the primary had written, at moments of late, and who the primary was."""

    primary: tuple[int | None, datetime] | None = None
    samples: "deque[tuple[float, int]]" = field(default_factory=deque)

    def held(self, position: int) -> float:
        """The latest of the moments at which no more had been written than up to `position`."""
        return next((moment for moment, written in reversed(self.samples) if written <= position), _NEVER)


class _Elsewhere(Exception):
    """A read that another server may answer."""


async def _greet(database: Database) -> bool:
    """Whether a server answers a new connection in time, with whatever words."""
    try:
        async with asyncio.timeout(_PATIENCE):
            connection = await database.open_host(0, _PATIENCE)
            try:
                await connection.fetchval("SELECT 1")
            finally:
                connection.terminate()
    except (asyncpg.PostgresError, DatabaseMisconfigured):
        return True
    except UNREACHABLE:
        return False
    return True


class ReplicatedDatabase(Database):
    """A database whose reads may come from its replicas, and that moves when its primary does."""

    def __init__(self, url: str, read_url: str | None, settings: Settings) -> None:
        super().__init__(url, settings)
        self._max_lag = settings.max_replica_lag.total_seconds()
        self._statement_time = settings.statement_timeout.total_seconds()
        self._primary = _Probe(partial(self.open, _TIMEOUT, timedelta(seconds=_TIMEOUT)))
        self._writers = [_Probe(partial(self.open_host, place, _TIMEOUT)) for place in range(len(self._hosts))]
        self._replicas: list[_Replica] = []
        for index, host in enumerate([] if read_url is None else hosts_of(read_url)):
            pool = Database(host, settings, "replica")
            probe = _Probe(partial(pool.open_host, 0, _PATIENCE), _PATIENCE)
            self._replicas.append(_Replica(str(index), name_of(host), pool, probe))
            self.readable += pool.readable
        self._turn = itertools.count()
        self._log = _Log()
        self._watchers: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """As of any database, and look at the replicas once; they need not be there."""
        await super().connect()
        await self._look()
        # Apart, since a host that does not answer holds up whoever waits for it.
        self._watchers = [
            asyncio.create_task(self._watch(self._look), name="replicas"),
            asyncio.create_task(self._watch(self._survey), name="hosts"),
        ]

    async def close(self) -> None:
        """Close every pooled connection."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for probe in (self._primary, *self._writers):
            probe.close()
        for replica in self._replicas:
            replica.probe.close()
            if replica.asked is not None:
                replica.asked.cancel()
            await replica.database.close()
        await super().close()

    async def read(self, work: Work[T], consistency: Consistency = "eventual") -> T:
        """What `work` reads: if `strong` on the primary, else on a replica that is recent enough, if there is one.

        Raises:
            DatabaseUnavailable: no server can be reached, or the replica's pool is busy.
            QueryTimeout: a statement ran over its time.
        """
        deadline = self.deadline()
        for replica in self._recent() if consistency == "eventual" else []:
            try:
                return await self._read_replica(replica, work, deadline)
            except _Elsewhere:
                metrics.READ_RETRIES.inc()
        return await self._read_primary(work, deadline)

    async def _read_replica(self, replica: _Replica, work: Work[T], deadline: float) -> T:
        """What `work` reads on a replica.

        Raises:
            _Elsewhere: not here, but perhaps on another server.
        """
        metrics.READS.labels("replica").inc()
        began = time.monotonic()
        try:
            async with self._while_answering(replica), replica.database.acquire(deadline - began) as connection:
                began = time.monotonic()
                return await replica.database.timed(connection, work, deadline)
        except QueryTimeout:
            # A statement that was cancelled before its time was in somebody's way.
            if time.monotonic() - began >= self._statement_time:
                raise
        except DatabaseUnavailable as error:
            if isinstance(error.__cause__, PoolBusy):
                raise
            if isinstance(cause := error.__cause__, asyncpg.PostgresError) and not connection_lost(cause):
                # A conflict with what it replays, or a migration that it has not replayed.
                log.info("a read failed on a replica", replica=replica.name, sqlstate=cause.sqlstate)
            else:
                replica.caught_up = _NEVER  # until the next look
        raise _Elsewhere

    @asynccontextmanager
    async def _while_answering(self, replica: _Replica) -> AsyncIterator[None]:
        """Wait for a replica as long as it answers others, and else no longer than `_PATIENCE` and as long again.

        Raises:
            DatabaseUnavailable: it stands still.
        """
        asking: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(None)

        async def ask() -> None:
            if not await self._answers(replica):
                limit.reschedule(loop.time())

        # Most reads are over before a task is worth its cost.
        due = loop.call_later(_PATIENCE, lambda: asking.append(asyncio.create_task(ask())))
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            log.warning("a replica stands still", replica=replica.name)
            raise DatabaseUnavailable("The replica does not answer.") from None
        finally:
            due.cancel()
            for task in asking:
                task.cancel()

    async def _answers(self, replica: _Replica) -> bool:
        """Whether a replica answers now; of the reads that want to know, one asks for all."""
        if replica.asked is None or replica.asked.done():
            replica.asked = asyncio.create_task(_greet(replica.database))
        return await asyncio.shield(replica.asked)

    def _recent(self) -> list[_Replica]:
        """The replicas that are recent enough, each in turn the first of them."""
        oldest = time.monotonic() - self._max_lag
        recent = [replica for replica in self._replicas if replica.caught_up >= oldest]
        first = next(self._turn) % len(recent) if recent else 0
        return recent[first:] + recent[:first]

    def notice(self, server: Server, place: int | None = None) -> bool:
        """As of any database; and look anew at each host, as an address may lead elsewhere."""
        moved = super().notice(server, place)
        if moved:
            for probe in (self._primary, *self._writers):
                probe.close()
            # What a replica was compared with is of the past, and the old primary may be one of them.
            self._log = _Log()
            for replica in self._replicas:
                replica.caught_up = _NEVER
        return moved

    async def _watch(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception:
                log.exception("looking at the servers failed")
            await asyncio.sleep(_INTERVAL)

    async def _survey(self) -> None:
        """Find out which servers take writes, and move to a newer primary than the one that is written to."""
        seen = await asyncio.gather(*(probe.look() for probe in self._writers))
        names = [*self._names, *(replica.host for replica in self._replicas)]
        self.tell_writable(names, [*seen, *(replica.seen for replica in self._replicas)])
        with suppress(DatabaseUnavailable):  # nothing to move to
            place = choose(self._names, seen, self._server)
            if (server := seen[place]) is not None:
                self.notice(server, place)

    async def _look(self) -> None:
        """Find out how far the primary has written and each replica has replayed."""
        await self._sample()
        seen = await asyncio.gather(*(replica.probe.look() for replica in self._replicas))
        primary = await self._sample()
        for replica, now in zip(self._replicas, seen, strict=True):
            self._judge(replica, now, primary)
            self._tell(replica)

    async def _sample(self) -> Server | None:
        """Note how far the primary has written; forget what was noted of another primary."""
        asked = time.monotonic()
        seen = await self._primary.look()
        if seen is None:
            self.doubt()
        if seen is None or seen.standby or self._is_past(seen):
            # Of a primary that has become a standby the next look finds the successor, if the URL names it.
            self._primary.close()
            return None
        if seen.identity != self._log.primary:
            if self._log.primary is not None:
                log.warning("the primary has changed or restarted")
                self.terminate(others=True)
                for replica in self._replicas:
                    replica.caught_up = _NEVER
            self._log = _Log(seen.identity)
        samples = self._log.samples
        samples.append((asked, seen.position))
        while samples[0][0] < asked - self._max_lag:
            samples.popleft()
        return seen

    def _is_past(self, seen: Server) -> bool:
        """Whether a look was under way when the primary changed."""
        return self._server is not None and seen.timeline < self._server.timeline

    def _judge(self, replica: _Replica, now: Server | None, primary: Server | None) -> None:
        before, replica.seen = replica.seen, now
        if now is None:
            replica.caught_up = _NEVER
            replica.misses += 1
            if replica.misses == _MISSES:
                replica.database.terminate()
            return
        replica.misses = 0
        if before is not None and (before.standby, before.started) != (now.standby, now.started):
            replica.database.renew()
            replica.caught_up = _NEVER
        if not now.standby:
            # A promoted standby. If it is not the primary of the writes, there are two.
            is_primary = now.identity == self._log.primary
            replica.caught_up = self._log.samples[-1][0] if is_primary and self._log.samples else _NEVER
            return
        if primary is not None and now.control.system != primary.control.system:
            # Another database.
            replica.diverged = now.started
        if primary is not None and now.position > primary.position:
            # Looked at later, the primary has written less: the standby follows another history, and stays out until
            # it is rebuilt, even when this primary's log has grown past it.
            replica.diverged = now.started
        if replica.diverged == now.started:
            replica.caught_up = _NEVER
            return
        replica.caught_up = max(replica.caught_up, self._log.held(now.position))

    def _tell(self, replica: _Replica) -> None:
        lag = time.monotonic() - replica.caught_up
        metrics.REPLICA_LAG.labels(replica.name).set(lag)
        in_rotation = lag <= self._max_lag
        if in_rotation != replica.in_rotation:
            replica.in_rotation = in_rotation
            change = "replica in rotation" if in_rotation else "replica out of rotation"
            log.warning(change, replica=replica.name, lag=round(lag, 1) if math.isfinite(lag) else None)
