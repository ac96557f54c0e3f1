"""Rules: runs, with and without a lease, two at a time, of one saga or of two."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from saga_store.run import SagaRun
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.machine import DifferentialMachine
from saga_store.testing.differential.world import World

_Call: TypeAlias = Callable[[SagaRun], Awaitable[object]]

_slots = st.integers(0, 1)


class _WorkError(Exception):
    """What goes wrong inside a run."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The same run in both worlds: whose it is, of which saga, and whether any call of it may write."""

    who: int
    saga: int
    writes: bool
    in_world: dict[World, SagaRun]


class RunRules(DifferentialMachine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the base takes
        super().__init__(*args, **kwargs)
        self._runs: dict[int, _Run] = {}

    @rule(
        slot=_slots,
        who=draw.actors,
        saga=draw.sagas,
        lease=st.none() | st.tuples(draw.owners, draw.leases),
        write_ahead=st.booleans(),
    )
    def enter_run(self, slot: int, who: int, saga: int, lease: tuple[Any, Any] | None, write_ahead: bool) -> None:  # noqa: FBT001, PLR0913, PLR0917 - what is drawn
        """Enter a run, after leaving the one that was in its place."""
        if slot in self._runs:
            self.leave_run(slot, with_error=False)
        if slot in self._runs or (lease and self.writer(who, saga, creates=True) != who):
            return
        owner, lasts = lease or (None, None)
        in_world: dict[World, SagaRun] = {}

        async def enter(world: World) -> object:
            storage = world.storage(who)
            run = storage.run(self.ids[saga], write_ahead=write_ahead, owner=owner, lease=lasts)
            in_world[world] = await run.__aenter__()
            return run.version

        result = self.both(enter)
        if lease:
            self.wrote(who, saga, result)
        if not isinstance(result, Exception):
            self._runs[slot] = _Run(who, saga, write_ahead or lease is not None, in_world)

    @precondition(lambda self: self._runs)
    @rule(slot=_slots, name=draw.any_names, context=draw.contexts)
    def create_in_run(self, slot: int, name: Any, context: Any) -> None:  # noqa: ANN401 - bad input may be anything
        name = self.name(name)
        self._in_run(slot, lambda run: run.create_saga(run.saga_id, name, context))

    @precondition(lambda self: self._runs)
    @rule(slot=_slots, context=draw.contexts, version=st.sampled_from([None, None, None, 1, 2, 3]))
    def update_context_in_run(self, slot: int, context: Any, version: int | None) -> None:  # noqa: ANN401 - as above
        self._in_run(slot, lambda run: run.update_context(run.saga_id, context, expected_version=version))

    @precondition(lambda self: self._runs)
    @rule(slot=_slots, status=draw.statuses, version=st.sampled_from([None, None, None, 1, 2, 3]))
    def update_status_in_run(self, slot: int, status: Any, version: int | None) -> None:  # noqa: ANN401 - as above
        self._in_run(slot, lambda run: run.update_status(run.saga_id, status, expected_version=version))

    @precondition(lambda self: self._runs)
    @rule(
        slot=_slots,
        step=draw.step_names,
        action=draw.actions,
        status=draw.step_statuses,
        details=draw.details,
    )
    def log_step_in_run(self, slot: int, step: Any, action: Any, status: Any, details: Any) -> None:  # noqa: ANN401, PLR0913, PLR0917 - as in the contract
        self._in_run(slot, lambda run: run.log_step(run.saga_id, step, action, status, details))

    @precondition(lambda self: self._runs)
    @rule(slot=_slots, saga=draw.sagas)
    def read_in_run(self, slot: int, saga: int) -> None:
        """Read the run's saga, or another one, which it refuses."""
        self._in_run(slot, lambda run: run.load_saga_state(self.ids[saga]))
        self._in_run(slot, lambda run: run.load_saga_state(run.saga_id))
        self._in_run(slot, lambda run: run.get_step_history(run.saga_id))
        self._in_run(slot, lambda run: run.holds_lease())

    @precondition(lambda self: self._runs)
    @rule(slot=_slots)
    def commit_run(self, slot: int) -> None:
        self._in_run(slot, lambda run: run.commit(), writes=True)

    @precondition(lambda self: self._runs)
    @rule(slot=_slots)
    def roll_back_run(self, slot: int) -> None:
        self._in_run(slot, lambda run: run.rollback())

    @precondition(lambda self: self._runs)
    @rule(slot=_slots, by=st.none() | draw.hours)
    def send_heartbeat(self, slot: int, by: timedelta | None) -> None:
        """Renew a run's lease, at once or later."""
        if by is not None and slot in self._runs:
            self.make_older(self._runs[slot].saga, by)
        self._in_run(slot, lambda run: run.heartbeat(), writes=True)

    @precondition(lambda self: self._runs)
    @rule(slot=_slots, with_error=st.booleans())
    def leave_run(self, slot: int, with_error: bool) -> None:  # noqa: FBT001 - what is drawn
        """Leave a run, with whatever isn't committed."""
        error = _WorkError() if with_error else None
        if self._in_run(slot, lambda run: run.__aexit__(error and type(error), error, None)):
            del self._runs[slot]

    def leave(self) -> None:
        super().leave()
        for slot in tuple(self._runs):
            self.leave_run(slot, with_error=False)
            self.settle()

    def _in_run(self, slot: int, call: _Call, *, writes: bool = False) -> bool:
        """Make a call in the run, if it needn't wait, and compare what version the run has come to as well."""
        run = self._runs.get(slot)
        if run is None:
            return False
        writes = writes or run.writes
        if writes and self.writer(run.who, run.saga, creates=True) != run.who:
            return False
        result = self.both(lambda world: call(run.in_world[world]))
        if writes:
            self.wrote(run.who, run.saga, result)
        self.both(lambda world: _version(run.in_world[world]))
        return True


async def _version(run: SagaRun) -> int | None:
    return run.version
