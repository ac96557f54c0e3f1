"""Rules for each kind of unit: calls at the same time, or transactions that are committed and rolled back."""

import asyncio
from datetime import timedelta
from operator import methodcaller
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from saga_store.errors import SagaConcurrencyError, SagaLeasedError
from saga_store.model import Checkpoint
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.commits import CommitRules
from saga_store.testing.differential.comparison import Result
from saga_store.testing.differential.inspection import InspectionRules
from saga_store.testing.differential.recovery import RecoveryRules
from saga_store.testing.differential.retention import RetentionRules
from saga_store.testing.differential.runs import RunRules
from saga_store.testing.differential.world import ACTORS, World
from saga_store.testing.differential.writes import WriteRules

_HOUR = timedelta(hours=1)

_checkpoints = st.dictionaries(draw.sagas, st.tuples(draw.filters, draw.changes), min_size=2, max_size=4)


class OwningMachine(WriteRules, RecoveryRules, InspectionRules, CommitRules, RetentionRules):
    """For storages that commit each call by themselves."""

    @rule(who=draw.actors, writes=_checkpoints)
    def save_together(self, who: int, writes: dict[int, tuple[str | None, dict[str, Any]]]) -> None:
        """Save checkpoints of several sagas at the same time."""
        checkpoints = [
            Checkpoint(self.ids[saga], name=name and self.name(name), **changes)
            for saga, (name, changes) in sorted(writes.items())
        ]

        async def save(world: World) -> object:
            storage = world.storage(who)
            return await asyncio.gather(*map(storage.save, checkpoints), return_exceptions=True)

        self.both(save)
        # Which of them came first is the storage's business, and has to be settled before their order is looked at.
        for place, saga in enumerate(sorted(writes)):
            self.make_older(saga, (len(writes) - place) * _HOUR)


class JoiningMachine(WriteRules, RecoveryRules, InspectionRules, RunRules):
    """For storages that join a transaction of the caller's: each actor has one, and keeps others waiting with it.

    A call that would wait is made by the one who is waited for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the base takes
        super().__init__(*args, **kwargs)
        self._holders: dict[int, int] = {}
        self._born: set[int] = set()

    @rule(who=draw.actors)
    def commit(self, who: int) -> None:
        self.both(lambda world: world.commit(who))
        self._unlock(who)

    @rule(who=draw.actors)
    def roll_back(self, who: int) -> None:
        self.both(lambda world: world.roll_back(who))
        self._unlock(who)

    def writer(self, who: int, saga: int, *, creates: bool = False) -> int:
        # A saga whose creation isn't committed isn't there for others, and they don't wait unless they create it.
        return who if saga in self._born and not creates else self._holders.get(saga, who)

    def wrote(self, who: int, saga: int, result: Result, *, creates: bool = False) -> None:
        if isinstance(result, Exception) and not isinstance(result, SagaConcurrencyError | SagaLeasedError):
            return
        # Whoever has got the lock holds it; that somebody else was taken to hold it was caution.
        self._holders[saga] = who
        if creates:
            self._born.add(saga)

    def is_locked(self, saga: int) -> bool:
        return saga in self._holders

    def compare_everything(self) -> None:
        super().compare_everything()
        for who in range(ACTORS):
            for saga_id in self.ids:
                self.both(methodcaller("look_as", who, saga_id))

    def settle(self) -> None:
        for who in range(ACTORS):
            self.roll_back(who)

    def _unlock(self, who: int) -> None:
        freed = {saga for saga, holder in self._holders.items() if holder == who}
        self._born -= freed
        for saga in freed:
            del self._holders[saga]
