"""Bounds on the memory of this process, where it is one that reads bodies for another.

Invariant: while foreign code makes something of a body, it gets little more than the body may become.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from app.errors import BodyTooLarge

#: What is being built is moved as it grows.
_TIMES: Final = 2


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
