"""Sagas put back from archives, into the database that they came from or another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaNotFoundError, SagaStoreError, ShardingError
from saga_store.interface import IRetentionStorage
from saga_store.retention.errors import ArchiveDamagedError, ArchiveError, ShardsFailedError, TargetError
from saga_store.retention.files import Found
from saga_store.retention.latest import Latest
from saga_store.retention.reading import (
    FoundArchives,
    Place,
    as_storage,
    check_archive,
    find,
    find_archived,
    read_archive,
    read_manifest,
)
from saga_store.retention.target import Target
from saga_store.retention.threads import in_thread
from saga_store.retention_model import KEPT_AFTER_RESTORE, Restored
from saga_store.sharding import ShardedSagaStorage


@dataclass(slots=True)
class RestoreReport:
    """What came of sagas that were to be restored.

    Attributes:
        restored: How many are there now, and weren't.
        same: How many were there already, with the same content; a saga that was asked for without an archive, and is
            no stub, counts here, too.
        other: Those that are there with other content, or whose stub is of another archive, and were left as they
            are: the saga, the file and the line.
        superseded: Records that weren't looked at, for a later one of the same saga is in another archive there.
    """

    restored: int = 0
    same: int = 0
    other: list[tuple[UUID, str, int]] = field(default_factory=list)
    superseded: int = 0

    @property
    def sagas(self) -> int:
        """How many were looked at."""
        return self.restored + self.same + len(self.other)


async def restore(
    storage: object,
    saga_id: UUID | None = None,
    *,
    archive: Place | None = None,
    keep_for: timedelta = KEPT_AFTER_RESTORE,
    report: Callable[[RestoreReport], None] = lambda _: None,
) -> RestoreReport:
    """Put one saga back, or all of an archive, or of all archives of a target.

    All archives are read to their end and found right before anything is written. Then each saga comes back whole
    or not at all, as it was: its context to the letter, its version, its times, its history. One that is there
    already is left as it is, so that a restore may be repeated.

    Args:
        storage: A storage or an engine: of the database that the sagas came from, or of another.
        saga_id: The saga; None: all of the archive.
        archive: A target, or the URI of a target or an archive. Needn't be said for a saga whose stub is there: the
            ledger says where its archive is.
        keep_for: For how long restored sagas are held, so that the next archiver leaves them; zero: not at all.
        report: Told how far it has come.

    Raises:
        InvalidSagaDataError: Neither a saga nor an archive is given; a saga can't be stored.
        ArchiveDamagedError: An archive isn't what was written; nothing was restored.
        ArchiveError: No archive has the saga.
        TargetError: The target can't be read, or holds no archive.
        ShardsFailedError: Shards of the storage can't be written to; the sagas of the others are back.
    """
    run = _Run(as_storage(storage), keep_for, report)
    if saga_id is not None:
        await run.restore_one(saga_id, archive)
    elif archive is None:
        raise InvalidSagaDataError("saga_id", "must be given, or else an archive")
    else:
        await run.restore_all(await find(archive))
    if run.failed:
        raise ShardsFailedError(run.failed, run.done)
    return run.done


class _Run:
    def __init__(
        self, storage: IRetentionStorage, keep_for: timedelta, report: Callable[[RestoreReport], None]
    ) -> None:
        self._storage = storage
        self._keep_for = keep_for
        self._report = report
        self.done = RestoreReport()
        self.failed: dict[int, SagaStoreError] = {}

    async def restore_one(self, saga_id: UUID, archive: Place | None) -> None:
        found = await find_archived(self._storage, saga_id, archive=archive)
        if found is not None:
            await self._put_back([found])
        elif archive is None and await _is_here(self._storage, saga_id):
            self.done.same += 1
        else:
            raise await _not_found(self._storage, saga_id, archive)

    async def restore_all(self, place: FoundArchives) -> None:
        """Read all to its end, then restore the latest record of each saga."""
        if not place.manifests:
            raise TargetError(place.target.name, "holds no archive")
        hashes = []
        with Latest() as latest:
            for number, path in enumerate(place.manifests):
                manifest = await read_manifest(place.target, path)
                await check_archive(place.target, manifest)
                await in_thread("restore", partial(latest.add, number, manifest.written_at, manifest.marks))
                hashes.append(manifest.sha256)
            for number, path in enumerate(place.manifests):
                manifest = await read_manifest(place.target, path)
                if manifest.sha256 != hashes[number]:
                    raise ArchiveDamagedError(place.target.uri(path), None, "was changed just now")
                async for batch in read_archive(place.target, manifest):
                    ids = [found.record.id for found in batch]
                    wanted = await in_thread("restore", partial(latest.has_latest, number, ids))
                    self.done.superseded += len(batch) - len(wanted)
                    for part in self._parts([found for found in batch if found.record.id in wanted]):
                        await self._put_back(part, target=place.target if place.is_whole else None)

    def _parts(self, batch: list[Found]) -> Iterator[list[Found]]:
        """Yield what goes to one shard, of those that haven't failed; without shards it is all."""
        if not isinstance(self._storage, ShardedSagaStorage):
            yield batch
            return
        parts: dict[int, list[Found]] = {}
        for found in batch:
            parts.setdefault(self._storage.shard_of(found.record.id), []).append(found)
        for place in sorted(parts.keys() - self.failed.keys()):
            yield parts[place]

    async def _put_back(self, batch: list[Found], target: Target | None = None) -> None:
        if not batch:
            return
        records = [found.record for found in batch]
        try:
            outcomes = await self._storage.restore_sagas(
                records, archive_id=batch[0].archive_id, keep_for=self._keep_for
            )
        except InvalidSagaDataError as exc:
            where = f"{batch[0].file}, line {batch[0].line}" + (f" to {batch[-1].line}" if len(batch) > 1 else "")
            raise InvalidSagaDataError(f"{where}: {exc.field}", exc.reason) from exc
        except SagaStoreError as exc:
            if not isinstance(self._storage, ShardedSagaStorage) or isinstance(exc, ShardingError):
                raise
            self.failed[self._storage.shard_of(records[0].id)] = exc
            return
        for found, outcome in zip(batch, outcomes, strict=True):
            await self._count(found, outcome, target)
        self._report(self.done)

    async def _count(self, found: Found, outcome: Restored, target: Target | None) -> None:
        if outcome is Restored.OTHER and target is not None:
            # Archivers' clocks may disagree about which of two equal records was written last; the ledger doesn't.
            stub = await self._storage.find_stub(found.record.id)
            row = stub.archive if stub else None
            if row and row.id != found.archive_id and row.uri and target.path(row.uri):
                own = await find_archived(self._storage, found.record.id, archive=target)
                if own is not None and own.record.mark == found.record.mark:
                    outcome = await self._storage.restore_saga(
                        own.record, archive_id=own.archive_id, keep_for=self._keep_for
                    )
        match outcome:
            case Restored.RESTORED:
                self.done.restored += 1
            case Restored.SAME:
                self.done.same += 1
            case Restored.OTHER:
                self.done.other.append((found.record.id, found.file, found.line))


async def _is_here(storage: IRetentionStorage, saga_id: UUID) -> bool:
    try:
        await storage.load_saga_state(saga_id)
    except SagaNotFoundError:
        return False
    return True


async def _not_found(storage: IRetentionStorage, saga_id: UUID, archive: Place | None) -> ArchiveError:
    if archive is not None:
        return ArchiveError(f"no archive there has saga {saga_id}; look at another target")
    stub = await storage.find_stub(saga_id)
    if stub is None:
        return ArchiveError(f"saga {saga_id} wasn't archived from this database: give the archive that has it")
    if stub.archive is None:
        return ArchiveError(f"the ledger doesn't say where saga {saga_id} was archived: give the archive that has it")
    return ArchiveError(f"saga {saga_id} was removed without an archive, by {stub.archive.by}: nothing has it any more")
