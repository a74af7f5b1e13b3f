"""A proxy before a database, through which the network fails: packets that are lost without a word.

Invariant: a proxy that swallows closes no connection, whichever side closes its own.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qsl, urlsplit


class Proxy:
    """Passes bytes on between clients and the database of a URL, until it is told to swallow them."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._query = dict(parse_qsl(parts.query))
        self._parts = parts
        self.swallows = False
        self.connections = 0
        self._port = 0
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The database, reached by way of the proxy."""
        auth, at, _ = self._parts.netloc.rpartition("@")
        return f"postgresql://{auth}{at}127.0.0.1:{self._port}{self._parts.path}"

    async def _upstream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if directory := self._query.get("host"):
            return await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.{self._query.get('port', 5432)}")
        return await asyncio.open_connection(self._parts.hostname, self._parts.port or 5432)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there = [writer]
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        try:
            with suppress(OSError):
                their_reader, their_writer = await self._upstream()
                there.append(their_writer)
                await asyncio.gather(self._pump(reader, their_writer), self._pump(their_reader, writer))
        except asyncio.CancelledError:
            pass
        finally:
            self._pumps.discard(task)
            for one in there:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if not self.swallows:
                    writer.write(data)
                    await writer.drain()
        if self.swallows:
            await asyncio.Event().wait()  # half-open: the other side hears nothing of it
        writer.transport.abort()

    def end(self) -> None:
        """Break all connections."""
        for pump in list(self._pumps):
            pump.cancel()


@asynccontextmanager
async def proxy(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy before the database of a URL."""
    one = Proxy(upstream)
    server = await asyncio.start_server(one._serve, "127.0.0.1", 0)
    one._port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()
        while one._pumps:
            one.end()
            await asyncio.sleep(0)
