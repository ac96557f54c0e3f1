"""A saga of python-cqrs's, recovered under a lease."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any
from uuid import UUID

from cqrs.container.protocol import Container
from cqrs.container.scope import ScopeStrategy
from cqrs.saga.models import SagaContext
from cqrs.saga.recovery import recover_saga as _recover_saga
from cqrs.saga.saga import Saga
from cqrs.saga.storage.enums import SagaStatus as CqrsStatus
from cqrs.saga.storage.enums import SagaStepStatus as CqrsStepStatus
from cqrs.saga.storage.models import SagaLogEntry as CqrsLogEntry
from cqrs.saga.storage.protocol import ISagaStorage as CqrsStorage
from cqrs.saga.storage.protocol import SagaStorageRun

from saga_store.cqrs.calls import ENGINE_ERRORS, RunCalls
from saga_store.model import UNFINISHED, StepAction
from saga_store.run import SagaRun

_logger = logging.getLogger("saga_store.recovery")


def recovery_handler(
    saga: Saga[Any],
    context_builder: type[SagaContext] | Callable[[dict[str, Any]], SagaContext],
    container: Container[Any],
    scope_strategy: ScopeStrategy = ScopeStrategy.NONE,
) -> Callable[[SagaRun], Awaitable[None]]:
    """Return what a ``RecoveryWorker`` does with the sagas of this class: ``recover_saga``, in the worker's run.

    Unlike ``recover_saga`` on a storage, it doesn't make a saga FAILED because its recovery failed, nor because a
    step couldn't be undone: such a saga stays as it is, and is claimed again until its attempts are used up. One
    that has been undone is FAILED, as ever.

    Args:
        saga: The saga, to resume the sagas of its class.
        context_builder: The context's class, or what makes one from the stored dict.
        container: Where the engine gets the steps from.
        scope_strategy: As for the first execution.

    Raises:
        TypeError: ``saga`` is no saga, such as the class in place of an object of it.
    """
    if not isinstance(saga, Saga):
        raise TypeError(f"saga must be a Saga of python-cqrs, such as OrderSaga(), not {saga!r}")

    async def recover(run: SagaRun) -> None:
        storage = _LeasedStorage(_LeasedRun(run))
        try:
            await _recover_saga(saga, run.saga_id, context_builder, container, storage, scope_strategy)
        except Exception as exc:
            # The engine raises after a compensation that succeeded, too.
            await run.rollback()
            status, _ = await run.load_saga_state(run.saga_id)
            if status in UNFINISHED:
                raise
            _logger.info("saga_id=%s was undone: %s", run.saga_id, exc)

    return recover


class _LeasedRun(RunCalls):
    """A run that somebody else has begun, and that holds a lease."""

    def __init__(self, run: SagaRun) -> None:
        self._run = run
        self._left_undone = False

    async def _of(self, saga_id: UUID) -> SagaRun:  # noqa: ARG002 - the run minds it
        return self._run

    async def update_status(self, saga_id: UUID, status: CqrsStatus) -> None:
        """Set the status; but one that is to be FAILED with a step not undone stays, for another attempt."""
        if not (self._left_undone and status == CqrsStatus.FAILED):
            await super().update_status(saga_id, status)

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: CqrsStepStatus,
        details: str | None = None,
    ) -> None:
        await super().log_step(saga_id, step_name, action, status, details)
        if action == "compensate" and status == CqrsStepStatus.FAILED:
            self._left_undone = True

    async def commit(self) -> None:
        with ENGINE_ERRORS:
            await self._run.commit()

    async def rollback(self) -> None:
        await self._run.rollback()


class _LeasedStorage(CqrsStorage):
    """The storage that the engine gets for one recovery: what it writes past its run is committed at once."""

    def __init__(self, run: _LeasedRun) -> None:
        self._run = run

    def create_run(self) -> AbstractAsyncContextManager[SagaStorageRun]:
        return nullcontext(self._run)

    async def create_saga(self, saga_id: UUID, name: str, context: dict[str, Any]) -> None:
        await self._run.create_saga(saga_id, name, context)
        await self._run.commit()

    async def update_context(self, saga_id: UUID, context: dict[str, Any], current_version: int | None = None) -> None:
        await self._run.update_context(saga_id, context, current_version)
        await self._run.commit()

    async def update_status(self, saga_id: UUID, status: CqrsStatus) -> None:
        await self._run.update_status(saga_id, status)
        await self._run.commit()

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: CqrsStepStatus,
        details: str | None = None,
    ) -> None:
        await self._run.log_step(saga_id, step_name, action, status, details)
        await self._run.commit()

    async def load_saga_state(
        self, saga_id: UUID, *, read_for_update: bool = False
    ) -> tuple[CqrsStatus, dict[str, Any], int]:
        return await self._run.load_saga_state(saga_id, read_for_update=read_for_update)

    async def get_step_history(self, saga_id: UUID) -> list[CqrsLogEntry]:
        return await self._run.get_step_history(saga_id)

    async def get_sagas_for_recovery(
        self,
        limit: int,
        max_recovery_attempts: int = 5,
        stale_after_seconds: int | None = None,
        saga_name: str | None = None,
    ) -> list[UUID]:
        raise NotImplementedError("this storage is for one saga; claim others with claim_sagas")

    async def increment_recovery_attempts(self, saga_id: UUID, new_status: CqrsStatus | None = None) -> None:
        """Do nothing: the claim has counted this attempt, and one failure is no reason to give a saga up."""

    async def set_recovery_attempts(self, saga_id: UUID, attempts: int) -> None:
        raise NotImplementedError("the claim counts the attempts; see reset_recovery_attempts")
