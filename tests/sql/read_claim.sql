WITH
candidates AS MATERIALIZED (
    SELECT id, recovery_attempts, updated_at
    FROM saga_executions
    WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
    AND updated_at <= statement_timestamp() - make_interval(secs => CAST(%(stale_after)b AS double precision))
    - make_interval(
        secs => LEAST(
            CAST(%(max_backoff)b AS double precision),
            CAST(%(backoff)b AS double precision) * (power(2, LEAST(recovery_attempts, 60)) - 1)
        )
    )
    AND recovery_attempts < %(max_attempts)b
    AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
    AND (CAST(%(name)b AS text) IS NULL OR name = CAST(%(name)b AS text))
    ORDER BY recovery_attempts, updated_at, id
    LIMIT %(limit)b
    FOR NO KEY UPDATE SKIP LOCKED
),
claimed AS (
    UPDATE saga_executions e
    SET lease_owner = CAST(%(owner)b AS text),
    lease_expires_at = statement_timestamp() + make_interval(secs => CAST(%(lease)b AS double precision)),
    recovery_attempts = e.recovery_attempts + 1,
    version = e.version + 1,
    updated_at = statement_timestamp()
    FROM candidates c
    WHERE e.id = c.id
    RETURNING e.*, c.recovery_attempts AS tried, c.updated_at AS unchanged_since
)
SELECT
id, convert_to(name, 'UTF8'), convert_to(status, 'UTF8'), convert_to(CAST(context AS text), 'UTF8'),
CAST(version AS bigint), CAST(recovery_attempts AS bigint), convert_to(lease_owner, 'UTF8'),
timestamptz_send(lease_expires_at), timestamptz_send(created_at), timestamptz_send(updated_at)
FROM claimed
ORDER BY tried, unchanged_since, id
