r"""Ingest in every format beside `psql \copy`, InfluxDB and the application of an afternoon.

    python -m benchmarks.ingest                 the ratios, and the matrix of the more telling combinations
    python -m benchmarks.ingest ratios          the ratios that have a floor and an aim
    python -m benchmarks.ingest matrix --full   every format, batch size, number of clients and kind of data
    python -m benchmarks.ingest sustained       minutes at full rate while refresh and columnstore policies run
    python -m benchmarks.ingest memory          the service's memory over millions of quotes

Each part runs on a fresh private server, or in a fresh database of `--database-url`, dropped afterwards. What is
compared takes turns; every turn sends other quotes, later in time, and the stored ones are counted after it.
"Duplicate" sends batches a second time, "out of order" shuffles the batches of a turn and the rows of each.

The client is this one process: kept connections on an event loop and requests encoded beforehand, the same for all.
It shares the machine with what it measures, so what it consumes is shown beside it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import asyncpg
import typer

from app.db.engine import Connection
from benchmarks.client import HttpConnection, Refused
from benchmarks.endurance import measure_memory, measure_sustained
from benchmarks.report import DatabaseUrl, JsonFile, MarkdownFile, Psql, Report, Steps, run
from benchmarks.rivals import Door, afternoon, empty_post, influxdb, of_service
from benchmarks.side_by_side import (
    QUANTILES,
    Sheet,
    Spread,
    alternate,
    figure,
    quantile,
    ratio,
    verdict,
)
from benchmarks.target import Target, running_target
from benchmarks.ticks import FORMATS, Ticks
from benchmarks.turns import PSQL, WHO, Data, Turn, Turns, cores, cost, mebibytes

SERVICE_FORMATS: Final = tuple(FORMATS)[:-1]
INFLUXDB: Final = "InfluxDB"
ORM: Final = "FastAPI + ORM"
EMPTY: Final = "empty POST"
BATCHES: Final = (1, 10, 1_000, 10_000)
CLIENTS: Final = 8
MANY: Final = 64
#: Old enough for all turns of a run to be in the past, and young enough to stay out of the columnstore.
AGE: Final = timedelta(days=25)
#: Part of the rows of a turn that is sent in batches of a size, since small ones take longer; and by the ORM.
SHARE: Final = {1: 1 / 160, 10: 1 / 16, 1_000: 1 / 2, 10_000: 1.0}
ORM_SHARE: Final = {1: 1 / 160, 10: 1 / 32, 1_000: 1 / 16, 10_000: 1 / 8}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to send quotes; of `psql`, clients are streams."""

    kind: str
    batch: int
    clients: int
    data: Data = "fresh"

    def __str__(self) -> str:
        plural = "s" if self.clients > 1 else ""
        if self.kind == PSQL:
            return f"{PSQL}, {self.clients} stream{plural}"
        data = "" if self.data == "fresh" else f", {self.data}"
        return f"{self.kind} by {self.batch:,}, {self.clients} client{plural}{data}"


Results = dict[Way, list[Turn]]

COPY: Final = Way(PSQL, 0, 1)
COPIES: Final = Way(PSQL, 0, 2)


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio of two ways' rates, the least that it shall be, and what is aimed at."""

    of: Way
    to: Way
    floor: float
    aim: float


GOALS: Final = (
    Goal(Way("Arrow", 10_000, CLIENTS), COPY, 1.0, 1.4),
    Goal(Way("Arrow", 10_000, CLIENTS), Way(INFLUXDB, 10_000, CLIENTS), 1.0, 1.5),
    Goal(Way("JSON", 10_000, CLIENTS), COPY, 0.6, 0.9),
    Goal(Way("JSON", 1_000, CLIENTS), Way(INFLUXDB, 1_000, CLIENTS), 0.7, 1.0),
    Goal(Way("Arrow", 10_000, CLIENTS, "duplicate"), Way("Arrow", 10_000, CLIENTS), 0.4, 0.7),
    Goal(Way("JSON", 10_000, CLIENTS, "duplicate"), Way("JSON", 10_000, CLIENTS), 0.4, 0.7),
    Goal(Way("JSON", 1_000, CLIENTS), Way(ORM, 1_000, CLIENTS), 10, 20),
    Goal(Way("JSON", 10_000, CLIENTS), Way(ORM, 10_000, CLIENTS), 10, 20),
)
SINGLE_GOAL: Final = Goal(Way("JSON", 1, MANY), Way(EMPTY, 1, MANY), 0.8, 0.95)
#: Milliseconds at the 99th percentile, on a schedule at half of the maximum rate.
P99_FLOOR: Final = 150.0
P99_AIM: Final = 50.0
PACED_BATCH: Final = 1_000


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says for every part."""

    database_url: str | None
    psql: Path | None
    rows: int
    steps: Steps

    @asynccontextmanager
    async def bench(self) -> AsyncIterator["Bench"]:
        """A service and its rivals, ready to be measured."""
        async with AsyncExitStack() as stack:
            target = await stack.enter_async_context(running_target(self.database_url, self.psql))
            admin = await asyncpg.connect(target.database_url)
            stack.push_async_callback(admin.close)
            yield await Bench.begin(stack, target, admin, self)


class Bench:
    """The ways to send quotes to one database."""

    def __init__(self, target: Target, turns: Turns, doors: dict[str, Door], given: Given) -> None:
        self.target = target
        self.service = doors["JSON"]
        self._turns = turns
        self._doors = doors
        self.steps = given.steps
        self._rows = given.rows

    @classmethod
    async def begin(cls, stack: AsyncExitStack, target: Target, admin: Connection, given: Given) -> "Bench":
        """Start the rivals, and see which formats the service takes; a line says what is missing."""
        turns = Turns(target, admin, datetime.now(UTC).replace(microsecond=0) - AGE, Ticks())
        service = of_service(target, admin)
        doors = {ORM: await stack.enter_async_context(afternoon(target, admin))}
        influx = await stack.enter_async_context(influxdb(target))
        if influx is not None:
            doors[INFLUXDB] = influx
        else:
            given.steps.say("InfluxDB is not installed (no influxd on PATH): skipped.")
        for form in SERVICE_FORMATS:
            with HttpConnection(service.port) as connection:
                try:
                    connection.send(turns.prepare(service, form, 1, 1).requests[0])
                except Refused as error:
                    if error.status != 415:
                        raise
                    given.steps.say(f"{form} is not taken by this service (415): skipped.")
                else:
                    doors[form] = service
        return cls(target, turns, doors, given)

    def can(self, way: Way) -> bool:
        """Whether this way exists here."""
        return way.kind == PSQL or way.kind in self._doors

    async def alternate(self, ways: Sequence[Way], rounds: int) -> Results:
        """The turns of all ways that exist here."""
        possible = {str(way): way for way in ways if self.can(way)}
        contenders = {name: partial(self.turn, way) for name, way in possible.items()}
        self.steps.expect(len(contenders) * (rounds + 1))
        results = await alternate(contenders, rounds, self.steps.announce)
        return {possible[name]: turns for name, turns in results.items()}

    async def turn(self, way: Way) -> Turn:
        """One turn of a way."""
        rows = self._rows
        if way.kind == PSQL:
            return await self._turns.copy(rows, way.clients)
        share = (ORM_SHARE if way.kind == ORM else SHARE)[way.batch]
        least = way.clients * way.batch * (1 if way.kind == ORM else 2)
        form = {INFLUXDB: "line protocol", ORM: "JSON"}.get(way.kind, way.kind)
        door = self._doors[way.kind]
        return await self._turns.send(door, form, way.batch, way.clients, max(int(share * rows), least), way.data)

    async def paced(self, form: str, seconds: float) -> "Paced":
        """The highest rate of batches of 1,000, and then half of it on a schedule."""
        most = await self._turns.send(self.service, form, PACED_BATCH, CLIENTS, self._rows)
        rows = int(seconds * most.rate / 2) // PACED_BATCH * PACED_BATCH
        return Paced(
            most, await self._turns.on_schedule(self.service, form, PACED_BATCH, rows, most.rate / 2, connections=MANY)
        )

    async def singles(self, empty: Door, rounds: int) -> Results:
        """Turns of POSTs of one quote, and of the same POSTs to a route that does nothing."""
        rows = self._rows // 32
        contenders: dict[str, Callable[[], Awaitable[Turn]]] = {
            "JSON": partial(self._turns.send, self.service, "JSON", 1, MANY, rows),
            EMPTY: partial(self._turns.send, empty, "JSON", 1, MANY, rows),
        }
        self.steps.expect(len(contenders) * (rounds + 1))
        results = await alternate(contenders, rounds, self.steps.announce)
        return {Way(kind, 1, MANY): turns for kind, turns in results.items()}


@dataclass(frozen=True, slots=True)
class Paced:
    """A turn as fast as possible, and one on a schedule at half of its rate."""

    most: Turn
    half: Turn

    @property
    def p99(self) -> float:
        """Milliseconds, from when a batch was due."""
        return quantile(self.half.latencies_ms, 0.99)


async def measure_ratios(given: Given, rounds: int, paced_rounds: int, paced_seconds: float) -> Report:
    """All ratios that have a floor and an aim."""
    async with given.bench() as bench:
        ways = dict.fromkeys([COPY, COPIES, *(way for goal in GOALS for way in (goal.of, goal.to))])
        bulk = await bench.alternate(list(ways), rounds)
        async with empty_post(bench.target) as empty:
            singles = await bench.singles(empty, rounds)
        forms = [form for form in ("JSON", "Arrow") if bench.can(Way(form, PACED_BATCH, CLIENTS))]
        given.steps.expect(len(forms) * paced_rounds)
        scheduled = {form: partial(bench.paced, form, paced_seconds) for form in forms}
        paced = await alternate(scheduled, paced_rounds, given.steps.announce, warm_up=0)
    results = bulk | singles
    rows = [_goal(goal, results) for goal in (*GOALS, SINGLE_GOAL)]
    rows += [
        [
            f"{form} by {PACED_BATCH:,} at half of the maximum rate: p99 ms",
            *_spread(p99 := Spread.of([turn.p99 for turn in turns])),
            f"{P99_FLOOR:.0f}",
            f"{P99_AIM:.0f}",
            verdict(-p99.median, -P99_FLOOR, -P99_AIM),
        ]
        for form, turns in paced.items()
    ]
    return Report(
        bench.target.about,
        [
            Sheet(
                f"Ratios, {rounds} rounds",
                ["", "median", "min", "max", "floor", "aim", "verdict on the median"],
                rows,
                ["Rates in quotes/s, taken within a round."],
            ),
            *rates_sheets("Batches", bulk),
            *rates_sheets("POSTs of one quote", singles, to=Way(EMPTY, 1, MANY)),
            paced_sheet(paced, paced_seconds),
        ],
        {
            "rounds": rounds,
            "turns": {str(way): [_figures(turn) for turn in turns] for way, turns in results.items()},
            "paced": {
                form: [{"most": _figures(turn.most), "half": _figures(turn.half)} for turn in turns]
                for form, turns in paced.items()
            },
        },
    )


async def measure_matrix(given: Given, rounds: int, ways: Sequence[Way], results: Results) -> Report:
    """Formats, batch sizes, clients and kinds of data beside each other; `results` is filled."""
    async with given.bench() as bench:
        results |= await bench.alternate(ways, rounds)
    return Report(
        bench.target.about,
        rates_sheets(f"Ingest matrix, {rounds} rounds", results),
        {"rounds": rounds, "turns": {str(way): [_figures(turn) for turn in turns] for way, turns in results.items()}},
    )


def short_matrix() -> list[Way]:
    """Each format and rival by batch size; of two formats also other numbers of clients and kinds of data."""
    kinds = (*SERVICE_FORMATS, INFLUXDB, ORM)
    ways = [COPY, COPIES, *(Way(kind, batch, CLIENTS) for kind in kinds for batch in BATCHES)]
    for form in ("JSON", "Arrow"):
        ways += [Way(form, 1_000, clients) for clients in (1, MANY)]
        ways += [Way(form, 10_000, CLIENTS, data) for data in ("duplicate", "out of order")]
    return ways


def full_matrix() -> list[Way]:
    """Everything."""
    ways = [COPY, COPIES, *(Way(ORM, batch, CLIENTS) for batch in BATCHES)]
    kinds: dict[str, tuple[Data, ...]] = dict.fromkeys(SERVICE_FORMATS, ("fresh", "duplicate", "out of order"))
    kinds[INFLUXDB] = ("fresh",)
    for kind, datas in kinds.items():
        ways += [
            Way(kind, batch, clients, data) for batch in BATCHES for clients in (1, CLIENTS, MANY) for data in datas
        ]
    return ways


# --- report ---


def _spread(spread: Spread) -> list[str]:
    return [figure(value) for value in (spread.median, spread.low, spread.high)]


def _goal(goal: Goal, results: Results) -> list[str]:
    name, bounds = f"{goal.of} / {goal.to}", [f"{goal.floor:g}", f"{goal.aim:g}"]
    if goal.of not in results or goal.to not in results:
        return [name, "", "", "", *bounds, "not measured"]
    found = ratio([turn.rate for turn in results[goal.of]], [turn.rate for turn in results[goal.to]])
    return [name, *_spread(found), *bounds, verdict(found.median, goal.floor, goal.aim)]


def rates_sheets(title: str, results: Results, to: Way = COPY) -> list[Sheet]:
    speed, costs = [], []
    for way, turns in results.items():
        rates = Spread.of([turn.rate for turn in turns])
        times = ratio([turn.rate for turn in turns], [turn.rate for turn in results[to]])
        latencies = [ms for turn in turns for ms in turn.latencies_ms]
        quantiles = ["" if way.kind == PSQL else figure(quantile(latencies, share)) for share in QUANTILES]
        middle = (f"{rate:,.0f}" for rate in (rates.median, rates.low, rates.high))
        speed.append([str(way), *middle, "1" if way == to else str(times), *quantiles])
        memory = [mebibytes(turns[-1].rss), mebibytes(turns[-1].peak_rss)]
        costs.append([str(way), *(cost(turns, who) for who in WHO), *(cores(turns, who) for who in WHO), *memory])
    refused = {way: sum(turn.refused for turn in turns) for way, turns in results.items()}
    return [
        Sheet(
            f"{title}: rate and acknowledgement",
            ["", "quotes/s, median", "min", "max", f"x {to.kind}", *(f"p{100 * q:.0f} ms" for q in QUANTILES)],
            speed,
            [
                "Latencies of all rounds together.",
                *(f"{way}: {n} requests were answered 503 and sent again." for way, n in refused.items() if n),
            ],
        ),
        Sheet(
            f"{title}: cost",
            [
                "",
                *(f"{who} CPU us/quote" for who in WHO),
                *(f"{who} cores" for who in WHO),
                "server RSS MiB",
                "at its peak",
            ],
            costs,
            ["Medians of the rounds. The server is what takes the requests; all share the machine."],
        ),
    ]


def paced_sheet(paced: dict[str, list[Paced]], seconds: float) -> Sheet:
    rows = []
    for form, turns in paced.items():
        columns = [[quantile(turn.half.latencies_ms, share) for turn in turns] for share in (*QUANTILES, 1.0)]
        rates = [[turn.most.rate for turn in turns], [turn.half.rate for turn in turns]]
        rows.append(
            [
                form,
                *(f"{Spread.of(values).median:,.0f}" for values in rates),
                *(str(Spread.of(values)) for values in columns),
                cost([turn.half for turn in turns], "client"),
            ]
        )
    return Sheet(
        f"On a schedule for {seconds:.0f} s at half of the maximum rate, batches of {PACED_BATCH:,}",
        ["", "maximum quotes/s", "kept quotes/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "client CPU us/quote"],
        rows,
        [
            f"The maximum is that of {CLIENTS} clients just before.",
            "Latencies count from when a batch was due, not from when it was sent.",
        ],
    )


def _figures(turn: Turn) -> dict[str, Any]:
    names = ("p50_ms", "p95_ms", "p99_ms")
    return {
        "rows": turn.rows,
        "seconds": turn.seconds,
        "rate": turn.rate,
        **{name: quantile(turn.latencies_ms, share) for name, share in zip(names, QUANTILES, strict=True)},
        "max_ms": max(turn.latencies_ms),
        "cpu_seconds": turn.cpu_seconds,
        "rss": turn.rss,
        "peak_rss": turn.peak_rss,
        "refused": turn.refused,
    }


def plot(matrix: Results, file: Path) -> None:
    """Draw the rates of the matrix by batch size."""
    import matplotlib as mpl  # noqa: PLC0415  an extra that only the plot needs
    from matplotlib import pyplot as plt  # noqa: PLC0415

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ingest", "font.size": 9})
    figure_, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for kind in (*SERVICE_FORMATS, INFLUXDB, ORM):
        points = [
            (way.batch, Spread.of([turn.rate for turn in turns]))
            for way, turns in matrix.items()
            if way == Way(kind, way.batch, CLIENTS)
        ]
        if points:
            batches, spreads = zip(*points, strict=True)
            middle = [spread.median for spread in spreads]
            errors = [
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ]
            style = "o-" if kind in SERVICE_FORMATS else "s--"
            axes.errorbar(batches, middle, errors, fmt=style, capsize=3, markersize=4, label=kind)
    for way, style in ((COPY, "-"), (COPIES, ":")):
        rate = Spread.of([turn.rate for turn in matrix[way]]).median
        axes.axhline(rate, color="black", linewidth=1, linestyle=style, label=str(way))
    axes.set(xscale="log", yscale="log", xlabel="quotes a batch", ylabel="quotes a second")
    axes.set_title(f"Acknowledged quotes a second, {CLIENTS} clients")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    figure_.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


# --- command line ---


def _can_plot(file: Path | None) -> Path | None:
    if file is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("A plot needs matplotlib: pip install '.[bench]'.")
    return file


Rows = Annotated[int, typer.Option(min=10_000, help="Quotes of a turn; fewer in small batches.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", callback=_can_plot, help="File for the plot of the matrix, SVG or PNG.")
]
PacedRounds = Annotated[int, typer.Option(min=1, help="Runs on a schedule.")]
PacedSeconds = Annotated[float, typer.Option(min=1, help="Seconds of a run on a schedule.")]
ROWS: Final = 320_000

app = typer.Typer(help="Measure ingest beside its rivals, in one run.", pretty_exceptions_enable=False)
publish = partial(run, "benchmarks.ingest")


@app.callback(invoke_without_command=True)
def everything(
    context: typer.Context,
    database_url: DatabaseUrl = None,
    rows: Rows = ROWS,
    rounds: Rounds = 3,
    psql: Psql = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Without a command: the ratios, then the short matrix."""
    if context.invoked_subcommand is not None:
        return
    results: Results = {}
    publish(
        lambda steps: [
            measure_ratios(Given(database_url, psql, rows, steps), rounds, 2, 30.0),
            measure_matrix(Given(database_url, psql, rows, steps), max(1, rounds - 1), short_matrix(), results),
        ],
        json_file,
        markdown_file,
    )
    if plot_file is not None:
        plot(results, plot_file)


@app.command()
def ratios(
    database_url: DatabaseUrl = None,
    rows: Rows = ROWS,
    rounds: Rounds = 5,
    paced_rounds: PacedRounds = 3,
    paced_seconds: PacedSeconds = 30.0,
    psql: Psql = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure the ratios that have a floor and an aim."""
    publish(
        lambda steps: [measure_ratios(Given(database_url, psql, rows, steps), rounds, paced_rounds, paced_seconds)],
        json_file,
        markdown_file,
    )


@app.command()
def matrix(
    full: Annotated[bool, typer.Option(help="Every combination.")] = False,
    database_url: DatabaseUrl = None,
    rows: Rows = ROWS,
    rounds: Rounds = 3,
    psql: Psql = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Measure formats, batch sizes, clients and kinds of data beside each other."""
    results: Results = {}
    ways = full_matrix() if full else short_matrix()
    publish(
        lambda steps: [measure_matrix(Given(database_url, psql, rows, steps), rounds, ways, results)],
        json_file,
        markdown_file,
    )
    if plot_file is not None:
        plot(results, plot_file)


Form = Annotated[str, typer.Option(help=f"Format: {', '.join(SERVICE_FORMATS)}.")]
Clients = Annotated[int, typer.Option(min=1, help="Connections that send at once.")]


@app.command()
def sustained(
    database_url: Annotated[str, typer.Option(help="TimescaleDB server: a database is created on it, and dropped.")],
    form: Form = "Arrow",
    minutes: Annotated[float, typer.Option(min=0.2, help="How long.")] = 10.0,
    clients: Clients = CLIENTS,
    max_gib: Annotated[float, typer.Option(help="Size of the database at which the run ends early.")] = 30.0,
    psql: Psql = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure minutes at full rate, live quotes, while refresh and columnstore policies run."""
    publish(
        lambda steps: [measure_sustained(database_url, psql, form, minutes, clients, max_gib, steps)],
        json_file,
        markdown_file,
    )


@app.command()
def memory(
    database_url: DatabaseUrl = None,
    form: Form = "Arrow",
    millions: Annotated[int, typer.Option(min=2, help="Millions of quotes; each takes 0.2 GB of disk.")] = 50,
    clients: Clients = CLIENTS,
    psql: Psql = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure the service's memory over millions of quotes."""
    publish(
        lambda steps: [measure_memory(database_url, psql, form, millions, clients, steps)],
        json_file,
        markdown_file,
    )


if __name__ == "__main__":
    app()
