"""Clients that note, outside of every process that dies, what they sent and what was answered.

A row says by itself where it belongs: its price follows from its millisecond, and its volume is the number of its
request. Invariant: an attempt is noted before it is sent, and what is noted of an answer is what the answer says, so
that a request is `stored` only by a 2xx, `refused` only by an answer that says that nothing was stored, and else
`unknown`.
"""

import asyncio
import random
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Self
from uuid import uuid4

import httpx
import msgspec

from app.errors import DatabaseDamaged, DatabaseRefused, OutcomeUnknown, QuotesError

#: Prices are 1 + the millisecond modulo this.
PRICES: Final = 997
#: Of the codes of a 503, the one that does not say that nothing was stored.
UNKNOWN: Final = OutcomeUnknown.code
_ANSWER_TIMEOUT: Final = 90.0
_PAUSE: Final = 0.05
_LISTED: Final = 20
_MINUTE: Final = 60_000

State = Literal["stored", "refused", "unknown"]


def _unavailable(kind: type[QuotesError]) -> Iterator[str]:
    if kind.status == httpx.codes.SERVICE_UNAVAILABLE:
        yield kind.code
    for sub in kind.__subclasses__():
        yield from _unavailable(sub)


#: What a 503 may say.
UNAVAILABLE: Final = frozenset(_unavailable(QuotesError))
#: Of these, what does not pass by waiting.
LASTING: Final = frozenset({DatabaseRefused.code, DatabaseDamaged.code})


def random_symbol(prefix: str = "C") -> str:
    """A symbol that nothing else has."""
    return prefix + "".join(random.SystemRandom().choices(string.ascii_uppercase + string.digits, k=12))


@dataclass(slots=True)
class Request:
    """Rows of one symbol, `step` milliseconds apart, sent until they are stored or given up."""

    symbol: str
    number: int
    first: int  # milliseconds since 1970
    step: int
    rows: int
    keyed: bool
    state: State = "refused"
    attempts: int = 0
    answered: float = 0.0  # when it was acknowledged, by the monotonic clock
    inserted: int = 0
    unchanged: int = 0

    @property
    def times(self) -> range:
        """The milliseconds of its rows."""
        return range(self.first, self.first + self.rows * self.step, self.step)

    def body(self) -> bytes:
        """Its rows as JSON."""
        head = f'{{"symbol":"{self.symbol}","volume":{self.number},"timestamp":'
        return ("[" + ",".join(f'{head}{at},"price":{1 + at % PRICES}}}' for at in self.times) + "]").encode()


@dataclass(slots=True)
class Ledger:
    """All requests, how they were answered, and when.

    Attributes:
        answers: how often each status, code of a problem or failure of the transport came.
        wrong: answers that no client should get, the first few.
        acknowledged: for each 2xx, when its attempt was sent and answered, by the monotonic clock.
        seconds: how long each answer took, of any kind.
    """

    requests: list[Request] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    acknowledged: list[tuple[float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows that were acknowledged."""
        return sum(request.rows for request in self.requests if request.state == "stored")

    @property
    def symbols(self) -> list[str]:
        """All symbols of the requests."""
        return sorted({request.symbol for request in self.requests})

    def complain(self, sentence: str) -> None:
        """Note an answer that breaks the contract."""
        if len(self.wrong) < _LISTED and sentence not in self.wrong:
            self.wrong.append(sentence)

    def recovered(self, since: float) -> float | None:
        """Seconds from a moment to the first acknowledgement of what was sent after it."""
        return min((answered - since for sent, answered in reversed(self.acknowledged) if sent >= since), default=None)

    async def recovery(self, since: float, timeout: float) -> float | None:
        """`recovered`, waited for; None if that takes longer than `timeout`."""
        await until(lambda: self.recovered(since) is not None, timeout)
        return self.recovered(since)


async def until(reached: Callable[[], bool], timeout: float = 3600) -> bool:
    """Wait until something is so; False if that takes longer than `timeout`."""
    deadline = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


@dataclass
class Writer:
    """One client with a symbol of its own; as clients do, it sends again what may pass, and gives up some of it.

    `urls` are tried in turn: an answer that may pass, none, or one that closes the connection leads to the next one, as
    a balancer would be led by `/health/ready`. `times` gives the first millisecond of each request; without it they
    follow one another from `start` on. Requests are numbered from `first` on, and there are `most` of them.
    """

    ledger: Ledger
    urls: Sequence[str]
    start: int = 0
    step: int = 100
    rows: tuple[int, int] = (1, 1000)
    patience: float = 0.7  # of requests that failed, the part that is sent again until it is stored
    keyed: float = 0.5  # of requests, the part that carries an idempotency key
    pace: float = 0.0  # seconds between requests
    reconnects: bool = False  # so that of several workers not one has all the clients
    times: Callable[[], int] | None = None
    symbol: str = field(default_factory=random_symbol)
    seed: int = 0
    first: int = 1
    most: int = 10**9
    _turn: int = field(default=0, init=False)

    async def run(self, stop: asyncio.Event) -> None:
        """Send until told to stop; the request under way is finished or given up."""
        choice = random.Random(self.seed)
        at = self.start
        timeout = httpx.Timeout(_ANSWER_TIMEOUT, connect=5)
        limits = httpx.Limits(max_keepalive_connections=0 if self.reconnects else None)
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as http:
            for number in range(self.first, self.first + self.most):
                if stop.is_set():
                    return
                first = at if self.times is None else self.times()
                rows = choice.randint(*self.rows)
                at = first + rows * self.step
                request = Request(self.symbol, number, first, self.step, rows, choice.random() < self.keyed)
                self.ledger.requests.append(request)
                patient = choice.random() < self.patience
                headers = {"content-type": "application/json"}
                if request.keyed:
                    headers["idempotency-key"] = str(uuid4())
                body = request.body()
                while not await self._attempt(http, request, body, headers):
                    self._turn += 1
                    if not patient or stop.is_set():
                        break
                    await asyncio.sleep(_PAUSE)
                if self.pace:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), self.pace)

    async def _attempt(self, http: httpx.AsyncClient, request: Request, body: bytes, headers: dict[str, str]) -> bool:
        """Whether the request is done with."""
        url = self.urls[self._turn % len(self.urls)]
        ledger = self.ledger
        before, request.state = request.state, "unknown"
        request.attempts += 1
        sent = time.monotonic()
        try:
            answer = await http.post(f"{url}/v1/quotes?precision=ms", content=body, headers=headers)
        except httpx.ConnectError:
            ledger.answers["not connected"] += 1
            request.state = before
            return False
        except httpx.TimeoutException:
            ledger.answers["no answer"] += 1
            ledger.complain(f"no answer within {time.monotonic() - sent:.0f} s")
            return False
        except httpx.TransportError:
            ledger.answers["connection lost"] += 1
            return False
        answered = time.monotonic()
        ledger.seconds.append(answered - sent)
        if answer.status_code == httpx.codes.OK:
            ledger.answers["200"] += 1
            request.state, request.answered = "stored", answered
            self._receipt(request, answer.json())
            self._turn += answer.headers.get("connection") == "close"
            ledger.acknowledged.append((sent, answered))
            return True
        code = code_of(answer)
        ledger.answers[f"{answer.status_code} {code}"] += 1
        if answer.status_code == httpx.codes.CONFLICT and code == "idempotency-key-in-use" and request.attempts > 1:
            return False  # an earlier attempt is still being worked on
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or code not in UNAVAILABLE:
            ledger.complain(f"{answer.status_code} {code}: {answer.text[:300]}")
            return False
        if "retry-after" not in answer.headers and code not in LASTING:
            ledger.complain(f"503 {code} without Retry-After")
        if code != UNKNOWN:
            request.state = before
        return False

    def _receipt(self, request: Request, receipt: dict[str, Any]) -> None:
        request.inserted, request.unchanged = receipt["inserted"], receipt["unchanged"]
        # Sent again without a key, what an attempt before had stored is unchanged: all of it or nothing.
        again = request.attempts > 1 and not request.keyed and receipt["inserted"] == 0
        whole: dict[str, Any] = {"received": request.rows, "inserted": 0 if again else request.rows}
        whole |= {"unchanged": request.rows if again else 0, "updated": 0, "superseded": 0, "rejected": []}
        if any(receipt[name] != value for name, value in whole.items()):
            self.ledger.complain(f"a receipt does not add up: {receipt} of {request}")


def code_of(answer: httpx.Response) -> str:
    """The code of a problem document; of anything else that it is none."""
    with suppress(msgspec.MsgspecError):
        if answer.headers.get("content-type", "").startswith("application/problem+json"):
            return str(msgspec.json.decode(answer.content, type=dict[str, Any]).get("code"))
    return f"no problem document ({answer.headers.get('content-type')})"


class Writers:
    """Writers that run at once; an async context manager that stops them on leaving."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(writer.run(self._stop)) for writer in self._writers]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Let each finish its request.

        Raises:
            Exception: what ended a writer.
        """
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def ended(self) -> None:
        """Wait until each has sent all that it was to send."""
        await asyncio.gather(*self._tasks)

    @property
    def running(self) -> bool:
        """Whether none has failed."""
        return not any(task.done() for task in self._tasks)


def milliseconds(ago: timedelta = timedelta(0)) -> int:
    """A moment before now, since 1970."""
    return int((datetime.now(UTC) - ago).timestamp() * 1000)


def fleet(ledger: Ledger, urls: Sequence[str], count: int, **options: Any) -> Iterator[Writer]:
    """Writers of which every other one fills the hour before now, the others the days before yesterday."""
    recent = milliseconds(timedelta(minutes=50)) // _MINUTE * _MINUTE
    for seed in range(count):
        start, step = (recent, 1) if seed % 2 else (days_ago(3), 100)
        yield Writer(ledger, [*urls[seed % len(urls) :], *urls[: seed % len(urls)]], start, step, seed=seed, **options)


def days_ago(days: int) -> int:
    """A past midnight, in milliseconds since 1970."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return int((midnight - timedelta(days=days)).timestamp() * 1000)
