"""The rules of a quote, each once: what a value may be, with the code and the sentence that refuse it.

Values of rows are read one by one (`symbol`, `instant`, `exact`, `text`), columns are checked as wholes (`Checks`).
Invariant: no number reaches a library before its length and its exponent are bounded, and no sentence echoes a value.
"""

import decimal
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from app.clock import FIRST, Nanoseconds, NotAnInstant, Precision, microseconds, nanoseconds, of_epoch, parse, rfc3339
from app.errors import InvalidRequest, Rejection
from app.quote.fields import DECIMAL, PRECISION, PRICES, SCALE, SIZES, SYMBOL_LENGTH, TEXT_LENGTH, TEXTS, Kind
from app.quote.terms import Terms


class Rule(NamedTuple):
    """A rule by what refuses those who break it: a stable code and a sentence."""

    code: str
    detail: str


class Numeral(str):
    """A number as the text that it was written in, in a format that tells it from a text."""

    __slots__ = ()


class Refused(Exception):
    """A value that breaks a rule."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = Rule(code, detail)


MISSING: Final = Rule("field-missing", "The field is required.")
NO_OBJECT: Final = Rule("not-an-object", "A quote is a JSON object with the fields of a quote.")
SYMBOL: Final = Rule(
    "symbol-invalid",
    f"A symbol is 1 to {SYMBOL_LENGTH} of A-Z 0-9 . - = ^ / : _ & @ + $ # ! and spaces between them.",
)
FUTURE: Final = Rule("timestamp-in-future", "The timestamp lies more than 60 seconds ahead.")
UNIT: Final = Rule(
    "timestamp-unit",
    "Counted in the given precision the timestamp lies before 1990 or after 2262: is that its unit? A time that is"
    " meant is sent as RFC 3339.",
)
NOT_POSITIVE: Final = Rule("price-not-positive", "A price is above zero; prices=signed takes 0 and those below.")
NEGATIVE_SIZE: Final = Rule("size-negative", "A size is zero or more.")
NO_SIDE: Final = Rule("price-missing", "A quote has a price, a bid or an ask.")
LONG_TEXT: Final = Rule("text-invalid", f"A text is at most {TEXT_LENGTH} characters, without NUL.")
DUPLICATE: Final = Rule("duplicate-key", "An earlier quote of the batch has the same key.")
_NO_TIME: Final = Rule("timestamp-invalid", "A timestamp is RFC 3339, as in 2026-11-20T14:30:00.123456789Z.")
_NO_UNIT: Final = Rule("timestamp-invalid", "A number as timestamp needs a precision: s, ms, us or ns.")
_NOT_UNICODE: Final = Rule("not-unicode", "A string is valid Unicode, without lone surrogates.")
_NOT_FINITE: Final = Rule("not-finite", "A number is finite.")
#: The longest number that is read, in characters.
NUMBER_LENGTH: Final = 100
_TOO_LONG: Final = Rule("number-too-long", f"A number has at most {NUMBER_LENGTH} characters.")

#: Prices and sizes are below this.
LIMIT: Final = Decimal(10) ** (PRECISION - SCALE)
#: The same as a whole number, as one of a million digits takes minutes to become a decimal.
_WHOLE_LIMIT: Final = 10 ** (PRECISION - SCALE)
TICK: Final = Decimal(1).scaleb(-SCALE)
#: Rounding may change a value by a millionth of it at most.
ROUNDING: Final = 10**6
#: Nobody counts seconds to a time before this; whoever seems to has another unit in mind.
FIRST_COUNTED: Final = nanoseconds(datetime.fromisoformat("1990-01-01T00:00:00+00:00"))
LAST_COUNTED: Final = 2**63 - 1
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?)0*([0-9]+))?")
_EXPONENT_DIGITS: Final = 3
_PLAIN_NUMBER: Final = re.compile(r"-?[0-9]{1,16}(\.[0-9]{1,12})?([eE][+-]?[0-9]{1,2})?")
#: Refuses to round, and what has too many digits before the point.
_EXACT: Final = decimal.Context(prec=PRECISION, traps=[decimal.Inexact, decimal.InvalidOperation])
_WIDE: Final = decimal.Context(prec=2 * NUMBER_LENGTH, rounding=ROUND_HALF_UP)
_LEAST: Final = -1000
_LONE: Final = re.compile("[\ud800-\udfff]")
_LETTERS: Final = r"[A-Z0-9.\-=^/:_&@+$#!]+"
_SYMBOL: Final = re.compile(rf"{_LETTERS}(?: {_LETTERS})*")
_ZERO: Final = pa.scalar(Decimal(0), DECIMAL)
_ABSENT: Final = pa.scalar(None, DECIMAL)


# --- a value ---


@lru_cache(maxsize=65_536)
def _normal(text: str) -> str | None:
    upper = re.sub(" +", " ", text.strip().upper()) if len(text) <= 4 * SYMBOL_LENGTH else ""
    # Not ASCII: some letters rise to ASCII ones.
    return upper if text.isascii() and len(upper) <= SYMBOL_LENGTH and _SYMBOL.fullmatch(upper) else None


def normal(text: str) -> str | None:
    """The stored form of a symbol: trimmed, raised, runs of spaces as one; None if it cannot be one."""
    return _normal(text) if len(text) <= 4 * SYMBOL_LENGTH else None


def normal_symbol(symbol: str) -> str:
    """The stored form of a symbol.

    Raises:
        InvalidRequest: it cannot be the name of a stored symbol.
    """
    name = normal(symbol) if isinstance(symbol, str) else None
    if name is None:
        raise InvalidRequest(SYMBOL.detail, parameter="symbols")
    return name


def text(value: object) -> str:
    """A string.

    Raises:
        Refused: it is none, or no Unicode.
    """
    if not isinstance(value, str) or isinstance(value, Numeral):
        raise Refused("wrong-type", "The field is a string.")
    if not value.isascii() and _LONE.search(value):
        raise Refused(*_NOT_UNICODE)
    return value


def is_absent(value: object) -> bool:
    """Whether a value says that there is none: null, or the NaN by which binary floats say so."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def instant(value: object, precision: Precision | None) -> int:
    """Nanoseconds since 1970-01-01T00:00Z of an instant, an aware datetime, a text, or a number of `precision`.

    Raises:
        Refused: it is none of these, or a number of another unit.
    """
    if isinstance(value, Nanoseconds):
        return value
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise Refused("timestamp-naive", "A timestamp carries an offset, as in 2026-11-20T14:30:00Z.")
        return nanoseconds(value)
    if isinstance(value, str):
        value = value.strip()
    try:
        if isinstance(value, str) and value[4:5] == "-" and value[:4].isdigit():
            return parse(value)
        far = UNIT if precision else _NO_UNIT
        count = _count(value, far)
        found = of_epoch(count, precision) if precision else 0
    except NotAnInstant as error:
        raise Refused(error.code, error.detail) from None
    if not FIRST_COUNTED <= found <= LAST_COUNTED:
        raise Refused(*far)
    return found


def _count(value: object, far: Rule) -> int | Decimal:
    """The number of a timestamp that is one; `far` refuses what is far more than any unit counts."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not -LAST_COUNTED <= value <= LAST_COUNTED:
            raise Refused(*far)
        return value
    if isinstance(value, (float, Decimal)):
        value = str(float(value) if isinstance(value, float) else value)
    if not isinstance(value, str):
        raise Refused(*_NO_TIME)
    if len(value) > NUMBER_LENGTH:
        raise Refused(*(far if value.isascii() and value.lstrip("+-").isdigit() else _NO_TIME))
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise Refused(*_NO_TIME)
    if len(match[2] or "") > _EXPONENT_DIGITS:
        raise Refused(*far)
    count = Decimal(value)
    if count and not _LEAST < count.adjusted() < NUMBER_LENGTH:
        raise Refused(*far)
    return count


def number(value: object, noun: str) -> Decimal:
    """The decimal that a number or the text of one stands for; a float for its shortest text. `noun` is price or size.

    Raises:
        Refused: it is none, not finite, or longer or larger than anything that is stored.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        raise Refused("wrong-type", f"A {noun} is a number.")
    if isinstance(value, int):
        if abs(value) >= _WHOLE_LIMIT:
            raise Refused(*(_TOO_LONG if _is_long(value) else _too_large(noun)))
        return Decimal(value)
    if isinstance(value, str):
        return _of_text(value.strip(), noun)
    if not math.isfinite(value) if isinstance(value, float) else not value.is_finite():
        raise Refused(*_NOT_FINITE)
    found = Decimal(repr(float(value))) if isinstance(value, float) else value
    if found and found.adjusted() >= PRECISION - SCALE:
        raise Refused(*_too_large(noun))
    if found and found.adjusted() < _LEAST:
        raise Refused(*_too_fine(noun))
    return found


def _is_long(whole: int) -> bool:
    """Whether the text of a whole number, which is not written for that if it is very long, would be refused."""
    return whole.bit_length() > 4 * NUMBER_LENGTH or len(str(whole)) > NUMBER_LENGTH


def _of_text(written: str, noun: str) -> Decimal:
    if len(written) > NUMBER_LENGTH:
        raise Refused(*_TOO_LONG)
    match = _NUMBER.fullmatch(written)
    if match is None:
        if written.lstrip("+-").lower() in {"nan", "inf", "infinity"}:
            raise Refused(*_NOT_FINITE)
        raise Refused("wrong-type", f"A {noun} is a number in ASCII digits, as in 1234.5 or 5.1e-9.")
    if match[2] is not None and len(match[2]) > _EXPONENT_DIGITS:
        raise Refused(*(_too_fine(noun) if match[1] == "-" else _too_large(noun)))
    found = Decimal(written)
    if found and found.adjusted() >= PRECISION - SCALE:
        raise Refused(*_too_large(noun))
    return found


def plain(value: Any) -> Decimal | None:
    """What is stored of a number without a fault in its usual form; None if it is another, or might have one."""
    kind = type(value)
    if kind is float:
        value = repr(value)
    elif kind is int:
        if not -_WHOLE_LIMIT < value < _WHOLE_LIMIT:
            return None
    elif kind is not Decimal and not (kind is str and _PLAIN_NUMBER.fullmatch(value)):
        return None
    try:
        found = _EXACT.quantize(Decimal(value), TICK)
    except ArithmeticError:
        return None
    return found if found.is_finite() else None


def exact(value: object, noun: str) -> tuple[Decimal, bool]:
    """A price or size as it is stored, and whether it was rounded for that, half away from zero.

    Raises:
        Refused: it is no number, 10^16 or more, or rounding would change it by more than a millionth.
    """
    if (usual := plain(value)) is not None:
        return usual, False
    given = number(value, noun)
    stored = given.quantize(TICK, context=_WIDE)
    if stored == given:
        return stored, False
    if _WIDE.multiply(_WIDE.subtract(stored, given), ROUNDING).copy_abs() > given.copy_abs():
        raise Refused(*_too_fine(noun))
    if abs(stored) >= LIMIT:
        raise Refused(*_too_large(noun))
    return stored, True


def read(kind: Kind, value: object, precision: Precision | None) -> tuple[Any, bool]:
    """The value of a field of that kind, None where it is absent, and whether it was rounded.

    Raises:
        Refused: it can be none.
    """
    if is_absent(value):
        return None, False
    match kind:
        case "instant":
            return instant(value, precision), False
        case "price" | "size":
            return exact(value, kind)
        case "symbol" | "text":
            return text(value), False


def _too_large(noun: str) -> Rule:
    return Rule(
        {"price": "price-out-of-range", "size": "size-out-of-range"}[noun], f"A {noun} is below 10^{PRECISION - SCALE}."
    )


def _too_fine(noun: str) -> Rule:
    return Rule(
        {"price": "price-too-fine", "size": "size-too-fine"}[noun],
        f"A {noun} keeps {SCALE} decimals; rounded to them this one would change by more than a millionth of it.",
    )


def too_old(oldest: datetime) -> Rule:
    """The rule that nothing is older than a moment."""
    if oldest == FIRST:
        return Rule("timestamp-too-old", f"The timestamp lies before {FIRST.date()}, the first day that is stored.")
    return Rule(
        "timestamp-too-old", f"The timestamp is older than retention keeps; the oldest taken is {rfc3339(oldest)}."
    )


# --- columns ---


class Checks:
    """Applies the rules to the columns of one request and collects what is wrong with each row, first fault first."""

    def __init__(self, terms: Terms, pointer: str = "", columns: Mapping[str, str] | None = None) -> None:
        self.terms = terms
        self.pointer = pointer
        #: What the client calls a field where that is another name: by row, and in all other rows.
        self.given: dict[int, dict[str, str]] = {}
        self._columns = columns or {}
        self._faults: dict[int, Rejection] = {}
        self._refused: list[int] = []
        self._counted: dict[str, list[pa.Array]] = {}

    def rejections(self) -> list[Rejection]:
        """The refused rows in their order; from now on only their positions are known here."""
        found = [self._faults[i] for i in sorted(self._faults)]
        self._refused = list(self._faults)
        self._faults.clear()
        return found

    def refuse(self, index: int, name: str, rule: Rule) -> None:
        """Note what is wrong with a row, unless something was before."""
        name = self.given.get(index, self._columns).get(name, name)
        where = f"{self.pointer}/{index}" + (f"/{_escape(name)}" if name else "")
        self._faults.setdefault(index, Rejection(index, where, *rule))

    def note(self, what: str, rows: pa.Array) -> None:
        """Note rows, by their position in the request, that the receipt counts unless they are refused."""
        if len(rows):
            self._counted.setdefault(what, []).append(rows.cast(pa.int32()))

    def count(self, what: str, without: Iterable[int] = ()) -> int:
        """How often that was noted of rows that are not refused, by what `rejections` has told or `without`."""
        noted = self._counted.get(what, [])
        refused = [*self._refused, *without]
        if refused:
            faulty = pa.array(refused, pa.int32())
            noted = [rows.filter(pc.invert(pc.is_in(rows, value_set=faulty))) for rows in noted]
        return sum(map(len, noted))

    def ruled(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Apply the rules of value, take prices of 0 for absent sides, and keep the rows that pass.

        The symbols come back as a dictionary. What has few distinct values is looked at once a value, and a bound is
        compared with the least and the greatest value first: that takes 5 us a column, to compare each row 30.
        """
        batch = self._check_symbols(batch)
        self._check_times(batch)
        batch = self._check_prices(batch)
        for name in SIZES:
            column = batch.column(name)
            if (lowest := pc.min(column).as_py()) is not None and lowest < 0:
                self.check(batch, pc.greater_equal(column, _ZERO), name, NEGATIVE_SIZE)
        for name in TEXTS:
            texts = batch.column(name).dictionary_encode()
            sound = [len(value) <= TEXT_LENGTH and "\0" not in value for value in texts.dictionary.to_pylist()]
            if not all(sound):
                self.check(batch, pa.array(sound, pa.bool_()).take(texts.indices), name, LONG_TEXT)
        if not self._faults:
            return batch
        faulty = pa.array(sorted(self._faults), pa.int32())
        return batch.filter(pc.invert(pc.is_in(batch.column("index"), value_set=faulty)))

    def _check_symbols(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        symbols = batch.column("symbol").dictionary_encode()
        names = [normal(name) for name in symbols.dictionary.to_pylist()]
        if None in names:
            sound = pa.array([name is not None for name in names], pa.bool_())
            self.check(batch, sound.take(symbols.indices), "symbol", SYMBOL)
        coded = pa.DictionaryArray.from_arrays(symbols.indices, pa.array(names, pa.string()))
        return batch.set_column(0, "symbol", coded)

    def _check_prices(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        zeros: dict[str, pa.Array] = {}
        if self.terms.prices == "positive":
            for name in PRICES:
                column = batch.column(name)
                lowest = pc.min(column).as_py()
                if lowest is None or lowest > 0:
                    continue
                zeros[name] = pc.equal(column, _ZERO)
                self.note("zeros", batch.column("index").filter(zeros[name]))
                column = pc.if_else(zeros[name], _ABSENT, column)
                if lowest < 0:
                    self.check(batch, pc.greater(column, _ZERO), name, NOT_POSITIVE)
                batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), column)
        sides = [batch.column(name) for name in PRICES]
        if all(side.null_count for side in sides):
            present = pc.is_valid(sides[0])
            for side in sides[1:]:
                present = pc.or_(present, pc.is_valid(side))
            for name, zero in zeros.items():  # a row of nothing but zeros says more than that a price is missing
                self.check(batch, pc.or_(present, pc.invert(pc.fill_null(zero, fill_value=False))), name, NOT_POSITIVE)
            self.check(batch, present, PRICES[0], NO_SIDE)
        bid, ask = batch.column("bid"), batch.column("ask")
        if max(bid.null_count, ask.null_count) < len(batch):
            self.note("crossed", batch.column("index").filter(pc.greater(bid, ask)))
        return batch

    def _check_times(self, batch: pa.RecordBatch) -> None:
        times = batch.column("timestamp")
        oldest, newest = self.terms.limits.oldest, self.terms.limits.newest
        ends = pc.min_max(times)
        first, last = ends["min"].value, ends["max"].value
        if last is not None and last > microseconds(newest):
            self.check(batch, pc.less_equal(times, pa.scalar(newest, times.type)), "timestamp", FUTURE)
        if first is not None and first < microseconds(oldest):
            self.check(batch, pc.greater_equal(times, pa.scalar(oldest, times.type)), "timestamp", too_old(oldest))

    def check(self, batch: pa.RecordBatch, passed: pa.Array, name: str, rule: Rule) -> None:
        """Refuse the rows where `passed` is false; a null is an absent value and passes."""
        for index in batch.column("index").filter(pc.invert(passed)).to_pylist():
            self.refuse(index, name, rule)


def _escape(token: str) -> str:
    """A JSON pointer token (RFC 6901, section 3), printable and short."""
    printable = token.encode("ascii", "backslashreplace").decode() if not token.isprintable() else token
    return printable[:64].replace("~", "~0").replace("/", "~1")
