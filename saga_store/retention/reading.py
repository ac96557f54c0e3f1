"""Archives at a target: found, read and checked."""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast
from uuid import UUID

from saga_store.interface import IRetentionStorage
from saga_store.retention.errors import ArchiveDamagedError, TargetError
from saga_store.retention.files import LONGEST_LINE, Found, read_object, read_one
from saga_store.retention.manifest import MANIFEST, Manifest, compression_of, decode_manifest, manifest_path
from saga_store.retention.over_shards import each_shard, first_line
from saga_store.retention.target import MARKER, Call, Target
from saga_store.retention_model import ArchiveState, SagaArchive, SagaMark
from saga_store.sharding import ShardedSagaStorage

Place: TypeAlias = str | Target
"""A target, or the URI of one: a folder, or a single archive in it."""

# Of lines that are in memory at once.
_BATCH = 500
_BATCH_BYTES = 4 * 2**20

_LAST_PART = re.compile(r"([^?#]*)/([^/?#]+)((?:[?#].*)?)")


@dataclass(frozen=True, slots=True)
class ArchiveChecked:
    """What was seen of one archive; ``problem`` is None if it is what was written."""

    uri: str
    sagas: int
    entries: int
    bytes: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was seen of archives.

    Attributes:
        archives: Each that was looked at.
        strays: Files that belong to no archive: what an archiver left that was killed, or something foreign.
        unread: Why the ledgers of some shards couldn't be read, so that nobody can tell what they refer to.
    """

    archives: list[ArchiveChecked] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What isn't as it was written, or can't be told, a line each."""
        return [*(archive.problem for archive in self.archives if archive.problem), *self.unread]


async def verify(archive: Place, storage: object = None) -> VerifyReport:
    """Read archives to their end, and compare each line with what was written.

    Needs no database. With one, what its ledger refers to has to be there, and be the same.

    Args:
        archive: A target or its URI, for all archives in it; or the URI of one.
        storage: A storage or an engine, whose ledger is compared, of shards the ledgers of all; None: nothing is.

    Raises:
        TargetError: The target can't be read, or holds no archive.
    """
    found = await find(archive)
    report = VerifyReport(strays=[found.target.uri(path) for path in found.strays])
    ledger: dict[str, SagaArchive] = {}
    if isinstance(storage, ShardedSagaStorage):
        ledgers, failed = await each_shard(storage, lambda shard, _: _ledger(shard, found.target), None)
        ledger = {path: row for each in ledgers for path, row in each.items()}
        report.unread.extend(
            f"the ledger of shard {place} can't be read: {first_line(exc)}" for place, exc in sorted(failed.items())
        )
    elif storage is not None:
        ledger = await _ledger(as_storage(storage), found.target)
    if not found.manifests and not ledger and not report.unread:
        raise TargetError(found.target.name, "holds no archive")
    wanted = ledger if found.is_whole else {path: row for path, row in ledger.items() if path in found.manifests}
    for path in sorted({*found.manifests, *wanted}):
        report.archives.append(await _checked(found.target, path, wanted.get(path)))
    return report


async def find_archived(storage: object, saga_id: UUID, *, archive: Place | None = None) -> Found | None:
    """Return a saga as an archive holds it, and where; None if no archive does.

    Args:
        storage: A storage or an engine, whose ledger says where the saga is.
        saga_id: The saga.
        archive: Where to look instead, or by what credentials: a target, or the URI of a target or an archive. Of
            several records the latest is returned.

    Raises:
        ArchiveDamagedError: The archive isn't what was written.
        TargetError: It can't be read.
    """
    stub = await as_storage(storage).find_stub(saga_id)
    row = stub.archive if stub else None
    if row and row.uri is not None:
        target, path = _located(row.uri, archive)
        if path is not None:
            manifest = await read_manifest(target, manifest_path(path), row)
            return await _pick(target, manifest, saga_id)
    return None if archive is None else await search(archive, saga_id)


async def search(archive: Place, saga_id: UUID) -> Found | None:
    """Look for a saga in all archives of a target; return the latest of its records."""
    found = await find(archive)
    records: list[tuple[SagaMark, Manifest]] = []
    for path in found.manifests:
        manifest = await read_manifest(found.target, path)
        records += [(mark, manifest) for mark in manifest.marks if mark.id == saga_id]
    if not records:
        return None
    _, latest = max(records, key=lambda one: (one[0].version, one[0].entries, one[0].last_entry_id, one[1].written_at))
    return await _pick(found.target, latest, saga_id)


@dataclass(frozen=True, slots=True)
class FoundArchives:
    """The manifests at a place, and files that belong to none; ``is_whole`` unless a single archive was named."""

    target: Target
    manifests: Sequence[str]
    strays: Sequence[str] = ()
    is_whole: bool = False


async def find(archive: Place) -> FoundArchives:
    """Look what is there.

    Raises:
        TargetError: It can't be read.
    """
    if isinstance(archive, str):
        single = _LAST_PART.fullmatch(archive)
        if single and (compression_of(single[2]) or single[2].endswith(MANIFEST)):
            return FoundArchives(Target(single[1] + single[3]), [manifest_path(single[2])])
        archive = Target(archive)
    files = await archive.files()
    manifests = [path for path in files if path.endswith(MANIFEST)]
    stems = {path.removesuffix(MANIFEST) for path in manifests}
    strays = [path for path in files if path != MARKER and path.partition(".")[0] not in stems]
    return FoundArchives(archive, manifests, strays, is_whole=True)


async def read_manifest(target: Target, path: str, row: SagaArchive | None = None) -> Manifest:
    """Read a manifest; with its line in the ledger, that has to know the same object."""
    return manifest_of(await target.read(path), target, path, row)


def manifest_of(content: bytes, target: Target, path: str, row: SagaArchive | None = None) -> Manifest:
    """Return the manifest that stands there; raises as ``read_manifest`` does."""
    uri = target.uri(path)
    manifest = decode_manifest(content, path, uri)
    if row is not None and (row.id, row.sha256) != (manifest.id, manifest.sha256):
        raise ArchiveDamagedError(uri, None, f"isn't what the ledger has: archive {row.id}, SHA-256 {row.sha256}")
    return manifest


async def read_archive(target: Target, manifest: Manifest) -> AsyncIterator[list[Found]]:
    """Yield the sagas of an archive in batches; all of it is right once the iteration has ended.

    A batch is emptied when the next one is asked for.

    Raises:
        ArchiveDamagedError: It isn't what the manifest says.
        TargetError: It can't be read.
    """
    uri = target.uri(manifest.path)
    file = await target.open(manifest.path)
    sagas = read_object(file, manifest, uri)
    try:
        while batch := await target.run(f"reading {manifest.path}", lambda call: _batch(sagas, call.gets_on)):
            yield batch
            batch.clear()  # or its sagas would be kept while the next ones are read
    finally:
        file.close()


async def check_archive(target: Target, manifest: Manifest) -> None:
    """Read an archive to its end; raises as ``read_archive`` does."""
    async for _ in read_archive(target, manifest):
        pass


def as_storage(given: object) -> IRetentionStorage:
    """Return the storage that was given, or one on the engine that was.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(given, IRetentionStorage):
        return given
    from saga_store.sqlalchemy import SqlAlchemySagaStorage  # noqa: PLC0415 - who has another storage may lack it

    return cast("IRetentionStorage", SqlAlchemySagaStorage(cast("Any", given)))  # which checks its bind


def _batch(sagas: Iterator[Found], gets_on: Callable[[], None]) -> list[Found]:
    batch: list[Found] = []
    size = 0
    for found in sagas:
        gets_on()
        batch.append(found)
        size += len(found.record.context) + 200 * len(found.record.entries)
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            break
    return batch


async def _checked(target: Target, path: str, row: SagaArchive | None) -> ArchiveChecked:
    seen = ArchiveChecked(target.uri(path), row.sagas if row else 0, row.entries if row else 0, row.bytes if row else 0)
    try:
        manifest = await read_manifest(target, path, row)
        seen = ArchiveChecked(target.uri(manifest.path), len(manifest.lines), manifest.entries, manifest.bytes)
        await check_archive(target, manifest)
    except ArchiveDamagedError as exc:
        return replace(seen, problem=str(exc))
    return seen


def pick_here(
    target: Target, manifest: Manifest, saga_id: UUID, call: Call, *, most_bytes: int = LONGEST_LINE
) -> Found:
    """Return one saga of an archive, in this thread; raises as ``read_one`` does, and what the file system raises."""
    with target.open_here(manifest.path) as file:
        return read_one(file, manifest, saga_id, target.uri(manifest.path), call.gets_on, most_bytes=most_bytes)


async def _pick(target: Target, manifest: Manifest, saga_id: UUID) -> Found:
    return await target.run(f"reading {manifest.path}", lambda call: pick_here(target, manifest, saga_id, call))


async def ledger_of(storage: IRetentionStorage, *states: ArchiveState) -> list[SagaArchive]:
    """Return all lines of the ledger in these states, the newest first."""
    rows: list[SagaArchive] = []
    after = None
    while True:
        page = await storage.find_archives(states=states, limit=1000, after=after)
        rows += page.archives
        after = page.after
        if after is None:
            return rows


async def _ledger(storage: IRetentionStorage, target: Target) -> dict[str, SagaArchive]:
    """Return what the ledger has of this target, by the paths of manifests."""
    rows: dict[str, SagaArchive] = {}
    for row in await ledger_of(storage, ArchiveState.VERIFIED, ArchiveState.REMOVED):
        path = row.uri and target.path(row.uri)
        if path:
            rows[manifest_path(path)] = row
    return rows


def located(uri: str) -> tuple[Target, str]:
    """Return where the object of this name is, by that name alone."""
    folder, _, name = uri.rpartition("/")
    return Target(folder), name


def _located(uri: str, archive: Place | None) -> tuple[Target, str | None]:
    if archive is None:
        return located(uri)
    target = Target.of(archive)
    return target, target.path(uri)
