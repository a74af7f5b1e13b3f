"""PgBouncer before a database, for tests: Debian's, as it is unless told otherwise but for its `pool_mode`."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest

from grafana.build import ROOT
from tests.conftest import free_port

#: Where the Makefile unpacks Debian's packages.
UNPACKED: Final = ROOT / ".venv" / "pgbouncer" / "usr"


def program() -> str:
    """PgBouncer; skips where it is missing, fails there on CI."""
    found = shutil.which("pgbouncer", path=f"{UNPACKED / 'sbin'}{os.pathsep}{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("pgbouncer is not installed")
        pytest.skip("pgbouncer is not installed")
    tried = subprocess.run([found, "--version"], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(
            f"pgbouncer does not run here: {tried.stderr.strip()}"
        )  # as where it was unpacked without libraries
    return found


def has_ipv6() -> bool:
    """Whether this machine has the loopback of IPv6."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def _wait_listening(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)


@contextmanager
def pgbouncer(
    directory: Path,
    url: str,
    mode: str,
    *,
    size: int = 40,
    password: str = "",
    options: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The URL of a database by way of PgBouncer, of which a user has so many sessions and perhaps a password."""
    command = program()
    directory.mkdir()
    directory.chmod(0o777)  # it runs as another user where this is root's
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    user = unquote(parts.username or "postgres")
    host, port = query.get("host") or parts.hostname or "localhost", query.get("port") or parts.port or 5432
    listen = free_port()
    quoted = password.replace('"', '""')
    (directory / "users.txt").write_text(f'"{user}" "{quoted}"\n')
    more = "".join(f"{name} = {value}\n" for name, value in (options or {}).items())
    (directory / "pgbouncer.ini").write_text(f"""\
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = {"127.0.0.1,::1" if has_ipv6() else "127.0.0.1"}
listen_port = {listen}
unix_socket_dir =
auth_type = {"scram-sha-256" if password else "trust"}
auth_file = {directory / "users.txt"}
pool_mode = {mode}
default_pool_size = {size}
{more}""")
    libraries = os.pathsep.join(map(str, (UNPACKED / "lib").glob("*")))
    # It does not run as root: as whoever may enter the directory of the server's socket, or as nobody.
    owner = Path(host).stat().st_uid if str(host).startswith("/") else pwd.getpwnam("nobody").pw_uid
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, "-q", str(directory / "pgbouncer.ini")],
            env={**os.environ, "LD_LIBRARY_PATH": f"{libraries}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"},
            stdout=log,
            stderr=subprocess.STDOUT,
            user=owner if os.geteuid() == 0 else None,
        )
    try:
        _wait_listening(process, listen, directory / "log")
        secret = f":{quote(password, safe='')}" if password else ""
        yield f"postgresql://{user}{secret}@127.0.0.1:{listen}{parts.path}"
    finally:
        process.terminate()
        process.wait(10)
