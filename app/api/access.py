"""What is noted of every request: an id, metrics, and one log line when its response has ended.

Invariant: plain ASGI, so a streamed response is never buffered and a cancelled one is still noted. The id is in every
line logged meanwhile, in every problem, and in the headers of every response, also of an error that nothing foresaw.
"""

import asyncio
import re
import secrets
import time
from typing import Final

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics, traces
from app.api import problems
from app.api.deps import repeated
from app.errors import BodyTimeout
from app.logs import Logger

log = Logger("app.access")

_GIVEN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Asked for by machines all day: logged when debugging, and not counted.
QUIET: Final = frozenset({"/metrics", "/health", "/health/live", "/health/ready"})
#: The status of a request whose client went before an answer began.
GONE: Final = 499
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
        counted = scope["path"] not in QUIET
        status: int | None = None
        body_bytes = 0

        async def counting() -> Message:
            nonlocal body_bytes
            message = await receive()
            body_bytes += len(message.get("body", b""))
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = state.get("ended", message["status"])
                traces.note_request(request_id, state.get("rows"))  # the span ends with the response
                headers = message.setdefault("headers", [])
                headers.append((b"x-request-id", request_id.encode()))
                services = getattr(scope["app"].state, "services", None)
                if status == BodyTimeout.status or (services and not services.writer.accepting):
                    headers.append((b"connection", b"close"))
            await send(message)

        began = time.perf_counter()
        if counted:
            metrics.HTTP_IN_PROGRESS.inc()
        bound = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._run(scope, counting, named)
        except Exception as error:
            response = problems.unexpected(Request(scope), error)
            if status is not None:
                raise  # the server closes the connection, so that half an answer does not look like all of it
            await response(scope, counting, named)
        finally:
            if counted:
                metrics.HTTP_IN_PROGRESS.dec()
            noted = state.get("ended", GONE) if status is None else status
            self._note(scope, noted, time.perf_counter() - began, body_bytes if counted else None)
            structlog.contextvars.reset_contextvars(**bound)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, or stop where a request can have no answer any more.

        To HEAD it answers as to GET; the server leaves out the body.
        """
        query = scope["query_string"]
        if b"&" in query and (name := repeated(query)) is not None:
            return await problems.repeated(Request(scope), name)(scope, receive, send)
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if "ended" not in scope["state"]:
                raise
            if task := asyncio.current_task():
                task.uncancel()
        finally:
            if "route" in inner:
                scope["route"] = inner["route"]

    def _note(self, scope: Scope, status: int, seconds: float, body_bytes: int | None) -> None:
        """Log a request, and count it unless `body_bytes` is None."""
        method, state = scope["method"], scope["state"]
        if body_bytes is not None:
            route = scope.get("route")
            handler = "none" if route is None else route.path
            metrics.observe_request(handler, method if method in _METHODS else "other", status, seconds, body_bytes)
        emit = self._log.debug if body_bytes is None else self._log.info
        noted = {key: state[key] for key in ("rows", "problem") if key in state}
        emit("request", method=method, path=scope["path"], status=status, ms=round(1000 * seconds, 2), **noted)
