"""The schema from Python: what ``alembic`` does from the checkout, wherever the package is installed.

Every function that needs a database takes it as ``bind``: a URL (``postgresql+psycopg://``, ``postgresql+asyncpg://``,
or one that leaves the driver to us), an ``Engine``, or a ``Connection`` that isn't in a transaction. From async code,
``await connection.run_sync(schema.upgrade)``. What goes wrong is a ``MigrationError``, or SQLAlchemy's own.
"""

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from saga_store.schema.connections import Bind, connected, connected_async
from saga_store.schema.fingerprint import Check, State, check_connection
from saga_store.schema.privileges import check_grants, require_readable
from saga_store.schema.scripts import make_config, recorded_revision
from saga_store.schema.session import enter_schema, warn_of_elsewhere
from saga_store.schema.settings import LOCK_WAIT, MigrationError, MigrationLockError, Progress, Report, Settings

__all__ = [
    "Bind",
    "Check",
    "MigrationError",
    "MigrationLockError",
    "Progress",
    "Revision",
    "State",
    "acheck",
    "check",
    "check_grants",
    "current",
    "downgrade",
    "history",
    "sql",
    "stamp",
    "upgrade",
]

# Alembic's context is a global of the process.
_RUNNING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of the schema: its id, the one before it (None: it is the first), and what it does."""

    revision: str
    down_revision: str | None
    description: str


def upgrade(  # noqa: PLR0913 - few of its callers need more than the first
    bind: Bind,
    revision: str = "head",
    *,
    schema: str | None = None,
    create_schema: bool = False,
    lock_wait: timedelta = LOCK_WAIT,
    report: Report | None = None,
) -> list[str]:
    """Bring the database up to a revision, and return the ids of those that were applied, in order.

    One process at a time migrates; others wait for it, and then find nothing left to do. Each revision is committed
    before the next begins, and can be run again after a failure or a kill at any point: what was done is kept, what
    wasn't is done.

    Args:
        bind: The database; see the module.
        revision: An id, ``head``, or a number of steps such as ``+1``.
        schema: Where the tables are; None for the first schema of the session's search_path that exists.
        create_schema: Whether to create that schema if it isn't there.
        lock_wait: How long to wait, in all, for another migration to end, and then in each revision for the tables.
        report: Called with the progress of work that may take long; without it, that is logged now and then.

    Raises:
        MigrationLockError: The wait was in vain; the message names the sessions that hold what was waited for.
        MigrationError: The database can't be reached, or can't be migrated like this.
    """
    settings = Settings(schema, create_schema, lock_wait)
    return _run(bind, settings, lambda config: command.upgrade(config, revision), report)


def downgrade(bind: Bind, revision: str, *, schema: str | None = None, lock_wait: timedelta = LOCK_WAIT) -> list[str]:
    """Take the database back to a revision (``base``: to none), and return the ids of those that were undone.

    Arguments, guarantees and errors are those of ``upgrade``. What a revision added is lost, ``base`` drops the tables.
    Where no revision is recorded, there is nothing to take back, and it raises MigrationError.
    """
    settings = Settings(schema, lock_wait=lock_wait)
    return _run(bind, settings, lambda config: command.downgrade(config, revision))


def stamp(bind: Bind, revision: str, *, schema: str | None = None, lock_wait: timedelta = LOCK_WAIT) -> None:
    """Record that the database is at a revision, without running anything; errors are those of ``upgrade``."""
    settings = Settings(schema, lock_wait=lock_wait)
    _run(bind, settings, lambda config: command.stamp(config, revision))


def current(bind: Bind, *, schema: str | None = None) -> str | None:
    """Return the id of the revision that the database records, or None; it may be one that this release doesn't know.

    Raises:
        MigrationError: The database can't be reached, or records several.
    """
    return connected(bind, lambda connection: _read_revision(connection, schema))


def check(bind: Bind, *, schema: str | None = None, strict: bool = False) -> Check:
    """Compare the database with what this release needs; it is read, and nothing else.

    Compared is what it means, so the answer is the same after a dump and a restore. For a readiness probe, ask as the
    role of the application: it takes no locks that anybody waits for, takes milliseconds, and works through any pooler.

    Args:
        bind: The database; see the module.
        schema: Where the tables are; None for the first schema of the session's search_path that exists.
        strict: Whether notes, too, make it ``drifted``.

    Raises:
        MigrationError: The database can't be reached, or records several revisions.
    """
    return connected(bind, lambda connection: check_connection(connection, schema, strict=strict))


async def acheck(bind: AsyncEngine | AsyncConnection, *, schema: str | None = None, strict: bool = False) -> Check:
    """Do what ``check`` does, on the engine of an application: for a readiness probe."""
    if isinstance(bind, AsyncConnection):
        return await bind.run_sync(lambda connection: check(connection, schema=schema, strict=strict))
    return await connected_async(bind, lambda connection: check_connection(connection, schema, strict=strict))


def history() -> list[Revision]:
    """Return the revisions of this release, the first one first; needs no database."""
    scripts = ScriptDirectory.from_config(make_config())
    return [
        Revision(script.revision, script.down_revision, script.doc)  # type: ignore[arg-type] # one line, no merges
        for script in reversed(list(scripts.walk_revisions()))
    ]


def sql(start: str = "base", end: str = "head", *, schema: str | None = None, create_schema: bool = False) -> str:
    """Return the SQL that leads from one revision to another, up or down; needs no database.

    The script is one for ``psql -v ON_ERROR_STOP=1``. It has the timeouts of an upgrade, and fails at once if another
    migration is under way or the database isn't at ``start``.

    Raises:
        MigrationError: There is no such revision.
    """
    script = io.StringIO()
    config = make_config(settings=Settings(schema, create_schema))
    config.output_buffer = script
    run = command.upgrade if _leads_up(start, end) else command.downgrade
    run(config, f"{start}:{end}", sql=True)
    return script.getvalue()


def _read_revision(connection: Connection, schema: str | None) -> str | None:
    with connection.begin():
        enter_schema(connection, schema)
        require_readable(connection, schema)
        found = recorded_revision(connection)
        if found is None:
            warn_of_elsewhere(connection, schema)
        return found


def _run(bind: Bind, settings: Settings, run: Callable[[Config], None], report: Report | None = None) -> list[str]:
    applied: list[str] = []
    if not _RUNNING.acquire(blocking=False):
        raise MigrationError("a migration is running in this process already, and Alembic knows one at a time")
    try:
        run(make_config(bind=bind, settings=settings, applied=applied, report=report))
    finally:
        _RUNNING.release()
    return applied


def _leads_up(start: str, end: str) -> bool:
    ids = ["base", *(script.revision for script in history())]
    position = {name: number for number, name in enumerate(ids)} | {"head": len(ids) - 1}
    if unknown := {start, end} - position.keys():
        raise MigrationError(f"there is no revision {min(unknown)!r}: choose among base, {', '.join(ids[1:])}, head")
    return position[start] <= position[end]
