"""Subject: storages that join a transaction of the caller's, who commits."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Protocol, TypeAlias, TypeVar
from uuid import UUID, uuid4

import pytest

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStoreError,
)
from saga_store.interface import ICheckpointStorage, ISagaStorage
from saga_store.model import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract, Unit, new_saga, observe


class Transaction(Protocol):
    """What the kit does with a transaction, besides leaving it."""

    async def commit(self) -> object: ...

    async def rollback(self) -> object: ...


_Storage = TypeVar("_Storage", bound=ISagaStorage)
_Result = TypeVar("_Result")

Transactions: TypeAlias = Callable[[], AbstractAsyncContextManager[tuple[_Storage, Transaction]]]
"""Opens a transaction: yields a storage bound to it, and itself; leaving without a commit rolls back."""

_Call: TypeAlias = Callable[[ISagaStorage], Awaitable[object]]
_CheckpointCall: TypeAlias = Callable[[ICheckpointStorage], Awaitable[object]]

_STARTED = SagaStepStatus.STARTED
_STEP = LogStep("reserve", "act", _STARTED)


class TransactionalContract(Contract):
    """Base of the subjects about a caller's transaction: override ``transaction`` in a subclass."""

    @pytest.fixture
    def transaction(self) -> Transactions[ISagaStorage]:
        """Override this: return a callable that opens a transaction (see ``Transactions``)."""
        raise NotImplementedError(
            f"{type(self).__name__} has to override the fixture `transaction`: a callable whose result is entered "
            "with `async with`, yields a storage and its transaction, and rolls back on leaving without a commit"
        )

    @pytest.fixture
    def unit(self, transaction: Transactions[ISagaStorage]) -> Unit:
        """A transaction that is committed on leaving."""

        @asynccontextmanager
        async def unit() -> AsyncIterator[ISagaStorage]:
            async with transaction() as (storage, tx):
                yield storage
                await tx.commit()

        return unit


class IsolationContract(TransactionalContract):
    """What a caller's transaction promises of the six methods: all or nothing, and seen by nobody before."""

    async def test_commit_stores(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """What was written before a commit is stored, and seen by others."""
        async with transaction() as (bound, tx):
            saga_id = await new_saga(bound, {"total": 12})
            await bound.update_status(saga_id, SagaStatus.RUNNING)
            await bound.log_step(saga_id, "reserve", "act", _STARTED)
            await tx.commit()
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"total": 12})
        assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == ["reserve"]

    async def test_leaving_rolls_back(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """What was written in a transaction that is left without a commit is gone."""
        async with transaction() as (bound, _):
            saga_id = await new_saga(bound)
        with pytest.raises(SagaNotFoundError):
            await storage.load_saga_state(saga_id)

    async def test_rollback_of_a_creation(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """After a rollback there is no saga, and its id is free."""
        async with transaction() as (bound, tx):
            saga_id = await new_saga(bound, {"total": 1})
            await bound.log_step(saga_id, "reserve", "act", _STARTED)
            await tx.rollback()
        await storage.create_saga(saga_id, "order", {"total": 2})
        assert await observe(storage, saga_id) == ((SagaStatus.PENDING, {"total": 2}), [])

    async def test_rollback_of_changes(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """After a rollback status, context and history are as they were before."""
        saga_id = await new_saga(storage, {"total": 1})
        await storage.log_step(saga_id, "reserve", "act", _STARTED)
        before = await observe(storage, saga_id)
        async with transaction() as (bound, tx):
            await bound.update_status(saga_id, SagaStatus.FAILED)
            await bound.update_context(saga_id, {"total": 2})
            await bound.log_step(saga_id, "pay", "act", _STARTED)
            await tx.rollback()
            assert await observe(bound, saga_id) == before
        assert await observe(storage, saga_id) == before

    async def test_work_after_a_rollback(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """A storage goes on after a rollback: what it writes then can be committed."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.update_context(saga_id, {"total": 1})
            await tx.rollback()
            await bound.update_status(saga_id, SagaStatus.RUNNING)
            await tx.commit()
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})

    async def test_work_after_a_commit(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """A storage goes on after a commit, in a transaction of its own that can be rolled back."""
        async with transaction() as (bound, tx):
            saga_id = await new_saga(bound)
            await tx.commit()
            await bound.update_status(saga_id, SagaStatus.RUNNING)
            await tx.commit()
            await bound.update_status(saga_id, SagaStatus.FAILED)
            await tx.rollback()
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})

    async def test_several_sagas(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """Writes to several sagas are committed together."""
        existing = await new_saga(storage)
        async with transaction() as (bound, tx):
            created = await new_saga(bound)
            await bound.update_status(existing, SagaStatus.RUNNING)
            assert (await storage.load_saga_state(existing))[0] is SagaStatus.PENDING
            await tx.commit()
        assert (await storage.load_saga_state(existing))[0] is SagaStatus.RUNNING
        assert (await storage.load_saga_state(created))[0] is SagaStatus.PENDING

    async def test_writes_are_seen_within(self, transaction: Transactions[ISagaStorage]) -> None:
        """The transaction itself sees what was written in it, before it is committed."""
        async with transaction() as (bound, _):
            saga_id = await new_saga(bound, {"total": 1})
            await bound.update_context(saga_id, {"total": 12})
            await bound.log_step(saga_id, "reserve", "act", _STARTED)
            assert await bound.load_saga_state(saga_id) == (SagaStatus.PENDING, {"total": 12})
            assert len(await bound.get_step_history(saga_id)) == 1

    async def test_creation_is_unseen_before_the_commit(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """A saga whose creation isn't committed doesn't exist for others."""
        async with transaction() as (bound, _):
            saga_id = await new_saga(bound)
            with pytest.raises(SagaNotFoundError):
                await storage.load_saga_state(saga_id)
            with pytest.raises(SagaNotFoundError):
                await storage.get_step_history(saga_id)
            with pytest.raises(SagaNotFoundError):
                await storage.update_status(saga_id, SagaStatus.RUNNING)

    async def test_changes_are_unseen_before_the_commit(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """Others read a saga as it was last committed, and don't wait for it."""
        saga_id = await new_saga(storage, {"total": 1})
        before = await observe(storage, saga_id)
        async with transaction() as (bound, tx):
            await bound.update_status(saga_id, SagaStatus.FAILED)
            await bound.update_context(saga_id, {"total": 2})
            await bound.log_step(saga_id, "pay", "act", _STARTED)
            assert await observe(storage, saga_id) == before
            await tx.commit()
        assert await observe(storage, saga_id) != before

    async def test_other_commits_are_seen(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """A transaction that has only read sees what others commit meanwhile."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, _):
            assert (await bound.load_saga_state(saga_id))[0] is SagaStatus.PENDING
            await storage.update_status(saga_id, SagaStatus.RUNNING)
            assert (await bound.load_saga_state(saga_id))[0] is SagaStatus.RUNNING

    async def test_goes_on_after_taken_id(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """SagaAlreadyExistsError leaves the transaction usable: work before and after it is committed."""
        taken = await new_saga(storage)
        await _goes_on(
            transaction, storage, SagaAlreadyExistsError, lambda bound: bound.create_saga(taken, "order", {})
        )

    async def test_goes_on_after_missing_saga(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """SagaNotFoundError leaves the transaction usable: work before and after it is committed."""
        missing = uuid4()
        refused: list[_Call] = [
            lambda bound: bound.update_context(missing, {}),
            lambda bound: bound.update_status(missing, SagaStatus.RUNNING),
            lambda bound: bound.log_step(missing, "reserve", "act", _STARTED),
            lambda bound: bound.load_saga_state(missing),
            lambda bound: bound.get_step_history(missing),
        ]
        for call in refused:
            await _goes_on(transaction, storage, SagaNotFoundError, call)

    async def test_goes_on_after_bad_input(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """InvalidSagaDataError leaves the transaction usable: work before and after it is committed."""
        saga_id = await new_saga(storage)
        refused: list[_Call] = [
            lambda bound: bound.create_saga(uuid4(), "a\0b", {}),
            lambda bound: bound.update_context(saga_id, {"price": float("nan")}),
            lambda bound: bound.log_step(saga_id, "x" * 256, "act", _STARTED),
        ]
        for call in refused:
            await _goes_on(transaction, storage, InvalidSagaDataError, call)

    async def test_goes_on_after_several_refusals(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """Refusals of one's own creation, one after the other, leave it as it was, to be committed."""
        async with transaction() as (bound, tx):
            saga_id = await new_saga(bound, {"total": 1})
            for _ in range(3):
                with pytest.raises(SagaAlreadyExistsError):
                    await bound.create_saga(saga_id, "refund", {"total": 2})
            await tx.commit()
        assert await storage.load_saga_state(saga_id) == (SagaStatus.PENDING, {"total": 1})


class LockContract(TransactionalContract):
    """What a caller's transaction promises to other writers: they wait, and then see what came of it."""

    async def test_update_waits_for_the_commit(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """A write waits while another transaction has written to the saga, and then goes on top of it."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.update_context(saga_id, {"writer": "first"})
            second = await _waiting(storage, storage.update_context(saga_id, {"writer": "second"}))
            await bound.update_status(saga_id, SagaStatus.RUNNING)
            await tx.commit()
        await second
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {"writer": "second"})

    async def test_update_waits_for_the_rollback(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """A write that waited for a transaction that is rolled back goes on as if that had never been."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.update_context(saga_id, {"writer": "first"})
            second = await _waiting(storage, storage.update_status(saga_id, SagaStatus.RUNNING))
            await tx.rollback()
        await second
        assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})

    async def test_leaving_lets_others_go_on(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """A transaction that is left without a commit keeps nobody waiting."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, _):
            await bound.update_context(saga_id, {"writer": "first"})
            second = await _waiting(storage, storage.update_context(saga_id, {"writer": "second"}))
        await second
        assert (await storage.load_saga_state(saga_id))[1] == {"writer": "second"}

    async def test_entry_waits_for_the_commit(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """An entry waits for a transaction that has written to the saga, so that its entries stand together."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.log_step(saga_id, "first", "act", _STARTED)
            third = await _waiting(storage, storage.log_step(saga_id, "third", "act", _STARTED))
            await bound.log_step(saga_id, "second", "act", _STARTED)
            await tx.commit()
        await third
        history = await storage.get_step_history(saga_id)
        assert [entry.step_name for entry in history] == ["first", "second", "third"]

    async def test_creation_waits_for_the_commit(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """Who creates a saga that another transaction has created waits, and is refused once that commits."""
        async with transaction() as (bound, tx):
            saga_id = await new_saga(bound, {"creator": "first"})
            second = await _waiting(storage, storage.create_saga(saga_id, "order", {"creator": "second"}))
            await tx.commit()
        with pytest.raises(SagaAlreadyExistsError):
            await second
        assert (await storage.load_saga_state(saga_id))[1] == {"creator": "first"}

    async def test_creation_waits_for_the_rollback(
        self, transaction: Transactions[ISagaStorage], storage: ISagaStorage
    ) -> None:
        """Who creates a saga that another transaction has created waits, and creates it if that rolls back."""
        async with transaction() as (bound, tx):
            saga_id = await new_saga(bound, {"creator": "first"})
            second = await _waiting(storage, storage.create_saga(saga_id, "order", {"creator": "second"}))
            await tx.rollback()
        await second
        assert (await storage.load_saga_state(saga_id))[1] == {"creator": "second"}

    async def test_other_sagas_dont_wait(self, transaction: Transactions[ISagaStorage], storage: ISagaStorage) -> None:
        """A transaction that has written to one saga keeps nobody from writing to others."""
        saga_id, other = await new_saga(storage), await new_saga(storage)
        async with transaction() as (bound, _):
            await bound.update_context(saga_id, {"total": 1})
            await storage.update_context(other, {"total": 2})
            assert (await storage.load_saga_state(other))[1] == {"total": 2}


class CheckpointIsolationContract(TransactionalContract):
    """What a caller's transaction promises of checkpoints and versions."""

    async def test_rollback_restores_the_row(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """After a rollback the whole row is as it was: version, attempts and times."""
        saga_id = await new_saga(storage)
        before = await storage.get_saga(saga_id)
        async with transaction() as (bound, tx):
            checkpoint = Checkpoint(saga_id, status=SagaStatus.FAILED, steps=[_STEP], recovery_attempts=1)
            assert await bound.save(checkpoint) == 2
            await tx.rollback()
            assert await bound.get_saga(saga_id) == before
        assert await storage.get_saga(saga_id) == before

    async def test_goes_on_after_stale_version(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """SagaConcurrencyError leaves the transaction usable: work before and after it is committed."""
        saga_id = await new_saga(storage)
        refused: list[_CheckpointCall] = [
            lambda bound: bound.update_context(saga_id, {"total": 1}, expected_version=7),
            lambda bound: bound.update_status(saga_id, SagaStatus.FAILED, expected_version=7),
            lambda bound: bound.save(Checkpoint(saga_id, steps=[_STEP], expected_version=7)),
        ]
        for call in refused:
            await _goes_on(transaction, storage, SagaConcurrencyError, call)
        assert await observe(storage, saga_id) == ((SagaStatus.PENDING, {}), [])

    async def test_goes_on_after_refused_checkpoint(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """A checkpoint that is refused for whatever reason leaves the transaction usable."""
        taken, missing = await new_saga(storage), uuid4()
        refusals: list[tuple[type[SagaStoreError], _CheckpointCall]] = [
            (SagaAlreadyExistsError, lambda bound: bound.save(Checkpoint(taken, name="order", steps=[_STEP]))),
            (SagaNotFoundError, lambda bound: bound.save(Checkpoint(missing, steps=[_STEP]))),
            (SagaNotFoundError, lambda bound: bound.get_saga(missing)),
            (InvalidSagaDataError, lambda bound: bound.save(Checkpoint(taken))),
        ]
        for error, call in refusals:
            await _goes_on(transaction, storage, error, call)
        assert await storage.get_step_history(taken) == []

    async def test_expected_version_is_checked_after_the_wait(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """Who expects a version, and waits for a transaction that raises it, is refused once that commits."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.update_context(saga_id, {"writer": "first"})
            checkpoint = Checkpoint(saga_id, context={"writer": "second"}, steps=[_STEP], expected_version=1)
            second = await _waiting(storage, storage.save(checkpoint))
            await tx.commit()
        with pytest.raises(SagaConcurrencyError) as raised:
            await second
        assert (raised.value.expected, raised.value.actual) == (1, 2)
        assert await observe(storage, saga_id) == ((SagaStatus.PENDING, {"writer": "first"}), [])

    async def test_expected_version_holds_after_a_rollback(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """Who expects a version, and waits for a transaction that rolls back, goes through."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.update_context(saga_id, {"writer": "first"})
            checkpoint = Checkpoint(saga_id, context={"writer": "second"}, expected_version=1)
            second = await _waiting(storage, storage.save(checkpoint))
            await tx.rollback()
        assert await second == 2
        assert (await storage.get_saga(saga_id)).context == {"writer": "second"}

    async def test_versions_count_on_after_the_wait(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """Writes that waited count on from the version that they find afterwards."""
        saga_id = await new_saga(storage)
        async with transaction() as (bound, tx):
            await bound.update_context(saga_id, {"total": 1})
            second = await _waiting(storage, storage.save(Checkpoint(saga_id, context={"total": 2})))
            await bound.update_context(saga_id, {"total": 3})
            await tx.commit()
        assert await second == 4

    async def test_listing_sees_only_commits(
        self, transaction: Transactions[ICheckpointStorage], storage: ICheckpointStorage
    ) -> None:
        """The list of stale sagas has what is committed, and what the transaction itself has written."""
        name = f"order-{uuid4()}"
        existing, created = uuid4(), uuid4()
        await storage.save(Checkpoint(existing, name=name))
        async with transaction() as (bound, _):
            await bound.save(Checkpoint(created, name=name))
            await bound.update_status(existing, SagaStatus.COMPLETED)
            assert await _listed(bound, name) == [created]
            assert await _listed(storage, name) == [existing]


async def _goes_on(
    transaction: Transactions[_Storage],
    storage: ISagaStorage,
    error: type[SagaStoreError],
    refused: Callable[[_Storage], Awaitable[object]],
) -> None:
    """Make the refused call amid other work in a transaction, and look whether all of that work is committed."""
    async with transaction() as (bound, tx):
        saga_id = await new_saga(bound)
        await bound.log_step(saga_id, "before", "act", _STARTED)
        with pytest.raises(error):
            await refused(bound)
        await bound.log_step(saga_id, "after", "act", _STARTED)
        await bound.update_status(saga_id, SagaStatus.RUNNING)
        await tx.commit()
    assert await storage.load_saga_state(saga_id) == (SagaStatus.RUNNING, {})
    assert [entry.step_name for entry in await storage.get_step_history(saga_id)] == ["before", "after"]


async def _waiting(storage: ISagaStorage, write: Awaitable[_Result]) -> asyncio.Future[_Result]:
    """Start a write that has to wait for an open transaction, and return it, waiting.

    It gets the time of a few calls to reach the database. On a slow machine it may get no further than that,
    and then the test shows less than it could; it never fails for it.
    """
    started = asyncio.ensure_future(write)
    for _ in range(5):
        await asyncio.sleep(0)
        with pytest.raises(SagaNotFoundError):
            await storage.load_saga_state(uuid4())
    assert not started.done(), "the write didn't wait for the transaction that has written to the same saga"
    return started


async def _listed(storage: ICheckpointStorage, name: str) -> list[UUID]:
    return [saga.id for saga in await storage.find_stale_sagas(stale_after=timedelta(0), name=name)]
