"""What a result says, in words that two worlds share: without ids that sequences gave, and without times of day."""

import re
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import datetime, timedelta
from typing import TypeAlias
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaStoreError
from saga_store.model import SagaExecution, SagaLogEntry

Result: TypeAlias = object
"""What a call returned, or the exception that it raised."""

_HOUR = timedelta(hours=1)
_LONG = 2_000
# A record that names an entry by its id, which is from a sequence, too.
_SETTLED, _ENTRY_ID = "saga_store.settle_step", re.compile(r'"entry_id": \d+, ')


async def result_of(call: Awaitable[object]) -> Result:
    """Return what the twin's call returned, or its refusal; whatever else it raises is a mistake of this kit."""
    try:
        return await call
    except SagaStoreError as exc:
        return exc


async def any_result_of(call: Awaitable[object]) -> Result:
    """Likewise of the storage under test, which may raise anything."""
    try:
        return await call
    except Exception as exc:  # noqa: BLE001 - to be compared with what the twin raised
        return exc


@dataclass(frozen=True, slots=True)
class Eyes:
    """See what can be compared.

    A time becomes the number of whole hours since the schedule began: schedules take minutes, and move clocks by
    hours, so that all times of one hour are one.

    Attributes:
        names: What to call the sagas.
        epoch: When the schedule began, by this world's clock.
    """

    names: Mapping[UUID, str]
    epoch: datetime

    def see(self, result: Result) -> str:
        """Tell a result: values with their types and the order of their keys, exceptions with their facts."""
        if isinstance(result, InvalidSagaDataError):
            seen = f"InvalidSagaDataError(field={result.field!r})"  # the reason is for people
        elif isinstance(result, SagaStoreError):
            facts = [f"{name}={self.see(fact)}" for name, fact in vars(result).items()]
            seen = f"{type(result).__name__}({', '.join(facts)})"
        elif is_dataclass(result) and not isinstance(result, type):
            seen = self._see_fields(result)
        elif type(result) is UUID:
            seen = self.names.get(result, str(result))
        elif isinstance(result, datetime):
            seen = self._see_time(result)
        elif isinstance(result, timedelta):
            seen = f"{round(result / _HOUR)} h"
        elif isinstance(result, list | tuple):
            seen = self._see_sequence(result)
        else:
            seen = repr(result)
        return seen

    def ours(self, sagas: list[SagaExecution]) -> list[SagaExecution]:
        """Return those that belong to this schedule."""
        return [saga for saga in sagas if saga.id in self.names]

    def _see_fields(self, value: object) -> str:
        if isinstance(value, SagaLogEntry) and value.details is not None and value.step_name == _SETTLED:
            value = replace(value, details=_ENTRY_ID.sub("", value.details))
        shown = [
            f"{field.name}={self.see(getattr(value, field.name))}"
            for field in fields(value)  # type: ignore[arg-type] # a dataclass, says the caller
            if (type(value), field.name) != (SagaLogEntry, "id")  # from a sequence, in which rollbacks leave gaps
        ]
        return f"{type(value).__name__}({', '.join(shown)})"

    def _see_time(self, moment: datetime) -> str:
        if moment.tzinfo is None:
            return "a time without a time zone"
        return f"{round((moment - self.epoch) / _HOUR):+} h"

    def _see_sequence(self, values: list[object] | tuple[object, ...]) -> str:
        ids = [value.id for value in values if isinstance(value, SagaLogEntry)]
        order = "" if ids == sorted(set(ids)) else " in an order that isn't that of the ids"
        return f"{type(values).__name__}({', '.join(map(self.see, values))}){order}"


def short(seen: str) -> str:
    """Return what was seen, cut in the middle if it is longer than anybody would read."""
    return seen if len(seen) <= _LONG else f"{seen[: _LONG // 2]} ... {seen[-_LONG // 2 :]}"
