"""OHLC bars: what a bar is made of, and what is told of those that are not there.

Invariant: bars are exact. They are read from rollups only where those are up to date, and equal intervals always give
equal bars, whatever the range asked for. A bar is made of the quotes that have its price, so bars of `last` know
nothing of quotes without a trade. Where bars begin and end is `Grid`'s to say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Final, Literal

from app.clock import Interval, microseconds
from app.days import EARLIEST, LATEST, MIDNIGHT, Grid, moment
from app.db.engine import Connection
from app.errors import InvalidRequest
from app.quote.terms import check_choice
from app.repository import rollups
from app.repository.ranges import Range

BarPrice = Literal["last", "bid", "ask", "mid"]
Fill = Literal["none", "null", "previous"]

#: Bars that tell what those around them are made of.
_FEW: Final = 100
BAR_COLUMNS: Final = "open, high, low, close, volume, turnover, count"
#: What bars of each price are made of, of a quote; where it is null the quote is none of theirs.
VALUES: Final[Mapping[BarPrice, str]] = MappingProxyType(
    {"last": "price", "bid": "bid", "ask": "ask", "mid": "(bid + ask) * 0.5"}
)
#: The prices of which rollups hold bars, with what the names of their columns begin with.
ROLLED_UP: Final[Mapping[BarPrice, str]] = MappingProxyType({"last": "", "mid": "mid_"})


@dataclass(frozen=True, slots=True)
class BarSpec:
    """What bars to make: their interval, of which price, and when days begin, in which IANA time zone.

    In a zone, bars of days and more begin at local midnight, or at `day_start`, and are as long as the days are: 23 or
    25 hours when the clocks change. A `day_start` from 12:00 on is on the evening before its date, as of currency and
    futures days. Shorter bars are counted in elapsed time from there and cut at the next day, so they must divide a
    day.

    With `fill` the bars without quotes up to now have a count of 0: of nulls, after a symbol's first bar of the range;
    or of the close before, also of the one before the range.

    Raises:
        InvalidRequest: the zone is unknown, the interval is none or cannot be counted from its days, or one of the
            words is none that is taken.
    """

    interval: Interval
    price: BarPrice = "last"
    tz: str = "UTC"
    fill: Fill = "none"
    day_start: str = MIDNIGHT
    grid: Grid = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.interval, Interval):
            raise InvalidRequest("An interval is a text such as 15m, 1h or 3M, or an Interval.", parameter="interval")
        check_choice(self.price, BarPrice, "price")
        check_choice(self.fill, Fill, "fill")
        object.__setattr__(self, "grid", Grid(self.interval, self.tz, self.day_start))

    @property
    def filled(self) -> bool:
        """Whether there are bars without quotes."""
        return self.fill != "none"

    def edge(self, instant: int) -> int:
        """The first edge that is not before an instant, in seconds; those beyond all that is stored are as good."""
        return self.grid.ceil(min(max(-(-instant // 10**9), EARLIEST), LATEST))

    def source(self, low: int, high: int) -> str:
        """The coarsest rollup that the bars from one edge to another can be made of."""
        return rollups.coarsest(math.gcd(*(self.grid.even(low, high) or self.grid.edges(low, high))))


@dataclass(frozen=True, slots=True)
class Bar:
    """One OHLC bar; its prices are None in a gap that is filled with nulls.

    `timestamp` is its start in UTC; `final` says that its end has passed.
    """

    symbol: str
    timestamp: datetime
    open: Decimal | None
    high: Decimal | None
    low: Decimal | None
    close: Decimal | None
    volume: Decimal | None
    vwap: Decimal | None
    count: int
    final: bool


Reason = Literal["unknown", "no-trades", "no-quotes", "nothing-in-range"]


@dataclass(frozen=True, slots=True)
class Sources:
    """What bars can be made of: rollups, where there are any, and above `floor` quotes, which may lie in chunks."""

    rollups: bool
    floor: datetime | None
    chunks: bool = True

    def have(self, price: BarPrice) -> bool:
        """Whether rollups hold bars of a price."""
        return self.rollups and price in ROLLED_UP


_REASONS: Final = """
SELECT given.symbol, EXISTS (SELECT FROM quotes.latest held WHERE held.symbol = given.symbol),
       EXISTS (SELECT FROM quotes.real_time stored WHERE stored.symbol = given.symbol COLLATE "C"
               AND stored.timestamp >= $2 AND stored.timestamp < $3){}
FROM unnest($1::text[]) AS given (symbol)
"""
#: A minute of which there were quotes has a row, whatever they were.
_DROPPED: Final = """
    OR EXISTS (SELECT FROM quotes.ohlc_1m kept WHERE kept.symbol = given.symbol COLLATE "C"
               AND kept.timestamp >= $2 AND kept.timestamp < $4)
"""


async def reasons(
    connection: Connection, sources: Sources, symbols: Sequence[str], wanted: Range, spec: BarSpec
) -> list[tuple[str, Reason]]:
    """Why there are no bars of these symbols that start in the range."""
    if not symbols:
        return []
    # The bars that start in the range are of the quotes from the first start in it to the first one after it.
    first, end = moment(spec.edge(wanted.start)), moment(spec.edge(wanted.end))
    statement, values = _REASONS.format(""), [list(symbols), first, end]
    if sources.rollups and sources.floor is not None and first < sources.floor:
        statement, values = _REASONS.format(_DROPPED), [*values, min(end, sources.floor)]
    found = await connection.fetch(statement, *values)
    without: Reason = "no-trades" if spec.price == "last" else "no-quotes"
    return [
        (symbol, without if present else "nothing-in-range" if known else "unknown") for symbol, known, present in found
    ]


def complete_from(sources: Sources, wanted: Range, spec: BarSpec) -> datetime | None:
    """Where the bars of the range begin to be whole, if they are of quotes of which retention has dropped some."""
    low, high = spec.edge(wanted.start), spec.edge(wanted.end)
    if sources.floor is None or low >= high:
        return None
    floor = spec.grid.ceil(-(-microseconds(sources.floor) // 10**6))
    if low >= floor:
        return None
    if sources.have(spec.price):
        last = spec.grid.window(low, min(high, floor), _FEW, newest=True)
        if spec.source(last[0], last[-1]) != rollups.RAW:
            return None
    return moment(floor)
