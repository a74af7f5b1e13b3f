"""The fast ways into a batch mean the same as the thorough one, and take no row that it refuses."""

import json as standard_json
import operator
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import batch as batch_module
from app.batch import Batch, Row, joined
from app.errors import BodyTooLarge, InvalidQuotes, InvalidRequest, QuotesError
from app.formats import json, ndjson
from app.model import FIELDS, Limits, OnConflict, Terms

NOW = datetime(2026, 11, 20, 15, tzinfo=UTC)

finite = st.one_of(
    st.integers(1, 10**12 - 1),
    st.decimals(Decimal("0.00000001"), Decimal(999_999), places=8),
    st.decimals(Decimal("0.5"), Decimal(500), places=2),
)
strange = st.one_of(
    finite,
    st.integers(-(10**13), 10**13),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.text(alphabet="0123456789.eE+-_ aN", max_size=8),
    st.sampled_from(["", "NaN", "1_000", " 1", "1 ", ".5", "5.", "1e3", "+1", "Infinity", "0x1", "٣", True, [1], {}]),
)
good_times = st.datetimes(datetime(2026, 11, 19), datetime(2026, 11, 20)).map(lambda t: t.isoformat() + "Z")  # noqa: DTZ001
times = st.one_of(
    good_times,
    good_times.map(lambda t: t.replace("Z", "+02:00")),
    st.datetimes(datetime(1960, 1, 1), datetime(2030, 1, 1)).map(lambda t: t.isoformat() + "Z"),  # noqa: DTZ001
    st.sampled_from(
        ["2026-11-20T24:00:00Z", "2026-02-30T00:00:00Z", "2026-11-20T10:00:00", "2026-11-20 10:00:00Z", "x", 7,
         "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+05:00", "2026-11-20T10:00:60Z", "2026-11-20T10:00:00.1234567Z",
         "2026-11-20T10:00:00Z\n", "2026-11-20T10:00:00+24:00", "٢٠٢٦-11-20T10:00:00Z"]
    ),
)  # fmt: skip
sizes = st.one_of(
    st.none(), st.integers(0, 2**63 - 1), st.integers(-(2**65), 2**65), st.sampled_from([1.0, 1.5, True, "7"])
)
symbols = st.one_of(
    st.sampled_from(["A", "a", "BRK.B", "EURUSD=X", "c"]),
    st.sampled_from(["", "ß", "x" * 33, "A\n", "A B", "\u017f", 5]),
)
sources = st.one_of(st.none(), st.just("feed"), st.text(max_size=5), st.just("x" * 256), st.just("a\0"), st.just(1))


def quote(*, wild: bool) -> st.SearchStrategy[dict[str, Any]]:
    prices = st.one_of(st.none(), strange if wild else finite)
    return st.fixed_dictionaries(
        {"symbol": symbols if wild else st.sampled_from(["A", "a", "b"]), "timestamp": times if wild else good_times},
        optional={
            "price": prices,
            "bid": prices,
            "ask": prices,
            "bid_size": sizes if wild else st.integers(0, 9),
            "volume": sizes if wild else st.none(),
            "source": sources if wild else st.just("feed"),
        },
    )


requests = st.one_of(
    st.lists(quote(wild=False), min_size=1, max_size=12),
    st.lists(quote(wild=True), min_size=1, max_size=4),
)


def in_json(rows: list[dict[str, Any]]) -> bytes:
    """A JSON body; decimals as numbers with all their digits."""
    return msgspec.json.encode(
        [{k: msgspec.Raw(str(v).encode()) if isinstance(v, Decimal) else v for k, v in row.items()} for row in rows]
    )


def typed_rows(body: bytes) -> list[Row]:
    return msgspec.json.Decoder(list[Row], float_hook=str).decode(body)


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
    counts = (batch.received, batch.superseded, batch.rounded, batch.crossed, batch.rejected, batch.pointer, len(batch))
    return counts, batch.columns.to_pylist()


@given(requests, st.sampled_from(["update", "ignore", "error"]), st.sampled_from([0, 100]), st.sampled_from([1, 366]))
def test_the_fast_ways_give_what_the_thorough_one_gives(
    rows: list[dict[str, Any]], on_conflict: OnConflict, few: int, days: int
) -> None:
    body = in_json(rows)
    terms = Terms(Limits.at(NOW, max_days=days), "abort", on_conflict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_FEW", few)
        given_rows = standard_json.loads(body, parse_float=Decimal)
        thorough = outcome(lambda: Batch.from_rows(given_rows, terms))
        assert outcome(lambda: json.decode(body, terms)) == thorough
        try:
            typed = typed_rows(body)
        except msgspec.DecodeError:
            return
        assert outcome(lambda: Batch.of(typed, terms)) in (thorough, None)


@given(st.lists(quote(wild=False), min_size=1, max_size=12), st.sampled_from([0, 100]))
def test_what_is_usual_goes_the_fast_way(rows: list[dict[str, Any]], few: int) -> None:
    rows = [{**row, "price": Decimal("1.5"), "bid": 1, "ask": None} for row in rows]
    typed = typed_rows(in_json(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_FEW", few)
        batch = Batch.of(typed, Terms(Limits.at(NOW)))
    assert batch is not None
    assert batch.received == len(rows)


@given(st.lists(st.lists(quote(wild=False), min_size=1, max_size=5), min_size=1, max_size=5), st.sampled_from([0, 2]))
def test_batches_join_in_the_order_of_their_keys(requests: list[list[dict[str, Any]]], few: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "_FEW", few)
        batches = [
            json.decode(in_json([{**row, "price": 1} for row in rows]), Terms(Limits.at(NOW))) for rows in requests
        ]
        rows = joined(batches).to_pylist()
    everything = [row for batch in batches for row in batch.rows.to_pylist()]
    assert [(row["symbol"], row["timestamp"]) for row in rows] == sorted(
        (r["symbol"], r["timestamp"]) for r in everything
    )
    assert sorted(map(str, rows)) == sorted(map(str, everything))


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2**62)), min_size=1, max_size=20), st.sampled_from([0, 62])
)
def test_keys_sort_right_however_far_apart(keys: list[tuple[str, int]], shift: int) -> None:
    columns = pa.RecordBatch.from_arrays(
        [
            pa.array([s for s, _ in keys]),
            pa.array([t >> shift for _, t in keys], pa.int64()).cast(pa.timestamp("us", "UTC")),
        ],
        names=["symbol", "timestamp"],
    )
    order, same = batch_module._order(columns)
    expected = sorted(range(len(keys)), key=lambda i: (keys[i][0], keys[i][1] >> shift, i))
    assert order.to_pylist() == expected
    ordered = [(keys[i][0], keys[i][1] >> shift) for i in expected]
    assert same.to_pylist() == [ordered[i] == ordered[i + 1] for i in range(len(ordered) - 1)]


BASE: dict[str, Any] = {
    "symbol": ["a", "B"],
    "timestamp": [NOW - timedelta(hours=1), NOW - timedelta(hours=2)],
    "price": [Decimal("1.25"), Decimal("3.5")],
}


def table(**columns: Any) -> pa.Table:
    return pa.table({**BASE, **columns})


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.25, 3.1], pa.float64()), ["1.25000000", "3.10000000"]),
        (pa.array([1.25, 3.1], pa.float32()), ["1.25000000", "3.10000000"]),
        (pa.array([2, 3], pa.int8()), ["2.00000000", "3.00000000"]),
        (pa.array(["1.5", "2"], pa.large_string()), ["1.50000000", "2.00000000"]),
        (pa.array(["1.5", "2"]).dictionary_encode(), ["1.50000000", "2.00000000"]),
        (pa.array([Decimal("1.000000005"), Decimal(1)], pa.decimal128(30, 9)), ["1.00000001", "1.00000000"]),
        (pa.array([0.1 + 0.2, 2.0]), ["0.30000000", "2.00000000"]),
    ],
)
def test_prices_of_any_numeric_column(column: pa.Array, expected: list[str]) -> None:
    batch = Batch.from_table(table(price=column), Terms(Limits.at(NOW)))
    assert batch is not None
    assert [str(price) for price in batch.rows["price"].to_pylist()] in (expected, expected[::-1])
    thorough = Batch.from_rows(table(price=column).to_pylist(), Terms(Limits.at(NOW)))
    if column.type != pa.float32():  # as a Python number it has lost its shortest text
        assert outcome(lambda: batch) == outcome(lambda: thorough)


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.floats(),
            st.floats(0, 2e7),
            st.decimals("-1e7", "1e7", places=8).map(float),
            st.decimals("0.01", "100", places=9).map(float),
            st.integers(0, 10**9).map(lambda v: v / 100),
            st.integers(0, 10**9).map(lambda v: v / 100 * 1.1),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_float_is_the_shortest_decimal_that_reads_back_as_it(values: list[float | None]) -> None:
    found = batch_module._of_floats(pa.array([None, *values], pa.float64())[1:])
    if found is not None:
        prices, rounded = found
        prices.validate(full=True)
        texts = [None if value is None else Decimal(repr(value)) for value in values]
        exact = [None if text is None else text.quantize(Decimal("0.00000001"), ROUND_HALF_UP) for text in texts]
        assert prices.to_pylist() == exact
        assert rounded == sum(map(operator.ne, exact, texts))
    elif all(value is None or (repr(value) == f"{value:.2f}".rstrip("0") and value < 1e6) for value in values):
        raise AssertionError(values)


@pytest.mark.parametrize(
    "columns",
    [
        {"price": pa.array([float("nan"), 1.0])},
        {"price": pa.array([1e300, 1.0])},
        {"price": pa.array([True, False])},
        {"timestamp": pa.array([NOW.replace(tzinfo=None)] * 2, pa.timestamp("us"))},
        {"timestamp": pa.array([1, 2])},
        {"timestamp": pa.array([2**62] * 2, pa.timestamp("s", "UTC"))},
        {"timestamp": pa.array([None, NOW])},
        {"symbol": pa.array([b"a", b"b"])},
        {"symbol": pa.array([None, "b"])},
        {"volume": pa.array([2**63, 1], pa.uint64())},
        {"volume": pa.array([1.5, 1.0])},
        {"volume": pa.array([True, False])},
        {"volume": pa.array(["1", "2"])},
    ],
)
def test_what_is_unusual_in_a_column_is_left_to_the_thorough_way(columns: dict[str, pa.Array]) -> None:
    assert Batch.from_table(table(**columns), Terms(Limits.at(NOW))) is None


@pytest.mark.parametrize(
    ("unit", "value"),
    [("s", 1763600000), ("ms", 1763600000123), ("us", 1763600000123456), ("ns", 1763600000123456789)],
)
def test_whole_numbers_are_instants_of_the_given_precision(unit: Any, value: int) -> None:
    seconds, fraction = divmod(value, {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit])
    micros = fraction * 10**6 // {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    expected = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds, microseconds=micros)
    terms = Terms(Limits.at(NOW), precision=unit)
    row = {"symbol": "A", "price": 1}
    for batch in (
        json.decode(in_json([{**row, "timestamp": value}]), terms),
        json.decode(in_json([{**row, "timestamp": value + i * 10**9} for i in range(100)]), terms)
        if unit == "ns"
        else json.decode(in_json([{**row, "timestamp": value}] * 100), terms),
        Batch.from_rows([{**row, "timestamp": str(value)}], terms),
        Batch.from_table(pa.table({"symbol": ["A"], "timestamp": [value], "price": [1]}), terms),
        Batch.from_table(pa.table({"symbol": ["A"], "timestamp": [str(value)], "price": [1]}), terms),
    ):
        assert batch is not None
        assert batch.rows["timestamp"][0].as_py() == expected
    both = [{**row, "timestamp": value}, {**row, "symbol": "B", "timestamp": "2026-11-20T10:00:00Z"}]
    assert len(json.decode(in_json(both), terms)) == 2
    with pytest.raises(InvalidQuotes):
        json.decode(in_json([{**row, "timestamp": 10**30}]), terms)


def test_a_field_may_come_under_another_name() -> None:
    body = b'[{"ticker": "A", "ts": "2026-11-20T10:00:00Z", "last_price": 1.5, "bid_price": 1, "ask_price": 2}]'
    (row,) = json.decode(body, Terms(Limits.at(NOW))).rows.to_pylist()
    assert {name: row[name] for name in FIELDS[:5]} == {
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
        Batch.from_rows([whole], Terms(Limits.at(NOW)))
    assert [(r.pointer, r.code) for r in caught.value.rejections] == [(pointer, code)]


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
    row = {name: "2026-11-20T10:00:00Z" if name == "timestamp" else 1 for name in FIELDS} | {"source": "{[,"}
    rows = [row | {"symbol": f"S{i}"} for i in range(20)]
    assert len(json.decode(in_json(rows), Terms(Limits.at(NOW, max_rows=20)))) == 20


def test_no_rows_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        Batch.of([], Terms())
