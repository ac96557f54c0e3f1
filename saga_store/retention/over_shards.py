"""Archiving a storage that is made of shards: each has its ledger and its turn, and all share one target.

Archives of all shards stand side by side in the target: each has an id of its own, and a ledger knows its own alone.
"""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from saga_store.errors import InvalidSagaDataError, SagaStoreError, StorageUnavailableError
from saga_store.interface import IRetentionStorage
from saga_store.sharding import ShardedSagaStorage

_T = TypeVar("_T")

_LEAST_SECONDS = 0.001


def share_of(seconds: float | None, shards: int, *, passed: float = 0, done: int = 0) -> float | None:
    """Return for how long the next of so many shards may take, so that none waits for ever for its turn.

    What those that are done have left is shared out; what one took too long, since it was down, others don't lack.
    """
    if seconds is None:
        return None
    return max((seconds - passed) / (shards - done), seconds / shards, _LEAST_SECONDS)


def first_line(exc: SagaStoreError) -> str:
    """Return why a shard failed: the first line, for drivers advise as well."""
    said = exc.reason if isinstance(exc, StorageUnavailableError) else str(exc)
    return said.partition("\n")[0]


async def each_shard(
    storage: ShardedSagaStorage,
    work: Callable[[IRetentionStorage, float | None], Awaitable[_T]],
    max_seconds: float | None,
) -> tuple[list[_T], dict[int, SagaStoreError]]:
    """Do something for one shard after the other; return what came of it, and why some failed.

    Args:
        storage: Whose shards.
        work: Given a shard, and for how many seconds it may begin something new.
        max_seconds: Of all together, from when it is known which can be reached; what a shard leaves is for those
            after it, and each has an even share at least.

    Raises:
        ShardingError: They aren't the shards that they should be; nothing was done.
        StorageUnavailableError: None can be reached.
        SagaStoreError: None is done, and so failed the first; or something else is impossible on any of them.
    """
    failed = await storage.reach()
    began = time.monotonic()
    left = [place for place in range(len(storage.shards)) if place not in failed]
    done: list[_T] = []
    for number, place in enumerate(left):
        share = share_of(max_seconds, len(left), passed=time.monotonic() - began, done=number)
        try:
            done.append(await storage.on_shard(place, _within(share, work)))
        except InvalidSagaDataError:
            raise
        except SagaStoreError as exc:
            failed[place] = exc
    if not done:
        raise failed[min(failed)]
    return done, failed


def _within(
    seconds: float | None, work: Callable[[IRetentionStorage, float | None], Awaitable[_T]]
) -> Callable[[IRetentionStorage], Awaitable[_T]]:
    return lambda shard: work(shard, seconds)
