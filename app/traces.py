"""OpenTelemetry traces: a span for each request, and one for each transaction that wrote the quotes of some.

Off unless a collector is named. Invariant: a collector that is away costs spans, never an answer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Tracer, get_current_span

from app import __version__
from app.errors import StartupError
from app.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk import trace as sdk


def check(settings: Settings) -> None:
    """Refuse to start without what the settings need.

    Raises:
        StartupError: a collector is named, and the packages of the extra `otel` are not installed.
    """
    try:
        installed = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        installed = None
    if settings.otlp_endpoint is not None and installed is None:
        raise StartupError(
            "QUOTES_OTLP_ENDPOINT is set, but what sends traces is not installed: "
            "pip install 'opa-quotes-storage[otel]', or unset it."
        )


def provider(settings: Settings) -> "sdk.TracerProvider | None":
    """What sends spans to the collector of the settings, from a thread of its own; None if there is none.

    Raises:
        StartupError: as `check`.
    """
    if settings.otlp_endpoint is None:
        return None
    check(settings)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter  # noqa: PLC0415  an extra
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider, export  # noqa: PLC0415

    resource = Resource.create({"service.name": "opa-quotes-storage", "service.version": __version__})
    sending = TracerProvider(resource=resource)
    url = settings.otlp_endpoint.get_secret_value().rstrip("/") + "/v1/traces"
    sending.add_span_processor(export.BatchSpanProcessor(trace_exporter.OTLPSpanExporter(endpoint=url)))
    return sending


def note_request(request_id: str, rows: int | None) -> None:
    """Add to the span of a request what the service knows of it."""
    span = get_current_span()
    if span.is_recording():
        span.set_attribute("quotes.request_id", request_id)
        if rows is not None:
            span.set_attribute("quotes.rows", rows)


def request_context() -> SpanContext:
    """What the span of a flush is linked to; not valid where nothing is traced."""
    return get_current_span().get_span_context()


def flush(tracer: Tracer | None, requests: Sequence[SpanContext], rows: int) -> AbstractContextManager[object]:
    """The span of a transaction that writes the quotes of several requests, linked to theirs."""
    if tracer is None:
        return nullcontext()
    return tracer.start_as_current_span(
        "flush quotes",
        context=Context(),  # of no request, whichever one it began in
        links=[Link(context) for context in requests if context.is_valid],
        attributes={"quotes.requests": len(requests), "quotes.rows": rows},
    )
