"""Hostile and careless connections: clients that go away, that read slowly or not at all, that only sit there.

Invariant: a client that has gone is nobody's failure; one that is slow, but honest, gets its answer.
"""

import itertools
import json
import random
from typing import Final

from tests.hostile.bodies import ENCODINGS, MB, csv, post, quote, valid
from tests.hostile.striking import Attack
from tests.hostile.wire import Exchange, request

_OK: Final = frozenset({200})
_LARGE: Final = "/v1/quotes?symbols=HOSTILE&start=2026-11-01&end=2026-11-03&limit=10000"


def gone(choice: random.Random, scale: float) -> list[Exchange]:
    """Clients that go before, within and after the body, and within the answer, politely or not."""
    found = []
    batches = {
        **{kind: (body, "identity") for kind, body in valid(200).items()},
        "json.zst": (ENCODINGS["zstd"](valid(200)["json"]), "zstd"),
    }
    for kind, (body, encoding) in batches.items():
        (whole,) = post(kind, body, kind.removesuffix(".zst"), encoding=encoding).sends
        assert isinstance(whole, bytes)
        head = len(whole) - len(body)
        for (label, cut), pause, leaves in itertools.product(
            {
                "at once": 0,
                "within the head": head // 2,
                "after the head": head,
                "within the body": head + len(body) // 2,
                "a byte before the end": len(whole) - 1,
                "after the body": len(whole),
            }.items(),
            (0.0, 0.005, 0.05),
            (True, False),
        ):
            name = f"gone {label}, {kind}, after {pause:g} s, {'broken off' if leaves else 'closed'}"
            found.append(Exchange(name, [whole[:cut], pause], reads="none", leaves=leaves))
    for path, leaves in itertools.product(
        (_LARGE, "/openapi.json", "/v1/ohlc?symbols=HOSTILE&interval=1m", "/metrics"), (True, False)
    ):
        found.append(Exchange(f"gone within {path}", [request("GET", path)], reads="part", leaves=leaves))
        found.append(Exchange(f"gone before {path}", [request("GET", path)], reads="none", leaves=leaves))
    times = max(1, round(20 * scale))
    return choice.sample(found * times, len(found) * times)


def slow_readers(_: random.Random, __: float) -> list[Exchange]:
    """A hundred clients that ask for much and read a kilobyte each half second."""
    return [Exchange("read slowly", [request("GET", _LARGE, close=False) * 5], reads="slow", leaves=True)] * 100


def unread(_: random.Random, scale: float) -> list[Exchange]:
    """Four hundred clients of one address that ask for eight large answers each, and read none."""
    sends: list[bytes | float] = [request("GET", _LARGE, close=False) * 8, max(2.0, 10 * min(scale, 1))]
    return [Exchange("ask and not read", sends, reads="none", leaves=True)] * 400


def greedy(_: random.Random, __: float) -> list[Exchange]:
    """Readers of one address that ask for ten thousand rows, and again as soon as they have them."""
    return [Exchange("read on and on", [request("GET", _LARGE)], frozenset({200, 503}), patience=60)] * 80


def idle(_: random.Random, scale: float) -> list[Exchange]:
    """Thousands of connections on which nothing is said, or half a head, or one request and no more."""
    count, pause = max(300, round(3000 * min(scale, 1))), max(2.0, 15 * min(scale, 1))
    half = request("POST", "/v1/quotes", length=10)[:-30]
    kinds: tuple[list[bytes | float], ...] = (
        [pause],
        [half, pause],
        [request("GET", "/health/live", close=False), pause],
    )
    return [Exchange("idle", kinds[i % 3], reads="none", leaves=True, patience=60) for i in range(count)]


def uplinks(_: random.Random, scale: float) -> list[Exchange]:
    """Good bodies at a steady 150 kB/s: what is slow is honest here."""
    size = round(5 * MB * min(scale, 1))
    rows = [{**quote(i), "source": "x" * 200} for i in range(size // 260)]
    (whole,) = post("", csv(rows), "csv").sends
    assert isinstance(whole, bytes)
    pieces: list[bytes | float] = []
    for at in range(0, len(whole), 15_000):
        pieces += [whole[at : at + 15_000], 0.1]
    return [Exchange(f"{len(whole)} bytes at 150 kB/s", pieces, _OK, patience=90)] * 4


def storm(_: random.Random, __: float) -> list[Exchange]:
    """Many small connections at once, each with one request, as clients have that keep none."""
    body = json.dumps([quote()]).encode()
    return [post("one batch a connection", body, "json", patience=60) for _i in range(2000)]


ATTACKS: Final = [
    Attack("clients that go", gone, 50),
    Attack("slow readers", slow_readers, 100),
    Attack("readers that do not read", unread, 400),
    Attack("greedy readers", greedy, 80),
    Attack("idle connections", idle, 4000),
    Attack("a slow uplink", uplinks, 4),
    Attack("a connection each", storm, 200, crowds=True),
]
