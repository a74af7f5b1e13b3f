"""Turns at the connections of a pool.

Writes come first: reads leave them some connections, and wait while a write does. Where the server refuses one more
connection, as other programs or other workers of this service have them, fewer turns are given for a while: whoever
was refused waits for a connection that is open. Invariant: there is a turn for each connection in use, and at least one
in all.
"""

import asyncio
from collections import deque
from typing import Final

from app.db.failures import PoolBusy

#: Seconds until one more connection is tried after the server has refused one.
_AGAIN: Final = 1.0


class Turns:
    """Turns for `most` connections, of which reads leave `kept` alone."""

    def __init__(self, most: int, kept: int) -> None:
        self._most = most
        self._kept = kept
        self._limit = most
        self._taken = 0
        self._reading = 0
        #: Those that wait: writes, and reads.
        self._waiting: tuple[deque[asyncio.Future[None]], deque[asyncio.Future[None]]] = (deque(), deque())
        self._trying: asyncio.TimerHandle | None = None

    @property
    def refused(self) -> bool:
        """Whether the server lets this pool have fewer connections than it may hold."""
        return self._limit < self._most

    async def take(self, seconds: float, *, read: bool) -> None:
        """Wait for a turn.

        Raises:
            PoolBusy: there was none in so many seconds.
        """
        if not self._waiting[read] and self._free(read):
            self._note(1, read)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[read].append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(read=read)
            elif turn in self._waiting[read]:
                self._waiting[read].remove(turn)
            if isinstance(error, TimeoutError):
                raise PoolBusy(self._told(read)) from None
            raise

    def give(self, *, read: bool) -> None:
        """Give a turn back."""
        self._note(-1, read)
        self._wake()

    def lessen(self) -> bool:
        """Take it that the server lets no more connections in than there are; False if there is none to wait for."""
        if self._taken <= 1:
            return False
        self._limit = min(self._limit, self._taken - 1)
        self._try_later()
        return True

    def close(self) -> None:
        """Try nothing more."""
        if self._trying is not None:
            self._trying.cancel()
            self._trying = None

    def _free(self, read: bool) -> bool:
        if self._taken >= self._limit:
            return False
        # Of few connections reads have one at least.
        return not read or (not self._waiting[False] and self._reading < max(self._limit - self._kept, 1))

    def _note(self, change: int, read: bool) -> None:
        self._taken += change
        self._reading += change if read else 0

    def _wake(self) -> None:
        for read in (False, True):
            waiting = self._waiting[read]
            while waiting and self._free(read):
                turn = waiting.popleft()
                if not turn.done():
                    self._note(1, read)
                    turn.set_result(None)

    def _try_later(self) -> None:
        if self._trying is None:
            self._trying = asyncio.get_running_loop().call_later(_AGAIN, self._more)

    def _more(self) -> None:
        self._trying = None
        self._limit += 1
        if self.refused:
            self._try_later()
        self._wake()

    def _told(self, read: bool) -> str:
        busy = f"All database connections{' for reads' if read else ''} are busy"
        if self.refused:
            return f"{busy}, and the server has no more: see max_connections, and the limits of role and database."
        return f"{busy}."
