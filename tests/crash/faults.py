"""What can happen to a server, its connections and its clients, on purpose and at any moment."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.crash.bed import Bed
from tests.crash.journal import Answer
from tests.crash.site import Site
from tests.proxy import Cut

# A fault that lasts does so until clients have felt it, or this long: under light load they may not.
FELT_WITHIN_SECONDS = 5
DISK_FULL = "53100"
STATEMENT_TIMED_OUT = "57014"
HOLD_SECONDS = 0.3
ACKNOWLEDGED_ELSEWHERE = 1, 60

Fault = Callable[[Bed, random.Random], Awaitable[None]]


async def server_killed(bed: Bed, rng: random.Random) -> None:
    site = rng.choice(bed.sites)
    await site.kill()
    await site.start()


async def shard_missing(bed: Bed, rng: random.Random) -> None:
    """SIGKILL one server of several, and start it only when writes elsewhere have got through."""
    site = rng.choice(bed.sites)
    await site.kill()
    try:
        wanted = bed.answers(Answer.OK) + rng.randint(*ACKNOWLEDGED_ELSEWHERE)
        await bed.until(lambda: bed.answers(Answer.OK) >= wanted, "writes to the other shards didn't get through")
    finally:
        await site.start()


async def server_restarted_fast(bed: Bed, rng: random.Random) -> None:
    site = rng.choice(bed.sites)
    await asyncio.to_thread(site.server.stop, signal.SIGINT)
    await site.start()


async def server_restarted_immediately(bed: Bed, rng: random.Random) -> None:
    site = rng.choice(bed.sites)
    await asyncio.to_thread(site.server.stop, signal.SIGQUIT)
    await site.start()


async def backend_killed(bed: Bed, rng: random.Random) -> None:
    """SIGKILL one backend: the server takes all others down, recovers and goes on."""
    await asyncio.to_thread(rng.choice(bed.sites).server.kill_one, rng.randrange(1000))


async def client_killed(bed: Bed, rng: random.Random) -> None:
    client = rng.choice(bed.clients)
    await client.kill()
    await client.start()


async def archiver_killed(bed: Bed, rng: random.Random) -> None:
    """The one that archives, or the one that restores."""
    process = rng.choice(bed.archivers)
    await process.kill()
    await process.start()


async def archivers_cut(bed: Bed, rng: random.Random) -> None:
    """Cut what both of them are at, before or after it was executed."""
    for process in bed.archivers:
        rng.choice(process.proxies).cut = rng.choice([Cut.BEFORE_SENDING, Cut.BEFORE_ANSWER])
    await asyncio.sleep(HOLD_SECONDS)
    for process in bed.archivers:
        process.check()


async def cut_before_statement(bed: Bed, rng: random.Random) -> None:
    await _cut(bed, rng, Cut.BEFORE_SENDING)


async def cut_before_answer(bed: Bed, rng: random.Random) -> None:
    """Executed, then lost."""
    await _cut(bed, rng, Cut.BEFORE_ANSWER)


async def cut_while_locked(bed: Bed, rng: random.Random) -> None:
    """Cut all connections while their statements wait for a lock: they are executed later, beside their repetition."""
    number = rng.randrange(len(bed.sites))
    async with _locked(bed.sites[number]):
        await asyncio.sleep(HOLD_SECONDS)
        for client in bed.clients:
            client.proxies[number].sever()
        await asyncio.sleep(HOLD_SECONDS)


async def backends_terminated(bed: Bed, rng: random.Random) -> None:
    await rng.choice(bed.sites).administer(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < 0.5"
    )


async def pool_run_dry(bed: Bed, rng: random.Random) -> None:
    client = rng.choice(bed.clients)
    before = client.answers[Answer.UNAVAILABLE]
    client.process.send_signal(signal.SIGUSR1)
    await _until_felt(bed, lambda: client.answers[Answer.UNAVAILABLE] > before)


async def statements_timed_out(bed: Bed, rng: random.Random) -> None:
    before = bed.codes(STATEMENT_TIMED_OUT)
    site = rng.choice(bed.sites)
    await site.administer(f"ALTER SYSTEM SET statement_timeout = '{rng.randint(1, 20)}ms'", "SELECT pg_reload_conf()")
    try:
        # Some time out while they wait, others in the middle of their work.
        async with _locked(site):
            await asyncio.sleep(rng.uniform(0, HOLD_SECONDS))
        await _until_felt(bed, lambda: bed.codes(STATEMENT_TIMED_OUT) > before)
    finally:
        await site.administer("ALTER SYSTEM RESET statement_timeout", "SELECT pg_reload_conf()")


async def disk_full(bed: Bed, rng: random.Random) -> None:
    disk = rng.choice(bed.sites).disk
    if disk is None:
        raise RuntimeError("there is no small disk to fill; leave this fault out")
    before = bed.codes(DISK_FULL)
    disk.fill()
    try:
        await _until_felt(bed, lambda: bed.codes(DISK_FULL) > before)
    finally:
        disk.clear()


FAULTS: dict[str, Fault] = {
    "server killed (SIGKILL)": server_killed,
    "server restarted, fast": server_restarted_fast,
    "server restarted, immediate": server_restarted_immediately,
    "one backend killed (SIGKILL)": backend_killed,
    "client killed (SIGKILL)": client_killed,
    "archiver or restorer killed (SIGKILL)": archiver_killed,
    "archiver and restorer cut": archivers_cut,
    "cut before the statement": cut_before_statement,
    "cut before the answer": cut_before_answer,
    "all cut while waiting for a lock": cut_while_locked,
    "pg_terminate_backend": backends_terminated,
    "pool run dry": pool_run_dry,
    "statements timed out": statements_timed_out,
    "disk full": disk_full,
}
# Of servers that are shards.
FAULTS_OF_SHARDS: dict[str, Fault] = {"one shard missing for a while": shard_missing}
# Cuts are what loses single answers; restarts take the longest.
WEIGHTS = {
    "archiver or restorer killed (SIGKILL)": 3,
    "cut before the statement": 4,
    "cut before the answer": 6,
    "client killed (SIGKILL)": 2,
}


def wanted(shards: int) -> dict[str, Fault]:
    """Return the faults of so many servers."""
    return FAULTS | (FAULTS_OF_SHARDS if shards > 1 else {})


def possible(bed: Bed) -> dict[str, Fault]:
    """Return the faults that can be had here."""
    has_disks = all(site.disk for site in bed.sites)
    return {name: fault for name, fault in wanted(len(bed.sites)).items() if fault is not disk_full or has_disks}


def schedule(rng: random.Random, names: list[str], count: int) -> list[str]:
    """Return each fault at least once, if the count allows, and the rest by weight; in random order."""
    chosen = names[:count] + rng.choices(names, [WEIGHTS.get(name, 1) for name in names], k=max(0, count - len(names)))
    rng.shuffle(chosen)
    return chosen


@asynccontextmanager
async def _locked(site: Site) -> AsyncIterator[None]:
    """Keep all writers of a server waiting, and no reader."""
    async with site.administrator() as locking, locking.transaction():
        await locking.execute("LOCK TABLE saga_executions IN SHARE ROW EXCLUSIVE MODE")
        yield


async def _cut(bed: Bed, rng: random.Random, cut: Cut) -> None:
    proxy = rng.choice(rng.choice(bed.clients).proxies)
    proxy.cut = cut
    await bed.until(lambda: proxy.cut is None, "a client sent no statement to cut")


async def _until_felt(bed: Bed, is_felt: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + FELT_WITHIN_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        bed.follow()
        if is_felt():
            return
        await asyncio.sleep(0.02)
