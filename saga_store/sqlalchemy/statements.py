"""Every SQL statement of the storage; no I/O."""

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import asyncpg, psycopg


class Statement:
    """SQL with ``:names`` for parameters, spelled for SQLAlchemy (``text``) and for each driver.

    Attributes:
        text: For SQLAlchemy.
        numbered: For asyncpg, with ``$1``; ``names`` says which parameter that is.
        named: For psycopg, with ``%(name)s``.
    """

    def __init__(self, sql: str) -> None:
        self.text = text(sql)
        numbered = self.text.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call] # SQLAlchemy leaves it so
        self.numbered = str(numbered)
        self.names = tuple(numbered.positiontup or ())
        self.named = str(self.text.compile(dialect=psycopg.dialect()))  # type: ignore[no-untyped-call] # likewise


# Applies a batch of writes to different sagas, each atomically, in one statement. A refused write raises
# nothing (it would abort the caller's transaction): its saga comes back with `written` NULL, and `found`
# says whether it is missing or at another version.
#
# - Rows are locked in id order, so that two batches can't deadlock; the lock also makes the ids of a saga's
#   log entries follow the order of its commits, and makes `version` the latest committed one.
# - LATERAL makes it one index probe a saga whatever the statistics say: a cached plan made when the table
#   was empty must not turn into a sequential scan per write when it is full.
# - SELECT around each array hides its length from the planner. Otherwise it would find a plan of its own for
#   every call cheaper than the prepared one, and planning takes longer than executing.
# - The times are the statement's, not the transaction's, which may have begun long ago; a step that waited in
#   a buffer gets the time at which it was logged.
# - SAVE_UNLOCKED waits for nobody: a row that somebody has locked is skipped, and `is_there` tells it from a
#   missing one; an INSERT can't skip an id that somebody is creating, so it fails soon, with 55P03.
_SAVE = """
WITH input AS MATERIALIZED (
    SELECT i.*
    FROM unnest(
        (SELECT CAST(:saga_ids AS uuid[])), (SELECT CAST(:names AS text[])), (SELECT CAST(:statuses AS text[])),
        (SELECT CAST(CAST(:contexts AS text[]) AS json[])), (SELECT CAST(:attempts AS integer[])),
        (SELECT CAST(:expected AS bigint[]))
    ) AS i (saga_id, name, status, context, attempts, expected) {patience}
    ORDER BY saga_id
), created AS (
    INSERT INTO saga_executions (id, name, status, context, recovery_attempts, created_at, updated_at)
    SELECT saga_id, name, COALESCE(status, 'PENDING'), COALESCE(context, '{{}}'), COALESCE(attempts, 0),
        statement_timestamp(), statement_timestamp()
    FROM input
    WHERE name IS NOT NULL
    ON CONFLICT (id) DO NOTHING
    RETURNING id, version
), locked AS MATERIALIZED (
    SELECT e.id, e.version, i.status, i.context, i.attempts,
        i.expected IS NULL OR i.expected = e.version AS accepted,
        i.status IS NOT NULL OR i.context IS NOT NULL OR i.attempts IS NOT NULL AS changes
    FROM input i
    CROSS JOIN LATERAL (
        SELECT id, version FROM saga_executions WHERE id = i.saga_id FOR NO KEY UPDATE {wait}
    ) e
    WHERE i.name IS NULL
), updated AS (
    UPDATE saga_executions e
    SET status = COALESCE(l.status, e.status),
        context = COALESCE(l.context, e.context),
        recovery_attempts = COALESCE(l.attempts, e.recovery_attempts),
        version = e.version + 1,
        updated_at = statement_timestamp()
    FROM locked l
    WHERE e.id = l.id AND l.accepted AND l.changes
    RETURNING e.id, e.version
), written AS (
    SELECT id, version FROM created
    UNION ALL
    SELECT id, version FROM updated
    UNION ALL
    SELECT id, version FROM locked WHERE accepted AND NOT changes
), logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT s.saga_id, s.step_name, s.action, s.status, s.details,
        statement_timestamp() - make_interval(secs => s.age)
    FROM unnest(
        (SELECT CAST(:step_saga_ids AS uuid[])), (SELECT CAST(:step_names AS text[])),
        (SELECT CAST(:step_actions AS text[])), (SELECT CAST(:step_statuses AS text[])),
        (SELECT CAST(:step_details AS text[])), (SELECT CAST(:step_ages AS double precision[]))
    ) WITH ORDINALITY AS s (saga_id, step_name, action, status, details, age, position)
    JOIN written w ON w.id = s.saga_id
    ORDER BY s.position
)
SELECT i.saga_id, w.version AS written, l.version AS found,
    CASE WHEN l.id IS NULL THEN (SELECT TRUE FROM saga_executions WHERE id = i.saga_id) END AS is_there
FROM input i
LEFT JOIN written w ON w.id = i.saga_id
LEFT JOIN locked l ON l.id = i.saga_id
"""
SAVE = Statement(_SAVE.format(wait="", patience=""))
SAVE_UNLOCKED = Statement(
    _SAVE.format(
        wait="SKIP LOCKED",
        # In force as soon as it is called, until the end of this statement.
        patience="CROSS JOIN (SELECT set_config('lock_timeout', '100ms', TRUE)) AS patience",
    )
)

_EXECUTION = """
    id, name, status, CAST(context AS text) AS context, version, recovery_attempts,
    lease_owner, lease_expires_at, created_at, updated_at
"""

SAGA = Statement(f"SELECT {_EXECUTION} FROM saga_executions WHERE id = :saga_id")  # noqa: S608 - put together from constants

# The outer join tells a saga without history (one row of NULLs) from one that isn't there (no row).
HISTORY = Statement("""
SELECT l.id, l.step_name, l.action, l.status, l.details, l.created_at
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id
WHERE e.id = :saga_id
ORDER BY l.id
""")

# The status list stands as in the predicate of ix_saga_executions_recovery, which holds the living sagas only.
STALE = Statement(f"""
SELECT {_EXECUTION}
FROM saga_executions
WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
    AND updated_at <= statement_timestamp() - CAST(:stale_after AS interval)
    AND recovery_attempts < :max_attempts
    AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
    AND (CAST(:name AS text) IS NULL OR name = CAST(:name AS text))
ORDER BY recovery_attempts, updated_at, id
LIMIT :limit
""")  # noqa: S608 - put together from constants

REVISION = Statement("SELECT version_num FROM saga_store_version")
