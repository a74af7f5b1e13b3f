"""The command line: serve, migrate, health, backup, restore, maintain, load, demo.

Invariant: stdout carries results and nothing else, an error is one readable sentence on stderr, and the exit
status says whether it worked.
"""

import asyncio
import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import anyio.from_thread
import httpx
import msgspec
import typer
import uvicorn
from pydantic import SecretStr, ValidationError
from rich.console import Console
from rich.table import Table
from uvicorn.config import STARTUP_FAILURE

from app import __version__, backup, logs, maintain, supervisor, traces
from app import demo as market
from app import load as loading
from app import workers as processes
from app.client import DEFAULT_URL
from app.db import embedded
from app.db import migrate as schema
from app.db.engine import Database
from app.errors import QuotesError
from app.health import Health, Report, unreachable
from app.lines import Encoding
from app.maintain import DataDir, Json, a_file
from app.quote.terms import OnConflict, Prices, Ties
from app.repository.system import SystemRepository
from app.settings import METRICS_DIRECTORY, Settings, faults

#: Longer than the drain, in which every request gets its answer: the server would end those without one.
_GRACE: Final = timedelta(seconds=5)
#: Longer than the pools of usual clients and proxies keep a connection, so that none is closed under a request.
_KEEP_ALIVE: Final = 75
#: Server processes; each takes some 100 MB, and connections of its own.
_MOST_WORKERS: Final = 256
#: Exit status of a healthy store whose supervisor did not take the report.
_UNREPORTED: Final = 3

#: Seconds that a report may take with all of its tries, and the pauses between these.
_REPORTING: Final = 4.0
_PAUSES: Final = (0.4, 0.8, 1.6)

app = typer.Typer(
    name="opa-quotes",
    help="A quote store over TimescaleDB: batches in over HTTP; ranges, latest and OHLC bars out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(maintain.app, name="maintain")
app.command()(backup.backup)
app.command()(backup.restore)
errors = Console(stderr=True)


def main() -> None:
    """Run the command line; errors of this project, and of files, end it with a sentence and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # a locale that cannot write a frame of a table
    try:
        app()
    except OSError as error:
        with suppress(OSError, ValueError):  # what could not be written is not tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        where = f": {error.filename}" if error.filename else ""
        errors.print(f"[red]error:[/red] {error.strerror or type(error).__name__}{where}.", highlight=False)
        sys.exit(1)
    except QuotesError as error:
        _tell(error)
        sys.exit(1)
    except ValidationError as error:
        for told in faults(error):
            errors.print(f"[red]error:[/red] {told}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _tell(error: QuotesError) -> None:
    errors.print(f"[red]error:[/red] {error.detail}", highlight=False, soft_wrap=True)


def _a_number(value: float | None) -> float | None:
    """Refuse what is no number, which no bound does: a wait for it would never end."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("a number")
    return value


def _settings(**overrides: Any) -> Settings:
    return Settings(**{name: value for name, value in overrides.items() if value is not None})


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="8000")] = None,
    data_dir: DataDir = None,
    workers: Annotated[int, typer.Option(min=1, max=_MOST_WORKERS, help="Server processes.")] = 1,
) -> None:
    """Run the service. Without QUOTES_DATABASE_URL it brings its own PostgreSQL, whose data stay."""
    try:
        _serve(host, port, data_dir, workers)
    except QuotesError as error:
        _tell(error)
        raise typer.Exit(supervisor.REFUSED if error.lasts else STARTUP_FAILURE) from error


def _serve(host: str | None, port: int | None, data_dir: Path | None, workers: int) -> None:
    settings = _settings(host=host, port=port, data_dir=data_dir)
    logs.configure(settings)
    traces.check(settings)
    supervisor.check_port(settings.host, settings.port)
    with ExitStack() as stack:
        environment = {} if settings.data_dir is None else {"QUOTES_DATA_DIR": str(settings.data_dir)}
        shared = None
        if workers > 1:
            shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="opa-quotes-metrics-")))
            processes.announce(shared, workers)
            environment |= {METRICS_DIRECTORY: str(shared), "PROMETHEUS_MULTIPROC_DIR": str(shared)}
            environment |= stack.enter_context(_shared(settings))
        # The server imports the application by name, in each of its processes.
        os.environ.update(environment)
        config = uvicorn.Config(
            "app.main:app_from_environment",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=workers,
            http="app.server:Connection",
            ws="none",
            forwarded_allow_ips=settings.trusted_proxies,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil((settings.drain_timeout + _GRACE).total_seconds()),
            timeout_keep_alive=_KEEP_ALIVE,
        )
        supervisor.run(config, shared)


@contextmanager
def _shared(settings: Settings) -> Iterator[dict[str, str]]:
    """The one database of several processes, migrated once where it is embedded, and how they find it."""
    if not settings.embedded:
        yield {}
        return
    with anyio.from_thread.start_blocking_portal() as portal:
        server = embedded.embedded_postgres(settings.data_dir, watched=True)
        with portal.wrap_async_context_manager(server) as url:
            if settings.migrate_on_start:
                # The first settings of the store are those of an embedded one, which the workers do not know it is.
                portal.call(schema.migrate, url, settings)
            yield {"QUOTES_DATABASE_URL": url, "QUOTES_REQUIRE_TIMESCALEDB": settings.required_level}


@app.command()
def migrate(
    revision: Annotated[str, typer.Argument(help="Revision to upgrade to.")] = "head",
    *,
    down: Annotated[bool, typer.Option("--down", help="Downgrade to REVISION; `base` deletes everything.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Initialise the database or bring its schema to a revision."""
    settings = _settings(data_dir=data_dir)
    logs.configure(settings)

    async def run() -> None:
        step = schema.downgrade if down else schema.migrate
        if settings.database_url is not None:
            await step(settings.database_url.get_secret_value(), settings, revision)
            return
        async with embedded.embedded_postgres(settings.data_dir) as url:
            await step(url, settings, revision)

    asyncio.run(run())
    errors.print(f"The schema is at {revision if revision != 'head' else schema.head()}.")


@app.command()
def health(
    *,
    wait: Annotated[float, typer.Option(min=0, callback=_a_number, help="Seconds to wait until healthy.")] = 0,
    retry: Annotated[int, typer.Option(min=0, help="Further tries, a second apart, until healthy.")] = 0,
    report: Annotated[str | None, typer.Option(help="URL to POST the result to, four tries in 4 s.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Run the three checks; print JSON; exit 0 if healthy or degraded, 1 if not, 3 if only --report failed."""
    del as_json  # it always is
    deadline = time.monotonic() + wait
    tries = 0
    while True:
        result = asyncio.run(_look(data_dir))
        tries += 1
        if result.status != "unhealthy" or (tries > retry and time.monotonic() >= deadline):
            break
        time.sleep(1)
    text = msgspec.json.format(msgspec.json.encode(result.to_dict()))
    typer.echo(text.decode())
    unhealthy = result.status == "unhealthy"
    failure = None if report is None else asyncio.run(_report(report, text))
    if failure is not None:
        errors.print(f"[red]error:[/red] The result could not be reported: {failure}.", highlight=False)
    raise typer.Exit(1 if unhealthy else _UNREPORTED if failure else 0)


async def _look(data_dir: Path | None) -> Report:
    """The three checks; of settings that are wrong the report says so, for whoever reads nothing but JSON."""
    try:
        settings = _settings(data_dir=data_dir)
        database = Database(_database_url(settings), settings)
    except ValidationError as error:
        return unreachable(" ".join(f"{told}." for told in faults(error)))
    except QuotesError as error:
        return unreachable(error.detail)
    return await Health(SystemRepository(database), settings, schema.head()).report()


def _database_url(settings: Settings) -> str:
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return embedded.url(settings.data_dir)


async def _report(url: str, body: bytes) -> str | None:
    """Why the supervisor did not take the report; None if it did. The URL may hold a password and is not named."""
    failure = "no answer in time"
    try:
        async with asyncio.timeout(_REPORTING), httpx.AsyncClient(timeout=_REPORTING) as client:
            for pause in (*_PAUSES, None):
                failure, again = await _post(client, url, body)
                if not failure or not again:
                    break
                if pause is not None:
                    await asyncio.sleep(pause)
    except TimeoutError:
        pass  # what the last try ended with
    return failure or None


async def _post(client: httpx.AsyncClient, url: str, body: bytes) -> tuple[str, bool]:
    """Why one try failed, empty if it did not, and whether another one may not."""
    try:
        answer = await client.post(url, content=body, headers={"content-type": "application/json"})
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        return "the URL is none of http or https", False
    except httpx.HTTPError as error:
        return f"no answer ({type(error).__name__})", True
    if answer.is_success:
        return "", False
    # Others will not think otherwise of the same report.
    return f"the supervisor answered {answer.status_code}", answer.is_server_error or answer.status_code in {408, 429}


@app.command()
def load(
    files: Annotated[
        list[Path],
        typer.Argument(parser=a_file, metavar="FILES...", help="CSV, NDJSON or Parquet; `.gz` too for text."),
    ],
    url: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_URL,
    *,
    file_format: Annotated[
        loading.FileFormat | None, typer.Option("--format", help="Format, if the name does not tell.")
    ] = None,
    encoding: Annotated[Encoding, typer.Option(help="Encoding of text without a byte order mark.")] = "utf-8",
    symbol: Annotated[str | None, typer.Option(help="Symbol of files without such a column.")] = None,
    tz: Annotated[str | None, typer.Option(help="IANA zone of times without an offset.")] = None,
    on_conflict: Annotated[OnConflict, typer.Option(help="What to do with keys that are stored.")] = "update",
    ties: Annotated[
        Ties,
        typer.Option(
            help="Rows of one symbol and instant: `number` keeps all, a nanosecond apart; `replace` the last one, or "
            "under --on-conflict merge what all of them have."
        ),
    ] = "number",
    prices: Annotated[
        Prices | None, typer.Option(help="Whether prices of 0 and below are prices; unset: what the service is set to.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Value of `source` for every quote.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--map", help="FIELD=COLUMN, as in price=Close; repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Quotes in one request.")] = 10_000,
    state: Annotated[
        Path | None, typer.Option(parser=a_file, metavar="FILE", help="File that remembers how far a load came.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an earlier load of the file ended.")] = True,
    rejects: Annotated[
        Path | None, typer.Option(parser=a_file, metavar="FILE", help="File for the rows that were refused.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load files into a running service; refused rows go to a file beside them, an interrupted load goes on."""
    report = asyncio.run(
        loading.run(
            loading.LoadOptions(
                files=files,
                url=url,
                format=file_format,
                encoding=encoding,
                symbol=symbol,
                tz=tz,
                on_conflict=on_conflict,
                ties=ties,
                prices=prices,
                source=source,
                columns=loading.column_map(columns or []),
                batch_size=batch_size,
                state=state,
                resume=resume,
                rejects=rejects,
                json=as_json,
            )
        )
    )
    raise typer.Exit(1 if report.rejected or report.failed else 130 if report.interrupted else 0)


@app.command()
def demo(
    url: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_URL,
    *,
    symbols: Annotated[int, typer.Option(min=1, max=len(market.INSTRUMENTS), help="Instruments.")] = 24,
    days: Annotated[int, typer.Option(min=0, help="Whole days of history before today.")] = 3,
    rate: Annotated[float, typer.Option(min=0.1, callback=_a_number, help="Live quotes a second.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Seed of the market.")] = market.DEFAULT_SEED,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0, callback=_a_number, help="Seconds of live quotes; 0 for none.", show_default="until Ctrl-C"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Feed a believable market into a running service: some days of history, then live quotes."""
    asyncio.run(
        market.run(
            market.DemoOptions(
                url=url, symbols=symbols, days=days, rate=rate, seed=seed, duration=duration, json=as_json
            )
        )
    )


@app.command("settings")
def list_settings(*, as_json: Json = False) -> None:
    """List every setting: its variable, its default and what it does."""
    rows = [
        {
            "variable": f"QUOTES_{name.upper()}",
            "default": "" if field.default is None else _plain(field.default),
            "meaning": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return
    table = Table("Variable", "Default", "Meaning")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def _plain(value: object) -> str:
    if isinstance(value, timedelta):
        days, seconds = value.days, value.total_seconds()
        return f"{days} day{'s' if days > 1 else ''}" if days and not value.seconds else f"{seconds:g} s"
    if isinstance(value, SecretStr):
        return "a constant"
    return str(value).lower() if isinstance(value, bool) else str(value)
