"""Days and bars against an oracle: every zone, each change of its clocks.

`make test` runs a seeded sample, `make oracle` (ORACLE=1) all zones and changes from 1970 to 2037; ORACLE_SEED repeats
one.
"""

import os
import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any, Final
from zoneinfo import ZoneInfo, available_timezones

import pytest

from app import days
from app.clock import EPOCH, Interval
from app.days import Grid, day_bounds, day_of, moment
from app.errors import InvalidRequest
from app.repository.bars import Fill
from app.repository.quotes import QuoteRepository
from tests import oracle
from tests.conftest import random_symbol

WHOLE: Final = bool(os.environ.get("ORACLE"))
SEED: Final = int(os.environ.get("ORACLE_SEED") or random.SystemRandom().randrange(10**9))
ALL: Final = sorted(name for name in available_timezones() if name not in {"localtime", "posixrules", "Factory"})
#: Two midnights, none, a date that is skipped, half hours, changes within a month, a day of 47 hours, and none at all.
ODD: Final = (
    "America/Havana", "Atlantic/Azores", "Asia/Beirut", "Africa/Cairo", "Pacific/Apia", "Australia/Lord_Howe",
    "America/St_Johns", "America/Sao_Paulo", "Africa/Casablanca", "Antarctica/Troll", "Pacific/Kwajalein", "CET",
    "America/New_York", "Asia/Kathmandu", "Africa/Monrovia", "Etc/UTC",
)  # fmt: skip
FIRST, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2038, 1, 1, tzinfo=UTC)
DAY: Final = timedelta(days=1)
INTERVALS: Final = ("30m", "1h", "4h", "12h", "1d", "2d", "1w", "1M", "3M")
pytestmark = pytest.mark.timeout(1800 if WHOLE else 240)
STARTS: Final = ("00:00", "17:00", "02:30", "09:30")


def second(at: datetime) -> int:
    return (at - EPOCH) // timedelta(seconds=1)


def around(interval: str) -> timedelta:
    return {"m": DAY, "h": 3 * DAY, "d": 5 * DAY, "w": 22 * DAY, "M": 130 * DAY}[interval[-1]]


@pytest.mark.parametrize("part", range(16))
def test_edges_are_those_of_the_oracle(part: int) -> None:
    """Around each change; the whole takes eight minutes."""
    rng = random.Random(f"{SEED}/{part}")
    zones = ALL[part::16] if WHOLE else [ODD[part], rng.choice(ALL)]
    # Zones whose clocks never change are looked at on one day.
    still = [datetime(2026, 3, 1, tzinfo=UTC)]
    for tz in zones:
        found = oracle.changes(tz, FIRST, LAST, timedelta(hours=12 if WHOLE else 60)) or still
        for change in found if WHOLE else rng.sample(found, min(len(found), 5)):
            for interval in INTERVALS:
                for day_start in STARTS[:3] if WHOLE else ("00:00", rng.choice(STARTS[1:])):
                    check_edges(interval, tz, day_start, change, rng)


def check_edges(interval: str, tz: str, day_start: str, change: datetime, rng: random.Random) -> None:
    grid = Grid(Interval.parse(interval), tz, day_start)
    low, high = change - around(interval), change + around(interval)
    low, high = low - rng.randrange(86_400) * oracle.SECOND, high + rng.randrange(86_400) * oracle.SECOND
    expected = [second(edge) for edge in oracle.edges(interval, tz, day_start, low, high)]
    what = f"{interval} of {tz} from {day_start} around {change}, seed {SEED}"
    assert list(grid.edges(second(low), second(high))) == expected, what
    assert all(a < b for a, b in pairwise(expected)), what
    at = rng.randrange(expected[0], expected[-1])
    assert grid.floor(at) == max(edge for edge in expected if edge <= at), what
    assert grid.ceil(at) == min(edge for edge in expected if edge >= at), what
    count = rng.randint(1, len(expected))
    for newest, wanted in ((False, expected[: count + 1]), (True, expected[-count - 1 :])):
        assert list(grid.window(expected[0], expected[-1], count, newest=newest)) == wanted, what
    even = grid.even(expected[0], expected[-1])
    if even is not None:
        assert {b - a for a, b in pairwise(expected)} <= {even[0]}, what
        assert (expected[0] - even[1]) % even[0] == 0, what


def test_no_change_of_a_clock_is_missed() -> None:
    """They are looked for a week apart, from before the first quote on."""
    for tz in ALL if WHOLE else ODD:
        since, _ = days._offsets(tz)
        first, last = datetime(1840, 1, 1, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC)
        expected = oracle.changes(tz, first, last, timedelta(hours=23) if WHOLE else 3 * DAY)
        assert [at for at in since[1:] if second(first) < at < second(last)] == list(map(second, expected)), tz


@pytest.mark.parametrize(
    ("tz", "day", "start", "hours"),
    [
        ("America/Havana", date(2025, 11, 2), "2025-11-02T04:00", 25),
        ("Asia/Beirut", date(2025, 3, 30), "2025-03-29T22:00", 23),
        ("Pacific/Apia", date(2011, 12, 30), "2011-12-30T10:00", 0),
        ("Pacific/Apia", date(2011, 12, 31), "2011-12-30T10:00", 24),
        ("Pacific/Kwajalein", date(1969, 9, 30), "1969-09-29T13:00", 47),
        ("America/St_Johns", date(2010, 11, 7), "2010-11-07T02:30", 25),
        ("UTC", date(1677, 1, 1), "1677-01-01T00:00", 24),
    ],
)
def test_days(tz: str, day: date, start: str, hours: int) -> None:
    begin = datetime.fromisoformat(f"{start}+00:00")
    assert day_bounds(day, tz) == (begin, begin + timedelta(hours=hours))
    if hours:
        assert day_of(begin, tz) == day_of(begin + timedelta(hours=hours, microseconds=-1), tz) == day


def test_a_day_that_starts_in_the_evening_has_the_next_date() -> None:
    new_york = ("America/New_York", "17:00")
    assert day_bounds(date(2025, 11, 2), *new_york) == (
        datetime(2025, 11, 1, 21, tzinfo=UTC), datetime(2025, 11, 2, 22, tzinfo=UTC),
    )  # fmt: skip
    assert day_of(datetime(2025, 11, 1, 21, tzinfo=UTC), *new_york) == date(2025, 11, 2)
    assert day_of(datetime(2025, 11, 1, 20, 59, tzinfo=UTC), *new_york) == date(2025, 11, 1)
    weeks = Grid(Interval(1, "w"), *new_york).edges(second(datetime(2025, 10, 20, tzinfo=UTC)), 1_762_400_000)
    assert [moment(edge).astimezone(ZoneInfo("America/New_York")).strftime("%a %H") for edge in weeks] == ["Sun 17"] * 2


@pytest.mark.parametrize("text", ["24:00", "7:00", "17", "17:60", "17:00:00", "+7:00", "\u0661\u0667:00", "", None, 17])
def test_what_is_no_time_of_day(text: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Grid(Interval(1, "d"), "UTC", text)
    assert caught.value.parameter == "day_start"


def test_utc_has_other_names() -> None:
    utc = Grid(Interval(7, "h")).edges(0, 10**6)
    for tz in ("Etc/UTC", "GMT", "Zulu", "Etc/GMT+0", "Universal"):
        assert Grid(Interval(7, "h"), tz).edges(0, 10**6) == utc
    for tz, day_start in (("Africa/Abidjan", "00:00"), ("Etc/GMT+1", "00:00"), ("UTC", "17:00")):
        with pytest.raises(InvalidRequest):
            Grid(Interval(7, "h"), tz, day_start)


def test_edges_of_centuries_are_made_at_once() -> None:
    """What stands on the event loop: a page's worth of edges, however long the range is."""
    for interval in ("1s", "2h", "1d", "1M", "3660d"):
        grid = Grid(Interval.parse(interval), "America/New_York")
        low, high = grid.ceil(days.EARLIEST), grid.floor(days.LATEST)
        for newest in (False, True):
            found = grid.window(low, high, 100, newest=newest)
            assert 50 < len(found) <= 101 or interval == "3660d"
            assert found[-1] == high if newest else found[0] == low


# --- through the database ---


async def check_bars(quotes: QuoteRepository, tz: str, change: datetime, rng: random.Random) -> None:
    symbol = random_symbol()
    day_start = rng.choice(STARTS)
    hourly = oracle.edges("1h", tz, day_start, change - 3 * DAY, change + 3 * DAY)
    moments = {edge - rng.choice((0, 1)) * timedelta(microseconds=1) for edge in rng.sample(hourly, 30)}
    moments |= {change + rng.randrange(-5 * 86_400, 5 * 86_400) * oracle.SECOND for _ in range(30)}
    given = [(at, Decimal(n)) for n, at in enumerate(sorted(moments), 1)]
    await quotes.bulk_insert([{"symbol": symbol, "timestamp": at, "price": price} for at, price in given])
    for interval in ("1h", "4h", "12h", "1d", "1w", "1M"):
        low, high = change - around(interval), change + around(interval)
        slots = oracle.slots(oracle.edges(interval, tz, day_start, low, high + 40 * DAY), given)
        slots = [slot for slot in slots if slot.start < high]
        for fill in ("none", "null", "previous"):
            limit = rng.choice((1000, 7))
            bars = await quotes.get_bars(
                symbol, interval, low, high, tz=tz, day_start=day_start, fill=fill, limit=limit, sort="desc"
            )
            found = [(bar.timestamp, bar.open, bar.close, bar.count, bar.final) for bar in reversed(bars)]
            expected = expected_bars(slots, given, fill)
            assert found == expected[-limit:], (
                f"{interval} of {tz} from {day_start} around {change}, {fill}, seed {SEED}"
            )


def expected_bars(slots: list[oracle.Slot], given: list[tuple[datetime, Decimal]], fill: Fill) -> list[tuple[Any, ...]]:
    now = datetime.now(UTC)
    close = next((price for at, price in reversed(given) if at < slots[0].start), None) if fill == "previous" else None
    begun = close is not None
    bars: list[tuple[Any, ...]] = []
    for slot in slots:
        if slot.values:
            bars.append((slot.start, slot.values[0], slot.values[-1], len(slot.values), slot.end <= now))
            begun, close = True, slot.values[-1] if fill == "previous" else None
        elif begun and fill != "none" and slot.start < now:
            bars.append((slot.start, close, close, 0, slot.end <= now))
    return bars


async def test_bars_around_changes_of_the_clocks(quotes: QuoteRepository) -> None:
    rng = random.Random(SEED)
    for tz in rng.sample(ALL, 200) if WHOLE else rng.sample(ODD, 3):
        past = oracle.changes(tz, FIRST, datetime.now(UTC) - DAY, 2 * DAY)
        for change in rng.sample(past, min(len(past), 3 if WHOLE else 1)):
            await check_bars(quotes, tz, change, rng)


async def test_a_bar_is_final_when_its_own_end_has_passed(quotes: QuoteRepository, symbol: str) -> None:
    now = datetime.now(UTC)
    await quotes.bulk_insert(
        [{"symbol": symbol, "timestamp": now - timedelta(minutes=m), "price": 1} for m in range(0, 3000, 7)]
    )
    rng = random.Random(SEED)
    for tz in (*ODD, *rng.sample(ALL, 40 if WHOLE else 4)):
        for interval in ("4h", "12h", "1d"):
            edges = oracle.edges(interval, tz, "17:00", now - 3 * DAY, now + 3 * DAY)
            bars = await quotes.get_bars(symbol, interval, now - 3 * DAY, now + DAY, tz=tz, day_start="17:00")
            after = datetime.now(UTC)
            for bar in bars:
                end = next(edge for edge in edges if edge > bar.timestamp)
                assert bar.final is (end <= now) or now < end <= after, (tz, interval, bar)
