"""A seeded market, and its quotes as request bodies of every format.

Invariant: the same rows at the same times are the same quotes in every format, and rows that follow one another in
time never share a key.
"""

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from functools import cache
from io import BytesIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.quote.fields import INSTANT, NAMES, PRICES, SIZES

Ints = npt.NDArray[np.int64]

SYMBOLS: Final = [f"SYM{i:02}" for i in range(50)]
SEED: Final = 20_261_120
#: Content type of each format; the last one is InfluxDB's.
FORMATS: Final = {
    "JSON": "application/json",
    "NDJSON": "application/x-ndjson",
    "CSV": "text/csv",
    "Arrow": "application/vnd.apache.arrow.stream",
    "Parquet": "application/vnd.apache.parquet",
    "line protocol": "text/plain",
}
#: Of the formats with columns: decimal prices and whole sizes, as feeds have them.
_SCHEMA: Final = pa.schema(
    [
        ("symbol", pa.string()),
        ("timestamp", INSTANT),
        *((name, pa.decimal128(20, 8)) for name in PRICES),
        *((name, pa.int64()) for name in SIZES),
        ("source", pa.string()),
    ]
)
#: Of the text formats: the line of a quote with `{at}` for its time, and what comes before, between and after lines.
_MEMBERS: Final = ",".join(f'"{name}":{{{name}}}' for name in (*PRICES, *SIZES))
_OBJECT: Final = '{{"symbol":"{symbol}","timestamp":"{at}Z",' + _MEMBERS + ',"source":"feed"}}'
_TEXT: Final = {
    "JSON": (_OBJECT, b'{"quotes":[', b",", b"]}"),
    "NDJSON": (_OBJECT, b"", b"\n", b"\n"),
    "CSV": (
        "{symbol},{at}Z," + ",".join(f"{{{name}}}" for name in (*PRICES, *SIZES)) + ",feed",
        ",".join(NAMES).encode() + b"\n",
        b"\n",
        b"\n",
    ),
    "line protocol": (
        "quotes,symbol={symbol} "
        + ",".join(f"{name}={{{name}}}" for name in PRICES)
        + "".join(f",{name}={{{name}}}i" for name in SIZES)
        + ',source="feed" {at}',
        b"",
        b"\n",
        b"\n",
    ),
}


class Ticks:
    """Which symbol ticks, and at what; after `rows` quotes the values repeat, at other times."""

    def __init__(self, rows: int = 100_000) -> None:
        rng = np.random.default_rng(SEED)
        self._rows = rows
        # Short of a whole step, or two quotes of a symbol might fall together.
        self._jitter = 0.9 * rng.random(rows)
        symbol = rng.integers(0, len(SYMBOLS), rows)
        last = np.empty(rows, np.int64)
        for number in range(len(SYMBOLS)):
            mine = symbol == number
            last[mine] = rng.integers(2_000, 80_000) + np.cumsum(rng.integers(-3, 4, rows)[mine])
        last = np.maximum(last, 100)
        self._cents = {"price": last, "bid": last - rng.integers(0, 3, rows), "ask": last + rng.integers(1, 4, rows)}
        self._sizes = {name: 100 * rng.integers(1, 41, rows) for name in ("bid_size", "ask_size")}
        self._sizes["volume"] = rng.integers(1, 5_001, rows)
        self._symbol = [SYMBOLS[number] for number in symbol]
        self._lines = cache(self._lines_of)
        self._columns = cache(self._columns_of)

    def bodies(
        self, form: str, start: datetime, rows: range, step: float, batch: int, *, shuffle: bool = False
    ) -> Iterator[bytes]:
        """Quotes from `start` on as bodies of `batch` each; `step` is the microseconds between quotes.

        With `shuffle`, the batches come in random order, and so do the rows of each.
        """
        rng = np.random.default_rng(SEED)
        firsts = np.arange(rows.start, rows.stop, batch)
        for first in rng.permutation(firsts) if shuffle else firsts:
            part = np.arange(first, min(first + batch, rows.stop))
            if shuffle:
                part = rng.permutation(part)
            at = ((part + self._jitter[part % self._rows]) * step).astype(np.int64)
            yield self.body(form, part, at + round(start.timestamp() * 1e6))

    def body(self, form: str, rows: Ints, at: Ints) -> bytes:
        """The quotes of some rows at some times, in microseconds since 1970."""
        index = rows % self._rows
        return self._text(form, index, at) if form in _TEXT else self._arrow(form, index, at)

    def _text(self, form: str, index: Ints, at: Ints) -> bytes:
        """The lines, and the times written over what stands for them: a fifth of the time of formatting each."""
        lines, lengths, places = self._lines(form)
        _, head, between, tail = _TEXT[form]
        text = bytearray(b"".join((head, between.join([lines[i] for i in index.tolist()]), tail)))
        starts = len(head) + np.cumsum(lengths[index] + len(between)) - lengths[index] - len(between)
        digits = _digits(form, at)
        place = (starts + places[index])[:, None] + np.arange(digits.shape[1])
        np.frombuffer(text, np.uint8)[place] = digits
        return bytes(text)

    def _lines_of(self, form: str) -> tuple[list[bytes], Ints, Ints]:
        """Each line with zeros for its time, its length, and where the time is."""
        line = _TEXT[form][0]
        zeros = "0" * _digits(form, np.zeros(1, np.int64)).shape[1]
        before, after = line.split("{at}")
        prices = {
            name: [f"{cents // 100}.{cents % 100:02}" for cents in column.tolist()]
            for name, column in self._cents.items()
        }
        columns = {"symbol": self._symbol, **prices, **{name: size.tolist() for name, size in self._sizes.items()}}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        starts = [before.format(**row) for row in rows]
        lines = [f"{start}{zeros}{after.format(**row)}".encode() for start, row in zip(starts, rows, strict=True)]
        return lines, np.array([len(text) for text in lines]), np.array([len(start) for start in starts])

    def _arrow(self, form: str, index: Ints, at: Ints) -> bytes:
        columns = [column.take(pa.array(index)) for column in self._columns()]
        columns.insert(1, pa.array(at.view("M8[us]")).cast(INSTANT))
        batch = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
        sink = BytesIO()
        if form == "Arrow":
            with pa.ipc.new_stream(sink, _SCHEMA) as stream:
                stream.write_batch(batch)
        else:
            pq.write_table(pa.Table.from_batches([batch]), sink)
        return sink.getvalue()

    def _columns_of(self) -> list[Any]:
        """The columns but the time."""
        hundredth = pa.scalar(Decimal("0.01"))
        prices = [pc.multiply(pa.array(cents).cast(pa.decimal128(20, 0)), hundredth) for cents in self._cents.values()]
        return [
            pa.array(self._symbol),
            *(column.cast(_SCHEMA.field("price").type) for column in prices),
            *(pa.array(size) for size in self._sizes.values()),
            pa.array(["feed"] * self._rows),
        ]


def _digits(form: str, at: Ints) -> npt.NDArray[np.uint8]:
    """The characters of times, a row each."""
    if form == "line protocol":
        return (at[:, None] // 10 ** np.arange(15, -1, -1) % 10 + ord("0")).astype(np.uint8)
    return np.datetime_as_string(at.view("M8[us]")).astype("S26").view(np.uint8).reshape(-1, 26)
