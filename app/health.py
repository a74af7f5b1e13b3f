"""The three checks that the API and the CLI answer with: database, timescaledb, hypertable.

Unless one is unhealthy the schema is the one that this code needs, and a quote could be stored now: the server takes
writes, has room, has all that they need, lets this role do it, and has not refused the last one.
Invariant: a check never hangs and never lies about what it could not see; what could not be reached makes the
checks behind it `skipped`, and the whole `unhealthy`.
"""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from app import __version__, metrics, workers
from app.clock import rfc3339
from app.db import needs
from app.db.capability import (
    OLDEST_TIMESCALEDB,
    POSTGRESQL,
    REQUIRED,
    TIMESCALEDB,
    Level,
    named,
    release,
    strangers_fault,
)
from app.db.migrate import known, newer_schema
from app.errors import QuotesError
from app.logs import Logger
from app.quote.fields import KEY
from app.quote.terms import AHEAD
from app.repository.system import Observation, SystemRepository
from app.settings import Settings

log = Logger(__name__)

Status = Literal["healthy", "degraded", "unhealthy", "skipped"]

#: Seconds for each step of a look, and for all of it: an answer leaves within 3.5 s, and 4 s are promised.
_TIMEOUT: Final = 2.0
_WHOLE: Final = 3.0
_FRESH: Final = 1.0  # probes of several supervisors share one look
_SLOW: Final = 1.0
#: Seconds between the clocks of the service and of the database above which one of them is no longer kept by NTP.
_CLOCK_OFF: Final = 5.0
#: Connections of a process beside those of its pool: looks, the monitor, one that counts commits.
_OF_ITS_OWN: Final = 4
#: Time for which an error of the database's own counts.
_REMEMBERED: Final = timedelta(minutes=1)
#: Time that a commit may wait for its standby.
_CONFIRMED: Final = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check, with the version that was found and those that are wanted."""

    name: str
    status: Status
    detail: str
    version: str | None = None
    wanted: str | None = None
    latency_ms: float | None = None
    clock_difference_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON answer."""
        shown = {
            "status": self.status,
            "detail": self.detail,
            "version": self.version,
            "wanted": self.wanted,
            "latency_ms": self.latency_ms,
        }
        if self.clock_difference_ms is not None:
            shown["clock_difference_ms"] = self.clock_difference_ms
        return shown


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one look."""

    checks: tuple[Check, ...]
    level: str | None
    store: str | None
    timestamp: datetime

    @property
    def status(self) -> Status:
        """The worst of the checks, where `skipped` is not bad."""
        found = {check.status for check in self.checks}
        return "unhealthy" if "unhealthy" in found else "degraded" if "degraded" in found else "healthy"

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON answer."""
        return {
            "overall_status": self.status,
            "level": self.level,
            "store": self.store,
            "version": __version__,
            "timestamp": rfc3339(self.timestamp),
            "checks": {check.name: check.to_dict() for check in self.checks},
        }


class Health:
    """Runs the checks, at most once a second whoever asks."""

    def __init__(self, system: SystemRepository, settings: Settings, head: str) -> None:
        self._system = system
        self._settings = settings
        self._required = REQUIRED[settings.required_level]
        self._head = head
        self._last: tuple[float, Report] | None = None
        self._differences = ""
        self._overridden = ""
        self._looking: asyncio.Task[Report] | None = None
        self._left: set[asyncio.Task[Observation]] = set()

    async def report(self) -> Report:
        """The outcome of a look that is at most a second old, or is under way. Never raises."""
        if self._last is not None and time.monotonic() - self._last[0] <= _FRESH:
            return self._last[1]
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="health")
        return await asyncio.shield(self._looking)

    async def _look(self) -> Report:
        began = time.perf_counter()
        level = store = None
        try:
            seen = await self._observe()
        except (QuotesError, TimeoutError) as error:
            report = unreachable(error.detail if isinstance(error, QuotesError) else "The database does not answer.")
        else:
            latency = time.perf_counter() - began
            self._note_differences(seen)
            level, store = str(seen.capability.level), seen.store
            checks = (self._database(seen, latency), self._timescaledb(seen), self._hypertable(seen))
            metrics.BUILD_INFO.labels(__version__, level).set(1)
            metrics.COMMITS_WAITING.set(seen.commits_waiting)
            report = Report(checks, level, store, datetime.now(UTC))
        for check in report.checks:
            metrics.HEALTH_UP.labels(check.name).set(check.status != "unhealthy")
        self._last = (time.monotonic(), report)
        return report

    async def _observe(self) -> Observation:
        """Look, and do not wait for a connection to be closed that does not answer."""
        look = asyncio.create_task(self._system.observe(_TIMEOUT), name="look")
        self._left.add(look)
        look.add_done_callback(self._forget)
        done, _ = await asyncio.wait({look}, timeout=_WHOLE)
        if not done:
            look.cancel()
            raise TimeoutError
        return look.result()

    def _forget(self, look: "asyncio.Task[Observation]") -> None:
        self._left.discard(look)
        if not look.cancelled():
            look.exception()

    def _note_differences(self, seen: Observation) -> None:
        """Where store and server have other settings than this process; logged once each time that changes."""
        found = [] if seen.facts is None else seen.facts.differences(self._settings)
        metrics.SETTINGS_DIFFER.set(len(found))
        told = "; ".join(map(str, found))
        told = told and f"{told}. What the store has counts; `opa-quotes maintain apply` changes it."
        if told and told != self._differences:
            log.warning("settings differ from those of the store", reason=told)
        self._differences = told
        overridden = needs.overridden(seen.server, self._settings)
        if overridden and overridden != self._overridden:
            log.info("settings of the server are not what sessions have", reason=overridden)
        self._overridden = overridden

    def _database(self, seen: Observation, latency: float) -> Check:
        remarks = [f"Answers, but took {latency:.1f} s."] if latency > _SLOW else []
        jobs = seen.capability.level >= Level.COMMUNITY
        remarks += _divided(seen) + self._too_few(seen)
        remarks += needs.harmful(seen.server, self._settings, workers.number(), jobs=jobs)
        if seen.capability.postgresql_major > POSTGRESQL[1]:
            remarks.append(f"PostgreSQL {seen.capability.postgresql} is newer than what is tested.")
        status: Status = "degraded" if remarks else "healthy"
        difference = None
        if seen.clock is not None:
            metrics.CLOCK_DIFFERENCE.set(seen.clock.seconds)
            difference = round(1000 * seen.clock.seconds, 2)
            if seen.clock.certain > AHEAD.total_seconds():
                # Quotes of now are refused as a client's mistake, and not sent again; or quotes of days to come are
                # taken, and hide what comes until then. A 503 harms neither.
                status = "unhealthy"
                remarks.append(f"{_clocks(seen.clock.seconds)}; if it is wrong, {_HARM[seen.clock.seconds > 0]}.")
            elif seen.clock.certain > _CLOCK_OFF:
                status = "degraded"
                remarks.append(f"{_clocks(seen.clock.seconds)}.")
        if grave := _grave(seen):
            status = "unhealthy"
            remarks = grave + remarks
        detail = " ".join(remarks) or "Answers."
        if self._overridden:
            detail += f" {self._overridden}"
        found, milliseconds = seen.capability.postgresql, round(1000 * latency, 2)
        return Check("database", status, detail, found, _RELEASES, milliseconds, difference)

    def _too_few(self, seen: Observation) -> list[str]:
        """What there is to say where the pools of all processes may ask for more connections than there are."""
        processes, pool = workers.number(), self._settings.pool_size + self._settings.pool_overflow
        wanted = processes * (pool + _OF_ITS_OWN)
        if not self._settings.pool_size or seen.connections is None or wanted <= seen.connections:
            return []
        told = (
            f"{_counted(processes, 'process', 'processes')} of this service may open {wanted} connections, and"
            f" {seen.limit} allows {seen.connections}: lower QUOTES_POOL_OVERFLOW, or raise that."
        )
        return [told]

    def _timescaledb(self, seen: Observation) -> Check:
        capability, found = seen.capability, seen.capability.timescaledb
        wanted = None if found is None and self._required == Level.POSTGRESQL else f"{named(TIMESCALEDB)} or newer"

        def check(status: Status, detail: str) -> Check:
            return Check("timescaledb", status, detail, found, wanted)

        if capability.level < self._required:
            lacks = capability.level.lacks
            return check("unhealthy", f"The level is {capability.level}, {self._required} is required: {lacks}.")
        if found is not None and (number := release(found)) < TIMESCALEDB:
            if number < OLDEST_TIMESCALEDB:
                oldest = named(OLDEST_TIMESCALEDB)
                return check("unhealthy", f"TimescaleDB {found} is older than {oldest}, the oldest that may work.")
            return check("degraded", f"TimescaleDB {found} works, but {wanted} is wanted: see SECURITY.md.")
        if capability.level == Level.COMMUNITY:
            return check("healthy", "Community edition.")
        return check("skipped", f"Not required here. The level is {capability.level}: {capability.level.lacks}.")

    def _hypertable(self, seen: Observation) -> Check:
        def check(status: Status, detail: str) -> Check:
            return Check("hypertable", status, detail, seen.revision, self._head)

        if fault := self._schema_fault(seen):
            return check("unhealthy", fault)
        if self._differences:
            return check("degraded", self._differences)
        if seen.chunks is not None:
            return check("healthy", f"{_counted(seen.chunks, 'chunk', 'chunks')}.")
        if seen.capability.level >= Level.APACHE:
            return check("degraded", "TimescaleDB is there, but quotes.real_time is a plain table.")
        return check("healthy", "A plain table, as the level has no hypertables.")

    def _schema_fault(self, seen: Observation) -> str | None:
        """Why the schema is not the one that this version needs."""
        if seen.strangers and seen.revision is None:
            return strangers_fault(seen.strangers)
        if not seen.table_exists and (seen.revision is None or seen.revision in known()):
            return "quotes.real_time is missing: run `opa-quotes migrate`."
        if "SELECT on quotes.alembic_version" in seen.lacking:
            return "The revision of the schema cannot be read: the role lacks SELECT on quotes.alembic_version."
        if seen.revision is None:
            return (
                "The tables have no revision in quotes.alembic_version: run `opa-quotes migrate`, which knows where"
                " older stores have it, or says that a restore into this database did not finish."
            )
        if seen.revision != self._head and seen.revision not in known():
            return newer_schema(seen.revision, self._head)
        if seen.revision != self._head:
            return (
                f"The schema is at revision {seen.revision}, this version of the service needs {self._head}: run"
                " `opa-quotes migrate`."
            )
        if seen.primary_key != list(KEY):
            return f"quotes.real_time has not the key ({', '.join(KEY)})."
        if seen.missing:
            return f"{', '.join(seen.missing)} missing, though the revision is {seen.revision}: somebody dropped it."
        if seen.flaw is not None:
            return f"The schema is not what its revision says: {seen.flaw}."
        return None


#: The releases of PostgreSQL that are wanted.
_RELEASES: Final = f"{POSTGRESQL[0]} to {POSTGRESQL[1]}"


def unreachable(detail: str) -> Report:
    """The report of a database that cannot be looked at."""
    checks = (
        Check("database", "unhealthy", detail, wanted=_RELEASES),
        Check("timescaledb", "skipped", "The database was not reached."),
        Check("hypertable", "skipped", "The database was not reached."),
    )
    return Report(checks, None, None, datetime.now(UTC))


def _grave(seen: Observation) -> list[str]:
    """Why nothing should be stored here now, although the database answers."""
    found = []
    if seen.capability.postgresql_major < POSTGRESQL[0]:
        found.append(f"PostgreSQL {seen.capability.postgresql} is older than {POSTGRESQL[0]}, the oldest that works.")
    if seen.standby:
        found.append("It is a standby, which takes no quotes: the URL has to lead to the primary.")
    elif seen.read_only:
        found.append("It is read-only for this role: see default_transaction_read_only.")
    found += filter(None, (seen.encoding, needs.unfit(seen.server)))
    if seen.lacking:
        found.append(f"The role lacks {', '.join(seen.lacking)}: see the page on deployment.")
    if seen.hidden:
        found.append(
            f"Row security of {', '.join(seen.hidden)} applies to this role, and hides rows or refuses them: ALTER"
            " TABLE … DISABLE ROW LEVEL SECURITY is needed, or ALTER ROLE … BYPASSRLS."
        )
    if seen.full:
        found.append("Its volume is full.")
    elif seen.refusal is not None:
        found.append(f"It has refused the last write: {seen.refusal}")
    if seen.damaged is not None and seen.damaged < _REMEMBERED:
        found.append(
            f"It reported an error of its own {seen.damaged.total_seconds():.0f} s ago: a page or an index may be"
            " damaged; its log names it."
        )
    if seen.waiting > _CONFIRMED:
        found.append(f"A commit has waited {seen.waiting.total_seconds():.0f} s for a standby to confirm it.")
    return found


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _divided(seen: Observation) -> list[str]:
    """What there is to say of several servers that take writes.

    The service goes on with one of them, so that a mistake with a standby is no outage.
    """
    if len(seen.writable) <= 1:
        return []
    servers = ", ".join(map(str, seen.writable))
    return [
        f"{len(seen.writable)} servers take writes: {servers}. This service writes to {seen.host}; stop the others."
    ]


def _clocks(ahead: float) -> str:
    direction = "ahead of" if ahead > 0 else "behind"
    return f"The clock of the service is {abs(ahead):.1f} s {direction} that of the database"


#: What a clock of the service that is off by more than `AHEAD` does, by whether it is ahead.
_HARM: Final = {
    True: "quotes of the future are stored",
    False: "quotes of now are refused as ones of the future",
}
