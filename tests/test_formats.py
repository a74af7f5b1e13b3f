"""Every format and encoding of a body means the same, and none of them can hurt the service."""

import csv as standard_csv
import gzip
import io
import random
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import formats
from app.clock import Nanoseconds, Precision
from app.errors import BodyTooLarge, InvalidQuotes, MalformedBody, QuotesError, UnsupportedMediaType
from app.formats import arrow, csv, encoding, parquet
from app.main import create_app
from app.quote import tables as columns
from app.quote.batch import Batch
from app.quote.fields import NAMES
from app.quote.terms import Limits, Receipt, Terms
from tests.conftest import Lane, Serve, random_symbol, running
from tests.strategies import (
    NOW,
    as_numbers,
    in_arrow,
    in_csv,
    in_json,
    in_ndjson,
    in_parquet,
    outcome,
    tame_rows,
    terms,
    wild_rows,
)
from tests.test_api import problem

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TERMS = Terms(Limits.at(NOW))
CSV = formats.FORMATS["csv"]
WHEN = "2026-11-20T10:00:00Z"


def good(count: int = 3) -> pa.Table:
    return pa.table(
        {
            "symbol": [f"S{i}" for i in range(count)],
            "timestamp": [NOW - timedelta(seconds=i + 1) for i in range(count)],
            "price": pa.array([Decimal(i + 1) for i in range(count)], pa.decimal128(28, 12)),
            "source": ["feed"] * count,
        }
    )


# --- CSV ---


@given(
    st.lists(st.one_of(tame_rows, wild_rows), min_size=1, max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([standard_csv.QUOTE_MINIMAL, standard_csv.QUOTE_ALL]),
    terms,
    st.booleans(),
)
def test_csv_means_the_same_as_rows_of_text(
    rows: list[dict[str, Any]], ends: str, quoting: Any, terms: Terms, bom: bool
) -> None:
    texts = [{name: value for name, value in row.items() if value and "\ud800" not in value} for row in rows]
    body = b"\xef\xbb\xbf" * bom + in_csv(texts, lineterminator=ends, quoting=quoting)
    assert outcome(lambda: CSV.decode(body, terms)) == outcome(lambda: Batch.from_rows(texts, terms))


cells = st.lists(
    st.sampled_from(
        ['"', '""', ",", "\n", "\r", "\r\n", "A", "1", "0.5", WHEN, "0x1F", " 7", "\0", "é", f"A,{WHEN},1,2\n"]
    ),
    max_size=12,
).map("".join)


@given(cells, st.sampled_from([None, "s"]))
@settings(max_examples=500)
def test_the_two_ways_through_csv_agree(text: str, precision: Precision | None) -> None:
    body = b"symbol,timestamp,price,volume\n" + text.encode()
    terms = Terms(Limits.at(NOW), "skip", "update", precision)
    both = outcome(lambda: CSV.decode(body, terms))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv, "_table", lambda *_: None)
        assert outcome(lambda: CSV.decode(body, terms)) == both


@pytest.mark.parametrize("quoting", [standard_csv.QUOTE_MINIMAL, standard_csv.QUOTE_ALL])
def test_usual_csv_goes_the_fast_way(monkeypatch: pytest.MonkeyPatch, quoting: Any) -> None:
    monkeypatch.setattr(csv, "_rows", None)
    row = {"ts": "2026-11-20T10:00:00.123456789Z", "last": "1.50", "volume": "0.00000007", "source": ""}
    rows = [row | {"ticker": name} for name in ("NA", "null", "nan")]
    body = in_csv(rows, columns=("source", "ts", "volume", "ticker", "last"), quoting=quoting)
    found = CSV.decode(body, TERMS).rows.to_pylist()
    assert [row["symbol"] for row in found] == ["NA", "NAN", "NULL"]
    assert {(row["price"], row["volume"], row["source"], row["bid"]) for row in found} == {
        (Decimal("1.5"), Decimal("0.00000007"), None, None)
    }
    assert {row["nanos"] for row in found} == {789}
    with pytest.raises(InvalidQuotes) as caught:
        CSV.decode(body.replace(b"1.50", b"-1.5"), TERMS)
    assert caught.value.rejections[1].pointer == "/1/last"


@pytest.mark.parametrize(
    ("line", "pointer", "code"),
    [
        (f"A,{WHEN}", "", "row-ragged"),
        (f"A,{WHEN},1,1,1", "", "row-ragged"),
        (f",{WHEN},1,", "/symbol", "field-missing"),
        ("A,2026-11-20T10:00:00,1,", "/ts", "timestamp-naive"),
        ("A,1763600000,1,", "/ts", "timestamp-invalid"),
        (f"A,{WHEN},abc,", "/last", "wrong-type"),
        (f"A,{WHEN},nan,", "/last", "not-finite"),
        (f"A,{WHEN},-1,", "/last", "price-not-positive"),
        (f"A,{WHEN},,", "/last", "price-missing"),
        (f"A,{WHEN},0,1.5", "/last", "price-not-positive"),
        (f"A,{WHEN},1,1e16", "/volume", "size-out-of-range"),
        (f"A,{WHEN},1e-2147483640,1", "/last", "price-too-fine"),
        (f"A,{WHEN},1,0x1F", "/volume", "wrong-type"),
        (f"A,{WHEN},1,-1", "/volume", "size-negative"),
        ("A,2999-01-01T00:00:00Z,1,", "/ts", "timestamp-in-future"),
        (f"\udcff,{WHEN},1,", "/symbol", "not-unicode"),
        (f"A,{WHEN},\udcff,", "/last", "wrong-type"),
        (f'A,{WHEN},"1"2,', "", "row-misquoted"),
        (f'A,{WHEN},"1" ,', "", "row-misquoted"),
        (f'"A"B,{WHEN},1,', "", "row-misquoted"),
    ],
)
def test_a_bad_line_of_csv_is_named(line: str, pointer: str, code: str) -> None:
    text = f"symbol,ts,last,volume\r\nA,{WHEN},1,2\r\n\r\n{line}\r\nB,{WHEN},1.00,2"
    body = text.encode("utf-8", "surrogateescape")
    batch = CSV.decode(body, Terms(TERMS.limits, "skip"))
    found = [(r.index, r.pointer, r.code) for r in batch.rejected]
    assert found == [(1, f"/1{pointer}", code)]
    assert (batch.received, batch.rows["symbol"].to_pylist()) == (3, ["A", "B"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"\nA,B", "empty"),
        (b"symbol,timestamp,prise\n", "'prise'"),
        (b"symbol,timestamp,Price\n", "'Price'"),
        (b"symbol,timestamp,price,last\n", "both the price"),
        (b"symbol,timestamp,price,price\n", "both the price"),
        (b"symbol,price\n", "timestamp is missing"),
        (b"ts,price\n", "symbol is missing"),
        (b"symbol;timestamp\n", "unknown"),
        (b"\xff\xfes\n", "UTF-8"),
        (b"x" * 5000, "unknown"),
        (f'symbol,timestamp,price\nA,{WHEN},"1\nB,{WHEN},1\n'.encode(), "Not CSV"),
        (f'symbol,timestamp,source\nA,{WHEN},y\nA,{WHEN},"{"x" * 200_000}\n'.encode(), "row 1, column source"),
        (f'symbol,timestamp,source\nA,"{"x" * 200_000}"y,\n'.encode(), "row 0, column timestamp"),
        (f'symbol,timestamp\nA,{WHEN},,"{"x" * 200_000}\n'.encode(), "row 0, column 4"),
        (b'symbol,timestamp\nA,"' + b"x\n" * 200_000, "more than 131072 characters in row 0, column timestamp"),
    ],
)
def test_what_is_no_csv_of_quotes(body: bytes, words: str) -> None:
    with pytest.raises(MalformedBody) as caught:
        CSV.decode(body, TERMS)
    assert words in caught.value.detail


@pytest.mark.parametrize(
    ("name", "cell", "code"),
    [
        ("symbol", "x" * 200_000, "symbol-invalid"),
        ("symbol", '"' + "x" * 200_000 + '"', "symbol-invalid"),
        ("source", '"' + '"",' * 100_000 + '"', "text-invalid"),
        ("source", "é" * 200_000, "text-invalid"),
        ("timestamp", "x" * 200_000, "timestamp-invalid"),
        ("timestamp", "2" * 200_000, "timestamp-invalid"),
        ("price", "1" * 200_000, "number-too-long"),
        ("volume", "0." + "1" * 200_000, "number-too-long"),
    ],
)
@pytest.mark.parametrize("others", ["", '"A"x,,,,\n'])
def test_a_long_cell_refuses_its_row(name: str, cell: str, code: str, others: str) -> None:
    """Whether the fast reader takes the body or a row that is no CSV leaves it to the slow one."""
    cells = {"symbol": "A", "timestamp": WHEN, "price": "1", "volume": "1", "source": "y"}
    good, bad = (",".join(row.values()) for row in (cells, cells | {name: cell}))
    body = f"{','.join(cells)}\n{good}\n{bad}\n{good.replace('A', 'B')}\n{others}"
    batch = CSV.decode(body.encode(), Terms(Limits.at(NOW), "skip"))
    refused = [("/1/" + name, code)] + ([("/3", "row-misquoted")] if others else [])
    assert [(r.pointer, r.code) for r in batch.rejected] == refused
    assert (batch.received, len(batch)) == (3 + bool(others), 2)


def _texts(given_rows: list[str]) -> dict[str, bytes]:
    """Rows of a symbol, a timestamp and a price, in each format that is text."""
    cells = [row.split(",") for row in given_rows]
    lines = [f'{{"symbol":"{s}","timestamp":"{t}","price":"{p}"}}' for s, t, p in cells]
    return {
        "json": f"[{','.join(lines)}]".encode(),
        "ndjson": "\n".join(lines).encode(),
        "csv": "\n".join(["symbol,timestamp,price", *given_rows]).encode(),
    }


@pytest.mark.parametrize("name", ["json", "ndjson", "csv"])
def test_only_what_is_known_to_be_quick_is_read_at_once(name: str) -> None:
    codec, terms = formats.FORMATS[name], Terms(Limits.at(NOW), "skip")
    good, bad = f"A,{WHEN},1.5", f"A,{WHEN},x"
    for given_rows, at_once in (
        ([good], True),
        ([bad], True),
        ([good] * 1000, True),
        ([good, bad] * 50, True),
        ([good] * 1000 + [bad], False),
        (["1,2,3"] * 1000, False),
        ([f"A,{WHEN},{'1' * 40_000}"], False),
        ([good] * 12_000, False),
    ):
        body = _texts(given_rows)[name]
        batch = codec.at_once(body, terms)
        assert (batch is not None) == at_once, (given_rows[-1][:40], len(given_rows))
        if batch is not None:
            assert batch.receipt(inserted=0) == codec.decode(body, terms).receipt(inserted=0)


@pytest.mark.parametrize("rows", [11, 12, 30])
def test_csv_of_too_many_rows(rows: int) -> None:
    body = b"symbol,timestamp,price\n" + f"A,{WHEN},1\n".encode() * rows
    with pytest.raises(BodyTooLarge):
        CSV.decode(body, Terms(Limits(max_rows=10)))
    assert CSV.decode(body.replace(b"\n", b"\n\n"), Terms(Limits(max_rows=rows))).received == rows


@pytest.mark.parametrize("header", ["", "id", "__index_level_0__"])
def test_the_index_of_a_data_frame_is_passed_over_in_csv(header: str) -> None:
    body = f"{header},symbol,timestamp,price\n0,A,{WHEN},1\n1,B,{WHEN},x\n".encode()
    if header == "id":
        with pytest.raises(MalformedBody, match="'id'"):
            CSV.decode(body, TERMS)
        return
    batch = CSV.decode(body, Terms(TERMS.limits, "skip"))
    assert (batch.rows["symbol"].to_pylist(), [r.pointer for r in batch.rejected]) == (["A"], ["/1/price"])


def test_text_is_utf_8() -> None:
    for parameters in ("", "; charset=utf-8", '; header=present; Charset="UTF-8"'):
        assert formats.reader("text/csv" + parameters).name == "csv"
    with pytest.raises(UnsupportedMediaType):
        formats.reader("text/csv; charset=iso-8859-1")


# --- columns ---

texts = st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
moments = st.integers(1_763_500_000_000, 1_763_600_000_000)  # milliseconds of two days before NOW


def column(values: st.SearchStrategy[Any], kinds: st.SearchStrategy[pa.DataType], same: Callable[[Any], Any]) -> Any:
    """An Arrow type, values of it, and what a JSON client would write for a value."""
    return st.tuples(st.just(values), kinds, st.just(same))


def same(value: Any) -> Any:
    return value


def instant(count: int, per_second: int) -> Nanoseconds:
    return Nanoseconds(count * (10**9 // per_second))


def _scaled(per_second: int, milliseconds: int) -> int:
    return milliseconds * per_second // 1000


def text_of(value: float) -> str | None:
    """The shortest text of a float; that it is no number says that there is none."""
    return None if value != value else repr(value)  # noqa: PLR0124


prices = st.one_of(
    column(st.one_of(st.decimals(-10, 10**17, places=13), st.none()), st.just(pa.decimal128(31, 13)), same),
    column(st.one_of(st.decimals("0.01", 10**6, places=2), st.none()), st.just(pa.decimal128(28, 12)), same),
    column(
        st.decimals(-(10**30), 10**30, places=3), st.sampled_from([pa.decimal128(38, 3), pa.decimal256(50, 3)]), same
    ),
    column(st.one_of(st.floats(), st.floats(0.01, 1e6), st.none()), st.just(pa.float64()), text_of),
    column(st.integers(1, 10**6).map(lambda v: v / 100), st.just(pa.float64()), text_of),
    column(st.integers(-3, 1000).map(lambda v: v / 4), st.just(pa.float32()), text_of),
    column(st.one_of(st.integers(-2, 127), st.none()), st.sampled_from([pa.int8(), pa.int64()]), same),
    column(st.sampled_from(["1.5", "abc", "", "1e3", "nan", None]), texts, same),
    column(st.none(), st.just(pa.null()), same),
)
volumes = st.one_of(
    column(st.one_of(st.integers(-1, 100), st.none()), st.sampled_from([pa.int16(), pa.int64()]), same),
    column(st.integers(0, 2**64 - 1), st.just(pa.uint64()), same),
    column(st.sampled_from([1.0, 1.5, 5.1e-9, -1.0, 1e30, float("nan"), None]), st.just(pa.float64()), text_of),
    column(st.sampled_from(["7", "x", "1.5", "5.1e-9", None]), texts, same),
    column(st.decimals(-1, 9, places=1), st.just(pa.decimal128(5, 1)), same),
    column(st.none(), st.just(pa.null()), same),
)
instants = st.one_of(
    *(
        column(
            st.one_of(moments.map(partial(_scaled, size)), st.integers(-(2**63), 2**63 - 1), st.none()),
            st.sampled_from([pa.timestamp(unit, "UTC"), pa.timestamp(unit, "Asia/Kolkata")]),
            partial(instant, per_second=size),
        )
        for unit, size in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9))
    ),
    column(
        moments.map(lambda v: v * 10**6 + 999), st.just(pa.timestamp("ns", "UTC")), partial(instant, per_second=10**9)
    ),
    column(moments, st.just(pa.timestamp("ms")), lambda _: datetime(2026, 1, 1)),  # noqa: DTZ001
    column(moments.map(lambda v: v // 1000), st.sampled_from([pa.int64(), pa.uint32()]), same),
    column(st.integers(0, 2**64 - 1), st.just(pa.uint64()), same),
    column(st.one_of(st.floats(), st.floats(6e8, 1.8e9)), st.just(pa.float64()), text_of),
    column(st.decimals(6 * 10**8, 18 * 10**8, places=10), st.just(pa.decimal128(30, 10)), same),
    column(st.sampled_from([WHEN, "x", "1763600000", "2026-11-20T10:00:00", None]), texts, same),
)
names = column(st.sampled_from(["A", "a", "BRK.B", "NA", "", "ß", "x" * 65, "a  b", None]), texts, same)
sources = column(st.one_of(st.none(), st.text(max_size=5), st.just("x" * 256)), texts, same)


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, list[dict[str, Any]]]:
    """A table, and the same rows as a JSON client would write them."""
    size = draw(st.integers(1, 6))
    arrays, written = {}, []
    for field, kinds in (
        ("ticker", names), ("timestamp", instants), ("last", prices), ("bid", prices), ("volume", volumes),
        ("source", sources),
    ):  # fmt: skip
        values, kind, write = draw(kinds)
        found = draw(st.lists(values, min_size=size, max_size=size))
        if pa.types.is_timestamp(kind):
            arrays[field] = pa.array(found, pa.int64()).cast(kind)
        elif pa.types.is_dictionary(kind):
            arrays[field] = pa.array(found, pa.string()).dictionary_encode().cast(kind)
        else:
            arrays[field] = pa.array(found, kind)
        written.append([(field, None if value is None else write(value)) for value in found])
    rows = [dict(row) for row in zip(*written, strict=True)]
    return pa.table(arrays), rows


@given(tables(), terms, st.sampled_from([None, 2]), st.sampled_from([None, "zstd", "lz4"]))
@settings(max_examples=500)
def test_columns_mean_the_same_as_rows(
    case: tuple[pa.Table, list[dict[str, Any]]], terms: Terms, split: int | None, compression: str | None
) -> None:
    table, rows = case
    expected = outcome(lambda: Batch.from_rows(rows, terms))
    for file in (False, True):
        body = in_arrow(table, rows=split, file=file, compression=compression)
        assert outcome(lambda body=body: arrow.decode(body, terms)) == expected  # type: ignore[misc]
    try:
        body = in_parquet(table, compression=compression or "snappy", row_group_size=split or 100)
    except pa.ArrowInvalid:  # there are no seconds in Parquet, and so many have no milliseconds
        return
    assert outcome(lambda: parquet.decode(body, terms)) == expected


COLUMNAR: dict[str, tuple[Callable[[bytes, Terms], Batch], Callable[..., bytes]]] = {
    "arrow": (arrow.decode, in_arrow),
    "parquet": (parquet.decode, in_parquet),
}
columnar = pytest.mark.parametrize(("decode", "write"), COLUMNAR.values(), ids=COLUMNAR)
Decode = Callable[[bytes, Terms], Batch]


@columnar
def test_usual_columns_go_the_fast_way(
    decode: Decode, write: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "from_rows", None)
    table = good().rename_columns(["ticker", "ts", "last", "source"])
    assert decode(write(table), TERMS).rows["symbol"].to_pylist() == ["S0", "S1", "S2"]
    for kind in (pa.float64(), pa.float32(), pa.int64(), pa.string()):
        again = table.set_column(2, "last", table["last"].cast(kind))
        assert decode(write(again), TERMS).rows.to_pylist() == decode(write(table), TERMS).rows.to_pylist()
    with pytest.raises(InvalidQuotes) as caught:
        decode(write(table.set_column(2, "last", pa.array([1, -1, 1]))), TERMS)
    assert [r.pointer for r in caught.value.rejections] == ["/1/last"]


@columnar
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.append_column("prise", t["price"]), "'prise'"),
        (lambda t: t.append_column("index", t["price"]), "'index'"),
        (lambda t: t.append_column("last", t["price"]), "both the price"),
        (lambda t: t.drop_columns(["timestamp"]), "timestamp is missing"),
        (lambda t: t.set_column(0, "symbol", pa.array([b"a", b"b", b"c"])), "column symbol is of a type"),
        (lambda t: t.set_column(2, "price", pa.array([[1], [2], [3]])), "column price is of a type"),
        (lambda t: t.set_column(2, "price", pa.array([True, True, False])), "column price is of a type"),
        (lambda t: t.set_column(2, "price", pa.array([NOW] * 3)), "column price is of a type"),
        (lambda t: t.set_column(2, "price", pa.array([{"a": 1}] * 3)), "column price is of a type"),
        (lambda t: t.set_column(1, "timestamp", pa.array([NOW.date()] * 3)), "column timestamp is of a type"),
        (lambda t: t.set_column(3, "source", pa.array([1.5] * 3)), "column source is of a type"),
    ],
)
def test_columns_that_are_none_of_a_quote(
    decode: Decode, write: Callable[..., bytes], change: Callable[[pa.Table], pa.Table], words: str
) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode(write(change(good())), TERMS)
    assert words in caught.value.detail


@columnar
def test_no_rows_and_too_many(decode: Decode, write: Callable[..., bytes]) -> None:
    assert decode(write(good().slice(0, 0)), TERMS).received == 0
    with pytest.raises(BodyTooLarge):
        decode(write(good(11)), Terms(Limits(max_rows=10)))
    assert decode(write(good(10)), Terms(Limits(max_rows=10))).received == 10


@columnar
def test_the_index_of_a_data_frame_is_passed_over(decode: Decode, write: Callable[..., bytes]) -> None:
    table = good()
    for index in ([3, 4, 5], [{"a": 1}] * 3, [b"x"] * 3):
        for place, other in ((0, "__index_level_0__"), (4, "__index_level_12__")):
            named = table.add_column(place, other, pa.array(index))
            assert outcome(lambda named=named: decode(write(named), TERMS)) == outcome(  # type: ignore[misc]
                lambda: decode(write(table), TERMS)
            )


def by_polars(table: pa.Table) -> list[tuple[Decode, bytes]]:
    """What polars writes of a table: it lays out files and pages in another way than Arrow's own library."""
    frame = pl.DataFrame(table)
    found: list[tuple[Decode, bytes]] = []
    for decode, write in (
        (parquet.decode, frame.write_parquet),
        (arrow.decode, frame.write_ipc),
        (arrow.decode, frame.write_ipc_stream),
        (arrow.decode, partial(frame.write_ipc, compression="zstd")),
    ):
        sink = io.BytesIO()
        write(sink)
        found.append((decode, sink.getvalue()))
    return found


def test_what_polars_writes_means_the_same() -> None:
    table = good(1000)
    expected = outcome(lambda: arrow.decode(in_arrow(table), TERMS))
    shared = table.set_column(3, "source", table["source"].dictionary_encode())
    for decode, body in by_polars(table) + by_polars(shared):
        assert outcome(lambda decode=decode, body=body: decode(body, TERMS)) == expected  # type: ignore[misc]


def test_a_frame_without_rows_is_an_empty_batch() -> None:
    """Of either library, each of which writes another kind of nothing."""
    empty = good(0)
    for options in ({}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "zstd"}):
        assert parquet.decode(in_parquet(empty, **options), TERMS).receipt(inserted=0) == Receipt(0, 0)
    for decode, body in by_polars(empty):
        assert decode(body, TERMS).receipt(inserted=0) == Receipt(0, 0)


def test_an_arrow_file_is_the_messages_that_its_footer_names() -> None:
    table = good(10)
    expected = outcome(lambda: arrow.decode(in_arrow(table), TERMS))
    shared = table.set_column(3, "source", table["source"].dictionary_encode())
    for body in (
        in_arrow(table, file=True),
        in_arrow(table, file=True, rows=3),
        in_arrow(shared, file=True),
        in_arrow(table, file=True, compression="zstd"),
    ):
        assert body.startswith(b"ARROW1")
        assert outcome(lambda body=body: arrow.decode(body, TERMS)) == expected  # type: ignore[misc]


def test_a_block_of_an_arrow_file_that_comes_again_and_again() -> None:
    """A few bytes of a footer would stand for any number of large messages."""
    table = pa.concat_tables([good(98), good(1), good(1)]).combine_chunks()
    body = in_arrow(table, rows=98, file=True)
    assert arrow.decode(body, Terms(TERMS.limits, "skip")).received == 100
    footer = len(body) - 10 - int.from_bytes(body[-10:-6], "little")
    messages = [at for at in range(0, footer, 8) if body[at : at + 4] == b"\xff" * 4]
    at, again = (found for m in messages if (found := body.rfind(m.to_bytes(8, "little"))) > footer)
    with pytest.raises(BodyTooLarge):
        arrow.decode(body[:again] + body[at : at + 24] + body[again + 24 :], Terms(Limits(max_rows=100)))


def test_numbers_of_any_length_are_no_column_of_parquet() -> None:
    for kind in (pa.binary(), pa.binary(40), pa.list_(pa.int64()), pa.time64("us")):
        values = pa.array([None] * 3, kind)
        with pytest.raises(MalformedBody, match="column price"):
            parquet.decode(in_parquet(good().set_column(2, "price", values)), TERMS)


def test_damaged_columns() -> None:
    stream, file, indexed = in_arrow(good()), in_parquet(good()), in_arrow(good(), file=True)
    for decode, body in (
        (arrow.decode, b""),
        (arrow.decode, b"ARROW1\0\0"),
        (arrow.decode, stream[:-20]),
        (arrow.decode, stream + stream),
        (arrow.decode, stream + b"\0"),
        (arrow.decode, file),
        (arrow.decode, indexed[:-1]),
        (arrow.decode, indexed[:100]),
        (arrow.decode, indexed[8:]),
        (arrow.decode, b"ARROW1\0\0" + stream[:-20] + b"ARROW1"),
        (parquet.decode, b""),
        (parquet.decode, b"PAR1" * 3),
        (parquet.decode, file[:-1]),
        (parquet.decode, file[100:]),
        (parquet.decode, stream),
    ):
        with pytest.raises(MalformedBody):
            decode(body, TERMS)


def test_a_decimal_that_no_number_can_be_written_of() -> None:
    table = good()
    for kind in (pa.decimal128(38, 40), pa.decimal128(38, -2000)):
        wide = pa.Array.from_buffers(kind, 3, [None, pa.py_buffer(b"\1" + bytes(47))])
        with pytest.raises(MalformedBody, match="column price"):
            arrow.decode(in_arrow(table.set_column(2, "price", wide)), TERMS)


def test_a_zone_whose_name_is_no_text() -> None:
    body = in_arrow(good().set_column(1, "timestamp", pa.array([1, 2, 3], pa.timestamp("us", "ZONE"))))
    assert body.count(b"ZONE") == 1
    with pytest.raises(MalformedBody):
        arrow.decode(body.replace(b"ZONE", b"ZO\xbbE"), TERMS)


def test_an_index_beyond_its_dictionary_is_not_followed() -> None:
    table = good()
    bad = pa.DictionaryArray.from_arrays(pa.array([0, 1_000_000, 0], pa.int32()), pa.array(["feed"]), safe=False)
    with pytest.raises(MalformedBody):
        arrow.decode(in_arrow(table.set_column(3, "source", bad)), TERMS)


def big(kind: pa.DataType, *, length: int = 2**20, rows: int = 10_000) -> pa.Table:
    """A few bytes that stand for 10 GB: one long text in all rows."""
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * length]))
    table = good(rows)
    if pa.types.is_string_view(kind):
        one = pa.array(["x" * length], pa.string_view()).buffers()
        view = pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(one[1].to_pybytes() * rows), one[2]])
        return table.set_column(3, "source", view)
    return table.set_column(3, "source", shared)


def test_a_long_text_in_many_rows_is_not_written_out() -> None:
    for body in (in_arrow(big(pa.string_view())), in_arrow(big(pa.dictionary(pa.int32(), pa.string())))):
        with pytest.raises(BodyTooLarge):
            arrow.decode(body, TERMS)
    with pytest.raises(BodyTooLarge):
        parquet.decode(in_parquet(big(pa.dictionary(pa.int32(), pa.string()))), TERMS)


def test_what_rows_share_is_not_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    views = pa.array(["x" * 2**20], pa.string_view()).buffers()
    shown = pa.Array.from_buffers(pa.string_view(), 1000, [None, pa.py_buffer(views[1].to_pybytes() * 1000), views[2]])
    table = good(1000)
    long = pa.array(["feed", "x" * 2**20])
    indices = pa.array([0] * 1000, pa.int32())
    monkeypatch.setattr(columns, "_looked_up", None)
    for source, rows in (
        (shown, 1000),
        (pa.DictionaryArray.from_arrays(indices, shown), 1000),
        (pa.DictionaryArray.from_arrays(indices, long), 1),
    ):
        body = in_arrow(table.set_column(3, "source", source), rows=rows)
        assert len(body) < 2**21
        with pytest.raises(BodyTooLarge):
            arrow.decode(body, TERMS)


def test_long_texts_are_counted_over_all_batches() -> None:
    """Each batch alone is within the limit, all together are not."""
    for kind in (pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = big(kind, length=10_000, rows=1000)
        assert arrow.decode(in_arrow(table, rows=100), Terms(TERMS.limits, "skip")).received == 1000
        with pytest.raises(BodyTooLarge):
            arrow.decode(in_arrow(table, rows=100), Terms(Limits(max_bytes=5_000_000), "skip"))


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "RLE_DICTIONARY"])
def test_text_in_every_encoding_of_parquet(encoding: str) -> None:
    table = good(2000).set_column(3, "source", pa.array([f"trade-{i}" for i in range(2000)]))
    shared = table.set_column(3, "source", table["source"].dictionary_encode())
    expected = outcome(lambda: arrow.decode(in_arrow(table), TERMS))
    options: dict[str, Any] = {"data_page_size": 4096, "row_group_size": 700}
    if encoding != "RLE_DICTIONARY":
        options |= {"use_dictionary": False, "column_encoding": dict.fromkeys(("symbol", "source"), encoding)}
    for written in (table, shared):
        for version in ("1.0", "2.0"):
            body = in_parquet(written, data_page_version=version, **options)
            assert encoding in pq.ParquetFile(io.BytesIO(body)).metadata.row_group(0).column(3).encodings
            if written is shared and "DELTA" in encoding:  # to Arrow's own library too
                with pytest.raises(MalformedBody, match="feature"):
                    parquet.decode(body, TERMS)
                continue
            assert outcome(lambda body=body: parquet.decode(body, TERMS)) == expected  # type: ignore[misc]


def test_an_old_writer_is_read_like_any_other() -> None:
    body = in_parquet(good())
    writer = b"parquet-cpp-arrow version " + pa.__version__.encode()
    assert body.count(writer) == 1
    old = b"parquet-cpp version 1.5.1".ljust(len(writer))
    assert parquet.decode(body.replace(writer, old), TERMS).received == 3


@pytest.mark.parametrize("kind", [pa.int32(), pa.float64(), pa.decimal128(20, 8), pa.timestamp("us", "UTC")])
def test_numbers_may_share_a_dictionary(kind: pa.DataType) -> None:
    name = "timestamp" if pa.types.is_timestamp(kind) else "price"
    table = good(3)
    place = table.schema.get_field_index(name)
    plain = table.set_column(place, name, table[name].cast(kind))
    coded = plain.set_column(place, name, plain[name].dictionary_encode())
    expected = outcome(lambda: arrow.decode(in_arrow(plain), TERMS))
    for file in (False, True):
        assert outcome(lambda file=file: arrow.decode(in_arrow(coded, file=file), TERMS)) == expected  # type: ignore[misc]


# --- mutations ---


def samples() -> Iterator[tuple[str, bytes]]:
    """Valid bodies in their varieties."""
    table = good(60)
    shared = table.set_column(3, "source", table["source"].dictionary_encode())
    viewed = table.set_column(3, "source", table["source"].cast(pa.string_view()))
    for variety in (table, shared, viewed):
        yield "arrow", in_arrow(variety, rows=25)
    yield "arrow", in_arrow(shared, compression="zstd")
    yield "arrow", in_arrow(table, compression="lz4")
    yield "arrow", in_arrow(table, rows=25, file=True)
    yield "parquet", in_parquet(table)
    yield "parquet", in_parquet(table, compression="zstd", data_page_version="2.0", use_dictionary=False)
    yield "parquet", in_parquet(good(0))
    yield "csv", b'symbol,timestamp,price\n"A",2026-11-20T10:00:00Z,1\n'
    yield "ndjson", in_ndjson([{"symbol": "A", "timestamp": WHEN, "price": 1.5}] * 2)


def mutated(body: bytes, rng: random.Random) -> bytes:
    text = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(text))
        match rng.randrange(4):
            case 0:
                text[at] = rng.randrange(256)
            case 1:
                text[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", rng.randbytes(4)])
            case 2:
                del text[at : at + rng.choice([1, 8, 64])]
            case _:
                text[at:at] = text[at : at + rng.choice([1, 8, 64])]
        text = text or bytearray(b"\0")
    return bytes(text)


def mutate(seed: int, count: int) -> None:
    """Decode text with random damage; the process lives, and raises only what is answered as a 4xx."""
    rng = random.Random(seed)
    bodies = [(name, body) for name, body in samples() if name in {"csv", "ndjson"}]
    refused = sound = 0
    for _ in range(count):
        name, body = rng.choice(bodies)
        try:
            formats.FORMATS[name].decode(mutated(body, rng), TERMS)
        except QuotesError as error:
            refused += 400 <= error.status < 500
        else:
            sound += 1
    if refused + sound < count:
        raise AssertionError
    print(refused)  # noqa: T201  for the test that waits


@pytest.mark.parametrize("seed", [1, 2])
def test_damage_is_a_mistake_of_the_client(seed: int) -> None:
    program = f"import faulthandler; faulthandler.enable(); from tests.test_formats import mutate; mutate({seed}, 2000)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500


# --- encodings ---

plain = b'[{"symbol":"A"}]' * 50_000
ENCODINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstd.compress}
encodings = pytest.mark.parametrize("name", ENCODINGS)


def inflated(name: str, chunks: list[bytes], limit: int = 2**24, most: int = 2**16) -> bytes:
    pieces: list[bytes] = []
    found = encoding.inflater(name, limit, pieces.append)
    assert found is not None
    for chunk in chunks:
        done = found.feed(chunk, most=most)
        while not done:
            done = found.feed(most=most, parts=True)
    found.finish()
    return b"".join(pieces)


@encodings
@given(st.data())
def test_an_encoded_body_comes_in_any_pieces(name: str, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from([b"", b"a", b"b" * 300_000, plain]), min_size=1, max_size=4))
    body = b"".join(map(ENCODINGS[name], parts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert inflated(name, chunks, most=data.draw(st.sampled_from([1, 2**16, 300_000]))) == b"".join(parts)


@encodings
def test_an_encoding_that_is_damaged(name: str) -> None:
    body = ENCODINGS[name](plain)
    damaged = body[: len(body) // 2] + bytes(8) + body[len(body) // 2 + 8 :]
    for wrong in (b"", b"x", plain, body[:-1], body + b"x", body + b"\0", body + body[:-3], damaged):
        with pytest.raises(MalformedBody):
            inflated(name, [wrong])
    with pytest.raises(MalformedBody, match="parts"):
        inflated(name, [ENCODINGS[name](b"") * 2001])


@encodings
def test_the_limit_is_on_what_comes_out(name: str) -> None:
    body = ENCODINGS[name](plain)
    assert inflated(name, [body], len(plain)) == plain
    with pytest.raises(BodyTooLarge):
        inflated(name, [body], len(plain) - 1)


def test_a_large_window_is_refused() -> None:
    for log, taken in ((23, True), (24, False)):
        compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
        body = compressor.compress(bytes(2**24)) + compressor.compress(bytes(2**24)) + compressor.flush()
        if taken:
            assert len(inflated("zstd", [body], 2**26)) == 2**25
        else:
            with pytest.raises(MalformedBody):
                inflated("zstd", [body], 2**26)


# --- over HTTP ---


def rows_for(symbol: str) -> list[dict[str, str]]:
    """Eight rows: five good ones of four keys, three that are refused."""
    row = {"symbol": symbol, "timestamp": "2026-11-16T00:00:00Z", "price": "1.5", "source": "feed"}
    return [
        row,
        row
        | {"timestamp": "2026-11-16T00:00:01.000001001Z", "bid": "1.1234567890125", "ask": "1.1", "volume": "7.5e-7"},
        row | {"timestamp": "2026-11-16T00:00:02Z", "price": "-1", "bid": "0"},
        row | {"price": "2.5"},
        row | {"timestamp": "2200-01-01T00:00:00Z"},
        row | {"symbol": symbol.lower(), "timestamp": "2026-11-16T00:00:03Z", "ask": "0"},
        row | {"symbol": "?"},
        row | {"timestamp": "2026-11-16T00:00:01.000001Z"},
    ]


def bodies_for(rows: list[dict[str, str]]) -> dict[str, bytes]:
    table = pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in NAMES]))
    for name, kind in (("timestamp", pa.timestamp("ns", "UTC")), ("price", pa.float64()), ("volume", pa.float64())):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    numbers = [as_numbers(row) for row in rows]
    return {
        "application/json": in_json(numbers),
        "application/x-ndjson": in_ndjson(numbers),
        "text/csv": in_csv(rows),
        "application/vnd.apache.arrow.stream": in_arrow(table),
        "application/vnd.apache.arrow.file": in_arrow(table, file=True),
        "application/vnd.apache.parquet": in_parquet(table),
        "application/x-parquet": in_parquet(table),
    }


async def test_every_format_stores_the_same(client: httpx.AsyncClient) -> None:
    seen = []
    for media in bodies_for(rows_for("X")):
        symbol = random_symbol()
        body = bodies_for(rows_for(symbol))[media]
        answer = await client.post("/v1/quotes?on_error=skip", content=body, headers={"content-type": media})
        assert answer.status_code == 200, answer.text
        stored = await client.get("/v1/quotes", params={"symbols": symbol, "start": "2026-11-16"})
        seen.append((answer.json(), stored.text.replace(symbol, "X")))
        refused = problem(
            await client.post("/v1/quotes", content=body, headers={"content-type": media}), 422, "invalid-quotes"
        )
        assert [(e["index"], e["pointer"], e["code"]) for e in refused["errors"]] == [
            (2, "/2/price", "price-not-positive"),
            (4, "/4/timestamp", "timestamp-in-future"),
            (6, "/6/symbol", "symbol-invalid"),
        ]
    assert seen[1:] == seen[:-1]
    receipt, quotes = seen[0]
    assert {k: v for k, v in receipt.items() if k != "rejected"} == {
        "received": 8, "inserted": 4, "updated": 0, "unchanged": 0, "superseded": 1, "numbered": 0, "rounded": 1,
        "zeros": 1, "crossed": 1,
    }  # fmt: skip
    assert len(receipt["rejected"]) == 3
    assert quotes.count('"symbol"') == 4
    assert '"bid":1.123456789013' in quotes
    assert '"volume":0.00000075' in quotes
    assert '"timestamp":"2026-11-16T00:00:01.000001001Z"' in quotes


@pytest.mark.parametrize("name", ["gzip", "X-GZIP", "zstd", "identity"])
async def test_encodings_of_a_body(client: httpx.AsyncClient, symbol: str, name: str) -> None:
    body = in_json(rows_for(symbol)[:2])
    body = ENCODINGS.get(name.lower().removeprefix("x-"), bytes)(body)
    answer = await client.post("/v1/quotes", content=body, headers={"content-encoding": name})
    assert answer.json()["inserted"] == 2


@pytest.mark.parametrize("name", ["br", "gzip, zstd", "deflate", "compress"])
async def test_another_encoding_is_told_which_ones_there_are(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.post("/v1/quotes", content=b"[]", headers={"content-encoding": name})
    problem(answer, 415, "unsupported-encoding")
    assert answer.headers["accept-encoding"] == "gzip, zstd"


async def test_an_unknown_type_is_told_which_ones_there_are(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/quotes", content=b"x", headers={"content-type": "text/xml"})
    body = problem(answer, 415, "unsupported-media-type")
    for fmt in formats.FORMATS.values():
        for media in fmt.media_types:
            assert media in body["detail"]


async def test_the_interface_lists_every_format(lane: Lane) -> None:
    async with running(create_app(lane.make_settings())) as client:
        document = (await client.get("/openapi.json")).json()
    listed = document["paths"]["/v1/quotes"]["post"]["requestBody"]["content"]
    assert set(listed) == {fmt.media_types[0] for fmt in formats.FORMATS.values()}


def gzip_bomb() -> Iterator[bytes]:
    """1 GB of zeros in 1 MB."""
    deflate = zlib.compressobj(9, wbits=31)
    head = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    yield head
    yield block * 1023


def zstd_bomb() -> Iterator[bytes]:
    """1 GB of zeros in 32 kB."""
    compressor = zstd.ZstdCompressor()
    for _ in range(1024):
        yield compressor.compress(bytes(2**20))
    yield compressor.flush()


def memory(pid: int, what: str) -> int:
    """Bytes that a process holds: VmRSS now, VmHWM at most since it was asked to forget."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_what_is_small_only_when_compressed_does_no_harm(serve: Serve, shared_dir: Path) -> None:
    table = good(1)
    long = table.set_column(3, "source", pa.array(["x" * 2**28]))
    media = {name: fmt.media_types[0] for name, fmt in formats.FORMATS.items()}
    bombs = {
        "gzip": (b"".join(gzip_bomb()), {"content-encoding": "gzip"}),
        "zstd": (b"".join(zstd_bomb()), {"content-encoding": "zstd"}),
        "arrow zstd": (in_arrow(long, compression="zstd"), {"content-type": media["arrow"]}),
        "arrow file zstd": (in_arrow(long, file=True, compression="zstd"), {"content-type": media["arrow"]}),
        "parquet zstd": (in_parquet(long, compression="zstd"), {"content-type": media["parquet"]}),
        "arrow shared": (in_arrow(big(pa.string_view())), {"content-type": media["arrow"]}),
        "parquet shared": (in_parquet(big(pa.dictionary(pa.int32(), pa.string()))), {"content-type": media["parquet"]}),
    }
    with serve(shared_dir / "bombs", QUOTES_MAX_BODY_BYTES=str(8 * 2**20)) as service:
        pid = service.process.pid
        for name, (body, headers) in bombs.items():
            assert len(body) < 3 * 2**20, name
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            before = memory(pid, "VmRSS")
            answer = httpx.post(f"{service.url}/v1/quotes", content=body, headers=headers, timeout=60)
            problem(answer, 413, "body-too-large")
            assert memory(pid, "VmHWM") - before < 50 * 2**20, name
        assert httpx.get(f"{service.url}/health/live").status_code == 200


@pytest.mark.parametrize("length", ["x", "-1", "1e3", "٣", "9" * 5000])
def test_a_length_that_is_no_number(service_url: str, length: str) -> None:
    host, port = service_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            f"POST /v1/quotes HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n[]".encode()
        )
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 4"), answer


def test_a_quote_that_takes_lines_with_it_refuses_the_body() -> None:
    body = f'symbol,timestamp,price,source\nA,{WHEN},1,"feed\nB,{WHEN},1,x\nC,{WHEN},1,"ok"\nD,{WHEN},1,ok\n'
    with pytest.raises(MalformedBody, match="in row 0 or after"):
        CSV.decode(body.encode(), Terms(Limits.at(NOW), on_error="skip"))


def test_a_mark_of_order_within_the_text_is_a_letter() -> None:
    body = f"symbol,timestamp,price\n\ufeffA,{WHEN},1\nB,{WHEN},1\n".encode()
    batch = CSV.decode(body, Terms(Limits.at(NOW), on_error="skip"))
    assert [(r.index, r.code) for r in batch.rejected] == [(0, "symbol-invalid")]
    source = CSV.decode(f"source,symbol,timestamp,price\n\ufefffeed,A,{WHEN},1\n".encode(), TERMS)
    assert source.rows["source"].to_pylist() == ["\ufefffeed"]


def test_lines_of_nothing_are_refused_before_they_are_read() -> None:
    with pytest.raises(BodyTooLarge):
        formats.reader("application/x-ndjson").decode(b"x\n" * 203, Terms(Limits(max_rows=100)))


@pytest.mark.parametrize("year", ["0000", "0999", "1676"])
def test_years_without_room_have_one_answer_in_every_format(year: str) -> None:
    when = f"{year}-01-01T00:00:00Z"
    terms = Terms(Limits.at(NOW), on_error="skip")
    table = pa.table({"symbol": ["A"], "timestamp": [when], "price": [1]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answers = {
        batch.rejected[0].code
        for batch in (
            CSV.decode(f"symbol,timestamp,price\nA,{when},1\n".encode(), terms),
            arrow.decode(sink.getvalue().to_pybytes(), terms),
            formats.reader(None).decode(f'[{{"symbol":"A","timestamp":"{when}","price":1}}]'.encode(), terms),
        )
    }
    assert answers == {"timestamp-invalid" if year == "0000" else "timestamp-too-old"}


def test_half_floats_are_no_column_of_prices() -> None:
    with pytest.raises(MalformedBody, match="price"):
        columns.fields_of_schema(
            pa.schema([("symbol", pa.string()), ("timestamp", pa.string()), ("price", pa.float16())])
        )
