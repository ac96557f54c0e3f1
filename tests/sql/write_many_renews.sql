WITH
updated AS (
    UPDATE saga_executions e
    SET status = COALESCE(CAST(NULL AS text), e.status),
    context = COALESCE(CAST(NULL AS json), e.context),
    recovery_attempts = COALESCE(CAST(NULL AS integer), e.recovery_attempts),
    lease_owner = CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') OR i.releases THEN NULL
    ELSE COALESCE(i.lease_owner, e.lease_owner) END,
    lease_expires_at = CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') OR i.releases
    OR COALESCE(i.lease_owner, e.lease_owner) IS NULL THEN NULL
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
        SELECT i.*, (CAST(NULL AS text) IS NOT NULL OR CAST(NULL AS json) IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR i.lease_owner IS NOT NULL OR COALESCE(i.releases, FALSE)) AS changes, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => i.lease_seconds) AS ends
        FROM (
            (SELECT CAST(CAST(%(update_saga_id)b AS text) AS uuid[]) AS saga_id, CAST(string_to_array(CAST(%(update_expected)b AS text), ',', '') AS bigint[]) AS expected, CAST(%(update_lease_owner)b AS text[]) AS lease_owner, CAST(string_to_array(CAST(%(update_lease_seconds)b AS text), ',', '') AS double precision[]) AS lease_seconds, CAST(string_to_array(CAST(%(update_releases)b AS text), ',', '') AS boolean[]) AS releases, CAST(string_to_array(CAST(%(update_write_id)b AS text), ',', '') AS bigint[]) AS write_id OFFSET 0) AS i_arrays
            CROSS JOIN LATERAL unnest(i_arrays.saga_id, i_arrays.expected, i_arrays.lease_owner, i_arrays.lease_seconds, i_arrays.releases, i_arrays.write_id) WITH ORDINALITY AS i (saga_id, expected, lease_owner, lease_seconds, releases, write_id, position)
        ) CROSS JOIN LATERAL (
            SELECT id, version
            FROM saga_executions WHERE id = i.saga_id AND archived_at IS NULL AND (i.expected IS NULL OR i.expected = version) AND NOT COALESCE(i.write_id = ANY (recent_writes), FALSE) AND (i.lease_owner IS NULL OR lease_owner IS NULL OR lease_owner = i.lease_owner OR lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
            FOR NO KEY UPDATE SKIP LOCKED) l
        WHERE l.id = i.saga_id) i WHERE e.id = i.saga_id
    RETURNING e.id, CAST(e.version AS bigint) AS version
) SELECT id, version FROM updated
