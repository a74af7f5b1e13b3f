"""Instants to the nanosecond, how they are written, and the grammar of an interval."""

import re
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.clock import (
    EPOCH,
    FIRST,
    LAST,
    MICROSECOND,
    UNITS,
    Interval,
    NotAnInstant,
    Precision,
    ceil,
    floor,
    microseconds,
    nanoseconds,
    of_epoch,
    parse,
    rfc3339,
    rfc3339_nano,
)
from app.errors import InvalidRequest

#: Every instant that 64 bits hold.
instants = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2000, 2000), st.integers(-(10**10), 10**10))
#: Instants far beyond any calendar, too.
beyond = st.one_of(instants, st.integers(-(10**21), 10**21))


@given(instants)
@example(2**63 - 1)
@example(-(2**63))
@example(-1)
def test_an_instant_reads_back_as_it_is_written(instant: int) -> None:
    text = rfc3339_nano(instant)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{9}Z", text)
    assert parse(text) == instant
    assert text.endswith(f"{instant % 10**9:09d}Z")


@given(instants, instants)
def test_written_instants_sort_as_instants_do(one: int, other: int) -> None:
    assert (rfc3339_nano(one) < rfc3339_nano(other)) == (one < other)


@given(beyond)
@example(nanoseconds(datetime.max.replace(tzinfo=UTC)))
@example(nanoseconds(datetime.min.replace(tzinfo=UTC)) - 1)
def test_an_instant_lies_between_two_microseconds(instant: int) -> None:
    below, above = floor(instant), ceil(instant)
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    assert below.tzinfo is above.tzinfo is UTC
    if nanoseconds(first) <= instant <= nanoseconds(last):
        assert nanoseconds(below) <= instant <= nanoseconds(above)
        assert above - below == (timedelta(0) if instant % 1000 == 0 else MICROSECOND)
    elif instant < nanoseconds(first):
        assert below == above == first
    else:
        assert below == above == last


@given(st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.timezones()))  # noqa: DTZ001
def test_a_moment_is_the_nanoseconds_since_1970(moment: datetime) -> None:
    assert nanoseconds(moment) == 1000 * microseconds(moment)
    utc = moment.astimezone(UTC)
    assert floor(nanoseconds(moment)) == ceil(nanoseconds(moment)) == utc
    assert EPOCH + microseconds(moment) * MICROSECOND == utc


def test_what_stands_for_an_instant() -> None:
    class WithNanoseconds(datetime):
        nanosecond = 789

    assert nanoseconds(7) == 7
    assert nanoseconds(WithNanoseconds(1970, 1, 1, 0, 0, 0, 123456, tzinfo=UTC)) == 123_456_789
    with pytest.raises(InvalidRequest):
        nanoseconds(datetime(2026, 11, 20))  # noqa: DTZ001
    assert nanoseconds(FIRST) > -(2**63)
    assert nanoseconds(LAST) + 999 < 2**63


def test_times_are_written_in_utc() -> None:
    assert rfc3339(datetime.fromisoformat("2026-11-20T09:30:00.5-05:00")) == "2026-11-20T14:30:00.500000Z"
    assert rfc3339(datetime(2026, 11, 20, tzinfo=UTC)) == "2026-11-20T00:00:00Z"
    assert rfc3339_nano(-1) == "1969-12-31T23:59:59.999999999Z"
    assert rfc3339_nano(0) == "1970-01-01T00:00:00.000000000Z"
    with pytest.raises(OverflowError):
        rfc3339_nano(10**21)


@given(
    st.datetimes(),
    st.text("0123456789", max_size=9),
    st.integers(0, 30).map("0".__mul__),
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
    st.sampled_from("Tt "),
    st.sampled_from(["Z", "z", "colon", "digits", "hours"]),
)
def test_every_form_of_an_instant_means_the_same(
    local: datetime, fraction: str, zeros: str, minutes: int, letter: str, form: str
) -> None:
    if form.upper() == "Z":
        minutes, offset = 0, form
    else:
        minutes = int(minutes / 60) * 60 if form == "hours" else minutes
        hours, rest = divmod(abs(minutes), 60)
        offset = ("-" if minutes < 0 else "+") + f"{hours:02d}" + {"colon": ":", "digits": "", "hours": ""}[form]
        offset += "" if form == "hours" else f"{rest:02d}"
    local = local.replace(microsecond=0)
    text = local.isoformat().replace("T", letter) + (f".{fraction}{zeros}" if fraction else "") + offset
    seconds = (local - datetime(1970, 1, 1)) // timedelta(seconds=1) - 60 * minutes  # noqa: DTZ001
    assert parse(text) == seconds * 10**9 + int(fraction.ljust(9, "0"))


def test_seconds_may_be_absent() -> None:
    assert parse("2026-11-20T14:30Z") == parse("2026-11-20 14:30+00") == parse("2026-11-20T14:30:00Z")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("2026-11-20T14:30:00", "timestamp-naive"),
        ("2026-11-20 14:30:00.123", "timestamp-naive"),
        ("2026-12-31T23:59:60Z", "timestamp-leap-second"),
        ("2016-12-31T23:59:60.5+00:00", "timestamp-leap-second"),
        ("2026-11-20T14:30:00.1234567891Z", "timestamp-too-fine"),
        ("2026-11-20T14:30:00.0000000000000001Z", "timestamp-too-fine"),
        ("2026-02-30T00:00:00Z", "timestamp-invalid"),
        ("2026-01-01T24:00:00Z", "timestamp-invalid"),
        ("2026-01-01T00:60:00Z", "timestamp-invalid"),
        ("2026-01-01T00:00:61Z", "timestamp-invalid"),
        ("2026-01-01T00:00:00+24:00", "timestamp-invalid"),
        ("2026-01-01T00:00:00+01:60", "timestamp-invalid"),
        ("2026-01-01T00Z", "timestamp-invalid"),
        ("2026-01-01T00:00:00.Z", "timestamp-invalid"),
        ("2026-01-01T00:00:00123Z", "timestamp-invalid"),
        ("2026-01-01T00:00:00,5Z", "timestamp-invalid"),
        ("2026-01-01T00:00.5Z", "timestamp-invalid"),
        ("2026-00-01T00:00:00Z", "timestamp-invalid"),
        ("0000-01-01T00:00:00Z", "timestamp-invalid"),
        ("2026-01-01", "timestamp-invalid"),
        ("2026-01-01Z", "timestamp-invalid"),
        ("2026-01-01T00:00:00Z\n", "timestamp-invalid"),
        ("\u0662026-01-01T00:00:00Z", "timestamp-invalid"),
        ("2026-01-01T00:00:00." + "0" * 101 + "Z", "timestamp-invalid"),
        ("2026-W01-1T00:00:00Z", "timestamp-invalid"),
        ("", "timestamp-invalid"),
    ],
)
def test_what_is_no_instant(text: str, code: str) -> None:
    with pytest.raises(NotAnInstant) as caught:
        parse(text)
    assert caught.value.code == code
    assert caught.value.detail == str(caught.value)


@given(st.decimals(-(10**20), 10**20, places=12) | st.integers(-(10**30), 10**30), st.sampled_from(sorted(UNITS)))
def test_a_count_of_units_is_exact_or_refused(count: int | Decimal, precision: Precision) -> None:
    exact = Fraction(count) * UNITS[precision]
    with localcontext(prec=3):  # whoever calls may count in less
        if exact.denominator == 1:
            assert of_epoch(count, precision) == exact
        else:
            with pytest.raises(NotAnInstant) as caught:
                of_epoch(count, precision)
            assert caught.value.code == "timestamp-too-fine"


def test_no_digit_of_a_count_is_lost() -> None:
    assert of_epoch(Decimal("1763600000.123456789"), "s") == 1_763_600_000_123_456_789
    assert of_epoch(Decimal("1763600000.123456789" + "0" * 60), "s") == 1_763_600_000_123_456_789
    with pytest.raises(NotAnInstant):
        of_epoch(Decimal("1763600000.123456789" + "0" * 60 + "1"), "s")


def test_the_bounds_are_those_of_64_bits() -> None:
    assert FIRST - timedelta(days=1) < floor(-(2**63)) < FIRST
    assert floor(2**63 - 1) - LAST == MICROSECOND
    assert datetime(1677, 9, 22, 5, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))) == FIRST


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
