"""What a process keeps of memory that it needs no more, and bounds on one that reads bodies for another.

Invariant: while foreign code makes something of a body, it gets little more than the body may become.
"""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from app.errors import BodyTooLarge

#: As malloc.h numbers them.
_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD: Final = -1
#: What is being built is moved as it grows.
_TIMES: Final = 2


def keep_little() -> None:
    """Let large pieces of memory go back to the system as soon as they are free.

    Left to itself glibc keeps pieces of up to 32 MB once it has seen some of that size, in a heap for each thread that
    a small piece at its end keeps from shrinking. Other libraries of C have no such settings, and need none.
    """
    if (tune := _libc("mallopt")) is not None:
        for setting, value in ((_MMAP_THRESHOLD, 2**20), (_TRIM_THRESHOLD, 4 * 2**20)):
            tune(setting, value)


def give_back() -> None:
    """Give back what is free in small pieces; takes some milliseconds, without the interpreter's lock."""
    pa.default_memory_pool().release_unused()
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def _libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)


def confine(nbytes: int) -> None:
    """Let this process take so much more memory, and be the first to go where a machine or a container has none.

    Only Linux counts all that a process may write to, and tells how much that is.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        limit = _taken() + nbytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextmanager
def for_a_body_of(nbytes: int) -> Iterator[None]:
    """While a body becomes so many bytes at most, give a confined process twice as much, and no more.

    Raises:
        BodyTooLarge: it took more.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if most != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_DATA, (min(_taken() + _TIMES * nbytes, most), most))
        yield
    except MemoryError as error:
        raise BodyTooLarge.beyond(nbytes) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _taken() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * resource.getpagesize()
