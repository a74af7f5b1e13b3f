"""`make chaos`: run scenarios, print what they found, and exit with 1 if a promise was not kept."""

from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from tests.chaos import deadlines, disk, failover, kills, maintenance, repeats, running, stops, workers
from tests.chaos.reporting import Report
from tests.chaos.running import Scenario, at_least


async def _kills(victim: kills.Victim, directory: Path, scale: float, seed: int) -> Report:
    times, rows = at_least(2, 20, scale), at_least(50_000, 1_000_000, scale)
    return await kills.kills([victim], directory, times=times, rows=rows, seed=seed)


async def _repeats(directory: Path, scale: float, seed: int) -> Report:
    operations, times = at_least(2_000, 100_000, scale), at_least(1, 10, scale)
    return await repeats.repeats(directory, operations=operations, kills=times, seed=seed)


async def _deadlines(fault: deadlines.Fault, directory: Path, scale: float, _: int) -> Report:
    return await deadlines.deadlines(directory, fault, seconds=at_least(6, 30, scale))


async def _maintenance(directory: Path, scale: float, seed: int) -> Report:
    rounds, hold = at_least(3, 5, scale), max(8, 40 * scale)
    return await maintenance.maintained(directory, rounds=rounds, seconds=max(5, 20 * scale), hold=hold, seed=seed)


PARTS: Final[dict[str, list[Scenario]]] = {
    "kills": [partial(_kills, victim) for victim in kills.VICTIMS],
    "workers": [lambda directory, scale, seed: workers.workers(directory, rounds=at_least(1, 5, scale), seed=seed)],
    "control": [lambda directory, _, seed: kills.control(directory, seed=seed)],
    "repeats": [_repeats],
    "stops": [
        lambda directory, scale, _: stops.rolling(directory, times=at_least(2, 20, scale)),
        lambda directory, scale, _: stops.rolling(directory, times=at_least(2, 20, scale), workers=2),
        lambda directory, *_: stops.stop_under_lock(directory),
        lambda directory, *_: stops.stop_under_lock(directory, workers=2),
    ],
    "maintenance": [_maintenance],
    "disk": [
        lambda directory, *_: disk.filled("embedded", directory),
        lambda directory, *_: disk.filled("database", directory),
        lambda directory, *_: disk.filled("embedded", directory, logs=True),
        lambda directory, *_: disk.filled("database", directory, logs=True),
    ],
    "failover": [
        lambda directory, *_: failover.failover(directory, "synchronous"),
        lambda directory, *_: failover.failover(directory, "asynchronous"),
    ],
    "deadlines": [partial(_deadlines, fault) for fault in deadlines.FAULTS],
}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(PARTS)}; all unless given.")] = None,
    *,
    scale: Annotated[float, typer.Option(min=0.001, envvar="CHAOS_SCALE", help="Part of the full size.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of what is random.", show_default="the time")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Break what can break while quotes are written, and compare what was acknowledged with what is stored."""
    running.run(PARTS, parts or (), scale, seed, json_file)


if __name__ == "__main__":
    typer.run(main)
