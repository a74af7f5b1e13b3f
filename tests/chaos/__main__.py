"""`make chaos`: run scenarios, print what they found, and exit with 1 if a promise was not kept."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.chaos import deadlines, disk, failover, kills, maintenance, repeats, stops
from tests.chaos.reporting import Report, Skipped, scratch

Scenario = Callable[[Path, float, int], Awaitable[Report]]
#: No scenario may take longer, in seconds at full size.
_LONGEST: Final = 1800.0


def _at_least(least: int, full: int, scale: float) -> int:
    return max(least, round(full * scale))


async def _kills(victim: kills.Victim, directory: Path, scale: float, seed: int) -> Report:
    times, rows = _at_least(2, 20, scale), _at_least(50_000, 1_000_000, scale)
    return await kills.kills([victim], directory, times=times, rows=rows, seed=seed)


async def _repeats(directory: Path, scale: float, seed: int) -> Report:
    operations, times = _at_least(2_000, 100_000, scale), _at_least(1, 10, scale)
    return await repeats.repeats(directory, operations=operations, kills=times, seed=seed)


async def _deadlines(fault: deadlines.Fault, directory: Path, scale: float, _: int) -> Report:
    return await deadlines.deadlines(directory, fault, seconds=_at_least(6, 30, scale))


async def _maintenance(directory: Path, scale: float, seed: int) -> Report:
    rounds, hold = _at_least(3, 5, scale), max(8, 40 * scale)
    return await maintenance.maintained(directory, rounds=rounds, seconds=max(5, 20 * scale), hold=hold, seed=seed)


PARTS: Final[dict[str, list[Scenario]]] = {
    "kills": [partial(_kills, victim) for victim in kills.VICTIMS],
    "control": [lambda directory, _, seed: kills.control(directory, seed=seed)],
    "repeats": [_repeats],
    "stops": [
        lambda directory, scale, _: stops.rolling(directory, times=_at_least(2, 20, scale)),
        lambda directory, scale, _: stops.rolling(directory, times=_at_least(2, 20, scale), workers=2),
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


async def _run(scenario: Scenario, name: str, scale: float, seed: int) -> Report:
    with scratch() as directory:
        try:
            async with asyncio.timeout(_LONGEST):
                return await scenario(directory, scale, seed)
        except Skipped as reason:
            return Report(name, skipped=str(reason))
        except TimeoutError:
            return Report(name, broken=[f"it did not end within {_LONGEST:g} s"])
        except Exception as error:
            return Report(name, broken=[f"{type(error).__name__}: {error}"])


async def _all(chosen: list[str], scale: float, seed: int, screen: Console) -> list[Report]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    reports = []
    for name in chosen:
        for scenario in PARTS[name]:
            with screen.status(name):
                reports.append(await _run(scenario, name, scale, seed))
            for sentence in [_outcome(reports[-1]), reports[-1].skipped, *reports[-1].broken]:
                if sentence:
                    screen.print(f"{reports[-1].name}: {escape(sentence)}", highlight=False, soft_wrap=True)
    return reports


def _outcome(report: Report) -> str:
    return "skipped" if report.skipped else f"BROKEN, {len(report.broken)}" if report.broken else "kept"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(number)}" for name, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(PARTS)}; all unless given.")] = None,
    *,
    scale: Annotated[float, typer.Option(min=0.001, envvar="CHAOS_SCALE", help="Part of the full size.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of what is random.", show_default="the time")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Break what can break while quotes are written, and compare what was acknowledged with what is stored."""
    if unknown := sorted({*(parts or ())} - {*PARTS}):
        raise typer.BadParameter(f"There is no part {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    seed = int(time.time()) % 100_000 if seed is None else seed
    try:
        reports = asyncio.run(_all(parts or [*PARTS], scale, seed, Console(stderr=True)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
    table = Table("scenario", "outcome", "figures", show_lines=True)
    for report in reports:
        figures = "\n".join(f"{name}: {_cell(value)}" for name, value in report.figures.items())
        table.add_row(report.name, _outcome(report), escape(figures or report.skipped))
    Console().print(table)
    if json_file is not None:
        document = {"seed": seed, "scale": scale, "scenarios": [asdict(report) for report in reports]}
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(any(report.broken for report in reports))


if __name__ == "__main__":
    typer.run(main)
