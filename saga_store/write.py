"""A checkpoint on its way to an engine: checked once, and copied, so that nobody can change it any more."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeAlias
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaConcurrencyError, SagaStoreError
from saga_store.inspection import SETTLED, record
from saga_store.model import Checkpoint, LogStep, SagaStatus, SagaStepStatus, StepAction
from saga_store.remedies import show
from saga_store.validation import (
    encode_context,
    valid_count,
    valid_id,
    valid_name,
    valid_status,
    valid_step,
    valid_version,
)


@dataclass(frozen=True, slots=True)
class Lease:
    """What becomes of a saga's lease: an owner takes it, a duration alone renews it, neither releases it."""

    owner: str | None = None
    lasts: timedelta | None = None

    @property
    def renews(self) -> bool:
        return self.owner is None and self.lasts is not None

    @property
    def releases(self) -> bool:
        return self.lasts is None

    @property
    def seconds(self) -> float | None:
        return None if self.lasts is None else self.lasts.total_seconds()


@dataclass(frozen=True, slots=True)
class Claim:
    """What ``claim_sagas`` is asked for, checked."""

    owner: str
    lease: timedelta
    limit: int
    stale_after: timedelta
    backoff: timedelta
    max_backoff: timedelta
    name: str | None
    max_attempts: int


@dataclass(frozen=True, slots=True)
class Settlement:
    """What ``settle_step`` is asked for, checked."""

    saga_id: UUID
    entry_id: int
    status: SagaStepStatus
    by: str
    reason: str
    expected_version: int | None = None

    def check_version(self, actual: int) -> None:
        if self.expected_version is not None and actual != self.expected_version:
            raise SagaConcurrencyError(self.saga_id, self.expected_version, actual)

    def steps(self, step_name: str, action: StepAction, before: Mapping[str, object]) -> tuple[LogStep, LogStep]:
        """Return the outcome and the record, given which step is in doubt and what was there before."""
        settled = {
            "entry_id": self.entry_id,
            "step_name": step_name,
            "action": action,
            "outcome": self.status.value,
        }
        return (
            LogStep(step_name, action, self.status, f"settled by {self.by}: {self.reason}"),
            LogStep(
                SETTLED,
                "act",
                SagaStepStatus.COMPLETED,
                record(self.by, self.reason, {**before, **settled}),
            ),
        )

    def refusal(self, later: int | None = None) -> InvalidSagaDataError:
        """Return why the entry isn't settled; ``later`` is that of a later attempt, if there is one in doubt."""
        if later is not None:
            return InvalidSagaDataError(
                "entry_id",
                f"names an attempt that a later one, in doubt as well, follows at the same step: {self.entry_id}; "
                f"an end is that of all of them: look at all, and settle entry {later}",
            )
        return InvalidSagaDataError(
            "entry_id",
            f"names no step in doubt of saga {self.saga_id}, any more or at all: {self.entry_id}; "
            "get_in_doubt_steps lists those that are",
        )


class Write(NamedTuple):
    """A checkpoint that has been checked, its context already JSON text.

    ``logged_at`` says on Python's monotonic clock when each step was logged; empty means now. A lease is only
    ever renewed or released by a write that expects a version: that it is still held is the version's to say.
    ``write_id`` is for telling later whether the write is there, since its answer may get lost; a write that comes with
    one keeps it. ``repeats`` says that it may have been sent before, with this id: it is written once at most.
    """

    saga_id: UUID
    name: str | None = None
    status: SagaStatus | None = None
    context: str | None = None
    steps: tuple[LogStep, ...] = ()
    logged_at: tuple[float, ...] = ()
    recovery_attempts: int | None = None
    expected_version: int | None = None
    lease: Lease | None = None
    write_id: int | None = None
    repeats: bool = False

    @property
    def creates(self) -> bool:
        return self.name is not None

    @property
    def changes_row(self) -> bool:
        """Whether it raises the version; renewing a lease doesn't, or it would race with the run's own writes."""
        return (
            self.status is not None
            or self.context is not None
            or self.recovery_attempts is not None
            or (self.lease is not None and not self.lease.renews)
        )

    @property
    def updates_row(self) -> bool:
        """Whether the row of a saga that is there is written at all, and not just its history."""
        return self.changes_row or self.lease is not None or self.write_id is not None

    def ages(self, now: float) -> tuple[float, ...]:
        """Return how many seconds ago each step was logged, given the monotonic clock's time."""
        if not self.logged_at:
            return (0.0,) * len(self.steps)
        return tuple([now - moment for moment in self.logged_at])


Outcome: TypeAlias = int | SagaStoreError
"""What came of a write: the saga's version afterwards, or the error to raise."""


def checked(checkpoint: Checkpoint) -> Write:
    if not isinstance(checkpoint, Checkpoint):
        raise InvalidSagaDataError("checkpoint", f"must be a Checkpoint, not {show(checkpoint)}; make one of it")
    steps = checkpoint.steps
    if not isinstance(steps, (list, tuple)):
        raise InvalidSagaDataError("steps", f"must be a list or tuple of LogStep, not {show(steps)}; make it a list")
    attempts = checkpoint.recovery_attempts
    write = Write(
        valid_id(checkpoint.saga_id),
        name=None if checkpoint.name is None else valid_name("name", checkpoint.name),
        status=None if checkpoint.status is None else valid_status(checkpoint.status),
        context=None if checkpoint.context is None else encode_context(checkpoint.context),
        steps=tuple([valid_step(step) for step in steps]) if steps else (),
        recovery_attempts=None if attempts is None else valid_count("recovery_attempts", attempts),
        expected_version=valid_version(checkpoint.expected_version),
    )
    if write.creates and write.expected_version is not None:
        raise InvalidSagaDataError(
            "expected_version", "must be None for a new saga, which has no version yet; leave it out"
        )
    if not (write.creates or write.changes_row or write.steps):
        raise InvalidSagaDataError("checkpoint", "writes nothing; give it a name, a status, a context or steps")
    return write
