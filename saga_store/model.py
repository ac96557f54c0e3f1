"""The nouns of the contract: statuses, sagas, log entries and checkpoints, as immutable values."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, TypeAlias
from uuid import UUID

Context: TypeAlias = dict[str, Any]
"""What a saga carries from step to step: a dict of what JSON can hold, and comes back equal."""

StepAction: TypeAlias = Literal["act", "compensate"]
"""Whether a step does its work or undoes it."""


class SagaStatus(StrEnum):
    """Where a saga stands; the value is what the database holds."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPENSATING = "COMPENSATING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


UNFINISHED = (SagaStatus.PENDING, SagaStatus.RUNNING, SagaStatus.COMPENSATING)
"""The statuses of sagas that somebody has to see through; the others are final."""


class SagaStepStatus(StrEnum):
    """What a log entry says of a step; the value is what the database holds."""

    STARTED = "STARTED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    COMPENSATED = "COMPENSATED"


@dataclass(frozen=True, slots=True)
class LogStep:
    """A log entry to be written: its id and time are the database's to give."""

    step_name: str
    action: StepAction
    status: SagaStepStatus
    details: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One atomic write to one saga: all of it is stored, or none.

    Attributes:
        saga_id: The saga to write.
        name: Creates the saga under this name (1 to 255 characters); None writes to one that exists.
        status: The new status; None leaves it. A new saga is PENDING unless this says otherwise.
        context: The new context, whole; None leaves it. A new saga's is ``{}`` unless this says otherwise.
        steps: Entries to append to the history, in this order.
        recovery_attempts: How often recovery has been tried; None leaves it.
        expected_version: Write only if the saga is still at this version. Not for a new saga.
    """

    saga_id: UUID
    _: KW_ONLY
    name: str | None = None
    status: SagaStatus | None = None
    context: Context | None = None
    steps: Sequence[LogStep] = ()
    recovery_attempts: int | None = None
    expected_version: int | None = None


@dataclass(frozen=True, slots=True)
class SagaExecution:
    """A saga as it is stored.

    Attributes:
        id: The caller's id for it.
        name: What kind of saga it is.
        status: Where it stands.
        context: A copy; changing it changes nothing stored.
        version: 1 at creation, +1 for every checkpoint that changes more than the history, and whenever the
            lease is claimed, taken, released or broken.
        recovery_attempts: How often recovery has been tried.
        lease_owner: Who works on it now; None when nobody does.
        lease_expires_at: Until when; None when nobody does.
        created_at: When it was created, by the database's clock, with a time zone.
        updated_at: When the version last rose, likewise.
    """

    id: UUID
    name: str
    status: SagaStatus
    context: Context
    version: int
    recovery_attempts: int
    lease_owner: str | None
    lease_expires_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class SagaStart:
    """A saga that was asked for by ``get_or_create_saga``.

    Attributes:
        created: Whether this call has created it; then it is the caller's to run.
        name: What kind of saga it is.
        status: Where it stands; PENDING if it was created.
        context: A copy; of a saga that was there, what it has come to.
        version: What fences the next write; 1 if it was created.
    """

    created: bool
    name: str
    status: SagaStatus
    context: Context
    version: int


@dataclass(frozen=True, slots=True)
class SagaLogEntry:
    """One line of a saga's history; ``id`` gives the order, ``created_at`` the database's time."""

    id: int
    saga_id: UUID
    step_name: str
    action: StepAction
    status: SagaStepStatus
    details: str | None
    created_at: datetime
