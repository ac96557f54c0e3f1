WITH
written AS (
    SELECT id, version
    FROM saga_executions WHERE id = %(saga_id)b AND archived_at IS NULL
    FOR NO KEY UPDATE SKIP LOCKED),
logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT w.id, CAST(%(append_step_name)b AS text), CAST(%(append_step_action)b AS text), CAST(%(append_step_status)b AS text), CAST(%(append_step_details)b AS text),
    statement_timestamp() - make_interval(secs => COALESCE(CAST(NULL AS double precision), 0))
    FROM written w
) SELECT id, CAST(version AS bigint) FROM written
