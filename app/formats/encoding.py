"""Content encodings: gzip and zstd, decompressed while the body arrives.

Invariant: of a body little more than its limit is ever held decompressed, whatever it claims to be.
"""

import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Final

from app.errors import BodyTooLarge, MalformedBody, UnsupportedEncoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Bytes taken in and given out at a time; a part that ends gives back the rest of what it took.
_TAKEN: Final = 16 * 1024
_GIVEN: Final = 64 * 1024
#: Members of gzip or frames of zstd in one body. Blocked gzip has one for each 64 kB; to begin one takes 0.1 ms.
_PARTS: Final = 2000
#: 8 MB, the largest window of the content encoding (RFC 9659); it is kept beside the body.
_WINDOW_LOG: Final = 23


class _Member:
    """One member of a gzip stream, with the interface of a zstd frame."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        self.needs_input = not self._inflate.unconsumed_tail and len(found) < max_length
        return found

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


_Part = _Member | zstd.ZstdDecompressor


def _frame() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


#: How each encoding begins, and the bytes that it may hold beside what it has given.
_ENCODINGS: Final[Mapping[str, tuple[Callable[[], _Part], int]]] = {
    "gzip": (_Member, 64 * 1024),
    "x-gzip": (_Member, 64 * 1024),
    "zstd": (_frame, 2**_WINDOW_LOG),
}


class Inflater:
    """Decompresses one body as it arrives: members of gzip or frames of zstd, one after another."""

    def __init__(self, begin: Callable[[], _Part], window: int, limit: int, add: Callable[[bytes], None]) -> None:
        #: Bytes that it may hold beside what has come out.
        self.window = window
        self._begin = begin
        self._part = begin()
        self._parts = 1
        self._limit = limit
        self._waiting = memoryview(b"")
        self._add = add
        #: Bytes that have come out.
        self.size = 0

    def feed(self, data: bytes = b"", *, most: int, parts: bool = False) -> bool:
        """Decompress the next bytes of the body, until about `most` have come out; of one part, or of several `parts`.

        True if they are used up; otherwise call again without data, and with `parts`, before the next ones.

        Raises:
            BodyTooLarge: the body has become longer than the limit.
            MalformedBody: it is not encoded as it says.
        """
        if data:
            self._waiting = memoryview(data)
        stop = self.size + most
        while self.size < stop:
            if not parts and self._part.eof and (self._part.unused_data or self._waiting):
                return False
            taken = self._part.unused_data if self._part.eof else b""
            if not taken and (self._part.eof or self._part.needs_input):
                taken, self._waiting = bytes(self._waiting[:_TAKEN]), self._waiting[_TAKEN:]
                if not taken:
                    return True
            if self._part.eof:
                self._part = self._begin()
                self._parts += 1
            self._inflate(taken)
        return False

    def _inflate(self, taken: bytes) -> None:
        try:
            found = self._part.decompress(taken, _GIVEN)
        except (zlib.error, zstd.ZstdError) as error:
            raise MalformedBody("The body is not compressed as it says, or with a window above 8 MB.") from error
        self.size += len(found)
        if self.size > self._limit:
            raise BodyTooLarge.beyond(self._limit)
        if self._parts > _PARTS:
            raise MalformedBody(f"The compressed body has more than {_PARTS} parts.")
        if found:
            self._add(found)

    def finish(self) -> None:
        """See that the body is whole.

        Raises:
            MalformedBody: its end is missing.
        """
        if not self._part.eof:
            raise MalformedBody("The compressed body breaks off.")


def inflater(content_encoding: str | None, limit: int, add: Callable[[bytes], None]) -> Inflater | None:
    """What decompresses a body with this header to at most `limit` bytes, and adds them up; None if it is not encoded.

    Raises:
        UnsupportedEncoding: it is encoded in another way, or more than once.
    """
    encoding = (content_encoding or "identity").strip().lower()
    if encoding in {"identity", ""}:
        return None
    if encoding not in _ENCODINGS:
        raise UnsupportedEncoding("A body is encoded once, as gzip or zstd, or not at all.", accepted="gzip, zstd")
    return Inflater(*_ENCODINGS[encoding], limit, add)
