"""Loads CSV, NDJSON and Parquet files into a running service, in batches, resumable and with bounded memory.

Invariant: a file is loaded when each of its rows was counted by a receipt or is listed in the reject file, and the
file is still what it was when the first row was read. `journal` keeps how far it came, so a run that was cut off at any
point continues without loss, and its requests get the receipts they had. Numbers of text files stay text until
the service reads them, so prices arrive exactly as written. With ties numbered, what is
stored is the file's rows in the order of their time, each on a key of its own: where batches are cut makes no
difference, nor whether the file runs from the oldest row or from the newest. For that it is read once before any of it
is sent, and once more where the rows of a symbol run in neither order; those take some memory, a few bytes each.
"""

import asyncio
import csv
import gzip
import hashlib
import os
import re
import stat
import sys
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from datetime import time as clock_time
from functools import lru_cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple
from zoneinfo import ZoneInfo

import httpx
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.client import DEFAULT_URL, Client, Refused, Totals, Unavailable, in_order, until_interrupted
from app.clock import EPOCH, FIRST, LAST, UNITS, Nanoseconds, NotAnInstant, nanoseconds, parse, rfc3339_nano
from app.errors import InvalidRequest
from app.journal import Journal, Range, State, Unwritable, held
from app.lines import MAX_LINE, Encoding, Line, Unreadable, lines
from app.quote.fields import FIELDS, NAMES, NUMBERS, PRICES, TEXTS
from app.quote.rules import normal, normal_symbol
from app.quote.terms import OnConflict, Prices, Receipt, Ties

FileFormat = Literal["csv", "ndjson", "parquet"]
Status = Literal["loaded", "already loaded", "interrupted", "failed"]

MAX_ROWS: Final = 100_000
MAX_DAYS: Final = 366
#: The members of a line of a reject file, which is loaded as the quote within it.
_REJECTION: Final = frozenset({"row", "code", "detail", "quote"})
MAX_BYTES: Final = 48 * 1024 * 1024
_ENDS: Final = 64 * 1024  # bytes at both ends of a file by which it is known
_COMPACT_DATE: Final = len("20260131")
_LONG_DATE: Final = len("2026-01-31")
_DAY: Final = 86_400 * UNITS["s"]
#: The digits of a fraction beyond the microseconds, which `datetime` does not keep.
_FINER: Final = re.compile(r"(?<=[.,][0-9]{6})[0-9]+")
_TOO_LONG: Final = ("row-too-long", f"A line has at most {MAX_LINE:,} characters.")
_NO_YEAR: Final = ("timestamp-invalid", "The timestamp lies outside the years 1 to 9999.")
#: Instants that can be stored; others are refused by the service, and take nobody's number.
_FIRST: Final = nanoseconds(FIRST)
_LAST: Final = nanoseconds(LAST)
_LOOK: Final = 20_000  # rows looked at before others get their turn
_SKIP: Final = 100_000  # rows passed over at once when resuming, so that an interrupt is seen
_SUFFIXES: Final[dict[str, FileFormat]] = {
    ".csv": "csv", ".tsv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
#: Names of columns beside those of the fields, best first, in lower case. Pandas names an index that has no name
#: `__index_level_0__`.
_FILE_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "timestamp": ("timestamp", "datetime", "time", "ts", "date", "__index_level_0__"),
    "price": ("price", "last", "lastprice", "last_price", "close", "adj close", "adj_close"),
    "bid_size": ("bid_size", "bidsize"),
    "ask_size": ("ask_size", "asksize"),
    "volume": ("volume", "vol", "size"),
}
_ALIASES: Final = {field.name: _FILE_NAMES.get(field.name, (field.name, *field.aliases)) for field in FIELDS}
_ABSENT: Final = frozenset({"", "nan", "na", "n/a", "null", "none"})  # of numbers only: NA is also a symbol
_BROKEN_FILE: Final = (EOFError, zlib.error, csv.Error, pa.ArrowException, UnicodeError)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load and how to read it.

    `columns` maps fields to columns of the file (`column_map` reads `price=Close`), an empty column leaves the field
    out. `symbol` is for files without such a column (default: the file's name). `tz` is the zone of times without an
    offset, which are refused without it. With `ties="number"` rows of one symbol and instant are all kept, each later
    one on the next free nanosecond; a file that runs backwards is numbered as if it ran forward, and each file by
    itself. With `replace` the last one of the file is kept. `prices` is that of the service unless it is given.
    `encoding` is that of text without a byte order mark. `state` and `rejects` default to files beside the loaded one.
    """

    files: Sequence[Path]
    url: str = DEFAULT_URL
    format: FileFormat | None = None
    encoding: Encoding = "utf-8"
    symbol: str | None = None
    tz: str | None = None
    on_conflict: OnConflict = "update"
    ties: Ties = "number"
    prices: Prices | None = None
    source: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 10_000
    state: Path | None = None
    resume: bool = True
    rejects: Path | None = None
    json: bool = False


class FileReport(msgspec.Struct):
    """What became of one file. Counts include earlier runs that this one continued, at row `resumed_after`."""

    file: str
    status: Status = "failed"
    rows: int = 0
    resumed_after: int = 0
    totals: Totals = msgspec.field(default_factory=Totals)
    seconds: float = 0.0
    rows_per_second: int = 0
    rejects: str | None = None
    ignored_columns: list[str] = []
    failure: str | None = None


class LoadReport(msgspec.Struct):
    """What became of each file. `rejected` counts also the rows that earlier runs left in reject files."""

    files: list[FileReport] = []
    rejected: int = 0
    failed: int = 0
    interrupted: bool = False


class _Fault(Exception):
    """A row that is refused before it is sent."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def column_map(pairs: Iterable[str]) -> dict[str, str]:
    """Read `price=Close` into a mapping of fields to columns.

    Raises:
        InvalidRequest: not of this form, or no field of a quote.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        name = name.strip().lower()
        if not separator or name not in NAMES:
            raise InvalidRequest(f"A mapping is FIELD=COLUMN, with a field of {', '.join(NAMES)}.", parameter="map")
        columns[name] = column.strip()
    return columns


def match_columns(names: Sequence[str], explicit: Mapping[str, str], *, strict: bool = True) -> dict[str, int]:
    """The position of each field's column: the one named in `explicit`, else the best known name.

    A first column without a name is the timestamp if nothing else is.

    Raises:
        Unreadable: `strict`, and a named column does not exist, or the timestamp or every price has no column.
    """
    folded = [name.strip().lower() for name in names]
    found: dict[str, int] = {}
    for name, column in explicit.items():
        if column in names:
            found[name] = names.index(column)
        elif column.lower() in folded:
            found[name] = folded.index(column.lower())
        elif column and strict:
            raise Unreadable(f"there is no column {column!r}; the columns are {', '.join(map(repr, names))}")
    taken = set(found.values())
    for name, aliases in _ALIASES.items():
        positions = (folded.index(alias) for alias in aliases if alias in folded)
        if name not in explicit and (position := next((p for p in positions if p not in taken), None)) is not None:
            found[name] = position
    if "timestamp" not in found and "timestamp" not in explicit and folded[:1] == [""]:
        found["timestamp"] = 0
    if strict and ("timestamp" not in found or found.keys().isdisjoint(PRICES)):
        missing = "price" if "timestamp" in found else "timestamp"
        raise Unreadable(
            f"no column is known as {missing}; name it with --map {missing}=COLUMN, of {', '.join(map(repr, names))}"
        )
    return {name: found[name] for name in NAMES if name in found}


class Converter:
    """Turns rows, as mappings of fields to raw values, into quotes that the service reads."""

    def __init__(self, *, symbol: str | None, tz: str | None, source: str | None) -> None:
        self._symbol = symbol
        self._source = source
        self._zone: tzinfo | None = UTC if tz == "UTC" else ZoneInfo(tz) if tz else None

    def place(self, row: Mapping[str, Any]) -> tuple[Any, int]:
        """The symbol as it is given and the instant in nanoseconds since 1970.

        Raises:
            _Fault: only the row's author can say when it was.
        """
        symbol = row.get("symbol") or self._symbol
        return symbol.strip() if isinstance(symbol, str) else symbol, self._instant(row.get("timestamp"))

    def named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with the symbol that it would get from here, so that it can be loaded by itself."""
        return row if self._symbol is None else {"symbol": self._symbol, **row}

    def quote(self, row: Mapping[str, Any], symbol: Any, instant: int) -> dict[str, Any]:
        """The quote at a place, as the service reads it.

        Raises:
            _Fault: the instant lies outside of the calendar.
        """
        quote: dict[str, Any] = {"symbol": symbol} if symbol else {}
        try:
            quote["timestamp"] = rfc3339_nano(instant)
        except OverflowError:
            raise _Fault(*_NO_YEAR) from None
        for name in NUMBERS:
            if (value := _present(row.get(name))) is not None:
                quote[name] = value
        for name in TEXTS:
            if text := (self._source if name == "source" else None) or row.get(name):
                quote[name] = text
        return quote

    def _instant(self, value: object) -> int:
        if isinstance(value, Nanoseconds):
            return value
        local = _read(value)
        if local is None:
            raise _Fault("field-missing", "The timestamp is missing.")
        moment = local.moment
        if moment.tzinfo is None:
            if self._zone is None:
                raise _Fault("timestamp-naive", "The timestamp has no offset; --tz names its time zone.")
            moment = moment.replace(tzinfo=self._zone)
            # Taking either reading of a repeated hour would let one of two rows overwrite the other.
            if not local.whole_day and moment.utcoffset() != moment.replace(fold=1).utcoffset():
                raise _Fault("timestamp-ambiguous", "The clock change lets this local time occur twice or not at all.")
        return nanoseconds(moment) + local.nanos


class _Local(NamedTuple):
    """A date and time, naive or not, the nanoseconds after its microsecond, and whether it stands for a whole day."""

    moment: datetime
    nanos: int = 0
    whole_day: bool = False


class _WallClock(int):
    """What a clock without a zone shows, in nanoseconds since it showed 1970-01-01T00:00."""

    def __str__(self) -> str:
        try:
            return rfc3339_nano(self).removesuffix("Z")
        except OverflowError:
            return repr(int(self))


def _read(value: object) -> _Local | None:
    """The date and time that a value of a file is, None if it is none.

    Raises:
        _Fault: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _parse(value.strip())
    if isinstance(value, _WallClock):
        try:
            return _Local(EPOCH.replace(tzinfo=None) + timedelta(microseconds=value // 1000), value % 1000)
        except OverflowError:
            raise _Fault(*_NO_YEAR) from None
    if isinstance(value, datetime):
        return _Local(value)
    if isinstance(value, date):
        return _Local(datetime.combine(value, clock_time()), whole_day=True)
    raise _Fault("timestamp-invalid", "A timestamp is a date and time; the unit of a number would be a guess.")


def _parse(text: str) -> _Local | None:
    if not text or text.lower() == "nat":
        return None
    whole_day = len(text) <= _LONG_DATE
    if text.endswith(" UTC"):
        text = text[:-4] + "Z"
    nanos = 0
    if (finer := _FINER.search(text)) is not None:
        if finer[0][3:].strip("0"):
            raise _Fault("timestamp-too-fine", "A timestamp has at most nine digits of fraction.")
        nanos = int(finer[0][:3].ljust(3, "0"))
        text = text[: finer.start()] + text[finer.end() :]
    # Some Unix times would read as compact dates and times.
    if not text.isdecimal() or len(text) == _COMPACT_DATE:
        with suppress(ValueError):
            return _Local(datetime.fromisoformat(text), nanos, whole_day)
    try:
        parse(text)
    except NotAnInstant as error:
        if error.code == "timestamp-leap-second":
            raise _Fault(error.code, error.detail) from None
    raise _Fault("timestamp-invalid", "A timestamp is ISO 8601, as in 2026-11-20T14:30:00Z.")


def _present(value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip()
        return None if value.lower() in _ABSENT else value
    return value


@dataclass(slots=True)
class _Source:
    """An open file: raw rows, the way from a raw row to a mapping, how far reading has come, and its columns.

    `fields` are those of lines of JSON in the first line; other lines may have others.
    """

    rows: Iterator[Any]
    shape: Callable[[Any], Mapping[str, Any]]
    total: int
    position: Callable[[], int]
    fields: Sequence[str]
    ignored: set[str]


def _open_file(path: Path, stack: ExitStack) -> IO[bytes]:
    """Open a file that can be read more than once."""
    kind = path.stat().st_mode
    if stat.S_ISDIR(kind):
        raise Unreadable("it is a directory, not a file")
    if not stat.S_ISREG(kind) or path.absolute().parent in {Path("/dev"), Path("/dev/fd")}:
        raise Unreadable("it is no regular file, and a load reads a file more than once; save it as one first")
    return stack.enter_context(path.open("rb"))


def _fingerprint(file: IO[bytes]) -> dict[str, int | str]:
    """What tells a file from what it was: its size, when it was last changed, and both its ends."""
    status = os.fstat(file.fileno())
    ends = (os.pread(file.fileno(), _ENDS, max(0, at)) for at in (0, status.st_size - _ENDS))
    head, tail = (hashlib.sha256(end).hexdigest() for end in ends)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "head": head, "tail": tail}


def _check_unchanged(path: Path, file: IO[bytes], fingerprint: Mapping[str, int | str]) -> None:
    """See that what was read is what is there.

    Raises:
        Unreadable: the file has changed, or another one has taken its place.
    """
    with suppress(FileNotFoundError):
        if _fingerprint(file) == fingerprint and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return
    raise Unreadable("the file has changed while it was read; when nobody writes it, the same command loads it")


def _open(file: IO[bytes], path: Path, kind: FileFormat, options: LoadOptions, stack: ExitStack) -> _Source:
    """Read an open file from its beginning."""
    file.seek(0)
    if kind == "parquet":
        return _open_parquet(stack.enter_context(pq.ParquetFile(file)), options.columns)
    size = os.fstat(file.fileno()).st_size
    stream: IO[bytes] | gzip.GzipFile = file
    if path.suffix.lower() == ".gz":
        if not size:  # the library takes no member at all for an empty file
            raise Unreadable("it is empty, and no gzip file")
        stream = stack.enter_context(gzip.GzipFile(fileobj=file))
    read = _open_ndjson if kind == "ndjson" else _open_csv
    of_file = lines(stream, options.encoding)
    stack.callback(of_file.close)
    return read(of_file, file.tell, size, options.columns)


def _open_csv(of_file: Iterator[Line], tell: Callable[[], int], size: int, columns: Mapping[str, str]) -> _Source:
    header = next(of_file, None)
    if header is None or not header.text.strip():
        raise Unreadable("the first line, which names the columns, is empty")
    if "\0" in header.text:
        raise Unreadable("the first line has NUL characters; if it is UTF-16, --encoding utf-16 says so")
    if why := header.foreign(header.text):
        raise Unreadable(why)
    delimiter = max(",;\t|", key=header.text.count)
    try:
        names = _cells(header, delimiter)
    except _Fault as fault:
        raise Unreadable(f"line 1 names no columns: {fault.detail}") from None
    picked = match_columns(names, columns)
    places = list(picked.items())

    def shape(line: Line) -> Mapping[str, Any]:
        cells = _cells(line, delimiter)
        if len(cells) != len(names):
            raise _Fault("row-ragged", f"The row has {len(cells)} cells, the header {len(names)}.")
        row = {name: cells[position] for name, position in places}
        if not line.text.isascii():  # a foreign byte in a column that is ignored does no harm
            for cell in row.values():
                _check_text(line, cell)
        return row

    ignored = {name for position, name in enumerate(names) if position not in picked.values()}
    rows = (line for line in of_file if line.text)
    return _Source(rows, shape, size, tell, list(picked), ignored)


def _cells(line: Line, delimiter: str) -> list[str]:
    """The cells of a line. A cell ends where its line ends at the latest, else a stray quote would take rows with it.

    Raises:
        _Fault: the line is not as RFC 4180 has it.
    """
    if line.cut:
        raise _Fault(*_TOO_LONG)
    if '"' not in line.text:
        return line.text.split(delimiter)
    try:
        return next(csv.reader((line.text,), delimiter=delimiter, strict=True))
    except csv.Error as error:
        rule = "A quote within a quoted cell is doubled, and a cell ends on the line where it begins"
        raise _Fault("row-misquoted", f"{rule}: {error}.") from None


def _check_text(line: Line, part: str) -> None:
    if why := line.foreign(part):
        raise _Fault("not-unicode", why)


def _open_ndjson(of_file: Iterator[Line], tell: Callable[[], int], size: int, columns: Mapping[str, str]) -> _Source:
    decode = msgspec.json.Decoder(float_hook=str).decode
    ignored: set[str] = set()

    @lru_cache
    def picked(names: tuple[str, ...]) -> list[tuple[str, str]]:
        positions = match_columns(names, columns, strict=False)
        ignored.update(name for position, name in enumerate(names) if position not in positions.values())
        return [(name, names[position]) for name, position in positions.items()]

    def shape(line: Line) -> Mapping[str, Any]:
        if line.cut:
            raise _Fault(*_TOO_LONG)
        text = line.text
        if not text.isascii():
            _check_text(line, text)
        try:
            row = decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise _Fault("malformed-line", "The line is no JSON.") from None
        if not isinstance(row, dict):
            raise _Fault("not-an-object", "A quote is an object.")
        if row.keys() >= _REJECTION and isinstance(row["quote"], dict):
            row = row["quote"]
        return {name: row[column] for name, column in picked(tuple(row))}

    rows = (line for line in of_file if line.text.strip())
    head = list(islice(rows, 1))
    try:
        fields = list(shape(head[0])) if head else []
    except _Fault:
        fields = []
    return _Source(chain(head, rows), shape, size, tell, fields, ignored)


def _open_parquet(file: Any, columns: Mapping[str, str]) -> _Source:
    names = list(file.schema_arrow.names)
    picked = match_columns(names, columns)
    for name in (names[position] for position in picked.values()):
        kind = file.schema_arrow.field(name).type
        if any(is_bytes(kind) for is_bytes in _BYTES):
            raise Unreadable(f"the column {name!r} is of bytes, not of text")
    read = 0

    def rows() -> Iterator[tuple[Any, ...]]:
        nonlocal read
        for batch in file.iter_batches(batch_size=10_000, columns=[names[position] for position in picked.values()]):
            values = [_values(batch.column(names[position])) for position in picked.values()]
            yield from zip(*values, strict=True)
            read += batch.num_rows

    def shape(row: tuple[Any, ...]) -> Mapping[str, Any]:
        return dict(zip(picked, row, strict=True))

    ignored = {name for position, name in enumerate(names) if position not in picked.values()}
    return _Source(rows(), shape, file.metadata.num_rows, lambda: read, list(picked), ignored)


#: Bytes would be sent as base64, of which some is a symbol.
_BYTES: Final = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)


def _values(column: Any) -> list[Any]:
    """Python values of a column; numbers with a fraction as the shortest text that gives them back."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.string())
    elif pa.types.is_timestamp(kind):
        counts = column.cast(pa.int64()).to_pylist()
        instant: type[int] = Nanoseconds if kind.tz else _WallClock
        return [None if count is None else instant(count * UNITS[kind.unit]) for count in counts]
    values: list[Any] = column.to_pylist()
    return values


# --- ties ---


class _Order:
    """Which way the rows of one symbol run, and which of them get another instant than they have.

    Where they run forward nothing is kept, since the next instant follows from the last one. Where they run backward,
    and each tie has room before the next later instant, `moved` has the places of the rows that get another one,
    counted among the rows of the symbol, and `numbers` what they get: 16 bytes each. Of all others that is not `known`
    until their `instants` are collected, 8 bytes a row, and some 50 while they are sorted.
    """

    __slots__ = ("_before", "_last", "_rows", "_run", "instants", "known", "moved", "numbers", "steps")

    def __init__(self) -> None:
        #: Later instants less earlier ones, each compared with the row before.
        self.steps = 0
        self.known = True
        self.moved = array("q")
        self.numbers = array("q")
        self.instants = array("q")
        self._rows = self._run = 0
        self._last: int | None = None
        self._before: int | None = None

    def see(self, instant: int) -> None:
        """Take note of the next row."""
        last = self._last
        if instant == last:
            self._run += 1
        else:
            if last is not None:
                self.close()
                step = 1 if instant > last else -1
                if self.steps * step < 0:
                    self._give_up()
                self.steps += step
            self._before, self._last, self._run = last, instant, 1
        self._rows += 1

    def close(self) -> None:
        """Take note that a run of equal instants has ended."""
        run, last = self._run, self._last
        if run == 1 or last is None or not self.known or self.steps > 0:
            return
        if self._before is not None and last + run > self._before:
            self._give_up()
            return
        self.moved.extend(range(self._rows - run, self._rows - 1))
        self.numbers.extend(range(last + run - 1, last, -1))

    def _give_up(self) -> None:
        self.known = False
        self.moved, self.numbers = array("q"), array("q")

    def settle(self, *, backward: bool) -> None:
        """Number all rows at once by their time; those of one instant as the file has them, or `backward`."""
        given = pa.Array.from_buffers(pa.int64(), len(self.instants), [None, pa.py_buffer(self.instants)])
        self.instants = array("q")
        places = pa.arange(0, len(given))
        if backward:
            places = pc.subtract(len(given) - 1, places)
        places = places.take(pc.array_sort_indices(given.take(places)))  # a stable sort
        given = given.take(places)
        # Each at least one later than the one before it: an instant less its rank never falls.
        ranks = pa.arange(0, len(given))
        numbers = pc.add(pc.cumulative_max(pc.subtract(given, ranks)), ranks)
        moved = pc.not_equal(numbers, given)
        places, numbers = places.filter(moved), numbers.filter(moved)
        in_file = pc.array_sort_indices(places)
        self.moved = _in_array(places.take(in_file))
        self.numbers = _in_array(numbers.take(in_file))


def _in_array(values: pa.Array) -> "array[int]":
    found = array("q")
    found.frombytes(memoryview(values.buffers()[1])[: 8 * len(values)] if len(values) else b"")
    return found


class _Numbers:
    """Moves rows of one symbol and instant on to nanoseconds of their own, as if the file ran forward.

    All rows are seen before the first of them is numbered. A symbol runs the way that most of its steps go; one with a
    single instant, as the others do.
    """

    def __init__(self) -> None:
        self._orders: dict[str, _Order] = {}
        self._steps = 0
        self._of_symbol: dict[str, Generator[int, int, None]] = {}

    def see(self, symbol: str, instant: int) -> None:
        """Take note of the next row of the file."""
        order = self._orders.get(symbol)
        if order is None:
            order = self._orders[symbol] = _Order()
        order.see(instant)

    def end(self) -> bool:
        """Take note that the file has ended; whether that will do, or all its rows have to be collected."""
        for order in self._orders.values():
            order.close()
            self._steps += order.steps
        return all(order.known for order in self._orders.values())

    def collect(self, symbol: str, instant: int) -> None:
        """Keep the next row of the file where its symbol needs that."""
        order = self._orders.get(symbol)
        if order is not None and not order.known:
            order.instants.append(instant)

    def settle(self) -> None:
        """Take note that all rows were collected."""
        for order in self._orders.values():
            if not order.known:
                order.settle(backward=(order.steps or self._steps) < 0)

    def __call__(self, symbol: str, instant: int) -> int:
        """The instant that the next row of the file gets."""
        numbers = self._of_symbol.get(symbol)
        if numbers is None:
            numbers = self._of_symbol[symbol] = self._numbers(self._orders.get(symbol))
            next(numbers)
        return numbers.send(instant)

    def _numbers(self, order: _Order | None) -> Generator[int, int, None]:
        if order is None or (order.known and (order.steps or self._steps) >= 0):
            return _forward()
        return _as_listed(order)


def _forward() -> Generator[int, int, None]:
    given = yield 0
    last = given
    while True:
        given = yield last
        last = max(given, last + 1)


def _as_listed(order: _Order) -> Generator[int, int, None]:
    upcoming = iter(zip(order.moved, order.numbers, strict=True))
    moved, number = next(upcoming, (-1, 0))
    given = yield 0
    for row in count():
        if row == moved:
            given = number
            moved, number = next(upcoming, (-1, 0))
        given = yield given


def _name(symbol: Any) -> str:
    """What tells symbols apart, as the service does."""
    return (normal(symbol) if isinstance(symbol, str) else None) or str(symbol)


@dataclass(slots=True)
class Chunk:
    """Consecutive rows of the file after row `start`, up to row `end`: the quotes to send, and what was refused here.

    `rows` and `places` have the row and the line of the file of each quote, `numbered` the positions of those whose
    instant was moved.
    """

    start: int = 0
    end: int = 0
    position: int = 0
    rows: list[int] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    refused: list[tuple[int, bytes]] = field(default_factory=list)
    days: set[int] = field(default_factory=set)
    size: int = 0
    numbered: set[int] = field(default_factory=set)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def takes(self, line: bytes, instant: int) -> bool:
        """Whether one more quote keeps the service's limits of days and bytes."""
        known_day = len(self.days) < MAX_DAYS or instant // _DAY in self.days
        return known_day and self.size + len(line) < MAX_BYTES

    def add(self, row: int, place: int | None, line: bytes, name: str, instant: int) -> None:
        """Take one more quote."""
        self.rows.append(row)
        self.places.append(place)
        self.lines.append(line)
        self.days.add(instant // _DAY)
        self.size += len(line) + 1
        first, last = self.spans.get(name, (instant, instant))
        self.spans[name] = (min(first, instant), max(last, instant))

    def overlaps(self, other: "Chunk") -> bool:
        """Whether both may hold the same key. Sent at once, either could overwrite the other."""
        return any(
            first <= other.spans[symbol][1] and other.spans[symbol][0] <= last
            for symbol, (first, last) in self.spans.items()
            if symbol in other.spans
        )


def chunks(
    source: _Source,
    converter: Converter,
    *,
    size: int,
    skip: int = 0,
    sent: Iterable[Range] = (),
    numbers: _Numbers | None = None,
) -> Iterator[Chunk]:
    """Cut the rows after the first `skip` into requests that keep the service's limits of rows, days and bytes.

    What was `sent` before is cut as it was then, so that it is the same request.
    """
    chunk, encode = Chunk(skip, skip), msgspec.json.Encoder(enc_hook=str).encode
    as_sent, until = deque(sorted(sent)), 0

    def cut() -> Chunk:
        nonlocal chunk
        full, chunk = chunk, Chunk(chunk.end, chunk.end)
        full.position = source.position()
        return full

    yield from _passed_over(source, converter, numbers, skip)
    for row, raw in enumerate(source.rows, skip + 1):
        if as_sent and row == as_sent[0][0] + 1:
            until = as_sent.popleft()[1]
            if chunk.end > chunk.start:
                yield cut()
        try:
            values, symbol, given, instant = _placed(source, converter, numbers, raw)
            line = encode(converter.quote(values, symbol, instant))
        except _Fault as fault:
            shown = encode(_shown(source, converter, raw))
            chunk.refused.append((row, _rejection(row, _place(raw), fault.code, fault.detail, shown)))
        else:
            if row > until and not chunk.takes(line, instant):
                yield cut()
            if instant != given:
                chunk.numbered.add(len(chunk.lines))
            chunk.add(row, _place(raw), line, _name(symbol), instant)
        chunk.end = row
        if row == until or (row > until and len(chunk.lines) + len(chunk.refused) >= size):
            yield cut()
    yield cut()


def _passed_over(source: _Source, converter: Converter, numbers: _Numbers | None, count: int) -> Iterator[Chunk]:
    """Pass over the first rows, from which the numbers of those after them follow."""
    row = 0
    for row, raw in enumerate(islice(source.rows, count), 1):
        if numbers is not None:
            with suppress(_Fault):
                _placed(source, converter, numbers, raw)
        if row % _SKIP == 0:
            yield Chunk(end=row, position=source.position())
    if row < count:
        raise Unreadable(f"the file has {row} rows, but {count} were loaded before; --no-resume loads it anew")


def _placed(
    source: _Source, converter: Converter, numbers: _Numbers | None, raw: Any
) -> tuple[Mapping[str, Any], Any, int, int]:
    """The values of a row, its symbol, its instant, and the instant that it gets."""
    values = source.shape(raw)
    symbol, given = converter.place(values)
    if numbers is None or not _FIRST <= given <= _LAST:
        return values, symbol, given, given
    return values, symbol, given, numbers(_name(symbol), given)


def _shown(source: _Source, converter: Converter, raw: Any) -> Mapping[str, Any]:
    """A row for the reject file: its values, or where it has no shape, the line itself."""
    try:
        return converter.named(source.shape(raw))
    except _Fault:
        return {"line": str(raw)}


def _place(raw: Any) -> int | None:
    """The line of the file that a row is on."""
    return raw.number if isinstance(raw, Line) else None


def _rejection(row: int, place: int | None, code: str, detail: str, quote: bytes) -> bytes:
    where = {"row": row} if place is None else {"row": row, "line": place}
    return msgspec.json.encode(where | {"code": code, "detail": detail, "quote": msgspec.Raw(quote)}) + b"\n"


def _rejections(chunk: Chunk, receipt: Receipt) -> bytes:
    """Lines of the reject file, in file order: what was refused here and what the service refused."""
    refused = [
        (row, _rejection(row, chunk.places[r.index], r.code, r.detail, chunk.lines[r.index]))
        for r in receipt.rejected
        for row in (chunk.rows[r.index],)
    ]
    return b"".join(line for _, line in sorted(chunk.refused + refused))


class _Loader:
    """One run over all files."""

    def __init__(self, options: LoadOptions, client: Client, tell: Callable[[str], None], progress: Progress) -> None:
        self._options = options
        self._client = client
        self._tell = tell
        self._progress = progress
        self.report = LoadReport(files=[FileReport(file=str(path), failure="not started") for path in options.files])

    async def run(self) -> None:
        """Load each file; one that fails does not stop the others, a service that stays away does."""
        for path, report in zip(self._options.files, self.report.files, strict=True):
            report.failure, report.status = None, "interrupted"
            began = time.monotonic()
            try:
                await self._load(path, report)
            except Unavailable as error:
                report.status, report.failure = "failed", str(error)
                return
            except (Refused, Unreadable, Unwritable, InvalidRequest) as error:
                report.status, report.failure = "failed", str(error)
            except OSError as error:
                named = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else None
                report.status, report.failure = "failed", named or str(error)
            except _BROKEN_FILE as error:
                report.status, report.failure = "failed", str(error) or type(error).__name__
            finally:
                report.seconds = round(time.monotonic() - began, 3)
                report.rows_per_second = round((report.rows - report.resumed_after) / max(report.seconds, 0.001))

    async def _load(self, path: Path, report: FileReport) -> None:
        options = self._options
        name = path.name[: -len(path.suffix)] if path.suffix.lower() == ".gz" else path.name
        kind = options.format or _SUFFIXES.get(Path(name).suffix.lower())
        if kind is None:
            raise Unreadable(f"its name does not tell its format; --format does ({', '.join(_SUFFIXES)} are known)")
        state_path = options.state or path.with_name(f"{path.name}.load-state.json")
        rejects = options.rejects or path.with_name(f"{path.name}.rejects.ndjson")
        with ExitStack() as stack:
            file = _open_file(path, stack)
            stack.enter_context(held([state_path, rejects]))
            fingerprint = _fingerprint(file)
            source = _open(file, path, kind, options, stack)
            symbol = None if "symbol" in source.fields else options.symbol or _symbol_of(name)
            converter = Converter(symbol=symbol, tz=options.tz, source=options.source)
            meaning = _meaning(options, kind, symbol) | {"rejects": str(rejects.absolute())}
            store = await self._client.store()
            fresh = State.new(fingerprint, meaning, store)
            journal = Journal(state_path, rejects, fresh, resume=options.resume)
            state = journal.state
            report.rows, report.resumed_after, report.totals = state.rows, state.rows, state.totals
            report.rejects = str(rejects) if state.rejects_bytes else None
            if state.complete:
                report.status = "already loaded"
                self._tell(_already_loaded(path, report))
                return
            if journal.note:
                self._tell(f"{path}: {journal.note}.")
            journal.open()
            bar = self._progress.add_task(path.name, total=source.total, rows=state.rows, rate=0.0)
            numbers = None
            if options.ties == "number":
                numbers = await self._numbers(partial(_open, file, path, kind, options), path.name, converter)
                _check_unchanged(path, file, fingerprint)
                source = _open(file, path, kind, options, stack)
            requests = chunks(
                source, converter, size=options.batch_size, skip=state.rows, sent=state.sent, numbers=numbers
            )
            try:
                await self._send(requests, journal, report, bar)
            finally:
                report.rejects = str(rejects) if state.rejects_bytes else None
                report.ignored_columns = sorted(source.ignored)
                if source.ignored:
                    self._tell(f"{path}: ignored columns: {', '.join(map(repr, report.ignored_columns))}.")
            _check_unchanged(path, file, fingerprint)
            if await self._client.store() != store:
                raise Unreadable(
                    "the store has been restored or has failed over meanwhile, and may lack rows of this file; the "
                    "same command loads it again"
                )
            journal.complete()
            self._progress.update(bar, completed=source.total)
            report.status = "loaded"

    async def _numbers(self, opened: Callable[[ExitStack], _Source], name: str, converter: Converter) -> _Numbers:
        """What tells the rows of the file apart that have one symbol and instant."""
        numbers = _Numbers()
        await self._look(opened, name, converter, numbers.see)
        if not numbers.end():
            await self._look(opened, name, converter, numbers.collect)
            numbers.settle()
        return numbers

    async def _look(
        self, opened: Callable[[ExitStack], _Source], name: str, converter: Converter, note: Callable[[str, int], None]
    ) -> None:
        """Read the file without sending anything, and note the symbol and instant of each row that has them."""
        with ExitStack() as stack:
            source = opened(stack)
            bar = self._progress.add_task(f"{name}: order of rows", total=source.total, rows=0, rate=0.0)
            began = time.monotonic()
            for row, raw in enumerate(source.rows, 1):
                try:
                    symbol, instant = converter.place(source.shape(raw))
                except _Fault:
                    pass  # named when it comes to it
                else:
                    if _FIRST <= instant <= _LAST:
                        note(_name(symbol), instant)
                if row % _LOOK == 0:
                    rate = row / (time.monotonic() - began)
                    self._progress.update(bar, completed=source.position(), rows=row, rate=rate)
                    await asyncio.sleep(0)
            self._progress.remove_task(bar)

    async def _send(self, requests: Iterator[Chunk], journal: Journal, report: FileReport, bar: TaskID) -> None:
        began = time.monotonic()

        async def send(chunk: Chunk) -> Receipt:
            if not chunk.lines:
                return Receipt(0, 0)
            options = self._options
            rows = chunk.start, chunk.end
            journal.sending(rows)
            try:
                receipt = await self._client.send(
                    chunk.lines,
                    on_conflict=options.on_conflict,
                    on_error="skip",
                    prices=options.prices,
                    key=journal.key(rows),
                )
            except Refused:
                journal.refused(rows)
                raise
            if receipt.received != len(chunk.lines):
                raise Unreadable(f"the service counts {receipt.received:,} quotes of {len(chunk.lines):,} that it got")
            return receipt

        async with aclosing(in_order(requests, send, clash=Chunk.overlaps)) as answers:
            async for chunk, receipt in answers:
                journal.acknowledge(
                    chunk.end,
                    _rejections(chunk, receipt),
                    receipt,
                    refused=len(chunk.refused),
                    numbered=len(chunk.numbered.difference(r.index for r in receipt.rejected)),
                )
                report.rows = journal.state.rows
                rate = (report.rows - report.resumed_after) / (time.monotonic() - began)
                self._progress.update(bar, completed=chunk.position, rows=report.rows, rate=rate)


def _already_loaded(path: Path, report: FileReport) -> str:
    told = f"{path}: already loaded, {report.rows:,} rows"
    if not report.totals.rejected:
        return f"{told}; --no-resume loads it again."
    return (
        f"{told}, of which {report.totals.rejected:,} were refused; mend them in {report.rejects} and load that file, "
        "or load all rows again with --no-resume."
    )


def _meaning(options: LoadOptions, kind: FileFormat, symbol: str | None) -> dict[str, Any]:
    """What changes what is stored, beside the file itself."""
    return {
        "format": kind, "encoding": options.encoding, "symbol": symbol, "tz": options.tz, "source": options.source,
        "on_conflict": options.on_conflict, "ties": options.ties, "prices": options.prices,
        "columns": dict(sorted(options.columns.items())),
    }  # fmt: skip


def _symbol_of(name: str) -> str:
    """The symbol that a file is named for."""
    try:
        return normal_symbol(Path(name).stem)
    except InvalidRequest:
        raise Unreadable("it has no column of symbols and its name is none; --symbol names it") from None


def _check(options: LoadOptions) -> None:
    if not options.files:
        raise InvalidRequest("There is no file to load.", parameter="files")
    if not 1 <= options.batch_size <= MAX_ROWS:
        raise InvalidRequest(f"A batch is 1 to {MAX_ROWS:,} rows.", parameter="batch_size")
    if options.symbol is not None:
        normal_symbol(options.symbol)
    if options.tz:
        try:
            ZoneInfo(options.tz)
        except (KeyError, ValueError, OSError):
            raise InvalidRequest("The time zone is an IANA name such as America/New_York.", parameter="tz") from None
    written = [path for path in (options.state, options.rejects) if path is not None]
    if written and len(options.files) > 1:
        raise InvalidRequest("A state or reject file belongs to one loaded file.", parameter="files")
    files = [path.absolute() for path in (*options.files, *written)]
    if written and len(set(files)) < len(files):
        raise InvalidRequest("The loaded file, its state and its rejects are different files.", parameter="files")


async def run(options: LoadOptions, *, transport: httpx.AsyncBaseTransport | None = None) -> LoadReport:
    """Load the files, print a summary or one JSON object, and say what became of each.

    Raises:
        InvalidRequest: an option has no meaning.
    """
    _check(options)
    console = Console(stderr=True, highlight=False, markup=False)
    tell = partial(console.print, soft_wrap=True)  # a sentence stays one line in a log
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows  {task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=console,
    )
    async with Client(options.url, on_wait=tell, transport=transport) as client:
        loader = _Loader(options, client, tell, progress)
        report = loader.report
        with progress:
            report.interrupted = not await until_interrupted(loader.run())
    report.rejected = sum(file.totals.rejected for file in report.files)
    report.failed = sum(file.status == "failed" for file in report.files)
    if options.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        _show(report)
    return report


def _show(report: LoadReport) -> None:
    counts = [{"rows": file.rows} | msgspec.to_builtins(file.totals) for file in report.files]
    shown = ["rows", "inserted", "updated", "unchanged", "rejected"]
    shown += [
        name
        for name in ("superseded", "numbered", "rounded", "zeros", "crossed")
        if any(count[name] for count in counts)
    ]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    for name in (*shown, "seconds", "rows/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for file, counted in zip(report.files, counts, strict=True):
        numbers = [f"{counted[column]:,}" for column in shown]
        table.add_row(Path(file.file).name, *numbers, f"{file.seconds:,.1f}", f"{file.rows_per_second:,}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    for file in report.files:
        if file.failure:
            console.print(f"{file.file}: {file.failure}", soft_wrap=True)
        if file.status == "interrupted":
            console.print(
                f"{file.file}: interrupted; the same command goes on after row {file.rows:,}.", soft_wrap=True
            )
        if file.rejects:
            console.print(f"{file.file}: rejected rows are in {file.rejects}", soft_wrap=True)
