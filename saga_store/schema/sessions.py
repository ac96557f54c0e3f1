"""Which sessions of the server hold what a migration waits for."""

from sqlalchemy import Connection, bindparam, text

from saga_store.schema.scripts import VERSION_TABLE
from saga_store.sqlalchemy import Base

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


def holders_of_tables(connection: Connection) -> str:
    """Say which sessions hold locks on our tables, or old snapshots: a line for each, the oldest first."""
    with connection.begin():
        return _told(connection.execute(_HOLDERS_OF_TABLES).all())


def holders_of_key(connection: Connection, key: int) -> str:
    """Say which session holds the advisory lock."""
    with connection.begin():
        return _told(connection.execute(_HOLDERS_OF_KEY, {"key": key}).all())


def _told(rows: object) -> str:
    lines = [
        f"  pid {pid}, user {user}, application {application!r}, holds {held}: {state}"
        + ("" if seconds is None else f", {seconds} s")
        + (f": {query}" if query else "")
        for pid, user, application, state, seconds, query, held in rows  # type: ignore[attr-defined] # rows of _SESSION
    ]
    return "\n".join(lines) or "  (they have ended by now)"
