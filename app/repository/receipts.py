"""The receipts of requests that carry an idempotency key, kept in the transaction that stores their quotes.

Invariant: of all transactions only the one that holds the advisory lock of a key reads, stores and keeps under that
key, and a lock ends with its transaction. So the quotes and the receipt of a key are there together, once, or not
at all, whichever process does it and whenever one dies.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import msgspec

from app.db.engine import Connection
from app.errors import IdempotencyKeyInUse, IdempotencyKeyReused, QuotesError
from app.quote.terms import Receipt

_LOCK: Final = "SELECT lock, pg_try_advisory_xact_lock(lock) FROM unnest($1::bigint[]) AS lock"
_FIND: Final = """
SELECT key, fingerprint, receipt::text FROM quotes.receipts
WHERE key = ANY($1::text[]) AND created > now() - $2::interval
"""
_KEEP: Final = """
INSERT INTO quotes.receipts (key, fingerprint, receipt)
SELECT key, fingerprint, receipt::json
FROM unnest($1::text[], $2::bytea[], $3::text[]) AS new (key, fingerprint, receipt)
ORDER BY key
ON CONFLICT (key) DO UPDATE SET fingerprint = excluded.fingerprint, receipt = excluded.receipt, created = now()
"""
_SWEEP: Final = """
DELETE FROM quotes.receipts WHERE key IN (
    SELECT key FROM quotes.receipts WHERE created <= now() - $1::interval
    ORDER BY created LIMIT $2 FOR UPDATE SKIP LOCKED)
"""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A client's name for one request, and a hash over all that the request asks for."""

    key: str
    fingerprint: bytes

    @property
    def lock(self) -> int:
        """The advisory lock of the key: 64 of its hash's bits, so that two keys hardly ever share one."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big", signed=True)


class Replayed(Receipt, frozen=True):
    """The receipt that an earlier request with the same key got; nothing was stored again."""


class Receipts:
    """The table of receipts; a key is free again `expiry` after its receipt was kept."""

    def __init__(self, expiry: timedelta) -> None:
        self._expiry = expiry

    async def claim(
        self, connection: Connection, keys: Sequence[IdempotencyKey | None]
    ) -> dict[int, Receipt | QuotesError]:
        """Lock the keys until the transaction ends; the answers, by position, of those that are not to be stored.

        Without keys it says nothing to the server. The lock lasts only if no savepoint from before it is rolled
        back to.
        """
        answers: dict[int, Receipt | QuotesError] = {}
        wanted: dict[str, tuple[int, IdempotencyKey]] = {}
        for position, one in enumerate(keys):
            # To take a lock twice in one transaction succeeds, so the second request is turned away here.
            if one is not None and wanted.setdefault(one.key, (position, one))[0] != position:
                answers[position] = IdempotencyKeyInUse()
        if not wanted:
            return answers
        locked = dict(await connection.fetch(_LOCK, [one.lock for _, one in wanted.values()]))
        # A statement of its own: its snapshot has what the last holder of the lock committed.
        found = {row["key"]: row for row in await connection.fetch(_FIND, list(wanted), self._expiry)}
        for position, one in wanted.values():
            row = found.get(one.key)
            if not locked[one.lock]:
                answers[position] = IdempotencyKeyInUse()
            elif row is not None and row["fingerprint"] != one.fingerprint:
                answers[position] = IdempotencyKeyReused()
            elif row is not None:
                answers[position] = msgspec.json.decode(row["receipt"], type=Replayed)
        return answers

    async def keep(self, connection: Connection, receipts: Sequence[tuple[IdempotencyKey, Receipt]]) -> None:
        """Keep the receipts of keys that were claimed in this transaction, and drop a few that have expired."""
        if not receipts:
            return
        await connection.execute(
            _KEEP,
            [key.key for key, _ in receipts],
            [key.fingerprint for key, _ in receipts],
            [msgspec.json.encode(receipt).decode() for _, receipt in receipts],
        )
        # Twice as many as come, so that a backlog shrinks; and last, so that whoever holds the lock of a row that
        # another transaction waits for has nothing left to wait for.
        await connection.execute(_SWEEP, self._expiry, 2 * len(receipts))
