WITH
input AS (
    SELECT i.*, (i.status IS NOT NULL OR i.context IS NOT NULL OR i.attempts IS NOT NULL OR i.lease_owner IS NOT NULL OR COALESCE(i.releases, FALSE)) AS changes, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => i.lease_seconds) AS ends
    FROM (
        (SELECT CAST(CAST(%(saga_id)b AS text) AS uuid[]) AS saga_id, CAST(%(name)b AS text[]) AS name, CAST(string_to_array(CAST(%(status)b AS text), ',', '') AS text[]) AS status, CAST(CAST(%(context)b AS text[]) AS json[]) AS context, CAST(string_to_array(CAST(%(attempts)b AS text), ',', '') AS integer[]) AS attempts, CAST(string_to_array(CAST(%(expected)b AS text), ',', '') AS bigint[]) AS expected, CAST(%(lease_owner)b AS text[]) AS lease_owner, CAST(string_to_array(CAST(%(lease_seconds)b AS text), ',', '') AS double precision[]) AS lease_seconds, CAST(string_to_array(CAST(%(releases)b AS text), ',', '') AS boolean[]) AS releases, CAST(string_to_array(CAST(%(write_id)b AS text), ',', '') AS bigint[]) AS write_id OFFSET 0) AS i_arrays
        CROSS JOIN LATERAL unnest(i_arrays.saga_id, i_arrays.name, i_arrays.status, i_arrays.context, i_arrays.attempts, i_arrays.expected, i_arrays.lease_owner, i_arrays.lease_seconds, i_arrays.releases, i_arrays.write_id) WITH ORDINALITY AS i (saga_id, name, status, context, attempts, expected, lease_owner, lease_seconds, releases, write_id, position)
    ) ORDER BY saga_id),
created AS (
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, recent_writes,
        created_at, updated_at
    )
    SELECT i.saga_id, i.name, COALESCE(i.status, 'PENDING'), COALESCE(i.context, '{}'), COALESCE(i.attempts, 0),
    CASE WHEN i.status IN ('COMPLETED', 'FAILED') THEN NULL ELSE i.lease_owner END,
    CASE WHEN i.status IN ('COMPLETED', 'FAILED') THEN NULL ELSE i.ends END,
    CASE WHEN i.write_id IS NOT NULL THEN ARRAY[i.write_id] END,
    i.at, i.at
    FROM input i CROSS JOIN (SELECT set_config('lock_timeout', '10ms', TRUE)) AS patience WHERE i.name IS NOT NULL
    ON CONFLICT (id) DO NOTHING
    RETURNING id, CAST(version AS bigint) AS version
),
locked AS (
    SELECT i.*, e.*, (i.changes OR i.lease_seconds IS NOT NULL OR (i.write_id IS NOT NULL AND NOT e.full_up)) AS updates
    FROM input i
    CROSS JOIN LATERAL (
        SELECT
        id, version, archived_at, lease_owner AS holder, lease_expires_at AS held_until,
        COALESCE(cardinality(recent_writes) >= 32 AND recent_writes[1] >> 48 = version & 32767, FALSE) AS full_up, COALESCE(i.write_id = ANY (recent_writes), FALSE) AS recorded, archived_at IS NULL AND (i.expected IS NULL OR i.expected = version) AND NOT COALESCE(i.write_id = ANY (recent_writes), FALSE) AND (i.lease_owner IS NULL OR lease_owner IS NULL OR lease_owner = i.lease_owner OR lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp()) AND NOT (i.write_id IS NOT NULL AND NOT i.changes AND COALESCE(cardinality(recent_writes) >= 32 AND recent_writes[1] >> 48 = version & 32767, FALSE)) AS accepted
        FROM saga_executions WHERE id = i.saga_id AND TRUE
        FOR NO KEY UPDATE SKIP LOCKED) e
    WHERE i.name IS NULL),
updated AS (
    UPDATE saga_executions e
    SET status = COALESCE(i.status, e.status),
    context = COALESCE(i.context, e.context),
    recovery_attempts = COALESCE(i.attempts, e.recovery_attempts),
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
    FROM locked i WHERE e.id = i.id AND i.accepted AND i.updates
    RETURNING e.id, CAST(e.version AS bigint) AS version
),
written AS (
    SELECT id, version FROM created UNION ALL SELECT id, version FROM updated
    UNION ALL SELECT id, version FROM locked i WHERE i.accepted AND NOT i.updates),
logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT s.step_saga_id, s.step_name, s.step_action, s.step_status, s.step_details,
    statement_timestamp() - make_interval(secs => COALESCE(s.step_age, 0))
    FROM written w JOIN (
        (SELECT CAST(CAST(%(step_saga_id)b AS text) AS uuid[]) AS step_saga_id, CAST(%(step_name)b AS text[]) AS step_name, CAST(string_to_array(CAST(%(step_action)b AS text), ',', '') AS text[]) AS step_action, CAST(string_to_array(CAST(%(step_status)b AS text), ',', '') AS text[]) AS step_status, CAST(%(step_details)b AS text[]) AS step_details, CAST(string_to_array(CAST(%(step_age)b AS text), ',', '') AS double precision[]) AS step_age OFFSET 0) AS s_arrays
        CROSS JOIN LATERAL unnest(s_arrays.step_saga_id, s_arrays.step_name, s_arrays.step_action, s_arrays.step_status, s_arrays.step_details, s_arrays.step_age) WITH ORDINALITY AS s (step_saga_id, step_name, step_action, step_status, step_details, step_age, position)
    ) ON s.step_saga_id = w.id ORDER BY s.position
)
SELECT i.position,
COALESCE(w.version, CASE WHEN l.recorded THEN i.expected + CAST(i.changes AS integer) END) AS written,
CAST(l.version AS bigint) AS found, convert_to(l.holder, 'UTF8') AS holder,
timestamptz_send(l.held_until) AS held_until, timestamptz_send(l.archived_at) AS archived_at,
CASE WHEN l.id IS NULL THEN (SELECT TRUE FROM saga_executions WHERE id = i.saga_id) END AS is_there
FROM input i
LEFT JOIN written w ON w.id = i.saga_id
LEFT JOIN locked l ON l.id = i.saga_id
