"""Rules: commits of runs that go into a transaction of the caller's, and commits that are cancelled and made again."""

import asyncio

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from saga_store.errors import SagaConcurrencyError, UnknownOutcomeError
from saga_store.model import SagaStepStatus
from saga_store.run import SagaRun
from saga_store.testing.differential.runs import RunRules
from saga_store.testing.differential.world import World

_which = st.integers(0, 1)


def _is_in_a_run(machine: "CommitRules") -> bool:
    return machine.is_in_a_run


def _may_commit_into(machine: "CommitRules") -> bool:
    return machine.is_in_a_run and machine.arena.joinable is not None


class CommitRules(RunRules):
    """For storages that commit each call by themselves."""

    @precondition(_may_commit_into)
    @rule(which=_which, times=st.integers(1, 3), commits=st.booleans())
    def commit_run_into(self, which: int, times: int, commits: bool) -> None:  # noqa: FBT001 - what is drawn
        """Commit a run into a transaction, again with more in it, and end that in one of two ways."""

        async def commit(run: SagaRun, world: World) -> object:
            versions = []
            async with world.joinable() as transaction:
                await run.commit(into=transaction)
                for number in range(times - 1):
                    await run.log_step(run.saga_id, f"more {number}", "act", SagaStepStatus.COMPLETED)
                    await run.commit(into=transaction)
                    versions.append(run.version)
                await (transaction.commit() if commits else transaction.rollback())
                versions.append(run.version)
            await run.load_saga_state(run.saga_id)
            return [*versions, run.version]

        self._in_worlds(which, commit)

    @precondition(_is_in_a_run)
    @rule(which=_which, turns=st.integers(0, 20))
    def cancel_commit_and_make_it_again(self, which: int, turns: int) -> None:
        """Cancel a commit anywhere, which each world decides, and make it again: then it makes no difference."""

        async def commit(run: SagaRun, _: World) -> object:
            first = asyncio.ensure_future(run.commit())
            for _turn in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            if not first.cancelled():
                first.exception()  # the second says it again
            try:
                await run.commit()
            except (SagaConcurrencyError, UnknownOutcomeError):
                return "refused"  # so long ago that the row may have forgotten it
            return run.version

        self._in_worlds(which, commit)
