"""Many callers, one statement: whoever arrives while a flush is under way goes in the next one.

A caller who finds no flush under way flushes at once, alone; nothing waits for a timer. What is queued:

- only with what goes to the same place, by the same key: what belongs to one caller is decided in that caller's task;
- at most one write per saga in a batch, so each saga's writes take effect in the order of the calls;
- batches bounded by rows and bytes;
- a row that another transaction has locked, or is creating, is left out of the batch and tried again now and then,
  so that a forgotten transaction in a psql session stalls its own sagas and no other, on any pool;
- a batch that fails by what may be one write's fault is split until only that write fails;
- a caller that is cancelled while its write is queued takes it back; while it is in flight, the batch goes
  on and the answer is dropped.

Batches are flushed by a task that ends when nobody is left, so there is nothing to start or to close.
"""

import asyncio
import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from saga_store.errors import InvalidSagaDataError, SagaStoreError, StorageUnavailableError, UnknownOutcomeError
from saga_store.sqlalchemy.execution import pauses
from saga_store.sqlalchemy.failures import LOCK_NOT_AVAILABLE
from saga_store.sqlalchemy.observation import Observer, copy_detached_context
from saga_store.write import Outcome, Write

# A batch is closed by the write that reaches either; the bytes are those of contexts and details.
MAX_BATCH_ROWS = 1000
MAX_BATCH_BYTES = 4 * 1024 * 1024
# While the server works on one batch, the client answers and gathers the other: neither waits for its turn.
MAX_FLUSHES = 2
# Statements have a price of their own, so a second one isn't worth its while for fewer.
LEAST_SHARED = 8
# Queues are kept for their keys to come back, until there are many.
_MOST_IDLE_QUEUES = 64
_GONE = object()

# What may be the fault of a single write, so that a batch that fails by it is tried again in halves: data that can't be
# stored, constraints, row-level security and triggers of the application's, what is too big for an index. Whatever else
# goes wrong, such as a timeout, would go wrong for smaller batches alike, and everybody is told at once.
_ONE_WRITES_FAULT = (
    "22",  # data exception
    "23",  # integrity constraint violation
    "27",  # triggered data change violation
    "42501",  # insufficient privilege: also a row that a policy refuses
    "44",  # WITH CHECK OPTION violation
    "54",  # program limit exceeded
    "P0",  # raised by a function
)
# By the SQL standard, classes that begin with one of these are nobody's but the implementation's; PostgreSQL has a few,
# the others are for an application to raise.
_APPLICATIONS_CLASSES = "56789IJKLMNOPQRSTUVWXYZ"
_POSTGRESQLS_CLASSES = ("53", "55", "57", "58", "72", "XX")


class Target(Protocol):
    """Where a write goes."""

    @property
    def key(self) -> Hashable:
        """Equal for those whose writes may share a statement."""

    def neutral(self) -> Self:
        """Return the same for a statement of several callers, which sees the context of none."""


T = TypeVar("T", bound=Target)


class Patience(Protocol):
    """How long may be waited for a lock."""

    def is_over(self) -> bool: ...

    def error(self) -> StorageUnavailableError: ...


class Writer(Protocol):
    """Applies writes to different sagas, each atomically, and says what came of it."""

    async def write_now(self, writes: Sequence[Write], /) -> Sequence[Outcome | None]:
        """Answer None for a write that wasn't applied, for whatever reason.

        Nobody is waited for: it fails with SQLSTATE 55P03 if another transaction is creating a saga that one of them
        creates.
        """

    async def explain(self, writes: Sequence[Write], /) -> Sequence[Outcome | None]:
        """Likewise, but answer None only for a write whose row is locked."""

    async def patience(self) -> Patience:
        """Return how long may be waited for a lock, from now on."""

    def holding(self) -> AbstractAsyncContextManager["Writer"]:
        """Return the same for calls that follow each other closely; it may keep its connection meanwhile."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A write that waits or is in flight, and behind it the next ones to the same saga, in the order of the calls."""

    write: Write
    answer: asyncio.Future[Outcome]
    next: "deque[_Entry] | None" = None
    since: float = 0.0
    """Since when it is queued; only kept for an observer."""
    has_waited: bool = False
    patience: Patience | None = None


class GroupCommit(Generic[T]):
    """Gathers writes into batches, each of writes that go to the same place.

    It belongs to the event loop that uses it first, until that loop is closed, as SQLAlchemy's engines do.

    Args:
        make_writer: Returns what writes at a target.
        group_by: Tells further what may share a batch; called in the caller's context.
        observer: Is told what is flushed, and what waits.
    """

    def __init__(
        self,
        make_writer: Callable[[T], Writer],
        group_by: Callable[[], Hashable] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._make_writer = make_writer
        self._group_by = group_by
        self._observer = observer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[Hashable, _Queue] = {}
        self._changing_loops = threading.Lock()

    def write(self, write: Write, target: T) -> Awaitable[Outcome]:
        """Queue a write; whose it is, and where it goes, is decided here and now, in its caller's context."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._change_loop(loop)
        key: Hashable = target.key
        if self._group_by is not None:
            key = (key, self._group_by())
        try:
            queue = self._queues.get(key)
        except TypeError as exc:
            raise TypeError(f"group_by has to return what can be the key of a dict, such as a str: {exc}") from exc
        if queue is None:
            queue = self._add_queue(key, loop, target)
        return queue.write(write)

    def _add_queue(self, key: Hashable, loop: asyncio.AbstractEventLoop, target: T) -> "_Queue":
        if len(self._queues) >= _MOST_IDLE_QUEUES:
            self._queues = {key: queue for key, queue in self._queues.items() if not queue.is_idle()}
        if self._group_by is None:
            # Whoever happens to flush isn't to lend the others their context.
            queue = _Queue(loop, self._make_writer(target.neutral()), Context, self._observer)
        else:
            queue = _Queue(
                loop, self._make_writer(target), lambda: copy_detached_context(self._observer), self._observer
            )
        self._queues[key] = queue
        return queue

    def _change_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._changing_loops:
            if self._loop is not None and not self._loop.is_closed():
                raise StorageUnavailableError(
                    "this storage is in use in another event loop, and an engine can't be shared between loops; "
                    "make an engine and a storage for each"
                )
            self._loop, self._queues = loop, {}


class _Queue:
    """The writes to one place.

    Args:
        loop: Where its tasks run.
        writer: Writes there.
        make_context: Returns the context of a task; called in that of whoever gives rise to it.
        observer: Is told what is flushed, and what waits.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        writer: Writer,
        make_context: Callable[[], Context],
        observer: Observer | None,
    ) -> None:
        self._loop = loop
        self._writer = writer
        self._make_context = make_context
        self._observer = observer
        # The first write of each saga that has any: in flight, or ready to be. Sagas go by the integers of their ids,
        # which are hashed several times faster than the ids.
        self._first: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        # What another transaction has locked: tried again now and then.
        self._locked: dict[_Entry, None] = {}
        self._sleep: asyncio.Future[bool] | None = None
        self._tries_locked = False
        # Those who take batches; and all tasks, since the event loop itself keeps none alive.
        self._flushers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._flushes_alone = False

    def is_idle(self) -> bool:
        return not (self._first or self._tasks or self._flushes_alone)

    def write(self, write: Write) -> Awaitable[Outcome]:
        entry = _Entry(write, self._loop.create_future())
        if self._observer is not None:
            entry.since = time.monotonic()
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
        if self._observer is not None:
            self._observer.flushed((entry.write,), ())
        outcome: Outcome | None = None
        is_locked = False
        try:
            [outcome] = await self._writer.write_now((entry.write,))
            if outcome is None:
                [outcome] = await self._writer.explain((entry.write,))
            is_locked = outcome is None
        except StorageUnavailableError as exc:
            is_locked = exc.sqlstate == LOCK_NOT_AVAILABLE
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
            self._flushers < MAX_FLUSHES and len(self._ready) >= max(LEAST_SHARED, self._in_flight // 2)
        ):
            self._flushers += 1
            self._start(self._flush_all())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # Not by the loop's own factory: that of an application may begin it at once, in this very call, or not know
        # of contexts.
        task = asyncio.Task(work, loop=self._loop, context=self._make_context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _flush_all(self) -> None:
        async with self._writer.holding() as writer:
            try:
                while batch := self._take_batch(self._ready, self._share()):
                    self._in_flight += len(batch)
                    if self._observer is not None:
                        now = time.monotonic()
                        self._observer.flushed([entry.write for entry in batch], [now - entry.since for entry in batch])
                    self._flush_what_is_ready()
                    try:
                        await self._flush(batch, writer)
                    finally:
                        self._in_flight -= len(batch)
                    # Those who have just been answered may have more to write: let them join the next batch.
                    await asyncio.sleep(0)
            except BaseException:
                self._abandon()
                raise
            finally:
                # It takes nothing more, while it may yet take a moment to give its connection back.
                self._flushers -= 1

    def _share(self) -> int:
        share = len(self._ready)
        if share + self._in_flight >= 2 * LEAST_SHARED:
            # As many for the other flush, so that they alternate: one that had most of them would keep the client idle.
            share = (share + self._in_flight + 1) // 2
        return share

    def _take_batch(self, entries: deque[_Entry], most: int) -> list[_Entry]:
        batch: list[_Entry] = []
        rows = size = 0
        while entries and rows < MAX_BATCH_ROWS and len(batch) < most:
            entry = entries[0]
            if entry.answer.done():  # its caller took it back
                entries.popleft()
                self._finish(entry)
                continue
            size += _size(entry.write)
            if batch and size > MAX_BATCH_BYTES:
                break
            entries.popleft()
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
        if isinstance(exc, StorageUnavailableError) and exc.sqlstate == LOCK_NOT_AVAILABLE:
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
        """Put a write aside whose row another transaction has locked, or whose saga one is creating."""
        if entry.patience and entry.patience.is_over():
            _answer(entry, entry.patience.error())
        if entry.answer.done():
            self._finish(entry)
            return
        self._locked[entry] = None
        if not entry.has_waited:
            entry.has_waited = True
            if self._observer is not None:
                self._tell_lock(self._observer, entry)
            entry.answer.add_done_callback(lambda _: self._give_up(entry))
            if self._sleep and not self._sleep.done():
                self._sleep.set_result(True)  # most locks are short
        if not self._tries_locked:
            self._tries_locked = True
            self._start(self._try_locked())

    @staticmethod
    def _tell_lock(observer: Observer, entry: _Entry) -> None:
        began = time.monotonic()
        entry.answer.add_done_callback(lambda _: observer.waited_for_lock(time.monotonic() - began))

    def _give_up(self, entry: _Entry) -> None:
        if self._locked.pop(entry, _GONE) is not _GONE:
            self._finish(entry)
            self._flush_what_is_ready()

    async def _try_locked(self) -> None:
        """Try what was put aside, all of it at once, until nothing is left; no connection is held in between."""
        lock_pauses = pauses()
        try:
            while self._locked:
                if await self._is_woken_within(next(lock_pauses)):
                    lock_pauses = pauses()
                entries = deque(self._locked)
                self._locked.clear()
                await self._lend_patience([entry for entry in entries if entry.patience is None])
                # A statement that creates a saga fails as a whole if another transaction is creating that.
                for entry in [entry for entry in entries if entry.write.creates]:
                    entries.remove(entry)
                    await self._flush([entry], self._writer, explains=True)
                while entries:
                    await self._flush(self._take_batch(entries, len(entries)), self._writer, explains=True)
        except BaseException:
            self._abandon()
            raise
        finally:
            self._tries_locked = False

    async def _lend_patience(self, entries: list[_Entry]) -> None:
        """Have no write wait for longer than the settings of its connection would let it."""
        if entries:
            with contextlib.suppress(SagaStoreError):  # whatever it is, the next statement says it, too
                patience = await self._writer.patience()
                for entry in entries:
                    entry.patience = patience

    async def _is_woken_within(self, seconds: float) -> bool:
        """Sleep for so long, unless there is a newcomer."""
        self._sleep = self._loop.create_future()
        waking = self._loop.call_later(seconds, _wake, self._sleep)
        try:
            return await self._sleep
        finally:
            waking.cancel()

    def _abandon(self) -> None:
        """Answer all who wait, when the loop is shutting down and nobody else ever would."""
        for first in self._first.values():
            for entry in (first, *(first.next or ())):
                entry.answer.cancel()
        self._first.clear()
        self._ready.clear()
        self._locked.clear()


def _wake(sleep: asyncio.Future[bool]) -> None:
    if not sleep.done():
        sleep.set_result(False)


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
        code = exc.sqlstate or ""
        return code.startswith(_ONE_WRITES_FAULT) or (
            code[:1] in _APPLICATIONS_CLASSES and not code.startswith(_POSTGRESQLS_CLASSES) if code else False
        )
    return isinstance(exc, InvalidSagaDataError)


def _own_error(exc: Exception, write: Write) -> Exception:
    """Return an error for this caller alone: raising adds a traceback and a context to it."""
    if isinstance(exc, UnknownOutcomeError):
        own: Exception = UnknownOutcomeError(write.saga_id)
    else:
        own = copy.copy(exc)
    own.__cause__ = exc.__cause__
    return own
