"""Arrow IPC: one schema, then record batches, whose columns become a batch as they are.

A file (also called Feather) has its messages anywhere between two magic words, and a footer that says where.

Invariant: nothing is computed on before it is validated, since an offset or an index that points elsewhere would read
other memory. What Arrow itself makes of bytes that were made to harm it, only a process apart may find out.
"""

from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from app.errors import BodyTooLarge, MalformedBody
from app.formats.memory import for_a_body_of
from app.quote import tables
from app.quote.batch import Batch, check_size
from app.quote.terms import Terms

#: Record batches in one body: each takes some time, however few rows it has.
_BATCHES: Final = 10_000
_READING: Final = pa.ipc.IpcReadOptions(use_threads=False)
#: What a file begins with.
_FILE: Final = b"ARROW1"


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of an Arrow IPC stream or file.

    Raises:
        MalformedBody: no such stream, or one of other columns.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    try:
        with for_a_body_of(terms.limits.max_bytes), pa.BufferReader(body) as source:
            if body.startswith(_FILE):
                with pa.ipc.open_file(source, options=_READING) as file:
                    table = _table(file.schema, map(file.get_batch, range(file.num_record_batches)), terms)
            else:
                with pa.ipc.open_stream(source, options=_READING) as stream:
                    table = _table(stream.schema, stream, terms)
                if source.tell() != len(body):
                    raise MalformedBody("There are bytes after the end of the Arrow IPC stream.")
            tables.validate(table, terms.limits.max_bytes)
    except pa.ArrowNotImplementedError as error:
        raise MalformedBody("The Arrow IPC stream or file uses a feature that is not read here.") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise MalformedBody("Neither an Arrow IPC stream nor an Arrow file, or a damaged one.") from error
    return tables.decode(table, terms)


def _table(schema: pa.Schema, batches: Iterator[pa.RecordBatch], terms: Terms) -> pa.Table:
    """All record batches, as long as they are within the limits."""
    tables.fields_of_schema(schema)
    found: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        found.append(batch)
        rows += len(batch)
        size += batch.get_total_buffer_size()
        check_size(rows, terms)
        if size > terms.limits.max_bytes:
            raise BodyTooLarge.beyond(terms.limits.max_bytes)
        if len(found) > _BATCHES:
            raise MalformedBody(f"The Arrow IPC stream or file has more than {_BATCHES} record batches.")
    return pa.Table.from_batches(found, schema)
