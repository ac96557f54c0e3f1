INSERT INTO saga_executions (
    id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
    created_at, updated_at
)
SELECT i.saga_id, i.name, COALESCE(CAST(NULL AS text), 'PENDING'), COALESCE(i.context, '{}'), COALESCE(CAST(NULL AS integer), 0),
CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') THEN NULL ELSE CAST(NULL AS text) END,
CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') THEN NULL ELSE i.ends END,
CASE WHEN CAST(NULL AS bigint) IS NOT NULL THEN ARRAY[CAST(NULL AS bigint)] END,
i.at, i.at
FROM (SELECT CAST(%(saga_id)b AS uuid) AS saga_id, CAST(%(name)b AS text) AS name, CAST(CAST(%(context)b AS text) AS json) AS context, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) AS ends) AS i
ON CONFLICT (id) DO NOTHING
RETURNING id, CAST(version AS bigint) AS version
