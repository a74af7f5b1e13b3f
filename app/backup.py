"""`opa-quotes backup` and `opa-quotes restore`: a dump that is whole or is not there, and a store that is whole again.

Invariant: a file gets its name when it is complete, on disk and, if that was asked for, compared with what it was made
of; nothing is deleted but what these verbs made. A restore goes into an empty database, and a database that is
restored half way says so in its comment and has no revision, so that no service takes it for a store.
"""

import asyncio
import fcntl
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from app.clock import rfc3339
from app.db import embedded, programs
from app.db.capability import HALF_RESTORED
from app.errors import BackupError, QuotesError
from app.maintain import DataDir, Json, a_file, a_path, store
from app.repository import backup as repository
from app.repository.backup import Content, Job, RestoreRepository
from app.settings import Duration, Settings

remarks = Console(stderr=True)

_NAME: Final = "quotes-%Y%m%dT%H%M%SZ.dump"
_OURS: Final = re.compile(r"quotes-\d{8}T\d{6}Z\.dump")
_PARTIAL: Final = ".partial"
_DIFFERS: Final = ".differs"
_CONTENT: Final = ".json"
_RETRY: Final = timedelta(minutes=5)
_SCRATCH: Final = "scratch database of `opa-quotes backup --verify`"
#: Longest wait of pg_dump for one table that somebody has locked.
_LOCK_WAIT: Final = "60s"


# --- what is asked for ---

Keep = Annotated[int | None, typer.Option(min=1, help="Then delete all but the newest N dumps of the directory.")]
Every = Annotated[str | None, typer.Option(help="Go on, a dump each time the newest is this old, as in `24h`.")]


def backup(
    target: Annotated[
        Path,
        typer.Argument(
            parser=a_path, metavar="TARGET", help="A new file, or a directory, in which the file is named by the time."
        ),
    ],
    *,
    keep: Keep = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Restore it into a scratch database beside the store, and compare.")
    ] = False,
    every: Every = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Dump the store into one file, while it is used; exit 0 if it is whole, 1 if not or if it differs."""
    with _file_errors(target):
        is_directory = target.is_dir()
    if (keep is not None or every is not None) and not is_directory:
        raise typer.BadParameter(f"--keep and --every are for a directory, and {target} is none: `mkdir` makes one.")
    pause = None if every is None else _interval(every)
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)

    async def once() -> None:
        async with store(settings) as url:
            made = await _backup(url, settings, target, verify=verify)
        removed = [] if keep is None else _rotate(target, keep)
        _tell(made | {"removed": removed}, as_json=as_json)

    _until_signal(once() if pause is None else _repeat(once, target, pause))


def restore(
    file: Annotated[
        Path,
        typer.Argument(parser=a_file, metavar="FILE", help="A dump made by `backup` or `pg_dump --format=custom`."),
    ],
    *,
    into: Annotated[str | None, typer.Option(help="URL of the database, which is empty.", show_default=False)] = None,
    create: Annotated[bool, typer.Option("--create", help="Create the database first.")] = False,
    owner: Annotated[
        str | None, typer.Option(help="Role that owns the store and its jobs.", show_default="the connecting role")
    ] = None,
    grant: Annotated[
        list[str] | None, typer.Option(help="Role that serves; beside the roles of the dump that exist here.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with what `backup --verify` wrote down beside the file.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="URL of a store to compare with, which rests meanwhile.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            parser=a_path, metavar="PATH", help="Instead of --into: a new directory of an embedded PostgreSQL."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore a dump into an empty database, owned by a role and with jobs that work; exit 1 if it differs."""
    if verify and against is not None:
        raise typer.BadParameter("compare with one: --verify or --against.")
    if (into is None) == (data_dir is None):
        raise typer.BadParameter("one of --into URL and --data-dir DIRECTORY says where to.")
    if data_dir is not None and (create or owner is not None or grant):
        raise typer.BadParameter("--create, --owner and --grant are for a server of your own, with --into.")
    if into is not None and (not into.startswith(("postgresql://", "postgres://")) or not repository.database_of(into)):
        raise typer.BadParameter("--into is a URL with the name of a database, as in postgresql://host/name.")
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)

    async def once() -> None:
        expected = _written_down(file) if verify else None
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(embedded.embedded_postgres(data_dir)) if into is None else into
            if create and not await repository.exists(url, settings):
                await repository.create(url, settings, owner=owner)
            if against is not None:
                async with repository.session(against, settings) as connection:
                    # Its jobs go on, and change what rollups show of late quotes.
                    expected = (await repository.content(connection)).without_bars()
            restored, differences = await _restore(
                file, url, settings, owner=owner, grants=grant or [], expected=expected, data_dir=data_dir
            )
        _tell(restored | {"differences": differences}, as_json=as_json)
        if differences:
            raise BackupError("The restored store differs: " + " ".join(differences))

    _until_signal(once())


def _interval(text: str) -> timedelta:
    try:
        return TypeAdapter(Duration).validate_python(text)
    except ValidationError as error:
        raise typer.BadParameter("--every is a duration, as in `24h` or `7 days`.") from error


def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, or until SIGTERM, at which what is half done is undone as it is at Ctrl-C."""

    async def run() -> bool:
        task = asyncio.create_task(work)
        stopped = asyncio.Event()

        def stop() -> None:
            stopped.set()
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        try:
            await task
        except asyncio.CancelledError:
            if not stopped.is_set():
                raise
        return stopped.is_set()

    if asyncio.run(run()):
        raise typer.Exit(128 + signal.SIGTERM)


def _tell(outcome: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(outcome)).decode())
        return
    for name, value in outcome.items():
        if value is not None and value != []:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            typer.echo(f"{name.replace('_', ' ')}: {str(shown).lower() if isinstance(shown, bool) else shown}")


# --- backup ---


async def _repeat(once: Callable[[], Coroutine[Any, Any, None]], directory: Path, pause: timedelta) -> None:
    """Dump whenever the newest dump is old enough, so that a restart makes no more of them; try again after errors."""
    while True:
        newest = max((path.stat().st_mtime for path in _dumps(directory)), default=0.0)
        wait = newest + pause.total_seconds() - time.time()
        if wait <= 0:
            wait = 0
            try:
                await once()
            except QuotesError as error:
                remarks.print(f"[red]error:[/red] {error.detail}", highlight=False)
                wait = min(_RETRY, pause).total_seconds()
        await asyncio.sleep(wait)


async def _backup(url: str, settings: Settings, target: Path, *, verify: bool) -> dict[str, Any]:
    """Make one dump; what was made."""
    began = time.monotonic()
    host = await repository.writing_host(url)
    _clear(target)
    if verify:
        await repository.require_scratch(host, settings, _scratch(host))
    async with repository.jobs_held(host, settings) as refusal:
        if refusal is not None:
            remarks.print(
                f"[yellow]Policies go on meanwhile ({refusal}): reads of a chunk may wait for the dump.[/yellow]",
                highlight=False,
            )
        with _draft(target) as draft:
            taken, held, size = await _dump(host, settings, draft, verify=verify)
            if verify and held is not None:
                differences = held.differences(await _of_scratch(draft.partial, host, settings, size))
                if differences:
                    draft.keep_as(draft.final.with_name(draft.final.name + _DIFFERS))
                    raise BackupError(
                        f"The dump differs from the store, and is left as {draft.final.name}{_DIFFERS}: "
                        + " ".join(differences)
                    )
                _write_down(draft.final, held)
            draft.keep_as(draft.final)
    length = draft.final.stat().st_size
    reason = await repository.record(host, settings, length, verified=verify)
    if reason is not None:
        remarks.print(f"[yellow]Not noted in quotes.backups:[/yellow] {reason}", highlight=False)
    return {
        "file": str(draft.final), "bytes": length, "holds": rfc3339(taken),
        "seconds": round(time.monotonic() - began, 1),
        "verified": verify, "recorded": reason is None,
    }  # fmt: skip


async def _dump(url: str, settings: Settings, draft: "_Draft", *, verify: bool) -> tuple[datetime, Content | None, int]:
    """Write the dump: the instant that it holds, what it should hold if that is to be verified, the store's size."""
    async with repository.snapshot(url, settings) as snapshot:
        taken = datetime.now(UTC)
        program = programs.find("pg_dump", snapshot.major)
        if snapshot.whole:
            remarks.print(f"[yellow]The whole database is dumped:[/yellow] {snapshot.whole}.", highlight=False)
        chosen = [f"--schema={schema}" for schema in snapshot.schemas]
        if chosen and snapshot.timescaledb:
            chosen.append("--extension=timescaledb")
        dump = asyncio.create_task(
            programs.run(
                program, "--format=custom", "--compress=gzip", f"--snapshot={snapshot.id}",
                f"--lock-wait-timeout={_LOCK_WAIT}", f"--file={draft.partial}", *chosen, url=url,
                keep_open=[draft.lock],
            )
        )  # fmt: skip
        content = asyncio.create_task(snapshot.content()) if verify else None
        everything: list[asyncio.Task[Any]] = [dump] if content is None else [dump, content]
        with remarks.status("dump") as status:
            try:
                pending = set(everything)
                while pending:
                    done, pending = await asyncio.wait(pending, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    status.update(f"dump: {draft.partial.stat().st_size / 1e6:,.1f} MB")
            finally:
                for task in everything:
                    task.cancel()
                await asyncio.gather(*everything, return_exceptions=True)
        return taken, None if content is None else content.result(), snapshot.size


async def _of_scratch(file: Path, url: str, settings: Settings, size: int) -> Content:
    """What a dump holds, restored into a database beside the store that is dropped again."""
    free = _room(settings, size)
    if free is not None and free < size:
        raise BackupError(f"Verification takes the room of the store once more, {size} bytes, and {free} are free.")
    scratch = _scratch(url)
    await repository.drop_scratch(scratch, settings, _SCRATCH)
    await repository.create(scratch, settings, comment=_SCRATCH)
    try:
        return await _in_scratch(file, scratch, settings)
    finally:
        await asyncio.shield(repository.drop_scratch(scratch, settings, _SCRATCH))


def _scratch(url: str) -> str:
    """The URL of the database into which a dump of a store is restored to be verified."""
    return repository.beside(url, f"{repository.database_of(url)[:50]}_verify")


def _room(settings: Settings, size: int) -> int | None:
    """Bytes that the server may still take, None where nobody knows."""
    volume = embedded.volume(settings)
    if volume is not None and volume.exists():
        return shutil.disk_usage(volume).free
    return None if settings.storage_capacity is None else max(0, settings.storage_capacity - size)


@dataclass(slots=True)
class _Draft:
    """A file on its way: under another name, and locked by whoever writes it."""

    final: Path
    partial: Path
    lock: int

    def keep_as(self, name: Path) -> None:
        """Give it a name, once its bytes are on disk."""
        with _file_errors(name):
            os.fsync(self.lock)
            self.partial.rename(name)
            _sync(name.parent)


def _sync(directory: Path) -> None:
    entry = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackupError(f"Cannot write {path}: {error.strerror}.") from error


@contextmanager
def _draft(target: Path) -> Iterator[_Draft]:
    """A file that is gone at the end of the block unless it got its name; only its owner may read it."""
    final = target / datetime.now(UTC).strftime(_NAME) if target.is_dir() else target
    if final.exists():
        raise BackupError(f"{final} exists, and a backup overwrites nothing.")
    partial = final.with_name(final.name + _PARTIAL)
    with _file_errors(partial):
        lock = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Draft(final, partial, lock)
    finally:
        os.close(lock)
        partial.unlink(missing_ok=True)


def _dumps(directory: Path) -> list[Path]:
    """The dumps that were made here, oldest first."""
    return sorted(path for path in directory.iterdir() if _OURS.fullmatch(path.name) and path.is_file())


def _clear(directory: Path) -> None:
    """Delete what a killed backup left in a directory, unless its pg_dump still writes: that one holds the lock."""
    if not directory.is_dir():
        return
    for path in directory.glob(f"*{_PARTIAL}"):
        if not _OURS.fullmatch(path.name.removesuffix(_PARTIAL)):
            continue
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)
        remarks.print(f"Deleted {path}, left by a backup that was killed.", highlight=False)


def _rotate(directory: Path, keep: int) -> list[str]:
    """Delete all but the newest dumps; which."""
    old = _dumps(directory)[:-keep]
    for path in old:
        with _file_errors(path):
            path.unlink(missing_ok=True)
            path.with_name(path.name + _CONTENT).unlink(missing_ok=True)
    return [path.name for path in old]


def _write_down(final: Path, held: Content) -> None:
    """What the dump holds, beside it."""
    path = final.with_name(final.name + _CONTENT)
    with _file_errors(path):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(held)) + b"\n")


def _written_down(file: Path) -> Content:
    path = file.with_name(file.name + _CONTENT)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Content)
    except (OSError, msgspec.DecodeError) as error:
        raise BackupError(f"{path} cannot be read: `backup --verify` writes it. Compare with --against URL.") from error


# --- restore ---


@dataclass(frozen=True, slots=True)
class _Archive:
    """A dump as pg_restore lists it."""

    file: Path
    program: Path
    entries: list[str]
    revision: str | None
    #: Version of TimescaleDB, None of a store on plain PostgreSQL.
    timescaledb: str | None
    jobs: Job | None

    @classmethod
    async def read(cls, file: Path, major: int) -> "_Archive":
        """List a dump, for a server of that major version.

        Raises:
            BackupError: it is none, or not of a store.
        """
        program = programs.find("pg_restore", major)
        try:
            return await cls._read(file, program)
        except BackupError as error:
            raise BackupError(f"{file} cannot be restored: {error.detail}") from error

    @classmethod
    async def _read(cls, file: Path, program: Path) -> "_Archive":
        listed = await programs.run(program, "--list", str(file))
        entries = [line for line in listed.splitlines() if line and not line.startswith(";")]
        if not any(re.search(r" TABLE quotes real_time ", line) for line in entries):
            raise BackupError("it is not of a store, as it has no table quotes.real_time.")
        # Stores until r6 have theirs in `public`, where another application may have one too.
        ours = any(" TABLE DATA quotes alembic_version " in line for line in entries)
        _, revisions = await _rows(program, file, "alembic_version", "quotes" if ours else None)
        revision = revisions[1][0] if len(revisions) > 1 else None
        if not any(" EXTENSION - timescaledb" in line for line in entries):
            return cls(file, program, entries, revision, None, None)
        _, (_, *rows) = await _rows(program, file, "metadata")
        version = next(values[1] for values in rows if values[0] == "timescaledb_version")
        schema, (columns, *rows) = await _rows(program, file, "bgw_job")
        return cls(file, program, entries, revision, version, Job(schema, columns, rows))

    async def extension_schema(self) -> str:
        """Where the dump has the extension, as SQL writes it."""
        script = await self.script(lambda entry: " EXTENSION - timescaledb" in entry)
        found = re.search(rf"^CREATE EXTENSION .* WITH SCHEMA ({_ROLE});$", script, re.MULTILINE)
        return "public" if found is None else found[1]

    async def script(self, wanted: Callable[[str], object]) -> str:
        """The statements of some entries."""
        with self._chosen(wanted) as chosen:
            return await programs.run(self.program, f"--use-list={chosen}", "--file=-", str(self.file))

    async def load(self, url: str, wanted: Callable[[str], object]) -> None:
        """Restore some entries. In one process: with more of them TimescaleDB's catalog comes too late for rows."""
        with self._chosen(wanted) as chosen:
            await programs.run(
                self.program, "--no-owner", "--no-acl", "--exit-on-error", f"--use-list={chosen}", str(self.file),
                url=url,
            )  # fmt: skip

    @contextmanager
    def _chosen(self, wanted: Callable[[str], object]) -> Iterator[str]:
        with tempfile.NamedTemporaryFile("w", suffix=".list") as chosen:
            chosen.writelines(f"{line}\n" for line in self.entries if wanted(line))
            chosen.flush()
            yield chosen.name


async def _rows(program: Path, file: Path, table: str, schema: str | None = None) -> tuple[str, list[list[str]]]:
    """A small table of a dump: its schema, and the names of its columns before its rows, as COPY writes them."""
    where = [f"--table={table}"] + ([] if schema is None else [f"--schema={schema}"])
    script = await programs.run(program, "--data-only", *where, "--file=-", str(file))
    found = re.search(r"^COPY (\w+)\.\w+ \((.*)\) FROM stdin;\n(.*?)^\\\.$", script, re.MULTILINE | re.DOTALL)
    if found is None:
        raise BackupError(f"it is not whole, as it has no rows of {table}.")
    rows = [line.split("\t") for line in found[3].splitlines()]
    return found[1], [found[2].replace('"', "").split(", "), *rows]


def _is_privilege(entry: str) -> bool:
    return re.search(r"^\d+; \d+ \d+ (DEFAULT )?ACL ", entry) is not None


def _is_last(entry: str) -> bool:
    """Jobs, which are given to another role, and the revision, which says that the store is whole."""
    return re.search(r" TABLE DATA \w+ (bgw_job|alembic_version) ", entry) is not None


def _is_revision(entry: str) -> bool:
    return re.search(r" TABLE DATA \w+ alembic_version ", entry) is not None


_ROLE: Final = r'(?:"(?:[^"]|"")+"|[^\s";]+)'
_GRANTEE: Final = re.compile(rf" (?:TO|FROM) ({_ROLE})(?: WITH GRANT OPTION)?;$")
_DEFAULTS_OF: Final = re.compile(rf"^ALTER DEFAULT PRIVILEGES FOR ROLE {_ROLE} ")


def _privileges(script: str) -> list[tuple[str, str]]:
    """The statements of a script that give or take privileges, each with the role that it is about."""
    kinds = ("GRANT ", "REVOKE ", "ALTER DEFAULT PRIVILEGES ")
    return [
        (line, match[1])
        for line in script.splitlines()
        if line.startswith(kinds) and (match := _GRANTEE.search(line)) is not None
    ]


async def _restore(
    file: Path,
    url: str,
    settings: Settings,
    *,
    owner: str | None,
    grants: list[str],
    expected: Content | None,
    data_dir: Path | None,
) -> tuple[dict[str, Any], list[str] | None]:
    """Restore into an empty database; what was restored, and in what it departs from what was expected.

    The database says of itself that it is half restored until all is done.
    """
    began = time.monotonic()
    host = await repository.writing_host(url)
    differences = None
    async with RestoreRepository.open(host, settings) as target:
        with _and_so("" if data_dir is None else f"Nothing was restored into {data_dir}."):
            archive, of = await _checked(file, target, owner, grants)
        timescaledb = archive.timescaledb is not None
        await target.say(HALF_RESTORED)
        half = "The database is restored half way, which its comment says: drop it and try again."
        if data_dir is not None:
            half = f"The database is restored half way: remove the directory {data_dir} and try again."
        try:
            with _and_so(half), remarks.status("restore") as status:
                granted, missing = await _load(archive, target, host, of)
                if expected is not None:
                    status.update("compare")
                    found = await _held(archive, target)
                    differences = expected.differences(found if expected.bars else found.without_bars())
                status.update("restore")
                if timescaledb:
                    await target.post_restore()
                for role in grants:
                    await target.grant(role, of)
                if timescaledb:
                    others = [await target.quoted(role) for role in [of, *grants]]
                    await target.let_use_timescaledb([*others, *granted])
                await target.analyze()
                if timescaledb:
                    await target.require_working_jobs()
                await archive.load(host, _is_revision)
                await target.say(None)
        except BaseException:
            if timescaledb:
                await asyncio.shield(_leave_restoring(host, settings))
            raise
    if missing:
        remarks.print(
            f"[yellow]Roles of the dump that are not here and got no rights:[/yellow] {', '.join(sorted(missing))}",
            highlight=False,
        )
    return {
        "file": str(file), "owner": of, "granted": sorted(granted | set(grants)), "missing_roles": sorted(missing),
        "timescaledb": archive.timescaledb, "jobs": 0 if archive.jobs is None else len(archive.jobs.rows),
        "seconds": round(time.monotonic() - began, 1),
    }, differences  # fmt: skip


@contextmanager
def _and_so(sentence: str) -> Iterator[None]:
    """Add to an error what is left of it."""
    try:
        yield
    except QuotesError as error:
        raise BackupError(f"{error.detail} {sentence}".strip()) from error


async def _held(archive: _Archive, target: RestoreRepository) -> Content:
    """What was loaded, with the revision that the dump has, before any job changes it."""
    found = await target.content(restoring=archive.timescaledb is not None)
    return msgspec.structs.replace(found, revision=archive.revision)


async def _checked(file: Path, target: RestoreRepository, owner: str | None, grants: list[str]) -> tuple[_Archive, str]:
    """The dump and the role that will own it, after all that can be refused before anything is done."""
    await target.require_empty()
    archive = await _Archive.read(file, target.major)
    policies = archive.jobs is not None and bool(archive.jobs.rows)
    of = owner or target.role.name
    await target.require_roles(of, grants, jobs=policies)
    if archive.timescaledb is not None:
        await target.require_timescaledb(archive.timescaledb, await archive.extension_schema(), policies=policies)
    return archive, of


async def _load(archive: _Archive, target: RestoreRepository, url: str, owner: str) -> tuple[set[str], set[str]]:
    """Everything but the revision, with no hook and no job of TimescaleDB: the roles with rights, and those missing."""
    extension = None
    if archive.timescaledb is not None:
        extension = (await archive.extension_schema()).strip('"')  # which is there with it
        await target.pre_restore()
    await archive.load(url, lambda entry: not _is_last(entry) and f" SCHEMA - {extension} " not in entry)
    await target.give(owner)
    privileges = _privileges(await archive.script(_is_privilege))
    roles = {role for _, role in privileges}
    known = await target.known(roles) | (roles & {"PUBLIC"})
    of = await target.quoted(owner)
    await target.execute(
        [
            _DEFAULTS_OF.sub(lambda _: f"ALTER DEFAULT PRIVILEGES FOR ROLE {of} ", statement)
            for statement, role in privileges
            if role in known
        ]
    )
    if archive.jobs is not None:
        await target.add_jobs(archive.jobs, owner)
    return known, roles - known


async def _leave_restoring(url: str, settings: Settings) -> None:
    """After a failure: a database that nobody restores any more is not in restoring mode, if it can still be told."""
    with suppress(QuotesError):
        async with RestoreRepository.open(url, settings) as target:
            await target.leave_restoring()


async def _in_scratch(file: Path, url: str, settings: Settings) -> Content:
    """What a dump holds, restored into an empty database where no job ever runs."""
    async with RestoreRepository.open(url, settings) as target:
        archive, of = await _checked(file, target, None, [])
        with remarks.status("restore into a scratch database") as status:
            await _load(archive, target, url, of)
            status.update("compare")
            return await _held(archive, target)
