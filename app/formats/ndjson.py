"""NDJSON: one quote a line; empty lines count as rows to nobody and are passed over.

A line that is no JSON is a row like any other: refused, and with `on_error=skip` harmless to the rest.
"""

from typing import Any

import msgspec

from app.errors import MalformedBody
from app.formats import json
from app.model import Batch, Limits, OnConflict, OnError


def decode(body: bytes, limits: Limits, on_error: OnError, on_conflict: OnConflict) -> tuple[Batch, str]:
    """The batch of an NDJSON body; row numbers count the lines that are not empty.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    try:
        rows = json.DECODER.decode_lines(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        rows = [_line(line) for line in body.splitlines() if line.strip()]
    return Batch.from_rows(rows, limits, on_error=on_error, on_conflict=on_conflict), ""


def _line(line: bytes) -> Any:
    try:
        return json.parse(line)
    except MalformedBody:
        return line  # no mapping, so the batch refuses it by its row
