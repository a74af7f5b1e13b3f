"""The hosts that a URL names, and which of them to write to.

Invariant: of several servers that take writes only the one on the newest timeline is chosen, and none where timelines
do not tell. A promotion begins a timeline, so that a primary on an older one is of before it: the standbys do not
follow it, and what is written there is lost. A server is known by its system identifier and by when it started, to the
microsecond, whatever name it is reached by.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import asyncpg

from app.db.failures import Connection, connect
from app.errors import DatabaseMisconfigured, DatabaseUnavailable
from app.settings import url_fault

#: What is raised of a server that cannot be reached, or does not let us in.
UNREACHABLE: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    DatabaseMisconfigured,
)
#: Longest wait for one of several hosts; one that swallows packets must not use up the time of the others.
HOST_TIMEOUT: Final = 3.0

# Functions that any role may call; those that name the sender or what is received need pg_monitor.
_LOOK: Final = """
SELECT pg_postmaster_start_time(), pg_is_in_recovery(), NOT current_setting('transaction_read_only')::boolean,
       CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint END,
       ((CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') ELSE pg_current_wal_lsn() END)
        - '0/0'::pg_lsn)::bigint
"""
# Any role may call these too, but a provider may have taken that away.
_CONTROL: Final = """
SELECT (SELECT system_identifier FROM pg_control_system()),
       greatest((SELECT timeline_id FROM pg_control_checkpoint()),
                (SELECT min_recovery_end_timeline FROM pg_control_recovery()))
"""


@dataclass(frozen=True, slots=True)
class Control:
    """What the control file says: whose cluster it is, and a timeline that a standby has reached for certain."""

    system: int | None = None
    reached: int = 0


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself.

    `timeline` is that of a server that is no standby; `position` is how far it has written its log, or replayed it.
    """

    started: datetime
    standby: bool
    writable: bool
    timeline: int
    position: int
    control: Control = field(default_factory=Control)

    @property
    def identity(self) -> tuple[int | None, datetime]:
        """Equal for one run of one server."""
        return self.control.system, self.started


async def control(connection: Connection) -> Control:
    """What does not change under a connection; empty where the role may not read it."""
    with suppress(asyncpg.InsufficientPrivilegeError):
        (row,) = await connection.fetch(_CONTROL)
        return Control(row[0], row[1])
    return Control()


async def look(connection: Connection, known: Control | None = None) -> Server:
    """Ask a server what it is; the driver's exceptions come as they are."""
    known = known or await control(connection)
    (row,) = await connection.fetch(_LOOK)
    return Server(row[0], row[1], row[2], row[3], row[4], known)


def hosts_of(url: str) -> list[str]:
    """A URL for each host that the URL names, in its order.

    Raises:
        DatabaseMisconfigured: it is none that could lead to a database.
    """
    if fault := url_fault(url):
        raise DatabaseMisconfigured(f"The database URL {fault}.")
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    auth, at, listed = parts.netloc.rpartition("@")
    hosts = (listed or query.get("host", "")).split(",")
    ports = query.get("port", "").split(",")
    if len(hosts) == 1:
        return [url]
    if len(ports) not in {1, len(hosts)}:
        raise DatabaseMisconfigured("The database URL has one port, or as many as hosts.")
    urls = []
    for host, port in zip(hosts, ports * (len(hosts) // len(ports)), strict=True):
        own = query | ({"port": port} if port else {}) | ({} if listed else {"host": host})
        netloc = f"{auth}{at}{host}" if listed else parts.netloc
        urls.append(urlunsplit(parts._replace(netloc=netloc, query=urlencode(own, quote_via=quote))))
    return urls


def name_of(url: str) -> str:
    """Host and port of a URL of one host, to be shown; never who logs in."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    host = parts.netloc.rpartition("@")[2] or query.get("host", "localhost")
    return f"{host}:{query['port']}" if "port" in query else host


@dataclass(frozen=True, slots=True)
class Writable:
    """A server that takes writes, under the first of its names."""

    name: str
    timeline: int

    def __str__(self) -> str:
        return f"{self.name} (timeline {self.timeline})"


def writable(names: Sequence[str], seen: Sequence[Server | None]) -> tuple[Writable, ...]:
    """The servers that take writes, each once."""
    found: dict[tuple[int | None, datetime], Writable] = {}
    for name, server in zip(names, seen, strict=True):
        if server is not None and server.writable:
            found.setdefault(server.identity, Writable(name, server.timeline))
    return tuple(found.values())


def choose(names: Sequence[str], seen: Sequence[Server | None], last: Server | None = None) -> int:
    """The place of the server to write to; `last` is the one that this process wrote to before.

    Raises:
        DatabaseUnavailable: no server takes writes, or which of them is the newest cannot be told.
    """
    found: dict[tuple[int | None, datetime], tuple[str, int, Server]] = {}
    for place, (name, server) in enumerate(zip(names, seen, strict=True)):
        if server is not None and server.writable:
            found.setdefault(server.identity, (name, place, server))
    if not found:
        raise DatabaseUnavailable("None of the database hosts that can be reached takes writes.")
    ours = _of_one_database(list(found.values()), last)
    newest = max(server.timeline for _, _, server in ours)
    best = [one for one in ours if one[2].timeline == newest]
    if len(best) > 1:
        raise DatabaseUnavailable(
            f"{_together(best)} take writes, both on timeline {newest}, so that neither is known to be the newer."
            " Stop all but one."
        )
    ((name, place, server),) = best
    if last is not None and newest < last.timeline:
        raise DatabaseUnavailable(
            f"{name} takes writes on timeline {newest}, and this process has written on timeline {last.timeline}:"
            " the server lacks what was stored there. If that is to be given up, restart the service."
        )
    for standby, other in zip(names, seen, strict=True):
        if other is None or not other.standby or other.control.system != server.control.system:
            continue
        if other.control.reached > newest:
            raise DatabaseUnavailable(
                f"{name} takes writes on timeline {newest}, and the standby {standby} follows timeline"
                f" {other.control.reached}: the server lacks what was stored there. Start the primary of that timeline,"
                f" or take {standby} out of the URL."
            )
    return place


def _of_one_database(found: list[tuple[str, int, Server]], last: Server | None) -> list[tuple[str, int, Server]]:
    if last is not None:
        ours = [one for one in found if one[2].control.system == last.control.system]
        if not ours:
            raise DatabaseUnavailable(
                f"{found[0][0]} takes writes, but its system identifier is not that of the database which this process"
                " has written to. If it takes its place, restart the service."
            )
        return ours
    if len({server.control.system for _, _, server in found}) > 1:
        raise DatabaseUnavailable(
            f"{_together(found)} take writes and are not copies of one database: their system identifiers differ."
            " Name the hosts of one database only."
        )
    return found


def _together(found: list[tuple[str, int, Server]]) -> str:
    return " and ".join(name for name, _, _ in found)


@dataclass(frozen=True, slots=True)
class Found:
    """A connection to the server to write to, its place in the URL, and what was seen of each host."""

    connection: Connection
    place: int
    seen: Sequence[Server | None]


async def find_primary(urls: list[str], timeout: float, last: Server | None = None, **options: Any) -> Found:
    """Look at all hosts at once, and connect to the one to write to; a single host is taken as it is.

    Takes no longer than half of `timeout` seconds, or than `HOST_TIMEOUT`.

    Raises:
        DatabaseUnavailable: no host takes writes, or which of them is the newest cannot be told.
        OSError, asyncpg.PostgresError: of a single host; of several, if none takes writes, of the first that failed.
    """
    if len(urls) == 1:
        return Found(await connect(urls[0], timeout=timeout, **options), 0, [None])
    patience = min(HOST_TIMEOUT, timeout / 2)
    opened: dict[int, Connection] = {}
    seen: list[Server | None] = [None] * len(urls)
    failures: dict[int, Exception] = {}

    async def reach(place: int) -> None:
        try:
            async with asyncio.timeout(patience):
                opened[place] = await connect(urls[place], timeout=patience, **options)
                seen[place] = await look(opened[place])
        except UNREACHABLE as error:
            failures[place] = error

    try:
        await asyncio.gather(*(reach(place) for place in range(len(urls))))
        if failures and not any(server is not None and server.writable for server in seen):
            raise failures[min(failures)]
        place = choose([name_of(url) for url in urls], seen, last)
        return Found(opened.pop(place), place, seen)
    finally:
        for connection in opened.values():
            connection.terminate()
