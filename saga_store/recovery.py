"""A worker that recovers interrupted sagas; policy only: claims, leases and pauses are the storage's."""

import asyncio
import logging
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeAlias
from uuid import uuid4

from saga_store.errors import SagaConcurrencyError, SagaLeasedError, SagaStoreError
from saga_store.model import SagaExecution
from saga_store.run import SagaRun
from saga_store.storage import SagaStorage

_logger = logging.getLogger("saga_store.recovery")

Handler: TypeAlias = Callable[[SagaRun], Awaitable[None]]
"""Sees one saga through: reads from the run how far it got, does what is left, and commits that it is finished."""


class RecoveryWorker:
    """Claims interrupted sagas and hands each to the handler of its name, in a run that holds its lease.

    - What a handler raises is logged, and the saga is claimed again after a pause that grows with each
      attempt, ``max_attempts`` times in all. The other sagas don't notice.
    - The lease is renewed in the background for as long as the handler works, and by its commits. A handler
      that hangs keeps its saga, so give what it waits for a timeout.
    - Several workers may run, in one process or in many: each saga goes to one of them.
    - Every line that it logs, to ``saga_store.recovery``, has ``owner``, ``saga_id``, ``saga_name``, ``attempt``
      and ``outcome`` (recovered, failed, lost, released) as attributes; what concerns no saga has ``owner`` alone.

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
        self.owner = owner or f"{socket.gethostname()[:200]}:{os.getpid()}:{uuid4().hex[:8]}"
        self._storage = storage
        self._handlers = dict(handlers)
        self._lease = lease
        self._stale_after = stale_after
        self._concurrency = concurrency
        self._poll_every = poll_every.total_seconds()
        self._grace = grace.total_seconds()
        self._max_attempts = max_attempts
        self._backoff = backoff
        self._max_backoff = max_backoff
        self._write_ahead = write_ahead
        self._at_work: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Recover sagas until ``stop()`` is called, or the task is cancelled."""
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not stopping.done():
                room = self._concurrency - len(self._at_work)
                started = await self._start(room) if room else 0
                # With no room left the next look is when some saga is done; with room, after a pause.
                pause = None if started == room else self._poll_every * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
                waited_for = {stopping, *self._at_work} if pause is None else {stopping}
                await asyncio.wait(waited_for, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if self._at_work:
                await asyncio.wait(self._at_work, timeout=self._grace)
        finally:
            stopping.cancel()
            await self._release_all()

    def stop(self) -> None:
        """Claim nothing more; ``run()`` returns when the sagas at work are finished or, after ``grace``, released."""
        self._stopping.set()

    async def poll(self) -> int:
        """Claim once, work on what was claimed until it is done, and return how many sagas that were.

        For a cron job, or a test; at most ``concurrency`` sagas.
        """
        try:
            started = await self._start(self._concurrency - len(self._at_work))
            if self._at_work:
                await asyncio.wait(self._at_work)
            return started
        finally:
            await self._release_all()

    async def _start(self, room: int) -> int:
        """Claim up to so many sagas and begin to work on them; which name comes first is left to chance."""
        started = 0
        for name in random.sample(sorted(self._handlers), len(self._handlers)):
            if started == room:
                break
            try:
                claimed = await self._storage.claim_sagas(
                    owner=self.owner,
                    lease=self._lease,
                    limit=room - started,
                    stale_after=self._stale_after,
                    name=name,
                    max_attempts=self._max_attempts,
                    backoff=self._backoff,
                    max_backoff=self._max_backoff,
                )
            except SagaStoreError as exc:
                _logger.warning("couldn't claim sagas, will try again: %s", exc, extra={"owner": self.owner})
                break
            for saga in claimed:
                task = asyncio.create_task(self._recover(saga))
                self._at_work.add(task)
                task.add_done_callback(self._at_work.discard)
            started += len(claimed)
        return started

    async def _recover(self, saga: SagaExecution) -> None:
        try:
            async with self._storage.run(
                saga.id, owner=self.owner, lease=self._lease, renew=True, write_ahead=self._write_ahead
            ) as run:
                await self._handlers[saga.name](run)
        except asyncio.CancelledError:
            self._log(logging.INFO, saga, "released")
            raise
        except (SagaLeasedError, SagaConcurrencyError) as exc:
            self._log(logging.WARNING, saga, "lost", exc)
        except Exception as exc:  # noqa: BLE001 - one failing saga never stops the others
            self._log(logging.ERROR, saga, "failed", exc)
        else:
            self._log(logging.INFO, saga, "recovered")

    def _log(self, level: int, saga: SagaExecution, outcome: str, error: Exception | None = None) -> None:
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
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)


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
