"""Hostile bodies: every field in every form, format and compression; too many parts, too little truth, bombs.

Invariant: what is a valid batch here is one by docs/api.md, so that whatever fails fails for what was changed in it.
"""

import gzip
import io
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from app.quote.fields import NAMES
from tests.hostile.striking import Attack
from tests.hostile.wire import Exchange, request

MB: Final = 1_000_000
TYPES: Final[Mapping[str, str]] = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv",
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}
_START: Final = datetime(2026, 11, 2, 10, tzinfo=UTC)

# --- valid batches ---


def quote(number: int = 0) -> dict[str, Any]:
    """A valid quote with all fields, as JSON has them."""
    at = _START + timedelta(milliseconds=number)
    return {
        "symbol": "HOSTILE", "timestamp": at.isoformat().replace("+00:00", "Z"), "price": 10.5, "bid": 10.25,
        "ask": 10.75, "bid_size": 300, "ask_size": 200, "volume": 100, "source": "hostile",
    }  # fmt: skip


def table(rows: int = 3) -> pa.Table:
    """A valid batch in Arrow."""
    return pa.table(
        {
            "symbol": ["HOSTILE"] * rows,
            "timestamp": pa.array([_START + timedelta(milliseconds=i) for i in range(rows)], pa.timestamp("us", "UTC")),
            **{name: pa.array([10.5] * rows) for name in NAMES if name not in {"symbol", "timestamp", "source"}},
            "source": ["hostile"] * rows,
        }
    )


def arrow(content: pa.Table) -> bytes:
    """An Arrow stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue()


def parquet(content: pa.Table, **options: Any) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    pq.write_table(content, sink, **options)
    return sink.getvalue()


def csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """CSV whose cells are written as they are."""
    lines = [",".join(NAMES), *(",".join(str(row[name]) for name in NAMES) for row in rows)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def ndjson(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One quote a line."""
    return "\n".join(json.dumps(row) for row in rows).encode()


def valid(rows: int = 3) -> dict[str, bytes]:
    """A valid batch in each format."""
    quotes = [quote(i) for i in range(rows)]
    return {
        "json": json.dumps(quotes).encode(), "ndjson": ndjson(quotes), "csv": csv(quotes),
        "arrow": arrow(table(rows)), "parquet": parquet(table(rows)),
    }  # fmt: skip


def zstd(body: bytes) -> bytes:
    """One frame of zstd."""
    compressed: bytes = pa.Codec("zstd").compress(body, asbytes=True)
    return compressed


ENCODINGS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "identity": bytes, "gzip": lambda body: gzip.compress(body, 1), "zstd": zstd,
}  # fmt: skip


def post(
    label: str,
    body: bytes,
    kind: str,
    *,
    encoding: str = "identity",
    query: str = "",
    extra: Mapping[str, str] | None = None,
    **options: Any,
) -> Exchange:
    """A POST of a body that is encoded already; `kind` is a format or a media type."""
    headers = {"Content-Type": TYPES.get(kind, kind), **(extra or {})}
    if encoding != "identity":
        headers["Content-Encoding"] = encoding
    target = "/v1/quotes" + (f"?{query}" if query else "")
    return Exchange(label, [request("POST", target, body, headers=headers)], **options)


# --- every field in every form ---

#: As JSON, and as text in a cell; a form that is none in one of them is left out there.
_FORMS: Final[Mapping[str, tuple[str | None, str | None]]] = {
    "integer": ("7", "7"), "fraction": ("7.25", "7.25"), "text": ('"x"', "x"), "number as text": ('"7.25"', None),
    "empty": ('""', '""'), "null": ("null", ""), "true": ("true", "true"), "list": ("[1]", None),
    "object": ('{"a":1}', None), "nested": ("[" * 500 + "]" * 500, "[" * 500),
    "nested deep": ('{"a":' * 5000 + "1" + "}" * 5000, None),
    "digits": ("9" * 400, "9" * 400), "digits 5000": ("9" * 5000, "9" * 5000),
    "fraction 5000": ("0." + "1" * 5000, "0." + "1" * 5000), "zeros": ("0." + "0" * 5000 + "1", "0" * 5000 + "1"),
    **{
        form: (form, form)
        for form in (
            "1e-2147483640", "1e2147483640", "1e-2147483648", "1e2147483647", "1e-99999999999", "1e99999999999",
            "1e-999999999999999999999", "-1e2147483640", "0e2147483640", "0e-99999999999", "1e400", "1e-400", "1e308",
            "12345.678e-2147483640", "1e+000000000000000000000007", "-0", "-7", "NaN", "Infinity", "-Infinity",
            "9223372036854775807", "-9223372036854775808", "18446744073709551616", "1e18",
        )
    },
    **{
        f"{form} as text": (f'"{form}"', f'"{form}"')
        for form in (
            "1e-2147483640", "1e2147483640", "1e-99999999999", "1e99999999999", "NaN", "Infinity", "sNaN", "1_0",
            "0x10",
            "\uff17", "+7", " 7 ", "7,5", "0001-01-01T00:00:00Z", "9999-12-31T23:59:60Z", "10000-01-01T00:00:00Z",
            "0000-00-00T00:00:00Z", "2026-02-30T00:00:00Z", "2026-11-02T24:00:00Z", "2026-11-02T10:00:00+99:99",
            "2026-11-02T10:00:00.1234567890123Z", "2026-11-02", "-292277022365-01-01T00:00:00Z", "infinity",
        )
    },
    "surrogate": (r'"\ud800"', "\ud800"), "surrogates": (r'"\udc00\ud800"', None), "NUL": (r'"\u0000"', "\0"),
    "NUL within": (r'"A\u0000B"', "A\0B"), "quote": (r'"\""', '"'), "line end": (r'"\n\r"', '"\n\r"'),
    "formula": ('"=1+1"', "=1+1"), "long": ('"' + "x" * 100_000 + '"', "x" * 200_000), "rtl": ('"\u202e"', "\u202e"),
    "escape": (r'"\x"', "\\x"), "bare word": ("undefined", "undefined"), "control": ('"\x01"', "\x01"),
}  # fmt: skip


def _text_bodies(field: str, json_form: str | None, cell: str | None) -> Iterator[tuple[str, bytes]]:
    good = [quote(i) for i in range(3)]
    if json_form is not None:
        member = json.dumps(field)
        rest = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in good[1].items() if k != field)
        row = f"{{{member}:{json_form},{rest}}}".encode("utf-8", "surrogatepass")
        first, last = (json.dumps(good[i]).encode() for i in (0, 2))
        yield "json", b"[" + b",".join([first, row, last]) + b"]"
        yield "ndjson", b"\n".join([first, row, last])
    if cell is not None:
        yield "csv", csv([good[0], {**good[1], field: cell}, good[2]])
        plain = cell.strip('"').encode("utf-8", "surrogatepass")
        column = pa.Array.from_buffers(  # unchecked, as a client may send it
            pa.string(),
            3,
            [None, pa.array([0, 0, len(plain), len(plain)], pa.int32()).buffers()[1], pa.py_buffer(plain)],
        )
        yield "arrow", arrow(_with(field, column))
        yield "parquet", parquet(_with(field, column))


def _with(field: str, column: pa.Array) -> pa.Table:
    content = table(len(column))
    return content.set_column(content.schema.get_field_index(field), field, column)


def _encoded(label: str, kind: str, body: bytes, encodings: Sequence[str], **options: Any) -> Iterator[Exchange]:
    for encoding in encodings:
        encode = ENCODINGS[encoding]
        yield post(f"{label}, {kind}, {encoding}", encode(body), kind, encoding=encoding, **options)


def some_of(exchanges: Sequence[Exchange], choice: random.Random, scale: float, least: int = 100) -> list[Exchange]:
    """All of them at full size, else some, in an order by chance."""
    return choice.sample(exchanges, min(len(exchanges), max(least, round(scale * len(exchanges)))))


def forms(choice: random.Random, scale: float) -> list[Exchange]:
    """Every field as number, text, nothing, something nested and absurd, in every format and compression."""
    skipping = {"json": "on_error=skip", "csv": "on_error=skip&prices=signed&precision=ns"}
    found = [
        exchange
        for field, (form, (json_form, cell)) in itertools.product(NAMES, _FORMS.items())
        for kind, body in _text_bodies(field, json_form, cell)
        for exchange in _encoded(f"{field}={form}", kind, body, [*ENCODINGS], query=skipping.get(kind, ""))
    ]
    return some_of(found, choice, scale)


def killers(_: random.Random, __: float) -> list[Exchange]:
    """The few numbers that end processes or stop loops, in each field and format."""
    kinds = ("1e-2147483640", "1e2147483640", "1e-99999999999", "1e-99999999999 as text", "1e-2147483640 as text")
    return [
        post(f"{field}={form}, {kind}", body, kind, patience=15)
        for field in ("price", "bid_size", "volume", "timestamp", "source")
        for form in kinds
        for kind, body in _text_bodies(field, *_FORMS[form])
    ]


def _columns() -> dict[str, Callable[[], pa.Array]]:
    """Columns of types that no field has, or with values that none can have."""
    return {
        "nulls": lambda: pa.nulls(3), "bool": lambda: pa.array([True, None, False]),
        "floats": lambda: pa.array([float("nan"), float("inf"), -1e308]),
        "float16": lambda: pa.array([1, 2, 3], pa.float16()),
        "int64": lambda: pa.array([-(2**63), 2**63 - 1, 0]), "uint64": lambda: pa.array([2**64 - 1, 0, 1], pa.uint64()),
        "decimal128": lambda: pa.array([Decimal(10) ** 37, None, Decimal(1)], pa.decimal128(38, 0)),
        "decimal256": lambda: pa.array([Decimal(10) ** 60, None, Decimal(1)], pa.decimal256(76, 0)),
        "negative scale": lambda: pa.array([Decimal("1e30"), None, None], pa.decimal128(38, -20)),
        "binary": lambda: pa.array([b"\xff\xfe", b"", None]),
        "fixed binary": lambda: pa.array([b"12345678"] * 3, pa.binary(8)),
        "list": lambda: pa.array([[1], [], None]), "struct": lambda: pa.array([{"a": 1}] * 3),
        "map": lambda: pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
        "dictionary": lambda: pa.array(["a", "b", None]).dictionary_encode(),
        "dictionary of numbers": lambda: pa.array([1.5, 2.5, None]).dictionary_encode(),
        "dictionary of dictionaries": lambda: pa.DictionaryArray.from_arrays([0, 1, 0], pa.array(["a", "b"])),
        "run ends": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array([1.5])),
        "large string": lambda: pa.array(["a", "b", "c"], pa.large_string()),
        "string view": lambda: pa.array(["a", "b" * 100, "c"], pa.string_view()),
        "date32": lambda: pa.array([2**31 - 1, -(2**31), 0], pa.int32()).view(pa.date32()),
        "date64": lambda: pa.array([2**62, -(2**62), 0], pa.int64()).view(pa.date64()),
        "seconds": lambda: pa.array([2**63 - 1, -(2**63), 0], pa.int64()).view(pa.timestamp("s")),
        "nanoseconds": lambda: pa.array([2**63 - 1, -(2**63), 0], pa.int64()).view(pa.timestamp("ns", "UTC")),
        "odd zone": lambda: pa.array([0, 1, 2], pa.int64()).view(pa.timestamp("us", "Not/AZone")),
        "duration": lambda: pa.array([0, 1, 2], pa.int64()).view(pa.duration("ns")),
        "time": lambda: pa.array([0, 1, 2], pa.int64()).view(pa.time64("ns")),
        "interval": lambda: pa.array([(1, 2, 3)] * 3, pa.month_day_nano_interval()),
        "union": lambda: pa.UnionArray.from_sparse(pa.array([0, 0, 0], pa.int8()), [pa.array([1, 2, 3])]),
        "bad offsets": lambda: pa.Array.from_buffers(
            pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x7f\0\0\0\0\1\0\0\0"), pa.py_buffer(b"abc")]
        ),
        "bad index": lambda: pa.DictionaryArray.from_arrays(
            pa.array([0, 100, -5], pa.int32()), pa.array(["a"]), safe=False
        ),
        "extension": lambda: pa.array([b"0123456789abcdef"] * 3, pa.uuid()),
    }  # fmt: skip


def types(choice: random.Random, scale: float) -> list[Exchange]:
    """Every field as a column of every type of Arrow and Parquet, in every compression."""
    found: list[Exchange] = []
    for field, (name, make) in itertools.product(NAMES, _columns().items()):
        for kind, write in (("arrow", arrow), ("parquet", parquet)):
            if kind == "parquet" and name.startswith("bad"):
                continue  # its writer would read where they point
            try:
                body = write(_with(field, make()))
            except (pa.ArrowException, OSError):
                continue  # no client can write it either
            found += _encoded(f"{field} as {name}", kind, body, [*ENCODINGS])
    return some_of(found, choice, scale)


# --- too much of something ---


def digits(_: random.Random, scale: float) -> list[Exchange]:
    """Numbers and texts of megabytes."""
    count = max(200_000, round(5 * MB * min(scale, 1)))
    long = {
        "digits": "9" * count, "fraction": "0." + "3" * count, "zeros": "0" * count, "exponent": "1e" + "9" * count,
        "negative exponent": "1e-" + "9" * count, "letters": "x" * count,
    }  # fmt: skip
    return [
        exchange
        for field, (form, text) in itertools.product(("price", "volume", "timestamp", "symbol", "source"), long.items())
        for json_form in (text, f'"{text}"')
        for kind, body in _text_bodies(field, json_form, text if json_form is text else None)
        for exchange in _encoded(f"{field} of {len(text)} {form}, {json_form[:1]}", kind, body, ["identity", "zstd"])
    ]


def parts(_: random.Random, scale: float) -> list[Exchange]:
    """Millions of keys, commas, lines, columns, messages and levels."""
    many = max(50_000, round(MB * min(scale, 1)))
    good = json.dumps(quote())
    names = ",".join(f'"k{i}":1' for i in range(many))
    wide = pa.schema([(f"c{i}", pa.int8()) for i in range(min(many // 10, 20_000))])
    batch = table(1).to_batches()[0]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for _i in range(min(many // 20, 20_000)):
            writer.write_batch(batch)
    nested = pa.array([1.5])
    for _i in range(60):
        nested = pa.StructArray.from_arrays([nested], ["x"])
    bodies: list[tuple[str, str, bytes | str]] = [
        ("keys", "json", f"[{{{names}}}]"), ("the same key", "json", "[{" + ",".join(['"price":1'] * many) + "}]"),
        ("keys", "ndjson", f"{{{names}}}"), ("commas", "json", "[" + "," * 10 * many + "]"),
        ("ones", "json", "[" + "1," * 10 * many + "1]"), ("objects", "json", "[" + "{}," * 5 * many + "{}]"),
        ("empty texts", "json", "[" + '"",' * 5 * many + '""]'), ("brackets", "json", "[" * 20 * many),
        ("pairs of brackets", "json", "[" * 5 * many + "]" * 5 * many), ("braces", "json", '{"a":' * 4 * many),
        ("commas in a text", "json", f'[{good[:-1]},"x":"{"," * 10 * many}"}}]'), ("spaces", "json", " " * 32 * many),
        ("escapes", "json", f'[{{"symbol":"{chr(92)}u0041' + "\\u0041" * 5 * many + '"}]'),
        ("empty lines", "ndjson", "\n" * 32 * many), ("lines", "ndjson", "1\n" * 16 * many),
        ("objects", "ndjson", "{}\n" * 10 * many), ("carriage returns", "ndjson", "\r" * 32 * many),
        ("bad lines", "ndjson", "{\n" * 99_999),
        ("brackets", "ndjson", "[" * 5000 + "\n" + ("[" * 600 + "\n") * (many // 20)),
        ("columns", "csv", ",".join(f"c{i}" for i in range(many)) + "\n1"),
        ("columns of one name", "csv", "price," * (many // 10) + "\n"),
        ("commas", "csv", csv([]).decode() + "\n" + "," * 32 * many),
        ("empty lines", "csv", csv([]).decode() + "\n" * 32 * many),
        ("quotes", "csv", csv([]).decode() + '\n"' + '""' * 10 * many),
        ("odd quotes", "csv", csv([]).decode() + "\n" + '"a"b,' * 5 * many),
        ("carriage returns", "csv", csv([]).decode() + "\r" * 32 * many),
        ("ragged lines", "csv", csv([]).decode() + "\n" + "1\n" * 99_999),
        ("one cell", "csv", csv([]).decode() + "\n" + "x" * 30 * many),
        ("long lines", "csv", csv([]).decode() + "\n" + ("," * 5000 + "\n") * (many // 200)),
        ("columns", "arrow", arrow(wide.empty_table())), ("columns", "parquet", parquet(wide.empty_table())),
        ("messages", "arrow", sink.getvalue()), ("row groups", "parquet", parquet(table(5000), row_group_size=1)),
        ("levels", "arrow", arrow(_with("price", nested))), ("levels", "parquet", parquet(_with("price", nested))),
        ("metadata", "arrow", arrow(table().replace_schema_metadata({"k": "x" * 10 * many}))),
        ("metadata", "parquet", parquet(table().replace_schema_metadata({f"k{i}": "x" for i in range(many // 10)}))),
    ]  # fmt: skip
    return [
        exchange
        for label, kind, body in bodies
        for exchange in _encoded(
            f"many {label}", kind, body if isinstance(body, bytes) else body.encode(), ["identity", "zstd"]
        )
    ]


def large(_: random.Random, scale: float) -> list[Exchange]:
    """Well-formed bodies of 17 MB, whose numbers are written as texts or in other ways that are not the usual one."""
    rows = max(10_000, round(99_000 * min(scale, 1)))
    odd: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "volume as text": lambda row: {**row, "volume": str(row["volume"])},
        "numbers as texts": lambda row: {k: str(v) for k, v in row.items()},
        "nulls": lambda row: {**row, "bid": None, "ask": None, "bid_size": None},
        "alternating": lambda row: {**row, "volume": "1" if row["timestamp"][-2] in "13579" else 1},
        "last row bad": lambda row: {**row, "price": "x" if row["timestamp"].endswith(f"{rows - 1}Z") else 1},
        "exponents": lambda row: {**row, "price": "1.05e1"},
    }
    quotes = [quote(i) for i in range(rows)]
    found = []
    for label, change in odd.items():
        changed = [change(row) for row in quotes]
        # A request with a row of another kind is refused as it should be; the others are tried without being stored.
        found += [
            post(f"{rows} quotes, {label}, {kind}", body, kind, query="dry_run=true", patience=60)
            for kind, body in (
                ("json", json.dumps(changed).encode()),
                ("ndjson", ndjson(changed)),
                ("csv", csv(changed)),
            )
        ]
    texts = table(rows)
    for name in ("price", "volume", "timestamp"):
        texts = texts.set_column(texts.schema.get_field_index(name), name, pa.array([str(row[name]) for row in quotes]))
    found += [
        post(f"{rows} quotes, texts, {kind}", write(texts), kind, query="dry_run=true", patience=60)
        for kind, write in (("arrow", arrow), ("parquet", parquet))
    ]
    return found


# --- bombs ---


def _zeros(size: int, encoding: str) -> bytes:
    if encoding == "zstd":
        return zstd(bytes(size))
    inflate = zlib.compressobj(9, wbits=31)
    return b"".join([*(inflate.compress(bytes(MB)) for _ in range(size // MB)), inflate.flush()])


def bombs(_: random.Random, scale: float) -> list[Exchange]:
    """Little that becomes much: gzip, zstd, dictionaries, runs, pages."""
    size = max(70, round(1000 * min(scale, 1))) * MB
    value, rows = "x" * 200, 90_000
    long = "x" * MB
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([long]))
    many = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array([1.5]))
    bare = {name: table(1)[name].combine_chunks().take(pa.array([0] * 3000)) for name in NAMES}
    wide = {name: table(1)[name].combine_chunks().take(pa.array([0] * rows)) for name in NAMES}
    return [
        *(
            post(f"{size // MB} MB of zeros, {kind}, {encoding}", _zeros(size, encoding), kind, encoding=encoding)
            for encoding in ("gzip", "zstd")
            for kind in TYPES
        ),
        *(
            post(f"60 MB of {what}, {kind}, {encoding}", ENCODINGS[encoding](byte * 60 * MB), kind, encoding=encoding)
            for what, byte in (("spaces", b" "), ("lines", b"\n"), ("brackets", b"["), ("nines", b"9"))
            for kind in ("json", "ndjson", "csv")
            for encoding in ("gzip", "zstd")
        ),
        post("gzip members", gzip.compress(b"") * 100_000, "json", encoding="gzip"),
        post("zstd frames", zstd(b"") * 100_000, "json", encoding="zstd"),
        post("gzip in gzip", gzip.compress(gzip.compress(b"[]")), "json", encoding="gzip"),
        post("zstd window of 2 GB", b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00" * 100, "json", encoding="zstd"),
        post("zstd frame of 2^63", b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + b"\x01\x00\x00", "json", encoding="zstd"),
        post("dictionary of 1 MB x 3000", arrow(pa.table({**bare, "source": repeated})), "arrow"),
        post("dictionary of 1 MB x 3000", parquet(pa.table({**bare, "source": repeated})), "parquet"),
        post("dictionary of 200 x 90000", arrow(pa.table({**wide, "source": many})), "arrow", query="dry_run=true"),
        post("dictionary of 200 x 90000", parquet(pa.table({**wide, "source": many})), "parquet", query="dry_run=true"),
        post("run of 2^31", arrow(pa.table({"symbol": runs, "price": runs})), "arrow"),
        post("nulls x 2^28", arrow(pa.table({"symbol": pa.nulls(2**28)})), "arrow"),
        post("nulls x 2^24", parquet(pa.table({"price": pa.nulls(2**24, pa.float64())})), "parquet"),
        post("page of 300 MB", parquet(pa.table({"source": [long * 30] * 10}), compression="zstd"), "parquet"),
        post("page of 60 MB", parquet(pa.table({"source": [long] * 60}), compression="zstd", use_dictionary=False),
        "parquet"),
        post("columns in zstd", _compressed(pa.table({"source": [long] * 60})), "arrow"),
        post("columns of nulls in zstd",
        _compressed(pa.table({f"c{i}": pa.nulls(99_000, pa.float64()) for i in range(60)})), "arrow"),
    ]  # fmt: skip


def _compressed(content: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, content.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(content)
    return sink.getvalue()


# --- not what it says ---


def damaged(choice: random.Random, scale: float) -> list[Exchange]:
    """Valid bodies that break off, at many points, in each format and compression; padded ones, and empty ones."""
    found = []
    for kind, body in valid(20).items():
        for encoding, encode in ENCODINGS.items():
            whole = encode(body)
            cuts = {
                *range(0, len(whole), max(1, len(whole) // 40)),
                *range(max(0, len(whole) - 12), len(whole)),
                1,
                4,
                8,
            }
            for label, part in (
                *((f"the first {cut} of {len(whole)} bytes", whole[:cut]) for cut in sorted(cuts)),
                ("padded", whole + b"\0" * 100), ("twice", whole * 2), ("reversed", whole[::-1]),
                ("shifted", b"\xef\xbb\xbf" + whole),
            ):  # fmt: skip
                found.append(post(f"{label}, {kind}, {encoding}", part, kind, encoding=encoding))
    return some_of(found, choice, scale)


def mislabelled(choice: random.Random, scale: float) -> list[Exchange]:
    """Valid bodies under the names of other formats and encodings, and under none."""
    kinds = [
        *TYPES.values(), "", "text/plain", "application/octet-stream", "text/csv; charset=utf-16",
        'text/csv; charset="',
        "application/json; charset=ebcdic", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
        "application/vnd.apache.arrow.file", "a" * 5000, "\xff\xfe/\x00", ";;;;", "application/json, text/csv",
    ]  # fmt: skip
    encodings = [
        *ENCODINGS,
        "x-gzip",
        "deflate",
        "br",
        "gzip, gzip",
        "zstd, gzip",
        "GZIP",
        "",
        "\xff",
        "chunked",
        "a" * 5000,
    ]
    found = [
        post(
            f"{kind} {encoding} as {name[:40]!r} {said[:20]!r}", ENCODINGS[encoding](body), name,
            extra={"Content-Encoding": said},
        )
        for kind, body in valid().items()
        for encoding in ENCODINGS
        for name in kinds
        for said in encodings
    ]  # fmt: skip
    return some_of(found, choice, scale / 3)


def _short(label: str, body: bytes, kind: str, encoding: str, pause: float) -> Exchange:
    """A body that stops one byte short for a time; then its client goes."""
    whole = post(label, body, kind, encoding=encoding)
    content = whole.sends[0]
    assert isinstance(content, bytes)
    return Exchange(label, [content[:-1], pause], reads="none", leaves=True, patience=pause + 5)


def stalled(_: random.Random, scale: float) -> list[Exchange]:
    """Thirty small bodies that become 60 MB each, and all wait for their last byte."""
    pause = 10 * min(scale, 1)
    body = b" " * 60 * MB
    return [
        _short(f"60 MB in {encoding}, one byte short, {kind}", ENCODINGS[encoding](body), kind, encoding, pause)
        for _i in range(5)
        for encoding in ("zstd", "gzip")
        for kind in ("json", "csv", "ndjson")
    ]


def short(_: random.Random, scale: float) -> list[Exchange]:
    """Four uploads of 60 MB that stop one byte short."""
    pause = max(2, 25 * min(scale, 1))
    return [_short("60 MB, one byte short", b" " * 60 * MB, "json", "identity", pause)] * 4


ATTACKS: Final = [
    Attack("numbers that end processes", killers, 1),
    Attack("each field in each form", forms),
    Attack("each field of each type", types),
    Attack("megabytes of digits", digits),
    Attack("millions of parts", parts),
    Attack("large and unusual", large),
    Attack("bombs", bombs),
    Attack("broken off", damaged),
    Attack("mislabelled", mislabelled),
    Attack("stalled in compression", stalled, 30),
    Attack("four uploads a byte short", short, 4),
    Attack("many at once", forms, 60),
]
