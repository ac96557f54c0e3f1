"""Bad input: one table of named calls that every storage has to refuse in the same way."""

import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any, TypeAlias
from uuid import UUID, uuid4

from saga_store.model import Checkpoint, LogStep, SagaStatus, SagaStepStatus

# Any, because each call is one that a type checker would refuse.
Call: TypeAlias = Callable[[Any, UUID, UUID], Awaitable[object]]
"""Takes a storage, the id of a saga that writes go to, and the id of one to create."""

_CallWith: TypeAlias = Callable[[Any, Any, UUID, UUID], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class BadInput:
    """A call that raises InvalidSagaDataError.

    Attributes:
        method: The method that it calls.
        name: What is wrong with it.
        field: What the error's ``field`` begins with.
        checkpoints: Whether the call needs an ICheckpointStorage, where any ISagaStorage would do otherwise.
        call: Makes the call.
    """

    method: str
    name: str
    field: str
    checkpoints: bool
    call: Call

    def __str__(self) -> str:
        return f"{self.method}: {self.name}"


def _nested(depth: int) -> dict[str, Any]:
    context: dict[str, Any] = {}
    for _ in range(depth):
        context = {"inner": context}
    return context


def _containing_itself() -> dict[str, Any]:
    context: dict[str, Any] = {}
    context["self"] = [context]
    return context


_IDS: dict[str, Callable[[UUID], object]] = {
    "the id as text": str,
    "the id as bytes": lambda saga_id: saga_id.bytes,
    "the id as int": int,
    "None for an id": lambda _: None,
}

_TEXTS: dict[str, Any] = {
    "NUL in the text": "a\0b",
    "a lone surrogate in the text": "a\ud800",
    "bytes for text": b"order",
    "an int for text": 7,
}

_NAMES: dict[str, Any] = {"an empty name": "", "a name of 256 characters": "x" * 256} | _TEXTS

_CONTEXTS: dict[str, tuple[Any, str]] = {
    "a list for a context": ([1], "context"),
    "JSON text for a context": ('{"total": 12}', "context"),
    "a mapping that is no dict": (MappingProxyType({"total": 12}), "context"),
    "an int as key": ({1: "one"}, "context"),
    "None as key": ({None: 1}, "context"),
    "True as key": ({True: 1}, "context"),
    "a float as key": ({1.5: 1}, "context"),
    "a tuple as key": ({("a", "b"): 1}, "context"),
    "bytes as key": ({b"a": 1}, "context"),
    "a UUID as key": ({uuid4(): 1}, "context"),
    "an int as key further down": ({"items": [0, {"prices": {1: "one"}}]}, "context['items'][1]['prices']"),
    "NaN": ({"items": [0, 1, 2, {"price": float("nan")}]}, "context['items'][3]['price']"),
    "infinity": ({"price": float("inf")}, "context['price']"),
    "minus infinity": ({"prices": [1.0, float("-inf")]}, "context['prices'][1]"),
    "a tuple": ({"items": (1, 2)}, "context['items']"),
    "an empty tuple": ({"items": [()]}, "context['items'][0]"),
    "a set": ({"items": {1}}, "context['items']"),
    "bytes": ({"key": b"secret"}, "context['key']"),
    "a UUID": ({"ids": [uuid4()]}, "context['ids'][0]"),
    "a datetime": ({"at": datetime(2024, 1, 1, tzinfo=UTC)}, "context['at']"),
    "a Decimal": ({"price": Decimal("9.99")}, "context['price']"),
    "a complex number": ({"z": 1j}, "context['z']"),
    "an object": ({"it": object()}, "context['it']"),
    "a dict's view": ({"keys": {}.keys()}, "context['keys']"),
    "a mapping that is no dict further down": ({"it": MappingProxyType({})}, "context['it']"),
    "an int that Python won't read back": ({"n": 10**4300}, "context['n']"),
    "surrogates that JSON would join": ({"text": "\ud83d\ude00"}, "context['text']"),
    "surrogates in a key that JSON would join": ({"\ud83d\ude00": 1}, "context"),
    "a context that contains itself": (_containing_itself(), "context"),
    "a context too deep to be read back": (_nested(100_000), "context"),
}

_STATUSES: dict[str, Any] = {
    "an unknown status": "DONE",
    "a status in lower case": "running",
    "a status with a space": "RUNNING ",
    "an empty status": "",
    "an int for a status": 1,
    "the type for a status": SagaStatus,
}

_ACTIONS: dict[str, Any] = {
    "an unknown action": "undo",
    "an action in capitals": "ACT",
    "an empty action": "",
    "an int for an action": 1,
}

_COUNTS: dict[str, Any] = {
    "a negative number": -1,
    "a float for a number": 1.0,
    "a bool for a number": True,
    "text for a number": "1",
}

_VERSIONS: dict[str, Any] = {
    "a float for a version": 1.0,
    "a bool for a version": True,
    "text for a version": "1",
}

_DURATIONS: dict[str, Any] = {
    "a negative duration": timedelta(microseconds=-1),
    "seconds for a duration": 300,
}

_STARTED = SagaStepStatus.STARTED

_STEPS: dict[str, Any] = {
    "one step that is in no list": LogStep("pay", "act", _STARTED),
    "an iterator of steps": iter([LogStep("pay", "act", _STARTED)]),
    "None for steps": None,
    "text for steps": "pay",
    "a tuple for a step": [("pay", "act", _STARTED)],
    "a dict for a step": [{"step_name": "pay", "action": "act", "status": "STARTED"}],
    "None among steps": [LogStep("pay", "act", _STARTED), None],
}

_CHECKPOINTS: dict[str, Callable[[UUID], object]] = {
    "no checkpoint": lambda _: None,
    "an id for a checkpoint": lambda saga_id: saga_id,
    "a dict for a checkpoint": lambda saga_id: {"saga_id": saga_id, "status": "FAILED"},
    "a checkpoint that writes nothing": Checkpoint,
    "a checkpoint that only expects a version": lambda saga_id: Checkpoint(saga_id, expected_version=1),
}

_NONE: dict[str, Any] = {"None": None}


def _each(
    method: str,
    field: str,
    values: Mapping[str, object],
    call: _CallWith,
    *,
    checkpoints: bool = False,
) -> Iterator[BadInput]:
    for name, value in values.items():
        yield BadInput(method, name, field, checkpoints, functools.partial(call, value))


def _each_context(method: str, call: _CallWith, *, checkpoints: bool = False) -> Iterator[BadInput]:
    for name, (value, field) in _CONTEXTS.items():
        yield from _each(method, field, {name: value}, call, checkpoints=checkpoints)


_save = functools.partial(_each, "save", checkpoints=True)
_find = functools.partial(_each, "find_stale_sagas", checkpoints=True)


def _new(saga_id: UUID, **bad: Any) -> Checkpoint:  # noqa: ANN401 - bad on purpose
    """Return a checkpoint that would create a saga, were it not for what is bad about it."""
    good: dict[str, Any] = {"name": "order", "steps": [LogStep("pay", "act", _STARTED)]}
    return Checkpoint(saga_id, **(good | bad))


def _old(saga_id: UUID, **bad: Any) -> Checkpoint:  # noqa: ANN401 - bad on purpose
    """Return a checkpoint that would change a saga, were it not for what is bad about it."""
    good: dict[str, Any] = {
        "status": SagaStatus.FAILED,
        "context": {"bad": 1},
        "steps": [LogStep("a", "act", _STARTED)],
    }
    return Checkpoint(saga_id, **(good | bad))


def _last(*step: Any) -> list[LogStep]:  # noqa: ANN401 - bad on purpose
    """Return steps of which the last one is bad."""
    return [LogStep("pay", "act", _STARTED), LogStep(*step)]


BAD_INPUTS: tuple[BadInput, ...] = (
    *_each("create_saga", "saga_id", _IDS, lambda bad, s, _, new: s.create_saga(bad(new), "order", {})),
    *_each("create_saga", "name", _NAMES | _NONE, lambda bad, s, _, new: s.create_saga(new, bad, {})),
    *_each_context("create_saga", lambda bad, s, _, new: s.create_saga(new, "order", bad)),
    *_each("create_saga", "context", _NONE, lambda bad, s, _, new: s.create_saga(new, "order", bad)),
    *_each("update_context", "saga_id", _IDS, lambda bad, s, old, _: s.update_context(bad(old), {})),
    *_each_context("update_context", lambda bad, s, old, _: s.update_context(old, bad)),
    *_each("update_context", "context", _NONE, lambda bad, s, old, _: s.update_context(old, bad)),
    *_each("update_status", "saga_id", _IDS, lambda bad, s, old, _: s.update_status(bad(old), SagaStatus.FAILED)),
    *_each(
        "update_status",
        "status",
        _STATUSES | _NONE | {"a step's status": _STARTED},
        lambda bad, s, old, _: s.update_status(old, bad),
    ),
    *_each("log_step", "saga_id", _IDS, lambda bad, s, old, _: s.log_step(bad(old), "pay", "act", _STARTED)),
    *_each("log_step", "step_name", _NAMES | _NONE, lambda bad, s, old, _: s.log_step(old, bad, "act", _STARTED)),
    *_each("log_step", "action", _ACTIONS | _NONE, lambda bad, s, old, _: s.log_step(old, "pay", bad, _STARTED)),
    *_each(
        "log_step",
        "status",
        _STATUSES | _NONE | {"a saga's status": SagaStatus.RUNNING},
        lambda bad, s, old, _: s.log_step(old, "pay", "act", bad),
    ),
    *_each("log_step", "details", _TEXTS, lambda bad, s, old, _: s.log_step(old, "pay", "act", _STARTED, bad)),
    *_each("load_saga_state", "saga_id", _IDS, lambda bad, s, old, _: s.load_saga_state(bad(old))),
    *_each("get_step_history", "saga_id", _IDS, lambda bad, s, old, _: s.get_step_history(bad(old))),
    # What follows needs checkpoints.
    *_each(
        "update_context",
        "expected_version",
        _VERSIONS,
        lambda bad, s, old, _: s.update_context(old, {}, expected_version=bad),
        checkpoints=True,
    ),
    *_each(
        "update_status",
        "expected_version",
        _VERSIONS,
        lambda bad, s, old, _: s.update_status(old, SagaStatus.FAILED, expected_version=bad),
        checkpoints=True,
    ),
    *_save("checkpoint", _CHECKPOINTS, lambda bad, s, old, _: s.save(bad(old))),
    *_save("saga_id", _IDS, lambda bad, s, old, _: s.save(_old(bad(old)))),
    *_save("name", _NAMES, lambda bad, s, _, new: s.save(_new(new, name=bad))),
    *_each_context("save", lambda bad, s, _, new: s.save(_new(new, context=bad)), checkpoints=True),
    *_each_context("save", lambda bad, s, old, _: s.save(_old(old, context=bad)), checkpoints=True),
    *_save("status", _STATUSES | {"a step's status": _STARTED}, lambda bad, s, old, _: s.save(_old(old, status=bad))),
    *_save("steps", _STEPS, lambda bad, s, old, _: s.save(_old(old, steps=bad))),
    *_save("step_name", _NAMES | _NONE, lambda bad, s, old, _: s.save(_old(old, steps=_last(bad, "act", _STARTED)))),
    *_save("action", _ACTIONS | _NONE, lambda bad, s, old, _: s.save(_old(old, steps=_last("a", bad, _STARTED)))),
    *_save("status", _STATUSES | _NONE, lambda bad, s, old, _: s.save(_old(old, steps=_last("a", "act", bad)))),
    *_save("details", _TEXTS, lambda bad, s, old, _: s.save(_old(old, steps=_last("a", "act", _STARTED, bad)))),
    *_save(
        "recovery_attempts",
        _COUNTS | {"a number too large for the column": 2**31},
        lambda bad, s, old, _: s.save(_old(old, recovery_attempts=bad)),
    ),
    *_save("expected_version", _VERSIONS, lambda bad, s, old, _: s.save(_old(old, expected_version=bad))),
    *_save(
        "expected_version",
        {"a version of a new saga": 1},
        lambda bad, s, _, new: s.save(_new(new, expected_version=bad)),
    ),
    *_each("get_saga", "saga_id", _IDS, lambda bad, s, old, _: s.get_saga(bad(old)), checkpoints=True),
    *_find("stale_after", _DURATIONS | _NONE, lambda bad, s, *_: s.find_stale_sagas(stale_after=bad)),
    *_find("limit", _COUNTS | _NONE, lambda bad, s, *_: s.find_stale_sagas(stale_after=timedelta(), limit=bad)),
    *_find("name", _NAMES, lambda bad, s, *_: s.find_stale_sagas(stale_after=timedelta(), name=bad)),
    *_find(
        "max_attempts",
        _COUNTS | _NONE,
        lambda bad, s, *_: s.find_stale_sagas(stale_after=timedelta(), max_attempts=bad),
    ),
)
"""Every bad input of the contract; those that don't need ``checkpoints`` are for every storage."""
