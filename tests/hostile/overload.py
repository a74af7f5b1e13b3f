"""Five times as much as is taken: bounded, refused in words, and over when it is over."""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.hostile.bodies import post, quote
from tests.hostile.striking import Attack
from tests.hostile.wire import Attackers, Exchange, Outcome, carry_out

_TIMES: Final = 5
_ROWS: Final = 1000
#: Clients and seconds that find out what is taken.
_CLIENTS: Final = 8
_MEASURED: Final = 3.0
#: Requests under way at once, beyond which an attacker waits too.
_MOST: Final = 1000


def batches(_: random.Random, __: float) -> list[Exchange]:
    """Batches of a thousand quotes, each of another symbol."""
    times = [quote(i)["timestamp"] for i in range(_ROWS)]
    found = []
    for number in range(50):
        rows = [f'{{"symbol":"HOSTILE{number}","timestamp":"{at}","price":1}}' for at in times]
        body = f"[{','.join(rows)}]".encode()
        found.append(post(f"batch {number}", body, "json", expect=frozenset({200, 429, 503}), patience=60))
    return found


async def flood(url: str, exchanges: Sequence[Exchange], _: int, seconds: float, __: Path | None) -> Outcome:
    """Find out what is taken, and send five times as much for so many seconds, whatever is answered."""
    measured = await Attackers(url, _CLIENTS).run(exchanges, _MEASURED)
    rate = measured.answers["200"] / _MEASURED
    outcome = Outcome()
    running: set[asyncio.Task[None]] = set()
    took: list[float] = []
    sent = unsent = 0

    async def one(exchange: Exchange) -> None:
        began = time.monotonic()
        try:
            answers, failure = await carry_out(exchange, url)
        except OSError:
            outcome.complain("not connected")
            return
        outcome.judge(exchange, answers, failure)
        if answers and answers[0].status == 200:
            took.append(time.monotonic() - began)

    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        for _number in range(round(now * rate * _TIMES) - sent - unsent):
            if len(running) >= _MOST:
                unsent += 1
                continue
            task = asyncio.create_task(one(exchanges[sent % len(exchanges)]))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*running)
    outcome.figures = {
        "taken before, requests/s": round(rate),
        "offered, requests/s": round((sent + unsent) / seconds),
        "of these waiting at the client": unsent,
        "bytes a request": sum(len(part) for part in exchanges[0].sends if isinstance(part, bytes)),
        "taken p99 ms": round(1000 * sorted(took)[int(0.99 * len(took))]) if took else 0,
    }
    return outcome


ATTACKS: Final = [Attack("five times as much", batches, carries=flood, seconds=60.0)]
