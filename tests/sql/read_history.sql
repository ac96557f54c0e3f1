SELECT
CAST(l.id AS bigint), convert_to(l.step_name, 'UTF8'), convert_to(l.action, 'UTF8'), convert_to(l.status, 'UTF8'),
convert_to(l.details, 'UTF8'), timestamptz_send(l.created_at)
, timestamptz_send(archived_at)
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id
WHERE e.id = %(saga_id)b
ORDER BY l.id
