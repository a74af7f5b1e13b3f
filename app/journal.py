"""What need not be done again of one load: its state file and its reject file, held by one process at a time.

Invariant: the state counts a prefix of the file whose rows are all committed or listed in the reject file, and names
the requests after it whose outcome is not known. It is written before a request is sent and after its receipt is
there, so that whenever the process dies, the same requests can be sent again under the same keys.
"""

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Final, Self
from uuid import uuid4

import msgspec

from app.client import Totals
from app.clock import rfc3339
from app.lines import Unreadable
from app.quote.terms import Receipt

_REJECTION: Final = b'{"row":'

Natural = Annotated[int, msgspec.Meta(ge=0)]
#: The rows of a request: those after the first number, up to the second.
Range = tuple[Natural, Natural]


class Unwritable(Exception):
    """A state or reject file that cannot be kept; the message is for people."""


class State(msgspec.Struct, forbid_unknown_fields=True):
    """Which file was read in which way and stored where, and how far.

    `run` is new whenever a load begins anew; with the rows of a request it makes its idempotency key. Keys of the
    file alone would bring back the receipts of an earlier load whose quotes have been deleted since.
    """

    fingerprint: dict[str, int | str]
    meaning: dict[str, Any]
    store: str
    run: str
    rows: Natural
    sent: list[Range]
    rejects_bytes: Natural
    complete: bool
    totals: Totals

    @classmethod
    def new(cls, fingerprint: dict[str, int | str], meaning: dict[str, Any], store: str) -> Self:
        """That of a load that begins."""
        return cls(fingerprint, meaning, store, str(uuid4()), 0, [], 0, complete=False, totals=Totals())


class Journal:
    """The state and the rejects of one load.

    Raises:
        Unreadable: what is there is no state or reject file of this version.
        Unwritable: neither can be kept there, or another process does.
    """

    def __init__(self, state: Path, rejects: Path, fresh: State, *, resume: bool) -> None:
        self.rejects = rejects
        self._path = state
        self.state, self.note = self._recall(fresh, resume=resume)

    def _recall(self, fresh: State, *, resume: bool) -> tuple[State, str | None]:
        """The state to go on from, and what to tell people about it."""
        known = self._read()
        if known is None or not resume:
            return fresh, None
        if known.fingerprint != fresh.fingerprint:
            return fresh, "the file has changed since it was loaded; starting anew"
        if known.meaning != fresh.meaning:
            return fresh, "options have changed since it was loaded; starting anew"
        if known.store != fresh.store:
            return fresh, "it was loaded into another store, or this one has been restored since; starting anew"
        if known.complete and 0 < known.rows == known.totals.rejected:
            return fresh, "all its rows were refused before; starting anew"
        if not known.complete and self._rejected_bytes() < known.rejects_bytes:
            return fresh, "the reject file is gone; starting anew"
        return known, f"continuing after row {known.rows:,}" if known.rows and not known.complete else None

    def _read(self) -> State | None:
        for path in (self._path, self.rejects):
            if path.exists() and not path.is_file():
                raise Unreadable(f"{path} is no regular file, and nothing can be kept there")
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=State)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError:
            raise Unreadable(
                f"{self._path} is damaged, or no state file of this version; "
                "delete it to load the file from its beginning, or name another with --state"
            ) from None

    def _are_rejects(self) -> bool:
        with self.rejects.open("rb") as file:
            return file.read(len(_REJECTION)) == _REJECTION

    def _rejected_bytes(self) -> int:
        return self.rejects.stat().st_size if self.rejects.exists() else 0

    def open(self) -> None:
        """Forget rejects that the state does not know of, and see that the state can be written."""
        if self._rejected_bytes() and not self._are_rejects():
            raise Unreadable(f"{self.rejects} is no reject file, and would be overwritten; --rejects names another")
        with _writing(self.rejects):
            if self._rejected_bytes() > self.state.rejects_bytes:
                os.truncate(self.rejects, self.state.rejects_bytes)
        self._save(durable=True)

    def key(self, rows: Range) -> str:
        """The idempotency key of a request."""
        return f"{self.state.run}:{rows[0]}-{rows[1]}"

    def sending(self, rows: Range) -> None:
        """Note that the outcome of a request is not known from here on."""
        if rows not in self.state.sent:
            self.state.sent.append(rows)
            self._save()

    def refused(self, rows: Range) -> None:
        """Note that a request stored nothing, so that its rows may be cut in another way."""
        self.state.sent = [other for other in self.state.sent if other != rows]
        self._save()

    def acknowledge(self, end: int, rejections: bytes, receipt: Receipt, *, refused: int, numbered: int) -> None:
        """Note that all rows up to `end` are done with; `refused` of them were not sent, `numbered` moved."""
        if end <= self.state.rows:
            return
        if rejections:
            with _writing(self.rejects), self.rejects.open("ab") as file:
                file.write(rejections)  # before the state, which says how much of it counts
            self.state.rejects_bytes += len(rejections)
        self.state.rows = end
        self.state.sent = [rows for rows in self.state.sent if rows[1] > end]
        self.state.totals.add(receipt)
        self.state.totals.rejected += refused
        self.state.totals.numbered += numbered
        self._save()

    def complete(self) -> None:
        """Note that the end of the file has been reached."""
        if self.state.rejects_bytes:
            with _writing(self.rejects), self.rejects.open("ab") as file:
                os.fsync(file.fileno())
        self.state.complete = True
        self._save(durable=True)
        if not self.state.rejects_bytes:
            self.rejects.unlink(missing_ok=True)

    def _save(self, *, durable: bool = False) -> None:
        # msgspec writes the fields in a fixed order, indented because people look into it.
        text = msgspec.json.format(msgspec.json.encode(self.state), indent=2) + b"\n"
        temporary = self._path.with_name(f".{self._path.name}.new")
        try:
            with _writing(self._path):
                with temporary.open("wb") as file:
                    file.write(text)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
                temporary.replace(self._path)
        except Unwritable:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def held(paths: Sequence[Path]) -> Iterator[None]:
    """Hold files against other loads until the block, or the process, ends.

    Raises:
        Unwritable: another load holds one of them, or nothing can be written beside it.
    """
    with ExitStack() as stack:
        for path in paths:
            lock, file = _hold(path)
            stack.enter_context(file)
            stack.callback(lock.unlink, missing_ok=True)  # before it is closed
        yield


def _hold(path: Path) -> tuple[Path, IO[str]]:
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with _writing(path):
            file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise Unwritable(f"another load is at it: {file.read().strip() or 'it has just begun'}") from None
        except OSError as error:
            file.close()
            raise Unwritable(f"{lock} cannot be locked: {error.strerror}") from error
        # Whoever held it before may have deleted it since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                break
        file.close()
    with _writing(lock):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {rfc3339(datetime.now(UTC))}")
        file.flush()
    return lock, file
