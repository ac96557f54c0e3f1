"""One storage made of several, each with a database of its own; a saga lives in one of them.

Nothing is coordinated between shards: what concerns a saga goes to its shard, and lists and claims to all at once.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, TypeVar
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaStoreError
from saga_store.inspection import (
    ContextPeek,
    Cursor,
    InterventionPage,
    RecentHistory,
    SagaCount,
    SagaFigures,
    SagaPage,
    SagaQuery,
    SagaSummary,
    valid_moment,
)
from saga_store.joining import Part
from saga_store.model import SagaExecution, SagaLogEntry
from saga_store.run import Joined
from saga_store.shard_merging import merge_counts, merge_figures, merge_interventions, merge_pages, read_positions
from saga_store.shard_records import shard_index
from saga_store.shard_retention import ShardedRetention
from saga_store.shard_set import ShardSet, is_outage
from saga_store.storage import SagaState, SagaStorage, valid_page
from saga_store.validation import valid_id, valid_name
from saga_store.write import Claim, Outcome, Settlement, Write

_logger = logging.getLogger("saga_store")

_T = TypeVar("_T")

_LEAST_PATIENCE_SECONDS = 0.5
_MOST_PATIENCE_SECONDS = 5.0

# Of an id that is given in full.
_DIGITS = 32


class ShardedSagaStorage(ShardedRetention, SagaStorage):
    """Saga storage over several storages, each of which has some of the sagas, by a hash of their ids.

    The number of shards is chosen once. At first use each shard's database is asked which one it is, of how many, by
    which hash, and which ones belong together; where all shards are new and empty, that is recorded, and as long as no
    shard that answers has a saga, all of them are waited for. A shard that a call couldn't reach is asked again before
    it is used again. What doesn't match raises ShardingError, and nothing is read or written.

    - What concerns a saga goes to its shard. If that can't be reached, it raises StorageUnavailableError.
    - Claims are shared out evenly over all shards, and go to them at the same time. Those with the fewest attempts
      come first; which sagas haven't changed for longest is known within a shard only. Once one shard has answered, the
      others have a tenth of the lease, but half a second at least and 5 at most; then the claim goes on without them.
    - Lists and views ask all shards at once, and merge what they say by what it is sorted by. Who asks for a whole id
      asks for one saga.
    - As long as one shard answers, lists, views and claims do: ``missing`` of what views return names the others, by
      their places, and where a plain list is returned, a WARNING does. So it is with one whose tables are gone.
    - The ids of log entries are unique within a saga, and no more.
    - ``run.commit(into=session)`` needs a session on the saga's shard; ``shard_of`` tells which that is.
    - Holds, stubs and restored sagas go to their shards, those that are restored together in one transaction of each
      shard; archives and their ledgers are each shard's own, and ``saga_store.retention`` goes through all of them.
    - A context may be as big as the shard allows that allows least.

    Args:
        storages: The shards, always in the same order; each commits its own calls.
        records: Whether to record what the shards are, where all of them are new and empty. Without it they may be
            looked at by a role that may only read; what is written to them goes unchecked then, so it is for views.

    Raises:
        InvalidSagaDataError: There are none, or more than 1,000; one is no SagaStorage, or joins a transaction.
    """

    def __init__(self, storages: Iterable[SagaStorage], *, records: bool = True) -> None:
        self._set = ShardSet(storages, records=records)
        self._shards = len(self._set.storages)
        self._max_context_bytes = min(shard._max_context_bytes for shard in self._set.storages)
        self._turns = itertools.count()

    @property
    def shards(self) -> tuple[SagaStorage, ...]:
        """The storages that this one is made of."""
        return self._set.storages

    @property
    def unreachable(self) -> dict[int, SagaStoreError]:
        """Which shards couldn't be reached when they were last asked, by their places in the list, and why."""
        return self._set.unreachable

    async def reach(self) -> dict[int, SagaStoreError]:
        """See whether the shards are what they should be, and return which ones can't be reached, and why.

        Raises:
            ShardingError: They aren't.
            StorageUnavailableError: None can be reached.
        """
        return await self._set.reach()

    async def on_shard(self, index: int, work: Callable[[SagaStorage], Awaitable[_T]]) -> _T:
        """Do something on one shard, by its place in the list, once it is known to be what it should be.

        Raises:
            ShardingError: It isn't.
            StorageUnavailableError: It can't be reached.
        """
        return await self._set.on(index, work)

    def shard_of(self, saga_id: UUID) -> int:
        """Return in which shard a saga lives, by its place in the list, whether the saga is there or not.

        Raises:
            InvalidSagaDataError: The id is no UUID.
        """
        return shard_index(valid_id(saga_id), self._shards)

    # What concerns one saga

    async def _on(self, saga_id: UUID, question: Callable[[SagaStorage], Awaitable[_T]]) -> _T:
        return await self._set.on(shard_index(saga_id, self._shards), question)

    async def _apply(self, write: Write) -> Outcome:
        index = shard_index(write.saga_id, self._shards)
        outcome = await self._set.on(index, lambda shard: shard._apply(write))
        if isinstance(outcome, SagaStoreError):
            self._set.note(index, outcome)
        return outcome

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        return await self._on(saga_id, lambda shard: shard._fetch_saga(saga_id))

    async def _fetch_state(self, saga_id: UUID) -> SagaState:
        return await self._on(saga_id, lambda shard: shard._fetch_state(saga_id))

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._on(saga_id, lambda shard: shard._fetch_history(saga_id))

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        return await self._on(saga_id, lambda shard: shard._fetch_history_page(saga_id, after, limit))

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._on(saga_id, lambda shard: shard._fetch_in_doubt(saga_id))

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        return await self._on(saga_id, lambda shard: shard._is_held(saga_id, owner, version))

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]:
        return await self._on(saga_id, lambda shard: shard._recent_writes(saga_id))

    async def _fetch_recent(self, saga_id: UUID, limit: int, after: int) -> RecentHistory:
        return await self._on(saga_id, lambda shard: shard._fetch_recent(saga_id, limit, after))

    async def _peek(self, saga_id: UUID, most: int) -> ContextPeek:
        return await self._on(saga_id, lambda shard: shard._peek(saga_id, most))

    async def _wait(self, saga_id: UUID, seconds: float) -> None:
        await self._on(saga_id, lambda shard: shard._wait(saga_id, seconds))

    async def _settle(self, settlement: Settlement) -> None:
        await self._on(settlement.saga_id, lambda shard: shard._settle(settlement))

    def _joined_for(self, saga_id: UUID, into: object) -> Joined:
        index = shard_index(saga_id, self._shards)
        return _JoinedShard(self._set, index, self._set.storages[index]._joined(into))

    # What concerns all

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        found, missing = await self._set.ask_all(
            lambda shard: shard._fetch_stale(stale_after, limit, name, max_attempts)
        )
        _warn("not listed as stale", missing)
        return _merged(found.values(), attrgetter("recovery_attempts", "updated_at", "id"))[:limit]

    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        found, missing = await self._set.ask_all(lambda shard: shard._fetch_exhausted(limit, name, max_attempts))
        _warn("not listed as exhausted", missing)
        return _merged(found.values(), attrgetter("updated_at", "id"))[:limit]

    async def _claim(self, claim: Claim) -> list[SagaExecution]:
        """Share the limit out over the shards, then what some didn't need over those that may have more."""
        missing = await self._set.reach()
        first = next(self._turns)
        turn = [index % self._shards for index in range(first, first + self._shards)]
        turn = [index for index in turn if index not in missing]
        claimed: list[SagaExecution] = []
        failures: dict[int, SagaStoreError] = {}
        while turn and len(claimed) < claim.limit:
            shares = _shares(claim.limit - len(claimed), turn)
            # What one shard has given is leased, and that runs out while the others are waited for.
            found, failed = await self._set.ask(
                {index: _claimer(claim, share) for index, share in shares.items()}, patience=_patience(claim.lease)
            )
            for sagas in found.values():
                claimed += sagas
            failures |= failed
            full = [index for index, sagas in found.items() if len(sagas) == shares[index]]
            turn = [index for index in turn if index not in shares] + full
        if not claimed:
            for failure in failures.values():
                if not is_outage(failure) or len({**missing, **failures}) == self._shards:
                    raise failure
        _warn("not claimed", {**missing, **failures})
        claimed.sort(key=attrgetter("recovery_attempts"))
        return claimed

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        if query.id_prefix is not None and len(query.id_prefix) == _DIGITS:
            return await self._on(UUID(query.id_prefix), lambda shard: shard._find(query, limit, after))
        found, missing = await self._set.ask_all(lambda shard: shard._find(query, limit, after))
        return merge_pages(list(found.values()), limit, tuple(missing))

    async def _count(self, query: SagaQuery) -> SagaCount:
        found, missing = await self._set.ask_all(lambda shard: shard._count(query))
        return merge_counts(list(found.values()), tuple(missing))

    async def _sample(self, query: SagaQuery) -> tuple[list[SagaSummary], datetime, bool]:
        found, missing = await self._set.ask_all(lambda shard: shard._sample(query))
        _warn("in no group", missing)
        sagas = [saga for seen, _, _ in found.values() for saga in seen]
        is_partial = bool(missing) or any(partial for _, _, partial in found.values())
        return sagas, max(now for _, now, _ in found.values()), is_partial

    async def find_interventions(
        self, *, since: datetime, by: str | None = None, limit: int = 50, after: str | None = None
    ) -> InterventionPage:
        since, limit = valid_moment("since", since), valid_page("limit", limit)
        by = None if by is None else valid_name("by", by)
        positions = read_positions(after, self._shards)

        def asking(position: int | None) -> Callable[[SagaStorage], Awaitable[InterventionPage]]:
            return lambda shard: shard._find_interventions(since, by, limit, position)

        missing = await self._set.reach()
        found, failures = await self._set.ask(
            {index: asking(position) for index, position in enumerate(positions) if index not in missing}
        )
        missing = self._set.missing(found, missing, failures)
        return merge_interventions(found, positions, limit, tuple(missing))

    async def _find_interventions(
        self, since: datetime, by: str | None, limit: int, after: int | None
    ) -> InterventionPage:
        raise NotImplementedError  # an entry's id alone is no place where a page of several shards ends

    async def _fetch_figures(self, query: SagaQuery) -> SagaFigures:
        found, missing = await self._set.ask_all(lambda shard: shard._fetch_figures(query))
        return merge_figures(found, tuple(missing))


class _JoinedShard:
    """A shard in a transaction of the caller's, which has to be on that shard."""

    def __init__(self, shards: ShardSet, index: int, joined: SagaStorage) -> None:
        self._shards = shards
        self._index = index
        self._joined = joined

    async def _take_part(self) -> Part:
        await self._shards.get(self._index)
        part = await self._joined._take_part()
        there = (await self._joined._fetch_shard_state()).record
        wanted = self._shards.record_of(self._index)
        if there != wanted:
            raise InvalidSagaDataError(
                "into",
                f"must be on the saga's shard, {wanted}, and is on {there or 'a database that is no shard'}; ask "
                "shard_of(saga_id) which engine to take",
            )
        return part

    async def _write(self, write: Write) -> int:
        return await self._joined._write(write)


def _claimer(claim: Claim, share: int) -> Callable[[SagaStorage], Awaitable[list[SagaExecution]]]:
    return lambda shard: shard._claim(replace(claim, limit=share))


def _patience(lease: timedelta) -> float:
    """Return for how many seconds a claim waits for shards that are slower than another one."""
    return min(max(lease.total_seconds() / 10, _LEAST_PATIENCE_SECONDS), _MOST_PATIENCE_SECONDS)


def _shares(limit: int, turn: Sequence[int]) -> dict[int, int]:
    """Share a limit out evenly; if it isn't enough for all, those whose turn it is get something."""
    each, more = divmod(limit, len(turn))
    return {index: share for place, index in enumerate(turn) if (share := each + (place < more))}


def _merged(lists: Iterable[list[SagaExecution]], key: "attrgetter[tuple[Any, ...]]") -> list[SagaExecution]:
    return sorted(itertools.chain.from_iterable(lists), key=key)


def _warn(what: str, missing: Mapping[int, SagaStoreError]) -> None:
    for index, error in missing.items():
        _logger.warning("sagas of shard %d were %s: %s", index, what, error, extra={"shard": index})
