"""Errors as RFC 9457 `application/problem+json`: one shape, made in one place.

Invariant: a problem names what is wrong and where, and never echoes a value, a statement or a stack.
"""

from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app.errors import Conflict, InvalidQuotes, QuotesError, Rejection, UnsupportedEncoding
from app.logs import Logger

log = Logger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
#: Rows listed in one problem; `errors_total` says how many there are.
LISTED: Final = 100


class Fault(BaseModel):
    """One thing that is wrong: in the body by JSON pointer, in the query by parameter."""

    code: str
    detail: str
    pointer: str | None = Field(default=None, description="JSON pointer into the body.")
    parameter: str | None = Field(default=None, description="Name of a query parameter or header.")
    index: int | None = Field(default=None, description="Zero-based row of the request.")


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable name of the kind of problem.")
    instance: str
    request_id: str
    errors: list[Fault] = []
    errors_total: int | None = Field(default=None, description="Faults found, where more were found than listed.")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that a route may answer with, for OpenAPI."""
    return {
        status: {
            "description": "Problem",
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every error that is known as a problem; for others the middleware has `unexpected`."""
    app.add_exception_handler(QuotesError, _quotes_error)
    app.add_exception_handler(RequestValidationError, _parameters)
    app.add_exception_handler(HTTPException, _http)


def _answer(
    request: Request,
    status: int,
    code: str,
    title: str,
    detail: str,
    errors: list[dict[str, Any]] | None = None,
    total: int | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    request.state.problem = code
    content = {
        "type": f"urn:problem:opa-quotes:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "instance": request.url.path,
        "request_id": getattr(request.state, "request_id", ""),
        "errors": errors or [],
    }
    if total is not None:
        content["errors_total"] = total
    return Response(msgspec.json.encode(content), status, headers, MEDIA_TYPE)


def _row(rejection: Rejection) -> dict[str, Any]:
    return {
        "code": rejection.code,
        "detail": rejection.detail,
        "pointer": rejection.pointer,
        "index": rejection.index,
    }


async def _quotes_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QuotesError)  # noqa: S101  registered for this class
    errors: list[dict[str, Any]] = []
    total = None
    if isinstance(error, (InvalidQuotes, Conflict)):
        errors = [_row(rejection) for rejection in error.rejections[:LISTED]]
        total = len(error.rejections)
    elif error.pointer is not None or error.parameter is not None:
        where = {"pointer": error.pointer, "parameter": error.parameter}
        errors = [{"code": error.code, "detail": error.detail, **{k: v for k, v in where.items() if v is not None}}]
    headers = {} if error.retry_after is None else {"Retry-After": str(round(error.retry_after))}
    if isinstance(error, UnsupportedEncoding):
        headers["Accept-Encoding"] = error.accepted  # RFC 9110, section 12.5.3
    if error.status >= 500:  # noqa: PLR2004
        log.warning("request failed", code=error.code, cause=type(error.__cause__).__name__)
    return _answer(request, error.status, error.code, error.title, error.detail, errors, total, headers)


async def _parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  registered for this class
    errors = []
    for fault in error.errors():
        name = str(fault["loc"][1]) if len(fault["loc"]) > 1 else str(fault["loc"][0])
        unknown = fault["type"] == "extra_forbidden"
        errors.append(
            {
                "code": "unknown-parameter" if unknown else "invalid-parameter",
                "detail": "There is no such parameter." if unknown else str(fault["msg"]).removeprefix("Value error, "),
                "parameter": _shown(name),
            }
        )
    names = ", ".join(sorted({fault["parameter"] for fault in errors}))
    return _answer(request, 400, "invalid-request", "Invalid request", f"These parameters are wrong: {names}.", errors)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this class
    code, title = {404: ("not-found", "Not found"), 405: ("method-not-allowed", "Method not allowed")}.get(
        error.status_code, ("http-error", "Request refused")
    )
    headers = dict(error.headers or {})
    return _answer(request, error.status_code, code, title, f"{title}: {request.method} on this path.", headers=headers)


def repeated(request: Request, parameter: str) -> Response:
    """Refuse a parameter that is given twice."""
    name = _shown(parameter)
    fault = {"code": "repeated-parameter", "detail": "This parameter is given more than once.", "parameter": name}
    detail = f"This parameter is given more than once: {name}."
    return _answer(request, 400, "invalid-request", "Invalid request", detail, [fault])


def _shown(name: str) -> str:
    return name[:64] if name.isprintable() and name.isascii() else "?"


def unexpected(request: Request, error: Exception) -> Response:
    """Log an error that nothing foresaw, and answer without a word about it."""
    log.error("unexpected error", exc_info=error)
    return _answer(
        request, 500, "internal-error", "Internal error", "The service made a mistake; its log has the request id."
    )
