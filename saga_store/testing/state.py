"""Subject: a saga's status and context change, and nothing else does."""

import itertools

from saga_store.interface import ISagaStorage
from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract, Unit, new_saga, observe


class StateContract(Contract):
    """What ``update_status``, ``update_context`` and ``load_saga_state`` promise."""

    async def test_any_status_may_follow_any_other(self, storage: ISagaStorage) -> None:
        """The storage keeps no opinion on transitions: every status may follow every status."""
        saga_id = await new_saga(storage)
        for before, after in itertools.product(SagaStatus, SagaStatus):
            await storage.update_status(saga_id, before)
            await storage.update_status(saga_id, after)
            status, _ = await storage.load_saga_state(saga_id)
            assert status is after

    async def test_status_leaves_the_context(self, storage: ISagaStorage) -> None:
        """A new status leaves the context as it was."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})

    async def test_context_leaves_the_status(self, storage: ISagaStorage) -> None:
        """A new context leaves the status as it was."""
        saga_id = await new_saga(storage)
        await storage.update_status(saga_id, SagaStatus.COMPENSATING)
        await storage.update_context(saga_id, {"total": 12})
        assert await storage.load_saga_state(saga_id) == (SagaStatus.COMPENSATING, {"total": 12})

    async def test_context_is_replaced_whole(self, storage: ISagaStorage) -> None:
        """A new context replaces the old one; nothing is merged."""
        saga_id = await new_saga(storage, {"total": 12, "items": {"a": 1}})
        await storage.update_context(saga_id, {"items": {"b": 2}})
        _, context = await storage.load_saga_state(saga_id)
        assert context == {"items": {"b": 2}}

    async def test_context_may_become_empty(self, storage: ISagaStorage) -> None:
        """An empty context is a context like any other."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_context(saga_id, {})
        _, context = await storage.load_saga_state(saga_id)
        assert context == {}

    async def test_updates_leave_the_history(self, storage: ISagaStorage) -> None:
        """A new status or context adds nothing to the history, and takes nothing from it."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        before = await storage.get_step_history(saga_id)
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        await storage.update_context(saga_id, {"total": 12})
        assert await storage.get_step_history(saga_id) == before

    async def test_updates_leave_other_sagas(self, storage: ISagaStorage) -> None:
        """A write to one saga changes no other."""
        saga_id, other = await new_saga(storage), await new_saga(storage, {"total": 1})
        before = await observe(storage, other)
        await storage.update_status(saga_id, SagaStatus.FAILED)
        await storage.update_context(saga_id, {"total": 2})
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.FAILED)
        assert await observe(storage, other) == before

    async def test_unit_sees_its_updates(self, unit: Unit) -> None:
        """A unit of work sees the updates that it has just made."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            await storage.update_status(saga_id, SagaStatus.RUNNING)
            await storage.update_context(saga_id, {"total": 12})
            assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})

    async def test_last_update_counts(self, unit: Unit) -> None:
        """Of several updates in one unit of work, the last one counts."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            for total in range(5):
                await storage.update_context(saga_id, {"total": total})
        async with unit() as storage:
            assert await storage.load_saga_state(saga_id) == (SagaStatus.PENDING, {"total": 4})

    async def test_reading_changes_nothing(self, storage: ISagaStorage) -> None:
        """Reading a saga any number of times gives the same each time."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        assert await observe(storage, saga_id) == await observe(storage, saga_id)
