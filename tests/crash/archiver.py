"""A process that archives what is finished, or restores what is archived, until it is killed.

python -m tests.crash.archiver '{"urls": [...], "folder": ..., "driver": "asyncpg", "restores": false, "seed": ...}'
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
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.storage import SagaStorage

# All that is finished may go, even if a client is about to open it again.
POLICY = RetentionPolicy(completed=timedelta(0), failed=timedelta(0))
SAGAS_PER_ARCHIVE = 40
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Setup:
    """What it is told on its command line."""

    urls: list[str]
    folder: str
    driver: str
    restores: bool
    seed: str


async def main(setup: Setup) -> None:
    # Standard input is a pipe from the one who started this process: when that is killed, so is this.
    asyncio.get_running_loop().add_reader(sys.stdin, os._exit, 1)
    rng = random.Random(setup.seed)  # noqa: S311 - repeatable
    retry_for = timedelta(seconds=rng.choice([0, 1]))
    addresses = [make_url(url).set(drivername=f"postgresql+{setup.driver}") for url in setup.urls]
    shards = [SqlAlchemySagaStorage(create_async_engine(address), retry_for=retry_for) for address in addresses]
    whole = ShardedSagaStorage(shards) if len(shards) > 1 else shards[0]
    while True:
        shard = rng.randrange(len(shards))
        folder = archives_of(setup.folder, shard)
        try:
            if setup.restores:
                await restore_some(whole, folder, rng)
            else:
                await archive(shards[shard], folder, POLICY, sagas_per_archive=SAGAS_PER_ARCHIVE)
        except SagaStoreError:
            pass  # the server is down, perhaps
        await asyncio.sleep(rng.uniform(0, PAUSE_SECONDS))


def archives_of(folder: str, shard: int) -> str:
    """Return where a shard's archives are; the folder is there from the start."""
    return f"{folder}/{shard}"


async def restore_some(storage: SagaStorage, folder: str, rng: random.Random) -> None:
    """Restore an archive, so that its sagas go on, and are archived once more."""
    target = Target(folder)
    manifests = (await find(target)).manifests
    if manifests:
        uri = target.uri(rng.choice(manifests))
        await restore(storage, archive=uri, keep_for=timedelta(seconds=rng.choice([0, 0, 1])))


if __name__ == "__main__":
    asyncio.run(main(Setup(**json.loads(sys.argv[1]))))
