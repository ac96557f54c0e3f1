"""Writes that take a saga's lease and leave it."""

from uuid import UUID

from saga_store.interface import ISagaStorage
from saga_store.model import Checkpoint, Context, LogStep, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.storage import SagaStorage
from saga_store.write import Lease, checked


class UnderLease(ISagaStorage):
    """What the engine writes past its runs, as when it was cancelled and compensates: each call takes the lease.

    It is left to expire, for the next call comes soon, and the last one makes the saga FAILED, which ends it.
    """

    def __init__(self, storage: SagaStorage, lease: Lease) -> None:
        self._storage = storage
        self._lease = lease

    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        await self._save(Checkpoint(saga_id, name=name, context=context))

    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        await self._save(Checkpoint(saga_id, context=context, expected_version=expected_version))

    async def update_status(self, saga_id: UUID, status: SagaStatus, *, expected_version: int | None = None) -> None:
        await self._save(Checkpoint(saga_id, status=status, expected_version=expected_version))

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: SagaStepStatus,
        details: str | None = None,
    ) -> None:
        await self._save(Checkpoint(saga_id, steps=[LogStep(step_name, action, status, details)]))

    async def load_saga_state(self, saga_id: UUID) -> tuple[SagaStatus, Context]:
        return await self._storage.load_saga_state(saga_id)

    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        return await self._storage.get_step_history(saga_id)

    async def _save(self, checkpoint: Checkpoint) -> None:
        await self._storage._write(checked(checkpoint)._replace(lease=self._lease))  # noqa: SLF001 - as a run does
