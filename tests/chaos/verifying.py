"""What was noted, beside what is stored.

Invariant: expected rows, newest quotes and bars are computed here from what clients noted; of the service and the
database only what they hold is asked.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
import httpx
import polars as pl

from tests.chaos.recording import PRICES, Ledger, Request

#: Rows of each request; those whose value is wrong, or that lie outside of it, are seen by count, sum and ends.
_STORED: Final = f"""
SELECT symbol, volume::bigint, count(*), min(at), max(at),
       count(*) FILTER (WHERE price IS DISTINCT FROM 1 + at % {PRICES} OR nanos <> 0)
FROM (SELECT *, (extract(epoch FROM timestamp) * 1000)::bigint AS at FROM quotes.real_time
      WHERE symbol = ANY($1)) AS stored
GROUP BY 1, 2
"""
_LATEST: Final = """
WITH ends AS (
    SELECT DISTINCT ON (symbol) symbol, timestamp, nanos, price, volume,
           min(timestamp) OVER (PARTITION BY symbol) AS first
    FROM quotes.real_time WHERE symbol = ANY($1) ORDER BY symbol, timestamp DESC, nanos DESC)
SELECT count(*) FROM ends FULL JOIN (SELECT * FROM quotes.latest WHERE symbol = ANY($1)) AS held USING (symbol)
WHERE (ends.timestamp, ends.nanos, ends.price, ends.volume, ends.first) IS DISTINCT FROM
      (held.timestamp, held.nanos, held.price, held.volume, held.first_timestamp)
"""
_BAR: Final = ("symbol", "timestamp", "open", "high", "low", "close", "volume", "count")


@dataclass(slots=True)
class Verdict:
    """How the store differs from what its clients were told; all is well where `broken` is empty.

    Attributes:
        lost: acknowledged rows that are not stored.
        first_lost: when the first of them was acknowledged, by the monotonic clock.
        torn: requests of which a part is stored.
        denied: requests that were refused, and stored all the same.
        wrong: stored rows that nobody sent as they are.
        latest: symbols whose newest quote is another one than `quotes.latest` says.
        bars: bars that differ from those of the stored rows.
        counts: rows that the service counts too many or too few.
        answers: answers that break the contract.
    """

    rows: int = 0
    requests: int = 0
    unknown: int = 0
    unknown_stored: int = 0
    lost: int = 0
    first_lost: float = math.inf
    torn: int = 0
    denied: int = 0
    wrong: int = 0
    latest: int = 0
    bars: int = 0
    counts: int = 0
    answers: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """A sentence for each promise that was not kept."""
        sentences = {
            "acknowledged rows are lost": self.lost,
            "requests are torn": self.torn,
            "requests were refused and are stored": self.denied,
            "stored rows are none that were sent": self.wrong,
            "symbols have another newest quote than quotes.latest says": self.latest,
            "bars differ from those of the rows": self.bars,
            "rows are counted too many or too few": self.counts,
        }
        return [f"{count} {sentence}" for sentence, count in sentences.items() if count] + self.answers


async def verify(ledger: Ledger, database_url: str, url: str | None, *, interval: str = "1m") -> Verdict:
    """Compare everything; without the `url` of a service only the database."""
    verdict = Verdict(requests=len(ledger.requests), answers=list(ledger.wrong), rows=ledger.rows)
    symbols = ledger.symbols
    connection = await asyncpg.connect(database_url, timeout=30)
    try:
        stored = {tuple(row[:2]): tuple(row[2:]) for row in await connection.fetch(_STORED, symbols)}
        verdict.latest = await connection.fetchval(_LATEST, symbols)
    finally:
        await connection.close()
    there = []
    for request in ledger.requests:
        found, first, last, false = stored.pop((request.symbol, request.number), (0, None, None, 0))
        _judge(verdict, request, found)
        if found:
            ends = (request.times[0], request.times[-1])
            verdict.wrong += false if found < request.rows or (first, last) == ends else found
            there.append(request)
    verdict.wrong += sum(rows for rows, *_ in stored.values())
    if url is not None and there:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            total = 0
            for symbol in symbols:
                total += (await _get(http, "/v1/quotes/count", symbols=symbol, **_span(there)))["count"]
            verdict.counts = abs(total - sum(request.rows for request in there)) if not verdict.torn else 0
            if not (verdict.lost or verdict.torn or verdict.wrong):
                verdict.bars = await _bars(http, there, symbols, interval)
    return verdict


def _judge(verdict: Verdict, request: Request, found: int) -> None:
    if request.state == "stored" and found < request.rows:
        verdict.lost += request.rows - found
        verdict.first_lost = min(verdict.first_lost, request.answered)
    if 0 < found != request.rows:
        verdict.torn += 1
    if request.state == "refused" and found:
        verdict.denied += 1
    if request.state == "unknown":
        verdict.unknown += 1
        verdict.unknown_stored += found > 0


def _span(requests: Sequence[Request]) -> dict[str, str]:
    instants = pl.Series([min(r.times[0] for r in requests), max(r.times[-1] for r in requests) + 60_000])
    start, end = instants.cast(pl.Datetime("ms", "UTC")).to_list()
    return {"start": start.isoformat(), "end": end.isoformat()}


async def _get(http: httpx.AsyncClient, path: str, **parameters: str) -> Any:
    answer = await http.get(path, params=parameters)
    answer.raise_for_status()
    return answer.json()


async def _bars(http: httpx.AsyncClient, there: Sequence[Request], symbols: Sequence[str], interval: str) -> int:
    """How many bars of the service differ from those of the requests that are stored."""
    given: list[tuple[Any, ...]] = []
    span = _span(there)
    span["start"] = span["start"][:11] + "00:00:00+00:00"  # of the day, so that the first bar is whole
    for symbol in symbols:
        query = {"symbols": symbol, "interval": interval, **span, "limit": "1000"}
        while True:
            page = await _get(http, "/v1/ohlc", **query)
            given += [tuple(bar[name] for name in _BAR) for bar in page["bars"]]
            if page.get("next_page_token") is None:
                break
            query["page_token"] = page["next_page_token"]
    return len(set(given).symmetric_difference(expected_bars(there, interval)))


def expected_bars(requests: Iterable[Request], interval: str) -> set[tuple[Any, ...]]:
    """The bars of the rows of some requests."""
    columns = [pl.col("symbol"), pl.col("at").dt.strftime("%Y-%m-%dT%H:%M:%SZ")]
    columns += [pl.col(name).cast(pl.Float64) for name in _BAR[2:7]] + [pl.col("count").cast(pl.Int64)]
    frames = [
        pl.DataFrame({"at": pl.Series(request.times, dtype=pl.Int64)}).with_columns(
            pl.lit(request.symbol).alias("symbol"), pl.lit(request.number, pl.Int64).alias("volume")
        )
        for request in requests
    ]
    bars = (
        pl.concat(frames)
        .sort("symbol", "at")
        .with_columns((1 + pl.col("at") % PRICES).alias("price"), pl.from_epoch("at", time_unit="ms"))
        .group_by_dynamic("at", every=interval, group_by="symbol")
        .agg(
            pl.col("price").first().alias("open"),
            pl.col("price").max().alias("high"),
            pl.col("price").min().alias("low"),
            pl.col("price").last().alias("close"),
            pl.col("volume").sum(),
            pl.len().alias("count"),
        )
        .select(columns)
    )
    return set(bars.iter_rows())
