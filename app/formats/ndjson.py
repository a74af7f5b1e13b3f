"""NDJSON: one quote a line; empty lines count as rows to nobody and are passed over.

A line that is no JSON is a row like any other: refused, and with `on_error=skip` harmless to the rest.
"""

from io import BytesIO
from typing import Any, Final

import msgspec

from app.batch import Batch, Row
from app.errors import MalformedBody
from app.formats import json
from app.model import Terms

_TYPED: Final = msgspec.json.Decoder(Row, float_hook=str)


def decode(body: bytes, terms: Terms) -> Batch:
    """The batch of an NDJSON body; row numbers count the lines that are not empty.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    json.check_parts(body, terms)
    try:
        rows = _TYPED.decode_lines(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass  # look closely, line by line
    else:
        if (batch := Batch.of(rows, terms)) is not None:
            return batch
    return Batch.from_rows([_line(line) for line in BytesIO(body) if line.strip()], terms)


def _line(line: bytes) -> Any:
    try:
        return json.parse(line)
    except MalformedBody:
        return line  # no mapping, so the batch refuses it by its row
