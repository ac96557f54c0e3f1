"""Applies writes by one statement, and finds out what came of those whose answer got lost.

Looking wouldn't do: the statement that was lost may not have begun yet. So whatever expects a version is written
again, with the same id, and of the two the one that comes second is refused. docs/ambiguous_commits.md has the
argument, and every interleaving.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC
from operator import itemgetter
from typing import Any, TypeVar, cast

from saga_store.errors import (
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    UnknownOutcomeError,
)
from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.sqlalchemy.execution import Executor, Failure, Retry
from saga_store.sqlalchemy.retries import Retries
from saga_store.sqlalchemy.statements import RECENT_WRITES, SAVE, SAVE_AGAIN, SAVE_UNLOCKED, Statement
from saga_store.sqlalchemy.write_ids import cannot_have_been_dropped, leads_to, new_write_id
from saga_store.write import Outcome, Write

_Judged = TypeVar("_Judged", Outcome, Outcome | None)


@dataclass(slots=True)
class _Sent:
    """A write that may have been written; ``is_open`` as long as another attempt may tell its outcome."""

    write: Write
    write_id: int | None
    is_open: bool
    outcome: Outcome | None = None

    def decide(self, outcome: Outcome | None) -> None:
        self.outcome, self.is_open = outcome, False


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

    async def save(self, writes: Sequence[Write]) -> Sequence[Outcome]:
        return await self._save(SAVE, writes, _outcome)

    async def save_unlocked(self, writes: Sequence[Write]) -> Sequence[Outcome | None]:
        """Wait for nobody: None for a write whose row somebody has locked, and 55P03 if somebody is creating one."""
        return await self._save(SAVE_UNLOCKED, writes, _outcome_unless_locked)

    async def _save(
        self, statement: Statement, writes: Sequence[Write], judge: Callable[[Write, Sequence[Any]], _Judged]
    ) -> Sequence[_Judged]:
        ids = [new_write_id(write) for write in writes] if self._resolves else [None] * len(writes)
        lost = UnknownOutcomeError(writes[0].saga_id)
        answer = await self._executor.settle(statement, _save_parameters(writes, ids), if_lost=lost)
        if isinstance(answer, Failure):
            if answer.retry is Retry.IF_RECOGNISED and self._resolves:
                return await self._resolve(writes, ids, lost)
            raise answer.error from answer.error.__cause__
        return [judge(write, row) for write, row in zip(writes, sorted(answer, key=itemgetter(0)), strict=True)]

    async def _resolve(
        self, writes: Sequence[Write], ids: Sequence[int | None], lost: UnknownOutcomeError
    ) -> list[Outcome]:
        """Return the true outcomes, and UnknownOutcomeError for what expects no version or wasn't clear in time."""
        retries = Retries(self._executor.retry_for)
        sent = [
            _Sent(write, write_id, is_open=write.expected_version is not None)
            for write, write_id in zip(writes, ids, strict=True)
        ]
        while (still_open := [one for one in sent if one.is_open]) and await retries.pause():
            await self._write_again(still_open)
        return [_unknown(one.write, lost) if one.outcome is None else one.outcome for one in sent]

    async def _write_again(self, sent: Sequence[_Sent]) -> None:
        """Tell the outcomes that can be told by now."""
        writes = [one.write for one in sent]
        parameters = _save_parameters(writes, [one.write_id for one in sent])
        rows = await self._executor.attempt(SAVE_AGAIN, parameters, if_lost=UnknownOutcomeError(writes[0].saga_id))
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
    if refused.write_id in recent:
        refused.decide(leads_to(write))
    elif version <= expected:
        return  # the first attempt, if it is under way still, could yet succeed
    elif refused.write_id is not None and not cannot_have_been_dropped(write, version, recent):
        refused.decide(None)  # no attempt will ever tell
    elif write.creates:
        refused.decide(SagaAlreadyExistsError(write.saga_id))
    else:
        refused.decide(SagaConcurrencyError(write.saga_id, expected, version))


def _unknown(write: Write, lost: UnknownOutcomeError) -> UnknownOutcomeError:
    own = UnknownOutcomeError(write.saga_id)
    own.__cause__ = lost.__cause__
    return own


def _save_parameters(writes: Sequence[Write], ids: Sequence[int | None]) -> dict[str, object]:
    now = time.monotonic()
    steps = [(write.saga_id, step) for write in writes for step in write.steps]
    columns: dict[str, list[Any]] = {
        "saga_ids": [write.saga_id for write in writes],
        "names": [write.name for write in writes],
        "statuses": [_plain(write.status) for write in writes],
        "contexts": [write.context for write in writes],
        "attempts": [write.recovery_attempts for write in writes],
        "expected": [write.expected_version for write in writes],
        "lease_owners": [write.lease and write.lease.owner for write in writes],
        "lease_seconds": [write.lease and write.lease.seconds for write in writes],
        "releases": [write.lease and write.lease.releases for write in writes],
        "write_ids": list(ids),
        "step_saga_ids": [saga_id for saga_id, _ in steps],
        "step_names": [step.step_name for _, step in steps],
        "step_actions": [step.action for _, step in steps],
        "step_statuses": [_plain(step.status) for _, step in steps],
        "step_details": [step.details for _, step in steps],
        "step_ages": [age or None for write in writes for age in write.ages(now)],
    }
    # To unnest, no array is as good as one of NULLs, and to the drivers, which look at every element, far cheaper.
    return {name: None if column.count(None) == len(column) else column for name, column in columns.items()}


def _plain(status: SagaStatus | SagaStepStatus | None) -> str | None:
    """Return a plain str: psycopg would take an enum for a type of the database's."""
    return None if status is None else status.value


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
