WITH
held AS (
    UPDATE saga_executions
    SET retain_until = CAST(CAST(%(until)b AS text) AS timestamp) AT TIME ZONE 'UTC'
    WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid) AND archived_at IS NULL
    RETURNING id
),
logged AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT id, CAST(%(step_name)b AS text), 'act', 'COMPLETED', CAST(%(details)b AS text), statement_timestamp()
    FROM held
)
SELECT id FROM held
