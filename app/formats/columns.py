"""Columns as a client names and types them, shared by the formats that have columns.

Invariant: what a column becomes here is never larger than the limit of a body, however small it came.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from app.batch import Batch, check_size
from app.errors import BodyTooLarge, MalformedBody
from app.model import ALIASES, FIELDS, Terms, instant

PRICES: Final = frozenset({"price", "bid", "ask"})
SIZES: Final = frozenset({"bid_size", "ask_size", "volume"})
#: Digits of decimals by their bits. Arrow lets larger scales pass, and then writes no number that Python reads.
_DIGITS: Final = {32: 9, 64: 18, 128: 38, 256: 76}


def fields_of(names: Sequence[str]) -> dict[str, str]:
    """The columns by the field that each holds, in their order.

    Raises:
        MalformedBody: a column is unknown, a field comes twice, or one that every quote needs is missing.
    """
    fields: dict[str, str] = {}
    for name in names:
        field = ALIASES.get(name, name)
        if field not in FIELDS:
            raise MalformedBody(f"The column {name[:64]!a} is unknown; a quote has {', '.join(FIELDS)}.")
        if field in fields:
            raise MalformedBody(f"The columns {fields[field]} and {name} are both the {field}.")
        fields[field] = name
    for field in ("symbol", "timestamp"):
        if field not in fields:
            raise MalformedBody(f"The column {field} is missing.")
    return fields


def fields_of_schema(schema: pa.Schema) -> dict[str, str]:
    """The columns of a schema by the field that each holds.

    Raises:
        MalformedBody: as `fields_of`, or a column is of a type that its field cannot be.
    """
    fields = fields_of(schema.names)
    for field, column in zip(fields, schema, strict=True):
        if not _is_taken(field, column.type):
            raise MalformedBody(f"The column {column.name} is of a type that a {field} cannot have.")
    return fields


def is_text(kind: pa.DataType) -> bool:
    """Whether a column is text, in whatever layout."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_taken(field: str, kind: pa.DataType) -> bool:
    if is_text(kind) or pa.types.is_null(kind):
        return True
    if field == "timestamp":
        # A zone whose name is no UTF-8 raises here, not later.
        return bool(pa.types.is_integer(kind) or (pa.types.is_timestamp(kind) and kind.tz != ""))
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    number = number or (pa.types.is_decimal(kind) and abs(kind.scale) <= _DIGITS[kind.bit_width])
    return bool(number) and field in PRICES | SIZES


def decode(table: pa.Table, fields: Mapping[str, str], terms: Terms) -> Batch:
    """The batch of a table that is validated, whose columns are those of `fields_of_schema` in their order.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    check_size(len(table), terms)
    columns = {field: _written_out(column) for field, column in zip(fields, table.columns, strict=True)}
    batch = Batch.from_table(pa.table(columns), terms, given=fields)
    if batch is not None:
        return batch
    values = [_values(field, column) for field, column in columns.items()]
    names = list(fields.values())
    return Batch.from_rows([dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)], terms)


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
    return pc.sum(pc.binary_length(chunk.dictionary.cast(pa.string())).take(chunk.indices)).as_py() or 0


def _written_out(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text in the plain layout, in which no two rows share one."""
    if pa.types.is_dictionary(column.type):
        texts = [chunk.dictionary.cast(pa.string()).take(chunk.indices) for chunk in column.chunks]
        return pa.chunked_array(texts, pa.string())
    return column.cast(pa.string()) if pa.types.is_string_view(column.type) else column


def _values(field: str, column: pa.ChunkedArray) -> list[Any]:
    """Python values, in which a fault can be seen and named."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return [_moment(count, kind) for count in column.cast(pa.int64()).to_pylist()]
    if field in PRICES and pa.types.is_floating(kind):
        column = column.cast(pa.string())  # the shortest text that reads back as this number
    values: list[Any] = column.to_pylist()
    return values


def _moment(count: int | None, kind: pa.TimestampType) -> Any:
    if count is None:
        return None
    try:
        moment = instant(count, kind.unit)
    except OverflowError:
        moment = datetime.max.replace(tzinfo=UTC) if count > 0 else datetime.min.replace(tzinfo=UTC)
    return moment if kind.tz is not None else moment.replace(tzinfo=None)
