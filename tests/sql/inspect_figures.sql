WITH
living AS MATERIALIZED (
    SELECT id, name, created_at, updated_at,
    CASE WHEN NOT (status IN ('PENDING', 'RUNNING', 'COMPENSATING')) THEN 'finished'
    WHEN lease_expires_at > clock.at THEN 'held'
    WHEN recovery_attempts >= CAST(%(max_attempts)b AS integer) THEN 'exhausted'
    WHEN lease_expires_at IS NOT NULL THEN 'abandoned'
    ELSE 'active' END AS standing,
    row_number() OVER (ORDER BY created_at, id) AS position
    FROM (
        SELECT * FROM saga_executions WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING') ORDER BY created_at, id LIMIT 100001
    ) oldest
    CROSS JOIN (SELECT statement_timestamp() AS at) AS clock
),
judged AS MATERIALIZED (
    SELECT p.name,
    CASE WHEN p.standing = 'active' AND GREATEST(h.changed_at, CASE WHEN h.is_touched THEN p.created_at ELSE p.updated_at END) <= clock.stale_before THEN 'stale'
    ELSE p.standing END AS condition, CASE WHEN p.standing <> 'held' THEN h.in_doubt END AS in_doubt
    FROM living p
    CROSS JOIN (SELECT statement_timestamp() - make_interval(secs => CAST(%(stale_after)b AS double precision)) AS stale_before) AS clock
    LEFT JOIN LATERAL (
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
                    WHERE saga_id = p.id AND p.position <= 5000
                    ORDER BY id DESC
                    LIMIT GREATEST(100, LEAST(1000, 500000 / GREATEST((SELECT LEAST(count(*), 5000) FROM living), 1)))
                ) recent
            ) told_apart
            GROUP BY step_name, action, is_intervention
        ) steps) h ON TRUE
    WHERE p.position <= 100000
),
failed AS MATERIALIZED (
    SELECT id, updated_at, row_number() OVER (ORDER BY created_at DESC, id DESC) AS position
    FROM (
        SELECT * FROM saga_executions
        WHERE status = 'FAILED' AND created_at >= statement_timestamp() - make_interval(secs => CAST(%(window)b AS double precision))
        ORDER BY created_at DESC, id DESC
        LIMIT 100001
    ) newest
),
failed_in_doubt AS (
    SELECT h.in_doubt
    FROM failed p
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
                    LIMIT GREATEST(100, LEAST(1000, 500000 / GREATEST((SELECT LEAST(count(*), 5000) FROM failed), 1)))
                ) recent
            ) told_apart
            GROUP BY step_name, action, is_intervention
        ) steps) h
    WHERE p.position <= 5000
),
groups AS (
    SELECT name, condition, count(*) AS sagas
    FROM judged
    GROUP BY name, condition
)
SELECT convert_to(CAST(json_build_array((SELECT COALESCE(json_agg(json_build_array(name, condition, sagas)), '[]') FROM groups), (SELECT min(created_at) AT TIME ZONE 'UTC' FROM living), statement_timestamp() AT TIME ZONE 'UTC', (SELECT COALESCE(sum(in_doubt), 0) FROM judged) + (SELECT COALESCE(sum(in_doubt), 0) FROM failed_in_doubt), (SELECT count(*) FROM failed), (SELECT count(*) FROM living), (SELECT CAST(reltuples AS bigint) FROM pg_class WHERE oid = CAST('saga_executions' AS regclass)), (SELECT id FROM saga_logs ORDER BY id DESC LIMIT 1), json_build_array(pg_relation_size(CAST('saga_executions' AS regclass)), pg_table_size(CAST('saga_executions' AS regclass)) - pg_relation_size(CAST('saga_executions' AS regclass)), pg_indexes_size(CAST('saga_executions' AS regclass)), pg_stat_get_dead_tuples(CAST('saga_executions' AS regclass)), pg_stat_get_tuples_updated(CAST('saga_executions' AS regclass)), pg_stat_get_tuples_hot_updated(CAST('saga_executions' AS regclass)), GREATEST(pg_stat_get_last_vacuum_time(CAST('saga_executions' AS regclass)), pg_stat_get_last_autovacuum_time(CAST('saga_executions' AS regclass))) AT TIME ZONE 'UTC'), json_build_array(pg_relation_size(CAST('saga_logs' AS regclass)), pg_table_size(CAST('saga_logs' AS regclass)) - pg_relation_size(CAST('saga_logs' AS regclass)), pg_indexes_size(CAST('saga_logs' AS regclass)), pg_stat_get_dead_tuples(CAST('saga_logs' AS regclass)), pg_stat_get_tuples_updated(CAST('saga_logs' AS regclass)), pg_stat_get_tuples_hot_updated(CAST('saga_logs' AS regclass)), GREATEST(pg_stat_get_last_vacuum_time(CAST('saga_logs' AS regclass)), pg_stat_get_last_autovacuum_time(CAST('saga_logs' AS regclass))) AT TIME ZONE 'UTC'), has_table_privilege(CAST('saga_archives' AS regclass), 'SELECT')) AS text), 'UTF8') AS answer
