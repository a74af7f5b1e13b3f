"""JSON: `{"quotes": [...]}` or a bare array of quotes.

Numbers keep every digit they were written with: a price never passes through binary floating point.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import msgspec

from app.errors import BodyTooLarge, MalformedBody
from app.formats.texts import count, has_values
from app.quote.batch import Batch, check_size
from app.quote.fields import NAMES
from app.quote.rows import Misshapen, Row
from app.quote.rules import NUMBER_LENGTH, Numeral
from app.quote.terms import Terms

_Rows: Final = msgspec.defstruct("_Rows", [("quotes", list[msgspec.Raw])], forbid_unknown_fields=True, gc=False)
_Body: Final = msgspec.defstruct("_Body", [("quotes", list[Row])], forbid_unknown_fields=True, gc=False)  # type: ignore[valid-type]

#: Reads what is as it should be, 1.2 us a quote with all checks; `parse` and `Batch.from_rows` take twice that.
_TYPED: Final = msgspec.json.Decoder(_Body | list[Row], float_hook=str)  # type: ignore[valid-type]
#: Finds rows and leaves them as texts: all values of a batch at once take 1 kB a row.
_ROWS: Final = msgspec.json.Decoder(_Rows | list[msgspec.Raw])
_ANY: Final = msgspec.json.Decoder(float_hook=Numeral)


def check_parts(body: bytes, terms: Terms) -> None:
    """Refuse a text of more values than the longest batch has, before memory is spent on them.

    64 MiB of `{},` would be 1.4 GB. A body in which as many quotes would have no room is not looked at: it takes
    60 MB at most, and to count takes 4 % of the time.

    Raises:
        BodyTooLarge: it has.
    """
    most = terms.limits.max_rows
    if len(body) <= len('{"symbol":"","timestamp":""},') * most:
        return
    # Some times more than there can be, because these characters may also stand in texts.
    if count(body, b"{") + count(body, b"[") > 4 * most + 2 or count(body, b",") > 2 * len(NAMES) * most:
        raise BodyTooLarge(f"More values than {most} quotes have; that is the most in one batch.")


def parse(text: bytes) -> Any:
    """Python values of a JSON text, numbers with a fraction as the texts they are written in.

    An object with two values of one name becomes `Misshapen`. The fast parser does not see that, and it refuses `NaN`,
    `Infinity`, lone surrogates and thousands of digits by byte position; the standard library reads them, so that the
    rules can refuse them by row and field instead.

    Raises:
        MalformedBody: it is no JSON.
    """
    try:
        document = _ANY.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass  # say where, or find that only a literal is to blame
    else:
        if text.count(b'":') == _members(document):
            return document
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_float=Numeral, parse_constant=Numeral, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        raise MalformedBody(f"Not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from error
    except UnicodeDecodeError as error:
        raise MalformedBody(f"Not JSON: not UTF-8 at byte {error.start}.") from error
    except RecursionError as error:
        raise MalformedBody("Not JSON that this service reads: nested too deeply.") from error


def _members(document: Any) -> int:
    """How many members objects have where they should be: in a quote, in an array of quotes, or around that."""
    if isinstance(document, dict):
        return len(document) + sum(_members(value) for value in document.values() if isinstance(value, list))
    return sum(len(row) for row in document if isinstance(row, dict)) if isinstance(document, list) else 0


def _object(members: list[tuple[str, Any]]) -> dict[str, Any] | Misshapen:
    found: dict[str, Any] = {}
    for name, value in members:
        if found.get(name) is not None:
            return Misshapen("field-twice", "The field has two values.", name)
        found[name] = value
    return found


def _whole(written: str) -> int | Numeral:
    """A whole number; if it is too long for one it stays as it is, and the rules refuse it by row and field."""
    return int(written) if len(written) <= NUMBER_LENGTH else Numeral(written)


def quick(body: bytes, terms: Terms) -> Batch | None:
    """The batch of a JSON body in which everything is as it should be; None if something might not.

    Raises:
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    check_parts(body, terms)
    try:
        typed = _TYPED.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    rows, pointer = (typed, "") if isinstance(typed, list) else (typed.quotes, "/quotes")
    return Batch.of(rows, terms, has_values(body, commas=1, colons=len(pointer) > 0), pointer=pointer)


def thorough(body: bytes, terms: Terms) -> Batch:
    """The batch of a JSON body, looked at row by row.

    Raises:
        MalformedBody: no JSON, or neither of the two shapes.
        InvalidQuotes, InvalidRequest, BodyTooLarge: as `Batch.from_rows`.
    """
    with suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError, MalformedBody):
        rows = _ROWS.decode(body)
        rows, pointer = (rows, "") if isinstance(rows, list) else (rows.quotes, "/quotes")
        # What is in no row would be missed, as a second array of quotes.
        if body.count(b'":') == sum(bytes(row).count(b'":') for row in rows) + (len(pointer) > 0):
            return Batch.from_rows(_parsed(rows, terms), terms, pointer=pointer)
    return _whole_document(body, terms)


def _parsed(rows: list[msgspec.Raw], terms: Terms) -> Iterator[Any]:
    check_size(len(rows), terms)
    return (parse(bytes(row)) for row in rows)


def _whole_document(body: bytes, terms: Terms) -> Batch:
    document = parse(body)
    if isinstance(document, (dict, Misshapen)):
        if isinstance(document, Misshapen) or document.keys() != {"quotes"}:
            raise MalformedBody('The object has one member, "quotes".', pointer="/")
        given, pointer = document["quotes"], "/quotes"
    else:
        given, pointer = document, ""
    if not isinstance(given, list):
        raise MalformedBody('The body is an array of quotes, or an object {"quotes": [...]}.', pointer=pointer or "/")
    return Batch.from_rows(given, terms, pointer=pointer)
