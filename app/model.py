"""The words of the domain: quote, receipt, interval, and the terms on which quotes are taken.

Invariant: times are aware and in UTC, prices are exact decimals.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Annotated, Final, Literal, Self

import msgspec
import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.errors import InvalidRequest, Rejection

OnConflict = Literal["update", "ignore", "error"]
Consistency = Literal["eventual", "strong"]
OnError = Literal["abort", "skip"]
Precision = Literal["s", "ms", "us", "ns"]

SYMBOL_PATTERN: Final = r"^[A-Z0-9.\-=^/:_]{1,32}$"
SOURCE_LENGTH: Final = 255
#: The columns of `quotes.real_time`, in order; prices keep eight decimals, times are UTC microseconds.
SCHEMA: Final = pa.schema(
    [
        ("symbol", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")),
        ("price", pa.decimal128(20, 8)),
        ("bid", pa.decimal128(20, 8)),
        ("ask", pa.decimal128(20, 8)),
        ("bid_size", pa.int64()),
        ("ask_size", pa.int64()),
        ("volume", pa.int64()),
        ("source", pa.string()),
    ]
)
#: The resolution of a timestamp.
TICK: Final = timedelta(microseconds=1)
_PER_SECOND: Final[Mapping[Precision, int]] = MappingProxyType({"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9})
#: Nothing is older.
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _rfc3339(value: object) -> object:
    """Refuse numbers and numeric text, whose unit pydantic would guess."""
    if isinstance(value, datetime) or (isinstance(value, str) and value[4:5] == "-"):
        return value
    raise PydanticCustomError("timestamp_format", "Input should be an RFC 3339 date and time with an offset")


Timestamp = Annotated[AwareDatetime, BeforeValidator(_rfc3339)]
Price = Annotated[
    Decimal,
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
]
Size = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]  # an int64; the sign is a rule


class Quote(BaseModel):
    """One quote: what was traded or offered for a symbol at an instant.

    Prices are above zero and below 10^12; beyond eight decimals they are rounded half up, and counted as
    `rounded` in the receipt. A quote without `price` but with `bid` and `ask` is stored with their mid.
    """

    model_config = ConfigDict(extra="forbid")

    symbol: str = Field(
        description="1 to 32 of `A-Z 0-9 . - = ^ / : _`; lower case is raised.",
        examples=["AAPL", "EURUSD=X", "BTC-USD"],
    )
    timestamp: Timestamp = Field(
        description="RFC 3339 with an offset; kept in UTC microseconds, further digits are cut.",
        examples=["2026-11-20T14:30:00.123456Z"],
    )
    price: Price | None = Field(default=None, description="Last price; the mid of bid and ask if absent.")
    bid: Price | None = Field(default=None, description="Best bid.")
    ask: Price | None = Field(default=None, description="Best ask.")
    bid_size: Size | None = Field(default=None, description="Size at the best bid, 0 or more.")
    ask_size: Size | None = Field(default=None, description="Size at the best ask, 0 or more.")
    volume: Size | None = Field(default=None, description="Volume traded with this quote, 0 or more.")
    source: str | None = Field(default=None, description="Where the quote came from; up to 255 characters.")


FIELDS: Final = tuple(Quote.model_fields)
#: Other names that a field may have in a request, as feeds and data frames call it.
ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ticker": "symbol",
        "time": "timestamp",
        "ts": "timestamp",
        "last": "price",
        "last_price": "price",
        "bid_price": "bid",
        "ask_price": "ask",
    }
)


class Limits(msgspec.Struct, frozen=True):
    """What one request may carry. Times are aware; a row outside [`oldest`, `newest`] is refused.

    `max_bytes` bounds what a body may become by decompression.
    """

    oldest: datetime = EPOCH
    newest: datetime | None = None
    max_rows: int = 1_000_000
    max_days: int = 366
    max_bytes: int = 64 * 2**20

    @classmethod
    def at(
        cls,
        now: datetime,
        *,
        retention: timedelta | None = None,
        chunk: timedelta = timedelta(days=1),
        max_rows: int = 1_000_000,
        max_days: int = 366,
        max_bytes: int = 64 * 2**20,
    ) -> Self:
        """Limits at `now`: sixty seconds ahead at most, and not so old that retention is about to drop it.

        Rollups refresh down to the retention horizon plus one chunk, so rows are taken from one chunk above
        that: whatever is acknowledged is in the bars before its raw rows are dropped.
        """
        oldest = EPOCH if retention is None else max(EPOCH, now - retention + 2 * chunk)
        return cls(oldest, now + timedelta(seconds=60), max_rows, max_days, max_bytes)


class Terms(msgspec.Struct, frozen=True):
    """On which terms the quotes of one request are taken.

    A row that breaks a rule aborts the request or is skipped; of equal keys in the request the last one wins, or with
    `on_conflict="ignore"` the first, and with `"error"` the later ones are refused. `precision` is the unit of
    timestamps that are whole numbers, counted from 1970-01-01T00:00Z; without it they are refused.
    """

    limits: Limits = Limits()
    on_error: OnError = "abort"
    on_conflict: OnConflict = "update"
    precision: Precision | None = None


class Receipt(msgspec.Struct, frozen=True):
    """What became of one request: `received = inserted + updated + unchanged + superseded + len(rejected)`.

    `unchanged` rows were stored already, or lost to a stored one under `on_conflict=ignore`; `superseded`
    rows lost to another row of the same key in the same batch. `rounded` counts prices kept to 8 decimals,
    `crossed` counts quotes whose bid is above their ask; both are stored.
    """

    received: int
    inserted: int
    updated: int
    unchanged: int
    superseded: int
    rounded: int
    crossed: int
    rejected: list[Rejection]


def microseconds(moment: datetime) -> int:
    """Microseconds from 1970-01-01T00:00Z to an aware moment."""
    return (moment - EPOCH) // TICK


def instant(count: int, precision: Precision = "us") -> datetime:
    """The instant, in UTC, that many units after 1970-01-01T00:00Z; nanoseconds are cut to microseconds.

    Raises:
        OverflowError: it lies outside of the calendar.
    """
    return EPOCH + timedelta(microseconds=count * 10**6 // _PER_SECOND[precision])


def rfc3339(moment: datetime) -> str:
    """UTC with a `Z`, without an empty fraction."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat()
    return text + "Z"


def normal_symbol(symbol: str) -> str:
    """The stored form of a symbol.

    Raises:
        InvalidRequest: it cannot be the name of a stored symbol.
    """
    upper = symbol.strip().upper()
    if not symbol.isascii() or not re.fullmatch(SYMBOL_PATTERN, upper):  # not ascii: some letters rise to ASCII ones
        raise InvalidRequest("A symbol is 1 to 32 of A-Z 0-9 . - = ^ / : _", parameter="symbols")
    return upper


_INTERVAL: Final = re.compile(r"([1-9][0-9]{0,6})(s|m|h|d|w|M)")
_ALIAS: Final = re.compile(r"([1-9][0-9]{0,6})?(sec|min|hour|day|week|month)s?", re.IGNORECASE)
_ALIAS_UNITS: Final = {"sec": "s", "min": "m", "hour": "h", "day": "d", "week": "w", "month": "M"}
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_LONGEST: Final = timedelta(days=3660)


@dataclass(frozen=True, slots=True)
class Interval:
    """The width of a bar: `15m`, `1h`, `1w`, `3M`; aliases `15Min`, `1Hour`, `1Day`, `1Month`.

    Bars of seconds to weeks are counted from Monday 2000-01-03T00:00Z, months from 2000-01, so that equal
    intervals always give equal bars, whatever the range asked for.
    """

    count: int
    unit: Literal["s", "m", "h", "d", "w", "M"]

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
            raise InvalidRequest(
                "An interval is a whole number and one of s m h d w M, as in 15m, 1h or 3M.", parameter="interval"
            )
        interval = cls(count, unit)  # type: ignore[arg-type]
        if interval.width > _LONGEST:
            raise InvalidRequest("An interval is at most ten years.", parameter="interval")
        return interval

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
