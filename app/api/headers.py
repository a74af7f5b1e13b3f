"""What headers ask of ingest: `Idempotency-Key` (the IETF's draft) and `Prefer` (RFC 7240).

Invariant: a key that is not understood is refused, because to ignore it would break a promise; a preference that is
not understood is ignored, because it promises nothing.
"""

import hashlib
import re
from typing import Any, Final

from fastapi import Request
from pydantic import BaseModel

from app.errors import InvalidRequest

_TOKEN_KEY: Final = re.compile(r"[A-Za-z0-9._:-]{1,255}")
_STRING_KEY: Final = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])+)"')  # a String of RFC 8941
_LONGEST_KEY: Final = 255
# A comma in quotes does not part two preferences. Quotes that are never closed end with the text, or looking for
# their end from each of many would take seconds.
_PREFERENCES: Final = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*\\?(?:"|$))+')
_PREFERENCE: Final = re.compile(r'\s*return\s*=\s*(?:"([^"\\]*)"|([^\s;"]+))\s*(?:;.*)?', re.IGNORECASE)

#: The headers for OpenAPI; the service adds for how long it keeps a key.
PARAMETERS: Final[list[dict[str, Any]]] = [
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "A client's own name for this request, in quotes; 1 to 255 printable ASCII characters. Sent "
        "again with the same key and body, the request is answered with the same receipt and stores nothing.",
        "schema": {"type": "string"},
        "example": '"8e03978e-40d5-43e8-bc93-6894a57f9324"',
    },
    {
        "name": "Prefer",
        "in": "header",
        "description": "`return=minimal`: no receipt, unless it lists refused or superseded rows.",
        "schema": {"type": "string"},
    },
]


def idempotency_key(request: Request) -> str | None:
    """The key that the request is named by, quoted or not.

    Raises:
        InvalidRequest: there are several, or it is not a String of 1 to 255 characters.
    """
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    if len(request.headers.getlist("idempotency-key")) == 1:
        if _TOKEN_KEY.fullmatch(given):
            return given
        if (match := _STRING_KEY.fullmatch(given)) and len(key := re.sub(r"\\(.)", r"\1", match[1])) <= _LONGEST_KEY:
            return key
    raise InvalidRequest(
        "An idempotency key is one string in quotes, of 1 to 255 printable ASCII characters.",
        parameter="Idempotency-Key",
    )


def fingerprint(request: Request, query: BaseModel, body: bytes | bytearray) -> bytes:
    """A hash over all that decides what becomes of a request: parameters that are not defaults, encoding, body."""
    digest = hashlib.sha256()
    headers = (request.headers.get(name, "") for name in ("content-type", "content-encoding"))
    for part in (query.model_dump_json(exclude_defaults=True), *headers):
        digest.update(part.encode())
        digest.update(b"\0")  # in no header and in no JSON
    digest.update(body)
    return digest.digest()


def prefers_minimal(request: Request) -> bool:
    """Whether the first preference `return` is `minimal`."""
    if "prefer" not in request.headers:
        return False
    for preference in _PREFERENCES.findall(",".join(request.headers.getlist("prefer"))):
        if match := _PREFERENCE.fullmatch(preference):
            return (match[1] or match[2] or "").lower() == "minimal"
    return False
