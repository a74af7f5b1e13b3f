"""The fast ways into a batch mean the same as the thorough one, and take no row that it refuses."""

import json as standard_json
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app.clock import UNITS, nanoseconds, rfc3339_nano
from app.errors import BodyTooLarge, InvalidQuotes, MalformedBody, Rejection
from app.formats import FORMATS
from app.quote import columns, rows
from app.quote.batch import Batch, ends, joined, order
from app.quote.fields import NAMES, NANOS, NUMBERS, VALUES
from app.quote.rows import Row
from app.quote.rules import Numeral
from app.quote.terms import Limits, Terms
from tests.strategies import (
    LIMITS,
    NOW,
    TEXT_KINDS,
    USUAL_SYMBOLS,
    as_numbers,
    in_json,
    in_ndjson,
    in_texts,
    numbers,
    outcome,
    tame_rows,
    terms,
    typed,
    usual_numbers,
    wild_rows,
)

TERMS = Terms(LIMITS)
WHEN = "2026-11-20T10:00:00Z"
#: How long a body may be to go by rows: none goes, or all do.
lengths = st.sampled_from([0, rows.FEW])
requests = st.one_of(
    st.lists(tame_rows, max_size=12),
    st.lists(st.one_of(tame_rows, tame_rows, wild_rows), min_size=1, max_size=8),
    st.lists(wild_rows, min_size=1, max_size=4),
)

json, ndjson = FORMATS["json"], FORMATS["ndjson"]


@contextmanager
def few(length: int) -> Iterator[None]:
    """Let bodies up to that length go by rows, longer ones by columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "FEW", length)
        yield


def any_values(_: int) -> bool:
    """What is known of a text that nobody has looked at."""
    return True


def typed_rows(body: bytes) -> list[Any]:
    return msgspec.json.Decoder(list[Row], float_hook=str).decode(body)  # type: ignore[valid-type]


# --- the ways agree ---


@given(requests, terms, lengths, st.booleans())
@settings(max_examples=600)
def test_the_fast_ways_give_what_the_thorough_one_gives(
    given_rows: list[dict[str, Any]], terms: Terms, length: int, numerals: bool
) -> None:
    if numerals:
        given_rows = [as_numbers(row) for row in given_rows]
    thorough = outcome(lambda: Batch.from_rows(given_rows, terms))
    with few(length):
        assert outcome(lambda: json.decode(in_json(given_rows), terms)) == thorough
        assert outcome(lambda: ndjson.decode(in_ndjson(given_rows), terms)) == thorough
        try:
            typed = typed_rows(in_json(given_rows))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        assert outcome(lambda: Batch.of(typed, terms, any_values)) in (thorough, None)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**17), 10**17), st.integers(-5, 5), st.floats(), st.floats(-10, 10),
    st.decimals(), st.decimals(-10, 10, places=13), usual_numbers, st.sampled_from([[1], {}, b"1", (), 1j, NOW]),
    st.sampled_from([Decimal("sNaN"), Decimal("0e999999999"), Decimal("-0e-999999999"), Decimal("1e-999999")]),
    st.just(10**5000),
)  # fmt: skip
moments = st.one_of(
    st.sampled_from(
        [NOW, NOW.replace(tzinfo=None), WHEN, None, True, b"", 10**5000, -(10**5000), Decimal("0e999999999")]
    ),
    st.datetimes(timezones=st.timezones()),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.floats(6e8, 1.8e9),
    st.decimals(),
    st.decimals("6e8", "1.8e9", places=10),
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"symbol": st.sampled_from([*USUAL_SYMBOLS, 7, None, 1.5]), "timestamp": moments},
            optional=dict.fromkeys(NUMBERS, values) | {"source": st.sampled_from(["feed", 1, None, b"x"])},
        ),
        max_size=4,
    ),
    terms,
)
@settings(max_examples=400)
def test_any_values_of_python_are_taken_or_refused(given_rows: list[dict[str, Any]], terms: Terms) -> None:
    try:
        batch = Batch.from_rows(given_rows, replace(terms, on_error="skip"))
    except Exception as error:
        assert getattr(error, "code", None) == "invalid-request"  # noqa: PT017  too many days
        return
    assert batch.received == len(given_rows) == len(batch) + batch.superseded + len(batch.rejected)
    batch.columns.validate(full=True)
    for row in batch.rows.to_pylist():
        assert any(row[name] is not None for name in ("price", "bid", "ask"))


def test_the_usual_goes_the_fast_way() -> None:
    usual: list[dict[str, Any]] = [
        {"symbol": symbol, "timestamp": when, "price": price, "bid": Numeral("1.5"), "ask": 0, "volume": "0.00000001"}
        for symbol, when, price in (
            ("A", WHEN, 1),
            ("b", "2026-11-20T10:00:00.123+02:00", Numeral("1e3")),
            ("ES C4", "2026-11-20T10:00:00.123456789Z", "189.98"),
            ("A", WHEN, Numeral("0.123456789012")),
        )
    ]
    for case in (
        usual,
        [row | {"timestamp": 1_763_600_000_123_456_789 + i} for i, row in enumerate(usual)],
        [row | {"price": None, "bid": 2 * i + 1} for i, row in enumerate(usual)],
    ):
        for on_conflict in ("update", "merge", "ignore"):
            for ties in ("number", "replace"):
                for length in (0, rows.FEW):
                    with few(length):
                        terms = Terms(LIMITS, on_conflict=on_conflict, ties=ties, precision="ns")
                        batch = Batch.of(typed_rows(in_json(case)), terms, any_values)
                    assert batch is not None
                    assert (batch.received, batch.zeros) == (4, 4)


@pytest.mark.parametrize("length", [0, rows.FEW])
def test_digits_behind_the_seconds_are_no_fraction(length: int) -> None:
    body = in_json([{"symbol": "A", "timestamp": "2026-11-20T10:00:00123Z", "price": 1}])
    with few(length), pytest.raises(InvalidQuotes) as caught:
        json.decode(body, TERMS)
    assert caught.value.rejections[0].code == "timestamp-invalid"


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("symbol", "1.5", "wrong-type"), ("source", "1.5", "wrong-type"), ("source", "NaN", "wrong-type"),
     ("price", "NaN", "not-finite"), ("price", "9" * 5000, "number-too-long"), ("price", "9" * 101, "number-too-long"),
     ("price", "9" * 100, "price-out-of-range"), ("price", "-" + "9" * 100, "number-too-long"),
     ("volume", "-Infinity", "not-finite")],
)  # fmt: skip
def test_a_number_of_json_is_no_text_and_refuses_its_row_only(name: str, number: str, code: str) -> None:
    row = {"symbol": "A", "timestamp": WHEN, "price": 1}
    for body, decode in ((in_json, json.decode), (in_ndjson, ndjson.decode)):
        batch = decode(body([row, row | {name: Numeral(number)}]), Terms(LIMITS, "skip"))
        assert [(r.pointer, r.code) for r in batch.rejected] == [(f"/1/{name}", code)]
        assert len(batch) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"symbol":\n"A","timestamp":"%s","price":1}\n',
        b'{"symbol":"A","timestamp":"%s","price":1}{"symbol":"B","timestamp":"%s","price":1}\n',
        b'{"symbol":"A","timestamp":"%s","price":1} {"symbol":"B",\n"timestamp":"%s","price":1}\n',
        b'{"symbol":"A","timestamp":"%s",\r\n"price":1}',
    ],
)
def test_a_line_of_ndjson_is_a_row_whatever_else_is_in_the_body(body: bytes) -> None:
    body = body.replace(b"%s", WHEN.encode())
    alone = ndjson.decode(body, Terms(LIMITS, "skip"))
    assert {r.code for r in alone.rejected} == {"not-an-object"}
    assert alone.received == body.strip().count(b"\n") + 1 == len(alone.rejected)
    mixed = ndjson.decode(body.rstrip() + b"\nx\n", Terms(LIMITS, "skip"))
    assert mixed.rejected[:-1] == alone.rejected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \n\t\n"])
def test_lines_of_ndjson_end_in_many_ways(end: bytes) -> None:
    lines = [f'{{"symbol":"A","timestamp":{when},"price":1}}'.encode() for when in (1_763_600_000, 1_763_600_001)]
    for body in (end.join(lines), end.join(lines) + end, end + end.join(lines)):
        batch = ndjson.decode(body, Terms(LIMITS, precision="s"))
        assert (batch.received, len(batch)) == (2, 2)
    assert ndjson.decode(end, TERMS).received == 0


# --- columns ---

BASE: dict[str, Any] = {
    "symbol": ["a", "B"],
    "timestamp": [NOW - timedelta(hours=1), NOW - timedelta(hours=2)],
    "price": [Decimal("1.25"), Decimal("3.5")],
}


def table(**columns: Any) -> pa.Table:
    return pa.table({**BASE, **columns})


def shown(decimals: pa.Array) -> list[str]:
    """Decimals without the zeros at their ends."""
    return [f"{value:f}".rstrip("0").rstrip(".") for value in decimals.to_pylist()]


@pytest.mark.parametrize("name", ["price", "volume"])
@pytest.mark.parametrize(
    ("column", "expected", "rounded"),
    [
        (pa.array([1.25, 3.1], pa.float64()), ["1.25", "3.1"], 0),
        (pa.array([1.25, 3.1], pa.float32()), ["1.25", "3.1"], 0),
        (pa.array([1.25, 3.5], pa.float16()), ["1.25", "3.5"], 0),
        (pa.array([2, 3], pa.int8()), ["2", "3"], 0),
        (pa.array([10**16 - 1, 3], pa.uint64()), ["9999999999999999", "3"], 0),
        (pa.array(["1.5", "2e-9"], pa.large_string()), ["1.5", "0.000000002"], 0),
        (pa.array(["1.5", "2"]).dictionary_encode(), ["1.5", "2"], 0),
        (pa.array([Decimal("1.0000000000005"), Decimal(1)], pa.decimal128(30, 13)), ["1.000000000001", "1"], 1),
        (pa.array([Decimal("1.5"), Decimal(1)], pa.decimal256(60, 20)), ["1.5", "1"], 0),
        (pa.array([0.1 + 0.2, 2.0]), ["0.3", "2"], 1),
        (pa.array(["123456789012345.6789", "2.5"]), ["123456789012345.6789", "2.5"], 0),
    ],
)
def test_numbers_of_any_numeric_column(name: str, column: pa.Array, expected: list[str], rounded: int) -> None:
    batch = Batch.from_table(table(**{name: column}), TERMS)
    assert batch is not None
    assert shown(batch.rows[name]) == expected
    assert batch.rounded == rounded
    if not pa.types.is_floating(column.type) or pa.types.is_float64(column.type):
        # a shorter float has lost its shortest text as a Python number
        assert outcome(lambda: batch) == outcome(lambda: Batch.from_rows(table(**{name: column}).to_pylist(), TERMS))


#: Floats next to the middle between two last decimals, and anywhere else.
floats = st.one_of(
    st.none(),
    st.floats(),
    st.floats(0, 2e7),
    st.decimals("-1e7", "1e7", places=12).map(float),
    st.decimals("-1e3", "1e3", places=13).map(float),
    st.decimals("0.01", "100", places=9).map(float),
    st.integers(0, 10**9).map(lambda v: v / 100),
    st.integers(0, 10**9).map(lambda v: v / 100 * 1.1),
    st.integers(-(10**15), 10**15).map(lambda v: float(Decimal(2 * v + 1).scaleb(-12) / 2)),
    st.integers(-3, 10**7).map(lambda v: float(Decimal(v).scaleb(-13))),
)


@given(st.lists(floats, min_size=1, max_size=5))
@settings(max_examples=2000)
def test_a_float_is_the_shortest_decimal_that_reads_back_as_it(values: list[float | None]) -> None:
    try:
        found = columns.of_floats(pa.array([None, *values], pa.float64())[1:])
    except (columns.Unusual, pa.ArrowException):
        found = None
    if found is not None:
        numbers, rounded = found
        numbers.validate(full=True)
        exact = [None if value is None else Decimal(repr(value)) for value in values]
        stored = [None if v is None else v.quantize(Decimal("1e-12"), ROUND_HALF_UP) for v in exact]
        assert numbers.to_pylist() == stored
        marked = [None] * len(values) if rounded is None else rounded.to_pylist()
        assert [bool(mark) for mark in marked] == [a != b for a, b in zip(exact, stored, strict=True)]
        for was, now in zip(exact, stored, strict=True):
            assert was is None or now is None or abs(now - was) * 10**6 <= abs(was)
    elif all(value is None or (repr(value) == f"{value:.2f}".rstrip("0") and abs(value) < 1e6) for value in values):
        raise AssertionError(values)


@given(st.lists(floats, min_size=1, max_size=5), st.sampled_from(["price", "bid_size"]))
@settings(max_examples=500)
def test_a_column_of_floats_is_a_column_of_their_texts(values: list[float | None], name: str) -> None:
    size = len(values)
    terms = Terms(LIMITS, "skip", prices="signed")
    key = {"symbol": [f"S{i}" for i in range(size)], "timestamp": [NOW] * size, "ask": pa.array(["1"] * size)}
    found = Batch.from_table(pa.table({**key, name: pa.array(values, pa.float64())}), terms)
    texts = [None if value is None or value != value else repr(value) for value in values]  # noqa: PLR0124  NaN
    given_rows = [
        {"symbol": f"S{i}", "timestamp": NOW, "ask": "1", name: text} for i, text in enumerate(texts)
    ]  # fmt: skip
    assert outcome(lambda: found) in (None, outcome(lambda: Batch.from_rows(given_rows, terms)))


large = st.one_of(
    numbers,
    st.builds(
        "{}{}".format, st.integers(-(10**30), 10**30), st.sampled_from(["", ".5", "e3", "e19", "e20", "00.1e-2"])
    ),
    st.integers(1, 10**40).map(str),
    st.decimals(-(10**36), 10**36, places=2).map(str),
    st.decimals(-(10**17), 10**17, places=20).map(str),
)


@given(st.data(), st.lists(large, min_size=1, max_size=4), st.sampled_from(["price", "bid_size"]), terms)
@settings(max_examples=2000)
def test_a_column_of_numbers_is_what_each_of_them_is(
    data: st.DataObject, values: list[str], name: str, terms: Terms
) -> None:
    if any("\ud800" in value for value in values):
        return
    others = {
        "symbol": [f"S{i}" for i in range(len(values))],
        "timestamp": [WHEN] * len(values),
        "ask": ["1"] * len(values),
    }
    alike = [in_texts(values, kind) for kind in TEXT_KINDS] + typed(name, values)
    column = data.draw(st.sampled_from(alike))
    found = outcome(lambda: Batch.from_table(pa.table({**others, name: column}), terms))
    given_rows = [dict(zip([*others, name], row, strict=True)) for row in zip(*others.values(), values, strict=True)]
    assert found in (None, outcome(lambda: Batch.from_rows(given_rows, terms)))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["34028234663852890", "1"]),
        pa.array(["102E20", "1"]),
        pa.array([3.402823466385289e16, 1]),
        pa.array([Decimal(6236932234488827896), Decimal(1)], pa.decimal128(38, 0)),
        pa.array([Decimal("38900218841069649574.5741361420"), Decimal(1)], pa.decimal128(38, 10)),
        pa.array([Decimal("7.6568531784551E+18"), Decimal(100_000)], pa.decimal128(20, -5)),
        pa.array([Decimal("1e70"), Decimal(1)], pa.decimal256(76, 0)),
    ],
)
def test_a_number_too_large_for_the_columns_is_refused_and_no_other_number(column: pa.Array) -> None:
    assert Batch.from_table(table(price=column), TERMS) is None
    batch = Batch.from_rows(table(price=column).to_pylist(), Terms(LIMITS, "skip"))
    assert [(r.index, r.code) for r in batch.rejected] == [(0, "price-out-of-range")]


@pytest.mark.parametrize(
    "columns",
    [
        {"price": pa.array([1e300, 1.0])},
        {"price": pa.array([float("inf"), 1.0])},
        {"price": pa.array([1e-9, 5e-324])},
        {"price": pa.array([True, False])},
        {"price": pa.array(["1", " 1"])},
        {"price": pa.array(["1", "1e-2147483640"])},
        {"price": pa.array(["1", "1" * 101])},
        {"price": pa.array(["0.00000049999999", "1"])},
        {"timestamp": pa.array([NOW.replace(tzinfo=None)] * 2, pa.timestamp("us"))},
        {"timestamp": pa.array([1, 2])},
        {"timestamp": pa.array([2**62] * 2, pa.timestamp("s", "UTC"))},
        {"timestamp": pa.array([None, NOW])},
        {"timestamp": pa.array([WHEN, "2026-11-20 10:00:00Z"])},
        {"timestamp": pa.array([WHEN, "2026-11-20T10:00:00123Z"])},
        {"symbol": pa.array([b"a", b"b"])},
        {"symbol": pa.array([None, "b"])},
        {"volume": pa.array([10**16, 1], pa.uint64())},
        {"volume": pa.array([True, False])},
        {"source": pa.array([1, 2])},
    ],
)
def test_what_is_unusual_in_a_column_is_left_to_the_thorough_way(columns: dict[str, pa.Array]) -> None:
    assert Batch.from_table(table(**columns), TERMS) is None


def test_no_number_in_a_column_of_floats_is_an_absent_value() -> None:
    nan = float("nan")
    column = table(price=pa.array([nan, 1.5]), bid=pa.array([2.5, nan]), volume=pa.array([nan, None], pa.float32()))
    batch = Batch.from_table(column, TERMS)
    assert batch is not None
    assert [row["price"] for row in batch.rows.to_pylist()] == [None, Decimal("1.5")]
    given_rows = [
        {"symbol": "a", "timestamp": NOW, "price": nan, "ask": 3.5},
        {"symbol": "b", "timestamp": NOW, "bid": nan},
    ]
    thorough = Batch.from_rows(given_rows, Terms(LIMITS, "skip"))
    assert thorough.rows["ask"].to_pylist() == [Decimal("3.5")]
    assert [r.code for r in thorough.rejected] == ["price-missing"]


@pytest.mark.parametrize(
    ("unit", "value", "nanos"),
    [
        ("s", 1763600000, 0),
        ("ms", 1763600000123, 123_000_000),
        ("us", 1763600000123456, 123_456_000),
        ("ns", 1763600000123456789, 123_456_789),
    ],
)
def test_whole_numbers_are_instants_of_the_given_precision(unit: Any, value: int, nanos: int) -> None:
    micros, rest = divmod(nanos, 1000)
    expected = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=1763600000, microseconds=micros), rest)
    terms = Terms(LIMITS, precision=unit)
    row = {"symbol": "A", "price": 1}
    for batch in (
        json.decode(in_json([{**row, "timestamp": value}]), terms),
        json.decode(in_json([{**row, "timestamp": value}] * (rows.FEW + 1)), terms),
        Batch.from_rows([{**row, "timestamp": value}], terms),
        Batch.from_rows([{**row, "timestamp": str(value)}], terms),
        Batch.from_table(pa.table({"symbol": ["A"], "timestamp": [value], "price": [1]}), terms),
        Batch.from_table(pa.table({"symbol": ["A"], "timestamp": [str(value)], "price": [1]}), terms),
    ):
        assert batch is not None
        assert (batch.rows["timestamp"][0].as_py(), batch.rows[NANOS][0].as_py()) == expected
    both = [{**row, "timestamp": value}, {**row, "symbol": "B", "timestamp": WHEN}]
    assert len(json.decode(in_json(both), terms)) == 2


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("seconds", "code"),
    [(631_151_999, "timestamp-unit"), (631_152_000, ""), (0, "timestamp-unit"), (-1, "timestamp-unit"),
     (9_223_372_037, "timestamp-unit"), (10**30, "timestamp-unit"), (10**4200, "timestamp-unit"),
     (1_800_000_000, "timestamp-in-future")],
)  # fmt: skip
def test_a_number_that_must_be_of_another_unit_is_refused(unit: Any, seconds: int, code: str) -> None:
    count = seconds * (10**9 // UNITS[unit])
    terms = Terms(LIMITS, "skip", precision=unit)
    row = {"symbol": "A", "timestamp": count, "price": 1}
    found = [Batch.from_rows([row], terms)]
    if seconds < 10**30:
        found += [json.decode(in_json([row] * n), terms) for n in (1, rows.FEW + 1)]
        found.append(Batch.from_rows([row | {"timestamp": str(count)}], terms))
        found.append(Batch.from_rows([row | {"timestamp": Decimal(count)}], terms))
    if abs(count) < 2**63 and (taken := Batch.from_table(pa.table([["A"], [count], [1]], names=NAMES[:3]), terms)):
        found.append(taken)
    for batch in found:
        assert {r.code for r in batch.rejected} == ({code} if code else set())


# --- keys ---


@given(st.lists(st.lists(tame_rows, max_size=5), min_size=1, max_size=5), st.sampled_from([0, 2]))
def test_batches_join_in_the_order_of_their_keys(requests: list[list[dict[str, Any]]], length: int) -> None:
    with few(length):
        batches = [json.decode(in_json(given_rows), Terms(LIMITS, "skip")) for given_rows in requests]
        found = joined(batches).to_pylist()
    everything = [row for batch in batches for row in batch.rows.to_pylist()]
    assert [key_of(row) for row in found] == sorted(map(key_of, everything))
    assert sorted(map(str, found)) == sorted(map(str, everything))
    bounds = ends(batches)
    assert bounds.keys() == {row["symbol"] for row in found}
    for symbol, bound in bounds.items():
        own = [instant_of(row) for row in found if row["symbol"] == symbol]
        assert bound == (own[0], own[-1])


def instant_of(row: dict[str, Any]) -> int:
    return nanoseconds(row["timestamp"]) + int(row[NANOS])


def key_of(row: dict[str, Any]) -> tuple[str, int]:
    return row["symbol"], instant_of(row)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(-(2**63) + 10**15, 2**63 - 1)), min_size=1, max_size=20
    ),
    st.sampled_from([0, 10, 62]),
)  # fmt: skip
def test_keys_sort_right_however_far_apart(keys: list[tuple[str, int]], shift: int) -> None:
    instants = [instant >> shift for _, instant in keys]
    micros, nanos = columns.instants_of(instants)
    batch = pa.RecordBatch.from_arrays(
        [pa.array([symbol for symbol, _ in keys]), micros, nanos], names=["symbol", "timestamp", NANOS]
    )
    found, same = order(batch)
    expected = sorted(range(len(keys)), key=lambda i: (keys[i][0], instants[i], i))
    assert found.to_pylist() == expected
    ordered = [(keys[i][0], instants[i]) for i in expected]
    assert same.to_pylist() == [ordered[i] == ordered[i + 1] for i in range(len(ordered) - 1)]


# --- ties=number ---

#: Instants about a microsecond, a second and a minute, where rows that are moved on meet others and cross over.
START = nanoseconds(datetime(2026, 11, 20, 10, tzinfo=UTC))
crowded = st.builds(
    int.__add__, st.sampled_from([START, START - 10**3, START - 10**9, START + 10**9 - 10**3]), st.integers(990, 1003)
)
ticks = st.lists(st.tuples(st.sampled_from("aB"), crowded), max_size=30)


def numbered(keys: Sequence[tuple[str, int]], length: int, **options: Any) -> Batch:
    body = in_json(
        [
            {"symbol": symbol, "timestamp": rfc3339_nano(instant), "price": position + 1}
            for position, (symbol, instant) in enumerate(keys)
        ]
    )
    with few(length):
        return json.decode(body, Terms(LIMITS, ties="number", **options))


@given(ticks, lengths, st.sampled_from(["update", "merge", "ignore", "error"]))
def test_numbered_ties_lose_nothing_and_keep_their_order(
    keys: list[tuple[str, int]], length: int, on_conflict: Any
) -> None:
    batch = numbered(keys, length, on_conflict=on_conflict)
    stored = batch.rows.to_pylist()
    expected: dict[str, list[tuple[int, int]]] = {}
    for position in sorted(range(len(keys)), key=lambda i: (keys[i][1], i)):
        symbol, instant = keys[position]
        own = expected.setdefault(symbol.upper(), [])
        own.append((max(instant, own[-1][0] + 1) if own else instant, position + 1))
    assert [(row["symbol"], instant_of(row), row["price"]) for row in stored] == [
        (symbol, *row) for symbol in sorted(expected) for row in expected[symbol]
    ]
    moved = sum(instant_of(row) != keys[int(row["price"]) - 1][1] for row in stored)
    assert (batch.numbered, batch.superseded, len(batch)) == (moved, 0, len(keys))
    assert outcome(lambda: numbered(keys, length, on_conflict=on_conflict)) == outcome(lambda: batch)
    again = numbered([(row["symbol"], instant_of(row)) for row in stored], length)
    assert again.numbered == 0
    assert [key_of(row) for row in again.rows.to_pylist()] == [key_of(row) for row in stored]


@pytest.mark.parametrize("length", [0, rows.FEW])
def test_the_next_tie_is_a_nanosecond_later(length: int) -> None:
    last = START + 10**9 - 1
    batch = numbered([("A", last), ("A", last), ("A", last + 1), ("B", last), ("A", last)], length)
    assert [(row["symbol"], instant_of(row) - last, row["price"]) for row in batch.rows.to_pylist()] == [
        ("A", 0, 1), ("A", 1, 2), ("A", 2, 5), ("A", 3, 3), ("B", 0, 4),
    ]  # fmt: skip
    assert batch.numbered == 3
    assert batch.rows["timestamp"][1].as_py().microsecond == 0


def test_a_row_that_is_refused_takes_no_place() -> None:
    row: dict[str, Any] = {"symbol": "A", "timestamp": WHEN}
    given_rows = [row | {"price": price} for price in (1, -1, 2, "x", 3)]
    batch = Batch.from_rows(given_rows, Terms(LIMITS, "skip", ties="number"))
    assert (batch.rows[NANOS].to_pylist(), batch.numbered) == ([0, 1, 2], 2)


# --- merge ---


@given(st.lists(tame_rows, max_size=10), lengths, st.sampled_from(["positive", "signed"]))
@settings(max_examples=300)
def test_to_merge_in_one_body_is_to_merge_one_after_another(
    given_rows: list[dict[str, Any]], length: int, prices: Any
) -> None:
    terms = Terms(LIMITS, "skip", "merge", prices=prices)
    stored: dict[tuple[str, int], dict[str, Any]] = {}
    with few(length):
        for given_row in given_rows:
            for row in json.decode(in_json([given_row]), terms).rows.to_pylist():
                held = stored.setdefault(key_of(row), row)
                stored[key_of(row)] = {name: held[name] if row[name] is None else row[name] for name in row}
        batch = json.decode(in_json(given_rows), terms)
    assert batch.rows.to_pylist() == [stored[key] for key in sorted(stored)]
    assert batch.superseded == batch.received - len(batch.rejected) - len(stored)


@pytest.mark.parametrize("length", [0, rows.FEW])
def test_nulls_keep_what_an_earlier_row_gave(length: int) -> None:
    key = {"symbol": "A", "timestamp": WHEN}
    given_rows = [
        key | {"price": 1, "volume": 5, "source": "x"}, key | {"bid": 2, "ask": 0}, key | {"price": 3, "volume": 0}
    ]  # fmt: skip
    with few(length):
        batch = json.decode(in_json(given_rows), Terms(LIMITS, on_conflict="merge"))
    (row,) = batch.rows.to_pylist()
    assert [row[name] for name in VALUES] == [3, 2, None, None, None, 0, "x"]
    assert (batch.superseded, batch.zeros, batch.index.to_pylist()) == (2, 1, [2])


# --- names, sizes ---


def test_a_field_may_come_under_another_name() -> None:
    body = b'[{"ticker": "A", "ts": "2026-11-20T10:00:00Z", "last_price": 1.5, "bid_price": 1, "ask_price": 2}]'
    (row,) = json.decode(body, TERMS).rows.to_pylist()
    assert {name: row[name] for name in NAMES[:5]} == {
        "symbol": "A",
        "timestamp": datetime(2026, 11, 20, 10, tzinfo=UTC),
        "price": Decimal("1.5"),
        "bid": 1,
        "ask": 2,
    }


@pytest.mark.parametrize(
    ("row", "pointer", "code"),
    [
        ({"ticker": "A", "symbol": "A"}, "/0/ticker", "field-twice"),
        ({"last": 1, "last_price": 1}, "/0/last", "field-twice"),
        ({"last": -1}, "/0/last", "price-not-positive"),
        ({"ts": "x"}, "/0/ts", "timestamp-invalid"),
    ],
)
def test_a_fault_is_shown_where_the_client_put_it(row: dict[str, Any], pointer: str, code: str) -> None:
    good = {"symbol": "A", "timestamp": "2026-11-20T10:00:00Z", "price": 1}
    renamed = {"last": "price", "ts": "timestamp"}
    hidden = {renamed[name] for name in row if name in renamed}
    whole = {name: value for name, value in good.items() if name not in hidden} | row
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([whole], TERMS)
    assert [(r.pointer, r.code) for r in caught.value.rejections] == [(pointer, code)]


GOOD = {"symbol": "A", "timestamp": WHEN, "price": "1", "source": "a, b: c"}


@given(st.data(), st.sampled_from([1, 3, rows.FEW + 3]), st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans())
@settings(max_examples=200)
def test_a_field_with_two_values_refuses_its_row(
    data: st.DataObject, length: int, separators: tuple[str, str], wrapped: bool
) -> None:
    """Of two prices nobody knows which one is meant, whatever is odd in other quotes; null is no value."""
    others = st.dictionaries(
        st.sampled_from(["bid", "ask", "volume", "source"]), st.sampled_from([None, "1.5", 1.5, "null", ", ", '":', 3])
    )
    given_rows = [{**GOOD, **data.draw(others)} if i < 3 else GOOD for i in range(length)]
    texts = [standard_json.dumps(row, separators=separators) for row in given_rows]
    place = data.draw(st.integers(0, length - 1))
    member = data.draw(st.sampled_from([*given_rows[place].items(), ("symbol", "B"), ("price", None), ("source", "x")]))
    again = standard_json.dumps(dict([member]), separators=separators)
    before, after = f"{again[:-1]}{separators[0]}{texts[place][1:]}", f"{texts[place][:-1]}{separators[0]}{again[1:]}"
    for twice, lost in ((before, member[1]), (after, given_rows[place].get(member[0]))):
        sent = [*texts[:place], twice, *texts[place + 1 :]]
        array = "[" + separators[0].join(sent) + "]"
        body, pointer = (f'{{"quotes"{separators[1]}{array}}}', "/quotes") if wrapped else (array, "")
        for batch, within in (
            (json.decode(body.encode(), Terms(LIMITS, "skip")), pointer),
            (ndjson.decode("\n".join(sent).encode(), Terms(LIMITS, "skip")), ""),
        ):
            refused = {r.index: (r.pointer, r.code) for r in batch.rejected if r.code == "field-twice"}
            assert refused == ({} if lost is None else {place: (f"{within}/{place}/{member[0]}", "field-twice")})


@pytest.mark.parametrize(
    "body", [b'{"quotes":[],"quotes":[]}', b'{"quotes":[{"symbol":"A","timestamp":0}],"quotes":[]}']
)
def test_quotes_come_once(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        json.decode(body, TERMS)


def test_what_looks_like_a_member_goes_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "from_rows", None)
    for length in (1, rows.FEW + 1):
        given_rows = [{**GOOD, "timestamp": rfc3339_nano(START + i), "bid": None} for i in range(length)]
        for separators in ((",", ":"), (", ", ": ")):
            texts = [standard_json.dumps(row, separators=separators) for row in given_rows]
            body = f"[{', '.join(texts)}]"
            assert len(json.decode(body.encode(), TERMS)) == length
            assert len(json.decode(f'{{"quotes": {body}}}'.encode(), TERMS)) == length
            assert len(ndjson.decode("\n".join(texts).encode(), TERMS)) == length


@pytest.mark.parametrize("part", [b"{},", b"[],", b"1,", b'"",', b'{"symbol":"A","timestamp":"x"},'])
@pytest.mark.parametrize("decode", [json.decode, ndjson.decode])
def test_a_body_of_too_many_values_is_refused_before_it_is_read(part: bytes, decode: Any) -> None:
    body = b"[" + 5000 * part + b"1]"
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decode(body, Terms(Limits(max_rows=20)))
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_the_longest_batch_is_not_too_many_values() -> None:
    row = {name: WHEN if name == "timestamp" else 1 for name in NAMES} | {"source": "{[,"}
    given_rows = [row | {"symbol": f"S{i}"} for i in range(20)]
    assert len(json.decode(in_json(given_rows), Terms(Limits.at(NOW, max_rows=20)))) == 20


def test_no_rows_are_an_empty_batch() -> None:
    for batch in (Batch.of([], TERMS, any_values), Batch.from_rows([], TERMS), Batch.from_table(table()[:0], TERMS)):
        assert batch is not None
        assert (batch.received, len(batch), batch.columns.num_rows, list(batch.ends())) == (0, 0, 0, [])
    assert joined([]).num_rows == 0
    assert ends([]) == {}


@pytest.mark.parametrize("filler", [0, 200])
def test_what_the_table_refuses_is_not_counted(filler: int) -> None:
    moment = "2026-11-20T10:00:00Z"
    odd = [
        {"symbol": "A", "timestamp": moment, "price": 1},
        {"symbol": "A", "timestamp": moment, "price": 0, "bid": 3, "ask": 2, "volume": "1.0000000000001"},
        {"symbol": "B", "timestamp": moment, "price": 0, "bid": 3, "ask": 2},
    ]
    plain = [{"symbol": f"S{i}", "timestamp": moment, "price": 1} for i in range(filler)]
    terms = Terms(Limits.at(NOW), "skip", "error", ties="number")
    batch = json.decode(in_json([*odd, *plain]), terms)
    whole = batch.receipt(inserted=len(batch))
    assert (whole.numbered, whole.rounded, whole.zeros, whole.crossed) == (1, 1, 2, 2)
    stored = [Rejection(i, f"/{i}/timestamp", "already-stored", "") for i in (0, 1)]
    receipt = batch.receipt(inserted=len(batch) - 2, conflicts=stored)
    assert (receipt.numbered, receipt.rounded, receipt.zeros, receipt.crossed) == (0, 0, 1, 1)
