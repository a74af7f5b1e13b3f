"""Traces as a collector receives them, and a start that cannot send any."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app import logs
from app.errors import StartupError
from app.main import create_app
from app.settings import Settings
from tests.conftest import Lane, running

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Span]]]:
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in request.resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", spans
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


@pytest.mark.usefixtures("logging_as_it_was")
async def test_a_request_and_the_flush_that_wrote_it_are_linked(
    lane: Lane, symbol: str, collector: tuple[str, list[Span]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, spans = collector
    settings = lane.make_settings(otlp_endpoint=url, log_format="json")
    async with running(create_app(settings)) as client:
        logs.configure(settings)
        rows = [{"symbol": symbol, "timestamp": f"2026-11-20T00:00:0{i}Z", "price": 1} for i in range(3)]
        stored = await client.post("/v1/quotes", json=rows, headers={"traceparent": PARENT})
        assert stored.status_code == 200
        await client.get("/health/live")
        await client.get("/metrics")
        (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"request"' in line]
    found = defaultdict(list)
    for span in spans:
        found[span.name].append(span)
    assert set(found) == {"POST /v1/quotes", "flush quotes"}, "sent when the service stopped; probes are none"
    (request,), (flush,) = found["POST /v1/quotes"], found["flush quotes"]
    assert request.trace_id.hex() == line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert request.span_id.hex() == line["span_id"]
    assert attributes(request)["quotes.rows"] == 3
    assert attributes(request)["quotes.request_id"] == stored.headers["x-request-id"] == line["request_id"]
    assert attributes(request)["http.route"] == "/v1/quotes"
    assert [(link.trace_id, link.span_id) for link in flush.links] == [(request.trace_id, request.span_id)]
    assert not flush.parent_span_id
    assert attributes(flush) == {"quotes.requests": 1, "quotes.rows": 3}


async def test_a_collector_that_is_away_costs_no_answer(lane: Lane, symbol: str) -> None:
    async with running(create_app(lane.make_settings(otlp_endpoint="http://127.0.0.1:1"))) as client:
        row = {"symbol": symbol, "timestamp": "2026-11-20T00:00:00Z", "price": 1}
        assert (await client.post("/v1/quotes", json=[row])).status_code == 200


def test_without_the_extra_a_collector_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(StartupError, match=r"\[otel\]"):
        create_app(Settings(_env_file=None, otlp_endpoint="http://127.0.0.1:4318"))
    create_app(Settings(_env_file=None))


def test_the_collector_is_an_http_url() -> None:
    with pytest.raises(ValueError, match="must be an http"):
        Settings(_env_file=None, otlp_endpoint="127.0.0.1:4318")
