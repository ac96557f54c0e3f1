WITH
picked AS MATERIALIZED ((
        SELECT id, name, status, version, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at, archived_at, retain_until,
        CASE WHEN NOT (status IN ('PENDING', 'RUNNING', 'COMPENSATING')) THEN 'finished'
        WHEN lease_expires_at > clock.at THEN 'held'
        WHEN recovery_attempts >= CAST(%(max_attempts)b AS integer) THEN 'exhausted'
        WHEN lease_expires_at IS NOT NULL THEN 'abandoned'
        ELSE 'active' END AS standing, row_number() OVER (ORDER BY created_at, id) AS position
        FROM saga_executions CROSS JOIN (SELECT statement_timestamp() AS at) AS clock
        WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING') AND name = CAST(%(name)b AS text)
        ORDER BY created_at, id
        LIMIT 5001) UNION ALL (
        SELECT id, name, status, version, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at, archived_at, retain_until,
        CASE WHEN NOT (status IN ('PENDING', 'RUNNING', 'COMPENSATING')) THEN 'finished'
        WHEN lease_expires_at > clock.at THEN 'held'
        WHEN recovery_attempts >= CAST(%(max_attempts)b AS integer) THEN 'exhausted'
        WHEN lease_expires_at IS NOT NULL THEN 'abandoned'
        ELSE 'active' END AS standing, row_number() OVER (ORDER BY created_at DESC, id DESC) AS position
        FROM saga_executions CROSS JOIN (SELECT statement_timestamp() AS at) AS clock
        WHERE status = 'FAILED' AND name = CAST(%(name)b AS text) AND created_at >= statement_timestamp() - make_interval(secs => CAST(%(window)b AS double precision))
        ORDER BY created_at DESC, id DESC
        LIMIT 5001) UNION ALL (
        SELECT id, name, status, version, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at, archived_at, retain_until,
        CASE WHEN NOT (status IN ('PENDING', 'RUNNING', 'COMPENSATING')) THEN 'finished'
        WHEN lease_expires_at > clock.at THEN 'held'
        WHEN recovery_attempts >= CAST(%(max_attempts)b AS integer) THEN 'exhausted'
        WHEN lease_expires_at IS NOT NULL THEN 'abandoned'
        ELSE 'active' END AS standing, row_number() OVER (ORDER BY created_at DESC, id DESC) AS position
        FROM saga_executions CROSS JOIN (SELECT statement_timestamp() AS at) AS clock
        WHERE status = 'COMPLETED' AND name = CAST(%(name)b AS text) AND created_at >= statement_timestamp() - make_interval(secs => CAST(%(window)b AS double precision))
        ORDER BY created_at DESC, id DESC
        LIMIT 5001)),
first AS MATERIALIZED (
    SELECT * FROM picked
    WHERE position <= 5000
),
judged AS MATERIALIZED (
    SELECT p.*, h.last_id, h.error_id, h.in_doubt, GREATEST(h.changed_at, CASE WHEN h.is_touched THEN p.created_at ELSE p.updated_at END) AS since,
    CASE WHEN p.standing = 'active' AND GREATEST(h.changed_at, CASE WHEN h.is_touched THEN p.created_at ELSE p.updated_at END) <= clock.stale_before THEN 'stale'
    ELSE p.standing END AS condition,
    last.step_name AS last_step
    FROM first p
    CROSS JOIN (SELECT statement_timestamp() - make_interval(secs => CAST(%(stale_after)b AS double precision)) AS stale_before) AS clock
    CROSS JOIN LATERAL (
        SELECT max(last_id) AS last_id,
        max(failed_id) FILTER (WHERE failed_id > COALESCE(done_id, 0)) AS error_id,
        count(*) FILTER (WHERE started_id > GREATEST(failed_id, done_id, 0)) AS in_doubt,
        max(changed_at) AS changed_at,
        COALESCE(bool_or(is_touched), FALSE) AS is_touched
        FROM (
            SELECT max(id) FILTER (WHERE NOT is_intervention) AS last_id,
            max(id) FILTER (WHERE status = 'STARTED') AS started_id,
            max(id) FILTER (WHERE status = 'FAILED' AND NOT is_intervention) AS failed_id,
            max(id) FILTER (WHERE status IN ('COMPLETED', 'COMPENSATED')) AS done_id,
            max(created_at) FILTER (WHERE NOT is_by_person) AS changed_at,
            bool_or(is_intervention AND created_at = p.updated_at) AS is_touched
            FROM (
                SELECT *, bool_or(is_intervention) OVER (PARTITION BY created_at) AS is_by_person
                FROM (
                    SELECT id, step_name, action, status, created_at,
                    starts_with(step_name, 'saga_store.') AS is_intervention
                    FROM saga_logs
                    WHERE saga_id = p.id AND TRUE
                    ORDER BY id DESC
                    LIMIT GREATEST(100, LEAST(1000, 500000 / GREATEST((SELECT count(*) FROM first), 1)))
                ) recent
            ) told_apart
            GROUP BY step_name, action, is_intervention
        ) steps) h
    LEFT JOIN LATERAL (SELECT * FROM saga_logs WHERE saga_id = p.id AND id = h.last_id LIMIT 1) last ON TRUE
),
asked AS MATERIALIZED (
    SELECT * FROM judged
    WHERE (created_at, id) < (CAST(CAST(%(after_created_at)b AS text) AS timestamp) AT TIME ZONE 'UTC', CAST(CAST(%(after_id)b AS text) AS uuid))
    ORDER BY created_at DESC, id DESC
    LIMIT %(limit)b
)
(SELECT convert_to(CAST(json_build_array(statement_timestamp() AT TIME ZONE 'UTC', (SELECT COALESCE(bool_or(position > 5000), FALSE) FROM picked)) AS text), 'UTF8') AS answer)
UNION ALL
(SELECT convert_to(CAST(json_build_array(s.id, s.lease_expires_at AT TIME ZONE 'UTC', s.created_at AT TIME ZONE 'UTC', s.updated_at AT TIME ZONE 'UTC', s.since AT TIME ZONE 'UTC', s.archived_at AT TIME ZONE 'UTC', s.retain_until AT TIME ZONE 'UTC', s.name, s.status, s.version, s.recovery_attempts, s.lease_owner, s.condition, s.in_doubt, CASE WHEN last.id IS NOT NULL THEN json_build_array(last.id, last.step_name, last.action, last.status, CASE WHEN length(last.details) > 2000 THEN json_build_array(left(last.details, 1000), right(last.details, 1000)) ELSE to_json(last.details) END, last.created_at AT TIME ZONE 'UTC') END, CASE WHEN error.id IS NOT NULL THEN json_build_array(error.id, error.step_name, error.action, error.status, CASE WHEN length(error.details) > 2000 THEN json_build_array(left(error.details, 1000), right(error.details, 1000)) ELSE to_json(error.details) END, error.created_at AT TIME ZONE 'UTC') END) AS text), 'UTF8')
    FROM asked s
    LEFT JOIN LATERAL (SELECT * FROM saga_logs WHERE saga_id = s.id AND id = s.last_id LIMIT 1) last ON TRUE
    LEFT JOIN LATERAL (SELECT * FROM saga_logs WHERE saga_id = s.id AND id = s.error_id LIMIT 1) error ON TRUE
    ORDER BY s.created_at DESC, s.id DESC)
