SELECT convert_to(CAST(json_build_array(l.id, l.saga_id, e.name, l.step_name, left(l.details, 100001), l.created_at AT TIME ZONE 'UTC') AS text), 'UTF8') AS answer
FROM (
    SELECT *
    FROM saga_logs
    WHERE starts_with(step_name, 'saga_store.') AND created_at >= CAST(CAST(%(since)b AS text) AS timestamp) AT TIME ZONE 'UTC'
    AND starts_with(details, CAST(%(prefix)b AS text))
    AND id < CAST(%(after)b AS bigint)
    ORDER BY id DESC
    LIMIT %(limit)b
) l
LEFT JOIN LATERAL (SELECT name FROM saga_executions WHERE id = l.saga_id LIMIT 1) e ON TRUE
ORDER BY l.id DESC
