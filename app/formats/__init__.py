"""Codecs: one module a format, one registry.

Invariant: whatever the format, quotes become a `Batch` under the same rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from app.batch import Batch
from app.errors import NotAcceptable, UnsupportedMediaType
from app.formats import json, ndjson
from app.model import Terms


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its name for `?format=`, its media types (the first is canonical) and its decoder.

    `decode` turns a body into a batch on the terms of the request.
    """

    name: str
    media_types: tuple[str, ...]
    decode: Callable[[bytes, Terms], Batch]
    writes: bool


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Format("json", ("application/json",), json.decode, writes=True),
            Format("ndjson", ("application/x-ndjson", "application/jsonl"), ndjson.decode, writes=False),
        )
    }
)
_BY_MEDIA_TYPE: Final = {media: fmt for fmt in FORMATS.values() for media in fmt.media_types}


def reader(content_type: str | None) -> Format:
    """The format of a body by its content type; JSON where none is given.

    Raises:
        UnsupportedMediaType: no format has it.
    """
    media = (content_type or "application/json").partition(";")[0].strip().lower()
    try:
        return _BY_MEDIA_TYPE[media]
    except KeyError:
        known = ", ".join(_BY_MEDIA_TYPE)
        raise UnsupportedMediaType(f"The content type is not one of {known}.") from None


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
