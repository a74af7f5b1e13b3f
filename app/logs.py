"""Logging: one structured line an event, for people on a terminal and as JSON elsewhere.

Invariant: a value can never break a line or pass for another field, because every value is encoded; only a traceback
for people has lines of its own, each set apart. A traceback shows no values of variables, where passwords are.
"""

import logging
import re
import sys
import traceback
from contextlib import suppress
from typing import Any, Final, TextIO, cast

import structlog
from opentelemetry.trace import format_span_id, format_trace_id, get_current_span
from structlog.typing import EventDict, ExcInfo

from app.settings import Settings

#: What ends a line or steers a terminal: C0 and C1 controls, the line and paragraph separators, bidirectional marks,
#: and halves of surrogate pairs, which no encoding writes.
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Logger:
    """Logs by structlog where somebody has configured it, the service or the program that this is a library of.

    Anywhere else structlog would print to stdout, which is the program's; the standard library's logging knows better.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        if structlog.is_configured():
            return getattr(structlog.get_logger(self._name), method)
        return getattr(structlog.wrap_logger(logging.getLogger(self._name), **_AS_LIBRARY), method)


_AS_LIBRARY: Final[dict[str, Any]] = {
    "wrapper_class": structlog.stdlib.BoundLogger,
    "processors": [
        structlog.stdlib.filter_by_level,
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=["event"]),
    ],
}


class _Lossy:
    """A file to which what cannot be written is lost: a full volume must not fail the request that is logged."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._file.write(text)
        return 0

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()


class _Stderr(structlog.WriteLogger):
    """Writes lines to stderr, and knows its name."""

    def __init__(self, name: str = "") -> None:
        super().__init__(cast("TextIO", _Lossy(sys.stderr)))
        self.name = name


def configure(settings: Settings) -> None:
    """Send structlog and the standard library's loggers through one renderer, to stderr."""
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(exception_formatter=_traceback)
        if console
        else structlog.processors.JSONRenderer()  # ASCII only
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.otlp_endpoint is not None:
        shared.append(_trace)
    rendering: list[Any] = [_printable if console else structlog.processors.format_exc_info, renderer]
    # Lines of the service do not pass through the standard library, which would take 10 of 18 us.
    structlog.configure(
        processors=[*shared, *rendering],
        logger_factory=_Stderr,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "alembic"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # the service logs its own access lines
    # A start that fails for a reason of ours is one line already; the server would add a page of traceback.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "app.errors." not in record.getMessage())
    logging.getLogger("alembic.runtime.plugins").setLevel("WARNING")
    # At lower levels these log addresses, headers and statements, and with them what is secret.
    for name in ("asyncio", "httpcore", "httpx", "opentelemetry", "sqlalchemy", "urllib3"):
        logging.getLogger(name).setLevel("WARNING")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _trace(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Name the trace and the span that a line belongs to."""
    context = get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = format_trace_id(context.trace_id)
        event["span_id"] = format_span_id(context.span_id)
    return event


def _printable(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Escape control characters, which the renderer for people writes as they are."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _CONTROLS.sub(_escaped, value)
    return event


def _traceback(out: TextIO, error: ExcInfo) -> None:
    lines = "".join(traceback.format_exception(*error)).rstrip("\n").split("\n")
    out.writelines(f"\n    | {_CONTROLS.sub(_escaped, line)}" for line in lines)
