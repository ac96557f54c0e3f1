"""What code that runs sagas needs of a storage: to begin one once, to work on it in runs, and to wait for it."""

import abc
from datetime import timedelta
from types import TracebackType
from typing import Self
from uuid import UUID

from saga_store.interface import ISagaStorage
from saga_store.model import Context, SagaExecution, SagaStart, SagaStatus


class ISagaRun(ISagaStorage):
    """A unit of work on one saga: its writes are buffered until ``commit()`` writes them as one checkpoint.

    Used in ``async with``. Between two commits nothing is held: no connection, no transaction, no lock. Instead the
    run remembers the version of the saga that it read first, and its writes are refused if somebody else has changed
    the saga since.

    - Reads see the run's own writes, whatever has become of them so far. A buffered log entry has a provisional id and
      time, the final ones are given when it is written; its time will be the one at which it was logged.
    - A write to a missing saga, a second create and bad input are refused at the call, not at the commit.
    - Several tasks may use it at once, those of a TaskGroup for instance: its calls take turns, so whatever was
      logged before a ``commit()`` is stored when that returns, and is stored once.
    - Leaving the run, normally or by an exception, drops what isn't committed, as a SQLAlchemy session
      does. Leaving it normally with something uncommitted also logs a warning, to the logger ``saga_store``.
    - With a storage that joins a transaction of the caller's, ``commit()`` writes into that, which remains the caller's
      to commit. So does ``commit(into=session)`` with any other storage.

    With a lease, the run takes it on entering, and is the only one until the lease ends:

    - It has to be entered with ``async with`` before it is used; otherwise its calls raise InvalidSagaDataError.
    - Entering raises SagaLeasedError if somebody else holds it. One that has expired, or is held by the same
      owner, is taken over. A saga that isn't there yet gets its lease with its creation.
    - Each commit renews it, in the same statement; ``heartbeat()`` does it for a step that takes long.
    - Leaving releases it, as does a commit that makes the saga COMPLETED or FAILED. That is seen through although
      the task is cancelled, be it again and again, as by anyio; it takes ten seconds at most, and then the
      cancellation goes on.
    - Once somebody else has got it, every write of this run raises SagaConcurrencyError, also after
      ``rollback()``, and nothing is written.

    A method that is given another saga's id raises InvalidSagaDataError.
    """

    @property
    @abc.abstractmethod
    def saga_id(self) -> UUID:
        """The saga that this is a run of."""

    @property
    @abc.abstractmethod
    def version(self) -> int | None:
        """The version that fences the next commit; None if the run has neither read nor created the saga.

        After a ``commit(into=...)`` it is the one that the commit led to, unless the transaction was rolled back.
        """

    @abc.abstractmethod
    async def __aenter__(self) -> Self: ...

    @abc.abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abc.abstractmethod
    async def create_saga(self, saga_id: UUID, name: str, context: Context) -> None:
        """Buffer the creation of the saga.

        Raises:
            SagaAlreadyExistsError: The run has seen or created the saga already. If somebody else has, that
                shows at the commit.
            InvalidSagaDataError: See ``saga_store.interface``.
        """

    @abc.abstractmethod
    async def update_context(self, saga_id: UUID, context: Context, *, expected_version: int | None = None) -> None:
        """Buffer the new context.

        Raises:
            SagaConcurrencyError: The run has seen another version than the expected one.
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See ``saga_store.interface``.
        """

    @abc.abstractmethod
    async def update_status(self, saga_id: UUID, status: SagaStatus, *, expected_version: int | None = None) -> None:
        """Buffer the new status.

        Raises:
            SagaConcurrencyError: The run has seen another version than the expected one.
            SagaNotFoundError: No saga has this id.
            InvalidSagaDataError: See ``saga_store.interface``.
        """

    @abc.abstractmethod
    async def commit(self, *, into: object = None) -> None:
        """Write what is buffered as one checkpoint, in one statement; with nothing buffered, do nothing.

        If the connection dies meanwhile, a storage that commits its own writes finds out by itself what came
        of it, and raises UnknownOutcomeError only if it couldn't in time.

        When it raises, everything stays buffered. After a cancellation, a timeout or UnknownOutcomeError what was sent
        may be stored. To commit again is safe then: the same is sent again first, under the same id, and is written
        once at most, log entries too; what has been buffered since is written after it.

        With ``into`` it becomes part of the caller's transaction, beside what else is written there: fenced by the
        run's version, and renewing its lease. When the transaction is committed, the run goes on from there. If it is
        rolled back, be it to a savepoint or because the connection was lost, the run's version is what it was, and
        the buffer is there again. If it isn't known which of the two happened, since the answer to COMMIT got lost,
        the next call looks, and the next ``commit()`` settles it: it recognises what is there, and writes the rest.
        Until the transaction ends, a commit that isn't into the same one is refused, and the lease isn't renewed
        otherwise: nobody else gets at the locked row.

        Args:
            into: An ``AsyncSession`` or ``AsyncConnection`` on the storage's database; a ``MemorySession`` on the
                twin's.

        Raises:
            SagaConcurrencyError: Somebody else has changed the saga since the run saw it.
            SagaAlreadyExistsError: The run creates the saga, and somebody else has created it.
            SagaNotFoundError: The saga was deleted since the run saw it.
            InvalidSagaDataError: ``into`` is nothing of the kind, is in autocommit, or is of another database; or the
                last commit is part of a transaction that is open still.
        """

    @abc.abstractmethod
    async def rollback(self) -> None:
        """Drop what isn't committed, and forget what was read: the next call reads the saga afresh.

        What a transaction of the caller's has got, stays in it; and what was sent may be stored, if a commit was
        cancelled or raised UnknownOutcomeError. The run goes on from there if it is.
        """

    @abc.abstractmethod
    async def heartbeat(self) -> None:
        """Renew the lease now, for as long as it was taken for; nothing buffered is written.

        Without a lease to renew, since the saga is finished or not created yet, it does nothing. Nor does it while the
        last commit is part of a transaction that is open: the row is locked, and the lease renewed in it.

        Raises:
            SagaConcurrencyError: Somebody else has got the lease, or has changed the saga.
            SagaNotFoundError: The saga was deleted.
            InvalidSagaDataError: This run was begun without a lease, or wasn't entered.
        """

    @abc.abstractmethod
    async def holds_lease(self) -> bool:
        """Ask the storage whether this run still holds the lease, by the database's clock.

        True can be out of date when it arrives; that a write is refused afterwards is certain.
        """


class IRunStorage(ISagaStorage):
    """A storage for code that runs sagas: it begins each once, works on it in runs, and waits for others' to end."""

    @abc.abstractmethod
    async def get_or_create_saga(self, saga_id: UUID, name: str, context: Context) -> SagaStart:
        """Create the saga unless it is there already, and say which of the two, and what is there.

        Atomic: of several callers with one id, exactly one is told that it has created the saga. A new saga takes one
        statement, as ``create_saga`` does; one that is there a second one. A saga that is there is left as it was: its
        context is returned, however it differs from the one given, since the saga has gone on meanwhile.

        Safe to repeat. If the connection dies meanwhile, a storage that commits its own writes finds out whether the
        saga was created by this call, and raises UnknownOutcomeError only if it couldn't in time.

        Args:
            saga_id: The caller's id for the saga, the same whenever it is asked for.
            name: What kind of saga it is, 1 to 255 characters.
            context: What a new saga starts from.

        Raises:
            SagaAlreadyExistsError: The id is taken by a saga of another name, which the error tells.
            SagaArchivedError: The saga was there, and has been archived and let go.
            InvalidSagaDataError: See ``saga_store.interface``.
        """

    @abc.abstractmethod
    async def wait_for_saga(self, saga_id: UUID, timeout: timedelta) -> SagaExecution:  # noqa: ASYNC109 - it cuts no statement short
        """Wait until the saga is COMPLETED or FAILED, whoever works on it, and return it.

        It is looked at once at least, and then now and then; all who wait in one process by one storage are looked
        for by one statement. Nothing is held between two looks, and cancelling the caller leaves nothing behind.

        Args:
            saga_id: The saga.
            timeout: How long to wait at most. A look that has begun isn't cut short.

        Raises:
            SagaTimeoutError: It isn't finished by then; it is a ``TimeoutError``.
            SagaNotFoundError: No saga has this id, or it was archived (``SagaArchivedError``) or deleted meanwhile.
            InvalidSagaDataError: The id is no UUID, ``timeout`` no timedelta or negative; or the storage joins a
                transaction, which would be open for as long.
        """

    @abc.abstractmethod
    def run(
        self,
        saga_id: UUID,
        *,
        write_ahead: bool = False,
        owner: str | None = None,
        lease: timedelta | None = None,
        renew: bool = False,
    ) -> ISagaRun:
        """Begin a unit of work on one saga, to be entered with ``async with``; nothing is read or written yet.

        Args:
            saga_id: The saga, which needn't be there yet.
            write_ahead: Commit at once when a step is logged as STARTED, so that a crash inside the step leaves
                a trace; it costs one more statement for each step.
            owner: Take the saga's lease for this owner, 1 to 255 characters.
            lease: For how long.
            renew: Renew the lease in the background, three times while it lasts, until the run is left. Only for
                a storage that commits its own writes. A step that hangs then keeps its saga for ever.

        Raises:
            InvalidSagaDataError: The id is no UUID; an owner without a lease, or a lease without an owner; ``renew``
                with a storage that joins a transaction.
        """
