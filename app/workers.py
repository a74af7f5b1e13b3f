"""The place of this process among the server's workers, what they know of each other, and the files of its metrics.

prometheus_client shares metrics between processes in one file for each process and kind of metric, and sums them up
at a scrape. By process id these files would pile up with every worker that dies, and the gauges of the dead would
count on. So a worker takes the lowest place that is free, by a lock that the kernel drops when it dies, and continues
the counters of whoever had it before. Invariant: there are never more files than there were workers at once, and no
counter goes back when a worker is replaced.
"""

import fcntl
import multiprocessing
import os
import signal
import threading
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Final

import structlog
from prometheus_client import values

from app.settings import metrics_directory

log = structlog.get_logger(__name__)

_directory: Final = metrics_directory()
_STARTED: Final = "started"
_REFUSED: Final = "refused"
_STOPPING: Final = "stopping"
_COUNT: Final = "count"


def _locked(file: Path) -> IO[bytes] | None:
    """The file, locked as long as it is open; None if another process has it."""
    lock = file.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


class _Place:
    """Names the place of the process that calls it, and takes one first where there is none, as after a fork."""

    def __init__(self) -> None:
        self._number = 0
        self._process: int | None = None
        self._lock: IO[bytes] | None = None

    def __call__(self) -> str:
        if self._process != os.getpid() and _directory is not None:
            self._take(_directory)
        return f"worker{self._number}"

    def _take(self, directory: Path) -> None:
        if self._lock is not None:
            self._lock.close()  # the parent's copy stays open, and with it the lock
        for number in count():
            lock = _locked(directory / f"worker{number}.lock")
            if lock is not None:
                self._number, self._lock, self._process = number, lock, os.getpid()
                break
        # What a gauge said of the process that is gone, it does not say of this one.
        clear_gauges()


_place: Final = _Place()
_leading: Final[list[IO[bytes]]] = []
_refused = threading.Event()


def share_metrics() -> None:
    """Make the metrics that are declared from now on use this process's place, where processes share them."""
    if _directory is not None:
        values.ValueClass = values.MultiProcessValue(_place)  # type: ignore[no-untyped-call]


def leads() -> bool:
    """Whether this process does what one worker does for all: whoever asked first, until it dies."""
    if _directory is not None and not _leading:
        lock = _locked(_directory / "leader.lock")
        if lock is None:
            return False
        _leading.append(lock)
    return True


def announce(directory: Path, number: int) -> None:
    """Tell the processes that share a directory how many they are."""
    (directory / _COUNT).write_text(str(number))


def number() -> int:
    """How many processes this service has."""
    return 1 if _directory is None else int((_directory / _COUNT).read_text())


def note_started() -> None:
    """Note that a process of this service has started: what is set is right, and one that cannot start may later."""
    if _directory is not None:
        (_directory / _STARTED).touch()


def has_started(directory: Path | None = _directory) -> bool:
    """Whether a process of this service, which may be gone by now, has started; False where there is but one."""
    return directory is not None and (directory / _STARTED).exists()


def note_refused() -> None:
    """Note that this process cannot start, and that another start will not mend that."""
    _refused.set()
    if _directory is not None:
        (_directory / _REFUSED).touch()


def was_refused(directory: Path | None) -> bool:
    """Whether this process, or one of those that share a directory, has noted so."""
    return _refused.is_set() or (directory is not None and (directory / _REFUSED).exists())


def note_stopping(directory: Path) -> None:
    """Note that all processes that share a directory stop."""
    (directory / _STOPPING).touch()


def others_stay(directory: Path | None = _directory) -> bool:
    """Whether others of this service serve on when this process stops, as when it is replaced."""
    return directory is not None and not (directory / _STOPPING).exists()


def clear_gauges() -> None:
    """Take the gauges of this place out of what is scraped, because a process began here or is about to end."""
    if _directory is not None:
        for file in _directory.glob(f"gauge_*_{_place()}.db"):
            file.unlink(missing_ok=True)


def end_with_parent() -> None:
    """Let this process stop as at SIGTERM when the one that began it is gone, which nobody else would tell it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        log.error("the parent process has gone; stopping")
        if _directory is not None and _directory.exists():
            note_stopping(_directory)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
