r"""First figures: ingest over HTTP beside `psql \copy`, reads over HTTP beside bare asyncpg.

Ingest: the same quotes, only later in time with each turn, go into the same table by `psql \copy` (one stream) and
as JSON in batches of 10,000 and of 1,000 over HTTP. `psql` is the ceiling, not an equal: it checks no rule, knows no
conflict, and leaves `quotes.latest` as it was. The table is checked to hold the rows after each turn.

Reads: 600 quotes of one symbol, the newest quote of one symbol, and that of all. Over HTTP; through the repository;
by the service's own statement on a bare asyncpg connection; and by the statement that one would write by hand in an
afternoon, on another. All are checked to give the same quotes before any is timed.

The client is this process: connections that stay open, requests encoded beforehand, answers checked afterwards. It
shares the machine with the service and the database, so what it consumes is shown beside theirs.
"""

import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import asyncpg
import typer

from app.clock import nanoseconds, rfc3339
from app.db.engine import Connection, Database
from app.quote.fields import NAMES
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Range
from app.settings import Settings
from benchmarks.client import HttpConnection, get, post, send_all
from benchmarks.report import DatabaseUrl, JsonFile, MarkdownFile, Psql, Report, Steps, run
from benchmarks.rivals import of_service
from benchmarks.side_by_side import (
    QUANTILES,
    BenchmarkError,
    Sheet,
    Spread,
    alternate,
    figure,
    quantile,
    ratio,
)
from benchmarks.target import Target, memory_bytes, running_target
from benchmarks.ticks import SEED, SYMBOLS, Ticks
from benchmarks.turns import BUSY, PSQL, WHO, Turn, Turns, acknowledged, cost, mebibytes

FLOOR: Final = 50_000
HISTORY_SPAN: Final = timedelta(days=5)
CHUNK: Final = 200_000
RANGE_ROWS: Final = 600
#: Quotes of the symbol in the time range that is asked for, so that the limit decides and not its end.
RANGE_SPAN_ROWS: Final = 900
#: A statement that takes long is called less often.
TURN_SECONDS: Final = 3.0
COLUMNS: Final = ", ".join(NAMES)

READS: Final = (
    "Reads, one at a time: `HTTP` on a kept connection, body unparsed; `repository` is the same call without HTTP;"
    " `same statement` is the repository's SQL on a bare asyncpg connection set up alike; `plain SELECT` is the SQL of"
    " an afternoon on another, up to asyncpg records. Each turn gives its own p50; median, min and max are over turns,"
    " p95 and p99 are their medians."
)
SERVICE: Final = "HTTP"
REPOSITORY: Final = "repository"
SAME: Final = "same statement"
PLAIN: Final = "plain SELECT"


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure."""

    rounds: int
    rows: int
    clients: int
    history: int
    reads: int


class Bench:
    """The measurement of one target."""

    def __init__(self, target: Target, admin: Connection, options: Options, steps: Steps) -> None:
        self.target = target
        self.options = options
        self._admin = admin
        self.announce = steps.announce
        self._ticks = Ticks()
        span = timedelta(microseconds=options.rows * BUSY)
        start = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1) - (options.rounds + 1) * 3 * span
        self._turns = Turns(target, admin, start, self._ticks)
        self._service = of_service(target, admin)
        self._history = start - HISTORY_SPAN
        self._history_step = HISTORY_SPAN / timedelta(microseconds=1) / options.history
        steps.expect((options.rounds + 1) * (3 + 3 * 4) + 1)

    # --- ingest ---

    async def load_history(self) -> None:
        """Fill the table that reads are measured on."""
        self.announce(f"loading {self.options.history:,} quotes")
        for first in range(0, self.options.history, CHUNK):
            rows = range(first, min(first + CHUNK, self.options.history))
            bodies = self._ticks.bodies("JSON", self._history, rows, self._history_step, 10_000)
            requests = [post("/v1/quotes", body) for body in bodies]
            acknowledged(await send_all(self.target.port, requests, self.options.clients), len(rows))
        await self._admin.execute("VACUUM (ANALYZE) quotes.real_time")
        await self._admin.execute("VACUUM (ANALYZE) quotes.latest")

    async def ingest(self) -> dict[str, list[Turn]]:
        """All turns of ingest."""
        rows, clients = self.options.rows, self.options.clients
        contenders: dict[str, Callable[[], Awaitable[Turn]]] = {PSQL: partial(self._turns.copy, rows)}
        for batch in (10_000, 1_000):
            contenders[_by(batch)] = partial(self._turns.send, self._service, "JSON", batch, clients, rows)
        return await alternate(contenders, self.options.rounds, self.announce)

    # --- reads ---

    async def reads(self) -> "list[Reads]":
        """All turns of reads."""
        settings = Settings(
            _env_file=None,
            database_url=self.target.database_url,
            require_timescaledb="none",
            retention=None,
        )
        database = RecordingDatabase(self.target.database_url, settings)
        try:
            await database.connect()
            # One session is set up as those of the service are, the other as the driver does it by itself.
            async with database.dedicated(statement_timeout=timedelta(minutes=1)) as same:
                plain = await asyncpg.connect(self.target.database_url)
                try:
                    return [
                        Reads(case.name, case.plain, await self._read(case, Connections(database, same, plain)))
                        for case in self._cases(QuoteRepository(database, settings))
                    ]
                finally:
                    await plain.close()
        finally:
            await database.close()

    def _cases(self, repository: QuoteRepository) -> list["Case"]:
        random = Random(SEED)
        window = timedelta(microseconds=RANGE_SPAN_ROWS * len(SYMBOLS) * self._history_step)
        ranges = []
        for _ in range(self.options.reads):
            start = self._history + random.random() * (HISTORY_SPAN - window)
            ranges.append((random.choice(SYMBOLS), start, start + window))
        names = [random.choice(SYMBOLS) for _ in ranges]

        async def page(i: int) -> str:
            symbol, start, end = ranges[i]
            page = await repository.quotes_page(Range([symbol], nanoseconds(start), nanoseconds(end), RANGE_ROWS))
            return ",".join(page.rows)

        async def latest(i: int) -> str:
            return (await repository.latest_rows([names[i]]))[0]

        async def latest_of_all(_: int) -> str:
            return (await repository.latest_rows(None))[0]

        return [
            Case(
                f"Range of {RANGE_ROWS} quotes of one symbol",
                [
                    "/v1/quotes?"
                    + urlencode({"symbols": symbol, "start": rfc3339(start), "end": rfc3339(end), "limit": RANGE_ROWS})
                    for symbol, start, end in ranges
                ],
                page,
                f"SELECT {COLUMNS} FROM quotes.real_time WHERE symbol = $1 AND timestamp >= $2 AND timestamp < $3"
                f" ORDER BY timestamp LIMIT {RANGE_ROWS}",
                ranges,
                RANGE_ROWS,
            ),
            Case(
                "Latest quote of one symbol",
                [f"/v1/quotes/latest?symbols={name}" for name in names],
                latest,
                f"SELECT {COLUMNS} FROM quotes.real_time WHERE symbol = $1 ORDER BY timestamp DESC LIMIT 1",
                [(name,) for name in names],
                1,
            ),
            Case(
                f"Latest quote of all {len(SYMBOLS)} symbols",
                ["/v1/quotes/latest"] * len(ranges),
                latest_of_all,
                f"SELECT DISTINCT ON (symbol) {COLUMNS} FROM quotes.real_time ORDER BY symbol, timestamp DESC",
                [()] * len(ranges),
                len(SYMBOLS),
            ),
        ]

    async def _read(self, case: "Case", to: "Connections") -> dict[str, list[list[float]]]:
        requests = [get(path) for path in case.paths]
        statement, arguments = await _statement_of(case, to.database)

        async def same(i: int) -> list[Any]:
            return await to.same.fetch(statement, *arguments[i])

        async def plain(i: int) -> list[Any]:
            return await to.plain.fetch(case.plain, *case.arguments[i])

        async def http(calls: int) -> list[float]:
            # The service hangs up on a connection that idles through the turns of others: a new one each turn.
            with HttpConnection(self.target.port) as connection:

                async def send(i: int) -> bytes:
                    return connection.send(requests[i])

                return await _timed(send, calls)

        for i in (0, len(requests) // 2):
            with HttpConnection(self.target.port) as connection:
                answer = connection.send(requests[i])
            (value,) = (await same(i))[0][:1]
            stated = value if isinstance(value, str) else ",".join(value[: case.rows])
            given = {
                SERVICE: _parse(answer.decode())["quotes"],
                REPOSITORY: _parse(f"[{await case.repository(i)}]"),
                SAME: _parse(f"[{stated}]"),
            }
            expected = [tuple(row) for row in await plain(i)]
            for name, quotes in given.items():
                if len(expected) != case.rows or [_row(quote) for quote in quotes] != expected:
                    raise BenchmarkError(f"{case.name}: {name} and {PLAIN} do not give the same {case.rows} quotes.")

        calls = len(requests)
        contenders: dict[str, Callable[[], Awaitable[list[float]]]] = {
            SERVICE: partial(http, calls),
            REPOSITORY: partial(_timed, case.repository, calls),
            SAME: partial(_timed, same, calls),
            PLAIN: partial(_timed, plain, calls),
        }
        return await alternate(contenders, self.options.rounds, lambda text: self.announce(f"{case.name}, {text}"))


@dataclass(frozen=True, slots=True)
class Reads:
    """Milliseconds of each call, by contender and round."""

    case: str
    plain: str
    milliseconds: dict[str, list[list[float]]]


@dataclass(frozen=True, slots=True)
class Connections:
    """The ways to read."""

    database: "RecordingDatabase"
    same: Connection
    plain: Connection


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of read, by HTTP path, by the repository and by a plain statement with its arguments."""

    name: str
    paths: list[str]
    repository: Callable[[int], Awaitable[str]]
    plain: str
    arguments: Sequence[tuple[Any, ...]]
    rows: int


class RecordingDatabase(Database):
    """Pools that can tell which statements went through them."""

    seen: list[tuple[str, Sequence[Any]]] | None = None

    @asynccontextmanager
    async def acquire(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Connection]:
        """A pooled connection."""
        async with super().acquire(*arguments, **keywords) as connection:
            if self.seen is None:
                yield connection
                return
            with connection.query_logger(self._see):
                yield connection

    def _see(self, query: Any) -> None:
        # The driver asks for the types that it meets, on the same connection.
        if self.seen is not None and " quotes." in query.query:
            self.seen.append((query.query, query.args))


async def _statement_of(case: Case, database: RecordingDatabase) -> tuple[str, list[Sequence[Any]]]:
    """The statement that the repository runs, and its arguments for each call."""
    database.seen = []
    for i in range(len(case.paths)):
        await case.repository(i)
    seen, database.seen = database.seen, None
    statements = {statement for statement, _ in seen}
    if len(statements) != 1 or len(seen) != len(case.paths):
        raise BenchmarkError(f"{case.name}: the repository does not read with one statement a call.")
    return statements.pop(), [arguments for _, arguments in seen]


def _parse(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def _row(quote: dict[str, Any]) -> tuple[Any, ...]:
    return quote["symbol"], datetime.fromisoformat(quote["timestamp"]), *(quote[name] for name in NAMES[2:])


async def _timed(call: Callable[[int], Awaitable[object]], calls: int) -> list[float]:
    """Milliseconds of each call; fewer calls when they take long."""
    took = []
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + TURN_SECONDS
        for i in range(calls):
            began = time.perf_counter()
            await call(i)
            now = time.perf_counter()
            took.append(1000 * (now - began))
            if now > end:
                break
    finally:
        gc.enable()
    return took


# --- report ---


def _by(batch: int) -> str:
    return f"JSON by {batch:,}"


def ingest_sheets(results: dict[str, list[Turn]], options: Options, peak: int | None) -> list[Sheet]:
    rates = {name: [run.rate for run in runs] for name, runs in results.items()}
    floor = Spread.of(rates[_by(10_000)])
    kept = "kept by every round" if floor.low >= FLOOR else "kept by the median" if floor.median >= FLOOR else "missed"
    speed = Sheet(
        f"Ingest: {options.rows:,} quotes a turn, {options.rounds} rounds, {options.clients} HTTP clients",
        ["", "quotes/s, median", "min", "max", "x psql"],
        [
            [
                name,
                *(f"{value:,.0f}" for value in (spread.median, spread.low, spread.high)),
                "1" if name == PSQL else str(ratio(of, rates[PSQL])),
            ]
            for name, of in rates.items()
            for spread in (Spread.of(of),)
        ],
        [
            f"Floor of {FLOOR:,} quotes/s in batches of 10,000: {kept}.",
            "psql sends one stream in one transaction; it checks no rule and does not keep quotes.latest.",
            "The service acknowledges each batch after its commit.",
        ],
    )
    costs = Sheet(
        "Ingest: acknowledgement and cost",
        ["", *(f"p{100 * q:.0f} ms" for q in QUANTILES), *(f"{who} CPU us/quote" for who in WHO), "server RSS MiB"],
        [
            [
                name,
                *(
                    "" if name == PSQL else f"{quantile([ms for run in runs for ms in run.latencies_ms], share):,.0f}"
                    for share in QUANTILES
                ),
                *(cost(runs, who) for who in WHO),
                mebibytes(runs[-1].rss),
            ]
            for name, runs in results.items()
        ],
        [
            "Latencies of all rounds together, CPU as the median of the rounds; all three share the machine.",
            f"The service's memory was {mebibytes(peak)} MiB at its peak.",
        ],
    )
    return [speed, costs]


def read_sheet(reads: Reads) -> Sheet:
    results = reads.milliseconds
    middles = {name: [quantile(turn, 0.5) for turn in turns] for name, turns in results.items()}
    rows = []
    for name, turns in results.items():
        p50, p95, p99 = (Spread.of([quantile(turn, share) for turn in turns]) for share in QUANTILES)
        figures = [figure(value) for value in (p50.median, p50.low, p50.high, p95.median, p99.median)]
        ratios = ["1" if name == to else str(ratio(middles[name], middles[to])) for to in (SAME, PLAIN)]
        rows.append([name, *figures, *ratios, f"{sum(map(len, turns)):,}"])
    columns = ["", "p50 ms, median", "min", "max", "p95 ms", "p99 ms"]
    return Sheet(reads.case, [*columns, "p50 x same", "p50 x plain", "calls"], rows, [f"plain SELECT: `{reads.plain}`"])


async def _measure(database_url: str | None, psql: Path | None, options: Options, steps: Steps) -> Report:
    async with running_target(database_url, psql) as target:
        admin = await asyncpg.connect(target.database_url)
        try:
            bench = Bench(target, admin, options, steps)
            await bench.load_history()
            reads = await bench.reads()
            ingest = await bench.ingest()
            memory = memory_bytes(target.service)
        finally:
            await admin.close()
    peak = memory[1] if memory else None
    return Report(
        target.about,
        [*ingest_sheets(ingest, options, peak), *map(read_sheet, reads)],
        {
            "options": asdict(options),
            "ingest": {name: [asdict(turn) for turn in turns] for name, turns in ingest.items()},
            "reads": [asdict(reads_) for reads_ in reads],
            "peak_rss": peak,
        },
        READS,
    )


def main(
    database_url: DatabaseUrl = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 5,
    rows: Annotated[int, typer.Option(min=10_000, help="Quotes of one turn of ingest.")] = 320_000,
    clients: Annotated[int, typer.Option(min=1, help="Connections that send at once.")] = 4,
    history: Annotated[int, typer.Option(min=100_000, help="Quotes that are read from.")] = 1_000_000,
    reads: Annotated[int, typer.Option(min=2, help="Reads of one turn.")] = 200,
    psql: Psql = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure ingest beside psql, and reads beside bare asyncpg, in one run."""
    options = Options(rounds, rows, clients, history, reads)
    run(
        "benchmarks.first",
        lambda steps: [_measure(database_url, psql, options, steps)],
        json_file,
        markdown_file,
    )


if __name__ == "__main__":
    typer.run(main)
