"""Quotes in: one route for all formats.

Invariant: a 2xx is sent after the commit, and a request that is refused has stored nothing. A request without a query
and special headers pays for none: it takes a plain route of Starlette, and a query is parsed once for each text of it.
FastAPI's own route takes 100 us of 190 for a single quote; it is there for OpenAPI.
"""

import time
from functools import lru_cache, partial
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.routing import Match, Route
from starlette.types import Scope

from app import formats, metrics
from app.api.deps import Query, Services, encoded, parameters, read_body
from app.api.headers import PARAMETERS, fingerprint, idempotency_key, prefers_minimal
from app.api.problems import responses
from app.clock import Precision
from app.errors import InvalidQuotes, QuotesError
from app.quote.terms import OnConflict, OnError, Prices, Receipt, Terms, Ties
from app.repository.ingest import Write
from app.repository.receipts import IdempotencyKey, Replayed

router = APIRouter(prefix="/v1", tags=["quotes"])

_ROWS: Final = {
    result: metrics.INGEST_ROWS.labels(result)
    for result in ("inserted", "updated", "unchanged", "superseded", "rejected")
}


class RejectedQuote(BaseModel):
    """A refused row."""

    index: int
    pointer: str
    code: str
    detail: str


class IngestReceipt(BaseModel):
    """What became of one request; the rows are committed.

    `received = inserted + updated + unchanged + superseded + len(rejected)`.
    """

    received: int
    inserted: int
    updated: int
    unchanged: int
    superseded: int = Field(description="Rows that another row of the same key in the batch replaced.")
    numbered: int = Field(description="Rows that `ties=number` moved on to a free nanosecond; they are stored.")
    rounded: int = Field(description="Prices and sizes rounded to twelve decimals; they are stored.")
    zeros: int = Field(description="Prices of 0 taken for an absent side, under `prices=positive`.")
    crossed: int = Field(description="Quotes whose bid is above their ask; they are stored.")
    rejected: list[RejectedQuote]
    dry_run: Literal[True] | None = Field(
        default=None, description="Only in the answer to a dry run, of which nothing was stored."
    )


class IngestQuery(Query):
    """Parameters of ingest."""

    model_config = ConfigDict(frozen=True)

    on_conflict: OnConflict = Field(
        default="update",
        description="A key that is stored already: `update` it, `merge` so that nulls keep what is stored, `ignore` the"
        " new row, or refuse it as an `error`.",
    )
    on_error: OnError = Field(
        default="abort", description="A row that is refused: `abort` the request, or `skip` the row and list it."
    )
    precision: Precision | None = Field(
        default=None,
        description="Unit of timestamps that are numbers, counted from 1970-01-01T00:00Z. "
        "Default: such timestamps are refused.",
    )
    ties: Ties = Field(
        default="replace",
        description="Quotes of one symbol and instant in the body: the last one `replace`s the others, or all are kept"
        " and `number`ed, the k-th later one k nanoseconds later, in the order of the body.",
    )
    prices: Prices | None = Field(
        default=None,
        description="`positive`: a price of 0 is an absent side, one below is refused. `signed`: both are stored."
        " Default: that of the settings.",
    )
    dry_run: bool = Field(
        default=False, description="Answer as without it, but store nothing; an idempotency key is not used up."
    )


_REPLAYED: Final = {
    "Idempotency-Replayed": {
        "description": "`true` if this is the receipt of an earlier request with the same idempotency key.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The receipt", "headers": _REPLAYED},
    204: {
        "description": "Stored, for `Prefer: return=minimal`",
        "headers": _REPLAYED | {"Preference-Applied": {"schema": {"type": "string", "enum": ["return=minimal"]}}},
    },
}
_BODY: Final[dict[str, Any]] = {
    "parameters": [*parameters(IngestQuery), *PARAMETERS],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {
                                "quotes": {"type": "array", "items": {"$ref": "#/components/schemas/Quote"}}
                            },
                            "required": ["quotes"],
                            "additionalProperties": False,
                        },
                        {"type": "array", "items": {"$ref": "#/components/schemas/Quote"}},
                    ]
                }
            },
            "application/x-ndjson": {"schema": {"type": "string", "description": "One quote a line."}},
            "text/csv": {"schema": {"type": "string", "description": "A header line, then one quote a line."}},
            "application/vnd.apache.arrow.stream": {"schema": {"type": "string", "format": "binary"}},
            "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


@router.post(
    "/quotes",
    response_model=IngestReceipt,
    responses=_ANSWERS | responses(400, 408, 409, 413, 415, 422, 503),
    openapi_extra=_BODY,
)
async def ingest_quotes(request: Request) -> Response:
    """Store a batch of quotes. The answer is sent after the commit, so a 200 is never lost."""
    query = _query(request.scope["query_string"])
    wired: Services = request.app.state.services
    try:
        receipt = await _ingest(request, query, wired)
    except QuotesError as error:
        if not query.dry_run:
            metrics.INGEST_REFUSED.labels(error.code).inc()
            if isinstance(error, InvalidQuotes):
                _ROWS["rejected"].inc(len(error.rejections))
        raise
    request.scope["state"]["rows"] = receipt.received
    if query.dry_run:
        return encoded(msgspec.to_builtins(receipt) | {"dry_run": True})
    if isinstance(receipt, Replayed):
        headers = {"Idempotency-Replayed": "true"}
    else:
        headers = {}
        _count(receipt)
    if prefers_minimal(request) and not (receipt.rejected or receipt.superseded):
        return Response(status_code=204, headers={**headers, "Preference-Applied": "return=minimal"})
    return encoded(receipt, headers=headers)


class _Fast(Route):
    """A route that leaves other methods of its path to the routes behind it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, {**child, "route": self}) if match == Match.FULL else (Match.NONE, {})


#: Goes before all others.
ROUTE: Final = _Fast("/v1/quotes", ingest_quotes, methods=["POST"])


@lru_cache(maxsize=256)
def _query(text: bytes) -> IngestQuery:
    try:
        return IngestQuery.model_validate(dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True)))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**fault, "loc": ("query", *fault["loc"])} for fault in faults]) from None


def _count(receipt: Receipt) -> None:
    metrics.INGEST_BATCH_ROWS.observe(receipt.received)
    for result, rows in (
        ("inserted", receipt.inserted),
        ("updated", receipt.updated),
        ("unchanged", receipt.unchanged),
        ("superseded", receipt.superseded),
        ("rejected", len(receipt.rejected)),
    ):
        if rows:
            _ROWS[result].inc(rows)
    if receipt.crossed:
        metrics.INGEST_CROSSED.inc(receipt.crossed)


async def _ingest(request: Request, query: IngestQuery, wired: Services) -> Receipt:
    name = idempotency_key(request)
    codec = formats.reader(request.headers.get("content-type"))
    with wired.shares.claim(request.scope.get("client")) as claim:
        body = await read_body(request, wired.settings, claim)
        arrived = time.time()
        key = None
        if name is not None and not query.dry_run:
            large = len(body) > codec.inline_bytes
            hashed = partial(fingerprint, request, query, body)
            digest = await wired.hash(claim, hashed) if large else hashed()
            key = IdempotencyKey(name, digest)
        terms = Terms(
            wired.quotes.limits(), query.on_error, query.on_conflict, query.precision, query.ties,
            query.prices or wired.settings.prices,
        )  # fmt: skip
        try:
            batch = await wired.decode(claim, codec, body, terms)
        except QuotesError:
            # What was taken the first time may be refused by now: quotes grow too old, limits change.
            if key is not None and (receipt := await wired.quotes.replay(key)) is not None:
                return receipt
            raise
        del body  # the batch may wait for long
        claim.become(len(batch), batch.nbytes)
        receipt = await wired.writer.submit(Write(batch, query.on_conflict, query.on_error, key, query.dry_run))
    if not query.dry_run and not isinstance(receipt, Replayed):
        metrics.observe_arrival(batch.timestamps, arrived)
    return receipt
