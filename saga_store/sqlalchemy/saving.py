"""Applies writes, in one statement if all goes well, and finds out what came of those whose answer got lost.

Looking wouldn't do: the statement that was lost may not have begun yet. So whatever expects a version is written
again, with the same id, and of the two the one that comes second is refused. docs/ambiguous_commits.md has the
argument, and every interleaving.
"""

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
from saga_store.sqlalchemy.binds import Parameters, Rows
from saga_store.sqlalchemy.execution import Executor, Failure, Retry
from saga_store.sqlalchemy.parameters import by_kind, of_all, of_kinds, of_one
from saga_store.sqlalchemy.retries import Retries
from saga_store.sqlalchemy.saves import save_many, save_one, tell
from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.statements import RECENT_WRITES
from saga_store.sqlalchemy.write_ids import cannot_have_been_dropped, leads_to, new_write_id
from saga_store.write import Outcome, Write


@dataclass(slots=True)
class _Sent:
    """A write that may have been written; ``is_open`` as long as another attempt may tell its outcome."""

    write: Write
    is_open: bool
    outcome: Outcome | None = None

    def decide(self, outcome: Outcome | None) -> None:
        self.outcome, self.is_open = outcome, False


@dataclass(slots=True)
class _Resolved:
    """Takes the place of the rows of a statement whose answer got lost; outcomes go by the integers of sagas' ids."""

    outcomes: dict[int, Outcome]


class Saver:
    """Applies writes to different sagas, each atomically.

    Args:
        executor: Runs the statements.
        resolves: Whether to write again what expects a version and whose answer got lost; for that, such writes
            get ids. Otherwise, and for any other write, the outcome is unknown then.
    """

    def __init__(self, executor: Executor, *, resolves: bool) -> None:
        self._executor = executor
        self._resolves = resolves

    async def save(self, write: Write) -> Outcome:
        """Wait for the row if somebody has locked it, and for whoever is creating the saga."""
        [outcome] = await self._hurry((write,), waits=True)
        if outcome is None:
            [outcome] = await self.tell((write,), waits=True)
        return cast("Outcome", outcome)

    async def hurry(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        """Write what is neither refused nor locked; None for the rest, of which ``tell`` says more.

        It waits for nobody: 55P03 if somebody is creating one of the sagas.
        """
        return await self._hurry(writes, waits=False)

    async def tell(self, writes: Sequence[Write], *, waits: bool = False) -> Sequence[Outcome | None]:
        """Likewise, but None only for a write whose row somebody has locked; or wait for the locks."""
        writes = self._identified(writes)
        statement = tell(waits=waits)
        answer = await self._settle(statement, of_all(statement, writes), writes)
        if isinstance(answer, _Resolved):
            return [answer.outcomes[write.saga_id.int] for write in writes]
        judge = _outcome if waits else _outcome_unless_locked
        return [judge(write, row) for write, row in zip(writes, sorted(answer, key=itemgetter(0)), strict=True)]

    @asynccontextmanager
    async def holding(self) -> AsyncIterator["Saver"]:
        """Give a saver for statements that follow each other closely; it may keep its connection meanwhile."""
        async with self._executor.holding() as executor:
            yield Saver(executor, resolves=self._resolves)

    async def _hurry(self, writes: Sequence[Write], *, waits: bool) -> Sequence[Outcome | None]:
        writes = self._identified(writes)
        if len(writes) == 1:
            hurrying = writes
            parameters = of_one(*writes)
            statement = save_one(frozenset(parameters), waits=waits)
        else:
            kinds = by_kind(writes)
            hurrying = [write for kind in kinds for write in kind]
            if not hurrying:
                return [None] * len(writes)
            parameters = of_kinds(*kinds)
            statement = save_many(frozenset(parameters))
        answer = await self._settle(statement, parameters, hurrying)
        outcomes = (
            answer.outcomes if isinstance(answer, _Resolved) else {saga_id.int: version for saga_id, version in answer}
        )
        return [outcomes.get(write.saga_id.int) for write in writes]

    def _identified(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Give an id to each write that is written again if its answer gets lost."""
        if not self._resolves:
            return writes
        return [
            write if write.expected_version is None else write._replace(write_id=new_write_id(write))
            for write in writes
        ]

    async def _settle(
        self, statement: Statement, parameters: Parameters, writes: Sequence[Write]
    ) -> "Rows | _Resolved":
        lost = UnknownOutcomeError(writes[0].saga_id)
        answer = await self._executor.settle(statement, parameters, if_lost=lost)
        if not isinstance(answer, Failure):
            return answer
        if answer.retry is Retry.IF_RECOGNISED and self._resolves:
            return _Resolved(await self._resolve(writes, lost))
        raise answer.error from answer.error.__cause__

    async def _resolve(self, writes: Sequence[Write], lost: UnknownOutcomeError) -> dict[int, Outcome]:
        """Return the true outcomes, and UnknownOutcomeError for what expects no version or wasn't clear in time."""
        retries = Retries(self._executor.retry_for)
        sent = [_Sent(write, is_open=write.expected_version is not None) for write in writes]
        while (still_open := [one for one in sent if one.is_open]) and await retries.pause():
            await self._write_again(still_open)
        return {
            one.write.saga_id.int: _unknown(one.write, lost) if one.outcome is None else one.outcome for one in sent
        }

    async def _write_again(self, sent: Sequence[_Sent]) -> None:
        """Tell the outcomes that can be told by now."""
        writes = [one.write for one in sent]
        statement = tell(waits=False, again=True)  # it waits for nobody, lest one locked row hold up the others
        lost = UnknownOutcomeError(writes[0].saga_id)
        rows = await self._executor.attempt(statement, of_all(statement, writes), if_lost=lost)
        if isinstance(rows, Failure):
            if len(sent) > 1 and rows.retry is Retry.NEVER:
                # It may be for one write's sake, or for a saga that somebody is creating just now.
                middle = len(sent) // 2
                await self._write_again(sent[:middle])
                await self._write_again(sent[middle:])
            return
        refused = []
        for one, (_, written, _, _, _, is_there) in zip(sent, sorted(rows, key=itemgetter(0)), strict=True):
            if written is not None:
                one.decide(cast("int", written))
            elif one.write.creates or not is_there:
                refused.append(one)  # the others are locked: perhaps by the first attempt
        if refused:
            await self._judge_refused(refused)

    async def _judge_refused(self, refused: Sequence[_Sent]) -> None:
        """Tell those that are there already from those that never will be, by what the rows remember."""
        saga_ids = [one.write.saga_id for one in refused]
        rows = await self._executor.attempt(RECENT_WRITES, {"saga_ids": saga_ids})
        if isinstance(rows, Failure):
            return
        found = {saga_id.int: (version, recent or ()) for saga_id, version, recent in rows}
        for one in refused:
            if one.write.saga_id.int in found:
                _judge(one, *found[one.write.saga_id.int])


def _judge(refused: _Sent, version: int, recent: Sequence[int]) -> None:
    write, expected = refused.write, cast("int", refused.write.expected_version)
    if write.write_id in recent:
        refused.decide(leads_to(write))
    elif version <= expected:
        return  # the first attempt, if it is under way still, could yet succeed
    elif write.write_id is not None and not cannot_have_been_dropped(write, version, recent):
        refused.decide(None)  # no attempt will ever tell
    elif write.creates:
        refused.decide(SagaAlreadyExistsError(write.saga_id))
    else:
        refused.decide(SagaConcurrencyError(write.saga_id, expected, version))


def _unknown(write: Write, lost: UnknownOutcomeError) -> UnknownOutcomeError:
    own = UnknownOutcomeError(write.saga_id)
    own.__cause__ = lost.__cause__
    return own


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
