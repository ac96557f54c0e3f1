"""Hears how transactions of the caller's end, for what a run has written in them.

SQLAlchemy tells of a ROLLBACK, and of a COMMIT before it is sent; after it, only a session tells. What nobody tells of,
the row does: see ``SagaRun``.
"""

import weakref
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from saga_store.errors import InvalidSagaDataError, StorageUnavailableError
from saga_store.joining import Fate, Part
from saga_store.sqlalchemy.binds import JoinedBind, in_autocommit
from saga_store.sqlalchemy.failures import reason, sqlstate


async def take_part(bind: JoinedBind, home: str | None) -> Part:
    """Return a part of the transaction that the bind joins, or is about to begin.

    Args:
        bind: The transaction.
        home: The database that the run's own storage is on, if that is known.
    """
    try:
        async with bind.connected() as connection:
            commits_itself = await in_autocommit(connection)
    except (SQLAlchemyError, OSError) as exc:
        raise StorageUnavailableError(f"couldn't get a connection: {reason(exc)}", sqlstate(exc)) from exc
    if commits_itself:
        raise InvalidSagaDataError(
            "into", "must be a transaction, and this connection is in autocommit; give it another isolation level"
        )
    there = connection.engine.url.database
    if home is not None and there is not None and home != there:
        raise InvalidSagaDataError("into", f"must be on the run's database, {home!r}, and is on {there!r}")
    assert connection.sync_connection is not None  # noqa: S101 - it is connected
    part = Part(connection.sync_connection)
    _follower(connection.sync_connection).follow(part)
    if isinstance(bind.joined, AsyncSession):
        _hear_session(bind.joined.sync_session, part)
    return part


class _Follower:
    """Follows the transactions of one connection, and the savepoints in them."""

    def __init__(self, connection: Connection) -> None:
        self._savepoints: weakref.WeakKeyDictionary[Part, frozenset[str]] = weakref.WeakKeyDictionary()
        self._connection = weakref.ref(connection)
        event.listen(connection, "commit", self._committing)
        event.listen(connection, "commit_twophase", self._committing)
        event.listen(connection, "rollback", self._rolled_back)
        event.listen(connection, "rollback_twophase", self._rolled_back)
        event.listen(connection, "rollback_savepoint", self._rolled_back_to)
        weakref.finalize(connection, self._end, Fate.UNKNOWN)

    def follow(self, part: Part) -> None:
        self._savepoints[part] = _savepoints_around(self._connection())

    def _committing(self, *_: object) -> None:
        self._end(Fate.COMMITTING)

    def _rolled_back(self, *_: object) -> None:
        self._end(Fate.ROLLED_BACK)

    def _rolled_back_to(self, _connection: Connection, name: str, _context: None) -> None:
        for part, savepoints in tuple(self._savepoints.items()):
            if part.is_open and name in savepoints:
                part.fate = Fate.ROLLED_BACK

    def _end(self, fate: Fate) -> None:
        for part in tuple(self._savepoints):
            if part.is_open:
                part.fate = fate
        self._savepoints.clear()


_followers: weakref.WeakKeyDictionary[Connection, _Follower] = weakref.WeakKeyDictionary()
_in_sessions: weakref.WeakKeyDictionary[Session, "weakref.WeakSet[Part]"] = weakref.WeakKeyDictionary()


def _follower(connection: Connection) -> _Follower:
    if connection not in _followers:
        _followers[connection] = _Follower(connection)
    return _followers[connection]


def _savepoints_around(connection: Connection | None) -> frozenset[str]:
    """Return the savepoints that are open: to roll back to one of them undoes what is written from now on."""
    names = set()
    # There is no public way from a savepoint to its name, nor to the one around it.
    savepoint: Any = connection and connection.get_nested_transaction()
    while savepoint is not None:
        names.add(savepoint._savepoint)  # noqa: SLF001 - see above
        savepoint = savepoint._previous_nested  # noqa: SLF001 - see above
    return frozenset(names)


def _hear_session(session: Session, part: Part) -> None:
    if session not in _in_sessions:
        _in_sessions[session] = weakref.WeakSet()
        event.listen(session, "after_commit", _committed)
        event.listen(session, "after_transaction_end", _ended)
    _in_sessions[session].add(part)


def _committed(session: Session) -> None:
    """The session's connections have committed; or have released a savepoint, and then none of them said COMMIT."""
    _decide(session, Fate.COMMITTED)


def _ended(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        _decide(session, Fate.UNKNOWN)


def _decide(session: Session, fate: Fate) -> None:
    parts = _in_sessions[session]
    for part in tuple(parts):
        if part.fate is Fate.COMMITTING:
            part.fate = fate
        if not part.is_open:
            parts.discard(part)
