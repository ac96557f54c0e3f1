"""What a migration sets in its session and gives back, how long it waits for others, and who they are."""

import asyncio
import contextlib
import logging
import random
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta

from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, bindparam, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateSchema
from sqlalchemy.util import await_only

from saga_store.schema.scripts import VERSION_TABLE
from saga_store.schema.settings import LOCK_TIMEOUT, STATEMENT_TIMEOUT, MigrationError, MigrationLockError, Settings
from saga_store.sqlalchemy import Base
from saga_store.sqlalchemy.failures import reason, sqlstate

_LOG = logging.getLogger("saga_store.migrations")

# Everything is committed at once: Alembic would take an open transaction for somebody else's, and never commit.

KEY = f"hashtextextended('{VERSION_TABLE}:' || {{schema}}, 0)"
"""The key of the migration lock: of its database, as all advisory locks are, of one schema and its version table."""

# One schema and nothing else, so that no name is found by luck. Temporary tables come first unless they are named last;
# where they would be the first that is there, PostgreSQL would make a schema for them.
_SEARCH_PATH = """
    SELECT set_config('search_path', COALESCE(quote_ident(s.name), '')
        || CASE WHEN has_schema_privilege(n.oid, 'USAGE') THEN ', pg_temp' ELSE '' END, {local}){more}
    FROM (SELECT COALESCE(CAST(:schema AS text), current_schema()) AS name) s
    LEFT JOIN pg_namespace n ON n.nspname = s.name
"""
# What the catalog says is compared, and mustn't depend on a setting.
_ENTER = text(_SEARCH_PATH.format(local="TRUE", more=", set_config('quote_all_identifiers', 'off', TRUE)"))
_STAY = text(_SEARCH_PATH.format(local="FALSE", more=""))
_ELSEWHERE = text("""
    SELECT DISTINCT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relname IN :tables AND c.relkind IN ('r', 'p') AND n.nspname <> :schema AND n.nspname !~ '^pg_'
    ORDER BY n.nspname
""").bindparams(bindparam("tables", [*Base.metadata.tables, VERSION_TABLE], expanding=True))
_EXISTS = text("SELECT 1 FROM pg_namespace WHERE nspname = :schema")

# A lock wasn't to be had in time; a deadlock. The statement has been undone, and may well succeed next time.
_RETRIABLE_CODES = {"55P03", "40P01"}
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0

_SHOWN = 5

# What other users' sessions do is NULL here for a role without pg_read_all_stats.
_SESSION = """
    a.pid, a.usename, a.application_name, COALESCE(a.state, 'doing something unknown'),
    CAST(EXTRACT(EPOCH FROM clock_timestamp() - COALESCE(a.xact_start, a.query_start)) AS integer),
    left(regexp_replace(a.query, '\\s+', ' ', 'g'), 100)
"""

# A concurrent index also waits for snapshots older than itself, whatever table they have read.
_HOLDERS_OF_TABLES = text(f"""
SELECT {_SESSION}, COALESCE(l.held, 'an old snapshot') AS held
FROM pg_stat_activity a
LEFT JOIN (
    SELECT l.pid, string_agg(DISTINCT l.mode || ' on ' || c.relname, ', ') AS held
    FROM pg_locks l
    JOIN pg_class c ON c.oid = l.relation
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE l.granted AND n.nspname = current_schema() AND c.relname IN :tables
    GROUP BY l.pid
) l ON l.pid = a.pid
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
    AND (l.pid IS NOT NULL OR a.backend_xmin IS NOT NULL)
ORDER BY l.pid IS NULL, a.xact_start NULLS FIRST
LIMIT {_SHOWN}
""").bindparams(bindparam("tables", [*Base.metadata.tables, VERSION_TABLE], expanding=True))  # noqa: S608 - constants

_HOLDERS_OF_KEY = text(f"""
SELECT {_SESSION}, 'the migration lock' AS held
FROM pg_locks l
JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.granted AND l.locktype = 'advisory' AND l.objsubid = 1 AND a.datname = current_database()
    AND CAST(l.classid AS bigint) = (CAST(:key AS bigint) >> 32) & 4294967295
    AND CAST(l.objid AS bigint) = CAST(:key AS bigint) & 4294967295
""")  # noqa: S608 - put together from constants


def enter_schema(connection: Connection, schema: str | None) -> None:
    """Let names mean those of the schema, or of the session's own, until the end of the transaction."""
    connection.execute(_ENTER, {"schema": schema})


@contextlib.contextmanager
def target_schema(connection: Connection, settings: Settings) -> Iterator[str]:
    """Yield the schema's name, which all names in this session refer to until the end."""
    if connection.dialect.detect_autocommit_setting(connection.connection.dbapi_connection):  # type: ignore[arg-type] # open
        raise MigrationError("the connection is in autocommit, where a revision that fails couldn't be undone")
    with first_error(connection), _restored(connection):
        with connection.begin():
            name = settings.schema or _current_schema(connection)
            connection.execute(_STAY, {"schema": name})
        yield name


@contextlib.contextmanager
def first_error(connection: Connection) -> Iterator[None]:
    """Raise what went wrong first, if the session was lost: whatever tidies up afterwards fails as well."""
    try:
        yield
    except Exception as exc:
        if not (connection.invalidated or connection.closed):
            raise
        chain = list(_chain(exc))
        # SQLAlchemy gives up a connection that was interrupted, and then can't go on with it.
        for each in chain:
            if not isinstance(each, Exception):
                raise each from None
        lost = [each for each in chain if isinstance(each, DBAPIError) and each.connection_invalidated]
        first = lost[-1] if lost else chain[-1]
        raise MigrationError(
            f"the session of the server was lost: {reason(first)}. What was committed stays; run it again"
        ) from first


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what came before it, back to the first."""
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


@contextlib.contextmanager
def one_schema(context: MigrationContext, schema: str | None = None) -> Iterator[None]:
    """Let all names in a migration of an application's own Alembic mean those of one schema, until the end.

    That is the one that is named, or what the connection's ``schema_translate_map`` makes of none, or the first of the
    session's search_path. If the migration fails, the setting goes with its transaction or session.
    """
    if context.opts.get("one_schema"):
        yield
        return
    context.opts["one_schema"] = True
    try:
        connection = None if context.as_sql else context.connection
        if connection is None:
            for statement in path_on_paper(schema):
                context.impl.static_output(f"{statement};")
            yield
            context.impl.static_output(f"{PATH_BACK_ON_PAPER};")
            return
        translated = connection.get_execution_options().get("schema_translate_map") or {}
        before = connection.scalar(text("SELECT current_setting('search_path')"))
        name = schema or translated.get(None) or _current_schema(connection)
        connection.execute(_STAY, {"schema": name})
        yield
        _set(connection, "search_path", str(before))
    finally:
        del context.opts["one_schema"]


def path_on_paper(schema: str | None) -> Iterator[str]:
    """Yield the statements of a script after which names mean those of one schema; there, too, it is the one named."""
    name = "current_schema()" if schema is None else literal(schema)
    yield f"""\
DO $place$
BEGIN
    IF to_regnamespace(quote_ident({name})) IS NULL THEN
        RAISE EXCEPTION 'there is no such schema: create it first' USING ERRCODE = 'invalid_schema_name';
    END IF;
    PERFORM set_config('saga_store.search_path', current_setting('search_path'), FALSE);
    PERFORM set_config('search_path', quote_ident({name}) || ', pg_temp', FALSE);
END
$place$"""


PATH_BACK_ON_PAPER = (
    "DO $place$ BEGIN PERFORM set_config('search_path', current_setting('saga_store.search_path'), FALSE); END $place$"
)


def literal(value: str) -> str:
    """Quote a text for SQL, also between dollar quotes."""
    if "\\" in value or "$" in value:
        return "E'" + value.replace("\\", "\\\\").replace("'", "''").replace("$", "\\x24") + "'"
    return "'" + value.replace("'", "''") + "'"


def found_elsewhere(connection: Connection, schema: str | None) -> str:
    """Say which other schemas have tables of our names, and how to name one; nothing if there is none."""
    schema = schema or connection.scalar(text("SELECT current_schema()"))
    others = list(connection.scalars(_ELSEWHERE, {"schema": schema or ""}))
    if not others:
        return ""
    return (
        f"there is nothing of saga-store's in schema {schema}, but there is in {', '.join(others)}: if that was meant, "
        f"name it, --schema {shlex.quote(others[0])} (alembic: -x schema=NAME)"
    )


def warn_of_elsewhere(connection: Connection, schema: str | None) -> None:
    """Log what is found in other schemas, for whoever finds nothing in this one."""
    if found := found_elsewhere(connection, schema):
        _LOG.warning("%s", found, extra={"elsewhere": True})


def _current_schema(connection: Connection) -> str:
    found = connection.scalar(text("SELECT current_schema()"))
    if found is None:
        raise MigrationError("no schema of the session's search_path exists: create it, or name one as schema")
    if str(found).startswith("pg_"):
        raise MigrationError(f"the session's search_path begins with {found}, where no table stays: name a schema")
    return str(found)


@contextlib.contextmanager
def migration(connection: Connection, settings: Settings, schema: str) -> Iterator[None]:
    """Hold the migration lock, and see to it that the schema is there and that no statement waits for long."""
    with _locked(connection, settings, schema):
        with connection.begin():
            _set(connection, "lock_timeout", LOCK_TIMEOUT)
            _set(connection, "statement_timeout", STATEMENT_TIMEOUT)
            _see_to(connection, settings, schema)
        yield


def require_schema(connection: Connection, schema: str) -> None:
    """Raise MigrationError if there is no such schema."""
    if connection.scalar(_EXISTS, {"schema": schema}) is None:
        raise MigrationError(
            f"there is no schema {schema!r}: correct the name, or have it created with --create-schema "
            "(alembic: -x create_schema=true)"
        )


def _see_to(connection: Connection, settings: Settings, schema: str) -> None:
    # Asked first: CREATE SCHEMA IF NOT EXISTS is refused to a role that may create none, also where there is one.
    if settings.create_schema and settings.schema and connection.scalar(_EXISTS, {"schema": schema}) is None:
        connection.execute(CreateSchema(schema, if_not_exists=True))
        connection.execute(_STAY, {"schema": schema})
    require_schema(connection, schema)
    if connection.scalar(text("SELECT current_schema()")) != schema:
        raise MigrationError(
            f"names don't mean those of schema {schema!r} in this session: have USAGE on it granted, or, if a listener "
            "of the engine's sets the search_path of each transaction, pass another engine"
        )


@contextlib.contextmanager
def _locked(connection: Connection, settings: Settings, schema: str) -> Iterator[None]:
    # Polled: a session that waited inside the server for the lock would have a snapshot, for which CREATE INDEX
    # CONCURRENTLY of the one that holds the lock would wait in turn.
    patience = Patience(connection, settings.lock_wait)
    with connection.begin():
        key = connection.scalar(text(f"SELECT {KEY.format(schema='CAST(:schema AS text)')}"), {"schema": schema})
    while not _call(connection, "pg_try_advisory_lock", key):
        if not patience.pause():
            raise MigrationLockError(
                f"another migration of schema {schema!r} hasn't ended within {patience.wait.total_seconds():g} s, and "
                f"nothing was done. Its session:\n{holders_of_key(connection, key)}\n"
                "Wait for it, or have a longer --lock-wait (alembic: -x lock_wait=SECONDS)."
            )
    with _afterwards(connection, lambda: _call(connection, "pg_advisory_unlock", key)):
        yield


def _call(connection: Connection, function: str, key: int) -> bool:
    with connection.begin():
        return bool(connection.scalar(text(f"SELECT {function}(CAST(:key AS bigint))"), {"key": key}))


def _set(connection: Connection, name: str, value: str) -> None:
    connection.execute(text("SELECT set_config(:name, :value, FALSE)"), {"name": name, "value": value})


@contextlib.contextmanager
def _restored(connection: Connection) -> Iterator[None]:
    """Give a session of the caller's, or of a pool's, back as it was."""
    names = ("search_path", "lock_timeout", "statement_timeout")
    with connection.begin():
        before = {name: str(connection.scalar(text("SELECT current_setting(:name)"), {"name": name})) for name in names}
    with _afterwards(connection, lambda: _set_all(connection, before)):
        yield


def _set_all(connection: Connection, settings: Mapping[str, str]) -> None:
    with connection.begin():
        for name, value in settings.items():
            _set(connection, name, value)


@contextlib.contextmanager
def _afterwards(connection: Connection, tidy: Callable[[], object]) -> Iterator[None]:
    """Tidy up; if something has gone wrong, that is what counts, whatever comes of tidying up."""
    try:
        yield
    except BaseException:
        if not (connection.invalidated or connection.closed):
            with contextlib.suppress(Exception):
                if connection.in_transaction():
                    connection.rollback()
                tidy()
        raise
    if connection.in_transaction():
        connection.rollback()
    tidy()


class Patience:
    """A wait of bounded length, in pauses that grow and have jitter; progress renews it."""

    def __init__(self, connection: Connection, wait: timedelta) -> None:
        self.wait = wait
        self._is_async = connection.dialect.is_async
        self.renew()

    def renew(self) -> None:
        self._deadline = time.monotonic() + self.wait.total_seconds()
        self._pause = _FIRST_PAUSE_SECONDS

    def pause(self) -> bool:
        """Sleep for a moment; False, and at once, if the time is up."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            return False
        seconds = min(left, self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        if self._is_async:
            await_only(asyncio.sleep(seconds))  # other tasks of the caller's loop go on
        else:
            time.sleep(seconds)
        return True

    def pause_after(self, exc: DBAPIError) -> bool:
        """Do so if what failed is worth trying again; otherwise False."""
        return is_refused_lock(exc) and self.pause()


def is_refused_lock(exc: DBAPIError) -> bool:
    """Whether a lock wasn't to be had, so that somebody else holds it."""
    return sqlstate(exc) in _RETRIABLE_CODES


# Their locks belong to no session.
_PREPARED = text("""
SELECT p.gid, p.owner, CAST(EXTRACT(EPOCH FROM clock_timestamp() - p.prepared) AS integer),
    string_agg(DISTINCT l.mode || ' on ' || c.relname, ', ')
FROM pg_prepared_xacts p
JOIN pg_locks own ON own.locktype = 'transactionid' AND own.transactionid = p.transaction AND own.pid IS NULL
JOIN pg_locks l ON l.virtualtransaction = own.virtualtransaction AND l.pid IS NULL
JOIN pg_class c ON c.oid = l.relation
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE p.database = current_database() AND n.nspname = current_schema() AND c.relname IN :tables
GROUP BY p.gid, p.owner, p.prepared
ORDER BY p.prepared
""").bindparams(bindparam("tables", [*Base.metadata.tables, VERSION_TABLE], expanding=True))
_SLOTS = text("""
SELECT slot_name, active_pid FROM pg_replication_slots
WHERE database = current_database() AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
ORDER BY slot_name
""")


def holders_of_tables(connection: Connection) -> str:
    """Say who holds locks on our tables, or old snapshots, and what ends them: a line for each, the oldest first."""
    with connection.begin():
        prepared = [
            f"  prepared transaction {gid!r}, user {owner}, holds {held}: {seconds} s; "
            f"ROLLBACK PREPARED {literal(gid)}, or COMMIT PREPARED {literal(gid)}"
            for gid, owner, seconds, held in connection.execute(_PREPARED)
        ]
        slots = [
            f"  replication slot {name!r}, keeps old snapshots: "
            + (f"pid {pid} uses it; " if pid else "unused; ")
            + (f"SELECT pg_terminate_backend({pid}), then " if pid else "")
            + f"SELECT pg_drop_replication_slot({literal(name)})"
            for name, pid in connection.execute(_SLOTS)
        ]
        return _told(connection.execute(_HOLDERS_OF_TABLES).all(), [*prepared, *slots])


def holders_of_key(connection: Connection, key: int) -> str:
    """Say which session holds the advisory lock."""
    with connection.begin():
        return _told(connection.execute(_HOLDERS_OF_KEY, {"key": key}).all())


def _told(rows: object, others: Sequence[str] = ()) -> str:
    lines = [
        f"  pid {pid}, user {user}, application {application!r}, holds {held}: {state}"
        + ("" if seconds is None else f", {seconds} s")
        + (f": {query}" if query else "")
        + f"; SELECT pg_terminate_backend({pid})"
        for pid, user, application, state, seconds, query, held in rows  # type: ignore[attr-defined] # rows of _SESSION
    ]
    return "\n".join([*others, *lines]) or "  (they have ended by now)"
