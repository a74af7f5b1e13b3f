"""NDJSON: one quote a line; empty lines count as rows to nobody and are passed over.

A line that is no JSON is a row like any other: refused, and with `on_error=skip` harmless to the rest.
"""

from io import BytesIO
from typing import Any, Final

import msgspec

from app.errors import BodyTooLarge, MalformedBody
from app.formats import json
from app.formats.texts import count, has_values
from app.quote.batch import Batch
from app.quote.rows import Row
from app.quote.terms import Terms

_TYPED: Final = msgspec.json.Decoder(Row, float_hook=str)


def thorough(body: bytes, terms: Terms) -> Batch:
    """The batch of an NDJSON body, looked at line by line; row numbers count the lines that are not empty.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    return Batch.from_rows((_line(line) for line in BytesIO(body) if line.strip()), terms)


def quick(body: bytes, terms: Terms) -> Batch | None:
    """The batch of an NDJSON body in which everything is as it should be; None if something might not.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    json.check_parts(body, terms)
    lines = count(body, b"\n")
    if lines > 2 * terms.limits.max_rows + 1:  # even if every other line is empty
        raise BodyTooLarge(f"More lines than {terms.limits.max_rows} quotes have; that is the most in one batch.")
    try:
        rows = _TYPED.decode_lines(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    if not _is_one_a_line(body, lines - body.endswith(b"\n"), len(rows)):
        return None
    return Batch.of(rows, terms, has_values(body, commas=len(rows), colons=0))


def _is_one_a_line(body: bytes, ends: int, count: int) -> bool:
    """Whether so many objects are a line each, as the fast parser takes them wherever they break or meet.

    Between `}` and `{` nothing but the end of an object can be, so that no object has a line end of these within.
    """
    return ends == count - 1 and any(ends == body.count(met) for met in (b"}\n{", b"}\r\n{"))


def _line(line: bytes) -> Any:
    try:
        return json.parse(line)
    except MalformedBody:
        return line  # no mapping, so the batch refuses it by its row
