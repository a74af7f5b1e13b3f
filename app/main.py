"""The composition root: the only place where things are wired, and nothing happens at import.

Invariant: what was started is stopped in reverse order, also after a half-failed start, so the writer has
drained before its pool closes, and the pool has closed before the embedded database stops.
"""

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import FrameType
from typing import Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from opentelemetry.trace import TracerProvider
from prometheus_client import disable_created_metrics
from prometheus_fastapi_instrumentator import Instrumentator

from app import __version__, logs, metrics, traces, workers
from app.api import ingest, ohlc, ops, problems, quotes, storage, symbols
from app.api.access import QUIET, Observed
from app.api.deps import Services
from app.api.shares import Shares
from app.db import embedded
from app.db.engine import Database
from app.db.migrate import head, migrate
from app.db.replicas import database_of
from app.errors import DatabaseMisconfigured, DatabaseUnavailable, QuotesError
from app.formats import memory
from app.formats.apart import Apart
from app.health import Health
from app.logs import Logger
from app.monitor import Monitor
from app.quote.model import Quote
from app.repository.quotes import QuoteRepository
from app.repository.storage import StorageRepository
from app.repository.system import SystemRepository
from app.settings import Settings, misspelt
from app.writer import Writer

log = Logger(__name__)

#: Threads that read large bodies, and those of foreign formats in a process apart each.
_READERS: Final = 2
#: Seconds between SIGTERM and the end of listening, in which clients that keep a connection are told to leave it.
_NOTICE: Final = 1.0
#: Seconds between two attempts to reach the database at the start.
_BETWEEN_TRIES: Final = 0.5


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service, not yet started: its lifespan brings up the database, the schema, the pools and the writer.

    Raises (from the lifespan):
        StartupError: the embedded database or a migration cannot be brought up; at once if traces cannot be sent.
        DatabaseUnavailable: the given database cannot be reached.
    """
    settings = settings or Settings()
    spans = traces.provider(settings)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which nothing reads

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(workers.clear_gauges)
            if spans is not None:
                stack.push_async_callback(asyncio.to_thread, spans.shutdown)
            try:
                app.state.services = await _wire(stack, settings, spans)
            except QuotesError as error:
                log.critical("cannot start", reason=error.detail)
                if error.lasts:
                    workers.note_refused()
                raise
            yield

    app = FastAPI(
        title="opa-quotes-storage",
        version=__version__,
        summary="A quote store over TimescaleDB.",
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        telemetry={
            "tracer_provider": spans,
            "tracing": spans is not None,
            "exclude": lambda scope: scope["path"] in QUIET,
            # Not a span for each dependency, and neither metrics nor logs: the service has its own.
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "auto_configure": False,
        },
    )
    app.add_middleware(Observed)
    problems.install(app)
    for router in (ingest.router, quotes.router, ohlc.router, symbols.router, storage.router, ops.router):
        app.include_router(router)
    app.router.routes.insert(0, ingest.ROUTE)
    Instrumentator(registry=metrics.REGISTRY).expose(app, include_in_schema=False)  # last: routes are tried in turn
    _declare(app, settings)
    return app


def app_from_environment() -> FastAPI:
    """The service by the environment's settings, for a server that imports it by name."""
    settings = Settings()
    logs.configure(settings)
    workers.end_with_parent()
    for name, nearest in misspelt().items() if workers.leads() else ():
        log.warning("unknown setting", variable=name, nearest=nearest)
    memory.keep_little()
    app = create_app(settings)
    # What lives as long as the process is not looked at again, and a batch of thousands of rows is no reason to
    # look at all: 15 % less CPU a quote.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    return app


async def _wire(stack: AsyncExitStack, settings: Settings, spans: TracerProvider | None) -> Services:
    if settings.database_url is None:
        url = await stack.enter_async_context(embedded.embedded_postgres(settings.data_dir, watched=True))
    else:
        url = settings.database_url.get_secret_value()
    database = database_of(url, settings)
    stack.push_async_callback(database.close)
    repository = QuoteRepository(database, settings)
    tracer = None if spans is None else spans.get_tracer("opa-quotes")
    writer = await stack.enter_async_context(Writer(repository.write, settings, tracer))
    stack.enter_context(_told_to_stop(writer))
    await _reach(database, url, settings, writer)
    health = Health(SystemRepository(database), settings, head())
    monitor = Monitor(StorageRepository(database), settings, health.report)
    await stack.enter_async_context(monitor)
    report = await health.report()
    log.info("started", version=__version__, capability=report.level, health=report.status, embedded=settings.embedded)
    for check in report.checks if workers.leads() else ():
        if check.status in {"degraded", "unhealthy"}:
            log.warning("not as it should be", check=check.name, status=check.status, reason=check.detail)
    readers = stack.enter_context(ThreadPoolExecutor(_READERS, thread_name_prefix="reader"))
    # Left first, or the threads would wait for it.
    apart = stack.enter_context(Apart(settings.max_body_bytes, settings.max_batch_rows))
    shares = Shares(settings, writer, readers=_READERS, reads=database.readable, rest=apart.rest)
    return Services(settings, repository, writer, health, monitor, readers, shares, apart)


async def _reach(database: Database, url: str, settings: Settings, writer: Writer) -> None:
    """Migrate and connect; wait, until the writer is told to stop, for a server that is known to come back.

    An embedded one is started again. Where other workers have reached it, it is away but for a time, and a worker that
    ended instead would end its siblings too: to the supervisor a failed start says that none can succeed.
    """
    told = ""
    while True:
        try:
            if settings.migrate_on_start:
                await migrate(url, settings)
            await database.connect()
            return workers.note_started()
        except DatabaseUnavailable as error:
            passes = embedded.serves(settings) and not isinstance(error, DatabaseMisconfigured)
            if not (writer.accepting and (passes or workers.has_started())):
                raise
            if error.detail != told:
                log.warning("waiting for PostgreSQL", reason=error.detail)
            told = error.detail
            await asyncio.sleep(_BETWEEN_TRIES)


@contextmanager
def _told_to_stop(writer: Writer) -> Iterator[None]:
    """Let the writer know of a signal before the server does, which waits until the last request is answered.

    At SIGTERM the server goes on for `_NOTICE` first: each answer then closes its connection, so that a client sends
    nothing on one that is being closed. A second signal, and SIGINT, reach the server at once.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if threading.current_thread() is not threading.main_thread() or not callable(handlers[signal.SIGTERM]):
        yield  # no server that waits for signals
        return
    loop = asyncio.get_running_loop()

    def stop(number: int, frame: FrameType | None) -> None:
        server = handlers[signal.Signals(number)]
        assert callable(server)  # noqa: S101  SIGTERM has a handler, and SIGINT one of Python's at least
        if number == signal.SIGTERM and writer.accepting:
            loop.call_soon_threadsafe(loop.call_later, _NOTICE, server, number, frame)
        else:
            server(number, frame)
        loop.call_soon_threadsafe(writer.stop_accepting)

    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _operation_id(route: APIRoute) -> str:
    return route.name


def _declare(app: FastAPI, settings: Settings) -> None:
    """Add to OpenAPI the models that routes refer to by name, as they read and write bytes themselves."""
    build = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            document = build()
            schemas = document["components"]["schemas"]
            for model in (Quote, problems.Problem):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            for parameter in document["paths"]["/v1/quotes"]["post"]["parameters"]:
                if parameter["name"] == "Idempotency-Key":
                    expiry = settings.idempotency_expiry.total_seconds()
                    parameter["description"] += f" The service keeps keys for {expiry:.0f} seconds."
        assert app.openapi_schema is not None  # noqa: S101  built above
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
