INSERT INTO saga_executions (
    id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
    created_at, updated_at
)
SELECT CAST(%(saga_id)b AS uuid), CAST(%(name)b AS text), COALESCE(CAST(NULL AS text), 'PENDING'), COALESCE(CAST(CAST(%(context)b AS text) AS json), '{}'), COALESCE(CAST(NULL AS integer), 0),
CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') THEN NULL ELSE CAST(NULL AS text) END,
CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') THEN NULL
ELSE statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) END,
CASE WHEN CAST(NULL AS bigint) IS NOT NULL THEN ARRAY[CAST(NULL AS bigint)] END,
statement_timestamp(), statement_timestamp()
FROM (SELECT set_config('lock_timeout', '100ms', TRUE)) AS patience
ON CONFLICT (id) DO NOTHING
RETURNING id, CAST(version AS bigint) AS version
