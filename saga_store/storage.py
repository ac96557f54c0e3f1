"""The half that every storage shares: the whole contract, on top of one write, one claim and the reads.

An engine (memory, SQLAlchemy) only applies validated checkpoints and fetches rows, so there is nothing in
which two of them could drift apart.
"""

import abc
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStoreError,
    SagaTimeoutError,
)
from saga_store.inspection import (
    CONTEXT_SHOWN,
    HISTORY_SEEN,
    INTERVENTION,
    MAX_ATTEMPTS,
    STALE_AFTER,
    ContextPeek,
    Cursor,
    InterventionPage,
    RecentHistory,
    SagaCount,
    SagaFigures,
    SagaGroup,
    SagaPage,
    SagaQuery,
    SagaSummary,
    checked_query,
    group,
    read_cursor,
    read_entry_cursor,
    record,
    valid_moment,
)
from saga_store.interface import IHistoryStorage, IInspectionStorage, IRecoveryStorage
from saga_store.joining import Part
from saga_store.model import (
    UNFINISHED,
    Checkpoint,
    Context,
    LogStep,
    SagaExecution,
    SagaLogEntry,
    SagaStart,
    SagaStatus,
    SagaStepStatus,
    StepAction,
)
from saga_store.retention_model import Retention
from saga_store.retention_storage import RetentionStorage, checked_terms
from saga_store.run import Joined, SagaRun
from saga_store.run_interface import IRunStorage
from saga_store.shard_records import ShardRecord, ShardState
from saga_store.validation import (
    DEFAULT_MAX_CONTEXT_BYTES,
    check_size,
    decode_context,
    encode_context,
    valid_count,
    valid_end,
    valid_entry_id,
    valid_id,
    valid_last_seen,
    valid_name,
    valid_period,
    valid_person,
    valid_status,
    valid_step,
    valid_version,
)
from saga_store.waiting import Look, Waiting
from saga_store.write import Claim, Lease, Outcome, Settlement, Write, checked

_ALL = SagaQuery()
_LONGEST_PAGE = 1000

_FINISHED = set(SagaStatus) - set(UNFINISHED)


class SagaState(NamedTuple):
    """What an operator's decision goes by; the status may be none that is known."""

    status: str
    recovery_attempts: int
    lease_owner: str | None
    version: int


class SagaStorage(RetentionStorage, IRecoveryStorage, IHistoryStorage, IInspectionStorage, IRunStorage):
    """Base of the storages: give it ``_apply``, ``_claim`` and the reads, and it keeps the contract."""

    _max_context_bytes = DEFAULT_MAX_CONTEXT_BYTES
    _joins = False
    """Whether its writes are part of a transaction that the caller commits."""
    _seconds_between_looks = 0.25
    """How often it looks whether sagas are over that somebody waits for."""
    _waiting: Waiting | None = None

    @abc.abstractmethod
    def _apply(self, write: Write) -> Awaitable[Outcome]:
        """Apply a write atomically, and say what came of it; a refusal (exists, missing, version) isn't raised."""

    @abc.abstractmethod
    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        """Return the row, or raise SagaNotFoundError."""

    async def _fetch_state(self, saga_id: UUID) -> SagaState:
        """Return what an operator decides by, or raise SagaNotFoundError; also of a saga that can't be read."""
        saga = await self._fetch_saga(saga_id)
        return SagaState(saga.status.value, saga.recovery_attempts, saga.lease_owner, saga.version)

    @abc.abstractmethod
    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        """Return the history in order, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _fetch_history_page(self, saga_id: UUID, after: int, limit: int) -> list[SagaLogEntry]:
        """Return the first entries, in order, whose ids are greater than ``after``, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        """Return what ``find_stale_sagas`` promises."""

    @abc.abstractmethod
    async def _fetch_exhausted(self, limit: int, name: str | None, max_attempts: int) -> list[SagaExecution]:
        """Return what ``find_exhausted_sagas`` promises."""

    @abc.abstractmethod
    async def _fetch_in_doubt(self, saga_id: UUID) -> list[SagaLogEntry]:
        """Return what ``get_in_doubt_steps`` promises, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool:
        """Whether the lease is this owner's and lasts, and the saga is at this version."""

    @abc.abstractmethod
    async def _claim(self, claim: Claim) -> list[SagaExecution]:
        """Do what ``claim_sagas`` promises."""

    @abc.abstractmethod
    async def _find(self, query: SagaQuery, limit: int, after: Cursor | None) -> SagaPage:
        """Return what ``find_sagas`` promises."""

    @abc.abstractmethod
    async def _count(self, query: SagaQuery) -> SagaCount:
        """Return what ``count_sagas`` promises."""

    @abc.abstractmethod
    async def _sample(self, query: SagaQuery) -> tuple[list[SagaSummary], datetime, bool]:
        """Return the sagas that ``group_sagas`` looks at, the database's time, and whether there are more of them."""

    @abc.abstractmethod
    async def _find_interventions(
        self, since: datetime, by: str | None, limit: int, after: int | None
    ) -> InterventionPage:
        """Return what ``find_interventions`` promises."""

    @abc.abstractmethod
    async def _fetch_recent(self, saga_id: UUID, limit: int, after: int) -> RecentHistory:
        """Return what ``get_recent_history`` promises, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _peek(self, saga_id: UUID, most: int) -> ContextPeek:
        """Return what ``peek_context`` promises, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _fetch_figures(self, query: SagaQuery) -> SagaFigures:
        """Return what ``get_figures`` promises; the query says what is stale and what exhausted."""

    @abc.abstractmethod
    async def _settle(self, settlement: Settlement) -> None:
        """Do what ``settle_step`` promises."""

    async def _fetch_unfinished(self, saga_ids: Sequence[UUID]) -> Collection[UUID]:
        """Return those of these sagas that are there and unfinished."""
        unfinished = set[UUID]()
        for saga_id in saga_ids:
            with suppress(SagaNotFoundError):
                if (await self._fetch_state(saga_id)).status in UNFINISHED:
                    unfinished.add(saga_id)
        return unfinished

    def _where_to_look(self) -> Look:
        """Decide where to look for a saga, in the context of whoever waits for it; no I/O."""
        return Look(self._fetch_unfinished)

    async def _wait(self, saga_id: UUID, seconds: float) -> None:
        """Wait until the saga may be over, together with all who wait for sagas in the same place."""
        if self._waiting is None:
            self._waiting = Waiting(self._seconds_between_looks)
        await self._waiting.wait(saga_id, self._where_to_look(), seconds)

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]:  # noqa: ARG002 - for those that keep them
        """Return the ids of the saga's last writes, as far as they had one; nothing if it isn't there."""
        return ()

    def _joined_for(self, saga_id: UUID, into: object) -> Joined:  # noqa: ARG002 - for storages made of several
        """Return where this saga is, bound to a transaction of the caller's; or refuse what it can't be bound to."""
        return self._joined(into)

    def _joined(self, into: object) -> "SagaStorage":  # noqa: ARG002 - as above
        """Return the same storage, bound to a transaction of the caller's; or refuse what it can't be bound to."""
        raise InvalidSagaDataError("into", f"can't be given: a {type(self).__name__} joins no transactions")

    async def _take_part(self) -> Part:
        """Return a part of the transaction that this storage joins; for one that ``_joined`` has returned."""
        raise NotImplementedError

    async def _fetch_shard_state(self) -> ShardState:
        """Return what a ShardedSagaStorage has to know before it uses this storage."""
        raise InvalidSagaDataError("storages", f"must be shards: a {type(self).__name__} can't be one")

    async def _record_shard(self, record: ShardRecord) -> None:
        """Record this place, unless one is recorded already."""
        raise NotImplementedError

    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        await self._write(Write(valid_id(saga_id), name=valid_name("name", name), context=encode_context(context)))

    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        await self._write(
            Write(
                valid_id(saga_id),
                context=encode_context(context),
                expected_version=valid_version(expected_version),
            )
        )

    async def update_status(self, saga_id: UUID, status: SagaStatus, *, expected_version: int | None = None) -> None:
        await self._write(
            Write(
                valid_id(saga_id),
                status=valid_status(status),
                expected_version=valid_version(expected_version),
            )
        )

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: SagaStepStatus,
        details: str | None = None,
    ) -> None:
        await self._write(Write(valid_id(saga_id), steps=(valid_step(LogStep(step_name, action, status, details)),)))

    async def load_saga_state(self, saga_id: UUID) -> tuple[SagaStatus, Context]:
        saga = await self.get_saga(saga_id)
        return saga.status, saga.context

    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_history(valid_id(saga_id))

    def iter_step_history(self, saga_id: UUID, *, batch_size: int = 1000) -> AsyncIterator[SagaLogEntry]:
        return self._iter_pages(valid_id(saga_id), valid_count("batch_size", batch_size, least=1))

    async def _iter_pages(self, saga_id: UUID, size: int) -> AsyncIterator[SagaLogEntry]:
        # The ids of a saga's entries follow the order of its commits, so nothing appears below the last one seen.
        after = 0
        is_last = False
        while not is_last:
            page = await self._fetch_history_page(saga_id, after, size)
            is_last = len(page) < size
            for entry in page:
                after = entry.id
                yield entry

    async def save(self, checkpoint: Checkpoint) -> int:
        return await self._write(checked(checkpoint))

    async def get_saga(self, saga_id: UUID) -> SagaExecution:
        return await self._fetch_saga(valid_id(saga_id))

    async def find_stale_sagas(
        self,
        *,
        stale_after: timedelta,
        limit: int = 100,
        name: str | None = None,
        max_attempts: int = 5,
    ) -> list[SagaExecution]:
        return await self._fetch_stale(
            valid_period("stale_after", stale_after),
            valid_count("limit", limit),
            None if name is None else valid_name("name", name),
            valid_count("max_attempts", max_attempts),
        )

    async def claim_sagas(  # noqa: PLR0913 - as in the interface
        self,
        *,
        owner: str,
        lease: timedelta,
        limit: int,
        stale_after: timedelta,
        name: str | None = None,
        max_attempts: int = 5,
        backoff: timedelta = timedelta(seconds=10),
        max_backoff: timedelta = timedelta(hours=1),
    ) -> list[SagaExecution]:
        return await self._claim(
            Claim(
                owner=valid_name("owner", owner),
                lease=valid_period("lease", lease),
                limit=valid_count("limit", limit),
                stale_after=valid_period("stale_after", stale_after),
                backoff=valid_period("backoff", backoff),
                max_backoff=valid_period("max_backoff", max_backoff),
                name=None if name is None else valid_name("name", name),
                max_attempts=valid_count("max_attempts", max_attempts),
            )
        )

    async def find_exhausted_sagas(
        self, *, limit: int = 100, name: str | None = None, max_attempts: int = 5
    ) -> list[SagaExecution]:
        return await self._fetch_exhausted(
            valid_count("limit", limit),
            None if name is None else valid_name("name", name),
            valid_count("max_attempts", max_attempts),
        )

    async def get_in_doubt_steps(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._fetch_in_doubt(valid_id(saga_id))

    async def give_up_saga(self, saga_id: UUID, *, by: str, reason: str, expected_version: int | None = None) -> None:
        def give_up(saga: SagaState) -> Write:
            _check_unfinished(saga_id, saga)
            return Write(saga_id, status=SagaStatus.FAILED)

        await self._intervene(saga_id, "give_up_saga", by, reason, expected_version, give_up)

    async def reset_recovery_attempts(
        self, saga_id: UUID, *, by: str, reason: str, expected_version: int | None = None
    ) -> None:
        def reset(saga: SagaState) -> Write:
            _check_unfinished(saga_id, saga)
            return Write(saga_id, recovery_attempts=0)

        await self._intervene(saga_id, "reset_recovery_attempts", by, reason, expected_version, reset)

    async def break_lease(self, saga_id: UUID, *, by: str, reason: str, expected_version: int | None = None) -> None:
        def break_it(saga: SagaState) -> Write:
            if saga.lease_owner is None:
                raise InvalidSagaDataError("saga_id", f"names a saga that nobody holds a lease of: {saga_id}")
            return Write(saga_id, lease=Lease())

        await self._intervene(saga_id, "break_lease", by, reason, expected_version, break_it)

    async def find_sagas(self, query: SagaQuery = _ALL, *, limit: int = 50, after: str | None = None) -> SagaPage:
        return await self._find(checked_query(query), valid_page("limit", limit), read_cursor(after))

    async def count_sagas(self, query: SagaQuery = _ALL) -> SagaCount:
        return await self._count(checked_query(query))

    async def group_sagas(self, query: SagaQuery = _ALL, *, limit: int = 50) -> list[SagaGroup]:
        query, limit = checked_query(query), valid_count("limit", limit)
        sagas, now, is_partial = await self._sample(query)
        return group(sagas, now, is_partial=is_partial)[:limit]

    async def find_interventions(
        self, *, since: datetime, by: str | None = None, limit: int = 50, after: str | None = None
    ) -> InterventionPage:
        return await self._find_interventions(
            valid_moment("since", since),
            None if by is None else valid_name("by", by),
            valid_page("limit", limit),
            read_entry_cursor(after),
        )

    async def get_recent_history(self, saga_id: UUID, *, limit: int = HISTORY_SEEN, after: int = 0) -> RecentHistory:
        return await self._fetch_recent(valid_id(saga_id), valid_page("limit", limit), valid_last_seen(after))

    async def peek_context(self, saga_id: UUID, *, most: int = CONTEXT_SHOWN) -> ContextPeek:
        return await self._peek(valid_id(saga_id), valid_count("most", most))

    async def get_figures(
        self,
        *,
        stale_after: timedelta = STALE_AFTER,
        max_attempts: int = MAX_ATTEMPTS,
        retention: Retention | None = None,
    ) -> SagaFigures:
        query = checked_query(SagaQuery(stale_after=stale_after, max_attempts=max_attempts))
        terms = None if retention is None else checked_terms(retention)
        figures = await self._fetch_figures(query)
        if terms is None:
            return figures
        lag = await self._fetch_lag(terms)
        return replace(figures, retention_lag=lag, estimated=(*figures.estimated, "retention_lag"))

    async def settle_step(  # noqa: PLR0913 - as in the interface
        self,
        saga_id: UUID,
        entry_id: int,
        status: SagaStepStatus,
        *,
        by: str,
        reason: str,
        expected_version: int | None = None,
    ) -> None:
        await self._settle(
            Settlement(
                valid_id(saga_id),
                valid_entry_id(entry_id),
                valid_end(status),
                *valid_person(by, reason),
                valid_version(expected_version),
            )
        )

    async def get_or_create_saga(self, saga_id: UUID, name: str, context: Context) -> SagaStart:
        saga_id, name, text = valid_id(saga_id), valid_name("name", name), encode_context(context)
        # That it expects version 0 has a lost answer found out, as the creations of runs do.
        creation = Write(saga_id, name=name, context=text, expected_version=0)
        start = await self._create_or_fetch(creation) or await self._create_or_fetch(creation)
        if start is None:
            raise SagaAlreadyExistsError(saga_id)
        if start.name != name:
            raise SagaAlreadyExistsError(saga_id, start.name)
        return start

    async def wait_for_saga(self, saga_id: UUID, timeout: timedelta) -> SagaExecution:  # noqa: ASYNC109 - as in the interface
        saga_id, timeout = valid_id(saga_id), valid_period("timeout", timeout)
        if self._call_joins():
            raise InvalidSagaDataError(
                "bind",
                "must be one with which the storage commits its own calls: your transaction would be open for as long "
                "as it waits; wait with a storage that is bound to the engine",
            )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout.total_seconds()
        saga = await self._fetch_saga(saga_id)
        while saga.status in UNFINISHED:
            left = deadline - loop.time()
            if left <= 0:
                raise SagaTimeoutError(saga_id, timeout, saga.status.value)
            await self._wait(saga_id, left)
            saga = await self._fetch_saga(saga_id)
        return saga

    def run(
        self,
        saga_id: UUID,
        *,
        write_ahead: bool = False,
        owner: str | None = None,
        lease: timedelta | None = None,
        renew: bool = False,
    ) -> SagaRun:
        saga_id = valid_id(saga_id)
        if owner is None and lease is None and not renew:
            return SagaRun(self, saga_id, write_ahead=write_ahead)
        if owner is None or lease is None:
            raise InvalidSagaDataError("lease", "must come with an owner, and an owner with a lease; give both or none")
        if renew and self._call_joins():
            raise InvalidSagaDataError(
                "renew", "needs a storage that commits its own calls: in your transaction nobody sees a renewal in time"
            )
        taken = Lease(valid_name("owner", owner), valid_period("lease", lease))
        return SagaRun(self, saga_id, write_ahead=write_ahead, lease=taken, renew=renew)

    async def _create_or_fetch(self, creation: Write) -> SagaStart | None:
        """Return None if the id is taken, and nothing is there: it was forgotten meanwhile, or reads lead elsewhere."""
        try:
            await self._write(creation)
        except SagaAlreadyExistsError:
            try:
                saga = await self._fetch_saga(creation.saga_id)
            except SagaArchivedError:
                raise
            except SagaNotFoundError:
                return None
            return SagaStart(
                created=False, name=saga.name, status=saga.status, context=saga.context, version=saga.version
            )
        context = decode_context(creation.context or "{}")
        return SagaStart(created=True, name=creation.name or "", status=SagaStatus.PENDING, context=context, version=1)

    async def _intervene(  # noqa: PLR0913, PLR0917 - what the three verbs are given, and what they decide
        self,
        saga_id: UUID,
        verb: str,
        by: str,
        reason: str,
        expected_version: int | None,
        decide: Callable[[SagaState], Write],
    ) -> None:
        """Write what an operator decides on seeing the saga, with an entry in its history that says who and why."""
        valid_id(saga_id)
        by, reason = valid_person(by, reason)
        valid_version(expected_version)
        while True:
            saga = await self._fetch_state(saga_id)
            if expected_version is not None and saga.version != expected_version:
                raise SagaConcurrencyError(saga_id, expected_version, saga.version)
            before = {
                "status": saga.status,
                "recovery_attempts": saga.recovery_attempts,
                "lease_owner": saga.lease_owner,
            }
            entry = LogStep(f"{INTERVENTION}{verb}", "act", SagaStepStatus.COMPLETED, record(by, reason, before))
            # A refusal means that somebody else's write went through, so this comes to an end; and if a version is
            # expected, at the next look.
            with suppress(SagaConcurrencyError):
                await self._write(decide(saga)._replace(steps=(entry,), expected_version=saga.version))
                return

    async def _with_archive(self, error: SagaArchivedError) -> SagaArchivedError:
        """Return the error, and where the saga's record is, as far as that can be told."""
        return error

    def _check_size(self, context: str) -> None:
        check_size(context, self._max_context_bytes)

    async def _write(self, write: Write) -> int:
        if write.context is not None:
            self._check_size(write.context)
        outcome = await self._apply(write)
        if isinstance(outcome, SagaArchivedError):
            outcome = await self._with_archive(outcome)
        if isinstance(outcome, SagaStoreError):
            raise outcome
        return outcome


def _check_unfinished(saga_id: UUID, saga: SagaState) -> None:
    if saga.status in _FINISHED:
        raise InvalidSagaDataError("saga_id", f"names a saga that is {saga.status} already: {saga_id}")


def valid_page(field: str, limit: object) -> int:
    return min(valid_count(field, limit, least=1), _LONGEST_PAGE)
