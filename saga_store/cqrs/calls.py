"""What python-cqrs's engine calls, and how its types and exceptions become ours."""

import abc
import json
from collections.abc import Iterable
from types import TracebackType
from typing import Any
from uuid import UUID

from cqrs.dispatcher.exceptions import SagaConcurrencyError as CqrsConcurrencyError
from cqrs.saga.storage.enums import SagaStatus as CqrsStatus
from cqrs.saga.storage.enums import SagaStepStatus as CqrsStepStatus
from cqrs.saga.storage.models import SagaLogEntry as CqrsLogEntry
from cqrs.saga.storage.protocol import SagaStorageRun

from saga_store.cqrs.lease import UnderLease
from saga_store.errors import SagaAlreadyExistsError, SagaArchivedError, SagaConcurrencyError, SagaNotFoundError
from saga_store.inspection import SETTLED, read_record
from saga_store.interface import ICheckpointStorage
from saga_store.model import Context, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.run import SagaRun
from saga_store.validation import is_plain


class _EngineErrors:
    """Raises what the engine branches on, with our own error as its cause."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if isinstance(error, SagaArchivedError):
            return  # what the engine doesn't find it begins; this one has ended, and isn't to begin again
        # The words are python-cqrs's own: applications look for them.
        if isinstance(error, SagaNotFoundError):
            raise ValueError(f"Saga {error.saga_id} not found") from error  # noqa: TRY004 - what the engine looks for
        if isinstance(error, SagaAlreadyExistsError):
            raise ValueError(f"Saga {error.saga_id} already exists") from error  # noqa: TRY004 - as above
        if isinstance(error, SagaConcurrencyError):
            raise CqrsConcurrencyError(str(error)) from error


# A class, and one object of it: every call of the engine passes here, and a generator costs it more than the rest.
ENGINE_ERRORS = _EngineErrors()


class EngineCalls(abc.ABC):
    """The six methods as python-cqrs calls them, on the storage and on a run alike."""

    @abc.abstractmethod
    async def _of(self, saga_id: UUID) -> ICheckpointStorage | UnderLease | SagaRun:
        """Return what the calls for this saga go to."""

    @abc.abstractmethod
    async def _load(self, saga_id: UUID) -> tuple[SagaStatus, Context, int]:
        """Return status, context and version."""

    async def create_saga(self, saga_id: UUID, name: str, context: dict[str, Any]) -> None:
        with ENGINE_ERRORS:
            await (await self._of(saga_id)).create_saga(saga_id, name, _json_form(context))

    async def update_context(self, saga_id: UUID, context: dict[str, Any], current_version: int | None = None) -> None:
        with ENGINE_ERRORS:
            await (await self._of(saga_id)).update_context(
                saga_id, _json_form(context), expected_version=current_version
            )

    async def update_status(self, saga_id: UUID, status: CqrsStatus) -> None:
        with ENGINE_ERRORS:
            await (await self._of(saga_id)).update_status(saga_id, our_status(status))

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
        with ENGINE_ERRORS:
            await (await self._of(saga_id)).log_step(
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
        with ENGINE_ERRORS:
            status, context, version = await self._load(saga_id)
        return CqrsStatus[status.name], context, version

    async def get_step_history(self, saga_id: UUID) -> list[CqrsLogEntry]:
        with ENGINE_ERRORS:
            history = await (await self._of(saga_id)).get_step_history(saga_id)
        settled = settled_compensations(history)
        return [
            CqrsLogEntry(
                saga_id=entry.saga_id,
                step_name=entry.step_name,
                action=entry.action,
                status=CqrsStepStatus.COMPLETED if entry.id in settled else CqrsStepStatus[entry.status.name],
                timestamp=entry.created_at,
                details=entry.details,
            )
            for entry in history
        ]


class RunCalls(EngineCalls, SagaStorageRun):
    """The calls on a run, which knows the version that it has seen."""

    @abc.abstractmethod
    async def _of(self, saga_id: UUID) -> SagaRun: ...

    async def _load(self, saga_id: UUID) -> tuple[SagaStatus, Context, int]:
        run = await self._of(saga_id)
        status, context = await run.load_saga_state(saga_id)
        return status, context, run.version or 1


def settled_compensations(history: Iterable[SagaLogEntry]) -> set[int]:
    """Return the ids of the ends that a person has settled as COMPENSATED: the engine looks for COMPLETED there."""
    undone: dict[str, int] = {}
    settled: set[int] = set()
    for entry in history:
        if entry.action == "compensate" and entry.status is SagaStepStatus.COMPENSATED:
            undone[entry.step_name] = entry.id
        elif entry.step_name == SETTLED:
            _, _, what = read_record(entry.details)
            step = what.get("step_name")
            if what.get("action") == "compensate" and isinstance(step, str) and step in undone:
                settled.add(undone.pop(step))
    return settled


def our_status(status: CqrsStatus) -> SagaStatus:
    return SagaStatus[CqrsStatus(status).name]


def _storable(text: str) -> str:
    return text.replace("\0", r"\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def _json_form(context: dict[str, Any]) -> dict[str, Any]:
    """Do what JSON would do to tuples and scalar keys, which the storages refuse because it isn't reversible.

    Here it is: a ``SagaContext`` is rebuilt from its fields' types. What JSON can't hold stays as it is, and
    the storage refuses it by its path.
    """
    try:
        if type(context) is dict and is_plain(context):
            return context
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
    if isinstance(value, (list, tuple)):
        return list(map(_json_value, value))
    return value


def _unchanged(key: object) -> object:
    return key
