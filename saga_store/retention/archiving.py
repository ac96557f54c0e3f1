"""The protocol: read in one snapshot, write, read back, and only then let go.

docs/retention.md has its interleavings, with whatever may happen at each step.
"""

import getpass
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

from saga_store.errors import InvalidSagaDataError, SagaStoreError
from saga_store.interface import IRetentionStorage
from saga_store.retention.errors import ArchiveDamagedError, ArchiveError, ShardsFailedError
from saga_store.retention.files import ArchiveFile, default_compression
from saga_store.retention.filling import Filling
from saga_store.retention.manifest import (
    SUFFIXES,
    Manifest,
    encode_manifest,
    manifest_path,
    object_path,
    parquet_paths,
)
from saga_store.retention.over_shards import each_shard
from saga_store.retention.policy import RetentionPolicy
from saga_store.retention.reading import Place, as_storage, check_archive, ledger_of, read_manifest
from saga_store.retention.removing import end_purges, forget_stubs, make_stubs
from saga_store.retention.target import Target, temporary
from saga_store.retention.threads import in_thread
from saga_store.retention_model import (
    ArchiveState,
    ArchivingTurn,
    ExpiredPage,
    SagaArchive,
)
from saga_store.sharding import ShardedSagaStorage

SAGAS_PER_ARCHIVE = 10_000
_MOST = 2**31
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class ArchiveProgress:
    """How far a run has come."""

    sagas: int
    removed: int
    archives: int
    doing: str

    def __str__(self) -> str:
        return f"{self.doing}: {self.sagas:,} sagas read, {self.removed:,} removed, {self.archives:,} archives done"


@dataclass(slots=True)
class ArchiveReport:
    """What a run did, or would do.

    Attributes:
        is_dry_run: Whether nothing was done.
        sagas: How many were archived and verified, by this run or by one before that didn't come to its end; of a dry
            run, how many would be.
        entries: Of their histories.
        bytes: How big the archives are; of a dry run, how big contexts and details are.
        removed: How many sagas became stubs. The others had changed meanwhile, were held or locked; they go another
            time.
        forgotten: How many stubs were deleted, since the policy forgets them after their time.
        archives: The ledger's lines.
        expired: Of a dry run, how many sagas would go, by name and status.
        unreadable: Sagas that weren't archived, since their rows can't be read.
        left: Archives at other targets that were verified, and whose sagas weren't removed yet.
        is_complete: Whether nothing is left that the policy lets go or forgets; False if the run was stopped or had a
            limit.
        seconds: How long it took.
    """

    is_dry_run: bool = False
    sagas: int = 0
    entries: int = 0
    bytes: int = 0
    removed: int = 0
    forgotten: int = 0
    archives: list[SagaArchive] = field(default_factory=list)
    expired: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreadable: list[UUID] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    is_complete: bool = False
    seconds: float = 0.0

    def add(self, other: "ArchiveReport") -> None:
        """Add what was done on another shard."""
        self.sagas += other.sagas
        self.entries += other.entries
        self.bytes += other.bytes
        self.removed += other.removed
        self.archives += other.archives
        self.expired += other.expired
        self.unreadable += other.unreadable
        self.left += other.left
        self.forgotten += other.forgotten
        self.is_complete = self.is_complete and other.is_complete


async def archive(  # noqa: PLR0913 - what, where to, and when to stop; all with defaults
    storage: object,
    target: Place,
    policy: RetentionPolicy,
    *,
    max_sagas: int | None = None,
    max_seconds: float | None = None,
    dry_run: bool = False,
    by: str | None = None,
    compression: str | None = None,
    parquet: bool = False,
    sagas_per_archive: int = SAGAS_PER_ARCHIVE,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[ArchiveProgress], None] = lambda _: None,
) -> ArchiveReport:
    """Write finished sagas to archives, verify these, and make stubs of the sagas in the database.

    A saga becomes a stub only after its archive was read back and found right, and only if it is what was archived
    still. What a run leaves that is killed, or whose target or database fails, the next one finishes or repeats.

    The shards of a ``ShardedSagaStorage`` are archived one after the other, each with its own turn and ledger, and
    ``max_sagas`` is for each of them. One that fails leaves the others done.

    Args:
        storage: A storage that commits its own calls, or an ``AsyncEngine``.
        target: Where archives go: a URI that fsspec knows, or a ``Target``.
        policy: How long sagas are kept; with ``forget_after``, how long stubs are, too.
        max_sagas: Archive at most this many.
        max_seconds: Begin nothing new after this time.
        dry_run: Only say what would be archived.
        by: Who archives, for the ledger; the user and the machine unless it is said.
        compression: ``zstd`` or ``gzip``; without it zstd if it is installed.
        parquet: Write two Parquet files beside each archive, too, for analysts.
        sagas_per_archive: How many sagas go into one archive.
        should_stop: Asked between steps whether to end.
        report: Told how far the run has come.

    Raises:
        InvalidSagaDataError: The storage joins a transaction; something else is impossible.
        ArchiverBusyError: Another archiver is at work on this database.
        TargetError: The target isn't there, refuses, is full, doesn't answer or holds something else.
        ArchiveDamagedError: What was written isn't what is there; nothing of it was removed.
        ShardsFailedError: Some shards failed in one of these ways, or couldn't be reached; the others are done.
    """
    began = time.monotonic()
    if isinstance(storage, ShardedSagaStorage):

        def one(shard: IRetentionStorage, seconds: float | None) -> Awaitable[ArchiveReport]:
            return archive(
                shard,
                target,
                policy,
                max_sagas=max_sagas,
                max_seconds=seconds,
                dry_run=dry_run,
                by=by,
                compression=compression,
                parquet=parquet,
                sagas_per_archive=sagas_per_archive,
                should_stop=should_stop,
                report=report,
            )

        reports, failed = await each_shard(storage, one, max_seconds)
        done = ArchiveReport(is_dry_run=dry_run, is_complete=not failed)
        for each in reports:
            done.add(each)
        done.seconds = time.monotonic() - began
        if failed:
            raise ShardsFailedError(failed, done)
        return done
    run = _Run(
        as_storage(storage),
        Target.of(target),
        policy,
        _Limits(
            positive("max_sagas", max_sagas),
            positive("sagas_per_archive", sagas_per_archive) or 0,
            None if max_seconds is None else began + (positive("max_seconds", max_seconds) or 0),
            should_stop,
        ),
        by or default_by(),
        _known(compression),
        parquet=parquet,
        report=report,
    )
    await (run.look() if dry_run else run.archive())
    run.done.unreadable = list(dict.fromkeys(run.done.unreadable))  # a run may come by twice
    run.done.seconds = time.monotonic() - began
    return run.done


def default_by() -> str:
    """Return who archives: the user, the machine and the process."""
    user = os.environ.get("USER") or ""
    with suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    return f"{user or '?'}@{socket.gethostname()}:{os.getpid()}"[:255]


@dataclass(frozen=True, slots=True)
class _Limits:
    sagas: int | None
    per_archive: int
    deadline: float | None
    should_stop: Callable[[], bool]

    def are_reached(self) -> bool:
        return self.should_stop() or (self.deadline is not None and time.monotonic() >= self.deadline)


class _Run:
    def __init__(  # noqa: PLR0913, PLR0917 - all of a run
        self,
        storage: IRetentionStorage,
        target: Target,
        policy: RetentionPolicy,
        limits: _Limits,
        by: str,
        compression: str,
        *,
        parquet: bool,
        report: Callable[[ArchiveProgress], None],
    ) -> None:
        self._storage = storage
        self._target = target
        self._policy = policy
        self._limits = limits
        self._by = by
        self._compression = compression
        self._parquet = parquet
        self._report = report
        self.done = ArchiveReport()

    async def look(self) -> None:
        """Count what would be archived."""
        self.done.is_dry_run = True
        await self._target.prepare(writes=False)
        after = None
        async with self._storage.snapshot() as snapshot:
            while not self._limits.are_reached():
                page = await snapshot.find_expired(self._policy, after=after, limit=self._room(_PAGE))
                self._count(page)
                after = page.after
                if after is None or not self._room(1):
                    break
        self.done.is_complete = after is None

    async def archive(self) -> None:
        """Finish what earlier runs left, then archive until the walk is at its end."""
        await self._target.prepare()
        async with self._storage.archiving(by=self._by) as turn:
            await self._clear_away()
            await self._resume()
            # A run that was cut short left its walk somewhere. What came before has had time to expire meanwhile.
            last = await self._storage.find_archives(states=[ArchiveState.VERIFIED, ArchiveState.REMOVED], limit=1)
            begins = next((row.watermark for row in last.archives), None)
            for start in [begins, None] if begins else [None]:
                if not await self._walk(start, turn):
                    return
            self.done.is_complete = await self._forget()

    async def _walk(self, after: str | None, turn: ArchivingTurn) -> bool:
        """Archive from there to the end; False if there is no time, or no room, for the rest."""
        while self._room(1) and not self._limits.are_reached():
            await turn.check()
            after = await self._archive_some(after)
            if after is None:
                return True
        return False

    async def _archive_some(self, after: str | None) -> str | None:
        """Write one archive, and let its sagas go; return where the next one begins, None at the end."""
        archive_id = uuid4()
        path = object_path(archive_id, datetime.now(UTC), self._compression)
        file = ArchiveFile(self._compression)
        try:
            async with self._storage.snapshot() as snapshot:
                most = self._room(self._limits.per_archive)
                filling = Filling(snapshot, self._policy, file, most, self._is_interrupted, self.done.unreadable)
                after = await filling.fill(after)
            if not file.lines:
                return after
            self._tell("writing")
            await self._storage.begin_archive(archive_id, uri=self._target.uri(path), by=self._by)
            try:
                sha256, size = await in_thread("archive", file.finish)
                manifest = Manifest(archive_id, path, sha256, size, file.lines)
                await self._write(manifest, file)
                row = await self._storage.verify_archive(
                    archive_id,
                    sha256=sha256,
                    sagas=len(manifest.lines),
                    entries=manifest.entries,
                    bytes=size,
                    watermark=after,
                )
            except (SagaStoreError, OSError) as exc:
                with suppress(SagaStoreError):
                    await self._give_up(archive_id, path, exc)
                raise
        finally:
            file.close()
        await self._let_go(row, manifest)
        return after

    async def _write(self, manifest: Manifest, file: ArchiveFile) -> None:
        """Write it all, and see that it is there."""
        await self._target.write_pieces(manifest.path, file.pieces())
        content = encode_manifest(manifest)
        await self._target.write(manifest.own_path, content)
        self._tell("verifying")
        if await self._target.read(manifest.own_path) != content:
            raise ArchiveDamagedError(
                self._target.uri(manifest.own_path), None, "isn't what was just written: the target can't be trusted"
            )
        await check_archive(self._target, manifest)
        if self._parquet:
            from saga_store.retention.parquet import write_parquet  # noqa: PLC0415 - of an extra

            await write_parquet(self._target, manifest)

    async def _let_go(self, row: SagaArchive, manifest: Manifest) -> None:
        """Make stubs of what hasn't changed, a few at a time, so that no writer waits long."""
        removed = self.done.removed

        def told(made: int) -> None:
            self.done.removed = removed + made
            self._tell("removing")

        if await make_stubs(self._storage, row.id, manifest.marks, self._limits.are_reached, told):
            row = await self._storage.finish_archive(row.id)
        self.done.sagas += row.sagas
        self.done.entries += row.entries
        self.done.bytes += row.bytes
        self.done.archives.append(row)

    async def _forget(self) -> bool:
        """Delete the stubs whose time is over; False if there was no time for all."""
        if self._policy.forget_after is None:
            return True

        def told(forgotten: int) -> None:
            self.done.forgotten = forgotten
            self._tell("forgetting")

        return await forget_stubs(self._storage, self._policy.forget_after, self._limits.are_reached, told)

    async def _clear_away(self) -> None:
        """Give up what was being written when its archiver died, and remove what is there of it.

        A whole archive stays: this database may be a copy of the one that has verified it since, and let its sagas go.
        """
        await end_purges(self._storage)
        for row in await self._rows(ArchiveState.WRITING):
            path = self._target.path(row.uri or "")
            why = "its archiver ended before it was verified"
            if path is not None and await self._may_be_whole(path):
                path, why = None, f"{why}; what it wrote is whole, and stays"
            await self._give_up(row.id, path, ArchiveError(why))

    async def _may_be_whole(self, path: str) -> bool:
        try:
            return await self._target.has(manifest_path(path))
        except ArchiveError:
            return True

    async def _give_up(self, archive_id: UUID, path: str | None, why: Exception) -> None:
        given_up = await self._storage.fail_archive(archive_id, error=str(why)[:1000])
        # If it had been verified after all, by one that is alive, sagas may be nowhere else.
        if path is not None and given_up.archived_at is None:
            # The next run doesn't try again: what is left belongs to no archive, and verify lists it.
            with suppress(ArchiveError):
                for name in (path, manifest_path(path), *parquet_paths(path)):
                    for left in (name, temporary(name)):
                        await self._target.remove(left)

    async def _resume(self) -> None:
        """Let go what an archiver had verified before it ended."""
        for row in await self._rows(ArchiveState.VERIFIED):
            path = row.uri and self._target.path(row.uri)
            if not path:
                self.done.left.append(row.uri or str(row.id))
                continue
            if self._limits.are_reached():
                return
            try:
                manifest = await read_manifest(self._target, manifest_path(path), row)
                await check_archive(self._target, manifest)
            except ArchiveDamagedError as exc:
                await self._storage.fail_archive(row.id, error=str(exc)[:1000])
                raise
            await self._let_go(row, manifest)

    async def _rows(self, state: ArchiveState) -> list[SagaArchive]:
        return (await ledger_of(self._storage, state))[::-1]

    def _is_interrupted(self, read: int) -> bool:
        self._tell("reading", read)
        return self._limits.are_reached()

    def _room(self, most: int) -> int:
        return most if self._limits.sagas is None else max(0, min(most, self._limits.sagas - self.done.sagas))

    def _count(self, page: ExpiredPage) -> None:
        for saga in page.sagas:
            self.done.sagas += 1
            self.done.entries += saga.mark.entries
            self.done.bytes += saga.bytes
            self.done.expired[saga.name, saga.status.value] += 1
        self.done.unreadable += page.unreadable
        self._tell("looking")

    def _tell(self, doing: str, more: int = 0) -> None:
        self._report(ArchiveProgress(self.done.sagas + more, self.done.removed, len(self.done.archives), doing))


def positive(field: str, value: float | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not 0 < value < _MOST:
        raise InvalidSagaDataError(field, f"must be a number greater than zero, not {value!r:.40}")
    return value  # type: ignore[return-value] # of seconds there may be fractions


def _known(compression: str | None) -> str:
    if compression is not None and compression not in SUFFIXES:
        raise InvalidSagaDataError("compression", f"must be one of {', '.join(SUFFIXES)}, not {compression!r:.40}")
    return compression or default_compression()
