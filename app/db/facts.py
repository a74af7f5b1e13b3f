"""What belongs to the store and not to a process: which quotes are kept, for how long, in what chunks.

Invariant: these come from the store, whatever a process was told, so that nothing is acknowledged here that a job of
the store drops. Bounds stand on whole days of UTC: each quote that is taken is in bars that can be built again as long
as it is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

from app.errors import SchemaMismatch
from app.settings import DAY, Settings

#: One row, if the schema has it.
FACTS: Final = "SELECT retention, chunk_interval, compress_after, dropped_before FROM quotes.settings"


def midnight(moment: datetime) -> datetime:
    """The midnight in UTC that a moment's day begins with."""
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def next_midnight(moment: datetime) -> datetime:
    """The first midnight in UTC that is not before a moment."""
    return midnight(moment + DAY - timedelta(microseconds=1))


@dataclass(frozen=True, slots=True)
class Facts:
    """The settings of the store; `retention` is None where all quotes are kept.

    Raw quotes before `dropped_before` may have been dropped by retention; None where none were.
    """

    retention: timedelta | None
    chunk_interval: timedelta
    compress_after: timedelta
    dropped_before: datetime | None = None

    @classmethod
    def of(cls, row: Sequence[Any] | None) -> Self:
        """Read the row that `FACTS` returns.

        Raises:
            SchemaMismatch: there is none.
        """
        if row is None:
            raise SchemaMismatch("The store's settings are gone, so that nobody knows which quotes it keeps.")
        return cls(row[0], row[1], row[2], row[3])

    @classmethod
    def first(cls, settings: Settings) -> Self:
        """Those that a process would give a store without any."""
        return cls(settings.effective_retention, settings.chunk_interval, settings.compress_after)

    def cutoff(self, now: datetime) -> datetime | None:
        """Quotes before this midnight are past their retention; None where all are kept."""
        return None if self.retention is None else midnight(now - self.retention)

    def oldest(self, now: datetime) -> datetime | None:
        """Older quotes are not taken; None if all are.

        Two chunks, and two days, above the edge: whatever is acknowledged is in the bars before it is dropped.
        """
        bounds = [] if self.dropped_before is None else [self.dropped_before]
        if self.retention is not None:
            bounds.append(next_midnight(now - self.retention + 2 * max(self.chunk_interval, DAY)))
        return max(bounds, default=None)

    def differences(self, settings: Settings) -> list["Difference"]:
        """Where a process was told otherwise."""
        told = [("retention", settings.retention), ("chunk_interval", settings.chunk_interval),
                ("compress_after", settings.compress_after)]  # fmt: skip
        return [
            Difference(name, getattr(self, name), wanted)
            for name, wanted in told
            if name in settings.model_fields_set and getattr(self, name) != wanted
        ]


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting of a process that is another one in the store."""

    name: str
    stored: timedelta | None
    told: timedelta | None

    def __str__(self) -> str:
        return f"QUOTES_{self.name.upper()} is {shown(self.told)} and the store's is {shown(self.stored)}"


def shown(span: timedelta | None) -> str:
    """A span as a setting is written."""
    if span is None:
        return "none"
    seconds = span.total_seconds()
    for width, name in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds % width == 0:
            count = int(seconds // width)
            return f"{count} {name}{'s' if count != 1 else ''}"
    return f"{seconds:g} s"
