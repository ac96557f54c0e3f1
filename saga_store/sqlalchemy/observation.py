"""How a storage tells a ``Telemetry`` what it does, and what it is called; nothing of it is there without one."""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Protocol, TypeVar
from uuid import UUID

from sqlalchemy import URL

from saga_store.errors import SagaStoreError, UnknownOutcomeError
from saga_store.telemetry import Call, End, Resolution, Telemetry
from saga_store.write import Outcome, Write

_T = TypeVar("_T")
_logger = logging.getLogger("saga_store.telemetry")

SAGAS, LOGS, ARCHIVES = "saga_executions", "saga_logs", "saga_archives"
OPERATIONS = {
    "_fetch_saga": ("get_saga", SAGAS),
    "_fetch_state": ("get_saga", SAGAS),
    "_fetch_history": ("get_step_history", LOGS),
    "_fetch_history_page": ("iter_step_history", LOGS),
    "_fetch_stale": ("find_stale_sagas", SAGAS),
    "_fetch_exhausted": ("find_exhausted_sagas", SAGAS),
    "_fetch_in_doubt": ("get_in_doubt_steps", LOGS),
    "_is_held": ("renew_lease", SAGAS),
    "_recent_writes": ("get_recent_writes", SAGAS),
    "_fetch_unfinished": ("wait_for_saga", SAGAS),
    "_claim": ("claim_sagas", SAGAS),
    "_find": ("find_sagas", SAGAS),
    "_count": ("count_sagas", SAGAS),
    "_sample": ("group_sagas", SAGAS),
    "_find_interventions": ("find_interventions", LOGS),
    "_fetch_recent": ("get_recent_history", LOGS),
    "_peek": ("peek_context", SAGAS),
    "_fetch_figures": ("get_figures", SAGAS),
    "_settle": ("settle_step", LOGS),
    "_hold": ("hold_saga", SAGAS),
    "_add_archive": ("begin_archive", ARCHIVES),
    "_change_archive": ("change_archive", ARCHIVES),
    "_fetch_archive": ("get_archive", ARCHIVES),
    "_fetch_archives": ("find_archives", ARCHIVES),
    "_fetch_stub": ("find_stub", SAGAS),
    "_make_stubs": ("make_stubs", SAGAS),
    "_restore": ("restore_sagas", SAGAS),
    "_forget": ("forget_stubs", SAGAS),
    "_fetch_lag": ("get_figures", ARCHIVES),
}
"""What a storage's methods are called, and the table that each is about; ``_apply`` is told by what it writes."""
_OF_ARCHIVES = {"_add_archive", "_fetch_archive", "_make_stubs"}
"""Those whose first argument is an archive's id."""


def operation_of(write: Write) -> tuple[str, str]:
    """Return what a write is called, by what it writes, and its table."""
    if write.creates:
        return ("save" if write.status or write.steps else "create_saga"), SAGAS
    parts = {
        "update_status": write.status is not None,
        "update_context": write.context is not None,
        "log_step": bool(write.steps),
        "save": write.recovery_attempts is not None,
        "renew_lease": write.lease is not None,
    }
    written = [name for name, is_written in parts.items() if is_written]
    if "renew_lease" in written and len(written) > 1:
        written.remove("renew_lease")  # a run's commits renew its lease
    [operation] = written if len(written) == 1 else ["save"]
    return operation, LOGS if operation == "log_step" else SAGAS


def rows_of(writes: Sequence[Write]) -> int:
    """Return how many rows these writes write."""
    return sum((write.creates or write.updates_row) + len(write.steps) for write in writes)


class Watched(Protocol):
    """A storage."""

    def _apply(self, write: Write, /) -> Awaitable[Any]: ...


class Observer:
    """Tells a telemetry, and sees to it that what goes wrong there changes nothing here."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._complained: set[str] = set()

    def watch_calls(self, storage: Watched, url: URL | None, schema: str | None) -> None:
        """Have each call of a storage told, from now on."""
        database = url.database if url is not None else None
        call = partial(
            Call,
            namespace=f"{database}|{schema}" if database and schema else database,
            host=url.host if url is not None else None,
            port=url.port if url is not None else None,
        )
        apply = storage._apply  # noqa: SLF001 - of the storage that this is a part of

        def watched_apply(write: Write) -> Awaitable[Any]:
            return self._watch(call(*operation_of(write), saga_id=write.saga_id), partial(apply, write))

        storage._apply = watched_apply  # type: ignore[method-assign] # noqa: SLF001 - as above
        for name, named in OPERATIONS.items():
            saga_id = _nothing if name in _OF_ARCHIVES else _saga_id
            setattr(storage, name, self._watched(getattr(storage, name), partial(call, *named), saga_id))

    def _watched(
        self, method: Callable[..., Awaitable[_T]], call: Callable[..., Call], saga_id: Callable[[object], UUID | None]
    ) -> Callable[..., Coroutine[Any, Any, _T]]:
        def watched(*arguments: object, **more: object) -> Coroutine[Any, Any, _T]:
            about = saga_id(arguments[0]) if arguments else None
            return self._watch(call(saga_id=about), partial(method, *arguments, **more))

        return watched

    async def _watch(self, call: Call, work: Callable[[], Awaitable[_T]]) -> _T:
        end = self._begin(call)
        try:
            answer = await work()
        except BaseException as exc:
            end(exc)
            raise
        # A refusal is an answer, too; its caller raises it.
        end(answer if isinstance(answer, SagaStoreError) else None)
        return answer

    def _begin(self, call: Call) -> End:
        try:
            end = self._telemetry.begin(call)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the storage's work goes on
            self._complain("begin", exc)
            return _nothing

        def end_quietly(error: BaseException | None) -> None:
            try:
                end(error)
            except Exception as exc:  # noqa: BLE001 - likewise
                self._complain("end", exc)

        return end_quietly

    def detach(self, context: Context) -> None:
        self._tell("detach", context)

    def flushed(self, writes: Sequence[Write], waited: Sequence[float]) -> None:
        self._tell("flushed", rows_of(writes), waited)

    def retried(self, error: Exception) -> None:
        self._tell("retried", error)

    def resolved(self, outcome: Outcome) -> None:
        """Tell what came of a write whose answer got lost."""
        resolution: Resolution = "written" if isinstance(outcome, int) else "refused"
        self._tell("resolved", "unknown" if isinstance(outcome, UnknownOutcomeError) else resolution)

    def waited_for_lock(self, seconds: float) -> None:
        self._tell("waited_for_lock", seconds)

    def _tell(self, what: str, *facts: object) -> None:
        try:
            getattr(self._telemetry, what)(*facts)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the storage's work goes on
            self._complain(what, exc)

    def _complain(self, what: str, exc: Exception) -> None:
        """Log it once of each kind: what fails for one write will fail for all of them."""
        if what not in self._complained:
            self._complained.add(what)
            _logger.warning("the telemetry's %s() failed, and is left alone when it does again", what, exc_info=exc)


def copy_detached_context(observer: Observer | None) -> Context:
    """Return a copy of the caller's context for what is done for others, too: without the caller's span."""
    context = copy_context()
    if observer is not None:
        observer.detach(context)
    return context


def _saga_id(argument: object) -> UUID | None:
    """Return the saga that a call's first argument names: by itself, or as what is asked of it."""
    found = getattr(argument, "saga_id", argument)
    return found if isinstance(found, UUID) else None


def _nothing(_: object) -> None:
    """End what has never begun; name no saga."""
