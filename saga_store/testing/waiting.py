"""Subject: whoever waits for a saga gets it when it is over, and nobody is in anybody's way."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaNotFoundError, SagaTimeoutError
from saga_store.model import SagaExecution, SagaStatus
from saga_store.run_interface import IRunStorage
from saga_store.testing.contract import Contract, new_saga
from saga_store.testing.run import RunUnit

_LONG = timedelta(hours=1)
_A_MOMENT = timedelta(milliseconds=20)
_FINISHED = (SagaStatus.COMPLETED, SagaStatus.FAILED)


class WaitContract(Contract):
    """What ``wait_for_saga`` promises, if the storage commits its own calls."""

    @pytest.mark.parametrize("status", _FINISHED)
    async def test_a_finished_saga_is_returned(self, storage: IRunStorage, status: SagaStatus) -> None:
        """One that is over already is returned, and be there no time to wait."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_status(saga_id, status)
        saga = await storage.wait_for_saga(saga_id, timedelta())
        assert (saga.id, saga.status, saga.context, saga.version) == (saga_id, status, {"total": 12}, 2)

    @pytest.mark.parametrize("status", _FINISHED)
    async def test_the_end_is_waited_for(self, unit: RunUnit, status: SagaStatus) -> None:
        """Whoever waits gets the saga as it ended, and not as it was in between."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            waiting = await _begin_to_wait(storage, saga_id)
            await storage.update_status(saga_id, SagaStatus.RUNNING)
            await storage.update_context(saga_id, {"total": 13})
            await storage.update_status(saga_id, status)
            saga = await waiting
        assert (saga.id, saga.status, saga.context, saga.version) == (saga_id, status, {"total": 13}, 4)

    async def test_all_who_wait_are_told(self, unit: RunUnit) -> None:
        """Many may wait at once, for many sagas and several for one; each is told of its own."""
        async with unit() as storage:
            saga_ids = [await new_saga(storage, {"number": number}) for number in range(5)]
            waiting = [await _begin_to_wait(storage, saga_id) for saga_id in saga_ids * 2]
            for saga_id in reversed(saga_ids):
                await storage.update_status(saga_id, SagaStatus.COMPLETED)
            sagas = await asyncio.gather(*waiting)
        assert [(saga.id, saga.context["number"]) for saga in sagas] == [
            (saga_id, number) for _ in range(2) for number, saga_id in enumerate(saga_ids)
        ]

    @pytest.mark.parametrize("waits", [timedelta(), _A_MOMENT], ids=str)
    async def test_time_runs_out(self, storage: IRunStorage, waits: timedelta) -> None:
        """A saga that isn't over in time is SagaTimeoutError, a TimeoutError that tells how it stands."""
        saga_id = await new_saga(storage)
        await storage.update_status(saga_id, SagaStatus.COMPENSATING)
        with pytest.raises(TimeoutError) as late:
            await storage.wait_for_saga(saga_id, waits)
        assert isinstance(late.value, SagaTimeoutError)
        assert (late.value.saga_id, late.value.waited) == (saga_id, waits)
        assert late.value.status == SagaStatus.COMPENSATING

    async def test_a_missing_saga_isnt_waited_for(self, storage: IRunStorage) -> None:
        """A saga that isn't there is SagaNotFoundError, however long there is time."""
        with pytest.raises(SagaNotFoundError):
            await storage.wait_for_saga(uuid4(), _LONG)

    async def test_who_gives_up_hurts_nobody(self, unit: RunUnit) -> None:
        """One who is cancelled, or whose time runs out, leaves the others waiting."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            cancelled = await _begin_to_wait(storage, saga_id)
            waiting = await _begin_to_wait(storage, saga_id)
            with pytest.raises(SagaTimeoutError):
                await storage.wait_for_saga(saga_id, _A_MOMENT)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await storage.update_status(saga_id, SagaStatus.FAILED)
            assert (await waiting).status is SagaStatus.FAILED

    async def test_waiting_changes_nothing(self, unit: RunUnit) -> None:
        """Who waits neither writes nor holds anything: the version rises by what others write only."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            waiting = await _begin_to_wait(storage, saga_id)
            async with storage.run(saga_id) as run:
                await run.update_status(saga_id, SagaStatus.COMPLETED)
                await run.commit()
            assert (await waiting).version == 2

    @pytest.mark.parametrize(
        ("saga_id", "waits"),
        [("no id", _LONG), (uuid4(), 5), (uuid4(), None), (uuid4(), timedelta(seconds=-1))],
        ids=["text", "seconds", "none", "negative"],
    )
    async def test_bad_waits_are_refused(self, storage: IRunStorage, saga_id: Any, waits: Any) -> None:  # noqa: ANN401 - what they shouldn't be
        """What is no id, no timedelta or negative is InvalidSagaDataError."""
        with pytest.raises(InvalidSagaDataError):
            await storage.wait_for_saga(saga_id, waits)


class JoinedWaitContract(Contract):
    """What ``wait_for_saga`` does if the storage joins a transaction."""

    async def test_a_transaction_isnt_kept_waiting(self, unit: RunUnit) -> None:
        """It is InvalidSagaDataError, and the transaction goes on: it would be open for as long."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            with pytest.raises(InvalidSagaDataError, match="commits its own calls"):
                await storage.wait_for_saga(saga_id, timedelta())
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
        async with unit() as storage:
            assert (await storage.load_saga_state(saga_id))[0] is SagaStatus.COMPLETED


async def _begin_to_wait(storage: IRunStorage, saga_id: UUID) -> "asyncio.Task[SagaExecution]":
    """Wait in a task that has had time to look once."""
    waiting = asyncio.create_task(storage.wait_for_saga(saga_id, _LONG))
    with pytest.raises(SagaTimeoutError):
        await storage.wait_for_saga(saga_id, _A_MOMENT)
    return waiting
