"""PostgreSQL's client programs: the one that fits a server, and a run of it.

Invariant: a password reaches a program through its environment, never on its command line, and no program older than
the server is run. What a program says of its failure becomes one sentence. Whoever is cancelled stops his program.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from app.db import embedded
from app.errors import BackupError

#: Where packages put the programs of each major version, beside what is on the PATH.
_PLACES: Final = (
    ("/usr/lib/postgresql", "*/bin"),
    ("/usr", "pgsql-*/bin"),
    ("/opt/homebrew/opt", "postgresql@*/bin"),
)
_STOP_TIMEOUT: Final = 5.0
_CONNECT_TIMEOUT: Final = "10"


def find(name: str, major: int) -> Path:
    """The program for a server of that major version: of the same one where there is one, else of the next newer.

    Raises:
        BackupError: there is none, or only older ones, which refuse such a server.
    """
    found = {path: _major(path) for path in _candidates(name)}
    fitting = [(version, path) for path, version in found.items() if version >= major]
    if fitting:
        return min(fitting, key=lambda entry: entry[0])[1]
    newest = max(found.items(), key=lambda entry: entry[1], default=None)
    what = f"no {name} was found" if newest is None else f"the newest {name} found is of {newest[1]} ({newest[0]})"
    raise BackupError(f"The server is PostgreSQL {major}, and {what}: install postgresql-client-{major}.")


def _candidates(name: str) -> Iterator[Path]:
    directories = [embedded.wheel_programs(), *(Path(root).glob(places) for root, places in _PLACES)]
    on_path = shutil.which(name)
    if on_path is not None:
        yield Path(on_path)
    for directory in directories:
        for place in [directory] if isinstance(directory, Path) else directory or ():
            if os.access(place / name, os.X_OK):
                yield place / name


def _major(path: Path) -> int:
    """The major version that a program says it is of; 0 where it says none."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r"\b(\d+)(?:\.\d+|devel|beta|rc)", said)
    return int(version[1]) if version else 0


def without_password(url: str) -> tuple[str, str | None]:
    """A URL as it may be shown, and the password that it held."""
    parts = urlsplit(url)
    auth, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = auth.partition(":")
    query = parse_qsl(parts.query, keep_blank_values=True)
    hidden = [value for name, value in query if name == "password"]
    # Within the text, because a URL without a host would not come back from its parts.
    shown = url.replace(f"//{parts.netloc}", f"//{user}{at}{hosts}", 1)
    if query:
        # The driver reads a `+` as a space, PostgreSQL's programs as itself; of `%20` and `%2B` they think alike.
        kept = urlencode([(name, value) for name, value in query if name != "password"], safe="/", quote_via=quote)
        shown = shown.replace(f"?{parts.query}", f"?{kept}", 1)
    secret = unquote(password) if colon else hidden[-1] if hidden else None
    return shown, secret


async def run(program: Path, *arguments: str, url: str | None = None, keep_open: Sequence[int] = ()) -> str:
    """Run a program, against the database of `url` if there is one, and return what it printed.

    `keep_open` are file descriptors that the program holds open as long as it runs.

    Raises:
        BackupError: it failed; the sentence has its first error.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUOTES_")}
    environment |= {"LC_ALL": "C", "PGCONNECT_TIMEOUT": _CONNECT_TIMEOUT}
    if url is not None:
        shown, password = without_password(url)
        if password is not None:
            environment["PGPASSWORD"] = password
        arguments = ("--no-password", f"--dbname={shown}", *arguments)
    try:
        process = await asyncio.create_subprocess_exec(
            program, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, pass_fds=keep_open,
        )  # fmt: skip
    except OSError as error:
        raise BackupError(f"{program} cannot be run: {error.strerror}.") from error
    try:
        output, errors = await process.communicate()
    finally:
        await _stop(process)
    if process.returncode:
        raise BackupError(f"{program.name} {_reason(errors.decode(errors='replace'), process.returncode)}")
    return output.decode(errors="replace")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a program that still runs; at SIGTERM it cancels its statement on the server first."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _reason(errors: str, status: int) -> str:
    if status < 0:
        return f"was ended by signal {-status}."
    for line in errors.splitlines():
        _, found, message = line.partition("error: ")
        if found:
            return f"failed: {message.strip().rstrip('.')}."
    last = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
    return f"failed: {last[0].strip().rstrip('.')}."
