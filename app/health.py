"""The three checks that the API and the CLI answer with: database, timescaledb, hypertable.

Invariant: a check never hangs and never lies about what it could not see; what could not be reached makes the
checks behind it `skipped`, and the whole `unhealthy`.
"""

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from app import __version__, metrics
from app.clock import rfc3339
from app.db.capability import REQUIRED, Level
from app.errors import QuotesError
from app.quote.fields import KEY
from app.quote.terms import AHEAD
from app.repository.system import Observation, SystemRepository
from app.settings import Settings

Status = Literal["healthy", "degraded", "unhealthy", "skipped"]

_TIMEOUT: Final = 2.0
_FRESH: Final = 1.0  # probes of several supervisors share one look
_SLOW: Final = 1.0
#: Seconds between the clocks of the service and of the database above which one of them is no longer kept by NTP.
_CLOCK_OFF: Final = 5.0
#: Time for which an error of the database's own counts.
_REMEMBERED: Final = timedelta(minutes=1)
#: Time that a commit may wait for its standby.
_CONFIRMED: Final = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Status
    detail: str
    version: str | None = None
    latency_ms: float | None = None
    clock_difference_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON answer."""
        shown = {
            "status": self.status,
            "detail": self.detail,
            "version": self.version,
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
        self._lock = asyncio.Lock()
        self._last: tuple[float, Report] | None = None

    async def report(self) -> Report:
        """The outcome of a look that is at most a second old. Never raises."""
        async with self._lock:
            now = time.monotonic()
            if self._last is None or now - self._last[0] > _FRESH:
                self._last = (now, await self._look())
            return self._last[1]

    async def _look(self) -> Report:
        began = time.perf_counter()
        level = store = None
        try:
            async with asyncio.timeout(2 * _TIMEOUT):
                seen = await self._system.observe(_TIMEOUT)
        except (QuotesError, TimeoutError) as error:
            detail = error.detail if isinstance(error, QuotesError) else "The database does not answer."
            checks = (
                Check("database", "unhealthy", detail),
                Check("timescaledb", "skipped", "The database was not reached."),
                Check("hypertable", "skipped", "The database was not reached."),
            )
        else:
            latency = time.perf_counter() - began
            level, store = str(seen.capability.level), seen.store
            checks = (self._database(seen, latency), self._timescaledb(seen), self._hypertable(seen))
            metrics.BUILD_INFO.labels(__version__, level).set(1)
        for check in checks:
            metrics.HEALTH_UP.labels(check.name).set(check.status != "unhealthy")
        return Report(checks, level, store, datetime.now(UTC))

    def _database(self, seen: Observation, latency: float) -> Check:
        remarks = [f"Answers, but took {latency:.1f} s."] if latency > _SLOW else []
        remarks += _divided(seen)
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
        return Check("database", status, detail, seen.capability.postgresql, round(1000 * latency, 2), difference)

    def _timescaledb(self, seen: Observation) -> Check:
        capability = seen.capability
        if capability.level < self._required:
            detail = f"The level is {capability.level}, {self._required} is required: {capability.level.lacks}."
            return Check("timescaledb", "unhealthy", detail, capability.timescaledb)
        if capability.level == Level.COMMUNITY:
            return Check("timescaledb", "healthy", "Community edition.", capability.timescaledb)
        detail = f"Not required here. The level is {capability.level}: {capability.level.lacks}."
        return Check("timescaledb", "skipped", detail, capability.timescaledb)

    def _hypertable(self, seen: Observation) -> Check:
        if not seen.table_exists:
            return Check("hypertable", "unhealthy", "quotes.real_time is missing: run `opa-quotes migrate`.")
        if seen.primary_key != list(KEY):
            return Check("hypertable", "unhealthy", f"quotes.real_time has not the key ({', '.join(KEY)}).")
        if seen.revision is None:
            detail = "The tables have no revision: a restore into this database did not finish."
            return Check("hypertable", "unhealthy", detail)
        if seen.revision != self._head:
            detail = f"The schema is at revision {seen.revision}, this version of the service at {self._head}."
            return Check("hypertable", "degraded", detail, seen.revision)
        if seen.facts is not None and (differences := seen.facts.differences(self._settings)):
            told = "; ".join(map(str, differences))
            detail = f"{told}. What the store has counts; `opa-quotes maintain apply` changes it."
            return Check("hypertable", "degraded", detail, seen.revision)
        if seen.chunks is not None:
            return Check("hypertable", "healthy", f"{seen.chunks} chunks.", seen.revision)
        if seen.capability.level >= Level.APACHE:
            detail = "TimescaleDB is there, but quotes.real_time is a plain table."
            return Check("hypertable", "degraded", detail, seen.revision)
        return Check("hypertable", "healthy", "A plain table, as the level has no hypertables.", seen.revision)


def _grave(seen: Observation) -> list[str]:
    """Why nothing should be stored here now, although the database answers."""
    found = []
    if seen.damaged is not None and seen.damaged < _REMEMBERED:
        found.append(
            f"It reported an error of its own {seen.damaged.total_seconds():.0f} s ago: a page or an index may be"
            " damaged; its log names it."
        )
    if seen.waiting > _CONFIRMED:
        found.append(f"A commit has waited {seen.waiting.total_seconds():.0f} s for a standby to confirm it.")
    return found


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
