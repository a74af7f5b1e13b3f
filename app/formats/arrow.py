"""Arrow IPC: one schema, then record batches, whose columns become a batch as they are.

A file (also called Feather) has its messages anywhere between two magic words, and a footer that says where; they are
read as the stream that they make up.

Invariant: nothing is decompressed before its size is known to be within the limit, and nothing is computed on
before it is validated, since an offset or an index that points elsewhere would read other memory.
"""

import struct
from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from app.errors import BodyTooLarge, MalformedBody
from app.quote import tables
from app.quote.batch import Batch
from app.quote.terms import Terms

#: Record batches and dictionaries in one body.
_MESSAGES: Final = 10_000
_READING: Final = pa.ipc.IpcReadOptions(use_threads=False)
#: The message format of Arrow 1.0; that before it compresses in a way of its own.
_V5: Final = 4
#: What a file begins and ends with.
_FILE: Final = b"ARROW1"


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of an Arrow IPC stream or file.

    Raises:
        MalformedBody: no such stream, or one of other columns.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    try:
        content = _stream_of(body) if body.startswith(_FILE) else pa.py_buffer(body)
        with pa.BufferReader(content) as source, pa.ipc.open_stream(source, options=_READING) as reader:
            tables.fields_of_schema(reader.schema)
            _check_sizes(content, terms)
            table = pa.Table.from_batches(list(reader), reader.schema)
            end = source.tell()
        tables.validate(table, terms.limits.max_bytes)
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise MalformedBody("Neither an Arrow IPC stream nor an Arrow file, or a damaged one.") from error
    if end != len(content):
        raise MalformedBody("There are bytes after the end of the Arrow IPC stream.")
    return tables.decode(table, terms)


def _stream_of(body: bytes) -> pa.Buffer:
    """The stream of a file: its schema, and the messages that its footer names, dictionaries first."""
    if not body.endswith(_FILE):
        raise struct.error
    with pa.ipc.open_file(pa.py_buffer(body), options=_READING) as reader:
        parts = [memoryview(reader.schema.serialize())]
    end = len(body) - len(_FILE) - 4
    content = memoryview(body)
    footer = content[end - _read("<I", content, end) : end]
    left = len(body)
    for start, size in _Metadata(footer).blocks():
        left -= size
        if min(start, size, left) < 0:  # a block that comes twice would make more of a body than was sent
            raise struct.error
        parts.append(content[start : start + size])
    return pa.py_buffer(b"".join(parts))


def _check_sizes(content: pa.Buffer, terms: Terms) -> None:
    """Refuse a stream with too many rows, or too large when decompressed, by what its messages say of themselves."""
    rows = size = count = 0
    messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(content))
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return
        count += 1
        if count > _MESSAGES:
            raise MalformedBody(f"The stream has more than {_MESSAGES} messages.")
        if message.type != "schema":
            length, claimed = _Metadata(message.metadata).claims(message.body)
            rows += length * (message.type == "record batch")
            size += claimed
        if rows > terms.limits.max_rows:
            raise BodyTooLarge(f"{rows} quotes or more in one batch; at most {terms.limits.max_rows} are taken.")
        if size > terms.limits.max_bytes:
            raise BodyTooLarge.beyond(terms.limits.max_bytes)


class _Metadata:
    """The little of a message's metadata, a flatbuffer, that pyarrow keeps to itself."""

    def __init__(self, buffer: pa.Buffer | memoryview) -> None:
        self._bytes = memoryview(buffer)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Where the messages are that the footer of a file names, and their bytes."""
        footer = self._read("<I", 0)
        for field in (2, 3):
            if not self._position(footer, field):
                continue
            vector = self._table(footer, field)
            for at in range(vector + 4, vector + 4 + 24 * self._read("<I", vector), 24):
                yield self._read("<q", at), self._read("<i", at + 8) + self._read("<q", at + 16)

    def claims(self, body: pa.Buffer) -> tuple[int, int]:
        """The rows of a record batch or dictionary, and the bytes of its buffers where they are compressed."""
        message = self._read("<I", 0)
        if self._number("<h", message, 0) != _V5:
            raise MalformedBody("The stream is in a format older than Arrow 1.0.")
        batch = self._table(message, 2)
        if self._number("<B", message, 1) == 2:  # noqa: PLR2004  a dictionary, which wraps a record batch
            batch = self._table(batch, 1)
        length = self._number("<q", batch, 0)
        if not self._position(batch, 3):
            return length, 0
        buffers = self._table(batch, 2)
        size = 0
        content = memoryview(body)
        for i in range(self._read("<I", buffers)):
            start, held = self._read("<q", buffers + 4 + 16 * i), self._read("<q", buffers + 12 + 16 * i)
            if held:
                # A compressed buffer begins with its length; -1 says that it was left as it is.
                claimed = _read("<q", content, start)
                size += held if claimed < 0 else claimed
        return length, size

    def _position(self, table: int, field: int) -> int:
        """Where a field of a table is; 0 if it is not there."""
        layout = table - self._read("<i", table)
        slot = 4 + 2 * field
        offset = self._read("<H", layout + slot) if slot < self._read("<H", layout) else 0
        return table + offset if offset else 0

    def _number(self, kind: str, table: int, field: int) -> int:
        position = self._position(table, field)
        return self._read(kind, position) if position else 0

    def _table(self, table: int, field: int) -> int:
        position = self._position(table, field)
        return position + self._read("<I", position)

    def _read(self, kind: str, position: int) -> int:
        return _read(kind, self._bytes, position)


def _read(kind: str, content: memoryview, position: int) -> int:
    if position < 0:
        raise struct.error
    found: int = struct.unpack_from(kind, content, position)[0]
    return found
