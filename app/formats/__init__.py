"""Codecs: one module a format, one registry.

Invariant: whatever the format, quotes become a `Batch` under the same rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from app.errors import NotAcceptable, UnsupportedMediaType
from app.formats import arrow, csv, json, ndjson, parquet
from app.quote.batch import Batch
from app.quote.terms import Terms


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its name for `?format=`, its media types (the first is canonical) and its decoder.

    `decode` turns a body into a batch on the terms of the request. Above `inline_bytes` that takes more than a few
    milliseconds, and belongs in a thread.
    """

    name: str
    media_types: tuple[str, ...]
    decode: Callable[[bytes, Terms], Batch]
    writes: bool
    inline_bytes: int = 512 * 1024


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Format("json", ("application/json",), json.decode, writes=True),
            Format("ndjson", ("application/x-ndjson", "application/jsonl"), ndjson.decode, writes=False),
            Format("csv", ("text/csv",), csv.decode, writes=False),
            Format(
                "arrow",
                ("application/vnd.apache.arrow.stream", "application/vnd.apache.arrow.file"),
                arrow.decode,
                writes=False,
            ),
            Format(
                "parquet",
                ("application/vnd.apache.parquet", "application/x-parquet"),
                parquet.decode,
                writes=False,
                inline_bytes=32 * 1024,  # a row is ten bytes in it
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
