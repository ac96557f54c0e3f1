WITH
created AS (
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
        created_at, updated_at
    )
    SELECT i.saga_id, i.name, COALESCE(i.status, 'PENDING'), COALESCE(i.context, '{}'), COALESCE(CAST(NULL AS integer), 0),
    CASE WHEN i.status IN ('COMPLETED', 'FAILED') THEN NULL ELSE CAST(NULL AS text) END,
    CASE WHEN i.status IN ('COMPLETED', 'FAILED') THEN NULL ELSE i.ends END,
    CASE WHEN CAST(NULL AS bigint) IS NOT NULL THEN ARRAY[CAST(NULL AS bigint)] END,
    i.at, i.at
    FROM (SELECT i.*, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) AS ends FROM (
            (SELECT CAST(CAST(%(new_saga_id)b AS text) AS uuid[]) AS saga_id, CAST(%(new_name)b AS text[]) AS name, CAST(string_to_array(CAST(%(new_status)b AS text), ',', '') AS text[]) AS status, CAST(CAST(%(new_context)b AS text[]) AS json[]) AS context OFFSET 0) AS i_arrays
            CROSS JOIN LATERAL unnest(i_arrays.saga_id, i_arrays.name, i_arrays.status, i_arrays.context) WITH ORDINALITY AS i (saga_id, name, status, context, position)
    )) i CROSS JOIN (SELECT set_config('lock_timeout', '100ms', TRUE)) AS patience
    ON CONFLICT (id) DO NOTHING
    RETURNING id, CAST(version AS bigint) AS version
) SELECT id, version FROM created
