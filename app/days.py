"""Where the days of a time zone begin, and with them its bars: the edges of a stretch of time, by zoneinfo alone.

Invariant: a day begins when the clocks of its zone first show its date, or pass over that moment, and ends where the
next begins. So a day without a midnight begins where the clocks go forward, one with two midnights at the first, and a
date that the clocks skip has no day. Edges are whole seconds since 1970-01-01T00:00Z; equal intervals have equal edges,
whatever stretch is asked for.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final
from zoneinfo import ZoneInfo, available_timezones

from app.clock import EPOCH, FIRST, LAST, Interval, microseconds
from app.errors import InvalidRequest

_DAY: Final = 86_400
_WEEK: Final = 7 * _DAY
#: Before and after all that is stored there is room for two of the longest interval, and for the clocks to change.
_ROOM: Final = 2 * 11 * 366 * _DAY
EARLIEST: Final = microseconds(FIRST) // 10**6 - _ROOM
LATEST: Final = microseconds(LAST) // 10**6 + _ROOM
#: An edge lies so far at most from where a clock without changes would have it: 25 hours, where a zone crossed the date
#: line, and the day that it is counted from.
_SLACK: Final = 3 * _DAY
MIDNIGHT: Final = "00:00"
_EPOCH_DAY: Final = EPOCH.toordinal()
#: Days and what is shorter are counted from this Monday, months from this January.
_MONDAY: Final = (date(2000, 1, 3).toordinal() - _EPOCH_DAY) * _DAY
_JANUARY: Final = 12 * 2000
_FOREVER: Final = 2**60
_NOON: Final = _DAY // 2
_TIME_OF_DAY: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
#: What a machine's directory of zones has besides: what is local there, and copies of zones with other seconds.
_NO_ZONES: Final = frozenset({"localtime", "posixrules", "Factory"})


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    """The zones of the tz database, by their names as it writes them."""
    return frozenset(name for name in available_timezones() - _NO_ZONES if not name.startswith(("right/", "posix/")))


def zone(name: str) -> ZoneInfo:
    """A time zone by its IANA name.

    Raises:
        InvalidRequest: there is none of that name.
    """
    given: Any = name  # whatever a caller's own callers gave
    # Never a path, of which ZoneInfo would open whatever file it leads to.
    if not isinstance(given, str) or given not in _zones():
        raise InvalidRequest("A time zone is an IANA name, as in America/New_York.", parameter="tz")
    return ZoneInfo(given)


@lru_cache(maxsize=64)
def _offsets(tz: str) -> tuple[list[int], list[int]]:
    """Since when a zone has which offset, both in seconds, for all that can be stored.

    An offset lasts longer than a week. These are 33,000 looks, which take 15 ms.
    """
    local = zone(tz)
    epoch = EPOCH.replace(tzinfo=local)  # `fromutc` takes UTC under the zone's own name

    def at(second: int) -> timedelta | None:
        return local.fromutc(epoch + timedelta(seconds=second)).utcoffset()

    since, found = [-_FOREVER], [at(EARLIEST)]
    look, week = epoch + timedelta(seconds=EARLIEST), timedelta(seconds=_WEEK)
    for second in range(EARLIEST + _WEEK, LATEST + _WEEK, _WEEK):
        look += week
        after = local.fromutc(look).utcoffset()
        if after != found[-1]:
            seconds = range(second - _WEEK, second + 1)
            since.append(seconds[bisect_left(seconds, True, key=lambda second: at(second) != found[-1])])
            found.append(after)
    return since, [(offset or timedelta()) // timedelta(seconds=1) for offset in found]


def _first_shown(tz: str, shown: Sequence[int]) -> list[int]:
    """When the clocks of a zone first show, or pass over, ascending times that are counted as if they were of UTC."""
    since, offsets = _offsets(tz)
    found: list[int] = []
    done = 0
    segment = bisect_right(since, shown[0] - _SLACK) - 1 if shown else 0
    while done < len(shown):
        begin, offset = since[segment], offsets[segment]
        segment += 1
        end = since[segment] if segment < len(since) else _FOREVER
        reached = bisect_left(shown, end + offset, lo=done)
        found += [max(begin, moment - offset) for moment in shown[done:reached]]
        done = reached
    return list(dict.fromkeys(found))


def _shift(day_start: str) -> int:
    """Seconds from a date's midnight to where its day begins; from noon on that is on the evening before.

    Raises:
        InvalidRequest: it is no time of day.
    """
    match = _TIME_OF_DAY.fullmatch(day_start) if isinstance(day_start, str) else None
    if match is None:
        raise InvalidRequest("A day starts at a time of day, as in 17:00.", parameter="day_start")
    seconds = 3600 * int(match[1]) + 60 * int(match[2])
    return seconds if seconds < _NOON else seconds - _DAY


def moment(edge: int) -> datetime:
    """An edge as a moment in UTC.

    Raises:
        OverflowError: it lies outside of the calendar.
    """
    return EPOCH + timedelta(seconds=edge)


def beginning(day: date, tz: str, day_start: str = MIDNIGHT) -> int:
    """Where a day of the zone begins, in seconds since 1970-01-01T00:00Z; the next one's for a date that it skips.

    Raises:
        InvalidRequest: the zone is unknown, or `day_start` is no time of day.
    """
    zone(tz)
    return _first_shown(tz, [_DAY * (day.toordinal() - _EPOCH_DAY) + _shift(day_start)])[0]


def day_bounds(day: date, tz: str, day_start: str = MIDNIGHT) -> tuple[datetime, datetime]:
    """Where a day of the zone begins, and where it ends, in UTC; both are the same for a date that its clocks skip.

    Raises:
        InvalidRequest: the zone is unknown, the day is the last one there is, or none: a time has no day but in a zone;
            or `day_start` is no time of day.
    """
    if not isinstance(day, date) or isinstance(day, datetime):
        raise InvalidRequest("A day is a date, not a time.", parameter="date")
    try:
        begin = moment(beginning(day, tz, day_start))
        return begin, moment(beginning(day + timedelta(days=1), tz, day_start))
    except OverflowError as error:
        raise InvalidRequest("The day lies outside of the calendar.", parameter="date") from error


def day_of(now: datetime, tz: str, day_start: str = MIDNIGHT) -> date:
    """The date of the day that a moment lies in; where the clocks go back over a day's start, the day goes on.

    Raises:
        InvalidRequest: the zone is unknown, or `day_start` is no time of day.
    """
    local = now.astimezone(zone(tz)).replace(tzinfo=None)
    day = (local - timedelta(seconds=_shift(day_start))).date()
    return day if now < day_bounds(day, tz, day_start)[1] else day + timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Grid:
    """The edges of bars: those of an interval, whose days begin at `day_start` in a time zone.

    Bars of days to weeks are counted from Monday 2000-01-03, months from 2000-01, by the dates of the zone. Shorter
    ones are counted in elapsed time from the start of their day, and cut at its end, so they must divide a day, unless
    days are those of UTC.

    Raises:
        InvalidRequest: the zone is unknown, `day_start` is no time of day, or the interval does not divide a day.
    """

    interval: Interval
    tz: str = "UTC"
    day_start: str = MIDNIGHT
    _shift: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        zone(self.tz)
        object.__setattr__(self, "_shift", _shift(self.day_start))
        if self._of_days or not _DAY % self.interval.seconds:
            return
        if self._shift or any(_offsets(self.tz)[1]):
            raise InvalidRequest("In a time zone, an interval below a day must divide a day.", parameter="tz")

    @property
    def _of_days(self) -> bool:
        """Whether the bars are days, weeks or months."""
        return self.interval.seconds % _DAY == 0

    @property
    def _width(self) -> int:
        """The width in seconds, for months the longest that it can be."""
        return self.interval.width // timedelta(seconds=1)

    def even(self, low: int, high: int) -> tuple[int, int] | None:
        """Width and an edge, if the edges from `low` to `high`, and those around, lie one width apart."""
        if self.interval.months:
            return None
        width = self.interval.seconds
        since, offsets = _offsets(self.tz)
        first = bisect_right(since, low - width - _SLACK) - 1
        last = bisect_left(since, high + width + _SLACK)
        edge = _MONDAY + self._shift - offsets[first]
        if last - first > 1 and (
            width >= _DAY
            or any((offsets[first] - offset) % width for offset in offsets[first:last])
            or any((change - edge) % width for change in since[first + 1 : last])
        ):
            return None
        return width, edge

    def edges(self, low: int, high: int) -> Sequence[int]:
        """The edges from `low` to `high`, both inclusive."""
        even = self.even(low, high)
        if even is not None:
            width, edge = even
            return range(low + (edge - low) % width, high + 1, width)
        if not self._of_days:
            width = self.interval.seconds
            days = _first_shown(self.tz, self._shown(low, high, _DAY))
            found = [edge for start, end in pairwise(days) for edge in range(start, end, width)]
        elif self.interval.months:
            found = _first_shown(self.tz, self._months(low, high))
        else:
            found = _first_shown(self.tz, self._shown(low, high, self.interval.seconds))
        return found[bisect_left(found, low) : bisect_right(found, high)]

    def floor(self, second: int) -> int:
        """Where the bar that a second lies in begins."""
        return self.edges(second - self._width - _SLACK, second)[-1]

    def ceil(self, second: int) -> int:
        """The first edge that is not before a second."""
        return self.edges(second, second + self._width + _SLACK)[0]

    def window(self, low: int, high: int, count: int, *, newest: bool) -> Sequence[int]:
        """The first or the last edges from `low` to `high`, which are edges, of as many bars as `count` or all."""
        span = min(count * self._width + _SLACK, high - low)
        return self.edges(high - span, high)[-count - 1 :] if newest else self.edges(low, low + span)[: count + 1]

    def _shown(self, low: int, high: int, width: int) -> range:
        """What clocks show at the edges of days between two seconds and around."""
        origin = _MONDAY + self._shift
        first = low - _SLACK - (low - _SLACK - origin) % width
        return range(first, high + _SLACK + 1, width)

    def _months(self, low: int, high: int) -> list[int]:
        """As `_shown`, of months."""
        months = self.interval.months
        first, last = (12 * day.year + day.month - 1 for day in (moment(low - _SLACK), moment(high + _SLACK)))
        first -= (first - _JANUARY) % months
        return [
            (date(month // 12, month % 12 + 1, 1).toordinal() - _EPOCH_DAY) * _DAY + self._shift
            for month in range(first, last + 1, months)
        ]
