"""Subject: a saga that isn't there is an error in every method, never a silent no-op."""

from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import pytest

from saga_store.errors import SagaNotFoundError
from saga_store.interface import ICheckpointStorage, ISagaStorage
from saga_store.model import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract

_STEP = LogStep("reserve", "act", SagaStepStatus.STARTED)

_CALLS: dict[str, Callable[[ISagaStorage, UUID], Awaitable[object]]] = {
    "update_context": lambda storage, saga_id: storage.update_context(saga_id, {"total": 12}),
    "update_status": lambda storage, saga_id: storage.update_status(saga_id, SagaStatus.RUNNING),
    "log_step": lambda storage, saga_id: storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED),
    "load_saga_state": lambda storage, saga_id: storage.load_saga_state(saga_id),
    "get_step_history": lambda storage, saga_id: storage.get_step_history(saga_id),
}

_CHECKPOINT_CALLS: dict[str, Callable[[ICheckpointStorage, UUID], Awaitable[object]]] = {
    "update_context-version": lambda storage, saga_id: storage.update_context(saga_id, {}, expected_version=1),
    "update_status-version": lambda storage, saga_id: storage.update_status(
        saga_id, SagaStatus.RUNNING, expected_version=1
    ),
    "save-status": lambda storage, saga_id: storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING)),
    "save-context": lambda storage, saga_id: storage.save(Checkpoint(saga_id, context={"total": 12})),
    "save-steps": lambda storage, saga_id: storage.save(Checkpoint(saga_id, steps=[_STEP])),
    "save-attempts": lambda storage, saga_id: storage.save(Checkpoint(saga_id, recovery_attempts=1)),
    "save-version": lambda storage, saga_id: storage.save(Checkpoint(saga_id, steps=[_STEP], expected_version=1)),
    "get_saga": lambda storage, saga_id: storage.get_saga(saga_id),
}


class AbsenceContract(Contract):
    """What the six methods do about a saga that isn't there."""

    @pytest.mark.parametrize("method", _CALLS)
    async def test_missing_saga_is_an_error(self, storage: ISagaStorage, method: str) -> None:
        """Every method raises SagaNotFoundError for a missing saga, with the id that was asked for."""
        saga_id = uuid4()
        with pytest.raises(SagaNotFoundError) as raised:
            await _CALLS[method](storage, saga_id)
        assert raised.value.saga_id == saga_id

    async def test_refused_writes_create_nothing(self, storage: ISagaStorage) -> None:
        """A write to a missing saga leaves nothing behind: neither a saga nor entries for a later one."""
        saga_id = uuid4()
        for call in _CALLS.values():
            with pytest.raises(SagaNotFoundError):
                await call(storage, saga_id)
        await storage.create_saga(saga_id, "order", {"total": 1})
        assert await storage.load_saga_state(saga_id) == (SagaStatus.PENDING, {"total": 1})
        assert await storage.get_step_history(saga_id) == []


class CheckpointAbsenceContract(Contract):
    """What a storage with checkpoints does about a saga that isn't there."""

    @pytest.mark.parametrize("method", _CHECKPOINT_CALLS)
    async def test_missing_saga_is_an_error_in_checkpoints(self, storage: ICheckpointStorage, method: str) -> None:
        """A missing saga is SagaNotFoundError whatever the write, and whether a version was expected or not."""
        saga_id = uuid4()
        with pytest.raises(SagaNotFoundError) as raised:
            await _CHECKPOINT_CALLS[method](storage, saga_id)
        assert raised.value.saga_id == saga_id

    async def test_refused_checkpoints_create_nothing(self, storage: ICheckpointStorage) -> None:
        """A checkpoint of a missing saga leaves nothing behind: neither a saga nor entries for a later one."""
        saga_id = uuid4()
        for call in _CHECKPOINT_CALLS.values():
            with pytest.raises(SagaNotFoundError):
                await call(storage, saga_id)
        assert await storage.save(Checkpoint(saga_id, name="order")) == 1
        assert await storage.get_step_history(saga_id) == []
