"""Subject: a history that is read piece by piece is the history."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias
from uuid import uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaNotFoundError
from saga_store.interface import IHistoryStorage, ISagaStorage
from saga_store.model import SagaStepStatus
from saga_store.testing.contract import Contract, new_saga

HistoryUnit: TypeAlias = Callable[[], AbstractAsyncContextManager[IHistoryStorage]]
"""A unit of work of a storage that reads histories piece by piece."""

_STARTED = SagaStepStatus.STARTED
_BAD_SIZES: list[Any] = [0, -1, 2**31, 1.0, True, "10", None]


class HistoryStreamContract(Contract):
    """What ``iter_step_history`` promises."""

    async def test_stream_is_the_history(self, unit: HistoryUnit) -> None:
        """Whatever the size of the batches, the stream yields what the history holds, in its order."""
        for length in range(5):
            async with unit() as storage:
                saga_id = await new_saga(storage)
                for n in range(length):
                    await storage.log_step(saga_id, f"step-{n * 7 % 5}", "act", _STARTED, str(n))
            async with unit() as storage:
                history = await storage.get_step_history(saga_id)
                for size in (1, 2, 3, 4, 5, 1000):
                    stream = storage.iter_step_history(saga_id, batch_size=size)
                    assert [entry async for entry in stream] == history, (length, size)
                assert [entry async for entry in storage.iter_step_history(saga_id)] == history

    async def test_streams_are_apart(self, unit: HistoryUnit) -> None:
        """Each saga's stream has its own entries, even if another saga's came in between."""
        async with unit() as storage:
            saga_id, other = await new_saga(storage), await new_saga(storage)
        for name in ("reserve", "pay", "ship"):
            for one in (saga_id, other):
                async with unit() as storage:
                    await storage.log_step(one, f"{name} {one}", "act", _STARTED)
        async with unit() as storage:
            for one in (saga_id, other):
                names = [entry.step_name async for entry in storage.iter_step_history(one, batch_size=2)]
                assert names == [f"{name} {one}" for name in ("reserve", "pay", "ship")]

    async def test_unit_streams_its_own_entries(self, unit: HistoryUnit, storage: ISagaStorage) -> None:
        """A unit of work that streams sees what it has just written, after what was there."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "reserve", "act", _STARTED)
        async with unit() as bound:
            await bound.log_step(saga_id, "pay", "act", _STARTED)
            names = [entry.step_name async for entry in bound.iter_step_history(saga_id, batch_size=1)]
        assert names == ["reserve", "pay"]

    async def test_stream_goes_on_while_others_append(self, unit: HistoryUnit, storage: ISagaStorage) -> None:
        """What is appended between two batches may be seen; there are no gaps, and nothing is seen twice."""
        saga_id = await new_saga(storage)
        for n in range(4):
            await storage.log_step(saga_id, f"step-{n}", "act", _STARTED)
        seen = []
        async with unit() as bound:
            async for entry in bound.iter_step_history(saga_id, batch_size=2):
                seen.append(entry)
                if len(seen) <= 4:
                    await storage.log_step(saga_id, f"more-{len(seen)}", "act", _STARTED)
        assert len(seen) >= 4
        assert seen == (await storage.get_step_history(saga_id))[: len(seen)]

    async def test_stream_may_be_left(self, unit: HistoryUnit) -> None:
        """Whoever stops in the middle may go on working, and begin again."""
        async with unit() as storage:
            saga_id = await new_saga(storage)
            for n in range(3):
                await storage.log_step(saga_id, f"step-{n}", "act", _STARTED)
            async for entry in storage.iter_step_history(saga_id, batch_size=2):
                assert entry.step_name == "step-0"
                break
            await storage.log_step(saga_id, "step-3", "act", _STARTED)
            names = [entry.step_name async for entry in storage.iter_step_history(saga_id, batch_size=2)]
        assert names == ["step-0", "step-1", "step-2", "step-3"]

    async def test_missing_saga_has_no_stream(self, unit: HistoryUnit) -> None:
        """A stream of a missing saga is an error, not an empty one."""
        missing = uuid4()
        async with unit() as storage:
            with pytest.raises(SagaNotFoundError) as raised:
                _ = [entry async for entry in storage.iter_step_history(missing)]
        assert raised.value.saga_id == missing

    async def test_impossible_batches_are_refused(self, unit: HistoryUnit) -> None:
        """A batch size that is no int, or less than 1, is bad input, even if the saga is missing."""
        async with unit() as storage:
            for size in _BAD_SIZES:
                with pytest.raises(InvalidSagaDataError) as raised:
                    _ = [entry async for entry in storage.iter_step_history(uuid4(), batch_size=size)]
                assert raised.value.field == "batch_size", size

    async def test_stream_refuses_text_ids(self, unit: HistoryUnit) -> None:
        """An id that is no UUID is bad input."""
        async with unit() as storage:
            bad: Any = str(uuid4())
            with pytest.raises(InvalidSagaDataError) as raised:
                _ = [entry async for entry in storage.iter_step_history(bad)]
        assert raised.value.field == "saga_id"
