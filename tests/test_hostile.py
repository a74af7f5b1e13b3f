"""The attacks of `make hostile`, small: whatever is sent, the service answers in words, goes on, and loses nothing.

How long others wait beside an attack is for `make hostile` to say. A seed is in the figures of a report that fails;
`python -m tests.hostile --seed` repeats what was random.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import random_symbol
from tests.hostile import bodies, connections, faults, fuzzing, requests
from tests.hostile.striking import Attack, strike

SEED = random.SystemRandom().randrange(10_000)


def named(attacks: Sequence[Attack], *names: str) -> list[Attack]:
    found = [attack for attack in attacks if attack.name in names]
    assert len(found) == len(names)
    return found


@pytest.fixture
def directory(shared_dir: Path) -> Path:
    made = shared_dir / f"hostile-{random_symbol()}"
    made.mkdir()
    return made


SHORT = [
    *named(
        bodies.ATTACKS, "numbers that end processes", "each field in each form", "each field of each type",
        "broken off", "mislabelled",
    ),
    *named(requests.ATTACKS, "framing and upgrades", "every parameter"),
    *named(connections.ATTACKS, "clients that go"),
    *fuzzing.ATTACKS,
]  # fmt: skip


async def test_no_client_stops_the_service(directory: Path) -> None:
    report = await strike(directory, SHORT, scale=0.01, seed=SEED, timed=False)
    assert not report.broken, report


async def test_a_database_whose_replies_are_lost_is_told_of_and_comes_back(directory: Path) -> None:
    report = await faults.before_database("replies dropped", directory, 0.1, SEED, timed=False)
    assert not report.broken, report
