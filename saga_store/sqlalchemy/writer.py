"""Applies writes, in one statement if all goes well; what that leaves out goes through one that explains."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

from saga_store.errors import (
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.execution import Executor, Failure, Retry, pauses
from saga_store.sqlalchemy.failures import CANCELED, LOCK_NOT_AVAILABLE
from saga_store.sqlalchemy.lost_answers import judge, resolve
from saga_store.sqlalchemy.read_sql import PATIENCE
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.wire import Parameters, Rows, lasting
from saga_store.sqlalchemy.write_parameters import by_kind, of_all, of_kinds, of_one
from saga_store.sqlalchemy.write_sql import explain, write_many, write_one
from saga_store.write import Outcome, Write
from saga_store.write_ids import identified

_Attempt = Callable[[Sequence[Write]], Awaitable[Sequence[Outcome | None]]]
"""Applies writes, and answers None for those whose rows are locked."""


@dataclass(slots=True)
class _Resolved:
    """Takes the place of the rows of a statement whose answer got lost; outcomes go by the integers of sagas' ids."""

    outcomes: dict[int, Outcome]


class Patience:
    """How long may be waited for a lock, in seconds; 0: for ever.

    The server would stop a statement that waits. Where it is asked again and again instead, this stands for that.
    """

    def __init__(self, lock_timeout: float = 0, statement_timeout: float = 0) -> None:
        limits = [
            (lock_timeout, "lock_timeout", LOCK_NOT_AVAILABLE),
            (statement_timeout, "statement_timeout", CANCELED),
        ]
        self._limit = min((limit for limit in limits if limit[0]), default=None)
        self._began = time.monotonic()

    def is_over(self) -> bool:
        return self._limit is not None and time.monotonic() - self._began > self._limit[0]

    def error(self) -> StorageUnavailableError:
        """Return what the server would have said."""
        seconds, setting, code = self._limit or (0, "", "")
        return StorageUnavailableError(
            f"another transaction has locked the saga, or is creating it, for longer than this connection's {setting} "
            f"of {seconds:g} s",
            code,
        )


class Writer:
    """Applies writes to different sagas, each atomically.

    Args:
        executor: Runs the statements.
        resolves: Whether to write again what expects a version and whose answer got lost; for that, such writes
            get ids. Otherwise, and for any other write, the outcome is unknown then.
    """

    def __init__(self, executor: Executor, *, resolves: bool) -> None:
        self._executor = executor
        self._resolves = resolves

    async def write(self, write: Write) -> Outcome:
        """Wait for the row if another transaction has locked it, and for one that is creating the saga.

        Except in a transaction of the caller's, no connection is held while it waits.
        """
        if self._executor.joins:
            [outcome] = await self._write_now((write,), waits=True)
            if outcome is None:
                [outcome] = await self.explain((write,), waits=True)
            return cast("Outcome", outcome)
        outcome = await self._unless_locked(self.write_now, write)
        return await self._until_unlocked(self.explain, write) if outcome is None else outcome

    async def repeat(self, write: Write) -> Outcome:
        """Apply a write that may have been sent before, with the same id: it may be there, or be under way still."""
        try:
            outcome = await self._until_unlocked(self._write_again, write)
        except StorageUnavailableError as exc:
            outcome = exc
        if isinstance(outcome, StorageUnavailableError) and not self._executor.joins:
            # This attempt has written nothing; what became of the one before is as open as it was.
            lost = UnknownOutcomeError(write.saga_id)
            lost.__cause__ = outcome
            outcome = (await resolve(self._executor, (write,), lost))[write.saga_id.int]
        elif self._executor.observer is not None and not isinstance(outcome, StorageUnavailableError):
            self._executor.observer.resolved(outcome)
        return outcome

    async def _write_again(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        [write] = writes
        statement = explain(waits=self._executor.joins, again=True)
        answer = await self._settle(statement, of_all(statement, writes), writes)
        if isinstance(answer, _Resolved):
            return [answer.outcomes[write.saga_id.int]]
        [(_, written, *_, is_there)] = answer
        if written is not None:
            return [cast("int", written)]
        is_locked = is_there and not write.creates
        return [None if is_locked else await judge(self._executor, write)]

    async def _until_unlocked(self, attempt: _Attempt, write: Write) -> Outcome:
        outcome = await self._unless_locked(attempt, write)
        if outcome is not None:
            return outcome
        began = time.monotonic()
        try:
            patience, lock_pauses = await self.patience(), pauses()
            while (outcome := await self._unless_locked(attempt, write)) is None:
                if patience.is_over():
                    return patience.error()
                await asyncio.sleep(next(lock_pauses))
            return outcome
        finally:
            if self._executor.observer is not None:
                self._executor.observer.waited_for_lock(time.monotonic() - began)

    async def patience(self) -> "Patience":
        """Return how long the connection's settings let anybody wait for a lock: from now on."""
        rows = await self._executor.execute(PATIENCE, {})
        (lock_timeout,), (statement_timeout,) = rows
        return Patience(lock_timeout / 1000, statement_timeout / 1000)

    @staticmethod
    async def _unless_locked(attempt: _Attempt, write: Write) -> Outcome | None:
        try:
            [outcome] = await attempt((write,))
        except StorageUnavailableError as exc:
            if exc.sqlstate != LOCK_NOT_AVAILABLE:
                raise
            return None
        return outcome

    async def write_now(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        """Write what is neither refused nor locked; None for the rest, which ``explain`` says more of.

        It waits for nobody: 55P03 if another transaction is creating one of the sagas.
        """
        return await self._write_now(writes, waits=False)

    async def explain(self, writes: Sequence[Write], *, waits: bool = False) -> Sequence[Outcome | None]:
        """Likewise, but None only for a write whose row is locked; or wait for the locks."""
        writes = self._identified(writes)
        statement = explain(waits=waits)
        answer = await self._settle(statement, of_all(statement, writes), writes)
        if isinstance(answer, _Resolved):
            return [answer.outcomes[write.saga_id.int] for write in writes]
        judge = _outcome if waits else _outcome_unless_locked
        return [judge(write, row) for write, row in zip(writes, sorted(answer, key=itemgetter(0)), strict=True)]

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Writer"]:
        """Give a writer for statements that follow each other closely; it may keep its connection meanwhile."""
        async with self._executor.holding() as executor:
            yield Writer(executor, resolves=self._resolves)

    async def _write_now(self, writes: Sequence[Write], *, waits: bool) -> Sequence[Outcome | None]:
        writes = self._identified(writes)
        if len(writes) == 1:
            written = writes
            parameters = of_one(*writes)
            statement = write_one(frozenset(parameters), waits=waits)
        else:
            kinds = by_kind(writes)
            written = [write for kind in kinds for write in kind]
            if not written:
                return [None] * len(writes)
            parameters = of_kinds(*kinds)
            statement = write_many(frozenset(parameters))
        answer = await self._settle(statement, parameters, written)
        outcomes = (
            answer.outcomes if isinstance(answer, _Resolved) else {saga_id.int: version for saga_id, version in answer}
        )
        return [outcomes.get(write.saga_id.int) for write in writes]

    def _identified(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Give an id to each write that is written again if its answer gets lost."""
        return [identified(write) for write in writes] if self._resolves else writes

    async def _settle(
        self, statement: Statement, parameters: Parameters, writes: Sequence[Write]
    ) -> "Rows | _Resolved":
        lost = UnknownOutcomeError(writes[0].saga_id)
        answer = await self._executor.settle(statement, parameters, if_lost=lost)
        if not isinstance(answer, Failure):
            return answer
        if answer.retry is Retry.IF_RECOGNISED and self._resolves:
            return _Resolved(await resolve(self._executor, writes, lost))
        raise self._executor.told(answer.error, writes=len(writes)) from answer.error.__cause__


def _outcome(write: Write, row: Sequence[Any]) -> Outcome:
    _, written, found, holder, held_until, archived_at, _ = row
    if written is not None:
        return cast("int", written)
    if write.creates:
        return SagaAlreadyExistsError(write.saga_id)
    if found is None:
        return SagaNotFoundError(write.saga_id)
    if archived_at is not None:
        return SagaArchivedError(write.saga_id, None, lasting(archived_at))
    if write.expected_version not in (None, found):
        return SagaConcurrencyError(write.saga_id, write.expected_version, found)
    return SagaLeasedError(write.saga_id, holder.decode(errors="replace"), lasting(held_until))


def _outcome_unless_locked(write: Write, row: Sequence[Any]) -> Outcome | None:
    _, written, *_, is_there = row
    return None if is_there and written is None and not write.creates else _outcome(write, row)
