"""Rules: claims, the lists of what is stuck, and the operator's verbs."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.machine import DifferentialMachine
from saga_store.testing.differential.world import World

_verbs = st.sampled_from(["give_up_saga", "reset_recovery_attempts", "break_lease"])


class RecoveryRules(DifferentialMachine):
    @rule(
        who=draw.actors,
        owner=draw.owners,
        lease=draw.leases,
        limit=draw.limits,
        stale_after=draw.durations,
        name=draw.any_names,
        max_attempts=draw.max_attempts,
        backoff=draw.durations,
        max_backoff=draw.durations,
    )
    def claim(self, who: int, limit: Any, name: Any, **drawn: Any) -> None:  # noqa: ANN401 - bad input may be anything
        asked = {"limit": draw.enough_for(name, limit), "name": self.name(name), **drawn}

        async def claim(world: World) -> object:
            return world.eyes.ours(await world.storage(who).claim_sagas(**asked))

        claimed = self.both(claim)
        if isinstance(claimed, list):
            for saga in claimed:
                self.wrote(who, self.ids.index(saga.id), saga.version)

    @rule(who=draw.actors, limit=draw.limits, name=draw.any_names, max_attempts=draw.max_attempts)
    def find_exhausted(self, who: int, limit: Any, name: Any, max_attempts: Any) -> None:  # noqa: ANN401 - as above
        asked = {"limit": draw.enough_for(name, limit), "name": self.name(name), "max_attempts": max_attempts}

        async def find(world: World) -> object:
            return world.eyes.ours(await world.storage(who).find_exhausted_sagas(**asked))

        self.both(find)

    @rule(who=draw.actors, saga=draw.sagas, verb=_verbs, by=draw.people, reason=draw.reasons)
    def intervene(self, who: int, saga: int, verb: str, by: Any, reason: Any) -> None:  # noqa: ANN401, PLR0913, PLR0917 - as in the contract
        self.write(who, saga, lambda storage, saga_id: getattr(storage, verb)(saga_id, by=by, reason=reason))

    @rule(who=draw.actors, saga=draw.sagas)
    def ask_what_is_in_doubt(self, who: int, saga: int) -> None:
        self.both(lambda world: world.storage(who).get_in_doubt_steps(self.ids[saga]))
