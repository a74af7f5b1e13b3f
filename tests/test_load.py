"""Files reach the service exactly, within its limits, and a load that was cut off goes on where it was."""

import asyncio
import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import load
from app.batch import Batch
from app.client import Client
from app.errors import InvalidRequest
from app.load import Converter, LoadOptions, LoadReport, column_map, match_columns
from app.model import Limits, Receipt, Terms

DAILY = ",Open,High,Low,Close,Adj Close,Volume\n2004-08-19,100,104.06,95.96,100.340,50.1,22351900.0\n"


class Store:
    """A service of dictionaries, with the real rules of a quote."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, datetime], dict[str, Any]] = {}
        self.requests: list[list[dict[str, Any]]] = []
        self.delay: Callable[[int], float] = lambda _number: 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        rows = [msgspec.json.decode(line) for line in request.content.splitlines()]
        self.requests.append(rows)
        await asyncio.sleep(self.delay(len(self.requests)))
        params = request.url.params
        batch = Batch.from_rows(rows, Terms(Limits.at(datetime.now(UTC), max_rows=100_000), params["on_error"]))  # type: ignore[arg-type]
        inserted = updated = 0
        for row in batch.rows.to_pylist():
            key = (row["symbol"], row["timestamp"])
            inserted += key not in self.rows
            updated += key in self.rows and self.rows[key] != row
            self.rows[key] = row
        unchanged = len(batch) - inserted - updated
        receipt = Receipt(
            len(rows), inserted, updated, unchanged, batch.superseded, batch.rounded, batch.crossed, batch.rejected
        )
        return httpx.Response(200, content=msgspec.json.encode(receipt))

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
    ],
)  # fmt: skip
def test_columns_are_found_by_their_names(names: list[str], explicit: dict[str, str], expected: dict[str, int]) -> None:
    assert match_columns(names, explicit) == expected


@pytest.mark.parametrize(
    ("names", "explicit", "message"),
    [
        (["Open", "Close"], {}, "--map timestamp=COLUMN"),
        (["Date", "Open"], {}, "--map price=COLUMN"),
        (["Date", "bid"], {}, "--map price=COLUMN"),
        (["Date", "Close"], {"price": "Mid"}, "no column 'Mid'"),
    ],
)
def test_columns_that_are_missing_are_named(names: list[str], explicit: dict[str, str], message: str) -> None:
    with pytest.raises(load._Unreadable, match=message):
        match_columns(names, explicit)


def test_a_mapping_is_read_or_refused() -> None:
    assert column_map(["price=Adj Close", "Volume="]) == {"price": "Adj Close", "volume": ""}
    for wrong in ("price", "open=Open", "=Close"):
        with pytest.raises(InvalidRequest):
            column_map([wrong])


@pytest.mark.parametrize(
    ("value", "tz", "expected"),
    [
        ("2026-01-05T09:30:00Z", None, "2026-01-05T09:30:00Z"),
        ("2026-01-05 09:30:00.123456789-05:00", "Asia/Tokyo", "2026-01-05T14:30:00.123456Z"),
        ("2026-01-05 09:30:00 UTC", None, "2026-01-05T09:30:00Z"),
        ("2026-01-05 09:30", "America/New_York", "2026-01-05T14:30:00Z"),
        ("2026-07-05 09:30", "America/New_York", "2026-07-05T13:30:00Z"),
        ("2026-01-05", "America/New_York", "2026-01-05T05:00:00Z"),
        ("20260105", "UTC", "2026-01-05T00:00:00Z"),
        (date(2026, 1, 5), "UTC", "2026-01-05T00:00:00Z"),
        (datetime(2026, 1, 5, 9, 30), "Asia/Tokyo", "2026-01-05T00:30:00Z"),  # noqa: DTZ001
        ("2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00:00Z"),  # a day without a midnight
        ("", "UTC", "field-missing"),
        (None, "UTC", "field-missing"),
        ("NaT", "UTC", "field-missing"),
        ("2026-01-05 09:30", None, "timestamp-naive"),
        ("2026-01-05", None, "timestamp-naive"),
        ("2026-11-01 01:30", "America/New_York", "timestamp-ambiguous"),
        ("2026-03-08 02:30", "America/New_York", "timestamp-ambiguous"),
        ("01/05/2026", "UTC", "timestamp-invalid"),
        ("1700000000", "UTC", "timestamp-invalid"),
        ("2012010110000", "UTC", "timestamp-invalid"),
        (1_700_000_000, "UTC", "timestamp-invalid"),
        ("0001-01-01", "Asia/Tokyo", "timestamp-invalid"),
    ],
)
def test_times_become_utc_or_are_refused(value: object, tz: str | None, expected: str) -> None:
    converter = Converter(symbol="X", tz=tz, source=None)
    if not expected.endswith("Z"):
        with pytest.raises(load._Fault) as caught:
            converter.quote({"timestamp": value})
        assert caught.value.code == expected
        return
    quote, moment = converter.quote({"timestamp": value})
    assert quote["timestamp"] == expected
    assert moment == datetime.fromisoformat(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("22351900.0", 22351900),
        ("2.23519E+7", 22351900),
        (" 7 ", 7),
        ("", None),
        ("NaN", None),
        (None, None),
        (12, 12),
        ("twelve", "twelve"),
        ("1e400", "1e400"),
        ("inf", "inf"),
        ("-3", -3),
    ],
)
def test_sizes_become_whole_numbers(value: object, expected: object) -> None:
    quote, _ = Converter(symbol="X", tz=None, source=None).quote({"timestamp": "2026-01-05T00:00Z", "volume": value})
    assert quote.get("volume") == expected


async def test_daily_bars_arrive_exactly(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = await store.load(write(tmp_path / "goog.csv", DAILY), tz="UTC", source="test")
    (sent,) = store.requests
    assert sent == [
        {
            "symbol": "GOOG",
            "timestamp": "2004-08-19T00:00:00Z",
            "price": "100.340",
            "volume": 22351900,
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
    assert stored[0]["S1", datetime(2026, 1, 5, 9, 30, 1, tzinfo=UTC)]["price"] == Decimal("1.1")
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
            {"symbol": "X", "timestamp": "2026-01-05T14:30:00Z", "price": "1.1", "bid": "1.05000000", "ask": "0.00001",
             "volume": 7, "source": "a"},
            {"symbol": "X", "timestamp": "2026-01-05T14:30:01Z", "bid": "2.00000001", "ask": "2.5", "source": "b"},
        ]
    ]  # fmt: skip
    assert report.rejected == 1
    assert rejects(tmp_path / "x.parquet")[0]["code"] == "field-missing"


async def test_rows_without_a_symbol_do_not_get_one_where_others_have(store: Store, tmp_path: Path) -> None:
    lines = '{"symbol":"A","ts":"2026-01-05T00:00Z","price":1}\n{"ts":"2026-01-05T00:00Z","price":2}\n'
    report = await store.load(write(tmp_path / "mixed.jsonl", lines))
    assert report.rejected == 1
    assert rejects(tmp_path / "mixed.jsonl") == [
        {"row": 2, "code": "field-missing", "detail": "The field is required.",
         "quote": {"timestamp": "2026-01-05T00:00:00Z", "price": 2}}
    ]  # fmt: skip
    assert (await store.load(write(tmp_path / "spot.jsonl", lines[lines.index("\n") + 1 :]))).rejected == 0
    assert ("SPOT", datetime(2026, 1, 5, tzinfo=UTC)) in store.rows


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


async def test_years_of_days_are_split(store: Store, tmp_path: Path) -> None:
    lines = [f"{date(2000, 1, 1) + timedelta(days=n)},{n + 1}" for n in range(1000)]
    report = await store.load(write(tmp_path / "old.csv", "\n".join(["date,close", *lines])), tz="UTC")
    assert [len(rows) for rows in store.requests] == [366, 366, 268]
    assert report.files[0].totals.inserted == 1000


async def test_the_last_of_equal_keys_wins_across_requests(store: Store, tmp_path: Path) -> None:
    random.seed(5)
    store.delay = lambda _number: random.random() / 200
    lines = [f"2026-01-05T00:00:{n % 7:02d}Z,{'abc'[n % 3]},{n + 1}" for n in range(200)]
    await store.load(write(tmp_path / "same.csv", "\n".join(["time,symbol,price", *lines])), batch_size=5)
    expected: dict[tuple[str, int], int] = {}
    for n in range(200):
        expected["ABC"[n % 3], n % 7] = n + 1
    assert {(symbol, moment.second): row["price"] for (symbol, moment), row in store.rows.items()} == expected


async def test_refused_rows_are_listed_with_their_place_in_the_file(store: Store, tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.csv",
        "timestamp,symbol,price,volume\n"
        "2026-01-05T00:00:00Z,A,1,1\n"
        "2026-01-05T00:00:01,A,1,1\n"
        "\n"
        "2026-01-05T00:00:02Z,A,-1,1\n"
        "2026-01-05T00:00:03Z,A,1\n"
        "2026-01-05T00:00:04Z,A,1,1.5\n"
        "2026-01-05T00:00:05Z,A B,1,1\n"
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
        (5, "not-whole"),
        (6, "symbol-invalid"),
        (7, "price-missing"),
    ]
    assert rejects(path)[1]["quote"] == {
        "symbol": "A", "timestamp": "2026-01-05T00:00:02Z", "price": "-1", "volume": 1,
    }  # fmt: skip
    assert rejects(path)[3]["quote"]["volume"] == "1.5"


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
        return REFUSAL if len(store.requests) >= 5 else await original(request)

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
    assert (third.files[0].status, third.rejected, third.failed) == ("already loaded", 0, 0)
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


@pytest.mark.parametrize("options", [{"source": "other"}, {"resume": False}, {"columns": {"price": "price"}}])
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
        ("a b.csv", b"time,price\n", "--symbol"),
        ("x.csv.gz", gzip.compress(ticks(5000).encode())[:5000], "end-of-stream"),
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
        {"symbol": "A B"},
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
