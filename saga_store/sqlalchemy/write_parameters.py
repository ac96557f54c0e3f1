"""Writes as the parameters of the statements in write_sql.py; no I/O.

It is run for every batch of a crowd, so it goes through the writes as few times as it can.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from saga_store.sqlalchemy.statement import Statement
from saga_store.sqlalchemy.write_sql import APPEND, NEW, UPDATE
from saga_store.write import Write


def of_one(write: Write) -> dict[str, object]:
    """Return what a write asks for."""
    lease = write.lease
    asked = {
        "saga_id": write.saga_id,
        "name": write.name,
        "status": write.status and write.status.value,
        "context": write.context,
        "attempts": write.recovery_attempts,
        "expected": write.expected_version,
        "lease_owner": lease and lease.owner,
        "lease_seconds": lease and lease.seconds,
        "releases": lease and lease.releases,
        "write_id": write.write_id,
    }
    parameters: dict[str, object] = {name: value for name, value in asked.items() if value is not None}
    if len(write.steps) == 1:
        parameters |= {APPEND + name: value for name, value in _step(write).items()}
    elif write.steps:
        parameters |= _steps((write,))
    return parameters


def _step(write: Write) -> dict[str, object]:
    [step] = write.steps
    values: dict[str, object] = {
        "step_name": step.step_name,
        "step_action": step.action,
        "step_status": step.status.value,
        "step_details": step.details,
    }
    if write.logged_at:
        [values["step_age"]] = write.ages(time.monotonic())
    return values


def by_kind(writes: Sequence[Write]) -> tuple[list[Write], list[Write], list[Write]]:
    """Return those that create sagas, those that update some, and those that only append an entry.

    What appends several entries and does nothing else is rare, and of no kind.
    """
    new: list[Write] = []
    updates: list[Write] = []
    appends: list[Write] = []
    for write in writes:
        if write.name is not None:
            new.append(write)
        elif write.updates_row:
            updates.append(write)
        elif len(write.steps) == 1:
            appends.append(write)
    # Whoever creates a saga waits for others who create it: in an order that all keep to, lest they wait in a circle.
    new.sort(key=lambda write: write.saga_id.int)
    return new, updates, appends


def of_kinds(new: Sequence[Write], updates: Sequence[Write], appends: Sequence[Write]) -> dict[str, object]:
    """Return what writes of each kind ask for, in arrays."""
    parameters: dict[str, object] = {}
    if new:
        parameters |= {NEW + name: column for name, column in _columns(new).items()}
    if updates:
        parameters |= {UPDATE + name: column for name, column in _columns(updates).items()}
    with_steps = [write for kind in (new, updates) for write in kind if write.steps]
    if with_steps:
        parameters |= _steps(with_steps)
    if appends:
        parameters |= {APPEND + name: column for name, column in _steps(appends).items()}
        if expected := _words([write.expected_version for write in appends]):
            parameters[f"{APPEND}expected"] = expected
    return parameters


def of_all(statement: Statement, writes: Sequence[Write]) -> dict[str, object]:
    """Return all of the statement's parameters, in arrays, whether the writes ask for them or not."""
    return dict.fromkeys(statement.names) | _columns(writes) | _steps(writes)


def _columns(writes: Sequence[Write]) -> dict[str, object]:
    """Return an array for each thing that the writes ask for, but for entries.

    Things that often come and go are there together: a connection keeps a statement for each set of them.
    """
    saga_ids, names, statuses, contexts, _, _, attempts, expected, leases, write_ids, _ = zip(*writes, strict=True)
    columns: dict[str, object] = {"saga_id": ids_as_text(saga_ids)}
    if any(names):
        columns["name"] = list(names)
    if any(statuses) or any(contexts):
        columns |= {"status": _words(statuses), "context": unless_empty(contexts)}
    if versions := _words(expected):
        columns |= {"expected": versions, "write_id": _words(write_ids)}
    if counts := _words(attempts):
        columns["attempts"] = counts
    if any(leases):
        columns |= {
            "lease_owner": unless_empty([lease and lease.owner for lease in leases]),
            "lease_seconds": _words([lease and lease.seconds for lease in leases]),
            "releases": _words([lease and lease.releases for lease in leases]),
        }
    return columns


def _steps(writes: Sequence[Write]) -> dict[str, object]:
    steps = [step for write in writes for step in write.steps]
    columns: dict[str, object] = {
        "step_saga_id": ids_as_text([write.saga_id for write in writes for _ in write.steps]),
        "step_name": [step.step_name for step in steps],
        "step_action": _words([step.action for step in steps]),
        "step_status": _words([step.status for step in steps]),
        "step_details": unless_empty([step.details for step in steps]),
    }
    if any(write.logged_at for write in writes):
        now = time.monotonic()
        columns["step_age"] = _words([age for write in writes for age in write.ages(now)])
    return columns


def ids_as_text(ids: Iterable[UUID]) -> str:
    """Return ids as the text of an array."""
    return f"{{{','.join([saga_id.hex for saga_id in ids])}}}"


def _words(column: Sequence[object]) -> str | None:
    """Return words and numbers with commas in between, None as nothing; None for nothing but None."""
    if column.count(None) == len(column):
        return None
    return ",".join(["" if word is None else str(word) for word in column])


def unless_empty(column: Sequence[Any]) -> list[Any] | None:
    """Return None for nothing but None: unnest() makes the same of it."""
    return None if column.count(None) == len(column) else list(column)
