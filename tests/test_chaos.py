"""The scenarios of `make chaos`, small: kill -9 of each kind, the control that must lose, exactly once."""

import random
from pathlib import Path

import pytest

from tests.chaos import kills, repeats
from tests.conftest import random_symbol

SEED = random.SystemRandom().randrange(10_000)


@pytest.fixture
def directory(shared_dir: Path) -> Path:
    made = shared_dir / f"chaos-{random_symbol()}"
    made.mkdir()
    return made


@pytest.mark.parametrize("victim", kills.VICTIMS)
async def test_kill_9_loses_nothing_that_was_acknowledged(directory: Path, victim: kills.Victim) -> None:
    report = await kills.kills(victim, directory, times=2, rows=50_000, seed=SEED)
    assert not report.broken, report


async def test_what_is_lost_is_found(directory: Path) -> None:
    report = await kills.control(directory, seed=SEED)
    assert not report.broken, report


async def test_what_is_sent_again_counts_once(directory: Path) -> None:
    report = await repeats.repeats(directory, operations=2_500, kills=1, seed=SEED)
    assert not report.broken, report
