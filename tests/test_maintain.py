"""`opa-quotes maintain`, `/v1/storage` and the metrics of the store, at each level as far as it goes."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anyio
import httpx
import pytest
from anyio import to_thread
from typer.testing import CliRunner, Result

from app import cli
from app.clock import EPOCH, FIRST, LAST, Instant, Interval, Nanoseconds, nanoseconds, rfc3339
from app.db.capability import Level
from app.db.embedded import embedded_postgres
from app.db.engine import Database, read_facts
from app.db.migrate import downgrade, migrate
from app.errors import DatabaseUnavailable, InvalidQuotes, InvalidRequest, SettingsChanged
from app.main import create_app
from app.repository import maintenance
from app.repository.bars import Bar, BarPrice, BarSpec
from app.repository.maintenance import MaintenanceRepository, Window
from app.repository.quotes import QuoteRepository
from app.repository.ranges import Range
from app.repository.storage import StorageRepository
from app.settings import Settings
from tests.conftest import Lane, patiently, random_symbol, running
from tests.test_metrics import here

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
DAY = timedelta(days=1)
Maintain = Callable[..., Any]
#: The prices of which there are bars in the rollups.
MATERIALIZED: tuple[BarPrice, ...] = ("last", "mid")


def tick(symbol: str, at: Instant, price: int) -> dict[str, Any]:
    return {"symbol": symbol, "timestamp": at, "price": Decimal(price), "volume": price, "bid": Decimal(price)}


def offer(symbol: str, at: datetime, price: int) -> dict[str, Any]:
    """A quote of which nothing was traded."""
    return {"symbol": symbol, "timestamp": at, "bid": Decimal(price), "ask": Decimal(price + 2)}


def between(start: datetime, end: datetime) -> tuple[str, ...]:
    return "--start", start.date().isoformat(), "--end", end.date().isoformat()


class Store:
    """A database of its own, its repository, and `maintain` on it."""

    def __init__(self, lane: Lane, url: str, **overrides: Any) -> None:
        self.lane = lane
        self.url = url
        self.settings: Settings = lane.make_settings(database_url=url, **overrides)
        self.database = Database(url, self.settings)
        self.quotes = QuoteRepository(self.database, self.settings)

    def invoke(self, *arguments: str, environment: dict[str, str] | None = None) -> Result:
        """A verb of the command line."""
        values = {"QUOTES_DATABASE_URL": self.url, "QUOTES_POOL_SIZE": str(self.settings.pool_size)}
        return CliRunner().invoke(cli.app, ["maintain", *arguments], env=values | (environment or {}))

    async def maintain(self, *arguments: str, code: int = 0, environment: dict[str, str] | None = None) -> Any:
        """The JSON that a verb prints, run in a thread, as it brings its own event loop."""
        result = await to_thread.run_sync(lambda: self.invoke(*arguments, "--json", environment=environment))
        assert result.exit_code == code, (result.output, result.exception)
        return json.loads(result.stdout)

    async def fill(
        self,
        symbol: str,
        start: datetime,
        days: int,
        every: timedelta = timedelta(minutes=10),
        row: Callable[[str, datetime, int], dict[str, Any]] = tick,
    ) -> int:
        """A symbol's quotes; all of them, as if they had been written in their time."""
        rows = [row(symbol, start + i * every, 100 + i % 17) for i in range(int(days * DAY / every))]
        return await self.insert(rows)

    async def insert(self, rows: list[dict[str, Any]]) -> int:
        facts = self.database.facts
        await self.execute("UPDATE quotes.settings SET retention = NULL")
        self.database.facts = replace(facts, retention=None)
        try:
            return (await self.quotes.bulk_insert(rows)).inserted
        finally:
            days = "NULL" if facts.retention is None else f"interval '{facts.retention.days} days'"
            await self.execute(f"UPDATE quotes.settings SET retention = {days}")
            self.database.facts = facts

    async def execute(self, statement: str) -> None:
        async with self.database.dedicated(statement_timeout=timedelta(minutes=2)) as connection:
            await connection.execute(statement)


@pytest.fixture
async def store(lane: Lane, empty_url: str) -> Any:
    store = Store(lane, empty_url, retention=timedelta(days=90))
    await migrate(empty_url, store.settings)
    await store.database.connect()
    with suppress(Exception):  # where there are jobs, this test says when they run
        await store.execute(
            "SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs WHERE job_id >= 1000"
        )
    yield store
    await store.database.close()


async def test_show(store: Store) -> None:
    await store.fill("AAA", (NOW - 3 * DAY).replace(hour=0), 2)
    shown = await store.maintain("show")
    level = store.database.capability.level
    assert shown["level"] == str(level)
    names = [table["name"] for table in shown["tables"]]
    assert names[:3] == ["quotes.real_time", "quotes.latest", "quotes.receipts"]
    assert all(table["bytes"] > 0 for table in shown["tables"])
    if level >= Level.APACHE:
        assert shown["chunks"]["total"] == shown["chunks"]["by_state"]["rowstore"] == 2
    else:
        assert shown["chunks"]["total"] == 0
    if level >= Level.COMMUNITY:
        assert [rollup["name"] for rollup in shown["rollups"]] == ["ohlc_1m", "ohlc_1h", "ohlc_1d"]
        assert shown["rollups"][0]["lag_seconds"] > DAY.total_seconds()
        assert {job["name"] for job in shown["jobs"]} == {
            "columnstore", "retention", "refresh ohlc_1m", "refresh ohlc_1h", "refresh ohlc_1d"
        }  # fmt: skip


async def test_compress_and_decompress_change_no_answer(store: Store) -> None:
    start = (NOW - 40 * DAY).replace(hour=0)
    await store.fill("AAA", start, 3, timedelta(minutes=1))
    span = ("AAA", start, start + 3 * DAY)
    expected = [quote.to_dict() for quote in await store.quotes.get_quotes(*span, limit=10_000)]
    level = store.database.capability.level
    if level < Level.COMMUNITY:
        answer = await store.maintain("compress", code=1)
        assert answer["cannot"]
        assert (await store.maintain("decompress", *between(start, start + DAY), code=1))["cannot"]
        return
    answer = await store.maintain("compress")
    assert len(answer["done"]) == 3
    assert all(row["ratio"] > 3 for row in answer["done"])
    assert (await store.maintain("compress"))["done"] == []
    look = await StorageRepository(store.database).look()
    assert look.count("columnstore") == 3
    assert look.ratio is not None
    assert look.ratio > 3

    # A late quote and a changed one make a chunk partial; compressing it again keeps both.
    late = tick("AAA", start + timedelta(seconds=30), 7)
    changed = tick("AAA", start, 8)
    receipt = await store.quotes.bulk_insert([late, changed])
    assert (receipt.inserted, receipt.updated) == (1, 1)
    await store.execute(
        f"DELETE FROM quotes.real_time WHERE symbol = 'AAA' AND timestamp = '{expected[5]['timestamp']}'"
    )
    assert (await StorageRepository(store.database).look()).count("partial") == 1
    (again,) = (await store.maintain("compress"))["done"]
    assert again["was"] == "partial"
    expected = [quote for quote in expected if quote["timestamp"] != expected[5]["timestamp"]]
    expected[0] |= {"price": Decimal(8), "bid": Decimal(8), "volume": 8}
    expected.insert(1, {**expected[1], **late})
    assert [quote.to_dict() for quote in await store.quotes.get_quotes(*span, limit=10_000)] == expected

    answer = await store.maintain("decompress", *between(start, start + DAY))
    assert len(answer["done"]) == 1
    assert (await StorageRepository(store.database).look()).count("columnstore") == 2
    assert [quote.to_dict() for quote in await store.quotes.get_quotes(*span, limit=10_000)] == expected


@pytest.mark.concurrent
async def test_a_chunk_in_use_stops_no_other_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("no columnstore")
    monkeypatch.setattr(maintenance, "_LOCK_MS", 200)
    monkeypatch.setattr(maintenance, "_TRIES", 2)
    start = (NOW - 40 * DAY).replace(hour=0)
    await store.fill("AAA", start, 3)
    async with store.database.dedicated() as other:
        (chunk, *_) = (await StorageRepository(store.database).look()).chunks
        pid = other.get_server_pid()
        async with other.transaction():
            await other.execute(f"LOCK TABLE {chunk.name} IN ACCESS EXCLUSIVE MODE")
            shown = (await store.maintain("show"))["chunks"]["newest"]
            assert [row["locked_by"] for row in shown] == [None, None, pid]
            assert all(row["bytes"] > 0 for row in shown[:2])
            skipped = [{"chunk": chunk.name, "start": rfc3339(chunk.start), "used_by": [pid]}]
            for verb, done in (("reorder", 2), ("compress", 2)):
                answer = await store.maintain(verb, code=1)
                assert (len(answer["done"]), answer["skipped"]) == (done, skipped)
            told = await to_thread.run_sync(lambda: store.invoke("compress"))
            assert f"is in use by the server process {pid}." in told.stderr
            await store.maintain("apply", "--retention", "30 days", "--compress-after", "20 days", "--yes")
            answer = await store.maintain("drop", code=1)
            assert (answer["done"], answer["skipped"][0]) == ([], skipped[0])
            assert len(answer["skipped"]) == 3, "they go in the order of time"
    answer = await store.maintain("drop")
    assert (len(answer["done"]), answer["skipped"]) == (3, [])


@pytest.mark.concurrent
async def test_show_waits_for_nobody(store: Store) -> None:
    """Who holds a table or an index of one leaves the sizes that were last counted."""
    level = store.database.capability.level
    await store.fill("AAA", NOW - 3 * DAY, 2)
    if level >= Level.COMMUNITY:
        await store.maintain("refresh")
    async with store.database.dedicated() as other:
        tables = ["quotes.receipts", "quotes.real_time"]
        if level >= Level.APACHE:
            found = await other.fetch(
                "SELECT DISTINCT ON (hypertable_name) format('%I.%I', chunk_schema, chunk_name)"
                " FROM timescaledb_information.chunks ORDER BY hypertable_name DESC LIMIT 2"
            )
            tables[1:] = [name for (name,) in found]  # of the quotes, and of a rollup
        before = (await store.maintain("show"))["tables"]
        locks = [f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE" for table in tables]
        for statement in (*locks, "REINDEX INDEX quotes.receipts_pkey"):
            await other.execute(f"BEGIN; {statement}")
            shown = (await store.maintain("show"))["tables"]
            await other.execute("ROLLBACK")
            assert [row["name"] for row in shown] == [row["name"] for row in before]
            for now, then in zip(shown, before, strict=True):
                assert 0 <= now["index_bytes"] <= now["bytes"] <= then["bytes"], statement


async def test_dropped_quotes_stay_in_the_bars_and_symbols_tell_the_truth(store: Store) -> None:
    level = store.database.capability.level
    start = (NOW - 95 * DAY).replace(hour=0)
    await store.fill("AAA", start, 10)
    await store.fill("GONE", start, 1)
    await store.fill("FX", start, 10, row=offer)
    midnights = [nanoseconds(start + day * DAY) for day in range(1, 10)]
    await store.insert([tick("NANO", Nanoseconds(at + nanos), 1) for at in midnights for nanos in (-1, 3, 5)])

    async def hours() -> list[list[Bar]]:
        whole = (start, start + 10 * DAY)
        return [
            await store.quotes.get_bars("AAA", "1h", *whole, limit=1000),
            await store.quotes.get_bars("FX", "1h", *whole, price="mid", limit=1000),
        ]

    async def missing(price: BarPrice) -> dict[str, str]:
        """Why there are no bars of the two days that retention drops first."""
        days = Range(["AAA", "FX"], nanoseconds(start), nanoseconds(start + 2 * DAY))
        return dict((await store.quotes.summary_page(days, price))[1])

    bars = await hours()
    assert [len(of_symbol) for of_symbol in bars] == [240, 240]
    reasons = {"last": {"FX": "no-trades"}, "mid": {"AAA": "no-quotes"}}
    assert {price: await missing(price) for price in MATERIALIZED} == reasons

    planned = await store.maintain("drop", "--dry-run")
    assert planned["dry_run"]
    assert (await store.quotes.get_symbols())[0].first == start
    dropped = await store.maintain("drop")
    await store.database.connect()  # a service looks again by itself
    cutoff = datetime.fromisoformat(dropped["older_than"])
    assert start + 4 * DAY <= cutoff <= start + 6 * DAY
    assert len(planned["done"]) == len(dropped["done"])
    kept = await store.quotes.get_quotes("AAA", start, start + 10 * DAY, limit=10_000)
    assert kept[0].timestamp == cutoff
    assert [(s.symbol, s.first, s.first_nanos) for s in await store.quotes.get_symbols()] == [
        ("AAA", cutoff, 0), ("FX", cutoff, 0), ("NANO", cutoff, 3),
    ]  # fmt: skip
    if level >= Level.COMMUNITY:
        assert all(row["bars_completed"] for row in dropped["done"])
        for _ in range(2):
            assert await hours() == bars
            assert {price: await missing(price) for price in MATERIALIZED} == reasons
            # No refresh, even a forced one of everything, takes a bar away.
            await store.maintain("refresh", "--force", "--start", start.isoformat())
    else:
        assert dropped["cannot"]
        assert await missing("last") == {"AAA": "nothing-in-range", "FX": "nothing-in-range"}
    assert (await store.maintain("drop"))["done"] == []


@pytest.mark.parametrize(("row", "price"), [(tick, "last"), (offer, "mid")])
async def test_a_remnant_of_a_dropped_chunk_takes_no_bar_away(
    store: Store, row: Callable[[str, datetime, int], dict[str, Any]], price: BarPrice
) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("bars live with their quotes at this level")
    start = (NOW - 95 * DAY).replace(hour=0)
    await store.fill("AAA", start, 2, row=row)
    await store.maintain("drop")
    bars = await store.quotes.get_bars("AAA", "1h", start, start + 2 * DAY, price=price, limit=1000)
    assert len(bars) == 48
    columns = "symbol, timestamp, price, bid, ask"
    await store.execute(f"INSERT INTO quotes.real_time ({columns}) VALUES ('AAA', '{start}', 1, 1, 1)")
    (again,) = (await store.maintain("drop"))["done"]
    assert not again["bars_completed"]
    assert await store.quotes.get_bars("AAA", "1h", start, start + 2 * DAY, price=price, limit=1000) == bars


async def test_nothing_is_dropped_without_a_retention(store: Store) -> None:
    await store.fill("AAA", (NOW - 100 * DAY).replace(hour=0), 1)
    await store.maintain("apply", "--retention", "none")
    answer = await store.maintain("drop")
    assert "none" in answer["kept"]
    assert await store.quotes.count_quotes("AAA") == 144


async def test_refresh_moves_the_watermarks(store: Store) -> None:
    start = (NOW - 10 * DAY).replace(hour=0)
    await store.fill("AAA", start, 3)
    answer = await store.maintain("refresh")
    if store.database.capability.level < Level.COMMUNITY:
        assert answer["done"] == []
        assert answer["cannot"]
        return
    assert [row["rollup"] for row in answer["done"]] == ["ohlc_1m", "ohlc_1h", "ohlc_1d"]
    look = await StorageRepository(store.database).look()
    assert all(rollup.lag == timedelta(0) for rollup in look.rollups)
    async with MaintenanceRepository.open(store.database, store.settings) as repository:
        repository.facts = replace(repository.facts, dropped_before=start + DAY)
        for _, window in await repository.refresh_windows(NOW, start - 1000 * DAY, None):
            assert window.start == start + DAY, "never over quotes that were dropped"


async def test_a_refresh_goes_in_batches(store: Store) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("no rollups")
    start = (NOW - 35 * DAY).replace(hour=0)
    await store.fill("AAA", start, 2)
    await store.fill("AAA", NOW - DAY, 1)
    async with MaintenanceRepository.open(store.database, store.settings) as repository:
        windows = dict(await repository.refresh_windows(NOW, FIRST, LAST))
        assert windows["ohlc_1m"].start == start, "nothing is looked at where nothing is stored"
        for rollup, window in windows.items():
            told: list[Window] = []
            await repository.refresh(rollup, window, force=True, told=told.append)
            assert (told[0].start, told[-1].end) == (window.start, window.end)
            assert all(one.end == two.start for one, two in pairwise(told))
            assert len(told) == {"ohlc_1m": 4, "ohlc_1h": 1, "ohlc_1d": 1}[rollup]
            assert max(batch.end - batch.start for batch in told) <= 10 * DAY or rollup != "ohlc_1m"


@pytest.mark.concurrent
async def test_no_policy_fails_beside_a_refresh_by_hand(store: Store) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("no policies")
    await store.fill("AAA", NOW - DAY, 1)

    async def next_starts() -> list[datetime]:
        async with store.database.dedicated() as connection:
            rows = await connection.fetch(
                "SELECT next_start FROM timescaledb_information.jobs"
                " WHERE proc_name = 'policy_refresh_continuous_aggregate' AND scheduled"
            )
            return [row[0] for row in rows]

    await store.execute(
        "SELECT alter_job(job_id, scheduled => true, next_start => now() + interval '1 minute')"
        " FROM timescaledb_information.jobs WHERE proc_name = 'policy_refresh_continuous_aggregate'"
    )
    seen: list[list[datetime]] = []
    async with MaintenanceRepository.open(store.database, store.settings) as repository:
        for rollup, window in await repository.refresh_windows(datetime.now(UTC), None, None):
            looks: list[asyncio.Task[list[datetime]]] = []

            def look(_: Window, looks: list[asyncio.Task[list[datetime]]] = looks) -> None:
                looks.append(asyncio.create_task(next_starts()))

            await repository.refresh(rollup, window, told=look)
            seen += await asyncio.gather(*looks)
    assert len(seen) == 3
    assert all(len(starts) == 3 for starts in seen)
    assert min(min(starts) for starts in seen) > datetime.now(UTC) + timedelta(minutes=5), "they are put off"
    assert max(await next_starts()) < datetime.now(UTC) + timedelta(minutes=1), "and go on afterwards"


async def test_a_chunk_that_retention_took_meanwhile_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("no columnstore")
    await store.fill("AAA", (NOW - 40 * DAY).replace(hour=0), 2)
    async with MaintenanceRepository.open(store.database, store.settings) as repository:
        first, second = await repository.chunks()
    await store.execute(f"DROP TABLE {first.name}")
    async with MaintenanceRepository.open(store.database, store.settings) as repository:
        assert not await repository.compress(first)
        assert not await repository.decompress(first)
        assert not await repository.reorder(first)
        assert await repository.compress(second)
    monkeypatch.setattr(MaintenanceRepository, "due", AsyncMock(return_value=[first]))
    answer = await store.maintain("compress")
    assert (answer["done"], answer["dropped_meanwhile"]) == ([], 1)


@pytest.mark.concurrent
async def test_two_drops_at_once_are_done_or_say_why_not(store: Store) -> None:
    if store.database.capability.level < Level.APACHE:
        pytest.skip("no chunks")
    await store.fill("AAA", (NOW - 100 * DAY).replace(hour=0), 9, every=timedelta(hours=6))

    async def drop() -> str:
        async with MaintenanceRepository.open(store.database, store.settings) as repository:
            try:
                await repository.drop()
            except DatabaseUnavailable as error:
                return error.detail
        return "dropped"

    told = await asyncio.gather(drop(), drop())
    assert "dropped" in told
    assert all(one == "dropped" or "run the same command later" in one for one in told)
    async with MaintenanceRepository.open(store.database, store.settings) as repository:
        assert await repository.expired(datetime.now(UTC)) == []
    assert await store.quotes.count_quotes("AAA") == 0


async def test_bars_that_retention_has_cut_say_from_when_they_are(store: Store) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("no bars outlive their quotes here")
    start = (NOW - 60 * DAY).replace(hour=0)
    await store.fill("AAA", start, 3, timedelta(minutes=30), row=offer)
    await store.maintain("apply", "--retention", "59 days", "--yes")
    await store.maintain("drop")
    async with store.database.dedicated() as connection:
        store.database.facts = await read_facts(connection, store.database.facts)
    kept = store.database.facts.dropped_before
    assert kept == start + DAY
    wanted = Range(["AAA"], nanoseconds(start), nanoseconds(start + 3 * DAY))
    for spec, expected in (
        (BarSpec(Interval(1, "d"), "bid"), kept),
        (BarSpec(Interval(5, "s"), "mid"), kept),
        (BarSpec(Interval(1, "d"), "mid"), None),
        (BarSpec(Interval(1, "d"), "bid", "Etc/GMT+3"), kept + timedelta(hours=3)),
        (BarSpec(Interval(1, "d"), "mid", "Asia/Kathmandu"), None),
    ):
        assert store.quotes.complete_from(wanted, spec) == expected
        page, _ = await store.quotes.bars_page(wanted, spec)
        starts = [datetime.fromisoformat(json.loads(text)["timestamp"]) for text in page.rows]
        if expected is None:
            assert starts[0] < kept, spec
        else:
            assert starts[starts[0] < expected] == expected, f"{spec}: at most one that is cut before it"
        after = replace(wanted, start=nanoseconds(kept + DAY))
        assert store.quotes.complete_from(after, spec) is None
    newest = replace(wanted, limit=200, sort="desc", limit_per_symbol=200)
    bars, _ = await store.quotes.bars_page(newest, BarSpec(Interval(10, "m"), "mid"))
    assert len(bars.rows) == 3 * 48, "gaps are skipped below what was dropped too"
    filled, _ = await store.quotes.bars_page(
        replace(wanted, start=wanted.start + 60 * 10**9, limit=5000), BarSpec(Interval(1, "m"), "mid", fill="previous")
    )
    assert len(filled.rows) == 3 * 1440 - 1, "from the close of a rollup on"


async def test_a_deletion_of_what_retention_took_says_so(store: Store) -> None:
    """Also where another process changed the retention since this one read it."""
    level = store.database.capability.level
    start = (NOW - 60 * DAY).replace(hour=0)
    await store.fill("AAA", start, 3)
    async with QuoteRepository.open(store.url, store.settings) as library:
        await store.maintain("apply", "--retention", "58 days", "--yes")
        await store.maintain("drop")
        if level < Level.COMMUNITY:
            assert await library.delete_quotes("AAA", start, start + DAY) == 0, "no bars are left either"
            return
        bars = await library.get_bars("AAA", "1d", start, start + 2 * DAY)
        assert len(bars) == 2
        with pytest.raises(InvalidRequest, match="Retention has dropped"):
            await library.delete_quotes("AAA", start, start + DAY)
        # Of a range beside it what is stored is deleted.
        stored = await library.count_quotes("AAA")
        assert stored > 0
        assert await library.delete_quotes("AAA", start, start + 3 * DAY) == stored
        assert await library.get_latest_quote("AAA") is None
        assert await library.get_bars("AAA", "1d", start, start + 2 * DAY) == bars


ABSURD_RANGES = (
    ("--start", "0001-01-01T00:00+14:00"), ("--end", "9999-12-31T23:59-14:00"), ("--start", "x"), ("--start", "1e99"),
    ("--start", ""), ("--start", "2026-02-30"), ("--start", "2026-01-02", "--end", "2026-01-01"),
    ("--start", "2026-01-01", "--end", "2026-01-01"),
)  # fmt: skip


@pytest.mark.parametrize("verb", ["compress", "decompress", "refresh", "reorder"])
async def test_an_absurd_range_is_a_mistake_of_usage(store: Store, verb: str) -> None:
    whole = ("--start", "0001-01-01", "--end", "9999-12-31")
    result = await to_thread.run_sync(lambda: store.invoke(verb, *whole))
    assert (result.exit_code, result.exception) in {(0, None), (1, result.exception)}
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    for given in ABSURD_RANGES:
        missing = ("--end", "2026-01-01") if verb == "decompress" and "--end" not in given else ()
        result = await to_thread.run_sync(partial(store.invoke, verb, *given, *missing))
        assert result.exit_code == 2, (given, result.output)
        assert isinstance(result.exception, SystemExit), (given, result.exception)


async def test_apply_changes_the_settings_of_the_store_and_its_policies(store: Store) -> None:
    level = store.database.capability.level
    changed = {"QUOTES_RETENTION": "60 days", "QUOTES_COMPRESS_AFTER": "7 days", "QUOTES_CHUNK_INTERVAL": "12 hours"}
    planned = await store.maintain("apply", "--dry-run", environment=changed)
    answer = await store.maintain("apply", environment=changed)
    assert planned["done"] == answer["done"]
    settings = [row["setting"] for row in answer["done"]]
    assert settings[:3] == ["retention", "chunk interval", "compress after"]
    assert bool(answer["cannot"]) == (level < Level.COMMUNITY)
    assert len(settings) == (7 if level >= Level.COMMUNITY else 3)
    assert (await store.maintain("apply", environment=changed))["done"] == []
    assert (await store.maintain("apply"))["done"] == [], "what is not said stays"
    unlimited = await store.maintain("apply", "--retention", "none", environment=changed)
    back = await store.maintain("apply", environment=changed)
    assert {"setting": "retention", "before": "60 days", "after": "none"} in unlimited["done"]
    assert {"setting": "retention", "before": "none", "after": "60 days"} in back["done"]
    assert (await store.maintain("apply", environment=changed))["done"] == []


async def test_a_shorter_retention_says_first_what_goes(store: Store) -> None:
    level = store.database.capability.level
    start = (NOW - 50 * DAY).replace(hour=0)
    await store.fill("AAA", start, 4)
    bars = await store.quotes.get_bars("AAA", "1d", start, start + 4 * DAY)
    assert len(bars) == 4
    planned = await store.maintain("apply", "--retention", "45 days", "--dry-run")
    assert "quotes before" in planned["will_be_dropped"]
    assert ("by the job within the hour" in planned["will_be_dropped"]) == (level >= Level.COMMUNITY)
    people = await to_thread.run_sync(lambda: store.invoke("apply", "--retention", "45 days", "--dry-run"))
    assert people.output.count("will be dropped") == 1
    assert ("their bars stay" in planned["will_be_dropped"]) == (level >= Level.COMMUNITY)
    refused = await to_thread.run_sync(lambda: store.invoke("apply", "--retention", "45 days"))
    assert isinstance(refused.exception, InvalidRequest)
    assert "--yes" in str(refused.exception)
    assert (await store.maintain("drop"))["done"] == [], "nothing was changed"
    await store.maintain("apply", "--retention", "45 days", "--yes")
    assert len((await store.maintain("drop"))["done"]) == (4 if level >= Level.APACHE else 1)
    assert await store.quotes.count_quotes("AAA") == 0
    if level >= Level.COMMUNITY:
        assert await store.quotes.get_bars("AAA", "1d", start, start + 4 * DAY) == bars
        # A longer one again brings no quote back: what was dropped is not taken anew, since its bars would be lost.
        await store.maintain("apply", "--retention", "none")
        await store.maintain("refresh", "--force")
        assert await store.quotes.get_bars("AAA", "1d", start, start + 4 * DAY) == bars
        async with QuoteRepository.open(store.url, store.lane.make_settings(database_url=store.url)) as library:
            with pytest.raises(InvalidQuotes) as caught:
                await library.bulk_insert([tick("AAA", start + 3 * DAY, 1)])
            assert caught.value.rejections[0].code == "timestamp-too-old"
            assert (await library.bulk_insert([tick("AAA", start + 5 * DAY, 1)])).inserted == 1
    elif level < Level.APACHE:
        await store.maintain("apply", "--retention", "none")
        assert await store.fill("AAA", start, 1) == 144, "no bars outlive their quotes here"


async def test_no_quote_slips_in_behind_a_shorter_retention(store: Store) -> None:
    """Whoever opened the store before learns of it with the first late quote, also without a health check."""
    old = (NOW - 60 * DAY).replace(hour=3)
    async with QuoteRepository.open(store.url, store.settings) as library:
        assert (await library.bulk_insert([tick("AAA", old, 1)])).inserted == 1
        await store.maintain("apply", "--retention", "45 days", "--yes")
        await store.maintain("drop")
        with pytest.raises(SettingsChanged):
            await library.bulk_insert([tick("AAA", old + DAY, 1)])
        with pytest.raises(InvalidQuotes) as caught:
            await library.bulk_insert([tick("AAA", old + DAY, 1)])
        assert caught.value.rejections[0].code == "timestamp-too-old"
        assert (await library.bulk_insert([tick("AAA", NOW - 10 * DAY, 1)])).inserted == 1


async def test_what_was_dropped_is_known_after_a_way_down_and_up(store: Store) -> None:
    if store.database.capability.level < Level.COMMUNITY:
        pytest.skip("bars live with their quotes at this level")
    start = (NOW - 95 * DAY).replace(hour=0)
    await store.fill("AAA", start, 2)
    await store.fill("AAA", NOW - 2 * DAY, 1)
    await store.maintain("drop")
    await store.maintain("apply", "--retention", "none")
    await store.database.connect()
    dropped = store.database.facts.dropped_before
    assert dropped is not None
    await downgrade(store.url, store.settings, "r4")
    await migrate(store.url, store.settings)
    await store.database.connect()
    assert store.database.facts.retention is None
    assert (store.database.facts.dropped_before or EPOCH) >= dropped


async def test_another_setting_than_the_store_has_is_degraded_and_named(
    lane: Lane, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """And it changes nothing: neither what is taken nor what is dropped."""
    settings = store.settings.model_copy(update={"retention": None})
    async with running(create_app(settings)) as client:
        report = (await client.get("/health")).json()
        assert report["overall_status"] == "degraded"
        detail = report["checks"]["hypertable"]["detail"]
        assert "QUOTES_RETENTION is none and the store's is 90 days" in detail
        assert "maintain apply" in detail
        assert "the store's is 90 days. What the store has counts" in caplog.text
        assert caplog.text.count("settings differ from those of the store") == 1, "however often health is asked"
        assert here("quotes_settings_differ") == 1
        old = [{"symbol": "AAA", "timestamp": (NOW - 100 * DAY).isoformat(), "price": 1}]
        refused = await client.post("/v1/quotes", json=old)
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "timestamp-too-old")
        # The one command before a load of history; processes that run follow when they next look.
        await store.maintain("apply", "--retention", "none")
        await anyio.sleep(1.1)
        assert (await client.get("/health")).json()["overall_status"] == lane.soundest
        assert (await client.post("/v1/quotes", json=old)).status_code == 200


@pytest.mark.parametrize(
    ("chunk", "retention", "compress"),
    [("1 hour", "4 days", "1 day"), ("8 hours", "5 days", "8 hours"), ("7 days", "none", "30 days")],
)
async def test_every_accepted_quote_is_in_its_bars(
    lane: Lane, empty_url: str, chunk: str, retention: str, compress: str
) -> None:
    """At the oldest time that is taken too, after policies, a delete, and the drop of what is too old."""
    store = Store(lane, empty_url, chunk_interval=chunk, retention=retention, compress_after=compress)
    await migrate(empty_url, store.settings)
    await store.database.connect()
    try:
        oldest = store.database.facts.oldest(datetime.now(UTC)) or (NOW - 30 * DAY).replace(hour=0, minute=0)
        assert oldest == oldest.replace(hour=0, minute=0, second=0, microsecond=0)
        await store.fill("AAA", oldest, 1, timedelta(minutes=30))
        for job in (await StorageRepository(store.database).look()).jobs:
            if job.name.startswith("refresh"):
                async with store.database.dedicated(statement_timeout=timedelta(minutes=1)) as connection:
                    await patiently(connection, f"CALL run_job({job.id})")
        for interval in ("1m", "1h", "1d"):
            bars = await store.quotes.get_bars("AAA", interval, oldest, oldest + DAY, limit=10_000)
            assert sum(bar.count for bar in bars) == 48, interval
        assert await store.quotes.delete_quotes("AAA", oldest, oldest + timedelta(hours=2)) == 4
        (day,) = await store.quotes.get_bars("AAA", "1d", oldest, oldest + DAY)
        assert day.count == 44
        await store.maintain("drop")
        assert await store.quotes.get_bars("AAA", "1d", oldest, oldest + DAY) == [day]
    finally:
        await store.database.close()


@pytest.mark.concurrent
async def test_a_role_that_may_not_is_told_what_it_lacks(store: Store) -> None:
    await store.fill("AAA", (NOW - 40 * DAY).replace(hour=0), 1)
    role = f"app_{random_symbol().lower()}"
    url = f"{store.url}{'&' if '?' in store.url else '?'}role={role}"
    grants = "GRANT USAGE ON SCHEMA quotes TO {0}; GRANT SELECT ON ALL TABLES IN SCHEMA quotes TO {0}"
    await store.execute(f"CREATE ROLE {role}; {grants.format(role)}")
    try:
        environment = {"QUOTES_DATABASE_URL": url}
        cases: list[tuple[tuple[str, ...], str]] = [
            (("apply", "--retention", "100 days"), "permission denied for table settings")
        ]
        if store.database.capability.level >= Level.COMMUNITY:
            cases.append((("compress",), 'must be owner of hypertable "real_time"'))
        for arguments, lacks in cases:
            result = await to_thread.run_sync(partial(store.invoke, *arguments, environment=environment))
            assert str(result.exception) == f"The role of the URL may not do this: {lacks}."
    finally:
        await store.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_reorder(store: Store) -> None:
    start = (NOW - 5 * DAY).replace(hour=0)
    await store.fill("BBB", start, 1)
    await store.fill("AAA", start, 1)
    if store.database.capability.level < Level.COMMUNITY:
        assert "CLUSTER" in (await store.maintain("reorder", code=1))["cannot"][0]
        return
    answer = await store.maintain("reorder")
    assert len(answer["done"]) == 1
    async with store.database.dedicated() as connection:
        assert await connection.fetchval("SELECT symbol FROM quotes.real_time LIMIT 1") == "AAA"


async def test_storage_report_and_metrics(lane: Lane, client: httpx.AsyncClient, symbol: str) -> None:
    await client.post("/v1/quotes", json=[{"symbol": symbol, "timestamp": NOW.isoformat(), "price": 1}])
    answer = await client.get("/v1/storage", params={"limit": 1})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"level", "postgresql", "timescaledb", "tables", "compression", "chunks", "rollups", "jobs"}
    assert len(body["chunks"]["newest"]) <= 1
    assert sum(body["chunks"]["by_state"].values()) == body["chunks"]["total"]
    text = (await client.get("/metrics")).text
    assert 'quotes_storage_bytes{state="rowstore"}' in text
    assert 'timescaledb_hypertable_chunks{state="columnstore"}' in text
    if body["level"] == "community":
        assert 'timescaledb_cagg_watermark_lag_seconds{rollup="ohlc_1m"}' in text
        assert 'timescaledb_job_schedule_interval_seconds{job_name="columnstore"}' in text
    assert (await client.get("/v1/storage?limit=-1")).status_code == 400


async def test_the_monitor_looks_by_itself_and_never_fails_the_service(lane: Lane) -> None:
    if lane.name == "timescaledb":
        pytest.skip("one client at a time")
    async with running(create_app(lane.make_settings(monitor_interval=timedelta(milliseconds=50)))) as client:
        for _ in range(100):
            text = (await client.get("/metrics")).text
            if "quotes_monitor_up 1.0" in text:
                break
        assert "quotes_monitor_up 1.0" in text
        assert (await client.get("/health/live")).status_code == 200


async def test_on_the_embedded_database_stopped_and_running(shared_dir: Path) -> None:
    data = shared_dir / "maintained"

    def show() -> Result:
        return CliRunner().invoke(cli.app, ["maintain", "show", "--data-dir", str(data), "--json"])

    missing = await to_thread.run_sync(show)
    assert missing.exit_code == 1
    async with embedded_postgres(data) as url:
        await migrate(url, Settings(_env_file=None))
        while_running = await to_thread.run_sync(show)
    stopped = await to_thread.run_sync(show)
    for result in (while_running, stopped):
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["tables"][0]["name"] == "quotes.real_time"


async def test_tables_for_people(store: Store) -> None:
    await store.fill("AAA", (NOW - 40 * DAY).replace(hour=0), 1)
    environment = {
        "QUOTES_DATABASE_URL": store.url, "QUOTES_POOL_SIZE": str(store.settings.pool_size), "COLUMNS": "60"
    }  # fmt: skip
    for verb in ("show", "refresh", "apply", "drop"):
        # Nothing is cut where no terminal is narrow.
        result = await to_thread.run_sync(partial(CliRunner().invoke, cli.app, ["maintain", verb], env=environment))
        assert result.exit_code == 0, result.output
        assert "…" not in result.stdout
