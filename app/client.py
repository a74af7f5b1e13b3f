"""Sends quotes to a running service over HTTP: what `load` and `demo` share.

Invariant: `Client.send` returns the receipt of a committed request, or raises. What may pass (no connection, 503) is
tried again until `patience` is used up; that is harmless, because a stored quote that is sent again is `unchanged`,
and a request with an idempotency key gets even the receipt of the first time.
"""

import asyncio
import math
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx
import msgspec

from app.errors import InvalidRequest, QuotesError
from app.quote.terms import OnConflict, OnError, Prices, Receipt

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_PASSING: Final = frozenset({408, 429, 502, 503, 504})  # the service's own 503, and what a balancer answers for it
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0

T = TypeVar("T")
R = TypeVar("R")


class ClientError(QuotesError):
    """A request that did not end with a receipt; what a client of the service raises, never the service."""


class Unavailable(ClientError):
    """The service could not be reached, or was overloaded, for longer than `patience`."""


class Refused(ClientError):
    """The service refused the request as a whole; sending it again would not help."""


class Totals(msgspec.Struct):
    """Receipts, added up."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    superseded: int = 0
    numbered: int = 0
    rounded: int = 0
    zeros: int = 0
    crossed: int = 0
    rejected: int = 0

    def add(self, receipt: Receipt) -> None:
        """Count one more receipt."""
        self.inserted += receipt.inserted
        self.updated += receipt.updated
        self.unchanged += receipt.unchanged
        self.superseded += receipt.superseded
        self.numbered += receipt.numbered
        self.rounded += receipt.rounded
        self.zeros += receipt.zeros
        self.crossed += receipt.crossed
        self.rejected += len(receipt.rejected)


class _Health(msgspec.Struct):
    """A report of health, which an unhealthy service gives too; its store is null while it cannot be seen."""

    store: str | None


class Client:
    """A connection to the service; an async context manager.

    `on_wait` is told, once per outage, why the client waits. `retries` counts the requests sent again.

    Raises:
        InvalidRequest: `url` is no http(s) URL.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        patience: float = 60.0,
        on_wait: Callable[[str], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise InvalidRequest(f"The address of the service is a URL such as {DEFAULT_URL}.", parameter="url")
        self.url = url
        self.retries = 0
        self._patience = patience
        self._on_wait = on_wait
        self._waiting = False
        self._http = httpx.AsyncClient(
            base_url=parsed,
            transport=transport,
            timeout=httpx.Timeout(60.0, connect=5.0),
            # A proxy of the environment cannot reach this machine's own services.
            trust_env=parsed.host not in {"127.0.0.1", "::1", "localhost"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def send(
        self,
        lines: Sequence[bytes],
        *,
        on_conflict: OnConflict = "update",
        on_error: OnError = "abort",
        prices: Prices | None = None,
        key: str | None = None,
    ) -> Receipt:
        """Post quotes, each a line of JSON, as one request.

        With an idempotency `key` the receipt is right even if the request is sent again because its answer was lost;
        without, the quotes of the first time would count as `unchanged`, or be refused under `on_conflict="error"`.

        Raises:
            Unavailable: the service was away for longer than `patience`.
            Refused: it refused the request.
        """
        headers = {"Content-Type": "application/x-ndjson"}
        if key is not None:
            headers["Idempotency-Key"] = f'"{key}"'
        given = {"on_conflict": on_conflict, "on_error": on_error, "prices": prices}
        request = {name: value for name, value in given.items() if value is not None}
        body = b"\n".join(lines)
        post = partial(self._http.post, "/v1/quotes", params=request, content=body, headers=headers)
        response = await self._patiently(post, lambda response: response.is_success, "taken the quotes")
        try:
            return msgspec.json.decode(response.content, type=Receipt)
        except msgspec.MsgspecError as error:
            raise Refused(f"{self.url} answered without a receipt; is it the quote service?") from error

    async def store(self) -> str:
        """What tells the service's store apart from others, whichever way it is reached.

        Raises:
            Unavailable: the service was away, or could not see its store, for longer than `patience`.
            Refused: it does not say.
        """
        get = partial(self._http.get, "/health")
        response = await self._patiently(get, _tells_store, "said which store it has")
        try:
            return msgspec.json.decode(response.content, type=_Health).store or ""
        except msgspec.MsgspecError as error:
            raise Refused(f"{self.url} does not say which store it has; is it the quote service?") from error

    async def _patiently(
        self,
        request: Callable[[], Awaitable[httpx.Response]],
        answers: Callable[[httpx.Response], bool],
        what: str,
    ) -> httpx.Response:
        """Send a request until it is answered; what may pass is tried again."""
        started, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            attempted = time.monotonic()
            try:
                response = await request()
            except httpx.TransportError as error:
                reason, asked = _reason(error), 0.0
            else:
                if answers(response):
                    self._waiting = False
                    return response
                reason, asked = _problem(response), _retry_after(response)
                # A conflict that passes: the request that this one repeats is still being worked on.
                in_flight = response.status_code == HTTPStatus.CONFLICT and asked
                if not response.is_success and response.status_code not in _PASSING and not in_flight:
                    raise Refused(f"{self.url} has not {what}: {reason}")
            if pause == _FIRST_PAUSE:
                started = attempted
            delay = max(pause, asked)
            if time.monotonic() + delay - started > self._patience:
                raise Unavailable(f"{self.url} has not {what} for {self._patience:g} seconds: {reason}")
            if not self._waiting and self._on_wait is not None:
                self._on_wait(f"Waiting for {self.url}: {reason}")
            self._waiting = True
            self.retries += 1
            await asyncio.sleep(delay)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _tells_store(response: httpx.Response) -> bool:
    """Whether a report of health names the store, or a success is no such report."""
    try:
        return msgspec.json.decode(response.content, type=_Health).store is not None
    except msgspec.MsgspecError:
        return response.is_success


def _reason(error: httpx.TransportError) -> str:
    return "connection refused or lost" if isinstance(error, httpx.NetworkError) else str(error) or type(error).__name__


def _problem(response: httpx.Response) -> str:
    """Status, title, detail and the first fault of a problem document, or the status alone."""
    text = f"{response.status_code} {response.reason_phrase}".strip()
    try:
        problem = msgspec.json.decode(response.content, type=dict[str, Any])
    except msgspec.MsgspecError:
        return text
    text = f"{response.status_code} {problem.get('title', response.reason_phrase)}: {problem.get('detail', '')}"
    match problem.get("errors"):
        case [{"pointer": pointer, "detail": detail}, *_]:
            return f"{text} ({pointer}: {detail})"
        case _:
            return text.removesuffix(": ")


def _retry_after(response: httpx.Response) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", "0"))
    except ValueError:  # the other form of the header is a date, which the service never sends
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


async def in_order(
    items: Iterable[T],
    send: Callable[[T], Coroutine[Any, Any, R]],
    *,
    width: int = 4,
    clash: Callable[[T, T], bool] = lambda _new, _sent: False,
) -> AsyncGenerator[tuple[T, R], None]:
    """Send up to `width` items at once and give their answers in the order of the items.

    Items that `clash` are never under way together. Close it (`aclosing`) to cancel what is under way.
    """
    source = iter(items)
    upcoming = next(source, None)
    waiting: deque[tuple[T, asyncio.Task[R]]] = deque()
    try:
        while upcoming is not None or waiting:
            while upcoming is not None and len(waiting) < width:
                new = upcoming
                if any(clash(new, sent) for sent, _ in waiting):
                    break
                waiting.append((new, asyncio.create_task(send(new))))
                await asyncio.sleep(0)  # lets the request leave before the next item is prepared
                upcoming = next(source, None)
            item, task = waiting[0]
            answer = await task
            waiting.popleft()
            yield item, answer
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def until_interrupted(work: Awaitable[None]) -> bool:
    """Await `work`; SIGINT or SIGTERM cancels it. True if it ended by itself."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    handled = []
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, interrupt)
            handled.append(number)
        except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            pass
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
    return not interrupted
