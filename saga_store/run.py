"""A unit of work on one saga: buffered in memory, written as one checkpoint, fenced by the version seen."""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self
from uuid import UUID

from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaNotFoundError,
    SagaStoreError,
)
from saga_store.interface import ISagaStorage
from saga_store.model import (
    UNFINISHED,
    Context,
    LogStep,
    SagaExecution,
    SagaLogEntry,
    SagaStatus,
    SagaStepStatus,
    StepAction,
)
from saga_store.validation import (
    decode_context,
    encode_context,
    valid_id,
    valid_name,
    valid_status,
    valid_step,
    valid_version,
)
from saga_store.write import Lease, Write

_logger = logging.getLogger("saga_store")

_LEAST_PAUSE_SECONDS = 0.01


class _Store(Protocol):
    """What a run needs of its storage."""

    async def get_saga(self, saga_id: UUID) -> SagaExecution: ...

    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]: ...

    def _check_size(self, context: str) -> None: ...

    async def _write(self, write: Write) -> int: ...

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool: ...


@dataclass(slots=True)
class _Seen:
    """The saga as the run last read or wrote it."""

    version: int
    status: SagaStatus
    context: str


@dataclass(slots=True)
class _Buffered:
    """What the run has yet to write."""

    name: str | None = None
    status: SagaStatus | None = None
    context: str | None = None
    steps: list[LogStep] = field(default_factory=list)
    logged_at: list[float] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.name or self.status or self.context or self.steps)


class SagaRun(ISagaStorage):
    """The six methods for one saga, buffered until ``commit()`` writes them as one checkpoint.

    Made by ``storage.run(saga_id)``, to be used in ``async with``, by one task. Between two commits nothing is
    held: no connection, no transaction, no lock. Instead the run remembers the version of the saga that it
    read first, and its writes are refused if somebody else has changed the saga since.

    - Reads see the run's own buffered writes. A buffered log entry has a provisional id and time, the final
      ones are given when it is written; its time will be the one at which it was logged.
    - A write to a missing saga, a second create and bad input are refused at the call, not at the commit.
    - Leaving the run, normally or by an exception, drops what isn't committed, as a SQLAlchemy session
      does. Leaving it normally with something uncommitted also logs a warning, to the logger ``saga_store``.
    - With a storage that is bound to a session or connection, ``commit()`` writes into the caller's
      transaction, which remains the caller's to commit.

    With a lease, the run takes it on entering, and is the only one until the lease ends:

    - Entering raises SagaLeasedError if somebody else holds it. One that has expired, or is held by the same
      owner, is taken over. A saga that isn't there yet gets its lease with its creation.
    - Each commit renews it, in the same statement; ``heartbeat()`` does it for a step that takes long.
    - Leaving releases it, as does a commit that makes the saga COMPLETED or FAILED.
    - Once somebody else has got it, every write of this run raises SagaConcurrencyError, also after
      ``rollback()``, and nothing is written.

    A method that is given another saga's id raises InvalidSagaDataError.

    Args:
        storage: Where the run reads and writes.
        saga_id: The saga that it is a run of.
        write_ahead: Commit at once when a step is logged as STARTED, so that a crash inside the step leaves
            a trace; it costs one more statement for each step.
        lease: Whose lease to take, and for how long.
        renew: Renew the lease in the background, three times while it lasts, until the run is left. Only for
            a storage that commits its own writes. A step that hangs then keeps its saga for ever.
    """

    def __init__(
        self,
        storage: _Store,
        saga_id: UUID,
        *,
        write_ahead: bool = False,
        lease: Lease | None = None,
        renew: bool = False,
    ) -> None:
        self._storage = storage
        self._saga_id = saga_id
        self._write_ahead = write_ahead
        self._seen: _Seen | None = None
        self._buffered = _Buffered()
        self._lease = lease
        self._renew = renew
        # The version that this run wrote last while it held the lease, and whether it still does, as far as it knows.
        self._fence: int | None = None
        self._holds = False
        self._renewal: asyncio.Task[None] | None = None
        # A heartbeat that overtakes a commit, or is overtaken, would expect the wrong version.
        self._writing = asyncio.Lock()

    @property
    def saga_id(self) -> UUID:
        """The saga that this is a run of."""
        return self._saga_id

    @property
    def version(self) -> int | None:
        """The version that fences the next commit; None if the run has neither read nor created the saga."""
        return self._seen.version if self._seen else self._fence

    async def __aenter__(self) -> Self:
        if self._lease:
            with suppress(SagaNotFoundError):  # it may be about to be created
                await self._take(self._lease)
            if self._renew:
                self._renewal = asyncio.create_task(self._keep_renewing(self._lease))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._buffered and kind is None:
            _logger.warning(
                "the run of saga %s was left with writes that weren't committed, and they are dropped; "
                "call commit() before leaving it",
                self._saga_id,
            )
        await self.rollback()
        try:
            await self._stop_renewing()
        finally:
            await self._release()

    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        """Buffer the creation of the saga.

        Raises:
            SagaAlreadyExistsError: The run has seen or created the saga already. If somebody else has, that
                shows at the commit.
            InvalidSagaDataError: See ``saga_store.interface``.
        """
        self._check_id(saga_id)
        name, text = valid_name("name", name), self._encode(context)
        if self._seen or self._buffered.name:
            raise SagaAlreadyExistsError(saga_id)
        self._buffered.name, self._buffered.context = name, text

    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        """Buffer the new context.

        Raises:
            SagaConcurrencyError: The run has seen another version than the expected one.
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See ``saga_store.interface``.
        """
        self._check_id(saga_id)
        text = self._encode(context)
        await self._see(valid_version(expected_version))
        self._buffered.context = text

    async def update_status(self, saga_id: UUID, status: SagaStatus, *, expected_version: int | None = None) -> None:
        """Buffer the new status.

        Raises:
            SagaConcurrencyError: The run has seen another version than the expected one.
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See ``saga_store.interface``.
        """
        self._check_id(saga_id)
        status = valid_status(status)
        await self._see(valid_version(expected_version))
        self._buffered.status = status

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: SagaStepStatus,
        details: str | None = None,
    ) -> None:
        self._check_id(saga_id)
        step = valid_step(LogStep(step_name, action, status, details))
        moment, now = time.monotonic(), datetime.now(UTC)
        await self._see()
        self._buffered.steps.append(step)
        self._buffered.logged_at.append(moment)
        self._buffered.times.append(now)
        if self._write_ahead and step.status is SagaStepStatus.STARTED:
            await self.commit()

    async def load_saga_state(self, saga_id: UUID) -> tuple[SagaStatus, Context]:
        self._check_id(saga_id)
        seen = await self._see()
        status = self._buffered.status or (seen.status if seen else SagaStatus.PENDING)
        return status, decode_context(self._buffered.context or (seen.context if seen else "{}"))

    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        self._check_id(saga_id)
        history = await self._storage.get_step_history(saga_id) if await self._see() else []
        last = history[-1].id if history else 0
        buffered = zip(self._buffered.steps, self._buffered.times, strict=True)
        return history + [
            SagaLogEntry(last + number, saga_id, step.step_name, step.action, step.status, step.details, moment)
            for number, (step, moment) in enumerate(buffered, start=1)
        ]

    async def commit(self) -> None:
        """Write what is buffered as one checkpoint, in one statement; with nothing buffered, do nothing.

        If the connection dies meanwhile, a storage that commits its own writes finds out by itself what came
        of it, and raises UnknownOutcomeError only if it couldn't in time.

        When it raises, everything stays buffered. After UnknownOutcomeError committing again can't write
        twice, since what was written raised the version, and is refused the second time; unless only log
        entries were buffered, which don't raise it.

        Raises:
            SagaConcurrencyError: Somebody else has changed the saga since the run saw it.
            SagaAlreadyExistsError: The run creates the saga, and somebody else has created it.
            SagaNotFoundError: The saga was deleted since the run saw it.
        """
        buffered = self._buffered
        if not buffered:
            return
        async with self._writing:
            version = await self._storage._write(  # noqa: SLF001 - a run is the other half of its storage
                Write(
                    self._saga_id,
                    name=buffered.name,
                    status=buffered.status,
                    context=buffered.context,
                    steps=tuple(buffered.steps),
                    logged_at=tuple(buffered.logged_at),
                    expected_version=0 if buffered.name else self.version,  # 0: not there yet
                    lease=self._lease if buffered.name else self._renewed(),
                )
            )
            if self._lease:
                self._fence = version
                self._holds = (self._holds or buffered.name is not None) and (
                    buffered.status is None or buffered.status in UNFINISHED
                )
        self._seen = _Seen(
            version,
            buffered.status or (self._seen.status if self._seen else SagaStatus.PENDING),
            buffered.context or (self._seen.context if self._seen else "{}"),
        )
        self._buffered = _Buffered()

    async def rollback(self) -> None:
        """Drop what is buffered, and forget what was read: the next call reads the saga afresh."""
        self._buffered = _Buffered()
        self._seen = None

    async def heartbeat(self) -> None:
        """Renew the lease now, for as long as it was taken for; nothing buffered is written.

        Without a lease to renew, since the saga is finished or not created yet, it does nothing.

        Raises:
            SagaConcurrencyError: Somebody else has got the lease, or has changed the saga.
            SagaNotFoundError: The saga was deleted.
            InvalidSagaDataError: This run was begun without a lease.
        """
        if self._lease is None:
            raise InvalidSagaDataError("lease", "is none that this run holds; begin the run with an owner and a lease")
        async with self._writing:
            if renewed := self._renewed():
                await self._storage._write(  # noqa: SLF001 - a run is the other half of its storage
                    Write(self._saga_id, expected_version=self._fence, lease=renewed)
                )

    async def holds_lease(self) -> bool:
        """Ask the storage whether this run still holds the lease, by the database's clock.

        True can be out of date when it arrives; that a write is refused afterwards is certain.
        """
        if self._lease is None or self._lease.owner is None or self._fence is None or not self._holds:
            return False
        return await self._storage._is_held(self._saga_id, self._lease.owner, self._fence)  # noqa: SLF001 - as above

    def _check_id(self, saga_id: UUID) -> None:
        if valid_id(saga_id) != self._saga_id:
            raise InvalidSagaDataError(
                "saga_id", f"must be {self._saga_id}, the saga of this run, not {saga_id}; begin a run for that one"
            )

    def _encode(self, context: Context) -> str:
        text = encode_context(context)
        self._storage._check_size(text)  # noqa: SLF001 - a run is the other half of its storage
        return text

    async def _see(self, expected_version: int | None = None) -> _Seen | None:
        """Read the saga unless the run knows it; None if the run is about to create it."""
        if self._seen is None and self._buffered.name is None:
            if self._lease and self._fence is None:
                await self._take(self._lease)
            saga = await self._storage.get_saga(self._saga_id)
            if self._fence not in (None, saga.version):
                raise SagaConcurrencyError(self._saga_id, self._fence, saga.version)
            self._seen = _Seen(saga.version, saga.status, encode_context(saga.context))
        version = self._seen.version if self._seen else 0
        if expected_version not in (None, version):
            raise SagaConcurrencyError(self._saga_id, expected_version, version)
        return self._seen

    async def _take(self, lease: Lease) -> None:
        self._fence = await self._storage._write(Write(self._saga_id, lease=lease))  # noqa: SLF001 - as above
        self._holds = True

    def _renewed(self) -> Lease | None:
        return Lease(lasts=self._lease.lasts) if self._lease and self._holds else None

    async def _release(self) -> None:
        """Release the lease if it is held; it would end by itself, so failing to is no error."""
        if not self._holds:
            return
        self._holds = False
        try:
            await self._storage._write(  # noqa: SLF001 - as above
                Write(self._saga_id, expected_version=self._fence, lease=Lease())
            )
        except (SagaConcurrencyError, SagaNotFoundError):
            pass  # somebody else has got it
        except SagaStoreError as exc:
            _logger.warning("the lease of saga %s couldn't be released, and will expire: %s", self._saga_id, exc)

    async def _keep_renewing(self, lease: Lease) -> None:
        pause = max(lease.lasts.total_seconds() / 3, _LEAST_PAUSE_SECONDS) if lease.lasts else _LEAST_PAUSE_SECONDS
        while True:
            await asyncio.sleep(pause)
            try:
                await self.heartbeat()
            except (SagaConcurrencyError, SagaNotFoundError) as exc:
                _logger.warning("the lease of saga %s is lost: %s", self._saga_id, exc)
                return
            except SagaStoreError as exc:
                _logger.warning("the lease of saga %s couldn't be renewed: %s", self._saga_id, exc)

    async def _stop_renewing(self) -> None:
        if self._renewal is None:
            return
        try:
            async with self._writing:  # not in the middle of a statement
                self._renewal.cancel()
        finally:
            self._renewal.cancel()
        await asyncio.wait([self._renewal])
