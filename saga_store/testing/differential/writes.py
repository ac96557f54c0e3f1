"""Rules: the six methods and checkpoints, with good input and bad, on sagas that are there and that aren't."""

from datetime import timedelta
from typing import Any

from hypothesis.stateful import rule

from saga_store.model import Checkpoint
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.machine import DifferentialMachine
from saga_store.testing.differential.world import World, everything_of


class WriteRules(DifferentialMachine):
    @rule(who=draw.actors, saga=draw.sagas, name=draw.any_names, context=draw.contexts)
    def create(self, who: int, saga: int, name: Any, context: Any) -> None:  # noqa: ANN401 - bad input may be anything
        name = self.name(name)
        self.write(who, saga, lambda storage, saga_id: storage.create_saga(saga_id, name, context), creates=True)

    @rule(who=draw.actors, saga=draw.sagas, context=draw.contexts, fence=draw.fences)
    def update_context(self, who: int, saga: int, context: Any, fence: int | None) -> None:  # noqa: ANN401 - as above
        version = self.version(who, saga, fence)
        self.write(
            who, saga, lambda storage, saga_id: storage.update_context(saga_id, context, expected_version=version)
        )

    @rule(who=draw.actors, saga=draw.sagas, status=draw.statuses, fence=draw.fences)
    def update_status(self, who: int, saga: int, status: Any, fence: int | None) -> None:  # noqa: ANN401 - as above
        version = self.version(who, saga, fence)
        self.write(who, saga, lambda storage, saga_id: storage.update_status(saga_id, status, expected_version=version))

    @rule(
        who=draw.actors,
        saga=draw.sagas,
        step=draw.step_names,
        action=draw.actions,
        status=draw.step_statuses,
        details=draw.details,
    )
    def log_step(self, who: int, saga: int, step: Any, action: Any, status: Any, details: Any) -> None:  # noqa: ANN401, PLR0913, PLR0917 - as in the contract
        self.write(who, saga, lambda storage, saga_id: storage.log_step(saga_id, step, action, status, details))

    @rule(who=draw.actors, saga=draw.sagas, name=draw.any_names, changes=draw.changes)
    def save_new(self, who: int, saga: int, name: Any, changes: dict[str, Any]) -> None:  # noqa: ANN401 - as above
        name = self.name(name)
        self.write(
            who,
            saga,
            lambda storage, saga_id: storage.save(Checkpoint(saga_id, name=name, **changes)),
            creates=name is not None,
        )

    @rule(who=draw.actors, saga=draw.sagas, changes=draw.changes, fence=draw.fences)
    def save(self, who: int, saga: int, changes: dict[str, Any], fence: int | None) -> None:
        version = self.version(who, saga, fence)
        self.write(
            who,
            saga,
            lambda storage, saga_id: storage.save(Checkpoint(saga_id, expected_version=version, **changes)),
        )

    @rule(who=draw.actors, existing=draw.sagas, new=draw.sagas, bad=draw.bad_inputs)
    def bad_input(self, who: int, existing: int, new: int, bad: str) -> None:
        call = draw.BAD_INPUTS_BY_NAME[bad].call
        self.both(lambda world: call(world.storage(who), self.ids[existing], self.ids[new]))

    @rule(who=draw.actors, saga=draw.sagas)
    def read(self, who: int, saga: int) -> None:
        """Read everything of a saga, each in its own way, as whoever may have uncommitted work sees it."""
        saga_id = self.ids[saga]
        self.both(lambda world: everything_of(world.storage(who), saga_id))
        self.both(lambda world: world.storage(who).load_saga_state(saga_id))
        self.both(lambda world: world.storage(who).get_step_history(saga_id))

    @rule(saga=draw.sagas, by=draw.hours)
    def let_time_pass(self, saga: int, by: timedelta) -> None:
        self.make_older(saga, by)

    @rule(
        who=draw.actors,
        stale_after=draw.durations,
        limit=draw.limits,
        name=draw.any_names,
        max_attempts=draw.max_attempts,
    )
    def find_stale(self, who: int, stale_after: Any, limit: Any, name: Any, max_attempts: Any) -> None:  # noqa: ANN401, PLR0913, PLR0917 - as in the contract
        asked = {
            "stale_after": stale_after,
            "limit": draw.enough_for(name, limit),
            "name": self.name(name),
            "max_attempts": max_attempts,
        }

        async def find(world: World) -> object:
            return world.eyes.ours(await world.storage(who).find_stale_sagas(**asked))

        self.both(find)
