"""How much smaller the columnstore makes a month of quotes, what each column costs, and what late writes cost then.

Invariant: the quotes are generated from a seed with every column filled and arrive in the order of time, as a
streamer sends them; the sizes are what PostgreSQL occupies, indexes and TOAST included, before and after.

The market: each symbol is quoted once a second of a session of 6.5 hours on weekdays, and each quote arrives with
a latency of its own, log-normal around 30 ms, in microseconds. The last price walks on ticks of a cent (unchanged in
60 % of the quotes), bid and ask lie one to three ticks apart around it, sizes are round lots, mostly small, and
volume is what traded. Every symbol has one source. `--arrivals poisson` replaces the clock by exponential gaps.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import asyncpg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from pgpq import ArrowToPostgresBinaryEncoder
from rich.console import Console

from app.db.capability import Level
from app.db.engine import Connection, Database
from app.db.migrate import migrate
from app.errors import QuotesError
from app.quote.fields import COLUMNS, DECIMAL, INSTANT, KEY, NAMES, PRECISION, PRICES, SCALE, SIZES
from app.repository.quotes import QuoteRepository
from app.settings import Settings
from benchmarks.side_by_side import BenchmarkError, Sheet, command, machine
from benchmarks.target import fresh_database
from tests.pglite_lane import LaneUnavailable, timescaledb_server

SESSION: Final = 23_400  # seconds of 6.5 hours
FIRST_DAY: Final = datetime(2026, 1, 5, 14, 30, tzinfo=UTC)
SOURCES: Final = ("alpaca", "yfinance", "polygon")
LATE: Final = (
    "Unchanged, upsert and backfill are 5,000 quotes of one day through the repository, in one transaction; "
    "a delete is one statement."
)


@dataclass(frozen=True, slots=True)
class Market:
    """What to generate."""

    symbols: int
    days: int
    every: int
    seed: int
    arrivals: str = "clock"

    def sessions(self) -> list[datetime]:
        """The openings of the sessions: weekdays."""
        found = [FIRST_DAY + timedelta(days=i) for i in range(2 * self.days + 7)]
        return [day for day in found if day.weekday() < 5][: self.days]

    def generate(self) -> Iterator[pa.RecordBatch]:
        """The quotes, a session at a time, in order of arrival."""
        rng = np.random.default_rng(self.seed)
        last = rng.integers(2_000, 50_000, self.symbols)
        for opening in self.sessions():
            parts = []
            for number in range(self.symbols):
                batch, last[number] = self._session(rng, number, int(last[number]), opening)
                parts.append(batch)
            yield pa.Table.from_batches(parts).sort_by("timestamp").combine_chunks().to_batches()[0]

    def _session(
        self, rng: np.random.Generator, number: int, last: int, opening: datetime
    ) -> tuple[pa.RecordBatch, int]:
        rows = SESSION // self.every
        start = int(opening.timestamp()) * 1_000_000
        if self.arrivals == "poisson":
            at = start + np.cumsum(rng.exponential(self.every * 1e6, rows).astype(np.int64) + 1)
        else:
            latency = rng.lognormal(np.log(30_000), 0.5, rows).astype(np.int64)
            at = start + np.arange(rows, dtype=np.int64) * self.every * 1_000_000 + latency
        at = np.maximum.accumulate(at) + np.arange(rows)  # keys are unique
        moves = rng.choice([-3, -2, -1, 0, 1, 2, 3], rows, p=[0.01, 0.04, 0.15, 0.6, 0.15, 0.04, 0.01])
        price = np.maximum(last + np.cumsum(moves), 100)
        below = rng.choice([0, 1, 2], rows, p=[0.5, 0.4, 0.1])
        spread = rng.choice([1, 2, 3], rows, p=[0.7, 0.2, 0.1])
        bid = price - np.minimum(below, spread)
        batch = pa.RecordBatch.from_arrays(
            [
                pa.array([f"SYM{number:03}"] * rows),
                pa.array(at).cast(INSTANT),
                pa.repeat(pa.scalar(0, pa.int16()), rows),
                _price(price),
                _price(bid),
                _price(bid + spread),
                _whole(100 * np.minimum(rng.geometric(0.3, rows), 50)),
                _whole(100 * np.minimum(rng.geometric(0.3, rows), 50)),
                _whole(np.where(rng.random(rows) < 0.5, 100 * rng.geometric(0.5, rows), rng.integers(1, 100, rows))),
                pa.array([SOURCES[number % len(SOURCES)]] * rows),
            ],
            schema=COLUMNS,
        )
        return batch, int(price[-1])


def _whole(numbers: Any) -> pa.Array:
    return pa.array(numbers).cast(pa.decimal128(38, SCALE)).cast(DECIMAL)


def _price(cents: Any) -> pa.Array:
    return pc.multiply(pa.array(cents).cast(pa.decimal128(20, 0)), pa.scalar(Decimal("0.01"))).cast(DECIMAL)


#: Indexes by time: that of the migration, and the one that an application of an afternoon would have.
_BRIN: Final = "USING brin (timestamp) WITH (pages_per_range = 512, autosummarize = on)"
_BTREE: Final = "(timestamp DESC)"
#: The first release for which the migration names the sparse index.
_NAMES_SPARSE: Final = (2, 26)


@dataclass(frozen=True, slots=True)
class Variant:
    """Another table of the same quotes, to see what one choice costs."""

    name: str
    select: dict[str, str]
    types: dict[str, str]
    order: str = "timestamp"
    orderby: str = "timestamp DESC, nanos DESC"
    chunk: str = "1 day"
    #: Which sparse indexes; by themselves releases from 2.26 on add a bloom filter over the key.
    sparse: Literal["as migrated", "by default", "none"] = "as migrated"
    time_index: str = _BRIN


_TYPES: Final = {
    "symbol": 'text COLLATE "C"',
    "timestamp": "timestamptz",
    "nanos": "smallint",
    "source": "text",
    **dict.fromkeys((*PRICES, *SIZES), f"numeric({PRECISION},{SCALE})"),
}
_ALL: Final = Variant("", {name: name for name in COLUMNS.names}, _TYPES)


def _without(*names: str) -> Variant:
    return replace(_ALL, name=f"without {', '.join(names)}", select={n: n for n in COLUMNS.names if n not in names})


def _as(name: str, kind: str, columns: Sequence[str], expression: str = "{}") -> Variant:
    return replace(
        _ALL,
        name=name,
        types=_TYPES | dict.fromkeys(columns, kind),
        select=_ALL.select | {column: f"{expression.format(column)}::{kind}" for column in columns},
    )


VARIANTS: Final = (
    _without("bid_size", "ask_size"),
    _without("bid", "ask"),
    _without("volume"),
    _without("source"),
    _without("bid", "ask", "bid_size", "ask_size"),
    replace(_without("nanos"), orderby="timestamp DESC"),
    _as("millisecond timestamps", "timestamptz", ["timestamp"], "date_trunc('milliseconds', {})"),
    _as("prices as double precision", "float8", PRICES),
    _as("prices as bigint ticks", "bigint", PRICES, "({} * 100)"),
    _as("sizes as bigint", "bigint", SIZES),
    replace(_ALL, name="loaded symbol by symbol", order="symbol, timestamp"),
    replace(_ALL, name="ordered by time ASC", orderby="timestamp ASC, nanos ASC"),
    replace(_ALL, name="chunks of 7 days", chunk="7 days"),
    replace(_ALL, name="without idx_timestamp", time_index=""),
    replace(_ALL, name="a B-tree as idx_timestamp", time_index=_BTREE),
    replace(_ALL, name="sparse indexes by default", sparse="by default"),
    replace(_ALL, name="sparse indexes off", sparse="none"),
)


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes before and after, of all and of the indexes alone."""

    rows: int
    before: int
    before_index: int
    after: int
    after_index: int

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.before / self.after


_SIZES: Final = """
SELECT sum(before_compression_total_bytes)::bigint, sum(before_compression_index_bytes)::bigint,
       sum(after_compression_total_bytes)::bigint, sum(after_compression_index_bytes)::bigint
FROM chunk_columnstore_stats($1::regclass)"""


async def load(connection: Connection, market: Market) -> int:
    """Fill `quotes.real_time` by COPY, in order of arrival."""
    rows = 0
    for batch in market.generate():

        async def encoded(batch: pa.RecordBatch = batch) -> Any:
            encoder = ArrowToPostgresBinaryEncoder(COLUMNS)
            yield encoder.write_header()
            for part in range(0, len(batch), 20_000):
                yield encoder.write_batch(batch.slice(part, 20_000))
            yield encoder.finish()

        await connection.copy_to_table(
            "real_time", schema_name="quotes", columns=COLUMNS.names, format="binary", source=encoded()
        )
        rows += len(batch)
    return rows


async def compress(connection: Connection, table: str, rows: int) -> Size:
    """Move every chunk to the columnstore; sizes as the server recorded them."""
    for (chunk,) in await connection.fetch(f"SELECT show_chunks('{table}')::text"):
        await connection.execute(f"CALL convert_to_columnstore('{chunk}')")
    before, before_index, after, after_index = await connection.fetchrow(_SIZES, table) or (0, 0, 0, 0)
    return Size(rows, before, before_index, after, after_index)


async def measure(connection: Connection, variant: Variant, rows: int, timescaledb: str) -> Size:
    """Build a table of the variant from the stored quotes, compress it, drop it."""
    named = tuple(map(int, timescaledb.split(".")[:2])) >= _NAMES_SPARSE
    options = {
        "as migrated": """, timescaledb.sparse_index = 'minmax("timestamp")'""" if named else "",
        "by default": "",
        "none": ", timescaledb.index = ''",
    }
    columns = ", ".join(f"{n} {variant.types[n]}{' NOT NULL' if n in KEY else ''}" for n in variant.select)
    key = ", ".join(name for name in KEY if name in variant.select)
    await connection.execute(f"""
        CREATE TABLE public.variant ({columns}, PRIMARY KEY ({key}));
        SELECT create_hypertable('public.variant', by_range('timestamp', interval '{variant.chunk}'),
                                 create_default_indexes => false);""")
    if variant.time_index:
        await connection.execute(f"CREATE INDEX ON public.variant {variant.time_index}")
    await connection.execute(f"""
        ALTER TABLE public.variant SET (timescaledb.enable_columnstore, timescaledb.segmentby = 'symbol',
            timescaledb.orderby = '{variant.orderby}'{options[variant.sparse]})""")
    # The last symbols of a day would else meet the first ones of the next in the order of the heap.
    await connection.execute(f"""
        INSERT INTO public.variant ({", ".join(variant.select)})
        SELECT {", ".join(variant.select.values())} FROM quotes.real_time ORDER BY {variant.order}
        ON CONFLICT DO NOTHING""")
    size = await compress(connection, "public.variant", rows)
    await connection.execute("DROP TABLE public.variant")
    return size


async def columns_cost(connection: Connection) -> dict[str, int]:
    """Bytes of each column in the compressed chunks, TOAST included, without the rows' own overhead."""
    tables = await connection.fetch("""
        SELECT s.compress_relid::regclass::text FROM _timescaledb_catalog.compression_settings s
        WHERE s.relid IN (SELECT show_chunks('quotes.real_time')) AND s.compress_relid IS NOT NULL""")
    cost: dict[str, int] = {}
    for (table,) in tables:
        names = await connection.fetch(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped",
            table,
        )
        sums = ", ".join(f'sum(pg_column_size("{name}"))::bigint' for (name,) in names)
        row = await connection.fetchrow(f"SELECT {sums} FROM {table}") or ()
        for (name,), value in zip(names, row, strict=True):
            label = "per-batch metadata" if name.startswith("_ts_meta") else name
            cost[label] = cost.get(label, 0) + (value or 0)
    return cost


async def write_costs(repository: QuoteRepository, market: Market, rounds: int, rows: int) -> dict[str, list[float]]:
    """Milliseconds of writes by the service's own path into a day, as often as asked; values differ each time."""
    days = market.sessions()
    times: dict[str, list[float]] = {}
    for turn in range(rounds):
        opening = days[turn % len(days)]
        start = opening + timedelta(minutes=30 + 5 * turn)
        for kind, symbols in (("one symbol", 1), ("all symbols", market.symbols)):
            names = [f"SYM{i:03}" for i in range(symbols)]
            each = rows // symbols
            stored = await repository.get_quotes(names, start, start + timedelta(hours=5), limit=10**7)
            picked: list[dict[str, Any]] = []
            for name in names:
                picked += [{n: getattr(quote, n) for n in NAMES} for quote in stored if quote.symbol == name][:each]
            changed = [quote | {"volume": quote["volume"] + 1 + turn} for quote in picked]
            fresh = [quote | {"timestamp": quote["timestamp"] + timedelta(microseconds=500_000)} for quote in picked]
            for what, batch in (("unchanged", picked), ("upsert", changed), ("backfill", fresh)):
                began = time.perf_counter()
                await repository.bulk_insert(batch)
                label = f"{what}, {kind}"
                times.setdefault(label, []).append(1000 * (time.perf_counter() - began))
    return times


async def delete_cost(connection: Connection, market: Market, rounds: int) -> list[float]:
    """Milliseconds to delete an hour of one symbol."""
    times = []
    for turn in range(rounds):
        start = market.sessions()[turn % market.days] + timedelta(hours=5)
        began = time.perf_counter()
        await connection.execute(
            "DELETE FROM quotes.real_time WHERE symbol = $1 AND timestamp >= $2 AND timestamp < $3",
            f"SYM{turn % market.symbols:03}", start, start + timedelta(hours=1),
        )  # fmt: skip
        times.append(1000 * (time.perf_counter() - began))
    return times


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of a run."""

    server: str
    migrated: Size
    seconds: float
    variants: dict[str, Size]
    columns: dict[str, int]
    plain: dict[str, list[float]]
    late: dict[str, list[float]]


async def run(url: str, market: Market, variants: Sequence[Variant], rounds: int, pool: int, screen: Console) -> Result:
    """Everything, in an empty database at `url`."""
    settings = Settings(
        _env_file=None,
        database_url=url,
        retention=None,
        compress_after=timedelta(days=36_500),
        pool_size=pool,
        write_timeout=timedelta(minutes=5),
        statement_timeout=timedelta(minutes=5),
        require_timescaledb="none",
    )
    await migrate(url, settings)
    database = Database(url, settings)
    await database.connect()
    repository = QuoteRepository(database, settings)
    capability = database.capability
    if capability.level < Level.COMMUNITY:
        raise BenchmarkError(f"The columnstore needs a community TimescaleDB; this server is {capability.level}.")
    quiet = timedelta(hours=1)
    async with database.dedicated(statement_timeout=quiet) as connection:
        # Background jobs would measure themselves too.
        await connection.fetch(
            "SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs WHERE job_id >= 1000"
        )
        screen.print("loading")
        rows = await load(connection, market)
    screen.print(f"{rows:,} quotes; writing into uncompressed chunks")
    plain = await write_costs(repository, market, rounds, 5_000) if rounds else {}
    async with database.dedicated(statement_timeout=quiet) as connection:
        if rounds:
            plain["delete an hour, one symbol"] = await delete_cost(connection, market, rounds)
            await connection.execute("TRUNCATE quotes.real_time, quotes.latest")
            await load(connection, market)
        sizes = {}
        for variant in variants:
            screen.print(f"compressing: {variant.name}")
            sizes[variant.name] = await measure(connection, variant, rows, str(capability.timescaledb))
        if variants and market.arrivals == "clock":
            screen.print("compressing: Poisson arrivals")
            await connection.execute("TRUNCATE quotes.real_time")
            poisson = await load(connection, replace(market, arrivals="poisson"))
            sizes["Poisson arrivals"] = await compress(connection, "quotes.real_time", poisson)
            await connection.execute("TRUNCATE quotes.real_time")
            await load(connection, market)
        screen.print("compressing quotes.real_time")
        began = time.perf_counter()
        migrated = await compress(connection, "quotes.real_time", rows)
        seconds = time.perf_counter() - began
        cost = await columns_cost(connection)
    screen.print("writing into compressed chunks")
    late = await write_costs(repository, market, rounds, 5_000) if rounds else {}
    if rounds:
        async with database.dedicated(statement_timeout=quiet) as connection:
            late["delete an hour, one symbol"] = await delete_cost(connection, market, rounds)
    await database.close()
    server = f"PostgreSQL {capability.postgresql}, TimescaleDB {capability.timescaledb} ({capability.level})"
    return Result(server, migrated, seconds, sizes, cost, plain, late)


def sheets(result: Result) -> list[Sheet]:
    """The tables of a result."""
    size = result.migrated
    rows = [_line("all columns, as migrated", size), *(_line(name, other) for name, other in result.variants.items())]
    found = [
        Sheet(
            f"Size of {size.rows:,} quotes",
            ["table", "ratio", "bytes/quote before", "of them indexes", "bytes/quote after", "of them indexes"],
            rows,
            [f"{size.rows / result.seconds:,.0f} quotes/s moved to the columnstore."],
        ),
        Sheet(
            "What each column costs in the columnstore",
            ["column", "bytes/quote"],
            [[name, f"{cost / size.rows:.3f}"] for name, cost in sorted(result.columns.items(), key=lambda c: -c[1])],
        ),
    ]
    if result.plain:
        costs = [
            [name, *(f"{statistics.median(times[name]):,.1f}" for times in (result.plain, result.late)),
             f"{statistics.median(result.late[name]) / statistics.median(result.plain[name]):.2f}"]
            for name in result.plain
        ]  # fmt: skip
        found.append(
            Sheet(
                "Late writes: milliseconds, median",
                ["write", "into rows", "into columnstore", "x"],
                costs,
                [LATE],
            )
        )  # fmt: skip
    return found


def _line(name: str, size: Size) -> list[str]:
    each = [f"{part / size.rows:.1f}" for part in (size.before, size.before_index, size.after, size.after_index)]
    return [name, f"{size.ratio:.1f}", *each]


def document(about: dict[str, str], found: Sequence[Sheet], repeat: str) -> str:
    """The tables for a document."""
    lines = [f"## {about['database']}", "", f"```\n{repeat}\n```", "", *(f"- {k}: {v}" for k, v in about.items()), ""]
    return "\n".join(lines) + "\n" + "\n".join(sheet.markdown() for sheet in found)


async def _measure(
    url: str | None, market: Market, variants: Sequence[Variant], rounds: int, screen: Console
) -> Result:
    async with AsyncExitStack() as stack:
        if url is not None:
            return await run(await stack.enter_async_context(fresh_database(url)), market, variants, rounds, 2, screen)
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        server = stack.enter_context(timescaledb_server(log))
        # One session serves all clients in turn.
        return await run(server.url, market, variants, rounds, 0, screen)


def main(
    database_url: Annotated[
        str | None, typer.Option(help="Server with a community TimescaleDB; a database is created on it, and dropped.")
    ] = None,
    *,
    wasm: Annotated[bool, typer.Option("--wasm", help="On the WebAssembly TimescaleDB of the tests.")] = False,
    symbols: Annotated[int, typer.Option(min=1, help="Symbols.")] = 10,
    days: Annotated[int, typer.Option(min=1, help="Sessions; a month has 21.")] = 21,
    every: Annotated[
        int, typer.Option(min=0, help="Seconds between quotes of a symbol.", show_default="3, 12 with --wasm")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the quotes.")] = 20260105,
    arrivals: Annotated[str, typer.Option(help="`clock` or `poisson`.")] = "clock",
    rounds: Annotated[int, typer.Option(min=0, help="Late writes of each kind; 0 for none.")] = 5,
    variants: Annotated[bool, typer.Option(help="Measure other columns and settings too.")] = True,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="File for the tables.")] = None,
) -> None:
    """Measure the ratio of the columnstore, by column, and what late writes cost."""
    screen = Console(stderr=True)
    market = Market(symbols, days, every or (12 if wasm else 3), seed, arrivals)
    if wasm == (database_url is not None):
        screen.print("[red]error:[/red] Name a server with --database-url, or take --wasm.", highlight=False)
        sys.exit(2)
    about = machine()
    try:
        result = asyncio.run(_measure(database_url, market, VARIANTS if variants else (), rounds, screen))
    except (BenchmarkError, LaneUnavailable, QuotesError, OSError, asyncpg.PostgresError) as error:
        screen.print("[red]error:[/red]", getattr(error, "detail", None) or str(error), highlight=False)
        sys.exit(1)
    about |= {
        "database": result.server,
        "quotes": f"{market.symbols} symbols, {market.days} sessions, one quote in {market.every} s each, "
        f"{market.arrivals} arrivals, seed {market.seed}",
    }
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, value in about.items():
        console.print(f"[bold]{name}[/bold]: {value}", highlight=False)
    for sheet in sheets(result):
        console.print()
        console.print(sheet.rich())
    ratio = result.migrated.ratio
    console.print(
        f"\n[bold]ratio {ratio:.1f}:1[/bold] {'kept' if ratio >= 10 else 'MISSED'}: at least 10:1 is promised."
    )
    if markdown_file is not None:
        hidden = ("--database-url", "--markdown")
        markdown_file.write_text(document(about, sheets(result), command("benchmarks.storage", hide=hidden)))
    sys.exit(0 if ratio >= 10 else 1)


if __name__ == "__main__":
    typer.run(main)
