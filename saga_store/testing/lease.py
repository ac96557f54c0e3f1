"""Subject: the lease that a run takes, renews and releases."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID, uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError, SagaLeasedError, SagaNotFoundError
from saga_store.interface import IRecoveryStorage
from saga_store.model import Checkpoint, SagaExecution, SagaStatus, SagaStepStatus
from saga_store.run_interface import ISagaRun
from saga_store.storage import SagaStorage
from saga_store.testing.claim import Age, AgingContract
from saga_store.testing.contract import new_saga

LeaseUnit: TypeAlias = Callable[[], AbstractAsyncContextManager[SagaStorage]]
"""A unit of work of a storage whose runs take leases, with all that this package's storages have."""

_NOW = timedelta(0)
_HOUR = timedelta(hours=1)


class _TestError(Exception):
    """What goes wrong inside a run."""


class LeaseContract(AgingContract):
    """What ``storage.run(saga_id, owner=..., lease=...)`` promises, in whatever transaction."""

    async def test_entering_takes_the_lease_and_leaving_releases_it(
        self, unit: LeaseUnit, storage: IRecoveryStorage
    ) -> None:
        """Within the run the saga is leased, and nobody's afterwards; neither counts as an attempt."""
        saga_id = await new_saga(storage)
        async with unit() as bound:
            async with bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
                saga = await bound.get_saga(saga_id)
                assert (saga.lease_owner, saga.version, saga.recovery_attempts) == ("worker-1", 2, 0)
                assert saga.lease_expires_at == saga.updated_at + _HOUR
                assert await run.holds_lease()
                assert run.version == 2
            assert not await run.holds_lease()
        saga = await storage.get_saga(saga_id)
        assert (saga.lease_owner, saga.lease_expires_at, saga.version) == (None, None, 3)

    async def test_a_second_taker_is_refused(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """The error of a second taker names the holder and the end of the lease; nothing is changed."""
        saga = await _claimed(storage, "worker-1")
        async with unit() as bound:
            with pytest.raises(SagaLeasedError) as refusal:
                async with bound.run(saga.id, owner="worker-2", lease=_HOUR):
                    pytest.fail("the run was entered")
        assert (refusal.value.owner, refusal.value.expires_at) == ("worker-1", saga.lease_expires_at)
        assert refusal.value.saga_id == saga.id
        assert await storage.get_saga(saga.id) == saga

    async def test_the_holder_may_take_it_again(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """Who has claimed a saga enters a run of it under the same name, and without another attempt."""
        saga = await _claimed(storage, "worker-1")
        async with unit() as bound, bound.run(saga.id, owner="worker-1", lease=2 * _HOUR):
            taken = await bound.get_saga(saga.id)
        assert (taken.version, taken.recovery_attempts) == (saga.version + 1, saga.recovery_attempts)
        assert taken.lease_expires_at == taken.updated_at + 2 * _HOUR

    async def test_an_expired_lease_can_be_taken(self, unit: LeaseUnit, storage: IRecoveryStorage, age: Age) -> None:
        """A lease that has expired keeps nobody out."""
        saga = await _claimed(storage, "worker-1")
        await age(saga.id, _HOUR)
        async with unit() as bound, bound.run(saga.id, owner="worker-2", lease=_HOUR):
            assert (await bound.get_saga(saga.id)).lease_owner == "worker-2"

    async def test_commits_and_heartbeats_renew(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """Each commit moves the end of the lease, one of log entries alone too, and so does ``heartbeat()``.

        Renewing alone leaves version and time of change as they are.
        """
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            ends = [(await bound.get_saga(saga_id)).lease_expires_at]

            async def later() -> SagaExecution:
                saga = await bound.get_saga(saga_id)
                ends.append(saga.lease_expires_at)
                return saga

            await run.heartbeat()
            assert (await later()).version == 2
            await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
            await run.commit()
            assert (await later()).version == 2
            await run.update_context(saga_id, {"total": 12})
            await run.commit()
            saga = await later()
            assert (saga.version, saga.lease_expires_at) == (3, saga.updated_at + _HOUR)
            await run.heartbeat()
            assert (await later()).updated_at == saga.updated_at
            assert ends == sorted(set(ends), key=str)
            assert await run.holds_lease()

    async def test_finishing_in_a_run_ends_its_lease(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """A commit that finishes the saga clears the lease; later heartbeats and leaving the run do nothing."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            await run.update_status(saga_id, SagaStatus.COMPLETED)
            await run.commit()
            assert not await run.holds_lease()
            await run.heartbeat()
            await run.log_step(saga_id, "mail", "act", SagaStepStatus.COMPLETED)
            await run.commit()
        saga = await storage.get_saga(saga_id)
        assert (saga.lease_owner, saga.lease_expires_at, saga.version) == (None, None, 3)

    async def test_an_error_releases_too(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """Leaving by an exception drops what isn't committed, and releases the lease."""
        saga_id = await new_saga(storage)
        async with unit() as bound:
            with pytest.raises(_TestError):
                await _fail(bound.run(saga_id, owner="worker-1", lease=_HOUR))
        saga = await storage.get_saga(saga_id)
        assert (saga.lease_owner, saga.context) == (None, {})

    async def test_a_new_saga_is_born_leased(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """A run that creates its saga holds the lease from then on."""
        saga_id = uuid4()
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            assert not await run.holds_lease()
            await run.heartbeat()
            with pytest.raises(SagaNotFoundError):
                await run.load_saga_state(saga_id)
            await run.create_saga(saga_id, "order", {})
            await run.commit()
            saga = await bound.get_saga(saga_id)
            assert (saga.lease_owner, saga.version) == ("worker-1", 1)
            assert saga.lease_expires_at == saga.created_at + _HOUR
            assert await run.holds_lease()
        assert (await storage.get_saga(saga_id)).lease_owner is None

    async def test_it_has_to_be_entered(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """A run with a lease that isn't entered refuses every call, and says how to enter it; nothing is written."""
        saga_id = await new_saga(storage)
        before = await storage.get_saga(saga_id)
        async with unit() as bound:
            run = bound.run(saga_id, owner="worker-1", lease=_HOUR)
            for call in (run.load_saga_state(saga_id), run.update_context(saga_id, {}), run.commit(), run.heartbeat()):
                with pytest.raises(InvalidSagaDataError, match="async with"):
                    await call
            assert not await run.holds_lease()
        assert await storage.get_saga(saga_id) == before

    async def test_a_bad_lease_is_refused(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """A lease needs an owner and a duration, and a run without one has nothing to renew or to hold."""
        saga_id = await new_saga(storage)
        async with unit() as bound:
            for arguments in ({"owner": "worker-1"}, {"lease": _HOUR}, {"renew": True}):
                with pytest.raises(InvalidSagaDataError):
                    bound.run(saga_id, **arguments)
            for owner, lease in (("", _HOUR), ("w" * 256, _HOUR), ("worker-1", -_HOUR), (7, _HOUR), ("worker-1", 30)):
                with pytest.raises(InvalidSagaDataError):
                    bound.run(saga_id, owner=owner, lease=lease)  # type: ignore[arg-type] # that is the point
            async with bound.run(saga_id) as run:
                assert not await run.holds_lease()
                with pytest.raises(InvalidSagaDataError):
                    await run.heartbeat()


class LeaseRaceContract(AgingContract):
    """What becomes of a run whose lease somebody else has got; for storages that commit each call."""

    async def test_who_lost_the_lease_is_refused(self, unit: LeaseUnit, storage: IRecoveryStorage, age: Age) -> None:
        """Whatever a run does after somebody else got its lease is refused, also after a rollback."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            await run.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
            await age(saga_id, _HOUR)
            assert not await run.holds_lease()
            async with bound.run(saga_id, owner="worker-2", lease=_HOUR) as other:
                await other.update_context(saga_id, {"total": 12})
                await other.commit()
                before = await storage.get_saga(saga_id)
                for call in (run.commit, run.heartbeat, run.commit):
                    with pytest.raises(SagaConcurrencyError):
                        await call()
                await run.rollback()
                with pytest.raises(SagaConcurrencyError):
                    await run.log_step(saga_id, "pay", "act", SagaStepStatus.COMPLETED)
                assert await storage.get_saga(saga_id) == before
                assert await other.holds_lease()
        assert await storage.get_step_history(saga_id) == []

    async def test_leaving_doesnt_release_what_others_hold(
        self, unit: LeaseUnit, storage: IRecoveryStorage, age: Age
    ) -> None:
        """A run that lost its lease leaves the new holder's alone when it is left."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            await age(saga_id, _HOUR)
            other = bound.run(saga_id, owner="worker-2", lease=_HOUR)
            await other.__aenter__()  # it is to outlive the first
            assert not await run.holds_lease()
        assert (await storage.get_saga(saga_id)).lease_owner == "worker-2"
        await other.__aexit__(None, None, None)
        assert (await storage.get_saga(saga_id)).lease_owner is None

    async def test_an_expired_lease_that_nobody_took_goes_on(
        self, unit: LeaseUnit, storage: IRecoveryStorage, age: Age
    ) -> None:
        """As long as nobody else has taken it, the next commit renews a lease that has expired."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            await age(saga_id, 2 * _HOUR)
            assert not await run.holds_lease()
            await run.update_status(saga_id, SagaStatus.RUNNING)
            await run.commit()
            assert await run.holds_lease()

    async def test_a_broken_lease_is_lost(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """After an operator broke the lease, the run can't write, and doesn't hold it."""
        saga_id = await new_saga(storage)
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_HOUR) as run:
            await storage.break_lease(saga_id, by="alice", reason="it hangs")
            assert not await run.holds_lease()
            await _assert_refused(run.heartbeat())

    async def test_one_of_many_takes_it(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """Of many that enter at once exactly one gets in; the others are told who it was."""
        saga_id = await new_saga(storage)
        everybody_tried = asyncio.Barrier(8)

        async def work(owner: str) -> str:
            async with unit() as bound:
                try:
                    async with bound.run(saga_id, owner=owner, lease=_HOUR):
                        await everybody_tried.wait()
                        return owner
                except SagaLeasedError as exc:
                    await everybody_tried.wait()
                    return exc.owner

        told = await asyncio.gather(*(work(f"worker-{number}") for number in range(8)))
        assert len(set(told)) == 1

    async def test_background_renewal_ends_with_the_run(self, unit: LeaseUnit, storage: IRecoveryStorage) -> None:
        """With ``renew`` the lease is moved on again and again, while the run commits, and not after it."""
        saga_id = await new_saga(storage)
        tasks = asyncio.all_tasks()
        # So short that it is renewed at once, and would have expired without.
        async with unit() as bound, bound.run(saga_id, owner="worker-1", lease=_NOW, renew=True) as run:
            first = (await storage.get_saga(saga_id)).lease_expires_at
            while (await storage.get_saga(saga_id)).lease_expires_at == first:
                await _one_turn()
            for number in range(10):
                await run.update_context(saga_id, {"n": number})
                await run.commit()
                await _one_turn()
        assert (await storage.get_saga(saga_id)).context == {"n": 9}
        assert not {task for task in asyncio.all_tasks() - tasks if "_keep_renewing" in repr(task)}


async def _assert_refused(write: object) -> None:
    with pytest.raises(SagaConcurrencyError):
        await write  # type: ignore[misc] # a coroutine


async def _one_turn() -> None:
    await asyncio.sleep(0)


async def _fail(run: ISagaRun) -> None:
    async with run:
        await run.update_context(run.saga_id, {"total": 12})
        raise _TestError


async def _claimed(storage: IRecoveryStorage, owner: str) -> SagaExecution:
    saga_id, name = UUID(int=uuid4().int), f"order-{uuid4()}"
    await storage.save(Checkpoint(saga_id, name=name))
    [saga] = await storage.claim_sagas(owner=owner, lease=_HOUR, limit=1, stale_after=_NOW, name=name)
    return saga
