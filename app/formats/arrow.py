"""Arrow IPC stream: one schema, then record batches, whose columns become a batch as they are.

Invariant: nothing is decompressed before its size is known to be within the limit, and nothing is computed on
before it is validated, since an offset or an index that points elsewhere would read other memory.
"""

import struct
from typing import Final

import pyarrow as pa

from app.batch import Batch
from app.errors import BodyTooLarge, MalformedBody
from app.formats import columns
from app.model import Terms

#: Record batches and dictionaries in one body.
_MESSAGES: Final = 10_000
_READING: Final = pa.ipc.IpcReadOptions(use_threads=False)
#: The message format of Arrow 1.0; that before it compresses in a way of its own.
_V5: Final = 4


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of an Arrow IPC stream.

    Raises:
        MalformedBody: no such stream, or one of other columns.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    try:
        with pa.BufferReader(body) as source, pa.ipc.open_stream(source, options=_READING) as reader:
            fields = columns.fields_of_schema(reader.schema)
            _check_sizes(body, terms)
            table = pa.Table.from_batches(list(reader), reader.schema)
            end = source.tell()
        columns.validate(table, terms.limits.max_bytes)
    except (pa.ArrowException, OSError, UnicodeDecodeError, struct.error) as error:
        raise MalformedBody("Not an Arrow IPC stream, or a damaged one.") from error
    if end != len(body):
        raise MalformedBody("There are bytes after the end of the Arrow IPC stream.")
    return columns.decode(table, fields, terms)


def _check_sizes(body: bytes, terms: Terms) -> None:
    """Refuse a stream with too many rows, or too large when decompressed, by what its messages say of themselves."""
    rows = size = count = 0
    messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(body))
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

    def __init__(self, buffer: pa.Buffer) -> None:
        self._bytes = memoryview(buffer)

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
