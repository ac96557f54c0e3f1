"""Rules: the six methods and checkpoints, on sagas that are there and on sagas that aren't."""

from datetime import timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from saga_store.model import Checkpoint, SagaStatus, SagaStepStatus, StepAction
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.badly import BAD_CALLS
from saga_store.testing.differential.machine import DifferentialMachine

_bad_calls = st.sampled_from(sorted(BAD_CALLS))


class WriteRules(DifferentialMachine):
    @rule(who=draw.actors, saga=draw.new_sagas, name=draw.names, context=draw.contexts)
    def create(self, who: int, saga: int, name: str, context: dict[str, Any]) -> None:
        name = self.name(name)
        self.write(who, saga, lambda storage, saga_id: storage.create_saga(saga_id, name, context), creates=True)

    @rule(who=draw.actors, saga=draw.sagas, context=draw.contexts, fence=draw.fences)
    def update_context(self, who: int, saga: int, context: dict[str, Any], fence: int | None) -> None:
        version = self.version(who, saga, fence)
        self.write(
            who, saga, lambda storage, saga_id: storage.update_context(saga_id, context, expected_version=version)
        )

    @rule(who=draw.actors, saga=draw.sagas, status=draw.statuses, fence=draw.fences)
    def update_status(self, who: int, saga: int, status: SagaStatus, fence: int | None) -> None:
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
    def log_step(  # noqa: PLR0913, PLR0917 - as in the contract
        self, who: int, saga: int, step: str, action: StepAction, status: SagaStepStatus, details: str | None
    ) -> None:
        self.write(who, saga, lambda storage, saga_id: storage.log_step(saga_id, step, action, status, details))

    @rule(who=draw.actors, saga=draw.new_sagas, name=draw.names, changes=draw.changes)
    def save_new(self, who: int, saga: int, name: str, changes: dict[str, Any]) -> None:
        name = self.name(name)
        self.write(
            who, saga, lambda storage, saga_id: storage.save(Checkpoint(saga_id, name=name, **changes)), creates=True
        )

    @rule(who=draw.actors, saga=draw.sagas, changes=draw.changes, fence=draw.fences)
    def save(self, who: int, saga: int, changes: dict[str, Any], fence: int | None) -> None:
        version = self.version(who, saga, fence)
        self.write(
            who,
            saga,
            lambda storage, saga_id: storage.save(Checkpoint(saga_id, expected_version=version, **changes)),
        )

    @rule(who=draw.actors, existing=draw.sagas, new=draw.sagas, bad=_bad_calls)
    def give_bad_input(self, who: int, existing: int, new: int, bad: str) -> None:
        self.both(lambda world: BAD_CALLS[bad](world.storage(who), self.ids[existing], self.ids[new]))

    @rule(who=draw.actors, saga=draw.sagas)
    def read(self, who: int, saga: int) -> None:
        """Read all there is of a saga, as somebody sees it who may have written what isn't committed yet."""
        saga_id = self.ids[saga]
        self.both(lambda world: world.look_as(who, saga_id))
        self.both(lambda world: world.storage(who).load_saga_state(saga_id))
        self.both(lambda world: world.storage(who).get_step_history(saga_id))
        self.both(lambda world: world.storage(who).get_in_doubt_steps(saga_id))

    @rule(saga=draw.sagas, by=draw.hours)
    def let_time_pass(self, saga: int, by: timedelta) -> None:
        self.make_older(saga, by)
