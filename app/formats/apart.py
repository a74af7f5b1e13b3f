"""Bodies that are large, or of a format that foreign code reads, are read in processes of their own.

An error in Arrow's readers ends the process that it happens in, and whatever holds the interpreter holds the event
loop. Here that is a reader, which is forked when the first such body comes, and ends with the service, however that
ends. The kernel bounds its memory and its time.

Invariant: whatever becomes of a reader, its body is answered: with a refusal where the body is to blame, and with a 503
where it was not the body.
"""

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from io import BufferedReader, BytesIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa
import structlog

from app import errors, metrics
from app.errors import BodyTooLarge, InvalidQuotes, MalformedBody, QuotesError, ReaderUnavailable, ServiceStopping
from app.formats import nursery
from app.formats.memory import give_back
from app.formats.nursery import NUMBER, Answer, Task
from app.quote.batch import Batch
from app.quote.rules import Checks
from app.quote.terms import Limits, Terms

log = structlog.get_logger(__name__)

#: Seconds of the processor for each row that a body may have, and for any body. Rows that have to be looked at closely
#: take 20 us each.
_SECONDS_PER_ROW: Final = 100e-6
_SECONDS: Final = 2.0
#: Under load a reader has this part of a processor at least; one that seems to have less stands still.
_SHARE: Final = 1 / 3
#: Seconds that a reader may take at least, and the nursery to start, for which it imports for 0.5 s, and to answer.
_PATIENCE: Final = 30.0
#: Bytes of memory for each byte, and for each row, that a body may have: its own, and what a hundred thousand rows of
#: JSON take until they are columns, 85 MB.
_BYTES_PER_BYTE: Final = 1
_BYTES_PER_ROW: Final = 900
_PROGRAM: Final = "from app.formats.nursery import main; main()"
#: What the nursery sees of the environment. Arrow's own allocator takes a gigabyte of addresses at once, which would
#: count; that of the system gives each large piece back at once, and to get it again costs 5 % of the time to read a
#: body. And threads would not be there after a fork.
_ENVIRONMENT: Final = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONTZPATH")


class _Unpickler(pickle.Unpickler):
    """Builds answers, and nothing else: they come from where hostile bytes were read."""

    _TAKEN: Final = {
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            Answer, Batch, Checks, Decimal, Limits, Terms, datetime, timedelta, timezone,
            nursery.column, nursery.record_batch,
        )
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """What an answer may name."""
        if module == errors.__name__:
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, QuotesError):
                return kind
        if (module, name) not in self._TAKEN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an answer")
        return self._TAKEN[module, name]


def _load(content: bytes, buffers: Sequence[Any]) -> Any:
    return _Unpickler(BytesIO(content), buffers=buffers).load()


def _take(stream: BufferedReader, size: int) -> pa.Buffer:
    buffer = pa.allocate_buffer(size)
    if size and stream.readinto(buffer) < size:
        raise EOFError
    return buffer


class _Reader:
    """A process that reads bodies, one after another."""

    def __init__(self, pid: int, connection: socket.socket, nursery_: "_Nursery") -> None:
        self.pid = pid
        self.nursery = nursery_
        self.cpu_seconds = 0.0
        #: Whether nobody has asked it for anything since the last `Apart.rest`.
        self.rested = False
        #: Whether it has the body that it was asked about.
        self.taken = False
        self._connection = connection
        self._stream = connection.makefile("rb")

    def give(self, task: Task, within: float) -> None:
        """Give it a body; it has all of it when this returns, and for what it does then it has so many seconds.

        Raises:
            TimeoutError: it has not taken it in that time.
            EOFError, OSError: it has ended.
        """
        self.taken = self.rested = False
        self._connection.settimeout(within)
        nursery.send(self._connection, task)
        nursery.exactly(self._stream, len(nursery.TAKEN))
        self.taken = True

    def answer(self) -> Answer:
        """What became of the body.

        Raises:
            TimeoutError: it has not answered in time.
            EOFError, OSError: it has ended.
            Exception: it has answered with something else.
        """
        answer = nursery.receive(self._stream, _load, _take)
        if not isinstance(answer, Answer):
            raise pickle.UnpicklingError("this is no answer")
        return answer

    def lives(self) -> bool:
        """Whether it waits for a body."""
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        return not waiting.poll(0)

    def close(self) -> None:
        """Let go of it."""
        self._stream.close()
        self._connection.close()


class _Nursery:
    """The process that forks readers. One that does not answer is no longer asked."""

    def __init__(self, memory: int) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_PATIENCE)
        paths = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603  our own program
                    [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), str(memory)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                    env={**environment, **_ENVIRONMENT, "PYTHONPATH": paths}, pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for the service
                )  # fmt: skip
        except OSError:
            self._control.close()
            raise

    def fork(self) -> _Reader:
        """Another reader.

        Raises:
            EOFError, OSError: it cannot be had.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [bytes(NUMBER.size)], [theirs.fileno()])
            return _Reader(self._answer(), ours, self)
        except (EOFError, OSError):
            ours.close()
            raise

    def end(self, pid: int) -> int:
        """End a reader and tell how it ended: its status, or the negative number of the signal.

        Raises:
            EOFError, OSError: the nursery is gone.
        """
        self._control.sendall(NUMBER.pack(pid))
        return self._answer()

    def _answer(self) -> int:
        found = self._control.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(found) < NUMBER.size:
            raise EOFError
        number: int = NUMBER.unpack(found)[0]
        return number

    def close(self) -> None:
        """End it, with all readers."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not reaped before, so that the group is its own
        self._process.wait()
        self._control.close()


class Apart:
    """Reads bodies in processes of their own, as many at once as threads ask for it."""

    def __init__(self, max_body_bytes: int, max_batch_rows: int) -> None:
        self._memory = _BYTES_PER_BYTE * max_body_bytes + _BYTES_PER_ROW * max_batch_rows
        self._idle: list[_Reader] = []
        self._nursery: _Nursery | None = None
        self._one_at_a_time = Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        with self._one_at_a_time:
            self._drop_nursery()
        with suppress(IndexError):
            while True:
                self._end(self._idle.pop())

    def decode(self, name: str, body: bytes | bytearray, terms: Terms, *, tried: bool = False) -> Batch:
        """The batch of a body in the format of that name. Blocks; may be called from several threads.

        A bytearray is empty as soon as a reader has what was in it, so that nothing is held twice for long. `tried`
        says that `Format.quick` was.

        Raises:
            QuotesError: as the format's own decoder.
            BodyTooLarge: reading it took too much memory, or too long.
            MalformedBody: its reader broke down over it.
            ReaderUnavailable: there is no reader, or it was ended from outside.
            ServiceStopping: the service stops.
        """
        seconds = max(_SECONDS, _SECONDS_PER_ROW * terms.limits.max_rows)
        within = max(seconds / _SHARE, _PATIENCE)
        again = True
        while True:
            reader = self._reader()
            try:
                reader.give(Task(name, pickle.PickleBuffer(body), terms, seconds, tried), within)
                if isinstance(body, bytearray):
                    body.clear()
                answer = reader.answer()
                break
            except Exception as error:
                refusal = self._refusal(reader, name, seconds, error)
                # It ended before it had the body: as one that was killed while it waited for one.
                killed = isinstance(refusal, ReaderUnavailable) and not isinstance(error, TimeoutError)
                if reader.taken or not (killed and again):
                    raise refusal from error
                again = False
        metrics.READER_CPU.inc(max(answer.cpu_seconds - reader.cpu_seconds, 0))
        reader.cpu_seconds = answer.cpu_seconds
        if answer.grown or self._closed:
            self._end(reader)
        else:
            self._idle.append(reader)
        rejections = nursery.rejections_of(answer.rejections)
        if answer.batch is not None:
            answer.batch.rejected = rejections
            return answer.batch
        if answer.refusal is None:
            log.error("a body could not be read", format=name, trace=answer.fault)
            raise _broken()
        kind, arguments, content = answer.refusal
        refusal = kind.__new__(kind, *arguments)
        vars(refusal).update(content)
        if isinstance(refusal, InvalidQuotes):
            refusal.rejections = rejections
        raise refusal

    def rest(self) -> bool:
        """Give back memory that is free, and end the readers that nobody has needed since the last time.

        Whether there are others, for which it is worth while to ask again in a few seconds. Blocks for milliseconds.
        """
        kept = []
        with suppress(IndexError):
            while True:
                reader = self._idle.pop()
                if reader.rested or self._closed:
                    self._end(reader)
                else:
                    reader.rested = True
                    kept.append(reader)
        self._idle += kept
        give_back()
        return bool(kept)

    def _reader(self) -> _Reader:
        with suppress(IndexError):
            while True:
                reader = self._idle.pop()
                if reader.lives():
                    return reader
                self._end(reader)
        with self._one_at_a_time:
            try:
                if self._nursery is not None:
                    with suppress(EOFError, OSError):
                        return self._counted(self._nursery.fork())
                    self._drop_nursery()
                if self._closed:
                    raise _stopping()
                self._nursery = _Nursery(self._memory)
                return self._counted(self._nursery.fork())
            except (EOFError, OSError) as error:
                self._drop_nursery()
                log.error("no reader can be started", error=repr(error))  # noqa: TRY400  one line, however often it is
                raise ReaderUnavailable("No process could be started to read this body; try again later.") from error

    def _counted(self, reader: _Reader) -> _Reader:
        metrics.READERS.inc()
        return reader

    def _drop_nursery(self) -> None:
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def _end(self, reader: _Reader) -> int | None:
        """End a reader and tell how it ended; None if nobody knows."""
        reader.close()
        metrics.READERS.dec()
        with self._one_at_a_time:
            if reader.nursery is self._nursery:  # by now the number may be of any process otherwise
                with suppress(EOFError, OSError):
                    return self._nursery.end(reader.pid)
                self._drop_nursery()
        return None

    def _refusal(self, reader: _Reader, name: str, seconds: float, error: Exception) -> QuotesError:
        """What to answer for a body whose reader did not."""
        status = self._end(reader)
        if self._closed:
            return _stopping()
        log.warning("a reader ended", format=name, status=status, error=repr(error))
        if status == -signal.SIGPROF:
            metrics.READER_ENDS.labels("time").inc()
            return BodyTooLarge(f"To read this body takes more than {seconds:.0f} s of work; send smaller batches.")
        if isinstance(error, (EOFError, OSError)) and status in {None, -signal.SIGKILL}:
            metrics.READER_ENDS.labels("killed").inc()
            how = "was stopped" if isinstance(error, TimeoutError) else "was ended from outside"
            return ReaderUnavailable(f"The process that read this body {how}; try again.")
        metrics.READER_ENDS.labels("crash").inc()
        return _broken()


def _broken() -> MalformedBody:
    return MalformedBody("The body is damaged, or uses what is not read here: its reader broke down over it.")


def _stopping() -> ServiceStopping:
    return ServiceStopping("The service stopped before these quotes were read.")
