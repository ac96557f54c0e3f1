"""Subject: scoped runs, which buffer the writes to one saga and commit them as one checkpoint."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import TypeAlias
from uuid import uuid4

import pytest

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
)
from saga_store.interface import ICheckpointStorage
from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.run_interface import IRunStorage, ISagaRun
from saga_store.testing.contract import Contract, new_saga, observe

RunUnit: TypeAlias = Callable[[], AbstractAsyncContextManager[IRunStorage]]
"""A unit of work of a storage that has runs."""

_STARTED = SagaStepStatus.STARTED
_COMPLETED = SagaStepStatus.COMPLETED


class _TestError(Exception):
    """What goes wrong inside a run."""


class RunContract(Contract):
    """What ``storage.run()`` promises: one checkpoint per commit, fenced by the version that the run has seen."""

    async def test_commit_writes_one_checkpoint(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """Status, context and steps of a run are one checkpoint: the version goes up by one."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.log_step(saga_id, "reserve", "act", _STARTED)
            await run.update_context(saga_id, {"total": 12})
            await run.log_step(saga_id, "reserve", "act", _COMPLETED, "in stock")
            await run.commit()
            assert run.version == 2
        saga = await storage.get_saga(saga_id)
        assert (saga.version, saga.status, saga.context) == (2, SagaStatus.RUNNING, {"total": 12})
        history = [(entry.status, entry.details) for entry in await storage.get_step_history(saga_id)]
        assert history == [(_STARTED, None), (_COMPLETED, "in stock")]

    async def test_nothing_is_written_before_the_commit(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """Until a run commits, nobody else sees anything of it."""
        saga_id = await new_saga(storage, {"total": 12})
        before = await observe(storage, saga_id)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_context(saga_id, {"total": 13})
            await run.log_step(saga_id, "reserve", "act", _STARTED)
            assert await observe(storage, saga_id) == before
            await run.rollback()
        assert await observe(storage, saga_id) == before

    async def test_a_run_sees_its_own_writes(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """Reads inside a run show what it has buffered, after what is stored."""
        saga_id = await new_saga(storage)
        await storage.log_step(saga_id, "reserve", "act", _STARTED)
        async with unit() as bound, bound.run(saga_id) as run:
            assert await run.load_saga_state(saga_id) == (SagaStatus.PENDING, {})
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.update_context(saga_id, {"total": 12})
            await run.log_step(saga_id, "reserve", "act", _COMPLETED)
            await run.log_step(saga_id, "pay", "act", _STARTED)
            state = await run.load_saga_state(saga_id)
            history = await run.get_step_history(saga_id)
            await run.rollback()
        assert state == (SagaStatus.RUNNING, {"total": 12})
        assert [(entry.step_name, entry.status) for entry in history] == [
            ("reserve", _STARTED),
            ("reserve", _COMPLETED),
            ("pay", _STARTED),
        ]
        ids = [entry.id for entry in history]
        assert ids == sorted(set(ids))
        assert all(entry.created_at.tzinfo for entry in history)

    async def test_contexts_are_copied(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """A context changed after it was given to a run, or read from it, changes nothing in the run."""
        saga_id = await new_saga(storage, {"items": [1]})
        async with unit() as bound, bound.run(saga_id) as run:
            (await run.load_saga_state(saga_id))[1]["items"].append("read")
            assert (await run.load_saga_state(saga_id))[1] == {"items": [1]}
            context = {"items": [1, 2]}
            await run.update_context(saga_id, context)
            context["items"].append(3)
            (await run.load_saga_state(saga_id))[1]["items"].append("read")
            await run.commit()
        assert (await storage.get_saga(saga_id)).context == {"items": [1, 2]}

    async def test_a_run_creates_its_saga(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """A saga created in a run is there after the commit, at version 1, with all that the run said of it."""
        saga_id = uuid4()
        async with unit() as bound, bound.run(saga_id) as run:
            await run.create_saga(saga_id, "order", {"total": 12})
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.log_step(saga_id, "reserve", "act", _STARTED)
            assert await run.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})
            assert len(await run.get_step_history(saga_id)) == 1
            assert run.version is None
            await run.commit()
            assert run.version == 1
            await run.update_context(saga_id, {"total": 13})
            await run.commit()
        saga = await storage.get_saga(saga_id)
        assert (saga.version, saga.status, saga.context) == (2, SagaStatus.RUNNING, {"total": 13})
        assert len(await storage.get_step_history(saga_id)) == 1

    async def test_a_run_goes_on_after_a_commit(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """Each commit writes what came since the last, and the next is fenced by its version."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            for number in range(3):
                await run.update_context(saga_id, {"n": number})
                await run.log_step(saga_id, str(number), "act", _COMPLETED)
                await run.commit()
                assert run.version == number + 2
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == ["0", "1", "2"]

    async def test_a_commit_of_nothing_does_nothing(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """With nothing buffered a commit leaves the saga as it is."""
        saga_id = await new_saga(storage)
        before = await storage.get_saga(saga_id)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.commit()
            await run.load_saga_state(saga_id)
            await run.commit()
        assert await storage.get_saga(saga_id) == before

    async def test_an_exception_drops_what_is_not_committed(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """What a run committed before an exception stays; the rest is dropped, and the exception passes."""
        saga_id = await new_saga(storage)

        async def work(bound: IRunStorage) -> None:
            async with bound.run(saga_id) as run:
                await run.update_context(saga_id, {"kept": True})
                await run.commit()
                await run.update_context(saga_id, {"kept": False})
                raise _TestError

        async with unit() as bound:
            with pytest.raises(_TestError):
                await work(bound)
        assert (await storage.get_saga(saga_id)).context == {"kept": True}

    async def test_leaving_without_a_commit_drops_and_warns(
        self, unit: RunUnit, storage: ICheckpointStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A run that is left normally with something uncommitted drops it, and logs a warning that names the saga."""
        saga_id = await new_saga(storage)
        before = await observe(storage, saga_id)
        with caplog.at_level(logging.WARNING, logger="saga_store"):
            async with unit() as bound, bound.run(saga_id) as run:
                await run.update_context(saga_id, {"total": 12})
        assert await observe(storage, saga_id) == before
        [warning] = [record for record in caplog.records if record.name == "saga_store"]
        assert str(saga_id) in warning.getMessage()
        assert "commit()" in warning.getMessage()

    async def test_the_second_of_two_runs_is_refused(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """Of two runs that saw one version the second to commit is refused, and nothing of it is written."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as late:
            await late.update_status(saga_id, SagaStatus.FAILED)
            await late.log_step(saga_id, "late", "act", _COMPLETED)
            async with unit() as other, other.run(saga_id) as early:
                await early.update_status(saga_id, SagaStatus.COMPLETED)
                await early.commit()
            with pytest.raises(SagaConcurrencyError) as refusal:
                await late.commit()
            await late.rollback()
        assert (refusal.value.expected, refusal.value.actual) == (1, 2)
        assert (await storage.get_saga(saga_id)).status is SagaStatus.COMPLETED
        assert await storage.get_step_history(saga_id) == []

    async def test_a_run_that_only_logs_is_fenced_too(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """A run that has log entries alone to write is refused like any other."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.log_step(saga_id, "late", "act", _COMPLETED)
            await storage.update_context(saga_id, {"total": 12})
            with pytest.raises(SagaConcurrencyError):
                await run.commit()
            await run.rollback()
        assert await storage.get_step_history(saga_id) == []

    async def test_a_refused_run_can_begin_again(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """After a refusal rollback() forgets what was seen, and the run reads the saga afresh."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_context(saga_id, {"mine": 1})
            await storage.update_context(saga_id, {"theirs": 2})
            with pytest.raises(SagaConcurrencyError):
                await run.commit()
            await run.rollback()
            _, context = await run.load_saga_state(saga_id)
            await run.update_context(saga_id, {**context, "mine": 1})
            await run.commit()
        assert (await storage.get_saga(saga_id)).context == {"theirs": 2, "mine": 1}

    async def test_creating_a_saga_that_exists_is_refused(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """A run that creates a saga which exists is refused: at the commit, or at once if it has seen the saga."""
        saga_id = await new_saga(storage, {"total": 12})
        before = await observe(storage, saga_id)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.create_saga(saga_id, "order", {})
            with pytest.raises(SagaAlreadyExistsError):
                await run.create_saga(saga_id, "order", {})
            with pytest.raises(SagaAlreadyExistsError):
                await run.commit()
            await run.rollback()
            await run.load_saga_state(saga_id)
            with pytest.raises(SagaAlreadyExistsError):
                await run.create_saga(saga_id, "order", {})
        assert await observe(storage, saga_id) == before

    async def test_a_missing_saga_is_refused_at_the_call(self, unit: RunUnit) -> None:
        """A run of a saga that isn't there refuses every call but its creation."""
        saga_id = uuid4()
        async with unit() as bound, bound.run(saga_id) as run:
            for call in (
                run.load_saga_state(saga_id),
                run.get_step_history(saga_id),
                run.update_context(saga_id, {}),
                run.update_status(saga_id, SagaStatus.RUNNING),
                run.log_step(saga_id, "reserve", "act", _STARTED),
            ):
                with pytest.raises(SagaNotFoundError):
                    await call
            await run.commit()

    async def test_bad_input_is_refused_at_the_call(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """A call that is refused leaves what is buffered as it was; another saga's id is bad input too."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_context(saga_id, {"total": 12})
            for call in (
                run.update_context(saga_id, {"total": float("nan")}),
                run.log_step(saga_id, "", "act", _STARTED),
                run.update_context(uuid4(), {}),
                run.get_step_history(uuid4()),
                run.load_saga_state("no id"),  # type: ignore[arg-type] # that is the point
            ):
                with pytest.raises(InvalidSagaDataError):
                    await call
            await run.commit()
            with pytest.raises(InvalidSagaDataError):
                bound.run("no id")  # type: ignore[arg-type] # that is the point
        saga = await storage.get_saga(saga_id)
        assert (saga.version, saga.context) == (2, {"total": 12})

    async def test_an_expected_version_is_compared_with_the_one_seen(
        self, unit: RunUnit, storage: ICheckpointStorage
    ) -> None:
        """A run refuses at once a write that expects another version than the run has seen."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_context(saga_id, {"total": 12}, expected_version=1)
            with pytest.raises(SagaConcurrencyError) as refusal:
                await run.update_status(saga_id, SagaStatus.RUNNING, expected_version=2)
            await run.commit()
        assert (refusal.value.expected, refusal.value.actual) == (2, 1)
        assert (await storage.get_saga(saga_id)).status is SagaStatus.PENDING

    async def test_a_buffered_entry_keeps_its_time(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """An entry's time is when it was logged, not when it was written; the status's is when it was written."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.log_step(saga_id, "reserve", "act", _STARTED)
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.log_step(saga_id, "reserve", "act", _COMPLETED)
            await run.commit()
        first, second = await storage.get_step_history(saga_id)
        assert first.created_at < second.created_at < (await storage.get_saga(saga_id)).updated_at

    async def test_write_ahead_leaves_a_trace(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """With write_ahead, STARTED is stored before log_step returns, with all that was buffered before it."""
        saga_id = await new_saga(storage)

        async def work(bound: IRunStorage) -> None:
            async with bound.run(saga_id, write_ahead=True) as run:
                await run.update_status(saga_id, SagaStatus.RUNNING)
                await run.log_step(saga_id, "reserve", "act", _STARTED)
                await run.log_step(saga_id, "reserve", "act", _COMPLETED)
                raise _TestError

        async with unit() as bound:
            with pytest.raises(_TestError):
                await work(bound)
        assert (await storage.get_saga(saga_id)).status is SagaStatus.RUNNING
        assert [entry.status for entry in await storage.get_step_history(saga_id)] == [_STARTED]


class RunRaceContract(Contract):
    """What a run promises to tasks that share it, and that are cancelled; for storages that commit each call."""

    async def test_parallel_steps(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """Tasks that log and commit in one run lose nothing, and write nothing twice."""
        saga_id = await new_saga(storage)

        async def step(run: ISagaRun, name: str) -> None:
            for status in (_STARTED, _COMPLETED):
                await run.log_step(saga_id, name, "act", status)
                await run.commit()

        async with unit() as bound, bound.run(saga_id) as run, asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(step(run, str(number)))
        history = [(entry.step_name, entry.status) for entry in await storage.get_step_history(saga_id)]
        assert sorted(history) == sorted((str(n), status) for n in range(8) for status in (_STARTED, _COMPLETED))
        for number in range(8):
            assert history.index((str(number), _STARTED)) < history.index((str(number), _COMPLETED))

    async def test_a_cancelled_commit_is_made_again(self, unit: RunUnit, storage: ICheckpointStorage) -> None:
        """A commit that is cancelled at any moment and made again, with more in it by then, comes once and in order."""
        for turns in range(30):
            saga_id = await new_saga(storage)
            async with unit() as bound, bound.run(saga_id) as run:
                await run.log_step(saga_id, "one", "act", _COMPLETED)
                if turns % 2:
                    await run.update_status(saga_id, SagaStatus.RUNNING)
                commit = asyncio.create_task(run.commit())
                for _ in range(turns // 2):
                    await asyncio.sleep(0)
                commit.cancel()
                with suppress(asyncio.CancelledError):
                    await commit
                await run.log_step(saga_id, "two", "act", _COMPLETED)
                await run.commit()
                version = run.version
            assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == ["one", "two"]
            assert (await storage.get_saga(saga_id)).version == version == 1 + turns % 2
