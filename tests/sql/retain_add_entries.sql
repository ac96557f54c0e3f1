WITH
added AS (
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT saga_id, step_name, action, status, details, created_at AT TIME ZONE 'UTC'
    FROM
    unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[]), CAST(string_to_array(CAST(%(entry_ids)b AS text), ',', '') AS bigint[]), CAST(%(step_names)b AS text[]),
        CAST(string_to_array(CAST(%(actions)b AS text), ',', '') AS text[]), CAST(string_to_array(CAST(%(statuses)b AS text), ',', '') AS text[]), CAST(%(details)b AS text[]),
        CAST(string_to_array(CAST(%(created)b AS text), ',', '') AS timestamp[]))
    WITH ORDINALITY AS entry (saga_id, id, step_name, action, status, details, created_at, position)
    ORDER BY position
    RETURNING id
)
SELECT count(*) FROM added
