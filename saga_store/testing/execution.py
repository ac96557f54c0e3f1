"""Subject: a saga's whole row."""

from dataclasses import replace
from uuid import UUID, uuid4

from saga_store.interface import ICheckpointStorage
from saga_store.model import Context, SagaStatus, SagaStepStatus
from saga_store.testing.contract import CheckpointUnit, Contract, new_saga


class ExecutionContract(Contract):
    """What ``get_saga`` promises."""

    async def test_new_sagas_row(self, storage: ICheckpointStorage) -> None:
        """A new saga's row has what it was created with, version 1, no attempts and no lease."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "order", {"total": 12})
        saga = await storage.get_saga(saga_id)
        assert (saga.id, saga.name, saga.status, saga.context) == (saga_id, "order", SagaStatus.PENDING, {"total": 12})
        assert (saga.version, saga.recovery_attempts) == (1, 0)
        assert (saga.lease_owner, saga.lease_expires_at) == (None, None)

    async def test_types(self, storage: ICheckpointStorage) -> None:
        """The id is a UUID, the status a SagaStatus, and version and attempts are ints."""
        saga = await storage.get_saga(await new_saga(storage))
        assert isinstance(saga.id, UUID)
        assert isinstance(saga.status, SagaStatus)
        assert (type(saga.version), type(saga.recovery_attempts)) == (int, int)

    async def test_names_round_trip(self, storage: ICheckpointStorage) -> None:
        """A name comes back to the letter, be it 255 characters of any script."""
        for name in ("o", "\N{PACKAGE}" * 255, "é", "e\N{COMBINING ACUTE ACCENT}", " order\t\r\n", "%s :n $1 {} '\"\\"):
            saga_id = uuid4()
            await storage.create_saga(saga_id, name, {})
            assert (await storage.get_saga(saga_id)).name == name

    async def test_row_times_are_aware(self, storage: ICheckpointStorage) -> None:
        """Both times of a saga have a time zone, and it wasn't updated before it was created."""
        saga = await storage.get_saga(await new_saga(storage))
        assert saga.created_at.utcoffset() is not None
        assert saga.updated_at.utcoffset() is not None
        assert saga.created_at <= saga.updated_at

    async def test_updates_keep_the_rest(self, storage: ICheckpointStorage) -> None:
        """A new status changes only the status, the version and the time of the update."""
        saga_id = await new_saga(storage, {"total": 12})
        before = await storage.get_saga(saga_id)
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        after = await storage.get_saga(saga_id)
        assert after == replace(before, status=SagaStatus.RUNNING, version=2, updated_at=after.updated_at)
        assert after.updated_at >= before.updated_at

    async def test_entries_leave_the_row(self, storage: ICheckpointStorage) -> None:
        """An entry in the history leaves the whole row as it was: version, time of the update and all."""
        saga_id = await new_saga(storage, {"total": 12})
        before = await storage.get_saga(saga_id)
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        assert await storage.get_saga(saga_id) == before

    async def test_row_agrees_with_the_state(self, storage: ICheckpointStorage) -> None:
        """``get_saga`` and ``load_saga_state`` tell the same status and context."""
        saga_id = await new_saga(storage, {"b": 1.0, "a": -0.0})
        await storage.update_status(saga_id, SagaStatus.FAILED)
        saga = await storage.get_saga(saga_id)
        assert repr((saga.status, saga.context)) == repr(await storage.load_saga_state(saga_id))

    async def test_row_is_a_copy(self, storage: ICheckpointStorage) -> None:
        """What the caller does to a row's context changes nothing stored."""
        saga_id = await new_saga(storage, {"items": [{"sku": 1}]})
        context: Context = (await storage.get_saga(saga_id)).context
        context["items"][0]["sku"] = 2
        assert (await storage.get_saga(saga_id)).context == {"items": [{"sku": 1}]}

    async def test_unit_sees_the_row(self, unit: CheckpointUnit) -> None:
        """A unit of work sees the row that it has just written."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            await storage.update_status(saga_id, SagaStatus.RUNNING)
            saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.version) == (SagaStatus.RUNNING, 2)
