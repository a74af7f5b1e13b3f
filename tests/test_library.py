"""The repository as a library: whatever a program hands over, it gets an answer or a sentence, and stays as it is."""

import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from textwrap import dedent
from typing import Any, cast, get_args

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from pydantic import BaseModel, ValidationError

from app.clock import Interval, nanoseconds
from app.db import migrate
from app.db.engine import Database
from app.errors import (
    BodyTooLarge,
    DatabaseMisconfigured,
    InvalidQuotes,
    InvalidRequest,
    QueryTimeout,
    QuotesLocked,
    SchemaMismatch,
)
from app.monitor import Monitor
from app.quote.batch import Batch
from app.quote.terms import OnConflict, Receipt, Terms
from app.repository.bars import BarSpec
from app.repository.ingest import Write
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Range
from app.repository.storage import Storage, StorageRepository
from app.settings import Settings
from tests.conftest import Lane

ROOT = Path(__file__).parents[1]
T0 = datetime(2026, 11, 16, 14, 30, tzinfo=UTC)
T1 = T0 + timedelta(hours=1)
N0, N1 = nanoseconds(T0), nanoseconds(T1)
ROW = {"symbol": "NONE", "timestamp": T0, "price": 1}
SETTINGS = Settings(_env_file=None)
DAY = date(2026, 11, 16)
INJECTED = "asc LIMIT 0) row UNION ALL SELECT current_user, now(), 0, 1, 1, 1, 1, 1, 1, 'x' --"
#: Nothing that a parameter takes, whichever it is.
ABSURD: tuple[Any, ...] = (INJECTED, "", "\0", b"asc", 7.5, float("nan"), object(), ["asc"], {"a": 1}, -1, 10**40, True)
Call = Callable[[QuoteRepository, Any], Any]

#: A call with one wrong argument, and the name that the sentence has to say.
CALLS: dict[str, tuple[str, Call]] = {
    "get_quotes sort": ("sort", lambda q, x: q.get_quotes("A", T0, T1, sort=x)),
    "get_quotes limit": ("limit", lambda q, x: q.get_quotes("A", T0, T1, limit=x)),
    "get_quotes symbols": ("symbols", lambda q, x: q.get_quotes(x, T0, T1)),
    "get_quotes start": ("start", lambda q, x: q.get_quotes("A", x, T1)),
    "get_quotes end": ("end", lambda q, x: q.get_quotes("A", T0, x)),
    "get_latest_quote symbol": ("symbols", lambda q, x: q.get_latest_quote(x)),
    "get_intraday_quotes symbol": ("symbols", lambda q, x: q.get_intraday_quotes(x, DAY)),
    "get_intraday_quotes day": ("date", lambda q, x: q.get_intraday_quotes("A", x)),
    "get_intraday_quotes tz": ("tz", lambda q, x: q.get_intraday_quotes("A", DAY, tz=x)),
    "get_intraday_quotes day_start": ("day_start", lambda q, x: q.get_intraday_quotes("A", DAY, day_start=x)),
    "get_intraday_quotes limit": ("limit", lambda q, x: q.get_intraday_quotes("A", DAY, limit=x)),
    "count_quotes symbols": ("symbols", lambda q, x: q.count_quotes(x)),
    "count_quotes start": ("start", lambda q, x: q.count_quotes("A", x)),
    "count_quotes estimate": ("estimate", lambda q, x: q.count_quotes("A", estimate=x)),
    "get_bars symbols": ("symbols", lambda q, x: q.get_bars(x, "1m", T0, T1)),
    "get_bars interval": ("interval", lambda q, x: q.get_bars("A", x, T0, T1)),
    "get_bars unit": ("interval", lambda q, x: q.get_bars("A", Interval(1, x), T0, T1)),
    "get_bars count": ("interval", lambda q, x: q.get_bars("A", Interval(x, "M"), T0, T1)),
    "get_bars start": ("start", lambda q, x: q.get_bars("A", "1m", x, T1)),
    "get_bars price": ("price", lambda q, x: q.get_bars("A", "1m", T0, T1, price=x)),
    "get_bars tz": ("tz", lambda q, x: q.get_bars("A", "1m", T0, T1, tz=x)),
    "get_bars day_start": ("day_start", lambda q, x: q.get_bars("A", "1d", T0, T1, day_start=x)),
    "get_bars fill": ("fill", lambda q, x: q.get_bars("A", "1m", T0, T1, fill=x)),
    "get_bars limit": ("limit", lambda q, x: q.get_bars("A", "1m", T0, T1, limit=x)),
    "get_bars sort": ("sort", lambda q, x: q.get_bars("A", "1m", T0, T1, sort=x)),
    "bars_page wanted": ("wanted", lambda q, x: q.bars_page(x, BarSpec(Interval(1, "m")))),
    "bars_page spec": ("spec", lambda q, x: q.bars_page(Range(["A"], N0, N1), x)),
    "iter_quotes sort": ("sort", lambda q, x: anext(q.iter_quotes("A", T0, T1, sort=x))),
    "iter_quotes limit": ("limit", lambda q, x: anext(q.iter_quotes("A", T0, T1, limit=x))),
    "iter_bars price": ("price", lambda q, x: anext(q.iter_bars("A", "1m", T0, T1, price=x))),
    "iter_bars fill": ("fill", lambda q, x: anext(q.iter_bars("A", "1m", T0, T1, fill=x))),
    "iter_bars sort": ("sort", lambda q, x: anext(q.iter_bars("A", "1m", T0, T1, sort=x))),
    "newest_quotes sort": ("sort", lambda q, x: q.newest_quotes(Range(["A"], N0, N1, sort=x))),
    "bars_page fill": ("fill", lambda q, x: q.bars_page(Range(["A"], N0, N1), BarSpec(Interval(1, "m"), fill=x))),
    "summary_page wanted": ("wanted", lambda q, x: q.summary_page(wanted=x, price="last")),
    "summary_page price": ("price", lambda q, x: q.summary_page(Range(["A"], N0, N1), x)),
    "quotes_page wanted": ("wanted", lambda q, x: q.quotes_page(x)),
    "quotes_page symbols": ("symbols", lambda q, x: q.quotes_page(Range(x, N0, N1))),
    "quotes_page start": ("start", lambda q, x: q.quotes_page(Range(["A"], x, N1))),
    "quotes_page end": ("end", lambda q, x: q.quotes_page(Range(["A"], N0, x))),
    "quotes_page sort": ("sort", lambda q, x: q.quotes_page(Range(["A"], N0, N1, sort=x))),
    "quotes_page limit": ("limit", lambda q, x: q.quotes_page(Range(["A"], N0, N1, x))),
    "quotes_page limit_per_symbol": (
        "limit_per_symbol", lambda q, x: q.quotes_page(Range(["A"], N0, N1, limit_per_symbol=x)),
    ),
    "latest_rows symbols": ("symbols", lambda q, x: q.latest_rows(x)),
    "symbols_page limit": ("limit", lambda q, x: q.symbols_page(x, None)),
    "symbols_page after": ("symbols", lambda q, x: q.symbols_page(10, x)),
    "delete_quotes symbol": ("symbols", lambda q, x: q.delete_quotes(x, T0, T1)),
    "delete_quotes start": ("start", lambda q, x: q.delete_quotes("A", x, T1)),
    "at consistency": ("consistency", lambda q, x: q.at(x).get_symbols()),
    "bulk_insert quotes": ("quotes", lambda q, x: q.bulk_insert(x)),
    "bulk_insert on_conflict": ("on_conflict", lambda q, x: q.bulk_insert([], on_conflict=x)),
    "bulk_insert on_error": ("on_error", lambda q, x: q.bulk_insert([], on_error=x)),
    "bulk_insert ties": ("ties", lambda q, x: q.bulk_insert([], ties=x)),
    "bulk_insert prices": ("prices", lambda q, x: q.bulk_insert([], prices=x)),
    "write writes": ("writes", lambda q, x: q.write(x)),
    "write attempt": ("attempt", lambda q, x: q.write([], x)),
    "replay key": ("key", lambda q, x: q.replay(x)),
    "write on_conflict": ("on_conflict", lambda q, x: q.write([Write(Batch.from_rows([]), on_conflict=x)])),
    "write on_error": ("on_error", lambda q, x: q.write([Write(Batch.from_rows([]), "update", x)])),
}  # fmt: skip
#: What of the absurd has a meaning all the same.
MEANT: dict[str, tuple[Any, ...]] = {
    "start": (10**40, -1), "end": (10**40, -1), "quotes": (["asc"],), "symbols": (["asc"], {"a": 1}),
    "estimate": (True,),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
async def test_a_wrong_word_is_refused_by_a_sentence_that_names_it(quotes: QuoteRepository, name: str) -> None:
    parameter, call = CALLS[name]
    for value in (*ABSURD, None):
        if value in MEANT.get(name.split()[1], ()) or _is_default(name, value):
            continue
        with pytest.raises(InvalidRequest) as caught:
            await call(quotes, value)
        assert caught.value.parameter == parameter, (value, caught.value.detail)
        assert caught.value.detail.endswith(".")
        assert "UNION" not in caught.value.detail


def _is_default(name: str, value: object) -> bool:
    """Whether it is what the parameter has unless it is given, or a number of rows."""
    return value is None and name in {
        "count_quotes symbols", "count_quotes start", "latest_rows symbols", "symbols_page after",
        "quotes_page limit_per_symbol", "bulk_insert prices", "write attempt",
    }  # fmt: skip


def test_every_method_and_parameter_is_called() -> None:
    given = {tuple(name.split()) for name in CALLS}
    methods = {name: m for name, m in inspect.getmembers(QuoteRepository, callable) if not name.startswith("_")}
    exempt = {"open", "limits", "get_symbols", "complete_from"}
    assert {method for method, _ in given} >= set(methods) - exempt
    for name, method in methods.items():
        hints = typing.get_type_hints(method) if name not in exempt else {}
        words = {p for p, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
        assert {(name, word) for word in words} <= given, name


@pytest.mark.parametrize("url", [None, b"postgresql://localhost/x", 7, ["postgresql://localhost/x"]])
async def test_a_url_that_is_no_text_is_refused(url: Any) -> None:
    with pytest.raises(InvalidRequest, match="url is a text"):
        async with QuoteRepository.open(url):
            raise AssertionError


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?sslmode=verify-full", "no root certificate"),
        ("?target_session_attrs=fast", "one of these for `target_session_attrs`"),
        ("?sslmode=sometimes", "one of these for `sslmode`"),
        ("?application_name", "pairs of name=value"),
        ("?port=http", "number for `port`"),
    ],
)
async def test_what_is_wrong_with_a_url_is_said(
    lane: Lane, query: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the driver looks for certificates
    url = lane.url.partition("?")[0] + query

    async def opened() -> None:
        Settings(_env_file=None, database_url=url)
        async with QuoteRepository.open(url, SETTINGS):
            raise AssertionError

    with pytest.raises((DatabaseMisconfigured, ValidationError), match=words):
        await opened()


async def test_what_was_closed_says_so(lane: Lane) -> None:
    async with QuoteRepository.open(lane.url, SETTINGS) as quotes:
        assert await quotes.count_quotes("NONE") == 0
    for call in (quotes.get_symbols, lambda: quotes.count_quotes("NONE"), lambda: quotes.bulk_insert([ROW])):
        with pytest.raises(InvalidRequest, match="The store was closed"):
            await call()


async def test_a_schema_of_a_later_version_is_not_opened(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "known", lambda: frozenset({"0001"}))
    with pytest.raises(SchemaMismatch, match="which this version of the service does not know"):
        async with QuoteRepository.open(lane.url, SETTINGS):
            raise AssertionError


async def test_a_statement_that_somebody_cancels_is_not_told_as_slow(lane: Lane, database: Database) -> None:
    if lane.name == "timescaledb":
        pytest.skip("one session serves all clients in turn, without timers")
    with pytest.raises(QueryTimeout, match="Somebody cancelled the statement"):
        await database.read(lambda c: c.execute("SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(5)"))


async def test_the_word_of_an_order_is_ours(quotes: QuoteRepository, symbol: str) -> None:
    class Sly(str):
        """Equal to a word that is taken, with another text."""

        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            return other == "asc"

        def __hash__(self) -> int:
            return hash("asc")

    await quotes.bulk_insert([{"symbol": symbol, "timestamp": T0, "price": 1}])
    sly: Any = Sly(INJECTED)
    assert [row.price for row in await quotes.get_quotes(symbol, T0, T1, sort=sly)] == [1]


async def test_numbers_of_numpy_are_numbers(quotes: QuoteRepository, symbol: str) -> None:
    await quotes.bulk_insert([{"symbol": symbol, "timestamp": T0, "price": 1}])
    start, limit = np.int64(N0), np.int32(5)
    (row,) = await quotes.get_quotes(np.array([symbol]), start, pd.Timestamp(T1), limit=limit)  # type: ignore[arg-type]
    assert row.time_ns == N0
    assert await quotes.count_quotes(pd.Series([symbol]), start=start, end=T1) == 1  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        await quotes.get_quotes(symbol, pd.NaT, T1)


async def test_a_range_is_refused_where_it_is_reversed(quotes: QuoteRepository) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        await quotes.count_quotes(None, T1, T0)
    with pytest.raises(InvalidRequest, match="not a time"):
        await quotes.get_intraday_quotes("A", T0)
    with pytest.raises(InvalidRequest):
        await quotes.delete_quotes(["A", "B"], T0, T1)  # type: ignore[arg-type]


# --- what quotes may be ---


@dataclass
class Dataclass:
    symbol: str
    timestamp: datetime
    price: Any
    bid: Any = None


class Model(BaseModel):
    symbol: str
    timestamp: datetime
    price: Decimal
    bid: Decimal | None = None


class Struct(msgspec.Struct):
    symbol: str
    timestamp: datetime
    price: Any
    bid: Any = None


Tuple = namedtuple("Tuple", ["symbol", "timestamp", "price", "bid"])  # noqa: PYI024  as a program has them


def frame(symbol: str, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"symbol": [symbol], "timestamp": [pd.Timestamp(T0)], "price": [1.1], **columns})


def in_words(symbol: str) -> dict[str, Any]:
    return {"symbol": symbol, "timestamp": T0, "price": Decimal("1.1"), "bid": None}


KINDS: dict[str, Callable[[str], Any]] = {
    "a list": lambda s: [in_words(s)],
    "a tuple": lambda s: (in_words(s),),
    "a generator": lambda s: (row for row in [in_words(s)]),
    "values of a dict": lambda s: {1: in_words(s)}.values(),
    "dataclasses": lambda s: [Dataclass(s, T0, Decimal("1.1"))],
    "models": lambda s: [Model(symbol=s, timestamp=T0, price=Decimal("1.1"))],
    "structs": lambda s: [Struct(s, T0, "1.1")],
    "named tuples": lambda s: [Tuple(s, T0, 1.1, None)],
    "rows of a frame": lambda s: [row for _, row in frame(s, bid=[np.nan]).iterrows()],
    "tuples of a frame": lambda s: frame(s, bid=[np.nan]).itertuples(index=False),
    "records of a frame": lambda s: frame(s, bid=[np.nan]).to_dict("records"),
    "float32": lambda s: [{**in_words(s), "price": np.float32(1.1), "bid": np.float32("nan")}],
    "float16": lambda s: [{**in_words(s), "price": np.float16(1.1), "bid": np.float16("nan")}],
    "float64": lambda s: [{**in_words(s), "price": np.float64(1.1), "bid": np.float64("nan")}],
    "NaT": lambda s: [{**in_words(s), "bid": pd.NaT, "ask": np.datetime64("NaT"), "source": pd.NaT}],
    "NA": lambda s: [{**in_words(s), "bid": pd.NA, "source": pd.NA, "volume": None}],
    "texts of numpy": lambda s: [{**in_words(s), "symbol": np.str_(s), "price": np.str_("1.1")}],
    "pandas": frame,
    "pandas with an index": lambda s: frame(s, bid=[np.nan]).set_index("timestamp"),
    "pandas with other names": lambda s: frame(s).rename(columns={"symbol": "ticker", "timestamp": "ts"}),
    "pandas with decimals": lambda s: frame(s).assign(price=[Decimal("1.1")], bid=[None]),
    "pandas with float32": lambda s: frame(s).astype({"price": "float32"}),
    "pandas with categories": lambda s: frame(s).astype({"symbol": "category"}),
    "polars": lambda s: pl.DataFrame([in_words(s)]),
    "arrow": lambda s: pa.Table.from_pandas(frame(s)),
    "a batch": lambda s: pa.RecordBatch.from_pandas(frame(s)),
    "a stream": lambda s: pa.Table.from_pandas(frame(s)).to_reader(),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_rows_of_every_kind_are_taken_alike(quotes: QuoteRepository, symbol: str, kind: str) -> None:
    assert await quotes.bulk_insert(KINDS[kind](symbol)) == Receipt(1, 1)
    (row,) = await quotes.get_quotes(symbol, T0, T1)
    stored = row.to_dict()
    assert (stored.pop("symbol"), stored.pop("timestamp"), stored.pop("nanos")) == (symbol, T0, 0)
    assert stored.pop("price") == Decimal("1.1")
    assert set(stored.values()) == {None}


async def test_whole_numbers_of_numpy(quotes: QuoteRepository, symbol: str) -> None:
    row = {"symbol": symbol, "timestamp": T0, "price": np.int64(7), "volume": np.uint8(9), "bid": np.int64(6)}
    assert (await quotes.bulk_insert([row])).inserted == 1
    newest = await quotes.get_latest_quote(symbol)
    assert newest is not None
    assert (newest.price, newest.volume, newest.bid) == (7, 9, 6)


async def test_what_was_read_is_taken_again_with_its_nanoseconds(quotes: QuoteRepository, symbol: str) -> None:
    at = pd.Timestamp(T0) + pd.Timedelta(123_456_789, "ns")
    assert (await quotes.bulk_insert(frame(symbol).assign(timestamp=[at]))).inserted == 1
    stored = await quotes.get_quotes(symbol, T0, T1)
    assert [row.time_ns for row in stored] == [N0 + 123_456_789]
    again = [row.to_dict() for row in stored]
    record = namedtuple("Row", again[0])  # type: ignore[misc]  # noqa: PYI024  as a program has them
    for same in (stored, again, [record(**row) for row in again], pd.DataFrame(again), pl.DataFrame(again)):
        assert await quotes.bulk_insert(same) == Receipt(1, 0, unchanged=1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (in_words, "quotes is a list of"),
        (lambda s: Model(symbol=s, timestamp=T0, price=Decimal(1)), "quotes is a list of"),
        (lambda _: "AAPL", "quotes is a list of"),
        (lambda s: {"symbol": [s], "timestamp": [T0], "price": [1]}, "quotes is a list of"),
        (lambda s: pl.DataFrame([in_words(s)]).lazy(), "quotes is a list of"),
        (lambda s: frame(s)["price"], "cannot be read as Arrow"),
        (lambda _: pl.Series([1]), "cannot be read as Arrow"),
        (lambda s: frame(s).assign(price=[object()]), "cannot be read as Arrow"),
        (lambda s: frame(s).assign(symbol=[1]), "of a type that the field symbol cannot have"),
        (lambda s: frame(s).assign(color=["red"]), "column 'color' is unknown"),
        (lambda s: frame(s).assign(nanos=[1000]), "nanos is 0 to 999"),
        (lambda s: frame(s).drop(columns="timestamp"), "column timestamp is missing"),
        (lambda _: pd.DataFrame(), "column symbol is missing"),
    ],
)
async def test_what_are_no_quotes_is_refused_by_a_sentence(
    quotes: QuoteRepository, symbol: str, given: Callable[[str], Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        await quotes.bulk_insert(given(symbol))


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("price", pd.Timestamp(T0), "wrong-type"),
        ("price", np.bool_(True), "wrong-type"),
        ("price", np.array([1, 2]), "wrong-type"),
        ("price", np.float32("inf"), "not-finite"),
        ("price", 1j, "wrong-type"),
        ("source", np.int64(1), "wrong-type"),
        ("timestamp", np.datetime64("2026-11-16T14:30"), "timestamp-invalid"),
        ("timestamp", pd.NaT, "field-missing"),
        ("timestamp", pd.Timestamp("2026-11-16"), "timestamp-naive"),
        ("timestamp", DAY, "timestamp-invalid"),
        ("symbol", None, "field-missing"),
        ("symbol", 5, "wrong-type"),
    ],
)
async def test_what_a_field_cannot_be_is_refused_by_its_row(
    quotes: QuoteRepository, symbol: str, field: str, value: Any, code: str
) -> None:
    with pytest.raises(InvalidQuotes) as caught:
        await quotes.bulk_insert([{**in_words(symbol), field: value}])
    assert [(r.pointer, r.code) for r in caught.value.rejections] == [(f"/0/{field}", code)]


async def test_rows_that_are_none_are_refused_one_by_one(quotes: QuoteRepository, symbol: str) -> None:
    rows: list[Any] = [None, 1, "A", b"A", np.array([1]), Dataclass, object(), {5: 6}, in_words(symbol)]
    receipt = await quotes.bulk_insert(rows, on_error="skip")
    assert (receipt.received, receipt.inserted) == (9, 1)
    assert [r.code for r in receipt.rejected] == ["not-an-object"] * 7 + ["unknown-field"]


async def test_no_more_is_taken_than_a_batch_may_carry(lane: Lane, database: Database, symbol: str) -> None:
    quotes = QuoteRepository(database, lane.make_settings(max_batch_rows=5))
    taken = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield in_words(symbol)

    with pytest.raises(BodyTooLarge):
        await quotes.bulk_insert(endless())
    assert taken == 6
    batches = iter([pa.RecordBatch.from_pandas(frame(symbol))] * 100)
    stream = pa.RecordBatchReader.from_batches(pa.Table.from_pandas(frame(symbol)).schema, batches)
    with pytest.raises(BodyTooLarge):
        await quotes.bulk_insert(stream)
    assert len(list(batches)) > 90, "a stream is left where it was too much"
    with pytest.raises(BodyTooLarge, match="6 quotes"):
        await quotes.bulk_insert([in_words(symbol)] * 6)


async def test_an_error_of_the_programs_own_is_its_own(quotes: QuoteRepository, symbol: str) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield in_words(symbol)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await quotes.bulk_insert(broken())
    assert await quotes.get_latest_quote(symbol) is None


@pytest.mark.parametrize("nanos", [1000, -1, 1.5, "1", None])
async def test_nanoseconds_that_are_none_are_refused_by_their_row(
    quotes: QuoteRepository, symbol: str, nanos: object
) -> None:
    row = {"symbol": symbol, "timestamp": T0, "price": 1, "nanos": nanos}
    receipt = await quotes.bulk_insert([row], on_error="skip")
    assert [(r.code, r.pointer) for r in receipt.rejected] == [("timestamp-invalid", "/0/nanos")]
    assert "from 0 to 999" in receipt.rejected[0].detail


async def test_who_asks_while_the_store_is_looked_at_waits_for_that_look() -> None:
    began, go = asyncio.Event(), asyncio.Event()
    looks = []

    class Still:
        async def look(self) -> Storage:
            looks.append(1)
            began.set()
            await go.wait()
            raise QueryTimeout("The database did not answer in time.")

    async def check() -> None: ...

    monitor = Monitor(cast("StorageRepository", Still()), SETTINGS, check)
    first, gone = asyncio.create_task(monitor.storage()), asyncio.create_task(monitor.storage())
    await began.wait()
    second = asyncio.create_task(monitor.storage())
    gone.cancel()
    await asyncio.sleep(0)
    go.set()
    found = await asyncio.gather(first, gone, second, return_exceptions=True)
    assert [type(one) for one in found] == [QueryTimeout, asyncio.CancelledError, QueryTimeout]
    assert len(looks) == 1


def test_terms_know_their_words() -> None:
    for name in ("on_error", "on_conflict", "precision", "ties", "prices"):
        with pytest.raises(InvalidRequest, match=name):
            Terms(**{name: "raise"})  # type: ignore[arg-type]


async def test_a_dry_run_among_others_takes_nothing_from_them(quotes: QuoteRepository, symbol: str) -> None:
    rows = [{"symbol": symbol, "timestamp": T0 + timedelta(seconds=i), "price": 1} for i in range(3)]
    first, second, third = (Batch.from_rows([row]) for row in rows)
    writes = [Write(first), Write(second, dry_run=True), Write(third), Write(third, dry_run=True)]
    assert await quotes.write(writes) == [Receipt(1, 1)] * 4
    assert [row.timestamp for row in await quotes.get_quotes(symbol, T0, T1)] == [T0, T0 + timedelta(seconds=2)]
    assert await quotes.write(writes[1:]) == [Receipt(1, 1), Receipt(1, 0, unchanged=1), Receipt(1, 0, unchanged=1)]
    assert await quotes.write([writes[1]]) == [Receipt(1, 1)], "it was not stored"


async def test_requests_of_which_every_row_is_refused_share_a_transaction(quotes: QuoteRepository, symbol: str) -> None:
    refused = {"symbol": symbol, "timestamp": T0, "price": -1}
    sound = {**refused, "price": 1}
    for on_conflict in get_args(OnConflict):
        terms = Terms(on_error="skip", on_conflict=on_conflict)
        nothing, one = Batch.from_rows([refused] * 3, terms), Batch.from_rows([sound], terms)
        for batches in ([nothing] * 12, [nothing] * 12 + [one], [one] + [nothing] * 12):
            receipts = await quotes.write([Write(batch, on_conflict, "skip") for batch in batches])
            assert all(isinstance(receipt, Receipt) for receipt in receipts)
            assert [len(r.rejected) for r in receipts if isinstance(r, Receipt) and r.received == 3] == [3] * 12


# --- where it is used ---


async def test_another_event_loop_is_told_so(lane: Lane) -> None:
    async with QuoteRepository.open(lane.url, lane.make_settings()) as quotes:

        def elsewhere(call: Callable[[], Any]) -> str:
            async def ask() -> Any:
                return await call()

            with pytest.raises(InvalidRequest) as caught:
                asyncio.run(ask())
            return caught.value.detail

        for call in (
            lambda: quotes.get_latest_quote("A"),
            lambda: quotes.bulk_insert([{"symbol": "A", "timestamp": T0, "price": 1}]),
            lambda: quotes.delete_quotes("A", T0, T1),
        ):
            assert "opened in another event loop" in await asyncio.to_thread(elsewhere, call)
        assert await quotes.get_latest_quote("NONE") is None, "here it goes on"


FORK = """
    import asyncio, os, sys
    from datetime import UTC, datetime
    from app.errors import InvalidRequest
    from app.repository.quotes import QuoteRepository
    from app.settings import Settings

    async def asked(quotes, symbol):
        found = await quotes.get_latest_quote(symbol)
        return found.symbol

    async def main(symbols):
        settings = Settings(_env_file=None, pool_size=int(sys.argv[2]), retention=None)
        async with QuoteRepository.open(sys.argv[1], settings) as quotes:
            at = datetime(2026, 11, 16, tzinfo=UTC)
            await quotes.bulk_insert([{"symbol": symbol, "timestamp": at, "price": 1} for symbol in symbols])
            read, write = os.pipe()
            if not (child := os.fork()):
                asyncio._set_running_loop(None)
                try:
                    answer = asyncio.run(asked(quotes, symbols[0]))
                except InvalidRequest as error:
                    answer = error.detail
                asyncio.run(quotes._database.close())
                os.write(write, answer.encode())
                os._exit(0)
            for _ in range(50):
                assert await asked(quotes, symbols[1]) == symbols[1]
            os.waitpid(child, 0)
            for _ in range(50):
                assert await asked(quotes, symbols[1]) == symbols[1]
            print(os.read(read, 1000).decode())
            print(await asked(quotes, symbols[0]))

    asyncio.run(main(sys.argv[3:]))
"""


def test_a_child_of_a_fork_is_told_so_and_its_parent_goes_on(lane: Lane, symbol: str) -> None:
    size = str(lane.settings.get("pool_size", 10))
    told, found = _run(FORK, lane.url, size, symbol, f"{symbol}X").splitlines()
    assert told == "The store was opened in another process; open it in each process, after the fork."
    assert found == symbol


def _run(script: str, *arguments: str, **environment: str) -> str:
    """The output of a script in an interpreter of its own."""
    result = subprocess.run(
        [sys.executable, "-c", dedent(script), *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


STATE = """
    import asyncio, decimal, gc, importlib, json, locale, logging, os, pkgutil, random, signal, sys, threading, warnings
    # What other libraries do when they are imported is theirs.
    import alembic, fastapi, prometheus_client, pyarrow, sqlalchemy, structlog
    from prometheus_client import metrics, values

    def state():
        return {
            "metrics": sorted(prometheus_client.REGISTRY._names_to_collectors), "kept": values.ValueClass.__qualname__,
            "created": metrics._use_created, "structlog": structlog.is_configured(),
            "root": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
            "loggers": sorted(
                (name, logger.level, logger.disabled, logger.propagate, len(logger.handlers), len(logger.filters))
                for name, logger in logging.root.manager.loggerDict.items()
                if isinstance(logger, logging.Logger) and (logger.handlers or logger.level or logger.disabled)
            ),
            "signals": [repr(signal.getsignal(number)) for number in signal.valid_signals()],
            "warnings": [repr(warnings.filters), repr(warnings.showwarning)],
            "decimals": [repr(decimal.getcontext()), repr(decimal.DefaultContext)],
            "locale": locale.setlocale(locale.LC_ALL), "environment": dict(os.environ), "directory": os.getcwd(),
            "hooks": [repr(hook) for hook in (sys.excepthook, threading.excepthook, sys.unraisablehook)],
            "memory": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), len(gc.callbacks)],
            "limits": [sys.getrecursionlimit(), sys.get_int_max_str_digits(), sys.getswitchinterval()],
            "threads": threading.active_count(), "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
            "random": hash(random.getstate()), "path": list(sys.path),
        }

    before = state()
    import app
    for module in pkgutil.walk_packages(app.__path__, "app."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    after = state()
    assert "app.cli" in sys.modules and "app.repository.quotes" in sys.modules
    print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def test_an_import_changes_nothing_of_the_program(tmp_path: Path) -> None:
    """Also where the program shares metrics of its own between processes."""
    for environment in ({}, {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}):
        assert json.loads(_run(STATE, **environment)) == {}
    assert not list(tmp_path.glob("*.lock"))


QUIET = """
    import logging, sys
    from app.logs import Logger
    log = Logger("app.db.engine")
    log.info("not told")
    if sys.argv[1] == "logging":
        logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
    log.warning("moving", host="a b")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("failed")
"""


def test_what_is_logged_goes_where_the_program_sends_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", dedent(QUIET), "-"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not result.stdout, "stdout is the program's"
    assert "moving" in result.stderr
    told = _run(QUIET, "logging").splitlines()
    assert told[0] == "app.db.engine WARNING event='moving' host='a b'"
    assert told[1].startswith("app.db.engine ERROR event='failed'")
    assert "ZeroDivisionError" in told[-1]


# --- how long it takes ---


@pytest.fixture
async def blocked(lane: Lane, database: Database, symbol: str) -> AsyncIterator[dict[str, Any]]:
    """A quote whose key somebody holds."""
    row = {"symbol": symbol, "timestamp": T0, "price": 1}
    async with database.dedicated() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("INSERT INTO quotes.real_time (symbol, timestamp, price) VALUES ($1, $2, 1)", symbol, T0)
        yield row
        await transaction.rollback()


@pytest.mark.concurrent
@pytest.mark.parametrize("on_conflict", ["update", "merge", "ignore", "error"])
async def test_a_write_that_is_blocked_says_by_what(
    lane: Lane, database: Database, blocked: dict[str, Any], on_conflict: OnConflict
) -> None:
    quotes = QuoteRepository(database, lane.make_settings(write_timeout="300 ms"))
    with pytest.raises(QuotesLocked):
        await quotes.bulk_insert([blocked], on_conflict=on_conflict)


# --- the command line ---


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("settings > /dev/full", 1),
        ("settings --json > /dev/full", 1),
        ("settings >&-", 0),
        ("settings | head -c 10", 0),
        ("health --wait nan", 2),
        ("demo --rate nan", 2),
        ("demo --duration nan", 2),
        ("maintain show --limit -1", 2),
    ],
)
def test_a_command_ends_with_a_sentence_whatever_it_writes_to(command: str, status: int) -> None:
    """In a locale that has no letters for a frame around a table."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HOME": "/nonexistent"}
    result = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -m app {command}'],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert status == 0 or result.stderr


async def test_the_runbook_of_stale_quotes_lists_the_stale_symbols(
    quotes: QuoteRepository, database: Database, symbol: str
) -> None:
    runbook = (ROOT / "docs/runbooks.md").read_text().split("## QuotesStale\n")[1].split("\n## ")[0]
    (statement,) = re.findall(r"```sql\n(.*?)```", runbook, re.DOTALL)
    now = datetime.now(UTC)
    stale, fresh = symbol, f"{symbol}X"
    await quotes.bulk_insert(
        [
            {"symbol": stale, "timestamp": now - timedelta(minutes=16), "price": 1},
            {"symbol": fresh, "timestamp": now - timedelta(minutes=1), "price": 1},
        ]
    )
    async with database.dedicated() as connection:
        rows = await connection.fetch(statement)
    named = [name for row in rows for name in row["some"]]
    assert stale in named
    assert fresh not in named


async def test_settings_of_the_environment_that_are_wrong_are_a_sentence(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUOTES_POOL_SIZE", "abc")
    with pytest.raises(InvalidRequest, match="QUOTES_POOL_SIZE"):
        async with QuoteRepository.open(lane.url):
            pass


async def test_a_table_of_text_that_is_no_utf8_is_refused(quotes: QuoteRepository) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0")
    symbols = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    table = pa.table({"symbol": symbols, "timestamp": pa.array([0], pa.timestamp("us", "UTC")), "price": [1]})
    with pytest.raises(InvalidRequest, match="Arrow"):
        await quotes.bulk_insert(table)
