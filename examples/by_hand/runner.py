"""A saga by hand: its steps in order, what undoes them in reverse, and both taken up wherever a process died."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any
from uuid import UUID

from saga_store import Context, ISagaRun, SagaStatus, SagaStepStatus, StepAction

Lasts = dict[tuple[str, StepAction], SagaStepStatus]


class RefusedError(Exception):
    """Raised by a step: it has done nothing, and under this saga's id it never will."""


class Step:
    """What is done, and what undoes it. Each may be called again with the same id, and then changes nothing more."""

    @property
    def name(self) -> str:
        return type(self).__name__

    async def act(self, saga_id: UUID, context: Context) -> Context:
        """Do it, and return what the context gets; raise RefusedError if it isn't done and never will be."""
        return {}

    async def find_out(self, saga_id: UUID, context: Context) -> Context | None:
        """Look whether it was done, when that is in doubt: return what ``act`` would have; None: call ``act`` again."""
        return None

    async def undo(self, saga_id: UUID, context: Context) -> None:
        """Undo it, or see to it that it never happens; ``act`` may or may not have happened."""

    async def record(self, session: Any, action: StepAction, saga_id: UUID, context: Context) -> None:  # noqa: ANN401
        """Write rows of your own, in the transaction that says that the step is done, or undone."""


class Saga:
    """Steps, and what opens a transaction for ``record``: such as ``async_sessionmaker(engine).begin``."""

    def __init__(
        self, steps: Sequence[Step], transaction: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext
    ) -> None:
        self._steps = steps
        self._transaction = transaction

    async def see_through(self, run: ISagaRun) -> None:
        """Take a saga from where it stands to its end; the run writes ahead, and should hold a lease.

        What a step raises, RefusedError aside, leaves the saga as it is, to be taken up again later.
        """
        status, context = await run.load_saga_state(run.saga_id)
        if status in {SagaStatus.COMPLETED, SagaStatus.FAILED}:
            return
        history = await run.get_step_history(run.saga_id)
        lasts: Lasts = {(entry.step_name, entry.action): entry.status for entry in history}
        if status is not SagaStatus.COMPENSATING and await self._go_forward(run, context, lasts):
            await run.update_status(run.saga_id, SagaStatus.COMPLETED)
        else:
            await self._go_back(run, context, lasts)
            await run.update_status(run.saga_id, SagaStatus.FAILED)
        await run.commit()

    async def _go_forward(self, run: ISagaRun, context: Context, lasts: Lasts) -> bool:
        await run.update_status(run.saga_id, SagaStatus.RUNNING)
        for step in self._steps:
            last = lasts.get((step.name, "act"))
            if last is SagaStepStatus.COMPLETED:
                continue
            try:
                found = await step.find_out(run.saga_id, context) if last is SagaStepStatus.STARTED else None
                if found is None:
                    await self._log(run, step, "act", SagaStepStatus.STARTED)  # committed before anything happens
                    found = await step.act(run.saga_id, context)
                context |= found
                await self._end(run, step, "act", SagaStepStatus.COMPLETED, context)
            except RefusedError as exc:
                await self._log(run, step, "act", SagaStepStatus.FAILED, str(exc))
                await run.update_status(run.saga_id, SagaStatus.COMPENSATING)
                await run.commit()  # both or neither: from here on there is only the way back
                lasts[step.name, "act"] = SagaStepStatus.FAILED
                return False
            lasts[step.name, "act"] = SagaStepStatus.COMPLETED
        return True

    async def _go_back(self, run: ISagaRun, context: Context, lasts: Lasts) -> None:
        for step in reversed(self._steps):
            may_be_done = lasts.get((step.name, "act")) in {SagaStepStatus.COMPLETED, SagaStepStatus.STARTED}
            is_undone = lasts.get((step.name, "compensate")) in {SagaStepStatus.COMPENSATED, SagaStepStatus.COMPLETED}
            if may_be_done and not is_undone:
                await self._log(run, step, "compensate", SagaStepStatus.STARTED)
                await step.undo(run.saga_id, context)
                await self._end(run, step, "compensate", SagaStepStatus.COMPENSATED, context)

    async def _end(
        self, run: ISagaRun, step: Step, action: StepAction, status: SagaStepStatus, context: Context
    ) -> None:
        async with self._transaction() as session:
            await step.record(session, action, run.saga_id, context)
            await run.update_context(run.saga_id, context)
            await self._log(run, step, action, status)
            await run.commit(into=session)

    async def _log(
        self, run: ISagaRun, step: Step, action: StepAction, status: SagaStepStatus, details: str | None = None
    ) -> None:
        await run.log_step(run.saga_id, step.name, action, status, details)
