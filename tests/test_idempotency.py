"""A request with an idempotency key is stored once and answered with one receipt; a dry run is not stored at all."""

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.requests import Request

from app import writer as writing
from app.api.headers import prefers_minimal
from app.client import Client, Refused
from app.db.capability import Level
from app.db.engine import Connection, Database
from app.db.migrate import migrate
from app.errors import Conflict, IdempotencyKeyInUse, IdempotencyKeyReused, QuotesError
from app.main import create_app
from app.quote.batch import Batch
from app.quote.terms import OnConflict, Receipt
from app.repository.ingest import Attempt, Write
from app.repository.quotes import QuoteRepository
from app.repository.receipts import IdempotencyKey, Receipts, Replayed
from app.settings import Settings
from tests.conftest import Lane, Serve, random_symbol, refresh, running
from tests.test_api import JSON, problem, row
from tests.test_repository import T0, _in_thread

REPLAYED = {"idempotency-replayed": "true"}


def new_key() -> str:
    return f'"{random_symbol()}"'


async def post(client: httpx.AsyncClient, key: str, rows: Any, **query: str) -> httpx.Response:
    return await client.post("/v1/quotes", json=rows, params=query, headers={"idempotency-key": key})


async def count(client: httpx.AsyncClient, symbol: str) -> int:
    return int((await client.get("/v1/quotes/count", params={"symbols": symbol})).json()["count"])


def replayed(answer: httpx.Response) -> bool:
    return "idempotency-replayed" in answer.headers


# --- the same again, and something else ---


@pytest.mark.parametrize("on_conflict", ["update", "merge", "ignore", "error"])
async def test_the_same_request_gets_the_same_receipt(
    client: httpx.AsyncClient, symbol: str, on_conflict: OnConflict
) -> None:
    key = new_key()
    rows = [row(symbol), row(symbol, 1), row(symbol, 1, 2), row(symbol, 2, -1), row(symbol, 3, "1.1234567890123")]
    query = {"on_conflict": on_conflict, "on_error": "skip"}
    first = await post(client, key, rows, **query)
    assert first.status_code == 200, first.text
    assert not replayed(first)
    assert first.json()["inserted"] == 3
    assert first.json()["rejected"]
    assert first.json()["rounded"] == 1
    # The stored rows change; to store the first request again would be seen.
    await client.post("/v1/quotes", json=[row(symbol, 0, 9)])
    for _ in range(2):
        again = await post(client, key, rows, **query)
        assert (again.status_code, again.content) == (200, first.content)
        assert replayed(again)
    newest = await client.get("/v1/quotes", params={"symbols": symbol, "start": "2026-11-16"})
    assert newest.json()["quotes"][0]["price"] == 9
    assert await count(client, symbol) == 3


async def test_another_request_cannot_have_the_key(client: httpx.AsyncClient, symbol: str) -> None:
    key = new_key()
    rows = [row(symbol)]
    first = await post(client, key, rows)
    others = [
        await post(client, key, [row(symbol, 1)]),
        await post(client, key, rows, on_conflict="ignore"),
        await post(client, key, rows, on_conflict="merge"),
        await post(client, key, rows, on_error="skip"),
        await post(client, key, rows, ties="number"),
        await post(client, key, rows, prices="signed"),
        await post(client, key, rows, precision="ns"),
        await post(client, key, [row(symbol, 0, -1)]),
        await client.post(
            "/v1/quotes",
            content=first.request.content,
            headers={"idempotency-key": key, "content-type": "application/x-ndjson"},
        ),
    ]
    for answer in others:
        body = problem(answer, 422, "idempotency-key-reused")
        assert body["errors"][0]["parameter"] == "Idempotency-Key"
    assert await count(client, symbol) == 1
    assert (await post(client, key, rows, on_conflict="update")).content == first.content, "a default may be named"


async def test_a_refused_request_leaves_its_key_free(client: httpx.AsyncClient, symbol: str) -> None:
    key = new_key()
    await client.post("/v1/quotes", json=[row(symbol)])
    problem(await post(client, key, [row(symbol, 1, -1)]), 422, "invalid-quotes")
    problem(await post(client, key, [row(symbol)], on_conflict="error"), 409, "conflict")
    headers = {"idempotency-key": key, **JSON}
    problem(await client.post("/v1/quotes", content=b"[", headers=headers), 400, "malformed-body")
    assert (await post(client, key, [row(symbol, 1)])).json()["inserted"] == 1


async def test_a_receipt_outlives_the_rules_that_its_rows_kept(lane: Lane, symbol: str) -> None:
    key = new_key()
    rows = [row(symbol), row(symbol, 1)]
    async with running(create_app(lane.make_settings())) as client:
        first = await post(client, key, rows)
    async with running(create_app(lane.make_settings(max_batch_rows=1))) as client:
        problem(await post(client, new_key(), rows), 413, "body-too-large")
        assert (await post(client, key, rows)).content == first.content


@pytest.mark.parametrize("key", ["", '"', '""', '"a', 'a"', "a b", "a,b", '"a", "b"', "é", '"é"', '"\t"', '"\\a"',
                                 "a" * 256, f'"{"a" * 256}"', '"a";p=1', "(a)", "a/b"])  # fmt: skip
async def test_a_malformed_key_is_refused(client: httpx.AsyncClient, symbol: str, key: str) -> None:
    headers = [(b"idempotency-key", key.encode("latin-1"))]
    answer = problem(await client.post("/v1/quotes", json=[row(symbol)], headers=headers), 400, "invalid-request")
    assert answer["errors"][0]["parameter"] == "Idempotency-Key"
    assert await count(client, symbol) == 0


async def test_two_keys_are_refused(client: httpx.AsyncClient, symbol: str) -> None:
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    problem(await client.post("/v1/quotes", json=[row(symbol)], headers=headers), 400, "invalid-request")


async def test_quotes_are_no_part_of_the_key(client: httpx.AsyncClient, symbol: str) -> None:
    for given_, same in ((f"{symbol}.a:b_c-d", f'"{symbol}.a:b_c-d"'), (f'"{symbol}\\\\ \\""', f'"{symbol}\\\\ \\""')):
        assert not replayed(await post(client, given_, [row(symbol)]))
        assert replayed(await post(client, same, [row(symbol)]))


async def test_a_kept_receipt_can_be_read_by_later_versions() -> None:
    """A field that a receipt gains needs a default, or the keys of before an upgrade would be lost."""
    text = (
        b'{"received":2,"inserted":1,"updated":0,"unchanged":0,"superseded":0,"rounded":0,"crossed":0,'
        b'"rejected":[{"index":1,"pointer":"/1/price","code":"price-not-positive","detail":"A price is."}]}'
    )
    assert msgspec.json.decode(text, type=Replayed).rejected[0].code == "price-not-positive"


# --- in flight ---


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that waits for `held_up` is not refused, however slow the machine is."""
    for name in ("_LOCK_LIVE", "_LOCK_LATE"):
        monkeypatch.setattr(writing, name, 60.0)


@asynccontextmanager
async def held_up(lane: Lane) -> AsyncIterator[Connection]:
    """No write gets past its last statements until the connection's transaction ends."""
    locker = await asyncpg.connect(lane.url)
    try:
        await locker.execute("BEGIN; LOCK TABLE quotes.latest IN ACCESS EXCLUSIVE MODE")
        yield locker
    finally:
        await locker.close()


@asynccontextmanager
async def held_up_at_its_receipt(lane: Lane, key: str) -> AsyncIterator[Connection]:
    """The request with the key does not get past its receipt until the connection gives its lock back.

    Nor is it refused meanwhile: it asks for a lock again and again, where one that waits does so for a second at most.
    """
    name, lock = f"hold_{random_symbol().lower()}", IdempotencyKey(f"hold {key}", b"").lock
    locker = await asyncpg.connect(lane.url)
    try:
        await locker.execute(f"""
            CREATE FUNCTION quotes.{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                WHILE NOT pg_try_advisory_xact_lock_shared({lock}) LOOP PERFORM pg_sleep(0.01); END LOOP;
                RETURN new;
            END $$;
            CREATE TRIGGER {name} BEFORE INSERT ON quotes.receipts FOR EACH ROW
            WHEN (new.key = {key.replace('"', "'")}) EXECUTE FUNCTION quotes.{name}()""")
        await locker.execute(
            "SELECT pg_advisory_lock($1)", lock
        )  # no transaction: it would see one state of all others
        yield locker
        await locker.execute(f"DROP FUNCTION quotes.{name} CASCADE")
    finally:
        await locker.close()


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110  what is waited for happens in a database
            await asyncio.sleep(0.01)


#: The server process that holds the advisory lock of a key.
_HOLDS_KEY = """
SELECT pid FROM pg_locks
WHERE locktype = 'advisory' AND granted AND (classid::bigint << 32) | objid::bigint = $1
"""
_WAITS_FOR_LATEST = "SELECT count(*) FROM pg_locks WHERE relation = 'quotes.latest'::regclass AND NOT granted"


async def until_it_waits(observer: Connection, key: str) -> None:
    """Return when the transaction that has the key's lock waits for `held_up`."""
    lock = IdempotencyKey(key.strip('"'), b"").lock
    await until(
        lambda: observer.fetchval(
            f"SELECT count(*) FROM ({_HOLDS_KEY}) held JOIN pg_locks waits USING (pid)"
            " WHERE waits.relation = 'quotes.latest'::regclass AND NOT waits.granted",
            lock,
        )
    )


def environment(lane: Lane) -> dict[str, str]:
    return {"QUOTES_DATABASE_URL": lane.url, "QUOTES_REQUIRE_TIMESCALEDB": "none", "QUOTES_RETENTION": "none"}


@pytest.mark.concurrent
@pytest.mark.parametrize("merged", [False, True], ids=["copied", "merged"])
async def test_a_second_request_is_told_that_the_first_is_in_flight(
    lane: Lane, client: httpx.AsyncClient, serve: Serve, shared_dir: Path, symbol: str, merged: bool
) -> None:
    key, rows = new_key(), [row(symbol), row(symbol, 1)]
    if merged:  # a stored key sends the transaction back to a savepoint, which must not cost it its lock
        await client.post("/v1/quotes", json=[row(symbol, 1, 9)])
    with serve(shared_dir / "unused", **environment(lane)) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as other, held_up(lane) as locker:
            first = asyncio.create_task(post(client, key, rows))
            await until_it_waits(locker, key)
            for elsewhere in (client, other):
                refused = await post(elsewhere, key, rows)
                problem(refused, 409, "idempotency-key-in-use")
                assert refused.headers["retry-after"] == "1"
            problem(await post(other, key, [row(symbol, 0, -1)]), 409, "idempotency-key-in-use")
            await locker.execute("COMMIT")
            answer = await first
            assert answer.json()["inserted"] == (1 if merged else 2)
            for elsewhere in (client, other):
                again = await post(elsewhere, key, rows)
                assert again.content == answer.content
                assert replayed(again)
    assert await count(client, symbol) == 2


@pytest.mark.concurrent
@pytest.mark.parametrize("late", [False, True], ids=["live", "late"])
async def test_of_two_pools_one_has_the_key(lane: Lane, quotes: QuoteRepository, symbol: str, late: bool) -> None:
    """Its COPY fails, and what it goes back to must not unlock the key before its receipt is there."""
    stored, both = keyed(symbol, None), IdempotencyKey(symbol, b"1")
    attempt = Attempt(within=60, lock_timeout=60, late=late)
    await quotes.write([stored])
    pools = [Database(lane.url, lane.make_settings()) for _ in range(2)]
    try:
        for pool in pools:
            await pool.connect()
        one, other = (QuoteRepository(pool, lane.make_settings()) for pool in pools)
        async with held_up(lane) as locker:
            first = asyncio.create_task(one.write([keyed(symbol, both), keyed(symbol, None, 1)], attempt))
            await until(lambda: locker.fetchval(_WAITS_FOR_LATEST))
            (refused,) = await other.write([keyed(symbol, both)], attempt)
            assert isinstance(refused, IdempotencyKeyInUse)
            await locker.execute("COMMIT")
            answers = await first
        assert [(answer.unchanged, answer.inserted) for answer in answers if isinstance(answer, Receipt)] == [
            (1, 0),
            (0, 1),
        ]
        assert [type(answer) for answer in await other.write([keyed(symbol, both)], attempt)] == [Replayed]
    finally:
        for pool in pools:
            await pool.close()


async def test_one_key_twice_in_one_transaction(quotes: QuoteRepository, symbol: str) -> None:
    key = IdempotencyKey(symbol, b"1")
    first, second, without = await quotes.write([keyed(symbol, key), keyed(symbol, key), keyed(symbol, None, 1)])
    assert isinstance(first, Receipt)
    assert isinstance(second, IdempotencyKeyInUse)
    assert isinstance(without, Receipt)
    answers = await quotes.write(
        [keyed(symbol, None, 2), keyed(symbol, key), keyed(symbol, IdempotencyKey(symbol, b""))]
    )
    assert [type(answer) for answer in answers] == [Receipt, Replayed, IdempotencyKeyInUse]
    assert await quotes.count_quotes([symbol]) == 3


async def test_without_a_key_nothing_more_is_asked(
    quotes: QuoteRepository, symbol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Receipts, "claim", None)
    monkeypatch.setattr(Receipts, "keep", None)
    assert [type(answer) for answer in await quotes.write([keyed(symbol, None)])] == [Receipt]


def keyed(symbol: str, key: IdempotencyKey | None, second: int = 0) -> Write:
    at = T0 + timedelta(seconds=second)
    return Write(Batch.from_rows([{"symbol": symbol, "timestamp": at, "price": 1}]), idempotency=key)


# --- kill -9 ---


async def sent(url: str, key: str, body: bytes) -> asyncio.StreamWriter:
    """A request of which nobody reads the answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"POST /v1/quotes?on_conflict=error HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    return writer


@pytest.mark.concurrent
async def test_a_service_killed_after_the_commit_has_left_the_receipt(
    lane: Lane, client: httpx.AsyncClient, serve: Serve, shared_dir: Path, symbol: str
) -> None:
    key, body = new_key(), json.dumps([row(symbol, i) for i in range(3)]).encode()
    with serve(shared_dir / "unused", **environment(lane)) as service:
        unread = await sent(service.url, key, body)

        async def stored() -> bool:
            return await count(client, symbol) > 0

        await until(stored)
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        unread.close()
    url = "/v1/quotes?on_conflict=error"
    answer = await client.post(url, content=body, headers={"idempotency-key": key, **JSON})
    assert answer.json()["inserted"] == 3
    assert replayed(answer)
    problem(await client.post(url, content=body, headers=JSON), 409, "conflict")


@pytest.mark.concurrent
async def test_a_service_killed_before_the_commit_has_left_nothing(
    lane: Lane, client: httpx.AsyncClient, serve: Serve, shared_dir: Path, symbol: str
) -> None:
    key, body = new_key(), json.dumps([row(symbol, i) for i in range(3)]).encode()

    async def again() -> httpx.Response:
        headers = {"idempotency-key": key, **JSON}
        return await client.post("/v1/quotes?on_conflict=error", content=body, headers=headers)

    async with held_up_at_its_receipt(lane, key) as locker:
        with serve(shared_dir / "unused", **environment(lane), QUOTES_WRITE_TIMEOUT="1 hour") as service:
            unread = await sent(service.url, key, body)
            await until(
                lambda: locker.fetchval(
                    f"SELECT count(*) FROM pg_stat_activity JOIN ({_HOLDS_KEY}) held USING (pid)"
                    " WHERE wait_event = 'PgSleep'",
                    IdempotencyKey(key.strip('"'), b"").lock,
                )
            )
            os.kill(service.process.pid, signal.SIGKILL)
            service.process.wait()
            unread.close()
        problem(await again(), 409, "idempotency-key-in-use")  # its server process does not know yet
        await locker.execute("SELECT pg_advisory_unlock_all()")
        answers: list[httpx.Response] = []

        async def settled() -> bool:
            answers.append(await again())
            return answers[-1].status_code != 409

        await until(settled)
    assert answers[-1].json()["inserted"] == 3
    assert not replayed(answers[-1])


# --- expiry ---


async def test_an_expired_key_is_free(
    client: httpx.AsyncClient, database: Database, settings: Settings, symbol: str
) -> None:
    key = new_key()
    await post(client, key, [row(symbol)])

    async def age(span: timedelta) -> None:
        async with database.acquire() as connection:
            await connection.execute(
                "UPDATE quotes.receipts SET created = now() - $2::interval WHERE key = $1", key.strip('"'), span
            )

    await age(settings.idempotency_expiry - timedelta(minutes=1))
    assert replayed(await post(client, key, [row(symbol)]))
    await age(settings.idempotency_expiry)
    answer = await post(client, key, [row(symbol, 0, 2)])
    assert (answer.json()["updated"], replayed(answer)) == (1, False)
    assert replayed(await post(client, key, [row(symbol, 0, 2)])), "its new receipt is kept anew"


async def test_expired_receipts_are_swept_a_few_at_a_time(
    client: httpx.AsyncClient, database: Database, symbol: str
) -> None:
    async def left() -> list[str]:
        async with database.acquire() as connection:
            rows = await connection.fetch(
                "SELECT key FROM quotes.receipts WHERE key LIKE $1 ORDER BY key", f"{symbol}%"
            )
        return [row[0] for row in rows]

    async with database.acquire() as connection:
        await connection.execute(
            "INSERT INTO quotes.receipts SELECT $1 || n, '', '{}', now() - interval '100 days' + n * interval '1 s'"
            " FROM generate_series(1, 5) n",
            symbol,
        )
    await client.post("/v1/quotes", json=[row(symbol)])
    assert len(await left()) == 5, "who has no key sweeps nothing"
    for second, remain in ((1, "345"), (2, "5"), (3, "")):
        await post(client, new_key(), [row(symbol, second)])
        assert await left() == [symbol + n for n in remain]


async def test_the_expiry_is_published(lane: Lane) -> None:
    document = create_app(lane.make_settings(idempotency_expiry="2 hours")).openapi()
    (told,) = [p for p in document["paths"]["/v1/quotes"]["post"]["parameters"] if p["name"] == "Idempotency-Key"]
    assert "7200 seconds" in told["description"]
    (told,) = [
        p for p in create_app(lane.make_settings()).openapi()["paths"]["/v1/quotes"]["post"]["parameters"]
        if p["name"] == "Idempotency-Key"
    ]  # fmt: skip
    assert told["description"].count("seconds") == 1
    assert "86400 seconds" in told["description"]


# --- against a model ---

Operation = tuple[int, OnConflict, list[tuple[int, int]]]
OPERATIONS = st.tuples(
    st.integers(0, 3),  # key; 0 is none
    st.sampled_from(["update", "merge", "ignore", "error"]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 2)), min_size=1, max_size=3, unique_by=lambda pair: pair[0]),
)


@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(flushes=st.lists(st.lists(OPERATIONS, min_size=1, max_size=3), min_size=1, max_size=6))
def test_any_sequence_of_keys_and_bodies_equals_a_dict(lane: Lane, flushes: list[list[Operation]]) -> None:
    async def check() -> None:
        database = Database(lane.url, lane.make_settings())
        await database.connect()
        try:
            await against_a_dict(QuoteRepository(database, lane.make_settings()), flushes)
        finally:
            await database.close()

    _in_thread(check())


async def against_a_dict(quotes: QuoteRepository, flushes: list[list[Operation]]) -> None:
    symbol = random_symbol()
    table: dict[int, int] = {}
    kept: dict[int, tuple[bytes, Receipt]] = {}
    for operations in flushes:
        writes = []
        expected: list[Receipt | type[QuotesError]] = []
        begun: set[int] = set()
        for key, on_conflict, rows in operations:
            print_ = hashlib.sha256(repr((on_conflict, rows)).encode()).digest()
            write = Write(
                Batch.from_rows(
                    [{"symbol": symbol, "timestamp": T0 + timedelta(seconds=at), "price": p} for at, p in rows]
                ),
                on_conflict,
                idempotency=IdempotencyKey(f"{symbol}-{key}", print_) if key else None,
            )
            writes.append(write)
            if key in begun:
                expected.append(IdempotencyKeyInUse)
                continue
            if key:
                begun.add(key)
            if key in kept:
                expected.append(kept[key][1] if kept[key][0] == print_ else IdempotencyKeyReused)
                continue
            result = store(table, on_conflict, dict(rows))
            expected.append(result or Conflict)
            if key and result:
                kept[key] = (print_, Replayed(**{name: getattr(result, name) for name in NAMES}))
        if len(writes) == 1 and not isinstance(expected[0], Replayed):
            before = await prices(quotes, symbol)
            (dry,) = await quotes.write([Write(writes[0].batch, writes[0].on_conflict, dry_run=True)])
            if expected[0] is not IdempotencyKeyReused:
                assert_equal(dry, expected[0])
            assert await prices(quotes, symbol) == before
        for result_, want in zip(await quotes.write(writes), expected, strict=True):
            assert_equal(result_, want)
        assert await prices(quotes, symbol) == table


NAMES = (
    "received", "inserted", "updated", "unchanged", "superseded", "numbered", "rounded", "zeros", "crossed", "rejected",
)  # fmt: skip


def store(table: dict[int, int], on_conflict: OnConflict, rows: dict[int, int]) -> Receipt | None:
    """Change the table as a write would; None for a conflict."""
    stored = rows.keys() & table.keys()
    if on_conflict == "error" and stored:
        return None
    replaces = on_conflict in {"update", "merge"}  # every row has a price, so there is nothing to merge
    changed = {at for at in stored if table[at] != rows[at]} if replaces else set()
    table.update(rows if replaces else {at: rows[at] for at in rows.keys() - stored})
    return Receipt(len(rows), len(rows) - len(stored), len(changed), len(stored) - len(changed))


def assert_equal(result: Receipt | QuotesError, expected: Receipt | type[QuotesError]) -> None:
    if isinstance(expected, type):
        assert isinstance(result, expected)
    else:
        assert type(result) is type(expected)
        assert msgspec.json.encode(result) == msgspec.json.encode(expected)


async def prices(quotes: QuoteRepository, symbol: str) -> dict[int, int]:
    found = await quotes.get_quotes(symbol, T0 - timedelta(days=1), T0 + timedelta(days=1))
    newest = await quotes.get_latest_quote(symbol)
    assert (newest and newest.timestamp) == max((quote.timestamp for quote in found), default=None)
    return {round((quote.timestamp - T0).total_seconds()): int(quote.price) for quote in found}


# --- dry run ---


async def test_a_dry_run_says_what_would_become_of_the_request(client: httpx.AsyncClient, symbol: str) -> None:
    await client.post("/v1/quotes", json=[row(symbol), row(symbol, 1)])
    rows = [row(symbol), row(symbol, 1, 2), row(symbol, 2), row(symbol, 2, 3), row(symbol, 3, -1)]
    key = new_key()
    for query in (
        {"on_error": "skip", "on_conflict": "error"},
        {"on_error": "skip", "on_conflict": "ignore"},
        {"on_error": "skip", "on_conflict": "merge"},
        {"on_error": "skip", "ties": "number"},
        {"on_error": "skip", "prices": "signed"},
    ):
        before = await client.get("/v1/quotes/latest", params={"symbols": symbol})
        dry = await post(client, key, rows, dry_run="true", **query)
        assert dry.status_code == 200, dry.text
        assert (await client.get("/v1/quotes/latest", params={"symbols": symbol})).text == before.text
        real = await client.post("/v1/quotes", json=rows, params=query)
        assert dry.json() == {**real.json(), "dry_run": True}
    assert not replayed(await post(client, key, [row(symbol, 4)])), "the key was not used up"


async def test_a_dry_run_is_refused_as_the_request_would_be(client: httpx.AsyncClient, symbol: str) -> None:
    await client.post("/v1/quotes", json=[row(symbol)])
    for rows, status, code in (([row(symbol)], 409, "conflict"), ([row(symbol, 1, -1)], 422, "invalid-quotes")):
        query = {"on_conflict": "error"}
        dry = await client.post("/v1/quotes", json=rows, params={**query, "dry_run": "true"})
        real = await client.post("/v1/quotes", json=rows, params=query)
        assert problem(dry, status, code)["errors"] == problem(real, status, code)["errors"]


async def test_a_dry_run_and_a_replay_count_nothing(client: httpx.AsyncClient, symbol: str) -> None:
    async def counted() -> list[str]:
        text = (await client.get("/metrics")).text
        return [line for line in text.splitlines() if line.startswith("quotes_ingest_")]

    key = new_key()
    await post(client, key, [row(symbol)])
    before = await counted()
    assert (await post(client, key, [row(symbol)])).status_code == 200
    for price in (2, -1):
        await client.post("/v1/quotes", json=[row(symbol, 0, price)], params={"dry_run": "true"})
    assert await counted() == before
    await client.post("/v1/quotes", json=[row(symbol, 0, 2)])
    assert await counted() != before


async def test_a_dry_run_leaves_no_chunk_and_nothing_to_refresh(lane: Lane, empty_url: str) -> None:
    await migrate(empty_url, lane.make_settings())
    database = Database(empty_url, lane.make_settings())
    await database.connect()
    quotes = QuoteRepository(database, lane.make_settings())
    community = database.capability.level >= Level.COMMUNITY

    async def traces() -> list[int]:
        queries = ["SELECT count(*) FROM quotes.real_time", "SELECT count(*) FROM quotes.latest"]
        if community:
            queries += [
                "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'real_time'",
                "SELECT count(*) FROM _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log",
            ]
        async with database.acquire() as connection:
            return [await connection.fetchval(query) for query in queries]

    try:
        await quotes.bulk_insert([{"symbol": "A", "timestamp": T0, "price": 1}])
        if community:
            async with database.dedicated() as connection:
                for job in await connection.fetch(
                    "SELECT job_id FROM timescaledb_information.jobs WHERE job_id >= 1000"
                ):
                    await connection.execute("SELECT alter_job($1, scheduled => false)", job[0])
                await refresh(connection, "ohlc_1m", T0 - timedelta(days=9), T0 + timedelta(days=9))
        before = await traces()
        batch = Batch.from_rows([{"symbol": "B", "timestamp": T0 - timedelta(days=5), "price": 1}])
        (dry,) = await quotes.write([Write(batch, dry_run=True)])
        assert await traces() == before
        (real,) = await quotes.write([Write(batch)])
        assert dry == real
        assert all(now > then for now, then in zip(await traces(), before, strict=True)), "a real write leaves all"
    finally:
        await database.close()


# --- preferences ---


@pytest.mark.parametrize(
    ("given_", "minimal"),
    [
        ([], False),
        (["return=minimal"], True),
        (["Return = Minimal"], True),
        (['return="minimal"'], True),
        (["return=minimal; strict"], True),
        (["respond-async, wait=10, return=minimal"], True),
        (["respond-async", "return=minimal"], True),
        (["return=representation"], False),
        (["return=representation, return=minimal"], False),
        (["return=minimal", "return=representation"], True),
        (['note="a, return=minimal"'], False),
        (['note="a\\", return=minimal", return=representation'], False),
        (["return"], False),
        (["return=minimally"], False),
        (["returns=minimal"], False),
        (["", ",,"], False),
        (['note="never closed, return=minimal'], False),
    ],
)
def test_preferences(given_: list[str], minimal: bool) -> None:
    headers = [(b"prefer", value.encode()) for value in given_]
    assert prefers_minimal(Request({"type": "http", "headers": headers})) is minimal


@pytest.mark.timeout(20)
def test_a_hostile_preference_costs_little() -> None:
    for value in (b'"\\' * 100_000, b'"' * 200_001, b"," * 200_000, b'return="' * 50_000, b"return=" + b" " * 200_000):
        assert not prefers_minimal(Request({"type": "http", "headers": [(b"prefer", value)]}))


async def test_a_minimal_answer_hides_no_refused_row(client: httpx.AsyncClient, symbol: str) -> None:
    minimal = {"prefer": "return=minimal", "idempotency-key": new_key()}
    for expected in ({}, REPLAYED):
        answer = await client.post("/v1/quotes", json=[row(symbol)], headers=minimal)
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["preference-applied"] == "return=minimal"
        assert "content-type" not in answer.headers
        assert expected.items() <= answer.headers.items()
        assert replayed(answer) == bool(expected)
    del minimal["prefer"]
    full = await client.post("/v1/quotes", json=[row(symbol)], headers=minimal)
    assert full.json()["inserted"] == 1, "the receipt is there for who asks without the preference"
    for rows in ([row(symbol, 1), row(symbol, 2, -1)], [row(symbol, 1), row(symbol, 1, 2)]):
        answer = await client.post("/v1/quotes?on_error=skip", json=rows, headers={"prefer": "return=minimal"})
        assert answer.status_code == 200
        assert answer.json()["rejected"] or answer.json()["superseded"]
        assert "preference-applied" not in answer.headers
    dry = await client.post("/v1/quotes?dry_run=true", json=[row(symbol)], headers={"prefer": "return=minimal"})
    assert dry.json()["dry_run"] is True


# --- the project's own client ---


async def test_the_client_repeats_a_request_under_its_key() -> None:
    keys: list[str | None] = []
    in_use = {"title": "Idempotency key in use", "code": "idempotency-key-in-use"}
    answers: list[httpx.Response | Exception] = [
        httpx.ReadError("lost"),
        httpx.Response(409, json=in_use, headers={"Retry-After": "0.01"}),
        httpx.Response(200, content=msgspec.json.encode(Receipt(1, 1))),
        httpx.Response(409, json={"title": "Quotes already stored"}),
    ]

    def service(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers.get("idempotency-key"))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with Client(transport=httpx.MockTransport(service)) as client:
        assert (await client.send([b"{}"], key="k-1")).inserted == 1
        with pytest.raises(Refused, match="already stored"):
            await client.send([b"{}"], on_conflict="error")
    assert keys[0] is not None
    assert keys == [keys[0]] * 3 + [None]


async def test_a_lost_answer_does_not_change_a_receipt(client: httpx.AsyncClient, symbol: str) -> None:
    """The first answer is lost on the way; the client of `load` gets it from the second."""
    lost = False

    async def unreliable(request: httpx.Request) -> httpx.Response:
        nonlocal lost
        answer = await client.post(
            request.url.raw_path.decode(), content=request.content,
            headers={name: request.headers[name] for name in ("content-type", "idempotency-key")},
        )  # fmt: skip
        if not lost:
            lost = True
            raise httpx.ReadError("lost")
        return httpx.Response(answer.status_code, content=answer.content)

    lines = [json.dumps(row(symbol, i)).encode() for i in range(3)]
    async with Client(transport=httpx.MockTransport(unreliable)) as sender:
        receipt = await sender.send(lines, on_conflict="error", key=symbol)
    assert (receipt.inserted, sender.retries) == (3, 1)
