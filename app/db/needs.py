"""The settings of the server that matter, what is needed of each, and what there is to say where one is otherwise.

Invariant: each sentence names the setting, its value and what is needed. What a session sets for itself
(`app.db.sessions`) is told and harms nothing but background jobs, which have sessions of their own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from app.settings import Settings

#: By what is needed: a value that harms wherever it is set, and what it does.
_HARMFUL: Final = {
    ("fsync", "off"): "after a crash the database may be lost",
    ("full_page_writes", "off"): "after a crash pages may be torn",
    ("autovacuum", "off"): "tables grow, and at last the server takes no more writes",
    ("track_counts", "off"): "autovacuum does not see what there is to do",
}
_ISOLATION: Final = "default_transaction_isolation"
_COMMITTED: Final = "read committed"
_DURABILITY: Final = "synchronous_commit"
#: Timeouts that end background jobs, and the milliseconds that a job may work, and wait for a lock, at least.
_OF_JOBS: Final = {"transaction_timeout": 3_600_000, "lock_timeout": 2_000}
_TIMEOUTS: Final = (*_OF_JOBS, "statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout")
RESTORING: Final = "timescaledb.restoring"
_LOCKS: Final = "max_locks_per_transaction"
_BACKENDS: Final = ("max_connections", "max_prepared_transactions")
#: Those that are looked at.
NAMES: Final = (
    *(name for name, _ in _HARMFUL), _ISOLATION, _DURABILITY, *_TIMEOUTS, RESTORING, _LOCKS, *_BACKENDS,
)  # fmt: skip
#: A lock on a relation needs shared memory only beyond these of each session, which grow with the setting.
_FAST: Final = 16
_FAST_GROWS: Final = 18
_FAST_MOST: Final = 16 * 1024
#: Sessions hold the same relations, so that one lock serves them, with room for two holders on average.
_HOLDERS: Final = 2


@dataclass(frozen=True, slots=True)
class Server:
    """The settings as the server, the database or the role has them, and how many relations the quotes are made of.

    `relations` are those that a statement over all quotes locks: chunks and their indexes. `owner` and `database` are
    names as SQL writes them, of whose settings background jobs have theirs.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    relations: int = 0
    major: int = 0
    owner: str = ""
    database: str = ""

    def number(self, name: str) -> int:
        """A setting that is a number; 0 where the server has none."""
        return int(self.settings.get(name, "0"))


def unfit(server: Server) -> str:
    """Why nothing should be stored; empty if it may."""
    if server.settings.get(RESTORING) != "on":
        return ""
    return (
        f"{RESTORING} is on, as a restore leaves it that did not finish, and off is needed:"
        " SELECT timescaledb_post_restore()."
    )


def harmful(server: Server, settings: Settings, processes: int, *, jobs: bool) -> list[str]:
    """What an administrator should change."""
    found = [
        f"{name} is {value}, and on is needed: {what}."
        for (name, value), what in _HARMFUL.items()
        if server.settings.get(name) == value
    ]
    if jobs:
        found += [
            f"{name} is {shown}, and {needed} is needed for background jobs:"
            f" ALTER ROLE {server.owner} IN DATABASE {server.database} SET {name} = {needed}."
            for name, shown, needed in _of_jobs(server)
        ]
    return found + _too_few_locks(server, settings, processes)


def _of_jobs(server: Server) -> list[tuple[str, str, str]]:
    """What ends a job, or lets it see less than was committed before it took its locks; and what is needed."""
    found = [
        (name, f"{server.number(name)} ms", "0") for name, least in _OF_JOBS.items() if 0 < server.number(name) < least
    ]
    if (isolation := server.settings.get(_ISOLATION, _COMMITTED)) != _COMMITTED:
        found.append((_ISOLATION, isolation, f"'{_COMMITTED}'"))
    return found


def _too_few_locks(server: Server, settings: Settings, processes: int) -> list[str]:
    """Where as many statements over all quotes at once as there are connections could ask for more than there is."""
    each, backends = server.number(_LOCKS), sum(map(server.number, _BACKENDS))
    sessions = processes * (settings.pool_size + settings.pool_overflow if settings.pool_size else 1)
    if not each or _wanted(server, each, sessions) <= each * backends:
        return []
    enough = each
    while _wanted(server, enough, sessions) > enough * backends:
        enough += 64 - enough % 64
    told = (
        f"{_LOCKS} is {each}, and {enough} or more is needed for {server.relations} chunks and indexes and pools of"
        f" {sessions} in all."
    )
    return [told]


def _wanted(server: Server, each: int, sessions: int) -> int:
    grown = _FAST * 2 ** math.ceil(math.log2(max(each, _FAST) / _FAST))
    fast = min(grown, _FAST_MOST) if server.major >= _FAST_GROWS else _FAST
    shared = max(0, server.relations - fast)
    return max(shared, shared * sessions // _HOLDERS)


def overridden(server: Server, settings: Settings) -> str:
    """What sessions of the service have otherwise than they would have it from the server; empty if nothing."""
    own = {
        "statement_timeout": 1000 * max(settings.statement_timeout, settings.write_timeout).total_seconds(),
        "idle_in_transaction_session_timeout": 60_000,
    }
    found = [
        f"{name} is {server.number(name)} ms" for name in _TIMEOUTS if 0 < server.number(name) < own.get(name, math.inf)
    ]
    if (isolation := server.settings.get(_ISOLATION, _COMMITTED)) != _COMMITTED:
        found.append(f"{_ISOLATION} is {isolation}")
    if server.settings.get(_DURABILITY) == "off":
        found.append(f"{_DURABILITY} is off")
    return f"On the server {', '.join(found)}; sessions of the service have what they need instead." if found else ""
