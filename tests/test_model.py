"""The rules of a quote and the grammar of an interval."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.batch import Batch
from app.errors import BodyTooLarge, InvalidQuotes, InvalidRequest
from app.model import Interval, Limits, Terms, normal_symbol, rfc3339

NOW = datetime(2026, 11, 20, 15, tzinfo=UTC)
TERMS = Terms(Limits.at(NOW))
GOOD: dict[str, Any] = {"symbol": "AAPL", "timestamp": "2026-11-20T14:30:00Z", "price": Decimal("189.98")}


def refused(**fields: Any) -> tuple[str, str]:
    """Pointer and code of the one row that is refused between two good ones."""
    row = {**GOOD, **fields}
    other = {**GOOD, "symbol": "MSFT"}
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([other, row, {**other, "symbol": "IBM"}], TERMS)
    (rejection,) = caught.value.rejections
    assert rejection.index == 1
    return rejection.pointer, rejection.code


@pytest.mark.parametrize(
    ("fields", "pointer", "code"),
    [
        ({"symbol": ""}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A B"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A" * 33}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A\0"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "ÄÖ"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A\n"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "\ud800"}, "/1/symbol", "not-unicode"),
        ({"symbol": 7}, "/1/symbol", "wrong-type"),
        ({"symbol": None}, "/1/symbol", "field-missing"),
        ({"timestamp": "2026-11-20T14:30:00"}, "/1/timestamp", "timestamp-naive"),
        ({"timestamp": "yesterday"}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": "2026-13-20T14:30:00Z"}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": 1_700_000_000}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": "1700000000"}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": datetime(2026, 11, 20)}, "/1/timestamp", "timestamp-naive"),  # noqa: DTZ001
        ({"timestamp": "2026-11-20T15:01:01Z"}, "/1/timestamp", "timestamp-in-future"),
        ({"timestamp": "9999-12-31T23:59:59-12:00"}, "/1/timestamp", "timestamp-in-future"),
        ({"timestamp": "0001-01-01T00:00:00+14:00"}, "/1/timestamp", "timestamp-too-old"),
        ({"timestamp": "1969-12-31T23:59:59Z"}, "/1/timestamp", "timestamp-too-old"),
        ({"price": None}, "/1/price", "price-missing"),
        ({"price": None, "bid": 1}, "/1/price", "price-missing"),
        ({"price": 0}, "/1/price", "price-not-positive"),
        ({"price": -1}, "/1/price", "price-not-positive"),
        ({"price": "0.000000001"}, "/1/price", "price-not-positive"),
        ({"price": Decimal("NaN")}, "/1/price", "not-finite"),
        ({"price": Decimal("-Infinity")}, "/1/price", "not-finite"),
        ({"price": float("nan")}, "/1/price", "not-finite"),
        ({"price": Decimal("1e400")}, "/1/price", "price-out-of-range"),
        ({"price": "1000000000000"}, "/1/price", "price-out-of-range"),
        ({"price": "999999999999.999999999"}, "/1/price", "price-out-of-range"),
        ({"price": "much"}, "/1/price", "wrong-type"),
        ({"price": True}, "/1/price", "wrong-type"),
        ({"price": [1]}, "/1/price", "wrong-type"),
        ({"bid": 0}, "/1/bid", "price-not-positive"),
        ({"ask": -1}, "/1/ask", "price-not-positive"),
        ({"bid_size": -1}, "/1/bid_size", "size-negative"),
        ({"ask_size": 1.5}, "/1/ask_size", "wrong-type"),
        ({"volume": 2**63}, "/1/volume", "wrong-type"),
        ({"volume": -(2**70)}, "/1/volume", "wrong-type"),
        ({"volume": True}, "/1/volume", "wrong-type"),
        ({"source": "x" * 256}, "/1/source", "source-invalid"),
        ({"source": "a\0b"}, "/1/source", "source-invalid"),
        ({"prise": 1}, "/1/prise", "unknown-field"),
        ({"a/b~c": 1}, "/1/a~1b~0c", "unknown-field"),
    ],
)
def test_a_bad_row_is_named(fields: dict[str, Any], pointer: str, code: str) -> None:
    assert refused(**fields) == (pointer, code)


@pytest.mark.parametrize("row", [None, 3, "text", ["symbol"], b"{"])
def test_a_row_that_is_no_object_is_named(row: Any) -> None:
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([GOOD, row], TERMS)
    (rejection,) = caught.value.rejections
    assert (rejection.pointer, rejection.code) == ("/1", "not-an-object")


@pytest.mark.parametrize("name", ["symbol", "timestamp"])
def test_a_missing_field_is_named(name: str) -> None:
    row = {k: v for k, v in GOOD.items() if k != name}
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([row], TERMS, pointer="/quotes")
    (rejection,) = caught.value.rejections
    assert (rejection.pointer, rejection.code) == (f"/quotes/0/{name}", "field-missing")


def test_skip_keeps_the_good_rows_and_accounts_for_all() -> None:
    rows = [
        GOOD,
        {**GOOD, "price": -1},
        {**GOOD, "symbol": "IBM", "timestamp": "bad"},
        {**GOOD, "symbol": "IBM"},
        {**GOOD, "symbol": "IBM", "price": 2},
    ]
    batch = Batch.from_rows(rows, replace(TERMS, on_error="skip"))
    assert [r.index for r in batch.rejected] == [1, 2]
    assert batch.index.to_pylist() == [0, 4]
    assert batch.superseded == 1
    assert batch.received == len(batch) + batch.superseded + len(batch.rejected) == 5


def test_values_are_kept_exactly() -> None:
    batch = Batch.from_rows(
        [{**GOOD, "symbol": "btc-usd", "price": "123456789012.12345678", "volume": 2**63 - 1, "source": "é"}], TERMS
    )
    (row,) = batch.rows.to_pylist()
    assert row["symbol"] == "BTC-USD"
    assert row["price"] == Decimal("123456789012.12345678")
    assert row["volume"] == 2**63 - 1
    assert row["timestamp"] == datetime(2026, 11, 20, 14, 30, tzinfo=UTC)


def test_offsets_become_utc_and_nanoseconds_are_cut() -> None:
    batch = Batch.from_rows([{**GOOD, "timestamp": "2026-11-20T09:30:00.123456789-05:00"}], TERMS)
    assert batch.rows["timestamp"][0].as_py() == datetime(2026, 11, 20, 14, 30, 0, 123456, tzinfo=UTC)


def test_prices_round_half_up_and_are_counted() -> None:
    rows = [{**GOOD, "price": "1.000000005"}, {**GOOD, "symbol": "B", "price": "1.000000004"}]
    batch = Batch.from_rows(rows, TERMS)
    assert [str(price) for price in batch.rows["price"].to_pylist()] == ["1.00000001", "1.00000000"]
    assert batch.rounded == 2


def test_a_quote_without_price_gets_the_mid() -> None:
    rows = [{**GOOD, "price": None, "bid": "1.00000001", "ask": "1.00000002"}, {**GOOD, "symbol": "B"}]
    del rows[0]["price"]
    batch = Batch.from_rows(rows, TERMS)
    assert batch.rows["price"].to_pylist() == [Decimal("1.00000002"), Decimal("189.98")]


def test_crossed_quotes_are_stored_and_counted() -> None:
    batch = Batch.from_rows([{**GOOD, "bid": 2, "ask": 1}, {**GOOD, "symbol": "B", "bid": 1, "ask": 1}], TERMS)
    assert (len(batch), batch.crossed) == (2, 1)


def test_equal_keys_in_one_batch() -> None:
    rows = [{**GOOD, "price": p, "symbol": s} for p, s in ((1, "a"), (2, "A"), (3, "B"), (4, "a"))]
    last = Batch.from_rows(rows, TERMS)
    assert (last.rows["price"].to_pylist(), last.superseded) == ([4, 3], 2)
    first = Batch.from_rows(rows, replace(TERMS, on_conflict="ignore"))
    assert (first.rows["price"].to_pylist(), first.superseded) == ([1, 3], 2)
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows(rows, replace(TERMS, on_conflict="error"))
    assert [(r.index, r.code) for r in caught.value.rejections] == [(1, "duplicate-key"), (3, "duplicate-key")]


def test_limits_of_a_batch() -> None:
    with pytest.raises(InvalidRequest, match="no quotes"):
        Batch.from_rows([], TERMS)
    with pytest.raises(BodyTooLarge, match="at most 1 "):
        Batch.from_rows([GOOD, GOOD], Terms(Limits(max_rows=1)))
    days = [{**GOOD, "timestamp": datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=i)} for i in range(11)]
    assert len(Batch.from_rows(days[:10], Terms(Limits(max_days=10)))) == 10
    with pytest.raises(InvalidRequest, match="11 distinct days"):
        Batch.from_rows(days, Terms(Limits(max_days=10)))


def test_rows_that_retention_would_drop_are_refused() -> None:
    limits = Limits.at(NOW, retention=timedelta(days=10), chunk=timedelta(days=1))
    assert limits.oldest == NOW - timedelta(days=8)
    old = {**GOOD, "timestamp": NOW - timedelta(days=8, microseconds=1)}
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([old], Terms(limits))
    assert caught.value.rejections[0].code == "timestamp-too-old"
    assert len(Batch.from_rows([{**old, "timestamp": limits.oldest}], Terms(limits))) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["A", "b", "C-1"]), st.integers(0, 5), st.integers(1, 10**20 - 1)),
        min_size=1,
        max_size=60,
    )
)
def test_a_batch_is_what_a_dict_would_hold(rows: list[tuple[str, int, int]]) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    quotes = [
        {"symbol": s, "timestamp": start + timedelta(microseconds=t), "price": Decimal(p).scaleb(-8)}
        for s, t, p in rows
    ]
    batch = Batch.from_rows(quotes, TERMS)
    model = {(q["symbol"].upper(), q["timestamp"]): q["price"] for q in quotes}  # type: ignore[attr-defined]
    found = {(r["symbol"], r["timestamp"]): r["price"] for r in batch.rows.to_pylist()}
    assert found == model
    assert list(found) == sorted(model)
    assert batch.superseded == len(rows) - len(model)


@pytest.mark.parametrize(
    ("text", "canonical", "source"),
    [
        ("1s", "1s", "real_time"), ("90s", "90s", "real_time"), ("60s", "60s", "ohlc_1m"), ("1m", "1m", "ohlc_1m"),
        ("90m", "90m", "ohlc_1m"), ("60m", "60m", "ohlc_1h"), ("1h", "1h", "ohlc_1h"), ("24h", "24h", "ohlc_1d"),
        ("1d", "1d", "ohlc_1d"), ("2w", "2w", "ohlc_1d"), ("1M", "1M", "ohlc_1d"), ("5Min", "5m", "ohlc_1m"),
        ("1Hour", "1h", "ohlc_1h"), ("1Day", "1d", "ohlc_1d"), ("Day", "1d", "ohlc_1d"), ("3Month", "3M", "ohlc_1d"),
        ("1week", "1w", "ohlc_1d"),
    ],
)  # fmt: skip
def test_intervals(text: str, canonical: str, source: str) -> None:
    interval = Interval.parse(text)
    assert (str(interval), interval.source) == (canonical, source)


@pytest.mark.parametrize(
    "text", ["", "0m", "m", "1", "-1m", "1.5h", "1y", "1mo", " 1m", "1m ", "\u0661m", "5000d", "999999999M"]
)
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Interval.parse(text)


def test_symbols_are_normalised_or_refused() -> None:
    assert normal_symbol(" eurusd=x ") == "EURUSD=X"
    for bad in ("", "a b", "ß", "x" * 33, "A\0"):
        with pytest.raises(InvalidRequest):
            normal_symbol(bad)


def test_times_are_written_in_utc() -> None:
    assert rfc3339(datetime.fromisoformat("2026-11-20T09:30:00.5-05:00")) == "2026-11-20T14:30:00.500000Z"


@given(
    st.datetimes(timezones=st.timezones(), min_value=datetime(1971, 1, 1), max_value=datetime(2026, 1, 1)),  # noqa: DTZ001
    st.sampled_from(["Z", "offset", "space", "lower", "short", "nano"]),
)
def test_every_form_of_an_instant_means_the_same(moment: datetime, form: str) -> None:
    """The fast way by Arrow and the thorough one by pydantic agree."""
    utc = moment.astimezone(UTC).replace(tzinfo=None)
    text = {
        "Z": utc.isoformat() + "Z",
        "offset": (utc + timedelta(hours=5, minutes=30)).isoformat() + "+05:30",
        "space": utc.isoformat(" ") + "+00:00",
        "lower": utc.isoformat().lower() + "z",
        "short": (utc - timedelta(hours=3)).isoformat() + "-0300",
        "nano": utc.isoformat(timespec="microseconds") + "789Z",
    }[form]
    batch = Batch.from_rows([{**GOOD, "timestamp": text}], TERMS)
    assert batch.rows["timestamp"][0].as_py() == utc.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    ["2026-02-30T00:00:00Z", "2026-01-01T24:00:00Z", "2026-01-01T00:00:60Z", "2026-01-01T00:60:00Z",
     "2026-01-01T00:00:00+24:00", "2026-01-01T00Z", "2026-01-01T00:00:00.Z", "2026-00-01T00:00:00Z"],
)  # fmt: skip
def test_what_is_no_instant_is_refused_on_either_way(text: str) -> None:
    assert refused(timestamp=text) == ("/1/timestamp", "timestamp-invalid")
