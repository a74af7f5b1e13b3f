"""The scenarios of `make chaos`, small: kill -9 of each kind, the control that must lose, exactly once, a hard stop.

A seed is in the figures of a report that fails; `python -m tests.chaos kills --seed` repeats what was random.
"""

import random
from pathlib import Path

import pytest

from tests.chaos import kills, repeats, stops, workers
from tests.conftest import random_symbol

SEED = random.SystemRandom().randrange(10_000)


@pytest.fixture
def directory(shared_dir: Path) -> Path:
    made = shared_dir / f"chaos-{random_symbol()}"
    made.mkdir()
    return made


@pytest.mark.parametrize(
    ("victims", "times"),
    [(("service", "worker", "embedded"), 1), (("database",), 2), (("worker and database",), 1)],
    ids=["own", "native", "both"],
)
async def test_kill_9_loses_nothing_that_was_acknowledged(
    directory: Path, victims: tuple[kills.Victim, ...], times: int
) -> None:
    report = await kills.kills(victims, directory, times=times, rows=50_000, seed=SEED, workers=2)
    assert not report.broken, report


async def test_what_is_lost_is_found(directory: Path) -> None:
    report = await kills.control(directory, seed=SEED)
    assert not report.broken, report


async def test_what_is_sent_again_counts_once(directory: Path) -> None:
    report = await repeats.repeats(directory, operations=1_000, kills=1, seed=SEED)
    assert not report.broken, report


async def test_a_service_that_is_stopped_answers_writes_that_wait_for_a_lock(directory: Path) -> None:
    report = await stops.stop_under_lock(directory, drain=1.0)
    assert not report.broken, report


@pytest.mark.long
async def test_workers_come_and_go_and_the_service_stays_ready(directory: Path) -> None:
    report = await workers.workers(directory, rounds=1, seed=SEED)
    assert not report.broken, report
