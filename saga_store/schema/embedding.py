"""The revisions inside an application's own Alembic history, on its connection and in its transaction."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alembic import op
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Column, Connection, MetaData, PrimaryKeyConstraint, String, Table, delete, insert, text
from sqlalchemy.schema import CreateTable, DropTable

from saga_store.schema.scripts import VERSION_TABLE, make_config, recorded_revision
from saga_store.schema.session import one_schema
from saga_store.schema.settings import LOCK_TIMEOUT, MigrationError

_LOG = logging.getLogger("saga_store.migrations")
_BASE = "base"

# As Alembic makes it.
_VERSION = Table(
    VERSION_TABLE,
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
)


def upgrade(*, from_: str, to: str, schema: str | None = None) -> None:
    """Run saga-store's revisions after ``from_`` up to ``to``, in a revision of an application's own.

    Both ids are pinned, so that the application's revision does the same for ever, whatever release is installed. What
    has been run is recorded in ``saga_store_version`` as well, in the same transaction; what is recorded there already
    isn't run again. So a revision that failed after a concurrently built index had committed its first half can be
    run again, and tables that ``saga-store upgrade`` made can be taken over.

    The transaction is the application's, and so are the retries. Unless the session has a ``lock_timeout``, each
    statement waits 2 s at most for a table, for everybody else waits behind it. Offline it renders SQL that does the
    same, from a database that is at ``from_``.

    Args:
        from_: The revision that the tables are at, or ``base`` if there are none yet.
        to: The revision to bring them to, such as ``saga_store_0001``; not ``head``, which is another one each release.
        schema: Where the tables are; None for what the connection's ``schema_translate_map`` makes of None, or else for
            the first schema of its search_path that exists.

    Raises:
        MigrationError: An id is unknown, the range doesn't lead up, the tables aren't at ``from_``, this isn't a
            revision of Alembic's, or its transaction was begun outside Alembic.
    """
    context, scripts = _context(), _scripts()
    start, end = _position(scripts, from_, "from_"), _position(scripts, to, "to")
    if start >= end:
        raise MigrationError(f"upgrade leads up, and {to!r} doesn't come after {from_!r}")
    with one_schema(context, schema):
        found = _recorded_position(context, scripts, otherwise=start)
        if found < start:
            raise MigrationError(f"the tables are at {_name(scripts, found)}, and this revision leads on from {from_}")
        if found >= end:
            _LOG.info("The tables are at %s already, so %s has nothing to do", _name(scripts, found), to)
        _run(context, [(script.module.upgrade, script.revision) for script in scripts[found:end]])


def downgrade(*, from_: str, to: str, schema: str | None = None) -> None:
    """Undo saga-store's revisions from ``from_`` down to ``to``: the way back of ``upgrade(from_=to, to=from_)``.

    What is undone already isn't undone again. ``to="base"`` drops the tables with all sagas in them.

    Raises:
        MigrationError: As in ``upgrade``.
    """
    context, scripts = _context(), _scripts()
    start, end = _position(scripts, from_, "from_"), _position(scripts, to, "to")
    if start <= end:
        raise MigrationError(f"downgrade leads down, and {to!r} doesn't come before {from_!r}")
    with one_schema(context, schema):
        found = _recorded_position(context, scripts, otherwise=start)
        if found > start:
            raise MigrationError(
                f"the tables are at {_name(scripts, found)}, and this revision leads back from {from_}"
            )
        steps = reversed(range(end, found))
        _run(context, [(scripts[number].module.downgrade, _name(scripts, number)) for number in steps])


def record_version(*, ctx: MigrationContext, step: MigrationInfo, **_others: object) -> None:
    """Record in ``saga_store_version`` what an application's Alembic has done of saga-store's history.

    For applications that have saga-store's revisions in their ``version_locations``: pass it as ``on_version_apply`` to
    ``context.configure`` in the application's env.py. Alembic calls it after each step, in the same transaction, and it
    only heeds saga-store's. Then ``saga-store check`` and ``SchemaError`` know which revision the tables are at; the
    application's own version table needn't tell, for Alembic leaves out of it what others depend on.
    """
    ours = {script.revision for script in _scripts()}
    if ours.isdisjoint(step.up_revision_ids):
        return
    reached = [revision for revision in step.destination_revision_ids if revision in ours]
    _record(ctx, reached[0] if reached else _BASE)
    if ctx.as_sql:
        _reset_timeouts(ctx)


def _context() -> MigrationContext:
    outside = (
        "this is for a revision of your own Alembic history, while it runs; elsewhere use saga_store.schema.upgrade"
    )
    try:
        context = op.get_context()
    except (NameError, AttributeError) as exc:  # before the first migration of the process, and after it
        raise MigrationError(outside) from exc
    connection = _connection(context)
    if connection is None:
        return context
    if connection.closed:  # a migration that failed leaves its context behind
        raise MigrationError(outside)
    if context._transaction is None:  # noqa: SLF001 - nothing else says whether Alembic can commit
        raise MigrationError(
            "the transaction was begun outside Alembic, which so can't commit before it builds an index concurrently: "
            "have env.py run the migrations in context.begin_transaction(), on a connection that isn't in a transaction"
        )
    return context


def _connection(context: MigrationContext) -> Connection | None:
    """Return None offline, where Alembic has one that only prints."""
    return None if context.as_sql else context.connection


def _scripts() -> list[Script]:
    """Return saga-store's own revisions, the first one first, whatever history runs at present."""
    return list(ScriptDirectory.from_config(make_config()).walk_revisions())[::-1]


def _position(scripts: list[Script], revision: str, argument: str) -> int:
    """Return how many revisions have been run when the tables are at this one."""
    ids = [_BASE, *(script.revision for script in scripts)]
    if revision not in ids:
        raise MigrationError(f"{argument}={revision!r} is no revision of this release: choose among {', '.join(ids)}")
    return ids.index(revision)


def _name(scripts: list[Script], position: int) -> str:
    return scripts[position - 1].revision if position else _BASE


def _recorded_position(context: MigrationContext, scripts: list[Script], *, otherwise: int) -> int:
    connection = _connection(context)
    if connection is None:
        return otherwise  # a script on paper is for a database where everything went as it should
    found = recorded_revision(connection)
    ids = [script.revision for script in scripts]
    if found is not None and found not in ids:
        raise MigrationError(
            f"the tables are at {found}, and this release knows {', '.join(ids)}: install the release that made them, "
            "or a later one"
        )
    return 0 if found is None else ids.index(found) + 1


def _run(context: MigrationContext, steps: list[tuple[Callable[[], None], str]]) -> None:
    """Run functions of revisions, and record after each what it has reached."""
    with _short_waits(context):
        for run, reached in steps:
            run()
            _record(context, reached)


def _record(context: MigrationContext, revision: str) -> None:
    context.execute(CreateTable(_VERSION, if_not_exists=True))
    if revision == _BASE:
        context.execute(DropTable(_VERSION))
        return
    context.execute(delete(_VERSION))
    context.execute(insert(_VERSION).values(version_num=revision))


@contextmanager
def _short_waits(context: MigrationContext) -> Iterator[None]:
    """Bound the waits for locks, unless the application has done so.

    For the session, since a revision may commit in between. If it fails, the setting goes with the transaction, or
    with the session of a migration that has failed.
    """
    connection = _connection(context)
    if connection is not None and connection.scalar(text("SHOW lock_timeout")) != "0":
        yield
        return
    context.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    yield
    if connection is not None:
        context.execute("SET lock_timeout = 0")
    else:
        _reset_timeouts(context)


def _reset_timeouts(context: MigrationContext) -> None:
    """Offline nobody knows what the timeouts were before our revisions set theirs."""
    for name in ("lock_timeout", "statement_timeout"):
        context.execute(f"RESET {name}")
