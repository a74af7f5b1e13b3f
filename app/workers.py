"""The place of this process among the server's workers, and the files of its metrics.

prometheus_client shares metrics between processes in one file for each process and kind of metric, and sums them up
at a scrape. By process id these files would pile up with every worker that dies, and the gauges of the dead would
count on. So a worker takes the lowest place that is free, by a lock that the kernel drops when it dies, and continues
the counters of whoever had it before. Invariant: there are never more files than there were workers at once, and no
counter goes back when a worker is replaced.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from prometheus_client import values

from app.settings import metrics_directory

_directory: Final = metrics_directory()


class _Place:
    """Names the place of the process that calls it, and takes one first where there is none, as after a fork."""

    def __init__(self) -> None:
        self.number = 0
        self._process: int | None = None
        self._lock: IO[bytes] | None = None

    def __call__(self) -> str:
        if self._process != os.getpid():
            self._take()
        return f"worker{self.number}"

    def _take(self) -> None:
        if _directory is None:
            return
        if self._lock is not None:
            self._lock.close()  # the parent's copy stays open, and with it the lock
        for number, lock in _free_places(_directory):
            # What a gauge said of the process that is gone, it does not say of this one.
            clear_gauges(number)
            self.number, self._lock, self._process = number, lock, os.getpid()
            return


def _free_places(directory: Path) -> Iterator[tuple[int, IO[bytes]]]:
    """Places that nobody holds, locked as they are found."""
    number = 0
    while True:
        lock = (directory / f"worker{number}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            yield number, lock
        number += 1


_place: Final = _Place()
_held: Final[dict[str, IO[bytes]]] = {}


def share_metrics() -> None:
    """Make the metrics that are declared from now on use this process's place, where processes share them."""
    if _directory is not None:
        values.ValueClass = values.MultiProcessValue(_place)  # type: ignore[no-untyped-call]


def leads() -> bool:
    """Whether this process does what one worker does for all: whoever asked first, until it dies."""
    if _directory is None or "leader" in _held:
        return True
    lock = (_directory / "leader.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return False
    _held["leader"] = lock
    return True


def clear_gauges(number: int | None = None) -> None:
    """Take the gauges of a place out of what is scraped; by default those of this process, which is about to end."""
    if _directory is not None:
        for file in _directory.glob(f"gauge_*_worker{_place.number if number is None else number}.db"):
            with suppress(FileNotFoundError):
                file.unlink()
