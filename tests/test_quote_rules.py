"""The rules of a quote: what is refused and by which name, and what becomes of what is taken."""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from pydantic import ValidationError

from app.clock import Nanoseconds, nanoseconds
from app.errors import BodyTooLarge, InvalidQuotes, InvalidRequest
from app.quote import rules
from app.quote.batch import Batch
from app.quote.fields import FIELDS, NAMES, NANOS, REQUIRED
from app.quote.model import Quote, StoredQuote
from app.quote.rules import Numeral, Refused, normal_symbol
from app.quote.terms import Limits, Receipt, Terms
from tests.strategies import ABSURD, EDGES, NOW, numbers, symbols, wild_rows

TERMS = Terms(Limits.at(NOW))
SIGNED = replace(TERMS, prices="signed")
GOOD: dict[str, Any] = {"symbol": "AAPL", "timestamp": "2026-11-20T14:30:00Z", "price": Decimal("189.98")}


def refused(terms: Terms = TERMS, **fields: Any) -> tuple[str, str]:
    """Pointer and code of the one row that is refused between two good ones."""
    row = {**GOOD, **fields}
    other = {**GOOD, "symbol": "MSFT"}
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([other, row, {**other, "symbol": "IBM"}], terms)
    (rejection,) = caught.value.rejections
    assert rejection.index == 1
    return rejection.pointer, rejection.code


def taken(terms: Terms = TERMS, **fields: Any) -> dict[str, Any]:
    """What is stored of the one row."""
    (row,) = Batch.from_rows([{**GOOD, **fields}], terms).rows.to_pylist()
    return dict(row)


@pytest.mark.parametrize(
    ("fields", "pointer", "code"),
    [
        ({"symbol": ""}, "/1/symbol", "symbol-invalid"),
        ({"symbol": " "}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A\tB"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A,B"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A" * 65}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A" + " " * 300 + "B"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "A\0"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "ÄÖ"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "\u017f"}, "/1/symbol", "symbol-invalid"),
        ({"symbol": "\ud800"}, "/1/symbol", "not-unicode"),
        ({"symbol": 7}, "/1/symbol", "wrong-type"),
        ({"symbol": Numeral("1.5")}, "/1/symbol", "wrong-type"),
        ({"symbol": None}, "/1/symbol", "field-missing"),
        ({"timestamp": None}, "/1/timestamp", "field-missing"),
        ({"timestamp": "2026-11-20T14:30:00"}, "/1/timestamp", "timestamp-naive"),
        ({"timestamp": "yesterday"}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": "2026-13-20T14:30:00Z"}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": "2026-11-20T14:30:60Z"}, "/1/timestamp", "timestamp-leap-second"),
        ({"timestamp": "2026-11-20T14:30:00.1234567891Z"}, "/1/timestamp", "timestamp-too-fine"),
        ({"timestamp": 1_700_000_000}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": "1700000000"}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": True}, "/1/timestamp", "timestamp-invalid"),
        ({"timestamp": datetime(2026, 11, 20)}, "/1/timestamp", "timestamp-naive"),  # noqa: DTZ001
        ({"timestamp": "2026-11-20T15:01:00.000001Z"}, "/1/timestamp", "timestamp-in-future"),
        ({"timestamp": "9999-12-31T23:59:59-12:00"}, "/1/timestamp", "timestamp-in-future"),
        ({"timestamp": Nanoseconds(10**30)}, "/1/timestamp", "timestamp-in-future"),
        ({"timestamp": "0001-01-01T00:00:00+14:00"}, "/1/timestamp", "timestamp-too-old"),
        ({"timestamp": "1677-09-21T23:59:59.999999999Z"}, "/1/timestamp", "timestamp-too-old"),
        ({"timestamp": Nanoseconds(-(10**30))}, "/1/timestamp", "timestamp-too-old"),
        ({"price": None}, "/1/price", "price-missing"),
        ({"price": None, "volume": 1}, "/1/price", "price-missing"),
        ({"price": float("nan")}, "/1/price", "price-missing"),
        ({"price": 0}, "/1/price", "price-not-positive"),
        ({"price": None, "ask": 0}, "/1/ask", "price-not-positive"),
        ({"price": None, "bid": "0.0", "ask": 0}, "/1/bid", "price-not-positive"),
        ({"price": -1}, "/1/price", "price-not-positive"),
        ({"price": "-0.000000000001"}, "/1/price", "price-not-positive"),
        ({"price": "0.0000000000004"}, "/1/price", "price-too-fine"),
        ({"price": "-1e-30"}, "/1/price", "price-too-fine"),
        ({"price": "0.0000004999994999995"}, "/1/price", "price-too-fine"),
        ({"price": 5e-324}, "/1/price", "price-too-fine"),
        ({"price": Decimal("NaN")}, "/1/price", "not-finite"),
        ({"price": Decimal("-Infinity")}, "/1/price", "not-finite"),
        ({"price": float("inf")}, "/1/price", "not-finite"),
        ({"price": "NaN"}, "/1/price", "not-finite"),
        ({"price": "-infinity"}, "/1/price", "not-finite"),
        ({"price": Decimal("1e400")}, "/1/price", "price-out-of-range"),
        ({"price": "1e400"}, "/1/price", "price-out-of-range"),
        ({"price": "10000000000000000"}, "/1/price", "price-out-of-range"),
        ({"price": 10**16}, "/1/price", "price-out-of-range"),
        ({"price": "9999999999999999.9999999999995"}, "/1/price", "price-out-of-range"),
        ({"price": "1" * 101}, "/1/price", "number-too-long"),
        ({"price": "0." + "1" * 99}, "/1/price", "number-too-long"),
        ({"price": 10**101}, "/1/price", "number-too-long"),
        ({"price": 10**4200}, "/1/price", "number-too-long"),
        ({"price": "much"}, "/1/price", "wrong-type"),
        ({"price": ""}, "/1/price", "wrong-type"),
        ({"price": "1_000"}, "/1/price", "wrong-type"),
        ({"price": "\u0663"}, "/1/price", "wrong-type"),
        ({"price": "1e"}, "/1/price", "wrong-type"),
        ({"price": True}, "/1/price", "wrong-type"),
        ({"price": [1]}, "/1/price", "wrong-type"),
        ({"ask": -1}, "/1/ask", "price-not-positive"),
        ({"bid_size": -1}, "/1/bid_size", "size-negative"),
        ({"bid_size": "-0.000000000001"}, "/1/bid_size", "size-negative"),
        ({"ask_size": "0.0000000000001"}, "/1/ask_size", "size-too-fine"),
        ({"volume": 10**16}, "/1/volume", "size-out-of-range"),
        ({"volume": -(2**70)}, "/1/volume", "size-out-of-range"),
        ({"volume": True}, "/1/volume", "wrong-type"),
        ({"source": 7}, "/1/source", "wrong-type"),
        ({"source": "x" * 256}, "/1/source", "text-invalid"),
        ({"source": "a\0b"}, "/1/source", "text-invalid"),
        ({"prise": 1}, "/1/prise", "unknown-field"),
        ({"a/b~c": 1}, "/1/a~1b~0c", "unknown-field"),
        ({"last": 1}, "/1/last", "field-twice"),
    ],
)
def test_a_bad_row_is_named(fields: dict[str, Any], pointer: str, code: str) -> None:
    assert refused(**fields) == (pointer, code)


@pytest.mark.parametrize(
    ("value", "precision", "code"),
    [
        (631_151_999, "s", "timestamp-unit"),
        (631_151_999.9, "s", "timestamp-unit"),
        (0, "ns", "timestamp-unit"),
        (1_763_600_000, "ms", "timestamp-unit"),
        (1_763_600_000_123, "s", "timestamp-unit"),
        ("-1", "s", "timestamp-unit"),
        (2**63, "ns", "timestamp-unit"),
        (10**4200, "ns", "timestamp-unit"),
        ("9" * 101, "ns", "timestamp-unit"),
        ("1e999", "s", "timestamp-unit"),
        ("1e1000", "s", "timestamp-unit"),
        (Decimal("1e999999"), "s", "timestamp-unit"),
        (1e300, "s", "timestamp-unit"),
        ("1763600000.1234567891", "s", "timestamp-too-fine"),
        ("1763600000.123456789000000000000000001", "s", "timestamp-too-fine"),
        (Decimal("1763600000123456789.5"), "ns", "timestamp-too-fine"),
        (1_763_600_000_123_456.5, "ms", "timestamp-unit"),
        (float("inf"), "s", "timestamp-invalid"),
        ("NaN", "s", "timestamp-invalid"),
        ("1e", "s", "timestamp-invalid"),
        ("1763600000 s", "s", "timestamp-invalid"),
        (1_800_000_000, "s", "timestamp-in-future"),
    ],
)
def test_a_count_that_is_no_instant_is_named(value: Any, precision: Any, code: str) -> None:
    assert refused(replace(TERMS, precision=precision), timestamp=value) == ("/1/timestamp", code)


@pytest.mark.parametrize(
    "value", ["2026-11-20", "1.5e-7", "1e99999", "9" * 101, 10**4200, 1.5, Decimal("1.5"), Numeral("1.5"), "x"]
)
def test_a_number_without_a_unit_is_no_instant(value: Any) -> None:
    assert refused(timestamp=value) == ("/1/timestamp", "timestamp-invalid")


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


def test_the_first_fault_of_a_row_names_it() -> None:
    row = {**GOOD, "timestamp": "x", "price": "much"}
    assert refused(**row) == ("/1/timestamp", "timestamp-invalid")
    assert refused(**{**row, "symbol": 7}) == ("/1/symbol", "wrong-type")
    # What is of the wrong type is seen before any value is weighed.
    assert refused(symbol="?", volume=[]) == ("/1/volume", "wrong-type")


def test_no_sentence_repeats_what_a_client_sent() -> None:
    for row in (GOOD | {"price": "geheim"}, GOOD | {"timestamp": "geheim"}, GOOD | {"source": "geheim\0"}):
        with pytest.raises(InvalidQuotes) as caught:
            Batch.from_rows([row], TERMS)
        assert "geheim" not in str(caught.value.rejections)


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


def test_refused_rows_take_room_too() -> None:
    batch = Batch.from_rows([{}] * 1000, replace(TERMS, on_error="skip"))
    assert (len(batch), len(batch.rejected)) == (0, 1000)
    assert batch.nbytes > 100_000


def test_values_are_kept_exactly() -> None:
    price = "1234567890123456.123456789012"
    row = taken(symbol="btc-usd", price=price, volume=10**16 - 1, bid_size="5.1e-9", source="é")
    assert row["symbol"] == "BTC-USD"
    assert row["price"] == Decimal(price)
    assert (row["volume"], row["bid_size"]) == (10**16 - 1, Decimal("0.0000000051"))
    assert (row["timestamp"], row[NANOS]) == (datetime(2026, 11, 20, 14, 30, tzinfo=UTC), 0)


@pytest.mark.parametrize(
    ("value", "moment", "nanos"),
    [
        ("2026-11-20T09:30:00.123456789-05:00", datetime(2026, 11, 20, 14, 30, 0, 123456, tzinfo=UTC), 789),
        ("2026-11-20T14:30:00.0000000010Z", datetime(2026, 11, 20, 14, 30, tzinfo=UTC), 1),
        (" 2026-11-20 14:30:00+00 ", datetime(2026, 11, 20, 14, 30, tzinfo=UTC), 0),
        ("1969-12-31T23:59:59.999999999Z", datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), 999),
        ("1677-09-22T00:00:00Z", datetime(1677, 9, 22, tzinfo=UTC), 0),
        ("2026-11-20T15:01:00.000000999Z", datetime(2026, 11, 20, 15, 1, tzinfo=UTC), 999),
        (Nanoseconds(-1), datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), 999),
        (datetime(2026, 11, 20, 14, 30, tzinfo=UTC), datetime(2026, 11, 20, 14, 30, tzinfo=UTC), 0),
    ],
)
def test_an_instant_is_kept_to_the_nanosecond(value: Any, moment: datetime, nanos: int) -> None:
    row = taken(timestamp=value)
    assert (row["timestamp"], row[NANOS]) == (moment, nanos)


def test_the_last_instant_is_that_of_64_bits() -> None:
    row = taken(Terms(), timestamp="2262-04-11T23:47:16.854774999Z")
    assert nanoseconds(row["timestamp"]) + row[NANOS] == nanoseconds(Limits().newest) + 999 < 2**63
    assert refused(Terms(), timestamp="2262-04-11T23:47:16.854775Z")[1] == "timestamp-in-future"


@pytest.mark.parametrize(
    ("value", "precision", "nanoseconds_since"),
    [
        ("1763600000.123456789", "s", 1_763_600_000_123_456_789),
        (Decimal("1763600000.123456789"), "s", 1_763_600_000_123_456_789),
        (1763600000.5, "s", 1_763_600_000_500_000_000),
        ("1.7636e9", "s", 1_763_600_000_000_000_000),
        ("1763600000123.000001", "ms", 1_763_600_000_123_000_001),
        (631_152_000, "s", 631_152_000_000_000_000),
        (Decimal("1763600000123456789.0"), "ns", 1_763_600_000_123_456_789),
    ],
)
def test_a_count_is_exact(value: Any, precision: Any, nanoseconds_since: int) -> None:
    row = taken(replace(TERMS, precision=precision), timestamp=value)
    assert nanoseconds(row["timestamp"]) + row[NANOS] == nanoseconds_since


def test_numbers_round_half_away_from_zero_and_are_counted() -> None:
    rows = [
        {**GOOD, "price": "1.0000000000005", "bid_size": "2.00000000000149"},
        {**GOOD, "symbol": "B", "price": "-1.0000000000005"},
        {**GOOD, "symbol": "C", "price": "1.0000000000004999"},
        {**GOOD, "symbol": "C", "price": "1.5"},
        {**GOOD, "symbol": "D", "price": "1.0000000000005", "volume": -1},
    ]
    batch = Batch.from_rows(rows, replace(SIGNED, on_error="skip"))
    assert [f"{price:f}" for price in batch.rows["price"].to_pylist()] == [
        "1.000000000001", "-1.000000000001", "1.500000000000",
    ]  # fmt: skip
    assert batch.rows["bid_size"].to_pylist()[0] == Decimal("2.000000000001")
    # The third lost to the fourth and counts, the fifth is refused and does not.
    assert (batch.rounded, batch.superseded, len(batch.rejected)) == (4, 1, 1)


_GRAMMAR = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@given(numbers | st.sampled_from((*EDGES, *ABSURD)), st.sampled_from(["price", "size"]))
def test_a_number_is_kept_or_refused_as_the_rules_say(text: str, noun: str) -> None:
    try:
        stored, rounded = rules.exact(text, noun)
    except Refused as refusal:
        code = refusal.rule.code
        written = text.strip()
        if code == "wrong-type":
            assert not _GRAMMAR.fullmatch(written)
        elif code == "not-finite":
            assert written.lstrip("+-").lower() in {"nan", "inf", "infinity"}
        elif code == "number-too-long":
            assert len(written) > 100
        else:
            _, _, exponent = written.lower().partition("e")
            if len(exponent.lstrip("+-0")) > 3:
                assert code == f"{noun}-too-fine" if exponent.startswith("-") else f"{noun}-out-of-range"
                return
            exact = abs(Fraction(written))
            if code == f"{noun}-out-of-range":
                assert exact >= 10**16 - Fraction(1, 2 * 10**12)
            else:
                assert code == f"{noun}-too-fine"
                near = abs(exact * 10**12 - round(exact * 10**12)) / 10**12
                assert near * 10**6 > exact
        return
    exact = Fraction(text.strip())
    assert rounded == (Fraction(stored) != exact)
    ticks = abs(exact) * 10**12
    half_up = (2 * ticks + 1) // 2
    assert abs(Fraction(stored)) * 10**12 == half_up < 10**28
    assert abs(Fraction(stored) - exact) * 10**6 <= abs(exact)
    assert stored.as_tuple().exponent == -12


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("value", "price", "timestamp"),
    [
        (1 << 20_000_000, "number-too-long", "timestamp-unit"),
        (-(1 << 20_000_000), "number-too-long", "timestamp-unit"),
        (Decimal("3" * 5_000_000), "price-out-of-range", "timestamp-unit"),
        (Decimal("1732113000." + "1" * 5_000_000), None, "timestamp-invalid"),
        (Decimal("1e-999999999999999999"), "price-too-fine", "timestamp-unit"),
        (Decimal("1e999999999999999999"), "price-out-of-range", "timestamp-unit"),
    ],
    ids=["whole", "below zero", "digits", "fraction", "fine", "large"],
)
def test_no_number_of_python_takes_long(value: Any, price: str | None, timestamp: str) -> None:
    for name, code in (("price", price), ("timestamp", timestamp)):
        given_row = {"symbol": "A", "timestamp": "2026-11-20T10:00:00Z", "price": 1, name: value}
        batch = Batch.from_rows([given_row], Terms(Limits.at(NOW), "skip", precision="s"))
        assert [r.code for r in batch.rejected] == ([code] if code else [])


def test_no_context_of_decimals_changes_a_number() -> None:
    with localcontext(prec=3):
        stored, _ = rules.exact("1234567890123456.1234567890125", "price")
        assert f"{stored:f}" == "1234567890123456.123456789013"
        # Rounded, the first one changes by a little less than a millionth of it, the second by a little more.
        assert rules.exact("0.000000" + "499999" * 10, "price")[1]
        with pytest.raises(Refused):
            rules.exact("0.000000" + "499999" * 9 + "500000", "price")


def test_a_price_of_zero_is_an_absent_side() -> None:
    row = {**GOOD, "bid": 0, "ask": "0.000", "volume": 0}
    batch = Batch.from_rows([row, {**row, "price": -1}], replace(TERMS, on_error="skip"))
    (stored,) = batch.rows.to_pylist()
    assert (stored["bid"], stored["ask"], stored["volume"]) == (None, None, 0)
    assert batch.zeros == 2


def test_signed_prices_are_taken_as_they_are() -> None:
    batch = Batch.from_rows([{**GOOD, "price": "-37.63", "bid": 0, "ask": "-0.5"}], SIGNED)
    (row,) = batch.rows.to_pylist()
    assert [row[name] for name in ("price", "bid", "ask")] == [Decimal("-37.63"), 0, Decimal("-0.5")]
    assert (batch.zeros, batch.crossed) == (0, 1)
    assert taken(SIGNED, price=0)["price"] == 0
    assert refused(SIGNED, price=None) == ("/1/price", "price-missing")
    assert refused(SIGNED, volume=-1) == ("/1/volume", "size-negative")


@pytest.mark.parametrize("given_sides", [{"bid": 1}, {"ask": 2}, {"bid": 1, "ask": 2}, {"bid": 1, "ask": 0}])
def test_a_quote_without_a_trade_has_no_price(given_sides: dict[str, Any]) -> None:
    row = taken(price=None, **given_sides)
    assert row["price"] is None
    assert (row["bid"], row["ask"]) == (given_sides.get("bid"), given_sides.get("ask") or None)


def test_crossed_quotes_are_stored_and_counted() -> None:
    rows = [
        {**GOOD, "bid": 2, "ask": 1},
        {**GOOD, "symbol": "B", "bid": 1, "ask": 1},
        {**GOOD, "symbol": "C", "bid": 3},
    ]
    batch = Batch.from_rows([*rows, {**rows[0], "volume": -1}], replace(TERMS, on_error="skip"))
    assert (len(batch), batch.crossed) == (3, 1)


def test_equal_keys_in_one_batch() -> None:
    rows = [{**GOOD, "price": p, "symbol": s} for p, s in ((1, "a"), (2, "A"), (3, "B"), (4, "a"))]
    last = Batch.from_rows(rows, TERMS)
    assert (last.rows["price"].to_pylist(), last.superseded) == ([4, 3], 2)
    first = Batch.from_rows(rows, replace(TERMS, on_conflict="ignore"))
    assert (first.rows["price"].to_pylist(), first.superseded) == ([1, 3], 2)
    numbered = Batch.from_rows(rows, replace(TERMS, ties="number", on_conflict="error"))
    assert (numbered.rows["price"].to_pylist(), numbered.superseded, numbered.numbered) == ([1, 2, 4, 3], 0, 2)
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows(rows, replace(TERMS, on_conflict="error"))
    assert [(r.index, r.code) for r in caught.value.rejections] == [(1, "duplicate-key"), (3, "duplicate-key")]
    skipped = Batch.from_rows(rows, replace(TERMS, on_conflict="error", on_error="skip"))
    assert (skipped.rows["price"].to_pylist(), skipped.superseded, len(skipped.rejected)) == ([1, 3], 0, 2)


def test_a_nanosecond_apart_is_another_key() -> None:
    rows = [{**GOOD, "timestamp": f"2026-11-20T14:30:00.00000000{i}Z", "price": i + 1} for i in (2, 0, 1)]
    batch = Batch.from_rows(rows, TERMS)
    assert (batch.rows[NANOS].to_pylist(), batch.superseded) == ([0, 1, 2], 0)


def test_limits_of_a_batch() -> None:
    assert Batch.from_rows([], TERMS).received == 0
    with pytest.raises(BodyTooLarge, match="at most 1 "):
        Batch.from_rows([GOOD, GOOD], Terms(Limits(max_rows=1)))
    days = [{**GOOD, "timestamp": datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=i)} for i in range(11)]
    assert len(Batch.from_rows(days[:10], Terms(Limits(max_days=10)))) == 10
    with pytest.raises(InvalidRequest, match="11 distinct days"):
        Batch.from_rows(days, Terms(Limits(max_days=10)))


def test_rows_that_retention_would_drop_are_refused() -> None:
    limits = Limits.at(NOW, oldest=NOW - timedelta(days=8))
    old = {**GOOD, "timestamp": Nanoseconds(nanoseconds(NOW - timedelta(days=8)) - 1)}
    with pytest.raises(InvalidQuotes) as caught:
        Batch.from_rows([old], Terms(limits))
    assert caught.value.rejections[0].code == "timestamp-too-old"
    assert len(Batch.from_rows([{**old, "timestamp": limits.oldest}], Terms(limits))) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["A", "b", "C-1"]), st.integers(0, 2000), st.integers(1, 10**28 - 1)),
        min_size=1,
        max_size=60,
    )
)
def test_a_batch_is_what_a_dict_would_hold(rows: list[tuple[str, int, int]]) -> None:
    start = nanoseconds(datetime(2026, 1, 1, tzinfo=UTC))
    quotes = [{"symbol": s, "timestamp": Nanoseconds(start + t), "price": Decimal(p).scaleb(-12)} for s, t, p in rows]
    batch = Batch.from_rows(quotes, TERMS)
    model = {(str(q["symbol"]).upper(), q["timestamp"]): q["price"] for q in quotes}
    found = {(r["symbol"], nanoseconds(r["timestamp"]) + r[NANOS]): r["price"] for r in batch.rows.to_pylist()}
    assert found == model
    assert list(found) == sorted(model)
    assert batch.superseded == len(rows) - len(model)


# --- symbols ---


@pytest.mark.parametrize(
    ("given_symbol", "name"),
    [
        (" eurusd=x ", "EURUSD=X"), ("ESZ5  C4500", "ESZ5 C4500"), ("a   b c", "A B C"), ("A\n", "A"),
        ("brk.b", "BRK.B"), ("^gspc", "^GSPC"), ("AT&T@N+1$#!", "AT&T@N+1$#!"), ("N:A/B_C-1", "N:A/B_C-1"),
        ("x" * 64, "X" * 64),
        (" " * 100 + "a" + " " * 100, "A"),
    ],
)  # fmt: skip
def test_symbols_are_normalised(given_symbol: str, name: str) -> None:
    assert normal_symbol(given_symbol) == name == taken(symbol=given_symbol)["symbol"]
    assert normal_symbol(name) == name


@pytest.mark.parametrize(
    "symbol", ["", " ", "a\tb", "ß", "x" * 65, "A\0", "A*", "\u00a0A", "A,B", "A" + " " * 300 + "B"]
)
def test_what_is_no_symbol(symbol: str) -> None:
    with pytest.raises(InvalidRequest):
        normal_symbol(symbol)


@given(symbols)
def test_a_symbol_is_the_same_to_a_query_and_to_a_quote(symbol: str) -> None:
    try:
        name = normal_symbol(symbol)
    except InvalidRequest:
        assert refused(symbol=symbol)[1] in {"symbol-invalid", "not-unicode"}
    else:
        assert taken(symbol=symbol)["symbol"] == name


# --- the model ---


@given(wild_rows)
def test_the_model_keeps_the_rules_of_a_value(row: dict[str, Any]) -> None:
    try:
        quote = Quote.model_validate(row)
    except ValidationError as error:
        codes = {fault["type"] for fault in error.errors()}
        assert codes <= {"quote", "missing"}
        batch = Batch.from_rows([row], replace(TERMS, on_error="skip"))
        assert len(batch.rejected) == 1
        return
    batch = Batch.from_rows([row | {"price": 1}], Terms(on_error="skip", prices="signed"))
    if not batch.rejected:
        (stored,) = batch.rows.to_pylist()
        found = quote.model_dump()
        assert found.pop("timestamp") == nanoseconds(stored.pop("timestamp")) + stored.pop(NANOS)
        assert found | {"price": 1} == stored


def test_the_model_has_the_fields_and_their_examples_are_quotes() -> None:
    assert (*Quote.model_fields,) == (*StoredQuote.model_fields,) == NAMES
    example = {field.name: field.example for field in FIELDS}
    assert Quote.model_validate(example)
    assert Batch.from_rows([example], TERMS).received == 1
    schema = Quote.model_json_schema()
    assert schema["required"] == list(REQUIRED)
    for name, about in schema["properties"].items():
        assert about["description"], name
    with pytest.raises(ValidationError):
        Quote.model_validate({**example, "prise": 1})


def test_a_receipt_says_what_became_of_the_rows_in_this_order() -> None:
    assert Receipt.__struct_fields__ == (
        "received", "inserted", "updated", "unchanged", "superseded", "numbered", "rounded", "zeros", "crossed",
        "rejected",
    )  # fmt: skip
