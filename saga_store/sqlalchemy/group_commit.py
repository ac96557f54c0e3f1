"""Many callers, one statement: whoever arrives while a flush is under way goes in the next one.

A caller who finds no flush under way flushes at once, alone; nothing waits for a timer. What is queued:

- at most one write per saga in a batch, so each saga's writes take effect in the order of the calls;
- batches bounded by rows and bytes;
- a row that somebody else has locked, or is creating, is left out of the batch and waited for apart, so that
  one forgotten transaction in a psql session stalls its own saga and no other;
- a batch that fails for one write's sake is split until only that write fails;
- a caller that is cancelled while its write is queued takes it back; while it is in flight, the batch goes
  on and the answer is dropped.

Batches are flushed by a task that ends when nobody is left, so there is nothing to start or to close.
"""

import asyncio
import copy
import threading
from collections import deque
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from saga_store.errors import InvalidSagaDataError, SagaStoreError, StorageUnavailableError, UnknownOutcomeError
from saga_store.write import Outcome, Write

# A batch is closed by the write that reaches either; the bytes are those of contexts and details.
MAX_BATCH_ROWS = 1000
MAX_BATCH_BYTES = 4 * 1024 * 1024
# While the server works on one batch, the client answers and gathers the other: neither waits for its turn.
MAX_FLUSHES = 2
# Statements have a price of their own, so a second one isn't worth its while for fewer.
LEAST_SHARED = 8
# Each waits on a connection of its own, so they mustn't use up a pool.
MAX_WAITING_FOR_LOCKS = 4

_LOCK_NOT_AVAILABLE = "55P03"
# SQLSTATE classes of which no single write is guilty: smaller batches would fail alike.
_NOBODYS_FAULT = ("08", "25", "26", "28", "3D", "3F", "40", "42", "53", "57P", "58")


class Writer(Protocol):
    """Applies writes to different sagas, each atomically, and says what came of it."""

    async def write_now(self, writes: Sequence[Write], /) -> Sequence[Outcome | None]:
        """Answer None for a write that wasn't applied, for whatever reason.

        Nobody is waited for: it fails with SQLSTATE 55P03 if somebody is creating a saga that one of them creates.
        """

    async def explain(self, writes: Sequence[Write], /) -> Sequence[Outcome | None]:
        """Likewise, but answer None only for a write whose row somebody has locked."""

    async def write(self, write: Write, /) -> Outcome:
        """Wait for the row if it is locked."""

    def holding(self) -> AbstractAsyncContextManager["Writer"]:
        """Return the same for calls that follow each other closely; it may keep its connection meanwhile."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A write that waits or is in flight, and behind it the next ones to the same saga, in the order of the calls."""

    write: Write
    answer: asyncio.Future[Outcome]
    next: "deque[_Entry] | None" = None


class GroupCommit:
    """Gathers writes into batches.

    It belongs to the event loop that uses it first, until that loop is closed, as SQLAlchemy's engines do.

    Args:
        writer: What it hands the writes to.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._queue: _Queue | None = None
        self._changing_loops = threading.Lock()

    def write(self, write: Write) -> Awaitable[Outcome]:
        loop = asyncio.get_running_loop()
        queue = self._queue
        if queue is None or queue.loop is not loop:
            queue = self._change_loop(loop)
        return queue.write(write)

    def _change_loop(self, loop: asyncio.AbstractEventLoop) -> "_Queue":
        with self._changing_loops:
            if self._queue is not None and not self._queue.loop.is_closed():
                raise StorageUnavailableError(
                    "this storage is in use in another event loop, and an engine can't be shared between loops; "
                    "make an engine and a storage for each"
                )
            self._queue = _Queue(loop, self._writer)
            return self._queue


class _Queue:
    def __init__(self, loop: asyncio.AbstractEventLoop, writer: Writer) -> None:
        self.loop = loop
        self._writer = writer
        # The first write of each saga that has any: in flight, or ready to be. Sagas go by the integers of their ids,
        # which are hashed several times faster than the ids.
        self._first: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        # Those who take batches, and all tasks, lest nobody refers to one that is under way.
        self._flushers: set[asyncio.Task[None] | None] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._flushes_alone = False
        self._lock_waiter_slots = asyncio.Semaphore(MAX_WAITING_FOR_LOCKS)

    def write(self, write: Write) -> Awaitable[Outcome]:
        entry = _Entry(write, self.loop.create_future())
        first = self._first.setdefault(write.saga_id.int, entry)
        if first is not entry:
            if first.next is None:
                first.next = deque()
            first.next.append(entry)
        elif not self._flushers and not self._flushes_alone:
            return self._flush_alone(entry)
        else:
            self._ready.append(entry)
            self._flush_what_is_ready()
        return entry.answer

    async def _flush_alone(self, entry: _Entry) -> Outcome:
        """Flush in the caller's own task, which may be cancelled: nobody else's write is in this statement."""
        self._flushes_alone = True
        outcome: Outcome | None = None
        is_locked = False
        try:
            [outcome] = await self._writer.write_now((entry.write,))
            if outcome is None:
                [outcome] = await self._writer.explain((entry.write,))
            is_locked = outcome is None
        except StorageUnavailableError as exc:
            is_locked = exc.sqlstate == _LOCK_NOT_AVAILABLE
            if not is_locked:
                raise
        finally:
            self._flushes_alone = False
            if not is_locked:
                self._finish(entry)
            self._flush_what_is_ready()
        if outcome is None:
            self._wait_for_lock(entry)
            return await entry.answer
        return outcome

    def _flush_what_is_ready(self) -> None:
        if self._flushes_alone or not self._ready:
            return
        if not self._flushers or (
            len(self._flushers) < MAX_FLUSHES and len(self._ready) >= max(LEAST_SHARED, self._in_flight // 2)
        ):
            flusher = self.loop.create_task(self._flush_all())
            self._flushers.add(flusher)
            self._tasks.add(flusher)
            flusher.add_done_callback(self._tasks.discard)

    async def _flush_all(self) -> None:
        async with self._writer.holding() as writer:
            try:
                while batch := self._take_batch():
                    self._in_flight += len(batch)
                    self._flush_what_is_ready()
                    try:
                        await self._flush(batch, writer)
                    finally:
                        self._in_flight -= len(batch)
                    # Those who have just been answered may have more to write: let them join the next batch.
                    await asyncio.sleep(0)
            except BaseException:
                # The loop is shutting down, and nobody would ever answer those who wait.
                for first in self._first.values():
                    for entry in (first, *(first.next or ())):
                        entry.answer.cancel()
                self._first.clear()
                self._ready.clear()
                raise
            finally:
                # It takes nothing more, while it may yet take a moment to give its connection back.
                self._flushers.discard(asyncio.current_task())

    def _take_batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        rows = size = 0
        share = len(self._ready)
        if share + self._in_flight >= 2 * LEAST_SHARED:
            # As many for the other flush, so that they alternate: one that had most of them would keep the client idle.
            share = (share + self._in_flight + 1) // 2
        while self._ready and rows < MAX_BATCH_ROWS and len(batch) < share:
            entry = self._ready[0]
            if entry.answer.done():  # its caller took it back
                self._ready.popleft()
                self._finish(entry)
                continue
            size += _size(entry.write)
            if batch and size > MAX_BATCH_BYTES:
                break
            self._ready.popleft()
            rows += 1 + len(entry.write.steps)
            batch.append(entry)
        return batch

    def _finish(self, entry: _Entry) -> None:
        """Let the saga's next write come up."""
        saga = entry.write.saga_id.int
        if self._first.get(saga) is not entry:
            return  # the queue was abandoned while this was in flight
        if entry.next:
            first = self._first[saga] = entry.next.popleft()
            first.next = entry.next
            self._ready.append(first)
        else:
            del self._first[saga]

    async def _flush(self, batch: list[_Entry], writer: Writer, *, explains: bool = False) -> None:
        """Apply a batch and answer its callers; those whose rows are locked go on waiting apart."""
        try:
            outcomes = await (writer.explain if explains else writer.write_now)([entry.write for entry in batch])
        except Exception as exc:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
            await self._flush_parts(batch, writer, exc, explains=explains)
            return
        left = []
        for entry, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                left.append(entry)
            else:
                _answer(entry, outcome)
                self._finish(entry)
        self._flush_what_is_ready()
        if left and not explains:
            await self._flush(left, writer, explains=True)
        else:
            for entry in left:
                self._wait_for_lock(entry)

    async def _flush_parts(self, batch: list[_Entry], writer: Writer, exc: Exception, *, explains: bool) -> None:
        """Go on after a failure: with those who aren't its reason, if there are any."""
        if isinstance(exc, StorageUnavailableError) and exc.sqlstate == _LOCK_NOT_AVAILABLE:
            parts = [self._without_creations(batch)]
        elif len(batch) > 1 and _is_one_writes_fault(exc):
            middle = len(batch) // 2
            parts = [batch[:middle], batch[middle:]]
        else:
            parts = []
            for entry in batch:
                _fail(entry, _own_error(exc, entry.write))
                self._finish(entry)
            self._flush_what_is_ready()
        for part in parts:
            if part:
                await self._flush(part, writer, explains=explains)

    def _without_creations(self, batch: list[_Entry]) -> list[_Entry]:
        """Return those that find their sagas; the others wait apart, and all of them do if there is no other."""
        others = [entry for entry in batch if not entry.write.creates]
        all_alike = len(others) == len(batch)
        for entry in batch:
            if entry.write.creates or all_alike:
                self._wait_for_lock(entry)
        return [] if all_alike else others

    def _wait_for_lock(self, entry: _Entry) -> None:
        waiter = self.loop.create_task(self._save_when_unlocked(entry))
        self._tasks.add(waiter)
        # Nobody else is in this statement, so a caller that gives up can take it along.
        entry.answer.add_done_callback(lambda answer: waiter.cancel() if answer.cancelled() else None)
        # Not in the task itself: one that is cancelled before it starts never runs a line.
        waiter.add_done_callback(lambda waiter: self._stop_waiting(waiter, entry))

    async def _save_when_unlocked(self, entry: _Entry) -> None:
        try:
            async with self._lock_waiter_slots:
                outcome = await self._writer.write(entry.write)
            _answer(entry, outcome)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the one who waits has to hear of it
            _fail(entry, exc)

    def _stop_waiting(self, waiter: asyncio.Task[None], entry: _Entry) -> None:
        self._tasks.discard(waiter)
        entry.answer.cancel()
        self._finish(entry)
        self._flush_what_is_ready()


def _size(write: Write) -> int:
    size = len(write.context or "")
    for step in write.steps:
        size += len(step.details or "")
    return size


def _answer(entry: _Entry, outcome: Outcome) -> None:
    if not entry.answer.done():
        entry.answer.set_result(outcome)


def _fail(entry: _Entry, exc: Exception) -> None:
    if isinstance(exc, SagaStoreError):
        _answer(entry, exc)
    elif not entry.answer.done():
        entry.answer.set_exception(exc)


def _is_one_writes_fault(exc: Exception) -> bool:
    if isinstance(exc, StorageUnavailableError):
        return exc.sqlstate is not None and not exc.sqlstate.startswith(_NOBODYS_FAULT)
    return isinstance(exc, InvalidSagaDataError)


def _own_error(exc: Exception, write: Write) -> Exception:
    """Return an error for this caller alone: raising adds a traceback and a context to it."""
    if isinstance(exc, UnknownOutcomeError):
        own: Exception = UnknownOutcomeError(write.saga_id)
    else:
        own = copy.copy(exc)
    own.__cause__ = exc.__cause__
    return own
