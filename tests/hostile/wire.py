"""Raw HTTP: a client that keeps to no rule, and all that comes back.

Invariant: every exchange ends within its patience, and is noted with what it was: answered, lost or without an answer.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from tests.chaos.recording import LASTING

#: Wrong answers that are listed; all are counted.
_LISTED: Final = 12
#: Longest wait for a service that is started again, and how often it is waited for.
_RESTART: Final = 60.0
_RESTARTS: Final = 5
_BODYLESS: Final = frozenset({204, 304})

Reading = Literal["all", "none", "part", "slow"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one client does on one connection.

    Attributes:
        label: what names it in a report.
        sends: bytes to send, and seconds to wait, in turn.
        expect: statuses that are right; else every one below 500, a 503 that may pass, and a closed connection.
        answers: the most answers that may come.
        reads: all that comes, nothing, the first bytes, or a little at a time.
        leaves: whether it breaks the connection off instead of closing it.
        bodyless: whether answers have no body, as those to HEAD.
        linger: seconds to wait for more answers than one.
        patience: seconds until it counts as one without an answer.
    """

    label: str
    sends: Sequence[bytes | float]
    expect: frozenset[int] = frozenset()
    answers: int = 1
    reads: Reading = "all"
    leaves: bool = False
    bodyless: bool = False
    linger: float = 0.0
    patience: float = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; its headers by lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of a problem document, if it is one."""
        with suppress(msgspec.MsgspecError):
            if self.headers.get("content-type") == "application/problem+json":
                return str(msgspec.json.decode(self.body, type=dict[str, Any]).get("code"))
        return ""

    @property
    def fine(self) -> bool:
        """Whether a client may get it: no failure of the service but a 503 that says what it is."""
        return self.status < 500 or (self.status == 503 and ("retry-after" in self.headers or self.code in LASTING))


@dataclass(slots=True)
class Outcome:
    """What became of exchanges.

    Attributes:
        answers: how often each answer or failure came.
        wrong: the first that broke a promise, of `wrong_total`.
        lost: the last whose connection the service broke off.
        figures: what an attack has found besides.
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    wrong_total: int = 0
    lost: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)

    def complain(self, sentence: str) -> None:
        """Note a promise that was not kept."""
        self.wrong_total += 1
        if len(self.wrong) < _LISTED:
            self.wrong.append(sentence)

    def judge(self, exchange: Exchange, answers: Sequence[Answer], failure: str) -> bool:
        """Note what came of an exchange; whether all is well."""
        before = self.wrong_total
        for answer in answers:
            self.answers[f"{answer.status} {answer.code}".rstrip()] += 1
            if not answer.fine:
                self.complain(f"{exchange.label}: {answer.status} {answer.code or answer.body[:80]!r}")
        if failure and not answers:
            self.answers[failure] += 1
        if failure == "lost":
            self.lost = [*self.lost, exchange.label][-_LISTED:]
        if failure in {"no answer", "no HTTP"}:
            self.complain(f"{exchange.label}: {failure} within {exchange.patience:g} s")
        if len(answers) > exchange.answers:
            statuses = ", ".join(str(answer.status) for answer in answers)
            self.complain(
                f"{exchange.label}: {len(answers)} answers ({statuses}), at most {exchange.answers} are right"
            )
        if exchange.expect and (not answers or answers[0].status not in exchange.expect):
            came = f"{answers[0].status} {answers[0].code}" if answers else failure
            self.complain(f"{exchange.label}: {came}, {' or '.join(map(str, sorted(exchange.expect)))} is right")
        return self.wrong_total == before


def request(
    method: str,
    target: str,
    body: bytes = b"",
    *,
    headers: Mapping[str, str] | None = None,
    close: bool = True,
    length: int | None = None,
) -> bytes:
    """A request as bytes; `length` is what it says of its body where that is not the truth."""
    lines = [f"{method} {target} HTTP/1.1", "Host: hostile", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    if body or length is not None:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


async def read_answer(reader: asyncio.StreamReader, *, bodyless: bool = False) -> Answer | None:
    """The next answer; None if the connection ends before it.

    Raises:
        ValueError: what comes is no HTTP.
        asyncio.IncompleteReadError: it breaks off within.
    """
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status = first.split(" ")[:2]
        if not version.startswith("HTTP/1."):
            raise ValueError(first)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if int(status) >= 200:  # before it come those that only say to go on
            break
    if bodyless or int(status) in _BODYLESS:
        body = b""
    elif headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        body = b"".join(parts)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    return Answer(int(status), headers, body)


async def connect(
    url: str, source: str = "127.0.0.4", limit: int = 2**20
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection from an address of this machine, so that clients are told apart.

    It is another one than the service's: from there, while nobody listens, a connection to itself would take the port.
    """
    parts = urlsplit(url)
    return await asyncio.open_connection(
        parts.hostname, parts.port, limit=limit, local_addr=(source, 0), happy_eyeballs_delay=None
    )


async def _send(writer: asyncio.StreamWriter, sends: Sequence[bytes | float]) -> None:
    with suppress(OSError):  # what has come back until then counts
        for part in sends:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)


async def _receive(exchange: Exchange, reader: asyncio.StreamReader, found: list[Answer]) -> None:
    match exchange.reads:
        case "none":
            return
        case "part":
            await reader.read(100)
            return
        case "slow":
            for _ in range(20):
                await reader.read(1000)
                await asyncio.sleep(0.5)
            return
    while True:
        try:
            async with asyncio.timeout(exchange.linger if found else None):
                answer = await read_answer(reader, bodyless=exchange.bodyless)
        except TimeoutError:
            return
        if answer is None:
            return
        found.append(answer)
        if not exchange.linger:
            return


async def carry_out(exchange: Exchange, url: str) -> tuple[list[Answer], str]:
    """Do what the client does; the answers, and how it failed where there is none.

    Raises:
        ConnectionError: nobody listens.
    """
    found: list[Answer] = []
    failure = ""
    reader, writer = await connect(url, limit=1 if exchange.reads == "none" else 2**20)
    sending = asyncio.create_task(_send(writer, exchange.sends))
    try:
        async with asyncio.timeout(exchange.patience):
            if exchange.reads != "all":
                await sending
            await _receive(exchange, reader, found)
            if exchange.reads == "all" and not found:
                failure = "closed"
            elif exchange.reads != "all":
                failure = "left"
    except TimeoutError:
        failure = "no answer" if exchange.reads == "all" else "left"
    except (OSError, asyncio.IncompleteReadError):
        failure = "lost"
    except (ValueError, asyncio.LimitOverrunError):
        failure = "no HTTP"
    finally:
        sending.cancel()
        if exchange.leaves or not sending.done():
            writer.transport.abort()
        writer.close()
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(sending, return_exceptions=True)
    return found, failure


def _again(exchanges: Sequence[Exchange], until: float) -> Iterator[Exchange]:
    """All of them, and again until a moment of the monotonic clock."""
    yield from exchanges
    while True:
        for exchange in exchanges:
            if time.monotonic() >= until:
                return
            yield exchange


@dataclass
class Attackers:
    """Carries out exchanges, `at_once` of them; waits for a service that is started again, and gives up at last."""

    url: str
    at_once: int
    keep: Path | None = None
    outcome: Outcome = field(default_factory=Outcome)
    _restarts: int = 0
    _waiting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, exchanges: Sequence[Exchange], seconds: float) -> Outcome:
        """Carry out all of them, and again until `seconds` have passed."""
        until = time.monotonic() + seconds
        queue = _again(exchanges, until)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.at_once, len(exchanges))):
                group.create_task(self._one_by_one(queue))
        if self._restarts >= _RESTARTS:
            self.outcome.complain(f"given up after {_RESTARTS} restarts")
        return self.outcome

    async def _one_by_one(self, queue: Iterator[Exchange]) -> None:
        for exchange in queue:
            if self._restarts >= _RESTARTS:
                return
            try:
                answers, failure = await carry_out(exchange, self.url)
            except OSError:
                self.outcome.answers["not connected"] += 1
                await self._wait()
                continue
            fine = self.outcome.judge(exchange, answers, failure)
            if self.keep is not None and not (fine and failure != "lost"):
                self._save(exchange)

    async def _wait(self) -> None:
        """Until the service listens again; one waits, for all."""
        async with self._waiting:
            deadline = time.monotonic() + _RESTART
            waited = False
            while time.monotonic() < deadline and self._restarts < _RESTARTS:
                try:
                    _, writer = await connect(self.url)
                except OSError:
                    waited = True
                    await asyncio.sleep(0.2)
                else:
                    writer.close()
                    break
            self._restarts += waited

    def _save(self, exchange: Exchange) -> None:
        assert self.keep is not None
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in exchange.label)[:150]
        content = b"".join(part for part in exchange.sends if isinstance(part, bytes))
        (self.keep / f"{name}.http").write_bytes(content[: 2**24])
