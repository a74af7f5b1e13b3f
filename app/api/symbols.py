"""What is stored: symbols with their first and last time."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi import Query as QueryParameters
from pydantic import AwareDatetime, BaseModel, Field

from app import formats
from app.api.deps import ReadQuery, Wired, json_response
from app.api.problems import responses
from app.quote.rules import normal_symbol

router = APIRouter(prefix="/v1", tags=["symbols"])


class SymbolSpan(BaseModel):
    """A symbol with the times of its oldest and newest quote."""

    symbol: str
    first: AwareDatetime
    last: AwareDatetime


class SymbolPage(BaseModel):
    """A page of symbols in byte order."""

    symbols: list[SymbolSpan]
    next_page_token: str | None = Field(description="The last symbol, if more follow.")


class SymbolsQuery(ReadQuery):
    """Parameters of the list of symbols."""

    limit: int = Field(default=10_000, ge=1, le=100_000, description="Most symbols of one page.")
    page_token: str | None = Field(default=None, max_length=64, description="`next_page_token` of the last page.")


@router.get("/symbols", response_model=SymbolPage, responses=responses(400, 406, 503))
async def list_symbols(request: Request, query: Annotated[SymbolsQuery, QueryParameters()], wired: Wired) -> Response:
    """Stored symbols, at a cost independent of how many quotes they have."""
    formats.writer(request.headers.get("accept"))
    after = None if query.page_token is None else normal_symbol(query.page_token)
    async with wired.reading(request):
        rows, last = await wired.quotes.at(query.consistency).symbols_page(query.limit, after)
    token = "null" if last is None else f'"{last}"'
    return json_response(f'{{"symbols":[{rows}],"next_page_token":{token}}}')
