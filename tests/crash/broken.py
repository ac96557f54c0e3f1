"""Storages that break a promise each, for the checker to notice; everything else about them is real."""

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

    async def _apply(self, write: Write) -> Outcome:
        await self.commit()
        self._uncommitted = await self._engine.connect()
        return await SqlAlchemySagaStorage(self._uncommitted)._apply(write)  # noqa: SLF001 - itself, on another bind

    async def commit(self) -> None:
        uncommitted, self._uncommitted = self._uncommitted, None
        if uncommitted:
            try:
                await uncommitted.commit()
            finally:
                await uncommitted.close()


class RetriesBlindly(SqlAlchemySagaStorage):
    """Takes a lost answer for a write that wasn't made."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        return await super()._apply(write) if isinstance(outcome, UnknownOutcomeError) else outcome


class DeniesWhatItWrote(SqlAlchemySagaStorage):
    """Tells a lost answer as a write that wasn't made."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write)
        lost = isinstance(outcome, UnknownOutcomeError)
        return StorageUnavailableError("the connection was lost") if lost else outcome


class Reorders(SqlAlchemySagaStorage):
    """Acknowledges every other write at once, and makes it after the next one."""

    _postponed: Write | None = None

    async def _apply(self, write: Write) -> Outcome:
        if self._postponed is None:
            self._postponed = write
            return 0
        postponed, self._postponed = self._postponed, None
        outcome = await super()._apply(write)
        await super()._apply(postponed)
        return outcome


class WritesLogsApart(SqlAlchemySagaStorage):
    """Changes the row in one transaction, and writes the log entries in the next."""

    async def _apply(self, write: Write) -> Outcome:
        outcome = await super()._apply(write._replace(steps=(), logged_at=()))
        if write.steps:
            await super()._apply(Write(write.saga_id, steps=write.steps))
        return outcome


class ForgetsTheFence(SqlAlchemySagaStorage):
    """Writes whatever the version is."""

    async def _apply(self, write: Write) -> Outcome:
        return await super()._apply(write._replace(expected_version=None))
