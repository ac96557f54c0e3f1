"""A saga as one line of an archive, as docs/archive-format.md specifies it; no I/O.

Lines are ASCII, so that no tool's idea of an encoding matters. A context stays a string, since JSON that is read and
written again isn't what it was: numbers, spaces, the order of keys, keys that come twice.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any
from uuid import UUID

from saga_store.model import SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.retention_model import SagaHead, SagaRecord
from saga_store.validation import valid_action, valid_name, valid_text

_FINISHED = {status.value: status for status in (SagaStatus.COMPLETED, SagaStatus.FAILED)}
_STEP_STATUSES = {status.value: status for status in SagaStepStatus}
_SAGA_FIELDS = (
    "id", "name", "status", "version", "recovery_attempts", "created_at", "updated_at", "context", "history",
)  # fmt: skip
_ENTRY_FIELDS = ("id", "step_name", "action", "status", "details", "created_at")

# What stands between a saga's context and its history, between two entries, and at the end.
TO_HISTORY = b'","history":['
BETWEEN = b","
END = b"]}\n"


def encode_head(saga: SagaHead) -> bytes:
    """Return the line up to the context, whose pieces follow."""
    return (
        f'{{"id":"{saga.mark.id}","name":{_quoted(saga.name)},"status":"{saga.status.value}",'
        f'"version":{saga.mark.version},"recovery_attempts":{saga.recovery_attempts},'
        f'"created_at":"{written(saga.created_at)}","updated_at":"{written(saga.updated_at)}","context":"'
    ).encode("ascii")


def encode_context(piece: str) -> bytes:
    return _quoted(piece)[1:-1].encode("ascii")


def encode_entries(entries: Sequence[SagaLogEntry]) -> bytes:
    return ",".join(
        [
            f'{{"id":{entry.id},"step_name":{_quoted(entry.step_name)},"action":"{entry.action}",'
            f'"status":"{entry.status.value}","details":{"null" if entry.details is None else _quoted(entry.details)},'
            f'"created_at":"{written(entry.created_at)}"}}'
            for entry in entries
        ]
    ).encode("ascii")


def decode(line: bytes) -> SagaRecord:
    """Read a line.

    Raises:
        ValueError: It isn't one; says why.
    """
    try:
        found = json.loads(line.decode("ascii"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise ValueError(f"isn't ASCII (byte {exc.start})") from exc
    except RecursionError as exc:
        raise ValueError("is nested too deep for a saga") from exc
    except json.JSONDecodeError as exc:
        raise ValueError(f"isn't JSON: {exc.msg} (column {exc.colno})") from exc
    values = _values("the saga", found, _SAGA_FIELDS)
    saga_id, name, status, version, attempts, created_at, updated_at, context, history = values
    own_id = read_uuid(saga_id)
    if not isinstance(status, str) or status not in _FINISHED:
        raise ValueError(f"its status is {status!r:.40}, and a saga that is archived is COMPLETED or FAILED")
    if not isinstance(history, list):
        raise ValueError("its history is no list")  # noqa: TRY004 - of what is stored
    return SagaRecord(
        own_id,
        valid_name("name", name),
        _FINISHED[status],
        valid_text("context", context),
        read_whole("version", version, least=1),
        read_whole("recovery_attempts", attempts),
        read_moment("created_at", created_at),
        read_moment("updated_at", updated_at),
        _history(own_id, history),
    )


def written(moment: datetime) -> str:
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def read_uuid(value: object) -> UUID:
    try:
        found = UUID(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or str(found) != value:
        raise ValueError(f"its id {value!r:.60} is no UUID in lower case with hyphens")
    return found


def read_whole(field: str, value: object, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"its {field} {value!r:.40} is no whole number from {least}")
    return value


def _history(saga_id: UUID, found: list[object]) -> list[SagaLogEntry]:
    entries: list[SagaLogEntry] = []
    last_id = 0
    for number, each in enumerate(found, 1):
        try:
            entry = _entry(saga_id, each)
        except ValueError as exc:
            raise ValueError(f"entry {number}: {exc}") from exc
        if entry.id <= last_id:
            raise ValueError(f"entry {number}: its id {entry.id} doesn't follow {last_id}")
        entries.append(entry)
        last_id = entry.id
    return entries


def _entry(saga_id: UUID, found: object) -> SagaLogEntry:
    entry_id, step_name, action, status, details, created_at = _values("it", found, _ENTRY_FIELDS)
    if not isinstance(status, str) or status not in _STEP_STATUSES:
        raise ValueError(f"its status is {status!r:.40}")
    if not isinstance(action, str):
        raise ValueError(f"its action is {action!r:.40}")  # noqa: TRY004 - of what is stored
    return SagaLogEntry(
        read_whole("id", entry_id, least=1),
        saga_id,
        valid_name("step_name", step_name),
        valid_action(action),
        _STEP_STATUSES[status],
        None if details is None else valid_text("details", details),
        read_moment("created_at", created_at),
    )


def _values(what: str, found: object, fields: Sequence[str]) -> tuple[Any, ...]:
    # What a later format adds raises its version; what is unknown here was written by something else.
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")  # noqa: TRY004 - of what is stored
    if (*found,) != fields:
        odd = sorted({*fields} ^ {*found}) or ["their order"]
        raise ValueError(f"{what} hasn't the fields {', '.join(fields)}: look at {', '.join(odd)!r:.120}")
    return (*found.values(),)


def read_moment(field: str, value: object) -> datetime:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.tzinfo is not UTC:
        raise ValueError(f"its {field} {value!r:.60} is no time like 2026-11-26T09:30:00.000000Z")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"has {name}, which JSON doesn't know")
