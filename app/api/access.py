"""What is noted of every request: an id, metrics, and one log line when its response has ended.

Invariant: plain ASGI, so a streamed response is never buffered and a cancelled one is still noted. The id is in every
line logged meanwhile, in every problem, and in the headers of every response, also of an error that nothing foresaw.
"""

import re
import secrets
import time
from typing import Final

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics, traces
from app.api import problems
from app.logs import Logger

log = Logger("app.access")

_GIVEN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Asked for by machines all day: logged when debugging, and not counted.
QUIET: Final = frozenset({"/metrics", "/health", "/health/live", "/health/ready"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observed:
    """Middleware that names each request, counts and logs it; an `X-Request-ID` of the client is kept if plain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._log = log.bind()  # once: to find out what a logger is takes 4 us

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  the ASGI interface
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _GIVEN.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        method = scope["method"]
        counted = scope["path"] not in QUIET
        status = 499  # the client went before an answer began
        answered = False
        body_bytes = 0

        async def counting() -> Message:
            nonlocal body_bytes
            message = await receive()
            body_bytes += len(message.get("body", b""))
            return message

        async def named(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], True
                traces.note_request(request_id, state.get("rows"))  # the span ends with the response
                headers = message.setdefault("headers", [])
                headers.append((b"x-request-id", request_id.encode()))
                if (services := getattr(scope["app"].state, "services", None)) and not services.writer.accepting:
                    headers.append((b"connection", b"close"))
            await send(message)

        began = time.perf_counter()
        if counted:
            metrics.HTTP_IN_PROGRESS.inc()
        bound = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, counting, named)
        except Exception as error:
            response = problems.unexpected(Request(scope), error)
            if answered:
                raise  # the server closes the connection, so that half an answer does not look like all of it
            await response(scope, counting, named)
        finally:
            seconds = time.perf_counter() - began
            if counted:
                metrics.HTTP_IN_PROGRESS.dec()
                route = scope.get("route")
                handler = "none" if route is None else route.path
                metrics.observe_request(handler, method if method in _METHODS else "other", status, seconds, body_bytes)
            emit = self._log.info if counted else self._log.debug
            noted = {key: state[key] for key in ("rows", "problem") if key in state}
            emit("request", method=method, path=scope["path"], status=status, ms=round(1000 * seconds, 2), **noted)
            structlog.contextvars.reset_contextvars(**bound)
