"""Files reach the service exactly, within its limits, and a load that was cut off goes on where it was."""

import asyncio
import fcntl
import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import load
from app.client import Client
from app.clock import nanoseconds, parse, rfc3339_nano
from app.errors import InvalidRequest
from app.journal import Journal, State, Unwritable, held
from app.lines import Unreadable
from app.load import Converter, LoadOptions, LoadReport, column_map, match_columns
from app.quote.batch import Batch
from app.quote.terms import Limits, OnConflict, Receipt, Terms
from tests.conftest import Serve

DAILY = ",Open,High,Low,Close,Adj Close,Volume\n2004-08-19,100,104.06,95.96,100.340,50.1,22351900.0\n"


#: Nanoseconds of 2026-01-05T00:00Z.
MONDAY = nanoseconds(datetime(2026, 1, 5, tzinfo=UTC))


class Store:
    """A service of dictionaries, with the real rules of a quote; a row's key is its symbol and nanoseconds.

    `answered` has the receipts by their idempotency keys, `replayed` the keys of requests that came again.
    """

    def __init__(self, name: str = "store") -> None:
        self.name = name
        self.answered: dict[str, tuple[bytes, bytes]] = {}
        self.replayed: list[str] = []
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self.requests: list[list[dict[str, Any]]] = []
        self.delay: Callable[[int], float] = lambda _number: 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200, json={"store": self.name})
        named = request.headers["idempotency-key"]
        if (known := self.answered.get(named)) is not None:
            self.replayed.append(named)
            asked, receipt = known
            assert asked == str(request.url).encode() + request.content, "a key is of one request"
            return httpx.Response(200, content=receipt)
        rows = [msgspec.json.decode(line) for line in request.content.splitlines()]
        self.requests.append(rows)
        await asyncio.sleep(self.delay(len(self.requests)))
        params = request.url.params
        on_error: Any = params["on_error"]
        on_conflict: Any = params["on_conflict"]
        prices: Any = params.get("prices", "positive")
        limits = Limits.at(datetime.now(UTC), max_rows=100_000)
        terms = Terms(limits, on_error, on_conflict, prices=prices)
        batch = Batch.from_rows(rows, terms)
        inserted = updated = 0
        for row in batch.rows.to_pylist():
            key = (row["symbol"], nanoseconds(row["timestamp"]) + row["nanos"])
            stored = self.rows.get(key)
            if stored is not None and on_conflict == "merge":
                row = {name: stored[name] if value is None else value for name, value in row.items()}  # noqa: PLW2901
            inserted += stored is None
            updated += stored is not None and stored != row
            self.rows[key] = row
        receipt = msgspec.json.encode(
            batch.receipt(inserted=inserted, updated=updated, unchanged=len(batch) - inserted - updated)
        )
        self.answered[named] = str(request.url).encode() + request.content, receipt
        return httpx.Response(200, content=receipt)

    def prices(self, symbol: str, start: int = MONDAY) -> dict[int, str]:
        """Prices of a symbol by their nanosecond after `start`."""
        return {
            instant - start: f"{row['price'].normalize():f}"
            for (name, instant), row in sorted(self.rows.items())
            if name == symbol
        }

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)

    async def load(self, *files: Path, **options: Any) -> LoadReport:
        return await load.run(LoadOptions(files=files, **options), transport=self.transport)


REFUSAL = httpx.Response(400, json={"title": "Invalid request", "detail": "Enough."})


@pytest.fixture
def store() -> Store:
    return Store()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def ticks(count: int, *, bad: tuple[int, ...] = ()) -> str:
    """A CSV of a tick a second; the rows named in `bad` have a negative price."""
    start = datetime(2026, 1, 5, tzinfo=UTC)
    lines = [
        f"{(start + timedelta(seconds=n)).isoformat()},AAPL,{'-' if n in bad else ''}{n}.50"
        for n in range(1, count + 1)
    ]
    return "\n".join(["time,symbol,price", *lines, ""])


def rejects(path: Path) -> list[dict[str, Any]]:
    lines = path.with_name(path.name + ".rejects.ndjson").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


@pytest.mark.parametrize(
    ("names", "explicit", "expected"),
    [
        (["Symbol", "Time", "Last"], {}, {"symbol": 0, "timestamp": 1, "price": 2}),
        (["", "Open", "High", "Low", "Close", "Volume"], {}, {"timestamp": 0, "price": 4, "volume": 5}),
        (["Date", "Adj Close", "Close"], {}, {"timestamp": 0, "price": 2}),
        (["Date", "Adj Close"], {}, {"timestamp": 0, "price": 1}),
        (["", "ts", "price"], {}, {"timestamp": 1, "price": 2}),
        (["ticker", "ts", "bidsize", "asksize", "bid_price", "ask_price", "size"], {},
         {"symbol": 0, "timestamp": 1, "bid": 4, "ask": 5, "bid_size": 2, "ask_size": 3, "volume": 6}),
        (["Date", "Open", "Close"], {"price": "open"}, {"timestamp": 0, "price": 1}),
        (["Price", "Close"], {"timestamp": "Price"}, {"timestamp": 0, "price": 1}),
        (["Date", "Close", "Volume"], {"volume": ""}, {"timestamp": 0, "price": 1}),
        (["Date", "Ask"], {}, {"timestamp": 0, "ask": 1}),  # a side is enough
        (["Price", "Bid", "ts"], {"price": ""}, {"timestamp": 2, "bid": 1}),
    ],
)  # fmt: skip
def test_columns_are_found_by_their_names(names: list[str], explicit: dict[str, str], expected: dict[str, int]) -> None:
    assert match_columns(names, explicit) == expected


@pytest.mark.parametrize(
    ("names", "explicit", "message"),
    [
        (["Open", "Close"], {}, "--map timestamp=COLUMN"),
        (["Date", "Open"], {}, "--map price=COLUMN"),
        (["Date", "bid_size", "volume"], {}, "--map price=COLUMN"),
        (["Date", "Close"], {"price": ""}, "--map price=COLUMN"),
        (["Date", "Close"], {"price": "Mid"}, "no column 'Mid'"),
    ],
)
def test_columns_that_are_missing_are_named(names: list[str], explicit: dict[str, str], message: str) -> None:
    with pytest.raises(Unreadable, match=message):
        match_columns(names, explicit)


def test_a_mapping_is_read_or_refused() -> None:
    assert column_map(["price=Adj Close", "Volume="]) == {"price": "Adj Close", "volume": ""}
    for wrong in ("price", "open=Open", "=Close"):
        with pytest.raises(InvalidRequest):
            column_map([wrong])


@pytest.mark.parametrize(
    ("value", "tz", "expected"),
    [
        ("2026-01-05T09:30:00Z", None, "2026-01-05T09:30:00.000000000Z"),
        ("2026-01-05 09:30:00.123456789-05:00", "Asia/Tokyo", "2026-01-05T14:30:00.123456789Z"),
        ("2026-01-05T09:30:00.1234567Z", None, "2026-01-05T09:30:00.123456700Z"),
        ("2026-01-05T09:30:00.12345678900Z", None, "2026-01-05T09:30:00.123456789Z"),
        ("2026-01-05T09:30:00,123456789Z", None, "2026-01-05T09:30:00.123456789Z"),
        ("20260105T093000.123456789", "Asia/Tokyo", "2026-01-05T00:30:00.123456789Z"),
        ("1969-12-31T23:59:59.999999999Z", None, "1969-12-31T23:59:59.999999999Z"),
        ("2026-01-05 09:30:00 UTC", None, "2026-01-05T09:30:00.000000000Z"),
        ("2026-01-05 09:30", "America/New_York", "2026-01-05T14:30:00.000000000Z"),
        ("2026-07-05 09:30", "America/New_York", "2026-07-05T13:30:00.000000000Z"),
        ("2026-01-05", "America/New_York", "2026-01-05T05:00:00.000000000Z"),
        ("20260105", "UTC", "2026-01-05T00:00:00.000000000Z"),
        (date(2026, 1, 5), "UTC", "2026-01-05T00:00:00.000000000Z"),
        (datetime(2026, 1, 5, 9, 30), "Asia/Tokyo", "2026-01-05T00:30:00.000000000Z"),  # noqa: DTZ001
        ("2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00:00.000000000Z"),  # a day without a midnight
        ("", "UTC", "field-missing"),
        (None, "UTC", "field-missing"),
        ("NaT", "UTC", "field-missing"),
        ("2026-01-05 09:30", None, "timestamp-naive"),
        ("2026-01-05", None, "timestamp-naive"),
        ("2026-11-01 01:30", "America/New_York", "timestamp-ambiguous"),
        ("2026-03-08 02:30", "America/New_York", "timestamp-ambiguous"),
        ("2026-01-05T09:30:00.1234567891Z", None, "timestamp-too-fine"),
        ("2026-01-05T09:30:00,123456789012Z", None, "timestamp-too-fine"),
        ("2016-12-31T23:59:60Z", None, "timestamp-leap-second"),
        ("01/05/2026", "UTC", "timestamp-invalid"),
        ("1700000000", "UTC", "timestamp-invalid"),
        ("2012010110000", "UTC", "timestamp-invalid"),
        (1_700_000_000, "UTC", "timestamp-invalid"),
        ("0001-01-01", "Asia/Tokyo", "timestamp-invalid"),
    ],
)
def test_times_become_utc_or_are_refused(value: object, tz: str | None, expected: str) -> None:
    converter = Converter(symbol="X", tz=tz, source=None)
    row = {"timestamp": value}
    if not expected.endswith("Z"):
        with pytest.raises(load._Fault) as caught:
            converter.quote(row, *converter.place(row))
        assert caught.value.code == expected
        return
    symbol, instant = converter.place(row)
    assert instant == parse(expected)
    assert converter.quote(row, symbol, instant)["timestamp"] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("22351900.0", "22351900.0"),
        ("2.23519E+7", "2.23519E+7"),
        ("0.00012345", "0.00012345"),
        (" 7 ", "7"),
        ("", None),
        ("NaN", None),
        (None, None),
        (12, 12),
        ("twelve", "twelve"),
        ("1e400", "1e400"),
        ("inf", "inf"),
        ("-3", "-3"),
    ],
)
def test_numbers_are_the_service_s_to_judge(value: object, expected: object) -> None:
    row = {"timestamp": "2026-01-05T00:00Z", "volume": value, "price": value}
    converter = Converter(symbol="X", tz=None, source=None)
    quote = converter.quote(row, *converter.place(row))
    assert quote.get("volume") == quote.get("price") == expected


async def test_daily_bars_arrive_exactly(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = await store.load(write(tmp_path / "goog.csv", DAILY), tz="UTC", source="test")
    (sent,) = store.requests
    assert sent == [
        {
            "symbol": "GOOG",
            "timestamp": "2004-08-19T00:00:00.000000000Z",
            "price": "100.340",
            "volume": "22351900.0",
            "source": "test",
        }
    ]
    (file,) = report.files
    assert (file.status, file.rows, file.totals.inserted, file.failure) == ("loaded", 1, 1, None)
    assert file.ignored_columns == ["Adj Close", "High", "Low", "Open"]
    assert file.rejects is None
    out, err = capsys.readouterr()
    assert "ignored columns: 'Adj Close', 'High', 'Low', 'Open'" in err
    assert "goog.csv" in out


async def test_all_formats_load_the_same(tmp_path: Path) -> None:
    rows = [
        {"ticker": f"S{n % 3}", "time": f"2026-01-05T09:30:{n:02d}+00:00", "last": n + 0.1, "size": n, "x": None}
        for n in range(50)
    ]
    frame = pl.DataFrame(rows).with_columns(pl.col("time").str.to_datetime(time_zone="UTC"))
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    write(tmp_path / "a.jsonl", text)
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress(text.encode()))
    frame.write_csv(tmp_path / "c.csv")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(frame.write_csv(separator=";").encode()))
    frame.write_parquet(tmp_path / "e.parquet")
    shutil.copy(tmp_path / "e.parquet", tmp_path / "f.dat")
    stored = []
    for name in ("a.jsonl", "b.ndjson.gz", "c.csv", "d.csv.gz", "e.parquet"):
        store = Store()
        report = await store.load(tmp_path / name, batch_size=20)
        assert report.files[0].totals.inserted == 50, name
        assert report.files[0].ignored_columns == ["x"]
        stored.append(store.rows)
    assert all(other == stored[0] for other in stored)
    assert stored[0]["S1", parse("2026-01-05T09:30:01Z")]["price"] == Decimal("1.1")
    assert (await Store().load(tmp_path / "f.dat")).failed == 1
    assert (await Store().load(tmp_path / "f.dat", format="parquet")).files[0].totals.inserted == 50


async def test_parquet_values_are_what_people_see(store: Store, tmp_path: Path) -> None:
    moment = datetime(2026, 1, 5, 9, 30)  # noqa: DTZ001
    table = pa.table(
        {
            "price": pa.array([1.1, None, 3.3], pa.float32()),
            "bid": pa.array([Decimal("1.05000000"), Decimal("2.00000001"), None], pa.decimal128(20, 8)),
            "ask": pa.array([1e-5, 2.5, float("nan")], pa.float64()),
            "volume": pa.array([7.0, None, float("nan")], pa.float64()),
            "source": pa.array(["a", "b", "a"]).dictionary_encode(),
            "__index_level_0__": pa.array([moment, moment + timedelta(seconds=1), None], pa.timestamp("ns")),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    report = await store.load(tmp_path / "x.parquet", tz="America/New_York")
    assert store.requests == [
        [
            {"symbol": "X", "timestamp": "2026-01-05T14:30:00.000000000Z", "price": "1.1", "bid": "1.05000000",
             "ask": "0.00001", "volume": "7", "source": "a"},
            {"symbol": "X", "timestamp": "2026-01-05T14:30:01.000000000Z", "bid": "2.00000001", "ask": "2.5",
             "source": "b"},
        ]
    ]  # fmt: skip
    assert report.rejected == 1
    assert rejects(tmp_path / "x.parquet")[0]["code"] == "field-missing"


async def test_rows_without_a_symbol_do_not_get_one_where_others_have(store: Store, tmp_path: Path) -> None:
    lines = '{"symbol":"A","ts":"2026-01-05T00:00Z","price":1}\n{"ts":"2026-01-05T00:00Z","price":2}\n'
    report = await store.load(write(tmp_path / "mixed.jsonl", lines))
    assert report.rejected == 1
    assert rejects(tmp_path / "mixed.jsonl") == [
        {"row": 2, "line": 2, "code": "field-missing", "detail": "The field is required.",
         "quote": {"timestamp": "2026-01-05T00:00:00.000000000Z", "price": 2}}
    ]  # fmt: skip
    assert (await store.load(write(tmp_path / "spot.jsonl", lines[lines.index("\n") + 1 :]))).rejected == 0
    assert ("SPOT", MONDAY) in store.rows


@given(
    days=st.lists(st.integers(0, 900), max_size=1500),
    size=st.integers(1, 1000),
    skip=st.integers(0, 50),
)
def test_no_request_breaks_a_limit_and_no_row_is_lost(days: list[int], size: int, skip: int) -> None:
    skip = min(skip, len(days))
    start = datetime(2020, 1, 1, tzinfo=UTC)
    rows = [{"timestamp": (start + timedelta(days=day)).isoformat() if day % 7 else "?"} for day in days]
    source = load._Source(iter(rows), lambda row: row, len(rows), lambda: 0, [], set())
    seen: list[int] = []
    end = skip
    for chunk in load.chunks(source, Converter(symbol="X", tz=None, source=None), size=size, skip=skip):
        taken = sorted(chunk.rows + [row for row, _ in chunk.refused])
        assert len(taken) <= size
        assert len({days[row - 1] for row in chunk.rows}) <= load.MAX_DAYS
        assert len(chunk.rows) == len(chunk.lines)
        if taken:
            assert taken == list(range(end + 1, chunk.end + 1))
            end = chunk.end
        seen += taken
    assert seen == list(range(skip + 1, len(days) + 1))


def test_no_request_has_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_BYTES", 1000)
    rows = [{"timestamp": "2026-01-05", "price": "1", "source": "s" * (n % 37)} for n in range(300)]
    source = load._Source(iter(rows), lambda row: row, len(rows), lambda: 0, [], set())
    cut = list(load.chunks(source, Converter(symbol="X", tz="UTC", source=None), size=10_000))
    assert [row for chunk in cut for row in chunk.rows] == list(range(1, 301))
    sizes = [len(b"".join(line + b"\n" for line in chunk.lines)) for chunk in cut]
    assert max(sizes) <= 1000
    assert min(sizes[:-1]) > 800, "nor are they cut without need"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([("A", 1), ("A", 3)], [("A", 3), ("A", 5)], True),
        ([("A", 1), ("A", 3)], [("A", 4), ("A", 5)], False),
        ([("A", 1), ("A", 9)], [("A", 4)], True),
        ([("A", 1)], [("A", 1)], True),
        ([("A", 1)], [("B", 1)], False),
        ([("A", 1), ("B", 7)], [("A", 2), ("B", 7)], True),
        ([("A", 1), ("B", 7)], [("A", 2), ("B", 6)], False),
        ([("A", 1)], [], False),
    ],
)
def test_requests_that_may_hold_one_key_are_known(
    one: list[tuple[str, int]], other: list[tuple[str, int]], expected: bool
) -> None:
    chunks = []
    for quotes in (one, other):
        chunk = load.Chunk()
        for symbol, instant in quotes:
            chunk.add(1, None, b"{}", symbol, instant)
        chunks.append(chunk)
    assert [chunks[0].overlaps(chunks[1]), chunks[1].overlaps(chunks[0])] == [expected] * 2


async def test_years_of_days_are_split(store: Store, tmp_path: Path) -> None:
    lines = [f"{date(2000, 1, 1) + timedelta(days=n)},{n + 1}" for n in range(1000)]
    report = await store.load(write(tmp_path / "old.csv", "\n".join(["date,close", *lines])), tz="UTC")
    assert [len(rows) for rows in store.requests] == [366, 366, 268]
    assert report.files[0].totals.inserted == 1000


async def test_with_ties_replaced_the_last_of_equal_keys_wins_across_requests(store: Store, tmp_path: Path) -> None:
    random.seed(5)
    store.delay = lambda _number: random.random() / 200
    lines = [f"2026-01-05T00:00:{n % 7:02d}Z,{'abc'[n % 3]},{n + 1}" for n in range(200)]
    path = write(tmp_path / "same.csv", "\n".join(["time,symbol,price", *lines]))
    report = await store.load(path, batch_size=5, ties="replace")
    assert report.files[0].totals.numbered == 0
    expected: dict[tuple[str, int], int] = {}
    for n in range(200):
        expected["ABC"[n % 3], MONDAY + n % 7 * 10**9] = n + 1
    assert {key: row["price"] for key, row in store.rows.items()} == expected


# --- ties ---

Ticks = list[tuple[str, int]]


def tick_file(path: Path, rows: Ticks) -> Path:
    """A CSV of ticks, each a symbol and the nanoseconds after `MONDAY`; prices count the rows from 1."""
    lines = [f"{rfc3339_nano(MONDAY + at)},{symbol},{n}" for n, (symbol, at) in enumerate(rows, 1)]
    return write(path, "\n".join(["time,symbol,price", *lines, ""]))


def numbered_at_once(rows: Ticks) -> dict[tuple[str, int], str]:
    """What the table holds of a file: its rows by time, those of one instant as the file runs, each on a free key."""
    steps: dict[str, int] = {}
    before: dict[str, int] = {}
    for symbol, at in rows:
        last = before.get(symbol, at)
        steps[symbol] = steps.get(symbol, 0) + (at > last) - (at < last)
        before[symbol] = at
    table: dict[tuple[str, int], str] = {}
    for symbol, of_symbol in steps.items():
        found = [(at, n) for n, (name, at) in enumerate(rows, 1) if name == symbol]
        if (of_symbol or sum(steps.values())) < 0:
            found.reverse()
        free = -1
        for at, n in sorted(found, key=itemgetter(0)):
            free = max(at, free + 1)
            table[symbol, free] = str(n)
    return table


def table_of(store: Store) -> dict[tuple[str, int], str]:
    return {(symbol, at): price for symbol, _ in store.rows for at, price in store.prices(symbol).items()}


def moved(rows: Ticks, table: dict[tuple[str, int], str]) -> int:
    """How many rows have another instant than in the file."""
    return sum(rows[int(n) - 1][1] != at for (_, at), n in table.items())


FILES: dict[str, tuple[Ticks, dict[int, str]]] = {
    "forward": (
        [("A", 0), ("A", 0), ("A", 0), ("A", 1000), ("A", 1000)],
        {0: "1", 1: "2", 2: "3", 1000: "4", 1001: "5"},
    ),
    "backward": (
        [("A", 1000), ("A", 1000), ("A", 0), ("A", 0), ("A", 0)],
        {0: "5", 1: "4", 2: "3", 1000: "2", 1001: "1"},
    ),
    "in neither order": (
        [("A", 0), ("A", 1000), ("A", 0), ("A", 2000), ("A", 0)],
        {0: "1", 1: "3", 2: "5", 1000: "2", 2000: "4"},
    ),
    "backward but for a row": (
        [("A", 3000), ("A", 2000), ("A", 2000), ("A", 2500), ("A", 1000), ("A", 1000), ("A", 0)],
        {0: "7", 1000: "6", 1001: "5", 2000: "3", 2001: "2", 2500: "4", 3000: "1"},
    ),
    "forward without room": (
        [("A", 0), ("A", 0), ("A", 1), ("A", 1), ("A", 2), ("A", 9)],
        {0: "1", 1: "2", 2: "3", 3: "4", 4: "5", 9: "6"},
    ),
    "backward without room": (
        [("A", 9), ("A", 2), ("A", 1), ("A", 1), ("A", 0), ("A", 0)],
        {0: "6", 1: "5", 2: "4", 3: "3", 4: "2", 9: "1"},
    ),
    "in neither order without room": (
        [("A", 1), ("A", 0), ("A", 2), ("A", 0), ("A", 9), ("A", 1), ("A", 10)],
        {0: "2", 1: "4", 2: "1", 3: "6", 4: "3", 9: "5", 10: "7"},
    ),
    "a single instant": ([("A", 5), ("A", 5), ("A", 5)], {5: "1", 6: "2", 7: "3"}),
    "a single instant beside rows that run forward": (
        [("B", 1), ("A", 5), ("B", 2), ("A", 5)],
        {5: "2", 6: "4"},
    ),
    "a single instant beside rows that run backward": (
        [("B", 2), ("A", 5), ("B", 1), ("A", 5)],
        {5: "4", 6: "2"},
    ),
    "beside a symbol that runs backward": (
        [("A", 0), ("B", 7), ("B", 7), ("A", 0), ("B", 3), ("A", 4)],
        {0: "1", 1: "4", 4: "6"},
    ),
    "before 1970": (
        [("A", -MONDAY - 1), ("A", -MONDAY - 1), ("A", -MONDAY)],
        {-MONDAY - 1: "1", -MONDAY: "2", -MONDAY + 1: "3"},
    ),
}


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
@pytest.mark.parametrize("name", FILES)
async def test_rows_of_one_instant_are_numbered_over_the_whole_file(
    store: Store, tmp_path: Path, name: str, batch_size: int
) -> None:
    rows, expected = FILES[name]
    path = tick_file(tmp_path / "ticks.csv", rows)
    report = await store.load(path, batch_size=batch_size)
    assert store.prices("A") == expected
    assert report.files[0].totals.numbered == moved(rows, table_of(store)) > 0
    assert report.files[0].totals.inserted == len(rows)

    again = await store.load(path, batch_size=batch_size, resume=False)
    assert again.files[0].totals.unchanged == len(rows)
    assert again.files[0].totals.numbered == report.files[0].totals.numbered


ticks_in_any_order = st.lists(st.tuples(st.sampled_from("AAB"), st.integers(0, 12)), min_size=1, max_size=60)


@given(
    rows=ticks_in_any_order,
    order=st.sampled_from(["as they come", "forward", "backward", "nearly backward"]),
    size=st.integers(1, 20),
    cut=st.integers(0, 10),
)
def test_in_any_order_and_any_batches_the_table_is_that_of_the_file_numbered_at_once(
    rows: Ticks, order: str, size: int, cut: int
) -> None:
    if order != "as they come":
        rows = sorted(rows, key=itemgetter(1), reverse=order != "forward")
    if order == "nearly backward":
        rows[len(rows) // 2], rows[-1] = rows[-1], rows[len(rows) // 2]
    raw = [
        {"symbol": symbol, "timestamp": rfc3339_nano(MONDAY + at), "price": n} for n, (symbol, at) in enumerate(rows, 1)
    ]
    converter = Converter(symbol=None, tz=None, source=None)

    def read(size: int, skip: int) -> list[load.Chunk]:
        numbers = load._Numbers()
        for row in raw:
            numbers.see(*converter.place(row))
        if not numbers.end():
            for row in raw:
                numbers.collect(*converter.place(row))
            numbers.settle()
        source = load._Source(iter(raw), lambda row: row, len(raw), lambda: 0, [], set())
        return list(load.chunks(source, converter, size=size, skip=skip, numbers=numbers))

    # Cut off after some batches, and gone on with in batches of another size.
    chunks = read(size, 0)[:cut]
    chunks += read(size + 3, max((chunk.end for chunk in chunks), default=0))
    sent = [msgspec.json.decode(line) for chunk in chunks for line in chunk.lines]
    assert len(sent) == len(rows)
    table = {(quote["symbol"], parse(quote["timestamp"]) - MONDAY): str(quote["price"]) for quote in sent}
    assert table == numbered_at_once(rows)
    assert sum(len(chunk.numbered) for chunk in chunks) == moved(rows, table)


@pytest.mark.parametrize("order", ["forward", "backward", "any"])
async def test_a_load_that_was_cut_off_within_a_tie_gives_the_same_numbers(tmp_path: Path, order: str) -> None:
    rows = [("AB"[n % 2], n // 20 * 3) for n in range(200)]  # ten of a symbol at each instant, three apart
    if order == "backward":
        rows.reverse()
    if order == "any":
        random.Random(3).shuffle(rows)
    path = tick_file(tmp_path / "ticks.csv", rows)
    store, at_once = Store(), Store()
    await at_once.load(path, state=tmp_path / "other.json")
    assert table_of(at_once) == numbered_at_once(rows)

    runs = 0
    while True:
        left = 3

        async def failing(request: httpx.Request) -> httpx.Response:
            nonlocal left
            left -= request.method == "POST"
            return REFUSAL if left < 0 else await store(request)

        report = await load.run(LoadOptions(files=[path], batch_size=7), transport=httpx.MockTransport(failing))
        runs += 1
        if not report.failed:
            break
    assert runs > 5
    assert store.rows == at_once.rows
    assert report.files[0].totals.inserted == len(rows)
    assert report.files[0].totals.numbered == moved(rows, table_of(store))


async def test_a_symbol_is_one_however_it_is_written(store: Store, tmp_path: Path) -> None:
    rows = [(symbol, 0) for symbol in ("brk b", "BRK B", "Brk  B", " BRK B ")]
    await store.load(tick_file(tmp_path / "ticks.csv", rows))
    assert store.prices("BRK B") == {0: "1", 1: "2", 2: "3", 3: "4"}


async def test_numbered_rows_are_told(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["time,symbol,price", *["2026-01-05T00:00Z,A,1"] * 3, "2026-01-05T00:00Z,A,-1", "2026-01-05T00:01Z,A,1"]
    path = write(tmp_path / "ticks.csv", "\n".join(lines))
    report = await store.load(path, json=True)
    assert report.files[0].totals.numbered == 2  # and not the one that was refused
    told = msgspec.json.decode(capsys.readouterr().out)
    assert (told["files"][0]["totals"]["numbered"], told["rejected"]) == (2, 1)
    await store.load(path, resume=False)
    assert " numbered " in capsys.readouterr().out
    await store.load(path, resume=False, ties="replace")
    assert " numbered " not in capsys.readouterr().out


async def test_a_row_without_a_place_takes_no_number(store: Store, tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.csv",
        "time,price\n2026-01-05T00:00Z,1\n?,2\n1500-01-01T00:00Z,3\n1500-01-01T00:00Z,4\n2026-01-05T00:00Z,5,5\n"
        "2026-01-05T00:00Z,6\n9999-12-31T23:59:59Z,7\n",
    )
    assert (await store.load(path, batch_size=2)).rejected == 5
    assert store.prices("X") == {0: "1", 1: "6"}
    assert [(row["row"], row["code"]) for row in rejects(path)] == [
        (2, "timestamp-invalid"),
        (3, "timestamp-too-old"),
        (4, "timestamp-too-old"),
        (5, "row-ragged"),
        (7, "timestamp-in-future"),
    ]
    assert rejects(path)[1]["quote"]["timestamp"] == rejects(path)[2]["quote"]["timestamp"]


# --- what a row may be ---


async def test_files_of_one_side_each_are_merged(store: Store, tmp_path: Path) -> None:
    moment = "2026-01-05T00:00:00"
    bids = write(
        tmp_path / "bid.csv", f"time,bid,bid_size\n{moment}.1Z,1.5,0.25\n{moment}.1Z,1.6,2\n{moment}.2Z,1.7,1\n"
    )
    asks = write(tmp_path / "ask.csv", f"time,ask,ask_size\n{moment}.1Z,2.5,1e-12\n{moment}.3Z,2.75,3\n")
    await store.load(bids, asks, symbol="X", on_conflict="merge")
    rows = {
        at - MONDAY: [row[name] for name in ("price", "bid", "ask", "bid_size", "ask_size", "volume")]
        for (_, at), row in store.rows.items()
    }
    assert rows == {
        100_000_000: [None, Decimal("1.5"), Decimal("2.5"), Decimal("0.25"), Decimal("1e-12"), None],
        100_000_001: [None, Decimal("1.6"), None, Decimal(2), None, None],
        200_000_000: [None, Decimal("1.7"), None, Decimal(1), None, None],
        300_000_000: [None, None, Decimal("2.75"), None, Decimal(3), None],
    }
    again = await store.load(asks, bids, symbol="X", on_conflict="merge", resume=False)
    assert [file.totals.unchanged for file in again.files] == [2, 3]


async def test_prices_of_zero_and_below_are_taken_as_asked_for(store: Store, tmp_path: Path) -> None:
    lines = (
        "time,price,bid,ask\n2026-01-05T00:00:01Z,0,1,2\n2026-01-05T00:00:02Z,-37.63,,\n2026-01-05T00:00:03Z,0,0,0\n"
    )
    path = write(tmp_path / "cl.csv", lines)
    report = await store.load(path, prices="positive")
    assert [row["code"] for row in rejects(path)] == ["price-not-positive", "price-not-positive"]
    assert report.files[0].totals.zeros == 1
    assert [row["price"] for row in store.rows.values()] == [None]
    signed = Store()
    assert (await signed.load(path, prices="signed")).rejected == 0
    assert list(signed.prices("CL").values()) == ["0", "-37.63", "0"]


async def test_nanoseconds_arrive_from_every_format(tmp_path: Path) -> None:
    instants = [MONDAY + n for n in (0, 1, 1, 999, 1000, 123_456_789)]
    expected = {0: "1", 1: "2", 2: "3", 999: "4", 1000: "5", 123_456_789: "6"}
    prices = [str(n) for n in range(1, 7)]
    texts = [rfc3339_nano(instant) for instant in instants]
    local = [rfc3339_nano(instant + 9 * 3600 * 10**9).removesuffix("Z").replace("T", " ") for instant in instants]
    write(tmp_path / "a.csv", "\n".join(["time,price", *map(",".join, zip(texts, prices, strict=True))]))
    write(tmp_path / "b.csv", "\n".join(["time,price", *map(",".join, zip(local, prices, strict=True))]))
    write(
        tmp_path / "c.ndjson", "\n".join(json.dumps({"ts": t, "last": p}) for t, p in zip(texts, prices, strict=True))
    )
    zoned = pa.array(instants, pa.timestamp("ns", "America/New_York"))
    naive = pa.array([instant + 9 * 3600 * 10**9 for instant in instants], pa.timestamp("ns"))
    pq.write_table(pa.table({"time": zoned, "price": prices}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"__index_level_0__": naive, "price": prices}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"time": texts, "price": prices}), tmp_path / "f.parquet")
    for name in ("a.csv", "b.csv", "c.ndjson", "d.parquet", "e.parquet", "f.parquet"):
        store = Store()
        report = await store.load(tmp_path / name, symbol="X", tz="Asia/Tokyo")
        assert (report.failed, report.rejected) == (0, 0), name
        assert store.prices("X") == expected, name


async def test_times_of_parquet_without_a_zone_are_refused_by_their_row(store: Store, tmp_path: Path) -> None:
    days = pa.array([0, 10**9, None], pa.int64()).cast(pa.timestamp("s"))
    far = pa.array([10**14, MONDAY // 10**9, 0], pa.timestamp("s"))
    pq.write_table(pa.table({"time": days, "price": [1, 2, 3]}), tmp_path / "x.parquet", version="2.6")
    await store.load(tmp_path / "x.parquet")
    assert [(row["code"], row["quote"]["timestamp"]) for row in rejects(tmp_path / "x.parquet")] == [
        ("timestamp-naive", "1970-01-01T00:00:00.000000000"),
        ("timestamp-naive", "2001-09-09T01:46:40.000000000"),
        ("field-missing", None),
    ]
    pq.write_table(pa.table({"time": far, "price": [1, 2, 3]}), tmp_path / "y.parquet")
    assert (await store.load(tmp_path / "y.parquet", tz="UTC")).rejected == 1
    assert rejects(tmp_path / "y.parquet")[0]["code"] == "timestamp-invalid"
    assert store.prices("Y") == {0: "2", -MONDAY: "3"}


async def test_refused_rows_are_listed_with_their_place_in_the_file(store: Store, tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.csv",
        "timestamp,symbol,price,volume\n"
        "2026-01-05T00:00:00Z,A,1,1\n"
        "2026-01-05T00:00:01,A,1,1\n"
        "\n"
        "2026-01-05T00:00:02Z,A,-1,1\n"
        "2026-01-05T00:00:03Z,A,1\n"
        "2026-01-05T00:00:04Z,A,1,-1.5\n"
        "2026-01-05T00:00:05Z,A?B,1,1\n"
        '2026-01-05T00:00:06Z,"A",NaN,1\n'
        "2026-01-05T00:00:07Z,A,2,1\n",
    )
    report = await store.load(path)
    assert len(store.rows) == 2
    assert report.rejected == 6
    assert report.failed == 0
    assert [(reject["row"], reject["code"]) for reject in rejects(path)] == [
        (2, "timestamp-naive"),
        (3, "price-not-positive"),
        (4, "row-ragged"),
        (5, "size-negative"),
        (6, "symbol-invalid"),
        (7, "price-missing"),
    ]
    assert rejects(path)[1]["quote"] == {
        "symbol": "A", "timestamp": "2026-01-05T00:00:02.000000000Z", "price": "-1", "volume": "1",
    }  # fmt: skip
    assert rejects(path)[3]["quote"]["volume"] == "-1.5"


async def test_lines_that_are_no_quote_are_listed(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "x.ndjson", '{"ts":"2026-01-05","price":1}\n{"ts":\n[1]\n{"ts":"2026-01-06","price":1}')
    assert (await store.load(path, tz="UTC")).rejected == 2
    assert [(r["row"], r["code"], r["quote"]) for r in rejects(path)] == [
        (2, "malformed-line", {"line": '{"ts":'}),
        (3, "not-an-object", {"line": "[1]"}),
    ]


async def test_a_load_that_was_cut_off_goes_on(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ticks.csv", ticks(1000, bad=(50, 150, 350, 750)))
    store.delay = lambda number: 0.05 if number == 5 else 0
    original = store.__call__

    async def failing(request: httpx.Request) -> httpx.Response:
        refuses = request.method == "POST" and len(store.requests) >= 5
        return REFUSAL if refuses else await original(request)

    options = LoadOptions(files=[path], batch_size=100)
    first = await load.run(options, transport=httpx.MockTransport(failing))
    assert first.failed == 1
    assert "Enough." in (first.files[0].failure or "")
    done = first.files[0].rows
    assert done % 100 == 0
    assert done >= 100
    known = len(rejects(path))
    # A reject whose batch was not recorded any more.
    with path.with_name("ticks.csv.rejects.ndjson").open("ab") as file:
        file.write(b'{"row":999')
    before = len(store.requests)
    second = await load.run(options, transport=store.transport)
    (report,) = second.files
    assert (report.status, report.rows, report.resumed_after) == ("loaded", 1000, done)
    assert len(store.requests) - before == 10 - done // 100
    assert store.requests[before][0]["price"] == f"{done + 1}.50"
    assert [reject["row"] for reject in rejects(path)] == [50, 150, 350, 750]
    assert known <= 4
    assert report.totals.rejected == 4
    assert len(store.rows) == 996
    assert f"continuing after row {done}" in capsys.readouterr().err

    third = await store.load(path, batch_size=100, json=True)
    assert (third.files[0].status, third.rejected, third.failed) == ("already loaded", 4, 0)
    assert len(store.requests) - before == 10 - done // 100
    out, err = capsys.readouterr()
    assert "already loaded" in err
    assert msgspec.json.decode(out) == msgspec.to_builtins(third)


async def test_a_finished_file_that_changed_is_loaded_anew(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ticks(10, bad=(3,)))
    await store.load(path)
    os.utime(path, ns=(1, 1))
    touched = await store.load(path)
    assert (touched.files[0].status, touched.files[0].totals.unchanged, touched.rejected) == ("loaded", 9, 1)
    assert len(rejects(path)) == 1
    write(path, ticks(12))
    grown = await store.load(path)
    assert (grown.files[0].rows, grown.files[0].totals.inserted) == (12, 3)
    assert not path.with_name("x.csv.rejects.ndjson").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"source": "other"},
        {"resume": False},
        {"columns": {"price": "price"}},
        {"ties": "replace"},
        {"prices": "signed"},
    ],
)
async def test_other_options_load_anew(store: Store, tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "x.csv", ticks(10))
    await store.load(path)
    again = await store.load(path, **options)
    assert again.files[0].status == "loaded"
    assert len(store.requests) == 2


async def test_the_batch_size_may_change_between_runs(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ticks(100))
    await store.load(path, batch_size=7)
    state = path.with_name("x.csv.load-state.json")
    recorded = msgspec.json.decode(state.read_bytes())
    recorded |= {"complete": False, "rows": 70}
    state.write_bytes(msgspec.json.encode(recorded))
    before = len(store.requests)
    again = await store.load(path, batch_size=50)
    assert again.files[0].resumed_after == 70
    assert [len(rows) for rows in store.requests[before:]] == [30]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "No such file"),
        ("empty.csv", b"", "the first line"),
        ("a(b).csv", b"time,price\n", "--symbol"),
        ("x.csv.gz", gzip.compress(ticks(5000).encode(), mtime=0)[:5000], "end-of-stream"),
        ("y.csv.gz", b"time,price\n", "gzip"),
        ("x.parquet", b"PAR1", "arquet"),
        ("x.txt", b"", "--format"),
    ],
)
async def test_a_file_that_cannot_be_loaded_does_not_stop_the_others(
    store: Store, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    report = await store.load(path, write(tmp_path / "good.csv", ticks(3)))
    assert [file.status for file in report.files] == ["failed", "loaded"]
    assert message in (report.files[0].failure or "")
    assert report.failed == 1


async def test_a_service_that_stays_away_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(load, "Client", lambda *given, **named: Client(*given, patience=0.2, **named))
    files = [write(tmp_path / name, ticks(3)) for name in ("a.csv", "b.csv")]
    report = await load.run(LoadOptions(files=files), transport=httpx.MockTransport(unreachable))
    assert report.failed == 2
    assert "connection refused" in (report.files[0].failure or "")
    assert report.files[1].failure == "not started"


@pytest.mark.parametrize(
    "options",
    [
        {"files": []},
        {"batch_size": 0},
        {"batch_size": 100_001},
        {"symbol": "A?B"},
        {"tz": "Mars/Olympus"},
        {"tz": "America"},
        {"files": [Path("a.csv"), Path("b.csv")], "state": Path("s")},
        {"state": Path("a.csv")},
        {"state": Path("s"), "rejects": Path("s")},
        {"url": "ftp://host"},
    ],
)
async def test_options_without_meaning_are_refused(store: Store, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await load.run(LoadOptions(**{"files": [Path("a.csv")], **options}), transport=store.transport)


# --- no row is lost ---


def written(path: Path, content: bytes) -> Path:
    """A file of these bytes, in gzip if its name says so."""
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def lost(report: LoadReport) -> int:
    """Rows that no receipt and no reject counts; never any, in a file that is loaded."""
    (file,) = report.files
    assert file.status == "loaded", file.failure
    totals = file.totals
    counted = totals.inserted + totals.updated + totals.unchanged + totals.superseded + totals.rejected
    return file.rows - counted


NAMED = [f"2026-01-05T00:00:{n:02d}Z,{n},Widget Corp" for n in range(1, 21)]


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({5: ',5,"Alpha Fund', 15: ',15,Beta" Fund'}, [5]),  # a quote within an unquoted cell is a letter
        ({5: ',5,"Alpha Fund', 15: ',15,"Beta Fund'}, [5, 15]),
        ({5: ',5,"Alpha Fund', 15: ',15,Beta Fund"'}, [5]),  # over lines it would be a well-formed cell
        ({5: ',"5,Alpha Fund', 15: ',15",Beta Fund'}, [5, 15]),
        ({20: ',20,"Alpha Fund'}, [20]),
        ({7: ',"7"7,Widget'}, [7]),
        ({7: ',7,"Widget "Corp"'}, [7]),
        ({7: f',7,"{"x" * 140_000}"'}, [7]),  # a longer cell than the library takes
        ({7: f",7,{'x' * 2_000_000}"}, [7]),
        ({20: f",20,{'x' * 2_000_000}"}, [20]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:60],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
async def test_a_stray_quote_takes_no_other_row_with_it(
    store: Store, tmp_path: Path, changed: dict[int, str], refused: list[int], end: str
) -> None:
    rows = [NAMED[n - 1][:20] + changed[n] if n in changed else NAMED[n - 1] for n in range(1, 21)]
    path = written(tmp_path / "x.csv", end.join(["time,price,name", "", *rows]).encode())
    report = await store.load(path, batch_size=3)
    assert (lost(report), report.files[0].rows, report.rejected) == (0, 20, len(refused))
    assert [(row["row"], row["line"]) for row in rejects(path)] == [(n, n + 2) for n in refused]
    assert sorted(store.prices("X").values(), key=int) == [str(n) for n in range(1, 21) if n not in refused]


@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 40), st.sampled_from('"",\r\n;\0\ufeffü€\udcfc')), max_size=6)
)
def test_whatever_stands_in_a_line_all_lines_are_counted(inserted: list[tuple[int, int, str]]) -> None:
    rows = list(NAMED)
    for n, at, letter in inserted:
        rows[n] = rows[n][:at] + letter + rows[n][at:]
    text = "\n".join(["time,price,name", *rows])
    expected = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[1:] if line]
    with tempfile.TemporaryDirectory() as directory:
        path = written(Path(directory, "x.csv"), text.encode("utf-8", "surrogateescape"))
        store = Store()
        report = asyncio.run(store.load(path))
        assert (lost(report), report.files[0].rows) == (0, len(expected))
        whole = {str(n + 1) for n in range(20)} - {str(n + 1) for n, _, _ in inserted}
        assert whole <= set(store.prices("X").values())
        if report.rejected:
            for row in rejects(path):
                assert (
                    expected[row["row"] - 1]
                    == text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[row["line"] - 1]
                )


async def test_quoted_cells_keep_delimiters_and_quotes(store: Store, tmp_path: Path) -> None:
    lines = [
        'time,"price","source","what, ""else"""',
        '"2026-01-05T00:00:00Z","1","a ""b"", c","d, e"',
        '2026-01-05T00:00:01Z,2,"",""',
        '2026-01-05T00:00:02Z,"3",a"b,c"d',
    ]
    report = await store.load(write(tmp_path / "x.csv", "\n".join(lines)))
    assert report.files[0].ignored_columns == ['what, "else"']
    assert [row["source"] for row in store.rows.values()] == ['a "b", c', None, 'a"b']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b'time,"price\n2026-01-05T00:00Z,1\n', "line 1"),
        ("x.csv", "time,price,Größe\n2026-01-05T00:00Z,1,2\n".encode("latin-1"), "Line 1 is not UTF-8: byte 0xF6"),
        ("x.csv", "time,price\n2026-01-05T00:00Z,1\n".encode("utf-16-le"), "--encoding utf-16"),
        ("x.csv", "time,price\n2026-01-05T00:00Z,1\n".encode("utf-16-be"), "--encoding utf-16"),
        ("x.csv", "\ufefftime,price\n2026-01-05T00:00Z,1\n".encode("utf-16-le")[:-1], "not UTF-16 at or after line 2"),
        ("x.csv.gz", b"", "no gzip file"),
        ("x.ndjson.gz", b"", "no gzip file"),
        ("x.ndjson.gz", gzip.compress(b'{"ts":"2026-01-05T00:00Z","price":1}\n', mtime=0)[:-4], "end-of-stream"),
        ("x.ndjson.gz", gzip.compress(b"{}\n", mtime=0) + b"more", "Not a gzipped file"),
        ("x.ndjson.gz", gzip.compress(b"{}\n", mtime=0)[:-8] + bytes(8), "CRC"),
    ],
)
@pytest.mark.parametrize("ties", ["number", "replace"])
async def test_a_file_that_cannot_be_read_to_its_end_is_not_loaded(
    store: Store, tmp_path: Path, name: str, content: bytes, message: str, ties: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for _ in range(2):
        report = await store.load(path, ties=ties)
        assert report.failed == 1
        assert message in (report.files[0].failure or "")


async def test_a_cut_off_gzip_file_keeps_what_was_loaded_and_is_not_done(store: Store, tmp_path: Path) -> None:
    whole = gzip.compress(ticks(20_000).encode())
    path = tmp_path / "x.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    report = await store.load(path, ties="replace", batch_size=100)
    assert "end-of-stream" in (report.files[0].failure or "")
    assert 0 < report.files[0].rows == report.files[0].totals.inserted < 20_000
    assert (await store.load(path, ties="replace", batch_size=100)).failed == 1
    path.write_bytes(whole)
    again = await store.load(path, ties="replace", batch_size=10_000)
    assert (lost(again), again.files[0].rows, len(store.rows)) == (0, 20_000, 20_000)


TEXTS = {
    "x.csv": "time,price,source\n2026-01-05T00:00:00Z,1,Zürich\n\n2026-01-05T00:00:01Z,2,€\n",
    "x.ndjson": '{"time":"2026-01-05T00:00:00Z","price":1,"source":"Zürich"}\n\n'
    '{"time":"2026-01-05T00:00:01Z","price":2,"source":"€"}\n',
}


@pytest.mark.parametrize("name", ["x.csv", "x.ndjson", "x.csv.gz", "x.ndjson.gz"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ""])
async def test_a_byte_order_mark_and_any_line_ends_are_read(
    store: Store, tmp_path: Path, name: str, codec: str, end: str
) -> None:
    text = TEXTS[name.removesuffix(".gz")]
    text = text.replace("\n", end) if end else text.removesuffix("\n")
    mark = "\ufeff" if codec.startswith("utf-16") else ""
    report = await store.load(written(tmp_path / name, (mark + text).encode(codec)))
    assert (lost(report), report.rejected) == (0, 0)
    assert [row["source"] for row in store.rows.values()] == ["Zürich", "€"]


async def test_members_of_gzip_are_one_text(store: Store, tmp_path: Path) -> None:
    content = TEXTS["x.ndjson"].encode("utf-8-sig")
    cuts = (0, 0, 1, 40, len(content))  # the first is empty, the mark and a line run over two
    members = [gzip.compress(content[start:end], mtime=0) for start, end in itertools.pairwise(cuts)]
    (tmp_path / "x.ndjson.gz").write_bytes(b"".join(members) + bytes(512))  # tapes pad with zeros
    assert lost(await store.load(tmp_path / "x.ndjson.gz")) == 0
    assert len(store.rows) == 2


@pytest.mark.parametrize("name", ["x.csv", "x.ndjson"])
@pytest.mark.parametrize("codec", ["latin-1", "cp1252", "utf-16"])
async def test_text_that_is_not_utf_8_is_stored_as_it_is_or_not_at_all(
    store: Store, tmp_path: Path, name: str, codec: Any
) -> None:
    text = TEXTS[name].replace("€", "Genève" if codec == "latin-1" else "€")
    path = tmp_path / name
    path.write_bytes(text.encode("utf-16-le" if codec == "utf-16" else codec))
    report = await store.load(path)
    if codec != "utf-16":
        assert (lost(report), report.rejected) == (0, 2)
        assert [(row["line"], row["code"]) for row in rejects(path)] == (
            [(2, "not-unicode"), (4, "not-unicode")] if name == "x.csv" else [(1, "not-unicode"), (3, "not-unicode")]
        )
        assert "not UTF-8: byte 0xFC; --encoding" in rejects(path)[0]["detail"]
        assert "Z\\xfcrich" in rejects(path)[0]["quote"]["line"]
    assert store.rows == {}
    assert lost(await store.load(path, encoding=codec)) == 0
    assert [row["source"] for row in store.rows.values()] == text_sources(text)


def text_sources(text: str) -> list[str]:
    return ["Zürich", "Genève" if "Genève" in text else "€"]


async def test_a_foreign_byte_does_no_harm_in_a_column_that_is_ignored(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"time,price,name\n2026-01-05T00:00:00Z,1,Z\xfcrich\n2026-01-05T00:00:01Z,2\xb9,\n")
    assert (await store.load(path)).rejected == 1
    assert store.prices("X") == {0: "1"}
    # A byte that Windows-1252 does not have is no letter of it either.
    path.write_bytes(b"time,price,source\n2026-01-05T00:00:00Z,1,Z\x81rich\n")
    assert (await Store().load(path, encoding="cp1252")).rejected == 1
    assert rejects(path)[0]["detail"].startswith("Line 2 is not CP1252: byte 0x81")


async def test_a_line_of_any_json_is_a_row_that_is_refused(store: Store, tmp_path: Path) -> None:
    good = '{"ts":"2026-01-05T00:00:00Z","price":1}'
    lines = [good, "[" * 100_000, "\0" * 50, '{"ts":"\\ud800","price":1}', "\ufeff" + good, '{"x":' * 50_000]
    path = write(tmp_path / "x.ndjson", "\n".join(lines))
    report = await store.load(path)
    assert (lost(report), report.rejected, len(store.rows)) == (0, 5, 1)
    assert [row["line"] for row in rejects(path)] == [2, 3, 4, 5, 6]


async def test_a_file_without_rows_is_loaded(store: Store, tmp_path: Path) -> None:
    for name, text in (("a.csv", "time,price"), ("b.csv", "time,price\n\n"), ("c.ndjson", ""), ("d.ndjson", "\n\n")):
        report = await store.load(write(tmp_path / name, text))
        assert (lost(report), report.files[0].rows) == (0, 0)


async def test_bytes_of_parquet_are_no_text(store: Store, tmp_path: Path) -> None:
    # As base64, "IBM" would be stored as the symbol "SUJN".
    for kind in (pa.binary(), pa.large_binary(), pa.binary(3)):
        columns = {"symbol": pa.array([b"IBM"], kind), "time": ["2026-01-05T00:00Z"], "price": ["1"]}
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        report = await store.load(tmp_path / "x.parquet")
        assert "'symbol' is of bytes" in (report.files[0].failure or "")
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert (await store.load(tmp_path / "x.parquet", columns={"symbol": ""})).failed == 0


async def test_a_receipt_that_does_not_count_all_quotes_ends_the_load(store: Store, tmp_path: Path) -> None:
    async def forgetful(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            lines = request.content.split(b"\n")[:-1]
            request = httpx.Request("POST", request.url, content=b"\n".join(lines), headers=request.headers)
        return await store(request)

    options = LoadOptions(files=[write(tmp_path / "x.csv", ticks(10))])
    report = await load.run(options, transport=httpx.MockTransport(forgetful))
    assert "counts 9 quotes of 10" in (report.files[0].failure or "")


# --- rows that were refused ---


async def test_refused_rows_are_told_again(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.csv", ticks(10, bad=(3, 7)))
    await store.load(path)
    for _ in range(2):
        again = await store.load(path)
        assert (again.files[0].status, again.rejected, again.failed) == ("already loaded", 2, 0)
        out, err = capsys.readouterr()
        assert f"2 were refused; mend them in {path}.rejects.ndjson and load that file" in err
        assert "rejected rows are in" in out
    assert len(store.requests) == 1

    mended = path.with_name("x.csv.rejects.ndjson")
    write(mended, mended.read_text().replace('"-', '"'))
    report = await store.load(mended)
    assert (lost(report), report.rejected, len(store.rows)) == (0, 0, 10)


async def test_the_reject_file_can_be_loaded_as_it_is(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "spy.csv", "time,price,volume\n2026-01-05T00:00,1,5\n2026-01-05T00:00Z,-2,\n")
    assert (await store.load(path)).rejected == 2
    report = await store.load(path.with_name("spy.csv.rejects.ndjson"), tz="UTC", prices="signed")
    assert (lost(report), report.rejected) == (0, 0)
    assert [(symbol, row["price"]) for (symbol, _), row in store.rows.items()] == [("SPY", 1), ("SPY", -2)]


async def test_a_file_of_which_all_was_refused_is_tried_again(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "positive"

    async def service(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            url = request.url.copy_add_param("prices", setting)
            request = httpx.Request("POST", url, content=request.content, headers=request.headers)
        return await store(request)

    options = LoadOptions(files=[write(tmp_path / "x.csv", ticks(10, bad=tuple(range(1, 11))))])
    for _ in range(2):
        assert (await load.run(options, transport=httpx.MockTransport(service))).rejected == 10
    assert "all its rows were refused before; starting anew" in capsys.readouterr().err
    setting = "signed"
    report = await load.run(options, transport=httpx.MockTransport(service))
    assert (lost(report), report.rejected, len(store.rows)) == (0, 0, 10)
    assert not (tmp_path / "x.csv.rejects.ndjson").exists()


# --- the same requests again ---


@given(
    days=st.lists(st.integers(0, 900), max_size=400),
    size=st.integers(1, 100),
    other=st.integers(1, 100),
    sent=st.integers(0, 5),
    freed=st.sets(st.integers(0, 5)),
)
def test_what_was_sent_is_cut_as_it_was(days: list[int], size: int, other: int, sent: int, freed: set[int]) -> None:
    start = datetime(2020, 1, 1, tzinfo=UTC)
    rows = [{"timestamp": (start + timedelta(days=day)).isoformat() if day % 7 else "?"} for day in days]

    def cut(size: int, skip: int, known: list[tuple[int, int]]) -> list[load.Chunk]:
        source = load._Source(iter(rows), lambda row: row, len(rows), lambda: 0, [], set())
        converter = Converter(symbol="X", tz=None, source=None)
        return list(load.chunks(source, converter, size=size, skip=skip, sent=known))

    first = cut(size, 0, [])
    done = first[len(first) // 3].start
    known = [(c.start, c.end) for c in first if c.start >= done and c.lines][:sent]
    known = [rows for n, rows in enumerate(known) if n not in freed]
    second = [chunk for chunk in cut(other, done, known) if chunk.end > chunk.start]
    before = {(c.start, c.end): c.lines for c in first}
    again = {(c.start, c.end): c.lines for c in second}
    assert all(again[rows] == before[rows] for rows in known)
    assert [row for c in second for row in sorted(c.rows + [row for row, _ in c.refused])] == list(
        range(done + 1, len(rows) + 1)
    )
    assert all(len(c.rows) + len(c.refused) <= other for c in second if (c.start, c.end) not in known)


@pytest.mark.parametrize("ties", ["number", "replace"])
async def test_a_request_without_an_answer_is_repeated_as_it_was(store: Store, tmp_path: Path, ties: Any) -> None:
    """A loader dies again and again before it has its answers, and the next one would cut in another way."""
    path = write(tmp_path / "x.csv", ticks(500, bad=(50, 150, 350)))

    class Dies(Exception):
        pass

    async def losing(request: httpx.Request) -> httpx.Response:
        response = await store(request)
        if request.method == "POST" and len(store.requests) % 3 == 0:
            raise Dies
        return response

    runs = 0
    while True:
        options = LoadOptions(files=[path], batch_size=20 + runs, ties=ties)
        try:
            report = await load.run(options, transport=httpx.MockTransport(losing))
        except Dies:
            runs += 1
            assert runs < 100, "none gets further than the one before"
        else:
            break
    assert runs > 3
    assert store.replayed
    assert (lost(report), report.rejected) == (0, 3)
    assert report.files[0].totals.inserted == len(store.rows) == 497
    assert [row["row"] for row in rejects(path)] == [50, 150, 350]


async def test_a_batch_that_was_refused_may_be_cut_smaller(store: Store, tmp_path: Path) -> None:
    async def small(request: httpx.Request) -> httpx.Response:
        too_large = request.content.count(b"\n") >= 50
        return httpx.Response(413, json={"title": "Body too large"}) if too_large else await store(request)

    path = write(tmp_path / "x.csv", ticks(200))
    transport = httpx.MockTransport(small)
    assert (await load.run(LoadOptions(files=[path], batch_size=100), transport=transport)).failed == 1
    report = await load.run(LoadOptions(files=[path], batch_size=50), transport=transport)
    assert (lost(report), len(store.rows)) == (0, 200)


async def test_quotes_that_were_deleted_are_stored_again(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ticks(10))
    await store.load(path)
    store.rows.clear()
    assert (await store.load(path, resume=False)).files[0].totals.inserted == 10
    assert len(store.rows) == 10


@pytest.mark.parametrize(
    "on_conflict",
    [pytest.param(how, marks=pytest.mark.long if how in {"merge", "ignore"} else ()) for how in get_args(OnConflict)],
)
def test_a_loader_that_is_killed_again_and_again_counts_each_row_once(
    service_url: str, symbol: str, tmp_path: Path, on_conflict: str
) -> None:
    count, bad = 20_000, (50, 7_000, 19_999)
    start = datetime(2026, 1, 5, tzinfo=UTC)
    lines = [
        f"{(start + timedelta(milliseconds=n // 3)).isoformat()},{'-' if n in bad else ''}{n}.5"
        for n in range(1, count + 1)
    ]
    path = write(tmp_path / f"{symbol}.csv", "\n".join(["time,price", *lines]))
    state_file = path.with_name(f"{path.name}.load-state.json")
    rows = killed = unknown = 0
    while killed < 4:
        command = [sys.executable, "-m", "app", "load", str(path), "--url", service_url, "--on-conflict", on_conflict]
        command += ["--batch-size", str(80 + killed)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                with suppress(FileNotFoundError):
                    state = msgspec.json.decode(state_file.read_bytes(), type=State)
                    if state.rows > rows:
                        break
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        state = msgspec.json.decode(state_file.read_bytes(), type=State)
        if state.complete:  # this machine was slower to kill than to load
            break
        rows, killed, unknown = state.rows, killed + 1, unknown + len(state.sent)
    assert killed
    assert unknown, "no request was under way when the loader died"
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # three rows are refused by their price
    (file,) = msgspec.json.decode(done.stdout, type=LoadReport).files
    assert (file.status in {"loaded", "already loaded"}, file.rows) == (True, count)
    assert msgspec.to_builtins(file.totals) | {"numbered": 0} == {
        "inserted": count - len(bad), "updated": 0, "unchanged": 0, "superseded": 0, "numbered": 0, "rounded": 0,
        "zeros": 0, "crossed": 0, "rejected": len(bad),
    }  # fmt: skip
    assert [(row["row"], row["code"]) for row in rejects(path)] == [(row, "price-not-positive") for row in bad]
    answer = httpx.get(f"{service_url}/v1/quotes/count", params={"symbols": symbol})
    assert count - len(bad) in answer.json().values()
    assert {other.name for other in tmp_path.iterdir()} == {
        path.name, state_file.name, path.name + ".rejects.ndjson",
    }  # fmt: skip


# --- one at a time, and of one file and one store ---


@pytest.mark.parametrize("shared", ["both", "state", "rejects"])
async def test_of_two_loads_at_once_the_second_says_who_is_at_it(store: Store, tmp_path: Path, shared: str) -> None:
    path = write(tmp_path / "x.csv", ticks(100, bad=(5,)))
    began = asyncio.Event()

    def slowly(_: int) -> float:
        began.set()
        return 0.02

    store.delay = slowly
    other = {
        "both": {},
        "state": {"rejects": tmp_path / "other.ndjson"},
        "rejects": {"state": tmp_path / "other.json"},
    }[shared]
    first = asyncio.create_task(store.load(path, batch_size=5))
    await began.wait()
    second = await store.load(path, batch_size=5, **other)
    assert second.failed == 1
    assert f"another load is at it: process {os.getpid()} on " in (second.files[0].failure or "")
    report = await first
    assert (lost(report), report.rejected, len(rejects(path))) == (0, 1, 1)
    assert (await store.load(path)).files[0].status == "already loaded"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_on_a_file_that_its_last_holder_deleted_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """It was opened before the holder deleted it; by now another may be there."""
    state, lock = tmp_path / "state", tmp_path / ".state.lock"
    flock = fcntl.flock

    def too_late(file: Any, operation: int) -> None:
        monkeypatch.undo()
        flock(file, operation)
        lock.unlink()
        if replaced:
            lock.touch()

    monkeypatch.setattr(fcntl, "flock", too_late)
    with held([state]):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(Unwritable, match="another load is at it"), held([state]):
            pass
    assert not lock.exists()


def grow(path: Path) -> None:
    with path.open("a") as file:
        file.write("2026-01-06T00:00:00Z,AAPL,1\n")


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b".50", b".75"))


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


@pytest.mark.parametrize("change", [grow, rewrite, replace, Path.unlink])
@pytest.mark.parametrize("when", ["while it is numbered", "while it is sent"])
async def test_a_file_that_changes_while_it_is_read_is_not_loaded(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], when: str
) -> None:
    path = write(tmp_path / "x.csv", ticks(100))
    os.utime(path, ns=(1, 1))

    end = load._Numbers.end

    def at_fifth(number: int) -> float:
        if number == 5:
            change(path)
        return 0

    def after_end(numbers: load._Numbers) -> bool:
        change(path)
        return end(numbers)

    if when == "while it is sent":
        store.delay = at_fifth
    else:
        monkeypatch.setattr(load._Numbers, "end", after_end)
    report = await store.load(path, batch_size=10)
    assert report.failed == 1
    assert "changed while it was read" in (report.files[0].failure or "")
    assert bool(store.requests) == (when == "while it is sent")
    store.delay = lambda _: 0
    monkeypatch.undo()
    if change is not Path.unlink:
        again = await store.load(path, batch_size=10)
        assert lost(again) == 0
        assert {row["price"] % 1 for row in store.rows.values()} - {0} == {
            Decimal("0.75" if change is rewrite else "0.5")
        }


async def test_what_can_be_read_only_once_is_no_file(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")
    (tmp_path / "y.csv").mkdir()
    for path, message in ((tmp_path / "x.csv", "more than once"), (tmp_path / "y.csv", "directory")):
        report = await store.load(path)
        assert message in (report.files[0].failure or "")
    report = await store.load(Path("/dev/stdin"), format="csv")
    assert "more than once" in (report.files[0].failure or "")


async def test_another_store_has_not_what_was_loaded_into_the_first(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.csv", ticks(10))
    await store.load(path)
    other = Store("other")
    assert (await other.load(path)).files[0].totals.inserted == 10
    assert "loaded into another store" in capsys.readouterr().err
    # The same store at another address is the same.
    assert (await other.load(path, url="http://elsewhere")).files[0].status == "already loaded"


async def test_another_database_behind_a_service_gets_the_file_too(
    service_url: str, symbol: str, serve: Serve, shared_dir: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.csv", ticks(10).replace("AAPL", symbol))
    assert (await load.run(LoadOptions(files=[path], url=service_url))).files[0].totals.inserted == 10
    with serve(shared_dir / "other") as other:
        for url, status, inserted in ((other.url, "loaded", 10), (other.url, "already loaded", 10)):
            (file,) = (await load.run(LoadOptions(files=[path], url=url))).files
            assert (file.status, file.totals.inserted) == (status, inserted)
    (file,) = (await load.run(LoadOptions(files=[path], url=service_url))).files
    assert (file.status, file.totals.unchanged) == ("loaded", 10)


async def test_a_load_waits_until_the_store_can_be_seen(store: Store, tmp_path: Path) -> None:
    answers: list[httpx.Response | Exception] = [
        httpx.Response(503, json={"store": None}),
        httpx.ReadError("lost"),
        httpx.Response(200, json={"store": None}),  # a standby that is about to be promoted
        httpx.Response(503, json={"store": "store"}),  # unhealthy, but there
    ]

    async def service(request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and answers:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        return await store(request)

    options = LoadOptions(files=[write(tmp_path / "x.csv", ticks(10))])
    assert lost(await load.run(options, transport=httpx.MockTransport(service))) == 0
    assert answers == []
    for other in (httpx.Response(200, text="<p>It works"), httpx.Response(404), httpx.Response(200, json={})):
        answers = [other]
        report = await load.run(options, transport=httpx.MockTransport(service))
        assert "which store it has" in (report.files[0].failure or "")


async def test_a_store_that_is_restored_during_a_load_is_loaded_again(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ticks(100))

    def restore(number: int) -> float:
        if number == 5:
            store.name = "restored"
            store.rows.clear()
        return 0

    store.delay = restore
    report = await store.load(path, batch_size=10)
    assert "may lack rows" in (report.files[0].failure or "")
    assert (lost(await store.load(path, batch_size=10)), len(store.rows)) == (0, 100)


# --- files that cannot be kept ---


@pytest.mark.parametrize("content", [b"", b"{}", b"not a state", b'{"rows": 100, "complete": true}'])
async def test_what_is_no_state_file_is_kept_and_told(store: Store, tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "x.csv", ticks(10))
    state = path.with_name("x.csv.load-state.json")
    state.write_bytes(content)
    for resume in (True, False):
        report = await store.load(path, resume=resume)
        assert f"{state} is damaged, or no state file of this version; delete it" in (report.files[0].failure or "")
    assert state.read_bytes() == content
    assert store.requests == []
    state.unlink()
    assert lost(await store.load(path)) == 0


def test_a_load_whose_reject_file_is_gone_begins_anew(tmp_path: Path) -> None:
    """Its rejects would be listed nowhere."""

    def journal() -> Journal:
        fresh = State.new({"size": 1}, {}, "store")
        return Journal(tmp_path / "state", tmp_path / "rejects", fresh, resume=True)

    first = journal()
    first.open()
    first.acknowledge(2, b'{"row":1}\n', Receipt(1, 1), refused=1, numbered=0)
    assert journal().state.rows == 2
    (tmp_path / "rejects").unlink()
    assert (journal().state.rows, journal().note) == (0, "the reject file is gone; starting anew")


async def test_what_is_no_reject_file_is_kept_and_told(store: Store, tmp_path: Path) -> None:
    path, mine = write(tmp_path / "x.csv", ticks(10, bad=(3,))), write(tmp_path / "mine.txt", "precious\n")
    report = await store.load(path, rejects=mine)
    assert "mine.txt is no reject file" in (report.files[0].failure or "")
    assert mine.read_text() == "precious\n"
    for name in ("rejects", "state"):
        report = await store.load(path, **{name: Path("/dev/null")})
        assert "/dev/null is no regular file" in (report.files[0].failure or "")
        report = await store.load(path, **{name: tmp_path / "missing" / "file"})
        assert "cannot be written: No such file or directory" in (report.files[0].failure or "")
    assert store.requests == []


@pytest.mark.parametrize("full", ["rejects", "state"])
def test_a_full_disk_ends_a_load_that_goes_on_when_there_is_room(
    service_url: str, symbol: str, tmp_path: Path, full: str
) -> None:
    bad = tuple(range(1, 200, 2)) if full == "rejects" else ()
    path = write(tmp_path / "x.csv", ticks(200, bad=bad).replace("AAPL", symbol))
    command = ["load", str(path), "--url", service_url, "--batch-size", "10", "--json", "--on-conflict", "error"]
    # No file of the process can become longer, as on a full disk.
    limit = 4096 if full == "rejects" else 700
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"from app.cli import main; sys.argv[1:] = {command!r}; main()"
    )
    for _ in range(2):
        cut = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
        assert cut.returncode == 1, cut.stderr
        (file,) = msgspec.json.decode(cut.stdout, type=LoadReport).files
        assert file.status == "failed"
        assert "cannot be written: File too large" in (file.failure or "")
    done = subprocess.run([sys.executable, "-m", "app", *command], capture_output=True, text=True, check=False)
    (file,) = msgspec.json.decode(done.stdout, type=LoadReport).files
    assert (file.status, file.totals.inserted, file.totals.rejected) == ("loaded", 200 - len(bad), len(bad))
    assert not bad or [row["row"] for row in rejects(path)] == list(bad)
    assert done.returncode == (1 if bad else 0)


def example(name: str, directory: Path) -> Path:
    """A copy of a file of real prices that the backtesting package ships."""
    spec = find_spec("backtesting")  # finds without importing, which would load a plotting library
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(shutil.copy(Path(spec.submodule_search_locations[0], "test", name), directory / name))


async def bars(client: httpx.AsyncClient, symbol: str, start: str, end: str) -> list[dict[str, Any]]:
    query = {"symbols": symbol, "interval": "1d", "start": start, "end": end, "limit": "10000"}
    found: list[dict[str, Any]] = []
    while True:
        answer = await client.get("/v1/ohlc", params=query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found += page["bars"]
        if not page.get("next_page_token"):
            return found
        query["page_token"] = page["next_page_token"]


@pytest.mark.parametrize("name", ["EURUSD.csv", "GOOG.csv"])
async def test_real_prices_come_back_as_the_bars_that_polars_finds(
    name: str, service_url: str, symbol: str, tmp_path: Path
) -> None:
    path = example(name, tmp_path)
    report = await load.run(LoadOptions(files=[path], url=service_url, symbol=symbol, tz="UTC"))
    frame = pl.read_csv(path).rename({"": "time"})
    assert (report.failed, report.rejected) == (0, 0)
    assert report.files[0].totals.inserted == len(frame)

    expected = (
        frame.with_columns(pl.col("time").str.slice(0, 10).alias("day"))
        .group_by("day", maintain_order=True)
        .agg(
            pl.col("Close").first().alias("open"),
            pl.col("Close").max().alias("high"),
            pl.col("Close").min().alias("low"),
            pl.col("Close").last().alias("close"),
            pl.col("Volume").sum().alias("volume"),
            pl.len().alias("count"),
        )
        .sort("day")
        .to_dicts()
    )
    last = date.fromisoformat(expected[-1]["day"]) + timedelta(days=1)
    async with httpx.AsyncClient(base_url=service_url, timeout=60) as client:
        counted = await client.get("/v1/quotes/count", params={"symbols": symbol})
        assert counted.status_code == 200, counted.text
        assert len(frame) in counted.json().values()
        found = await bars(client, symbol, f"{expected[0]['day']}T00:00:00Z", f"{last}T00:00:00Z")
    assert {bar["symbol"] for bar in found} == {symbol}
    assert all(bar["low"] <= bar["vwap"] <= bar["high"] for bar in found if bar["vwap"] is not None)
    shown = [
        {"day": bar["timestamp"][:10], **{name: bar[name] for name in expected[0] if name != "day"}} for bar in found
    ]
    assert shown == expected

    again = await load.run(LoadOptions(files=[path], url=service_url, symbol=symbol, tz="UTC", resume=False))
    assert again.files[0].totals.unchanged == len(frame)


async def test_trades_of_one_millisecond_are_all_kept_in_whichever_direction_the_file_runs(
    service_url: str, symbol: str, tmp_path: Path
) -> None:
    dice = random.Random(11)
    start = datetime(2026, 1, 5, tzinfo=UTC)
    at = sorted(dice.randrange(60_000) for _ in range(20_000))  # of a minute; most milliseconds have several or none
    trades = [
        (start + timedelta(milliseconds=ms), f"{dice.randrange(90_000, 110_000) / 1000:.3f}", f"0.{n + 1:05d}")
        for n, ms in enumerate(at)
    ]
    lines = [f"{moment.isoformat(timespec='milliseconds')},{price},{size}" for moment, price, size in trades]
    options: dict[str, Any] = {"url": service_url, "batch_size": 3000}
    found = []
    for name, rows in (("F", lines), ("B", lines[::-1])):
        path = write(tmp_path / f"{symbol}.{name}.csv", "\n".join(["time,price,volume", *rows]))
        report = await load.run(LoadOptions(files=[path], **options))
        (file,) = report.files
        assert (report.failed, report.rejected, file.totals.inserted) == (0, 0, len(trades))
        assert file.totals.numbered >= len(trades) - len(set(at))
        again = await load.run(LoadOptions(files=[path], **options, resume=False))
        assert again.files[0].totals.unchanged == len(trades)
        query = {"symbols": f"{symbol}.{name}", "interval": "1s", "start": "2026-01-05T00:00:00Z", "end": "2026-01-06"}
        async with httpx.AsyncClient(base_url=service_url, timeout=60) as client:
            answer = await client.get("/v1/ohlc", params=query)
            assert answer.status_code == 200, answer.text
            found.append([{**bar, "symbol": ""} for bar in answer.json()["bars"]])
    assert found[0] == found[1]

    frame = pl.DataFrame(trades, schema=["time", "price", "volume"], orient="row").with_columns(
        pl.col("price").cast(pl.Decimal(20, 3)), pl.col("volume").cast(pl.Decimal(20, 5))
    )
    expected = (
        frame.group_by(pl.col("time").dt.truncate("1s"), maintain_order=True)
        .agg(
            pl.col("price").first().alias("open"),
            pl.col("price").max().alias("high"),
            pl.col("price").min().alias("low"),
            pl.col("price").last().alias("close"),
            pl.col("volume").sum(),
            pl.len().alias("count"),
        )
        .to_dicts()
    )
    names = ("open", "high", "low", "close", "volume", "count")
    assert [[Decimal(str(bar[name])) for name in names] for bar in found[0]] == [
        [Decimal(bar[name]) for name in names] for bar in expected
    ]
