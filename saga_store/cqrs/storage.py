"""Any storage of this package as the saga storage of python-cqrs."""

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from uuid import UUID, uuid4

from cqrs.saga.storage.enums import SagaStatus as CqrsStatus
from cqrs.saga.storage.protocol import ISagaStorage as CqrsStorage
from cqrs.saga.storage.protocol import SagaStorageRun

from saga_store.cqrs.calls import ENGINE_ERRORS, EngineCalls, RunCalls, our_status
from saga_store.cqrs.lease import UnderLease
from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError, SagaLeasedError
from saga_store.interface import ICheckpointStorage
from saga_store.model import (
    Checkpoint,
    Context,
    SagaExecution,
    SagaStatus,
)
from saga_store.run import SagaRun
from saga_store.storage import SagaStorage
from saga_store.validation import valid_name, valid_period
from saga_store.write import Lease


class CqrsSagaStorage(EngineCalls, CqrsStorage):
    """A python-cqrs ``ISagaStorage`` that keeps its sagas in a storage of this package.

    Give it to ``SagaMediator``, ``Saga.transaction``, ``bootstrap`` and ``recover_saga``. It has no state
    of its own: one may serve the whole application, as far as the storage below it may.

    - A missing saga is a ``ValueError`` in every method, as is creating one that exists; a version conflict
      is python-cqrs's ``SagaConcurrencyError``. The storage's own error is the ``__cause__``.
    - Every other error is the storage's own, unchanged: ``InvalidSagaDataError`` (a ``ValueError`` too),
      ``StorageUnavailableError``, ``UnknownOutcomeError``, ``SchemaError``.
    - Contexts are stored as the JSON that the fields of a ``SagaContext`` are read back from: tuples become
      lists, and keys that are numbers or booleans become strings.

    Args:
        storage: Where the sagas are; its bind decides when a call is committed. With a ``SagaStorage``, as
            all of this package are, the engine works in runs: it writes one statement per checkpoint, and
            holds no connection while a step acts. With another, it writes one statement per call.
        write_ahead: Write that a step has STARTED before it acts, so that a crash inside it leaves a trace.
            It costs a run one more statement for each step; without runs it is always so.
        lease: Hold a lease on a saga while the engine works on it, for so long, renewed three times meanwhile. Then
            nobody takes a slow saga for a dead one, and recovery's ``stale_after`` can be short; who comes second
            gets SagaLeasedError, and leaves the saga as it is. It costs two more statements for each run. Only for
            a ``SagaStorage`` that commits its own calls.
        owner: The name on the leases, which no other live process may have; by default host, process and a random
            part.

    Raises:
        TypeError: ``storage`` is none.
        InvalidSagaDataError: A lease that is no positive time, on a storage without runs; an owner without a lease.
    """

    def __init__(
        self,
        storage: ICheckpointStorage,
        *,
        write_ahead: bool = False,
        lease: timedelta | None = None,
        owner: str | None = None,
    ) -> None:
        if not isinstance(storage, ICheckpointStorage):
            raise TypeError(
                "storage must be an ICheckpointStorage, such as SqlAlchemySagaStorage(engine) or MemorySagaStorage(), "
                f"not {type(storage).__name__}"
            )
        self._storage = storage
        self._write_ahead = write_ahead
        self._lease = _valid_lease(storage, lease, owner)

    async def _of(self, saga_id: UUID) -> ICheckpointStorage | UnderLease:  # noqa: ARG002 - a run minds the id
        if self._lease and isinstance(self._storage, SagaStorage):
            return UnderLease(self._storage, self._lease)
        return self._storage

    async def _load(self, saga_id: UUID) -> tuple[SagaStatus, Context, int]:
        saga = await self._storage.get_saga(saga_id)
        return saga.status, saga.context, saga.version

    async def get_sagas_for_recovery(
        self,
        limit: int,
        max_recovery_attempts: int = 5,
        stale_after_seconds: int | None = None,
        saga_name: str | None = None,
    ) -> list[UUID]:
        """Return sagas to recover, those that haven't changed for longest first.

        PENDING sagas are listed too: a process that died between creating a saga and starting it would leave
        it behind for ever. Sagas under a lease are not. If there are more than ``limit``, those with the
        fewest attempts are chosen, so that one that fails again and again doesn't keep the others waiting.
        """
        sagas = await self._storage.find_stale_sagas(
            stale_after=timedelta(seconds=stale_after_seconds or 0),
            limit=limit,
            name=saga_name,
            max_attempts=max_recovery_attempts,
        )
        return [saga.id for saga in sorted(sagas, key=lambda saga: saga.updated_at)]

    async def increment_recovery_attempts(self, saga_id: UUID, new_status: CqrsStatus | None = None) -> None:
        status = None if new_status is None else our_status(new_status)
        with ENGINE_ERRORS:
            while True:
                saga = await self._storage.get_saga(saga_id)
                if saga.lease_expires_at and await self._is_anothers(saga):
                    # The engine would count an attempt, and call FAILED what somebody else is working on.
                    raise SagaLeasedError(saga_id, saga.lease_owner or "", saga.lease_expires_at)
                attempt = Checkpoint(
                    saga_id, status=status, recovery_attempts=saga.recovery_attempts + 1, expected_version=saga.version
                )
                # A refusal means that somebody else's write went through, so this comes to an end.
                with suppress(SagaConcurrencyError):
                    await self._storage.save(attempt)
                    return

    async def _is_anothers(self, saga: SagaExecution) -> bool:
        """Whether somebody else holds a lease on it that hasn't expired, by the storage's clock."""
        if self._lease is None or saga.lease_owner in {None, self._lease.owner}:
            return False
        assert isinstance(self._storage, SagaStorage)  # noqa: S101 - see _valid_lease
        return await self._storage._is_held(saga.id, saga.lease_owner or "", saga.version)  # noqa: SLF001 - of this package

    async def set_recovery_attempts(self, saga_id: UUID, attempts: int) -> None:
        with ENGINE_ERRORS:
            await self._storage.save(Checkpoint(saga_id, recovery_attempts=attempts))

    def create_run(self) -> AbstractAsyncContextManager[SagaStorageRun]:
        """Begin a run: what it is told is written at its ``commit()``, as one statement; see ``SagaRun``."""
        if not isinstance(self._storage, SagaStorage):
            # The engine takes this for "call the storage itself".
            raise NotImplementedError(f"{type(self._storage).__name__} has no runs")
        return _run(self._storage, write_ahead=self._write_ahead, lease=self._lease)


def _valid_lease(storage: ICheckpointStorage, lease: timedelta | None, owner: str | None) -> Lease | None:
    if lease is None:
        if owner is not None:
            raise InvalidSagaDataError("owner", "must come with a lease, which is what it is the owner of; give both")
        return None
    if not isinstance(storage, SagaStorage):
        raise InvalidSagaDataError("lease", f"needs a storage with runs, which {type(storage).__name__} isn't")
    if not valid_period("lease", lease):
        raise InvalidSagaDataError("lease", "must last for longer than no time, such as timedelta(seconds=30)")
    owner = owner or f"{socket.gethostname()[:200]}:{os.getpid()}:{uuid4().hex[:8]}"
    return Lease(valid_name("owner", owner), lease)


class _CqrsRun(RunCalls):
    """The engine names the saga with each call; in practice it is one and the same."""

    def __init__(self, begin: Callable[[UUID], Awaitable[SagaRun]]) -> None:
        self._begin = begin
        self._runs: dict[UUID, SagaRun] = {}

    async def _of(self, saga_id: UUID) -> SagaRun:
        if saga_id not in self._runs:
            self._runs[saga_id] = await self._begin(saga_id)
        return self._runs[saga_id]

    async def commit(self) -> None:
        with ENGINE_ERRORS:
            for run in self._runs.values():
                await run.commit()

    async def rollback(self) -> None:
        for run in self._runs.values():
            await run.rollback()


@asynccontextmanager
async def _run(storage: SagaStorage, *, write_ahead: bool, lease: Lease | None) -> AsyncIterator[_CqrsRun]:
    async with AsyncExitStack() as runs:

        async def begin(saga_id: UUID) -> SagaRun:
            run = SagaRun(storage, saga_id, write_ahead=write_ahead, lease=lease, renew=lease is not None)
            return await runs.enter_async_context(run) if lease else run

        run = _CqrsRun(begin)
        try:
            yield run
        finally:
            await run.rollback()
