WITH
seen AS MATERIALIZED (
    SELECT id, created_at, archived_at
    FROM saga_executions
    WHERE isfinite(created_at) AND (created_at, id) > (CAST(CAST(%(after_created_at)b AS text) AS timestamp) AT TIME ZONE 'UTC', CAST(CAST(%(after_id)b AS text) AS uuid))
    AND created_at <= statement_timestamp() - make_interval(secs => CAST(%(older_than)b AS double precision))
    ORDER BY created_at, id
    LIMIT 20000
)
(SELECT convert_to(CAST(json_build_array(count(*), (SELECT json_build_array(created_at AT TIME ZONE 'UTC', id) FROM seen ORDER BY created_at DESC, id DESC LIMIT 1)) AS text), 'UTF8') AS answer
    FROM seen)
UNION ALL
(SELECT convert_to(CAST(json_build_array(id, created_at AT TIME ZONE 'UTC') AS text), 'UTF8')
    FROM seen
    WHERE archived_at <= statement_timestamp() - make_interval(secs => CAST(%(older_than)b AS double precision))
    AND NOT EXISTS (SELECT FROM saga_logs WHERE saga_id = seen.id)
    ORDER BY created_at, id
    LIMIT %(limit)b)
