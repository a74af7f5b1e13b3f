"""The server's end of a connection: what stands between the socket and the routes.

uvicorn's protocol over httptools, which takes half of the CPU of its other one, over h11, for a single quote; with what
it lacks against clients that are hostile, careless or gone.

Invariant: a request gets one answer, from its own bytes alone. Whatever is no request, or comes too slowly or without
end, gets a refusal and a closed connection; so does nobody wait for ever, and what is held for a connection is bounded.
What a request sends in one piece is looked at without a timer, and costs 2 us more than without this.
"""

import asyncio
import secrets
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from ipaddress import ip_address, ip_network
from typing import Any, Final

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import metrics
from app.api.access import GONE
from app.api.problems import MEDIA_TYPE
from app.api.shares import connections, principal, starts, unsent
from app.logs import Logger

log = Logger("app.access")

#: Bytes of a request line with its headers, of an extension of a chunk, of trailers.
HEAD_BYTES: Final = 64 * 1024
#: Headers of a request, or trailers.
HEADERS: Final = 100
#: Bytes that are parsed at a time. They may be 4,000 headers, which take 6 ms.
_PIECE: Final = 16 * 1024
#: Seconds from the first byte of a head to its last, and from a new connection to its first request.
HEAD_SECONDS: Final = 10.0
#: Requests that may wait on one connection for the answer of the one before.
PIPELINED: Final = 64
#: Seconds in which what is left of a body is thrown away, once its request has an answer.
_LEFTOVER: Final = 30.0
#: Seconds in which a refusal may be read. Closed at once, the connection would be reset under it.
_LINGER: Final = 2.0
#: Seconds between two looks at a client that does not take its answer, and bytes that it has to take meanwhile. The
#: kernel asks for more only when a third of its buffer is free, which may be a megabyte.
TAKING_SECONDS: Final = 60.0
_TAKEN: Final = 256 * 1024
_VERSIONS: Final = frozenset({"1.1", "1.0"})
#: Headers that have one value; the parser itself sees to Content-Length.
_ONCE: Final = frozenset({b"host", b"content-type", b"content-encoding", b"authorization", b"transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is answered to bytes that never become a request of the application."""

    status: int
    code: str
    title: str
    detail: str
    retry_after: int | None = None

    def response(self, request_id: str) -> bytes:
        """The whole response, which announces that the connection ends."""
        problem = {
            "type": f"urn:problem:opa-quotes:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "instance": "",  # whose path may be what is wrong
            "request_id": request_id,
            "errors": [],
        }
        content = msgspec.json.encode(problem)
        later = "" if self.retry_after is None else f"retry-after: {self.retry_after}\r\n"
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
            f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(content)}\r\n"
            f"x-request-id: {request_id}\r\n{later}connection: close\r\n\r\n"
        )
        return head.encode() + content


MALFORMED: Final = Refusal(400, "malformed-request", "Malformed request", "This is not a request of HTTP/1.1 or 1.0.")
#: What could mean one thing to a proxy and another one here.
AMBIGUOUS: Final = Refusal(
    400,
    "malformed-request",
    "Malformed request",
    "A request of HTTP/1.1 has one Host, no header of one value twice, and no transfer coding but chunked.",
)
HEAD_LATE: Final = Refusal(
    408, "request-timeout", "Request timed out", f"A request line with its headers arrives within {HEAD_SECONDS:g} s."
)
URL_TOO_LONG: Final = Refusal(
    414, "url-too-long", "URL too long", f"A request line with its headers has at most {HEAD_BYTES} bytes."
)
HEADERS_TOO_LARGE: Final = Refusal(
    431,
    "headers-too-large",
    "Headers too large",
    f"A request line with its headers has at most {HEAD_BYTES} bytes and {HEADERS} headers.",
)
NO_TUNNEL: Final = Refusal(405, "method-not-allowed", "Method not allowed", "This service is no proxy.")
TOO_MANY: Final = Refusal(
    503, "overloaded", "Too many connections", "This client has too many connections; close some, or use them.", 1
)


@lru_cache(maxsize=4096)
def _is_proxy(host: str, trusted: str) -> bool:
    """Whether what comes from an address stands for many clients, by `trusted_proxies`."""
    if trusted in {"*", "none"}:
        return trusted == "*"
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in ip_network(part.strip()) for part in trusted.split(","))


class _Refused(Exception):
    """Raised within the parser, which then stops."""


class Connection(HttpToolsProtocol):
    """One connection.

    The application finds in `scope["state"]`: `ended`, the status of a request that can have no answer of its own any
    more, 499 when its task was cancelled because the client has gone; `peer`, whose share of answers that are not taken
    yet its answer takes.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._principal = ""
        self._counted = False  # among the connections of its principal
        self._in_head = False  # some bytes of a head have come, not all
        self._in_body = False  # a head has come, not all of its body
        self._came = False  # the segment has ended a head or a message, or brought bytes of a body
        self._since = 0  # bytes since the last segment that did
        self._segment = 0
        self._offered = False  # the head that is being read offers another protocol
        self._reason = MALFORMED  # why the parser was stopped
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None  # of a head, or of the rest of a body that nobody wants
        self._running: RequestResponseCycle | None = None  # `cycle` is the last that has come
        self._task: asyncio.Task[None] | None = None
        self._unsent = self._left = 0
        self._look: asyncio.TimerHandle | None = None

    # --- the connection ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the first request."""
        super().connection_made(transport)
        self._principal = principal(self.client)
        starts.connected(self._principal, self.loop)
        if not _is_proxy(self.client[0] if self.client else "", str(self.config.forwarded_allow_ips)):
            if not connections.take(self._principal, 1):
                self._refused = True
                self._note(TOO_MANY, request_id := secrets.token_hex(8))
                self.transport.write(TOO_MANY.response(request_id))
                self.transport.close()
                return
            self._counted = True
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what is done for a client that has gone."""
        super().connection_lost(exc)
        if self._counted:
            connections.count(self._principal, -1)
        self._unset_keepalive_if_required()
        self._quiet()
        self._taken()
        if self._running and self._task and not (self._running.response_complete or self._task.done()):
            self._running.disconnected = True
            self._running.scope["state"]["ended"] = GONE
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse what has come, a little at a time, so that what is too much is known before much is done for it."""
        if len(data) <= _PIECE:
            self._feed(data)
            return
        view = memoryview(data)
        for start in range(0, len(data), _PIECE):
            self._feed(view[start : start + _PIECE])

    def _feed(self, data: bytes | memoryview) -> None:
        """Parse bytes, and see that they get on."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._segment = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            try:
                self._go_on(memoryview(data), upgrade.args[0])
            except httptools.HttpParserError:
                self._refuse(self._reason)
                return
        except httptools.HttpParserError:
            self._refuse(self._reason)
            return
        answered = self.cycle is None or self.cycle.response_complete
        if self._came:
            self._came = False
            self._since = 0
            waits = self._in_head or (answered and self._in_body)
        else:
            self._since += len(data)
            # Some of a chunk's extension, or of trailers, may be in the segment before, and in the one after.
            if self._since > HEAD_BYTES - (0 if self._in_head else 2 * _PIECE) or len(self.headers or ()) > HEADERS:
                self._refuse(self._too_large() if self._in_head else MALFORMED)
                return
            waits = self._in_head or answered
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(_LEFTOVER if self._in_body else HEAD_SECONDS, self._late)

    def _go_on(self, data: memoryview, offset: int) -> None:
        """Read a request that offers another protocol as if it did not, as RFC 9110 allows (section 7.8).

        The parser stops behind the head, where it expects no body. Another one is given the head without the offer,
        then what follows.
        """
        while True:
            head = [
                b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            ]
            head += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            self._offered = False
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as the server has it
            self._segment = 0  # the head was measured
            self.parser.feed_data(b"".join([*head, b"\r\n"]))
            data = data[offset:]
            self._segment = len(data)
            try:
                if data:
                    self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                offset = upgrade.args[0]
            else:
                return

    def _late(self) -> None:
        """End a connection on which nothing more has come in time."""
        self._deadline = None
        if self._in_head:
            self._refuse(HEAD_LATE)
        elif not self.transport.is_closing():
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        """End a connection on which no further request has come."""
        if not self.transport.is_closing():
            self._close()

    def _close(self) -> None:
        """End the connection; what its client has not taken by now, it does not want."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _quiet(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # --- what the parser finds ---

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """Begin a request, unless its head is refused."""
        if self._since + self._segment > HEAD_BYTES and self._head_size() > HEAD_BYTES:
            self._raise(self._too_large())
        if len(self.headers) > HEADERS:
            self._raise(HEADERS_TOO_LARGE)
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._raise(NO_TUNNEL)
            self._offered = True
            return
        if self.parser.get_http_version() not in _VERSIONS or len(self.pipeline) >= PIPELINED:
            self._raise(MALFORMED)
        if self._is_ambiguous():
            self._raise(AMBIGUOUS)
        self.scope["state"]["peer"] = self._principal
        super().on_headers_complete()
        self.headers = []  # trailers are no headers
        self._in_head, self._in_body, self._came = False, True, True
        if self._deadline is not None:
            self._quiet()

    def on_body(self, body: bytes) -> None:
        """Take bytes of a body."""
        self._came = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if self._offered:  # not this one, of which the parser sees only the head
            return
        self._in_body, self._came = False, True
        super().on_message_complete()
        if self.cycle.response_complete:  # it had its answer before
            self._quiet()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _is_ambiguous(self) -> bool:
        single = [header for header in self.headers if header[0] in _ONCE]
        names = {name for name, _ in single}
        if len(names) < len(single) or (b"host" not in names and self.parser.get_http_version() == "1.1"):
            return True
        return b"transfer-encoding" in names and (b"transfer-encoding", b"chunked") not in [
            (name, value.strip().lower()) for name, value in single
        ]

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _too_large(self) -> Refusal:
        return URL_TOO_LONG if len(self.url) > HEAD_BYTES // 2 else HEADERS_TOO_LARGE

    def _raise(self, refusal: Refusal) -> None:
        self._reason = refusal
        raise _Refused

    # --- requests ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.flow.write_paused:  # an answer waits for its client already
            self.flow.pause_reading()
            self.pipeline.append((cycle, app))
            return
        self._running = cycle
        self._task = None
        starts.begin(self._principal, partial(self._begin, cycle, app), self.loop)

    def _begin(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.disconnected:
            return
        self._task = self.loop.create_task(cycle.run_asgi(app))
        self._task.add_done_callback(self.tasks.discard)
        self.tasks.add(self._task)

    def on_response_complete(self) -> None:
        """Go on with the next request, or see that the last answer is taken."""
        if self.pipeline and not unsent.leaves(self._principal, half=True):
            self.pipeline.clear()
            self.transport.close()
        super().on_response_complete()
        if self._look is None and self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch()

    def _refuse(self, refusal: Refusal) -> None:
        """Take no more from this client, and answer what it has sent before."""
        self._refused = True
        self._quiet()
        if self.transport.is_closing():
            return
        last: Any = self.cycle
        if last is None or last.response_complete:
            if self._in_body:  # of a request that has its answer
                self.transport.close()
                return
        elif not self._in_body:  # requests that came whole have their answers first
            last.keep_alive = False
            return
        elif self.pipeline:
            self.pipeline.popleft()  # the last request, of which this is the body
            last = self.pipeline[0][0] if self.pipeline else self._running
            last.keep_alive = False
            if last.response_complete:  # and waits for its client
                self.transport.close()
            return
        elif last.response_started:
            self.transport.close()
            return
        self._answer(refusal)

    def _answer(self, refusal: Refusal) -> None:
        """Answer in place of the application, and end the connection when the client has read it."""
        if self._in_body:
            state = self.cycle.scope["state"]
            request_id = state.get("request_id", "")
            state["ended"] = refusal.status
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        else:
            self._note(refusal, request_id := secrets.token_hex(8))
        self.transport.write(refusal.response(request_id))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._deadline = self.loop.call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()

    def _note(self, refusal: Refusal, request_id: str) -> None:
        metrics.HTTP_REQUESTS.labels("none", "other", refusal.status).inc()
        log.info("request refused", status=refusal.status, problem=refusal.code, request_id=request_id)

    # --- answers that are not taken ---

    def pause_writing(self) -> None:
        """Note that the client takes its answer more slowly than it is made."""
        super().pause_writing()
        self._watch()
        if not unsent.leaves(self._principal):
            log.info("answer dropped", reason="the client takes none of its answers")
            self.transport.abort()

    def resume_writing(self) -> None:
        """Note that the client has taken most of its answer."""
        super().resume_writing()
        if self.transport.is_closing():
            return
        self._taken()
        if self.pipeline and self._running and self._running.response_complete:
            self._start_asgi_task(*self.pipeline.pop())

    def _watch(self) -> None:
        self._left = self.transport.get_write_buffer_size()
        self._count(max(self._unsent, self._left))  # an answer is held until all of it is taken
        self._look = self.loop.call_later(TAKING_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        left = self.transport.get_write_buffer_size()
        if left > max(self._left - _TAKEN, 0):
            log.info("answer dropped", reason="the client does not take it")
            self.transport.abort()
        elif left:
            self._watch()
        else:
            self._count(0)

    def _count(self, nbytes: int) -> None:
        unsent.count(self._principal, nbytes - self._unsent)
        self._unsent = nbytes

    def _taken(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._count(0)
