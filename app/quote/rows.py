"""The ways into a batch by rows: a thorough one that says what is wrong with which row, and a fast one for a few.

Invariant: the fast way knows no faults: at anything unusual it raises `Unusual`, and what it takes means the same to
both.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any, Final, NamedTuple

import msgspec
import pyarrow as pa

from app.clock import parts
from app.quote import rules
from app.quote.columns import SCHEMA, Unusual, instants_of
from app.quote.fields import (
    ALIASES,
    BY_NAME,
    COLUMNS,
    DECIMAL,
    FIELDS,
    NAMES,
    PRICES,
    REQUIRED,
    SIZES,
    TEXT_LENGTH,
    TEXTS,
    is_added,
)
from app.quote.rules import Checks, Refused, Rule
from app.quote.terms import Terms

#: A quote as it arrives: shape checked, rules not; numbers with a fraction are the text they were written in.
Row: Final = msgspec.defstruct(
    "Row",
    [
        (field.name, str)
        if field.kind == "symbol"
        else (field.name, Any)
        if field.required
        else (field.name, str | None if field.kind == "text" else Any, None)
        for field in FIELDS
    ],
    forbid_unknown_fields=True,
    gc=False,
)
#: The values of a row in the order of `SCHEMA`, the last one its position in the request.
Record = tuple[Any, ...]
#: A batch up to this long is checked row by row in 5 us each; columns cost 900 us whatever their length.
FEW: Final = 150

#: Rows that are looked at closely at a time: a row takes 2 kB meanwhile.
_AT_ONCE: Final = 4096

#: Takes the values of each field out of rows. Written out by field, as one would by hand: 0.1 us a row, where getters
#: take 0.2.
by_field: Final[Callable[[Sequence[Any]], dict[str, list[Any]]]] = eval(  # noqa: S307  the text is made of field names
    "lambda rows: {" + ", ".join(f"{name!r}: [row.{name} for row in rows]" for name in NAMES) + "}"
)

_KNOWN: Final = frozenset(NAMES)
_values: Final[Callable[[Any], tuple[Any, ...]]] = attrgetter(*NAMES)
key: Final = itemgetter(0, 1, 2)
#: Positions in a record: an instant takes two of them.
_AT: Final = {name: SCHEMA.get_field_index(name) for name in COLUMNS.names}
_PRICES_AT: Final = tuple(_AT[name] for name in PRICES)
_SIZES_AT: Final = tuple(_AT[name] for name in SIZES)
_TEXTS_AT: Final = tuple(_AT[name] for name in TEXTS)
_BID, _ASK = _AT["bid"], _AT["ask"]
_PLAIN_INSTANT: Final = re.compile(
    r"([1-9][0-9]{3}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?)((?<=\.[0-9]{6})[0-9]{1,3}|)"
    r"(Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_ZERO: Final = Decimal(0)


class Misshapen(NamedTuple):
    """A row that its format could not make fields of, with the code and the sentence that refuse it, and the field."""

    code: str
    detail: str
    field: str = ""


class Few(NamedTuple):
    """Rows that keep every rule, in the order of the request; how many of their values were not null."""

    records: list[Record]
    zeros: int
    crossed: int
    values: int


def in_columns(records: Sequence[Record]) -> pa.RecordBatch:
    """The columns of records."""
    if not records:
        return pa.RecordBatch.from_pylist([], schema=SCHEMA)
    columns = zip(*records, strict=True)
    return pa.RecordBatch.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


# --- the fast way ---


def few(rows: Iterable[Any], terms: Terms) -> Few:
    """Records of rows whose shape is known.

    Raises:
        Unusual: something about a row is.
    """
    oldest, newest = terms.limits.oldest, terms.limits.newest
    records = []
    zeros = crossed = values_read = 0
    try:
        for position, row in enumerate(rows):
            symbol, instant, *values = _values(row)
            moment, nanos = _moment(instant, terms)
            symbol = rules.normal(symbol)
            if moment < oldest or moment > newest or symbol is None:
                raise Unusual
            record = [symbol, moment, nanos, *values, position]
            count, none = _read_numbers(record, signed=terms.prices == "signed")
            zeros += none
            for at in _TEXTS_AT:
                if (value := record[at]) is not None:
                    count += 1
                    if len(value) > TEXT_LENGTH or not value.isascii() or "\0" in value:
                        raise Unusual
            values_read += count + len(REQUIRED)
            bid, ask = record[_BID], record[_ASK]
            crossed += bid is not None and ask is not None and bid > ask
            records.append(tuple(record))
    except (ArithmeticError, ValueError) as error:
        raise Unusual from error
    return Few(records, zeros, crossed, values_read)


def _read_numbers(record: list[Any], *, signed: bool) -> tuple[int, int]:
    """Put decimals in the place of numbers and texts of them; how many, and how many prices were 0 for no side."""
    sides = zeros = sizes = 0
    for at in _PRICES_AT:
        if (value := record[at]) is not None:
            price = _number(value)
            if signed or price > _ZERO:
                sides += 1
                record[at] = price
            elif price == _ZERO:
                zeros += 1
                record[at] = None
            else:
                raise Unusual
    if not sides:
        raise Unusual
    for at in _SIZES_AT:
        if (value := record[at]) is not None:
            size = record[at] = _number(value)
            if size < _ZERO:
                raise Unusual
            sizes += 1
    return sides + zeros + sizes, zeros


def _moment(value: Any, terms: Terms) -> tuple[datetime, int]:
    if type(value) is str and (match := _PLAIN_INSTANT.fullmatch(value)):
        text, finer, offset = match.groups()
        moment = datetime.fromisoformat(text + offset)
        return (moment if offset == "Z" else moment.astimezone(UTC)), int(finer.ljust(3, "0")) if finer else 0
    if type(value) is int and terms.precision is not None:
        try:
            return parts(rules.instant(value, terms.precision))
        except Refused as error:
            raise Unusual from error
    raise Unusual


def _number(value: Any) -> Decimal:
    number = rules.plain(value)
    if number is None:
        raise Unusual
    return number


# --- the thorough way ---


def _are_sound(values: Iterable[Any]) -> bool:
    """Whether all are null or texts of ASCII, which hold nothing that can be refused here."""
    return all(value is None or (type(value) is str and value.isascii()) for value in values)


def read(given: Iterable[Any], checks: Checks) -> tuple[pa.RecordBatch, int]:
    """Columns of `SCHEMA`, of the rows whose values have the right types; how many rows were given.

    Rows are taken as they are needed, so that one that is made of a text does not wait for all others.
    """
    rows = iter(given)
    found: list[pa.RecordBatch] = []
    count = 0
    while part := list(islice(rows, _AT_ONCE)):
        found.append(_Reader(part, count, checks).build())
        count += len(part)
    return pa.concat_batches(found) if found else pa.RecordBatch.from_pylist([], schema=SCHEMA), count


class _Reader:
    """Turns a few rows of any values into columns, and refuses those whose values are of another type."""

    def __init__(self, rows: list[Any], first: int, checks: Checks) -> None:
        self._rows = rows
        self._first = first
        self._checks = checks

    def build(self) -> pa.RecordBatch:
        """Columns of `SCHEMA`."""
        keep = self._shaped()
        columns: dict[str, list[Any]] = {}
        faulty: set[int] = set()
        for name in NAMES:
            columns[name] = self._column(name, keep, faulty)
        if faulty:
            sound = [position for position, i in enumerate(keep) if i not in faulty]
            keep = [keep[position] for position in sound]
            columns = {name: [values[position] for position in sound] for name, values in columns.items()}
        arrays: list[pa.Array] = []
        for field in FIELDS:
            values = columns[field.name]
            if field.kind == "instant":
                arrays += instants_of(values)
            else:
                arrays.append(pa.array(values, DECIMAL if field.kind in {"price", "size"} else pa.string()))
        positions = pa.array([self._first + i for i in keep], pa.int32())
        return pa.RecordBatch.from_arrays([*arrays, positions], schema=SCHEMA)

    def _column(self, name: str, keep: list[int], faulty: set[int]) -> list[Any]:
        """The values of a field, None where one is absent or refused."""
        kind, required = BY_NAME[name].kind, name in REQUIRED
        precision = self._checks.terms.precision
        values = [self._rows[i].get(name) for i in keep]
        if kind in {"symbol", "text"} and not (required and None in values) and _are_sound(values):
            return values
        of_numbers = kind in {"price", "size"}
        found: list[Any] = []
        rounded: list[int] = []
        for i, given in zip(keep, values, strict=True):
            value, was_rounded, fault = None, False, None
            if of_numbers and (given is None or (value := rules.plain(given)) is not None):
                found.append(value)
                continue
            try:
                value, was_rounded = rules.read(kind, given, precision)
                fault = rules.MISSING if required and value is None else None
            except Refused as refusal:
                fault = refusal.rule
            if fault is not None:
                faulty.add(i)
                self._checks.refuse(self._first + i, name, fault)
            if was_rounded:
                rounded.append(self._first + i)
            found.append(value)
        self._checks.note("rounded", pa.array(rounded, pa.int32()))
        return found

    def _shaped(self) -> list[int]:
        """Positions of the rows that are objects with known fields only; their fields get the names we know."""
        if set(map(type, self._rows)) == {dict} and all(map(_KNOWN.issuperset, self._rows)):
            return list(range(len(self._rows)))
        keep = []
        for i, row in enumerate(self._rows):
            position = self._first + i
            if isinstance(row, Misshapen):
                self._checks.refuse(position, row.field, Rule(row.code, row.detail))
                continue
            if not isinstance(row, Mapping):
                self._checks.refuse(position, "", rules.NO_OBJECT)
                continue
            named = [name for name in row if not is_added(name)]
            given = {ALIASES.get(name, name): name for name in named}
            if (unknown := min((str(name) for name in given.keys() - _KNOWN), default=None)) is not None:
                rule = Rule("unknown-field", f"A quote has only the fields {', '.join(NAMES)}.")
                self._checks.refuse(position, unknown, rule)
            elif len(given) < len(named):
                twice = sorted(name for name in named if ALIASES.get(name) in named)
                twice = twice or sorted(name for name in named if given[ALIASES.get(name, name)] != name)
                self._checks.refuse(position, twice[0], Rule("field-twice", f"The {ALIASES[twice[0]]} is given twice."))
            else:
                if given.keys() != row.keys():
                    self._checks.given[position] = given
                    self._rows[i] = {name: row[alias] for name, alias in given.items()}
                keep.append(i)
        return keep
