"""Subject: runs that commit into a transaction of the caller's, beside what else is written there."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID, uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError, SagaNotFoundError
from saga_store.interface import IRecoveryStorage, ISagaStorage
from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.run_interface import ISagaRun
from saga_store.testing.contract import Contract, Together, new_saga, observe
from saga_store.testing.run import RunUnit
from saga_store.testing.transaction import Transaction

Joinable: TypeAlias = Callable[[], AbstractAsyncContextManager[Transaction]]
"""Opens a transaction that a run may commit into; leaving it without a commit rolls back."""

JoinableFor: TypeAlias = Callable[[UUID], AbstractAsyncContextManager[Transaction]]
"""Opens one that this saga's runs may commit into: on its shard, if the storage is made of several."""

_COMPLETED = SagaStepStatus.COMPLETED
_NOW = timedelta(0)
_HOUR = timedelta(hours=1)


class CommitIntoContract(Contract):
    """What ``run.commit(into=...)`` promises, for storages that commit each call otherwise."""

    @pytest.fixture
    def joinable(self) -> Joinable:
        """Override this: return a callable that opens a transaction on the same database (see ``Joinable``)."""
        raise NotImplementedError(
            f"{type(self).__name__} has to override the fixture `joinable`: a callable whose result is entered with "
            "`async with`, yields what a run can commit into, and rolls back on leaving without a commit"
        )

    @pytest.fixture
    def joinable_for(self, joinable: Joinable) -> JoinableFor:
        """Override this instead of ``joinable`` where it depends on the saga which database to open it on."""
        return lambda _: joinable()

    async def test_it_is_stored_with_the_transaction(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """Nobody else sees the commit before the transaction's; then the run goes on from its version."""
        saga_id = await new_saga(storage)
        before = await observe(storage, saga_id)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await _log(run, "reserve")
            async with joinable_for(saga_id) as transaction:
                await run.commit(into=transaction)
                assert await observe(storage, saga_id) == before
                assert run.version == 2
                await transaction.commit()
            assert run.version == 2
            await _log(run, "pay")
            await run.update_context(saga_id, {"total": 12})
            await run.commit()
            assert run.version == 3
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})
        assert await _steps(storage, run) == ["reserve", "pay"]

    async def test_after_a_rollback_it_is_buffered_again(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """The version is what it was, and the next commit writes what was rolled back and what came since as one."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await _log(run, "reserve")
            async with joinable_for(saga_id) as transaction:
                await run.commit(into=transaction)
                await _log(run, "pay")
                await transaction.rollback()
            assert run.version == 1
            assert await run.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})
            await _log(run, "ship")
            await run.commit()
            assert run.version == 2
        assert (await storage.get_saga(saga_id)).version == 2
        assert await _steps(storage, run) == ["reserve", "pay", "ship"]

    async def test_leaving_the_transaction_rolls_back(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """So does a transaction that is left without a commit; and in the next one it is written."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await _log(run, "reserve")
            for _ in range(3):
                async with joinable_for(saga_id) as transaction:
                    await run.commit(into=transaction)
            assert await storage.get_step_history(saga_id) == []
            async with joinable_for(saga_id) as transaction:
                await run.commit(into=transaction)
                await transaction.commit()
        assert await _steps(storage, run) == ["reserve"]

    async def test_two_commits_into_one_transaction(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """Each is a checkpoint of its own, and they are stored together."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run, joinable_for(saga_id) as transaction:
            for number in range(3):
                await run.update_context(saga_id, {"n": number})
                await _log(run, str(number))
                await run.commit(into=transaction)
                assert run.version == number + 2
            assert await run.load_saga_state(saga_id) == (SagaStatus.PENDING, {"n": 2})
            assert await _steps(run, run) == ["0", "1", "2"]
            await transaction.commit()
            assert await _steps(run, run) == ["0", "1", "2"]
        assert (await storage.get_saga(saga_id)).version == 4
        assert await _steps(storage, run) == ["0", "1", "2"]

    async def test_two_commits_are_rolled_back(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """They are one buffer then, and one checkpoint when it is committed."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            async with joinable_for(saga_id) as transaction:
                for number in range(3):
                    await run.update_context(saga_id, {"n": number})
                    await _log(run, str(number))
                    await run.commit(into=transaction)
            await run.commit()
            assert run.version == 2
        assert (await storage.get_saga(saga_id)).context == {"n": 2}
        assert await _steps(storage, run) == ["0", "1", "2"]

    async def test_the_transaction_goes_on(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """What is done with it after it was committed or rolled back doesn't concern the run."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run, joinable_for(saga_id) as transaction:
            await _log(run, "reserve")
            await run.commit(into=transaction)
            await transaction.commit()
            await transaction.rollback()
            assert await _steps(run, run) == ["reserve"]
            await _log(run, "pay")
            await run.commit(into=transaction)
            await transaction.rollback()
            await transaction.commit()
            await run.commit()
            await transaction.rollback()
            await run.commit()
        assert await _steps(storage, run) == ["reserve", "pay"]

    async def test_a_saga_is_created(self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage) -> None:
        """A creation that is rolled back can be committed again; one that is committed is goes on at version 1."""
        saga_id = uuid4()
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            await run.create_saga(saga_id, "order", {"total": 12})
            async with joinable_for(saga_id) as transaction:
                await run.commit(into=transaction)
            assert run.version is None
            with pytest.raises(SagaNotFoundError):
                await storage.get_saga(saga_id)
            async with joinable_for(saga_id) as transaction:
                await run.commit(into=transaction)
                await transaction.commit()
            assert run.version == 1
            assert await run.holds_lease()
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.commit()
        saga = await storage.get_saga(saga_id)
        assert (saga.version, saga.context, saga.lease_owner) == (3, {"total": 12}, None)

    async def test_it_is_fenced(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage, together: Together
    ) -> None:
        """If somebody else has changed the saga it is refused, and the transaction remains usable."""
        saga_id, other_id = [await new_saga(storage, saga_id=saga_id) for saga_id in await together(2)]
        async with (
            unit() as bound,
            bound.run(saga_id) as late,
            bound.run(other_id) as run,
            joinable_for(saga_id) as transaction,
        ):
            await _log(late, "late")
            await storage.update_context(saga_id, {"theirs": True})
            with pytest.raises(SagaConcurrencyError):
                await late.commit(into=transaction)
            await late.rollback()
            await _log(run, "other")
            await run.commit(into=transaction)
            await transaction.commit()
        assert await storage.get_step_history(saga_id) == []
        assert await _steps(storage, run) == ["other"]

    async def test_two_runs_in_one_transaction(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage, together: Together
    ) -> None:
        """Each goes on from what became of the transaction; their sagas live together."""
        first, second = [await new_saga(storage, saga_id=saga_id) for saga_id in await together(2)]
        async with unit() as bound, bound.run(first) as one, bound.run(second) as two:
            async with joinable_for(first) as transaction:
                for run in (one, two):
                    await run.update_status(run.saga_id, SagaStatus.RUNNING)
                    await run.commit(into=transaction)
                await transaction.commit()
                await one.update_status(first, SagaStatus.COMPLETED)
                await one.commit(into=transaction)
            await two.update_status(second, SagaStatus.COMPLETED)
            await two.commit()
            assert (one.version, two.version) == (2, 3)
            await one.rollback()
        assert (await storage.get_saga(first)).status is SagaStatus.RUNNING
        assert (await storage.get_saga(second)).status is SagaStatus.COMPLETED

    async def test_no_other_commit_meanwhile(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """Until the transaction is over a commit elsewhere, which would wait for its lock, is refused by name."""
        saga_id = await new_saga(storage)
        async with (
            unit() as bound,
            bound.run(saga_id) as run,
            joinable_for(saga_id) as transaction,
            joinable_for(saga_id) as other,
        ):
            await _log(run, "reserve")
            await run.commit(into=transaction)
            await run.commit()
            await _log(run, "pay")
            for into in (None, other):
                with pytest.raises(InvalidSagaDataError, match="into"):
                    await run.commit(into=into)
            await transaction.commit()
            await run.commit(into=other)
            await other.commit()
        assert await _steps(storage, run) == ["reserve", "pay"]

    async def test_nothing_to_commit(self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage) -> None:
        """With nothing buffered nothing is written."""
        saga_id = await new_saga(storage)
        before = await storage.get_saga(saga_id)
        async with unit() as bound, bound.run(saga_id) as run, joinable_for(saga_id) as transaction:
            await run.load_saga_state(saga_id)
            await run.commit(into=transaction)
            await transaction.commit()
        assert await storage.get_saga(saga_id) == before

    async def test_what_isnt_a_transaction(self, unit: RunUnit, storage: IRecoveryStorage) -> None:
        """Anything else is refused by name, and the buffer stays."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id) as run:
            await _log(run, "reserve")
            for into in ("session", object(), storage, False):
                with pytest.raises(InvalidSagaDataError, match="into"):
                    await run.commit(into=into)
            await run.commit()
        assert await _steps(storage, run) == ["reserve"]

    async def test_a_rollback_of_the_run(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """What a transaction has got stays in it; once it is committed, the run goes on from there."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            async with joinable_for(saga_id) as transaction:
                await _log(run, "reserve")
                await run.update_status(saga_id, SagaStatus.RUNNING)
                await run.commit(into=transaction)
                await run.rollback()
                await transaction.commit()
            assert await run.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})
            await _log(run, "pay")
            await run.commit()
            async with joinable_for(saga_id) as transaction:
                await _log(run, "ship")
                await run.commit(into=transaction)
                await run.rollback()
            await run.commit()
        assert await _steps(storage, run) == ["reserve", "pay"]

    async def test_the_lease_is_renewed(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """The commit renews it; heartbeats are left out meanwhile, and aren't refused afterwards."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            first = (await storage.get_saga(saga_id)).lease_expires_at
            async with joinable_for(saga_id) as transaction:
                await run.update_status(saga_id, SagaStatus.RUNNING)
                await run.commit(into=transaction)
                await run.heartbeat()
                assert await run.holds_lease()
                await transaction.commit()
            saga = await storage.get_saga(saga_id)
            assert saga.lease_expires_at == saga.updated_at + _HOUR
            assert first is not None
            assert saga.lease_expires_at > first
            await run.heartbeat()
            assert await run.holds_lease()
        assert (await storage.get_saga(saga_id)).lease_owner is None

    async def test_the_lease_of_a_commit_that_was_rolled_back(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage
    ) -> None:
        """The lease is held as before, also if the commit would have ended it."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            async with joinable_for(saga_id) as transaction:
                await run.update_status(saga_id, SagaStatus.COMPLETED)
                await run.commit(into=transaction)
            assert await run.holds_lease()
            await run.heartbeat()
            async with joinable_for(saga_id) as transaction:
                await run.commit(into=transaction)
                await transaction.commit()
            assert not await run.holds_lease()
        saga = await storage.get_saga(saga_id)
        assert (saga.status, saga.lease_owner, saga.version) == (SagaStatus.COMPLETED, None, 3)

    async def test_background_renewal_goes_on(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Renewals at any moment don't take the run's own commits for somebody else's."""
        saga_id = await new_saga(storage)
        caplog.set_level(logging.WARNING, logger="saga_store")
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_NOW, renew=True) as run:
            for number in range(20):
                async with joinable_for(saga_id) as transaction:
                    await run.update_context(saga_id, {"n": number})
                    await run.commit(into=transaction)
                    await asyncio.sleep(0.005)
                    if number % 3:
                        await transaction.commit()
                await asyncio.sleep(0.005)
            await run.rollback()
            await run.update_status(saga_id, SagaStatus.COMPLETED)
            await run.commit()
        assert [record.getMessage() for record in caplog.records if record.name == "saga_store"] == []

    async def test_leaving_after_a_rollback_warns(
        self, unit: RunUnit, joinable_for: JoinableFor, storage: IRecoveryStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What a rollback has made a buffer again is uncommitted like any other; what was committed isn't."""
        saga_id = await new_saga(storage)
        with caplog.at_level(logging.WARNING, logger="saga_store"):
            async with unit() as bound:
                for commits in (True, False):
                    async with bound.run(saga_id) as run:
                        await _log(run, "reserve")
                        async with joinable_for(saga_id) as transaction:
                            await run.commit(into=transaction)
                            if commits:
                                await transaction.commit()
        assert len(await storage.get_step_history(saga_id)) == 1
        assert len([record for record in caplog.records if record.name == "saga_store"]) == 1


async def _log(run: ISagaRun, name: str) -> None:
    await run.log_step(run.saga_id, name, "act", _COMPLETED)


async def _steps(storage: ISagaStorage, run: ISagaRun) -> list[str]:
    return [entry.step_name for entry in await storage.get_step_history(run.saga_id)]
