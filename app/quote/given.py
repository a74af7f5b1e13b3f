"""What a program hands over as quotes: a table of any library that speaks Arrow, or rows of many kinds.

Invariant: no more is taken out of a stream or a generator than a batch may carry, and whatever is handed over becomes a
batch under the same rules as a request, or is refused by a sentence: no value is guessed at.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sized
from datetime import datetime
from decimal import Decimal
from itertools import islice
from numbers import Integral, Real
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from app.clock import UNITS, Nanoseconds, nanoseconds
from app.errors import InvalidRequest
from app.quote import tables
from app.quote.batch import Batch, check_size
from app.quote.fields import NANOS
from app.quote.rows import Misshapen
from app.quote.terms import Terms


class Table(Protocol):
    """A table that speaks Arrow: of pyarrow, pandas, polars, duckdb, or a stream of its batches."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """A capsule with the stream."""


#: Rows that are mappings, or objects with the fields of a quote; or a table.
Quotes: TypeAlias = Iterable[Any] | Table

_PLAIN: Final = frozenset({type(None), str, int, float, bool, Decimal, datetime, Nanoseconds})
_MOST_NANOS: Final = 999
_WHAT: Final = "quotes is a list of mappings or objects with the fields of a quote, or a table that speaks Arrow."


def batch_of(quotes: Quotes, terms: Terms) -> Batch:
    """The batch of quotes of any kind.

    Rows are mappings, dataclasses, named tuples, models of pydantic, attrs or msgspec, records of a database, or
    stored quotes. A NaN, a NaT or an NA is an absent value; a float of 32 bits is its shortest text.

    Raises:
        InvalidQuotes: a row breaks a rule and `on_error` is `abort`.
        InvalidRequest: these are no quotes, a column is none of a quote, or too many distinct days.
        BodyTooLarge: too many rows.
    """
    if hasattr(quotes, "__arrow_c_stream__"):
        return tables.decode(_with_whole_instants(_table(quotes, terms)), terms)
    one = isinstance(quotes, (str, bytes, bytearray, memoryview)) or _fields(quotes) is not None
    if one or not isinstance(quotes, Iterable):
        raise InvalidRequest(_WHAT, parameter="quotes")
    if isinstance(quotes, Sized):
        check_size(len(quotes), terms)
    rows = list(islice(quotes, terms.limits.max_rows + 1))
    check_size(len(rows), terms)
    return Batch.from_rows([_row(row) for row in rows], terms)


# --- tables ---


def _table(given: Any, terms: Terms) -> pa.Table:
    if isinstance(given, Sized):
        check_size(len(given), terms)
    batches: list[pa.RecordBatch] = []
    count = 0
    try:
        stream = pa.RecordBatchReader.from_stream(given)
        for batch in stream:
            batches.append(batch)
            count += len(batch)
            check_size(count, terms)
        table = pa.Table.from_batches(batches, stream.schema)
        table.validate(full=True)  # text that is no UTF-8 among it
    except (pa.ArrowException, TypeError, ValueError, OverflowError, NotImplementedError) as error:
        # The library's words may have values in them.
        raise InvalidRequest(
            "The table cannot be read as Arrow: a column holds damaged values or several types, or it is none.",
            parameter="quotes",
        ) from error
    return table


def _with_whole_instants(table: pa.Table) -> pa.Table:
    """A table whose instants are in two columns, as stored quotes have them, with one; any other as it is."""
    names = table.column_names
    if names.count(NANOS) != 1 or names.count("timestamp") != 1:
        return table
    moments, nanos = table.column("timestamp"), table.column(NANOS)
    if not pa.types.is_timestamp(moments.type) or moments.type.tz is None or not pa.types.is_integer(nanos.type):
        return table
    ends = pc.min_max(nanos)
    if not 0 <= (ends["min"].as_py() or 0) <= (ends["max"].as_py() or 0) <= _MOST_NANOS:
        raise InvalidRequest(f"The column {NANOS} is 0 to {_MOST_NANOS}.", parameter="quotes")
    try:
        counts = pc.multiply_checked(moments.cast(pa.int64()), UNITS[moments.type.unit])
        whole = pc.add_checked(counts, nanos.cast(pa.int64())).cast(pa.timestamp("ns", "UTC"))
    except pa.ArrowInvalid as error:
        raise InvalidRequest("A timestamp lies outside of the years 1678 to 2261.", parameter="quotes") from error
    table = table.set_column(names.index("timestamp"), "timestamp", whole)
    return table.drop_columns([NANOS])


# --- rows ---


def _row(row: Any) -> Any:
    """The fields of a row by name, in values that the rules know; what has no fields as it is, to be refused."""
    fields = row if type(row) is dict else _fields(row)
    if fields is None:
        return row
    if not _PLAIN.issuperset(map(type, fields.values())):
        fields = {name: _plain(value) for name, value in fields.items()}
    return _with_whole_instant(fields)


def _fields(row: Any) -> dict[Any, Any] | None:
    """The fields of an object by name; None if it has none."""
    if isinstance(row, type):
        return None
    if isinstance(row, Mapping):
        return dict(row)
    if dataclasses.is_dataclass(row):
        return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if isinstance(row, msgspec.Struct):
        return msgspec.structs.asdict(row)
    if hasattr(row, "__attrs_attrs__"):
        return {field.name: getattr(row, field.name) for field in row.__attrs_attrs__}
    # Models of pydantic, named tuples and rows of SQLAlchemy, stored quotes.
    for method in ("model_dump", "_asdict", "to_dict"):
        if callable(found := getattr(row, method, None)) and isinstance(fields := found(), dict):
            return fields
    if hasattr(row, "keys") and hasattr(row, "__getitem__"):  # records of a database driver
        return dict(row)
    return None


def _plain(value: Any) -> Any:
    """A value of Python's own, None for a NaN, NaT or NA of another library; what is none of these as it is."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, Decimal):
        return value
    if kind.__name__ == "NAType":
        return None
    try:
        if bool(value != value):  # noqa: PLR0124  what is no number, or no time, says so by this
            return None
    except (TypeError, ValueError):  # an array says so of each of its values
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return str(value) if isinstance(value, Real) else value


def _with_whole_instant(quote: dict[Any, Any]) -> dict[Any, Any] | Misshapen:
    """A quote whose instant is in two parts, as it is stored, with one instant; any other as it is."""
    moment, nanos = quote.get("timestamp"), quote.get(NANOS)
    if NANOS not in quote or not isinstance(moment, datetime):
        return quote
    if type(nanos) is not int or not 0 <= nanos <= _MOST_NANOS:
        return Misshapen("timestamp-invalid", f"The field {NANOS} is a whole number from 0 to {_MOST_NANOS}.", NANOS)
    whole = {name: value for name, value in quote.items() if name != NANOS}
    if moment.utcoffset() is None:
        return whole  # refused by its row
    return whole | {"timestamp": Nanoseconds(nanoseconds(moment) + nanos)}
