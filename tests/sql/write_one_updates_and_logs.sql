WITH
written AS (
    UPDATE saga_executions e
    SET status = COALESCE(CAST(NULL AS text), e.status),
    context = COALESCE(i.context, e.context),
    recovery_attempts = COALESCE(CAST(NULL AS integer), e.recovery_attempts),
    lease_owner = CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') OR CAST(NULL AS boolean) THEN NULL
    ELSE COALESCE(CAST(NULL AS text), e.lease_owner) END,
    lease_expires_at = CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') OR CAST(NULL AS boolean)
    OR COALESCE(CAST(NULL AS text), e.lease_owner) IS NULL THEN NULL
    ELSE COALESCE(i.ends, e.lease_expires_at) END,
    recent_writes = CASE
    WHEN CAST(NULL AS bigint) IS NULL THEN e.recent_writes
    WHEN (CAST(NULL AS text) IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) THEN
    e.recent_writes[GREATEST(cardinality(e.recent_writes) - 8 + 2, 1):] || CAST(NULL AS bigint)
    WHEN (cardinality(e.recent_writes) < 32) IS NOT FALSE
    THEN e.recent_writes || CAST(NULL AS bigint)
    WHEN e.recent_writes[1] >> 48 = e.version & 32767 THEN e.recent_writes
    ELSE e.recent_writes[2:] || CAST(NULL AS bigint) END,
    version = e.version + CAST((CAST(NULL AS text) IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) AS integer),
    updated_at = CASE WHEN (CAST(NULL AS text) IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) THEN i.at ELSE e.updated_at END
    FROM (SELECT CAST(CAST(%(context)b AS text) AS json) AS context, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) AS ends) AS i WHERE e.id = (
        SELECT id
        FROM saga_executions WHERE id = %(saga_id)b AND archived_at IS NULL
        FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING e.id, CAST(e.version AS bigint) AS version
),
logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT w.id, s.step_name, s.step_action, s.step_status, s.step_details,
    statement_timestamp() - make_interval(secs => COALESCE(CAST(NULL AS double precision), 0))
    FROM written w CROSS JOIN (
        (SELECT CAST(%(step_name)b AS text[]) AS step_name, CAST(string_to_array(CAST(%(step_action)b AS text), ',', '') AS text[]) AS step_action, CAST(string_to_array(CAST(%(step_status)b AS text), ',', '') AS text[]) AS step_status, CAST(%(step_details)b AS text[]) AS step_details OFFSET 0) AS s_arrays
        CROSS JOIN LATERAL unnest(s_arrays.step_name, s_arrays.step_action, s_arrays.step_status, s_arrays.step_details) WITH ORDINALITY AS s (step_name, step_action, step_status, step_details, position)
    ) ORDER BY s.position
) SELECT id, CAST(version AS bigint) FROM written
