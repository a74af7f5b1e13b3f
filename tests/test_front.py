"""What stands between the socket and the routes: bytes that are no request, too many of them, too few, too late."""

import asyncio
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import uvicorn
from fastapi import Request
from uvicorn.server import Server

from app import server
from app.api import shares
from app.api.deps import LISTS, require_admin
from app.db import embedded
from app.errors import Forbidden
from app.server import Connection
from app.settings import Settings
from tests.conftest import Serve, Service, random_symbol
from tests.test_service import count

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


async def answer(send: Send, content: object, status: int = 200) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    await send({"type": "http.response.body", "body": body})


async def read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += message["body"]
        more = message["more_body"]
    return body


async def echo(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answer with what has come."""
    body = await read(receive)
    await answer(
        send,
        {
            "method": scope["method"],
            "path": scope["path"],
            "body": body.decode("latin-1"),
            "headers": [name.decode() for name, _ in scope["headers"]],
        },
    )


@asynccontextmanager
async def listening(app: App) -> AsyncIterator[int]:
    """A port on which an application is served by connections of the service's kind."""

    async def served(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except (asyncio.CancelledError, ConnectionError):  # as the service's middleware does
            assert "ended" in scope["state"]

    config = uvicorn.Config(served, http=Connection, ws="none", lifespan="off", proxy_headers=False, log_config=None)
    config.load()
    state = Server(config).server_state
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await until(lambda: not (state.connections or state.tasks))


async def until(reached: Callable[[], object]) -> None:
    """Wait for something that tells nobody."""
    async with asyncio.timeout(30):
        while not reached():  # noqa: ASYNC110  there is no event
            await asyncio.sleep(0.01)


async def talk(port: int, *segments: bytes, pause: float = 0.0, patience: float = 0.3) -> tuple[bytes, bool]:
    """Send segments; all that came back until nothing more did for a while, and whether the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got, closed, last = b"", False, asyncio.get_running_loop().time()

    async def collect() -> None:
        nonlocal got, closed, last
        with suppress(ConnectionError):
            while part := await reader.read(65536):
                got += part
                last = asyncio.get_running_loop().time()
        closed = True

    collecting = asyncio.create_task(collect())
    try:
        with suppress(ConnectionError):
            for segment in segments:
                writer.write(segment)
                await writer.drain()
                await asyncio.sleep(pause)
        last = asyncio.get_running_loop().time()
        await until(lambda: closed or asyncio.get_running_loop().time() > last + patience)
        return got, closed
    finally:
        collecting.cancel()
        writer.close()


STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def statuses(got: bytes) -> list[int]:
    return [int(status) for status in STATUS.findall(got)]


def contents(got: bytes) -> list[dict[str, Any]]:
    """The JSON of each answer."""
    found = []
    while got:
        head, _, rest = got.partition(b"\r\n\r\n")
        match = re.search(rb"content-length: (\d+)", head)
        assert match is not None
        found.append(json.loads(rest[: int(match[1])]))
        got = rest[int(match[1]) :]
    return found


# --- another protocol that is offered ---

OFFERS = {
    "JDK": "Connection: Upgrade, HTTP2-Settings\r\nContent-Type: text/csv\r\nHost: h\r\n"
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\nUser-Agent: Java-http-client/21\r\n",
    "curl": "Host: h\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nContent-Type: text/csv\r\n",
    "websocket": "Host: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\nX-Empty:\r\n",
}
INNER = b"GET /inner HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.parametrize("pieces", ["one segment", "head, body", "bytes"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS)
async def test_an_offered_protocol_is_ignored_and_the_body_is_the_requests(
    offer: str, framing: str, pieces: str
) -> None:
    head = f"POST /p HTTP/1.1\r\n{OFFERS[offer]}"
    if framing == "length":
        head, body = f"{head}Content-Length: {len(INNER)}\r\n\r\n", INNER
    else:
        head, body = f"{head}Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
    whole = head.encode() + body + b"GET /next HTTP/1.1\r\nHost: h\r\n\r\n"
    segments = {
        "one segment": [whole],
        "head, body": [head.encode(), whole[len(head) :]],
        "bytes": [whole[i : i + 1] for i in range(len(whole))],
    }[pieces]
    async with listening(echo) as port:
        got, closed = await talk(port, *segments)
    first, second = contents(got)
    assert (first["method"], first["path"], first["body"].encode()) == ("POST", "/p", INNER)
    assert "upgrade" not in first["headers"]
    assert "host" in first["headers"]
    assert (second["path"], closed) == ("/next", False)


async def test_many_offers_on_one_connection_have_an_answer_each() -> None:
    post = f"POST /p HTTP/1.1\r\n{OFFERS['curl']}Content-Length: 2\r\n\r\nab".encode()
    async with listening(echo) as port:
        got, closed = await talk(port, post * 10, post * 10)
    assert [content["body"] for content in contents(got)] == ["ab"] * 20
    assert not closed


@pytest.mark.parametrize("offer", ["", "Connection: Upgrade\r\nUpgrade: h2c\r\n"])
async def test_no_tunnel_is_opened(offer: str) -> None:
    async with listening(echo) as port:
        got, closed = await talk(port, f"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n{offer}\r\n".encode() + INNER)
    assert (statuses(got), closed) == ([405], True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
@pytest.mark.parametrize("body", ["as it is", "chunked"])
def test_curl_that_offers_http2_stores_its_quotes(service_url: str, body: str) -> None:
    symbol = random_symbol()
    quotes = json.dumps([{"symbol": symbol, "timestamp": "2026-11-02T14:30:00Z", "price": 1}])
    options = ["--header", "transfer-encoding: chunked"] if body == "chunked" else []
    done = subprocess.run(
        ["curl", "--silent", "--http2", "--max-time", "20",  # noqa: S607  wherever it is
         "--header", "content-type: application/json", *options,
         "--data-binary", quotes, f"{service_url}/v1/quotes"],
        check=False, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if done.returncode == 2:
        pytest.skip("this curl has no HTTP/2")
    assert json.loads(done.stdout)["inserted"] == 1
    assert count(service_url, symbol) == 1


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.util.*;

public class Post {
    public static void main(String[] given) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        var bodies = List.of(
            HttpRequest.BodyPublishers.ofString(given[1]),
            HttpRequest.BodyPublishers.ofInputStream(() -> new java.io.ByteArrayInputStream(given[1].getBytes())));
        for (var body : bodies) {
            var request = HttpRequest.newBuilder(URI.create(given[0])).header("content-type", "application/json");
            var answer = client.send(request.POST(body).build(), HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode());
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("java") is None, reason="java is not there")
def test_the_jdks_client_stores_its_quotes(service_url: str, tmp_path: Path) -> None:
    source = tmp_path / "Post.java"
    source.write_text(JAVA)
    symbol = random_symbol()
    quotes = json.dumps([{"symbol": symbol, "timestamp": "2026-11-02T14:30:00Z", "price": 1}])
    done = subprocess.run(
        ["java", str(source), f"{service_url}/v1/quotes", quotes],  # noqa: S607  wherever it is
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if "java.net.http" in done.stderr or "module not found" in done.stderr:
        pytest.skip("this java has no compiler or no HTTP client")
    assert done.stdout.split() == ["200", "200"], done.stderr
    assert count(service_url, symbol) == 1


# --- what is no request, or could be two ---

START = b"POST /p HTTP/1.1\r\nHost: h\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = {
    "a length and chunks": START + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": START + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": START + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    "a length twice": START + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde",
    "a list of lengths": START + b"Content-Length: 5, 5\r\n\r\nabcde",
    "a signed length": START + b"Content-Length: +5\r\n\r\nabcde",
    "a negative length": START + b"Content-Length: -5\r\n\r\nabcde",
    "a length in hex": START + b"Content-Length: 0x5\r\n\r\nabcde",
    "no length": START + b"Content-Length: \r\n\r\nabcde",
    "a huge length": START + b"Content-Length: 99999999999999999999999\r\n\r\nabcde",
    "a blank before the colon": START + b"Content-Length : 5\r\n\r\nabcde",
    "a folded header": START + b"X: a\r\n b\r\n\r\n",
    "a folded transfer coding": START + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "lines that end with LF": b"POST /p HTTP/1.1\nHost: h\nContent-Length: 1\n\na",
    "a header that ends with LF": START + b"X: a\nContent-Length: 1\r\n\r\na",
    "a header that ends with CR": START + b"X: a\rContent-Length: 1\r\n\r\na",
    "a head that ends with LF": START + b"Content-Length: 1\r\n\na",
    "a NUL": START + b"X: a\0b\r\n\r\n",
    "chunks that are not last": START + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "another transfer coding": START + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a misspelt transfer coding": START + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks twice": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a chunk's line that ends with LF": CHUNKED + b"1\na\r\n0\r\n\r\n",
    "a chunk in hex": CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
    "a negative chunk": CHUNKED + b"-1\r\na\r\n0\r\n\r\n",
    "a huge chunk": CHUNKED + b"fffffffffffffffffff\r\na\r\n0\r\n\r\n",
    "a chunk that is longer than it says": CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
    "HTTP/0.9": b"GET /p\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 by name": b"GET /p HTTP/2.0\r\nHost: h\r\n\r\n",
    "HTTP/1.2": b"GET /p HTTP/1.2\r\nHost: h\r\n\r\n",
    "a path that is not encoded": "GET /ä HTTP/1.1\r\nHost: h\r\n\r\n".encode(),
    "a blank in the path": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "no host": b"POST /p HTTP/1.1\r\nContent-Length: 1\r\n\r\na",
    "two hosts": START + b"Host: h\r\nContent-Length: 1\r\n\r\na",
    "two content types": START + b"Content-Type: text/csv\r\ncontent-type: text/csv\r\n\r\n",
    "two credentials": START + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
    "chunks of another coding": START + b"Transfer-Encoding: gzip, chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    "chunks of another coding, in two headers": START
    + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "nothing sensible": b"\xff\xfe\xfd" * 10,
}


@pytest.mark.parametrize("pieces", ["one segment", "bytes"])
@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
async def test_what_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(
    request_: bytes, pieces: str
) -> None:
    seen: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await read(receive)
        seen.append(scope["path"])
        await answer(send, {})

    whole = request_ + INNER
    segments = [whole] if pieces == "one segment" else [whole[i : i + 1] for i in range(len(whole))]
    async with listening(app) as port:
        got, closed = await talk(port, *segments)
    assert (statuses(got), closed, seen) == ([400], True, [])
    assert contents(got)[0]["code"] == "malformed-request"


ONCE = {
    "HTTP/1.0": b"POST /p HTTP/1.0\r\nContent-Length: 1\r\n\r\na",
    "HTTP/1.0 in chunks": b"POST /p HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    "that closes": START + b"Connection: close\r\nContent-Length: 1\r\n\r\na",
}


@pytest.mark.parametrize("request_", ONCE.values(), ids=ONCE)
async def test_nothing_is_read_behind_the_last_request(request_: bytes) -> None:
    async with listening(echo) as port:
        got, closed = await talk(port, request_ + INNER + b"garbage")
    assert [content["path"] for content in contents(got)] == ["/p"]
    assert closed


async def test_trailers_are_no_headers() -> None:
    chunks = b"1;ext=1\r\na\r\n0\r\nAuthorization: Bearer x\r\nHost: other\r\n\r\n"
    async with listening(echo) as port:
        got, closed = await talk(port, CHUNKED, chunks)
    assert contents(got)[0]["headers"] == ["host", "transfer-encoding"]
    assert not closed


async def test_requests_before_a_malformed_one_have_their_answers() -> None:
    """One on its way, one that waits; the malformed one has none, as it could be taken for that of another."""
    go_on = asyncio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await go_on.wait()
        await echo(scope, receive, send)

    get = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"
    for malformed in (b"garbage\r\n\r\n", CHUNKED + b"x\r\n"):
        go_on.clear()
        async with listening(app) as port:
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            got, closed = await talk(port, get % 1 + get % 2 + malformed)
        assert [content["path"] for content in contents(got)] == ["/1", "/2"]
        assert closed


async def test_a_malformed_rest_of_a_body_has_no_second_answer() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await answer(send, {"path": scope["path"]})

    async with listening(app) as port:
        got, closed = await talk(port, CHUNKED, b"x\r\n", pause=0.1)
    assert (statuses(got), closed) == ([200], True)


async def test_requests_in_one_segment_are_bounded() -> None:
    async with listening(echo) as port:
        got, closed = await talk(port, INNER * 5000)
    assert 1 <= len(statuses(got)) <= server.PIPELINED + 2
    assert (set(statuses(got)), closed) == ({200}, True)


# --- too much ---

TOO_MUCH = {
    "a URL": (b"GET /", b"a" * 1000, 414),
    "a URL of a whole head": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", b"", 414),
    "a header": (b"GET / HTTP/1.1\r\nX: ", b"a" * 1000, 431),
    "a header's name": (b"GET / HTTP/1.1\r\nX", b"a" * 1000, 431),
    "headers": (b"GET / HTTP/1.1\r\n", b"X: %s\r\n" % (b"a" * 990), 431),
    "headers with an offer": (b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n", b"X: a\r\n" * 100, 431),
    "an extension that has an end": (CHUNKED + b"1;" + b"a" * 66_000 + b"\r\na\r\n0\r\n\r\n", b"", 400),
    "an extension of a chunk": (CHUNKED + b"1;", b"a" * 1000, 400),
    "trailers": (CHUNKED + b"0\r\n", b"X: %s\r\n" % (b"a" * 990), 400),
    "a trailer": (CHUNKED + b"0\r\nX: ", b"a" * 1000, 400),
    "empty lines": (b"", b"\r\n" * 500, 400),
}


@pytest.mark.parametrize("size", [1000, 100_000])
@pytest.mark.parametrize(("start", "piece", "status"), TOO_MUCH.values(), ids=TOO_MUCH)
async def test_what_has_no_end_is_refused(start: bytes, piece: bytes, status: int, size: int) -> None:
    """In small segments and in large ones; what comes behind the refusal is thrown away, so that it can be read."""
    async with listening(echo) as port:
        got, closed = await talk(port, start, *[piece * (size // 1000)] * (1_000_000 // size), patience=5)
    assert (statuses(got), closed) == ([status], True)


@pytest.mark.parametrize("pieces", [1, 7])
async def test_the_limits_of_a_head(pieces: int) -> None:
    def head(nbytes: int, headers: int = 2) -> list[bytes]:
        more = b"".join(b"X-%d: y\r\n" % number for number in range(headers - 2))
        start = b"GET /p HTTP/1.1\r\nHost: h\r\n" + more + b"X: "
        whole = start + b"a" * (nbytes - len(start) - 4) + b"\r\n\r\n"
        step = -(-len(whole) // pieces)
        return [whole[i : i + step] for i in range(0, len(whole), step)]

    async with listening(echo) as port:
        for segments in (head(server.HEAD_BYTES), head(10_000, server.HEADERS)):
            got, closed = await talk(port, *segments, pause=0.01)
            assert (statuses(got), closed) == ([200], False)
        for segments in (head(server.HEAD_BYTES + 100), head(10_000, server.HEADERS + 1)):
            got, closed = await talk(port, *segments, pause=0.01)
            assert (statuses(got), closed) == ([431], True)


# --- too late ---


async def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    async with listening(echo) as port:
        assert await talk(port, patience=5) == (b"", True)  # a connection that says nothing
        assert await talk(port, b"\r\n", patience=5) == (b"", True)
        for segments in ([b"GET /p HT"], [b"GET /p HTTP/1.1\r\nX: a\r\n"], [INNER + b"GET /p HT"], [INNER, b"GET"]):
            got, closed = await talk(port, *segments, pause=0.05, patience=5)
            assert (statuses(got)[-1], closed) == (408, True)
        # Bytes that come one after another do not help.
        got, closed = await talk(port, *[b"GET /p HTTP/1.1\r\nX: ", *[b"a"] * 100], pause=0.02, patience=5)
        assert (statuses(got), closed) == ([408], True)
        got, closed = await talk(port, INNER, *[b"\r\n"] * 100, pause=0.02, patience=5)
        assert (statuses(got), closed) == ([200], True)


async def test_the_rest_of_a_body_that_nobody_wants_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LEFTOVER", 0.3)

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await answer(send, {"path": scope["path"]}, 413)

    head = START + b"Content-Length: 100\r\n\r\n"
    async with listening(app) as port:
        got, closed = await talk(port, head, *[b"a"] * 50, pause=0.02, patience=5)
        assert (statuses(got), closed) == ([413], True)
        # What comes to its end leaves the connection to the next request.
        got, closed = await talk(port, head, b"a" * 50, b"a" * 50, INNER, pause=0.02)
        assert (statuses(got), closed) == ([413, 413], False)


# --- clients that have gone ---


@pytest.mark.parametrize("sent", ["head", "part", "all"])
async def test_what_is_done_for_a_client_that_has_gone_is_stopped(sent: str) -> None:
    began, stopped = asyncio.Event(), asyncio.Event()
    states = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        states.append(scope["state"])
        began.set()
        try:
            await read(receive)
            await asyncio.sleep(60)
        finally:
            stopped.set()

    request = START + b"Content-Length: 10\r\n\r\n" + b"a" * {"head": 0, "part": 5, "all": 10}[sent]
    async with listening(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        async with asyncio.timeout(10):
            await began.wait()
            writer.transport.abort()
            await stopped.wait()
    assert [state["ended"] for state in states] == [499]


# --- clients that do not take their answers ---

LARGE = bytes(20_000_000)


async def large(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    await answer(send, LARGE)


@asynccontextmanager
async def reading_nothing(port: int, request: bytes) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(request)
    try:
        yield reader
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
async def test_an_answer_that_is_not_taken_is_dropped(monkeypatch: pytest.MonkeyPatch, connection: str) -> None:
    monkeypatch.setattr(server, "TAKING_SECONDS", 0.2)
    request = f"GET / HTTP/1.1\r\nHost: h\r\nConnection: {connection}\r\n\r\n".encode()
    async with listening(large) as port, reading_nothing(port, request):
        await until(lambda: shares.unsent.used)
        await until(lambda: not shares.unsent.used)
    # A client that takes it slowly gets all of it.
    async with listening(large) as port, reading_nothing(port, request) as reader:
        got = 0
        while got < len(LARGE):
            part = await reader.read(1_000_000)
            assert part, "the connection was closed"
            got += len(part)
            await asyncio.sleep(0.0005)


async def test_answers_that_one_client_does_not_take_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares.unsent, "limit", 40_000_000)
    begun = 0

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        nonlocal begun
        begun += 1
        assert scope["state"]["peer"] == "127.0.0.1"
        await large(scope, receive, send)

    async with listening(app) as port, reading_nothing(port, INNER):
        await until(lambda: shares.unsent.used)
        async with reading_nothing(port, INNER):
            await until(lambda: begun == 2)
            assert shares.unsent.used <= 20_000_000, "the second was closed"
    await until(lambda: not shares.unsent.used)


async def test_no_request_begins_while_the_answer_before_it_is_not_taken() -> None:
    """Nor what comes later on the same connection; all have their answers once the client takes them."""
    begun: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        await large(scope, receive, send)

    get = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"
    async with listening(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(get % 1)
        await until(lambda: shares.unsent.used)
        writer.write(get % 2 + get % 3)
        await asyncio.sleep(0.2)
        assert begun == ["/1"]
        got = 0
        while got < 3 * len(LARGE):
            got += len(await reader.read(1_000_000))
        assert begun == ["/1", "/2", "/3"]
        writer.transport.abort()


async def test_a_client_that_is_behind_has_none_of_what_it_has_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares.unsent, "limit", 40_000_000)
    begun: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        await (large if scope["path"] == "/inner" else echo)(scope, receive, send)

    get = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"
    async with listening(app) as port, reading_nothing(port, INNER):
        await until(lambda: shares.unsent.used)
        got, closed = await talk(port, get % 1 + get % 2 + get % 3)
    assert (statuses(got), closed, begun) == ([200], True, ["/inner", "/1"])


async def test_connections_of_one_address_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another one are not refused for them, nor those of a proxy that is trusted."""
    monkeypatch.setattr(shares.connections, "limit", 8)
    async with listening(echo) as port, AsyncExitStack() as stack:

        async def statuses_of(address: str, count: int) -> list[int]:
            readers = [await stack.enter_async_context(connected(port, address, INNER)) for _ in range(count)]
            return [int(STATUS.findall(await reader.readline())[0]) for reader in readers]

        async with asyncio.timeout(20):
            assert await statuses_of("127.0.0.2", 6) == [200] * 4 + [503] * 2
            assert await statuses_of("127.0.0.3", 1) == [200]
            assert await statuses_of("127.0.0.1", 10) == [200] * 10
    await until(lambda: not shares.connections.used)
    async with listening(echo) as port, connected(port, "127.0.0.2", INNER) as reader:
        assert STATUS.findall(await reader.readline()) == [b"200"], "what was closed counts no more"


# --- the service ---


def request_of(symbol: str, rows: int, *, width: int = 0) -> bytes:
    lines = [f"{symbol},2026-11-02T14:30:00.{number:06d}Z,1,{'x' * width}\n" for number in range(rows)]
    body = ("symbol,timestamp,price,source\n" + "".join(lines)).encode()
    head = f"POST /v1/quotes HTTP/1.1\r\nHost: h\r\nContent-Type: text/csv\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def port_of(service: Service) -> int:
    return int(service.url.rpartition(":")[2])


PATHS = ("/v1/quotes", "/v1/quotes/latest", "/v1/quotes/count")


def lines_of(service: Service, path: str) -> list[dict[str, Any]]:
    """Log lines of requests for a path."""
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == "request" and line["path"] == path]


def post(service: Service, content: object) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{service.url}/v1/quotes", json=content, timeout=5).json()
    return answer


def counted(service: Service) -> list[tuple[str, str]]:
    """Statuses, and how many requests had them."""
    metrics = httpx.get(f"{service.url}/metrics").text
    return re.findall(r'^quotes_http_requests_total\{code="(\d+)".*\} (\S+)$', metrics, re.MULTILINE)


@asynccontextmanager
async def connected(port: int, address: str, sent: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A connection from an address of this machine, on which something was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    writer.write(sent)
    try:
        await writer.drain()
        yield reader
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    ("method", "path", "parameter"),
    [
        ("DELETE", "/v1/quotes?symbol=A&symbol=B&start=2026-11-01&end=2026-11-02", "symbol"),
        ("GET", "/v1/quotes?symbols=A&limit=1&limit=2", "limit"),
        ("GET", "/v1/quotes?symbols=A&limit=1&lim%69t=1", "limit"),
        ("GET", "/v1/quotes/intraday?symbol=A&symbol=A", "symbol"),
        ("GET", "/v1/ohlc?symbols=A&interval=1m&tz=&tz=UTC", "tz"),
        ("GET", "/health?a&a", "a"),
        ("GET", "/health/live?\u00e4=1&\u00e4=2", "?"),
        ("POST", "/v1/quotes?on_error=skip&on_error=abort", "on_error"),
    ],
)
def test_a_parameter_given_twice_is_refused(service_url: str, method: str, path: str, parameter: str) -> None:
    answer = httpx.request(method, f"{service_url}{path}", content=b"[]" if method == "POST" else None)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    (fault,) = answer.json()["errors"]
    assert (fault["code"], fault["parameter"]) == ("repeated-parameter", parameter)


def test_lists_may_be_given_in_parts(service_url: str) -> None:
    """And they are all that is documented as a list."""
    answer = httpx.get(f"{service_url}/v1/quotes/latest?symbols={random_symbol()}&symbols={random_symbol()}")
    assert len(answer.json()["missing"]) == 2
    paths = httpx.get(f"{service_url}/openapi.json").json()["paths"]
    found = set()
    for operation in (operation for path in paths.values() for operation in path.values()):
        for parameter in operation.get("parameters", ()):
            forms = [parameter["schema"], *parameter["schema"].get("anyOf", ())]
            found |= {parameter["name"] for form in forms if form.get("type") == "array"}
    assert found == LISTS - {"name[]"}
    assert httpx.get(f"{service_url}/metrics?name[]=quotes_build_info&name[]=quotes_rows").status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/metrics", "/v1/quotes/latest?symbols=A", "/v1/quotes", "/nowhere"])
def test_head_is_answered_as_get_without_the_body(service_url: str, path: str) -> None:
    get, head = (httpx.request(method, f"{service_url}{path}") for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret", 200),
        ("Bearer SECRET", 403),
        ("Bearer", 403),
        ("Basic secret", 403),
        ("secret", 403),
    ],
)
async def test_the_scheme_of_a_token_has_no_case(given: str, status: int) -> None:
    settings = Settings(_env_file=None, admin_token="secret")
    request = Request({"type": "http", "headers": [(b"authorization", given.encode())]})
    with nullcontext() if status == 200 else pytest.raises(Forbidden):
        require_admin(request, settings)


async def test_uploads_that_stop_one_byte_short_leave_room_for_others(serve: Serve, shared_dir: Path) -> None:
    """Of a room of 8 MB one client takes what it can get; another one's quotes are taken, and it is cut off soon."""
    limits = {"QUOTES_WRITER_QUEUE_BYTES": "8000000", "QUOTES_BODY_TIMEOUT": "3 s"}
    stalled = request_of(random_symbol(), 30_000, width=60)[:-1]
    symbol = random_symbol()
    with serve(shared_dir / "stalled", **limits) as service:
        port = port_of(service)
        async with AsyncExitStack() as stack:
            held = [await stack.enter_async_context(connected(port, "127.0.0.2", stalled)) for _ in range(4)]
            await asyncio.sleep(1)
            async with connected(port, "127.0.0.3", request_of(symbol, 1000, width=60)) as other, asyncio.timeout(20):
                assert STATUS.findall(await other.readline() + b" ") == [b"200"]
            async with asyncio.timeout(20):
                ends = sorted([int(STATUS.findall(await reader.readline())[0]) for reader in held])
                assert ends[0] == 408, "one at least had room"
                assert set(ends) <= {408, 503}
        assert count(service.url, symbol) == 1000


@pytest.mark.long
async def test_a_slow_upload_is_taken_and_a_slower_one_is_not(serve: Serve, shared_dir: Path) -> None:
    """Both go on for longer than any part of them may take."""
    limits = {"QUOTES_BODY_TIMEOUT": "1 s", "QUOTES_BODY_RATE": "20000"}
    with serve(shared_dir / "slow", **limits) as service:
        request = request_of(random_symbol(), 2000)
        assert len(request) > 60_000

        async def upload(step: int) -> list[int]:
            segments = [request[start : start + step] for start in range(0, len(request), step)]
            got, _ = await talk(port_of(service), *segments, pause=0.1, patience=20)
            return statuses(got)[:1]

        async with asyncio.timeout(60):
            ends = await asyncio.gather(upload(4000), upload(500))
        assert list(ends) == [[200], [408]]


async def test_clients_that_go_are_noted_with_a_line_each(serve: Serve, shared_dir: Path) -> None:
    """Within the body, while the answer is made, in either kind of route; and none of them is an error of ours."""
    data = shared_dir / "gone"
    symbol = random_symbol()
    with serve(data) as service:
        port = port_of(service)
        seed = {"quotes": [{"symbol": symbol, "timestamp": "2026-11-02T14:30:00Z", "price": 1}]}
        assert post(service, seed)["inserted"] == 1
        holder = await asyncpg.connect(embedded.url(data))
        await holder.execute("BEGIN; LOCK TABLE quotes.real_time, quotes.latest")
        half = request_of(random_symbol(), 100)[:-10]
        read_ = f"GET /v1/quotes/latest?symbols={symbol} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
        number = f"GET /v1/quotes/count?symbols={symbol} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
        for sent in (half, half[:100], read_, number, request_of(random_symbol(), 10)):
            for _ in range(3):
                async with connected(port, "127.0.0.1", sent):
                    await asyncio.sleep(0.05)
        await until(lambda: len(lines_of(service, "/v1/quotes")) >= 10)
        await until(lambda: len(lines_of(service, "/v1/quotes/count")) >= 3)
        await holder.execute("ROLLBACK")
        await holder.close()
        seen = [line["status"] for path in PATHS for line in lines_of(service, path)]
        assert Counter(seen) == {200: 1, 499: 15}
        assert "Traceback" not in service.log.read_text()
        codes = counted(service)
        assert sum(float(times) for code, times in codes if code == "499") == 15
        assert not [code for code, _ in codes if code.startswith("5")]
        # Nobody waits for what they have asked for.
        assert post(service, seed)["unchanged"] == 1


async def test_reads_of_one_client_leave_the_database_to_others(serve: Serve, shared_dir: Path) -> None:
    """More of them than there are connections wait behind a lock; another client's read is answered meanwhile."""
    data = shared_dir / "greedy"
    with serve(data, QUOTES_CLIENT_READS="2", QUOTES_POOL_SIZE="4", QUOTES_POOL_OVERFLOW="3") as service:
        port = port_of(service)
        holder, watcher = [await asyncpg.connect(embedded.url(data)) for _ in range(2)]
        await holder.execute("BEGIN; LOCK TABLE quotes.real_time")
        read_ = b"GET /v1/quotes/count?symbols=A HTTP/1.1\r\nHost: h\r\n\r\n"
        latest = b"GET /v1/quotes/latest?symbols=A HTTP/1.1\r\nHost: h\r\n\r\n"
        async with AsyncExitStack() as stack, asyncio.timeout(30):
            held = [await stack.enter_async_context(connected(port, "127.0.0.2", read_)) for _ in range(20)]
            working = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while await watcher.fetchval(working) < 2:  # noqa: ASYNC110  there is no event
                await asyncio.sleep(0.02)
            other = await stack.enter_async_context(connected(port, "127.0.0.3", latest))
            assert STATUS.findall(await other.readline()) == [b"200"]
            assert await watcher.fetchval(working) == 2
            await holder.execute("ROLLBACK")
            assert [STATUS.findall(await reader.readline()) for reader in held] == [[b"200"]] * 20
        await holder.close()
        await watcher.close()
