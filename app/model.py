"""The words of the domain: quote, batch, receipt, interval, and the rules that a quote must keep.

Invariant: a `Batch` holds only rows that keep every rule, sorted by (symbol, timestamp) with one row per key;
whatever was refused is listed beside them. Every format ends here, so every rule is written once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from types import GenericAlias
from typing import Annotated, Any, Final, Literal, Self, cast

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from app.errors import BodyTooLarge, InvalidQuotes, InvalidRequest, Rejection

OnConflict = Literal["update", "ignore", "error"]
Consistency = Literal["eventual", "strong"]
OnError = Literal["abort", "skip"]

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
_PRICES: Final = ("price", "bid", "ask")
_SIZES: Final = ("bid_size", "ask_size", "volume")
_PRICE_TICK: Final = Decimal("0.00000001")
_PRICE_LIMIT: Final = Decimal(10) ** 12
_ZERO: Final = pa.scalar(Decimal(0), pa.decimal128(20, 8))
_HALF: Final = pa.scalar(Decimal("0.5"), pa.decimal128(2, 1))
_NO_NUMBER: Final = object()
_PLAIN_INSTANT: Final = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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
# By column a row validates in 0.3 us where row by row it takes 0.7: one call of the validator a column.
_COLUMNS: Final[Mapping[str, TypeAdapter[list[Any]]]] = {
    name: TypeAdapter(cast("type[list[Any]]", GenericAlias(list, (info.rebuild_annotation(),))))
    for name, info in Quote.model_fields.items()
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may carry. Times are aware; a row outside [`oldest`, `newest`] is refused."""

    oldest: datetime = _EPOCH
    newest: datetime | None = None
    max_rows: int = 1_000_000
    max_days: int = 366

    @classmethod
    def at(
        cls,
        now: datetime,
        *,
        retention: timedelta | None = None,
        chunk: timedelta = timedelta(days=1),
        max_rows: int = 1_000_000,
        max_days: int = 366,
    ) -> Self:
        """Limits at `now`: sixty seconds ahead at most, and not so old that retention is about to drop it.

        Rollups refresh down to the retention horizon plus one chunk, so rows are taken from one chunk above
        that: whatever is acknowledged is in the bars before its raw rows are dropped.
        """
        oldest = _EPOCH if retention is None else max(_EPOCH, now - retention + 2 * chunk)
        return cls(oldest, now + timedelta(seconds=60), max_rows, max_days)


@dataclass(frozen=True, slots=True)
class Batch:
    """Valid quotes of one request, sorted by (symbol, timestamp), one row per key.

    `rows` has the columns of `SCHEMA`; `index[i]` is the position of row i in the request.
    `received = len(rows) + superseded + len(rejected)`.
    """

    rows: pa.RecordBatch
    index: pa.Array
    received: int
    superseded: int = 0
    rounded: int = 0
    crossed: int = 0
    rejected: list[Rejection] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes held by the columns."""
        return int(self.rows.nbytes)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        limits: Limits | None = None,
        *,
        on_error: OnError = "abort",
        on_conflict: OnConflict = "update",
        pointer: str = "",
    ) -> Self:
        """Check rows (mappings with the fields of `Quote`) and gather them into columns.

        Of equal keys in one batch the last wins, or the first with `on_conflict="ignore"`; with `"error"`
        the later ones are refused. `pointer` is the JSON pointer of the array that holds the rows.

        Raises:
            InvalidQuotes: a row breaks a rule and `on_error` is `abort`.
            InvalidRequest: no rows, or too many distinct days.
            BodyTooLarge: too many rows.
        """
        limits = limits or Limits()
        if not rows:
            raise InvalidRequest("The batch holds no quotes.", pointer=pointer or "/")
        if len(rows) > limits.max_rows:
            raise BodyTooLarge(f"{len(rows)} quotes in one batch; at most {limits.max_rows} are taken.")
        builder = _Builder(rows, limits, pointer)
        table = builder.build()
        table, superseded = builder.unique(table, on_conflict)
        rejected = builder.rejections()
        if rejected and on_error == "abort":
            raise InvalidQuotes(rejected, len(rows))
        _check_days(table.column("timestamp"), limits.max_days)
        return cls(
            rows=table.select(SCHEMA.names),
            index=table.column("index"),
            received=len(rows),
            superseded=superseded,
            rounded=builder.rounded,
            crossed=pc.sum(pc.greater(table.column("bid"), table.column("ask"))).as_py() or 0,
            rejected=rejected,
        )


def _typed(name: str, values: list[Any]) -> list[Any] | pa.Array:
    """A column of values of the field's type; raises pydantic's ValidationError with positions."""
    if name == "timestamp" and (instants := _instants(values)) is not None:
        return instants
    if name in _SIZES and bool in set(map(type, values)):  # for pydantic a boolean is a number
        values = [_NO_NUMBER if isinstance(value, bool) else value for value in values]
    return _COLUMNS[name].validate_python(values)


def _instants(values: list[Any]) -> pa.Array | None:
    """Instants of texts in the plain form of RFC 3339; None if any is not, for pydantic to look at.

    Arrow takes 0.15 us a row with the check of the form, pydantic and the way back to Arrow 0.5 us.
    """
    try:
        texts = pa.array(values, pa.string())
        if texts.null_count or not pc.all(pc.match_substring_regex(texts, _PLAIN_INSTANT)).as_py():
            return None
        return texts.cast(SCHEMA.field("timestamp").type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        return None


class _Builder:
    """Turns the rows of one request into columns and collects what is wrong with each row, first fault first."""

    def __init__(self, rows: Sequence[Any], limits: Limits, pointer: str) -> None:
        self._rows = rows
        self._limits = limits
        self._pointer = pointer
        self._faults: dict[int, Rejection] = {}
        self.rounded = 0

    def rejections(self) -> list[Rejection]:
        return [self._faults[i] for i in sorted(self._faults)]

    def _refuse(self, index: int, name: str, code: str, detail: str) -> None:
        where = f"{self._pointer}/{index}" + (f"/{_escape(name)}" if name else "")
        self._faults.setdefault(index, Rejection(index, where, code, detail))

    def build(self) -> pa.RecordBatch:
        """Columns of `SCHEMA` and `index`, of the rows that keep every rule."""
        keep = self._shaped()
        while True:
            valid: dict[str, list[Any] | pa.Array] = {}
            faulty: set[int] = set()
            rows = self._rows if len(keep) == len(self._rows) else [self._rows[i] for i in keep]
            for name in FIELDS:
                try:
                    valid[name] = _typed(name, [row.get(name) for row in rows])
                except ValidationError as error:
                    for fault in error.errors(include_url=False, include_input=False):
                        position = int(fault["loc"][0])
                        faulty.add(position)
                        self._refuse(keep[position], name, *_explain(fault, missing=name not in rows[position]))
            if not faulty:
                break
            keep = [i for position, i in enumerate(keep) if position not in faulty]
        arrays: list[pa.Array] = []
        for field_ in SCHEMA:
            values = valid[field_.name]
            if isinstance(values, pa.Array):
                arrays.append(values)
            elif field_.name in _PRICES:
                arrays.append(self._prices(field_.name, values, keep))
            elif field_.type == pa.string():
                arrays.append(self._texts(field_.name, values, keep))
            else:
                arrays.append(pa.array(values, field_.type))
        batch = pa.RecordBatch.from_arrays(
            [*arrays, pa.array(keep, pa.int32())], schema=SCHEMA.append(pa.field("index", pa.int32()))
        )
        return self._ruled(batch)

    def _shaped(self) -> list[int]:
        """Positions of the rows that are objects with known fields only."""
        known = frozenset(FIELDS)
        if set(map(type, self._rows)) == {dict} and all(map(known.issuperset, self._rows)):
            return list(range(len(self._rows)))
        keep = []
        for i, row in enumerate(self._rows):
            if not isinstance(row, Mapping):
                self._refuse(i, "", "not-an-object", "A quote is a JSON object with the fields of a quote.")
            elif unknown := sorted(str(key) for key in row.keys() - known):
                self._refuse(i, unknown[0], "unknown-field", f"A quote has only the fields {', '.join(FIELDS)}.")
            else:
                keep.append(i)
        return keep

    def _prices(self, name: str, values: list[Decimal | None], keep: list[int]) -> pa.Array:
        try:
            return pa.array(values, pa.decimal128(20, 8))
        except pa.ArrowInvalid:
            pass  # some value needs rounding or does not fit: look at each
        exact: list[Decimal | None] = []
        for position, value in enumerate(values):
            fitted = value
            if value is not None:
                if abs(value) >= _PRICE_LIMIT:
                    self._refuse(keep[position], name, "price-out-of-range", "A price is below 10^12.")
                    fitted = None
                else:
                    fitted = value.quantize(_PRICE_TICK, rounding=ROUND_HALF_UP)
                    self.rounded += fitted != value
                    if fitted >= _PRICE_LIMIT:
                        self._refuse(keep[position], name, "price-out-of-range", "A price is below 10^12.")
                        fitted = None
            exact.append(fitted)
        return pa.array(exact, pa.decimal128(20, 8))

    def _texts(self, name: str, values: list[str | None], keep: list[int]) -> pa.Array:
        try:
            return pa.array(values, pa.string())
        except UnicodeEncodeError:
            pass  # pydantic lets lone surrogates through in Python strings: find them
        sound: list[str | None] = []
        for position, value in enumerate(values):
            lone = value is not None and any("\ud800" <= letter <= "\udfff" for letter in value)
            if lone:
                self._refuse(keep[position], name, "not-unicode", "A string is valid Unicode, without lone surrogates.")
            sound.append(None if lone else value)
        return pa.array(sound, pa.string())

    def _ruled(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Apply the rules of value, fill missing prices with the mid, and keep the rows that pass."""
        symbols = batch.column("symbol").dictionary_encode()
        names = pc.ascii_upper(symbols.dictionary)
        self._check(
            batch, pc.match_substring_regex(names, SYMBOL_PATTERN).take(symbols.indices),
            "symbol", "symbol-invalid", "A symbol is 1 to 32 of A-Z 0-9 . - = ^ / : _",
        )  # fmt: skip
        times = batch.column("timestamp")
        if self._limits.newest is not None:
            self._check(
                batch, pc.less_equal(times, pa.scalar(self._limits.newest, times.type)),
                "timestamp", "timestamp-in-future", "The timestamp lies more than 60 seconds ahead.",
            )  # fmt: skip
        oldest = self._limits.oldest
        self._check(
            batch, pc.greater_equal(times, pa.scalar(oldest, times.type)),
            "timestamp", "timestamp-too-old",
            "The timestamp lies before 1970." if oldest == _EPOCH
            else f"The timestamp is older than retention keeps; the oldest taken is {rfc3339(oldest)}.",
        )  # fmt: skip
        for name in _PRICES:
            self._check(
                batch, pc.greater(batch.column(name), _ZERO),
                name, "price-not-positive", "A price is greater than zero, also after rounding to 8 decimals.",
            )  # fmt: skip
        for name in _SIZES:
            self._check(
                batch, pc.greater_equal(batch.column(name), 0), name, "size-negative", "A size is zero or more."
            )
        sources = batch.column("source").dictionary_encode()
        sound = pc.and_not(
            pc.less_equal(pc.utf8_length(sources.dictionary), SOURCE_LENGTH),
            pc.match_substring(sources.dictionary, "\0"),
        )
        self._check(
            batch, sound.take(sources.indices),
            "source", "source-invalid", f"A source is at most {SOURCE_LENGTH} characters, without NUL.",
        )  # fmt: skip
        price = batch.column("price")
        if price.null_count:
            mid = pc.round(
                pc.multiply(pc.add(batch.column("bid"), batch.column("ask")), _HALF), 8, "half_towards_infinity"
            ).cast(price.type)
            price = pc.coalesce(price, mid)
            self._check(
                batch, pc.is_valid(price),
                "price", "price-missing", "A quote has a price, or both bid and ask.",
            )  # fmt: skip
        batch = batch.set_column(0, batch.schema.field("symbol"), names.take(symbols.indices))
        batch = batch.set_column(2, batch.schema.field("price"), price)
        if not self._faults:
            return batch
        faulty = pa.array(sorted(self._faults), pa.int32())
        return batch.filter(pc.invert(pc.is_in(batch.column("index"), value_set=faulty)))

    def _check(self, batch: pa.RecordBatch, passed: pa.Array, name: str, code: str, detail: str) -> None:
        """Refuse the rows where `passed` is false; a null is an absent value and passes."""
        if pc.all(passed, min_count=0).as_py():
            return
        for index in batch.column("index").filter(pc.invert(passed)).to_pylist():
            self._refuse(index, name, code, detail)

    def unique(self, batch: pa.RecordBatch, on_conflict: OnConflict) -> tuple[pa.RecordBatch, int]:
        """Sort by key and keep one row of each key; the count of rows that another one replaced."""
        batch = batch.take(
            pc.sort_indices(
                batch, sort_keys=[("symbol", "ascending"), ("timestamp", "ascending"), ("index", "ascending")]
            )
        )
        if len(batch) < 2:  # noqa: PLR2004  one row has no twin
            return batch, 0
        same = pc.and_(
            pc.equal(batch.column("symbol")[1:], batch.column("symbol")[:-1]),
            pc.equal(batch.column("timestamp")[1:], batch.column("timestamp")[:-1]),
        )
        repeats = pc.sum(same).as_py() or 0
        if not repeats:
            return batch, 0
        # `same[i]` says that row i and row i + 1 share a key.
        if on_conflict == "update":
            keep = pa.concat_arrays([pc.invert(same), pa.array([True])])
            return batch.filter(keep), repeats
        later = pa.concat_arrays([pa.array([False]), same])
        if on_conflict == "error":
            for index in batch.column("index").filter(later).to_pylist():
                self._refuse(index, "timestamp", "duplicate-key", "An earlier quote of the batch has the same key.")
            repeats = 0
        return batch.filter(pc.invert(later)), repeats


def _check_days(times: pa.Array, limit: int) -> None:
    days = len(pc.unique(pc.floor_temporal(times, unit="day")))
    if days > limit:
        raise InvalidRequest(f"The batch spans {days} distinct days; at most {limit} are taken in one request.")


def _escape(token: str) -> str:
    """A JSON pointer token (RFC 6901, section 3), printable and short."""
    printable = token.encode("ascii", "backslashreplace").decode() if not token.isprintable() else token
    return printable[:64].replace("~", "~0").replace("/", "~1")


def _explain(fault: ErrorDetails, *, missing: bool) -> tuple[str, str]:
    """Code and sentence for a pydantic error, without an echo of the input."""
    if missing:
        return "field-missing", "The field is required."
    match fault["type"]:
        case "timezone_aware":
            return "timestamp-naive", "A timestamp carries an offset, as in 2026-11-20T14:30:00Z."
        case "finite_number":
            return "not-finite", "A number is finite."
        case kind if kind.startswith(("datetime", "timestamp", "date")):
            return "timestamp-invalid", "A timestamp is RFC 3339, as in 2026-11-20T14:30:00.123456Z."
        case _:
            return "wrong-type", fault["msg"] + "."


@dataclass(frozen=True, slots=True)
class Receipt:
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

    @classmethod
    def of(
        cls, batch: Batch, *, inserted: int, updated: int, unchanged: int, conflicts: Sequence[Rejection] = ()
    ) -> Self:
        """The receipt of a written batch; `conflicts` are rows refused by the table under `on_error=skip`."""
        rejected = sorted([*batch.rejected, *conflicts], key=lambda r: r.index)
        return cls(
            batch.received, inserted, updated, unchanged, batch.superseded, batch.rounded, batch.crossed, rejected
        )


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
