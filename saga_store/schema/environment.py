"""What Alembic's env.py does: connect, wait for its turn, and run the revisions that the command asks for.

On paper it says before and after the revisions what makes the script as safe as a migration online.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from saga_store.schema.connections import Bind, connected
from saga_store.schema.pooler import refuse_shared_sessions
from saga_store.schema.scripts import VERSION_TABLE, recorded_revision
from saga_store.schema.session import (
    KEY,
    PATH_BACK_ON_PAPER,
    Patience,
    found_elsewhere,
    holders_of_tables,
    is_refused_lock,
    literal,
    migration,
    path_on_paper,
    require_schema,
    target_schema,
    warn_of_elsewhere,
)
from saga_store.schema.settings import LOCK_TIMEOUT, STATEMENT_TIMEOUT, MigrationError, MigrationLockError, Settings
from saga_store.sqlalchemy import Base
from saga_store.sqlalchemy.failures import reason, sqlstate

StepsFunction = Callable[[Any, MigrationContext], Iterable[Any]]

_KEY = KEY.format(schema="current_schema()")

_GUARD = f"""
DO $guard$
DECLARE
    version_table text := quote_ident(current_schema()) || '.{VERSION_TABLE}';
    found text;
BEGIN
    IF NOT pg_try_advisory_lock({_KEY}) THEN
        RAISE EXCEPTION 'another migration of schema % is under way: wait for its end', current_schema()
            USING ERRCODE = 'lock_not_available';
    END IF;
    {{revision}}
END
$guard$
"""

# A database that was taken back to its base keeps an empty version table, which the script would create again.
_AT_BASE = """
    IF to_regclass(version_table) IS NOT NULL THEN
        EXECUTE 'SELECT max(version_num) FROM ' || version_table INTO found;
        IF found IS NOT NULL THEN
            RAISE EXCEPTION 'this script is for an empty schema, and this one is at %', found;
        END IF;
        EXECUTE 'DROP TABLE ' || version_table;
    END IF;
"""
_AT_REVISION = """
    IF to_regclass(version_table) IS NOT NULL THEN
        EXECUTE 'SELECT max(version_num) FROM ' || version_table INTO found;
    END IF;
    IF found IS DISTINCT FROM {revision} THEN
        RAISE EXCEPTION 'this script leads on from %, and the database is at %', {revision}, COALESCE(found, 'none');
    END IF;
"""
# CREATE SCHEMA IF NOT EXISTS is refused to a role that may create none, also where there is one.
_CREATE_SCHEMA = """
DO $create$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {literal}) THEN
        EXECUTE format('CREATE SCHEMA %I', {literal});
    END IF;
END
$create$
"""
_UNLOCK = f"DO $unlock$ BEGIN PERFORM pg_advisory_unlock({_KEY}); END $unlock$"


def run() -> None:
    """Run Alembic's present command, online or offline.

    What the configuration may bring along as attributes: ``bind`` (or ``connection``, ``engine`` or ``url``; without
    any, the URL is DATABASE_URL of the environment), ``settings``, ``applied``, a list that receives the ids of the
    revisions as they are committed, and ``report``, which is told of progress. ``-x`` arguments override the settings.
    """
    settings = Settings.read(context.get_x_argument(as_dictionary=True), context.config.attributes)
    if context.is_offline_mode():
        _configure(dialect_name="postgresql", literal_binds=True)
        _begin_script(settings, stamps="purge" in context.get_context().opts)
        context.run_migrations()
        _end_script()
    else:
        connected(_bind(), lambda connection: _run(connection, settings))


def _bind() -> Bind:
    attributes = context.config.attributes
    given = [attributes[name] for name in ("bind", "connection", "engine", "url") if attributes.get(name) is not None]
    return given[0] if given else os.environ.get("DATABASE_URL", "")


def _run(connection: Connection, settings: Settings) -> None:
    refuse_shared_sessions(connection)
    with target_schema(connection, settings) as schema:
        _configure(connection=connection, version_table_schema=schema)
        steps = context.get_context().opts["fn"]
        # Only what has somewhere to go writes: upgrade, downgrade, stamp.
        if "destination_rev" in context.get_context().opts:
            with migration(connection, settings, schema):
                _look_around(connection, schema, leads_back=steps.__name__ == "downgrade")
                _migrate(connection, settings, schema, steps)
        else:
            with connection.begin():
                require_schema(connection, schema)
                if recorded_revision(connection) is None:
                    warn_of_elsewhere(connection, schema)
            _configure(connection=connection, version_table_schema=schema, dont_mutate=True)
            context.run_migrations()


def _look_around(connection: Connection, schema: str, *, leads_back: bool) -> None:
    """Say what other schemas have, if this one has nothing; what isn't there can't be taken back."""
    with connection.begin():
        if recorded_revision(connection) is not None:
            return
        if leads_back:
            found = found_elsewhere(connection, schema) or f"no revision is recorded in schema {schema}"
            raise MigrationError(f"there is nothing to downgrade: {found}")
        warn_of_elsewhere(connection, schema)


def _migrate(connection: Connection, settings: Settings, schema: str, steps: StepsFunction) -> None:
    """Run the steps, each in a transaction of its own, and again those that couldn't get a lock."""
    patience = Patience(connection, settings.lock_wait)
    remaining = _Remaining(steps, patience)
    while True:
        report = context.config.attributes.get("report")
        how = {"fn": remaining, "patience": patience, "report": report}
        _configure(connection=connection, version_table_schema=schema, **how)
        try:
            context.run_migrations()
        except DBAPIError as exc:
            if patience.pause_after(exc):
                continue
            if is_refused_lock(exc):
                raise MigrationLockError(
                    f"{remaining} couldn't get its locks within {patience.wait.total_seconds():g} s, and is not done. "
                    f"Sessions that are in the way:\n{holders_of_tables(connection)}\n"
                    "Have them end, or try again with a longer --lock-wait (alembic: -x lock_wait=SECONDS)."
                ) from exc
            raise MigrationError(f"{remaining} failed with SQLSTATE {sqlstate(exc)}: {reason(exc)}") from exc
        if connection.in_transaction():
            connection.commit()  # with no step to take, as in `stamp base`, there is still the version table
        return


class _Remaining:
    """The steps of one command that aren't committed yet.

    They are found once: found anew after a failure, ``+2`` would count from wherever the first attempt had got.
    """

    def __init__(self, steps: StepsFunction, patience: Patience) -> None:
        self._steps = steps
        self._patience = patience
        self._remaining: deque[Any] | None = None

    def __call__(self, heads: object, migration_context: MigrationContext) -> Iterator[Any]:
        if self._remaining is None:
            self._remaining = deque(self._steps(heads, migration_context))
        while self._remaining:
            yield self._remaining[0]
            # Alembic comes back for the next step once this one is committed.
            self._remaining.popleft()
            self._patience.renew()

    def __str__(self) -> str:
        return str(self._remaining[0]) if self._remaining else "reading the version table"


def _configure(**how: object) -> None:
    context.configure(
        **how,  # type: ignore[arg-type] # keywords of Alembic's, passed on
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=_is_ours,
        one_schema=True,  # see session.one_schema
        compare_server_default=True,
        transaction_per_migration=True,
        on_version_apply=_note,  # type: ignore[arg-type] # which is called with keywords
    )


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Look at no tables but ours: `alembic check` runs in databases that hold others."""
    return kind != "table" or name in Base.metadata.tables


def _note(*, step: MigrationInfo, **_others: object) -> None:
    context.config.attributes.setdefault("applied", []).append(step.up_revision_id)


def _begin_script(settings: Settings, *, stamps: bool) -> None:
    """Write what goes before the revisions; a stamp may begin at any of them."""
    _write(f"SET lock_timeout = {literal(LOCK_TIMEOUT)}")
    _write(f"SET statement_timeout = {literal(STATEMENT_TIMEOUT)}")
    if settings.schema and settings.create_schema:
        _write(_CREATE_SCHEMA.format(literal=literal(settings.schema)).strip())
    for statement in path_on_paper(settings.schema):
        _write(statement)
    start = context.get_starting_revision_argument()
    start = start[0] if isinstance(start, tuple) and start else start
    at_start = _AT_REVISION.format(revision=literal(str(start))) if start else _AT_BASE
    _write(_GUARD.format(revision="" if stamps else at_start.strip()).strip())


def _end_script() -> None:
    """Write what goes after them."""
    _write(_UNLOCK)
    _write(PATH_BACK_ON_PAPER)
    for name in ("lock_timeout", "statement_timeout"):
        _write(f"RESET {name}")


def _write(statement: str) -> None:
    # Not by context.execute, which doubles percent signs.
    context.get_context().impl.static_output(f"{statement};")
