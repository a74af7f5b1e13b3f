"""The cheapest client there is: kept connections, requests encoded beforehand, answers looked at afterwards.

Invariant: a request is sent once, unless the service refused it as overloaded; then again when it says, and the wait
counts. Every answer that is no success ends the run.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, cast

import httptools

from benchmarks.side_by_side import BenchmarkError

HOST: Final = "127.0.0.1"
_ANSWER_TIMEOUT: Final = 120.0
_OVERLOADED: Final = 503
#: Time to open connections before the first request of a schedule is due.
_OPENING: Final = 0.2


def get(path: str) -> bytes:
    """The request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: application/json\r\n\r\n".encode()


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """The request that sends a body to a path."""
    kind = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}"
    return f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\n{kind}\r\n\r\n".encode() + body


class Refused(BenchmarkError):
    """An answer that is no success."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"The service answered {status}: {body[:500].decode(errors='replace')}")
        self.status = status


class HttpConnection:
    """A keep-alive connection on a blocking socket: whole requests in, whole bodies out, and next to no work."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Self:
        self._socket = socket.create_connection((HOST, self._port), timeout=_ANSWER_TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, request: bytes) -> bytes:
        """The body of the answer to a request.

        Raises:
            Refused: the answer is no success.
            BenchmarkError: there is none.
        """
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        self._socket.sendall(request)
        while not answer.complete:
            data = self._socket.recv(1 << 18)
            if not data:
                raise BenchmarkError("The service closed the connection before it answered.")
            parser.feed_data(data)
        body = b"".join(answer.parts)
        if parser.get_status_code() // 100 != 2:
            raise Refused(parser.get_status_code(), body)
        return body


class _Answer:
    """What the parser of an answer calls."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


@dataclass(slots=True)
class Sent:
    """What became of requests, in the order of their answers. Times are in seconds."""

    seconds: float = 0.0
    #: Since each was sent or, on a schedule, since it was due; and since the first one.
    latencies: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    #: How often the service answered that it is overloaded.
    refused: int = 0


async def send_all(port: int, requests: Iterable[bytes], clients: int) -> Sent:
    """Send requests over some connections, each its next one when the last was answered.

    Raises:
        BenchmarkError: an answer is no success, or a connection broke.
    """
    waiting = iter(requests)

    def next_one() -> tuple[float, bytes] | None:
        request = next(waiting, None)
        return None if request is None else (time.perf_counter(), request)

    run = _Run(next_one)
    run.complete = True
    return await run.over(port, clients)


async def send_on_schedule(port: int, requests: Sequence[bytes], per_second: float, connections: int) -> Sent:
    """Send requests when they are due, whether or not earlier ones were answered, as far as there are connections.

    A latency begins when the request was due, so that what waits behind a slow answer is counted.

    Raises:
        BenchmarkError: an answer is no success, or a connection broke.
    """
    began = time.perf_counter() + _OPENING
    upcoming = 0

    def next_one() -> tuple[float, bytes] | None:
        nonlocal upcoming
        due = began + upcoming / per_second
        if upcoming == len(requests) or time.perf_counter() < due:
            return None
        upcoming += 1
        return due, requests[upcoming - 1]

    run = _Run(next_one)

    async def offer() -> None:
        for number in range(len(requests)):
            # A timer rounds to milliseconds, and what is not due yet would wait for the next one.
            while (wait := began + number / per_second - time.perf_counter()) > 0:  # noqa: ASYNC110  no event, a time
                await asyncio.sleep(wait)
            run.offer()
        run.complete = True  # all are due: what is not sent yet is sent when a connection is free
        run.offer()

    offering = asyncio.create_task(offer())
    try:
        return await run.over(port, connections)
    finally:
        offering.cancel()


class _Run:
    """The requests of one run, from a source that may have none at the moment; `complete` once it never has again."""

    def __init__(self, next_one: Callable[[], tuple[float, bytes] | None]) -> None:
        self.complete = False
        self.sent = Sent()
        self._next_one = next_one
        self._idle: list[_Connection] = []
        self._in_flight = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def over(self, port: int, connections: int) -> Sent:
        """Open the connections, and run."""
        loop = asyncio.get_running_loop()
        opened: list[_Connection] = []
        try:
            for _ in range(connections):
                _, connection = await loop.create_connection(lambda: _Connection(self), HOST, port)
                opened.append(connection)
            self._idle += opened
            self._began = time.perf_counter()
            self.offer()
            await self._done
        finally:
            for connection in opened:
                connection.close()
        self.sent.seconds = max(self.sent.ended, default=0.0)
        return self.sent

    def offer(self) -> None:
        """Give idle connections what there is."""
        while self._idle and (found := self._next_one()) is not None:
            self._in_flight += 1
            due, request = found
            self._idle.pop().send(request, due)
        if self.complete and not self._in_flight and not self._done.done():
            self._done.set_result(None)

    def answered(self, connection: "_Connection", due: float, body: bytes) -> None:
        now = time.perf_counter()
        self.sent.latencies.append(now - due)
        self.sent.ended.append(now - self._began)
        self.sent.answers.append(body)
        self._in_flight -= 1
        self._idle.append(connection)
        self.offer()

    def failed(self, error: BenchmarkError) -> None:
        if not self._done.done():
            self._done.set_exception(error)


class _Connection(asyncio.Protocol):
    """One kept connection with one request in flight at most."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._retry_after = 1.0
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._run.failed(BenchmarkError(f"The service closed a connection: {exc}"))

    def close(self) -> None:
        self._closing = True
        self._transport.close()

    def send(self, request: bytes, due: float) -> None:
        self._request, self._due = request, due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = float(value)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        body, self._parts = b"".join(self._parts), []
        status = self._parser.get_status_code()
        if status // 100 == 2:
            self._run.answered(self, self._due, body)
        elif status == _OVERLOADED:
            self._run.sent.refused += 1
            asyncio.get_running_loop().call_later(self._retry_after, self.send, self._request, self._due)
        else:
            self._run.failed(Refused(status, body))
