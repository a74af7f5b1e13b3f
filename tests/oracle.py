"""Where bars begin and end, worked out date by date with zoneinfo alone, and bars of quotes by that."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Any, Final, TypeVar
from zoneinfo import ZoneInfo

DAY: Final = timedelta(days=1)
SECOND: Final = timedelta(seconds=1)
MONDAY: Final = date(2000, 1, 3)
UNITS: Final = {"s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND}

T = TypeVar("T")


def changes(tz: str, first: datetime, last: datetime, step: timedelta) -> list[datetime]:
    """When the clocks of a zone change, to the second; two changes within a step are not seen."""
    zone = ZoneInfo(tz)
    found = []
    at, offset = first, first.astimezone(zone).utcoffset()
    while at < last:
        after = at + step
        following = after.astimezone(zone).utcoffset()
        if following != offset:
            low, high = at, after
            while high - low > SECOND:
                middle = low + (high - low) // (2 * SECOND) * SECOND
                low, high = (middle, high) if middle.astimezone(zone).utcoffset() == offset else (low, middle)
            found.append(high)
        at, offset = after, following
    return found


def first_shown(wall: datetime, zone: ZoneInfo) -> datetime:
    """The first moment at which the clocks of a zone show a time, or a later one where they pass over it."""
    early, late = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (1, 0))
    if late.astimezone(zone).replace(tzinfo=None) == wall:
        return late
    before = early.astimezone(zone).utcoffset()
    while late - early > SECOND:
        middle = early + (late - early) // (2 * SECOND) * SECOND
        early, late = (middle, late) if middle.astimezone(zone).utcoffset() == before else (early, middle)
    return late


def _begins(day: date, interval: str) -> bool:
    """Whether bars of days, weeks or months begin with a date."""
    count, unit = int(interval[:-1]), interval[-1]
    if unit == "M":
        return day.day == 1 and (12 * (day.year - 2000) + day.month - 1) % count == 0
    return (day - MONDAY).days % (count * (7 if unit == "w" else 1)) == 0


def edges(interval: str, tz: str, day_start: str, low: datetime, high: datetime) -> list[datetime]:
    """The edges from `low` to `high`, both inclusive."""
    zone, of_day = ZoneInfo(tz), time.fromisoformat(day_start)
    evening = DAY if of_day >= time(12) else timedelta()
    dates = (low.date() + n * DAY for n in range(-4, (high - low).days + 6))
    within_a_day = interval[-1] in UNITS
    starts = sorted(
        {
            first_shown(datetime.combine(day, of_day) - evening, zone)
            for day in dates
            if within_a_day or _begins(day, interval)
        }
    )
    if within_a_day:
        width = int(interval[:-1]) * UNITS[interval[-1]]
        starts = [start + n * width for start, end in pairwise(starts) for n in range(-((start - end) // width))]
    return [edge for edge in starts if low <= edge <= high]


@dataclass(frozen=True)
class Slot:
    """A bar that could be: its ends, and what lies in it by time."""

    start: datetime
    end: datetime
    values: Sequence[Any]


def slots(all_edges: Sequence[datetime], given: Iterable[tuple[datetime, Any]]) -> list[Slot]:
    """What lies between each two edges, of values that come by time."""
    values = list(given)
    return [
        Slot(start, end, [value for at, value in values if start <= at < end]) for start, end in pairwise(all_edges)
    ]
