"""A server that can be broken, with a small disk for its log rows."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config

from saga_store.testing.postgres import RestartableServer, restartable
from tests.crash.disk import SmallDisk, small_disk
from tests.crash.plan import CrashTestError
from tests.crash.tables import AUDIT
from tests.databases import ALEMBIC_INI

# Without these an acknowledged write may be lost, and rightly so.
DURABLE = ("fsync", "full_page_writes", "synchronous_commit")
# Else crash recovery would open and sync each file of the cluster, which takes seconds.
SETTINGS = ("recovery_init_sync_method = 'syncfs'", "log_min_messages = 'fatal'")


@dataclass(frozen=True, slots=True)
class Site:
    """A server, and where its log rows are; None if a small disk can't be had here."""

    server: RestartableServer
    disk: SmallDisk | None

    @property
    def url(self) -> str:
        return self.server.facts.url

    async def start(self) -> None:
        self.server.start()  # in this thread: the server dies with the one that started it
        await asyncio.to_thread(self.server.wait_until_ready)

    async def kill(self) -> None:
        await asyncio.to_thread(self.server.kill)

    @asynccontextmanager
    async def administrator(self) -> AsyncIterator[psycopg.AsyncConnection]:
        """Connect past the proxies, exempt from what is set up for the clients.

        Whoever waits for a lock here mustn't keep the proxies from working: its holder may need them to end.
        """
        connection = await psycopg.AsyncConnection.connect(self.url, autocommit=True, options="-c statement_timeout=0")
        async with connection:
            yield connection

    async def administer(self, *statements: str) -> None:
        async with self.administrator() as admin:
            for statement in statements:
                await admin.execute(statement.encode())


@contextmanager
def opened(folder: Path) -> Iterator[Site]:
    """Run a durable server in a folder, with the tables that are read afterwards."""
    folder.mkdir(mode=0o711, exist_ok=True)
    with restartable(data=folder / "server") as server, small_disk(folder / "disk", server.user) as disk:
        prepare(server, disk)
        yield Site(server, disk)


def prepare(server: RestartableServer, disk: SmallDisk | None) -> None:
    config = Config(str(ALEMBIC_INI))
    config.attributes["url"] = server.facts.url.replace("postgresql://", "postgresql+psycopg://")
    command.upgrade(config, "head")
    with psycopg.connect(server.facts.url, autocommit=True) as admin:
        for name in DURABLE:
            [value] = admin.execute(b"SELECT current_setting(%s)", [name]).fetchone() or [None]
            if value != "on":
                raise CrashTestError(f"{name} is {value}, and a commit that isn't durable may be lost")
        for setting in SETTINGS:
            admin.execute(f"ALTER SYSTEM SET {setting}".encode())
        admin.execute(b"SELECT pg_reload_conf()")
        admin.execute(AUDIT.encode())
        if disk:
            admin.execute(f"CREATE TABLESPACE small LOCATION '{disk.folder}'".encode())
            admin.execute(b"ALTER TABLE saga_logs SET TABLESPACE small")
