"""Cutting a range into stretches: nothing is lost, nothing twice, nothing read from where it is stale."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from app.repository.rollups import RAW, ROLLUPS, cut, stretches

DAY = datetime(2026, 11, 16, tzinfo=UTC)
WIDTHS = {**dict(ROLLUPS), RAW: timedelta(microseconds=1)}
moments = st.integers(0, 5 * 86_400_000).map(lambda ms: DAY + timedelta(milliseconds=ms))
spans = st.tuples(moments, st.integers(1, 10**8)).map(lambda s: (s[0], s[0] + timedelta(milliseconds=s[1])))


@given(
    st.integers(0, 2),
    moments,
    moments,
    st.dictionaries(st.sampled_from([name for name, _ in ROLLUPS]), st.lists(spans, max_size=12)),
)
def test_stretches_are_the_range_and_never_stale(
    level: int, one: datetime, other: datetime, invalid: dict[str, list[tuple[datetime, datetime]]]
) -> None:
    start, end = min(one, other), max(one, other) + timedelta(microseconds=1)
    rollups = ROLLUPS[level:]
    names = [name for name, _ in rollups]
    found = cut(rollups, start, end, invalid)
    assert found[0].start == start
    assert found[-1].end == end
    for before, after in pairwise(found):
        assert before.end == after.start
    for stretch in found:
        assert stretch.start < stretch.end
        width = WIDTHS[stretch.source]
        for bound, limit in ((stretch.start, start), (stretch.end, end)):
            assert bound == limit or (bound - DAY) % width == timedelta(0)
        if stretch.source != RAW:
            for name in names[names.index(stretch.source) :]:
                for first, last in invalid.get(name, []):
                    assert last <= stretch.start or first >= stretch.end


def test_without_holes_the_coarsest_rollup_is_read() -> None:
    (stretch,) = cut(ROLLUPS, DAY, DAY + timedelta(days=3), {})
    assert stretch.source == "ohlc_1d"


def test_a_late_quote_costs_its_minute() -> None:
    late = DAY + timedelta(days=1, hours=5, minutes=7, seconds=30)
    found = cut(ROLLUPS, DAY, DAY + timedelta(days=3), {"ohlc_1m": [(late, late + timedelta(microseconds=1))]})
    assert [s.source for s in found] == [
        "ohlc_1d", "ohlc_1h", "ohlc_1m", RAW, "ohlc_1m", "ohlc_1h", "ohlc_1d",
    ]  # fmt: skip
    assert found[3].end - found[3].start == timedelta(minutes=1)


class Catalog:
    """A connection whose catalog calls every rollup invalid from ever to ever, as before the first refresh."""

    async def fetch(self, _statement: str, first: int, last: int) -> list[tuple[str, int, int]]:
        assert first < last
        return [(name, -(2**63), 2**63 - 1) for name, _ in ROLLUPS]


async def test_below_the_floor_only_rollups_are_read() -> None:
    start, end = DAY - timedelta(days=30), DAY
    floor = DAY - timedelta(days=9, hours=5, minutes=1)
    for source, _ in ROLLUPS:
        found = await stretches(Catalog(), source, start, end, floor)  # type: ignore[arg-type]
        assert [(part.source, part.start, part.end) for part in found] == [
            (source, start, DAY - timedelta(days=9)),
            (RAW, DAY - timedelta(days=9), end),
        ]
        (below,) = await stretches(Catalog(), source, start, floor - timedelta(days=2), floor)  # type: ignore[arg-type]
        assert below.source == source
        (whole,) = await stretches(Catalog(), source, start, end, None)  # type: ignore[arg-type]
        assert whole.source == RAW
