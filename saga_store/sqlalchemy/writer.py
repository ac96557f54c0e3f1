"""Applies writes, in one statement if all goes well; what that leaves out goes through one that explains."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from operator import itemgetter
from typing import Any, cast

from saga_store.errors import (
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.execution import Executor, Failure, Retry
from saga_store.sqlalchemy.lost_answers import judge, resolve
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.wire import Parameters, Rows
from saga_store.sqlalchemy.write_parameters import by_kind, of_all, of_kinds, of_one
from saga_store.sqlalchemy.write_sql import explain, write_many, write_one
from saga_store.write import Outcome, Write
from saga_store.write_ids import identified


@dataclass(slots=True)
class _Resolved:
    """Takes the place of the rows of a statement whose answer got lost; outcomes go by the integers of sagas' ids."""

    outcomes: dict[int, Outcome]


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
        """Wait for the row if somebody has locked it, and for whoever is creating the saga."""
        [outcome] = await self._write_now((write,), waits=True)
        if outcome is None:
            [outcome] = await self.explain((write,), waits=True)
        return cast("Outcome", outcome)

    async def write_now(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        """Write what is neither refused nor locked; None for the rest, which ``explain`` says more of.

        It waits for nobody: 55P03 if somebody is creating one of the sagas.
        """
        return await self._write_now(writes, waits=False)

    async def explain(self, writes: Sequence[Write], *, waits: bool = False) -> Sequence[Outcome | None]:
        """Likewise, but None only for a write whose row somebody has locked; or wait for the locks."""
        writes = self._identified(writes)
        statement = explain(waits=waits)
        answer = await self._settle(statement, of_all(statement, writes), writes)
        if isinstance(answer, _Resolved):
            return [answer.outcomes[write.saga_id.int] for write in writes]
        judge = _outcome if waits else _outcome_unless_locked
        return [judge(write, row) for write, row in zip(writes, sorted(answer, key=itemgetter(0)), strict=True)]

    async def repeat(self, write: Write) -> Outcome:
        """Apply a write that may have been sent before, with the same id: it may be there, or be under way still."""
        statement = explain(waits=True, again=True)
        answer = await self._settle(statement, of_all(statement, (write,)), (write,))
        if isinstance(answer, _Resolved):
            return answer.outcomes[write.saga_id.int]
        [(_, written, *_)] = answer
        return await judge(self._executor, write) if written is None else cast("int", written)

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
        raise answer.error from answer.error.__cause__


def _outcome(write: Write, row: Sequence[Any]) -> Outcome:
    _, written, found, holder, held_until, _ = row
    if written is not None:
        return cast("int", written)
    if write.creates:
        return SagaAlreadyExistsError(write.saga_id)
    if found is None:
        return SagaNotFoundError(write.saga_id)
    if write.expected_version not in (None, found):
        return SagaConcurrencyError(write.saga_id, write.expected_version, found)
    return SagaLeasedError(write.saga_id, holder, held_until.astimezone(UTC))


def _outcome_unless_locked(write: Write, row: Sequence[Any]) -> Outcome | None:
    _, written, _, _, _, is_there = row
    return None if is_there and written is None and not write.creates else _outcome(write, row)
