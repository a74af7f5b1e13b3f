"""What a scenario found: figures for people and programs, and the promises that were not kept."""

import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """This machine cannot run the scenario; the message says why."""


@dataclass(slots=True)
class Report:
    """One scenario, run once; it passed where `broken` is empty."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    def require(self, kept: bool, otherwise: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.broken.append(otherwise)


def spread(values: Sequence[float]) -> str:
    """Least, middle and greatest."""
    if not values:
        return "none"
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that PostgreSQL's user may enter, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="opa-quotes-chaos-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
