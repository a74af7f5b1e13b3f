"""The processes that are killed, frozen and started again: services, and PostgreSQL servers of their own.

Invariant: whatever was started here has ended when its context is left, also what a killed parent left behind.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import asyncpg
import httpx

from app.db.embedded import Server, _Cluster, _service_user
from app.errors import StartupError

_ROOT: Final = Path(__file__).parents[2]
_READY_TIMEOUT: Final = 120.0
#: The longest that a service may take to end: its grace for requests, then the drain of its queue, and some.
_STOP_TIMEOUT: Final = 60.0
#: States of /proc/net/tcp.
_ESTABLISHED, _LISTENING = "01", "0A"
#: A directory of PostgreSQL's programs that has TimescaleDB, instead of those of the wheel.
PROGRAMS: Final = os.environ.get("CHAOS_PG_BIN", "")
#: Variables of a service whose log would be long.
QUIET: Final = {"QUOTES_LOG_LEVEL": "WARNING", "QUOTES_MONITOR_INTERVAL": "0 s"}


class NotReady(Exception):
    """A process did not come up in time."""


def signal_to(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to the processes that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that still are its children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name may hold spaces and parentheses; the parent is the second field behind it.
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _files(pid: int) -> dict[str, str]:
    """What a process has open, by the number of the file."""
    found = {}
    for file in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            found[file.name] = str(file.readlink())
    return found


def _waits_for(pid: int, sockets: set[str]) -> bool:
    """Whether the event loop of a process looks at one of the sockets."""
    files = _files(pid)
    wanted = {number for number, target in files.items() if target in sockets}
    watched: set[str] = set()
    for number in (number for number, target in files.items() if target == "anon_inode:[eventpoll]"):
        with suppress(OSError):
            watched.update(re.findall(r"^tfd:\s+(\d+)", Path(f"/proc/{pid}/fdinfo/{number}").read_text(), re.MULTILINE))
    return bool(wanted & watched)


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_gone(pids: Sequence[int], timeout: float = 30) -> None:
    """Return when none of the processes is left.

    Raises:
        NotReady: some are.
    """
    deadline = time.monotonic() + timeout
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise NotReady(f"processes {pids} do not end")
        time.sleep(0.02)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postmaster_of(data: Path) -> int | None:
    """The process of the server that runs on a data directory, if one does."""
    with suppress(OSError, ValueError, IndexError):
        pid = int((data / "postmaster.pid").read_text().split()[0])
        return pid if _alive(pid) and str(data) in _command(pid) else None
    return None


@dataclass
class Service:
    """`python -m app serve` on one port, over any number of starts. Without a database URL it has an embedded one."""

    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    log_directory: Path | None = None  # that of its data, unless given
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What all its starts logged."""
        return (self.log_directory or self.directory) / f"service-{self.port}.log"

    @property
    def pid(self) -> int:
        """The process that was started last."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it; it is not ready yet."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "app", "serve", "--port", str(self.port), "--workers", str(self.workers),
                    "--data-dir", str(self.directory / "data"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                env={**{k: v for k, v in os.environ.items() if not k.startswith("QUOTES_")}, **self.environment},
            )  # fmt: skip

    def wait_ready(self, timeout: float = _READY_TIMEOUT) -> None:
        """Return when it takes quotes.

        Raises:
            NotReady: it ended, or does not within `timeout` seconds.
        """
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise NotReady(f"the service ended with {self.process.returncode}:\n{self.tail()}")
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(0.05)
        raise NotReady(f"the service is not ready:\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def worker_pids(self) -> list[int]:
        """The server processes below it."""
        return [pid for pid in children(self.pid) if "spawn_main" in _command(pid)]

    def busy_worker_pids(self) -> list[int]:
        """Those that have a connection with a client."""
        connected = self._sockets(_ESTABLISHED)
        return [pid for pid in self.worker_pids() if connected & {*_files(pid).values()}]

    def serving_pids(self) -> list[int]:
        """Those that wait for connections; one that is still starting has the socket, but does not."""
        listening = self._sockets(_LISTENING)
        return [pid for pid in self.worker_pids() if _waits_for(pid, listening)]

    def _sockets(self, state: str) -> set[str]:
        """The sockets of its port in a state of the kernel's."""
        found = set()
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and int(fields[1].rpartition(":")[2], 16) == self.port:
                found.add(f"socket:[{fields[9]}]")
        return found

    def postmaster(self) -> int | None:
        """The process of its embedded server."""
        return postmaster_of(self.directory / "data" / "pgdata")

    def kill(self) -> None:
        """End it and its workers as a power cut would; the embedded server stays behind."""
        pids = [self.pid, *self.worker_pids()]
        signal_to(pids, signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        wait_gone(pids)

    def stop(self) -> float:
        """Ask it to end, and wait; how many seconds it took.

        Raises:
            NotReady: it did not, and was killed.
        """
        assert self.process is not None
        began = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NotReady(f"the service did not end within {_STOP_TIMEOUT:g} s") from None
        return time.monotonic() - began

    def end(self) -> None:
        """Leave nothing behind."""
        if self.process is not None and self.process.poll() is None:
            with suppress(NotReady):
                self.stop()
        if (left := self.postmaster()) is not None:
            signal_to([left], signal.SIGQUIT)
            wait_gone([left])


@dataclass
class Postgres:
    """A PostgreSQL server of our own, which a supervisor of our own starts again.

    Its programs are those of CHAOS_PG_BIN, else of the wheel.
    """

    cluster: _Cluster
    complete: bool = False  # whether its database has been created

    @classmethod
    def create(cls, directory: Path, **configuration: str) -> "Postgres":
        """Initialise a server on a new directory; it does not run yet."""
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        if PROGRAMS:
            user = _service_user(directory / "pgdata") if os.geteuid() == 0 else None
            server = Server(Path(PROGRAMS), 18, timescaledb=True)
            cluster = _Cluster(server, directory / "pgdata", directory / "run", user)
            cluster.give(cluster.socket)
            cluster.initialise()
        else:
            cluster = _Cluster.prepare(directory)
        self = cls(cluster)
        self.configure(**configuration)
        return self

    def standby(self, directory: Path, name: str) -> "Postgres":
        """A copy that follows this server under a name; it does not run yet."""
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        copy = Postgres(replace(self.cluster, data=directory / "pgdata", socket=directory / "run"), complete=True)
        for path in (copy.cluster.data, copy.cluster.socket):
            copy.cluster.give(path)
        source = ("-h", str(self.cluster.socket), "-U", "quotes")
        copy.cluster.run("pg_basebackup", "--write-recovery-conf", "--checkpoint=fast", "--no-sync", *source)
        copy.cluster.configure()
        copy.follow(self, name)
        return copy

    def follow(self, primary: "Postgres", name: str) -> None:
        """Follow another server from the next start or reload on."""
        conninfo = f"host={primary.cluster.socket} user=quotes application_name={name}"
        with (self.cluster.data / "postgresql.auto.conf").open("a") as config:
            config.write(f"primary_conninfo = '{conninfo}'\n")

    def promote(self) -> None:
        """Make a standby a primary."""
        self.cluster.run("pg_ctl", "promote", "--wait")

    @property
    def timescaledb(self) -> bool:
        """Whether it is a community server."""
        return self.cluster.server.timescaledb

    @property
    def url(self) -> str:
        """Its database."""
        return f"postgresql://quotes@/quotes?host={self.cluster.socket}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a service that uses it."""
        return {"QUOTES_DATABASE_URL": self.url, "QUOTES_REQUIRE_TIMESCALEDB": "none", "QUOTES_RETENTION": "none"}

    def configure(self, **configuration: str) -> None:
        """Set configuration that counts from the next start."""
        with (self.cluster.data / "postgresql.conf").open("a") as config:
            config.writelines(f"{name} = '{value}'\n" for name, value in configuration.items())

    def start(self, timeout: float = 60) -> None:
        """Start it, as often as it takes until what a killed one left behind has gone."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.cluster.run("pg_ctl", "start", "--wait", f"--log={self.cluster.data / 'start.log'}")
                break
            except StartupError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        if not self.complete:
            self.cluster.run("createdb", "-h", str(self.cluster.socket), "-U", "quotes", "quotes", data=False)
            self.complete = True

    def processes(self) -> list[int]:
        """The postmaster, then its children."""
        postmaster = postmaster_of(self.cluster.data)
        return [] if postmaster is None else [postmaster, *children(postmaster)]

    def kill(self) -> None:
        """End all of it at once, so that nobody writes out what others have left in shared memory."""
        pids = self.freeze()
        signal_to(pids, signal.SIGKILL)
        wait_gone(pids)

    def freeze(self) -> list[int]:
        """Stop all of it in mid-step; the processes, for `thaw`."""
        signal_to(self.processes()[:1], signal.SIGSTOP)  # the one that starts others goes first
        pids = self.processes()
        signal_to(pids, signal.SIGSTOP)
        return pids

    def end(self) -> None:
        """Leave nothing behind."""
        pids = self.processes()
        signal_to(pids, signal.SIGCONT)
        signal_to(pids[:1], signal.SIGQUIT)
        wait_gone(pids)

    async def execute(self, *statements: str) -> object:
        """Run statements, each in a transaction of its own; the first value of the last one."""
        connection = await asyncpg.connect(self.url, timeout=10)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            value: object = await connection.fetchval(statements[-1])
            return value
        finally:
            await connection.close(timeout=5)


def thaw(pids: Sequence[int]) -> None:
    """Let frozen processes go on."""
    signal_to(pids, signal.SIGCONT)


@contextmanager
def ended(victim: Service | Postgres) -> Iterator[None]:
    """End a victim afterwards."""
    try:
        yield
    finally:
        victim.end()
