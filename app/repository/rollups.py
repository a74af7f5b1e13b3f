"""Which stretches of a time range may be read from which rollup, so that no bar is ever stale.

A continuous aggregate does not show quotes that arrived behind its last refresh until the next one. TimescaleDB
logs such changes, in the transaction that makes them, in its catalog; this module reads that log and cuts a
range into stretches: a rollup where it is up to date, the next finer one where it is not, raw quotes at last.
Invariant: a stretch never begins or ends inside a bucket of the rollup it is read from, except at the range's
own ends; below `floor`, where raw quotes may have been dropped, only rollups are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from app.clock import EPOCH, floor, microseconds
from app.db.engine import Connection

#: Rollups from coarse to fine with the width of their buckets, all aligned to midnight in UTC.
ROLLUPS: Final = (
    ("ohlc_1d", timedelta(days=1)),
    ("ohlc_1h", timedelta(hours=1)),
    ("ohlc_1m", timedelta(minutes=1)),
)
RAW: Final = "real_time"
#: More holes than this in one rollup are read as one, to keep the statement short.
_MOST_HOLES: Final = 4

# Changes not yet looked at, ranges not yet materialised, ranges being materialised: in microseconds since 1970,
# both ends inclusive. The three steps of a refresh move an entry from one to the next, each in one transaction.
_INVALID: Final = """
WITH rollup AS (
    SELECT mat_hypertable_id AS id, raw_hypertable_id AS source, user_view_name::text AS name
    FROM _timescaledb_catalog.continuous_agg WHERE user_view_schema = 'quotes')
SELECT rollup.name, entry.lowest_modified_value, entry.greatest_modified_value
FROM rollup CROSS JOIN LATERAL (
    SELECT lowest_modified_value, greatest_modified_value
    FROM _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log WHERE hypertable_id = rollup.source
    UNION ALL
    SELECT lowest_modified_value, greatest_modified_value
    FROM _timescaledb_catalog.continuous_aggs_materialization_invalidation_log WHERE materialization_id = rollup.id
    UNION ALL
    SELECT lowest_modified_value, greatest_modified_value
    FROM _timescaledb_catalog.continuous_aggs_materialization_ranges WHERE materialization_id = rollup.id) entry
WHERE entry.greatest_modified_value >= $1 AND entry.lowest_modified_value < $2
UNION ALL
SELECT NULL, _timescaledb_functions.to_unix_microseconds(dropped_before), NULL
FROM quotes.settings WHERE dropped_before IS NOT NULL
"""

Span = tuple[datetime, datetime]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a range and the relation to read it from; `end` is exclusive."""

    source: str
    start: datetime
    end: datetime


def coarsest(step: int) -> str:
    """The coarsest rollup of which a number of seconds is a multiple."""
    fitting = (name for name, width in ROLLUPS if not step % (width // timedelta(seconds=1)))
    return next(fitting, RAW)


async def stretches(
    connection: Connection, source: str, start: datetime, end: datetime, floor: datetime | None
) -> list[Stretch]:
    """Cut [`start`, `end`) (aware) into stretches, read from `source` wherever it is up to date.

    `floor` is raised to a midnight, so that no bucket that is read from below it reaches above it. It may be of a while
    ago; that of now comes with the log.
    """
    known = start if floor is None else max(start, floor + (EPOCH - floor) % ROLLUPS[0][1])
    if known >= end:
        return [Stretch(source, start, end)]
    rows = await connection.fetch(_INVALID, microseconds(start), microseconds(end))
    dropped = [_moment(first, start, end) for name, first, _ in rows if name is None]
    lowest = max([known, *dropped])
    if lowest >= end:
        return [Stretch(source, start, end)]
    invalid: dict[str, list[Span]] = {}
    for name, first, last in rows:
        if name is None or last < microseconds(lowest):
            continue
        invalid.setdefault(name, []).append((_moment(first, lowest, end), _moment(last + 1, lowest, end)))
    names = [name for name, _ in ROLLUPS]
    return cut(ROLLUPS[names.index(source) :], start, end, invalid)


def cut(
    rollups: Sequence[tuple[str, timedelta]], start: datetime, end: datetime, invalid: Mapping[str, Sequence[Span]]
) -> list[Stretch]:
    """Cut a range by the invalid spans of each rollup; what is invalid in a finer one is so in the coarser."""
    if not rollups:
        return [Stretch(RAW, start, end)]
    (name, width), finer = rollups[0], rollups[1:]
    spans = [span for rollup, _ in rollups for span in invalid.get(rollup, ())]
    found: list[Stretch] = []
    at = start
    for first, last in _holes(spans, width, start, end):
        if at < first:
            found.append(Stretch(name, at, first))
        found += cut(finer, first, last, invalid)
        at = last
    if at < end:
        found.append(Stretch(name, at, end))
    return found


def _holes(spans: Sequence[Span], width: timedelta, start: datetime, end: datetime) -> list[Span]:
    """The spans widened to whole buckets, clipped to the range, joined where they touch, and few."""
    holes: list[Span] = []
    for first, last in sorted(spans):
        low = max(start, first - (first - EPOCH) % width)
        high = min(end, last + (EPOCH - last) % width)
        if low >= high:
            continue
        if holes and low <= holes[-1][1]:
            holes[-1] = (holes[-1][0], max(holes[-1][1], high))
        else:
            holes.append((low, high))
    while len(holes) > _MOST_HOLES:
        nearest = min(range(len(holes) - 1), key=lambda i: holes[i + 1][0] - holes[i][1])
        holes[nearest : nearest + 2] = [(holes[nearest][0], holes[nearest + 1][1])]
    return holes


def _moment(value: int, lowest: datetime, highest: datetime) -> datetime:
    """A catalog value within the bounds; the catalog's infinities lie outside of the calendar."""
    if value <= microseconds(lowest):
        return lowest
    if value >= microseconds(highest):
        return highest
    return floor(1000 * value)
