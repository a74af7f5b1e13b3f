"""Instants, how they are written, and the intervals of bars.

Invariant: an instant is a whole number of nanoseconds since 1970-01-01T00:00Z, an `int` without bounds, so that no
comparison and no sum loses a digit. A `datetime` is aware, in UTC, and the microsecond of an instant.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Final, Literal, Self

from app.errors import InvalidRequest

Precision = Literal["s", "ms", "us", "ns"]
#: An aware moment, or nanoseconds since 1970-01-01T00:00Z.
Instant = datetime | int

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: The first and the last whole day, and microsecond, of which nanoseconds since 1970 fit into 64 bits.
FIRST: Final = datetime(1677, 9, 22, tzinfo=UTC)
LAST: Final = datetime(2262, 4, 11, 23, 47, 16, 854_774, tzinfo=UTC)
#: The resolution of a `datetime`.
MICROSECOND: Final = timedelta(microseconds=1)
#: Nanoseconds of each unit.
UNITS: Final[Mapping[Precision, int]] = MappingProxyType({"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1})

_RFC3339: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]((?:[01][0-9]|2[0-3]):[0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,100}))?)?"
    r"(?:( ?UTC|[Zz])| ?([+-])([0-9]{2})(?::?([0-9]{2}))?)?"
)
_NAIVE_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001  the offset is taken off by hand, without a calendar's ends
_MIN: Final = datetime.min.replace(tzinfo=UTC)
_MAX: Final = datetime.max.replace(tzinfo=UTC)
_HOURS: Final = 24
_MINUTES: Final = 60
_DIGITS: Final = 9


class Nanoseconds(int):
    """An instant by its type, where a plain number would need a unit."""


class NotAnInstant(ValueError):
    """A text that names no instant, with the code and the sentence that refuse it."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


_INVALID: Final = ("timestamp-invalid", "A timestamp is RFC 3339, as in 2026-11-20T14:30:00.123456789Z.")


def microseconds(moment: datetime) -> int:
    """Microseconds from 1970-01-01T00:00Z to an aware moment."""
    return (moment - EPOCH) // MICROSECOND


_FIRST_COUNT: Final = microseconds(_MIN)
_LAST_COUNT: Final = microseconds(_MAX)


def nanoseconds(moment: Instant) -> int:
    """Nanoseconds from 1970-01-01T00:00Z to an aware moment; those of a pandas Timestamp are among them.

    Raises:
        InvalidRequest: the moment is naive, or none.
    """
    if isinstance(moment, int):
        return moment
    if not isinstance(moment, datetime):
        raise InvalidRequest("A time is an aware datetime, or whole nanoseconds since 1970-01-01T00:00Z.")
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise InvalidRequest("A time carries an offset; a naive one has no place on the time line.")
    return 1000 * microseconds(moment) + int(getattr(moment, "nanosecond", 0))


def floor(instant: int) -> datetime:
    """The microsecond that an instant lies in, or the end of the calendar that it lies beyond."""
    count = instant // 1000
    if count <= _FIRST_COUNT:
        return _MIN
    return _MAX if count >= _LAST_COUNT else EPOCH + timedelta(microseconds=count)


def ceil(instant: int) -> datetime:
    """The first microsecond that is not before an instant, or the end of the calendar that it lies beyond."""
    return floor(instant + 999)


def parts(instant: int) -> tuple[datetime, int]:
    """An instant as it is stored: its microsecond, and the nanoseconds after it."""
    return floor(instant), instant % 1000


def rfc3339(moment: datetime) -> str:
    """UTC with a `Z`, without an empty fraction."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def rfc3339_nano(instant: int) -> str:
    """UTC with nine digits of fraction and a `Z`.

    Raises:
        OverflowError: it lies outside of the years 1 to 9999.
    """
    second, fraction = divmod(instant, UNITS["s"])
    return f"{(_NAIVE_EPOCH + timedelta(seconds=second)).isoformat()}.{fraction:09d}Z"


def parse(text: str) -> int:
    """The instant of an RFC 3339 text with an offset.

    As databases and data frames write it, a space may stand for the `T` and before the offset, which may be hours alone
    or `UTC`; seconds may be absent.

    Raises:
        NotAnInstant: it is no such text, has no offset, is a leap second, or is finer than a nanosecond.
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise NotAnInstant(*_INVALID)
    day, minute, second, fraction, utc, sign, hours, minutes = match.groups()
    if second == "60":
        raise NotAnInstant(
            "timestamp-leap-second", "A leap second (:60) has no instant of its own; send the second before or after."
        )
    try:
        local = datetime.fromisoformat(f"{day}T{minute}:{second or '00'}")
    except ValueError:
        raise NotAnInstant(*_INVALID) from None
    if utc is None and sign is None:
        raise NotAnInstant("timestamp-naive", "A timestamp carries an offset, as in 2026-11-20T14:30:00Z.")
    offset = 0
    if sign is not None:
        if int(hours) >= _HOURS or int(minutes or 0) >= _MINUTES:
            raise NotAnInstant(*_INVALID)
        offset = 60 * int(hours) + int(minutes or 0)
    fraction = fraction or ""
    if fraction[_DIGITS:].strip("0"):
        raise NotAnInstant("timestamp-too-fine", "A timestamp has at most nine digits of fraction.")
    count = (local - _NAIVE_EPOCH) // timedelta(seconds=1) + (offset if sign == "-" else -offset) * 60
    return count * UNITS["s"] + int(fraction[:_DIGITS].ljust(_DIGITS, "0"))


def of_epoch(count: int | Decimal, precision: Precision) -> int:
    """The instant that many units after 1970-01-01T00:00Z.

    Raises:
        NotAnInstant: it is finer than a nanosecond.
    """
    number, parts = count.as_integer_ratio()  # exact, whatever precision decimals have here
    found, rest = divmod(number * UNITS[precision], parts)
    if rest:
        raise NotAnInstant("timestamp-too-fine", "A timestamp has no fraction of a nanosecond.")
    return found


_INTERVAL: Final = re.compile(r"([1-9][0-9]{0,6})(s|m|h|d|w|M)")
_ALIAS: Final = re.compile(r"([1-9][0-9]{0,6})?(sec|min|hour|day|week|month)s?", re.IGNORECASE)
_ALIAS_UNITS: Final = {"sec": "s", "min": "m", "hour": "h", "day": "d", "week": "w", "month": "M"}
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_LONGEST: Final = timedelta(days=3660)
_MOST: Final = 9_999_999  # as many digits as the grammar has
_GRAMMAR: Final = "An interval is a whole number and one of s m h d w M, as in 15m, 1h or 3M."


@dataclass(frozen=True, slots=True)
class Interval:
    """The width of a bar: `15m`, `1h`, `1w`, `3M`; aliases `15Min`, `1Hour`, `1Day`, `1Month`.

    Bars of seconds to weeks are counted from Monday 2000-01-03T00:00Z, months from 2000-01, so that equal
    intervals always give equal bars, whatever the range asked for.

    Raises:
        InvalidRequest: the count is no whole number above 0, the unit none of these, or it is longer than ten years.
    """

    count: int
    unit: Literal["s", "m", "h", "d", "w", "M"]

    def __post_init__(self) -> None:
        whole = isinstance(self.count, int) and not isinstance(self.count, bool) and 0 < self.count <= _MOST
        if not whole or not isinstance(self.unit, str) or self.unit not in {*_UNIT_SECONDS, "M"}:
            raise InvalidRequest(_GRAMMAR, parameter="interval")
        if self.width > _LONGEST:
            raise InvalidRequest("An interval is at most ten years.", parameter="interval")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an interval.

        Raises:
            InvalidRequest: it is not of the grammar, or longer than ten years.
        """
        if match := _INTERVAL.fullmatch(text):
            count, unit = int(match[1]), match[2]
        elif match := _ALIAS.fullmatch(text):
            count, unit = int(match[1] or 1), _ALIAS_UNITS[match[2].lower()]
        else:
            raise InvalidRequest(_GRAMMAR, parameter="interval")
        return cls(count, unit)  # type: ignore[arg-type]

    @property
    def months(self) -> int:
        """Width in months, 0 for the units of fixed length."""
        return self.count if self.unit == "M" else 0

    @property
    def width(self) -> timedelta:
        """The width, for months the longest that it can be."""
        return timedelta(days=31 * self.count) if self.unit == "M" else timedelta(seconds=self.seconds)

    @property
    def seconds(self) -> int:
        """Width in seconds, 0 for months."""
        return 0 if self.unit == "M" else self.count * _UNIT_SECONDS[self.unit]

    @property
    def source(self) -> Literal["ohlc_1d", "ohlc_1h", "ohlc_1m", "real_time"]:
        """The coarsest rollup that this interval is a multiple of."""
        if self.seconds % 86400 == 0:  # also months, whose seconds are 0
            return "ohlc_1d"
        if self.seconds % 3600 == 0:
            return "ohlc_1h"
        return "ohlc_1m" if self.seconds % 60 == 0 else "real_time"

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"
