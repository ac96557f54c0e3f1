"""Storages that break a promise each, for the checker to notice; everything else about them is real."""

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from saga_store.errors import StorageUnavailableError, UnknownOutcomeError
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.write import Outcome, Write


class AcknowledgesBeforeCommit(SqlAlchemySagaStorage):
    """Answers when the statement has been executed, and commits before the next one."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self._engine = engine
        self._uncommitted: AsyncConnection | None = None

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        await self.commit()
        self._uncommitted = await self._engine.connect()
        return await SqlAlchemySagaStorage(self._uncommitted)._apply(writes)  # noqa: SLF001 - itself, on another bind

    async def commit(self) -> None:
        uncommitted, self._uncommitted = self._uncommitted, None
        if uncommitted:
            try:
                await uncommitted.commit()
            finally:
                await uncommitted.close()


class RetriesBlindly(SqlAlchemySagaStorage):
    """Takes a lost answer for a write that wasn't made."""

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        outcomes = await super()._apply(writes)
        if any(isinstance(outcome, UnknownOutcomeError) for outcome in outcomes):
            return await super()._apply(writes)
        return outcomes


class DeniesWhatItWrote(SqlAlchemySagaStorage):
    """Tells a lost answer as a write that wasn't made."""

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        return [
            StorageUnavailableError("the connection was lost") if isinstance(outcome, UnknownOutcomeError) else outcome
            for outcome in await super()._apply(writes)
        ]


class Reorders(SqlAlchemySagaStorage):
    """Acknowledges every other write at once, and makes it after the next one."""

    _postponed: Sequence[Write] | None = None

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        if self._postponed is None:
            self._postponed = writes
            return [0 for _ in writes]
        postponed, self._postponed = self._postponed, None
        outcomes = await super()._apply(writes)
        await super()._apply(postponed)
        return outcomes


class WritesLogsApart(SqlAlchemySagaStorage):
    """Changes the row in one transaction, and writes the log entries in the next."""

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        outcomes = await super()._apply([write._replace(steps=(), logged_at=()) for write in writes])
        await super()._apply([Write(write.saga_id, steps=write.steps) for write in writes if write.steps])
        return outcomes


class ForgetsTheFence(SqlAlchemySagaStorage):
    """Writes whatever the version is."""

    async def _apply(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        return await super()._apply([write._replace(expected_version=None) for write in writes])
