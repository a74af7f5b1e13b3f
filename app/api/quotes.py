"""Quotes in, and quotes out: by range, newest, by day, counted."""

from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi import Query as QueryParameters
from pydantic import BaseModel, Field

from app import formats
from app.api.deps import (
    DAY_START,
    END,
    JUST_TAKEN,
    START,
    SYMBOLS,
    Day,
    LastQuery,
    PagedQuery,
    Paging,
    Query,
    ReadQuery,
    Services,
    Symbols,
    Time,
    Wired,
    Zone,
    check_range,
    encoded,
    json_response,
    newest,
    page_response,
    read_token,
    require_admin,
    resolve_symbols,
)
from app.api.problems import responses
from app.clock import nanoseconds
from app.days import MIDNIGHT, day_bounds, day_of
from app.errors import InvalidRequest
from app.quote.model import StoredQuote
from app.quote.rules import normal_symbol
from app.repository.quotes import EXACT
from app.repository.ranges import Page, Range, Sort

router = APIRouter(prefix="/v1", tags=["quotes"])

#: 24 hours.
_DEFAULT_SPAN: Final = 86_400 * 10**9


class QuotePage(BaseModel):
    """A page of quotes, by symbol, then by time."""

    quotes: list[StoredQuote]
    next_page_token: str | None = Field(description="Token of the next page; null on the last one.")


class LatestQuotes(BaseModel):
    """The newest quote of each symbol."""

    quotes: list[StoredQuote]
    missing: list[str] = Field(description="Named symbols of which nothing is stored.")


class Count(BaseModel):
    """How many quotes are stored."""

    count: int
    exact: bool


class DeleteQuery(Query):
    """Parameters of a deletion; all are required, so that nothing is deleted by omission."""

    symbol: str = Field(description="One symbol.")
    start: Time = Field(description=START)
    end: Time = Field(description="End of the range, exclusive.")


class Deleted(BaseModel):
    """How many quotes were deleted."""

    deleted: int


class QuotesQuery(LastQuery):
    """Parameters of a range."""

    symbols: Symbols = Field(description=SYMBOLS)
    start: Time | None = Field(default=None, description=START + " Default: 24 hours before `end`.")
    end: Time | None = Field(default=None, description=END)
    limit_per_symbol: int | None = Field(default=None, ge=1, le=1_000_000, description="Most rows of one symbol.")


class IntradayQuery(PagedQuery):
    """Parameters of one day."""

    symbol: str = Field(description="One symbol.")
    date: Day | None = Field(default=None, description="Calendar day in `tz`, YYYY-MM-DD. Default: today.")
    tz: Zone = Field(default="UTC", description="IANA time zone of the day.")
    day_start: str = Field(default=MIDNIGHT, max_length=5, description=DAY_START)
    sort: Sort = Field(default="asc", description="Order of time.")


class LatestQuery(ReadQuery):
    """Parameters of newest quotes."""

    symbols: Symbols | None = Field(default=None, description=SYMBOLS + " Default: all.")


class CountQuery(ReadQuery):
    """Parameters of a count."""

    symbols: Symbols | None = Field(default=None, description=SYMBOLS + " Default: all.")
    start: Time | None = Field(default=None, description=START + " Default: the oldest quote.")
    end: Time | None = Field(default=None, description="End of the range, exclusive. Default: the newest quote.")
    estimate: bool = Field(
        default=False, description=f"The planner's guess of more than {EXACT:,}; what is fewer is counted."
    )


@router.delete("/quotes", response_model=Deleted, responses=responses(400, 403, 503))
async def delete_quotes(request: Request, query: Annotated[DeleteQuery, QueryParameters()], wired: Wired) -> Response:
    """Delete a range of one symbol; range, count, bars and latest agree on it at once. For administrators."""
    require_admin(request, wired.settings)
    deleted = await wired.quotes.delete_quotes(query.symbol, query.start, query.end)
    request.state.rows = deleted
    return encoded({"deleted": deleted})


@router.get("/quotes", response_model=QuotePage, responses=responses(400, 406, 503))
async def list_quotes(request: Request, query: Annotated[QuotesQuery, QueryParameters()], wired: Wired) -> Response:
    """Quotes of a time range, page by page; pages joined are the whole."""
    formats.writer(request.headers.get("accept"))
    symbols = resolve_symbols(query.symbols, wired.settings)
    if query.last is not None:
        if query.limit_per_symbol is not None:
            raise InvalidRequest("`last` says how many rows of a symbol there are.", parameter="limit_per_symbol")
        wanted, paging = newest(symbols, query.start, query.end, query, query.last)
        async with wired.reading(request):
            page = await wired.quotes.at(query.consistency).newest_quotes(wanted)
        return page_response(request, wired.settings, "quotes", page.reversed_in_time(), paging)
    if query.page_token is not None:
        paging = read_token(request, wired.settings, query.page_token)
    else:
        now = nanoseconds(datetime.now(UTC))
        end = now + JUST_TAKEN if query.end is None else query.end
        start = (now if query.end is None else end) - _DEFAULT_SPAN if query.start is None else query.start
        paging = Paging(start, end, None)
    return await _quotes(request, wired, symbols, paging, query, query.sort, query.limit_per_symbol)


@router.get("/quotes/intraday", response_model=QuotePage, responses=responses(400, 406, 503))
async def intraday_quotes(
    request: Request, query: Annotated[IntradayQuery, QueryParameters()], wired: Wired
) -> Response:
    """The quotes of one day of a time zone: 23 or 25 hours when its clocks change, none if they skip it."""
    formats.writer(request.headers.get("accept"))
    if query.page_token is not None:
        paging = read_token(request, wired.settings, query.page_token)
    else:
        day = query.date or day_of(datetime.now(UTC), query.tz, query.day_start)
        start, stop = day_bounds(day, query.tz, query.day_start)
        paging = Paging(nanoseconds(start), nanoseconds(stop), None)
        if start == stop:  # the clocks skipped it
            normal_symbol(query.symbol)
            return page_response(request, wired.settings, "quotes", Page([], None), paging)
    return await _quotes(request, wired, [normal_symbol(query.symbol)], paging, query, query.sort, None)


async def _quotes(
    request: Request,
    wired: Services,
    symbols: list[str],
    paging: Paging,
    query: PagedQuery,
    sort: Sort,
    limit_per_symbol: int | None,
) -> Response:
    check_range(paging.start, paging.end)
    wanted = Range(symbols, paging.start, paging.end, query.limit, sort, limit_per_symbol, paging.after)
    async with wired.reading(request):
        page = await wired.quotes.at(query.consistency).quotes_page(wanted)
    return page_response(request, wired.settings, "quotes", page, paging)


@router.get("/quotes/latest", response_model=LatestQuotes, responses=responses(400, 406, 503))
async def latest_quotes(request: Request, query: Annotated[LatestQuery, QueryParameters()], wired: Wired) -> Response:
    """The newest quote of each symbol; symbols without one are listed as missing."""
    formats.writer(request.headers.get("accept"))
    symbols = None if query.symbols is None else resolve_symbols(query.symbols, wired.settings)
    async with wired.reading(request):
        rows, missing = await wired.quotes.at(query.consistency).latest_rows(symbols)
    return json_response(f'{{"quotes":[{rows}],"missing":{msgspec.json.encode(missing).decode()}}}')


@router.get("/quotes/count", response_model=Count, responses=responses(400, 503))
async def count_quotes(request: Request, query: Annotated[CountQuery, QueryParameters()], wired: Wired) -> Response:
    """How many quotes are stored."""
    if query.start is not None and query.end is not None:
        check_range(query.start, query.end)
    symbols = None if query.symbols is None else resolve_symbols(query.symbols, wired.settings)
    store = wired.quotes.at(query.consistency)
    async with wired.reading(request):
        count = await store.count_quotes(symbols, query.start, query.end, estimate=query.estimate)
    return encoded({"count": count, "exact": not query.estimate or count <= EXACT})
