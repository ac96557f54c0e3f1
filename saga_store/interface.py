"""The contract of a saga storage, told once.

``ISagaStorage`` is what a saga engine needs. ``ICheckpointStorage`` adds checkpoints and versions,
``IRecoveryStorage`` claims, ``IHistoryStorage`` histories that are read piece by piece,
``IInspectionStorage`` what a person looks for, ``IRetentionStorage`` archives, and ``IRunStorage`` (in
``run_interface``) what code that runs sagas needs. The storages of this package have all of it. Whoever implements one
of them can run ``saga_store.testing`` against it.

What holds for every method:

- **Durable.** When a write returns, it is stored: committed, if the storage owns the transaction; part of
  the caller's transaction, if the storage was bound to a session or a connection.
- **Atomic.** A write is stored whole or not at all, and history and state never disagree.
- **Definite.** A write returns, or raises an error that means that nothing was written, or raises
  ``UnknownOutcomeError``. A write to a missing saga is an error, never a silent no-op.
- **Ordered.** Writes to one saga take effect one after the other; the history is read in that order.
- **Copies.** Contexts are copied in and out; what the caller does to a dict afterwards changes nothing stored.
- **Together.** A storage may be made of shards, each with some of the sagas. Between sagas of one shard the ids of log
  entries are unique, and urgency decides who is claimed first; between others neither is promised, nor that views see
  both at one moment. Nor are they archived together: each shard has a ledger, a turn and a snapshot of its own, which
  are asked of the shard itself. A transaction of the caller's is on one shard. What is promised of one saga holds
  everywhere.
- **Checked.** Bad input raises ``InvalidSagaDataError`` before anything is sent: an id that is no
  ``uuid.UUID``; an empty name or one of more than 255 characters; text with NUL or a lone surrogate; a
  context that is no dict, has a key that is no string, NaN, an infinity, or a value that wouldn't come back
  equal from JSON, or that is nested more than 500 levels deep; an unknown status or action.

What the statuses mean. A storage takes any of them after any other. Whoever sees sagas through, an engine or code of
one's own, keeps to this; whoever reads them, a recovery, a view or a person, relies on it:

- **A saga's status says which way it goes, its history how far it has got.** It is PENDING until its first step begins,
  RUNNING on its way forward, and COMPENSATING on its way back, from which it doesn't turn round. That it turns back is
  one write with the end of the step that made it.
- **It ends as COMPLETED** when all its steps are done, **and as FAILED** when what was done is undone, or a person has
  given it up. Nobody claims either again: a saga of which something can't be undone yet stays COMPENSATING.
- **A step is STARTED**, in a write of its own before it does anything, **and then ends**. An ``act`` ends as COMPLETED,
  or as FAILED: it has done nothing, and won't. A ``compensate`` ends as COMPENSATED, or as FAILED: it isn't undone.
  (python-cqrs's engine writes COMPLETED for both; a reader takes either.)
- **The last entry of a step's ``act`` counts, and that of its ``compensate``.** If it is STARTED, the step is in doubt.
  On the way forward it is found out how it ended, or it is repeated under the same key; on the way back it is undone
  like one that is done, for it may have been. What raised an error that doesn't say that nothing was done is in doubt,
  too. An ``act`` that is COMPENSATED, since a person has undone and settled it, isn't done.

Any method may raise ``StorageUnavailableError`` and ``SchemaError``; any write ``UnknownOutcomeError``. Who asks for a
saga whose row can't be read, since something else than this package wrote it, gets ``SagaUnreadableError``; lists and
claims leave such a saga out, and log its id as a warning.
"""

import abc
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from uuid import UUID

from saga_store.inspection import (
    CONTEXT_SHOWN,
    HISTORY_SEEN,
    ContextPeek,
    InterventionPage,
    RecentHistory,
    SagaCount,
    SagaFigures,
    SagaGroup,
    SagaPage,
    SagaQuery,
)
from saga_store.model import Checkpoint, Context, SagaExecution, SagaLogEntry, SagaStatus, SagaStepStatus, StepAction
from saga_store.retention_model import (
    KEPT_AFTER_RESTORE,
    ArchivePage,
    ArchiveState,
    ArchivingTurn,
    Restored,
    Retention,
    RetentionSnapshot,
    SagaArchive,
    SagaMark,
    SagaRecord,
    SagaStub,
    StubsMade,
)

_ALL = SagaQuery()


class ISagaStorage(abc.ABC):
    """The six methods that a saga engine needs."""

    @abc.abstractmethod
    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        """Create a saga, PENDING and at version 1.

        Of several callers with one id, exactly one succeeds.

        Args:
            saga_id: The caller's id for the saga.
            name: What kind of saga it is, 1 to 255 characters.
            context: What the saga starts from.

        Raises:
            SagaAlreadyExistsError: The id is taken; the saga that has it is left as it was.
            InvalidSagaDataError: See the module.
        """

    @abc.abstractmethod
    async def update_context(self, saga_id: UUID, context: Context) -> None:
        """Replace the saga's context, whole, and raise its version by one.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See the module.
        """

    @abc.abstractmethod
    async def update_status(self, saga_id: UUID, status: SagaStatus) -> None:
        """Set the saga's status, and raise its version by one. Any status may follow any other.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See the module.
        """

    @abc.abstractmethod
    async def log_step(
        self,
        saga_id: UUID,
        step_name: str,
        action: StepAction,
        status: SagaStepStatus,
        details: str | None = None,
    ) -> None:
        """Append an entry to the saga's history. The version stays.

        Args:
            saga_id: The saga.
            step_name: Which step, 1 to 255 characters.
            action: Whether it acts or compensates.
            status: What became of it.
            details: What a person should know, such as the text of an error.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See the module.
        """

    @abc.abstractmethod
    async def load_saga_state(self, saga_id: UUID) -> tuple[SagaStatus, Context]:
        """Return the saga's status and context, as of one moment.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID.
        """

    @abc.abstractmethod
    async def get_step_history(self, saga_id: UUID) -> list[SagaLogEntry]:
        """Return the saga's history in the order in which it was written.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID.
        """


class IHistoryStorage(ISagaStorage):
    """A storage that reads a history of any length in bounded memory."""

    @abc.abstractmethod
    def iter_step_history(self, saga_id: UUID, *, batch_size: int = 1000) -> AsyncIterator[SagaLogEntry]:
        """Yield the saga's history in the order in which it was written, reading ``batch_size`` entries at a time.

        Nothing is held between two batches: no transaction, cursor or connection of the storage's own. So the
        caller may take its time, write to the saga meanwhile, or stop anywhere. Entries that are appended
        meanwhile may be seen or not; what is seen has no gaps, and is what ``get_step_history`` would have
        returned at some moment.

        Args:
            saga_id: The saga.
            batch_size: How many entries are in memory at once, at least 1.

        Raises:
            SagaNotFoundError: No saga has this id, or it was deleted meanwhile. Raised by the iteration.
            InvalidSagaDataError: The id is no UUID; ``batch_size`` is no int, or less than 1.
        """


class ICheckpointStorage(ISagaStorage):
    """A storage whose writes are checkpoints, with versions to fence them and a list of what to recover."""

    @abc.abstractmethod
    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        """Replace the saga's context, if it is still at ``expected_version``.

        Raises:
            SagaConcurrencyError: The saga is at another version; it was left as it was.
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See the module.
        """

    @abc.abstractmethod
    async def update_status(self, saga_id: UUID, status: SagaStatus, *, expected_version: int | None = None) -> None:
        """Set the saga's status, if it is still at ``expected_version``.

        Raises:
            SagaConcurrencyError: The saga is at another version; it was left as it was.
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See the module.
        """

    @abc.abstractmethod
    async def save(self, checkpoint: Checkpoint) -> int:
        """Write a checkpoint, all of it or nothing, in one statement.

        Returns:
            The saga's version afterwards: 1 for a new saga; one more than before if the checkpoint changes
            status, context or attempts; the same if it only adds to the history.

        Raises:
            SagaAlreadyExistsError: The checkpoint has a name, and its id is taken.
            SagaNotFoundError: The checkpoint has no name, and no saga has its id.
            SagaConcurrencyError: The saga isn't at the expected version. Of several callers that expect
                the same version, at most one changes the saga.
            InvalidSagaDataError: See the module; also a checkpoint that writes nothing, or one that
                creates a saga and expects a version of it.
        """

    @abc.abstractmethod
    async def get_saga(self, saga_id: UUID) -> SagaExecution:
        """Return the saga's whole row.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID.
        """

    @abc.abstractmethod
    async def find_stale_sagas(
        self,
        *,
        stale_after: timedelta,
        limit: int = 100,
        name: str | None = None,
        max_attempts: int = 5,
    ) -> list[SagaExecution]:
        """List the sagas that look interrupted; nothing is locked or claimed, so two callers may see the same.

        Args:
            stale_after: Only sagas that haven't changed for this long, by the database's clock.
            limit: At most this many.
            name: Only sagas of this name.
            max_attempts: Only sagas with fewer recovery attempts than this.

        Returns:
            Sagas that are PENDING, RUNNING or COMPENSATING and whose lease, if any, has expired: those with
            the fewest attempts first, and of these those that haven't changed for longest.

        Raises:
            InvalidSagaDataError: A negative duration, limit or number of attempts; an impossible name.
        """


class IRecoveryStorage(ICheckpointStorage):
    """A storage that hands each interrupted saga to one worker at a time, and tells what became of the rest.

    A *lease* says who works on a saga, and until when by the database's clock. Whoever claims it, takes it,
    releases it or breaks it raises the saga's version, so that a former holder's next write is refused with
    SagaConcurrencyError. A saga that becomes COMPLETED or FAILED loses its lease in the same write.
    """

    @abc.abstractmethod
    async def claim_sagas(  # noqa: PLR0913 - who, how many and which are one question, and all keywords
        self,
        *,
        owner: str,
        lease: timedelta,
        limit: int,
        stale_after: timedelta,
        name: str | None = None,
        max_attempts: int = 5,
        backoff: timedelta = timedelta(seconds=10),
        max_backoff: timedelta = timedelta(hours=1),
    ) -> list[SagaExecution]:
        """Claim interrupted sagas: lease them to ``owner``, and count an attempt for each.

        Atomic and exclusive: of several callers each saga goes to one. Nobody is waited for: a saga that
        somebody is just writing to is left out.

        Args:
            owner: Who claims, 1 to 255 characters; no two live workers may share a name.
            lease: How long the claim holds unless it is renewed.
            limit: At most this many.
            stale_after: Only sagas whose version hasn't risen for this long.
            name: Only sagas of this name.
            max_attempts: Only sagas with fewer recovery attempts than this.
            backoff: How much longer than ``stale_after`` a saga has to wait after its first attempt; about
                twice as long after each further one (once, three times, seven times ``backoff``).
            max_backoff: The most that this comes to.

        Returns:
            The sagas as they are now, in the order of ``find_stale_sagas``; of sagas in several shards, those with the
            fewest attempts before first.

        Raises:
            UnknownOutcomeError: The connection died; sagas may have been claimed, until the lease expires.
            InvalidSagaDataError: A negative duration, limit or number of attempts; an impossible name or owner.
        """

    @abc.abstractmethod
    async def find_exhausted_sagas(
        self, *, limit: int = 100, name: str | None = None, max_attempts: int = 5
    ) -> list[SagaExecution]:
        """List the unfinished sagas that nobody claims any more, those that haven't changed for longest first.

        Args:
            limit: At most this many.
            name: Only sagas of this name.
            max_attempts: Only sagas with this many recovery attempts, or more.

        Returns:
            Whole rows, with the attempts; none that is under a lease, for its last attempt isn't over.

        Raises:
            InvalidSagaDataError: A negative limit or number of attempts; an impossible name.
        """

    @abc.abstractmethod
    async def get_in_doubt_steps(self, saga_id: UUID) -> list[SagaLogEntry]:
        """Return the entries of steps that have STARTED, and of which nothing says how they ended.

        A step is in doubt until an entry with the same step name and action, but another status, follows it. One that
        was begun several times is listed with each, and they end together.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID.
        """

    @abc.abstractmethod
    async def give_up_saga(self, saga_id: UUID, *, by: str, reason: str, expected_version: int | None = None) -> None:
        """Make an unfinished saga FAILED, whoever works on it, so that it isn't claimed any more.

        This and the other two are for a person. In the same write the history gets an entry: its step is
        ``saga_store.give_up_saga`` (``saga_store.`` and the method's name), its details are JSON with
        ``by``, ``reason``, and what was there before: ``status``, ``recovery_attempts``, ``lease_owner``.

        Args:
            saga_id: The saga.
            by: Who decides this, 1 to 255 characters.
            reason: Why.
            expected_version: Only if the saga is still at this version, which whoever decides has seen.

        Raises:
            SagaNotFoundError: No saga has this id.
            SagaConcurrencyError: The saga is at another version; it was left as it was.
            InvalidSagaDataError: The saga is COMPLETED or FAILED already; nobody or no reason is given.
        """

    @abc.abstractmethod
    async def reset_recovery_attempts(
        self, saga_id: UUID, *, by: str, reason: str, expected_version: int | None = None
    ) -> None:
        """Set the attempts to zero, so that an exhausted saga is claimed again; recorded in the history.

        Raises:
            SagaNotFoundError: No saga has this id.
            SagaConcurrencyError: The saga isn't at ``expected_version``; it was left as it was.
            InvalidSagaDataError: The saga is COMPLETED or FAILED already; nobody or no reason is given.
        """

    @abc.abstractmethod
    async def break_lease(self, saga_id: UUID, *, by: str, reason: str, expected_version: int | None = None) -> None:
        """Take the lease from its holder, whose next write will be refused; recorded in the history.

        Renewing a lease leaves the version, so the holder may go on meanwhile as long as it writes nothing else.

        Raises:
            SagaNotFoundError: No saga has this id.
            SagaConcurrencyError: The saga isn't at ``expected_version``; it was left as it was.
            InvalidSagaDataError: The saga is under no lease; nobody or no reason is given.
        """


class IInspectionStorage(ISagaStorage):
    """A storage that shows its sagas to a person, and lets that person say how a step in doubt ended.

    The views read one moment (of each shard, if there are several), lock nothing, and load no context unless the query
    asks for a field of it. What they leave out to be cheap, and what they estimate, they say.
    """

    @abc.abstractmethod
    async def find_sagas(self, query: SagaQuery = _ALL, *, limit: int = 50, after: str | None = None) -> SagaPage:
        """List the sagas that are asked for, newest first, a page at a time.

        Pages follow each other by creation time and id, so that no saga comes twice or is missed because others
        are created or finish meanwhile.

        Args:
            query: Which sagas; all of them unless it says otherwise.
            limit: At most this many, 1 to 1000.
            after: The ``after`` of the page before; None begins.

        Raises:
            InvalidSagaDataError: Something in the query is impossible, or ``after`` is no page's.
        """

    @abc.abstractmethod
    async def count_sagas(self, query: SagaQuery = _ALL) -> SagaCount:
        """Count the sagas that are asked for, up to 100,000.

        Of finished sagas it counts those of the last 24 hours, unless the query says ``created_after``.

        Raises:
            InvalidSagaDataError: Something in the query is impossible.
        """

    @abc.abstractmethod
    async def group_sagas(self, query: SagaQuery = _ALL, *, limit: int = 50) -> list[SagaGroup]:
        """Group the sagas that are asked for by condition, name, step and error, the biggest groups first.

        Of unfinished sagas it looks at the 5,000 oldest, of COMPLETED and of FAILED ones at the 5,000 newest.

        Args:
            query: Which sagas; all of them unless it says otherwise.
            limit: At most this many groups.

        Raises:
            InvalidSagaDataError: Something in the query is impossible.
        """

    @abc.abstractmethod
    async def find_interventions(
        self, *, since: datetime, by: str | None = None, limit: int = 50, after: str | None = None
    ) -> InterventionPage:
        """List what persons did to sagas, newest first, a page at a time.

        Args:
            since: Only what was done at this time or later.
            by: Only what this person did.
            limit: At most this many, 1 to 1000.
            after: The ``after`` of the page before; None begins.

        Raises:
            InvalidSagaDataError: A time without a zone, an impossible name or limit; ``after`` is no page's.
        """

    @abc.abstractmethod
    async def get_recent_history(self, saga_id: UUID, *, limit: int = HISTORY_SEEN, after: int = 0) -> RecentHistory:
        """Return the end of a saga's history in bounded memory: the last entries, their details cut.

        Args:
            saga_id: The saga.
            limit: At most this many entries, 1 to 1000.
            after: Only entries with a greater id than this; whoever follows a saga gives that of the last one seen.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID; an impossible limit; ``after`` is no int, or negative.
        """

    @abc.abstractmethod
    async def peek_context(self, saga_id: UUID, *, most: int = CONTEXT_SHOWN) -> ContextPeek:
        """Return a saga's context in bounded memory, or only its size if it has more than ``most`` bytes as JSON.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The id is no UUID; ``most`` is no int, or negative.
        """

    @abc.abstractmethod
    async def get_figures(
        self,
        *,
        stale_after: timedelta = timedelta(minutes=10),
        max_attempts: int = 5,
        retention: Retention | None = None,
    ) -> SagaFigures:
        """Count what is worth counting all day.

        Args:
            stale_after: After how much silence a saga counts as stale.
            max_attempts: After how many recovery attempts one counts as exhausted.
            retention: The policy that sagas are let go by, to tell how far that lags behind.

        Raises:
            InvalidSagaDataError: A negative duration or number of attempts, an impossible policy.
        """

    @abc.abstractmethod
    async def settle_step(  # noqa: PLR0913 - what is settled, and who says so
        self,
        saga_id: UUID,
        entry_id: int,
        status: SagaStepStatus,
        *,
        by: str,
        reason: str,
        expected_version: int | None = None,
    ) -> None:
        """Say how a step in doubt ended, whoever works on the saga.

        For a person, who has looked at what the step did. One write appends the outcome, and under
        ``saga_store.settle_step`` a record as the other interventions have it, with ``entry_id``, ``step_name``,
        ``action`` and ``outcome``; raises the version; and ends the lease, so that whoever works on the saga is
        refused. Of two persons that settle one step, one is refused. An end is that of all attempts at the step that
        have begun before it: the last one is settled, by whoever has looked at what any of them did.

        Args:
            saga_id: The saga.
            entry_id: The entry that is in doubt, one of ``get_in_doubt_steps``; of several attempts the last.
            status: COMPLETED, FAILED or COMPENSATED.
            by: Who says so, 1 to 255 characters.
            reason: How they know.
            expected_version: Only if the saga is still at this version.

        Raises:
            SagaNotFoundError: No saga has this id.
            SagaConcurrencyError: The saga is at another version; it was left as it was.
            InvalidSagaDataError: The entry isn't in doubt, any more or at all, or isn't this saga's, or a later attempt
                at the same step is in doubt, too; the status is no end; nobody or no reason is given.
        """


class IRetentionStorage(ISagaStorage):
    """A storage that lets finished sagas go, once they are archived, and takes them back.

    A saga that was let go leaves a *stub*. Whoever reads it or writes to it gets SagaArchivedError, and whoever creates
    it again SagaAlreadyExistsError; nothing is ever written to it. docs/retention.md has the protocol that archives
    follow, and every interleaving.

    A storage that is made of shards holds, finds, restores and forgets, and reads any shard's ledger by the id of an
    archive. Whoever archives asks each shard by itself, and gets InvalidSagaDataError from the whole.
    """

    @abc.abstractmethod
    async def hold_saga(self, saga_id: UUID, *, by: str, reason: str, until: datetime | None = None) -> None:
        """Keep the saga, whatever any policy says; recorded in the history.

        Whoever works on the saga isn't fenced: the version stays. A later hold takes the place of this one.

        Args:
            saga_id: The saga, finished or not.
            by: Who decides this, 1 to 255 characters.
            reason: Why.
            until: Until when, in the future by the database's clock; None: until it is released.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: A time without a zone or in the past; no person or no reason is given.
        """

    @abc.abstractmethod
    async def release_saga(self, saga_id: UUID, *, by: str, reason: str) -> None:
        """End a hold; recorded in the history.

        Raises:
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: The saga isn't held; no person or no reason is given.
        """

    @abc.abstractmethod
    def archiving(self, *, by: str) -> AbstractAsyncContextManager[ArchivingTurn]:
        """Take the turn of the one archiver at a time, until it is left; for a storage that commits its own calls.

        It spares two of them each other's work. Nothing depends on it for safety.

        Raises:
            ArchiverBusyError: Another archiver has it.
            InvalidSagaDataError: The storage joins a transaction; an impossible name.
        """

    @abc.abstractmethod
    def snapshot(self) -> AbstractAsyncContextManager[RetentionSnapshot]:
        """Give one moment of all sagas to read; for a storage that commits its own calls.

        It keeps a connection, and the server keeps what is deleted meanwhile, so leave it soon.

        Raises:
            InvalidSagaDataError: The storage joins a transaction.
        """

    @abc.abstractmethod
    async def begin_archive(self, archive_id: UUID, *, uri: str | None, by: str) -> SagaArchive:
        """Register an archive before anything of it is written; it is WRITING.

        Args:
            archive_id: The caller's id for it.
            uri: Where its object will be, without credentials; None if sagas are removed without one.
            by: Who archives, 1 to 255 characters.

        Raises:
            InvalidSagaDataError: The id is taken; an impossible URI or name.
        """

    @abc.abstractmethod
    async def verify_archive(  # noqa: PLR0913 - what is known of an object, all keywords
        self,
        archive_id: UUID,
        *,
        sha256: str | None,
        sagas: int,
        entries: int,
        bytes: int,  # noqa: A002 - what it counts, as in the ledger
        watermark: str | None,
    ) -> SagaArchive:
        """Say that the archive's object was read back and is right; it is VERIFIED, if it was WRITING.

        Its ``archived_at`` is drawn: the database's time, greater than that of every archive before.

        Args:
            archive_id: The archive.
            sha256: Of its object, 64 hexadecimal digits; None without one.
            sagas: How many it holds.
            entries: How many entries they have together.
            bytes: How big its object is.
            watermark: Where its walk ended, as in ``ExpiredPage.after``.

        Raises:
            InvalidSagaDataError: There is no such archive, or it isn't WRITING; something else is impossible.
        """

    @abc.abstractmethod
    async def fail_archive(self, archive_id: UUID, *, error: str) -> SagaArchive:
        """Give up an archive that is WRITING or VERIFIED; it is FAILED.

        Raises:
            InvalidSagaDataError: There is no such archive, or it is REMOVED.
        """

    @abc.abstractmethod
    async def finish_archive(self, archive_id: UUID) -> SagaArchive:
        """Say that nothing more becomes a stub by a VERIFIED archive; it is REMOVED.

        Raises:
            InvalidSagaDataError: There is no such archive, or it isn't VERIFIED.
        """

    @abc.abstractmethod
    async def get_archive(self, archive_id: UUID) -> SagaArchive:
        """Return a line of the ledger.

        Raises:
            InvalidSagaDataError: There is no such archive.
        """

    @abc.abstractmethod
    async def find_archives(
        self, *, states: Sequence[ArchiveState] = (), limit: int = 50, after: str | None = None
    ) -> ArchivePage:
        """List the ledger, newest first, a page at a time.

        Args:
            states: In one of these states; empty: in any.
            limit: At most this many, 1 to 1000.
            after: The ``after`` of the page before.

        Raises:
            InvalidSagaDataError: An unknown state, an impossible limit; ``after`` is no page's.
        """

    @abc.abstractmethod
    async def find_stub(self, saga_id: UUID) -> SagaStub | None:
        """Return what is left of a saga that was let go; None if it wasn't, or isn't there at all."""

    @abc.abstractmethod
    async def make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade:
        """Let sagas go that are in a VERIFIED archive and have not changed since they were read; in one transaction.

        Exactly those become stubs that have the version, the number of entries and the last entry of their marks, are
        finished and not held. No row is waited for: one that is locked isn't touched. ``removed`` of the archive counts
        what became a stub. Repeating the call is safe, and tells what its first attempt did.

        Args:
            archive_id: The archive.
            marks: What its sagas were when they were read, at most 10,000.

        Raises:
            InvalidSagaDataError: There is no such archive, or it isn't VERIFIED; something is no mark, or too many are.
            UnknownOutcomeError: The connection died, and trying again didn't help.
        """

    @abc.abstractmethod
    async def restore_saga(
        self, record: SagaRecord, *, archive_id: UUID | None = None, keep_for: timedelta = KEPT_AFTER_RESTORE
    ) -> Restored:
        """Do what ``restore_sagas`` does, for one saga."""

    @abc.abstractmethod
    async def restore_sagas(
        self,
        records: Sequence[SagaRecord],
        *,
        archive_id: UUID | None = None,
        keep_for: timedelta = KEPT_AFTER_RESTORE,
    ) -> list[Restored]:
        """Put sagas back as their records have them, into their stubs or as new rows; all in one transaction.

        In its stub a saga's entries have the ids that they had, if those are free; else they get new ones, in order.
        What was written to the history of a stub past this package comes after them.

        Args:
            records: The sagas.
            archive_id: The archive that has the records. Then none goes into the stub of another one: that may have a
                longer history at the same version. None: the caller knows that they are the latest.
            keep_for: For how long they are held, so that the next archive leaves them; zero: not at all.

        Returns:
            What came of each. One that is there already, with whatever content, is left as it was; so is a stub of
            another version or archive.

        Raises:
            InvalidSagaDataError: Something is no record, or an impossible one: unfinished, its context no JSON object.
        """

    @abc.abstractmethod
    async def forget_stubs(self, *, older_than: timedelta, limit: int = 1000) -> int:
        """Delete stubs of archives that are older than this, the oldest archives first; call it until it returns 0.

        Their ids are free then. A stub that an application's table refers to stays, and one that has entries again.

        Args:
            older_than: For how long they have been stubs at least, by the database's clock.
            limit: At most this many.

        Returns:
            How many were deleted.

        Raises:
            InvalidSagaDataError: A negative duration or limit.
        """

    async def forget_all_stubs(self, *, older_than: timedelta, at_once: int = 1000) -> AsyncIterator[int]:
        """Delete what ``forget_stubs`` deletes, all of it, in batches; yield how many each of them deleted.

        What stays is passed over once, and not again for each batch.

        Args:
            older_than: For how long they have been stubs at least, by the database's clock.
            at_once: At most this many in a batch.

        Raises:
            InvalidSagaDataError: A negative duration; a batch of none.
        """
        while gone := await self.forget_stubs(older_than=older_than, limit=at_once):
            yield gone
