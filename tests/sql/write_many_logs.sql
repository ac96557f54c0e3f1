WITH
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
) SELECT step_saga_id, version FROM appended
