"""Connections where there are fewer than the service could use: turns at the pool, and a server that is full."""

import asyncio
from collections import Counter
from urllib.parse import urlsplit, urlunsplit

import pytest

from app.db.failures import PoolBusy
from app.db.migrate import migrate
from app.db.turns import Turns
from app.main import create_app
from tests.conftest import Lane, random_symbol, run, running
from tests.test_health import GRANTS

pytestmark = pytest.mark.concurrent


async def test_writes_come_before_reads_and_reads_leave_some_alone() -> None:
    turns = Turns(4, 2)
    await turns.take(1, read=True)
    await turns.take(1, read=True)
    with pytest.raises(PoolBusy, match=r"^All database connections for reads are busy\.$"):
        await turns.take(0.01, read=True)
    await turns.take(1, read=False)
    await turns.take(1, read=False)
    order: list[str] = []

    async def ask(name: str, *, read: bool) -> None:
        await turns.take(5, read=read)
        order.append(name)

    asked = [asyncio.create_task(ask("read", read=True)), asyncio.create_task(ask("write", read=False))]
    await asyncio.sleep(0)
    turns.give(read=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["write"]
    turns.give(read=False)
    await asyncio.gather(*asked)
    assert order == ["write", "read"]


async def test_who_goes_while_waiting_keeps_no_turn() -> None:
    turns = Turns(1, 0)
    await turns.take(1, read=False)
    waiting = [asyncio.create_task(turns.take(5, read=False)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    turns.give(read=False)
    waiting[1].cancel()  # in the moment in which it is given the turn
    await waiting[2]
    turns.give(read=False)
    await turns.take(0, read=False)


async def test_a_server_that_refuses_one_more_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.db.turns._AGAIN", 0.01)
    turns = Turns(3, 0)
    await turns.take(1, read=False)
    assert not turns.lessen()  # there is none to wait for
    await turns.take(1, read=False)
    assert turns.lessen()
    turns.give(read=False)
    with pytest.raises(PoolBusy, match="max_connections"):
        await turns.take(0, read=False)
    await turns.take(5, read=False)
    async with asyncio.timeout(5):
        while turns.refused:  # noqa: ASYNC110  a timer ends it
            await asyncio.sleep(0.01)
    turns.close()


@pytest.mark.parametrize("limit", [2, 5])
async def test_a_full_server_keeps_nobody_from_what_is_open(lane: Lane, empty_url: str, limit: int) -> None:
    """Sixty clients, and a role that may have a few connections: so few that there is none for a look, too."""
    await migrate(empty_url, lane.make_settings(database_url=empty_url))
    role, parts = f"app_{random_symbol().lower()}", urlsplit(empty_url)
    await run(empty_url, f"CREATE ROLE {role} LOGIN", *(grant.format(role) for grant in GRANTS))
    url = urlunsplit(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}"))
    try:
        settings = lane.make_settings(database_url=url, migrate_on_start=False, pool_size=4)
        async with running(create_app(settings)) as client:
            await run(empty_url, f"ALTER ROLE {role} CONNECTION LIMIT {limit}")
            found: Counter[str] = Counter()

            async def use(symbol: str) -> None:
                quote = {"symbol": symbol, "timestamp": "2026-11-02T00:00:00Z", "price": 1}
                for turn in range(4):
                    answer = await client.post("/v1/quotes", json=[quote | {"volume": turn}])
                    found[f"write {answer.status_code}"] += 1
                    answer = await client.get(
                        "/v1/quotes", params={"symbols": symbol, "start": "2026-11-02", "end": "2026-11-03"}
                    )
                    found[f"read {answer.status_code}"] += 1

            async def look() -> None:
                for _ in range(2):
                    answer = await client.get("/health/ready")
                    found[f"ready {answer.status_code}"] += 1
                    await asyncio.sleep(1.01)

            await asyncio.gather(look(), *(use(random_symbol()) for _ in range(60)))
            assert found == {"write 200": 240, "read 200": 240, "ready 200": 2}
            checks = (await client.get("/health")).json()["checks"]
            assert checks["database"]["status"] == "degraded"
            told = f"may open 28 connections, and the CONNECTION LIMIT of the role allows {limit}:"
            assert told in checks["database"]["detail"]
    finally:
        await run(empty_url, f"DROP OWNED BY {role} CASCADE", f"DROP ROLE {role}")
