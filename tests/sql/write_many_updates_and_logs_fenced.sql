WITH
updated AS (
    UPDATE saga_executions e
    SET status = COALESCE(i.status, e.status),
    context = COALESCE(i.context, e.context),
    recovery_attempts = COALESCE(CAST(NULL AS integer), e.recovery_attempts),
    lease_owner = CASE WHEN i.status IN ('COMPLETED', 'FAILED') OR CAST(NULL AS boolean) THEN NULL
    ELSE COALESCE(CAST(NULL AS text), e.lease_owner) END,
    lease_expires_at = CASE WHEN i.status IN ('COMPLETED', 'FAILED') OR CAST(NULL AS boolean)
    OR COALESCE(CAST(NULL AS text), e.lease_owner) IS NULL THEN NULL
    ELSE COALESCE(i.ends, e.lease_expires_at) END,
    recent_writes = CASE
    WHEN i.write_id IS NULL THEN e.recent_writes
    WHEN i.changes THEN
    e.recent_writes[GREATEST(cardinality(e.recent_writes) - 8 + 2, 1):] || i.write_id
    WHEN (cardinality(e.recent_writes) < 32) IS NOT FALSE
    THEN e.recent_writes || i.write_id
    WHEN e.recent_writes[1] >> 48 = e.version & 32767 THEN e.recent_writes
    ELSE e.recent_writes[2:] || i.write_id END,
    version = e.version + CAST(i.changes AS integer),
    updated_at = CASE WHEN i.changes THEN i.at ELSE e.updated_at END
    FROM (
        SELECT i.*, (i.status IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) AS changes, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) AS ends
        FROM (
            (SELECT CAST(CAST(%(update_saga_id)b AS text) AS uuid[]) AS saga_id, CAST(string_to_array(CAST(%(update_status)b AS text), ',', '') AS text[]) AS status, CAST(CAST(%(update_context)b AS text[]) AS json[]) AS context, CAST(string_to_array(CAST(%(update_expected)b AS text), ',', '') AS bigint[]) AS expected, CAST(string_to_array(CAST(%(update_write_id)b AS text), ',', '') AS bigint[]) AS write_id OFFSET 0) AS i_arrays
            CROSS JOIN LATERAL unnest(i_arrays.saga_id, i_arrays.status, i_arrays.context, i_arrays.expected, i_arrays.write_id) WITH ORDINALITY AS i (saga_id, status, context, expected, write_id, position)
        ) CROSS JOIN LATERAL (
            SELECT id, version
            FROM saga_executions WHERE id = i.saga_id AND archived_at IS NULL AND (i.expected IS NULL OR i.expected = version) AND NOT COALESCE(i.write_id = ANY (recent_writes), FALSE)
            FOR NO KEY UPDATE SKIP LOCKED) l
        WHERE l.id = i.saga_id) i WHERE e.id = i.saga_id
    RETURNING e.id, CAST(e.version AS bigint) AS version
),
written AS (SELECT id, version FROM updated),
logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT s.step_saga_id, s.step_name, s.step_action, s.step_status, s.step_details,
    statement_timestamp() - make_interval(secs => COALESCE(CAST(NULL AS double precision), 0))
    FROM written w JOIN (
        (SELECT CAST(CAST(%(step_saga_id)b AS text) AS uuid[]) AS step_saga_id, CAST(%(step_name)b AS text[]) AS step_name, CAST(string_to_array(CAST(%(step_action)b AS text), ',', '') AS text[]) AS step_action, CAST(string_to_array(CAST(%(step_status)b AS text), ',', '') AS text[]) AS step_status, CAST(%(step_details)b AS text[]) AS step_details OFFSET 0) AS s_arrays
        CROSS JOIN LATERAL unnest(s_arrays.step_saga_id, s_arrays.step_name, s_arrays.step_action, s_arrays.step_status, s_arrays.step_details) WITH ORDINALITY AS s (step_saga_id, step_name, step_action, step_status, step_details, position)
    ) ON s.step_saga_id = w.id ORDER BY s.position
) SELECT id, version FROM updated
