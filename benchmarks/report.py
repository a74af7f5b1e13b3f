"""From a measurement to what people read: progress while it runs, tables on the terminal and in files afterwards."""

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import asyncpg
import typer
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.errors import QuotesError
from benchmarks.side_by_side import BenchmarkError, Sheet, command, machine

DatabaseUrl = Annotated[
    str | None, typer.Option(help="Another server: a database is created on it, and dropped. Unset: a private one.")
]
Psql = Annotated[Path | None, typer.Option(help="The psql program.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for all figures.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="File for the tables.")]
#: Of the command that repeats a run.
_HIDDEN: Final = ("--database-url", "--psql", "--json", "--markdown", "--plot")


@dataclass(frozen=True, slots=True)
class Report:
    """What a part of a benchmark found: what it ran on, tables, and figures for a program to read."""

    about: dict[str, str]
    sheets: list[Sheet]
    figures: dict[str, Any]
    preface: str = ""


class Steps:
    """Progress by named steps; nothing is drawn between them, so that drawing disturbs no measurement."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._expected = 0

    def expect(self, steps: int) -> None:
        """More steps will come."""
        self._expected += steps
        self._progress.update(self._task, total=self._expected)

    def announce(self, text: str) -> None:
        """Show which step begins."""
        self._progress.update(self._task, advance=1, description=text)
        self._progress.refresh()

    def show(self, text: str) -> None:
        """Show how far the step is."""
        self._progress.update(self._task, description=text)
        self._progress.refresh()

    def say(self, text: str) -> None:
        """Leave a line."""
        self._progress.console.print(escape(text), highlight=False)


async def _measure(parts: Callable[[Steps], Sequence[Awaitable[Report]]], screen: Console) -> list[Report]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, auto_refresh=False, transient=True) as progress:
        return [await part for part in parts(Steps(progress))]


def run(
    module: str,
    parts: Callable[[Steps], Sequence[Awaitable[Report]]],
    json_file: Path | None,
    markdown_file: Path | None,
) -> list[Report]:
    """Measure the parts one after the other and publish what they found; exit with one sentence if that fails."""
    screen = Console(stderr=True)
    about = machine()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            reports = runner.run(_measure(parts, screen))
    except (BenchmarkError, QuotesError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        screen.print("[red]error:[/red]", escape(getattr(error, "detail", None) or str(error)), highlight=False)
        sys.exit(1)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    repeat = command(module, hide=_HIDDEN)
    about |= reports[-1].about
    _print(about, reports)
    if markdown_file is not None:
        blocks = [f"```\n{repeat}\n```", "\n".join(f"- {name}: {value}" for name, value in about.items())]
        for report in reports:
            blocks += [report.preface] if report.preface else []
            blocks += [sheet.markdown().rstrip() for sheet in report.sheets]
        markdown_file.write_text("\n\n".join(blocks) + "\n")
    if json_file is not None:
        figures = {"command": repeat, "about": about, "parts": [report.figures for report in reports]}
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    return reports


def _print(about: dict[str, str], reports: Sequence[Report]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 140
    for name, value in about.items():
        console.print(f"[bold]{name}[/bold]: {value}", highlight=False)
    for report in reports:
        if report.preface:
            console.print(f"\n{escape(report.preface)}", highlight=False)
        for sheet in report.sheets:
            console.print()
            console.print(sheet.rich())
