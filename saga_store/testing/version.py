"""Subject: versions, which tell a late writer that somebody else wrote in between."""

from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest

from saga_store.errors import SagaConcurrencyError
from saga_store.interface import ICheckpointStorage
from saga_store.model import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.testing.contract import CheckpointUnit, Contract, new_saga, observe

_STEP = LogStep("reserve", "act", SagaStepStatus.STARTED)

_CHANGES: dict[str, Callable[[ICheckpointStorage, UUID, int | None], Awaitable[object]]] = {
    "update_context": lambda storage, saga_id, version: storage.update_context(
        saga_id, {"total": 12}, expected_version=version
    ),
    "update_status": lambda storage, saga_id, version: storage.update_status(
        saga_id, SagaStatus.RUNNING, expected_version=version
    ),
    "save-status": lambda storage, saga_id, version: storage.save(
        Checkpoint(saga_id, status=SagaStatus.RUNNING, expected_version=version)
    ),
    "save-context": lambda storage, saga_id, version: storage.save(
        Checkpoint(saga_id, context={"total": 12}, expected_version=version)
    ),
    "save-attempts": lambda storage, saga_id, version: storage.save(
        Checkpoint(saga_id, recovery_attempts=1, expected_version=version)
    ),
    "save-all": lambda storage, saga_id, version: storage.save(
        Checkpoint(
            saga_id,
            status=SagaStatus.RUNNING,
            context={"total": 12},
            steps=[_STEP],
            recovery_attempts=1,
            expected_version=version,
        )
    ),
}

_WRITES = _CHANGES | {
    "save-steps": lambda storage, saga_id, version: storage.save(
        Checkpoint(saga_id, steps=[_STEP], expected_version=version)
    )
}


class VersionContract(Contract):
    """What versions count, and what ``expected_version`` refuses."""

    @pytest.mark.parametrize("write", _CHANGES)
    async def test_change_raises_the_version_by_one(self, storage: ICheckpointStorage, write: str) -> None:
        """A write that changes status, context or attempts raises the version by one, however much it changes."""
        saga_id = await new_saga(storage)
        await _CHANGES[write](storage, saga_id, None)
        assert (await storage.get_saga(saga_id)).version == 2

    async def test_same_value_counts(self, storage: ICheckpointStorage) -> None:
        """Writing the status and the context that are there already counts as a change."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_status(saga_id, SagaStatus.PENDING)
        await storage.update_context(saga_id, {"total": 12})
        assert (await storage.get_saga(saga_id)).version == 3

    async def test_entries_leave_the_version(self, storage: ICheckpointStorage) -> None:
        """Entries alone leave the version, and ``save`` returns it."""
        saga_id = await new_saga(storage)
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        assert await storage.save(Checkpoint(saga_id, steps=[_STEP, _STEP])) == 2
        assert (await storage.get_saga(saga_id)).version == 2

    async def test_save_returns_the_version(self, storage: ICheckpointStorage) -> None:
        """``save`` returns the version that the saga has afterwards."""
        saga_id = await new_saga(storage)
        for version in range(2, 7):
            assert await storage.save(Checkpoint(saga_id, context={"version": version})) == version
            assert (await storage.get_saga(saga_id)).version == version

    async def test_versions_count_within_a_unit(self, unit: CheckpointUnit) -> None:
        """Writes of one unit of work count one by one, and may expect each other's versions."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            for version in range(1, 6):
                checkpoint = Checkpoint(saga_id, context={"after": version}, expected_version=version)
                assert await storage.save(checkpoint) == version + 1
        async with unit() as storage:
            assert (await storage.get_saga(saga_id)).version == 6

    @pytest.mark.parametrize("write", _WRITES)
    async def test_expected_version_passes(self, storage: ICheckpointStorage, write: str) -> None:
        """A write that expects the version that is there goes through."""
        saga_id = await new_saga(storage)
        before = await observe(storage, saga_id), await storage.get_saga(saga_id)
        await _WRITES[write](storage, saga_id, 1)
        assert (await observe(storage, saga_id), await storage.get_saga(saga_id)) != before

    @pytest.mark.parametrize("write", _WRITES)
    async def test_other_version_is_refused(self, storage: ICheckpointStorage, write: str) -> None:
        """A write that expects another version, older or newer, is refused whole: row and history stay."""
        saga_id = await new_saga(storage)
        await storage.update_context(saga_id, {"total": 1})
        before = await observe(storage, saga_id), await storage.get_saga(saga_id)
        for expected in (1, 3, 0, -1, 2**40):
            with pytest.raises(SagaConcurrencyError) as raised:
                await _WRITES[write](storage, saga_id, expected)
            assert (raised.value.saga_id, raised.value.expected, raised.value.actual) == (saga_id, expected, 2)
            assert (await observe(storage, saga_id), await storage.get_saga(saga_id)) == before

    async def test_entries_expect_without_counting(self, storage: ICheckpointStorage) -> None:
        """A checkpoint of entries alone may expect a version any number of times: it doesn't raise it."""
        saga_id = await new_saga(storage)
        for _ in range(3):
            assert await storage.save(Checkpoint(saga_id, steps=[_STEP], expected_version=1)) == 1
        assert len(await storage.get_step_history(saga_id)) == 3

    async def test_versions_are_apart(self, storage: ICheckpointStorage) -> None:
        """Each saga has a version of its own."""
        saga_id, other = await new_saga(storage), await new_saga(storage)
        await storage.update_context(saga_id, {})
        assert (await storage.get_saga(other)).version == 1
