"""CSV: a header line that names the columns, then a quote a line; RFC 4180, an empty cell is an absent value.

A row with more or fewer cells than the header is refused like any other bad row.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from app.errors import BodyTooLarge, MalformedBody
from app.formats.texts import count
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
#: How it says that a cell is longer than `_CELL`.
_LONG_CELL: Final = "field larger than"
_CELL: Final = 131_072
#: What is kept of one, longer than anything that a field can be.
_KEPT: Final = 2000
_QUOTED_OR_PLAIN: Final = re.compile(r'"((?:[^"]++|"")*+)"|([^",\r\n]*+)')


def thorough(body: bytes, terms: Terms) -> Batch:
    """The batch of a CSV body, looked at row by row; row numbers count the lines after the header that are not empty.

    Raises:
        MalformedBody: the header is no header of quotes, or the text is no CSV.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    names, _, start = _columns(body)
    return Batch.from_rows(_rows(body, start, names, terms.limits.max_rows), terms)


def quick(body: bytes, terms: Terms) -> Batch | None:
    """The batch of a CSV body in which everything is as it should be; None if something might not.

    Raises:
        MalformedBody, InvalidQuotes, InvalidRequest, BodyTooLarge: as `thorough`.
    """
    names, fields, start = _columns(body)
    lines = count(body, b"\n")
    if returns := count(body, b"\r"):
        lines += returns - body.count(b"\r\n")
    if lines > 2 * terms.limits.max_rows + 2:  # even if every other one is empty
        raise BodyTooLarge(f"{lines} lines in one body; at most {terms.limits.max_rows} quotes are taken.")
    if lines > terms.limits.max_rows or start >= len(body):
        return None
    table = _table(body, start, names, fields)
    return None if table is None else Batch.from_table(table, terms, given=fields)


def _columns(body: bytes) -> tuple[list[str], dict[str, str], int]:
    """The names of the columns, those by the field that each holds, and where the first row begins."""
    start = len(_BOM) if body.startswith(_BOM) else 0
    end = body.find(b"\n", start, start + _HEADER_BYTES)
    first = body[start : end if end >= 0 else start + _HEADER_BYTES]
    names = _header(first)
    return names, fields_of([name for place, name in enumerate(names) if place or name]), start + len(first) + 1


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
    return table.select(list(fields.values())).rename_columns(list(fields))


def _rows(body: bytes, start: int, names: list[str], most: int) -> Iterator[Any]:
    """The rows one by one: their fields, or that they are misshapen."""
    stream = io.BytesIO(body)
    stream.seek(start)
    row = 0
    # What is no UTF-8 becomes lone surrogates, by which its row is refused and no other.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    lines = _Lines(text)
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num
        lines.record.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if str(error).startswith(_LONG_CELL):
                cells = _shortened("".join(lines.record), row, names)
            # A quote that is closed on another line than it opens on may have taken rows between them.
            elif not str(error).startswith(_STRAY_QUOTE) or reader.line_num != line + 1:
                raise MalformedBody(f"Not CSV: {error} in row {row} or after.") from error
            else:
                # The reader is at the end of that line, so the rows after it are told apart.
                yield Misshapen("row-misquoted", "A quote within a quoted cell is doubled.")
                row += 1
                continue
        if cells is None:
            return
        if not cells:
            continue
        if row == most:
            raise BodyTooLarge(f"More than {most} quotes in one batch.")
        if len(cells) != len(names):
            yield Misshapen("row-ragged", f"The row has {len(cells)} cells, the header {len(names)}.")
        else:
            yield {name: cell or None for name, cell in zip(names, cells, strict=True) if name}
        row += 1


class _Lines:
    """The lines of a text, and those of them that the row has so far."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.record: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            self.record.append(line)
            yield line


def _shortened(record: str, row: int, names: list[str]) -> list[str]:
    """The cells of a row that has one too long for the reader, as much of each as a field refuses.

    Raises:
        MalformedBody: nobody knows where the row ends, because a quote is not closed on its line.
    """
    cells: list[str] = []
    place = 0
    while match := _QUOTED_OR_PLAIN.match(record, place):
        quoted, plain = match.groups()
        cells.append(plain[:_KEPT] if quoted is None else quoted[:_KEPT].replace('""', '"'))
        place = match.end()
        if record[place : place + 1] != ",":
            break
        place += 1
    if record[place:].strip("\r\n"):
        column = names[len(cells) - 1] if len(cells) <= len(names) else len(cells)
        raise MalformedBody(
            f"Not CSV: a cell of more than {_CELL} characters in row {row}, column {column}; is its quote closed?"
        )
    return cells
