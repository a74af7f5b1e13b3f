"""A request id for every request, and one log line when its response has ended.

Invariant: plain ASGI, so a streamed response is never buffered and a cancelled one is still logged.
"""

import re
import secrets
import time
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger("app.access")

_GIVEN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET: Final = ("/health", "/metrics")


class AccessLog:
    """Middleware that names each request and logs it; an `X-Request-ID` of the client is kept if it is plain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  the ASGI interface
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _GIVEN.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        began = time.perf_counter()
        status = 499  # the client went before an answer began

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, named)
            except Exception:
                status = 500
                raise
            finally:
                emit = log.debug if scope["path"].startswith(_QUIET) else log.info
                extra = {key: state[key] for key in ("rows", "problem") if key in state}
                emit(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round(1000 * (time.perf_counter() - began), 2),
                    **extra,
                )
