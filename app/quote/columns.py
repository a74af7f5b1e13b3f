"""The way into a batch by columns, and the columns themselves.

Invariant: a column is taken as a whole or not at all: None means that something about a value is unusual, and only the
thorough way by rows can say what. What is taken means the same to both.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from app.clock import UNITS, floor
from app.quote import rules
from app.quote.fields import COLUMNS, DECIMAL, FIELDS, INSTANT, NUMBERS, PRECISION, SCALE
from app.quote.rules import Checks

#: The columns of a batch: those that are stored, and the position of each row in its request.
SCHEMA: Final = COLUMNS.append(pa.field("index", pa.int32()))

_PLAIN_INSTANT: Final = (
    r"^[1-9][0-9]{3}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)
_PLAIN_WHOLE: Final = r"^-?[0-9]{1,19}$"
#: Exponents that move the point by 19 digits to the right at most, and by how many more than their own length.
_SHORT_EXPONENTS: Final = r"^[^eE]*([eE](-[0-9]{1,2}|\+?[01]?[0-9]))?$"
_MOVED: Final = 16
_NANO: Final = pa.timestamp("ns", "UTC")
#: What needs rounding, or may not fit.
_WIDE: Final = pa.decimal256(76, 22)
#: Arrow multiplies a number into its new scale, and what then is beyond 128 or 256 bits comes out as another one. With
#: so many digits before the point none is.
_NARROW_DIGITS: Final = 38 - SCALE
_WIDE_DIGITS: Final = 76 - 22
_LIMIT: Final = 10 ** (PRECISION - SCALE)
_FLOAT_DECIMALS: Final = 8
#: The last decimals of a whole number, and the whole numbers whose last decimals fit into 64 bits.
_TICKS: Final = 10**SCALE
_SMALL: Final = 2**63 // _TICKS


class Unusual(Exception):
    """Only the thorough way can say what these values are."""


def of_table(table: pa.Table, checks: Checks) -> pa.RecordBatch | None:
    """The columns of `SCHEMA` of columns named as the fields; None if anything about a value is unusual."""
    present = set(table.column_names)
    every = positions(len(table))
    arrays: list[pa.Array] = []
    try:
        for field in FIELDS:
            if field.name not in present:
                arrays.append(pa.nulls(len(table), COLUMNS.field(field.name).type))
                if field.required:
                    return None
                continue
            column = table.column(field.name).combine_chunks()
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if field.required and column.null_count:
                return None
            if field.kind == "instant":
                arrays += _instants(column, checks, every)
            elif field.name in NUMBERS:
                numbers, rounded = decimals(column)
                if rounded is not None:
                    checks.note("rounded", every.filter(rounded))
                arrays.append(numbers)
            else:
                arrays.append(_texts(column))
    except (Unusual, pa.ArrowException):
        return None
    return pa.RecordBatch.from_arrays([*arrays, every], schema=SCHEMA)


@lru_cache(maxsize=1)
def _all_positions(rows: int) -> pa.Array:
    return pa.array(range(rows), pa.int32())


def positions(rows: int) -> pa.Array:
    """0, 1, 2 and so on; cut from an array that is kept, as Python's integers take 30 us a thousand."""
    return _all_positions(1 << max(16, (rows - 1).bit_length()))[:rows]


@lru_cache(maxsize=1)
def _all_zeros(rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(0, pa.int16()), rows)


def _zeros(rows: int) -> pa.Array:
    return _all_zeros(1 << max(16, (rows - 1).bit_length()))[:rows]


# --- instants ---


def split(nanoseconds: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Microseconds since 1970, rounded down, and the nanoseconds after each."""
    micros = pc.divide(nanoseconds, 1000)
    nanos = pc.subtract(nanoseconds, pc.multiply(micros, 1000))
    lowest = pc.min(nanos).as_py()
    if lowest is not None and lowest < 0:  # before 1970 division rounds towards it
        before = pc.less(nanos, 0).cast(pa.int64())
        micros = pc.subtract(micros, before)
        nanos = pc.add(nanos, pc.multiply(before, 1000))
    return micros.view(INSTANT), nanos.cast(pa.int16())


def instants_of(values: Sequence[int]) -> tuple[pa.Array, pa.Array]:
    """The two columns of instants, which need not fit into 64 bits."""
    try:
        return split(pa.array(values, pa.int64()))
    except OverflowError:
        pass
    moments = [floor(value) for value in values]
    return pa.array(moments, INSTANT), pa.array([value % 1000 for value in values], pa.int16())


def nanoseconds(batch: pa.RecordBatch) -> pa.Array:
    """Nanoseconds since 1970 of the two columns of an instant, which must lie where these fit into 64 bits."""
    return pc.add(pc.multiply(batch.column("timestamp").view(pa.int64()), 1000), batch.column("nanos"))


def _of_plain(texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    try:
        return texts.cast(INSTANT), _zeros(len(texts))
    except pa.ArrowInvalid:  # some have more than six digits
        return split(texts.cast(_NANO).view(pa.int64()))


def _instants(column: pa.Array, checks: Checks, every: pa.Array) -> tuple[pa.Array, pa.Array]:
    kind, precision = column.type, checks.terms.precision
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if pc.all(pc.match_substring_regex(column, _PLAIN_INSTANT)).as_py():
            return _of_plain(column)
        if precision is None or not pc.all(pc.match_substring_regex(column, _PLAIN_WHOLE)).as_py():
            raise Unusual  # by itself Arrow reads 0x1F as a number
        column, kind = column.cast(pa.int64()), pa.int64()
    if pa.types.is_integer(kind) and precision is not None:
        counts = pc.multiply_checked(column.cast(pa.int64()), UNITS[precision])
        lowest = pc.min(counts).as_py()
        if lowest is not None and lowest < rules.FIRST_COUNTED:
            for index in every.filter(pc.less(counts, rules.FIRST_COUNTED)).to_pylist():
                checks.refuse(index, "timestamp", rules.UNIT)
        return split(counts)
    if not pa.types.is_timestamp(kind) or kind.tz is None:
        raise Unusual
    if kind.unit == "ns":
        return split(column.view(pa.int64()))
    return column.cast(pa.timestamp("us", kind.tz)).view(INSTANT), _zeros(len(column))


# --- numbers ---


def decimals(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """The decimals of a column of numbers, or of their texts, and which of them were rounded, if any was.

    Raises:
        Unusual, pa.ArrowException: something about a value is unusual.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(DECIMAL), None
    if pa.types.is_integer(kind):
        return _of_whole(column), None
    if pa.types.is_floating(kind):
        column = without_nan(column)
        if pa.types.is_float64(kind):
            return of_floats(column)
        column = column.cast(pa.string())  # the shortest text that reads back as this number
    elif pa.types.is_decimal(kind):
        return _kept(column, kind.precision - kind.scale)
    else:
        column = _texts(column)
    return _kept(column, _most_digits(column))


def without_nan(column: pa.Array) -> pa.Array:
    """A column of floats with nulls for what is no number."""
    absent = pc.is_nan(column)
    return pc.if_else(absent, pa.scalar(None, column.type), column) if pc.any(absent).as_py() else column


def _of_whole(column: pa.Array) -> pa.Array:
    # Arrow wants room for every 64-bit number; what is there fits if its ends do.
    ends = pc.min_max(column)
    most = max(abs(ends["min"].as_py() or 0), abs(ends["max"].as_py() or 0))
    if most >= _LIMIT:
        raise Unusual
    if most < _SMALL:  # half the cost
        return _of_ticks(pc.multiply(column.cast(pa.int64()), _TICKS))
    return _narrowed(column.cast(pa.decimal128(38, SCALE)))


def _narrowed(column: pa.Array) -> pa.Array:
    """The same numbers, known to fit, as `DECIMAL`."""
    return pa.Array.from_buffers(DECIMAL, len(column), column.buffers(), offset=column.offset)


def _most_digits(texts: pa.Array) -> int:
    """How many digits one of the texts may have before its point.

    Raises:
        Unusual: an exponent is long, by which Arrow ends the process.
    """
    longest: int = pc.max(pc.binary_length(texts)).as_py() or 0
    letters = bytes(texts.buffers()[2] or b"")
    if b"e" not in letters and b"E" not in letters:
        return longest
    if not pc.all(pc.match_substring_regex(texts, _SHORT_EXPONENTS)).as_py():
        raise Unusual
    return longest + _MOVED


def _kept(column: pa.Array, digits: int) -> tuple[pa.Array, pa.Array | None]:
    """Decimals of texts or other decimals with so many digits before the point, and which of them were rounded."""
    if digits > _WIDE_DIGITS:
        raise Unusual
    if digits <= _NARROW_DIGITS:
        try:
            return column.cast(DECIMAL), None
        except pa.ArrowInvalid:
            pass  # some value needs rounding, or does not fit
    return _rounded(column.cast(_WIDE))


def _rounded(wide: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Decimals kept to `SCALE` places, and which were rounded for that.

    Raises:
        Unusual: one would change by more than the rule allows.
    """
    stored = pc.round(wide, SCALE, "half_towards_infinity").cast(DECIMAL)
    changed = pc.not_equal(stored, wide)
    small = pc.less(pc.abs(stored), pa.scalar(rules.TICK * rules.ROUNDING, DECIMAL))
    if pc.any(pc.and_(changed, small)).as_py():
        raise Unusual
    return stored, changed if pc.any(changed).as_py() else None


def of_floats(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Decimals of floats by their shortest texts, and which of them were rounded.

    That takes 0.05 us a row where arithmetic can tell, by way of text 1.3 us. Up to fifteen digits in all, a float is
    the nearest one to a single decimal of as many places, so that this is its shortest text. Any other is rounded, to
    where there is no doubt unless it lies close to the middle; the product is off by 0.03 at most below 2 x 10^14.

    Raises:
        Unusual, pa.ArrowException: as `decimals`.
    """
    ticks = pc.round(pc.multiply(column, 10.0**_FLOAT_DECIMALS))
    short = pc.and_(pc.equal(pc.divide(ticks, 10.0**_FLOAT_DECIMALS), column), pc.less(pc.abs(ticks), 9e14))
    fine = 10 ** (SCALE - _FLOAT_DECIMALS)
    if pc.all(short, min_count=0).as_py():
        return _of_ticks(pc.multiply(ticks.cast(pa.int64()), fine)), None
    product = pc.multiply(column, 10.0**SCALE)
    longer = pc.round(product)
    size = pc.abs(longer)
    same = pc.and_(pc.equal(pc.divide(longer, 10.0**SCALE), column), pc.less(size, 9e14))
    clear = pc.and_(
        pc.and_(pc.less(size, 2e14), pc.greater(size, 2.0 * rules.ROUNDING)),
        pc.less(pc.abs(pc.subtract(product, longer)), 0.4),
    )
    told = pc.or_(short, pc.or_(same, clear))
    whole = pc.multiply(pc.if_else(short, ticks, 0.0).cast(pa.int64()), fine)
    rest = pc.if_else(pc.and_(told, pc.invert(short)), longer, 0.0).cast(pa.int64())
    found, rounded = _of_ticks(pc.if_else(short, whole, rest)), pc.and_(told, pc.invert(pc.or_(short, same)))
    if not pc.all(told, min_count=0).as_py():
        untold = pc.invert(told)
        texts = column.filter(untold).cast(pa.string())
        numbers, changed = _kept(texts, _most_digits(texts))
        found = pc.replace_with_mask(found, untold, numbers)
        if changed is not None:
            rounded = pc.replace_with_mask(rounded, untold, changed)
    return found, rounded if pc.any(rounded).as_py() else None


def _of_ticks(ticks: pa.Array) -> pa.Array:
    """Decimals of whole numbers of the last decimal."""
    return _narrowed(ticks.cast(pa.decimal128(PRECISION)))


# --- texts ---


def _texts(column: pa.Array) -> pa.Array:
    found = column.type
    if pa.types.is_string(found):
        return column
    if not (pa.types.is_large_string(found) or pa.types.is_string_view(found) or pa.types.is_null(found)):
        raise Unusual
    return column.cast(pa.string())


def of_lists(values: Mapping[str, list[Any]]) -> pa.Table | None:
    """Columns of lists by field, each as a request in JSON has them; None if one holds something else."""
    try:
        arrays = [
            _of_list(given, numbers=field.kind in {"price", "size"}, whole=field.kind == "instant")
            for field, given in zip(FIELDS, values.values(), strict=True)
        ]
    except (TypeError, OverflowError, UnicodeEncodeError, ValueError, pa.ArrowException):
        return None
    return pa.table(arrays, names=[field.name for field in FIELDS])


def _of_list(given: list[Any], *, numbers: bool, whole: bool) -> pa.Array:
    """An array of texts, or where there may be such of whole numbers; of both numbers and texts, one of texts."""
    first = next((value for value in given if value is not None), "")
    if type(first) is int and (numbers or whole):
        try:
            return pa.array(given, pa.int64())
        except (TypeError, pa.ArrowException):
            if whole:
                raise
    try:
        return pa.array(given, pa.string())
    except (TypeError, pa.ArrowException):
        if not numbers or not set(map(type, given)) <= {int, str, type(None)}:
            raise
    return pa.array([str(value) if type(value) is int else value for value in given], pa.string())
