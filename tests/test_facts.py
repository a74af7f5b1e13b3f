"""The settings of the store: what they let in, and what they say of a process that was told otherwise."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from app.db.facts import Facts, midnight, next_midnight
from app.settings import Settings

DAY = timedelta(days=1)
#: Not a midnight.
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
MIDNIGHT = datetime(2026, 11, 20, tzinfo=UTC)


def facts(
    retention: timedelta | None = None, chunk_interval: timedelta = DAY, dropped_before: datetime | None = None
) -> Facts:
    return Facts(retention, chunk_interval, 30 * DAY, dropped_before)


@pytest.mark.parametrize(
    ("given", "now", "oldest"),
    [
        (facts(), NOON, None),
        # Two days after the edge is noon of the 12th, of which the next midnight counts.
        (facts(10 * DAY), NOON, datetime(2026, 11, 13, tzinfo=UTC)),
        (facts(10 * DAY), MIDNIGHT, datetime(2026, 11, 12, tzinfo=UTC)),
        (facts(10 * DAY), MIDNIGHT + timedelta(microseconds=1), datetime(2026, 11, 13, tzinfo=UTC)),
        (facts(10 * DAY, timedelta(hours=1)), MIDNIGHT, datetime(2026, 11, 12, tzinfo=UTC)),
        (facts(30 * DAY, 7 * DAY), MIDNIGHT, datetime(2026, 11, 4, tzinfo=UTC)),
        (facts(None, dropped_before=MIDNIGHT - 50 * DAY), NOON, MIDNIGHT - 50 * DAY),
        (facts(10 * DAY, dropped_before=MIDNIGHT - 50 * DAY), MIDNIGHT, MIDNIGHT - 8 * DAY),
        (facts(10 * DAY, dropped_before=MIDNIGHT - 3 * DAY), MIDNIGHT, MIDNIGHT - 3 * DAY),
    ],
)
def test_the_oldest_quote_that_is_taken(given: Facts, now: datetime, oldest: datetime | None) -> None:
    assert given.oldest(now) == oldest


def test_retention_ends_on_a_midnight_of_utc() -> None:
    assert facts().cutoff(NOON) is None
    assert facts(10 * DAY).cutoff(NOON) == MIDNIGHT - 10 * DAY
    assert facts(10 * DAY).cutoff(MIDNIGHT) == MIDNIGHT - 10 * DAY
    in_tokyo = (MIDNIGHT - timedelta(hours=1)).astimezone(timezone(timedelta(hours=9)))
    assert (midnight(in_tokyo), next_midnight(in_tokyo)) == (MIDNIGHT - DAY, MIDNIGHT)
    assert next_midnight(MIDNIGHT) == MIDNIGHT


def test_a_process_is_told_only_what_it_was_told_itself() -> None:
    """A default is nobody's word."""
    stored = facts(90 * DAY)
    assert stored.differences(Settings(_env_file=None)) == []
    told = Settings(_env_file=None, retention="90 days", chunk_interval="90 minutes")
    assert [str(one) for one in stored.differences(told)] == [
        "QUOTES_CHUNK_INTERVAL is 90 minutes and the store's is 1 day"
    ]
