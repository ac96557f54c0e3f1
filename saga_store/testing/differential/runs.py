"""Rules: runs, with and without a lease, two at a time, of one saga or of two."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from saga_store.model import SagaStatus, SagaStepStatus, StepAction
from saga_store.run import SagaRun
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.badly import BAD_CALLS_IN_RUN
from saga_store.testing.differential.machine import DifferentialMachine
from saga_store.testing.differential.world import World

_Call: TypeAlias = Callable[[SagaRun], Awaitable[object]]
_Lease: TypeAlias = tuple[str, timedelta]


_MOST_RUNS = 2

_which = st.integers(0, _MOST_RUNS - 1)
_leases = st.none() | st.tuples(draw.owners, draw.leases)
_bad_calls = st.sampled_from(sorted(BAD_CALLS_IN_RUN))


class _WorkError(Exception):
    """What goes wrong inside a run."""


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The same run in both worlds: whose it is, of which saga, and whether any call of it may write."""

    who: int
    saga: int
    writes: bool
    in_world: dict[World, SagaRun]


def _is_in_a_run(machine: "RunRules") -> bool:
    return bool(machine._runs)  # noqa: SLF001 - hypothesis asks it beside the class


def _may_enter_another(machine: "RunRules") -> bool:
    return len(machine._runs) < _MOST_RUNS  # noqa: SLF001 - as above


class RunRules(DifferentialMachine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - whatever the base takes
        super().__init__(*args, **kwargs)
        self._runs: list[_Run] = []

    @precondition(_may_enter_another)
    @rule(who=draw.actors, saga=draw.sagas, lease=_leases, write_ahead=st.booleans())
    def enter_run(self, who: int, saga: int, lease: _Lease | None, write_ahead: bool) -> None:  # noqa: FBT001 - what is drawn
        if lease and self.writer(who, saga, creates=True) != who:
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
            self._runs.append(_Run(who, saga, write_ahead or lease is not None, in_world))

    @precondition(_is_in_a_run)
    @rule(which=_which, name=draw.names, context=draw.contexts)
    def create_in_run(self, which: int, name: str, context: dict[str, Any]) -> None:
        name = self.name(name)
        self._in_run(which, lambda run: run.create_saga(run.saga_id, name, context))

    @precondition(_is_in_a_run)
    @rule(which=_which, context=draw.contexts, version=draw.low_versions)
    def update_context_in_run(self, which: int, context: dict[str, Any], version: int | None) -> None:
        self._in_run(which, lambda run: run.update_context(run.saga_id, context, expected_version=version))

    @precondition(_is_in_a_run)
    @rule(which=_which, status=draw.statuses, version=draw.low_versions)
    def update_status_in_run(self, which: int, status: SagaStatus, version: int | None) -> None:
        self._in_run(which, lambda run: run.update_status(run.saga_id, status, expected_version=version))

    @precondition(_is_in_a_run)
    @rule(which=_which, step=draw.step_names, action=draw.actions, status=draw.step_statuses, details=draw.details)
    def log_step_in_run(
        self, which: int, step: str, action: StepAction, status: SagaStepStatus, details: str | None
    ) -> None:
        self._in_run(which, lambda run: run.log_step(run.saga_id, step, action, status, details))

    @precondition(_is_in_a_run)
    @rule(which=_which, bad=_bad_calls)
    def give_bad_input_in_run(self, which: int, bad: str) -> None:
        self._in_run(which, BAD_CALLS_IN_RUN[bad])

    @precondition(_is_in_a_run)
    @rule(which=_which, saga=draw.sagas)
    def read_in_run(self, which: int, saga: int) -> None:
        """Read the run's saga, or another one, which it refuses."""
        self._in_run(which, lambda run: run.load_saga_state(self.ids[saga]))
        self._in_run(which, lambda run: run.load_saga_state(run.saga_id))
        self._in_run(which, lambda run: run.get_step_history(run.saga_id))
        self._in_run(which, lambda run: run.holds_lease())

    @precondition(_is_in_a_run)
    @rule(which=_which)
    def commit_run(self, which: int) -> None:
        self._in_run(which, lambda run: run.commit(), writes=True)

    @precondition(_is_in_a_run)
    @rule(which=_which)
    def roll_back_run(self, which: int) -> None:
        self._in_run(which, lambda run: run.rollback())

    @precondition(_is_in_a_run)
    @rule(which=_which, by=st.none() | draw.hours)
    def send_heartbeat(self, which: int, by: timedelta | None) -> None:
        """Renew a run's lease, at once or later."""
        if by is not None:
            self.make_older(self._run(which).saga, by)
        self._in_run(which, lambda run: run.heartbeat(), writes=True)

    @precondition(_is_in_a_run)
    @rule(which=_which, with_error=st.booleans())
    def leave_run(self, which: int, with_error: bool) -> None:  # noqa: FBT001 - what is drawn
        """Leave a run, with whatever isn't committed."""
        run, error = self._run(which), _WorkError() if with_error else None
        if self._in_run(which, lambda run: run.__aexit__(_WorkError if error else None, error, None)):
            self._runs.remove(run)

    @property
    def is_in_a_run(self) -> bool:
        return bool(self._runs)

    def leave(self) -> None:
        super().leave()
        while self._runs:
            self.leave_run(0, with_error=False)
            self.settle()

    def _run(self, which: int) -> _Run:
        return self._runs[which % len(self._runs)]

    def _in_worlds(self, which: int, call: Callable[[SagaRun, World], Awaitable[object]]) -> None:
        """Make a call that needs to know the world it is in, and that waits for nobody."""
        run = self._run(which)
        self.both(lambda world: call(run.in_world[world], world))
        self.both(lambda world: _version(run.in_world[world]))

    def _in_run(self, which: int, call: _Call, *, writes: bool = False) -> bool:
        """Make a call in the run, if it needn't wait, and compare what version the run has come to as well."""
        run = self._run(which)
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
