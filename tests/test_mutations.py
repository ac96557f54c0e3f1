"""The memory storage, broken in many ways: the kit notices each, by the test whose sentence it breaks.

The subjects run in one pytest of their own, which collects the classes ``Sound...`` and ``Broken...`` of this
module; here its report is read.
"""
# ruff: noqa: SLF001 - mutants break the twin from inside
# ruff: noqa: ANN401 - what isn't checked may be anything

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest

from saga_store import (
    Checkpoint,
    Context,
    ICheckpointStorage,
    InvalidSagaDataError,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaConcurrencyError,
    SagaExecution,
    SagaLogEntry,
    SagaNotFoundError,
    SagaStart,
    SagaStatus,
    SagaStoreError,
    SagaTimeoutError,
)
from saga_store.inspection import (
    ContextPeek,
    Cursor,
    InterventionPage,
    RecentHistory,
    SagaCondition,
    SagaCount,
    SagaPage,
    SagaQuery,
    SagaSummary,
    in_doubt,
)
from saga_store.joining import Fate, Part
from saga_store.memory_database import Row
from saga_store.retention_model import (
    ArchiveState,
    ArchivingTurn,
    Restored,
    RetentionSnapshot,
    SagaArchive,
    SagaMark,
    SagaRecord,
    StubsMade,
)
from saga_store.retention_storage import Change, Hold
from saga_store.run import SagaRun
from saga_store.storage import SagaState
from saga_store.testing import (
    AbsenceContract,
    Age,
    CheckpointContract,
    CheckpointIsolationContract,
    CheckpointRefusalContract,
    CheckpointStorageContract,
    CheckpointUnit,
    ClaimContract,
    CommitIntoContract,
    ConcurrencyContract,
    Contract,
    CopyContract,
    CreationContract,
    FidelityContract,
    HistoryContract,
    HistoryStreamContract,
    HoldContract,
    InDoubtContract,
    InspectionContract,
    InterventionContract,
    IsolationContract,
    Joinable,
    JoinedWaitContract,
    LeaseContract,
    LockContract,
    RecoveryStorageContract,
    RefusalContract,
    RetentionContract,
    RetentionRaceContract,
    RunRaceContract,
    StalenessContract,
    StartContract,
    StateContract,
    StubContract,
    TransactionalContract,
    TransactionContract,
    Transactions,
    VersionContract,
    VersionRaceContract,
    WaitContract,
)
from saga_store.validation import valid_version
from saga_store.write import Claim, Lease, Outcome, Settlement, Write
from saga_store.write_ids import new_write_id

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)


class Twin(TransactionalContract):
    """Runs a subject on the twin; a mutant takes the place of one of its classes."""

    patience = timedelta(seconds=10)
    session_class: ClassVar[type[MemorySession]] = MemorySession
    storage_class: ClassVar[type[MemorySagaStorage]] = MemorySagaStorage
    stopped_clock: ClassVar[bool] = False

    @pytest.fixture
    def database(self) -> MemoryDatabase:
        return MemoryDatabase(clock=lambda: NOON) if self.stopped_clock else MemoryDatabase()

    @pytest.fixture
    def transaction(self, database: MemoryDatabase) -> Transactions[ICheckpointStorage]:
        @asynccontextmanager
        async def transaction() -> AsyncIterator[tuple[ICheckpointStorage, MemorySession]]:
            async with self.session_class(database) as session:
                yield self.storage_class(session), session

        return transaction

    @pytest.fixture
    def unit(self, database: MemoryDatabase) -> CheckpointUnit:
        @asynccontextmanager
        async def unit() -> AsyncIterator[ICheckpointStorage]:
            async with self.session_class(database) as session:
                try:
                    yield self.storage_class(session)
                finally:
                    # Also after a refusal, as if each call committed itself: what it left behind shows.
                    await session.commit()

        return unit


class AgingTwin(Twin):
    """A twin in which time passes, for the subjects of recovery."""

    @pytest.fixture
    def age(self, database: MemoryDatabase) -> Age:
        async def age(saga_id: UUID, by: timedelta) -> None:
            database.age(saga_id, by)

        return age


class CommittingTwin(AgingTwin):
    """A twin of which each call commits itself, for the subjects of runs."""

    @pytest.fixture
    def unit(self, database: MemoryDatabase) -> CheckpointUnit:
        storage = self.storage_class(database)
        return lambda: nullcontext(storage)

    @pytest.fixture
    def joinable(self, database: MemoryDatabase) -> Joinable:
        return lambda: MemorySession(database)


class SoundCommittingTwin(
    CommittingTwin,
    RunRaceContract,
    CommitIntoContract,
    WaitContract,
    StubContract,
    RetentionContract,
    RetentionRaceContract,
):
    """The control of these."""


class SoundTwin(
    AgingTwin,
    TransactionContract,
    CheckpointStorageContract,
    RecoveryStorageContract,
    HistoryStreamContract,
    InspectionContract,
    LeaseContract,
    StartContract,
    JoinedWaitContract,
    HoldContract,
):
    """The control: the whole kit on the twin as it is."""


# Versions


class ForgetsVersions(MemorySession):
    """Checks no version."""

    async def _apply(self, write: Write) -> Outcome:
        return await super()._apply(write._replace(expected_version=None))


class CountsEntries(MemorySession):
    """Raises the version for entries alone."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._row(write.saga_id)
        if row and not write.creates and not write.changes_row:
            write = write._replace(status=row.status)
        return await super()._apply(write)


class CountsDifferences(MemorySession):
    """Leaves the version if the new values are the old ones."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._row(write.saga_id)
        if row and (write.status, write.context) in ((row.status, None), (None, row.context)):
            write = write._replace(status=None, context=None)
        return await super()._apply(write)


class ChecksBeforeWaiting(MemorySession):
    """Compares the version with the one before the wait for the row's lock."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._row(write.saga_id)
        if row and row.version == write.expected_version:
            write = write._replace(expected_version=None)
        return await super()._apply(write)


class KeepsStepsOfRefused(MemorySession):
    """Writes half a refused checkpoint: its steps."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        if isinstance(outcome, SagaConcurrencyError) and write.steps:
            await super()._apply(Write(write.saga_id, steps=write.steps))
        return outcome


# Sagas that are there, or aren't


class IgnoresMissing(MemorySagaStorage):
    """Does nothing about a missing saga."""

    async def _write(self, write: Write) -> int:
        try:
            return await super()._write(write)
        except SagaNotFoundError:
            return 0


class ReadsEmptyHistory(MemorySagaStorage):
    """Reads the history of a missing saga as empty."""

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        try:
            return await super()._fetch_history(saga_id)
        except SagaNotFoundError:
            return []


class CreatesWhatIsMissing(MemorySession):
    """Makes the saga that an update doesn't find."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        if isinstance(outcome, SagaNotFoundError):
            await super()._apply(write._replace(name="unknown", expected_version=None))
        return outcome


class CreatesOver(MemorySession):
    """Creates over a saga that is there."""

    async def _apply(self, write: Write) -> Outcome:
        if write.creates:
            self._rows.pop(write.saga_id, None)
            self._database._rows.pop(write.saga_id, None)
        return await super()._apply(write)


class ReportsTakenIdLate(MemorySession):
    """Refuses a taken id, but has changed the saga by then."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        if write.creates and isinstance(outcome, SagaStoreError):
            await super()._apply(write._replace(name=None))
        return outcome


# Histories


class OrdersByTime(MemorySagaStorage):
    """Orders the history by a time that ties, and so as it likes."""

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        entries = await super()._fetch_history(saga_id)
        entries.reverse()
        return sorted(entries, key=lambda entry: entry.created_at)


class LosesEmptyDetails(MemorySession):
    """Makes None of empty details."""

    async def _apply(self, write: Write) -> Outcome:
        steps = tuple(replace(step, details=step.details or None) for step in write.steps)
        return await super()._apply(write._replace(steps=steps))


class ForgetsTimeZones(MemorySagaStorage):
    """Returns naive times."""

    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        entries = await super()._fetch_history(saga_id)
        return [replace(entry, created_at=entry.created_at.replace(tzinfo=None)) for entry in entries]


class ReversesSteps(MemorySession):
    """Writes the steps of a checkpoint in the wrong order."""

    async def _apply(self, write: Write) -> Outcome:
        return await super()._apply(write._replace(steps=write.steps[::-1]))


# Contexts


class AliasesIn(MemorySagaStorage):
    """Keeps the caller's own dict."""

    live: ClassVar[dict[UUID, Context]] = {}

    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        await super().create_saga(saga_id, name, context)
        self.live[saga_id] = context

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        saga = await super()._fetch_saga(saga_id)
        return replace(saga, context=self.live.get(saga_id, saga.context))


class AliasesOut(MemorySagaStorage):
    """Hands out the dict that it keeps."""

    live: ClassVar[dict[tuple[UUID, int], Context]] = {}

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        saga = await super()._fetch_saga(saga_id)
        return replace(saga, context=self.live.setdefault((saga_id, saga.version), saga.context))


class Rewrites(MemorySagaStorage):
    """Base of those that return another context than was stored."""

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        saga = await super()._fetch_saga(saga_id)
        return replace(saga, context=self.rewrite(json.dumps(saga.context)))

    def rewrite(self, text: str) -> Context:
        raise NotImplementedError


class MakesIntsOfFloats(Rewrites):
    """Makes ints of floats without a fraction, as JSONB does."""

    def rewrite(self, text: str) -> Context:
        def number(digits: str) -> float:
            return int(float(digits)) if float(digits).is_integer() else float(digits)

        context: Context = json.loads(text, parse_float=number)
        return context


class ForgetsSigns(Rewrites):
    """Makes 0.0 of -0.0."""

    def rewrite(self, text: str) -> Context:
        context: Context = json.loads(text, parse_float=lambda digits: float(digits) + 0.0)
        return context


class SortsKeys(Rewrites):
    """Sorts keys."""

    def rewrite(self, text: str) -> Context:
        context: Context = json.loads(json.dumps(json.loads(text), sort_keys=True))
        return context


class DropsNul(Rewrites):
    """Drops NUL out of texts."""

    def rewrite(self, text: str) -> Context:
        context: Context = json.loads(text.replace("\\u0000", ""))
        return context


class ReplacesSurrogates(Rewrites):
    """Writes a question mark for what UTF-8 can't hold."""

    def rewrite(self, text: str) -> Context:
        raw = json.dumps(json.loads(text), ensure_ascii=False)
        context: Context = json.loads(raw.encode("utf-8", "replace"))
        return context


class MergesContexts(MemorySagaStorage):
    """Updates the old context with the new one."""

    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        merged = (await self.get_saga(saga_id)).context | context
        await super().update_context(saga_id, merged, expected_version=expected_version)


# Bad input


class AcceptsTuples(MemorySagaStorage):
    """Makes lists of tuples."""

    async def update_context(self, saga_id: UUID, context: Any, *, expected_version: int | None = None) -> None:
        if isinstance(context, dict):
            context = {key: list(value) if isinstance(value, tuple) else value for key, value in context.items()}
        await super().update_context(saga_id, context, expected_version=expected_version)


class AcceptsNaN(MemorySagaStorage):
    """Makes None of infinities and NaN on the first level."""

    async def create_saga(self, saga_id: UUID, name: str, context: Any) -> None:
        if isinstance(context, dict) and context.get("price") == float("inf"):
            context = {"price": None}
        await super().create_saga(saga_id, name, context)


class AcceptsIntKeys(MemorySagaStorage):
    """Makes text of keys, as json.dumps does."""

    async def save(self, checkpoint: Any) -> int:
        if isinstance(checkpoint, Checkpoint) and isinstance(checkpoint.context, dict):
            context: dict[Any, Any] = checkpoint.context
            context = {str(key) if type(key) is int else key: value for key, value in context.items()}
            checkpoint = replace(checkpoint, context=context)
        return await super().save(checkpoint)


class AcceptsTextIds(MemorySagaStorage):
    """Takes the text of an id for the id."""

    async def get_step_history(self, saga_id: Any) -> list[SagaLogEntry]:
        return await super().get_step_history(UUID(saga_id) if isinstance(saga_id, str) else saga_id)


class AcceptsAnyStatus(MemorySagaStorage):
    """Writes whatever is said to be a status."""

    async def update_status(self, saga_id: UUID, status: Any, *, expected_version: int | None = None) -> None:
        await self._write(Write(saga_id, status=status, expected_version=expected_version))


class CutsNames(MemorySagaStorage):
    """Cuts names that are too long."""

    async def create_saga(self, saga_id: UUID, name: Any, context: Context) -> None:
        await super().create_saga(saga_id, name[:255] if isinstance(name, str) else name, context)


class LooksBeforeChecking(MemorySagaStorage):
    """Looks whether the saga is there before it checks the input."""

    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        await self.get_saga(saga_id)
        await super().update_context(saga_id, context, expected_version=expected_version)


class RaisesValueErrors(MemorySagaStorage):
    """Refuses bad input with another error."""

    async def load_saga_state(self, saga_id: UUID) -> tuple[SagaStatus, Context]:
        try:
            return await super().load_saga_state(saga_id)
        except InvalidSagaDataError as exc:
            raise ValueError(exc) from exc


class WritesStepsOneByOne(MemorySagaStorage):
    """Writes a checkpoint step by step, until a bad one comes."""

    async def save(self, checkpoint: Checkpoint) -> int:
        for step in checkpoint.steps:
            await super().save(Checkpoint(checkpoint.saga_id, steps=[step]))
        return await super().save(replace(checkpoint, steps=()))


# Many callers


class ReadsThenWrites(MemorySession):
    """Writes back the row that it read, however long ago."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._row(write.saga_id)
        await asyncio.sleep(0)
        if row is None or not write.changes_row:
            return await super()._apply(write)
        write = write._replace(status=write.status or row.status, context=write.context or row.context)
        outcome = await super()._apply(write)
        self._rows[row.id] = replace(self._rows[row.id], version=row.version + 1)
        return outcome


class LooksThenCreates(MemorySession):
    """Looks whether the id is free, and believes it ever after."""

    async def _apply(self, write: Write) -> Outcome:
        if write.creates and self._row(write.saga_id) is None:
            await asyncio.sleep(0)
            self._database._rows.pop(write.saga_id, None)
        return await super()._apply(write)


class LosesEntries(MemorySession):
    """Writes back the history that it read, with its own entries."""

    async def _lock(self, saga_id: UUID) -> None:
        """Take no lock."""

    async def commit(self) -> None:
        histories = {saga_id: self._history(saga_id) for saga_id in self._logs}
        await asyncio.sleep(0)
        await super().commit()
        self._database._logs.update(histories)


class TakesNoLocks(MemorySession):
    """Waits for nobody."""

    async def _lock(self, saga_id: UUID) -> None:
        """Take no lock."""


class FailsTogether(MemorySession):
    """Refuses a write because another one, of another saga, is refused meanwhile."""

    refused: ClassVar[list[SagaStoreError]] = []

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        if isinstance(outcome, SagaStoreError):
            self.refused.append(outcome)
        await asyncio.sleep(0)
        return self.refused.pop() if self.refused else outcome


# Transactions


class KeepsWhatIsRolledBack(MemorySession):
    """Keeps rows on rollback."""

    async def rollback(self) -> None:
        self._database._rows.update(self._rows)
        await super().rollback()


class KeepsEntriesRolledBack(MemorySession):
    """Keeps entries on rollback."""

    async def rollback(self) -> None:
        for saga_id in self._rows:
            self._database._logs[saga_id] = self._history(saga_id)
        await super().rollback()

    async def commit(self) -> None:
        self._database._rows.update(self._rows)
        await self.rollback()


class ShowsUncommitted(MemorySession):
    """Shows rows to others before the commit."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        self._database._rows.update(self._rows)
        return outcome


class AbortsOnRefusal(MemorySession):
    """Drops the transaction's work when a write is refused, as a failed statement would."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        if isinstance(outcome, SagaStoreError):
            await self.rollback()
        return outcome


# Stale sagas


class ListsFinished(MemorySagaStorage):
    """Lists finished sagas too."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        stale = await super()._fetch_stale(stale_after, limit, name, max_attempts)
        rows = (row for row in self._view()._database._rows.values() if row.name == name)
        return stale + [row.as_execution() for row in rows if row.status is SagaStatus.FAILED]


class IgnoresAge(MemorySagaStorage):
    """Lists fresh sagas too."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        return await super()._fetch_stale(stale_after * 0, limit, name, max_attempts)


class IgnoresLimit(MemorySagaStorage):
    """Lists all there are."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        return await super()._fetch_stale(stale_after, limit + 1000, name, max_attempts)


class IgnoresName(MemorySagaStorage):
    """Lists sagas of other names."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        return await super()._fetch_stale(stale_after, limit, name and None, max_attempts)


class IgnoresAttempts(MemorySagaStorage):
    """Lists exhausted sagas too."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        return await super()._fetch_stale(stale_after, limit, name, max_attempts + 1000)


class ListsLatestFirst(MemorySagaStorage):
    """Lists sagas in the opposite order."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        return (await super()._fetch_stale(stale_after, limit, name, max_attempts))[::-1]


class ListsByAgeOnly(MemorySagaStorage):
    """Lets a saga that fails again and again come first."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        stale = await super()._fetch_stale(stale_after, limit, name, max_attempts)
        return sorted(stale, key=lambda saga: saga.updated_at)


class ClaimsWhatItLists(MemorySagaStorage):
    """Counts an attempt for each saga that it lists."""

    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        stale = await super()._fetch_stale(stale_after, limit, name, max_attempts)
        for saga in stale:
            await self.save(Checkpoint(saga.id, recovery_attempts=saga.recovery_attempts + 1))
        return stale


# Recovery


class ForgetsLeases(MemorySession):
    """Claims what is leased to somebody else."""

    def _unleased(self, name: str | None, now: datetime) -> list[Any]:
        return super()._unleased(name, now + timedelta(days=365 * 200))


class CountsNoAttempts(MemorySession):
    """Leaves the attempts to whoever fails."""

    def _claim(self, claim: Claim) -> list[Any]:
        claimed = [replace(row, recovery_attempts=row.recovery_attempts - 1) for row in super()._claim(claim)]
        self._rows |= {row.id: row for row in claimed}
        return claimed


class FencesNobody(MemorySession):
    """Leaves the version when it claims."""

    def _claim(self, claim: Claim) -> list[Any]:
        claimed = [replace(row, version=row.version - 1) for row in super()._claim(claim)]
        self._rows |= {row.id: row for row in claimed}
        return claimed


class PausesEqually(MemorySession):
    """Waits no longer after the third attempt than after the first."""

    def _claim(self, claim: Claim) -> list[Any]:
        return super()._claim(replace(claim, max_backoff=claim.backoff))


class ClaimsForEver(MemorySession):
    """Claims exhausted sagas too."""

    def _claim(self, claim: Claim) -> list[Any]:
        return super()._claim(replace(claim, max_attempts=2**31))


class LeasesForAll(MemorySession):
    """Gives a lease to whoever asks."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._row(write.saga_id)
        if row and write.lease and write.lease.owner:
            self._rows[row.id] = replace(row, lease_owner=write.lease.owner)
        return await super()._apply(write)


class RenewsNothing(MemorySession):
    """Takes and releases leases, and doesn't renew them."""

    async def _apply(self, write: Write) -> Outcome:
        return await super()._apply(write._replace(lease=None) if write.lease and write.lease.renews else write)


class KeepsLeases(MemorySession):
    """Releases nothing."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._row(write.saga_id)
        if row and write.lease and write.lease.releases:
            write = write._replace(lease=None, status=row.status)
        return await super()._apply(write)


class RecordsNothing(MemorySession):
    """Does what the operator says, and keeps no record of it."""

    async def _apply(self, write: Write) -> Outcome:
        steps = tuple(step for step in write.steps if not step.step_name.startswith("saga_store."))
        return await super()._apply(write._replace(steps=steps))


class IntervenesAnyway(MemorySagaStorage):
    """Does what the operator says, whatever has become of the saga since they looked."""

    async def _intervene(  # noqa: PLR0913, PLR0917 - as it is
        self,
        saga_id: UUID,
        verb: str,
        by: str,
        reason: str,
        expected_version: int | None,
        decide: Callable[[SagaState], Write],
    ) -> None:
        valid_version(expected_version)
        await super()._intervene(saga_id, verb, by, reason, None, decide)


class SettlesAtAnyVersion(MemorySession):
    """Settles a step, whatever has become of the saga since they looked."""

    async def _settle(self, settlement: Settlement) -> None:
        await super()._settle(replace(settlement, expected_version=None))


class ShowsTheBeginning(MemorySagaStorage):
    """Shows the first entries of a history in place of the last."""

    async def _fetch_recent(self, saga_id: UUID, limit: int, after: int) -> RecentHistory:
        whole = await super()._fetch_recent(saga_id, 1000, after)
        return RecentHistory(whole.entries[:limit], max(len(whole.entries) - limit, 0))


class ShowsAnyContext(MemorySagaStorage):
    """Shows a context, however big it is."""

    async def _peek(self, saga_id: UUID, most: int) -> ContextPeek:
        assert most >= 0
        return await super()._peek(saga_id, 2**31 - 1)


class DoubtsByNameOnly(MemorySagaStorage):
    """Takes the end of undoing a step for the end of the step."""

    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        entries = await super()._fetch_in_doubt(saga_id)
        undone = {entry.step_name for entry in await self._fetch_history(saga_id) if entry.action == "compensate"}
        return [entry for entry in entries if entry.step_name not in undone]


# Streams


class RepeatsTheLastEntry(MemorySagaStorage):
    """Begins each batch with the last entry of the one before."""

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        return await super()._fetch_history_page(saga_id, max(after - 1, 0) if limit > 1 else after, limit)


class SkipsByCount(MemorySagaStorage):
    """Takes the ids of entries for their numbers within the saga."""

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        return (await self._fetch_history(saga_id))[after : after + limit]


class StreamsCommittedOnly(MemorySagaStorage):
    """Streams over a connection of its own, which doesn't see the transaction."""

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        committed = type(self)(self.session._database)
        return await super(StreamsCommittedOnly, committed)._fetch_history_page(saga_id, after, limit)


class StreamsNothing(MemorySagaStorage):
    """Takes a missing saga for one without history."""

    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        try:
            return await super()._fetch_history_page(saga_id, after, limit)
        except SagaNotFoundError:
            return []


# Views


class DoubtsWhatRuns(MemorySagaStorage):
    """Says that a step is in doubt while somebody's lease lasts."""

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        page = await super()._find(query, limit, after)
        sagas = [replace(saga, in_doubt=bool(await self._fetch_in_doubt(saga.id))) for saga in page.sagas]
        return replace(page, sagas=sagas)


class TakesPersonsForLife(MemorySagaStorage):
    """Begins a saga's silence anew when a person intervenes."""

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        page = await super()._find(query, limit, after)
        now = self._view()._database._clock()
        return replace(page, sagas=[replace(saga, silent_for=now - saga.updated_at) for saga in page.sagas])


class ForgetsWhoHolds(MemorySagaStorage):
    """Tells by the owner of a lease that a saga is held, also when the lease has expired."""

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        page = await super()._find(query, limit, after)
        held = SagaCondition.HELD
        return replace(page, sagas=[replace(saga, condition=held) if saga.lease_owner else saga for saga in page.sagas])


class RepeatsTheLastSaga(MemorySagaStorage):
    """Begins each page with the last saga of the one before."""

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        return await super()._find(query, limit, after and replace(after, id=UUID(int=after.id.int + 1)))


class AlwaysGoesOn(MemorySagaStorage):
    """Gives an ``after`` also on the last page, if that is full."""

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        page = await super()._find(query, limit, after)
        if page.after is not None or len(page.sagas) < limit:
            return page
        last = page.sagas[-1]
        return replace(page, after=str(Cursor(last.created_at.replace(tzinfo=None).isoformat(), last.id)))


class HidesItsWindow(MemorySagaStorage):
    """Doesn't say how far back it looked."""

    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        return replace(await super()._find(query, limit, after), finished_since=None)


class CountsEverything(MemorySagaStorage):
    """Counts without looking at conditions."""

    async def _count(self, query: SagaQuery) -> SagaCount:
        return await super()._count(replace(query, conditions=()))


class GroupsWithoutDoubt(MemorySagaStorage):
    """Groups sagas as if none had a step in doubt."""

    async def _sample(self, query: SagaQuery) -> tuple[list[SagaSummary], datetime, bool]:
        sagas, now, is_partial = await super()._sample(query)
        return [replace(saga, in_doubt=False) for saga in sagas], now, is_partial


class ListsWhatOthersDid(MemorySagaStorage):
    """Lists everybody's interventions, whoever is asked for."""

    async def _find_interventions(
        self, since: datetime, by: str | None, limit: int, after: int | None
    ) -> InterventionPage:
        page = await super()._find_interventions(since, by, limit, after)
        return page if by is None else await super()._find_interventions(since, None, limit, after)


class SettlesAnything(MemorySession):
    """Settles whatever entry it is told, in doubt or not."""

    async def _settle(self, settlement: Settlement) -> None:
        try:
            await super()._settle(settlement)
        except InvalidSagaDataError:
            steps = settlement.steps("pay", "compensate", {})
            await self._apply(Write(settlement.saga_id, lease=Lease(), steps=steps))


class SettlesEarlierAttempts(MemorySession):
    """Settles a step by any of its attempts, and with it those that came later."""

    async def _settle(self, settlement: Settlement) -> None:
        doubts = in_doubt(self._history(settlement.saga_id))
        lanes = {entry.id: (entry.step_name, entry.action) for entry in doubts}
        last = {lane: entry_id for entry_id, lane in lanes.items()}
        entry_id = last.get(lanes.get(settlement.entry_id, ("", "act")), settlement.entry_id)
        await super()._settle(replace(settlement, entry_id=entry_id))


class SettlesBesideTheWorker(MemorySession):
    """Settles a step as log_step would, and lets whoever works on the saga go on."""

    async def _settle(self, settlement: Settlement) -> None:
        steps = settlement.steps("pay", "compensate", {})
        await self._apply(Write(settlement.saga_id, steps=steps))


# Runs


class AnswersLate(MemorySagaStorage):
    """Not broken: a storage whose answers come after others have had their turn, as over a network."""

    async def _write(self, write: Write) -> int:
        version = await super()._write(write)
        await asyncio.sleep(0)
        return version


class DrawsIdsAnew(AnswersLate):
    """Draws an id for whatever is sent, also if it is sent again."""

    async def _write(self, write: Write) -> int:
        return await super()._write(write._replace(write_id=new_write_id(write), repeats=False))


class TakesNoTurns(AnswersLate):
    """Lets the tasks that share a run in at any moment."""

    def run(self, *arguments: Any, **options: Any) -> SagaRun:
        run = super().run(*arguments, **options)
        run._turn = asyncio.BoundedSemaphore(100)  # type: ignore[assignment] # that lets everybody in
        return run


class CommitsBesideTheTransaction(MemorySagaStorage):
    """Commits by itself what was to become part of the caller's transaction."""

    def _joined(self, into: object) -> MemorySagaStorage:
        beside = self

        class Joined(MemorySagaStorage):
            async def _write(self, write: Write) -> int:
                return await beside._write(write)

        return Joined(super()._joined(into).session)


class TakesCommitsForGranted(MemorySagaStorage):
    """Goes on as if the caller's transaction had been committed."""

    class Joined(MemorySagaStorage):
        async def _take_part(self) -> Part:
            return Part(self.session, Fate.COMMITTED)

    def _joined(self, into: object) -> MemorySagaStorage:
        return self.Joined(super()._joined(into).session)


class LeavesTheLease(MemorySagaStorage):
    """Renews no lease in the caller's transaction."""

    class Joined(MemorySagaStorage):
        async def _write(self, write: Write) -> int:
            return await super()._write(write._replace(lease=None))

    def _joined(self, into: object) -> MemorySagaStorage:
        return self.Joined(super()._joined(into).session)


class WritesToStubs(MemorySagaStorage):
    """Takes a stub for a finished saga."""

    async def _apply(self, write: Write) -> Outcome:
        rows = self._database._rows
        if write.saga_id in rows and not write.creates:
            rows[write.saga_id] = replace(rows[write.saga_id], archived_at=None)
        return await super()._apply(write)


class ReadsStubs(MemorySagaStorage):
    """Shows what is left of a saga as the saga."""

    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        row = self._view()._row(saga_id)
        if row is None:
            raise SagaNotFoundError(saga_id)
        return row.as_execution()


class CreatesOverStubs(MemorySagaStorage):
    """Takes the id of a stub for free."""

    async def _apply(self, write: Write) -> Outcome:
        row = self._database._rows.get(write.saga_id)
        if write.creates and row is not None and row.archived_at is not None:
            del self._database._rows[row.id]
        return await super()._apply(write)


class FencesByVersion(MemorySagaStorage):
    """Compares versions only, so that an entry that came later is lost."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        logs = self._database._logs
        seen = [
            replace(mark, entries=len(log), last_entry_id=log[-1].id if log else 0)
            for mark in marks
            for log in [logs.get(mark.id, [])]
        ]
        return await super()._make_stubs(archive_id, seen)


class FencesByHistory(MemorySagaStorage):
    """Compares histories only, so that a newer context is lost."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        rows = self._database._rows
        seen = [replace(mark, version=rows[mark.id].version) if mark.id in rows else mark for mark in marks]
        return await super()._make_stubs(archive_id, seen)


class FencesByLength(MemorySagaStorage):
    """Counts entries, and doesn't look which is the last."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        logs = self._database._logs
        seen = [replace(mark, last_entry_id=logs[mark.id][-1].id) if logs.get(mark.id) else mark for mark in marks]
        return await super()._make_stubs(archive_id, seen)


class RemovesHeld(MemorySagaStorage):
    """Looks for holds when it reads, and not any more when it removes."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        rows = self._database._rows
        for mark in marks:
            if mark.id in rows:
                rows[mark.id] = replace(rows[mark.id], retain_until=None)
        return await super()._make_stubs(archive_id, marks)


class ChangesStubs(MemorySagaStorage):
    """Makes stubs that aren't what they should be."""

    def changed(self, stub: Row) -> Row:
        """Return what is stored in place of the stub."""
        raise NotImplementedError

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        made = await super()._make_stubs(archive_id, marks)
        for saga_id in made.made if made else ():
            self._database._rows[saga_id] = self.changed(self._database._rows[saga_id])
        return made


class MarksNoStub(ChangesStubs):
    """Empties a saga, and doesn't say that it was archived."""

    def changed(self, stub: Row) -> Row:
        return replace(stub, archived_at=None)


class NamesAnotherArchive(ChangesStubs):
    """Has the stub refer to the first archive that there was."""

    def changed(self, stub: Row) -> Row:
        archives = self._database._archives.values()
        return replace(stub, archived_at=min(one.archived_at for one in archives if one.archived_at))


class KeepsTheHistory(MemorySagaStorage):
    """Makes a stub of the row, and leaves the entries, which come back beside those of the archive."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        before = {mark.id: list(self._database._logs.get(mark.id, ())) for mark in marks}
        made = await super()._make_stubs(archive_id, marks)
        for saga_id in made.made if made else ():
            self._database._logs[saga_id] = before[saga_id]
        return made


class SharesTimes(MemorySagaStorage):
    """Draws the time of an archive from the clock alone, which may stand still."""

    async def _change_archive(self, change: Change) -> SagaArchive | None:
        archives = self._database._archives
        before = [one.archived_at for one in archives.values() if one.archived_at]
        changed = await super()._change_archive(change)
        if changed is not None and change.after is ArchiveState.VERIFIED and before:
            changed = archives[changed.id] = replace(changed, archived_at=max(before))
        return changed


class ForgetsHolds(MemorySagaStorage):
    """Lets go what is held."""

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[RetentionSnapshot]:
        async with super()._snapshot() as snapshot:
            rows = snapshot.rows  # type: ignore[attr-defined] # the twin's has them
            for row in rows.values():
                rows[row.id] = replace(row, retain_until=None)
            yield snapshot


class HoldsFence(MemorySession):
    """Raises the version by a hold, so that whoever works on the saga is refused."""

    async def _hold(self, hold: Hold) -> None:
        await super()._hold(hold)
        row = self._row(hold.saga_id)
        assert row is not None
        self._rows[row.id] = replace(row, version=row.version + 1)


class ReleasesAnything(MemorySagaStorage):
    """Takes it for a release that nothing was held."""

    async def _hold(self, hold: Hold) -> None:
        try:
            await super()._hold(hold)
        except InvalidSagaDataError:
            if not hold.releases:
                raise


class CountsTwice(MemorySagaStorage):
    """Takes what is a stub already for one that it has made."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        made = await super()._make_stubs(archive_id, marks)
        return made and StubsMade([*made.made, *made.already])


class RemovesUnverified(MemorySagaStorage):
    """Makes stubs by an archive that nobody has read back."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        archive = self._database._archives.get(archive_id)
        if archive is not None:
            now = self._database._clock()
            self._database._archives[archive_id] = replace(archive, state=ArchiveState.VERIFIED, archived_at=now)
        return await super()._make_stubs(archive_id, marks)


class RestoresOver(MemorySagaStorage):
    """Puts a record in the place of whatever is there."""

    async def _restore(self, records: Sequence[SagaRecord], *arguments: Any) -> list[Restored]:
        for record in records:
            self._database._rows.pop(record.id, None)
            self._database._logs.pop(record.id, None)
        return await super()._restore(records, *arguments)


class RestoresWithoutHistory(MemorySagaStorage):
    """Brings the row back, and no entries."""

    async def _restore(self, records: Sequence[SagaRecord], *arguments: Any) -> list[Restored]:
        restored = await super()._restore(records, *arguments)
        for record in records:
            self._database._logs[record.id] = []
        return restored


class RestoresUnderNewIds(MemorySagaStorage):
    """Draws new ids for entries that come back into their own stub."""

    async def _restore(self, records: Sequence[SagaRecord], *arguments: Any) -> list[Restored]:
        restored = await super()._restore(records, *arguments)
        for record, outcome in zip(records, restored, strict=True):
            if outcome is Restored.RESTORED:
                self._database._logs[record.id] = [
                    replace(entry, id=next(self._database._sequence)) for entry in record.entries
                ]
        return restored


class RestoresFromAnyArchive(MemorySagaStorage):
    """Puts a record into a stub, whichever archive that is of."""

    async def _restore(
        self, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
    ) -> list[Restored]:
        del archive_id
        return await super()._restore(records, None, keep_for)


class KeepsNothing(MemorySagaStorage):
    """Lets the next archive take what was just restored."""

    async def _restore(
        self, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
    ) -> list[Restored]:
        del keep_for
        return await super()._restore(records, archive_id, timedelta(0))


class ForgetsFresh(MemorySagaStorage):
    """Deletes stubs of any age."""

    async def _forget(self, older_than: timedelta, *where: Any) -> tuple[int, Cursor | None]:
        del older_than
        return await super()._forget(timedelta(0), *where)


class LosesItsPlace(MemorySagaStorage):
    """Forgets the first batch, and takes that for the end."""

    async def _forget(self, *arguments: Any) -> tuple[int, Cursor | None]:
        gone, _ = await super()._forget(*arguments)
        return gone, None


class WaitsForTheDead(MemorySagaStorage):
    """Lets nothing go on which there ever was a lease that nobody gave back."""

    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        rows = self._database._rows
        free = [mark for mark in marks if mark.id not in rows or rows[mark.id].lease_owner is None]
        return await super()._make_stubs(archive_id, free)


class SharesTurns(MemorySagaStorage):
    """Lets everybody archive at once."""

    @asynccontextmanager
    async def _archiving(self, by: str) -> AsyncIterator[ArchivingTurn]:
        self._database._archiver = None
        async with super()._archiving(by) as turn:
            yield turn


# Sagas that are begun, and waited for


class LooksThenStarts(MemorySagaStorage):
    """Looks whether the saga is there, and takes its answer for granted."""

    async def get_or_create_saga(self, saga_id: UUID, name: str, context: Context) -> SagaStart:
        try:
            await self.get_saga(saga_id)
        except SagaNotFoundError:
            await asyncio.sleep(0)
            await self._write(Write(saga_id, name=name, context=json.dumps(context)))
        return await super().get_or_create_saga(saga_id, name, context)


class TakesAnyName(MemorySagaStorage):
    """Returns whatever saga has the id."""

    async def get_or_create_saga(self, saga_id: UUID, name: str, context: Context) -> SagaStart:
        with suppress(SagaNotFoundError):
            name = (await self.get_saga(saga_id)).name
        return await super().get_or_create_saga(saga_id, name, context)


class StartsAnew(MemorySagaStorage):
    """Gives a saga that is there the context that it was asked for with."""

    async def get_or_create_saga(self, saga_id: UUID, name: str, context: Context) -> SagaStart:
        start = await super().get_or_create_saga(saga_id, name, context)
        if not start.created:
            await self.update_context(saga_id, context)
        return start


class ReturnsTooEarly(MemorySagaStorage):
    """Returns what is there when the time is over."""

    async def wait_for_saga(self, saga_id: UUID, timeout: timedelta) -> SagaExecution:  # noqa: ASYNC109 - as in the interface
        try:
            return await super().wait_for_saga(saga_id, timeout)
        except SagaTimeoutError:
            return await self.get_saga(saga_id)


class ReturnsWhatItWaitedFor(MemorySagaStorage):
    """Returns the saga as it was before the wait."""

    async def wait_for_saga(self, saga_id: UUID, timeout: timedelta) -> SagaExecution:  # noqa: ASYNC109 - likewise
        before = await self.get_saga(saga_id)
        return replace(before, status=(await super().wait_for_saga(saga_id, timeout)).status)


class TellsOne(MemorySagaStorage):
    """Lets one caller at a time wait for a saga."""

    waiting: ClassVar[set[UUID]] = set()

    async def _wait(self, saga_id: UUID, seconds: float) -> None:
        if saga_id in self.waiting:
            raise SagaTimeoutError(saga_id, timedelta(seconds=seconds), SagaStatus.PENDING)
        self.waiting.add(saga_id)
        await super()._wait(saga_id, seconds)
        self.waiting.remove(saga_id)


COMMITTING = (RunRaceContract, CommitIntoContract, WaitContract, StubContract, RetentionContract, RetentionRaceContract)
"""The subjects of storages that commit each call by themselves."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A broken twin, and the test of the kit that has to notice it."""

    broken: type[MemorySession | MemorySagaStorage]
    subject: type[Contract]
    test: str
    stopped_clock: bool = False

    def __str__(self) -> str:
        return self.name.removeprefix("Broken")

    @property
    def name(self) -> str:
        return f"Broken{self.broken.__name__}{self.subject.__name__}"

    def as_test_class(self) -> type[Contract]:
        """Return the subject on the broken twin, for pytest to collect."""
        place = "session_class" if issubclass(self.broken, MemorySession) else "storage_class"
        twin = CommittingTwin if self.subject in COMMITTING else AgingTwin
        attributes = {place: self.broken, "stopped_clock": self.stopped_clock, "__module__": __name__}
        return type(self.name, (twin, self.subject), attributes)


MUTANTS = (
    Mutant(LooksThenStarts, StartContract, "test_one_caller_creates_it"),
    Mutant(TakesAnyName, StartContract, "test_one_of_another_name_is_refused"),
    Mutant(StartsAnew, StartContract, "test_a_saga_that_is_there_is_left"),
    Mutant(ReturnsTooEarly, WaitContract, "test_time_runs_out[0:00:00]"),
    Mutant(ReturnsWhatItWaitedFor, WaitContract, "test_the_end_is_waited_for[COMPLETED]"),
    Mutant(TellsOne, WaitContract, "test_all_who_wait_are_told"),
    Mutant(ForgetsVersions, VersionContract, "test_other_version_is_refused[update_context]"),
    Mutant(CountsEntries, VersionContract, "test_entries_leave_the_version"),
    Mutant(CountsDifferences, VersionContract, "test_same_value_counts"),
    Mutant(ChecksBeforeWaiting, CheckpointIsolationContract, "test_expected_version_is_checked_after_the_wait"),
    Mutant(KeepsStepsOfRefused, VersionContract, "test_other_version_is_refused[save-all]"),
    Mutant(IgnoresMissing, AbsenceContract, "test_missing_saga_is_an_error[update_status]"),
    Mutant(ReadsEmptyHistory, AbsenceContract, "test_missing_saga_is_an_error[get_step_history]"),
    Mutant(CreatesWhatIsMissing, AbsenceContract, "test_refused_writes_create_nothing"),
    Mutant(CreatesOver, CreationContract, "test_taken_id_is_refused"),
    Mutant(ReportsTakenIdLate, CreationContract, "test_refused_creation_leaves_the_saga"),
    Mutant(OrdersByTime, HistoryContract, "test_order_within_a_unit", stopped_clock=True),
    Mutant(LosesEmptyDetails, HistoryContract, "test_empty_details_stay_empty"),
    Mutant(ForgetsTimeZones, HistoryContract, "test_times_are_aware"),
    Mutant(ReversesSteps, CheckpointContract, "test_steps_keep_their_order"),
    Mutant(AliasesIn, CopyContract, "test_created_context_is_copied_in"),
    Mutant(AliasesOut, CopyContract, "test_context_is_copied_out"),
    Mutant(MakesIntsOfFloats, FidelityContract, "test_numbers_round_trip"),
    Mutant(ForgetsSigns, FidelityContract, "test_numbers_round_trip"),
    Mutant(SortsKeys, FidelityContract, "test_keys_round_trip"),
    Mutant(DropsNul, FidelityContract, "test_texts_round_trip"),
    Mutant(ReplacesSurrogates, FidelityContract, "test_texts_round_trip"),
    Mutant(MergesContexts, StateContract, "test_context_is_replaced_whole"),
    Mutant(AcceptsTuples, RefusalContract, "test_bad_input_is_refused[update_context]"),
    Mutant(AcceptsNaN, RefusalContract, "test_bad_input_is_refused[create_saga]"),
    Mutant(AcceptsIntKeys, CheckpointRefusalContract, "test_bad_checkpoint_is_refused[save]"),
    Mutant(AcceptsTextIds, RefusalContract, "test_bad_input_is_refused[get_step_history]"),
    Mutant(AcceptsAnyStatus, RefusalContract, "test_bad_input_is_refused[update_status]"),
    Mutant(CutsNames, RefusalContract, "test_bad_input_is_refused[create_saga]"),
    Mutant(LooksBeforeChecking, RefusalContract, "test_bad_input_comes_first[update_context]"),
    Mutant(RaisesValueErrors, RefusalContract, "test_bad_input_is_refused[load_saga_state]"),
    Mutant(WritesStepsOneByOne, CheckpointContract, "test_bad_step_is_refused_whole"),
    Mutant(ReadsThenWrites, VersionRaceContract, "test_every_update_counts"),
    Mutant(ReadsThenWrites, ConcurrencyContract, "test_writers_of_different_things"),
    Mutant(LooksThenCreates, ConcurrencyContract, "test_one_creator_wins"),
    Mutant(LosesEntries, ConcurrencyContract, "test_no_entry_is_lost"),
    Mutant(FailsTogether, ConcurrencyContract, "test_refusal_hurts_no_neighbour"),
    Mutant(TakesNoLocks, LockContract, "test_update_waits_for_the_commit"),
    Mutant(KeepsWhatIsRolledBack, IsolationContract, "test_leaving_rolls_back"),
    Mutant(KeepsEntriesRolledBack, IsolationContract, "test_rollback_of_changes"),
    Mutant(ShowsUncommitted, IsolationContract, "test_creation_is_unseen_before_the_commit"),
    Mutant(AbortsOnRefusal, IsolationContract, "test_goes_on_after_taken_id"),
    Mutant(ListsFinished, StalenessContract, "test_unfinished_sagas_are_listed"),
    Mutant(IgnoresAge, StalenessContract, "test_fresh_sagas_are_left_out"),
    Mutant(IgnoresLimit, StalenessContract, "test_limit"),
    Mutant(IgnoresName, StalenessContract, "test_other_names_are_left_out"),
    Mutant(IgnoresAttempts, StalenessContract, "test_exhausted_sagas_are_left_out"),
    Mutant(ListsLatestFirst, StalenessContract, "test_longest_unchanged_first"),
    Mutant(ListsByAgeOnly, StalenessContract, "test_fewest_attempts_first"),
    Mutant(ClaimsWhatItLists, StalenessContract, "test_listing_claims_nothing"),
    Mutant(ForgetsLeases, ClaimContract, "test_a_claimed_saga_isnt_claimed_again"),
    Mutant(CountsNoAttempts, ClaimContract, "test_a_claim_leases_and_counts"),
    Mutant(FencesNobody, ClaimContract, "test_an_expired_lease_is_claimed"),
    Mutant(PausesEqually, ClaimContract, "test_pauses_grow"),
    Mutant(ClaimsForEver, ClaimContract, "test_exhausted_sagas_are_listed_instead"),
    Mutant(LeasesForAll, LeaseContract, "test_a_second_taker_is_refused"),
    Mutant(RenewsNothing, LeaseContract, "test_commits_and_heartbeats_renew"),
    Mutant(KeepsLeases, InterventionContract, "test_breaking_a_lease"),
    Mutant(RecordsNothing, InterventionContract, "test_interventions_are_recorded[give_up_saga]"),
    Mutant(IntervenesAnyway, InterventionContract, "test_a_changed_saga_is_left_alone[break_lease]"),
    Mutant(RepeatsTheLastEntry, HistoryStreamContract, "test_stream_is_the_history"),
    Mutant(SkipsByCount, HistoryStreamContract, "test_streams_are_apart"),
    Mutant(StreamsCommittedOnly, HistoryStreamContract, "test_unit_streams_its_own_entries"),
    Mutant(StreamsNothing, HistoryStreamContract, "test_missing_saga_has_no_stream"),
    Mutant(DoubtsWhatRuns, InspectionContract, "test_what_holds_first_counts"),
    Mutant(TakesPersonsForLife, InspectionContract, "test_persons_are_no_sign_of_life[break_lease]"),
    Mutant(ForgetsWhoHolds, InspectionContract, "test_what_holds_first_counts"),
    Mutant(RepeatsTheLastSaga, InspectionContract, "test_pages_follow_each_other"),
    Mutant(AlwaysGoesOn, InspectionContract, "test_a_page_says_if_there_is_more"),
    Mutant(HidesItsWindow, InspectionContract, "test_a_search_says_how_far_back_it_looked"),
    Mutant(CountsEverything, InspectionContract, "test_views_tell_what_is_so"),
    Mutant(GroupsWithoutDoubt, InspectionContract, "test_views_tell_what_is_so"),
    Mutant(ListsWhatOthersDid, InspectionContract, "test_interventions_are_listed"),
    Mutant(SettlesAnything, InspectionContract, "test_only_what_is_in_doubt_is_settled"),
    Mutant(SettlesEarlierAttempts, InspectionContract, "test_the_last_of_several_attempts_is_settled[COMPLETED]"),
    Mutant(SettlesAtAnyVersion, InspectionContract, "test_settling_expects_a_version"),
    Mutant(ShowsAnyContext, InspectionContract, "test_a_context_is_peeked_at"),
    Mutant(ShowsTheBeginning, InspectionContract, "test_the_end_of_a_history"),
    Mutant(SettlesBesideTheWorker, InspectionContract, "test_settling_fences_the_worker"),
    Mutant(DrawsIdsAnew, RunRaceContract, "test_a_cancelled_commit_is_made_again"),
    Mutant(TakesNoTurns, RunRaceContract, "test_parallel_steps"),
    Mutant(CommitsBesideTheTransaction, CommitIntoContract, "test_it_is_stored_with_the_transaction"),
    Mutant(TakesCommitsForGranted, CommitIntoContract, "test_after_a_rollback_it_is_buffered_again"),
    Mutant(LeavesTheLease, CommitIntoContract, "test_the_lease_is_renewed"),
    Mutant(WritesToStubs, StubContract, "test_nothing_is_written_to_a_stub[log_step]"),
    Mutant(WritesToStubs, RetentionRaceContract, "test_nothing_is_lost_and_nothing_is_left"),
    Mutant(ReadsStubs, StubContract, "test_a_stub_is_not_read[get_saga]"),
    Mutant(CreatesOverStubs, StubContract, "test_its_id_is_taken"),
    Mutant(ForgetsFresh, StubContract, "test_a_forgotten_stub_is_gone"),
    Mutant(LosesItsPlace, RetentionContract, "test_all_are_forgotten_in_one_walk"),
    Mutant(WaitsForTheDead, RetentionContract, "test_what_is_leased_stays_until_the_lease_has_expired"),
    Mutant(FencesByVersion, RetentionContract, "test_what_has_changed_since_stays[appends]"),
    Mutant(FencesByHistory, RetentionContract, "test_what_has_changed_since_stays[updates]"),
    Mutant(FencesByLength, RetentionContract, "test_another_history_of_the_same_length_stays"),
    Mutant(RemovesHeld, RetentionContract, "test_what_is_restored_stays_for_a_while"),
    Mutant(MarksNoStub, StubContract, "test_a_stub_is_not_read[get_saga]"),
    Mutant(NamesAnotherArchive, StubContract, "test_it_is_found_with_its_archive"),
    Mutant(KeepsTheHistory, RetentionContract, "test_a_saga_comes_back_as_it_was"),
    Mutant(SharesTimes, RetentionContract, "test_the_ledger"),
    Mutant(RestoresUnderNewIds, RetentionContract, "test_a_saga_comes_back_as_it_was"),
    Mutant(RestoresFromAnyArchive, RetentionContract, "test_an_older_archive_doesnt_fill_a_newer_ones_stub"),
    Mutant(ForgetsHolds, RetentionContract, "test_what_a_policy_lets_go"),
    Mutant(HoldsFence, HoldContract, "test_a_hold_is_recorded_and_fences_nobody[RUNNING]"),
    Mutant(ReleasesAnything, HoldContract, "test_what_cannot_be_held"),
    Mutant(CountsTwice, RetentionContract, "test_once_more_tells_the_same"),
    Mutant(RemovesUnverified, RetentionContract, "test_steps_that_lead_nowhere"),
    Mutant(RestoresOver, RetentionContract, "test_what_is_there_is_left_as_it_was"),
    Mutant(RestoresWithoutHistory, RetentionContract, "test_a_saga_comes_back_as_it_was"),
    Mutant(KeepsNothing, RetentionContract, "test_what_is_restored_stays_for_a_while"),
    Mutant(SharesTurns, RetentionContract, "test_one_archiver_at_a_time"),
    Mutant(DoubtsByNameOnly, InDoubtContract, "test_other_steps_and_actions_settle_nothing"),
)

# Where pytest looks for test classes.
globals().update({mutant.name: mutant.as_test_class() for mutant in MUTANTS})


@dataclass(frozen=True, slots=True)
class Report:
    """Which tests of which class passed, and which failed."""

    passed: dict[str, set[str]]
    failed: dict[str, set[str]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_apart(
        __file__, "SoundTwin or SoundCommitting or Broken", tmp_path_factory.mktemp("mutations") / "report.xml"
    )


def run_apart(module: str, wanted: str, path: Path) -> Report:
    """Run the classes ``Sound...`` and ``Broken...`` of a module in a pytest of their own, as far as ``-k`` wants."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", module, f"--junitxml={path}", "--quiet", "--tb=no"),
            # The classes alone, without the server that the other tests need, and in the same order each time.
            *("-o", "python_classes=Sound Broken", "-k", wanted),
            *("--noconftest", "-p", "no:randomly", "-p", "no:cacheprovider"),
        ],
        check=False,  # nearly all of it is to fail
        capture_output=True,
        timeout=300,
    )
    report = Report(defaultdict(set), defaultdict(set))
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest has just written it
        broken = any(child.tag in {"failure", "error"} for child in case)
        tests = report.failed if broken else report.passed
        tests[case.attrib["classname"].rpartition(".")[2]].add(case.attrib["name"])
    return report


def test_sound_twin_passes(report: Report) -> None:
    """The control: the twin as it is passes the whole kit, run in the same way."""
    assert report.failed["SoundTwin"] == report.failed["SoundCommittingTwin"] == set()
    assert len(report.passed["SoundTwin"]) > 150
    assert len(report.passed["SoundCommittingTwin"]) > 15


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_noticed(report: Report, mutant: Mutant) -> None:
    """The kit notices what is broken, by the test whose sentence it breaks."""
    assert mutant.test in report.failed[mutant.name]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_breaks_little(report: Report, mutant: Mutant) -> None:
    """No mutant is so broken that every test would notice it: some of its subject's tests pass."""
    assert report.passed[mutant.name]
