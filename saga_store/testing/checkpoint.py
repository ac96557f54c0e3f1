"""Subject: checkpoints, which are stored whole or not at all."""

import itertools
from uuid import uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaAlreadyExistsError
from saga_store.interface import ICheckpointStorage
from saga_store.model import Checkpoint, Context, LogStep, SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract, new_saga, observe

# In no order that a sort by name could restore.
_STEPS = [LogStep(f"step-{n * 7 % 200:03}", "act", SagaStepStatus.STARTED, f"{n}") for n in range(200)]


class CheckpointContract(Contract):
    """What ``save`` promises."""

    async def test_everything_at_once(self, storage: ICheckpointStorage) -> None:
        """One checkpoint may create a saga with a status, a context, attempts and a history."""
        saga_id = uuid4()
        checkpoint = Checkpoint(
            saga_id,
            name="order",
            status=SagaStatus.RUNNING,
            context={"total": 12},
            steps=[LogStep("pay", "compensate", SagaStepStatus.FAILED, "no such card")],
            recovery_attempts=3,
        )
        assert await storage.save(checkpoint) == 1
        saga = await storage.get_saga(saga_id)
        assert (saga.name, saga.status, saga.context) == ("order", SagaStatus.RUNNING, {"total": 12})
        assert (saga.version, saga.recovery_attempts) == (1, 3)
        [entry] = await storage.get_step_history(saga_id)
        assert (entry.saga_id, entry.step_name, entry.action) == (saga_id, "pay", "compensate")
        assert (entry.status, entry.details) == (SagaStepStatus.FAILED, "no such card")

    async def test_name_alone(self, storage: ICheckpointStorage) -> None:
        """A name alone creates a saga that is PENDING, with an empty context and history."""
        saga_id = uuid4()
        assert await storage.save(Checkpoint(saga_id, name="order")) == 1
        assert await observe(storage, saga_id) == ((SagaStatus.PENDING, {}), [])
        assert (await storage.get_saga(saga_id)).recovery_attempts == 0

    async def test_update_at_once(self, storage: ICheckpointStorage) -> None:
        """One checkpoint may give an existing saga a status, a context, attempts and entries."""
        saga_id = await new_saga(storage, {"total": 1})
        await storage.log_step(saga_id, "reserve", "act", SagaStepStatus.STARTED)
        version = await storage.save(
            Checkpoint(
                saga_id,
                status=SagaStatus.COMPENSATING,
                context={"total": 12},
                steps=(LogStep("pay", "act", SagaStepStatus.FAILED),),
                recovery_attempts=2,
            )
        )
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.context) == (SagaStatus.COMPENSATING, {"total": 12})
        assert (saga.version, saga.recovery_attempts) == (version, 2)
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == ["reserve", "pay"]

    async def test_what_isnt_given_stays(self, storage: ICheckpointStorage) -> None:
        """What a checkpoint doesn't give stays as it was: name, status, context, attempts."""
        saga_id = uuid4()
        await storage.save(
            Checkpoint(saga_id, name="refund", status=SagaStatus.RUNNING, context={"total": 12}, recovery_attempts=2)
        )
        await storage.save(Checkpoint(saga_id, status=SagaStatus.COMPENSATING))
        await storage.save(Checkpoint(saga_id, context={"total": 13}))
        await storage.save(Checkpoint(saga_id, steps=_STEPS[:1]))
        saga = await storage.get_saga(saga_id)
        assert (saga.name, saga.status, saga.context) == ("refund", SagaStatus.COMPENSATING, {"total": 13})
        assert saga.recovery_attempts == 2

    async def test_attempts_may_go_back(self, storage: ICheckpointStorage) -> None:
        """Attempts are set, not added: 0 is a number like any other."""
        saga_id = await new_saga(storage)
        for attempts in (4, 0, 2**31 - 1):
            await storage.save(Checkpoint(saga_id, recovery_attempts=attempts))
            assert (await storage.get_saga(saga_id)).recovery_attempts == attempts

    async def test_empty_context_is_given(self, storage: ICheckpointStorage) -> None:
        """An empty context is a context, and not the absence of one."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.save(Checkpoint(saga_id, context={}))
        assert (await storage.get_saga(saga_id)).context == {}

    async def test_checkpoint_contexts_round_trip(self, storage: ICheckpointStorage) -> None:
        """A checkpoint's context comes back exactly, when it creates a saga and when it changes one."""
        context: Context = {"z": [1e16, -0.0, 5e-324, 2**70, 1.0, True, None], "a\0": "\ud800\0", "": {}}
        created, changed = uuid4(), await new_saga(storage)
        await storage.save(Checkpoint(created, name="order", context=context))
        await storage.save(Checkpoint(changed, context=context))
        for saga_id in (created, changed):
            assert repr((await storage.get_saga(saga_id)).context) == repr(context)

    async def test_steps_keep_their_order(self, storage: ICheckpointStorage) -> None:
        """Entries of one checkpoint, which may all have the same time, are read in the order given."""
        saga_id = uuid4()
        await storage.save(Checkpoint(saga_id, name="order", steps=_STEPS))
        await storage.save(Checkpoint(saga_id, steps=_STEPS))
        history = await storage.get_step_history(saga_id)
        assert [entry.details for entry in history] == [f"{n}" for n in range(200)] * 2
        assert all(earlier.id < later.id for earlier, later in itertools.pairwise(history))

    async def test_checkpoint_is_copied_in(self, storage: ICheckpointStorage) -> None:
        """What the caller does to a checkpoint's context or steps afterwards changes nothing stored."""
        saga_id = uuid4()
        context: Context = {"items": [1]}
        steps = _STEPS[:2]
        await storage.save(Checkpoint(saga_id, name="order", context=context, steps=steps))
        context["items"].append(2)
        steps.clear()
        assert (await storage.get_saga(saga_id)).context == {"items": [1]}
        assert len(await storage.get_step_history(saga_id)) == 2

    async def test_checkpoint_may_be_saved_again(self, storage: ICheckpointStorage) -> None:
        """A checkpoint isn't used up by saving it."""
        saga_id = await new_saga(storage)
        checkpoint = Checkpoint(saga_id, status=SagaStatus.RUNNING, steps=_STEPS[:2])
        assert [await storage.save(checkpoint) for _ in range(3)] == [2, 3, 4]
        assert len(await storage.get_step_history(saga_id)) == 6

    async def test_taken_id_is_refused_whole(self, storage: ICheckpointStorage) -> None:
        """A checkpoint that creates under a taken id leaves the saga alone, and adds none of its steps."""
        saga_id = await new_saga(storage, {"total": 1})
        before = await observe(storage, saga_id), await storage.get_saga(saga_id)
        with pytest.raises(SagaAlreadyExistsError) as raised:
            await storage.save(
                Checkpoint(saga_id, name="refund", status=SagaStatus.FAILED, context={"total": 2}, steps=_STEPS[:1])
            )
        assert raised.value.saga_id == saga_id
        assert (await observe(storage, saga_id), await storage.get_saga(saga_id)) == before

    async def test_bad_step_is_refused_whole(self, storage: ICheckpointStorage) -> None:
        """One bad step among good ones, and nothing of the checkpoint is written, not even the good ones."""
        saga_id = await new_saga(storage)
        before = await observe(storage, saga_id), await storage.get_saga(saga_id)
        steps = [*_STEPS[:2], LogStep("", "act", SagaStepStatus.STARTED), *_STEPS[2:4]]
        with pytest.raises(InvalidSagaDataError):
            await storage.save(Checkpoint(saga_id, status=SagaStatus.FAILED, steps=steps))
        assert (await observe(storage, saga_id), await storage.get_saga(saga_id)) == before
