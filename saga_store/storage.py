"""The half that every storage shares: the whole contract, on top of one write and three reads.

An engine (memory, SQLAlchemy) only applies validated checkpoints and fetches rows, so there is nothing in
which two of them could drift apart.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaStoreError
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


@dataclass(frozen=True, slots=True)
class Write:
    """A checkpoint that has been checked, its context already JSON text."""

    saga_id: UUID
    name: str | None = None
    status: SagaStatus | None = None
    context: str | None = None
    steps: tuple[LogStep, ...] = ()
    recovery_attempts: int | None = None
    expected_version: int | None = None

    @property
    def creates(self) -> bool:
        return self.name is not None

    @property
    def changes_row(self) -> bool:
        return self.status is not None or self.context is not None or self.recovery_attempts is not None


_A_CENTURY = timedelta(days=36525)

Outcome: TypeAlias = int | SagaStoreError
"""What came of a write: the saga's version afterwards, or the error to raise."""


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
        return await self._write(_checked(checkpoint))

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

    async def _write(self, write: Write) -> int:
        [outcome] = await self._apply([write])
        if isinstance(outcome, SagaStoreError):
            raise outcome
        return outcome


def _checked(checkpoint: Checkpoint) -> Write:
    if not isinstance(checkpoint, Checkpoint):
        raise InvalidSagaDataError("checkpoint", f"must be a Checkpoint, not a {type(checkpoint).__name__}")
    steps = checkpoint.steps
    if not isinstance(steps, list | tuple):
        raise InvalidSagaDataError("steps", f"must be a list or tuple of LogStep, not a {type(steps).__name__}")
    attempts = checkpoint.recovery_attempts
    write = Write(
        valid_id(checkpoint.saga_id),
        name=None if checkpoint.name is None else valid_name("name", checkpoint.name),
        status=None if checkpoint.status is None else valid_status(checkpoint.status),
        context=None if checkpoint.context is None else encode_context(checkpoint.context),
        steps=tuple(valid_step(step) for step in steps),
        recovery_attempts=None if attempts is None else valid_count("recovery_attempts", attempts),
        expected_version=valid_version(checkpoint.expected_version),
    )
    if write.creates and write.expected_version is not None:
        raise InvalidSagaDataError("expected_version", "must be None for a new saga, which has no version yet")
    if not (write.creates or write.changes_row or write.steps):
        raise InvalidSagaDataError("checkpoint", "writes nothing; give it a name, a status, a context or steps")
    return write
