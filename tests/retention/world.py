"""Sagas that were made to be archived, and the question where each of them is now."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from uuid import UUID, uuid4

from saga_store import (
    Checkpoint,
    LogStep,
    MemoryDatabase,
    MemorySagaStorage,
    SagaStatus,
    SagaStepStatus,
    SagaStorage,
)
from saga_store.retention import RetentionPolicy, Target, find_archived
from saga_store.retention_model import ArchiveState, SagaRecord
from saga_store.validation import encode_context

ALL = RetentionPolicy(completed=timedelta(0), failed=timedelta(0))
"""Lets everything go that is finished."""

ENTRIES = [
    LogStep("reserve", "act", SagaStepStatus.STARTED),
    LogStep("reserve", "act", SagaStepStatus.COMPLETED, "2 „Stühle“"),
    LogStep("charge", "act", SagaStepStatus.FAILED, 'card "declined"\nfor good'),
    LogStep("reserve", "compensate", SagaStepStatus.COMPENSATED),
]


async def make_finished(storage: SagaStorage, count: int, *, name: str = "order") -> list[UUID]:
    ids = [uuid4() for _ in range(count)]
    for at, saga_id in enumerate(ids):
        status = SagaStatus.FAILED if at % 3 == 0 else SagaStatus.COMPLETED
        context = {"order": at, "note": "é€ \U0001f600", "total": 12.5}
        await storage.save(
            Checkpoint(saga_id, name=name, status=status, context=context, steps=ENTRIES[: at % (len(ENTRIES) + 1)])
        )
    return ids


async def record(storage: SagaStorage, saga_id: UUID) -> SagaRecord:
    """Return a saga as the table has it, held or not."""
    saga = await storage.get_saga(saga_id)
    return SagaRecord(
        saga.id,
        saga.name,
        saga.status,
        encode_context(saga.context),  # to the letter, for so it was written
        saga.version,
        saga.recovery_attempts,
        saga.created_at,
        saga.updated_at,
        await storage.get_step_history(saga_id),
    )


async def records(storage: SagaStorage, ids: Iterable[UUID]) -> dict[UUID, SagaRecord]:
    return {saga_id: await record(storage, saga_id) for saga_id in ids}


async def check_nothing_is_lost(
    storage: SagaStorage, target: Target, originals: Mapping[UUID, SagaRecord]
) -> set[UUID]:
    """See that each saga is whole in the table, or a stub whose archive has it; return those that are archived."""
    archived = set()
    for saga_id, original in originals.items():
        stub = await storage.find_stub(saga_id)
        if stub is None:
            assert await record(storage, saga_id) == original
            continue
        assert stub.archive is not None
        assert stub.archive.state in {ArchiveState.VERIFIED, ArchiveState.REMOVED}
        found = await find_archived(storage, saga_id, archive=target)
        assert found is not None
        assert found.record == original
        archived.add(saga_id)
    return archived


def in_memory() -> MemorySagaStorage:
    return MemorySagaStorage(MemoryDatabase())
