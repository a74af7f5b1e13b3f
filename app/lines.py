"""Lines of a text file as people have them: plain or in gzip, any line end, a byte order mark, another encoding.

Invariant: each line of the file is one line here, numbered from 1, and none runs on into the next, whatever quotes,
bytes or lengths it has. A line that is not the text of the file says so when its text is asked for.
"""

import gzip
import io
from collections.abc import Generator
from typing import IO, Final, Literal, NamedTuple

Encoding = Literal["utf-8", "utf-16", "latin-1", "cp1252"]

#: Longest line in characters, so that a file without line ends is not read into memory.
MAX_LINE: Final = 2**20
_SHOWN: Final = 1000  # characters of a line that a person is shown
_MARKS: Final = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
#: UTF-16 without a mark has the bytes in the order of all machines that are common.
_CODECS: Final[dict[Encoding, str]] = {
    "utf-8": "utf-8", "utf-16": "utf-16-le", "latin-1": "latin-1", "cp1252": "cp1252",
}  # fmt: skip


class Unreadable(Exception):
    """A file that cannot be loaded, or not further; the message is for people."""


class Line(NamedTuple):
    """A line without its end; of one that is too long, only the beginning. Bytes that are no text are surrogates."""

    number: int
    text: str
    encoding: str
    cut: bool = False

    def foreign(self, part: str) -> str | None:
        """Why a part of the line is not what the file says; None if it is."""
        if part.isascii():
            return None
        byte = next((ord(letter) - 0xDC00 for letter in part if "\udc80" <= letter <= "\udcff"), None)
        if byte is None:
            return None
        return f"Line {self.number} is not {self.encoding}: byte 0x{byte:02X}; --encoding names what the file is."

    def __str__(self) -> str:
        """The line as it can be shown and written, foreign bytes in hexadecimal."""
        shown = self.text[:_SHOWN] + ("…" if self.cut or len(self.text) > _SHOWN else "")
        return shown.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def lines(stream: IO[bytes] | gzip.GzipFile, encoding: Encoding) -> Generator[Line, None, None]:
    """The lines from the beginning of a seekable stream; a byte order mark says more than `encoding`.

    Raises:
        Unreadable: the text of UTF-16 is broken, after which no line end can be told from others.
    """
    stream.seek(0)
    head = stream.read(3)
    stream.seek(0)
    codec = next((codec for mark, codec in _MARKS.items() if head.startswith(mark)), _CODECS[encoding])
    name = codec.upper().removesuffix("-SIG").removesuffix("-LE")
    # UTF-16 has no bytes that could be passed over one by one.
    errors = "strict" if codec.startswith("utf-16") else "surrogateescape"
    text = io.TextIOWrapper(stream, codec, errors, newline=None)
    number, readline = 0, text.readline
    try:
        while line := readline(MAX_LINE + 1):
            number += 1
            if line[-1] == "\n":
                yield Line(number, line[:-1], name)
                continue
            cut = len(line) > MAX_LINE
            yield Line(number, line, name, cut)
            while cut and (rest := readline(MAX_LINE)):
                cut = rest[-1] != "\n"
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not {name} at or after line {number + 1} ({error.reason})") from error
    finally:
        text.detach()
