"""Refuses to migrate through a pooler that gives each transaction whichever of the server's sessions is free.

There the migration lock and the timeouts would be set in one session, and the statements run in another. A pooler
gives itself away, since the process id that it told the client isn't the server's. Whether it shares sessions is
found out with a second client: a session that is the first client's alone can neither turn up at the second's,
nor change.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.pool import PoolProxiedConnection

from saga_store.schema.settings import MigrationError
from saga_store.sqlalchemy.failures import POOLED_CODES, reason, sqlstate
from saga_store.sqlalchemy.pooler import told_pid

# Besides, what a pooler says that allows no transactions.
_SHARED_CODES = POOLED_CODES | {"08P01"}
_ROUNDS = 20
_PATIENCE_SECONDS = 5.0

_REFUSED = (
    "the connection leads through a pooler, such as PgBouncer in transaction mode, {why}: the migration lock and the "
    "timeouts would be lost between two transactions. Give the URL of PostgreSQL itself, or of a pool in session mode"
)


def refuse_shared_sessions(connection: Connection) -> None:
    """Raise MigrationError if the connection doesn't keep its session of the server, or can't be shown to."""
    with connection.begin():
        pid = _server_pid(connection)
    if pid == told_pid(connection.connection.driver_connection):
        return
    try:
        shared = _is_shared(connection, pid)
    except Exception as exc:
        raise explained(exc) or MigrationError(
            _REFUSED.format(why=f"which can't be shown to keep sessions apart ({reason(exc)})")
        ) from exc
    if shared:
        raise MigrationError(_REFUSED.format(why="which shares sessions of the server"))


def explained(exc: BaseException) -> MigrationError | None:
    """Return what an error means that only such a pooler causes; None for any other."""
    return MigrationError(_REFUSED.format(why=f"which said: {reason(exc)}")) if sqlstate(exc) in _SHARED_CODES else None


def _is_shared(connection: Connection, pid: int) -> bool:
    with _second_client(connection) as ask:
        for _ in range(_ROUNDS):
            # The second client takes the session that was given back last, if it is to be had, and keeps it while the
            # first one asks again.
            with ask() as other:
                if other == pid:
                    return True
                with connection.begin():
                    if _server_pid(connection) != pid:
                        return True
    return False


@contextlib.contextmanager
def _second_client(connection: Connection) -> "Iterator[Callable[[], contextlib.AbstractContextManager[int]]]":
    """Yield a function for the process id that a client of its own gets, for as long as its transaction lasts."""
    pool = connection.engine.pool.recreate()  # connects in the same way, and has no limit reached
    second = pool.connect()

    @contextlib.contextmanager
    def ask() -> Iterator[int]:
        cursor = second.cursor()
        try:
            # In session mode it may have to wait for a session until the first client leaves.
            with _cut_off_after(_PATIENCE_SECONDS, second):
                cursor.execute("SELECT pg_backend_pid()")
            row = cursor.fetchone()
            yield int(row[0])  # type: ignore[index] # there is one
        finally:
            cursor.close()
        second.rollback()

    try:
        yield ask
    finally:
        second.invalidate()
        pool.dispose()


@contextlib.contextmanager
def _cut_off_after(seconds: float, connection: PoolProxiedConnection) -> Iterator[None]:
    """End a connection that doesn't answer in time; neither driver has a timeout that is the client's own."""
    driver: Any = connection.driver_connection
    timer: asyncio.TimerHandle | threading.Timer
    if hasattr(driver, "terminate"):  # asyncpg
        timer = asyncio.get_running_loop().call_later(seconds, driver.terminate)
    else:
        timer = threading.Timer(seconds, _cut, [driver.fileno()])
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cut(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as wire:
        wire.shutdown(socket.SHUT_RDWR)


def _server_pid(connection: Connection) -> int:
    return int(connection.scalar(text("SELECT pg_backend_pid()")) or 0)
