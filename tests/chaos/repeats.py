"""Exactly once: every request sent one to five times, at once and much later, against a model.

Each client has symbols that only it writes, so that it knows what every answer has to be: the receipt of each request
is reckoned from the model before it is sent. One symbol is shared: there each client merges one field of its own, so
that the result does not depend on who comes first.
Invariant: the model is told of a request once, however often it is sent; what the store says afterwards is the model.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

import asyncpg
import httpx
import msgspec

from app.db import embedded
from tests.chaos.recording import UNKNOWN, code_of, days_ago, random_symbol, until
from tests.chaos.reporting import Report
from tests.chaos.victims import QUIET, Service, ended

Fields = Literal["price", "bid", "ask", "volume"]
FIELDS: Final[tuple[Fields, ...]] = ("price", "bid", "ask", "volume")
#: What a client may own in the symbol that all share; a row needs one of these.
OWNED: Final[tuple[Fields, ...]] = ("price", "bid", "ask")
#: A key, and then the values of its row in the order of FIELDS.
Row = tuple[int | None, int | None, int | None, int | None]
Table = dict[tuple[str, int], Row]

_TOKEN: Final = "chaos-repeats"  # noqa: S105  of a service that lives for a test
_CLIENTS: Final = 6
_TIMES: Final = 120  # instants of a symbol: few, so that requests meet
_ROWS: Final = 12
_LATER: Final = 40  # requests that may be sent again much later
_TIMEOUT: Final = 60.0
_PAUSE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Sent:
    """A request with a key, and the receipt that it got."""

    parameters: dict[str, str]
    body: bytes
    headers: dict[str, str]
    receipt: bytes


@dataclass(slots=True)
class Heard:
    """The answer of one repetition, and whether another answer to it may have been lost before.

    There is no answer if the client went before it got one.
    """

    answer: httpx.Response | None
    doubtful: bool


@dataclass
class Client:
    """One client: what it sends, what it has to hear, and the model of what is stored."""

    http: httpx.AsyncClient
    number: int
    shared: str
    start: int
    choice: random.Random
    report: Report
    counts: Counter[str]
    table: Table = field(default_factory=dict)
    later: deque[Sent] = field(default_factory=lambda: deque(maxlen=_LATER))

    def __post_init__(self) -> None:
        self.symbols = [random_symbol() for _ in range(2)]

    async def step(self) -> None:
        """One request, with all its repetitions."""
        kind = self.choice.random()
        if kind < 0.08:
            await self._delete()
        elif kind < 0.2 and self.later:
            await self._again()
        elif kind < 0.3 and self.number < len(OWNED):
            await self._post(self.shared, "merge", [OWNED[self.number]])
        else:
            conflict = self.choice.choices(("update", "merge", "ignore", "error"), (5, 3, 1, 1))[0]
            await self._post(self.choice.choice(self.symbols), conflict, FIELDS)

    def _rows(self, fields: "tuple[Fields, ...] | list[Fields]") -> Iterator[tuple[int, dict[str, int]]]:
        for at in self.choice.sample(range(_TIMES), self.choice.randint(1, _ROWS)):
            chosen = [name for name in fields if self.choice.random() < 0.6]
            if not set(chosen) & set(OWNED):
                chosen.append(fields[0])
            yield self.start + 1000 * at, {name: self.choice.randint(1, 99) for name in chosen}

    async def _post(self, symbol: str, conflict: str, fields: "tuple[Fields, ...] | list[Fields]") -> None:
        rows = list(self._rows(fields))
        body = msgspec.json.encode([{"symbol": symbol, "timestamp": at, **values} for at, values in rows])
        parameters = {"precision": "ms", "on_conflict": conflict}
        expected = self._apply(symbol, conflict, rows)
        # Under `error` a repetition without a key is refused, as it should be; it has nothing to show.
        keyed = conflict == "error" or self.choice.random() < 0.6
        headers = {"content-type": "application/json"}
        if keyed:
            headers["idempotency-key"] = str(UUID(int=self.choice.getrandbits(128)))
        copies = self.choice.randint(1, 5)
        at_once = self.choice.random() < 0.5
        # A client that goes before its answer leaves a request behind that may be stored after its next one; with a
        # key that has been used by then, it is stored no more.
        sending = [self._send(parameters, body, headers, cut=keyed and i > 0) for i in range(copies)]
        all_heard = await asyncio.gather(*sending) if at_once else [await one for one in sending]
        heard = [one.answer for one in all_heard if one.answer is not None]
        self.counts["posts"] += 1
        self.counts["repeats"] += copies - 1
        exact = symbol != self.shared and (keyed or not any(one.doubtful for one in all_heard))
        self._judge(f"{conflict} of {symbol}", heard, expected, keyed=keyed, exact=exact)
        if keyed and expected is not None and heard:
            self.later.append(Sent(parameters, body, headers, heard[0].content))

    def _apply(self, symbol: str, conflict: str, rows: list[tuple[int, dict[str, int]]]) -> dict[str, int] | None:
        """Tell the model; what the receipt has to count, None for a refusal."""
        counts = {"inserted": 0, "updated": 0, "unchanged": 0}
        if conflict == "error" and any((symbol, at) in self.table for at, _ in rows):
            return None
        for at, values in rows:
            new = _row([values.get(name) for name in FIELDS])
            old = self.table.get((symbol, at))
            if old is None:
                result = "inserted"
            elif conflict == "ignore":
                new, result = old, "unchanged"
            else:
                if conflict == "merge":
                    new = _row([o if n is None else n for n, o in zip(new, old, strict=True)])
                result = "unchanged" if new == old else "updated"
            counts[result] += 1
            self.table[symbol, at] = new
        return counts

    async def _send(self, parameters: dict[str, str], body: bytes, headers: dict[str, str], *, cut: bool) -> Heard:
        """Send once, again while that may help; with `cut` the client may go before it has an answer."""
        deadline = time.monotonic() + _TIMEOUT
        doubtful = False
        hang_up = cut and self.choice.random() < 0.1
        while time.monotonic() < deadline:
            try:
                asked = self.http.post("/v1/quotes", params=parameters, content=body, headers=headers)
                answer = await (asyncio.wait_for(asked, self.choice.uniform(0, 0.01)) if hang_up else asked)
            except TimeoutError:
                self.counts["hung up"] += 1
                return Heard(None, doubtful=True)
            except httpx.TransportError:
                self.counts["connection lost"] += 1
                doubtful = True
                await asyncio.sleep(_PAUSE)
                continue
            if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE or code_of(answer) == "idempotency-key-in-use":
                self.counts[code_of(answer)] += 1
                doubtful |= code_of(answer) == UNKNOWN
                await asyncio.sleep(_PAUSE)
                continue
            return Heard(answer, doubtful)
        self._complain(f"no answer within {_TIMEOUT:g} s")
        return Heard(None, doubtful=True)

    def _judge(
        self, what: str, answers: list[httpx.Response], expected: dict[str, int] | None, *, keyed: bool, exact: bool
    ) -> None:
        wanted = 409 if expected is None else 200
        if wrong := [answer for answer in answers if answer.status_code != wanted]:
            self._complain(f"{what}: {wrong[0].status_code} instead of {wanted}: {wrong[0].text[:200]}")
            return
        if expected is None:
            return
        if keyed and len({answer.content for answer in answers}) > 1:
            self._complain(f"{what}: the receipts of one key differ")
        if not exact:
            return
        # Of all the copies one stores, and for the others its rows are unchanged; of a key there is one receipt.
        receipts = [answer.json() for answer in (answers[:1] if keyed else answers)]
        found = {name: sum(receipt[name] for receipt in receipts) for name in expected}
        found["unchanged"] -= (len(receipts) - 1) * sum(expected.values())
        self.counts["receipts reckoned"] += 1
        if found != expected:
            self._complain(f"{what}: {found} instead of {expected}")

    async def _again(self) -> None:
        """A request that was answered some time ago; whatever has been stored since stays."""
        sent = self.choice.choice(self.later)
        answer = (await self._send(sent.parameters, sent.body, sent.headers, cut=False)).answer
        self.counts["repeats"] += 1
        if answer is None:
            return
        if answer.content != sent.receipt or answer.headers.get("idempotency-replayed") != "true":
            self._complain(f"a late repetition got {answer.status_code}: {answer.text[:200]}")

    async def _delete(self) -> None:
        symbol = self.choice.choice(self.symbols)
        low, high = sorted(self.choice.sample(range(_TIMES + 1), 2))
        span = range(self.start + 1000 * low, self.start + 1000 * high, 1000)
        doomed = [at for at in span if (symbol, at) in self.table]
        for at in doomed:
            del self.table[symbol, at]
        parameters = {"symbol": symbol, "start": _rfc3339(span.start), "end": _rfc3339(span.stop)}
        sent = self.choice.randint(1, 3)
        deleted = [await self._delete_once(parameters) for _ in range(sent)]
        self.counts["deletes"] += sent
        if None not in deleted and sum(filter(None, deleted)) != len(doomed):
            self._complain(f"{deleted} quotes deleted instead of {len(doomed)}")

    async def _delete_once(self, parameters: dict[str, str]) -> int | None:
        """How many quotes were deleted; None if nobody knows, because an answer was lost."""
        deadline = time.monotonic() + _TIMEOUT
        doubtful = False
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                answer = await self.http.delete(
                    "/v1/quotes", params=parameters, headers={"authorization": f"Bearer {_TOKEN}"}
                )
                if answer.status_code == httpx.codes.OK:
                    return None if doubtful else int(answer.json()["deleted"])
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    self._complain(f"a deletion got {answer.status_code}: {answer.text[:200]}")
                    return 0
            self.counts["connection lost"] += 1
            doubtful = True
            await asyncio.sleep(_PAUSE)
        self._complain(f"no answer to a deletion within {_TIMEOUT:g} s")
        return 0

    def _complain(self, sentence: str) -> None:
        if len(self.report.broken) < 10:
            self.report.broken.append(sentence)


def _row(values: list[int | None]) -> Row:
    price, bid, ask, volume = values
    return price, bid, ask, volume


def _rfc3339(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds / 1000))


async def repeats(directory: Path, *, operations: int, kills: int, seed: int) -> Report:
    """`operations` requests of several clients, the service killed now and then; the table is the model."""
    report = Report("exactly once")
    counts: Counter[str] = Counter()
    start = days_ago(3)
    shared = random_symbol()
    environment = QUIET | {"QUOTES_ADMIN_TOKEN": _TOKEN}
    began = time.monotonic()
    with ExitStack() as stack:
        service = Service(directory / "service", environment, workers=2)
        stack.enter_context(ended(service))
        await asyncio.to_thread(service.start)
        await asyncio.to_thread(service.wait_ready)
        async with httpx.AsyncClient(base_url=service.url, timeout=_TIMEOUT, trust_env=False) as http:
            clients = [
                Client(http, n, shared, start, random.Random(1000 * seed + n), report, counts) for n in range(_CLIENTS)
            ]

            def done() -> int:
                return counts["posts"] + counts["repeats"] + counts["deletes"]

            def reached(due: float) -> bool:
                return done() >= due

            async def work(client: Client) -> None:
                while done() < operations and not report.broken:
                    await client.step()

            async def kill() -> None:
                for due in (operations * (turn + 1) / (kills + 1) for turn in range(kills)):
                    await until(partial(reached, due))
                    await asyncio.to_thread(service.kill)
                    service.start()
                    counts["kills"] += 1

            killer = asyncio.create_task(kill())
            try:
                await asyncio.gather(*(work(client) for client in clients))
            finally:
                killer.cancel()
                await asyncio.gather(killer, return_exceptions=True)
        differing = await _differences(embedded.url(service.directory / "data"), clients, shared)
    report.require(not differing, f"{differing} rows differ from the model")
    report.figures = {
        "operations": done(),
        "rows that differ": differing,
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        **counts,
    }
    return report


async def _differences(url: str, clients: list[Client], shared: str) -> int:
    """Rows that the store has and the model has not, and the other way round."""
    expected: dict[tuple[str, int], Any] = {}
    for client in clients:
        for key, row in client.table.items():
            # Of the shared symbol each client knows its own field.
            known = expected.get(key, (None,) * len(FIELDS))
            expected[key] = tuple(k if r is None else r for r, k in zip(row, known, strict=True))
    symbols = [shared, *(symbol for client in clients for symbol in client.symbols)]
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            f"SELECT symbol, (extract(epoch FROM timestamp) * 1000)::bigint, {', '.join(FIELDS)}"
            " FROM quotes.real_time WHERE symbol = ANY($1)",
            symbols,
        )
    finally:
        await connection.close()
    stored = {(row[0], row[1]): tuple(_whole(value) for value in row[2:]) for row in rows}
    return len(set(stored.items()) ^ set(expected.items()))


def _whole(value: Decimal | None) -> int | None:
    return None if value is None else int(value)
