"""The servers, the proxies before them, and the client processes that write through them."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from sqlalchemy import URL

from tests.crash.archiver import archives_of
from tests.crash.disk import unmount
from tests.crash.journal import Answer, Record
from tests.crash.plan import PATIENCE_SECONDS, CrashTestError, Plan
from tests.crash.processes import ArchiverProcess, ClientProcess
from tests.crash.site import Site, opened
from tests.proxy import Proxy

MEMORY = Path("/dev/shm")  # noqa: S108 - a folder with a random name is made in it
TEMPORARY = "saga-store-crash-"
POLL_SECONDS = 0.02


class Bed:
    """Everything that can be broken.

    Attributes:
        sites: The servers: one, or one for each shard.
        archivers: One that archives, and one that restores.
        archives: The folder of both, with one in it for each server.
    """

    def __init__(
        self,
        sites: list[Site],
        clients: list[ClientProcess],
        archivers: list[ArchiverProcess],
        archives: Path,
    ) -> None:
        self.sites = sites
        self.clients = clients
        self.archivers = archivers
        self.archives = archives

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

    async def finish(self) -> Record:
        """Let the clients end, kill the servers a last time, and return what the clients noted."""
        await asyncio.gather(*(client.finish() for client in self.clients))
        for process in self.archivers:
            await process.kill()
        for site in self.sites:
            await site.kill()
            await site.start()
        return Record.of(self.clients[0].journals)


@asynccontextmanager
async def made(plan: Plan) -> AsyncIterator[Bed]:
    """Start durable servers, and the clients."""
    async with AsyncExitStack() as stack:
        remove_leftovers(plan.folder)
        place = stack.enter_context(temporary_folder(plan.folder))
        make_folders(place, plan.shards)
        sites = [stack.enter_context(opened(place / f"site-{number}")) for number in range(plan.shards)]

        async def ways() -> Sequence[tuple[Proxy, URL]]:
            return [await stack.enter_async_context(Proxy.before(site.url)) for site in sites]

        journals = place / "journals"
        processes = [ClientProcess(number, await ways(), journals, plan) for number in range(plan.clients)]
        archivers = [ArchiverProcess(await ways(), place, plan, restores=restores) for restores in (False, True)]
        bed = Bed(sites, processes, archivers, place / "archives")
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
    """Remove what killed runs left: its folder, and the small disks that are mounted there, which keep their memory."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        if time.time() - folder.stat().st_mtime < PATIENCE_SECONDS:
            continue  # it may just be being made
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for site in folder.glob("site-*"):
                lock = stack.enter_context((site / "server" / "lock").open())
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its server's, as long as there is one
            for site in folder.glob("site-*"):
                unmount(site / "disk")
            shutil.rmtree(folder)


def make_folders(place: Path, shards: int) -> None:
    (place / "journals").mkdir()
    for number in range(shards):
        Path(archives_of(str(place / "archives"), number)).mkdir(parents=True)


@contextmanager
def temporary_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as name:
        folder = Path(name)
        folder.chmod(0o711)  # when root runs this, another user runs the server
        yield folder
