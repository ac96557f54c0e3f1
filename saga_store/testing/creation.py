"""Subject: sagas come into being, once."""

import os
from uuid import UUID, uuid1, uuid4, uuid5

import pytest

from saga_store.errors import SagaAlreadyExistsError
from saga_store.interface import ISagaStorage
from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract, Unit, new_saga, observe


class CreationContract(Contract):
    """What ``create_saga`` promises."""

    async def test_new_saga_is_pending(self, storage: ISagaStorage) -> None:
        """A new saga is PENDING."""
        saga_id = await new_saga(storage)
        status, _ = await storage.load_saga_state(saga_id)
        assert status is SagaStatus.PENDING

    async def test_new_saga_has_its_context(self, storage: ISagaStorage) -> None:
        """A new saga has the context that it was created with."""
        saga_id = await new_saga(storage, {"total": 12})
        _, context = await storage.load_saga_state(saga_id)
        assert context == {"total": 12}

    async def test_new_saga_has_no_history(self, storage: ISagaStorage) -> None:
        """A new saga's history is empty."""
        saga_id = await new_saga(storage)
        assert await storage.get_step_history(saga_id) == []

    async def test_creation_returns_nothing(self, storage: ISagaStorage) -> None:
        """Creating a saga returns None."""
        result: object = await storage.create_saga(uuid4(), "order", {})  # type: ignore[func-returns-value]  # the test's point
        assert result is None

    async def test_any_uuid_will_do(self, storage: ISagaStorage) -> None:
        """An id may be a UUID of any version, or of none."""
        for saga_id in (uuid1(), uuid4(), uuid5(uuid4(), "order"), UUID(bytes=os.urandom(16))):
            await storage.create_saga(saga_id, "order", {"id": str(saga_id)})
            _, context = await storage.load_saga_state(saga_id)
            assert context == {"id": str(saga_id)}

    async def test_name_of_one_character(self, storage: ISagaStorage) -> None:
        """A name may be a single character."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "o", {})
        assert await storage.get_step_history(saga_id) == []

    async def test_name_of_255_characters(self, storage: ISagaStorage) -> None:
        """A name may have 255 characters, whatever they take in bytes."""
        saga_id = uuid4()
        await storage.create_saga(saga_id, "\N{PACKAGE}" * 255, {})
        assert await storage.get_step_history(saga_id) == []

    async def test_sagas_may_share_a_name(self, storage: ISagaStorage) -> None:
        """A name isn't unique: it says what kind of saga it is."""
        first = await new_saga(storage, {"n": 1})
        second = await new_saga(storage, {"n": 2})
        assert (await storage.load_saga_state(first))[1] == {"n": 1}
        assert (await storage.load_saga_state(second))[1] == {"n": 2}

    async def test_unit_sees_what_it_created(self, unit: Unit) -> None:
        """A unit of work sees the saga that it has just created."""
        async with unit() as storage:
            saga_id = await new_saga(storage, {"total": 12})
            assert await observe(storage, saga_id) == ((SagaStatus.PENDING, {"total": 12}), [])

    async def test_taken_id_is_refused(self, storage: ISagaStorage) -> None:
        """Creating a saga under a taken id raises SagaAlreadyExistsError, which carries the id."""
        saga_id = await new_saga(storage)
        with pytest.raises(SagaAlreadyExistsError) as raised:
            await storage.create_saga(saga_id, "order", {})
        assert raised.value.saga_id == saga_id

    async def test_taken_id_is_refused_within_a_unit(self, unit: Unit) -> None:
        """A unit of work can't create one saga twice either."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            with pytest.raises(SagaAlreadyExistsError):
                await storage.create_saga(saga_id, "order", {})

    async def test_refused_creation_leaves_the_saga(self, storage: ISagaStorage) -> None:
        """The saga that has the id keeps its status, its context and its history."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_status(saga_id, SagaStatus.COMPLETED)
        await storage.log_step(saga_id, "ship", "act", SagaStepStatus.COMPLETED)
        before = await observe(storage, saga_id)
        with pytest.raises(SagaAlreadyExistsError):
            await storage.create_saga(saga_id, "refund", {"total": 0})
        assert await observe(storage, saga_id) == before
