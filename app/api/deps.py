"""What the routes share: the wired services, the request body, times and lists in a query, page tokens.

Invariant: a body is read up to its limit and no further; a page token is taken back only for the query that
it was issued for.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache, partial
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl, quote, urlencode

import msgspec
from fastapi import Depends, Request, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from app.api.shares import Claim, Shares
from app.clock import NotAnInstant, floor, microseconds, nanoseconds, parse, rfc3339_nano
from app.days import EARLIEST, beginning
from app.errors import (
    BodyTooLarge,
    Forbidden,
    InvalidPageToken,
    InvalidRequest,
    QuotesError,
)
from app.formats import Format, encoding
from app.formats.apart import Apart
from app.health import Health
from app.monitor import Monitor
from app.quote.batch import Batch
from app.quote.rules import normal_symbol
from app.quote.terms import AHEAD, Consistency, Terms
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Page, Position, Range, Sort
from app.settings import Settings
from app.writer import Writer

_SIGNATURE_BYTES: Final = 12
#: What becomes more than this is decompressed in a thread: gzip takes about a millisecond for it.
_INLINE_BYTES: Final = 64 * 1024
#: What becomes more than this is kept in one piece that grows, and of such ones a client has one read at a time: its
#: reader may take all the memory that a reader gets.
_LARGE_BYTES: Final = 2 * 1024 * 1024
#: Bytes that are made of a body in one go there, before room is taken for more.
_STEP_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Services:
    """What `main` wired for the routes."""

    settings: Settings
    quotes: QuoteRepository
    writer: Writer
    health: Health
    monitor: Monitor
    #: Few, because what a body becomes while it is read takes several times its size.
    readers: ThreadPoolExecutor
    shares: Shares
    apart: Apart

    def reading(self, request: Request) -> AbstractAsyncContextManager[None]:
        """The turn of a read; clients take turns. It ends before the answer is sent, which may take its client long."""
        scope = request.scope
        return self.shares.reading(scope.get("client"), scope["state"].get("peer", ""))

    async def decode(self, claim: Claim, codec: Format, body: bytes | bytearray, terms: Terms) -> Batch:
        """The batch of a body, which a process apart reads where that may take long, or where it is binary."""
        tried = False
        if isinstance(body, bytes):
            batch, tried = codec.at_once(body, terms), codec.tries(body)
            if batch is not None:
                return batch
        alone = self.shares.large.turn(claim.who) if codec.quick is None or len(body) > _LARGE_BYTES else nullcontext()
        async with alone, self.shares.readers.turn(claim.who):
            read = partial(self.apart.decode, codec.name, body, terms, tried=tried)
            return await asyncio.get_running_loop().run_in_executor(self.readers, read)

    async def hash(self, claim: Claim, hashed: Callable[[], bytes]) -> bytes:
        """What a function makes of a body that is too large to be hashed on the event loop; clients take turns."""
        async with self.shares.readers.turn(claim.who):
            return await asyncio.get_running_loop().run_in_executor(self.readers, hashed)


async def _services(request: Request) -> Services:  # not `def`, which would take a turn in the thread pool
    services: Services = request.app.state.services
    return services


Wired = Annotated[Services, Depends(_services)]


def require_admin(request: Request, settings: Settings) -> None:
    """Let pass only who has the administrator's token.

    Raises:
        Forbidden: the token is missing or another one, or none is configured.
    """
    if settings.admin_token is None:
        raise Forbidden("No administrator's token is configured: set QUOTES_ADMIN_TOKEN to allow this.")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    expected = settings.admin_token.get_secret_value().encode()
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), expected):
        raise Forbidden("This needs the administrator's token, as `Authorization: Bearer …`.")


# --- body ---


async def read_body(request: Request, settings: Settings, claim: Claim) -> bytes | bytearray:
    """The whole body, decompressed; room is claimed for it as it arrives. What is large is a bytearray.

    Raises:
        Overloaded: there is no more room.
        UnsupportedEncoding: it is encoded in another way than gzip or zstd, or more than once.
        MalformedBody: the encoding is damaged.
        BodyTooLarge: it is longer than `max_body_bytes`, by its header, in fact, or decompressed.
        BodyTimeout: nothing of it came for `body_timeout`, or less than `body_rate` a second.
        ServiceStopping: the service stops before it has arrived.
        ClientDisconnect: the client has gone.
    """
    limit = settings.max_body_bytes
    body = _Body()
    inflater = encoding.inflater(request.headers.get("content-encoding"), limit, body.add)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:19]) > limit:
        raise BodyTooLarge.beyond(limit)
    more = True
    windowed = False
    claim.expect()
    try:
        while more:
            message = await request.receive()  # `stream()` has a generator more, 1 us
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more = message.get("more_body", False)
            chunk = message.get("body", b"")
            claim.came(len(chunk))
            if claim.size > limit:
                raise BodyTooLarge.beyond(limit)
            if inflater is None:
                claim.grow(len(chunk))
                body.add(chunk)
            elif chunk:
                if more and not windowed:
                    claim.grow(inflater.window)
                    windowed = True
                await _inflate(inflater, chunk, claim)
    except asyncio.CancelledError:
        claim.explain()
        raise
    finally:
        claim.arrived()
    if inflater is not None:
        inflater.finish()
    return body.whole()


class _Body:
    """What there is of a body. A large one is moved as it grows, by the kernel, and never there twice."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._large: bytearray | None = None

    def add(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._large is None and self._size > _LARGE_BYTES:
            self._large = bytearray().join(self._chunks)
            self._chunks.clear()
        if self._large is None:
            self._chunks.append(chunk)
        else:
            self._large += chunk

    def whole(self) -> bytes | bytearray:
        return b"".join(self._chunks) if self._large is None else self._large


async def _inflate(inflater: encoding.Inflater, chunk: bytes, claim: Claim) -> None:
    """Decompress a part of a body, and claim room for what it becomes."""
    before = inflater.size
    done = inflater.feed(chunk, most=_INLINE_BYTES)
    claim.grow(inflater.size - before)
    if not done:
        claim.busy = True
        while not done:
            before = inflater.size
            done = await asyncio.to_thread(inflater.feed, most=_STEP_BYTES, parts=True)
            claim.grow(inflater.size - before)
        claim.worked()


# --- query ---

#: Parameters that may be given several times: a list, and what `/metrics` takes.
LISTS: Final = frozenset({"symbols", "name[]"})


@lru_cache(maxsize=256)
def repeated(query: bytes) -> str | None:
    """The first parameter of a query that has one value and is given several: whichever counted would be a guess."""
    seen = set(LISTS)
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name in seen and name not in LISTS:
            return name
        seen.add(name)
    return None


_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
#: A time of day, and the offset behind the blank that a `+` becomes where a client does not encode it.
_BARE_OFFSET: Final = re.compile(r"(:[0-9]{2}(?:\.[0-9]+)?) ([0-9]{2}(?::?[0-9]{2})?)$")


def _time(value: object) -> int:
    """Nanoseconds since 1970 of an RFC 3339 text, or of a date, which stands for its midnight in UTC."""
    if not isinstance(value, str):
        raise PydanticCustomError("timestamp_format", "Input should be an RFC 3339 date and time with an offset")
    text = f"{value}T00:00:00Z" if _DATE.fullmatch(value) else _BARE_OFFSET.sub(r"\1+\2", value[:100])
    try:
        instant = parse(text)
    except NotAnInstant as error:
        raise PydanticCustomError("timestamp_format", error.detail) from None
    if microseconds(floor(instant)) != instant // 1000:
        raise PydanticCustomError("timestamp_format", "In UTC the timestamp lies outside of the years 1 to 9999")
    return instant


def _bound(value: object) -> object:
    """As `_time`, but a date stays one: its day begins where its zone has it."""
    return date.fromisoformat(value) if isinstance(value, str) and _DATE.fullmatch(value) else _time(value)


def _zone(value: object) -> object:
    """A name of a zone, in which a `+` that was not encoded has come as a blank."""
    return value.replace(" ", "+") if isinstance(value, str) else value


def _day(value: object) -> object:
    if isinstance(value, str) and not _DATE.fullmatch(value):
        raise PydanticCustomError("date_format", "Input should be a date, as in 2026-11-20")
    return value


def _split(value: object) -> object:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return [item for part in value for item in part.split(",") if item.strip()]
    return value


def _normal(value: list[str]) -> list[str]:
    try:
        return list(dict.fromkeys(normal_symbol(symbol) for symbol in value))
    except QuotesError as error:
        raise ValueError(error.detail) from error


#: Nanoseconds since 1970.
Time = Annotated[int, BeforeValidator(_time), WithJsonSchema({"type": "string", "format": "date-time"})]
#: The same, or a date, to be read by `instant`.
Bound = Annotated[int | date, BeforeValidator(_bound), WithJsonSchema({"type": "string", "format": "date-time"})]
Zone = Annotated[str, BeforeValidator(_zone), Field(max_length=64)]
#: A date, and nothing that would have to be taken for one.
Day = Annotated[date, BeforeValidator(_day)]
Symbols = Annotated[list[str], BeforeValidator(_split), AfterValidator(_normal)]
#: Query parameters as they are documented everywhere.
START: Final = (
    "First instant of the range, RFC 3339 with an offset and up to nine digits of fraction, or a date for its midnight"
    " in UTC."
)
BOUND: Final = START.replace("its midnight in UTC", "the start of its day")
END: Final = "End of the range, exclusive. Default: after all that was acknowledged."
DAY_START: Final = "When days begin in `tz`, HH:MM; from 12:00 on it is on the evening before the day's date."
#: Nanoseconds from now to the end of what may have been stored.
JUST_TAKEN: Final = AHEAD // timedelta(microseconds=1) * 1000 + 1000
#: Rows of a page.
MOST_ROWS: Final = 10_000
SYMBOLS: Final = "Symbols, separated by commas."


class Query(BaseModel):
    """Base of all query models: an unknown parameter is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


def parameters(model: type[Query]) -> list[dict[str, Any]]:
    """The fields of a query model as OpenAPI has parameters, for a route that reads its query itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "schema": field,
            "description": field.get("description", ""),
        }
        for name, field in schema["properties"].items()
    ]


class ReadQuery(Query):
    """Parameters of every read of quotes."""

    consistency: Consistency = Field(
        default="eventual",
        description="`strong` sees every acknowledged write; `eventual` may lag by seconds where there are replicas.",
    )


class PagedQuery(ReadQuery):
    """Parameters of every paged route."""

    limit: int = Field(default=1000, ge=1, le=MOST_ROWS, description="Most rows of one page.")
    page_token: str | None = Field(default=None, max_length=512, description="`next_page_token` of the last page.")


class LastQuery(PagedQuery):
    """Parameters of the routes that give the last rows of each symbol, too."""

    sort: Sort = Field(default="asc", description="Order of time within a symbol.")
    last: int | None = Field(
        default=None,
        ge=1,
        le=MOST_ROWS,
        description="The newest so many of each symbol, wherever they lie before `end` and from `start` on, if it is"
        f" given; in ascending order, on one page of at most {MOST_ROWS:,}.",
    )


def resolve_symbols(symbols: Sequence[str], settings: Settings) -> list[str]:
    """Symbols of a query that names at least one.

    Raises:
        InvalidRequest: none, or more than `max_symbols`.
    """
    if not symbols:
        raise InvalidRequest("Name at least one symbol.", parameter="symbols")
    if len(symbols) > settings.max_symbols:
        raise InvalidRequest(
            f"{len(symbols)} symbols; at most {settings.max_symbols} are taken at once.", parameter="symbols"
        )
    return list(symbols)


def instant(bound: int | date, tz: str, day_start: str) -> int:
    """Nanoseconds since 1970 of a bound, that of a date being the start of its day in a zone, within the calendar."""
    return bound if isinstance(bound, int) else nanoseconds(floor(10**9 * beginning(bound, tz, day_start)))


def check_range(start: int, end: int) -> None:
    """Refuse an empty or reversed range.

    Raises:
        InvalidRequest: `start` is not before `end`.
    """
    if start >= end:
        raise InvalidRequest("The range is empty: start is not before end.", parameter="start")


# --- paging ---


class _Token(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    symbol: str
    instant: str
    given: int
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class Paging:
    """The page of a query that is asked for: its range, fixed on the first page, and where it goes on."""

    start: int
    end: int
    after: Position | None


def _sign(key: bytes, request: Request, payload: bytes) -> bytes:
    """A signature over the token and the query it belongs to; page size and token may differ between pages."""
    query = sorted((k, v) for k, v in request.query_params.multi_items() if k not in {"page_token", "limit"})
    bound = "\n".join([request.scope["path"], urlencode(query)]).encode()
    return hmac.digest(key, hashlib.sha256(bound).digest() + payload, "sha256")[:_SIGNATURE_BYTES]


def issue_token(request: Request, settings: Settings, position: Position, start: int, end: int) -> str:
    """The token of the page after `position`."""
    token = _Token(
        position.symbol, rfc3339_nano(position.instant), position.given, rfc3339_nano(start), rfc3339_nano(end)
    )
    payload = msgspec.json.encode(token)
    key = settings.page_token_key.get_secret_value().encode()
    return base64.urlsafe_b64encode(_sign(key, request, payload) + payload).decode().rstrip("=")


def newest(
    symbols: Sequence[str], start: int | None, end: int | None, query: LastQuery, last: int
) -> tuple[Range, Paging]:
    """The range of the last rows of each symbol, to be read from its end, and turned round.

    Raises:
        InvalidRequest: they are wanted in another order or from a page on, or do not fit one.
    """
    if query.sort == "desc" or query.page_token is not None:
        raise InvalidRequest("The last rows come on one page, in ascending order.", parameter="last")
    if last * len(symbols) > MOST_ROWS:
        raise InvalidRequest(f"The last {last} rows of {len(symbols)} symbols do not fit a page.", parameter="last")
    end = nanoseconds(datetime.now(UTC)) + JUST_TAKEN if end is None else end
    paging = Paging(EARLIEST * 10**9 if start is None else start, end, None)
    check_range(paging.start, paging.end)
    return Range(symbols, paging.start, paging.end, last * len(symbols), "desc", last), paging


def read_token(request: Request, settings: Settings, text: str) -> Paging:
    """The page that a token stands for.

    Raises:
        InvalidPageToken: it is not of this service, or not of this query.
    """
    refused = InvalidPageToken("The page token does not belong to this query.", parameter="page_token")
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused from error
    signature, payload = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
    key = settings.page_token_key.get_secret_value().encode()
    if not hmac.compare_digest(signature, _sign(key, request, payload)):
        raise refused
    try:
        token = msgspec.json.decode(payload, type=_Token)
        return Paging(parse(token.start), parse(token.end), Position(token.symbol, parse(token.instant), token.given))
    except (msgspec.DecodeError, NotAnInstant) as error:
        raise refused from error


def page_response(
    request: Request,
    settings: Settings,
    member: str,
    page: Page,
    paging: Paging,
    about: dict[str, Any] | None = None,
) -> Response:
    """`{"<member>": [...], "next_page_token": ...}` around rows that are JSON text already, and what else is told."""
    request.state.rows = len(page.rows)
    headers = {}
    member_text = "null"
    if page.next is not None:
        text = issue_token(request, settings, page.next, paging.start, paging.end)
        query = [(k, v) for k, v in request.query_params.multi_items() if k != "page_token"]
        headers["Link"] = f'<{quote(request.scope["path"])}?{urlencode([*query, ("page_token", text)])}>; rel="next"'
        member_text = f'"{text}"'
    told = f",{msgspec.json.encode(about).decode()[1:]}" if about else "}"
    return json_response(f'{{"{member}":[{",".join(page.rows)}],"next_page_token":{member_text}{told}', headers)


def json_response(text: str, headers: dict[str, str] | None = None) -> Response:
    """JSON that was built elsewhere."""
    return Response(text.encode(), headers=headers, media_type="application/json")


def encoded(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A small value as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
