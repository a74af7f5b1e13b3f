"""An hour of every background job over moving data ends in success, and the bars are those of the quotes.

Invariant: each job runs as the scheduler runs it, by its own configuration, as often as it would in the hour; a server
that has a scheduler leaves it to the test.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from typing import Final

import pytest

from app.clock import nanoseconds
from app.db.capability import Level
from app.db.engine import Database
from app.db.migrate import migrate
from app.repository.quotes import QuoteRepository
from tests.conftest import Lane, patiently, random_symbol
from tests.test_differential import DAY, PRICES, Model, sent, stored_row, tuples, without_scheduler

STEPS: Final = 12
HOUR: Final = timedelta(hours=1)
JOBS: Final = """
SELECT j.job_id, j.schedule_interval, j.proc_name::text FROM timescaledb_information.jobs j
WHERE j.job_id >= 1000 ORDER BY j.schedule_interval, j.job_id
"""
FAILURES: Final = """
SELECT j.proc_name::text, s.last_run_status, s.total_failures FROM timescaledb_information.job_stats s
JOIN timescaledb_information.jobs j USING (job_id) WHERE j.job_id >= 1000 AND s.total_failures > 0
"""


@pytest.mark.timeout(600)
async def test_an_hour_of_jobs_succeeds(lane: Lane, empty_url: str) -> None:
    settings = lane.make_settings(retention="60 days", statement_timeout="60 seconds")
    await migrate(empty_url, settings)
    database = Database(empty_url, settings)
    await database.connect()
    try:
        if database.capability.level < Level.COMMUNITY:
            pytest.skip(f"the level of this lane is {database.capability.level}")
        async with database.dedicated() as connection:
            await without_scheduler(connection)
        quotes, model, symbol = QuoteRepository(database, settings), Model(), random_symbol()
        now = datetime.now(UTC)

        async def store(moments: list[datetime]) -> None:
            rows = []
            for i, at in enumerate(moments):
                price, instant = Decimal(1 + i % 50) / 8, nanoseconds(at)
                rows.append(stored_row(symbol, instant, price=price, volume=i % 7))
                rows.append(stored_row(symbol, instant + 1, bid=price, ask=price + 1 if i % 3 else None))
            await quotes.bulk_insert([sent(row) for row in rows])
            model.write(rows, "update")

        # Old enough for the columnstore and the edge of retention, new enough for the refreshes.
        await store([now - timedelta(days=57) + i * timedelta(hours=5, seconds=11) for i in range(57 * 4)])
        for step in range(STEPS):
            # Five minutes of the hour: new quotes, and one each behind every window.
            await store(
                [now - HOUR + step * HOUR / STEPS + timedelta(seconds=s) for s in range(0, 300, 20)]
                + [now - timedelta(days=days, seconds=step) for days in (1, 8, 35, 50)]
            )
            async with database.dedicated(statement_timeout=timedelta(minutes=5)) as connection:
                for job_id, every, _ in await connection.fetch(JOBS):
                    # As often as due in the hour; what is due less often than that, in its last step.
                    due = max(every, HOUR / STEPS) if every < HOUR else HOUR
                    if (step + 1) % round(due / (HOUR / STEPS)) == 0:
                        await patiently(connection, f"CALL run_job({job_id})")
        for (interval, width), price in product((("1m", timedelta(minutes=1)), ("1h", HOUR), ("1d", DAY)), PRICES):
            bars = await quotes.get_bars(symbol, interval, now - 70 * DAY, now + DAY, price=price, limit=100_000)
            assert tuples(bars) == model.bars(width, price), (interval, price)
        async with database.dedicated(statement_timeout=timedelta(minutes=1)) as connection:
            assert len(await connection.fetch(JOBS)) == 5
            compressed = await connection.fetchval(
                "SELECT count(*) FROM timescaledb_information.chunks"
                " WHERE hypertable_name = 'real_time' AND is_compressed"
            )
            assert compressed > 20
            assert [tuple(row) for row in await connection.fetch(FAILURES)] == []
            errors = await connection.fetch("SELECT job_id, err_message FROM timescaledb_information.job_errors")
            assert [tuple(row) for row in errors] == []
    finally:
        await database.close()
