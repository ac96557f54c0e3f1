"""Subject: keeping and letting go: holds, what a policy lets go, stubs, what comes back, and the ledger."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast
from uuid import UUID, uuid4

import pytest

from saga_store.errors import (
    ArchiverBusyError,
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaNotFoundError,
)
from saga_store.inspection import SagaQuery
from saga_store.interface import (
    IHistoryStorage,
    IInspectionStorage,
    IRecoveryStorage,
    IRetentionStorage,
    ISagaStorage,
)
from saga_store.model import Checkpoint, Context, LogStep, SagaExecution, SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.retention_model import (
    ArchiveState,
    ArchivingTurn,
    ExpiredSaga,
    Restored,
    RetentionSnapshot,
    SagaArchive,
    SagaMark,
    SagaRecord,
)
from saga_store.testing.claim import Age, AgingContract
from saga_store.testing.contract import Contract, Together, Unit, UnitPerCall
from saga_store.testing.lease import LeaseUnit

_WHO: dict[str, Any] = {"by": "alice", "reason": 'the auditors \N{EM DASH} "again"'}
_HOUR, _NEVER = timedelta(hours=1), timedelta(days=36_000)
_URI = "memory://archive/1.jsonl.gz"
_STEPS = (
    LogStep("pay", "act", SagaStepStatus.STARTED),
    LogStep("pay", "act", SagaStepStatus.COMPLETED, 'with "card"\n\u20ac'),
)


class RetentiveStorage(IRetentionStorage, IRecoveryStorage, IHistoryStorage, IInspectionStorage):
    """What these tests need of a storage."""


class Kept(NamedTuple):
    """A policy."""

    completed: timedelta | None = None
    failed: timedelta | None = None
    names: dict[str, timedelta | None] = {}  # noqa: RUF012 - nobody changes it


class Stored(NamedTuple):
    """A saga as it is before it is let go."""

    saga: SagaExecution
    history: list[SagaLogEntry]


async def finished(
    storage: RetentiveStorage,
    name: str,
    status: SagaStatus = SagaStatus.COMPLETED,
    *,
    context: Context | None = None,
    steps: Sequence[LogStep] = _STEPS,
) -> UUID:
    """Make a finished saga."""
    drawing: object = storage
    saga_id = await drawing.draw() if isinstance(drawing, _LastingUnits) else uuid4()
    await storage.save(Checkpoint(saga_id, name=name, status=status, context=context or {"n": 1.0}, steps=steps))
    return saga_id


async def expired(storage: RetentiveStorage, name: str) -> list[ExpiredSaga]:
    """Return what of this name is finished, and neither held nor a stub."""
    async with storage.snapshot() as snapshot:
        found, after = list[ExpiredSaga](), None
        while True:
            page = await snapshot.find_expired(Kept(names={name: timedelta(0)}), after=after)
            found += page.sagas
            after = page.after
            if after is None:
                return found


async def read(storage: RetentiveStorage, sagas: Sequence[ExpiredSaga]) -> list[SagaRecord]:
    """Return the records of sagas."""
    async with storage.snapshot() as snapshot:
        return [await reading.whole() async for reading in snapshot.read(sagas)]


async def verified(storage: RetentiveStorage, uri: str | None = _URI) -> SagaArchive:
    """Register an archive from which stubs may be made."""
    archive_id = uuid4()
    await storage.begin_archive(archive_id, uri=uri, by="archiver-1")
    return await storage.verify_archive(archive_id, sha256="0" * 64, sagas=1, entries=2, bytes=100, watermark=None)


async def let_go(storage: RetentiveStorage, saga_id: UUID, uri: str | None = _URI) -> tuple[SagaArchive, SagaRecord]:
    """Make a stub of a finished saga; return the archive and the record."""
    saga = await storage.get_saga(saga_id)
    [wanted] = [one for one in await expired(storage, saga.name) if one.mark.id == saga_id]
    [record] = await read(storage, [wanted])
    archive = await verified(storage, uri)
    made = await storage.make_stubs(archive.id, [record.mark])
    assert list(made.made) == [saga_id]
    return archive, record


async def stored(storage: RetentiveStorage, saga_id: UUID) -> Stored:
    return Stored(await storage.get_saga(saga_id), await storage.get_step_history(saga_id))


class HoldContract(Contract):
    """What ``hold_saga`` and ``release_saga`` promise."""

    @pytest.mark.parametrize("status", [SagaStatus.RUNNING, SagaStatus.FAILED])
    async def test_a_hold_is_recorded_and_fences_nobody(self, storage: RetentiveStorage, status: SagaStatus) -> None:
        """It says who and why, and until when; the saga's row is as it was."""
        saga_id, name = uuid4(), f"order-{uuid4()}"
        version = await storage.save(Checkpoint(saga_id, name=name, status=status))
        before = await storage.get_saga(saga_id)
        until = datetime(2999, 1, 1, tzinfo=UTC)
        await storage.hold_saga(saga_id, **_WHO, until=until)
        [summary] = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert summary.retain_until == until
        await storage.hold_saga(saga_id, **_WHO)
        [summary] = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert summary.retain_until == datetime.max.replace(tzinfo=UTC)
        await storage.release_saga(saga_id, **_WHO)
        [summary] = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert (summary.retain_until, summary.version) == (None, version)
        assert await storage.get_saga(saga_id) == before
        first, second, third = await storage.get_step_history(saga_id)
        assert [entry.step_name for entry in (first, second, third)] == [
            "saga_store.hold_saga",
            "saga_store.hold_saga",
            "saga_store.release_saga",
        ]
        details = json.loads(first.details or "")
        assert {name: details[name] for name in ("by", "reason", "status", "retain_until")} == {
            **_WHO,
            "status": status.value,
            "retain_until": None,
        }
        assert datetime.fromisoformat(details["until"]) == until
        assert json.loads(second.details or "")["until"] is None
        assert json.loads(third.details or "")["retain_until"] == "infinity"

    async def test_what_cannot_be_held(self, storage: RetentiveStorage) -> None:
        """Not a saga that is missing, not into the past, not for nobody; what isn't held can't be released."""
        saga_id = uuid4()
        for call in (storage.hold_saga, storage.release_saga):
            with pytest.raises(SagaNotFoundError):
                await call(saga_id, **_WHO)
        await storage.save(Checkpoint(saga_id, name="order"))
        for bad in (
            {**_WHO, "until": datetime(2001, 1, 1, tzinfo=UTC)},
            {**_WHO, "until": datetime(2999, 1, 1)},  # noqa: DTZ001 - that is the point
            {**_WHO, "by": ""},
            {**_WHO, "reason": ""},
        ):
            with pytest.raises(InvalidSagaDataError):
                await storage.hold_saga(saga_id, **bad)
        with pytest.raises(InvalidSagaDataError, match="isn't held"):
            await storage.release_saga(saga_id, **_WHO)
        assert await storage.get_step_history(saga_id) == []


async def _appends(storage: RetentiveStorage, saga_id: UUID) -> None:
    await storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)


async def _updates(storage: RetentiveStorage, saga_id: UUID) -> None:
    await storage.update_context(saga_id, {"n": 2})


async def _reopens(storage: RetentiveStorage, saga_id: UUID) -> None:
    await storage.update_status(saga_id, SagaStatus.RUNNING)


async def _finishes_again(storage: RetentiveStorage, saga_id: UUID) -> None:
    await storage.update_status(saga_id, SagaStatus.RUNNING)
    await storage.update_status(saga_id, SagaStatus.COMPLETED)


async def _holds(storage: RetentiveStorage, saga_id: UUID) -> None:
    await storage.hold_saga(saga_id, **_WHO)


async def _releases(storage: RetentiveStorage, saga_id: UUID) -> None:
    await storage.hold_saga(saga_id, **_WHO)
    await storage.release_saga(saga_id, **_WHO)


_CHANGES = [_appends, _updates, _reopens, _finishes_again, _holds, _releases]

_READS: dict[str, Callable[[RetentiveStorage, UUID], Awaitable[object]]] = {
    "load_saga_state": lambda storage, saga_id: storage.load_saga_state(saga_id),
    "get_saga": lambda storage, saga_id: storage.get_saga(saga_id),
    "get_step_history": lambda storage, saga_id: storage.get_step_history(saga_id),
    "get_in_doubt_steps": lambda storage, saga_id: storage.get_in_doubt_steps(saga_id),
    "get_recent_history": lambda storage, saga_id: storage.get_recent_history(saga_id),
    "peek_context": lambda storage, saga_id: storage.peek_context(saga_id),
    "iter_step_history": lambda storage, saga_id: anext(storage.iter_step_history(saga_id)),
}
_WRITES: dict[str, Callable[[RetentiveStorage, UUID], Awaitable[object]]] = {
    "update_status": lambda storage, saga_id: storage.update_status(saga_id, SagaStatus.RUNNING),
    "update_status at a version": lambda storage, saga_id: storage.update_status(
        saga_id, SagaStatus.RUNNING, expected_version=1
    ),
    "update_status at another": lambda storage, saga_id: storage.update_status(
        saga_id, SagaStatus.FAILED, expected_version=7
    ),
    "update_context": lambda storage, saga_id: storage.update_context(saga_id, {"n": 2}),
    "log_step": lambda storage, saga_id: storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED),
    "save": lambda storage, saga_id: storage.save(
        Checkpoint(saga_id, status=SagaStatus.RUNNING, context={}, steps=_STEPS, expected_version=1)
    ),
    "save steps": lambda storage, saga_id: storage.save(Checkpoint(saga_id, steps=_STEPS)),
    "save a step at a version": lambda storage, saga_id: storage.save(
        Checkpoint(saga_id, steps=_STEPS[:1], expected_version=1)
    ),
    "give_up_saga": lambda storage, saga_id: storage.give_up_saga(saga_id, **_WHO),
    "reset_recovery_attempts": lambda storage, saga_id: storage.reset_recovery_attempts(saga_id, **_WHO),
    "break_lease": lambda storage, saga_id: storage.break_lease(saga_id, **_WHO),
    "settle_step": lambda storage, saga_id: storage.settle_step(saga_id, 1, SagaStepStatus.FAILED, **_WHO),
    "settle_step at another": lambda storage, saga_id: storage.settle_step(
        saga_id, 1, SagaStepStatus.FAILED, expected_version=7, **_WHO
    ),
    "hold_saga": lambda storage, saga_id: storage.hold_saga(saga_id, **_WHO),
    "release_saga": lambda storage, saga_id: storage.release_saga(saga_id, **_WHO),
}


# What is asked of an archive's ledger, or of the sagas that it is for.
_OF_A_LEDGER = {"begin_archive", "verify_archive", "fail_archive", "finish_archive", "find_archives", "make_stubs"}


class _LastingUnits(UnitPerCall):
    """Also for what lasts: a snapshot, a turn, a stream; and what concerns an archive is asked of its ledger."""

    def __init__(self, unit: Unit, ledger: Unit, together: Together) -> None:
        super().__init__(unit)
        self._ledger = ledger
        self._together = together

    def __getattr__(self, method: str) -> Callable[..., Awaitable[object]]:
        return getattr(UnitPerCall(self._ledger), method) if method in _OF_A_LEDGER else super().__getattr__(method)

    async def draw(self) -> UUID:
        """Draw the id of a saga that the ledger's archives may hold."""
        [saga_id] = await self._together(1)
        return saga_id

    async def forget_all_stubs(self, *, older_than: timedelta, at_once: int = 1000) -> AsyncIterator[int]:
        async with self._unit() as storage:
            whole = cast("RetentiveStorage", storage)
            async for gone in whole.forget_all_stubs(older_than=older_than, at_once=at_once):
                yield gone

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[RetentionSnapshot]:
        async with self._ledger() as storage, cast("RetentiveStorage", storage).snapshot() as snapshot:
            yield snapshot

    @asynccontextmanager
    async def archiving(self, *, by: str) -> AsyncIterator[ArchivingTurn]:
        async with self._ledger() as storage, cast("RetentiveStorage", storage).archiving(by=by) as turn:
            yield turn

    async def iter_step_history(self, saga_id: UUID) -> AsyncIterator[SagaLogEntry]:
        async with self._unit() as storage:
            async for entry in cast("RetentiveStorage", storage).iter_step_history(saga_id):
                yield entry


class _RetentiveContract(Contract):
    @pytest.fixture
    def ledger(self, unit: Unit, together: Together) -> Unit:
        """Open a unit of the storage that archives what ``together`` draws: of the whole, or of one of its shards."""

        @asynccontextmanager
        async def ledger() -> AsyncIterator[ISagaStorage]:
            async with unit() as storage:
                whole: Any = storage
                yield whole.shards[whole.shard_of(*await together(1))] if hasattr(whole, "shards") else storage

        return ledger

    @pytest.fixture
    def storage(self, unit: Unit, ledger: Unit, together: Together) -> RetentiveStorage:
        """A storage each of whose calls is a unit of its own, also those that last."""
        return cast("RetentiveStorage", _LastingUnits(unit, ledger, together))


class StubContract(_RetentiveContract):
    """What stubs are to whoever reads, writes and looks; for a storage that commits its own calls."""

    @pytest.mark.parametrize("read", _READS)
    async def test_a_stub_is_not_read(self, storage: RetentiveStorage, read: str) -> None:
        """The error says where the record is, and since when; it is one of a saga that isn't found."""
        saga_id = await finished(storage, f"order-{uuid4()}")
        archive, _ = await let_go(storage, saga_id)
        with pytest.raises(SagaArchivedError) as caught:
            await _READS[read](storage, saga_id)
        assert isinstance(caught.value, SagaNotFoundError)
        assert (caught.value.saga_id, caught.value.archive, caught.value.archived_at) == (
            saga_id,
            _URI,
            archive.archived_at,
        )

    @pytest.mark.parametrize("write", _WRITES)
    async def test_nothing_is_written_to_a_stub(self, storage: RetentiveStorage, write: str) -> None:
        """It is refused, whatever version is expected, and what is restored afterwards is as it was."""
        saga_id = await finished(storage, f"order-{uuid4()}")
        before = await stored(storage, saga_id)
        archive, record = await let_go(storage, saga_id)
        with pytest.raises(SagaArchivedError) as caught:
            await _WRITES[write](storage, saga_id)
        assert (caught.value.archive, caught.value.archived_at) == (_URI, archive.archived_at)
        assert await storage.restore_saga(record) is Restored.RESTORED
        assert await stored(storage, saga_id) == before

    async def test_a_crowd_is_refused_and_hurts_no_neighbour(self, storage: RetentiveStorage) -> None:
        """Writes to stubs and to sagas, all at once: those to sagas go through."""
        name = f"order-{uuid4()}"
        stubs = [await finished(storage, name) for _ in range(4)]
        for saga_id in stubs:
            await let_go(storage, saga_id)
        sagas = [await finished(storage, name) for _ in range(4)]
        calls = [
            write
            for saga_id in stubs + sagas
            for write in (
                storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED),
                storage.update_context(saga_id, {"n": 3}),
                storage.save(Checkpoint(saga_id, status=SagaStatus.RUNNING, steps=_STEPS)),
            )
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[:12]] == [SagaArchivedError] * 12
        assert not [outcome for outcome in outcomes[12:] if isinstance(outcome, BaseException)]
        assert [len(await storage.get_step_history(saga_id)) for saga_id in sagas] == [5] * 4

    async def test_its_id_is_taken(self, storage: RetentiveStorage) -> None:
        """A creation that comes late finds it."""
        saga_id = await finished(storage, f"order-{uuid4()}")
        await let_go(storage, saga_id)
        with pytest.raises(SagaAlreadyExistsError):
            await storage.create_saga(saga_id, "order", {})
        with pytest.raises(SagaAlreadyExistsError):
            await storage.save(Checkpoint(saga_id, name="order", steps=_STEPS))

    async def test_views_mark_it_and_nobody_claims_it(self, storage: RetentiveStorage) -> None:
        """It is listed as a finished saga that was archived; recovery doesn't see it."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name, SagaStatus.FAILED)
        archive, _ = await let_go(storage, saga_id)
        [summary] = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert (summary.id, summary.archived_at, summary.status) == (saga_id, archive.archived_at, SagaStatus.FAILED)
        assert summary.last_entry is None
        assert (await storage.find_sagas(SagaQuery(name=name, context={"n": 1.0}))).sagas == []
        asked: dict[str, Any] = {"limit": 10, "name": name}
        assert await storage.find_stale_sagas(stale_after=timedelta(0), **asked) == []
        assert await storage.find_exhausted_sagas(max_attempts=0, **asked) == []
        assert await storage.claim_sagas(owner="worker", lease=_HOUR, stale_after=timedelta(0), **asked) == []

    async def test_it_is_found_with_its_archive(self, storage: RetentiveStorage) -> None:
        """What is left of it, and the line of the ledger; nothing is found of a saga, or of none."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        assert await storage.find_stub(saga_id) is None
        assert await storage.find_stub(uuid4()) is None
        await verified(storage)
        archive, record = await let_go(storage, saga_id)
        stub = await storage.find_stub(saga_id)
        assert stub is not None
        assert (stub.id, stub.name, stub.version, stub.created_at) == (saga_id, name, 1, record.created_at)
        assert stub.archive == await storage.get_archive(archive.id)
        assert stub.archive is not None
        assert stub.archive.removed == 1

    async def test_without_an_archive(self, storage: RetentiveStorage) -> None:
        """Sagas can be removed without one: then the error names none."""
        saga_id = await finished(storage, f"order-{uuid4()}")
        await let_go(storage, saga_id, None)
        with pytest.raises(SagaArchivedError, match="no archive of it is known") as caught:
            await storage.get_saga(saga_id)
        assert caught.value.archive is None

    async def test_a_forgotten_stub_is_gone(self, storage: RetentiveStorage) -> None:
        """Its id is free, and its record can be restored as a new row."""
        saga_id = await finished(storage, f"order-{uuid4()}")
        before = await stored(storage, saga_id)
        _, record = await let_go(storage, saga_id)
        assert await storage.forget_stubs(older_than=_NEVER) == 0
        while await storage.forget_stubs(older_than=timedelta(0), limit=3):
            pass
        assert await storage.find_stub(saga_id) is None
        with pytest.raises(SagaNotFoundError) as caught:
            await storage.get_saga(saga_id)
        assert not isinstance(caught.value, SagaArchivedError)
        assert await storage.restore_saga(record) is Restored.RESTORED
        after = await stored(storage, saga_id)
        assert after.saga == before.saga
        assert [replace(entry, id=0) for entry in after.history] == [replace(entry, id=0) for entry in before.history]
        assert after.history[0].id > before.history[-1].id


class RetentionContract(AgingContract, _RetentiveContract):
    """What a policy lets go, how it becomes stubs and comes back; for a storage that commits its own calls."""

    async def test_what_a_policy_lets_go(self, storage: RetentiveStorage) -> None:
        """Finished sagas that haven't changed for long enough, by outcome or by name; held ones and stubs aren't."""
        name, other = f"order-{uuid4()}", f"refund-{uuid4()}"
        completed = await finished(storage, name)
        failed = await finished(storage, name, SagaStatus.FAILED)
        running = await finished(storage, name, SagaStatus.RUNNING)
        named = await finished(storage, other)
        held, stub = await finished(storage, name), await finished(storage, name)
        await storage.hold_saga(held, **_WHO)
        await let_go(storage, stub)
        mine = {completed, failed, running, named, held, stub}
        now = timedelta(0)
        for policy, expected in [
            (Kept(completed=now), {completed, named}),
            (Kept(failed=now), {failed}),
            (Kept(completed=now, names={other: None}), {completed}),
            (Kept(names={other: now}), {named}),
            (Kept(completed=_HOUR, failed=_HOUR, names={name: now}), {completed, failed}),
            (Kept(completed=timedelta.max, failed=timedelta.max), set()),
            (Kept(), set()),
        ]:
            found, after = set[UUID](), None
            async with storage.snapshot() as snapshot:
                while True:
                    page = await snapshot.find_expired(policy, after=after, limit=2)
                    found |= {saga.mark.id for saga in page.sagas}
                    after = page.after
                    if after is None:
                        break
            assert found & mine == expected, policy

    async def test_a_walk_goes_on(self, storage: RetentiveStorage) -> None:
        """In the order of creation, each once; a later snapshot goes on where an earlier one ended."""
        name = f"order-{uuid4()}"
        ids = [await finished(storage, name) for _ in range(5)]
        policy, after, found = Kept(names={name: timedelta(0)}), None, list[UUID]()
        while True:
            async with storage.snapshot() as snapshot:
                page = await snapshot.find_expired(policy, after=after, limit=2)
            assert len(page.sagas) <= 2
            found += [saga.mark.id for saga in page.sagas]
            after = page.after
            if after is None:
                break
        assert found == ids

    async def test_a_snapshot_is_one_moment(self, storage: RetentiveStorage) -> None:
        """What is written while it is read isn't seen in it."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        policy = Kept(names={name: timedelta(0)})
        async with storage.snapshot() as snapshot:
            [saga] = (await snapshot.find_expired(policy)).sagas
            await storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)
            await storage.update_context(saga_id, {"n": 2})
            [again] = (await snapshot.find_expired(policy)).sagas
            assert again.mark == saga.mark
            async for reading in snapshot.read([saga]):
                assert json.loads("".join([piece async for piece in reading.context()])) == {"n": 1.0}
                assert len([entry async for batch in reading.entries() for entry in batch]) == 2

    async def test_sagas_are_read_whole(self, storage: RetentiveStorage) -> None:
        """In the order asked for: rows, contexts to the letter, histories in order; small and big ones."""
        name = f"order-{uuid4()}"
        contexts: list[Context] = [
            {},
            {"text": '\u20ac \U0001f600 "\\u0041" \x7f', "number": 1.0, "big": 12345678901234567890},
            {"blob": "\u20ac" * 150_000},
        ]
        ids = [await finished(storage, name, context=context) for context in contexts]
        ids.append(await finished(storage, name, steps=()))
        ids.append(
            await finished(storage, name, steps=[LogStep(f"s{n}", "act", _STEPS[0].status) for n in range(1500)])
        )
        sagas = {saga.mark.id: saga for saga in await expired(storage, name)}
        wanted = [sagas[saga_id] for saga_id in reversed(ids)]
        records = await read(storage, wanted)
        assert [record.id for record in records] == ids[::-1]
        for record, saga in zip(records, wanted, strict=True):
            row, history = await stored(storage, record.id)
            assert record.mark == saga.mark == SagaMark(row.id, row.version, len(history), _last(history))
            assert json.loads(record.context) == row.context
            assert list(record.entries) == history
            assert (record.name, record.status, record.created_at) == (name, row.status, row.created_at)
            assert (record.updated_at, record.recovery_attempts) == (row.updated_at, 0)
            assert saga.bytes >= len(record.context)

    @pytest.mark.parametrize("change", _CHANGES, ids=lambda change: change.__name__.strip("_"))
    async def test_what_has_changed_since_stays(
        self, storage: RetentiveStorage, change: Callable[[RetentiveStorage, UUID], Awaitable[None]]
    ) -> None:
        """Of two sagas that were read exactly the one that is untouched becomes a stub; the other one is whole."""
        name = f"order-{uuid4()}"
        changed, untouched = await finished(storage, name), await finished(storage, name)
        marks = [saga.mark for saga in await expired(storage, name)]
        await change(storage, changed)
        before = await stored(storage, changed)
        archive = await verified(storage)
        made = await storage.make_stubs(archive.id, marks)
        assert (list(made.made), list(made.already)) == ([untouched], [])
        assert await stored(storage, changed) == before
        assert (await storage.get_archive(archive.id)).removed == 1

    async def test_what_is_leased_stays_until_the_lease_has_expired(
        self, storage: RetentiveStorage, unit: LeaseUnit, age: Age
    ) -> None:
        """Whoever looks at a finished saga in a run is let do so; one that died there is waited for no longer."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name, SagaStatus.FAILED)
        [saga] = await expired(storage, name)
        archive = await verified(storage)
        async with unit() as whole:
            await whole.run(saga_id, owner="worker-1", lease=_HOUR).__aenter__()  # and its process dies
        assert await expired(storage, name) == []
        assert list((await storage.make_stubs(archive.id, [saga.mark])).made) == []
        await age(saga_id, 2 * _HOUR)
        [saga] = await expired(storage, name)
        [record] = await read(storage, [saga])
        assert list((await storage.make_stubs(archive.id, [record.mark])).made) == [saga_id]
        [summary] = (await storage.find_sagas(SagaQuery(name=name))).sagas
        assert summary.lease_owner is None
        assert await storage.restore_saga(record) is Restored.RESTORED
        assert (await storage.get_saga(saga_id)).lease_owner is None

    async def test_another_history_of_the_same_length_stays(self, storage: RetentiveStorage) -> None:
        """What is compared is the last entry, too, not only how many there are."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        [saga] = await expired(storage, name)
        before = await stored(storage, saga_id)
        archive = await verified(storage)
        for last in (saga.mark.last_entry_id - 1, saga.mark.last_entry_id + 1):
            made = await storage.make_stubs(archive.id, [replace(saga.mark, last_entry_id=last)])
            assert (list(made.made), list(made.already)) == ([], [])
        assert await stored(storage, saga_id) == before
        assert list((await storage.make_stubs(archive.id, [saga.mark])).made) == [saga_id]

    async def test_once_more_tells_the_same(self, storage: RetentiveStorage) -> None:
        """Whoever doesn't know whether it was done does it again: it tells what is done, and counts it once."""
        name = f"order-{uuid4()}"
        saga_id, other = await finished(storage, name), await finished(storage, name)
        marks = [saga.mark for saga in await expired(storage, name)]
        first, second = await verified(storage), await verified(storage)
        await storage.make_stubs(first.id, marks[:1])
        made = await storage.make_stubs(first.id, [*marks, SagaMark(uuid4(), 1, 0, 0)])
        assert (list(made.made), list(made.already)) == ([other], [saga_id])
        assert (await storage.get_archive(first.id)).removed == 2
        again = await storage.make_stubs(second.id, marks)
        assert (list(again.made), list(again.already)) == ([], [])

    async def test_a_saga_comes_back_as_it_was(self, storage: RetentiveStorage) -> None:
        """In its stub: row and history, ids of entries as well; and it goes on like any other."""
        saga_id = await finished(storage, f"order-{uuid4()}", SagaStatus.FAILED, context={"text": '\u20ac "\\u0041"'})
        before = await stored(storage, saga_id)
        _, record = await let_go(storage, saga_id)
        assert await storage.restore_saga(record) is Restored.RESTORED
        assert await storage.restore_saga(record) is Restored.SAME
        assert await stored(storage, saga_id) == before
        assert await storage.find_stub(saga_id) is None
        await storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)
        history = await storage.get_step_history(saga_id)
        assert (history[:-1], history[-1].step_name) == (before.history, "late")
        assert await storage.restore_saga(record) is Restored.OTHER

    async def test_what_is_restored_stays_for_a_while(self, storage: RetentiveStorage) -> None:
        """The next archive doesn't take it, unless that was asked for; then it becomes a stub again."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        archive, record = await let_go(storage, saga_id)
        await storage.restore_saga(record)
        assert await expired(storage, name) == []
        assert list((await storage.make_stubs(archive.id, [record.mark])).made) == []
        await storage.release_saga(saga_id, **_WHO)
        assert len(await expired(storage, name)) == 1
        other = await finished(storage, name)
        _, record = await let_go(storage, other)
        await storage.restore_saga(record, keep_for=timedelta(0))
        await let_go(storage, other)
        with pytest.raises(SagaArchivedError):
            await storage.get_saga(other)

    async def test_what_is_there_is_left_as_it_was(self, storage: RetentiveStorage) -> None:
        """A record doesn't take the place of a saga with other content, nor of a stub of another version."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        _, old = await let_go(storage, saga_id)
        await storage.restore_saga(old, keep_for=timedelta(0))
        for change in ({"context": '{"n": 2}'}, {"name": "other"}, {"entries": ()}, {"version": 2}):
            assert await storage.restore_saga(replace(old, **change)) is Restored.OTHER
        await storage.update_context(saga_id, {"n": 2})
        before = await stored(storage, saga_id)
        assert await storage.restore_saga(old) is Restored.OTHER
        _, new = await let_go(storage, saga_id)
        assert await storage.restore_saga(old) is Restored.OTHER
        assert await storage.restore_sagas([new]) == [Restored.RESTORED]
        assert await stored(storage, saga_id) == before

    async def test_an_older_archive_doesnt_fill_a_newer_ones_stub(self, storage: RetentiveStorage) -> None:
        """Log entries don't raise the version: of two records at one version, the stub's own archive has them all."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        old, short = await let_go(storage, saga_id)
        await storage.restore_saga(short, archive_id=old.id, keep_for=timedelta(0))
        await storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)
        new, long = await let_go(storage, saga_id)
        assert (short.version, len(short.entries) + 1) == (long.version, len(long.entries))
        assert await storage.restore_saga(short, archive_id=old.id) is Restored.OTHER
        assert await storage.find_stub(saga_id) is not None
        assert await storage.restore_sagas([long], archive_id=new.id) == [Restored.RESTORED]
        assert (await storage.get_step_history(saga_id))[-1].step_name == "late"

    async def test_many_come_back_at_once(self, storage: RetentiveStorage) -> None:
        """As new rows and in their stubs, together; what came of each is told in the order of the records."""
        name = f"order-{uuid4()}"
        ids = [await finished(storage, name) for _ in range(4)]
        before = [await stored(storage, saga_id) for saga_id in ids]
        records = [(await let_go(storage, saga_id))[1] for saga_id in ids[1:]]
        [kept] = await read(storage, await expired(storage, name))
        new = [replace(kept, id=uuid4(), name=name) for _ in range(2)]
        outcomes = await storage.restore_sagas([new[0], *records, kept, new[1]])
        assert outcomes == [*[Restored.RESTORED] * 4, Restored.SAME, Restored.RESTORED]
        assert [await stored(storage, saga_id) for saga_id in ids] == before
        for record in new:
            row, history = await stored(storage, record.id)
            assert [entry.step_name for entry in history] == ["pay", "pay"]
            assert (row.created_at, row.updated_at, row.version) == (kept.created_at, kept.updated_at, kept.version)

    async def test_all_are_forgotten_in_one_walk(self, storage: RetentiveStorage) -> None:
        """In batches, none bigger than was asked for; what isn't old enough stays."""
        ids = [await finished(storage, f"order-{uuid4()}") for _ in range(5)]
        for saga_id in ids:
            await let_go(storage, saga_id)
        assert sum([gone async for gone in storage.forget_all_stubs(older_than=_NEVER)]) == 0
        assert [await storage.find_stub(saga_id) is None for saga_id in ids] == [False] * 5
        batches = [gone async for gone in storage.forget_all_stubs(older_than=timedelta(0), at_once=2)]
        assert max(batches) == 2
        assert sum(batches) >= 5
        assert [await storage.find_stub(saga_id) is None for saga_id in ids] == [True] * 5

    async def test_the_ledger(self, storage: RetentiveStorage) -> None:
        """A line says who archived what and where, and how far it has come; each step may be done twice."""
        archive_id = uuid4()
        begun = await storage.begin_archive(archive_id, uri=_URI, by="archiver-1")
        assert await storage.begin_archive(archive_id, uri=_URI, by="archiver-1") == begun
        assert (begun.id, begun.uri, begun.by, begun.state) == (archive_id, _URI, "archiver-1", ArchiveState.WRITING)
        assert (begun.archived_at, begun.removed_at, begun.sagas) == (None, None, 0)
        told: dict[str, Any] = {"sha256": "ab" * 32, "sagas": 3, "entries": 10, "bytes": 2**40}
        done = await storage.verify_archive(archive_id, **told, watermark=None)
        assert await storage.verify_archive(archive_id, **told, watermark=None) == done
        assert done.state is ArchiveState.VERIFIED
        assert {name: getattr(done, name) for name in told} == told
        assert done.archived_at is not None
        later = await verified(storage)
        assert later.archived_at is not None
        assert later.archived_at > done.archived_at
        removed = await storage.finish_archive(archive_id)
        assert await storage.finish_archive(archive_id) == removed
        assert removed == replace(done, state=ArchiveState.REMOVED, removed_at=removed.removed_at)
        assert await storage.get_archive(archive_id) == removed
        failed = await storage.fail_archive(later.id, error="the target lies")
        assert (failed.state, failed.error) == (ArchiveState.FAILED, "the target lies")
        newest, after = list[SagaArchive](), None
        while True:
            page = await storage.find_archives(limit=1, after=after)
            newest += page.archives
            after = page.after
            if after is None:
                break
        mine = [archive for archive in newest if archive.id in {archive_id, later.id}]
        assert mine == [failed, removed]
        listed = await storage.find_archives(states=[ArchiveState.FAILED], limit=1000)
        assert failed in listed.archives
        assert removed not in listed.archives

    async def test_steps_that_lead_nowhere(self, storage: RetentiveStorage) -> None:
        """No line goes back, and nothing becomes a stub by an archive that isn't VERIFIED."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        marks = [saga.mark for saga in await expired(storage, name)]
        archive_id = uuid4()
        told: dict[str, Any] = {"sha256": None, "sagas": 1, "entries": 2, "bytes": 3, "watermark": None}
        for call in (
            lambda: storage.get_archive(archive_id),
            lambda: storage.finish_archive(archive_id),
            lambda: storage.make_stubs(archive_id, marks),
            lambda: storage.verify_archive(archive_id, **told),
        ):
            with pytest.raises(InvalidSagaDataError, match="names no archive"):
                await call()
        await storage.begin_archive(archive_id, uri=_URI, by="archiver-1")
        with pytest.raises(InvalidSagaDataError, match="another archive"):
            await storage.begin_archive(archive_id, uri=_URI, by="archiver-2")
        for call in (lambda: storage.make_stubs(archive_id, marks), lambda: storage.finish_archive(archive_id)):
            with pytest.raises(InvalidSagaDataError, match="is WRITING, not VERIFIED"):
                await call()
        await storage.fail_archive(archive_id, error="full")
        for call in (
            lambda: storage.make_stubs(archive_id, marks),
            lambda: storage.verify_archive(archive_id, **told),
            lambda: storage.begin_archive(archive_id, uri=_URI, by="archiver-1"),
        ):
            with pytest.raises(InvalidSagaDataError, match="FAILED"):
                await call()
        assert (await storage.get_saga(saga_id)).version == 1

    async def test_one_archiver_at_a_time(self, storage: RetentiveStorage) -> None:
        """A second one is refused at once, and has its turn when the first has left."""
        async with storage.archiving(by="archiver-1") as turn:
            await turn.check()
            with pytest.raises(ArchiverBusyError):
                async with storage.archiving(by="archiver-2"):
                    pass
        async with storage.archiving(by="archiver-2") as turn:
            await turn.check()

    async def test_what_no_archive_can_be_asked(self, storage: RetentiveStorage) -> None:
        """It is refused before anything is written, and the error says what it is about."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        [record] = await read(storage, await expired(storage, name))
        archive = await verified(storage)
        calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            ("completed", lambda: _find(storage, Kept(completed=-_HOUR))),
            ("names", lambda: _find(storage, Kept(names={"order": -_HOUR}))),
            ("names", lambda: _find(storage, Kept(names={"": _HOUR}))),
            ("after", lambda: _find(storage, Kept(completed=_HOUR), after="x")),
            ("archive_id", lambda: storage.make_stubs("x", [])),  # type: ignore[arg-type] # that is the point
            ("marks", lambda: storage.make_stubs(archive.id, [record])),  # type: ignore[list-item] # likewise
            ("by", lambda: storage.begin_archive(uuid4(), uri=None, by="")),
            ("uri", lambda: storage.begin_archive(uuid4(), uri="a\nb", by="x")),
            ("error", lambda: storage.fail_archive(archive.id, error="")),
            ("states", lambda: storage.find_archives(states=["LOST"])),  # type: ignore[list-item] # likewise
            ("limit", lambda: storage.find_archives(limit=0)),
            ("older_than", lambda: storage.forget_stubs(older_than=-_HOUR)),
            ("keep_for", lambda: storage.restore_saga(record, keep_for=-_HOUR)),
            ("status", lambda: storage.restore_saga(replace(record, status=SagaStatus.RUNNING))),
            ("context", lambda: storage.restore_saga(replace(record, context="[]"))),
            ("context", lambda: storage.restore_saga(replace(record, context='{"a": }'))),
            ("context", lambda: storage.restore_saga(replace(record, context='{"a": "' + "x" * 2**21))),
            ("version", lambda: storage.restore_saga(replace(record, version=0))),
            ("created_at", lambda: storage.restore_saga(replace(record, created_at=datetime(2020, 1, 1)))),  # noqa: DTZ001 - likewise
            ("entries", lambda: storage.restore_saga(replace(record, entries=record.entries[::-1]))),
            ("records", lambda: storage.restore_sagas([record, record])),
        ]
        for field, call in calls:
            with pytest.raises(InvalidSagaDataError) as caught:
                await call()
            assert caught.value.field == field
        assert (await stored(storage, saga_id)).saga.context == {"n": 1.0}

    async def test_figures_tell_how_far_behind_it_is(self, storage: RetentiveStorage) -> None:
        """The lag is that of the oldest saga that should be gone; what was archived is counted."""
        name = f"order-{uuid4()}"
        saga_id = await finished(storage, name)
        assert (await storage.get_figures()).retention_lag is None
        figures = await storage.get_figures(retention=Kept(names={name: _NEVER}))
        assert figures.retention_lag == timedelta(0)
        before = await storage.get_figures(retention=Kept(completed=timedelta(0)))
        assert before.retention_lag is not None
        assert before.retention_lag > timedelta(0)
        archive, _ = await let_go(storage, saga_id)
        failed = await verified(storage)
        await storage.fail_archive(failed.id, error="full")
        after = await storage.get_figures()
        assert after.archived_sagas == before.archived_sagas + 1
        assert after.archived_bytes == before.archived_bytes + archive.bytes
        assert after.archives_failed_24h == before.archives_failed_24h + 1
        assert after.last_archived_at == failed.archived_at
        assert archive.archived_at is not None
        assert after.oldest_open_archive >= archive.archived_at - archive.begun_at


class RetentionRaceContract(_RetentiveContract):
    """What holds when sagas are let go while others write to them; for a storage that commits its own calls."""

    async def test_nothing_is_lost_and_nothing_is_left(self, storage: RetentiveStorage) -> None:
        """A saga either is a stub, and whoever wrote to it was refused; or it is whole, with what was written."""
        name = f"order-{uuid4()}"
        ids = [await finished(storage, name) for _ in range(24)]
        marks = [saga.mark for saga in await expired(storage, name)]
        archive, other = await verified(storage), await verified(storage)

        async def write(saga_id: UUID, turn: int) -> bool:
            try:
                if turn % 3 == 0:
                    await storage.log_step(saga_id, "late", "act", SagaStepStatus.COMPLETED)
                elif turn % 3 == 1:
                    await storage.save(Checkpoint(saga_id, context={"n": 2}, steps=[_STEPS[0]]))
                else:
                    await storage.hold_saga(saga_id, **_WHO)
            except SagaArchivedError:
                return False
            return True

        writes = [write(saga_id, turn) for turn, saga_id in enumerate(ids) for _ in range(2)]
        (made, others), written = await asyncio.gather(
            asyncio.gather(storage.make_stubs(archive.id, marks), storage.make_stubs(other.id, marks[::-1])),
            asyncio.gather(*writes),
        )
        stubs = {*made.made, *others.made}
        assert len(stubs) == len(made.made) + len(others.made)
        for turn, saga_id in enumerate(ids):
            accepted = sum(written[2 * turn : 2 * turn + 2])
            if saga_id in stubs:
                assert accepted == 0
                assert await storage.find_stub(saga_id) is not None
            else:
                assert len(await storage.get_step_history(saga_id)) == 2 + accepted

    async def test_of_several_that_restore_one_does(self, storage: RetentiveStorage) -> None:
        """The others find the saga there, the same; its history is there once."""
        saga_id = await finished(storage, f"order-{uuid4()}")
        before = await stored(storage, saga_id)
        _, record = await let_go(storage, saga_id)
        restored = await asyncio.gather(*[storage.restore_saga(record) for _ in range(4)])
        assert sorted(restored) == [Restored.RESTORED, *[Restored.SAME] * 3]
        assert await stored(storage, saga_id) == before


async def _find(storage: RetentiveStorage, policy: Kept, *, after: str | None = None) -> None:
    async with storage.snapshot() as snapshot:
        await snapshot.find_expired(policy, after=after)


def _last(history: Sequence[SagaLogEntry]) -> int:
    return history[-1].id if history else 0
