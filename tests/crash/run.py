"""One run: faults one after another while clients write, and the verdict."""

import random
import time
from collections import Counter
from importlib.metadata import version
from typing import TextIO

from tests.crash import faults as kinds
from tests.crash import tables
from tests.crash.archives import read_archived
from tests.crash.bed import made
from tests.crash.checker import check
from tests.crash.journal import Answer
from tests.crash.plan import Plan
from tests.crash.report import Progress, Result

LIBRARIES = ("SQLAlchemy", "asyncpg", "psycopg")


async def crash(plan: Plan, out: TextIO) -> Result:
    """Return what came of so many faults.

    Raises:
        CrashTestError: a client ended by itself, or no write got through any more after a fault.
    """
    begun = time.monotonic()
    rng = random.Random(plan.seed)  # noqa: S311 - repeatable
    counted: Counter[str] = Counter()
    async with made(plan) as bed:
        possible = kinds.possible(bed)
        progress = Progress(plan.faults, out)
        await bed.until_acknowledged(plan.writes[1])
        for done, name in enumerate(kinds.schedule(rng, list(possible), plan.faults), start=1):
            await possible[name](bed, rng)
            counted[name] += 1
            await bed.until_acknowledged(rng.randint(*plan.writes))
            progress.show(done, name, bed.answers(Answer.OK), bed.answers(Answer.UNKNOWN))
        record = await bed.finish()
        urls = [site.url for site in bed.sites]
        archived = await read_archived(urls, bed.archives, tables.read(urls))
        verdict = check(record.operations(), archived.stored, archived.lost)
        return Result(
            seed=plan.seed,
            server=f"PostgreSQL {bed.sites[0].server.facts.version}",
            shards=plan.shards,
            libraries={name: version(name) for name in LIBRARIES},
            clients=plan.clients,
            seconds=time.monotonic() - begun,
            faults=counted,
            left_out=sorted(kinds.wanted(plan.shards).keys() - possible.keys()),
            verdict=verdict,
            archives=archived.archives,
            archived=archived.stubs,
        )
