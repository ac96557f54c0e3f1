"""Calls that are refused as bad input: those of the kit's table, and others for recovery and for runs."""

import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

from saga_store.model import SagaStatus, SagaStepStatus
from saga_store.run import SagaRun
from saga_store.testing.input import BAD_INPUTS, BadInput, Call

CallInRun: TypeAlias = Callable[[SagaRun], Awaitable[object]]

_HOUR = timedelta(hours=1)

_NAMES: tuple[Any, ...] = ("", "x" * 256, "a\0b", "a\ud800", 7, b"order")
_DURATIONS: tuple[Any, ...] = (-_HOUR, 300, None)
_COUNTS: tuple[Any, ...] = (-1, 1.0, True, "1", None, 2**31)
_OWNERS = (*_NAMES, None)

_CLAIM = {"owner": "worker-1", "lease": _HOUR, "limit": 1, "stale_after": timedelta(0)}
_BAD_CLAIMS: Mapping[str, tuple[Any, ...]] = {
    "owner": _OWNERS,
    "lease": _DURATIONS,
    "limit": _COUNTS,
    "stale_after": _DURATIONS,
    "name": _NAMES,
    "max_attempts": _COUNTS,
    "backoff": _DURATIONS,
    "max_backoff": _DURATIONS,
}
_BAD_LISTS = {field: _BAD_CLAIMS[field] for field in ("limit", "name", "max_attempts")}
_WHO = {"by": "alice", "reason": "it hangs"}
_BAD_WHO: Mapping[str, tuple[Any, ...]] = {"by": _OWNERS, "reason": ("", "a\0b", 7, None)}
_BAD_LEASES: tuple[tuple[Any, Any], ...] = (
    *((owner, _HOUR) for owner in _OWNERS),
    *(("worker-1", lease) for lease in _DURATIONS),
)
_STEP = {"step_name": "pay", "action": "act", "status": SagaStepStatus.STARTED}
_BAD_STEPS: Mapping[str, tuple[Any, ...]] = {
    "step_name": _OWNERS,
    "action": ("undo", "ACT", None),
    "status": ("DONE", None, SagaStatus.RUNNING),
    "details": ("a\0b", b"", 7),
}
_CONTEXTS: tuple[Any, ...] = (None, [], {1: 1}, {"a": float("nan")}, {"a": (1,)}, {"a": {1}})
_STATUSES: tuple[Any, ...] = ("DONE", "running", "", None, 1, SagaStepStatus.STARTED)


def _calls(
    method: str, good: Mapping[str, Any], bad: Mapping[str, tuple[Any, ...]], *, of_a_saga: bool = False
) -> Iterator[tuple[str, Call]]:
    """Yield each call that would be good, were it not for one argument."""
    for field, values in bad.items():
        for value in values:
            call = functools.partial(_call, method, {**good, field: value}, of_a_saga)
            yield f"{method}: {_shown(field, value)}", call


def _call(method: str, arguments: dict[str, Any], of_a_saga: bool, storage: Any, saga_id: UUID, _: UUID) -> Any:  # noqa: ANN401, FBT001 - a call of any method
    return getattr(storage, method)(*[saga_id] * of_a_saga, **arguments)


async def _enter(lease: tuple[Any, Any], storage: Any, saga_id: UUID, _: UUID) -> None:  # noqa: ANN401 - as for every bad call
    owner, lasts = lease
    async with storage.run(saga_id, owner=owner, lease=lasts):
        raise AssertionError("the run was entered")


def _calls_in_run(
    method: str, good: Mapping[str, Any], bad: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, CallInRun]]:
    for name, call in _calls(method, good, bad, of_a_saga=True):
        yield name, functools.partial(_call_in_run, call)


def _call_in_run(call: Call, run: SagaRun) -> Awaitable[object]:
    return call(run, run.saga_id, run.saga_id)


def _shown(field: str, value: object) -> str:
    return f"{field}={value!r:.40}"


def _numbered(calls: Iterable[BadInput]) -> Iterator[tuple[str, Call]]:
    """Name each call of the kit's table differently."""
    counter: Counter[str] = Counter()
    for bad in calls:
        counter[str(bad)] += 1
        yield f"{bad} ({counter[str(bad)]})", bad.call


# By name, so that a schedule that is printed says what it did in a word.
BAD_CALLS: Final[dict[str, Call]] = {
    **dict(_numbered(BAD_INPUTS)),
    **dict(_calls("claim_sagas", _CLAIM, _BAD_CLAIMS)),
    **dict(_calls("find_exhausted_sagas", {}, _BAD_LISTS)),
    **dict(_calls("give_up_saga", _WHO, _BAD_WHO, of_a_saga=True)),
    **dict(_calls("reset_recovery_attempts", _WHO, _BAD_WHO, of_a_saga=True)),
    **dict(_calls("break_lease", _WHO, _BAD_WHO, of_a_saga=True)),
    **{f"run: {_shown('lease', lease)}": functools.partial(_enter, lease) for lease in _BAD_LEASES},
}
"""Each takes a storage, the id of a saga that may be there, and another one's."""

BAD_CALLS_IN_RUN: Final[dict[str, CallInRun]] = {
    **dict(_calls_in_run("create_saga", {"name": "order", "context": {}}, {"name": _OWNERS, "context": _CONTEXTS})),
    **dict(_calls_in_run("update_context", {}, {"context": _CONTEXTS})),
    **dict(_calls_in_run("update_status", {}, {"status": _STATUSES})),
    **dict(_calls_in_run("log_step", _STEP, _BAD_STEPS)),
}
