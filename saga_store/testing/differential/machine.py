"""The state machine that takes every step in both worlds, and compares what comes of it."""

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from operator import methodcaller
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from saga_store.model import SagaExecution
from saga_store.storage import SagaStorage
from saga_store.testing.claim import Age
from saga_store.testing.commit_into import Joinable
from saga_store.testing.differential.comparison import Result, any_result_of, result_of, short
from saga_store.testing.differential.strategies import OWN_NAMES, PRESENT, SAGAS
from saga_store.testing.differential.world import Opener, Twin, World, world

# All that is stored is compared after so many steps, and at the end.
_STEPS_BETWEEN_LOOKS = 10

_T = TypeVar("_T")


@dataclass(slots=True)
class Tally:
    """How much has been tried."""

    schedules: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Arena:
    """What all schedules of a test share.

    Attributes:
        loop: Where both worlds live; the machine runs in a thread of its own, for hypothesis is synchronous.
        opener: Opens a unit of the storage under test.
        age: Moves one of its sagas back in time.
        joins: Whether its units are transactions of the caller's.
        patience: How long a step may take before it counts as hung.
        tally: How much has been tried so far.
        joinable: Opens a transaction that runs of the storage under test may commit into, if they may.
    """

    loop: asyncio.AbstractEventLoop
    opener: Opener
    age: Age
    joins: bool
    patience: timedelta = timedelta(seconds=60)
    tally: Tally = field(default_factory=Tally)
    joinable: Joinable | None = None

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(self.patience.total_seconds())
        except concurrent.futures.TimeoutError as exc:
            if future.done():
                raise  # the storage's own
            future.cancel()
            raise AssertionError(
                f"hung for {self.patience.total_seconds():g} s in the last step; look for a lock that a write, a "
                "refusal or a transaction that ended didn't release"
            ) from exc


class DifferentialMachine(RuleBasedStateMachine):
    """Base of the machines: two worlds, and no rules yet."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena: Final = arena
        # New ids for each schedule, and yet the same order, which decides ties, whenever one is replayed.
        first = uuid4().int >> 64 << 64
        self.ids: Final = tuple(UUID(int=first + number) for number in range(SAGAS))
        self._worlds = AsyncExitStack()
        self._goes_on = False
        self._steps = 0

    @initialize()
    def begin(self) -> None:
        """Open both worlds, and create two sagas of one name and one of another."""
        self.arena.tally.schedules += 1
        self.arena.run(self._open())
        names = {self.ids[saga]: self.name(OWN_NAMES[saga // 2]) for saga in range(PRESENT)}
        self.both(lambda world: world.populate(names))
        self._goes_on = True

    @invariant()
    def all_is_alike(self) -> None:
        """Count the step, and look at everything now and then."""
        if self._goes_on:
            self._steps += 1
            self.arena.tally.steps += 1
            if self._steps % _STEPS_BETWEEN_LOOKS == 0:
                self.compare_everything()

    def teardown(self) -> None:
        try:
            if self._goes_on:
                self.compare_everything()
                self.leave()
                self.compare_everything()
                there = [saga_id for saga_id in self.ids if self.arena.run(self.twin.is_committed(saga_id))]
                self.both(methodcaller("finish", there))
        finally:
            self.arena.run(self._worlds.aclose())

    async def _open(self) -> None:
        names = {saga_id: f"saga {number}" for number, saga_id in enumerate(self.ids)}
        twin = Twin(joins=self.arena.joins)
        self.twin: World = await self._worlds.enter_async_context(world(twin.open, twin.age, names, twin.joinable))
        arena = self.arena
        self.tested: World = await self._worlds.enter_async_context(
            world(arena.opener, arena.age, names, arena.joinable)
        )

    # What rules are made of

    def both(self, call: Callable[[World], Awaitable[object]]) -> Result:
        """Make a call in both worlds, compare what came of it, and return the twin's result.

        Raises:
            AssertionError: The results differ.
        """
        expected, actual = self.arena.run(self._results(call))
        self.compare(self.twin.eyes.see(expected), self.tested.eyes.see(actual), actual)
        return expected

    def compare(self, expected: str, actual: str, cause: object = None) -> None:
        """Compare what was seen in both worlds; a schedule ends with the first difference."""
        if expected != actual:
            self._goes_on = False
            raise AssertionError(
                f"the storage differs from its twin\n  the twin:    {short(expected)}\n  the storage: {short(actual)}"
            ) from (cause if isinstance(cause, Exception) else None)

    def compare_everything(self) -> None:
        """Compare what is committed of every saga: its row, its history, its doubts, and whether it has changed."""
        for saga_id in self.ids:
            self.both(methodcaller("look", saga_id))

    def write(
        self, who: int, saga: int, call: Callable[[SagaStorage, UUID], Awaitable[object]], *, creates: bool = False
    ) -> None:
        """Write to a saga in both worlds, in the name of somebody who needn't wait for it."""
        who = self.writer(who, saga, creates=creates)
        result = self.both(lambda world: call(world.storage(who), self.ids[saga]))
        self.wrote(who, saga, result, creates=creates)

    def writer(self, who: int, saga: int, *, creates: bool = False) -> int:
        """Return who may write to the saga without waiting: anybody, unless writes wait for transactions."""
        del saga, creates
        return who

    def wrote(self, who: int, saga: int, result: Result, *, creates: bool = False) -> None:
        """Take note of what came of a write, if it may keep others waiting."""

    def is_locked(self, saga: int) -> bool:
        """Whether a transaction that is still open has written to the saga."""
        del saga
        return False

    def settle(self) -> None:
        """Roll back the transactions that are open, if there are any."""

    def leave(self) -> None:
        """Leave whatever is open, at the end of the schedule."""
        self.settle()

    def name(self, drawn: str) -> str:
        """Return a name that no other schedule has."""
        own = f"{drawn} \N{GRINNING FACE}'\"\\ {self.ids[0]}"
        return own.ljust(255, "x") if drawn == "long" else own

    def version(self, who: int, saga: int, fence: int | None) -> int | None:
        """Return the version that is so far from the true one."""
        if fence is None:
            return None
        found = self.arena.run(result_of(self.twin.storage(who).get_saga(self.ids[saga])))
        return fence + (found.version if isinstance(found, SagaExecution) else 0)

    def make_older(self, saga: int, by: timedelta) -> None:
        """Move a saga back in time, if it is committed and nobody has locked it."""
        saga_id = self.ids[saga]
        if not self.is_locked(saga) and self.arena.run(self.twin.is_committed(saga_id)):
            self.both(lambda world: world.make_older(saga_id, by))

    async def _results(self, call: Callable[[World], Awaitable[object]]) -> tuple[Result, Result]:
        return await result_of(call(self.twin)), await any_result_of(call(self.tested))
