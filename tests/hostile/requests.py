"""Hostile requests: heads without end, bodies framed in two ways, offers to upgrade, every parameter in every form.

Invariant: of what is legal HTTP the right answer is known; of the rest only a failure of the service, or more answers
than requests, is wrong.
"""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote as percent

from app.main import create_app
from app.settings import Settings
from tests.hostile.bodies import MB, quote, some_of, valid
from tests.hostile.striking import Attack
from tests.hostile.wire import Exchange, request

_OK: Final = frozenset({200})
_LIVE: Final = "/health/live"


def _repeated(line: bytes, size: int) -> list[bytes | float]:
    """One line again and again, in pieces of 64 kB, which are one in memory."""
    piece = line * max(1, 65_536 // len(line))
    return [piece] * max(1, size // len(piece))


def heads(_: random.Random, scale: float) -> list[Exchange]:
    """Heads of a request that have no end, or many of something, or are none."""
    size = max(8, round(64 * min(scale, 1))) * MB
    start = b"GET /health/live HTTP/1.1\r\nHost: hostile\r\n"
    plain = request("GET", _LIVE)
    endless = {
        "header": [start, b"X: ", *_repeated(b"a", size)],
        "name of a header": [start, *_repeated(b"a", size)],
        "headers": [start, *_repeated(b"X-A: b\r\n", size)],
        "folded header": [start, b"X: a\r\n", *_repeated(b" a\r\n", size)],
        "URL": [b"GET /", *_repeated(b"a", size)],
        "query": [b"GET /v1/quotes?symbols=", *_repeated(b"A,", size)],
        "method": _repeated(b"A", size),
        "lines before it": _repeated(b"\r\n", size),
        "spaces": [b"GET ", *_repeated(b" ", size)],
        "NULs": _repeated(b"\0", size),
        "chunk extension": [
            b"POST /v1/quotes HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;", *_repeated(b"a", size)
        ],
        "chunk size": [b"POST /v1/quotes HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        *_repeated(b"0", size)],
        "trailers": [
            b"POST /v1/quotes HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            *_repeated(b"X: a\r\n", size)
        ],
    }  # fmt: skip
    odd = {
        "16 MB in a header": start + b"X: " + b"a" * 16 * MB + b"\r\nConnection: close\r\n\r\n",
        "100 kB in a header": start + b"X: " + b"a" * 100_000 + b"\r\nConnection: close\r\n\r\n",
        "10000 headers": start + b"X: a\r\n" * 10_000 + b"Connection: close\r\n\r\n",
        "1 MB of URL": b"GET /" + b"a" * MB + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
        "no colon": start + b"X\r\n\r\n", "no name": start + b": a\r\n\r\n", "NUL": start + b"X: a\0b\r\n\r\n",
        "Latin-1": start + b"X: \xe4\xff\r\nConnection: close\r\n\r\n",
        "bare line feeds": b"GET /health/live HTTP/1.1\nHost: h\n\n",
        "bare carriage return": start + b"X: a\rY: b\r\n\r\n",
        "space before the colon": start + b"Content-Length : 5\r\n\r\nabcde",
        "no host": b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n",
        "two hosts": start + b"Host: other\r\n\r\n",
        "bad host": b"GET /health/live HTTP/1.1\r\nHost: \xff\0@[::\r\nConnection: close\r\n\r\n",
        "HTTP/0.9": b"GET /health/live\r\n\r\n", "HTTP/1.0": b"GET /health/live HTTP/1.0\r\n\r\n",
        "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\x12\4\0\0\0\0\0" + bytes(18),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "URL of another host": b"GET http://example.com/health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
        "URL of bytes": b"GET /\xff\xfe\x80?a=\xff HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
        "URL of percent signs": b"GET /%00%ff%c0%af/..%2f..%2fetc/passwd?%=%&%zz HTTP/1.1\r\nHost: h\r\n\r\n",
        "star": b"OPTIONS * HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
        "port": b"CONNECT a:1 HTTP/1.1\r\nHost: h\r\n\r\n",
        "request id": start + b"X-Request-ID: " + b"a" * 9000 + b"\r\nConnection: close\r\n\r\n",
    }  # fmt: skip
    return [
        *(Exchange(f"endless {label}", sends, patience=60) for label, sends in endless.items()),
        *(Exchange(label, [sends], linger=0.2) for label, sends in odd.items()),
        *(
            Exchange(f"{method} {path}", [request(method, path, body)], bodyless=method == "HEAD")
            for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "get", "A" * 200,
            "PO ST", "\xff")
            for path in ("/v1/quotes", "/v1/ohlc", _LIVE, "/", "/metrics")
            for body in (b"", b"[]")
        ),
        Exchange("a plain one", [plain], _OK),
    ]  # fmt: skip


def framing(_: random.Random, __: float) -> list[Exchange]:
    """Bodies that are framed twice, wrongly or slowly, offers to upgrade, requests one behind another."""
    good = json.dumps([quote()]).encode()
    inner = b"GET /v1/symbols?limit=1 HTTP/1.1\r\nHost: h\r\n\r\n"
    start = b"POST /v1/quotes HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"

    def lengths(*values: bytes) -> bytes:
        return start + b"".join(b"Content-Length: " + value + b"\r\n" for value in values) + b"\r\n"

    whole = lengths(str(len(good)).encode()) + good
    chunked = start + b"Transfer-Encoding: chunked\r\n"
    by_byte = b"".join(b"1\r\n" + good[i : i + 1] + b"\r\n" for i in range(len(good))) + b"0\r\n\r\n"
    offers = {
        "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
        "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n",
        "TLS": b"Connection: upgrade\r\nUpgrade: TLS/1.2\r\n",
        "nothing known": b"Connection: keep-alive, Upgrade\r\nUpgrade: foo/1\r\n",
        "several": b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
    }
    found = []
    for (name, offer), pause in itertools.product(offers.items(), (0.0, 0.1)):
        for label, body in (("a batch", good), ("what looks like a request", inner)):
            head = start + offer + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n"
            expect = _OK if body is good else frozenset({400, 422})
            found.append(
                Exchange(f"{name} offered with {label}, pause {pause:g}", [head, pause, body], expect, linger=0.3)
            )
        head = b"GET /health/live HTTP/1.1\r\nHost: h\r\n" + offer + b"\r\n"
        found.append(Exchange(f"{name} offered by a GET", [head], _OK, linger=0.3))
    return [
        *found,
        Exchange("a plain batch", [whole], _OK, linger=0.2),
        Exchange("chunks of a byte", [chunked + b"\r\n" + by_byte], _OK, linger=0.2),
        Exchange("one chunk, slowly", [chunked + b"\r\n", 0.1, by_byte[:40], 0.1, by_byte[40:]], _OK),
        Exchange("chunked and a length", [chunked + b"Content-Length: 5\r\n\r\n" + by_byte], linger=0.3),
        Exchange("a length and chunked", [chunked + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + inner], answers=2,
        linger=0.3),
        *(
            Exchange(f"transfer encoding {value!r}",
            [start + b"Transfer-Encoding: " + value + b"\r\n\r\n" + by_byte], linger=0.3)
            for value in (b"xchunked", b"chunked, chunked", b"gzip, chunked", b"identity", b"\x0bchunked", b"chunked\0")
        ),
        *(
            Exchange(f"chunk size {size!r}", [chunked + b"\r\n" + size + b"\r\n" + good], patience=3, leaves=True,
            reads="part")
            for size in (b"FFFFFFFFFFFFFFFF", b"-1", b"0x10", b"", b" 1", b"1 ", b"7FFFFFFF", b"1_0", b"\xff")
        ),
        *(
            Exchange(f"length {value!r}", [lengths(value) + good], answers=2, linger=0.3, patience=3, reads="part")
            for value in (b"-1", b"1e3", b"+5", b"0x10", b"5, 5", b"99999999999999999999999", b"", b" ", b"1_0",
            b"\xb2")
        ),
        Exchange("two lengths", [lengths(b"5", str(len(good)).encode()) + good], answers=2, linger=0.3),
        Exchange("a length too long", [lengths(str(len(good) + 10).encode()) + good, 2.0], reads="none", leaves=True),
        Exchange("a length too short", [lengths(b"5") + good], answers=2, linger=0.3),
        Exchange("100 GB announced", [lengths(b"100000000000") + good], frozenset({413})),
        Exchange("a body for GET", [b"GET /health/live HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nabcde"],
        linger=0.3),
        Exchange("to go on, asked",
        [start + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(good), 0.2, good], _OK),
        Exchange("something else expected", [start + b"Expect: cake\r\nContent-Length: %d\r\n\r\n" % len(good) + good]),
        Exchange("500 one behind another", [request("GET", _LIVE, close=False) * 500], _OK, 500, linger=1),
        Exchange("100 batches one behind another", [whole * 100], _OK, 100, linger=1, patience=60),
        Exchange("HTTP/1.0 with a body", [whole.replace(b"HTTP/1.1", b"HTTP/1.0")], _OK),
        Exchange("50000 one behind another, unread", [request("GET", "/openapi.json", close=False) * 50_000, 2.0],
        reads="none", leaves=True, patience=15),
    ]  # fmt: skip


def slow(_: random.Random, scale: float) -> list[Exchange]:
    """Heads and bodies a byte at a time, by two hundred clients."""
    times = max(4, round(60 * min(scale, 1)))
    start = b"POST /v1/quotes HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\nX: "
    head: list[bytes | float] = [start]
    body: list[bytes | float] = [start + b"\r\n\r\n"]
    for _i in range(times):
        head += [b"a", 0.5]
        body += [b" ", 0.5]
    return [
        *[Exchange("a slow head", head, patience=60, reads="none", leaves=True)] * 100,
        *[Exchange("a slow body", body, patience=60, reads="none", leaves=True)] * 100,
    ]  # fmt: skip


# --- every parameter ---

_ODD: Final = (
    "", " ", "\0", "x", "-1", "0", "1e400", "9" * 400, "9" * 5000, "\ud7ff", "\u202e", "null", "NaN", "true", "[]",
    "a" * 9000, "1,2,,3", ",",
    ",".join(f"S{i}" for i in range(3000)), "' OR 1=1 --", "asc LIMIT 0) row UNION ALL SELECT 1", "../../etc/passwd",
    "%00", "\r\nX: y",
)  # fmt: skip
_TIMES: Final = (
    "0001-01-01", "0001-01-01T00:00:00Z", "0001-01-02", "0001-01-01T00:00:00+14:00", "9999-12-31",
    "9999-12-31T23:59:59.999999999Z",
    "9999-12-31T23:59:59-12:00", "1582-10-10", "1900-01-01", "1969-12-31T23:59:59.999999999Z",
    "2262-04-11T23:47:16.854775807Z",
    "2262-04-12", "1677-09-21T00:12:43Z", "2026-02-30", "2026-11-02T24:00:00Z", "2026-06-30T23:59:60Z", "0000-01-01",
    "10000-01-01",
    "-0001-01-01", "2026-11-02T10:00:00+24:00", "2026-11-02T10:00:00", "now", "infinity", "-infinity", "epoch",
    "20261102",
)  # fmt: skip
_ZONES: Final = (
    "UTC", "localtime", "posixrules", "right/UTC", "right/Europe/Berlin", "posix/UTC", "Pacific/Apia",
    "Europe/Berlin", "America/St_Johns",
    "Asia/Kathmandu", "Africa/Monrovia", "Antarctica/Troll", "Pacific/Kiritimati", "Etc/GMT+12", "EST5EDT",
    "Factory", "zone.tab", "tzdata.zi",
    "leapseconds", "__init__.py", "Europe", "Europe/", "/etc/localtime", "../../etc/passwd", "C:\\x",
    "europe/berlin", ".", "..", "+01:00",
    "Asia/Manila", "America/Juneau", "Pacific/Kwajalein", "Europe/Dublin", "Africa/Casablanca",
)  # fmt: skip
_INTERVALS: Final = (
    "1s", "1m", "7m", "1h", "1d", "1w", "1M", "12M", "1200M", "99999M", "99999d", "0m", "-1m", "1y", "1ms", "1", "M",
    "5Min", "1Hour", "1Day",
    "9" * 16 + "s", "999999999w", "\u0661m",
)  # fmt: skip
_SPANS: Final = (
    ("0001-01-01", "9999-12-31"), ("0001-01-02", "9999-12-01"), ("0001-01-01", "0001-01-03"),
    ("9999-12-30", "9999-12-31T23:59:59Z"),
    ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59.999999999Z"), ("2026-11-01", "2026-11-03"),
    ("1899-12-30", "2100-01-01"),
)  # fmt: skip


def _schema() -> dict[str, Any]:
    return create_app(Settings(_env_file=None)).openapi()


def _target(path: str, *parameters: tuple[str, str]) -> str:
    text = "&".join(
        f"{percent(name, safe='')}={percent(value, safe='', errors='surrogatepass')}" for name, value in parameters
    )
    return f"{path}?{text}" if text else path


def _valid_query(operation: dict[str, Any]) -> dict[str, str]:
    known = {"symbols": "HOSTILE", "symbol": "HOSTILE", "interval": "1m", "start": "2026-11-01", "end": "2026-11-03"}
    names = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"}
    return {name: value for name, value in known.items() if name in names}


def queries(choice: random.Random, scale: float) -> list[Exchange]:
    """Each parameter of each route: empty, twice, huge, of another kind, at both ends of the calendar, in odd zones."""
    found: list[Exchange] = []

    def ask(method: str, label: str, target: str, body: bytes = b"") -> None:
        headers = {"Content-Type": "application/json"} if body else {}
        found.append(Exchange(f"{method} {label}"[:300], [request(method, target, body, headers=headers)]))

    for path, operations in _schema()["paths"].items():
        for method, operation in operations.items():
            verb = method.upper()
            body = valid()["json"] if verb == "POST" else b""
            query = _valid_query(operation)
            ask(verb, path, path, body)
            for name in [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]:
                special = {"tz": _ZONES, "start": _TIMES, "end": _TIMES, "date": _TIMES, "interval": _INTERVALS}.get(
                    name, ()
                )
                for value in (*_ODD, *special):
                    others = [(k, v) for k, v in query.items() if k != name]
                    ask(verb, f"{path} {name}={value[:60]!r}", _target(path, *others, (name, value)), body)
                twice = _target(path, *query.items(), (name, "1"), (name, "2"))
                ask(verb, f"{path} {name} twice", twice, body)
                ask(verb, f"{path} {name} 2000 times", _target(path, *query.items(), *[(name, "A")] * 2000), body)
            ask(verb, f"{path} 5000 parameters", _target(path, *[(f"p{i}", "") for i in range(5000)]), body)
            ask(verb, f"{path} bytes", path + "?\xff=\xfe&symbols=%ff%fe&start=%", body)
    for target in _calendar():
        ask("GET", target, target)
    return some_of(found, choice, scale)


def _calendar() -> Iterator[str]:
    """Bars and days at both ends of the calendar, in every odd zone, with and without what fills their gaps."""
    for interval, zone, (start, end) in itertools.product(("1m", "1h", "1d", "1w", "1M", "1200M"), _ZONES, _SPANS):
        for fill, sort in (("none", "asc"), ("null", "desc"), ("previous", "asc")):
            parameters = (("symbols", "HOSTILE"), ("interval", interval), ("tz", zone), ("start", start), ("end", end))
            yield _target("/v1/ohlc", *parameters, ("fill", fill), ("sort", sort))
    for zone, day in itertools.product(
        _ZONES, ("0001-01-01", "9999-12-31", "2011-12-30", "1844-12-31", "2026-03-29", "")
    ):
        yield _target("/v1/quotes/intraday", ("symbol", "HOSTILE"), ("tz", zone), *([("date", day)] if day else []))


def long_ranges(_: random.Random, __: float) -> list[Exchange]:
    """Bars of ten thousand years by the day in a zone whose clocks change, on next to nothing."""
    return [
        Exchange(target, [request("GET", target)])
        for zone, interval, fill in itertools.product(
            ("Europe/Berlin", "Pacific/Apia", "UTC"), ("1d", "1w", "1M", "1h"), ("none", "null", "previous")
        )
        for target in [
            _target(
                "/v1/ohlc", ("symbols", "HOSTILE"), ("interval", interval), ("tz", zone), ("start", "0001-01-02"),
                ("end", "9999-12-01"), ("fill", fill), ("limit", "10000"),
            )
        ]
    ]  # fmt: skip


ATTACKS: Final = [
    Attack("odd and endless heads", heads),
    Attack("framing and upgrades", framing, 4),
    Attack("a byte at a time", slow, 200),
    Attack("every parameter", queries),
    Attack("ten thousand years", long_ranges),
]
