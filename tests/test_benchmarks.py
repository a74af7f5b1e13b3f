"""What the benchmarks rest on: the same quotes in every format, and a client whose latencies hide no wait."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.quote.fields import NAMES
from benchmarks.client import Refused, post, send_all, send_on_schedule
from benchmarks.ticks import FORMATS, Ticks

START = datetime(2026, 11, 2, tzinfo=UTC)
# Values repeat after fifty rows, so that this range wraps around.
TICKS = Ticks(50)
ROWS = range(30, 110)


def quotes(form: str, body: bytes) -> list[dict[str, Any]]:
    """The quotes of a body, by a reader that is not the service's."""
    if form == "Arrow":
        rows = pa.ipc.open_stream(body).read_all().to_pylist()
    elif form == "Parquet":
        rows = pq.read_table(io.BytesIO(body)).to_pylist()
    elif form == "CSV":
        rows = list(csv.DictReader(body.decode().splitlines()))
    elif form == "line protocol":
        rows = [_point(line) for line in body.decode().splitlines()]
    else:
        text = body.decode() if form == "JSON" else f'{{"quotes":[{",".join(body.decode().splitlines())}]}}'
        rows = json.loads(text, parse_float=Decimal)["quotes"]
    return [{name: _plain(name, row[name]) for name in NAMES} for row in rows]


def _point(line: str) -> dict[str, Any]:
    series, fields, at = line.split(" ")
    values = dict(pair.split("=") for pair in [*series.split(",")[1:], *fields.split(",")])
    plain = {name: value.removesuffix("i").strip('"') for name, value in values.items()}
    return {**plain, "symbol": values["symbol"], "timestamp": datetime.fromtimestamp(int(at) / 1e6, UTC)}


def _plain(name: str, value: Any) -> Any:
    if name == "timestamp":
        return value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return value if name in {"symbol", "source"} else Decimal(value)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_format_carries_the_same_quotes_under_keys_of_their_own(shuffle: bool) -> None:
    found = {
        form: [quotes(form, body) for body in TICKS.bodies(form, START, ROWS, 1000.0, 25, shuffle=shuffle)]
        for form in FORMATS
    }
    expected = found["JSON"]
    assert [len(batch) for batch in sorted(expected, key=len)] == [5, 25, 25, 25]
    assert all(batches == expected for batches in found.values())
    keys = [(quote["symbol"], quote["timestamp"]) for batch in expected for quote in batch]
    assert len(set(keys)) == len(ROWS)
    assert all(START < at < START.replace(second=1) for _, at in keys)
    assert ([at for _, at in keys] == sorted(at for _, at in keys)) is not shuffle


@asynccontextmanager
async def serving(answer: Callable[[int], tuple[float, bytes]]) -> AsyncIterator[int]:
    """An HTTP server; `answer` says by the number of the request how long it takes and what is answered."""
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
                await reader.readexactly(int(length.partition(b":")[2]))
                wait, text = answer(count)
                count += 1
                await asyncio.sleep(wait)
                writer.write(text)
        except asyncio.IncompleteReadError:
            pass  # the client has gone
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def response(status: str, body: bytes = b"", header: str = "X-Nothing: 0") -> bytes:
    return f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_a_schedule_counts_the_wait_behind_a_slow_answer() -> None:
    async with serving(lambda _: (0.03, response("200 OK", b"{}"))) as port:
        sent = await send_on_schedule(port, [post("/", b"x")] * 8, per_second=1000.0, connections=1)
    assert len(sent.answers) == 8
    # Each waits for those before it: the last one was due 7 ms after the first, and answered 8 x 30 ms after it.
    assert sent.latencies[-1] > 8 * 0.03 - 0.007 - 0.01


async def test_an_overloaded_service_is_asked_again_and_the_wait_counts() -> None:
    def answer(number: int) -> tuple[float, bytes]:
        return 0, response("503 Busy", header="Retry-After: 0.05") if number == 0 else response("200 OK", b"{}")

    async with serving(answer) as port:
        sent = await send_all(port, [post("/", b"x")], 1)
    assert (sent.refused, sent.answers) == (1, [b"{}"])
    assert sent.latencies[0] > 0.04


async def test_every_request_is_sent_once_over_any_number_of_connections() -> None:
    seen: list[int] = []

    def answer(number: int) -> tuple[float, bytes]:
        seen.append(number)
        return 0, response("200 OK", b"{}")

    async with serving(answer) as port:
        sent = await send_all(port, (post("/", b"x") for _ in range(20)), 3)
    assert (len(sent.answers), len(seen), sent.refused) == (20, 20, 0)


async def test_an_answer_that_is_no_success_ends_the_run() -> None:
    async with serving(lambda _: (0, response("415 Unsupported", b"no"))) as port:
        with pytest.raises(Refused, match="415: no"):
            await send_all(port, [post("/", b"x")] * 3, 2)
