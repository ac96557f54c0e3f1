"""Subject: a saga is begun once, whoever asks for it how often."""

import asyncio
import math
from typing import Any
from uuid import uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaAlreadyExistsError, SagaNotFoundError
from saga_store.model import SagaStart, SagaStatus
from saga_store.run_interface import IRunStorage
from saga_store.testing.contract import Contract, new_saga, observe
from saga_store.testing.run import RunUnit

_CALLERS = 12
_BAD_STARTS: dict[str, tuple[Any, Any, Any]] = {
    "an id that is text": (str(uuid4()), "order", {}),
    "an empty name": (uuid4(), "", {}),
    "a name that is none": (uuid4(), None, {}),
    "a context that is no dict": (uuid4(), "order", [1]),
    "a context that JSON can't hold": (uuid4(), "order", {"total": math.nan}),
}


class StartContract(Contract):
    """What ``get_or_create_saga`` promises."""

    async def test_a_new_saga_is_created(self, storage: IRunStorage) -> None:
        """A saga that isn't there is created, and the caller is told so, and how it stands."""
        saga_id = uuid4()
        start = await storage.get_or_create_saga(saga_id, "order", {"total": 12})
        assert start == SagaStart(
            created=True, name="order", status=SagaStatus.PENDING, context={"total": 12}, version=1
        )
        assert await observe(storage, saga_id) == ((SagaStatus.PENDING, {"total": 12}), [])

    async def test_a_saga_that_is_there_is_left(self, storage: IRunStorage) -> None:
        """One that is there is returned as it stands, whatever context it was asked for with, and left so."""
        saga_id = await new_saga(storage, {"total": 12})
        await storage.update_status(saga_id, SagaStatus.RUNNING)
        await storage.update_context(saga_id, {"total": 13})
        before = await observe(storage, saga_id)
        start = await storage.get_or_create_saga(saga_id, "order", {"total": 12})
        assert start == SagaStart(
            created=False, name="order", status=SagaStatus.RUNNING, context={"total": 13}, version=3
        )
        assert await observe(storage, saga_id) == before

    async def test_one_of_another_name_is_refused(self, storage: IRunStorage) -> None:
        """An id that a saga of another name has is an error, which tells that name; the saga is left as it was."""
        saga_id = await new_saga(storage, {"total": 12})
        before = await observe(storage, saga_id)
        with pytest.raises(SagaAlreadyExistsError) as refused:
            await storage.get_or_create_saga(saga_id, "refund", {})
        assert (refused.value.saga_id, refused.value.name) == (saga_id, "order")
        assert await observe(storage, saga_id) == before

    async def test_started_contexts_are_copied(self, storage: IRunStorage) -> None:
        """What a caller does to the context given, or to the one returned, changes nothing stored."""
        saga_id, context = uuid4(), {"items": [1]}
        for start in [await storage.get_or_create_saga(saga_id, "order", context) for _ in range(2)]:
            start.context["items"].append(2)
        context["items"].append(3)
        assert (await storage.load_saga_state(saga_id))[1] == {"items": [1]}

    async def test_one_caller_creates_it(self, storage: IRunStorage) -> None:
        """Of many callers with one id exactly one is told that it has created the saga, and all see the same one."""
        saga_id = uuid4()
        starts = await asyncio.gather(
            *(storage.get_or_create_saga(saga_id, "order", {"caller": caller}) for caller in range(_CALLERS))
        )
        [creator] = [caller for caller, start in enumerate(starts) if start.created]
        assert {(start.status, start.context["caller"], start.version) for start in starts} == {
            (SagaStatus.PENDING, creator, 1)
        }

    async def test_a_start_is_seen_in_its_unit(self, unit: RunUnit) -> None:
        """A unit of work that has created a saga gets it when it asks again."""
        async with unit() as storage:
            saga_id = uuid4()
            first = await storage.get_or_create_saga(saga_id, "order", {})
            await storage.update_status(saga_id, SagaStatus.COMPLETED)
            second = await storage.get_or_create_saga(saga_id, "order", {})
        assert (first.created, second.created) == (True, False)
        assert (second.status, second.version) == (SagaStatus.COMPLETED, 2)

    @pytest.mark.parametrize("bad", _BAD_STARTS)
    async def test_a_bad_start_is_refused(self, storage: IRunStorage, bad: str) -> None:
        """Bad input raises InvalidSagaDataError, and nothing is created."""
        saga_id, name, context = _BAD_STARTS[bad]
        with pytest.raises(InvalidSagaDataError):
            await storage.get_or_create_saga(saga_id, name, context)
        if not isinstance(saga_id, str):
            with pytest.raises(SagaNotFoundError):
                await storage.load_saga_state(saga_id)
