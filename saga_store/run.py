"""A unit of work on one saga: buffered in memory, written as one checkpoint, fenced by the version seen.

A buffer is *frozen* when it is sent: from then on it is a write with an id, which stays as it is until it is known what
came of it. docs/architecture.md has the interleavings, as far as tests/test_run.py doesn't.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self
from uuid import UUID

from saga_store.cancellation import is_being_cancelled, see_through
from saga_store.errors import (
    InvalidSagaDataError,
    SagaAlreadyExistsError,
    SagaConcurrencyError,
    SagaLeasedError,
    SagaNotFoundError,
    SagaStoreError,
    UnknownOutcomeError,
)
from saga_store.joining import Fate, Part
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
from saga_store.run_interface import ISagaRun
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
from saga_store.write_ids import leads_to, new_write_id

_logger = logging.getLogger("saga_store")

_LEAST_PAUSE_SECONDS = 0.01
# However often whoever leaves is cancelled, the lease is released; but not for longer than this.
_MOST_SECONDS_TO_LEAVE = 10.0

# What says even of a write that was sent before that it isn't there, and never will be.
_REFUSALS = (SagaConcurrencyError, SagaAlreadyExistsError, SagaNotFoundError)


class Joined(Protocol):
    """What a run needs of a transaction that it commits into."""

    async def _write(self, write: Write) -> int: ...

    async def _take_part(self) -> Part: ...


class _Store(Protocol):
    """What a run needs of its storage."""

    async def get_saga(self, saga_id: UUID) -> SagaExecution: ...

    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]: ...

    def _check_size(self, context: str) -> None: ...

    async def _write(self, write: Write) -> int: ...

    async def _is_held(self, saga_id: UUID, owner: str, version: int) -> bool: ...

    async def _recent_writes(self, saga_id: UUID) -> Sequence[int]: ...

    def _joined_for(self, saga_id: UUID, into: object) -> Joined: ...


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

    def followed_by(self, later: "_Buffered") -> "_Buffered":
        return _Buffered(
            self.name or later.name,
            later.status or self.status,
            later.context or self.context,
            self.steps + later.steps,
            self.logged_at + later.logged_at,
            self.times + later.times,
        )


@dataclass(slots=True, eq=False)
class _Sent:
    """A buffer that was sent, and of which the run doesn't know for certain what came of it.

    Attributes:
        buffered: What it was.
        write: What was sent, and is sent again if need be; its id tells whether it is there.
        part: The part of the caller's transaction that it was sent in; None: it isn't known to be in any.
        may_be_there: Whether it may be stored, or be under way still, whatever becomes of the part.
        is_dropped: Whether ``rollback()`` has dropped it: if it isn't there, it isn't sent again.
    """

    buffered: _Buffered
    write: Write
    part: Part | None = None
    may_be_there: bool = False
    is_dropped: bool = False

    @property
    def is_open(self) -> bool:
        return self.part is not None and self.part.is_open

    @property
    def is_expected_to_stay(self) -> bool:
        return self.part is not None and self.part.is_expected_to_stay

    @property
    def is_missing(self) -> bool:
        return not self.is_expected_to_stay and not self.is_dropped


class SagaRun(ISagaRun):
    """The run of all storages of this package; ``ISagaRun`` says what it promises.

    Made by ``storage.run(saga_id)``.

    Args:
        storage: Where the run reads and writes.
        saga_id: The saga that it is a run of.
        write_ahead: Commit at once when a step is logged as STARTED.
        lease: Whose lease to take, and for how long.
        renew: Renew the lease in the background, three times while it lasts, until the run is left.
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
        self._sent: list[_Sent] = []
        self._buffered = _Buffered()
        self._lease = lease
        self._renew = renew
        self._is_entered = False
        # The version that this run wrote last while it held the lease, and whether it still does, as far as it knows.
        self._fence: int | None = None
        self._holds = False
        self._renewal: asyncio.Task[None] | None = None
        self._leaving: asyncio.Future[None] | None = None
        # Whoever buffers while another task commits would lose what it buffers, and a heartbeat that overtakes a
        # commit, or is overtaken, would expect the wrong version.
        self._turn = asyncio.Lock()
        # For the worker: whom to tell that the lease is lost, and to what number of attempts leaving sets it back.
        self._on_lost: Callable[[], object] | None = None
        self._attempts_on_release: int | None = None

    @property
    def saga_id(self) -> UUID:
        return self._saga_id

    @property
    def version(self) -> int | None:
        version = self._seen.version if self._seen else self._fence
        for sent in self._sent:
            if sent.is_expected_to_stay:
                version = leads_to(sent.write)
            elif sent.is_missing:
                break
        return version

    async def __aenter__(self) -> Self:
        if self._lease:
            self._is_entered = True
            try:
                with suppress(SagaNotFoundError):  # it may be about to be created
                    await self._take(self._lease)
            except asyncio.CancelledError:
                self._is_entered = False
                await see_through(self._give_back(self._lease), _MOST_SECONDS_TO_LEAVE)
                raise
            except BaseException:
                self._is_entered = False
                raise
            if self._renew:
                self._leaving = asyncio.get_running_loop().create_future()
                self._renewal = asyncio.create_task(self._keep_renewing(self._lease, self._leaving))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (self._buffered or any(sent.is_missing for sent in self._sent)):
            _logger.warning(
                "the run of saga %s was left with writes that weren't committed, and they are dropped; "
                "call commit() before leaving it",
                self._saga_id,
            )
        if self._lease is None:
            await self.rollback()
        else:
            await see_through(self._leave(), _MOST_SECONDS_TO_LEAVE)

    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        self._check_id(saga_id)
        name, text = valid_name("name", name), self._encode(context)
        async with self._turn:
            self._hear()
            if self._seen or self._creates():
                raise SagaAlreadyExistsError(saga_id)
            self._buffered.name, self._buffered.context = name, text

    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        self._check_id(saga_id)
        text, version = self._encode(context), valid_version(expected_version)
        async with self._turn:
            await self._see(version)
            self._buffered.context = text

    async def update_status(self, saga_id: UUID, status: SagaStatus, *, expected_version: int | None = None) -> None:
        self._check_id(saga_id)
        status, version = valid_status(status), valid_version(expected_version)
        async with self._turn:
            await self._see(version)
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
        async with self._turn:
            await self._see()
            self._buffered.steps.append(step)
            self._buffered.logged_at.append(moment)
            self._buffered.times.append(now)
            if self._write_ahead and step.status is SagaStepStatus.STARTED:
                await self._commit(None)

    async def load_saga_state(self, saga_id: UUID) -> tuple[SagaStatus, Context]:
        self._check_id(saga_id)
        async with self._turn:
            seen = await self._see()
            unread = self._unread()
        status = unread.status or (seen.status if seen else SagaStatus.PENDING)
        return status, decode_context(unread.context or (seen.context if seen else "{}"))

    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        self._check_id(saga_id)
        async with self._turn:
            history = await self._storage.get_step_history(saga_id) if await self._see() else []
            while await self._catch_up():  # what was sent may have been stored before the history was read, or after
                history = await self._storage.get_step_history(saga_id)
            unread = self._unread()
        last = history[-1].id if history else 0
        return history + [
            SagaLogEntry(last + number, saga_id, step.step_name, step.action, step.status, step.details, moment)
            for number, (step, moment) in enumerate(zip(unread.steps, unread.times, strict=True), start=1)
        ]

    async def commit(self, *, into: object = None) -> None:
        self._check_entered()
        async with self._turn:
            await self._commit(into)

    async def rollback(self) -> None:
        async with self._turn:
            self._drop()

    async def heartbeat(self) -> None:
        if self._lease is None:
            raise InvalidSagaDataError("lease", "is none that this run holds; begin the run with an owner and a lease")
        self._check_entered()
        async with self._turn:
            self._hear()
            if not any(sent.is_open for sent in self._sent):
                await self._write_lease(Lease(lasts=self._lease.lasts))

    async def holds_lease(self) -> bool:
        if self._lease is None or self._lease.owner is None:
            return False
        async with self._turn:
            await self._catch_up()
            if self._fence is None or not self._holds:
                return False
            return await self._storage._is_held(  # noqa: SLF001 - a run is the other half of its storage
                self._saga_id, self._lease.owner, self._fence
            )

    def _check_id(self, saga_id: UUID) -> None:
        if valid_id(saga_id) != self._saga_id:
            raise InvalidSagaDataError(
                "saga_id", f"must be {self._saga_id}, the saga of this run, not {saga_id}; begin a run for that one"
            )
        self._check_entered()

    def _check_entered(self) -> None:
        if self._lease and not self._is_entered:
            raise InvalidSagaDataError(
                "run", "has to hold its lease: enter it with `async with storage.run(...) as run`, and use it inside"
            )

    def _encode(self, context: Context) -> str:
        text = encode_context(context)
        self._storage._check_size(text)  # noqa: SLF001 - a run is the other half of its storage
        return text

    # What the run knows. Whatever follows is called by whoever has the turn.

    def _creates(self) -> bool:
        return bool(self._buffered.name) or any(sent.buffered.name for sent in self._sent if not sent.is_dropped)

    def _unread(self) -> _Buffered:
        """Return what reads from the storage don't show."""
        unread = _Buffered()
        for sent in self._sent:
            if not sent.is_dropped:
                unread = unread.followed_by(sent.buffered)
        return unread.followed_by(self._buffered)

    async def _see(self, expected_version: int | None = None) -> _Seen | None:
        """Read the saga unless the run knows it; None if the run is about to create it."""
        await self._catch_up()
        if self._seen is None and not self._creates():
            if self._lease and self._fence is None:
                await self._take(self._lease)
            saga = await self._storage.get_saga(self._saga_id)
            while self._fence not in (None, saga.version):
                if not await self._catch_up():
                    raise SagaConcurrencyError(self._saga_id, self._fence, saga.version)
                saga = await self._storage.get_saga(self._saga_id)
            self._seen = _Seen(saga.version, saga.status, encode_context(saga.context))
        version = self.version or 0
        if expected_version not in (None, version):
            raise SagaConcurrencyError(self._saga_id, expected_version, version)
        return self._seen

    def _hear(self) -> None:
        """Take note of transactions of the caller's that have ended."""
        for sent in tuple(self._sent):
            fate = sent.part and sent.part.fate
            if fate is Fate.COMMITTED:
                self._sent.remove(sent)
                self._settle(sent)
            elif fate is Fate.ROLLED_BACK:
                sent.part = None
                if not sent.may_be_there:
                    self._thaw(sent)
                    break

    async def _catch_up(self) -> bool:
        """Learn what came of what was sent, by looking where nothing was heard; whether any of it has been stored."""
        self._hear()
        if all(sent.is_open for sent in self._sent):
            return False
        recent = await self._storage._recent_writes(self._saga_id)  # noqa: SLF001 - as above
        found = [number for number, sent in enumerate(self._sent, start=1) if sent.write.write_id in recent]
        # Nothing was ever sent unless what was sent before it had been accepted.
        stored, self._sent = self._sent[: max(found, default=0)], self._sent[max(found, default=0) :]
        for sent in stored:
            self._settle(sent)
        for sent in self._sent:
            if sent.part and not sent.is_open:
                # It may yet come: COMMIT may be under way.
                sent.may_be_there, sent.part.fate = True, Fate.UNKNOWN
        return bool(stored)

    def _settle(self, sent: _Sent) -> None:
        """Go on from a write that is stored."""
        write, version = sent.write, leads_to(sent.write)
        if self._lease:
            self._fence = version
            self._holds = (self._holds or write.creates) and (write.status is None or write.status in UNFINISHED)
        if self._seen is None:
            if write.creates and not sent.is_dropped:
                self._seen = _Seen(version, write.status or SagaStatus.PENDING, write.context or "{}")
        elif self._seen.version < version:
            self._seen = _Seen(version, write.status or self._seen.status, write.context or self._seen.context)

    def _thaw(self, sent: _Sent) -> None:
        """Make a buffer again of what was sent, and of what came after it."""
        number = self._sent.index(sent)
        thawed, self._sent = self._sent[number:], self._sent[:number]
        for later in reversed(thawed):
            if not later.is_dropped:
                self._buffered = later.buffered.followed_by(self._buffered)

    def _drop(self) -> None:
        self._hear()
        self._buffered = _Buffered()
        self._seen = None
        for sent in self._sent:
            sent.is_dropped = True

    # Writing

    async def _commit(self, into: object) -> None:
        store: Joined | _Store = self._storage
        joined, part = None, None
        if into is not None:
            store = joined = self._storage._joined_for(self._saga_id, into)  # noqa: SLF001 - a run is the other half of it
            await self._catch_up()
        else:
            self._hear()
        if not self._buffered and all(sent.is_open or sent.is_dropped for sent in self._sent):
            return
        if joined is not None:
            part = await joined._take_part()  # noqa: SLF001 - as above
        self._check_open(part)
        for sent in [sent for sent in self._sent if not sent.is_open and not sent.is_dropped]:
            await self._send(store, sent, part)
        if self._buffered:
            sent = self._freeze()
            await self._send(store, sent, part)

    def _check_open(self, part: Part | None) -> None:
        """Refuse to wait for the lock of a transaction that only the caller can end."""
        for sent in self._sent:
            if sent.part and sent.is_open and (part is None or part.where is not sent.part.where):
                raise InvalidSagaDataError(
                    "into",
                    "must be given again: the run's last commit is part of a transaction that is still open, and has "
                    "locked the saga; commit into the same one, or commit that or roll it back first",
                )

    def _freeze(self) -> _Sent:
        """Make a write of the buffer, which stays as it is from now on."""
        buffered, self._buffered = self._buffered, _Buffered()
        write = Write(
            self._saga_id,
            name=buffered.name,
            status=buffered.status,
            context=buffered.context,
            steps=tuple(buffered.steps),
            logged_at=tuple(buffered.logged_at),
            expected_version=0 if buffered.name else self.version,  # 0: not there yet
            lease=self._lease if buffered.name else self._renewed(),
        )
        sent = _Sent(buffered, write._replace(write_id=new_write_id(write)))
        self._sent.append(sent)
        return sent

    async def _send(self, store: Joined | _Store, sent: _Sent, part: Part | None) -> None:
        repeats = sent.may_be_there
        sent.part, sent.may_be_there = part, repeats or part is None
        try:
            await store._write(sent.write._replace(repeats=repeats))  # noqa: SLF001 - as above
        except SagaStoreError as exc:
            if isinstance(exc, _REFUSALS) or not (repeats or isinstance(exc, UnknownOutcomeError)):
                self._thaw(sent)
            raise
        if part is None:
            # What was sent before it, and is still there, has been dropped.
            del self._sent[: self._sent.index(sent) + 1]
            self._settle(sent)

    # The lease

    async def _take(self, lease: Lease) -> None:
        self._fence = await self._storage._write(Write(self._saga_id, lease=lease))  # noqa: SLF001 - as above
        self._holds = True

    async def _give_back(self, lease: Lease) -> None:
        """Release a lease that may have been taken: who took it was cancelled before it knew.

        It may be about to be taken, too, by a statement that others share. So it is taken once more, behind that one.
        """
        try:
            await self._take(lease)
            await self._release()
        except (SagaLeasedError, SagaNotFoundError):
            pass  # nobody took it
        except SagaStoreError as exc:
            _logger.warning("the lease of saga %s may have been taken, and will expire: %s", self._saga_id, exc)

    def _renewed(self) -> Lease | None:
        return Lease(lasts=self._lease.lasts) if self._lease and self._holds else None

    async def _write_lease(self, lease: Lease) -> None:
        """Renew or release the lease, if it is held. What this run has stored meanwhile is nobody else's write."""
        while self._holds:
            attempts = self._attempts_on_release if lease.releases else None
            write = Write(self._saga_id, recovery_attempts=attempts, expected_version=self._fence, lease=lease)
            try:
                await self._storage._write(write)  # noqa: SLF001 - as above
            except SagaConcurrencyError:
                # It may have been heard meanwhile that one of this run's own was stored.
                if not await self._catch_up() and self._fence == write.expected_version:
                    raise
            else:
                return

    async def _leave(self) -> None:
        try:
            await self._stop_renewing()
            async with self._turn:
                self._is_entered = False
                self._drop()
                await self._release()
        except asyncio.CancelledError:
            _logger.warning("the lease of saga %s couldn't be released in time, and will expire", self._saga_id)
            raise

    async def _release(self) -> None:
        """Release the lease if it is held; it would end by itself, so failing to is no error."""
        if self._holds and any(sent.is_open for sent in self._sent):
            _logger.warning(
                "the run of saga %s was left before the transaction that it committed into was over, and its lease "
                "will expire; leave the run after the transaction",
                self._saga_id,
            )
            return
        try:
            await self._write_lease(Lease())
        except (SagaConcurrencyError, SagaNotFoundError):
            pass  # somebody else has got it
        except SagaStoreError as exc:
            _logger.warning("the lease of saga %s couldn't be released, and will expire: %s", self._saga_id, exc)
        finally:
            self._holds = False

    async def _keep_renewing(self, lease: Lease, leaving: asyncio.Future[None]) -> None:
        pause = max(lease.lasts.total_seconds() / 3, _LEAST_PAUSE_SECONDS) if lease.lasts else _LEAST_PAUSE_SECONDS
        while True:
            await asyncio.wait([leaving], timeout=pause)
            if leaving.done():
                return
            try:
                await self.heartbeat()
            except (SagaConcurrencyError, SagaNotFoundError) as exc:
                _logger.warning("the lease of saga %s is lost: %s", self._saga_id, exc)
                if self._on_lost:
                    self._on_lost()
                return
            except (Exception, asyncio.CancelledError) as exc:  # whatever it is, the next attempt may fare better
                if isinstance(exc, asyncio.CancelledError) and is_being_cancelled():
                    raise
                _logger.warning("the lease of saga %s couldn't be renewed: %s", self._saga_id, str(exc) or repr(exc))

    async def _stop_renewing(self) -> None:
        if self._renewal is None or self._leaving is None:
            return
        self._leaving.set_result(None)
        try:
            await asyncio.wait([self._renewal])  # it may be in the middle of a statement
        finally:
            self._renewal.cancel()
            self._renewal = None
