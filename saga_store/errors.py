"""What can go wrong with a saga storage.

Every error that a storage raises is one of these::

    SagaStoreError
    ├── SagaNotFoundError        no saga has this id                 nothing was written
    │   └── SagaArchivedError    it was archived and let go          nothing was written
    ├── SagaAlreadyExistsError   the id is taken                     nothing was written
    ├── SagaConcurrencyError     somebody wrote in between           nothing was written
    ├── SagaLeasedError          somebody else works on it           nothing was written
    ├── SagaUnreadableError      its row is broken                   it was read, nothing else
    ├── SagaTimeoutError         it took longer than was waited      it was read, nothing else
    ├── InvalidSagaDataError     refused before any SQL              nothing was written
    ├── ArchiverBusyError        another archiver has the turn       nothing was written
    ├── ShardingError            these aren't the shards they were   nothing was read or written
    ├── StorageUnavailableError  the database couldn't do it         nothing was written
    ├── SchemaError              tables missing or too old           nothing was written
    └── UnknownOutcomeError      the connection died mid-write       written wholly or not at all

A write that raised anything but ``UnknownOutcomeError`` left no trace. Each error carries its facts as
attributes and survives pickling; the database's own error, if there was one, is its ``__cause__``.
"""

import shlex
from datetime import datetime, timedelta
from uuid import UUID


class SagaStoreError(Exception):
    """Base of every error that a saga storage raises."""


class SagaNotFoundError(SagaStoreError):
    """No saga has this id (or its creation hasn't been committed yet)."""

    def __init__(self, saga_id: UUID) -> None:
        super().__init__(saga_id)
        self.saga_id = saga_id

    def __str__(self) -> str:
        return f"there is no saga {self.saga_id}; create it first, and commit if a transaction of yours created it"


class SagaArchivedError(SagaNotFoundError):
    """The saga was let go: of its row a stub is left, and its record is in ``archive``.

    ``archive`` is the URI of the archive; None if it was removed without one, or its ledger can't be read.
    """

    def __init__(self, saga_id: UUID, archive: str | None, archived_at: datetime) -> None:
        super().__init__(saga_id)
        self.args: tuple[object, ...] = (saga_id, archive, archived_at)
        self.archive = archive
        self.archived_at = archived_at

    def __str__(self) -> str:
        if self.archive is None:
            return (
                f"saga {self.saga_id} was removed on {self.archived_at.isoformat()}, and no archive of it is known; "
                f"look for its record by `saga-store restore {self.saga_id}`"
            )
        return (
            f"saga {self.saga_id} was archived on {self.archived_at.isoformat()}, to {self.archive}; "
            f"`saga-store restore {self.saga_id}` brings it back"
        )


class SagaAlreadyExistsError(SagaStoreError):
    """The id is taken by another saga, which was left as it was.

    ``name`` is that saga's, where it was asked for one of another name; otherwise None.
    """

    def __init__(self, saga_id: UUID, name: str | None = None) -> None:
        super().__init__(saga_id, name)
        self.saga_id = saga_id
        self.name = name

    def __str__(self) -> str:
        if self.name is not None:
            return (
                f"saga {self.saga_id} exists already under the name {self.name!r}, and was left as it was; ask for it "
                "under that name, or use ids that differ for each kind of saga"
            )
        return f"saga {self.saga_id} exists already and was left as it was; load it to resume it, or use a new id"


class SagaConcurrencyError(SagaStoreError):
    """The stored version isn't the expected one: somebody else wrote in between."""

    def __init__(self, saga_id: UUID, expected: int, actual: int) -> None:
        super().__init__(saga_id, expected, actual)
        self.saga_id = saga_id
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return (
            f"saga {self.saga_id} is at version {self.actual}, not at the expected version {self.expected}: "
            "somebody else wrote in between; load it again and decide anew"
        )


class SagaLeasedError(SagaStoreError):
    """Somebody else holds the saga's lease: ``owner``, until ``expires_at`` by the database's clock."""

    def __init__(self, saga_id: UUID, owner: str, expires_at: datetime) -> None:
        super().__init__(saga_id, owner, expires_at)
        self.saga_id = saga_id
        self.owner = owner
        self.expires_at = expires_at

    def __str__(self) -> str:
        return (
            f"saga {self.saga_id} is leased to {self.owner!r} until {self.expires_at.isoformat()}; leave it to them, "
            "or try again after that"
        )


class SagaUnreadableError(SagaStoreError):
    """What is stored of a saga can't be read, since something else than this package wrote it; ``reason`` says what.

    Only reading is in the way: the saga can be written to, and be given up.
    """

    def __init__(self, saga_id: UUID, reason: str) -> None:
        super().__init__(saga_id, reason)
        self.saga_id = saga_id
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"saga {self.saga_id} is stored, but can't be read: {self.reason}; mend its row by SQL, or give it up with "
            "give_up_saga()"
        )


class SagaTimeoutError(SagaStoreError, TimeoutError):
    """The saga wasn't finished when ``waited`` was over; it had ``status`` by then, and whoever works on it goes on."""

    def __init__(self, saga_id: UUID, waited: timedelta, status: str) -> None:
        super().__init__()
        self.args: tuple[object, ...] = (saga_id, waited, status)
        self.saga_id = saga_id
        self.waited = waited
        self.status = status

    def __str__(self) -> str:
        return (
            f"saga {self.saga_id} is still {self.status} after {self.waited.total_seconds():g} s, and goes on; wait "
            "again, or look with get_step_history() how far it is"
        )


class InvalidSagaDataError(SagaStoreError, ValueError):
    """A value that no storage accepts; ``field`` says which, ``reason`` why and what to do."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field} {self.reason}"


class ArchiverBusyError(SagaStoreError):
    """Another archiver is at work; ``holder`` says which, as far as the server tells."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder

    def __str__(self) -> str:
        return f"another archiver is at work ({self.holder}): let it finish, or look why it doesn't"


class ShardingError(SagaStoreError):
    """The storages of a ShardedSagaStorage aren't the shards that their databases record; ``reason`` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"nothing was read or written: {self.reason}"


class StorageUnavailableError(SagaStoreError):
    """The database couldn't be reached, or refused the statement; nothing was written.

    On a session or connection bind the surrounding transaction is lost too, and has to be rolled back.
    ``sqlstate`` is PostgreSQL's five-letter code, if it sent one.
    """

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        super().__init__(reason, sqlstate)
        self.reason = reason
        self.sqlstate = sqlstate

    def __str__(self) -> str:
        code = f" (SQLSTATE {self.sqlstate})" if self.sqlstate else ""
        return f"nothing was written{code}: {self.reason}"


class UnknownOutcomeError(SagaStoreError):
    """The connection died while the write was under way: it was written wholly, or not at all.

    ``saga_id`` is None if it was a claim, which doesn't know its sagas before it succeeds.
    """

    def __init__(self, saga_id: UUID | None) -> None:
        super().__init__(saga_id)
        self.saga_id = saga_id

    def __str__(self) -> str:
        if self.saga_id is None:
            return (
                "the connection died while sagas were being claimed, and whether they were is unknown; "
                "claim again: what this claim may have got can be claimed once its lease has expired"
            )
        return (
            f"the connection died while saga {self.saga_id} was being written, and whether it was is unknown; "
            "load the saga and its history to find out before writing again"
        )


class SchemaError(SagaStoreError):
    """The tables are missing or too old for this release.

    ``found`` is the revision that the database records (None: none, or it couldn't be read), ``needed``
    the one that this release wants, ``command`` what brings the database there. ``schema`` is where the tables
    were looked for; None: along the connection's search path.
    """

    def __init__(
        self, found: str | None, needed: str, command: str = "saga-store upgrade", schema: str | None = None
    ) -> None:
        super().__init__(found, needed, command, schema)
        self.found = found
        self.needed = needed
        self.command = command
        self.schema = schema

    def __str__(self) -> str:
        where, named, alembic = "", "", ""
        if self.schema is not None:
            where, named = f" in schema {self.schema!r}", f" --schema {shlex.quote(self.schema)}"
            alembic = f" -x schema={shlex.quote(self.schema)}"
        return (
            f"the saga tables{where} are missing or too old: found revision {self.found or 'none'}, need "
            f"{self.needed}; run `{self.command}{named}` against this database, or `alembic{alembic} upgrade head` in "
            "a checkout"
        )
