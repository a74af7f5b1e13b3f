"""A primary that is lost, a standby in its place, and the old primary back: three hosts in the URL of the service.

Who promotes does here what Patroni does: takes the standby that has received most, and lets the other follow it.
"""

import asyncio
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from tests.chaos.recording import Ledger, Writer, Writers, fleet, milliseconds
from tests.chaos.reporting import Report
from tests.chaos.verifying import verify
from tests.chaos.victims import QUIET, Postgres, Service, children, ended, postmaster_of, signal_to, thaw

Replication = Literal["synchronous", "asynchronous"]
_WRITERS: Final = 4
_STEP: Final = 2.0
_PROBE: Final = 0.25
#: docs/replicas.md: writes go on in at most so many seconds from the promotion.
_PROMISED: Final = 10.0
_PATIENCE: Final = 60.0
_RECEIVED: Final = "SELECT coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn"
_FOLLOWING: Final = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
_RELOAD: Final = "SELECT pg_reload_conf()"


@dataclass
class Trio:
    """A primary and two standbys of it."""

    replication: Replication
    primary: Postgres
    standbys: list[Postgres]
    frozen: list[int] = field(default_factory=list)

    @classmethod
    async def started(cls, stack: ExitStack, directory: Path, replication: Replication) -> "Trio":
        """All three, running; they end with the stack."""
        primary = Postgres.create(directory / "0")
        stack.enter_context(ended(primary))
        await asyncio.to_thread(primary.start)
        standbys = []
        for number in (1, 2):
            standbys.append(await asyncio.to_thread(primary.standby, directory / str(number), f"s{number}"))
            stack.enter_context(ended(standbys[-1]))
            await asyncio.to_thread(standbys[-1].start)
        if replication == "synchronous":
            await primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (s1, s2)'", _RELOAD)
        return cls(replication, primary, standbys)

    @property
    def url(self) -> str:
        """One that names all three."""
        hosts = ",".join(str(server.cluster.socket) for server in (self.primary, *self.standbys))
        return f"postgresql://quotes@/quotes?host={hosts}"

    async def pull(self) -> None:
        """Kill a standby: of two, one is enough."""
        await asyncio.to_thread(self.standbys[0].kill)

    async def put_back(self) -> None:
        """Start the standby that was pulled, and return when both follow."""
        await asyncio.to_thread(self.standbys[0].start)
        async with asyncio.timeout(_PATIENCE):
            while await self.primary.execute(_FOLLOWING) != len(self.standbys):  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.1)

    async def lose(self) -> None:
        """Freeze the primary, or let the standbys fall behind it and kill it."""
        if self.replication == "synchronous":
            self.frozen = self.primary.freeze()
            return
        receivers = [pid for standby in self.standbys for pid in _receivers(standby)]
        signal_to(receivers, signal.SIGSTOP)
        await asyncio.sleep(_STEP)
        await asyncio.to_thread(self.primary.kill)
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal_to(receivers, number)
        await asyncio.sleep(0.5)

    async def promote(self) -> Postgres:
        """Promote the standby that has received most, and let the other follow it."""
        received = [int(str(await standby.execute(_RECEIVED))) for standby in self.standbys]
        new = self.standbys[received.index(max(received))]
        (other,) = (standby for standby in self.standbys if standby is not new)
        other.follow(new, "s0")
        await other.execute(_RELOAD)
        await asyncio.to_thread(new.promote)
        return new

    async def bring_back(self) -> None:
        """Let the old primary go on as what it was."""
        if self.frozen:
            thaw(self.frozen)
        else:
            await asyncio.to_thread(self.primary.start)


async def failover(directory: Path, replication: Replication) -> Report:
    """Pull a standby, then lose the primary and promote the other, then let the old primary come back.

    Synchronous: the primary is frozen, and goes on where it was when it is thawed. Asynchronous: the standbys stop to
    receive, the primary is killed a little later, and starts again as what it was.
    """
    report = Report(f"failover, {replication}")
    ledger = Ledger()
    gaps: dict[str, float | None] = {}

    async def measure(what: str) -> None:
        """Time until a write is taken; new clients ask too, as those of before may all have a request under way."""
        since = time.monotonic()
        async with asyncio.TaskGroup() as probes:
            while ledger.recovered(since) is None and time.monotonic() - since < _PATIENCE:
                probe = Writer(ledger, [service.url], milliseconds(), rows=(1, 1), most=1, patience=0.0)
                probes.create_task(probe.run(asyncio.Event()))
                await asyncio.sleep(_PROBE)
        gaps[what] = ledger.recovered(since)
        await asyncio.sleep(_STEP)

    with ExitStack() as stack:
        trio = await Trio.started(stack, directory, replication)
        environment = trio.primary.environment | {"QUOTES_DATABASE_URL": trio.url}
        service = Service(directory / "service", QUIET | environment)
        stack.enter_context(ended(service))
        service.start()
        await asyncio.to_thread(service.wait_ready)
        async with Writers([*fleet(ledger, [service.url], _WRITERS, rows=(1, 300))]):
            await asyncio.sleep(_STEP)
            await trio.pull()
            await measure("a standby was pulled")
            await trio.put_back()
            await asyncio.sleep(_STEP)
            stopped = time.monotonic()
            await trio.lose()
            new = await trio.promote()
            await measure("the promotion")
            await trio.bring_back()
            await measure("the old primary came back")
            await asyncio.sleep(_STEP)
        verdict = await verify(ledger, new.url, service.url)
    if replication == "asynchronous":
        # What was acknowledged after replication had stopped may be lost, and nothing else.
        report.require(verdict.first_lost >= stopped, "quotes are lost that replication had got")
        report.require(verdict.lost > 0, "nothing was lost, so that this shows no bound")
        verdict.lost, lost = 0, verdict.lost
    else:
        lost = verdict.lost
    report.broken += verdict.broken
    for what, took in gaps.items():
        kept = took is not None and took <= _PROMISED
        report.require(kept, f"writes went on {took or _PATIENCE:.1f} s after {what}, {_PROMISED:g} s are promised")
    report.figures = {
        "rows": verdict.rows,
        "lost": lost,
        "torn": verdict.torn,
        "unknown": f"{verdict.unknown}, {verdict.unknown_stored} of them stored",
        **{f"s until writes went on after {what}": took and round(took, 2) for what, took in gaps.items()},
        "answers": dict(ledger.answers.most_common()),
    }
    return report


def _receivers(standby: Postgres) -> list[int]:
    """The processes that receive the log of the primary."""
    postmaster = postmaster_of(standby.cluster.data)
    pids = [] if postmaster is None else children(postmaster)
    return [pid for pid in pids if b"walreceiver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
