"""What networks do, on both sides of the service: a TCP proxy that is slow, cuts, swallows or keeps silent.

Between clients and the service another client, which is not behind the proxy, must not notice. Between the service and
its database every request has its answer in time, and all comes back by itself.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from app.db import embedded
from tests.chaos.deadlines import ENVIRONMENT, SLACK, WRITING, Question, asking, questions
from tests.chaos.recording import Ledger, Writers, fleet
from tests.chaos.reporting import Report
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, Postgres, Service, ended
from tests.hostile.striking import compared, judge_live, judge_other
from tests.hostile.watching import Sample, watching

Fault = Literal["latency", "slow", "reset", "black hole", "half-open", "replies dropped"]
FAULTS: Final[tuple[Fault, ...]] = ("latency", "slow", "reset", "black hole", "half-open", "replies dropped")
#: Seconds that each piece of data is late, and bytes a second where it is slow.
_LATE: Final = 0.2
_RATE: Final = 20_000
_WRITERS: Final = 6
_RECOVERY: Final = 5.0


@dataclass(eq=False)
class _Link:
    """One connection through the proxy, both halves of it."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    dead: bool = False  # nobody has told the near end

    def abort(self) -> None:
        for writer in (self.near, self.far):
            writer.transport.abort()


@dataclass
class Proxy:
    """Listens on a port of this machine and passes on to a port or a Unix socket, as its fault lets it."""

    target: int | Path
    port: int = 0
    fault: Fault | None = None
    links: set[_Link] = field(default_factory=set)
    _serving: set[asyncio.Task[None]] = field(default_factory=set)
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Proxy"]:
        """Pass on meanwhile."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self._over.set()
            server.close()
            while self._serving:
                for link in list(self.links):
                    link.abort()
                await asyncio.wait(self._serving, timeout=1)

    @asynccontextmanager
    async def faulty(self, fault: Fault) -> AsyncIterator[None]:
        """Have a fault meanwhile; connections that died unseen are seen at its end."""
        self._over.clear()
        self.fault = fault
        for link in list(self.links):
            if fault == "reset":
                link.abort()
            elif fault == "half-open":
                link.dead = True
                link.far.transport.abort()
        try:
            yield
        finally:
            self.fault = None
            self._over.set()
            for link in list(self.links):
                if link.dead:
                    link.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault == "reset":
            writer.transport.abort()
            return
        if self.fault == "black hole":
            await self._over.wait()
        try:
            if isinstance(self.target, Path):
                far_reader, far_writer = await asyncio.open_unix_connection(self.target)
            else:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, far_writer)
        self.links.add(link)
        try:
            pumps = (
                self._pump(link, reader, far_writer, reply=False),
                self._pump(link, far_reader, writer, reply=True),
            )
            await asyncio.gather(*pumps)
        finally:
            self.links.discard(link)
            link.abort()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reply: bool
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if link.dead:
                    continue
                match self.fault:
                    case "latency":
                        await asyncio.sleep(_LATE)
                    case "slow":
                        await asyncio.sleep(len(data) / _RATE)
                    case "black hole":
                        await self._over.wait()
                    case "replies dropped" if reply:
                        link.abort()
                        return
                writer.write(data)
                await writer.drain()
        if link.dead:
            await self._over.wait()
        elif not writer.is_closing():
            with suppress(OSError):
                writer.close()


async def before_service(fault: Fault, directory: Path, scale: float, seed: int) -> Report:
    """Clients behind a proxy, and another one that is not."""
    report = Report(f"clients, {fault}")
    seconds = max(3, 15 * scale)
    ledger = Ledger()
    with ExitStack() as stack:
        service = Service(directory / "service", QUIET)
        stack.enter_context(ended(service))
        service.start()
        await asyncio.to_thread(service.wait_ready)
        watcher = stack.enter_context(watching(service.url, service.pid))
        async with Proxy(service.port).listening() as proxy:
            writers = fleet(ledger, [f"http://127.0.0.1:{proxy.port}"], _WRITERS, rows=(1, 300), pace=0.02)
            async with Writers([*writers]):
                await asyncio.sleep(1)
                await asyncio.to_thread(watcher.take)
                await asyncio.sleep(seconds)
                control = await asyncio.to_thread(watcher.take)
                async with proxy.faulty(fault):
                    await asyncio.sleep(seconds)
                during = await asyncio.to_thread(watcher.take)
                recovery = await ledger.recovery(time.monotonic(), 60)
        other = await asyncio.to_thread(watcher.stop)
        for noted in (ledger, other):
            verdict = await verify(noted, embedded.url(service.directory / "data"), service.url)
            report.broken += verdict.broken
            report.require(noted.rows > 0, "nothing was acknowledged: this proves nothing")
    judge_live(report, control, during, fault)
    judge_other(report, control, during, fault)
    report.require(recovery is not None and recovery < _RECOVERY, f"writes came back after {recovery or 60:.1f} s")
    report.figures = _figures(control, during, ledger, recovery) | {"seed": seed}
    return report


async def before_database(fault: Fault, directory: Path, scale: float, seed: int, *, timed: bool = True) -> Report:
    """A proxy between the service and its database; every kind of request beside writers.

    `timed` says whether what took long breaks a promise.
    """
    report = Report(f"database, {fault}")
    seconds = max(3, 15 * scale)
    ledger = Ledger()
    with ExitStack() as stack:
        postgres = Postgres.create(directory / "database")
        stack.enter_context(ended(postgres))
        await asyncio.to_thread(postgres.start)
        async with Proxy(postgres.cluster.socket / ".s.PGSQL.5432").listening() as proxy:
            url = f"postgresql://quotes@127.0.0.1:{proxy.port}/quotes"
            service = Service(
                directory / "service", postgres.environment | QUIET | ENVIRONMENT | {"QUOTES_DATABASE_URL": url}
            )
            stack.enter_context(ended(service))
            service.start()
            await asyncio.to_thread(service.wait_ready)
            watcher = stack.enter_context(watching(service.url, service.pid))
            writers = [*fleet(ledger, [service.url], _WRITERS, rows=(1, 50), patience=0.3, pace=0.02)]
            async with Writers(writers):
                await asyncio.sleep(1)
                await asyncio.to_thread(watcher.take)
                await asyncio.sleep(seconds / 2)
                control = await asyncio.to_thread(watcher.take)
                ledger.seconds.clear()
                async with asking(service.url, _questions(writers[0].symbol, timed=timed), report) as slowest:
                    async with proxy.faulty(fault):
                        await asyncio.sleep(seconds)
                    during = await asyncio.to_thread(watcher.take)
                    recovery = await ledger.recovery(time.monotonic(), 60)
            other = await asyncio.to_thread(watcher.stop)
            for noted in (ledger, other):
                verdict = await verify(noted, postgres.url, service.url)
                report.broken += verdict.broken
                report.require(noted.rows > 0, "nothing was acknowledged: this proves nothing")
            await asyncio.to_thread(service.stop)
    slowest["write"] = max(ledger.seconds, default=0)
    report.require(recovery is not None, "writes do not come back")
    if timed:
        report.require(slowest["write"] <= WRITING + SLACK, f"a write took {slowest['write']:.1f} s of {WRITING:g}")
        report.require(recovery is None or recovery < _RECOVERY, f"writes came back after {recovery or 0:.1f} s")
        judge_live(report, control, during, fault)
    report.figures = _figures(control, during, ledger, recovery) | {
        "slowest answer s": {name: round(took, 2) for name, took in sorted(slowest.items())},
        "seed": seed,
    }
    return report


def _questions(symbol: str, *, timed: bool) -> list[Question]:
    return [question if timed else replace(question, deadline=60) for question in questions(symbol)]


def _figures(control: Sample, during: Sample, ledger: Ledger, recovery: float | None) -> dict[str, object]:
    return {
        "live p99 ms": compared(control.live, during.live),
        "other p99 ms": compared(control.other, during.other),
        "other": dict(during.answers.most_common()),
        "answers": dict(ledger.answers.most_common()),
        "writes back after s": None if recovery is None else round(recovery, 2),
        "rows": ledger.rows,
    }
