"""The demo's market keeps the rules of its venues, and its feed reaches the service whatever happens on the way."""

import asyncio
import os
import signal
from collections import defaultdict
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import msgspec
import pytest

from app import demo
from app.client import Client, Refused, Unavailable, in_order
from app.demo import INSTRUMENTS, DemoOptions, Market, history
from app.errors import InvalidRequest
from app.quote.terms import Receipt

SUNDAY = datetime(2026, 3, 8, 12, tzinfo=UTC)  # the clocks of New York change on this day
BY_SYMBOL = {instrument.symbol: instrument for instrument in INSTRUMENTS}
HOURS = {
    "New York": ("America/New_York", [(time(9, 30), time(16))]),
    "London": ("Europe/London", [(time(8), time(16, 30))]),
    "Xetra": ("Europe/Berlin", [(time(9), time(17, 30))]),
    "Tokyo": ("Asia/Tokyo", [(time(9), time(11, 30)), (time(12, 30), time(15, 30))]),
}


def micros(moment: datetime) -> int:
    return round(moment.timestamp()) * 1_000_000


def generate(end: datetime, days: int, seed: int = 7) -> list[bytes]:
    """Quotes of the days before that of `end`, and of that one up to `end`."""
    market = Market(INSTRUMENTS, end.replace(hour=0, minute=0, second=0) - timedelta(days=days), seed)
    return [line for _, lines in history(market, micros(end)) for line in lines]


@pytest.fixture(scope="module")
def week() -> list[dict[str, Any]]:
    """A week of every instrument, with two weekends' ends."""
    decode = msgspec.json.Decoder(float_hook=str).decode
    return [decode(line) for line in generate(SUNDAY, 7)]


def is_open(venue: str, moment: datetime) -> bool:
    """The trading hours, written another way than in the demo."""
    if venue == "crypto":
        return True
    if venue == "FX":
        local = moment.astimezone(ZoneInfo("America/New_York"))
        day, clock = local.isoweekday(), local.time()
        return day in {1, 2, 3, 4} or (day == 5 and clock < time(17)) or (day == 7 and clock >= time(17))
    zone, hours = HOURS[venue]
    local = moment.astimezone(ZoneInfo(zone))
    return local.isoweekday() <= 5 and any(first <= local.time() < last for first, last in hours)


def test_prices_lie_on_the_tick_grid_and_inside_the_spread(week: list[dict[str, Any]]) -> None:
    assert len(week) > 300_000
    for quote in week:
        tick, lot = (Decimal(step) for step in (BY_SYMBOL[quote["symbol"]].tick, BY_SYMBOL[quote["symbol"]].lot))
        sides = {name: Decimal(quote[name]) for name in ("bid", "ask") if name in quote}
        sizes = {name: Decimal(quote[f"{name}_size"]) for name in sides}
        assert quote.keys() == {
            "symbol", "timestamp", "source", *sides, *(f"{name}_size" for name in sides),
            *(("price", "volume") if "price" in quote else ()),
        }  # fmt: skip
        assert all(price > 0 and price % tick == 0 for price in sides.values())
        assert all(size > 0 and size % lot == 0 for size in sizes.values())
        if len(sides) == 2:
            assert sides["bid"] < sides["ask"]
        if "price" in quote:
            (side,) = (name for name, price in sides.items() if price == Decimal(quote["price"]))
            assert 0 < Decimal(quote["volume"]) <= sizes[side]
            assert Decimal(quote["volume"]) % lot == 0


def test_a_third_of_the_quotes_have_no_price_and_a_few_one_side(week: list[dict[str, Any]]) -> None:
    with_price = [quote for quote in week if "price" in quote]
    one_sided = [quote for quote in week if "bid" not in quote or "ask" not in quote]
    assert 0.3 < 1 - len(with_price) / len(week) < 0.37
    assert 0.01 < len(one_sided) / len(week) < 0.03
    assert {name for quote in one_sided for name in ("bid", "ask") if name in quote} == {"bid", "ask"}
    assert not any("price" in quote for quote in one_sided)
    assert {quote["symbol"] for quote in one_sided} == {quote["symbol"] for quote in with_price} == BY_SYMBOL.keys()


def test_coins_come_in_fractions(week: list[dict[str, Any]]) -> None:
    fractional = {
        quote["symbol"]
        for quote in week
        for name in ("bid_size", "ask_size", "volume")
        if Decimal(quote.get(name, 0)) % 1
    }
    assert fractional == {"BTC-USD", "ETH-USD", "DOGE-USD", "SOL-USD", "XRP-USD"}


def test_times_rise_in_all_and_strictly_for_each_symbol(week: list[dict[str, Any]]) -> None:
    times = [quote["timestamp"] for quote in week]
    assert times == sorted(times)
    by_symbol = defaultdict(list)
    for quote in week:
        by_symbol[quote["symbol"]].append(quote["timestamp"])
    assert by_symbol.keys() == BY_SYMBOL.keys()
    for moments in by_symbol.values():
        assert all(earlier < later for earlier, later in pairwise(moments))


def test_each_venue_keeps_its_hours(week: list[dict[str, Any]]) -> None:
    for quote in week:
        moment = datetime.fromisoformat(quote["timestamp"])
        assert is_open(BY_SYMBOL[quote["symbol"]].venue.name, moment), quote
    hours = {datetime.fromisoformat(q["timestamp"]).hour for q in week if q["symbol"] == "BTC-USD"}
    assert hours == set(range(24))


def test_markets_are_busiest_at_the_open_and_the_close(week: list[dict[str, Any]]) -> None:
    zone = ZoneInfo("America/New_York")
    by_hour: dict[int, int] = defaultdict(int)
    for quote in week:
        if BY_SYMBOL[quote["symbol"]].venue.name == "New York":
            by_hour[datetime.fromisoformat(quote["timestamp"]).astimezone(zone).hour] += 1
    assert by_hour[10] > 1.5 * by_hour[12]
    assert by_hour[15] > 1.5 * by_hour[12]


def test_volatility_is_about_what_the_instrument_says(week: list[dict[str, Any]]) -> None:
    for symbol in ("BTC-USD", "EURUSD=X", "AAPL"):
        prices = [float(quote["price"]) for quote in week if quote["symbol"] == symbol and "price" in quote]
        day = BY_SYMBOL[symbol].volatility / 16
        assert 0.3 * day < max(prices) / min(prices) - 1 < 15 * day


def test_a_seed_gives_the_same_quotes_whenever_the_history_starts_and_ends() -> None:
    quotes = generate(SUNDAY, 2)
    assert generate(SUNDAY, 2) == quotes
    assert generate(SUNDAY, 1) == quotes[-len(generate(SUNDAY, 1)) :]
    earlier = generate(SUNDAY - timedelta(hours=9, minutes=7, seconds=13), 2)
    assert earlier == quotes[: len(earlier)]
    assert generate(SUNDAY, 2, seed=8) != quotes


def test_prices_do_not_jump_where_trading_does_not_pause(week: list[dict[str, Any]]) -> None:
    for symbol, limit in (("BTC-USD", 0.01), ("DOGE-USD", 0.02)):
        prices = [float(quote["price"]) for quote in week if quote["symbol"] == symbol and "price" in quote]
        assert max(abs(later / earlier - 1) for earlier, later in pairwise(prices)) < limit


@pytest.mark.parametrize("symbols", range(1, len(INSTRUMENTS) + 1))
def test_something_trades_at_any_time(symbols: int) -> None:
    market = Market(INSTRUMENTS[:symbols], SUNDAY, 7)
    assert market.open_venues()[0]


def test_live_quotes_keep_the_rate_on_a_weekend() -> None:
    market = Market(INSTRUMENTS, SUNDAY, 7)
    assert market.open_venues() == (["crypto"], ["FX", "New York", "London", "Xetra", "Tokyo"])
    start, lines = market.clock, []
    for step in range(1, 601):
        lines += market.advance(start + step * 200_000, 100)
    assert len(lines) == pytest.approx(12_000, rel=0.05)
    moments = [(quote["symbol"], quote["timestamp"]) for quote in map(msgspec.json.decode, lines)]
    assert len(set(moments)) == len(moments)
    assert {symbol for symbol, _ in moments} == {"BTC-USD", "ETH-USD", "DOGE-USD", "SOL-USD", "XRP-USD"}
    assert all(start <= micros(datetime.fromisoformat(t)) + 1_000_000 for _, t in moments)


def receipt(received: int) -> httpx.Response:
    return httpx.Response(200, content=msgspec.json.encode(Receipt(received, received)))


def accept(request: httpx.Request) -> httpx.Response:
    return receipt(len(request.content.splitlines()))


async def test_the_feed_sends_history_then_live_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    stored: list[dict[str, Any]] = []

    def service(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/quotes"
        assert request.url.params["on_conflict"] == "update"
        lines = request.content.splitlines()
        assert len(lines) <= demo.BATCH
        stored.extend(map(msgspec.json.decode, lines))
        return receipt(len(lines))

    options = DemoOptions(symbols=3, days=1, rate=400, duration=1, json=True)
    report = await demo.run(options, transport=httpx.MockTransport(service))
    out, err = capsys.readouterr()
    assert msgspec.json.decode(out) == msgspec.to_builtins(report)
    assert out.count("\n") == 1
    assert "History" in err
    assert report.failure is None
    assert report.history > 5_000
    assert 200 < report.live < 800
    assert len(stored) == report.history + report.live == report.totals.inserted
    assert len({(quote["symbol"], quote["timestamp"]) for quote in stored}) == len(stored)
    newest = datetime.fromisoformat(max(quote["timestamp"] for quote in stored))
    assert abs(newest - datetime.now(UTC)) < timedelta(seconds=5)


async def test_an_interrupt_ends_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGINT)
    report = await demo.run(DemoOptions(days=0), transport=httpx.MockTransport(accept))
    assert report.interrupted
    assert report.live > 0
    assert f"{report.live:,} quotes" in capsys.readouterr().out


async def test_a_refusal_ends_the_feed_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    problem = {"title": "Invalid request", "detail": "No.", "errors": [{"pointer": "/0", "detail": "Why."}]}
    transport = httpx.MockTransport(lambda _: httpx.Response(400, json=problem))
    with pytest.raises(Refused, match=r"400 Invalid request: No. \(/0: Why.\)"):
        await demo.run(DemoOptions(days=1, duration=0, json=True), transport=transport)
    assert "Why." in msgspec.json.decode(capsys.readouterr().out)["failure"]


@pytest.mark.parametrize(
    "options",
    [
        DemoOptions(symbols=0),
        DemoOptions(symbols=99),
        DemoOptions(days=-1),
        DemoOptions(rate=float("nan")),
        DemoOptions(rate=0),
        DemoOptions(duration=float("inf")),
        DemoOptions(end=datetime(2999, 1, 1, tzinfo=UTC)),
        DemoOptions(url="postgresql://host/name"),
        DemoOptions(url="localhost:8000"),
        DemoOptions(url="http://"),
    ],
)
async def test_options_without_meaning_are_refused(options: DemoOptions) -> None:
    with pytest.raises(InvalidRequest):
        await demo.run(options, transport=httpx.MockTransport(accept))


async def test_what_may_pass_is_sent_again() -> None:
    answers: list[httpx.Response | Exception] = [
        httpx.Response(503, headers={"Retry-After": "0"}),
        httpx.Response(503, headers={"Retry-After": "soon"}),
        httpx.ConnectError("refused"),
        receipt(1),
    ]
    told: list[str] = []

    def service(_: httpx.Request) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with Client(on_wait=told.append, transport=httpx.MockTransport(service)) as client:
        assert (await client.send([b"{}"])).inserted == 1
    assert client.retries == 3
    assert told == ["Waiting for http://127.0.0.1:8000: 503 Service Unavailable"]


async def test_retry_after_is_honoured() -> None:
    answers = [httpx.Response(503, headers={"Retry-After": "1"}), receipt(1)]
    began = asyncio.get_running_loop().time()
    async with Client(transport=httpx.MockTransport(lambda _: answers.pop(0))) as client:
        await client.send([b"{}"])
    assert asyncio.get_running_loop().time() - began >= 1


async def test_patience_ends_with_a_clear_message() -> None:
    async with Client(patience=0.3, transport=httpx.MockTransport(lambda _: httpx.Response(503))) as client:
        with pytest.raises(Unavailable, match=r"has not taken the quotes for 0\.3 seconds: 503"):
            await client.send([b"{}"])


async def test_another_server_is_not_taken_for_the_service() -> None:
    async with Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))) as client:
        with pytest.raises(Refused, match="is it the quote service"):
            await client.send([b"{}"])


async def test_answers_come_in_order_from_a_few_requests_at_once() -> None:
    under_way: set[int] = set()
    most = 0

    async def send(number: int) -> int:
        nonlocal most
        assert not {number - 1, number + 1} & under_way  # neighbours clash
        under_way.add(number)
        most = max(most, len(under_way))
        await asyncio.sleep(0.001 * (number % 3))
        under_way.discard(number)
        return number * number

    numbers = [0, 2, 4, 5, 7, 9, 11, 13, 14, 16, 18]
    answers = [a async for a in in_order(numbers, send, width=3, clash=lambda new, sent: abs(new - sent) == 1)]
    assert answers == [(number, number * number) for number in numbers]
    assert most == 3
