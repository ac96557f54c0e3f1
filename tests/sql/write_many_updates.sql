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
    WHEN CAST(NULL AS bigint) IS NULL THEN e.recent_writes
    WHEN i.changes THEN
    e.recent_writes[GREATEST(cardinality(e.recent_writes) - 8 + 2, 1):] || CAST(NULL AS bigint)
    WHEN (cardinality(e.recent_writes) < 32) IS NOT FALSE
    THEN e.recent_writes || CAST(NULL AS bigint)
    WHEN e.recent_writes[1] >> 48 = e.version & 32767 THEN e.recent_writes
    ELSE e.recent_writes[2:] || CAST(NULL AS bigint) END,
    version = e.version + CAST(i.changes AS integer),
    updated_at = CASE WHEN i.changes THEN i.at ELSE e.updated_at END
    FROM (
        SELECT i.*, TRUE AS changes, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) AS ends
        FROM (
            (SELECT CAST(CAST(%(update_saga_id)b AS text) AS uuid[]) AS saga_id, CAST(string_to_array(CAST(%(update_status)b AS text), ',', '') AS text[]) AS status, CAST(CAST(%(update_context)b AS text[]) AS json[]) AS context OFFSET 0) AS i_arrays
            CROSS JOIN LATERAL unnest(i_arrays.saga_id, i_arrays.status, i_arrays.context) WITH ORDINALITY AS i (saga_id, status, context, position)
        ) CROSS JOIN LATERAL (
            SELECT id, version
            FROM saga_executions WHERE id = i.saga_id AND archived_at IS NULL
            FOR NO KEY UPDATE SKIP LOCKED) l
        WHERE l.id = i.saga_id) i WHERE e.id = i.saga_id
    RETURNING e.id, CAST(e.version AS bigint) AS version
) SELECT id, version FROM updated
