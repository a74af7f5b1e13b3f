"""What each client may have: shares of what all share, turns, and bodies that do not come."""

import asyncio
import gzip
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from fastapi import Request
from pydantic import ValidationError

from app.api import shares
from app.api.deps import read_body
from app.api.shares import Claim, Pool, Shares, Starts, Turns, principal
from app.errors import BodyTimeout, Overloaded, QuotesError, ServiceStopping
from app.settings import Settings
from app.writer import Writer
from tests.test_writer import Gate, settle

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SETTINGS = Settings(_env_file=None)


def make(*, rest: Callable[[], bool] = lambda: False, **values: Any) -> Shares:
    settings = Settings(_env_file=None, **values)
    return Shares(settings, Writer(Gate(), settings), readers=1, reads=3, rest=rest)


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::1", "2001:db8:1:2::"),
        ("2001:db8:1:3::1", "2001:db8:1:3::"),
        ("::1", "::"),
        ("fe80::1%eth0", "fe80::"),
        ("unknown", "unknown"),
        ("x" * 5000, "x" * 64),
    ],
)
def test_whose_share_an_address_takes(address: str, who: str) -> None:
    assert principal((address, 1)) == who


def test_clients_without_an_address_are_one() -> None:
    assert principal(None) == ""


@pytest.mark.parametrize(("parts", "alone", "beside"), [(1, 50, 33), (3, 75, 42)])
def test_one_gets_most_and_something_is_left_for_the_next(parts: int, alone: int, beside: int) -> None:
    pool = Pool(100, parts)
    taken = {"a": 0, "b": 0}

    def take(*clients: str) -> None:
        for _ in range(200):
            for who in clients:
                taken[who] += pool.take(who, 1)

    take("a")
    assert taken["a"] == alone
    for who, amount in taken.items():
        pool.count(who, -amount)
    taken = {"a": 0, "b": 0}
    take("a", "b")
    assert abs(taken["a"] - beside) <= 1
    assert abs(taken["b"] - beside) <= 1
    assert pool.used == sum(taken.values()) < 100
    assert pool.take("new", 1)


def test_what_is_given_back_can_be_had_again() -> None:
    pool = Pool(10)
    assert pool.take("a", 4)
    assert not pool.take("a", 4)
    assert not pool.leaves("a", half=True)
    pool.count("a", -4)
    assert pool.used == 0
    assert pool._of == {}
    assert pool.take("a", 4)
    assert pool.take("a", 90, alone=4), "one request alone may be larger than its share"


async def test_who_waits_with_much_waits_behind_who_waits_with_little() -> None:
    turns = Turns(1)
    order: list[str] = []
    go_on = asyncio.Event()

    async def work(who: str) -> None:
        async with turns.turn(who):
            order.append(who)
            await go_on.wait()

    tasks = [asyncio.create_task(work(who)) for who in ("a", "a", "a", "a", "b", "c", "b")]
    await settle()
    assert order == ["a"]
    tasks[2].cancel()  # while it waits
    go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a", "a", "b", "c", "a", "b"]
    assert (turns._free, turns._waiting) == (1, {})


async def test_a_place_is_not_lost_with_who_waited_for_it() -> None:
    turns = Turns(1)
    async with turns.turn("a"):
        waiting = asyncio.create_task(turns.turn("b").__aenter__())
        await settle()
    waiting.cancel()  # it has the place already
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (turns._free, turns._waiting) == (1, {})


async def test_one_gets_no_more_places_than_its_own_though_others_are_free() -> None:
    turns = Turns(4, each=2)
    begun: list[str] = []
    ends = {who: asyncio.Event() for who in "abc"}

    async def work(who: str) -> None:
        async with turns.turn(who):
            begun.append(who)
            await ends[who].wait()

    tasks = [asyncio.create_task(work(who)) for who in "aaaaab"]
    await settle()
    assert begun == ["a", "a", "b"]
    tasks += [asyncio.create_task(work(who)) for who in "ccb"]
    await settle()
    assert begun == ["a", "a", "b", "c"]
    ends["c"].set()
    await settle()
    assert begun == ["a", "a", "b", "c", "c", "b"], "who may have none is passed over"
    for end in ends.values():
        end.set()
    await asyncio.gather(*tasks)
    assert begun.count("a") == 5
    assert (turns._free, turns._taken, turns._waiting) == (4, {}, {})


async def test_a_turn_is_not_waited_for_for_ever() -> None:
    turns = Turns(2, each=1)
    async with turns.turn("a"):
        late = [asyncio.create_task(turns.take("a", 0.01)) for _ in range(3)]
        found = await asyncio.gather(*late, return_exceptions=True)
        assert [type(error) for error in found] == [shares.NoTurn] * 3
    assert (turns._free, turns._taken, turns._waiting) == (2, {}, {})


async def test_reads_take_turns_and_none_begins_for_who_does_not_take_its_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = make(client_reads=1, pool_timeout="10 ms", statement_timeout="10 ms")
    async with held.reading(("a", 1), "a"), held.reading(("b", 1), "b"):
        with pytest.raises(Overloaded) as caught:
            async with held.reading(("a", 2), "a"):
                pytest.fail("it was not its turn")
    assert caught.value.retry_after
    monkeypatch.setattr(shares, "unsent", Pool(100))
    shares.unsent.count("a", 50)
    with pytest.raises(Overloaded, match="take the answers"):
        async with held.reading(("a", 3), "a"):
            pytest.fail("its answers wait")
    async with held.reading(("b", 2), "b"):
        shares.unsent.count("a", -50)
        async with held.reading(("a", 3), "a"):
            assert held.reads._taken == {"a": 1, "b": 1}


async def turn_of_loop() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_requests_begin_a_few_at_a_time_of_clients_in_turn() -> None:
    starts = Starts(2)
    begun: list[str] = []
    loop = asyncio.get_running_loop()
    for who in ("a", "a", "a", "a", "a", "b"):
        starts.begin(who, partial(begun.append, who), loop)
    assert begun == ["a", "a"]
    await turn_of_loop()
    assert begun[2:4] == ["a", "b"]
    await settle()
    assert begun[4:] == ["a", "a"]
    assert not starts._waiting
    assert not starts._turning, "nothing runs where nothing begins"


async def test_requests_of_who_goes_on_connecting_wait_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(8)
    begun: list[str] = []
    loop = asyncio.get_running_loop()

    async def connect(turns: int) -> None:
        for _ in range(turns):
            starts.connected("a", loop)
            starts.begin("a", partial(begun.append, "a"), loop)
            await asyncio.sleep(0)
        starts.begin("b", partial(begun.append, "b"), loop)

    await connect(20)
    assert begun == ["b"]
    await settle()
    assert begun == ["b", *"a" * 20]
    # But not for ever.
    monkeypatch.setattr(shares, "_CONNECTING", 0.0)
    begun.clear()
    await connect(20)
    assert len(begun) > 10


async def arrive(claim: Claim, *, every: float | None = None, size: int = 1) -> QuotesError | None:
    """Wait for a body of which `size` bytes come `every` so often, or none; what ends it."""
    claim.expect()
    try:
        for _ in range(10):
            await asyncio.sleep(every or 30)
            claim.came(size)
    except asyncio.CancelledError:
        try:
            claim.explain()
        except QuotesError as error:
            return error
        raise
    finally:
        claim.arrived()
    return None


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_EVERY", 0.01)


async def test_a_body_that_stops_is_not_waited_for() -> None:
    held = make(body_timeout="50 ms")
    with held.claim(("a", 1)) as claim:
        error = await asyncio.wait_for(arrive(claim), 10)
    assert isinstance(error, BodyTimeout)
    assert "Nothing of the body" in error.detail
    assert (held.arriving, held.uploads.used) == (set(), 0)
    await asyncio.sleep(0.05)
    assert held._sweep is None, "nobody looks while nothing arrives"


async def test_a_body_that_comes_slowly_is_cut_and_one_that_is_fast_enough_is_not() -> None:
    held = make(body_timeout=timedelta(seconds=0.2), body_rate=1000)
    with held.claim(("a", 1)) as slow, held.claim(("a", 1)) as fast:
        errors = await asyncio.gather(arrive(slow, every=0.1), arrive(fast, every=0.1, size=1000))
    assert isinstance(errors[0], BodyTimeout)
    assert "less than 1000 bytes a second" in errors[0].detail
    assert errors[1] is None


async def test_the_services_own_time_is_not_the_clients() -> None:
    held = make(body_timeout=timedelta(seconds=0.1), body_rate=1000)

    async def work(claim: Claim) -> None:
        claim.expect()
        claim.came(1)
        claim.busy = True
        await asyncio.sleep(0.5)
        claim.worked()
        await asyncio.sleep(0.03)
        claim.arrived()

    with held.claim(("a", 1)) as claim:
        await work(claim)


async def test_bodies_have_less_time_when_the_service_stops() -> None:
    held = make(drain_timeout="100 ms")
    held.writer.stop_accepting()
    with held.claim(("a", 1)) as claim:
        error = await asyncio.wait_for(arrive(claim), 10)
    assert isinstance(error, ServiceStopping)
    for handle in held.writer._ending:
        handle.cancel()


async def test_another_cancellation_is_nobodys_verdict() -> None:
    held = make()
    with held.claim(("a", 1)) as claim:
        task = asyncio.create_task(arrive(claim))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (held.arriving, held.uploads.used) == (set(), 0)


async def test_memory_is_given_back_some_time_after_a_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_SETTLED", 0.01)
    told, answers = asyncio.Event(), iter([True, False])
    asked = []

    def rest() -> bool:
        asked.append(answer := next(answers))
        if not answer:
            loop.call_soon_threadsafe(told.set)
        return answer

    loop = asyncio.get_running_loop()
    held = make(rest=rest)
    with held.claim(("a", 1)) as one:
        one.grow(shares._LARGE)
    assert held._resting is None
    with held.claim(("a", 1)) as one:
        one.grow(shares._LARGE + 1)
    await told.wait()
    assert asked == [True, False]


async def test_a_claim_takes_room_as_the_body_and_then_as_the_batch() -> None:
    held = make(writer_queue_bytes=100_000, writer_queue_rows=100)
    with held.claim(("a", 1)) as one, held.claim(("b", 1)) as other:
        one.grow(15_000)
        with held.claim(("a", 2)) as two:
            two.grow(10_000)
            with pytest.raises(Overloaded) as caught:
                two.grow(10_000)
        assert "This client has too many bytes" in caught.value.detail
        other.grow(10_000)
        one.become(60, 1000)
        with held.claim(("a", 2)) as two, pytest.raises(Overloaded):
            two.become(90, 1000)
        other.become(40, 1000)
    assert (held.bytes.used, held.rows.used, held.writer._bytes) == (0, 0, 0)


async def test_bodies_of_one_client_that_do_not_come_leave_room_for_another() -> None:
    held = make()
    claims = [held.claim(("a", 1)) for _ in range(shares.UPLOADS)]
    refused = 0
    for claim in claims:
        try:
            claim.expect()
        except Overloaded:
            refused += 1
    assert refused == shares.UPLOADS // 4
    with held.claim(("b", 1)) as other:
        other.expect()
        other.arrived()
    for claim in claims:
        claim.arrived()
    assert held.uploads.used == 0


@pytest.mark.parametrize(("name", "window"), [("gzip", 2**16), ("zstd", 2**23)])
async def test_a_compressed_body_counts_as_what_it_becomes(name: str, window: int) -> None:
    """One that stops before its end too; of one that came in one piece the window is not counted."""
    held = make(writer_queue_bytes=50_000_000)
    body = gzip.compress(bytes(10_000_000)) if name == "gzip" else zstd.compress(bytes(10_000_000))
    stalled, waits = asyncio.Event(), asyncio.Event()

    def request(*, whole: bool) -> Request:
        async def receive() -> dict[str, Any]:
            if stalled.is_set() and not whole:
                waits.set()
                await asyncio.sleep(30)
            stalled.set()
            return {"type": "http.request", "body": body, "more_body": not whole}

        return Request({"type": "http", "headers": [(b"content-encoding", name.encode())]}, receive)

    with held.claim(("a", 1)) as claim:
        reading = asyncio.create_task(read_body(request(whole=False), SETTINGS, claim))
        await waits.wait()
        assert held.bytes.used == held.writer._bytes == 10_000_000 + window
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert held.bytes.used == held.writer._bytes == 0
    with held.claim(("a", 1)) as claim:
        assert len(await read_body(request(whole=True), SETTINGS, claim)) == 10_000_000
        assert held.bytes.used == 10_000_000
        with held.claim(("b", 1)) as other, pytest.raises(Overloaded):
            other.grow(45_000_000)


@pytest.mark.parametrize("value", ["none", "*", "10.0.0.0/8, 192.168.1.7", "::1"])
def test_proxies_that_are_trusted(value: str) -> None:
    assert Settings(_env_file=None, trusted_proxies=value).trusted_proxies == value


@pytest.mark.parametrize("value", ["proxy", "10.0.0.1/8", "10.0.0.0/8,", "*,10.0.0.1"])
def test_proxies_that_are_no_addresses(value: str) -> None:
    with pytest.raises(ValidationError, match="addresses and networks"):
        Settings(_env_file=None, trusted_proxies=value)


def test_reads_of_one_client_where_the_database_shares_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Settings(_env_file=None, database_url="postgresql://h/d")
    for cores, reads in ((None, 1), (1, 1), (2, 1), (4, 2), (64, 4)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert (SETTINGS.effective_client_reads, elsewhere.effective_client_reads) == (reads, 4)
    assert Settings(_env_file=None, client_reads=7).effective_client_reads == 7
