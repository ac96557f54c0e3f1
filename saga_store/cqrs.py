"""Any storage of this package as the saga storage of python-cqrs 5: its types and exceptions in and out."""

import abc
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

try:
    from cqrs.container.protocol import Container
    from cqrs.container.scope import ScopeStrategy
    from cqrs.dispatcher.exceptions import SagaConcurrencyError as CqrsConcurrencyError
    from cqrs.saga.models import SagaContext
    from cqrs.saga.recovery import recover_saga as _recover_saga
    from cqrs.saga.saga import Saga
    from cqrs.saga.storage.enums import SagaStatus as CqrsStatus
    from cqrs.saga.storage.enums import SagaStepStatus as CqrsStepStatus
    from cqrs.saga.storage.models import SagaLogEntry as CqrsLogEntry
    from cqrs.saga.storage.protocol import ISagaStorage as CqrsStorage
    from cqrs.saga.storage.protocol import SagaStorageRun
except ImportError as exc:
    raise ImportError("saga_store.cqrs needs python-cqrs 5: pip install saga-store[cqrs]") from exc

from saga_store.errors import SagaAlreadyExistsError, SagaConcurrencyError, SagaNotFoundError
from saga_store.interface import ICheckpointStorage
from saga_store.model import UNFINISHED, Checkpoint, Context, SagaStatus, SagaStepStatus, StepAction
from saga_store.run import SagaRun
from saga_store.storage import SagaStorage

_logger = logging.getLogger("saga_store.recovery")


class _EngineCalls(abc.ABC):
    """The six methods as python-cqrs calls them, on the storage and on a run alike."""

    @abc.abstractmethod
    def _of(self, saga_id: UUID) -> ICheckpointStorage | SagaRun:
        """Return what the calls for this saga go to."""

    @abc.abstractmethod
    async def _load(self, saga_id: UUID) -> tuple[SagaStatus, Context, int]:
        """Return status, context and version."""

    async def create_saga(self, saga_id: UUID, name: str, context: dict[str, Any]) -> None:
        with _engine_errors():
            await self._of(saga_id).create_saga(saga_id, name, _json_form(context))

    async def update_context(self, saga_id: UUID, context: dict[str, Any], current_version: int | None = None) -> None:
        with _engine_errors():
            await self._of(saga_id).update_context(saga_id, _json_form(context), expected_version=current_version)

    async def update_status(self, saga_id: UUID, status: CqrsStatus) -> None:
        with _engine_errors():
            await self._of(saga_id).update_status(saga_id, _our_status(status))

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: CqrsStepStatus,
        details: str | None = None,
    ) -> None:
        """Append an entry; what PostgreSQL can't hold in ``details`` is stored as a backslash escape.

        The engine logs ``str(exception)`` before it compensates: if that were refused, nothing would be undone.
        """
        with _engine_errors():
            await self._of(saga_id).log_step(
                saga_id,
                step_name,
                action,
                SagaStepStatus[CqrsStepStatus(status).name],
                _storable(details) if isinstance(details, str) else details,
            )

    async def load_saga_state(
        self,
        saga_id: UUID,
        *,
        read_for_update: bool = False,  # noqa: ARG002 - the engine passes it; see below
    ) -> tuple[CqrsStatus, dict[str, Any], int]:
        """Return status, context and version.

        ``read_for_update`` locks nothing: no lock is held while a step works. The version is what guards
        against somebody who writes in between.
        """
        with _engine_errors():
            status, context, version = await self._load(saga_id)
        return CqrsStatus[status.name], context, version

    async def get_step_history(self, saga_id: UUID) -> list[CqrsLogEntry]:
        with _engine_errors():
            history = await self._of(saga_id).get_step_history(saga_id)
        return [
            CqrsLogEntry(
                saga_id=entry.saga_id,
                step_name=entry.step_name,
                action=entry.action,
                status=CqrsStepStatus[entry.status.name],
                timestamp=entry.created_at,
                details=entry.details,
            )
            for entry in history
        ]


class CqrsSagaStorage(_EngineCalls, CqrsStorage):
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
    """

    def __init__(self, storage: ICheckpointStorage, *, write_ahead: bool = False) -> None:
        self._storage = storage
        self._write_ahead = write_ahead

    def _of(self, saga_id: UUID) -> ICheckpointStorage:  # noqa: ARG002 - a run minds the id
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
        status = None if new_status is None else _our_status(new_status)
        with _engine_errors():
            while True:
                saga = await self._storage.get_saga(saga_id)
                attempt = Checkpoint(
                    saga_id, status=status, recovery_attempts=saga.recovery_attempts + 1, expected_version=saga.version
                )
                # A refusal means that somebody else's write went through, so this comes to an end.
                with suppress(SagaConcurrencyError):
                    await self._storage.save(attempt)
                    return

    async def set_recovery_attempts(self, saga_id: UUID, attempts: int) -> None:
        with _engine_errors():
            await self._storage.save(Checkpoint(saga_id, recovery_attempts=attempts))

    def create_run(self) -> AbstractAsyncContextManager[SagaStorageRun]:
        """Begin a run: what it is told is written at its ``commit()``, as one statement; see ``SagaRun``."""
        if not isinstance(self._storage, SagaStorage):
            # The engine takes this for "call the storage itself".
            raise NotImplementedError(f"{type(self._storage).__name__} has no runs")
        return _run(_CqrsRun(self._storage, write_ahead=self._write_ahead))


class _CqrsRun(_EngineCalls, SagaStorageRun):
    """The engine names the saga with each call; in practice it is one and the same."""

    def __init__(self, storage: SagaStorage, *, write_ahead: bool) -> None:
        self._storage = storage
        self._write_ahead = write_ahead
        self._runs: dict[UUID, SagaRun] = {}

    def _of(self, saga_id: UUID) -> SagaRun:
        if saga_id not in self._runs:
            self._runs[saga_id] = self._storage.run(saga_id, write_ahead=self._write_ahead)
        return self._runs[saga_id]

    async def _load(self, saga_id: UUID) -> tuple[SagaStatus, Context, int]:
        run = self._of(saga_id)
        status, context = await run.load_saga_state(saga_id)
        return status, context, run.version or 1

    async def commit(self) -> None:
        with _engine_errors():
            for run in self._runs.values():
                await run.commit()

    async def rollback(self) -> None:
        for run in self._runs.values():
            await run.rollback()


def recovery_handler(
    saga: Saga[Any],
    context_builder: type[SagaContext] | Callable[[dict[str, Any]], SagaContext],
    container: Container[Any],
    scope_strategy: ScopeStrategy = ScopeStrategy.NONE,
) -> Callable[[SagaRun], Awaitable[None]]:
    """Return what a ``RecoveryWorker`` does with the sagas of this class: ``recover_saga``, in the worker's run.

    Unlike ``recover_saga`` on a storage, it doesn't make a saga FAILED because its recovery failed, nor because a
    step couldn't be undone: such a saga stays as it is, and is claimed again until its attempts are used up. One
    that has been undone is FAILED, as ever.

    Args:
        saga: The saga, to resume the sagas of its class.
        context_builder: The context's class, or what makes one from the stored dict.
        container: Where the engine gets the steps from.
        scope_strategy: As for the first execution.
    """

    async def recover(run: SagaRun) -> None:
        storage = _LeasedStorage(_LeasedRun(run))
        try:
            await _recover_saga(saga, run.saga_id, context_builder, container, storage, scope_strategy)
        except Exception as exc:
            # The engine raises after a compensation that succeeded, too.
            await run.rollback()
            status, _ = await run.load_saga_state(run.saga_id)
            if status in UNFINISHED:
                raise
            _logger.info("saga_id=%s was undone: %s", run.saga_id, exc)

    return recover


class _LeasedRun(_EngineCalls, SagaStorageRun):
    """A run that somebody else has begun, and that holds a lease."""

    def __init__(self, run: SagaRun) -> None:
        self._run = run
        self._left_undone = False

    def _of(self, saga_id: UUID) -> SagaRun:  # noqa: ARG002 - the run minds it
        return self._run

    async def _load(self, saga_id: UUID) -> tuple[SagaStatus, Context, int]:
        status, context = await self._run.load_saga_state(saga_id)
        return status, context, self._run.version or 1

    async def update_status(self, saga_id: UUID, status: CqrsStatus) -> None:
        """Set the status; but one that is to be FAILED with a step not undone stays, for another attempt."""
        if not (self._left_undone and status == CqrsStatus.FAILED):
            await super().update_status(saga_id, status)

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: CqrsStepStatus,
        details: str | None = None,
    ) -> None:
        await super().log_step(saga_id, step_name, action, status, details)
        if action == "compensate" and status == CqrsStepStatus.FAILED:
            self._left_undone = True

    async def commit(self) -> None:
        with _engine_errors():
            await self._run.commit()

    async def rollback(self) -> None:
        await self._run.rollback()


class _LeasedStorage(CqrsStorage):
    """The storage that the engine gets for one recovery: what it writes past its run is committed at once."""

    def __init__(self, run: _LeasedRun) -> None:
        self._run = run

    def create_run(self) -> AbstractAsyncContextManager[SagaStorageRun]:
        return nullcontext(self._run)

    async def create_saga(self, saga_id: UUID, name: str, context: dict[str, Any]) -> None:
        await self._run.create_saga(saga_id, name, context)
        await self._run.commit()

    async def update_context(self, saga_id: UUID, context: dict[str, Any], current_version: int | None = None) -> None:
        await self._run.update_context(saga_id, context, current_version)
        await self._run.commit()

    async def update_status(self, saga_id: UUID, status: CqrsStatus) -> None:
        await self._run.update_status(saga_id, status)
        await self._run.commit()

    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: CqrsStepStatus,
        details: str | None = None,
    ) -> None:
        await self._run.log_step(saga_id, step_name, action, status, details)
        await self._run.commit()

    async def load_saga_state(
        self, saga_id: UUID, *, read_for_update: bool = False
    ) -> tuple[CqrsStatus, dict[str, Any], int]:
        return await self._run.load_saga_state(saga_id, read_for_update=read_for_update)

    async def get_step_history(self, saga_id: UUID) -> list[CqrsLogEntry]:
        return await self._run.get_step_history(saga_id)

    async def get_sagas_for_recovery(
        self,
        limit: int,
        max_recovery_attempts: int = 5,
        stale_after_seconds: int | None = None,
        saga_name: str | None = None,
    ) -> list[UUID]:
        raise NotImplementedError("this storage is for one saga; claim others with claim_sagas")

    async def increment_recovery_attempts(self, saga_id: UUID, new_status: CqrsStatus | None = None) -> None:
        """Do nothing: the claim has counted this attempt, and one failure is no reason to give a saga up."""

    async def set_recovery_attempts(self, saga_id: UUID, attempts: int) -> None:
        raise NotImplementedError("the claim counts the attempts; see reset_recovery_attempts")


@asynccontextmanager
async def _run(run: _CqrsRun) -> AsyncIterator[_CqrsRun]:
    try:
        yield run
    finally:
        await run.rollback()


@contextmanager
def _engine_errors() -> Iterator[None]:
    """Raise what the engine branches on, with our own error as its cause."""
    try:
        yield
    except (SagaNotFoundError, SagaAlreadyExistsError) as exc:
        raise ValueError(str(exc)) from exc
    except SagaConcurrencyError as exc:
        raise CqrsConcurrencyError(str(exc)) from exc


def _our_status(status: CqrsStatus) -> SagaStatus:
    return SagaStatus[CqrsStatus(status).name]


def _storable(text: str) -> str:
    return text.replace("\0", r"\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def _json_form(context: dict[str, Any]) -> dict[str, Any]:
    """Do what JSON would do to tuples and scalar keys, which the storages refuse because it isn't reversible.

    Here it is: a ``SagaContext`` is rebuilt from its fields' types. What JSON can't hold stays as it is, and
    the storage refuses it by its path.
    """
    try:
        form: dict[str, Any] = _json_value(context)
    except RecursionError:
        # Too deep, or inside itself: the storage says where.
        return context
    return form


def _json_value(value: Any) -> Any:  # noqa: ANN401 - a context holds anything
    if isinstance(value, dict):
        # All keys or none, so that no two keys can become one.
        spell = json.dumps if all(type(key) in {int, float, bool} for key in value) else _unchanged
        return dict(zip(map(spell, value), map(_json_value, value.values()), strict=True))
    if isinstance(value, list | tuple):
        return list(map(_json_value, value))
    return value


def _unchanged(key: object) -> object:
    return key
