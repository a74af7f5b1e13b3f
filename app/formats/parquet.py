"""Parquet: the whole file in the body.

Invariant: rows and sizes are within the limits by what the footer says before a page is read. What a file becomes that
says so falsely, only a process apart may find out.
"""

import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import BodyTooLarge, MalformedBody
from app.formats.memory import for_a_body_of
from app.quote import tables
from app.quote.batch import Batch, check_size
from app.quote.terms import Terms


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of a Parquet file.

    Raises:
        MalformedBody: no such file, or one of other columns.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    try:
        with for_a_body_of(terms.limits.max_bytes), pq.ParquetFile(pa.BufferReader(body), pre_buffer=False) as file:
            fields = tables.fields_of_schema(file.schema_arrow)
            _check_sizes(file.metadata, terms)
            table = file.read(list(fields.values()), use_threads=False)
            if table.get_total_buffer_size() > terms.limits.max_bytes:
                raise BodyTooLarge.beyond(terms.limits.max_bytes)
            tables.validate(table, terms.limits.max_bytes)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, pa.ArrowNotImplementedError) or "Not yet implemented" in str(error):
            raise MalformedBody("The Parquet file uses a feature that is not read here.") from error
        raise MalformedBody("Not a Parquet file, or a damaged one.") from error
    return tables.decode(table, terms)


def _check_sizes(footer: pq.FileMetaData, terms: Terms) -> None:
    """Refuse a file with too many rows, or too large when decompressed."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    check_size(max(footer.num_rows, sum(group.num_rows for group in groups)), terms)
    if sum(group.total_byte_size for group in groups) > terms.limits.max_bytes:
        raise BodyTooLarge.beyond(terms.limits.max_bytes)
