"""The server, the proxies before it, and the client processes that write through them."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import URL

from saga_store.testing.postgres import RestartableServer, restartable
from tests.crash import archiver
from tests.crash.client import Setup
from tests.crash.disk import SmallDisk, small_disk, unmount
from tests.crash.journal import Answer, Answered, Record, Tail
from tests.crash.tables import AUDIT
from tests.databases import ALEMBIC_INI
from tests.proxy import Proxy

ROOT = Path(__file__).parent.parent.parent
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder with a random name is made in it
TEMPORARY = "saga-store-crash-"
PATIENCE_SECONDS = 120
POLL_SECONDS = 0.02
# Without these an acknowledged write may be lost, and rightly so.
DURABLE = ("fsync", "full_page_writes", "synchronous_commit")
# Else crash recovery would open and sync each file of the cluster, which takes seconds.
SETTINGS = ("recovery_init_sync_method = 'syncfs'", "log_min_messages = 'fatal'")
# Each way to use a storage; a client that is started anew goes on with another.
WAYS = [
    (driver, bind, group_commit)
    for group_commit in (True, False)
    for driver, bind in (
        ("asyncpg", "engine"),
        ("psycopg", "sessionmaker"),
        ("psycopg", "engine"),
        ("asyncpg", "sessionmaker"),
    )
]


class CrashTestError(RuntimeError):
    """The test itself can't go on, or nobody gets a write through any more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run consists of.

    Attributes:
        seed: Chooses the faults and what the clients write.
        faults: How many.
        clients: Processes.
        tasks: Of each client, which write at once.
        writes: At least and at most so many writes get through between two faults.
        folder: Where the server's data and the journals are put, for the time of the run; None: among temporary files.
    """

    seed: str
    faults: int
    clients: int = 4
    tasks: int = 8
    writes: tuple[int, int] = (5, 150)
    folder: Path | None = None


class ClientProcess:
    """A client behind a proxy of its own; what it was answered is counted as it writes its journal."""

    def __init__(self, number: int, proxy: Proxy, url: URL, journals: Path, plan: Plan) -> None:
        self.proxy = proxy
        self._number = number
        self._url = url
        self.journals = journals
        self._plan = plan
        self._lives = 0
        self._tail: Tail | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.answers: Counter[Answer] = Counter()
        self.codes: Counter[str | None] = Counter()

    @property
    def process(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise CrashTestError(f"client {self._number} hasn't been started")
        return self._process

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        driver, bind, group_commit = WAYS[(self._number + 3 * self._lives) % len(WAYS)]
        self._lives += 1
        name = f"{self._number}.{self._lives}"
        journal = self.journals / f"{name}.jsonl"
        setup = Setup(
            name,
            self._url.render_as_string(hide_password=False),
            str(journal),
            driver,
            bind,
            group_commit,
            self._plan.tasks,
            f"{self._plan.seed}/{name}",
        )
        with self._errors(name).open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.crash.client",
                json.dumps(asdict(setup)),
                stdin=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
            )
        self._tail = Tail(journal)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()
        self.follow()

    async def finish(self) -> None:
        """Let it note its last answers and end."""
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), PATIENCE_SECONDS)
        except TimeoutError as exc:
            raise CrashTestError(f"a write of client {self._number} hangs: it doesn't end") from exc
        self.follow()
        self.check()

    def follow(self) -> None:
        for line in self._tail.read() if self._tail else ():
            if isinstance(line, Answered):
                self.answers[line.answer] += 1
                self.codes[line.code or line.error] += 1

    def check(self) -> None:
        """See that it hasn't ended by itself."""
        if self.process.returncode not in {None, 0}:
            said = self._errors(f"{self._number}.{self._lives}").read_text()
            raise CrashTestError(f"client {self._number} ended with {self.process.returncode}:\n{said[-4000:]}")

    def _errors(self, name: str) -> Path:
        return self.journals / f"{name}.stderr"


class ArchiverProcess:
    """One that archives, or restores, behind a proxy of its own."""

    def __init__(self, proxy: Proxy, url: URL, place: Path, plan: Plan, *, restores: bool) -> None:
        self.proxy = proxy
        self._url = url
        self._place = place
        self._plan = plan
        self._restores = restores
        self._lives = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._lives += 1
        setup = archiver.Setup(
            self._url.render_as_string(hide_password=False),
            str(self._place / "archives"),
            "asyncpg" if self._lives % 2 else "psycopg",
            self._restores,
            f"{self._plan.seed}/{self._restores}/{self._lives}",
        )
        with self._errors.open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.crash.archiver",
                json.dumps(asdict(setup)),
                stdin=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
            )

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def kill(self) -> None:
        self.check()
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    def check(self) -> None:
        """See that it hasn't ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            raise CrashTestError(
                f"the {'restorer' if self._restores else 'archiver'} ended with {self._process.returncode}:\n"
                f"{self._errors.read_text()[-4000:]}"
            )

    @property
    def _errors(self) -> Path:
        return self._place / "journals" / f"{'restorer' if self._restores else 'archiver'}.stderr"


class Bed:
    """Everything that can be broken.

    Attributes:
        archivers: One that archives, and one that restores.
        archives: The folder of both.
        disk: Where the log rows are; None if a small one can't be had here.
    """

    def __init__(
        self,
        server: RestartableServer,
        clients: list[ClientProcess],
        archivers: list[ArchiverProcess],
        archives: Path,
        disk: SmallDisk | None,
    ) -> None:
        self.server = server
        self.clients = clients
        self.archivers = archivers
        self.archives = archives
        self.disk = disk

    @property
    def url(self) -> str:
        return self.server.facts.url

    def answers(self, answer: Answer) -> int:
        self.follow()
        return sum(client.answers[answer] for client in self.clients)

    def codes(self, code: str) -> int:
        self.follow()
        return sum(client.codes[code] for client in self.clients)

    def follow(self) -> None:
        for client in self.clients:
            client.follow()
            client.check()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not condition():  # noqa: ASYNC110 - what other processes do sets no event
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as exc:
            raise CrashTestError(f"{what} within {PATIENCE_SECONDS} s") from exc

    async def until_acknowledged(self, more: int) -> None:
        """Wait until the clients have got so many more writes through, each of them at least one."""
        wanted = self.answers(Answer.OK) + more
        before = {client: client.answers[Answer.OK] for client in self.clients}
        await self.until(
            lambda: (
                self.answers(Answer.OK) >= wanted
                and all(client.answers[Answer.OK] > count for client, count in before.items())
            ),
            f"the clients didn't get {more} writes through, and one each,",
        )

    async def start_server(self) -> None:
        self.server.start()  # in this thread: the server dies with the one that started it
        await asyncio.to_thread(self.server.wait_until_ready)

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

    async def finish(self) -> Record:
        """Let the clients end, kill the server a last time, and return what the clients noted."""
        await asyncio.gather(*(client.finish() for client in self.clients))
        for process in self.archivers:
            await process.kill()
        await asyncio.to_thread(self.server.kill)
        await self.start_server()
        return Record.of(self.clients[0].journals)


@asynccontextmanager
async def made(plan: Plan) -> AsyncIterator[Bed]:
    """Start a durable server, and the clients."""
    async with AsyncExitStack() as stack:
        remove_leftovers(plan.folder)
        place = stack.enter_context(temporary_folder(plan.folder))
        server = stack.enter_context(restartable(data=place / "server"))
        disk = stack.enter_context(small_disk(place / "disk", server.user))
        prepare(server, disk)
        processes = []
        for number in range(plan.clients):
            proxy, url = await stack.enter_async_context(Proxy.before(server.facts.url))
            processes.append(ClientProcess(number, proxy, url, place / "journals", plan))
        archivers: list[ArchiverProcess] = []
        for restores in (False, True):
            proxy, url = await stack.enter_async_context(Proxy.before(server.facts.url))
            archivers.append(ArchiverProcess(proxy, url, place, plan, restores=restores))
        bed = Bed(server, processes, archivers, place / "archives", disk)
        try:
            for client in processes:
                await client.start()
            for archiving in archivers:
                await archiving.start()
            yield bed
        finally:
            for client in processes:
                if client.runs:
                    await client.kill()
            for archiving in archivers:
                if archiving.runs:
                    await archiving.kill()


def in_memory() -> Path | None:
    """A file system where a sync is quick, if there is one: SIGKILL takes nothing from it, only a power cut does."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None


def remove_leftovers(parent: Path | None) -> None:
    """Remove what killed runs left: its folder, and the small disk that is mounted there, which keeps its memory."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        if time.time() - folder.stat().st_mtime < PATIENCE_SECONDS:
            continue  # it may just be being made
        with contextlib.suppress(OSError), (folder / "server" / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its server's, as long as there is one
            unmount(folder / "disk")
            shutil.rmtree(folder)


@contextmanager
def temporary_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as name:
        folder = Path(name)
        folder.chmod(0o711)  # when root runs this, another user runs the server
        (folder / "journals").mkdir()
        (folder / "archives").mkdir()
        yield folder


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
