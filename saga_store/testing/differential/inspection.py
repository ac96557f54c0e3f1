"""Rules: what a person sees of the sagas, and the step that they settle."""

from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import rule

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError
from saga_store.inspection import SagaCondition, SagaQuery
from saga_store.storage import SagaStorage
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.machine import DifferentialMachine

_queries = st.fixed_dictionaries(
    {"name": draw.names},
    optional={
        "statuses": st.lists(draw.statuses, max_size=3),
        "conditions": st.lists(st.sampled_from(SagaCondition), max_size=3),
        "step": draw.step_names,
        "lease_owner": draw.owners,
        "silent_for": draw.durations,
        "in_doubt": st.booleans(),
        "stale_after": draw.durations,
        "max_attempts": draw.max_attempts,
    },
)
_said = st.fixed_dictionaries({"status": draw.step_statuses, "by": draw.people, "reason": draw.reasons})


class InspectionRules(DifferentialMachine):
    @rule(who=draw.actors, asked=_queries)
    def view(self, who: int, asked: dict[str, Any]) -> None:
        query = SagaQuery(**asked | {"name": self.name(asked["name"])})

        async def look(storage: SagaStorage) -> object:
            page = await storage.find_sagas(query, limit=1000)
            groups = await storage.group_sagas(query)
            return page.sagas, int(await storage.count_sagas(query)), len(groups), page.is_partial

        self.both(lambda world: look(world.storage(who)))

    @rule(who=draw.actors, saga=draw.sagas, which=st.integers(0, 1), said=_said, fence=draw.fences)
    def settle_step(self, who: int, saga: int, which: int, said: dict[str, Any], fence: int | None) -> None:
        expected = self.version(who, saga, fence)

        async def settle(storage: SagaStorage, saga_id: UUID) -> None:
            doubts = await storage.get_in_doubt_steps(saga_id)
            entry_id = doubts[which].id if which < len(doubts) else 0
            await storage.settle_step(saga_id, entry_id, **said, expected_version=expected)

        who = self.writer(who, saga)
        result = self.both(lambda world: settle(world.storage(who), self.ids[saga]))
        # A refusal comes after the row was locked, as it has to.
        self.wrote(who, saga, None if isinstance(result, InvalidSagaDataError | SagaConcurrencyError) else result)
