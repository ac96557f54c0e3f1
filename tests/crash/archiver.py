"""A process that archives what is finished, or restores what is archived, until it is killed.

python -m tests.crash.archiver '{"url": ..., "folder": ..., "driver": "asyncpg", "restores": false, "seed": ...}'
"""

import asyncio
import json
import os
import random
import sys
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import SagaStoreError
from saga_store.retention import RetentionPolicy, Target, archive, restore
from saga_store.retention.reading import find
from saga_store.sqlalchemy import SqlAlchemySagaStorage

# All that is finished may go, even if a client is about to open it again.
POLICY = RetentionPolicy(completed=timedelta(0), failed=timedelta(0))
SAGAS_PER_ARCHIVE = 40
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Setup:
    """What it is told on its command line."""

    url: str
    folder: str
    driver: str
    restores: bool
    seed: str


async def main(setup: Setup) -> None:
    # Standard input is a pipe from the one who started this process: when that is killed, so is this.
    asyncio.get_running_loop().add_reader(sys.stdin, os._exit, 1)
    rng = random.Random(setup.seed)  # noqa: S311 - repeatable
    engine = create_async_engine(make_url(setup.url).set(drivername=f"postgresql+{setup.driver}"))
    storage = SqlAlchemySagaStorage(engine, retry_for=timedelta(seconds=rng.choice([0, 1])))
    while True:
        try:
            if setup.restores:
                await restore_some(storage, setup.folder, rng)
            else:
                await archive(storage, setup.folder, POLICY, sagas_per_archive=SAGAS_PER_ARCHIVE)
        except SagaStoreError:
            pass  # the server is down, perhaps
        await asyncio.sleep(rng.uniform(0, PAUSE_SECONDS))


async def restore_some(storage: SqlAlchemySagaStorage, folder: str, rng: random.Random) -> None:
    """Restore an archive, so that its sagas go on, and are archived once more."""
    target = Target(folder)
    manifests = (await find(target)).manifests
    if manifests:
        uri = target.uri(rng.choice(manifests))
        await restore(storage, archive=uri, keep_for=timedelta(seconds=rng.choice([0, 0, 1])))


if __name__ == "__main__":
    asyncio.run(main(Setup(**json.loads(sys.argv[1]))))
