"""Changes to tables that are full and in use, for the revisions: nobody who reads or writes waits for long.

Each function leaves Alembic's transaction, commits what it does by itself, and can be run again after it was killed
at any point; so can a revision that is made of them. A statement that others may have to wait for has the session's
short ``lock_timeout``, and is tried again while the migration's patience lasts. One that nobody waits for has all of
that time at once, and no ``statement_timeout``. Offline, each renders SQL that does the same.

Names, conditions and definitions are SQL as for ``op.execute``, and stay as they are written: a released revision is
frozen.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError

from saga_store.schema.session import Patience, one_schema
from saga_store.schema.settings import LOCK_TIMEOUT, LOCK_WAIT, STATEMENT_TIMEOUT, LogReport, Progress

BATCH_ROWS = 5_000

# Two statements, for Citus refuses both in one; and one transaction, so that what is replaced is in force until then.
_REPLACE_CHECK = """\
DO $replace$
BEGIN
    {drop};
    ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID;
END
$replace$"""
_DROP_CHECK = """\
DO $drop$
DECLARE
    found text;
BEGIN
    FOR found IN
        SELECT conname FROM pg_constraint
        WHERE conrelid = CAST(quote_ident(current_schema()) || '.{table}' AS regclass) AND contype = 'c'
            AND right(CAST(conname AS text), length('{name}')) = '{name}'
    LOOP
        EXECUTE 'ALTER TABLE ' || quote_ident(current_schema()) || '.{table} DROP CONSTRAINT ' || quote_ident(found);
    END LOOP;
END
$drop$"""


def in_one_schema(change: Callable[[], None]) -> Callable[[], None]:
    """Let all names in a revision mean those of one schema, also in the Alembic of an application (a decorator)."""

    @wraps(change)
    def changed() -> None:
        with one_schema(op.get_context()):
            change()

    return changed


def create_index(name: str, table: str, definition: str, *, unique: bool = False) -> None:
    """Build an index while the table is written to.

    A build that fails leaves an INVALID index behind, which costs every write and serves nobody: one of this name is
    dropped first, and one that this call leaves is dropped again. A valid one is kept, for an earlier attempt made it.

    Args:
        name: The index.
        table: Its table.
        definition: What follows the table's name, such as ``(created_at) WHERE status = 'FAILED'``.
        unique: Whether it is a unique one.
    """
    drop = f"DROP INDEX CONCURRENTLY IF EXISTS {name}"
    create = f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {table} {definition}"

    def build() -> None:
        if _index_is_valid(name):
            return
        _execute(drop)
        _execute(create)

    with _autocommit(), _unhurried():
        try:
            _persistently(build)
        except DBAPIError:
            if _index_is_valid(name) is False:
                _try(drop)
            raise


def drop_index(name: str) -> None:
    """Drop an index without locking out those who use its table."""
    with _autocommit(), _unhurried():
        _persistently(lambda: _execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}"))


def add_check(name: str, table: str, condition: str) -> None:
    """Add a CHECK constraint: first for what is written from now on, then, while writers go on, for what is there.

    Args:
        name: The constraint; one of that name is replaced.
        table: Its table.
        condition: What has to hold for every row. If it doesn't for one, this fails and leaves no constraint.
    """
    drop = f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}"
    with _autocommit():
        replace = _REPLACE_CHECK.format(drop=drop, table=table, name=name, condition=condition)
        _persistently(lambda: _execute(replace))
        try:
            with _unhurried():
                _persistently(lambda: _execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}"))
        except DBAPIError:
            # It is in force for what is written: every update of a row that breaks it would be refused.
            _try(drop)
            raise


def drop_check(name: str, table: str) -> None:
    """Drop a CHECK constraint, also if an application's naming convention has put something before its name.

    One that an earlier attempt has dropped is passed over, and a table that isn't there is an error.
    """
    with _autocommit():
        _persistently(lambda: _execute(_DROP_CHECK.format(name=name, table=table)))


def backfill(table: str, *, assign: str, where: str, key: str = "id", key_type: str = "uuid") -> None:
    """Update rows in batches, each a transaction of its own, in the order of their key.

    Args:
        table: Whose rows.
        assign: What comes after SET.
        where: Which rows still have to be updated. It must not hold for one that has been: so whoever goes on after a
            kill passes over what is done.
        key: A unique column with an index.
        key_type: Its type.
    """
    first = f"SELECT {key} FROM {table} ORDER BY {key} LIMIT 1"
    upper = (
        f"SELECT {key} FROM (SELECT {key} FROM {table} WHERE {key} >= {{lower}} ORDER BY {key} LIMIT {BATCH_ROWS}) "
        f"AS batch ORDER BY {key} DESC LIMIT 1"
    )
    update = f"UPDATE {table} SET {assign} WHERE {key} BETWEEN {{lower}} AND {{upper}} AND ({where})"
    following = f"SELECT {key} FROM {table} WHERE {key} > {{upper}} ORDER BY {key} LIMIT 1"
    with _autocommit():
        if op.get_context().as_sql:
            names = {"lower": "lower_key", "upper": "upper_key"}
            with _unhurried():
                op.execute(
                    f"DO $backfill$ DECLARE lower_key {key_type} = ({first}); upper_key {key_type};\n"
                    "BEGIN WHILE lower_key IS NOT NULL LOOP\n"
                    f"    upper_key = ({upper.format(**names)});\n"
                    f"    {update.format(**names)};\n"
                    "    COMMIT;\n"
                    f"    lower_key = ({following.format(**names)});\n"
                    "END LOOP; END $backfill$"
                )
            return
        typed = {name: f"CAST(CAST(:{name} AS text) AS {key_type})" for name in ("lower", "upper")}
        report = op.get_context().opts.get("report") or LogReport()
        progress = Progress(f"{table}, {assign}", total=_estimated_rows(table))
        bounds = {"lower": _scalar(f"SELECT CAST(({first}) AS text)")}
        while bounds["lower"] is not None:
            bounds["upper"] = _scalar(f"SELECT CAST(({upper.format(**typed)}) AS text)", bounds)
            _persistently(lambda: _execute(update.format(**typed), bounds))
            report(progress := progress.advanced(BATCH_ROWS))
            bounds["lower"] = _scalar(f"SELECT CAST(({following.format(**typed)}) AS text)", bounds)
        report(progress.ended())


@contextmanager
def _autocommit() -> Iterator[None]:
    with op.get_context().autocommit_block():
        yield


@contextmanager
def _unhurried() -> Iterator[None]:
    """Let statements that nobody waits for take their time."""
    if op.get_context().as_sql:
        _set(f"{LOCK_WAIT.total_seconds():g}s", "0")
        yield
        _set(LOCK_TIMEOUT, STATEMENT_TIMEOUT)
        return
    before = [_scalar(f"SELECT current_setting('{name}')") for name in ("lock_timeout", "statement_timeout")]
    _set(f"{max(1, _patience().wait // timedelta(milliseconds=1))}ms", "0")
    try:
        yield
    finally:
        if not op.get_bind().invalidated:
            _set(*before)


def _set(lock_timeout: str, statement_timeout: str) -> None:
    _execute(f"SET lock_timeout = '{lock_timeout}'")
    _execute(f"SET statement_timeout = '{statement_timeout}'")


def _patience() -> Patience:
    given = op.get_context().opts.get("patience")
    return given if isinstance(given, Patience) else Patience(op.get_bind(), LOCK_WAIT)


def _persistently(change: Callable[[], None]) -> None:
    """Make a change, and again if it couldn't get a lock."""
    if op.get_context().as_sql:
        change()
        return
    patience = _patience()
    while True:
        try:
            change()
        except DBAPIError as exc:
            if not patience.pause_after(exc):
                raise
        else:
            patience.renew()
            return


def _try(statement: str) -> None:
    """Tidy up after an error, which is what the caller shall hear of; the next attempt tidies up as well."""
    if not op.get_bind().invalidated:
        try:
            _set(LOCK_TIMEOUT, STATEMENT_TIMEOUT)
            _execute(statement)
        except DBAPIError:
            return


def _execute(statement: str, parameters: Mapping[str, Any] | None = None) -> None:
    if op.get_context().as_sql:
        op.execute(statement)
    else:
        op.get_bind().execute(sa.text(statement), parameters)


def _scalar(query: str, parameters: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - whatever was asked for
    return op.get_bind().scalar(sa.text(query), parameters)


def _index_is_valid(name: str) -> bool | None:
    """None if there is no such index, or if nobody can know, offline."""
    if op.get_context().as_sql:
        return None
    oid = f"to_regclass(quote_ident(current_schema()) || '.{name}')"
    query = f"SELECT indisvalid FROM pg_index WHERE indexrelid = {oid}"
    found = _scalar(query)
    return None if found is None else bool(found)


def _estimated_rows(table: str) -> int | None:
    oid = f"to_regclass(quote_ident(current_schema()) || '.{table}')"
    query = f"SELECT CAST(reltuples AS bigint) FROM pg_class WHERE oid = {oid}"
    found = _scalar(query)
    return int(found) if found and found > 0 else None
