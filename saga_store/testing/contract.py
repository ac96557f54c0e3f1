"""What all subjects of the kit share: how a test gets at the storage, and how long it waits for it."""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from itertools import islice
from typing import Any, ClassVar, TypeAlias, cast
from uuid import UUID, uuid4

import pytest

from saga_store.interface import ICheckpointStorage, ISagaStorage
from saga_store.model import Context, SagaLogEntry, SagaStatus

Unit: TypeAlias = Callable[[], AbstractAsyncContextManager[ISagaStorage]]
"""Opens a unit of work: yields a storage, and has committed all that it wrote when the block has been left."""

CheckpointUnit: TypeAlias = Callable[[], AbstractAsyncContextManager[ICheckpointStorage]]
"""A unit of work of a storage that has checkpoints."""

Together: TypeAlias = Callable[[int], Awaitable[list[UUID]]]
"""Draws so many new ids, of sagas that will live together, all of a test: in one shard, if there are several."""

_Test: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


@pytest.mark.asyncio
class Contract:
    """Base of every subject: override ``unit`` in a subclass, and pytest runs the subject on your storage.

    No test needs an empty database: each makes sagas of its own, with new ids and, where they matter, new
    names. No test leaves a unit open while another one writes to the same saga, so row locks never hang it.
    """

    patience: ClassVar[timedelta] = timedelta(seconds=60)
    """How long a test may take before it counts as hung; a slow storage may raise it."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name, test in list(vars(cls).items()):
            if not name.startswith("test"):
                continue
            if hasattr(test, "hypothesis"):
                test.hypothesis.inner_test = _patient(test.hypothesis.inner_test)
            elif inspect.iscoroutinefunction(test):
                setattr(cls, name, _patient(test))

    @pytest.fixture
    def unit(self) -> Unit:
        """Override this: return a callable that opens a unit of work (see ``Unit``)."""
        raise NotImplementedError(
            f"{type(self).__name__} has to override the fixture `unit`: a callable whose result is entered with "
            "`async with`, yields a storage, and commits on leaving"
        )

    @pytest.fixture
    def storage(self, unit: Unit) -> ISagaStorage:
        """A storage each of whose calls is a unit of its own: committed when it returns, and nothing held."""
        return cast("ISagaStorage", UnitPerCall(unit))

    @pytest.fixture
    def together(self, unit: Unit) -> Together:
        """Draw ids of sagas that will live together (see ``Together``): some promises hold between those only."""
        first = uuid4()

        async def together(count: int) -> list[UUID]:
            async with unit() as storage:
                shard_of = getattr(storage, "shard_of", lambda _: None)
                shard = shard_of(first)
                return list(islice((saga_id for saga_id in iter(uuid4, None) if shard_of(saga_id) == shard), count))

        return together


class UnitPerCall:
    """A storage each of whose calls is a unit of its own."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    def __getattr__(self, method: str) -> Callable[..., Awaitable[object]]:
        if method.startswith("_"):  # asked for by whoever prints the storage, such as hypothesis
            raise AttributeError(method)

        async def call(*args: object, **kwargs: object) -> object:
            async with self._unit() as storage:
                result: object = await getattr(storage, method)(*args, **kwargs)
                return result

        return call


def _patient(test: _Test) -> _Test:
    @functools.wraps(test)
    async def guarded(self: Contract, *args: object, **kwargs: object) -> None:
        limit = asyncio.timeout(self.patience.total_seconds())
        try:
            async with limit:
                await test(self, *args, **kwargs)
        except TimeoutError as exc:
            if limit.expired():
                raise AssertionError(
                    f"hung for {self.patience.total_seconds():g} s: the traceback above ends at the call that never "
                    "returned; look for a lock that a write, a refusal or a unit that was left didn't release"
                ) from exc
            raise

    return guarded


async def new_saga(storage: ISagaStorage, context: Context | None = None, *, saga_id: UUID | None = None) -> UUID:
    """Create a saga, under a new id unless one is given, and return its id."""
    saga_id = saga_id or uuid4()
    await storage.create_saga(saga_id, "order", {} if context is None else context)
    return saga_id


async def observe(storage: ISagaStorage, saga_id: UUID) -> tuple[tuple[SagaStatus, Context], list[SagaLogEntry]]:
    """Return all that the six methods tell of a saga, to be compared with a later look."""
    return await storage.load_saga_state(saga_id), await storage.get_step_history(saga_id)
