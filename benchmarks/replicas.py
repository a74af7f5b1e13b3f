"""What heavy reads cost ingest: without them, with them on a standby, and with them on the primary.

The three take turns in rotating order, and ratios are taken within a round. Primary and writer are bound to one core
and the standby to another, as they would be on machines of their own; memory and disk stay shared. Quotes are written
and read through the repository, without HTTP.

    python -m benchmarks.replicas [--rounds 6] [--batches 20]
"""

import argparse
import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.db.embedded import _Cluster
from app.db.migrate import migrate
from app.db.replicas import ReplicatedDatabase
from app.errors import QuotesError
from app.metrics import REGISTRY
from app.quote.batch import Batch
from app.quote.terms import Receipt, Terms
from app.repository.ingest import Write
from app.repository.quotes import QuoteRepository
from app.settings import Settings

SYMBOLS = [f"BENCH{i:02}" for i in range(50)]
ROWS = 10_000
MODES = ("none", "standby", "primary")
COUNTERS: dict[str, tuple[str, dict[str, str]]] = {
    "replica": ("quotes_reads_total", {"role": "replica"}),
    "retries": ("quotes_read_retries_total", {}),
}


@contextmanager
def replication(directory: Path) -> Iterator[tuple[_Cluster, _Cluster]]:
    paths = directory / "p", directory / "s"
    for path in paths:
        path.mkdir()
    primary = _Cluster.prepare(paths[0])
    standby = replace(primary, data=paths[1] / "pgdata", socket=paths[1] / "run")
    standby.give(standby.data)
    standby.give(standby.socket)
    primary.start()
    try:
        standby.run("pg_basebackup", "-R", "--checkpoint=fast", "-h", str(primary.socket), "-U", "quotes")
        standby.start()
        try:
            yield primary, standby
        finally:
            standby.stop()
    finally:
        primary.stop()


def bind(cluster: _Cluster, core: int) -> None:
    postmaster = (cluster.data / "postmaster.pid").read_text().split()[0]
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    for pid in (postmaster, *children):
        os.sched_setaffinity(int(pid), {core})


class Load:
    """An endless supply of new quotes, and what is read of them."""

    def __init__(self, quotes: QuoteRepository) -> None:
        self.quotes = quotes
        self.start = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=20)
        self.ticks = 0
        self.reads = 0

    def batch(self) -> Batch:
        """The next quotes of every symbol."""
        rows = []
        for i in range(ROWS // len(SYMBOLS)):
            moment = self.start + timedelta(milliseconds=200 * (self.ticks + i))
            price = 100 + random.randint(0, 10_000) / 100
            rows += [{"symbol": s, "timestamp": moment, "price": price, "volume": 100} for s in SYMBOLS]
        self.ticks += ROWS // len(SYMBOLS)
        return Batch.from_rows(rows, Terms(self.quotes.limits()))

    async def write(self, batch: Batch) -> None:
        """Store a batch in a transaction of its own."""
        (receipt,) = await self.quotes.write([Write(batch, "update", "abort")])
        assert isinstance(receipt, Receipt)
        assert receipt.inserted == len(batch)

    async def read(self, mode: str) -> None:
        """Compute the hourly bars of everything, again and again."""
        view = self.quotes.at("eventual" if mode == "standby" else "strong")
        while True:
            try:
                await view.get_bars(SYMBOLS, "1h", self.start, self.start + timedelta(days=20))
                self.reads += 1
            except QuotesError as error:
                print(f"a read failed: {error.code}")

    async def turn(self, mode: str, batches: list[Batch]) -> float:
        """Quotes written per second beside the reads of a mode."""
        readers = [] if mode == "none" else [asyncio.create_task(self.read(mode)) for _ in range(2)]
        await asyncio.sleep(0.5)
        began = time.perf_counter()
        for batch in batches:
            await self.write(batch)
        rate = sum(map(len, batches)) / (time.perf_counter() - began)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await asyncio.sleep(1)  # the standby catches up, cancelled statements end
        return rate


async def measure(primary: _Cluster, standby: _Cluster, rounds: int, batches: int) -> None:
    urls = [f"postgresql://quotes@/quotes?host={cluster.socket}" for cluster in (primary, standby)]
    settings = Settings(_env_file=None, database_url=urls[0], read_database_url=urls[1], retention=None)
    await migrate(urls[0], settings.model_copy(update={"require_timescaledb": "none"}))
    database = ReplicatedDatabase(urls[0], urls[1], settings)
    await database.connect()
    try:
        load = Load(QuoteRepository(database, settings))
        for _ in range(60):
            await load.write(load.batch())
        await asyncio.sleep(3)
        found: dict[str, list[float]] = {mode: [] for mode in MODES}
        reads = dict.fromkeys(MODES, 0)
        for number in range(rounds):
            for mode in MODES[number % 3 :] + MODES[: number % 3]:
                prepared = [load.batch() for _ in range(batches)]
                before = load.reads
                found[mode].append(await load.turn(mode, prepared))
                reads[mode] += load.reads - before
            print(f"round {number + 1}: " + ", ".join(f"{mode} {found[mode][-1]:,.0f}/s" for mode in MODES), flush=True)
        counts = {name: REGISTRY.get_sample_value(*sample) for name, sample in COUNTERS.items()}
        print(f"asked of the standby: {counts['replica']:.0f}, repeated on the primary: {counts['retries']:.0f}")
    finally:
        await database.close()
    for mode in MODES:
        ratios = [rate / free for rate, free in zip(found[mode], found["none"], strict=True)]
        print(
            f"heavy reads {mode:8} {statistics.median(found[mode]):9,.0f} quotes/s,"
            f" x none: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {reads[mode]} reads"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batches", type=int, default=20, help="batches of 10,000 quotes a turn")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="opa-quotes-bench-"))
    directory.chmod(0o755)
    cores = sorted(os.sched_getaffinity(0))
    try:
        with replication(directory) as (primary, standby):
            os.sched_setaffinity(0, {cores[0]})
            bind(primary, cores[0])
            bind(standby, cores[-1])
            asyncio.run(measure(primary, standby, arguments.rounds, arguments.batches))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
