"""A TCP proxy before PostgreSQL that counts round trips and cuts connections where a test asks."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Self

from sqlalchemy import URL, make_url

_NEGOTIATIONS = {80877103, 80877104}  # SSLRequest and GSSENCRequest, answered by a single byte
_WAITS_FOR_ANSWER = b"QS"  # a simple query, or the Sync that ends an extended one
_EXECUTES = b"QE"
_PARTS_OF_A_QUERY = b"PBDEC"  # Parse, Bind, Describe, Execute, Close: the server would begin before the Sync


class Cut(Enum):
    """When to cut the connection of the next statement."""

    BEFORE_SENDING = auto()
    BEFORE_ANSWER = auto()
    AT_ONCE = auto()  # the statement is on its way, and the server goes on with it
    STRANDED = auto()  # the statement is on its way, and the server gets it when the test delivers it


@dataclass
class Proxy:
    """Listens on ``port``; ``round_trips`` counts what the clients sent and waited for.

    ``cut`` cuts the connection of the next statement that is executed, or of the one after ``let_pass`` others; to
    prepare one doesn't count. While the gate is
    closed nobody gets a new connection; ``connections`` counts those who came. ``target`` may move to another port.
    """

    host: str
    target: int
    port: int = 0
    round_trips: int = 0
    cut: Cut | None = None
    let_pass: int = 0
    connections: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    _is_closing: bool = False
    _delivery: asyncio.Event = field(default_factory=asyncio.Event)
    _stranded: list[asyncio.Task[None]] = field(default_factory=list)
    _answers_lost: set[asyncio.StreamWriter] = field(default_factory=set)
    _clients: set[asyncio.StreamWriter] = field(default_factory=set)
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    @asynccontextmanager
    async def before(cls, url: str) -> AsyncIterator[tuple[Self, URL]]:
        """Stand before the server of ``url``; yields the proxy and the URL to connect to."""
        parsed = make_url(url)
        proxy = cls(parsed.host or "127.0.0.1", parsed.port or 5432)
        server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        proxy.gate.set()
        try:
            yield proxy, parsed.set(host="127.0.0.1", port=proxy.port)
        finally:
            server.close()
            proxy._is_closing = True
            proxy.gate.set()
            for task in proxy._stranded:
                task.cancel()
            await asyncio.gather(*proxy._serving - set(proxy._stranded))

    async def deliver(self) -> None:
        """Let the server have what is stranded, and wait until it has answered."""
        stranded, self._stranded = self._stranded, []
        self._delivery.set()
        await asyncio.gather(*stranded)
        self._delivery.clear()

    def sever(self) -> None:
        """Cut all connections, whatever they are at; the server may find out only when it answers."""
        for client in self._clients:
            client.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await self.gate.wait()
        if self._is_closing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(self.host, self.target)
        except ConnectionError:  # the server is down
            writer.transport.abort()
            return
        self._clients.add(writer)
        back = asyncio.create_task(self._answers(server_reader, writer))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._requests(reader, server_writer, writer)
        if writer in self._answers_lost:
            # The server has to finish the statement before it sees that nobody is there.
            await back
        server_writer.close()
        await back
        for end in (writer, server_writer):
            end.close()
            with contextlib.suppress(ConnectionError):
                await end.wait_closed()
        self._clients.discard(writer)

    async def _requests(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        while True:
            head = await reader.readexactly(8)
            length, code = struct.unpack("!II", head)
            server.write(head + await reader.readexactly(length - 8))
            if code not in _NEGOTIATIONS:
                break
        query, executes = b"", False
        while True:
            kind = await reader.readexactly(1)
            size = await reader.readexactly(4)
            query += kind + size + await reader.readexactly(struct.unpack("!I", size)[0] - 4)
            executes |= kind in _EXECUTES
            if kind in _PARTS_OF_A_QUERY:
                continue
            if kind in _WAITS_FOR_ANSWER:
                self.round_trips += 1
                if executes and self.let_pass:
                    self.let_pass -= 1
                elif executes and self.cut:
                    cut, self.cut = self.cut, None
                    await self._cut(cut, query, server, client)
                    return
            server.write(query)
            query, executes = b"", False
            await server.drain()

    async def _cut(self, cut: Cut, query: bytes, server: asyncio.StreamWriter, client: asyncio.StreamWriter) -> None:
        if cut is not Cut.BEFORE_SENDING:
            self._answers_lost.add(client)
        if cut is not Cut.BEFORE_ANSWER:
            client.transport.abort()
        if cut is Cut.STRANDED:
            task = asyncio.current_task()
            assert task
            self._stranded.append(task)
            await self._delivery.wait()
        if cut is not Cut.BEFORE_SENDING:
            server.write(query)

    async def _answers(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while answer := await server.read(65536):
                if client in self._answers_lost:
                    # Executed, then lost.
                    client.transport.abort()
                    return
                client.write(answer)
                await client.drain()
        client.close()
