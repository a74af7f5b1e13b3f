"""Columns as a client names and types them, shared by the formats that have columns.

Invariant: what a column becomes here is never larger than the limit of a body, however small it came.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from app.clock import UNITS, Nanoseconds
from app.errors import BodyTooLarge, MalformedBody
from app.quote.batch import Batch, check_size
from app.quote.columns import without_nan
from app.quote.fields import ALIASES, BY_NAME, NAMES, NUMBERS, REQUIRED, is_added
from app.quote.terms import Terms

#: Digits of decimals by their bits. Arrow lets larger scales pass, and then writes no number that Python reads.
_DIGITS: Final = {32: 9, 64: 18, 128: 38, 256: 76}
#: Rows that become values of Python at a time.
_AT_ONCE: Final = 4096


def fields_of(names: Sequence[str]) -> dict[str, str]:
    """The columns by the field that each holds, in their order, but for those that a data frame's library added.

    Raises:
        MalformedBody: a column is unknown, a field comes twice, or one that every quote needs is missing.
    """
    fields: dict[str, str] = {}
    for name in names:
        field = ALIASES.get(name, name)
        if is_added(name):
            continue
        if field not in NAMES:
            raise MalformedBody(f"The column {name[:64]!a} is unknown; a quote has {', '.join(NAMES)}.")
        if field in fields:
            raise MalformedBody(f"The columns {fields[field]} and {name} are both the {field}.")
        fields[field] = name
    for field in REQUIRED:
        if field not in fields:
            raise MalformedBody(f"The column {field} is missing.")
    return fields


def fields_of_schema(schema: pa.Schema) -> dict[str, str]:
    """The columns of a schema by the field that each holds.

    Raises:
        MalformedBody: as `fields_of`, or a column is of a type that its field cannot be.
    """
    fields = fields_of(schema.names)
    for field, name in fields.items():
        if not _is_taken(field, schema.field(name).type):
            raise MalformedBody(f"The column {name} is of a type that the field {field} cannot have.")
    return fields


def is_text(kind: pa.DataType) -> bool:
    """Whether a column is text, of whatever length."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_taken(field: str, kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_text(kind) or pa.types.is_null(kind):
        return True
    of_time = BY_NAME[field].kind == "instant"
    if of_time and pa.types.is_timestamp(kind):
        return bool(kind.tz != "")  # a zone whose name is no UTF-8 raises here, not later
    # Of half a float Arrow gives no shortest text.
    number = pa.types.is_integer(kind) or (pa.types.is_floating(kind) and not pa.types.is_float16(kind))
    number = number or (pa.types.is_decimal(kind) and abs(kind.scale) <= _DIGITS[kind.bit_width])
    return bool(number) and (of_time or field in NUMBERS)


def decode(table: pa.Table, terms: Terms) -> Batch:
    """The batch of a table that is validated, and whose schema passes `fields_of_schema`.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    check_size(len(table), terms)
    fields = fields_of_schema(table.schema)
    columns = {field: _written_out(table.column(name)) for field, name in fields.items()}
    batch = Batch.from_table(pa.table(columns), terms, given=fields)
    if batch is not None:
        return batch
    return Batch.from_rows(_rows(pa.table(columns), list(fields.values())), terms)


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows one by one, under the names that the client gave."""
    for start in range(0, len(table), _AT_ONCE):
        values = [_values(column) for column in table.slice(start, _AT_ONCE).columns]
        for row in zip(*values, strict=True):
            yield dict(zip(names, row, strict=True))


def validate(table: pa.Table, limit: int) -> None:
    """Look at every value of a table that somebody else made, so that none leads to other memory.

    Raises:
        BodyTooLarge: rows share so much text that this takes minutes, or that it is too large when written out.
        pa.ArrowInvalid: the table is not valid.
    """
    table.validate()
    chunks = [chunk for column in table.columns for chunk in column.chunks]
    _sum((_looked_at(chunk) for chunk in chunks), limit)
    table.validate(full=True)
    _sum((_looked_up(chunk) for chunk in chunks if pa.types.is_dictionary(chunk.type)), limit)


def _sum(sizes: Iterable[int], limit: int) -> None:
    total = 0
    for size in sizes:
        total += size
        if total > limit:
            raise BodyTooLarge.beyond(limit)


def _looked_at(chunk: pa.Array) -> int:
    """Bytes that validation reads of an array besides its own: of a dictionary, and of what views show."""
    size = 0
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary
        size = chunk.get_total_buffer_size()
    if pa.types.is_string_view(chunk.type):
        _, views, *shown = chunk.buffers()
        if shown and views is not None:
            # A view is 16 bytes, the first four of them the length; that of a null may be anything.
            part = memoryview(views).cast("B")[16 * chunk.offset : 16 * (chunk.offset + len(chunk))]
            size += sum(length for length in part.cast("i")[::4] if length > 0)
    return size


def _looked_up(chunk: pa.DictionaryArray) -> int:
    """Bytes of the text of all rows."""
    if not is_text(chunk.type.value_type):
        return 0  # as many as the indices themselves have, within the limit of rows
    return pc.sum(pc.binary_length(chunk.dictionary.cast(pa.string())).take(chunk.indices)).as_py() or 0


def _written_out(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the plain layout, in which no two rows share a value."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        written = pa.string() if is_text(kind.value_type) else kind.value_type
        chunks = [chunk.dictionary.cast(written).take(chunk.indices) for chunk in column.chunks]
        return pa.chunked_array(chunks, written)
    return column.cast(pa.string()) if pa.types.is_string_view(kind) else column


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python values, in which a fault can be seen and named."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        counts = column.cast(pa.int64()).to_pylist()
        if kind.tz is None:
            return [None if count is None else datetime.min for count in counts]  # noqa: DTZ901  naive, and refused as such
        return [None if count is None else Nanoseconds(count * UNITS[kind.unit]) for count in counts]
    if pa.types.is_floating(kind):
        # The shortest text that reads back as this number.
        column = pa.chunked_array([without_nan(chunk).cast(pa.string()) for chunk in column.chunks], pa.string())
    values: list[Any] = column.to_pylist()
    return values
