"""The statements that read, and the one that claims; no I/O."""

from saga_store.sqlalchemy.statement import Statement

RECENT_WRITES = Statement("""
SELECT id, version, recent_writes
FROM saga_executions
WHERE id = ANY (CAST(:saga_ids AS uuid[]))
""")

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

# LATERAL, so that the limit is one of entries and a saga without any still gives a row.
HISTORY_PAGE = Statement("""
SELECT l.id, l.step_name, l.action, l.status, l.details, l.created_at
FROM saga_executions e
LEFT JOIN LATERAL (
    SELECT *
    FROM saga_logs
    WHERE saga_id = e.id AND id > :after
    ORDER BY id
    LIMIT :limit
) l ON TRUE
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

# What nobody claims any more. The last attempt of a leased one isn't over.
EXHAUSTED = Statement(f"""
SELECT {_EXECUTION}
FROM saga_executions
WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
    AND recovery_attempts >= :max_attempts
    AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
    AND (CAST(:name AS text) IS NULL OR name = CAST(:name AS text))
ORDER BY updated_at, id
LIMIT :limit
""")  # noqa: S608 - put together from constants

# Leases stale sagas. A row that somebody has locked is skipped, so that claims of several workers don't wait for
# each other; one that was changed since the statement began is judged anew when it is locked. LEAST keeps power()
# from overflowing.
CLAIM = Statement(f"""
WITH candidates AS MATERIALIZED (
    SELECT id, recovery_attempts, updated_at
    FROM saga_executions
    WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
        AND updated_at <= statement_timestamp() - CAST(:stale_after AS interval) - make_interval(
            secs => LEAST(
                CAST(:max_backoff AS double precision),
                CAST(:backoff AS double precision) * (power(2, LEAST(recovery_attempts, 60)) - 1)
            )
        )
        AND recovery_attempts < :max_attempts
        AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
        AND (CAST(:name AS text) IS NULL OR name = CAST(:name AS text))
    ORDER BY recovery_attempts, updated_at, id
    LIMIT :limit
    FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE saga_executions e
    SET lease_owner = CAST(:owner AS text),
        lease_expires_at = statement_timestamp() + CAST(:lease AS interval),
        recovery_attempts = e.recovery_attempts + 1,
        version = e.version + 1,
        updated_at = statement_timestamp()
    FROM candidates c
    WHERE e.id = c.id
    RETURNING e.*, c.recovery_attempts AS tried, c.updated_at AS unchanged_since
)
SELECT {_EXECUTION}
FROM claimed
ORDER BY tried, unchanged_since, id
""")  # noqa: S608 - put together from constants

HOLDS = Statement("""
SELECT lease_owner = CAST(:owner AS text) AND version = :version AND lease_expires_at > statement_timestamp() AS held
FROM saga_executions
WHERE id = :saga_id
""")

# As in HISTORY, a saga with nothing in doubt gives one row of NULLs, and a missing one none.
IN_DOUBT = Statement("""
SELECT l.id, l.step_name, l.action, l.status, l.details, l.created_at
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id AND l.status = 'STARTED' AND NOT EXISTS (
    SELECT FROM saga_logs later
    WHERE later.saga_id = l.saga_id AND later.id > l.id AND later.status <> 'STARTED'
        AND later.step_name = l.step_name AND later.action = l.action
)
WHERE e.id = :saga_id
ORDER BY l.id
""")

REVISION = Statement("SELECT version_num FROM saga_store_version")
