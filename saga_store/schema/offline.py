"""What a migration script on paper says before and after the revisions, to be as safe as a migration online."""

from alembic import context

from saga_store.schema.scripts import VERSION_TABLE
from saga_store.schema.session import KEY
from saga_store.schema.settings import LOCK_TIMEOUT, STATEMENT_TIMEOUT, Settings

_KEY = KEY.format(schema="current_schema()")

_GUARD = f"""
DO $guard$
DECLARE
    version_table text := quote_ident(current_schema()) || '.{VERSION_TABLE}';
    found text;
BEGIN
    IF current_schema() IS NULL THEN
        RAISE EXCEPTION 'there is no such schema: create it first' USING ERRCODE = 'invalid_schema_name';
    END IF;
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
        CREATE SCHEMA {name};
    END IF;
END
$create$
"""
_UNLOCK = f"DO $unlock$ BEGIN PERFORM pg_advisory_unlock({_KEY}); END $unlock$"


def begin(settings: Settings, *, stamps: bool) -> None:
    """Write what goes before the revisions; a stamp may begin at any of them."""
    _write(f"SET lock_timeout = {_literal(LOCK_TIMEOUT)}")
    _write(f"SET statement_timeout = {_literal(STATEMENT_TIMEOUT)}")
    if settings.schema:
        name = '"' + settings.schema.replace('"', '""') + '"'
        if settings.create_schema:
            _write(_CREATE_SCHEMA.format(literal=_literal(settings.schema), name=name).strip())
        _write(f"SET search_path = {name}")
    start = context.get_starting_revision_argument()
    start = start[0] if isinstance(start, tuple) and start else start
    at_start = _AT_REVISION.format(revision=_literal(str(start))) if start else _AT_BASE
    _write(_GUARD.format(revision="" if stamps else at_start.strip()).strip())


def end(settings: Settings) -> None:
    """Write what goes after them."""
    _write(_UNLOCK)
    for name in ("lock_timeout", "statement_timeout", *(["search_path"] if settings.schema else [])):
        _write(f"RESET {name}")


def _write(statement: str) -> None:
    # Not by context.execute, which doubles percent signs.
    context.get_context().impl.static_output(f"{statement};")


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
