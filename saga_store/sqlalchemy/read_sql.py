"""The statements that read, and the one that claims; no I/O.

What they return is cast, also where it needn't be: so that a plan still fits, whatever a later migration makes of a
column. How it travels is told in wire.py.
"""

from saga_store.sqlalchemy.statement import Statement

RECENT_WRITES = Statement("""
SELECT id, CAST(version AS bigint), convert_to(CAST(recent_writes AS text), 'UTF8'), timestamptz_send(archived_at)
FROM saga_executions
WHERE id = ANY (CAST(CAST(:saga_ids AS text) AS uuid[]))
""")

# Without names of their own: ORDER BY would take them for what it sorts by.
_EXECUTION = """
    id, convert_to(name, 'UTF8'), convert_to(status, 'UTF8'), convert_to(CAST(context AS text), 'UTF8'),
    CAST(version AS bigint), CAST(recovery_attempts AS bigint), convert_to(lease_owner, 'UTF8'),
    timestamptz_send(lease_expires_at), timestamptz_send(created_at), timestamptz_send(updated_at)
"""
_ENTRY = """
    CAST(l.id AS bigint), convert_to(l.step_name, 'UTF8'), convert_to(l.action, 'UTF8'), convert_to(l.status, 'UTF8'),
    convert_to(l.details, 'UTF8'), timestamptz_send(l.created_at)
"""

# What is read of one saga ends by when it was archived, if it is the stub of one that was let go.
_STUB = "timestamptz_send(archived_at)"

SAGA = Statement(f"SELECT {_EXECUTION}, {_STUB} FROM saga_executions WHERE id = :saga_id")  # noqa: S608 - put together from constants

# The outer join tells a saga without history (one row of NULLs) from one that isn't there (no row).
HISTORY = Statement(f"""
SELECT {_ENTRY}, {_STUB}
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id
WHERE e.id = :saga_id
ORDER BY l.id
""")  # noqa: S608 - put together from constants

# LATERAL, so that the limit is one of entries and a saga without any still gives a row.
HISTORY_PAGE = Statement(f"""
SELECT {_ENTRY}, {_STUB}
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
""")  # noqa: S608 - put together from constants

# The status list stands as in the predicate of ix_saga_executions_recovery, which holds the living sagas only.
STALE = Statement(f"""
SELECT {_EXECUTION}
FROM saga_executions
WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
    AND updated_at <= statement_timestamp() - make_interval(secs => CAST(:stale_after AS double precision))
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
        AND updated_at <= statement_timestamp() - make_interval(secs => CAST(:stale_after AS double precision))
        - make_interval(
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
        lease_expires_at = statement_timestamp() + make_interval(secs => CAST(:lease AS double precision)),
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

# For all who wait for sagas at once. No condition on the status: the index of living sagas has nothing to do with it.
UNFINISHED = Statement("""
SELECT id, status IN ('PENDING', 'RUNNING', 'COMPENSATING') AS is_unfinished
FROM saga_executions
WHERE id = ANY (CAST(CAST(:saga_ids AS text) AS uuid[]))
""")

HOLDS = Statement("""
SELECT lease_owner = CAST(:owner AS text) AND version = :version AND lease_expires_at > statement_timestamp() AS held
FROM saga_executions
WHERE id = :saga_id
""")

# As in HISTORY, a saga with nothing in doubt gives one row of NULLs, and a missing one none.
IN_DOUBT = Statement(f"""
SELECT {_ENTRY}, {_STUB}
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id AND l.status = 'STARTED' AND NOT EXISTS (
    SELECT FROM saga_logs later
    WHERE later.saga_id = l.saga_id AND later.id > l.id AND later.status <> 'STARTED'
        AND later.step_name = l.step_name AND later.action = l.action
)
WHERE e.id = :saga_id
ORDER BY l.id
""")  # noqa: S608 - put together from constants

# How long a statement of this connection may wait for a lock, and how long it may take, in milliseconds; 0: for ever.
PATIENCE = Statement("""
SELECT CAST(setting AS bigint)
FROM pg_settings
WHERE name IN ('lock_timeout', 'statement_timeout')
ORDER BY name
""")

# Enough to decide by, of a saga whose row may not be readable otherwise.
STATE = Statement("""
SELECT convert_to(status, 'UTF8'), CAST(recovery_attempts AS bigint), convert_to(lease_owner, 'UTF8'),
    CAST(version AS bigint), timestamptz_send(archived_at)
FROM saga_executions
WHERE id = :saga_id
""")

# Where the record of a stub is; who may read sagas may not be allowed to read the ledger.
MAY_READ_LEDGER = Statement("SELECT has_table_privilege(CAST('saga_archives' AS regclass), 'SELECT')")
ARCHIVE_OF = Statement("""
SELECT convert_to(a.uri, 'UTF8')
FROM saga_executions e
JOIN saga_archives a ON a.archived_at = e.archived_at
WHERE e.id = :saga_id
""")

REVISION = Statement("SELECT convert_to(version_num, 'UTF8') FROM saga_store_version")

# What it takes to be used as a shard. Two storages on the same table have the same last column.
SHARD_STATE = Statement("""
SELECT convert_to(CAST(r.cluster AS text), 'UTF8'), CAST(r.shard AS bigint), CAST(r.shards AS bigint),
    convert_to(r.hash, 'UTF8'), NOT EXISTS (SELECT FROM saga_executions) AS is_empty,
    convert_to(
        concat_ws(
            ' ', (SELECT system_identifier FROM pg_control_system()),
            (SELECT oid FROM pg_database WHERE datname = current_database()),
            CAST(CAST('saga_executions' AS regclass) AS oid)
        ), 'UTF8'
    ) AS place
FROM (SELECT) one
LEFT JOIN saga_shard r ON TRUE
""")
RECORD_SHARD = Statement("""
INSERT INTO saga_shard (cluster, shard, shards, hash)
VALUES (CAST(CAST(:cluster AS text) AS uuid), CAST(:shard AS integer), CAST(:shards AS integer), CAST(:hash AS text))
ON CONFLICT DO NOTHING
RETURNING shard
""")
