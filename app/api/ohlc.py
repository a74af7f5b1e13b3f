"""OHLC bars and daily summaries."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final

from fastapi import APIRouter, Request, Response
from fastapi import Query as QueryParameters
from pydantic import AwareDatetime, BaseModel, Field

from app import formats
from app.api.deps import (
    BOUND,
    DAY_START,
    END,
    JUST_TAKEN,
    SYMBOLS,
    Bound,
    LastQuery,
    Paging,
    Symbols,
    Wired,
    Zone,
    check_range,
    instant,
    newest,
    page_response,
    read_token,
    resolve_symbols,
)
from app.api.problems import responses
from app.clock import Interval, floor, nanoseconds, rfc3339
from app.days import MIDNIGHT
from app.errors import InvalidRequest
from app.repository.bars import BarPrice, BarSpec, Fill, Reason
from app.repository.ranges import Range

router = APIRouter(prefix="/v1", tags=["bars"])

_DEFAULT_BARS: Final = 100
COMPLETE_FROM: Final = (
    "Start of the first bar that is whole, where bars are of quotes of which retention has dropped those of the range's"
    " beginning; else null."
)


class OHLCBar(BaseModel):
    """One bar."""

    symbol: str
    timestamp: AwareDatetime = Field(description="Start of the bar.")
    open: Decimal | None = Field(description="Null, like the other prices, in a gap filled with nulls.")
    high: Decimal | None
    low: Decimal | None
    close: Decimal | None
    volume: Decimal | None = Field(description="Sum of volumes; null if no quote had one.")
    vwap: Decimal | None = Field(description="sum(price x volume) / sum(volume); null without volume.")
    count: int = Field(description="What the bar is made of: trades, or quotes with the side or both sides.")
    final: bool = Field(description="Whether its end has passed; a late quote may still correct it.")


class DailySummary(OHLCBar):
    """One UTC day."""

    range: Decimal = Field(description="high - low")
    change: Decimal = Field(description="close - open")
    change_percent: Decimal | None = Field(
        description="100 x change / open, four decimals; null where the open is 0 or below."
    )


class MissingBars(BaseModel):
    """A named symbol without bars, and why."""

    symbol: str
    reason: Reason = Field(
        description="`unknown`: nothing of it is stored. `nothing-in-range`: no quote of it in the bars that start in"
        " the range. `no-trades`, `no-quotes`: there are quotes, but none with the price that the bars are of."
    )


class BarPage(BaseModel):
    """A page of bars, by symbol, then by time."""

    bars: list[OHLCBar]
    next_page_token: str | None
    missing: list[MissingBars] = Field(description="Named symbols that this page might have had, but has no bars of.")
    complete_from: AwareDatetime | None = Field(description=COMPLETE_FROM)


class SummaryPage(BaseModel):
    """A page of daily summaries, by symbol, then by day."""

    summaries: list[DailySummary]
    next_page_token: str | None
    missing: list[MissingBars] = Field(description="Named symbols that this page might have had, but has none of.")
    complete_from: AwareDatetime | None = Field(description=COMPLETE_FROM)


class SummaryQuery(LastQuery):
    """Parameters of daily summaries."""

    symbols: Symbols = Field(description=SYMBOLS)
    start: Bound | None = Field(default=None, description=BOUND + " Default: 100 bars before `end`.")
    end: Bound | None = Field(default=None, description=END)
    price: BarPrice = Field(
        default="last",
        description="What the bars are of: `last`, prices of trades; `bid`, `ask`; `mid`, (bid + ask) / 2 of quotes"
        " with both.",
    )


class BarsQuery(SummaryQuery):
    """Parameters of bars."""

    interval: str = Field(
        max_length=16,
        description="`<n>s`, `<n>m`, `<n>h`, `<n>d`, `<n>w` or `<n>M` (months); also `5Min`, `1Hour`, `1Day`.",
        examples=["1m", "5m", "1h", "1d"],
    )
    tz: Zone = Field(default="UTC", description="IANA time zone in which days begin.")
    day_start: str = Field(default=MIDNIGHT, max_length=5, description=DAY_START)
    fill: Fill = Field(
        default="none",
        description="Bars without quotes, up to now: left out; of nulls, from a symbol's first bar of the range on; or"
        " of the `previous` close, also of that before the range. Their count is 0.",
    )


def _page(request: Request, query: SummaryQuery, spec: BarSpec, wired: Wired) -> tuple[Range, Paging]:
    formats.writer(request.headers.get("accept"))
    symbols = resolve_symbols(query.symbols, wired.settings)
    bounds = (query.start, query.end)
    start, end = (None if bound is None else instant(bound, spec.tz, spec.day_start) for bound in bounds)
    if query.last is not None:
        return newest(symbols, start, end, query, query.last)
    if query.page_token is not None:
        paging = read_token(request, wired.settings, query.page_token)
    else:
        now = nanoseconds(datetime.now(UTC))
        if start is None:
            start = nanoseconds(_bars_before(floor(now if end is None else end), spec.interval.width))
        end = now + JUST_TAKEN if end is None else end
        paging = Paging(start, end, None)
    check_range(paging.start, paging.end)
    return Range(symbols, paging.start, paging.end, query.limit, query.sort, None, paging.after), paging


def _about(wired: Wired, wanted: Range, spec: BarSpec, missing: Sequence[tuple[str, Reason]]) -> dict[str, Any]:
    """What is told beside a page of bars."""
    since = wired.quotes.complete_from(wanted, spec)
    return {
        "missing": [{"symbol": symbol, "reason": reason} for symbol, reason in missing],
        "complete_from": None if since is None else rfc3339(since),
    }


def _bars_before(end: datetime, width: timedelta) -> datetime:
    try:
        return end - _DEFAULT_BARS * width
    except OverflowError as error:
        raise InvalidRequest("So many of these bars reach beyond the calendar.", parameter="start") from error


@router.get("/ohlc", response_model=BarPage, responses=responses(400, 406, 503))
async def list_bars(request: Request, query: Annotated[BarsQuery, QueryParameters()], wired: Wired) -> Response:
    """OHLC bars that start in a time range, of any interval, in any time zone."""
    spec = BarSpec(Interval.parse(query.interval), query.price, query.tz, query.fill, query.day_start)
    wanted, paging = _page(request, query, spec, wired)
    async with wired.reading(request):
        page, missing = await wired.quotes.at(query.consistency).bars_page(wanted, spec)
    page = page if query.last is None else page.reversed_in_time()
    return page_response(request, wired.settings, "bars", page, paging, _about(wired, wanted, spec, missing))


@router.get("/summary/daily", response_model=SummaryPage, responses=responses(400, 406, 503))
async def list_daily_summaries(
    request: Request, query: Annotated[SummaryQuery, QueryParameters()], wired: Wired
) -> Response:
    """One line a symbol and UTC day: OHLC, volume, VWAP, range and change."""
    spec = BarSpec(Interval(1, "d"), query.price)
    wanted, paging = _page(request, query, spec, wired)
    async with wired.reading(request):
        page, missing = await wired.quotes.at(query.consistency).summary_page(wanted, query.price)
    page = page if query.last is None else page.reversed_in_time()
    return page_response(request, wired.settings, "summaries", page, paging, _about(wired, wanted, spec, missing))
