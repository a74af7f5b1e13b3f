"""The same rows give the same batch and the same receipt, whatever form they come in and however they are cut."""

import csv as standard_csv
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app import formats
from app.clock import rfc3339_nano
from app.errors import Rejection
from app.quote import rows
from app.quote.batch import Batch, joined
from app.quote.fields import ALIASES, NAMES, NUMBERS
from app.quote.rules import Numeral
from app.quote.terms import Receipt, Terms
from tests.strategies import (
    ABSURD,
    EDGES,
    LIMITS,
    TEXT_KINDS,
    as_numbers,
    in_arrow,
    in_csv,
    in_json,
    in_ndjson,
    in_parquet,
    in_texts,
    outcome,
    tame_rows,
    terms,
    typed,
    wild_rows,
)
from tests.test_quote_batch import START, few

WHEN = "2026-11-20T10:00:00Z"
Rows = list[dict[str, Any]]


@dataclass
class Form:
    """A way to send rows of texts: the format, and what becomes of the rows and of their columns."""

    name: str
    write: Callable[[Rows], bytes]
    columns: bool = False


def _table(given_rows: Rows, kind: pa.DataType | None) -> pa.Table:
    """The rows in columns: of a kind of text, or where every value allows it of another type."""
    names = list(dict.fromkeys(name for row in given_rows for name in row))
    arrays = {}
    for place, name in enumerate(names):
        values = [row.get(name) for row in given_rows]
        others = typed(name, values) if kind is None else []
        # Any of them has the very same values, so that it does not matter which one is taken.
        arrays[name] = (
            others[(len(given_rows) + place) % len(others)] if others else in_texts(values, kind or pa.string())
        )
    return pa.table(arrays)


def _dense(given_rows: Rows) -> Rows:
    names = list(dict.fromkeys(name for row in given_rows for name in row))
    return [{name: row.get(name) for name in names} for row in given_rows]


def _sparse(given_rows: Rows) -> Rows:
    """Without the fields that a row has not; only what is there has a name of the client's."""
    return [{name: value for name, value in row.items() if value is not None or name in ALIASES} for row in given_rows]


def _csv(given_rows: Rows, **dialect: Any) -> bytes:
    return in_csv(given_rows, columns=list(dict.fromkeys(name for row in given_rows for name in row)), **dialect)


def _columns(name: str, kind: pa.DataType | None, what: str, write: Callable[..., bytes], **options: Any) -> Form:
    return Form(f"{name} of {what}", lambda given_rows: write(_table(given_rows, kind), **options), columns=True)


FORMS = {
    form.name: form
    for form in (
        Form("json", lambda given_rows: b'{"quotes":' + in_json(_dense(given_rows)) + b"}"),
        Form("json array", lambda given_rows: in_json(_sparse(given_rows))),
        Form("json of numbers", lambda given_rows: in_json([as_numbers(row) for row in given_rows])),
        Form("ndjson", in_ndjson),
        Form("ndjson of numbers", lambda given_rows: in_ndjson([as_numbers(row) for row in _sparse(given_rows)])),
        Form("csv", _csv),
        Form("csv quoted", lambda given_rows: _csv(given_rows, quoting=standard_csv.QUOTE_ALL, lineterminator="\n")),
        *(_columns("arrow", kind, str(kind), in_arrow) for kind in TEXT_KINDS),
        _columns("arrow", None, "types", in_arrow, rows=2),
        _columns("arrow", None, "types in a file", in_arrow, file=True),
        _columns("arrow", pa.string(), "texts in a file", in_arrow, file=True, rows=3, compression="zstd"),
        _columns("parquet", pa.string(), "texts", in_parquet),
        _columns("parquet", pa.large_string(), "plain texts", in_parquet, use_dictionary=False, row_group_size=2),
        _columns("parquet", None, "types", in_parquet, compression="zstd"),
    )
}


def sent(form: Form, given_rows: Rows, terms: Terms) -> Any:
    """What becomes of the rows in that form, without the pointer of the array that only JSON has."""
    body = form.write(given_rows)
    found = outcome(lambda: formats.FORMATS[form.name.split()[0]].decode(body, terms))
    match found:
        case [Rejection(), *_]:
            return _bare(found)
        case Receipt(), _, stored:
            return msgspec.structs.replace(found[0], rejected=_bare(found[0].rejected)), stored
    return found


def _bare(rejections: list[Rejection]) -> list[Rejection]:
    return [dataclasses.replace(r, pointer=r.pointer.removeprefix("/quotes")) for r in rejections]


def same(given_rows: Rows, terms: Terms) -> Any:
    """What becomes of rows, which is the same in every form that they have."""
    in_columns = not any("\ud800" in value for row in given_rows for value in row.values() if value)
    found = {
        name: sent(form, given_rows, terms) for name, form in FORMS.items() if in_columns or not form.columns
    }  # fmt: skip
    first = found["json array"]
    assert {name: result for name, result in found.items() if result != first} == {}
    return first


def with_every_column(given_rows: Rows, names: Sequence[str], other_names: Mapping[str, str]) -> Rows:
    """Rows in which every one of the columns is there, under the name that the client gives it."""
    shown = [name for name in NAMES if name in names or name in {"symbol", "timestamp"}]
    return [{other_names.get(name, name): row.get(name) or None for name in shown} for row in given_rows]


mixed = st.lists(st.one_of(tame_rows, tame_rows, wild_rows), min_size=1, max_size=8)
names = st.sets(st.sampled_from(NAMES[2:]), min_size=1, max_size=7).map(sorted)
other_names = st.sampled_from([{}, {"symbol": "ticker", "timestamp": "ts", "price": "last", "bid": "bid_price"}])
lengths = st.sampled_from([0, rows.FEW])


@given(mixed, names, other_names, terms, lengths)
@settings(max_examples=400)
def test_the_same_rows_give_the_same_in_every_format(
    given_rows: Rows, names: list[str], other_names: dict[str, str], terms: Terms, length: int
) -> None:
    with few(length):
        same(with_every_column(given_rows, names, other_names), terms)


@given(st.lists(tame_rows, min_size=1, max_size=8), names, terms, lengths)
@settings(max_examples=300)
def test_good_rows_give_the_same_in_every_format(given_rows: Rows, names: list[str], terms: Terms, length: int) -> None:
    with few(length):
        receipt, stored = same(
            with_every_column(given_rows, [*names, "price"], {}), replace(terms, on_error="skip", limits=LIMITS)
        )
    assert receipt.received == len(given_rows) == len(stored) + receipt.superseded + len(receipt.rejected)


def test_what_a_library_adds_for_an_index_is_passed_over_in_every_format() -> None:
    given_rows = [
        {"__index_level_0__": str(i), "symbol": "A", "timestamp": f"2026-11-20T10:00:0{i}Z", "price": "1.5"}
        for i in range(3)
    ]
    receipt, stored = same(given_rows, Terms(LIMITS))
    assert (receipt.inserted, [row["index"] for row in stored]) == (3, [0, 1, 2])


def test_no_rows_are_an_empty_batch_in_every_format() -> None:
    empty = pa.table({name: pa.array([], pa.string()) for name in NAMES})
    bodies = [
        ("json", b"[]"), ("json", b'{"quotes": []}'), ("ndjson", b""), ("ndjson", b"\n \n"), ("csv", in_csv([])),
        ("csv", b"symbol,timestamp"), ("csv", in_csv([]) + b"\n\n"), ("arrow", in_arrow(empty)),
        ("arrow", in_arrow(empty, file=True)), ("parquet", in_parquet(empty)),
    ]  # fmt: skip
    for name, body in bodies:
        for ties in ("replace", "number"):
            batch = formats.FORMATS[name].decode(body, Terms(LIMITS, ties=ties))
            assert batch.receipt(inserted=0) == Receipt(0, 0), (name, body)
            assert batch.columns.num_rows == 0


# --- however they are cut ---


@given(
    st.lists(st.one_of(tame_rows, wild_rows), max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
    st.lists(st.sampled_from(sorted(FORMS)), min_size=5, max_size=5),
    terms,
    lengths,
)
@settings(max_examples=300)
def test_rows_of_keys_of_their_own_give_the_same_in_any_batches(
    given_rows: Rows, cuts: list[int], names: list[str], terms: Terms, length: int
) -> None:
    """Where no two rows have a key, a body may be cut anywhere, and each part sent in another format."""
    terms = replace(terms, on_error="skip", limits=LIMITS)
    given_rows = [
        {name: row.get(name) or None for name in NAMES}
        # A bad time stays, a good one becomes one of its own.
        | ({} if row.get("timestamp") in (None, "", "x") else {"timestamp": rfc3339_nano(START + i)})
        for i, row in enumerate(given_rows)
        if not any("\ud800" in value for value in row.values() if value)
    ]
    ends = [0, *sorted(min(cut, len(given_rows)) for cut in cuts), len(given_rows)]
    with few(length):
        whole = formats.FORMATS["json"].decode(in_json(given_rows), terms)
        parts: list[Batch] = []
        for name, start, end in zip(names, ends, ends[1:], strict=False):
            if start < end:
                part = FORMS[name].write(given_rows[start:end])
                parts.append(formats.FORMATS[name.split()[0]].decode(part, terms))
    assert joined(parts).to_pylist() == whole.rows.to_pylist()
    for count in ("received", "superseded", "numbered", "rounded", "zeros", "crossed"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count), count
    refused = [r.code for part in parts for r in part.rejected]
    assert refused == [r.code for r in whole.rejected]


# --- absurd numbers ---


def texts_of(number: str, name: str) -> tuple[Rows, Terms]:
    """A row with the number between two good ones."""
    row = {"symbol": "A", "timestamp": WHEN, "price": "1.5", "volume": "7"}
    return [row, row | {name: number}, row | {"symbol": "B"}], Terms(LIMITS, "skip", precision="ns", prices="signed")


def try_absurd_numbers(name: str) -> None:
    """Send each of them in every form; they refuse their row, the same in each, and hurt nobody."""
    for number in (*ABSURD, *EDGES):
        receipt, stored = same(*texts_of(number, name))
        if len(stored) + receipt.superseded + len(receipt.rejected) != 3:
            raise AssertionError(number, receipt)
        if number in ABSURD and [r.index for r in receipt.rejected] != [1]:
            raise AssertionError(number, receipt)
    print("alive")  # noqa: T201  for the test that waits


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["timestamp", "price", "volume"])
def test_absurd_numbers_are_refused_at_once(name: str) -> None:
    """In a process of its own: some of them have ended one."""
    program = (
        "import faulthandler; faulthandler.enable();"
        f" from tests.test_quote_formats import try_absurd_numbers; try_absurd_numbers({name!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alive\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("digits", [200_000, 2_000_000])
def test_millions_of_digits_are_refused_at_once(digits: int) -> None:
    row = {"symbol": "A", "timestamp": WHEN, "price": "1.5"}
    for name in ("timestamp", *NUMBERS):
        for number in ("9" * digits, "0." + "3" * digits, "1e" + "9" * digits, "9" * digits + "x"):
            bodies = [("json", in_json([row | {name: number}])), ("ndjson", in_ndjson([row | {name: number}]))]
            if not number.endswith("x"):
                bodies += [("json", in_json([row | {name: Numeral(number)}]))]
            if digits < 2**20:
                bodies.append(("arrow", in_arrow(pa.table({k: [v] for k, v in (row | {name: number}).items()}))))
            for kind, body in bodies:
                batch = formats.FORMATS[kind].decode(body, Terms(LIMITS, "skip", precision="s"))
                assert len(batch.rejected) == 1, (kind, name, number[-3:])


@pytest.mark.parametrize(
    ("column", "code"),
    [
        (pa.array([1e308, 1.5]), "-out-of-range"),
        (pa.array([float("-inf"), 1.5]), "not-finite"),
        (pa.array([5e-324, 1.5]), "-too-fine"),
        (pa.array([2**64 - 1, 1], pa.uint64()), "-out-of-range"),
        (pa.array([-(2**63), 1], pa.int64()), "-out-of-range"),
    ],
)
@pytest.mark.parametrize("name", ["price", "ask_size"])
def test_the_ends_of_binary_numbers(column: pa.Array, code: str, name: str) -> None:
    table = pa.table({"symbol": ["A", "B"], "timestamp": [WHEN] * 2, "bid": [1, 1], name: column})
    noun = "price" if name == "price" else "size"
    for kind, body in (
        ("arrow", in_arrow(table)),
        ("arrow", in_arrow(table, file=True)),
        ("parquet", in_parquet(table)),
    ):
        batch = formats.FORMATS[kind].decode(body, Terms(LIMITS, "skip"))
        expected = code if code == "not-finite" else noun + code
        assert [(r.pointer, r.code) for r in batch.rejected] == [(f"/0/{name}", expected)]
        assert len(batch) == 1
