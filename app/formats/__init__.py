"""Codecs: one module a format, one registry.

Invariant: whatever the format, quotes become a `Batch` under the same rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from app.errors import NotAcceptable, UnsupportedMediaType
from app.formats import arrow, csv, json, ndjson, parquet, texts
from app.quote.batch import Batch
from app.quote.terms import Terms


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its name for `?format=`, its media types (the first is canonical) and its decoders.

    `thorough` turns a body into a batch on the terms of the request. It is called in a process apart, because it takes
    more than a few milliseconds, or foreign code reads what is binary. `quick` does so where everything about the body
    is as it should be, in a tenth of the time, and gives None where something might not be; binary formats have none.
    A text is always tried by `quick` first, which bounds what it becomes.
    """

    name: str
    media_types: tuple[str, ...]
    thorough: Callable[[bytes, Terms], Batch]
    quick: Callable[[bytes, Terms], Batch | None] | None = None
    writes: bool = False
    inline_bytes: int = 256 * 1024

    def decode(self, body: bytes, terms: Terms, *, tried: bool = False) -> Batch:
        """The batch of a body, which `quick` was `tried` for or is.

        Raises:
            QuotesError: why it is none.
        """
        batch = None if tried or self.quick is None else self.quick(body, terms)
        return self.thorough(body, terms) if batch is None else batch

    def tries(self, body: bytes) -> bool:
        """Whether to try a body takes the event loop a few milliseconds at most."""
        return self.quick is not None and len(body) <= self.inline_bytes

    def at_once(self, body: bytes, terms: Terms) -> Batch | None:
        """The batch of a body that takes the event loop a few milliseconds; None if it may take longer.

        Raises:
            QuotesError: as `decode`.
        """
        if self.quick is None or not self.tries(body):
            return None
        batch = self.quick(body, terms)
        return self.thorough(body, terms) if batch is None and texts.is_short(body) else batch


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Format("json", ("application/json",), json.thorough, json.quick, writes=True),
            Format("ndjson", ("application/x-ndjson", "application/jsonl"), ndjson.thorough, ndjson.quick),
            Format("csv", ("text/csv",), csv.thorough, csv.quick),
            Format(
                "arrow",
                ("application/vnd.apache.arrow.stream", "application/vnd.apache.arrow.file"),
                arrow.decode,
            ),
            Format(
                "parquet",
                ("application/vnd.apache.parquet", "application/x-parquet"),
                parquet.decode,
            ),
        )
    }
)
_BY_MEDIA_TYPE: Final = {media: fmt for fmt in FORMATS.values() for media in fmt.media_types}


@lru_cache(maxsize=64)
def reader(content_type: str | None) -> Format:
    """The format of a body by its content type; JSON where none is given.

    Raises:
        UnsupportedMediaType: no format has it, or it is text in another charset than UTF-8.
    """
    media, *parameters = (content_type or "application/json").split(";")
    media = media.strip().lower()
    if media not in _BY_MEDIA_TYPE:
        known = ", ".join(_BY_MEDIA_TYPE)
        raise UnsupportedMediaType(f"The content type is not one of {known}.")
    if media.startswith("text/"):
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "charset" and value.strip(' "').lower() not in {"utf-8", "us-ascii"}:
                raise UnsupportedMediaType("Text is taken in UTF-8.")
    return _BY_MEDIA_TYPE[media]


def writer(accept: str | None) -> Format:
    """The format to answer in, by an `Accept` header: the first one named that can be written.

    Raises:
        NotAcceptable: none of those named can.
    """
    default = FORMATS["json"]
    if not accept:
        return default
    for choice in accept.split(","):
        media, _, parameters = choice.partition(";")
        if "q=0" in parameters.replace(" ", "").split(";"):
            continue
        media = media.strip().lower()
        if media in {"*/*", "application/*"}:
            return default
        found = _BY_MEDIA_TYPE.get(media)
        if found is not None and found.writes:
            return found
    offered = ", ".join(fmt.media_types[0] for fmt in FORMATS.values() if fmt.writes)
    raise NotAcceptable(f"This route answers in {offered}.")
