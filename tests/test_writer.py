"""The writer: group commit, exact results, bounds and draining, with a flush that the test controls."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.errors import (
    Conflict,
    DatabaseRefused,
    DatabaseUnavailable,
    IdempotencyKeyInUse,
    OutcomeUnknown,
    Overloaded,
    QuotesError,
    QuotesLocked,
    ServiceStopping,
)
from app.quote.batch import Batch
from app.quote.terms import Receipt
from app.repository.ingest import Attempt, Write
from app.repository.receipts import IdempotencyKey
from app.settings import Settings
from app.writer import Writer


def now() -> datetime:
    return datetime.now(UTC) - timedelta(seconds=1)


def write(rows: int = 1, symbol: str = "A", age: timedelta = timedelta(0)) -> Write:
    newest = now() - age
    return Write(
        Batch.from_rows(
            [{"symbol": symbol, "timestamp": newest - timedelta(seconds=i), "price": 1} for i in range(rows)]
        )
    )


def late(rows: int = 1, symbol: str = "A") -> Write:
    return write(rows, symbol, age=timedelta(days=3))


def receipt(one: Write) -> Receipt:
    return one.batch.receipt(inserted=len(one.batch))


class Gate:
    """A flush that waits until it is opened and remembers what it was given."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.twice = asyncio.Event()
        self.flushes: list[int] = []

    async def __call__(self, writes: Sequence[Write], _attempt: Attempt) -> list[Receipt | QuotesError]:
        self.flushes.append(len(writes))
        if len(self.flushes) > 1:
            self.twice.set()
        await self.open.wait()
        return [receipt(one) for one in writes]


def make_settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **{"writer_flushes": 1, **values})


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_requests_that_wait_share_a_transaction() -> None:
    gate = Gate()
    async with Writer(gate, make_settings()) as writer:
        first = asyncio.create_task(writer.submit(write()))
        await settle()
        others = [asyncio.create_task(writer.submit(write(i))) for i in range(1, 6)]
        await settle()
        gate.open.set()
        assert (await first).inserted == 1
        assert [(await task).inserted for task in others] == [1, 2, 3, 4, 5]
    assert gate.flushes == [1, 5]


@pytest.mark.parametrize("beside", [[50], [1, 1, 1, 1]])
async def test_few_quotes_wait_for_the_transaction_in_flight_and_many_do_not(
    monkeypatch: pytest.MonkeyPatch, beside: list[int]
) -> None:
    monkeypatch.setattr("app.writer._WORTH_ROWS", 60)
    monkeypatch.setattr("app.writer._PATIENCE", 3600)
    gate = Gate()
    async with Writer(gate, make_settings(writer_flushes=2)) as writer:
        tasks = [asyncio.create_task(writer.submit(write()))]
        await settle()
        tasks += [asyncio.create_task(writer.submit(write())) for _ in range(20)]
        await settle()
        assert gate.flushes == [1]
        tasks += [asyncio.create_task(writer.submit(write(rows))) for rows in beside]
        await settle()
        assert gate.flushes == [1, 20 + len(beside)]
        gate.open.set()
        await asyncio.gather(*tasks)


async def test_few_quotes_do_not_wait_for_a_transaction_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.writer._PATIENCE", 0.01)
    gate = Gate()
    async with Writer(gate, make_settings(writer_flushes=2)) as writer:
        tasks = [asyncio.create_task(writer.submit(write()))]
        await settle()
        tasks.append(asyncio.create_task(writer.submit(write())))
        async with asyncio.timeout(30):
            await gate.twice.wait()
        gate.open.set()
        await asyncio.gather(*tasks)


async def test_a_transaction_is_bounded_in_rows() -> None:
    gate = Gate()
    gate.open.set()
    async with Writer(gate, make_settings(writer_flush_rows=10)) as writer:
        await asyncio.gather(*(writer.submit(write(6)) for _ in range(4)), writer.submit(write(25)))
    assert sum(gate.flushes) == 5
    assert max(gate.flushes) == 1


async def test_a_full_queue_refuses_and_recovers() -> None:
    gate = Gate()
    async with Writer(gate, make_settings(writer_queue_rows=10)) as writer:
        waiting = [asyncio.create_task(writer.submit(write(5))) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded) as caught:
            await writer.submit(write())
        assert caught.value.retry_after == 1.0
        gate.open.set()
        await asyncio.gather(*waiting)
        assert (await writer.submit(write(50))).inserted == 50, "a lone request may be larger than the queue"


async def test_bytes_are_bounded_too() -> None:
    gate = Gate()
    async with Writer(gate, make_settings(writer_queue_bytes=1024)) as writer:
        waiting = asyncio.create_task(writer.submit(write(59)))
        await settle()
        with pytest.raises(Overloaded):
            await writer.submit(write())
        gate.open.set()
        await waiting


async def test_a_poison_request_harms_only_itself() -> None:
    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        await asyncio.sleep(0.01)
        if any(one.batch.rows["symbol"][0].as_py() == "POISON" for one in writes):
            raise RuntimeError("poison")
        return [receipt(one) for one in writes]

    async with Writer(flush, make_settings()) as writer:
        results = await asyncio.gather(
            *(writer.submit(write(1, s)) for s in ("A", "B", "POISON", "C")), return_exceptions=True
        )
    assert [type(result).__name__ for result in results] == ["Receipt", "Receipt", "RuntimeError", "Receipt"]


async def test_errors_reach_their_own_request() -> None:
    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        return [Conflict([], 1) if one.on_conflict == "error" else receipt(one) for one in writes]

    async with Writer(flush, make_settings()) as writer:
        refused = write()
        refused.on_conflict = "error"
        results = await asyncio.gather(writer.submit(write()), writer.submit(refused), return_exceptions=True)
    assert isinstance(results[0], Receipt)
    assert isinstance(results[1], Conflict)


async def test_a_dead_database_fails_all_that_wait() -> None:
    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        raise DatabaseUnavailable("away")

    async with Writer(flush, make_settings()) as writer:
        results = await asyncio.gather(*(writer.submit(write()) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, DatabaseUnavailable) for result in results)


async def test_stopping_writes_what_was_accepted() -> None:
    gate = Gate()
    writer = Writer(gate, make_settings())
    async with writer:
        tasks = [asyncio.create_task(writer.submit(write())) for _ in range(3)]
        await settle()
        asyncio.get_running_loop().call_later(0.05, gate.open.set)
    assert [(await task).inserted for task in tasks] == [1, 1, 1]
    assert not writer.accepting
    with pytest.raises(ServiceStopping):
        await writer.submit(write())


async def test_what_does_not_drain_in_time_is_told() -> None:
    gate = Gate()
    async with Writer(gate, make_settings(drain_timeout="50 ms")) as writer:
        flushing = asyncio.create_task(writer.submit(write()))
        await settle()
        waiting = asyncio.create_task(writer.submit(write()))
        await settle()
    for task in (flushing, waiting):
        with pytest.raises(ServiceStopping):
            await task


async def test_what_waits_for_a_client_that_has_gone_is_not_written() -> None:
    gate = Gate()
    async with Writer(gate, make_settings()) as writer:
        flushing = asyncio.create_task(writer.submit(write()))
        await settle()
        gone, stays = (asyncio.create_task(writer.submit(write())) for _ in range(2))
        await settle()
        gone.cancel()
        gate.open.set()
        assert [(await task).inserted for task in (flushing, stays)] == [1, 1]
    assert gate.flushes == [1, 1]
    assert gone.cancelled()


async def test_a_client_that_goes_does_not_disturb_the_others() -> None:
    gate = Gate()
    async with Writer(gate, make_settings()) as writer:
        gone, stays = (asyncio.create_task(writer.submit(write())) for _ in range(2))
        await settle()
        gone.cancel()
        gate.open.set()
        assert (await stays).inserted == 1
    assert gone.cancelled()


async def test_bodies_that_are_being_read_take_room_from_the_queue() -> None:
    gate = Gate()
    gate.open.set()
    async with Writer(gate, make_settings(writer_queue_bytes=100_000)) as writer:
        writer.take(1_000_000)  # alone, it may be larger than the queue
        with pytest.raises(Overloaded) as caught:
            writer.take(1)
        assert caught.value.retry_after == 1.0
        writer.give_back(1_000_000)
        writer.take(99_000)
        writer.take(500)
        with pytest.raises(Overloaded):
            writer.take(600, alone=500)
        with pytest.raises(Overloaded):
            await writer.submit(write(59))
        writer.give_back(99_500)
        assert (await writer.submit(write(59))).inserted == 59


async def test_a_key_in_the_queue_is_in_use() -> None:
    gate = Gate()
    async with Writer(gate, make_settings()) as writer:
        keyed = [write(), write()]
        for one in keyed:
            one.idempotency = IdempotencyKey("key", b"")
        first = asyncio.create_task(writer.submit(keyed[0]))
        waiting = asyncio.create_task(writer.submit(write()))
        await settle()
        first.cancel()  # its client goes, its quotes are written all the same
        await settle()
        second = asyncio.create_task(writer.submit(keyed[1]))
        await settle()
        gate.open.set()
        with pytest.raises(IdempotencyKeyInUse):
            await second
        await waiting
        assert (await writer.submit(keyed[1])).inserted == 1, "answered, it is free again"


async def test_a_dry_run_has_a_transaction_of_its_own() -> None:
    gate = Gate()
    async with Writer(gate, make_settings()) as writer:
        first = asyncio.create_task(writer.submit(write()))
        await settle()
        waiting = [write() for _ in range(5)]
        waiting[2].dry_run = True
        tasks = [asyncio.create_task(writer.submit(one)) for one in waiting]
        await settle()
        gate.open.set()
        await asyncio.gather(first, *tasks)
    assert gate.flushes == [1, 2, 1, 2]


# --- late quotes, and what is refused together ---


class Chunks:
    """A flush that meets a lock on the chunk of each symbol in `locked`, and counts what it was asked for."""

    def __init__(self, locked: set[str]) -> None:
        self.locked = locked
        self.attempts: list[tuple[list[str], Attempt]] = []

    async def __call__(self, writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        symbols = [one.batch.rows["symbol"][0].as_py() for one in writes]
        self.attempts.append((symbols, attempt))
        await asyncio.sleep(0)
        if self.locked.intersection(symbols):
            raise QuotesLocked("locked")
        return [receipt(one) for one in writes]


async def test_live_quotes_do_not_wait_for_late_ones() -> None:
    """Whatever late quotes wait for, and however many they are."""
    blocked = asyncio.Event()
    lanes: list[tuple[bool, int]] = []

    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        lanes.append((attempt.late, len(writes)))
        if attempt.late:
            await blocked.wait()
        return [receipt(one) for one in writes]

    async with Writer(flush, make_settings(writer_queue_rows=100, writer_flushes=1)) as writer:
        old = [asyncio.create_task(writer.submit(late(7))) for _ in range(9)]
        await settle()
        assert [type(task.exception()) for task in old if task.done()] == [Overloaded, Overloaded], "half of the room"
        for _ in range(20):
            assert (await writer.submit(write(25))).inserted == 25
        assert not any(task.done() for task in old[:7])
        blocked.set()
        results = await asyncio.gather(*old, return_exceptions=True)
    assert [type(result) for result in results] == [Receipt] * 7 + [Overloaded] * 2
    assert lanes.count((False, 1)) == 20
    assert [n for is_late, n in lanes if is_late] == [7]


async def test_late_quotes_that_wait_have_half_of_the_bytes() -> None:
    gate = Gate()
    one = late(50)
    async with Writer(gate, make_settings(writer_queue_bytes=6 * one.batch.nbytes)) as writer:
        waiting = [asyncio.create_task(writer.submit(late(50))) for _ in range(3)]
        await settle()
        too_much = asyncio.create_task(writer.submit(late(1)))
        live = asyncio.create_task(writer.submit(write(50)))
        await settle()
        assert (too_much.done(), live.done()) == (True, False), "one is refused at once, one waits for the gate"
        assert isinstance(too_much.exception(), Overloaded)
        gate.open.set()
        assert [result.inserted for result in await asyncio.gather(*waiting, live)] == [50] * 4


async def test_late_quotes_share_smaller_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.writer._LATE_ROWS", 10)
    shared: list[tuple[bool, int]] = []

    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        shared.append((attempt.late, sum(len(one.batch) for one in writes)))
        return [receipt(one) for one in writes]

    async with Writer(flush, make_settings(writer_flush_rows=20)) as writer:
        await asyncio.gather(*(writer.submit(one(5)) for one in (late, write) for _ in range(8)))
    assert sorted(shared) == [(False, 20)] * 2 + [(True, 10)] * 4


async def test_requests_that_share_a_transaction_leave_half_of_the_time_to_be_tried_again() -> None:
    attempts: list[tuple[int, float]] = []

    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        attempts.append((len(writes), attempt.within))
        if len(writes) > 1:
            raise QuotesLocked("locked")
        return [receipt(one) for one in writes]

    async with Writer(flush, make_settings(write_timeout="1 hour")) as writer:
        await writer.submit(write())
        await asyncio.gather(*(writer.submit(write()) for _ in range(2)))
    alone, shared, *again = attempts
    assert (alone, shared) == ((1, 3600), (2, 1800))
    assert [rows for rows, _ in again] == [1, 1]
    assert all(1800 < within < 3600 for _, within in again), "what the first attempt left"


@pytest.mark.parametrize(
    ("age", "expected"),
    [(timedelta(0), False), (timedelta(minutes=50), False), (timedelta(minutes=70), True), (timedelta(-1), False)],
)
async def test_a_request_is_late_by_its_oldest_quote(age: timedelta, expected: bool) -> None:
    chunks = Chunks(set())
    both = Write(Batch.from_rows([{"symbol": "A", "timestamp": at, "price": 1} for at in (now() - age, now())]))
    async with Writer(chunks, make_settings()) as writer:
        await writer.submit(both)
    assert [attempt.late for _, attempt in chunks.attempts] == [expected]


async def test_what_is_blocked_refuses_only_itself() -> None:
    chunks = Chunks({"B"})
    async with Writer(chunks, make_settings()) as writer:
        results = await asyncio.gather(
            *(writer.submit(late(1, s)) for s in ("A", "B", "C", "B")), return_exceptions=True
        )
    assert [type(result).__name__ for result in results] == ["Receipt", "QuotesLocked", "Receipt", "QuotesLocked"]
    shared, *alone = [attempt for _, attempt in chunks.attempts]
    assert all(attempt.lock_timeout < shared.lock_timeout for attempt in alone), "the wait was the first one's"
    assert all(attempt.within <= 30 for attempt in alone)


async def test_small_requests_are_tried_again_before_large_ones() -> None:
    chunks = Chunks({"BIG"})
    async with Writer(chunks, make_settings()) as writer:
        sizes = {"BIG": 50, "A": 1, "B": 20, "C": 2}
        await asyncio.gather(*(writer.submit(write(n, s)) for s, n in sizes.items()), return_exceptions=True)
    assert [symbols for symbols, _ in chunks.attempts] == [["BIG", "A", "B", "C"], ["A"], ["C"], ["B"], ["BIG"]]


async def test_a_dead_database_is_tried_no_more_than_twice() -> None:
    tries = 0

    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        nonlocal tries
        tries += 1
        raise DatabaseUnavailable("away")

    async with Writer(flush, make_settings()) as writer:
        results = await asyncio.gather(*(writer.submit(write()) for _ in range(50)), return_exceptions=True)
    assert {type(result) for result in results} == {DatabaseUnavailable}
    assert tries == 2


async def test_a_connection_that_broke_once_refuses_nobody() -> None:
    tries = 0

    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise DatabaseUnavailable("broken")
        return [receipt(one) for one in writes]

    async with Writer(flush, make_settings()) as writer:
        results = await asyncio.gather(*(writer.submit(write()) for _ in range(5)))
    assert [result.inserted for result in results] == [1] * 5


async def test_an_unknown_outcome_is_that_of_all_and_tried_no_more() -> None:
    tries = 0

    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        nonlocal tries
        tries += 1
        raise OutcomeUnknown("who knows")

    async with Writer(flush, make_settings()) as writer:
        results = await asyncio.gather(*(writer.submit(write()) for _ in range(3)), return_exceptions=True)
    assert {type(result) for result in results} == {OutcomeUnknown}
    assert tries == 1


async def test_what_was_not_tried_again_in_time_has_the_error_of_all() -> None:
    async def flush(writes: Sequence[Write], attempt: Attempt) -> list[Receipt | QuotesError]:
        if len(writes) > 1:
            raise QuotesLocked("locked")
        await asyncio.sleep(0.2)
        raise DatabaseRefused("refused")

    async with Writer(flush, make_settings(write_timeout="100 ms")) as writer:
        results = await asyncio.gather(*(writer.submit(write()) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [DatabaseRefused, QuotesLocked, QuotesLocked]


async def test_a_queue_that_does_not_move_refuses_in_time() -> None:
    gate = Gate()
    async with Writer(gate, make_settings(write_timeout="100 ms")) as writer:
        flushing = asyncio.create_task(writer.submit(write()))
        await settle()
        waiting = [asyncio.create_task(writer.submit(write())) for _ in range(3)]
        async with asyncio.timeout(30):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {Overloaded}
        gate.open.set()
        assert (await flushing).inserted == 1
        assert (await writer.submit(write(2))).inserted == 2
    assert gate.flushes == [1, 1], "what was refused is not written"


# --- stopping ---


async def test_requests_in_flight_are_taken_while_the_service_stops() -> None:
    gate = Gate()
    gate.open.set()
    async with Writer(gate, make_settings(drain_timeout="10 s")) as writer:
        writer.stop_accepting()
        assert not writer.accepting
        assert (await writer.submit(write())).inserted == 1


async def test_every_request_has_an_answer_when_the_drain_ends() -> None:
    """Also while the server of HTTP still waits for them."""
    gate = Gate()
    async with Writer(gate, make_settings(drain_timeout="200 ms")) as writer:
        flushing = asyncio.create_task(writer.submit(write()))
        await settle()
        waiting = asyncio.create_task(writer.submit(write()))
        await settle()
        writer.stop_accepting()
        async with asyncio.timeout(30):
            results = await asyncio.gather(flushing, waiting, return_exceptions=True)
            with pytest.raises(ServiceStopping):
                await writer.submit(write())
    assert [type(result) for result in results] == [ServiceStopping, ServiceStopping]
