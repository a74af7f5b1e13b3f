"""A believable market, and the feed that sends it to a running service: some days of history, then live quotes.

Invariant: a quote of the history depends only on the seed, its symbol and its UTC day, so a demo that runs again
finds its history stored, and live quotes stay near the same prices. Each quote lies on the tick grid with
bid <= price <= ask as far as it has them, its sizes are whole lots, which are fractions for coins, it lies in the
trading hours of its venue (public holidays are not modelled), and later than the one before it of its symbol. About a
third have no price, because nothing was traded, and a few only one side; these have no trade either.
"""

import asyncio
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from random import Random
from typing import Final
from zoneinfo import ZoneInfo

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.client import DEFAULT_URL, Client, ClientError, Totals, in_order, until_interrupted
from app.clock import microseconds, rfc3339
from app.errors import InvalidRequest
from app.quote.terms import Receipt

BATCH: Final = 10_000
_MICRO: Final = 1_000_000
_MINUTE: Final = 60 * _MICRO
_DAY_MINUTES: Final = 24 * 60
_DAY: Final = _DAY_MINUTES * _MINUTE
_WAVES: Final = (11, 37, 131, 487)  # periods in days
_SATURDAY: Final = 5
_ONE_SIDED: Final = 0.02  # of all quotes
_LIVE_PERIOD: Final = 0.2
_ASLEEP: Final = 30 * _MICRO  # a live feed further behind than this catches up at the pace of history


@dataclass(frozen=True, slots=True)
class Venue:
    """Where and when instruments trade: `hours` are minutes of the local day, `shift` moves that day's start."""

    name: str
    zone: str
    hours: tuple[tuple[int, int], ...]
    weekend: bool = False
    shift: timedelta = timedelta(0)

    def activity(self, second: float) -> float:
        """The pace of quotes at a Unix time: 0 when closed, 1 on average when open."""
        local = datetime.fromtimestamp(second, ZoneInfo(self.zone)) + self.shift
        minute = local.hour * 60 + local.minute
        if (local.weekday() >= _SATURDAY and not self.weekend) or not any(a <= minute < b for a, b in self.hours):
            return 0.0
        start, stop = self.hours[0][0], self.hours[-1][1]
        if stop - start == _DAY_MINUTES:  # round the clock: a wave with its top in the late afternoon
            return 1 + 0.5 * math.cos((minute - 16 * 60) / _DAY_MINUTES * math.tau)
        return 0.5 + 1.5 * (2 * (minute - start) / (stop - start) - 1) ** 2  # busiest at the open and the close

    @property
    def open_seconds(self) -> int:
        """Seconds of trading in a year."""
        return 60 * sum(b - a for a, b in self.hours) * (365 if self.weekend else 252)


_NEW_YORK = Venue("New York", "America/New_York", ((9 * 60 + 30, 16 * 60),))
_LONDON = Venue("London", "Europe/London", ((8 * 60, 16 * 60 + 30),))
_XETRA = Venue("Xetra", "Europe/Berlin", ((9 * 60, 17 * 60 + 30),))
_TOKYO = Venue("Tokyo", "Asia/Tokyo", ((9 * 60, 11 * 60 + 30), (12 * 60 + 30, 15 * 60 + 30)))
# The week of FX, Sunday to Friday 17:00 in New York, is Monday to Friday on a clock seven hours ahead.
_FX = Venue("FX", "America/New_York", ((0, _DAY_MINUTES),), shift=timedelta(hours=7))
_CRYPTO = Venue("crypto", "UTC", ((0, _DAY_MINUTES),), weekend=True)


@dataclass(frozen=True, slots=True)
class Instrument:
    """What is quoted: first price, tick, volatility a year, usual spread in ticks, lot, quotes a second, share traded.

    `traded` is the share of its two-sided quotes that are a trade's.
    """

    symbol: str
    venue: Venue
    price: str
    tick: str
    volatility: float
    spread: int
    lot: str
    pace: float
    traded: float


def _stock(symbol: str, venue: Venue, price: str, volatility: float, tick: str = "0.01", spread: int = 2) -> Instrument:
    return Instrument(symbol, venue, price, tick, volatility, spread, "1" if venue is _XETRA else "100", 0.18, 0.75)


def _pair(symbol: str, price: str, volatility: float, tick: str = "0.00001") -> Instrument:
    return Instrument(symbol, _FX, price, tick, volatility, 4, "100000", 0.06, 0.3)


def _coin(symbol: str, price: str, volatility: float, lot: str) -> Instrument:
    spread = int(Decimal(price) * 3_000)  # a third of a basis point, in ticks of 10^-8
    return Instrument(symbol, _CRYPTO, price, "0.00000001", volatility, spread, lot, 0.08, 0.75)


#: Every prefix is a mixture that trades at some time of any day.
INSTRUMENTS: Final = (
    _coin("BTC-USD", "94250.5", 0.45, "0.0001"),
    _pair("EURUSD=X", "1.0842", 0.07),
    _stock("AAPL", _NEW_YORK, "228.40", 0.26),
    _coin("ETH-USD", "3120.25", 0.6, "0.001"),
    _stock("MSFT", _NEW_YORK, "421.70", 0.24, spread=3),
    _stock("SHEL.L", _LONDON, "2612.5", 0.22, "0.5"),
    _stock("SAP.DE", _XETRA, "214.35", 0.25),
    _stock("7203.T", _TOKYO, "2847.5", 0.28, "0.5"),
    _stock("NVDA", _NEW_YORK, "138.25", 0.5, spread=1),
    _pair("GBPUSD=X", "1.2713", 0.08),
    _coin("DOGE-USD", "0.18345", 0.9, "0.5"),
    _stock("AMZN", _NEW_YORK, "204.60", 0.3),
    _stock("JPM", _NEW_YORK, "243.10", 0.22),
    _stock("AZN.L", _LONDON, "10842", 0.23, "1"),
    _stock("SIE.DE", _XETRA, "182.46", 0.27),
    _stock("6758.T", _TOKYO, "2931.5", 0.3, "0.5"),
    _pair("USDJPY=X", "154.382", 0.1, "0.001"),
    _stock("GOOGL", _NEW_YORK, "176.20", 0.29),
    _stock("KO", _NEW_YORK, "63.85", 0.14, spread=1),
    _stock("HSBA.L", _LONDON, "728.3", 0.21, "0.1"),
    _stock("ALV.DE", _XETRA, "289.10", 0.17),
    _stock("9984.T", _TOKYO, "8714", 0.42, "0.5", spread=4),
    _stock("XOM", _NEW_YORK, "118.95", 0.23),
    _pair("AUDUSD=X", "0.6531", 0.1),
    _stock("TSLA", _NEW_YORK, "338.75", 0.6, spread=4),
    _stock("META", _NEW_YORK, "561.10", 0.34, spread=5),
    _coin("SOL-USD", "238.7", 0.8, "0.01"),
    _stock("BP.L", _LONDON, "384.15", 0.25, "0.05"),
    _stock("DTE.DE", _XETRA, "29.41", 0.16),
    _stock("8306.T", _TOKYO, "1803.5", 0.27, "0.5"),
    _pair("USDCHF=X", "0.8846", 0.07),
    _coin("XRP-USD", "1.1204", 0.95, "0.1"),
)


class _Grid:
    """The multiples of a tick or lot, written as decimals."""

    def __init__(self, step: str) -> None:
        decimals = -min(0, int(Decimal(step).normalize().as_tuple().exponent))
        self._scale = 10**decimals
        self._units = int(Decimal(step) * self._scale)
        self._form = f"%d.%0{decimals}d" if decimals else "%d%.0s"

    def __call__(self, steps: int) -> str:
        written: str = self._form % divmod(steps * self._units, self._scale)
        return written


class _Path:
    """The state of one instrument's random walk, and its quotes as lines of JSON.

    Each UTC day starts at a price of its own and, like a Brownian bridge, ends at the next day's.
    """

    def __init__(self, instrument: Instrument, seed: int) -> None:
        self.instrument = instrument
        self._seed = f"{seed}:{instrument.symbol}"
        self._base = float(Decimal(instrument.price) / Decimal(instrument.tick))
        self._price, self._size = _Grid(instrument.tick), _Grid(instrument.lot)
        self._move = instrument.volatility / math.sqrt(instrument.venue.open_seconds)
        self._line = f'{{"symbol":"{instrument.symbol}","timestamp":"%s%02d.%06dZ",%s"source":"demo"}}'
        self._begin(0)

    def _begin(self, day: int) -> None:
        self._random = Random(f"{self._seed}:{day}")  # noqa: S311  a market, not a secret
        self._last, self._midnight = day * _DAY, (day + 1) * _DAY
        self._mid, self._target = self._level(day), self._level(day + 1)

    def _level(self, day: int) -> float:
        """The price in ticks at a day's start: slow waves and a shock, in proportion to the volatility of a day."""
        daily = self.instrument.volatility / 16
        phases, shock = Random(self._seed), Random(f"{self._seed}:level:{day}").gauss(0, 0.5)  # noqa: S311
        waves = sum(0.3 * math.sqrt(p) * math.sin(math.tau * (day / p + phases.random())) for p in _WAVES)
        return self._base * math.exp(daily * (waves + shock))

    def quotes(self, start: int, stop: int, minute: str, rate: float, pace: float) -> Iterator[tuple[int, bytes]]:
        """Quotes in [start, stop) at `rate` a second; `pace` a second is what a year's volatility is spread over.

        `minute` is the text of the minute that holds them. Times are microseconds.
        """
        if start >= self._midnight:
            self._begin(start // _DAY)
        uniform, gauss, exponential = self._random.random, self._random.gauss, self._random.expovariate
        spread, traded, price, size = self.instrument.spread, self.instrument.traded, self._price, self._size
        base, gap, move = start - start % _MINUTE, rate / _MICRO, self._move / math.sqrt(pace)
        at = float(start)
        while True:
            at += exponential(gap)
            moment = max(int(at), self._last + 1)
            if moment >= stop:
                return
            pull = (moment - self._last) / (self._midnight - self._last)
            change = gauss(0, move)
            self._mid *= 1 + change + (self._target / self._mid - 1) * pull
            self._last = moment
            width = 1 + int(2 * spread * uniform())
            bid = max(1, int(self._mid - width / 2))
            ask = bid + width
            bid_lots, ask_lots = 1 + int(30 * uniform() ** 3), 1 + int(30 * uniform() ** 3)
            sides = [
                f'"bid":"{price(bid)}","bid_size":{size(bid_lots)},',
                f'"ask":"{price(ask)}","ask_size":{size(ask_lots)},',
            ]
            if uniform() < _ONE_SIDED:
                del sides[uniform() < 0.5]  # noqa: PLR2004  either of the two
            elif uniform() < traded:
                # A rising price mostly trades at the ask.
                at_ask = (change > 0) == (uniform() < 0.7)  # noqa: PLR2004
                last, lots = (ask, ask_lots) if at_ask else (bid, bid_lots)
                sides.append(f'"price":"{price(last)}","volume":{size(1 + int(lots * uniform()))},')
            seconds, micros = divmod(moment - base, _MICRO)
            line = self._line % (minute, seconds, micros, "".join(sides))
            yield moment, line.encode()


class Market:
    """Instruments that move together in time, from `start` on. `clock` is where they are, in Unix microseconds."""

    def __init__(self, instruments: Sequence[Instrument], start: datetime, seed: int) -> None:
        self._paths = [_Path(instrument, seed) for instrument in instruments]
        self._venues = dict.fromkeys(instrument.venue for instrument in instruments)
        self.clock = microseconds(start)

    def advance(self, until: int, rate: float | None = None) -> list[bytes]:
        """Move the clock to `until`; the quotes of that time as lines of JSON, in time order.

        With `rate`, the instruments that trade share that many quotes a second, else each keeps its own pace.
        """
        lines: list[bytes] = []
        while self.clock < until:
            minute = self.clock - self.clock % _MINUTE
            stop = min(minute + _MINUTE, until)
            lines += self._slice(stop, minute, rate)
            self.clock = stop
        return lines

    def open_venues(self) -> tuple[list[str], list[str]]:
        """Names of the venues that trade now, and of those that do not."""
        is_open = {venue.name: venue.activity(self.clock / _MICRO) > 0 for venue in self._venues}
        return [name for name, trades in is_open.items() if trades], [n for n, trades in is_open.items() if not trades]

    def _slice(self, stop: int, minute: int, rate: float | None) -> list[bytes]:
        activity = {venue: venue.activity(minute / _MICRO) for venue in self._venues}
        factor = 1.0
        if rate is not None:
            total = sum(path.instrument.pace * activity[path.instrument.venue] for path in self._paths)
            factor = rate / total if total else 0.0
        text = datetime.fromtimestamp(minute / _MICRO, UTC).strftime("%Y-%m-%dT%H:%M:")
        quotes: list[tuple[int, bytes]] = []
        for path in self._paths:
            pace = path.instrument.pace * factor
            if (active := activity[path.instrument.venue]) and pace:
                quotes += path.quotes(self.clock, stop, text, pace * active, pace)
        quotes.sort()
        return [line for _, line in quotes]


def history(market: Market, end: int) -> Iterator[tuple[int, list[bytes]]]:
    """Batches up to `end`, each with the clock at its own end."""
    lines: list[bytes] = []
    while market.clock < end:
        lines += market.advance(min(market.clock + 10 * _MINUTE, end))
        while len(lines) >= BATCH:
            yield market.clock, lines[:BATCH]
            del lines[:BATCH]
    if lines:
        yield market.clock, lines


DEFAULT_SEED: Final = 20_260_102


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to send: `days` whole UTC days and the day of `end` (now) so far, then `rate` quotes a second, live.

    `duration` is that of the live part in seconds; None streams until interrupted, 0 not at all.
    """

    url: str = DEFAULT_URL
    symbols: int = 24
    days: int = 3
    rate: float = 50.0
    seed: int = DEFAULT_SEED
    duration: float | None = None
    end: datetime | None = None
    json: bool = False


class DemoReport(msgspec.Struct):
    """What was sent and what became of it; `unacknowledged` quotes were under way when the demo ended."""

    url: str
    symbols: list[str]
    start: str
    end: str
    history: int = 0
    live: int = 0
    unacknowledged: int = 0
    totals: Totals = msgspec.field(default_factory=Totals)
    refusal: str | None = None
    retries: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    failure: str | None = None


class _Feed:
    """One run: generates, sends, counts, and shows where it is on stderr."""

    def __init__(self, options: DemoOptions, client: Client, console: Console, report: DemoReport) -> None:
        self._options = options
        self._client = client
        self._console = console
        self._report = report
        self._end = options.end or datetime.now(UTC)
        midnight = self._end.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self._start = midnight - timedelta(days=options.days) if options.days else self._end
        self._market = Market(INSTRUMENTS[: options.symbols], self._start, options.seed)
        report.start, report.end = rfc3339(self._start), rfc3339(self._end)

    async def run(self) -> None:
        """History, then live quotes."""
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[quotes]:,} quotes  {task.fields[rate]:,.0f}/s"),
            TimeRemainingColumn(),
            console=self._console,
        ) as progress:
            if self._options.days:
                await self._send_history(progress)
            if self._options.duration != 0:
                await self._send_live(progress)

    async def _send(self, lines: list[bytes]) -> Receipt:
        self._report.unacknowledged += len(lines)
        receipt = await self._client.send(lines, on_error="skip")
        self._report.unacknowledged -= len(lines)
        self._report.totals.add(receipt)
        if receipt.rejected and self._report.refusal is None:
            self._report.refusal = receipt.rejected[0].detail
        return receipt

    async def _send_history(self, progress: Progress) -> None:
        start, end = microseconds(self._start), microseconds(self._end)
        bar = progress.add_task(f"History, {self._options.days} days", total=end - start, quotes=0, rate=0.0)
        began = time.monotonic()

        async def send(batch: tuple[int, list[bytes]]) -> Receipt:
            return await self._send(batch[1])

        async with aclosing(in_order(history(self._market, end), send)) as answers:
            async for (clock, lines), _ in answers:
                self._report.history += len(lines)
                rate = self._report.history / (time.monotonic() - began)
                progress.update(bar, completed=clock - start, quotes=self._report.history, rate=rate)
        progress.update(bar, completed=end - start)

    async def _send_live(self, progress: Progress) -> None:
        trading, closed = self._market.open_venues()
        if closed:
            source = f"live quotes come from {', '.join(trading)}" if trading else "live quotes wait for an opening"
            self._console.print(f"Closed now: {', '.join(closed)}; {source}.", soft_wrap=True)
        began, duration = time.monotonic(), self._options.duration
        bar = progress.add_task("Live", total=duration, quotes=0, rate=0.0)
        while duration is None or time.monotonic() - began < duration:
            left = math.inf if duration is None else began + duration - time.monotonic()
            await asyncio.sleep(min(_LIVE_PERIOD, max(0.0, left)))
            now = time.time_ns() // 1000
            late = now - self._market.clock > _ASLEEP
            for _, lines in (
                history(self._market, now) if late else [(now, self._market.advance(now, self._options.rate))]
            ):
                for first in range(0, len(lines), BATCH):
                    await self._send(lines[first : first + BATCH])
                self._report.live += len(lines)
            passed = time.monotonic() - began
            progress.update(bar, completed=passed, quotes=self._report.live, rate=self._report.live / passed)


def _check(options: DemoOptions) -> None:
    if not 1 <= options.symbols <= len(INSTRUMENTS):
        raise InvalidRequest(f"The demo has 1 to {len(INSTRUMENTS)} symbols.", parameter="symbols")
    if not 0 <= options.days <= 3660:  # noqa: PLR2004  ten years, the longest that anyone waits for
        raise InvalidRequest("The history is 0 to 3660 days long.", parameter="days")
    if not 0 < options.rate <= 50_000:  # noqa: PLR2004  about half of what one process generates
        raise InvalidRequest("The rate is above 0 and at most 50,000 quotes a second.", parameter="rate")
    if options.duration is not None and not 0 <= options.duration < math.inf:
        raise InvalidRequest("The duration is 0 or more seconds.", parameter="duration")
    if options.end is not None and (options.end.tzinfo is None or options.end > datetime.now(UTC)):
        raise InvalidRequest("The end carries an offset and is not in the future.", parameter="end")


async def run(options: DemoOptions, *, transport: httpx.AsyncBaseTransport | None = None) -> DemoReport:
    """Feed the service until the end of `duration` or an interrupt; print a summary, or one JSON object.

    Raises:
        InvalidRequest: an option has no meaning.
        ClientError: the service stayed away or refused; the summary has been printed.
    """
    _check(options)
    console = Console(stderr=True, highlight=False, markup=False)
    symbols = [instrument.symbol for instrument in INSTRUMENTS[: options.symbols]]
    report = DemoReport(url=options.url, symbols=symbols, start="", end="")
    began = time.monotonic()
    async with Client(options.url, on_wait=partial(console.print, soft_wrap=True), transport=transport) as client:
        try:
            report.interrupted = not await until_interrupted(_Feed(options, client, console, report).run())
        except ClientError as error:
            report.failure = str(error)
            raise
        finally:
            report.retries = client.retries
            report.seconds = round(time.monotonic() - began, 3)
            _show(report, json=options.json)
    return report


def _show(report: DemoReport, *, json: bool) -> None:
    if json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return
    totals = report.totals
    table = Table(show_header=False, title=f"Demo at {report.url}", title_justify="left")
    table.add_row("symbols", f"{len(report.symbols)}")
    table.add_row("history", f"{report.history:,} quotes, {report.start} to {report.end}")
    table.add_row("live", f"{report.live:,} quotes")
    table.add_row("stored", f"{totals.inserted:,} new, {totals.updated:,} changed, {totals.unchanged:,} known")
    if totals.rejected:
        table.add_row("rejected", f"{totals.rejected:,}: {report.refusal}")
    if report.unacknowledged:
        table.add_row("unacknowledged", f"{report.unacknowledged:,}")
    table.add_row("time", f"{report.seconds:,.1f} s, {report.retries} requests sent again")
    Console().print(table)
