"""One PostgreSQL server on one directory: started as a child, and ended with everything that it left behind.

Invariant: a signal goes to servers of this directory only, whatever number `postmaster.pid` holds: after a restart of
the machine it may be anybody's. A server is known by its command line, which any user may read.
"""

import hashlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Event, RLock
from typing import Any, Final

from app.errors import StartupError

#: What the server's programs see of the environment: nothing of the service's.
ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGTZ": "UTC", "PGCONNECT_TIMEOUT": "10"}
PORT: Final = 5432
_POLL: Final = 0.05
#: Fast, immediate, and by force, with the seconds that each may take; fast ends with a checkpoint.
_ENDING: Final = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))
#: Backends see in milliseconds that their postmaster is gone, but in the middle of a statement at its end only.
_ORPHAN_PATIENCE: Final = 1.0
#: PostgreSQL writes its log in segments of this size; with less room it cannot start.
_WAL_SEGMENT: Final = 16 * 2**20
_LOG_TAIL: Final = 2**16
_MESSAGE: Final = re.compile(r"\b(PANIC|FATAL|ERROR|LOG|error):\s+(.*)")
#: What clients are told while a server starts or stops is no reason why it does not.
_TOLD_TO_CLIENTS: Final = "the database system is "


def identity(user: pwd.struct_passwd | None) -> dict[str, Any]:
    """Arguments of `subprocess` that make a program run as a user."""
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def gist(text: str, *levels: str) -> str:
    """The last message of the given levels in what a server or its programs printed, in one line; "" if none."""
    messages = [match.groups() for line in text.splitlines() if (match := _MESSAGE.search(line))]
    for index in range(len(messages) - 1, -1, -1):
        level, message = messages[index]
        if level in levels and not message.startswith(_TOLD_TO_CLIENTS):
            if "contains errors" in message and index:  # the errors are in the messages before
                message = messages[index - 1][1]
            return str(message).strip().rstrip(".")
    return ""


class Postmaster:
    """The server on a directory, whoever started it. Methods block; they may be called from any thread."""

    def __init__(self, program: Path, data: Path, socket: Path, user: pwd.struct_passwd | None) -> None:
        self._program = program
        self._data = data
        self._locks = (data / "postmaster.pid", socket / f".s.PGSQL.{PORT}.lock")
        self._user = user
        self._child: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = RLock()
        self._logged: dict[Path, int] = {}  # bytes in each file of its log when it was started
        #: In the title of each of its processes, as the setting `cluster_name`.
        self.name = "opa-quotes-" + hashlib.blake2b(os.fsencode(data), digest_size=8).hexdigest()

    @property
    def pid(self) -> int | None:
        """Its process id; None if none runs."""
        if self._child is not None and self._child.poll() is None:
            return self._child.pid
        pid = _first_number(self._locks[0])
        return pid if self._serves(pid) else None

    def start(self, stopping: Event, timeout: float | None = None) -> None:
        """Start, and return when it takes connections. What is left of an earlier server is ended first.

        Raises:
            StartupError: it ended, needs longer than `timeout` seconds, or `stopping` was set.
            OSError: the directory cannot be written.
        """
        with self._one_at_a_time:
            self.stop()
            self._launch()
            began = time.monotonic()
            while not self._is_ready():
                if self._child is None or self._child.poll() is not None:
                    raise StartupError(f"PostgreSQL does not start on {self._data}: {self._reason()}.")
                if timeout is not None and time.monotonic() - began > timeout:
                    self.stop()
                    raise StartupError(f"PostgreSQL did not start on {self._data} within {timeout:.0f} s.")
                if stopping.wait(_POLL):
                    raise StartupError(f"PostgreSQL was stopped on {self._data} while it started.")

    def _launch(self) -> None:
        for lock in self._locks:
            # PostgreSQL refuses to start while the process that the file names lives, whatever it is.
            if _alive(_first_number(lock)):
                lock.unlink()
        self._logged = {file: file.stat().st_size for file in self._data.glob("log/*.log")}
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
        output = os.open(self._data / "start.log", flags, 0o600)
        try:
            if self._user is not None:  # a base backup reads every file of the directory
                os.fchown(output, self._user.pw_uid, self._user.pw_gid)
            self._child = subprocess.Popen(  # noqa: S603  program and arguments are our own
                [self._program, "-D", self._data],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for the service, which stops it last
                **identity(self._user),
            )
        finally:
            os.close(output)

    def _is_ready(self) -> bool:
        with suppress(OSError):
            lines = self._locks[0].read_text(encoding="utf-8", errors="replace").splitlines()
            return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"  # noqa: PLR2004  its last line
        return False

    def stop(self, *, immediately: bool = False) -> None:
        """Stop it and what it left behind, and wait: 50 s at most. Acknowledged transactions are on disk.

        Raises:
            StartupError: it cannot be ended.
        """
        with self._one_at_a_time:
            pid = self.pid
            for number, patience in _ENDING[immediately:]:
                if pid is None:
                    break
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)  # a process that was halted takes no other signal
                deadline = time.monotonic() + patience
                while pid is not None and time.monotonic() < deadline:
                    time.sleep(_POLL)
                    pid = self.pid
            if pid is not None:
                raise StartupError(f"PostgreSQL (process {pid}) cannot be ended.")
            self._end_orphans()

    def _end_orphans(self) -> None:
        """End processes that outlived their postmaster: the next one cannot start while they share its memory."""
        began = time.monotonic()
        while (orphans := self._orphans()) and (waited := time.monotonic() - began) < 5 * _ORPHAN_PATIENCE:
            if waited > _ORPHAN_PATIENCE:
                for orphan in orphans:
                    with suppress(ProcessLookupError):
                        os.kill(orphan, signal.SIGKILL)
            time.sleep(_POLL)

    def _orphans(self) -> list[int]:
        title = f"postgres: {self.name}: ".encode()
        processes = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return [pid for pid in processes if _command(pid)[0].startswith(title)]

    def ending(self) -> str:
        """How the server ended that was started last, in a few words."""
        status = None if self._child is None else self._child.poll()
        if status is None:
            return "it is gone"
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        reason = self._reason("PANIC")
        return f"it ended {how}" + (f": {reason}" if reason else "")

    def _reason(self, *levels: str) -> str:
        """What its log says of its end, of its last start on."""
        with suppress(OSError):
            if shutil.disk_usage(self._data).free < _WAL_SEGMENT:
                return f"no space is left on the volume of {self._data}"  # where nothing can be logged either
        log = self._data / "start.log"
        printed = _tail(log, 0)
        for file in sorted(self._data.glob("log/*.log")):
            printed += _tail(file, self._logged.get(file, 0))
        if levels:
            return gist(printed, *levels)
        last = (line for line in reversed(printed.splitlines()) if line.strip())
        return gist(printed, "PANIC", "FATAL") or next(last, f"it says nothing in {log}").strip().rstrip(".")

    def _serves(self, pid: int) -> bool:
        if not Path("/proc/self/cmdline").exists():
            return _alive(pid)  # without /proc no more can be known; `pg_ctl` trusts the file as much
        program, *arguments = _command(pid)
        given = [os.fsdecode(value) for flag, value in pairwise(arguments) if flag == b"-D"]
        return os.path.basename(program) == b"postgres" and os.path.realpath(self._data) in map(  # noqa: PTH119  bytes
            os.path.realpath, given
        )


def _first_number(file: Path) -> int:
    """The process id that a lock file begins with; 0 if it names no server."""
    with suppress(OSError, ValueError, IndexError):
        return max(int(file.read_bytes().split()[0]), 0)  # a negative one is no server, but a session of its own
    return 0


def _alive(pid: int) -> bool:
    if pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _command(pid: int) -> list[bytes]:
    """A process' command line, or the title that it gave itself; empty of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def _tail(file: Path, start: int) -> str:
    """The end of a file, of what comes after `start` bytes."""
    with suppress(OSError), file.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(start if start <= end else 0, end - _LOG_TAIL))
        return log.read().decode(errors="replace")
    return ""
