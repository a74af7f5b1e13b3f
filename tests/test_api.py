"""The HTTP interface: answers, problems, paging, and a 4xx for every mistake of a client."""

import asyncio
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import polars as pl
import pytest

from app.clock import parse, rfc3339_nano
from app.db.capability import Level
from app.db.engine import Database
from app.main import create_app
from tests.conftest import Lane, random_symbol, refresh, running
from tests.test_repository import DAY, N0, T0, polars_every, resample

JSON = {"content-type": "application/json"}
NDJSON = {"content-type": "application/x-ndjson"}


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["type"] == f"urn:problem:opa-quotes:{code}"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert {"title", "detail", "instance", "errors"} <= body.keys()
    return body


def row(symbol: str, at: int | datetime = 0, price: Any = 1, **fields: Any) -> dict[str, Any]:
    """A quote of a moment, or so many seconds into 2026-11-16."""
    timestamp = f"2026-11-16T00:00:{at:02d}Z" if isinstance(at, int) else at.isoformat()
    return {"symbol": symbol, "timestamp": timestamp, "price": price, **fields}


async def post(client: httpx.AsyncClient, rows: Any, **query: str) -> httpx.Response:
    return await client.post("/v1/quotes", json=rows, params=query)


# --- ingest ---


@pytest.mark.parametrize("shape", ["object", "array", "ndjson", "jsonl"])
async def test_each_shape_of_body_is_stored(client: httpx.AsyncClient, symbol: str, shape: str) -> None:
    rows = [row(symbol, i, f"{i + 1}.10") for i in range(3)]
    if shape == "object":
        answer = await post(client, {"quotes": rows})
    elif shape == "array":
        answer = await post(client, rows)
    else:
        lines = "\r\n\n".join(json.dumps(r) for r in rows) + "\n"
        media = "application/x-ndjson; charset=utf-8" if shape == "ndjson" else "application/jsonl"
        answer = await client.post("/v1/quotes", content=lines, headers={"content-type": media})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "received": 3, "inserted": 3, "updated": 0, "unchanged": 0, "superseded": 0, "numbered": 0, "rounded": 0,
        "zeros": 0, "crossed": 0, "rejected": [],
    }  # fmt: skip
    found = await client.get("/v1/quotes", params={"symbols": symbol.lower(), "start": "2026-11-16"})
    assert found.text == (
        '{"quotes":['
        + ",".join(
            f'{{"symbol":"{symbol}","timestamp":"2026-11-16T00:00:0{i}.000000000Z","price":{i + 1}.1,"bid":null,'
            '"ask":null,"bid_size":null,"ask_size":null,"volume":null,"source":null}'
            for i in range(3)
        )
        + '],"next_page_token":null}'
    )


async def test_numbers_keep_every_digit(client: httpx.AsyncClient, symbol: str) -> None:
    body = (
        f'[{{"symbol":"{symbol}","timestamp":"2026-11-16T00:00:00.123456789Z",'
        '"price":1234567890123456.123456789012,"volume":0.000000000001}]'
    )
    assert (await client.post("/v1/quotes", content=body, headers=JSON)).status_code == 200
    found = await client.get("/v1/quotes/latest", params={"symbols": symbol})
    assert '"price":1234567890123456.123456789012,' in found.text
    assert '"volume":0.000000000001,' in found.text
    assert '"timestamp":"2026-11-16T00:00:00.123456789Z"' in found.text


@pytest.mark.parametrize(("given", "shown"), [("", "000000000"), (".5", "500000000"), (".000000001", "000000001"),
                                              (".123456", "123456000"), (".999999999", "999999999")])  # fmt: skip
async def test_quotes_leave_with_nine_digits(client: httpx.AsyncClient, symbol: str, given: str, shown: str) -> None:
    quote = {"symbol": symbol, "timestamp": f"2026-11-16T00:00:00{given}Z", "price": 1}
    assert (await post(client, [quote])).status_code == 200
    text = f'"2026-11-16T00:00:00.{shown}Z"'
    of_symbol = {"symbols": symbol}
    for path, query in (
        ("/v1/quotes/latest", of_symbol),
        ("/v1/quotes", {**of_symbol, "start": "2026-11-16"}),
        ("/v1/quotes/intraday", {"symbol": symbol, "date": "2026-11-16"}),
        ("/v1/symbols", {"limit": "100000"}),
    ):
        assert text in (await client.get(path, params=query)).text, path


async def test_a_symbol_may_have_any_of_its_letters(client: httpx.AsyncClient, symbol: str) -> None:
    odd = f"{symbol}.-=^/:_&@+$#! X"
    assert (await post(client, [row(f"  {odd.lower()} ")])).json()["inserted"] == 1
    for path, name in (("/v1/quotes", "symbols"), ("/v1/ohlc", "symbols"), ("/v1/quotes/intraday", "symbol")):
        more = {"interval": "1d"} if path == "/v1/ohlc" else {}
        span = {"date": "2026-11-16"} if name == "symbol" else {"start": "2026-11-16"}
        answer = await client.get(path, params={name: odd, **span, **more})
        (found,) = answer.json()["bars" if more else "quotes"]
        assert found["symbol"] == odd
    names = [entry["symbol"] for entry in (await client.get("/v1/symbols")).json()["symbols"]]
    after = await client.get("/v1/symbols", params={"page_token": odd, "limit": 1})
    assert [entry["symbol"] for entry in after.json()["symbols"]] == names[names.index(odd) + 1 :][:1]


async def test_receipts_by_conflict_rule(client: httpx.AsyncClient, symbol: str) -> None:
    assert (await post(client, [row(symbol)])).json()["inserted"] == 1
    refused = problem(await post(client, [row(symbol), row(symbol, 1)], on_conflict="error"), 409, "conflict")
    assert refused["errors"] == [
        {
            "code": "already-stored",
            "detail": "A quote with this key is stored already.",
            "pointer": "/0/timestamp",
            "index": 0,
        }
    ]
    assert (await post(client, [row(symbol, 0, 2)], on_conflict="ignore")).json()["unchanged"] == 1
    assert (await post(client, {"quotes": [row(symbol, 0, 2)]})).json()["updated"] == 1
    merged = await post(client, [row(symbol, 0, None, bid=1), row(symbol, 0, None, ask=3)], on_conflict="merge")
    assert (merged.json()["updated"], merged.json()["superseded"]) == (1, 1)
    (quote,) = (await client.get("/v1/quotes/latest", params={"symbols": symbol})).json()["quotes"]
    assert (quote["price"], quote["bid"], quote["ask"]) == (2, 1, 3)


async def test_ties_are_replaced_or_numbered(client: httpx.AsyncClient, symbol: str) -> None:
    rows = [row(symbol, 0, price) for price in (3, 1, 2)]
    assert (await post(client, rows, ties="number")).json() == {
        "received": 3, "inserted": 3, "updated": 0, "unchanged": 0, "superseded": 0, "numbered": 2, "rounded": 0,
        "zeros": 0, "crossed": 0, "rejected": [],
    }  # fmt: skip
    found = (await client.get("/v1/quotes", params={"symbols": symbol, "start": "2026-11-16"})).json()["quotes"]
    assert [(q["timestamp"][-4:], q["price"]) for q in found] == [("000Z", 3), ("001Z", 1), ("002Z", 2)]
    replaced = (await post(client, rows)).json()
    assert (replaced["updated"], replaced["superseded"], replaced["numbered"]) == (1, 2, 0)


async def test_zeros_and_signs(client: httpx.AsyncClient, symbol: str) -> None:
    taken = (await post(client, [row(symbol, 0, 5, bid=0, ask=0)])).json()
    assert (taken["inserted"], taken["zeros"]) == (1, 2)
    refused = problem(await post(client, [row(symbol, 1, 0, bid=0)]), 422, "invalid-quotes")
    assert [e["code"] for e in refused["errors"]] == ["price-not-positive"]
    signed = (await post(client, [row(symbol, 1, -37.63, bid=0, volume=2)], prices="signed")).json()
    assert (signed["inserted"], signed["zeros"]) == (1, 0)
    (quote,) = (await client.get("/v1/quotes/latest", params={"symbols": symbol})).json()["quotes"]
    assert (quote["price"], quote["bid"], quote["ask"]) == (-37.63, 0, None)


async def test_the_setting_says_what_a_price_is_by_default(lane: Lane, symbol: str) -> None:
    async with running(create_app(lane.make_settings(prices="signed"))) as client:
        assert (await post(client, [row(symbol, 0, -1)])).json()["inserted"] == 1
        problem(await post(client, [row(symbol, 1, -1)], prices="positive"), 422, "invalid-quotes")


async def test_skip_lists_the_refused_rows(client: httpx.AsyncClient, symbol: str) -> None:
    body = b"\n".join([json.dumps(row(symbol)).encode(), b"{oops", b"", json.dumps(row(symbol, 1, 0)).encode()])
    answer = await client.post("/v1/quotes?on_error=skip", content=body, headers=NDJSON)
    receipt = answer.json()
    assert (receipt["received"], receipt["inserted"]) == (3, 1)
    assert [(r["index"], r["pointer"], r["code"]) for r in receipt["rejected"]] == [
        (1, "/1", "not-an-object"),
        (2, "/2/price", "price-not-positive"),
    ]


def bad_bodies() -> Iterator[Any]:
    """Bodies with one wrong row at index 1 of two; id, text of the row, pointer, code."""
    head = '{"symbol":"SYM","timestamp":'
    when = f'{head}"2026-11-16T00:00:00Z",'
    cases = {
        "naive": (f'{head}"2026-11-16T00:00:00","price":1}}', "timestamp", "timestamp-naive"),
        "nan": (when + '"price":NaN}', "price", "not-finite"),
        "infinity": (when + '"bid":Infinity,"price":1}', "bid", "not-finite"),
        "huge": (when + '"price":1e400}', "price", "price-out-of-range"),
        "negative": (when + '"price":-1}', "price", "price-not-positive"),
        "surrogate": (when + '"price":1,"source":"\\ud800"}', "source", "not-unicode"),
        "nul": ('{"symbol":"A\\u0000","timestamp":"2026-11-16T00:00:00Z","price":1}', "symbol", "symbol-invalid"),
        "future": (f'{head}"2999-01-01T00:00:00Z","price":1}}', "timestamp", "timestamp-in-future"),
        "past": (f'{head}"0001-01-01T00:00:00Z","price":1}}', "timestamp", "timestamp-too-old"),
        "before": (f'{head}"1677-09-21T23:59:59.999999999Z","price":1}}', "timestamp", "timestamp-too-old"),
        "too fine": (f'{head}"2026-11-16T00:00:00.0000000001Z","price":1}}', "timestamp", "timestamp-too-fine"),
        "leap second": (f'{head}"2016-12-31T23:59:60Z","price":1}}', "timestamp", "timestamp-leap-second"),
        "zero": (when + '"price":0}', "price", "price-not-positive"),
        "too large": (when + '"price":1e16}', "price", "price-out-of-range"),
        "too small": (when + '"price":1.23e-12}', "price", "price-too-fine"),
        "long": (when + f'"price":{"9" * 10_000}}}', "price", "number-too-long"),
        "size": (when + '"price":1,"volume":-0.5}', "volume", "size-negative"),
        "sizes alone": (when + '"volume":1,"bid_size":2}', "price", "price-missing"),
        "no price": (when[:-1] + "}", "price", "price-missing"),
        "typo": (when + '"prise":1}', "prise", "unknown-field"),
        "null": ("null", "", "not-an-object"),
    }
    for name, (text, field, code) in cases.items():
        yield pytest.param(text, f"/quotes/1/{field}".rstrip("/"), code, id=name)


@pytest.mark.parametrize(("text", "pointer", "code"), list(bad_bodies()))
async def test_a_bad_row_is_named_and_nothing_is_stored(
    client: httpx.AsyncClient, symbol: str, text: str, pointer: str, code: str
) -> None:
    body = f'{{"quotes":[{json.dumps(row(symbol))},{text}]}}'
    answer = problem(await client.post("/v1/quotes", content=body, headers=JSON), 422, "invalid-quotes")
    assert [(e["pointer"], e["code"], e["index"]) for e in answer["errors"]] == [(pointer, code, 1)]
    assert (await client.get("/v1/quotes/count", params={"symbols": symbol})).json()["count"] == 0


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", JSON, 400, "malformed-body"),
        (b'{"quotes":[', JSON, 400, "malformed-body"),
        (b'[{"symbol":"A"', JSON, 400, "malformed-body"),
        (b"\xff\xfe", JSON, 400, "malformed-body"),
        (b"[" * 100_000, JSON, 400, "malformed-body"),
        (b"[" + b"9" * 10_000 + b"]", JSON, 422, "invalid-quotes"),
        (b"3", JSON, 400, "malformed-body"),
        (b'{"quotes":{}}', JSON, 400, "malformed-body"),
        (b'{"quotes":[],"more":1}', JSON, 400, "malformed-body"),
        (b"<quote/>", {"content-type": "text/xml"}, 415, "unsupported-media-type"),
        (b"[]", {**JSON, "content-encoding": "br"}, 415, "unsupported-encoding"),
    ],
)
async def test_a_body_that_holds_no_quotes(
    client: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    problem(await client.post("/v1/quotes", content=body, headers=headers), status, code)


@pytest.mark.parametrize(
    ("body", "media"),
    [
        (b"[]", "application/json"),
        (b'{"quotes":[]}', "application/json"),
        (b"", "application/x-ndjson"),
        (b"\n\n", "application/x-ndjson"),
        (b"symbol,timestamp,price\n", "text/csv"),
    ],
)
@pytest.mark.parametrize("on_conflict", ["update", "merge", "ignore", "error"])
async def test_an_empty_batch_is_taken(client: httpx.AsyncClient, body: bytes, media: str, on_conflict: str) -> None:
    headers = {"content-type": media, "idempotency-key": random_symbol()}
    path = f"/v1/quotes?on_conflict={on_conflict}"
    for query in ("&dry_run=true", "", ""):
        answer = await client.post(path + query, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        receipt = answer.json()
        assert receipt.pop("dry_run", False) == bool(query)
        assert receipt.pop("rejected") == []
        assert set(receipt.values()) == {0}
    assert answer.headers["idempotency-replayed"] == "true"


async def test_too_many_rows_and_bytes(lane: Lane, symbol: str) -> None:
    small = lane.make_settings(max_body_bytes=4096, max_batch_rows=20)
    async with running(create_app(small)) as client:
        problem(await post(client, [row(symbol, i % 60) for i in range(21)]), 413, "body-too-large")
        problem(await post(client, [row(symbol, 0, 1, source="x" * 5000)]), 413, "body-too-large")

        async def drip() -> Any:
            for _ in range(100):
                yield b" " * 100

        problem(await client.post("/v1/quotes", content=drip(), headers=JSON), 413, "body-too-large")
        assert (await client.get("/v1/quotes/count", params={"symbols": symbol})).json()["count"] == 0


async def test_a_million_and_one_rows(client: httpx.AsyncClient, symbol: str) -> None:
    text = json.dumps(row(symbol)).encode()
    body = b"[" + b",".join([text] * 1_000_001) + b"]"
    problem(await client.post("/v1/quotes", content=body, headers=JSON), 413, "body-too-large")
    assert (await client.get("/v1/quotes/count", params={"symbols": symbol})).json()["count"] == 0


async def test_a_body_that_does_not_arrive(lane: Lane) -> None:
    async with running(create_app(lane.make_settings(body_timeout="50 ms"))) as client:

        async def stall() -> Any:
            yield b"["
            await asyncio.sleep(5)

        problem(await client.post("/v1/quotes", content=stall(), headers=JSON), 408, "body-timeout")


# --- queries ---


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/v1/quotes?symbols=A&colour=red", "colour"),
        ("/v1/quotes", "symbols"),
        ("/v1/quotes?symbols=", "symbols"),
        ("/v1/quotes?symbols=a%3Bb", "symbols"),
        ("/v1/quotes?symbols=" + 65 * "A", "symbols"),
        ("/v1/quotes?symbols=%C3%A9", "symbols"),
        ("/v1/quotes?symbols=%00", "symbols"),
        ("/v1/quotes?symbols=%ed%a0%80", "symbols"),
        ("/v1/quotes?symbols=" + ",".join(f"S{i}" for i in range(501)), "symbols"),
        ("/v1/quotes?symbols=A&start=2026-11-16T00:00:00", "start"),
        ("/v1/quotes?symbols=A&start=soon", "start"),
        ("/v1/quotes?symbols=A&start=1700000000", "start"),
        ("/v1/quotes?symbols=A&start=0001-01-01T00:00:00%2B14:00", "start"),
        ("/v1/quotes?symbols=A&start=2026-11-17&end=2026-11-16", "start"),
        ("/v1/quotes?symbols=A&start=2026-11-16&end=2026-11-16", "start"),
        ("/v1/quotes?symbols=A&end=9999-12-31T23:59:59-14:00", "end"),
        ("/v1/quotes?symbols=A&start=2026-11-16T00:00:00.0000000001Z", "start"),
        ("/v1/quotes?symbols=A&start=2026-11-16T00:00:60Z", "start"),
        ("/v1/quotes?symbols=A&start=2026-11-16T00:00:00.000000001Z&end=2026-11-16T00:00:00.000000001Z", "start"),
        ("/v1/quotes?symbols=A&limit=0", "limit"),
        ("/v1/quotes?symbols=A&limit=10001", "limit"),
        ("/v1/quotes?symbols=A&limit=NaN", "limit"),
        ("/v1/quotes?symbols=A&limit=99999999999999999999", "limit"),
        ("/v1/quotes?symbols=A&sort=up", "sort"),
        ("/v1/quotes?symbols=A&page_token=forged", "page_token"),
        ("/v1/quotes?symbols=A&page_token=%00%ff", "page_token"),
        ("/v1/quotes?symbols=A&page_token=" + "A" * 600, "page_token"),
        ("/v1/quotes/intraday?symbol=A&date=2026-02-30", "date"),
        ("/v1/quotes/intraday?symbol=A&tz=Mars", "tz"),
        ("/v1/quotes/intraday?symbol=A&date=9999-12-31", "date"),
        ("/v1/quotes/intraday?date=2026-02-03", "symbol"),
        ("/v1/quotes/latest?symbols=,", "symbols"),
        ("/v1/quotes/count?start=2026-11-17&end=2026-11-16", "start"),
        ("/v1/ohlc?symbols=A", "interval"),
        ("/v1/ohlc?symbols=A&interval=1y", "interval"),
        ("/v1/ohlc?symbols=A&interval=0m", "interval"),
        ("/v1/ohlc?symbols=A&interval=9999999M", "interval"),
        ("/v1/ohlc?symbols=A&interval=3650d&end=1000-01-01", "start"),
        ("/v1/ohlc?symbols=A&interval=1m&price=best", "price"),
        ("/v1/summary/daily?symbols=A&interval=1d", "interval"),
        ("/v1/summary/daily?symbols=A&price=best", "price"),
        ("/v1/symbols?limit=0", "limit"),
        ("/v1/symbols?page_token=a%3Bb", "symbols"),
    ],
)
async def test_a_bad_query_names_its_parameter(client: httpx.AsyncClient, path: str, parameter: str) -> None:
    answer = await client.get(path)
    code = "invalid-page-token" if parameter == "page_token" and len(path) < 500 else "invalid-request"
    assert parameter in [error.get("parameter") for error in problem(answer, 400, code)["errors"]]


async def test_a_range_may_be_all_of_the_calendar(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol), row(symbol, 1), row(symbol, 24)])
    whole = {"symbols": symbol, "start": "0001-01-01", "end": "9999-12-31T23:59:59.999999999Z"}
    page = (await client.get("/v1/quotes", params={**whole, "limit": 2})).json()
    rest = (await client.get("/v1/quotes", params={**whole, "page_token": page["next_page_token"]})).json()
    assert len(page["quotes"] + rest["quotes"]) == 3
    assert (await client.get("/v1/quotes/count", params=whole)).json()["count"] == 3
    for tz in ("UTC", "America/New_York", "Asia/Tokyo"):
        for interval in ("1h", "1d", "1M", "3650d"):
            answer = await client.get("/v1/ohlc", params={**whole, "interval": interval, "tz": tz})
            assert answer.status_code == 200, answer.text
            assert [bar["count"] for bar in answer.json()["bars"]] == [3]
    nothing = await client.get("/v1/quotes", params={"symbols": symbol, "end": "0001-01-01"})
    assert nothing.json() == {"quotes": [], "next_page_token": None}


async def test_other_refusals(client: httpx.AsyncClient) -> None:
    problem(await client.get("/v1/nothing"), 404, "not-found")
    problem(await client.put("/v1/quotes"), 405, "method-not-allowed")
    problem(await client.get("/v1/symbols", headers={"accept": "text/csv, image/*;q=0.5"}), 406, "not-acceptable")
    for accept in ("*/*", "application/json;q=0.9", "text/html, application/*", "text/csv;q=0, application/json"):
        assert (await client.get("/v1/symbols", headers={"accept": accept})).status_code == 200


async def test_request_ids(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health/live", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    answer = await client.get("/health/live", headers={"x-request-id": "bad id\t"})
    assert len(answer.headers["x-request-id"]) == 16


async def test_a_plus_that_was_not_encoded_is_given_back(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol)])
    found = await client.get(f"/v1/quotes?symbols={symbol}&start=2026-11-16T02:00:00+02:00&end=2026-11-17")
    assert len(found.json()["quotes"]) == 1


async def test_defaults_cover_the_last_day(client: httpx.AsyncClient, symbol: str) -> None:
    now = datetime.now(UTC)
    stamps = [now - timedelta(hours=25), now - timedelta(hours=23), now - timedelta(seconds=5)]
    await post(client, [{"symbol": symbol, "timestamp": t.isoformat(), "price": 1} for t in stamps])
    assert len((await client.get("/v1/quotes", params={"symbols": symbol})).json()["quotes"]) == 2
    today = await client.get("/v1/quotes/intraday", params={"symbol": symbol})
    assert len(today.json()["quotes"]) == sum(t.date() == now.date() for t in stamps)
    bars = await client.get("/v1/ohlc", params={"symbols": symbol, "interval": "1h"})
    assert sum(bar["count"] for bar in bars.json()["bars"]) == 3


async def test_pages_are_linked_and_bound_to_their_query(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol, i) for i in range(5)])
    path: str | None = f"/v1/quotes?symbols={symbol}&start=2026-11-16&limit=2&sort=desc"
    seconds: list[str] = []
    tokens = []
    while path:
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        seconds += [q["timestamp"][17:] for q in page["quotes"]]
        path = answer.links["next"]["url"] if "next" in answer.links else None
        assert (path is None) == (page["next_page_token"] is None)
        tokens.append(page["next_page_token"])
    assert seconds == [f"0{i}.000000000Z" for i in (4, 3, 2, 1, 0)]
    base = {"symbols": symbol, "start": "2026-11-16", "sort": "desc", "page_token": tokens[0]}
    assert len((await client.get("/v1/quotes", params={**base, "limit": 3})).json()["quotes"]) == 3
    for other in (
        {"symbols": random_symbol()},
        {"sort": "asc"},
        {"start": "2026-11-15"},
        {"page_token": tokens[0][:-2]},
    ):
        problem(await client.get("/v1/quotes", params={**base, **other}), 400, "invalid-page-token")


@pytest.mark.parametrize("per_symbol", [{}, {"limit_per_symbol": 3}])
@pytest.mark.parametrize("sort", ["asc", "desc"])
async def test_pages_of_quotes_a_nanosecond_apart(
    client: httpx.AsyncClient, sort: str, per_symbol: dict[str, int]
) -> None:
    symbols = sorted((random_symbol(), random_symbol()))
    stamps = [f"2026-11-16T00:00:00.{n:09d}Z" for n in (0, 1, 2, 999, 1000, 1001, 123_456_789)]
    await post(client, [{"symbol": s, "timestamp": at, "bid": 1} for at in stamps for s in symbols])
    query: dict[str, Any] = {
        "symbols": ",".join(symbols), "start": stamps[1], "end": stamps[-1], "sort": sort, "limit": 2, **per_symbol,
    }  # fmt: skip
    inside = stamps[1:-1] if sort == "asc" else stamps[-2:0:-1]
    expected = [(s, at) for s in symbols for at in inside[: per_symbol.get("limit_per_symbol")]]
    found: list[tuple[str, str]] = []
    while True:
        page = (await client.get("/v1/quotes", params=query)).json()
        found += [(q["symbol"], q["timestamp"]) for q in page["quotes"]]
        if page["next_page_token"] is None:
            break
        query["page_token"] = page["next_page_token"]
    assert found == expected
    bounds = {"start": stamps[1], "end": stamps[-1]}
    assert (await client.get("/v1/quotes/count", params={"symbols": symbols[0], **bounds})).json()["count"] == 5


async def test_latest_lists_what_is_missing(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol, 0), row(symbol, 1, 2)])
    unknown = random_symbol()
    found = (await client.get("/v1/quotes/latest", params={"symbols": f"{unknown},{symbol},{symbol}"})).json()
    assert [(q["symbol"], q["price"]) for q in found["quotes"]] == [(symbol, 2)]
    assert found["missing"] == [unknown]
    everything = (await client.get("/v1/quotes/latest")).json()
    assert symbol in [q["symbol"] for q in everything["quotes"]]


async def test_symbols_page_by_page(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol, 1), row(symbol, 3)])
    everything = (await client.get("/v1/symbols")).json()["symbols"]
    first, last = "2026-11-16T00:00:01.000000000Z", "2026-11-16T00:00:03.000000000Z"
    assert {"symbol": symbol, "first": first, "last": last} in everything
    names = [entry["symbol"] for entry in everything]
    assert names == sorted(names)
    paged: list[str] = []
    token: str | None = ""
    while token is not None:
        page = (await client.get("/v1/symbols", params={"limit": 7, **({"page_token": token} if token else {})})).json()
        paged += [entry["symbol"] for entry in page["symbols"]]
        token = page["next_page_token"]
    assert paged == names


async def test_daily_summary(client: httpx.AsyncClient, symbol: str) -> None:
    prices = ["10", "12.5", "8", "9"]
    await post(client, [row(symbol, i, p, volume=10 * i) for i, p in enumerate(prices)])
    await post(client, [row(symbol, i, None, bid=1, ask=i, volume=100) for i in range(11, 15)])
    query = {"symbols": symbol, "start": "2026-11-16"}
    found = (await client.get("/v1/summary/daily", params=query)).json()
    assert found["missing"] == []
    assert found["summaries"] == [
        {
            "symbol": symbol, "timestamp": "2026-11-16T00:00:00Z", "open": 10, "high": 12.5, "low": 8, "close": 9,
            "volume": 60, "vwap": 9.25, "count": 4, "range": 4.5, "change": -1, "change_percent": -10, "final": True,
        }
    ]  # fmt: skip
    for price, bounds in (("mid", (6, 7.5, 6, 7.5)), ("ask", (11, 14, 11, 14)), ("bid", (1, 1, 1, 1))):
        (line,) = (await client.get("/v1/summary/daily", params={**query, "price": price})).json()["summaries"]
        assert tuple(line[name] for name in ("open", "high", "low", "close")) == bounds
        assert (line["volume"], line["vwap"], line["count"]) == (400, sum(bounds) / 4, 4)


async def test_a_summary_of_prices_below_zero(client: httpx.AsyncClient, database: Database, symbol: str) -> None:
    """Such as those of crude oil on 2020-04-20; from an open below zero there is no change in per cent."""
    rows = [row(symbol, i, p, volume=v) for i, (p, v) in enumerate([(-37.63, 10), (0, 5), (10.01, 5), (-1, 20)])]
    assert (await post(client, rows, prices="signed")).json()["inserted"] == 4
    found = await client.get("/v1/summary/daily", params={"symbols": symbol, "start": "2026-11-16"})
    assert found.json()["summaries"] == [
        {
            "symbol": symbol, "timestamp": "2026-11-16T00:00:00Z", "open": -37.63, "high": 10.01, "low": -37.63,
            "close": -1, "volume": 40, "vwap": -8.65625, "count": 4, "range": 47.64, "change": 36.63,
            "change_percent": None, "final": True,
        }
    ]  # fmt: skip
    async with database.dedicated() as connection:
        if database.capability.level >= Level.COMMUNITY:
            for rollup in ("ohlc_1m", "ohlc_1h", "ohlc_1d"):
                await refresh(connection, rollup, T0, T0 + timedelta(days=1))
        line = await connection.fetchrow(
            "SELECT vwap, change, change_percent, count FROM quotes.daily_summary WHERE symbol = $1", symbol
        )
    assert line is not None
    assert tuple(line) == (Decimal("-8.65625"), Decimal("36.63"), None, 4)


# --- why there are no bars ---


async def missing_symbols(client: httpx.AsyncClient) -> dict[str, str]:
    """Of a day: a symbol of trades, one of quotes, one with a bid alone, one of another day, one of nobody."""
    names = dict(zip(("traded", "quoted", "one-sided", "elsewhere", "unknown"), sorted_symbols(5), strict=True))
    await post(
        client,
        [
            row(names["traded"], 1, 5), row(names["quoted"], 1, None, bid=1, ask=2),
            row(names["one-sided"], 1, None, bid=1),
            {"symbol": names["elsewhere"], "timestamp": "2026-11-18T12:00:00Z", "price": 1, "bid": 1, "ask": 2},
        ],
    )  # fmt: skip
    return names


def sorted_symbols(count: int) -> list[str]:
    return sorted(random_symbol() for _ in range(count))


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/ohlc", {"interval": "1m"}),
        ("/v1/ohlc", {"interval": "1d", "fill": "null"}),
        ("/v1/ohlc", {"interval": "7m"}),
        ("/v1/summary/daily", {}),
    ],
)
@pytest.mark.parametrize(
    ("price", "reasons"),
    [
        ("last", {"quoted": "no-trades", "one-sided": "no-trades"}),
        ("mid", {"traded": "no-quotes", "one-sided": "no-quotes"}),
        ("bid", {"traded": "no-quotes"}),
        ("ask", {"traded": "no-quotes", "one-sided": "no-quotes"}),
    ],
)
async def test_what_is_missing_has_a_reason(
    client: httpx.AsyncClient, path: str, more: dict[str, str], price: str, reasons: dict[str, str]
) -> None:
    names = await missing_symbols(client)
    reasons = {**reasons, "elsewhere": "nothing-in-range", "unknown": "unknown"}
    asked = [*names.values(), names["unknown"]]
    random.Random(4).shuffle(asked)
    query = {"symbols": ",".join(asked), "price": price, "start": "2026-11-16", "end": "2026-11-17", **more}
    answer = (await client.get(path, params=query)).json()
    assert answer["missing"] == [{"symbol": names[name], "reason": reasons[name]} for name in names if name in reasons]
    rows = answer["bars" if "bars" in answer else "summaries"]
    assert {row["symbol"] for row in rows} == {names[name] for name in names if name not in reasons}


@pytest.mark.parametrize("sort", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize("path", ["/v1/ohlc", "/v1/summary/daily"])
async def test_each_missing_symbol_is_told_on_one_page(
    client: httpx.AsyncClient, path: str, limit: int, sort: str
) -> None:
    symbols = sorted_symbols(9)
    has = {symbol: days for symbol, days in zip(symbols, (0, 2, 0, 0, 1, 3, 0, 1, 0), strict=True) if days}
    await post(
        client,
        [
            {"symbol": symbol, "timestamp": f"2026-11-{16 + day}T12:00:00Z", "price": 1}
            for symbol, days in has.items() for day in range(days)
        ],
    )  # fmt: skip
    query: dict[str, Any] = {
        "symbols": ",".join(symbols), "start": "2026-11-01", "end": "2026-12-01", "limit": limit, "sort": sort,
        **({"interval": "1d"} if path == "/v1/ohlc" else {}),
    }  # fmt: skip
    found: list[str] = []
    missing: list[str] = []
    while True:
        page = (await client.get(path, params=query)).json()
        bars = page["bars" if path == "/v1/ohlc" else "summaries"]
        found += [bar["symbol"] for bar in bars]
        missing += [entry["symbol"] for entry in page["missing"]]
        assert all(entry["reason"] == "unknown" for entry in page["missing"])
        if page["next_page_token"] is None:
            break
        assert all(symbol <= found[-1] for symbol in missing), "of what this page and those before it are done with"
        query["page_token"] = page["next_page_token"]
    assert found == [symbol for symbol, days in has.items() for _ in range(days)]
    assert missing == [symbol for symbol in symbols if symbol not in has]


async def test_a_reason_is_about_the_bars_that_start_in_the_range(client: httpx.AsyncClient) -> None:
    traded, quoted = sorted_symbols(2)
    await post(
        client,
        [
            {"symbol": traded, "timestamp": "2026-11-16T12:00:00.000000001Z", "price": 1},
            {"symbol": quoted, "timestamp": "2026-11-16T12:00:00.000000001Z", "bid": 1},
        ],
    )

    async def missing(start: str, end: str, interval: str = "1d", **more: str) -> dict[str, str]:
        query = {"symbols": f"{traded},{quoted}", "interval": interval, "start": start, "end": end, **more}
        answer = await client.get("/v1/ohlc", params=query)
        assert answer.status_code == 200, answer.text
        return {entry["symbol"]: entry["reason"] for entry in answer.json()["missing"]}

    nothing = {traded: "nothing-in-range", quoted: "nothing-in-range"}
    assert await missing("2026-11-16T01:00:00Z", "2026-11-16T23:00:00Z") == nothing, "no day starts in there"
    assert await missing("2026-11-16", "2026-11-16T01:00:00Z") == {quoted: "no-trades"}, "the whole day is asked for"
    assert await missing("2026-11-16T12:00:00Z", "2026-11-16T12:00:01Z", "1s") == {quoted: "no-trades"}
    assert await missing("2026-11-16T12:00:00.000000001Z", "2026-11-16T12:00:01Z", "1s") == nothing
    assert await missing("2026-11-02", "2026-11-30", "1M") == nothing
    assert await missing("2026-11-01", "2026-11-02", "1M") == {quoted: "no-trades"}
    night = {"tz": "America/New_York"}
    assert await missing("2026-11-16T00:00:00Z", "2026-11-16T05:00:00Z", **night) == nothing, "the day is from 05:00"
    assert await missing("2026-11-16T05:00:00.000000001Z", "2026-11-17T05:00:00Z", **night) == nothing
    assert await missing("2026-11-16T05:00:00Z", "2026-11-16T06:00:00Z", **night) == {quoted: "no-trades"}
    assert await missing("2026-11-16", "2026-11-16T06:00:00Z", **night) == {quoted: "no-trades"}, "of the zone"
    assert await missing("0001-01-01", "9999-12-31", "3650d", **night) == {quoted: "no-trades"}


async def test_deleting_needs_the_token_and_a_range(lane: Lane, symbol: str) -> None:
    path = f"/v1/quotes?symbol={symbol}&start=2026-11-16&end=2026-11-17"
    async with running(create_app(lane.make_settings())) as client:
        problem(await client.delete(path), 403, "forbidden")
    async with running(create_app(lane.make_settings(admin_token="s3cret"))) as client:
        await post(client, [row(symbol, i) for i in range(3)])
        problem(await client.delete(path), 403, "forbidden")
        problem(await client.delete(path, headers={"authorization": "Bearer guess"}), 403, "forbidden")
        problem(await client.delete(path, headers=[(b"authorization", b"Bearer \xe9")]), 403, "forbidden")
        token = {"authorization": "Bearer s3cret"}
        problem(await client.delete(f"/v1/quotes?symbol={symbol}", headers=token), 400, "invalid-request")
        reversed_ = f"/v1/quotes?symbol={symbol}&start=2026-11-17&end=2026-11-16"
        problem(await client.delete(reversed_, headers=token), 400, "invalid-request")
        after = f"/v1/quotes?symbol={symbol}&start=2026-11-16T00:00:01.000000001Z&end=2026-11-17"
        assert (await client.delete(after, headers=token)).json() == {"deleted": 1}
        (quote,) = (await client.get("/v1/quotes/latest", params={"symbols": symbol})).json()["quotes"]
        assert quote["timestamp"] == "2026-11-16T00:00:01.000000000Z"
        assert (await client.delete(path, headers=token)).json() == {"deleted": 2}
        latest = await client.get("/v1/quotes/latest", params={"symbols": symbol})
        assert latest.json() == {"quotes": [], "missing": [symbol]}


async def test_bars_of_a_time_zone(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol)])
    query = {"symbols": symbol, "interval": "1d", "start": "2026-11-14", "end": "2026-11-17"}
    found = (await client.get("/v1/ohlc", params={**query, "tz": "America/New_York"})).json()["bars"]
    assert [bar["timestamp"] for bar in found] == ["2026-11-15T05:00:00Z"]
    problem(await client.get("/v1/ohlc", params={**query, "tz": "Mars"}), 400, "invalid-request")
    problem(
        await client.get("/v1/ohlc", params={**query, "interval": "7h", "tz": "Asia/Tokyo"}), 400, "invalid-request"
    )


async def test_days_that_begin_in_the_evening(client: httpx.AsyncClient, symbol: str) -> None:
    """Currency days, over the night in which New York's clocks change; one quote an hour."""
    first = datetime(2025, 10, 30, 21, 30, tzinfo=UTC)
    await post(client, [row(symbol, first + timedelta(hours=n), n) for n in range(1, 98)])
    days = {"tz": "America/New_York", "day_start": "17:00"}
    query = {"symbols": symbol, "start": "2025-10-30", "end": "2025-11-05", **days}
    found = (await client.get("/v1/ohlc", params={**query, "interval": "1d"})).json()["bars"]
    assert [(bar["timestamp"], bar["count"]) for bar in found] == [
        ("2025-10-30T21:00:00Z", 23), ("2025-10-31T21:00:00Z", 24), ("2025-11-01T21:00:00Z", 25),
        ("2025-11-02T22:00:00Z", 24), ("2025-11-03T22:00:00Z", 1),
    ]  # fmt: skip
    hours = (await client.get("/v1/ohlc", params={**query, "interval": "12h"})).json()["bars"]
    assert [bar["count"] for bar in hours] == [11, 12, 12, 12, 12, 12, 1, 12, 12, 1]
    day = await client.get("/v1/quotes/intraday", params={"symbol": symbol, "date": "2025-11-02", **days})
    assert len(day.json()["quotes"]) == 25
    problem(await client.get("/v1/ohlc", params={**query, "interval": "7h", "tz": "UTC"}), 400, "invalid-request")


async def test_the_last_rows_of_each_symbol_wherever_they_lie(client: httpx.AsyncClient) -> None:
    """They traded years apart, with gaps of which each is longer than all that was traded."""
    long_ago, sparse, unknown = sorted_symbols(3)
    await post(client, [row(long_ago, datetime(1990, 3, 4, hour, tzinfo=UTC), hour + 1) for hour in range(9)])
    await post(client, [row(sparse, datetime(2000 + 5 * n, 3, 4, tzinfo=UTC), n + 1) for n in range(5)])
    query = {"symbols": f"{sparse},{unknown},{long_ago}", "interval": "1s"}
    for last in (1, 3, 5):
        page = (await client.get("/v1/ohlc", params={**query, "last": last})).json()
        assert [(bar["symbol"], bar["close"]) for bar in page["bars"]] == [
            *((long_ago, close) for close in range(10 - last, 10)), *((sparse, close) for close in range(6 - last, 6)),
        ]  # fmt: skip
        assert (page["next_page_token"], page["missing"]) == (None, [{"symbol": unknown, "reason": "unknown"}])
    before = (await client.get("/v1/ohlc", params={**query, "last": 2, "end": "2011-01-01"})).json()["bars"]
    assert [bar["close"] for bar in before] == [8, 9, 2, 3]
    days = await client.get("/v1/summary/daily", params={"symbols": query["symbols"], "last": 1})
    assert [day["count"] for day in days.json()["summaries"]] == [9, 1]
    named = {"symbols": query["symbols"]}
    quotes = (await client.get("/v1/quotes", params={**named, "last": 2})).json()
    assert [(found["symbol"], found["price"]) for found in quotes["quotes"]] == [
        (long_ago, 8), (long_ago, 9), (sparse, 4), (sparse, 5),
    ]  # fmt: skip
    assert quotes["next_page_token"] is None
    within = named | {"start": "2004-01-01", "end": "2011-01-01", "last": "3"}
    assert [found["price"] for found in (await client.get("/v1/quotes", params=named | within)).json()["quotes"]] == [
        2,
        3,
    ]
    for wrong in ({"sort": "desc"}, {"page_token": "x"}, {"last": 3334}, {"last": 0}):
        for path, given in (("/v1/ohlc", query), ("/v1/quotes", named)):
            answer = await client.get(path, params={**given, "last": 1, **wrong})
            assert [error["parameter"] for error in problem(answer, 400, "invalid-request")["errors"]] == ["last"]
    both = await client.get("/v1/quotes", params={**named, "last": 1, "limit_per_symbol": 1})
    assert problem(both, 400, "invalid-request")["errors"][0]["parameter"] == "limit_per_symbol"


async def test_a_date_begins_where_its_zone_has_it(client: httpx.AsyncClient, symbol: str) -> None:
    await post(client, [row(symbol, datetime(2026, 3, day, 12, tzinfo=UTC), day) for day in range(1, 8)])
    query = {"symbols": symbol, "interval": "1d", "start": "2026-03-02", "end": "2026-03-04"}
    for how, begins in (
        ({}, "2026-03-02T00:00:00Z"), ({"tz": "Asia/Tokyo"}, "2026-03-01T15:00:00Z"),
        ({"tz": "America/New_York", "day_start": "17:00"}, "2026-03-01T22:00:00Z"),
    ):  # fmt: skip
        bars = (await client.get("/v1/ohlc", params={**query, **how})).json()["bars"]
        assert [bar["close"] for bar in bars] == [2, 3]
        assert bars[0]["timestamp"] == begins
    plain = await client.get(f"/v1/ohlc?symbols={symbol}&interval=1d&tz=Etc/GMT+5&start=2026-03-02&end=2026-03-03")
    assert plain.json()["bars"][0]["timestamp"] == "2026-03-02T05:00:00Z"
    whole = {"start": "0001-01-01", "end": "9999-12-31", "tz": "Asia/Tokyo", "limit": "1"}
    page = (await client.get("/v1/ohlc", params={**query, **whole})).json()
    assert page["next_page_token"], "it can be told where a page goes on, though the range began before the calendar"
    last = await client.get("/v1/ohlc", params={**query, "start": "9999-12-31", "end": "9999-12-31", "tz": "Etc/GMT+5"})
    assert problem(last, 400, "invalid-request")["errors"][0]["parameter"] == "start"


async def test_gaps_are_filled_from_before_the_range_and_hide_nothing(client: httpx.AsyncClient) -> None:
    quiet, ahead = sorted_symbols(2)
    now = datetime.now(UTC)
    await post(client, [row(quiet, datetime(2001, 3, 4, tzinfo=UTC), 42)])
    await post(client, [row(ahead, now - timedelta(seconds=30), 1), row(ahead, now + timedelta(seconds=50), 2)])
    query = {"symbols": f"{quiet},{ahead}", "interval": "1s", "start": (now - timedelta(seconds=40)).isoformat()}
    for fill, closes in (("none", set()), ("null", set()), ("previous", {(42, 0)})):
        found = (await client.get("/v1/ohlc", params={**query, "fill": fill})).json()["bars"]
        assert [bar["close"] for bar in found if bar["count"]] == [1, 2]
        assert {(bar["close"], bar["count"]) for bar in found if bar["symbol"] == quiet} == closes
    assert len((await client.get("/v1/quotes", params={"symbols": ahead})).json()["quotes"]) == 2


@pytest.mark.parametrize(
    "date", ["0", "1741046400", "1741046400000", "20250304", "2025-03-04T00:00:00Z", "2025-03-04T00:00:00+09:00", ""]
)
async def test_a_day_is_a_date(client: httpx.AsyncClient, date: str) -> None:
    answer = await client.get("/v1/quotes/intraday", params={"symbol": "A", "date": date})
    assert [error["parameter"] for error in problem(answer, 400, "invalid-request")["errors"]] == ["date"]


async def test_a_date_that_the_clocks_skip_has_no_quotes(client: httpx.AsyncClient, symbol: str) -> None:
    answer = await client.get(
        "/v1/quotes/intraday", params={"symbol": symbol, "date": "2011-12-30", "tz": "Pacific/Apia"}
    )
    assert answer.json() == {"quotes": [], "next_page_token": None}


async def test_count_estimate(client: httpx.AsyncClient, symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await post(client, [row(symbol)])
    exact = {"symbols": symbol, "start": "2026-11-16", "end": "2026-11-17"}
    assert (await client.get("/v1/quotes/count", params=exact)).json() == {"count": 1, "exact": True}
    for wanted, count in ((exact, 1), ({"symbols": random_symbol()}, 0)):
        few = await client.get("/v1/quotes/count", params={**wanted, "estimate": True})
        assert few.json() == {"count": count, "exact": True}
    monkeypatch.setattr("app.repository.quotes.EXACT", 0)
    monkeypatch.setattr("app.api.quotes.EXACT", 0)
    many = (await client.get("/v1/quotes/count", params={**exact, "estimate": True})).json()
    assert (many["count"] >= 1, many["exact"]) == (True, False)


async def test_fifty_thousand_quotes_in_any_order(client: httpx.AsyncClient) -> None:
    """Random order, random batch sizes, duplicates: the table is the dict, pages are the whole, bars are polars'."""
    rng = random.Random(20261120)
    symbols = sorted(random_symbol() for _ in range(8))
    model: dict[tuple[str, int], dict[str, Any]] = {}
    posted = 0
    expected = {"inserted": 0, "updated": 0, "unchanged": 0, "superseded": 0}
    while posted < 50_000:
        size = min(rng.choice((1, 10, 500, 3000, 10_000)), 50_000 - posted)
        before = dict(model)
        rows = [_some_quote(rng, symbols) for _ in range(size)]
        model.update({(quote["symbol"], quote["timestamp"]): quote for quote in rows})
        sent = [{**quote, "timestamp": rfc3339_nano(quote["timestamp"])} for quote in rows]
        answer = await client.post("/v1/quotes", content=msgspec.json.encode(sent), headers=JSON)
        assert answer.status_code == 200, answer.text
        receipt = answer.json()
        keys = {(r["symbol"], r["timestamp"]) for r in rows}
        changed = sum(key in before and _values(before[key]) != _values(model[key]) for key in keys)
        want = {
            "inserted": len(model) - len(before),
            "updated": changed,
            "unchanged": sum(key in before for key in keys) - changed,
            "superseded": size - len(keys),
        }
        assert {name: receipt[name] for name in want} == want
        for name, value in want.items():
            expected[name] += value
        posted += size
    assert min(expected.values()) > 0, "the data exercises every outcome"

    span = {"symbols": ",".join(symbols), "start": "2026-11-01", "end": "2026-12-01"}
    found = await _all_pages(client, "/v1/quotes", {**span, "limit": "9973"})
    assert [(q["symbol"], parse(q["timestamp"])) for q in found] == sorted(model)
    assert [tuple(map(_decimal, _values(q))) for q in found] == [_values(model[key]) for key in sorted(model)]

    raw = [{"ask": None, **q} for q in model.values()]
    names = ("open", "high", "low", "close", "volume", "count")
    for interval in ("1m", "5m", "1h", "1d"):
        bars = await _all_pages(client, "/v1/ohlc", {**span, "interval": interval, "limit": "10000"})
        assert [
            (b["symbol"], datetime.fromisoformat(b["timestamp"]), *(_decimal(b[n]) for n in names)) for b in bars
        ] == [
            (b["symbol"], b["timestamp"], *(b[n] for n in names))
            for b in resample(raw, polars_every(interval), pl.col("price"))
        ]


def _some_quote(rng: random.Random, symbols: list[str]) -> dict[str, Any]:
    """A third falls on the first nanoseconds of a day with one of two values, the rest anywhere in five days."""
    repeats = rng.random() < 0.33
    quote: dict[str, Any] = {
        "symbol": rng.choice(symbols),
        "timestamp": N0 - 4 * DAY + (rng.randrange(7200) if repeats else rng.randrange(5 * DAY)),
        "price": Decimal(rng.randrange(1, 3) if repeats else rng.randrange(1, 10**7)).scaleb(-4),
        "bid": None if rng.random() < 0.5 else Decimal(2),
        "volume": Decimal(1) if repeats else Decimal(rng.randrange(1000)).scaleb(-3),
    }
    if quote["bid"] is not None and rng.random() < 0.3:
        quote["price"] = None
    return quote


async def _all_pages(client: httpx.AsyncClient, path: str, query: dict[str, str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while True:
        page = (await client.get(path, params=query)).json()
        rows += page["quotes" if path == "/v1/quotes" else "bars"]
        if page["next_page_token"] is None:
            return rows
        query = {**query, "page_token": page["next_page_token"]}


def _values(quote: dict[str, Any]) -> tuple[Any, ...]:
    return quote["price"], quote["bid"], quote["volume"]


def _decimal(value: float | None) -> Decimal | None:
    return None if value is None else Decimal(str(value))


# --- operations ---


async def test_openapi_names_operations_and_problems(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operations = {op["operationId"] for path in document["paths"].values() for op in path.values()}
    assert operations == {
        "ingest_quotes", "delete_quotes", "list_quotes", "latest_quotes", "intraday_quotes", "count_quotes",
        "list_bars", "list_daily_summaries", "list_symbols", "get_storage", "health", "live", "ready",
    }  # fmt: skip
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name
    assert "Problem" in document["components"]["schemas"]
    assert (await client.get("/docs")).status_code == 200


async def test_metrics_count_what_was_done(client: httpx.AsyncClient, symbol: str) -> None:
    def read(text: str) -> dict[str, float]:
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = read((await client.get("/metrics")).text)
    await post(client, [row(symbol), row(symbol, 0, 2)])
    await post(client, [row(symbol, 0, -1)])
    await client.get("/v1/quotes/latest", params={"symbols": symbol})
    after = read((await client.get("/metrics")).text)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew('quotes_ingest_rows_total{result="inserted"}') == 1
    assert grew('quotes_ingest_rows_total{result="superseded"}') == 1
    assert grew('quotes_ingest_rows_total{result="rejected"}') == 1
    assert grew('quotes_ingest_rejected_requests_total{reason="invalid-quotes"}') == 1
    assert grew('quotes_http_requests_total{code="200",handler="/v1/quotes/latest",method="GET"}') == 1
    assert grew("quotes_writer_flush_rows_count") == 1
    assert after["quotes_writer_queue_rows"] == 0
    assert not any("_created" in name for name in after)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/summary/daily?symbols={0}&end=9999-12-31",
        "/v1/ohlc?symbols={0}&interval=1d&start=9950-01-02&end=9999-12-31",
    ],
)
async def test_no_bars_are_at_the_end_of_the_calendar(client: httpx.AsyncClient, symbol: str, path: str) -> None:
    answer = await client.get(path.format(symbol))
    assert (answer.status_code, answer.json()["missing"]) == (200, [{"symbol": symbol, "reason": "unknown"}])
