"""What each client may have of what all share: room for quotes on their way in, bodies that arrive, readers, answers.

A principal is who is asked to leave something to others: the address of a client, of IPv6 the network of 64 bits that
one subscriber has.

Invariant: one principal alone gets most of what there is, and however many take what they can get, some is left for the
next. Whoever stops sending is cut off soon, whoever sends slowly is not.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from types import TracebackType
from typing import Final, Self

from app.errors import BodyTimeout, Overloaded, QuotesError, ServiceStopping
from app.settings import Settings
from app.writer import Writer

#: Bodies that may be arriving at once.
UPLOADS: Final = 1000
#: Bytes of answers that clients have not taken.
UNSENT_BYTES: Final = 128 * 1024 * 1024
#: Requests that begin at once. The first step of one takes up to a millisecond.
STARTS: Final = 8
#: Seconds that requests wait at most for their client to be done with connecting.
_CONNECTING: Final = 0.25
#: Connections of a process.
CONNECTIONS: Final = 4096
#: Characters of an address; what a proxy says may be longer.
_LONGEST: Final = 64
#: Bytes of a body after which it is worth giving back memory, and seconds from then to that: it takes 10 ms.
_LARGE: Final = 2**18
_SETTLED: Final = 3.0
#: Seconds between two looks at the bodies that are arriving.
_EVERY: Final = 0.25


def principal(client: tuple[str, int] | None) -> str:
    """Whose share a connection from this address and port takes."""
    return _principal(client[0][:_LONGEST]) if client else ""


@lru_cache(maxsize=4096)
def _principal(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:  # a proxy's name for it
        return host
    if address.version == 4:  # noqa: PLR2004
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))


class Pool:
    """Something of which there is only so much; a principal may take `parts` times what is left by all.

    With 1 part, one principal alone gets half, and two a third each; with 3 one gets three quarters, and two three
    sevenths each.
    """

    __slots__ = ("_of", "limit", "parts", "used")

    def __init__(self, limit: int, parts: int = 1) -> None:
        self.limit = limit
        self.parts = parts
        self.used = 0
        self._of: dict[str, int] = {}

    def take(self, who: str, amount: int, alone: int = 0) -> bool:
        """Take more of it; False if there is not that much for this principal.

        Who has nothing but the `alone` of the same request is never refused: whether there is any is not for shares
        to say.
        """
        mine = self._of.get(who, 0)
        if mine > alone and mine + amount > self.parts * (self.limit - self.used):
            return False
        self.used += amount
        self._of[who] = mine + amount
        return True

    def count(self, who: str, amount: int) -> None:
        """Take more, or below 0 give back, without being asked."""
        self.used += amount
        left = self._of.get(who, 0) + amount
        if left:
            self._of[who] = left
        else:
            self._of.pop(who, None)

    def leaves(self, who: str, *, half: bool = False) -> bool:
        """Whether a principal has no more than its share, or than half of it."""
        return self._of.get(who, 0) * (1 + half) <= self.parts * (self.limit - self.used)


#: Bytes of answers that clients have not taken, of all connections of this process, by the other end's principal.
unsent: Final = Pool(UNSENT_BYTES)


class NoTurn(Exception):
    """A turn did not come in time."""


class Turns:
    """A few places, taken in turn by principals: who waits with much waits behind whoever waits with little.

    A principal has at most `each` of them at a time, also where others are free.
    """

    def __init__(self, places: int, each: int | None = None) -> None:
        self._free = places
        self._each = places if each is None else each
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, who: str) -> AsyncIterator[None]:
        """A place for as long as the block takes."""
        await self.take(who)
        try:
            yield
        finally:
            self.leave(who)

    async def take(self, who: str, patience: float | None = None) -> None:
        """Take a place, until `leave` gives it back.

        Raises:
            NoTurn: there was none for `patience` seconds.
        """
        if not self._take(who):
            place = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(who, deque()).append(place)
            try:
                async with asyncio.timeout(patience):
                    await place
            except (asyncio.CancelledError, TimeoutError) as error:
                if place.done() and not place.cancelled():
                    self.leave(who)
                else:
                    self._forget(who, place)
                if isinstance(error, TimeoutError):
                    raise NoTurn from None
                raise

    def _forget(self, who: str, place: asyncio.Future[None]) -> None:
        if (places := self._waiting.get(who)) is not None:
            with suppress(ValueError):
                places.remove(place)
            if not places:
                del self._waiting[who]

    def _take(self, who: str) -> bool:
        taken = self._taken.get(who, 0)
        if not self._free or taken >= self._each:
            return False
        self._free -= 1
        self._taken[who] = taken + 1
        return True

    def leave(self, who: str) -> None:
        """Give the place to the principal that has waited longest and may have one, and put it behind the others."""
        self._free += 1
        self._taken[who] -= 1
        if not self._taken[who]:
            del self._taken[who]
        for waiting, places in self._waiting.items():
            while places and places[0].done():  # as of one that waits no more
                places.popleft()
            if places and self._take(waiting):
                break
        else:
            return
        del self._waiting[waiting]
        place = places.popleft()
        if places:
            self._waiting[waiting] = places
        place.set_result(None)


class Starts:
    """Requests that begin: a few in each turn of the event loop, of principals in turn.

    The loop accepts one connection a turn. So those of a principal that goes on connecting wait until it is done, for a
    while: behind 400 connections of one client with a read each, the next client else waits for 0.8 s.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = self._left = at_once
        self._loop: asyncio.AbstractEventLoop | None = None
        #: When each began to wait, and how to start it.
        self._waiting: dict[str, deque[tuple[float, Callable[[], None]]]] = {}
        #: Who connected in this turn of the loop, and in the last one.
        self._now: set[str] = set()
        self._before: set[str] = set()
        self._turning = False

    def connected(self, who: str, loop: asyncio.AbstractEventLoop) -> None:
        """Note that a principal has made a connection."""
        self._turn(loop)
        self._now.add(who)

    def begin(self, who: str, start: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Start at once, or soon."""
        self._turn(loop)
        if self._left and who not in self._before and who not in self._now:
            self._left -= 1
            start()
        else:
            self._waiting.setdefault(who, deque()).append((loop.time(), start))

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is not self._loop:
            self.__init__(self._at_once)  # type: ignore[misc]
            self._loop = loop
        if not self._turning:
            self._turning = True
            loop.call_soon(self._next, loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin what waits, in a new turn of the loop."""
        self._turning = False
        connecting, self._before, self._now = self._now, self._now, set()
        self._left = self._at_once
        early = loop.time() - _CONNECTING
        ready = deque(who for who, starts in self._waiting.items() if who not in connecting or starts[0][0] < early)
        while self._left and ready:
            who = ready.popleft()
            starts = self._waiting.pop(who)
            _, start = starts.popleft()
            if starts:
                self._waiting[who] = starts  # behind the others
                ready.append(who)
            self._left -= 1
            start()
        if self._waiting or connecting:
            self._turn(loop)


#: Those of this process.
starts: Final = Starts(STARTS)
#: Connections of this process, by the other end's principal.
connections: Final = Pool(CONNECTIONS)


class Shares:
    """The pools of a service, and the bodies that are arriving."""

    def __init__(
        self, settings: Settings, writer: Writer, *, readers: int, reads: int, rest: Callable[[], bool]
    ) -> None:
        self.writer = writer
        # A principal alone gets a quarter of the bytes: while one of its bodies is read that becomes twice as much.
        self.bytes = Pool(settings.writer_queue_bytes // 2)
        self.rows = Pool(settings.writer_queue_rows, parts=3)
        self.uploads = Pool(UPLOADS, parts=3)
        self.readers = Turns(readers)
        #: Of bodies that become large a principal has one read at a time.
        self.large = Turns(UPLOADS, each=1)
        self.reads = Turns(reads, settings.effective_client_reads)
        # A statement that takes all of its time does not make the next one fail.
        self._patience = (settings.pool_timeout + settings.statement_timeout).total_seconds()
        self.arriving: set[Claim] = set()
        self._idle = settings.body_timeout.total_seconds()
        self._rate = settings.body_rate
        self._sweep: asyncio.TimerHandle | None = None
        self._rest = rest
        self._resting: asyncio.TimerHandle | asyncio.Future[bool] | None = None

    def claim(self, client: tuple[str, int] | None) -> "Claim":
        """What one request of this client takes; a context manager, which gives back what is left at its end."""
        return Claim(self, principal(client))

    @asynccontextmanager
    async def reading(self, client: tuple[str, int] | None, peer: str) -> AsyncIterator[None]:
        """The turn of a read, from its statement to its answer; whose peer it is may be a proxy.

        Raises:
            Overloaded: it was not this client's turn in time, or it has answers to take first.
        """
        who = principal(client)
        self._taking(peer)
        try:
            await self.reads.take(who, self._patience)
        except NoTurn:
            raise Overloaded("This client asks for more at once than it gets; wait for its answers.") from None
        try:
            self._taking(peer)  # answers before it may wait by now
            yield
        finally:
            self.reads.leave(who)

    def _taking(self, peer: str) -> None:
        if unsent.used and not unsent.leaves(peer, half=True):
            raise Overloaded("This client should take the answers that it has asked for before it asks for more.")

    def settle(self) -> None:
        """Give back memory soon, and again until there is none to give; something large has been let go."""
        if self._resting is None:
            self._resting = asyncio.get_running_loop().call_later(_SETTLED, self._give_back)

    def _give_back(self) -> None:
        self._resting = asyncio.get_running_loop().run_in_executor(None, self._rest)
        self._resting.add_done_callback(self._given_back)

    def _given_back(self, done: asyncio.Future[bool]) -> None:
        self._resting = None
        if not done.cancelled() and done.result():
            self.settle()

    def watch(self) -> None:
        """Look at the bodies that are arriving, for as long as there are any."""
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(_EVERY, self._look)

    def _look(self) -> None:
        self._sweep = None
        now = asyncio.get_running_loop().time()
        for claim in list(self.arriving):
            if now >= self.writer.bodies_until:
                claim.cut(ServiceStopping("The service stops before this body has arrived."))
            elif not claim.busy and now - claim.last > self._idle:
                claim.cut(BodyTimeout(f"Nothing of the body has arrived for {self._idle:g} seconds."))
            elif not claim.busy and claim.size < self._rate * (now - claim.began - self._idle):
                claim.cut(BodyTimeout(f"The body arrives at less than {self._rate} bytes a second."))
        if self.arriving:
            self.watch()

    def overloaded(self, what: str) -> Overloaded:
        """The refusal of a client that has too much of something in hand already."""
        return Overloaded(
            f"This client has too many {what} in hand; wait for their answers.", retry_after=self.writer.retry_after()
        )


class Claim:
    """What one request has taken: the bytes of its body, then the rows and bytes of its batch."""

    __slots__ = (
        "_body",
        "_nbytes",
        "_rows",
        "_shares",
        "_task",
        "_verdict",
        "began",
        "busy",
        "large",
        "last",
        "size",
        "who",
    )

    def __init__(self, shares: Shares, who: str) -> None:
        self._shares = shares
        self.who = who
        self._body = 0
        self._nbytes = 0
        self._rows = 0
        self._task: asyncio.Task[object] | None = None
        self._verdict: QuotesError | None = None
        #: On the loop's clock: when the body began to arrive, and its last bytes came.
        self.began = self.last = 0.0
        #: Bytes that have arrived.
        self.size = 0
        #: Whether the body became so large that its memory is given back when it is gone.
        self.large = False
        #: Whether the service is at work on the body, so that nobody waits for the client.
        self.busy = False

    def expect(self) -> None:
        """From now on the body arrives, and this task is cancelled when it does not.

        Raises:
            Overloaded: too many bodies of this client are arriving.
        """
        shares = self._shares
        if not shares.uploads.take(self.who, 1):
            raise shares.overloaded("bodies")
        self._task = asyncio.current_task()
        self.began = self.last = asyncio.get_running_loop().time()
        shares.arriving.add(self)
        shares.watch()

    def arrived(self) -> None:
        """The body has come, or nobody waits for it any more."""
        if self._task is not None:
            self._task = None
            self._shares.arriving.discard(self)
            self._shares.uploads.count(self.who, -1)

    def came(self, nbytes: int) -> None:
        """Note that bytes have arrived."""
        self.size += nbytes
        self.last = asyncio.get_running_loop().time()

    def worked(self) -> None:
        """Note that the service is done with what has arrived: the client has its time from now on."""
        now = asyncio.get_running_loop().time()
        self.began += now - self.last
        self.last = now
        self.busy = False

    def cut(self, verdict: QuotesError) -> None:
        """Wait for this body no longer."""
        self._verdict = verdict
        self._shares.arriving.discard(self)
        if self._task is not None:
            self._task.cancel()

    def explain(self) -> None:
        """Raise what the task was cancelled for, if it was for the body.

        Raises:
            BodyTimeout: the body stopped, or came too slowly.
            ServiceStopping: the service stops and cannot wait for it.
        """
        if self._verdict is not None:
            if task := asyncio.current_task():
                task.uncancel()
            raise self._verdict from None

    def grow(self, nbytes: int) -> None:
        """Take room for more bytes of the body.

        Raises:
            Overloaded: there is none, or too much of it is this client's.
        """
        shares = self._shares
        shares.writer.take(nbytes, alone=self._body)
        self._body += nbytes
        self.large = self.large or self._body > _LARGE
        if not shares.bytes.take(self.who, nbytes, self._body - nbytes):
            shares.bytes.count(self.who, nbytes)  # given back at the end
            raise shares.overloaded("bytes")

    def become(self, rows: int, nbytes: int) -> None:
        """Take room for a batch, which is there in place of the body.

        Raises:
            Overloaded: too many rows or bytes are this client's.
        """
        shares = self._shares
        shares.writer.give_back(self._body)
        shares.bytes.count(self.who, -self._body)
        self._body = 0
        if not shares.bytes.take(self.who, nbytes):
            raise shares.overloaded("bytes")
        self._nbytes = nbytes
        if not shares.rows.take(self.who, rows):
            raise shares.overloaded("quotes")
        self._rows = rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shares = self._shares
        if self._body:
            shares.writer.give_back(self._body)
        shares.bytes.count(self.who, -self._body - self._nbytes)
        shares.rows.count(self.who, -self._rows)
        if self.large:
            shares.settle()
