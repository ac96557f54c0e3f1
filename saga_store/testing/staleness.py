"""Subject: the list of sagas that look interrupted."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from saga_store.interface import ICheckpointStorage
from saga_store.model import Checkpoint, SagaStatus, SagaStepStatus
from saga_store.testing.contract import Contract

_NOW = timedelta(0)
_EVERYTHING = 2**31 - 1


class StalenessContract(Contract):
    """What ``find_stale_sagas`` promises; other sagas may be in the database, under other names."""

    async def test_unfinished_sagas_are_listed(self, storage: ICheckpointStorage) -> None:
        """Sagas that are PENDING, RUNNING or COMPENSATING are listed; COMPLETED and FAILED ones aren't."""
        name = _new_name()
        sagas = {status: await _new(storage, name, status=status) for status in SagaStatus}
        listed = await _listed(storage, name)
        unfinished = (SagaStatus.PENDING, SagaStatus.RUNNING, SagaStatus.COMPENSATING)
        assert set(listed) == {sagas[status] for status in unfinished}

    async def test_whole_rows_are_listed(self, storage: ICheckpointStorage) -> None:
        """The list has each saga's whole row, as ``get_saga`` gives it."""
        name = _new_name()
        saga_id = await _new(storage, name, status=SagaStatus.RUNNING, attempts=2)
        await storage.update_context(saga_id, {"z": 1e16, "a": [-0.0, "\ud800\0"]})
        listed = await storage.find_stale_sagas(stale_after=_NOW, name=name)
        assert repr(listed) == repr([await storage.get_saga(saga_id)])

    async def test_fresh_sagas_are_left_out(self, storage: ICheckpointStorage) -> None:
        """Sagas that have changed within ``stale_after`` aren't listed."""
        name = _new_name()
        await _new(storage, name)
        assert await storage.find_stale_sagas(stale_after=timedelta(days=1), name=name) == []

    async def test_any_duration_will_do(self, storage: ICheckpointStorage) -> None:
        """A duration longer than the calendar is a duration like any other: nothing is that old."""
        name = _new_name()
        await _new(storage, name)
        for duration in (timedelta(days=365 * 3000), timedelta.max):
            assert await storage.find_stale_sagas(stale_after=duration, name=name) == []

    async def test_longest_unchanged_first(self, storage: ICheckpointStorage) -> None:
        """Of sagas with equally many attempts, those that haven't changed for longest come first."""
        name = _new_name()
        first, second, third = sorted([await _new(storage, name) for _ in range(3)])
        changed = [third, first, second]
        await _change_in_turn(storage, changed)
        assert await _listed(storage, name) == changed

    async def test_fewest_attempts_first(self, storage: ICheckpointStorage) -> None:
        """Sagas with fewer attempts come before those with more, however long they haven't changed."""
        name = _new_name()
        sagas = [await _new(storage, name, attempts=attempts) for attempts in (3, 1, 0, 2)]
        await _change_in_turn(storage, sagas)
        assert await _listed(storage, name) == [sagas[2], sagas[1], sagas[3], sagas[0]]

    async def test_limit(self, storage: ICheckpointStorage) -> None:
        """At most ``limit`` sagas are listed, and they are the first ones of the order."""
        name = _new_name()
        sagas = [await _new(storage, name, attempts=attempts) for attempts in (2, 0, 1)]
        whole = [sagas[1], sagas[2], sagas[0]]
        for limit in (0, 1, 2, 3, 4, _EVERYTHING):
            listed = await storage.find_stale_sagas(stale_after=_NOW, name=name, limit=limit)
            assert [saga.id for saga in listed] == whole[:limit]

    async def test_other_names_are_left_out(self, storage: ICheckpointStorage) -> None:
        """With a name, only sagas of exactly this name are listed: it is no pattern, and case counts."""
        name = f"Order%_{uuid4()}"
        saga_id = await _new(storage, name)
        for other in (name.lower(), name.replace("%", "xyz"), name.replace("_", "-"), name + " ", name[:-1]):
            await _new(storage, other)
        assert await _listed(storage, name) == [saga_id]

    async def test_unknown_name(self, storage: ICheckpointStorage) -> None:
        """A name that no saga has gives an empty list."""
        assert await storage.find_stale_sagas(stale_after=_NOW, name=_new_name()) == []

    async def test_every_name_is_listed(self, storage: ICheckpointStorage) -> None:
        """Without a name, sagas of every name are listed."""
        sagas = {await _new(storage, _new_name()) for _ in range(3)}
        listed = await storage.find_stale_sagas(stale_after=_NOW, limit=_EVERYTHING)
        assert sagas <= {saga.id for saga in listed}

    async def test_exhausted_sagas_are_left_out(self, storage: ICheckpointStorage) -> None:
        """Only sagas with fewer attempts than ``max_attempts`` are listed."""
        name = _new_name()
        sagas = [await _new(storage, name, attempts=attempts) for attempts in range(4)]
        for most in (0, 1, 3, 4, _EVERYTHING):
            listed = await storage.find_stale_sagas(stale_after=_NOW, name=name, max_attempts=most)
            assert [saga.id for saga in listed] == sagas[:most]

    async def test_five_attempts_by_default(self, storage: ICheckpointStorage) -> None:
        """Unless told otherwise, sagas with five attempts and more aren't listed."""
        name = _new_name()
        sagas = [await _new(storage, name, attempts=attempts) for attempts in (4, 5, 6)]
        assert await _listed(storage, name) == sagas[:1]

    async def test_listing_claims_nothing(self, storage: ICheckpointStorage) -> None:
        """Listing changes no saga: the next caller sees the same."""
        name = _new_name()
        await _new(storage, name, status=SagaStatus.RUNNING)
        first = await storage.find_stale_sagas(stale_after=_NOW, name=name)
        assert await storage.find_stale_sagas(stale_after=_NOW, name=name) == first

    async def test_entries_dont_refresh(self, storage: ICheckpointStorage) -> None:
        """An entry in the history doesn't count as a change of the saga: the order stays."""
        name = _new_name()
        sagas = [await _new(storage, name) for _ in range(2)]
        await _change_in_turn(storage, sagas)
        await storage.log_step(sagas[0], "pay", "act", SagaStepStatus.STARTED)
        assert await _listed(storage, name) == sagas

    async def test_listed_contexts_are_copies(self, storage: ICheckpointStorage) -> None:
        """What the caller does to a listed context changes nothing stored."""
        name = _new_name()
        saga_id = await _new(storage, name)
        [listed] = await storage.find_stale_sagas(stale_after=_NOW, name=name)
        listed.context["total"] = 12
        assert (await storage.get_saga(saga_id)).context == {}


def _new_name() -> str:
    return f"order-{uuid4()}"


async def _new(
    storage: ICheckpointStorage, name: str, *, status: SagaStatus = SagaStatus.PENDING, attempts: int = 0
) -> UUID:
    saga_id = uuid4()
    await storage.save(Checkpoint(saga_id, name=name, status=status, recovery_attempts=attempts))
    return saga_id


async def _listed(storage: ICheckpointStorage, name: str) -> list[UUID]:
    return [saga.id for saga in await storage.find_stale_sagas(stale_after=_NOW, name=name)]


async def _change_in_turn(storage: ICheckpointStorage, saga_ids: Sequence[UUID]) -> None:
    """Change the sagas one after the other, each until the database's clock has moved on."""
    earlier: datetime | None = None
    for saga_id in saga_ids:
        await storage.update_context(saga_id, {})
        while earlier and (await storage.get_saga(saga_id)).updated_at <= earlier:
            await storage.update_context(saga_id, {})
        earlier = (await storage.get_saga(saga_id)).updated_at
