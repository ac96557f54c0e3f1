"""Rules: claims, the lists of what is stuck, and the operator's verbs."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.machine import DifferentialMachine
from saga_store.testing.differential.world import World

_verbs = st.sampled_from(["give_up_saga", "reset_recovery_attempts", "break_lease"])
_stale = st.fixed_dictionaries(
    {"stale_after": draw.durations, "limit": draw.limits, "name": draw.filters, "max_attempts": draw.max_attempts}
)
_exhausted = st.fixed_dictionaries({"limit": draw.limits, "name": draw.filters, "max_attempts": draw.max_attempts})
_claim = st.fixed_dictionaries(
    {
        "owner": draw.owners,
        "lease": draw.leases,
        "limit": draw.limits,
        "stale_after": draw.durations,
        "name": draw.filters,
    },
    optional={
        "max_attempts": draw.max_attempts,
        "backoff": draw.durations,
        "max_backoff": draw.durations,
    },
)
_ENOUGH = 2**31 - 1


class RecoveryRules(DifferentialMachine):
    @rule(who=draw.actors, asked=_claim)
    def claim(self, who: int, asked: dict[str, Any]) -> None:
        claimed = self._list(who, "claim_sagas", asked)
        for saga in claimed if isinstance(claimed, list) else ():
            self.wrote(who, self.ids.index(saga.id), saga.version)

    @rule(who=draw.actors, asked=_stale)
    def find_stale(self, who: int, asked: dict[str, Any]) -> None:
        self._list(who, "find_stale_sagas", asked)

    @rule(who=draw.actors, asked=_exhausted)
    def find_exhausted(self, who: int, asked: dict[str, Any]) -> None:
        self._list(who, "find_exhausted_sagas", asked)

    @rule(who=draw.actors, saga=draw.sagas, verb=_verbs, by=draw.people, reason=draw.reasons, fence=draw.fences)
    def intervene(self, who: int, saga: int, verb: str, by: str, reason: str, fence: int | None) -> None:  # noqa: PLR0913, PLR0917 - what is drawn
        said = {"by": by, "reason": reason, "expected_version": self.version(who, saga, fence)}
        self.write(who, saga, lambda storage, saga_id: getattr(storage, verb)(saga_id, **said))

    def _list(self, who: int, method: str, asked: dict[str, Any]) -> object:
        """Ask for sagas, and compare those that are this schedule's, which others' mustn't crowd out."""
        name = asked["name"] and self.name(asked["name"])
        limit = asked["limit"] if name or not asked["limit"] else _ENOUGH

        async def ask(world: World) -> object:
            return world.eyes.ours(await getattr(world.storage(who), method)(**asked | {"name": name, "limit": limit}))

        return self.both(ask)
