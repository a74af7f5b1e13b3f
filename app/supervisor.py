"""The processes of the server: one, or a parent and its workers on one socket.

Invariant: the port is known to be free before anything else is begun; workers end with their parent; whoever lives
stays while another one cannot start; and the status is 0 only for a server that was told to stop.
"""

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from app.errors import StartupError
from app.logs import Logger
from app.workers import has_started, note_stopping, was_refused

log = Logger(__name__)

#: Status of a start that fails again until somebody changes something, as for a setting that is wrong.
REFUSED: Final = 2
#: Seconds in which a worker answers that it is there.
_ANSWER: Final = 5
#: Seconds that a new worker has until it serves: more than a migration waits for its lock and takes.
_READY: Final = 90
#: Seconds between two attempts to start a worker that could not.
_PAUSE: Final = 1.0
#: Open files: every connection there may be, and what else is open.
_FILES: Final = 16_384


def check_port(host: str, port: int) -> None:
    """See that a server could listen there.

    Raises:
        StartupError: another process listens there, or nobody can.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise StartupError(
            f"The service cannot listen at --host {host} --port {port}: {error.strerror or error}."
        ) from error


def notify(state: str) -> None:
    """Tell systemd, or another that began this service and asked for it, by the protocol of sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A name that begins with @ is not one of a file. Whoever has gone need not be told.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line, suppress(OSError):
        line.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def _allow_files() -> None:
    """Take the file descriptors that there are for connections: many systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(config: uvicorn.Config, directory: Path | None) -> None:
    """Serve until told to stop; several workers share `directory`. Ends the process unless that was the reason."""
    _allow_files()
    if directory is None:
        told = _run_one(config)
    else:
        workers = _Workers(config, [config.bind_socket()], directory)
        workers.run()
        told = workers.told
    if not told:
        sys.exit(REFUSED if was_refused(directory) else STARTUP_FAILURE)


def _run_one(config: uvicorn.Config) -> bool:
    """Serve in this process; whether it was told to stop, after it has served or while it was about to."""
    server = _Server(config)
    # The server raises the signal again that has stopped it. Whoever asked for no hang-up (nohup) gets none.
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        server.run()
    except KeyboardInterrupt:  # as the server has handled it
        return True
    except SystemExit as end:
        return not end.code or server.should_exit  # a start that was given up is none that failed
    return server.started


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  as handlers are called
    sys.exit(0)


class _Server(uvicorn.Server):
    """One process, which says when it serves and when it stops."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            notify("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        notify("STOPPING=1")
        await super().shutdown(sockets)


class _Workers(Multiprocess):
    """uvicorn's supervisor, with what it lacks: see the module."""

    def __init__(self, config: uvicorn.Config, sockets: Sequence[socket.socket], directory: Path) -> None:
        super().__init__(config, list(sockets))
        self.told = False
        self._directory = directory
        self._resume = 0.0
        self._serves = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  as handlers are called
        # At once, since a restart of all workers waits for this and nothing else.
        self.told = True
        self.should_exit.set()

    def terminate_all(self) -> None:
        """Tell the workers to stop; what they listen at no more, nobody does."""
        notify("STOPPING=1")
        note_stopping(self._directory)
        for shared in self.sockets:
            shared.close()
        super().terminate_all()

    def restart_all(self) -> None:
        """Replace the workers one by one, each when its successor serves."""
        self.config.timeout_worker_healthcheck = _READY
        try:
            super().restart_all()
        finally:
            self.config.timeout_worker_healthcheck = _ANSWER

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have gone or hang; stop if none has ever started and one says that it cannot."""
        if not self._serves and has_started(self._directory):
            self._serves = True
            notify("READY=1")
        for place, process in enumerate(self.processes):
            if self.should_exit.is_set() or time.monotonic() < self._resume:
                return
            if process.is_alive(_ANSWER):
                continue
            process.kill()
            process.join()
            failed = process.exitcode == STARTUP_FAILURE
            if failed and not has_started(self._directory):
                self.should_exit.set()
                return
            if failed:
                self._resume = time.monotonic() + _PAUSE
            log.warning("a worker has gone", process=process.pid, status=process.exitcode)
            self.processes[place] = Process(self.config, self.sockets)
            self.processes[place].start()
