"""Parquet: the whole file in the body.

Invariant: nothing is read before the metadata and the header of every page say that it is within the limits; what
they say, the reader is held to.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from app.batch import Batch, check_size
from app.errors import BodyTooLarge, MalformedBody
from app.formats import columns
from app.model import Terms

#: Items of a list in the metadata, and bytes of a text there; row groups and pages that are looked at.
_ITEMS: Final = 10_000
_TEXT: Final = 2**20
#: Encodes a text by what it shares with the one before: a few bytes may stand for any number of long texts.
_DELTA_BYTE_ARRAY: Final = 7
#: Where a page header holds what is asked of it, by ids of fields; kinds of Thrift fields, and structs within structs.
_SIZE: Final = (2,)
_COMPRESSED: Final = (3,)
_ENCODING: Final = (5, 2)
_ENCODING_V2: Final = (8, 4)
_I32: Final = 5
_STRUCT: Final = 12
_DEPTH: Final = 3


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of a Parquet file.

    Raises:
        MalformedBody: no such file, or one of other columns.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    try:
        schema = _open(body, []).schema_arrow
        columns.fields_of_schema(schema)
        # Texts that repeat stay a dictionary, until it is known how long they are written out.
        file = _open(body, [column.name for column in schema if columns.is_text(column.type)])
        _check_sizes(body, file.metadata, terms)
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MalformedBody("Not a Parquet file, or a damaged one.") from error
    return columns.decode(table, columns.fields_of_schema(table.schema), terms)


def _open(body: bytes, dictionaries: list[str]) -> pq.ParquetFile:
    return pq.ParquetFile(
        pa.BufferReader(body),
        read_dictionary=dictionaries,
        pre_buffer=False,
        thrift_string_size_limit=_TEXT,
        thrift_container_size_limit=_ITEMS,
    )


def _check_sizes(body: bytes, metadata: pq.FileMetaData, terms: Terms) -> None:
    """Refuse a file with too many rows or too large when decompressed, by its metadata and the headers of pages."""
    if str(metadata.created_by).lower().startswith("parquet-cpp "):  # as others read on beyond the end it states
        raise MalformedBody("The Parquet file is of a writer from before 2020, which misstated lengths.")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if sum(rows) != metadata.num_rows or any(count < 0 for count in rows):
        raise MalformedBody("The Parquet file contradicts itself about its rows.")
    check_size(metadata.num_rows, terms)
    size = pages = 0
    for group in groups:
        for column in (group.column(i) for i in range(group.num_columns)):
            for page in _pages(body, column):
                pages += 1
                size += page.size
                if size > terms.limits.max_bytes:
                    raise BodyTooLarge.beyond(terms.limits.max_bytes)
                if pages > _ITEMS:
                    raise MalformedBody(f"The Parquet file has more than {_ITEMS} pages.")
                if page.encoding == _DELTA_BYTE_ARRAY:
                    raise MalformedBody(
                        "The Parquet encoding DELTA_BYTE_ARRAY is not taken; PLAIN and dictionaries are."
                    )


class _Page(NamedTuple):
    """What the header of a page says: bytes when decompressed, and how values are encoded."""

    size: int
    encoding: int


def _pages(body: bytes, column: pq.ColumnChunkMetaData) -> Iterator[_Page]:
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    end = start + column.total_compressed_size
    if not 0 <= start <= end <= len(body):
        raise MalformedBody("A column of the Parquet file lies outside of it.")
    reader = _Thrift(body, start, end)
    while reader.position < end:
        header = reader.struct()
        size, compressed = header.get(_SIZE, 0), header.get(_COMPRESSED, 0)
        if not (0 <= size < 2**31 and 0 <= compressed < 2**31):
            raise MalformedBody("A page of the Parquet file has no size.")
        reader.position += compressed
        yield _Page(size, header.get(_ENCODING, header.get(_ENCODING_V2, 0)))


class _Thrift:
    """Reads page headers, which pyarrow keeps to itself: structs of Thrift's compact protocol."""

    def __init__(self, content: bytes, start: int, end: int) -> None:
        self._content = content
        self._end = end
        self.position = start

    def struct(self, path: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
        """The 32-bit numbers of the struct that begins here, by the ids of the fields that lead to them."""
        found: dict[tuple[int, ...], int] = {}
        field = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            field = field + delta if delta else self._number()
            if kind == _I32:
                found[*path, field] = self._number()
            elif kind == _STRUCT and len(path) < _DEPTH:
                found |= self.struct((*path, field))
            else:
                self._skip(kind)
        return found

    def _skip(self, kind: int) -> None:
        match kind:
            case 1 | 2:  # true and false
                pass
            case 3:
                self._byte()
            case 4 | 5 | 6:
                self._number()
            case 7:
                self._take(8)
            case 8:  # bytes
                self._take(self._varint())
            case _:  # none of Parquet's page headers holds lists, maps or structs as deep
                raise MalformedBody("A page of the Parquet file has no header.")

    def _take(self, count: int) -> None:
        self.position += count
        if self.position > self._end:
            raise MalformedBody("A page of the Parquet file breaks off.")

    def _byte(self) -> int:
        self._take(1)
        return self._content[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:  # noqa: PLR2004  the last byte has no high bit
                return value
            if shift > 63:  # noqa: PLR2004
                raise MalformedBody("A page of the Parquet file has no header.")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
