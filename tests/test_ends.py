"""Every read with every parameter at its ends and beyond: answers, or mistakes of the client, and no fault of ours."""

import itertools
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from app.clock import FIRST, LAST, Interval, nanoseconds
from app.days import LATEST, day_bounds, zone
from app.errors import InvalidRequest
from app.repository.bars import BarSpec

#: Both ends of the calendar, of what is stored and of what bars have room in, and what is no time.
TIMES = (
    "0001-01-01", "0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00-23:59", "1677-09-22", "2026-11-20", "2262-04-12",
    "9900-01-01", "9999-12-30", "9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59.999999999-23:59",
)  # fmt: skip
NO_TIMES = ("0000-01-01", "10000-01-01T00:00:00Z", "2026-02-30", "", "\0", "\udc80", "9" * 1000, "1e99", "nan", "epoch")
ZONES = ("UTC", "Europe/Berlin", "Asia/Kathmandu", "Pacific/Apia", "Pacific/Kiritimati", "Etc/GMT+12")
NO_ZONES = (
    "localtime", "posixrules", "right/UTC", "right/Europe/Berlin", "posix/UTC", "Factory", "europe/berlin", "utc",
    "../../etc/passwd", "Europe/../Europe/Berlin", "/usr/share/zoneinfo/UTC", "./UTC", "Europe/Berlin/", "Europe",
    "Europe/Berlin ", "tzdata.zi", "zone.tab", "leapseconds", "+VERSION", "UTC\0", "\0", "", "UTC0", "<+03>-3", "é",
    "\udc80",
)  # fmt: skip
T0 = datetime(2026, 11, 20, tzinfo=UTC)
INTERVALS = ("1s", "7m", "1h", "1d", "1w", "1M", "120M", "3660d")


async def statuses(client: httpx.AsyncClient, asked: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """The status of each question; those of ours fail."""
    found = {}
    for path, query in asked:
        answer = await client.get(f"{path}?{urlencode(query, errors='surrogatepass')}")
        found[f"{path} {query!a}"] = answer.status_code
        assert answer.status_code < 500, (path, query, answer.text)
    return found


async def test_ranges_at_the_ends_of_the_calendar(client: httpx.AsyncClient, symbol: str) -> None:
    rows = [
        {"symbol": symbol, "timestamp": timestamp, "price": 1, "bid": 1, "ask": 2}
        for timestamp in ("1677-09-22T00:00:00Z", "1883-11-18T12:00:00Z", "2026-11-20T10:00:00Z")
    ]
    assert (await client.post("/v1/quotes", json=rows)).status_code == 200
    asked: list[tuple[str, dict[str, Any]]] = []
    for start, end in itertools.product((*TIMES, None), repeat=2):
        bounds = {name: value for name, value in (("start", start), ("end", end)) if value}
        asked += [(path, {"symbols": symbol} | bounds) for path in ("/v1/quotes", "/v1/quotes/count")]
        for several in (symbol, f"{symbol},A,B"):
            asked.append(("/v1/summary/daily", {"symbols": several} | bounds))
            asked.append(("/v1/ohlc", {"symbols": several, "interval": "1M", "tz": "Europe/Berlin"} | bounds))
    await statuses(client, asked)


async def test_bars_at_the_ends_of_the_calendar(client: httpx.AsyncClient, symbol: str) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/ohlc", {"symbols": symbols, "interval": interval, "start": start, "end": end, "fill": fill, "tz": tz})
        for interval in INTERVALS
        for start, end in (("0001-01-01", "0001-01-02"), ("9999-12-30", "9999-12-31"), ("9899-12-31", "9901-01-01"))
        for tz in ("UTC", "Pacific/Kiritimati")
        for fill, symbols in (("none", f"{symbol},A,B"), ("previous", symbol))
    ]
    await statuses(client, asked)


async def test_what_is_no_time_is_a_mistake_of_the_client(client: httpx.AsyncClient) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    for text in NO_TIMES:
        for name in ("start", "end"):
            asked += [
                (
                    path,
                    {"symbols": "A", "interval": "1d", name: text}
                    if path == "/v1/ohlc"
                    else {"symbols": "A", name: text},
                )
                for path in ("/v1/quotes", "/v1/quotes/count", "/v1/ohlc", "/v1/summary/daily")
            ]
        asked.append(("/v1/quotes/intraday", {"symbol": "A", "date": text}))
    found = await statuses(client, asked)
    assert set(found.values()) == {400}


async def test_days_of_every_kind_of_zone(client: httpx.AsyncClient) -> None:
    days = (
        "0001-01-01",
        "0001-01-02",
        "1677-09-21",
        "9999-12-30",
        "9999-12-31",
        "2026-11-20",
        "99999999999",
        "-1",
        "1e10",
    )
    await statuses(
        client, [("/v1/quotes/intraday", {"symbol": "A", "date": day, "tz": tz}) for day in days for tz in ZONES]
    )


async def test_a_zone_is_one_of_the_tz_database(client: httpx.AsyncClient) -> None:
    routes = (("/v1/ohlc", {"symbols": "A", "interval": "1d"}), ("/v1/quotes/intraday", {"symbol": "A"}))
    found = await statuses(client, [(path, query | {"tz": tz}) for path, query in routes for tz in NO_ZONES])
    assert set(found.values()) == {400}
    found = await statuses(client, [(path, query | {"tz": tz}) for path, query in routes for tz in ZONES])
    assert set(found.values()) == {200}


@pytest.mark.parametrize("name", NO_ZONES)
def test_no_file_is_opened_for_a_zone(name: str) -> None:
    with pytest.raises(InvalidRequest):
        zone(name)
    with pytest.raises(InvalidRequest):
        day_bounds(datetime(2026, 11, 20, tzinfo=UTC).date(), name)


def test_the_bars_of_the_whole_calendar_are_of_what_is_stored() -> None:
    """What a range has beyond the first and the last instant costs nothing."""
    for tz in ZONES:
        for interval in (Interval(1, "d"), Interval(3660, "d"), Interval(118, "M")):
            spec = BarSpec(interval, tz=tz)
            assert spec.edge(-(10**40)) <= spec.edge(nanoseconds(FIRST)) - interval.width.total_seconds()
            assert spec.edge(10**40) > spec.edge(nanoseconds(LAST))
            assert spec.edge(10**40) == spec.edge(LATEST * 10**9)


def test_bars_are_made_of_the_coarsest_rollup_that_their_edges_lie_on() -> None:
    week = 7 * 86_400
    for tz, interval, at, source in (
        ("UTC", Interval(1, "d"), T0, "ohlc_1d"),
        ("Etc/GMT+12", Interval(1, "d"), T0, "ohlc_1h"),
        ("Europe/Berlin", Interval(1, "M"), T0, "ohlc_1h"),
        ("Asia/Kathmandu", Interval(1, "h"), T0, "ohlc_1m"),
        ("Asia/Kathmandu", Interval(1, "m"), T0, "ohlc_1m"),
        ("Europe/Berlin", Interval(1, "d"), FIRST, "real_time"),
        ("Europe/Berlin", Interval(1, "s"), T0, "real_time"),
    ):
        spec = BarSpec(interval, tz=tz)
        low = spec.edge(nanoseconds(at))
        assert spec.source(low, spec.grid.ceil(low + week)) == source


async def test_symbols_tokens_and_limits_that_are_none(client: httpx.AsyncClient) -> None:
    names = (
        "",
        ",,,",
        "%ff",
        "%00",
        "A%00B",
        "%ED%A0%80",
        "A" * 10_000,
        ",".join(f"S{i}" for i in range(10_000)),
        "+," * 9000,
    )
    tokens = ("", "A", "=====", "%00", "%ff", "A" * 511, "A" * 20_000, "%F0%9F%98%80")
    numbers = ("", "0", "-1", "9" * 5000, "1e400", "nan", "1_0", "%D9%A1")
    queries = [f"symbols={name}" for name in names] + ["symbols=A&symbols=B", "symbols=A,A,a", "&&&", "=", "%", "%zz"]
    queries += [f"symbols=A&page_token={token}" for token in tokens] + [f"page_token={token}" for token in tokens]
    queries += [f"symbols=A&{name}={number}" for name in ("limit", "limit_per_symbol") for number in numbers]
    queries += [f"symbol={name}" for name in names[:6]] + ["symbol=A&symbol=B", "symbols=A&consistency=%00"]
    for path in ("/v1/quotes", "/v1/quotes/latest", "/v1/quotes/count", "/v1/quotes/intraday", "/v1/summary/daily",
                 "/v1/ohlc", "/v1/symbols", "/v1/storage"):  # fmt: skip
        for query in queries:
            more = (
                "&interval=1d"
                if path == "/v1/ohlc"
                else "&symbol=A"
                if path.endswith("y") and "ol=" not in query
                else ""
            )
            answer = await client.get(f"{path}?{query}{more}")
            assert answer.status_code < 500, (path, query[:100], answer.text)
