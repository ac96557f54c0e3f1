"""Sagas put back from archives, into the database that they came from or another."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.interface import IRetentionStorage
from saga_store.retention.errors import ArchiveDamagedError, ArchiveError, TargetError
from saga_store.retention.files import Found
from saga_store.retention.reading import (
    Place,
    as_storage,
    check_archive,
    find,
    find_archived,
    read_archive,
    read_manifest,
)
from saga_store.retention_model import KEPT_AFTER_RESTORE, Restored


@dataclass(slots=True)
class RestoreReport:
    """What came of sagas that were to be restored.

    Attributes:
        restored: How many are there now, and weren't.
        same: How many were there already, with the same content.
        other: Those that are there with other content, and were left as they are: the saga, the file and the line.
    """

    restored: int = 0
    same: int = 0
    other: list[tuple[UUID, str, int]] = field(default_factory=list)

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
    """
    into = as_storage(storage)
    done = RestoreReport()
    if saga_id is not None:
        found = await find_archived(into, saga_id, archive=archive)
        if found is None:
            raise await _not_found(into, saga_id, archive)
        await _put_back(into, [found], keep_for, done)
        report(done)
        return done
    if archive is None:
        raise InvalidSagaDataError("saga_id", "must be given, or else an archive")
    place = await find(archive)
    if not place.manifests:
        raise TargetError(place.target.name, "holds no archive")
    hashes = {}
    for path in place.manifests:
        manifest = await read_manifest(place.target, path)
        await check_archive(place.target, manifest)
        hashes[path] = manifest.sha256
    for path, sha256 in hashes.items():
        manifest = await read_manifest(place.target, path)
        if manifest.sha256 != sha256:
            raise ArchiveDamagedError(place.target.uri(path), None, "was changed just now")
        async for batch in read_archive(place.target, manifest):
            await _put_back(into, batch, keep_for, done)
            report(done)
    return done


async def _put_back(storage: IRetentionStorage, batch: list[Found], keep_for: timedelta, done: RestoreReport) -> None:
    try:
        outcomes = await storage.restore_sagas([found.record for found in batch], keep_for=keep_for)
    except InvalidSagaDataError as exc:
        where = f"{batch[0].file}, line {batch[0].line}" + (f" to {batch[-1].line}" if len(batch) > 1 else "")
        raise InvalidSagaDataError(f"{where}: {exc.field}", exc.reason) from exc
    for found, outcome in zip(batch, outcomes, strict=True):
        match outcome:
            case Restored.RESTORED:
                done.restored += 1
            case Restored.SAME:
                done.same += 1
            case Restored.OTHER:
                done.other.append((found.record.id, found.file, found.line))


async def _not_found(storage: IRetentionStorage, saga_id: UUID, archive: Place | None) -> ArchiveError:
    if archive is not None:
        return ArchiveError(f"no archive there has saga {saga_id}; look at another target")
    stub = await storage.find_stub(saga_id)
    if stub is None:
        return ArchiveError(f"saga {saga_id} wasn't archived from this database: give the archive that has it")
    if stub.archive is None:
        return ArchiveError(f"the ledger doesn't say where saga {saga_id} was archived: give the archive that has it")
    return ArchiveError(f"saga {saga_id} was removed without an archive, by {stub.archive.by}: nothing has it any more")
