"""`opa-quotes maintain`: what background policies do, by hand, and what an operator asks for besides.

Invariant: what a verb did is one JSON document with `--json`, on stdout; progress and remarks go to stderr. What
the server's level does not have is said, in `cannot`, and where it was all that was asked for the status is 1. A chunk
that is in use all the time stops no other one; it is told, in `skipped`, with who uses it, and the status is 1.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.api.storage import report
from app.clock import FIRST, LAST, rfc3339
from app.db import embedded
from app.db.capability import Level
from app.db.engine import Database
from app.db.facts import shown
from app.errors import DatabaseUnavailable, InvalidRequest, QuotesLocked, StartupError
from app.repository.maintenance import Change, Loss, MaintenanceRepository, Window
from app.repository.storage import Chunk, StorageRepository
from app.settings import Settings, fault_of, span

app = typer.Typer(help="Columnstore, rollups, retention: show, and do by hand what policies do.", no_args_is_help=True)
remarks = Console(stderr=True)

#: Columns of a page that nobody looks at: wider than any table here.
_WIDE: Final = 1000
#: Bytes of rows that a second rewrites: 170 a quote at 0.4 to 0.7 M quotes a second.
_REWRITTEN: Final = 80_000_000
_NO_COLUMNSTORE: Final = "no columnstore: quotes stay in rows"
_NO_REFRESH: Final = "nothing to refresh: bars are computed from the quotes at each request"
_NO_REORDER: Final = {
    Level.APACHE: "no reorder_chunk, which the community edition has; CLUSTER would lock the chunk against all reads",
    Level.POSTGRESQL: "no reordering online: CLUSTER would lock the whole table against reads and writes",
}
_NO_ROLLUPS: Final = "bars of dropped quotes are gone too: this level computes them from the quotes"
_NO_POLICIES: Final = "no columnstore and no policies: run `maintain drop` from a timer for the retention"
_NO_CHUNKS: Final = "no hypertable: nothing has a chunk interval"


@dataclass(slots=True)
class Outcome:
    """What a verb did, and what it could not do at the server's level."""

    verb: str
    level: Level
    done: list[dict[str, Any]] = field(default_factory=list)
    cannot: list[str] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False


def _when(text: str | None) -> datetime | None:
    """A moment in UTC, moved to between the first and the last that can be stored."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter("a date or a time in ISO 8601, as in 2026-01-31 or 2026-01-31T12:00Z") from error
    return min(max(moment, FIRST), LAST)


def _range(start: str | None, end: str | None) -> tuple[datetime | None, datetime | None]:
    low, high = _when(start), _when(end)
    if low is not None and high is not None and low >= high:
        raise typer.BadParameter("the range is empty: its start is not before its end")
    return low, high


def a_path(text: str) -> Path:
    """A path as it was given: an empty one is a variable that is not set, and does not mean the working directory."""
    if not text or text != text.encode(errors="replace").decode():
        raise typer.BadParameter("a path is not empty, and in UTF-8")
    return Path(text)


def a_file(text: str) -> Path:
    """The path of a file, which has a name; `/` and `.` have none."""
    path = a_path(text)
    if not path.name:
        raise typer.BadParameter(f"{path} is a directory")
    return path


DataDir = Annotated[
    Path | None,
    typer.Option(parser=a_path, metavar="PATH", help="Directory of the embedded PostgreSQL.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Start = Annotated[str | None, typer.Option(help="Begin of the range, UTC unless it says otherwise.")]
End = Annotated[str | None, typer.Option(help="End of the range, exclusive.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@asynccontextmanager
async def store(settings: Settings) -> AsyncIterator[str]:
    """The URL of the store: the given one, or the embedded one, started for as long as this takes unless it runs."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    url = embedded.url(settings.data_dir)
    try:
        async with Database(url, settings).dedicated():
            pass
    except DatabaseUnavailable:
        if not ((settings.data_dir or embedded.default_data_dir()).expanduser() / "pgdata").exists():
            raise StartupError("There is no embedded database yet: run `opa-quotes serve` or `migrate`.") from None
        async with embedded.embedded_postgres(settings.data_dir) as url:
            yield url
    else:
        yield url


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[Database]:
    async with store(settings) as url:
        yield Database(url, settings)


def _run(
    data_dir: Path | None,
    work: Callable[[MaintenanceRepository, Outcome], Awaitable[None]],
    verb: str,
    *,
    as_json: bool,
) -> None:
    """Do a verb and print its outcome."""
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)

    async def run() -> Outcome:
        async with _database(settings) as database, MaintenanceRepository.open(database, settings) as repository:
            outcome = Outcome(verb, repository.capability.level)
            await work(repository, outcome)
            return outcome

    outcome = asyncio.run(run())
    if as_json:
        document = {
            "verb": outcome.verb, "level": str(outcome.level), "dry_run": outcome.dry_run,
            "done": outcome.done, "cannot": outcome.cannot, "skipped": outcome.skipped, **outcome.notes,
        }  # fmt: skip
        _print(document)
    else:
        if outcome.done:
            table = Table(*(name.replace("_", " ") for name in outcome.done[0]))
            for row in outcome.done:
                table.add_row(*("" if value is None else str(value) for value in row.values()))
            _output().print(table)
        else:
            remarks.print("Nothing was done." if outcome.cannot or outcome.skipped else "Nothing to do.")
        for name, value in outcome.notes.items():
            remarks.print(f"{name.replace('_', ' ')}: {value}", highlight=False)
        if outcome.dry_run:
            remarks.print("A dry run: nothing was changed.")
        for sentence in outcome.cannot:
            remarks.print(f"[yellow]level {outcome.level}:[/yellow] {sentence}", highlight=False)
        for row in outcome.skipped:
            remarks.print(f"[yellow]skipped:[/yellow] {_skipped(row)}", highlight=False, soft_wrap=True)
    if outcome.skipped or (outcome.cannot and not outcome.done and verb in {"compress", "decompress", "reorder"}):
        raise typer.Exit(1)


def _skipped(row: dict[str, Any]) -> str:
    pids = ", ".join(map(str, row["used_by"]))
    why = f"is in use by the server process {pids}" if pids else "was left: older ones go first, or it is free again"
    return f"{row['chunk']} of {row['start']} {why}."


async def _skip(repository: MaintenanceRepository, outcome: Outcome, chunk: Chunk) -> None:
    users = await repository.users(chunk)
    outcome.skipped.append({"chunk": chunk.name, "start": rfc3339(chunk.start), "used_by": users})


def _output() -> Console:
    """What prints tables: where no terminal reads them as wide as they are, so that no name is cut."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def _print(document: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(document)).decode())


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=remarks, transient=True)


async def _each(
    repository: MaintenanceRepository,
    outcome: Outcome,
    chunks: Sequence[Chunk],
    step: Callable[[Chunk], Awaitable[bool]],
    told: Callable[[Chunk], dict[str, Any]],
) -> None:
    """Do a step for each chunk, oldest first, in sight of who waits for it; go on where one is in use, or gone."""
    with _progress() as progress:
        task = progress.add_task(outcome.verb, total=len(chunks))
        for chunk in chunks:
            progress.update(task, description=f"{outcome.verb} {rfc3339(chunk.start)}")
            try:
                if await step(chunk):
                    outcome.done.append({"chunk": chunk.name, "start": rfc3339(chunk.start), **told(chunk)})
                else:
                    outcome.notes["dropped_meanwhile"] = outcome.notes.get("dropped_meanwhile", 0) + 1
            except QuotesLocked:
                await _skip(repository, outcome, chunk)
            progress.advance(task)


def _within(chunks: Sequence[Chunk], start: datetime | None, end: datetime | None) -> list[Chunk]:
    return [c for c in chunks if (start is None or c.end > start) and (end is None or c.start < end)]


def _past(chunks: Sequence[Chunk], outcome: Outcome) -> list[Chunk]:
    """The chunks that no quote of now goes into, having told what rewriting them blocks."""
    now = datetime.now(UTC)
    past = [chunk for chunk in chunks if chunk.end <= now]
    if len(past) < len(chunks):
        outcome.notes["left_alone"] = f"{len(chunks) - len(past)} that quotes of now go into"
    if past:
        largest = max(chunk.before or chunk.bytes for chunk in past)
        remarks.print(
            f"{outcome.verb}: {len(past)} chunks, one after the other; the largest, {_size(largest)} of rows, takes"
            f" about {max(1, largest / _REWRITTEN):.0f} s. Meanwhile quotes of its time wait to be written, and at the"
            " end for a moment to be read. Quotes of now go on.",
            highlight=False,
        )
    return past


@app.command()
def show(
    *,
    limit: Annotated[int, typer.Option(min=0, help="Most chunks listed, newest first.")] = 20,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Tables, chunks, rollups and jobs: sizes, savings, watermarks and last runs."""
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)

    async def look() -> dict[str, Any]:
        async with _database(settings) as database:
            return report(await StorageRepository(database).look(timedelta(minutes=1)), limit)

    found = asyncio.run(look())
    if as_json:
        _print(found)
        return
    console = _output()
    server = f"PostgreSQL {found['postgresql']}"
    if found["timescaledb"]:
        server += f", TimescaleDB {found['timescaledb']}"
    console.print(f"{server}: level {found['level']}", highlight=False)
    _table(console, "Tables", found["tables"])
    savings = found["compression"]
    if savings["after_bytes"]:
        console.print(
            f"Columnstore: {_size(savings['before_bytes'])} became {_size(savings['after_bytes'])}, "
            f"{savings['ratio']}:1.",
            highlight=False,
        )
    chunks = found["chunks"]
    states = ", ".join(f"{count} {state}" for state, count in chunks["by_state"].items())
    _table(console, f"Chunks: {chunks['total']} ({states})", chunks["newest"])
    _table(console, "Rollups", found["rollups"])
    _table(console, "Jobs", found["jobs"])
    level = Level[found["level"].upper()]
    if level.lacks:
        remarks.print(f"[yellow]level {level}:[/yellow] {level.lacks}.", highlight=False)


def _table(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(
        *(name.removesuffix("_bytes").replace("_", " ") for name in rows[0]), title=title, title_justify="left"
    )
    for row in rows:
        table.add_row(
            *(
                "" if value is None else _size(value) if name.endswith("bytes") else str(value)
                for name, value in row.items()
            )
        )
    console.print(table)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:  # noqa: PLR2004  the step between binary units
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


@app.command()
def compress(
    *,
    start: Start = None,
    end: End = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Move chunks to the columnstore: those older than the compression age, or those of a range."""
    low, high = _range(start, end)

    async def work(repository: MaintenanceRepository, outcome: Outcome) -> None:
        if outcome.level < Level.COMMUNITY:
            outcome.cannot.append(_NO_COLUMNSTORE)
            return
        due = await repository.due(datetime.now(UTC)) if low is None and high is None else await repository.chunks()
        chunks = _past([chunk for chunk in _within(due, low, high) if chunk.state != "columnstore"], outcome)

        await _each(repository, outcome, chunks, repository.compress, lambda chunk: {"was": chunk.state})
        after = {chunk.name: chunk for chunk in await repository.chunks()}
        before = {chunk.name: chunk for chunk in chunks}
        for row in outcome.done:
            chunk = after.get(row["chunk"], before[row["chunk"]])
            row["before_bytes"], row["after_bytes"] = chunk.before, chunk.after
            row["ratio"] = round(chunk.before / chunk.after, 2) if chunk.before and chunk.after else None

    _run(data_dir, work, "compress", as_json=as_json)


@app.command()
def decompress(
    start: Annotated[str, typer.Option(help="Begin of the range, UTC unless it says otherwise.")],
    end: Annotated[str, typer.Option(help="End of the range, exclusive.")],
    *,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Move the chunks of a range back to rows, as before a large correction; the policy compresses them again."""
    low, high = _range(start, end)

    async def work(repository: MaintenanceRepository, outcome: Outcome) -> None:
        if outcome.level < Level.COMMUNITY:
            outcome.cannot.append(_NO_COLUMNSTORE)
            return
        chunks = _past([c for c in _within(await repository.chunks(), low, high) if c.state != "rowstore"], outcome)

        await _each(repository, outcome, chunks, repository.decompress, lambda chunk: {"was": chunk.state})

    _run(data_dir, work, "decompress", as_json=as_json)


@app.command()
def refresh(
    *,
    start: Start = None,
    end: End = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild all bars of the range, not only stale ones.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Bring the rollups up to date: 1m, then 1h, then 1d; never where quotes may have been dropped."""
    low, high = _range(start, end)

    async def work(repository: MaintenanceRepository, outcome: Outcome) -> None:
        if outcome.level < Level.COMMUNITY:
            outcome.cannot.append(_NO_REFRESH)
            return
        for rollup, window in await repository.refresh_windows(datetime.now(UTC), low, high):
            with _progress() as progress:
                task = progress.add_task(f"refresh {rollup}", total=len(await repository.batches(rollup, window)))
                told = partial(_tell_batch, progress, task, rollup)
                await repository.refresh(rollup, window, force=force, told=told)
            outcome.done.append({"rollup": rollup, "start": rfc3339(window.start), "end": rfc3339(window.end)})

    _run(data_dir, work, "refresh", as_json=as_json)


def _tell_batch(progress: Progress, task: TaskID, rollup: str, batch: Window) -> None:
    progress.update(task, description=f"refresh {rollup} {rfc3339(batch.start)}", advance=1)


async def _drop_chunks(repository: MaintenanceRepository, now: datetime, outcome: Outcome) -> list[dict[str, Any]]:
    expired = await repository.expired(now)
    behind = {chunk.name for chunk in expired if await repository.behind(chunk)}
    left = set()
    if not outcome.dry_run:
        locked = False
        with remarks.status(f"drop {len(expired)} chunks"):
            try:
                await repository.drop()
            except QuotesLocked:
                locked = True
        left = {chunk.name for chunk in await repository.chunks()}
        for chunk in [chunk for chunk in expired if chunk.name in left] if locked else []:
            # They go in the order of time, as `dropped_before` is one moment: later ones wait for the one in use.
            await _skip(repository, outcome, chunk)
    return [
        {
            "chunk": chunk.name, "start": rfc3339(chunk.start), "end": rfc3339(chunk.end), "bytes": chunk.bytes,
            "bars_completed": chunk.name in behind,
        }
        for chunk in expired if chunk.name not in left
    ]  # fmt: skip


async def _delete_rows(repository: MaintenanceRepository, now: datetime, outcome: Outcome) -> list[dict[str, Any]]:
    rows = 0
    if outcome.dry_run:
        rows = await repository.expired_rows(now)
    else:
        with remarks.status("delete") as status:
            async for deleted in repository.delete(now):
                rows += deleted
                status.update(f"delete: {rows:,} quotes")
            await repository.mend_first(now)
    return [{"table": "quotes.real_time", "quotes": rows}] if rows else []


@app.command()
def drop(*, dry_run: DryRun = False, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Drop quotes older than the store's retention; where there are rollups, their bars stay."""

    async def work(repository: MaintenanceRepository, outcome: Outcome) -> None:
        now = datetime.now(UTC)
        outcome.dry_run = dry_run
        cutoff = repository.facts.cutoff(now)
        if cutoff is None:
            outcome.notes["kept"] = "all quotes: the store's retention is none"
            return
        outcome.notes["older_than"] = rfc3339(cutoff)
        if outcome.level < Level.COMMUNITY:
            outcome.cannot.append(_NO_ROLLUPS)
        take = _drop_chunks if outcome.level >= Level.APACHE else _delete_rows
        outcome.done = await take(repository, now, outcome)

    _run(data_dir, work, "drop", as_json=as_json)


@app.command()
def reorder(*, start: Start = None, end: End = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Rewrite chunks of rows in the order of the key, for fewer pages a read; the newest one is left alone."""
    low, high = _range(start, end)

    async def work(repository: MaintenanceRepository, outcome: Outcome) -> None:
        if outcome.level < Level.COMMUNITY:
            outcome.cannot.append(_NO_REORDER[outcome.level])
            return
        now = datetime.now(UTC)
        chunks = [
            chunk
            for chunk in _within(await repository.chunks(), low, high)
            if chunk.state == "rowstore" and chunk.end <= now
        ]
        chunks = _past(chunks, outcome)

        await _each(repository, outcome, chunks, repository.reorder, lambda chunk: {"bytes": chunk.bytes})

    _run(data_dir, work, "reorder", as_json=as_json)


@app.command()
def apply(
    *,
    retention: Annotated[str | None, typer.Option(help="As `2 years`, or `none` to keep all quotes.")] = None,
    chunk_interval: Annotated[str | None, typer.Option(help="As `1 day`; counts for new chunks.")] = None,
    compress_after: Annotated[str | None, typer.Option(help="As `30 days`.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it although quotes will be dropped.")] = False,
    dry_run: DryRun = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Change the settings of the store: those given as options, or without any those that the environment sets.

    Says first what will be dropped, and does it only if told so.
    """
    told = Settings()
    texts = {"retention": retention, "chunk_interval": chunk_interval, "compress_after": compress_after}
    given = {name: span(text, f"--{name.replace('_', '-')}") for name, text in texts.items() if text is not None}

    async def work(repository: MaintenanceRepository, outcome: Outcome) -> None:
        outcome.dry_run, now = dry_run, datetime.now(UTC)
        if outcome.level < Level.APACHE:
            outcome.cannot.append(_NO_CHUNKS)
        if outcome.level < Level.COMMUNITY:
            outcome.cannot.append(_NO_POLICIES)
        facts = repository.facts
        changed: dict[str, Any] = given or {change.name: change.told for change in facts.differences(told)}
        wanted = replace(facts, **changed)
        if fault := fault_of(wanted.retention, wanted.chunk_interval, wanted.compress_after):
            raise InvalidRequest(f"{fault[0].upper()}{fault[1:]}.")
        changes = await repository.differences(wanted, now)
        loss = None if wanted.retention == facts.retention else await repository.loss(wanted, now)
        if loss is not None:
            goes = _told(loss, outcome.level)
            if dry_run or yes:
                outcome.notes["will_be_dropped"] = goes
            else:
                remarks.print(f"will be dropped: {goes}", highlight=False)
                asked = not as_json and sys.stdin.isatty()
                if not (asked and typer.confirm("Change it?", err=True)):
                    raise InvalidRequest("Nothing was changed. --yes changes it.")
        if changes and not dry_run:
            await repository.apply(wanted, now)
        outcome.done = [_change(change) for change in changes]

    _run(data_dir, work, "apply", as_json=as_json)


def _told(loss: Loss, level: Level) -> str:
    chunks = f"{len(loss.chunks)} chunks with " if loss.chunks else ""
    bars = "their bars stay" if level >= Level.COMMUNITY else "their bars go with them"
    when = "by `maintain drop`, or by the job within the hour" if level >= Level.COMMUNITY else "by `maintain drop`"
    return f"{chunks}about {loss.rows:,} quotes before {rfc3339(loss.before)}, {when}; {bars}."


def _change(change: Change) -> dict[str, Any]:
    before, after = ("none" if span is None else shown(span) for span in (change.before, change.after))
    return {"setting": change.what, "before": before, "after": after}
