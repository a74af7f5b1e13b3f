"""A batch: the quotes of one request, checked and in columns, whatever form they arrived in.

Invariant: a `Batch` holds only rows that keep every rule, sorted by symbol and instant with one row per key; whatever
was refused is listed beside them. Of the ways in, `from_rows` says what is wrong with which row; `of` and `from_table`
know no faults: where anything is unusual they give None, and what they do take means the same to all three.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime, timedelta
from itertools import chain, pairwise
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.compute as pc

from app.clock import nanoseconds, parts
from app.errors import BodyTooLarge, InvalidQuotes, InvalidRequest, Rejection
from app.quote import columns, rows, rules
from app.quote.columns import Unusual
from app.quote.fields import COLUMNS, NANOS, VALUES
from app.quote.rows import Record
from app.quote.rules import Checks
from app.quote.terms import Receipt, Terms

#: What is noted of rows and counted in the receipt unless they are refused.
_COUNTED: Final = ("numbered", "rounded", "zeros", "crossed")
#: What a row takes in memory while it is a tuple.
_RECORD_BYTES: Final = 1300
#: What a refused row takes until it is answered.
_REJECTION_BYTES: Final = 200
_DAY: Final = 86_400 * 10**6
_INT64: Final = 2**63

#: The first and the last instant of a symbol, in nanoseconds since 1970.
Ends = tuple[int, int]


class Batch:
    """Valid quotes of one request, sorted by symbol and instant, one row per key.

    Attributes:
        received: rows of the request; `received = len(batch) + superseded + len(rejected)`.
        superseded: rows that lost to another one of the same key.
        numbered: rows that were moved on to a free nanosecond.
        rounded: values rounded to twelve decimals.
        zeros: prices of 0 that were taken for an absent side.
        crossed: quotes whose bid is above their ask.
        rejected: the refused rows, by position.
        pointer: JSON pointer of the array that held the rows.
    """

    __slots__ = (
        "_checks", "_columns", "_records", "crossed", "numbered", "pointer", "received", "rejected", "rounded",
        "superseded", "zeros",
    )  # fmt: skip

    def __init__(
        self,
        rows: pa.RecordBatch | list[Record],
        received: int,
        *,
        superseded: int = 0,
        numbered: int = 0,
        rounded: int = 0,
        zeros: int = 0,
        crossed: int = 0,
        rejected: list[Rejection] | None = None,
        pointer: str = "",
        checks: Checks | None = None,
    ) -> None:
        self._checks = checks
        self._records = rows if isinstance(rows, list) else None
        self._columns: pa.RecordBatch = rows if self._records is None else None
        self.received = received
        self.superseded = superseded
        self.numbered = numbered
        self.rounded = rounded
        self.zeros = zeros
        self.crossed = crossed
        self.rejected = rejected or []
        self.pointer = pointer

    def __len__(self) -> int:
        return int(self._columns.num_rows) if self._records is None else len(self._records)

    @property
    def nbytes(self) -> int:
        """Bytes held by the rows, and by what is said of those that were refused."""
        rows = int(self._columns.nbytes) if self._records is None else _RECORD_BYTES * len(self._records)
        return rows + _REJECTION_BYTES * len(self.rejected)

    @property
    def columns(self) -> pa.RecordBatch:
        """The stored columns, and `index`: the position of each row in the request."""
        if self._columns is None and self._records is not None:
            self._columns = rows.in_columns(self._records)
        return self._columns

    @property
    def rows(self) -> pa.RecordBatch:
        """The stored columns."""
        return self.columns.select(COLUMNS.names)

    @property
    def index(self) -> pa.Array:
        """The position of each row in the request."""
        return self.columns.column("index")

    @property
    def timestamps(self) -> Any:
        """The microsecond of each row in UTC: a list while the rows are few, else an Arrow column."""
        if self._records is not None:
            return [record[1] for record in self._records]
        return self.columns.column("timestamp")

    @property
    def oldest(self) -> datetime | None:
        """The first microsecond of the rows in UTC; None without rows."""
        times = self.timestamps
        if isinstance(times, list):
            return min(times, default=None)
        oldest: datetime | None = pc.min(times).as_py()
        return oldest

    def days(self) -> list[tuple[datetime, datetime]]:
        """The days in UTC that have rows, those that follow each other as one: first midnight, and the one after."""
        times = pa.array(self.timestamps, COLUMNS.field("timestamp").type)
        found: list[tuple[datetime, datetime]] = []
        for day in sorted(pc.unique(pc.floor_temporal(times, unit="day")).to_pylist()):
            if found and found[-1][1] == day:
                found[-1] = (found[-1][0], day + timedelta(days=1))
            else:
                found.append((day, day + timedelta(days=1)))
        return found

    def ends(self) -> Iterable[tuple[str, int, int]]:
        """Symbols with a first and a last instant; while the rows are few, each row by itself."""
        if self._records is not None:
            each = ((record[0], nanoseconds(record[1]) + record[2]) for record in self._records)
            return [(symbol, instant, instant) for symbol, instant in each]
        if not len(self):
            return []
        symbols, instants = self.columns.column("symbol"), columns.nanoseconds(self.columns)
        last = [*pc.indices_nonzero(pc.not_equal(symbols[1:], symbols[:-1])).to_pylist(), len(self) - 1]
        first = pa.array([0, *(position + 1 for position in last[:-1])])
        return zip(
            symbols.take(first).to_pylist(), instants.take(first).to_pylist(), instants.take(last).to_pylist(),
            strict=True,
        )  # fmt: skip

    def receipt(
        self, *, inserted: int, updated: int = 0, unchanged: int = 0, conflicts: Sequence[Rejection] = ()
    ) -> Receipt:
        """The receipt of the written batch; `conflicts` are rows refused by the table under `on_error=skip`."""
        numbered, rounded, zeros, crossed = self.numbered, self.rounded, self.zeros, self.crossed
        rejected = self.rejected
        if conflicts:
            rejected = sorted([*rejected, *conflicts], key=lambda r: r.index)
            refused = [conflict.index for conflict in conflicts]
            if self._checks is not None:
                numbered, rounded, zeros, crossed = (self._checks.count(what, refused) for what in _COUNTED)
        return Receipt(
            self.received, inserted, updated, unchanged, self.superseded, numbered, rounded, zeros, crossed, rejected
        )

    @classmethod
    def from_rows(cls, given: Iterable[Any], terms: Terms | None = None, *, pointer: str = "") -> Self:
        """Check rows (mappings with the fields of a quote) and gather them into columns.

        `pointer` is the JSON pointer of the array that holds the rows. What makes rows as they are taken bounds them.

        Raises:
            InvalidQuotes: a row breaks a rule and `on_error` is `abort`.
            InvalidRequest: too many distinct days.
            BodyTooLarge: too many rows.
        """
        terms = terms or Terms()
        if isinstance(given, Sized):
            check_size(len(given), terms)
        checks = Checks(terms, pointer)
        found, received = rows.read(given, checks)
        check_size(received, terms)
        return cls._checked(found, received, checks)

    @classmethod
    def of(cls, given: list[Any], terms: Terms, has_values: Callable[[int], bool], *, pointer: str = "") -> Self | None:
        """A batch of `Row`s, of which many are taken out of their list; None if anything about them is unusual.

        `has_values` says whether so many values that are not null are all that was sent.

        Raises:
            InvalidQuotes, InvalidRequest, BodyTooLarge: as `from_rows`.
        """
        check_size(len(given), terms)
        if len(given) <= rows.FEW:
            try:
                return cls._few(given, terms, has_values, pointer)
            except Unusual:
                return None
        table = columns.of_lists(rows.by_field(given))
        given.clear()  # half of what a body becomes
        if table is None or not has_values(sum(len(column) - column.null_count for column in table.columns)):
            return None
        return cls.from_table(table, terms, pointer=pointer)

    @classmethod
    def from_table(
        cls, table: pa.Table, terms: Terms, *, pointer: str = "", given: Mapping[str, str] | None = None
    ) -> Self | None:
        """A batch of columns, named as the fields; None if anything about a value is unusual.

        `given` has by field what the client calls the column.

        Raises:
            InvalidQuotes, InvalidRequest, BodyTooLarge: as `from_rows`.
        """
        check_size(len(table), terms)
        checks = Checks(terms, pointer, given)
        found = columns.of_table(table, checks)
        return None if found is None else cls._checked(found, len(table), checks)

    @classmethod
    def _checked(cls, found: pa.RecordBatch, received: int, checks: Checks) -> Self:
        terms = checks.terms
        found, superseded = _unique(checks.ruled(found), checks)
        rejected = checks.rejections()
        if rejected and terms.on_error == "abort":
            raise InvalidQuotes(rejected, received)
        _check_days(found.column("timestamp"), terms.limits.max_days)
        counts = {what: checks.count(what) for what in _COUNTED}
        return cls(
            found, received, superseded=superseded, rejected=rejected, pointer=checks.pointer,
            # What the table refuses under `error` is known later, and is not to be counted then.
            checks=checks if terms.on_conflict == "error" and any(counts.values()) else None, **counts,
        )  # fmt: skip

    @classmethod
    def _few(cls, given: Sequence[Any], terms: Terms, has_values: Callable[[int], bool], pointer: str) -> Self:
        found = rows.few(given, terms)
        if not has_values(found.values):
            raise Unusual
        records = sorted(found.records, key=rows.key)
        superseded = numbered = 0
        if any(rows.key(one) == rows.key(next_) for one, next_ in pairwise(records)):
            if terms.ties == "number":
                numbered = _number(records)
            elif terms.on_conflict == "error":
                raise Unusual
            else:
                records = _without_twins(records, terms)
                superseded = len(found.records) - len(records)
        if terms.on_conflict == "error" and (numbered or found.zeros or found.crossed):
            raise Unusual  # only the thorough way knows of which rows
        limit = terms.limits.max_days
        if len(records) > limit and len({record[1].date() for record in records}) > limit:
            raise Unusual
        return cls(
            records, len(given), superseded=superseded, numbered=numbered, zeros=found.zeros, crossed=found.crossed,
            pointer=pointer,
        )  # fmt: skip


def check_size(count: int, terms: Terms) -> None:
    """Refuse a batch with more rows than the limit.

    Raises:
        BodyTooLarge: it has.
    """
    if count > terms.limits.max_rows:
        raise BodyTooLarge(f"{count} quotes in one batch; at most {terms.limits.max_rows} are taken.")


def joined(batches: Sequence[Batch]) -> pa.RecordBatch:
    """The rows of all batches in the stored columns, sorted by symbol and instant."""
    if len(batches) == 1:
        return batches[0].rows
    few = [batch._records for batch in batches if batch._records is not None]  # noqa: SLF001  of this very class
    parts = [batch.rows for batch in batches if batch._records is None]  # noqa: SLF001
    if any(few):
        parts.append(rows.in_columns(sorted(chain.from_iterable(few), key=rows.key)).select(COLUMNS.names))
    if not parts:
        return pa.RecordBatch.from_pylist([], schema=COLUMNS)
    if len(parts) == 1:
        return parts[0]
    merged = pa.concat_batches(parts)
    return merged.take(order(merged)[0]) if len(merged) else merged


def ends(batches: Sequence[Batch]) -> dict[str, Ends]:
    """The first and the last instant of each symbol in the batches."""
    return widest(chain.from_iterable(batch.ends() for batch in batches))


def widest(spans: Iterable[tuple[str, int, int]]) -> dict[str, Ends]:
    """The first and the last instant of each symbol in spans, of which it may have several."""
    found: dict[str, Ends] = {}
    for symbol, first, last in spans:
        if symbol in found:
            first, last = min(first, found[symbol][0]), max(last, found[symbol][1])  # noqa: PLW2901  widened
        found[symbol] = (first, last)
    return found


def order(batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
    """The positions of rows by their key, equal keys as they come; and which have that of the next one."""
    symbols = batch.column("symbol")
    if not pa.types.is_dictionary(symbols.type):
        symbols = symbols.dictionary_encode()
    instants = columns.nanoseconds(batch)
    bounds = pc.min_max(instants)
    first, last = bounds["min"].as_py(), bounds["max"].as_py()
    bits = (last - first).bit_length()
    ranks = pc.rank(symbols.dictionary, tiebreaker="dense").cast(pa.int64()).take(symbols.indices)
    if (len(symbols.dictionary) + 1) << bits < _INT64:
        # Symbol and instant in one integer sort twice as fast as two columns.
        keys = pc.add(pc.shift_left(ranks, bits), pc.subtract(instants, first))
        found = pc.array_sort_indices(keys)
        keys = keys.take(found)
        return found, pc.equal(keys[1:], keys[:-1])
    keyed = pa.RecordBatch.from_arrays(
        [ranks, instants, columns.positions(len(batch))], names=["rank", "instant", "position"]
    )
    found = pc.sort_indices(keyed, sort_keys=[(name, "ascending") for name in keyed.schema.names])
    keyed = keyed.take(found)
    same = (pc.equal(column[1:], column[:-1]) for column in (keyed.column("rank"), keyed.column("instant")))
    return found, pc.and_(*same)


# --- equal keys ---


def _unique(batch: pa.RecordBatch, checks: Checks) -> tuple[pa.RecordBatch, int]:
    """Sort by key and keep one row of each key, or each row on a key of its own; how many another one replaced."""
    terms = checks.terms
    if len(batch) < 2:  # noqa: PLR2004  one row has no twin
        return _in_texts(batch), 0
    found, same = order(batch)
    batch = _in_texts(batch.take(found))
    repeats = pc.sum(same).as_py() or 0
    if not repeats:
        return batch, 0
    if terms.ties == "number":
        return _numbered(batch, checks), 0
    # `same[i]` says that row i and row i + 1 share a key.
    if terms.on_conflict in {"update", "merge"}:
        keep = pa.concat_arrays([pc.invert(same), pa.array([True])])
        if terms.on_conflict == "merge":
            batch = _merged(batch, same)
        return batch.filter(keep), repeats
    later = pa.concat_arrays([pa.array([False]), same])
    if terms.on_conflict == "error":
        for index in batch.column("index").filter(later).to_pylist():
            checks.refuse(index, "timestamp", rules.DUPLICATE)
        repeats = 0
    return batch.filter(pc.invert(later)), repeats


def _next_free(symbols: Iterable[Any], instants: Sequence[int]) -> tuple[list[int], int]:
    """Instants in the order of their keys, each later than the one before it of its symbol; how many were moved."""
    found: list[int] = []
    moved, before, last = 0, None, 0
    for symbol, given in zip(symbols, instants, strict=True):
        instant = given
        if symbol == before and given <= last:
            instant = last + 1
            moved += 1
        found.append(instant)
        before, last = symbol, instant
    return found, moved


def _numbered(batch: pa.RecordBatch, checks: Checks) -> pa.RecordBatch:
    symbols = batch.column("symbol").dictionary_encode().indices.to_pylist()
    given = columns.nanoseconds(batch)
    instants = pa.array(_next_free(symbols, given.to_pylist())[0], pa.int64())
    checks.note("numbered", batch.column("index").filter(pc.not_equal(instants, given)))
    micros, nanos = columns.split(instants)
    place = batch.schema.get_field_index("timestamp")
    batch = batch.set_column(place, batch.schema.field("timestamp"), micros)
    return batch.set_column(place + 1, batch.schema.field(NANOS), nanos)


def _number(records: list[Record]) -> int:
    given = [nanoseconds(record[1]) + record[2] for record in records]
    instants, moved = _next_free([record[0] for record in records], given)
    for place, (record, instant) in enumerate(zip(records, instants, strict=True)):
        records[place] = (record[0], *parts(instant), *record[3:])
    return moved


def _without_twins(records: list[Record], terms: Terms) -> list[Record]:
    """One record of each key: the last, the first, or the last of what is not null."""
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        held = kept.setdefault(rows.key(record), record)
        if terms.on_conflict == "update":
            kept[rows.key(record)] = record
        elif terms.on_conflict == "merge":
            kept[rows.key(record)] = tuple(
                new if new is not None else old for new, old in zip(record, held, strict=True)
            )
    return list(kept.values())


def _merged(batch: pa.RecordBatch, same: pa.Array) -> pa.RecordBatch:
    """Each row with its nulls filled from the nearest row before it that has the same key and a value."""
    places = columns.positions(len(batch))
    begins = pa.concat_arrays([pa.array([True]), pc.invert(same)])
    first = pc.cumulative_max(pc.if_else(begins, places, 0))
    for name in VALUES:
        column = batch.column(name)
        if column.null_count in {0, len(batch)}:
            continue
        nearest = pc.fill_null_forward(pc.if_else(pc.is_valid(column), places, pa.scalar(None, places.type)))
        own = pc.if_else(pc.greater_equal(nearest, first), nearest, pa.scalar(None, places.type))
        batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), column.take(own))
    return batch


def _in_texts(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with its symbols as texts again."""
    return batch.set_column(0, COLUMNS.field("symbol"), batch.column("symbol").cast(pa.string()))


def _check_days(times: pa.Array, limit: int) -> None:
    bounds = pc.min_max(times)
    if not len(times) or bounds["max"].value - bounds["min"].value < (limit - 1) * _DAY:
        return
    days = len(pc.unique(pc.floor_temporal(times, unit="day")))
    if days > limit:
        raise InvalidRequest(f"The batch spans {days} distinct days; at most {limit} are taken in one request.")
