"""Subject: claiming interrupted sagas, and the list of those that nobody claims any more."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeAlias
from uuid import UUID, uuid4

import pytest

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError
from saga_store.interface import IRecoveryStorage
from saga_store.model import UNFINISHED, Checkpoint, SagaExecution, SagaStatus
from saga_store.testing.contract import Contract, Together

Age: TypeAlias = Callable[[UUID, timedelta], Awaitable[None]]
"""Makes a committed saga older: its last change and the end of its lease move back in time."""

_NOW = timedelta(0)
_SECOND = timedelta(seconds=1)
_HOUR = timedelta(hours=1)


class AgingContract(Contract):
    """Base of the subjects in which time passes: override ``age`` as well."""

    @pytest.fixture
    def age(self) -> Age:
        """Override this: return a callable that makes a saga older (see ``Age``), so that no test has to wait."""
        raise NotImplementedError(
            f"{type(self).__name__} has to override the fixture `age`: an async callable (saga_id, timedelta) that "
            "moves the saga's updated_at and lease_expires_at back in time, and has committed that when it returns"
        )


class ClaimContract(AgingContract):
    """What ``claim_sagas`` and ``find_exhausted_sagas`` promise; other sagas may be there, under other names."""

    async def test_a_claim_leases_and_counts(self, storage: IRecoveryStorage) -> None:
        """A claimed saga has the owner's lease from now on, one more attempt and the next version."""
        name, saga_id = await _new(storage, status=SagaStatus.RUNNING)
        before = await storage.get_saga(saga_id)
        [claimed] = await _claim(storage, name, owner="worker-1", lease=_HOUR)
        assert (claimed.lease_owner, claimed.version, claimed.recovery_attempts) == ("worker-1", 2, 1)
        assert claimed.lease_expires_at == claimed.updated_at + _HOUR
        assert claimed.updated_at > before.updated_at
        assert (claimed.status, claimed.created_at) == (SagaStatus.RUNNING, before.created_at)

    async def test_a_claim_returns_what_is_stored(self, storage: IRecoveryStorage) -> None:
        """The rows that a claim returns are those that ``get_saga`` gives afterwards, contexts included."""
        name, saga_id = await _new(storage)
        await storage.update_context(saga_id, {"z": 1e16, "a": [-0.0, "\ud800\0"]})
        claimed = await _claim(storage, name)
        assert repr(claimed) == repr([await storage.get_saga(saga_id)])

    async def test_a_claimed_saga_isnt_claimed_again(self, storage: IRecoveryStorage) -> None:
        """While the lease lasts nobody claims the saga, its owner included, and it isn't listed as stale."""
        name, _ = await _new(storage)
        assert len(await _claim(storage, name, owner="worker-1")) == 1
        for owner in ("worker-1", "worker-2"):
            assert await _claim(storage, name, owner=owner) == []
        assert await storage.find_stale_sagas(stale_after=_NOW, name=name) == []

    async def test_an_expired_lease_is_claimed(self, storage: IRecoveryStorage, age: Age) -> None:
        """Once a lease has expired the saga goes to the next, and the first is refused by the version."""
        name, saga_id = await _new(storage)
        [first] = await _claim(storage, name, owner="worker-1", lease=_HOUR)
        await age(saga_id, _HOUR)
        [second] = await _claim(storage, name, owner="worker-2")
        assert (second.lease_owner, second.recovery_attempts) == ("worker-2", 2)
        with pytest.raises(SagaConcurrencyError):
            await storage.update_status(saga_id, SagaStatus.COMPLETED, expected_version=first.version)
        await storage.update_status(saga_id, SagaStatus.COMPLETED, expected_version=second.version)

    async def test_finished_sagas_arent_claimed(self, storage: IRecoveryStorage) -> None:
        """PENDING, RUNNING and COMPENSATING sagas are claimed; COMPLETED and FAILED ones aren't."""
        name = _new_name()
        for status in SagaStatus:
            await _new(storage, name, status=status)
        assert {saga.status for saga in await _claim(storage, name)} == set(UNFINISHED)

    async def test_finishing_ends_the_lease(self, storage: IRecoveryStorage) -> None:
        """A write that makes the saga COMPLETED or FAILED clears its lease."""
        for status in (SagaStatus.COMPLETED, SagaStatus.FAILED):
            name, saga_id = await _new(storage)
            await _claim(storage, name)
            await storage.update_status(saga_id, status)
            saga = await storage.get_saga(saga_id)
            assert (saga.lease_owner, saga.lease_expires_at) == (None, None)

    async def test_other_writes_leave_the_lease(self, storage: IRecoveryStorage) -> None:
        """A write that doesn't finish the saga leaves its lease as it was."""
        name, saga_id = await _new(storage)
        [claimed] = await _claim(storage, name)
        await storage.update_status(saga_id, SagaStatus.COMPENSATING)
        await storage.update_context(saga_id, {"total": 12})
        saga = await storage.get_saga(saga_id)
        assert (saga.lease_owner, saga.lease_expires_at) == (claimed.lease_owner, claimed.lease_expires_at)

    async def test_fresh_sagas_arent_claimed(self, storage: IRecoveryStorage, age: Age) -> None:
        """A saga is claimed once it hasn't changed for ``stale_after``, and not before."""
        name, saga_id = await _new(storage)
        assert await _claim(storage, name, stale_after=_HOUR) == []
        await age(saga_id, _HOUR)
        assert len(await _claim(storage, name, stale_after=_HOUR)) == 1

    async def test_pauses_grow(self, storage: IRecoveryStorage, age: Age) -> None:
        """After each attempt a saga waits longer: once, three times, seven times the backoff."""
        name, saga_id = await _new(storage)
        for attempts, pauses in enumerate((0, 1, 3, 7)):
            if pauses:
                await age(saga_id, _HOUR * pauses - _HOUR / 2)
                assert await _claim(storage, name, lease=_NOW, backoff=_HOUR, max_backoff=9 * _HOUR) == []
                await age(saga_id, _HOUR / 2)
            [claimed] = await _claim(storage, name, lease=_NOW, backoff=_HOUR, max_backoff=9 * _HOUR)
            assert claimed.recovery_attempts == attempts + 1

    async def test_pauses_have_an_end(self, storage: IRecoveryStorage, age: Age) -> None:
        """However many attempts there were, a saga waits no longer than ``max_backoff``."""
        for attempts in (10, 2_000, 2**31 - 2):
            name, saga_id = await _new(storage, attempts=attempts)
            await age(saga_id, _HOUR)
            claimed = await _claim(
                storage, name, backoff=timedelta.max, max_backoff=_HOUR, stale_after=_NOW, max_attempts=2**31 - 1
            )
            assert [saga.recovery_attempts for saga in claimed] == [attempts + 1]

    async def test_the_most_urgent_are_claimed_first(
        self, storage: IRecoveryStorage, age: Age, together: Together
    ) -> None:
        """Of sagas that live together, those with fewer attempts come first, then those unchanged for longest."""
        name = _new_name()
        sagas = {}
        standing = ((1, 4), (0, 1), (0, 2), (2, 3), (0, 3))
        for saga_id, (attempts, hours) in zip(await together(len(standing)), standing, strict=True):
            await storage.save(Checkpoint(saga_id, name=name, recovery_attempts=attempts))
            await age(saga_id, _HOUR * hours)
            sagas[saga_id] = (attempts, -hours)
        order = sorted(sagas, key=lambda saga_id: sagas[saga_id])
        assert [saga.id for saga in await _claim(storage, name, limit=0)] == []
        assert [saga.id for saga in await _claim(storage, name, limit=3)] == order[:3]
        assert [saga.id for saga in await _claim(storage, name, limit=3)] == order[3:]

    async def test_none_is_left_out_and_none_comes_twice(self, storage: IRecoveryStorage) -> None:
        """Claims that follow each other get all sagas of a name, however they are spread, fewest attempts first."""
        name = _new_name()
        sagas = {(await _new(storage, name, attempts=attempts % 3))[1] for attempts in range(12)}
        claimed: list[UUID] = []
        while found := await _claim(storage, name, limit=5):
            assert len(found) <= 5
            attempts = [saga.recovery_attempts for saga in found]
            assert attempts == sorted(attempts)
            claimed += [saga.id for saga in found]
        assert sorted(claimed) == sorted(sagas)

    async def test_only_this_name_is_claimed(self, storage: IRecoveryStorage) -> None:
        """With a name, only sagas of exactly this name are claimed; without one, all."""
        (name, saga_id), (other, _) = await _new(storage), await _new(storage)
        assert [saga.id for saga in await _claim(storage, name)] == [saga_id]
        claimed = await storage.claim_sagas(owner="worker-1", lease=_HOUR, limit=2**31 - 1, stale_after=_NOW)
        assert other in {saga.name for saga in claimed}
        assert saga_id not in {saga.id for saga in claimed}

    async def test_exhausted_sagas_are_listed_instead(self, storage: IRecoveryStorage, age: Age) -> None:
        """A saga with ``max_attempts`` attempts isn't claimed but listed, once its last lease has ended."""
        name, saga_id = await _new(storage, attempts=4)
        assert await storage.find_exhausted_sagas(name=name) == []
        await age(saga_id, _HOUR)
        assert len(await _claim(storage, name, lease=_HOUR)) == 1
        assert await storage.find_exhausted_sagas(name=name) == []
        await age(saga_id, 2 * _HOUR)
        assert await _claim(storage, name) == []
        [exhausted] = await storage.find_exhausted_sagas(name=name)
        assert exhausted == await storage.get_saga(saga_id)
        assert exhausted.recovery_attempts == 5
        assert await storage.find_exhausted_sagas(name=name, max_attempts=6) == []

    async def test_the_list_of_exhausted_sagas(self, storage: IRecoveryStorage, age: Age) -> None:
        """It has unfinished sagas of the name only, those that haven't changed for longest first, up to the limit."""
        name = _new_name()
        sagas: list[UUID] = []
        for hours, status in enumerate(SagaStatus):
            _, saga_id = await _new(storage, name, status=status, attempts=7)
            await age(saga_id, _HOUR * hours)
            if status in UNFINISHED:
                sagas.insert(0, saga_id)
        assert [saga.id for saga in await storage.find_exhausted_sagas(name=name)] == sagas
        assert [saga.id for saga in await storage.find_exhausted_sagas(name=name, limit=2)] == sagas[:2]
        assert await storage.find_exhausted_sagas(name=_new_name()) == []

    async def test_claims_are_exclusive(self, storage: IRecoveryStorage) -> None:
        """Of several that claim at the same time each gets sagas of its own, and none is left over."""
        name = _new_name()
        sagas = {(await _new(storage, name))[1] for _ in range(12)}
        claims = [_claim(storage, name, owner=f"worker-{number}", limit=3) for number in range(8)]
        claimed = [saga.id for claim in await asyncio.gather(*claims) for saga in claim]
        while rest := await _claim(storage, name, limit=3):  # one that looked while the others held their locks
            claimed += [saga.id for saga in rest]
        assert sorted(claimed) == sorted(sagas)

    async def test_any_lease_will_do(self, storage: IRecoveryStorage) -> None:
        """A lease that is longer than the calendar is a long one; one of no length has expired at once."""
        name, saga_id = await _new(storage)
        assert len(await _claim(storage, name, lease=_NOW)) == 1
        assert len(await _claim(storage, name, lease=timedelta.max)) == 1
        assert await _claim(storage, name) == []
        assert (await storage.get_saga(saga_id)).recovery_attempts == 2

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("owner", ""),
            ("owner", None),
            ("owner", "w" * 256),
            ("owner", "w\0"),
            ("lease", -_SECOND),
            ("lease", 30),
            ("limit", -1),
            ("limit", True),
            ("stale_after", -_SECOND),
            ("backoff", -_SECOND),
            ("max_backoff", 1.5),
            ("name", ""),
            ("max_attempts", 2**31),
        ],
    )
    async def test_a_bad_claim_is_refused(self, storage: IRecoveryStorage, field: str, value: object) -> None:
        """What can't be is refused, by name, and nothing is claimed."""
        name, saga_id = await _new(storage)
        with pytest.raises(InvalidSagaDataError) as refusal:
            await _claim(storage, **({"name": name} | {field: value}))  # type: ignore[arg-type] # that is the point
        assert refusal.value.field == field
        assert (await storage.get_saga(saga_id)).lease_owner is None


def _new_name() -> str:
    return f"order-{uuid4()}"


async def _new(
    storage: IRecoveryStorage, name: str | None = None, *, status: SagaStatus = SagaStatus.PENDING, attempts: int = 0
) -> tuple[str, UUID]:
    name, saga_id = name or _new_name(), uuid4()
    await storage.save(Checkpoint(saga_id, name=name, status=status, recovery_attempts=attempts))
    return name, saga_id


async def _claim(  # noqa: PLR0913 - claim_sagas, with defaults that suit a test
    storage: IRecoveryStorage,
    name: str,
    *,
    owner: str = "worker-1",
    lease: timedelta = _HOUR,
    limit: int = 100,
    stale_after: timedelta = _NOW,
    max_attempts: int = 5,
    backoff: timedelta = _NOW,
    max_backoff: timedelta = _HOUR,
) -> list[SagaExecution]:
    return await storage.claim_sagas(
        owner=owner,
        lease=lease,
        limit=limit,
        stale_after=stale_after,
        name=name,
        max_attempts=max_attempts,
        backoff=backoff,
        max_backoff=max_backoff,
    )
