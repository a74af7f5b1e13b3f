"""CSV: a header line that names the columns, then a quote a line; RFC 4180, an empty cell is an absent value.

A row with more or fewer cells than the header is refused like any other bad row.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from app.errors import BodyTooLarge, MalformedBody
from app.quote.batch import Batch
from app.quote.rows import Misshapen
from app.quote.tables import fields_of
from app.quote.terms import Terms

_BOM: Final = b"\xef\xbb\xbf"
_HEADER_BYTES: Final = 4096
#: What RFC 4180 allows quotes to be; the fast reader takes them anywhere, and reads `"1"2` as 12.
_WELL_QUOTED: Final = r'\A(?:(?:[^",\r\n]*|"(?:[^"]|"")*")(?:[,\r\n]|\z))*\z'
#: How the standard library's reader says that something follows a closing quote.
_STRAY_QUOTE: Final = "',' expected after"
#: The longest cell of the standard library's reader.
_CELL: Final = 131_072


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of a CSV body; row numbers count the lines after the header that are not empty.

    Raises:
        MalformedBody: the header is no header of quotes, or the text is no CSV.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    start = len(_BOM) if body.startswith(_BOM) else 0
    end = body.find(b"\n", start, start + _HEADER_BYTES)
    first = body[start : end if end >= 0 else start + _HEADER_BYTES]
    names = _header(first)
    fields = fields_of([name for place, name in enumerate(names) if place or name])
    start += len(first) + 1
    lines = body.count(b"\n", start) + body.count(b"\r", start) - body.count(b"\r\n", start)
    if lines > 2 * terms.limits.max_rows + 1:  # even if every other one is empty
        raise BodyTooLarge(f"{lines} lines in one body; at most {terms.limits.max_rows} quotes are taken.")
    if lines < terms.limits.max_rows and start < len(body):
        table = _table(body, start, names, fields)
        if table is not None and (batch := Batch.from_table(table, terms, given=fields)) is not None:
            return batch
    return Batch.from_rows(_rows(body, start, names, terms.limits.max_rows), terms)


def _header(line: bytes) -> list[str]:
    try:
        names = next(csv.reader([line.decode().rstrip("\r")], strict=True), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise MalformedBody("The first line is no CSV header in UTF-8.") from error
    if not names:
        raise MalformedBody("The first line, which names the columns, is empty.")
    return names


def _table(body: bytes, start: int, names: list[str], fields: Mapping[str, str]) -> pa.Table | None:
    """The columns of well-formed CSV as text; None if that cannot be."""
    if body.startswith(_BOM, start):  # no mark here but a letter, which the fast reader leaves out
        return None
    quoted = body.find(b'"', start) >= 0
    if quoted and not pc.match_substring_regex(pa.array([body[start:]], pa.binary()), _WELL_QUOTED)[0].as_py():
        return None
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(pa.py_buffer(body).slice(start)),
            arrow_csv.ReadOptions(use_threads=False, block_size=len(body) - start, column_names=names),
            arrow_csv.ParseOptions(newlines_in_values=quoted),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowException:
        return None
    table = table.select(list(fields.values())).rename_columns(list(fields))
    if any((pc.max(pc.binary_length(column)).as_py() or 0) > _CELL for column in table.columns):
        return None
    return table


def _rows(body: bytes, start: int, names: list[str], most: int) -> list[Any]:
    """The rows one by one: their fields, or that they are misshapen."""
    stream = io.BytesIO(body)
    stream.seek(start)
    rows: list[Any] = []
    # What is no UTF-8 becomes lone surrogates, by which its row is refused and no other.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    while True:
        line = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # A quote that is closed on another line than it opens on may have taken rows between them.
            if not str(error).startswith(_STRAY_QUOTE) or reader.line_num != line + 1:
                raise MalformedBody(f"Not CSV: {error} in row {len(rows)} or after.") from error
            # The reader is at the end of that line, so the rows after it are told apart.
            rows.append(Misshapen("row-misquoted", "A quote within a quoted cell is doubled."))
            continue
        if cells is None:
            return rows
        if not cells:
            continue
        if len(rows) == most:
            raise BodyTooLarge(f"More than {most} quotes in one batch.")
        if len(cells) != len(names):
            detail = f"The row has {len(cells)} cells, the header {len(names)}."
            rows.append(Misshapen("row-ragged", detail))
        else:
            rows.append({name: cell or None for name, cell in zip(names, cells, strict=True) if name})
