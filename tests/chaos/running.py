"""Runs scenarios one after another, and prints what they found: `make chaos` and `make hostile`.

Invariant: a scenario that fails in any way is a report that says so, and the others go on.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.chaos.reporting import Report, Skipped, scratch

Scenario = Callable[[Path, float, int], Awaitable[Report]]
Parts = Mapping[str, Sequence[Scenario]]
#: No scenario may take longer, in seconds at full size.
_LONGEST: Final = 1800.0


def at_least(least: int, full: int, scale: float) -> int:
    """What is `full` at full size, scaled."""
    return max(least, round(full * scale))


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


async def _all(parts: Parts, chosen: Sequence[str], scale: float, seed: int, screen: Console) -> list[Report]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    reports = []
    for name in chosen:
        for scenario in parts[name]:
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


def run(parts: Parts, chosen: Sequence[str], scale: float, seed: int | None, json_file: Path | None) -> None:
    """Run the parts that are chosen, all if none is; exits with 1 if a promise was not kept."""
    if unknown := sorted({*chosen} - {*parts}):
        raise typer.BadParameter(f"There is no part {', '.join(unknown)}; there are {', '.join(parts)}.")
    seed = int(time.time()) % 100_000 if seed is None else seed
    try:
        reports = asyncio.run(_all(parts, chosen or [*parts], scale, seed, Console(stderr=True)))
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
