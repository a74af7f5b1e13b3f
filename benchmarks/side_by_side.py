"""Runs in turns, and their figures.

What is compared runs in turns within one process on one machine, A B C, B C A, …, so that a noisy neighbour meets
all alike. A ratio is taken within each round, between neighbours in time; what is shown is the median of the rounds
with the lowest and the highest of them.
"""

import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

T = TypeVar("T")

QUANTILES: Final = (0.5, 0.95, 0.99)


class BenchmarkError(Exception):
    """Why nothing can be measured, in one sentence."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Lowest, median and highest figure of the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of one figure a round."""
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.low)} to {figure(self.high)})"


def figure(value: float) -> str:
    """A figure to about three digits, never with an exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """How many times `to` each figure is, round by round."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def verdict(value: float, floor: float, aim: float) -> str:
    """What a figure of which more is better has reached."""
    return "aim reached" if value >= aim else "floor kept" if value >= floor else "missed"


async def alternate(
    contenders: Mapping[str, Callable[[], Awaitable[T]]],
    rounds: int,
    announce: Callable[[str], None],
    warm_up: int = 1,
) -> dict[str, list[T]]:
    """Run all contenders once a round, each round beginning with another one; results without the warm-up."""
    names = list(contenders)
    results: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            announce(f"{'warm-up' if turn < 0 else f'round {turn + 1} of {rounds}'}: {name}")
            result = await contenders[name]()
            if turn >= 0:
                results[name].append(result)
    return results


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table for the terminal and for a document; the first column is text, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> Table:
        """The table for a terminal."""
        table = Table(
            title=self.title,
            caption="\n".join(self.notes),
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table for a document."""
        lines = [
            f"### {self.title}",
            "",
            _line(self.columns),
            _line(["---", *["---:"] * (len(self.columns) - 1)]),
            *map(_line, self.rows),
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def machine() -> dict[str, str]:
    """What the figures depend on, as far as the machine tells."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load before (1, 5, 15 min)": load,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command(module: str, *, hide: Sequence[str] = ()) -> str:
    """The command that repeats this run; the values of the options in `hide` are left out."""
    words = [
        f"<{before[2:]}>" if before in hide else word for before, word in zip(sys.argv, sys.argv[1:], strict=False)
    ]
    text = " ".join(word if word.startswith("<") else shlex.quote(word) for word in words)
    return f"python -m {module} {text}".strip()
