"""Subject: a saga's history is kept in the order in which it was written, and to the letter."""

import itertools
from typing import get_args

from saga_store.interface import ISagaStorage
from saga_store.model import SagaStatus, SagaStepStatus, StepAction
from saga_store.testing.contract import Contract, Together, Unit, new_saga

# In no order that a sort by name could restore.
_NAMES = [f"step-{n * 7 % 20:02}" for n in range(20)]


class HistoryContract(Contract):
    """What ``log_step`` and ``get_step_history`` promise."""

    async def test_entry_has_all_that_was_logged(self, storage: ISagaStorage) -> None:
        """An entry has the saga's id, the step's name, action and status, and the details."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "compensate", SagaStepStatus.FAILED, "card declined")
        [entry] = await storage.get_step_history(saga_id)
        assert (entry.saga_id, entry.step_name, entry.action) == (saga_id, "pay", "compensate")
        assert (entry.status, entry.details) == (SagaStepStatus.FAILED, "card declined")

    async def test_details_are_optional(self, storage: ISagaStorage) -> None:
        """An entry without details has None."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        [entry] = await storage.get_step_history(saga_id)
        assert entry.details is None

    async def test_empty_details_stay_empty(self, storage: ISagaStorage) -> None:
        """Details that are an empty text don't become None."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.FAILED, "")
        [entry] = await storage.get_step_history(saga_id)
        assert entry.details == ""

    async def test_every_action_and_status(self, storage: ISagaStorage) -> None:
        """Every action may have every status, and each comes back as a member of its type."""
        saga_id = await new_saga(storage)
        logged = list(itertools.product(get_args(StepAction), SagaStepStatus))
        for action, status in logged:
            await storage.log_step(saga_id, "pay", action, status)
        history = await storage.get_step_history(saga_id)
        assert [(entry.action, entry.status) for entry in history] == logged
        assert all(isinstance(entry.status, SagaStepStatus) for entry in history)

    async def test_step_name_of_255_characters(self, storage: ISagaStorage) -> None:
        """A step's name may have 255 characters of any script, and comes back to the letter."""
        saga_id = await new_saga(storage)
        names = ["\N{PACKAGE}" * 255, "é" * 255, "e\N{COMBINING ACUTE ACCENT}", " pay\t\r\n", "%s :name $1 {} '\"\\"]
        for name in names:
            await storage.log_step(saga_id, name, "act", SagaStepStatus.STARTED)
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == names

    async def test_details_of_any_length(self, storage: ISagaStorage) -> None:
        """Details may be any text of any length, and come back to the letter."""
        saga_id = await new_saga(storage)
        texts = ["Traceback:\n  \N{PILE OF POO}" * 10_000, " \t\r\n ", "%s :name $1 {} '\"\\ \\u0000", "null"]
        for text in texts:
            await storage.log_step(saga_id, "pay", "act", SagaStepStatus.FAILED, text)
        assert [entry.details for entry in await storage.get_step_history(saga_id)] == texts

    async def test_order_across_units(self, storage: ISagaStorage) -> None:
        """Entries logged one after the other are read in that order."""
        saga_id = await new_saga(storage)
        for name in _NAMES:
            await storage.log_step(saga_id, name, "act", SagaStepStatus.STARTED)
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == _NAMES

    async def test_order_within_a_unit(self, unit: Unit) -> None:
        """Entries of one unit of work, which may all have the same time, are read in the order of writing."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            for name in _NAMES:
                await storage.log_step(saga_id, name, "act", SagaStepStatus.STARTED)
        async with unit() as storage:
            assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == _NAMES

    async def test_unit_sees_its_entries(self, unit: Unit) -> None:
        """A unit of work sees the entries that it has just logged, after those that were there."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        async with unit() as storage:
            await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.COMPLETED)
            history = await storage.get_step_history(saga_id)
        assert [entry.status for entry in history] == [SagaStepStatus.STARTED, SagaStepStatus.COMPLETED]

    async def test_ids_increase(self, storage: ISagaStorage) -> None:
        """Each entry's id is an int that is greater than the one before."""
        saga_id, other = await new_saga(storage), await new_saga(storage)
        for name in _NAMES:
            await storage.log_step(saga_id, name, "act", SagaStepStatus.STARTED)
            await storage.log_step(other, name, "act", SagaStepStatus.STARTED)
        ids = [entry.id for entry in await storage.get_step_history(saga_id)]
        assert all(type(entry_id) is int for entry_id in ids)
        assert all(earlier < later for earlier, later in itertools.pairwise(ids))

    async def test_ids_belong_to_one_entry(self, storage: ISagaStorage, together: Together) -> None:
        """No two entries have the same id, be they of one saga or of two that live together."""
        saga_id, other = await together(2)
        for each in (saga_id, other):
            await storage.create_saga(each, "order", {})
        for name in _NAMES:
            await storage.log_step(saga_id, name, "act", SagaStepStatus.STARTED)
            await storage.log_step(other, name, "act", SagaStepStatus.STARTED)
        history = await storage.get_step_history(saga_id) + await storage.get_step_history(other)
        assert len({entry.id for entry in history}) == 2 * len(_NAMES)

    async def test_times_are_aware(self, storage: ISagaStorage) -> None:
        """An entry's time has a time zone."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        [entry] = await storage.get_step_history(saga_id)
        assert entry.created_at.utcoffset() is not None

    async def test_same_entry_twice(self, storage: ISagaStorage) -> None:
        """The same entry logged twice is two entries."""
        saga_id = await new_saga(storage)
        for _ in range(2):
            await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED, "again")
        assert len(await storage.get_step_history(saga_id)) == 2

    async def test_entries_never_change(self, storage: ISagaStorage) -> None:
        """An entry, once read, reads the same ever after: ids, times and all."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        before = await storage.get_step_history(saga_id)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.COMPLETED)
        await storage.update_status(saga_id, SagaStatus.COMPLETED)
        assert (await storage.get_step_history(saga_id))[:1] == before

    async def test_logging_leaves_the_state(self, storage: ISagaStorage) -> None:
        """An entry, even one of a failure, changes neither status nor context."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.FAILED)
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})

    async def test_finished_saga_takes_entries(self, storage: ISagaStorage) -> None:
        """Entries may be added to a saga of any status."""
        saga_id = await new_saga(storage)
        for status in SagaStatus:
            await storage.update_status(saga_id, status)
            await storage.log_step(saga_id, status.value, "act", SagaStepStatus.STARTED)
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == list(SagaStatus)

    async def test_histories_are_apart(self, storage: ISagaStorage) -> None:
        """Each saga has a history of its own."""
        saga_id, other = await new_saga(storage), await new_saga(storage)
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        await storage.log_step(other, "pay", "act", SagaStepStatus.STARTED)
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == ["reserve"]
        assert [entry.step_name for entry in await storage.get_step_history(other)] == ["pay"]

    async def test_history_is_a_copy(self, storage: ISagaStorage) -> None:
        """What the caller does to the list changes nothing stored."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        (await storage.get_step_history(saga_id)).clear()
        assert len(await storage.get_step_history(saga_id)) == 1

    async def test_long_history(self, unit: Unit) -> None:
        """A history of hundreds of entries is read whole."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            for n in range(300):
                await storage.log_step(saga_id, f"step-{n}", "act", SagaStepStatus.STARTED)
        async with unit() as storage:
            names = [entry.step_name for entry in await storage.get_step_history(saga_id)]
        assert names == [f"step-{n}" for n in range(300)]
