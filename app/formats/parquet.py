"""Parquet: the whole file in the body.

Invariant: nothing is read before the footer and the header of every page are within the limits. Both are read here,
because pyarrow keeps pages to itself, and because a footer that it cannot make sense of ends the process when its
columns are asked for.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import BodyTooLarge, MalformedBody
from app.quote import tables
from app.quote.batch import Batch, check_size
from app.quote.fields import is_added
from app.quote.terms import Terms

_MAGIC: Final = b"PAR1"
#: The footer has about a kilobyte for each row group.
_FOOTER_BYTES: Final = 2**20
_PAGES: Final = 10_000
#: Encodes a text by what it shares with the one before: a few bytes may stand for any number of long texts.
_DELTA_BYTE_ARRAY: Final = 7
#: Physical types of values without a length of their own, and the bytes of the widest decimal.
_BYTE_ARRAY: Final = 6
_FIXED: Final = 7
_WIDEST: Final = 32
#: Kinds of values in Thrift's compact protocol.
_I32: Final = 5
_I64: Final = 6
_BINARY: Final = 8
_LIST: Final = 9
_STRUCT: Final = 12
_DEPTH: Final = 10
#: By the id and the kind of a field, its value.
_Struct = dict[tuple[int, int], Any]


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of a Parquet file.

    Raises:
        MalformedBody: no such file, or one of other columns.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    _check_sizes(body, terms)
    try:
        schema = pq.ParquetFile(pa.BufferReader(body)).schema_arrow
        meant = [column.name for column in schema if not is_added(column.name)]
        tables.fields_of_schema(schema)
        # Texts that repeat stay a dictionary, until it is known how long they are written out.
        texts = [column.name for column in schema if tables.is_text(column.type)]
        file = pq.ParquetFile(pa.BufferReader(body), read_dictionary=texts, pre_buffer=False)
        table = file.read(meant, use_threads=False)
        tables.validate(table, terms.limits.max_bytes)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MalformedBody("Not a Parquet file, or a damaged one.") from error
    return tables.decode(table, terms)


def _check_sizes(body: bytes, terms: Terms) -> None:
    """Refuse a file with too many rows, or too large when decompressed."""
    rows = pages = size = 0
    try:
        footer = _footer(body)
        # As others read on beyond the end that it states.
        if footer.get((6, _BINARY), b"").lower().startswith(b"parquet-cpp "):
            raise MalformedBody("The Parquet file is of a writer from before 2020, which misstated lengths.")
        _check_schema(footer[2, _LIST])
        for group in footer[4, _LIST]:
            rows += _count(group[3, _I64])
            for chunk in group[1, _LIST]:
                for page in _pages(body, chunk[3, _STRUCT]):
                    pages += 1
                    size += page.size
                    if size > terms.limits.max_bytes:
                        raise BodyTooLarge.beyond(terms.limits.max_bytes)
                    if pages > _PAGES:
                        raise MalformedBody(f"The Parquet file has more than {_PAGES} pages.")
                    if _DELTA_BYTE_ARRAY in page.encodings:
                        raise MalformedBody("The Parquet encoding DELTA_BYTE_ARRAY is not taken.")
        if footer[3, _I64] != rows:
            raise MalformedBody("The Parquet file contradicts itself about its rows.")
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise MalformedBody("Not a Parquet file, or a damaged one.") from error
    check_size(rows, terms)


def _check_schema(elements: list[_Struct]) -> None:
    """Refuse values of any length but texts, which alone are read as a dictionary where they repeat."""
    for element in elements:
        kind, logical = element.get((1, _I32)), element.get((10, _STRUCT))
        text = element.get((6, _I32)) == 0 if logical is None else (1, _STRUCT) in logical
        if (kind == _BYTE_ARRAY and not text) or (kind == _FIXED and element.get((2, _I32), 0) > _WIDEST):
            name = element.get((4, _BINARY), b"")[:64].decode("ascii", "replace")
            raise MalformedBody(f"The column {name} is of a type that no field of a quote can have.")


def _footer(body: bytes) -> _Struct:
    length = int.from_bytes(body[-8:-4], "little")
    start = len(body) - 8 - length
    if not (body.startswith(_MAGIC) and body.endswith(_MAGIC) and start >= len(_MAGIC)):
        raise ValueError
    if length > _FOOTER_BYTES:
        raise MalformedBody(f"The footer of the Parquet file has more than {_FOOTER_BYTES} bytes.")
    return _Thrift(body, start, start + length).struct()


class _Page(NamedTuple):
    """What the header of a page says: bytes when decompressed, and how values are encoded."""

    size: int
    encodings: set[int | None]


def _pages(body: bytes, chunk: _Struct) -> Iterator[_Page]:
    """The pages of a column chunk, given its metadata."""
    start = _count(chunk[9, _I64])
    dictionary = chunk.get((11, _I64), 0)
    if 0 < dictionary < start or not start:  # a chunk without a row has a dictionary alone
        start = dictionary
    end = start + _count(chunk[7, _I64])
    if end > len(body):
        raise ValueError
    reader = _Thrift(body, start, end)
    while reader.position < end:
        header = reader.struct()
        size = _count(header[2, _I32])
        reader.position += _count(header[3, _I32])
        plain, v2 = header.get((5, _STRUCT), {}), header.get((8, _STRUCT), {})
        yield _Page(size, {plain.get((2, _I32)), v2.get((4, _I32))})


def _count(number: int) -> int:
    if number < 0:
        raise ValueError
    return number


class _Thrift:
    """Reads Thrift's compact protocol; raises ValueError where it is none."""

    def __init__(self, content: bytes, start: int, end: int) -> None:
        self._content = content
        self._end = end
        self.position = start

    def struct(self, depth: int = 0) -> _Struct:
        """The struct that begins here. Fields come in their order: of one that came twice two readers may see two."""
        found: _Struct = {}
        field = 0
        while head := self._byte():
            before = field
            field = field + (head >> 4) if head >> 4 else self._number(16)
            if field <= before:
                raise ValueError
            kind = head & 15
            found[field, kind] = kind == 1 if kind < 3 else self._value(kind, depth + 1)  # noqa: PLR2004  booleans
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEPTH:
            raise ValueError
        match kind:
            case 1 | 2 | 3:  # in a list also a boolean is a byte
                return self._byte()
            case 4 | 5 | 6:
                return self._number({4: 16, 5: 32, 6: 64}[kind])
            case 7:
                return self._take(8)
            case 8:
                return self._take(self._varint(32))
            case 9 | 10:
                head = self._byte()
                count = head >> 4 if head >> 4 < 15 else self._varint(32)  # noqa: PLR2004
                return [self._value(head & 15, depth + 1) for _ in range(count)]
            case 12:
                return self.struct(depth)
            case _:  # Parquet has no maps
                raise ValueError

    def _take(self, count: int) -> bytes:
        self.position += count
        if self.position > self._end:
            raise ValueError
        return self._content[self.position - count : self.position]

    def _byte(self) -> int:
        return self._take(1)[0]

    def _varint(self, bits: int) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:  # noqa: PLR2004  the last byte lacks the high bit
                return value & ((1 << bits) - 1)
            if shift >= 70:  # noqa: PLR2004  ten bytes
                raise ValueError

    def _number(self, bits: int) -> int:
        value = self._varint(bits)
        return (value >> 1) ^ -(value & 1)
