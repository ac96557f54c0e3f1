"""What came of writes whose answer got lost: whatever expects a version is written again, with the same id.

Looking wouldn't do: the statement that was lost may not have begun yet. Of the two the one that comes second is
refused, and the ids that the row keeps tell which of them is there. Each row keeps those of its last writes in the
order in which they were written, so their versions never fall, and what has been dropped had no higher version than
the first that is kept. docs/ambiguous_commits.md has the argument, and every interleaving.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

from saga_store.errors import (
    SagaAlreadyExistsError,
    SagaArchivedError,
    SagaConcurrencyError,
    SagaNotFoundError,
    UnknownOutcomeError,
)
from saga_store.sqlalchemy.execution import Executor, Failure, Retries, Retry
from saga_store.sqlalchemy.read_sql import RECENT_WRITES
from saga_store.sqlalchemy.wire import lasting, read_text
from saga_store.sqlalchemy.write_parameters import ids_as_text, of_all
from saga_store.sqlalchemy.write_sql import KEPT, explain
from saga_store.write import Outcome, Write
from saga_store.write_ids import RANDOM_BITS, VERSION_MASK, leads_to

# Shorter than elsewhere, for others whose connections live write meanwhile, and the row keeps the ids of so many only.
_LONGEST_PAUSE_SECONDS = 0.2


@dataclass(slots=True)
class _Sent:
    """A write that may have been written; ``is_open`` as long as another attempt may tell its outcome.

    ``doubt`` says why there is none.
    """

    write: Write
    is_open: bool
    doubt: str
    outcome: Outcome | None = None

    def decide(self, outcome: Outcome) -> None:
        self.outcome, self.is_open = outcome, False

    def give_up(self, doubt: str) -> None:
        self.doubt, self.is_open = doubt, False


async def resolve(executor: Executor, writes: Sequence[Write], lost: UnknownOutcomeError) -> dict[int, Outcome]:
    """Return the true outcomes, and UnknownOutcomeError for what expects no version or wasn't clear in time.

    They go by the integers of the sagas' ids.
    """
    retries = Retries(executor.retry_for, _LONGEST_PAUSE_SECONDS)
    sent = [_begun(write, executor.retry_for) for write in writes]
    while still_open := [one for one in sent if one.is_open]:
        answered = await _write_again(executor, still_open)
        # While the server can't be reached, the first of this storage's statements that gets through ends the pause.
        news = None if answered else executor.news
        if any(one.is_open for one in still_open) and not await retries.pause(until=news):
            break
    outcomes = {one.write.saga_id.int: _unknown(one, lost) if one.outcome is None else one.outcome for one in sent}
    if executor.observer is not None:
        for outcome in outcomes.values():
            executor.observer.resolved(outcome)
    return outcomes


async def judge(executor: Executor, write: Write) -> Outcome:
    """Return what it means that a write was refused, if it may have been sent before."""
    rows = await executor.execute(RECENT_WRITES, {"saga_ids": ids_as_text([write.saga_id])})
    if not rows:
        return SagaNotFoundError(write.saga_id)
    [(_, version, recent, archived_at)] = rows
    refused = _begun(write, executor.retry_for)
    _judge(refused, version, read_ids(recent), archived_at)
    return _unknown(refused, None) if refused.outcome is None else refused.outcome


def _begun(write: Write, seconds: float) -> _Sent:
    if write.expected_version is None:
        return _Sent(write, is_open=False, doubt="it expects no version, by which it could have been found out")
    return _Sent(write, is_open=True, doubt=f"nothing could be found out within retry_for, which is {seconds:g} s")


async def _write_again(executor: Executor, sent: Sequence[_Sent]) -> bool:
    """Tell the outcomes that can be told by now; return whether the server answered."""
    writes = [one.write for one in sent]
    statement = explain(waits=False, again=True)  # it waits for nobody, or one locked row would hold up the others
    lost = UnknownOutcomeError(writes[0].saga_id)
    rows = await executor.attempt(statement, of_all(statement, writes), if_lost=lost)
    if isinstance(rows, Failure):
        if rows.retry is not Retry.NEVER:
            return False
        if len(sent) > 1:
            # It may be for one write's sake, or for a saga that somebody is creating just now.
            middle = len(sent) // 2
            return await _write_again(executor, sent[:middle]) and await _write_again(executor, sent[middle:])
        return True
    refused = []
    for one, (_, written, *_, is_there) in zip(sent, sorted(rows, key=itemgetter(0)), strict=True):
        if written is not None:
            one.decide(cast("int", written))
        elif one.write.creates or not is_there:
            refused.append(one)  # the others are locked: perhaps by the first attempt
    if refused:
        await _judge_refused(executor, refused)
    return True


async def _judge_refused(executor: Executor, refused: Sequence[_Sent]) -> None:
    """Tell those that are there already from those that never will be, by what the rows remember."""
    saga_ids = ids_as_text([one.write.saga_id for one in refused])
    rows = await executor.attempt(RECENT_WRITES, {"saga_ids": saga_ids})
    if isinstance(rows, Failure):
        return
    found = {saga_id.int: (version, read_ids(recent), archived_at) for saga_id, version, recent, archived_at in rows}
    for one in refused:
        if one.write.saga_id.int in found:
            _judge(one, *found[one.write.saga_id.int])


def read_ids(sent: bytes | None) -> list[int]:
    """Read the text of an array of numbers."""
    return [int(number) for number in read_text(sent).strip("{}").split(",") if number] if sent else []


def _judge(refused: _Sent, version: int, recent: Sequence[int], archived_at: bytes | None) -> None:
    write, expected = refused.write, cast("int", refused.write.expected_version)
    if write.write_id in recent:
        refused.decide(leads_to(write))
    elif version <= expected:
        # The first attempt, if it is under way still, could yet succeed.
        if archived_at is not None:
            refused.doubt = "the saga has been archived without it, and if that is restored it may come yet"
    elif write.write_id is not None and not cannot_have_been_dropped(write, version, recent):
        # No attempt will ever tell.
        refused.give_up(
            f"it led to version {leads_to(write)}, and the saga is at {version}: others have written more than "
            f"{KEPT - 1} times since, and the row keeps the ids of {len(recent)} writes"
        )
    elif write.creates:
        refused.decide(SagaAlreadyExistsError(write.saga_id))
    elif archived_at is not None:
        refused.decide(SagaArchivedError(write.saga_id, None, lasting(archived_at)))
    else:
        refused.decide(SagaConcurrencyError(write.saga_id, expected, version))


def cannot_have_been_dropped(write: Write, found: int, recent: Sequence[int]) -> bool:
    """Whether the write's id would still be among the recent ones of its saga, now at version ``found``."""
    if len(recent) < KEPT:
        return True
    # At least so old, for of its version only the low bits are known.
    age = (found - (recent[0] >> RANDOM_BITS)) & VERSION_MASK
    return found - age < leads_to(write)


def _unknown(sent: _Sent, lost: UnknownOutcomeError | None) -> UnknownOutcomeError:
    own = UnknownOutcomeError(sent.write.saga_id)
    own.add_note(sent.doubt)
    own.__cause__ = lost and lost.__cause__
    return own
