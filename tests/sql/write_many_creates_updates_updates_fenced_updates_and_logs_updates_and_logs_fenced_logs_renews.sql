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
),
updated AS (
    UPDATE saga_executions e
    SET status = COALESCE(i.status, e.status),
    context = COALESCE(i.context, e.context),
    recovery_attempts = COALESCE(CAST(NULL AS integer), e.recovery_attempts),
    lease_owner = CASE WHEN i.status IN ('COMPLETED', 'FAILED') OR i.releases THEN NULL
    ELSE COALESCE(i.lease_owner, e.lease_owner) END,
    lease_expires_at = CASE WHEN i.status IN ('COMPLETED', 'FAILED') OR i.releases
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
        SELECT i.*, (i.status IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR i.lease_owner IS NOT NULL OR COALESCE(i.releases, FALSE)) AS changes, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => i.lease_seconds) AS ends
        FROM (
            (SELECT CAST(CAST(%(update_saga_id)b AS text) AS uuid[]) AS saga_id, CAST(string_to_array(CAST(%(update_status)b AS text), ',', '') AS text[]) AS status, CAST(CAST(%(update_context)b AS text[]) AS json[]) AS context, CAST(string_to_array(CAST(%(update_expected)b AS text), ',', '') AS bigint[]) AS expected, CAST(%(update_lease_owner)b AS text[]) AS lease_owner, CAST(string_to_array(CAST(%(update_lease_seconds)b AS text), ',', '') AS double precision[]) AS lease_seconds, CAST(string_to_array(CAST(%(update_releases)b AS text), ',', '') AS boolean[]) AS releases, CAST(string_to_array(CAST(%(update_write_id)b AS text), ',', '') AS bigint[]) AS write_id OFFSET 0) AS i_arrays
            CROSS JOIN LATERAL unnest(i_arrays.saga_id, i_arrays.status, i_arrays.context, i_arrays.expected, i_arrays.lease_owner, i_arrays.lease_seconds, i_arrays.releases, i_arrays.write_id) WITH ORDINALITY AS i (saga_id, status, context, expected, lease_owner, lease_seconds, releases, write_id, position)
        ) CROSS JOIN LATERAL (
            SELECT id, version
            FROM saga_executions WHERE id = i.saga_id AND archived_at IS NULL AND (i.expected IS NULL OR i.expected = version) AND NOT COALESCE(i.write_id = ANY (recent_writes), FALSE) AND (i.lease_owner IS NULL OR lease_owner IS NULL OR lease_owner = i.lease_owner OR lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
            FOR NO KEY UPDATE SKIP LOCKED) l
        WHERE l.id = i.saga_id) i WHERE e.id = i.saga_id
    RETURNING e.id, CAST(e.version AS bigint) AS version
),
written AS (SELECT id, version FROM created UNION ALL SELECT id, version FROM updated),
logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT s.step_saga_id, s.step_name, s.step_action, s.step_status, s.step_details,
    statement_timestamp() - make_interval(secs => COALESCE(CAST(NULL AS double precision), 0))
    FROM written w JOIN (
        (SELECT CAST(CAST(%(step_saga_id)b AS text) AS uuid[]) AS step_saga_id, CAST(%(step_name)b AS text[]) AS step_name, CAST(string_to_array(CAST(%(step_action)b AS text), ',', '') AS text[]) AS step_action, CAST(string_to_array(CAST(%(step_status)b AS text), ',', '') AS text[]) AS step_status, CAST(%(step_details)b AS text[]) AS step_details OFFSET 0) AS s_arrays
        CROSS JOIN LATERAL unnest(s_arrays.step_saga_id, s_arrays.step_name, s_arrays.step_action, s_arrays.step_status, s_arrays.step_details) WITH ORDINALITY AS s (step_saga_id, step_name, step_action, step_status, step_details, position)
    ) ON s.step_saga_id = w.id ORDER BY s.position
),
appended AS (
    SELECT s.*, l.version
    FROM (
        (SELECT CAST(CAST(%(append_step_saga_id)b AS text) AS uuid[]) AS step_saga_id, CAST(%(append_step_name)b AS text[]) AS step_name, CAST(string_to_array(CAST(%(append_step_action)b AS text), ',', '') AS text[]) AS step_action, CAST(string_to_array(CAST(%(append_step_status)b AS text), ',', '') AS text[]) AS step_status, CAST(%(append_step_details)b AS text[]) AS step_details OFFSET 0) AS s_arrays
        CROSS JOIN LATERAL unnest(s_arrays.step_saga_id, s_arrays.step_name, s_arrays.step_action, s_arrays.step_status, s_arrays.step_details) WITH ORDINALITY AS s (step_saga_id, step_name, step_action, step_status, step_details, position)
    ) CROSS JOIN LATERAL (
        SELECT id, version
        FROM saga_executions WHERE id = s.step_saga_id AND archived_at IS NULL
        FOR NO KEY UPDATE SKIP LOCKED) l),
logged_alone AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT s.step_saga_id, s.step_name, s.step_action, s.step_status, s.step_details,
    statement_timestamp() - make_interval(secs => COALESCE(CAST(NULL AS double precision), 0))
    FROM appended s
) SELECT id, version FROM created UNION ALL SELECT id, version FROM updated UNION ALL SELECT step_saga_id, version FROM appended
