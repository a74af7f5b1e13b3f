"""The processes of `app.formats.apart`: a nursery, which forks readers, and the readers.

The nursery imports what a reader needs, once; a fork of it takes 4 ms and shares its memory. Neither holds a secret:
they see nothing of the service's environment, files and connections.

Invariant: a reader answers each body with a batch or a refusal, or it ends. The kernel sees to it that it takes no more
memory and no more of the processor than it was given.
"""

import copyreg
import gc
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedReader, BytesIO
from typing import Any, Final, NamedTuple

import msgspec
import pyarrow as pa

from app.errors import BodyTooLarge, QuotesError, Rejection
from app.formats import FORMATS
from app.formats.memory import confine
from app.quote.batch import Batch
from app.quote.terms import Terms

#: Before a message: the bytes of its pickle, and how many buffers follow, each with its own bytes.
_HEAD: Final = struct.Struct("<QQ")
#: What is asked of the nursery, and what it answers: the number of a process, or how one has ended.
NUMBER: Final = struct.Struct("<q")
#: A reader that has taken this much more memory than a fresh one is replaced, so that it all comes back.
_GROWN: Final = 64 * 2**20


#: A reader says so when it has the whole body: before that, its end has nothing to do with the body.
TAKEN: Final = b"\1"
#: Rejections in one piece of an answer. To make objects of one keeps all threads of the service waiting for 0.3 ms.
_AT_ONCE: Final = 1000
_Pieces = list[bytes]


class Task(NamedTuple):
    """A body to be read, and the seconds of the processor that it may take; whether `Format.quick` was tried."""

    format: str
    body: pickle.PickleBuffer | bytes
    terms: Terms
    seconds: float
    tried: bool = False


class Answer(NamedTuple):
    """What became of a body: a batch, or the class and the content of what refuses it, or the trace of our own fault.

    `rejections` are those of the batch or the refusal in pieces, as there may be as many as rows. `cpu_seconds` is what
    the reader has taken since it began, and `grown` asks for another one next time.
    """

    batch: Batch | None
    refusal: tuple[type[QuotesError], tuple[Any, ...], dict[str, Any]] | None
    rejections: _Pieces
    fault: str
    cpu_seconds: float
    grown: bool


# --- messages ---


def _of_record_batch(batch: pa.RecordBatch) -> tuple[Any, ...]:
    """As one of Arrow's messages: one buffer for all, without what slices leave out."""
    return record_batch, (batch.schema.serialize().to_pybytes(), pickle.PickleBuffer(batch.serialize()))


def _of_column(array: pa.Array) -> tuple[Any, ...]:
    return column, (pa.record_batch([array], names=[""]),)


#: How some classes are written; those of data in a third of the time of their own way.
_WRITTEN: Final[dict[type, Callable[[Any], tuple[Any, ...]]]] = {
    pa.RecordBatch: _of_record_batch,
    pa.Int32Array: _of_column,
}


def record_batch(schema: bytes, content: pa.Buffer) -> pa.RecordBatch:
    """The record batch of a message."""
    return pa.ipc.read_record_batch(content, pa.ipc.read_schema(pa.py_buffer(schema)))


def column(batch: pa.RecordBatch) -> pa.Array:
    """The only column."""
    return batch.column(0)


def pieces_of(rejections: Sequence[Rejection]) -> _Pieces:
    """Rejections as they are sent."""
    return [
        msgspec.msgpack.encode(rejections[start : start + _AT_ONCE]) for start in range(0, len(rejections), _AT_ONCE)
    ]


def rejections_of(pieces: _Pieces) -> list[Rejection]:
    """Rejections that were sent."""
    found: list[Rejection] = []
    for piece in pieces:
        found += _REJECTIONS.decode(piece)
    return found


_REJECTIONS: Final = msgspec.msgpack.Decoder(list[Rejection])


def send(connection: socket.socket, value: Any) -> None:
    """Send a message.

    Raises:
        OSError: the other end is gone, or does not take it in time.
    """
    found: list[pickle.PickleBuffer] = []
    content = BytesIO()
    pickler = pickle.Pickler(content, 5, buffer_callback=found.append)
    pickler.dispatch_table = {**copyreg.dispatch_table, **_WRITTEN}
    pickler.dump(value)
    buffers = [buffer.raw() for buffer in found]
    head = _HEAD.pack(content.tell(), len(buffers)) + struct.pack(f"<{len(buffers)}Q", *(b.nbytes for b in buffers))
    connection.sendall(head + content.getvalue())
    for buffer in buffers:
        connection.sendall(buffer)


def receive(
    stream: BufferedReader, load: Callable[[bytes, Sequence[Any]], Any], take: Callable[[BufferedReader, int], Any]
) -> Any:
    """The next message; `take` reads each of its buffers.

    Raises:
        EOFError: there is none, or only a part.
        OSError: it does not come in time.
    """
    length, count = _HEAD.unpack(exactly(stream, _HEAD.size))
    sizes = struct.unpack(f"<{count}Q", exactly(stream, 8 * count))
    content = exactly(stream, length)
    return load(content, [take(stream, size) for size in sizes])


def exactly(stream: BufferedReader, size: int) -> bytes:
    """The next bytes.

    Raises:
        EOFError: there are fewer.
    """
    found = stream.read(size)
    if len(found) < size:
        raise EOFError
    return found


# --- a reader ---


def serve(connection: socket.socket, memory: int) -> None:
    """Read bodies until nobody can send one any more."""
    fresh = _most_memory()
    with connection, connection.makefile("rb") as stream, suppress(EOFError, OSError):
        while True:
            task = receive(stream, _load, exactly)
            connection.sendall(TAKEN)
            signal.setitimer(signal.ITIMER_PROF, task.seconds)  # the kernel ends the process then
            try:
                answer = _read(task)
                del task
                send(connection, answer._replace(grown=_most_memory() > fresh + _GROWN))
            except MemoryError:  # before anything was sent
                large = BodyTooLarge(
                    f"To read this body takes more than {memory >> 20} MiB of memory; send smaller batches."
                )
                send(connection, Answer(None, _content(large), [], "", time.thread_time(), grown=True))
            signal.setitimer(signal.ITIMER_PROF, 0)


def _load(content: bytes, buffers: Sequence[Any]) -> Any:
    return pickle.loads(content, buffers=buffers)  # noqa: S301  of the service


def _read(task: Task) -> Answer:
    batch, refusal, fault = None, None, ""
    rejections: list[Rejection] = []
    try:
        batch = FORMATS[task.format].decode(bytes(task.body), task.terms, tried=task.tried)
        rejections, batch.rejected = batch.rejected, []
    except QuotesError as error:
        refusal = _content(error)
        rejections = refusal[2].pop("rejections", [])
    except MemoryError:
        raise
    except Exception:
        fault = traceback.format_exc()
    return Answer(batch, refusal, pieces_of(rejections), fault, time.thread_time(), grown=False)


def _content(error: QuotesError) -> tuple[type[QuotesError], tuple[Any, ...], dict[str, Any]]:
    return type(error), error.args, dict(vars(error))


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- the nursery ---


def main() -> None:
    """Fork a reader for each connection that is sent, and end those that are named, until nobody asks any more."""
    control, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        # A supervisor sends these to all processes of the service, which has bodies to be read until it ends.
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a body that ends a reader does not fill the disk
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    with suppress(OSError):
        while True:
            asked, connections, _, _ = socket.recv_fds(control, NUMBER.size, 1)
            if not asked:
                break
            if connections:
                reader = os.fork()
                if not reader:
                    try:
                        control.close()
                        confine(memory)
                        serve(socket.socket(fileno=connections[0]), memory)
                    finally:
                        os._exit(1)
                os.close(connections[0])
                control.sendall(NUMBER.pack(reader))
            else:
                (reader,) = NUMBER.unpack(asked)
                os.kill(reader, signal.SIGKILL)  # not reaped before, so that it is nobody else's number
                control.sendall(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])))
    os.killpg(0, signal.SIGKILL)
