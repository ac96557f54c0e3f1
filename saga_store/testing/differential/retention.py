"""Rules: holds, and sagas that are let go, come back and are forgotten; where each call is committed by itself."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from hypothesis import strategies as st
from hypothesis.stateful import rule

from saga_store.model import SagaExecution, SagaLogEntry
from saga_store.retention_model import SagaMark, SagaRecord
from saga_store.storage import SagaStorage
from saga_store.testing.differential import strategies as draw
from saga_store.testing.differential.machine import DifferentialMachine
from saga_store.testing.differential.world import World

_URI = "file:///archive"
_ends = st.sampled_from([None, datetime(2999, 1, 1, tzinfo=UTC), datetime(2001, 1, 1, tzinfo=UTC)])


class RetentionRules(DifferentialMachine):
    @rule(who=draw.actors, saga=draw.sagas, by=draw.people, reason=draw.reasons, until=_ends)
    def hold(self, who: int, saga: int, by: str, reason: str, until: datetime | None) -> None:
        self.write(who, saga, lambda storage, saga_id: storage.hold_saga(saga_id, by=by, reason=reason, until=until))

    @rule(who=draw.actors, saga=draw.sagas, by=draw.people, reason=draw.reasons)
    def release(self, who: int, saga: int, by: str, reason: str) -> None:
        self.write(who, saga, lambda storage, saga_id: storage.release_saga(saga_id, by=by, reason=reason))

    @rule(who=draw.actors, saga=draw.sagas, off=st.sampled_from([0, 0, 0, 1]), what=st.integers(0, 2))
    def let_go(self, who: int, saga: int, off: int, what: int) -> None:
        """Make a stub, if it is as it was when it was read; ``off`` and ``what`` tell what of its mark is wrong."""

        async def archive(world: World) -> object:
            return await _let_go(world, world.storage(who), self.ids[saga], [off * (part == what) for part in range(3)])

        self.both(archive)

    @rule(who=draw.actors, saga=draw.sagas)
    def restore(self, who: int, saga: int) -> None:
        """Put the saga back as it was when it was last let go, if it ever was."""

        async def bring_back(world: World) -> object:
            record = world.records.get(self.ids[saga])
            return record and await world.storage(who).restore_saga(record, keep_for=timedelta(0))

        self.both(bring_back)

    @rule(who=draw.actors)
    def forget(self, who: int) -> None:
        async def forget_all(world: World) -> None:
            while await world.storage(who).forget_stubs(older_than=timedelta(0)):
                pass

        self.both(forget_all)


async def _let_go(world: World, storage: SagaStorage, saga_id: UUID, off: list[int]) -> object:
    saga, history = await storage.get_saga(saga_id), await storage.get_step_history(saga_id)
    archive_id = uuid4()
    await storage.begin_archive(archive_id, uri=_URI, by="archiver")
    await storage.verify_archive(archive_id, sha256=None, sagas=1, entries=len(history), bytes=0, watermark=None)
    last = history[-1].id if history else 0
    made = await storage.make_stubs(
        archive_id, [SagaMark(saga_id, saga.version + off[0], len(history) + off[1], last + off[2])]
    )
    if made.made:
        world.records[saga_id] = _record(saga, history)
    return len(made.made), len(made.already), (await storage.get_archive(archive_id)).removed


def _record(saga: SagaExecution, history: list[SagaLogEntry]) -> SagaRecord:
    return SagaRecord(
        saga.id,
        saga.name,
        saga.status,
        json.dumps(saga.context, separators=(",", ":")),  # to the letter as it is stored
        saga.version,
        saga.recovery_attempts,
        saga.created_at,
        saga.updated_at,
        history,
    )
