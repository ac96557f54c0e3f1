"""Keeping and letting go over shards: holds, stubs and restored sagas are routed, archives are each shard's own."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import NoReturn
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaArchivedError, SagaStoreError
from saga_store.inspection import Cursor
from saga_store.retention_model import (
    ArchivePage,
    ArchiveState,
    ArchivingTurn,
    Restored,
    RetentionSnapshot,
    SagaArchive,
    SagaMark,
    SagaRecord,
    SagaStub,
    StubsMade,
)
from saga_store.retention_storage import Change, Hold, RetentionStorage, Terms
from saga_store.shard_records import shard_index
from saga_store.shard_set import ShardSet


class ShardedRetention(RetentionStorage):
    """What of keeping and letting go concerns a saga goes to its shard; the ledger of archives is a shard's own."""

    _set: ShardSet

    async def _hold(self, hold: Hold) -> None:
        await self._set.on(self._index(hold.saga_id), lambda shard: shard._hold(hold))

    async def _fetch_stub(self, saga_id: UUID) -> SagaStub | None:
        return await self._set.on(self._index(saga_id), lambda shard: shard._fetch_stub(saga_id))

    async def _restore(
        self, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
    ) -> list[Restored]:
        """Restore shard by shard, each in one transaction: what is there already is left by whoever repeats it."""
        places: dict[int, list[int]] = {}
        for place, record in enumerate(records):
            places.setdefault(self._index(record.id), []).append(place)
        for index in sorted(places):
            await self._set.get(index)
        restored: dict[int, Restored] = {}
        for index in sorted(places):
            there = [records[place] for place in places[index]]
            came = await self._set.on(index, _restorer(there, archive_id, keep_for))
            restored |= dict(zip(places[index], came, strict=True))
        return [restored[place] for place in range(len(records))]

    async def _forget(self, older_than: timedelta, limit: int, after: Cursor | None) -> tuple[int, Cursor | None]:
        """Walk all shards to their ends, or to the limit, so that there is never more.

        Raises:
            SagaStoreError: Some couldn't be walked to their ends, and so others aren't enough for the limit.
        """
        del after
        failed = await self._set.reach()
        forgotten = 0
        for index in sorted(set(range(len(self._set.storages))) - failed.keys()):
            if forgotten < limit:
                try:
                    forgotten += await self._set.on(index, _forgetter(older_than, limit - forgotten))
                except InvalidSagaDataError:
                    raise
                except SagaStoreError as exc:
                    failed[index] = exc
        if failed and forgotten < limit:
            raise failed[min(failed)]
        return forgotten, None

    async def forget_all_stubs(self, *, older_than: timedelta, at_once: int = 1000) -> AsyncIterator[int]:
        """Walk all shards that can be reached; at the end what is in the way of the others is raised."""
        failed = await self._set.reach()
        for index in sorted(set(range(len(self._set.storages))) - failed.keys()):
            try:
                shard = await self._set.get(index)
                async for gone in shard.forget_all_stubs(older_than=older_than, at_once=at_once):
                    yield gone
            except InvalidSagaDataError:
                raise
            except SagaStoreError as exc:
                self._set.note(index, exc)
                failed[index] = exc
        if failed:
            raise failed[min(failed)]

    async def _fetch_lag(self, terms: Terms) -> timedelta:
        found, _ = await self._set.ask_all(lambda shard: shard._fetch_lag(terms))
        return max(found.values())

    async def _fetch_archive(self, archive_id: UUID) -> SagaArchive | None:
        found, missing = await self._set.ask_all(lambda shard: shard._fetch_archive(archive_id))
        archive = next((archive for archive in found.values() if archive is not None), None)
        if archive is None and missing:
            raise next(iter(missing.values()))  # it may be there
        return archive

    async def _with_archive(self, error: SagaArchivedError) -> SagaArchivedError:
        return await self._set.on(self._index(error.saga_id), lambda shard: shard._with_archive(error))

    def _archiving(self, by: str) -> AbstractAsyncContextManager[ArchivingTurn]:  # noqa: ARG002 - as in the interface
        _refuse()

    def _snapshot(self) -> AbstractAsyncContextManager[RetentionSnapshot]:
        _refuse()

    async def _add_archive(self, archive_id: UUID, uri: str | None, by: str) -> SagaArchive:  # noqa: ARG002 - likewise
        _refuse()

    async def _change_archive(self, change: Change) -> SagaArchive | None:  # noqa: ARG002 - likewise
        _refuse()

    async def _fetch_archives(
        self,
        states: Sequence[ArchiveState],  # noqa: ARG002 - likewise
        limit: int,  # noqa: ARG002 - likewise
        after: Cursor | None,  # noqa: ARG002 - likewise
    ) -> ArchivePage:
        _refuse()

    async def _make_stubs(
        self,
        archive_id: UUID,  # noqa: ARG002 - likewise
        marks: Sequence[SagaMark],  # noqa: ARG002 - likewise
    ) -> StubsMade | None:
        _refuse()

    def _index(self, saga_id: UUID) -> int:
        return shard_index(saga_id, len(self._set.storages))


def _forgetter(older_than: timedelta, limit: int) -> Callable[[RetentionStorage], Awaitable[int]]:
    return lambda shard: shard.forget_stubs(older_than=older_than, limit=limit)


def _restorer(
    records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
) -> Callable[[RetentionStorage], Awaitable[list[Restored]]]:
    return lambda shard: shard._restore(records, archive_id, keep_for)


def _refuse() -> NoReturn:
    raise InvalidSagaDataError(
        "storage",
        "is made of shards, each with a ledger and archives of its own: archive() and verify() of saga_store.retention "
        "take all of them; do anything else on each of its `shards`",
    )
