"""The half that every storage shares: the whole contract, on top of one write and three reads.

An engine (memory, SQLAlchemy) only applies validated checkpoints and fetches rows, so there is nothing in
which two of them could drift apart.
"""

import abc
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from saga_store.errors import SagaStoreError
from saga_store.interface import ICheckpointStorage
from saga_store.model import (
    Checkpoint,
    Context,
    LogStep,
    SagaExecution,
    SagaLogEntry,
    SagaStatus,
    SagaStepStatus,
    StepAction,
)
from saga_store.run import SagaRun
from saga_store.validation import (
    encode_context,
    valid_count,
    valid_duration,
    valid_id,
    valid_name,
    valid_status,
    valid_step,
    valid_version,
)
from saga_store.write import Outcome, Write, checked

_A_CENTURY = timedelta(days=36525)


class SagaStorage(ICheckpointStorage):
    """Base of the storages: give it ``_apply`` and the three reads, and it keeps the contract."""

    @abc.abstractmethod
    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        """Apply writes to different sagas, each atomically, and say for each what came of it.

        A refusal of one write (exists, missing, version) is its outcome and doesn't touch the others. What
        is raised instead concerns them all.
        """

    @abc.abstractmethod
    async def _fetch_saga(self, saga_id: UUID) -> SagaExecution:
        """Return the row, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _fetch_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        """Return the history in order, or raise SagaNotFoundError."""

    @abc.abstractmethod
    async def _fetch_stale(
        self, stale_after: timedelta, limit: int, name: str | None, max_attempts: int
    ) -> list[SagaExecution]:
        """Return what ``find_stale_sagas`` promises."""

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
            # No saga is older, and no clock underflows.
            min(valid_duration("stale_after", stale_after), _A_CENTURY),
            valid_count("limit", limit),
            None if name is None else valid_name("name", name),
            valid_count("max_attempts", max_attempts),
        )

    def run(self, saga_id: UUID, *, write_ahead: bool = False) -> SagaRun:
        """Begin a unit of work on one saga, to be entered with ``async with``; see ``SagaRun``.

        Raises:
            InvalidSagaDataError: The id is no UUID.
        """
        return SagaRun(self, valid_id(saga_id), write_ahead=write_ahead)

    async def _write(self, write: Write) -> int:
        [outcome] = await self._apply([write])
        if isinstance(outcome, SagaStoreError):
            raise outcome
        return outcome
