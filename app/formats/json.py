"""JSON: `{"quotes": [...]}` or a bare array of quotes.

Numbers keep every digit they were written with: a price never passes through binary floating point.
"""

import json
from decimal import Decimal
from typing import Any, Final

import msgspec

from app.errors import MalformedBody
from app.model import Batch, Limits, OnConflict, OnError

DECODER: Final = msgspec.json.Decoder(float_hook=Decimal)


def parse(text: bytes) -> Any:
    """Python values of a JSON text, numbers with a fraction as `Decimal`.

    The fast parser refuses `NaN`, `Infinity` and lone surrogates by byte position; the standard library reads
    them, so that the rules can refuse them by row and field instead.

    Raises:
        MalformedBody: it is no JSON.
    """
    try:
        return DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass  # say where, or find that only a literal is to blame
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=Decimal)
    except json.JSONDecodeError as error:
        raise MalformedBody(f"Not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from error
    except UnicodeDecodeError as error:
        raise MalformedBody(f"Not JSON: not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise MalformedBody("Not JSON that this service reads: nested too deeply.") from error
    except ValueError as error:  # a whole number with thousands of digits
        raise MalformedBody("Not JSON that this service reads: a number has too many digits.") from error


def decode(body: bytes, limits: Limits, on_error: OnError, on_conflict: OnConflict) -> tuple[Batch, str]:
    """The batch of a JSON body.

    Raises:
        MalformedBody: no JSON, or neither of the two shapes.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    document = parse(body)
    if isinstance(document, dict):
        if document.keys() != {"quotes"}:
            raise MalformedBody('The object has one member, "quotes".', pointer="/")
        rows, pointer = document["quotes"], "/quotes"
    else:
        rows, pointer = document, ""
    if not isinstance(rows, list):
        raise MalformedBody('The body is an array of quotes, or an object {"quotes": [...]}.', pointer=pointer or "/")
    return Batch.from_rows(rows, limits, on_error=on_error, on_conflict=on_conflict, pointer=pointer), pointer
