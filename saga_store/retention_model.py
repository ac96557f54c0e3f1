"""The nouns of keeping and letting go: what a policy lets go, records, stubs and the ledger of archives; no I/O.

A saga that was let go leaves a *stub*: its row with an empty context and ``archived_at``, and no history. A *mark* is
what a saga was when it was read: it is let go only if it is the same still.
"""

import abc
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from saga_store.model import SagaLogEntry, SagaStatus

KEPT_AFTER_RESTORE = timedelta(days=7)
"""How long a restored saga is held, unless it is said otherwise."""
MOST_MARKS = 10_000
"""How many sagas may become stubs in one transaction."""


class Retention(Protocol):
    """How long finished sagas are kept after their last change; None: for ever."""

    @property
    def completed(self) -> timedelta | None:
        """How long COMPLETED ones are kept."""

    @property
    def failed(self) -> timedelta | None:
        """How long FAILED ones are kept."""

    @property
    def names(self) -> Mapping[str, timedelta | None]:
        """How long those of a name are kept, whichever of both they are."""


class ArchiveState(StrEnum):
    """How far an archive has come; the value is what the database holds."""

    WRITING = "WRITING"
    """It is registered, and its object may be there in part."""
    VERIFIED = "VERIFIED"
    """Its object was read back and is right: its sagas may become stubs."""
    REMOVED = "REMOVED"
    """All of its sagas that hadn't changed are stubs."""
    FAILED = "FAILED"
    """It was given up; nothing more becomes a stub by it."""


OPEN = (ArchiveState.WRITING, ArchiveState.VERIFIED)
"""The states in which an archive isn't at its end."""


@dataclass(frozen=True, slots=True)
class SagaMark:
    """What a saga was when it was read; ``last_entry_id`` is 0 without entries."""

    id: UUID
    version: int
    entries: int
    last_entry_id: int


@dataclass(frozen=True, slots=True)
class ExpiredSaga:
    """A saga that a policy lets go.

    Attributes:
        mark: What it is.
        name: Its name.
        status: COMPLETED or FAILED.
        created_at: When it was created, by the database's clock.
        updated_at: When its version last rose.
        bytes: How much its context and its entries' details take as text, in bytes.
        expired_for: For how long it might have been let go.
    """

    mark: SagaMark
    name: str
    status: SagaStatus
    created_at: datetime
    updated_at: datetime
    bytes: int
    expired_for: timedelta


@dataclass(frozen=True, slots=True)
class ExpiredPage:
    """Some of what a policy lets go, in the order of creation time and id.

    Attributes:
        sagas: What is on this page; it may be empty although there are more pages.
        after: Where the next page begins; None on the last one.
        unreadable: Sagas that belong here and are left out, for Python can't hold their rows.
    """

    sagas: list[ExpiredSaga]
    after: str | None = None
    unreadable: tuple[UUID, ...] = ()


@dataclass(frozen=True, slots=True)
class SagaRecord:
    """A finished saga, whole: as an archive holds it, and as it goes back into a database.

    Attributes:
        id: As in ``SagaExecution``, and so the next ones.
        name: Likewise.
        status: COMPLETED or FAILED.
        context: JSON text, to the letter.
        version: As in ``SagaExecution``, and so the next ones.
        recovery_attempts: Likewise.
        created_at: Likewise.
        updated_at: Likewise.
        entries: Its history, in order.
    """

    id: UUID
    name: str
    status: SagaStatus
    context: str
    version: int
    recovery_attempts: int
    created_at: datetime
    updated_at: datetime
    entries: Sequence[SagaLogEntry] = ()

    @property
    def mark(self) -> SagaMark:
        """What to compare it by."""
        return SagaMark(self.id, self.version, len(self.entries), self.entries[-1].id if self.entries else 0)


@dataclass(frozen=True, slots=True)
class SagaHead:
    """A saga's row without its context, and what to compare it by."""

    mark: SagaMark
    name: str
    status: SagaStatus
    recovery_attempts: int
    created_at: datetime
    updated_at: datetime


class SagaReading(abc.ABC):
    """A saga that is being read: first its context, then its entries, then the next saga."""

    head: SagaHead

    @abc.abstractmethod
    def context(self) -> AsyncIterator[str]:
        """Yield the context as JSON text, to the letter, in pieces of at most 1 Mi characters."""

    @abc.abstractmethod
    def entries(self) -> AsyncIterator[Sequence[SagaLogEntry]]:
        """Yield the history in order, in batches of at most 1000 entries."""

    async def whole(self) -> SagaRecord:
        """Read all of it into memory."""
        return await self.rest("".join([piece async for piece in self.context()]))

    async def rest(self, context: str) -> SagaRecord:
        """Read what comes after the context into memory, beside the context, which has been read."""
        entries = [entry async for batch in self.entries() for entry in batch]
        head = self.head
        return SagaRecord(
            head.mark.id,
            head.name,
            head.status,
            context,
            head.mark.version,
            head.recovery_attempts,
            head.created_at,
            head.updated_at,
            entries,
        )


class Restored(StrEnum):
    """What came of a record that was to be restored."""

    RESTORED = "restored"
    """It is there now: in its stub, or as a new row."""
    SAME = "same"
    """The saga is there already, with the same content, and was left as it was."""
    OTHER = "other"
    """The saga, or a stub of it of another version or archive, is there, and was left as it was."""


@dataclass(frozen=True, slots=True)
class StubsMade:
    """What became stubs: now, and ``already`` by the same archive. Whatever else was asked for is as it was."""

    made: Sequence[UUID]
    already: Sequence[UUID] = ()


@dataclass(frozen=True, slots=True)
class SagaArchive:
    """A line of the ledger.

    Attributes:
        id: The caller's id for it.
        uri: Where its object is, without credentials; None if sagas are removed without one.
        state: How far it has come.
        by: Who archives.
        begun_at: When it was registered, by the database's clock.
        archived_at: When it was verified: no other archive's is the same, and its stubs have it.
        removed_at: When all of its sagas had become stubs.
        sha256: Of its object, 64 hexadecimal digits.
        sagas: How many it holds.
        entries: How many entries they have together.
        bytes: How big its object is.
        removed: How many of its sagas have become stubs by it.
        watermark: ``ExpiredPage.after`` where its walk ended; None: at the end.
        error: Why it failed.
    """

    id: UUID
    uri: str | None
    state: ArchiveState
    by: str
    begun_at: datetime
    archived_at: datetime | None = None
    removed_at: datetime | None = None
    sha256: str | None = None
    sagas: int = 0
    entries: int = 0
    bytes: int = 0
    removed: int = 0
    watermark: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ArchivePage:
    """Some lines of the ledger, newest first; ``after`` begins the next page, if there is one."""

    archives: list[SagaArchive]
    after: str | None = None


@dataclass(frozen=True, slots=True)
class SagaStub:
    """What is left of a saga that was let go; ``archive`` is None if the ledger doesn't know of one."""

    id: UUID
    name: str
    status: SagaStatus
    version: int
    created_at: datetime
    archived_at: datetime
    archive: SagaArchive | None


class ArchivingTurn(abc.ABC):
    """The turn of one archiver, as long as its connection lives."""

    @abc.abstractmethod
    async def check(self) -> None:
        """Raise StorageUnavailableError if the turn was lost with its connection."""


class RetentionSnapshot(abc.ABC):
    """One moment of all sagas, for one archive to be read."""

    @abc.abstractmethod
    async def find_expired(self, policy: Retention, *, after: str | None = None, limit: int = 1000) -> ExpiredPage:
        """List what the policy lets go: finished, unchanged for long enough, not held and no stub.

        Args:
            policy: How long sagas are kept.
            after: The ``after`` of the page before, of this snapshot or an earlier one; None begins.
            limit: At most this many, 1 to 10,000.

        Raises:
            InvalidSagaDataError: A negative duration, an impossible name or limit; ``after`` is no page's.
        """

    @abc.abstractmethod
    def read(self, sagas: Sequence[ExpiredSaga]) -> AsyncIterator[SagaReading]:
        """Yield these sagas in this order, whole, in bounded memory however big one of them is.

        What Python can't hold is left out.
        """
