"""Quotes as clients send them, from usual to absurd, and the bodies that carry them."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from app.clock import NotAnInstant, parse
from app.errors import InvalidQuotes, QuotesError
from app.quote.batch import Batch
from app.quote.fields import ALIASES, NAMES, NUMBERS, TEXTS
from app.quote.rules import Numeral
from app.quote.terms import Limits, Terms

NOW = datetime(2026, 11, 20, 15, tzinfo=UTC)
LIMITS = Limits.at(NOW, max_days=100_000)
Row = dict[str, Any]

# --- values, as texts ---

#: Numbers that end a library, or take it minutes.
ABSURD = (
    "1e-2147483640", "1e2147483640", "-1e2147483640", "1e-2147483649", "1e99999999999999999999", "0e2147483640",
    "1" * 5000, "-" + "7" * 4301, "0." + "3" * 5000, "1" * 101, "1e" + "1" * 5000, "1" * 400 + "e-400",
)  # fmt: skip
#: At the edges of what is taken, and beyond.
EDGES = (
    "9999999999999999", "9999999999999999.9999999999994", "9999999999999999.9999999999995", "10000000000000000", "1e16",
    "-9999999999999999.9999999999995", "1e15", "1e-12", "4.9e-13", "5e-13", "0.0000005000000000004", "5.0000000000005",
    "0.0000004999999999995", "1.0000000000005", "-1.0000000000005", "1.00000000000049999", "0.000001000000000001",
    "123456789012345.678901234567", "1e400", "1e-400", "1e300", "4e-324", "0", "-0", "0.0", "-0.0000000000001", "0e5",
    "1e000000000001", "1e999", "1e-999", "1.0000000000000" + "0" * 80, "5e-7", "1.7976931348623157e308",
)  # fmt: skip
NO_NUMBERS = (
    "NaN", "nan", "Infinity", "-inf", "1_000", " 1", "1 ", ".5", "5.", "+1", "+.5e+1", "0x1F", "\u0663", ".", "-", "e5",
    "1e", "1e+", "--1", "1..2", "1,5", "much", "1\0", "\ud800", "true", "1\n", "\u00a01", "-.", "1e5.0", "007",
)  # fmt: skip
usual_numbers = st.one_of(
    st.decimals("0.000000001", "1e6", places=9).map(lambda value: f"{value:f}"),
    st.decimals("0.5", "500", places=2).map(str),
    st.integers(1, 10**12).map(str),
)
numbers = st.one_of(
    usual_numbers,
    usual_numbers,
    st.decimals(-10, 10, places=13).map(lambda value: f"{value:f}"),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.builds("{}e{}".format, st.integers(-(10**6), 10**6), st.integers(-30, 30)),
    st.sampled_from(EDGES),
    st.sampled_from(ABSURD),
    st.sampled_from(NO_NUMBERS),
    st.text(alphabet="0123456789.eE+-_ aN", max_size=8),
)
INSTANTS = (
    "2026-11-20T10:00:00Z", "2026-11-20T10:00:00.000000001Z", "2026-11-20T12:00:00.00000000100+02:00",
    "2026-11-20T10:00:00.0000000Z", "2026-11-20T09:59:59.999999999Z", "2026-11-20T10:00:00.000000999Z",
    "2026-11-20T10:00:00.000001Z", "2026-11-20T10:00:01Z", "2026-11-19T23:30:00.5-10:30", "2026-11-19T10:00Z",
)  # fmt: skip
#: Other ways to write instants, instants at the edges, and what is none.
ODD_INSTANTS = (
    "2026-11-20 10:00:00+00", "2026-11-20t10:00:00.123456789z", " 2026-11-20T10:00:00Z ", "2026-11-20T10:00:00Z\n",
    "2026-11-20T10:00:00.1234567890Z", "2026-11-20T10:00:00.1234567891Z", "2026-11-20T10:00:00123Z",
    "2026-11-20T10:00:00.Z", "2026-11-20T10:00:00", "2026-11-20", "2026-11-20T10:00:60Z", "2016-12-31T23:59:60.5Z",
    "2026-11-20T24:00:00Z", "2026-02-30T00:00:00Z", "2026-11-20T10:00:00+24:00", "2026-11-20T10:00:00-0030", "x",
    "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59.999999999Z",
    "1677-09-21T23:59:59.999999999Z", "1677-09-22T00:00:00Z", "1677-09-21T00:12:43.145224192Z", "1969-12-31T23:59:59Z",
    "1969-12-31T23:59:59.999999999Z", "2262-04-11T23:47:16.854774999Z", "2262-04-11T23:47:16.854775807Z",
    "2262-04-11T23:47:16.854775808Z", "2262-04-12T00:00:00Z", "2026-11-20T15:01:00Z", "2026-11-20T15:01:00.000001Z",
    "2026-11-20T15:01:00.000000001Z", "\u0662\u0660\u0662\u0666-11-20T10:00:00Z", "2026-11-20T10:00:00Z\0", "\ud800",
    "20261120T100000Z", "2026-W47-5T10:00:00Z", "+2026-11-20T10:00:00Z", "2026-11-20T10:00:00,5Z",
)  # fmt: skip
#: Counts from 1970 in some unit, with and without a fraction, and of no unit at all.
EPOCHS = (
    "1763600000", "1763600000123", "1763600000123456", "1763600000123456789", "1763600000.5", "1763600000.123456789",
    "1763600000.1234567891", "1763600000.123456789000000000000000001", "1763600000123456.789", "1.7636e9", "17636e5",
    "631151999", "631152000", "631151999999999999", "631152000000000000", "0", "-1", "7", "1.5e-7", "-1763600000",
    "9223372036", "9223372036.854775807", "9223372036.854775808", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "-9223372036854775808", "-9223372036854775809", "9" * 150, "1e30", "1e-30", "1763600000e0",
    "1763600000.0", "+1763600000", "01763600000", "1763600000.", "1763600000." + "0" * 100, "1763600000_0", *ABSURD,
)  # fmt: skip
instants = st.one_of(
    st.sampled_from(INSTANTS),
    st.sampled_from(INSTANTS),
    st.sampled_from(ODD_INSTANTS),
    st.sampled_from(EPOCHS),
    st.datetimes(datetime(1970, 1, 1), datetime(2030, 1, 1)).map(lambda t: t.isoformat() + "Z"),  # noqa: DTZ001
    st.integers(-(2**63), 2**63 - 1).map(str),
)
USUAL_SYMBOLS = ("A", "a", "BRK.B", "EURUSD=X", "^GSPC", "ESZ5 C4500", "B&S@C+$#!", "N:A/B_C-1")
symbols = st.one_of(
    st.sampled_from(USUAL_SYMBOLS),
    st.sampled_from(
        (" a ", "A  B", "a b", "A" * 64, "A" * 65, " " * 90 + "A" + " " * 90, "A" + " " * 254 + "B",
         "A" + " " * 300 + "B", "\u00df", "\u017f", "A\tB", "A\n", "A\0", "\ud800", "1.5", "7", "NaN", " ", "A,B",
         'A"B', "A*")
    ),
)  # fmt: skip
sources = st.one_of(
    st.just("feed"), st.just("feed"), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
    st.sampled_from(
        ("x" * 255, "x" * 256, "\u00e9" * 255, "\u00e9" * 256, "a\0", "1.5", "\ud800", " x ", 'a"b', "a\r\nb")
    ),
)  # fmt: skip

_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|NaN|-?Infinity")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def texts(values: Mapping[str, st.SearchStrategy[str]], *, without: st.SearchStrategy[bool]) -> st.SearchStrategy[Row]:
    """Rows of texts, in which a value may be missing."""

    @st.composite
    def row(draw: st.DrawFn) -> Row:
        return {name: draw(value) for name, value in values.items() if not draw(without)}

    return row()


_LATER: dict[str, st.SearchStrategy[str]] = dict.fromkeys(NUMBERS, numbers) | dict.fromkeys(TEXTS, sources)
#: Rows of texts that may break any rule.
wild_rows = texts({"symbol": symbols, "timestamp": instants, **_LATER}, without=st.sampled_from([False, False, True]))
#: Rows of texts that keep the rules, but for a number here and there; few keys.
tame_rows = st.builds(
    lambda key, rest: {**key, "price": "1.5", **rest},
    st.fixed_dictionaries({"symbol": st.sampled_from(USUAL_SYMBOLS), "timestamp": st.sampled_from(INSTANTS)}),
    texts(
        {name: st.one_of(usual_numbers, usual_numbers, st.sampled_from(["0", "2.5"]), numbers) for name in NUMBERS}
        | dict.fromkeys(TEXTS, st.just("feed")),
        without=st.sampled_from([False, True, True, True]),
    ),
)
terms = st.builds(
    lambda days, *others: Terms(Limits.at(NOW, max_days=days), *others),
    st.sampled_from([1, 100_000]),
    st.sampled_from(["abort", "skip", "skip"]),
    st.sampled_from(["update", "merge", "ignore", "error"]),
    st.sampled_from([None, "s", "ms", "us", "ns"]),
    st.sampled_from(["replace", "number"]),
    st.sampled_from(["positive", "signed"]),
)


def as_numbers(row: Row) -> Row:
    """A row with numbers in the place of texts that JSON could write as such."""
    return {
        name: Numeral(value)
        if name in (*NUMBERS, "timestamp") and isinstance(value, str) and _JSON_NUMBER.fullmatch(value)
        else value
        for name, value in row.items()
    }


# --- what became of them ---


def outcome(work: Callable[[], Batch | None]) -> Any:
    """What a caller can see of a batch, or of the refusal."""
    try:
        batch = work()
    except InvalidQuotes as error:
        return error.rejections
    except QuotesError as error:
        return error.code, error.detail
    if batch is None:
        return None
    batch.columns.validate(full=True)
    return batch.receipt(inserted=len(batch)), batch.pointer, batch.columns.to_pylist()


# --- bodies ---


def in_json(rows: Sequence[Any]) -> bytes:
    """A JSON array; a `Numeral` is a number with all its digits."""
    return f"[{','.join(map(_object, rows))}]".encode()


def in_ndjson(rows: Sequence[Any]) -> bytes:
    """A line of JSON a row."""
    return "".join(_object(row) + "\n" for row in rows).encode()


def _object(row: Any) -> str:
    if not isinstance(row, dict):
        return json.dumps(row)
    members = (f"{json.dumps(k)}:{v if isinstance(v, Numeral) else json.dumps(v)}" for k, v in row.items())
    return "{" + ",".join(members) + "}"


def in_csv(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] = NAMES, **dialect: Any) -> bytes:
    """CSV with a header."""
    if any("\r" in str(value) for row in rows for value in row.values()):
        dialect["quoting"] = csv.QUOTE_ALL  # by itself the writer leaves a carriage return without quotes
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def in_arrow(table: pa.Table, *, rows: int | None = None, file: bool = False, **options: Any) -> bytes:
    """An Arrow stream, or a file."""
    sink = io.BytesIO()
    new = pa.ipc.new_file if file else pa.ipc.new_stream
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(rows):
            writer.write_batch(batch)
    return sink.getvalue()


def in_parquet(table: pa.Table, **options: Any) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


# --- columns ---

TEXT_KINDS = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string()))


def in_texts(values: Sequence[str | None], kind: pa.DataType) -> pa.Array:
    """A column of texts, in any layout."""
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def typed(name: str, values: Sequence[str | None]) -> list[pa.Array]:
    """The columns of other types that have these very values; none where a text is no such value."""
    field = ALIASES.get(name, name)
    if field == "timestamp":
        return _of_times(values) + _of_numbers(values)
    return _of_numbers(values) if field in NUMBERS else []


def _of_numbers(values: Sequence[str | None]) -> list[pa.Array]:
    if not all(v is None or (len(v) <= 100 and _PLAIN_NUMBER.fullmatch(v)) for v in values):
        return []
    exact = [None if value is None else Decimal(value) for value in values]
    found = []
    for kind in (pa.float64(), pa.float32()):
        floats = pa.array([None if value is None else float(value) for value in exact], pa.float64()).cast(kind)
        written = floats.cast(pa.string()).to_pylist()
        if [None if text is None else Decimal(text) for text in written] == exact:
            found.append(floats)
    for kind in (
        pa.decimal128(28, 12), pa.decimal128(38, 22), pa.decimal128(38, 2), pa.decimal256(76, 38), pa.int64(),
        pa.uint64(), pa.int32(), pa.uint8(),
    ):  # fmt: skip
        whole = pa.types.is_integer(kind)
        if whole and not all(v is None or (v.adjusted() < 20 and v == v.to_integral_value()) for v in exact):
            continue
        try:
            column = pa.array([int(v) if whole and v is not None else v for v in exact], kind)
        except (pa.ArrowException, OverflowError):
            continue
        if column.to_pylist() == exact:  # Arrow cuts some off instead
            found.append(column)
    return found


def _of_times(values: Sequence[str | None]) -> list[pa.Array]:
    try:
        exact = [None if value is None else parse(value.strip()) for value in values]
    except NotAnInstant:
        return []
    found = []
    for unit, size in (("ns", 1), ("us", 10**3), ("ms", 10**6), ("s", 10**9)):
        if all(value is None or value % size == 0 for value in exact):
            counts = [None if value is None else value // size for value in exact]
            try:
                found += [pa.array(counts, pa.timestamp(unit, zone)) for zone in ("UTC", "Asia/Kolkata", "+05:30")]
            except OverflowError:
                continue
    return found
