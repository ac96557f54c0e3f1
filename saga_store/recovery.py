"""A worker that recovers interrupted sagas; policy only: claims, leases and pauses are the storage's."""

import asyncio
import dis
import inspect
import logging
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import CodeType, TracebackType
from typing import Self, TypeAlias
from uuid import UUID, uuid4

from saga_store.cancellation import is_being_cancelled, see_through
from saga_store.errors import (
    InvalidSagaDataError,
    SagaConcurrencyError,
    SagaLeasedError,
    StorageUnavailableError,
    UnknownOutcomeError,
)
from saga_store.model import UNFINISHED, SagaExecution
from saga_store.remedies import show
from saga_store.run import SagaRun
from saga_store.storage import SagaStorage
from saga_store.validation import valid_count, valid_name, valid_period

_logger = logging.getLogger("saga_store.recovery")

Handler: TypeAlias = Callable[[SagaRun], Awaitable[None]]
"""Sees one saga through: reads from the run how far it got, does what is left, and commits that it is finished."""

_ANOTHER = "make another RecoveryWorker, one for each event loop and each lifespan of an application"

# Whoever takes a saga may have somebody waiting for an answer.
_MOST_SECONDS_FOR_A_CLAIM = 1.0
# Longer than a run takes to be left.
_MOST_SECONDS_TO_RELEASE = 15.0


@dataclass(slots=True, eq=False)
class _Attempt:
    """One saga, and the run in which it is worked on; ``task`` does the work."""

    saga: SagaExecution
    run: SagaRun
    was_claimed: bool
    task: "asyncio.Task[None] | None" = None
    has_begun: bool = False
    is_lost: bool = False
    is_released: bool = False

    @property
    def is_at_work(self) -> bool:
        return self.task is not None and not self.task.done() and not self.task.get_loop().is_closed()

    def make_its_own(self, claimed: SagaExecution) -> bool:
        """Go on under a claim by the same owner, if the lease was taken after it, or is yet to be taken."""
        fence = self.run._fence  # noqa: SLF001 - the worker's part of a run
        has_overtaken = fence is None or fence > claimed.version
        if not (self.is_at_work and has_overtaken) or self.is_lost or self.is_released:
            return False
        self.saga, self.was_claimed = claimed, True
        return True

    def lose(self) -> None:
        """End it: somebody else has got the lease."""
        self.is_lost = True
        if self.task:
            self.task.cancel()

    def release(self) -> None:
        """End it, and let it not count."""
        self.is_released = True
        if self.was_claimed:
            self.run._attempts_on_release = self.saga.recovery_attempts - 1  # noqa: SLF001 - the worker's part of a run
        if self.task and self.has_begun:  # otherwise it would never come to give anything back
            self.task.cancel()

    def lose_elsewhere(self) -> bool:
        """Have it end in its own loop, which may be another thread's; whether it is still at work."""
        if self.task is None or not self.is_at_work:
            return False
        with suppress(RuntimeError):  # the loop was closed just now
            self.task.get_loop().call_soon_threadsafe(self.lose)
            return True
        return False


# All that the workers of this process are at.
_all_at_work: dict[UUID, _Attempt] = {}


class RecoveryWorker:
    """Claims interrupted sagas and hands each to the handler of its name, in a run that holds its lease.

    - What a handler raises is logged, and the saga is claimed again after a pause that grows with each
      attempt, ``max_attempts`` times in all. The other sagas don't notice. So it is if a handler returns and its saga
      isn't finished. Whatever the storage raises is logged, and tried again.
    - The lease is renewed in the background for as long as the handler works, and by its commits. A handler
      that hangs keeps its saga, so give what it waits for a timeout. One whose lease was lost or broken is cancelled
      at the next renewal.
    - Several workers may run, in one process or in many: each saga goes to one of them. A process never works on one
      saga twice: if a lease lapsed and the saga was claimed again, the handler that has it is cancelled, and the claim
      is given back.
    - In ``async with`` it works in the background, as ``run()`` does; leaving stops it, and waits until it has ended.
    - A worker runs once: make one for each event loop, and in the lifespan of an application rather than at import.
    - ``stop()`` gives the attempts back that it cuts short: they don't count.
    - Every line that it logs, to ``saga_store.recovery``, has ``owner``, ``saga_id``, ``saga_name``, ``attempt``
      and ``outcome`` (recovered, unfinished, failed, lost, released) as attributes; what concerns no saga has ``owner``
      alone.

    Args:
        storage: Where the sagas are; it has to commit its own calls.
        handlers: What to do with a saga, by its name. Sagas of other names are left alone.
        owner: The name on the leases, which no other live worker may have; by default host, process and a
            random part.
        lease: How long a saga stays leased after its worker died.
        stale_after: How long a saga has to be unchanged before it counts as interrupted; longer than any step
            takes that runs without a lease.
        concurrency: How many sagas are worked on at a time.
        poll_every: The mean pause between two looks that find too little to do.
        grace: How long ``stop()`` lets handlers finish, before it cancels them and releases their leases.
        max_attempts: See ``claim_sagas``, as for the next two.
        backoff: The pause after the first attempt.
        max_backoff: The longest pause.
        write_ahead: Write that a step has STARTED before it acts; see ``SagaRun``.

    Raises:
        InvalidSagaDataError: A setting is of a wrong type, or negative, or such that nothing would ever be recovered;
            a handler is nothing that can be awaited; the storage joins a caller's transaction. It names the argument.
    """

    def __init__(  # noqa: PLR0913 - a worker's settings, all with defaults
        self,
        storage: SagaStorage,
        handlers: Mapping[str, Handler],
        *,
        owner: str | None = None,
        lease: timedelta = timedelta(seconds=30),
        stale_after: timedelta = timedelta(minutes=1),
        concurrency: int = 10,
        poll_every: timedelta = timedelta(seconds=5),
        grace: timedelta = timedelta(seconds=20),
        max_attempts: int = 5,
        backoff: timedelta = timedelta(seconds=10),
        max_backoff: timedelta = timedelta(hours=1),
        write_ahead: bool = True,
    ) -> None:
        self._storage = _valid_storage(storage)
        self._handlers = _valid_handlers(handlers)
        self.owner: str = (
            f"{socket.gethostname()[:200]}:{os.getpid()}:{uuid4().hex[:8]}"
            if owner is None
            else valid_name("owner", owner)
        )
        self._lease = valid_period("lease", lease)
        if not lease:
            raise InvalidSagaDataError(
                "lease", "must be longer than nothing, or it has expired when it is taken; give it some minutes"
            )
        self._stale_after = valid_period("stale_after", stale_after)
        self._concurrency = valid_count("concurrency", concurrency, least=1)
        self._poll_every = valid_period("poll_every", poll_every).total_seconds()
        self._grace = valid_period("grace", grace).total_seconds()
        self._max_attempts = valid_count("max_attempts", max_attempts, least=1)
        self._backoff = valid_period("backoff", backoff)
        self._max_backoff = valid_period("max_backoff", max_backoff)
        self._write_ahead = write_ahead
        self._at_work: dict[asyncio.Task[None], _Attempt] = {}
        # Whoever takes a saga waits for the answer of a claim: there may be no room after it.
        self._turn = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._has_begun = False
        self._has_ended = False

    async def __aenter__(self) -> Self:
        self._begin_to_run()
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._running:
            await self._running

    async def run(self) -> None:
        """Recover sagas until ``stop()`` is called, or the task is cancelled.

        Raises:
            InvalidSagaDataError: The worker runs already, or has run before.
        """
        self._begin_to_run()
        await self._run()

    def _begin_to_run(self) -> None:
        if self._has_begun:
            raise InvalidSagaDataError("worker", f"has run before, or runs now; {_ANOTHER}")
        self._has_begun = True

    async def _run(self) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                room = self._room
                started = await self._start(room)
                # With no room left the next look is when some saga is done; with room, after a pause.
                is_full = started >= room or not self._room
                pause = None if is_full else self._poll_every * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
                waited_for = {stopping, *self._at_work} if pause is None else {stopping}
                await asyncio.wait(waited_for, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if self._at_work:
                await asyncio.wait(self._at_work, timeout=self._grace)
        finally:
            self._has_ended = True
            self._stopping.set()
            stopping.cancel()
            await self._release_all()

    def stop(self) -> None:
        """Claim nothing more; ``run()`` returns when the sagas at work are finished or, after ``grace``, released.

        That is for good: a worker that was stopped, or whose ``run()`` was cancelled, isn't begun again.
        """
        self._stopping.set()

    async def take(self, saga_id: UUID) -> bool:
        """Begin to work on a saga at once, such as one that has just been created, while the worker runs.

        It is worked on in the background as if it had been claimed, but no attempt is counted: its lease is held, its
        outcome logged, and ``stop()`` waits for it. So a service needs no tasks of its own for what it begins.

        Returns:
            Whether this began. False if ``concurrency`` sagas are at work, or may be, for a claim hasn't been answered
            within a second; if this process works on that one already, somebody else holds its lease, it is finished,
            or ``stop()`` was called. Unfinished, it waits until a worker claims it. Who takes the lease in the same
            moment may still be first; then it is logged as lost.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID, or there is no handler for the saga's name.
        """
        saga = await self._storage.get_saga(saga_id)
        if saga.name not in self._handlers:
            raise InvalidSagaDataError(
                "saga_id",
                f"must be of a saga that there is a handler for: {', '.join(self._handlers)}, not {saga.name!r}",
            )
        if saga.lease_owner not in (None, self.owner) and await self._storage._is_held(  # noqa: SLF001 - by its own clock
            saga_id, saga.lease_owner, saga.version
        ):
            return False
        try:
            async with asyncio.timeout(_MOST_SECONDS_FOR_A_CLAIM):
                await self._turn.acquire()
        except TimeoutError:
            return False
        try:
            other = _all_at_work.get(saga_id)
            is_at_work = other is not None and other.is_at_work
            if is_at_work or not self._room or self._stopping.is_set() or saga.status not in UNFINISHED:
                return False
            self._begin(saga, was_claimed=False)
            return True
        finally:
            self._turn.release()

    async def poll(self) -> int:
        """Claim once, work on what was claimed until it is done, and return how many sagas that were.

        For a cron job, or a test; at most ``concurrency`` sagas, and none once ``stop()`` was called.

        Raises:
            InvalidSagaDataError: The worker's ``run()`` has ended.
        """
        if self._has_ended:
            raise InvalidSagaDataError("worker", f"has ended; {_ANOTHER}")
        try:
            started = await self._start(self._room)
            if self._at_work:
                await asyncio.wait(self._at_work)
            return started
        finally:
            await self._release_all()

    @property
    def _room(self) -> int:
        return self._concurrency - len(self._at_work)

    async def _start(self, room: int) -> int:
        """Claim up to so many sagas and begin to work on them; which name comes first is left to chance."""
        started = 0
        for name in random.sample(sorted(self._handlers), len(self._handlers)):
            if started >= room:  # before anybody else has the turn, while what was begun is still at work
                break
            async with self._turn:
                limit = min(room - started, self._room)  # others may have been taken meanwhile
                if limit <= 0 or self._stopping.is_set():
                    break
                try:
                    claimed = await self._claim(name, limit)
                except (Exception, asyncio.CancelledError) as exc:  # whatever it is, the worker goes on
                    if isinstance(exc, asyncio.CancelledError) and is_being_cancelled():
                        raise
                    said = str(exc) or repr(exc)
                    _logger.warning("couldn't claim sagas, will try again: %s", said, extra={"owner": self.owner})
                    if isinstance(exc, StorageUnavailableError | UnknownOutcomeError):
                        break  # other names would fare no better
                    continue
                for saga in claimed:
                    self._begin(saga, was_claimed=True)
            started += len(claimed)
        return started

    async def _claim(self, name: str, limit: int) -> list[SagaExecution]:
        return await self._storage.claim_sagas(
            owner=self.owner,
            lease=self._lease,
            limit=limit,
            stale_after=self._stale_after,
            name=name,
            max_attempts=self._max_attempts,
            backoff=self._backoff,
            max_backoff=self._max_backoff,
        )

    def _begin(self, saga: SagaExecution, *, was_claimed: bool) -> None:
        other = _all_at_work.get(saga.id)
        if other and other.task in self._at_work and other.make_its_own(saga):
            return
        run = self._storage.run(saga.id, owner=self.owner, lease=self._lease, renew=True, write_ahead=self._write_ahead)
        attempt = _Attempt(saga, run, was_claimed)
        run._on_lost = attempt.lose  # noqa: SLF001 - the worker's part of a run
        if other and other.lose_elsewhere():
            attempt.release()
        else:
            _all_at_work[saga.id] = attempt
        task = attempt.task = asyncio.create_task(self._recover(attempt))
        self._at_work[task] = attempt
        task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        attempt = self._at_work.pop(task)
        if _all_at_work.get(attempt.saga.id) is attempt:
            del _all_at_work[attempt.saga.id]

    async def _recover(self, attempt: _Attempt) -> None:
        attempt.has_begun = True
        level, outcome = logging.INFO, "released"
        error: BaseException | None = None
        is_finished = False
        try:
            async with attempt.run:
                if not attempt.is_released:
                    await self._handle(attempt)
                    is_finished = not attempt.run._holds  # noqa: SLF001 - what finishes a saga ends its lease
            if is_finished or not (attempt.is_lost or attempt.is_released):
                is_finished = is_finished or await self._is_finished(attempt.saga)
                level, outcome = (logging.INFO, "recovered") if is_finished else (logging.WARNING, "unfinished")
            elif attempt.is_lost:
                level, outcome = logging.WARNING, "lost"
        except asyncio.CancelledError as exc:
            if attempt.is_lost:
                level, outcome = logging.WARNING, "lost"
            elif not attempt.is_released and not is_being_cancelled():
                level, outcome, error = logging.ERROR, "failed", exc  # of its own making
            elif not attempt.is_released:
                self._log(level, attempt.saga, outcome)
                raise
        except Exception as exc:  # noqa: BLE001 - one failing saga never stops the others
            lost = attempt.is_lost or _tells_of_loss(exc, attempt.saga.id)
            level, outcome = (logging.WARNING, "lost") if lost else (logging.ERROR, "failed")
            error = exc
        self._log(level, attempt.saga, outcome, error)

    async def _handle(self, attempt: _Attempt) -> None:
        work = self._handlers[attempt.saga.name](attempt.run)
        if not inspect.isawaitable(work):
            raise TypeError(
                f"the handler of {attempt.saga.name!r} returned {work!r}, which can't be awaited; "
                "make it an `async def`"
            )
        await work

    async def _is_finished(self, saga: SagaExecution) -> bool:
        return (await self._storage.get_saga(saga.id)).status not in UNFINISHED

    def _log(self, level: int, saga: SagaExecution, outcome: str, error: BaseException | None = None) -> None:
        facts = {
            "owner": self.owner,
            "saga_id": saga.id,
            "saga_name": saga.name,
            "attempt": saga.recovery_attempts,
            "outcome": outcome,
        }
        line = " ".join(f"{fact}={value}" for fact, value in facts.items())
        _logger.log(level, "%s", line, extra=facts, exc_info=error)

    async def _release_all(self) -> None:
        for attempt in tuple(self._at_work.values()):
            attempt.release()
        if self._at_work:
            await see_through(_all_done(tuple(self._at_work)), _MOST_SECONDS_TO_RELEASE)


async def _all_done(tasks: "Sequence[asyncio.Task[None]]") -> None:
    await asyncio.wait(tasks)


def _tells_of_loss(error: BaseException | None, saga_id: UUID) -> bool:
    """Whether an error, a cause of it, or one in a group of them, says that somebody else has got the saga."""
    if isinstance(error, BaseExceptionGroup):
        return any(_tells_of_loss(inner, saga_id) for inner in error.exceptions)
    if isinstance(error, SagaLeasedError | SagaConcurrencyError):
        return error.saga_id == saga_id
    return error is not None and _tells_of_loss(error.__cause__, saga_id)


def _valid_storage(storage: SagaStorage) -> SagaStorage:
    missing = [method for method in ("claim_sagas", "get_saga", "run") if not callable(getattr(storage, method, None))]
    if missing:
        raise InvalidSagaDataError(
            "storage",
            f"must have leased runs and claims, as every SagaStorage has; {show(storage)} hasn't; make a "
            "SqlAlchemySagaStorage of an engine",
        )
    if getattr(storage, "_joins", False):
        raise InvalidSagaDataError(
            "storage", "must commit its own calls, or nobody sees a claim in time; bind it to an engine or sessionmaker"
        )
    return storage


def _valid_handlers(handlers: Mapping[str, Handler]) -> dict[str, Handler]:
    if not isinstance(handlers, Mapping):
        raise InvalidSagaDataError(
            "handlers",
            f"must be a mapping of names to coroutine functions, not {show(handlers)}; give {{name: handler}}",
        )
    if not handlers:
        raise InvalidSagaDataError(
            "handlers", "must not be empty, or no saga would ever be claimed; give {name: handler}"
        )
    for name, handler in handlers.items():
        valid_name("handlers", name)
        if not _may_be_awaited(handler):
            raise InvalidSagaDataError(
                "handlers", f"must be coroutine functions, and {handler!r}, for {name!r}, isn't; make it an `async def`"
            )
    return dict(handlers)


def _may_be_awaited(handler: object) -> bool:
    """Whether what the handler returns may be something to await; of some it is plain that it never is."""
    if not callable(handler) or isinstance(handler, type) or inspect.isbuiltin(handler):
        return False
    function = getattr(handler, "func", handler)
    if not inspect.isroutine(function):
        function = type(function).__call__
    if inspect.iscoroutinefunction(function):
        return True
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return False
    code = getattr(function, "__code__", None)
    return not isinstance(code, CodeType) or _returns_something(code)


def _returns_something(code: CodeType) -> bool:
    """Whether a function may return anything but a constant, such as the None of one that has no `return`."""
    previous = None
    for instruction in dis.get_instructions(code):
        if (
            instruction.opname == "RETURN_VALUE"
            and previous is not None
            and not previous.opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT", "LOAD_COMMON_CONSTANT"))
        ):
            return True
        previous = instruction
    return False


async def run_until_signalled(
    worker: RecoveryWorker, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
) -> None:
    """Run the worker until the process gets one of the signals, then stop it gracefully; for a script's main()."""
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, worker.stop)
    try:
        await worker.run()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
